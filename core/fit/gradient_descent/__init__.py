"""Gradient descent: initial kernels, optimizers, the automatic learning rate, and validation during a descent."""
