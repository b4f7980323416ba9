"""The private interfaces of torch: all there with the installed version, and recognised by what they really do."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from composer_gradmatch.forward import torch_private
from composer_gradmatch.forward.torch_private import (
    BATCH_NORMS,
    CAPTURE_LOGGERS,
    NEEDED,
    changed_a_leaf_in_place,
    compiled_by_inductor,
    is_limit_of_captures,
    is_of_compiler,
    keeping_graphs,
    raised_by_backend,
    raised_by_worker,
    uncompiled,
)


@pytest.mark.parametrize("name", NEEDED)
def test_what_one_pass_needs_is_there(name):
    assert getattr(torch_private, name) is not None


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("gone", ["torch:gone", "torch.gone:gone"])
def test_what_is_missing_is_named(name, gone, monkeypatch):
    monkeypatch.setitem(NEEDED, name, gone)
    with pytest.raises(ImportError, match=f"it has no {gone.replace(':', '.')}"):
        getattr(torch_private, name)


def test_what_has_a_substitute_is_there_too():
    from torch._functorch import config
    from torch.nn.modules.batchnorm import _BatchNorm

    assert (_BatchNorm,) == BATCH_NORMS
    assert isinstance(config.donated_buffer, bool)
    assert {"_parameters", "_buffers", "_modules"} < vars(nn.Linear(1, 1)).keys()
    hooks = {"_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks"}
    assert hooks < vars(nn.Linear(1, 1)).keys()
    assert torch.ones(1)._version == 0
    assert torch.ops.aten.add.Tensor._schema.is_mutable is False


def test_the_loggers_that_are_kept_quiet_are_torchs():
    assert torch_private.symbolic_convert.log.name == "torch._dynamo.symbolic_convert"
    assert set(CAPTURE_LOGGERS) <= logging.root.manager.loggerDict.keys()


def test_graphs_are_kept_where_torch_would_give_their_buffers_away(monkeypatch):
    from torch._functorch import config

    before = config.donated_buffer
    with config.patch(donated_buffer=True):
        with keeping_graphs():
            assert config.donated_buffer is False
        assert config.donated_buffer is True
    assert config.donated_buffer == before
    monkeypatch.setitem(sys.modules, "torch._functorch.config", None)
    with keeping_graphs():
        assert config.donated_buffer == before


class Counting(nn.Module):
    """A model of a user's: those in torch's own modules are wrapped once more."""

    name = ""

    def forward(self, inputs):
        return inputs + len(self.name)


@pytest.mark.parametrize(("backend", "by_inductor"), [("inductor", True), ("aot_eager", False)])
def test_what_a_function_was_before_it_was_compiled(backend, by_inductor):
    forward = Counting().forward
    compiled = torch.compile(forward, backend=backend)
    assert uncompiled(compiled) == forward
    assert compiled_by_inductor(compiled) == by_inductor
    assert uncompiled(forward) is None
    assert not compiled_by_inductor(forward)


def raised_by(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def mul_in_place(view):
    leaf = torch.ones(3, requires_grad=True)
    (leaf[:2] if view else leaf).mul_(2)


def compiled_for_each_name():
    model = Counting()
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch_private.dynamo_config.patch(cache_size_limit=2):
        for model.name in ("a", "bc", "def"):
            compiled(torch.ones(2))


def compiled_by_a_backend_that_fails():
    def backend(graph, inputs):
        raise LookupError("no such device")

    torch.compile(nn.Linear(2, 2), backend=backend)(torch.ones(2, 2))


class Broken:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise LookupError(index)


def test_errors_are_told_by_what_torch_really_raises():
    leaf, view = (raised_by(lambda view=view: mul_in_place(view)) for view in (False, True))
    limit, backend = raised_by(compiled_for_each_name), raised_by(compiled_by_a_backend_that_fails)
    worker = raised_by(lambda: next(iter(DataLoader(Broken(), num_workers=1))))
    other = raised_by(lambda: torch.ones(2, 3) @ torch.ones(2, 3))
    errors = [leaf, view, limit, backend, worker, other]
    assert [changed_a_leaf_in_place(error) for error in errors] == [True, True, False, False, False, False]
    assert [is_limit_of_captures(error) for error in errors] == [False, False, True, False, False, False]
    assert [raised_by_worker(error) for error in errors] == [False, False, False, False, True, False]
    inner = raised_by_backend(backend)
    assert type(inner) is LookupError
    assert [raised_by_backend(error) for error in errors] == [leaf, view, limit, inner, worker, other]
    assert is_of_compiler(type(backend).__module__)
    assert not is_of_compiler(nn.Linear.__module__)
