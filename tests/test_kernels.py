"""The raw CPU kernels, for each instruction set that this machine has, against numpy in higher precision;
and the threads that take turns in running them."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from convfast import native, toolchain
from tests.once import built_once

NAMES = ["baseline", "avx2", "avx512"]
DTYPES = [np.float32, np.float64]


@pytest.fixture(scope="module")
def library() -> Path:
    """The library whose kernels are tested: the one that convfast loads."""
    if why := native.reason():
        pytest.skip(f"no native library: {why}")
    path = Path(native.origin().partition(" (")[0])
    if not path.is_file():
        pytest.skip(f"the native library is no file to link with: {native.origin()}")
    return path


@pytest.fixture(scope="module")
def kernels(library: Path, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    pybind11 = pytest.importorskip("pybind11", reason="no pybind11: the kernels cannot be bound")
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    include = sysconfig.get_path("include")
    if not shutil.which(compiler[0]) or not Path(include, "Python.h").is_file():
        pytest.skip("no C++ compiler or no Python.h: the kernels cannot be bound")
    name = f"convfast_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"

    def build(folder: Path) -> None:
        source = toolchain.BUILD_FILE.parent / "testing" / "bindings.cpp"
        flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", f"-I{include}", f"-I{pybind11.get_include()}"]
        done = subprocess.run(
            [*compiler, *flags, "-shared", source, library, "-o", folder / name], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    path = built_once(tmp_path_factory, "kernels", build) / name
    spec = importlib.util.spec_from_file_location("convfast_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=NAMES)
def isa(request: pytest.FixtureRequest, kernels: ModuleType) -> str:
    if request.param not in kernels.instruction_sets():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def everything(dtype: type) -> np.ndarray:
    """Numbers of every sign and exponent, denormals, infinities and NaN among them, and more of those near zero."""
    bits, step = (np.uint32, 4999) if dtype is np.float32 else (np.uint64, 9_000_000_000_001 * 7)
    spread = np.arange(0, np.iinfo(bits).max, step, dtype=bits).view(dtype)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max]
    near = [np.linspace(-100, 100, 200_001), np.linspace(-1, 1, 100_001), special]
    return np.concatenate([spread, *(np.asarray(x, dtype) for x in near)])


def ulps(found: np.ndarray, exact: np.ndarray) -> float:
    """Largest error in units of the last place of the exact value, of which the smallest normal number is the least."""
    spacing = np.spacing(np.maximum(np.abs(exact), np.finfo(found.dtype).tiny).astype(found.dtype))
    return float(np.max(np.abs(found - exact) / spacing))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_numbers_of_16_bits_are_those_of_torch(kernels: ModuleType, isa: str, dtype: torch.dtype) -> None:
    every, half = np.arange(2**16, dtype=np.uint16), dtype == torch.float16
    wide, found = torch.from_numpy(every.view(np.int16)).view(dtype).float().numpy(), kernels.widen(isa, every, half)
    nan = np.isnan(wide)
    np.testing.assert_array_equal(found[~nan].view(np.uint32), wide[~nan].view(np.uint32))
    assert np.isnan(found[nan]).all()
    # Between neighbours: one bit above them, halfway, and one bit to either side of that.
    last = 13 if half else 16
    offsets = np.array([0, 1, (1 << last - 1) - 1, 1 << last - 1, (1 << last - 1) + 1, (1 << last) - 1], np.uint32)
    near = np.where(nan, 0, wide).view(np.uint32)[:, None] + offsets
    for numbers in (near.reshape(-1).view(np.float32), everything(np.float32), everything(np.float32)[:13]):
        rounded = torch.from_numpy(numbers).to(dtype).view(torch.int16).numpy().view(np.uint16)
        found = kernels.narrow(isa, numbers, half)
        nan = np.isnan(numbers)
        np.testing.assert_array_equal(found[~nan], rounded[~nan])
        assert np.isnan(kernels.widen(isa, found, half)[nan]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_over_the_whole_range(kernels: ModuleType, isa: str, dtype: type) -> None:
    x = everything(dtype)
    found = kernels.sigmoid(isa, x)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.isnan(found), np.isnan(x))
    x, found = x[~np.isnan(x)], found[~np.isnan(x)]
    with np.errstate(over="ignore"):
        exact = 1 / (1 + np.exp(-x.astype(np.longdouble)))
    assert found.min() >= 0 and found.max() == 1
    normal = exact >= 4 * np.finfo(dtype).tiny
    assert ulps(found[normal], exact[normal]) <= 4
    assert np.all(found[~normal] <= 8 * np.finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_over_the_whole_range(kernels: ModuleType, isa: str, dtype: type) -> None:
    x = everything(dtype)
    found = kernels.tanh(isa, x)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.isnan(found), np.isnan(x))
    x, found = x[~np.isnan(x)], found[~np.isnan(x)]
    assert found.min() == -1 and found.max() == 1
    np.testing.assert_array_equal(np.signbit(found), np.signbit(x))
    # float32 is x (P(x^2) / Q(x^2)). Where they count most, at |x| = 9, rounding takes 3 ulp in P, 3.4 in Q, 0.5 in
    # x^2, 1 in the quotient and 0.5 in the product; the fit 0.3. They do not all fall together.
    assert ulps(found, np.tanh(x.astype(np.longdouble))) <= (8 if dtype is np.float32 else 4)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def cell(z: np.ndarray, c_prev: np.ndarray, peephole: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shi et al. 2015, eq. 3: z [rows, 4, n], c_prev [rows, n], peephole [3, rows, n] -> c, h, activated gates."""
    i, f = sigmoid(z[:, 0] + peephole[0] * c_prev), sigmoid(z[:, 1] + peephole[1] * c_prev)
    g = np.tanh(z[:, 2])
    c = f * c_prev + i * g
    o = sigmoid(z[:, 3] + peephole[2] * c)
    return c, o * np.tanh(c), np.stack([i, f, g, o], axis=1)


