"""Where runs are made: what of a cluster a run is given, what is refused, and runs ahead of what is asked for."""

from __future__ import annotations

import socket
import sys
import threading
import time
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from made_up_training import MadeUp, ask
from tasks_for_workers import behave
from test_verdict_restart import CELLS, Machine, on_record

from composer_gradmatch.studies import accuracy
from composer_gradmatch.studies.__main__ import main
from composer_gradmatch.studies.engines import connect
from composer_gradmatch.studies.engines.cluster import Cluster, Share
from composer_gradmatch.studies.engines.engine import run_all
from composer_gradmatch.studies.engines.local import Here, Local
from composer_gradmatch.studies.store import Run, Store
from composer_gradmatch.studies.verdict.ledger import Ledger, OutOfBudget
from composer_gradmatch.studies.verdict.source import Stored
from composer_gradmatch.studies.verdict.trial import FULL, Trial
from composer_gradmatch.train.config import ConfigError

DIGITS = str(Path(__file__).resolve().parents[2] / "configs" / "digits.yaml")


NUMBERS = count()


def node(cores, gpus=0, alive=True, kind=None):
    resources = {"CPU": float(cores), "GPU": float(gpus)} if gpus else {"CPU": float(cores)} if cores else {}
    if kind:
        resources[f"accelerator_type:{kind}"] = 1.0
    return {"NodeID": f"node {next(NUMBERS)}", "Alive": alive, "Resources": {**resources, "node:10.0.0.1": 1.0}}


@pytest.mark.parametrize(
    ("nodes", "at_once", "slots", "share"),
    [
        ([node(8)], 1, 1, Share(8, 0)),
        ([node(8)], 3, 1, Share(2, 0)),  # More than there are nodes: they share the cores.
        ([node(2)], 5, 1, Share(1, 0)),
        ([node(0), node(16), node(16)], 2, 2, Share(16, 0)),
        ([node(16), node(16)], 3, 2, Share(8, 0)),
        ([node(4), node(16), node(16), node(64, alive=False)], 2, 2, Share(16, 0)),
        ([node(8), node(64, 8), node(32, 4)], 12, 12, Share(8, 1)),
        ([node(64, 8), node(8, 4)], 1, 12, Share(2, 1)),
        ([node(2, 4)], 4, 4, Share(0, 1)),
    ],
)
def test_a_run_is_given_a_gpu_or_its_part_of_the_cores(nodes, at_once, slots, share):
    cluster = Cluster.of(nodes)
    assert cluster.slots == slots
    assert cluster.share(at_once) == share


def test_times_of_gpus_of_two_kinds_are_not_taken_for_the_same():
    assert Cluster.of([node(8, 1, kind="A100"), node(8, 1, kind="A100"), node(8, kind="T4")]).kinds == {"A100"}
    assert Cluster.of([node(8, 1, kind="A100"), node(8, 1, kind="T4")]).kinds == {"A100", "T4"}


def test_a_cluster_without_cores_is_refused():
    with pytest.raises(ConfigError, match="none of the cluster's 2 nodes has GPUs or CPU cores for runs"):
        Cluster.of([node(0), node(8, alive=False), node(0)])


