"""Chat with a fine-tuned model: `python -m qlora.chat --adapter out --compare` or `--model out`."""

from qlora.__main__ import run

if __name__ == "__main__":
    run("chat", prog="python -m qlora.chat")
