"""The callback that draws a minibatch's picks: which samples, when, where to, and what it does if it cannot."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CONV, MLP, ON, loader, make_trainer, record_selections
from composer.loggers import LoggerDestination
from matplotlib.image import imread
from on_device import OnDevice

from composer_gradmatch import GradMatch, LossBackprop, RandomBackprop, RuleBackprop, SelectionImages, select_first
from composer_gradmatch.algorithms import selection_images
from composer_gradmatch.algorithms.selection_figure import Drawn, draw_selection
from composer_gradmatch.train import train
from composer_gradmatch.train.config import ConfigError, load_config

DIGITS = Path(__file__).parents[2] / "configs/digits.yaml"
M = 20


class Images(LoggerDestination):
    """A logger that takes images."""

    def __init__(self):
        self.images = []

    def log_images(self, images, name="Images", channels_last=False, step=None, *_, **__):
        assert channels_last
        self.images.append((name, step, images))


@pytest.fixture
def figures(monkeypatch):
    """What was drawn, instead of drawings: the samples and the title of each figure."""
    seen = []

    def draw(drawn, title):
        seen.append((drawn, title))
        return np.zeros((2, 3, 3), np.uint8)

    monkeypatch.setattr(selection_images, "draw_selection", draw)
    return seen


def fit(algorithm, callback, data=None, case=CONV, **kwargs):
    train = loader(case.data(60) if data is None else data, M)
    arguments = {"algorithm_passes": [select_first], "max_duration": "2ep", "lr": 0.05, **kwargs}
    trainer = make_trainer(case.model(), train, [algorithm], callbacks=[callback], **arguments)
    trainer.fit()
    return trainer


def same(sample, image):
    """Whether what was drawn is a sample of the case."""
    return np.array_equal(sample, image[0].numpy())


@pytest.mark.parametrize("algorithm_class", [GradMatch, OnDevice, LossBackprop, RandomBackprop])
def test_all_samples_are_drawn_the_picks_with_their_weights_first(algorithm_class, figures, tmp_path):
    algorithm = algorithm_class(**ON, keep=0.3)
    selections = record_selections(algorithm)
    fit(algorithm, SelectionImages(folder=str(tmp_path)))
    assert len(figures) == 2
    for (drawn, title), step, epoch in zip(figures, (0, 3), (1, 2), strict=True):
        (inputs, labels), picks = selections[step]
        weights = [1.0] * len(picks.indices) if picks.weights is None else picks.weights.tolist()
        expected = sorted(zip(weights, picks.indices.tolist(), strict=True), key=lambda each: -each[0])
        expected = [(weight, i) for weight, i in expected if weight]
        left_out = sorted(set(range(M)) - {i for _, i in expected})
        assert [each.weight for each in drawn] == [*(weight for weight, _ in expected), *([None] * len(left_out))]
        for each, i in zip(drawn, [*(i for _, i in expected), *left_out], strict=True):
            assert same(each.sample, inputs[i])
            assert each.label == str(int(labels[i]))
        name = algorithm.log_name
        assert title == f"{name}, epoch {epoch}, step {step + 1}: {len(expected)} of {M} samples picked"
    assert algorithm.minibatch is None, "nothing is kept behind a step"


@pytest.mark.parametrize(("most", "picks", "others"), [(8, 4, 4), (12, 6, 6), (15, 6, 9), (1, 1, 0)])
def test_at_most_so_many_are_drawn_half_of_them_picks(most, picks, others, figures, tmp_path):
    fit(GradMatch(**ON, keep=0.3), SelectionImages("2ep", most, str(tmp_path)))
    ((drawn, title),) = figures
    weights = [each.weight for each in drawn]
    assert [weight is not None for weight in weights] == [True] * picks + [False] * others
    assert all(one >= other for one, other in pairwise(weights[:picks]))
    assert title.endswith(f"\nshown: {picks} picks, the largest weights first, and {others} that are left out")


@pytest.mark.parametrize(
    ("interval", "steps"),
    [("1ep", [1, 4, 7, 10]), ("2ep", [1, 7]), ("5ba", [1, 6, 11]), ("0.5dur", [1, 7]), ("100sp", [1, 6, 11])],
)
def test_when_it_draws(interval, steps, figures, tmp_path):
    fit(RandomBackprop(**ON, keep=0.3), SelectionImages(interval, folder=str(tmp_path)), max_duration="4ep")
    assert [int(title.split("step ")[1].split(":")[0]) for _, title in figures] == steps
    assert {path.name for path in tmp_path.iterdir()} == {f"ep{(step + 2) // 3}-ba{step}.png" for step in steps}


def test_it_waits_for_a_minibatch_that_is_selected_from(figures, tmp_path):
    algorithm = RandomBackprop(start=0.5, end=1.0, interrupt=0, keep=0.3, clock="batch")
    fit(algorithm, SelectionImages(folder=str(tmp_path)), max_duration="3ep")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["ep2-ba6.png", "ep3-ba7.png"]


def test_a_resumed_run_draws_what_is_missing(figures, tmp_path):
    saved = {"save_folder": str(tmp_path), "run_name": "drawn", "save_interval": "1ba"}
    fit(GradMatch(**ON, keep=0.3), SelectionImages(), max_duration="4ba", **saved)
    folder = tmp_path / "selection_images"
    assert {path.name for path in folder.iterdir()} == {"ep1-ba1.png", "ep2-ba4.png"}
    (folder / "mine.png").touch()
    checkpoint = str(tmp_path / "ep0-ba2-rank0.pt")
    fit(
        GradMatch(**ON, keep=0.3),
        SelectionImages(),
        max_duration="3ba",
        load_path=checkpoint,
        **saved | {"save_overwrite": True},
    )
    assert len(figures) == 2, "the first epoch's is there"
    assert {path.name for path in folder.iterdir()} == {"ep1-ba1.png", "mine.png"}, "the second epoch is not yet there"


def test_loggers_of_images_get_what_is_written(tmp_path):
    logger = Images()
    fit(GradMatch(**ON, keep=0.3), SelectionImages(folder=str(tmp_path)), loggers=[logger])
    assert [(name, step) for name, step, _ in logger.images] == [("gradmatch/selection", 0), ("gradmatch/selection", 3)]
    for (_, _, image), path in zip(logger.images, ["ep1-ba1.png", "ep2-ba4.png"], strict=True):
        assert image.dtype == np.uint8
        np.testing.assert_array_equal((imread(tmp_path / path)[..., :3] * 255).round().astype(np.uint8), image)
    alone = Images()
    fit(GradMatch(**ON, keep=0.3), SelectionImages(), loggers=[alone])
    assert len(alone.images) == 2, "no folder is needed"


PICKED = np.array([0x01, 0x73, 0xB2])


def framed(figure):
    return (figure == PICKED).all(-1)


def test_picks_are_framed_and_others_are_not():
    images = [np.random.default_rng(0).random(shape) for shape in [(8, 8), (8, 8, 3), (4, 12), (30, 5)]]
    images[0][0, 0], images[0][1, 1] = np.nan, np.inf
    figure = draw_selection([Drawn(each, "7", 1.5 if i % 2 else None) for i, each in enumerate(images)], "title")
    quarters = np.array_split(framed(figure), 4, axis=1)
    assert [quarter.sum() > 300 for quarter in quarters] == [False, True, False, True]
    assert [quarter.any() for quarter in quarters] == [False, True, False, True]
    texts = [Drawn(text, "", weight) for text, weight in [("one $x$ of 日本", 0.5), ("two " * 200, None), ("", 2.0)]]
    figure = draw_selection(texts, "first\nsecond")
    rows = framed(figure).any(1).nonzero()[0]
    boxes = np.split(rows, np.flatnonzero(np.diff(rows) > 2) + 1)
    assert len(boxes) == 2
    assert boxes[1][0] - boxes[0][-1] > len(boxes[0]) / 2, "between them is the second text"


def test_equal_images_of_one_value_are_drawn():
    assert draw_selection([Drawn(np.full((3, 3), np.nan), "", None), Drawn(np.zeros((3, 3, 3)), "", 1.0)], "").any()


class Spelling:
    """A tokenizer of one's own."""

    def decode(self, numbers):
        return " ".join(f"t{number}" for number in numbers)


