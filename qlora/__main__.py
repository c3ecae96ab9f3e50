"""The commands: `qlora COMMAND ...`; train.py, merge_dequant.py, qlora/chat.py … run one each."""

import gc
import os
import signal
import sys
import time
from collections.abc import Sequence
from pkgutil import resolve_name
from typing import Any, NoReturn

from psutil import cpu_percent

from qlora import __version__, config
from qlora.cli import drop_lost_output, flag_of, parse
from qlora.errors import (
    OWN_SECONDS,
    STOPS,
    Interrupted,
    RankError,
    UserError,
    did_you_mean,
    ignore_hangups,
    is_first_process,
)
from qlora.files import hash_beside

# Bars of huggingface_hub and transformers, and of datasets: no lines in a log.
NO_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
LOOK_SECONDS, BUSY_PERCENT = 0.1, 50  # of the load at the start: half a core of others
SIZES = ("max_length", "per_device_train_batch_size", "max_new_tokens")  # settings of GPU memory
COMMANDS: dict[str, tuple[Any, str, str]] = {  # config, module:function, message after Ctrl-C
    "train": (
        config.TrainConfig, "qlora.plan.run:run",
        "--resume continues from the last checkpoint, if there is one",
    ),
    "merge": (
        config.MergeConfig, "qlora.merge:merge",
        "no merged checkpoint was written, the adapter is unchanged",
    ),
    "chat": (config.ChatConfig, "qlora.apps.chat:chat", "the chat is not saved"),
    "evaluate": (
        config.EvaluateConfig, "qlora.apps.evaluation:evaluate",
        "nothing was written; --limit N evaluates fewer rows",
    ),
    "report": (config.ReportConfig, "qlora.apps.report:report", "nothing was written"),
    "portable": (
        config.PortableConfig, "qlora.merge.export:export",
        "nothing was written, the adapter is unchanged",
    ),
    "plan": (config.TrainConfig, "qlora.plan.start:run", "nothing was written"),
    "inspect": (config.TrainConfig, "qlora.apps.inspection:inspect", "nothing was written"),
}  # fmt: skip
DOCS = {  # of the commands that have no config of their own
    "plan": "Print the memory that a training run needs, from config.json alone",
    "inspect": "Show rows of the training data token by token, with what is learned of them",
}


def main() -> None:
    """`qlora COMMAND ...`, the console command."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        words += ["--plan"] * (name == "plan")
        if name == "inspect" and not any(w.startswith("--inspect") for w in words):
            words += ["--inspect", "3"]
        run(name, prog=f"qlora {name}", words=words)
    elif name in ("-h", "--help"):
        print("usage: qlora COMMAND [FLAGS]\n       qlora COMMAND --help\n")
        for name, (config_class, _, _) in COMMANDS.items():
            docs = DOCS.get(name) or config.docs_of(config_class)[""]
            print(f"  {name:<10} {docs}")
    elif name == "--version":
        print(f"qlora {__version__}")
    else:
        hint = did_you_mean(name, COMMANDS) or f" The commands: {', '.join(COMMANDS)}."
        _stop(2, f"error: unknown command {name}.{hint}")


def run(name: str, *, prog: str, words: Sequence[str] | None = None) -> None:
    """Parse the command line and call the command's function with the config.

    A UserError or an out-of-memory error exits with 2 and one line `error: …`; Ctrl-C, SIGTERM and
    SIGHUP with 128 + their number and one line. Any other exception is a bug and keeps its
    traceback.
    """
    config_class, function, interrupted = COMMANDS[name]
    for number in STOPS:  # what Python ends on without removing partial files
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets SIGHUP
            signal.signal(number, _terminate)
    if not sys.stderr.isatty():  # the packages read these as they are imported
        for variable in NO_BARS:
            os.environ.setdefault(variable, "1")
    if not is_first_process():
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        settings = parse(config_class, words, prog=prog)
        if getattr(settings, "plan", False):  # it computes nothing
            _, function, interrupted = COMMANDS["plan"]
        elif getattr(settings, "inspects", False):
            _, function, interrupted = COMMANDS["inspect"]
        else:
            _wait_passively_beside_others()
            if name == "train" and is_first_process() and not settings.data.streaming:
                hash_beside([*settings.data.sources, *filter(None, [settings.data.eval_data])])
        imported(function)(settings)
        sys.stdout.flush()
    except UserError as error:
        _stop(2, f"error: {error}", anyway=isinstance(error, RankError))
    except BrokenPipeError:  # the reader closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as error:
        _stop(getattr(error, "exit_code", 130), f"interrupted: {str(error) or interrupted}")
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, without importing torch
            raise
        peak = sys.modules["torch"].cuda.max_memory_allocated() / 2**30
        lower = [flag_of(name) for name in SIZES if name in config.settings_of(config_class)]
        fix = " or ".join([f"lower {', '.join(lower)}"] * bool(lower) + ["use a smaller model"])
        _stop(2, f"error: the GPU's memory ran out after {peak:.2f} GiB: {fix}")


def imported(function: str) -> Any:
    """The function of that name. Its packages leave nothing to collect while they are imported:
    looking for it would take a second of five."""
    gc.disable()
    try:
        return resolve_name(function)
    finally:
        gc.enable()


def _wait_passively_beside_others() -> None:
    """Let OpenMP's threads sleep, not spin, at the end of a product if other processes use cores.

    A thread whose core another process holds keeps all others waiting (benchmarks/contention.py);
    alone, spinning is faster. OpenMP reads the variable when torch is imported.
    """
    if "torch" not in sys.modules and sum(cpu_percent(LOOK_SECONDS, percpu=True)) > BUSY_PERCENT:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _terminate(number: int, frame: object) -> NoReturn:
    ignore_hangups()
    raise Interrupted(number=number)


def _stop(code: int, line: str, *, anyway: bool = False) -> NoReturn:
    """Print a line, in one of several processes if it is the first, and end."""
    drop_lost_output()
    distributed = sys.modules.get("torch.distributed")
    is_joined = distributed and distributed.is_available() and distributed.is_initialized()
    if anyway or is_first_process():
        print(line, file=sys.stderr, flush=True)
    elif code == 2 and not is_joined:  # the launcher ends this one if it is the first's error, too
        for number in STOPS:
            signal.signal(number, signal.SIG_DFL)
        time.sleep(OWN_SECONDS)
        print(line, file=sys.stderr, flush=True)
    if is_joined:
        sys.stdout.flush()
        os._exit(code)  # NCCL may wait for other processes at a usual end
    sys.exit(code)


if __name__ == "__main__":
    main()
