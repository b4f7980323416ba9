"""Candidates from a store of what was last seen of each sample, with a pass over those only that are due."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from composer.core import State, Time
from composer.utils import dist

from composer_gradmatch.batches.numbering import Numbering
from composer_gradmatch.candidates.due_rows import rows_to_look_at
from composer_gradmatch.candidates.output_layer_again import OutputLayerAgain
from composer_gradmatch.candidates.refresh import check_refresh
from composer_gradmatch.candidates.sample_store import SampleStore, Seen
from composer_gradmatch.candidates.source import Source
from composer_gradmatch.candidates.store_of_run import StoreOfRun
from composer_gradmatch.candidates.suspects import Suspects, margins_of
from composer_gradmatch.candidates.training_looks import TrainingLooks
from composer_gradmatch.candidates.two_passes import TwoPasses
from composer_gradmatch.forward.sample_checks import Rows
from composer_gradmatch.last_layer.gradients import all_finite
from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.cost import FORWARD_SHARE, Passes

__all__ = ["StoredLooks"]


class StoredLooks(Source):
    """Looks at samples that were never seen, or not for long, and takes the others from a store.

    Kept are each sample's loss and its row of H, in half precision (in bfloat16 if a value is too large for that), from
    its last look: a pass, or its own training step. P and the losses are computed anew by the current output layer on
    H, where that layer's output is what the loss takes; otherwise those of the look are kept. Processes share what they
    see, so that all stores are equal.

    Args:
        two_passes (TwoPasses): Looks.
        numbering (Numbering): Knows the samples.
        refresh (str | Time): How old a look may be.
        limit (float): The most bytes for rows of H.
        device (str): ``"cpu"``, or ``"gpu"`` for the run's device.
        suspects (Suspects, optional): Whom to leave out.
    """

    #: The fewest rows of a look in a model with batch normalisation, of whose statistics they are. With fewer, picks
    #: overlap less with those of a full look, and with running statistics still less: ``benchmarks looks``.
    rows_for_batch_norm = 32

    def __init__(
        self,
        two_passes: TwoPasses,
        numbering: Numbering,
        refresh: str | Time,
        limit: float,
        device: Literal["cpu", "gpu"],
        suspects: Suspects | None,
    ) -> None:
        super().__init__(two_passes.reader)
        self.two_passes, self.numbering, self.suspects = two_passes, numbering, suspects
        self.layer, self.selection_pass = two_passes.layer, two_passes.selection_pass
        self.refresh = check_refresh(refresh)
        self.training = TrainingLooks(self.selection_pass, self.layer)
        two_passes.shows = self.training.compare
        self._again = OutputLayerAgain(self.selection_pass, self.layer)
        unit = self.refresh.unit.value
        self.kept = StoreOfRun(self.selection_pass, self.layer, self._again, unit, limit, device, suspects)
        self.reset()

    def reset(self) -> None:
        """Forgets what belongs to one Trainer."""
        self.kept.reset()
        #: The numbers of the minibatch's samples.
        self.numbers = torch.empty(0, dtype=torch.int64)
        self._forget_step()

    @property
    def store(self) -> SampleStore | None:
        """What is stored; None before the first batch."""
        return self.kept.store

    def _forget_step(self) -> None:
        self.training.clear()
        self._looked_at, self._num_samples, self._left_out = 0, 1, 0
        #: When the step is made, in the unit of the refresh; 0 where it made no pass on this rank.
        self._time = 0
        self._seen: list[Seen] = []
        self._judged: list[tuple[torch.Tensor, torch.Tensor]] = []

    def reset_fit(self, state: State) -> None:
        """Forgets a step: see :class:`.Source`."""
        self.two_passes.reset_fit(state)
        self.kept.reset_fit()
        self._forget_step()

    def begin_fit(self, state: State) -> None:
        """Finds the data set of a ``fit``, and begins a store for it if it is another one.

        Args:
            state (State): On FIT_START.

        Raises:
            ValueError: If its samples have no numbers, or it is not known how many there are.
        """
        self.numbering.find(state.train_dataloader)
        self.kept.begin_fit(self.numbering.size, self.numbering.has_changed)

    @property
    def passes(self) -> Passes:
        """Two where something was looked at: see :class:`.Source`."""
        return 2 if self._looked_at else 0

    def cost(self, share: float) -> float:
        """Counts the rows that were looked at: see :class:`.Source`."""
        return FORWARD_SHARE * self._looked_at / self._num_samples + share

    @property
    def metrics(self) -> dict[str, float]:
        """What to log of the step: the share that was looked at, and the number of suspects that were left out."""
        metrics = {"fraction_looked_at": self._looked_at / self._num_samples}
        return metrics if self.suspects is None else {**metrics, "suspects": float(self._left_out)}

    def begin_step(self) -> None:
        """Forgets a step that an error has ended: see :class:`.Source`."""
        self._forget_step()

    def look(self, state: State, num_samples: int) -> Candidates:
        """Looks at what is due: see :class:`.Source`."""
        self.kept.follow_layer(state)
        store, numbers = self.kept.of(state), self._check_numbers(num_samples)
        self._time = self._now(state)
        due = store.due(numbers, self._time, int(self.refresh.value))
        rows = rows_to_look_at(state, due, store.stamps[numbers], self.selection_pass, self.rows_for_batch_norm)
        self._looked_at, self._num_samples = len(rows), num_samples
        candidates = None
        if len(rows) == num_samples:
            candidates = self.two_passes.look(state, num_samples)
            self._keep(store, candidates, numbers)
        elif len(rows):
            whole = state.batch
            state.batch = self.reader.copy_of(whole, rows, num_samples)
            try:
                self._keep(store, self.two_passes.look(state, len(rows)), numbers[rows])
            finally:
                state.batch = whole
        if candidates is None:
            candidates = self._from_store(state, store, numbers)
        return candidates if self.suspects is None else self._without_suspects(state, store, candidates, numbers)

    def _now(self, state: State) -> int:
        return int(state.timestamp.get(self.refresh.unit).value)

    def _keep(self, store: SampleStore, candidates: Candidates, numbers: torch.Tensor) -> None:
        seen = Seen(numbers, candidates.losses)
        if self.layer is not None:
            self._refuse_positions(candidates)
            seen = Seen(numbers, candidates.losses, candidates.inputs, candidates.output_grads)
        store.put(seen, self._time)
        self._seen.append(seen)

    def _from_store(self, state: State, store: SampleStore, numbers: torch.Tensor) -> Candidates:
        device, labels = state.device, self.labels_of(state.batch, len(numbers))
        at = numbers.to(store.device)
        if self.layer is None:
            return Candidates(len(numbers), losses=device.tensor_to_device(store.losses[at]), labels=labels)
        layer = self.layer.of(state)
        assert store.inputs is not None
        inputs = device.tensor_to_device(store.inputs[at]).float()

        batch = state.batch

        @cache
        def losses_and_grads() -> tuple[torch.Tensor, torch.Tensor]:
            if self.kept.computes:
                if state.batch is not batch:
                    raise RuntimeError("candidates of stored looks are to be asked for losses and P before the step.")
                return self._again.losses_and_grads(state, inputs)
            assert store.output_grads is not None
            return device.tensor_to_device(store.losses[at]), device.tensor_to_device(store.output_grads[at])

        # Only when a rule asks for them, which random picks among the trusted do not.
        return Candidates(
            len(numbers),
            losses=lambda: losses_and_grads()[0],
            inputs=inputs,
            output_grads=lambda: losses_and_grads()[1],
            labels=labels,
            bias=layer.bias is not None,
            finite=lambda: bool(all_finite(*losses_and_grads())),
        )

    def _without_suspects(
        self, state: State, store: SampleStore, candidates: Candidates, numbers: torch.Tensor
    ) -> Candidates:
        assert self.suspects is not None
        inputs = candidates.inputs
        logits = self._again.logits(state, inputs.float())
        margins = margins_of(logits, candidates.labels)
        store.average_margins(numbers, margins, self.suspects.decay)
        self._judged.append((numbers, store.margins[numbers].clone()))
        if not self.suspects.begin(state):
            return candidates
        suspected = store.margins[numbers] > self.suspects.margin
        self._left_out = int(suspected.sum())
        return candidates.of_rows((~suspected).nonzero().flatten()) if self._left_out else candidates

    def suspected(self) -> torch.Tensor:
        """Lists the numbers of all samples that are suspected now."""
        return self.kept.suspected()

    def rehearse(self, state: State, num_samples: int) -> Candidates:
        """Looks at the first batch, finds out whether P can be computed from H, and makes the store: :class:`.Source`.

        Raises:
            ValueError: If the output layer runs at positions, or margins of suspects cannot be told, or their labels
                are not their outputs' places.
        """
        self._check_numbers(num_samples)
        candidates = self.two_passes.rehearse(state, num_samples)
        if self.layer is not None:
            self._refuse_positions(candidates)
        if self.suspects is not None:
            _ = candidates.labels  # Which may be no classes.
        self.kept.prepare(state)
        if self.suspects is not None:
            logits = self._again.logits(state, candidates.inputs.float())
            self.suspects.check_labels(candidates.output_grads, logits, candidates.labels)
        self.kept.say(state)
        return candidates

    def rows_of(self, state: State, batch: Any, num_samples: int) -> Rows | None:
        """Looks as a pass does: see :class:`.Source`."""
        return self.two_passes.rows_of(state, batch, num_samples)

    def see_forward(self, state: State) -> None:
        """Sees a microbatch before its forward pass: see :class:`.TrainingLooks`."""
        self._time = self._now(state)  # Of a step that did not look, too.
        self.training.before_forward(state)

    def see_loss(self, state: State, rows: torch.Tensor | None) -> None:
        """Sees a microbatch before its loss.

        Args:
            state (State): The run's state.
            rows (torch.Tensor, optional): Which samples of the minibatch it has; None if they are not as they were.
        """
        numbers = None if rows is None else self.numbers[rows]
        # Where losses and P are computed from H, H is all that there is to see.
        with_grads = self.layer is not None and not self.kept.computes
        self.training.before_loss(state, numbers, rows, with_losses=not self.kept.computes, with_grads=with_grads)

    def share(self, state: State) -> None:
        """Keeps what the step has shown, on all ranks alike.

        Args:
            state (State): At the end of a step, on all ranks.
        """
        computes = self.kept.computes, self.training.returned_as_it_is
        looks, trained, judged, now = self._seen, self.training.end(), self._judged, self._time
        if dist.get_world_size() == 1:
            everything: list[Any] = [([], trained, [], computes, now)]
        else:
            mine = [each.cpu() for each in looks], [each.cpu() for each in trained], judged, computes, now
            everything = dist.all_gather_object(mine)
        store, now = self.kept.of(state), max(each[-1] for each in everything)
        if len(everything) > 1:
            for looked, seen_in_step, *_ in everything:
                for seen in (*looked, *seen_in_step):
                    store.make_room_for(seen)
        for kind in (0, 1):  # What was trained on was seen last.
            for of_rank in everything:
                for seen in of_rank[kind]:
                    store.put(seen, now)
        for _, _, margins, *_ in everything:
            for numbers, averages in margins:
                store.margins[numbers] = averages
        self._seen, self._judged = [], []
        self.kept.warn_if_wide()
        # Each rank has found out by samples of its own whether P can be computed from H.
        can = [both for *_, both, _ in everything]
        if any(computes for computes, _ in can) and not all(map(all, can)):
            self.kept.compute_no_more(state)

    def state_dict(self) -> dict[str, Any]:
        """Tells what a checkpoint keeps: see :class:`.StoreOfRun`."""
        return self.kept.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.kept.load_state_dict(state)

    def _check_numbers(self, num_samples: int) -> torch.Tensor:
        if len(self.numbers) != num_samples:
            raise ValueError(
                f"A batch of {num_samples} samples has {len(self.numbers)} sample numbers; expected one for each. "
                "Check sample_id_key."
            )
        return self.numbers

    def _refuse_positions(self, candidates: Candidates) -> None:
        if candidates.counts is not None:
            raise ValueError(
                f"refresh keeps one row for each sample, but the output layer of {self.selection_pass.owner} runs at "
                "positions of each (a language model's head). Leave refresh out, name a layer that runs once a sample "
                "as output_layer, or use LossBackprop, whose losses can be kept."
            )
