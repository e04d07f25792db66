"""`Conv1dLSTM` and `CNN_LSTM`: the plain chain of torch as oracle, lengths, chunks, copies, capture, bad arguments."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import convfast
from convfast.nn import CNN_LSTM, LSTM, Conv1dLSTM, Conv1dLSTMState
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

OPS = ("conv1d", "lstm")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

BATCH, TIME, INPUT, HIDDEN = 3, 13, 4, 5
LENGTHS = (8, 13, 9)
OPTIONS = {
    "one_layer": {"conv_channels": 6},
    "two_layers": {},
    "kernel_per_layer": {"kernel_size": [5, 2]},
    "stride": {"stride": [2, 1], "padding": 1},
    "valid": {"padding": "valid"},
    "full": {"padding": ["full", 0]},
    "causal": {"padding": "causal"},
    "causal_stride": {"padding": ["causal", "valid"], "stride": [2, 3], "kernel_size": [2, 4], "dilation": [3, 1]},
    "dilation": {"dilation": [1, 2]},
    "groups": {"groups": [2, 3]},
    "reflect": {"padding_mode": ["reflect", "circular"]},
    "activations": {"activation": ["gelu", "none"]},
    "max_pool": {"pool": ("max", 2)},
    "avg_pool": {"pool": [("avg", 3, 2), None]},
    "both_pools": {"pool": [("max", 3, 1), ("avg", 2)], "padding": "causal"},
    "no_bias": {"bias": False},
    "recurrent": {"num_layers": 2, "bidirectional": True, "proj_size": 2},
    "channels_first": {"channels_first": True},
    "time_first": {"batch_first": False},
    "channels_and_time_first": {"channels_first": True, "batch_first": False},
}
POOLS = {"max": nn.MaxPool1d, "avg": nn.AvgPool1d}
ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU}


def build(*, dtype: torch.dtype = torch.float32, **options) -> Conv1dLSTM:
    given = {"input_size": INPUT, "conv_channels": [6, 9], "hidden_size": HIDDEN} | options
    return Conv1dLSTM(**given, dtype=dtype)


def sequence(
    module: Conv1dLSTM, batch: int = BATCH, time: int = TIME, dtype: torch.dtype = torch.float32
) -> Tensor:
    letters = layout(module)
    sizes = {"B": batch, "T": time, "F": module.input_size}
    return torch.randn([sizes[letter] for letter in letters], dtype=dtype)


def layout(module: Conv1dLSTM) -> str:
    return "BFT" if module.channels_first else "BTF" if module.batch_first else "TBF"


def batch_first(module: Conv1dLSTM, output: Tensor) -> Tensor:
    return output if module.batch_first else output.transpose(0, 1)


def state_of(module: Conv1dLSTM, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    return [torch.randn(rows, batch, n, dtype=dtype) for n in (module.proj_size or HIDDEN, HIDDEN)]


class Plain(nn.Module):
    """The chain that everybody writes; its parameters are named as those of `Conv1dLSTM`."""

    def __init__(self, module: Conv1dLSTM) -> None:
        super().__init__()
        self.letters, self.batch_first = layout(module), module.batch_first
        self.conv, self.before, self.after = nn.ModuleList(), [], []
        pools = module.pool if isinstance(module.pool, list) else [module.pool] * len(module.conv)
        for conv, pool in zip(module.conv, pools):
            extent = conv.dilation * (conv.kernel_size - 1)
            causal = conv.padding == "causal"
            padding = {"full": extent, "causal": 0}.get(conv.padding, conv.padding)
            names = ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "padding_mode")
            options = {name: getattr(conv, name) for name in names}
            self.conv.append(nn.Conv1d(**options, padding=padding, bias=module.bias))
            self.before.append(extent if causal else 0)
            pooling = nn.Identity() if pool is None else POOLS[pool[0]](*pool[1:])
            self.after.append(nn.Sequential(ACTIVATIONS[conv.activation](), pooling))
        options = {name: getattr(module.lstm, name) for name in ("num_layers", "bias", "bidirectional", "proj_size")}
        self.lstm = nn.LSTM(module.conv_channels[-1], module.hidden_size, **options)

    def forward(self, x: Tensor, *hx: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = x.permute([self.letters.index(letter) for letter in "BFT"])
        for conv, before, after in zip(self.conv, self.before, self.after):
            x = after(conv(F.pad(x, (before, 0))))
        output, last = self.lstm(x.permute(2, 0, 1), hx or None)
        return output.transpose(0, 1) if self.batch_first else output, last


def twin(module: Conv1dLSTM, dtype: torch.dtype) -> Plain:
    plain = Plain(module).to(next(module.parameters()).dtype)
    plain.load_state_dict(module.state_dict(), strict=True)
    return plain.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_option_matches_plain_chain(name: str, dtype: torch.dtype, backend: str) -> None:
    module = build(dtype=dtype, backend=backend, **OPTIONS[name])
    inputs = [sequence(module, dtype=dtype), *state_of(module, dtype=dtype)]

    def ours(module: Conv1dLSTM, x: Tensor, *hx: Tensor):
        return module(x, hx)

    def plain(module: Plain, x: Tensor, *hx: Tensor):
        return module(x, *hx)

    check_against(module, lambda dtype: twin(module, dtype), inputs, ours, plain, terms=BATCH * TIME)
    without, _ = module(inputs[0])
    assert_close(without, twin(module, dtype)(inputs[0])[0])


@pytest.mark.parametrize("name", OPTIONS)
def test_samples_of_any_length_in_one_batch_equal_each_alone(name: str, backend: str) -> None:
    module = build(backend=backend, **OPTIONS[name])
    x, hx, lengths = sequence(module), state_of(module), torch.tensor(LENGTHS, dtype=torch.int32)
    batch, time = layout(module).index("B"), layout(module).index("T")
    for sample, length in enumerate(LENGTHS):
        x.select(batch, sample).narrow(time - (time > batch), length, TIME - length).fill_(float("nan"))
    output, last = module(x, hx, lengths)
    output = batch_first(module, output)
    for sample, length in enumerate(LENGTHS):
        hx_alone = tuple(part[:, sample : sample + 1] for part in hx)
        alone, last_alone = module(x.narrow(batch, sample, 1).narrow(time, 0, length), hx_alone)
        alone = batch_first(module, alone)
        steps = alone.shape[1]
        assert module.output_lengths(lengths)[sample] == steps
        assert_close(output[sample : sample + 1, :steps], alone)
        assert_close([part[:, sample : sample + 1] for part in last], last_alone)
        assert not output[sample, steps:].any()
    sum(part.square().sum() for part in (output, *last)).backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("name", ["valid", "causal", "max_pool", "both_pools", "recurrent"])
def test_samples_too_short_for_an_output_leave_the_state_alone(name: str, backend: str) -> None:
    module = build(backend=backend, **OPTIONS[name])
    x, hx, lengths = sequence(module), state_of(module), torch.tensor([TIME, 0, 0])
    if name in ("valid", "max_pool"):
        lengths[2] = 3  # shorter than the windows of both layers together
    assert module.output_lengths(lengths)[1:].tolist() == [0, 0]
    output, last = module(x, hx, lengths)
    assert output[0].any() and not output[1:].any()
    assert_same([part[:, 1:] for part in last], [part[:, 1:] for part in hx])


# Chunks.

CHUNKED = {
    "valid": {"padding": "valid"},
    "causal": {"padding": "causal"},
    "mixed": {"padding": ["causal", 0], "kernel_size": [3, 2], "dilation": [2, 1]},
    "stride": {"padding": "causal", "stride": [2, 3]},
    "stride_past_the_kernel": {"padding": "valid", "kernel_size": [1, 2], "stride": [3, 4]},
    "kernel_1": {"padding": "valid", "kernel_size": 1},
    "groups": {"padding": "causal", "groups": [2, 3], "activation": "tanh"},
    "recurrent": {"padding": "causal", "num_layers": 2, "proj_size": 2},
    "channels_first": {"padding": "causal", "channels_first": True},
    "time_first": {"padding": "causal", "batch_first": False},
}


@pytest.mark.parametrize("chunks", [[1] * 17, [4, 1, 1, 7, 4], [2, 15], [17]], ids=str)
@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_equal_the_whole_sequence(name: str, chunks: list[int], backend: str, widest: torch.dtype) -> None:
    module = build(dtype=widest, backend=backend, **CHUNKED[name])
    x = sequence(module, time=sum(chunks), dtype=widest).requires_grad_()
    whole, last = module(x)
    parts, state = [], None
    for chunk in x.split(chunks, dim=layout(module).index("T")):
        part, state = module.step(chunk, state)
        parts.append(part)
    output = torch.cat(parts, dim=1 if module.batch_first else 0)
    assert_close((output, state.lstm), (whole, last))
    grads = []
    for results in ((output, *state.lstm), (whole, *last)):
        grads.append(torch.autograd.grad(sum(r.square().sum() for r in results), [x, *module.parameters()]))
    assert_close(*grads)


def test_state_of_chunks_can_be_detached_and_copied() -> None:
    module = build(padding="causal")
    x = sequence(module)
    whole, _ = module(x)
    _, state = module.step(x[:, :5])
    assert isinstance(state, Conv1dLSTMState) and state.lstm[0].requires_grad
    state = tree_map_only(Tensor, torch.Tensor.detach, state)
    for again in (state, copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert_close(module.step(x[:, 5:], again)[0], whole[:, 5:])


def test_chunk_without_a_complete_window_gives_no_output() -> None:
    module = build(padding="valid", kernel_size=3)
    x = sequence(module)
    output, state = module.step(x[:, :4])
    assert output.shape == (BATCH, 0, HIDDEN) and state.lstm is None
    output, state = module.step(x[:, 4:5], state)
    assert output.shape == (BATCH, 1, HIDDEN)
    assert_close(output, module(x[:, :5])[0])


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_state_of_a_step_holds_no_more_than_it_shows(grad: bool) -> None:
    module = build(padding="valid", stride=[1, 4])
    with torch.set_grad_enabled(grad):
        _, state = module.step(sequence(module, time=100))
    for part in flat([[tail.frames for tail in state.conv], state.lstm]):
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


def test_chunks_under_autocast_have_one_dtype() -> None:
    module = build(padding="valid", kernel_size=3)
    x = sequence(module)
    with torch.autocast("cpu", torch.bfloat16):
        first, state = module.step(x[:, :2])
        assert first.shape[1] == 0 and state.conv[1].frames.dtype == first.dtype == torch.bfloat16
        assert module.step(x[:, 2:], state)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("under", ["second", "both"])
def test_stream_goes_on_under_autocast(under: str) -> None:
    module = build(padding="causal")
    x = sequence(module)
    with torch.autocast("cpu", torch.bfloat16, enabled=under == "both"):
        _, state = module.step(x[:, :5])
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = module.step(x[:, 5:].bfloat16() if under == "both" else x[:, 5:], state)
    torch.testing.assert_close(found.float(), module(x)[0][:, 5:], atol=0.02, rtol=0)


# No copies.


class Copies(TorchDispatchMode):
    """Lists the ops that move a tensor to other memory."""

    MOVING = (
        "clone", "copy_", "_to_copy", "contiguous", "cat", "stack", "constant_pad_nd", "index_select", "gather",
        "slice_backward", "select_backward",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.called.append(name)
        if func.namespace == "aten" and (name in self.MOVING or name.endswith("_copy")):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_lengths", [False, True], ids=["", "lengths"])
@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_is_copied_between_input_and_output(name: str, with_lengths: bool, native_ops) -> None:
    module = build(backend="cpu", **OPTIONS[name])
    x = sequence(module).requires_grad_()
    lengths = torch.tensor(LENGTHS) if with_lengths else None
    with Copies() as copies:
        output, _ = module(x, lengths=lengths)
        torch.autograd.grad(output, [x, *module.parameters()], torch.ones_like(output))
    states = ["cat"] * 2 if module.num_layers > 1 else []  # (h, c) of all layers
    assert copies.seen == states
    for op in ("conv1d", "lstm"):
        layers = len(module.conv) if op == "conv1d" else module.num_layers
        assert copies.called.count(f"{op}_forward") == copies.called.count(f"{op}_backward") == layers


class Fresh(TorchDispatchMode):
    """Bytes of the storages that ops bring into being."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.storages = {tensor.untyped_storage().data_ptr(): None for tensor in known}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, (tuple, list)) else [results]:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.storages:
                self.storages[storage.data_ptr()] = tensor  # alive, so that no other gets its address
                self.bytes += storage.nbytes()
        return results


