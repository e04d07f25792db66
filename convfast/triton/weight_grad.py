"""Weight gradient of a convolution over a whole sequence.

dW[n, c, ky, kx] = Σ grad[b, t, y, x, n] · source[b, t, y·stride + ky·dilation - padding, .., c]: a GEMM of few rows and
columns and a long inner axis, the pixels of all frames. A program owns BN rows n × BK columns (tap, channel) of one of
`splits` partial sums and reads the pixels of its share of blocks; a block lies within one frame, so that only its pixel
offsets are vectors. torch adds up the partial sums, in a fixed order. Floor: 2 · pixels · N · C · taps FLOPs on the
tensor cores; programs of one share run side by side, so that `grad` and `source` come from L2 for all but one of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import runtime, tune


@triton.jit
def _quotient(n, magic, shift):
    """n // d of 0 <= n < 2³¹, for (magic, shift) = `_reciprocal(d)`: a division takes some twenty instructions."""
    return (tl.umulhi(n.to(tl.uint32) * 2, magic.to(tl.uint32)) >> shift).to(tl.int32)


def _reciprocal(d: int) -> tuple[int, int]:
    """Granlund & Montgomery 1994, "Division by invariant integers using multiplication": magic d is in
    (2^(31 + shift), 2^(31 + shift) + 2^shift], so that n magic / 2^(31 + shift) is n / d, and less than 1 / d more."""
    shift = (d - 1).bit_length()
    return (1 << (31 + shift)) // d + 1, shift


