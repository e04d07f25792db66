"""One ConvLSTM layer over a whole sequence."""

from typing import Any

import torch
from torch import Tensor, library

from .. import backends, reference
from ..reference.conv_lstm import channels_last
from ..reference.lstm_gates import state_dtype
from ..reference.padded_conv import conv, output_length, same_padding
from .checks import (
    PADDING_MODES,
    apply,
    autocast_dtype,
    autocast_state,
    autocast_to,
    check_choice,
    check_count,
    check_dense,
    check_flag,
    check_given,
    check_lengths,
    check_shape,
    check_tensors,
    empty_channels_last,
    exporting,
    needs_function,
    needs_reference,
    numbers,
    output_size,
    unpack_state,
    without_autocast,
)

_OP = "conv_lstm"
MEMORIES = ("fast", "lean")
ALGORITHMS = ("auto", "direct", "winograd")
WITH_WINOGRAD = ("cpu",)


def conv_lstm(
    input: Tensor | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    state: tuple[Tensor | None, Tensor | None] | None = None,
    lengths: Tensor | None = None,
    *,
    steps: int | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = "same",
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    reverse: bool = False,
    memory: str = "fast",
    algorithm: str = "auto",
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run one ConvLSTM layer over a sequence of frames of 1 to 3 dims.

    With gates (i, f, g, o) = W_ih * x_t + W_hh * h_{t-1} + b, `*` being convolution (Shi et al. 2015):
    i = σ(i + p_i∘c), f = σ(f + p_f∘c), c' = f∘c + i∘tanh(g), o = σ(o + p_o∘c'), h = o∘tanh(c').

    `stride`, `padding`, `dilation`, `groups` and `padding_mode` are those of the input convolution, as in
    `torch.nn.Conv2d`; the recurrent one always keeps the size, with zeros. `"same"` pads d(k-1) in all, half of it
    (rounded down) before.

    Args:
        input: `[B, T, Cin, *S]`, any memory layout; or `[B, 1, Cin, *S]` and `steps`: that frame at every step,
            convolved once. None for no input, then `steps` and `state` are needed. `[B, T, 4C, *S']` with `weight_ih`
            None: the input convolution, already computed.
        weight_ih: `[4C, Cin / groups, *K]`, gates in the order i f g o.
        weight_hh: `[4C, C, *K']`.
        bias: `[4C]`.
        peephole: `[3, C, *S']` for i, f and o.
        state: `(h, c)`, each `[B, C, *S']` or None for zero; c may be float32 where the rest is narrower.
        lengths: `[B]` integers in 0..T; the state stops at each sample's length and outputs past it are zero.
        steps: number of steps T; needed only without input, or to repeat the one frame of `input`.
        reverse: read each sample from its last frame to its first; outputs stay with their frames.
        memory: what is kept for the backward: "fast" the activated gates and c, "lean" only c.
        algorithm: "direct" sums every product of a convolution; "winograd" takes a fraction of them, for 2-D and 3-D
            frames in float32 and narrower (docs/conv_lstm.md says how far it may be from direct); "auto" takes what is
            faster for the shape. `convfast.explain` tells what a module's call takes.
        backend: a name from `convfast.available("conv_lstm")`; None takes the best.

    Returns:
        output `[B, T, C, *S']` in the dtype of `weight_hh` and `(h_n, c_n)`, each `[B, C, *S']`, c_n float32 for
        bfloat16 and float16. Memory is channels-last.

    Raises:
        ValueError: a shape, a size, an option, a device or a value of `lengths` is wrong.
        TypeError: an argument is not a dense tensor, dtypes are mixed (outside autocast) or not floating, `lengths` is
            not of an integer type, `reverse` not a bool, or `state` not a pair.
        RuntimeError: the backend or the algorithm asked for cannot be had.
    """
    if isinstance(weight_hh, Tensor) and (dtype := autocast_dtype(weight_hh)) is not None:
        input, weight_ih, weight_hh, bias, peephole = autocast_to(dtype, input, weight_ih, weight_hh, bias, peephole)
        h0, c0 = autocast_state(dtype, weight_hh, *unpack_state(_OP, state))
        with torch.autocast(weight_hh.device.type, enabled=False):
            return conv_lstm(
                input, weight_ih, weight_hh, bias, peephole, (h0, c0), lengths, steps=steps, stride=stride,
                padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode, reverse=reverse,
                memory=memory, algorithm=algorithm, backend=backend,
            )  # fmt: skip

    h0, c0 = unpack_state(_OP, state)
    check_given(_OP, {"weight_hh": weight_hh})
    tensors = {"weight_hh": weight_hh, "input": input, "weight_ih": weight_ih, "bias": bias, "peephole": peephole}
    states = {"state h": h0, "state c": c0}
    check_tensors(_OP, {**tensors, **states}, state="state c")
    check_dense(_OP, {"input": input, **states})
    _check_options(padding_mode, memory, algorithm)
    check_flag(_OP, "reverse", reverse)
    groups = check_count(_OP, "groups", groups, 1)
    steps = None if steps is None else check_count(_OP, "steps", steps, 1)
    dims, channels = _check_weights(weight_ih, weight_hh, groups)
    stride = list(numbers(_OP, "stride", stride, dims, 1))
    dilation = list(numbers(_OP, "dilation", dilation, dims, 1))
    pads = _padding(padding, weight_ih, dilation, dims)
    batch, time, space = _check_input(input, weight_ih, weight_hh, h0, c0, steps, groups)
    if input is not None and weight_ih is not None:
        space = [
            output_size(
                _OP, f"spatial dim {d}", size, weight_ih.shape[2 + d], stride[d], pads[2 * d : 2 * d + 2], dilation[d],
                padding_mode,
            )
            for d, size in enumerate(space)
        ]  # fmt: skip
    check_shape(_OP, "bias", bias, (4 * channels,), "[4C]")
    check_shape(_OP, "peephole", peephole, (3, channels, *space), "[3, C, *S']")
    check_shape(_OP, "state h", h0, (batch, channels, *space), "[B, C, *S']")
    check_shape(_OP, "state c", c0, (batch, channels, *space), "[B, C, *S']")
    lengths = check_lengths(_OP, lengths, batch, time, weight_hh.device)
    name = backends.select(_OP, backend, weight_hh.device.type, weight_hh.dtype)
    _check_algorithm(algorithm, name)

    if input is not None and weight_ih is not None:
        input = given_once(input)
        if groups > 1 or input.shape[1] < time:
            input = _input_convolution(input, weight_ih, stride, pads, dilation, padding_mode, groups)
            weight_ih = None
    if input is not None and input.shape[1] < time:
        input = input.expand(-1, time, *[-1] * (dims + 1))

    operands = (input, weight_ih, weight_hh, bias, peephole, h0, c0)
    options = (time, stride, pads, dilation, padding_mode, reverse, algorithm)
    if needs_reference():
        outputs = reference.conv_lstm_forward(*operands, lengths, *options, "none")
    elif needs_function(*operands):
        outputs = apply(_ConvLSTM, *operands, lengths, *options, memory, name)
    else:
        outputs = backends.function(name, "conv_lstm_forward")(*operands, lengths, *options, "none")
    return outputs[0], (outputs[1], outputs[2])


def _check_options(padding_mode: str, memory: str, algorithm: str) -> None:
    check_choice(_OP, "padding_mode", padding_mode, PADDING_MODES)
    check_choice(_OP, "memory", memory, MEMORIES)
    check_choice(_OP, "algorithm", algorithm, ALGORITHMS)


def _check_algorithm(algorithm: str, backend: str) -> None:
    if algorithm == "winograd" and backend not in WITH_WINOGRAD:
        raise RuntimeError(f"{_OP}: algorithm is 'winograd', expected 'auto' or 'direct' with backend {backend!r}")


def _check_weights(weight_ih: Tensor | None, weight_hh: Tensor, groups: int) -> tuple[int, int]:
    """→ (spatial dims, C)."""
    shape = list(weight_hh.shape)
    if weight_hh.ndim not in (3, 4, 5):
        raise ValueError(f"{_OP}: weight_hh has shape {shape}, expected [4C, C, *K] with 1 to 3 kernel dims")
    if shape[0] != 4 * shape[1] or 0 in shape:
        raise ValueError(f"{_OP}: weight_hh has shape {shape}, expected [4C, C, *K] with C > 0")
    if shape[0] % groups:
        raise ValueError(f"{_OP}: groups is {groups!r}, expected a positive divisor of 4C={shape[0]}")
    if weight_ih is not None and (
        weight_ih.ndim != weight_hh.ndim or weight_ih.shape[0] != shape[0] or 0 in weight_ih.shape
    ):
        raise ValueError(
            f"{_OP}: weight_ih has shape {list(weight_ih.shape)}, expected [4C, Cin / groups, *K] with "
            f"4C={shape[0]} and {weight_hh.ndim - 2} kernel dims, like weight_hh {shape}"
        )
    return weight_hh.ndim - 2, shape[1]


def _padding(
    padding: str | int | tuple[int, ...], weight_ih: Tensor | None, dilation: list[int], dims: int
) -> list[int]:
    """→ (before, behind) of each dim."""
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"{_OP}: padding is {padding!r}, expected 'same', 'valid', an int or a tuple of {dims}")
        if padding == "valid" or weight_ih is None:
            return [0] * (2 * dims)
        return same_padding(weight_ih.shape[2:], dilation)
    return [p for p in numbers(_OP, "padding", padding, dims, 0) for _ in range(2)]


def _check_input(
    input: Tensor | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    steps: int | None,
    groups: int,
) -> tuple[int, int, list[int]]:
    """→ (B, T, spatial size of the input, or of the state where there is no input)."""
    dims = weight_hh.ndim - 2
    if input is None:
        if weight_ih is not None:
            raise ValueError(f"{_OP}: input is None, expected a Tensor with weight_ih of shape {list(weight_ih.shape)}")
        like = h0 if h0 is not None else c0
        if like is None or steps is None:
            missing = "state" if like is None else "steps"
            raise ValueError(f"{_OP}: {missing} is None, expected both state and steps where input is None")
        if like.ndim != dims + 2 or 0 in like.shape[2:]:
            part = "state h" if h0 is not None else "state c"
            raise ValueError(f"{_OP}: {part} has shape {list(like.shape)}, expected [B, C, *S'] with {dims} dims")
        return like.shape[0], steps, list(like.shape[2:])
    legend = f"input shape {list(input.shape)}, layout [B, T, {'4C' if weight_ih is None else 'C'}, *S]"
    if input.ndim != dims + 3:
        raise ValueError(f"{_OP}: input has {input.ndim} dims, expected {dims + 3} ({legend})")
    channels = weight_hh.shape[0] if weight_ih is None else weight_ih.shape[1] * groups
    if input.shape[2] != channels:
        source = "4C of weight_hh" if weight_ih is None else f"weight_ih {list(weight_ih.shape)}, groups={groups}"
        raise ValueError(f"{_OP}: input has {input.shape[2]} channels, expected {channels} from {source} ({legend})")
    if input.shape[1] == 0:
        raise ValueError(f"{_OP}: input has 0 time steps, expected at least 1 ({legend})")
    if 0 in input.shape[3:]:
        raise ValueError(f"{_OP}: input has an empty frame, expected at least 1 pixel ({legend})")
    if steps is not None and input.shape[1] not in (1, steps):
        raise ValueError(f"{_OP}: steps is {steps}, expected None or the {input.shape[1]} steps of input ({legend})")
    return input.shape[0], input.shape[1] if steps is None else steps, list(input.shape[3:])


def given_once(input: Tensor) -> Tensor:
    """The one frame `[B, 1, Cin, *S]` that is expanded over all steps, where input is one and may be treated so."""
    # The gradient of an expanded frame, unlike its result, has T parts; only a frame that is given once has one.
    repeated = input.stride(1) == 0 and input.shape[1] > 1 and not needs_function(input)
    return input[:, :1] if repeated and not exporting() else input  # other inputs of an exported program need not be


def _input_convolution(
    input: Tensor,
    weight_ih: Tensor,
    stride: list[int],
    pads: list[int],
    dilation: list[int],
    padding_mode: str,
    groups: int,
) -> Tensor:
    """`[B, T, 4C, *S']` by the library's convolution."""
    frames = input.flatten(0, 1)
    if not torch._C._are_functorch_transforms_active():  # vmap knows no channels_last
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(frames.ndim, torch.contiguous_format)
        frames = frames.contiguous(memory_format=layout)
    gates = conv(frames, weight_ih, None, stride, pads, dilation, padding_mode, groups)
    # Not by unflatten(), which torch.compile does not trace under a default device.
    return gates.reshape(*input.shape[:2], *gates.shape[1:])


class _ConvLSTM(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        *arguments, backend = inputs
        return backends.function(backend, "conv_lstm_forward")(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *operands, lengths = inputs[:8]
        ctx.options, ctx.backend = inputs[8:15], inputs[16]
        h, _, _, c, gates = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(c, gates)
        ctx.save_for_backward(*operands, lengths, h, c, gates)

    @staticmethod
    def backward(
        ctx: Any, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 10
        if dh is None and dh_n is None and dc_n is None:
            return (None,) * 7 + nothing
        *inputs, h, c, gates = ctx.saved_tensors
        # Copies only under vmap, which stacks what it saves in an order of its own.
        h, c = channels_last(h, 2), channels_last(c, 2)
        gates = channels_last(gates, 2) if gates.ndim > 1 else gates
        needs = [int(n) for n in ctx.needs_input_grad[:7]]
        backward = backends.function(ctx.backend, "conv_lstm_backward")
        with without_autocast(h):
            if torch.is_grad_enabled() or needs_reference():
                # A second derivative may follow: the reference is differentiable, the kernels are not.
                h, _, _, c, gates = reference.conv_lstm_forward(*inputs, *ctx.options, "fast")
                backward = reference.conv_lstm_backward
            grads = backward(dh, dh_n, dc_n, *inputs, h, c, gates, *ctx.options, needs)
        return tuple(grad if need else None for grad, need in zip(grads, needs)) + nothing


def algorithm_of(
    backend: str,
    input: Tensor | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    h0: Tensor | None,
    steps: int,
    stride: tuple[int, ...],
    pads: tuple[int, ...],
    dilation: tuple[int, ...],
    padding_mode: str,
    algorithm: str,
) -> str:
    """What a backend makes of `algorithm`, and why. Only shapes and dtypes are looked at."""
    _check_algorithm(algorithm, backend)
    if backend == "reference" or (backend == "triton" and weight_hh.ndim == 5):
        return "convolutions by the library"
    if backend == "triton":
        return "direct: implicit GEMM and cell in one launch a step"
    return backends.function(backend, "conv_lstm_algorithm")(
        input, weight_ih, weight_hh, h0, None, steps, stride, pads, dilation, padding_mode, algorithm
    )


def register_fakes(namespace: str) -> None:
    """Shapes and strides of the ops in `namespace`; csrc/ops.h has the contract."""

    @library.register_fake(f"{namespace}::conv_lstm_forward")
    def _(
        x: Tensor | None,
        w_ih: Tensor | None,
        w_hh: Tensor,
        bias: Tensor | None,
        peephole: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        time: int,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        padding_mode: str,
        reverse: bool,
        algorithm: str,
        save: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        source = x if x is not None else h0 if h0 is not None else c0
        space = list(source.shape[3 if x is not None else 2 :])
        if x is not None and w_ih is not None:
            space = [
                output_length(size, w_ih.shape[2 + d], stride[d], padding[2 * d : 2 * d + 2], dilation[d])
                for d, size in enumerate(space)
            ]
        batch, channels, dtype = source.shape[0], w_hh.shape[1], state_dtype(w_hh.dtype)
        sequence, state = [batch, time, channels, *space], [batch, channels, *space]
        gates = [batch, time, 4 * channels, *space]
        return (
            empty_channels_last(w_hh, sequence, 2, w_hh.dtype),
            empty_channels_last(w_hh, state, 1, w_hh.dtype),
            empty_channels_last(w_hh, state, 1, dtype),
            w_hh.new_empty(0, dtype=dtype) if save == "none" else empty_channels_last(w_hh, sequence, 2, dtype),
            empty_channels_last(w_hh, gates, 2, w_hh.dtype) if save == "fast" else w_hh.new_empty(0),
        )

    @library.register_fake(f"{namespace}::conv_lstm_backward")
    def _(
        dh: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        x: Tensor | None,
        w_ih: Tensor | None,
        w_hh: Tensor,
        bias: Tensor | None,
        peephole: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        h: Tensor,
        c: Tensor,
        gates: Tensor,
        time: int,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        padding_mode: str,
        reverse: bool,
        algorithm: str,
        needs: list[int],
    ) -> tuple[Tensor, ...]:
        def weight(tensor: Tensor | None, need: int) -> Tensor:
            return tensor.new_empty(tensor.shape) if need else w_hh.new_empty(0)

        def state(tensor: Tensor | None, need: int, dtype: torch.dtype) -> Tensor:
            if need:
                return empty_channels_last(tensor, list(tensor.shape), 1, tensor.dtype)
            return w_hh.new_empty(0, dtype=dtype)

        return (
            torch.empty_like(x) if needs[0] else w_hh.new_empty(0),
            *map(weight, (w_ih, w_hh, bias, peephole), needs[1:5]),
            state(h0, needs[5], w_hh.dtype),
            state(c0, needs[6], state_dtype(w_hh.dtype)),
        )
