"""Modules."""

from .conv_lstm import ConvLSTM, ConvLSTM1d, ConvLSTM3d, ConvLSTMCell
from .state import ConvLSTMState

__all__ = ["ConvLSTM", "ConvLSTM1d", "ConvLSTM3d", "ConvLSTMCell", "ConvLSTMState"]
