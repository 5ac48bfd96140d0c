"""Least squares under constraints on the kernel: signs, sums, symmetries, ranks and smoothness."""
