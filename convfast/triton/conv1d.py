"""Convolution over time as an implicit GEMM: no im2col, no padded copy, bias and activation in the epilogue.

Rows are (sample, output step), flattened; columns of the other operand are (tap, feature), weights being laid out so.
The gradient of the input is the same kernel on the gradient of the pre-activations, with the taps the other way round.
"""

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.checks import empty_sequence
from ..reference.conv1d import BY_INPUT
from ..reference.padded_conv import output_length
from . import runtime, tune
from .cell import sigmoid, tanh

# What differs from call to call compiles nothing anew; alignment comes as the constexpr ..._UNIT instead.
_VARYING = ["rows", "t_out", "t_in", "x_sb", "x_st", "y_sb", "y_st"]
_GATES = 64  # gates of the LSTM that `gates_kernel` computes at a time
_SMALL_GROUP = 8  # groups of at most so many features and channels are no work for tensor cores


@triton.jit
def activate(x, NAME: tl.constexpr):
    # Comparisons, not tl.maximum, which would lose a NaN.
    if NAME == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif NAME == "leaky_relu":
        x = tl.where(x < 0, 0.01 * x, x)
    elif NAME == "tanh":
        x = tanh(x)
    elif NAME == "sigmoid":
        x = sigmoid(x)
    elif NAME == "silu":
        x = x * sigmoid(x)
    elif NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit
def _derivative(y, NAME: tl.constexpr):
    """Of the activation, from its result, or from its argument for gelu and silu."""
    if NAME == "relu":
        d = tl.where(y > 0, 1.0, 0.0)
    elif NAME == "leaky_relu":
        d = tl.where(y > 0, 1.0, 0.01)
    elif NAME == "tanh":
        d = 1.0 - y * y
    elif NAME == "sigmoid":
        d = y * (1.0 - y)
    elif NAME == "silu":
        s = sigmoid(y)
        d = s * (1.0 + y * (1.0 - s))
    else:
        d = 0.5 * (1.0 + tl.erf(y * 0.7071067811865476)) + y * tl.exp(-0.5 * y * y) * 0.3989422804014327
    return d


@triton.jit
def _source(position, length, MODE: tl.constexpr, UP: tl.constexpr):
    """The frame that a position of padded time reads, as reference/padded_conv.source, and whether it reads one.

    With zeros frames may lie UP positions apart: the gradient of a strided convolution.
    """
    if MODE == "circular":
        size = tl.maximum(length, 1)
        frame = position % size
        frame = tl.where(frame < 0, frame + size, frame)
    elif MODE == "reflect":
        # A reflection of more than the sample has would be negative.
        frame = tl.maximum(length - 1 - tl.abs(length - 1 - tl.abs(position)), 0)
    elif MODE == "replicate":
        frame = tl.minimum(tl.maximum(position, 0), length - 1)
    else:
        frame = position // UP
    inside = (frame >= 0) & (frame < length)
    if UP > 1:
        inside = inside & (position % UP == 0)
    return frame, inside


@triton.jit
def _rows(row, rows, t_out, t_in, lengths_ptr, STRIDE: tl.constexpr, SLACK: tl.constexpr, OF_SOURCE: tl.constexpr):
    """Rows → sample, step, whether the sample is so long, and how many frames the row may read (0 where it is not).

    lengths are those of the source, or with OF_SOURCE False only say where the rows of a sample end.
    """
    sample = row // t_out
    step = row % t_out
    active = row < rows
    length = tl.zeros_like(row) + t_in
    if lengths_ptr is not None:
        given = tl.load(lengths_ptr + sample, mask=active, other=0).to(tl.int32)
        active = active & (given > 0) & (step * STRIDE <= given + SLACK)
        if OF_SOURCE:
            length = given
    return sample, step, active, tl.where(active, length, 0)


