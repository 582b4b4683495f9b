"""Pseudonyms of identifiers: keyed hashes, equal for equal values under one salt.

Whoever has the salt can test whether a known identifier belongs to a pseudonym, so the salt is as
confidential as the identifiers. Without one it is random and forgotten with the process.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

from medm.errors import RecipeError

MIN_SALT = 16
"""Fewest bytes of a salt that is given."""
_LENGTH = 8
"""Bytes of a pseudonym; two of a million patients share one with a probability of 3e-8."""


class Pseudonyms:
    """Names for identifiers.

    Args:
        salt: key of the hash; None for a random one, so that each run has other names.
    """

    def __init__(self, salt: bytes | None = None) -> None:
        self._salt = hashlib.sha256(secrets.token_bytes(32) if salt is None else salt).digest()

    def name(self, value: str, kind: str) -> str:
        """Return 16 hexadecimal digits that stand for a value.

        Args:
            value: the identifier; spaces around it do not count.
            kind: what it identifies, so that a patient and a study of one number differ.
        """
        return self._digest(f"{kind}\0{value.strip()}", _LENGTH).hex()

    def uid(self, value: str) -> str:
        """Return a UID that stands for another, by PS3.5, B.2: `2.25.` and 128 bits."""
        return f"2.25.{int.from_bytes(self._digest(value.strip(), 16), 'big')}"

    def _digest(self, text: str, size: int) -> bytes:
        return hashlib.blake2b(text.encode(), key=self._salt, digest_size=size).digest()


def read_salt(file: Path | None) -> bytes | None:
    """Return the content of a file as salt; None for none.

    Raises:
        RecipeError: the file cannot be read or is too short to keep the names apart from guesses.
    """
    if file is None:
        return None
    try:
        salt = file.read_bytes().strip()
    except OSError as error:
        raise RecipeError(f"{file}: the salt cannot be read ({error.strerror or error})") from None
    if len(salt) < MIN_SALT:
        raise RecipeError(
            f"{file}: a salt of {len(salt)} bytes; expected {MIN_SALT} or more, such as those of "
            "`openssl rand -hex 32`"
        )
    return salt
