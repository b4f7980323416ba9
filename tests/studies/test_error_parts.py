"""What errors are made of: against plain loops, made-up errors of known parts, and rules whose bias is known."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from composer.models import ComposerClassifier
from made_up_results import add, line
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.cost import break_even, step_cost
from composer_gradmatch.rules.table import RULES
from composer_gradmatch.studies.gradient_error import parts_figure
from composer_gradmatch.studies.gradient_error.decompose import Draws, random_minibatches
from composer_gradmatch.studies.gradient_error.looks import pays_with
from composer_gradmatch.studies.gradient_error.parts import ErrorParts
from composer_gradmatch.studies.gradient_error.plan import plan_gradient_error
from composer_gradmatch.studies.gradient_error.samples import SampleGradients
from composer_gradmatch.studies.gradient_error.task import gradient_error_run
from composer_gradmatch.studies.gradient_error.weights import trained
from composer_gradmatch.studies.report import write_report
from composer_gradmatch.train.config import ConfigError, load_config

DIGITS = Path(__file__).resolve().parents[2] / "configs" / "digits.yaml"
M, P = 8, 6
PARTS = ("bias", "over_minibatches", "over_draws")


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def groups(last=2):
    in_last = torch.arange(P) >= P - last
    return {"all": torch.ones(P, dtype=torch.bool), "last layer": in_last, "below": ~in_last}


def made_up(minibatches, draws, seed, bias=0.5, of_minibatches=0.3, of_draws=0.8):
    """Minibatches (gradients, coefficients) whose steps err by a constant and by noise of two kinds."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(minibatches):
        gradients = normal(generator, M, P) + 1
        errors = bias + of_minibatches * normal(generator, P) + of_draws * normal(generator, draws, P)
        steps = gradients.mean(0) + errors
        yield gradients, (steps @ torch.linalg.pinv(gradients))[None]  # P < M: any step is some combination.


def by_plain_loops(minibatches, mask, m):
    """The same numbers by pairs of steps, none of them by itself."""
    errors, spreads, means, randoms, products, norms = [], [], [], [], [], []
    for gradients, (coefficients,) in minibatches:
        g = gradients[:, mask]
        target = g.mean(0)
        steps = [sum(a * row for a, row in zip(each, g, strict=True)) for each in coefficients]
        e = [step - target for step in steps]
        errors.append(sum(each @ each for each in e) / len(e))
        mean = sum(e) / len(e)
        spreads.append(sum((each - mean) @ (each - mean) for each in e) / (len(e) - 1))
        means.append(mean)
        variance = sum((row - target) @ (row - target) for row in g) / (len(g) - 1)
        randoms.append(variance * (1 / m - 1 / len(g)))
        products.append(sum(step @ target for step in steps) / len(steps))
        norms.append(target @ target)
    pairs = list(combinations(means, 2))
    n = len(means)
    bias = sum(a @ b for a, b in pairs) / len(pairs)
    error, spread, random = sum(errors) / n, sum(spreads) / n, sum(randoms) / n
    values = {"relative_error": error, "bias": bias, "over_draws": spread, "over_minibatches": error - spread - bias}
    found = {name: float(value / random) for name, value in values.items()}
    return {**found, "step_length": float(sum(products) / sum(norms)), "random_squared_error": float(random)}


def test_parts_and_their_standard_errors_are_those_of_plain_loops():
    minibatches = list(made_up(5, 3, seed=0))
    parts = ErrorParts(groups(), [3], len(minibatches))
    for each in minibatches:
        parts.see(*each)
    (rows,) = parts.rows()
    assert [row["parameters"] for row in rows] == ["all", "last layer", "below"]
    for row, mask in zip(rows, groups().values(), strict=True):
        expected = by_plain_loops(minibatches, mask, 3)
        assert {name: row[name] for name in expected} == pytest.approx(expected)
        left_out = [by_plain_loops(minibatches[:k] + minibatches[k + 1 :], mask, 3) for k in range(5)]
        for name in (*PARTS, "relative_error", "step_length"):
            values = torch.tensor([each[name] for each in left_out])
            assert row[f"{name}_se"] == pytest.approx(math.sqrt(4 / 5 * float((values - values.mean()).square().sum())))
    absolute = [row["relative_error"] * row["random_squared_error"] for row in rows]
    assert absolute[0] == pytest.approx(absolute[1] + absolute[2])


