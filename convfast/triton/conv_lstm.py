"""One ConvLSTM layer over a sequence: a launch a step, forward and backward.

Frames are channels-last and one pixel list over the batch. A program owns BM pixels × BC channels with all four gates
of one step, so that gates never reach memory in inference. It reads the frame before (a launch of its own, which the
stream orders before this one), adds up an implicit GEMM over (tap, channel) on the tensor cores and ends with the cell.
The backward of a step likewise: dh is the GEMM over (tap, gate) of the later step's dgates, then the backward of the
cell. Floors: 8 · taps · C · (C + Cin) FLOPs a pixel forward, 8 · taps · C · C backward for each of dh and dW.

The input convolution is part of the step's GEMM, or hoisted: one library convolution over all frames, whose result the
step adds. Hoisting sends 4C values a pixel through memory twice, but shortens the step: it is for steps that leave
processors idle (`hoists`), and for padding other than with zeros. Frames of three dims take the library's convolutions
step by step, and the kernels for what comes after.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..ops.checks import empty_channels_last
from ..reference.conv_lstm import channels_last, recurrent_options
from ..reference.padded_conv import conv, conv_backward, output_length
from ..reference.sequence import active_frames, keep, order
from . import runtime, tune
from .cell import cell_backward, cell_forward
from .weight_grad import outer_unit, weight_grad

# dgates of a sequence are kept for the weight gradients in chunks of this size, two at a time.
CHUNK_BYTES = 256 * 2**20

Options = tuple[Sequence[int], Sequence[int], Sequence[int], str]  # stride, padding, dilation and mode


@triton.jit
def _convolved(
    acc, source, rows, y, x, valid, stride_y, stride_x, stride_c, height, width, w,
    CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    W_ROW: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, BK: tl.constexpr,
):
    """acc [BM, N] + the convolution of `source` at the pixels `rows`, whose first tap reads (y, x); zero outside.
    w has N rows of W_ROW elements, (tap, channel) from the first on, zero up to whole blocks of BK."""
    k = tl.arange(0, BK)
    BLOCKS: tl.constexpr = (KH * KW * CHANNELS + BK - 1) // BK
    w_tile = tl.arange(0, N)[None, :] * W_ROW + k[:, None]
    # Tiles of offsets stay as they are, scalar pointers move on: half the registers of tiles of pointers.
    if CHANNELS % BK == 0:
        tile = (rows + (y * stride_y + x * stride_x))[:, None] + (k * stride_c)[None, :]
        for block in range(BLOCKS):
            tap = block // (CHANNELS // BK)
            channel = block % (CHANNELS // BK) * BK
            dy = tap // KW * STEP_Y
            dx = tap % KW * STEP_X
            inside = valid & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            at = source + (dy * stride_y + dx * stride_x + channel * stride_c)
            a = tl.load(at + tile, mask=inside[:, None], other=0.0)
            acc = tl.dot(a, tl.load(w + block * BK + w_tile), acc, input_precision=PRECISION)
    else:
        for block in range(BLOCKS):
            tap = (block * BK + k) // CHANNELS
            channel = (block * BK + k) % CHANNELS
            sy = y[:, None] + (tap // KW * STEP_Y)[None, :]
            sx = x[:, None] + (tap % KW * STEP_X)[None, :]
            inside = valid[:, None] & (sy >= 0) & (sy < height) & (sx >= 0) & (sx < width) & (tap < KH * KW)[None, :]
            tile = rows[:, None] + sy * stride_y + sx * stride_x + (channel * stride_c)[None, :]
            a = tl.load(source + tile, mask=inside, other=0.0)
            acc = tl.dot(a, tl.load(w + block * BK + w_tile), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _convolved_both(
    acc, x, x_rows, x_row, x_column, x_y, x_x, x_height, x_width, h, h_rows, row, column, height, width, valid, w,
    CIN: tl.constexpr, KH_X: tl.constexpr, KW_X: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, BK: tl.constexpr,
):
    """Both convolutions of a step in one loop, for whole blocks of channels: two loops need the accumulator twice."""
    k = tl.arange(0, BK)
    X_BLOCKS: tl.constexpr = KH_X * KW_X * CIN // BK
    BLOCKS: tl.constexpr = X_BLOCKS + KH * KW * C // BK
    w_tile = tl.arange(0, N)[None, :] * (BLOCKS * BK) + k[:, None]
    x_tile = (x_rows + (x_row * x_y + x_column * x_x))[:, None] + k[None, :]
    h_tile = (h_rows + (row * width + column) * C)[:, None] + k[None, :]
    for block in range(BLOCKS):
        of_x = block < X_BLOCKS
        h_block = block - X_BLOCKS
        x_tap = block // (CIN // BK)
        h_tap = h_block // (C // BK)
        x_dy = x_tap // KW_X * DILATION_Y
        x_dx = x_tap % KW_X * DILATION_X
        h_dy = h_tap // KW
        h_dx = h_tap % KW
        y = tl.where(of_x, x_row + x_dy, row + h_dy)
        column_read = tl.where(of_x, x_column + x_dx, column + h_dx)
        inside = valid & (y >= 0) & (y < tl.where(of_x, x_height, height))
        inside = inside & (column_read >= 0) & (column_read < tl.where(of_x, x_width, width))
        x_at = x + (x_dy * x_y + x_dx * x_x + block % (CIN // BK) * BK)
        h_at = h + ((h_dy * width + h_dx) * C + h_block % (C // BK) * BK)
        # A choice between scalars would hide that both are aligned.
        at = tl.where(of_x, x_at + x_tile, h_at + h_tile)
        a = tl.load(at, mask=inside[:, None], other=0.0)
        acc = tl.dot(a, tl.load(w + block * BK + w_tile), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _widened(x, WIDE: tl.constexpr):
    """Offsets of 64 bits take twice the registers: only where a tensor is so large."""
    return x.to(tl.int64) if WIDE else x


@triton.jit
def _rows(b, frames, frame, area, p, WIDE: tl.constexpr):
    """Index of pixel p of a frame among all pixels of [B, frames, *S']."""
    return _widened(b * frames + frame, WIDE) * area + p


@triton.jit(
    do_not_specialize=(
        "pixels", "height", "width",
        "t", "T", "t_before", "T_before", "t_x", "T_x", "x_height", "x_width", "x_b", "x_t",
    )
)  # fmt: skip
def _forward_step(
    h_before, c_before, x, gates_x, w, bias, peephole, lengths, h, c, gates, pixels, height, width, t, T,
    t_before, T_before, t_x, T_x, x_height, x_width, x_b, x_t, x_y, x_x, x_c,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, CIN: tl.constexpr, KH_X: tl.constexpr, KW_X: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr, UNIT: tl.constexpr, C_SEQUENCE: tl.constexpr,
    WIDE: tl.constexpr, ONE_LOOP: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr, BK: tl.constexpr, BK_X: tl.constexpr,
):
    """Reads frame t_before of h and c (of T_before), frame t of x or t_x of gates_x (of T_x); writes its pixels and
    channels of frame t (of T) of h, c and gates. Without C_SEQUENCE c is one frame, updated in place: each element is
    read by its owner alone. Without h only gates are written, to one frame. x_b and x_t count in UNITs."""
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    program = tl.program_id(0)
    block = program % BLOCKS
    m = program // BLOCKS * BM + tl.arange(0, BM)
    valid = m < pixels
    area = height * width
    b = m // area
    p = m % area
    row = p // width
    column = p % width
    before = _rows(b, T_before, t_before, area, p, WIDE)

    acc = tl.zeros([BM, 4 * BC], tl.float32)
    y0 = row - (KH - 1) // 2
    x0 = column - (KW - 1) // 2
    K_X: tl.constexpr = 0 if x is None else (KH_X * KW_X * CIN + BK_X - 1) // BK_X * BK_X
    W_ROW: tl.constexpr = K_X + (KH * KW * C + BK - 1) // BK * BK
    if x is not None:
        x += t.to(tl.int64) * x_t * UNIT
        x_rows = _widened(b, WIDE) * x_b * UNIT
        x_row = row * STRIDE_Y - PAD_Y
        x_column = column * STRIDE_X - PAD_X
    if w is not None:
        w += block * (4 * BC * W_ROW)
        WHOLE: tl.constexpr = CIN % BK == 0 and C % BK == 0 and K_X == KH_X * KW_X * CIN
        if ONE_LOOP and x is not None and h_before is not None and WHOLE:
            acc = _convolved_both(
                acc, x, x_rows, x_row, x_column, x_y, x_x, x_height, x_width, h_before, (before - p) * C, y0, x0,
                height, width, valid, w, CIN, KH_X, KW_X, DILATION_Y, DILATION_X, C, KH, KW, PRECISION, 4 * BC, BK,
            )
        else:
            if x is not None:
                acc = _convolved(
                    acc, x, x_rows, x_row, x_column, valid, x_y, x_x, x_c, x_height, x_width, w,
                    CIN, KH_X, KW_X, DILATION_Y, DILATION_X, W_ROW, PRECISION, 4 * BC, BK_X,
                )
            if h_before is not None:
                acc = _convolved(
                    acc, h_before, (before - p) * C, y0, x0, valid, width * C, C, 1, height, width, w + K_X,
                    C, KH, KW, 1, 1, W_ROW, PRECISION, 4 * BC, BK,
                )
    # Columns are gate-slow within a block of channels: the splits move nothing between threads.
    WIDTH: tl.constexpr = BC // PARTS
    if PARTS == 2:
        parts = tl.split(acc.reshape(BM, 2, 2, 2, WIDTH).permute(0, 4, 1, 2, 3))
    else:
        parts = (acc.reshape(BM, 2, 2, WIDTH).permute(0, 3, 1, 2),)

    rows = _rows(b, T, t, area, p, WIDE)
    # The first step has c0, one frame as `before` says; after it c is one frame or as long as h.
    c_rows, c_rows_before, gate_rows = rows, before, rows
    if not C_SEQUENCE:
        c_rows, c_rows_before = _widened(m, WIDE), _widened(m, WIDE)
    if h is None:
        gate_rows = _widened(m, WIDE)
    for part in tl.static_range(PARTS):
        even, odd = tl.split(parts[part])
        i, g = tl.split(even)
        f, o = tl.split(odd)
        channel = block * BC + part * WIDTH + tl.arange(0, WIDTH)
        own = channel < C
        inside = valid[:, None] & own[None, :]
        if bias is not None:
            i += tl.load(bias + channel, mask=own, other=0.0).to(tl.float32)[None, :]
            f += tl.load(bias + C + channel, mask=own, other=0.0).to(tl.float32)[None, :]
            g += tl.load(bias + 2 * C + channel, mask=own, other=0.0).to(tl.float32)[None, :]
            o += tl.load(bias + 3 * C + channel, mask=own, other=0.0).to(tl.float32)[None, :]
        if gates_x is not None:
            added = gates_x + (_rows(b, T_x, t_x, area, p, WIDE) * (4 * C))[:, None] + channel[None, :]
            i += tl.load(added, mask=inside, other=0.0).to(tl.float32)
            f += tl.load(added + C, mask=inside, other=0.0).to(tl.float32)
            g += tl.load(added + 2 * C, mask=inside, other=0.0).to(tl.float32)
            o += tl.load(added + 3 * C, mask=inside, other=0.0).to(tl.float32)
        p_i, p_f, p_o = 0.0, 0.0, 0.0
        if peephole is not None:
            weights = peephole + (p * C)[:, None] + channel[None, :]
            p_i = tl.load(weights, mask=inside, other=0.0)
            p_f = tl.load(weights + area * C, mask=inside, other=0.0)
            p_o = tl.load(weights + 2 * area * C, mask=inside, other=0.0)
        c_old = tl.zeros([BM, WIDTH], tl.float32)
        if c_before is not None:
            c_old = tl.load(c_before + (c_rows_before * C)[:, None] + channel[None, :], mask=inside, other=0.0)
            c_old = c_old.to(tl.float32)
        i, f, g, o, c_new, h_new = cell_forward(i, f, g, o, c_old, p_i, p_f, p_o, peephole is not None)

        if gates is not None:
            kept = gates + (gate_rows * (4 * C))[:, None] + channel[None, :]
            tl.store(kept, i, mask=inside)
            tl.store(kept + C, f, mask=inside)
            tl.store(kept + 2 * C, g, mask=inside)
            tl.store(kept + 3 * C, o, mask=inside)
        if h is not None:
            if lengths is not None:
                active = (t < tl.load(lengths + b, mask=valid, other=0))[:, None]
                h_old = tl.zeros([BM, WIDTH], tl.float32)
                if h_before is not None:
                    h_old = tl.load(h_before + (before * C)[:, None] + channel[None, :], mask=inside, other=0.0)
                    h_old = h_old.to(tl.float32)
                h_new = tl.where(active, h_new, h_old)
                c_new = tl.where(active, c_new, c_old)
            tl.store(h + (rows * C)[:, None] + channel[None, :], h_new, mask=inside)
            tl.store(c + (c_rows * C)[:, None] + channel[None, :], c_new, mask=inside)


@triton.jit(do_not_specialize=("T", "size"))
def _zero_past_lengths(h, lengths, T, size, BLOCK: tl.constexpr):
    """A program zeroes its block of a frame [B, T, size] past the length of its sample."""
    blocks = (size + BLOCK - 1) // BLOCK
    frame = tl.program_id(0) // blocks
    if frame % T >= tl.load(lengths + frame // T):
        offset = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        tl.store(h + frame.to(tl.int64) * size + offset, tl.zeros([BLOCK], tl.float32), mask=offset < size)


@triton.jit(
    do_not_specialize=(
        "pixels", "height", "width", "t", "T", "t_before", "T_before", "t_after", "slot", "slot_after", "slots",
    )
)  # fmt: skip
def _backward_step(
    dgates_after, w, dh_after, dc_after, dh, gates, c_before, c, peephole, lengths, carry, dgates, dc, dbias,
    dpeephole, dh0, pixels, height, width, t, T, t_before, T_before, t_after, slot, slot_after, slots,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, GATES_SEQUENCE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):
    """dh of step t is the GEMM over dgates_after (frame slot_after), or dh_after, plus frame t of dh. Writes its pixels
    and channels of dgates (frame slot), dc and carry, and adds to its own elements of dbias (one row a tile of pixels)
    and dpeephole; what it reads of these only it writes. `carry` holds dh of samples that are not within their length
    at t. Given dh0, that is all it writes: dh before the first step."""
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    program = tl.program_id(0)
    block = program % BLOCKS
    tile = program // BLOCKS
    m = tile * BM + tl.arange(0, BM)
    valid = m < pixels
    area = height * width
    b = m // area
    p = m % area

    acc = tl.zeros([BM, BC], tl.float32)
    if w is not None:
        # Tap (ky, kx) of the forward step read pixel y + ky - before: its gradient comes from y - ky + before.
        acc = _convolved(
            acc, dgates_after, _rows(b, slots, slot_after, area, 0, WIDE) * (4 * C),
            p // width + (KH - 1) // 2, p % width + (KW - 1) // 2,
            valid, width * (4 * C), 4 * C, 1, height, width,
            w + block * (BC * ((KH * KW * 4 * C + BK - 1) // BK * BK)),
            4 * C, KH, KW, -1, -1, (KH * KW * 4 * C + BK - 1) // BK * BK, PRECISION, BC, BK,
        )  # fmt: skip
    WIDTH: tl.constexpr = BC // PARTS
    parts = tl.split(acc.reshape(BM, 2, WIDTH).permute(0, 2, 1)) if PARTS == 2 else (acc,)

    rows = _rows(b, T, t, area, p, WIDE)
    gate_rows = rows
    if not GATES_SEQUENCE:
        gate_rows = _widened(m, WIDE)
    for part in tl.static_range(PARTS):
        channel = block * BC + part * WIDTH + tl.arange(0, WIDTH)
        own = channel < C
        inside = valid[:, None] & own[None, :]
        state = (_widened(m, WIDE) * C)[:, None] + channel[None, :]
        dh_sum = parts[part]
        if dh_after is not None:
            dh_sum += tl.load(dh_after + state, mask=inside, other=0.0).to(tl.float32)
        if lengths is not None:
            length = tl.load(lengths + b, mask=valid, other=0)[:, None]
            passed = inside & (t_after >= length)
            dh_sum = tl.where(passed, tl.load(carry + state, mask=passed, other=0.0), dh_sum)
        if dh0 is not None:
            tl.store(dh0 + state, dh_sum, mask=inside)
        else:
            if lengths is not None:
                tl.store(carry + state, dh_sum, mask=inside & (t >= length))
            # In the order of their use: registers hold what is not yet used.
            here = (rows * C)[:, None] + channel[None, :]
            c_new = tl.load(c + here, mask=inside, other=0.0)
            activated = gates + (gate_rows * (4 * C))[:, None] + channel[None, :]
            o = tl.load(activated + 3 * C, mask=inside, other=0.0).to(tl.float32)
            if dh is not None:
                dh_sum += tl.load(dh + here, mask=inside, other=0.0).to(tl.float32)
            dc_sum = tl.zeros([BM, WIDTH], tl.float32)
            if dc_after is not None:
                dc_sum = tl.load(dc_after + state, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(activated + 2 * C, mask=inside, other=0.0).to(tl.float32)
            i = tl.load(activated, mask=inside, other=0.0).to(tl.float32)
            f = tl.load(activated + C, mask=inside, other=0.0).to(tl.float32)
            c_old = tl.zeros([BM, WIDTH], tl.float32)
            if c_before is not None:
                before = (_rows(b, T_before, t_before, area, p, WIDE) * C)[:, None] + channel[None, :]
                c_old = tl.load(c_before + before, mask=inside, other=0.0).to(tl.float32)
            p_i, p_f, p_o = 0.0, 0.0, 0.0
            if peephole is not None:
                weights = peephole + (p * C)[:, None] + channel[None, :]
                p_i = tl.load(weights, mask=inside, other=0.0)
                p_f = tl.load(weights + area * C, mask=inside, other=0.0)
                p_o = tl.load(weights + 2 * area * C, mask=inside, other=0.0)
            di, df, dg, do, dc_new = cell_backward(
                i, f, g, o, c_old, c_new, dh_sum, dc_sum, p_i, p_f, p_o, peephole is not None
            )
            if lengths is not None:
                active = t < length
                di = tl.where(active, di, 0.0)
                df = tl.where(active, df, 0.0)
                dg = tl.where(active, dg, 0.0)
                do = tl.where(active, do, 0.0)
                dc_new = tl.where(active, dc_new, dc_sum)
            tl.store(dc + state, dc_new, mask=inside)
            found = dgates + (_rows(b, slots, slot, area, p, WIDE) * (4 * C))[:, None] + channel[None, :]
            tl.store(found, di, mask=inside)
            tl.store(found + C, df, mask=inside)
            tl.store(found + 2 * C, dg, mask=inside)
            tl.store(found + 3 * C, do, mask=inside)
            if dbias is not None:
                sums = dbias + tile * (4 * C) + channel
                tl.store(sums, tl.load(sums, mask=own) + tl.sum(di, 0), mask=own)
                tl.store(sums + C, tl.load(sums + C, mask=own) + tl.sum(df, 0), mask=own)
                tl.store(sums + 2 * C, tl.load(sums + 2 * C, mask=own) + tl.sum(dg, 0), mask=own)
                tl.store(sums + 3 * C, tl.load(sums + 3 * C, mask=own) + tl.sum(do, 0), mask=own)
            if dpeephole is not None:
                peep = dpeephole + (_rows(b, 3, 0, area, p, WIDE) * C)[:, None] + channel[None, :]
                tl.store(peep, tl.load(peep, mask=inside) + di * c_old, mask=inside)
                peep += area * C
                tl.store(peep, tl.load(peep, mask=inside) + df * c_old, mask=inside)
                peep += area * C
                tl.store(peep, tl.load(peep, mask=inside) + do * c_new, mask=inside)


class Tile(NamedTuple):
    pixels: int
    channels: int
    depth: int
    warps: int
    stages: int

    @property
    def parts(self) -> int:
        """How many parts of its channels a program runs the cell on, one after another, for want of registers."""
        return 2 if self.pixels * self.channels >= 512 * self.warps else 1


def candidates(pixels: int, channels: int, dtype: torch.dtype, chip: runtime.Chip) -> list[Tile]:
    """Tile sizes of a step, best first: the largest that gives every processor a tile, else the smallest."""
    if chip.backend == "hip":
        sizes = [(64, 32, 32, 4, 2)] if dtype.itemsize == 2 else [(64, 16, 32, 4, 2)]
    elif runtime.input_precision(dtype) == "ieee" and dtype.itemsize == 4:
        sizes = [(64, 32, 32, 4, 3), (64, 16, 32, 4, 3)][0 if chip.arch >= 90 else 1 :]
    else:
        # Where the tensor cores do not read both operands from shared memory, the wider tile has no registers to spare.
        depth = 128 // dtype.itemsize
        sizes = [(128, 64 if chip.arch >= 90 else 32, depth, 8, 3), (64, 32, depth, 4, 3)]
        if chip.arch < 90 and dtype.itemsize == 4 and channels % 4:  # read number by number
            sizes[1] = (64, 32, depth, 4, 2)
    found = []
    for size, block, depth, warps, stages in sizes:
        block = min(block, max(16, triton.next_power_of_2(channels)))
        tile = Tile(size, block, depth, warps, stages)
        if tile not in found:
            found.append(tile)
    best = next((t for t in found if tiles(t, pixels, channels) >= chip.processors), found[-1])
    return [best, *(t for t in found if t != best)]


def _best_tile(
    name: str, w_ih: Tensor | None, w_hh: Tensor, pixels: int, save: str, run: Callable[[Tile], object]
) -> Tile:
    """`run`: the whole sequence. It may be run again: what it changes in place it first writes."""
    found = candidates(pixels, w_hh.shape[1], w_hh.dtype, runtime.chip(w_hh))
    shapes = (*w_hh.shape[1:], None if w_ih is None else tuple(w_ih.shape[1:]))
    key = (*shapes, save, w_hh.dtype, runtime.input_precision(w_hh.dtype), found[0])
    return tune.best(name, key, w_hh, found if pixels else found[:1], run)


def tiles(tile: Tile, pixels: int, channels: int) -> int:
    return triton.cdiv(pixels, tile.pixels) * triton.cdiv(channels, tile.channels)


def hoists(tile_count: int, columns: int, processors: int) -> bool:
    """Whether the input convolution with so many (tap, channel) columns is one library call over all frames."""
    return columns > 128 and tile_count < processors


def _depth(columns: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(columns)))


def _pair(values: Sequence[int]) -> list[int]:
    """Of a frame's last two dims; a frame of one dim has height 1."""
    return [1, *values] if len(values) == 1 else list(values)


def _last(x: Tensor) -> Tensor:
    """[B, T, C, *S] → [B, T, H, W, C]"""
    return (x.unsqueeze(3) if x.ndim == 4 else x).movedim(2, -1)


def _forward_weight(w_hh: Tensor, w_ih: Tensor | None, tile: Tile) -> Tensor:
    """→ [channel blocks, 4 gates, channels of a block, (tap, Cin) then (tap, C)], zero where there are none."""
    parts = []
    for w in (w_hh,) if w_ih is None else (w_ih, w_hh):
        gates = w.flatten(2).transpose(1, 2).reshape(4, w_hh.shape[1], -1)
        columns = gates.shape[2]
        behind = (-columns % _depth(columns, tile.depth), -w_hh.shape[1] % tile.channels)
        parts.append(F.pad(gates, (0, behind[0], 0, behind[1])) if any(behind) else gates)
    gates = parts[0] if w_ih is None else torch.cat(parts, 2)
    return gates.unflatten(1, (-1, tile.channels)).transpose(0, 1).contiguous()


def _backward_weight(w: Tensor, tile: Tile) -> Tensor:
    """[4C, C, *K] → [C, (tap, 4C)], padded with zeros to whole blocks."""
    rows = w.flatten(2).permute(1, 2, 0).contiguous().flatten(1)  # of one tap it would be a view
    columns = rows.shape[1]
    behind = (-columns % _depth(columns, tile.depth), -rows.shape[0] % tile.channels)
    return F.pad(rows, (0, behind[0], 0, behind[1])) if any(behind) else rows


def _fused_input(x: Tensor, w_ih: Tensor, options: Options) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """→ x as a step reads it, (height, width and strides), (Cin, kernel, stride, padding, dilation and UNIT)."""
    stride, padding, dilation, _ = options
    # Within a frame offsets have 32 bits.
    if (x.shape[2] >= 8 and x.stride(2) != 1) or runtime.needs_wide_offsets(x[:1, :1]):
        x = channels_last(x, 2)
    frames = _last(x)
    unit = outer_unit(frames)
    x_b, x_t, *inner = frames.stride()
    pads = [0, *padding[::2]][-2:]
    constants = (x.shape[2], *_pair(w_ih.shape[2:]), *_pair(stride), *pads, *_pair(dilation), unit)
    return x, (*frames.shape[2:4], x_b // unit, x_t // unit, *inner), constants


class _Forward:
    """What the forward steps of a call share, and their launch."""

    def __init__(
        self,
        x: Tensor | None,
        w_ih: Tensor | None,
        w_hh: Tensor,
        bias: Tensor | None,
        peephole: Tensor | None,
        lengths: Tensor | None,
        batch: int,
        time: int,
        space: Sequence[int],
        input_options: Options,
        tile: Tile,
        c_sequence: bool,
        at_once: bool,
    ) -> None:
        """`at_once`: a hoisted input convolution is computed for all frames, else for the frame of each step."""
        channels, self.by_library = w_hh.shape[1], w_hh.ndim == 5
        area, chip = torch.Size(space).numel(), runtime.chip(w_hh)
        count = tiles(tile, batch * area, channels)
        self.time, self.w_ih, self.w_hh, self.input_options = time, w_ih, w_hh, input_options
        self.x, self.x_sizes, x_constants, x_columns = None, (1, 1, 0, 0, 0, 0, 0), (1, 1, 1, 1, 1, 0, 0, 1, 1, 1), 1
        # Hoisted: the frames to convolve, or what came of them. One frame for all steps is not repeated.
        self.frames = self.gates_x = None
        if x is not None and w_ih is None:
            self.gates_x = channels_last(x[:, :1] if x.stride(1) == 0 else x, 2)
        elif x is not None:
            x_columns = w_ih[0].numel()
            by_library = self.by_library or input_options[3] != "zeros"
            if by_library or hoists(count, x_columns, chip.processors):
                self.frames = x[:, :1] if x.stride(1) == 0 else x
                if at_once:
                    self.gates_x, self.frames = self._convolved_input(self.frames), None
            else:
                self.x, self.x_sizes, x_constants = _fused_input(x, w_ih, input_options)
        self.operands = (
            None if self.by_library else _forward_weight(w_hh, None if self.x is None else w_ih, tile),
            None if bias is None else bias.contiguous(),
            None if peephole is None else peephole.movedim(1, -1).float().contiguous(),
            None if lengths is None else lengths.contiguous(),
        )
        self.sizes = (batch * area, *((1, area) if self.by_library else _pair(space)))
        # The largest tensor is as long as gates would be; an x in pieces may span more.
        wide = batch * time * area * 4 * channels >= 2**31 or runtime.needs_wide_offsets(self.x)
        self.constants = (
            channels, *((1, 1) if self.by_library else _pair(w_hh.shape[2:])), *x_constants, c_sequence, wide,
            chip.backend != "hip",  # Triton 3.6 fails to compile a choice between two pointers for AMD
            runtime.input_precision(w_hh.dtype), tile.parts, tile.pixels, tile.channels,
            _depth(w_hh[0].numel(), tile.depth), _depth(x_columns, tile.depth),
        )  # fmt: skip
        self.options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
        self.launch = _forward_step[(count,)]

    def _convolved_input(self, frames: Tensor) -> Tensor:
        gates = conv(channels_last(frames, 2).flatten(0, 1), self.w_ih, None, *self.input_options)
        return channels_last(gates, 1).unflatten(0, frames.shape[:2])

    def step(
        self,
        t: int,
        t_before: int,
        T_before: int,
        h_before: Tensor | None,
        c_before: Tensor | None,
        h: Tensor | None,
        c: Tensor | None,
        gates: Tensor | None,
    ) -> None:
        gates_x = self.gates_x
        if self.frames is not None:
            gates_x = self._convolved_input(self.frames[:, min(t, self.frames.shape[1] - 1)].unsqueeze(1))
        T_x = 1 if gates_x is None else gates_x.shape[1]
        t_x = t if T_x == self.time else 0
        if self.by_library and h_before is not None:
            recurrent = conv(h_before[:, t_before], self.w_hh, None, *recurrent_options(self.w_hh))
            gates_x = recurrent if gates_x is None else recurrent + gates_x[:, t_x]
            gates_x, t_x, T_x = channels_last(gates_x, 1), 0, 1
        # Left alone, ptxas spills in the first step to run more of its programs at once.
        limit = {} if h_before is not None else runtime.most_registers(runtime.chip(self.w_hh), 255)
        self.launch(
            h_before, c_before, self.x, gates_x, *self.operands, h, c, gates, *self.sizes, t, self.time, t_before,
            T_before, t_x, T_x, *self.x_sizes, *self.constants, **self.options, **limit,
        )  # fmt: skip


def conv_lstm_forward(
    x: Tensor | None,
    w_ih: Tensor | None,
    w_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    time: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    padding_mode: str,
    reverse: bool,
    algorithm: str,
    save: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """→ (h, h_n, c_n, c, gates) as csrc/ops.h says."""
    source = x if x is not None else h0 if h0 is not None else c0
    batch, channels = source.shape[0], w_hh.shape[1]
    space = list(source.shape[3 if x is not None else 2 :])
    if x is not None and w_ih is not None:
        space = [
            output_length(size, w_ih.shape[2 + d], stride[d], padding[2 * d : 2 * d + 2], dilation[d])
            for d, size in enumerate(space)
        ]
    saved = save != "none"

    sequence = [batch, time, channels, *space]
    h = empty_channels_last(w_hh, sequence, 2, w_hh.dtype)
    c_shape, channel_dim = (sequence, 2) if saved else ([batch, channels, *space], 1)
    c = empty_channels_last(w_hh, c_shape, channel_dim, torch.float32)
    gates = None
    if save == "fast":
        gates = empty_channels_last(w_hh, [batch, time, 4 * channels, *space], 2, w_hh.dtype)
    frames = list(order(time, reverse))
    if h.numel() > 0:
        with runtime.on_device_of(w_hh):
            first_h = None if h0 is None else channels_last(h0, 1).unsqueeze(1)
            first_c = None if c0 is None else channels_last(c0, 1)

            def run(tile: Tile) -> None:
                forward = _Forward(
                    x, w_ih, w_hh, bias, peephole, lengths, batch, time, space,
                    (stride, padding, dilation, padding_mode), tile, c_sequence=saved, at_once=True,
                )  # fmt: skip
                h_before, c_before, t_before, T_before = first_h, first_c, 0, 1
                for t in frames:
                    forward.step(t, t_before, T_before, h_before, c_before, h, c, gates)
                    h_before, c_before, t_before, T_before = h, c, t, time

            run(_best_tile("conv_lstm_forward", w_ih, w_hh, batch * torch.Size(space).numel(), save, run))
    h_n = _frame(h, frames[-1])
    c_n = _frame(c, frames[-1]) if saved else c
    if lengths is not None and h.numel() > 0:
        size = h[0, 0].numel()
        with runtime.on_device_of(h):
            _zero_past_lengths[(batch * time * triton.cdiv(size, 1024),)](
                h, lengths.contiguous(), time, size, BLOCK=1024, num_warps=4
            )
    return h, h_n, c_n, c if saved else c.new_empty(0), w_hh.new_empty(0) if gates is None else gates


def _frame(sequence: Tensor, t: int) -> Tensor:
    """A copy of one frame: an output may not be a view of another."""
    return sequence[:, t].movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


class _WeightGrad:
    """Gradient of one convolution's weight, added up over chunks of frames."""

    def __init__(self, w: Tensor, options: Options) -> None:
        self.w, self.options, self.total = w, options, None

    def add(self, dgates: Tensor, source: Tensor) -> None:
        """dgates [B, T, 4C, *S'] and source [B, T, Cin, *S], both channels-last in memory."""
        stride, padding, dilation, mode = self.options
        if dgates.shape[1] == 0:
            return
        if dgates.ndim == 6 or mode != "zeros":
            needs = (False, True)
            _, part = conv_backward(dgates.flatten(0, 1), source.flatten(0, 1), self.w, *self.options, needs)
        else:
            part = weight_grad(
                _last(dgates), _last(source), _pair(self.w.shape[2:]), _pair(stride),
                [0, *padding[::2]][-2:], _pair(dilation),
            ).view_as(self.w)  # fmt: skip
        part = part.float().contiguous()  # the library's is of the weight's dtype
        self.total = part if self.total is None else self.total + part

    def result(self) -> Tensor:
        return torch.zeros_like(self.w) if self.total is None else self.total.to(self.w.dtype)


class _ConvolutionGrads:
    """Gradients of x and of both convolutions' weights, from dgates a chunk of frames at a time."""

    def __init__(
        self,
        x: Tensor | None,
        w_ih: Tensor | None,
        w_hh: Tensor,
        h0: Tensor | None,
        h: Tensor,
        active: Tensor | None,
        input_options: Options,
        reverse: bool,
        needs: Sequence[int],
    ) -> None:
        """h0 [B, 1, C, *S'] and h are channels-last in memory."""
        self.w_ih, self.h0, self.h, self.input_options, self.reverse = w_ih, h0, h, input_options, reverse
        reads_x = x is not None and w_ih is not None and (needs[0] or needs[1])
        self.x = channels_last(keep(x, active), 2) if reads_x else None
        self.dx = torch.empty_like(x) if needs[0] else None
        self.dw_ih = _WeightGrad(w_ih, input_options) if needs[1] else None
        self.dw_hh = _WeightGrad(w_hh, recurrent_options(w_hh)) if needs[2] else None

    def add(self, dgates: Tensor, first: int, last: int) -> None:
        """dgates of the frames from `first` to `last`."""
        if self.dx is not None:
            self._put_dx(dgates, first, last)
        if self.dw_ih is not None:
            self.dw_ih.add(dgates, self.x[:, first : last + 1])
        if self.dw_hh is not None:
            self._add_recurrent(self.dw_hh, dgates, first, last)

    def _put_dx(self, dgates: Tensor, first: int, last: int) -> None:
        part = dgates
        if self.w_ih is not None:
            source = self.x[:, first : last + 1].flatten(0, 1)
            part, _ = conv_backward(dgates.flatten(0, 1), source, self.w_ih, *self.input_options, (True, False))
            part = part.unflatten(0, dgates.shape[:2])
        if part.shape == self.dx.shape and part.stride() == self.dx.stride():
            self.dx = part
        else:
            self.dx[:, first : last + 1] = part

    def _add_recurrent(self, dw_hh: _WeightGrad, dgates: Tensor, first: int, last: int) -> None:
        """dgates of a step meet the h that it started from."""
        time = self.h.shape[1]
        start = time - 1 if self.reverse else 0
        if self.reverse:
            end = min(last, time - 2)
            dw_hh.add(dgates[:, : end + 1 - first], self.h[:, first + 1 : end + 2])
        else:
            begin = max(first, 1)
            dw_hh.add(dgates[:, begin - first :], self.h[:, begin - 1 : last])
        if self.h0 is not None and first <= start <= last:
            dw_hh.add(dgates[:, start - first].unsqueeze(1), self.h0)

    def of_weights(self) -> list[Tensor | None]:
        """dw_ih and dw_hh."""
        return [None if grad is None else grad.result() for grad in (self.dw_ih, self.dw_hh)]


class _Backward:
    """What the backward steps of a call share, their launch, and what each leaves to the step before it."""

    def __init__(
        self,
        dh: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        w_hh: Tensor,
        peephole: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        h: Tensor,
        c: Tensor,
        gates: Tensor,
        forward: _Forward | None,
        reverse: bool,
        needs: Sequence[int],
        tile: Tile,
    ) -> None:
        """h0 [B, 1, C, *S'] and h are channels-last in memory; `forward` computes the gates of a step anew."""
        (batch, self.time, channels, *space), self.by_library = h.shape, w_hh.ndim == 5
        self.w_hh, self.forward = w_hh, forward
        self.lengths = None if lengths is None else lengths.contiguous()
        self.shape, self.pixels = [batch, channels, *space], batch * torch.Size(space).numel()
        self.first, self.back = (self.time - 1, 1) if reverse else (0, -1)
        self.h, self.c = h, c
        self.h0, self.c0 = h0, None if c0 is None else channels_last(c0, 1)
        self.dh = None if dh is None else channels_last(dh, 2)
        self.gates = self._empty(w_hh.dtype, 4) if forward is not None else gates
        # Before any step it is as if all samples were within their length at the step after.
        self.after, self.slot_after, self.t_after = None, 0, -1
        self.dh_after = None if dh_n is None else channels_last(dh_n, 1)
        self.dc_after = None if dc_n is None else channels_last(dc_n, 1)

        self.dc = self._empty(torch.float32)
        self.carry = None if lengths is None else self._empty(torch.float32)
        rows, zeros = triton.cdiv(self.pixels, tile.pixels), partial(w_hh.new_zeros, dtype=torch.float32)
        self.dbias = zeros((rows, 4 * channels)) if needs[3] else None
        self.dpeephole = zeros((batch, 3, *space, channels)) if needs[4] else None
        self.weights = None if self.by_library else _backward_weight(w_hh, tile)
        self.peephole = None if peephole is None else peephole.movedim(1, -1).float().contiguous()
        self.sizes = self.pixels, *((1, torch.Size(space).numel()) if self.by_library else _pair(space))
        self.constants = (
            channels, *((1, 1) if self.by_library else _pair(w_hh.shape[2:])), forward is None,
            4 * self.time * self.pixels * channels >= 2**31, runtime.input_precision(w_hh.dtype),
            tile.parts, tile.pixels, tile.channels, _depth(4 * w_hh[0].numel(), tile.depth),
        )  # fmt: skip
        self.options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
        self.launch = _backward_step[(tiles(tile, self.pixels, channels),)]

    def _empty(self, dtype: torch.dtype, factor: int = 1) -> Tensor:
        batch, channels, *space = self.shape
        return empty_channels_last(self.w_hh, [batch, factor * channels, *space], 1, dtype)

    def run(self, frames: Sequence[int], into: Tensor) -> Tensor:
        """The steps of a chunk of frames, the last step first → dgates of these frames, a part of `into`."""
        first = min(frames)
        for t in frames:
            self._step(t, into, t - first)
        return into[:, : len(frames)]

    def _step(self, t: int, into: Tensor, slot: int) -> None:
        h_before, c_before, t_before, T_before = self.h, self.c, t + self.back, self.time
        if t == self.first:
            h_before, c_before, t_before, T_before = self.h0, self.c0, 0, 1
        if self.forward is not None:
            self.forward.step(t, t_before, T_before, h_before, c_before, None, None, self.gates)
        self._convolve_dgates()
        self.launch(
            self.after, None if self.after is None else self.weights, self.dh_after, self.dc_after, self.dh,
            self.gates, c_before, self.c, self.peephole, self.lengths, self.carry, into, self.dc, self.dbias,
            self.dpeephole, None, *self.sizes, t, self.time, t_before, T_before, self.t_after, slot, self.slot_after,
            into.shape[1], *self.constants, **self.options,
        )  # fmt: skip
        self.after, self.slot_after, self.t_after = into, slot, t
        self.dh_after, self.dc_after = None, self.dc

    def _convolve_dgates(self) -> None:
        """dh_after from the dgates of the step after, where the library convolves."""
        if self.by_library and self.after is not None:
            dgates, options = self.after[:, self.slot_after], recurrent_options(self.w_hh)
            found, _ = conv_backward(dgates, self.h[:, 0], self.w_hh, *options, needs=(True, False))
            self.dh_after = channels_last(found, 1)

    def dh0(self) -> Tensor:
        """After all steps."""
        dh0 = self._empty(self.w_hh.dtype)
        if self.pixels:
            self._convolve_dgates()
            self.launch(
                self.after, self.weights, self.dh_after, None, None, None, None, None, None, self.lengths, self.carry,
                None, None, None, None, dh0, *self.sizes, 0, self.time, 0, 1, self.t_after, 0, self.slot_after,
                self.after.shape[1], *self.constants, **self.options,
            )  # fmt: skip
        return dh0

    def sums(self) -> tuple[Tensor | None, Tensor | None]:
        """dbias and dpeephole, after all steps."""
        dbias, dpeephole, dtype = self.dbias, self.dpeephole, self.w_hh.dtype
        return (
            None if dbias is None else dbias.sum(0).to(dtype),
            None if dpeephole is None else dpeephole.sum(0).movedim(-1, 1).to(dtype).contiguous(),
        )


def conv_lstm_backward(
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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    padding_mode: str,
    reverse: bool,
    algorithm: str,
    needs: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """→ (dx, dw_ih, dw_hh, dbias, dpeephole, dh0, dc0) as csrc/ops.h says.

    dx is the library's: it takes every stride and padding, and no cell follows that could share its pass.
    """
    batch, _, channels, *space = h.shape
    pixels, input_options = batch * torch.Size(space).numel(), (stride, padding, dilation, padding_mode)
    # One chunk where dgates are dx.
    most = max(1, CHUNK_BYTES // max(1, 4 * pixels * channels * w_hh.dtype.itemsize))
    size = time if needs[0] and w_ih is None else triton.cdiv(time, triton.cdiv(time, most))
    with runtime.on_device_of(w_hh):
        active = active_frames(lengths, time, w_hh.ndim - 2)
        if reverse and active is not None and h0 is not None:
            # A sample's first step started from h0, which no frame of h holds.
            h = torch.where(active, h, h0.unsqueeze(1))
        h = channels_last(h, 2)
        h0 = None if h0 is None else channels_last(h0, 1).unsqueeze(1)

        def run(tile: Tile) -> tuple[Tensor, ...]:
            forward = None
            if gates.numel() == 0:
                forward = _Forward(
                    x, w_ih, w_hh, bias, peephole, lengths, batch, time, space, input_options, tile,
                    c_sequence=True, at_once=False,
                )  # fmt: skip
            steps = _Backward(
                dh, dh_n, dc_n, w_hh, peephole, h0, c0, lengths, h, c, gates, forward, reverse, needs, tile
            )
            grads = _ConvolutionGrads(x, w_ih, w_hh, h0, h, active, input_options, reverse, needs)
            # A chunk's last step is read by the first of the next one.
            buffers = [
                empty_channels_last(w_hh, [batch, size, 4 * channels, *space], 2, w_hh.dtype)
                for _ in range(1 if size == time else 2)
            ]
            frames = list(order(time, not reverse))
            for start in range(0, time if pixels else 0, size):
                chunk = frames[start : start + size]
                dgates = steps.run(chunk, buffers[start // size % 2])
                grads.add(dgates, min(chunk), max(chunk))
            dh0 = steps.dh0() if needs[5] else None
            found = (grads.dx, *grads.of_weights(), *steps.sums(), dh0)
            return (
                *(w_hh.new_empty(0) if grad is None else grad for grad in found),
                steps.dc.to(c0.dtype) if needs[6] else steps.dc.new_empty(0),
            )

        return run(_best_tile("conv_lstm_backward", w_ih, w_hh, pixels, "fast" if gates.numel() else "lean", run))
