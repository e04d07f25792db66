"""Convolution over time, bias and activation; with lengths each sample is padded at its own end."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .lstm_gates import state_dtype
from .padded_conv import conv, conv_backward, output_length, source
from .sequence import active_frames, keep, ordered

LEAK = 0.01
_ACTIVATE = {
    "none": lambda pre: pre,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": lambda pre: F.leaky_relu(pre, LEAK),
}
ACTIVATIONS = tuple(_ACTIVATE)
BY_INPUT = ("gelu", "silu")  # their derivative needs the pre-activations, the others' at most the result


def _derivative(y: Tensor, pre: Tensor, activation: str) -> Tensor:
    """Of the activation, from its result or, for `BY_INPUT`, from what it was applied to."""
    if activation == "relu":
        return (y > 0).to(y.dtype)
    if activation == "leaky_relu":
        return torch.where(y > 0, torch.ones_like(y), LEAK)
    if activation == "tanh":
        return 1 - y * y
    if activation == "sigmoid":
        return y * (1 - y)
    if activation == "silu":
        s = pre.sigmoid()
        return s * (1 + pre * (1 - s))
    assert activation == "gelu"
    density = (-0.5 * pre * pre).exp() * (2 * torch.pi) ** -0.5
    return torch.special.ndtr(pre) + pre * density


def output_lengths(lengths: Tensor, kernel: int, stride: int, padding: Sequence[int], dilation: int) -> Tensor:
    """`output_length` of each sample, zero where it has too few frames, or none."""
    found = output_length(lengths, kernel, stride, padding, dilation).clamp(min=0)
    return torch.where(lengths > 0, found, torch.zeros_like(found))


def _frames(lengths: Tensor, time: int, padding: Sequence[int], mode: str) -> tuple[Tensor, Tensor]:
    """→ (the frame that each position of padded time reads, whether it reads one), each [B, T + padding, 1]."""
    before, behind = padding
    position = torch.arange(-before, time + behind, device=lengths.device)
    length, last = lengths.unsqueeze(1), (lengths.unsqueeze(1) - 1).clamp(min=0)
    first, past = (0, length) if mode == "zeros" else (-before, length + behind)
    inside = (position >= first) & (position < past) & (length > 0)
    index = torch.where(inside, source(position, last, mode), 0)
    # A reflection of more than the sample has would be negative.
    return index.clamp(min=0).unsqueeze(2), inside.unsqueeze(2)


def conv1d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    stride: int,
    padding: Sequence[int],
    dilation: int,
    groups: int,
    padding_mode: str,
    activation: str,
    time_major: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """→ (y, pre) as csrc/ops.h says."""
    kernel, active = weight.shape[2], None
    if lengths is not None:
        time = output_length(x.shape[1], kernel, stride, padding, dilation)
        active = active_frames(output_lengths(lengths, kernel, stride, padding, dilation), time, 0)
        index, inside = _frames(lengths, x.shape[1], padding, padding_mode)
        x = keep(x.gather(1, index.expand(-1, -1, x.shape[2])), inside)
        padding = [0, 0]
    pre = conv(x.transpose(1, 2), weight, bias, [stride], padding, [dilation], padding_mode, groups).transpose(1, 2)
    pre = pre.to(state_dtype(weight.dtype))
    y = keep(_ACTIVATE[activation](pre), active).to(weight.dtype)
    return ordered(y, time_major), ordered(pre, time_major) if save and activation in BY_INPUT else pre.new_empty(0)


def conv1d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    y: Tensor,
    pre: Tensor,
    stride: int,
    padding: Sequence[int],
    dilation: int,
    groups: int,
    padding_mode: str,
    activation: str,
    needs: Sequence[int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """→ (dx, dweight, dbias) as csrc/ops.h says; None where not needed."""
    dtype = state_dtype(weight.dtype)
    dpre = dy.to(dtype)
    if activation != "none":
        dpre = dpre * _derivative(y.to(dtype), pre, activation)
    read = x
    if lengths is not None:
        out = output_lengths(lengths, weight.shape[2], stride, padding, dilation)
        dpre = keep(dpre, active_frames(out, dy.shape[1], 0))
        index, inside = _frames(lengths, x.shape[1], padding, padding_mode)
        index = index.expand(-1, -1, x.shape[2])
        read, padding = keep(x.gather(1, index), inside), [0, 0]
    dbias = dpre.sum((0, 1)).to(bias.dtype) if needs[2] else None
    dx, dweight = conv_backward(
        dpre.to(weight.dtype).transpose(1, 2),
        read.transpose(1, 2),
        weight,
        [stride],
        padding,
        [dilation],
        padding_mode,
        needs=(bool(needs[0]), bool(needs[1])),
        groups=groups,
    )
    if dx is not None:
        dx = dx.transpose(1, 2)
        if lengths is not None:
            dx = torch.zeros_like(x).scatter_add(1, index, keep(dx, inside))
    return dx, dweight, dbias
