"""Steps of one forward pass through a real Trainer, against steps of two, and references that share no code."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch
from cases import (
    BATCHNORM,
    CONV,
    IN_PLACE,
    MLP,
    NO_BIAS,
    REORDERED,
    Autocast,
    Case,
    loader,
    make_trainer,
    record_selections,
)
from composer import Callback, DataSpec, Trainer
from composer.algorithms import SAM, GradientClipping, LabelSmoothing, MixUp
from composer.callbacks import ActivationMonitor
from composer.core import Algorithm, Event
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from oracles import weighted_gradient
from text_cases import CAUSAL_LM, CLASSIFICATION, TEXT_CASES, TOKENS, TextCase, _bert_config, _classes
from torch import nn
from transformers import BertForSequenceClassification

from composer_gradmatch import GradMatch, LossBackprop, select_first
from composer_gradmatch.benchmarks.peak import PeakMemory
from composer_gradmatch.reuse import verification
from composer_gradmatch.reuse.inductor import InductorGraph
from composer_gradmatch.reuse.unsupported import UnsupportedError

M, KEEP, LR = 23, 0.4, 0.1


def always(algorithm=GradMatch, *, reuse=True, **kwargs):
    return algorithm(start=0.0, end=1.0, keep=KEEP, interrupt=0, reuse_activations=reuse, **kwargs)


def trained(model, train, algorithms, **kwargs):
    trainer = make_trainer(model, train, algorithms, lr=LR, algorithm_passes=[select_first], **kwargs)
    trainer.fit()
    return trainer


def assert_same_parameters(model, other, tolerance=1e-4):
    before, after = (torch.cat([p.detach().flatten() for p in each.parameters()]) for each in (model, other))
    assert (before - after).norm() <= tolerance * before.norm()


class GraphsOf(Callback):
    """The graphs that an algorithm's steps ran, step by step, where there are any."""

    def __init__(self, algorithm, found):
        self.algorithm, self.found = algorithm, found

    def before_forward(self, state, logger):
        if self.algorithm._single_pass is not None:
            self.found.append(self.algorithm._single_pass._pass.run.graphs)


