"""Candidates from two passes and from one, beside gradients that autograd makes of each sample alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import CONV, MLP, NO_BIAS, loader, make_trainer

from composer_gradmatch import Rule, RuleBackprop

M = 12
ON = {"start": 0.0, "end": 1.0, "keep": 0.5, "interrupt": 0}


class Keeping:
    """Picks the first m samples and keeps what it has seen."""

    def __init__(self):
        self.seen = []

    def __call__(self, candidates, m):
        names = ("losses", "inputs", "output_grads", "gram", "labels")
        tensors = {name: getattr(candidates, name).clone() for name in names}
        self.seen.append({"num_samples": candidates.num_samples, **tensors})
        return torch.arange(m), None


def seen_of(case, **arguments):
    model, rule = case.model(), Keeping()
    algorithm = RuleBackprop(Rule(rule, "keeping"), **arguments, **ON)
    make_trainer(model, loader(case.data(M), M), [algorithm], lr=0.0).fit()
    return rule.seen[-1]


def explicit(case):
    """Each sample's loss and last-layer gradient, by a plain loop in float64."""
    model = case.model().module.double()
    layer = model.get_submodule(case.layer)
    losses, rows = [], []
    for x, y in zip(*case.data(M).tensors, strict=True):
        loss = F.cross_entropy(model(x[None].double()), y[None])
        parts = torch.autograd.grad(loss, list(layer.parameters()))
        losses.append(loss.detach())
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(losses), torch.stack(rows)


@pytest.mark.parametrize("case", [MLP, NO_BIAS, CONV], ids=lambda case: case.name)
@pytest.mark.parametrize("arguments", [{}, {"selection_microbatch_size": 5}, {"reuse_activations": True}], ids=str)
def test_losses_and_gradients_come_together_and_are_the_samples_own(case, arguments):
    seen = seen_of(case, **arguments)
    losses, rows = explicit(case)
    assert seen["num_samples"] == M
    assert torch.equal(seen["labels"], case.data(M).tensors[1])
    torch.testing.assert_close(seen["losses"].double(), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen["gram"], rows @ rows.T, rtol=1e-4, atol=1e-6)
    outer = torch.einsum("mc,md->mcd", seen["output_grads"].double(), seen["inputs"].double()).flatten(1)
    torch.testing.assert_close(outer, rows[:, : outer.shape[1]], rtol=1e-4, atol=1e-6)


def test_a_rule_of_losses_gets_no_gradients_and_one_of_nothing_no_losses():
    def of_losses(candidates, m):
        assert len(candidates.losses) == len(candidates.labels) == M
        with pytest.raises(ValueError, match="needs='gradients'"):
            candidates.gram  # noqa: B018
        return candidates.losses.topk(m).indices, None

    def of_nothing(candidates, m):
        with pytest.raises(ValueError, match="needs='losses'"):
            candidates.losses  # noqa: B018
        assert torch.equal(candidates.labels, MLP.data(M).tensors[1])
        return torch.arange(m), None

    for rule in (of_losses, of_nothing):
        needs = rule.__name__.removeprefix("of_")
        algorithm = RuleBackprop(Rule(rule, needs=needs, weighs=False), **ON)
        make_trainer(MLP.model(), loader(MLP.data(M), M), [algorithm]).fit()
        assert len(algorithm.last_selection.indices) == M // 2
