"""`convfast.lstm_gates` against the float64 oracle, and everything that a caller may do with it."""

from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend

from convfast import lstm_gates
from tests.cases import DTYPES, arrange, name_of, normal
from tests.kept import kept_for_backward
from tests.oracle import assert_close_to_oracle, leaves_of, rounded, with_gradients
from tests.oracle import lstm_gates as oracle

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SIZES = {
    "frame_2d": (2, 5, (6, 7)),
    "channels_17": (3, 17, (4, 3)),
    "channels_1": (2, 1, (5, 4)),
    "many_pixels": (1, 2, (37, 61)),
    "one_pixel": (2, 33, (1, 1)),
    "no_frame": (3, 6, ()),
    "frame_1d": (2, 3, (11,)),
    "frame_3d": (2, 3, (2, 3, 4)),
}
GIVEN = {"gates": (), "c": ("c",), "peephole": ("peephole",), "c_peephole": ("c", "peephole")}
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded")


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return arrange(x, layout, "gates")


def arguments(size: str, given: tuple[str, ...], dtype: torch.dtype, layout: str = "contiguous") -> dict[str, Any]:
    batch, channels, space = SIZES[size]
    generator = torch.Generator().manual_seed(0)

    def made(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
        value = 2 * normal(shape, generator)
        return laid_out(value.to(dtype), layout).requires_grad_()

    return {
        "gates": made((batch, 4 * channels, *space), dtype, layout),
        "c": made((batch, channels, *space), dtype, layout) if "c" in given else None,
        "peephole": made((3, channels, *space), dtype, "contiguous") if "peephole" in given else None,
    }


def results(function: Any, tensors: dict[str, Any], **more: Any) -> dict[str, Tensor]:
    h, c = function(**tensors, **more)
    return with_gradients({"h": h, "c": c}, leaves_of(tensors))


def check(size: str, given: tuple[str, ...], dtype: torch.dtype, backend: str, layout: str = "contiguous") -> None:
    actual = results(lstm_gates, arguments(size, given, dtype, layout), backend=backend)
    exact, eager = (results(oracle, a) for a in rounded(arguments(size, given, dtype, layout), dtype))
    for name, value in actual.items():
        terms = SIZES[size][0] if name == "gradient of peephole" else 0
        assert_close_to_oracle(value, exact[name], eager[name], name, terms)


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_results_and_gradients_match_oracle(
    size: str, given: tuple[str, ...], dtype: torch.dtype, backend: str
) -> None:
    check(size, given, dtype, backend)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("size", ["frame_2d", "channels_17", "many_pixels", "frame_1d", "frame_3d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_layouts_match_oracle(size: str, layout: str, dtype: torch.dtype, backend: str) -> None:
    check(size, ("c", "peephole"), dtype, backend, layout)


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
def test_outputs_have_the_layout_of_gates_and_c_is_wide(channels_last: bool, backend: str, dtypes: tuple) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for dtype in dtypes:
        tensors = arguments("frame_2d", ("c",), dtype, "channels_last" if channels_last else "contiguous")
        h, c = lstm_gates(**tensors, backend=backend)
        assert h.is_contiguous(memory_format=memory_format)
        assert c.is_contiguous(memory_format=memory_format)
        assert h.dtype == dtype
        assert c.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_wide_state_is_taken_and_gets_a_wide_gradient(dtype: torch.dtype, backend: str) -> None:
    tensors = arguments("frame_2d", ("c", "peephole"), dtype)
    narrow = results(lstm_gates, tensors, backend=backend)
    wide = results(lstm_gates, tensors | {"c": tensors["c"].detach().float().requires_grad_()}, backend=backend)
    assert torch.equal(wide["h"], narrow["h"])
    assert torch.equal(wide["c"], narrow["c"])
    assert wide["gradient of c"].dtype == torch.float32
    assert torch.equal(wide["gradient of c"].to(dtype), narrow["gradient of c"])


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_first_and_second_derivatives_by_finite_differences(given: tuple[str, ...], float64_backend: str) -> None:
    tensors = arguments("frame_1d", given, torch.float64)
    names = [name for name, t in tensors.items() if t is not None]

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return lstm_gates(**(tensors | dict(zip(names, leaves))), backend=float64_backend)

    leaves = tuple(tensors[name] for name in names)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("used", [0, 1], ids=["h", "c"])
@pytest.mark.parametrize("given", [("c",), ("c", "peephole")], ids="_".join)
def test_output_without_gradient_counts_as_zero(
    given: tuple[str, ...], used: int, dtype: torch.dtype, backend: str
) -> None:
    tensors = arguments("frame_2d", given, dtype)
    leaves = [t for t in tensors.values() if t is not None]
    outputs = lstm_gates(**tensors, backend=backend)
    found = torch.autograd.grad(outputs[used].sum(), leaves)
    outputs = lstm_gates(**tensors, backend=backend)
    other = torch.zeros_like(outputs[1 - used]), torch.ones_like(outputs[used])
    expected = torch.autograd.grad([outputs[1 - used], outputs[used]], leaves, list(other))
    for leaf, a, b in zip(leaves, found, expected):
        assert a.dtype == leaf.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_outputs_may_have_any_layout_and_are_not_written_to(layout: str, backend: str) -> None:
    tensors = arguments("frame_2d", ("c", "peephole"), torch.float32)
    outputs = lstm_gates(**tensors, backend=backend)
    grads = [laid_out(torch.randn_like(o), layout) for o in outputs]
    before = [g.clone(memory_format=torch.contiguous_format) for g in grads]
    found = torch.autograd.grad(outputs, list(tensors.values()), grads)
    outputs = lstm_gates(**tensors, backend=backend)
    plain = torch.autograd.grad(outputs, list(tensors.values()), before)
    assert all(torch.equal(g, b) for g, b in zip(grads, before))
    assert all(torch.equal(a, b) for a, b in zip(found, plain))


def test_gradient_of_one_tensor_alone(backend: str) -> None:
    tensors = arguments("frame_2d", ("c", "peephole"), torch.float32)
    every = results(lstm_gates, tensors, backend=backend)
    for only in tensors:
        some = {name: t if name == only else t.detach() for name, t in tensors.items()}
        h, c = lstm_gates(**some, backend=backend)
        generator = torch.Generator().manual_seed(1)
        grads = [normal(v.shape, generator).float() for v in (h, c)]
        (found,) = torch.autograd.grad([h, c], [some[only]], grads)
        assert torch.equal(found, every[f"gradient of {only}"])


def test_empty_batch(backend: str) -> None:
    gates, c = torch.zeros(0, 8, 3, 3, requires_grad=True), torch.zeros(0, 2, 3, 3)
    peephole = torch.ones(3, 2, 3, 3, requires_grad=True)
    h, c_next = lstm_gates(gates, c, peephole, backend=backend)
    assert h.shape == c_next.shape == (0, 2, 3, 3)
    d_gates, d_peephole = torch.autograd.grad([h.sum() + c_next.sum()], [gates, peephole])
    assert d_gates.shape == gates.shape
    assert torch.equal(d_peephole, torch.zeros(3, 2, 3, 3))


def test_frames_without_pixels(backend: str) -> None:
    gates = torch.zeros(2, 8, 0, 5, requires_grad=True)
    h, c_next = lstm_gates(gates, torch.zeros(2, 2, 0, 5), backend=backend)
    assert h.shape == c_next.shape == (2, 2, 0, 5)
    assert torch.autograd.grad(h.sum() + c_next.sum(), gates)[0].shape == gates.shape


def test_nan_and_infinity_stay_where_they_are(backend: str) -> None:
    gates, c = torch.randn(2, 12, 9), torch.randn(2, 3, 9)
    gates[0, 1, 4] = float("nan")  # input gate of channel 1
    gates[1, :3, 2], gates[1, 3:6, 2], gates[1, 6:9, 2] = float("inf"), -float("inf"), float("inf")
    h, c_next = lstm_gates(gates, c, backend=backend)
    expected = torch.zeros(2, 3, 9, dtype=torch.bool)
    expected[0, 1, 4] = True
    assert torch.equal(h.isnan(), expected)
    assert torch.equal(c_next.isnan(), expected)
    assert torch.equal(c_next[1, :, 2], torch.ones(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs the memory of a GPU")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_triton_offsets_of_more_than_32_bits(layout: str, triton_ops: Any) -> None:
    gates = laid_out(torch.randn(9, 256, 1024, 1024, dtype=torch.bfloat16), layout)
    whole, alone = (triton_ops.lstm_gates_forward(g, None, None, True) for g in (gates, gates[-1:]))
    assert all(torch.equal(a[-1:], b) for a, b in zip(whole, alone))
    whole, alone = (
        triton_ops.lstm_gates_backward(activated, None, c, None, h, c, [1, 0, 0]) for h, c, activated in (whole, alone)
    )
    assert torch.equal(whole[0][-1:], alone[0])


BAD = {
    "gates_type": ({"gates": [1.0]}, TypeError, "gates is a list, expected a Tensor"),
    "gates_rank": ({"gates": torch.zeros(8)}, ValueError, r"gates has shape \[8\], expected \[B, 4C, \*S\]"),
    "gates_channels": (
        {"gates": torch.zeros(2, 7, 3)},
        ValueError,
        r"gates has .*\[2, 7, 3\], expected .*multiple",
    ),
    "gates_integer": ({"gates": torch.zeros(2, 8, 3).int()}, TypeError, "gates has dtype .*int32, expected one of"),
    "c_shape": ({"c": torch.zeros(2, 2, 4)}, ValueError, r"c has shape \[2, 2, 4\], expected \[2, 2, 3\]"),
    "c_dtype": ({"c": torch.zeros(2, 2, 3).half()}, TypeError, "c has dtype .*float16, expected .*float32 like gates"),
    "c_device": ({"c": torch.zeros(2, 2, 3, device="meta")}, ValueError, "c is on meta, expected cpu like gates"),
    "peephole_shape": ({"peephole": torch.zeros(3, 2)}, ValueError, r"peephole has .*expected \[3, 2, 3\] .*\[3, C"),
    "peephole_dtype": ({"peephole": torch.zeros(3, 2, 3).double()}, TypeError, "peephole has .*float64, expected .*32"),
    "backend": ({"backend": "gpu"}, ValueError, "backend is 'gpu', expected one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_named_with_what_was_expected(name: str, host_backend: str) -> None:
    wrong, error, message = BAD[name]
    good = {"gates": torch.zeros(2, 8, 3), "c": torch.zeros(2, 2, 3), "backend": host_backend}
    lstm_gates(**good)
    with pytest.raises(error, match=f"^lstm_gates: {message}"):
        lstm_gates(**(good | wrong))


def loss(backend: str, gates: Tensor, c: Tensor, peephole: Tensor) -> Tensor:
    h, c_next = lstm_gates(gates, c, peephole, backend=backend)
    return h.sin().sum() + c_next.square().sum()


def test_compiles_without_graph_break_or_recompilation(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for batch, height in ((5, 6), (7, 9), (11, 10)):
        gates, c = torch.randn(batch, 8, height, 4), torch.randn(batch, 2, height, 4)
        tensors = [t.requires_grad_() for t in (gates, c, torch.randn(3, 2, height, 4))]
        value, plain = compiled(backend, *tensors), loss(backend, *tensors)
        torch.testing.assert_close(value, plain)
        for a, b in zip(torch.autograd.grad(value, tensors), torch.autograd.grad(plain, tensors)):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_function_transforms(backend: str, widest: torch.dtype) -> None:
    tensors = [t.detach() for t in arguments("frame_1d", ("c", "peephole"), widest).values()]

    def function(*t: Tensor) -> Tensor:
        return loss(backend, *t)

    def plain(gates: Tensor, c: Tensor, peephole: Tensor) -> Tensor:
        h, c_next = oracle(gates, c, peephole)
        return h.sin().sum() + c_next.square().sum()

    everyone = (0, 1, 2)
    expected = torch.func.grad(plain, argnums=everyone)(*tensors)
    for a, b in zip(torch.func.grad(function, argnums=everyone)(*tensors), expected):
        torch.testing.assert_close(a, b)
    stacked = torch.stack([tensors[0], -tensors[0]])
    over = (0, None, None)
    each = torch.stack([function(g, *tensors[1:]) for g in stacked])
    torch.testing.assert_close(torch.func.vmap(function, over)(stacked, *tensors[1:]), each)
    per_sample = torch.func.vmap(torch.func.grad(function, argnums=2), over)(stacked, *tensors[1:])
    torch.testing.assert_close(per_sample[0], expected[2])
    small = [t[:1, ..., :2].clone() for t in tensors[:2]] + [tensors[2][..., :2].clone()]
    hessian = torch.func.jacrev(torch.func.grad(plain))(*small)
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(function))(*small), hessian)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    _, derivative = torch.func.jvp(function, tuple(tensors), tangents)
    torch.testing.assert_close(derivative, sum((g * t).sum() for g, t in zip(expected, tangents)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast_equals_casting_by_hand(dtype: torch.dtype, backend: str) -> None:
    tensors = arguments("frame_2d", ("c", "peephole"), torch.float32)
    with torch.autocast(torch.get_default_device().type, dtype):
        h, c = lstm_gates(**tensors, backend=backend)
    assert (h.dtype, c.dtype) == (dtype, torch.float32)
    by_hand = lstm_gates(tensors["gates"].to(dtype), tensors["c"], tensors["peephole"].to(dtype), backend=backend)
    assert torch.equal(h, by_hand[0])
    assert torch.equal(c, by_hand[1])
    grads = torch.autograd.grad(h.float().sum() + c.sum(), list(tensors.values()))
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in grads)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_memory_kept_for_backward(requires_grad: bool, backend: str) -> None:
    tensors = {n: t.detach() for n, t in arguments("frame_2d", ("c", "peephole"), torch.float32).items()}
    tensors["gates"].requires_grad_(requires_grad)
    given = (tensors["c"], tensors["peephole"])
    (h, _), kept = kept_for_backward(lambda: lstm_gates(**tensors, backend=backend), given)
    assert kept == (5 * h.nbytes if requires_grad else 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", ["frame_2d", "frame_1d", "frame_3d", "no_frame", "one_pixel", "channels_1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_ops_and_their_fakes_agree(size: str, layout: str, dtype: torch.dtype, kernel_ops: Any) -> None:
    gates, c, peephole = (t.detach() for t in arguments(size, ("c", "peephole"), dtype, layout).values())
    # The rest of opcheck takes a second a call and does not look at layouts.
    checks = ["test_schema", "test_faketensor"]
    if (size, layout) == ("frame_2d", "contiguous"):
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    for given in ((c, peephole), (None, None)):
        for save in (True, False):
            library.opcheck(kernel_ops.lstm_gates_forward.default, (gates, *given, save), test_utils=checks)
        h, c_out, activated = kernel_ops.lstm_gates_forward(gates, *given, True)
        grads = (torch.randn_like(h), torch.randn_like(c_out))
        needs = [1, int(given[0] is not None), int(given[1] is not None)]
        operands = (activated, given[0], c_out, given[1], *grads, needs)
        library.opcheck(kernel_ops.lstm_gates_backward.default, operands, test_utils=checks)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["gates", "c", "peephole"])
def test_backward_leaves_out_what_is_not_needed(needs: tuple[int, ...], kernel_ops: Any) -> None:
    gates, c, peephole = (t.detach() for t in arguments("frame_2d", ("c", "peephole"), torch.float32).values())
    h, c_out, activated = kernel_ops.lstm_gates_forward(gates, c, peephole, True)
    operands = (activated, c, c_out, peephole, torch.randn_like(h), torch.randn_like(c_out), list(needs))
    library.opcheck(kernel_ops.lstm_gates_backward.default, operands)
    assert [g.numel() > 0 for g in kernel_ops.lstm_gates_backward(*operands)] == [bool(n) for n in needs]


def test_gates_that_are_missing_are_named() -> None:
    with pytest.raises(TypeError, match=r"^lstm_gates: gates is None, expected a Tensor"):
        lstm_gates(None)
