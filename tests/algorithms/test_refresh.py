"""Stored looks in a Trainer: when it looks, what comes from the store, and who is left out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import BATCHNORM, CONV, MLP, ON, On, _mlp, make_trainer
from composer import Event
from composer.algorithms import SAM, GhostBatchNorm, MixUp
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from composer.utils import dist
from oracles import classifier_gradients
from text_cases import CLASSIFICATION, MULTI_LABEL, REGRESSION
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from composer_gradmatch import (
    GradMatch,
    ImportanceBackprop,
    LossBackprop,
    Picks,
    RandomBackprop,
    Rule,
    RuleBackprop,
    number_samples,
    select_first,
)
from composer_gradmatch.forward.huggingface_losses import huggingface_losses

N, BATCH = 60, 20


def trainer_of(algorithm, *, model=None, data=None, numbered=True, others=(), batch_size=BATCH, **kwargs):
    model = MLP.model() if model is None else model
    data = MLP.data(N) if data is None else data
    collate = {}
    if numbered:
        data = number_samples(data)
        collate = {"collate_fn": data.collate_fn}
    train = DataLoader(data, batch_size, sampler=dist.get_sampler(data, shuffle=True), **collate)
    arguments = {"max_duration": "3ep", "algorithm_passes": [select_first], "seed": 5, **kwargs}
    return make_trainer(model, train, [algorithm, *others], **arguments)


def fitted(algorithm, **kwargs):
    logger = InMemoryLogger()
    trainer = trainer_of(algorithm, loggers=[logger], **kwargs)
    trainer.fit()
    trainer.close()
    name = algorithm.log_name
    metrics = {
        key.removeprefix(f"{name}/"): [v for _, v in values] for key, values in logger.data.items() if name in key
    }
    return trainer.state.model.state_dict(), metrics


def assert_equal(ones, others):
    for key in ones:
        assert torch.equal(ones[key], others[key]), key


@pytest.mark.parametrize("case", [MLP, BATCHNORM], ids=lambda case: case.name)
@pytest.mark.parametrize("make", [GradMatch, LossBackprop])
def test_a_refresh_of_an_epoch_trains_as_looks_in_each_step_do(make, case):
    runs = [
        fitted(make(**ON, keep=0.3, **refresh), model=case.model(), data=case.data(N), numbered=bool(refresh))
        for refresh in ({}, {"refresh": "1ep"})
    ]
    assert_equal(runs[0][0], runs[1][0])
    assert runs[1][1]["fraction_looked_at"] == [1.0] * 9


@pytest.mark.parametrize("make", [GradMatch, LossBackprop, ImportanceBackprop])
def test_it_looks_at_what_is_due_and_counts_its_cost(make):
    algorithm = make(**ON, keep=0.3, refresh="3ep")
    calls = []
    model = MLP.model()
    model.module.register_forward_hook(lambda module, inputs, _: calls.append(len(inputs[0])))
    _, metrics = fitted(algorithm, model=model, max_duration="6ep")
    looked = metrics["fraction_looked_at"]
    assert looked[:9] == [1.0] * 3 + [0.0] * 6
    # Those that were trained on since were looked at then.
    assert all(0 < each < 0.8 for each in looked[9:12])
    for share, kept, cost in zip(looked, metrics["fraction_kept"], metrics["estimated_cost"], strict=True):
        assert cost == pytest.approx(share / 3 + kept)
    store = algorithm.selector.store.store
    assert (store.stamps >= 3).all()


def test_what_comes_from_the_store_is_what_the_current_output_layer_makes_of_stored_inputs():
    model, data = MLP.model(), MLP.data(N)
    algorithm = GradMatch(**ON, keep=0.3, refresh="9ep")
    seen = []

    def note(state):
        store = algorithm.selector.store
        if int(state.timestamp.batch) >= 3:
            seen.append((store.numbers.clone(), store.store.inputs[store.numbers].float(), model.module[-1]))
            weight, bias = model.module[-1].weight.detach(), model.module[-1].bias.detach()
            logits = (seen[-1][1] @ weight.T + bias).requires_grad_()
            targets = data.tensors[1][store.numbers]
            losses = F.cross_entropy(logits, targets, reduction="none")
            (grads,) = torch.autograd.grad(losses.sum(), logits)
            expected.append((losses.detach(), grads))

    expected, found = [], []
    look = algorithm.selector.source.look
    algorithm.selector.source.look = lambda state, n: found.append(look(state, n)) or found[-1]
    trainer_of(algorithm, model=model, data=data, others=[On(Event.BATCH_START, note)]).fit()
    assert len(expected) == 6
    for (losses, grads), candidates in zip(expected, found[3:], strict=True):
        torch.testing.assert_close(candidates.losses, losses)
        torch.testing.assert_close(candidates.output_grads, grads)


def test_candidates_can_be_asked_before_their_step_alone():
    kept = []
    algorithm = RandomBackprop(**ON, keep=0.3, refresh="3ep", suspects=True)
    store = algorithm.selector.store
    vars(store).update(look=lambda state, n: kept.append(type(store).look(store, state, n)) or kept[-1])

    def ask(state):
        if state.timestamp.epoch == 1:  # When they come from the store.
            _ = kept[-1].losses

    with pytest.raises(RuntimeError, match="before the step"):
        trainer_of(algorithm, others=[On(Event.BATCH_END, ask)], max_duration="3ep").fit()


def test_random_picks_are_measured_in_each_tenth_selection_only():
    algorithm = RandomBackprop(**ON, keep=0.3, refresh="2ep", suspects={"after": "1ep", "margin": 0.99})
    _, metrics = fitted(algorithm, max_duration="10ep")
    assert len(metrics["fraction_kept"]) == 30
    assert len(metrics["step_length"]) == 3


@pytest.mark.parametrize("others", [[], [SAM(rho=0.5, interval=1)]], ids=["sgd", "sam"])
def test_a_training_step_counts_as_a_look_at_its_picks(others):
    """The rows of H that are stored are those of the step's own forward pass, at the weights of that step."""
    model, data = MLP.model(), MLP.data(N)
    algorithm = GradMatch(**ON, keep=0.3, refresh="9ep")
    expected = {}

    def note(state):
        picks = algorithm.selector.store.numbers[algorithm.last_selection.indices]
        with torch.no_grad():
            rows = model.module[:-1](data.tensors[0][picks])
        expected.update(zip(picks.tolist(), rows, strict=True))

    others = [On(Event.BATCH_START, note), *others]
    trainer_of(algorithm, model=model, data=data, others=others, device_train_microbatch_size=4).fit()
    store = algorithm.selector.store.store
    assert len(expected) > 20
    for number, row in expected.items():
        torch.testing.assert_close(store.inputs[number].float(), row, rtol=2e-3, atol=2e-3)