def test_known_parts_are_found_and_standard_errors_say_how_well():
    true = {"bias": 0.25 * P, "over_minibatches": 0.09 * P, "over_draws": 0.64 * P}
    found, told = [], []
    for seed in range(60):
        parts = ErrorParts({"all": groups()["all"]}, [3], 20)
        for each in made_up(20, 4, seed):
            parts.see(*each)
        ((row,),) = parts.rows()
        found.append([row[name] * row["random_squared_error"] for name in PARTS])
        told.append([row[f"{name}_se"] * row["random_squared_error"] for name in PARTS])
    found, told = torch.tensor(found), torch.tensor(told)
    spread = found.std(0)
    assert ((found.mean(0) - torch.tensor(list(true.values()))).abs() < 4 * spread / math.sqrt(60)).all()
    assert ((told.mean(0) / spread - 1).abs() < 0.5).all()


def test_errors_that_average_out_have_no_bias():
    found = []
    for seed in range(60):
        parts = ErrorParts({"all": groups()["all"]}, [3], 10)
        for each in made_up(10, 2, seed, bias=0.0):
            parts.see(*each)
        found.append(parts.rows()[0][0]["bias"])
    found = torch.tensor(found)
    assert found.min() < 0 < found.max()
    assert found.mean().abs() < 4 * found.std() / math.sqrt(len(found))


@pytest.mark.parametrize(("name", "r"), [("random_backprop", 1.0), ("importance_backprop", None), ("stratified", None)])
def test_rules_without_bias_show_none_and_random_picks_an_error_of_one(name, r):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    rule = RULES[name].with_options({"switch": "always"} if name == "importance_backprop" else {})
    variant = Draws(name, 0.25, rule, 4)
    parts = ErrorParts({"all": torch.ones(12, dtype=torch.bool)}, [4], 300)
    for _ in range(300):
        gradients = normal(generator, 16, 12) * torch.rand(16, 1, generator=generator).double() + 0.5
        labels = torch.randint(3, (16,), generator=generator)
        candidates = Candidates(16, gram=gradients @ gradients.T, labels=labels)
        parts.see(gradients, variant.coefficients(candidates, 6)[None])
    ((row,),) = parts.rows()
    for part in ("bias", "over_minibatches"):
        assert abs(row[part]) < 4 * row[f"{part}_se"]
        assert row[f"{part}_se"] < 0.05
    assert abs(row["step_length"] - 1) < 4 * row["step_length_se"]
    if r is not None:
        assert abs(row["relative_error"] - r) < 4 * row["relative_error_se"]


def test_a_rule_that_always_picks_the_same_has_bias_and_no_variance_over_draws():
    gradients = normal(torch.Generator().manual_seed(0), 16, 12)
    candidates = Candidates(16, losses=torch.arange(16.0), gram=gradients @ gradients.T)
    drawn = Draws("top_loss", 0.25, RULES["top_loss"], 4).coefficients(candidates, 3)
    assert drawn.tolist() == [[0.0] * 12 + [0.25] * 4] * 3
    parts = ErrorParts({"all": torch.ones(12, dtype=torch.bool)}, [4], 2)
    for _ in range(2):
        parts.see(gradients, drawn[None])
    ((row,),) = parts.rows()
    error = (gradients[12:].mean(0) - gradients.mean(0)).square().sum()
    assert row["bias"] * row["random_squared_error"] == pytest.approx(float(error))
    assert [row["over_minibatches"], row["over_draws"]] == pytest.approx([0, 0], abs=1e-9)


