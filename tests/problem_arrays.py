"""Random arrays of a problem, and its output by torch."""

import numpy as np
import torch
from torch.nn import functional

from core import Problem


def draw_arrays(problem: Problem, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw images, weight and bias."""
    images = rng.normal(size=(problem.batch, problem.channels, problem.height, problem.width))
    channels = problem.channels // problem.groups
    weight = rng.normal(size=(problem.filters, channels, problem.kernel_height, problem.kernel_width))
    bias = rng.normal(size=problem.filters)
    return images.astype(problem.dtype), weight.astype(problem.dtype), bias.astype(problem.dtype)


def compute_expected(problem: Problem, images: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return torch's output in float64."""
    top, bottom, left, right = problem.padding
    padded = functional.pad(torch.from_numpy(images).double(), (left, right, top, bottom))
    kernels, offsets = torch.from_numpy(weight).double(), torch.from_numpy(bias).double()
    return functional.conv2d(padded, kernels, offsets, problem.stride, 0, problem.dilation, problem.groups).numpy()
