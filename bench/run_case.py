"""One case from gate to row; shared by the bench tests of every op."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import Case
from bench.contestants import deciding_op
from bench.harness import Contestant, Disagreement, check, race
from bench.report import Report, race_row, refused_row
from bench.runtimes import Absent
from convfast import backends


def run_case(
    op: str,
    case: Case,
    train: bool,
    everyone: dict[str, Callable[[], Contestant]],
    oracle: dict[str, Tensor],
    report: Report,
    benchmark: Callable,
    short: bool,
) -> None:
    """Build, check against the oracle, race, add the row; pytest-benchmark gets a few runs of ours for its table."""
    # Every case compiles anew: dynamo keeps few versions of one function and would refuse the rest.
    torch._dynamo.reset()
    contestants, absent = [], {}
    for name, build in everyone.items():
        try:
            contestants.append(build())
        except Absent as reason:
            absent[name] = str(reason)
    eager = contestants[0].results()
    try:
        errors = {contestant.name: check(contestant, oracle, eager, case.terms) for contestant in contestants}
    except Disagreement as reason:
        report.rows.append(refused_row(op, case, train, str(reason)))
        raise
    timings = race(contestants, budget=2.0 if short else 20.0)
    chosen = f"convfast {backends.select(deciding_op(op), None, 'cpu')}"
    headline = chosen if chosen in timings else f"{chosen} fast"
    peak = report.machine["peaks"][case.unit]
    row = race_row(op, case, train, contestants, timings, errors, peak, headline, absent)
    report.rows.append(row)
    benchmark.extra_info.update(row["contestants"][headline], best_opponent=row["best_opponent"])
    ours = next(contestant for contestant in contestants if contestant.name == headline)
    benchmark.pedantic(ours.run, rounds=5)
