"""Every way to run a case: the opponents in plain torch, compiled, in other runtimes, and each convfast backend."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import convfast
from bench import runtimes
from bench.cases import Conv1dLSTMCase, ConvLSTMCase, GatesCase
from bench.harness import Contestant
from bench.reference_models import CatConvLSTM, HoistedConvLSTM, PermutedConv1dLSTM, load_weights, lstm_cell
from bench.setting import CPU, Setting
from convfast import backends
from convfast.ops.conv_lstm import WITH_WINOGRAD
from convfast.reference.conv_lstm import channels_last

Forward = Callable[..., Tensor]
OPPONENTS = {"cat": CatConvLSTM, "hoisted": HoistedConvLSTM}
# By the dims of a frame.
LAYERS = {2: convfast.ConvLSTM, 3: convfast.ConvLSTM3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"
LONG = 20  # steps of all layers, from where on compiling the unrolled loop takes minutes


class Problem:
    """Input, weights and output gradient of a ConvLSTM case; the same for everyone."""

    def __init__(self, case: ConvLSTMCase, setting: Setting = CPU) -> None:
        normal = setting.drawing()
        self.case, self.setting = case, setting
        frames = () if case.same_frame else (case.time,)
        shape = case.batch, *frames, case.channels, *case.space
        self.input, self.grad = normal(*shape), normal(*self.output_shape)
        torch.manual_seed(0)
        template = CatConvLSTM(case.channels, list(case.hidden), case.kernel, len(case.space))
        self.weights = {name: setting.place(weight.detach().clone()) for name, weight in template.weights()}

    @property
    def output_shape(self) -> tuple[int, ...]:
        case = self.case
        time = () if case.same_frame else (case.time,)
        return case.batch, *time, case.hidden[-1], *case.space

    def opponent(self, name: str, dtype: torch.dtype | None = None, channels_last: bool = False) -> nn.Module:
        case = self.case
        model = OPPONENTS[name](case.channels, list(case.hidden), case.kernel, len(case.space))
        model = model.to(self.setting.device, dtype or self.setting.dtype)
        load_weights(model, self.weights)
        return model.to(memory_format=CHANNELS_LAST[len(case.space)]) if channels_last else model

    def convfast(self, backend: str, memory: str = "fast", algorithm: str = "auto") -> nn.Module:
        case = self.case
        last = {"step": case.time, "effective_step": [case.time - 1]} if case.same_frame else {}
        options = {"memory": memory, "algorithm": algorithm, "backend": backend, **last}
        model = self.setting.place(LAYERS[len(case.space)](case.channels, list(case.hidden), case.kernel, **options))
        model.load_state_dict(self.weights)
        return model

    def opponent_forward(self, model: Callable[..., tuple[Tensor, object]]) -> Forward:
        if self.case.same_frame:
            return lambda x: model(x, None, self.case.time)[0][:, -1]
        return lambda x: model(x)[0]

    def convfast_forward(self, model: nn.Module) -> Forward:
        return (lambda x: model(x)[0][0]) if self.case.same_frame else (lambda x: model(x)[0])


def inference(name: str, kind: str, forward: Forward, *inputs: Tensor) -> Contestant:
    def run() -> Tensor:
        with torch.inference_mode():
            return forward(*inputs)

    return Contestant(name, kind, run, lambda output: {"output": output})


def training(
    name: str, kind: str, forward: Forward, x: Tensor, grad: Tensor, model: nn.Module, grads: Callable[[], Iterator]
) -> Contestant:
    """Forward and backward, gradients of the input and of every weight."""
    x = x.detach().requires_grad_()
    # The gradient comes in the layout of the output, as from a pointwise loss.
    laid_out: list[Tensor] = []

    def run() -> Tensor:
        x.grad = None
        model.zero_grad(set_to_none=True)
        output = forward(x)
        if not laid_out:
            laid_out.append(torch.empty_like(output).copy_(grad).detach())
        output.backward(laid_out[0])
        return output

    def collect(output: Tensor) -> dict[str, Tensor]:
        return {"output": output.detach(), "dx": x.grad.clone()} | {f"d{name}": g.clone() for name, g in grads()}

    return Contestant(name, kind, run, collect, [x, *model.parameters()])


def captured(build: Callable[[], Contestant]) -> Contestant:
    """The contestant, replayed as a CUDA graph; a compiled one has its own."""
    contestant = build()
    if contestant.kind == "compile":
        return contestant
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            contestant.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = contestant.run()
    return replace(contestant, run=graph.replay, collect=lambda _: contestant.collect(output))


def in_own_graphs(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled into CUDA graphs, whose last outputs are no longer needed when it is called again."""

    def run(*inputs: Tensor, **options: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return call(*inputs, **options)

    return run


def named_grads(model: nn.Module) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    return lambda: ((name, weight.grad) for name, weight in model.named_parameters())


def deciding_op(op: str) -> str:
    """The op whose backends are those of a row: the last one, where a row has several."""
    return {"conv1d_lstm": "lstm"}.get(op, op)


def usable_backends(op: str, setting: Setting) -> list[str]:
    """On a GPU those with kernels, where there are any: the reference there is eager, which takes part already."""
    op, device = deciding_op(op), setting.device
    usable = [name for name in reversed(backends.BACKENDS) if backends.why_not(op, name, device, setting.dtype) is None]
    return [name for name in usable if name != "reference"] or usable if device == "cuda" else usable


def modes_of_compile(setting: Setting, short: bool) -> dict[str, dict[str, object]]:
    """Label → options of torch.compile. On a GPU `short` keeps the fastest, not the quickest to compile."""
    if setting.captured:
        return {"compile max-autotune": {"mode": "max-autotune"}}
    modes = {"compile": {}, "compile max-autotune": {"mode": MAX_AUTOTUNE}}
    if short:
        del modes["compile" if setting.device == "cuda" else "compile max-autotune"]
    return modes


def conv_lstm(problem: Problem, train: bool, short: bool = False) -> dict[str, Callable[[], Contestant]]:
    """Everyone who takes part, built on demand; plain eager first. `short` leaves out the slowest to compile."""
    everyone: dict[str, Callable[[], Contestant]] = {}
    case, setting = problem.case, problem.setting
    on_gpu = setting.device == "cuda"

    def opponent(label: str, kind: str, name: str, last: bool, **compiled: object) -> None:
        label = f"{label} {name}" + (" channels_last" if last else "")

        def build() -> Contestant:
            if kind == "compile" and on_gpu and short and case.time * len(case.hidden) > LONG:
                raise runtimes.Absent("minutes of compilation, left out of --short")
            model = problem.opponent(name, channels_last=last)
            x = channels_last(problem.input, -1 - len(case.space)) if last else problem.input
            call = torch.compile(model, fullgraph=True, dynamic=False, **compiled) if kind == "compile" else model
            call = in_own_graphs(call) if kind == "compile" and setting.captured else call
            forward = problem.opponent_forward(call)
            if train:
                return training(label, kind, forward, x, problem.grad, model, model.grads)
            return inference(label, kind, forward, x)

        everyone[label] = build

    def ours(backend: str, memory: str, algorithm: str = "auto") -> None:
        label = f"convfast {backend}" + (f" {memory}" if train else "") + (" direct" if algorithm == "direct" else "")

        def build() -> Contestant:
            model = problem.convfast(backend, memory, algorithm)
            forward = problem.convfast_forward(model)
            if train:
                grads = named_grads(model)
                return training(label, "convfast", forward, problem.input, problem.grad, model, grads)
            return inference(label, "convfast", forward, problem.input)

        everyone[label] = build

    def runtime(name: str) -> None:
        def build() -> Contestant:
            model = problem.opponent("cat").eval()
            run = runtimes.BUILDERS[name](model, problem.opponent_forward(model), problem.input)
            return Contestant(name, "runtime", run, lambda output: {"output": output})

        everyone[name] = build

    for name in OPPONENTS:
        for last in (False, True):
            opponent("eager", "eager", name, last)
    for label, options in modes_of_compile(setting, short).items():
        if label == "compile" and not on_gpu:
            for name in ("cat",) if short else OPPONENTS:
                for last in (False, True):
                    opponent(label, "compile", name, last)
        else:
            opponent(label, "compile", "cat", True, **options)
    if not train and not on_gpu:
        opponent("compile frozen", "compile", "cat", True, options={"freezing": True})
        for name in runtimes.BUILDERS:
            runtime(name)
    for backend in usable_backends("conv_lstm", setting):
        for memory in ("fast", "lean") if train else ("fast",):
            ours(backend, memory)
        for memory in ("fast", "lean") if train else ("fast",):
            if backend in WITH_WINOGRAD:
                ours(backend, memory, "direct")
    return {name: partial(captured, build) for name, build in everyone.items()} if setting.captured else everyone


def conv_lstm_oracle(problem: Problem, train: bool) -> dict[str, Tensor]:
    """The copy-paste loop in float64."""
    model = problem.opponent("cat", torch.float64)
    forward = problem.opponent_forward(model)
    x, grad = problem.input.double(), problem.grad.double()
    if train:
        return training("oracle", "oracle", forward, x, grad, model, model.grads).results()
    return inference("oracle", "oracle", forward, x).results()


class Conv1dProblem:
    """Input, lengths, weights and output gradient of a Conv1d → LSTM case; the same for everyone."""

    def __init__(self, case: Conv1dLSTMCase, setting: Setting = CPU) -> None:
        normal = setting.drawing()
        self.case, self.setting = case, setting
        self.grad = normal(case.batch, case.time, case.hidden)
        self.lengths = torch.tensor(case.lengths) if case.varied else None
        torch.manual_seed(0)
        self.weights = setting.place(self._plain()).state_dict()
        while not hasattr(self, "input") or (setting.precision == "float32" and self._near_a_kink()):
            self.input = normal(case.batch, case.time, case.features)

    @torch.no_grad()
    def _near_a_kink(self) -> bool:
        """Whether rounding may carry an argument of a ReLU over zero, which would change a gradient by all it has."""
        found: list[list[Tensor]] = []
        for dtype in (torch.float64, torch.float32):
            model, arguments = self.opponent(dtype), []
            for conv in model.conv:
                conv.register_forward_hook(lambda _, __, output, to=arguments: to.append(output.double()))
            model.convolve(self.input.to(dtype), self.lengths)
            found.append(arguments)
        return any(exact.abs().min() < 2 * (exact - rounded).abs().max() for exact, rounded in zip(*found, strict=True))

    def _plain(self) -> PermutedConv1dLSTM:
        case = self.case
        return PermutedConv1dLSTM(case.features, case.conv, case.hidden, case.layers)

    def opponent(self, dtype: torch.dtype | None = None) -> PermutedConv1dLSTM:
        model = self._plain().to(self.setting.device, dtype or self.setting.dtype)
        model.load_state_dict(self.weights)
        return model

    def convfast(self, backend: str) -> nn.Module:
        case = self.case
        conv = [case.conv, 2 * case.conv]
        model = convfast.Conv1dLSTM(case.features, conv, case.hidden, 3, case.layers, backend=backend)
        self.setting.place(model).load_state_dict(self.weights)
        return model

    @torch.no_grad()
    def convolved(self) -> Tensor:
        """What the LSTM reads, right to rounding."""
        exact = self.opponent(torch.float64).convolve(self.input.double(), self.lengths)
        return self.setting.place(exact).contiguous()

    def contestant(
        self,
        name: str,
        kind: str,
        model: nn.Module,
        forward: Forward,
        train: bool,
        x: Tensor | None = None,
    ) -> Contestant:
        """`x`: another input than that of the problem."""
        x = self.input if x is None else x
        if train:
            return training(name, kind, forward, x, self.grad.to(x.dtype), model, named_grads(model))
        return inference(name, kind, forward, x)


def conv1d_lstm(problem: Conv1dProblem, train: bool, short: bool = False) -> dict[str, Callable[[], Contestant]]:
    """As conv_lstm."""
    lengths, setting = problem.lengths, problem.setting

    def opponent(name: str, kind: str, **compiled: object) -> Contestant:
        model = problem.opponent()
        # dynamo leaves nn.LSTM and packing to eager, so there is no full graph.
        call = torch.compile(model, dynamic=False, **compiled) if kind == "compile" else model
        call = in_own_graphs(call) if kind == "compile" and setting.captured else call
        return problem.contestant(name, kind, model, partial(call, lengths=lengths), train)

    def whole_graph(name: str) -> Contestant:
        if setting.device == "cuda":
            raise runtimes.Absent("unrolls nn.LSTM, which runs as one call of cuDNN")
        if train:
            raise runtimes.Absent("training unrolls nn.LSTM: minutes of compilation, and more with every step")
        if lengths is not None:
            raise runtimes.Absent("packed sequences break the graph")
        model = problem.opponent()
        call = torch.compile(model, fullgraph=True, dynamic=False)
        with torch._dynamo.config.patch(allow_rnn=True), torch.inference_mode():
            call(problem.input)
        return problem.contestant(name, "compile", model, call, train)

    def lstm_alone(name: str) -> Contestant:
        """Computes the same output and the same gradients of the LSTM's weights; its dx is that of another input."""
        model = problem.opponent()
        del model.conv[:]
        forward = partial(model, lengths=lengths)
        part = problem.contestant(name, "part", model, forward, train, problem.convolved())
        return replace(part, collect=lambda output: {k: t for k, t in part.collect(output).items() if k != "dx"})

    def ours(name: str, backend: str) -> Contestant:
        model = problem.convfast(backend)
        return problem.contestant(name, "convfast", model, lambda x: model(x, lengths=lengths)[0], train)

    everyone = {"eager": partial(opponent, "eager", "eager")}
    for label, options in modes_of_compile(setting, short).items():
        everyone[label] = partial(opponent, label, "compile", **options)
    everyone["compile allow_rnn"] = partial(whole_graph, "compile allow_rnn")
    everyone["nn.LSTM alone"] = partial(lstm_alone, "nn.LSTM alone")
    for backend in usable_backends("conv1d_lstm", setting):
        everyone[f"convfast {backend}"] = partial(ours, f"convfast {backend}", backend)
    return {name: partial(captured, build) for name, build in everyone.items()} if setting.captured else everyone


def conv1d_lstm_oracle(problem: Conv1dProblem, train: bool) -> dict[str, Tensor]:
    """Plain torch in float64."""
    model = problem.opponent(torch.float64)
    forward = partial(model, lengths=problem.lengths)
    return problem.contestant("oracle", "oracle", model, forward, train, problem.input.double()).results()


class GatesProblem:
    """Pre-activations, c and the gradient of h, for the pointwise cell alone."""

    def __init__(self, case: GatesCase, setting: Setting = CPU) -> None:
        normal = setting.drawing()
        self.setting = setting
        channels = (4 * case.channels, case.channels, case.channels)
        tensors = (normal(case.batch, n, case.height, case.width) for n in channels)
        self.gates, self.c, self.dh = (channels_last(t, 1) if case.channels_last else t for t in tensors)

    def contestant(
        self,
        name: str,
        kind: str,
        cell: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        train: bool,
        dtype: torch.dtype | None = None,
    ) -> Contestant:
        inputs = [t.to(dtype or t.dtype).detach().requires_grad_(train) for t in (self.gates, self.c)]
        dh = self.dh.to(dtype or self.dh.dtype)

        def run() -> tuple[Tensor, Tensor]:
            if not train:
                with torch.inference_mode():
                    return cell(*inputs)
            for tensor in inputs:
                tensor.grad = None
            h, c = cell(*inputs)
            h.backward(dh)
            return h, c

        def collect(outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
            h, c = outputs
            grads = {"dgates": inputs[0].grad, "dc": inputs[1].grad} if train else {}
            return {"h": h.detach(), "c": c.detach(), **grads}

        return Contestant(name, kind, run, collect)


def lstm_gates(problem: GatesProblem, train: bool, short: bool = False) -> dict[str, Callable[[], Contestant]]:
    """As conv_lstm."""
    build, setting = partial(partial, problem.contestant, train=train), problem.setting
    everyone = {"eager": build("eager", "eager", lstm_cell)}
    for name, options in modes_of_compile(setting, short).items():
        compiled = torch.compile(lstm_cell, fullgraph=True, dynamic=False, **options)
        everyone[name] = build(name, "compile", in_own_graphs(compiled) if setting.captured else compiled)
    for backend in usable_backends("lstm_gates", setting):
        name = f"convfast {backend}"
        everyone[name] = build(name, "convfast", partial(convfast.lstm_gates, backend=backend))
    return {name: partial(captured, build) for name, build in everyone.items()} if setting.captured else everyone


def lstm_gates_oracle(problem: GatesProblem, train: bool) -> dict[str, Tensor]:
    return problem.contestant("oracle", "oracle", lstm_cell, train, torch.float64).results()


# By op: what everyone is given, who takes part, what is right.
RACES = {
    "conv_lstm": (Problem, conv_lstm, conv_lstm_oracle),
    "conv1d_lstm": (Conv1dProblem, conv1d_lstm, conv1d_lstm_oracle),
    "lstm_gates": (GatesProblem, lstm_gates, lstm_gates_oracle),
}
