"""For ``code_paths:`` of a config: a backend of ``torch.compile``, and an algorithm, that count graphs and calls."""

from __future__ import annotations

import json
from pathlib import Path

import torch._dynamo as dynamo
from composer.core import Algorithm, Event
from llmfoundry import registry
from torch._dynamo.convert_frame import input_codes
from torch._dynamo.eval_frame import _debug_get_cache_entry_list as graphs_of

CALLS = [0]


def counting(module, inputs):
    def run(*args):
        CALLS[0] += 1
        return module(*args)

    return run


class CountGraphs(Algorithm):
    """Saves the most graphs that a function has, and how many were called in each microbatch's forward pass."""

    def __init__(self, file: str):
        self.file, self.calls, self.before = Path(file), [], 0

    def match(self, event, state):
        return event in (Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.FIT_END)

    def apply(self, event, state, logger):
        if event is Event.BEFORE_FORWARD:
            self.before = CALLS[0]
        elif event is Event.AFTER_FORWARD:
            self.calls.append(CALLS[0] - self.before)
        else:
            codes = [code for reference in input_codes.seen if (code := reference()) is not None]
            self.file.write_text(json.dumps({"most": max(len(graphs_of(code)) for code in codes), "calls": self.calls}))


dynamo.register_backend(counting, name="counting")
registry.algorithms.register("count_graphs", func=CountGraphs)
