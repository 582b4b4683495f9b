"""The rule labeller on sentences that were written for it, negation first."""

from __future__ import annotations

import pytest

from medm.metrics.base import Resampling
from medm.metrics.chest_labels import LABELS, chest_label_f1, label_report, label_vectors

FAST = Resampling(rounds=50)

CASES: list[tuple[str, dict[str, str]]] = [
    ("No pleural effusion, pneumothorax, or focal consolidation.",
     {"Pleural Effusion": "negative", "Pneumothorax": "negative", "Consolidation": "negative",
      "No Finding": "positive"}),
    ("Small left pleural effusion.", {"Pleural Effusion": "positive"}),
    ("No pneumothorax but there is right basilar atelectasis.",
     {"Pneumothorax": "negative", "Atelectasis": "positive"}),
    ("There is no evidence of pneumonia and there is a large mass.",
     {"Pneumonia": "negative", "Lung Lesion": "positive"}),
    ("No airspace opacity is seen, the heart is mildly enlarged.",
     {"Lung Opacity": "negative", "Cardiomegaly": "positive"}),
    ("No change in the small right effusion.", {"Pleural Effusion": "positive"}),
    ("The effusion has not significantly increased.", {"Pleural Effusion": "positive"}),
    ("The right effusion has resolved.", {"Pleural Effusion": "negative", "No Finding": "positive"}),
    ("Pneumonia cannot be excluded.", {"Pneumonia": "uncertain"}),
    ("Cannot exclude pneumonia.", {"Pneumonia": "uncertain"}),
    ("Possible early pneumonia versus atelectasis.", {"Pneumonia": "uncertain", "Atelectasis": "uncertain"}),
    ("Findings suggestive of pulmonary edema.", {"Edema": "uncertain"}),
    ("Heart size is normal. Lungs are clear.", {"No Finding": "positive"}),
    ("Cardiac silhouette is not enlarged.", {"No Finding": "positive"}),
    ("The heart is enlarged.", {"Cardiomegaly": "positive"}),
    ("Endotracheal tube in place.", {"Support Devices": "positive", "No Finding": "positive"}),
    ("The chest tube has been removed.", {"Support Devices": "negative", "No Finding": "positive"}),
    ("Blunting of the left costophrenic angle.", {"Pleural Effusion": "positive"}),
    ("Old healed rib fractures.", {"Fracture": "positive"}),
    ("Biapical pleural thickening without pneumothorax.", {"Pleural Other": "positive", "Pneumothorax": "negative"}),
    ("Widened mediastinum.", {"Enlarged Cardiomediastinum": "positive"}),
    ("No effusion. On the later film a new effusion is present.", {"Pleural Effusion": "positive"}),
    ("Measures 3.5 cm. No nodule.", {"Lung Lesion": "negative", "No Finding": "positive"}),
]  # fmt: skip


@pytest.mark.parametrize(("report", "labels"), CASES)
def test_what_a_report_says(report: str, labels: dict[str, str]) -> None:
    assert label_report(report) == labels


def test_the_table_touches_every_label() -> None:
    assert {label for _, labels in CASES for label in labels} == set(LABELS)


def test_uncertain_mentions_count_as_asked() -> None:
    column = LABELS.index("Pneumonia")
    assert label_vectors(["Possible pneumonia."])[0, column]
    assert not label_vectors(["Possible pneumonia."], uncertain="negative")[0, column]


def test_f1_by_hand() -> None:
    references = ["Small pleural effusion. Mild edema.", "No acute disease."]
    predictions = ["Small pleural effusion.", "Mild edema."]
    scores = {r.name: r.value for r in chest_label_f1(predictions, references, resampling=FAST)}
    # Effusion: hit. Edema: missed in the first, invented in the second. No Finding: missed in the
    # second.
    assert scores["chest-label-f1-micro-14"] == pytest.approx(2 * 1 / (2 * 1 + 3))
    assert scores["chest-label-f1-macro-14"] == pytest.approx((1 + 0 + 0) / 3)
    assert scores["chest-label-f1-micro-5"] == pytest.approx(2 / (2 + 2))


def test_a_negation_flip_that_words_hardly_see_is_fatal_here() -> None:
    from medm.metrics.match import token_f1

    references = ["There is a pleural effusion."]
    predictions = ["There is no pleural effusion."]
    assert chest_label_f1(predictions, references, resampling=FAST)[0].value == 0
    assert token_f1(predictions, references, resampling=FAST)[0].value > 0.8
