"""What the ops share: argument checks (a message names op, argument, expected, got), autocast, transforms, layouts."""

import operator
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..reference.lstm_gates import state_dtype

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FAKE = torch._C._TorchDispatchModeKey.FAKE
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def integer(value: Any) -> int | None:
    """An integer of Python, numpy or a graph; None for anything else, bools among it."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def kind(value: Any) -> str:
    """What a value of the wrong type is, for messages."""
    if value is None:
        return "None"
    name = type(value).__name__
    article = "an" if name[0].lower() in "aeiou" else "a"
    return f"{article} {name}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")


def check_count(op: str, name: str, value: Any, least: int) -> int:
    found = integer(value)
    if found is None or found < least:
        raise ValueError(f"{op}: {name} is {value!r}, expected an int >= {least}")
    return found


def check_pair(op: str, name: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{op}: {name} is {kind(value)}, expected two tensors (h, c)")
    for part, t in zip("hc", value):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {part} of {name} is {kind(t)}, expected a Tensor")


def check_flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} is {value!r}, expected True or False")


def numbers(op: str, name: str, value: Any, dims: int, least: int, several: Any = (tuple, list)) -> tuple[int, ...]:
    """An int, or one for each spatial dim, in one of the types in `several`."""
    found = tuple(integer(n) for n in (value if isinstance(value, several) else (value,) * dims))
    if len(found) != dims or not all(n is not None and n >= least for n in found):
        raise ValueError(f"{op}: {name} is {value!r}, expected an int >= {least} or a tuple of {dims}")
    return found


def check_tensors(op: str, tensors: Mapping[str, Tensor | None], state: str | None = None) -> None:
    """Same floating dtype and device as the first one given; `state` names one that may have the state's dtype."""
    dtype = None
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, expected a Tensor")
        if dtype is None:
            first_name, dtype, device = name, t.dtype, t.device
        elif t.dtype == dtype and t.device == device:
            continue
        if t.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} has dtype {t.dtype}, expected one of {', '.join(map(str, FLOATS))}")
        if t.device != device:
            raise ValueError(f"{op}: {name} is on {t.device}, expected {device} like {first_name}")
        if t.dtype != dtype and not (name == state and t.dtype == state_dtype(dtype)):
            raise TypeError(
                f"{op}: {name} has dtype {t.dtype}, expected {dtype} like {first_name} "
                "(mixed dtypes are not converted outside autocast)"
            )


