"""Private interfaces of torch and Composer stand in one file each, and the package works without them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BATCHNORM, loader, make_trainer

import composer_gradmatch
from composer_gradmatch import GradMatch, select_first

PACKAGE = Path(composer_gradmatch.__file__).parent
MAY = {"forward/torch_private.py", "forward/composer_private.py"}


def private_names(source: str) -> list[str]:
    """What a source imports, or takes from the module itself, that is private to torch or Composer."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.append(node.value)
    private = re.compile(r"(torch|composer)(\.\w+)*\._[a-z]\w*(\.\w+)*|functorch\.[\w.]+")
    return [name for name in names if private.fullmatch(name)]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_stand_in_one_file(path):
    if path.relative_to(PACKAGE).as_posix() not in MAY:
        assert private_names(path.read_text()) == []


def test_this_test_can_fail():
    source = (
        "import torch._dynamo\nfrom torch.utils._pytree import tree_map\nfrom functorch.compile import min_cut\n"
        "from composer.trainer.trainer import _generate_run_name\ntorch._ops.OpOverload\nlogger = 'torch._inductor'\n"
        "from torch.nn import functional\nself._own\ntorch.compile(model)\n"
    )
    assert sorted(set(private_names(source))) == [
        "composer.trainer.trainer._generate_run_name",
        "functorch.compile.min_cut",
        "torch._dynamo",
        "torch._inductor",
        "torch._ops",
        "torch._ops.OpOverload",
        "torch.utils._pytree.tree_map",
    ]


def test_a_run_is_made_in_two_passes_without_any_of_them(tmp_path):
    script = Path(__file__).with_name("without_private_names.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "model.pt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (said,) = ast.literal_eval(done.stdout.splitlines()[-1])
    why = r"two forward passes are made: torch \S+ is not a version that it works with \(it has no \S+\)"
    assert re.search(why, said)
    model = BATCHNORM.model()
    algorithm = GradMatch(start=0.0, end=1.0, keep=0.5, interrupt=0)
    make_trainer(
        model, loader(BATCHNORM.data(24), 12), [algorithm], algorithm_passes=[select_first], max_duration="2ba", seed=1
    ).fit()
    found = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
