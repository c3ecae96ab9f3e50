"""One page about a run: `python -m qlora.report OUT` writes OUT/report.html."""

from qlora.cli import run
from qlora.config import ReportConfig


def main(config: ReportConfig) -> None:
    """Write the page, with matplotlib imported only now."""
    from qlora.apps.report import report

    report(config)


if __name__ == "__main__":
    run(
        main,
        ReportConfig,
        prog="python -m qlora.report",
        interrupted="nothing was written",
    )
