"""Other guests of a shared machine can halve its speed for minutes; a gate keeps those minutes out of a race."""

import time
from dataclasses import dataclass

import torch


@dataclass
class Gate:
    """Open while a matrix product of torch, which takes no part in any race, reaches `rate` GFLOP/s (0: always)."""

    rate: float = 0.0
    patience: float = 900.0  # seconds that one race may wait

    def __post_init__(self) -> None:
        self.factors = torch.randn(2, 1024, 1024) if self.rate else None

    def is_open(self) -> bool:
        return self.factors is None or any(self._rate() >= self.rate for _ in range(5))  # the first ones wake the cores

    def _rate(self) -> float:
        a, b = self.factors
        start = time.perf_counter()
        torch.mm(a, b)
        return 2e-9 * len(a) ** 3 / (time.perf_counter() - start)

    def wait(self, until: float) -> None:
        """Returns as soon as it is open.

        Raises:
            TimeoutError: there is a rate to reach and it is later than `until`, a time of `time.perf_counter`.
        """
        while self.factors is not None:
            if time.perf_counter() > until:
                raise TimeoutError(f"--at-peak: too few rounds at {self.rate:g} GFLOP/s within {self.patience:g} s")
            if self.is_open():
                return
            time.sleep(0.1)


ALWAYS = Gate()
