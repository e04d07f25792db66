"""Pooling over time."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import check_count

Pool = tuple[str, int] | tuple[str, int, int] | None


class Pool1d(nn.Module):
    """`torch.nn.MaxPool1d` or `torch.nn.AvgPool1d` over `[B, T, C]`, without a copy.

    Args:
        spec: `("max", kernel)`, `("avg", kernel)`, or with a stride other than the kernel `("max", kernel, stride)`;
            None passes the input on.
        owner: how messages start.
    """

    def __init__(self, spec: Pool, owner: str = "Pool1d") -> None:
        super().__init__()
        self.owner = owner
        valid = isinstance(spec, tuple) and len(spec) in (2, 3) and spec[0] in ("max", "avg")
        if not valid and spec is not None:
            raise ValueError(f"{owner}: pool is {spec!r}, expected None or a tuple ('max' or 'avg', kernel[, stride])")
        spec = ("none", 1) if spec is None else spec
        named = zip(("kernel of pool", "stride of pool"), spec[1:])
        sizes = [check_count(owner, name, number, 1) for name, number in named]
        self.kind, self.kernel, self.stride = spec[0], sizes[0], sizes[-1]

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, T, C]` → `[B, T', C]`, T' = ⌊(T - kernel) / stride⌋ + 1."""
        if self.kind == "none":
            return x
        if x.size(1) < self.kernel:
            raise ValueError(
                f"{self.owner}: input of pool has {x.size(1)} time steps, expected at least its kernel {self.kernel}"
            )
        # A frame of T rows and one column in channels_last memory.
        frames = x.unsqueeze(2).permute(0, 3, 1, 2)
        if self.kind == "max":
            frames = F.max_pool2d(frames, (self.kernel, 1), (self.stride, 1))
        else:
            frames = F.avg_pool2d(frames, (self.kernel, 1), (self.stride, 1))
        return frames.permute(0, 2, 3, 1).squeeze(2)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Steps of the output for each number of steps of the input; no window reaches past it."""
        return ((lengths - self.kernel) // self.stride + 1).clamp(min=0)

    def extra_repr(self) -> str:
        return "none" if self.kind == "none" else f"{self.kind!r}, kernel={self.kernel}, stride={self.stride}"
