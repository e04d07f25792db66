"""`torch.nn.Conv1d` over `[B, T, F]`, with lengths and the activation in the same op."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import check_name
from ..ops import conv1d
from ..ops.checks import PADDING_MODES, check_choice, check_count, check_flag, check_integers, integer
from ..ops.conv1d import ACTIVATIONS, PADDINGS, conv1d_lengths, conv1d_pads
from .options import check_dtype, numbers, shown
from .scripted_lstm import ScriptedConv1d


def _number(owner: str, name: str, value: Any, least: int) -> int:
    """An int, or the one in a tuple or list."""
    (found,) = numbers(owner, name, tuple(value) if isinstance(value, list) else value, 1, least)
    return found


class Conv1d(nn.Module):
    """`torch.nn.Conv1d` with the same parameters, initial values and checkpoints; channels are last, in and out.

    y = activation(W * x + b), `*` being convolution over time. Parameters are `weight` `[C, F / groups, k]` and `bias`
    `[C]`.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, padding_mode, device, dtype: as in
            `torch.nn.Conv1d`.
        padding: an int; "valid" for none; "same" for d(k-1) in all, half of it (rounded down) before; "full" for d(k-1)
            on either side; "causal" for d(k-1) before.
        activation: "none", "relu", "tanh", "sigmoid", "gelu", "silu" or "leaky_relu".
        channels_first: the input is `[B, F, T]`; the output is not.
        backend: a name from `convfast.available("conv1d")`; None takes the best.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what was expected and what came.

    `torch.jit.script` gives a module for inference, and puts it into a model that holds this one: to go on training
    that, script `copy.deepcopy(model)`, see `convfast.nn.scripted_lstm`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
        channels_first: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        in_channels = check_count(owner, "in_channels", in_channels, 1)
        out_channels = check_count(owner, "out_channels", out_channels, 1)
        self.kernel_size = _number(owner, "kernel_size", kernel_size, 1)
        self.stride = _number(owner, "stride", stride, 1)
        self.dilation = _number(owner, "dilation", dilation, 1)
        if isinstance(padding, str):
            if padding not in PADDINGS:
                raise ValueError(f"{owner}: padding is {padding!r}, expected an int or one of {', '.join(PADDINGS)}")
            if padding == "same" and self.stride > 1:
                raise ValueError(f"{owner}: padding is 'same' with stride={self.stride}, expected stride=1")
            self.padding = padding
        else:
            self.padding = _number(owner, "padding", padding, 0)
        found = integer(groups)
        if found is None or found < 1 or in_channels % found or out_channels % found:
            raise ValueError(
                f"{owner}: groups is {groups!r}, expected a divisor of in_channels={in_channels} and "
                f"out_channels={out_channels}"
            )
        check_choice(owner, "padding_mode", padding_mode, PADDING_MODES)
        check_choice(owner, "activation", activation, ACTIVATIONS)
        check_flag(owner, "channels_first", channels_first)
        check_dtype(owner, dtype)
        check_name(owner, backend)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.groups = found
        self.padding_mode = padding_mode
        self.activation = activation
        self.channels_first = channels_first
        self.backend = backend
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // self.groups, self.kernel_size, **factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, **factory)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew, as `torch.nn.Conv1d` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = (self.in_channels // self.groups * self.kernel_size) ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def pads(self) -> list[int]:
        """Padding before and behind."""
        return conv1d_pads(self.padding, self.kernel_size, self.stride, self.dilation)

    def forward(self, input: Tensor, lengths: Tensor | None = None, *, padding: int | str | None = None) -> Tensor:
        """Convolve.

        Args:
            input: `[B, T, F]`, or `[B, F, T]` with `channels_first`, in any memory layout; without B a single sequence.
            lengths: `[B]` integers in 0..T. Sample b is its first `lengths[b]` steps: padding starts at its own end.
            padding: in place of the module's.

        Returns:
            `[B, T', C]`, contiguous, zero past each sample's end; `[T', C]` of a single sequence.
        """
        single = isinstance(input, Tensor) and input.ndim == 2 and lengths is None
        output = conv1d(
            input.unsqueeze(0) if single else input,
            self.weight,
            self.bias,
            lengths,
            stride=self.stride,
            padding=self.padding if padding is None else padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
            activation=self.activation,
            channels_first=self.channels_first,
            backend=self.backend,
        )
        return output.squeeze(0) if single else output

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Steps of the output for each number of steps of the input."""
        check_integers(type(self).__name__, lengths)
        return conv1d_lengths(lengths, self.kernel_size, self.stride, self.padding, self.dilation)

    def __prepare_scriptable__(self) -> nn.Module:
        return ScriptedConv1d(self)

    def extra_repr(self) -> str:
        return shown(self, Conv1d.__init__)
