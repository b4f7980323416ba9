"""A study's folder: which study it holds, one atomic record a run, and the table of all of them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from composer_gradmatch.config import ConfigError

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
        ConfigError: If another process works in the folder, or it holds another study.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self._records = folder / "runs"
        try:
            self._records.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {folder}: cannot make the folder: {error}") from error
        self._lock = FileLock(folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"--out {folder}: another study is working in this folder. Wait for it, or choose another --out."
            ) from error
        self._claim(identity)

    def _claim(self, identity: dict[str, Any]) -> None:
        path = self.folder / "study.json"
        identity = json.loads(json.dumps(identity))
        if not path.exists():
            write_atomically(path, json.dumps(identity, indent=1))
            return
        held = json.loads(path.read_text())
        if held != identity:
            different = sorted(_differences(held, identity))
            self.close()
            raise ConfigError(
                f"--out {self.folder} holds another study; different: {', '.join(different)}. Choose another --out, or "
                "repeat that study's settings to go on with it (strategies, keeps and seeds may be added)."
            )

    def close(self) -> None:
        """Lets others work in the folder."""
        self._lock.release()

    def path(self, run: Run) -> Path:
        """The file of a run's record."""
        return self._records / f"{run.key}.json"

    def save(self, run: Run, record: Record) -> None:
        """Keeps a run's record for good."""
        write_atomically(self.path(run), json.dumps(vars(record), default=str))

    def has(self, run: Run, retry_failed: bool = False) -> bool:
        """Whether a run needs not be made: it is recorded (and, with ``retry_failed``, did not fail)."""
        path = self.path(run)
        return path.exists() and not (retry_failed and json.loads(path.read_text())["error"])

    def records(self, kind: str) -> list[Record]:
        """All records of a kind, in the order of their files' names."""
        loaded = (Record(**json.loads(path.read_text())) for path in sorted(self._records.glob("*.json")))
        return [record for record in loaded if record.kind == kind]

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
        write_atomically(path, text.getvalue())
        return path


def _differences(held: Any, asked: Any, at: str = "") -> set[str]:
    if isinstance(held, dict) and isinstance(asked, dict):
        found: set[str] = set()
        for key in held.keys() | asked.keys():
            found |= _differences(held.get(key), asked.get(key), f"{at}.{key}" if at else str(key))
        return found
    return set() if held == asked else {f"{at} ({held!r}, now {asked!r})"}
