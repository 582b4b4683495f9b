"""Heads: mask decoders, classification, projection. They know no data set and no loss. None is
registered yet.
"""
