"""The choice among a few tile sizes: a rule's, or with CONVFAST_AUTOTUNE=1 the fastest on this GPU, measured once."""

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from .. import native
from ..environment import enabled
from . import runtime

Candidate = TypeVar("Candidate")

_chosen: dict[str, str] = {}  # key → str(candidate)
_read: set[Path] = set()


def best(
    name: str,
    key: tuple[object, ...],
    like: Tensor,
    candidates: Sequence[Candidate],
    run: Callable[[Candidate], object],
) -> Candidate:
    """One of `candidates`, whose first is the rule's choice.

    Args:
        name: of the kernel.
        key: shape class, dtype and options, all that the fastest depends on; neither batch nor time.
        like: a tensor on the GPU in question.
        run: launches the kernel with a candidate; called more than once, and what it wrote last stays.
    """
    if len(candidates) == 1 or not enabled("CONVFAST_AUTOTUNE") or not _measurable(like):
        return candidates[0]
    whole = " | ".join((_gpu(like), f"triton {triton.__version__}", name, *map(str, key)))
    path = native.cache_dir() / "convfast-triton.json"
    if path not in _read:
        _read.add(path)
        _chosen.update(_load(path))
    named = {str(candidate): candidate for candidate in candidates}
    if _chosen.get(whole) in named:
        return named[_chosen[whole]]
    if _capturing():
        return candidates[0]
    with runtime.on_device_of(like):
        times = {label: _try(run, candidate) for label, candidate in named.items()}
    label = min(times, key=times.__getitem__)
    _chosen[whole] = label
    _save(path, {whole: label})
    return named[label]


def _try(run: Callable[[Candidate], object], candidate: Candidate) -> float:
    """Milliseconds; infinite where the GPU is too small for the candidate."""
    try:
        return _milliseconds(lambda: run(candidate))
    except (OutOfResources, PTXASError):
        return float("inf")


def _milliseconds(run: Callable[[], object], rounds: int = 7, least: float = 0.5) -> float:
    """Of one run: the median over the rounds, each of about `least` milliseconds."""

    def timed(loops: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(loops):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / loops

    run()
    loops = max(1, int(least / max(timed(1), 1e-3)))
    return statistics.median(timed(loops) for _ in range(rounds))


def _measurable(like: Tensor) -> bool:
    return like.device.type == "cuda" and not runtime.interpreted() and not torch.compiler.is_compiling()


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _gpu(like: Tensor) -> str:
    return torch.cuda.get_device_name(like.device)


def _load(path: Path) -> dict[str, str]:
    """What was measured before; nothing where the file cannot be read, for it can be measured again."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in kept.items() if isinstance(value, str)} if isinstance(kept, dict) else {}


def _save(path: Path, measured: dict[str, str]) -> None:
    """Add to the file, at one stroke; of two processes at once one may lose its entry, which is measured again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            json.dump(_load(path) | measured, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        pass  # a cache that cannot be written: measured anew by every process
