"""One LSTM layer in one or both directions: the input product by the library for all steps at once, then one persistent
kernel for the recurrence. Where W_hh does not fit on chip: cuDNN, else a loop over the steps.

Letters as in csrc/ops.h; H and P are HIDDEN and SIZE rounded up to powers of two in the kernels. Saved c and gates lie
in memory as [D, T, B, ·]; everything in the kernels is transposed ([4H, BM]), so that a gate is a run of rows of W_hh.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..ops.checks import empty_sequence
from ..reference.lstm import one_of
from ..reference.lstm_gates import peephole_backward
from ..reference.sequence import active_frames, keep, order, ordered
from . import runtime, tune
from .cell import cell_backward, cell_forward
from .lstm_gates import lstm_gates_backward, lstm_gates_forward
from .weight_grad import weight_grad

# Registers a thread on NVIDIA.
REGISTERS = {"_recurrence_forward": 248, "_recurrence_backward": 253}
_SCRATCH = 24 * 1024  # bytes of shared memory beside the weights, at least: h, and tiles on the way to another layout
_CUDNN_LSTM = 2  # of cudnnRNNMode_t

# Compiled once whatever their values.
_SIZES = ["batch", "time", "gates_row_t", "gates_row_b", "y_row_t", "y_row_b"]


@triton.jit
def _split_gates(gates, H: tl.constexpr, BM: tl.constexpr):
    """[4H, BM] → i, f, g, o, [H, BM] each; stays within a thread's registers."""
    first, second = gates.reshape(2, 2, H, BM).permute(2, 3, 1, 0).split()
    i, f = first.split()
    g, o = second.split()
    return i, f, g, o


@triton.jit
def _join_gates(i, f, g, o, H: tl.constexpr, BM: tl.constexpr):
    """The inverse of `_split_gates`."""
    return tl.join(tl.join(i, f), tl.join(g, o)).permute(3, 2, 0, 1).reshape(4 * H, BM)


@triton.jit
def _of_direction(first, reverse):
    """This program's pointer of the two; `reverse` may be None, `first` not."""
    if reverse is None:
        return first
    else:
        return tl.where(tl.program_id(1) == 0, first, reverse)


@triton.jit
def _load_peepholes(first, reverse, HIDDEN: tl.constexpr, H: tl.constexpr):
    """→ p_i, p_f, p_o of this program's direction, [H, 1] float32; zero without peepholes."""
    if first is None:
        return 0.0, 0.0, 0.0
    else:
        row = tl.arange(0, H)[:, None]
        peephole = _of_direction(first, reverse)
        p_i = tl.load(peephole + row, row < HIDDEN, 0.0).to(tl.float32)
        p_f = tl.load(peephole + HIDDEN + row, row < HIDDEN, 0.0).to(tl.float32)
        p_o = tl.load(peephole + 2 * HIDDEN + row, row < HIDDEN, 0.0).to(tl.float32)
        return p_i, p_f, p_o


@triton.jit
def _tile(sample, in_batch, row_b, ROWS: tl.constexpr, WIDTH: tl.constexpr, LD: tl.constexpr, PARTS: tl.constexpr):
    """Offsets and mask [PARTS * ROWS, BM] of the tile's samples in one frame whose memory rows, LD apart, hold PARTS
    runs of WIDTH elements; a run takes ROWS rows of the tile."""
    row = tl.arange(0, PARTS * ROWS)[:, None]
    offset = row // ROWS * WIDTH + row % ROWS + (sample * row_b * LD)[None, :]
    if WIDTH == ROWS:
        return offset, in_batch[None, :]
    else:
        return offset, (row % ROWS < WIDTH) & in_batch[None, :]


