"""Options of `pytest bench/`, its rows, then the report."""

import os
import time
from pathlib import Path

import pytest

from bench import cases, machine
from bench.gate import Gate
from bench.report import Report
from bench.setting import CPU, SETTINGS

REPORT = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("throughput report")
    group.addoption("--device", choices=list(SETTINGS), default="cpu")
    precisions = [setting.precision for setting in SETTINGS["cpu"]]
    group.addoption("--precision", choices=precisions, help="on a CPU (default: float32); a GPU runs all")
    group.addoption("--short", action="store_true", help="few cases, few rounds, fewer compiled opponents")
    group.addoption("--no-compile", action="store_true", help="without torch.compile, which takes most of the time")
    group.addoption("--case", action="append", default=[], help="only cases whose id contains this text (repeatable)")
    group.addoption(
        "--at-peak",
        type=float,
        default=0.0,
        metavar="RATE",
        help="on a shared CPU: only rounds before and after which a matmul reaches RATE GFLOP/s",
    )
    group.addoption("--out", type=Path, help="folder of the report (default: bench/results/<machine>-<date>)")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ or getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("bench/: timings need the machine for themselves; expected one process, got -n")
    if config.option.at_peak and config.option.device != "cpu":
        raise pytest.UsageError(f"--at-peak: expected --device cpu, got {config.option.device}")
    if config.option.precision and config.option.device != "cpu":
        raise pytest.UsageError(f"--precision: expected --device cpu, got {config.option.device}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    device, wanted = metafunc.config.option.device, metafunc.config.option.case
    table = (cases.CPU if device == "cpu" else cases.GPU)[metafunc.module.OP]
    chosen = [case for case in table if not wanted or any(text in case.id for text in wanted)]
    if metafunc.config.option.short and not wanted and device == "cpu":
        chosen = [case for case in chosen if case.id in cases.SHORT]
    metafunc.parametrize("case", chosen, ids=[case.id for case in chosen])
    settings = [s for s in SETTINGS[device] if "benchmark" in metafunc.fixturenames or not s.captured]
    if device == "cpu":
        settings = [s for s in settings if s.precision == (metafunc.config.option.precision or CPU.precision)]
    metafunc.parametrize("setting", settings, ids=[setting.id for setting in settings])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """All of one setting before the next: a run that is cut short has all cases of the first."""
    items.sort(key=lambda item: SETTINGS[config.option.device].index(item.callspec.params["setting"]))


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    device = pytestconfig.option.device
    described = machine.describe(device)
    described["command"] = _command(pytestconfig)
    described["gate"] = pytestconfig.option.at_peak
    gate = Gate(pytestconfig.option.at_peak)
    gate.wait(time.perf_counter() + gate.patience)
    described["peaks"] = machine.peaks(
        0.2 if pytestconfig.option.short else 2.0, device, pytestconfig.option.precision or CPU.precision
    )
    pytestconfig.stash[REPORT] = Report(described, gate=gate)
    return pytestconfig.stash[REPORT]


def _command(config: pytest.Config) -> str:
    """As it was typed, without the folders of this machine."""
    out = {str(config.option.out), f"--out={config.option.out}", "--out"} if config.option.out else set()
    arguments = [str(argument) for argument in config.invocation_params.args]
    return " ".join(["pytest", *(a for a in arguments if a not in out and not a.startswith("/"))])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    report = config.stash.get(REPORT, None)
    if report is None or not (report.rows or report.memory):
        return
    folder = config.option.out or report.folder()
    names = report.save(folder)
    terminalreporter.section("throughput")
    terminalreporter.write_line(report.markdown())
    terminalreporter.write_line(f"saved in {folder}: {', '.join(names)}")
