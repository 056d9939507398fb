"""Benchmarks: ratios against real peers, taken in one run, alternating, with the machine they were taken on."""
