"""Talk to a tuned model.

python -m qlora.chat --adapter out
python -m qlora.chat --adapter out --compare        beside the answers of its base
python -m qlora.chat --model out-merged
"""

from qlora.__main__ import run

if __name__ == "__main__":
    run("chat", prog="python -m qlora.chat")
