"""The pointwise LSTM cell."""

from typing import Any

import torch
from torch import Tensor, library

from .. import backends, reference
from ..reference.lstm_gates import state_dtype
from .checks import (
    apply,
    autocast_dtype,
    autocast_to,
    check_dense,
    check_given,
    check_shape,
    check_tensors,
    empty_in_layout_of,
    needs_function,
    needs_reference,
)

_OP = "lstm_gates"


def lstm_gates(
    gates: Tensor, c: Tensor | None = None, peephole: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Apply the LSTM cell to pre-activations, for people with a convolution of their own.

    i = σ(i + p_i∘c), f = σ(f + p_f∘c), c' = f∘c + i∘tanh(g), o = σ(o + p_o∘c'), h = o∘tanh(c') (Shi et al. 2015).

    Args:
        gates: `[B, 4C, *S]` pre-activations in the order i f g o; channels-first or channels-last memory.
        c: `[B, C, *S]` cell state in the dtype of `gates`, or float32 where that is narrower; None is zero.
        peephole: `[3, C, *S]` for i, f and o, in the dtype of `gates`.
        backend: a name from `convfast.available("lstm_gates")`; None takes the best.

    Returns:
        h `[B, C, *S]` in the dtype of `gates`, and the new c `[B, C, *S]`, float32 for bfloat16 and float16.

    Raises:
        ValueError: a shape, a device or the name of the backend is wrong.
        TypeError: an argument is not a dense tensor, or dtypes are mixed (outside autocast) or not floating.
        RuntimeError: the backend asked for cannot be had.
    """
    if isinstance(gates, Tensor) and (dtype := autocast_dtype(gates)) is not None:
        gates, peephole = autocast_to(dtype, gates, peephole)
        if isinstance(c, Tensor) and c.dtype != state_dtype(gates.dtype):
            (c,) = autocast_to(gates.dtype, c)
        with torch.autocast(gates.device.type, enabled=False):
            return lstm_gates(gates, c, peephole, backend=backend)

    check_given(_OP, {"gates": gates})
    check_tensors(_OP, {"gates": gates, "c": c, "peephole": peephole}, state="c")
    check_dense(_OP, {"gates": gates, "c": c})
    if gates.ndim < 2 or gates.shape[1] == 0 or gates.shape[1] % 4:
        raise ValueError(
            f"{_OP}: gates has shape {list(gates.shape)}, expected [B, 4C, *S] with a multiple of 4 as second size"
        )
    batch, channels, space = gates.shape[0], gates.shape[1] // 4, tuple(gates.shape[2:])
    check_shape(_OP, "c", c, (batch, channels, *space), "[B, C, *S]")
    check_shape(_OP, "peephole", peephole, (3, channels, *space), "[3, C, *S]")
    name = backends.select(_OP, backend, gates.device.type, gates.dtype)
    if needs_reference():
        return reference.lstm_gates_forward(gates, c, peephole, False)[:2]
    if needs_function(gates, c, peephole):
        return apply(_LSTMGates, gates, c, peephole, name)[:2]
    return backends.function(name, "lstm_gates_forward")(gates, c, peephole, False)[:2]


class _LSTMGates(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        gates: Tensor, c: Tensor | None, peephole: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        return backends.function(backend, "lstm_gates_forward")(gates, c, peephole, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        gates, c, peephole, ctx.backend = inputs
        _, c_out, activated = output
        ctx.dtype = gates.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(c, peephole, c_out, activated)

    @staticmethod
    def backward(
        ctx: Any, dh: Tensor | None, dc_out: Tensor | None, dactivated: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dh is None and dc_out is None and dactivated is None:
            return None, None, None, None
        c, peephole, c_out, activated = ctx.saved_tensors
        needs = [int(n) for n in ctx.needs_input_grad[:3]]
        if torch.is_grad_enabled() or dactivated is not None or needs_reference():
            # A second derivative: the reference is differentiable, also through the saved outputs; kernels are not.
            grads = reference.lstm_gates_backward(activated, c, c_out, peephole, dh, dc_out, needs, dactivated)
        else:
            backward = backends.function(ctx.backend, "lstm_gates_backward")
            grads = backward(activated, c, c_out, peephole, dh, dc_out, needs)
        dgates, dc, dpeephole = grads
        return (
            dgates.to(ctx.dtype) if needs[0] else None,
            dc.to(c.dtype) if needs[1] else None,
            dpeephole if needs[2] else None,
            None,
        )


def register_fakes(namespace: str) -> None:
    """Shapes and strides of the ops in `namespace`; csrc/ops.h has the contract."""

    @library.register_fake(f"{namespace}::lstm_gates_forward")
    def _(gates: Tensor, c: Tensor | None, peephole: Tensor | None, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        shape = [gates.shape[0], gates.shape[1] // 4, *gates.shape[2:]]
        activated = empty_in_layout_of(gates, gates.shape, gates.dtype) if save else gates.new_empty(0)
        h, c_out = (empty_in_layout_of(gates, shape, dtype) for dtype in (gates.dtype, state_dtype(gates.dtype)))
        return h, c_out, activated

    @library.register_fake(f"{namespace}::lstm_gates_backward")
    def _(
        activated: Tensor,
        c: Tensor | None,
        c_out: Tensor,
        peephole: Tensor | None,
        dh: Tensor | None,
        dc_out: Tensor | None,
        needs: list[int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        return (
            empty_in_layout_of(activated, activated.shape, activated.dtype) if needs[0] else activated.new_empty(0),
            empty_in_layout_of(activated, c_out.shape, c_out.dtype) if needs[1] else c_out.new_empty(0),
            peephole.new_empty(peephole.shape) if needs[2] else activated.new_empty(0),
        )