def test_inputs_that_another_algorithm_mixes_are_no_look_at_their_samples():
    algorithm = RandomBackprop(**ON, keep=0.5, refresh="1000ba", suspects=True)
    model = CONV.model()
    trainer_of(algorithm, model=model, data=CONV.data(N), others=[MixUp(alpha=0.2)], max_duration="6ba").fit()
    assert (algorithm.selector.store.store.stamps <= 2).all()


def test_very_large_inputs_of_the_output_layer_are_kept_after_a_warning():
    model, algorithm = MLP.model(), GradMatch(**ON, keep=0.3, refresh="9ep")
    with torch.no_grad():
        model.module.insert(2, nn.Linear(16, 16))
        model.module[2].weight.mul_(1e6)
        model.module[3].weight.mul_(1e-6)
    with pytest.warns(UserWarning, match=r"above 65,504.*bfloat16") as warned:
        _, metrics = fitted(algorithm, model=model, lr=0.0)
    assert sum("65,504" in str(each.message) for each in warned) == 1
    assert metrics["fraction_looked_at"] == [1.0] * 3 + [0.0] * 6
    assert algorithm.batches_trained_whole == 0
    store = algorithm.selector.store.store
    expected = model.module[:3](MLP.data(N).tensors[0]).detach()
    assert expected.abs().max() > 65_504
    torch.testing.assert_close(store.inputs.float(), expected, rtol=2**-8, atol=0)


class OwnLoss(ComposerClassifier):
    """Its loss takes something else than its output layer's output."""

    def loss(self, outputs, batch, reduction="mean"):
        return F.cross_entropy(outputs * 2, batch[1], reduction=reduction)

    def forward(self, batch):
        return super().forward(batch) + batch[0][:, :5]


