"""The state of numpy's global generator is put back bit for bit, however it is told that nothing was drawn."""

from __future__ import annotations

import numpy as np
import pytest

from composer_gradmatch.forward.numpy_state import NumpyState

DRAWS = {
    "nothing": lambda: None,
    "a number": np.random.rand,
    "one normal number, of two": np.random.randn,
    "two normal numbers": lambda: np.random.randn(2),
    "a permutation": lambda: np.random.permutation(100),
    "more than its memory": lambda: np.random.rand(700),
    "a new seed": lambda: np.random.seed(5),
}


@pytest.fixture(autouse=True)
def _generator():
    state = np.random.get_state()
    np.random.seed(0)
    yield
    np.random.set_state(state)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("before", DRAWS.values(), ids=DRAWS.keys())
@pytest.mark.parametrize("between", DRAWS.values(), ids=DRAWS.keys())
def test_it_is_put_back_and_knows_of_draws(before, between):
    before()
    expected = np.random.get_state()
    state = NumpyState.now()
    assert same(state.state, expected)
    assert state.is_now()
    between()
    assert state.is_now() == same(np.random.get_state(), expected)
    state.restore()
    assert same(np.random.get_state(), expected)
    assert NumpyState.now().is_now()


def test_a_normal_number_that_is_kept_is_not_given_twice():
    """Drawing it leaves the generator's memory as it was."""
    np.random.randn()
    state = NumpyState.now()
    kept = np.random.randn()
    assert not state.is_now()
    state.restore()
    assert np.random.randn() == kept


def test_it_is_not_read_again_while_nothing_is_drawn(monkeypatch):
    state = NumpyState.now()
    with monkeypatch.context() as patched:
        patched.setattr(np.random, "get_state", lambda: pytest.fail("read"))
        patched.setattr(np.random, "set_state", lambda _: pytest.fail("written"))
        assert NumpyState.now() is state
        state.restore()
    np.random.rand()
    assert NumpyState.now() is not state


def test_another_bit_generator_is_another_state():
    state, own = NumpyState.now(), np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.MT19937(7))
    try:
        assert NumpyState.now() is not state
        assert not state.is_now()
    finally:
        np.random.set_bit_generator(own)
    assert state.is_now()
