"""The pointwise LSTM cell, one pass over memory.

Both layouts are rows [R, 4, W] of gates beside rows [R, W] of everything else: channels-first has a row a sample,
W = C S, channels-last a row a pixel, W = C. The peephole, brought to the same order, is [3, F, W], F rows a sample.
A program owns a tile of ROWS x COLS elements, all four gates of it, and alone writes what belongs to them. It reads
nothing that another program writes.
Floor: bytes. For 16-bit gates and float32 c an element takes 18 bytes forward (26 if saved) and 34 backward.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.checks import empty_in_layout_of, is_channels_last
from ..reference.lstm_gates import state_dtype
from . import runtime
from .cell import cell_backward, cell_forward

_TILE = 1024
# Programs that fill a GPU; the sum over the batch is split to have as many.
_PROGRAMS = 1024


@triton.jit
def _tile(width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """First row (64 bits, and so are products with it) and column of the tile; rows and columns counted from there."""
    tile, across = tl.program_id(0), tl.cdiv(width, COLS)
    first_row = (tile // across).to(tl.int64) * ROWS
    return first_row, (tile % across) * COLS, tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]


@triton.jit
def _load_gates(gates, at, width, inside):
    """The four planes of a tile, float32."""
    i = tl.load(gates + at, inside).to(tl.float32)
    f = tl.load(gates + width + at, inside).to(tl.float32)
    g = tl.load(gates + width + width + at, inside).to(tl.float32)
    o = tl.load(gates + width + width + width + at, inside).to(tl.float32)
    return i, f, g, o


@triton.jit
def _store_gates(gates, at, width, inside, i, f, g, o):
    tl.store(gates + at, i, inside)
    tl.store(gates + width + at, f, inside)
    tl.store(gates + width + width + at, g, inside)
    tl.store(gates + width + width + width + at, o, inside)


@triton.jit
def _load_peephole(peephole, at, frame, width, inside):
    plane = tl.cast(frame, tl.int64) * width
    p_i = tl.load(peephole + at, inside).to(tl.float32)
    p_f = tl.load(peephole + plane + at, inside).to(tl.float32)
    p_o = tl.load(peephole + plane + plane + at, inside).to(tl.float32)
    return p_i, p_f, p_o


@triton.jit
def _within_frame(first_row, row, frame):
    """Of rows of many samples."""
    return ((first_row % frame).to(tl.int32) + row) % frame


@triton.jit(do_not_specialize=["rows", "frame"])
def _forward(
    gates, c, peephole, h, c_out, activated, rows, frame, width,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Reads gates, c and peephole of its tile; writes h, c_out and activated of it."""
    first_row, first_col, row, col = _tile(width, ROWS, COLS)
    inside = (first_row + row < rows) & (first_col + col < width)
    first = first_row * width + first_col
    first_of_gates = first_row * width * 4 + first_col
    at, at_gates = row * width + col, row * width * 4 + col
    i, f, g, o = _load_gates(gates + first_of_gates, at_gates, width, inside)
    c_in, p_i, p_f, p_o = 0.0, 0.0, 0.0, 0.0
    if c is not None:
        c_in = tl.load(c + first + at, inside).to(tl.float32)
    if peephole is not None:
        at_peephole = _within_frame(first_row, row, frame) * width + col
        p_i, p_f, p_o = _load_peephole(peephole + first_col, at_peephole, frame, width, inside)
    i, f, g, o, c_next, h_next = cell_forward(i, f, g, o, c_in, p_i, p_f, p_o, peephole is not None)
    tl.store(h + first + at, h_next, inside)
    tl.store(c_out + first + at, c_next, inside)
    if activated is not None:
        _store_gates(activated + first_of_gates, at_gates, width, inside, i, f, g, o)


