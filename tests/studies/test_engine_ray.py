"""Runs on Ray's own clusters of several nodes, all on this machine."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import closing, contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from composer.models import ComposerClassifier
from tasks_for_workers import begin_and_wait, behave
from test_runs import DIGITS, alive, save_timing, study
from torch.utils.data import DataLoader, TensorDataset

from composer_gradmatch.studies.__main__ import main
from composer_gradmatch.studies.building import ByNames, built_by
from composer_gradmatch.studies.engines.engine import run_all
from composer_gradmatch.studies.made import Made
from composer_gradmatch.studies.store import Run
from composer_gradmatch.studies.tasks import for_workers
from composer_gradmatch.train.config import ConfigError
from composer_gradmatch.train.register_files import load_files

pytest.importorskip("ray")
#: For whatever is waited for, on a machine that does much else.
PATIENCE = 120


@contextmanager
def cluster_of(*nodes):
    """Starts a cluster whose head makes no runs: gives it, and the other nodes."""
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    try:
        yield cluster, [cluster.add_node(**each, **small) for each in nodes]
    finally:
        cluster.shutdown()


def until(happens):
    """Waits until it does; returns what it returned."""
    deadline = time.monotonic() + PATIENCE
    while not (found := happens()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def begun(folder):
    """What each attempt at each run has said when it began."""
    return {file.stem: [line.split() for line in file.read_text().splitlines()] for file in folder.glob("*.began")}


def once_begun(folder, attempts, then=lambda: None):
    """Waits beside the test until there are so many attempts, does something, and lets them end."""

    def wait():
        until(lambda: sum(map(len, begun(folder).values())) == attempts)
        then()
        (folder / "go on").touch()

    threading.Thread(target=wait, daemon=True).start()


MODEL = """
import torch
from composer_gradmatch import register

@register.model
def my_net(num_classes=10):
    return torch.nn.Linear(8, num_classes)
"""


def tiny():
    """What a notebook's function makes."""
    model = ComposerClassifier(torch.nn.Linear(2, 2), num_classes=2)
    points = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(points, (points[:, 0] > 0.3).long())
    return {
        "model": model,
        "train_dataloader": DataLoader(data, batch_size=16, shuffle=True),
        "eval_dataloader": DataLoader(data, batch_size=64),
        "optimizers": torch.optim.SGD(model.parameters(), lr=0.1),
        "max_duration": "1ep",
    }


tiny.__module__ = "__main__"


def test_a_node_that_dies_costs_only_its_run_which_is_made_again(tmp_path, nothing_registered, monkeypatch, capsys):
    from composer_gradmatch.studies.engines.on_ray import OnRay

    mine, logs = tmp_path / "mine.py", tmp_path / "logs"
    mine.write_text(MODEL)
    load_files([mine])
    mine.unlink()  # As on a machine of its own.
    monkeypatch.chdir(tmp_path)
    with cluster_of({"num_cpus": 1}, {"num_cpus": 1}) as (cluster, nodes), closing(OnRay(cluster.address, None)) as ray:
        assert "2 runs at a time, each with 1 core." in capsys.readouterr().err
        runs = {how: Run("test", {"how": how}, {}) for how in ("fine", "die", "fail")}
        records = {run.settings["how"]: record for run, record in run_all(ray, behave, list(runs.values()), logs)}
        printed = {how: (logs / f"{run.key}.log").read_text() for how, run in runs.items()}
        assert records["fine"].rows == [{"answer": 42}]
        assert records["fine"].provenance["node"]
        assert printed["fine"] == "said by fine\n"
        assert records["fail"].error == "ValueError: as told"
        assert 'raise ValueError("as told")' in printed["fail"]
        assert "The run's worker died" in records["die"].error
        assert printed["die"].count("The run's worker died: ") == 2

        task = for_workers("tasks_for_workers:name_here", ByNames())
        ((_, named),) = run_all(ray, task, [Run("test", {"named": 1}, {})], logs)
        assert named.error == ""
        assert named.rows == [{"classes": 3, "folder": str(tmp_path)}]
        assert named.provenance["registered mine.py"].startswith("SHA-256 ")

        made = Made(tiny, varies_rate=False)
        with built_by(made, made.config):
            run = Run("accuracy", {}, {**made.config, "seed": 3}, {"metric": "metrics/eval/MulticlassAccuracy"})
            task = for_workers("composer_gradmatch.studies.training:training", made)
            here = task(run)
            trained = ray.do(task, run, logs)
        assert trained.error == ""
        assert trained.details["accuracies"] == here[1]["accuracies"]
        assert trained.rows[0]["steps"] == here[0][0]["steps"] == 4

        with pytest.raises(ConfigError, match=r"what makes the runs cannot be sent to other machines: .*lock"):
            ray.do(partial(print, threading.Lock()), run, logs)

        dead, other = (node.node_id for node in nodes)
        once_begun(tmp_path, 2, lambda: cluster.remove_node(nodes[0], allow_graceful=False))
        waiting = [Run("test", {"n": n}, {}, {"folder": str(tmp_path)}) for n in range(4)]
        records = [record for _, record in run_all(ray, begin_and_wait, waiting, logs)]
    assert [record.error for record in records] == [""] * 4
    assert {record.rows[0]["node"] for record in records} == {other}
    attempts = [[node for node, *_ in each] for each in begun(tmp_path).values()]
    assert sorted(attempts, key=len) == [[other], [other], [other], [dead, other]]


