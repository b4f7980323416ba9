"""Training in lockstep with a plain float64 loop: gradients, state and picks of every step are compared."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from adversarial import ALL_RULES, Fields, Form, Row, Strategy, in_parts, number_of, rows_of
from cases import make_trainer
from composer import Callback, DataSpec
from composer.loggers import InMemoryLogger
from composer.utils import dist
from oracles import brute_force_omp, clip_and_normalize, per_sample_gradients
from torch.utils.data import DataLoader

from composer_gradmatch import select_first
from composer_gradmatch.rules.picks import Picks

LR = 0.1


class CurrentPicks:
    """The selection of the current step: the only place that knows how a strategy tells it."""

    def __init__(self, algorithm):
        self.algorithm = algorithm

    def take(self) -> Picks | None:
        """What was selected since the last call; None if the minibatch was trained whole."""
        if self.algorithm is None:
            return None
        selection, self.algorithm.last_selection = self.algorithm.last_selection, None
        return selection


class Batches:
    """A loader of a row's minibatches, each a fresh copy."""

    dataset = None

    def __init__(self, row: Row, form: Form):
        self.row, self.form, self.batch_size = row, form, number_of(row.make_batches(row.steps)[0])

    def __iter__(self):
        return (self.form.pack(fields) for fields in self.row.make_batches(self.row.steps))

    def __len__(self):
        return self.row.steps


def data_spec(row: Row, form: Form, loader: Any) -> DataSpec:
    """A row's batches as Composer takes them."""
    options: dict[str, Any] = {"get_num_samples_in_batch": lambda batch: number_of(form.unpack(batch))}
    split, transform, mass = row.split, row.transform, row.mass
    if split is not None:
        options["split_batch"] = lambda batch, size: [form.pack(part) for part in split(form.unpack(batch), int(size))]
    if transform is not None:
        options["microbatch_transforms"] = lambda batch: form.pack(transform(form.unpack(batch)))
    if mass is not None:
        options["get_num_tokens_in_batch"] = lambda batch: int(mass(form.unpack(batch)))
    return DataSpec(loader, **options)


def doubled(value: Any) -> Any:
    """A copy with float64 in the place of float32."""
    if isinstance(value, torch.Tensor):
        return value.to(torch.float64, copy=True) if value.is_floating_point() else value.clone()
    if isinstance(value, dict):
        return {key: doubled(item) for key, item in value.items()}
    return [doubled(item) for item in value] if isinstance(value, list) else copy.copy(value)


