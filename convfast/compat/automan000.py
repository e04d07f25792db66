"""Checkpoints of automan000/Convolutional_LSTM_PyTorch: eight convolutions a cell, the same equations as ours."""

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

STACKED = "cell{}."  # prefix of a layer's names

_GATES = "ifco"  # our i, f, g, o; what we call g is c there
_PEEPHOLES = "ifo"


def convert_cell(
    state_dict: MutableMapping[str, Tensor], source: str, ours: Mapping[str, str], peephole: bool
) -> list[str]:
    """Put the weights of one original cell, in place, under our names.

    `{source}Wx?.weight/.bias` and `{source}Wh?.weight` (? = i, f, c, o) become weight_ih `[4C, Cin, k, k]`, bias `[4C]`
    and weight_hh `[4C, C, k, k]`. The peepholes `{source}Wc?` `[1, C, H, W]` (? = i, f, o), which few of its
    checkpoints have, become peephole `[3, C, H, W]`. Nothing is done where a weight is missing.

    Args:
        ours: our names of weight_ih, weight_hh, bias and peephole.
        peephole: whether the module that loads has one.

    Returns:
        Error messages: the checkpoint has peepholes that are not zero and the module has none.
    """
    names = {
        "weight_ih": [f"{source}Wx{gate}.weight" for gate in _GATES],
        "weight_hh": [f"{source}Wh{gate}.weight" for gate in _GATES],
        "bias": [f"{source}Wx{gate}.bias" for gate in _GATES],
    }
    if not all(name in state_dict for group in names.values() for name in group):
        return []
    for name, theirs in names.items():
        state_dict[ours[name]] = torch.cat([state_dict.pop(name) for name in theirs])

    theirs = [f"{source}Wc{gate}" for gate in _PEEPHOLES]
    if not all(name in state_dict for name in theirs):
        return []
    found = [state_dict.pop(name) for name in theirs]
    if peephole:
        state_dict[ours["peephole"]] = torch.cat(found)
    elif any(p.count_nonzero() for p in found):
        return [f"{', '.join(theirs)} are peepholes that are not zero, expected zeros (pass peephole=True to use them)"]
    return []
