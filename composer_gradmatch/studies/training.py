"""A run that trains, and what is kept of it."""

from __future__ import annotations

from typing import Any

from composer_gradmatch.studies.building import builder_of
from composer_gradmatch.studies.recorder import RunRecorder
from composer_gradmatch.studies.store import Run

__all__ = ["training"]


def training(run: Run) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Trains the run's config: one row, with the best and the last evaluation; all of them are the details."""
    recorder = RunRecorder(run.options["metric"])
    trainer = builder_of(run.config).trainer(run.config, recorder)
    try:
        trainer.fit()
        time = trainer.state.timestamp
    finally:
        trainer.close()
    if not recorder.values:
        raise RuntimeError(f"{run.options['metric']} was never evaluated. Set eval_interval=1ep.")
    means = {f"mean_{kind}": total / count for kind, (total, count) in recorder.sums.items() if count}
    row = {
        "best_accuracy": max(recorder.values),
        "last_accuracy": recorder.values[-1],
        "evaluations": len(recorder.values),
        "steps": recorder.steps,
        "samples_forwarded": int(time.sample),
        "samples_backpropagated": recorder.backpropagated,
        "batches_trained_whole": recorder.trained_whole,
        "batches_not_matched": recorder.not_matched,
        **means,
        "training_seconds": time.total_wct.total_seconds(),
        "selection_seconds": recorder.selection_seconds,
    }
    return [row], {"accuracies": recorder.values, "training_seconds": recorder.seconds}
