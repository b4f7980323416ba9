"""Tasks that a worker process imports by name."""

from __future__ import annotations

import os
import signal


def behave(run):
    print("said by", run.settings["how"], flush=True)
    if run.settings["how"] == "fail":
        raise ValueError("as told")
    if run.settings["how"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return [{"answer": 42}], {"pid": os.getpid()}
