"""What the tests of all modules share: comparing nested results, gradients beside an oracle, scripts through a file."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cases import normal
from tests.oracle import assert_close_to_oracle


def flat(value: Any) -> list[Tensor]:
    """All tensors of a nested result."""
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in flat(part)]


def assert_same(actual: Any, expected: Any) -> None:
    pairs = list(zip(flat(actual), flat(expected), strict=True))
    assert pairs
    for a, b in pairs:
        assert a.dtype == b.dtype and torch.equal(a, b)


def assert_close(actual: Any, expected: Any) -> None:
    pairs = list(zip(flat(actual), flat(expected), strict=True))
    assert pairs
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def with_gradients(module: nn.Module, inputs: Sequence[Tensor], call: Callable[..., Any]) -> dict[str, Tensor]:
    """Results of `call(module, *leaves)`, and gradients of their weighted sum by inputs and parameters."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = flat(call(module, *leaves))
    generator = torch.Generator().manual_seed(1)
    weights = [normal(r.shape, generator).to(r) for r in results]
    loss = sum((r * w).sum() for r, w in zip(results, weights))
    named = {f"input {n}": leaf for n, leaf in enumerate(leaves)} | dict(module.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()))
    found = {f"result {n}": r for n, r in enumerate(results)}
    return found | {f"gradient of {name}": grad for name, grad in zip(named, grads)}


def check_against(
    module: nn.Module,
    plain: Callable[[torch.dtype], nn.Module],
    inputs: Sequence[Tensor],
    call: Callable[..., Any],
    plain_call: Callable[..., Any] | None = None,
    *,
    terms: int,
) -> None:
    """Results and gradients of `call(module, *inputs)` beside those of the plain modules: exact and rounded as eager;
    and the results without gradients.

    `plain(dtype)` makes a module with the parameters of `module`, in the same order; `terms` as in
    `assert_close_to_oracle`, for gradients.
    """
    plain_call = plain_call or call
    actual = with_gradients(module, inputs, call)
    exact = with_gradients(plain(torch.float64), [x.double() for x in inputs], plain_call)
    eager = with_gradients(plain(torch.float32), [x.float() for x in inputs], plain_call)
    for name, a, e, n in zip(actual, actual.values(), exact.values(), eager.values(), strict=True):
        assert_close_to_oracle(a, e, n, name, terms if name.startswith("gradient") else 0)
    with torch.no_grad():
        for n, result in enumerate(flat(call(module, *inputs))):
            name = f"result {n}"
            assert_close_to_oracle(result, exact[name], eager[name], f"{name} without gradients")


def assert_copies_are_equal_and_apart(module: nn.Module, x: Tensor) -> None:
    expected = module(x)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(again) == repr(module)
        assert_same(again(x), expected)
        with torch.no_grad():
            next(again.parameters()).add_(1)
        assert not torch.equal(flat(again(x))[0], flat(expected)[0])
    assert_same(module(x), expected)


def assert_compiles_whole(module: nn.Module, *calls: tuple[Any, ...]) -> None:
    """Without a graph break, and to the same results and gradients, called with each of these arguments."""
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for arguments in calls:
        results = []
        for run in (module, compiled):
            module.zero_grad()
            output = flat(run(*arguments))
            sum(part.square().sum() for part in output).backward()
            results.append([*output, *(p.grad.clone() for p in module.parameters())])
        assert_close(*results)


def scripted(module: nn.Module) -> torch.jit.ScriptModule:
    """Through a file, as a C++ program gets it."""
    stored = io.BytesIO()
    torch.jit.save(torch.jit.script(module.eval()), stored)
    stored.seek(0)
    return torch.jit.load(stored)


class Called(TorchDispatchMode):
    """Lists the ops, without views and what looks at lengths."""

    NOT = ("transpose", "unsqueeze", "squeeze", "view", "t", "detach", "min", "max", "_local_scalar_dense")

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.ops += [] if name in self.NOT else [name]
        return func(*args, **(kwargs or {}))


def without_gradients(module: nn.Module, *arguments: Any, ops: list[str]) -> Any:
    """What the module gives, by no other ops than these."""
    with torch.no_grad(), Called() as called:
        found = module(*arguments)
    assert called.ops == ops
    return found


@contextmanager
def watching(module: nn.Module, how: str) -> Iterator[list[nn.Module]]:
    """Lists the calls of the module that a "hook", a "pre_hook", a "global" hook, a "forward" of its own or that of a
    "subclass" sees."""
    seen: list[nn.Module] = []
    kind, handle = type(module), None

    class Watched(kind):
        def forward(self, *arguments: Any) -> Any:
            seen.append(self)
            return super().forward(*arguments)

    def watch(module: nn.Module, *_: Any) -> None:
        seen.append(module)

    if how == "hook":
        handle = module.register_forward_hook(watch)
    elif how == "pre_hook":
        handle = module.register_forward_pre_hook(watch)
    elif how == "global":
        handle = nn.modules.module.register_module_forward_hook(watch)
    elif how == "forward":
        original = module.forward
        module.forward = lambda *arguments: (watch(module), original(*arguments))[1]
    else:
        module.__class__ = Watched
    try:
        yield seen
    finally:
        module.__class__ = kind
        vars(module).pop("forward", None)
        if handle is not None:
            handle.remove()
