"""CUDA graphs: a captured call gives, on new input, what the call gives. Runs on a GPU only."""

import pytest
import torch
from torch import nn

import convfast

OPS = ("conv_lstm", "lstm", "conv1d")
MODELS = {
    "ConvLSTM": (lambda **to: convfast.ConvLSTM(3, [16, 8], 3, **to), (2, 4, 3, 12, 10)),
    "Conv1dLSTM": (lambda **to: convfast.Conv1dLSTM(5, [16, 32], 64, 3, 2, **to), (3, 20, 5)),
    "LSTM": (lambda **to: convfast.LSTM(16, 32, batch_first=True, **to), (3, 20, 16)),
}


class Output(nn.Module):
    """A model's output without its state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)[0]


@pytest.fixture(params=list(MODELS))
def model_and_shape(request: pytest.FixtureRequest, kernel_backend: str) -> tuple[nn.Module, tuple[int, ...]]:
    if torch.get_default_device().type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    build, shape = MODELS[request.param]
    return Output(build(backend=kernel_backend, dtype=torch.bfloat16)), shape


def test_captured_inference_equals_call(model_and_shape):
    model, shape = model_and_shape
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    other = torch.randn_like(x)
    with torch.inference_mode():
        expected = model(other).clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(x)  # compiles and chooses before the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(x)
        x.copy_(other)
        graph.replay()
    torch.testing.assert_close(output, expected)


def test_captured_training_step_equals_call(model_and_shape):
    model, shape = model_and_shape
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    wanted = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).float().square().sum(), wanted)
    captured = torch.cuda.make_graphed_callables(model, (torch.randn_like(x, requires_grad=True),))
    got = torch.autograd.grad(captured(x).float().square().sum(), wanted)
    torch.testing.assert_close(got, expected)
