"""Exceptions that decoders raise on damaged, untrusted input."""

from __future__ import annotations

import struct
import tokenize
import zlib

try:
    from lzma import LZMAError
except ImportError:  # a Python built without it cannot raise the error either
    LZMAError = OSError  # type: ignore[assignment, misc]

DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    EOFError, RuntimeError,
    MemoryError, AssertionError, struct.error, zlib.error, LZMAError, tokenize.TokenError,
)  # fmt: skip
"""Messages built from these name the type only: the text may quote metadata of a patient."""