def test_token_numbers_are_drawn_as_text_by_a_tokenizer(figures, tmp_path):
    from text_cases import CLASSIFICATION

    data = CLASSIFICATION.data(60)
    callback = SelectionImages(folder=str(tmp_path), tokenizer=Spelling())
    fit(GradMatch(**ON, keep=0.3), callback, data, CLASSIFICATION, max_duration="1ba")
    ((drawn, _),) = figures
    texts = {" ".join(f"t{i}" for i in row.tolist() if i >= 0) for row in data.batch["input_ids"][:M]}
    assert {each.sample for each in drawn} == texts


def test_what_cannot_be_drawn_is_warned_of_once_and_trained_on(figures, tmp_path):
    with pytest.warns(UserWarning, match=r"could not be drawn: .*neither images nor texts: found 0 float32") as caught:
        trainer = fit(GradMatch(**ON, keep=0.3), SelectionImages(folder=str(tmp_path)), case=MLP)
    assert len([each for each in caught if "drawn" in str(each.message)]) == 1
    assert int(trainer.state.timestamp.batch) == 6
    assert not figures
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_or_a_logger_that_fails_ends_no_run(figures, tmp_path):
    class Failing(LoggerDestination):
        def log_images(self, *args, **kwargs):
            raise RuntimeError("no connection")

    with pytest.warns(UserWarning, match="could not be drawn: no connection"):
        fit(GradMatch(**ON, keep=0.3), SelectionImages(), loggers=[Failing()])