@pytest.mark.parametrize(
    "name", ["two_layers", "valid", "full", "causal_stride", "dilation", "groups", "channels_first", "time_first"]
)
def test_memory_is_that_of_the_results(name: str, native_ops) -> None:
    module = build(backend="cpu", **OPTIONS[name])
    x = sequence(module)
    with torch.no_grad(), Fresh([x, *module.parameters()]) as fresh:
        output, (h, c) = module(x)
    results = output.numel() + h.numel() + c.numel()
    assert fresh.bytes == x.element_size() * results
    time, between = torch.tensor(TIME), 0
    for conv in module.conv:
        time = conv.output_lengths(time)
        between += BATCH * int(time) * conv.out_channels
    # Layer after layer.
    with torch.no_grad(), watching(module.lstm, "hook"), Fresh([x, *module.parameters()]) as fresh:
        module(x)
    assert fresh.bytes == x.element_size() * (between + results)


def test_copies_are_seen() -> None:
    with Copies() as copies:
        torch.zeros(2, 3).T.contiguous()
        torch.cat([torch.zeros(1), torch.zeros(1)])
    assert copies.seen == ["clone", "cat"]


# What users do to modules.


def test_repr_names_the_options_and_the_layers() -> None:
    shown = repr(build(padding="causal", pool=[("max", 2), None]))
    assert shown.startswith(
        "Conv1dLSTM(\n  input_size=4, conv_channels=[6, 9], hidden_size=5, padding='causal', "
        "pool=[('max', 2), None]\n  (conv): ModuleList(\n"
    )
    assert "(0): Pool1d('max', kernel=2, stride=2)" in shown and "(1): Pool1d(none)" in shown