@pytest.mark.parametrize("microbatch_size", [2, M])
@pytest.mark.parametrize("case", [MLP, NO_BIAS, CONV, REORDERED], ids=lambda case: case.name)
def test_a_step_is_the_weighted_mean_gradient_of_the_picks(case, microbatch_size, served):
    dataset, model = case.data(M), case.model()
    algorithm = always()
    seen = record_selections(algorithm)
    trained(model, loader(dataset, M), [algorithm], device_train_microbatch_size=microbatch_size)
    ((_, selection),) = seen
    picks = selection.indices
    assert sum(served) == len(picks), "every pick is served, and nothing else is"
    assert selection.weights.std() > 0.01
    inputs, targets = dataset.tensors
    module = case.model().module
    gradients = weighted_gradient(module, inputs[picks], targets[picks], selection.weights)
    steps = [p.detach() - b.detach() for p, b in zip(model.module.parameters(), module.parameters(), strict=True)]
    flat = torch.cat([s.flatten().double() for s in steps])
    expected = torch.cat([-LR * g.flatten() for g in gradients])
    assert (flat - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("algorithm", [GradMatch, LossBackprop])
def test_training_is_that_of_two_passes(algorithm, served):
    """Some epochs, with a smaller last minibatch, of a model without random numbers."""
    models, logs = [], []
    for reuse in (False, True):
        log = InMemoryLogger()
        model = CONV.model()
        train = loader(CONV.data(40), 16)
        torch.manual_seed(3)
        trained(model, train, [always(algorithm, reuse=reuse)], max_duration="3ep", loggers=[log], seed=3)
        models.append(model)
        logs.append(log)
    assert served == [6, 6, 3] * 3
    if algorithm is GradMatch:
        assert_same_parameters(*models)
        for key in ("gradmatch/matching_residual", "loss/train/total", "metrics/train/MulticlassAccuracy"):
            values = [[float(value) for _, value in log.data[key]] for log in logs]
            assert values[0] == pytest.approx(values[1], rel=1e-3)
        costs = [float(log.data["gradmatch/estimated_cost"][0][1]) for log in logs]
        assert costs == pytest.approx([1 / 3 + 6 / 16, 1 / 3 + 2 / 3 * 6 / 16])


@pytest.mark.parametrize("case", TEXT_CASES, ids=lambda case: case.name)
def test_huggingface_models(case, served):
    models = []
    for reuse in (False, True):
        model = case.model()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trained(model, loader(case.data(M), M), [always(reuse=reuse)], device_train_microbatch_size=4)
        said = [str(each.message) for each in caught if "two forward passes" in str(each.message)]
        assert not said
        models.append(model)
    assert sum(served) == int(KEEP * M)
    assert_same_parameters(*models)


def test_bert_with_dropout(served):
    """The masks are those of the forward pass that selected: the verification would say if they were not."""
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    case = TextCase(
        "dropout", lambda: BertForSequenceClassification(_bert_config(num_labels=3, **dropout)), _classes, ""
    )
    trained(case.model(), loader(case.data(M), M), [always()], max_duration="2ba")
    assert sum(served) == 2 * int(KEEP * M)


@pytest.mark.parametrize("case", [CLASSIFICATION, TOKENS, CAUSAL_LM], ids=lambda case: case.name)
def test_minibatches_of_many_lengths(case, served):
    """As dynamic padding makes them: the model is captured for the first, and once for all others."""

    def batches():
        for i, length in enumerate([6, 7, 5, 4, 6, 7]):
            batch = case.batch(10, seed=i)
            yield {key: value[:, -length:].contiguous() if value.dim() == 2 else value for key, value in batch.items()}

    models, runs = [], []
    for reuse in (False, True):
        model, algorithm = case.model(), always(reuse=reuse)
        data = DataSpec(list(batches()), get_num_samples_in_batch=lambda batch: len(batch["labels"]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watcher = GraphsOf(algorithm, runs)
            trained(model, data, [algorithm], max_duration="2ep", callbacks=[watcher], device_train_microbatch_size=10)
        assert not [each for each in caught if "two forward passes" in str(each.message)]
        models.append(model)
    assert served == [4] * 12
    assert len(set(runs)) == 2
    assert_same_parameters(*models)


def test_running_statistics_are_updated_once_a_step_by_all_samples(served):
    dataset, model = BATCHNORM.data(M), BATCHNORM.model()
    expected = BATCHNORM.model().module
    trained(model, loader(dataset, M), [always()], device_train_microbatch_size=4)
    assert served == [4, 4, 2]  # Of nine picks one would be left, which batch normalisation takes another one with.
    expected(dataset.tensors[0])
    for found, other in zip(model.module.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(found, other)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, inputs):
        hidden = self.body(inputs)
        return self.head(hidden.relu() if hidden.sum() > 0 else hidden.tanh())


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, inputs):
        hidden = self.body(inputs)
        return self.head((hidden - hidden.mean(0)).relu())


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Case("branching", Branching, "head", (12,)), "cannot be captured as one graph"),
        (Case("mixing", Mixing, "head", (12,)), "layers mix samples"),
        (IN_PLACE, "does not return its output layer's output as it is"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_is_not_supported_falls_back_to_two_passes_and_says_why_once(case, why, served):
    reference = case.model()
    trained(reference, loader(case.data(M), M), [always(reuse=False)], max_duration="3ba")
    model = case.model()
    with pytest.warns(UserWarning, match=why) as caught:
        trained(model, loader(case.data(M), M), [always()], max_duration="3ba")
    assert sum("two forward passes" in str(each.message) for each in caught) == 1
    assert not any(served)
    assert_same_parameters(reference, model, tolerance=1e-6)


def test_a_torch_without_the_interfaces_falls_back(monkeypatch):
    monkeypatch.setitem(sys.modules, "composer_gradmatch.reuse.single_pass", None)
    with pytest.warns(UserWarning, match=r"two forward passes are made: torch \S+ is not a version"):
        trained(MLP.model(), loader(MLP.data(M), M), [always()])


def test_falling_back_leaves_no_trace_in_buffers_and_generators():
    """Under dropout and batch normalisation: what two passes make, bit for bit."""

    class MixingBatchNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm, self.head = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)

        def forward(self, inputs):
            hidden = nn.functional.dropout(self.norm(self.body(inputs)), 0.3, self.training)
            return self.head(hidden - hidden.flip(0))

    case = Case("mixing", MixingBatchNorm, "head", (12,))
    models = [case.model(), case.model()]
    for model, reuse in zip(models, (False, True), strict=True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "GradMatch: the activations")
            trained(model, loader(case.data(M), M), [always(reuse=reuse)], max_duration="2ba", seed=1)
    for one, other in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_pass_that_another_algorithm_makes_useless_is_given_up():
    with pytest.warns(UserWarning, match="not those that were picked"):
        trained(MLP.model(), loader(MLP.data(M), M), [always(), MixUp()], max_duration="2ba")


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


@pytest.mark.parametrize("scaled", [False, True])
def test_low_precision_and_a_gradient_scaler(scaled, monkeypatch, served):
    models = []
    for reuse in (False, True):
        model = MLP.model()
        model.module = Autocast(model.module)
        with monkeypatch.context() as patched:
            if scaled:
                patched.setattr(Trainer, "_use_grad_scaling", lambda self, precision, scaler: True)
                patched.setattr(Trainer, "_use_closures", lambda self: False)
            trainer = make_trainer(
                model,
                loader(MLP.data(M), M),
                [always(reuse=reuse)],
                lr=LR,
                algorithm_passes=[select_first],
                device_train_microbatch_size=4,
            )
            if scaled:
                trainer.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
            trainer.fit()
        models.append(model)
    assert sum(served) == int(KEEP * M)
    assert_same_parameters(*models, tolerance=2e-3)


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


def test_a_loss_that_runs_the_model_again(served):
    class Consistent(ComposerClassifier):
        def loss(self, outputs, batch, *args, **kwargs):
            again = self(batch).square().mean(1)
            each = kwargs.get("reduction") == "none"
            return super().loss(outputs, batch, *args, **kwargs) + (again if each else again.mean())

    models = []
    for reuse in (False, True):
        model = CONV.model()
        model.__class__ = Consistent
        torch.manual_seed(0)
        algorithm = always(LossBackprop, reuse=reuse)
        trained(model, loader(CONV.data(M), M), [algorithm], device_train_microbatch_size=5, seed=3)
        models.append(model)
    assert served == [5, 5, 4, 4]
    assert_same_parameters(*models)


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


def test_a_model_that_returns_a_tensor_twice(served):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

        def forward(self, inputs):
            outputs = self.head(self.body(inputs).relu())
            return {"logits": outputs, "again": outputs}

    class Both(ComposerClassifier):
        def loss(self, outputs, batch, *args, **kwargs):
            return super().loss((outputs["logits"] + outputs["again"]) / 2, batch, *args, **kwargs)

        def update_metric(self, batch, outputs, metric):
            metric.update(outputs["logits"], batch[1])

    models = []
    for reuse in (False, True):
        torch.manual_seed(0)
        model = Both(Twice(), num_classes=5)
        trained(model, loader(MLP.data(M), M), [always(reuse=reuse)])
        models.append(model)
    assert served == [9]
    assert_same_parameters(*models)


def test_an_error_while_verifying_is_no_error_of_the_run(monkeypatch, served):
    def broken(*_):
        raise TypeError("unheard of")

    monkeypatch.setattr("composer_gradmatch.reuse.verification.check_gradients", broken)
    models = [CONV.model(), CONV.model()]
    trained(models[0], loader(CONV.data(M), M), [always(reuse=False)], max_duration="2ba")
    with pytest.warns(UserWarning, match="could not be verified: TypeError: unheard of"):
        trained(models[1], loader(CONV.data(M), M), [always()], max_duration="2ba")
    assert not served
    assert_same_parameters(*models, tolerance=1e-6)


@pytest.mark.parametrize("broken", [False, True])
def test_draws_of_the_selection_are_not_repeated_after_a_verification(broken, monkeypatch):
    """Steps 1 and 7 are verified; of a model without dropout nothing else draws."""
    monkeypatch.setattr("composer_gradmatch.reuse.graphs.FIRST_REVERIFICATION", 7)
    if broken:
        monkeypatch.setattr("composer_gradmatch.reuse.output_checks.check_outputs", lambda *_: 1 / 0)
        monkeypatch.setattr("composer_gradmatch.reuse.verification.check_outputs", lambda *_: 1 / 0)
    picks = []
    for reuse in (False, True):
        algorithm = always(LossBackprop, reuse=reuse, beta=0.0)
        seen = record_selections(algorithm)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LossBackprop: the activations")
            trained(MLP.model(), loader(MLP.data(M), M), [algorithm], max_duration="11ba", seed=3)
        picks.append([selection.indices.tolist() for _, selection in seen])
    assert len({tuple(sorted(each)) for each in picks[1]}) > 5
    assert picks[0] == picks[1]


def test_an_error_within_a_step_leaves_a_model_that_others_can_train(served):
    class Fails(Callback):
        def before_backward(self, state, logger):
            raise KeyError("of the user's own")

    model = CONV.model()
    algorithm = always()
    with pytest.raises(KeyError):
        trained(model, loader(CONV.data(M), M), [algorithm], callbacks=[Fails()])
    assert not algorithm._single_pass.installed
    assert "forward" not in vars(model)
    del served[:]
    trained(model, loader(CONV.data(M), M), [always(reuse=False)])
    assert not served
    assert algorithm._single_pass._pass is None
    copy.deepcopy(model)


def test_gradients_are_verified_again_and_the_run_goes_on_in_two_passes(monkeypatch, served):
    """As where samples are mixed only once some value has grown, which nothing shows before."""
    steps, original = [], verification.check_gradients

    def check(*args):
        steps.append(len(served))
        original(*args)
        if len(steps) == 2:
            raise UnsupportedError("grown")

    monkeypatch.setattr(verification, "check_gradients", check)
    monkeypatch.setattr("composer_gradmatch.reuse.graphs.FIRST_REVERIFICATION", 10)
    with pytest.warns(UserWarning, match="two forward passes are made: grown"):
        trained(MLP.model(), loader(MLP.data(M), M), [always()], max_duration="12ba")
    assert steps == [0, 9]
    assert served == [9] * 9


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


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_graph_of_the_backward_pass_is_left_to_two_passes(served):
    class Differentiating(Algorithm):
        @property
        def backwards_create_graph(self):
            return True

        def match(self, event, state):
            return False

        def apply(self, event, state, logger):
            raise AssertionError

    with pytest.warns(UserWarning, match="wants the graph of the backward pass"):
        trained(MLP.model(), loader(MLP.data(M), M), [always(), Differentiating()])
    assert not served


def test_nothing_stays_behind():
    model = MLP.model()
    algorithm = always()
    trained(model, loader(MLP.data(M), M), [algorithm])
    assert "forward" not in vars(model)
    assert not algorithm._single_pass.installed
    assert algorithm._single_pass._pass is None
    copy.deepcopy(model)


class Dropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, inputs):
        return self.head(nn.functional.dropout(self.norm(self.body(inputs)).relu(), 0.3, self.training))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("case", [CONV, BATCHNORM, Case("dropout", Dropout, "head", (12,))], ids=lambda case: case.name)
