"""What is timed: the shapes, and the work that each of them needs at the least."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvLSTMCase:
    """A stack of ConvLSTM layers over [batch, time, channels, height, width]."""

    batch: int
    time: int
    channels: int
    hidden: tuple[int, ...]
    height: int
    width: int
    kernel: int
    same_frame: bool = False  # one frame fed at every step, only the last step's output kept
    unit = "GFLOP/s"

    @property
    def id(self) -> str:
        hidden = "-".join(map(str, self.hidden))
        size = f"{self.height}" if self.height == self.width else f"{self.height}x{self.width}"
        return f"B{self.batch}_T{self.time}_Cin{self.channels}_C{hidden}_H{size}_k{self.kernel}"

    def work(self, training: bool) -> float:
        """Multiply-adds of direct convolutions, times two; the convolution of the zero state is not counted.

        Backward: a data and a weight gradient for each convolution of the forward.
        """
        taps = self.kernel**2 * self.height * self.width * self.batch
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
        return self.frames * self.height * self.width


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

    def work(self, training: bool) -> float:
        """Bytes that must move in float32: 4 gates and c in, h and c out.

        Training adds the activated gates written and read, c and c' read, dh in, dgates and dc out.
        """
        tensors = 7 + (4 + 4 + 2 + 1 + 4 + 1 if training else 0)
        return 4.0 * tensors * self.batch * self.channels * self.height * self.width

    @property
    def frames(self) -> int:
        return self.batch

    @property
    def terms(self) -> int:
        return 1


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
]

LSTM_GATES = [
    GatesCase(batch, channels, size, size, channels_last)
    for batch, channels, size in [(4, 64, 64), (16, 32, 32), (1, 128, 48), (1, 8, 32)]
    for channels_last in (False, True)
]

# Enough for a quick look: the smallest case, and one that keeps the cores busy.
SHORT = {CONV_LSTM[2].id, CONV_LSTM[4].id, LSTM_GATES[2].id}
