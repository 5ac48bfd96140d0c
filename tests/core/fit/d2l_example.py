"""The d2l example (Zhang et al., Dive into Deep Learning, section 7.2): an image with two vertical edges."""

import torch


def make_d2l_pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a (6, 8) image of ones with four columns of zeros, and its correlation with [[-1, 1]], (6, 7)."""
    image = torch.ones(6, 8)
    image[:, 2:6] = 0
    return image, image[:, 1:] - image[:, :-1]
