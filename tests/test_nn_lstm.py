"""`LSTM` and `RegLSTM`: torch.nn.LSTM as oracle, checkpoints, packing, capture, and what users do to modules."""

import copy
import io
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, library, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import convfast
from convfast.backends import NAMESPACES
from convfast.nn import LSTM, RegLSTM
from tests.cases import threads
from tests.modules import (
    Called,
    assert_close,
    assert_compiles_whole,
    assert_copies_are_equal_and_apart,
    assert_same,
    check_against,
    flat,
    scripted,
    watching,
    without_gradients,
)
from tests.oracle import assert_close_to_oracle, lstm_gates

OPS = ("lstm",)
ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

BATCH, TIME, INPUT, HIDDEN = 3, 5, 4, 6
LENGTHS = (3, 5, 1)
OPTIONS = {
    "one_layer": {},
    "batch_first": {"batch_first": True},
    "three_layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "projection": {"proj_size": 2},
    "no_bias": {"bias": False},
    "everything": {"num_layers": 2, "bidirectional": True, "proj_size": 3, "batch_first": True, "bias": False},
}


def build(*, dtype: torch.dtype = torch.float32, **options) -> LSTM:
    return LSTM(INPUT, HIDDEN, dtype=dtype, **options)


def twin(module: LSTM, dtype: torch.dtype) -> nn.LSTM:
    """torch.nn.LSTM with the same weights."""
    names = ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
    options = {name: getattr(module, name) for name in names}
    plain = nn.LSTM(module.input_size, module.hidden_size, **options, dtype=module.weight_hh_l0.dtype)
    plain.load_state_dict(module.state_dict(), strict=True)
    return plain.to(dtype)


def sequence(module: LSTM, batch: int = BATCH, time: int = TIME, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*((batch, time) if module.batch_first else (time, batch)), module.input_size, dtype=dtype)


