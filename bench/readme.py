"""Rewrite the measured blocks of README.md: `python -m bench.readme [REPORT_JSON]`, by default the newest report."""

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


def newest() -> Path:
    reports = sorted((ROOT / "bench" / "results").glob("*/report.json"), key=lambda path: path.stat().st_mtime)
    if not reports:
        raise FileNotFoundError("readme: no bench/results/*/report.json; run `pytest bench/` first")
    return reports[-1]


def main(argv: list[str]) -> None:
    path = Path(argv[0]).resolve() if argv else newest()
    report = Report.load(path)
    results = [report.machine_line(), report.summary()]
    for op, module in DRAWN.items():
        picture = path.with_name(f"{op}.png")
        if picture.exists() and picture.is_relative_to(ROOT):
            results.append(f"![{module}: time per sequence, log scale]({picture.relative_to(ROOT).as_posix()})")
    readme = ROOT / "README.md"
    text = rewrite(readme.read_text(), "results", "\n\n".join(results).replace("## ", "### "))
    readme.write_text(rewrite(text, "memory", report.memory_table()))


if __name__ == "__main__":
    main(sys.argv[1:])
