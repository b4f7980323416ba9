"""Run by one or two processes: trains each config of a folder, in the order of their names, as ``llmfoundry train``."""

from __future__ import annotations

import sys
from pathlib import Path

from llmfoundry.command_utils import train_from_yaml

if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).glob("*.yaml")):
        print(f"training {path.name}", flush=True)
        train_from_yaml(str(path)).close()