def test_targets_that_are_no_classes_and_picks_of_weight_zero(figures, tmp_path):
    def weightless(candidates, m):
        return torch.arange(m), torch.tensor([0.0] + [m / (m - 1)] * (m - 1))

    fit(RuleBackprop(weightless, **ON, keep=0.3), SelectionImages("2ep", folder=str(tmp_path)))
    ((drawn, title),) = figures
    assert "5 of 20" in title
    assert sum(each.weight is not None for each in drawn) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": "soon"}, "interval must be a time such as '1ep'.*got 'soon'"),
        ({"interval": "0ep"}, "interval must be longer than nothing"),
        ({"interval": None}, "interval must be a time"),
        ({"num_samples": 0}, "num_samples must be a positive integer.*got 0"),
        ({"num_samples": True}, "num_samples must be a positive integer.*got True"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelectionImages(**arguments)


def test_what_it_cannot_do_without_is_told(monkeypatch):
    with pytest.raises(TypeError, match=r"tokenizer must have a method decode.*got 'bert'"):
        SelectionImages(tokenizer="bert")
    with pytest.raises(ValueError, match=r"selection_images found no algorithm.*leave selection_images out"):
        make_trainer(CONV.model(), loader(CONV.data(20), 20), [], callbacks=[SelectionImages(folder="x")]).fit()
    with pytest.raises(ValueError, match=r"selection_images writes into the run's folder.*save_folder.*folder="):
        fit(GradMatch(**ON, keep=0.3), SelectionImages())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"selection_images draws by matplotlib: pip install 'composer-gradmatch\["):
        SelectionImages()


def test_from_yaml(tmp_path):
    overrides = ["max_duration=1ba", "progress_bar=false", "eval_loader=null", f"save_folder={tmp_path}/run"]
    train(load_config(DIGITS, [*overrides, "callbacks.selection_images={num_samples: 8}"]))
    assert imread(tmp_path / "run/selection_images/ep1-ba1.png").ndim == 3
    wrong = load_config(DIGITS, [*overrides, "callbacks.selection_images={interval: soon}"])
    with pytest.raises(ConfigError, match=r"callbacks\.selection_images\.interval: expected a time"):
        train(wrong)
