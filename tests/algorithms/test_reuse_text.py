"""Steps of one forward pass on HuggingFace models, against steps of two."""

from __future__ import annotations

import warnings

import pytest
from cases import (
    loader,
)
from composer import Callback, DataSpec
from one_pass import KEEP, M, always, assert_same_parameters, single_pass_of, trained
from text_cases import CAUSAL_LM, CLASSIFICATION, TEXT_CASES, TOKENS, TextCase, _bert_config, _classes
from transformers import BertForSequenceClassification


class GraphsOf(Callback):
    """The graphs that an algorithm's steps ran, step by step, where there are any."""

    def __init__(self, algorithm, found):
        self.algorithm, self.found = algorithm, found

    def before_forward(self, state, logger):
        if single_pass_of(self.algorithm) is not None:
            self.found.append(single_pass_of(self.algorithm)._pass.run.graphs)


@pytest.mark.parametrize("case", TEXT_CASES, ids=lambda case: case.name)
def test_huggingface_models(case, served):
    models = []
    for reuse in (False, True):
        model = case.model()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trained(model, loader(case.data(M), M), [always(reuse=reuse)], device_train_microbatch_size=4)
        said = [str(each.message) for each in caught if "two forward passes" in str(each.message)]
        assert not said
        models.append(model)
    assert sum(served) == int(KEEP * M)
    assert_same_parameters(*models)


def test_bert_with_dropout(served):
    """The masks are those of the forward pass that selected: the verification would say if they were not."""
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    case = TextCase(
        "dropout", lambda: BertForSequenceClassification(_bert_config(num_labels=3, **dropout)), _classes, ""
    )
    trained(case.model(), loader(case.data(M), M), [always()], max_duration="2ba")
    assert sum(served) == 2 * int(KEEP * M)


@pytest.mark.parametrize("case", [CLASSIFICATION, TOKENS, CAUSAL_LM], ids=lambda case: case.name)
def test_minibatches_of_many_lengths(case, served):
    """As dynamic padding makes them: the model is captured for the first, and once for all others."""

    def batches():
        for i, length in enumerate([6, 7, 5, 6]):
            batch = case.batch(10, seed=i)
            yield {key: value[:, -length:].contiguous() if value.dim() == 2 else value for key, value in batch.items()}

    models, runs = [], []
    for reuse in (False, True):
        model, algorithm = case.model(), always(reuse=reuse)
        data = DataSpec(list(batches()), get_num_samples_in_batch=lambda batch: len(batch["labels"]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watcher = GraphsOf(algorithm, runs)
            trained(model, data, [algorithm], max_duration="1ep", callbacks=[watcher], device_train_microbatch_size=10)
        assert not [each for each in caught if "two forward passes" in str(each.message)]
        models.append(model)
    assert served == [4] * 4
    assert len(set(runs)) == 2
    assert_same_parameters(*models)
