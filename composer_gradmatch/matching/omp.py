"""Algorithm 2 as this machine has it: compiled where numba is installed, in numpy otherwise."""

try:
    from composer_gradmatch.matching.compiled import solve_compiled as solve_fastest
except ImportError:
    from composer_gradmatch.matching.pursuit import solve_omp as solve_fastest

__all__ = ["solve_fastest"]