def test_a_minibatch_that_is_trained_whole_has_no_error():
    candidates = Candidates(4, gram=torch.zeros(4, 4, dtype=torch.float64))
    drawn = Draws("gradmatch", 0.5, RULES["gradmatch"], 2).coefficients(candidates, 2)
    assert drawn.tolist() == [[0.25] * 4] * 2


def test_too_little_to_tell_bias_by_is_refused():
    with pytest.raises(ValueError, match="two minibatches or more, got 1"):
        ErrorParts(groups(), [3], 1)
    parts = ErrorParts(groups(), [3], 2)
    gradients, coefficients = next(made_up(1, 2, seed=0))
    with pytest.raises(ValueError, match="two draws or more"):
        parts.see(gradients, coefficients[:, :1])
    parts.see(gradients, coefficients)
    with pytest.raises(ValueError, match="minibatches of 8 samples; got 2 of 7"):
        parts.see(gradients[:7], coefficients[:, :, :7])


def small_model():
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.ReLU(), nn.Linear(7, 3)]
    return ComposerClassifier(nn.Sequential(*layers), num_classes=3)


def small_batch(size=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator)


def test_gradients_of_samples_are_those_of_torch_func():
    model, (inputs, labels) = small_model(), small_batch()
    samples = SampleGradients(model, (inputs, labels))
    parameters = dict(model.module.named_parameters())

    def loss(values, x, y):
        return F.cross_entropy(functional_call(model.module, values, (x[None],)), y[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))({k: p.detach() for k, p in parameters.items()}, inputs, labels)
    expected = torch.cat([found[name].flatten(1) for name in parameters], 1)
    gradients = samples.gradients((inputs, labels))
    assert torch.allclose(gradients.float(), expected, atol=1e-6)
    assert samples.in_last_layer.nonzero().flatten().tolist() == list(
        range(gradients.shape[1] - 24, gradients.shape[1])
    )
    candidates = samples.candidates((inputs, labels))
    last = gradients[:, samples.in_last_layer]
    assert torch.allclose(candidates.gram, last @ last.T, atol=1e-6)
    assert candidates.labels.tolist() == labels.tolist()
    assert torch.allclose(candidates.losses, F.cross_entropy(model.module(inputs), labels, reduction="none"))
    with pytest.raises(ValueError, match="gone"):
        SampleGradients(model, (inputs, labels), output_layer="gone")


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def test_samples_that_depend_on_one_another_are_refused():
    model = small_model()
    model.module.insert(0, Centred())
    with pytest.raises(ValueError, match=r"Samples depend on one another.*--against data"):
        SampleGradients(model, small_batch())


