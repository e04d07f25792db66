"""What is right: a plain loop per sample and step with torch's convolutions, and how far from it a result may be.

Shares no code with convfast, so that a mistake there is not made here too.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.cases import normal

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
OUTPUTS = ("output", "h_n", "c_n")  # conv1d has the first alone


def lstm_gates(gates, c=None, peephole=None):
    """Gates [N, 4C, *S] in the order i f g o, c [N, C, *S], peephole [3, C, *S] in the order i f o."""
    hidden = gates.shape[1] // 4
    i, f, g, o = (gates[:, n * hidden : (n + 1) * hidden] for n in range(4))
    c = torch.zeros_like(i) if c is None else c
    w = i.new_zeros(3, *i.shape[1:]) if peephole is None else peephole
    c_next = torch.sigmoid(f + w[1] * c) * c + torch.sigmoid(i + w[0] * c) * torch.tanh(g)
    return torch.sigmoid(o + w[2] * c_next) * torch.tanh(c_next), c_next


def pad(x, before, behind, mode):
    flat = [n for pair in zip(reversed(before), reversed(behind)) for n in pair]
    return F.pad(x, flat, mode="constant" if mode == "zeros" else mode)


def conv_lstm(
    input,
    weight_ih,
    weight_hh,
    bias=None,
    peephole=None,
    state=None,
    lengths=None,
    *,
    steps=None,
    stride=1,
    padding="same",
    dilation=1,
    groups=1,
    padding_mode="zeros",
    reverse=False,
):
    """The arguments of `convfast.conv_lstm`; output, (h_n, c_n) in the dtype of the weights."""
    dims = weight_hh.ndim - 2

    def each(value):
        return (value,) * dims if isinstance(value, int) else tuple(value)

    def halves(totals):
        return [n // 2 for n in totals], [n - n // 2 for n in totals]

    def input_gates(frame):
        if weight_ih is None:
            return frame
        if padding == "same":
            before, behind = halves([d * (k - 1) for d, k in zip(each(dilation), weight_ih.shape[2:])])
        else:
            before = behind = each(0 if padding == "valid" else padding)
        return CONV[dims](
            pad(frame, before, behind, padding_mode), weight_ih, None, each(stride), 0, each(dilation), groups
        )

    def recurrent_gates(h):
        return CONV[dims](pad(h, *halves([k - 1 for k in weight_hh.shape[2:]]), "zeros"), weight_hh)

    h0, c0 = (None, None) if state is None else state
    batch, time = (next(s for s in (h0, c0) if s is not None).shape[0], steps) if input is None else input.shape[:2]
    outputs, h_last, c_last = [], [], []
    for b in range(batch):
        length = time if lengths is None else int(lengths[b])
        order = list(reversed(range(length))) if reverse else list(range(length))
        fed = {t: None if input is None else input_gates(input[b : b + 1, t]) for t in range(time)}
        some = fed[0] if input is not None else next(s for s in (h0, c0) if s is not None)
        size = (1, weight_hh.shape[1], *some.shape[2:])
        h = weight_hh.new_zeros(size) if h0 is None else h0[b : b + 1]
        c = weight_hh.new_zeros(size) if c0 is None else c0[b : b + 1]
        frames = [weight_hh.new_zeros(size) for _ in range(time)]
        for t in order:
            gates = recurrent_gates(h)
            if fed[t] is not None:
                gates = gates + fed[t]
            if bias is not None:
                gates = gates + bias.view(-1, *[1] * dims)
            h, c = lstm_gates(gates, c, peephole)
            frames[t] = h
        outputs.append(torch.stack(frames, 1))
        h_last.append(h)
        c_last.append(c)
    return torch.cat(outputs), (torch.cat(h_last), torch.cat(c_last))


def with_all(result, *tensors):
    """The result; where nothing of a tensor went into it, the gradient of that tensor is zero instead of missing."""
    return result + 0 * sum(t.sum() for t in tensors if t is not None)


ACTIVATIONS = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "leaky_relu": nn.LeakyReLU(),
}


def conv1d(
    input,
    weight,
    bias=None,
    lengths=None,
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    padding_mode="zeros",
    activation="none",
    channels_first=False,
):
    """The arguments of `convfast.conv1d`: `nn.Conv1d` on each sample alone; output in the dtype of the weight."""
    channels, features, kernel = weight.shape
    span = dilation * (kernel - 1)
    layer = nn.Conv1d(
        features * groups, channels, kernel, stride, span if padding == "full" else padding, dilation, groups,
        bias is not None, padding_mode, device="meta",
    )  # fmt: skip
    parameters = {"weight": weight} | ({} if bias is None else {"bias": bias})
    x = input if channels_first else input.transpose(1, 2)
    padded = {"valid": 0, "same": span, "full": 2 * span}.get(padding) if isinstance(padding, str) else 2 * padding
    time = (x.shape[2] + padded - span - 1) // stride + 1
    outputs = [x.new_zeros(0, channels, time)]
    for b in range(x.shape[0]):
        length = x.shape[2] if lengths is None else int(lengths[b])
        y = x.new_zeros(1, channels, 0)
        if length > 0 and length + padded > span:
            y = ACTIVATIONS[activation](torch.func.functional_call(layer, parameters, x[b : b + 1, :, :length]))
        outputs.append(F.pad(y, (0, time - y.shape[2])))
    return with_all(torch.cat(outputs).transpose(1, 2), input, weight, bias)


def lstm(
    input,
    weight_ih,
    weight_hh,
    bias=None,
    peephole=None,
    weight_hr=None,
    reverse=None,
    state=None,
    lengths=None,
):
    """The arguments of `convfast.lstm`; output, (h_n, c_n) in the dtype of the weights."""
    batch, time = input.shape[:2]
    h0, c0 = (None, None) if state is None else state
    directions = [(weight_ih, weight_hh, bias, peephole, weight_hr)] + ([] if reverse is None else [reverse])
    outputs, h_last, c_last = [], [], []
    for d, (w_ih, w_hh, b_h, p, w_hr) in enumerate(directions):
        for b in range(batch):
            length = time if lengths is None else int(lengths[b])
            h = input.new_zeros(1, w_hh.shape[1]) if h0 is None else h0[d, b : b + 1]
            c = input.new_zeros(1, w_hh.shape[0] // 4) if c0 is None else c0[d, b : b + 1]
            frames = [torch.zeros_like(h) for _ in range(time)]
            for t in range(length) if d == 0 else reversed(range(length)):
                h, c = lstm_gates(F.linear(input[b : b + 1, t], w_ih, b_h) + F.linear(h, w_hh), c, p)
                h = frames[t] = h if w_hr is None else F.linear(h, w_hr)
            outputs.append(torch.stack(frames, 1))
            h_last.append(h)
            c_last.append(c)

    def joined(parts):
        return torch.cat(parts).unflatten(0, (len(directions), batch))

    weights = [t for direction in directions for t in direction]
    output = with_all(joined(outputs).movedim(0, 2).flatten(2), input, *weights, h0, c0)
    return output, (joined(h_last), with_all(joined(c_last), input, *weights))


def with_gradients(values, leaves):
    """`values`, and the gradient of every leaf for the same random gradients of the values."""
    generator = torch.Generator().manual_seed(1)
    grads = [normal(v.shape, generator).to(v) for v in values.values()]
    found = torch.autograd.grad(list(values.values()), list(leaves.values()), grads)
    return values | {f"gradient of {name}": g for name, g in zip(leaves, found)}


def leaves_of(arguments):
    """The tensors of a call that have a gradient."""
    return {name: t for name, t in arguments.items() if t is not None and name != "lengths"}


def rounded(arguments, dtype):
    """The very same numbers in float64, and in `dtype` (float32 where that is float64)."""
    return [
        arguments | {name: t.detach().to(d).requires_grad_() for name, t in leaves_of(arguments).items()}
        for d in (torch.float64, torch.float32 if dtype == torch.float64 else dtype)
    ]


def results(case, function, arguments, **more):
    """Outputs of a case's call, and the gradient of every tensor for the same random gradients of the outputs."""
    found = case.call(function, arguments, **more)
    outputs = found if isinstance(found, tuple) else (found,)
    return with_gradients(dict(zip(OUTPUTS, outputs)), leaves_of(arguments))


