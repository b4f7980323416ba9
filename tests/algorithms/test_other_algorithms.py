"""One step beside each of Composer's other algorithms against plain torch, in every order, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from cases import MLP, NUM_CLASSES, Case, loader, make_trainer, record_selections
from composer import Algorithm, Callback
from composer.algorithms import (
    EMA,
    SAM,
    SWA,
    ChannelsLast,
    CutMix,
    GhostBatchNorm,
    GradientClipping,
    LabelSmoothing,
    MixUp,
    ProgressiveResizing,
)
from oracles import reference_selection
from torch import nn

from composer_gradmatch import GradMatch, LossBackprop, RandomBackprop, select_first
from composer_gradmatch.batches import take_samples

# Said of every SWA.
pytestmark = pytest.mark.filterwarnings("ignore:SWA has known issues when resuming:UserWarning")

M, KEEP, LR, GHOST = 24, 0.5, 0.1, 3
ON = {"start": 0.0, "end": 1.0, "keep": KEEP, "interrupt": 0}


def _images(normalise):
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), normalise, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(8, NUM_CLASSES),
    )


IMAGES = Case("images", lambda: _images(nn.GroupNorm(2, 8)), "5", (3, 8, 8))
NORMALISED = Case("normalised", lambda: _images(nn.BatchNorm2d(8)), "5", (3, 8, 8))


class Chunked(nn.Module):
    """Batch normalisation of equal shares of about GHOST samples, as GhostBatchNorm's paper has it."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, inputs):
        parts = inputs.chunk(-(-len(inputs) // GHOST))
        return torch.cat([F.batch_norm(part, None, None, self.weight, self.bias, training=True) for part in parts])


def cross_entropy(module, x, y, draw, **kwargs):
    return F.cross_entropy(module(x), y, reduction="none", **kwargs)


def smoothed(module, x, y, draw):
    return cross_entropy(module, x, y, draw, label_smoothing=0.3)


def mixed(module, x, y, draw):
    mixing, order = draw
    outputs = module((1 - mixing) * x + mixing * x[order])
    first, second = (F.cross_entropy(outputs, targets, reduction="none") for targets in (y, y[order]))
    return (1 - mixing) * first + mixing * second


def cut(module, x, y, draw):
    (left, top, right, bottom), order = draw
    x, other = x.clone(), x[order]
    x[:, :, left:right, top:bottom] = other[:, :, left:right, top:bottom]
    share = (right - left) * (bottom - top) / 64
    outputs = module(x)
    first, second = (F.cross_entropy(outputs, targets, reduction="none") for targets in (y, y[order]))
    return (1 - share) * first + share * second


def halved(x):
    return x[..., ::2, ::2]


def norm_of(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).norm()


def climbed(gradient_at, module):
    gradient = gradient_at(module)
    higher = copy.deepcopy(module)
    with torch.no_grad():
        for parameter, g in zip(higher.parameters(), gradient, strict=True):
            parameter.add_(g * 0.1 / norm_of(gradient))
    return gradient_at(higher)


def clipped(gradient_at, module):
    gradient = gradient_at(module)
    assert norm_of(gradient) > 0.05
    return [g * 0.05 / norm_of(gradient) for g in gradient]


def clipped_by_unit(gradient_at, module):
    gradient, bounded = gradient_at(module), []
    for g, parameter in zip(gradient, module.parameters(), strict=True):
        rows = [(g, parameter)] if g.dim() < 2 else list(zip(g, parameter, strict=True))
        shares = [min(1.0, float(0.01 * w.norm() / part.norm())) if part.norm() else 1.0 for part, w in rows]
        bounded.append(g * torch.tensor(shares).double().view(-1, *[1] * (g.dim() - 1)))
    assert any((b != g).any() for b, g in zip(bounded, gradient, strict=True))
    return bounded


@dataclass(frozen=True)
class Other:
    """An algorithm, and what it makes of a microbatch's losses and of the gradient, in plain torch."""

    make: Callable[[], Algorithm]
    case: Case = IMAGES
    losses: Callable = cross_entropy
    gradient: Callable = field(default=lambda gradient_at, module: gradient_at(module))
    draw: Callable = field(default=lambda algorithm: None)


def draw_of_mixup(algorithm):
    return algorithm.mixing, algorithm.indices


def draw_of_cutmix(algorithm):
    return algorithm._bbox, algorithm._indices


OTHERS = {
    "mixup": Other(lambda: MixUp(alpha=1.0), losses=mixed, draw=draw_of_mixup),
    "cutmix": Other(CutMix, losses=cut, draw=draw_of_cutmix),
    "label_smoothing": Other(lambda: LabelSmoothing(0.3), losses=smoothed),
    "ema": Other(lambda: EMA(half_life="2ba")),
    "swa": Other(lambda: SWA(swa_start="0dur", update_interval="1ba")),
    "sam": Other(lambda: SAM(rho=0.1), gradient=climbed),
    "clipping": Other(lambda: GradientClipping("norm", 0.05), gradient=clipped),
    "adaptive_clipping": Other(lambda: GradientClipping("adaptive", 0.01), gradient=clipped_by_unit),
    "resizing": Other(
        lambda: ProgressiveResizing(initial_scale=0.5),
        losses=lambda net, x, y, draw: cross_entropy(net, halved(x), y, draw),
    ),
    "channels_last": Other(ChannelsLast),
    "ghost_batchnorm": Other(lambda: GhostBatchNorm(GHOST), NORMALISED),
}
INTERPOLATED = {
    "mixup": Other(lambda: MixUp(alpha=1.0, interpolate_loss=True), losses=mixed, draw=draw_of_mixup),
    "cutmix": Other(lambda: CutMix(interpolate_loss=True), losses=cut, draw=draw_of_cutmix),
}


class Watch(Callback):
    """Notes each microbatch's targets after its loss, and what the algorithm drew for it."""

    def __init__(self, other, algorithm):
        self.other, self.algorithm, self.draws, self.targets = other, algorithm, [], []

    def after_forward(self, state, logger):
        self.draws.append(self.other.draw(self.algorithm))

    def before_backward(self, state, logger):
        self.targets.append(state.batch[1])


def check_step(other, selecting, *, listed_first=True, passes=(select_first,), microbatch_size=M):
    """Trains one step and compares it and its loss with what plain torch makes of the picked samples."""
    dataset = other.case.data(M)
    inputs, targets = dataset.tensors
    model, algorithm = other.case.model(), other.make()
    module = copy.deepcopy(model.module).double()
    if isinstance(algorithm, GhostBatchNorm):
        module[1] = Chunked().double()
    start = [p.detach().clone() for p in module.parameters()]
    seen, watch = record_selections(selecting), Watch(other, algorithm)
    trainer = make_trainer(
        model,
        loader(dataset, M),
        [selecting, algorithm] if listed_first else [algorithm, selecting],
        lr=LR,
        algorithm_passes=list(passes) or None,
        device_train_microbatch_size=microbatch_size,
        callbacks=[watch],
    )
    trainer.fit()
    ((_, selection),) = seen
    picks, weights = selection.indices, torch.ones(len(selection.indices)).double()
    if isinstance(selecting, GradMatch):
        resized_first = isinstance(algorithm, ProgressiveResizing) and listed_first and not passes
        shown = halved(inputs) if resized_first else inputs
        expected, found = reference_selection(module, other.case.layer, shown, targets, KEEP)
        assert picks.tolist() == expected.tolist()
        weights = torch.as_tensor(found)
        assert weights.std() > 0.1, "equal weights would show nothing"
    assert selecting.batches_trained_whole == 0
    assert len(picks) > 6, "one microbatch would show nothing of two"
    parts = list(zip(picks.split(microbatch_size), weights.split(microbatch_size), watch.draws, strict=False))

    def loss_at(module):
        return sum(
            (w * other.losses(module, inputs[rows].double(), targets[rows], draw)).sum() for rows, w, draw in parts
        ) / len(picks)

    gradient = other.gradient(lambda module: torch.autograd.grad(loss_at(module), list(module.parameters())), module)
    steps = [p.detach().double() - before for p, before in zip(model.module.parameters(), start, strict=True)]
    error = norm_of([step + LR * g for step, g in zip(steps, gradient, strict=True)])
    assert error < 1e-4 * LR * norm_of(gradient)
    assert trainer.state.total_loss_dict["loss/train/total"] == pytest.approx(float(loss_at(module)), rel=1e-5)
    return trainer, watch, picks


ORDERS = [(True, (select_first,)), (False, (select_first,)), (True, ()), (False, ())]
IDS = ["first-pass", "last-pass", "first", "last"]


@pytest.mark.parametrize("microbatch_size", [M, 6])
@pytest.mark.parametrize(("listed_first", "passes"), ORDERS, ids=IDS)
@pytest.mark.parametrize("name", OTHERS)
# What the README says of resizing before the selection.
@pytest.mark.filterwarnings("ignore:ProgressiveResizing will change each minibatch:UserWarning")
def test_a_step_is_what_the_algorithm_makes_of_the_weighted_picks(name, listed_first, passes, microbatch_size):
    order = {"listed_first": listed_first, "passes": passes, "microbatch_size": microbatch_size}
    if (name, listed_first, passes) == ("label_smoothing", True, ()):
        with pytest.raises(ValueError, match=r"LabelSmoothing changes the batch for the loss.*select_first"):
            make_trainer(IMAGES.model(), None, [GradMatch(**ON), LabelSmoothing()])
        return
    trainer, watch, picks = check_step(OTHERS[name], GradMatch(**ON), **order)
    if name == "label_smoothing":
        assert torch.equal(torch.cat(watch.targets), IMAGES.data(M).tensors[1][picks]), "labels are put back"
    if name == "channels_last":
        assert trainer.state.model.module[0].weight.is_contiguous(memory_format=torch.channels_last)
    if name == "ghost_batchnorm":
        chunks = sum(-(-len(targets) // GHOST) for targets in watch.targets)
        assert int(trainer.state.model.module[1].batchnorm.num_batches_tracked) == chunks


@pytest.mark.parametrize("algorithm_class", [LossBackprop, RandomBackprop])
@pytest.mark.parametrize("other", [*OTHERS.values(), *INTERPOLATED.values()])
def test_a_step_without_weights(algorithm_class, other):
    check_step(other, algorithm_class(**ON), microbatch_size=6)


@pytest.mark.parametrize("other", INTERPOLATED.values(), ids=INTERPOLATED)
def test_an_interpolated_loss_is_refused_at_init_beside_weights(other):
    with pytest.raises(ValueError, match=r"interpolate_loss=True\) adds an unweighted loss.*interpolate_loss=False"):
        make_trainer(IMAGES.model(), None, [GradMatch(**ON), other.make()])


@pytest.mark.parametrize("other", [MixUp(interpolate_loss=True), LabelSmoothing()])
def test_nothing_is_refused_where_nothing_is_selected(other):
    make_trainer(MLP.model(), loader(MLP.data(M), M), [GradMatch(**{**ON, "keep": 1.0}), other]).fit()


def test_picked_samples_keep_their_memory_format():
    images = torch.zeros(M, 3, 8, 8).to(memory_format=torch.channels_last)
    picked, _ = take_samples((images, torch.zeros(M)), torch.tensor([3, 1, 5]), M)
    assert picked.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("algorithm_class", [GradMatch, LossBackprop, RandomBackprop])
def test_picks_fewer_than_a_ghost_batch_are_refused_on_the_first_batch(algorithm_class):
    train, ghosts = loader(NORMALISED.data(M), M), GhostBatchNorm(8)
    trainer = make_trainer(
        NORMALISED.model(), train, [algorithm_class(keep=0.25), ghosts], algorithm_passes=[select_first]
    )
    with pytest.raises(ValueError, match=r"picks 6 of 24.*microbatch of 6.*at least ghost_batch_size=8"):
        trainer.fit()


@pytest.mark.parametrize("algorithm_class", [GradMatch, RandomBackprop])
def test_picks_that_come_out_too_few_for_a_ghost_batch_are_filled_up(algorithm_class):
    algorithm, watch = algorithm_class(**ON), Watch(OTHERS["ema"], None)
    train = loader(NORMALISED.data(M + 12), M)
    trainer = make_trainer(
        *(NORMALISED.model(), train, [algorithm, GhostBatchNorm(8)]),
        max_duration="1ep",
        algorithm_passes=[select_first],
        callbacks=[watch],
    )
    trainer.fit()
    assert 8 <= len(watch.targets[0]) <= 12
    assert len(watch.targets[1]) == 8  # Half of twelve are six.
    assert algorithm.batches_trained_whole == 0
