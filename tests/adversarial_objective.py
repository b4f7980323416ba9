"""Rows whose objective is more than the mean of the samples' losses, or whose losses are odd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from adversarial import (
    ALL_RULES,
    CLASSES,
    TRAINS,
    WIDTH,
    M,
    Row,
    Tiny,
    classified,
    cross_entropy,
    in_parts,
    number_of,
    refused,
    warned_or_refused,
)

ALL_FORMS = ("tuple", "list", "dict")
ANOTHER_OBJECTIVE = "objective|add up|terms|own loss"
DEPENDENT = "depend|alone|other samples|each other|add up"


class Penalised(Tiny):
    """Draws parameters to where they started (L2-SP, FedProx), or to zero."""

    to_start = True

    def __init__(self, form):
        super().__init__(form)
        self.start = [p.detach().clone() for p in self.parameters()]

    def penalty(self):
        if self.to_start:
            return 2.0 * sum(((p - s) ** 2).sum() for p, s in zip(self.parameters(), self.start, strict=True))
        return 0.3 * sum((p**2).sum() for p in self.parameters())

    def loss(self, outputs, batch, reduction="mean"):
        losses = super().loss(outputs, batch, reduction)
        return losses if reduction == "none" else losses + self.penalty()


class Decayed(Penalised):
    to_start = False


class PenalisedHead(Penalised):
    """Draws the output layer alone to zero."""

    def penalty(self):
        return 0.5 * (self.head.weight**2).sum()


def draw_to_uniform(outputs):
    """The mean KL divergence of the uniform distribution from the outputs' one, but for a constant."""
    return -outputs.log_softmax(-1).mean(-1).mean()


class RampedUp(Tiny):
    """A consistency term on the outputs that is not in the samples' losses, and zero at first."""

    ramp = 0.0

    def loss(self, outputs, batch, reduction="mean"):
        losses = super().loss(outputs, batch, reduction)
        return losses if reduction == "none" else losses + self.ramp * draw_to_uniform(outputs)


def ramp_up(model, step):
    model.ramp = 0.4 * max(0, step - 2)


class FromTheStart(RampedUp):
    ramp = 1.0


class OddMean(RampedUp):
    """A term on the mean output of the minibatch (a balance of classes), from the first batch on."""

    def loss(self, outputs, batch, reduction="mean"):
        losses = F.cross_entropy(outputs, self.form.get(batch, "y"), reduction=reduction)
        return losses if reduction == "none" else losses + (outputs.mean(0) ** 2).sum()


class Scaled(Tiny):
    def loss(self, outputs, batch, reduction="mean"):
        losses = super().loss(outputs, batch, reduction)
        return losses if reduction == "none" else 7.0 * losses


class Summed(Tiny):
    def loss(self, outputs, batch, reduction="sum"):
        return super().loss(outputs, batch, reduction)


class ClassWeighted(Tiny):
    def __init__(self, form):
        super().__init__(form)
        self.register_buffer("class_weights", torch.tensor([0.2, 1.0, 3.0]))

    def loss(self, outputs, batch, reduction="mean"):
        return F.cross_entropy(outputs, self.form.get(batch, "y"), weight=self.class_weights, reduction=reduction)


class Shifted(Tiny):
    """Losses that are negative, or about zero in sum: a likelihood of densities."""

    shift = 5.0

    def loss(self, outputs, batch, reduction="mean"):
        return super().loss(outputs, batch, reduction) - self.shift


class AboutZero(Shifted):
    shift = 1.1


class Hinge(Tiny):
    """Zero for the samples that are classified with a margin."""

    def loss(self, outputs, batch, reduction="mean"):
        losses = F.multi_margin_loss(outputs, self.form.get(batch, "y"), margin=0.25, reduction="none")
        return losses if reduction == "none" else losses.mean()


def hinge(model, outputs, fields):
    right = outputs.gather(1, fields["y"][:, None])
    others = (0.25 - right + outputs).clamp(min=0).sum(1) - 0.25
    return others / CLASSES


