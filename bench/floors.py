"""Paper floors: what each kernel of a case must compute and move, and the least time of it: `python -m bench.floors`
rewrites the table of docs/gpu.md. On a CPU of Conv1d → LSTM only, with L2 in the place of shared memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from bench.cases import GPU, Case, Conv1dLSTMCase, ConvLSTMCase, GatesCase
from bench.readme import rewrite
from bench.report import markdown_table
from bench.setting import MODES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
STATE = 4  # bytes of a cell state


@dataclass(frozen=True)
class Chip:
    """Rates: two that were measured, and one processor's shared memory."""

    name: str
    flops: float  # a second, in a matrix product
    bytes: float  # a second, read + written by a copy
    shared: float  # bytes a second of one processor
    winograd: bool = False  # whether convolutions of 16 features or more may take half of the products


def measured(peaks: dict[str, float], peak: str, device: str, case: Case) -> Chip:
    """From `machine.peaks()`, `peak` being the matmul's key."""
    if device == "cuda":
        return Chip("measured", 1e9 * peaks[peak], 1e9 * peaks["GB/s"], H200.shared)
    # Activations may stay in caches. Threads that share a sample's hidden units share the reading of weights.
    threads = torch.get_num_threads() if case.batch == 1 else 1
    return Chip("measured", 1e9 * peaks[peak], float("inf"), 1e9 * threads * peaks["L2 GB/s"], winograd=True)


H200 = Chip("H200, bfloat16", 790e12, 4.3e12, 128 * 1.98e9)

# Guesses, for the column "expected" only.
OF_FLOPS, OF_BYTES = 0.65, 0.85
LAUNCH_GAP = 1.5e-6  # between two kernels of a CUDA graph that depend on each other
STEP_GAP = 0.7e-6  # barriers of one step inside a persistent kernel


@dataclass(frozen=True)
class Kernel:
    """What all launches of a kernel in one sequence add up to."""

    name: str
    launches: int
    flops: float
    bytes: float
    steps: int = 0  # of a persistent kernel
    resident: float = 0.0  # bytes read from shared memory in each of those steps

    def bounds(self, chip: Chip) -> dict[str, float]:
        return {
            "FLOPs": self.flops / chip.flops,
            "bytes": self.bytes / chip.bytes,
            "steps": self.steps * self.resident / chip.shared,
        }

    def floor(self, chip: Chip) -> float:
        return max(self.bounds(chip).values())

    def expected(self, chip: Chip) -> float:
        bounds = self.bounds(chip)
        run = max(bounds["FLOPs"] / OF_FLOPS, bounds["bytes"] / OF_BYTES, bounds["steps"] + self.steps * STEP_GAP)
        return run + self.launches * LAUNCH_GAP


def kernels(case: Case, train: bool, size: int = 2, winograd: bool = False) -> list[Kernel]:
    """`size`: bytes of an activation or weight. `winograd`: see Chip."""
    if isinstance(case, ConvLSTMCase):
        return list(_conv_lstm(case, train, size))
    if isinstance(case, Conv1dLSTMCase):
        return list(_conv1d_lstm(case, train, size, winograd))
    return list(_lstm_gates(case, train, size))


def floor(case: Case, train: bool, chip: Chip, size: int = 2) -> float:
    """Seconds of all kernels, one after the other."""
    return sum(kernel.floor(chip) for kernel in kernels(case, train, size, chip.winograd))