def test_where_the_loss_takes_something_else_what_was_seen_is_kept():
    torch.manual_seed(0)
    model = OwnLoss(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)), num_classes=5)
    algorithm = GradMatch(**ON, keep=0.3, refresh="9ep", output_layer="module.2")
    fitted(algorithm, model=model)
    store = algorithm.selector.store.store
    assert store.keeps_grads
    assert store.output_grads.abs().sum(1).gt(0).all()
    with pytest.raises(ValueError, match="suspects are told by"):
        fitted(GradMatch(**ON, refresh="9ep", output_layer="module.2", suspects=True), model=model)


class Behind(nn.Module):
    """Does something to its output layer's output."""

    def __init__(self, behind):
        super().__init__()
        self.body, self.head, self.behind = nn.Sequential(nn.Linear(12, 16), nn.Tanh()), nn.Linear(16, 5), behind

    def forward(self, inputs):
        return self.behind(self.head(self.body(inputs)))


def losses_that_were_seen(behind, *, suspects=False, refresh="9ep", compiled=False, before_batch=lambda state: None):
    """Trains a model that stands still; gives what each step's rule saw, and what the samples' losses were."""
    torch.manual_seed(0)
    model = ComposerClassifier(Behind(behind), num_classes=5)
    if compiled:
        model.module.compile(backend="eager")
    data = MLP.data(N)
    algorithm = GradMatch(**ON, keep=0.3, refresh=refresh, output_layer="module.head", suspects=suspects)
    look, seen = algorithm.selector.source.look, []

    def noting(state, num_samples):
        candidates, numbers = look(state, num_samples), algorithm.selector.store.numbers
        with torch.no_grad():
            outputs = model.module(data.tensors[0][numbers])
        seen.append((candidates.losses, F.cross_entropy(outputs, data.tensors[1][numbers], reduction="none")))
        return candidates

    algorithm.selector.source.look = noting
    others = [On(Event.BEFORE_DATALOADER, before_batch)]
    trainer_of(algorithm, model=model, data=data, others=others, max_duration="4ep", lr=0.0).fit()
    return seen, algorithm.selector.store.store


def test_what_hardly_changes_small_logits_is_seen_all_the_same():
    """As it grows they would be computed without it."""
    seen, store = losses_that_were_seen(lambda logits: 30 * torch.tanh(logits / 30))
    assert store.keeps_grads
    for found, expected in seen:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("suspects", [False, {"margin": 0.99}])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_a_model_begins_to_do_behind_its_output_layer_is_seen_in_the_step(in_place, suspects):
    scale = [1.0]

    def behind(logits):
        return logits.mul_(scale[0]) if in_place and scale[0] != 1 else logits * scale[0]

    def before_batch(state):
        scale[0] = 1.0 if int(state.timestamp.batch) < 4 else 3.0

    told = "begun to make something else.*all samples are looked at again"
    with pytest.warns(UserWarning, match=told + (".*Suspects are told" if suspects else "")):
        seen, store = losses_that_were_seen(behind, suspects=suspects, before_batch=before_batch)
    assert store.keeps_grads
    for step, (found, expected) in enumerate(seen):
        if step != 4:
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_what_a_compiled_model_begins_to_do_is_seen_in_the_next_look():
    scale = [1.0]

    def before_batch(state):
        scale[0] = 1.0 if int(state.timestamp.batch) < 4 else 3.0

    with pytest.warns(UserWarning, match="begun to make something else"):
        seen, store = losses_that_were_seen(
            lambda logits: logits * scale[0], refresh="2ep", compiled=True, before_batch=before_batch
        )
    assert store.keeps_grads
    for found, expected in seen[6:]:
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_an_output_layer_that_is_replaced_by_another_begins_a_new_store():
    model, algorithm = MLP.model(), GradMatch(**ON, keep=0.3, refresh="9ep")

    def replace(state):
        if int(state.timestamp.epoch) == 2:
            model.module[2] = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 5))

    with pytest.warns(UserWarning, match="not what is needed now"):
        _, metrics = fitted(algorithm, model=model, others=[On(Event.EPOCH_START, replace)], max_duration="4ep")
    assert metrics["fraction_looked_at"] == [1.0] * 3 + [0.0] * 3 + [1.0] * 3 + [0.0] * 3
    assert algorithm.selector.store.store.inputs.shape == (N, 8)