def study(tmp_path, *words):
    """Asks for a study: its exit code, and the seconds that went by."""
    begun = time.monotonic()
    code = main(["accuracy", DIGITS, "--out", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()
    return code, time.monotonic() - begun


def told(capsys):
    """The one line that was said of the error."""
    first, line = capsys.readouterr().err.strip().splitlines()
    assert first == f"{DIGITS}: the study cannot be run:"
    return line


def test_without_ray_a_line_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, seconds = study(tmp_path, "--engine", "ray")
    assert (code, seconds < 5) == (2, True)
    assert told(capsys).endswith("It needs: pip install 'composer-gradmatch[cluster]'")


def test_an_address_goes_with_ray(tmp_path, capsys):
    assert study(tmp_path, "--address", "10.0.0.1:6379")[0] == 2
    assert "--address 10.0.0.1:6379: runs are made on this machine. Add --engine ray" in told(capsys)
    with pytest.raises(SystemExit):
        study(tmp_path, "--engine", "slurm")
    with pytest.raises(ConfigError, match=r"^address 10.0.0.1:6379: runs are made on this machine. Add engine ray"):
        accuracy(DIGITS, out=tmp_path / "out", address="10.0.0.1:6379")
    with pytest.raises(ConfigError, match="engine: unknown engine 'rai'; did you mean 'ray'"):
        accuracy(DIGITS, out=tmp_path / "out", engine="rai")  # pyright: ignore[reportArgumentType]


@pytest.fixture
def port():
    """A port that is taken, where nobody listens yet."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held


@pytest.mark.parametrize("by", ["option", "environment"])
def test_an_address_where_nobody_listens_is_told_at_once(by, port, tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray")
    address = f"127.0.0.1:{port.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    code, seconds = study(tmp_path, "--engine", "ray", *(["--address", address] if by == "option" else []))
    assert (code, seconds < 20) == (2, True)
    assert f"--address {address}: nobody listens there" in told(capsys)


def test_what_listens_and_is_not_ray_is_told(port, tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(connect, "_GREETING_SECONDS", 3)
    port.listen()
    code, seconds = study(tmp_path, "--engine", "ray", "--address", f"127.0.0.1:{port.getsockname()[1]}")
    assert (code, seconds < 30) == (2, True)
    assert "what listens there has not answered as Ray does for 3 s" in told(capsys)


@pytest.mark.parametrize("address", ["cluster", "10.0.0.1", "10.0.0.1:port", "10.0.0.1:99999999"])
def test_what_is_no_address_is_told(address, tmp_path, capsys):
    pytest.importorskip("ray")
    assert study(tmp_path, "--engine", "ray", "--address", address)[0] == 2
    assert f"--address {address}: expected HOST:PORT" in told(capsys)


def test_a_client_of_rays_is_refused(tmp_path, capsys):
    pytest.importorskip("ray")
    assert study(tmp_path, "--engine", "ray", "--address", "ray://10.0.0.1:10001")[0] == 2
    assert "Start it on a node of the cluster" in told(capsys)


def test_a_process_goes_on_with_the_next_runs(tmp_path):
    with closing(Local(2)) as engine:
        made = [
            record.details["pid"]
            for n in range(2)
            for _, record in run_all(engine, behave, [Run("test", {"how": "fine", "n": n}, {})], tmp_path)
        ]
    assert made[0] == made[1]


def test_a_run_here_is_one_at_a_time(tmp_path):
    runs = [Run("test", {"how": how}, {}) for how in ("fine", "fail")]
    records = {run.key: record for run, record in run_all(Here(), behave, runs, tmp_path)}
    assert [bool(record.error) for record in records.values()] == [False, True]
    assert (tmp_path / f"{runs[0].key}.log").read_text() == "said by fine\n"


class Side(Machine):
    """A machine that makes several runs at a time, each of which takes its time, and counts them."""

    def __init__(self, store, training):
        super().__init__(store, training)
        self.running = self.most = 0
        self.order = []
        self.lock = threading.Lock()

    def make(self, run):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.order.append(run.key)
        time.sleep(0.002)
        with self.lock:
            self.running -= 1
            return super().make(run)


@pytest.mark.parametrize("budget", [8000.0, 3000.0])
def test_a_verdict_whose_runs_are_made_at_the_same_time_is_the_same(budget, tmp_path):
    alone = ask(MadeUp(CELLS), budget)
    store = Store(tmp_path, {})
    machine = Side(store, MadeUp(CELLS))
    source = Stored(store, machine.run_of, machine.make, at_once=4)
    with closing(source):
        found = ask(MadeUp(CELLS), budget, source=source, recorded=source.has, expect=source.expect)
    store.close()
    assert found.as_json() == alone.as_json()
    assert machine.most == 4
    assert len(machine.order) == len(set(machine.order)) == len(found.ledger.taken)
    assert found.ledger.spent <= budget


def test_runs_ahead_are_begun_only_as_far_as_they_fit(tmp_path):
    store = Store(tmp_path, {})
    machine = Side(store, MadeUp(CELLS))
    trials = [Trial(FULL, 0.1, seed) for seed in range(6)]
    with closing(Stored(store, machine.run_of, machine.make, at_once=4)) as source:
        ledger = Ledger(source, 280.0, lambda cell: 1.0, 100.0, recorded=source.has, expect=source.expect)
        with pytest.raises(OutOfBudget):  # A run takes 100 s.
            ledger.take(trials)
    store.close()
    assert list(ledger.taken) == trials[:2]
    assert machine.made == 2
    assert not any(map(partial(on_record, store), trials[2:]))


def test_a_failed_run_is_made_once_more_at_the_same_time_as_others(tmp_path):
    store = Store(tmp_path, {})
    machine = Side(store, MadeUp(CELLS, fails=[("random", 0.1)]))
    trials = [Trial(("random", 0.1), 0.1, seed) for seed in range(3)]
    for retry, made in ((False, 3), (False, 3), (True, 6)):
        with closing(Stored(store, machine.run_of, machine.make, retry, at_once=2)) as source:
            source.expect(trials[1:])
            assert [source(trial).error for trial in trials] == ["ValueError: as told"] * 3
        assert machine.made == made
    store.close()
