"""From annotation files to batches: records, checks, mixtures, batching and packing.

Knows no model, device or rank.
"""