def test_state_dict_has_the_names_of_the_docs() -> None:
    names = list(build(conv_channels=[6, 9]).state_dict())
    convolutions = [f"conv.{k}.{name}" for k in (0, 1) for name in ("weight", "bias")]
    recurrent = [f"lstm.{part}_{kind}_l0" for part in ("weight", "bias") for kind in ("ih", "hh")]
    assert names == convolutions + recurrent


def test_copies_are_equal_and_apart() -> None:
    module = build(padding="causal", pool=("max", 2))
    assert_copies_are_equal_and_apart(module, sequence(module))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_module_moves_between_dtypes(dtype: torch.dtype, backend: str) -> None:
    module = build(pool=[("max", 2), ("avg", 2)], backend=backend).to(dtype)
    output, (h, c) = module(sequence(module, dtype=dtype))
    assert output.dtype == h.dtype == dtype and c.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (output.double().sum() + c.sum()).backward()
    assert all(p.grad.dtype == dtype for p in module.parameters())


def test_autocast() -> None:
    module = build()
    x = sequence(module)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(x, lengths=torch.tensor(LENGTHS))
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_empty_batch(backend: str) -> None:
    module = build(pool=[("max", 2), None], backend=backend)
    output, (h, _) = module(sequence(module, batch=0))
    assert output.shape == (0, 6, HIDDEN) and h.shape == (1, 0, HIDDEN)


