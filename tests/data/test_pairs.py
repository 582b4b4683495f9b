"""The pipeline of pairs: records, examples and batches, from files to the trainer's sampler."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from medm.data.build import build_batches
from medm.data.captions import same_label
from medm.data.check import check, require_sources
from medm.data.dataset import ExampleDataset
from medm.data.options import CaptionRule, DataOptions, SourceOptions
from medm.data.pairs import Pair, PairExample, Pairs
from medm.data.records import Records
from medm.errors import DataError, RecipeError
from medm.imaging import ImagePreprocess, VolumePreprocess
from medm.types import Media
from tests.data.tiny import PAD, PREPROCESS, conversations, write_image, write_json, write_lines

HERE = Path("a.jsonl")


def encode_text(texts: list[str]) -> dict[str, torch.Tensor]:
    """A character a token."""
    ids = [[ord(letter) for letter in text] for text in texts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.ones_like(torch.tensor(ids))}


def processor(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "preprocess": dict(PREPROCESS),
        "pad_id": PAD,
        "encode_text": encode_text,
        "tokenizer": SimpleNamespace(decode=lambda ids: "".join(map(chr, ids))),
    }
    return SimpleNamespace(**fields | changes)


def text_of(example: PairExample | None) -> str:
    assert example is not None
    return "".join(map(chr, example.input_ids))


def dataset(
    folder: Path,
    *records: Any,
    captions: CaptionRule | None = None,
    seed: int = 0,
    **settings: Any,
) -> ExampleDataset[PairExample]:
    for name, shade in (("a", 0), ("b", 255)):
        write_image(folder / f"{name}.png", shade)
    source = SourceOptions(path=str(write_lines(folder / "p.jsonl", *records)), captions=captions)
    return ExampleDataset(Records([source], Pairs(processor())), seed=seed, **settings)


# -- records ---------------------------------------------------------------------------------------


def test_a_record_is_read() -> None:
    record = {
        "image": "a.png", "captions": [" Clear. ", "Normal."], "label": "normal", "id": 7,
        "source": "roco", "task": "cxr", "split": "train",
    }  # fmt: skip
    assert Pairs().read(record, file=HERE, index=3) == Pair(
        item=Media("image", "a.png"), captions=("Clear.", "Normal."), label="normal", id="7",
        source="roco", task="cxr", extra={"split": "train"}, file="a.jsonl", index=3,
    )  # fmt: skip
    volume = Pairs().read({"volume": ["a.nii"], "caption": "Clear."}, file=HERE, index=0)
    assert volume.media == (Media("volume", "a.nii"),)


@pytest.mark.parametrize(
    ("record", "field", "reason"),
    [
        ([], None, "found list"),
        ({"caption": "Clear."}, None, "expected one of 'image' and 'volume', found neither"),
        ({"image": "a", "volume": "b", "caption": "c"}, None, "found image and volume"),
        ({"image": ["a", "b"], "caption": "c"}, "image", "found 2: a pair has one"),
        ({"image": " ", "caption": "c"}, "image", "expected a path as text, found blank text"),
        ({"image": 3, "caption": "c"}, "image", "found int"),
        ({"image": "a", "text": "c"}, None, "the record has image, text"),
        ({"image": "a", "caption": "\n "}, "caption", "expected text, found blank text"),
        ({"image": "a", "caption": ["c"]}, "caption", "expected text, found list"),
        ({"image": "a", "captions": []}, "captions", "found an empty list"),
        ({"image": "a", "captions": ["c", ""]}, "captions.1", "found empty text"),
        ({"image": "a", "captions": ["c", None]}, "captions.1", "found nothing"),
        ({"image": "a", "captions": "[1"}, "captions", "expected a JSON list"),
        ({"image": "a", "caption": "c", "captions": ["d"]}, "captions", "keep one of them"),
        ({"image": "a", "caption": "c", "label": 0.5}, "label", "found float"),
        ({"image": "a", "caption": "c", "label": True}, "label", "found bool"),
        ({"image": "a", "caption": "c", "label": " "}, "label", "found blank text"),
        ({"image": "a", "caption": "c", "source": 3}, "source", "found int"),
        ({"image": "a", "caption": "c", "id": [1]}, "id", "found list"),
    ],
)
def test_a_bad_record_says_which_field(record: object, field: str | None, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        Pairs().read(record, file=HERE, index=0)
    assert caught.value.field == field
    assert reason in caught.value.reason


def test_inference_records_may_have_no_caption(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected text in 'caption'"):
        Pairs().read({"image": "a.png"}, file=HERE, index=0)
    pipeline = Pairs(processor(), inference=True)
    sample = pipeline.read({"image": "a.png"}, file=HERE, index=0)
    example = pipeline.example(sample, {"image": [np.zeros((3, 4, 4), np.float32)]})
    batch = pipeline.eval_collator()([example, example])
    assert batch["pixels"]["image"].shape == (2, 3, 4, 4)
    assert "input_ids" not in batch


# -- captions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (None, {"one", "two", "three"}),
        ("random", {"one", "two", "three"}),
        ("first", {"one"}),
        ("concat", {"one two three"}),
    ],
)
def test_a_source_says_which_caption_is_learned(
    tmp_path: Path, rule: CaptionRule | None, expected: set[str]
) -> None:
    record = {"image": "a.png", "captions": ["one", "two", "three"]}
    data = dataset(tmp_path, *[record] * 40, captions=rule)
    assert {text_of(data[index]) for index in range(40)} == expected


def test_the_draw_depends_on_seed_epoch_and_record_alone(tmp_path: Path) -> None:
    records = [{"image": "a.png", "captions": [f"{n} {k}" for k in range(5)]} for n in range(12)]
    data = dataset(tmp_path, *records)

    def texts(data: ExampleDataset[PairExample], epoch: int, *, workers: int = 0) -> list[str]:
        data.set_epoch(epoch)
        loading: Any = DataLoader(
            data, batch_size=3, num_workers=workers, collate_fn=lambda examples: examples
        )
        return [text_of(example) for examples in loading for example in examples]

    first = texts(data, 0)
    assert texts(data, 1) != first
    assert texts(data, 0) == first
    assert texts(data, 0, workers=2) == first
    assert [text_of(data[index]) for index in reversed(range(12))] == first[::-1]
    assert texts(dataset(tmp_path / "again", *records, seed=1), 0) != first
    every = {text for epoch in range(40) for text in texts(data, epoch) if text[0] == "7"}
    assert every == {f"7 {k}" for k in range(5)}


def test_inference_takes_the_first_caption(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    lines = [{"image": "a.png", "captions": ["one", "two", "three"]}] * 8
    source = SourceOptions(path=str(write_lines(tmp_path / "p.jsonl", *lines)))
    data = ExampleDataset(Records([source], Pairs(processor(), inference=True)))
    assert {text_of(data[index]) for index in range(8)} == {"one"}


def test_published_marks_reach_the_rule_of_the_source(tmp_path: Path) -> None:
    text = "first._openi_second._openi_"
    data = dataset(tmp_path, {"image": "a.png", "caption": text}, captions="sentinel")
    assert text_of(data[0]) == "first."
    plain = dataset(tmp_path, {"image": "a.png", "caption": text})
    with pytest.raises(DataError, match=r"record 0, field 'caption': .* set captions: sentinel"):
        plain[0]


def test_augmentation_does_not_change_with_the_captions(tmp_path: Path) -> None:
    """Each draw has its own stream: a caption more must not turn the image another way."""
    from PIL import Image

    from medm.imaging import Augment

    Image.linear_gradient("L").save(tmp_path / "grey.png")
    changes = {"image": Augment(brightness=0.5)}
    found = [
        dataset(tmp_path, {"image": "grey.png", "captions": captions}, augmentation=changes)[0]
        for captions in (["one"], ["one", "two", "three"])
    ]
    assert found[0] is not None and found[1] is not None
    np.testing.assert_array_equal(found[0].pixels["image"][0], found[1].pixels["image"][0])


# -- examples and batches --------------------------------------------------------------------------


def test_a_batch_by_hand(tmp_path: Path) -> None:
    data = dataset(
        tmp_path,
        {"image": "a.png", "caption": "Clear."},
        {"image": "b.png", "caption": "clear"},
        {"image": "b.png", "caption": "x", "label": 1},
        {"image": "b.png", "caption": "y", "label": 1},
    )
    examples = [data[index] for index in range(4)]
    batch = data.pipeline.training_collator(DataOptions())(examples)
    assert batch["attention_mask"].tolist() == [
        [1] * 6, [1] * 5 + [0], [1] + [0] * 5, [1] + [0] * 5,
    ]  # fmt: skip
    assert batch["input_ids"][1].tolist() == [*map(ord, "clear"), PAD]
    assert batch["pixels"]["image"][:, 0, 0, 0].tolist() == [-1, 1, 1, 1]
    labels = batch["pair_labels"]
    assert labels.dtype == torch.int64
    assert labels[0] == labels[1] == same_label("clear", None, source="")
    assert labels[2] == labels[3] and len(set(labels.tolist())) == 2
    assert batch.keys() == {"pixels", "input_ids", "attention_mask", "pair_labels"}
    wide = data.pipeline.training_collator(DataOptions(pad_to_multiple_of=8))(examples)
    assert wide["input_ids"].shape == (4, 8)
    assert data.pipeline.preview(examples[0])[0].text == "Clear."


def test_a_batch_without_pairs_has_no_rows() -> None:
    batch = Pairs(processor()).training_collator(DataOptions())([None, None])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (0, 1)
    assert batch["pair_labels"].shape == (0,) and batch["pair_labels"].dtype == torch.int64
    assert "pixels" not in batch


def test_padding_of_the_processor_is_kept_and_not_counted() -> None:
    def padded(texts: list[str]) -> dict[str, torch.Tensor]:
        row = [ord(letter) for letter in texts[0]]
        ids = torch.tensor([row + [PAD] * (9 - len(row))])
        return {"input_ids": ids, "attention_mask": (ids != PAD).long()}

    pipeline = Pairs(processor(encode_text=padded))
    sample = pipeline.read({"image": "a.png", "caption": "abc"}, file=HERE, index=0)
    example = pipeline.example(sample, {"image": [np.zeros((3, 4, 4), np.float32)]})
    assert pipeline.length(example) == 3
    batch = pipeline.eval_collator()([example])
    assert batch["input_ids"].shape == (1, 9)
    assert batch["attention_mask"].sum() == 3
    assert pipeline.preview(example)[0].text == "abc"


def test_every_view_reads_the_file(tmp_path: Path) -> None:
    views = {"image": ImagePreprocess(size=[4, 4]), "image@fine": ImagePreprocess(size=[8, 8])}
    write_image(tmp_path / "a.png")
    source = SourceOptions(
        path=str(write_json(tmp_path / "a.json", [{"image": "a.png", "caption": "c"}]))
    )
    data = ExampleDataset(Records([source], Pairs(processor(preprocess=views))))
    batch = data.pipeline.eval_collator()([data[0]])
    assert {view: tuple(pixels.shape) for view, pixels in batch["pixels"].items()} == {
        "image": (1, 3, 4, 4),
        "image@fine": (1, 3, 8, 8),
    }
    other = Pairs(processor(preprocess={"volume": VolumePreprocess()}))
    with pytest.raises(DataError, match="field 'image': the model takes no images"):
        ExampleDataset(Records([source], other))[0]


# -- sources ---------------------------------------------------------------------------------------

GOOD: list[dict[str, Any]] = [
    {"image": "a.png", "caption": "Clear."},
    {"image": "b.png", "caption": "Effusion.", "label": "effusion"},
]


def write_source(folder: Path, form: str) -> SourceOptions:
    write_image(folder / "a.png", 0)
    write_image(folder / "b.png", 255)
    if form == "json":
        return SourceOptions(path=str(write_json(folder / "p.json", GOOD)))
    if form == "jsonl":
        return SourceOptions(path=str(write_lines(folder / "p.jsonl", *GOOD)))
    if form == "csv":
        rows = [f"{one['image']},{one['caption']},{one.get('label', '')}" for one in GOOD]
        (folder / "p.csv").write_text("\n".join(["file,caption,label", *rows]))
        return SourceOptions(path=str(folder / "p.csv"), columns={"image": "file"})
    rows = [
        f"{one['image']}\t{json.dumps([one['caption']])}\t{one.get('label', '')}" for one in GOOD
    ]
    (folder / "p.tsv").write_text(
        "\n".join(["image\tcaptions\tlabel", *rows])
        .replace('"', '""')
        .replace("[", '"[')
        .replace("]", ']"')
    )
    return SourceOptions(path=str(folder / "p.tsv"))


FORMS = ("json", "jsonl", "csv", "tsv")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pairs(tmp_path: Path, form: str) -> None:
    source = write_source(tmp_path, form)
    require_sources(DataOptions(train=[source]), Pairs.formats)
    records = Records([source], Pairs())
    assert [(one.item.path, one.captions, one.label) for one in records] == [
        ("a.png", ("Clear.",), None),
        ("b.png", ("Effusion.",), "effusion"),
    ]
    report = check([source], Pairs(processor()), preview=True)
    assert report.ok, report.lines()
    assert "2 records, 0 bad; 2 captions, 2 images, 0 text only" in report.lines()
    assert report.lengths == [6, 9]


def test_a_table_without_a_needed_column_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("filepath,title\na.png,Clear.\n")
    source = SourceOptions(path=str(tmp_path / "p.csv"))
    with pytest.raises(DataError) as caught:
        Records([source], Pairs())
    assert str(caught.value).startswith(
        f"{source.path}: row 1: no column 'image' or 'volume'; the table has filepath, title."
    )
    named = source.model_copy(update={"columns": {"image": "filepath"}})
    with pytest.raises(DataError, match="row 1: no column 'caption' or 'captions'"):
        Records([named], Pairs())
    assert len(Records([named], Pairs(inference=True))) == 1


def test_an_empty_cell_is_one_bad_record(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    (tmp_path / "p.csv").write_text("image,caption\na.png,Clear.\na.png,\n")
    report = check([SourceOptions(path=str(tmp_path / "p.csv"))], Pairs())
    assert [str(error).removeprefix(f"{tmp_path}/") for error in report.bad] == [
        "p.csv, record 1: expected text in 'caption', or a list of texts in 'captions'; the record "
        "has image"
    ]


def test_options_of_pairs_are_refused_elsewhere(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", GOOD[0])
    columns = SourceOptions(path=str(tmp_path / "a.jsonl"), columns={"image": "x"})
    with pytest.raises(DataError, match="`columns` is for tables"):
        Records([columns], Pairs())
    for change in ({"captions": "first"}, {"columns": {"image": "x"}}):
        options = DataOptions(train=[SourceOptions.model_validate({"path": "a", **change})])
        with pytest.raises(RecipeError, match=r"data\.train\.0\.(captions|columns): conversations"):
            conversations().check_options(options)
    (tmp_path / "p.csv").write_text("image,caption\na.png,Clear.\n")
    with pytest.raises(DataError, match="looks like CSV"):
        Records([SourceOptions(path=str(tmp_path / "p.csv"))], conversations())


def test_sources_keep_their_weights(tmp_path: Path) -> None:
    """Of any stretch of an epoch, three quarters are of the source with weight 3."""
    sources = []
    for name, size, weight in (("large", 400, 1.0), ("small", 40, 3.0)):
        folder = tmp_path / name
        folder.mkdir()
        write_image(folder / "a.png")
        lines = [{"image": "a.png", "caption": f"{name} {number}"} for number in range(size)]
        path = write_lines(folder / "p.jsonl", *lines)
        sources.append(SourceOptions(path=str(path), weight=weight))
    options = DataOptions(train=sources)
    records = Records(sources, Pairs(processor()))
    batches = build_batches(options, records.sizes, batch_size=8, seed=3)
    drawn: list[str] = []
    for batch in batches:
        drawn += [records[index].captions[0].split()[0] for index in batch]
    assert len(drawn) == 440
    assert drawn.count("small") == 330
    assert abs(drawn[:100].count("small") - 75) <= 2


@pytest.mark.parametrize("batch", [3, 4])
def test_two_ranks_see_every_pair_once(tmp_path: Path, batch: int) -> None:
    records = [{"image": "a.png", "caption": f"{number}"} for number in range(21)]
    data = dataset(tmp_path, *records)

    def seen(rank: int) -> Iterator[str]:
        sampler = build_batches(
            DataOptions(train=list(data.records.sources)),
            data.records.sizes,
            batch_size=batch,
            rank=rank,
            world=2,
        )
        loading: Any = DataLoader(
            data, batch_sampler=sampler, num_workers=2, collate_fn=lambda examples: examples
        )
        for examples in loading:
            yield from (text_of(example) for example in examples)

    found = [list(seen(rank)) for rank in range(2)]
    assert sorted(map(int, found[0] + found[1])) == list(range(21))


def test_the_page_shows_what_is_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "image-text-pairs.md").read_text("utf-8")
    records = page.split("```json\n")[1].split("```")[0].splitlines()
    assert len([Pairs().read(json.loads(line), file=HERE, index=0) for line in records]) == 3
    sections = [block.split("```")[0] for block in page.split("```yaml\n")[1:]]
    assert len(sections) == 2
    for section in sections:
        DataOptions.model_validate(yaml.safe_load(section)["data"])


# -- a million -------------------------------------------------------------------------------------


def test_a_million_pairs_cost_no_memory_a_record(tmp_path: Path) -> None:
    """Opened, ordered and read in the middle: 16 bytes for the place, 8 for the order of an
    epoch."""
    count = 1_000_000
    path = tmp_path / "p.jsonl"
    caption = "Chest radiograph with a small effusion on the left."
    path.write_bytes(b'{"image": "a.png", "caption": "%b"}\n' % caption.encode() * count)
    source = SourceOptions(path=str(path))
    tracemalloc.start()
    records = Records([source], Pairs())
    sampler = build_batches(DataOptions(train=[source]), records.sizes, batch_size=4)
    sampler.start(1, 1000)
    batch = next(iter(sampler))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(records) == count
    assert {records[index].captions for index in batch} == {(caption,)}
    assert held < 45 * count
    assert peak < 75 * count


def test_a_check_holds_bytes_a_record(tmp_path: Path) -> None:
    """Files that were looked at, ids and lengths, each record with its own file."""
    write_image(tmp_path / "0.png")
    count = 3000
    for number in range(1, count):
        (tmp_path / f"{number}.png").hardlink_to(tmp_path / "0.png")
    lines = [
        {"image": f"{number}.png", "caption": "c", "id": f"case {number:09d}"}
        for number in range(count)
    ]
    source = SourceOptions(path=str(write_lines(tmp_path / "p.jsonl", *lines)))
    held: list[int] = []

    def measure(*_: int) -> None:
        # Without the table of interned strings, which grows at times of its own.
        inside = tracemalloc.Filter(inclusive=True, filename_pattern="*/medm/*")
        traces = tracemalloc.take_snapshot().filter_traces([inside])
        held.append(sum(trace.size for trace in traces.traces))

    tracemalloc.start()
    report = check([source], Pairs(processor()), progress=measure)
    tracemalloc.stop()
    assert report.ok and report.records == count
    assert 0 < held[2] - held[0] < 120 * (count - 1000)
