"""Speed and memory of our own parts: ``python -m composer_gradmatch.benchmarks memory``."""
