"""Heads: mask decoders, classification, projection.

They depend on no data set and no loss. None is registered yet.
"""
