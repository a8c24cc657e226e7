"""Benchmarks: `python -m benchmarks` measures, prints and stores; `python -m benchmarks.regression` compares two runs.

Figures are ratios within one run: to the network's own step, to the bare products that a method cannot do without, and
to other solvers, since a machine's speed drifts and machines differ.
"""
