"""The calls of `conv_lstm`, `conv1d` and `lstm` that their tests run on: one line an option, tensors made on demand."""

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "time_first", "sliced", "expanded")
SEQUENCE_LAYOUTS = ("contiguous", "features_first", "time_first", "sliced", "expanded")
TENSORS = ("input", "weight_ih", "weight_hh", "bias", "peephole", "h0", "c0")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """With so many threads for torch's operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def instruction_set(asked: str) -> str:
    """What `cpu_capability` says where ATEN_CPU_CAPABILITY is `asked`; skips where such processors never have it."""
    if platform.machine() == "x86_64":
        return {"default": "baseline"}.get(asked, asked)
    if asked != "default":
        pytest.skip(f"{platform.machine()} has no {asked}")
    return "neon" if platform.machine() in ("aarch64", "arm64") else "baseline"


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """float64 numbers on the default device, the same whatever that is."""
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return numbers.to(torch.get_default_device())


def exactly(backend: str, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Tolerances for results that differ in nothing but the order of sums within library calls."""
    # The library sums in an order that depends on the sizes and the threads; the native kernels do not.
    if backend == "cpu":
        return {"rtol": 0, "atol": 0}
    # Of the library's 16-bit results one may then round the other way, and the wide state with it; on a GPU, where each
    # size has its own kernel in the library, so may one of every step.
    on_gpu = torch.cuda.is_available()
    eps = torch.finfo(dtype).eps * (4 if on_gpu else 1)
    return {"rtol": eps, "atol": eps} if dtype.itemsize == 2 and (backend == "reference" or on_gpu) else {}


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; `given` names the optional tensors that it has."""

    id: str
    batch: int = 2
    time: int = 3
    channels: int = 3
    hidden: int = 4
    space: tuple[int, ...] = (6, 5)
    kernel: tuple[int, ...] = (3, 3)
    kernel_hh: tuple[int, ...] | None = None
    given: tuple[str, ...] = ("input", "weight_ih", "bias")
    lengths: tuple[int, ...] | None = None
    out_space: tuple[int, ...] | None = None  # where it differs from `space`
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def arguments(self, dtype: torch.dtype, layout: str = "contiguous", seed: int = 0) -> dict[str, Tensor | None]:
        """Leaf tensors by name (TENSORS and lengths), None where the case has none."""
        generator = torch.Generator().manual_seed(seed)
        gates, space = 4 * self.hidden, self.out_space or self.space
        kernel_hh = self.kernel_hh or self.kernel
        groups = self.options.get("groups", 1)
        frame = (gates, *space) if "weight_ih" not in self.given else (self.channels, *self.space)
        fan = 0.5 * (self.hidden * torch.Size(kernel_hh).numel()) ** -0.5
        shapes = {
            "input": ((self.batch, self.time, *frame), 1.0),
            "weight_ih": ((gates, self.channels // groups, *self.kernel), fan),
            "weight_hh": ((gates, self.hidden, *kernel_hh), 2 * fan),
            "bias": ((gates,), 1.0),
            "peephole": ((3, self.hidden, *space), 0.5),
            "h0": ((self.batch, self.hidden, *space), 0.5),
            "c0": ((self.batch, self.hidden, *space), 1.0),
        }
        made: dict[str, Tensor | None] = dict.fromkeys(TENSORS)
        for name, (shape, scale) in shapes.items():
            value = scale * normal(shape, generator)
            if name == "weight_hh" or name in self.given:
                wide = name == "c0" and dtype in (torch.bfloat16, torch.float16)
                made[name] = arrange(value.to(torch.float32 if wide else dtype), layout, name).requires_grad_()
        return made | {"lengths": arrange_lengths(self.lengths, layout)}

    def call(self, function: Any, arguments: dict[str, Tensor | None], **more: Any) -> tuple[Tensor, Tensor, Tensor]:
        """→ (output, h_n, c_n) of a function with the signature of `convfast.conv_lstm`."""
        a = arguments
        state = None if a["h0"] is None and a["c0"] is None else (a["h0"], a["c0"])
        more = {"steps": self.time if a["input"] is None else None} | self.options | more
        output, (h_n, c_n) = function(
            a["input"], a["weight_ih"], a["weight_hh"], a["bias"], a["peephole"], state, a["lengths"], **more
        )  # fmt: skip
        return output, h_n, c_n


def arrange(x: Tensor, layout: str, name: str = "input") -> Tensor:
    """A tensor of the shape of x whose memory is laid out another way; all but "expanded" keep its values."""
    channel_dim = 2 if name == "input" else 1
    if x.ndim == 1 and layout == "sliced":
        return torch.stack((x, torch.full_like(x, float("nan"))), 1)[:, 0]
    if x.ndim == 1 and layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "contiguous" or x.ndim < 2:
        return x.contiguous()
    if layout == "channels_last":
        return x.movedim(channel_dim, -1).contiguous().movedim(-1, channel_dim)
    if layout == "features_first":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "time_first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        # NaN around it: a kernel that reads past a row's end shows.
        larger = x.new_full([n + 3 for n in x.shape], float("nan"))
        window = larger[tuple(slice(1, 1 + n) for n in x.shape)]
        window.copy_(x)
        return window.detach()
    assert layout == "expanded"
    return x[:, :1].expand_as(x) if name == "input" else x[:1].expand_as(x) if name in ("h0", "c0") else x.contiguous()


def arrange_lengths(lengths: tuple[int, ...] | None, layout: str) -> Tensor | None:
    """int64; "sliced": one column of two."""
    if lengths is None:
        return None
    made = torch.tensor(lengths, dtype=torch.int64)
    return torch.stack((made, made.flip(0) + 1), 1)[:, 0] if layout == "sliced" else made


WITH_STATE = ("input", "weight_ih", "bias", "h0", "c0")
EVERYTHING = (*WITH_STATE, "peephole")

CASES = [
    Case("plain"),
    Case("kernel_5", kernel=(5, 5)),
    Case("kernel_1", kernel=(1, 1)),
    Case("kernel_1_channels_16", channels=48, hidden=16, kernel=(1, 1)),
    Case("kernel_hh_1_channels_32", channels=32, hidden=32, kernel_hh=(1, 1), given=WITH_STATE),
    Case("kernel_even_2x4", kernel=(2, 4)),
    Case("kernel_not_square_1x5", kernel=(1, 5)),
    Case("kernel_larger_than_frame", kernel=(5, 7), space=(2, 3)),
    Case("kernels_differ", kernel=(3, 5), kernel_hh=(1, 2)),
    Case("frame_1d", space=(11,), kernel=(3,)),
    Case("frame_3d", space=(3, 4, 5), kernel=(3, 2, 3), time=2),
    Case("frame_of_one_pixel", space=(1, 1)),
    Case("channels_17_5", channels=5, hidden=17),
    Case("channels_1_33_wide_frame", channels=1, hidden=33, space=(3, 37)),
    Case("stride_2", options={"stride": 2}, out_space=(3, 3)),
    Case("stride_2x3_padding_1x0", options={"stride": (2, 3), "padding": (1, 0)}, out_space=(3, 1)),
    Case("dilation_2", options={"dilation": 2}),
    Case("dilation_1x2_kernel_even", kernel=(2, 2), options={"dilation": (1, 2)}),
    Case("padding_valid", options={"padding": "valid"}, out_space=(4, 3)),
    Case("padding_full", options={"padding": 2}, out_space=(8, 7)),
    Case("reflect", kernel=(3, 4), options={"padding_mode": "reflect"}),
    Case("reflect_farthest", kernel=(5, 5), space=(3, 4), options={"padding_mode": "reflect"}),
    Case("replicate", kernel=(5, 4), options={"padding_mode": "replicate"}),
    Case("circular", kernel=(3, 4), options={"padding_mode": "circular"}),
    Case("circular_stride_2", options={"padding_mode": "circular", "stride": 2}, out_space=(3, 3)),
    Case("reflect_1d", space=(7,), kernel=(4,), options={"padding_mode": "reflect"}),
    Case("replicate_3d", space=(2, 3, 4), kernel=(3, 3, 3), time=2, options={"padding_mode": "replicate"}),
    Case("groups_2", channels=4, options={"groups": 2, "padding_mode": "reflect"}),
    Case("no_bias", given=("input", "weight_ih")),
    Case("peephole", given=("input", "weight_ih", "bias", "peephole")),
    Case("state", given=WITH_STATE),
    Case("state_h_only", given=("input", "weight_ih", "bias", "h0")),
    Case("state_c_only", given=("input", "weight_ih", "bias", "c0", "peephole")),
    Case("reverse", given=WITH_STATE, options={"reverse": True}),
    Case("lengths", batch=4, given=EVERYTHING, lengths=(2, 0, 3, 1)),
    Case("lengths_reverse", batch=4, given=EVERYTHING, lengths=(2, 0, 3, 1), options={"reverse": True}),
    Case("lengths_without_state", batch=3, lengths=(1, 3, 0), options={"reverse": True}),
    Case("no_input", given=("h0", "c0", "bias", "peephole")),
    Case("no_input_c_only", given=("c0",)),
    Case("no_input_lengths", batch=3, given=("h0", "c0"), lengths=(3, 0, 2), options={"reverse": True}),
    Case("input_convolved_before", given=("input", "bias", "h0", "c0")),
    Case("input_convolved_before_lengths", given=("input", "bias", "peephole"), lengths=(1, 3)),
    Case("time_1", time=1, given=EVERYTHING),
    Case("batch_1", batch=1, given=EVERYTHING),
    Case(
        "everything",
        batch=3,
        time=4,
        given=EVERYTHING,
        kernel=(3, 4),
        kernel_hh=(5, 2),
        lengths=(4, 1, 3),
        out_space=(3, 5),
        options={"reverse": True, "stride": (2, 1), "dilation": (2, 1), "padding_mode": "replicate"},
    ),
]
EMPTY_BATCH = Case("batch_0", batch=0, given=EVERYTHING, lengths=())
BY_ID = {case.id: case for case in [*CASES, EMPTY_BATCH]}


@dataclass(frozen=True)
class Conv1dCase:
    """Sizes and options of one call of `conv1d`."""

    id: str
    batch: int = 3
    time: int = 9
    features: int = 4
    channels: int = 6
    kernel: int = 3
    bias: bool = True
    lengths: tuple[int, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def arguments(self, dtype: torch.dtype, layout: str = "contiguous", seed: int = 0) -> dict[str, Tensor | None]:
        """Leaf tensors by name (input, weight, bias and lengths), None where the case has none."""
        shapes = {
            "input": (self.batch, self.time, self.features),
            "weight": (self.channels, self.features // self.options.get("groups", 1), self.kernel),
            "bias": (self.channels,) if self.bias else None,
        }
        made = random_leaves(shapes, dtype, layout, seed)
        if self.options.get("channels_first"):
            made["input"] = made["input"].detach().transpose(1, 2).requires_grad_()
        return made | {"lengths": arrange_lengths(self.lengths, layout)}

    def call(self, function: Any, arguments: dict[str, Tensor | None], **more: Any) -> Tensor:
        return function(**arguments, **self.options, **more)


LSTM_WEIGHTS = ("weight_ih", "weight_hh", "bias", "peephole", "weight_hr")


@dataclass(frozen=True)
class LSTMCase:
    """Sizes of one call of `lstm`; `given` names the optional tensors that it has."""

    id: str
    batch: int = 3
    time: int = 5
    features: int = 4
    hidden: int = 6
    projected: int | None = None
    directions: int = 1
    given: tuple[str, ...] = ("bias",)
    lengths: tuple[int, ...] | None = None

    def arguments(self, dtype: torch.dtype, layout: str = "contiguous", seed: int = 0) -> dict[str, Tensor | None]:
        """Leaf tensors by name (those of the reverse direction end in _r), None where the case has none."""
        gates, size = 4 * self.hidden, self.projected or self.hidden
        states = {"h0": (self.directions, self.batch, size), "c0": (self.directions, self.batch, self.hidden)}
        weights = {
            "weight_ih": (gates, self.features),
            "weight_hh": (gates, size),
            "bias": (gates,) if "bias" in self.given else None,
            "peephole": (3, self.hidden) if "peephole" in self.given else None,
            "weight_hr": None if self.projected is None else (size, self.hidden),
        }
        shapes = {"input": (self.batch, self.time, self.features)} | weights
        if self.directions == 2:
            shapes |= {f"{name}_r": shape for name, shape in weights.items()}
        shapes |= {name: shape if name in self.given else None for name, shape in states.items()}
        made = random_leaves(shapes, dtype, layout, seed)
        if made["c0"] is not None and dtype in (torch.bfloat16, torch.float16):
            made["c0"] = arrange(made["c0"].detach().float(), layout, "c0").requires_grad_()
        return made | {"lengths": arrange_lengths(self.lengths, layout)}

    def call(self, function: Any, arguments: dict[str, Tensor | None], **more: Any) -> tuple[Tensor, Tensor, Tensor]:
        """→ (output, h_n, c_n)."""
        a = arguments
        state = None if a["h0"] is None and a["c0"] is None else (a["h0"], a["c0"])
        reverse = None if self.directions == 1 else tuple(a[f"{name}_r"] for name in LSTM_WEIGHTS)
        weights = (a[name] for name in LSTM_WEIGHTS)
        output, (h_n, c_n) = function(a["input"], *weights, reverse, state, a["lengths"], **more)
        return output, h_n, c_n


def random_leaves(
    shapes: dict[str, tuple[int, ...] | None], dtype: torch.dtype, layout: str, seed: int
) -> dict[str, Tensor | None]:
    """Normal numbers, those of weights smaller the more of them are summed up."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor | None] = {}
    for name, shape in shapes.items():
        if shape is None:
            made[name] = None
            continue
        scale = torch.Size(shape[1:]).numel() ** -0.5 if name.startswith("weight") else 1.0
        value = scale * normal(shape, generator)
        made[name] = arrange(value.to(dtype), layout, name).requires_grad_()
    return made


