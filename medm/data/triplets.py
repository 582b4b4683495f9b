"""Triplets of reports: [finding, relation, location], by rules or from a RadGraph file.

The rules share the lexicon of the labeler of chest reports (`medm.metrics.chest_labels`), work
offline, and have its limits. Relations are "present at", "absent at" and "possible at"; of a
RadGraph file also "modifies" and "suggests".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from medm.data.record_files import open_regular, parse_json
from medm.errors import DataError
from medm.metrics.chest_labels import NO_FINDING, Mention, Status, label_report, mentions
from medm.types import Triplet

RELATIONS: Mapping[Status, str] = {
    "positive": "present at",
    "negative": "absent at",
    "uncertain": "possible at",
}
ORGANS: Mapping[str, str] = {
    "Enlarged Cardiomediastinum": "mediastinum",
    "Cardiomegaly": "heart",
    "Lung Opacity": "lung",
    "Lung Lesion": "lung",
    "Edema": "lung",
    "Consolidation": "lung",
    "Pneumonia": "lung",
    "Atelectasis": "lung",
    "Pneumothorax": "pleura",
    "Pleural Effusion": "pleura",
    "Pleural Other": "pleura",
    "Fracture": "bone",
    "Support Devices": "chest",
}
"""Location of a finding whose sentence names none, or a side or level alone."""
_NAMES: Mapping[str, str] = {
    "Enlarged Cardiomediastinum": "widened mediastinum",
    "Cardiomegaly": "cardiomegaly",
    "Pleural Effusion": "pleural effusion",
}
"""Findings whose phrases in reports are whole statements; others go by their phrase."""

_SIDE = r"left and right|right and left|bilateral(?:ly)?|both|left|right"
_LEVEL = (
    r"upper|middle|mid|lower|basilar|bibasilar|basal|apical|biapical|perihilar|retrocardiac"
    r"|lingular|anterior|posterior|lateral|(?:first|second|third|\w*th)(?= )"
)
_PLACE = (
    r"lobes?|lungs?|bases?|apex|apices|hemithorax|zones?|hilum|hila|lingula|fissures?|ribs?"
    r"|clavicles?|humerus|spine|vertebra(?:l bod(?:y|ies)|e)?|carina|svc|superior vena cava|atrium"
    r"|stomach|chest wall"
)
_LOCATION = re.compile(rf"\b(?:{_SIDE}|{_LEVEL}|{_PLACE})(?:[ -](?:{_SIDE}|{_LEVEL}|{_PLACE}))*\b")
_HAS_PLACE = re.compile(rf"\b(?:{_PLACE})\b")
_ADJECTIVES = re.compile(r"[ -](?:(?!(?:in|at|of|and|or|with|is|are|has|no)\b)[\w-]+ ){0,4}")
"""Between a location and the finding that it describes: "left small layering effusion"."""
_REACH = 150
"""Characters to either side in which a location is looked for."""
_PREPOSITION = re.compile(
    r"\b(?:in|at|of|within|involving|along|over|overlying|on|near|above|to)(?: the)? $"
)


def extract_triplets(report: str) -> list[Triplet]:
    """Return the triplets of an English report of the chest, each once, in their order.

    A location is words in front of the finding ("left basilar opacity"), or the first ones behind
    it that follow a preposition ("opacity in the left lower lobe"). A report that only says that
    all is normal gives ["abnormality", "absent at", "chest"].
    """
    found: dict[Triplet, None] = {}
    for clause in _by_clause(mentions(report)):
        for mention in clause:
            phrase = mention.clause[mention.start : mention.end]
            name = _NAMES.get(mention.label, phrase)
            place = _location(mention, clause)
            found[(name, RELATIONS[mention.status], place)] = None
    if not found and label_report(report).get(NO_FINDING) == "positive":
        found[("abnormality", RELATIONS["negative"], "chest")] = None
    return list(found)


def _by_clause(found: Iterable[Mention]) -> Iterator[list[Mention]]:
    """Yield the mentions of each clause, in the order of their places."""
    clause: list[Mention] = []
    for mention in found:
        if clause and mention.clause is not clause[0].clause:
            yield sorted(clause, key=lambda one: one.start)
            clause = []
        clause.append(mention)
    if clause:
        yield sorted(clause, key=lambda one: one.start)


def _location(mention: Mention, clause: list[Mention]) -> str:
    """Return where a finding is."""
    text, organ = mention.clause, ORGANS[mention.label]
    for found in reversed(
        list(_LOCATION.finditer(text, max(0, mention.start - _REACH), mention.start))
    ):
        if _ADJECTIVES.fullmatch(text[found.end() : mention.start]):
            return _named(found.group(), organ)
    for found in _LOCATION.finditer(text, mention.end, mention.end + _REACH):
        if any(one.start <= found.start() < one.end for one in clause):
            continue
        if _PREPOSITION.search(text[mention.end : found.start()]):
            return _named(found.group(), organ)
    return organ


def _named(location: str, organ: str) -> str:
    return location if _HAS_PLACE.search(location) else f"{location} {organ}"


@dataclass(frozen=True, slots=True)
class RadGraphFile:
    """Triplets of the documents of a RadGraph file."""

    by_id: dict[str, list[Triplet]]
    """By the document's key."""
    by_text: dict[str, list[Triplet]]
    """By the letters and digits of its text."""

    def find(self, identity: object, report: str) -> list[Triplet] | None:
        """Return the triplets of a record by its id, or else by its report; None for neither."""
        known = self.by_id.get(str(identity))
        return self.by_text.get(_letters(report)) if known is None else known


