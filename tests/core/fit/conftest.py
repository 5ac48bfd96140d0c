from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _use_one_thread() -> Iterator[None]:
    """Use one thread: for small tensors torch is slower with two threads, in particular on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
