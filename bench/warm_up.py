"""Compiles what `pytest bench --device cuda` will launch of Triton, in as many processes as there are cores: `python -m
bench.warm_up`. Triton keeps it on disk; a benchmark alone would spend its minutes on one core."""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import torch

from bench import cases
from bench.contestants import RACES
from bench.setting import SETTINGS, Setting


def compile_case(op: str, case: cases.Case, train: bool, setting: Setting) -> None:
    problem, everyone, _ = RACES[op]
    with setting.applied():
        for name, build in everyone(problem(case, setting), train, True).items():
            if name.startswith("convfast triton"):
                build().run()
        torch.cuda.synchronize()


def main() -> None:
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        jobs = {
            pool.submit(compile_case, op, case, train, setting): f"{case.id} {setting.mode(train)}"
            for op, listed in cases.GPU.items()
            for case in listed
            for train in (False, True)
            for setting in SETTINGS["cuda"]
            if not setting.captured
        }
        failed = {label: error for job, label in jobs.items() if (error := job.exception())}
    for label, error in failed.items():
        print(f"{label}: {type(error).__name__}: {error}")
    sys.exit(len(failed) > 0)


if __name__ == "__main__":
    main()