def _letters(text: str) -> str:
    """Return letters and digits: RadGraph separates marks from words by blanks."""
    return re.sub(r"[\W_]+", "", text.casefold())


def read_radgraph(path: Path) -> RadGraphFile:
    """Read a file of RadGraph or of the `radgraph` package.

    It maps a document to `text` and `entities`, each with `tokens`, `label` ("OBS-DP",
    "Observation::definitely present" ...) and `relations` ([[kind, entity], ...]).

    Raises:
        DataError: the file is of another form, with document and field.
    """
    try:
        with open_regular(path) as file:
            content = parse_json(file.read())
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", file=path) from None
    except DataError as error:
        raise error.at(file=path) from None
    if not isinstance(content, dict) or not content:
        raise DataError(
            'expected an object of documents, {"NAME": {"text": ..., "entities": {...}}}', file=path
        )
    by_id: dict[str, list[Triplet]] = {}
    by_text: dict[str, list[Triplet]] = {}
    for name, document in content.items():
        entities = document.get("entities") if isinstance(document, dict) else None
        if not isinstance(entities, dict):
            raise DataError(
                "expected an object with `text` and `entities`", file=path, field=str(name)
            )
        triplets = list(dict.fromkeys(_radgraph_triplets(entities, path, f"{name}.entities")))
        by_id[str(name)] = triplets
        if isinstance(text := document.get("text"), str) and text.strip():
            by_text[_letters(text)] = triplets
    return RadGraphFile(by_id, by_text)


def _radgraph_triplets(entities: Mapping[str, object], path: Path, place: str) -> Iterator[Triplet]:
    """Yield the triplets of a document. Raises `DataError`."""
    parsed = {
        key: _entity(value, path, f"{place}.{key}", entities) for key, value in entities.items()
    }
    for tokens, status, is_anatomy, relations in parsed.values():
        for kind, target in relations:
            relation = {
                "located_at": RELATIONS[status],
                "modify": "modifies",
                "suggestive_of": "suggests",
            }[kind]
            yield tokens, relation, parsed[target][0]
        if not is_anatomy and not any(kind in ("located_at", "modify") for kind, _ in relations):
            yield tokens, RELATIONS[status], "chest"


def _entity(
    value: object, path: Path, place: str, entities: Mapping[str, object]
) -> tuple[str, Status, bool, list[tuple[str, str]]]:
    """Return tokens, status, whether it is anatomy, and relations. Raises `DataError`."""
    entity = value if isinstance(value, dict) else {}
    tokens, label = entity.get("tokens"), entity.get("label")
    if not isinstance(tokens, str) or not tokens.strip():
        raise DataError(f"expected text, found {tokens!r}", file=path, field=f"{place}.tokens")
    name = str(label).casefold()
    statuses: dict[str, Status] = {
        "dp": "positive",
        "definitely present": "positive",
        "da": "negative",
        "definitely absent": "negative",
        "u": "uncertain",
        "uncertain": "uncertain",
    }
    kind, _, rest = name.partition("::" if "::" in name else "-")
    if kind not in ("anat", "anatomy", "obs", "observation") or rest not in statuses:
        raise DataError(
            f"expected ANAT-DP, OBS-DP, OBS-DA or OBS-U, or their long forms, found {label!r}",
            file=path,
            field=f"{place}.label",
        )
    relations: list[tuple[str, str]] = []
    for number, relation in enumerate(entity.get("relations") or []):
        if (
            not isinstance(relation, list)
            or len(relation) != 2
            or relation[0] not in ("located_at", "modify", "suggestive_of")
            or str(relation[1]) not in entities
        ):
            raise DataError(
                "expected [located_at, modify or suggestive_of, name of an entity], found "
                f"{relation!r}",
                file=path,
                field=f"{place}.relations.{number}",
            )
        relations.append((relation[0], str(relation[1])))
    return tokens.casefold(), statuses[rest], kind.startswith("anat"), relations


@dataclass(slots=True)
class TripletCounts:
    """Counts of `with_triplets`."""

    records: int = 0
    """All records."""
    reports: int = 0
    """Records with a report."""
    triplets: int = 0
    """Triplets of all records."""
    empty: int = 0
    """Reports without any triplet."""
    unknown: list[str] = field(default_factory=list)
    """Places of reports that the RadGraph file does not have."""


def with_triplets(
    records: Iterable[object],
    *,
    file: Path,
    report_field: str = "report",
    radgraph: RadGraphFile | None = None,
    counts: TripletCounts,
) -> Iterator[dict[str, object]]:
    """Yield records with the field `triplets`; one without a report stays as it is.

    Args:
        records: in order.
        file: where they come from, for messages.
        report_field: field of the report.
        radgraph: triplets to take; None for the rules.
        counts: filled in.

    Raises:
        DataError: a record is no object, its report is no text, or no record has a report.
    """
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"expected an object, found {record!r}", file=file, index=index)
        counts.records += 1
        report = record.get(report_field)
        if report is None:
            yield record
            continue
        if not isinstance(report, str):
            raise DataError(
                f"expected text, found {report!r}", file=file, index=index, field=report_field
            )
        counts.reports += 1
        if radgraph is None:
            triplets = extract_triplets(report)
        else:
            known = radgraph.find(record.get("id"), report)
            if known is None:
                counts.unknown.append(f"record {index}")
            triplets = known or []
        counts.triplets += len(triplets)
        counts.empty += not triplets
        yield {**record, "triplets": [list(triplet) for triplet in triplets]}
    if counts.reports == 0:
        raise DataError(
            f"no record has a field {report_field!r}; name the field of the report with --field",
            file=file,
        )
