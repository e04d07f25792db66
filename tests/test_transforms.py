"""Transforms of torch.func under torch.compile, and tangents and batches of gradients."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

import convfast

OPS = ("conv_lstm", "conv1d", "lstm", "lstm_gates")
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


class Gates(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return convfast.lstm_gates(x)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv_lstm": (lambda: convfast.ConvLSTM(2, 3, 3), (1, 2, 2, 4, 3)),
    "lstm": (lambda: convfast.LSTM(2, 3, 2, batch_first=True), (1, 4, 2)),
    "conv1d": (lambda: convfast.Conv1d(2, 3, 3, activation="tanh"), (1, 4, 2)),
    "conv1d_lstm": (lambda: convfast.Conv1dLSTM(2, [3, 4], 3, activation="tanh"), (1, 4, 2)),
    "lstm_gates": (Gates, (1, 8, 3, 2)),
}
IN_PARTS = {  # what convolves the input before the op
    "groups": lambda: convfast.ConvLSTM(2, 4, 3, groups=2),
    "groups_3d": lambda: convfast.ConvLSTM3d(2, 4, (1, 3, 3), groups=2),
    "one_frame": lambda: convfast.ConvLSTM(2, 3, 3, step=3),
}
every = pytest.mark.parametrize("name", MODULES)


def build(name: str) -> tuple[Callable[[Tensor], Tensor], nn.Module, Tensor]:
    """→ first output, module and input."""
    torch.manual_seed(0)
    make, shape = MODULES[name]
    module = make()

    def first(x: Tensor) -> Tensor:
        found = module(x)
        return found if isinstance(found, Tensor) else found[0]

    return first, module, torch.randn(shape)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda f, x: grad(lambda x: f(x).square().sum())(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jacrev": lambda f, x: jacrev(f)(x),
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "vmap": lambda f, x: vmap(f)(torch.stack([x, -x])),
    "vmap_grad": lambda f, x: vmap(grad(lambda x: f(x).square().sum()))(torch.stack([x, -x])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", IN_PARTS)
def test_transforms_of_what_convolves_the_input_before(name: str, transform: str, native_ops) -> None:
    torch.manual_seed(0)
    module = IN_PARTS[name]()
    plain = copy.deepcopy(module)
    plain.backend = "reference"
    shape = {"groups": (1, 2, 2, 4, 3), "groups_3d": (1, 2, 2, 2, 4, 3), "one_frame": (1, 2, 4, 3)}[name]
    x = torch.randn(shape)
    found, expected = (TRANSFORMS[transform](lambda x, m=m: m(x)[0], x) for m in (module, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if transform == "vmap":
        torch.testing.assert_close(found[1], module(-x)[0], rtol=1e-4, atol=1e-5)


def test_compiles_under_a_default_device(native_ops) -> None:
    x = torch.randn(1, 2, 2, 4, 3)
    with torch.device("cpu"):
        for make in (IN_PARTS["groups"], lambda: convfast.ConvLSTM(2, 3, 3, backend="reference")):
            torch._dynamo.reset()
            module = make()
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x)[0], module(x)[0])


@every
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_compiled_transforms(transform: str, name: str, native_ops) -> None:
    torch._dynamo.reset()
    f, _, x = build(name)
    transformed = TRANSFORMS[transform]
    expected = transformed(f, x)
    assert expected.any()
    found = torch.compile(lambda x: transformed(f, x), backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(found, expected)


@every
def test_compiled_gradient_of_parameters(name: str, native_ops) -> None:
    torch._dynamo.reset()
    _, module, x = build(name)
    parameters = {n: p.detach() for n, p in module.named_parameters()} or {"x": x}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        given = parameters.get("x", x)
        found = functional_call(module, {n: p for n, p in parameters.items() if n != "x"}, (given,))
        return (found if isinstance(found, Tensor) else found[0]).square().sum()

    expected = grad(loss)(parameters)
    assert all(g.any() for g in expected.values())
    torch.testing.assert_close(torch.compile(grad(loss), backend="eager", fullgraph=True)(parameters), expected)


@every
@pytest.mark.parametrize("inside", [False, True])
def test_compiled_tangent(inside: bool, name: str, native_ops) -> None:
    torch._dynamo.reset()
    f, module, x = build(name)
    module.requires_grad_(False)
    _, expected = jvp(f, (x,), (torch.ones_like(x),))

    def tangent(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    compile_it = partial(torch.compile, backend="eager")
    found = compile_it(partial(tangent, f))(x) if inside else tangent(compile_it(f), x)
    torch.testing.assert_close(found, expected)


@every
def test_tangent_of_a_gradient(name: str, backend: str) -> None:
    f, module, x = build(name)
    if hasattr(module, "backend"):
        module.backend = backend
    x.requires_grad_()
    y, seed = f(x), torch.randn(f(x).shape)
    exact = torch.autograd.grad(y, x, seed, retain_graph=True)[0]  # linear in the seed
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(torch.autograd.grad(y, x, forward_ad.make_dual(2 * seed, seed))[0])
    torch.testing.assert_close(found.primal, 2 * exact)
    torch.testing.assert_close(found.tangent, exact)


@every
def test_batch_of_gradients_with_a_graph(name: str, backend: str) -> None:
    f, module, x = build(name)
    if hasattr(module, "backend"):
        module.backend = backend
    expected = torch.autograd.functional.jacobian(f, x)
    found = torch.autograd.functional.jacobian(f, x, vectorize=True, create_graph=True)
    torch.testing.assert_close(found, expected)