def _conv_lstm(case: ConvLSTMCase, train: bool, size: int) -> Iterator[Kernel]:
    pixels, taps, time = case.batch * math.prod(case.space), case.taps, case.time
    for cin, c in zip((case.channels, *case.hidden[:-1]), case.hidden):
        product = 2.0 * pixels * 4 * c * taps  # for each input channel
        weights = size * 4 * c * taps * (cin + c)
        moved = size * (cin + 2 * c) + STATE * 2 * c  # x and h in, h out, c in and out
        step = pixels * (moved + (size * 4 * c if train else 0)) + weights
        yield Kernel("step", time, product * (time * cin + (time - 1) * c), time * step)
        if not train:
            continue
        # Activated gates, dh and the later dgates in, dgates out; c, c' and dc in, dc out.
        back = pixels * (size * (4 + 1 + 4 + 4) * c + STATE * 4 * c) + size * 4 * c * taps * c
        yield Kernel("backward step", time, product * (time - 1) * c, time * back)
        yield Kernel("dx", 1, product * time * cin, size * time * pixels * (4 * c + cin))
        sources = size * (time * pixels * (4 * c + cin) + (time - 1) * pixels * (4 * c + c))
        yield Kernel("weight_grad", 2, product * (time * cin + (time - 1) * c), sources)


def _conv1d_lstm(case: Conv1dLSTMCase, train: bool, size: int, winograd: bool) -> Iterator[Kernel]:
    rows, hidden = case.frames, case.hidden
    sizes = [case.features, case.conv, 2 * case.conv]
    for index, (cin, cout) in enumerate(pairwise(sizes)):
        taps = 1.5 if winograd and cin >= 16 else 3
        flops, moved = 2.0 * rows * taps * cin * cout, size * rows * (cin + cout)
        if index == 0 or train:
            yield Kernel(f"conv1d {index}", 1, flops, moved)
        else:
            gates = 2.0 * rows * cout * 4 * hidden
            yield Kernel(f"conv1d {index} + W_ih", 1, flops + gates, size * rows * (cin + 4 * hidden))
        if train:
            # dy and y in, dpre out and in twice, x in, dx out.
            yield Kernel(f"conv1d {index} backward", 3, 2 * flops, size * rows * (5 * cout + 2 * cin))
    resident = size * 4 * hidden * hidden
    for layer in range(case.layers):
        inputs = sizes[-1] if layer == 0 else hidden
        project, recur = 2.0 * rows * inputs * 4 * hidden, 2.0 * rows * hidden * 4 * hidden
        if train or layer > 0:
            yield Kernel("lstm W_ih", 1, project, size * rows * (inputs + 4 * hidden))
        moved = rows * hidden * (5 * size + (STATE + 4 * size if train else 0))
        yield Kernel("lstm", 1, recur, moved, case.time, resident)
        if train:
            moved = rows * hidden * (size * (4 + 1 + 4) + 2 * STATE)
            yield Kernel("lstm backward", 1, recur, moved, case.time, resident)
            moved = size * rows * (3 * 4 * hidden + 2 * inputs + hidden)
            yield Kernel("lstm dx, dW", 3, 2 * project + recur, moved)


def _lstm_gates(case: GatesCase, train: bool, size: int) -> Iterator[Kernel]:
    yield Kernel("lstm_gates", 2 if train else 1, 0.0, case.work(train, size))


def table(chip: Chip = H200) -> str:
    """Kernels of the same name, of several layers, in one row."""
    lines = []
    for case in (case for table in GPU.values() for case in table):
        for train, mode in MODES.items():
            found = kernels(case, train)
            groups = {kernel.name: [k for k in found if k.name == kernel.name] for kernel in found}
            if len(groups) > 1:
                groups["**all**"] = found
            for name, group in groups.items():
                launches = sum(k.launches for k in group)
                flops, moved = sum(k.flops for k in group), sum(k.bytes for k in group)
                bounds = {bound for k in group for bound, time in k.bounds(chip).items() if time == k.floor(chip)}
                floor, expected = sum(k.floor(chip) for k in group), sum(k.expected(chip) for k in group)
                lines.append([case.id, mode, name, str(launches), f"{1e-9 * flops:.2f}", f"{1e-6 * moved:.1f}",
                              f"{1e6 * floor:.1f}", ", ".join(sorted(bounds)), f"{1e6 * expected:.0f}"])  # fmt: skip
    head = ["case", "mode", "kernel", "launches", "GFLOP", "MB", "floor µs", "bound", "expected µs"]
    return markdown_table(head, lines)


if __name__ == "__main__":
    PAGE.write_text(rewrite(PAGE.read_text(), "floors", table()))