def close(found: np.ndarray, exact: np.ndarray, factor: float = 16) -> None:
    """Errors within `factor` roundings of the largest value."""
    assert found.shape == exact.shape
    assert np.max(np.abs(found - exact), initial=0) <= factor * np.finfo(found.dtype).eps * max(1, np.abs(exact).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, n", [(1, 1), (3, 3), (2, 16), (2, 37)])
@pytest.mark.parametrize("options", [(), ("c",), ("c", "peephole")], ids=lambda options: "+".join(options) or "z")
def test_cell(kernels: ModuleType, isa: str, dtype: type, rows: int, n: int, options: tuple[str, ...]) -> None:
    random = np.random.default_rng(n)
    shape = (rows, n)
    z, dh, dc = (random.normal(size=size).astype(dtype) for size in ((rows, 4, n), shape, shape))
    c_prev = random.normal(size=shape).astype(dtype) if "c" in options else None
    peephole = random.normal(size=(3, *shape)).astype(dtype) if "peephole" in options else None
    wide = [
        z.astype(np.float64),
        np.zeros(shape) if c_prev is None else c_prev.astype(np.float64),
        np.zeros((3, *shape)) if peephole is None else peephole.astype(np.float64),
    ]
    found = kernels.cell_forward(isa, z, c_prev, peephole)
    for a, b in zip(found, cell(*wide), strict=True):
        close(a, b)

    c, _, activated = found
    dz, dc_prev, dpeephole = kernels.cell_backward(isa, activated, c, c_prev, dh, dc, peephole)

    # The cells are independent, so one complex step in an argument gives the exact derivative of every cell.
    def derivative(argument: int, where: tuple[slice | int, ...] = ()) -> np.ndarray:
        inputs = [a.astype(np.complex128) for a in wide]
        inputs[argument][where] += 1e-30j
        c, h, _ = cell(*inputs)
        return (h * dh + c * dc).imag / 1e-30

    close(dz, np.stack([derivative(0, (slice(None), gate)) for gate in range(4)], axis=1), 64)
    close(dc_prev, derivative(1), 64)
    if peephole is None:
        assert dpeephole is None
    else:
        close(dpeephole, np.stack([derivative(2, (gate,)) for gate in range(3)]), 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "samples, height, width, channels, kernel, columns, split",
    [
        (1, 1, 1, 1, (1, 1), 1, 1),
        (2, 5, 7, 3, (3, 3), 20, 3),
        (1, 4, 40, 16, (3, 1), 64, 0),
        (3, 6, 33, 5, (2, 5), 33, 1),
        (1, 3, 15, 20, (1, 1), 132, 1),
    ],
)
def test_gemm_over_frames(
    kernels: ModuleType,
    isa: str,
    dtype: type,
    samples: int,
    height: int,
    width: int,
    channels: int,
    kernel: tuple[int, int],
    columns: int,
    split: int,
) -> None:
    random = np.random.default_rng(0)
    frames = random.normal(size=(samples, height, width, channels)).astype(dtype)
    weight = random.normal(size=(*kernel, channels, columns)).astype(dtype)
    patches = np.lib.stride_tricks.sliding_window_view(frames.astype(np.float64), kernel, axis=(1, 2))
    exact = np.einsum("syxcij,ijcn->syxn", patches, weight.astype(np.float64))
    found = kernels.convolve(isa, frames, weight, split)
    # A sum of k products, in any order: at most k roundings of the sum of their magnitudes.
    size = np.einsum("syxcij,ijcn->syxn", np.abs(patches), np.abs(weight.astype(np.float64)))
    assert np.all(np.abs(found - exact) <= np.prod(kernel) * channels * np.finfo(dtype).eps * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, columns", [(1, 1), (5, 16), (33, 33), (64, 132), (7, 272), (400, 100)])
def test_gemm_over_rows(kernels: ModuleType, isa: str, dtype: type, k: int, columns: int) -> None:
    random = np.random.default_rng(0)
    a, b, init = (random.normal(size=size).astype(dtype) for size in ((40, k), (k, columns), (40, columns)))
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    for start in (None, init):
        wide_start = 0 if start is None else start.astype(np.float64)
        whole = kernels.gemm(isa, a, b, start)
        size = np.abs(wide_a) @ np.abs(wide_b) + np.abs(wide_start)
        assert np.all(np.abs(whole - wide_a @ wide_b - wide_start) <= (k + 1) * np.finfo(dtype).eps * size)
        # A row's bits do not depend on the rows it is computed with.
        for rows in range(1, 16):
            part = kernels.gemm(isa, a[:rows], b, None if start is None else start[:rows])
            np.testing.assert_array_equal(part, whole[:rows])
        if columns % (64 // a.itemsize) == 0:  # whole vectors of any instruction set: b can be read as it lies
            np.testing.assert_array_equal(kernels.gemm(isa, a, b, start, pack_b=False), whole)


@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_sums_of_a_tile_stay_in_registers(library: Path, name: str) -> None:
    """Through memory before and after the loop they cost a tile of few terms a third of its time."""
    tool = shutil.which("objdump")
    if tool is None or platform.machine() != "x86_64":
        pytest.skip("no objdump, or not an x86-64: instructions were not looked at")
    code = subprocess.run([tool, "-d", "--no-show-raw-insn", library], capture_output=True, text=True, check=True)
    tiles, moves = set(), []
    for function in code.stdout.split("\n\n"):
        title, _, body = function.partition("\n")
        if re.search(rf"{name}\w*(tile_gemm|few_rows_gemm|tile_weight_grad)I", title):
            tiles.add(title)
            moves += [title for line in body.splitlines() if re.search(r"mov[au]p[sd] .*\(%r[sb]p", line)]
    assert len(tiles) > 60 and not moves, sorted(set(moves))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, k, columns",
    [
        (1, 1, 1),
        (3, 14, 16),
        (130, 15, 33),
        (300, 33, 64),
        (70, 9, 132),
        (130, 15, 96),
        (70, 1029, 260),
        (66, 18, 1030),
    ],
)
def test_outer_sum(kernels: ModuleType, isa: str, dtype: type, rows: int, k: int, columns: int) -> None:
    random = np.random.default_rng(0)
    a, g = (random.normal(size=size).astype(dtype) for size in ((rows, k), (rows, columns)))
    wide_a, wide_g = a.astype(np.float64), g.astype(np.float64)
    size = np.abs(wide_a).T @ np.abs(wide_g)
    whole = kernels.outer_sum(isa, a, g)
    assert np.all(np.abs(whole - wide_a.T @ wide_g) <= (rows + 1) * np.finfo(dtype).eps * size)
    if k % 3 == 0:
        turned = kernels.outer_sum(isa, a, g, runs=3).reshape(3, k // 3, columns)[::-1]
        np.testing.assert_array_equal(turned.reshape(k, columns), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 16, 37])
@pytest.mark.parametrize("taps, stride, dilation", [(1, 1, 1), (3, 1, 1), (5, 2, 3), (14, 1, 1)])
def test_depthwise(
    kernels: ModuleType, isa: str, dtype: type, channels: int, taps: int, stride: int, dilation: int
) -> None:
    random = np.random.default_rng(0)
    time = 29
    x, w, bias = (random.normal(size=size).astype(dtype) for size in ((time, channels), (taps, channels), channels))
    starts = [j * dilation for j in range(taps)]
    windows = np.stack([x[start : time - starts[-1] + start : stride] for start in starts]).astype(np.float64)
    close(kernels.depthwise(isa, x, w, bias, stride, dilation), np.einsum("jrc,jc->rc", windows, w) + bias)
    g = random.normal(size=windows.shape[1:]).astype(dtype)
    found = kernels.depthwise_weight_grad(isa, x, g, taps, stride, dilation)
    close(found, np.einsum("jrc,rc->jc", windows, g.astype(np.float64)), 32)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x * np.sqrt(0.5)))


