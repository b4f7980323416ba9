"""What torch says of errors that come from the GPU."""

from __future__ import annotations

import pytest
import torch

from composer_gradmatch.forward.torch_private import is_from_cuda


def test_an_error_of_cudas_is_told_from_one_of_shapes():
    with pytest.raises(RuntimeError) as of_cuda:
        torch.zeros(1, device="cuda:99")
    with pytest.raises(RuntimeError) as of_shapes:
        torch.zeros(2, 3, device="cuda") @ torch.zeros(2, 3, device="cuda")
    assert is_from_cuda(of_cuda.value)
    assert not is_from_cuda(of_shapes.value)
