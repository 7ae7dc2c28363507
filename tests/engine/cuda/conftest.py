"""Where the tests of kernels run: on the CPU in Triton's interpreter, or with RANKD_TEST_GPU=1 on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.engine.cuda.plain_attention import ON_GPU


@pytest.fixture(autouse=True)
def _kernels_place() -> Iterator[None]:
    """New tensors are made where kernels run."""
    if not ON_GPU:
        yield
        return
    with torch.device("cuda"):
        yield
