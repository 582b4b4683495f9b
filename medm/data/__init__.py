"""Annotation files to batches: records, their check, mixtures, batching and packing. Knows no
model, device or rank.
"""
