"""The image that learning a kernel is taught with: two edges, and the kernel that finds them."""

import torch


def make_d2l_pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Ones with four columns of zeros, and what [[-1, 1]] makes of it."""
    image = torch.ones(6, 8)
    image[:, 2:6] = 0
    return image, image[:, 1:] - image[:, :-1]
