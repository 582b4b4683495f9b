"""Choice of the caption that is learned: rules by name, and the marks of UniMed-CLIP's shards.

UniMed-CLIP's shards hold all captions of an image in one text, separated by a mark that names the
source. The mark says how one of them is chosen; no other rule may see it as text.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

from medm.data.options import CaptionRule
from medm.errors import DataError

_TEMPLATES = 10
"""Captions of UniMed-CLIP's label-derived sources that are drawn from; further ones are longer
texts of all labels together."""
_NO_REPORT = "noreportpresent"
"""Text in the place of a missing report of MIMIC-CXR."""
_MARK = re.compile(
    r"_(radimagenet|chexpert|chestxray8|openi|mimiccxr|all_retina_merged|dr|medicat)_"
)


def candidates(captions: Sequence[str], rule: CaptionRule) -> tuple[str, ...]:
    """Return the captions from which one is drawn uniformly.

    Args:
        captions: those of the record, one or more.
        rule: see `SourceOptions.captions`.

    Raises:
        DataError: a caption has a mark, and the rule is another than `sentinel`; or nothing is left
            between the marks.
    """
    if rule == "sentinel":
        return tuple(choice for caption in captions for choice in _between_marks(caption))
    for caption in captions:
        if found := _MARK.search(caption):
            raise DataError(
                f"the text has the mark {found[0]!r} of UniMed-CLIP between its captions, which "
                "would be learned as words; set captions: sentinel for this source"
            )
    if rule == "first":
        return (captions[0],)
    return (" ".join(captions),) if rule == "concat" else tuple(captions)


def _between_marks(text: str) -> tuple[str, ...]:
    """Return the captions that the rule of the text's mark leaves to draw from; a text without a
    mark as it is.
    """
    found = _MARK.search(text)
    if found is None:
        return (text,)
    pieces = [piece.strip() for piece in text.split(found[0])]
    if _MARK.search(" ".join(pieces)):
        raise DataError("the text has the marks of two sources of UniMed-CLIP; expected one")
    source = found[1]
    if source == "mimiccxr" and len(pieces) > 2 and not pieces[-2]:
        *pieces, report = pieces  # two marks in a row stand before the report
        if report and report != _NO_REPORT:
            return (report,)
    chosen = [piece for piece in pieces if piece.strip(".")]
    if not chosen:
        raise DataError(f"no caption stands between the marks {found[0]!r}")
    return tuple(chosen[:1] if source == "openi" else chosen[:_TEMPLATES])


def same_label(caption: str, label: str | int | None, *, source: str) -> int:
    """Return a number of 63 bits that equal captions or labels share, on every rank and in every
    run.

    Without a label, captions are equal whatever their capital letters, spaces and final stop.
    Labels that are words are equal in all sources; numbers only within one.

    Args:
        caption: the text that is learned.
        label: the record's label, which replaces the caption.
        source: name of the source.
    """
    if label is None:
        words = unicodedata.normalize("NFKC", caption).casefold().split()
        text = f"caption\0{' '.join(words).rstrip('. ')}"
    else:
        name = unicodedata.normalize("NFKC", str(label)).casefold().strip()
        text = f"label\0{source if name.lstrip('-').isdecimal() else ''}\0{name}"
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
