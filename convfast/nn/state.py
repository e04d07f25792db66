"""What a stack of layers returns as its state."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from ..ops.checks import kind

Pair = tuple[Tensor, Tensor]


class ConvLSTMState(tuple):
    """`(h, c)` of the last layer; `layers` has the pair of every layer, so that it can be passed back in.

    Args:
        layers: a pair per layer; or h and c, for one layer: all that code which iterates over a state finds in it.

    Raises:
        TypeError: `layers` is something else.
    """

    layers: tuple[Pair, ...]

    def __new__(cls, layers: Iterable[Pair] | Iterable[Tensor]) -> "ConvLSTMState":
        found = tuple(layers) if isinstance(layers, Iterable) and not isinstance(layers, Tensor) else ()
        if len(found) == 2 and all(isinstance(part, Tensor) for part in found):
            found = (found,)
        if not found or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in found):
            raise TypeError(f"ConvLSTMState: layers is {kind(layers)}, expected pairs (h, c), one per layer")
        state = super().__new__(cls, found[-1])
        state.layers = found
        return state

    def __getnewargs__(self) -> tuple[tuple[Pair, ...]]:
        return (self.layers,)


# torch.export only lets types in and out that it can take apart.
_pytree.register_pytree_node(
    ConvLSTMState,
    lambda state: ([list(state.layers)], None),
    lambda children, _: ConvLSTMState(children[0]),
    flatten_with_keys_fn=lambda state: ([(_pytree.GetAttrKey("layers"), list(state.layers))], None),
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


# torch.load(weights_only=True) only makes types that it knows of.
torch.serialization.add_safe_globals([ConvLSTMState, ConvTail, Conv1dLSTMState])