class Policy(Tiny):
    """A policy gradient with advantages that are centred in groups, so that losses sum to zero."""

    def loss(self, outputs, batch, reduction="mean"):
        log_p = -F.cross_entropy(outputs, self.form.get(batch, "y"), reduction="none")
        ratios, advantage = torch.exp(log_p - log_p.detach()), self.form.get(batch, "advantage")
        return -ratios * advantage if reduction == "none" else -(ratios @ advantage) / len(ratios)


def policy(model, outputs, fields):
    likelihood = cross_entropy(model, outputs, fields).neg()
    return -fields["advantage"] * (1 + likelihood - likelihood.detach())


def centred(generator):
    """Rewards of three groups of four answers, centred within each."""
    rewards = torch.randn(M // 4, 4, generator=generator)
    return ((rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)).flatten()


def opposed(generator):
    """Rewards of pairs of answers, centred: what microbatches of two pick can cancel out exactly."""
    better = torch.randint(2, (M // 2, 1), generator=generator).float()
    return (torch.cat([better, 1 - better], 1) * 2 - 1).mul(0.7).flatten()


class Contrastive(Tiny):
    """Draws the outputs of a class together, against the other samples of the minibatch."""

    def loss(self, outputs, batch, reduction="mean"):
        losses = contrastive(self, outputs, {"y": self.form.get(batch, "y")})
        return losses if reduction == "none" else losses.mean()


def contrastive(model, outputs, fields):
    z, y = F.normalize(outputs, dim=1), fields["y"]
    alone = torch.eye(len(z), dtype=torch.bool)
    log_p = (z @ z.T / 0.2).masked_fill(alone, -1e9).log_softmax(1)
    same = (y[:, None] == y[None]) & ~alone
    return -(log_p * same).sum(1) / same.sum(1).clamp(min=1)


class CentredAdvantages(Tiny):
    """Centres its advantages over the minibatch, in the loss."""

    def loss(self, outputs, batch, reduction="mean"):
        losses = centred_in_loss(self, outputs, {"y": self.form.get(batch, "y")})
        return losses if reduction == "none" else losses.mean()


def centred_in_loss(model, outputs, fields):
    advantages = (fields["y"] + 1).to(outputs)
    return (advantages - advantages.mean()) * F.cross_entropy(outputs, fields["y"], reduction="none")


class CentredScores(Tiny):
    """Scores of the samples relative to the minibatch's mean (a listwise ranking)."""

    def loss(self, outputs, batch, reduction="mean"):
        losses = relative(self, outputs, {"y": self.form.get(batch, "y")})
        return losses if reduction == "none" else losses.mean()


def relative(model, outputs, fields):
    return F.cross_entropy(outputs - outputs.mean(0), fields["y"], reduction="none")


class Tags(Tiny):
    """Classes at positions, averaged over those that count: a minibatch has more or fewer of them."""

    def loss(self, outputs, batch, reduction="mean"):
        losses = F.cross_entropy(outputs.transpose(1, 2), self.form.get(batch, "y"), reduction="none")
        if reduction == "none":
            return losses
        return losses.sum() / (self.form.get(batch, "y") != -100).sum().clamp(min=1)


def tagged(num, positions=5, empty=()):
    batches = []
    for seed in range(num):
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(CLASSES, (M, positions), generator=generator)
        lengths = torch.randint(1, positions + 1, (M,), generator=generator)
        lengths[list(empty)] = 0
        y[torch.arange(positions) >= lengths[:, None]] = -100
        batches.append({"x": torch.randn(M, positions, WIDTH, generator=generator), "y": y})
    return batches


def summed_over_positions(model, outputs, fields):
    kept = fields["y"] != -100
    log_p = outputs.log_softmax(-1).gather(-1, fields["y"].clamp(min=0)[..., None])[..., 0]
    return -(log_p * kept).sum(1)


def counted(fields):
    return (fields["y"] != -100).sum().clamp(min=1)


_OTHER = {"weights": refused(ANOTHER_OBJECTIVE), "batch": TRAINS}
_MIXED = {"weights": refused(DEPENDENT), "losses": warned_or_refused(DEPENDENT)}
OBJECTIVE_ROWS = [
    Row(
        "distance to the start",
        Penalised,
        classified,
        cross_entropy,
        terms=lambda model, *_: model.penalty(),
        forms=ALL_FORMS,
    ),
    Row(
        "distance to the start, in microbatches",
        Penalised,
        classified,
        cross_entropy,
        terms=lambda model, *_: model.penalty(),
        microbatch=4,
    ),
    Row("weight decay", Decayed, classified, cross_entropy, terms=lambda model, *_: model.penalty(), microbatch=4),
    Row("head decay", PenalisedHead, classified, cross_entropy, terms=lambda model, *_: model.penalty()),
    Row(
        "consistency ramped up",
        RampedUp,
        classified,
        cross_entropy,
        terms=lambda model, outputs, _: model.ramp * draw_to_uniform(outputs),
        before_step=ramp_up,
        microbatch=4,
        steps=6,
    ),
    Row(
        "consistency from the start",
        FromTheStart,
        classified,
        cross_entropy,
        terms=lambda model, outputs, _: draw_to_uniform(outputs),
        expected=_OTHER,
    ),
    Row(
        "balance of outputs",
        OddMean,
        classified,
        cross_entropy,
        terms=lambda model, outputs, _: (outputs.mean(0) ** 2).sum(),
        expected=_OTHER,
    ),
    Row(
        "centred advantages",
        Policy,
        lambda num: classified(num, advantage=centred),
        policy,
        forms=("tuple", "dict"),
        microbatch=2,
        steps=8,
    ),
    Row(
        "opposed advantages",
        Policy,
        lambda num: classified(num, advantage=opposed),
        policy,
        microbatch=4,
        any_picks={"largest losses"},
        steps=12,
    ),
    Row("centred advantages, whole", Policy, lambda num: classified(num, advantage=centred), policy, steps=8),
    Row(
        "counted positions",
        Tags,
        tagged,
        summed_over_positions,
        divisor=counted,
        forms=ALL_FORMS,
        microbatch=2,
        split=lambda fields, size: in_parts(fields, size),
    ),
    Row(
        "counted positions, samples without any",
        Tags,
        lambda num: tagged(num, empty=(0, 3, 7)),
        summed_over_positions,
        divisor=counted,
        microbatch=3,
    ),
    Row(
        "class weights",
        ClassWeighted,
        classified,
        lambda model, outputs, fields: model.class_weights[fields["y"]] * cross_entropy(model, outputs, fields),
        divisor=lambda fields: torch.tensor([0.2, 1.0, 3.0]).double()[fields["y"]].sum(),
        microbatch=3,
    ),
    Row("sum", Summed, classified, cross_entropy, divisor=lambda _: 1.0, microbatch=4),
    Row("constant factor", Scaled, classified, cross_entropy, divisor=lambda f: number_of(f) / 7, microbatch=4),
    Row("negative losses", Shifted, classified, lambda *a: cross_entropy(*a) - 5.0, microbatch=4),
    Row("losses about zero", AboutZero, classified, lambda *a: cross_entropy(*a) - 1.1, microbatch=2, steps=8),
    Row("losses of zero", Hinge, classified, hinge, microbatch=3, any_picks=ALL_RULES, may_train_whole=True),
    Row("contrastive", Contrastive, classified, contrastive, expected=_MIXED),
    Row("relative scores", CentredScores, classified, relative, expected=_MIXED),
    Row(
        "advantages centred in the loss",
        CentredAdvantages,
        classified,
        centred_in_loss,
        any_picks=ALL_RULES,
        expected={"weights": refused(DEPENDENT)},
    ),
]
