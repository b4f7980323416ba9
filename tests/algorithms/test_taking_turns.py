"""Two selecting algorithms in one Trainer, one after the other."""

from __future__ import annotations

from functools import partial

import pandas as pd
import pytest
import torch
from cases import BATCHNORM, MLP, On, make_trainer
from composer import Event
from composer.algorithms import SelectiveBackprop
from composer.utils import dist
from torch.utils.data import DataLoader

from composer_gradmatch import GradMatch, LossBackprop, RandomBackprop, RuleBackprop, SelectionLog, select_first
from composer_gradmatch import number_samples as numbered

N, BATCH = 60, 20
EARLY = {"start": 0.0, "end": 0.5, "interrupt": 0}
LATE = {"start": 0.5, "end": 1.0, "interrupt": 0}


def trainer_of(algorithms, *, numbers=True, case=MLP, **kwargs):
    data = numbered(case.data(N)) if numbers else case.data(N)
    collate = {"collate_fn": data.collate_fn} if numbers else {}
    train = DataLoader(data, BATCH, sampler=dist.get_sampler(data, shuffle=True), **collate)
    arguments = {"max_duration": "4ep", "algorithm_passes": [select_first], "seed": 5, **kwargs}
    return make_trainer(case.model(), train, algorithms, **arguments)


MAKERS = {
    "random": partial(RandomBackprop, keep=0.25),
    "stratified": partial(RuleBackprop, "stratified", keep=0.25),
    "gradmatch": partial(GradMatch, keep=0.25),
    "selective": partial(SelectiveBackprop, keep=0.25),
}
STORED = {
    "gradmatch": partial(GradMatch, keep=0.3, refresh="1ep"),
    "losses": partial(LossBackprop, keep=0.3, refresh="1ep", suspects={"after": "9ep"}),
}


@pytest.mark.parametrize("passes", [[select_first], None], ids=["first", "as listed"])
@pytest.mark.parametrize("stored_first", [True, False])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("other", MAKERS)
def test_each_selects_in_its_time_as_it_would_alone(other, stored, stored_first, passes):
    """Whichever stands first, the one with a store sees whole minibatches, and picks by their own numbers."""
    one, two = STORED[stored](**LATE), MAKERS[other](**EARLY)
    data, kept = MLP.data(N), []

    def note(state):
        assert len(state.batch) == 2
        kept.append(len(state.batch[0]))
        if len(kept) > 6:
            store = one.selector.store
            assert len(store.numbers) == BATCH
            picks = store.numbers[one.last_selection.indices]
            assert torch.equal(state.batch[0], data.tensors[0][picks])

    noting = On(Event.BATCH_START, note)
    trainer_of([one, two, noting] if stored_first else [two, one, noting], algorithm_passes=passes).fit()
    assert kept == [5] * 6 + [6] * 6
    assert one.batches_trained_whole == 0
    store = one.selector.store.store
    assert (store.stamps >= 2).all()


def test_what_the_second_does_is_what_it_does_alone_from_the_same_weights(tmp_path):
    def run(algorithms, **kwargs):
        trainer = trainer_of(algorithms, run_name="r", **kwargs)
        trainer.fit()
        trainer.close()
        return trainer.state.model.state_dict()

    both = [RandomBackprop(**EARLY, keep=0.25), GradMatch(**LATE, keep=0.3, refresh="1ep")]
    found = run(both, save_folder=str(tmp_path), save_interval="2ep")
    path = str(next(tmp_path.glob("ep2-*.pt")))
    alone = run([GradMatch(**LATE, keep=0.3)], numbers=False, load_path=path, load_ignore_keys=["state/algorithms"])
    for key in found:
        assert torch.equal(found[key], alone[key]), key


