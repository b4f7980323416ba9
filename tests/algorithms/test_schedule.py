"""When selection begins and ends: by Composer's clock, which counts whole epochs, with a word where that is far off."""

from __future__ import annotations

import warnings

import pytest
from cases import MLP, loader, make_trainer
from composer.loggers import InMemoryLogger
from selecting import SELECTING

from composer_gradmatch import RandomBackprop, select_first

BATCHES = 10  # Of an epoch.


def selected(algorithm, max_duration, **kwargs):
    """The batches that were selected from, and the warnings of ours."""
    log = InMemoryLogger()
    train = loader(MLP.data(4 * BATCHES), 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(
            MLP.model(),
            train,
            [algorithm],
            max_duration=max_duration,
            loggers=log,
            algorithm_passes=[select_first],
            **kwargs,
        ).fit()
    batches = [int(time.batch) for time, _ in log.data.get(f"{algorithm.log_name}/fraction_kept", [])]
    return batches, [str(each.message) for each in caught if "counted in whole epochs" in str(each.message)]


@pytest.mark.parametrize("algorithm_class", SELECTING)
@pytest.mark.parametrize(
    ("max_duration", "start", "end", "batches", "said"),
    [
        ("1ep", 0.5, 0.9, [], "no batch at all"),
        ("2ep", 0.5, 0.9, list(range(10, 20)), "from 0.50 to 1.00 of training, 10 of 20 batches"),
        ("3ep", 0.0, 0.5, list(range(20)), "from 0.00 to 0.67"),
        ("2ep", 0.5, 1.0, list(range(10, 20)), None),
        ("1ep", 0.0, 1.0, list(range(10)), None),
        ("20ba", 0.5, 0.9, list(range(10, 18)), None),
        ("80sp", 0.5, 0.9, list(range(10, 18)), None),
    ],
)
def test_start_and_end_by_the_unit_of_max_duration(algorithm_class, max_duration, start, end, batches, said):
    found, remarks = selected(algorithm_class(start, end, 0.5, interrupt=0), max_duration)
    assert found == batches
    assert len(remarks) == (said is not None)
    assert all(said in remark and "clock='batch'" in remark for remark in remarks)


@pytest.mark.parametrize("algorithm_class", SELECTING)
@pytest.mark.parametrize(("max_duration", "batches"), [("1ep", range(5, 9)), ("2ep", range(10, 18))])
def test_the_clock_that_counts_batches(algorithm_class, max_duration, batches):
    found, remarks = selected(algorithm_class(0.5, 0.9, 0.5, interrupt=0, clock="batch"), max_duration)
    assert found == list(batches)
    assert remarks == []


def test_every_second_batch_is_trained_whole_by_either_clock():
    found, _ = selected(RandomBackprop(0.5, 0.9, 0.5, interrupt=2, clock="batch"), "2ep")
    assert found == [10, 12, 14, 16]


def test_nothing_is_said_where_nothing_is_selected():
    assert selected(RandomBackprop(0.5, 0.9, keep=1.0), "1ep") == ([], [])


@pytest.mark.parametrize("algorithm_class", SELECTING)
def test_another_clock_is_refused(algorithm_class):
    with pytest.raises(ValueError, match=r"clock must be 'duration'.* or 'batch'.*got 'epoch'"):
        algorithm_class(clock="epoch")
