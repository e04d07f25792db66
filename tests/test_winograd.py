"""The Winograd engine of `convfast.conv_lstm`: complete like the direct one, exact to its bound, and when it runs."""

import dataclasses
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import convfast
from convfast import conv_lstm
from tests.cases import BY_ID, EVERYTHING, LAYOUTS, WITH_STATE, Case, instruction_set, name_of, threads
from tests.oracle import FLOOR_EPS, assert_close_to_oracle, assert_matches, relative_errors
from tests.oracle import conv_lstm as oracle

pytestmark = pytest.mark.usefixtures("poisoned_memory", "native_ops")
ROOT = Path(__file__).parent.parent
KERNELS = (3, 5, 7)
ENGINES = ((4, 3), (2, 5))  # (m, r): output pixels of a tile's side, taps of a piece's
MULTIPLE = 8.0  # of eager's own error: transforms round more than sums do


def amplification(kernel: int, m: int, r: int) -> float:
    """What the transforms make of independent rounding errors of the products, relative to a direct sum's (RMS).

    Along one dim, squared: Σ_j A_ij² |B_j|² |G_j|² / taps, with the matrices of Toom and Cook at the engine's points,
    and all pieces of up to r of the kernel's taps.
    """
    points = [0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)]
    total = [0.0] * m
    for first in range(0, kernel, r):
        taps = min(r, kernel - first)
        for j, x in enumerate(points):
            others = points[:j] + points[j + 1 :]
            polynomial = np.poly(others)
            g = [x**i / np.prod([x - y for y in others]) for i in range(taps)]
            for i in range(m):
                total[i] += x ** (2 * i) * np.square(polynomial).sum() * np.square(g).sum()
        if taps == r:
            total[m - 1] += np.square(np.poly(points)).sum()  # the point at infinity
    return float(np.mean(total)) / kernel


def floor(kernel: tuple[int, ...]) -> float:
    """Where eager is exact by luck, as for one pixel: what is granted to a direct sum, as the transforms amplify it."""
    engines = ENGINES if max(kernel[-2:]) > 3 else ENGINES[:1]
    return FLOOR_EPS * max(np.prod([amplification(k, m, r) for k in kernel[-2:]]) ** 0.5 for m, r in engines)

