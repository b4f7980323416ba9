"""The output layer of HuggingFace's models is found, and H and P through it give its parameters' gradients."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from cases import MLP, NUM_CLASSES, loader, make_trainer, record_selections
from composer.models import ComposerClassifier, HuggingFaceModel
from oracles import brute_force_omp, clip_and_normalize, per_sample_gradients
from torch import nn

from composer_gradmatch import GradMatch, last_layer_gram
from composer_gradmatch.forward.losses import per_sample_losses
from composer_gradmatch.last_layer import CheckedTap, name_of, observe_output_layer

ON = {"start": 0.0, "end": 1.0, "interrupt": 0}
M, LENGTH, VOCABULARY = 9, 6, 40
NO_DROPOUT = {
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "dropout_rate": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "summary_first_dropout": 0.0,
    "seq_classif_dropout": 0.0,
    "classifier_dropout": 0.0,
}
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
BERT |= {"max_position_embeddings": 20, "embedding_size": 16}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}
OPT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 16}
OPT |= {"max_position_embeddings": 20}
LLAMA = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 20}
DISTIL = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 20}
MODELS = {
    "OPTForCausalLM": (hf.OPTConfig, OPT, "tokens", "lm_head"),
    "OPTForSequenceClassification": (hf.OPTConfig, OPT, "classes", "score"),
    "GPT2LMHeadModel": (hf.GPT2Config, GPT2, "tokens", "lm_head"),
    "GPT2ForSequenceClassification": (hf.GPT2Config, GPT2, "classes", "score"),
    "GPT2ForTokenClassification": (hf.GPT2Config, GPT2, "token classes", "classifier"),
    "T5ForConditionalGeneration": (hf.T5Config, T5, "tokens", "lm_head"),
    "BartForConditionalGeneration": (hf.BartConfig, BART, "tokens", "lm_head"),
    "BartForSequenceClassification": (hf.BartConfig, BART, "classes", "classification_head.out_proj"),
    "BertForMaskedLM": (hf.BertConfig, BERT, "tokens", "cls.predictions.decoder"),
    "BertForSequenceClassification": (hf.BertConfig, BERT, "classes", "classifier"),
    "DistilBertForSequenceClassification": (hf.DistilBertConfig, DISTIL, "classes", "classifier"),
    "DistilBertForMaskedLM": (hf.DistilBertConfig, DISTIL, "tokens", "vocab_projector"),
    "RobertaForTokenClassification": (hf.RobertaConfig, BERT, "token classes", "classifier"),
    "RobertaForSequenceClassification": (hf.RobertaConfig, BERT, "classes", "classifier.out_proj"),
    "LlamaForCausalLM": (hf.LlamaConfig, LLAMA, "tokens", "lm_head"),
    "LlamaForSequenceClassification": (hf.LlamaConfig, LLAMA, "classes", "score"),
    "ElectraForMaskedLM": (hf.ElectraConfig, BERT, "tokens", "generator_lm_head"),
    "ElectraForSequenceClassification": (hf.ElectraConfig, BERT, "classes", "classifier.out_proj"),
}


def build(name, **changes):
    config, sizes, kind, layer = MODELS[name]
    torch.manual_seed(0)
    model = getattr(hf, name)(config(**{**COMMON, **NO_DROPOUT, **sizes, **changes}))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (M, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if name.startswith("Bart") and kind == "classes":
        ids[:, -1] = 2  # Which it wants exactly one of.
    else:
        ids[::3, -2:], mask[::3, -2:] = 0, 0
    labels = {
        "classes": torch.randint(3, (M,), generator=generator),
        "tokens": torch.randint(3, VOCABULARY, (M, LENGTH), generator=generator),
        "token classes": torch.randint(3, (M, LENGTH), generator=generator),
    }[kind]
    return HuggingFaceModel(model), {"input_ids": ids, "attention_mask": mask, "labels": labels}, layer


def explicit_gradients(model, batch, layer):
    """Each sample's gradient of a layer's parameters, float64; of its own part, where its weight is shared."""
    model = copy.deepcopy(model).double()
    head = model.model.get_submodule(layer)
    head.weight = nn.Parameter(head.weight.detach().clone())
    losses = per_sample_losses(model, model(batch), batch, M)
    return per_sample_gradients(lambda i: losses[i], list(head.parameters()), M).double()


@pytest.mark.parametrize("form", ["mapping", "tuple"])
@pytest.mark.parametrize("name", MODELS)
def test_the_layer_that_is_found_gives_the_explicit_gradients_gram_matrix(name, form):
    model, batch, layer = build(name, return_dict=form == "mapping")
    model = model.double().eval()  # T5 has dropouts that no argument turns off.
    found = observe_output_layer(model, batch)
    assert name_of(model, found) == repr(f"model.{layer}")
    with CheckedTap(model, found, chosen=False).open() as tap:
        inputs, grads = tap.inputs_and_grads(per_sample_losses(model, model(batch), batch, M))
    gram = last_layer_gram(inputs.double(), grads.double(), found.bias is not None)
    gradients = explicit_gradients(model, batch, layer)
    expected = gradients @ gradients.T
    # Models compute their own softmax or its logits in float32 here and there.
    assert (gram - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["OPTForCausalLM", "GPT2ForSequenceClassification", "BartForConditionalGeneration"])
@pytest.mark.parametrize("size", [None, 4])
def test_a_step_picks_what_brute_force_picks(name, size):
    model, batch, layer = build(name)
    gradients = explicit_gradients(model, batch, layer).numpy()
    picks, weights, margins = brute_force_omp(gradients, gradients.mean(0), 4)
    assert min(margins) > 1e-4
    picks, weights = clip_and_normalize(picks, weights)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(M)]
    algorithm = GradMatch(keep=4 / M, selection_microbatch_size=size, **ON)
    seen = record_selections(algorithm)
    make_trainer(model, loader(rows, M), [algorithm]).fit()
    assert seen[0][1].indices.tolist() == picks.tolist()
    np.testing.assert_allclose(seen[0][1].weights, weights, rtol=1e-3, atol=1e-4)


class TiedHead(nn.Module):
    """A language model in small, whose head is no module."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(NUM_CLASSES, 8)
        self.body, self.middle = nn.Linear(12, 8), nn.Linear(8, 8)

    def forward(self, inputs):
        return F.linear(torch.tanh(self.middle(torch.tanh(self.body(inputs)))), self.embedding.weight)


