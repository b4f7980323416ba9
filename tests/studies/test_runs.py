"""Records, workers and the command line: atomic, resumable, one study a folder."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tasks_for_workers import behave

from composer_gradmatch.studies.__main__ import main
from composer_gradmatch.studies.accuracy.plan import plan_accuracy, scaled_batch_size
from composer_gradmatch.studies.engines.engine import run_all
from composer_gradmatch.studies.engines.local import Local
from composer_gradmatch.studies.planning import identity
from composer_gradmatch.studies.store import Record, Run, Store, write_atomically
from composer_gradmatch.train.builders import build_algorithms
from composer_gradmatch.train.config import ConfigError, load_config

DIGITS = str(Path(__file__).resolve().parents[2] / "configs" / "digits.yaml")
MINILM = str(Path(DIGITS).with_name("imdb_minilm.yaml"))
CIFAR = str(Path(DIGITS).with_name("cifar10_resnet18.yaml"))


def record(run, error="", **row):
    rows = [] if error else [row]
    return Record(run.kind, run.settings, run.config, rows, error, {"machine": "m", "python": "3"}, 1.0)


def test_a_failing_and_a_dying_run_are_recorded_and_the_others_go_on(tmp_path):
    runs = [Run("test", {"how": how, "n": i}, {}) for i, how in enumerate(["fine", "fail", "fine", "die", "fine"])]
    with closing(Local(2)) as engine:
        records = {run.key: record for run, record in run_all(engine, behave, runs, tmp_path)}
    by_run = [records[run.key] for run in runs]
    assert [r.rows for r in by_run] == [[{"answer": 42}], [], [{"answer": 42}], [], [{"answer": 42}]]
    assert by_run[1].error == "ValueError: as told"
    assert "process died" in by_run[3].error
    assert [bool(r.error) for r in by_run] == [False, True, False, True, False]
    assert "said by fail" in (tmp_path / f"{runs[1].key}.log").read_text()
    assert 'raise ValueError("as told")' in (tmp_path / f"{runs[1].key}.log").read_text()
    assert by_run[0].provenance["torch version"]


def test_a_folder_holds_one_study_and_one_worker_at_a_time(tmp_path):
    identity = {"study": "accuracy", "config": {"optimizer": {"lr": 0.1}}}
    first = Store(tmp_path, identity)
    with pytest.raises(ConfigError, match="another study is working in this folder"):
        Store(tmp_path, identity)
    first.close()
    with pytest.raises(ConfigError, match=r"holds another study; different: config.optimizer.lr \(0.1, now 0.2\)"):
        Store(tmp_path, {"study": "accuracy", "config": {"optimizer": {"lr": 0.2}}})
    Store(tmp_path, identity).close()


def test_a_killed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.md"
    write_atomically(path, "old")

    def kill(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, "new and long")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_runs_have_their_row_and_are_made_again_only_when_asked(tmp_path):
    store = Store(tmp_path, {})
    good, bad = Run("k", {"strategy": "a", "seed": 0}, {"x": 1}), Run("k", {"strategy": "b", "seed": 0}, {"x": 1})
    store.save(good, record(good, accuracy=0.5))
    store.save(bad, record(bad, error="out of luck"))
    assert store.has(bad)
    assert not store.has(bad, retry_failed=True)
    assert store.has(good, retry_failed=True)
    rows = list(csv.DictReader(store.write_table("k", "results.csv").open()))
    assert [(row["strategy"], row["status"], row["accuracy"], row["error"]) for row in rows] == [
        ("a", "done", "0.5", ""),
        ("b", "failed", "", "out of luck"),
    ]
    assert json.loads(rows[0]["config"]) == {"x": 1}
    store.close()


def test_different_settings_have_different_files():
    settings = [{"keep": 0.1, "seed": 0}, {"keep": 0.1, "seed": 1}, {"keep": 0.11, "seed": 0}, {"seed": 0}]
    keys = {Run("accuracy", each, {}).key for each in settings}
    assert len(keys) == len(settings)
    assert all(set(key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._") for key in keys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["accuracy", DIGITS, "optimizer.lrr=1"], "optimizer.lrr: unknown key; did you mean 'lr'"),
        (["accuracy", DIGITS, "train_loader.dataset.split=valid"], "train_loader.dataset.split"),
        (["accuracy", DIGITS, "eval_loader=null"], "eval_loader: missing; the study compares test accuracy"),
        (["accuracy", DIGITS, "--metric", "F1"], "no evaluation metric F1; it has CrossEntropy, MulticlassAccuracy"),
        (["accuracy", DIGITS, "--batch-size", "scaled", "max_duration=9ba"], "scaled: max_duration='9ba' counts steps"),
        (["accuracy", DIGITS, "--batch-size", "scaled", "--keep", "0.05"], "no batch of 2560 with drop_last"),
        (["accuracy", DIGITS, "algorithms.loss_backprop={}"], "has gradmatch and loss_backprop"),
        (["accuracy", DIGITS, "algorithms.gradmatch.solver=lasso"], "solver"),
        (["learning-rate", DIGITS, "--factors", "100"], "β=100 shortens max_duration=30ep to nothing"),
        (["accuracy", "configs/none.yaml"], "There is no config file"),
        (["accuracy", CIFAR], "train_loader: The data set is not at data/cifar-10-batches-py"),
        (["gradient-error", DIGITS, "--checkpoint", "none.pt"], "--checkpoint: there is no file none.pt"),
        (["gradient-error", DIGITS, "--after", "0", "40"], "--after: 40 epochs are more than max_duration=30ep"),
        (["gradient-error", CIFAR, "--against", "minibatch"], "GiB, and at most 4 are used"),
        (["step-time", MINILM], "Composer's SelectiveBackprop takes no HuggingFace model"),
        (["accuracy", MINILM, "--strategies", "selective_backprop"], "Leave selective_backprop out"),
        (["step-time", MINILM, "--synthetic"], "texts are timed with their data"),
    ],
)
def test_what_cannot_be_run_is_told_before_any_work(arguments, expected, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["accuracy", DIGITS, "--strategies", "gradmach"], "did you mean 'gradmatch'"),
        (["accuracy", DIGITS, "--keep", "1.5"], "a fraction in (0, 1), got '1.5'"),
        (["accuracy", DIGITS, "--label-noise", "10"], "a fraction in [0, 1], got '10'"),
        (["gradient-error", DIGITS, "--after", "-1"], "a number of epochs, 0 or more, got '-1'"),
        (["accuracy", DIGITS, "--seeds", "0"], "a positive integer, got '0'"),
    ],
)
def test_wrong_options_are_refused(arguments, expected, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(tmp_path)])
    assert expected in capsys.readouterr().err


def test_the_launcher_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["accuracy", DIGITS, "--out", str(tmp_path)]) == 2
    assert "run it without the launcher" in capsys.readouterr().err


def test_a_model_can_be_timed_without_its_data(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--synthetic", "--strategies", "random", "full", "--keep", "0.5", "--rounds", "1"]
    assert main(["step-time", CIFAR, "global_train_batch_size=4", *arguments, "--out", str(out)]) == 0
    assert "random tensors in the place of data" in capsys.readouterr().out
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert {(row["strategy"], row["synthetic"]) for row in rows} == {("random", "True"), ("full", "True")}
    assert (out / "step_time.png").stat().st_size > 10_000


def study(out, max_duration="1ep"):
    """Four runs on one process."""
    return [
        *(sys.executable, "-m", "composer_gradmatch.studies", "accuracy", DIGITS, "--out", str(out)),
        *("--strategies", "random", "full", "--keep", "0.1", "--seeds", "2", "--rounds", "1"),
        f"max_duration={max_duration}",
    ]


def save_timing(out, max_duration):
    """Leaves the folder as that study does once it has timed its steps."""
    config = load_config(DIGITS, [f"max_duration={max_duration}"])
    plan = plan_accuracy(config, ["random", "full"], [0.1], seeds=2, rounds=1)
    store = Store(out, identity("accuracy", config, **plan.shared))
    store.save(plan.alone[0], record(plan.alone[0], strategy="full"))
    store.close()


def start_study_and_wait(command, out, pattern, count):
    """The process, once ``count`` files match."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while len(list(out.glob(pattern))) < count:
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            pytest.fail(f"there are no {count} {pattern}: {process.communicate()[1]}")
        time.sleep(0.01)
    return process


