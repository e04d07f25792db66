"""The opponents in plain torch: ConvLSTMs and a Conv1d → LSTM, as usually written and as a careful author would do it.

ConvLSTM: letters B batch, T time, C hidden channels, Cin input channels, H W frame.
Gates in the order i f g o, zero padding "same", odd kernels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

State = tuple[Tensor, Tensor]
CONV = {2: nn.Conv2d, 3: nn.Conv3d}


def lstm_cell(gates: Tensor, c: Tensor) -> State:
    """Pre-activations [B, 4C, H, W] and c [B, C, H, W] to (h, c)."""
    i, f, g, o = gates.chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


class CatConvLSTM(nn.Module):
    """One convolution over cat(x, h) at every step: the version that everybody copies.

    input [B, T, Cin, H, W] (D H W with 3 dims), or one frame [B, Cin, H, W] fed `steps` times, or None with a state:
    `steps` steps of zeros
    -> (output [B, T, C, H, W] of the last layer, its last (h, c)).
    """

    def __init__(self, input_channels: int, hidden_channels: list[int], kernel_size: int, dims: int = 2) -> None:
        super().__init__()
        self.hidden_channels = hidden_channels
        inputs = [input_channels, *hidden_channels[:-1]]
        self.convs = nn.ModuleList(
            CONV[dims](cin + c, 4 * c, kernel_size, padding=kernel_size // 2)
            for cin, c in zip(inputs, hidden_channels, strict=True)
        )
        self.input_channels, self.dims = inputs, dims

    def forward(self, input: Tensor | None, state: State | None = None, steps: int = 1) -> tuple[Tensor, State]:
        for layer, conv in enumerate(self.convs):
            if layer == 0 and state is not None:
                h, c = state
            else:
                h = c = input.new_zeros(input.shape[0], self.hidden_channels[layer], *input.shape[-self.dims :])
            if input is None:
                frames = [h.new_zeros(h.shape[0], self.input_channels[0], *h.shape[2:])] * steps
            else:
                frames = [input] * steps if input.dim() == 2 + self.dims else input.unbind(1)
            outputs = []
            for x in frames:
                h, c = lstm_cell(conv(torch.cat([x, h], dim=1)), c)
                outputs.append(h)
            input = torch.stack(outputs, dim=1)
        return input, (h, c)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Views of the parameters under the names of convfast.ConvLSTM."""
        for layer, conv in enumerate(self.convs):
            cin = self.input_channels[layer]
            yield f"weight_ih_l{layer}", conv.weight[:, :cin]
            yield f"weight_hh_l{layer}", conv.weight[:, cin:]
            yield f"bias_l{layer}", conv.bias

    def grads(self) -> Iterator[tuple[str, Tensor]]:
        for layer, conv in enumerate(self.convs):
            cin = self.input_channels[layer]
            yield f"weight_ih_l{layer}", conv.weight.grad[:, :cin]
            yield f"weight_hh_l{layer}", conv.weight.grad[:, cin:]
            yield f"bias_l{layer}", conv.bias.grad


class HoistedConvLSTM(nn.Module):
    """The input convolution of all steps in one call (of one frame when all see the same), the recurrent one per step.

    Arguments and results of CatConvLSTM.
    """

    def __init__(self, input_channels: int, hidden_channels: list[int], kernel_size: int, dims: int = 2) -> None:
        super().__init__()
        self.hidden_channels = hidden_channels
        inputs = [input_channels, *hidden_channels[:-1]]
        pad = kernel_size // 2
        self.conv_x = nn.ModuleList(
            CONV[dims](cin, 4 * c, kernel_size, padding=pad) for cin, c in zip(inputs, hidden_channels, strict=True)
        )
        self.conv_h = nn.ModuleList(CONV[dims](c, 4 * c, kernel_size, padding=pad, bias=False) for c in hidden_channels)
        self.dims = dims

    def forward(self, input: Tensor | None, state: State | None = None, steps: int = 1) -> tuple[Tensor, State]:
        for layer, (conv_x, conv_h) in enumerate(zip(self.conv_x, self.conv_h, strict=True)):
            if input is None:
                gates_x = [conv_x.bias.view(-1, *[1] * self.dims)] * steps
            elif input.dim() == 2 + self.dims:
                gates_x = [conv_x(input)] * steps
            else:
                gates_x = conv_x(input.flatten(0, 1)).unflatten(0, input.shape[:2]).unbind(1)
            h, c = state if layer == 0 and state is not None else (None, None)
            outputs = []
            for gates in gates_x:
                if h is None:
                    c = torch.zeros_like(gates[:, : self.hidden_channels[layer]])
                else:
                    gates = gates + conv_h(h)
                h, c = lstm_cell(gates, c)
                outputs.append(h)
            input = torch.stack(outputs, dim=1)
        return input, (h, c)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for layer, (conv_x, conv_h) in enumerate(zip(self.conv_x, self.conv_h, strict=True)):
            yield f"weight_ih_l{layer}", conv_x.weight
            yield f"weight_hh_l{layer}", conv_h.weight
            yield f"bias_l{layer}", conv_x.bias

    def grads(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, weight.grad) for name, weight in self.weights())


@torch.no_grad()
def load_weights(model: CatConvLSTM | HoistedConvLSTM, weights: dict[str, Tensor]) -> None:
    """Copy weights under the names of convfast.ConvLSTM into an opponent."""
    for name, weight in model.weights():
        weight.copy_(weights[name])


class PermutedConv1dLSTM(nn.Module):
    """Conv1d → ReLU → Conv1d → ReLU with features before time, then nn.LSTM; parameters named as convfast.Conv1dLSTM's.

    input [B, T, F], lengths [B] (every sample gives what it gives alone) -> the LSTM's output [B, T, hidden].
    """

    def __init__(self, features: int, conv: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.conv = nn.ModuleList(
            nn.Conv1d(cin, cout, 3, padding=1) for cin, cout in ((features, conv), (conv, 2 * conv))
        )
        self.lstm = nn.LSTM(2 * conv, hidden, layers, batch_first=True)

    def forward(self, input: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.convolve(input, lengths)
        if lengths is None:
            return self.lstm(x)[0]
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])[0]

    def convolve(self, input: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, T, F] -> [B, T, 2 * conv]; past a length it is not defined, and packing drops it."""
        x = input.permute(0, 2, 1)
        inside = None if lengths is None else (torch.arange(x.shape[2]) < lengths[:, None, None]).to(x.device)
        for conv in self.conv:
            x = torch.relu(conv(x if inside is None else x * inside))
        return x.permute(0, 2, 1)
