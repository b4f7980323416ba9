"""Tasks that a worker process imports by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def behave(run):
    print("said by", run.settings["how"], flush=True)
    if run.settings["how"] == "fail":
        raise ValueError("as told")
    if run.settings["how"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return [{"answer": 42}], {"pid": os.getpid()}


def begin_and_wait(run):
    """Says on which node of Ray's it has begun, with what, and ends once it is told to."""
    import ray
    import torch

    node = ray.get_runtime_context().get_node_id()
    own = [node, str(os.getpid()), os.environ.get("CUDA_VISIBLE_DEVICES", ""), str(torch.get_num_threads())]
    began = Path(run.options["folder"]) / f"{run.key}.began"
    with began.open("a") as file:
        file.write(" ".join(own) + "\n")
    while not Path(run.options["folder"], "go on").exists():
        time.sleep(0.05)
    return [{"node": node}], {}


def name_here(run):
    """Tells what a registered model is, and what this process is started in."""
    from composer_gradmatch.train.registry import resolve

    return [{"classes": resolve("model", "my_net")(num_classes=3).num_classes, "folder": os.getcwd()}], {}
