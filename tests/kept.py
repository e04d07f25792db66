"""What autograd keeps of a call until its backward."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def kept_for_backward(
    call: Callable[[], Result], given: Iterable[Tensor], but_integers: bool = False
) -> tuple[Result, int]:
    """→ result of the call, and bytes of all that it keeps and was not given."""
    held = {t.untyped_storage().data_ptr() for t in given}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in held and (t.is_floating_point() or not but_integers):
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = call()
    return result, sum(kept.values())
