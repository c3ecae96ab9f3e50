"""Run a GGUF file in llama.cpp, in a process of its own, through the wheel xllamacpp.

    with LlamaCpp(file, context=512) as llama:
        ids, log_q = llama.next_token(prompt_ids, 1024)
        text = llama.answer(messages, max_tokens=40)

The process keeps llama.cpp's log and its crashes out of this one: a model that it cannot load and a
reply that does not come are one error line. The log-probabilities are those of the softmax over the
whole vocabulary, before sampling. Prompts are ids, to which llama.cpp adds nothing. It keeps the
keys and values of the prompt before: a prompt that is longer by one token costs one token.

Threads: llama.cpp's wait for each other in a loop at the end of each operation, some 750 times a
token in 30 layers. If another process holds one of their cores, each waits for its time slice:
with two threads on two busy cores, a token of SmolLM2-135M took 3 s, with one thread 0.016 s. So
only idle cores are used, and one of them is left idle.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Timer
from typing import Any

TIMEOUT_SECONDS = 600  # of one reply
END_SECONDS = 10  # of a process that failed
PACKAGE = "xllamacpp"
# The token that is sampled: with one that ends within a character, no probabilities are reported.
PICKS_A = [["a", 1e9]]


def is_installed() -> bool:
    """Whether the wheel is there."""
    return find_spec(PACKAGE) is not None


class LlamaCpp:
    """llama.cpp with one model. A context manager: leaving it ends the process.

    Raises:
        UserError: llama.cpp cannot load the file, ended, or gave no reply in time.
    """

    def __init__(
        self, file: Path, *, context: int, lora: Path | None = None, device: str = "cpu"
    ) -> None:
        self.file = file
        settings = {
            "model": str(file), "context": context, "lora": str(lora) if lora else None,
            "threads": _idle_threads(), "gpu_layers": 0 if device == "cpu" else -1,
        }  # fmt: skip
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, json.dumps(settings)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            encoding="utf-8",
        )  # fmt: skip
        try:
            self._reply()
        except BaseException:
            self.close()
            raise

    def next_token(self, ids: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        """The `count` most likely tokens after `ids`, and their log-probabilities in nats."""
        body = {"prompt": [*ids], "n_predict": 1, "n_probs": count, "logit_bias": PICKS_A}
        found, log_probabilities = self._ask("completions", body)
        return found, log_probabilities

    def answer(self, messages: Sequence[Mapping[str, str]], max_tokens: int) -> str:
        """The greedy answer to a chat, which the file's chat template renders."""
        body = {"messages": [*messages], "max_tokens": max_tokens, "temperature": 0}
        return str(self._ask("chat", body))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, kind: str, body: Mapping[str, Any]) -> Any:
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps([kind, body]) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # there is no reply
        return self._reply()

    def _reply(self) -> Any:
        """The process's next line."""
        from qlora.errors import UserError  # not in the process

        assert self.process.stdout
        timer = Timer(TIMEOUT_SECONDS, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        is_late = not timer.is_alive()
        timer.cancel()
        if line:
            reply = json.loads(line)
            if "error" not in reply:
                return reply["found"]
            fault = str(reply["error"])
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)  # llama.cpp writes its log in a thread
        elif is_late:
            fault = f"no reply in {TIMEOUT_SECONDS} s; other programs may hold the cores"
        else:
            fault = f"it ended with exit code {self.process.wait()}"
        raise UserError(f"llama.cpp cannot run {self.file}: {self._logged() or fault}")

    def _logged(self) -> str:
        """What llama.cpp's log says of a model that it cannot load."""
        self.log.seek(0)
        faults = [line for line in self.log if "error loading model: " in line]
        return faults[0].partition("error loading model: ")[2].strip() if faults else ""


def _idle_threads() -> int:
    import psutil
    import torch

    busy = sum(psutil.cpu_percent(0.2, percpu=True)) / 100
    return max(1, int(torch.get_num_threads() - round(busy) - 1))


# ---- the process ----


def _serve(settings: Mapping[str, Any], requests: Iterable[str], out: Any) -> None:
    """A line of JSON for each request; the first one when the model is loaded."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.n_ctx = settings["context"]
    params.n_gpu_layers = settings["gpu_layers"]
    params.fit_params = False  # it loads the model twice
    params.n_parallel = 1
    params.warmup = False
    params.cache_ram_mib = 0  # keeps earlier prompts
    for threads in (params.cpuparams, params.cpuparams_batch):
        threads.n_threads = settings["threads"]
        threads.poll = 0  # sleep between tokens
    if settings["lora"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(settings["lora"], 1.0)]
    server = xllamacpp.Server(params)
    print('{"found": null}', file=out, flush=True)
    for line in requests:
        kind, body = json.loads(line)
        is_chat = kind == "chat"
        handle = server.handle_chat_completions if is_chat else server.handle_completions
        reply = handle(body)
        if "choices" not in reply:
            raise RuntimeError(reply.get("error", reply).get("message", reply))
        found = (choice := reply["choices"][0]).get("message", {}).get("content")
        if not is_chat:
            tokens = choice["logprobs"]["content"][0]["top_logprobs"]
            found = [[token[key] for token in tokens] for key in ("id", "logprob")]
        print(json.dumps({"found": found}), file=out, flush=True)


def _main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what llama.cpp itself prints
    try:
        _serve(json.loads(sys.argv[1]), sys.stdin, replies)
    except Exception as error:
        print(json.dumps({"error": " ".join(str(error).split())}), file=replies, flush=True)
        return  # the interpreter's end writes the rest of llama.cpp's log
    os._exit(0)


if __name__ == "__main__":
    _main()