def test_a_model_that_is_compiled(case, backend, served, monkeypatch):
    """By Inductor, both graphs are compiled, too; the last minibatch and microbatch are smaller."""
    called = set()
    original = InductorGraph.__call__

    def call(self, *args):
        called.add(self)
        return original(self, *args)

    monkeypatch.setattr(InductorGraph, "__call__", call)
    models = []
    for config in (None, {"backend": backend}):
        model = case.model()
        train = loader(case.data(40), 16)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "GradMatch")
            trained(
                model,
                train,
                [always()],
                max_duration="4ba",
                seed=3,
                device_train_microbatch_size=4,
                compile_config=config,
            )
        models.append(model)
    assert served == [4, 2, 4, 2, 3, 4, 2] * 2
    assert_same_parameters(*models)
    assert bool(called) == (backend == "inductor")
    assert len(called) % 2 == 0, "one forward, one backward graph for each capture"
    assert not any(graph.failure for graph in called)


@pytest.mark.parametrize("reuse", [False, True])
def test_a_huggingface_model_that_is_compiled(reuse, served):
    models = []
    for config in (None, {"backend": "aot_eager"}):
        model = CLASSIFICATION.model()
        trained(model, loader(CLASSIFICATION.data(M), M), [always(reuse=reuse)], compile_config=config)
        models.append(model)
    assert served == [9, 9] * reuse
    assert_same_parameters(*models)


