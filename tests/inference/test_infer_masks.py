"""`medm infer` with a model that answers with masks: spans in the lines, files beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image

from medm.errors import DataError, DeviceError, MedmError, RecipeError
from medm.imaging import VolumePreprocess, prepare, rle
from medm.inference.batch import InferSummary, infer
from medm.inference.folder_records import write_folder_records
from medm.inference.grounded_text import GroundedText, Phrase
from medm.inference.mask_writing import MaskCounts, MaskWriter, file_stem, series_choice
from medm.inference.options import GenerationOptions, InferOptions
from medm.inference.predictions import Results
from medm.inference.segmenter import Grounded, MaskPrediction, Shown
from tests.cli.runner import medm
from tests.imaging.test_dicom_seg import complete
from tests.imaging.tiny import body, phantom, write_series
from tests.inference.grounded import answering, save_grounded
from tests.inference.tiny import read_output, save_image, save_tiny, write_records
from tests.models import plain_head

REPLIES = (
    "Nothing to see.",
    "<p>left lung</p>[SEG] and <p>heart</p>[SEG].",
    "A mass [SEG] and <p>liver</p>.",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    with plain_head.registered():
        yield save_grounded(tmp_path_factory.mktemp("grounded"))


@pytest.fixture
def model(made: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    folder, processor = made
    answering(monkeypatch, processor, *REPLIES)
    return folder


def records(folder: Path, count: int = 9) -> Path:
    save_image(folder / "a.png", 1, size=(20, 30))
    save_image(folder / "b.png", 2, size=(9, 12))
    found = []
    for index in range(count):
        text = "What is seen here" + "?" * (1 + index // 2)
        record: dict[str, Any] = {"id": f"q/{index}"}
        if index % 4:
            record["image"] = ["a.png", "b.png"][index % 2]
            text = f"<image>\n{text}"
        found.append(record | {"conversations": [{"from": "human", "value": text}]})
    return write_records(folder, found)


def run(model: Path, output: Path, **changes: Any) -> InferSummary:
    given: dict[str, Any] = {
        "generation": GenerationOptions(max_new_tokens=5),
        "device": "cpu",
        "workers": 0,
        "batch_size": 2,
    }
    options = InferOptions(model=str(model), output=str(output), **(given | changes))
    summary = infer(options)
    assert summary is not None
    return summary


def test_lines_have_spans_and_masks_on_the_grid_of_the_image(model: Path, tmp_path: Path) -> None:
    data = records(tmp_path)
    summary = run(model, tmp_path / "out.jsonl", data=str(data), rle=True, overlays=True)
    assert (summary.answered, summary.errors) == (9, 0)
    lines = read_output(tmp_path / "out.jsonl")
    texts = {"Nothing to see.", "left lung and heart.", "A mass and liver."}
    assert {line["reply"] for line in lines} == texts  # all three kinds came
    images = [None, "b.png", "a.png", "b.png"]
    for line in lines:
        shown = images[line["index"] % 4]
        spans = line["spans"]
        assert len(spans) == {"N": 0, "l": 2, "A": 1}[line["reply"][0]]
        assert ("raw" in line) == bool(spans)
        assert line.get("unmasked", 0) == (1 if line["reply"][0] == "A" else 0)
        for number, span in enumerate(spans):
            assert line["reply"][span["start"] : span["end"]] == span["phrase"]
            assert span["token"] == number
            if shown is None:  # no image to be of
                assert span["mask"] is None
                assert "voxels" not in span
                continue
            assert span["image"] == 0
            file = tmp_path / span["mask"]
            assert file.parent == tmp_path / "out_masks"
            with Image.open(tmp_path / shown) as image, Image.open(file) as mask:
                assert mask.size == image.size
                inside = np.asarray(mask) > 0
            assert inside.sum() == span["voxels"]
            assert (rle.decode(span["rle"]) == inside).all()
            assert 0 <= span["presence"] <= 1
        if spans and shown is not None:
            with Image.open(tmp_path / line["overlay"]) as sheet:
                assert sheet.format == "PNG"
    masks = summary.masks
    assert masks is not None
    with_image = [line for line in lines if line["index"] % 4]
    assert masks.masks == sum(len(line["spans"]) for line in with_image) > 4
    assert masks.without_image == sum(len(line["spans"]) for line in lines) - masks.masks
    assert masks.without == sum(not line["spans"] for line in lines) > 0
    assert masks.unmasked == sum(line["reply"][0] == "A" for line in lines)


def test_a_batch_equals_one_by_one_and_a_stopped_run_resumes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = records(tmp_path)
    run(model, tmp_path / "one.jsonl", data=str(data), batch_size=1, rle=True)
    run(model, tmp_path / "many.jsonl", data=str(data), batch_size=8, rle=True)

    def without_files(file: Path) -> list[Any]:
        lines = read_output(file)
        for line in lines:
            for span in line["spans"]:
                span.pop("mask")
        return lines

    assert without_files(tmp_path / "many.jsonl") == without_files(tmp_path / "one.jsonl")

    written: list[str] = []
    write = MaskWriter.write

    def counted(self: MaskWriter, name: str, *rest: Any) -> Any:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(name)
        made = write(self, name, *rest)
        for span in made.spans:  # the file is there before its line
            if span["mask"] is not None:
                assert (tmp_path / span["mask"]).is_file()
        return made

    monkeypatch.setattr(MaskWriter, "write", counted)
    monkeypatch.setattr("medm.inference.batch._BATCHES_AHEAD", 1)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "part.jsonl", data=str(data), rle=True)
    kept = {line["index"]: line for line in read_output(tmp_path / "part.jsonl")}
    assert len(kept) == 4
    times = {
        file: file.stat().st_mtime_ns
        for line in kept.values()
        for span in line["spans"]
        if span["mask"] is not None
        for file in [tmp_path / span["mask"]]
    }
    assert times
    monkeypatch.setattr(MaskWriter, "write", write)
    again = run(model, tmp_path / "part.jsonl", data=str(data), rle=True)
    assert (again.resumed, again.answered) == (4, 9)
    assert without_files(tmp_path / "part.jsonl") == without_files(tmp_path / "one.jsonl")
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    with pytest.raises(RecipeError, match="presence_threshold was None"):
        run(
            model,
            tmp_path / "part.jsonl",
            data=str(data),
            rle=True,
            segmentation={"presence_threshold": 0.5},
        )


def test_absent_targets_are_counted(model: Path, tmp_path: Path) -> None:
    data = records(tmp_path)
    summary = run(
        model, tmp_path / "o.jsonl", data=str(data), segmentation={"presence_threshold": 1.0}
    )
    assert summary.masks is not None
    assert summary.masks.absent == summary.masks.empty == summary.masks.masks > 0
    spans = [span for line in read_output(tmp_path / "o.jsonl") for span in line["spans"]]
    assert all(span["absent"] for span in spans if "voxels" in span)
    with Image.open(tmp_path / next(s["mask"] for s in spans if s["mask"])) as mask:
        assert not np.asarray(mask).any()


def test_counts_of_lines_and_what_is_said() -> None:
    spans = [{"voxels": 3}, {"voxels": 0, "absent": True}, {"voxels": 0}, {"mask": None}]
    counts = MaskCounts.of([{"spans": spans, "unmasked": 2}, {"spans": []}, {"error": "x"}])
    assert counts == MaskCounts(3, 2, 1, 1, 2, 1)
    assert counts.notes[0] == "3 masks"
    assert counts.notes[1].startswith("2 of 3 masks are empty, 1 of them")
    assert MaskCounts().notes == ["0 masks"]


def test_a_folder_is_asked_about_and_new_files_are_added(model: Path, tmp_path: Path) -> None:
    cases = tmp_path / "cases"
    save_image(cases / "b" / "1.png", 1)
    save_image(cases / "c.png", 2)
    output = tmp_path / "out" / "o.jsonl"
    given = {"folder": str(cases), "prompt": "Segment the lesion", "masks": str(tmp_path / "m")}
    assert run(model, output, **given).answered == 2
    first = read_output(output)
    assert [line["id"] for line in first] == ["b/1.png", "c.png"]
    save_image(cases / "a.png", 3)
    again = run(model, output, **given)
    assert (again.resumed, again.answered) == (2, 3)
    lines = read_output(output)
    assert lines[:2] == first
    assert lines[2]["id"] == "a.png"
    for span in lines[2]["spans"]:
        assert (output.parent / span["mask"]).resolve().parent == (tmp_path / "m").resolve()
    other = given | {"prompt": "Segment the heart"}
    with pytest.raises(RecipeError, match="prompt was 'Segment the lesion' and is now"):
        run(model, output, **other)
    assert run(model, output, overwrite=True, **other).resumed == 0
    with pytest.raises(DataError, match="expected the folder that holds it"):
        run(model, output.with_name("x.jsonl"), **(given | {"folder": str(cases / "c.png")}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image or volume"):
        run(model, output.with_name("x.jsonl"), **(given | {"folder": str(tmp_path / "empty")}))


def test_a_refused_run_changes_no_records(model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_image(tmp_path / name / "1.png", 1)
        save_image(tmp_path / name / f"{name}.png", 2)
    output = tmp_path / "o.jsonl"
    given = {"folder": str(tmp_path / "a"), "prompt": "What?"}
    run(model, output, **given)
    records_file = tmp_path / "o.jsonl.records.jsonl"
    before = records_file.read_text()
    with pytest.raises(RecipeError, match=r"root was .*a' and is now .*b'"):
        run(model, output, **(given | {"folder": str(tmp_path / "b")}))
    with pytest.raises(RecipeError, match="the data file changed"):
        run(model, output, image=[str(tmp_path / "b" / "b.png")], prompt="What?")
    with (
        Results(output, {}).locked(),
        pytest.raises(MedmError, match="another run is writing"),
    ):
        run(model, output, overwrite=True, **(given | {"folder": str(tmp_path / "b")}))
    assert records_file.read_text() == before
    output.unlink()
    (tmp_path / "o.jsonl.run.json").unlink()
    run(model, output, **(given | {"folder": str(tmp_path / "b")}))
    assert [line["id"] for line in read_output(output)] == ["1.png", "b.png"]


def test_an_output_within_the_folder_is_not_asked_about(model: Path, tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 1)
    save_image(tmp_path / "b.png", 2)
    given = {"folder": str(tmp_path), "prompt": "What is it", "overlays": True}
    run(model, tmp_path / "out" / "o.jsonl", **given)
    assert list((tmp_path / "out" / "o_masks").iterdir())
    again = run(model, tmp_path / "out" / "o.jsonl", **given)
    assert (again.records, again.resumed) == (2, 2)
    file, masks = tmp_path / "r.jsonl", tmp_path / "out" / "o_masks"
    write_folder_records(file, masks, "?", ["image"], left_out=[masks, tmp_path])
    assert file.read_text(), "the folder itself is asked about where that is wanted"


def test_changed_settings_remove_masks_of_earlier_lines(model: Path, tmp_path: Path) -> None:
    data = records(tmp_path)
    run(model, tmp_path / "o.jsonl", data=str(data), overlays=True)
    old = {path.name for path in (tmp_path / "o_masks").iterdir()}
    assert any(name.endswith("_overlay.png") for name in old)
    run(model, tmp_path / "o.jsonl", data=str(data), mask_format="npy", overwrite=True)
    left = {path.name for path in (tmp_path / "o_masks").iterdir()}
    assert left and all(name.endswith(".npy") for name in left)


def test_files_of_a_folder_by_kind(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 1)
    for name in ("v.nii.gz", "x.npy", "ct/1.dcm", "ct/2.dcm", "one/1.dcm", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def kinds(*read: str) -> dict[str, str]:
        file = tmp_path / "records.jsonl"
        write_folder_records(file, tmp_path, "<image> What?", read, existing="replace")
        found = [json.loads(line) for line in file.read_text().splitlines()]
        assert found[0]["messages"][0]["content"][1] == {"type": "text", "text": "\n<image> What?"}
        return {record["id"]: record["messages"][0]["content"][0]["type"] for record in found}

    assert kinds("image", "image@masks", "volume") == {
        "a.png": "image",
        "ct": "volume",
        "one/1.dcm": "image",
        "v.nii.gz": "volume",
        "x.npy": "image",
    }
    assert kinds("volume")["x.npy"] == "volume"
    (tmp_path / "ct" / "photo.png").touch()
    assert kinds("image", "volume").keys() >= {"ct", "ct/photo.png"}
    classes = kinds("image")
    assert "ct" not in classes
    assert all(classes[f"ct/{name}"] == "image" for name in ("1.dcm", "2.dcm", "photo.png"))


def volume_file(file: Path) -> None:
    voxels = np.random.default_rng(1).integers(-500, 500, (4, 10, 8)).astype(np.int16)
    image = sitk.GetImageFromArray(voxels)
    turn = np.deg2rad(15)
    image.SetDirection([np.cos(turn), -np.sin(turn), 0, np.sin(turn), np.cos(turn), 0, 0, 0, -1])
    image.SetSpacing((0.7, 0.8, 5.0))
    image.SetOrigin((1.0, 2.0, 3.0))
    sitk.WriteImage(image, str(file))


def test_masks_of_volumes_lie_on_their_volume(model: Path, tmp_path: Path) -> None:
    volume_file(tmp_path / "ct.nii.gz")
    data = write_records(
        tmp_path,
        [
            {
                "volume": "ct.nii.gz",
                "conversations": [{"from": "human", "value": "<volume>\n" + "Where?" * length}],
            }
            for length in range(1, 6)
        ],
    )
    run(model, tmp_path / "o.jsonl", data=str(data), segmentation={"slices": 2})
    lines = read_output(tmp_path / "o.jsonl")
    spans = [span for line in lines for span in line["spans"]]
    assert spans
    own = sitk.ReadImage(str(tmp_path / "ct.nii.gz"))
    for span in spans:
        assert span["volume"] == 0
        mask = sitk.ReadImage(str(tmp_path / span["mask"]))
        assert mask.GetSize() == own.GetSize()
        np.testing.assert_allclose(mask.GetDirection(), own.GetDirection(), atol=1e-5)
        np.testing.assert_allclose(mask.GetOrigin(), own.GetOrigin(), atol=1e-4)
        assert sitk.GetArrayFromImage(mask).sum() == span["voxels"]


def test_images_of_a_record_as_slices(model: Path, tmp_path: Path) -> None:
    for number in range(3):
        save_image(tmp_path / f"{number}.png", number)
    record = {
        "image": ["0.png", "1.png", "2.png"],
        "conversations": [{"from": "human", "value": "<image>\n<image>\n<image>\nWhere"}],
    }
    longer = [
        {"from": "human", "value": record["conversations"][0]["value"] + "?" * n} for n in (0, 1, 2)
    ]  # type: ignore[index]
    data = write_records(tmp_path, [record | {"conversations": [turn]} for turn in longer])
    given: dict[str, Any] = {"data": str(data), "overlays": True}
    run(model, tmp_path / "o.jsonl", segmentation={"volume_mode": "slices", "slices": 2}, **given)
    lines = read_output(tmp_path / "o.jsonl")
    spans = [span for line in lines for span in line["spans"]]
    assert [span["image"] for span in spans] == [0, 1, 2] * 3  # two masks, one, and none
    files = {span["mask"] for span in spans}
    assert len(files) == len(spans)
    assert all((tmp_path / file).is_file() for file in files)
    for line in lines:
        if line["spans"]:
            assert len(line["overlay"]) == 3


def test_formats(model: Path, tmp_path: Path) -> None:
    data = records(tmp_path, 6)
    run(model, tmp_path / "npy.jsonl", data=str(data), mask_format="npy")
    for line in read_output(tmp_path / "npy.jsonl"):
        for span in line["spans"]:
            if span["mask"] is not None:
                soft = np.load(tmp_path / span["mask"])
                assert soft.dtype == np.float32
                assert 0 < soft.max() <= 1
                assert (soft > 0.5).sum() == span["voxels"]
    run(model, tmp_path / "rle.jsonl", data=str(data), mask_format="rle")
    assert not (tmp_path / "rle_masks").exists()
    spans = [s for line in read_output(tmp_path / "rle.jsonl") for s in line["spans"]]
    assert any("rle" in span for span in spans)
    assert all(span["mask"] is None for span in spans)
    summary = run(model, tmp_path / "nifti.jsonl", data=str(data), mask_format="nifti")
    errors = [line["error"] for line in read_output(tmp_path / "nifti.jsonl") if "error" in line]
    assert summary.errors == len(errors) > 0
    assert "masks of images are written as png" in errors[0]


def test_options_that_do_not_go_together(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of data, folder, and image or volume"):
        run(model, tmp_path / "o.jsonl")
    with pytest.raises(ValueError, match="a prompt belongs to folder"):
        run(model, tmp_path / "o.jsonl", folder=str(tmp_path))
    with pytest.raises(RecipeError, match="volume_mode"):
        run(
            model,
            tmp_path / "o.jsonl",
            data=str(records(tmp_path)),
            segmentation={"volume_mode": "volume"},
        )
    assert file_stem("000001_q/1: é ä") == "000001_q-1"
    assert file_stem("..") == "reply"


@pytest.mark.skipif(find_spec("highdicom") is None, reason="comes with the extra 'dicom'")
def test_masks_lie_on_the_series_that_was_read(tmp_path: Path) -> None:
    folder = tmp_path / "ct"
    small = sitk.RegionOfInterest(phantom(), [26, 20, 6], [0, 0, 0])
    write_series(folder, small, change=complete, number=3, prefix="A")
    write_series(folder, phantom(), change=complete, number=4, prefix="B")
    preprocess = VolumePreprocess(windows=[[-1000, 1000]], size=None, series="largest")
    placement = prepare(folder, preprocess).placement
    phrase = Phrase(0, 5, "liver")
    mask = MaskPrediction(0, phrase, "volume", 0, body() > 0, placement, 1.0, 1.0, False)
    grounded = Grounded(GroundedText("liver", "liver[SEG]", (phrase,), 0), (mask,))
    given = {"model": "m", "data": "d", "output": str(tmp_path / "o.jsonl"), "overlays": True}
    options = InferOptions(**given, mask_format="dicom-seg")
    shown = [Shown("volume", folder)]
    further: dict[str, Any] = {}
    writer = MaskWriter.of(options, several=series_choice(preprocess))
    (span,) = writer.spans_of("a", grounded, shown, further)
    seg = pydicom.dcmread(tmp_path / span["mask"])
    read = pydicom.dcmread(next(folder.glob("B*"))).SeriesInstanceUID
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == read
    assert (tmp_path / further["overlay"]).is_file()
    with pytest.raises(DataError, match="2 series fit"):
        MaskWriter.of(options).spans_of("a", grounded, shown)


def test_what_a_model_or_machine_cannot_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = records(tmp_path)
    monkeypatch.setattr("medm.inference.mask_writing.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"needs highdicom; pip install 'medm\[dicom\]'"):
        run(model, tmp_path / "o.jsonl", data=str(data), mask_format="dicom-seg")
    text = save_tiny(tmp_path / "text")
    with pytest.raises(RecipeError, match=r"overlays, rle: for models that answer with masks"):
        run(text, tmp_path / "o.jsonl", data=str(data), rle=True, overlays=True)


def test_the_command_says_how_many_masks_there_are(model: Path, tmp_path: Path) -> None:
    save_image(tmp_path / "in" / "a.png", 1)
    done = medm(
        "infer", "--model", str(model), "--folder", str(tmp_path / "in"), "--prompt", "Where?",
        "--output", str(tmp_path / "o.jsonl"), "--device", "cpu", "--workers", "0",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "1 answered" in done.out
    assert " masks" in done.out + done.err


def test_masks_of_the_reference_are_not_read(model: Path, tmp_path: Path) -> None:
    """A record for training is answered, too: its reply and masks are those of the reference."""
    save_image(tmp_path / "a.png", 1)
    record = {
        "image": "a.png",
        "masks": ["not-there.png"],
        "conversations": [
            {"from": "human", "value": "<image>\nWhere is it???"},
            {"from": "gpt", "value": "It is [SEG]."},
        ],
    }
    data = write_records(tmp_path, [record])
    summary = run(model, tmp_path / "o.jsonl", data=str(data))
    (line,) = read_output(tmp_path / "o.jsonl")
    assert summary.errors == 0, line
    assert "answer" in line
