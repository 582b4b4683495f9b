"""Training: trained parts of a model, the loop, atomic checkpoints. Knows no modality."""
