"""Rule-based labeler of 14 chest findings in English reports, offline.

The labels are CheXpert's (Irvin et al. 2019); the rules are medm's own: phrases, then cues of
negation and doubt within the clause. A measuring aid for comparing generated with written reports,
and not a clinical tool.

"No Finding" takes evidence: a statement that something is normal or absent ("lungs are clear", "no
acute disease", "no effusion"), or a device as the only thing named. A blank or unrelated text has
no label, and so hits nothing; CheXpert's labeler calls it "No Finding" (`no_finding="unmentioned"`
repeats that).

Known limits: misspellings and phrases outside of the tables are not seen; a cue reaches over a list
of findings but not over a full stop or a verb, so long-winded negation is missed; history
("previous pneumonia") counts as present unless it is called resolved; comparison ("no change in the
effusion") counts as present; laterality and severity are not judged. Not tuned on any test set.
Scores compare with each other, and not with CheXbert's or the CheXpert labeler's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from medm.metrics.base import (
    DEFAULT,
    MetricResult,
    Resampling,
    check_lengths,
    is_blank,
    ratio,
    summed_result,
    undefined,
    with_note,
)

Status: TypeAlias = Literal["positive", "negative", "uncertain"]

PHRASES: dict[str, tuple[str, ...]] = {
    "Enlarged Cardiomediastinum": (
        r"(?:widen(?:ed|ing)|enlarged?(?:ment)?|prominen(?:t|ce))(?: of)?(?: the)? (?:cardio)?-?mediastin\w+",
        r"mediastin\w+(?: (?:silhouette|contour))? (?:is |appears |remains |are )?(?:mildly |moderately |slightly )?"
        r"(?:widened|enlarged|prominent)",
    ),
    "Cardiomegaly": (
        r"cardiomegaly", r"enlarged (?:heart|cardiac silhouette|cardiopericardial silhouette)",
        r"enlargement of the (?:heart|cardiac silhouette)", r"cardiac enlargement",
        r"(?:heart|cardiac silhouette|heart size|cardiac size|cardiopericardial silhouette)"
        r" (?:size )?(?:is |appears |remains |are |was )?(?:again |still )?"
        r"(?:borderline |mildly |moderately |severely |markedly |slightly )?"
        r"(?:enlarged|large|top normal|increased)",
    ),
    "Lung Opacity": (
        r"opacit(?:y|ies)", r"opacifications?", r"infiltrates?", r"airspace disease",
        r"air space disease",
        r"interstitial (?:markings|thickening|prominence)", r"reticulation", r"haz(?:e|iness)",
        r"ground[- ]glass",
        r"scarring",
    ),
    "Lung Lesion": (
        r"nodules?", r"nodular (?:density|densities|lesions?)", r"mass(?:es)?", r"lung lesions?",
        r"pulmonary lesions?",
        r"granulomas?", r"metastas[ei]s", r"tumou?rs?", r"neoplasms?", r"cavitary lesions?",
    ),
    "Edema": (
        r"o?edema", r"vascular congestion", r"pulmonary congestion", r"venous congestion",
        r"congestive heart failure",
        r"heart failure", r"chf", r"kerley b lines", r"fluid overload", r"cephali[sz]ation",
    ),
    "Consolidation": (r"consolidations?", r"consolidative"),
    "Pneumonia": (r"(?:broncho)?pneumonias?", r"infections?", r"infectious process", r"pneumonic"),
    "Atelectasis": (
        r"atelecta(?:sis|ses|tic)", r"(?:lobar|lung|basilar|segmental) collapse",
        r"collapse of the \w+ (?:lobe|lung)",
    ),
    "Pneumothorax": (r"(?:hydro)?pneumothora(?:x|ces)",),
    "Pleural Effusion": (
        r"(?:pleural |parapneumonic |subpulmonic )?effusions?", r"pleural fluid", r"hydrothorax",
        r"ha?emothorax",
        r"blunting of (?:the )?(?:\w+ ){0,2}(?:costophrenic|cp) (?:angles?|sulc\w+)",
        r"(?:costophrenic|cp) (?:angles?|sulc\w+) (?:is |are )?blunted",
    ),
    "Pleural Other": (
        r"pleural thickening", r"pleural plaques?", r"fibrothorax",
        r"pleural (?:scar(?:ring)?|calcifications?)",
        r"apical (?:capping|thickening)",
    ),
    "Fracture": (r"fractures?", r"fractured", r"compression deformit(?:y|ies)"),
    "Support Devices": (
        r"(?:endotracheal|et|ng|nasogastric|enteric|chest|feeding|tracheostomy|gastric|orogastric|dobbhoff) tubes?",
        r"picc(?: line)?",
        r"(?:central|subclavian|jugular|port-a-cath|swan-ganz|venous|picc) (?:venous )?(?:catheters?|lines?)",
        r"port-?a?-?cath", r"pace(?:maker|r)s?", r"pacing (?:leads?|wires?)", r"icd",
        r"defibrillator",
        r"sternotomy wires", r"sternal wires", r"(?:prosthetic|mechanical) valves?",
        r"valve replacement", r"stents?",
        r"surgical clips", r"drains?", r"catheters?", r"hardware", r"intra-aortic balloon pump",
    ),
}  # fmt: skip
NO_FINDING = "No Finding"
LABELS: tuple[str, ...] = (NO_FINDING, *PHRASES)
COMPETITION_LABELS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
"""The five of CheXpert's leaderboard."""

