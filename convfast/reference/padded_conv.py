"""Convolution over 1 to 3 dims with any padding on either side, and its backward."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _split(padding: Sequence[int], mode: str) -> tuple[list[int], bool]:
    """Padding of (before, behind) pairs → (what the convolution itself pads, whether `_pad` has to)."""
    before, behind = list(padding[::2]), list(padding[1::2])
    by_conv = mode == "zeros" and before == behind
    return (before if by_conv else [0] * len(before)), not by_conv and any(padding)


def source(index: Tensor, last: int | Tensor, mode: str) -> Tensor:
    """Where each position of a padded axis reads; `last` is the last index there is, one for all or a tensor."""
    if mode == "circular":
        return index % (last + 1)
    if mode == "reflect":
        return last - (last - index.abs()).abs()
    return index.clamp(min=0).clamp(max=last)


def _source(size: int, before: int, behind: int, mode: str, device: torch.device) -> Tensor:
    return source(torch.arange(-before, size + behind, device=device), size - 1, mode)


def _pad(x: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    if mode == "zeros":
        pairs = [padding[2 * i : 2 * i + 2] for i in range(len(padding) // 2)]
        return F.pad(x, [p for pair in reversed(pairs) for p in pair])
    for axis in range(len(padding) // 2):
        before, behind = padding[2 * axis : 2 * axis + 2]
        if before or behind:
            x = x.index_select(2 + axis, _source(x.shape[2 + axis], before, behind, mode, x.device))
    return x


def _pad_backward(grad: Tensor, shape: Sequence[int], padding: Sequence[int], mode: str) -> Tensor:
    if mode == "zeros":
        return _pad(grad, [-p for p in padding], mode)
    for axis in range(len(padding) // 2):
        before, behind = padding[2 * axis : 2 * axis + 2]
        if before or behind:
            size = shape[2 + axis]
            target = grad.new_zeros([*grad.shape[: 2 + axis], size, *grad.shape[3 + axis :]])
            grad = target.index_add(2 + axis, _source(size, before, behind, mode, grad.device), grad)
    return grad


def same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """(before, behind) of each dim that keep the size at stride 1; an even kernel has its anchor at (k - 2) / 2."""
    totals = [d * (k - 1) for k, d in zip(kernel, dilation)]
    return [p for total in totals for p in (total // 2, total - total // 2)]


def output_length(
    length: int | Tensor, kernel: int, stride: int, padding: Sequence[int], dilation: int
) -> int | Tensor:
    """Positions of a kernel over `length` elements, below 1 where there are too few."""
    return (length + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mode: str,
    groups: int = 1,
) -> Tensor:
    """x [N, Cin, *S], weight [Cout, Cin / groups, *K] → [N, Cout, *S']; padding holds (before, behind) of each dim."""
    by_conv, by_pad = _split(padding, mode)
    if by_pad:
        x = _pad(x, padding, mode)
    return _CONV[weight.ndim - 2](x, weight, bias, stride, by_conv, dilation, groups)


def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mode: str,
    needs: tuple[bool, bool],
    groups: int = 1,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `conv` with respect to x and weight; None where not needed."""
    if not any(needs):
        return None, None
    by_conv, by_pad = _split(padding, mode)
    padded, narrow = _pad(x, padding, mode) if by_pad else x, weight.dtype
    if needs[1] and narrow == torch.bfloat16 and len(stride) == 3 and grad.device.type == "cpu":
        # oneDNN's gradient of the weight is garbage on processors with AVX-512 that have no matrix tiles.
        grad, padded, weight = grad.float(), padded.float(), weight.float()
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        grad, padded, weight, None, stride, by_conv, dilation, False, [0] * len(stride), groups, [*needs, False]
    )
    dx, dweight = (None if t is None else t.to(narrow) for t in (dx, dweight))
    if needs[0] and by_pad:
        dx = _pad_backward(dx, x.shape, padding, mode)
    return (dx if needs[0] else None), (dweight if needs[1] else None)
