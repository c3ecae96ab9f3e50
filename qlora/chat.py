"""Chat with a fine-tuned model.

python -m qlora.chat --adapter out
python -m qlora.chat --adapter out --compare        also show the base's answers
python -m qlora.chat --model out-merged
"""

from qlora.__main__ import run

if __name__ == "__main__":
    run("chat", prog="python -m qlora.chat")
