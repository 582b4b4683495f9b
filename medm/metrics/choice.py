"""Closed questions: answers are parsed, never searched for as substrings.

"abnormal" contains "no", and "A large mass" begins with an A; neither is an answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from medm.metrics.base import DEFAULT, MetricResult, Resampling, check_lengths, mean_result
from medm.metrics.words import ANSWER_SIGNATURE, normalize_answer, plain_marks, same_answer

_YES = frozenset(("yes", "yeah", "yep", "true", "correct"))
_NO = frozenset(("no", "nope", "false", "incorrect"))
_DECISIONS = {**dict.fromkeys(_YES, "yes"), **dict.fromkeys(_NO, "no"), "maybe": "maybe"}
_ANSWER_IS = r"(?:answer|choice|option)(?:\s+(?:is|would\s+be|should\s+be))?\s*[:=]?\s*"
_STATED_DECISION = re.compile(rf"\b{_ANSWER_IS}[\"'(*]*(yes|no|true|false|maybe)\b", re.IGNORECASE)
_CLOSED_REFERENCE = re.compile(r"\W*(\w+)\s*(?:[.,;:!].*)?$", re.DOTALL)
"""A word alone, or cut off from what follows it: "No, none", not "no effusion" or "true pelvis"."""

_CLAUSE_END = re.compile(r"[.,;:!?\n](?!\d)")
_NEGATIONS = frozenset(
    ("not", "no", "never", "neither", "nor", "without", "than", "except", "excluding", "isnt",
    "arent", "wasnt",
     "cannot", "cant", "doesnt", "dont")
)  # fmt: skip
_TURNS = frozenset(("but", "instead"))
_NEGATION_REACH = 4
"""Words before a wording among which a negation is about it: "not really the left liver"."""

_LETTER = r"[\"'(\[*]*\b([A-Za-z])\b"
_LEADING_LETTER = re.compile(
    r"(?!\s*(?:e\.g|i\.e)\b)\s*[\"'*]*"
    r"(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])\s*(?:[.):\]*]|$))"
)
_STATED_LETTER = re.compile(
    rf"\b{_ANSWER_IS}{_LETTER}(?=\s*(?:[.,;:)\]*\"']|$|\s+(?:because|since|as)\b))", re.IGNORECASE
)
_BRACKETED_LETTER = re.compile(r"\(([A-Za-z])\)")


def parse_yes_no(text: str) -> bool | None:
    """Return the yes or no that a text answers, or None if it answers neither.

    Read: a first word that is an answer, "the answer is ...", or an answer as the last sentence.
    Not read: a "no" within a sentence ("there is no effusion"), because whether that means yes or
    no depends on the question.
    """
    return {"yes": True, "no": False}.get(parse_decision(text) or "")


def parse_decision(text: str) -> str | None:
    """Return `yes`, `no` or `maybe`, read as `parse_yes_no` does.

    None if the text says none or several of them.
    """
    text = plain_marks(text)
    words = normalize_answer(text).split()
    if not words:
        return None
    leading = _DECISIONS.get(words[0]) if words[:2] != ["no", "doubt"] else None
    if (
        leading
        and len({word for word in words[:3] if word in ("yes", "no", "maybe")} | {leading}) == 1
    ):
        return leading
    stated = _STATED_DECISION.findall(text)
    if stated:
        return _DECISIONS[stated[-1].lower()]
    return _DECISIONS.get(normalize_answer(re.split(r"[.!?\n]", text.strip().rstrip(".!?"))[-1]))


def parse_choice(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that a text chooses among `options` (letter -> text).

    None if it names none or several.

    Read, in this order: a letter at the start ("B", "B.", "(b) liver"), a text that is one option's
    wording, "the answer is B", a single bracketed letter, exactly one option's wording among the
    words. A letter outranks the wording beside it.
    """
    text = plain_marks(text.replace("、", ". "))  # "B、" is "B." of Chinese lists
    letters = {letter.upper(): wording for letter, wording in options.items()}
    leading = _LEADING_LETTER.match(text)
    if leading:
        letter = next(group for group in leading.groups() if group).upper()
        if letter in letters:
            return letter
    if any(same_answer(text, wording) for wording in letters.values() if wording):
        return parse_wording(text, letters)
    for pattern in (_STATED_LETTER, _BRACKETED_LETTER):
        found = {letter.upper() for letter in pattern.findall(text)} & letters.keys()
        if found:
            return found.pop() if len(found) == 1 else None
    return parse_wording(text, letters)