def state_of(module: LSTM, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (module.proj_size or module.hidden_size, module.hidden_size)
    h, c = (torch.randn(rows, batch, size, dtype=dtype) for size in sizes)
    return h, c


def with_peepholes(module: LSTM) -> LSTM:
    for name, parameter in module.named_parameters():
        if name.startswith("peephole"):
            nn.init.uniform_(parameter, -1, 1)
    return module


def check_against_torch(module: LSTM, inputs: list[Tensor], call, plain_call=None) -> None:
    check_against(module, lambda dtype: twin(module, dtype), inputs, call, plain_call, terms=BATCH * TIME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("with_state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("name", OPTIONS)
def test_option_matches_torch(name: str, with_state: bool, dtype: torch.dtype, backend: str) -> None:
    module = build(dtype=dtype, backend=backend, **OPTIONS[name])
    inputs = [sequence(module, dtype=dtype)]
    inputs += state_of(module, dtype=dtype) if with_state else ()

    def call(module, x, *hx):
        return module(x, hx if with_state else None)

    check_against_torch(module, inputs, call)


@pytest.mark.parametrize("name", OPTIONS)
def test_lengths_match_packing_in_torch(name: str, backend: str) -> None:
    module = build(backend=backend, **OPTIONS[name])
    lengths = torch.tensor(LENGTHS)

    def plain(module, x, *hx):
        packed = pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=False)
        output, last = module(packed, hx)
        return pad_packed_sequence(output, module.batch_first)[0], last

    inputs = [sequence(module), *state_of(module)]
    check_against_torch(module, inputs, lambda module, x, *hx: module(x, hx, lengths), plain)


@pytest.mark.parametrize("with_state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("enforce_sorted", [False, True], ids=["unsorted", "sorted"])
@pytest.mark.parametrize("name", ["one_layer", "everything"])
def test_packed_sequence_goes_in_and_out(name: str, enforce_sorted: bool, with_state: bool, backend: str) -> None:
    module = build(backend=backend, **OPTIONS[name])
    parts = [torch.randn(n, INPUT) for n in (sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS)]
    packed = pack_sequence(parts, enforce_sorted)
    assert (packed.sorted_indices is None) == enforce_sorted
    hx = state_of(module) if with_state else None
    output, _ = module(packed, hx)
    assert isinstance(output, PackedSequence)
    assert_same(output.batch_sizes, packed.batch_sizes)
    assert (output.sorted_indices is None) == enforce_sorted

    def call(module, data, *hx):
        output, last = module(packed._replace(data=data), hx if with_state else None)
        return output.data, last

    check_against_torch(module, [packed.data, *(hx or ())], call)


@pytest.mark.parametrize("name", OPTIONS)
def test_single_sequence_matches_torch(name: str, backend: str) -> None:
    module = build(backend=backend, **OPTIONS[name])
    inputs = [torch.randn(TIME, INPUT), *(part[:, 0] for part in state_of(module))]

    def call(module, x, *hx):
        return module(x, hx)

    check_against_torch(module, inputs, call)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
def test_peephole_matches_plain_loop(bidirectional: bool, backend: str) -> None:
    module = build(peephole=True, bidirectional=bidirectional, backend=backend)
    assert not module.peephole_l0.any()
    with_peepholes(module)
    x, hx = sequence(module), state_of(module)

    def loop(dtype):
        w = {name: p.to(dtype) for name, p in module.named_parameters()}
        outputs, last = [], []
        for row, end in enumerate(["_l0", "_l0_reverse"] if bidirectional else ["_l0"]):
            h, c = (part[row].to(dtype) for part in hx)
            frames = list(x.to(dtype))
            steps = []
            for frame in reversed(frames) if row else frames:
                gates = frame @ w[f"weight_ih{end}"].T + h @ w[f"weight_hh{end}"].T
                h, c = lstm_gates(gates + w[f"bias_ih{end}"] + w[f"bias_hh{end}"], c, w[f"peephole{end}"][:, None])
                steps.append(h)
            outputs.append(torch.stack(steps[::-1] if row else steps))
            last.append((h, c))
        return [torch.cat(outputs, -1), *(torch.stack(part) for part in zip(*last))]

    for a, e, n in zip(flat(module(x, hx)), loop(torch.float64), loop(torch.float32), strict=True):
        assert_close_to_oracle(a, e, n)


def test_samples_of_any_length_in_one_batch_equal_each_alone(backend: str) -> None:
    module = build(bidirectional=True, num_layers=2, backend=backend)
    x, hx, lengths = sequence(module), state_of(module), torch.tensor([2, 0, TIME], dtype=torch.int32)
    output, last = module(x, hx, lengths)
    for sample, length in enumerate(lengths.tolist()):
        hx_alone = tuple(part[:, sample : sample + 1] for part in hx)
        alone, last_alone = (None, hx_alone) if length == 0 else module(x[:length, sample : sample + 1], hx_alone)
        assert not output[length:, sample].any()
        if length:
            torch.testing.assert_close(output[:length, sample : sample + 1], alone)
        assert_close([part[:, sample : sample + 1] for part in last], last_alone)


@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
def test_output_is_contiguous(batch_first: bool, backend: str) -> None:
    module = build(batch_first=batch_first, bidirectional=True, num_layers=2, backend=backend)
    output, (h, c) = module(sequence(module))
    assert output.is_contiguous() and h.is_contiguous() and c.is_contiguous()


def test_second_derivatives(float64_backend: str) -> None:
    options = {"bidirectional": True, "proj_size": 2, "peephole": True}
    module = LSTM(2, 3, 2, dtype=torch.float64, backend=float64_backend, **options)
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        output, (h, c) = torch.func.functional_call(module, dict(zip(parameters, values)), (x,))
        return output, h, c

    torch.autograd.gradgradcheck(run, (x, *parameters.values()), fast_mode=True)


def test_dropout_acts_between_layers_in_training_only() -> None:
    module = build(num_layers=2, dropout=1.0)
    x = sequence(module)
    kept, _ = module.eval()(x)
    first, _ = module.train()(x)
    second, _ = module(sequence(module))
    assert not torch.equal(first, kept) and torch.equal(first, second)
    assert_close(kept, twin(module, torch.float32).eval()(x)[0])
    module.dropout = 0.5
    assert not torch.equal(module(x)[0], module(x)[0])


def test_empty_batch(backend: str) -> None:
    module = build(bidirectional=True, backend=backend)
    output, (h, c) = module(sequence(module, batch=0))
    assert output.shape == (TIME, 0, 2 * HIDDEN) and h.shape == c.shape == (2, 0, HIDDEN)


# Parameters.


@pytest.mark.parametrize("name", OPTIONS)
def test_same_seed_gives_the_parameters_of_torch(name: str) -> None:
    torch.manual_seed(7)
    ours = build(**OPTIONS[name])
    torch.manual_seed(7)
    plain = nn.LSTM(INPUT, HIDDEN, **OPTIONS[name])
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert_same(ours.state_dict().values(), plain.state_dict().values())


@pytest.mark.parametrize("name", OPTIONS)
def test_checkpoints_go_both_ways(name: str) -> None:
    ours, plain = build(**OPTIONS[name]), nn.LSTM(INPUT, HIDDEN, **OPTIONS[name])
    x = sequence(ours)
    ours.load_state_dict(plain.state_dict(), strict=True)
    assert_close(ours(x), plain(x))
    ours.reset_parameters()
    plain.load_state_dict(ours.state_dict(), strict=True)
    assert_close(ours(x), plain(x))


def test_peepholes_are_zero_again_after_a_reset_and_are_in_the_checkpoint() -> None:
    module = build(peephole=True, bidirectional=True)
    with torch.no_grad():
        module.peephole_l0_reverse.add_(1)
    other = build(peephole=True, bidirectional=True)
    other.load_state_dict(module.state_dict(), strict=True)
    x = sequence(module)
    assert_same(other(x), module(x))
    before = module.weight_ih_l0.clone()
    module.reset_parameters()
    assert not module.peephole_l0_reverse.any() and not torch.equal(module.weight_ih_l0, before)


# What users do to modules.


def test_repr_shows_what_is_not_default() -> None:
    assert repr(LSTM(3, 4, 2, batch_first=True, peephole=True, backend="reference")) == (
        "LSTM(3, 4, num_layers=2, batch_first=True, peephole=True, backend='reference')"
    )


def test_copies_are_equal_and_apart() -> None:
    module = build(bidirectional=True, peephole=True)
    assert_copies_are_equal_and_apart(module, sequence(module))


def test_module_moves_between_dtypes_and_devices() -> None:
    module = build(peephole=True)
    double = copy.deepcopy(module).double()
    double.flatten_parameters()
    x = sequence(module, dtype=torch.float64)
    assert double(x)[0].dtype == torch.float64
    assert_close(double.float()(x.float()), module(x.float()))
    output, (h, c) = module.to("meta")(x.float().to("meta"))
    assert output.shape == (TIME, BATCH, HIDDEN) and h.device == c.device == torch.device("meta")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, backend: str) -> None:
    module = build(num_layers=2, bidirectional=True, backend=backend).to(dtype)
    x = sequence(module, dtype=dtype)
    output, (h, c) = module(x)
    assert output.dtype == h.dtype == dtype and c.dtype == torch.float32
    assert module(x, (h, c))[1][1].dtype == torch.float32
    for a, e, n in zip((output, h, c), flat(twin(module, torch.float64)(x.double())), flat(twin(module, dtype)(x))):
        assert_close_to_oracle(a, e, n)
    (output.float().sum() + c.sum()).backward()
    assert all(p.grad.dtype == dtype for p in module.parameters())


def test_autocast() -> None:
    module = build(num_layers=2)
    with torch.autocast("cpu", torch.bfloat16):
        output, (_, c) = module(sequence(module))
    assert output.dtype == torch.bfloat16 and c.dtype == torch.float32
    output.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_weights_may_be_parametrized() -> None:
    module = build()
    x = sequence(module)
    expected, _ = module(x)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0", dim=0)
    output, _ = module(x)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parametrizations.weight_hh_l0.parameters())


@pytest.mark.parametrize("proj_size", [0, 2])
def test_infinite_cell_state_is_what_it_is_in_torch(proj_size: int, backend: str) -> None:
    module = build(proj_size=proj_size, backend=backend)
    x, (h, c) = sequence(module), state_of(module)
    found, expected = (flat(m(x, (h, c * math.inf))) for m in (module, twin(module, torch.float32)))
    assert not any(part.isnan().any() for part in expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lstm", "cnn_lstm"])
def test_peepholes_alone_are_trained(kind: str, backend: str) -> None:
    module = build(peephole=True, backend=backend)
    model = convfast.CNN_LSTM(INPUT, 2, 4, 3, HIDDEN, 1, 0.0, backend=backend) if kind == "cnn_lstm" else module
    if kind == "cnn_lstm":
        model.lstm = LSTM(8, HIDDEN, batch_first=True, peephole=True, backend=backend)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("peephole" in name)
    flat(model(torch.randn(BATCH, TIME, INPUT)))[0].sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "peephole" in n)


def test_regression_matches_torch(backend: str) -> None:
    torch.manual_seed(3)
    ours = RegLSTM(INPUT, HIDDEN, 2, backend=backend)
    torch.manual_seed(3)
    rnn, reg = nn.LSTM(INPUT, HIDDEN, 2), nn.Linear(HIDDEN, 1)
    plain = nn.ModuleDict({"rnn": rnn, "reg": reg}).state_dict()
    assert list(ours.state_dict()) == list(plain)
    assert_same(ours.state_dict().values(), plain.values())
    x = torch.randn(TIME, BATCH, INPUT)
    output = ours(x)
    assert output.shape == (TIME, BATCH, 1)
    assert_close_to_oracle(output, reg.double()(rnn.double()(x.double())[0]), reg.float()(rnn.float()(x)[0]))
    with pytest.raises(TypeError, match="RegLSTM: input is a PackedSequence, expected a Tensor"):
        ours(pack_sequence([x[:, 0], x[:3, 1]]))


# Capture.


@pytest.mark.parametrize("name", ["one_layer", "everything"])
def test_compiles_whole(name: str, backend: str) -> None:
    module = build(backend=backend, **OPTIONS[name])
    # The reference is compiled step by step, so that there are few.
    x, hx, lengths = sequence(module, time=3), state_of(module), torch.tensor([2, 3, 1])
    assert_compiles_whole(module, (x,), (x, hx), (x, hx, lengths))


def test_compiles_once_for_any_time_and_batch(native_ops) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = build(**OPTIONS["everything"])
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for batch, time in ((5, 8), (7, 10), (9, 12)):  # unlike any other size, which would be taken for the same
        x = sequence(module, batch, time)
        assert_close(compiled(x), module(x))
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 3, "other sizes were compiled again"


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_exports(strict: bool, backend: str) -> None:
    module = build(backend=backend, **OPTIONS["everything"]).eval()
    x, hx, lengths = sequence(module), state_of(module), torch.tensor(LENGTHS)
    program = torch.export.export(module, (x, hx, lengths), strict=strict)
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    exported = torch.export.load(stored).module()
    for grad in (False, True):  # the ops' own results either way
        with torch.set_grad_enabled(grad):
            found = exported(x, hx, lengths)
        assert_close([t.detach() for t in flat(found)], [t.detach() for t in flat(module(x, hx, lengths))])


def test_exports_as_one_op_a_layer(native_ops) -> None:
    module = build(**OPTIONS["everything"]).eval()
    dims = {"input": {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}}
    program = torch.export.export(module, (sequence(module),), dynamic_shapes=dims)
    assert sum("lstm_forward" in str(node.target) for node in program.graph.nodes) == 2
    x = sequence(module, 4, 9)
    with torch.no_grad():
        assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("name", [*OPTIONS, "peephole"])
def test_scripts_saves_and_loads(name: str, native_ops) -> None:
    module = build(**(OPTIONS | {"peephole": {"peephole": True}})[name])
    script = scripted(module)
    x, hx, lengths = sequence(module), state_of(module), torch.tensor(LENGTHS, dtype=torch.int32)
    single = (torch.randn(TIME, INPUT), tuple(part[:, 0] for part in hx))
    with torch.no_grad():
        for arguments in ((x,), (x, hx), (x, hx, lengths), single[:1], single):
            assert_same(script(*arguments), module(*arguments))


def test_scripted_module_refuses_what_does_not_fit(native_ops) -> None:
    script = scripted(build(num_layers=2))
    for arguments in ((torch.zeros(1, 2, 3, 4),), (torch.zeros(2, 3, 5),), (torch.zeros(2, 3, 4), state_of(build()))):
        with pytest.raises((RuntimeError, torch.jit.Error), match=r"LSTM: (input|hx) has"):
            script(*arguments)


def test_scripting_a_model_leaves_it_as_it_is(native_ops) -> None:
    model = RegLSTM(INPUT, HIDDEN)
    x = torch.randn(TIME, BATCH, INPUT)
    script = scripted(model)
    assert isinstance(model.rnn, LSTM) and len(list(model.parameters())) == 6
    with torch.no_grad():
        assert_same(script(x), model(x))


# Without gradients all layers, and a linear layer on top, are one op of the compiled backends.


# One sample; a few, whose hidden units are shared out; so many that layers take turns; several groups of them.
@pytest.mark.parametrize("batch", [1, 3, 19, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*OPTIONS, "peephole"])
def test_one_op_gives_the_bits_of_layers(name: str, dtype: torch.dtype, batch: int, compiled_backend: str) -> None:
    options = OPTIONS | {"peephole": {"peephole": True, "num_layers": 2}}
    module = with_peepholes(build(dtype=dtype, backend=compiled_backend, **options[name]))
    x, hx = sequence(module, batch, dtype=dtype), state_of(module, batch, dtype)
    some = torch.arange(batch) * 2 % (TIME + 1)
    for arguments in ((x,), (x, hx), (x, None, torch.full((batch,), TIME)), (x, hx, some)):
        found = without_gradients(module, *arguments, ops=["lstm_layers"])
        layers = module(*arguments)
        assert_same(found, layers)
        assert [t.stride() for t in flat(found)] == [t.stride() for t in flat(layers)]


@pytest.mark.parametrize(("batch", "hidden"), [(40, 128), (16, 256), (9, 20)])
def test_one_op_gives_the_bits_of_layers_of_any_size(batch: int, hidden: int, compiled_backend: str) -> None:
    module = LSTM(7, hidden, 2, backend=compiled_backend)
    x = sequence(module, batch)
    assert_same(without_gradients(module, x, ops=["lstm_layers"]), module(x))


# Stages of a pipeline that take steps in chunks (up to 7 samples a thread of one stage) or one by one.
@pytest.mark.parametrize("batch", [2, 3, 9, 19, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("layers", "count", "options"),
    [(2, 2, {}), (2, 4, {}), (3, 3, {"bias": False}), (4, 2, {"peephole": True}), (2, 2, {"proj_size": 5})],
    ids=["2_layers_2_threads", "2_layers_4_threads", "3_layers_3_threads", "4_layers_2_threads", "projection"],
)
def test_pipeline_of_layers_gives_the_bits_of_layers(
    layers: int, count: int, options: dict[str, Any], dtype: torch.dtype, batch: int, native_ops: Any
) -> None:
    time, size = 531, options.get("proj_size", 9)
    module = with_peepholes(LSTM(size, 9, layers, backend="cpu", dtype=dtype, **options))
    head = nn.Linear(size, 3, dtype=dtype)
    x, hx = torch.randn(time, batch, size, dtype=dtype), state_of(module, batch, dtype)
    some = torch.arange(batch) * 97 % (time + 1)
    with threads(count):
        short = x[:33], None, some.clamp(max=33)
        for arguments in ((x, None, None), (x, hx, None), (x, hx, some), short):
            found = without_gradients(module, *arguments, ops=["lstm_layers"])
            layers_alone = module(*arguments)
            assert_same(found, layers_alone)
            output, _ = without_gradients(partial(module.under, head), *arguments, ops=["lstm_layers"])
            torch.testing.assert_close(output, head(layers_alone[0]))


def test_pipeline_of_layers_whose_weights_l2_does_not_hold(native_ops: Any) -> None:
    module = LSTM(256, 256, 2, backend="cpu")
    x, hx = torch.randn(40, 20, 256), state_of(module, 20)
    with threads(2):
        assert_same(without_gradients(module, x, hx, ops=["lstm_layers"]), module(x, hx))


def test_pipeline_of_layers_with_fewer_threads_than_asked_for(native_ops: Any) -> None:
    script = """
import torch
from convfast import LSTM
torch.set_num_threads(4)
module, x = LSTM(16, 16, 4, backend="cpu"), torch.randn(100, 20, 16)
expected = module(x)[0]
with torch.no_grad():
    for _ in range(50):
        assert torch.equal(module(x)[0], expected)
"""
    env = os.environ | {"OMP_THREAD_LIMIT": "2", "OMP_NUM_THREADS": "4", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_pipelines_of_several_python_threads_at_once(native_ops: Any) -> None:
    module, x = LSTM(16, 16, 2, backend="cpu"), torch.randn(200, 4, 16)
    expected = module(x)[0]

    def call() -> Tensor:
        with torch.no_grad():
            return module(x)[0]

    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(call) for _ in range(32)]:
            assert torch.equal(job.result(timeout=120), expected)


@pytest.mark.parametrize("outputs", [1, 33])
@pytest.mark.parametrize("batch", [1, 3, 19, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_linear_layer_on_top_in_the_op(
    name: str, dtype: torch.dtype, batch: int, outputs: int, compiled_backend: str
) -> None:
    module = build(dtype=dtype, backend=compiled_backend, **OPTIONS[name])
    size = (module.proj_size or HIDDEN) * (2 if module.bidirectional else 1)
    head = nn.Linear(size, outputs, bias=module.bias, dtype=dtype)
    x, hx = sequence(module, batch, dtype=dtype), state_of(module, batch, dtype)
    some = torch.arange(batch) * 2 % (TIME + 1)
    for lengths in (None, some):
        output, last = without_gradients(partial(module.under, head), x, hx, lengths, ops=["lstm_layers"])
        below, expected_last = module(x, hx, lengths)
        weights = [None if w is None else w.double() for w in (head.weight, head.bias)]
        assert_close_to_oracle(output, nn.functional.linear(below.double(), *weights), head(below))
        assert_same(last, expected_last)
        assert output.is_contiguous()


def test_reg_lstm_is_one_op(compiled_backend: str) -> None:
    reg = RegLSTM(INPUT, HIDDEN, 2, backend=compiled_backend)
    without_gradients(reg, torch.randn(TIME, BATCH, INPUT), ops=["lstm_layers"])


def test_dropout_keeps_layers_apart_without_gradients(compiled_backend: str) -> None:
    module = build(num_layers=2, dropout=1.0, backend=compiled_backend)
    x = sequence(module)
    kept = without_gradients(module.eval(), x, ops=["lstm_layers"])
    with torch.no_grad():
        dropped, _ = module.train()(x)
        assert_same(dropped, module(sequence(module))[0])
    assert not torch.equal(dropped, kept[0])


@pytest.mark.parametrize("part", ["rnn", "reg"])
@pytest.mark.parametrize("how", ["hook", "pre_hook", "global", "forward", "subclass"])
def test_whoever_watches_a_part_of_a_model_sees_its_calls(how: str, part: str, native_ops) -> None:
    model = RegLSTM(INPUT, HIDDEN, 2)
    x = torch.randn(TIME, BATCH, INPUT)
    expected = without_gradients(model, x, ops=["lstm_layers"])
    with torch.no_grad(), watching(getattr(model, part), how) as seen:
        assert_close(model(x), expected)
    assert getattr(model, part) in seen
    without_gradients(model, x, ops=["lstm_layers"])


@pytest.mark.parametrize("wrap", [nn.LSTM, "module", "compile", "checkpoint"])
def test_what_stands_in_the_place_of_the_lstm_is_called(wrap: Any, native_ops) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Any:
            return self.module(x)

    def put(model: nn.Module, name: str) -> list[Any]:
        module, seen = getattr(model, name), []
        if wrap is nn.LSTM:
            other = twin(module, torch.float32).eval()
            other.register_forward_hook(lambda *_: seen.append(1))
        elif wrap == "compile":
            other = module
            module.compile(backend=lambda graph, _: seen.append(1) or graph.forward)
        else:
            other = Wrapper(module) if wrap == "module" else checkpoint_wrapper(module)
            module.register_forward_hook(lambda *_: seen.append(1))
        setattr(model, name, other)
        return seen

    torch._dynamo.reset()
    for model, name, x in (
        (RegLSTM(INPUT, HIDDEN, 2), "rnn", torch.randn(TIME, BATCH, INPUT)),
        (convfast.CNN_LSTM(INPUT, 2, 3, 3, HIDDEN), "lstm", torch.randn(BATCH, TIME, INPUT)),
        (convfast.Conv1dLSTM(INPUT, [4, 3], HIDDEN), "lstm", torch.randn(BATCH, TIME, INPUT)),
        (convfast.Conv1dLSTM(INPUT, 4, HIDDEN, pool=("max", 2)), "lstm", torch.randn(BATCH, TIME, INPUT)),
    ):
        expected = model.eval()(x)
        seen = put(model, name)
        assert_close(model(x), expected)
        assert seen
        seen.clear()
        torch._dynamo.reset()
        with torch.no_grad():
            assert_close(model(x), expected)
        assert seen


def test_what_stands_in_the_place_of_a_convolution_is_called(native_ops) -> None:
    class Plain(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + 1

    x = torch.randn(BATCH, TIME, INPUT)
    for model, convs in (
        (convfast.CNN_LSTM(INPUT, 2, 3, 3, HIDDEN).eval(), "cnn"),
        (convfast.Conv1dLSTM(INPUT, [4, 3], HIDDEN), "conv"),
        (convfast.Conv1dLSTM(INPUT, [4, 3], HIDDEN, pool=[("max", 2), None]), "conv"),
    ):
        before = flat(model(x))[0]
        container = getattr(model, convs)
        first = next(iter(container._modules))
        container._modules[first] = Plain(container._modules[first])
        with torch.no_grad():
            found = flat(model(x))[0]
        assert_close(found, flat(model(x))[0])
        assert not torch.allclose(found, before)


def test_training_while_another_thread_exports(native_ops) -> None:
    model, other, x = build(), build().eval(), torch.randn(TIME, BATCH, INPUT)
    expected = torch.autograd.grad(model(x)[0].sum(), [*model.parameters()])
    with ThreadPoolExecutor(1) as pool:
        exported = [pool.submit(torch.export.export, other, (x,)) for _ in range(3)]
        steps = 0
        while not all(job.done() for job in exported) or steps == 0:
            with Called():  # a mode is no sign of an export
                assert_same(torch.autograd.grad(model(x)[0].sum(), [*model.parameters()]), expected)
            steps += 1
    assert all(job.result() for job in exported)


STARVES = """
import resource, torch, convfast
model, x = convfast.LSTM(2, 256), torch.zeros(1, 1, 2)
with torch.no_grad():
    model(x)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, -1))
    model(x.expand(2000, 2000, 2))
"""


def test_threads_share_sums_of_large_weights(native_ops) -> None:
    torch.manual_seed(0)
    module = LSTM(1024, 1024, backend="cpu")
    plain, x = twin(module, torch.float32), torch.randn(2, 64, 1024)
    with threads(12):  # sums of their own would take more than 256 MiB
        found = torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
    expected = torch.autograd.grad(plain(x)[0].square().sum(), list(plain.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


FITS_IN_WHAT_LIES_IDLE = """
import resource, torch, convfast
def run(batch):
    with torch.no_grad():
        model(torch.zeros(1, 1, 2).expand(2000, batch, 2))
model = convfast.LSTM(2, 64)
run(500)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, -1))
run(300)  # 150 MiB of output; 250 are idle, of which a smaller buffer would leave too much
"""


def test_idle_memory_is_given_up_where_it_is_missing(native_ops) -> None:
    code = [sys.executable, "-c", FITS_IN_WHAT_LIES_IDLE]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_too_little_memory_is_an_error_with_the_size(native_ops) -> None:
    done = subprocess.run([sys.executable, "-c", STARVES], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert re.search(r"^RuntimeError: .*convfast: cannot allocate \d{9,} bytes of memory", done.stderr, re.MULTILINE)


LOADS = """
import sys, torch, convfast
convfast.load_ops()
x = torch.load(sys.argv[1])
with torch.no_grad():
    scripted, exported = torch.jit.load(sys.argv[2])(x), torch.export.load(sys.argv[3]).module()(x)
torch.testing.assert_close(scripted, exported)
print(scripted.sum().item())
"""


def test_saved_programs_load_in_a_process_without_layers(tmp_path: Path, native_ops) -> None:
    model, x = convfast.CNN_LSTM(INPUT, 2, 4, lstm_hidden_size=HIDDEN).eval(), torch.randn(BATCH, TIME, INPUT)
    files = [str(tmp_path / name) for name in ("x.pt", "scripted.pt", "exported.pt2")]
    torch.save(x, files[0])
    torch.jit.script(copy.deepcopy(model)).save(files[1])
    torch.export.save(torch.export.export(model, (x,)), files[2])
    done = subprocess.run([sys.executable, "-c", LOADS, *files], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        total = model(x).sum().item()
    assert float(done.stdout) == pytest.approx(total, rel=1e-5)


def test_frozen_lstm_under_a_linear_layer_that_learns(native_ops) -> None:
    model = RegLSTM(INPUT, HIDDEN, 2)
    model.rnn.requires_grad_(False)
    x, upstream = torch.randn(TIME, BATCH, INPUT), torch.randn(TIME, BATCH, 1)
    with Called() as called:
        output = model(x)
    assert "lstm_layers" in called.ops
    grads = torch.autograd.grad(output, [*model.reg.parameters()], upstream)
    assert_close(grads, torch.autograd.grad(model.reg(model.rnn(x)[0]), [*model.reg.parameters()], upstream))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_op_of_layers_and_its_fake_agree(name: str, dtype: torch.dtype, compiled_backend: str) -> None:
    module = with_peepholes(build(dtype=dtype, peephole=name == "projection", **OPTIONS[name])).requires_grad_(False)
    weights = [parameter for key, parameter in module.named_parameters() if not key.startswith("peephole")]
    peepholes = [parameter for key, parameter in module.named_parameters() if key.startswith("peephole")]
    head = torch.randn(2, (module.proj_size or HIDDEN) * (2 if module.bidirectional else 1), dtype=dtype)
    options = (module.bias, module.proj_size > 0, module.bidirectional)
    op = getattr(torch.ops, NAMESPACES[compiled_backend]).lstm_layers.default
    for state, on_top in (((None, None), (None, None)), (state_of(module, dtype=dtype), (head, head[:, 0]))):
        arguments = (torch.randn(BATCH, TIME, INPUT, dtype=dtype), weights, peepholes, *options, *state)
        for lengths, time_major in ((None, True), (torch.tensor(LENGTHS), False)):
            library.opcheck(op, (*arguments, lengths, *on_top, time_major))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, "weights must be a multiple of 4, got 0"),
        ({"weights": [1]}, "weights must be a multiple of 4, got 5"),
        ({"peepholes": [torch.zeros(3, HIDDEN)] * 2}, "peepholes must be none, or one for each of weights, got 2"),
        ({"head": torch.zeros(2, 5)}, r"head must be of shape \[2, 6\], got \[2, 5\]"),
        ({"head": torch.zeros(2, 6).double()}, "head must be of the same dtype as the weights, got Double"),
        ({"head_bias": torch.zeros(3)}, r"head_bias must be of shape \[2\], got \[3\]"),
    ],
)
def test_bad_call_of_the_op_of_layers(change: dict[str, Any], message: str, native_ops) -> None:
    weights = [p.detach() for p in build().parameters()]
    if "weights" in change:
        change = {"weights": (weights + weights[:1]) if change["weights"] else []}
    arguments = {"x": torch.zeros(BATCH, TIME, INPUT), "weights": weights, "peepholes": [], "bias": True}
    arguments |= {"projection": False, "bidirectional": False, "h0": None, "c0": None, "lengths": None}
    arguments |= {"head": torch.zeros(2, HIDDEN), "head_bias": None, "time_major": False}
    with pytest.raises(RuntimeError, match=f"lstm_layers: {message}"):
        torch.ops.convfast.lstm_layers(**(arguments | change))


# Bad arguments: what was wrong, what was expected, what came.

BAD_CONSTRUCTION = {
    "backend": ({"backend": "cudnn"}, "backend is 'cudnn', expected one of cpu, triton, cuda, reference"),
    "input_size": ({"input_size": 0}, "input_size is 0, expected an int >= 1"),
    "hidden_size": ({"hidden_size": 2.0}, "hidden_size is 2.0, expected an int >= 1"),
    "num_layers": ({"num_layers": 0}, "num_layers is 0, expected an int >= 1"),
    "proj_negative": ({"proj_size": -1}, "proj_size is -1, expected an int >= 0"),
    "proj_size": ({"proj_size": 4}, "proj_size is 4, expected less than hidden_size=4"),
    "dropout": ({"dropout": 1.5}, r"dropout is 1.5, expected a probability \(0 to 1\)"),
    "dropout_type": ({"dropout": "a"}, r"dropout is 'a', expected a probability \(0 to 1\)"),
}


@pytest.mark.parametrize("name", BAD_CONSTRUCTION)
def test_bad_constructor_argument(name: str) -> None:
    options, message = BAD_CONSTRUCTION[name]
    with pytest.raises(ValueError, match=f"^LSTM: {message}$"):
        LSTM(**({"input_size": 3, "hidden_size": 4} | options))
    with pytest.raises(TypeError, match=r"^LSTM: dtype is torch.int64, expected a floating point type$"):
        LSTM(3, 4, dtype=torch.int64)


X = torch.zeros(TIME, BATCH, INPUT)
H = torch.zeros(1, BATCH, HIDDEN)
PACKED = pack_sequence([torch.zeros(3, INPUT), torch.zeros(2, INPUT)])
BAD_CALLS = {
    "type": (([1.0],), TypeError, "LSTM: input is a list, expected a Tensor or a PackedSequence"),
    "rank": ((X[0, 0],), ValueError, r"LSTM: input has 1 dims, expected 3, layout \[T, B, I\], or 2 for a single"),
    "features": ((X[..., 1:],), ValueError, "LSTM: input has 3 features, expected input_size=4"),
    "features_single": ((X[0, :, 1:],), ValueError, "LSTM: input has 3 features, expected input_size=4"),
    "features_packed": ((pack_sequence([X[0, :, 1:]]),), ValueError, "LSTM: input has 3 features"),
    "no_time": ((X[:0],), ValueError, r"LSTM: input has 0 time steps, .* \[0, \d, 4\], layout \[T, B, I\]"),
    "dtype": ((X.double(),), TypeError, "input has dtype torch.float64, expected torch.float32"),
    "device": ((X.to("meta"),), ValueError, "input is on meta, expected cpu"),
    "hx_type": ((X, H), TypeError, r"LSTM: hx is a Tensor, expected two tensors \(h, c\)"),
    "hx_count": ((X, (H,)), TypeError, r"LSTM: hx is a tuple of 1, expected two tensors \(h, c\)"),
    "hx_none": ((X, (H, None)), TypeError, "LSTM: c of hx is None, expected a Tensor"),
    "hx_batch": ((X, (H[:, 1:], H)), ValueError, r"LSTM: h of hx has shape \[1, 2, 6\], expected \[1, 3, 6\]"),
    "hx_size": ((X, (H, H[..., 1:])), ValueError, r"LSTM: c of hx has shape \[1, 3, 5\], expected \[1, 3, 6\]"),
    "hx_of_single": ((X[0], (H, H)), ValueError, r"LSTM: h of hx has shape \[1, 3, 6\], expected \[1, 6\]"),
    "hx_of_packed": ((PACKED, (H, H)), ValueError, r"LSTM: h of hx has shape \[1, 3, 6\], expected \[1, 2, 6\]"),
    "lengths_packed": ((PACKED, None, torch.tensor([1, 2])), ValueError, "lengths is a Tensor, expected None with a P"),
    "lengths_single": ((X[0], None, torch.tensor([1])), ValueError, "lengths is a Tensor, expected None with a single"),
    "lengths_shape": ((X, None, torch.tensor([1])), ValueError, r"lengths has shape \[1\], expected \[3\]"),
    "lengths_long": ((X, None, torch.tensor([1, 6, 2])), ValueError, "lengths has 6, expected 0 to 5"),
    "lengths_dtype": ((X, None, torch.tensor([1.0, 2, 3])), TypeError, "lengths has dtype torch.float32"),
}


@pytest.mark.parametrize("grad", [True, False], ids=["", "no_grad"])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_is_named_with_what_was_expected(name: str, grad: bool) -> None:
    arguments, error, message = BAD_CALLS[name]
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        build()(*arguments)


@pytest.mark.parametrize("grad", [True, False], ids=["", "no_grad"])
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l1", "bias_ih_l1"])
def test_parameter_unlike_the_others_is_refused(name: str, grad: bool) -> None:
    for change, error in ((torch.Tensor.double, TypeError), (lambda t: t.to("meta"), (ValueError, RuntimeError))):
        module = build(num_layers=2)
        setattr(module, name, nn.Parameter(change(getattr(module, name).detach())))
        with torch.set_grad_enabled(grad), pytest.raises(error):
            module(X)


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda t: t.to("meta")], ids=["dtype", "device"])
def test_linear_layer_unlike_the_lstm_is_refused(change) -> None:
    model = RegLSTM(INPUT, HIDDEN)
    model.reg.weight = nn.Parameter(change(model.reg.weight.detach()))
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match="lstm: head weight "):
        model(X)


def test_unknown_backend_is_named() -> None:
    module = build()
    module.backend = "abacus"
    with pytest.raises(ValueError, match="lstm: backend is 'abacus', expected one of"):
        module(X)


def test_exported_from_the_package() -> None:
    assert convfast.LSTM is LSTM and convfast.RegLSTM is RegLSTM
