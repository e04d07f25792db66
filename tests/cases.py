"""The calls of `convfast.conv_lstm` that every test of it runs on: one line an option, tensors made on demand."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "channels_last", "time_first", "sliced", "expanded")
TENSORS = ("input", "weight_ih", "weight_hh", "bias", "peephole", "h0", "c0")


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
            value = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
            if name == "weight_hh" or name in self.given:
                wide = name == "c0" and dtype in (torch.bfloat16, torch.float16)
                made[name] = arrange(value.to(torch.float32 if wide else dtype), layout, name).requires_grad_()
        made["lengths"] = None if self.lengths is None else torch.tensor(self.lengths, dtype=torch.int64)
        return made

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
    if layout == "contiguous" or x.ndim < 2:
        return x.contiguous()
    if layout == "channels_last":
        return x.movedim(channel_dim, -1).contiguous().movedim(-1, channel_dim)
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


WITH_STATE = ("input", "weight_ih", "bias", "h0", "c0")
EVERYTHING = (*WITH_STATE, "peephole")

CASES = [
    Case("plain"),
    Case("kernel_5", kernel=(5, 5)),
    Case("kernel_1", kernel=(1, 1)),
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