def test_minibatches_are_drawn_independently_by_their_seed():
    data = TensorDataset(torch.arange(10))
    drawn = [next(random_minibatches(DataLoader(data), 6, seed))[0].tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    minibatches = random_minibatches(DataLoader(data), 6, 0)
    seen = [next(minibatches)[0].tolist() for _ in range(50)]
    assert all(len(set(each)) == 6 for each in seen)
    assert len({tuple(sorted(each)) for each in seen}) > 25
    with pytest.raises(ValueError, match="10 samples, fewer than a minibatch of 11"):
        next(random_minibatches(DataLoader(data), 11, 0))


def config(*overrides):
    return load_config(DIGITS, ["progress_bar=false", "max_duration=2ep", "save_folder=null", *overrides])


def test_a_strategys_rule_has_the_configs_options_and_its_own():
    base = config("algorithms.gradmatch.ridge=0.5", "algorithms.gradmatch.weights=normalized")
    assert Draws.build(base, "gradmatch_matched", 0.1, 128).rule.function.keywords == {
        "ridge": 0.5,
        "weights": "matched",
    }
    assert Draws.build(base, "gradmatch", 0.1, 128).rule.function.keywords == {"ridge": 0.5, "weights": "normalized"}
    assert [Draws.build(base, "random", keep, 128).picks for keep in (0.001, 0.1, 0.3)] == [1, 12, 38]


def test_importance_sampling_is_drawn_from_where_it_looks():
    base = config("algorithms.gradmatch=false", "algorithms.importance_backprop={score: loss}")
    variant = Draws.build(base, "importance_backprop", 0.25, 16)
    gradients = normal(torch.Generator().manual_seed(0), 16, 12)  # Of like norms, so that looking would not pay.
    candidates = Candidates(16, losses=torch.arange(16.0) + 1, gram=gradients @ gradients.T)
    drawn = variant.coefficients(candidates, 40)
    assert (drawn > 0).sum(1).tolist() == [4] * 40
    weights = (drawn * (torch.arange(16) + 1.0).sqrt()).masked_select(drawn > 0)  # a ∝ 1/√ℓ.
    assert torch.allclose(weights, weights[0].expand(160))


PLAN = {"seeds": 1, "minibatches": 3, "draws": 2, "mode": "train", "checkpoint": ""}


def test_a_study_at_the_start_and_after_an_epoch(store):
    strategies = ["random", "gradmatch_matched", "full"]
    plan = plan_gradient_error(config(), strategies, [0.1], after=[0, 1], **PLAN)
    assert [(run.settings["after"], run.settings["against"]) for run in plan.runs] == [
        (after, against) for after in (0, 1) for against in ("data", "minibatch")
    ]
    norms = {}
    for run in plan.runs:
        rows, _ = gradient_error_run(run)
        add(store, run.kind, run.settings, *rows)
        if run.settings["against"] == "data":
            norms[run.settings["after"]] = rows[0]["squared_error"] / rows[0]["relative_error"]
            continue
        assert [(row["strategy"], row["parameters"]) for row in rows] == [
            (strategy, group) for strategy in strategies[:2] for group in ("all", "last layer", "below")
        ]
        assert {(row["picks"], row["batch_size"]) for row in rows} == {(12, 128)}
        for row in rows:
            assert sum(row[part] for part in PARTS) == pytest.approx(row["relative_error"])
        matched = rows[3]
        assert matched["over_draws"] == pytest.approx(0, abs=1e-9)
        assert matched["relative_error"] < 0.5 < rows[0]["relative_error"] < 1.6
    assert norms[0] != pytest.approx(norms[1])
    text = write_report(store, "gradient-error", "made up").read_text()
    assert "## Error of the whole gradient, after 1 epoch" in text
    assert len([row for row in text.splitlines() if row.startswith("| 0.1 | gradmatch_matched | ")]) == 3
    figures = ("gradient_error", "gradient_error_after_1ep", "error_parts")
    assert all((store.folder / f"{figure}.png").stat().st_size > 10_000 for figure in figures)


def test_an_epoch_of_a_longer_training_is_made_at_its_own_learning_rates():
    base = {**config(), "loggers": {}}
    trainer = trained(base, 1)
    trainer.close()
    (group,) = trainer.state.optimizers[0].param_groups
    assert (int(trainer.state.timestamp.epoch), int(trainer.state.timestamp.batch)) == (1, 11)
    # A cosine over two epochs is at half its height after one.
    assert group["lr"] == pytest.approx(0.025, rel=0.15)
    assert trainer.state.algorithms == []
    with pytest.raises(ValueError, match="training was over after 2 epochs"):
        trained(base, 3)


@pytest.mark.parametrize(
    ("overrides", "strategies", "options", "expected"),
    [
        ([], ["random"], {"after": [0, 3]}, "3 epochs are more than max_duration=2ep"),
        ([], ["full"], {}, "no rule among the strategies"),
        ([], ["random"], {"minibatches": 1}, "Raise --minibatches and --draws"),
        ([], ["random"], {"draws": 1}, "Raise --minibatches and --draws"),
        ([], ["random", "selective_backprop"], {}, "selective_backprop is no rule of this package"),
        (["global_train_batch_size=1"], ["random"], {}, "Raise global_train_batch_size"),
        (["model.width=1024"], ["random"], {}, r"take \d+\.\d GiB.*use --against data"),
    ],
)
def test_errors_that_cannot_be_split_are_told_before_any_work(overrides, strategies, options, expected):
    options = {**PLAN, **options}
    with pytest.raises(ConfigError, match=expected):
        plan_gradient_error(config(*overrides), strategies, [0.1], against=["minibatch"], **options)
    if "after" not in options:
        runs = plan_gradient_error(config(*overrides), strategies, [0.1], **options).runs
        kinds = {run.settings["against"] for run in runs}
        assert kinds == ({"data", "minibatch"} if "selective_backprop" in strategies else {"data"})


def made_up_row(strategy, keep, group, bias, of_minibatches, of_draws):
    picks = {0.1: 12, 0.3: 38}[keep]
    row = {"strategy": strategy, "keep": keep, "picks": picks, "batch_size": 128, "parameters": group}
    values = {"bias": bias, "over_minibatches": of_minibatches, "over_draws": of_draws, "step_length": 1.2}
    values["relative_error"] = bias + of_minibatches + of_draws
    return row | values | {f"{name}_se": 0.01 for name in values}


def test_tables_and_the_figure_tell_parts_and_the_look_that_pays(store, monkeypatch):
    drawn = {}
    monkeypatch.setattr(parts_figure, "save", lambda figure, path: drawn.setdefault(path.name, figure))
    made = {"gradmatch": (0.1, 0.1, 0.0), "random": (-0.02, 0.02, 1.0), "top_loss": (3.0, 1.0, 0.0)}
    for seed, more in enumerate((0.0, 0.02)):
        rows = [
            made_up_row(strategy, keep, group, bias + more, between, draws)
            for strategy, (bias, between, draws) in made.items()
            for keep in (0.1, 0.3)
            for group in ("all", "last layer")
        ]
        settings = {"seed": seed, "against": "minibatch", "after": 5, "minibatches": 9, "draws": 4}
        add(store, "gradient-error", settings, *rows)
    text = write_report(store, "gradient-error", "made up").read_text()
    assert "| 0.1 | gradmatch | 0.21 ± 0.007 = 0.11 + 0.10 + 0 | 1.20 | a store |" in text
    assert "| 0.3 | gradmatch | 0.21 ± 0.007 = 0.11 + 0.10 + 0 | 1.20 | two passes |" in text
    assert "| 0.1 | top_loss | 4.01 ± 0.007 = 3.01 + 1.00 + 0 | 1.20 | – |" in text
    assert "### Below the last layer" not in text
    assert line(text, "| 0.3 | 0.25 |").endswith("| 0.37 | 0.91 |")
    panels = drawn["error_parts"].axes
    assert [axes.get_title() for axes in panels] == ["keep 0.1, after 5 epochs", "keep 0.3, after 5 epochs"]
    ends = [bar.get_x() + bar.get_width() for bar in panels[0].patches]
    assert ends == pytest.approx([0.11, 0.21, 0.21, 0.0, 0.01, 1.01, 3.01, 4.01, 4.01])
    share = 12 / 128
    limits = [break_even(cost, share) for cost in (step_cost(2, share), step_cost(1, share), share + 0.02)]
    assert [each.get_xdata()[0] for each in panels[0].lines] == pytest.approx([*limits, 1.0])
    assert "4.0" in [each.get_text() for each in panels[0].texts]


def test_what_looks_at_nothing_is_held_against_one():
    assert pays_with("stratified", 0.3, 0.9, 0.01) == "no look"
    assert pays_with("stratified", 0.3, 0.99, 0.01) == "–"
    assert pays_with("loss", 0.3, 0.3, 0.03) == "one pass"
    assert pays_with("loss", 0.3, 0.3, 0.04) == "a store"
    assert pays_with("random", 0.3, 0.5, 0.01) == ""
