"""Benchmarks: how fast tidelog is, beside the bare pipe. See docs/benchmarks.md."""