_NORMAL = re.compile(
    r"\b(?:normal(?:ly)?|unremarkable|clear|intact|within normal limits|midline|well[- ](?:expanded|inflated|aerated)"
    r"|preserved|patent|sharp|negative)\b"
)
"""Words that say of something that it is as it should be, unless they are negated."""
_GENERIC = re.compile(
    r"\b(?:abnormalit(?:y|ies)|abnormal|diseases?|process(?:es)?|findings?|patholog(?:y|ies)|injur(?:y|ies)"
    r"|lesions?|enlarged|enlargement|dilated|widened|displaced|air|fluid|calcifications?)\b"
)
"""What a report may deny without naming one of the findings: "no acute cardiopulmonary process",
"not enlarged"."""
_MENTION = {
    label: re.compile(rf"\b(?:{'|'.join(phrases)})\b") for label, phrases in PHRASES.items()
}
_SENTENCE = re.compile(r"(?<!\d)[.!?;](?!\d)|\n|(?<=\d)\.(?=\s)")
_CLAUSE = re.compile(
    r"\b(?:but|however|although|though|except(?: for)?|with the exception of|apart from|other than|aside from|which)\b"
    r"|,? and there (?:is|are)\b|:"
)
_NO_NEGATION = re.compile(
    r"\b(?:no|without|not)(?: (?:significant(?:ly)?|substantial(?:ly)?|relevant|interval"
    r"|appreciabl[ey]|definite(?:ly)?|acute))*"
    r" (?:changed?|increase[ds]?|decrease[ds]?|progression|improve(?:d|ment)|worsening|worsened|difference)\b"
)
_NEGATION_BEFORE = re.compile(
    r"\b(?:no|not|without|never|neither|nor|den(?:y|ies|ied)|negative for|free of|free from|absence of|absent|lack of"
    r"|clear of|rules? out|ruled out|resolved|resolution of|cleared|removal of|removed|interval removal)\b"
)
_NEGATION_AFTER = re.compile(
    r"^[^,]{0,40}?\b(?:(?:is|are|was|were|has|have)(?: been)? (?:not|no longer|never)|not (?:seen|identified|present|"
    r"visuali[sz]ed|evident|appreciated)|(?:is|are|was|were) absent|(?:has|have) (?:now |since |completely )?"
    r"(?:resolved|cleared)|resolved|(?:has|have) been removed|(?:is|are) (?:excluded|ruled out)|unlikely)\b"
)
_DOUBT_BEFORE = re.compile(
    r"\b(?:possibl[ey]|probabl[ey]|may|might|could|cannot (?:exclude|rule out)|can not (?:exclude|rule out)"
    r"|not excluded|suspect(?:ed|s)?|suspicio(?:n|us)(?: for| of)?|question(?:able| of)?|concern(?:ing)?(?: for)?"
    r"|suggest(?:s|ing|ive(?: of)?)?|likely|versus|vs|or early|evaluate for|worrisome for|equivocal|differential)\b"
)
_DOUBT_AFTER = re.compile(
    r"^[^,]{0,40}?\b(?:(?:cannot|can not|could not|not)(?: be)?(?: entirely| completely)? (?:excluded|ruled out)"
    r"|is possible|are possible|is suspected|is questioned|versus|vs|not excluded)\b"
)
_REACH = 300
"""Characters to either side in which a cue is looked for: a model that repeats itself must not cost
minutes."""
_VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|there|shows?|showing|demonstrates?|appears?|remains?|noted|seen|present|persists?)\b"
)


