"""Every way to run a case: the opponents in plain torch, compiled, in other runtimes, and each convfast backend."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import convfast
from bench import runtimes
from bench.cases import Conv1dLSTMCase, ConvLSTMCase, GatesCase
from bench.harness import Contestant
from bench.reference_models import CatConvLSTM, HoistedConvLSTM, PermutedConv1dLSTM, load_weights, lstm_cell
from convfast.ops.conv_lstm import WITH_WINOGRAD

Forward = Callable[..., Tensor]
OPPONENTS = {"cat": CatConvLSTM, "hoisted": HoistedConvLSTM}
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"


class Problem:
    """Input, weights and output gradient of a ConvLSTM case; the same for everyone."""

    def __init__(self, case: ConvLSTMCase) -> None:
        generator = torch.Generator().manual_seed(0)
        self.case = case
        frames = () if case.same_frame else (case.time,)
        self.input = torch.randn(case.batch, *frames, case.channels, case.height, case.width, generator=generator)
        self.grad = torch.randn(self.output_shape, generator=generator)
        torch.manual_seed(0)
        template = CatConvLSTM(case.channels, list(case.hidden), case.kernel)
        self.weights = {name: weight.detach().clone() for name, weight in template.weights()}

    @property
    def output_shape(self) -> tuple[int, ...]:
        case = self.case
        time = () if case.same_frame else (case.time,)
        return case.batch, *time, case.hidden[-1], case.height, case.width

    def opponent(self, name: str, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> nn.Module:
        model = OPPONENTS[name](self.case.channels, list(self.case.hidden), self.case.kernel).to(dtype)
        load_weights(model, self.weights)
        return model.to(memory_format=torch.channels_last) if channels_last else model

    def convfast(self, backend: str, memory: str = "fast", algorithm: str = "auto") -> nn.Module:
        case = self.case
        last = {"step": case.time, "effective_step": [case.time - 1]} if case.same_frame else {}
        options = {"memory": memory, "algorithm": algorithm, "backend": backend, **last}
        model = convfast.ConvLSTM(case.channels, list(case.hidden), case.kernel, **options)
        model.load_state_dict(self.weights)
        return model

    def opponent_forward(self, model: Callable[..., tuple[Tensor, object]]) -> Forward:
        if self.case.same_frame:
            return lambda x: model(x, None, self.case.time)[0][:, -1]
        return lambda x: model(x)[0]

    def convfast_forward(self, model: nn.Module) -> Forward:
        return (lambda x: model(x)[0][0]) if self.case.same_frame else (lambda x: model(x)[0])


def channels_last(x: Tensor) -> Tensor:
    """Logical [..., C, H, W] with C innermost in memory."""
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


def inference(name: str, kind: str, forward: Forward, *inputs: Tensor) -> Contestant:
    def run() -> Tensor:
        with torch.inference_mode():
            return forward(*inputs)

    return Contestant(name, kind, run, lambda: {"output": run()})


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

    def results() -> dict[str, Tensor]:
        output = run().detach()
        return {"output": output, "dx": x.grad.clone()} | {f"d{name}": g.clone() for name, g in grads()}

    return Contestant(name, kind, run, results, [x, *model.parameters()])


def named_grads(model: nn.Module) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    return lambda: ((name, weight.grad) for name, weight in model.named_parameters())


def deciding_op(op: str) -> str:
    """The op whose backends are those of a row: the last one, where a row has several."""
    return {"conv1d_lstm": "lstm"}.get(op, op)


def usable_backends(op: str) -> list[str]:
    return [name for name, usable in convfast.available(deciding_op(op)).items() if usable is True]


def conv_lstm(problem: Problem, train: bool, short: bool = False) -> dict[str, Callable[[], Contestant]]:
    """Everyone who takes part, built on demand; plain eager first. `short` leaves out the slowest to compile."""
    everyone: dict[str, Callable[[], Contestant]] = {}

    def opponent(label: str, kind: str, name: str, last: bool, **compiled: object) -> None:
        label = f"{label} {name}" + (" channels_last" if last else "")

        def build() -> Contestant:
            model = problem.opponent(name, channels_last=last)
            x = channels_last(problem.input) if last else problem.input
            call = torch.compile(model, fullgraph=True, dynamic=False, **compiled) if kind == "compile" else model
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
            return Contestant(name, "runtime", run, lambda: {"output": run()})

        everyone[name] = build

    for name in OPPONENTS:
        for last in (False, True):
            opponent("eager", "eager", name, last)
    for name in ("cat",) if short else OPPONENTS:
        for last in (False, True):
            opponent("compile", "compile", name, last)
    if not short:
        opponent("compile max-autotune", "compile", "cat", True, mode=MAX_AUTOTUNE)
    if not train:
        opponent("compile frozen", "compile", "cat", True, options={"freezing": True})
        for name in runtimes.BUILDERS:
            runtime(name)
    for backend in usable_backends("conv_lstm"):
        for memory in ("fast", "lean") if train else ("fast",):
            ours(backend, memory)
        for memory in ("fast", "lean") if train else ("fast",):
            if backend in WITH_WINOGRAD:
                ours(backend, memory, "direct")
    return everyone


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

    def __init__(self, case: Conv1dLSTMCase) -> None:
        generator = torch.Generator().manual_seed(0)
        self.case = case
        self.grad = torch.randn(case.batch, case.time, case.hidden, generator=generator)
        self.lengths = torch.tensor(case.lengths) if case.varied else None
        torch.manual_seed(0)
        self.weights = self._plain().state_dict()
        while not hasattr(self, "input") or self._near_a_kink():
            self.input = torch.randn(case.batch, case.time, case.features, generator=generator)

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

    def opponent(self, dtype: torch.dtype = torch.float32) -> PermutedConv1dLSTM:
        model = self._plain()
        model.load_state_dict(self.weights)
        return model.to(dtype)

    def convfast(self, backend: str) -> nn.Module:
        case = self.case
        conv = [case.conv, 2 * case.conv]
        model = convfast.Conv1dLSTM(case.features, conv, case.hidden, 3, case.layers, backend=backend)
        model.load_state_dict(self.weights)
        return model

    @torch.no_grad()
    def convolved(self) -> Tensor:
        """What the LSTM reads, right to rounding."""
        return self.opponent(torch.float64).convolve(self.input.double(), self.lengths).float().contiguous()

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
    lengths = problem.lengths

    def opponent(name: str, kind: str, **compiled: object) -> Contestant:
        model = problem.opponent()
        # dynamo leaves nn.LSTM and packing to eager, so there is no full graph.
        call = torch.compile(model, dynamic=False, **compiled) if kind == "compile" else model
        return problem.contestant(name, kind, model, partial(call, lengths=lengths), train)

    def whole_graph(name: str) -> Contestant:
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
        return replace(part, results=lambda: {name: t for name, t in part.results().items() if name != "dx"})

    def ours(name: str, backend: str) -> Contestant:
        model = problem.convfast(backend)
        return problem.contestant(name, "convfast", model, lambda x: model(x, lengths=lengths)[0], train)

    everyone = {"eager": partial(opponent, "eager", "eager"), "compile": partial(opponent, "compile", "compile")}
    if not short:
        everyone["compile max-autotune"] = partial(opponent, "compile max-autotune", "compile", mode=MAX_AUTOTUNE)
    everyone["compile allow_rnn"] = partial(whole_graph, "compile allow_rnn")
    everyone["nn.LSTM alone"] = partial(lstm_alone, "nn.LSTM alone")
    for backend in usable_backends("conv1d_lstm"):
        everyone[f"convfast {backend}"] = partial(ours, f"convfast {backend}", backend)
    return everyone


def conv1d_lstm_oracle(problem: Conv1dProblem, train: bool) -> dict[str, Tensor]:
    """Plain torch in float64."""
    model = problem.opponent(torch.float64)
    forward = partial(model, lengths=problem.lengths)
    return problem.contestant("oracle", "oracle", model, forward, train, problem.input.double()).results()


class GatesProblem:
    """Pre-activations, c and the gradient of h, for the pointwise cell alone."""

    def __init__(self, case: GatesCase) -> None:
        generator = torch.Generator().manual_seed(0)
        size = case.height, case.width
        gates = torch.randn(case.batch, 4 * case.channels, *size, generator=generator)
        c, dh = (torch.randn(case.batch, case.channels, *size, generator=generator) for _ in range(2))
        self.gates, self.c, self.dh = map(channels_last, (gates, c, dh)) if case.channels_last else (gates, c, dh)

    def contestant(
        self,
        name: str,
        kind: str,
        cell: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        train: bool,
        dtype: torch.dtype = torch.float32,
    ) -> Contestant:
        inputs = [t.to(dtype).detach().requires_grad_(train) for t in (self.gates, self.c)]
        dh = self.dh.to(dtype)

        def run() -> tuple[Tensor, Tensor]:
            if not train:
                with torch.inference_mode():
                    return cell(*inputs)
            for tensor in inputs:
                tensor.grad = None
            h, c = cell(*inputs)
            h.backward(dh)
            return h, c

        def results() -> dict[str, Tensor]:
            h, c = run()
            grads = {"dgates": inputs[0].grad, "dc": inputs[1].grad} if train else {}
            return {"h": h.detach(), "c": c.detach(), **grads}

        return Contestant(name, kind, run, results)


def lstm_gates(problem: GatesProblem, train: bool, short: bool = False) -> dict[str, Callable[[], Contestant]]:
    """As conv_lstm."""
    build = partial(partial, problem.contestant, train=train)
    everyone = {"eager": build("eager", "eager", lstm_cell)}
    modes = {"compile": {}} if short else {"compile": {}, "compile max-autotune": {"mode": MAX_AUTOTUNE}}
    for name, options in modes.items():
        compiled = torch.compile(lstm_cell, fullgraph=True, dynamic=False, **options)
        everyone[name] = build(name, "compile", compiled)
    for backend in usable_backends("lstm_gates"):
        name = f"convfast {backend}"
        everyone[name] = build(name, "convfast", partial(convfast.lstm_gates, backend=backend))
    return everyone


def lstm_gates_oracle(problem: GatesProblem, train: bool) -> dict[str, Tensor]:
    return problem.contestant("oracle", "oracle", lstm_cell, train, torch.float64).results()
