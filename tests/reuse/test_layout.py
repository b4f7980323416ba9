"""Which models mix samples, told when they are captured."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from composer_gradmatch.benchmarks.peak import PeakMemory
from composer_gradmatch.reuse.capture import CapturedForward
from composer_gradmatch.reuse.probe import determine_layouts
from composer_gradmatch.reuse.unsupported import UndecidedError, UnsupportedError

M, CLASSES = 8, 5


class Gated(nn.Module):
    """Adds what mixes samples behind a gate that is shut, as it is at the start of many residual branches."""

    def __init__(self, mix):
        super().__init__()
        self.body, self.head, self.mix = nn.Linear(12, 12), nn.Linear(12, CLASSES), mix
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, inputs):
        hidden = self.body(inputs)
        return self.head(hidden + self.gate * self.mix(hidden))


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x - x.mean(0),
        lambda x: x.flip(0),
        lambda x: (x @ x.T).softmax(-1) @ x,
        lambda x: x.cumsum(0),
        lambda x: x / x.norm(),
        lambda x: (
            F.scaled_dot_product_attention(*[x.unflatten(1, (2, 6)).transpose(0, 1)] * 3).transpose(0, 1).flatten(1)
        ),
    ],
    ids=["mean", "flip", "similarities", "cumulative", "norm", "attention"],
)
@pytest.mark.parametrize("samples", [2, 3, M])
def test_what_mixes_samples_is_found_though_its_gate_is_shut(mix, samples):
    inputs = torch.randn(samples, 12)
    with pytest.raises(UnsupportedError, match=r"mix samples|two dimensions"):
        CapturedForward(Gated(mix))(inputs, samples)


class Projected(nn.Module):
    """Mixes samples in what a weight of zero makes nothing of, as adapters have it at the start."""

    def __init__(self, mix):
        super().__init__()
        self.body, self.head, self.mix = nn.Linear(12, 12), nn.Linear(12, CLASSES), mix
        self.zero = nn.Linear(12, 12)
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)

    def forward(self, inputs):
        hidden = self.body(inputs)
        return self.head(hidden + self.mix(self.zero(hidden)))


@pytest.mark.parametrize("mix", [lambda x: x.mean(0), lambda x: x.flip(0)], ids=["mean", "flip"])
def test_what_mixes_samples_is_found_though_it_mixes_zeros(mix):
    with pytest.raises(UnsupportedError, match="mix samples"):
        CapturedForward(Projected(mix))(torch.randn(M, 12), M)


def test_rounding_does_not_add_up_in_deep_networks():
    """Of batch normalisation, which makes much of little differences, and of samples that are nearly alike."""
    layers = [module for _ in range(40) for module in (nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())]
    model = nn.Sequential(nn.Linear(12, 16), *layers, nn.Linear(16, CLASSES))
    inputs = torch.randn(12) + 1e-3 * torch.randn(M, 12)
    assert CapturedForward(model)(inputs, M).outputs.shape == (M, CLASSES)


def test_a_minibatch_of_like_samples_shows_nothing():
    forward = CapturedForward(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, CLASSES)))
    with pytest.raises(UndecidedError, match="alike"):
        forward(torch.ones(M, 12), M)
    assert forward(torch.randn(M, 12), M).outputs.shape == (M, CLASSES)


def test_the_layouts_are_determined_in_little_memory():
    """Of what is computed on the way, only what is still to be used is held: some tensors of all samples, twice."""
    model = nn.Sequential(*[nn.Linear(256, 256), nn.Tanh()] * 20, nn.Flatten(), nn.Linear(64 * 256, CLASSES))
    peaks = []

    def measured(*args):
        with PeakMemory() as peak:
            found = determine_layouts(*args)
        peaks.append(peak.bytes)
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("composer_gradmatch.reuse.graphs.determine_layouts", measured)
        CapturedForward(model)(torch.randn(M, 64, 256), M)
    of_one_layer = 14 * 64 * 256 * 4
    assert of_one_layer < peaks[0] < 8 * of_one_layer
