"""How `convfast.conv_lstm` on the CPU shares its samples among teams of threads: any number of them gives the same."""

import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from convfast import conv_lstm
from tests import test_winograd
from tests.cases import EVERYTHING, Case, name_of, threads
from tests.oracle import results
from tests.test_conv_lstm import check

pytestmark = pytest.mark.usefixtures("poisoned_memory", "native_ops")
ROOT = Path(__file__).parent.parent

# Two samples are work enough for two threads: of 5, two teams have two groups each; one is left over for all threads.
FRAMES = Case("frames", batch=5, channels=8, hidden=32, space=(20, 19), given=EVERYTHING)
CASES = {
    "all_steps": FRAMES,
    "even_lengths": dataclasses.replace(FRAMES, lengths=(3, 2, 2, 3, 1)),
    "uneven_lengths": dataclasses.replace(FRAMES, lengths=(3, 0, 2, 0, 3)),
    # A team of three, whose first group has nothing to do.
    "first_idle": Case("idle", batch=3, channels=8, hidden=32, space=(30, 20), given=EVERYTHING, lengths=(0, 3, 3)),
    "no_states": dataclasses.replace(FRAMES, given=("input", "weight_ih", "bias"), lengths=(0, 3, 3, 0, 3)),
    "many": Case("many", batch=13, hidden=5, given=EVERYTHING, lengths=tuple(b % 4 for b in range(13))),
    "one_sample": dataclasses.replace(FRAMES, batch=1),
    "no_input": dataclasses.replace(FRAMES, hidden=16, given=("h0", "c0", "peephole")),
    "input_convolved_before": dataclasses.replace(FRAMES, given=("input", "h0")),
    "reverse": dataclasses.replace(FRAMES, lengths=(3, 2, 2, 3, 1), options={"reverse": True}),
}
# Sums of the weights' gradients are each thread's own, unless they are as large as these.
DIRECT = CASES | {
    "large_sums": Case("large", batch=5, time=2, channels=9, hidden=40, space=(9, 8), kernel=(7, 7)),
    "one_dim": Case("one", batch=4, hidden=20, space=(61,), kernel=(5,), options={"stride": 2}, out_space=(31,)),
}
WINOGRAD = CASES | {
    "large_sums": Case("large", batch=5, time=2, channels=64, hidden=64, space=(12, 12)),
    "pieces": dataclasses.replace(FRAMES, batch=3, kernel=(5, 5)),
    "deep": dataclasses.replace(FRAMES, batch=3, space=(4, 8, 9), kernel=(3, 3, 3), lengths=(3, 1, 2)),
}
each_number = pytest.mark.parametrize("count", [2, 3, 4, 6])
each_memory = pytest.mark.parametrize("memory", ["fast", "lean"])


def assert_as_alone(case: Case, count: int, algorithm: str) -> None:
    """Outputs do not depend on who computed them."""
    arguments = case.arguments(torch.float32)
    found = []
    for number in (1, count):
        with threads(number), torch.no_grad():
            found.append(case.call(conv_lstm, arguments, algorithm=algorithm, backend="cpu"))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@each_number
@each_memory
@pytest.mark.parametrize("name", DIRECT)
def test_direct(name: str, memory: str, count: int) -> None:
    with threads(count):
        check(DIRECT[name], torch.float32, "cpu", memory=memory, algorithm="direct")
    assert_as_alone(DIRECT[name], count, "direct")


@each_number
@each_memory
@pytest.mark.parametrize("name", WINOGRAD)
def test_winograd_tiles(name: str, memory: str, count: int) -> None:
    case = WINOGRAD[name]
    with threads(count):
        test_winograd.check(dataclasses.replace(case, options=case.options | {"algorithm": "winograd"}), memory=memory)
    assert_as_alone(case, count, "winograd")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=name_of)
def test_dtypes(dtype: torch.dtype) -> None:
    with threads(4):
        check(CASES["even_lengths"], dtype, "cpu", algorithm="direct")


def test_fewer_threads_than_asked_for_do_not_hang() -> None:
    script = """
from tests import test_conv_lstm_teams as teams
for name in ("even_lengths", "one_sample", "large_sums"):
    for memory in ("fast", "lean"):
        for count in (1, 4):
            teams.test_direct(name, memory, count)
            teams.test_winograd_tiles(name, memory, count)
"""
    # One thread first: plain torch's own convolutions, whose results are kept, give NaN where threads are missing.
    env = os.environ | {"OMP_THREAD_LIMIT": "3", "OMP_NUM_THREADS": "4", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_several_python_threads_at_once() -> None:
    case = CASES["even_lengths"]

    def call() -> dict[str, Tensor]:
        with threads(2):
            return results(case, conv_lstm, case.arguments(torch.float32), algorithm="direct", backend="cpu")

    alone = call()
    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(call) for _ in range(12)]:
            for name, value in job.result(timeout=120).items():
                assert torch.equal(value, alone[name]), name


@each_memory
@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_empty_batch_of_large_weights(algorithm: str, memory: str) -> None:
    case = Case("empty", batch=0, channels=16, hidden=48, given=EVERYTHING)
    found = results(case, conv_lstm, case.arguments(torch.float32), algorithm=algorithm, memory=memory, backend="cpu")
    for name, value in found.items():
        assert value.eq(0).all(), name


def test_sums_of_the_bias_are_taken_in_parts() -> None:
    # Every pixel has the same gradient: a running sum of all would lose some 1e-3, those of a row and of rows 1500 u.
    height, width, hidden = 500, 1000, 17
    weights = {"weight_ih": torch.zeros(4 * hidden, 1, 1, 1), "weight_hh": torch.zeros(4 * hidden, hidden, 1, 1)}
    bias = torch.full((4 * hidden,), 0.3, requires_grad=True)
    with threads(1):
        output, _ = conv_lstm(torch.zeros(1, 1, 1, height, width), bias=bias, backend="cpu", **weights)
        (gradient,) = torch.autograd.grad(output.sum(), bias)
    exact = bias.detach().double().requires_grad_()
    i, _, g, o = exact.chunk(4)
    total = height * width * (o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()).sum()
    (expected,) = torch.autograd.grad(total, exact)
    unit = torch.finfo(torch.float32).eps / 2
    torch.testing.assert_close(gradient.double(), expected, rtol=(height + width) * unit, atol=0)
