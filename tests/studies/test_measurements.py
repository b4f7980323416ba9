"""Gradient errors and step times against plain PyTorch, training runs against their settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from composer.core import Event

from composer_gradmatch.candidates.stored import StoredLooks
from composer_gradmatch.data import NoisyLabels, digits
from composer_gradmatch.rules import gradient_matching
from composer_gradmatch.spans import SpanRecorder, span
from composer_gradmatch.studies.accuracy.plan import plan_accuracy
from composer_gradmatch.studies.configs import quiet, with_synthetic_data
from composer_gradmatch.studies.gradient_error.measure import GradientErrors, gradient_error
from composer_gradmatch.studies.gradient_error.plan import plan_gradient_error
from composer_gradmatch.studies.interleave import Variant, fit_interleaved
from composer_gradmatch.studies.learning_rate.plan import plan_learning_rate
from composer_gradmatch.studies.registry import STUDIES
from composer_gradmatch.studies.step_time.plan import plan_step_time
from composer_gradmatch.studies.step_time.report import cost_of_shares
from composer_gradmatch.studies.step_time.task import time_steps
from composer_gradmatch.studies.step_time.timer import PARTS, step_time
from composer_gradmatch.studies.strategies import STRATEGIES, strategy_entry, with_strategy
from composer_gradmatch.studies.tasks import do_run
from composer_gradmatch.train.config import ConfigError, load_config

DIGITS = Path(__file__).resolve().parents[2] / "configs" / "digits.yaml"


def config(*overrides):
    return load_config(DIGITS, ["progress_bar=false", "max_duration=1ep", "save_folder=null", *overrides])


class Spy(GradientErrors):
    """Keeps what each variant's gradient was made of."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def apply(self, event, state, logger):
        if event == Event.AFTER_TRAIN_BATCH and self._measuring:
            picks = getattr(self.current.algorithm, "last_selection", None)  # Composer's own has none.
            weights = None if picks is None else picks.weights
            gradient = torch.cat([p.grad.flatten() for p in state.model.parameters()])
            self.seen.append((self.current, state.batch, weights, gradient.clone()))
        super().apply(event, state, logger)


