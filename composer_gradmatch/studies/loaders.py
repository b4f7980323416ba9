"""A user's data loader made anew over other samples: a part, with noisy labels, numbered, or in other batches."""

from __future__ import annotations

from typing import Any

from composer.utils import dist
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from composer_gradmatch.batches.sample_numbers import number_samples
from composer_gradmatch.train.config import ConfigError

__all__ = ["batch_size_of", "remade", "seed_loader", "shuffles"]

_KEPT = ("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator")
_KEPT_OF_WORKERS = ("prefetch_factor", "persistent_workers")


def batch_size_of(loader: DataLoader, where: str) -> int:
    """Tells the batch size of a loader.

    Args:
        loader (DataLoader): With a batch size, or a batch sampler that has one.
        where (str): What it is called in an error.

    Raises:
        ConfigError: If it has none.
    """
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if not isinstance(size, int):
        raise ConfigError(f"{where}: its batch size is not known. Give DataLoader a batch_size.")
    return size


def shuffles(loader: DataLoader, where: str, why: str) -> bool:
    """Tells whether a loader shuffles.

    Args:
        loader (DataLoader): To be made anew.
        where (str): What it is called in an error.
        why (str): What it is made anew for, for an error.

    Raises:
        ConfigError: If it could not be: it is over a stream, or has a sampler of its own.
    """
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise ConfigError(
            f"{where}: {why} needs a map-style data set, with a length and samples by number; "
            f"{type(loader.dataset).__name__} is a stream. accuracy without tune and label_noise needs neither."
        )
    sampler = loader.sampler
    if type(loader.batch_sampler) is BatchSampler:
        if type(sampler) in (RandomSampler, SequentialSampler):
            return type(sampler) is RandomSampler
        if isinstance(sampler, DistributedSampler):
            return sampler.shuffle
    own = sampler if type(loader.batch_sampler) is BatchSampler else loader.batch_sampler
    raise ConfigError(
        f"{where}: for {why} the loader is made anew, which takes one that shuffles or goes through its samples in "
        f"order; it has a {type(own).__name__}. Give DataLoader shuffle=True or shuffle=False in its place."
    )


def remade(
    loader: DataLoader,
    where: str,
    why: str,
    *,
    like: DataLoader | None = None,
    dataset: Dataset | None = None,
    batch_size: int | None = None,
    drop_last: bool | None = None,
    numbered: bool = False,
) -> DataLoader:
    """Makes a loader like another one.

    Args:
        loader (DataLoader): Gives what is not said here.
        where (str): What it is called in an error.
        why (str): What it is made anew for, for an error.
        like (DataLoader, optional): Gives all but the data set. Default: ``loader``.
        dataset (Dataset, optional): Map-style. Default: ``loader``'s.
        batch_size (int, optional): Default: as it was.
        drop_last (bool, optional): Default: as it was.
        numbered (bool, optional): Whether samples get their numbers. Default: ``False``.

    Raises:
        ConfigError: If it is over a stream, has a sampler of its own, or would give no batch.
    """
    shuffle = shuffles(loader, where, why)
    if like is not None:
        shuffle = shuffles(like, "eval_dataloader", why)
    like = loader if like is None else like
    options: dict[str, Any] = {name: getattr(like, name) for name in _KEPT}
    if like.num_workers:
        options |= {name: getattr(like, name) for name in _KEPT_OF_WORKERS}
    options |= {"collate_fn": like.collate_fn, "batch_size": batch_size or batch_size_of(like, where)}
    options["drop_last"] = like.drop_last if drop_last is None else drop_last
    dataset = loader.dataset if dataset is None else dataset
    if numbered:
        wrapped = number_samples(dataset, like.collate_fn)
        dataset, options["collate_fn"] = wrapped, wrapped.collate_fn
    sampler = dist.get_sampler(dataset, shuffle=shuffle, drop_last=options["drop_last"])
    made = DataLoader(dataset, sampler=sampler, **options)
    if not len(made):
        raise ConfigError(
            f"{where}: {len(sampler)} samples give no batch of {options['batch_size']} with drop_last=True. Lower the "
            "batch size."
        )
    return made


def seed_loader(loader: DataLoader, seed: int) -> None:
    """Seeds generators of a loader's own, which might have gone through other runs."""
    for generator in (loader.generator, getattr(loader.sampler, "generator", None)):
        if generator is not None:
            generator.manual_seed(seed)