def test_a_graph_that_inductor_cannot_compile_runs_as_it_is(served, monkeypatch):
    def fails(*_):
        raise ValueError("no such device")

    original = InductorGraph.__init__

    def with_a_backend_that_fails(self, module):
        original(self, module)
        self._compiled = torch.compile(module.forward, backend=fails)

    monkeypatch.setattr(InductorGraph, "__init__", with_a_backend_that_fails)
    models = [CONV.model(), CONV.model()]
    trained(models[0], loader(CONV.data(M), M), [always()])
    with pytest.warns(UserWarning, match="runs uncompiled: ValueError: no such device"):
        trained(models[1], loader(CONV.data(M), M), [always()], compile_config={})
    assert served == [9, 9]
    assert_same_parameters(*models)


def test_a_forward_pass_that_counts_itself_falls_back(served):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.calls = nn.Linear(12, 5), 0

        def forward(self, inputs):
            self.calls += 1
            return self.head(inputs + 0 * self.calls)

    case = Case("counting", Counting, "head", (12,))
    with pytest.warns(UserWarning, match="captured anew whenever it runs"):
        trained(case.model(), loader(case.data(M), M), [always(LossBackprop)])
    assert not served


def test_a_number_that_changes_between_steps_falls_back(served):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.scale = nn.Linear(12, 5), 1.0

        def forward(self, inputs):
            return self.head(inputs * self.scale)

    class Schedule(Callback):
        def batch_end(self, state, logger):
            state.model.module.scale *= 0.9

    case = Case("scaled", Scaled, "head", (12,))
    with pytest.warns(UserWarning, match="captured more than 16 times: sizes, or numbers that its forward pass reads"):
        trained(case.model(), loader(case.data(M), M), [always()], max_duration="18ba", callbacks=[Schedule()])
    assert served == [9] * 16


