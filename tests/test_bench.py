"""The benchmark itself: it runs, refuses wrong numbers, keeps what is lost in the table. No test looks at a time."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from bench import contestants, crowd, harness, machine, report, study
from bench.cases import CONV1D_LSTM, CONV_LSTM, ConvLSTMCase, GatesCase
from bench.harness import Contestant, Disagreement, Timing
from bench.run_case import run_case
from bench.setting import CPU
from convfast import backends

ROOT = Path(__file__).resolve().parents[1]
CASE = GatesCase(1, 2, 3, 3, channels_last=False)
PEAKS = {"GFLOP/s": 100.0, "GB/s": 10.0, "L2 GB/s": 100.0}
OPTION = Namespace(no_compile=True, short=True)


def test_pytest_bench_writes_a_report(tmp_path: Path) -> None:
    for package in ("pytest_benchmark", "matplotlib"):
        pytest.importorskip(package)
    options = ["--short", "--no-compile", "-q", "-p", "no:cacheprovider", "--out", tmp_path]
    cases = ["--case=B1_T64", "--case=gates_B1_C8_H32_contiguous"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", *options, *cases],
        cwd=ROOT,
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "conv1d_lstm.png"}
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert {(row["op"], row["mode"]) for row in rows} == {
        (op, mode) for op in ("conv1d_lstm", "lstm_gates") for mode in ("inference", "training")
    }
    for row in rows:
        ours = f"convfast {backends.select(contestants.deciding_op(row['op']), None, 'cpu', torch.float32)}"
        assert row["headline"] == ours and {"eager", ours} <= row["contestants"].keys()
        assert all(0 <= figures["error_of_bound"] <= 1 for figures in row["contestants"].values())


def gates(**changed: object) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """Contestants of the pointwise cell by name, `changed` in place of some, and what the oracle says."""
    problem = contestants.GatesProblem(CASE)
    return contestants.lstm_gates(problem, False, short=True) | changed, contestants.lstm_gates_oracle(problem, False)


def wrong(name: str, by: float) -> Contestant:
    right = contestants.lstm_gates(contestants.GatesProblem(CASE), False)[name]()
    return Contestant(name, right.kind, right.run, lambda out: {n: t + by for n, t in right.collect(out).items()})


@pytest.mark.parametrize("by", [1e-4, float("nan")])
def test_wrong_numbers_are_refused(by: float) -> None:
    ours = f"convfast {backends.select('lstm_gates', None, 'cpu', torch.float32)}"
    everyone, oracle = gates(**{ours: lambda: wrong(ours, by)})
    written = report.Report({"peaks": PEAKS})
    with pytest.raises(Disagreement, match=f"{ours}: RMS error of h"):
        run_case("lstm_gates", CASE, False, CPU, everyone, oracle, written, Mock(), OPTION)
    assert "refused" in written.rows[0] and f"{CASE.id} inference: {ours}: Disagreement" in written.summary()


def test_opponent_with_wrong_numbers_is_not_timed() -> None:
    everyone, oracle = gates(other=lambda: wrong("eager", 1e-4))
    written = report.Report({"peaks": PEAKS})
    with pytest.raises(Disagreement, match="error of h"):
        run_case("lstm_gates", CASE, False, CPU, everyone, oracle, written, Mock(extra_info={}), OPTION)
    (row,) = written.rows
    assert "other" not in row["contestants"] and "Disagreement" in row["absent"]["other"]


def test_a_loss_stays_in_the_table() -> None:
    seconds = {"eager": [1e-3, 3e-3, 1e-3], "compile": [2e-3] * 3, "convfast cpu": [2e-3, 4e-3, 2e-3]}
    timings = {name: Timing(rounds) for name, rounds in seconds.items()}
    everyone = [Contestant(name, name.split()[0], Mock(), Mock()) for name in seconds]
    errors = dict.fromkeys(seconds, 0.5)
    row = report.race_row(
        "lstm_gates", CASE, "inference", everyone, timings, errors, 1e6, 100.0, None, "convfast cpu", {}
    )
    assert row["best_opponent"] == "eager"
    assert row["contestants"]["convfast cpu"]["ratio"] == 0.5  # of the median round, not of the medians
    assert "**0.50×**" in report.Report({}, [row]).summary()


def test_everyone_begins_a_round_in_turn() -> None:
    calls: list[str] = []
    everyone = [Contestant(name, "eager", lambda name=name: calls.append(name), Mock()) for name in "abc"]
    timings = harness.race(everyone, 0.0, min_rounds=4, at_least=0.0, clock=lambda run, loops: run() or 1.0)
    assert "".join(calls) == "aaabbbccc" + "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"
    assert all(timing.rounds == [1.0] * 4 for timing in timings.values())


def test_programs_of_a_crowd_count_what_they_get_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowd, "ROUNDS", 2)
    monkeypatch.setattr(crowd, "SECONDS", 0.01)
    for case in (CONV_LSTM[4].tiny(), CONV_LSTM[-1].tiny(), CONV1D_LSTM[5].tiny()):
        for train in (False, True):
            results = Mock()
            crowd.program(case, train, Mock(), results)
            ((theirs, ours),) = results.put.call_args.args
            assert len(theirs) == len(ours) == 2
            assert min(theirs + ours) > 0


def test_crowd_adds_up_its_programs() -> None:
    found = crowd.total([[[1.0, 2.0, 3.0], [2.0, 4.0, 9.0]], [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]])
    assert found == {"torch": 4.0, "convfast": 8.0, "ratio": 2.0}


def test_a_crowd_with_a_failure_ends() -> None:
    with pytest.raises(RuntimeError, match=r"^B0_.*: 2 of 2 programs failed"):
        crowd.run(ConvLSTMCase(0, 1, 1, (1,), 3, 3, -1), False, 2)


def test_a_study_writes_its_rows_and_their_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study.machine, "peaks", lambda seconds: PEAKS)
    seen = []

    def measure(machine: dict) -> list[dict]:
        seen.append(machine)
        return [{"a": 1}]

    folder, rows = study.publish("name", [str(tmp_path / "new")], measure, lambda line, rows: f"{line} {rows}")
    written = json.loads((folder / "name.json").read_text())
    assert written["rows"] == rows == [{"a": 1}]
    assert written["machine"] == seen[0]
    assert "python -m bench.name" in (folder / "name.md").read_text()


def test_the_header_names_all_commits_and_instruction_sets() -> None:
    described = machine.describe() | {"command": "", "peaks": PEAKS, "commit": "a1", "isa_convfast": "avx2"}
    written = report.Report(described)
    written.add({})
    assert written.rows == [{"commit": "a1", "isa_convfast": "avx2"}]
    assert "(a1)" in written.machine_line() and " avx2 (convfast)" in written.machine_line()
    written.rows.append({"commit": "b2", "isa_convfast": "avx512"})
    assert "(commits a1 and b2)" in written.machine_line()
    assert " avx2 and avx512 (convfast)" in written.machine_line()
    written.memory += [{}, {"commit": None}, {"commit": "c3"}]
    assert "(commits a1, b2 and 2 more)" in written.machine_line()


def test_scaling_counts_the_products_of_the_engine_it_is_told(monkeypatch: pytest.MonkeyPatch, native_ops) -> None:
    pytest.importorskip("matplotlib")
    from bench import scaling

    for kernel in (3, 7):  # in the words of explain itself
        assert "winograd" in scaling.floor(replace(scaling.BASE, kernel=kernel), True, 1.0)[0]

    def part(engine: str) -> float:
        """Of the direct engine's products."""
        monkeypatch.setattr(scaling.convfast, "explain", lambda *_: f"layer 0: backend cpu, {engine}")
        name, seconds = scaling.floor(scaling.BASE, True, 1.0)
        assert name == f"backend cpu, {engine}"
        return seconds / (1e-9 * scaling.BASE.work(True))

    assert part("direct: too few channels") == pytest.approx(1)
    assert part("winograd F(4x4, 3x3)") == pytest.approx(6**2 * 8**2 / (9 * 32**2))
    assert part("winograd F(2x2, 5x5), the kernel in 4 pieces") == pytest.approx(6**2 * 16**2 * 4 / (9 * 32**2))
    for engine in ("winograd in tiles of 4x4", "winograd F(2x2, 5x5), 4 pieces of the kernel"):
        with pytest.raises(ValueError, match=f"scaling: engine is .*{re.escape(engine)}"):
            part(engine)
