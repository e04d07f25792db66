"""Rewrite the measured blocks of README.md: `python -m bench.readme [REPORT_JSON]`, by default from the report whose
pictures are in it."""

import re
import sys
from pathlib import Path

from bench.report import DRAWN, Report

ROOT = Path(__file__).resolve().parents[1]


def rewrite(text: str, block: str, content: str) -> str:
    """`text` with the lines between `<!-- block:begin -->` and `<!-- block:end -->` replaced.

    Raises:
        ValueError: the markers are not there exactly once.
    """
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    replaced, count = re.subn(
        f"({re.escape(begin)}\n).*?({re.escape(end)})", lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"readme: expected one {begin} .. {end}, got {count}")
    return replaced


def shown(text: str) -> Path:
    """The report whose pictures `text` has.

    Raises:
        ValueError: there is none.
    """
    found = re.search(r"<!-- results:begin -->.*?\]\((bench/results/[^/]+)/\w+\.png\)", text, re.DOTALL)
    if not found:
        raise ValueError("readme: no picture of a report in README.md; name the report: bench/results/*/report.json")
    return ROOT / found[1] / "report.json"


def rewritten(text: str, path: Path) -> str:
    """`text` with its blocks as the report at `path` has them."""
    report = Report.load(path)
    line, whole = report.machine_line(command=False), path.with_name("report.md")
    if whole.is_relative_to(ROOT):
        line += f" [Commands, commits and all contestants]({whole.relative_to(ROOT).as_posix()})."
    results = [line, report.summary()]
    for op, module in DRAWN.items():
        picture = path.with_name(f"{op}.png")
        if picture.exists() and picture.is_relative_to(ROOT):
            results.append(f"![{module}: time per sequence, log scale]({picture.relative_to(ROOT).as_posix()})")
    text = rewrite(text, "results", "\n\n".join(results).replace("## ", "### "))
    return rewrite(text, "memory", report.memory_table())


def main(argv: list[str]) -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    readme.write_text(rewritten(text, Path(argv[0]).resolve() if argv else shown(text)))


if __name__ == "__main__":
    main(sys.argv[1:])
