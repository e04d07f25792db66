"""What loops over time share: the frames within each sample's length, the order of steps, the state before each."""

from collections.abc import Iterable

import torch
from torch import Tensor


def active_frames(lengths: Tensor | None, time: int, dims: int) -> Tensor | None:
    """Which frames [B, T, 1, *1] lie within the lengths. Walking all frames in either direction and leaving the state
    alone outside them is the same as starting each sample at its own end."""
    if lengths is None:
        return None
    mask = torch.arange(time, device=lengths.device) < lengths.unsqueeze(1)
    return mask[(...,) + (None,) * (dims + 1)]


def keep(x: Tensor, active: Tensor | None) -> Tensor:
    """x, zero where not active; a product would let NaN through."""
    return x if active is None else torch.where(active, x, x.new_zeros(()))


def rows(x: Tensor) -> Tensor:
    """[B, T, ...] → [B·T, ...]; flatten has no rule for batches of gradients."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def order(time: int, reverse: bool) -> Iterable[int]:
    return range(time - 1, -1, -1) if reverse else range(time)


def previous(state: Tensor, first: Tensor | None, active: Tensor | None, reverse: bool) -> Tensor:
    """The state [B, T, C, *S] that each step started from."""
    first = torch.zeros_like(state[:, :1]) if first is None else first.to(state.dtype).unsqueeze(1)
    if not reverse:
        return torch.cat([first, state[:, :-1]], dim=1)
    if active is not None:
        state = torch.where(active, state, first)
    return torch.cat([state[:, 1:], first], dim=1)


def ordered(x: Tensor, time_major: bool) -> Tensor:
    """x [B, T, C], a copy where its memory is not [B, T, C], or [T, B, C] if `time_major`."""
    if time_major:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x if x.is_contiguous() else x.contiguous()  # as in lstm_gates_forward
