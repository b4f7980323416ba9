"""What a pass must not change, and what is said where it cannot be made."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from cases import make_trainer
from composer import DataSpec
from composer.models import HuggingFaceModel
from text_cases import CLASSIFICATION
from torch import nn
from torch._dynamo import symbolic_convert

from composer_gradmatch import GradMatch, LossBackprop, select_first
from composer_gradmatch.reuse.single_pass import SinglePass
from composer_gradmatch.reuse.spot_checks import SpotChecks
from composer_gradmatch.reuse.unsupported import UndecidedError, UnsupportedError

M = 12


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.key, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.key.requires_grad_(False)

    def hidden(self, inputs):
        return self.body(inputs) + self.key(inputs)

    def forward(self, batch):
        return self.head(torch.tanh(self.hidden(batch["inputs"])))


class ChangesInputs(Net):
    def hidden(self, inputs):
        return super().hidden(inputs.sub_(1.0))


class ChangesInputsByData(Net):
    def hidden(self, inputs):
        inputs.data.mul_(2.0)
        return super().hidden(inputs)


class AddsAnItem(Net):
    def forward(self, batch):
        batch["doubled"] = batch["inputs"] * 2
        return super().forward(batch)


class RemovesAnItem(Net):
    def forward(self, batch):
        batch.pop("more")
        return super().forward(batch)


class MomentumEncoder(Net):
    def hidden(self, inputs):
        with torch.no_grad():
            self.key.weight.mul_(0.9).add_(self.body.weight, alpha=0.1)
        return super().hidden(inputs)


class MomentumEncoderByData(Net):
    def hidden(self, inputs):
        self.key.weight.data.mul_(0.9).add_(self.body.weight.data * 0.1)
        return super().hidden(inputs)


def a_batch():
    return {"inputs": torch.randn(M, 6), "more": torch.randn(M)}


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (ChangesInputs, "changes its batch in place"),
        (ChangesInputsByData, "batch in place"),
        (AddsAnItem, "changes the items of its batch"),
        (RemovesAnItem, "changes the items of its batch"),
        (MomentumEncoder, "changes its parameters"),
        (MomentumEncoderByData, "changes its parameters"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_forward_pass_that_changes_what_it_is_given_is_refused_without_a_trace(make, why):
    torch.manual_seed(0)
    model, batch = make(), a_batch()
    before, state = copy.deepcopy(batch), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    with pytest.raises(UnsupportedError, match=why):
        SinglePass(model, nullcontext).forward(batch, M)
    assert list(batch) == list(before)
    assert all(torch.equal(batch[key], before[key]) for key in batch)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("place", ["input", "weight"])
def test_what_is_not_finite_decides_nothing(place):
    torch.manual_seed(0)
    model, batch = Net(), a_batch()
    if place == "input":
        batch["inputs"][3] = float("nan")
    else:
        with torch.no_grad():
            model.body.weight[0, 0] = float("nan")
    single = SinglePass(model, nullcontext)

    def step(batch):
        picks = torch.arange(2, 8)
        single.forward(batch, M)
        picked = {key: value[picks] for key, value in batch.items()}
        single.serve(picks, picked, None, lambda outputs, _: outputs.square().sum(1))

    with pytest.raises(UndecidedError, match="not finite"):
        step(batch)
    with torch.no_grad():
        model.body.weight[0, 0] = 0.0
    step(a_batch())
    assert single.installed
    single.release()


class BranchesOnData(Net):
    def forward(self, batch):
        hidden = self.hidden(batch["inputs"])
        return self.head(hidden if torch.rand([]) < 0.5 else -hidden)


def test_a_model_that_cannot_be_captured_is_refused_in_silence(capfd):
    hook = warnings.showwarning
    with pytest.raises(UnsupportedError, match="cannot be captured as one graph"):
        SinglePass(BranchesOnData(), nullcontext).forward(a_batch(), M)
    said = capfd.readouterr()
    assert "GraphModule" not in said.out + said.err
    assert ("ignore", None, Warning, None, 0) not in warnings.filters
    assert warnings.showwarning is hook
    assert "print" not in vars(symbolic_convert)
    assert symbolic_convert.log.disabled is False


class WithoutALoss(HuggingFaceModel):
    """As LLM Foundry's MPT: the outputs have no loss, and the model's own comes from its logits."""

    def forward(self, batch):
        return {"logits": super().forward({key: batch[key] for key in batch if key != "labels"})["logits"]}

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs["logits"], batch["labels"])


@pytest.mark.parametrize("select", [GradMatch, LossBackprop])
def test_a_huggingface_model_that_returns_no_loss(select):
    torch.manual_seed(0)
    model = CLASSIFICATION.model()
    model.__class__ = WithoutALoss
    algorithm = select(0.0, 1.0, 0.5, interrupt=0, reuse_activations=True)
    data = [CLASSIFICATION.batch(M, seed=i) for i in range(2)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", select.__name__)
        make_trainer(
            model,
            DataSpec(data, get_num_samples_in_batch=lambda batch: len(batch["labels"])),
            [algorithm],
            max_duration="2ba",
            algorithm_passes=[select_first],
            device_train_microbatch_size=M,
        ).fit()
    assert algorithm.selector.source.single is not None


def test_checks_are_drawn_at_the_share_that_they_may_cost(monkeypatch):
    """Of steps of 1 s and checks of 0.2 s: the first ten, then one in eighty."""
    now = [0.0]
    monkeypatch.setattr("composer_gradmatch.reuse.spot_checks.time.perf_counter", lambda: now[0])
    random = torch.get_rng_state()
    checks, due = SpotChecks(0.0025), []
    for _ in range(8000):
        due.append(checks.due())
        if due[-1]:
            with checks.measured():
                now[0] += 0.2
        now[0] += 1.0
    assert all(due[:10])
    assert 70 < sum(due[10:]) < 130
    gaps = [j - i for i, j in zip(*(lambda at: (at, at[1:]))([i for i, each in enumerate(due) if each]), strict=False)]
    assert len(set(gaps[10:])) > 30, "no schedule can be between them"
    assert torch.equal(random, torch.get_rng_state())


def test_checks_that_cost_next_to_nothing_are_made_in_each_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("composer_gradmatch.reuse.spot_checks.time.perf_counter", lambda: now[0])
    checks = SpotChecks(0.0025)
    for _ in range(100):
        assert checks.due()
        with checks.measured():
            now[0] += 0.002
        now[0] += 1.0


def test_verifications_are_not_drawn_before_their_cost_is_known(monkeypatch):
    checks = SpotChecks(0.0025, first=0, guess=3.0)
    assert not any(checks.due() for _ in range(2))
