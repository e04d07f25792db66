"""Checkpoints of ndrplz/ConvLSTM_pytorch; those of automan000 are in test_nn_conv_lstm.py."""

import pytest
import torch
from torch import Tensor, nn

from convfast.nn import ConvLSTM, ConvLSTMCell
from tests.modules import assert_close

SPACE = (6, 5)


# The original classes, in our own words.


class OriginalCell(nn.Module):
    def __init__(self, inputs: int, hidden: int, kernel: tuple[int, int], bias: bool) -> None:
        super().__init__()
        self.hidden = hidden
        padding = tuple(k // 2 for k in kernel)
        self.conv = nn.Conv2d(inputs + hidden, 4 * hidden, kernel, padding=padding, bias=bias)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, o, g = torch.split(self.conv(torch.cat([x, h], dim=1)), self.hidden, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class Original(nn.Module):
    def __init__(self, inputs: int, hidden: list[int], kernel: tuple[int, int], bias: bool = True) -> None:
        super().__init__()
        sizes = zip([inputs, *hidden], hidden)
        self.cell_list = nn.ModuleList(OriginalCell(cin, c, kernel, bias) for cin, c in sizes)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        outputs, last = [], []
        for cell in self.cell_list:
            h = c = x.new_zeros(x.shape[0], cell.hidden, *x.shape[3:])
            steps = []
            for frame in x.unbind(1):
                h, c = cell(frame, h, c)
                steps.append(h)
            x = torch.stack(steps, dim=1)
            outputs.append(x)
            last.append((h, c))
        return outputs, last


CALL = (3, [4, 6], (3, 5))


def frames() -> Tensor:
    return torch.randn(2, 4, 3, *SPACE, dtype=torch.float64)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "loose"])
@pytest.mark.parametrize("peephole", [{}, {"peephole": True}, {"peephole": True, "image_size": SPACE}], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_checkpoint_loads_and_gives_the_same(bias: bool, peephole: dict, strict: bool) -> None:
    original = Original(*CALL, bias).double()
    ours = ConvLSTM(*CALL, bias=bias, return_all_layers=True, dtype=torch.float64, **peephole)
    for name, parameter in ours.named_parameters():
        if name.startswith("peephole") and not isinstance(parameter, nn.UninitializedParameter):
            nn.init.normal_(parameter)
    weights = original.state_dict()
    before = dict(weights)
    assert str(ours.load_state_dict(weights, strict=strict)) == "<All keys matched successfully>"
    assert weights.keys() == before.keys(), "the caller's dict has changed"
    x = frames()
    assert_close(ours(x), original(x))


def test_checkpoint_of_a_cell_loads_and_gives_the_same() -> None:
    original, ours = OriginalCell(3, 4, (3, 3), True), ConvLSTMCell(3, 4, 3)
    ours.load_state_dict(original.state_dict(), strict=True, assign=True)
    assert all(parameter.is_contiguous() for parameter in ours.parameters())
    x, h, c = torch.randn(2, 3, *SPACE), torch.randn(2, 4, *SPACE), torch.randn(2, 4, *SPACE)
    assert_close(ours(x, h, c), original(x, h, c))


def test_checkpoint_loads_inside_a_larger_model() -> None:
    original = nn.ModuleDict({"rnn": Original(*CALL), "head": nn.Conv2d(6, 1, 1)}).double()
    ours = nn.ModuleDict({"rnn": ConvLSTM(*CALL, return_all_layers=True), "head": nn.Conv2d(6, 1, 1)}).double()
    ours.load_state_dict(original.state_dict(), strict=True)
    x = frames()
    assert_close(ours["rnn"](x), original["rnn"](x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("cell_list.1.conv.weight"), "Missing key.*weight_ih_l1(.|\n)*Unexpected key.*1.conv.bias"),
        (lambda d: d.pop("cell_list.0.conv.bias"), 'Missing key.* "bias_l0"'),
        (lambda d: d.update({"cell_list.2.conv.weight": torch.zeros(1)}), "Unexpected key.*cell_list.2.conv.weight"),
        (lambda d: d.update({"weight_hh_l0": torch.zeros(16, 4, 3, 5)}), "Unexpected key.*cell_list.0.conv.weight"),
        (lambda d: d.update({"cell_list.0.conv.weight": torch.zeros(16, 8, 3, 5)}), "size mismatch for weight_ih_l0"),
        (lambda d: d.update({"cell_list.0.conv.weight": torch.zeros(16, 7, 3, 3)}), "size mismatch for weight_hh_l0"),
        (
            lambda d: d.update({"cell_list.0.conv.weight": torch.zeros(16, 4, 3, 5)}),
            r"cell_list.0.conv.weight has shape \[16, 4, 3, 5\], expected \[4C, Cin \+ C, \*K\]",
        ),
        (lambda d: d.update({"cell_list.0.conv.weight": torch.zeros(16)}), r"0.conv.weight has shape \[16\], expected"),
        (lambda d: d.update({"cell_list.0.conv.bias": torch.zeros(8)}), r"0.conv.bias has shape \[8\], expected"),
    ],
    ids=["partial", "no_bias", "layer", "mixed", "channels", "kernel", "no_input", "rank", "bias"],
)
def test_broken_checkpoint_is_refused(change, message: str) -> None:
    weights = Original(*CALL).state_dict()
    change(weights)
    with pytest.raises(RuntimeError, match=message):
        ConvLSTM(*CALL).load_state_dict(weights, strict=True)


def test_bias_that_the_module_has_not_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias_l0"):
        ConvLSTM(*CALL, bias=False).load_state_dict(Original(*CALL).state_dict(), strict=True)