def explicit_gradient(model, inputs, labels, weights=None):
    """(1/n)Σwᵢ∇ℓᵢ by plain autograd in float64."""
    model.zero_grad()
    losses = F.cross_entropy(model.module(inputs.double()), labels, reduction="none")
    (losses.mean() if weights is None else (weights.double() * losses).mean()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_gradient_errors_are_those_of_explicit_gradients():
    base = {**config(), "loggers": {}, "seed": 1}
    pairs = [("full", 1.0), ("gradmatch", 0.1), ("random", 0.1), ("loss", 0.1), ("selective_backprop", 0.1)]
    errors = Spy([Variant.build(base, *pair, 128) for pair in pairs], base, 2, "eval")
    base["train_loader"] = {**base["train_loader"], "drop_last": False}
    model = fit_interleaved(base, errors, 128, 10**6).state.model.double().eval()
    full = explicit_gradient(model, *digits("train").tensors)
    last = slice(-650, None)  # The output layer's 64 x 10 weights and 10 biases are the last parameters.
    assert errors.samples == 1437
    assert len(errors.rows) == len(errors.seen) == 2 * len(pairs)
    minibatches = [batch for variant, batch, _, _ in errors.seen if variant.strategy == "full"]
    assert not torch.equal(minibatches[0][0], minibatches[1][0])
    for i, (row, (variant, batch, weights, gradient)) in enumerate(zip(errors.rows, errors.seen, strict=True)):
        whole = minibatches[i // len(pairs)]
        expected = explicit_gradient(model, *batch, weights)
        assert torch.allclose(gradient.double(), expected, atol=1e-6)
        assert row["squared_error"] == pytest.approx(float((expected - full).square().sum()), rel=1e-4)
        assert row["last_layer_squared_error"] == pytest.approx(
            float((expected[last] - full[last]).square().sum()), rel=1e-4
        )
        assert row["cosine"] == pytest.approx(float(F.cosine_similarity(expected, full, dim=0)), abs=1e-5)
        assert row["relative_error"] == pytest.approx(row["squared_error"] / float(full.square().sum()), rel=1e-4)
        to_minibatch = (expected - explicit_gradient(model, *whole)).square().sum()
        assert row["minibatch_squared_error"] == pytest.approx(float(to_minibatch), rel=1e-3, abs=1e-9)
        assert (weights is not None) == (variant.strategy == "gradmatch")
        held = {image.numpy().tobytes() for image in whole[0]}
        assert {image.numpy().tobytes() for image in batch[0]} <= held
        assert row["samples_kept"] == len(batch[0]) == (128 if variant.strategy == "full" else len(batch[0]))
        assert row["samples_kept"] <= (128 if variant.strategy == "full" else 12)


def test_the_first_epoch_of_a_minibatch_as_large_as_the_data_has_no_error():
    whole = config("global_train_batch_size=1437")
    options = {"minibatches": 2, "mode": "train", "checkpoint": "", "against": ["data"]}
    (run,) = plan_gradient_error(whole, ["random"], [0.5], seeds=1, **options).runs
    rows, details = gradient_error(run)
    assert details == {"samples": 1437}
    assert [row["strategy"] for row in rows] == ["full", "random"] * 2
    for row in rows:
        assert (row["relative_error"] < 1e-6) == (row["strategy"] == "full")


def test_gradient_errors_at_a_checkpoint(tmp_path):
    from composer_gradmatch.train import train

    trained = train(config(f"save_folder={tmp_path}", "algorithms.gradmatch=false", "max_duration=5ep"))
    options = {"minibatches": 1, "mode": "eval", "against": ["data"]}
    at = {}
    for checkpoint in ("", str(tmp_path / "latest-rank0.pt")):
        (run,) = plan_gradient_error(config(), ["random"], [0.1], seeds=1, checkpoint=checkpoint, **options).runs
        at[checkpoint] = gradient_error(run)[0][0]
    trained.state.model.double().eval()
    full = explicit_gradient(trained.state.model, *digits("train").tensors)
    row = at[str(tmp_path / "latest-rank0.pt")]
    assert row["squared_error"] / row["relative_error"] == pytest.approx(float(full.square().sum()), rel=1e-3)
    assert row["relative_error"] != at[""]["relative_error"]


def test_step_times_have_every_variant_in_every_round_and_parts_that_add_up():
    strategies = ["full", "random", "selective_backprop", "loss", "gradmatch"]
    (run,) = plan_step_time(config(), strategies, [0.1], rounds=2, synthetic=False).runs
    rows, _ = step_time(run)
    steps = [row for row in rows if row["measured"] == "step"]
    assert sorted((row["strategy"], row["round"]) for row in steps) == sorted(
        (strategy, r) for strategy in strategies for r in (0, 1)
    )
    assert {row["ratio"] for row in rows if row["strategy"] == "full"} == {1.0}
    assert {row["strategy"]: row["estimated_cost"] for row in rows} == pytest.approx(
        {"full": 1, "random": 0.1, "loss": 0.1 + 1 / 3, "gradmatch": 0.1 + 1 / 3, "selective_backprop": 0.1 + 1 / 3}
    )
    assert all(row["samples_kept"] == 12 for row in rows if row["strategy"] in ("random", "loss", "selective_backprop"))
    for row in (row for row in rows if row["measured"] == "parts"):
        parts = {part: row[f"{part}_seconds"] for part in PARTS}
        assert sum(parts.values()) == pytest.approx(row["seconds"])
        assert min(parts.values()) >= 0
        used = {part for part in PARTS[:5] if parts[part] > 0}
        own = {"gradmatch": set(PARTS[:5]), "loss": {"selection_forward", "indexing"}, "random": {"indexing"}}
        assert used == own.get(row["strategy"], set())


@pytest.mark.filterwarnings("ignore:.*steps on the picks are too long")
def test_steps_with_stored_looks_are_timed_over_a_whole_period():
    short = config("train_loader.dataset={split: train}", "max_duration=1ep")
    strategies = ["full", "gradmatch", "gradmatch_stored", "loss_stored"]
    steps, stored = plan_step_time(short, strategies, [0.1], rounds=1, synthetic=False).runs
    assert "stored" not in steps.settings["variants"]
    rows, _ = time_steps(stored)
    batches = 11
    assert {row["measured"] for row in rows} == {"period"}
    of = {
        name: [row for row in rows if row["strategy"] == name] for name in ("full", "gradmatch_stored", "loss_stored")
    }
    assert sum(map(len, of.values())) == len(rows)
    assert all([row["round"] for row in each] == list(range(5 * batches)) for each in of.values())
    assert {row["samples_kept"] for row in of["full"]} == {128}
    assert {row["samples_kept"] for row in of["loss_stored"]} == {12}
    assert {row["ratio"] for row in of["full"]} == {1.0}


@pytest.mark.filterwarnings("ignore:.*steps on the picks are too long")
def test_each_sample_is_looked_at_about_once_in_a_period(monkeypatch):
    looked = []
    look = StoredLooks.look

    def counted(self, state, num_samples):
        candidates = look(self, state, num_samples)
        looked.append((int(state.timestamp.epoch), self._looked_at))
        return candidates

    monkeypatch.setattr(StoredLooks, "look", counted)
    (_, run) = plan_step_time(config(), ["full", "gradmatch_stored"], [0.1], rounds=1, synthetic=False).runs
    time_steps(run)
    by_epoch = {epoch: sum(count for e, count in looked if e == epoch) for epoch in range(6)}
    assert by_epoch[0] == 11 * 128
    # Those that drop_last has left out before; a look is filled up to 32 rows, since the model has BatchNorm.
    assert all(by_epoch[epoch] <= 11 * 32 for epoch in (1, 2, 3, 4))
    # Those that were trained on in the meantime were seen then.
    assert 0.4 * 11 * 128 < by_epoch[5] < 11 * 128


@pytest.mark.parametrize(
    ("strategy", "cost", "model"),
    [
        ("full", 1.0, 1.0),
        ("random", 0.38, 0.2),
        ("gradmatch", 0.68, 0.2 + 1 / 3),
        ("loss", 0.68, 0.2 + 1 / 3),
        ("selective_backprop", 0.68, 0.2 + 1 / 3),
        ("gradmatch_reuse", 0.62, 0.2 + 0.8 / 3),
        ("loss_reuse", 0.62, 0.2 + 0.8 / 3),
    ],
)
def test_the_cost_of_a_strategy_follows_from_the_shares_of_a_full_step(strategy, cost, model):
    keep = 1.0 if strategy == "full" else 0.2
    assert cost_of_shares(STRATEGIES[strategy], keep, 0.3, 0.475, 0.225) == pytest.approx(cost)
    assert STRATEGIES[strategy].cost(keep) == pytest.approx(model)


def test_synthetic_data_have_the_data_sets_shape():
    assert with_synthetic_data(config())["train_loader"]["dataset"] == {
        "input_shape": [1, 8, 8],
        "num_classes": 10,
        "num_samples": 1024,
    }
    with pytest.raises(ConfigError, match="the shape of the data set 'mine' is not known"):
        with_synthetic_data({**config(), "train_loader": {"name": "mine"}})


def test_scaled_batches_are_timed_for_a_sample():
    plan = plan_accuracy(config(), ["random", "full"], [0.25], seeds=1, batch_size="scaled", rounds=1)
    (timing,), runs = plan.alone, plan.runs
    assert [run.config["global_train_batch_size"] for run in runs] == [512, 128]
    assert runs[0].config["device_train_microbatch_size"] == 128
    rows, _ = step_time(timing)
    random = [row for row in rows if row["strategy"] == "random"]
    assert {row["samples_kept"] for row in random} == {128}
    full = {row["round"]: row["seconds"] for row in rows if row["strategy"] == "full"}
    assert all(row["ratio"] == pytest.approx(row["seconds"] / 4 / full[row["round"]]) for row in random)
    ((row,), _) = do_run(STUDIES["accuracy"].task, runs[0])
    assert (row["steps"], row["samples_forwarded"], row["samples_backpropagated"]) == (2, 1024, 256)


def test_a_strategy_that_does_not_select_is_not_timed(monkeypatch):
    monkeypatch.setattr(gradient_matching, "match_mean_gradient", lambda *args, **kwargs: None)
    (run,) = plan_step_time(config(), ["gradmatch"], [0.1], rounds=1, synthetic=False).runs
    with pytest.raises(RuntimeError, match="gradmatch trained a batch whole"):
        step_time(run)


def test_strategies_share_the_configs_schedule_and_keep_their_own_arguments():
    base = config(
        "algorithms.gradmatch={start: 0.25, end: 0.75, interrupt: 3, scale_factor: 0.5, solver: sklearn}",
        "algorithms.label_smoothing={}",
    )
    assert strategy_entry(base, "gradmatch", 0.1)["gradmatch"]["solver"] == "sklearn"
    for strategy, name in (("random", "random_backprop"), ("loss", "loss_backprop"), ("selective_backprop",) * 2):
        algorithms = with_strategy(base, strategy, 0.1)["algorithms"]
        assert set(algorithms) == {name, "label_smoothing"}
        shared = {"start": 0.25, "end": 0.75, "interrupt": 3, "keep": 0.1}
        assert algorithms[name] == shared | ({} if strategy == "random" else {"scale_factor": 0.5})
    assert set(with_strategy(base, "full", 1.0)["algorithms"]) == {"label_smoothing"}
    without = strategy_entry(config("algorithms=null"), "loss", 0.2)
    assert without == {"loss_backprop": {"start": 0.0, "end": 1.0, "interrupt": 0, "keep": 0.2}}


def test_a_smaller_factor_trains_longer_with_a_smaller_learning_rate():
    base = config("max_duration=2ep")
    base["scheduler"] = {"name": "multistep", "milestones": ["1ep"], "gamma": 0.1}
    runs = plan_learning_rate(base, ["random"], [0.1], seeds=1, factors=[0.5, 2.0]).runs
    assert [run.config["optimizer"]["lr"] for run in runs] == [0.025, 0.1]
    rows = [do_run(STUDIES["learning-rate"].task, run)[0][0] for run in runs]
    assert [row["evaluations"] for row in rows] == [4, 1]
    assert [row["samples_forwarded"] for row in rows] == [4 * 1408, 1408]


def test_noisy_runs_are_noisy_by_their_seed_alone(tmp_path):
    runs = plan_accuracy(config(), ["gradmatch", "random"], [0.1, 0.3], seeds=2, label_noise=0.1).runs
    noise = {run.settings["seed"]: set() for run in runs}
    for run in runs:
        arguments = run.config["train_loader"]["label_noise"]
        noise[run.settings["seed"]].add(tuple(NoisyLabels(digits("train"), **arguments).noisy_indices))
    assert [len(found) for found in noise.values()] == [1, 1]
    assert noise[0] != noise[1]
    assert "label_noise" not in runs[0].config["eval_loader"]


def test_spans_add_up_only_while_somebody_records():
    recorder = SpanRecorder(lambda: None)
    with span("a"):
        pass
    assert recorder.seconds == {}
    with recorder.recording():
        for _ in range(2):
            with span("a"):
                pass
        with pytest.raises(KeyError), span("b"):
            raise KeyError
    assert set(recorder.seconds) == {"a", "b"}
    with span("c"):
        pass
    assert "c" not in recorder.seconds


def test_callbacks_that_write_into_a_runs_folder_are_left_out():
    given = config("callbacks.selection_images={}", "callbacks.selection_log={folder: x}")
    assert quiet(given, "run")["callbacks"].keys() == {"speed_monitor"}
    assert given["callbacks"].keys() == {"speed_monitor", "selection_images", "selection_log"}
    assert "callbacks" not in quiet({key: value for key, value in given.items() if key != "callbacks"}, "run")
