"""One step through a real Trainer against references that share no code with ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import CONV, MLP, STEP_CASES, Autocast, loader, make_trainer, record_selections
from composer import DataSpec, Trainer
from composer.algorithms import SAM
from composer.algorithms.sam.sam import SAMOptimizer
from oracles import classifier_gradients, clip_and_normalize, reference_selection, weighted_gradient

from composer_gradmatch import GradMatch, gram_omp, select_first, select_using_gradient_matching

M, KEEP, LR = 23, 0.4, 0.1


def always(**kwargs):
    return GradMatch(start=0.0, end=1.0, keep=KEEP, interrupt=0, **kwargs)


def step_of(model, train, algorithms=None, **kwargs):
    """The change of each parameter in one step."""
    before = [p.detach().clone() for p in model.module.parameters()]
    algorithms = [always()] if algorithms is None else algorithms
    make_trainer(model, train, algorithms, lr=LR, algorithm_passes=[select_first], **kwargs).fit()
    return [p.detach() - b for p, b in zip(model.module.parameters(), before, strict=True)]


def assert_steps_equal(steps, gradients, tolerance=1e-4):
    flat = torch.cat([s.flatten().double() for s in steps])
    expected = torch.cat([-LR * g.flatten() for g in gradients])
    assert expected.norm() > 1e-4
    assert (flat - expected).norm() <= tolerance * expected.norm()


def reference(case, dataset):
    inputs, targets = dataset.tensors
    module = case.model().module
    picks, weights = reference_selection(module, case.layer, inputs, targets, KEEP)
    assert 1 < len(picks) < M
    assert weights.std() > 0.01, "equal weights would show nothing"
    return module, inputs[picks], targets[picks], weights


@pytest.mark.parametrize("microbatch_size", [1, 3, 5, M])
@pytest.mark.parametrize("case", STEP_CASES, ids=lambda case: case.name)
def test_a_step_is_the_weighted_mean_gradient_of_the_reference_picks(case, microbatch_size):
    dataset = case.data(M)
    module, inputs, targets, weights = reference(case, dataset)
    steps = step_of(case.model(), loader(dataset, M), device_train_microbatch_size=microbatch_size)
    assert_steps_equal(steps, weighted_gradient(module, inputs, targets, weights))


@pytest.mark.parametrize("microbatch_size", [3, M])
def test_a_step_under_sam(microbatch_size):
    case, rho = MLP, 0.05
    dataset = case.data(M)
    module, inputs, targets, weights = reference(case, dataset)
    gradients = weighted_gradient(module, inputs, targets, weights)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    climbed = case.model().module.double()
    with torch.no_grad():
        for parameter, gradient in zip(climbed.parameters(), gradients, strict=True):
            parameter.add_(gradient * rho / norm)
    expected = weighted_gradient(climbed, inputs, targets, weights)
    steps = step_of(
        case.model(), loader(dataset, M), [always(), SAM(rho=rho)], device_train_microbatch_size=microbatch_size
    )
    assert_steps_equal(steps, expected)
    plain = torch.cat([g.flatten() for g in gradients])
    assert (torch.cat([g.flatten() for g in expected]) - plain).norm() > 1e-3 * plain.norm()


def test_sam_runs_its_closure_more_than_once_with_the_same_weights():
    model = MLP.model()
    trainer = make_trainer(model, loader(MLP.data(M), M), [always(), SAM()], algorithm_passes=[select_first])
    trainer.fit()
    assert isinstance(trainer.state.optimizers[0], SAMOptimizer)


def strided(batch, size):
    """Views that deal the samples out like cards."""
    inputs, targets = batch
    hands = -(-len(inputs) // size)
    return [(inputs[i::hands], targets[i::hands]) for i in range(hands)]


def shuffled(batch, size):
    """Copies in another order."""
    inputs, targets = batch
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(1))
    return [(inputs[part], targets[part]) for part in order.split(size)]


@pytest.mark.parametrize(
    ("split", "transform"), [(strided, None), (shuffled, None), (strided, lambda batch: (batch[0] * 1.0, batch[1]))]
)
def test_weights_follow_samples_through_a_split_batch_that_reorders_them(split, transform):
    dataset = CONV.data(M)
    module, inputs, targets, weights = reference(CONV, dataset)
    spec = DataSpec(loader(dataset, M), split_batch=split, microbatch_transforms=transform)
    steps = step_of(CONV.model(), spec, device_train_microbatch_size=4)
    assert_steps_equal(steps, weighted_gradient(module, inputs, targets, weights))


def test_a_split_batch_that_hides_the_samples_is_an_error_not_a_wrong_weight():
    spec = DataSpec(
        loader(CONV.data(M), M), split_batch=shuffled, microbatch_transforms=lambda batch: (batch[0] * 2, batch[1])
    )
    with pytest.raises(ValueError, match="Cannot tell which of the picked samples"):
        step_of(CONV.model(), spec, device_train_microbatch_size=4)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_in_low_precision_with_and_without_a_gradient_scaler(scaled, monkeypatch):
    dataset = MLP.data(M)
    model = MLP.model()
    module = MLP.model().module
    model.module = Autocast(model.module)
    if scaled:
        # What Composer does for amp_fp16 on a GPU.
        monkeypatch.setattr(Trainer, "_use_grad_scaling", lambda self, precision, scaler: True)
        monkeypatch.setattr(Trainer, "_use_closures", lambda self: False)
    before = [p.detach().clone() for p in model.module.parameters()]
    algorithm = always()
    trainer = make_trainer(
        model, loader(dataset, M), [algorithm], lr=LR, algorithm_passes=[select_first], device_train_microbatch_size=4
    )
    if scaled:
        trainer.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    seen = record_selections(algorithm)
    trainer.fit()
    steps = [p.detach() - b for p, b in zip(model.module.parameters(), before, strict=True)]
    # Picks in bfloat16 may differ from the float64 reference; the step on them must not.
    ((_, selection),) = seen
    picks, weights = selection.indices, selection.weights
    inputs, targets = dataset.tensors
    assert_steps_equal(steps, weighted_gradient(module, inputs[picks], targets[picks], weights), tolerance=0.03)


def test_the_weights_belong_to_their_samples_when_some_are_alike():
    """Samples alike in all that a batch holds share their weights, so that the sum is right in any split."""
    dataset = CONV.data(M)
    _, inputs, targets, weights = reference(CONV, dataset)
    picked = (torch.cat([inputs, inputs[:2]]), torch.cat([targets, targets[:2]]))
    from composer_gradmatch.batches import match_rows

    all_weights = torch.tensor([*weights, 3.0, 5.0])
    parts = shuffled(picked, 4)
    found = torch.cat([match_rows(part, picked, all_weights) for part in parts])
    gradient = sum(
        w * float(x.sum())
        for part, ws in zip(parts, found.split(4), strict=True)
        for x, w in zip(part[0], ws, strict=True)
    )
    expected = sum(w * float(x.sum()) for x, w in zip(picked[0], all_weights, strict=True))
    assert float(gradient) == pytest.approx(float(expected), rel=1e-5)


def test_a_duplicated_high_loss_sample_is_picked_once_with_more_weight():
    """§1 of the paper: near duplicates with high loss are redundant, and the one that stays counts for both."""
    dataset = MLP.data(M)
    model = MLP.model()
    inputs, targets = dataset.tensors
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model.module(inputs), targets, reduction="none")
        hardest = int(losses.argmax())
        twin = (hardest + 1) % M
        inputs[twin], targets[twin] = inputs[hardest], targets[hardest]
    algorithm = always()
    seen = record_selections(algorithm)
    make_trainer(model, loader(dataset, M), [algorithm], algorithm_passes=[select_first]).fit()
    ((_, selection),) = seen
    picks = selection.indices.tolist()
    picked_twins = {hardest, twin} & set(picks)
    assert len(picked_twins) == 1
    weights = dict(zip(picks, selection.weights.tolist(), strict=True))
    assert weights[picked_twins.pop()] > 1.5 * np.median(list(weights.values()))


def test_the_rest_of_training_sees_only_the_picked_samples():
    from composer import Callback

    class Watch(Callback):
        def __init__(self):
            self.sizes = []

        def before_train_batch(self, state, logger):
            self.sizes.append(len(state.batch[0]))

    watch = Watch()
    make_trainer(MLP.model(), loader(MLP.data(3 * M), M), [always()], callbacks=[watch], max_duration="1ep").fit()
    assert len(watch.sizes) == 3
    assert all(1 <= size <= int(KEEP * M) for size in watch.sizes)


def test_with_unit_weights_the_step_is_that_of_training_on_the_picks(monkeypatch):
    dataset = CONV.data(M)
    algorithm = always()
    seen = []
    original = algorithm.selector.select

    def equal_weights(*args):
        selection = original(*args)
        seen.append(selection)
        return type(selection)(selection.indices, torch.ones(len(selection.indices), dtype=torch.float64))

    monkeypatch.setattr(algorithm.selector, "select", equal_weights)
    steps = step_of(CONV.model(), loader(dataset, M), [algorithm], device_train_microbatch_size=4)
    picks = seen[0].indices
    inputs, targets = dataset.tensors
    own = torch.utils.data.TensorDataset(inputs[picks], targets[picks])
    plain = step_of(CONV.model(), loader(own, len(picks)), [], device_train_microbatch_size=4)
    for a, b in zip(steps, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [{"solver": "nonnegative"}, {"solver": "swap"}, {"solver": "sklearn"}, {"ridge": 2.0}, {"tolerance": 0.3}],
    ids=str,
)
def test_the_choice_of_solver_reaches_the_step(options):
    """Compared with the solver on explicit gradients, and with the picks of the default, which are others."""
    data = MLP.data(40)
    inputs, targets = data.tensors
    gradients = classifier_gradients(MLP.model().module, MLP.layer, inputs, targets)
    gram = gradients @ gradients.T
    picks, weights = clip_and_normalize(*gram_omp(gram, gram.mean(1), 12, **options))
    algorithm = GradMatch(start=0.0, end=1.0, keep=0.3, interrupt=0, **options)
    recorded = record_selections(algorithm)
    make_trainer(MLP.model(), loader(data, 40), [algorithm]).fit()
    assert recorded[0][1].indices.tolist() == picks.tolist()
    np.testing.assert_allclose(recorded[0][1].weights, weights, rtol=1e-4)
    default = clip_and_normalize(*gram_omp(gram, gram.mean(1), 12))
    assert options == {"solver": "nonnegative"} or weights.tolist() != default[1].tolist()

    x, y, w = select_using_gradient_matching(
        inputs, targets, MLP.model().module, torch.nn.functional.cross_entropy, keep=0.3, **options
    )
    assert torch.equal(x, inputs[picks.tolist()])
    assert torch.equal(y, targets[picks.tolist()])
    np.testing.assert_allclose(w, weights, rtol=1e-4)


def test_a_solver_of_ones_own_makes_the_step():
    """Any function of a problem: here the samples of the largest correlation, with equal weights."""

    def largest(problem):
        indices = np.argsort(-problem.target, kind="stable")[: problem.k]
        return indices, np.ones(problem.k)

    algorithm = always(solver=largest)
    seen = record_selections(algorithm)
    step_of(CONV.model(), loader(CONV.data(M), M), [algorithm])
    (_, picks) = seen[0]
    assert len(picks.indices) == int(KEEP * M)
    torch.testing.assert_close(picks.weights, torch.ones(len(picks.indices)).double())