def label_report(text: str, *, no_finding: str = "stated") -> dict[str, Status]:
    """Return the labels that a report mentions.

    "No Finding" is positive when no pathology is affirmed or left open, and the report says that
    something is normal or absent (`no_finding="stated"`), or whatever else it says
    (`"unmentioned"`). A blank text has no label.
    """
    found: dict[str, Status] = {}
    evidence = no_finding == "unmentioned" and not is_blank(text)
    for clause in _clauses(text):
        for mention in _mentions(clause):
            found[mention.label] = _stronger(found.get(mention.label), mention.status)
        evidence = evidence or _states_normality(clause)
    pathology = {status for label, status in found.items() if label != "Support Devices"}
    if not pathology & {"positive", "uncertain"} and (found or evidence):
        found[NO_FINDING] = "positive"
    return found


class Mention(NamedTuple):
    """A finding that a clause names."""

    label: str
    """One of `PHRASES`."""
    status: Status
    """Affirmed, denied or left open."""
    clause: str
    """The clause, in small letters and with single blanks."""
    start: int
    """Place of the phrase in the clause."""
    end: int
    """Behind its last character."""


def mentions(text: str) -> Iterator[Mention]:
    """Yield every finding that a report names, clause by clause."""
    for clause in _clauses(text):
        yield from _mentions(clause)


def _clauses(text: str) -> Iterator[str]:
    for sentence in _SENTENCE.split(text.lower()):
        yield from _CLAUSE.split(re.sub(r"\s+", " ", sentence))


def _mentions(clause: str) -> Iterator[Mention]:
    for label, pattern in _MENTION.items():
        for found in pattern.finditer(clause):
            start, end = found.span()
            yield Mention(label, _status(clause, start, end), clause, start, end)


def _states_normality(clause: str) -> bool:
    """Return whether a clause calls something normal, or something abnormal absent."""
    return any(
        _status(clause, mention.start(), mention.end()) == wanted
        for pattern, wanted in ((_NORMAL, "positive"), (_GENERIC, "negative"))
        for mention in pattern.finditer(clause)
    )


def _status(clause: str, start: int, end: int) -> Status:
    """Return the status that a clause gives to the phrase at `start:end`."""
    before, after = clause[max(0, start - _REACH) : start], clause[end : end + _REACH]
    if _DOUBT_AFTER.search(after):
        return "uncertain"
    reach = _without_pseudo_negation(before)
    doubt = _last(_DOUBT_BEFORE, before)
    negation = _last(_NEGATION_BEFORE, reach)
    if doubt is not None and re.search(r"\b(?:cannot|can not) (?:exclude|rule out)\b", before):
        return "uncertain"
    if negation is not None and not _VERB.search(reach[negation:]):
        return "negative"
    if _NEGATION_AFTER.search(_without_pseudo_negation(after)):
        return "negative"
    if doubt is not None and not _VERB.search(before[doubt:]):
        return "uncertain"
    return "positive"


