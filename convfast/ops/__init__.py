"""The ops: public function, autograd.Function and fakes of each in its own file."""

from . import conv1d as _conv1d
from . import conv1d_lstm as _conv1d_lstm
from . import conv_lstm as _conv_lstm
from . import lstm as _lstm
from . import lstm_gates as _lstm_gates
from .conv1d import conv1d, conv1d_lengths
from .conv_lstm import conv_lstm
from .lstm import lstm
from .lstm_gates import lstm_gates

__all__ = ["conv1d", "conv1d_lengths", "conv_lstm", "lstm", "lstm_gates", "register_fakes"]


def register_fakes(namespace: str) -> None:
    """Give the ops in `namespace` their shape functions; once, before any capture."""
    for op in (_lstm_gates, _conv_lstm, _conv1d, _lstm, _conv1d_lstm):
        op.register_fakes(namespace)
