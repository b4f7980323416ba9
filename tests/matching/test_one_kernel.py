"""The Triton kernel: its results by Triton's interpreter, and that it compiles for real devices."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is for Linux only.")


def test_the_kernel_equals_the_loop_under_the_interpreter():
    script = Path(__file__).with_name("interpreted_kernel.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 21


@pytest.mark.parametrize(
    ("columns", "tile", "warps", "picks", "number", "capability"),
    [
        (32, 32, 4, 1, "fp64", 90),
        (128, 32, 4, 16, "fp64", 80),
        (128, 32, 4, 16, "fp32", 90),
        (1024, 8, 16, 128, "fp64", 90),
    ],
)
def test_the_kernel_compiles_for_a_gpu(columns, tile, warps, picks, number, capability):
    """Without one: down to PTX, where no step reads what another thread wrote but behind a barrier."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from composer_gradmatch.matching.one_kernel import _omp_kernel

    names = _omp_kernel.arg_names
    kinds = dict.fromkeys(names, f"*{number}") | {"picks": "*i64"}
    kinds |= dict.fromkeys(("m", "k", "row_stride", "column_stride"), "i32")
    kinds |= dict.fromkeys(("ridge_high", "ridge_low"), "fp32")
    constants = {"DEPENDENCE": 1e-10, "ROUNDING": 1e-15, "COLUMNS": columns, "TILE": tile, "PICKS": picks}
    # As at a launch, where a 1 becomes a constant, and pointers are aligned.
    constants |= dict.fromkeys(("m", "k", "row_stride", "column_stride") if picks == 1 else ("column_stride",), 1)
    kinds |= dict.fromkeys(constants, "constexpr")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in kinds.items() if kind[0] == "*"}
    compiled = triton.compile(
        ASTSource(fn=_omp_kernel, signature=kinds, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": 1},
    )
    code = compiled.asm["ptx"]
    accesses = re.findall(r"(ld|st)\.global|(bar)\.sync", code)
    assert "bar" in [b for _, b in accesses]
    order = "".join({"ld": "l", "st": "s", "": "b"}[access] for access, _ in accesses)
    assert re.search("sb", order), "the barrier comes after the step's writes"
    assert not re.search("sl", order), "nothing is read between a step's writes and the barrier"
    assert "cp.async" not in code, "loads of Q must not run ahead of the barrier"
    assert "ld.global.nc" not in code, "nor come from a cache that others' writes do not reach"
