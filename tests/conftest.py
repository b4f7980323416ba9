from __future__ import annotations

import os
import sys

import pytest
from hypothesis import settings

# No test may reach a network; read by HuggingFace's libraries when they are first imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# The same examples in every run: a red build is the change's doing, not the draw's.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")

#: What shows once more, at length, what a quicker test shows, too: left out unless asked for, by ``pytest -m slow``.
SLOW = (
    "test_capture.py::test_lengths_that_vary_are_captured_twice[encoder, positions first]",
    "test_configs.py::test_texts_train_on_everything_and_on_random_picks",
    "test_engine_ray.py::test_a_study_on_ray_told_to_stop_stops_at_once[15]",
    "test_heads.py::test_what_is_picked_and_trained_is_what_an_nn_linear_picks_and_trains[one pass-Multiplied]",
    "test_in_place.py::test_relus_and_sums_are_computed_in_place[ResNet-18, GroupNorm]",
    "test_layout.py::test_rounding_does_not_add_up_in_deep_networks",
    "test_reuse_compiled.py::test_a_huggingface_model_that_is_compiled",
    "test_reuse_compiled.py::test_a_model_that_is_compiled[dropout-inductor]",
    "test_reuse_models.py::test_a_model_is_trained_in_one_pass[ResNet-18, GroupNorm]",
    "test_reuse_models.py::test_a_model_is_trained_in_one_pass[WRN-16-4]",
    "test_reuse_models.py::test_a_model_is_trained_in_one_pass[WRN-28-2]",
    "test_reuse_models.py::test_a_model_is_trained_in_one_pass[encoder, positions first]",
    "test_reuse_text.py::test_minibatches_of_many_lengths[classification]",
    "test_reuse_text.py::test_minibatches_of_many_lengths[tokens]",
    "test_runs.py::test_a_model_can_be_timed_without_its_data",
    "test_runs.py::test_a_study_told_to_stop_stops_at_once[15]",
    "test_sharded.py::test_a_sharded_step_is_the_weighted_mean_over_both_ranks_picks[gradmatch-1]",
    "test_sharded.py::test_a_sharded_step_is_the_weighted_mean_over_both_ranks_picks[loss_backprop-7]",
    "test_single_pass.py::test_rounding_in_a_deep_network_is_no_reason_to_fall_back[bf16]",
    "test_single_pass.py::test_what_runs_in_another_way_is_found_in_low_precision",
    "test_sliced_backward.py::test_the_sliced_gradient_is_autograds_of_the_picks[ResNet-18, GroupNorm]",
    "test_train.py::test_the_command_line[launcher1]",
    "test_verdict.py::test_where_nothing_differs_at_most_5_percent_of_verdicts_name_a_winner",
)


@pytest.fixture(autouse=True)
def no_mode_left_on():
    """Fails a test that leaves a mode on, which would see, and slow down, whatever torch does from then on."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None:
        assert torch.overrides._get_current_function_mode_stack() == []


@pytest.fixture
def nothing_registered(monkeypatch):
    """Lets a test register what it likes: nothing was registered before it, and nothing is after it."""
    from composer_gradmatch import registered
    from composer_gradmatch.train import register_files

    loaded: dict = {}
    monkeypatch.setattr(registered, "_tables", {kind: {} for kind in registered.KINDS})
    monkeypatch.setattr(register_files, "_loaded", loaded)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for file in loaded:
        sys.modules.pop(file.stem, None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is slow."""
    for item in items:
        resumed = "test_a_resumed_run_is_the_uninterrupted_one[" in item.nodeid and item.nodeid.endswith("-loss-reuse]")
        if resumed or any(name in item.nodeid for name in SLOW):
            item.add_marker(pytest.mark.slow)
