"""One case from gate to row; shared by the bench tests of every op."""

from argparse import Namespace
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.cases import Case
from bench.contestants import RACES, deciding_op
from bench.floors import floor, measured
from bench.harness import Contestant, GpuClock, check, race, wall_clock
from bench.report import Report, race_row, refused_row
from bench.runtimes import Absent
from bench.setting import MODES, Setting
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
    option: Namespace,
) -> None:
    """Build, check against the oracle, race, add the row; pytest-benchmark gets a few runs of ours for its table. To be
    called within `setting.applied()`. `option`: those of conftest.py."""
    # Every case compiles anew: dynamo keeps few versions of one function and would refuse the rest.
    torch._dynamo.reset()
    contestants, errors, left_out, failures = [], {}, {}, {}
    eager: dict[str, Tensor] = {}
    for name, build in everyone.items():
        if option.no_compile and name.startswith("compile"):
            continue
        # Whoever fails or gives other numbers is not timed; the others are, and the test fails in the end.
        try:
            contestant = build()
            eager = eager or contestant.results()
            errors[name] = check(contestant, oracle, eager, case.terms, setting.unit)
            contestants.append(contestant)
        except Absent as reason:
            left_out[name] = str(reason)
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            failures[name] = error
            if not eager:
                raise
    on_gpu = setting.device == "cuda"
    clock = GpuClock() if on_gpu else wall_clock
    chosen = f"convfast {backends.select(deciding_op(op), None, setting.device, setting.dtype)}"
    headline = chosen if chosen in everyone else f"{chosen} fast"
    if headline in failures:
        report.add(refused_row(op, case, setting.mode(train), f"{headline}: {left_out[headline]}"))
        raise failures[headline]
    # Events time a single run well, and a GPU is lent by the minute.
    budget, at_least = (0.5, 2e-3) if on_gpu else (2.0, 25e-3)
    budget *= 1 if option.short else 10
    timings = race(contestants, budget, at_least=at_least, clock=clock, gate=report.gate)
    peaks, size = report.machine["peaks"], setting.dtype.itemsize
    least = None
    if on_gpu or op == "conv1d_lstm":
        least = floor(case, train, measured(peaks, setting.peak("GFLOP/s"), setting.device, case), size)
    work, peak = case.work(train, size), peaks[setting.peak(case.unit)]
    mode = setting.mode(train)
    row = race_row(op, case, mode, contestants, timings, errors, work, peak, least, headline, left_out)
    report.add(row)
    benchmark.extra_info.update(row["contestants"][headline], best_opponent=row["best_opponent"])
    ours = next(contestant for contestant in contestants if contestant.name == headline)

    def finished() -> None:
        ours.run()
        if on_gpu:
            torch.cuda.synchronize()

    benchmark.pedantic(finished, rounds=5)
    for error in failures.values():
        raise error


def throughput_of(op: str) -> Callable[..., None]:
    """The test of an op's cases, for its bench file."""
    problem_of, contestants_of, oracle_of = RACES[op]

    @pytest.mark.parametrize("train", MODES, ids=MODES.values())
    def test_throughput(
        case: Case,
        train: bool,
        setting: Setting,
        report: Report,
        benchmark: Callable,
        pytestconfig: pytest.Config,
    ) -> None:
        with setting.applied():
            problem = problem_of(case, setting)
            everyone = contestants_of(problem, train, pytestconfig.option.short)
            oracle = oracle_of(problem, train)
            run_case(op, case, train, setting, everyone, oracle, report, benchmark, pytestconfig.option)

    return test_throughput
