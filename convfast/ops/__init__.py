"""The ops: public function, autograd.Function and fakes of each in its own file."""

from . import conv_lstm as _conv_lstm
from . import lstm_gates as _lstm_gates
from .conv_lstm import conv_lstm
from .lstm_gates import lstm_gates

__all__ = ["conv_lstm", "lstm_gates", "register_fakes"]


def register_fakes() -> None:
    """Give the native ops their shape functions; once, after the library is loaded and before any capture."""
    _lstm_gates.register_fakes()
    _conv_lstm.register_fakes()
