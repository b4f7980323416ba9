"""The table of logged metrics and what is logged: each strategy logs what the table says, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cases import MLP, ON, loader, make_trainer
from composer.loggers import InMemoryLogger
from composer.utils import dist
from on_device import OnDevice
from selecting import RULES
from torch.utils.data import DataLoader

import composer_gradmatch
from composer_gradmatch import GradMatch, number_samples, select_first
from composer_gradmatch.train.registry import resolve

README = Path(composer_gradmatch.__file__).parent / "algorithms" / "README.md"
#: Who logs a metric, in the table's words → whether a rule's run does, with a store of looks, and with suspects.
WHO = {
    "all": lambda rule, refresh, suspects: True,
    "all, below M picks": lambda rule, refresh, suspects: True,
    "looks": lambda rule, refresh, suspects: rule.needs != "nothing" or suspects,
    "`gradmatch`": lambda rule, refresh, suspects: rule.name == "gradmatch",
    "`infobatch`, `kakurenbo`": lambda rule, refresh, suspects: rule.name in ("infobatch", "kakurenbo"),
    "`importance_backprop`": lambda rule, refresh, suspects: rule.name == "importance_backprop" and not refresh,
    "with `refresh`": lambda rule, refresh, suspects: refresh,
    "with `suspects`": lambda rule, refresh, suspects: suspects,
    "where one is": lambda rule, refresh, suspects: False,
    "`gradmatch` on a GPU, where one is": lambda rule, refresh, suspects: False,
}


def documented():
    """The rows of the table: metric → who logs it."""
    text = README.read_text()
    table = text[text.index("| metric | logged by | meaning |") :].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \|$", table, re.MULTILINE)
    assert len(rows) == len(dict(rows)) == len(table.splitlines()) - 2, "each row is of one metric"
    return dict(rows)


def logged(algorithm, data=None, batches="12ba", lr=0.01):
    """The names that a run logs, all but Composer's own; each is the algorithm's name and a metric's."""
    logger = InMemoryLogger()
    data = number_samples(MLP.data(60) if data is None else data)
    if getattr(algorithm, "refresh", None) is None:
        train = loader(data.dataset, 20)
    else:
        train = DataLoader(data, 20, sampler=dist.get_sampler(data, shuffle=False), collate_fn=data.collate_fn)
    arguments = {"algorithm_passes": [select_first], "loggers": [logger], "max_duration": batches, "lr": lr}
    make_trainer(MLP.model(), train, [algorithm], **arguments).fit()
    composers = ("loss/", "metrics/", "time/", "trainer/")
    names = [name.split("/") for name in logger.data if not name.startswith(composers)]
    assert {name for name, *_ in names} <= {algorithm.log_name}
    return {metric for _, metric in names}


STORES = {"": {}, "refresh": {"refresh": "1ep"}}
STORES["suspects"] = {**STORES["refresh"], "suspects": {"margin": 0.999, "after": "1ep"}}
#: What looks at nothing has no use for a store without suspects.
RUNS = [(name, store) for name in RULES for store in STORES if store != "refresh" or RULES[name].needs != "nothing"]


@pytest.mark.parametrize(("name", "store"), RUNS)
def test_a_strategy_logs_what_the_table_says_and_nothing_else(name, store):
    options = STORES[store]
    assert logged(resolve("algorithm", name)(**ON, keep=0.3, **options)) == {
        metric
        for metric, who in documented().items()
        if WHO[who](RULES[name], "refresh" in options, "suspects" in options)
    }


def test_minibatches_that_cannot_be_selected_from_or_matched_are_logged_under_the_tables_names():
    data = MLP.data(60)
    data.tensors[0][3] = float("nan")
    table = documented()
    with pytest.warns(UserWarning, match="not finite"):
        of_host = logged(GradMatch(**ON, keep=0.3), data, lr=0.0) - logged(GradMatch(**ON, keep=0.3))
    assert of_host == {metric for metric, who in table.items() if who == "where one is"}
    with pytest.warns(UserWarning, match="not finite"):
        of_device = logged(OnDevice(**ON, keep=0.3), data, lr=0.0) - logged(GradMatch(**ON, keep=0.3))
    assert of_device == {metric for metric, who in table.items() if who.startswith("`gradmatch` on a GPU")}


def test_each_word_of_who_logs_is_used():
    assert set(documented().values()) == set(WHO)
