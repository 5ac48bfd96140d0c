"""Plots of the benchmarks."""