def test_second_derivatives(float64_backend: str) -> None:
    options = {"activation": ["tanh", "gelu"], "pool": [("avg", 2), None], "padding": ["causal", "same"]}
    module = Conv1dLSTM(1, [2, 2], 2, 2, dtype=torch.float64, backend=float64_backend, **options)
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    x = torch.randn(2, 5, 1, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return flat(torch.func.functional_call(module, dict(zip(parameters, values)), (x,)))

    torch.autograd.gradgradcheck(run, (x, *parameters.values()), fast_mode=True)


# CNN_LSTM.


def plain_cnn_lstm(kernel: int, layers: int) -> nn.ModuleDict:
    first, second = nn.Conv1d(INPUT, 6, kernel, padding=1), nn.Conv1d(6, 12, kernel, padding=1)
    lstm = nn.LSTM(12, HIDDEN, layers, batch_first=True, dropout=0.5 if layers > 1 else 0.0)
    cnn = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
    return nn.ModuleDict({"cnn": cnn, "lstm": lstm, "fc": nn.Linear(HIDDEN, 2)})


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kernel", [2, 3, 5])
def test_cnn_lstm_is_the_plain_one(kernel: int, layers: int, backend: str) -> None:
    torch.manual_seed(5)
    ours = CNN_LSTM(INPUT, 2, 6, kernel, HIDDEN, layers, dropout=0.5, backend=backend).eval()
    torch.manual_seed(5)
    plain = plain_cnn_lstm(kernel, layers).eval()
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert_same(ours.state_dict().values(), plain.state_dict().values())
    x = torch.randn(BATCH, TIME, INPUT)

    def twin(dtype: torch.dtype) -> nn.Module:
        copied = plain_cnn_lstm(kernel, layers).eval()
        copied.load_state_dict(ours.state_dict(), strict=True)
        return copied.to(dtype)

    def call(module: nn.ModuleDict, x: Tensor) -> Tensor:
        y = module["cnn"](x.permute(0, 2, 1)).permute(0, 2, 1)
        return module["fc"](module["lstm"](y)[0])

    check_against(ours, twin, [x], lambda module, x: module(x), call, terms=BATCH * TIME)
    assert ours(x).shape == (BATCH, TIME + 4 - 2 * (kernel - 1), 2)


def test_convolutions_of_cnn_lstm_have_the_numbers_of_the_plain_one() -> None:
    module = CNN_LSTM(INPUT, 2, 6)
    assert module.cnn[0].weight is module.get_parameter("cnn.0.weight")
    assert module.cnn[2].weight is module.get_parameter("cnn.2.weight")


def test_cnn_lstm_drops_out_between_its_layers_only() -> None:
    assert CNN_LSTM(3, 2).lstm.dropout == 0.2
    assert CNN_LSTM(3, 2, lstm_num_layers=1).lstm.dropout == 0.0


def test_cnn_lstm_with_lengths_equals_each_sample_alone(backend: str) -> None:
    module = CNN_LSTM(INPUT, 2, 6, 5, HIDDEN, backend=backend).eval()
    x, lengths = torch.randn(BATCH, TIME, INPUT), torch.tensor(LENGTHS)
    output = module(x, lengths)
    for sample, length in enumerate(LENGTHS):
        alone = module(x[sample : sample + 1, :length])
        assert_close(output[sample : sample + 1, : alone.shape[1]], alone)


# Without gradients convolutions, LSTM and linear layer are one op of the CPU backend.

APART = ("reflect", "activations", "max_pool", "both_pools")  # options that differ, a pool below the LSTM


# One sample; a few, whose hidden units are shared out; so many that layers take turns.
@pytest.mark.parametrize("batch", [1, 3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_one_op_gives_the_bits_of_layers(name: str, dtype: torch.dtype, batch: int, native_ops) -> None:
    module = build(dtype=dtype, **OPTIONS[name])
    x, state = sequence(module, batch, dtype=dtype), state_of(module, batch, dtype)
    for arguments in ((x,), (x, state)):
        with torch.no_grad(), Called() as called:
            found = module(*arguments)
        assert ("conv1d_lstm_layers" in called.ops) == (name not in APART)
        layers = module(*arguments)
        assert_same(found, layers)
        assert [t.stride() for t in flat(found)] == [t.stride() for t in flat(layers)]


@pytest.mark.parametrize("layers", [1, 2])
def test_cnn_lstm_is_one_op(layers: int, native_ops) -> None:
    module = CNN_LSTM(INPUT, 2, 6, 3, HIDDEN, layers).eval()
    x = torch.randn(BATCH, TIME, INPUT)
    assert_close(without_gradients(module, x, ops=["conv1d_lstm_layers"]), module(x))
    with torch.no_grad(), Called() as called:
        module.train()(x)
    assert ("conv1d_lstm_layers" in called.ops) == (layers == 1)  # dropout keeps layers apart


@pytest.mark.parametrize("part", ["conv.0", "conv.1", "lstm"])
@pytest.mark.parametrize("how", ["hook", "pre_hook", "global", "forward", "subclass"])
def test_whoever_watches_a_layer_sees_its_calls(how: str, part: str, native_ops) -> None:
    model = build()
    x = sequence(model)
    expected = without_gradients(model, x, ops=["conv1d_lstm_layers"])
    with torch.no_grad(), watching(model.get_submodule(part), how) as seen:
        assert_same(model(x), expected)
    assert model.get_submodule(part) in seen
    without_gradients(model, x, ops=["conv1d_lstm_layers"])


def test_layers_that_learn_are_not_in_the_op(native_ops) -> None:
    for part in ("conv.0", "conv.1", "lstm"):
        model = build().requires_grad_(False)
        model.get_submodule(part).requires_grad_(True)
        with Called() as called:
            output, _ = model(sequence(model))
        assert "conv1d_lstm_layers" not in called.ops and output.requires_grad


@pytest.mark.parametrize("name", ["two_layers", "causal_stride", "no_bias", "recurrent"])
def test_op_and_its_fake_agree(name: str, native_ops) -> None:
    module = build(**OPTIONS[name]).requires_grad_(False)
    convs, lstm = list(module.conv), module.lstm
    for state, head, time_major in (((None, None), None, False), (state_of(module), torch.randn(2, 4), True)):
        head = head if name == "recurrent" else None
        arguments = (
            sequence(module), [t for conv in convs for t in conv.parameters()], module.bias,
            [conv.stride for conv in convs], [pad for conv in convs for pad in conv.pads()],
            [conv.dilation for conv in convs], [conv.groups for conv in convs], "zeros", "relu",
            list(lstm.parameters()), [], *lstm.options_of_layers(), *state, head, None, time_major,
        )  # fmt: skip
        library.opcheck(torch.ops.convfast.conv1d_lstm_layers.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"convolutions": []}, "convolutions must be a list of 4, got 0"),
        ({"padding": [1]}, "padding must be a list of 4, got 1"),
        ({"dilation": [1]}, "dilation must be a list of 2, got 1"),
        ({"groups": []}, "groups must be a list of 2, got 0"),
    ],
)
def test_bad_call_of_the_op(change: dict, message: str, native_ops) -> None:
    module = build().requires_grad_(False)
    arguments = {"x": X, "convolutions": [*module.conv.parameters()], "conv_bias": True, "stride": [1, 1]}
    arguments |= {"padding": [1] * 4, "dilation": [1, 1], "groups": [1, 1], "padding_mode": "zeros"}
    arguments |= {"activation": "relu", "weights": [*module.lstm.parameters()], "peepholes": [], "bias": True}
    arguments |= {"projection": False, "bidirectional": False, "h0": None, "c0": None, "head": None}
    arguments |= {"head_bias": None, "time_major": False}
    torch.ops.convfast.conv1d_lstm_layers(**arguments)
    with pytest.raises(RuntimeError, match=f"conv1d_lstm_layers: {message}"):
        torch.ops.convfast.conv1d_lstm_layers(**(arguments | change))


