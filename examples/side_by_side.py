"""Two models with the same weights, trained on the same batches: losses, seconds, and whether the two agree."""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from tqdm import tqdm

NN, OURS = "nn", "convfast"
COLORS = {NN: "#7d8594", OURS: "#d1495b"}
# Each loss is right to a few rounding errors, and so is each gradient; 16 leaves room for twenty updates. A gradient
# that is wrong by a thousandth is outside.
EQUAL_STEPS, EQUAL_TO = 20, 16 * torch.finfo(torch.float32).eps

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Series = dict[str, list[float]]  # a number per step, for each model


def train(
    models: dict[str, nn.Module],
    loss_of: Loss,
    batch: Callable[[], tuple[Tensor, Tensor]],
    steps: int,
    eps: float = 1e-8,
) -> tuple[Series, Series]:
    """(losses, seconds) per step of every model; each batch goes to all in turn, another one first each time.

    `eps`: of Adam. Gradients below it move a weight in proportion, larger ones all alike.
    """
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=3e-3, eps=eps) for name, model in models.items()}
    losses = {name: [] for name in models}
    seconds = {name: [] for name in models}
    input, target = batch()
    for name, model in models.items():  # caches, thread pools and workspaces are set up outside the clock
        loss_of(model, input, target).backward()
        optimizers[name].zero_grad()
    bars = {name: tqdm(total=steps, desc=f"{name:>16}", position=i) for i, name in enumerate(models)}
    order = list(models)
    for _ in range(steps):
        input, target = batch()
        for name in order:
            start = time.perf_counter()
            optimizers[name].zero_grad()
            loss = loss_of(models[name], input, target)
            loss.backward()
            optimizers[name].step()
            seconds[name].append(time.perf_counter() - start)
            losses[name].append(loss.item())
            bars[name].set_postfix_str(f"loss {losses[name][-1]:.5f}, {sum(seconds[name]):.1f} s", refresh=False)
            bars[name].update()
        order = order[1:] + order[:1]
    for bar in bars.values():
        bar.close()
    return losses, seconds


@torch.inference_mode()
def time_inference(models: dict[str, nn.Module], input: Tensor, rounds: int) -> Series:
    """Seconds of a forward, alternating."""
    seconds = {name: [] for name in models}
    order = list(models)
    for model in models.values():
        model(input)
    for _ in range(rounds):
        for name in order:
            start = time.perf_counter()
            models[name](input)
            seconds[name].append(time.perf_counter() - start)
        order = order[1:] + order[:1]
    return seconds


def speed_up(seconds: Series) -> str:
    ratio = statistics.median(a / b for a, b in zip(seconds[NN], seconds[OURS], strict=True))
    plain_ms, ours_ms = (1e3 * statistics.median(seconds[name]) for name in (NN, OURS))
    return f"{ratio:.2f}x, the median of pairs (medians {plain_ms:.1f} ms -> {ours_ms:.1f} ms)"


def check_equal(when: str, losses: Series, bound: float) -> None:
    """The losses differ by no more than `bound`, relative.

    Raises:
        SystemExit: they do.
    """
    plain, ours = (np.array(losses[name]) for name in (NN, OURS))
    difference = np.max(np.abs(ours / plain - 1))
    print(f"relative difference of the losses, {when}: {difference:.1e}")
    if not difference <= bound:  # NaN too
        raise SystemExit(f"the losses differ, expected at most {bound:.1e}")


def check_first_steps(losses: Series) -> None:
    """The two trainings are the same one. Raises SystemExit where they are not."""
    first = {name: values[:EQUAL_STEPS] for name, values in losses.items()}
    check_equal(f"first {len(first[NN])} steps", first, EQUAL_TO)


def draw_losses(axis: Axes, losses: Series, seconds: Series) -> None:
    """The loss against each model's own clock."""
    window = min(10, len(losses[NN]))
    for name in losses:
        smooth = np.convolve(losses[name], np.full(window, 1 / window), mode="valid")
        axis.plot(np.cumsum(seconds[name])[window - 1 :], smooth, color=COLORS[name], label=name, linewidth=1.2)
    axis.set(xlabel="seconds of training", ylabel=f"loss, mean of {window} steps", yscale="log")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
