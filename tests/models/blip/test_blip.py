"""The kind `blip`: each output against a straight computation, state of training, texts."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, BertModel
from transformers.models.blip.configuration_blip import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

from medm.config import validate
from medm.errors import RecipeError
from medm.models.blip.beam import beam_search
from medm.models.blip.build import load_text
from medm.models.blip.modeling import MedmBlip
from medm.models.blip.momentum import FeatureQueue, draws, hard_negatives, soft_targets
from medm.models.blip.options import BlipOptions
from medm.models.blip.processing import MedmBlipProcessor
from medm.models.blip.text import Decoder, StudyTextEncoder
from medm.models.published.weights import PretrainedSource
from tests.models.blip.tiny import IDS, MASK, knowledge, make, section, studies
from tests.models.dual_encoder.tiny import TEXT, WORDS, save_tokenizer

BERT = BertConfig(**TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def made(tokenizer: str) -> tuple[MedmBlip, MedmBlipProcessor]:
    return make(section(tokenizer))


# -- the text encoder ------------------------------------------------------------------------------


def test_a_text_alone_is_bert() -> None:
    torch.manual_seed(0)
    reference, own = BertModel(BERT, add_pooling_layer=False).eval(), StudyTextEncoder(BERT, None)
    own.load_state_dict(
        {
            name.replace("encoder.layer.", "layers."): tensor
            for name, tensor in reference.state_dict().items()
        }
    )
    with torch.no_grad():
        expected = reference(input_ids=IDS, attention_mask=MASK).last_hidden_state
        found = own.eval()(IDS, MASK)
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], atol=1e-5, rtol=1e-4)


def test_cross_attention_and_the_decoder_are_those_of_blip() -> None:
    """BLIP's decoder holds its own copy of weights; here all but self-attention are shared."""
    torch.manual_seed(0)
    sizes = BlipTextConfig(
        **TEXT, encoder_hidden_size=24, is_decoder=True, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, layer_norm_eps=1e-12, pad_token_id=0,
    )  # fmt: skip
    reference = BlipTextModel(sizes, add_pooling_layer=False).eval()
    writer = BlipTextLMHeadModel(sizes).eval()
    own, decoder = StudyTextEncoder(BERT, 24).eval(), Decoder(BERT).eval()
    tensors = reference.state_dict()
    renamed = {name.replace("encoder.layer.", "layers."): t for name, t in tensors.items()}
    renamed["embeddings.token_type_embeddings.weight"] = torch.zeros(2, 32)
    own.load_state_dict(renamed)
    shared = {f"bert.{n}": t for n, t in tensors.items() if ".attention." not in n}
    writer.load_state_dict(shared, strict=False)
    words = tensors["embeddings.word_embeddings.weight"]
    writer.cls.predictions.decoder.weight.data.copy_(words)
    for number, layer in enumerate(writer.bert.encoder.layer):
        decoder.attention[number].load_state_dict(layer.attention.state_dict())
    decoder.transform.load_state_dict(writer.cls.predictions.transform.state_dict())
    bias = torch.randn(len(WORDS))
    decoder.bias.data.copy_(bias)
    writer.cls.predictions.decoder.bias.data.copy_(bias)
    image = torch.randn(4, 5, 24)
    given: dict[str, Any] = {"attention_mask": MASK, "encoder_hidden_states": image}
    with torch.no_grad():
        expected = reference(input_ids=IDS, is_decoder=False, **given).last_hidden_state
        found = own(IDS, MASK, image, torch.ones(4, 5, dtype=torch.bool))
        logits = writer(input_ids=IDS, is_decoder=True, **given).logits
        written = decoder.logits(own, decoder(own, IDS, MASK, image, None))
    seen = MASK.bool()
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(written[seen], logits[seen], atol=1e-5, rtol=1e-4)


