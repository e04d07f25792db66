"""Classify handwritten digits read row by row: Conv1d → LSTM in plain nn against convfast, same weights, same losses.

`python examples/digit_rows.py [--steps N] [--quick]` trains in lock-step, each model on its own clock, and writes
examples/out/digit_rows.png (--quick: build/examples/digit_rows.png). The losses of the first steps must be equal to
rounding. After that training itself amplifies what rounding left: two plain models whose weights differ by a rounding
end as far apart.
"""

import argparse
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from side_by_side import COLORS, NN, OURS, Series, check_first_steps, draw_losses, speed_up, time_inference, train
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

# From a checkout that is not installed; an installed convfast goes first.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import convfast
from convfast import backends

OUT = Path(__file__).resolve().parent / "out"
QUICK_OUT = OUT.parents[1] / "build" / "examples"  # README has the pictures of whole runs
ROWS, CLASSES, HELD_BACK = 8, 10, 297
EPS = 1e-5  # with Adam's own, the rounding of gradients near zero turns into whole steps


class CNNLSTM(nn.Module):
    """As usually written: features go before time for the convolutions, and back for the LSTM.

    [B, T, features] -> [B, T, classes].
    """

    def __init__(self, features: int, classes: int, channels: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv1d(features, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
        )
        self.lstm = nn.LSTM(2 * channels, hidden, layers, batch_first=True)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cnn(x.permute(0, 2, 1)).permute(0, 2, 1)
        return self.fc(self.lstm(x)[0])


class DigitRows:
    """Images of digits as sequences of 8 rows, [B, 8, 8] in 0..1, and their classes [B]."""

    def __init__(self, seed: int) -> None:
        digits = load_digits()
        images, classes = torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target)
        self.random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=self.random)
        self.new = images[order[:HELD_BACK]], classes[order[:HELD_BACK]]
        self.known = images[order[HELD_BACK:]], classes[order[HELD_BACK:]]

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        images, classes = self.known
        drawn = torch.randint(len(images), (size,), generator=self.random)
        return images[drawn], classes[drawn]


def build(channels: int, hidden: int, layers: int, seed: int) -> dict[str, nn.Module]:
    """Two classifiers with the same weights, without dropout, whose masks would differ."""
    torch.manual_seed(seed)
    plain = CNNLSTM(ROWS, CLASSES, channels, hidden, layers)
    ours = convfast.CNN_LSTM(ROWS, CLASSES, channels, 3, hidden, layers, dropout=0.0)
    ours.load_state_dict(plain.state_dict())
    return {NN: plain, OURS: ours}


def loss_of(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy after the last row."""
    return F.cross_entropy(model(images)[:, -1], classes)


def picture(path: Path, losses: Series, steps: Series, forwards: Series) -> None:
    """The loss against each model's own clock, and times of a training step and of a forward."""
    figure, (curve, bars) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=[2, 1], layout="constrained")
    draw_losses(curve, losses, steps)
    for i, name in enumerate(losses):
        times = [1e3 * statistics.median(seconds[name]) for seconds in (steps, forwards)]
        shown = bars.bar([k + 0.4 * i - 0.2 for k in range(2)], times, 0.4, color=COLORS[name], label=name)
        bars.bar_label(shown, fmt="%.2f", fontsize=8)
    bars.set_xticks(range(2), ["training step", "inference"])
    bars.set_ylabel("ms, median")
    bars.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="digits per step (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=64, help="of the first convolution (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=128, help="size of the LSTM (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="of the LSTM (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="10 steps; to build/: a look at whether it runs")
    options = parser.parse_args()
    if options.quick:
        options.steps = 10
    print(f"convfast {convfast.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("loading the native library (the first time it is built) ...", flush=True)
    print(f"backend: {backends.select('lstm', None, 'cpu')}", flush=True)

    data = DigitRows(options.seed)
    models = build(options.channels, options.hidden, options.layers, options.seed)
    losses, steps = train(models, loss_of, lambda: data.batch(options.batch), options.steps, EPS)
    images, classes = data.new
    with torch.inference_mode():
        final = {name: loss_of(model, images, classes).item() for name, model in models.items()}
        right = (models[OURS](images)[:, -1].argmax(1) == classes).float().mean().item()
    forwards = time_inference(models, data.batch(options.batch)[0], rounds=5 if options.quick else 100)
    path = (QUICK_OUT if options.quick else OUT) / "digit_rows.png"
    picture(path, losses, steps, forwards)

    shown = ", ".join(f"{name} {loss:.7f}" for name, loss in final.items())
    print(f"\nloss on new digits after {options.steps} steps: {shown}; {right:.1%} of them are right")
    print(f"speed-up over nn: training step {speed_up(steps)}, inference {speed_up(forwards)}")
    print(f"picture: {path}" + " (README's is of a whole run)" * options.quick)
    check_first_steps(losses)


if __name__ == "__main__":
    main()
