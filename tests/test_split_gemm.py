"""GEMMs of parts of bfloat16, by matrix tiles (AMX) or dot products (AVX512-BF16): as exact as what they replace."""

import os
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import convfast
from convfast.environment import enabled
from tests.cases import instruction_set, name_of
from tests.oracle import assert_close_to_oracle, with_gradients
from tests.oracle import lstm as lstm_oracle

OPS = ("lstm", "conv1d")
EMULATED = enabled("CONVFAST_EMULATE_TILES")
NARROW = (torch.float32, torch.bfloat16, torch.float16)
# Rows enough for tiles on both threads; 33 and 70 are no multiples of a tile's depth, 17 rows none of its height.
# Then few samples, whose hidden units the threads share, and some more with weights that fill a core's L2.
SIZES = [
    *[(40, 6, 64, 64), (34, 5, 33, 70), (80, 3, 5, 17)],
    *[(2, 40, 33, 24), (1, 70, 33, 40), (5, 12, 64, 70), (9, 3, 40, 512)],
]


@pytest.fixture(autouse=True)
def capability(request: pytest.FixtureRequest) -> str:
    if EMULATED and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("the emulation of matrix tiles needs AVX-512")  # before it is built
    found = request.getfixturevalue("native_ops").cpu_capability()
    if "amx" not in found and "bf16" not in found:
        pytest.skip(f"neither matrix tiles nor dot products of bfloat16: {found}")
    torch.set_num_threads(2)
    return found


@pytest.fixture
def tiles(capability: str) -> None:
    if "amx" not in capability:
        pytest.skip(f"no matrix tiles: {capability}")


@pytest.fixture(params=NARROW, ids=name_of)
def dtype(request: pytest.FixtureRequest, capability: str) -> torch.dtype:
    if "amx" not in capability and request.param != torch.bfloat16:
        pytest.skip(f"no matrix tiles: {capability}")
    return request.param


