"""A callback that draws the picks of a minibatch now and then: into the run's folder, and for loggers of images."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from composer_gradmatch.algorithms.run_folder import folder_in_run
from composer_gradmatch.algorithms.selection_figure import Drawn, draw_selection
from composer_gradmatch.algorithms.subset_backprop import SubsetBackprop
from composer_gradmatch.algorithms.warn_once import WarnOnce
from composer_gradmatch.batches.viewable import Decode, view_samples
from composer_gradmatch.forward.ranks import unwrap
from composer_gradmatch.rules.picks import Picks

__all__ = ["SelectionImages"]

_NAME = "selection_images"


class SelectionImages(Callback):
    """Draws the first minibatch of each interval that is selected from: picked samples framed, with their weights.

    Images are drawn as they were trained on, each stretched to the range of its values; token numbers as the text that
    a tokenizer makes of them. Beside a sample stands its class, if the targets are classes. The picks with the largest
    weights come first, then those that are left out; if there is no room for all, each kind has half of it. Samples of
    weight zero count as left out, as in :class:`.SelectionLog`.

    A figure is written as ``selection_images/ep{epoch}-ba{batch}.png``, both counted from 1, and logged as an image
    under ``{algorithm}/selection`` by loggers that take images (TensorBoard, MLflow, W&B, Comet, Neptune). On several
    processes it is rank 0's part of the minibatch. What cannot be drawn is warned of, and training goes on.

    Args:
        interval (str, optional): How often, a time such as ``"5ep"``, ``"500ba"`` or ``"0.1dur"``. Default: ``"1ep"``.
        num_samples (int, optional): The most samples to draw. Default: ``32``.
        folder (str, optional): Where to write; ``{run_name}`` is the run's. None for ``selection_images`` in the folder
            of the run's checkpoints. Default: ``None``.
        tokenizer (Any, optional): Has a ``decode(numbers)``; None for that of a ``HuggingFaceModel``.
            Default: ``None``.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If the tokenizer is none.
        ValueError: If a value is out of range; at FIT_START, if no algorithm selects, or there is neither a folder nor
            a logger of images.

    Example:
        .. code-block:: python

            trainer = Trainer(
                ...,
                algorithms=[GradMatch(start=0.0, end=1.0, keep=0.3, interrupt=0)],
                algorithm_passes=[select_first],
                callbacks=[SelectionImages("5ep", folder="runs/{run_name}/picks")],
            )
    """

    def __init__(
        self, interval: str = "1ep", num_samples: int = 32, folder: str | None = None, tokenizer: Any = None
    ) -> None:
        if find_spec("matplotlib") is None:
            raise ImportError(f"{_NAME} draws by matplotlib: pip install 'composer-gradmatch[studies]'.")
        self.interval = _positive_time(interval)
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples must be a positive integer, the most samples to draw; got {num_samples!r}.")
        if tokenizer is not None and not hasattr(tokenizer, "decode"):
            raise TypeError(f"tokenizer must have a method decode(numbers), as HuggingFace's have; got {tokenizer!r}.")
        self.num_samples, self.folder, self.tokenizer = num_samples, folder, tokenizer
        self._warn_once = WarnOnce(_NAME)
        self._forget()

    def _forget(self) -> None:
        self._algorithms: list[SubsetBackprop] = []
        self._path: Path | None = None
        #: The number of the interval that was drawn of last.
        self._drawn: int | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Forgets another run."""
        self._warn_once.reset()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Tells what a checkpoint keeps."""
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._drawn = state["drawn"]

    def fit_start(self, state: State, logger: Logger) -> None:
        """Finds the selecting algorithms and the folder, and removes figures of later steps than the run's."""
        self._algorithms = [each for each in state.algorithms if isinstance(each, SubsetBackprop)]
        if not self._algorithms:
            raise ValueError(
                f"{_NAME} found no algorithm of composer_gradmatch in the run, whose picks it could draw: add one, for "
                f"instance GradMatch, or leave {_NAME} out."
            )
        try:
            self._path = folder_in_run(state, _NAME, self.folder)
        except ValueError:
            if not any(map(_takes_images, logger.destinations)):
                raise
            self._path = None
        if self._path is not None and dist.get_global_rank() == 0:
            self._path.mkdir(parents=True, exist_ok=True)
            for path in self._path.glob("ep*-ba*.png"):
                # Of a run in whose place this one is, or that was resumed from before that step.
                found = re.fullmatch(r"ep\d+-ba(\d+)\.png", path.name)
                if found and int(found[1]) > state.timestamp.batch:
                    path.unlink()

    def batch_start(self, state: State, logger: Logger) -> None:
        """Draws the step's minibatch, if it is time for it and there are picks."""
        interval = self._interval_now(state)
        if interval == self._drawn:
            return
        algorithm = next((each for each in self._algorithms if each.minibatch is not None), None)
        if algorithm is None:
            return
        self._drawn = interval
        if dist.get_global_rank() != 0:
            return
        try:
            self._draw(state, logger, algorithm)
        except Exception as error:  # A picture is not worth a run.
            self._warn_once(f"the picks of a minibatch could not be drawn: {error}")

    def _interval_now(self, state: State) -> int:
        unit = self.interval.unit
        elapsed: Any = state.get_elapsed_duration() if unit == TimeUnit.DURATION else state.timestamp.get(unit)
        return int(elapsed.value // self.interval.value)

    def _draw(self, state: State, logger: Logger, algorithm: SubsetBackprop) -> None:
        picks = algorithm.last_selection
        assert picks is not None
        reader = algorithm.selector.selection_pass.reader
        batch, num_samples = algorithm.minibatch, reader.count(algorithm.minibatch)
        weights = _weights_of(picks)
        chosen = _choose(weights, num_samples, self.num_samples)
        names = reader.names(batch, num_samples)
        samples = view_samples(
            reader.take(batch, torch.tensor(chosen), num_samples, names),
            names,
            algorithm.input_key,
            self._decode(state),
        )
        try:
            labels = [str(label) for label in reader.labels(batch, num_samples)[chosen].tolist()]
        except ValueError:  # Targets of another kind.
            labels = [""] * len(chosen)
        epoch, step = int(state.timestamp.epoch) + 1, int(state.timestamp.batch) + 1
        title = f"{algorithm.log_name}, epoch {epoch}, step {step}: {len(weights)} of {num_samples} samples picked"
        if len(chosen) < num_samples:
            picked = sum(i in weights for i in chosen)
            order = ", the largest weights first," if len({*weights.values()}) > 1 else ""
            title += f"\nshown: {picked} picks{order} and {len(chosen) - picked} that are left out"
        drawn = [Drawn(*each) for each in zip(samples, labels, map(weights.get, chosen), strict=True)]
        figure = draw_selection(drawn, title)
        logger.log_images(figure, f"{algorithm.log_name}/selection", channels_last=True, use_table=False)
        if self._path is not None:
            _write(figure, self._path / f"ep{epoch}-ba{step}.png")

    def _decode(self, state: State) -> Decode | None:
        tokenizer: Any = self.tokenizer
        if tokenizer is None:
            tokenizer = getattr(unwrap(state.model), "tokenizer", None)
        if not hasattr(tokenizer, "decode"):
            return None
        if hasattr(tokenizer, "all_special_ids"):  # One of HuggingFace's.
            return lambda numbers: tokenizer.decode(numbers, skip_special_tokens=True)
        return tokenizer.decode


def _positive_time(interval: Any) -> Time:
    try:
        time = Time.from_input(interval, TimeUnit.EPOCH)
    except (ValueError, TypeError, RuntimeError) as error:  # Composer's for another type.
        raise ValueError(
            f"interval must be a time such as '1ep', '500ba' or '0.1dur', how often to draw; got {interval!r}."
        ) from error
    if not time.value > 0:
        raise ValueError(f"interval must be longer than nothing, for instance '1ep'; got {interval!r}.")
    return time


def _takes_images(logger: LoggerDestination) -> bool:
    return type(logger).log_images is not LoggerDestination.log_images


def _weights_of(picks: Picks) -> dict[int, float]:
    """Gives the picks that are trained on, each with its weight."""
    indices = picks.indices.tolist()
    if picks.weights is None or (picks.found is not None and not bool(picks.found)):
        return dict.fromkeys(indices, 1.0)
    return {i: weight for i, weight in zip(indices, picks.weights.tolist(), strict=True) if weight}


def _choose(weights: dict[int, float], num_samples: int, most: int) -> list[int]:
    """Chooses at most so many samples: picks, the largest weights first, then others in the order of the batch."""
    picked = sorted(weights, key=lambda i: -weights[i])
    others = [i for i in range(num_samples) if i not in weights]
    of_others = min(len(others), max(most // 2, most - len(picked)))
    return [*picked[: most - of_others], *others[:of_others]]


def _write(figure: np.ndarray, path: Path) -> None:
    """Writes a file as a whole."""
    from matplotlib.image import imsave

    imsave(path.with_suffix(".tmp"), figure, format="png")
    path.with_suffix(".tmp").replace(path)
