"""Steps of one forward pass beside what else a Trainer does in one: other algorithms, callbacks, errors, resuming."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import (
    BATCHNORM,
    CONV,
    MLP,
    loader,
    make_trainer,
)
from composer import Callback
from composer.algorithms import SAM, GradientClipping, LabelSmoothing
from composer.callbacks import ActivationMonitor
from composer.loggers import InMemoryLogger
from one_pass import KEEP, LR, M, always, assert_same_parameters, single_pass_of, trained

from composer_gradmatch import select_first


@pytest.mark.parametrize("make", [SAM, lambda: LabelSmoothing(0.1), lambda: GradientClipping("norm", 0.1)])
@pytest.mark.parametrize("microbatch_size", [3, M])
def test_other_algorithms_compose(make, microbatch_size, served):
    """SAM's second pass is at other weights, and so the model's own."""
    models = [CONV.model(), CONV.model()]
    for model, reuse in zip(models, (False, True), strict=True):
        algorithms = [always(reuse=reuse), make()]
        trained(model, loader(CONV.data(M), M), algorithms, device_train_microbatch_size=microbatch_size)
    assert_same_parameters(*models)
    assert sum(size or 0 for size in served) == int(KEEP * M)


def test_resuming_continues_as_if_never_stopped(tmp_path, served):
    def run(duration, **kwargs):
        torch.manual_seed(0)
        model = BATCHNORM.model()
        train = loader(BATCHNORM.data(32), 16)
        trained(model, train, [always()], max_duration=duration, seed=5, **kwargs)
        return model

    whole = run("4ep")
    run("2ep", save_folder=str(tmp_path), save_filename="ep{epoch}.pt")
    resumed = run("4ep", load_path=str(tmp_path / "ep2.pt"))
    for one, other in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert None not in served


def test_resuming_within_an_epoch(tmp_path, served):
    def run(duration, **kwargs):
        model = BATCHNORM.model()
        torch.manual_seed(0)
        train = loader(BATCHNORM.data(48), 8, shuffle=True)
        trained(model, train, [always()], max_duration=duration, seed=5, device_train_microbatch_size=2, **kwargs)
        return model

    whole = run("9ba")
    run("4ba", save_folder=str(tmp_path), save_filename="ba{batch}.pt", save_interval="4ba")
    resumed = run("9ba", load_path=str(tmp_path / "ba4.pt"))
    for one, other in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert served == [2, 2] * 18


class Again(Callback):
    """Runs the model once more on each microbatch, when its backward pass is over."""

    def __init__(self):
        self.differences = []

    def after_backward(self, state, logger):
        outputs = state.model(state.batch)
        self.differences.append(float((outputs - state.outputs).abs().max()))
        assert outputs.requires_grad


def test_when_all_picks_are_served_the_activations_are_gone_and_the_model_is_its_own_again(served):
    """As where memory runs out in the last microbatch, and Composer makes them all anew."""
    again = Again()
    trained(CONV.model(), loader(CONV.data(M), M), [always()], callbacks=[again], device_train_microbatch_size=5)
    assert served == [5, 5, 4, None]
    assert max(again.differences) < 1e-5


class Probing(Callback):
    """Asks for the loss's gradient before the Trainer does, and for it of the microbatch's outputs anew."""

    def __init__(self):
        self.norms = []

    def before_backward(self, state, logger):
        parameters = list(state.model.parameters())
        grads = torch.autograd.grad(state.loss, parameters, retain_graph=True)
        self.norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))
        state.model(state.batch)


@pytest.mark.parametrize("microbatch_size", [4, M])
def test_a_callback_may_ask_for_gradients_before_the_trainer(microbatch_size, served):
    models, probes = [], []
    for reuse in (False, True):
        model, probe = BATCHNORM.model(), Probing()
        train = loader(BATCHNORM.data(M), M)
        trained(model, train, [always(reuse=reuse)], callbacks=[probe], device_train_microbatch_size=microbatch_size)
        models.append(model)
        probes.append(probe)
    sizes = [4, 4, 2] if microbatch_size == 4 else [9]
    assert served == [size for size in sizes for _ in range(2)]
    assert len(probes[1].norms) == len(sizes)
    assert all(norm > 0 for norm in probes[1].norms)


def test_running_out_of_memory_in_a_microbatch_makes_no_other_forward_pass(served):
    """Composer's automatic microbatches: the second one fails, and all are made again, smaller."""
    model, expected = BATCHNORM.model(), BATCHNORM.model().module
    dataset = BATCHNORM.data(M)
    failures = iter([False, True])

    class Fails(Callback):
        def after_backward(self, state, logger):
            if next(failures, False):
                raise RuntimeError("CUDA out of memory.")

    trainer = make_trainer(
        model, loader(dataset, M), [always()], lr=LR, algorithm_passes=[select_first], callbacks=[Fails()]
    )
    trainer.state.device_train_microbatch_size, trainer.state.auto_microbatching = 4, True
    with pytest.warns(RuntimeWarning, match="will be decreased from 4 -> 2"):
        trainer.fit()
    assert served == [4, 4, 2, 2, 2, 2, 2]
    expected(dataset.tensors[0])
    for found, other in zip(model.module.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(found, other)


def test_an_error_within_a_step_leaves_a_model_that_others_can_train(served):
    class Fails(Callback):
        def before_backward(self, state, logger):
            raise KeyError("of the user's own")

    model = CONV.model()
    algorithm = always()
    with pytest.raises(KeyError):
        trained(model, loader(CONV.data(M), M), [algorithm], callbacks=[Fails()])
    assert not single_pass_of(algorithm).installed
    assert "forward" not in vars(model)
    del served[:]
    trained(model, loader(CONV.data(M), M), [always(reuse=False)])
    assert not served
    assert single_pass_of(algorithm)._pass is None
    copy.deepcopy(model)


@pytest.mark.filterwarnings("ignore:Currently the ActivationMonitor")
def test_what_looks_inside_the_model_sees_a_forward_pass(served):
    """The Trainer's forward is the model's own in the steps in which Composer's monitor hooks its layers."""
    log = InMemoryLogger()
    model = MLP.model()
    monitor = ActivationMonitor(interval="2ba")
    trained(model, loader(MLP.data(M), M), [always()], max_duration="4ba", loggers=[log], callbacks=[monitor])
    assert len(log.data["activations/average/module.2_input.0"]) == 2
    assert served.count(None) == 2
    assert served.count(9) == 2


def test_nothing_stays_behind():
    model = MLP.model()
    algorithm = always()
    trained(model, loader(MLP.data(M), M), [algorithm])
    assert "forward" not in vars(model)
    assert not single_pass_of(algorithm).installed
    assert single_pass_of(algorithm)._pass is None
    copy.deepcopy(model)
