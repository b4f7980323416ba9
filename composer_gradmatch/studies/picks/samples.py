"""A row for each sample over all epochs, and scores that should find wrong labels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from composer_gradmatch.studies.tables import Table

__all__ = ["SCORES", "Found", "find_wrong", "per_sample"]

#: Column → what a high value of it says, for legends and tables.
SCORES = {
    "loss_score": "high loss",
    "rarely_score": "rarely picked",
    "both_score": "high loss, rarely picked",
}


def per_sample(log: Table) -> Table:
    """Sums a log up over its epochs.

    Args:
        log (pd.DataFrame): A row for each epoch and sample.

    Returns:
        pd.DataFrame: Index: the sample's number. ``visits`` and ``picked`` in all; ``share``, picked/visits, NaN if it
        was never in a minibatch; ``mean_weight`` over its picks; the means over epochs of ``loss`` and
        ``gradient_norm``; and three scores in (0, 1], by ranks: ``loss_score`` is large for a large loss,
        ``rarely_score`` for a small share, ``both_score`` is their mean.
    """
    log = log.assign(weight=log["mean_weight"].fillna(0.0) * log["picked"])
    grouped = log.groupby("sample")
    table = grouped[["visits", "picked", "weight"]].sum()
    table["share"] = table["picked"] / table["visits"].replace(0, np.nan)
    table["mean_weight"] = table.pop("weight") / table["picked"].replace(0, np.nan)
    table[["loss", "gradient_norm"]] = grouped[["loss", "gradient_norm"]].mean()
    table["loss_score"] = table["loss"].rank(pct=True)
    table["rarely_score"] = (-table["share"]).rank(pct=True)
    table["both_score"] = (table["loss_score"] + table["rarely_score"]) / 2
    return table


class Found(NamedTuple):
    """How well a score finds wrong labels.

    Attributes:
        area (float): Under the ROC curve: the probability that a wrong label has a higher score than a right one.
        precision (float): The share of wrong ones among as many samples of the highest scores as there are wrong ones.
    """

    area: float
    precision: float


def find_wrong(scores: pd.Series, wrong: np.ndarray) -> Found:
    """Tells how well a score finds wrong labels; samples without a score come last.

    Args:
        scores (pd.Series): By sample.
        wrong (np.ndarray): Whether each label is wrong, boolean; some are and some are not.
    """
    values = scores.fillna(0.0).to_numpy()
    number = int(wrong.sum())
    # Of equal scores at the border, the share that a random choice of them would find.
    border = np.sort(values)[-number]
    above, at = values > border, values == border
    found = wrong[above].sum() + wrong[at].sum() / at.sum() * (number - above.sum())
    return Found(float(roc_auc_score(wrong, values)), float(found / number))