def fit(module, algorithm, data=None):
    """Trains for a batch; returns the algorithm's own warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = ComposerClassifier(module, num_classes=NUM_CLASSES)
        make_trainer(model, loader(data or MLP.data(40), 20), [algorithm], max_duration="1ep").fit()
    return [str(each.message) for each in seen if "GradMatch" in str(each.message)]


class NormalisedHead(TiedHead):
    """A head whose weight is computed."""

    def forward(self, inputs):
        hidden = torch.tanh(self.middle(torch.tanh(self.body(inputs))))
        return F.linear(hidden, F.normalize(self.embedding.weight, dim=1))


def test_a_head_whose_weight_is_computed_is_named_and_no_other_layer_is_advised():
    with pytest.raises(ValueError, match=r"embedding\.weight \(of Embedding\), but not by a matrix product") as error:
        fit(NormalisedHead(), GradMatch(keep=0.4, **ON))
    assert "Its nn.Linear layers are" not in str(error.value)


def test_a_tied_head_as_wide_as_the_layer_before_it_is_not_taken_for_that():
    class Square(TiedHead):
        def __init__(self):
            super().__init__()
            self.middle = nn.Linear(8, NUM_CLASSES)
            self.embedding = nn.Embedding(NUM_CLASSES, NUM_CLASSES)

    model = Square()
    assert name_of(model, observe_output_layer(model, torch.randn(4, 12))) == "'embedding.weight'"


def test_a_layer_that_the_user_names_before_the_last_is_warned_of_once_and_matched():
    algorithm = GradMatch(keep=0.4, output_layer="module.middle", **ON)
    seen = record_selections(algorithm)
    said = [each for each in fit(TiedHead(), algorithm) if "not what the loss depends on first" in each]
    assert len(said) == 1
    assert "module.embedding.weight" in said[0]
    assert "module.body" not in said[0]
    assert len(seen) == 2


def test_a_layer_behind_which_the_loss_has_learned_parameters_is_refused_by_their_names():
    class Learned(ComposerClassifier):
        def __init__(self):
            super().__init__(MLP.module(), num_classes=NUM_CLASSES)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def loss(self, outputs, batch, reduction="mean"):
            return F.cross_entropy(outputs * self.scale, batch[1], reduction=reduction)

    with pytest.raises(ValueError, match=r"taken for 'module\.2', but .* there are scale\."):
        make_trainer(Learned(), loader(MLP.data(40), 20), [GradMatch(keep=0.4, **ON)]).fit()


class Cosine(nn.Linear):
    def forward(self, input):
        return 5 * F.linear(F.normalize(input, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class Adapted(nn.Linear):
    """Low-rank adaptation, which starts out as nothing."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down = nn.Parameter(torch.randn(2, self.in_features))
        self.up = nn.Parameter(torch.zeros(self.out_features, 2))

    def forward(self, input):
        return super().forward(input) + F.linear(F.linear(input, self.down), self.up)


