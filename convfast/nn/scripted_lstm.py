"""What `torch.jit.script` makes of the LSTM and Conv1d modules: native ops, for inference.

Calls and results are those of the modules, without PackedSequence and `step`. Weights are shared with the module that
was scripted, as buffers; there are no gradients and no dropout. `torch.jit.script(model)` puts these modules into
`model` itself, too: to go on training it, script `copy.deepcopy(model)`, see `convfast.nn.scripted`.
"""

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from .scripted import Twin, integers

if TYPE_CHECKING:
    from .conv1d import Conv1d
    from .conv1d_lstm import CNN_LSTM, Conv1dLSTM
    from .lstm import LSTM, RegLSTM


class ScriptedConv1d(Twin):
    def __init__(self, module: "Conv1d") -> None:
        super().__init__(module)
        self.register_buffer("weight", module.weight.detach())
        self.register_buffer("bias", None if module.bias is None else module.bias.detach())
        self.kernel_size, self.stride, self.dilation = module.kernel_size, module.stride, module.dilation
        self.groups, self.padding_mode, self.activation = module.groups, module.padding_mode, module.activation
        self.channels_first = module.channels_first
        self.pads = list(module.pads())

    def forward(self, input: Tensor, lengths: Tensor | None = None) -> Tensor:
        single = input.dim() == 2 and lengths is None
        if input.dim() != 3 and not single:
            raise ValueError(f"{self.owner}: input has {input.dim()} dims, expected 3, or 2 for a single sequence")
        x = input.unsqueeze(0) if single else input
        x = x.transpose(1, 2) if self.channels_first else x
        if lengths is not None:
            lengths = integers(self.owner, lengths)
        y, _ = torch.ops.convfast.conv1d_forward(
            x, self.weight, self.bias, lengths, self.stride, self.pads, self.dilation, self.groups, self.padding_mode,
            self.activation, False, False,
        )  # fmt: skip
        return y.squeeze(0) if single else y

    @torch.jit.export
    def output_lengths(self, lengths: Tensor) -> Tensor:
        lengths = integers(self.owner, lengths)
        extent = self.dilation * (self.kernel_size - 1) + 1
        found = ((lengths + (self.pads[0] + self.pads[1] - extent)) // self.stride + 1).clamp(min=0)
        return torch.where(lengths > 0, found, torch.zeros_like(found))


class _LSTMWeights(nn.Module):
    """Of one layer in one direction."""

    def __init__(self, module: "LSTM", end: str) -> None:
        super().__init__()
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "peephole"):
            value = getattr(module, name + end, None)
            self.register_buffer(name, None if value is None else value.detach())

    def forward(self) -> list[Tensor]:
        found = [self.weight_ih, self.weight_hh]
        for value in (self.bias_ih, self.bias_hh, self.weight_hr):
            if value is not None:
                found.append(value)
        return found


class ScriptedLSTM(Twin):
    def __init__(self, module: "LSTM") -> None:
        super().__init__(module)
        self.input_size = module.input_size
        self.batch_first = module.batch_first
        self.bias, self.projected, self.bidirectional = module.bias, module.proj_size > 0, module.bidirectional
        self.layers = nn.ModuleList(_LSTMWeights(module, end) for end in module.ends()).train(module.training)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.under(None, None, input, hx, lengths)

    @torch.jit.export
    def under(
        self,
        head: Tensor | None,
        head_bias: Tensor | None,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`forward` with the output sent through a linear layer."""
        single = input.dim() == 2
        if input.dim() != 3 and not single:
            raise ValueError(f"{self.owner}: input has {input.dim()} dims, expected 3, or 2 for a single sequence")
        if input.size(-1) != self.input_size:
            found, expected = input.size(-1), self.input_size
            raise ValueError(f"{self.owner}: input has {found} features, expected input_size={expected}")
        if hx is not None and hx[0].size(0) != len(self.layers):
            raise ValueError(f"{self.owner}: hx has {hx[0].size(0)} rows, expected {len(self.layers)}")
        time_first = not self.batch_first and not single
        x = input.unsqueeze(0) if single else input.transpose(0, 1) if time_first else input
        if lengths is not None:
            lengths = integers(self.owner, lengths)
        h: Tensor | None = None
        c: Tensor | None = None
        if hx is not None:
            h, c = hx[0], hx[1]
            if single:
                h, c = h.unsqueeze(1), c.unsqueeze(1)
        weights: list[Tensor] = []
        peepholes: list[Tensor] = []
        for layer in self.layers:
            weights += layer()
            peephole = layer.peephole
            if peephole is not None:
                peepholes.append(peephole)
        x, h_n, c_n = torch.ops.convfast.lstm_layers(
            x, weights, peepholes, self.bias, self.projected, self.bidirectional, h, c, lengths, head, head_bias,
            not self.batch_first,
        )  # fmt: skip
        if single:
            return x.squeeze(0), (h_n.squeeze(1), c_n.squeeze(1))
        return x.transpose(0, 1) if time_first else x, (h_n, c_n)


def _relisted(modules: nn.ModuleList | nn.ModuleDict) -> nn.ModuleList | nn.ModuleDict:
    """A list of its own: torch.jit.script replaces what it prepares in the list that it finds it in."""
    fresh = type(modules)(modules)
    fresh.training = modules.training
    return fresh


class ScriptedConv1dLSTM(Twin):
    def __init__(self, module: "Conv1dLSTM") -> None:
        super().__init__(module)
        self.conv, self.pools = _relisted(module.conv), _relisted(module.pools)
        self.lstm = module.lstm
        self.channels_first, self.batch_first = module.channels_first, module.batch_first

    def forward(
        self, input: Tensor, state: tuple[Tensor, Tensor] | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = input
        if self.channels_first:
            x = x.transpose(1, 2)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        for conv, pool in zip(self.conv, self.pools):
            x = pool(conv(x, lengths))
            if lengths is not None:
                lengths = pool.output_lengths(conv.output_lengths(lengths))
        return self.lstm(x if self.batch_first else x.transpose(0, 1), state, lengths)

    @torch.jit.export
    def output_lengths(self, lengths: Tensor) -> Tensor:
        for conv, pool in zip(self.conv, self.pools):
            lengths = pool.output_lengths(conv.output_lengths(lengths))
        return lengths


class ScriptedCNNLSTM(Twin):
    linear: Final[bool]

    def __init__(self, module: "CNN_LSTM", linear: bool) -> None:
        super().__init__(module)
        self.cnn = _relisted(module.cnn)
        self.lstm, self.fc = module.lstm, module.fc
        self.linear = linear

    def forward(self, input: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = input
        for conv in self.cnn.values():
            x = conv(x, lengths)
            if lengths is not None:
                lengths = conv.output_lengths(lengths)
        if self.linear:
            return self.lstm.under(self.fc.weight, self.fc.bias, x, None, lengths)[0]
        return self.fc(self.lstm(x, None, lengths)[0])


class ScriptedRegLSTM(Twin):
    linear: Final[bool]

    def __init__(self, module: "RegLSTM", linear: bool) -> None:
        super().__init__(module)
        self.rnn, self.reg = module.rnn, module.reg
        self.linear = linear

    def forward(self, input: Tensor) -> Tensor:
        if self.linear:
            return self.rnn.under(self.reg.weight, self.reg.bias, input, None, None)[0]
        return self.reg(self.rnn(input)[0])
