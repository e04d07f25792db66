"""What is timed: the shapes, and the work that each of them needs at the least."""

import math
import random
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ConvLSTMCase:
    """A stack of ConvLSTM layers over [batch, time, channels, height, width], or [.., depth, height, width]."""

    batch: int
    time: int
    channels: int
    hidden: tuple[int, ...]
    height: int
    width: int
    kernel: int
    same_frame: bool = False  # one frame fed at every step, only the last step's output kept
    depth: int | None = None
    unit = "GFLOP/s"

    @property
    def id(self) -> str:
        hidden = "-".join(map(str, self.hidden))
        size = f"{self.height}" if self.height == self.width else f"{self.height}x{self.width}"
        deep = f"_D{self.depth}" if self.depth else ""
        return f"B{self.batch}_T{self.time}_Cin{self.channels}_C{hidden}{deep}_H{size}_k{self.kernel}"

    @property
    def space(self) -> tuple[int, ...]:
        """Of a frame."""
        return (*([self.depth] if self.depth else []), self.height, self.width)

    @property
    def taps(self) -> int:
        return self.kernel ** len(self.space)

    def work(self, training: bool, size: int = 4) -> float:
        """Multiply-adds of direct convolutions, times two; the convolution of the zero state is not counted.

        Backward: a data and a weight gradient for each convolution of the forward.
        """
        taps = self.taps * math.prod(self.space) * self.batch
        inputs = (self.channels, *self.hidden[:-1])
        forward = sum(
            2.0 * taps * 4 * c * (self.time * cin + (self.time - 1) * c)
            for cin, c in zip(inputs, self.hidden, strict=True)
        )
        return 3 * forward if training else forward

    @property
    def frames(self) -> int:
        return self.batch * self.time

    @property
    def terms(self) -> int:
        """Products summed into one element of a weight's gradient."""
        return self.frames * math.prod(self.space)

    @property
    def states(self) -> int:
        """Elements of all layers' outputs."""
        return self.terms * sum(self.hidden)

    def tiny(self) -> "ConvLSTMCase":
        """The same layers on the least input."""
        return replace(self, batch=1, height=8, width=8, depth=self.depth and 2)


@dataclass(frozen=True)
class GatesCase:
    """The pointwise cell on pre-activations [batch, 4 * channels, height, width]."""

    batch: int
    channels: int
    height: int
    width: int
    channels_last: bool
    unit = "GB/s"

    @property
    def id(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"gates_B{self.batch}_C{self.channels}_H{self.height}_{layout}"

    def work(self, training: bool, size: int = 4) -> float:
        """Bytes that must move: 4 gates and c in, h and c out; all but the new c and its gradient have `size` bytes.

        Training adds the activated gates written and read, c and c' read, dh in, dgates and dc out.
        """
        moved = 6.0 * size + 4 + (14 * size + 8 if training else 0)
        return moved * self.batch * self.channels * self.height * self.width

    @property
    def frames(self) -> int:
        return self.batch

    @property
    def terms(self) -> int:
        return 1


@dataclass(frozen=True)
class Conv1dLSTMCase:
    """Convolutions to conv and to 2 * conv channels, then layers of LSTM, over [batch, time, features]."""

    batch: int
    time: int
    features: int
    conv: int
    hidden: int
    layers: int
    varied: bool = False  # lengths between a tenth of `time` and all of it
    unit = "GFLOP/s"

    @property
    def id(self) -> str:
        sizes = f"B{self.batch}_T{self.time}_F{self.features}_c{self.conv}_h{self.hidden}_L{self.layers}"
        return sizes + ("_lengths" if self.varied else "")

    @property
    def lengths(self) -> list[int]:
        draw = random.Random(0)
        least = -(-self.time // 10) if self.varied else self.time
        return [draw.randint(least, self.time) for _ in range(self.batch)]

    def work(self, training: bool, size: int = 4) -> float:
        """Multiply-adds of the steps inside the lengths, times two; the product with the zero state is not counted.

        Backward: a data and a weight gradient for each product of the forward.
        """
        channels, gates = 2 * self.conv, 4 * self.hidden
        convs = 3 * (self.features * self.conv + self.conv * channels)
        inputs = gates * (channels + (self.layers - 1) * self.hidden)
        recurrent = gates * self.hidden * self.layers
        forward = 2.0 * (self.frames * (convs + inputs) + (self.frames - self.batch) * recurrent)
        return 3 * forward if training else forward

    @property
    def frames(self) -> int:
        return sum(self.lengths)

    @property
    def terms(self) -> int:
        """As for a ConvLSTM."""
        return self.frames

    @property
    def states(self) -> int:
        return self.batch * self.time * (3 * self.conv + self.layers * self.hidden)

    def tiny(self) -> "Conv1dLSTMCase":
        return replace(self, batch=1, time=8)


Case = ConvLSTMCase | GatesCase | Conv1dLSTMCase

CONV_LSTM = [
    ConvLSTMCase(batch, time, cin, (c,), size, size, kernel)
    for kernel in (3, 5)
    for batch, time, cin, c, size in [
        (4, 10, 1, 64, 64),
        (16, 10, 32, 32, 32),
        (4, 10, 16, 16, 64),
        (1, 10, 128, 128, 48),
        (1, 10, 3, 8, 32),
    ]
] + [
    # No multiple of a tile, beside the even shape nearest to it.
    ConvLSTMCase(3, 10, 24, (24,), 52, 40, 3),
    ConvLSTMCase(3, 10, 24, (24,), 50, 37, 3),
    ConvLSTMCase(1, 5, 512, (128, 64, 64, 32, 32), 64, 32, 3, same_frame=True),
    ConvLSTMCase(4, 10, 16, (16,), 64, 64, 7),
    ConvLSTMCase(1, 6, 16, (16,), 32, 32, 3, depth=16),
]

LSTM_GATES = [
    GatesCase(batch, channels, size, size, channels_last)
    for batch, channels, size in [(4, 64, 64), (16, 32, 32), (1, 128, 48), (1, 8, 32)]
    for channels_last in (False, True)
]

CONV1D_LSTM = [
    Conv1dLSTMCase(32, 128, 9, 64, 128, 2),
    Conv1dLSTMCase(64, 100, 16, 64, 128, 2),
    Conv1dLSTMCase(8, 512, 32, 64, 256, 2),
    Conv1dLSTMCase(1, 1000, 8, 64, 128, 2),
    Conv1dLSTMCase(256, 60, 8, 32, 64, 2),
    Conv1dLSTMCase(1, 64, 8, 64, 128, 1),
    Conv1dLSTMCase(32, 128, 9, 64, 128, 2, varied=True),
]

# By op.
CPU = {"conv_lstm": CONV_LSTM, "conv1d_lstm": CONV1D_LSTM, "lstm_gates": LSTM_GATES}
GPU = {
    "conv_lstm": [
        ConvLSTMCase(32, 10, 64, (64,), 64, 64, 3),
        ConvLSTMCase(8, 10, 1, (64,), 64, 64, 3),
        ConvLSTMCase(16, 19, 16, (128,) * 4, 16, 16, 5),
    ],
    "conv1d_lstm": [Conv1dLSTMCase(32, 128, 9, 64, 128, 2)],
    "lstm_gates": [GatesCase(32, 64, 64, 64, channels_last) for channels_last in (False, True)],
}

# Enough for a quick look: the smallest case, and one that keeps the cores busy.
SHORT = {CONV_LSTM[2].id, CONV_LSTM[4].id, LSTM_GATES[2].id, CONV1D_LSTM[5].id}