def arguments(batch: int, time: int, inputs: int, hidden: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "input": (batch, time, inputs),
        "weight_ih": (4 * hidden, inputs),
        "weight_hh": (4 * hidden, hidden),
        "bias": (4 * hidden,),
    }
    scale = {"input": 1.0, "weight_ih": inputs**-0.5, "weight_hh": hidden**-0.5, "bias": 1.0}
    return {
        name: (scale[name] * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for name, shape in shapes.items()
    }


def check_lstm(size: tuple[int, int, int, int], dtype: torch.dtype, with_lengths: bool = False) -> None:
    tensors = arguments(*size, dtype)
    lengths = torch.arange(size[0]) % (size[1] + 1) if with_lengths else None
    y, (h, c) = convfast.lstm(**tensors, lengths=lengths, backend="cpu")
    exact, eager = (
        lstm_oracle(**{name: t.to(d) for name, t in tensors.items()}, lengths=lengths) for d in (torch.float64, dtype)
    )
    for name, actual, wanted, plain in zip("yhc", (y, h, c), (exact[0], *exact[1]), (eager[0], *eager[1])):
        assert_close_to_oracle(actual, wanted, plain, name)


@pytest.mark.parametrize("with_lengths", [False, True], ids=["", "lengths"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_lstm_matches_oracle(dtype: torch.dtype, size: tuple[int, int, int, int], with_lengths: bool) -> None:
    check_lstm(size, dtype, with_lengths)


def leaves_of(tensors: dict[str, Any]) -> list[Tensor]:
    nested = [t for value in tensors.values() for t in (value if isinstance(value, tuple) else (value,))]
    return [t for t in nested if t is not None and t.is_floating_point()]


OPTIONS = ("plain", "lengths", "state", "projection", "two_directions", "columns_of_x_far_apart", "turned_weights")


# 70 samples: a thread has them in two groups, whose sums go on from each other. 512 hidden units of 9 samples: shared
# out forward, not backward.
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    "size", [(14, 5, 64, 64), (13, 6, 33, 21), (70, 2, 70, 40), (6, 2, 5, 17), (3, 9, 33, 40), (9, 3, 40, 512)], ids=str
)
def test_gradients_match_oracle(dtype: torch.dtype, size: tuple[int, int, int, int], option: str) -> None:
    batch, time, inputs, hidden = size
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype)

    tensors: dict[str, Any] = arguments(*size, dtype)
    if option == "lengths":
        tensors["lengths"] = torch.arange(batch) % (time + 1)
    if option == "projection":
        tensors |= {"weight_hh": draw(4 * hidden, 13), "weight_hr": draw(13, hidden)}
    if option == "state":
        tensors["state"] = draw(1, batch, hidden), draw(1, batch, hidden)
    if option == "two_directions":
        tensors["reverse"] = draw(4 * hidden, inputs), draw(4 * hidden, hidden), draw(4 * hidden), None, None
        tensors["lengths"] = torch.arange(batch) % (time + 1)
    if option == "columns_of_x_far_apart":
        tensors["input"] = tensors["input"].transpose(1, 2).contiguous().transpose(1, 2)
    if option == "turned_weights":
        tensors |= {name: tensors[name].T.contiguous().T for name in ("weight_ih", "weight_hh")}

    def run(lstm: Any, to: torch.dtype, **more: str) -> dict[str, Tensor]:
        def copy(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(copy, value))
            return value.detach().to(to).requires_grad_() if value is not None and value.is_floating_point() else value

        own = {name: copy(value) for name, value in tensors.items()}
        y, (h, c) = lstm(**own, **more)
        return with_gradients({"y": y, "h": h, "c": c}, dict(enumerate(leaves_of(own))))

    exact, eager = (run(lstm_oracle, d) for d in (torch.float64, dtype))
    for name, value in run(convfast.lstm, dtype, backend="cpu").items():
        assert_close_to_oracle(value, exact[name], eager[name], name)


@pytest.mark.parametrize("rows", range(1, 16))
def test_any_height_of_tiles_matches_oracle(rows: int) -> None:
    check_lstm((2 * rows, 4, 40, 24), torch.bfloat16)


def test_same_bits_again_and_beside_other_samples(dtype: torch.dtype) -> None:
    tensors = arguments(64, 5, 33, 70, dtype)
    whole = convfast.lstm(**tensors, backend="cpu")[0]
    assert torch.equal(whole, convfast.lstm(**tensors, backend="cpu")[0])
    half = convfast.lstm(**tensors | {"input": tensors["input"][20:54]}, backend="cpu")[0]
    assert torch.equal(whole[20:54], half)


@pytest.mark.parametrize("few", [1, 2, 3, 5, 7, 11])
@pytest.mark.parametrize("size", [(33, 70), (64, 64), (40, 512)], ids=str)
def test_few_samples_have_the_bits_of_many_by_dot_products(size: tuple[int, int], few: int, capability: str) -> None:
    if "amx" in capability:
        pytest.skip("few samples go by float32 beside matrix tiles")
    tensors = arguments(24, 5, *size, torch.bfloat16)
    many = convfast.lstm(**tensors, backend="cpu")[0]
    assert torch.equal(many[:few], convfast.lstm(**tensors | {"input": tensors["input"][:few]}, backend="cpu")[0])


def test_nan_stays_in_its_sample(dtype: torch.dtype) -> None:
    tensors = arguments(40, 4, 33, 24, dtype)
    clean = convfast.lstm(**tensors, backend="cpu")[0]
    tensors["input"][3, 1, 5] = float("nan")
    y = convfast.lstm(**tensors, backend="cpu")[0]
    others = [b for b in range(40) if b != 3]
    assert torch.equal(y[others], clean[others])
    assert y[3, 1:].isnan().all()


def test_infinity_saturates(tiles: None) -> None:
    tensors = arguments(40, 4, 33, 24, torch.float32)
    tensors["input"][7, 1, 5] = float("inf")
    assert convfast.lstm(**tensors, backend="cpu")[0].isfinite().all()


def test_conv1d_matches_oracle(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 77, 32), (70, 32, 3), (70,))
    x, weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    weight = weight / 10
    exact, eager = (
        torch.conv1d(x.to(d).transpose(1, 2), weight.to(d), bias.to(d), padding=1, stride=2).transpose(1, 2)
        for d in (torch.float64, dtype)
    )
    actual = convfast.conv1d(x, weight, bias, padding=1, stride=2, backend="cpu")
    assert_close_to_oracle(actual, exact, eager)


def test_capability_asked_for_is_kept() -> None:
    code = "import torch, convfast; convfast.available('lstm'); print(torch.ops.convfast.cpu_capability())"
    asked = "avx512" if platform.machine() == "x86_64" else "default"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": asked}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == instruction_set(asked)
