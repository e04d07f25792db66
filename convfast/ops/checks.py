"""What the ops share: argument checks (a message names op, argument, expected, got), autocast, transforms, layouts."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..reference.lstm_gates import state_dtype

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensors(op: str, tensors: Mapping[str, Tensor | None], state: str | None = None) -> None:
    """Same floating dtype and device as the first one given; `state` names one that may have the state's dtype."""
    first_name, first = next((name, t) for name, t in tensors.items() if t is not None)
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, expected a Tensor")
        if t.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} has dtype {t.dtype}, expected one of {', '.join(map(str, FLOATS))}")
        if t.device != first.device:
            raise ValueError(f"{op}: {name} is on {t.device}, expected {first.device} like {first_name}")
        if name == state and t.dtype == state_dtype(first.dtype):
            continue
        if t.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} has dtype {t.dtype}, expected {first.dtype} like {first_name} "
                "(mixed dtypes are not converted outside autocast)"
            )


def check_shape(op: str, name: str, tensor: Tensor | None, expected: tuple[int, ...], legend: str) -> None:
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected {list(expected)} ({legend})")


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The type that autocast wants on the tensor's device, None outside autocast."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def autocast_to(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """Cast what autocast casts: floating types but float64."""
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return [t.to(dtype) if isinstance(t, Tensor) and t.dtype in narrow else t for t in tensors]


def forward_mode() -> bool:
    """Whether tensors may carry tangents (torch.func.jvp, forward_ad.dual_level)."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def needs_function(*tensors: Tensor | None) -> bool:
    """Whether the call has to go through the autograd.Function."""
    # A program that is exported has no backward: nothing is to be kept for one.
    if torch.compiler.is_exporting():
        return False
    # Under vmap a tensor hides that a level further out differentiates it.
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def empty_channels_last(like: Tensor, shape: list[int], channel_dim: int, dtype: torch.dtype) -> Tensor:
    """For fakes: fresh memory with the channels innermost."""
    shape = shape[:channel_dim] + shape[channel_dim + 1 :] + [shape[channel_dim]]
    return like.new_empty(shape, dtype=dtype).movedim(-1, channel_dim)
