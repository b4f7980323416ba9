"""What each rule's error against the minibatch's own gradient is made of, at weights that are held still."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.picks import WholeBatch, as_picks
from composer_gradmatch.rules.rule import Rule
from composer_gradmatch.rules.table import rule_named
from composer_gradmatch.studies.gradient_error.parts import ErrorParts
from composer_gradmatch.studies.gradient_error.samples import SampleGradients
from composer_gradmatch.studies.gradient_error.weights import trained
from composer_gradmatch.studies.store import Run
from composer_gradmatch.studies.strategies import selecting_entry, strategy_entry, strategy_named
from composer_gradmatch.train.builders import build_loader

__all__ = ["Draws", "error_parts", "random_minibatches"]


@dataclass(frozen=True, eq=False)
class Draws:
    """A strategy's rule at one keep, drawn from again and again.

    Attributes:
        strategy (str): The strategy's name.
        keep (float): The fraction to keep.
        rule (Rule): Its options given. One that decides whether it looks is always as it is where it does.
        picks (int): m.
    """

    strategy: str
    keep: float
    rule: Rule
    picks: int

    @classmethod
    def build(cls, config: dict[str, Any], strategy: str, keep: float, batch_size: int) -> Draws:
        """Builds the rule of a strategy with the options that the config has for it."""
        algorithm = strategy_named(strategy).algorithm
        assert algorithm is not None
        rule, arguments = rule_named(algorithm), strategy_entry(config, strategy, keep)[algorithm]
        rule = rule.with_options({name: arguments[name] for name in rule.options if name in arguments})
        return cls(strategy, keep, rule, max(1, int(keep * batch_size)))

    def coefficients(self, candidates: Candidates, draws: int) -> torch.Tensor:
        """Draws subsets: returns a with Σ aᵢgᵢ the step of each, shape (draws, M), float64."""
        function, num_samples = self.rule.function, candidates.num_samples
        drawn = torch.zeros(draws, num_samples, dtype=torch.float64)
        for row in drawn:
            result = function(candidates, self.picks)
            picks = as_picks(result, num_samples, self.rule.name, self.rule.weighs)
            if isinstance(picks, WholeBatch):
                row.fill_(1 / num_samples)
                continue
            indices = picks.indices.cpu()
            row[indices] = 1 / len(indices) if picks.weights is None else picks.weights.cpu().double() / len(indices)
        return drawn


def random_minibatches(loader: DataLoader, batch_size: int, seed: int) -> Iterator[Any]:
    """Draws minibatches independently of one another, each without replacement, for ever.

    Args:
        loader (DataLoader): Has the data set and what makes batches of samples.
        batch_size (int): M.
        seed (int): Of the draws.

    Raises:
        ValueError: If the data set has fewer samples than a minibatch.
    """
    generator = torch.Generator().manual_seed(seed)
    dataset: Any = loader.dataset
    if len(dataset) < batch_size:
        raise ValueError(f"the data set has {len(dataset)} samples, fewer than a minibatch of {batch_size}.")
    while True:
        drawn = torch.randperm(len(dataset), generator=generator)[:batch_size]
        yield loader.collate_fn([dataset[i] for i in drawn.tolist()])


def error_parts(run: Run) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Splits the errors of the run's variants: a row for each of them and each group of parameters."""
    config, options, settings = run.config, run.options, run.settings
    size, seed = config["global_train_batch_size"], settings["seed"]
    arguments = (selecting_entry(config) or ("", {}))[1]
    keys = (arguments.get("input_key", 0), arguments.get("target_key", 1))
    variants = [Draws.build(config, strategy, keep, size) for strategy, keep in options["variants"]]
    trainer = trained(config, settings["after"], settings["checkpoint"])
    model, device = trainer.state.model, trainer.state.device
    trainer.close()
    loader = build_loader(config["train_loader"], size, "train_loader")
    update_bn(([device.batch_to_device(batch)] for batch in loader), model)
    torch.manual_seed(seed)
    minibatches = map(device.batch_to_device, random_minibatches(loader, size, seed))
    first = next(minibatches)
    samples = SampleGradients(model, first, keys, arguments.get("output_layer"))
    last = samples.in_last_layer
    groups = {"all": torch.ones_like(last), "last layer": last, "below": ~last}
    parts = ErrorParts(groups, [each.picks for each in variants], options["minibatches"])
    for batch in chain([first], islice(minibatches, options["minibatches"] - 1)):
        candidates = samples.candidates(batch)
        drawn = torch.stack([each.coefficients(candidates, options["draws"]) for each in variants])
        parts.see(samples.gradients(batch), drawn)
    rows = [
        {"strategy": each.strategy, "keep": each.keep, "picks": each.picks, "batch_size": size, **row}
        for each, own in zip(variants, parts.rows(), strict=True)
        for row in own
    ]
    return rows, {}
