"""Several programs on the same cores: `python -m bench.crowd [FOLDER]` writes crowd.json and crowd.md.

As on a server or in a sweep, every program runs a model of its own with all cores as its threads. All of them run plain
torch during the same stretches of time, then convfast; counted is what they get done together. By default torch's
threads spin between ops, on cores that another program waits for; OMP_WAIT_POLICY=passive sends them to sleep.
"""

import itertools
import multiprocessing
import os
import statistics
import sys
import time
from typing import Any

from bench.cases import Case, Conv1dLSTMCase, ConvLSTMCase
from bench.contestants import Conv1dProblem, Problem, conv1d_lstm, conv_lstm
from bench.harness import Contestant
from bench.report import Row, markdown_table
from bench.setting import MODES
from bench.study import publish

CASES = (ConvLSTMCase(4, 10, 16, (16,), 64, 64, 3), Conv1dLSTMCase(32, 128, 9, 64, 128, 2))
PROGRAMS = (1, 2, 4)
POLICIES = "default", "passive"  # OMP_WAIT_POLICY
ROUNDS, SECONDS = 5, 0.8
KEYS, WHO = ("case", "mode", "waiting", "programs"), ("torch", "convfast")


def contestants(case: Case, train: bool) -> list[Contestant]:
    """Plain torch at its fastest without a compiler, then convfast."""
    if isinstance(case, ConvLSTMCase):
        everyone = conv_lstm(Problem(case), train, short=True)
        names = "eager hoisted channels_last", "convfast cpu fast" if train else "convfast cpu"
    else:
        everyone = conv1d_lstm(Conv1dProblem(case), train, short=True)
        names = "eager", "convfast cpu"
    return [everyone[name]() for name in names]


def program(case: Case, train: bool, together: Any, results: Any) -> None:
    """Puts the sequences a second of each contestant, one a round, into `results`; None if it fails."""
    rates: list[list[float]] | None = None
    try:
        rates = race(case, train, together)
    finally:
        if rates is None:
            together.abort()  # the others are not to wait for this one
        results.put(rates)


def race(case: Case, train: bool, together: Any) -> list[list[float]]:
    pair = contestants(case, train)
    for contestant in pair:
        contestant.run()
    rates: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for contestant, found in zip(pair, rates, strict=True):
            together.wait()
            runs, begin = 0, time.perf_counter()
            while time.perf_counter() < begin + SECONDS:
                contestant.run()
                runs += 1
            found.append(case.batch * runs / (time.perf_counter() - begin))
    return rates


def total(each: list[list[list[float]]]) -> dict[str, float]:
    """Rates of all programs together, and their ratio: medians over the rounds."""
    theirs, ours = ([sum(rates) for rates in zip(*kind)] for kind in zip(*each))
    medians = {who: statistics.median(found) for who, found in zip(WHO, (theirs, ours))}
    return medians | {"ratio": statistics.median(b / a for a, b in zip(theirs, ours))}


def run(case: Case, train: bool, count: int) -> dict[str, float]:
    """What so many programs get done, in sequences a second. RuntimeError if one fails."""
    spawn = multiprocessing.get_context("spawn")
    together, results = spawn.Barrier(count), spawn.SimpleQueue()
    programs = [spawn.Process(target=program, args=(case, train, together, results)) for _ in range(count)]
    for process in programs:
        process.start()
    each = [results.get() for _ in programs]
    for process in programs:
        process.join()
    if None in each:
        raise RuntimeError(f"{case.id}: {each.count(None)} of {count} programs failed")
    return total(each)


def measure(_: dict[str, Any]) -> list[Row]:
    rows = []
    for policy, case, train, count in itertools.product(POLICIES, CASES, MODES, PROGRAMS):
        os.environ.pop("OMP_WAIT_POLICY", None)
        if policy == "passive":
            os.environ["OMP_WAIT_POLICY"] = policy
        row = {"case": case.id, "mode": MODES[train], "waiting": policy, "programs": count}
        rows.append(row | run(case, train, count))
        print(rows[-1], flush=True)
    return rows


def markdown(machine: str, rows: list[Row]) -> str:
    lines = [
        [*(str(row[key]) for key in KEYS), *(f"{row[who]:.0f}" for who in WHO), f"{row['ratio']:.1f}×"] for row in rows
    ]
    head = [*KEYS, *(f"{who}, sequences/s of all" for who in WHO), "ratio"]
    what = "Every program has all cores as its threads. Torch is eager: the hoisted loop in channels_last, or nn.LSTM."
    return f"# Several programs at once\n\n{machine} {what}\n\n{markdown_table(head, lines)}\n"


if __name__ == "__main__":
    publish("crowd", sys.argv[1:], measure, markdown)
