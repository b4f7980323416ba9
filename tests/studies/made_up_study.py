"""A study in one file, which a worker process imports by name."""

from __future__ import annotations

from composer_gradmatch.studies.configs import quiet
from composer_gradmatch.studies.options import add_seeds
from composer_gradmatch.studies.planning import cells
from composer_gradmatch.studies.store import Run
from composer_gradmatch.studies.study import Plan, Study
from composer_gradmatch.studies.tables import cell_order, frame, markdown


def add_options(parser):
    add_seeds(parser)
    parser.add_argument("--answer", type=int, default=42, help="the answer; default: 42")


def plan(config, strategies, keeps, *, seeds, answer, label_noise):
    runs = [
        Run("made-up", {"strategy": s, "keep": k, "seed": seed}, quiet(config, "made-up"), {"answer": answer})
        for seed in range(seeds)
        for s, k in cells(strategies, keeps)
    ]
    return Plan(runs, {"answer": answer})


def task(run):
    if run.settings["strategy"] == "full":
        raise ValueError("as told")
    return [{"product": run.options["answer"] * run.settings["keep"]}], {}


def report(store, name):
    data = frame(store.records("made-up"))
    (store.folder / "made_up.png").write_bytes(b"a figure")
    return [f"# {name}", *markdown(["strategy", "keep"], cell_order(data))]


STUDY = Study(
    name="made-up",
    help="what the answer comes to",
    strategies=("random", "full"),
    keeps=(0.5,),
    options=add_options,
    plan="made_up_study:plan",
    task="made_up_study:task",
    report="made_up_study:report",
)
