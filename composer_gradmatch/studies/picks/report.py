"""The report on who was picked: figures, a table of all samples, a summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from composer_gradmatch.studies.picks.figures import Shown, draw_classes, draw_images, draw_texts, draw_wrong
from composer_gradmatch.studies.picks.run_folder import PickedFrom, read_run
from composer_gradmatch.studies.picks.samples import SCORES, find_wrong, per_sample
from composer_gradmatch.studies.store import write_atomically
from composer_gradmatch.studies.tables import Table, markdown
from composer_gradmatch.train.config import ConfigError

__all__ = ["report_picks"]


def report_picks(folder: Path, out: Path, count: int) -> str:
    """Writes ``samples.csv``, the highest losses first, ``summary.md`` and the figures.

    Args:
        folder (Path): Of a run with a selection log.
        out (Path): Where to write.
        count (int): How many samples to draw of the most and of the least picked.

    Returns:
        str: The summary.

    Raises:
        ConfigError: If the run has no log, or one without a pick.
    """
    run = read_run(folder)
    samples = per_sample(run.log)
    if not samples["picked"].sum():
        raise ConfigError("no sample was picked in the logged epochs.")
    if run.labels is not None:
        samples["label"] = run.labels
    if run.true_labels is not None:
        samples["true_label"] = run.true_labels
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "samples.csv", samples.sort_values("loss", ascending=False, kind="stable").to_csv())
    lines = [*_overview(run, samples), *_extremes(run, samples, out, count), *_by_class(run, samples, out)]
    lines += _wrong(run, samples, out)
    summary = "\n".join(lines)
    write_atomically(out / "summary.md", summary + "\n")
    return summary


def _title(run: PickedFrom) -> str:
    epochs = run.log["epoch"]
    return f"{run.name}: {run.strategy}; epochs {epochs.min()} to {epochs.max()}"


def _overview(run: PickedFrom, samples: Table) -> list[str]:
    seen = samples[samples["visits"] > 0]
    lines = [
        f"# Who was picked in {run.name}",
        "",
        f"{_title(run)}; {len(samples):,} samples.",
        "",
        f"- {len(seen):,} samples were in a minibatch; of these {int((seen['picked'] == 0).sum()):,} were never picked "
        f"and {int((seen['picked'] == seen['visits']).sum()):,} always.",
    ]
    top = seen["picked"].sort_values(ascending=False)
    tenth = max(1, len(top) // 10)
    lines.append(f"- The tenth that was picked most often makes {top[:tenth].sum() / top.sum():.0%} of all picks.")
    lines += ["- Epochs trained whole count: in them all samples are picked, with weight one.", ""]
    return lines


def _names(dataset: Any, labels: np.ndarray) -> list[str]:
    names = getattr(dataset, "classes", None)
    if isinstance(names, list | tuple) and len(names) > labels.max():
        return list(map(str, names))
    return [str(label) for label in range(int(labels.max()) + 1)]


def _extremes(run: PickedFrom, samples: Table, out: Path, count: int) -> list[str]:
    """Draws the most and the least picked samples; of equally often picked ones, those of the highest loss."""
    seen = samples[samples["visits"] > 0].sort_values("loss", ascending=False, kind="stable")
    for kind, ascending in (("most", False), ("least", True)):
        chosen = seen.sort_values("share", ascending=ascending, kind="stable").head(count)
        shown = [_said(run, row) for row in chosen.itertuples()]
        title = f"{kind} picked (label, times picked/in a minibatch; of equals the highest losses)\n{_title(run)}"
        numbers = [int(number) for number in chosen.index]
        if hasattr(run.dataset, "texts"):
            draw_texts(run.dataset.texts(numbers), shown, out / f"{kind}_picked", title)
        elif (images := _images(run.dataset, numbers)) is not None:
            draw_images(images, shown, out / f"{kind}_picked", title)
        else:
            return ["Samples are neither images nor texts of this package, so they are not drawn.", ""]
    return ["Samples: `most_picked.png` and `least_picked.png`; all of them: `samples.csv`.", ""]


def _said(run: PickedFrom, row: Any) -> Shown:
    counts = f"{row.picked}/{row.visits}"
    if run.labels is None:
        return f"#{row.Index}\n{counts}", False
    names = _names(run.dataset, run.labels if run.true_labels is None else np.append(run.labels, run.true_labels))
    if run.true_labels is not None and row.true_label != row.label:
        return f"{names[row.label]} (is {names[row.true_label]})\n{counts}", True
    return f"{names[row.label]}\n{counts}", False


def _images(dataset: Any, numbers: list[int]) -> list[np.ndarray] | None:
    """Gives samples as images with the channels last, as they were trained on; None if they are none."""
    images = []
    for number in numbers:
        sample = dataset[number]
        image = sample[0] if isinstance(sample, tuple | list) else None
        if not isinstance(image, torch.Tensor) or image.dim() != 3 or len(image) not in (1, 3):
            return None
        images.append(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())
    return images


def _by_class(run: PickedFrom, samples: Table, out: Path) -> list[str]:
    if run.labels is None:
        return ["The data set's targets are no classes, so there is no distribution by class.", ""]
    names = _names(run.dataset, run.labels)
    draw_classes(samples, names, out / "classes", f"picks by class\n{_title(run)}")
    rows = [
        (names[int(label)], len(of_class), f"{of_class['share'].mean():.2f}", int((of_class["picked"] == 0).sum()))
        for label, of_class in samples.groupby("label")
    ]
    rows.sort(key=lambda row: -float(row[2]))
    lines = ["## By class", "", "The label that was trained on; figure: `classes.png`.", ""]
    return [*lines, *markdown(("class", "samples", "mean share of visits picked", "never picked"), rows)]


def _wrong(run: PickedFrom, samples: Table, out: Path) -> list[str]:
    if run.labels is None or run.true_labels is None:
        return ["No label noise was injected, so that it is not known which labels are wrong.", ""]
    wrong = run.labels != run.true_labels
    if not wrong.any() or wrong.all():
        return [f"{int(wrong.sum())} labels are wrong: there is nothing to tell apart.", ""]
    draw_wrong(samples, wrong, out / "wrong_labels", f"wrong labels\n{_title(run)}")
    rows = []
    for column, label in SCORES.items():
        found = find_wrong(samples[column], wrong)
        rows.append((label, f"{found.area:.3f}", f"{found.precision:.2f}"))
    share = samples["share"]
    return [
        "## Wrong labels",
        "",
        f"{int(wrong.sum()):,} of {len(wrong):,} labels are wrong by injection. They were picked in "
        f"{share[wrong].mean():.2f} of their visits, the others in {share[~wrong].mean():.2f}. Ranked by a score, a "
        "wrong label comes before a right one with the probability *area* (under the ROC curve); *precision* is the "
        f"share of wrong ones among the first {int(wrong.sum()):,}. An area below 0.5 says that it is the other way "
        "round: rarely picked with 0.1 is often picked with 0.9. Figure: `wrong_labels.png`.",
        "",
        *markdown(("score", "area", "precision"), rows),
    ]
