"""Speed, memory and quality of our own parts: ``python -m composer_gradmatch.benchmarks omp|memory|solvers|greedy``."""
