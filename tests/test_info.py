"""What the environment says, how it is read, and what `python -m convfast.info` tells of it."""

import platform
import re
import sys

import pytest
import torch

import convfast
from convfast import backends, info, native, toolchain
from convfast.environment import ENVIRONMENT, enabled
from convfast.toolchain import BUILD_FILE, PACKAGE
from convfast.triton import runtime as triton_runtime


@pytest.mark.parametrize("value", ["1", "true", "ON", "yes", "2"])
def test_flag_is_on(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVFAST_NO_NATIVE", value)
    assert enabled("CONVFAST_NO_NATIVE")


@pytest.mark.parametrize("value", [None, "", "0", "false", "False", "OFF", "no"])
def test_flag_is_off(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVFAST_NO_NATIVE", raising=False)
    if value is not None:
        monkeypatch.setenv("CONVFAST_NO_NATIVE", value)
    assert not enabled("CONVFAST_NO_NATIVE")


def test_every_variable_that_is_read_is_in_the_table() -> None:
    native = (path for path in BUILD_FILE.parent.rglob("*") if path.suffix in (".h", ".inc", ".cpp", ".cu"))
    files = [*PACKAGE.rglob("*.py"), *native]
    reads = r'(?:getenv|setting|at_most|enabled|environ\.get)\("(\w+)"'
    found = {name for file in files for name in re.findall(reads, file.read_text())}
    assert found - {"PATH", "TORCH_EXTENSIONS_DIR"} == ENVIRONMENT.keys() - {"CUDA_HOME"}  # torch reads that


def test_report_begins_with_versions_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = ["NVIDIA H200", "NVIDIA L4"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpus[index])
    found = [line.split() for line in info.versions()]
    expected = [
        ["convfast", convfast.__version__], ["torch", f"{torch.__version__},"],
        ["triton", triton_runtime.version()], ["python", platform.python_version()],
    ]  # fmt: skip
    assert [words[:2] for words in found[:4]] == expected
    assert found[4:] == [["GPU", *name.split()] for name in gpus]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert len(info.versions()) == 4


def test_report_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert info.versions()[2] == "triton       none"


def test_report_names_every_variable() -> None:
    report = info.report()
    assert report.splitlines()[:4] == info.versions()[:4]
    assert all(f"\n{name}=" in report for name in ENVIRONMENT)


def test_report_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise toolchain.NativeUnavailable("no compiler")

    monkeypatch.setattr(toolchain, "describe", missing)
    monkeypatch.setattr(native, "reason", lambda name="cpu": f"no {name}")
    monkeypatch.setattr(native, "origin", lambda name="cpu": "cpu.so" if name == "cpu" else None)
    monkeypatch.setattr(backends, "available", lambda op: {"cpu": "why not", "reference": True})
    monkeypatch.delenv("CONVFAST_POISON", raising=False)
    lines = info.report().splitlines()
    assert {"compiler     no compiler", "library      cpu.so", "for CUDA     not available: no cuda"} <= set(lines)
    assert {"lstm         cpu: why not", "lstm         reference: yes"} <= set(lines)
    assert any(line.startswith("CONVFAST_POISON=  (") for line in lines)