@functools.cache
def expected(oracle, case, dtype, layout):
    """Results of the oracle in float64, and in `dtype` as eager would round them."""
    return tuple(results(case, oracle, a) for a in rounded(case.arguments(dtype, layout), dtype))


def summed(name):
    """Whether a result is a sum over samples and frames."""
    return name.startswith(("gradient of weight", "gradient of bias", "gradient of peephole"))


# Eager is one draw of rounding errors, another order of the same sums another: four times its error is room for the
# worst of many elements. Where eager is exact by luck: a result and an activation before it, each good to 2 eps, and
# a sum of n terms of either sign taken one after another, which errs by sqrt(n) eps.
EAGER_MULTIPLE = 4.0
FLOOR_EPS = 4.0
# Of sizes that are drawn: one unit and one step are among them, where a gradient is what is left of larger terms, and
# eager's error one number, which may be small by luck.
FLOOR_OF_DRAWN = 256.0


def relative_errors(actual, exact):
    """(RMS of the error over RMS of the exact values, largest error over largest exact value)."""
    exact = exact.detach().double().cpu()
    error = actual.detach().double().cpu() - exact
    if exact.numel() == 0:
        return 0.0, 0.0
    rms, largest = exact.square().mean().sqrt().item(), exact.abs().max().item()
    if largest == 0.0:
        return (0.0, 0.0) if error.abs().max().item() == 0.0 else (math.inf, math.inf)
    return error.square().mean().sqrt().item() / rms, error.abs().max().item() / largest


