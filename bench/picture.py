"""The picture of a report."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.report import DRAWN, TORCH_KINDS, Report, Row

BARS = {
    "eager": ("best eager", "#b8bcc4"),
    "compile": ("best torch.compile", "#7d8594"),
    "ours": ("convfast", "#d1495b"),
}


def save(report: Report, op: str, path: Path) -> None:
    """Bars of time (log) per case, inference and training; the ratio to the best opponent beside ours."""
    races = report.races_by_mode(op)
    columns = min(2, len(races))
    lines, tallest = -(-len(races) // columns), max(map(len, races.values()))
    size = (7 * columns, lines * (2 + 0.6 * tallest))
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, (mode, rows) in zip(axes.flatten("F"), races.items()):
        axis.set_visible(True)
        _bars(axis, mode, rows)
    m = report.machine
    where = m["gpu"] if "gpu" in m else f"{m['cpu']}, {m['threads']} threads"
    figure.suptitle(f"{DRAWN[op]} on {where}, torch {m['torch']}", fontsize=11)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axis: plt.Axes, mode: str, rows: list[Row]) -> None:
    height = 0.8 / len(BARS)
    shown: list[float] = []
    for y, row in enumerate(rows):
        by_kind = {kind: [f["ms"] for f in row["contestants"].values() if f["kind"] == kind] for kind in TORCH_KINDS}
        times = {kind: min(found) for kind, found in by_kind.items() if found}
        ours = row["contestants"][row["headline"]]
        times["ours"] = ours["ms"]
        shown += times.values()
        for i, (kind, (label, color)) in enumerate(BARS.items()):
            axis.barh(y + (i - 1) * height, times.get(kind, 0), height, color=color, label=label if y == 0 else None)
        axis.text(ours["ms"] * 1.08, y + height, f"{ours['ratio']:.2f}×", va="center", fontsize=8, color="#8f1d2f")
    axis.set_xscale("log")
    axis.set_xlim(min(shown) / 2, max(shown) * 1.6)
    axis.set_yticks(range(len(rows)), [row["case"].replace("_", " ") for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("ms per sequence (log); × = best torch opponent / convfast")
    axis.set_title(mode)
    axis.spines[["top", "right"]].set_visible(False)
