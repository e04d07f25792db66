"""Other runtimes, when they are installed: inference of an exported eager loop."""

import io
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]
Run = Callable[[], Tensor]


class Absent(Exception):
    """The runtime cannot take part; the message says why."""


class _Loop(nn.Module):
    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model  # a tracer wants the parameters registered, not just closed over by `forward`
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def _require(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise Absent(f"not installed ({error})") from None


def onnxruntime(model: nn.Module, forward: Forward, x: Tensor) -> Run:
    runtime = _require("onnxruntime")
    _require("onnx")
    _require("onnxscript")
    exported = io.BytesIO()
    torch.onnx.export(_Loop(model, forward), (x,), dynamo=True, verbose=False).save(exported)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(exported.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(model: nn.Module, forward: Forward, x: Tensor) -> Run:
    runtime = _require("openvino")
    converted = runtime.convert_model(_Loop(model, forward), example_input=x, input=list(x.shape))
    # OpenVINO picks bfloat16 by itself where the CPU has it; everyone here computes in float32.
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    request = runtime.compile_model(converted, "CPU", settings).create_infer_request()
    feed = {0: x.numpy()}
    return lambda: torch.from_numpy(request.infer(feed)[0])


BUILDERS: dict[str, Callable[[nn.Module, Forward, Tensor], Run]] = {
    "ONNX Runtime": onnxruntime,
    "OpenVINO": openvino,
}
