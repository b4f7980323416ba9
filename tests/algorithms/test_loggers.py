"""What Composer's loggers write of a run: all metrics of the steps, by their names, values and steps, and pictures.

Those of MLflow and W&B run where these are installed: ``pip install 'mosaicml[mlflow,wandb]'``.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict

import pytest
from cases import CONV, ON, fit
from composer.loggers import LoggerDestination, MLFlowLogger, TensorboardLogger, WandBLogger
from on_device import OnDevice

from composer_gradmatch import GradMatch, ImportanceBackprop, SelectionImages

#: The second logs a step when it is over, as on a GPU.
ALGORITHMS = {"host": GradMatch, "device": OnDevice, "importance": ImportanceBackprop}
each_algorithm = pytest.mark.parametrize(
    "algorithm", [each(**ON, keep=0.3) for each in ALGORITHMS.values()], ids=ALGORITHMS.keys()
)


class Recorder(LoggerDestination):
    """Keeps what is logged: name → step → value."""

    def __init__(self):
        self.values = defaultdict(dict)

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            self.values[name][step] = float(value)


def train(logger, algorithm):
    """Trains with a logger; returns the algorithm's own metrics, by name and step."""
    recorder = Recorder()
    arguments = {"loggers": [logger, recorder], "callbacks": [SelectionImages()], "max_duration": "2ep"}
    fit([algorithm], CONV.model(), CONV.data(60), **arguments).close()
    own = {name: values for name, values in recorder.values.items() if name.startswith(algorithm.log_name)}
    assert len(own) >= 10
    return own


def assert_written(found, expected):
    """Both map names to values by step; Composer's own metrics may be there, too."""
    for name, values in expected.items():
        assert found[name].keys() == values.keys(), name
        assert list(found[name].values()) == pytest.approx(list(values.values()), rel=1e-6, nan_ok=True), name


@each_algorithm
def test_tensorboard(algorithm, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = train(TensorboardLogger(str(tmp_path)), algorithm)
    (run,) = tmp_path.iterdir()
    events = EventAccumulator(str(run)).Reload()
    found = {tag: {each.step: each.value for each in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert_written(found, expected)
    pictures = events.Images(f"{algorithm.log_name}/selection")
    assert [(each.step, each.width > each.height > 400) for each in pictures] == [(0, True), (3, True)]


@each_algorithm
def test_mlflow(algorithm, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    uri = f"file://{tmp_path}"
    # By Composer's default a value that has not changed is written each hundredth step alone.
    logger = MLFlowLogger("selection", "run", tracking_uri=uri, log_duplicated_metric_every_n_steps=1)
    expected = train(logger, algorithm)
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("selection").experiment_id])
    found = {
        name: {each.step: each.value for each in client.get_metric_history(run.info.run_id, name)}
        for name in run.data.metrics
    }
    assert_written(found, expected)
    pictures = [each.path for each in client.list_artifacts(run.info.run_id, "images") if "thumb" not in each.path]
    assert len([each for each in pictures if "selection" in each and each.endswith(".png")]) == 2, pictures


@each_algorithm
def test_wandb_offline(algorithm, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    expected = train(WandBLogger(init_kwargs={"dir": str(tmp_path)}), algorithm)
    wandb.teardown()  # Its process has written all of it.
    (written,) = tmp_path.rglob("run-*.wandb")
    store, found, pictures = DataStore(), {}, {}
    store.open_for_scan(str(written))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            value = json.loads(item.value_json)
            if isinstance(value, float | int):
                found.setdefault(name, {})[record.history.step.num] = value
            elif value == "NaN":
                found.setdefault(name, {})[record.history.step.num] = math.nan
            elif name == f"{algorithm.log_name}/selection/filenames":
                pictures[record.history.step.num] = value
    assert_written(found, expected)
    assert pictures.keys() == {0, 3}
    assert all((written.parent / "files" / file).is_file() for (file,) in pictures.values())
