"""Throughput of Conv1d → LSTM over a batch of sequences, and memory of a training step."""

from collections.abc import Callable

import pytest

from bench import contestants, memory
from bench.cases import Conv1dLSTMCase
from bench.report import Report
from bench.run_case import run_case
from bench.setting import Setting
from convfast import backends

CASES = "CONV1D_LSTM"


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_throughput(
    case: Conv1dLSTMCase,
    train: bool,
    setting: Setting,
    report: Report,
    benchmark: Callable,
    pytestconfig: pytest.Config,
) -> None:
    with setting.applied():
        problem = contestants.Conv1dProblem(case, setting)
        everyone = contestants.conv1d_lstm(problem, train, pytestconfig.option.short)
        oracle = contestants.conv1d_lstm_oracle(problem, train)
        run_case("conv1d_lstm", case, train, setting, everyone, oracle, report, benchmark, pytestconfig.option)


def test_memory_of_a_training_step(case: Conv1dLSTMCase, setting: Setting, report: Report) -> None:
    names = ["eager", f"convfast {backends.select('lstm', None, setting.device, setting.dtype)}"]
    with setting.applied():
        figures = {name: memory.measure(case, name, setting) for name in names}
    report.add_memory(case, setting, figures)
