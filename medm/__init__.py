"""medm: a factory for small medical vision-language models. Not for clinical use."""

__version__ = "0.1.0"
