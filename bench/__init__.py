"""Benchmarks: what one has to run to believe the README."""