def check_dense(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Of what is computed with, not of weights: each takes its time."""
    for name, t in tensors.items():
        if t is not None and (t.layout is not torch.strided or t.is_nested):
            got = "nested" if t.is_nested else str(t.layout)
            raise TypeError(f"{op}: {name} is a {got} tensor, expected a dense (strided) tensor")


def check_given(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    for name, t in tensors.items():
        if t is None:
            raise TypeError(f"{op}: {name} is None, expected a Tensor")


def check_shape(op: str, name: str, tensor: Tensor | None, expected: tuple[int, ...], legend: str) -> None:
    if tensor is not None and tensor.shape != expected:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected {list(expected)} ({legend})")


def check_choice(op: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(choices)}")


def _batched(tensor: Tensor) -> bool:
    """Whether a vmap is at one of the levels of torch.func around the tensor."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def values_at_hand(lengths: Tensor) -> bool:
    """Whether to look at values costs no synchronization and they are there: not while tracing or in vmap."""
    return (
        not torch.compiler.is_compiling()
        and type(lengths) is Tensor
        and not _batched(lengths)
        and lengths.device.type == "cpu"
        and lengths.numel() > 0
    )


def check_integers(op: str, lengths: Any) -> None:
    if not isinstance(lengths, Tensor) or lengths.dtype not in INTEGERS:
        got = f"dtype {lengths.dtype}" if isinstance(lengths, Tensor) else f"type {type(lengths).__name__}"
        raise TypeError(f"{op}: lengths has {got}, expected a Tensor of integers")
    check_dense(op, {"lengths": lengths})


def check_lengths(op: str, lengths: Tensor | None, batch: int, time: int, device: torch.device) -> Tensor | None:
    """→ lengths as int64 on `device`."""
    if lengths is None:
        return None
    check_integers(op, lengths)
    check_shape(op, "lengths", lengths, (batch,), "[B]")
    if lengths.is_meta and device.type != "meta":
        raise ValueError(f"{op}: lengths is on meta, expected {device}")
    if values_at_hand(lengths):
        least, most = int(lengths.min()), int(lengths.max())
        if least < 0 or most > time:
            wrong = least if least < 0 else most
            raise ValueError(f"{op}: lengths has {wrong}, expected 0 to {time} (the number of time steps)")
    return lengths.to(device=device, dtype=torch.int64)


def most_padding(size: int, mode: str) -> int | None:
    """How much padding on one side of `size` elements the mode allows, None for any."""
    return {"reflect": size - 1, "circular": size}.get(mode)


def output_size(
    op: str, where: str, size: int, kernel: int, stride: int, pads: list[int], dilation: int, mode: str
) -> int:
    """Positions of a kernel along one axis, called `where` in messages; `pads` are before and behind."""
    before, behind = pads
    most = most_padding(size, mode)
    if most is not None and max(before, behind) > most:
        raise ValueError(
            f"{op}: padding is {max(before, behind)} in {where}, expected at most {most} "
            f"with padding_mode={mode!r} and size {size}"
        )
    extent = dilation * (kernel - 1) + 1
    if size + before + behind < extent:
        raise ValueError(
            f"{op}: input has size {size} in {where}, expected at least {extent - before - behind} "
            f"for a kernel that spans {extent} with padding {before}+{behind}"
        )
    return (size + before + behind - extent) // stride + 1


def unpack_state(op: str, state: tuple[Tensor | None, Tensor | None] | None) -> tuple[Tensor | None, Tensor | None]:
    if state is None:
        return None, None
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(f"{op}: state is {kind(state)}, expected a pair (h, c)")
    return state[0], state[1]


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The type that autocast wants on the tensor's device, None outside autocast."""
    device = tensor.device.type
    # Asked only of devices that may have none: to ask takes its time, and torch 2.11 cannot trace it; of what is
    # compiled for, meta alone has no autocast.
    if device not in ("cpu", "cuda") and (
        device == "meta" or not (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device))
    ):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def autocast_to(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """Cast what autocast casts: floating types but float64."""
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return [t.to(dtype) if isinstance(t, Tensor) and t.dtype in narrow else t for t in tensors]


def autocast_state(
    dtype: torch.dtype, weight: Tensor, h: Tensor | None, c: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Cast h, and c unless it has the wide type of the state, for a weight that is already cast."""
    (h,) = autocast_to(dtype, h)
    if isinstance(c, Tensor) and c.dtype != state_dtype(weight.dtype):
        (c,) = autocast_to(dtype, c)
    return h, c


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """For a backward in plain torch, which keeps the dtypes of its forward wherever it is called."""
    return nullcontext() if autocast_dtype(like) is None else torch.autocast(like.device.type, enabled=False)


def needs_reference() -> bool:
    """Whether the call has to be plain torch."""
    if forward_ad._current_level >= 0:  # tensors may carry tangents (torch.func.jvp, forward_ad.dual_level)
        return True
    # Of a Function within torch.func, torch.compile traces a wrong backward, and no vmap at all.
    return torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def exporting() -> bool:
    """Whether the call becomes a part of a program of torch.export or torch.jit.trace."""
    if torch.jit.is_tracing():
        return True
    # is_exporting() is true of whatever is compiled in torch 2.11, and the flag of what other threads do.
    if not torch.compiler._is_exporting_flag:
        return False
    return torch.compiler.is_dynamo_compiling() or torch._C._get_dispatch_mode(_FAKE) is not None


def needs_function(*tensors: Tensor | None) -> bool:
    """Whether the call has to go through the autograd.Function."""
    # Under vmap a tensor hides that a level further out differentiates it.
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return True
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    # A program that is exported or traced has no backward: nothing is to be kept for one.
    return wanted and not exporting()


def apply(function: type[Function], *inputs: Any) -> Any:
    """`function.apply`, by a function without a separate `setup_context` where none is called for: for that of another
    torch inspects signatures at every call, which takes longer than many a kernel."""
    if torch.compiler.is_compiling():
        return function.apply(*_distinct(inputs))
    if torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)
    return _in_one(function).apply(*inputs)


def _distinct(inputs: tuple[Any, ...]) -> list[Any]:
    """A view in place of a tensor that has come before: torch.compile does not trace a function that gets one twice."""
    found: list[Any] = []
    for value in inputs:
        repeated = isinstance(value, Tensor) and any(value is other for other in found)
        found.append(value.view_as(value) if repeated else value)
    return found


@cache
def _in_one(function: type[Function]) -> type[Function]:
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    body = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (Function,), body)


def empty_channels_last(like: Tensor, shape: list[int], channel_dim: int, dtype: torch.dtype) -> Tensor:
    """Fresh memory with the channels innermost."""
    shape = shape[:channel_dim] + shape[channel_dim + 1 :] + [shape[channel_dim]]
    return like.new_empty(shape, dtype=dtype).movedim(-1, channel_dim)


def is_channels_last(x: Tensor) -> bool:
    """Of `[B, C, *S]`; what is contiguous as well is not."""
    return x.ndim > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def empty_in_layout_of(layout: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Fresh memory, channels-last where `layout` is, else contiguous."""
    if is_channels_last(layout):
        return empty_channels_last(layout, list(shape), 1, dtype)
    return layout.new_empty(shape, dtype=dtype)


def empty_sequence(like: Tensor, shape: tuple[int, int, int], time_major: bool, dtype: torch.dtype) -> Tensor:
    """Fresh memory of `[B, T, C]`, or of `[T, B, C]` if `time_major`."""
    batch, time, channels = shape
    if time_major:
        return like.new_empty((time, batch, channels), dtype=dtype).transpose(0, 1)
    return like.new_empty(shape, dtype=dtype)