@dataclass(eq=False)
class Lockstep(Callback):
    """Follows a run step by step with a model of its own, in float64.

    The reference takes the trained parameters from the run before each step, and keeps everything else (buffers,
    frozen parameters, attributes) for itself, so that a selection pass that leaves a trace in them shows.
    """

    row: Row
    form: Form
    strategy: Strategy | None
    model: Any
    algorithm: Any
    selected_from: int = 0
    steps: int = 0
    kept: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.reference = copy.deepcopy(self.model).double()
        self.batches = self.row.make_batches(self.row.steps)
        self.picks = CurrentPicks(self.algorithm)
        self.seen, self.served = 0, False

    def before_dataloader(self, state, logger):
        self.seen = 0
        for model in (self.model, self.reference):
            self.row.before_step(model, self.steps)
        with torch.no_grad():
            for own, followed in zip(self.reference.parameters(), self.model.parameters(), strict=True):
                if followed.requires_grad:
                    own.copy_(followed)

    def before_backward(self, state, logger):
        self.served = self.algorithm is not None and self.algorithm.selector.source.serves

    def before_forward(self, state, logger):
        self.seen += number_of(self.form.unpack(state.batch))

    def batch_end(self, state, logger):
        fields, selection = doubled(self.batches[self.steps]), self.picks.take()
        where = f"step {self.steps}: "
        if selection is None:
            indices, weights = torch.arange(number_of(fields)), None
            allowed = self.row.may_train_whole or self.steps < self.selected_from or self.strategy is None
            assert allowed, where + "the minibatch was trained whole"
        else:
            indices, weights = selection.indices.cpu(), selection.weights
            self._check_picks(fields, indices, weights, where)
            self.kept.append(len(indices) / number_of(fields))
        assert self.seen == len(indices), f"{where}the model saw {self.seen} samples, picked were {len(indices)}"
        unit = torch.ones(len(indices), dtype=torch.float64)
        weights = unit if weights is None else weights
        self.steps += 1
        if self.served and self.row.mixes_samples:
            return
        whole = fields if self.served and self.row.state_follows_batch else None
        self._train_reference({**rows_of(fields, indices, self.row.shared), "_w": weights}, whole, indices)
        self._compare(where)

    def _check_picks(self, fields: Fields, indices: torch.Tensor, weights: torch.Tensor | None, where: str) -> None:
        assert self.strategy is not None
        n, m = number_of(fields), max(1, int(self.row.keep * number_of(fields)))
        assert len(set(indices.tolist())) == len(indices), where + "a sample was picked twice"
        if self.row.any_picks >= ALL_RULES:
            return
        assert len(indices) == m or (self.strategy.rule == "matching" and len(indices) < m), where + "number of picks"
        if self.strategy.rule == "any" or self.strategy.rule in self.row.any_picks:
            return
        model = copy.deepcopy(self.reference)
        # Of a weight that is an embedding, too, the head's use of it.
        head = list(model.head_apart().values() if hasattr(model, "head_apart") else model.head.parameters())
        losses = self.row.losses(model, model(self.form.pack(doubled(fields))), fields)
        if self.strategy.rule == "largest losses":
            assert set(indices.tolist()) == set(losses.topk(m).indices.tolist()), where + "not the largest losses"
            return
        gradients = per_sample_gradients(lambda i: losses[i], head, n).numpy()
        found = brute_force_omp(gradients, gradients.mean(0), m)
        right, right_weights = clip_and_normalize(*found[:2])
        assert min(found[2]) > 1e-5, where + "the row leaves it to rounding which sample is picked"
        assert indices.tolist() == right.tolist(), where + "not the picks of matching pursuit"
        error = float(np.abs(np.asarray(weights) - right_weights).max())
        assert error < 1e-2, f"{where}weights are off by up to {error:.2g}"

    def _train_reference(self, fields: Fields, whole: Fields | None, indices: torch.Tensor) -> None:
        """A plain step on some weighted samples.

        Where activations are reused, and the model's state follows what it ran on, that is the ``whole`` minibatch.
        """
        row, fields = self.row, self.row.after(fields)
        size = row.microbatch or number_of(fields)
        outputs = () if whole is None else self.reference(self.form.pack(whole))[indices].split(size)
        parts = row.split(fields, size) if row.split else in_parts(fields, size, row.shared)
        masses = [float((row.mass or number_of)(part)) for part in parts]
        self.reference.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for i, (part, mass) in enumerate(zip(parts, masses, strict=True)):
            part = row.transform(part) if row.transform else part
            out = self.reference(self.form.pack(part)) if whole is None else outputs[i]
            losses = row.losses(self.reference, out, part)
            own = (part["_w"] * losses).sum() / row.divisor(part) + row.terms(self.reference, out, part)
            loss = loss + own * (mass / sum(masses))
        loss.backward()

    def _compare(self, where: str) -> None:
        with torch.no_grad():
            own, right = (torch.cat([_grad(p) for p in model.parameters()]) for model in (self.model, self.reference))
            error = float((own - right).norm() / right.norm())
            assert error < 1e-4, f"{where}the gradient is off by {error:.2g} of its norm"
            for parameter in self.reference.parameters():
                if parameter.grad is not None and parameter.requires_grad:
                    parameter -= LR * parameter.grad
        ours = self.model.state_dict()
        for name, value in self.reference.state_dict().items():
            torch.testing.assert_close(
                ours[name].double(), value.double(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{where}{n}: {m}"
            )
        calls = getattr(self.model, "calls", 0), getattr(self.reference, "calls", 0)
        assert calls[0] == calls[1], f"{where}{calls[0]} forward passes left a trace, not {calls[1]}"


def _grad(parameter: torch.Tensor) -> torch.Tensor:
    return (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).double().flatten()


@dataclass(frozen=True)
class Run:
    """What came of a run."""

    steps: int
    refusal: Exception | None
    warnings: list[str]
    fault: str | None


def run(row: Row, form: Form, strategy: Strategy | None, start: float = 0.0) -> Run:
    """Trains a row with a strategy, until a step is not the reference's."""
    torch.manual_seed(0)
    model, algorithm = row.make_model(form), strategy.make(row, form, start) if strategy else None
    log = InMemoryLogger()
    algorithms = [] if algorithm is None else [algorithm]
    algorithms += [] if row.other is None else [row.other(form)]
    follow = Lockstep(row, form, strategy, model, algorithm, selected_from=-(-int(start * 100) * row.steps // 100))
    refusal, fault = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            make_trainer(
                model,
                data_spec(row, form, Batches(row, form)),
                algorithms,
                lr=LR,
                seed=17,
                max_duration=f"{row.steps}ba",
                callbacks=[follow],
                loggers=[log],
                algorithm_passes=[select_first],
                device_train_microbatch_size=row.microbatch,
                accumulate_train_batch_on_tokens=row.mass is not None,
            ).fit()
        except (ValueError, TypeError, RuntimeError, LookupError, AttributeError) as error:
            refusal = error
        except AssertionError as error:
            fault = str(error)  # Without a traceback through the Trainer.
    if algorithm is not None and refusal is None and fault is None:
        logged = [value for _, value in log.data.get(f"{algorithm.log_name}/fraction_kept", [])]
        np.testing.assert_allclose(logged, follow.kept, rtol=1e-6, err_msg="fraction_kept")
    return Run(follow.steps, refusal, [str(warning.message) for warning in caught], fault)


def _samples(row: Row) -> list[Fields]:
    """Three minibatches' samples, one by one."""
    batches = row.make_batches(3)
    names = [name for name in batches[0] if name not in row.shared]
    return [{name: batch[name][i] for name in names} for batch in batches for i in range(number_of(batch))]


def resumable(row: Row, form: Form, strategy: Strategy, duration: str, **kwargs: Any) -> tuple[dict, dict]:
    """The state of a model before and after a run over a shuffled loader."""

    def collate(samples: list[Fields]) -> Any:
        listed = {name for name, value in row.make_batches(1)[0].items() if isinstance(value, list)}
        columns = {name: [sample[name] for sample in samples] for name in form.names}
        return form.pack({name: v if name in listed else torch.stack(v) for name, v in columns.items()})

    torch.manual_seed(0)
    model, algorithm, data = row.make_model(form), strategy.make(row, form), _samples(row)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    size = number_of(row.make_batches(row.steps)[0])
    shuffled = DataLoader(data, size, sampler=dist.get_sampler(data, shuffle=True), collate_fn=collate)  # type: ignore
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(
            model,
            data_spec(row, form, shuffled),
            [algorithm, *([] if row.other is None else [row.other(form)])],
            lr=LR,
            max_duration=duration,
            algorithm_passes=[select_first],
            device_train_microbatch_size=row.microbatch,
            seed=3,
            run_name="resume",
            **kwargs,
        )
        trainer.fit()
        trainer.close()
    return before, model.state_dict()