@triton.jit(
    do_not_specialize=(
        "time", "height", "width", "magic", "shift", "grad_b", "grad_t", "source_b", "source_t", "source_height",
        "source_width", "blocks", "share",
    )
)  # fmt: skip
def _partial_sums(
    grad, source, sums, time, height, width, magic, shift, grad_b, grad_t, grad_y, grad_x, source_height, source_width,
    source_b, source_t, source_y, source_x, blocks, share,
    N: tl.constexpr, C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr, DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr, GRAD_UNIT: tl.constexpr, SOURCE_UNIT: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PIXELS: tl.constexpr,
):
    """Program (columns and rows, split) writes sums[split, its rows, its columns]; it reads nothing that is written.
    Strides over batch and time count in units (`outer_unit`)."""
    K: tl.constexpr = KH * KW * C
    COLUMN_BLOCKS: tl.constexpr = (K + BK - 1) // BK
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile // COLUMN_BLOCKS * BN + tl.arange(0, BN)
    k0 = tile % COLUMN_BLOCKS * BK
    if C % BK == 0:
        # One tap: whether its source lies within the frame is a matter of the pixel alone.
        tap = k0 // C
        channel = k0 % C + tl.arange(0, BK)
    else:
        k = k0 + tl.arange(0, BK)
        tap = (k // C)[None, :]
        channel = k % C
    dy = tap // KW * DILATION_Y - PAD_Y
    dx = tap % KW * DILATION_X - PAD_X
    pixels = height * width
    blocks_per_frame = (pixels + PIXELS - 1) // PIXELS

    acc = tl.zeros([BN, BK], tl.float32)
    for block in range(split * share, tl.minimum((split + 1) * share, blocks)):
        frame = block // blocks_per_frame
        b = (frame // time).to(tl.int64)
        t = (frame % time).to(tl.int64)
        p = block % blocks_per_frame * PIXELS + tl.arange(0, PIXELS)
        y = _quotient(p, magic, shift)
        x = p - y * width
        if WIDE:
            y = y.to(tl.int64)
            x = x.to(tl.int64)
        inside = (p < pixels)[:, None]
        g = tl.load(
            grad + (b * grad_b + t * grad_t) * GRAD_UNIT + (y * grad_y + x * grad_x)[:, None] + n[None, :],
            mask=inside & (n < N)[None, :],
            other=0.0,
        )
        y = (y * STRIDE_Y)[:, None] + dy
        x = (x * STRIDE_X)[:, None] + dx
        inside = inside & (y >= 0) & (y < source_height) & (x >= 0) & (x < source_width)
        if C % BK != 0:
            inside = inside & (k < K)[None, :]
        s = tl.load(
            source + (b * source_b + t * source_t) * SOURCE_UNIT + (y * source_y + x * source_x) + channel[None, :],
            mask=inside,
            other=0.0,
        )
        acc = tl.dot(tl.trans(g), s, acc, input_precision=PRECISION)

    column = k0 + tl.arange(0, BK)
    offset = split.to(tl.int64) * (N * K) + n[:, None] * K + column[None, :]
    tl.store(sums + offset, acc, mask=(n < N)[:, None] & (column < K)[None, :])


class Tile(NamedTuple):
    rows: int
    columns: int
    pixels: int
    warps: int
    stages: int


def candidates(rows: int, channels: int, taps: int, dtype: torch.dtype, chip: runtime.Chip) -> list[Tile]:
    """Tile sizes for rows × (tap, channel), best first: the largest that the sizes fill and that shared memory and
    registers hold; channels that cannot be read 16 bytes at a time pass through registers."""
    wide = dtype.itemsize == 4
    narrow = wide or chip.backend == "hip" or (channels > 1 and channels % 8 != 0)
    pixels, stages = (32, 2) if chip.backend == "hip" else (32, 3) if wide else (64, 3)
    found = []
    # On sm_90 and sm_100 products outrun L2, of which a tile of more rows reads less; its sums are 128 registers.
    if not narrow and 90 <= chip.arch < 120 and min(rows // 2, taps * channels) >= 128:
        found.append(Tile(256, 128, pixels, 8, stages))
    for most in (64, 32) if narrow else (128, 64):
        tile_rows, tile_columns = (min(most, max(16, triton.next_power_of_2(n))) for n in (rows, taps * channels))
        # From sm_100 on sums lie in tensor memory, in 128 rows, and pass through the registers of all warps at the end.
        wide_tile = tile_rows == 128 and (tile_columns == 128 or chip.arch >= 100)
        tile = Tile(tile_rows, tile_columns, pixels, 8 if wide_tile else 4, stages)
        if tile not in found:
            found.append(tile)
    return found


def outer_unit(x: Tensor) -> int:
    """What strides over batch and time [B, T, .., C] are multiples of. They change from call to call and are not
    specialized, so a kernel has to be told that rows are aligned; it is compiled for few values."""
    return 16 if x.shape[-1] % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(1) % 16 == 0 else 1


def weight_grad(
    grad: Tensor,
    source: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    time_shift: int = 0,
) -> Tensor:
    """grad [B, T, H', W', N], source [B, T, H, W, C], any strides but 1 on the last dim → float32 [N, C, *kernel].

    `padding` is what lies before each dim; past a frame the source is zero, however far. Frame t of grad meets frame
    t + time_shift of source, or nothing where there is none.
    """
    if time_shift:
        size = max(grad.shape[1] - abs(time_shift), 0)
        grad = grad.narrow(1, min(max(-time_shift, 0), grad.shape[1]), size)
        source = source.narrow(1, min(max(time_shift, 0), source.shape[1]), size)
    rows, channels = grad.shape[4], source.shape[4]
    taps = kernel[0] * kernel[1]
    if grad.numel() == 0:
        return grad.new_zeros((rows, channels, *kernel), dtype=torch.float32)
    if grad.shape[2] == grad.shape[3] == source.shape[2] == source.shape[3] == 1:
        # Frames of one pixel, as an LSTM has: samples or steps take its place, or blocks would be empty but for it.
        longer = 0 if grad.shape[0] > grad.shape[1] else 1
        if tuple(kernel) == (1, 1) and tuple(padding) == (0, 0):
            grad, source = grad.transpose(longer, 3), source.transpose(longer, 3)
    batch, time, height, width, _ = grad.shape

    chip = runtime.chip(grad)
    precision = runtime.input_precision(grad.dtype)
    grad_unit, source_unit = outer_unit(grad), outer_unit(source)
    grad_b, grad_t = (n // grad_unit for n in grad.stride()[:2])
    source_b, source_t = (n // source_unit for n in source.stride()[:2])
    wide = runtime.needs_wide_offsets(grad[0, 0], source[0, 0])

    def sums(tile: Tile) -> Tensor:
        blocks = batch * time * triton.cdiv(height * width, tile.pixels)
        tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(taps * channels, tile.columns)
        resident = chip.processors * (1 if tile.rows > 128 else 2)
        share = triton.cdiv(blocks, min(blocks, max(1, resident // tiles)))
        splits = triton.cdiv(blocks, share)
        partial = grad.new_empty((splits, rows, taps, channels), dtype=torch.float32)
        _partial_sums[(tiles, splits)](
            grad, source, partial, time, height, width, *_reciprocal(width), grad_b, grad_t, *grad.stride()[2:4],
            *source.shape[2:4], source_b, source_t, *source.stride()[2:4], blocks, share,
            rows, channels, *kernel, *stride, *padding, *dilation,
            GRAD_UNIT=grad_unit, SOURCE_UNIT=source_unit, WIDE=wide, PRECISION=precision,
            BN=tile.rows, BK=tile.columns, PIXELS=tile.pixels,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
        return partial.sum(0)

    key = (rows, channels, *kernel, *stride, *dilation, grad.dtype, precision)
    with runtime.on_device_of(grad):
        tile = tune.best("weight_grad", key, grad, candidates(rows, channels, taps, grad.dtype, chip), sums)
        total = sums(tile)
    return total.transpose(1, 2).reshape(rows, channels, *kernel)
