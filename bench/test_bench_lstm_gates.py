"""Throughput of the pointwise cell alone."""

from collections.abc import Callable

import pytest

from bench import contestants
from bench.cases import GatesCase
from bench.report import Report
from bench.run_case import run_case

CASES = "LSTM_GATES"


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_throughput(
    case: GatesCase, train: bool, report: Report, benchmark: Callable, pytestconfig: pytest.Config
) -> None:
    short = pytestconfig.option.short
    problem = contestants.GatesProblem(case)
    everyone = contestants.lstm_gates(problem, train, short)
    oracle = contestants.lstm_gates_oracle(problem, train)
    run_case("lstm_gates", case, train, everyone, oracle, report, benchmark, short)