CONV1D_CASES = [
    Conv1dCase("plain"),
    Conv1dCase("no_bias", bias=False),
    Conv1dCase("kernel_1", kernel=1),
    Conv1dCase("kernel_as_long_as_input", kernel=9),
    Conv1dCase("features_1_channels_1", features=1, channels=1),
    Conv1dCase("features_33_channels_70", features=33, channels=70),
    Conv1dCase("channels_32", time=70, channels=32, options={"padding": 1, "activation": "relu"}),
    Conv1dCase("tiles_of_4", time=70, features=16, channels=24, lengths=(70, 0, 65), options={"padding": 1}),
    Conv1dCase("tiles_of_2", time=67, features=40, channels=17, kernel=5, options={"padding": "full"}),
    Conv1dCase(
        "tiles_reflect", features=17, channels=16, lengths=(3, 9, 8), options={"padding": 2, "padding_mode": "reflect"}
    ),
    Conv1dCase("time_1", time=1, kernel=1),
    Conv1dCase("batch_1", batch=1),
    Conv1dCase("stride_2", options={"stride": 2}),
    Conv1dCase("stride_above_kernel", kernel=2, options={"stride": 3}),
    Conv1dCase("dilation_3", options={"dilation": 3}),
    Conv1dCase("padding_1", options={"padding": 1}),
    Conv1dCase("padding_above_kernel", options={"padding": 5}),
    Conv1dCase("same_even_kernel", kernel=4, options={"padding": "same"}),
    Conv1dCase("full", options={"padding": "full", "dilation": 2}),
    Conv1dCase("full_short", time=1, options={"padding": "full"}),
    Conv1dCase("reflect", kernel=4, options={"padding": "same", "padding_mode": "reflect"}),
    Conv1dCase("reflect_farthest", time=4, options={"padding": 3, "padding_mode": "reflect"}),
    Conv1dCase("replicate", kernel=4, options={"padding": "full", "padding_mode": "replicate"}),
    Conv1dCase("circular", kernel=4, options={"padding": "same", "padding_mode": "circular"}),
    Conv1dCase("circular_farthest", time=3, options={"padding": 3, "padding_mode": "circular", "stride": 2}),
    Conv1dCase("groups_2", options={"groups": 2, "padding": "same", "padding_mode": "reflect"}),
    Conv1dCase("groups_of_16", channels=32, lengths=(9, 4, 0), options={"groups": 2, "activation": "tanh"}),
    Conv1dCase("depthwise", channels=4, options={"groups": 4}),
    Conv1dCase("depthwise_16", features=16, channels=16, options={"groups": 16, "activation": "sigmoid"}),
    Conv1dCase(
        "depthwise_6_of_3", time=75, features=3, kernel=11, lengths=(75, 0, 66),
        options={"groups": 3, "padding": "same", "activation": "gelu"},
    ),
    Conv1dCase("depthwise_7", time=70, features=7, channels=7, kernel=5, options={"groups": 7, "padding": "full"}),
    Conv1dCase("depthwise_stride", time=20, features=7, channels=7, options={"groups": 7, "stride": 2}),
    *(Conv1dCase(name, options={"activation": name, "padding": 1}) for name in ("relu", "tanh", "sigmoid")),
    *(Conv1dCase(name, options={"activation": name, "padding": 1}) for name in ("gelu", "silu", "leaky_relu")),
    Conv1dCase("channels_first", options={"channels_first": True, "padding": "same"}),
    Conv1dCase("lengths", batch=5, lengths=(9, 0, 4, 2, 1), options={"padding": 1, "activation": "sigmoid"}),
    Conv1dCase("lengths_too_short", batch=4, lengths=(2, 9, 1, 3), options={"activation": "gelu"}),
    Conv1dCase("lengths_stride", batch=4, lengths=(9, 0, 6, 5), options={"stride": 2, "padding": "full"}),
    Conv1dCase("lengths_reflect", batch=3, lengths=(0, 3, 7), options={"padding": 2, "padding_mode": "reflect"}),
    Conv1dCase("lengths_replicate", batch=3, lengths=(1, 0, 7), options={"padding": 4, "padding_mode": "replicate"}),
    Conv1dCase("lengths_circular", batch=3, lengths=(2, 9, 0), options={"padding": 2, "padding_mode": "circular"}),
    Conv1dCase("lengths_none_long", lengths=(0, 0, 0), options={"padding": 1}),
    Conv1dCase(
        "everything",
        features=6,
        kernel=4,
        lengths=(8, 3, 9),
        options={
            "stride": 2,
            "padding": 3,
            "dilation": 2,
            "groups": 3,
            "padding_mode": "circular",
            "activation": "silu",
        },
    ),
]
EMPTY_CONV1D = Conv1dCase("batch_0", batch=0, lengths=(), options={"padding": 1, "activation": "gelu"})
CONV1D = {case.id: case for case in [*CONV1D_CASES, EMPTY_CONV1D]}

