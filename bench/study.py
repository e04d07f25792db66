"""A measurement beside the throughput report: `python -m bench.NAME [FOLDER]` writes NAME.json and NAME.md."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import machine
from bench.report import Report, Row


def publish(
    name: str,
    argv: list[str],
    measure: Callable[[dict[str, Any]], list[Row]],
    markdown: Callable[[str, list[Row]], str],
) -> tuple[Path, list[Row]]:
    """`measure` is given the machine, `markdown` a line that describes it. → the folder and the rows."""
    described = machine.describe() | {"command": f"python -m bench.{name}", "peaks": machine.peaks(1.0)}
    report = Report(described)
    folder = Path(argv[0]) if argv else report.folder()
    rows = measure(described)
    text = markdown(report.machine_line(), rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"machine": described, "rows": rows}, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text)
    print(text)
    return folder, rows
