"""One LSTM layer over a whole sequence, in one or both directions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, library

from .. import backends, reference
from ..reference.lstm_gates import state_dtype
from ..reference.sequence import ordered
from .checks import (
    apply,
    autocast_dtype,
    autocast_state,
    autocast_to,
    check_dense,
    check_flag,
    check_given,
    check_lengths,
    check_shape,
    check_tensors,
    empty_sequence,
    kind,
    needs_function,
    needs_reference,
    unpack_state,
    without_autocast,
)

_OP = "lstm"
_WEIGHTS = ("weight_ih", "weight_hh", "bias", "peephole", "weight_hr")


def lstm(
    input: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_hr: Tensor | None = None,
    reverse: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None] | None = None,
    state: tuple[Tensor | None, Tensor | None] | None = None,
    lengths: Tensor | None = None,
    *,
    time_major: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run one LSTM layer over a sequence, as `torch.nn.LSTM` does.

    With gates (i, f, g, o) = W_ih x_t + W_hh h_{t-1} + b: i = σ(i + p_i∘c), f = σ(f + p_f∘c), c' = f∘c + i∘tanh(g),
    o = σ(o + p_o∘c'), h = o∘tanh(c') (Gers et al. 2002), or h = W_hr (o∘tanh(c')) with a projection (Sak et al. 2014).

    H is the hidden size, P the size of h: that of the projection, else H; D directions: 2 with `reverse`, else 1.

    Args:
        input: `[B, T, I]`, any memory layout (one with time first passes its transposed view).
        weight_ih: `[4H, I]`, gates in the order i f g o.
        weight_hh: `[4H, P]`.
        bias: `[4H]`: the sum of the two of `torch.nn.LSTM`.
        peephole: `[3, H]` for i, f and o.
        weight_hr: `[P, H]`, the projection of h.
        reverse: (weight_ih, weight_hh, bias, peephole, weight_hr) of the direction that reads each sample from its last
            frame to its first, None in the places where the first direction has None; its outputs stay with their
            frames.
        state: `(h, c)`, `[D, B, P]` and `[D, B, H]`, either may be None for zero; c may be float32 where the rest is
            narrower.
        lengths: `[B]` integers in 0..T; the state stops at each sample's length and outputs past it are zero.
        time_major: the output's memory is `[T, B, D P]` instead of `[B, T, D P]`.
        backend: a name from `convfast.available("lstm")`; None takes the best.

    Returns:
        output `[B, T, D P]` in the dtype of `weight_hh`, the directions side by side, and `(h_n, c_n)`, `[D, B, P]` and
        `[D, B, H]`, each sample's state after its last step; c_n float32 for bfloat16 and float16.

    Raises:
        ValueError: a shape, a device or a value of `lengths` is wrong, or `reverse` has other weights than the first
            direction.
        TypeError: an argument is not a dense tensor, dtypes are mixed (outside autocast) or not floating, `lengths` is
            not of an integer type, `time_major` not a bool, or `state` or `reverse` has another number of parts.
        RuntimeError: the backend asked for cannot be had.
    """
    if isinstance(weight_hh, Tensor) and (dtype := autocast_dtype(weight_hh)) is not None:
        input, weight_ih, weight_hh, bias, peephole, weight_hr = autocast_to(
            dtype, input, weight_ih, weight_hh, bias, peephole, weight_hr
        )
        if isinstance(reverse, (tuple, list)):
            reverse = tuple(autocast_to(dtype, *reverse))
        state = autocast_state(dtype, weight_hh, *unpack_state(_OP, state))
        with torch.autocast(weight_hh.device.type, enabled=False):
            return lstm(
                input, weight_ih, weight_hh, bias, peephole, weight_hr, reverse, state, lengths,
                time_major=time_major, backend=backend,
            )  # fmt: skip

    check_flag(_OP, "time_major", time_major)
    h0, c0 = unpack_state(_OP, state)
    weights = (weight_ih, weight_hh, bias, peephole, weight_hr)
    weights_r = _unpack_reverse(reverse, weights)
    check_given(_OP, {"input": input, "weight_ih": weight_ih, "weight_hh": weight_hh})
    tensors = {
        "weight_hh": weight_hh, "input": input, "weight_ih": weight_ih, "bias": bias, "peephole": peephole,
        "weight_hr": weight_hr, "state h": h0, "state c": c0,
    }  # fmt: skip
    if reverse is not None:
        tensors |= {f"reverse {name}": t for name, t in zip(_WEIGHTS, weights_r)}
    check_tensors(_OP, tensors, state="state c")
    check_dense(_OP, {"input": input, "state h": h0, "state c": c0})
    hidden, size = _check_weights(weight_ih, weight_hh, weight_hr)
    batch, time, inputs = _check_input(input, weight_ih)
    directions = 1
    _check_shapes("", weights, hidden, size, inputs)
    if reverse is not None:
        directions = 2
        _check_shapes("reverse ", weights_r, hidden, size, inputs)
    check_shape(_OP, "state h", h0, (directions, batch, size), "[D, B, P]")
    check_shape(_OP, "state c", c0, (directions, batch, hidden), "[D, B, H]")
    lengths = check_lengths(_OP, lengths, batch, time, weight_hh.device)
    name = backends.select(_OP, backend, weight_hh.device.type, weight_hh.dtype)

    operands = (input, *weights, *weights_r, h0, c0)
    if needs_reference():
        outputs = reference.lstm_forward(*operands, lengths, time_major, False)
    elif needs_function(*operands):
        outputs = apply(_LSTM, *operands, lengths, time_major, name)
    else:
        outputs = backends.function(name, "lstm_forward")(*operands, lengths, time_major, False)
    return outputs[0], (outputs[1], outputs[2])


