"""Throughput of one ConvLSTM sequence, and memory of a training step."""

from collections.abc import Callable

import pytest

from bench import contestants, memory
from bench.cases import ConvLSTMCase
from bench.report import Report
from bench.run_case import run_case
from bench.setting import Setting
from convfast import backends
from convfast.ops.conv_lstm import WITH_WINOGRAD

CASES = "CONV_LSTM"


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_throughput(
    case: ConvLSTMCase,
    train: bool,
    setting: Setting,
    report: Report,
    benchmark: Callable,
    pytestconfig: pytest.Config,
) -> None:
    with setting.applied():
        problem = contestants.Problem(case, setting)
        everyone = contestants.conv_lstm(problem, train, pytestconfig.option.short)
        oracle = contestants.conv_lstm_oracle(problem, train)
        run_case("conv_lstm", case, train, setting, everyone, oracle, report, benchmark, pytestconfig.option)


def test_memory_of_a_training_step(case: ConvLSTMCase, setting: Setting, report: Report) -> None:
    backend = backends.select("conv_lstm", None, setting.device, setting.dtype)
    names = ["eager cat", "eager hoisted", f"convfast {backend} fast", f"convfast {backend} lean"]
    if backend in WITH_WINOGRAD:
        names += [f"convfast {backend} fast direct", f"convfast {backend} lean direct"]
    with setting.applied():
        figures = {name: memory.measure(case, name, setting) for name in names}
    report.add_memory(case, setting, figures)