def test_time_that_is_put_back_makes_looks_none():
    algorithm, logger = LossBackprop(**ON, keep=0.1, refresh="2ep"), InMemoryLogger()
    trainer = trainer_of(algorithm, loggers=[logger], max_duration="6ep")
    trainer.fit()
    trainer.fit(duration="6ep", reset_time=True)
    looked = [value for _, value in logger.data["loss_backprop/fraction_looked_at"]]
    assert looked[18:24] == looked[:6] == [1.0] * 3 + [0.0] * 3


def noisy(n=200, wrong=20):
    """Separable data, of which the first labels are wrong."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(n) % 5
    inputs = 3 * F.one_hot(targets, 12).float() + 0.3 * torch.randn(n, 12, generator=generator)
    targets[:wrong] = (targets[:wrong] + 1) % 5
    return TensorDataset(inputs, targets)


@pytest.mark.parametrize("make", [GradMatch, LossBackprop, RandomBackprop, ImportanceBackprop])
def test_wrong_labels_are_suspected_and_left_out(make):
    algorithm = make(**ON, keep=0.3, refresh="3ep", suspects={"after": "3ep", "margin": 0.3})
    picked = []
    note = On(
        Event.BATCH_START,
        lambda s: (
            int(s.timestamp.epoch) >= 4
            and picked.append((algorithm.selector.store.numbers[algorithm.last_selection.indices], s.batch[1]))
        ),
    )
    data = noisy()
    _, metrics = fitted(algorithm, data=data, others=[note], max_duration="8ep", lr=0.3, batch_size=40)
    suspected = set(algorithm.selector.store.suspected().tolist())
    assert len(suspected & set(range(20))) >= 15
    assert len(suspected - set(range(20))) <= 3
    assert metrics["suspects"][0] == 0
    assert max(metrics["suspects"]) > 0
    numbers = torch.cat([each for each, _ in picked])
    assert (numbers < 20).float().mean() < 0.02
    for each, targets in picked:
        assert torch.equal(targets, data.tensors[1][each])


def test_suspects_are_left_out_of_the_mean_gradient_too():
    algorithm = GradMatch(**ON, keep=0.25, refresh="1ep", suspects={"after": "0ep", "margin": 0.05})
    model, data = MLP.model(), MLP.data(N)
    trainer_of(algorithm, model=model, data=data, max_duration="1ba", lr=0.0).fit()
    store, module = algorithm.selector.store, model.module
    probabilities = module(data.tensors[0]).softmax(1).detach()
    own = probabilities.gather(1, data.tensors[1][:, None])[:, 0]
    margins = probabilities.scatter(1, data.tensors[1][:, None], -1).amax(1) - own
    left = store.numbers[margins[store.numbers] <= 0.05]
    picks = store.numbers[algorithm.last_selection.indices]
    assert 5 <= len(left) < BATCH
    assert set(picks.tolist()) <= set(left.tolist())
    gradients = torch.from_numpy(classifier_gradients(module, MLP.layer, *data.tensors))
    mean = gradients[left].mean(0)
    step = (algorithm.last_selection.weights[:, None] * gradients[picks]).mean(0)
    residual = float((step - mean).square().sum() / mean.square().sum())
    assert float(algorithm.last_selection.metrics["matching_residual"]) == pytest.approx(residual, rel=1e-4)


def first_of_the_trusted(candidates, m):
    """Picks a single sample, as matching does that stops early."""
    return Picks(torch.tensor([0]))


def test_picks_are_filled_up_for_batch_normalisation_by_samples_that_are_not_suspected():
    rule, suspects = Rule(first_of_the_trusted, needs="losses", weighs=False), {"after": "0ep", "margin": 0.1}
    algorithm = RuleBackprop(rule, **ON, keep=0.1, refresh="1ep", suspects=suspects)
    seen = []

    def note(state):
        store = algorithm.selector.store
        seen.append((store.store.margins[store.numbers] > 0.1, algorithm.last_selection.indices))

    model, data = BATCHNORM.model(), BATCHNORM.data(N)
    trainer_of(algorithm, model=model, data=data, others=[On(Event.BATCH_START, note)], max_duration="1ep").fit()
    for suspected, indices in seen:
        assert indices.tolist() == (~suspected).nonzero().flatten()[:2].tolist()
    assert any(bool(suspected[:2].any()) for suspected, _ in seen), "else it would show nothing"


def test_keep_one_trains_on_all_but_the_suspects():
    algorithm = RandomBackprop(start=0.0, end=1.0, interrupt=0, keep=1.0, refresh="3ep", suspects={"after": "3ep"})
    _, metrics = fitted(algorithm, data=noisy(), max_duration="6ep", lr=0.3, batch_size=40)
    for kept, left_out in zip(metrics["fraction_kept"], metrics["suspects"], strict=True):
        assert kept == pytest.approx(1 - left_out / 40)
    assert max(metrics["suspects"]) > 0


def test_a_minibatch_with_too_few_left_is_trained_whole():
    algorithm = GradMatch(**ON, keep=0.6, refresh="5ep", suspects={"after": "1ep", "margin": -0.99})
    fitted(algorithm)
    assert algorithm.batches_trained_whole == 6


@pytest.mark.parametrize(
    "arguments",
    [{}, {"suspects": {"after": "1ep", "margin": 0.0}}, {"store_limit": 60 * 2 * 4 / 2**30}],
    ids=["plain", "suspects", "projected"],
)
@pytest.mark.parametrize("make", [GradMatch, LossBackprop])
def test_a_run_resumed_in_mid_epoch_is_the_uninterrupted_one(make, arguments, tmp_path):
    if make is LossBackprop and "store_limit" in arguments:
        return

    def run(**kwargs):
        return fitted(make(**ON, keep=0.3, refresh="2ep", **arguments), max_duration="4ep", run_name="r", **kwargs)

    whole, _ = run()
    run(save_folder=str(tmp_path), save_interval="1ba")
    resumed, _ = run(load_path=str(next(tmp_path.glob("ep1-ba5-*.pt"))))
    assert_equal(whole, resumed)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    fitted(GradMatch(**ON, refresh="2ep"), save_folder=str(tmp_path), max_duration="1ep")
    with pytest.raises(ValueError, match="store of 60 samples, but the training data have 80"):
        fitted(GradMatch(**ON, refresh="2ep"), data=MLP.data(80), load_path=str(next(tmp_path.glob("ep1-*.pt"))))


#: Half of the width of H.
HALF = 60 * 2 * 8 / 2**30
JUDGED = {"margin": 0.99}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (partial(LossBackprop, refresh="5ep"), partial(LossBackprop, refresh="5ep", suspects=JUDGED)),
        (partial(RuleBackprop, "top_loss", refresh="5ep"), partial(RuleBackprop, "grand", refresh="5ep")),
        (partial(GradMatch, refresh="5ep"), partial(GradMatch, refresh="5ep", store_limit=HALF)),
        (partial(GradMatch, refresh="5ep", store_limit=HALF), partial(GradMatch, refresh="5ep")),
        (partial(GradMatch, refresh="30ba"), partial(GradMatch, refresh="5ep")),
    ],
    ids=["suspects", "rule", "projected", "whole", "unit"],
)
def test_a_checkpoint_that_keeps_something_else_is_begun_anew(before, after, tmp_path):
    fitted(before(**ON, keep=0.3), save_folder=str(tmp_path), max_duration="2ep")
    with pytest.warns(UserWarning, match="not what is needed now"):
        _, metrics = fitted(after(**ON, keep=0.3), max_duration="4ep", load_path=str(next(tmp_path.glob("ep2-*.pt"))))
    assert metrics["fraction_looked_at"] == [1.0] * 3 + [0.0] * 3


def test_a_checkpoint_that_keeps_more_is_taken(tmp_path):
    fitted(LossBackprop(**ON, keep=0.3, refresh="5ep", suspects=JUDGED), save_folder=str(tmp_path), max_duration="2ep")
    after = LossBackprop(**ON, keep=0.3, refresh="5ep")
    _, metrics = fitted(after, max_duration="4ep", load_path=str(next(tmp_path.glob("ep2-*.pt"))))
    assert metrics["fraction_looked_at"] == [0.0] * 6


def test_a_store_that_is_too_large_for_a_checkpoint_says_so(monkeypatch):
    monkeypatch.setattr("composer_gradmatch.candidates.store_of_run.CHECKPOINT_LIMIT", 100)
    algorithm = GradMatch(**ON, refresh="2ep")
    with pytest.warns(UserWarning, match=r"bytes of each of 60 samples.*looks at all samples again"):
        fitted(algorithm)
    assert algorithm.state_dict()["store"] == {}


def test_numbers_are_gone_before_others_see_the_batch_also_where_nothing_is_selected():
    lengths = []
    note = On(Event.BATCH_START, lambda state: lengths.append(len(state.batch)))
    fitted(GradMatch(start=0.5, end=1.0, keep=0.3, interrupt=2, refresh="2ep", clock="batch"), others=[note])
    assert lengths == [2] * 9


def test_a_second_fit_on_other_data_begins_a_new_store():
    algorithm = GradMatch(**ON, keep=0.3, refresh="5ep")
    trainer = trainer_of(algorithm)
    trainer.fit()
    data = number_samples(MLP.data(40))
    loader = DataLoader(data, BATCH, collate_fn=data.collate_fn)
    with pytest.warns(UserWarning, match="not those of the last fit"):
        trainer.fit(train_dataloader=loader, duration="1ep")
    assert algorithm.selector.store.store.size == 40


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_few_rows_of_a_look_are_filled_up_for_batch_normalisation(device):
    algorithm = GradMatch(**ON, keep=0.1, refresh="2ep", store_device=device)
    _, metrics = fitted(algorithm, model=BATCHNORM.model(), data=BATCHNORM.data(80), batch_size=40, max_duration="6ep")
    assert set(metrics["fraction_looked_at"]) <= {0.0, *[n / 40 for n in range(32, 41)]}
    assert 0.8 in metrics["fraction_looked_at"]


@pytest.mark.parametrize(("ghost", "microbatch", "keep"), [(60, None, 0.7), (16, 20, 0.6)])
def test_few_rows_of_a_look_are_filled_up_for_ghost_batch_normalisation(ghost, microbatch, keep):
    """The second one's would be 41 rows in microbatches of 13 and 14, say."""
    algorithm = GradMatch(**ON, keep=keep, refresh="2ep")
    model, data = BATCHNORM.model(), BATCHNORM.data(300)
    arguments = {"batch_size": 100, "others": [GhostBatchNorm(ghost)], "device_train_microbatch_size": microbatch}
    _, metrics = fitted(algorithm, model=model, data=data, max_duration="12ep", **arguments)
    assert any(0 < each < 1 for each in metrics["fraction_looked_at"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"refresh": "soon"}, "a time such as '5ep'"),
        ({"refresh": "0ep"}, "whole number of epochs"),
        ({"refresh": "9tok"}, "whole number of epochs"),
        ({"suspects": True}, "give refresh, too"),
        ({"sample_id_key": "id"}, "give refresh, too"),
        ({"refresh": "2ep", "store_device": "disk"}, "store_device"),
        ({"refresh": "2ep", "store_limit": 0}, "store_limit"),
        ({"refresh": "2ep", "reuse_activations": True}, "leave one of them out"),
    ],
)
def test_what_a_store_cannot_do_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        GradMatch(**arguments)


