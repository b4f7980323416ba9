"""What a run did, in a short table: accuracy, samples, time, and how well the picks matched."""

from __future__ import annotations

from typing import Any, ClassVar

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from composer_gradmatch.algorithms.rule_backprop import RuleBackprop
from composer_gradmatch.algorithms.subset_backprop import SubsetBackprop
from composer_gradmatch.batches import tensor_leaves

__all__ = ["RunSummary"]


class RunSummary(LoggerDestination):
    """Gathers the closing table of a run from its events and metrics; goes on after a resume.

    Samples are summed over ranks; what is told of the steps is of those of rank 0.
    """

    #: Metrics of a selecting step whose means it tells → their names in the table.
    MEANS: ClassVar[dict[str, str]] = {
        "matching_residual": "mean matching residual",
        "effective_sample_size": "mean effective sample size",
        "step_length": "mean step length",
        "fraction_looked_at": "mean share looked at",
        "suspects": "mean suspects a minibatch",
    }

    def __init__(self) -> None:
        self.backpropagated = 0
        self.sums: dict[str, tuple[float, int]] = {}
        self.best: dict[str, float] = {}
        self.last: dict[str, float] = {}
        #: Batches trained whole, by the metric's name, which has its algorithm's in front.
        self.whole: dict[str, int] = {}
        self.not_matched = 0
        #: The last one known.
        self.noise_scale: float | None = None

    @property
    def trained_whole(self) -> int:
        """How many minibatches could not be selected from, by any algorithm."""
        return sum(self.whole.values())

    def batch_start(self, state: State, logger: Logger) -> None:
        """Counts the samples that are left after selection."""
        self.backpropagated += next(len(leaf) for leaf in tensor_leaves(state.batch) if leaf.dim())

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Takes what the table needs from the logged metrics."""
        for key, value in metrics.items():
            kind = key.rsplit("/", 1)[-1]
            if kind in (*self.MEANS, "relative_error", "break_even_error"):
                total, count = self.sums.get(kind, (0.0, 0))
                if value == value:  # The residual is NaN where there is nothing to match.
                    self.sums[kind] = (total + float(value), count + 1)
            elif kind == "gradient_noise_scale":
                self.noise_scale = float(value)
            elif kind == "batches_trained_whole":
                self.whole[key] = int(value)
            elif kind == "batches_not_matched":
                self.not_matched = int(value)
            elif key.startswith("metrics/") and not key.startswith("metrics/train/"):
                self.last[key] = float(value)
                self.best[key] = max(self.best.get(key, float("-inf")), float(value))

    def state_dict(self) -> dict[str, Any]:
        """Tells what a checkpoint keeps, with the samples of all ranks, since Composer saves that of rank 0."""
        return {**vars(self), "backpropagated": sum(dist.all_gather_object(self.backpropagated))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        vars(self).update(state)
        if dist.get_global_rank() != 0:
            self.backpropagated = 0

    def table(self, state: State) -> str:
        """Gives the table's text; call it on every rank."""
        backpropagated = sum(dist.all_gather_object(self.backpropagated))
        forwarded = int(state.timestamp.sample)
        rows = [("run", state.run_name)]
        accuracies = [key for key in self.last if "Accuracy" in key]
        for key in accuracies or self.last:
            name = key.removeprefix("metrics/")
            if key in accuracies:
                rows.append((f"best {name}", f"{self.best[key]:.4f}"))
            rows.append((f"last {name}", f"{self.last[key]:.4f}"))
        share = f" ({backpropagated / forwarded:.0%})" if forwarded else ""
        rows += [
            ("samples forwarded", f"{forwarded:,}"),
            ("samples backpropagated", f"{backpropagated:,}{share}"),
            ("training time", f"{state.timestamp.total_wct.total_seconds():.1f} s"),
        ]
        for kind, (total, count) in self.sums.items():
            if kind == "effective_sample_size":
                rows.append(("selection steps", f"{count:,}"))
            if count and kind in self.MEANS:
                rows.append((self.MEANS[kind], f"{total / count:.3g}"))
        rows += self._expected_length(state)
        rows += self._prediction()
        rows += _suspects_found(state)
        if self.trained_whole:
            rows.append(("batches trained whole", f"{self.trained_whole:,}"))
        if self.not_matched:
            rows.append(("batches not matched", f"{self.not_matched:,}"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _expected_length(self, state: State) -> list[tuple[str, str]]:
        """Tells the step length of a rule that looks at nothing, and so has measured none."""
        rules = [each.rule for each in state.algorithms if isinstance(each, RuleBackprop)]
        known = any(rule.needs == "nothing" and rule.unbiased for rule in rules)
        if not known or "effective_sample_size" not in self.sums or "step_length" in self.sums:
            return []
        return [(self.MEANS["step_length"], "1 in expectation (not measured: the rule looks at nothing)")]

    def _prediction(self) -> list[tuple[str, str]]:
        """Tells what the last layer's gradients say of random selection at the same cost."""
        rows = []
        if self.noise_scale is not None:
            known = self.noise_scale == self.noise_scale
            rows.append(
                ("gradient noise scale", f"{self.noise_scale:,.0f} samples (last layer)" if known else "not known")
            )
        means = {kind: total / count for kind, (total, count) in self.sums.items() if count}
        if {"relative_error", "break_even_error"} <= means.keys():
            error, break_even = means["relative_error"], means["break_even_error"]
            says = "better than" if error < break_even else "no better than"
            rows.append(
                (
                    "predicted gradient error",
                    f"{says} random at the same cost ({error:.2g} of that of as many random samples, "
                    f"break-even {break_even:.2g}; last layer)",
                )
            )
        return rows


def _suspects_found(state: State) -> list[tuple[str, str]]:
    """Tells how many samples are suspected at the end and, of injected noise, how rightly."""
    stores = [each.selector.store for each in state.algorithms if isinstance(each, SubsetBackprop)]
    store = next((each for each in stores if each is not None and each.suspects is not None), None)
    if store is None:
        return []
    found = store.suspected()
    text = f"{len(found):,} of {store.numbering.size:,} samples"
    dataset: Any = getattr(state.train_dataloader, "dataset", None)
    noisy = None if dataset is None else getattr(dataset, "wrong_indices", None)
    if noisy is not None and len(found):
        right = len(set(found.tolist()) & set(noisy.tolist()))
        text += f"; of wrong labels: precision {right / len(found):.2f}, recall {right / max(1, len(noisy)):.2f}"
    return [("suspects", text)]