def test_each_run_has_a_gpu_of_its_own_and_nodes_have_the_same_packages(tmp_path, monkeypatch):
    from composer_gradmatch.studies.engines import on_ray

    # Ray takes our word for the GPUs.
    with cluster_of({"num_cpus": 4, "num_gpus": 2}) as (cluster, _):
        with monkeypatch.context() as patch:
            patch.setattr(on_ray, "version", lambda name: "9" if name == "mosaicml" else version(name))
            with pytest.raises(ConfigError, match=r"mosaicml is 9 here and 0\.32\.\d on node [\d.]+\. Install"):
                on_ray.OnRay(cluster.address, None)
        with closing(on_ray.OnRay(cluster.address, None)) as ray:
            assert ray.slots == 2
            runs = [Run("test", {"n": n}, {}, {"folder": str(tmp_path)}) for n in range(2)]
            once_begun(tmp_path, 2)
            assert [record.error for _, record in run_all(ray, begin_and_wait, runs, tmp_path / "logs")] == [""] * 2
    attempts = [attempt for each in begun(tmp_path).values() for attempt in each]
    assert sorted(gpu for _, _, gpu, _ in attempts) == ["0", "1"]
    assert {threads for _, _, _, threads in attempts} == {"2"}


@pytest.mark.slow
def test_a_verdict_on_a_cluster(tmp_path):
    out = tmp_path / "out"
    command = ["verdict", DIGITS, "max_duration=1ep", "--out", str(out), "--strategies", "full", "--keep", "0.1"]
    command += ["--margin", "0.1", "--budget", "40s", "--engine", "ray"]
    with cluster_of({"num_cpus": 1}, {"num_cpus": 1}) as (cluster, _):
        assert main([*command, "--address", cluster.address]) == 0
    found = json.loads((out / "verdict.json").read_text())
    assert found["spent_s"] <= 1.1 * 40
    assert found["runs"] > 10
    records = [json.loads(path.read_text()) for path in out.glob("runs/verdict-*.json")]
    assert not any(record["error"] for record in records)
    assert all(record["provenance"]["node"] for record in records)
    assert "on 1 node(s) of a Ray cluster, times added up" in (out / "summary.md").read_text()


def descendants(pid):
    """The processes that a process has started, and those that these have."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[stat.parent.name] = stat.read_text().rsplit(")", 1)[1].split()[1]
    found = {str(pid)}
    while more := {own for own, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {str(pid)}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_study_on_ray_told_to_stop_stops_at_once(how, tmp_path):
    out, temporary = tmp_path / "out", Path(tempfile.gettempdir())
    save_timing(out, "100000ep")
    before = set(temporary.glob("accuracy-*.log"))
    command = [*study(out, "100000ep"), "--engine", "ray", "--address", "local"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        logs = until(lambda: process.poll() is not None or set(temporary.glob("accuracy-*.log")) - before)
        assert process.poll() is None, process.communicate()[1]
        started = descendants(process.pid)
        assert started
        process.send_signal(how)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 128 + how
        assert "The same command goes on from here" in errors
        until(lambda: not any(map(alive, started)))
    finally:
        process.kill()
    for log in logs:
        log.unlink()
    assert [path.name[:9] for path in out.glob("runs/*.json")] == ["step-time"]
