"""An interrupted and resumed run ends with the weights of the uninterrupted one, bit for bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import BATCHNORM, MLP, loader, make_trainer
from selecting import SELECTING

from composer_gradmatch import GradMatch, ImportanceBackprop, LossBackprop, select_first

ON = {"start": 0.0, "end": 1.0, "keep": 0.4, "interrupt": 0}


@pytest.mark.parametrize(
    "make",
    [
        *SELECTING,
        pytest.param(partial(LossBackprop, history=30), id="loss_backprop with a history"),
        pytest.param(ImportanceBackprop, id="importance_backprop that goes on and off"),
    ],
)
def test_resuming_in_mid_epoch(make, tmp_path):
    def run(max_duration, **kwargs):
        model = BATCHNORM.model()
        algorithm = make(**ON)
        trainer = make_trainer(
            model,
            loader(BATCHNORM.data(60), 20, shuffle=True),
            [algorithm],
            max_duration=max_duration,
            algorithm_passes=[select_first],
            device_train_microbatch_size=3,
            seed=3,
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            run_name="resume",
            **kwargs,
        )
        trainer.fit()
        trainer.close()
        return model.state_dict(), algorithm

    whole, _ = run("3ep")
    run("3ep", save_folder=str(tmp_path), save_interval="1ba", train_subset_num_batches=-1)
    checkpoint = next(tmp_path.glob("ep1-ba5-*.pt"))
    resumed, _ = run("3ep", load_path=str(checkpoint))
    start = BATCHNORM.model().state_dict()
    assert any(not torch.equal(whole[key], start[key]) for key in whole)
    for key in whole:
        assert torch.equal(resumed[key], whole[key]), key


def test_the_scale_of_a_loss_that_is_no_mean_resumes(tmp_path):
    """Of single samples it cannot be told whether it is another term's, so that of before is taken."""

    def run(max_duration, **kwargs):
        model = MLP.model()

        def loss(outputs, batch, reduction="mean"):
            losses = F.cross_entropy(outputs, batch[1], reduction=reduction)
            return losses if reduction == "none" else 0.7 * losses

        model.loss = loss
        algorithm = GradMatch(**ON)
        trainer = make_trainer(
            model,
            loader(MLP.data(40), 8, shuffle=True),
            [algorithm],
            max_duration=max_duration,
            algorithm_passes=[select_first],
            device_train_microbatch_size=1,
            seed=3,
            run_name="resume",
            **kwargs,
        )
        trainer.fit()
        trainer.close()
        return model.state_dict(), algorithm

    whole, algorithm = run("4ba")
    assert algorithm.state_dict()["loss_scale"]["usual"] == pytest.approx(0.7, rel=1e-5)
    run("2ba", save_folder=str(tmp_path), save_interval="2ba", save_filename="ba{batch}.pt")
    resumed, again = run("4ba", load_path=str(tmp_path / "ba2.pt"))
    assert again.state_dict()["loss_scale"] == algorithm.state_dict()["loss_scale"]
    for key in whole:
        assert torch.equal(resumed[key], whole[key]), key
