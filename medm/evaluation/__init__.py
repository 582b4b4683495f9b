"""Evaluation: generation, batch inference over annotation files, and scored reports. Knows no training."""