@triton.jit(do_not_specialize=["rows", "frame", "batch", "chunk"])
def _backward(
    activated, c, c_out, peephole, dh, dc_out, dgates, dc, sums, rows, frame, batch, chunk, width,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Reads all but the last three of its tile; writes dgates and dc of it. Its tile lies in the first `rows` rows, and
    so many rows on for each of the `chunk` samples that it takes: sums [chunks, 3, rows, W] gets its sums over them."""
    first_row, first_col, row, col = _tile(width, ROWS, COLS)
    inside = (first_row + row < rows) & (first_col + col < width)
    at, at_gates = row * width + col, row * width * 4 + col
    p_i, p_f, p_o = 0.0, 0.0, 0.0
    if peephole is not None:
        at_peephole = _within_frame(first_row, row, frame) * width + col if sums is None else first_row * width + at
        p_i, p_f, p_o = _load_peephole(peephole + first_col, at_peephole, frame, width, inside)
    sum_i = tl.zeros((ROWS, COLS), tl.float32)
    sum_f = tl.zeros((ROWS, COLS), tl.float32)
    sum_o = tl.zeros((ROWS, COLS), tl.float32)
    sample = tl.program_id(1) * chunk
    line = first_row + sample.to(tl.int64) * rows
    for _ in range(sample, tl.minimum(sample + chunk, batch)):
        first = line * width + first_col
        first_of_gates = line * width * 4 + first_col
        i, f, g, o = _load_gates(activated + first_of_gates, at_gates, width, inside)
        c_next = tl.load(c_out + first + at, inside)
        c_in, dh_in, dc_in = 0.0, 0.0, 0.0
        if c is not None:
            c_in = tl.load(c + first + at, inside).to(tl.float32)
        if dh is not None:
            dh_in = tl.load(dh + first + at, inside).to(tl.float32)
        if dc_out is not None:
            dc_in = tl.load(dc_out + first + at, inside).to(tl.float32)
        di, df, dg, do, dc_before = cell_backward(
            i, f, g, o, c_in, c_next, dh_in, dc_in, p_i, p_f, p_o, peephole is not None
        )
        if dgates is not None:
            _store_gates(dgates + first_of_gates, at_gates, width, inside, di, df, dg, do)
        if dc is not None:
            tl.store(dc + first + at, dc_before, inside)
        if sums is not None:
            sum_i += di * c_in
            sum_f += df * c_in
            sum_o += do * c_next
        line += rows
    if sums is not None:
        plane = tl.cast(rows, tl.int64) * width
        sums += tl.program_id(1) * 3 * plane + first_row * width + first_col
        tl.store(sums + at, sum_i, inside)
        tl.store(sums + plane + at, sum_f, inside)
        tl.store(sums + plane + plane + at, sum_o, inside)


def _tiling(rows: int, width: int, most: int = _TILE) -> tuple[int, dict[str, int]]:
    """→ how many tiles, and how they are launched; no tile has more rows than the power of two from `most` on.

    Columns that divide a narrow row leave no lane idle. Eight elements a thread are 16 bytes of a 16-bit operand; where
    rows are not aligned, each of them needs registers for its address.
    """
    cols = width & -width
    if cols < 32 or width > _TILE:
        cols = min(_TILE, triton.next_power_of_2(width))
    height = min(_TILE // cols, triton.next_power_of_2(most))
    launch = {"ROWS": height, "COLS": cols, "num_warps": 8 if width % 16 else 4, "num_stages": 1}
    return triton.cdiv(rows, height) * triton.cdiv(width, cols), launch


def _in_rows(t: Tensor | None, channels_last: bool) -> Tensor | None:
    """Contiguous in the kernels' order; a copy only where it is not yet."""
    if t is None:
        return None
    return t.movedim(1, -1).contiguous() if channels_last else t.contiguous()


def lstm_gates_forward(
    gates: Tensor,
    c: Tensor | None,
    peephole: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    last = is_channels_last(gates)
    batch, channels, *space = gates.shape
    channels //= 4
    shape, pixels = (batch, channels, *space), torch.Size(space).numel()
    h = empty_in_layout_of(gates, shape, gates.dtype)
    c_out = empty_in_layout_of(gates, shape, state_dtype(gates.dtype))
    activated = empty_in_layout_of(gates, gates.shape, gates.dtype) if save else None
    frame, width = (pixels, channels) if last else (1, channels * pixels)
    rows = batch * frame
    if h.numel() > 0:
        gates, c, peephole = (_in_rows(t, last) for t in (gates, c, peephole))
        tiles, launch = _tiling(rows, width)
        with runtime.on_device_of(gates):
            _forward[tiles,](
                gates, c, peephole, h, c_out, activated, rows, frame, width, **launch, enable_fp_fusion=True
            )
    return h, c_out, gates.new_empty(0) if activated is None else activated


def lstm_gates_backward(
    activated: Tensor,
    c: Tensor | None,
    c_out: Tensor,
    peephole: Tensor | None,
    dh: Tensor | None,
    dc_out: Tensor | None,
    needs: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    last = is_channels_last(activated)
    batch, channels, *space = c_out.shape
    pixels = torch.Size(space).numel()
    frame, width = (pixels, channels) if last else (1, channels * pixels)
    dtype = activated.dtype
    dgates = empty_in_layout_of(activated, activated.shape, dtype) if needs[0] else None
    dc = empty_in_layout_of(activated, c_out.shape, c_out.dtype) if needs[1] else None
    dpeephole = peephole.new_zeros(peephole.shape) if needs[2] else activated.new_empty(0, dtype=dtype)
    if c_out.numel() > 0:
        operands = [_in_rows(t, last) for t in (activated, c, c_out, peephole, dh, dc_out)]
        # Sums over the batch need a program to see a pixel of many samples; else a batch is rows like others.
        rows, samples = (frame, batch) if needs[2] else (batch * frame, 1)
        tiles, launch = _tiling(rows, width, frame if needs[2] else _TILE)
        chunk = triton.cdiv(samples, max(1, _PROGRAMS // tiles))
        chunks = triton.cdiv(samples, chunk)
        sums = c_out.new_empty((chunks, 3, rows, width)) if needs[2] else None
        with runtime.on_device_of(activated):
            _backward[tiles, chunks](
                *operands, dgates, dc, sums, rows, frame, samples, chunk, width, **launch, enable_fp_fusion=True
            )
        if sums is not None:
            total = sums.sum(0).view(3, *((*space, channels) if last else (channels, *space)))
            dpeephole.copy_(total.movedim(-1, 1) if last else total)
    return (
        activated.new_empty(0, dtype=dtype) if dgates is None else dgates,
        c_out.new_empty(0) if dc is None else dc,
        dpeephole,
    )
