"""ConvLSTM and its parts, fast and exact. Importing compiles nothing; the first call may build the native library."""

from .backends import available, release_workspace
from .explain import explain
from .nn import ConvLSTM, ConvLSTM1d, ConvLSTM3d, ConvLSTMCell
from .ops import conv_lstm, lstm_gates

__version__ = "0.1.0"
__all__ = [
    "ConvLSTM",
    "ConvLSTM1d",
    "ConvLSTM3d",
    "ConvLSTMCell",
    "__version__",
    "available",
    "conv_lstm",
    "explain",
    "lstm_gates",
    "release_workspace",
]
