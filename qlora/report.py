"""Write an HTML report of a run: `python -m qlora.report OUT` writes OUT/report.html."""

from qlora.__main__ import run

if __name__ == "__main__":
    run("report", prog="python -m qlora.report")
