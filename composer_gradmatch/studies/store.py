"""A study's folder: which study it holds, one atomic record a run, and the table of all of them."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from composer_gradmatch.train.config import ConfigError

__all__ = ["Record", "Run", "Store", "write_atomically"]


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        kind (str): What to do: a key of the table of tasks in ``tasks.py``.
        settings (dict[str, Any]): What tells the run from the others of its study, in the order of the columns.
        config (dict[str, Any]): The resolved config to run.
        options (dict[str, Any]): What else the task needs. Default: ``{}``.
    """

    kind: str
    settings: dict[str, Any]
    config: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The run's name, also of its file: readable, and different for different settings."""
        parts = [self.kind, *(str(v) if isinstance(v, str) else f"{k}{v}" for k, v in self.settings.items())]
        text = "-".join(part for part in parts if len(part) < 40)
        digest = hashlib.sha256(json.dumps([self.kind, self.settings], sort_keys=True).encode()).hexdigest()[:8]
        return "".join(c if c.isalnum() or c in "-._" else "_" for c in text) + f"-{digest}"


@dataclass(frozen=True)
class Record:
    """What came of a run.

    Attributes:
        kind (str): The run's kind.
        settings (dict[str, Any]): The run's settings.
        config (dict[str, Any]): The config it ran.
        rows (list[dict[str, Any]]): Its results; empty if it failed.
        error (str): What it failed of; empty if it did not.
        provenance (dict[str, str]): On what and with what it was made.
        seconds (float): How long it took.
        details (dict[str, Any]): What is too long for a table.
    """

    kind: str
    settings: dict[str, Any]
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    error: str
    provenance: dict[str, str]
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a kill at any moment, sees the old one or the new one whole."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class Store:
    """A study's folder, held by this process until it ends, however it ends.

    Args:
        folder (Path): Made if it is missing.
        identity (dict[str, Any]): What all runs of the study share; a folder holds one study.

    Raises:
        ConfigError: If the folder cannot be written to, another process works in it, or it holds another study or a
            damaged ``study.json``.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self._records = folder / "runs"
        self._lock = FileLock(folder / ".lock")
        try:
            self._records.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"--out {folder}: another study is working in this folder. Wait for it, or choose another --out."
            ) from error
        except (OSError, NotImplementedError) as error:  # The second is a file system without locks.
            raise ConfigError(f"--out {folder}: {_cannot_write(error)}") from error
        try:
            self._claim(identity)
        except OSError as error:
            self.close()
            raise ConfigError(f"--out {folder}: {_cannot_write(error)}") from error
        except BaseException:
            self.close()
            raise

    def _claim(self, identity: dict[str, Any]) -> None:
        path = self.folder / "study.json"
        identity = json.loads(json.dumps(identity))
        if not path.exists():
            write_atomically(path, json.dumps(identity, indent=1))
            return
        held = _read_mapping(path)
        if held is None:
            raise ConfigError(
                f"--out {self.folder}: {path} is damaged: it should say which study the folder holds. If it is the one "
                "that you have started, delete that file and start it again, and its runs will be taken as they are; "
                "else choose another --out."
            )
        if held != identity:
            different = sorted(_differences(held, identity))
            raise ConfigError(
                f"--out {self.folder} holds another study; different: {', '.join(different)}. Choose another --out, or "
                "repeat that study's settings to go on with it (strategies, keeps and seeds may be added)."
            )

    def close(self) -> None:
        """Lets others work in the folder."""
        self._lock.release()

    def path(self, run: Run) -> Path:
        """Gives the file of a run's record."""
        return self._records / f"{run.key}.json"

    def save(self, run: Run, record: Record) -> None:
        """Keeps a run's record for good.

        Raises:
            ConfigError: If it cannot be written.
        """
        self._write(self.path(run), json.dumps(vars(record), default=str))

    def _write(self, path: Path, text: str) -> None:
        try:
            write_atomically(path, text)
        except OSError as error:
            raise ConfigError(f"--out {self.folder}: {_cannot_write(error)}") from error

    def has(self, run: Run, retry_failed: bool = False) -> bool:
        """Tells whether a run needs not be made: it is recorded (and, with ``retry_failed``, did not fail).

        A damaged record is none: it is set aside, so that the run is made again.
        """
        record = self.record(run)
        return record is not None and not (retry_failed and record.error)

    def record(self, run: Run) -> Record | None:
        """Gives a run's record; None if there is none, or it is damaged: then it is set aside."""
        path = self.path(run)
        return self._load(path) if path.exists() else None

    def records(self, kind: str) -> list[Record]:
        """Gives all records of a kind, in the order of their files' names; damaged ones are set aside."""
        loaded = (self._load(path) for path in sorted(self._records.glob("*.json")))
        return [record for record in loaded if record is not None and record.kind == kind]

    def _load(self, path: Path) -> Record | None:
        """Gives a record; None if it is damaged: then its file is set aside."""
        held = _read_mapping(path)
        if held is not None and _is_record(held):
            return Record(**held)
        aside = path.with_suffix(".damaged")
        number = 1
        while aside.exists():
            number += 1
            aside = path.with_suffix(f".damaged{number}")
        path.rename(aside)
        print(f"{path} is damaged and counts as not made; it is now {aside.name}.", file=sys.stderr, flush=True)
        return None

    def write_table(self, kind: str, name: str) -> Path:
        """Writes all results of a kind as CSV: a row for each result, and one for each run that failed."""
        rows = []
        for record in self.records(kind):
            status = {"status": "failed" if record.error else "done", "error": record.error}
            for row in record.rows or [{}]:
                config = {"config": json.dumps(record.config, sort_keys=True)}
                rows.append({**record.settings, **row, **status, **record.provenance, **config})
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        path = self.folder / name
        self._write(path, text.getvalue())
        return path


def _differences(held: Any, asked: Any, at: str = "") -> set[str]:
    if isinstance(held, dict) and isinstance(asked, dict):
        found: set[str] = set()
        for key in held.keys() | asked.keys():
            found |= _differences(held.get(key), asked.get(key), f"{at}.{key}" if at else str(key))
        return found
    return set() if held == asked else {f"{at} ({held!r}, now {asked!r})"}


def _cannot_write(error: BaseException) -> str:
    return (
        f"cannot work in this folder ({type(error).__name__}: {error}). It must be a folder that can be written to, "
        "with space left; choose another --out."
    )


def _read_mapping(path: Path) -> dict[str, Any] | None:
    """Tells what a JSON file holds; None if that is no mapping, as when it was cut off."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # Of the first are errors of JSON and of the encoding.
        return None
    return held if isinstance(held, dict) else None


def _is_record(held: dict[str, Any]) -> bool:
    """Tells whether a mapping has what a record has, each of its type."""
    fields = {each.name: each for each in dataclasses.fields(Record)}
    types = {"kind": str, "rows": list, "error": str, "seconds": int | float}
    optional = {name for name, each in fields.items() if each.default_factory is not dataclasses.MISSING}
    return (
        held.keys() <= fields.keys()
        and fields.keys() - held.keys() <= optional
        and all(isinstance(value, types.get(key, dict)) for key, value in held.items())
        and all(isinstance(row, dict) for row in held["rows"])
    )
