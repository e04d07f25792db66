"""Convolution over time with bias and activation, on sequences whose features are innermost."""

from typing import Any

import torch
from torch import Tensor, library

from .. import backends, reference
from ..reference.conv1d import ACTIVATIONS, BY_INPUT, output_lengths
from ..reference.padded_conv import output_length, same_padding
from ..reference.sequence import ordered
from .checks import (
    PADDING_MODES,
    apply,
    autocast_dtype,
    autocast_to,
    check_choice,
    check_count,
    check_dense,
    check_flag,
    check_given,
    check_integers,
    check_lengths,
    check_shape,
    check_tensors,
    empty_sequence,
    integer,
    most_padding,
    needs_function,
    needs_reference,
    output_size,
    values_at_hand,
    without_autocast,
)

_OP = "conv1d"
PADDINGS = ("valid", "same", "full", "causal")


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | str = 0,
    dilation: int = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    activation: str = "none",
    channels_first: bool = False,
    time_major: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y = activation(W * x + b), `*` being the convolution over time of `torch.nn.Conv1d`.

    Args:
        input: `[B, T, F]`, any memory layout; `[B, F, T]` with `channels_first`.
        weight: `[C, F / groups, k]`.
        bias: `[C]`.
        lengths: `[B]` integers in 0..T: sample b is its first `lengths[b]` frames, padded at its own end, and the
            result is zero past its own output length (`conv1d_lengths`).
        stride, dilation, groups: as in `torch.nn.Conv1d`.
        padding: frames on either side; "valid" none, "same" d(k-1) in all, half of it (rounded down) before, with
            stride 1 only, "full" d(k-1) on either side, "causal" d(k-1) before.
        padding_mode: "zeros", "reflect" (padding below the length), "replicate" or "circular" (at most the length).
        activation: "none", "relu", "tanh", "sigmoid", "gelu" (by erf), "silu" or "leaky_relu" (slope 0.01).
        channels_first: `input` has its features before time.
        time_major: the result's memory is `[T', B, C]` instead of `[B, T', C]`.
        backend: a name from `convfast.available("conv1d")`; None takes the best.

    Returns:
        `[B, T', C]` in the dtype of `weight`, T' = ⌊(T + padding before and behind - d(k-1) - 1) / stride⌋ + 1.

    Raises:
        ValueError: a shape, a size, an option, a device or a value of `lengths` is wrong.
        TypeError: an argument is not a dense tensor, dtypes are mixed (outside autocast) or not floating, a flag is not
            a bool, or `lengths` is not of an integer type.
        RuntimeError: the backend asked for cannot be had.
    """
    if isinstance(weight, Tensor) and (dtype := autocast_dtype(weight)) is not None:
        input, weight, bias = autocast_to(dtype, input, weight, bias)
        with torch.autocast(weight.device.type, enabled=False):
            return conv1d(
                input, weight, bias, lengths, stride=stride, padding=padding, dilation=dilation, groups=groups,
                padding_mode=padding_mode, activation=activation, channels_first=channels_first,
                time_major=time_major, backend=backend,
            )  # fmt: skip

    check_given(_OP, {"weight": weight, "input": input})
    check_flag(_OP, "channels_first", channels_first)
    check_flag(_OP, "time_major", time_major)
    options = (stride, padding, dilation, groups, padding_mode, activation)
    input, lengths, pads = check_conv1d(input, weight, bias, lengths, *options, channels_first)
    name = backends.select(_OP, backend, weight.device.type, weight.dtype)

    operands, options = (input, weight, bias), (stride, pads, dilation, groups, padding_mode, activation, time_major)
    if needs_reference():
        return reference.conv1d_forward(*operands, lengths, *options, False)[0]
    if needs_function(*operands):
        return apply(_Conv1d, *operands, lengths, *options, name)[0]
    return backends.function(name, "conv1d_forward")(*operands, lengths, *options, False)[0]


def conv1d_lengths(lengths: Tensor, kernel: int, stride: int = 1, padding: int | str = 0, dilation: int = 1) -> Tensor:
    """Output lengths of `conv1d` for the lengths of its input, zero where a sample is empty or too short.

    Args:
        lengths: integers of any shape and device; their values are not looked at.
        kernel: the kernel's size k.
        stride: as in `conv1d`, as are `padding` and `dilation`.

    Returns:
        int64 of the shape of `lengths`.

    Raises:
        ValueError: an option is wrong.
        TypeError: `lengths` is not a tensor of integers.
    """
    op = "conv1d_lengths"
    check_integers(op, lengths)
    check_count(op, "kernel", kernel, 1)
    pads = conv1d_pads(padding, kernel, stride, dilation, op)
    return output_lengths(lengths.to(torch.int64), kernel, stride, pads, dilation)


def conv1d_pads(padding: int | str, kernel: int, stride: int, dilation: int, op: str = _OP) -> list[int]:
    """→ (before, behind)."""
    check_count(op, "stride", stride, 1)
    check_count(op, "dilation", dilation, 1)
    if padding == "same":
        if stride != 1:
            raise ValueError(f"{op}: stride is {stride}, expected 1 with padding='same'")
        return same_padding([kernel], [dilation])
    if padding == "causal":
        return [dilation * (kernel - 1), 0]
    named = {"valid": 0, "full": dilation * (kernel - 1)}
    frames = named.get(padding) if isinstance(padding, str) else integer(padding)
    if frames is None or frames < 0:
        raise ValueError(f"{op}: padding is {padding!r}, expected an int >= 0 or one of {', '.join(PADDINGS)}")
    return [frames, frames]


def check_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    stride: int,
    padding: int | str,
    dilation: int,
    groups: int,
    padding_mode: str,
    activation: str,
    channels_first: bool,
) -> tuple[Tensor, Tensor | None, list[int]]:
    """→ input `[B, T, F]`, lengths as the ops take them, padding before and behind."""
    check_tensors(_OP, {"weight": weight, "input": input, "bias": bias})
    check_dense(_OP, {"input": input})
    check_choice(_OP, "padding_mode", padding_mode, PADDING_MODES)
    check_choice(_OP, "activation", activation, ACTIVATIONS)
    _check_shapes(input, weight, groups, channels_first)
    channels, _, kernel = weight.shape
    check_shape(_OP, "bias", bias, (channels,), "[C]")
    pads = conv1d_pads(padding, kernel, stride, dilation)
    if channels_first:
        input = input.transpose(1, 2)
    batch, time, _ = input.shape
    output_size(_OP, "time", time, kernel, stride, pads, dilation, padding_mode)
    if lengths is not None:
        lengths = check_lengths(_OP, lengths, batch, time, weight.device)
        _check_padding_of_lengths(lengths, pads, padding_mode)
    return input, lengths, pads


def _check_shapes(input: Tensor, weight: Tensor, groups: int, channels_first: bool) -> None:
    shape = weight.shape
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"{_OP}: weight has shape {list(shape)}, expected [C, F / groups, k]")
    if integer(groups) is None or groups < 1 or shape[0] % groups:
        raise ValueError(f"{_OP}: groups is {groups!r}, expected a positive divisor of C={shape[0]}")
    sizes, expected = input.shape, shape[1] * groups
    time, features = (2, 1) if channels_first else (1, 2)
    if len(sizes) == 3 and sizes[features] == expected and sizes[time] > 0:
        return
    legend = f"input shape {list(sizes)}, layout {'[B, F, T]' if channels_first else '[B, T, F]'}"
    if len(sizes) != 3:
        raise ValueError(f"{_OP}: input has {len(sizes)} dims, expected 3 ({legend})")
    if sizes[features] != expected:
        source = f"weight {list(shape)}, groups={groups}"
        raise ValueError(f"{_OP}: input has {sizes[features]} features, expected {expected} from {source} ({legend})")
    raise ValueError(f"{_OP}: input has 0 time steps, expected at least 1 ({legend})")


def _check_padding_of_lengths(lengths: Tensor, pads: list[int], mode: str) -> None:
    """Each sample by itself has to be long enough for its padding; an empty one has none."""
    if mode not in ("reflect", "circular") or not values_at_hand(lengths) or not lengths.any():
        return
    least = int(lengths[lengths > 0].min())
    if max(pads) > most_padding(least, mode):
        needed = max(pads) + (mode == "reflect")
        raise ValueError(
            f"{_OP}: lengths has {least}, expected 0 or at least {needed} with padding {max(pads)} and "
            f"padding_mode={mode!r}"
        )


class _Conv1d(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        *arguments, backend = inputs
        return backends.function(backend, "conv1d_forward")(*arguments, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.options, ctx.backend = inputs[4:11], inputs[11]
        y, pre = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(pre)
        # Where no derivative reads it, y is not held: it may be changed in place, as that of nn.Conv1d may.
        reads_y = ctx.options[5] != "none" and ctx.options[5] not in BY_INPUT
        ctx.save_for_backward(*inputs[:4], y if reads_y else None, pre)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 9
        if dy is None:
            return (None,) * 3 + nothing
        *inputs, y, pre = ctx.saved_tensors
        *options, time_major = ctx.options
        needs = [int(n) for n in ctx.needs_input_grad[:3]]
        backward = backends.function(ctx.backend, "conv1d_backward")
        with without_autocast(dy):
            if torch.is_grad_enabled() or needs_reference():
                # A second derivative may follow: the reference is differentiable, the kernels are not.
                y, pre = reference.conv1d_forward(*inputs, *ctx.options, True)
                backward = reference.conv1d_backward
            # Copies only under vmap, which stacks what it saves in an order of its own.
            y = dy.new_empty(dy.shape[2]).expand_as(dy) if y is None else ordered(y, time_major)
            pre = ordered(pre, time_major) if pre.ndim > 1 else pre
            grads = backward(dy, *inputs, y, pre, *options, needs)
        return tuple(grad if need else None for grad, need in zip(grads, needs)) + nothing


def register_fakes(namespace: str) -> None:
    """Shapes and strides of the ops in `namespace`; csrc/ops.h has the contract."""

    @library.register_fake(f"{namespace}::conv1d_forward")
    def _(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lengths: Tensor | None,
        stride: int,
        padding: list[int],
        dilation: int,
        groups: int,
        padding_mode: str,
        activation: str,
        time_major: bool,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        time = output_length(x.shape[1], weight.shape[2], stride, padding, dilation)
        shape = (x.shape[0], time, weight.shape[0])
        kept = save and activation in BY_INPUT
        return (
            empty_sequence(weight, shape, time_major, weight.dtype),
            empty_sequence(weight, shape, time_major, weight.dtype) if kept else weight.new_empty(0),
        )

    @library.register_fake(f"{namespace}::conv1d_backward")
    def _(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lengths: Tensor | None,
        y: Tensor,
        pre: Tensor,
        stride: int,
        padding: list[int],
        dilation: int,
        groups: int,
        padding_mode: str,
        activation: str,
        needs: list[int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.empty_like(x) if needs[0] else weight.new_empty(0),
            weight.new_empty(weight.shape) if needs[1] else weight.new_empty(0),
            weight.new_empty(weight.shape[:1]) if needs[2] else weight.new_empty(0),
        )
