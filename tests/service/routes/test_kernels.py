"""Test of /kernels."""

import numpy as np

import core
from tests.servers import SendFn


def test_named_kernels_are_listed_with_their_values(send: SendFn) -> None:
    listed = {kernel["name"]: kernel for kernel in send("GET", "/kernels").json()["kernels"]}
    assert listed.keys() == core.KERNELS.keys()
    for kernel in listed.values():
        np.testing.assert_array_equal(kernel["kernel"], core.named_kernel(kernel["example"]))