def test_random_picks_need_no_store_but_for_suspects():
    with pytest.raises(ValueError, match="with suspects only"):
        RandomBackprop(refresh="2ep")


def test_data_without_numbers_are_refused_before_the_first_batch():
    with pytest.raises(ValueError, match="number_samples"):
        fitted(GradMatch(**ON, refresh="2ep"), numbered=False)


def test_layers_at_positions_are_refused_and_losses_are_not():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 5)

        def forward(self, inputs):
            return self.head(inputs.view(-1, 3, 4)).transpose(1, 2)

    def model():
        torch.manual_seed(0)
        return ComposerClassifier(Tagger(), num_classes=5, loss_fn=F.cross_entropy)

    data = TensorDataset(torch.randn(N, 12), torch.randint(5, (N, 3)))
    arguments = {"model": model(), "data": data, "max_duration": "4ba"}
    with pytest.raises(ValueError, match="runs at positions"):
        fitted(GradMatch(**ON, keep=0.3, refresh="2ep"), **arguments)
    _, metrics = fitted(LossBackprop(**ON, keep=0.3, refresh="2ep"), **arguments)
    assert metrics["fraction_looked_at"] == [1, 1, 1, 0]


@pytest.mark.parametrize("case", [CLASSIFICATION, REGRESSION, MULTI_LABEL], ids=lambda case: case.name)
def test_texts_are_stored_by_the_inputs_of_their_classifier(case):
    algorithm = GradMatch(**ON, keep=0.5, refresh="9ep", suspects=case is CLASSIFICATION)
    model, data = case.model(), case.data(24)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    look, found = algorithm.selector.source.look, []
    algorithm.selector.source.look = lambda state, n: found.append((look(state, n), state.batch)) or found[-1][0]
    trainer_of(algorithm, model=model, data=data, batch_size=12, max_duration="4ba", lr=0.0).fit()
    assert not algorithm.selector.store.store.keeps_grads
    for candidates, batch in found[2:]:
        with torch.no_grad():
            losses = huggingface_losses(model, model(dict(batch)), batch)
        losses = losses.flatten(1).sum(1) if losses.dim() > 1 else losses
        torch.testing.assert_close(candidates.losses, losses, rtol=1e-2, atol=1e-3)
        assert candidates.output_grads.abs().sum(1).gt(0).all()