@pytest.mark.parametrize(
    "kwargs", [{"scale_factor": 0.5}, {"selection_microbatch_size": 4}, {"selection_precision": "amp_bf16"}]
)
def test_a_selection_pass_of_its_own_is_refused(kwargs):
    with pytest.raises(ValueError, match="the training step's own forward pass"):
        always(**kwargs)


def dead(inputs):
    """Nothing gets through the ReLU: all gradients are zero."""
    return -inputs.abs()


@pytest.mark.parametrize(
    ("spoil", "why"), [(torch.zeros_like, "alike"), (dead, "the gradients .* not finite, or zero")]
)
def test_a_minibatch_that_shows_nothing_is_trained_in_two_passes_and_the_next_in_one(spoil, why, served):
    layers = [nn.Linear(12, 16, bias=False), nn.ReLU(), nn.Linear(16, 5, bias=False)]
    with torch.no_grad():
        layers[0].weight.abs_()
    case = Case("unbiased", lambda: nn.Sequential(*layers), "2", (12,))
    dataset = case.data(2 * M)
    dataset.tensors[0][:M] = spoil(dataset.tensors[0][:M])
    with pytest.warns(UserWarning, match=f"until one can be verified: .*{why}") as caught:
        trained(case.model(), loader(dataset, M), [always(LossBackprop)], max_duration="2ba")
    assert not any("cannot be used" in str(each.message) for each in caught)
    assert served == [int(KEEP * M)]


class PeakOfStep(Callback):
    """Of epochs of one step: the loader is asked once more than it has batches, and what that opens stays open."""

    def __init__(self):
        self.peaks = []

    def run_event(self, event, state, logger):
        if event == Event.EPOCH_START:
            self.memory = PeakMemory().__enter__()
        elif event == Event.BATCH_END:
            self.memory.__exit__(None, None, None)
            self.peaks.append(self.memory.bytes)


def test_the_step_that_verifies_does_not_hold_two_passes_activations():
    layers = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.2))]
    case = Case("deep", lambda: nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 64, 5)), "19", (64, 64))
    peaks = PeakOfStep()
    activations = 6 * 2.25 * 2 * M * 64 * 64 * 4
    trained(case.model(), loader(case.data(2 * M), 2 * M), [always()], max_duration="2ep", callbacks=[peaks])
    assert peaks.peaks[1] > activations
    assert peaks.peaks[0] < 1.5 * peaks.peaks[1]
