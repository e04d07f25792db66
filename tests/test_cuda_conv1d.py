"""The GEMM of conv1d's CUDA kernels, both ways: every tile of it, whatever the order of threads and blocks."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.cases import Conv1dCase, name_of
from tests.test_conv1d import check

OPS = ("conv1d",)
pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Sizes that take the tile forward. With one processor every tile "fills" the GPU, with 132 none does.
TILES = {
    "128x128": (1, Conv1dCase("128x128", time=50, features=72, channels=136)),
    "128x64": (1, Conv1dCase("128x64", time=50, features=136, channels=61)),
    "64x64": (132, Conv1dCase("64x64", batch=2, time=40, features=136, channels=70)),
    "128x32": (1, Conv1dCase("128x32", time=50, features=40, channels=8)),
}
OPTIONS = {
    "plain": {},
    "channels_first": {"padding": "same", "channels_first": True},
    "lengths": {"padding": 2, "activation": "silu"},
    "circular": {"padding": 4, "padding_mode": "circular", "dilation": 2, "activation": "relu"},
    "stride": {"padding": 1, "stride": 2},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("dtype", "seed"), [(torch.bfloat16, 0), (torch.float16, 1)], ids=name_of)
def test_every_tile_matches_oracle(
    tile: str, options: str, dtype: torch.dtype, seed: int, cuda_ops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    processors, case = TILES[tile]
    lengths = (case.time, 0, 3)[: case.batch] if options == "lengths" else None
    monkeypatch.setenv("CONVFAST_CUDA_SM_COUNT", str(processors))
    monkeypatch.setenv("CONVFAST_EMULATE_SEED", str(seed))
    check(replace(case, options=OPTIONS[options], lengths=lengths), dtype, "cuda", time_major=seed == 1)