def stop_study(process, how):
    """Sends a signal; returns when the process and its workers, which must end with it, are gone."""
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")  # Threads start the workers.
    children = [pid for each in tasks for pid in each.read_text().split()]
    assert children
    process.send_signal(how)
    _, errors = process.communicate(timeout=20)
    deadline = time.monotonic() + 20
    while any(map(alive, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return errors


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_study_told_to_stop_stops_at_once(how, tmp_path):
    out = tmp_path / "out"
    save_timing(out, "100000ep")
    process = start_study_and_wait(study(out, "100000ep"), out, "logs/accuracy-*.log", 1)
    assert "The same command goes on from here" in stop_study(process, how)
    assert process.returncode == 128 + how
    assert [path.name[:9] for path in out.glob("runs/*.json")] == ["step-time"]
    assert not list(out.glob("logs/step-time*"))


class ReadByNobody(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def test_a_study_stops_where_nobody_reads_what_it_says(tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise SystemExit(143)

    codes = []
    monkeypatch.setattr("composer_gradmatch.studies.run_study.run_study", stop)
    monkeypatch.setattr(os, "_exit", codes.append)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", ReadByNobody())
        with pytest.raises(BrokenPipeError):
            main(["accuracy", DIGITS, "--out", str(tmp_path)])
    assert codes == [143]


def test_a_killed_study_loses_nothing_and_goes_on_with_the_missing_runs(tmp_path):
    out = tmp_path / "out"
    process = start_study_and_wait(study(out), out, "runs/accuracy-*.json", 2)
    stop_study(process, signal.SIGKILL)
    done = {path: path.stat().st_mtime_ns for path in out.glob("runs/*.json")}
    assert all(json.loads(path.read_text())["rows"] for path in done)
    assert 3 <= len(done) <= 5

    finished = subprocess.run(study(out), capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert sorted((row["strategy"], row["seed"]) for row in rows) == [
        (s, str(i)) for s in ("full", "random") for i in range(2)
    ]
    assert {row["samples_forwarded"] for row in rows} == {str(11 * 128)}
    assert {row["samples_backpropagated"] for row in rows if row["strategy"] == "random"} == {str(11 * 12)}
    assert all(float(row["best_accuracy"]) >= float(row["last_accuracy"]) for row in rows)
    assert {row["git revision"] for row in rows} != {""}
    summary = (out / "summary.md").read_text()
    assert "4 runs succeeded, 0 failed" in summary
    assert "can tell very little" in summary or "## Verdict" in summary
    for figure in ("accuracy", "accuracy_over_cost"):
        assert (out / f"{figure}.png").stat().st_size > 10_000
        assert (out / f"{figure}.pdf").read_bytes().startswith(b"%PDF")


STUDY = {"study": "x"}


def stored(folder):
    """A folder with the records of two runs."""
    runs = [Run("k", {"seed": seed}, {}) for seed in range(2)]
    store = Store(folder, STUDY)
    for run in runs:
        store.save(run, record(run, accuracy=0.5))
    store.close()
    return runs


DAMAGES = {
    "empty": lambda text: "",
    "cut off": lambda text: text[:20],
    "cut off late": lambda text: text[:-1],
    "zeros": lambda text: "\0" * len(text),
    "no mapping": lambda text: "[]",
    "another mapping": lambda text: "{}",
    "null": lambda text: "null",
    "a field missing": lambda text: text.replace('"rows"', '"lines"'),
    "a field of another type": lambda text: text.replace('"error": ""', '"error": null'),
    "rows that are none": lambda text: text.replace('{"accuracy": 0.5}', "3"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_record_is_set_aside_and_its_run_made_again(damage, tmp_path, capsys):
    good, bad = stored(tmp_path)
    store = Store(tmp_path, STUDY)
    path = store.path(bad)
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    assert store.has(good)
    assert not store.has(bad)
    assert f"{path} is damaged and counts as not made; it is now {path.stem}.damaged" in capsys.readouterr().err
    assert path.with_suffix(".damaged").read_text() == damage(text)
    assert len(store.records("k")) == 1
    store.save(bad, record(bad, accuracy=0.25))
    assert [row.rows for row in store.records("k")] == [[{"accuracy": 0.5}], [{"accuracy": 0.25}]]
    path.write_bytes(b"\xff\xfe")
    assert not store.has(bad, retry_failed=True)
    assert path.with_suffix(".damaged2").read_bytes() == b"\xff\xfe"
    assert path.with_suffix(".damaged").read_text() == damage(text)
    store.close()


def test_a_record_that_is_damaged_meanwhile_does_not_end_the_report(tmp_path, capsys):
    _, bad = stored(tmp_path)
    store = Store(tmp_path, STUDY)
    store.path(bad).write_text("")
    rows = list(csv.DictReader(store.write_table("k", "results.csv").open()))
    assert [row["seed"] for row in rows] == ["0"]
    assert "is damaged" in capsys.readouterr().err
    store.close()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\0\0", '"study"'])
def test_a_damaged_study_is_told_with_its_file_and_what_to_do(text, tmp_path):
    stored(tmp_path)
    path = tmp_path / "study.json"
    path.write_text(text)
    for _ in range(2):  # The lock is let go.
        with pytest.raises(ConfigError, match=r"study\.json is damaged.*delete that file") as caught:
            Store(tmp_path, STUDY)
        assert str(path) in str(caught.value)
    path.unlink()
    store = Store(tmp_path, STUDY)
    assert len(store.records("k")) == 2
    store.close()


@pytest.mark.parametrize("folder", ["file", "file/out", "a" * 300])
def test_a_folder_that_is_none_is_told_before_any_work(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / folder)
    assert main(["accuracy", DIGITS, "--out", out]) == 2
    assert f"--out {out}: cannot work in this folder" in capsys.readouterr().err


@pytest.mark.parametrize("error", [PermissionError(13, "no"), OSError(30, "read-only"), OSError(28, "no space")])
@pytest.mark.parametrize("where", ["lock", "study.json"])
def test_a_folder_that_cannot_be_written_to_is_told_and_let_go(error, where, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    target = "FileLock.acquire" if where == "lock" else "write_atomically"
    with monkeypatch.context() as patch:
        patch.setattr(f"composer_gradmatch.studies.store.{target}", fail)
        with pytest.raises(ConfigError, match=r"cannot work in this folder \(.*choose another --out"):
            Store(tmp_path, STUDY)
    Store(tmp_path, STUDY).close()


def test_a_lock_that_cannot_be_made(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(ConfigError, match="cannot work in this folder"):
        Store(tmp_path, STUDY)


def test_a_disk_that_fills_up_ends_a_study_with_an_error(tmp_path, monkeypatch):
    (run, _) = stored(tmp_path)
    store = Store(tmp_path, STUDY)

    def fail(*args):
        raise OSError(28, "No space left on device")

    before = store.path(run).read_text()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConfigError, match=f"--out {tmp_path}: .*No space left"):
        store.save(run, record(run, accuracy=1.0))
    with pytest.raises(ConfigError, match="No space left"):
        store.write_table("k", "results.csv")
    assert store.path(run).read_text() == before
    store.close()


@given(base=st.integers(1, 4096), keep=st.one_of(st.floats(0.001, 1.0), st.integers(1, 100).map(lambda n: n / 100)))
def test_a_scaled_batch_is_the_smallest_of_which_base_is_kept(base, keep):
    size = scaled_batch_size(base, keep)
    assert max(1, int(keep * size)) == base
    assert size == 1 or int(keep * (size - 1)) < base


def test_scaled_batches_at_the_shipped_keeps():
    sizes = [scaled_batch_size(64, keep) for keep in (0.05, 0.1, 0.3, 0.5)]
    assert sizes == [1280, 640, 214, 128]
    for base in range(1, 1025):
        for keep in (0.05, 0.07, 0.1, 0.15, 0.2, 0.29, 0.3, 0.57, 0.7, 0.9, 0.99):
            assert int(keep * scaled_batch_size(base, keep)) == base


@pytest.mark.parametrize("strategy", ["gradmatch", "loss", "random", "selective_backprop"])
@pytest.mark.parametrize(("base", "keep"), [(64, 0.3), (7, 0.29), (1, 0.1)])
def test_the_plan_and_its_algorithm_keep_the_base(strategy, base, keep):
    config = load_config(DIGITS, [f"global_train_batch_size={base}"])
    (run,) = plan_accuracy(config, [strategy], [keep], seeds=1, batch_size="scaled", rounds=1).runs
    size = run.config["global_train_batch_size"]
    (algorithm,) = build_algorithms(run.config["algorithms"])
    assert max(1, int(algorithm.keep * size)) == base
    assert max(1, int(algorithm.keep * (size - 1))) < base or base == 1
