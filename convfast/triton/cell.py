"""The LSTM cell in registers, float32; the formulas of csrc/common/cell.h."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    # 1 - 2 / (exp(2x) + 1) cancels near zero; the series is good to 1e-8 below 1/4.
    square = x * x
    series = square * (62 / 2835) - 17 / 315
    series = series * square + 2 / 15
    series = series * square - 1 / 3
    series = (series * square) * x + x
    return tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def cell_forward(i, f, g, o, c, p_i, p_f, p_o, PEEPHOLE: tl.constexpr):
    """Pre-activations and c → activated i, f, g, o, then c' and h. The p_ are not looked at without PEEPHOLE."""
    if PEEPHOLE:
        i += p_i * c
        f += p_f * c
    i = sigmoid(i)
    f = sigmoid(f)
    g = tanh(g)
    c_out = f * c + i * g
    if PEEPHOLE:
        o += p_o * c_out
    o = sigmoid(o)
    return i, f, g, o, c_out, o * tanh(c_out)


@triton.jit
def cell_backward(i, f, g, o, c, c_out, dh, dc_out, p_i, p_f, p_o, PEEPHOLE: tl.constexpr):
    """Activated gates, c before and after, gradients of h and of c' → di, df, dg, do, dc."""
    squashed = tanh(c_out)
    do = dh * squashed * o * (1.0 - o)
    dc = dc_out + dh * o * (1.0 - squashed * squashed)
    if PEEPHOLE:
        dc += p_o * do
    di = dc * g * i * (1.0 - i)
    df = dc * c * f * (1.0 - f)
    dg = dc * i * (1.0 - g * g)
    dc = dc * f
    if PEEPHOLE:
        dc += p_i * di + p_f * df
    return di, df, dg, do, dc
