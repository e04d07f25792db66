"""Fair timing: contestants agree with a float64 oracle first, then run interleaved in one process."""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.gate import ALWAYS, Gate

# Another order of summation rounds a few times worse or better; a wrong formula is wrong by orders of magnitude more.
ERROR_FACTOR = 16.0


@dataclass
class Contestant:
    """One way to compute a case. `run` is timed; `collect` names the tensors to be checked, given what it returned."""

    name: str
    kind: str  # "eager" | "compile" | "runtime" | "part" (of the work, computes some results only) | "convfast"
    run: Callable[[], Any]
    collect: Callable[[Any], dict[str, Tensor]]
    inputs: list[Tensor] = field(default_factory=list)  # inputs and parameters: there before the step

    def results(self) -> dict[str, Tensor]:
        return self.collect(self.run())


@dataclass
class Timing:
    """Seconds of one run, one entry per round."""

    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


class Disagreement(AssertionError):
    """A contestant's numbers are not those of the reference; its time means nothing."""


def errors(actual: Tensor, oracle: Tensor) -> tuple[float, float]:
    """(RMS, max) of actual - oracle, relative to the RMS and the max of the float64 oracle."""
    if actual.shape != oracle.shape:
        raise Disagreement(f"shape {list(actual.shape)}, expected {list(oracle.shape)}")
    difference = actual.double() - oracle
    rms = difference.square().mean().sqrt() / oracle.square().mean().sqrt()
    return rms.item(), (difference.abs().max() / oracle.abs().max()).item()


def check(
    contestant: Contestant, oracle: dict[str, Tensor], eager: dict[str, Tensor], terms: int, unit: float
) -> float:
    """Compare with the oracle; the worst error in units of the bound (at most 1).

    Bound per tensor, for RMS and max alike: ERROR_FACTOR times the larger of eager's own error and `unit`, half an ulp.
    Gradients of weights and biases are sums of `terms` products over batch, time and space. Adding n random terms one
    by one loses 0.28 sqrt(n) units relative to the sum, so sqrt(n) is granted where eager happened to do better.
    """
    worst = 0.0
    actual = contestant.results()
    for name in actual if contestant.kind == "part" else oracle:
        expected = oracle[name]
        serial = math.sqrt(terms) * unit if "weight" in name or "bias" in name else 0.0
        pairs = zip(errors(actual[name], expected), errors(eager[name], expected), ("RMS", "max"), strict=True)
        for got, eagers, norm in pairs:
            bound = max(ERROR_FACTOR * max(eagers, unit), serial)
            if not got <= bound:  # NaN too
                raise Disagreement(f"{contestant.name}: {norm} error of {name} is {got:.1e}, bound {bound:.1e}")
            worst = max(worst, got / bound)
    return worst


Clock = Callable[[Callable[[], object], int], float]  # a function and how often it runs → seconds of one run


def wall_clock(run: Callable[[], object], loops: int) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        run()
    return (time.perf_counter() - start) / loops


class GpuClock:
    """Between CUDA events on an idle GPU, so that launches count, with nothing of the inputs in its L2 cache."""

    def __init__(self) -> None:
        size = 2 * torch.cuda.get_device_properties().L2_cache_size
        self.other = torch.empty(size, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Callable[[], object], loops: int) -> float:
        total = 0.0
        for _ in range(loops):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.other.zero_()
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            end.synchronize()
            total += 1e-3 * start.elapsed_time(end)
        return total / loops


def race(
    contestants: list[Contestant],
    budget: float,
    min_rounds: int = 7,
    max_rounds: int = 60,
    at_least: float = 25e-3,
    clock: Clock = wall_clock,
    gate: Gate = ALWAYS,
) -> dict[str, Timing]:
    """Time all contestants in turn, round after round, in about `budget` seconds; each round starts at the next one.

    Runs shorter than `at_least` seconds are repeated inside a round. At least `min_rounds` rounds whatever the budget.
    Each has a run that is not timed right before: what ran before it may have left a core asleep or the caches cold.
    A round counts if the gate is open before and after it.
    """
    end = time.perf_counter() + gate.patience
    gate.wait(end)
    loops = {}
    round_time = 0.0
    for contestant in contestants:
        contestant.run()
        contestant.run()
        began = time.perf_counter()
        clock(contestant.run, 1)
        once = time.perf_counter() - began  # what the clock does beside the run counts, too
        loops[contestant.name] = max(1, round(at_least / once))
        round_time += once * (1 + loops[contestant.name])
    timings = {contestant.name: Timing() for contestant in contestants}
    collecting = gc.isenabled()
    gc.disable()
    try:
        rounds = min(max_rounds, max(min_rounds, int(budget / round_time)))
        for first in itertools.cycle(range(len(contestants))):
            gate.wait(end)
            seconds = {}
            for contestant in contestants[first:] + contestants[:first]:
                contestant.run()
                seconds[contestant.name] = clock(contestant.run, loops[contestant.name])
            gc.collect()
            if gate.is_open():
                for name, timing in timings.items():
                    timing.rounds.append(seconds[name])
                rounds -= 1
            if rounds == 0:
                break
    finally:
        if collecting:
            gc.enable()
    return timings


def ratio(slower: Timing, faster: Timing) -> float:
    """Median over the rounds of slower / faster: drift of the machine hits both sides of a round alike."""
    return statistics.median(a / b for a, b in zip(slower.rounds, faster.rounds, strict=True))
