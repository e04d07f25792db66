"""torch's counter of operations finds in convfast's ops what it finds in plain modules."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import convfast
import convfast.flops  # registers
from convfast.toolchain import PACKAGE

ROOT = PACKAGE.parent
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


@pytest.mark.parametrize("build", [lambda: convfast.CNN_LSTM(3, 2, 4, 3, 5), lambda: convfast.LSTM(3, 5, 2)])
def test_one_op_counts_as_its_layers(build: Callable[[], nn.Module], native_ops) -> None:
    module, x = build().eval(), torch.randn(2, 6, 3)
    layers = build().eval()
    layers.register_forward_hook(lambda *_: None)
    for part in layers.modules():
        part.register_forward_hook(lambda *_: None)
    assert counted(module, x, False) == counted(layers, x, False) > 0


FIRST_CALL = """
import torch, convfast, convfast.flops
from torch.utils.flop_counter import FlopCounterMode
before, x, found = FlopCounterMode(display=False), torch.randn(2, 6, 3), []
module = torch.nn.Sequential(convfast.LSTM(3, 5)).eval()
module = {make}
for counter in (before, FlopCounterMode(display=False)):
    with counter, torch.no_grad():
        module(x)
    found.append(counter.get_total_flops())
print(*found)
"""


@pytest.mark.parametrize("make", ["module", "torch.jit.script(module)"], ids=["eager", "scripted"])
def test_first_call_which_loads_the_ops_is_counted(make: str, native_ops) -> None:
    code = FIRST_CALL.format(make=make)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    expected = str(2 * 2 * 6 * 20 * (3 + 5))
    assert done.stdout.split() == [expected, expected], done.stderr