def hooked(head):
    head.register_forward_hook(lambda module, args, output: output * 0.5)
    return head


def zeroed(head):
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    "head",
    [
        lambda: Cosine(16, NUM_CLASSES),
        lambda: zeroed(Cosine(16, NUM_CLASSES)),
        lambda: Adapted(16, NUM_CLASSES),
        lambda: hooked(nn.Linear(16, NUM_CLASSES)),
    ],
    ids=["cosine", "cosine of zeros", "adapter", "forward hook"],
)
def test_a_layer_that_is_not_linear_in_its_weight_is_refused_by_name(head, named):
    module = MLP.module()
    module[2] = head()
    with pytest.raises(ValueError, match=r"The output layer 'module\.2', a \w+, does not put out its input times"):
        fit(module, GradMatch(keep=0.4, output_layer="module.2" if named else None, **ON))


class Verbose(nn.Linear):
    """A forward of its own that is truly linear."""

    def forward(self, input):
        return torch.einsum("...d,cd->...c", input, self.weight) + self.bias


@pytest.mark.parametrize("precision", [None, "amp_bf16"])
@pytest.mark.parametrize(
    "head",
    [
        lambda: Verbose(16, NUM_CLASSES),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, NUM_CLASSES)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, NUM_CLASSES)),
        lambda: zeroed(nn.Linear(16, NUM_CLASSES)),
    ],
    ids=["einsum", "weight norm", "spectral norm", "zeros"],
)
def test_a_layer_that_is_linear_is_taken_however_it_is_written(head, precision):
    module = MLP.module()
    module[2] = head()
    algorithm = GradMatch(keep=0.4, selection_precision=precision, **ON)
    seen = record_selections(algorithm)
    fit(module, algorithm)
    assert len(seen) == 2


class Positions(nn.Module):
    """Its head runs at positions, first or second."""

    def __init__(self, first):
        super().__init__()
        self.first = first
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, NUM_CLASSES)

    def forward(self, inputs):
        hidden = torch.tanh(self.body(inputs))
        logits = self.head(hidden.transpose(0, 1) if self.first else hidden)
        return logits.mean(0 if self.first else 1)


@pytest.mark.parametrize("positions", [7, 20, 1], ids=["", "as many as samples", "one"])
@pytest.mark.parametrize("size", [None, 7])
@pytest.mark.parametrize("reuse", [False, True])
def test_a_head_that_runs_with_positions_first_gives_the_same_picks(positions, size, reuse):
    if reuse and size is not None:
        pytest.skip("One pass is over the whole minibatch.")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, positions, 6, generator=generator)
    data = torch.utils.data.TensorDataset(inputs, torch.randint(NUM_CLASSES, (40,), generator=generator))
    picks = []
    for first in (False, True):
        torch.manual_seed(0)
        algorithm = GradMatch(keep=0.4, selection_microbatch_size=size, reuse_activations=reuse, **ON)
        seen = record_selections(algorithm)
        fit(Positions(first), algorithm, data)
        picks.append([selection.indices.tolist() for _, selection in seen])
    assert picks[0] == picks[1]
    assert len(picks[0]) == 2
