"""The machine of a report: what it is, and the peaks measured on it."""

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import convfast
from bench.harness import Clock, GpuClock, wall_clock
from bench.setting import CPU, SETTINGS, Setting
from convfast import native
from convfast.triton import runtime as triton_runtime

# What keeps torch and its libraries from instructions that the CPU has.
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def describe(device: str = "cpu") -> dict[str, object]:
    """CPU model, cores, threads, versions, instruction sets, commit and date; and of the GPU, if that is the device."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa_torch": torch.backends.cpu.get_cpu_capability(),
        "isa_convfast": torch.ops.convfast.cpu_capability() if native.reason() is None else f"none: {native.reason()}",
        "limits": [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ],
        "torch": torch.__version__,
        "convfast": convfast.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "load_at_start": round(os.getloadavg()[0], 2),
        **(_describe_gpu() if device == "cuda" else {}),
    }


def _describe_gpu() -> dict[str, object]:
    gpu = torch.cuda.get_device_properties()
    return {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "processors": gpu.multi_processor_count,
        "gpu_memory": f"{gpu.total_memory / 2**30:.0f} GiB",
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton_runtime.version(),
        "cuda_library": native.origin("cuda") or f"none: {native.reason('cuda')}",
    }


def slug(machine: dict[str, object]) -> str:
    """A folder name: GPU, or CPU and threads, and date."""
    if "gpu" in machine:
        return f"{re.sub(r'[^a-z0-9]+', '-', str(machine['gpu']).lower())}-{machine['date']}"
    cpu = re.sub(r"\((r|tm)\)|\b(cpu|processor)\b|@.*", " ", str(machine["cpu"]).lower())
    cpu = re.sub(r"[^a-z0-9]+", "-", cpu).strip("-") or "cpu"
    return f"{cpu}-{str(machine['isa_torch']).lower()}-{machine['threads']}t-{machine['date']}"


def peaks(seconds: float = 1.0, device: str = "cpu", precision: str = CPU.precision) -> dict[str, float]:
    """The best seen with torch's thread count: matmul or convolution in float32 and `precision` (GFLOP/s), copy (GB/s,
    both ways); and what one core reads from its L2 cache (GB/s). On a GPU the matmul in each precision."""
    if device == "cuda":
        return _gpu_peaks(seconds)
    found = {s.peak("GFLOP/s"): _cpu_rate(seconds, s.dtype) for s in (CPU, Setting(precision=precision))}
    source = torch.zeros(1 << 26)
    target = torch.empty_like(source)
    copy = 2e-9 * source.nbytes / _best(lambda: target.copy_(source), seconds)
    return found | {"GB/s": copy, "L2 GB/s": _l2_rate(seconds)}


def _cpu_rate(seconds: float, dtype: torch.dtype) -> float:
    rate = _convolution_rate(seconds, dtype)
    for n in (512, 1024, 2048):
        a, b, out = torch.randn(3, n, n).to(dtype)
        rate = max(rate, 2e-9 * n**3 / _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), seconds))
    return rate


def _convolution_rate(seconds: float, dtype: torch.dtype) -> float:
    """oneDNN's; some processors' matrix products come from a library that leaves half of them idle."""
    image = torch.randn(8, 256, 32, 32).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3).to(dtype, memory_format=torch.channels_last)
    with torch.inference_mode():
        return 2e-9 * 8 * 32 * 32 * 9 * 256**2 / _best(lambda: torch.conv2d(image, weight, padding=1), seconds)


def _l2_rate(seconds: float) -> float:
    a, b = torch.randn(2, 1 << 17)  # 1 MiB: more than an L1 cache holds
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return 2e-9 * a.nbytes / _best(lambda: torch.dot(a, b), seconds)
    finally:
        torch.set_num_threads(threads)


def _gpu_peaks(seconds: float) -> dict[str, float]:
    clock, n, found = GpuClock(), 8192, {}
    for setting in SETTINGS["cuda"]:
        if not setting.captured:
            a, b = (torch.randn(n, n, device="cuda", dtype=setting.dtype) for _ in range(2))
            with setting.applied():
                best = _best(lambda a=a, b=b: torch.mm(a, b), seconds, clock)
            found[setting.peak("GFLOP/s")] = 2e-9 * n**3 / best
    source = torch.zeros(1 << 28, device="cuda")
    target = torch.empty_like(source)
    found["GB/s"] = 2e-9 * source.nbytes / _best(lambda: target.copy_(source), seconds, clock)
    return found


def _best(run: Callable[[], object], seconds: float, clock: Clock = wall_clock) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, clock(run, 1))
    return best


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