ACTIVATIONS = {
    # The function and its derivative.
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(float)),
    "leaky_relu": (lambda x: np.where(x > 0, x, 0.01 * x), lambda x: np.where(x > 0, 1, 0.01)),
    "sigmoid": (sigmoid, lambda x: sigmoid(x) * (1 - sigmoid(x))),
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "silu": (lambda x: x * sigmoid(x), lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x)))),
    "gelu": (gelu, lambda x: (gelu(x) / x) + x * np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(kernels: ModuleType, isa: str, dtype: type, name: str) -> None:
    function, derivative = ACTIVATIONS[name]
    x = np.concatenate([np.linspace(-15, 15, 20_002), [1e-20, -1e-20]]).astype(dtype)
    wide = x.astype(np.float64)
    y = getattr(kernels, name)(isa, x)
    # Roundings relative to the argument where the function grows with it, else to 1.
    room = 8 * np.finfo(dtype).eps * np.maximum(1, np.abs(wide))
    assert np.all(np.abs(y - function(wide)) <= room)
    dy = np.random.default_rng(0).normal(size=x.size).astype(dtype)
    from_pre = name in ("silu", "gelu")
    found = getattr(kernels, f"{name}_backward")(isa, dy, x if from_pre else y)
    assert np.all(np.abs(found - dy * derivative(wide)) <= 2 * np.abs(dy) * room)
    assert np.isnan(getattr(kernels, name)(isa, np.array([np.nan], dtype))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 5), (4, 4), (16, 33), (37, 18)])