def backend_of_layers(
    input: Tensor, weights: Mapping[str, Tensor], others: Iterable[Tensor], backend: str | None
) -> str | None:
    """That of `lstm_layers` where it can take the place of `lstm` for each layer: without gradients, compiled."""
    if torch.compiler.is_compiling() or needs_reference() or needs_function(input, *weights.values(), *others):
        return None
    weight = next(iter(weights.values()))
    if autocast_dtype(weight) is not None:
        return None
    name = backends.select(_OP, backend, weight.device.type, weight.dtype)
    return name if name in backends.COMPILED else None


def lstm_layers(
    input: Tensor,
    weights: Mapping[str, Tensor],
    peepholes: Sequence[Tensor],
    bias: bool,
    projection: bool,
    bidirectional: bool,
    state: tuple[Tensor, Tensor] | None,
    lengths: Tensor | None,
    head: tuple[Tensor, Tensor | None] | None,
    time_major: bool,
    backend: str,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """All layers of an LSTM in one call of `backend_of_layers`: between short ones Python takes a share of the time.

    Args:
        input: `[B, T, I]`, any memory layout.
        weights: the parameters of `torch.nn.LSTM` in its order, by name.
        peepholes: `[3, H]` of each layer and direction, or none.
        state: `[L·D, B, P]` and `[L·D, B, H]`.
        head: weight `[O, D·P]` and bias of a linear layer that takes the output's place.
    """
    h0, c0 = state or (None, None)
    head, head_bias = head or (None, None)
    tensors = {**weights, "input": input, "state h": h0, "state c": c0, "head weight": head, "head bias": head_bias}
    tensors |= {f"peephole {n}": peephole for n, peephole in enumerate(peepholes)}
    check_tensors(_OP, tensors, state="state c")
    check_dense(_OP, {"input": input, "state h": h0, "state c": c0})
    values = list(weights.values())
    batch, time, _ = _check_input(input, values[0])
    lengths = check_lengths(_OP, lengths, batch, time, input.device)
    y, h, c = backends.function(backend, "lstm_layers")(
        input, values, peepholes, bias, projection, bidirectional, h0, c0, lengths, head, head_bias, time_major
    )
    return y, (h, c)


def _unpack_reverse(
    reverse: tuple[Tensor | None, ...] | None, weights: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    if reverse is None:
        return (None,) * len(_WEIGHTS)
    if not isinstance(reverse, (tuple, list)) or len(reverse) != len(_WEIGHTS):
        raise TypeError(f"{_OP}: reverse is {kind(reverse)}, expected ({', '.join(_WEIGHTS)})")
    for name, t, other in zip(_WEIGHTS, reverse, weights):
        if (t is None) != (other is None):
            wanted = "None" if other is None else "a Tensor"
            raise ValueError(
                f"{_OP}: reverse {name} is {'None' if t is None else 'given'}, expected {wanted} like {name}"
            )
    return tuple(reverse)


def _check_weights(weight_ih: Tensor, weight_hh: Tensor, weight_hr: Tensor | None) -> tuple[int, int]:
    """→ (H, P)."""
    shape = weight_hh.shape
    if len(shape) != 2 or shape[0] % 4 or 0 in shape:
        raise ValueError(f"{_OP}: weight_hh has shape {list(shape)}, expected [4H, P] with H > 0")
    hidden, size = shape[0] // 4, shape[1]
    if weight_hr is None and size != hidden:
        raise ValueError(f"{_OP}: weight_hh has shape {list(shape)}, expected [4H, H] where weight_hr is None")
    if weight_ih.ndim != 2 or weight_ih.shape[0] != shape[0] or 0 in weight_ih.shape:
        raise ValueError(
            f"{_OP}: weight_ih has shape {list(weight_ih.shape)}, expected [4H, I] with 4H={shape[0]} like weight_hh "
            f"{list(shape)}"
        )
    return hidden, size


def _check_input(input: Tensor, weight_ih: Tensor) -> tuple[int, int, int]:
    """→ (B, T, I)."""
    shape, features = input.shape, weight_ih.shape[1]
    if len(shape) == 3 and shape[2] == features and shape[1] > 0:
        batch, time, _ = shape
        return batch, time, features
    legend = f"input shape {list(shape)}, layout [B, T, I]"
    if len(shape) != 3:
        raise ValueError(f"{_OP}: input has {len(shape)} dims, expected 3 ({legend})")
    if shape[2] != features:
        source = f"weight_ih {list(weight_ih.shape)}"
        raise ValueError(f"{_OP}: input has {shape[2]} features, expected {features} from {source} ({legend})")
    raise ValueError(f"{_OP}: input has 0 time steps, expected at least 1 ({legend})")


def _check_shapes(prefix: str, weights: tuple[Tensor | None, ...], hidden: int, size: int, inputs: int) -> None:
    weight_ih, weight_hh, bias, peephole, weight_hr = weights
    check_shape(_OP, prefix + "weight_ih", weight_ih, (4 * hidden, inputs), "[4H, I]")
    check_shape(_OP, prefix + "weight_hh", weight_hh, (4 * hidden, size), "[4H, P]")
    check_shape(_OP, prefix + "bias", bias, (4 * hidden,), "[4H]")
    check_shape(_OP, prefix + "peephole", peephole, (3, hidden), "[3, H]")
    check_shape(_OP, prefix + "weight_hr", weight_hr, (size, hidden), "[P, H]")


class _LSTM(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        *arguments, backend = inputs
        return backends.function(backend, "lstm_forward")(*arguments, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *operands, ctx.time_major, ctx.backend = inputs
        y, _, _, c, gates = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(c, gates)
        ctx.save_for_backward(*operands, y, c, gates)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 3
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * 13 + nothing
        *inputs, y, c, gates = ctx.saved_tensors
        needs = [int(n) for n in ctx.needs_input_grad[:13]]
        backward = backends.function(ctx.backend, "lstm_backward")
        with without_autocast(y):
            if torch.is_grad_enabled() or needs_reference():
                # A second derivative may follow: the reference is differentiable, the kernels are not.
                y, _, _, c, gates = reference.lstm_forward(*inputs, ctx.time_major, True)
                backward = reference.lstm_backward
            # Copies only under vmap, which stacks what it saves in an order of its own.
            y, c, gates = ordered(y, ctx.time_major), c.contiguous(), gates.contiguous()
            grads = backward(dy, dh_n, dc_n, *inputs, y, c, gates, needs)
        return tuple(grad if need else None for grad, need in zip(grads, needs)) + nothing


def empty_of_layers(
    batch: int,
    time: int,
    weights: list[Tensor],
    bias: bool,
    projection: bool,
    bidirectional: bool,
    head: Tensor | None,
    time_major: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """For fakes: what `lstm_layers` returns."""
    w_hh, directions = weights[1], 1 + bidirectional
    hidden, size = w_hh.shape[0] // 4, w_hh.shape[1]
    rows = len(weights) // (2 + 2 * bias + projection)
    channels = directions * size if head is None else head.shape[0]
    return (
        empty_sequence(w_hh, (batch, time, channels), time_major, w_hh.dtype),
        w_hh.new_empty((rows, batch, size)),
        w_hh.new_empty((rows, batch, hidden), dtype=state_dtype(w_hh.dtype)),
    )


def register_fakes(namespace: str) -> None:
    """Shapes and strides of the ops in `namespace`; csrc/ops.h has the contract."""

    @library.register_fake(f"{namespace}::lstm_forward")
    def _(
        x: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        bias: Tensor | None,
        peephole: Tensor | None,
        w_hr: Tensor | None,
        w_ih_r: Tensor | None,
        w_hh_r: Tensor | None,
        bias_r: Tensor | None,
        peephole_r: Tensor | None,
        w_hr_r: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        time_major: bool,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        batch, time = x.shape[:2]
        hidden, size, directions = w_hh.shape[0] // 4, w_hh.shape[1], 1 if w_hh_r is None else 2
        dtype = state_dtype(w_hh.dtype)
        sequence = (directions, batch, time)
        return (
            empty_sequence(w_hh, (batch, time, directions * size), time_major, w_hh.dtype),
            w_hh.new_empty((directions, batch, size)),
            w_hh.new_empty((directions, batch, hidden), dtype=dtype),
            w_hh.new_empty((*sequence, hidden) if save else 0, dtype=dtype),
            w_hh.new_empty((*sequence, 4 * hidden) if save else 0),
        )

    @library.register_fake(f"{namespace}::lstm_backward")
    def _(
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        x: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        bias: Tensor | None,
        peephole: Tensor | None,
        w_hr: Tensor | None,
        w_ih_r: Tensor | None,
        w_hh_r: Tensor | None,
        bias_r: Tensor | None,
        peephole_r: Tensor | None,
        w_hr_r: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        y: Tensor,
        c: Tensor,
        gates: Tensor,
        needs: list[int],
    ) -> tuple[Tensor, ...]:
        weights = (w_ih, w_hh, bias, peephole, w_hr, w_ih_r, w_hh_r, bias_r, peephole_r, w_hr_r)
        return (
            torch.empty_like(x) if needs[0] else w_hh.new_empty(0),
            *(t.new_empty(t.shape) if need else w_hh.new_empty(0) for t, need in zip((*weights, h0), needs[1:12])),
            c0.new_empty(c0.shape) if needs[12] else w_hh.new_empty(0, dtype=c.dtype),
        )

    if namespace not in (backends.NAMESPACES[name] for name in backends.COMPILED):
        return

    @library.register_fake(f"{namespace}::lstm_layers")
    def _(
        x: Tensor,
        weights: list[Tensor],
        peepholes: list[Tensor],
        bias: bool,
        projection: bool,
        bidirectional: bool,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        head: Tensor | None,
        head_bias: Tensor | None,
        time_major: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return empty_of_layers(x.shape[0], x.shape[1], weights, bias, projection, bidirectional, head, time_major)
