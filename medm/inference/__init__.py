"""Inference: generation, batch inference over annotation files, and chat.

Knows no benchmark and no training.
"""