def test_published_bert_starts_encoder_and_decoder(tokenizer: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    reference = BertForMaskedLM(BERT)
    reference.save_pretrained(tmp_path)
    model = make(section(tokenizer))[0]
    reports = load_text(model, PretrainedSource(str(tmp_path)))
    assert len(reports) == 2
    state = reference.state_dict()
    layer = "encoder.layer.1.attention.self.query.weight"
    query = state[f"bert.{layer}"]
    text: Any = model.text
    assert model.decoder is not None
    torch.testing.assert_close(text.layers[1].attention.self.query.weight, query)
    decoder: Any = model.decoder.attention[1]
    torch.testing.assert_close(decoder.self.query.weight, query)
    words = model.text.embeddings.word_embeddings.weight
    assert len(words) == len(WORDS) + 2
    torch.testing.assert_close(words[: len(WORDS)], state["bert.embeddings.word_embeddings.weight"])
    dense = state["cls.predictions.transform.dense.weight"]
    torch.testing.assert_close(model.decoder.transform.dense.weight, dense)
    torch.testing.assert_close(model.decoder.bias[: len(WORDS)], state["cls.predictions.bias"])


# -- queue, targets and negatives ------------------------------------------------------------------


def test_a_queue_wraps_where_batches_do_not_divide_it() -> None:
    queue = FeatureQueue(5, 1)
    expected: list[int] = []
    for size in (2, 2, 3, 1, 7, 5, 4):
        numbers = torch.arange(sum((0,) if not expected else (expected[-1] + 1,)), 10**6)[:size]
        queue.add(numbers[:, None].float(), -numbers[:, None].float(), numbers)
        expected += numbers.tolist()
        image, text, owners = queue.held()
        assert sorted(owners.tolist()) == expected[-5:]
        torch.testing.assert_close(image.flatten(), owners.float())
        torch.testing.assert_close(text.flatten(), -owners.float())
    queue.clear()
    assert len(queue.held()[0]) == 0


def test_soft_targets_by_hand() -> None:
    similar = torch.tensor([[0.0, math.log(3), 0.0]])
    positives = torch.tensor([[True, False, True]])
    found = soft_targets(similar, positives, 0.4)
    torch.testing.assert_close(found, torch.tensor([[0.4 * 0.2 + 0.3, 0.4 * 0.6, 0.4 * 0.2 + 0.3]]))


def test_hard_negatives_follow_the_similarities_and_are_seeded() -> None:
    similar = torch.tensor([[9.0, 0.0, math.log(3), 9.0]]).expand(20000, 4)
    allowed = torch.tensor([[False, True, True, False]]).expand(20000, 4)
    places = draws(7, 20000, torch.device("cpu"))[0]
    found, possible = hard_negatives(similar - 9, allowed, places)
    assert possible.all()
    assert set(found.tolist()) == {1, 2}
    weights = (similar[0] - 9).softmax(0) + 1e-4
    share = float(weights[1] / (weights[1] + weights[2]))
    assert (found == 1).float().mean().item() == pytest.approx(share, abs=0.02)
    assert torch.equal(places, draws(7, 20000, torch.device("cpu"))[0])
    assert not torch.equal(places, draws(8, 20000, torch.device("cpu"))[0])
    none, possible = hard_negatives(similar[:1], torch.zeros(1, 4, dtype=torch.bool), places[:1])
    assert (none.item(), possible.item()) == (0, False)


# -- outputs ---------------------------------------------------------------------------------------


def unit(vector: torch.Tensor) -> torch.Tensor:
    return F.normalize(vector, dim=-1)


def test_every_output_equals_a_straight_computation(
    made: tuple[MedmBlip, MedmBlipProcessor],
) -> None:
    model = made[0].train()
    batch = studies() | {"owners": torch.tensor([11, 12, 13, 11])}
    with torch.no_grad():  # a momentum copy of its own, and a queue with an earlier batch
        for weight in model.momentum.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
        earlier = unit(torch.randn(3, 8)), unit(torch.randn(3, 8)), torch.tensor([12, 90, 91])
        model.queue.add(*earlier)
    assert model.queue.size == 6
    output = model(**batch)
    image = model.encode_images(batch["pixels"], batch["image_counts"])
    tau = model.temperature()
    for side, other in (("image", "text"), ("text", "image")):
        mine = unit(
            model.get_image_features(batch["pixels"])
            if side == "image"
            else model.get_text_features(IDS, MASK)
        )
        copy = model.momentum
        slow = {
            "image": unit(
                copy["image_projection"](
                    copy["image"](batch["pixels"]["image"], batch["image_counts"]).vector
                )
            ),
            "text": unit(copy["text_projection"](copy["text"](IDS, MASK)[:, 0])),
        }
        candidates = torch.cat([slow[other], earlier[0] if other == "image" else earlier[1]])
        torch.testing.assert_close(output[f"itc_logits_{side}"], mine @ candidates.T / tau)
        hard = torch.zeros(4, 7)
        for row, partners in enumerate(([0, 3], [1, 4], [2], [0, 3])):
            hard[row, partners] = 1 / len(partners)
        targets = 0.4 * (slow[side] @ candidates.T / tau).softmax(1) + 0.6 * hard
        torch.testing.assert_close(output[f"itc_targets_{side}"], targets)

    assert output.itm_labels.tolist() == [1] * 4 + [0] * 8
    own = model.match(image, IDS, MASK)
    torch.testing.assert_close(output.itm_logits[:4], own)
    places = draws(0, 4, torch.device("cpu"))
    allowed = ~torch.tensor([[i == j or {i, j} == {0, 3} for j in range(4)] for i in range(4)])
    wrong, _ = hard_negatives(output.itc_logits_text[:, :4], allowed, places[0])
    chosen = type(image)(*(one[wrong] for one in image))
    torch.testing.assert_close(output.itm_logits[4:8], model.match(chosen, IDS, MASK))
    wrong, _ = hard_negatives(output.itc_logits_image[:, :4], allowed, places[1])
    torch.testing.assert_close(output.itm_logits[8:], model.match(image, IDS[wrong], MASK[wrong]))

    begun = IDS.clone()
    begun[:, 0] = len(WORDS)  # [DEC]
    decoder = model.decoder
    logits = decoder.logits(model.text, decoder(model.text, begun, MASK, image.tokens, image.mask))
    logs, targets = logits[:, :-1].log_softmax(-1), batch["labels"][:, 1:]
    learned = targets != -100
    right = logs.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    loss = -(0.9 * right + 0.1 * logs.mean(-1))[learned].sum()
    torch.testing.assert_close(output.loss_sum, loss)

    names = [model.get_text_features(torch.tensor([[2, word, 3]])) for word in (8, 15)]
    cosines = unit(model.get_image_features(batch["pixels"])) @ unit(torch.cat(names)).T
    torch.testing.assert_close(output.label_logits, 100 * cosines)


def test_a_linear_label_head_learns_without_texts(tokenizer: str) -> None:
    model, processor = make(section(tokenizer, heads=["labels"], label_head="linear"))
    assert not processor.reads_text
    assert {*model.parts()} == {"image.encoder", "text.encoder", "labels"}
    batch = studies()
    images = model.encode_images(batch["pixels"])
    output = model(pixels=batch["pixels"], image_counts=batch["image_counts"])
    torch.testing.assert_close(output.label_logits, model.labels(images.vector))
    assert model.training_only and not any(map(model.is_training_only, model.state_dict()))


def test_a_batch_without_studies_runs_through_every_weight(
    made: tuple[MedmBlip, MedmBlipProcessor],
) -> None:
    model = made[0].train()
    output = model(**studies(0, 0))
    assert output.itm_logits.shape == (0, 2)
    assert output.label_logits.shape == (0, 2)
    assert len(output.itc_logits_image) == 0
    total = sum(output[name].sum() for name in output if output[name].is_floating_point())
    total.backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == (not name.startswith("momentum.")), name
    model.after_step()
    assert len(model.queue.held()[0]) == 0


@pytest.mark.parametrize("fusion", ["tokens", "channels"])
def test_several_images_of_a_study(tokenizer: str, fusion: str) -> None:
    content = section(tokenizer, image={"views": 2, "fusion": fusion})
    model, _ = make(content)
    pixels = torch.randn(3, 3, 16, 16)
    both = model.encode_images(pixels, torch.tensor([2, 1]))
    alone = model.encode_images(pixels[2:])
    torch.testing.assert_close(both.vector[1:], alone.vector)
    tower: Any = model.image
    tokens = tower.norm(tower.encoder(pixels).tokens)
    if fusion == "tokens":
        torch.testing.assert_close(both.vector[0], tokens[:2, 0].mean(0))
        assert both.mask.sum(1).tolist() == [10, 5]
        torch.testing.assert_close(both.tokens[0], tokens[:2].flatten(0, 1))
    else:
        joined = tower.join(torch.cat([tokens[2], tokens[2]], dim=1))
        torch.testing.assert_close(both.tokens[1], joined)
    with pytest.raises(ValueError, match="expected 1 to 2 images a study, and 3 in all"):
        model.encode_images(pixels, torch.tensor([3]))


# -- state of training -----------------------------------------------------------------------------


def test_a_step_moves_the_copy_fills_the_queue_and_holds_the_temperature(
    made: tuple[MedmBlip, MedmBlipProcessor],
) -> None:
    model = made[0].train()
    with torch.no_grad():
        before = {name: weight.clone() for name, weight in model.momentum.named_parameters()}
        for weight in model.image_projection.parameters():
            weight += 1.0
        model.temperature.value.fill_(0.9)
    model(**studies())
    model.eval()(**studies())  # an evaluation leaves no trace
    with torch.no_grad():
        assert model.train().after_step() == (model.temperature.value,)
    assert model.temperature.value.item() == 0.5
    after = dict(model.momentum.named_parameters())
    moved = before["image_projection.weight"] + 0.1
    torch.testing.assert_close(after["image_projection.weight"], moved)
    torch.testing.assert_close(after["text_projection.weight"], before["text_projection.weight"])
    assert model.queue.held()[2].tolist() == [11, 12, 13, 14]
    model(**studies())
    with torch.no_grad():
        assert model.after_step() == ()
    assert sorted(model.queue.held()[2].tolist()) == [11, 12, 13, 13, 14, 14]
    assert int(model.batches) == int(model.steps) == 2


def test_lora_beside_a_momentum_copy_is_refused(tokenizer: str) -> None:
    model = make(section(tokenizer))[0]
    with pytest.raises(RecipeError, match=r"parts\.text\.encoder: LoRA beside a momentum copy"):
        model.add_adapter_to_part("text.encoder", {"r": 2})
    assert MedmBlip.zero3_refusal is not None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"heads": ["itm"]}, "list itc too"),
        ({"heads": ["itc", "itc"]}, "each head once"),
        ({"labels": []}, "give both or neither"),
        ({"heads": ["lm"]}, "give both or neither"),
        ({"labels": ["a", "a"]}, "expected different names"),
    ],
)
def test_heads_that_do_not_fit_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        validate(BlipOptions, section("t", **changes), source="test")


