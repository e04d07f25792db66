"""Throughput of one ConvLSTM sequence, and memory of a training step."""

from bench import memory
from bench.cases import ConvLSTMCase
from bench.report import Report
from bench.run_case import throughput_of
from bench.setting import Setting
from convfast import backends
from convfast.ops.conv_lstm import WITH_WINOGRAD

OP = "conv_lstm"
test_throughput = throughput_of(OP)


def test_memory_of_a_training_step(case: ConvLSTMCase, setting: Setting, report: Report) -> None:
    backend = backends.select("conv_lstm", None, setting.device, setting.dtype)
    names = ["eager cat", "eager hoisted", f"convfast {backend} fast", f"convfast {backend} lean"]
    if backend in WITH_WINOGRAD:
        names += [f"convfast {backend} fast direct", f"convfast {backend} lean direct"]
    with setting.applied():
        figures = {name: memory.measure(case, name, setting) for name in names}
    report.add_memory(case, setting, figures)
