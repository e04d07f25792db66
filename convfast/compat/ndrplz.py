"""Checkpoints of ndrplz/ConvLSTM_pytorch and its copies (torchgeo, satflow, conv-lstm): one convolution a cell, over
input and h side by side, without peepholes; else the same equations as ours."""

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

STACKED = "cell_list.{}."  # prefix of a layer's names


def convert_cell(
    state_dict: MutableMapping[str, Tensor], source: str, ours: Mapping[str, str], peephole: bool
) -> list[str]:
    """Put the weights of one original cell, in place, under our names.

    `{source}conv.weight` `[4C, Cin + C, *K]` becomes weight_ih `[4C, Cin, *K]` and weight_hh `[4C, C, *K]`, and
    `{source}conv.bias` `[4C]`, which few of its checkpoints lack, becomes bias; there the gates are i, f, o, g.
    Nothing is done where the weight is missing.

    Args:
        ours: our names of weight_ih, weight_hh and bias.
        peephole: not used, these cells have none.

    Returns:
        Error messages: a shape is not that of such a cell.
    """
    weight, bias = (state_dict.get(f"{source}conv.{name}") for name in ("weight", "bias"))
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor | None):
        return []
    channels = weight.shape[0] // 4 if weight.ndim > 2 else 0
    if channels == 0 or weight.shape[0] % 4 or weight.shape[1] <= channels:
        return [f"{source}conv.weight has shape {list(weight.shape)}, expected [4C, Cin + C, *K]"]
    if bias is not None and tuple(bias.shape) != (4 * channels,):
        return [f"{source}conv.bias has shape {list(bias.shape)}, expected [{4 * channels}]"]
    weight = _ifgo(state_dict.pop(f"{source}conv.weight"))
    state_dict[ours["weight_ih"]] = weight[:, :-channels].contiguous()
    state_dict[ours["weight_hh"]] = weight[:, -channels:].contiguous()
    if bias is not None:
        state_dict[ours["bias"]] = _ifgo(state_dict.pop(f"{source}conv.bias"))
    return []


def _ifgo(ifog: Tensor) -> Tensor:
    i, f, o, g = ifog.chunk(4)
    return torch.cat([i, f, g, o])
