"""Fit a kernel to examples of its input and output: linear least squares, solved or by gradient descent."""
