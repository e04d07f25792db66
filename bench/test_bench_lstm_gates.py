"""Throughput of the pointwise cell alone."""

from bench.run_case import throughput_of

OP = "lstm_gates"
test_throughput = throughput_of(OP)