# Capture.


# The reference is compiled step by step.
@pytest.mark.parametrize(("name", "time"), [("causal_stride", TIME), ("both_pools", 9), ("recurrent", 3)])
def test_compiles_whole(name: str, time: int, backend: str) -> None:
    module = build(backend=backend, **OPTIONS[name])
    x, hx, lengths = sequence(module, time=time), tuple(state_of(module)), torch.tensor([time - 2, time, time - 1])
    assert_compiles_whole(module, (x,), (x, hx, lengths))


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_exports(strict: bool, backend: str) -> None:
    module = build(backend=backend, **OPTIONS["both_pools"]).eval()
    x, hx, lengths = sequence(module), tuple(state_of(module)), torch.tensor(LENGTHS)
    program = torch.export.export(module, (x, hx, lengths), strict=strict)
    with torch.no_grad():
        assert_close(program.module()(x, hx, lengths), module(x, hx, lengths))


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 wants pooling to leave no frame over")
def test_exports_for_any_time_and_batch(native_ops) -> None:
    module = build(stride=[2, 1], padding=1, pool=[None, ("max", 2)]).eval()
    dims = {"input": {0: torch.export.Dim("batch"), 1: torch.export.Dim("time", min=16)}}
    program = torch.export.export(module, (sequence(module, time=32),), dynamic_shapes=dims)
    x = sequence(module, 5, 53)
    with torch.no_grad():
        assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("name", OPTIONS)
