"""Talk to a tuned model.

python -m qlora.chat --adapter out
python -m qlora.chat --adapter out --compare        its base's answers, too
python -m qlora.chat --model out-merged
"""

from qlora.cli import run
from qlora.config import ChatConfig


def main(config: ChatConfig) -> None:
    """Talk, with torch imported only now: a mistake in the flags should not wait for it."""
    from qlora.apps.chat import chat

    chat(config)


if __name__ == "__main__":
    run(
        main,
        ChatConfig,
        prog="python -m qlora.chat",
        interrupted="nothing is kept of a chat",
    )
