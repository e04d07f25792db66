"""One case from gate to row; shared by the bench tests of every op."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import Case
from bench.contestants import deciding_op
from bench.floors import floor, measured
from bench.harness import Contestant, Disagreement, GpuClock, check, race, wall_clock
from bench.report import Report, race_row, refused_row
from bench.runtimes import Absent
from bench.setting import Setting
from convfast import backends


def run_case(
    op: str,
    case: Case,
    train: bool,
    setting: Setting,
    everyone: dict[str, Callable[[], Contestant]],
    oracle: dict[str, Tensor],
    report: Report,
    benchmark: Callable,
    short: bool,
) -> None:
    """Build, check against the oracle, race, add the row; pytest-benchmark gets a few runs of ours for its table. To be
    called within `setting.applied()`."""
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
        errors = {c.name: check(c, oracle, eager, case.terms, setting.unit) for c in contestants}
    except Disagreement as reason:
        report.rows.append(refused_row(op, case, setting.mode(train), str(reason)))
        raise
    on_gpu = setting.device == "cuda"
    clock = GpuClock() if on_gpu else wall_clock
    timings = race(contestants, budget=2.0 if short else 20.0, clock=clock, gate=report.gate)
    chosen = f"convfast {backends.select(deciding_op(op), None, setting.device, setting.dtype)}"
    headline = chosen if chosen in timings else f"{chosen} fast"
    peaks, size = report.machine["peaks"], setting.dtype.itemsize
    least = None
    if on_gpu or op == "conv1d_lstm":
        least = floor(case, train, measured(peaks, setting.peak("GFLOP/s"), setting.device, case), size)
    work, peak = case.work(train, size), peaks[setting.peak(case.unit)]
    mode = setting.mode(train)
    row = race_row(op, case, mode, contestants, timings, errors, work, peak, least, headline, absent)
    report.rows.append(row)
    benchmark.extra_info.update(row["contestants"][headline], best_opponent=row["best_opponent"])
    ours = next(contestant for contestant in contestants if contestant.name == headline)

    def finished() -> None:
        ours.run()
        if on_gpu:
            torch.cuda.synchronize()

    benchmark.pedantic(finished, rounds=5)
