"""Evaluation: benchmarks run, scored, compared and reported. Knows no training."""
