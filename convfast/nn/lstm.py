"""`torch.nn.LSTM` as one op a layer or one for all, and the LSTM with a regression head."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ..backends import check_name
from ..ops import lstm
from ..ops.checks import check_count, check_dense, check_pair, needs_function
from ..ops.lstm import backend_of_layers, lstm_layers
from .hooks import plain
from .options import check_dropout, check_dtype
from .scripted_lstm import ScriptedLSTM, ScriptedRegLSTM
from .state import Pair


class LSTM(nn.RNNBase):
    """`torch.nn.LSTM` with the same arguments, parameters, initial values and checkpoints; each layer is one op,
    without gradients all layers are one with the compiled backends (`cpu`, `cuda`).

    i = σ(W_xi x + W_hi h + p_i∘c + b_i), f = σ(W_xf x + W_hf h + p_f∘c + b_f), g = tanh(W_xg x + W_hg h + b_g),
    c' = f∘c + i∘g, o = σ(W_xo x + W_ho h + p_o∘c' + b_o), h' = o∘tanh(c'), or W_hr (o∘tanh(c')) with `proj_size`.

    Letters: B batch, T time, I input size, H hidden size, P size of h (`proj_size`, else H), L layers, D directions (2
    when bidirectional).

    Parameters of layer k, ending in `_reverse` for the backward direction: `weight_ih_l{k}` `[4H, I or D·P]`,
    `weight_hh_l{k}` `[4H, P]`, `bias_ih_l{k}` and `bias_hh_l{k}` `[4H]`, `weight_hr_l{k}` `[P, H]`; gates in the order
    i, f, g, o. With `peephole` also `peephole_l{k}` `[3, H]` in the order i, f, o, which starts at zero.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as in
            `torch.nn.LSTM`.
        peephole: train peepholes: i and f look at the cell state before the step, o at the one after it.
        backend: a name from `convfast.available("lstm")`; None takes the best.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what was expected and what came.

    `torch.jit.script` gives a model for inference, and puts it into a model that holds this module: to go on training
    that, script `copy.deepcopy(model)`, see `convfast.nn.scripted_lstm`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        peephole: bool = False,
        backend: str | None = None,
    ) -> None:
        owner = type(self).__name__
        input_size = check_count(owner, "input_size", input_size, 1)
        hidden_size = check_count(owner, "hidden_size", hidden_size, 1)
        num_layers = check_count(owner, "num_layers", num_layers, 1)
        proj_size = check_count(owner, "proj_size", proj_size, 0)
        if proj_size >= hidden_size:
            raise ValueError(f"{owner}: proj_size is {proj_size}, expected less than hidden_size={hidden_size}")
        check_dropout(owner, dropout)
        check_dtype(owner, dtype)
        check_name(owner, backend)
        sizes = (input_size, hidden_size, num_layers)
        super().__init__("LSTM", *sizes, bias, batch_first, dropout, bidirectional, proj_size, device, dtype)
        self.peephole = peephole
        self.backend = backend
        for end in self.ends() if peephole else ():
            value = torch.zeros(3, hidden_size, device=device, dtype=dtype)
            self.register_parameter(f"peephole{end}", nn.Parameter(value))

    def forward(
        self, input: Tensor | PackedSequence, hx: Pair | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Pair]:
        """Run all layers over all steps.

        Args:
            input: `[T, B, I]` (`[B, T, I]` with `batch_first`), or `[T, I]` for a single sequence, in any memory
                layout; or a PackedSequence.
            hx: `(h, c)`, `[L·D, B, P]` and `[L·D, B, H]` (no B for a single sequence); None for zero.
            lengths: `[B]` integers in 0..T, instead of packing. The state stops at each sample's length and outputs
                past it are zero; the backward direction starts at each sample's own end.

        Returns:
            output: `[T, B, D·P]` of the last layer (`[B, T, D·P]` with `batch_first`), contiguous; `[T, D·P]` for a
                single sequence; packed where the input is.
            `(h, c)` after each sample's last step, shaped as `hx`; c is float32 for bfloat16 and float16.
        """
        return self.under(None, input, hx, lengths)

    def under(
        self, head: nn.Linear | None, input: Tensor | PackedSequence, hx: Pair | None, lengths: Tensor | None
    ) -> tuple[Tensor | PackedSequence, Pair]:
        """`forward` with the output, if it is not packed, sent through a linear layer."""
        owner = type(self).__name__
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError(f"{owner}: lengths is a Tensor, expected None with a PackedSequence")
            return self._packed(input, hx)
        if not isinstance(input, Tensor):
            raise TypeError(f"{owner}: input is a {type(input).__name__}, expected a Tensor or a PackedSequence")
        check_dense(owner, {"input": input})
        legend = "[B, T, I]" if self.batch_first else "[T, B, I]"
        if input.ndim not in (2, 3):
            raise ValueError(
                f"{owner}: input has {input.ndim} dims, expected 3, layout {legend}, or 2 for a single sequence "
                f"(input shape {list(input.shape)})"
            )
        if input.shape[-2 if self.batch_first else 0] == 0:
            raise ValueError(
                f"{owner}: input has 0 time steps, expected at least 1 (input shape {list(input.shape)}, layout "
                f"{legend if input.ndim == 3 else '[T, I]'})"
            )
        if input.ndim == 2:
            if lengths is not None:
                raise ValueError(f"{owner}: lengths is a Tensor, expected None with a single sequence")
            self.check_state(hx, ())
            hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
            output, (h, c) = self._layers(input.unsqueeze(0), hx, None, head=head)
            return output.squeeze(0), (h.squeeze(1), c.squeeze(1))
        return self.run(input if self.batch_first else input.transpose(0, 1), hx, lengths, head=head)

    def run(
        self,
        x: Tensor,
        hx: Pair | None,
        lengths: Tensor | None,
        first: Callable[..., tuple[Tensor, Pair]] = lstm,
        head: nn.Linear | None = None,
    ) -> tuple[Tensor, Pair]:
        """`under` on `[B, T, I]`; `first` takes the place of `lstm` in the first layer, and may take any x."""
        self.check_state(hx, (x.shape[0],))
        output, state = self._layers(x, hx, lengths, first, head)
        return output if self.batch_first else output.transpose(0, 1), state

    def _packed(self, input: PackedSequence, hx: Pair | None) -> tuple[PackedSequence, Pair]:
        # Samples stay in the order in which they were packed, longest first.
        _, batch_sizes, order, back = input
        padded, lengths = pad_packed_sequence(PackedSequence(input.data, batch_sizes), self.batch_first)
        self.check_state(hx, tuple(lengths.shape))
        if hx is not None and order is not None:
            hx = (hx[0].index_select(1, order), hx[1].index_select(1, order))
        output, (h, c) = self._layers(padded if self.batch_first else padded.transpose(0, 1), hx, lengths)
        if back is not None:
            h, c = h.index_select(1, back), c.index_select(1, back)
        if not self.batch_first:
            output = output.transpose(0, 1)
        data = pack_padded_sequence(output, lengths, self.batch_first).data
        return PackedSequence(data, batch_sizes, order, back), (h, c)

    def _layers(
        self,
        x: Tensor,
        hx: Pair | None,
        lengths: Tensor | None,
        first: Callable[..., tuple[Tensor, Pair]] = lstm,
        head: nn.Linear | None = None,
    ) -> tuple[Tensor, Pair]:
        """x `[B, T, I]` → output `[B, T, D·P]`, or that through `head`, and `(h, c)`, layer after layer."""
        if first is lstm and x.shape[2] != self.input_size:
            raise ValueError(
                f"{type(self).__name__}: input has {x.shape[2]} features, expected input_size={self.input_size}"
            )
        directions = self._directions()
        if first is lstm and not (self.dropout > 0 and self.training):
            weights, peepholes = self.weights_by_name(), self.peepholes()
            if backend := backend_of_layers(x, weights, (*peepholes, *(hx or ())), self.backend):
                inside = None if head is None else (head.weight, head.bias)
                if inside and needs_function(*inside):
                    inside = None
                options = self.options_of_layers()
                x, state = lstm_layers(
                    x, weights, peepholes, *options, hx, lengths, inside, not self.batch_first, backend
                )
                return x if inside else self._through(head, x), state
        last = []
        for k in range(self.num_layers):
            if k > 0 and self.dropout > 0:
                x = F.dropout(x, self.dropout, self.training)
            rows = slice(k * len(directions), (k + 1) * len(directions))
            x, pair = (lstm if k > 0 else first)(
                x,
                *self.weights(k, ""),
                self.weights(k, "_reverse") if self.bidirectional else None,
                None if hx is None else (hx[0][rows], hx[1][rows]),
                lengths,
                # The rows of a step lie together where the next layer reads them.
                time_major=not self.batch_first or k + 1 < self.num_layers,
                backend=self.backend,
            )
            last.append(pair)
        x = self._through(head, x)
        if self.num_layers == 1:
            return x, last[0]
        h, c = (torch.cat(parts) for parts in zip(*last))
        return x, (h, c)

    def _through(self, head: nn.Linear | None, x: Tensor) -> Tensor:
        """x `[B, T, n]` through `head`, in the order of its memory."""
        if head is None:
            return x
        return head(x) if self.batch_first else head(x.transpose(0, 1)).transpose(0, 1)

    def weights_by_name(self) -> dict[str, Tensor]:
        """Those of `torch.nn.LSTM`, in its order."""
        # getattr() asks several others before it finds a parameter.
        own = self._parameters
        return {name: own[name] if name in own else getattr(self, name) for name in self._flat_weights_names}

    def peepholes(self) -> list[Tensor]:
        """Of each layer and direction; none where there are none."""
        return [getattr(self, f"peephole{end}") for end in self.ends()] if self.peephole else []

    def options_of_layers(self) -> tuple[bool, bool, bool]:
        """What weights there are: of biases, of projections, of a second direction."""
        return self.bias, self.proj_size > 0, self.bidirectional

    def weights(self, layer: int, direction: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(weight_ih, weight_hh, sum of the biases, peephole, weight_hr); `direction` is "" or "_reverse"."""

        def get(name: str) -> Tensor:
            return getattr(self, f"{name}_l{layer}{direction}")

        return (
            get("weight_ih"),
            get("weight_hh"),
            get("bias_ih") + get("bias_hh") if self.bias else None,
            get("peephole") if self.peephole else None,
            get("weight_hr") if self.proj_size > 0 else None,
        )

    def reset_parameters(self) -> None:
        """Draw weights and biases anew; peepholes become zero."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith("peephole"):
                nn.init.zeros_(parameter)

    # Of torch's LSTM, not of its base, whose state is h alone.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args
    permute_hidden = nn.LSTM.permute_hidden

    def flatten_parameters(self) -> None:
        """Does nothing: there is no other memory layout that would be faster."""

    def ends(self) -> list[str]:
        """How the names of parameters end, for each layer and direction in turn."""
        return [f"_l{k}{direction}" for k in range(self.num_layers) for direction in self._directions()]

    def _directions(self) -> list[str]:
        return ["", "_reverse"] if self.bidirectional else [""]

    def check_state(
        self, hx: Pair | None, batch: tuple[int, ...], owner: str | None = None, shown: str = "hx"
    ) -> None:
        """`owner` is the module that was called, if not this one, and `shown` its argument."""
        if hx is None:
            return
        owner = owner or type(self).__name__
        check_pair(owner, shown, hx)
        rows = self.num_layers * len(self._directions())
        for name, part, size in zip("hc", hx, (self.proj_size or self.hidden_size, self.hidden_size)):
            if tuple(part.shape) != (rows, *batch, size):
                expected = [rows, *batch, size]
                raise ValueError(f"{owner}: {name} of {shown} has shape {list(part.shape)}, expected {expected}")

    def __prepare_scriptable__(self) -> nn.Module:
        return ScriptedLSTM(self)

    def extra_repr(self) -> str:
        more = ", peephole=True" if self.peephole else ""
        return super().extra_repr() + more + (f", backend={self.backend!r}" if self.backend else "")


def takes(rnn: nn.Module, head: nn.Module) -> bool:
    """Whether `under` may stand for the calls of the two modules: nobody watches them or has replaced them."""
    return plain(rnn, LSTM) and type(head) is nn.Linear and plain(head, nn.Linear)


class RegLSTM(nn.Module):
    """An LSTM and a linear regression to one number at every step.

    Parameters are those of `rnn`, an `LSTM` that takes time first, and of `reg`, a `torch.nn.Linear`.

    Args:
        input_size, hidden_size, num_layers: of the LSTM.
        backend, device, dtype: as in `LSTM`.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what was expected and what came.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.rnn = LSTM(input_size, hidden_size, num_layers, backend=backend, **factory)
        self.reg = nn.Linear(hidden_size, 1, **factory)

    def forward(self, input: Tensor) -> Tensor:
        """input `[T, B, I]` → `[T, B, 1]`."""
        if not isinstance(input, Tensor):
            raise TypeError(f"{type(self).__name__}: input is a {type(input).__name__}, expected a Tensor")
        if not takes(self.rnn, self.reg):
            return self.reg(self.rnn(input)[0])
        return self.rnn.under(self.reg, input, None, None)[0]

    def __prepare_scriptable__(self) -> nn.Module:
        return ScriptedRegLSTM(self, takes(self.rnn, self.reg))