def parse_wording(text: str, options: Mapping[str, str]) -> str | None:
    """Return the key of the one option whose wording is in a text as whole words.

    None if there is no such option, or several.

    "left lung" also holds "lung": an option within another one that is there does not count as a
    second answer. A wording that is negated in its clause ("not the liver") is no answer. Options
    that read yes, no or maybe are never looked for inside a sentence ("there is no doubt that it
    helps"); see `parse_decision`.
    """
    text = plain_marks(text)
    answer = normalize_answer(text)
    wordings = {key: normalize_answer(wording) for key, wording in options.items()}
    equal = [key for key, wording in wordings.items() if wording and wording == answer]
    if equal:
        return equal[0] if len(equal) == 1 else None
    clauses = [normalize_answer(clause).split() for clause in _CLAUSE_END.split(text)]
    decision = parse_decision(text)
    inside = {
        key
        for key, wording in wordings.items()
        if (
            _DECISIONS[wording] == decision
            if wording in _DECISIONS
            else _affirmed(wording.split(), clauses)
        )
    }
    inside -= {
        small
        for small in inside
        for large in inside
        if small != large
        and f" {wordings[small]} " in f" {wordings[large]} "
        and wordings[small] != wordings[large]
    }
    return inside.pop() if len(inside) == 1 else None


def _affirmed(wording: Sequence[str], clauses: Sequence[Sequence[str]]) -> bool:
    """Return whether the words occur in sequence without a negation shortly before them.

    Only a negation in the same clause counts.
    """
    words: list[str] = []
    begins: list[int] = []  # of each word, where its clause begins
    for clause in clauses:
        begins += [len(words)] * len(clause)
        words += clause
    for place in range(len(words) - len(wording) + 1 if wording else 0):
        if list(words[place : place + len(wording)]) != list(wording):
            continue
        before = words[max(begins[place], place - _NEGATION_REACH) : place]
        turn = max((at for at, word in enumerate(before) if word in _TURNS), default=-1)
        if not _NEGATIONS & set(before[turn + 1 :]):
            return True
    return False


def closed_accuracy(
    predictions: Sequence[str], references: Sequence[str], *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Accuracy on closed questions.

    Where the reference is yes or no, alone or before a comma, the prediction is parsed for one;
    otherwise ("left", "MRI", "true pelvis") it has to equal the reference after normalization.
    `closed-unparsed` is the fraction of yes/no questions whose answer says neither.
    """
    check_lengths(predictions, references)
    hits, unparsed, asked = [], [], []
    for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        bare = _CLOSED_REFERENCE.match(reference)
        expected = parse_yes_no(reference) if bare and bare.group(1).lower() in _YES | _NO else None
        if expected is None:
            hits.append(float(same_answer(prediction, reference)))
            continue
        answer = parse_yes_no(prediction)
        hits.append(float(answer is expected))
        unparsed.append(float(answer is None))
        asked.append(index)
    signature = f"yes/no:parsed,bare-reference|other:{ANSWER_SIGNATURE}"
    return [
        mean_result("closed-accuracy", hits, signature, resampling),
        *(
            [mean_result("closed-unparsed", unparsed, signature, resampling.part(asked))]
            if unparsed
            else []
        ),
    ]


def choice_accuracy(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    options: Sequence[Mapping[str, str]] | None = None,
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Accuracy on multiple choice, and the fraction of texts in which no choice could be read.

    Args:
        predictions: free texts.
        references: the right letter, alone or leading ("B", "(b) liver").
        options: letter -> wording of each question. Without them only letters A to Z are read.
        resampling: how the interval is drawn.
    """
    n = check_lengths(predictions, references)
    if options is not None:
        check_lengths(options, references)
    letters_only = {chr(code): "" for code in range(ord("A"), ord("Z") + 1)}
    hits, unparsed = [], []
    for index in range(n):
        choices = options[index] if options is not None else letters_only
        expected = parse_choice(references[index], choices)
        if expected is None:
            raise ValueError(
                f"item {index}: no choice can be read from the reference {references[index]!r}"
            )
        answer = parse_choice(predictions[index], choices)
        hits.append(float(answer == expected))
        unparsed.append(float(answer is None))
    signature = (
        f"choice:parsed|wording:{'affirmed' if options is not None else 'no'}|{ANSWER_SIGNATURE}"
    )
    return [
        mean_result("choice-accuracy", hits, signature, resampling),
        mean_result("choice-unparsed", unparsed, signature, resampling),
    ]
