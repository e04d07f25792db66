"""How time grows with T, B, C and H×W: `python -m bench.scaling [FOLDER]` writes scaling.json, .md and .png.

Each axis is walked alone from one base case. Beside the measured slope (log-log, least squares) stands the one that
the operations have; beside each time the floor, which is the multiplications of the engine that `convfast.explain`
names over the measured peak.
"""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import convfast
from bench.cases import ConvLSTMCase
from bench.contestants import Problem, conv_lstm
from bench.harness import race
from bench.report import Row, markdown_table
from bench.setting import MODES
from bench.study import publish

BASE = ConvLSTMCase(4, 8, 32, (32,), 32, 32, 3)
AXES: dict[str, tuple[list[int], float]] = {  # values, exponent of the operations
    "T": ([2, 4, 8, 16, 32], 1.0),
    "B": ([1, 2, 4, 8, 16], 1.0),
    "C = Cin": ([8, 16, 32, 64, 128], 2.0),
    "H = W": ([8, 16, 32, 64, 96], 2.0),
}


def walk(axis: str) -> list[ConvLSTMCase]:
    change = {
        "T": lambda n: {"time": n},
        "B": lambda n: {"batch": n},
        "C = Cin": lambda n: {"channels": n, "hidden": (n,)},
        "H = W": lambda n: {"height": n, "width": n},
    }[axis]
    return [replace(BASE, **change(n)) for n in AXES[axis][0]]


def floor(case: ConvLSTMCase, train: bool, peak: float) -> tuple[str, float]:
    """(engine, seconds that its multiplications take at `peak` GFLOP/s).

    Raises:
        ValueError: `convfast.explain` puts Winograd in other words.
    """
    module = convfast.ConvLSTM(case.channels, list(case.hidden), case.kernel)
    frames = torch.empty(case.batch, case.time, case.channels, case.height, case.width, device="meta")
    engine = convfast.explain(module, frames)
    work = case.work(train)
    found = re.search(r"winograd F\((\d)x\d, (\d)x\d\)(?:, the kernel in (\d+) pieces)?$", engine)
    if found:
        m, r, pieces = map(int, found.groups("1"))
        tiles = math.ceil(case.height / m) * math.ceil(case.width / m)
        work *= (m + r - 1) ** 2 * tiles * pieces / (case.taps * case.height * case.width)
    elif "winograd" in engine:
        raise ValueError(f"scaling: engine is {engine!r}, expected winograd F(4x4, 3x3) or the like")
    return engine.removeprefix("layer 0: "), 1e-9 * work / peak


def measure(machine: dict[str, Any]) -> list[Row]:
    rows, peak = [], machine["peaks"]["GFLOP/s"]
    for axis, (values, exponent) in AXES.items():
        for train, mode in MODES.items():
            points = []
            for value, case in zip(values, walk(axis), strict=True):
                everyone = conv_lstm(Problem(case), train, short=True)
                names = ["eager hoisted channels_last", "convfast cpu fast" if train else "convfast cpu"]
                timings = race([everyone[name]() for name in names], budget=2.0)
                engine, least = floor(case, train, peak)
                eager, ours = (timings[name].median for name in names)
                times = {"ms": 1e3 * ours, "eager_ms": 1e3 * eager, "floor_ms": 1e3 * least}
                points.append({"value": value, **times, "engine": engine})
                print(axis, mode, points[-1], flush=True)
            rows.append({"axis": axis, "mode": mode, "expected": exponent, "slope": slope(points), "points": points})
    return rows


def slope(points: list[dict[str, Any]]) -> float:
    x, y = ([math.log(p[key]) for p in points] for key in ("value", "ms"))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def markdown(machine: str, rows: list[Row]) -> str:
    lines = [
        [
            row["axis"],
            row["mode"],
            str(p["value"]),
            f"{p['ms']:.3f}",
            f"{p['eager_ms'] / p['ms']:.2f}×",
            f"{p['floor_ms'] / p['ms']:.0%}",
            f"{row['slope']:.2f} ({row['expected']:.0f})",
            p["engine"],
        ]
        for row in rows
        for p in row["points"]
    ]
    head = ["axis", "mode", "value", "ms", "eager hoisted cl / ours", "floor / ours", "slope (of operations)", "engine"]
    return f"# How time grows\n\n{machine} Base: {BASE.id}.\n\n{markdown_table(head, lines)}\n"


def picture(rows: list[Row], path: Path) -> None:
    figure, axes = plt.subplots(1, len(AXES), figsize=(4 * len(AXES), 3.6), layout="constrained")
    for axis, name in zip(axes, AXES, strict=True):
        for row, color in zip((r for r in rows if r["axis"] == name), ("#d1495b", "#5b7fd1"), strict=True):
            values = [p["value"] for p in row["points"]]
            axis.loglog(values, [p["ms"] for p in row["points"]], "o-", color=color, label=row["mode"])
            axis.loglog(values, [p["floor_ms"] for p in row["points"]], ":", color=color, label="floor")
        axis.set_xlabel(name)
        axis.set_xticks(values, [str(v) for v in values])
        axis.minorticks_off()
    axes[0].set_ylabel("ms per sequence")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    folder, rows = publish("scaling", sys.argv[1:], measure, markdown)
    picture(rows, folder / "scaling.png")