@triton.jit
def _offsets(sample, step, stride_b, stride_t, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """Strides count UNIT elements: so the compiler sees how the rows are aligned, whatever the strides."""
    if WIDE:
        sample = sample.to(tl.int64)
        step = step.to(tl.int64)
    return (sample * stride_b + step * stride_t) * UNIT


@triton.jit
def _columns(block, KG: tl.constexpr, TAPS: tl.constexpr, BK: tl.constexpr, ONE_TAP: tl.constexpr):
    """A block of (tap, feature) → tap, feature, whether there is such a one. With ONE_TAP no block holds two taps."""
    k = tl.arange(0, BK)
    if ONE_TAP:
        blocks: tl.constexpr = (KG + BK - 1) // BK
        tap = block // blocks
        feature = block % blocks * BK + k
        return tap, feature, feature < KG
    else:
        k += block * BK
        return k // KG, k % KG, k < TAPS * KG


@triton.jit
def _load_source(
    x_ptr, sample, start, length, x_sb, x_st, tap, feature, there,
    DILATION: tl.constexpr, MODE: tl.constexpr, UP: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    ONE_TAP: tl.constexpr,
):  # fmt: skip
    """Rows × columns of the im2col matrix; `start` is the position that a row's first tap reads."""
    if ONE_TAP:
        frame, inside = _source(start + tap * DILATION, length, MODE, UP)
        offset = _offsets(sample, frame, x_sb, x_st, UNIT, WIDE)[:, None]
        inside = inside[:, None]
    else:
        frame, inside = _source(start[:, None] + (tap * DILATION)[None, :], length[:, None], MODE, UP)
        offset = _offsets(sample[:, None], frame, x_sb, x_st, UNIT, WIDE)
    return tl.load(x_ptr + offset + feature[None, :], mask=inside & there[None, :], other=0.0)


@triton.jit
def _product(
    x_ptr, w_ptr, sample, start, length, x_sb, x_st, n, N: tl.constexpr, KG: tl.constexpr, TAPS: tl.constexpr,
    DILATION: tl.constexpr, MODE: tl.constexpr, UP: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ONE_TAP: tl.constexpr,
):  # fmt: skip
    """Rows × channels n of the convolution, float32."""
    acc = tl.zeros([BM, BN], tl.float32)
    blocks: tl.constexpr = TAPS * ((KG + BK - 1) // BK) if ONE_TAP else (TAPS * KG + BK - 1) // BK
    for block in range(blocks):
        tap, feature, there = _columns(block, KG, TAPS, BK, ONE_TAP)
        x = _load_source(
            x_ptr, sample, start, length, x_sb, x_st, tap, feature, there, DILATION, MODE, UP, UNIT, WIDE, ONE_TAP
        )
        # Features innermost: tensor cores take float32 in no other order.
        column = tap * KG + feature
        w = tl.load(w_ptr + n[:, None] * (TAPS * KG) + column[None, :], mask=(n < N)[:, None] & there[None, :], other=0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _finish(acc, bias_ptr, y_ptr, pre_ptr, offset, n, active, row, rows, last, ACTIVATION: tl.constexpr):
    """Bias, activation and the store; rows past a sample's length are zero."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < last, other=0).to(tl.float32)[None, :]
    offset += n[None, :]
    mask = (row < rows)[:, None] & (n < last)[None, :]
    if pre_ptr is not None:
        tl.store(pre_ptr + offset, acc.to(pre_ptr.dtype.element_ty), mask=mask)
    y = tl.where(active[:, None], activate(acc, ACTIVATION), 0.0)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def conv_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, pre_ptr, lengths_ptr, rows, t_out, t_in, x_sb, x_st, y_sb, y_st,
    N: tl.constexpr, KG: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, BEFORE: tl.constexpr,
    DILATION: tl.constexpr, UP: tl.constexpr, SLACK: tl.constexpr, OF_SOURCE: tl.constexpr, MODE: tl.constexpr,
    ACTIVATION: tl.constexpr, X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ONE_TAP: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows and of a group's N channels, group) alone writes its tile of y and pre; it reads x and
    weights only, so nothing has to come before. Floor: 2 rows N KG TAPS FLOPs of the tensor cores, or for few channels
    the bytes of x and y; taps read x again from the caches."""
    tiles: tl.constexpr = (N + BN - 1) // BN
    group = tl.program_id(1)
    row = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    n = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    sample, step, active, length = _rows(row, rows, t_out, t_in, lengths_ptr, STRIDE, SLACK, OF_SOURCE)
    acc = _product(
        x_ptr + group * KG, w_ptr + group * (N * TAPS * KG), sample, step * STRIDE - BEFORE, length, x_sb, x_st, n,
        N, KG, TAPS, DILATION, MODE, UP, X_UNIT, WIDE, PRECISION, BM, BN, BK, ONE_TAP,
    )  # fmt: skip
    offset = _offsets(sample, step, y_sb, y_st, Y_UNIT, WIDE)[:, None]
    first = group * N
    if bias_ptr is not None:
        bias_ptr += first
    if pre_ptr is not None:
        pre_ptr += first
    _finish(acc, bias_ptr, y_ptr + first, pre_ptr, offset, n, active, row, rows, N, ACTIVATION)


@triton.jit(do_not_specialize=_VARYING)
def small_groups_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, pre_ptr, lengths_ptr, rows, t_out, t_in, x_sb, x_st, y_sb, y_st,
    CHANNELS: tl.constexpr, N: tl.constexpr, KG: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr,
    BEFORE: tl.constexpr, DILATION: tl.constexpr, UP: tl.constexpr, SLACK: tl.constexpr, OF_SOURCE: tl.constexpr,
    MODE: tl.constexpr, ACTIVATION: tl.constexpr, X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`conv_kernel` element by element, for depthwise convolutions and others of small groups: program (tile of rows
    and of all channels). Floor: the bytes of x and y."""
    tiles: tl.constexpr = (CHANNELS + BN - 1) // BN
    row = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    n = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    sample, step, active, length = _rows(row, rows, t_out, t_in, lengths_ptr, STRIDE, SLACK, OF_SOURCE)
    acc = tl.zeros([BM, BN], tl.float32)
    for tap in range(TAPS):
        for k in range(KG):
            x = _load_source(
                x_ptr, sample, step * STRIDE - BEFORE, length, x_sb, x_st, tap, n // N * KG + k, n < CHANNELS,
                DILATION, MODE, UP, X_UNIT, WIDE, True,
            )  # fmt: skip
            w = tl.load(w_ptr + n * (TAPS * KG) + (tap * KG + k), mask=n < CHANNELS, other=0)
            acc += x.to(tl.float32) * w.to(tl.float32)[None, :]
    offset = _offsets(sample, step, y_sb, y_st, Y_UNIT, WIDE)[:, None]
    _finish(acc, bias_ptr, y_ptr, pre_ptr, offset, n, active, row, rows, CHANNELS, ACTIVATION)


@triton.jit(do_not_specialize=["rows", "t_out", "d_sb", "d_st", "y_sb", "y_st"])
def dpre_kernel(
    d_ptr, y_ptr, out_ptr, sums_ptr, lengths_ptr, rows, t_out, d_sb, d_st, d_sc, y_sb, y_st, C: tl.constexpr,
    STRIDE: tl.constexpr, SLACK: tl.constexpr, ACTIVATION: tl.constexpr, D_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dy times the derivative of the activation, zero past a length. Program (tile of rows and channels) alone writes
    its tile of out, and its row of sums, the sums over its rows. Floor: dy and y read, out written once."""
    tiles: tl.constexpr = (C + BN - 1) // BN
    row = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    n = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    sample, step, active, _ = _rows(row, rows, t_out, t_out, lengths_ptr, STRIDE, SLACK, False)
    mask = active[:, None] & (n < C)[None, :]
    d_offset = _offsets(sample, step, d_sb, d_st, D_UNIT, WIDE)[:, None]
    n_d = n.to(tl.int64) if WIDE else n
    d = tl.load(d_ptr + d_offset + (n_d * d_sc)[None, :], mask=mask, other=0).to(tl.float32)
    if ACTIVATION != "none":
        y_offset = _offsets(sample, step, y_sb, y_st, Y_UNIT, WIDE)[:, None]
        y = tl.load(y_ptr + y_offset + n[None, :], mask=mask, other=0).to(tl.float32)
        d = tl.where(mask, d * _derivative(y, ACTIVATION), 0.0)
    offset = _offsets(sample, step, t_out, 1, C, WIDE)[:, None] + n[None, :]
    tl.store(out_ptr + offset, d.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (n < C)[None, :])
    if sums_ptr is not None:
        tl.store(sums_ptr + tl.program_id(0) // tiles * C + n, tl.sum(d, 0), mask=n < C)


@triton.jit(do_not_specialize=["rows", "t_in", "y_sb", "y_st"])
def fold_kernel(
    p_ptr, y_ptr, lengths_ptr, rows, t_in, y_sb, y_st, F: tl.constexpr, BEFORE: tl.constexpr,
    BEHIND: tl.constexpr, MODE: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradient of padded time [B, T + padding, F] → of time: a frame is read by its own position and by padding.
    Program (tile of frames and features) alone writes its tile of y. Floor: p read, y written once."""
    tiles: tl.constexpr = (F + BN - 1) // BN
    row = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    n = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    sample, step, _, length = _rows(row, rows, t_in, t_in, lengths_ptr, 1, -1, True)
    at = p_ptr + n[None, :]
    mask = (n < F)[None, :]
    offset = _offsets(sample, step + BEFORE, t_in + (BEFORE + BEHIND), 1, F, WIDE)[:, None]
    acc = tl.load(at + offset, mask=mask & (step < length)[:, None], other=0).to(tl.float32)
    for k in range(BEFORE + BEHIND):
        position = tl.where(k < BEFORE, k - BEFORE, length + (k - BEFORE))
        frame, inside = _source(position, length, MODE, 1)
        offset = _offsets(sample, position + BEFORE, t_in + (BEFORE + BEHIND), 1, F, WIDE)[:, None]
        reads = inside & (frame == step)
        acc += tl.load(at + offset, mask=mask & reads[:, None], other=0).to(tl.float32)
    offset = _offsets(sample, step, y_sb, y_st, UNIT, WIDE)[:, None] + n[None, :]
    tl.store(y_ptr + offset, acc.to(y_ptr.dtype.element_ty), mask=mask & (row < rows)[:, None])


@triton.jit(do_not_specialize=["rows", "t_out", "t_in", "x_sb", "x_st", "d_sb", "d_st", "span"])
def weight_kernel(
    d_ptr, x_ptr, out_ptr, lengths_ptr, rows, t_out, t_in, x_sb, x_st, d_sb, d_st, span,
    N: tl.constexpr, KG: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, BEFORE: tl.constexpr,
    DILATION: tl.constexpr, SLACK: tl.constexpr, MODE: tl.constexpr, X_UNIT: tl.constexpr, D_UNIT: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ONE_TAP: tl.constexpr,
):  # fmt: skip
    """Gradient of the weight, transposed im2col never in memory. Program (tile of a group's N channels and of (tap,
    feature), part of `span` rows, group) alone writes its tile of out [parts, channels, KG, TAPS]; the parts are summed
    up after. Floor: 2 rows N KG TAPS FLOPs."""
    tiles: tl.constexpr = TAPS * ((KG + BN - 1) // BN) if ONE_TAP else (TAPS * KG + BN - 1) // BN
    group = tl.program_id(2)
    n = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    tap, feature, there = _columns(tl.program_id(0) % tiles, KG, TAPS, BN, ONE_TAP)
    first = tl.program_id(1) * span
    acc = tl.zeros([BM, BN], tl.float32)
    for begin in range(first, tl.minimum(first + span, rows), BK):
        row = begin + tl.arange(0, BK)
        sample, step, active, length = _rows(row, rows, t_out, t_in, lengths_ptr, STRIDE, SLACK, True)
        x = _load_source(
            x_ptr + group * KG, sample, step * STRIDE - BEFORE, length, x_sb, x_st, tap, feature, there,
            DILATION, MODE, 1, X_UNIT, WIDE, ONE_TAP,
        )  # fmt: skip
        d_offset = _offsets(sample, step, d_sb, d_st, D_UNIT, WIDE)[:, None]
        d = tl.load(d_ptr + group * N + d_offset + n[None, :], mask=active[:, None] & (n < N)[None, :], other=0)
        acc = tl.dot(tl.trans(d), x, acc, input_precision=PRECISION)
    out_ptr += (tl.program_id(1) * tl.num_programs(2) + group) * (N * KG * TAPS)
    offset = n[:, None] * (KG * TAPS) + (feature * TAPS + tap)[None, :]
    tl.store(out_ptr + offset, acc, mask=(n < N)[:, None] & there[None, :])


@triton.jit(do_not_specialize=["rows", "t_out", "t_in", "x_sb", "x_st", "d_sb", "d_st", "span"])
def small_groups_weight_kernel(
    d_ptr, x_ptr, out_ptr, lengths_ptr, rows, t_out, t_in, x_sb, x_st, d_sb, d_st, span, CHANNELS: tl.constexpr,
    N: tl.constexpr, KG: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, BEFORE: tl.constexpr,
    DILATION: tl.constexpr, SLACK: tl.constexpr, MODE: tl.constexpr, X_UNIT: tl.constexpr, D_UNIT: tl.constexpr,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`weight_kernel` element by element: program (channels, part, (tap, feature)). Floor: the bytes of x and d, which
    every (tap, feature) reads again from the caches."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    column = tl.program_id(2)
    tap = column // KG
    k = column % KG
    first = tl.program_id(1) * span
    acc = tl.zeros([BM, BN], tl.float32)
    for begin in range(first, tl.minimum(first + span, rows), BM):
        row = begin + tl.arange(0, BM)
        sample, step, active, length = _rows(row, rows, t_out, t_in, lengths_ptr, STRIDE, SLACK, True)
        x = _load_source(
            x_ptr, sample, step * STRIDE - BEFORE, length, x_sb, x_st, tap, n // N * KG + k, n < CHANNELS,
            DILATION, MODE, 1, X_UNIT, WIDE, True,
        )  # fmt: skip
        d_offset = _offsets(sample, step, d_sb, d_st, D_UNIT, WIDE)[:, None]
        d = tl.load(d_ptr + d_offset + n[None, :], mask=active[:, None] & (n < CHANNELS)[None, :], other=0)
        acc += x.to(tl.float32) * d.to(tl.float32)
    offset = tl.program_id(1) * (CHANNELS * KG * TAPS) + n * (KG * TAPS) + (k * TAPS + tap)
    tl.store(out_ptr + offset, tl.sum(acc, 0), mask=n < CHANNELS)


@triton.jit(do_not_specialize=["rows", "t_out", "t_in", "x_sb", "x_st", "batch", "span"])
def gates_kernel(
    x_ptr, w_ptr, bias_ptr, w_ih_ptr, gate_bias_ptr, y_ptr, lengths_ptr, rows, t_out, t_in, x_sb, x_st, batch, span,
    C: tl.constexpr, KG: tl.constexpr, TAPS: tl.constexpr, GATES: tl.constexpr, STRIDE: tl.constexpr,
    BEFORE: tl.constexpr, DILATION: tl.constexpr, SLACK: tl.constexpr, MODE: tl.constexpr, ACTIVATION: tl.constexpr,
    X_UNIT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, ONE_TAP: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Convolution, activation and the product with W_ih [GATES, C]: the BM × C tile between them stays in registers.
    Program (tile of rows, `span` blocks of gates) alone writes its part of y [t_out, B, GATES]; programs of the same
    rows convolve them each for itself. Floor: 2 rows C (KG TAPS + GATES) FLOPs, or the bytes of x and y."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    sample, step, active, length = _rows(row, rows, t_out, t_in, lengths_ptr, STRIDE, SLACK, True)
    acc = _product(
        x_ptr, w_ptr, sample, step * STRIDE - BEFORE, length, x_sb, x_st, c,
        C, KG, TAPS, DILATION, MODE, 1, X_UNIT, WIDE, PRECISION, BM, BC, BK, ONE_TAP,
    )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + c, mask=c < C, other=0).to(tl.float32)[None, :]
    # Columns from C on meet weights that are zero, but where x is infinite they are NaN.
    h = tl.where(active[:, None] & (c < C)[None, :], activate(acc, ACTIVATION), 0.0).to(w_ih_ptr.dtype.element_ty)
    offset = _offsets(sample, step, 1, batch, GATES, WIDE)[:, None]
    first = tl.program_id(1) * span
    for block in range(first, tl.minimum(first + span, (GATES + BG - 1) // BG)):
        n = block * BG + tl.arange(0, BG)
        w = tl.load(w_ih_ptr + n[:, None] * C + c[None, :], mask=(n < GATES)[:, None] & (c < C)[None, :], other=0)
        gates = tl.dot(h, tl.trans(w), input_precision=PRECISION)
        if gate_bias_ptr is not None:
            gates += tl.load(gate_bias_ptr + n, mask=n < GATES, other=0).to(tl.float32)[None, :]
        mask = (row < rows)[:, None] & (n < GATES)[None, :]
        tl.store(y_ptr + offset + n[None, :], gates.to(y_ptr.dtype.element_ty), mask=mask)


class Tile(NamedTuple):
    """What one program computes at a time, and with how many warps and pipeline stages."""

    rows: int
    channels: int
    depth: int  # columns of (tap, feature) a step
    one_tap: bool
    warps: int
    stages: int


def _step(dtype: torch.dtype) -> int:
    """Of the summed axis: 128 bytes, what wgmma likes. Exact float32 has its operands in registers, a whole step."""
    if dtype.itemsize == 2:
        return 64
    return 16 if runtime.input_precision(dtype) == "ieee" else 32


def _depth(features: int, taps: int, most: int) -> tuple[int, bool]:
    """Columns of a block, and whether they are of one tap: wherever at most a third of them is padding then."""
    width = most
    while width >= min(32, most):
        if 3 * features >= 2 * width * triton.cdiv(features, width):
            return width, True
        width //= 2
    return min(most, max(16, triton.next_power_of_2(features * taps))), False


def _stages(most: int, size: int, chip: runtime.Chip, beside: int = 0) -> int:
    """As many as shared memory holds of `size` bytes each, `beside` other bytes; AMD's pipeline keeps all but one in
    registers."""
    return 2 if chip.backend == "hip" else max(1, min(most, (chip.shared - beside) // size))


def candidates(
    dtype: torch.dtype, rows: int, channels: int, features: int, taps: int, groups: int, chip: runtime.Chip
) -> list[Tile]:
    """Tiles of `conv_kernel`, best first; channels and features are those of a group.

    The large tile reads half as much for the same work; it is the better one where there are two of it for every
    processor.
    """
    narrow = dtype.itemsize == 2
    width = min(128 if narrow else 64, max(16, triton.next_power_of_2(channels)))
    depth, one_tap = _depth(features, taps, _step(dtype))

    def tile(rows: int, width: int, warps: int, stages: int) -> Tile:
        size = (rows + width) * depth * dtype.itemsize
        return Tile(rows, width, depth, one_tap, warps, _stages(stages, size, chip))

    large, small = tile(128, width, 8 if width >= 64 else 4, 3), tile(64, min(width, 64), 4, 4)
    fills = triton.cdiv(rows, 128) * triton.cdiv(channels, width) * groups >= 2 * chip.processors
    if _step(dtype) == 16:
        return [small]  # bound by arithmetic, and the large one spills
    return [large, small] if fills else [small, large]


def weight_candidates(dtype: torch.dtype, channels: int, features: int, taps: int, chip: runtime.Chip) -> list[Tile]:
    """Tiles of `weight_kernel`, best first: `channels` × `depth`, `rows` a step."""
    narrow = dtype.itemsize == 2
    rows, tiles = _step(dtype), []
    for most in (128, 64) if narrow else (64, 32):
        width = min(most, max(16, triton.next_power_of_2(channels)))
        depth, one_tap = _depth(features, taps, most)
        if not (narrow or one_tap):
            depth = min(depth, 32)  # a gather takes registers for the address of every element
        stages = _stages(3, (width + depth) * rows * dtype.itemsize, chip)
        tiles.append(Tile(rows, width, depth, one_tap, 8 if width * depth >= 128 * 64 else 4, stages))
    return tiles


class _Walk(NamedTuple):
    """Row t reads positions t * stride - before + tap * dilation; `_rows` and `_source` say the rest."""

    stride: int
    before: int
    dilation: int
    up: int
    slack: int
    of_source: bool
    mode: str


def _walk(taps: int, stride: int, padding: Sequence[int], dilation: int, mode: str) -> _Walk:
    return _Walk(stride, padding[0], dilation, 1, sum(padding) - dilation * (taps - 1) - 1, True, mode)


def _strides(t: Tensor) -> tuple[int, int, int]:
    """→ strides of samples and steps in units, and the unit: a power of two up to 16 elements."""
    strides = [stride if size > 1 else 0 for size, stride in zip(t.shape[:2], t.stride())]
    unit = gcd(16, *strides)
    return strides[0] // unit, strides[1] // unit, unit


def _featured(t: Tensor) -> Tensor:
    """Features innermost. A copy of what lies otherwise is cheaper than to read it with strides tap by tap."""
    return t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _small_groups(groups: int, *sizes: int) -> bool:
    return groups > 1 and max(sizes) <= _SMALL_GROUP


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor | None, y: Tensor, pre: Tensor | None, groups: int,
    walk: _Walk, activation: str,
) -> None:  # fmt: skip
    """weight [channels of y, taps, features of a group of x], contiguous."""
    (batch, time, total), (_, taps, features) = y.shape, weight.shape
    rows, channels = batch * time, total // groups
    (x_sb, x_st, x_unit), (y_sb, y_st, y_unit) = _strides(x), _strides(y)
    data = (x, weight, _contiguous(bias), y, pre, _contiguous(lengths), rows, time, x.shape[1], x_sb, x_st, y_sb, y_st)
    options = (channels, features, taps, *walk, activation, x_unit, y_unit, runtime.needs_wide_offsets(x, y))
    with runtime.on_device_of(x):
        if _small_groups(groups, channels, features):
            width = min(64, triton.next_power_of_2(total))
            grid = (triton.cdiv(rows, 2048 // width) * triton.cdiv(total, width),)
            small_groups_kernel[grid](
                *data, total, *options, 2048 // width, width, num_warps=4, num_stages=2, enable_fp_fusion=True
            )
            return
        precision = runtime.input_precision(x.dtype)

        def launch(tile: Tile) -> None:
            grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(channels, tile.channels), groups)
            conv_kernel[grid](
                *data, *options, precision, *tile[:4],
                num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
            )  # fmt: skip

        found = candidates(x.dtype, rows, channels, features, taps, groups, runtime.chip(x))
        key = (channels, features, taps, groups, walk.stride, walk.mode, activation, x.dtype, precision, found[0])
        launch(tune.best("conv1d", key, x, found, launch))


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
    channels, _, taps = weight.shape
    shape = (x.shape[0], output_length(x.shape[1], taps, stride, padding, dilation), channels)
    y = empty_sequence(weight, shape, time_major, weight.dtype)
    pre = empty_sequence(weight, shape, time_major, weight.dtype) if save and activation in BY_INPUT else None
    if shape[0] > 0:
        by_tap = weight.transpose(1, 2).contiguous()
        walk = _walk(taps, stride, padding, dilation, padding_mode)
        _convolve(_featured(x), by_tap, bias, lengths, y, pre, groups, walk, activation)
    return y, weight.new_empty(0) if pre is None else pre


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
) -> tuple[Tensor, Tensor, Tensor]:
    """→ (dx, dweight, dbias) as csrc/ops.h says."""
    dx, dweight, dbias = (weight.new_empty(0) for _ in range(3))
    if dy.shape[0] == 0:
        return (
            torch.empty_like(x) if needs[0] else dx,
            weight.new_zeros(weight.shape) if needs[1] else dweight,
            weight.new_zeros(weight.shape[:1]) if needs[2] else dbias,
        )
    walk = _walk(weight.shape[2], stride, padding, dilation, padding_mode)
    dpre, sums = _dpre(dy, lengths, pre if activation in BY_INPUT else y, walk, activation, bool(needs[2]))
    if needs[2]:
        dbias = (dpre.sum((0, 1), dtype=torch.float32) if sums is None else sums.sum(0)).to(weight.dtype)
    if needs[0]:
        dx = _input_gradient(dpre, x, weight, lengths, padding, groups, walk)
    if needs[1]:
        dweight = _weight_gradient(dpre, _featured(x), weight, lengths, groups, walk)
    return dx, dweight, dbias


def _dpre(
    dy: Tensor, lengths: Tensor | None, saved: Tensor, walk: _Walk, activation: str, wants_sums: bool
) -> tuple[Tensor, Tensor | None]:
    """→ gradient of the pre-activations, features innermost; if wanted, float32 sums of it over parts of the rows."""
    if activation == "none" and lengths is None:
        return _featured(dy), None
    batch, time, channels = dy.shape
    rows, width = batch * time, min(128, triton.next_power_of_2(channels))
    parts = triton.cdiv(rows, 4096 // width)
    dpre = dy.new_empty(dy.shape)
    sums = dy.new_empty((parts, channels), dtype=torch.float32) if wants_sums else None
    (d_sb, d_st, d_unit), (y_sb, y_st, y_unit) = _strides(dy), _strides(saved)
    with runtime.on_device_of(dy):
        dpre_kernel[(parts * triton.cdiv(channels, width),)](
            dy, saved, dpre, sums, _contiguous(lengths), rows, time, d_sb, d_st, dy.stride(2), y_sb, y_st, channels,
            walk.stride, walk.slack, activation, d_unit, y_unit, runtime.needs_wide_offsets(dy, saved, dpre),
            4096 // width, width, num_warps=8, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return dpre, sums


def _input_gradient(
    dpre: Tensor, x: Tensor, weight: Tensor, lengths: Tensor | None, padding: Sequence[int], groups: int, walk: _Walk
) -> Tensor:
    """The convolution of dpre with the taps reversed. Where padding repeats frames: of padded time, then folded."""
    (batch, time, features), (_, _, taps) = x.shape, weight.shape
    swapped = weight.unflatten(0, (groups, -1)).permute(0, 2, 3, 1).reshape(features, taps, -1).contiguous()
    dx, (before, behind) = torch.empty_like(x), padding
    direct = dx if _featured(dx) is dx else x.new_empty(x.shape)
    reverse = _Walk(1, -before, -walk.dilation, walk.stride, -1, False, "zeros")
    if walk.mode == "zeros" or before + behind == 0:
        _convolve(dpre, swapped, None, lengths, direct, None, groups, reverse, "none")
    else:
        padded = x.new_empty((batch, time + before + behind, features))
        reverse = reverse._replace(before=0, slack=before + behind - 1)
        _convolve(dpre, swapped, None, lengths, padded, None, groups, reverse, "none")
        width = min(128, triton.next_power_of_2(features))
        grid = (triton.cdiv(batch * time, 4096 // width) * triton.cdiv(features, width),)
        sb, st, unit = _strides(direct)
        with runtime.on_device_of(x):
            fold_kernel[grid](
                padded, direct, _contiguous(lengths), batch * time, time, sb, st, features, before, behind, walk.mode,
                unit, runtime.needs_wide_offsets(padded, direct), 4096 // width, width,
                num_warps=8, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
    return dx if direct is dx else dx.copy_(direct)


def _weight_gradient(
    dpre: Tensor, x: Tensor, weight: Tensor, lengths: Tensor | None, groups: int, walk: _Walk
) -> Tensor:
    (batch, time, total), (_, features, taps) = dpre.shape, weight.shape
    rows, channels, chip = batch * time, total // groups, runtime.chip(x)
    small = _small_groups(groups, channels, features)
    if small:
        width = min(64, triton.next_power_of_2(total))
        step, tiles, columns = 1024 // width, triton.cdiv(total, width), taps * features
    else:
        tile = weight_candidates(x.dtype, channels, features, taps, chip)[0]
        blocks = taps * triton.cdiv(features, tile.depth) if tile.one_tap else triton.cdiv(taps * features, tile.depth)
        step, tiles, columns = tile.rows, triton.cdiv(channels, tile.channels) * blocks, groups
    # Two programs for every processor, each with rows enough to fill its pipeline.
    parts = max(1, min(2 * chip.processors // (tiles * columns), triton.cdiv(rows, 8 * step)))
    span = triton.cdiv(triton.cdiv(rows, parts), step) * step
    parts = triton.cdiv(rows, span)
    out = x.new_empty((parts, *weight.shape), dtype=torch.float32)
    (x_sb, x_st, x_unit), (d_sb, d_st, d_unit) = _strides(x), _strides(dpre)
    data = (dpre, x, out, _contiguous(lengths), rows, time, x.shape[1], x_sb, x_st, d_sb, d_st, span)
    options = (
        channels, features, taps, walk.stride, walk.before, walk.dilation, walk.slack, walk.mode, x_unit, d_unit,
        runtime.needs_wide_offsets(x, dpre),
    )  # fmt: skip
    with runtime.on_device_of(x):
        if small:
            small_groups_weight_kernel[(tiles, parts, columns)](
                *data, total, *options, step, width, num_warps=4, num_stages=2, enable_fp_fusion=True
            )
        else:
            weight_kernel[(tiles, parts, columns)](
                *data, *options, runtime.input_precision(x.dtype), tile.channels, tile.depth, tile.rows, tile.one_tap,
                num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
            )  # fmt: skip
    return (out[0] if parts == 1 else out.sum(0)).to(weight.dtype)


def handoff_tile(dtype: torch.dtype, channels: int, features: int, taps: int, chip: runtime.Chip) -> Tile | None:
    """Tile of `gates_kernel`, which holds all channels of its rows: None where registers or shared memory do not."""
    width = max(16, triton.next_power_of_2(channels))
    step = _step(dtype)
    # Exact float32 would have all columns of the second product in registers at once.
    if width > {64: 256, 32: 128, 16: 32}[step]:
        return None
    depth, one_tap = _depth(features, taps, step)
    # A stage holds tiles of x and of the weight, or one of W_ih. Beside them NVIDIA has what the first product gave, as
    # an operand of the second, and the gates on their way to another layout.
    stage = max((64 + width) * depth, _GATES * width) * dtype.itemsize
    beside = 0 if chip.backend == "hip" else 64 * (width + _GATES) * dtype.itemsize
    if stage + beside > chip.shared:
        return None
    return Tile(64, width, depth, one_tap, 8 if width * dtype.itemsize > 256 else 4, _stages(3, stage, chip, beside))


def conv1d_gates(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    stride: int,
    padding: Sequence[int],
    dilation: int,
    padding_mode: str,
    activation: str,
    w_ih: Tensor,
    gate_bias: Tensor | None,
) -> Tensor:
    """w_ih applied to what `conv1d_forward` gives, which reaches no memory: gates [B, T', N], memory [T', B, N].

    For inference, one group, and sizes that `handoff_tile` takes. w_ih [N, C], gate_bias [N] for an LSTM in both
    directions hold those of one below those of the other. Past a sample's output length gates are the bias.
    """
    channels, features, taps = weight.shape
    batch, time, size = x.shape[0], output_length(x.shape[1], taps, stride, padding, dilation), w_ih.shape[0]
    gates = empty_sequence(weight, (batch, time, size), True, weight.dtype)
    if batch == 0:
        return gates
    x, chip, rows = _featured(x), runtime.chip(x), batch * time
    tile = handoff_tile(weight.dtype, channels, features, taps, chip)
    if tile is None:
        raise ValueError(f"conv1d_gates: {channels} channels of {weight.dtype} are more than one program can hold")
    walk = _walk(taps, stride, padding, dilation, padding_mode)
    # The gates are split where rows alone leave processors idle: each part convolves anew.
    blocks = triton.cdiv(size, _GATES)
    parts = max(1, min(blocks, chip.processors // triton.cdiv(rows, tile.rows)))
    span = triton.cdiv(blocks, parts)
    x_sb, x_st, x_unit = _strides(x)
    with runtime.on_device_of(x):
        gates_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(blocks, span))](
            x, weight.transpose(1, 2).contiguous(), _contiguous(bias), w_ih.contiguous(), _contiguous(gate_bias), gates,
            _contiguous(lengths), rows, time, x.shape[1], x_sb, x_st, batch, span, channels, features, taps, size,
            walk.stride, walk.before, walk.dilation, walk.slack, walk.mode, activation, x_unit,
            runtime.needs_wide_offsets(x, gates), runtime.input_precision(x.dtype), *tile[:4], _GATES,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return gates
