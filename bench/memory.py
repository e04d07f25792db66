"""Memory of one training step; on a CPU in a process of its own, where `python -m bench.memory CASE CONTESTANT` prints
JSON."""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import convfast
from bench.cases import CONV1D_LSTM, CONV_LSTM, Conv1dLSTMCase, ConvLSTMCase
from bench.contestants import Conv1dProblem, Problem, conv1d_lstm, conv_lstm
from bench.harness import Contestant
from bench.setting import CPU, Setting

ROOT = Path(__file__).resolve().parents[1]
# Freed blocks go back to the system at once; else the heap's fragmentation would be measured too.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(case: ConvLSTMCase | Conv1dLSTMCase, contestant: str, setting: Setting = CPU) -> dict[str, float]:
    """{"peak_mb": growth of the peak over the state before the step (model, input and library resident),
    "saved_tensors": what is kept for the backward, in units of all layers' outputs}.

    The peak is that of a process of its own, on a GPU that of torch's allocator."""
    if setting.device == "cuda":
        return _measure_gpu(case, contestant, setting)
    command = [sys.executable, "-m", "bench.memory", case.id, contestant, setting.precision]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory of {contestant} on {case.id}: exit status {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure_gpu(case: ConvLSTMCase | Conv1dLSTMCase, name: str, setting: Setting) -> dict[str, float]:
    contestant = _contestant(case, name, setting)
    contestant.run()  # compiles and loads
    for tensor in contestant.inputs:
        tensor.grad = None
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contestant.run()
    peak = torch.cuda.max_memory_allocated() - before
    saved = _saved_bytes(contestant.run, contestant.inputs) / (setting.dtype.itemsize * case.states)
    return {"peak_mb": peak / 1e6, "saved_tensors": saved}


def _resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak)."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _saved_bytes(step: object, excluded: list[Tensor]) -> int:
    """Distinct storages that autograd keeps between forward and backward, without inputs and parameters."""
    known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def _contestant(case: ConvLSTMCase | Conv1dLSTMCase, name: str, setting: Setting = CPU) -> Contestant:
    if isinstance(case, ConvLSTMCase):
        return conv_lstm(Problem(case, setting), train=True)[name]()
    return conv1d_lstm(Conv1dProblem(case, setting), train=True)[name]()


def _main(case_id: str, name: str, precision: str) -> None:
    setting = Setting(precision=precision)
    case = next(case for case in [*CONV_LSTM, *CONV1D_LSTM] if case.id == case_id)
    # Code, thread pools and the compiled library are in place before the measurement, no buffer of the real size is.
    _contestant(case.tiny(), name, setting).run()
    convfast.release_workspace()  # some of it depends on the channels alone
    contestant = _contestant(case, name, setting)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = _resident("VmRSS")
    for _ in range(3):
        contestant.run()
    peak = _resident("VmHWM") - before
    saved = _saved_bytes(contestant.run, contestant.inputs) / (setting.dtype.itemsize * case.states)
    print(json.dumps({"peak_mb": peak / 1e6, "saved_tensors": saved}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
