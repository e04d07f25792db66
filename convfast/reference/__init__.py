"""Plain torch, differentiable: the oracle, and the backend that always works. Contracts are in csrc/ops.h."""

from .conv1d import conv1d_backward, conv1d_forward
from .conv_lstm import conv_lstm_backward, conv_lstm_forward
from .lstm import lstm_backward, lstm_forward
from .lstm_gates import lstm_gates_backward, lstm_gates_forward

__all__ = [
    "conv1d_backward",
    "conv1d_forward",
    "conv_lstm_backward",
    "conv_lstm_forward",
    "lstm_backward",
    "lstm_forward",
    "lstm_gates_backward",
    "lstm_gates_forward",
]