def test_scripts_saves_and_loads(name: str, native_ops) -> None:
    module = build(**OPTIONS[name])
    script = scripted(module)
    x, hx, lengths = sequence(module), tuple(state_of(module)), torch.tensor(LENGTHS, dtype=torch.int32)
    with torch.no_grad():
        for arguments in ((x,), (x, hx), (x, hx, lengths)):
            assert_close(script(*arguments), module(*arguments))
    assert_same(script.output_lengths(lengths), module.output_lengths(lengths))


def test_scripting_a_model_leaves_it_as_it_is(native_ops) -> None:
    for model in (build(), CNN_LSTM(INPUT, 2).eval()):
        parameters = len(list(model.parameters()))
        x, lengths = torch.randn(BATCH, TIME, INPUT), torch.tensor(LENGTHS)
        script = scripted(model)
        assert isinstance(model.lstm, LSTM) and len(list(model.parameters())) == parameters > 0
        with torch.no_grad():
            assert_close(script(x, lengths=lengths), model(x, lengths=lengths))


# Bad arguments: what was wrong, what was expected, what came.

BAD_CONSTRUCTION = {
    "input_size": ({"input_size": 0}, "Conv1dLSTM: input_size is 0, expected an int >= 1"),
    "no_layer": ({"conv_channels": []}, r"Conv1dLSTM: conv_channels is \[\], expected positive ints, one per layer"),
    "channels": ({"conv_channels": [3, 0]}, r"Conv1dLSTM: conv_channels is \[3, 0\], expected positive ints"),
    "layers": ({"stride": [1, 1, 1]}, r"Conv1dLSTM: stride is \[1, 1, 1\], expected 2 entries, one per layer"),
    "pool_layers": ({"pool": [None]}, r"Conv1dLSTM: pool is \[None\], expected 2 entries, one per layer"),
    "channels_none": ({"conv_channels": None}, "Conv1dLSTM: conv_channels is None, expected positive ints"),
    "channels_type": ({"conv_channels": 4.0}, "Conv1dLSTM: conv_channels is 4.0, expected positive ints"),
    "tuple": ({"kernel_size": (3, 5)}, r"Conv1dLSTM: kernel_size is \(3, 5\), expected .* a list, one per layer"),
    "hidden_size": ({"hidden_size": 0}, "LSTM: hidden_size is 0, expected an int >= 1"),
    "padding": ({"padding": ["same", "half"]}, "Conv1d: padding is 'half', expected .* valid, same, full, causal"),
    "pool": ({"pool": ("min", 2)}, r"Conv1dLSTM: pool is \('min', 2\), expected None or a tuple"),
    "pool_none": ({"pool": ("none", 2)}, r"Conv1dLSTM: pool is \('none', 2\), expected None or a tuple"),
    "pool_kernel": ({"pool": ("max", 0)}, "Conv1dLSTM: kernel of pool is 0, expected an int >= 1"),
    "pool_stride": ({"pool": ("max", 2, 0)}, "Conv1dLSTM: stride of pool is 0, expected an int >= 1"),
}


@pytest.mark.parametrize("name", BAD_CONSTRUCTION)
def test_bad_constructor_argument(name: str) -> None:
    options, message = BAD_CONSTRUCTION[name]
    with pytest.raises(ValueError, match=message):
        build(**options)


