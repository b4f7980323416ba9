"""When gradients are called the same."""

from __future__ import annotations

import pytest
import torch

from composer_gradmatch.reuse.unsupported import UnsupportedError
from composer_gradmatch.reuse.verify import check_gradients, rounded_parameters


def gradients_of(parameters):
    return [torch.full((3,), parameter) for parameter in parameters]


@pytest.mark.parametrize("wrong", [1.0, 1e-2])
def test_gradients_are_compared_tensor_by_tensor(wrong):
    """One of little weight that is all wrong is found, and rounding is not."""
    expected = gradients_of([1.0, wrong, 1e-9])
    check_gradients(gradients_of([1.0, wrong * 1.001, 2e-9]), expected)
    with pytest.raises(UnsupportedError, match="differs from that of the same picks"):
        check_gradients(gradients_of([1.0, wrong * 1.5, 1e-9]), expected)


def test_what_rounding_makes_of_a_gradient_is_no_disagreement():
    expected = gradients_of([1.0, 0.5])
    found = gradients_of([1.03, 0.52])
    with pytest.raises(UnsupportedError):
        check_gradients(found, expected, rounded=lambda: gradients_of([1.001, 0.501]))
    check_gradients(found, expected, rounded=lambda: gradients_of([0.98, 0.49]))
    with pytest.raises(UnsupportedError):
        check_gradients(gradients_of([1.3, 0.5]), expected, rounded=lambda: gradients_of([0.5, 0.1]))


@pytest.mark.parametrize("low_precision", [False, True])
def test_parameters_are_a_rounding_away_and_come_back(low_precision):
    parameters = [torch.nn.Parameter(torch.randn(50)), torch.nn.Parameter(torch.zeros(3))]
    own = [parameter.detach().clone() for parameter in parameters]
    with rounded_parameters(parameters, low_precision):
        moved = (parameters[0] - own[0]).norm() / own[0].norm()
    eps = torch.finfo(torch.bfloat16 if low_precision else torch.float32).eps
    assert 0.1 * eps < moved < eps
    assert all(torch.equal(one, other) for one, other in zip(parameters, own, strict=True))
