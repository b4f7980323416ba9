"""What a step of one forward pass is made of, part by part."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cases import BATCHNORM, MLP, loader, make_trainer
from text_cases import CLASSIFICATION, TUPLES

from composer_gradmatch.reuse.loss_in_outputs import LossInOutputs
from composer_gradmatch.reuse.minibatch import Minibatch
from composer_gradmatch.reuse.model_forward import ModelForward
from composer_gradmatch.reuse.served_picks import ServedPicks
from composer_gradmatch.reuse.start import Start
from composer_gradmatch.reuse.training_step import put_around_step
from composer_gradmatch.reuse.unsupported import UnsupportedError

M = 6


@pytest.mark.parametrize("drawn_since", [False, True])
def test_a_pass_is_undone_but_for_what_has_been_drawn_since(drawn_since):
    model = BATCHNORM.model().module
    buffers, random = copy.deepcopy(list(model.buffers())), torch.get_rng_state()
    start = Start(model)
    model(BATCHNORM.data(M).tensors[0])
    start.pass_is_over()
    if drawn_since:
        np.random.rand()
    after = torch.get_rng_state()
    start.undo()
    assert all(torch.equal(one, other) for one, other in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), after if drawn_since else random)
    start.rewind()
    assert torch.equal(torch.get_rng_state(), random)


def test_what_others_have_changed_since_a_pass_is_not_undone():
    model = BATCHNORM.model().module
    mean, var, _ = before = copy.deepcopy(list(model.buffers()))
    start = Start(model)
    model(BATCHNORM.data(M).tensors[0])
    start.pass_is_over()
    model[1].running_mean.fill_(7.0)
    start.undo_but_for_changes({id(buffer) for buffer in model.buffers()} - {id(model[1].running_mean)})
    assert torch.equal(model[1].running_mean, torch.full_like(mean, 7.0))
    assert torch.equal(model[1].running_var, var)
    assert torch.equal(model[1].num_batches_tracked, before[2])


@pytest.mark.parametrize("case", [CLASSIFICATION, TUPLES], ids=lambda case: case.name)
def test_a_loss_is_kept_out_of_the_forward_pass_and_put_in_afterwards(case):
    model, batch = case.model(), case.batch(M)
    loss = LossInOutputs(model)
    assert loss.without_labels(batch) is batch, "it is not known yet"
    loss.learn(lambda: model(batch))
    minibatch = Minibatch(model, loss, batch, M)
    without = minibatch.inputs(batch)
    assert "labels" in batch
    assert "labels" not in without
    completed = loss.complete(model(without), batch)
    own = model(batch)
    key = 0 if isinstance(own, tuple) else "loss"
    torch.testing.assert_close(completed[key], own[key])
    loss.check(completed, own)
    wrong = (own[0] * 2, *own[1:]) if isinstance(own, tuple) else {**own, "loss": own["loss"] * 2}
    with pytest.raises(UnsupportedError, match="differs"):
        loss.check(completed, wrong)


def test_another_model_has_no_loss_in_its_outputs():
    loss = LossInOutputs(MLP.model())
    loss.learn(lambda: 1 / 0)
    outputs = torch.ones(M, 5)
    assert loss.complete(outputs, None) is outputs


def test_a_forward_is_replaced_and_put_back():
    model, inputs = MLP.model(), (torch.randn(M, 12), None)
    forward, own = ModelForward(model), model.forward
    expected = model(inputs)
    forward.replace(lambda batch: "another")
    assert model(inputs) == "another"
    assert torch.equal(forward.own(inputs), expected)
    forward.put_back()
    forward.put_back()
    assert "forward" not in vars(model)
    assert model.forward == own
    model.forward = own
    forward.replace(lambda batch: "another")
    forward.put_back()
    assert vars(model)["forward"] == own, "as it was, an instance's own"


def test_picks_are_found_and_counted():
    inputs, targets = torch.randn(M, 12), torch.arange(M)
    samples = torch.tensor([4, 1, 3])
    picks = ServedPicks(samples, (inputs[samples], targets[samples]), lambda batch: batch, [True, False])
    rows = picks.find((inputs[[3, 4]], targets[[3, 4]]))
    assert rows.tolist() == [2, 0]
    assert picks.samples(rows).tolist() == [3, 4]
    assert picks.missed is None
    assert picks.find((inputs[[0]], targets[[0]])) is None
    assert "not those that were picked" in picks.missed
    picks.served.update({0, 1, 2})
    assert picks.missed is None


def test_picks_that_are_changed_in_place_are_not_found():
    batch = (torch.randn(3, 12), torch.arange(3))
    picks = ServedPicks(torch.tensor([4, 1, 3]), batch, lambda batch: batch, [True, False])
    batch[1].add_(1)
    assert picks.find(batch).tolist() == [0, 1, 2], "which the forward pass has not read"
    batch[0].data.mul_(2)
    assert picks.find(batch) is None


def test_functions_are_called_around_one_step():
    trainer, calls = make_trainer(MLP.model(), loader(MLP.data(12), 4), [], max_duration="1ep"), []
    put_around_step(trainer, lambda: False, lambda: calls.append("never"), lambda: calls.append("never"))
    put_around_step(
        trainer,
        lambda: int(trainer.state.timestamp.batch) == 1,
        lambda: calls.append(int(trainer.state.timestamp.batch)),
        lambda: calls.append("over"),
    )
    trainer.fit()
    assert calls == [1, "over"]
