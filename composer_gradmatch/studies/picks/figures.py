"""Figures of who was picked: samples, classes, wrong labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from sklearn.metrics import roc_curve

from composer_gradmatch.studies.figures import save, start
from composer_gradmatch.studies.picks.samples import SCORES, find_wrong
from composer_gradmatch.studies.tables import Table

__all__ = ["Shown", "draw_classes", "draw_images", "draw_texts", "draw_wrong"]

RIGHT, WRONG = "#0173b2", "#d55e00"
_COLUMNS = 8
#: More classes than that do not fit beside each other.
_MOST_CLASSES = 30

#: What is said of a sample, and whether its label is wrong.
Shown = tuple[str, bool]


def draw_images(images: Sequence[np.ndarray], shown: Sequence[Shown], path: Path, title: str) -> None:
    """Draws images, each stretched to the range of its values.

    Args:
        images (Sequence[np.ndarray]): Each of shape (H, W) or (H, W, 3).
        shown (Sequence[Shown]): What stands above each.
        path (Path): Without a suffix.
        title (str): Above all.
    """
    figure, grid = start(-(-len(images) // _COLUMNS), min(_COLUMNS, len(images)), width=1.25, height=1.8)
    panels = [axes for row in grid for axes in row]
    for axes in panels:
        axes.axis("off")
    for axes, image, (text, wrong) in zip(panels, images, shown, strict=False):
        low, high = float(image.min()), float(image.max())
        axes.imshow((image - low) / (high - low or 1.0), cmap="gray", vmin=0, vmax=1)
        axes.set_title(text, fontsize=8, color=WRONG if wrong else "black")
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def draw_texts(texts: Sequence[str], shown: Sequence[Shown], path: Path, title: str) -> None:
    """Draws the beginnings of texts, a line each: see :func:`draw_images`."""
    figure, ((axes,),) = start(1, 1, width=11, height=0.6 + 0.26 * len(texts))
    axes.axis("off")
    for line, (text, (said, wrong)) in enumerate(zip(texts, shown, strict=True)):
        color = WRONG if wrong else "black"
        # A dollar sign would begin a formula.
        said, text = (each.replace("\n", "  ").replace("$", r"\$") for each in (said, shorten(text, 120)))
        axes.text(0.0, -line, said, fontsize=8, color=color, va="center")
        axes.text(0.17, -line, text, fontsize=8, color=color, va="center")
    axes.set(xlim=(0, 1), ylim=(-len(texts) + 0.5, 0.5), title=title)
    axes.title.set_fontsize(10)
    save(figure, path)


def draw_classes(samples: Table, names: Sequence[str], path: Path, title: str) -> None:
    """Draws how the share of visits in which a sample was picked is distributed in each class.

    Args:
        samples (pd.DataFrame): As :func:`.per_sample` gives it, with ``label``.
        names (Sequence[str]): Of the classes.
        path (Path): Without a suffix.
        title (str): Above it.
    """
    means = samples.groupby("label")["share"].mean().sort_values()
    classes = sorted(means.index)
    if len(classes) > _MOST_CLASSES:
        half = _MOST_CLASSES // 2
        classes = [*means.index[:half], *means.index[-half:]]
        title = f"{title}: the {half} least and the {half} most picked of {len(means)} classes"
    figure, ((left, right),) = start(1, 2, width=max(4.0, 0.32 * len(classes) + 1.5), height=4.2)
    kept = samples[samples["label"].isin(classes)]
    sns.boxplot(kept, x="label", y="share", order=classes, color=RIGHT, fill=False, fliersize=2, ax=left)
    left.axhline(samples["share"].mean(), color="#404040", linestyle="--", linewidth=1)
    left.set(xlabel="class", ylabel="times picked / times in a minibatch", title="its samples (dashed: mean of all)")
    of_samples = samples["label"].value_counts(normalize=True)
    of_picks = samples.groupby("label")["picked"].sum() / samples["picked"].sum()
    ratio = (of_picks / of_samples).reindex(classes)
    right.bar(range(len(classes)), ratio, color=RIGHT)
    right.axhline(1.0, color="#404040", linestyle="--", linewidth=1)
    right.set(xlabel="class", ylabel="share of picks / share of samples", title="above 1: picked more than others")
    labels = [names[int(label)] for label in classes]
    for axes in (left, right):
        axes.set_xticks(range(len(classes)), labels=labels, rotation=90 if len(classes) > 10 else 0)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def draw_wrong(samples: Table, wrong: np.ndarray, path: Path, title: str) -> None:
    """Draws ROC curves of scores that should find wrong labels, and where these lie among the others.

    Args:
        samples (pd.DataFrame): As :func:`.per_sample` gives it.
        wrong (np.ndarray): Whether each label is wrong, boolean, shape (N,).
        path (Path): Without a suffix.
        title (str): Above it.
    """
    figure, ((left, right),) = start(1, 2, width=4.8, height=4.2)
    styles = (("#de8f05", "--"), ("#029e73", ":"), (RIGHT, "-"))
    for (column, label), (color, line) in zip(SCORES.items(), styles, strict=True):
        false, true, _ = roc_curve(wrong, samples[column].fillna(0.0))
        area = find_wrong(samples[column], wrong).area
        left.plot(false, true, color=color, linestyle=line, label=f"{label} (area {area:.3f})")
    left.plot([0, 1], [0, 1], color="#949494", linewidth=1)
    left.set(xlabel="right labels called wrong", ylabel="wrong labels found", title="ROC curves")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), fontsize=8)
    _scatter(right, samples, wrong)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def _scatter(axes: Axes, samples: Table, wrong: np.ndarray) -> None:
    # Shares are few different numbers.
    jitter = np.random.default_rng(0).uniform(-0.01, 0.01, len(samples))
    for of_kind, color, label in ((~wrong, RIGHT, "right label"), (wrong, WRONG, "wrong label")):
        shown: pd.DataFrame = samples[of_kind]
        where = shown["share"] + jitter[of_kind]
        axes.scatter(where, shown["loss"], s=6, alpha=0.4, color=color, linewidth=0, label=label)
    if bool((samples["loss"].dropna() > 0).all()):
        axes.set_yscale("log")
    axes.set(xlabel="times picked / times in a minibatch", ylabel="loss, mean of the epochs", title="samples")
    axes.legend(fontsize=8, markerscale=2)
