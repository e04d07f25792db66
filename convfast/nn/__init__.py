"""Modules."""

from .conv1d import Conv1d
from .conv1d_lstm import CNN_LSTM, Conv1dLSTM
from .conv_lstm import ConvLSTM, ConvLSTM1d, ConvLSTM3d, ConvLSTMCell, ConvLSTMCell1d, ConvLSTMCell3d
from .lstm import LSTM, RegLSTM
from .state import Conv1dLSTMState, ConvLSTMState

__all__ = [
    "CNN_LSTM",
    "LSTM",
    "Conv1d",
    "Conv1dLSTM",
    "Conv1dLSTMState",
    "ConvLSTM",
    "ConvLSTM1d",
    "ConvLSTM3d",
    "ConvLSTMCell",
    "ConvLSTMCell1d",
    "ConvLSTMCell3d",
    "ConvLSTMState",
    "RegLSTM",
]
