"""float32 products in TF32, as torch's convolutions on a GPU have them by default: as near to float64 as float16 is,
which has as many bits."""

import pytest
import torch
from torch import Tensor

from tests.cases import normal
from tests.oracle import assert_close_to_oracle
from tests.test_gpu_graphs import MODELS

OPS = ("conv_lstm", "lstm", "conv1d")


def results(name: str, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build(backend=backend)
    x = normal(shape, torch.Generator().manual_seed(0))
    model, x = model.to(dtype), x.to(dtype).requires_grad_()
    output = model(x)[0]
    output.sin().sum().backward()
    return {"output": output.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_errors_in_tf32(name: str, kernel_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel_backend == "cpu":
        pytest.skip("a CPU has no TF32")
    exact, half = (results(name, "reference", dtype) for dtype in (torch.float64, torch.float16))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for key, found in results(name, kernel_backend, torch.float32).items():
        assert_close_to_oracle(found, exact[key], half[key], key)
