"""Generation: batches of prompts, single decode steps, and many questions about one image."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Cell, Figure, GateError, Ratio, seconds
from benchmarks.limits import measure_limits
from benchmarks.workloads import IMAGE, PAD, WORKLOADS, make_examples, medm_model, stock_model
from medm.data.collator import Collator
from medm.inference.decoding import Decoder, Prompt
from medm.types import Example

BATCH = 16


class _AnsweringCell(Cell):
    workloads: ClassVar[dict[str, str]] = {"cpu": "tiny", "h200": "0.5B"}
    count: ClassVar[dict[str, int]] = {"cpu": 32, "h200": 256}
    mean_reply: ClassVar[int] = 40
    peer_batch: ClassVar[int] = 1
    peer_share: ClassVar[dict[str, int]] = {"cpu": 1, "h200": 16}
    """The peer answers one of this many prompts."""
    slots: ClassVar[dict[str, int]] = {"cpu": 32, "h200": 128}
    """Prompts that medm decodes together."""
    compiled: ClassVar[dict[str, bool]] = {"cpu": False, "h200": True}
    """True if medm's decode steps are compiled (`generation.compile`)."""

    @property
    def cuda(self) -> bool:
        """True if this profile runs on a GPU."""
        return self.profile == "h200"

    @property
    def device(self) -> str:
        """Device of both models."""
        return "cuda" if self.cuda else "cpu"

    @cached_property
    def sizes(self) -> Any:
        """The workload."""
        return WORKLOADS[self.workloads[self.profile]]

    @cached_property
    def models(self) -> tuple[Any, Any]:
        """Medm's model and the stock one, with the same weights, far enough apart that greedy
        choices are clear.
        """
        ours = medm_model(
            self.sizes, device=self.device, dtype=torch.bfloat16 if self.cuda else torch.float32
        ).eval()
        with torch.no_grad():
            for parameter in ours.language_model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(4)
        return ours, stock_model(ours, self.sizes).eval()

    @cached_property
    def questions(self) -> list[Example]:
        """Prompts, with the reply lengths in `replies`."""
        return make_examples(self.sizes, self.count[self.profile], seed=1, generation=True)

    @cached_property
    def replies(self) -> list[int]:
        """Tokens of each reply, log-normal like the prompts; no end token, so that every run
        generates as many tokens.
        """
        drawn = np.random.default_rng(2).lognormal(
            np.log(self.mean_reply) - 0.245, 0.7, len(self.questions)
        )
        return [int(length) for length in drawn.clip(2, 4 * self.mean_reply)]

    @property
    def setting(self) -> dict[str, Any]:
        return {
            "workload": self.workloads[self.profile],
            "prompts": len(self.questions),
            "peer's batch": self.peer_batch,
            "ours at once": self.slots[self.profile],
            "compiled": self.compiled[self.profile],
            "mean reply": self.mean_reply,
            "dtype": "bfloat16" if self.cuda else "float32",
        }

    def prompts(self, examples: list[Example], replies: list[int]) -> list[Prompt]:
        """Embedded prompts, each image encoded once."""
        encoded = self.encoded(examples)
        made = []
        for example, length in zip(examples, replies, strict=True):
            ids = torch.tensor(example.input_ids, device=self.device)
            signature = np.array(example.input_ids, np.int64)
            embeds = self.models[0].get_input_embeddings()(ids)
            places = (signature == IMAGE).nonzero()[0]
            for array, run in zip(
                example.pixels.get("image", []),
                np.split(places, max(1, len(places) // self.sizes.image_tokens)),
                strict=False,
            ):
                embeds[run[0] : run[-1] + 1] = encoded[id(array)].to(embeds.dtype)
                signature[run] = -(1 + id(array) + np.arange(len(run)))
            made.append(Prompt(embeds, signature, length))
        return made

    def encoded(self, examples: list[Example]) -> dict[int, Tensor]:
        """Vision tokens (N, D) of every different image."""
        arrays = {
            id(array): array for example in examples for array in example.pixels.get("image", [])
        }
        branch, found = self.models[0].branch("image"), dict[int, Tensor]()
        for start in range(0, len(arrays), BATCH):
            part = dict(list(arrays.items())[start : start + BATCH])
            pixels = torch.from_numpy(np.stack(list(part.values()))).to(self.device)
            found |= dict(zip(part, branch.connector(branch.encode(pixels)), strict=True))
        return found

    @cached_property
    def decoder(self) -> Decoder:
        """Medm's generator. It lives as long as its model, and so do its prepacked weights and
        compiled steps.
        """
        language_model, slots = self.models[0].language_model, self.slots[self.profile]
        return Decoder(
            language_model,
            stops=[],
            suppress=[IMAGE],
            slots=slots,
            compiled=self.compiled[self.profile],
        )

    @torch.inference_mode()
    def decode_ours(self, examples: list[Example], replies: list[int]) -> list[list[int]]:
        """Run medm's implementation."""
        return self.decoder.decode(self.prompts(examples, replies))

    def decode_stock(
        self, examples: list[Example], replies: list[int], *, batch: int
    ) -> list[list[int]]:
        """Transformers' `generate` on left-padded batches in the given order."""
        said = []
        for start in range(0, len(examples), batch):
            part, lengths = examples[start : start + batch], replies[start : start + batch]
            inputs = Collator(PAD, padding_side="left")(part)
            images = inputs.get("pixels", {}).get("image")
            pixels = {} if images is None else {"pixel_values": images.to(self.device)}
            output = self.models[1].generate(
                input_ids=inputs["input_ids"].to(self.device),
                attention_mask=inputs["attention_mask"].to(self.device),
                **pixels,
                max_new_tokens=max(lengths),
                do_sample=False,
                eos_token_id=None,
                pad_token_id=PAD,
                suppress_tokens=[IMAGE],
            )
            new = output[:, inputs["input_ids"].shape[1] :].tolist()
            said += [row[:length] for row, length in zip(new, lengths, strict=True)]
        return said

    def compared(self) -> str:
        """Greedy tokens are equal, one prompt at a time there; on a GPU in float32, since in
        bfloat16 the order of sums decides between words that are nearly as likely.
        """
        part, lengths, measured = self.questions[:8], self.replies[:8], self.models
        if self.cuda:
            self.models = tuple(copy.deepcopy(model).float() for model in measured)
        ours, theirs = self.decode_ours(part, lengths), self.decode_stock(part, lengths, batch=1)
        if self.cuda:
            self.models = measured
            del self.decoder  # of the exact copy
        wrong = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        if wrong:
            raise GateError(
                f"{len(wrong)} of {len(ours)} replies differ, the first: number {wrong[0]}"
            )
        return f"{sum(map(len, ours))} greedy tokens are equal" + (
            " in float32" if self.cuda else ""
        )

    @property
    def asked(self) -> tuple[list[Example], list[int]]:
        """Prompts that the peer answers: on a GPU only some, short and long, because it is slow."""
        share = self.peer_share[self.profile]
        order = sorted(range(len(self.questions)), key=lambda number: self.replies[number])[
            share // 2 :: share
        ]
        return [self.questions[number] for number in sorted(order)], [
            self.replies[number] for number in sorted(order)
        ]


class OneByOne(_AnsweringCell, Ratio):
    """P7, against one prompt at a time."""

    name, title, peer = "P7a", "batch inference samples/s", "HF generate, one by one"
    targets: ClassVar = {"cpu": 6.0, "h200": 25.0}

    def gate(self) -> str:
        return self.compared()

    def run_peer(self) -> float:
        return len(self.decode_stock(*self.asked, batch=self.peer_batch))

    def run_ours(self) -> float:
        return len(self.decode_ours(self.questions, self.replies))


class PaddedBatches(OneByOne):
    """P7, against padded batches."""

    name, peer = "P7b", "HF generate, padded batches of 16"
    peer_batch: ClassVar[int] = BATCH
    peer_share: ClassVar[dict[str, int]] = {"cpu": 1, "h200": 4}
    slots: ClassVar[dict[str, int]] = {"cpu": BATCH, "h200": BATCH}
    targets: ClassVar = {"cpu": 1.5, "h200": 1.8}


class Decoding(_AnsweringCell, Figure):
    """P8: bytes of weights and KV cache that a token needs, over the bytes that could be read in
    the same time.
    """

    name, title, peer = "P8", "decode against memory bandwidth", "limit"
    targets: ClassVar = {"cpu": 0.5, "h200": 0.6}
    length: ClassVar[int] = 64
    slots: ClassVar[dict[str, int]] = {"cpu": 1, "h200": 1}
    compiled: ClassVar[dict[str, bool]] = {"cpu": True, "h200": True}

    def values(self, rounds: int) -> list[float]:
        bandwidth = measure_limits(device=self.device, dtype=torch.float32).bandwidth
        model, text = self.models[0].language_model, self.sizes.text
        weights = sum(parameter.nbytes for parameter in model.parameters())
        example = next(e for e in self.questions if "image" in e.pixels)
        size = next(model.parameters()).element_size()
        head_dim = text["hidden_size"] // text["num_attention_heads"]
        per_token = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * head_dim * size
        shares = []
        for _ in range(rounds + 1):
            first = seconds(lambda: self.decode_ours([example], [1]))
            all_of_them = seconds(lambda: self.decode_ours([example], [1 + self.length]))
            cached = per_token * (len(example.input_ids) + self.length / 2)
            shares.append(self.length * (weights + cached) / (all_of_them - first) / bandwidth)
        return shares[1:]


class ManyQuestions(_AnsweringCell, Ratio):
    """P9: eight questions on each image."""

    name, title, peer = "P9", "answers/s, 8 questions an image", "HF generate, one by one"
    targets: ClassVar = {"cpu": 4.0, "h200": 5.0}
    mean_reply: ClassVar[int] = 8
    images: ClassVar[dict[str, int]] = {"cpu": 3, "h200": 24}

    @cached_property
    def questions(self) -> list[Example]:
        rng = np.random.default_rng(3)
        size, vocabulary = self.sizes.image_size, self.sizes.text["vocab_size"]
        made = []
        for _ in range(self.images[self.profile]):
            array = rng.normal(size=(3, size, size)).astype(np.float32)
            beginning = rng.integers(2, vocabulary, 40).tolist() + [IMAGE] * self.sizes.image_tokens
            for _ in range(8):
                ids = beginning + rng.integers(2, vocabulary, rng.integers(8, 24)).tolist()
                made.append(Example(ids, [-100] * len(ids), {"image": [array]}))
        return made

    def gate(self) -> str:
        return self.compared()

    def run_peer(self) -> float:
        return len(self.decode_stock(*self.asked, batch=self.peer_batch))

    def run_ours(self) -> float:
        return len(self.decode_ours(self.questions, self.replies))
