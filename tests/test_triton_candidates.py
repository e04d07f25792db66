"""Every tile size that may be measured gives the right results, and measuring leaves nothing behind."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests.cases import BY_ID, CONV1D, Case
from tests.test_conv1d import check as check_conv1d
from tests.test_conv_lstm import check as check_conv_lstm

pytestmark = pytest.mark.usefixtures("poisoned_memory", "triton_ops")
# One tile of 32 channels, or two of 16.
CASES = (Case("hidden_20", time=2, hidden=20), BY_ID["no_input_lengths"])


@pytest.fixture(autouse=True)
def last_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    tune = pytest.importorskip("convfast.triton.tune")

    def best(name: str, key: Any, like: Any, candidates: Sequence[Any], run: Callable[[Any], object]) -> Any:
        for candidate in candidates:
            run(candidate)
        return candidates[-1]

    monkeypatch.setattr(tune, "best", best)


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_conv_lstm(case: Case, memory: str) -> None:
    check_conv_lstm(case, torch.float32, "triton", memory=memory)


@pytest.mark.parametrize("name", ["features_33_channels_70", "everything"])
def test_conv1d(name: str) -> None:
    check_conv1d(CONV1D[name], torch.float32, "triton")
