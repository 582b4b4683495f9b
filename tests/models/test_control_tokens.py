"""Control tokens of replies: from the record to ids, labels, rows, a saved folder and back to
text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from medm.config import validate
from medm.data.turns import parse_record
from medm.errors import DataError, RecipeError
from medm.inference.generator import load_engine
from medm.inference.options import GenerationOptions
from medm.llms import LLMS
from medm.llms.base import read_template
from medm.models import build, load, processor_of
from medm.models.estimate import estimate
from medm.models.export.export import export
from medm.models.export.llava import save_llava
from medm.models.lvlm.options import LVLMOptions
from medm.models.lvlm.processing import LVLMProcessor
from medm.models.token_rows import hold_apart, is_tied, merge_rows, token_rows
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import apply_parts
from medm.types import IGNORE_INDEX, Sample
from tests import tiny

SEG = "[SEG]"
MASKED: dict[str, Any] = {
    "masks": ["a.png", "b.png", "c.png"],
    "conversations": [
        {"from": "system", "value": "Write [SEG] for a mask."},
        {"from": "human", "value": "Segment the liver. [SEG]"},
        {"from": "gpt", "value": "Here it is: [SEG]."},
        {"from": "human", "value": "And both kidneys?"},
        {"from": "gpt", "value": "They are [SEG][SEG]"},
    ],
}
"""[SEG] typed by people, in the middle of a reply, two in a row, and at the end of one."""


def masked(*, inference: bool = False) -> Sample:
    """`MASKED` for models of texts alone: masks need an image, which is taken out again."""
    turns = [{"from": "system", "value": "Write [SEG] for a mask.<image>"}]
    record = {**MASKED, "image": "a.png", "conversations": turns + MASKED["conversations"][1:]}
    sample = parse_record(record, inference=inference)
    first, *others = sample.turns
    return replace(sample, turns=(replace(first, content=first.content[:1]), *others))


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: "▁" for spaces, one in front of the text, and single bytes for what is
    unknown."""
    letters = [chr(code) for code in range(33, 127)]
    vocab = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)},
    }
    vocab |= {letter: len(vocab) + number for number, letter in enumerate(["▁", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def processor_for(family: str) -> LVLMProcessor:
    if family == "sentencepiece":
        tokenizer, traits = sentencepiece_tokenizer(), LLMS.get("llama-2")
    else:
        tokenizer, traits = tiny.make_tokenizer(family), LLMS.get(family)
    template = None if tokenizer.chat_template else read_template(traits.template or "")
    return LVLMProcessor(
        tokenizer,
        template_kwargs=traits.template_kwargs,
        chat_template=template,
        control_tokens=[SEG],
    )


FAMILIES = [*sorted(tiny.FAMILIES), "sentencepiece"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_stands_only_where_the_record_says_so_and_is_learned(family: str) -> None:
    processor = processor_for(family)
    seg = processor.control_token_ids[SEG]
    example = processor.encode(masked(), {})
    places = [i for i, token in enumerate(example.input_ids) if token == seg]
    assert [example.labels[i] for i in places] == [seg] * 3
    assert places[2] == places[1] + 1
    assert example.labels[places[2] + 1] == processor.chat.end_of_reply()
    text = processor.tokenizer.decode(example.input_ids)
    assert text.count(SEG) == 5, "two of them are letters, in the system prompt and in the question"
    # The same record without masks holds letters alone.
    letters = processor.encode(parse_record({**MASKED, "masks": None}), {})
    assert seg not in letters.input_ids
    assert processor.tokenizer.decode(letters.input_ids).count(SEG) == 5
    # The prompt of the last reply holds the control token of the first one.
    prompt = processor.encode(masked(inference=True), {}, generation=True)
    assert prompt.input_ids.count(seg) == 1
    assert set(prompt.labels) == {IGNORE_INDEX}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_that_holds_the_letters_writes_letters(family: str) -> None:
    processor = processor_for(family)
    told = f"{{{{ 'Use {SEG}. ' }}}}{processor.chat_template}"
    other = LVLMProcessor(
        processor.tokenizer,
        template_kwargs=processor.template_kwargs,
        chat_template=told,
        control_tokens=[SEG],
    )
    example = other.encode(masked(), {})
    assert example.input_ids.count(processor.control_token_ids[SEG]) == 3
    assert other.tokenizer.decode(example.input_ids).count(SEG) == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reply_is_decoded_with_the_places_of_its_control_tokens(family: str) -> None:
    """Letters that a model writes are no control token, and end tokens and padding are left out."""
    processor = processor_for(family)
    seg, end = processor.control_token_ids[SEG], processor.chat.end_of_reply()
    words = processor.chat._encode_text
    ids = [*words("Mass [SEG] "), seg, *words(" and é"), seg, seg, end, processor.pad_id]
    reply = processor.decode_with_control_tokens(torch.tensor(ids))
    assert [reply.text[found.start :][: len(SEG)] for found in reply.tokens] == [SEG] * 3
    assert [ids[found.index] for found in reply.tokens] == [seg] * 3
    assert reply.tokens[0].start > reply.text.index(SEG), "the first are letters"
    assert reply.text.count(SEG) == 4
    assert reply.text.endswith(f"é{SEG}{SEG}")
    assert processor.text(ids).count(SEG) == 1, "the plain reply drops them"
    assert processor.text(ids).startswith("Mass [SEG]")
    only = processor.decode_with_control_tokens([seg])
    assert (only.text, [found.start for found in only.tokens]) == (SEG, [0])
    assert processor.decode_with_control_tokens(words("No mass.")).tokens == ()


def test_a_model_without_the_token_refuses_the_record_and_reads_the_letters(
    llms: dict[str, Path],
) -> None:
    processor = processor_of(section(llms, "phi3"))
    with pytest.raises(
        DataError, match=r"'masks': a reply holds \[SEG\].*the model has no control tokens"
    ):
        processor.encode(masked(), {})
    letters = processor.encode(parse_record({**MASKED, "masks": []}), {})
    assert processor.tokenizer.decode(letters.input_ids).count(SEG) == 5


def section(llms: dict[str, Path], family: str, **changes: Any) -> LVLMOptions:
    fields = tiny.lvlm_section(llms[family], family=family) | changes
    return validate(LVLMOptions, fields, source="test")


def vocabulary(model: Any) -> list[torch.Tensor]:
    head = model.get_output_embeddings()
    return [model.get_input_embeddings().weight.detach().clone(), head.weight.detach().clone()]


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_rows_start_as_the_mean_and_the_others_are_those_of_before(
    family: str, llms: dict[str, Path]
) -> None:
    """320 rows are there already, as published models have rows to spare."""
    torch.manual_seed(0)
    before, _ = build(section(llms, family))
    torch.manual_seed(0)
    model, processor = build(section(llms, family, control_tokens=[SEG]))
    seg = processor.control_token_ids[SEG]
    assert model.config.control_tokens == {SEG: seg}
    for old, new in zip(vocabulary(before), vocabulary(model), strict=True):
        assert old.shape == new.shape
        changed = [i for i in range(len(old)) if not torch.equal(old[i], new[i])]
        assert changed == [seg]
        torch.testing.assert_close(new[seg], new[:seg].mean(dim=0))


def test_rows_are_added_where_a_vocabulary_has_none_to_spare(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer("qwen3")
    llm = tiny.save_llm("qwen3", tmp_path / "llm", vocab_size=len(tokenizer) + 1)
    model, processor = build(section({"qwen3": llm}, "qwen3", control_tokens=[SEG]))
    seg = processor.control_token_ids[SEG]
    assert seg == len(tokenizer) + 1
    assert model.config.get_text_config().vocab_size == 320
    for matrix in vocabulary(model):
        assert len(matrix) == 320
        torch.testing.assert_close(matrix[seg], matrix[:seg].mean(dim=0))


def test_a_saved_folder_without_the_token_gets_it_by_recipe(
    llms: dict[str, Path], tmp_path: Path
) -> None:
    """The usual order: a model is trained on reports first, and on masks later."""
    model, processor = build(section(llms, "qwen2.5"))
    model.save_pretrained(tmp_path / "first")
    processor.save_pretrained(tmp_path / "first")
    for name in ("config.json", "processor_config.json"):
        assert "control_tokens" not in (tmp_path / "first" / name).read_text(), (
            "an older medm opens it"
        )
    options = section(llms, "qwen2.5", control_tokens=[SEG])
    second, adapted = build(options, init_from=str(tmp_path / "first"))
    seg = adapted.control_token_ids[SEG]
    assert second.config.control_tokens == {SEG: seg}
    torch.testing.assert_close(vocabulary(second)[0][seg], vocabulary(second)[0][:seg].mean(dim=0))
    assert processor_of(options, init_from=str(tmp_path / "first")).control_token_ids == {SEG: seg}
    with torch.no_grad():
        second.get_input_embeddings().weight[seg] = 1.0
    second.save_pretrained(tmp_path / "second")
    adapted.save_pretrained(tmp_path / "second")
    # A recipe that does not name it keeps it, and its row is not started again.
    for again in (options, section(llms, "qwen2.5")):
        third, kept = build(again, init_from=str(tmp_path / "second"))
        assert kept.control_token_ids == third.config.control_tokens == {SEG: seg}
        assert torch.equal(vocabulary(third)[0][seg], torch.ones(32))


TRAIN = TrainOptions(learning_rate=1e-2, weight_decay=0.5)


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3", "phi"])  # tied; untied; untied with a bias
@pytest.mark.parametrize("tune", ["frozen", "lora", "full"])
def test_new_rows_alone_move_and_a_saved_folder_computes_the_same(
    family: str, tune: Any, llms: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, processor = build(section(llms, family, control_tokens=[SEG]))
    seg = processor.control_token_ids[SEG]
    before = vocabulary(model)
    others = {name: p.detach().clone() for name, p in model.named_parameters()}
    parts = {"llm": PartOptions(tune=tune, new_tokens={"lr": 0.1})}
    table = apply_parts(model, parts, TRAIN)
    rows = 32 * (1 if tiny.FAMILIES[family]["tied"] else 2)
    assert table.rows[0].tune == f"{tune}, new tokens"
    assert table.rows[0].lr == (0.1 if tune == "frozen" else 1e-2)
    assert tune != "frozen" or table.trainable == rows
    example = processor.encode(masked(), {})
    batch = {
        "input_ids": torch.tensor([example.input_ids]),
        "labels": torch.tensor([example.labels]),
    }
    first = train_steps(model, parts, batch)
    moved = vocabulary(model)
    assert all(torch.equal(old, new) for old, new in zip(before, moved, strict=True)), "held apart"
    logits = model.eval()(input_ids=batch["input_ids"]).logits
    model.save_pretrained(tmp_path / "folder")
    processor.save_pretrained(tmp_path / "folder")
    opened, reopened = load(str(tmp_path / "folder"))
    assert torch.equal(opened(input_ids=batch["input_ids"]).logits, logits)
    assert reopened.encode(masked(), {}).input_ids == example.input_ids
    opened.merge_adapters()
    torch.testing.assert_close(
        opened(input_ids=batch["input_ids"]).logits, logits, atol=1e-5, rtol=1e-5
    )
    assert opened.config.new_rows == opened.config.adapters == {}
    assert not any("new_rows" in name for name in opened.state_dict())
    for old, new in zip(before, vocabulary(opened), strict=True):
        assert [i for i in range(len(old)) if not torch.equal(old[i], new[i])] == [seg]
    names = {
        name
        for name, p in opened.named_parameters()
        if name in others and not torch.equal(p, others[name])
    }
    vocabulary_names = {name for name in names if "embed_tokens" in name or "lm_head" in name}
    assert vocabulary_names and (tune != "frozen" or names == vocabulary_names)
    assert tune != "full" or names > vocabulary_names
    opened.save_pretrained(tmp_path / "merged")
    reopened.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        load(str(tmp_path / "merged"))[0](input_ids=batch["input_ids"]).logits,
        logits,
        atol=1e-5,
        rtol=1e-5,
    )
    assert first > 0


def train_steps(
    model: Any, parts: dict[str, PartOptions], batch: dict[str, torch.Tensor], steps: int = 3
) -> float:
    from medm.training.parts import parameter_groups

    optimizer = torch.optim.AdamW(parameter_groups(model, parts, TRAIN))
    assert [g["weight_decay"] for g in optimizer.param_groups if g["name"] == "llm.new_tokens"] == [
        0.0
    ]
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def trained_rows(llms: dict[str, Path], folder: Path, family: str = "qwen2.5") -> tuple[Any, int]:
    """A saved model with a LoRA adapter and new rows, none of them as it began."""
    model, processor = build(section(llms, family, control_tokens=[SEG]))
    apply_parts(model, {"llm": PartOptions(tune="lora", r=2, new_tokens="train")}, TRAIN)
    for name, parameter in model.named_parameters():
        if "new_rows" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor.control_token_ids[SEG]


def test_exports_hold_the_rows_in_the_vocabulary(llms: dict[str, Path], tmp_path: Path) -> None:
    model, seg = trained_rows(llms, tmp_path / "model")
    row = model.get_input_embeddings().new_rows.weight[0].detach().clone()
    proof = export(
        str(tmp_path / "model"), str(tmp_path / "merged"), form="merged", max_new_tokens=2
    )
    assert proof.difference < 1e-4
    merged, processor = load(str(tmp_path / "merged"))
    assert merged.config.new_rows == {}
    assert merged.config.control_tokens == processor.control_token_ids == {SEG: seg}
    assert torch.equal(merged.get_input_embeddings().weight[seg], row)
    (tmp_path / "llava").mkdir()
    save_llava(merged, processor, tmp_path / "llava")
    tensors = load_file(tmp_path / "llava" / "model.safetensors")
    assert torch.equal(tensors["language_model.model.embed_tokens.weight"][seg], row)
    assert not any("new_rows" in name for name in tensors)


def test_a_model_for_inference_has_plain_layers(llms: dict[str, Path], tmp_path: Path) -> None:
    trained_rows(llms, tmp_path / "model", family="qwen3")
    options = GenerationOptions(max_new_tokens=2)
    engine, _ = load_engine(str(tmp_path / "model"), options, device=torch.device("cpu"))
    assert token_rows(engine.model) == []


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
def test_an_estimate_counts_the_rows(family: str, llms: dict[str, Path], tmp_path: Path) -> None:
    rows = 32 * (1 if tiny.FAMILIES[family]["tied"] else 2)

    def choose(model: Any) -> None:
        apply_parts(model, {"llm": PartOptions(tune="frozen", new_tokens="train")}, TRAIN)

    options = section(llms, family, control_tokens=[SEG])
    assert estimate(options, choose=choose).trainable == rows
    model, processor = build(section(llms, family))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert estimate(options, choose=choose, init_from=str(tmp_path)).trainable == rows


def test_rows_that_are_no_neighbours_and_scaled_embeddings() -> None:
    """Gemma multiplies embeddings by sqrt(D); ids need not follow each other."""
    sizes = tiny.llm_architecture("llama-3.2") | {"model_type": "gemma3_text", "head_dim": 8}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes)).eval()
    ids = torch.tensor([[7, 300, 301, 12, 9]])
    hold_apart(model, [301, 12, 300], tied=is_tied(model))
    for rows in token_rows(model):
        torch.nn.init.normal_(rows.weight)
    with torch.no_grad():
        apart = model(input_ids=ids).logits
        merge_rows(model)
        merged = model(input_ids=ids).logits
    torch.testing.assert_close(apart, merged, atol=1e-4, rtol=1e-4)
    assert token_rows(model) == []


def test_a_part_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(RecipeError, match="Linear has no token embeddings"):
        hold_apart(torch.nn.Linear(2, 2), [0], tied=False)


def test_other_control_tokens_are_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"control_tokens: expected \[SEG\].*found \['\[seg\]'\]"):
        validate(LVLMOptions, {"llm": "auto", "control_tokens": ["[seg]"]}, source="test")
