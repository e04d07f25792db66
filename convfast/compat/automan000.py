"""Checkpoints of automan000/Convolutional_LSTM_PyTorch: eight convolutions a cell, the same equations as ours."""

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

_GATES = "ifco"  # our i, f, g, o; what we call g is c there
_PEEPHOLES = "ifo"


def convert_cell(
    state_dict: MutableMapping[str, Tensor], source: str, prefix: str, suffix: str, peephole: Tensor | None
) -> list[str]:
    """Put the weights of one original cell, in place, under our names.

    `{source}Wx?.weight/.bias` and `{source}Wh?.weight` (? = i, f, c, o) become `{prefix}weight_ih{suffix}`
    `[4C, Cin, k, k]`, `{prefix}bias{suffix}` `[4C]` and `{prefix}weight_hh{suffix}` `[4C, C, k, k]`. The peepholes
    `{source}Wc?` `[1, C, H, W]` (? = i, f, o), which few of its checkpoints have, become `{prefix}peephole{suffix}`
    `[3, C, H, W]`. Nothing is done where a weight is missing.

    Args:
        peephole: the peephole parameter of the module that loads; None where it has none.

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
    for ours, theirs in names.items():
        state_dict[f"{prefix}{ours}{suffix}"] = torch.cat([state_dict.pop(name) for name in theirs])

    theirs = [f"{source}Wc{gate}" for gate in _PEEPHOLES]
    found = [state_dict.pop(name) for name in theirs] if all(name in state_dict for name in theirs) else None
    if peephole is not None and found is not None:
        state_dict[f"{prefix}peephole{suffix}"] = torch.cat(found)
    elif peephole is not None and not isinstance(peephole, UninitializedParameter):
        state_dict[f"{prefix}peephole{suffix}"] = torch.zeros_like(peephole)
    elif found is not None and any(p.count_nonzero() for p in found):
        return [f"{', '.join(theirs)} are peepholes that are not zero, expected zeros (pass peephole=True to use them)"]
    return []