def test_suspects_ask_for_classes():
    with pytest.raises(ValueError, match="target_key"):
        fitted(
            GradMatch(**ON, refresh="2ep", suspects=True),
            model=REGRESSION.model(),
            data=REGRESSION.data(24),
            batch_size=12,
        )


class CountedFromOne(ComposerClassifier):
    """Takes labels from 1 on."""

    def loss(self, outputs, batch, reduction="mean"):
        return F.cross_entropy(outputs, batch[1] - 1, reduction=reduction)

    def get_metrics(self, is_train):
        return {}


def counted_from_one():
    torch.manual_seed(0)
    return CountedFromOne(_mlp(), num_classes=5)


def shifted(data):
    inputs, targets = data.tensors
    return TensorDataset(inputs, targets + 1)


@pytest.mark.parametrize("make", [GradMatch, RandomBackprop])
def test_labels_that_are_not_their_outputs_places_are_refused_for_suspects(make):
    with pytest.raises(ValueError, match=r"of label \d, that of output \d .*labels from 1 to 5, 5 outputs.*target_key"):
        fitted(make(**ON, refresh="2ep", suspects=True), model=counted_from_one(), data=shifted(noisy()))


def test_a_getter_makes_them_that():
    algorithms = []
    for data, model, target_key in (
        (noisy(), MLP.model(), 1),
        (shifted(noisy()), counted_from_one(), (lambda batch: batch[1] - 1, lambda batch, value: batch)),
    ):
        suspects = {"after": "2ep", "margin": 0.3}
        algorithm = RandomBackprop(**ON, keep=0.5, refresh="3ep", suspects=suspects, target_key=target_key)
        fitted(algorithm, model=model, data=data, lr=0.3, batch_size=40, max_duration="4ep")
        algorithms.append(algorithm)
    one, other = (each.selector.store.suspected().tolist() for each in algorithms)
    assert one == other
    assert len(one) > 10


