from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from medm.errors import CheckpointError, MedmError, RecipeError
from medm.models.manifest import MANIFEST, verify
from medm.training import checkpoints


def write(output_dir: Path, step: int, content: bytes = b"weights") -> Path:
    folder = checkpoints.staging(output_dir, step)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "sub").mkdir()
    (folder / "sub" / "shard").write_bytes(b"x" * 1000)
    final = output_dir / f"checkpoint-{step}"
    checkpoints.commit(folder, final=final, metadata={"step": step})
    return final


def test_a_committed_checkpoint_verifies_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    folder = write(tmp_path, 8)
    assert verify(folder)["step"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]


def flip(folder: Path) -> None:
    path = folder / "sub" / "shard"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"wei")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def lose(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def plant(folder: Path) -> None:
    (folder / "extra.pt").write_bytes(b"?")


def spoil_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def flip_row_19_fact(folder: Path) -> None:
    """A digit of the step, which no file of the checkpoint holds."""
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    assert text.count('"step": 12') == 1
    manifest.write_text(text.replace('"step": 12', '"step": 13'))


@pytest.mark.parametrize(
    "damage", [flip, truncate, empty, lose, plant, spoil_manifest, flip_row_19_fact]
)
def test_damage_is_seen_and_an_older_checkpoint_is_used_loudly(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 4)
    older, newest = write(tmp_path, 8), write(tmp_path, 12)
    damage(newest)
    with pytest.raises(CheckpointError, match="checkpoint-12"):
        verify(newest)
    with caplog.at_level(logging.ERROR):
        assert checkpoints.newest_good(tmp_path) == older
    assert "DAMAGED CHECKPOINT" in caplog.text
    assert "checkpoint-8" in caplog.text


def test_only_damaged_checkpoints_are_an_error_and_none_is_not(tmp_path: Path) -> None:
    assert checkpoints.newest_good(tmp_path) is None
    for step in (4, 8):
        flip(write(tmp_path, step))
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is complete"):
        checkpoints.newest_good(tmp_path)


def test_newest_counts_steps_not_letters(tmp_path: Path) -> None:
    write(tmp_path, 9)
    newest = write(tmp_path, 10)
    assert checkpoints.newest_good(tmp_path) == newest


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    best = write(tmp_path, 2)
    for step in (4, 6, 8):
        newest = write(tmp_path, step)
    checkpoints.prune(tmp_path, keep=2, best=best, newest=newest)
    assert [path.name for path in checkpoints.folders(tmp_path)] == [
        "checkpoint-8",
        "checkpoint-6",
        "checkpoint-2",
    ]


def test_nothing_is_pruned_when_the_new_checkpoint_does_not_verify(tmp_path: Path) -> None:
    write(tmp_path, 2)
    newest = write(tmp_path, 4)
    flip(newest)
    with pytest.raises(CheckpointError):
        checkpoints.prune(tmp_path, keep=1, best=None, newest=newest)
    assert len(checkpoints.folders(tmp_path)) == 2


def test_a_manifest_that_lacks_what_it_must_say_sends_one_back_to_an_older_checkpoint(
    tmp_path: Path,
) -> None:
    metadata = {"step": int}
    older = write(tmp_path, 4)
    manifest = write(tmp_path, 8) / MANIFEST
    record = json.loads(manifest.read_text())
    entry = record["files"]["model.safetensors"]
    for changed in (
        {**record, "files": {**record["files"], "model.safetensors": {"size": entry["size"]}}},
        {**record, "files": {**record["files"], "model.safetensors": 7}},
        {**record, "step": "eight"},
        {"files": record["files"]},
        [],
    ):
        manifest.write_text(json.dumps(changed))
        assert checkpoints.newest_good(tmp_path, metadata=metadata) == older
    manifest.write_text(json.dumps(record))
    assert checkpoints.newest_good(tmp_path, metadata=metadata) == manifest.parent


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    flip(write(tmp_path, 4, b"old"))
    folder = write(tmp_path, 4, b"new")
    verify(folder)
    assert (folder / "model.safetensors").read_bytes() == b"new"


def test_what_a_killed_run_left_is_cleared_and_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    folder = checkpoints.staging(tmp_path, 4)
    (folder / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-x").write_bytes(b"a plain file (row 44)")
    assert checkpoints.newest_good(tmp_path) is None
    checkpoints.clear_staging(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_space_is_asked_for_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1100))
    checkpoints.check_space(tmp_path, estimate=900)
    with pytest.raises(CheckpointError, match="are free"):
        checkpoints.check_space(tmp_path, estimate=1000)  # 1.2 times
    write(tmp_path, 4)  # 1007 bytes and a manifest: now the last one counts
    with pytest.raises(CheckpointError, match="save_total_limit"):
        checkpoints.check_space(tmp_path, estimate=1)


def test_one_run_a_folder(tmp_path: Path) -> None:
    with (
        checkpoints.locked(tmp_path),
        pytest.raises(MedmError, match="another run is writing here"),
    ):
        checkpoints.locked(tmp_path).__enter__()
    with checkpoints.locked(tmp_path):
        pass


@pytest.mark.parametrize("file", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_folder_with_a_model_is_not_for_a_new_run(tmp_path: Path, file: str) -> None:
    (tmp_path / "loss.jsonl").write_text("{}")  # of a run that wrote nothing else
    checkpoints.check_unused(tmp_path)
    checkpoints.check_unused(tmp_path / "absent")
    (tmp_path / file).write_text("")
    with pytest.raises(
        RecipeError, match=rf"finished model \({file}\).*another output_dir.*--resume"
    ):
        checkpoints.check_unused(tmp_path)
    write(tmp_path, 4)
    with pytest.raises(RecipeError, match=r"holds checkpoint-4 of an earlier run.*--resume"):
        checkpoints.check_unused(tmp_path)