def _without_pseudo_negation(text: str) -> str:
    """Blank out "no change in" and "not increased", which say nothing about presence.

    The other characters keep their positions.
    """
    return _NO_NEGATION.sub(lambda found: " " * len(found.group()), text)


def _last(pattern: re.Pattern[str], text: str) -> int | None:
    """End of the last match."""
    ends = [found.end() for found in pattern.finditer(text)]
    return ends[-1] if ends else None


def _stronger(old: Status | None, new: Status) -> Status:
    """Merge two mentions of a finding.

    Affirmed once is affirmed; otherwise doubt outranks denial (CheXpert's order).
    """
    order: Mapping[Status | None, int] = {None: 0, "negative": 1, "uncertain": 2, "positive": 3}
    return new if order[new] >= order[old] else old or new


def label_vectors(
    reports: Sequence[str], *, uncertain: str = "positive", no_finding: str = "stated"
) -> np.ndarray:
    """(n, 14) booleans in the order of `LABELS`; "uncertain" counts as the argument says."""
    counted = {"positive", "uncertain"} if uncertain == "positive" else {"positive"}
    labeled = (label_report(report, no_finding=no_finding) for report in reports)
    rows = [[found.get(label) in counted for label in LABELS] for found in labeled]
    return np.asarray(rows, dtype=bool).reshape(len(reports), len(LABELS))


def chest_label_f1(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    uncertain: str = "positive",
    no_finding: str = "stated",
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Micro and macro F1 over 14 labels and over CheXpert's five.

    Macro averages over the labels that occur in the references or predictions of the (re)sample.
    Undefined where the references affirm none of the labels: then there is nothing to find.
    """
    n = check_lengths(predictions, references)
    guessed, true = (
        label_vectors(side, uncertain=uncertain, no_finding=no_finding)
        for side in (predictions, references)
    )
    unlabeled = int((~true.any(axis=1)).sum())
    results = []
    for size, labels in ((14, LABELS), (5, COMPETITION_LABELS)):
        columns = [LABELS.index(label) for label in labels]
        a, b = guessed[:, columns], true[:, columns]
        rows = np.concatenate([a & b, a ^ b], axis=1)  # (n, 2 * size): hits, errors of either kind
        for kind in ("micro", "macro"):
            finish = lambda sums, size=size, kind=kind: _f1(sums[:, :size], sums[:, size:], kind)  # noqa: E731
            signature = (
                f"medm-rules:2|labels:{size}|uncertain:{uncertain}|no-finding:{no_finding}|{kind}"
            )
            result = summed_result(
                f"chest-label-f1-{kind}-{size}", rows, finish, signature, resampling
            )
            if n and not b.any():
                invented = int(a.any(axis=1).sum())
                reason = (
                    f"undefined: no reference affirms one of these {size} labels (predictions "
                    f"affirm one in {invented})"
                )
                result = undefined(
                    result, reason if unlabeled < n else f"{reason}; the rules read English reports"
                )
            elif unlabeled > n / 2:
                note = (
                    f"in {unlabeled} of {n} references the rules find no label; they read English "
                    "reports"
                )
                result = with_note(result, note)
            results.append(result)
    return results


def _f1(hits: np.ndarray, errors: np.ndarray, kind: str) -> np.ndarray:
    """(R, labels) counts -> (R,)."""
    if kind == "micro":
        hits, errors = hits.sum(axis=1, keepdims=True), errors.sum(axis=1, keepdims=True)
    f1 = ratio(2 * hits, 2 * hits + errors)
    defined = ~np.isnan(f1)
    return ratio(np.where(defined, f1, 0.0).sum(axis=1), defined.sum(axis=1).astype(float))
