"""Forecast moving handwritten digits: plain nn ConvLSTM against convfast, same weights, same batches, same losses.

`python examples/moving_digits.py [--steps N] [--quick]` trains in lock-step, each model on its own clock, and writes
examples/out/moving_digits.png (--quick: build/examples/moving_digits.png). The losses of the first steps must be equal
to rounding; after that training itself amplifies what rounding left, and the last loss must still be the same to a
percent.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from side_by_side import NN, OURS, Series, check_equal, check_first_steps, draw_losses, speed_up, time_inference, train
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

# From a checkout that is not installed; an installed convfast goes first.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import convfast
from bench.reference_models import CatConvLSTM
from convfast import backends

OUT = Path(__file__).resolve().parent / "out"
QUICK_OUT = OUT.parents[1] / "build" / "examples"  # README has the pictures of whole runs
CANVAS, DIGIT, PAST, FUTURE = 64, 24, 10, 10
LAST_EQUAL_TO = 0.01


class MovingDigits:
    """Clips [B, T, 1, 64, 64] in 0..1 of two digits each, bouncing off the walls."""

    def __init__(self, seed: int) -> None:
        images = torch.from_numpy(load_digits().images).float()[:, None] / 16
        self.digits = F.interpolate(images, size=DIGIT, mode="bilinear")[:, 0].numpy()
        self.random = np.random.default_rng(seed)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """(past [B, 10, 1, 64, 64], future [B, 10, 1, 64, 64])."""
        clips = np.zeros((size, PAST + FUTURE, CANVAS, CANVAS), np.float32)
        room = CANVAS - DIGIT
        steps = np.arange(PAST + FUTURE)[:, None]
        for clip in clips:
            for digit in self.digits[self.random.integers(len(self.digits), size=2)]:
                path = self.random.uniform(0, room, 2) + steps * self.random.uniform(-3, 3, 2)
                corners = np.rint(room - np.abs(path % (2 * room) - room)).astype(int)
                for frame, (y, x) in zip(clip, corners, strict=True):
                    window = frame[y : y + DIGIT, x : x + DIGIT]
                    np.maximum(window, digit, out=window)
        return torch.from_numpy(clips)[:, :, None].split([PAST, FUTURE], dim=1)


class Forecaster(nn.Module):
    """Down, ConvLSTM encoder, ConvLSTM decoder that runs on from the encoder's state, up.

    past [B, 10, 1, 64, 64] -> logits of the future, same shape. `how` goes to the decoder's forward.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, channels: int, hidden: int, **how: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, channels, 5, stride=2, padding=2)
        self.encoder = encoder
        self.decoder = decoder
        self.how = how
        self.up = nn.ConvTranspose2d(hidden, 1, 4, stride=2, padding=1)

    def forward(self, past: Tensor) -> Tensor:
        frames = F.leaky_relu(self.down(past.flatten(0, 1)), 0.2).unflatten(0, past.shape[:2])
        _, state = self.encoder(frames)
        output, _ = self.decoder(None, state, **self.how)
        return self.up(output.flatten(0, 1)).unflatten(0, output.shape[:2])


def build(channels: int, hidden: int, seed: int) -> dict[str, Forecaster]:
    """Two forecasters with the same weights."""
    torch.manual_seed(seed)
    parts = (CatConvLSTM(channels, [hidden], 3) for _ in range(2))
    plain = Forecaster(*parts, channels, hidden, steps=FUTURE)
    with torch.no_grad():  # forget gates start open, which a short training needs
        for part in (plain.encoder, plain.decoder):
            part.convs[0].bias[hidden : 2 * hidden] += 1
    parts = (convfast.ConvLSTM(channels, hidden, 3, step=steps) for steps in (1, FUTURE))
    ours = Forecaster(*parts, channels, hidden)
    for part in ("encoder", "decoder"):
        getattr(ours, part).load_state_dict(dict(getattr(plain, part).weights()))
    ours.down.load_state_dict(plain.down.state_dict())
    ours.up.load_state_dict(plain.up.state_dict())
    return {NN: plain, OURS: ours}


def loss_of(model: Forecaster, past: Tensor, future: Tensor) -> Tensor:
    """Cross-entropy per pixel."""
    return F.binary_cross_entropy_with_logits(model(past), future)


def picture(
    path: Path,
    past: Tensor,
    future: Tensor,
    forecast: Tensor,
    losses: Series,
    seconds: Series,
) -> None:
    """One clip (input, truth, forecast) above the loss against each model's own clock."""
    figure = plt.figure(figsize=(11, 7.2), layout="constrained")
    clips, curve = figure.subfigures(2, 1, height_ratios=[1, 1])
    rows = {"input": past, "truth": future, "forecast": forecast}
    for axes, (label, clip) in zip(clips.subplots(len(rows), PAST), rows.items(), strict=True):
        for axis, frame in zip(axes, clip, strict=True):
            axis.imshow(frame[0], cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0].set_ylabel(label)
    draw_losses(curve.subplots(), losses, seconds)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="clips per step (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=32, help="hidden channels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and clips (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="10 steps, 2 clips; to build/: a look at whether it runs")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.batch = 10, 2
    print(f"convfast {convfast.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("loading the native library (the first time it is built) ...", flush=True)
    print(f"backend: {backends.select('conv_lstm', None, 'cpu')}", flush=True)

    models = build(16, options.hidden, options.seed)
    data = MovingDigits(options.seed)
    losses, seconds = train(models, loss_of, lambda: data.batch(options.batch), options.steps)
    past, future = MovingDigits(options.seed + 1).batch(options.batch)
    with torch.inference_mode():
        final = {name: loss_of(model, past, future).item() for name, model in models.items()}
        forecast = models[OURS](past).sigmoid()
    inference = time_inference(models, past, rounds=5 if options.quick else 15)
    path = (QUICK_OUT if options.quick else OUT) / "moving_digits.png"
    picture(path, past[0], future[0], forecast[0], losses, seconds)

    shown = ", ".join(f"{name} {loss:.7f}" for name, loss in final.items())
    print(f"\nloss on new clips after {options.steps} steps: {shown}")
    print(f"speed-up over nn: training step {speed_up(seconds)}, inference {speed_up(inference)}")
    print(f"picture: {path}" + " (README's is of a whole run)" * options.quick)
    check_first_steps(losses)
    check_equal("at the end", {name: [loss] for name, loss in final.items()}, LAST_EQUAL_TO)


if __name__ == "__main__":
    main()
