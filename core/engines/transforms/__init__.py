"""Fourier transforms as Halide expressions."""