LSTM_STATE = ("bias", "h0", "c0")
LSTM_EVERYTHING = (*LSTM_STATE, "peephole")
LSTM_CASES = [
    LSTMCase("plain"),
    LSTMCase("no_bias", given=()),
    LSTMCase("peephole", given=("bias", "peephole")),
    LSTMCase("state", given=LSTM_STATE),
    LSTMCase("state_h_only", given=("bias", "h0")),
    LSTMCase("state_c_only", given=("c0", "peephole")),
    LSTMCase("projection", projected=3, given=LSTM_STATE),
    LSTMCase("both_directions", directions=2),
    LSTMCase("both_directions_state", directions=2, projected=2, given=LSTM_EVERYTHING),
    LSTMCase("features_1_hidden_1", features=1, hidden=1),
    LSTMCase("features_5_hidden_17", features=5, hidden=17),
    LSTMCase("hidden_70", features=33, hidden=70, given=LSTM_STATE),
    LSTMCase("time_1", time=1, given=LSTM_EVERYTHING),
    LSTMCase("batch_1", batch=1, directions=2, given=LSTM_EVERYTHING),
    LSTMCase("time_40_batch_9", batch=9, time=40),
    LSTMCase("lengths", batch=4, given=LSTM_EVERYTHING, lengths=(2, 0, 5, 1)),
    LSTMCase("lengths_without_state", batch=4, directions=2, lengths=(3, 5, 0, 1)),
    LSTMCase("lengths_none_long", given=LSTM_STATE, lengths=(0, 0, 0)),
    LSTMCase("everything", batch=4, projected=3, directions=2, given=LSTM_EVERYTHING, lengths=(4, 1, 0, 5)),
]
EMPTY_LSTM = LSTMCase("batch_0", batch=0, projected=3, directions=2, given=LSTM_EVERYTHING, lengths=())
LSTM = {case.id: case for case in [*LSTM_CASES, EMPTY_LSTM]}