def test_samples_that_the_loss_ignores_are_never_suspected():
    data = noisy()
    data.tensors[1][:10] = -100
    algorithm = GradMatch(**ON, keep=0.3, refresh="3ep", suspects={"after": "3ep", "margin": 0.3})
    torch.manual_seed(0)
    accuracy = MulticlassAccuracy(5, ignore_index=-100, average="micro")
    model = ComposerClassifier(_mlp(), num_classes=5, train_metrics=accuracy, val_metrics=accuracy)
    fitted(algorithm, model=model, data=data, max_duration="8ep", lr=0.3, batch_size=40)
    suspected = set(algorithm.selector.store.suspected().tolist())
    assert not suspected & set(range(10))
    assert len(suspected & set(range(10, 20))) >= 7
    assert algorithm.selector.store.store.margins[:10].isnan().all()


def test_suspects_ask_for_an_output_of_each_class():
    def loss(outputs, targets, reduction="mean"):
        return F.binary_cross_entropy_with_logits(outputs[:, 0], (targets > 2).float(), reduction=reduction)

    torch.manual_seed(0)
    model = ComposerClassifier(
        nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 1)), num_classes=5, loss_fn=loss
    )
    with pytest.raises(ValueError, match="one output"):
        fitted(GradMatch(**ON, refresh="2ep", suspects=True), model=model)
