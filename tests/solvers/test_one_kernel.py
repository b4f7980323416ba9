"""The Triton kernel: its results by Triton's interpreter, and that it compiles for real devices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is for Linux only.")


def test_the_kernel_equals_the_loop_under_the_interpreter():
    script = Path(__file__).with_name("interpreted_kernel.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 13


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("columns", "tile", "warps"), [(32, 32, 4), (128, 32, 4), (1024, 8, 16)])
def test_the_kernel_compiles_for_a_gpu(columns, tile, warps, capability):
    """Without one: down to PTX, with a barrier in each step."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from composer_gradmatch.solvers.one_kernel import _omp_kernel

    kinds = dict.fromkeys(_omp_kernel.arg_names, "*fp64") | {"picks": "*i64"}
    kinds |= dict.fromkeys(("m", "k", "row_stride", "column_stride"), "i32")
    kinds |= dict.fromkeys(("ridge", "dependent", "rounding_unit"), "fp32")
    constants = {"COLUMNS": columns, "TILE": tile, "PICKS": 16}
    kinds |= dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(fn=_omp_kernel, signature=kinds, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": 1},
    )
    assert "bar.sync" in compiled.asm["ptx"]
    assert "cp.async" not in compiled.asm["ptx"], "loads of Q must not run ahead of the barrier"
