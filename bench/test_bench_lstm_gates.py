"""Throughput of the pointwise cell alone."""

from collections.abc import Callable

import pytest

from bench import contestants
from bench.cases import GatesCase
from bench.report import Report
from bench.run_case import run_case
from bench.setting import Setting

CASES = "LSTM_GATES"


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_throughput(
    case: GatesCase,
    train: bool,
    setting: Setting,
    report: Report,
    benchmark: Callable,
    pytestconfig: pytest.Config,
) -> None:
    with setting.applied():
        problem = contestants.GatesProblem(case, setting)
        everyone = contestants.lstm_gates(problem, train, pytestconfig.option.short)
        oracle = contestants.lstm_gates_oracle(problem, train)
        run_case("lstm_gates", case, train, setting, everyone, oracle, report, benchmark, pytestconfig.option)
