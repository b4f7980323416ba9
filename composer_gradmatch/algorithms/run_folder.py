"""The folder that a run writes its own files into."""

from __future__ import annotations

from pathlib import Path

from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.utils.file_helpers import format_name_with_dist

__all__ = ["folder_in_run"]


def folder_in_run(state: State, name: str, folder: str | None = None) -> Path:
    """Gives the folder of a callback: a named one, or one in the folder of the run's checkpoints.

    Args:
        state (State): The run's state.
        name (str): The callback's name, and that of its folder.
        folder (str, optional): The one that the user has named; ``{run_name}`` is the run's. Default: ``None``.

    Raises:
        ValueError: If there is no such folder.
    """
    if folder is not None:
        return Path(format_name_with_dist(folder, state.run_name))
    savers = [each for each in state.callbacks if isinstance(each, CheckpointSaver)]
    if not savers or savers[0].remote_uploader is not None:
        raise ValueError(
            f"{name} writes into the run's folder, but the run has no local one (save_folder). Name another by "
            f"{name}'s own folder, for instance folder='runs/{{run_name}}/{name}'."
        )
    return Path(format_name_with_dist(savers[0].folder, state.run_name)) / name
