"""What a Ray cluster has, and what of it a run is given: a GPU, or the cores of a node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from composer_gradmatch.train.config import ConfigError

__all__ = ["Cluster", "Share"]

#: The resource that Ray gives a node for the kind of its GPUs.
_KIND = "accelerator_type:"


@dataclass(frozen=True)
class Share:
    """What a run is given.

    Attributes:
        cores (int): CPU cores of its node.
        gpus (int): 1, or 0 where there are none.
    """

    cores: int
    gpus: int

    def __str__(self) -> str:
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        return f"1 GPU and {cores}" if self.gpus else cores


@dataclass(frozen=True)
class Cluster:
    """The nodes that runs are made on: those with GPUs; where there are none, those with the most cores.

    So runs are given the same, and their times can be compared.

    Attributes:
        nodes (Mapping[str, tuple[int, int]]): Cores and GPUs by the node's number.
        kinds (frozenset[str], optional): The kinds of the GPUs, as far as Ray tells. Default: ``frozenset()``.
    """

    nodes: Mapping[str, tuple[int, int]]
    kinds: frozenset[str] = frozenset()

    @classmethod
    def of(cls, found: Sequence[Mapping]) -> Cluster:
        """Reads what ``ray.nodes()`` returns.

        Raises:
            ConfigError: If no node has cores for runs.
        """
        have = {
            node["NodeID"]: (int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
            for node in found
            if node["Alive"]
        }
        if any(gpus for _, gpus in have.values()):
            own = {name: each for name, each in have.items() if each[1]}
            kinds = (key for node in found if node["NodeID"] in own for key in node["Resources"])
            return cls(own, frozenset(key[len(_KIND) :] for key in kinds if key.startswith(_KIND)))
        most = max((cores for cores, _ in have.values()), default=0)
        if not most:
            raise ConfigError(
                f"--engine ray: none of the cluster's {len(have)} nodes has GPUs or CPU cores for runs. Start a worker "
                "node, or the head with --num-cpus."
            )
        return cls({name: each for name, each in have.items() if each[0] == most})

    @property
    def slots(self) -> int:
        """Runs at a time: one for each GPU; where there are none, for each node."""
        return sum(gpus for _, gpus in self.nodes.values()) or len(self.nodes)

    def share(self, at_once: int) -> Share:
        """Gives what a run has if there are so many at a time: they share the cores of their nodes."""
        if any(gpus for _, gpus in self.nodes.values()):
            return Share(min(cores // gpus for cores, gpus in self.nodes.values()), 1)
        (cores, _), *_ = self.nodes.values()
        return Share(max(1, cores // ceil(at_once / len(self.nodes))), 0)
