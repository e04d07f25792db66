"""ConvLSTM and its parts, fast and exact. Importing compiles nothing; the first call may build the native library."""

from .backends import available, load_ops, release_workspace
from .explain import explain
from .nn import (
    CNN_LSTM,
    LSTM,
    Conv1d,
    Conv1dLSTM,
    ConvLSTM,
    ConvLSTM1d,
    ConvLSTM3d,
    ConvLSTMCell,
    ConvLSTMCell1d,
    ConvLSTMCell3d,
    RegLSTM,
)
from .ops import conv1d, conv1d_lengths, conv_lstm, lstm, lstm_gates

__version__ = "0.1.0"
__all__ = [
    "CNN_LSTM",
    "LSTM",
    "Conv1d",
    "Conv1dLSTM",
    "ConvLSTM",
    "ConvLSTM1d",
    "ConvLSTM3d",
    "ConvLSTMCell",
    "ConvLSTMCell1d",
    "ConvLSTMCell3d",
    "RegLSTM",
    "__version__",
    "available",
    "conv1d",
    "conv1d_lengths",
    "conv_lstm",
    "explain",
    "load_ops",
    "lstm",
    "lstm_gates",
    "release_workspace",
]