def test_weights_of_one_are_none_of_the_others():
    """With weights in both halves, and a first batch that the other one picks from."""
    algorithms = [GradMatch(**LATE, keep=0.3), RuleBackprop("stratified", **EARLY, keep=0.25)]
    seen = []
    note = On(Event.AFTER_LOSS, lambda state: seen.append([a._rows.has_weights for a in algorithms]))
    trainer_of([*algorithms, note], device_train_microbatch_size=2).fit()
    assert {tuple(each) for each in seen[: len(seen) // 3]} == {(False, True)}
    assert seen[-1] == [True, False]


def test_ones_stored_looks_after_anothers():
    first, second = GradMatch(**EARLY, keep=0.3, refresh="2ep"), LossBackprop(**LATE, keep=0.3, refresh="2ep")
    trainer_of([first, second], case=BATCHNORM).fit()
    assert (first.selector.store.store.stamps < 2).all()
    assert (second.selector.store.store.stamps >= 2).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: [GradMatch(**EARLY, keep=0.3, refresh="2ep"), GradMatch(**LATE, keep=0.3, refresh="2ep")],
        lambda: [
            RuleBackprop("loss_backprop", **EARLY, keep=0.3, options={"history": 50}),
            RuleBackprop("infobatch", **LATE, keep=1.0, refresh="2ep"),
        ],
    ],
    ids=["same rule", "other rules"],
)
def test_two_of_one_class_resume_each_from_its_own_state(make, tmp_path):
    """Of which a checkpoint has but one name."""

    def run(algorithms, **kwargs):
        trainer = trainer_of(algorithms, run_name="r", **kwargs)
        trainer.fit()
        trainer.close()
        return trainer.state.model.state_dict()

    whole = run(make())
    run(make(), save_folder=str(tmp_path), save_interval="1ba")
    for batch in (5, 8):  # In the first one's half, and in the second one's.
        resumed = run(make(), load_path=str(next(tmp_path.glob(f"ep*-ba{batch}-*.pt"))))
        for key in whole:
            assert torch.equal(whole[key], resumed[key]), (batch, key)


def test_a_checkpoint_of_one_is_taken_by_the_one_that_it_is_of(tmp_path):
    """And one of two by either of them alone."""
    early, late = partial(RuleBackprop, "top_loss", **EARLY), partial(RuleBackprop, "grand", **LATE)
    options = {"keep": 0.3, "refresh": "9ep"}
    trainer_of([early(**options)], run_name="r", save_folder=str(tmp_path / "one"), max_duration="2ep").fit()
    path = str(next((tmp_path / "one").glob("ep2-*.pt")))
    both = [late(**options), early(**options)]
    trainer_of(both, load_path=path, save_folder=str(tmp_path / "two"))
    assert [len(each.selector.store.state_dict()) for each in both] == [0, len(both[1].selector.store.state_dict())]
    assert both[1].selector.store.state_dict()


def test_an_algorithm_without_a_state_of_its_own_in_a_checkpoint_is_told_of(tmp_path):
    options = {"keep": 0.3, "refresh": "9ep"}
    both = [RuleBackprop("top_loss", **EARLY, **options), RuleBackprop("grand", **LATE, **options)]
    trainer_of(both, run_name="r", save_folder=str(tmp_path), max_duration="2ep").fit()
    path = str(next(tmp_path.glob("ep2-*.pt")))
    with pytest.warns(UserWarning, match="no state of an algorithm with log_name='el2n': it begins anew"):
        trainer_of([RuleBackprop("el2n", **EARLY, **options)], load_path=path)


def test_the_log_is_of_all_that_select(tmp_path):
    algorithms = [RandomBackprop(**EARLY, keep=0.25), GradMatch(**LATE, keep=0.3, refresh="1ep")]
    trainer_of(algorithms, callbacks=[SelectionLog(str(tmp_path))]).fit()
    for epoch, picked in ((1, 15), (2, 15), (3, 18), (4, 18)):
        log = pd.read_parquet(tmp_path / f"ep{epoch}.parquet")
        assert log["visits"].tolist() == [1] * N
        assert log["picked"].sum() == picked


@pytest.mark.parametrize("other", [RandomBackprop, SelectiveBackprop])
def test_intervals_that_overlap_by_their_clocks_are_refused(other):
    """Epochs 0 and 1 of 3 are the first half by whole epochs; by batches, it ends in epoch 1."""
    algorithms = [GradMatch(**LATE, keep=0.3, clock="batch"), other(**EARLY, keep=0.3)]
    with pytest.raises(ValueError, match=r"clocks 'batch' and 'duration'.*the same clock"):
        trainer_of(algorithms, numbers=False, max_duration="3ep").fit()
    trainer_of(algorithms, numbers=False, max_duration="4ep").fit()
    trainer_of(algorithms, numbers=False, max_duration="9ba").fit()


def test_without_the_pass_no_warning_is_of_one_that_selects_at_other_times():
    algorithms = [GradMatch(**EARLY, keep=0.3), RandomBackprop(**LATE, keep=0.3)]
    trainer_of(algorithms, numbers=False, algorithm_passes=None).fit()