def test_transpose(kernels: ModuleType, isa: str, dtype: type, rows: int, columns: int) -> None:
    src = np.random.default_rng(0).normal(size=(rows, columns)).astype(dtype)
    np.testing.assert_array_equal(kernels.transpose(isa, src), src.T)


@pytest.mark.parametrize("r", [3, 5])
@pytest.mark.parametrize(
    "samples, height, width, channels, columns",
    [(1, 1, 1, 1, 4), (2, 5, 7, 3, 20), (1, 8, 12, 16, 64), (3, 6, 33, 5, 132), (1, 9, 10, 300, 36)],
)
def test_winograd(
    kernels: ModuleType, isa: str, r: int, samples: int, height: int, width: int, channels: int, columns: int
) -> None:
    random = np.random.default_rng(0)
    frames = random.normal(size=(samples, height + r - 1, width + r - 1, channels)).astype(np.float32)
    weight = random.normal(size=(r, r, channels, columns)).astype(np.float32)
    patches = np.lib.stride_tricks.sliding_window_view(frames.astype(np.float64), (r, r), axis=(1, 2))

    def within(found: np.ndarray, exact: np.ndarray, terms: int) -> None:
        # A product of two transformed numbers, all rounded, and their sum, by the amplification of the transforms
        # (5.0 and 5.5, tests/test_winograd.py). A sum of n terms one by one errs by 0.28 sqrt(n) eps. The gradient's
        # transforms are the forward's, turned round.
        assert found.shape == exact.shape
        rms = np.sqrt(np.mean(np.square(found - exact))) / np.sqrt(np.mean(np.square(exact)))
        assert rms <= 5.5 * (1 + 0.28 * np.sqrt(terms)) * np.finfo(np.float32).eps

    exact = np.einsum("syxcij,ijcn->syxn", patches, weight.astype(np.float64))
    within(kernels.winograd_convolve(isa, frames, weight), exact, channels)
    grad = random.normal(size=(samples, height, width, min(columns, 64))).astype(np.float32)
    exact = np.einsum("syxcij,syxn->ijcn", patches, grad.astype(np.float64))
    within(kernels.winograd_weight_gradient(isa, frames, grad, r), exact, samples * height * width)