X = torch.zeros(BATCH, TIME, INPUT)
H = torch.zeros(1, BATCH, HIDDEN)
BAD_CALLS = {
    "type": ({}, ([1.0],), TypeError, "Conv1dLSTM: input is a list, expected a Tensor"),
    "rank": ({}, (X[0],), ValueError, r"Conv1dLSTM: input has 2 dims, expected 3 .*layout \[B, T, F\]"),
    "features": ({}, (X[..., 1:],), ValueError, "Conv1dLSTM: input has 3 features, expected input_size=4"),
    "features_first": (
        {"channels_first": True},
        (X,),
        ValueError,
        r"input has 13 features, expected input_size=4 \(input shape \[3, 13, 4\], layout \[B, F, T\]\)",
    ),
    "dtype": ({}, (X.double(),), TypeError, "conv1d: input has dtype torch.float64, expected torch.float32 like wei"),
    "sparse": ({}, (X.to_sparse(),), TypeError, "Conv1dLSTM: input is a torch.sparse_coo tensor, expected a den"),
    "device": ({}, (X.to("meta"),), ValueError, "conv1d: input is on meta, expected cpu like weight"),
    "device_of_state": ({}, (X, (H, H.to("meta"))), ValueError, "state c is on meta, expected cpu"),
    "no_time": ({}, (X[:, :0],), ValueError, "Conv1dLSTM: input has 0 time steps, expected at least 1"),
    "too_short": ({"padding": "valid"}, (X[:, :4],), ValueError, "conv1d: input has size 2 in time, expected at le"),
    "too_short_for_pool": ({"pool": ("max", 20)}, (X,), ValueError, "Conv1dLSTM: input of pool has 13 .* kernel 20"),
    "state": ({}, (X, (H, H[:, 1:])), ValueError, r"^Conv1dLSTM: c of state has shape \[1, 2, 5\], expected \[1, 3, 5"),
    "state_type": ({}, (X, H), TypeError, r"^Conv1dLSTM: state is a Tensor, expected two tensors \(h, c\)"),
    "lengths_list": ({}, (X, None, [1, 2, 3]), TypeError, "^Conv1dLSTM: lengths has type list, expected a Tensor"),
    "lengths": ({}, (X, None, torch.tensor([1, 14, 2])), ValueError, "lengths has 14, expected 0 to 13"),
}


@pytest.mark.parametrize("gradients", [True, False], ids=["", "no_grad"])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_is_named_with_what_was_expected(name: str, gradients: bool) -> None:
    options, arguments, error, message = BAD_CALLS[name]
    with torch.set_grad_enabled(gradients), pytest.raises(error, match=message):
        build(**options)(*arguments)


BAD_CNN_LSTM = {
    "cnn_kernel_size": 0,
    "input_dim": 0,
    "output_dim": 0,
    "cnn_out_channels": "6",
    "lstm_hidden_size": 0,
    "lstm_num_layers": "1",
    "dropout": 2,
}


@pytest.mark.parametrize("name", BAD_CNN_LSTM)
def test_bad_argument_of_cnn_lstm(name: str) -> None:
    value = BAD_CNN_LSTM[name]
    with pytest.raises(ValueError, match=f"^CNN_LSTM: {name} is {value!r}, expected"):
        CNN_LSTM(**({"input_dim": INPUT, "output_dim": 2, "lstm_num_layers": 1} | {name: value}))


@pytest.mark.parametrize("gradients", [True, False], ids=["", "no_grad"])
def test_cnn_lstm_names_an_input_that_it_cannot_take(gradients: bool) -> None:
    model = CNN_LSTM(INPUT, 2)
    with torch.set_grad_enabled(gradients):
        with pytest.raises(TypeError, match=r"^conv1d: input is a list, expected a Tensor"):
            model([1.0])
        with pytest.raises(ValueError, match=r"^conv1d: input is on meta, expected cpu"):
            model(X.to("meta"))


def test_cnn_lstm_names_lengths_that_are_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"^CNN_LSTM: lengths has type list"):
        CNN_LSTM(INPUT, 2)(X, [1, 2, 3])


def test_steps_see_what_hooks_make_of_weights(backend: str) -> None:
    torch.manual_seed(0)
    module = Conv1dLSTM(4, [5, 3], 6, padding=["causal", "valid"], backend=backend).eval()
    for conv in module.conv:
        torch.nn.utils.weight_norm(conv)
        with torch.no_grad():
            conv.weight_g.mul_(3)  # what the forward makes of it is not in conv.weight yet
    module.conv[1].register_forward_hook(lambda conv, args, output: 2 * output)
    x = torch.randn(2, 13, 4)
    state, outputs = None, []
    for chunk in x.split([3, 0, 6, 4], dim=1):
        output, state = module.step(chunk, state)
        outputs.append(output)
    assert outputs[1].shape == (2, 0, 6)
    torch.testing.assert_close(torch.cat(outputs, dim=1), module(x)[0])


def test_step_with_what_is_no_convolution() -> None:
    module = Conv1dLSTM(4, 5, 6, padding="causal")
    module.conv[0] = torch.nn.Sequential(module.conv[0])
    with pytest.raises(TypeError, match=r"^Conv1dLSTM: conv.0 is a Sequential, expected a Conv1d for step\(\)"):
        module.step(torch.randn(2, 3, 4))


