"""Throughput of one ConvLSTM sequence, and memory of a training step."""

from collections.abc import Callable

import pytest

from bench import contestants, memory
from bench.cases import ConvLSTMCase
from bench.report import Report
from bench.run_case import run_case
from convfast import backends

CASES = "CONV_LSTM"


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_throughput(
    case: ConvLSTMCase, train: bool, report: Report, benchmark: Callable, pytestconfig: pytest.Config
) -> None:
    short = pytestconfig.option.short
    problem = contestants.Problem(case)
    everyone = contestants.conv_lstm(problem, train, short)
    oracle = contestants.conv_lstm_oracle(problem, train)
    run_case("conv_lstm", case, train, everyone, oracle, report, benchmark, short)


def test_memory_of_a_training_step(case: ConvLSTMCase, report: Report) -> None:
    backend = backends.select("conv_lstm", None, "cpu")
    names = ["eager cat", "eager hoisted", f"convfast {backend} fast", f"convfast {backend} lean"]
    names += [f"convfast {backend} fast direct", f"convfast {backend} lean direct"]
    figures = {name: memory.measure(case, name) for name in names}
    report.memory.append({"case": case.id, "contestants": figures})
