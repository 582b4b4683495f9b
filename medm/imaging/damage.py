"""What decoders raise when the bytes of a stranger are damaged."""

from __future__ import annotations

import struct
import tokenize
import zlib

try:
    from lzma import LZMAError
except ImportError:  # a Python built without it cannot meet the error either
    LZMAError = OSError  # type: ignore[assignment, misc]

DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    EOFError, RuntimeError,
    MemoryError, AssertionError, struct.error, zlib.error, LZMAError, tokenize.TokenError,
)  # fmt: skip
"""Messages built from these tell the type only: the text may quote metadata of a patient."""