def test_lengths_with_what_takes_none() -> None:
    module = Conv1dLSTM(4, 5, 6)
    module.lstm = torch.nn.LSTM(5, 6, batch_first=True)
    with pytest.raises(TypeError, match=r"^Conv1dLSTM: lengths is a Tensor, expected None with a torch\.nn\.LSTM"):
        module(torch.randn(2, 3, 4), lengths=torch.tensor([3, 2]))


BAD_STEPS = {
    "causal_mode": (
        {"padding": "causal", "padding_mode": "replicate"},
        "Conv1dLSTM: padding_mode of layer 0 is 'replicate', expected 'zeros' for step()",
    ),
    "same": ({}, "Conv1dLSTM: padding of layer 0 is 'same', expected 'valid' or 'causal' for step()"),
    "int": ({"padding": [0, 1]}, "Conv1dLSTM: padding of layer 1 is 1, expected 'valid' or 'causal' for step()"),
    "bidirectional": ({"bidirectional": True}, "Conv1dLSTM: bidirectional is True, expected False for step()"),
    "pool": ({"pool": [None, ("max", 2)]}, "Conv1dLSTM: pool of layer 1 is 'max', expected None for step()"),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_step_needs_options_that_do_not_look_ahead(name: str) -> None:
    options, message = BAD_STEPS[name]
    with pytest.raises(ValueError) as raised:
        build(**({"padding": "valid"} | options if name != "same" else options)).step(X)
    assert str(raised.value) == message


def test_state_of_a_stream_is_saved_and_loaded(tmp_path: Path) -> None:
    module = Conv1dLSTM(INPUT, [4, 3], 6, padding="causal", backend="reference")
    _, state = module.step(X)
    torch.save(state, tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(module.step(X, again)[0], module.step(X, state)[0])


@pytest.mark.parametrize("make", [lambda: build(), lambda: LSTM(INPUT, 5, batch_first=True)], ids=["conv", "lstm"])
def test_nested_tensor_is_refused(make) -> None:
    with pytest.raises(TypeError, match="LSTM: input is a nested tensor, expected a dense"):
        make()(torch.nested.nested_tensor([X[0, :3], X[0]]))


def test_bad_state_of_a_step() -> None:
    module = build(padding="causal")
    with pytest.raises(TypeError, match=r"Conv1dLSTM: state is a tuple of 2, expected None or what step\(\) returned"):
        module.step(X, (H, H))
    _, state = module.step(X)
    h, c = state.lstm
    with pytest.raises(ValueError, match=r"^Conv1dLSTM: c of lstm of state has shape \[1, 2, 5\], expected"):
        module.step(X, state._replace(lstm=(h, c[:, 1:])))
    with pytest.raises(ValueError, match="Conv1dLSTM: input has 2 samples, expected 3 as state has"):
        module.step(X[1:], state)
    with pytest.raises(TypeError, match=r"layer 0 has dtype torch\.float32, expected torch\.float16"):
        module.half().step(X.half(), state)
    with pytest.raises(TypeError, match=r"layer 0 has dtype torch\.float32, expected torch\.int64"):
        build(padding="causal").step(X.long(), state)
    with pytest.raises(ValueError, match="Conv1dLSTM: state has 2 convolutions, expected 1"):
        build(conv_channels=6, padding="causal").step(X, state)
    with pytest.raises(ValueError, match=r"layer 1 has frames of shape \[3, 2, 6\], expected \[3, n, 5\]"):
        build(conv_channels=[5, 9], padding="causal").step(X, state)
    with pytest.raises(ValueError, match="layer 0 has 2 frames, expected 4 to 4 with its kernel"):
        build(kernel_size=5, padding="causal").step(X, state)
    with pytest.raises(ValueError, match="layer 0 has 2 frames, expected 0 to 1 with its kernel"):
        build(kernel_size=2, padding="valid").step(X, state)


@pytest.mark.parametrize("make", [CNN_LSTM, Conv1dLSTM], ids=["cnn_lstm", "conv1d_lstm"])
def test_lstm_of_another_order_gives_the_same_with_and_without_gradients(make: type) -> None:
    module = make(INPUT, 4, 8).eval()
    module.lstm = LSTM(module.lstm.input_size, module.lstm.hidden_size)  # takes time first
    x = torch.randn(4, 4 if make is CNN_LSTM else TIME, INPUT)
    trained = flat(module(x))[0]
    with torch.no_grad():
        torch.testing.assert_close(flat(module(x))[0], trained)


def test_exported_from_the_package() -> None:
    assert convfast.Conv1dLSTM is Conv1dLSTM and convfast.CNN_LSTM is CNN_LSTM