@pytest.mark.parametrize("r", [3, 5])
@pytest.mark.parametrize("rows, features, channels", [(1, 1, 1), (4, 16, 16), (2, 5, 33), (23, 17, 48), (64, 64, 20)])
def test_winograd_1d(kernels: ModuleType, isa: str, r: int, rows: int, features: int, channels: int) -> None:
    random = np.random.default_rng(0)
    x, w, g, bias = (
        random.normal(size=size).astype(np.float32)
        for size in ((rows + r - 1, features), (r, features, channels), (rows, channels), channels)
    )
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), r, axis=0)
    v = kernels.winograd_1d_input(isa, x, r).astype(np.float64)
    u = kernels.winograd_1d_filter(isa, w.reshape(r, -1), r).reshape(-1, features, channels)
    products = np.einsum("ptf,pfc->ptc", v, u).astype(np.float32)

    def within(found: np.ndarray, exact: np.ndarray, terms: np.ndarray) -> None:
        # Every product takes part with all its roundings, amplified as in one dim of test_winograd.
        assert found.shape == exact.shape
        assert np.all(np.abs(found - exact) <= 5.5**0.5 * 4 * np.finfo(np.float32).eps * terms.max())

    exact = np.einsum("rfj,jfc->rc", windows, w.astype(np.float64))
    sizes = np.einsum("rfj,jfc->rc", np.abs(windows), np.abs(w))
    within(kernels.winograd_1d_output(isa, products, r, rows), exact, sizes)
    found = kernels.winograd_1d_output(isa, products, r, rows, bias, True)
    within(found, np.maximum(exact + bias, 0), sizes + np.abs(bias))
    d = kernels.winograd_1d_input(isa, g, r, True).astype(np.float64)
    sums = np.einsum("ptf,ptc->pfc", v, d).astype(np.float32)
    found = kernels.winograd_1d_filter(isa, sums.reshape(-1, features * channels), r, True)
    exact = np.einsum("rfj,rc->jfc", windows, g.astype(np.float64))
    within(found, exact.reshape(r, -1), np.einsum("rfj,rc->jfc", np.abs(windows), np.abs(g)))


def take_turns(kernels: ModuleType, threads: int, *how: int) -> tuple[int, float, int]:
    """How often one was let through too early, seconds of processor, and who learned that another one failed.

    Who comes late to a team is not in it."""
    for _ in range(50):
        members, *found = kernels.take_turns(threads, *how)
        if members == threads:
            return tuple(found)
    pytest.skip(f"no team of {threads} threads came together")


@pytest.mark.parametrize("follow", [False, True], ids=["together", "behind_each_other"])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_wait_for_each_other(kernels: ModuleType, threads: int, follow: bool) -> None:
    """Awake, asleep, and where they are about to fall asleep as what they wait for comes: some 50 microseconds."""
    for turns, nap in [(20_000, 0), (300, 1), (300, 50), (100, 200)]:
        assert take_turns(kernels, threads, turns, nap, follow)[0] == 0


@pytest.mark.parametrize("follow", [False, True], ids=["together", "behind_each_other"])
def test_threads_that_wait_leave_the_processor_to_others(kernels: ModuleType, follow: bool) -> None:
    turns, nap = 10, 50_000
    assert take_turns(kernels, 2, turns, nap, follow)[1] < 0.1 * turns * nap * 1e-6


@pytest.mark.parametrize("nap", [0, 200], ids=["awake", "asleep"])
@pytest.mark.parametrize("follow", [False, True], ids=["together", "behind_each_other"])
def test_nobody_waits_for_who_has_failed(kernels: ModuleType, follow: bool, nap: int) -> None:
    for threads, failing in itertools.product((2, 3), (0, 7)):
        assert take_turns(kernels, threads, 20, nap, follow, failing)[2] == threads - 1
