"""What a stack of layers returns as its state."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.utils import _pytree

Pair = tuple[Tensor, Tensor]


class ConvLSTMState(tuple):
    """`(h, c)` of the last layer; `layers` has the pair of every layer, so that it can be passed back in."""

    layers: tuple[Pair, ...]

    def __new__(cls, layers: Sequence[Pair]) -> "ConvLSTMState":
        state = super().__new__(cls, layers[-1])
        state.layers = tuple(layers)
        return state

    def __getnewargs__(self) -> tuple[tuple[Pair, ...]]:
        return (self.layers,)


# torch.export only lets types in and out that it can take apart.
_pytree.register_pytree_node(
    ConvLSTMState,
    lambda state: ([list(state.layers)], None),
    lambda children, _: ConvLSTMState(children[0]),
    serialized_type_name="convfast.nn.ConvLSTMState",
)


class ConvTail(NamedTuple):
    """What a convolution over a sequence that comes in chunks still needs."""

    frames: Tensor  # [B, n, F], the last inputs, from the first one that the next output reads
    skip: int  # how many inputs to come are read by no output


class Conv1dLSTMState(NamedTuple):
    """Where `Conv1dLSTM.step` is in its sequence."""

    conv: list[ConvTail]
    lstm: Pair | None
