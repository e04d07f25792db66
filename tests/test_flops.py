"""torch's counter of operations finds in convfast's ops what it finds in plain modules."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import convfast
import convfast.flops  # registers

OPS = ("conv_lstm", "conv1d", "lstm")


class Loop(nn.Module):
    """A ConvLSTM layer step by step."""

    def __init__(self, cin: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.ih, self.hh = (nn.Conv2d(n, 4 * hidden, 3, padding=1) for n in (cin, hidden))

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], self.hidden, *x.shape[3:])
        for frame in x.unbind(1):
            i, f, o, g = (self.ih(frame) + self.hh(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h


class Steps(nn.Module):
    """An LSTM of two layers after a convolution, with products that the counter knows, and a linear layer on top."""

    def __init__(self, directions: int = 1, projected: int = 0) -> None:
        super().__init__()
        self.directions, self.projected, size = directions, projected, projected or 5
        self.conv = nn.Conv1d(3, 4, 3, padding=1)
        inputs = [4, directions * size]
        self.ih = nn.ModuleList(nn.Linear(n, 20) for n in inputs for _ in range(directions))
        self.hh = nn.ModuleList(nn.Linear(size, 20) for _ in self.ih)
        self.hr = nn.ModuleList(nn.Linear(5, projected) for _ in self.ih) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        for layer in range(2):
            outputs = []
            for row in range(layer * self.directions, (layer + 1) * self.directions):
                h, c, hs = x.new_zeros(len(x), self.projected or 5), x.new_zeros(len(x), 5), []
                for step in self.ih[row](x).unbind(1):
                    i, f, g, o = (step + self.hh[row](h)).chunk(4, 1)
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    h = o.sigmoid() * c.tanh()
                    h = self.hr[row](h) if self.hr else h
                    hs.append(h)
                outputs.append(torch.stack(hs, 1))
            x = torch.cat(outputs, 2)
        return x


def counted(module: nn.Module, x: Tensor, train: bool) -> int:
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        output: Any = module(x)
        output = output if isinstance(output, Tensor) else output[0]
        if train:
            output.sum().backward()
    return counter.get_total_flops()


LSTMS: dict[str, dict[str, Any]] = {"plain": {}, "both": {"bidirectional": True}, "projection": {"proj_size": 2}}


@pytest.mark.parametrize("train, needs_input", [(False, False), (True, False), (True, True)])
def test_conv_lstm(train: bool, needs_input: bool, native_ops) -> None:
    x = torch.randn(2, 3, 2, 7, 5, requires_grad=needs_input)
    assert counted(convfast.ConvLSTM(2, 4, 3), x, train) == counted(Loop(2, 4), x, train) > 0


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("options", LSTMS.values(), ids=list(LSTMS))
def test_conv1d_lstm(options: dict[str, Any], train: bool, native_ops) -> None:
    x = torch.randn(2, 6, 3, requires_grad=train)
    module = convfast.Conv1dLSTM(3, 4, 5, 3, 2, padding=1, activation="none", **options)
    plain = Steps(2 if "bidirectional" in options else 1, options.get("proj_size", 0))
    assert counted(module, x, train) == counted(plain, x, train) > 0


def conv1d_lstm() -> nn.Module:
    return convfast.Conv1dLSTM(3, [4, 6], 5, [3, 2], stride=[2, 1], padding="valid", bias=False)


@pytest.mark.parametrize(
    "build, op",
    [
        (lambda: convfast.CNN_LSTM(3, 2, 4, 3, 5), "conv1d_lstm_layers"),
        (conv1d_lstm, "conv1d_lstm_layers"),
        (lambda: convfast.LSTM(3, 5, 2), "lstm_layers"),
    ],
)
def test_one_op_counts_as_its_layers(
    build: Callable[[], nn.Module], op: str, native_ops, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = build().eval(), torch.randn(2, 12, 3)
    layers = build().eval()
    for part in layers.modules():
        part.register_forward_hook(lambda *_: None)
    expected = counted(layers, x, False)
    # The counter's own hooks, on every module, would keep the op away.
    monkeypatch.setattr("convfast.nn.hooks._has_any_global_hook", lambda: False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    assert counter.get_total_flops() == expected > 0
    assert any(str(name).endswith(f".{op}") for name in counter.get_flop_counts()["Global"])


# (Of the gradient of a weight in groups torch counts too much.)
@pytest.mark.parametrize(
    "options, train",
    [({"stride": 2, "groups": 2}, False), ({"dilation": 2, "bias": False}, True), ({"stride": 2}, True)],
)
def test_conv1d(options: dict[str, Any], train: bool, native_ops) -> None:
    x = torch.randn(2, 9, 4, requires_grad=train)
    plain = nn.Conv1d(4, 6, 3, **options)
    expected = counted(plain, x.detach().transpose(1, 2).requires_grad_(train), train)
    assert counted(convfast.Conv1d(4, 6, 3, **options), x, train) == expected > 0


@pytest.mark.parametrize(
    "module, pixels", [(convfast.LSTM(3, 5, batch_first=True), ()), (convfast.ConvLSTM(3, 5, 3), (7, 4))]
)
def test_what_needs_no_gradient_does_not_count(module: nn.Module, pixels: tuple[int, ...], native_ops) -> None:
    batch, time = 2, 6
    (w_ih, w_hh), n = (w for name, w in module.named_parameters() if "weight" in name), batch * math.prod(pixels)

    def count(needs_input: bool = True, needs_h: bool = False, frozen: Tensor | None = None) -> int:
        x = torch.randn(batch, time, 3, *pixels, requires_grad=needs_input)
        h, c = (torch.randn(1, batch, 5, *pixels) for _ in range(2))
        for weight in (w_ih, w_hh):
            weight.requires_grad_(weight is not frozen)
        with FlopCounterMode(display=False) as counter:
            state = (h.requires_grad_(needs_h), c)
            module(x, [(h[0], c[0])] if pixels else state)[0].sum().backward()
        return counter.get_total_flops()

    everything = count()
    assert count(needs_input=False) == count(frozen=w_ih) == everything - 2 * n * time * w_ih.numel()
    assert count(frozen=w_hh) == everything - 2 * n * time * w_hh.numel()
    assert count(needs_h=True) == everything + 2 * n * w_hh.numel()


def test_conv_lstm_without_input(native_ops) -> None:
    weight, h = torch.randn(16, 4, 3, 3), torch.randn(2, 4, 7, 5)
    with FlopCounterMode(display=False) as counter:
        convfast.conv_lstm(None, None, weight, state=(h, None), steps=3, backend="cpu")
    assert counter.get_total_flops() == 2 * 2 * 3 * 7 * 5 * weight.numel()
