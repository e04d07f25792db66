"""What is right: a plain loop per sample and step with torch's convolutions, and how far from it a result may be.

Shares no code with convfast, so that a mistake there is not made here too.
"""

import math

import torch
import torch.nn.functional as F

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def lstm_gates(gates, c=None, peephole=None):
    """Gates [N, 4C, *S] in the order i f g o, c [N, C, *S], peephole [3, C, *S] in the order i f o."""
    hidden = gates.shape[1] // 4
    i, f, g, o = (gates[:, n * hidden : (n + 1) * hidden] for n in range(4))
    c = torch.zeros_like(i) if c is None else c
    w = i.new_zeros(3, *i.shape[1:]) if peephole is None else peephole
    c_next = torch.sigmoid(f + w[1] * c) * c + torch.sigmoid(i + w[0] * c) * torch.tanh(g)
    return torch.sigmoid(o + w[2] * c_next) * torch.tanh(c_next), c_next


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

    def pad(x, before, behind, mode):
        flat = [n for pair in zip(reversed(before), reversed(behind)) for n in pair]
        return F.pad(x, flat, mode="constant" if mode == "zeros" else mode)

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


# Eager is one draw of rounding errors, another order of the same sums another: four times its error is room for the
# worst of many elements. Where eager is exact by luck: a result and an activation before it, each good to 2 eps, and
# a sum of n terms of either sign taken one after another, which errs by sqrt(n) eps.
EAGER_MULTIPLE = 4.0
FLOOR_EPS = 4.0


def relative_errors(actual, exact):
    """(RMS of the error over RMS of the exact values, largest error over largest exact value)."""
    exact = exact.detach().double()
    error = actual.detach().double() - exact
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
