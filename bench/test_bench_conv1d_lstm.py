"""Throughput of Conv1d → LSTM over a batch of sequences, and memory of a training step."""

from bench import memory
from bench.cases import Conv1dLSTMCase
from bench.report import Report
from bench.run_case import throughput_of
from bench.setting import Setting
from convfast import backends

OP = "conv1d_lstm"
test_throughput = throughput_of(OP)


def test_memory_of_a_training_step(case: Conv1dLSTMCase, setting: Setting, report: Report) -> None:
    names = ["eager", f"convfast {backends.select('lstm', None, setting.device, setting.dtype)}"]
    with setting.applied():
        figures = {name: memory.measure(case, name, setting) for name in names}
    report.add_memory(case, setting, figures)
