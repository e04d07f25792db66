"""Convolutions and the LSTM on top of them in one op, without gradients; what users call is in `nn`."""

from collections.abc import Sequence

from torch import Tensor, library

from .. import backends
from ..reference.padded_conv import output_length
from .lstm import backend_of_layers, empty_of_layers


def backend_of_all(
    input: Tensor,
    convolutions: Sequence[Tensor],
    weights: dict[str, Tensor],
    others: Sequence[Tensor | None],
    backend: str | None,
) -> str | None:
    """That of the op where it can take the place of `conv1d` and `lstm`, else None."""
    tensors = [t for t in (*convolutions, *others) if t is not None]
    if (name := backend_of_layers(input, weights, tensors, backend)) != "cpu":
        return None
    # Of tensors on several devices the dispatcher would pick one's kernel.
    return name if all(t.device == input.device for t in (*weights.values(), *tensors)) else None


def conv1d_lstm_layers(
    input: Tensor,
    convolutions: Sequence[Tensor],
    conv_bias: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: list[int],
    padding_mode: str,
    activation: str,
    weights: dict[str, Tensor],
    peepholes: Sequence[Tensor],
    bias: bool,
    projection: bool,
    bidirectional: bool,
    state: tuple[Tensor, Tensor] | None,
    head: tuple[Tensor, Tensor | None] | None,
    time_major: bool,
    backend: str,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`conv1d` for each of the convolutions, then `lstm_layers`, in one call of `backend_of_all`.

    Args:
        input: `[B, T, F]`, any memory layout.
        convolutions: weight of each, with `conv_bias` also its bias.
        stride, dilation, groups: a number for each; padding: two, before and behind.
        weights, peepholes, state, head: as `lstm_layers` takes them, as are the options between.

    Raises:
        RuntimeError: an argument is wrong; `conv1d` and `lstm` name it better.
    """
    y, h, c = backends.function(backend, "conv1d_lstm_layers")(
        input, convolutions, conv_bias, stride, padding, dilation, groups, padding_mode, activation,
        list(weights.values()), peepholes, bias, projection, bidirectional, *(state or (None, None)),
        *(head or (None, None)), time_major,
    )  # fmt: skip
    return y, (h, c)


def register_fakes(namespace: str) -> None:
    """Shapes and strides of the op in `namespace`; csrc/ops.h has the contract."""
    if namespace not in (backends.NAMESPACES[name] for name in backends.COMPILED):
        return

    @library.register_fake(f"{namespace}::conv1d_lstm_layers")
    def _(
        x: Tensor,
        convolutions: list[Tensor],
        conv_bias: bool,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: list[int],
        padding_mode: str,
        activation: str,
        weights: list[Tensor],
        peepholes: list[Tensor],
        bias: bool,
        projection: bool,
        bidirectional: bool,
        h0: Tensor | None,
        c0: Tensor | None,
        head: Tensor | None,
        head_bias: Tensor | None,
        time_major: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, time, _ = x.shape
        for k, weight in enumerate(convolutions[:: 1 + conv_bias]):
            time = output_length(time, weight.shape[2], stride[k], padding[2 * k : 2 * k + 2], dilation[k])
        return empty_of_layers(batch, time, weights, bias, projection, bidirectional, head, time_major)
