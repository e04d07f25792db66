"""The ops: public function, autograd.Function and fakes of each in its own file."""

from collections.abc import Callable

from . import conv1d as _conv1d
from . import conv1d_lstm as _conv1d_lstm
from . import conv_lstm as _conv_lstm
from . import lstm as _lstm
from . import lstm_gates as _lstm_gates
from .conv1d import conv1d, conv1d_lengths
from .conv_lstm import conv_lstm
from .lstm import lstm
from .lstm_gates import lstm_gates

__all__ = ["conv1d", "conv1d_lengths", "conv_lstm", "lstm", "lstm_gates", "register_fakes", "when_there"]

_namespaces: list[str] = []
_waiting: list[Callable[[str], None]] = []


def register_fakes(namespace: str) -> None:
    """Give the ops in `namespace` their shape functions; once, before any capture."""
    for op in (_lstm_gates, _conv_lstm, _conv1d, _lstm, _conv1d_lstm):
        op.register_fakes(namespace)
    _namespaces.append(namespace)
    for call in _waiting:
        call(namespace)


def when_there(call: Callable[[str], None]) -> None:
    """`call(namespace)` for each namespace of `torch.ops` that has the ops, those that get them later included."""
    _waiting.append(call)
    for namespace in _namespaces:
        call(namespace)