@triton.jit
def _load_weight(
    w, ROWS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr
):
    """PARTS matrices [WIDTH, COLUMNS] as [PARTS * ROWS, K], zero where they do not reach."""
    row = tl.arange(0, PARTS * ROWS)[:, None]
    column = tl.arange(0, K)[None, :]
    mask = (row % ROWS < WIDTH) & (column < COLUMNS)
    return tl.load(w + (row // ROWS * WIDTH + row % ROWS) * COLUMNS + column, mask, 0.0)


@triton.jit
def _row(t, direction, batch, time, first_sample):
    """Which row of what is saved, [D, T, B, ·], is the program's first at step t, or at the nearest that there is."""
    t = tl.minimum(tl.maximum(t, 0), time - 1)
    return (direction * time + t).to(tl.int64) * batch + first_sample


@triton.jit(do_not_specialize=_SIZES)
def _recurrence_forward(
    gates_x, w_hh, peephole, w_hr, w_hh_r, peephole_r, w_hr_r, h0, c0, lengths,
    y, h_n, c_n, c_saved, gates_saved,
    batch, time, gates_row_t, gates_row_b, y_row_t, y_row_b,
    HIDDEN: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, H: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (m, d) runs all steps of samples m BM ... of direction d and alone writes their y, h_n, c_n and what is
    saved; it reads nothing that another program writes. A step follows the one before in the program itself: h and c
    stay in registers. W_hh is loaded once and stays in shared memory; the gates_x of a step are loaded during the one
    before.

    Floor: T times the latency of a step (W_hh once through shared memory, a barrier, the cell), not bytes or FLOPs.
    """
    direction = tl.program_id(1)
    A = w_hh.dtype.element_ty
    sample = tl.arange(0, BM)
    first_sample = tl.program_id(0) * BM
    in_batch = first_sample + sample < batch
    if WIDE:
        sample = sample.to(tl.int64)
    gates_offset, gates_mask = _tile(sample, in_batch, gates_row_b, H, HIDDEN, D * 4 * HIDDEN, 4)
    y_offset, y_mask = _tile(sample, in_batch, y_row_b, P, SIZE, D * SIZE, 1)
    h_offset, h_mask = _tile(sample, in_batch, 1, P, SIZE, SIZE, 1)
    c_offset, c_mask = _tile(sample, in_batch, 1, H, HIDDEN, HIDDEN, 1)
    saved_offset, saved_mask = _tile(sample, in_batch, 1, H, HIDDEN, 4 * HIDDEN, 4)
    gates_x += first_sample.to(tl.int64) * gates_row_b * (D * 4 * HIDDEN) + direction * 4 * HIDDEN
    y += first_sample.to(tl.int64) * y_row_b * (D * SIZE) + direction * SIZE
    state_row = direction.to(tl.int64) * batch + first_sample

    w = _load_weight(_of_direction(w_hh, w_hh_r), H, HIDDEN, 4, P, SIZE)
    p_i, p_f, p_o = _load_peepholes(peephole, peephole_r, HIDDEN, H)
    if w_hr is not None:
        project = _load_weight(_of_direction(w_hr, w_hr_r), P, SIZE, 1, H, HIDDEN)
    if lengths is not None:
        length = tl.load(lengths + first_sample + sample, in_batch, 0)[None, :]
    h = tl.zeros((P, BM), A)
    if h0 is not None:
        h = tl.load(h0 + state_row * SIZE + h_offset, h_mask, 0.0)
    c = tl.zeros((H, BM), tl.float32)
    if c0 is not None:
        c = tl.load(c0 + state_row * HIDDEN + c_offset, c_mask, 0.0).to(tl.float32)

    t = direction * (time - 1)
    gates_next = tl.load(gates_x + t.to(tl.int64) * gates_row_t * (D * 4 * HIDDEN) + gates_offset, gates_mask, 0.0)
    for _ in range(time):
        gates_now = gates_next
        # Past the last step its own gates are read again.
        t_next = tl.minimum(tl.maximum(t + 1 - 2 * direction, 0), time - 1).to(tl.int64)
        gates_next = tl.load(gates_x + t_next * gates_row_t * (D * 4 * HIDDEN) + gates_offset, gates_mask, 0.0)

        # Before the product: its barrier is that of h too.
        i_x, f_x, g_x, o_x = _split_gates(gates_now, H, BM)
        i, f, g, o = _split_gates(tl.dot(w, h, input_precision=PRECISION), H, BM)
        i, f, g, o, c_new, hidden = cell_forward(
            i + i_x, f + f_x, g + g_x, o + o_x, c, p_i, p_f, p_o, peephole is not None
        )
        h_new = hidden.to(A)
        if w_hr is not None:
            h_new = tl.dot(project, h_new, input_precision=PRECISION).to(A)
        y_t = y + t.to(tl.int64) * y_row_t * (D * SIZE)
        if lengths is None:
            h, c = h_new, c_new
            tl.store(y_t + y_offset, h, y_mask)
        else:
            active = t < length
            h, c = tl.where(active, h_new, h), tl.where(active, c_new, c)
            tl.store(y_t + y_offset, tl.where(active, h_new, 0.0), y_mask)
        if c_saved is not None:
            saved_row = _row(t, direction, batch, time, first_sample)
            tl.store(c_saved + saved_row * HIDDEN + c_offset, c, c_mask)
            gates = _join_gates(i.to(A), f.to(A), g.to(A), o.to(A), H, BM)
            tl.store(gates_saved + saved_row * (4 * HIDDEN) + saved_offset, gates, saved_mask)
        t += 1 - 2 * direction
    tl.store(h_n + state_row * SIZE + h_offset, h, h_mask)
    tl.store(c_n + state_row * HIDDEN + c_offset, c, c_mask)


@triton.jit(do_not_specialize=_SIZES)
def _recurrence_backward(
    dy, dh_n, dc_n, w_hh, peephole, w_hr, w_hh_r, peephole_r, w_hr_r, c0, lengths, c_saved, gates_saved,
    dgates, dh_saved, dh0, dc0,
    batch, time, gates_row_t, gates_row_b, y_row_t, y_row_b,
    HIDDEN: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, H: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (m, d) walks the steps of samples m BM ... of direction d from the last to the first and alone writes
    their dgates, dh_saved (gradient of h at each step, for that of w_hr), dh0 and dc0; it reads nothing that another
    program writes. dh and dc of the step after stay in registers, W_hh in shared memory; what a step reads from memory
    is loaded during the one before.

    Floor: as the forward, T times the latency of a step.
    """
    direction = tl.program_id(1)
    A = w_hh.dtype.element_ty
    sample = tl.arange(0, BM)
    first_sample = tl.program_id(0) * BM
    in_batch = first_sample + sample < batch
    if WIDE:
        sample = sample.to(tl.int64)
    gates_offset, gates_mask = _tile(sample, in_batch, gates_row_b, H, HIDDEN, D * 4 * HIDDEN, 4)
    y_offset, y_mask = _tile(sample, in_batch, y_row_b, P, SIZE, D * SIZE, 1)
    h_offset, h_mask = _tile(sample, in_batch, 1, P, SIZE, SIZE, 1)
    c_offset, c_mask = _tile(sample, in_batch, 1, H, HIDDEN, HIDDEN, 1)
    saved_offset, saved_mask = _tile(sample, in_batch, 1, H, HIDDEN, 4 * HIDDEN, 4)
    dgates += first_sample.to(tl.int64) * gates_row_b * (D * 4 * HIDDEN) + direction * 4 * HIDDEN
    if dy is not None:
        dy += first_sample.to(tl.int64) * y_row_b * (D * SIZE) + direction * SIZE
    state_row = direction.to(tl.int64) * batch + first_sample

    # Transposed here: where the loop did it, Triton for sm_100 would write W_hh to shared memory at every step.
    w = tl.trans(_load_weight(_of_direction(w_hh, w_hh_r), H, HIDDEN, 4, P, SIZE))
    p_i, p_f, p_o = _load_peepholes(peephole, peephole_r, HIDDEN, H)
    if w_hr is not None:
        project = tl.trans(_load_weight(_of_direction(w_hr, w_hr_r), P, SIZE, 1, H, HIDDEN))
    if lengths is not None:
        length = tl.load(lengths + first_sample + sample, in_batch, 0)[None, :]
    dh = tl.zeros((P, BM), tl.float32)
    if dh_n is not None:
        dh = tl.load(dh_n + state_row * SIZE + h_offset, h_mask, 0.0).to(tl.float32)
    dc = tl.zeros((H, BM), tl.float32)
    if dc_n is not None:
        dc = tl.load(dc_n + state_row * HIDDEN + c_offset, c_mask, 0.0)

    c_first = tl.zeros((H, BM), tl.float32)
    if c0 is not None:
        c_first = tl.load(c0 + state_row * HIDDEN + c_offset, c_mask, 0.0).to(tl.float32)

    back = 2 * direction - 1
    t = (1 - direction) * (time - 1)
    row = _row(t, direction, batch, time, first_sample)
    c_now = tl.load(c_saved + row * HIDDEN + c_offset, c_mask, 0.0)
    gates_next = tl.load(gates_saved + row * (4 * HIDDEN) + saved_offset, saved_mask, 0.0)
    row = _row(t + back, direction, batch, time, first_sample)
    c_next = tl.load(c_saved + row * HIDDEN + c_offset, c_mask, 0.0)
    if dy is not None:
        dy_next = tl.load(dy + t.to(tl.int64) * y_row_t * (D * SIZE) + y_offset, y_mask, 0.0)
    for _ in range(time):
        gates_now = gates_next
        c_before = tl.where((t + back >= 0) & (t + back < time), c_next, c_first)
        if dy is not None:
            dh += dy_next.to(tl.float32) if lengths is None else tl.where(t < length, dy_next.to(tl.float32), 0.0)
        # Past the first step the loads for the step before it read the first once more.
        row = _row(t + back, direction, batch, time, first_sample)
        gates_next = tl.load(gates_saved + row * (4 * HIDDEN) + saved_offset, saved_mask, 0.0)
        row = _row(t + 2 * back, direction, batch, time, first_sample)
        c_next = tl.load(c_saved + row * HIDDEN + c_offset, c_mask, 0.0)
        if dy is not None:
            t_next = tl.minimum(tl.maximum(t + back, 0), time - 1).to(tl.int64)
            dy_next = tl.load(dy + t_next * y_row_t * (D * SIZE) + y_offset, y_mask, 0.0)

        dhidden = dh
        if w_hr is not None:
            dh_narrow = dh.to(A)
            if dh_saved is not None:
                saved_row = _row(t, direction, batch, time, first_sample)
                kept = dh_narrow if lengths is None else tl.where(t < length, dh_narrow, 0.0)
                tl.store(dh_saved + saved_row * SIZE + h_offset, kept, h_mask)
            dhidden = tl.dot(project, dh_narrow, input_precision=PRECISION)
        i, f, g, o = _split_gates(gates_now, H, BM)
        di, df, dg, do, dc_before = cell_backward(
            i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32), c_before, c_now, dhidden, dc,
            p_i, p_f, p_o, peephole is not None,
        )  # fmt: skip
        dgates_now = _join_gates(di.to(A), df.to(A), dg.to(A), do.to(A), H, BM)
        if lengths is not None:
            dgates_now = tl.where(t < length, dgates_now, 0.0)
        tl.store(dgates + t.to(tl.int64) * gates_row_t * (D * 4 * HIDDEN) + gates_offset, dgates_now, gates_mask)
        dh_before = tl.dot(w, dgates_now, input_precision=PRECISION)
        if lengths is None:
            dh, dc = dh_before, dc_before
        else:
            dh, dc = tl.where(t < length, dh_before, dh), tl.where(t < length, dc_before, dc)
        c_now = c_before
        t += back
    if dh0 is not None:
        tl.store(dh0 + state_row * SIZE + h_offset, dh, h_mask)
    if dc0 is not None:
        tl.store(dc0 + state_row * HIDDEN + c_offset, dc, c_mask)


class Weights(NamedTuple):
    """Of one direction."""

    w_ih: Tensor | None  # None where gates_x is given
    w_hh: Tensor
    bias: Tensor | None
    peephole: Tensor | None
    w_hr: Tensor | None


def fits(hidden: int, size: int, projected: bool, dtype: torch.dtype, precision: str, chip: runtime.Chip) -> bool:
    """Whether the persistent kernels can hold the weights of a recurrence: [4H, P], and [P, H] with a projection.

    Without one up to H = 128 for 16 bits and 64 for float32; 32 for float32 without TF32 on NVIDIA, whose weights then
    are in registers; with the 64 KiB of AMD 64 and 32. The widest with a projection are short of registers, and spill.
    """
    rows, columns = _padded(hidden), _padded(size)
    weights = 4 * rows * columns + (columns * rows if projected else 0)
    if _multiplies_in_registers(dtype, precision, chip):
        return weights <= 4 * 32 * 32
    # NVIDIA has the gradient of a step's gates there, twice.
    scratch = _SCRATCH
    if chip.backend == "cuda":
        scratch = max(scratch, 2 * 4 * rows * max(candidates(1, 1, dtype, chip)) * dtype.itemsize)
    return weights * dtype.itemsize + scratch <= chip.shared


def _multiplies_in_registers(dtype: torch.dtype, precision: str, chip: runtime.Chip) -> bool:
    """NVIDIA's tensor cores take no whole float32."""
    return dtype == torch.float32 and precision == "ieee" and chip.backend == "cuda"


def _padded(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def candidates(batch: int, directions: int, dtype: torch.dtype, chip: runtime.Chip) -> list[int]:
    """Samples a program, best first.

    As few as a tensor core takes: whatever their number, a step reads all of W_hh, and the cell is half of it. Twice as
    many, which fit into the registers of sm_90, where the GPU cannot run all programs at once. Triton 3.6 computes
    products of 8 columns without wgmma.
    """
    if chip.backend == "hip":
        return [16]
    if chip.arch != 90 or dtype.itemsize != 2:
        return [8]
    return [16, 8] if triton.cdiv(batch, 8) * directions > chip.processors else [8, 16]


def _launch(kernel: Any, arguments: tuple[Any, ...], w_hh: Tensor, batch: int, time: int, directions: int) -> None:
    """With 64 rows of a gate per four warps, so that a thread has all four gates of a cell."""
    chip, precision = runtime.chip(w_hh), runtime.input_precision(w_hh.dtype)
    hidden, size = w_hh.shape[0] // 4, w_hh.shape[1]
    rows, registers = _padded(hidden), _multiplies_in_registers(w_hh.dtype, precision, chip)

    def run(samples: int) -> None:
        kernel[(triton.cdiv(batch, samples), directions)](
            *arguments, HIDDEN=hidden, SIZE=size, D=directions, H=rows, P=_padded(size), BM=samples,
            WIDE=samples * time * directions * 4 * hidden >= 2**31, PRECISION=precision,
            num_warps=8 if rows >= (32 if registers else 128) else 4, num_stages=1, enable_fp_fusion=True,
            **runtime.most_registers(chip, REGISTERS[kernel.__name__]),
        )  # fmt: skip

    found = candidates(batch, directions, w_hh.dtype, chip)
    given = tuple(n for n, argument in enumerate(arguments) if isinstance(argument, Tensor))
    with runtime.on_device_of(w_hh):
        run(tune.best(kernel.__name__, (hidden, size, directions, w_hh.dtype, given, found[0]), w_hh, found, run))


def _row_strides(batch: int, time: int, time_major: bool) -> tuple[int, int]:
    """How many rows of memory lie between steps and between samples."""
    return (batch, 1) if time_major else (1, time)


def _is_time_major(x: Tensor) -> bool:
    return x.stride(0) < x.stride(1)


def _flat_rows(x: Tensor, time_major: bool) -> Tensor:
    """[B, T, ·] → [B T, ·], in the order of memory; a copy only where no single stride leads from row to row."""
    return (x.transpose(0, 1) if time_major else x).flatten(0, 1)


def _in_either_order(x: Tensor) -> Tensor:
    """x, [B, T, ·], with the memory of one of the two orders."""
    return x if x.is_contiguous() or x.transpose(0, 1).is_contiguous() else x.contiguous()


def _directions(*weights: Tensor | None) -> list[Weights]:
    both = [Weights(*weights[:5]), Weights(*weights[5:])]
    return both if both[1].w_hh is not None else both[:1]


def _input_gates(x: Tensor, directions: list[Weights]) -> Tensor:
    """W_ih x + b of both directions, [B, T, D 4H] in the order of x: one product."""
    w_ih, bias = directions[0].w_ih, directions[0].bias
    if len(directions) == 2:
        w_ih = torch.cat([weights.w_ih for weights in directions])
        bias = None if bias is None else torch.cat([weights.bias for weights in directions])
    time_major = _is_time_major(x)
    gates = F.linear(_flat_rows(x, time_major), w_ih, bias)
    if time_major:
        return gates.unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)
    return gates.unflatten(0, x.shape[:2])


def lstm_forward(
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
    directions = _directions(w_ih, w_hh, bias, peephole, w_hr, w_ih_r, w_hh_r, bias_r, peephole_r, w_hr_r)
    if not _on_chip(w_hh, w_hr) and _cudnn_takes(x, w_hh, peephole, w_hr, lengths):
        return _cudnn_forward(x, directions, h0, c0, time_major, save)
    return _recurrence(_input_gates(x, directions), directions, h0, c0, lengths, time_major, save)


def lstm_from_gates(
    gates_x: Tensor,
    w_hh: Tensor,
    peephole: Tensor | None,
    w_hr: Tensor | None,
    w_hh_r: Tensor | None,
    peephole_r: Tensor | None,
    w_hr_r: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    time_major: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lstm_forward` without saving, where W_ih x + b of both directions is there already: gates_x [B, T, D 4H], memory
    in the order of either [T, B, ·] or [B, T, ·]."""
    directions = _directions(None, w_hh, None, peephole, w_hr, None, w_hh_r, None, peephole_r, w_hr_r)
    return _recurrence(_in_either_order(gates_x), directions, h0, c0, lengths, time_major, False)[:3]


def _on_chip(w_hh: Tensor, w_hr: Tensor | None) -> bool:
    hidden, size, dtype = w_hh.shape[0] // 4, w_hh.shape[1], w_hh.dtype
    return fits(hidden, size, w_hr is not None, dtype, runtime.input_precision(dtype), runtime.chip(w_hh))


def _recurrence(
    gates_x: Tensor,
    directions: list[Weights],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    time_major: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    w_hh = directions[0].w_hh
    (batch, time, _), hidden, size, count = gates_x.shape, w_hh.shape[0] // 4, w_hh.shape[1], len(directions)
    y = empty_sequence(w_hh, (batch, time, count * size), time_major, w_hh.dtype)
    h_n = w_hh.new_empty((count, batch, size))
    c_n = w_hh.new_empty((count, batch, hidden), dtype=torch.float32)
    c = w_hh.new_empty((count, batch, time, hidden) if save else 0, dtype=torch.float32)
    gates = w_hh.new_empty((count, batch, time, 4 * hidden) if save else 0)
    outputs = y, h_n, c_n, c, gates
    if batch == 0:
        return outputs
    if not _on_chip(w_hh, directions[0].w_hr):
        active = active_frames(lengths, time, 0)
        for d, weights in enumerate(directions):
            _loop_forward(d, gates_x, weights, one_of(h0, d), one_of(c0, d), active, *outputs)
        return outputs
    first, reverse = directions[0], directions[-1] if count == 2 else Weights(None, None, None, None, None)
    operands = [
        None if t is None else t.contiguous()
        for t in (
            first.w_hh, first.peephole, first.w_hr, reverse.w_hh, reverse.peephole, reverse.w_hr, h0, c0, lengths
        )
    ]  # fmt: skip
    sizes = batch, time, *_row_strides(batch, time, _is_time_major(gates_x)), *_row_strides(batch, time, time_major)
    arguments = gates_x, *operands, y, h_n, c_n, c if save else None, gates if save else None, *sizes
    _launch(_recurrence_forward, arguments, w_hh, batch, time, count)
    return outputs


def _loop_forward(
    d: int,
    gates_x: Tensor,
    weights: Weights,
    h0: Tensor | None,
    c0: Tensor | None,
    active: Tensor | None,
    y: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    c_saved: Tensor,
    gates_saved: Tensor,
) -> None:
    """Direction d, for weights that do not fit: a product and the cell's kernel a step."""
    time, hidden, size = gates_x.shape[1], c_n.shape[2], h_n.shape[2]
    save = c_saved.numel() > 0
    gates_x = gates_x[..., d * 4 * hidden : (d + 1) * 4 * hidden]
    y = y[..., d * size : (d + 1) * size]
    if save:
        c_saved, gates_saved = _steps(c_saved)[d], _steps(gates_saved)[d]
    h = torch.zeros_like(h_n[d]) if h0 is None else h0
    c = torch.zeros_like(c_n[d]) if c0 is None else c0.float()
    for t in order(time, d == 1):
        gates = torch.addmm(gates_x[:, t], h, weights.w_hh.T)
        h_new, c_new, activated = lstm_gates_forward(gates, c, weights.peephole, save)
        if weights.w_hr is not None:
            h_new = h_new @ weights.w_hr.T
        if active is None:
            h, c, y[:, t] = h_new, c_new, h_new
        else:
            step = active[:, t]
            y[:, t] = keep(h_new, step)
            h, c = torch.where(step, h_new, h), torch.where(step, c_new, c)
        if save:
            c_saved[t], gates_saved[t] = c, activated
    h_n[d], c_n[d] = h, c


def _steps(saved: Tensor) -> Tensor:
    """What is saved, of shape [D, B, T, ·], as it lies in memory: [D, T, B, ·]."""
    return saved.view(saved.shape[0], saved.shape[2], saved.shape[1], saved.shape[3])


def lstm_backward(
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
    needs: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    directions = _directions(w_ih, w_hh, bias, peephole, w_hr, w_ih_r, w_hh_r, bias_r, peephole_r, w_hr_r)
    if not _on_chip(w_hh, w_hr) and _cudnn_takes(x, w_hh, peephole, w_hr, lengths):
        return _cudnn_backward(dy, dh_n, dc_n, x, directions, h0, c0, needs)
    (batch, time), hidden, size, count = x.shape[:2], w_hh.shape[0] // 4, w_hh.shape[1], len(directions)
    time_major = _is_time_major(x)
    dgates = empty_sequence(w_hh, (batch, time, count * 4 * hidden), time_major, w_hh.dtype)
    # The gradient of h at each step, which that of the projection is made of.
    dh = w_hh.new_empty((count, time, batch, size)) if needs[5] or needs[10] else None
    dh0 = w_hh.new_empty((count, batch, size) if needs[11] else 0)
    dc0 = w_hh.new_empty((count, batch, hidden) if needs[12] else 0, dtype=c0.dtype if needs[12] else torch.float32)
    active = active_frames(lengths, time, 0)
    saved = _steps(c), _steps(gates)
    if batch and _on_chip(w_hh, w_hr):
        first, reverse = directions[0], directions[-1] if count == 2 else Weights(None, None, None, None, None)
        dy = None if dy is None else _in_either_order(dy)
        operands = [
            None if t is None else t.contiguous()
            for t in (
                dh_n, dc_n, first.w_hh, first.peephole, first.w_hr, reverse.w_hh, reverse.peephole, reverse.w_hr, c0,
                lengths,
            )
        ]  # fmt: skip
        y_strides = (0, 0) if dy is None else _row_strides(batch, time, _is_time_major(dy))
        arguments = (
            dy, *operands, *saved, dgates, dh, dh0 if needs[11] else None, dc0 if needs[12] else None,
            batch, time, *_row_strides(batch, time, time_major), *y_strides,
        )  # fmt: skip
        _launch(_recurrence_backward, arguments, w_hh, batch, time, count)
    elif batch:
        for d, weights in enumerate(directions):
            dh0_d, dc0_d = _loop_backward(
                d, dy, one_of(dh_n, d), one_of(dc_n, d), weights, one_of(c0, d), active, *saved, dgates, dh
            )
            if needs[11]:
                dh0[d] = dh0_d
            if needs[12]:
                dc0[d] = dc0_d

    dx = w_hh.new_empty(0)
    if needs[0]:
        dx = torch.empty_like(x)
        w = w_ih if count == 1 else torch.cat([w_ih, w_ih_r])
        target, rows = dx.transpose(0, 1) if time_major else dx, _flat_rows(dgates, time_major)
        if target.is_contiguous():
            torch.mm(rows, w, out=target.view(len(rows), x.shape[2]))
        else:
            target.copy_((rows @ w).view(target.shape))
    dweights = []
    for d, weights in enumerate(directions):
        dweights += _weight_gradients(
            d, weights, x, time_major, dgates, y, dh, *saved, one_of(h0, d), one_of(c0, d), lengths, active,
            needs[1 + 5 * d : 6 + 5 * d],
        )  # fmt: skip
    dweights += [w_hh.new_empty(0) for _ in range(10 - len(dweights))]
    return dx, *dweights, dh0, dc0


def _loop_backward(
    d: int,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    weights: Weights,
    c0: Tensor | None,
    active: Tensor | None,
    c: Tensor,
    gates: Tensor,
    dgates: Tensor,
    dh_saved: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Direction d of dgates and dh_saved, for weights that do not fit → (dh0, dc0)."""
    _, time, batch, hidden = c.shape
    w_hh, size, reverse = weights.w_hh, weights.w_hh.shape[1], d == 1
    before = _before(c[d], c0, reverse)
    dgates = dgates[..., d * 4 * hidden : (d + 1) * 4 * hidden]
    dh = w_hh.new_zeros((batch, size)) if dh_n is None else dh_n
    dc = torch.zeros_like(c[d, 0]) if dc_n is None else dc_n
    for t in order(time, not reverse):
        step = None if active is None else active[:, t]
        if dy is not None:
            dh = dh + keep(dy[:, t, d * size : (d + 1) * size], step)
        if dh_saved is not None:
            dh_saved[d, t] = keep(dh, step)
        dhidden = dh if weights.w_hr is None else dh @ weights.w_hr
        dgates_t, dc_before, _ = lstm_gates_backward(
            gates[d, t], before[t], c[d, t], weights.peephole, dhidden, dc, [1, 1, 0]
        )
        dgates[:, t] = dgates_t = keep(dgates_t, step)
        dh_before = dgates_t @ w_hh
        dh = dh_before if step is None else torch.where(step, dh_before, dh)
        dc = dc_before if step is None else torch.where(step, dc_before, dc)
    return dh, dc


def _before(c: Tensor, c0: Tensor | None, reverse: bool) -> Tensor:
    """The cell state [T, B, H] that each step of a direction started from."""
    first = torch.zeros_like(c[:1]) if c0 is None else c0.float().unsqueeze(0)
    return torch.cat([c[1:], first] if reverse else [first, c[:-1]])


def _weight_gradients(
    d: int,
    weights: Weights,
    x: Tensor,
    time_major: bool,
    dgates: Tensor,
    y: Tensor,
    dh: Tensor | None,
    c: Tensor,
    gates: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    active: Tensor | None,
    needs: Sequence[int],
) -> list[Tensor]:
    """Of direction d, empty where not needed. Past a sample's length dgates and dh are zero, x and gates may be NaN."""
    w_hh = weights.w_hh
    hidden, size, reverse = w_hh.shape[0] // 4, w_hh.shape[1], d == 1
    dgates = dgates[..., d * 4 * hidden : (d + 1) * 4 * hidden]
    found = [w_hh.new_empty(0) for _ in range(5)]
    if needs[0]:
        found[0] = _flat_rows(dgates, time_major).T @ _flat_rows(keep(x, active), time_major)
    if needs[1]:
        h = y[..., d * size : (d + 1) * size]
        dw_hh = weight_grad(
            dgates[:, :, None, None], h[:, :, None, None], (1, 1), time_shift=1 if reverse else -1
        ).flatten(1)
        if h0 is not None:
            dgates_first = dgates[:, -1 if reverse else 0]
            if reverse and lengths is not None:
                dgates_first = dgates[torch.arange(len(lengths), device=lengths.device), (lengths - 1).clamp(min=0)]
            dw_hh += dgates_first.T.float() @ h0.float()
        found[1] = dw_hh.to(w_hh.dtype)
    if needs[2]:
        found[2] = dgates.sum((0, 1), dtype=torch.float32).to(w_hh.dtype)
    if needs[3]:
        before = _before(c[d], c0, reverse).flatten(0, 1)
        wide = dgates.transpose(0, 1).float().flatten(0, 1)
        found[3] = peephole_backward(wide, before, c[d].flatten(0, 1)).to(w_hh.dtype)
    if needs[4]:
        o = keep(gates[d, ..., 3 * hidden :], None if active is None else active.transpose(0, 1))
        projected = (o.float() * c[d].tanh()).to(w_hh.dtype)
        found[4] = dh[d].flatten(0, 1).T @ projected.flatten(0, 1)
    return found


def _cudnn_takes(
    x: Tensor, w_hh: Tensor, peephole: Tensor | None, w_hr: Tensor | None, lengths: Tensor | None
) -> bool:
    """Whether cuDNN computes this layer as we call it: it has no peepholes, projections only to fewer numbers, and
    lengths only for packed input."""
    return (
        w_hh.device.type == "cuda" and torch.version.hip is None and peephole is None and lengths is None
        and (w_hr is None or w_hr.shape[0] < w_hr.shape[1])
        and x.shape[0] > 0 and torch.cudnn_is_acceptable(w_hh)
    )  # fmt: skip


def _cudnn_run(
    x: Tensor, directions: list[Weights], h0: Tensor | None, c0: Tensor | None, train: bool
) -> tuple[tuple[Any, ...], Sequence[Tensor], tuple[Any, ...]]:
    """cuDNN's LSTM as nn.LSTM calls it, time first and its weights in one flat buffer → its operands, its results
    (output, h_n, c_n, what its backward needs) and its options. Not yet run on a GPU."""
    w_hh, bias, w_hr = directions[0].w_hh, directions[0].bias, directions[0].w_hr
    hidden, size, count = w_hh.shape[0] // 4, w_hh.shape[1], len(directions)
    names = ["w_ih", "w_hh", *(() if bias is None else ("bias", "bias")), *(() if w_hr is None else ("w_hr",))]
    # Packing points what it is given into the buffer, and of its two biases the second is zero.
    packed = [getattr(weights, name).clone() for weights in directions for name in names]
    if bias is not None:
        for d in range(count):
            packed[d * len(names) + 3].zero_()
    projected = 0 if w_hr is None else size
    buffer = torch._cudnn_rnn_flatten_weight(
        packed, len(names), x.shape[2], _CUDNN_LSTM, hidden, projected, 1, False, count == 2
    )
    h = w_hh.new_zeros((count, x.shape[0], size)) if h0 is None else h0.contiguous()
    c = w_hh.new_zeros((count, x.shape[0], hidden)) if c0 is None else c0.to(w_hh.dtype).contiguous()
    operands = x.transpose(0, 1), packed, len(names), buffer, h, c
    options = _CUDNN_LSTM, hidden, projected, 1, False, 0.0, train, count == 2, [], None
    return operands, torch._cudnn_rnn(*operands, *options)[:4], options


def _cudnn_forward(
    x: Tensor, directions: list[Weights], h0: Tensor | None, c0: Tensor | None, time_major: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The size of what cuDNN keeps is its own affair, so the backward runs it again. c is NaN, in case that a setting
    changed in between makes another path read it."""
    _, (output, h_n, c_n, _), _ = _cudnn_run(x, directions, h0, c0, False)
    shape = len(directions), *x.shape[:2], c_n.shape[2]
    return (
        ordered(output.transpose(0, 1), time_major),
        h_n,
        c_n.float(),
        c_n.new_full(shape if save else (0,), float("nan"), dtype=torch.float32),
        c_n.new_empty((*shape[:3], 4 * shape[3]) if save else 0),
    )


def _cudnn_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    directions: list[Weights],
    h0: Tensor | None,
    c0: Tensor | None,
    needs: Sequence[int],
) -> tuple[Tensor, ...]:
    operands, (output, _, _, reserve), options = _cudnn_run(x, directions, h0, c0, True)
    dx, dh0, dc0, packed = torch.ops.aten._cudnn_rnn_backward(
        *operands, output, None if dy is None else dy.transpose(0, 1), dh_n,
        None if dc_n is None else dc_n.to(output.dtype), *options, reserve, [True, True, True, any(needs[1:11])],
    )  # fmt: skip
    empty = output.new_empty
    found: list[Tensor] = [torch.empty_like(x).copy_(dx.transpose(0, 1)) if needs[0] else empty(0)]
    per_direction = operands[2]
    has_bias, has_projection = directions[0].bias is not None, directions[0].w_hr is not None
    for d in range(2):
        some = list(packed[d * per_direction : (d + 1) * per_direction])
        w_hr = some.pop() if some and has_projection else None
        of = some[:2] + (some[2:3] if has_bias else [None]) + [None, w_hr] if some else [None] * 5
        # They lie in one buffer, and results may not share memory.
        found += [of[n].clone() if needs[1 + 5 * d + n] else empty(0) for n in range(5)]
    dc0 = dc0.to(c0.dtype) if needs[12] else empty(0, dtype=torch.float32)
    return *found, dh0 if needs[11] else empty(0), dc0