def test_the_parts_that_options_name_are_those_of_the_model(tokenizer: str) -> None:
    for changes in ({}, {"heads": ["lm"], "labels": []}, {"heads": ["labels"]}):
        content = section(tokenizer, **changes)
        options = validate(BlipOptions, content, source="test")
        assert options.part_names() == set(make(content)[0].parts()) - {"momentum"}


# -- knowledge -------------------------------------------------------------------------------------


def outputs(model: MedmBlip, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(model.eval()(**batch))


def with_weights_of(model: MedmBlip, other: MedmBlip) -> None:
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert not unexpected
    assert all("knowledge" in name or "graph" in name for name in missing)


def test_knowledge_that_adds_nothing_is_a_plain_model(tokenizer: str, tmp_path: Path) -> None:
    plain = make(section(tokenizer))[0]
    informed = make(
        section(tokenizer, knowledge=knowledge(tmp_path, fusion={"start": "identity"}))
    )[0]
    with_weights_of(informed, plain)
    for name, value in outputs(plain, studies()).items():
        torch.testing.assert_close(outputs(informed, studies())[name], value)


def test_a_shuffled_graph_changes_outputs(tokenizer: str, tmp_path: Path) -> None:
    straight = make(section(tokenizer, knowledge=knowledge(tmp_path)[:1]))[0]
    shuffled = make(section(tokenizer, knowledge=knowledge(tmp_path, shuffle=1)[:1]))[0]
    assert straight.config.knowledge[0]["graph"] != shuffled.config.knowledge[0]["graph"]
    nodes = {name: shuffled.state_dict()[name] for name in shuffled.state_dict() if "node_" in name}
    shuffled.load_state_dict(straight.state_dict() | nodes)
    mine, other = outputs(straight, studies()), outputs(shuffled, studies())
    assert not torch.allclose(mine["label_logits"], other["label_logits"])
    assert not torch.allclose(mine["itm_logits"], other["itm_logits"])


def test_a_memory_takes_triplets_and_never_gives_a_study_its_own(
    tokenizer: str, tmp_path: Path
) -> None:
    model = make(section(tokenizer, knowledge=knowledge(tmp_path)))[0].train()
    memory = model._memory()
    assert memory is not None
    model(**studies())
    assert int(memory.filled) == 0, "a batch is not in the memory before its step"
    with torch.no_grad():
        model.after_step()
    assert memory.owners[:3].tolist() == [11, 12, 14], "a study without triplets is not stored"
    assert memory.ids[:3, :3].tolist() == [[2, 8, 3], [2, 15, 3], [2, 12, 3]]
    texts = F.normalize(model.get_text_features(IDS, MASK), dim=-1)
    first = memory.keys[:3].clone()
    torch.testing.assert_close(first, texts[[0, 1, 3]].detach())
    pixels = studies()["pixels"]["image"][:2]
    duplicates = torch.tensor([12, 12])
    with torch.no_grad():
        own = model.encode_images(pixels, owners=duplicates)
        memory.ids[1, 1] = 5  # the text that both may not see
        changed = model.encode_images(pixels, owners=duplicates)
        torch.testing.assert_close(changed.tokens, own.tokens)
        torch.testing.assert_close(changed.label_vector, own.label_vector)
        free = model.encode_images(pixels)
    assert not torch.allclose(free.tokens, own.tokens)


def test_knowledge_that_does_not_fit_is_refused(tokenizer: str, tmp_path: Path) -> None:
    graph, memory = knowledge(tmp_path)
    for changes, reason in (
        ({"knowledge": [graph, graph]}, "expected each source once"),
        ({"knowledge": [memory], "heads": ["lm", "labels"]}, "list itc in heads"),
    ):
        with pytest.raises(RecipeError, match=reason):
            validate(BlipOptions, section("t", **changes), source="test")
    model = make(section(tokenizer, knowledge=[graph]))[0]
    same = validate(BlipOptions, section(tokenizer, knowledge=[graph]), source="test")
    model.check_same_parts(same, source="folder")
    for other in ([], [graph, memory], [graph | {"layers": 1}]):
        options = validate(BlipOptions, section(tokenizer, knowledge=other), source="test")
        with pytest.raises(RecipeError, match="knowledge"):
            model.check_same_parts(options, source="folder")


# -- texts from images -----------------------------------------------------------------------------


def test_beams_find_the_best_of_all_texts(made: tuple[MedmBlip, MedmBlipProcessor]) -> None:
    """With as many beams as texts, beam search is exhaustive; scores are taken without a memory."""
    model = made[0].eval()
    with torch.no_grad():
        model.decoder.bias[6:] = -1e4  # 6 words: few enough to try every text
        model.decoder.transform.dense.weight *= 30  # words that depend on what is before them
    pixels = studies()["pixels"]
    images = model.encode_images(pixels)
    found = model.generate(pixels, num_beams=250, max_length=4, min_length=3)

    def score(row: int, text: tuple[int, ...]) -> float:
        ids = torch.tensor([[len(WORDS), *text]])
        image, mask = images.tokens[row : row + 1], images.mask[row : row + 1]
        logits = model.decoder.logits(
            model.text, model.decoder(model.text, ids, torch.ones_like(ids), image, mask)
        )
        logs = logits[0, :-1].float().log_softmax(-1)
        return float(logs.gather(1, ids[0, 1:, None]).sum()) / len(text)

    texts = [
        text
        for length in (2, 3)
        for text in itertools.product(range(6), repeat=length)
        if 3 not in text[:-1] and (length == 3 or text[-1] == 3)
    ]
    with torch.no_grad():
        for row in range(4):
            best = max(texts, key=lambda text: score(row, text))
            assert found[row, 1:].tolist()[: len(best)] == list(best)


def test_greedy_search_ends_and_pads() -> None:
    """The text counts up to the end token 4; the second row begins nearer to it."""

    def step(texts: torch.Tensor, origin: torch.Tensor | None) -> torch.Tensor:
        return 20.0 * F.one_hot((texts[:, -1] + 1).clamp(max=4), 5)

    settings: dict[str, Any] = {"beams": 1, "min_length": 1, "end_id": 4, "pad_id": 0}
    prompt = torch.tensor([[1], [2]])
    found = beam_search(step, prompt, max_length=9, **settings)
    assert found.tolist() == [[1, 2, 3, 4], [2, 3, 4, 0]]
    assert beam_search(step, prompt, max_length=3, **settings).tolist() == [[1, 2, 3], [2, 3, 4]]
    with pytest.raises(ValueError, match="the prompt has 1 tokens already"):
        beam_search(step, prompt, max_length=1, **settings)


def test_the_processor_gives_prompts_and_learned_texts(tokenizer: str) -> None:
    _, processor = make(section(tokenizer, text={"prompt": "a chest"}))
    encoded = processor.encode_target("radiograph normal")
    assert encoded.input_ids == [2, 4, 5, 6, 7, 3]
    assert encoded.labels == [-100, -100, -100, 6, 7, 3]
    asked = processor.encode_target("normal", "mass of the")
    assert asked.labels[:4] == [-100] * 4
    assert processor.encode_prompt().tolist() == [[2, 4, 5]]
    assert processor.encode_text(["normal", "left mass"])["input_ids"].tolist() == [
        [2, 7, 3, 0],
        [2, 13, 15, 3],
    ]
    spelled = processor.encode_target("[SEP] [DEC]").input_ids
    assert spelled.count(3) == 1
    assert len(WORDS) not in spelled
    assert len(processor.encode_target("mass " * 30).input_ids) == 12
