"""`import convfast.flops`: from then on `torch.utils.flop_counter.FlopCounterMode` counts the ops of convfast.

Two operations a product, as torch counts, of direct convolutions whatever the algorithm, and of all steps whatever
`lengths`; what is pointwise does not count. Importing it may build the native library.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import backends
from .reference.conv1d import output_length

Shape = Sequence[int]


def conv_lstm_forward(x: Shape | None, w_ih: Shape | None, w_hh: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
    batch, time, _, *space = out_shape[0]
    return 2 * batch * time * prod(space) * (prod(w_ih or [0]) + prod(w_hh))


def conv_lstm_backward(
    dh: Shape | None, dh_n: Shape | None, dc_n: Shape | None, x: Shape | None, w_ih: Shape | None, w_hh: Shape,
    *others: Any, **_: Any,
) -> int:  # fmt: skip
    (batch, time, _, *space), needs = others[5], others[-1]
    pixels = batch * time * prod(space)
    # No gradient goes further back than the first step where there is no h0.
    recurrent = pixels * (1 + needs[2]) - (0 if needs[5] else batch * prod(space))
    return 2 * (pixels * (needs[0] + needs[1]) * prod(w_ih or [0]) + recurrent * prod(w_hh))


def conv1d_forward(x: Shape, weight: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * prod(out_shape[0][:2]) * prod(weight)


def conv1d_backward(dy: Shape, x: Shape, weight: Shape, *others: Any, **_: Any) -> int:
    needs = others[-1]
    return 2 * prod(dy[:2]) * prod(weight) * (needs[0] + needs[1])


def lstm_forward(x: Shape, *weights: Any, **_: Any) -> int:
    matrices = [weights[i] or [0] for i in (0, 1, 4, 5, 6, 9)]
    return 2 * prod(x[:2]) * sum(map(prod, matrices))


def lstm_backward(dy: Shape | None, dh_n: Shape | None, dc_n: Shape | None, x: Shape, *others: Any, **_: Any) -> int:
    weights, needs = others[:10], others[-1]
    total = 0
    for first in (0, 5):
        w_ih, w_hh, w_hr = (prod(weights[first + i] or [0]) for i in (0, 1, 4))
        own = needs[1 + first :]
        total += prod(x[:2]) * ((needs[0] + own[0]) * w_ih + (1 + own[1]) * w_hh + (1 + own[4]) * w_hr)
        total -= 0 if needs[11] else x[0] * w_hh
    return 2 * total


def lstm_layers(
    x: Shape, weights: Sequence[Shape], peepholes: Any, bias: bool, projection: bool, bidirectional: bool, h0: Any,
    c0: Any, lengths: Any, head: Shape | None, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 2 * prod(x[:2]) * (sum(prod(w) for w in weights if len(w) == 2) + prod(head or [0]))


def conv1d_lstm_layers(
    x: Shape, convolutions: Sequence[Shape], conv_bias: bool, stride: Shape, padding: Shape, dilation: Shape,
    groups: Shape, padding_mode: str, activation: str, weights: Sequence[Shape], peepholes: Any, bias: bool,
    projection: bool, bidirectional: bool, h0: Any, c0: Any, head: Shape | None, *_: Any, **__: Any,
) -> int:  # fmt: skip
    (batch, time, _), total = x, 0
    for i, weight in enumerate(convolutions[:: 1 + conv_bias]):
        time = output_length(time, weight[2], stride[i], padding[2 * i : 2 * i + 2], dilation[i])
        total += 2 * batch * time * prod(weight)
    return total + lstm_layers((batch, time), weights, peepholes, bias, projection, bidirectional, h0, c0, None, head)


def conv1d_gates(x: Shape, weight: Shape, *others: Any, out_shape: Any, **_: Any) -> int:
    return 2 * prod(out_shape[:2]) * (prod(weight) + prod(others[7]))


def lstm_from_gates(
    gates: Shape, w_hh: Shape, peephole: Any, w_hr: Shape | None, w_hh_r: Shape | None, peephole_r: Any,
    w_hr_r: Shape | None, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 2 * prod(gates[:2]) * sum(prod(w or [0]) for w in (w_hh, w_hr, w_hh_r, w_hr_r))


FORMULAS: tuple[Callable[..., int], ...] = (
    conv_lstm_forward, conv_lstm_backward, conv1d_forward, conv1d_backward, lstm_forward, lstm_backward, lstm_layers,
    conv1d_lstm_layers, conv1d_gates, lstm_from_gates,
)  # fmt: skip

for _namespace in {space for name, space in backends.NAMESPACES.items() if backends.why_not("lstm", name) is None}:
    for _formula in FORMULAS:
        if _packet := getattr(getattr(torch.ops, _namespace), _formula.__name__, None):
            register_flop_formula(_packet)(_formula)
