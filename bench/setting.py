"""Where and how a row is measured."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

Placed = TypeVar("Placed", Tensor, nn.Module)
MODES = {False: "inference", True: "training"}


@dataclass(frozen=True)
class Setting:
    """A device, what it computes in, and whether everyone is replayed as a CUDA graph."""

    device: str = "cpu"
    precision: str = "float32"  # or "tf32", "bfloat16", "float16"
    captured: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "tf32" else getattr(torch, self.precision)

    @property
    def unit(self) -> float:
        """Largest relative error of one rounding."""
        return 2.0**-11 if self.precision == "tf32" else torch.finfo(self.dtype).eps / 2

    @property
    def id(self) -> str:
        return f"{self.device}_{self.precision}" + ("_graph" if self.captured else "")

    def mode(self, train: bool) -> str:
        if self == CPU:
            return MODES[train]
        return f"{MODES[train]}, {self.precision}" + (", CUDA graphs" if self.captured else "")

    def peak(self, unit: str) -> str:
        """Key of the peak that a rate in `unit` is held against."""
        return unit if self == CPU or unit == "GB/s" else f"{unit} {self.precision}"

    def drawing(self) -> Callable[..., Tensor]:
        """→ normal(*sizes): numbers drawn on the device itself, the same ones each time that drawing begins."""
        generator = torch.Generator(self.device).manual_seed(0)
        return lambda *sizes: torch.randn(sizes, generator=generator, device=self.device).to(self.dtype)

    def place(self, what: Placed) -> Placed:
        return what.to(self.device, self.dtype)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """float32 products in TF32 or exactly, everywhere in torch."""
        flags = (torch.backends.cuda.matmul, torch.backends.cudnn) if self.device == "cuda" else ()
        before = [flag.allow_tf32 for flag in flags]
        for flag in flags:
            flag.allow_tf32 = self.precision == "tf32"
        try:
            yield
        finally:
            for flag, value in zip(flags, before, strict=True):
                flag.allow_tf32 = value


CPU = Setting()
SETTINGS = {
    "cpu": [CPU, Setting(precision="bfloat16")],
    "cuda": [Setting("cuda", precision, captured) for precision in ("bfloat16", "tf32") for captured in (False, True)],
}
