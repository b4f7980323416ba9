"""When the activations of a pass are let go of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layout_models import ROWS, WEIGHTS, M, assert_close, built, weighted
from torch.multiprocessing.reductions import StorageWeakRef

from composer_gradmatch.reuse.capture import CapturedForward
from composer_gradmatch.reuse.verify import check_gradients


def test_microbatches_add_up_and_their_number_may_be_one():
    model, inputs, targets = built("encoder, batch first")
    captured = CapturedForward(lambda batch: model(batch[0]))((inputs, targets), M)
    whole = torch.autograd.grad(weighted(captured.rows(ROWS), targets[ROWS]), list(model.parameters()))
    for row, weight in zip(ROWS, WEIGHTS, strict=True):
        loss = F.cross_entropy(captured.rows(row[None]), targets[row][None]) * weight
        loss.backward()
    check_gradients([p.grad for p in model.parameters()], whole)


def saved_activations():
    """A pass over M samples of which the three at ROWS are picked, and what it has saved of its own."""
    model, inputs, targets = built("encoder, positions first")
    captured = CapturedForward(lambda batch: model(batch[0]))((inputs, targets), M)
    captured.run.num_picks = len(ROWS)
    ours = {tensor.untyped_storage().data_ptr() for tensor in (inputs, captured.outputs, *model.parameters())}
    saved = [tensor.untyped_storage() for tensor in captured.run.saved]
    activations = [StorageWeakRef(storage) for storage in saved if storage.data_ptr() not in ours]
    assert len(activations) > 20

    def loss(picks):
        rows = ROWS[picks]
        losses = F.cross_entropy(captured.rows(rows, picks), targets[rows], reduction="none")
        return (losses * WEIGHTS[picks]).sum()

    return captured.run, loss, list(model.parameters()), activations


def kept(activations):
    return sum(not each.expired() for each in activations)


def test_the_last_backward_pass_lets_go_of_what_was_saved():
    run, loss, parameters, activations = saved_activations()
    whole = torch.autograd.grad(loss([0, 1, 2]), parameters, retain_graph=True)
    first = torch.autograd.grad(loss([1]), parameters)
    assert kept(activations) == len(activations)
    last = torch.autograd.grad(loss([2, 0]), parameters)
    assert kept(activations) == 0
    assert run.spent
    assert_close([one + other for one, other in zip(first, last, strict=True)], whole, 1e-6)


def test_a_graph_that_is_kept_can_be_run_again_and_one_that_is_not_says_so():
    run, loss, parameters, activations = saved_activations()
    value = loss([0, 1, 2])
    kept_graph = torch.autograd.grad(value, parameters, retain_graph=True)
    assert kept(activations) == len(activations)
    assert_close(torch.autograd.grad(value, parameters), kept_graph, 1e-6)
    assert run.spent
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, parameters)


def test_picks_whose_outputs_are_taken_twice_keep_what_was_saved_for_both():
    _run, loss, parameters, activations = saved_activations()
    one, other = loss([0, 1, 2]), loss([0, 1, 2])
    once = torch.autograd.grad(one, parameters, retain_graph=True)
    assert_close(torch.autograd.grad(one + other, parameters), [2 * gradient for gradient in once], 1e-6)
    assert kept(activations) == 0


def test_picks_that_are_only_looked_at_do_not_count():
    run, loss, parameters, activations = saved_activations()
    loss([0, 1, 2])
    torch.autograd.grad(loss([0, 1]), parameters)
    loss([0, 1, 2])
    assert not run.spent
    torch.autograd.grad(loss([2]), parameters)
    assert run.spent
    assert kept(activations) == 0


def test_picks_that_come_again_are_counted_anew():
    """As where memory runs out in the second of two microbatches, and all are made again, smaller."""
    _run, loss, parameters, activations = saved_activations()
    torch.autograd.grad(loss([0, 1]), parameters)
    torch.autograd.grad(loss([0]), parameters)
    torch.autograd.grad(loss([1]), parameters)
    assert kept(activations) == len(activations)
    torch.autograd.grad(loss([2]), parameters)
    assert kept(activations) == 0
