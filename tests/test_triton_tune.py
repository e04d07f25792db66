"""The choice among tile sizes, with a clock that says what the test wants."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from triton.runtime.errors import OutOfResources

from convfast.triton import tune

RULE, FAST, TOO_LARGE = (128, 8), (64, 4), (256, 8)
MILLISECONDS = {RULE: 2.0, FAST: 1.0}
LIKE = torch.empty(1)
of_this_gpu = tune._milliseconds


class Kernel:
    """Stands for a launch; keeps with what it was launched."""

    def __init__(self) -> None:
        self.launched: list[tuple[int, int]] = []

    def __call__(self, candidate: tuple[int, int]) -> tuple[int, int]:
        self.launched.append(candidate)
        if candidate == TOO_LARGE:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return candidate


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """A GPU called "Test GPU" whose kernels take MILLISECONDS, and an empty cache."""
    monkeypatch.setenv("CONVFAST_AUTOTUNE", "1")
    monkeypatch.setenv("CONVFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "_chosen", {})
    monkeypatch.setattr(tune, "_read", set())
    monkeypatch.setattr(tune, "_measurable", lambda like: True)
    monkeypatch.setattr(tune, "_capturing", lambda: False)
    monkeypatch.setattr(tune, "_gpu", lambda like: "Test GPU")
    monkeypatch.setattr(tune, "_milliseconds", lambda run: MILLISECONDS[run()])


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_chosen", {})
    monkeypatch.setattr(tune, "_read", set())


def choose(kernel: Kernel, key: tuple[object, ...] = (64, torch.float16), candidates=(RULE, TOO_LARGE, FAST)):
    return tune.best("step", key, LIKE, candidates, kernel)


def test_the_fastest_that_fits_is_chosen():
    assert choose(Kernel()) == FAST


def test_measured_once_a_key():
    first, again, other = Kernel(), Kernel(), Kernel()
    choose(first)
    assert choose(again) == FAST
    assert first.launched and not again.launched
    choose(other, key=(128, torch.float16))
    assert other.launched


def test_choice_survives_the_process(monkeypatch: pytest.MonkeyPatch):
    choose(Kernel())
    new_process(monkeypatch)
    kernel = Kernel()
    assert choose(kernel) == FAST
    assert not kernel.launched


def test_choices_of_another_process_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path):
    choose(Kernel(), key=("first",))
    new_process(monkeypatch)
    choose(Kernel(), key=("second",))
    assert len(json.loads((tmp_path / "convfast-triton.json").read_text())) == 2


def test_choice_that_is_no_longer_a_candidate_is_measured_anew():
    choose(Kernel())
    kernel = Kernel()
    assert choose(kernel, candidates=(RULE, TOO_LARGE)) == RULE
    assert kernel.launched


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', "\x00"])
def test_broken_file_is_replaced(content: str, tmp_path):
    file = tmp_path / "convfast-triton.json"
    file.write_text(content)
    assert choose(Kernel()) == FAST
    assert str(FAST) in json.loads(file.read_text()).values()


def test_cache_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CONVFAST_CACHE", str(tmp_path / "file"))
    assert choose(Kernel()) == FAST


def test_rule_decides_where_nothing_can_be_measured(monkeypatch: pytest.MonkeyPatch):
    kernel = Kernel()
    assert choose(kernel, candidates=(RULE,)) == RULE
    with monkeypatch.context() as patch:
        patch.setattr(tune, "_capturing", lambda: True)
        assert choose(kernel) == RULE
    with monkeypatch.context() as patch:
        patch.setattr(tune, "_measurable", lambda like: False)
        assert choose(kernel) == RULE
    with monkeypatch.context() as patch:
        patch.delenv("CONVFAST_AUTOTUNE")
        assert choose(kernel) == RULE
    assert not kernel.launched


def test_measured_choice_holds_in_a_captured_graph(monkeypatch: pytest.MonkeyPatch):
    choose(Kernel())
    monkeypatch.setattr(tune, "_capturing", lambda: True)
    assert choose(Kernel()) == FAST


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the clock is a GPU's")
def test_the_clock_of_a_gpu() -> None:
    x = torch.zeros(1 << 24, device="cuda")
    once, often = (of_this_gpu(lambda n=n: [x.add_(1) for _ in range(n)]) for n in (1, 8))
    assert 0 < once < often < 1000
