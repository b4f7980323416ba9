"""The solvers behind :func:`.gram_omp`, each in a file of its own."""
