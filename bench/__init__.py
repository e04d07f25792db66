"""Throughput reports: `pytest bench/`."""