def assert_close_to_oracle(actual, exact, eager, name="result", terms=0, multiple=EAGER_MULTIPLE, floor=FLOOR_EPS):
    """`actual` is as near to `exact` (float64) as `eager`, plain torch in the dtype of `eager`, is: RMS and maximum.

    `terms`: how many frames and pixels are summed up in each element, as in the gradient of a weight.
    A float64 result comes with `eager` in float32, with errors counted in eps: the oracle is float64 too.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    eps = torch.finfo(eager.dtype).eps
    unit = torch.finfo(torch.float64).eps / eps if actual.dtype == torch.float64 else 1.0
    got, eager_errors = relative_errors(actual, exact), relative_errors(eager, exact)
    for kind, error, eager_error in zip(("RMS", "largest"), got, eager_errors):
        bound = unit * (multiple * eager_error + (floor + math.sqrt(terms)) * eps)
        assert error <= bound, (
            f"{name}: {kind} error {error:.2g}, expected at most {bound:.2g} (eager {eager_error:.2g})"
        )


def assert_matches(
    oracle, op, case, dtype, backend, layout="contiguous", *, multiple=EAGER_MULTIPLE, floor=FLOOR_EPS, **more
):
    """`op` on `backend` gives the results and gradients that `oracle` has for the case."""
    exact, eager = expected(oracle, case, dtype, layout)
    actual = results(case, op, case.arguments(dtype, layout), backend=backend, **more)
    batch, time, _, *space = actual["output"].shape
    for name, value in actual.items():
        # A peephole has weights for every pixel, which sum over frames alone.
        terms = batch * time * (1 if "peephole" in name else math.prod(space)) if summed(name) else 0
        assert_close_to_oracle(value, exact[name], eager[name], name, terms, multiple, floor)


def assert_close_where_drawn(actual, expected, name):
    """Of results in the same dtype: equal to rounding, relative to the largest number."""
    bound = FLOOR_OF_DRAWN * torch.finfo(expected.dtype).eps * expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound, msg=lambda text: f"{name}: {text}")
