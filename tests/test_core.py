"""The functional core stands without Composer: where torch is newer than Composer allows, and on machines of others."""

from __future__ import annotations

import subprocess
import sys

import pytest

import composer_gradmatch


def test_the_core_works_without_composer():
    code = (
        "import sys; sys.modules['composer'] = None\n"
        "import torch\n"
        "from composer_gradmatch import gram_omp, last_layer_gram, normalize_weights\n"
        "from composer_gradmatch.matching.weighted_picks import match_mean_gradient, match_on_device\n"
        "h, p = torch.randn(20, 8).double(), torch.randn(20, 3).double()\n"
        "gram = last_layer_gram(h, p)\n"
        "indices, weights = gram_omp(gram, gram.mean(1), 5)\n"
        "weights = normalize_weights(weights[weights > 0])\n"
        "torch.testing.assert_close(match_mean_gradient(gram, 5).weights, weights)\n"
        "match_on_device(gram, 5)\n"
        "try:\n"
        "    import composer_gradmatch; composer_gradmatch.GradMatch\n"
        "except ImportError:\n"
        "    print('core only')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "core only"


def test_every_public_name_is_there_and_no_other():
    for name in composer_gradmatch.__all__:
        value = getattr(composer_gradmatch, name)
        assert value is composer_gradmatch.registered.register if name == "register" else value.__name__ == name
    assert set(composer_gradmatch.__all__) <= set(dir(composer_gradmatch))
    with pytest.raises(AttributeError, match="no attribute 'SelectiveBackprop'"):
        composer_gradmatch.SelectiveBackprop  # noqa: B018