SHAPES = [
    Case("odd_frame", space=(7, 9), hidden=5),
    Case("whole_tiles_and_blocks", batch=1, channels=16, hidden=16, space=(8, 12)),
    Case("channels_1_33", channels=1, hidden=33, space=(5, 20)),
    Case("channels_17_48", channels=17, hidden=48, space=(9, 6)),
    Case("channels_32_16_many_tiles", batch=3, time=2, channels=32, hidden=16, space=(41, 38)),
    Case("frame_of_one_pixel", space=(1, 1)),
    Case("frame_of_one_row", space=(1, 13)),
    Case("no_bias", given=("input", "weight_ih")),
    Case("state", given=WITH_STATE),
    Case("state_h_only", given=("input", "weight_ih", "bias", "h0")),
    Case("state_c_only_peephole", given=("input", "weight_ih", "bias", "c0", "peephole")),
    Case("lengths_reverse", batch=4, given=EVERYTHING, lengths=(2, 0, 3, 1), options={"reverse": True}),
    Case("lengths_without_state", batch=3, lengths=(1, 3, 0), options={"reverse": True}),
    Case("no_input", given=("h0", "c0", "bias", "peephole")),
    Case("no_input_c_only", given=("c0",)),
    Case("input_convolved_before", given=("input", "bias", "h0", "c0", "peephole"), lengths=(1, 3)),
    Case("groups_2", channels=4, options={"groups": 2}),
    Case("time_1", time=1, given=EVERYTHING),
    Case("batch_1_wide_state", batch=1, hidden=40, given=EVERYTHING),
]
PIECES = [
    Case("threes", given=EVERYTHING, hidden=20, space=(13, 14), lengths=(3, 2), kernel=(5, 5)),
    Case("fives", given=EVERYTHING, hidden=16, kernel=(7, 7)),
    Case("odd_frame", space=(7, 9), hidden=5, kernel=(7, 7)),
    Case("channels_17_48", channels=17, hidden=48, space=(9, 6), kernel=(6, 4)),
    Case("lengths_reverse", batch=4, given=EVERYTHING, lengths=(2, 0, 3, 1), kernel=(7, 7), options={"reverse": True}),
    Case("no_input", given=("h0", "c0", "bias", "peephole"), kernel=(7, 7)),
    Case("input_convolved_before", given=("input", "bias", "h0", "c0", "peephole"), lengths=(1, 3), kernel=(7, 7)),
    Case("even", given=EVERYTHING, kernel=(2, 4)),
    Case("one_row", space=(1, 13), kernel=(1, 7)),
    Case("one_tap", given=EVERYTHING, kernel=(1, 1)),
    Case("deep", given=EVERYTHING, space=(4, 7, 6), kernel=(3, 3, 3)),
    Case("deep_lengths", batch=4, given=EVERYTHING, lengths=(2, 0, 3, 1), space=(3, 4, 9), kernel=(3, 3, 3)),
    Case("deep_even", channels=17, hidden=33, space=(3, 5, 6), kernel=(2, 5, 4)),
    Case("deep_no_input", given=("h0", "c0", "bias", "peephole"), space=(2, 6, 5), kernel=(5, 3, 7)),
    Case("deep_convolved_before", given=("input", "bias", "h0"), lengths=(1, 3), space=(3, 5, 5), kernel=(3, 3, 3)),
    Case("one_frame_deep", space=(1, 8, 8), kernel=(3, 1, 3)),
]
CASES = [
    dataclasses.replace(
        case,
        id=f"{case.id}_k{'x'.join(str(k) for k in case.kernel)}",
        options=case.options | {"algorithm": "winograd"},
    )
    for case in [dataclasses.replace(case, kernel=(k, k)) for k in (3, 5) for case in SHAPES] + PIECES
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def check(case: Case, dtype: torch.dtype = torch.float32, layout: str = "contiguous", memory: str = "fast") -> None:
    plain = dataclasses.replace(case, options={k: v for k, v in case.options.items() if k != "algorithm"})
    bounds = {"multiple": MULTIPLE, "floor": floor(case.kernel)}
    assert_matches(oracle, conv_lstm, plain, dtype, "cpu", layout, **bounds, memory=memory, algorithm="winograd")


@each_case
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_results_and_gradients_match_oracle(case: Case, memory: str) -> None:
    check(case, memory=memory)


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_narrow_dtypes_match_oracle(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("case", [c for c in CASES if c.id.startswith(("state_k", "lengths_rev"))], ids=lambda c: c.id)
def test_layouts_match_oracle(case: Case, layout: str) -> None:
    check(case, layout=layout)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets_match_oracle(capability: str) -> None:
    script = """
import torch
from tests import test_winograd
print(torch.ops.convfast.cpu_capability() if test_winograd.convfast.available("conv_lstm")["cpu"] is True else "none")
for case in test_winograd.CASES:
    for memory in ("fast", "lean"):
        test_winograd.check(case, memory=memory)
"""
    expected = instruction_set(capability)
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [expected]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@each_kernel
def test_any_number_of_threads(kernel: int, count: int) -> None:
    case = Case("threads", channels=24, hidden=72, space=(13, 11), kernel=(kernel, kernel), given=EVERYTHING)
    with threads(count):
        check(dataclasses.replace(case, options={"algorithm": "winograd"}))


def layer(channels: int, hidden: int, kernel: int, scale: float = 1.0, **options: Any) -> convfast.ConvLSTM:
    module = convfast.ConvLSTM(channels, hidden, kernel, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    return module


def like(module: convfast.ConvLSTM, dtype: torch.dtype = torch.float32, **options: Any) -> convfast.ConvLSTM:
    """A module with the same weights and other options."""
    again = convfast.ConvLSTM(module.input_channels, module.hidden_channels, module.kernel_size, dtype=dtype, **options)
    again.load_state_dict(module.state_dict())
    return again


@pytest.mark.parametrize("low, high", [(-1, 1), (0, 255), (270, 290)], ids=["unit", "pixels", "kelvin"])
@each_kernel
def test_error_is_relative_to_the_terms_of_the_sums(kernel: int, low: float, high: float) -> None:
    x = torch.empty(2, 1, 3, 24, 21).uniform_(low, high)
    module = layer(3, 32, kernel, algorithm="winograd", backend="cpu")
    with torch.no_grad():
        error = module(x)[0] - like(module, torch.float64, backend="cpu", algorithm="direct")(x.double())[0]
        terms = F.conv2d(x[:, 0].abs(), module.weight_ih_l0.abs(), padding=kernel // 2)
    assert error.abs().max() <= 8 * torch.finfo(torch.float32).eps * terms.max()


@each_kernel
def test_error_is_small_and_does_not_grow_with_time(kernel: int) -> None:
    x = torch.randn(1, 100, 3, 24, 21)
    module = layer(3, 32, kernel, algorithm="winograd", backend="cpu")
    with torch.no_grad():
        exact = like(module, torch.float64, backend="cpu", algorithm="direct")(x.double())[0]
        eager = like(module, backend="reference")(x)[0]
        found = module(x)[0]
    error = (found - exact).abs().amax((0, 2, 3, 4))
    assert error[:10].max() <= 5e-6
    assert error.max() <= 2 * error[:20].max()
    last = (values[:, -20:] for values in (found, exact, eager))
    assert_close_to_oracle(*last, multiple=MULTIPLE, floor=floor((kernel, kernel)))


@pytest.mark.parametrize(
    ("channels", "hidden", "size", "scale"), [(8, 16, 16, 6.0), (64, 64, 12, 1.0), (256, 512, 8, 1.0)]
)
@each_kernel
def test_error_with_large_weights_and_many_channels(
    kernel: int, channels: int, hidden: int, size: int, scale: float
) -> None:
    if kernel == 7 and hidden > 64:
        channels, hidden = channels // 4, hidden // 4  # their transforms are 2 GB
    module = layer(channels, hidden, kernel, scale, algorithm="winograd", backend="cpu")
    x = torch.randn(1, 3, channels, size, size)
    generator = torch.Generator().manual_seed(2)
    dh = torch.randn(1, 3, hidden, size, size, generator=generator)

    def values(module: convfast.ConvLSTM) -> dict[str, Tensor]:
        dtype = module.weight_hh_l0.dtype
        inputs = x.to(dtype).requires_grad_()
        output, (_, c) = module(inputs)
        output.backward(dh.to(dtype))
        return {"h": output, "c": c, "dx": inputs.grad} | {n: p.grad for n, p in module.named_parameters()}

    exact = values(like(module, torch.float64, backend="cpu", algorithm="direct"))
    eager = values(like(module, backend="reference"))
    for name, value in values(module).items():
        terms = 3 * size * size if name.startswith(("weight", "bias")) else 0
        assert_close_to_oracle(value, exact[name], eager[name], name, terms, MULTIPLE, floor((kernel, kernel)))


@each_kernel
def test_same_bits_again_and_in_any_batch(kernel: int) -> None:
    module = layer(5, 24, kernel, algorithm="winograd", backend="cpu")
    x = torch.randn(5, 4, 5, 18, 23)
    grad = torch.randn(5, 4, 24, 18, 23)

    def run(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module.zero_grad()
        x = x.detach().requires_grad_()
        output, _ = module(x)
        output.backward(grad)
        return output.detach(), x.grad, module.weight_hh_l0.grad.clone()

    output, dx, dw = run(x, grad)
    for first, again in zip((output, dx, dw), run(x, grad)):
        assert torch.equal(first, again)
    for item in range(5):
        alone = run(x[item : item + 1], grad[item : item + 1])
        assert torch.equal(alone[0], output[item : item + 1])
        assert torch.equal(alone[1], dx[item : item + 1])


@pytest.mark.parametrize("hidden", [5, 16, 24, 48])
@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
@each_kernel
def test_chunked_equals_whole_bit_for_bit(kernel: int, algorithm: str, hidden: int) -> None:
    # The first and the last step of a call have no c before or no h after them, and other loops over cells.
    module = layer(3, hidden, kernel, algorithm=algorithm, backend="cpu")
    x = torch.randn(2, 5, 3, 18, 23)
    for train in (False, True):
        with torch.set_grad_enabled(train):
            output, (h, c) = module(x)
            first, state = module(x[:, :2])
            second, (h_n, c_n) = module(x[:, 2:], state)
        assert torch.equal(torch.cat([first, second], 1), output)
        assert torch.equal(h_n, h)
        assert torch.equal(c_n, c)


@each_kernel
def test_same_bits_from_several_python_threads(kernel: int) -> None:
    module = layer(3, 16, kernel, algorithm="winograd", backend="cpu")
    xs = [torch.randn(2, 3, 3, 17, 14) for _ in range(4)]

    def run(x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        output, _ = module(x)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), [x, *module.parameters()])]

    alone = [run(x) for x in xs]
    together: list[list[Tensor]] = [[] for _ in xs]
    runs = [threading.Thread(target=lambda i=i: together[i].extend(run(xs[i]))) for i in range(4)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    for a, b in zip(alone, together):
        assert len(b) == len(a)
        # A new Python thread may have another number of threads below it, which splits sums another way.
        for i, (p, q) in enumerate(zip(a, b)):
            assert torch.equal(p, q) if i < 2 else relative_errors(q, p.double())[1] < 1e-5


@each_kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_one_tile_further_than_direct(kernel: int, value: float) -> None:
    x = torch.randn(3, 3, 2, 42, 40)
    module = layer(2, 16, kernel, algorithm="winograd", backend="cpu")
    with torch.no_grad():
        clean = module(x)[0]
        x[1, 1, 0, 20, 18] = value
        output = module(x)[0]
    wrong = ~((output == clean).all(2))
    m, r = map(int, re.search(r"F\((\d)x\d, (\d)x\d\)", convfast.explain(module, x)).groups())
    reach = kernel // 2 + -kernel % r + m - 1
    assert not wrong[[0, 2]].any()
    assert not wrong[1, 0].any()
    for t in (1, 2):
        allowed = torch.zeros(42, 40, dtype=torch.bool)
        allowed[20 - t * reach : 21 + t * reach, 18 - t * reach : 19 + t * reach] = True
        assert not (wrong[1, t] & ~allowed).any()
        near = t * (kernel // 2)
        if value != value:
            assert output[1, t, :, 20 - near : 21 + near, 18 - near : 19 + near].isnan().all()


def test_subnormal_numbers() -> None:
    x = 1e-40 * torch.randn(2, 2, 3, 9, 9)
    module = layer(3, 16, 3, algorithm="winograd", backend="cpu")
    with torch.no_grad():
        found, exact = module(x)[0], like(module, torch.float64, backend="cpu")(x.double())[0]
    assert (found - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps


def test_second_derivatives() -> None:
    case = dataclasses.replace(BY_ID["state"], options={"algorithm": "winograd"})
    arguments = case.arguments(torch.float32)
    output, _, _ = case.call(conv_lstm, arguments, backend="cpu")
    (first,) = torch.autograd.grad(output.square().sum(), arguments["input"], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), arguments["weight_hh"])
    assert second.abs().max() > 0


def test_scripted_and_compiled_modules_take_the_algorithm_of_their_module() -> None:
    x = torch.randn(2, 3, 3, 9, 10)
    outputs = {}
    for algorithm in ("direct", "winograd"):
        torch.manual_seed(1)
        module = layer(3, 8, 3, algorithm=algorithm, backend="cpu")
        with torch.no_grad():
            outputs[algorithm] = module(x)[0]
            assert torch.equal(torch.jit.script(module)(x)[0], outputs[algorithm])
            compiled = torch.compile(module, fullgraph=True, backend="eager")
            assert torch.equal(compiled(x)[0], outputs[algorithm])
    assert not torch.equal(outputs["direct"], outputs["winograd"])
    torch.testing.assert_close(outputs["direct"], outputs["winograd"])


REFUSED = {
    "float64": (BY_ID["plain"], torch.float64),
    "1-D": (BY_ID["frame_1d"], torch.float32),
    "input convolution": (BY_ID["dilation_2"], torch.float32),
    "zeros": (dataclasses.replace(BY_ID["reflect"], kernel=(3, 3)), torch.float32),
    "stride 1": (BY_ID["stride_2"], torch.float32),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_call_it_cannot_take_is_refused_with_the_reason(reason: str) -> None:
    case, dtype = REFUSED[reason]
    with pytest.raises(RuntimeError, match=f"^conv_lstm_forward: algorithm is .winograd., expected .*{reason}"):
        case.call(conv_lstm, case.arguments(dtype), algorithm="winograd", backend="cpu")
    direct, auto = (case.call(conv_lstm, case.arguments(dtype), algorithm=a, backend="cpu") for a in ("direct", "auto"))
    assert all(torch.equal(a, b) for a, b in zip(direct, auto))


def test_wrong_algorithm() -> None:
    case = BY_ID["plain"]
    with pytest.raises(ValueError, match="algorithm is 'fft', expected one of auto, direct, winograd"):
        case.call(conv_lstm, case.arguments(torch.float32), algorithm="fft")
    with pytest.raises(ValueError, match="ConvLSTM: algorithm is 'fft'"):
        convfast.ConvLSTM(1, 1, 3, algorithm="fft")
    with pytest.raises(RuntimeError, match=r"algorithm is 'winograd'.*'reference'"):
        case.call(conv_lstm, case.arguments(torch.float32), algorithm="winograd", backend="reference")


def test_choice_does_not_depend_on_batch_or_time() -> None:
    module = convfast.ConvLSTM(16, 16, 3)
    for size in (4, 8, 12, 64):
        texts = {
            convfast.explain(module, torch.empty(batch, time, 16, size, size, device="meta"))
            for batch in (0, 1, 8)
            for time in (1, 10)
        }
        assert len(texts) == 1


def test_explain_names_engine_and_reason() -> None:
    x = torch.empty(4, 10, 16, 64, 64, device="meta")
    module = convfast.ConvLSTM(16, [64, 32], [3, 5], bidirectional=True)
    assert convfast.explain(module, x).splitlines() == [
        "layer 0: backend cpu, winograd F(4x4, 3x3)",
        "layer 0_reverse: backend cpu, winograd F(4x4, 3x3)",
        "layer 1: backend cpu, winograd F(4x4, 3x3), the kernel in 4 pieces",
        "layer 1_reverse: backend cpu, winograd F(4x4, 3x3), the kernel in 4 pieces",
    ]
    assert convfast.explain(convfast.ConvLSTM(16, 64, 5), x[..., :16, :16]).endswith("winograd F(2x2, 5x5)")
    assert convfast.explain(convfast.ConvLSTM(16, 32, 7), x).endswith("F(4x4, 3x3), the kernel in 9 pieces")
    repeated = convfast.explain(convfast.ConvLSTM(16, 64, 3), x[:, :1].expand(x.shape))
    assert repeated.endswith("winograd F(4x4, 3x3), input convolution by the library")  # once for all steps
    deep = torch.empty(1, 2, 16, 8, 16, 16, device="meta")
    assert convfast.explain(convfast.ConvLSTM3d(16, 16, 3), deep).endswith("F(4x4, 3x3), the kernel in 3 pieces")
    assert "direct: asked for" in convfast.explain(convfast.ConvLSTM(16, 64, 3, algorithm="direct"), x)
    assert "direct: a hidden kernel of 1x1 on frames of 64x64" in convfast.explain(convfast.ConvLSTM(16, 64, 1), x)
    assert "direct: float64" in convfast.explain(convfast.ConvLSTM(16, 64, 3, dtype=torch.float64), x)
    assert "the input convolution" in convfast.explain(convfast.ConvLSTM(16, 64, 3, padding_mode="reflect"), x)
    assert "input convolution by the library" in convfast.explain(convfast.ConvLSTM(16, 64, 3, groups=2), x)
    assert "backend reference" in convfast.explain(convfast.ConvLSTM(16, 64, 3, backend="reference"), x)
    assert "direct: too few channels" in convfast.explain(convfast.ConvLSTM(16, 1, 3), x)
    assert "direct: a hidden kernel of 3x3 on frames of 5x5" in convfast.explain(module, x[..., :5, :5])
    assert "direct: a hidden kernel of 3x1x1 on" in convfast.explain(convfast.ConvLSTM3d(16, 16, (3, 1, 1)), deep)
    wide = torch.empty(1, 2, 256, 16, 16, device="meta")
    assert "direct: transformed weights of 648 MiB" in convfast.explain(convfast.ConvLSTM(256, 256, 7), wide)
    assert "direct: many channels" in convfast.explain(convfast.ConvLSTM(512, 512, 3), torch.empty(1, 1, 512, 8, 8))
    assert "winograd" in convfast.explain(convfast.ConvLSTMCell(16, 64, 3), x[:, 0])
    h = x.new_empty(4, 64, 64, 64)
    found = convfast.explain(convfast.ConvLSTM(0, 64, 3, step=5), None, (h, h))
    assert found == "layer 0: backend cpu, winograd F(4x4, 3x3), without input"
    assert convfast.explain(convfast.ConvLSTM(16, [64, 8], 3), None, [(h, h), None]).splitlines()[0] == found
    assert convfast.explain(convfast.ConvLSTMCell(0, 64, 3), None, (h, h)) == found
    with pytest.raises(ValueError, match="state is None, expected one where input is None"):
        convfast.explain(convfast.ConvLSTM(0, 64, 3), None)
    for unbatched in ((h[0], h[0]), (h[0, 0, 0, 0], h[0, 0, 0, 0])):
        with pytest.raises(ValueError, match=r"state h of layer 0 has shape \["):
            convfast.explain(convfast.ConvLSTM(0, 64, 3), None, unbatched)
    with pytest.raises(RuntimeError, match="algorithm"):
        convfast.explain(convfast.ConvLSTM1d(16, 64, 3, algorithm="winograd"), x[..., 0])
    with pytest.raises(TypeError, match="module is a Conv2d"):
        convfast.explain(torch.nn.Conv2d(1, 1, 1), x)
    with pytest.raises(ValueError, match="16 channels, expected input_channels=3"):
        convfast.explain(convfast.ConvLSTM(3, 64, 3), x)
