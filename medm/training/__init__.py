"""Training: what of a model is trained, the loop, whole checkpoints. Knows no modality."""
