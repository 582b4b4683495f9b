"""Forward pass of an LVLM: encode, connect, scatter, decode.

The processor wrote one placeholder token for each vision token; the model puts the vision tokens
there and checks the counts. Labels, masks and positions are never rebuilt. Knows nothing of files,
prompts or DeepSpeed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, StoppingCriteriaList
from transformers.generation.utils import GenerateOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from medm.config import flatten
from medm.connectors import CONNECTORS
from medm.connectors.base import Connector
from medm.distributed import world_size
from medm.encoders import ENCODERS
from medm.encoders.base import VisionEncoder
from medm.errors import RecipeError
from medm.knowledge.base import Embed
from medm.llms.attention import enable_padding_free, no_mask
from medm.llms.end_sequence import EndSequence
from medm.llms.lm_head import has_known_logits, stop_tokens
from medm.models.base import MedmModel
from medm.models.knowledge import KnowledgeBranch
from medm.models.knowledge_files import knowledge_differences
from medm.models.lvlm.configuration import BranchEntry, LVLMConfig
from medm.models.lvlm.grounding import MaskBranch, MaskInputs
from medm.models.lvlm.options import MASK_OUTPUTS, MASK_PARTS, LVLMOptions, MaskOptions
from medm.models.lvlm.processing import LVLMProcessor, padded_size
from medm.models.lvlm.scatter import check, scatter
from medm.models.lvlm.token_loss import loss_of_hidden_states, loss_of_logits
from medm.models.options import ModelOptions
from medm.models.token_rows import start_rows
from medm.types import MASK_VIEW, Processor, VisionFeatures

if TYPE_CHECKING:
    from medm.llms.lm_head import CausalLM

logger = logging.getLogger(__name__)

BranchTensors: TypeAlias = Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]
"""Tensors by branch, of all prompts or of each."""


@dataclass
class LVLMOutput(CausalLMOutputWithPast):
    """`logits` (B, T, V) without labels; `loss` and `loss_sum` with labels.

    With labels the head runs on the labeled positions alone and no full logits exist, unless the
    config asks for them. Its other fields are those of the installed transformers: a release may
    rename them (5.24 renamed `past_key_values` to `cache`), so none is named here.
    """

    loss_sum: Tensor | None = None
    """With labels: sum of the cross-entropy over the labeled tokens, of which `loss` is the
    mean."""
    losses: dict[str, Tensor] | None = None
    """Auxiliary losses by name (load balance of a router), unweighted."""
    mask_logits: Tensor | None = None
    """With labels, of a model with a mask head: (M, *grid), see `medm.heads.base.MaskLogits`."""
    mask_quality: Tensor | None = None
    """(M,), predicted IoU of each mask."""
    mask_presence: Tensor | None = None
    """(M,), logit of the target being in the image."""

    @classmethod
    def wrap(cls, output: Mapping[str, Any], **own: Any) -> LVLMOutput:
        """Return an output with the fields of `own` and those of the language model's output.

        Fields that this class lacks are left out.
        """
        names = {field.name for field in fields(cls)}
        passed = {name: value for name, value in output.items() if name in names}
        return cls(**(passed | own))


class Branch(nn.Module):
    """One way for vision to come in: an encoder and the connector that leads to the LLM.

    It is a `medm.types.VisionBranch`.

    Args:
        config: the branch's entry in the config of a checkpoint.
        out_dim: width of the language model.
    """

    def __init__(self, config: BranchEntry, *, out_dim: int) -> None:
        super().__init__()
        self.encoder_bypassed = False
        """Set by a run that hands over cached features on every rank: then no rank may touch the
        encoder."""
        self.encoder: VisionEncoder = ENCODERS.constructor(config.encoder)()
        self.spatial, self.channels = tuple(config.spatial), config.channels
        self.placeholder_id = config.placeholder_id
        self.connector: Connector = CONNECTORS.constructor(
            config.connector,
            in_dim=self.encoder.dim,
            out_dim=out_dim,
            grid=self.encoder.grid(self.spatial),
            prefix=self.encoder.prefix,
        )()
        self.knowledge: KnowledgeBranch | None = None
        if config.knowledge is not None:
            self.knowledge = KnowledgeBranch(config.knowledge, dim=out_dim, word_dim=out_dim)

    @property
    def num_tokens(self) -> int:
        """Tokens of one item in the language model's sequence."""
        return self.connector.num_tokens

    def encode(self, pixels: Tensor) -> VisionFeatures:
        """Return the vision features of (N, C, *spatial).

        Without gradient book-keeping if the encoder is frozen.
        """
        frozen = not any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            return self.encoder(pixels)

    def from_cached(self, features: VisionFeatures | Tensor) -> VisionFeatures:
        """Return features that were encoded before.

        Tokens alone (N, prefix + prod(grid), D) are of the branch's input size.
        """
        if isinstance(features, VisionFeatures):
            return features
        tokens = features.to(**self.encoder.device_and_dtype)
        return VisionFeatures(tokens, self.encoder.grid(self.spatial), self.encoder.prefix)

    def connect(self, seen: VisionFeatures, task_ids: Tensor | None, words: Embed) -> Tensor:
        """Return the tokens for the language model, (N, num_tokens, out_dim).

        Args:
            seen: features of N items.
            task_ids: (N,).
            words: embeds the word pieces of knowledge.
        """
        tokens: Tensor = self.connector(seen, task_ids)
        return tokens if self.knowledge is None else self.knowledge(tokens, words)

    def dummy_forward(self, words: Embed) -> Tensor:
        """Return zero that depends on every weight that a batch with an item would have used.

        The same modules run in the same order as with an item: ZeRO-3 compares what the ranks call.
        `words` as in `connect`.
        """
        reference = self.encoder.device_and_dtype
        no_task = torch.full((1,), -1, device=reference["device"])
        if self.encoder_bypassed:
            seen = self.from_cached(
                torch.zeros(
                    1,
                    self.encoder.prefix + prod(self.connector.grid),
                    self.encoder.dim,
                    **reference,
                )
            )
        else:
            seen = self.encode(torch.zeros(1, self.channels, *self.spatial, **reference))
        return 0.0 * self.connect(seen, no_task, words).sum()


class LVLMForConditionalGeneration(MedmModel, GenerationMixin):
    """Vision branches in front of a causal language model.

    `forward` and `generate` take what the collator makes (see `medm.types.Batch`).
    """

    config_class = LVLMConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    accepts_loss_kwargs = (
        True  # tells transformers' Trainer that the loss is normalized by num_items_in_batch
    )
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LVLMConfig) -> None:
        super().__init__(config)
        self.language_model: CausalLM = AutoModelForCausalLM.from_config(config.get_text_config())
        self.branches = nn.ModuleDict(
            {name: Branch(config.branch(name), out_dim=self.width) for name in config.branches}
        )
        self.masks: MaskBranch | None = None
        if (entry := config.mask_entry()) is not None:
            self.masks = MaskBranch(entry, in_dim=self.width)
        self.inject_adapters()
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.language_model.get_output_embeddings()

    @property
    def width(self) -> int:
        """Width of the language model's embeddings."""
        return self.get_input_embeddings().embedding_dim

    def branch(self, name: str) -> Branch:
        """A branch by name."""
        return cast(Branch, self.branches[name])

    def parts(self) -> dict[str, nn.Module]:
        """Units that a recipe freezes, trains or adapts.

        Their names are `llm`, `image.encoder`, `image.connector` ... `masks.decoder`.
        """
        parts: dict[str, nn.Module] = {"llm": self.language_model}
        for name in self.branches:
            parts[f"{name}.encoder"] = self.branch(name).encoder
            parts[f"{name}.connector"] = self.branch(name).connector
            if (knowledge := self.branch(name).knowledge) is not None:
                parts[f"{name}.knowledge"] = knowledge
        if self.masks is not None:
            modules = (self.masks.head.encoder, self.masks.head.decoder, self.masks.projection)
            parts |= dict(zip(MASK_PARTS, modules, strict=True))
        return parts

    def new_token_ids(self, part: str) -> list[int]:
        return list(self.config.control_tokens.values()) if part == "llm" else []

    def add_control_tokens(self, processor: LVLMProcessor) -> None:
        """Give every control token of a processor its rows, and note the tokens in the config.

        Rows of tokens that the tokenizer did not have before start as the mean of the others.
        """
        if processor.untrained_ids:
            for part in list(self.config.new_rows):  # resizing makes new layers
                self.merge_new_rows(part)
            if len(processor.tokenizer) > self.get_input_embeddings().num_embeddings:
                size = padded_size(len(processor.tokenizer))
                self.language_model.resize_token_embeddings(size, mean_resizing=False)
                self.config.get_text_config().vocab_size = size
            start_rows(self.language_model, processor.untrained_ids)
        self.config.control_tokens = dict(processor.control_token_ids)

    def encoders(self) -> dict[str, Branch]:
        return {name: self.branch(name) for name in self.branches}

    def check_same_parts(self, options: ModelOptions, *, source: str) -> None:
        if not isinstance(options, LVLMOptions):
            raise RecipeError(
                f"init_from {source}: holds a model of kind 'lvlm', not {options.kind!r}. "
                "Change the recipe or init_from"
            )
        differences = (
            []
            if options.llm.name == self.config.llm
            else [f"llm {self.config.llm!r}, not {options.llm.name!r}"]
        )
        if set(options.branches) != set(self.branches):
            differences.append(f"branches {sorted(self.branches)}, not {sorted(options.branches)}")
        for name in set(options.branches) & set(self.branches):
            held = flatten(self.config.branches[name])
            differences += [
                f"{name}.{key} {held[key]!r}, not {value!r}"
                for key, value in flatten(
                    options.branches[name].model_dump(include={"encoder", "connector"})
                ).items()
                if key in held
                and held[key] != value
                and "architecture" not in key.split(".")  # sizes are resolved
            ]
            if (known := self.config.branches[name].get("knowledge")) is not None:
                differences += [
                    f"{name}.{difference}"
                    for difference in knowledge_differences(known, options.branches[name].knowledge)
                ]
        if self.masks is not None:
            differences += self._mask_differences(options.masks)
        if differences:
            raise RecipeError(
                f"init_from {source}: holds "
                + "; ".join(differences)
                + ". Change the recipe or init_from"
            )

    def _mask_differences(self, options: MaskOptions | None) -> list[str]:
        """List what a recipe says otherwise about the mask head; a model without one takes any."""
        if options is None:
            return ["a mask head, and the recipe none (model.masks)"]
        none = {"head.encoder.name": None}  # heads with and without a vision encoder differ
        held = none | flatten(self.config.masks)
        given = none | {
            "view": f"{options.view}@{MASK_VIEW}",
            **flatten(options.model_dump(include={"head", "projection", "state"})),
        }
        return [
            f"masks.{key} {held[key]!r}, not {value!r}"
            for key, value in given.items()
            if key in held and held[key] != value and "architecture" not in key.split(".")
        ]

    def adapt(self, options: LVLMOptions, processor: LVLMProcessor) -> None:
        """Apply a recipe over a saved model: control tokens, stop token of the template, attention.

        Args:
            options: the recipe's section.
            processor: the adapted one.
        """
        generation = self.generation_config
        generation.eos_token_id = sorted({*processor.chat.stop_ids, *stop_tokens(generation)})
        self.config.end_sequence = list(processor.chat.end_sequence)
        self.add_control_tokens(processor)
        self.use_attention(options.llm.attention)
        self.probe_lm_head()

    def use_attention(self, attention: str) -> None:
        """Switch the language model to an attention implementation, at every level that names one.

        Raises:
            RecipeError: the language model cannot be switched to it.
        """
        try:
            self.language_model.set_attn_implementation(attention)
        except (ImportError, ValueError) as error:
            raise RecipeError(
                f"model.llm.attention: {attention!r} cannot be used ({error})"
            ) from None
        found = self.language_model.config._attn_implementation
        if found != attention:
            kind = self.config.get_text_config().model_type
            raise RecipeError(
                f"model.llm.attention: language models of type {kind!r} stay with {found!r}; "
                f"set model.llm.attention={found}"
            )
        self.config._attn_implementation = attention

    def upgrade(self, processor: Processor) -> None:
        if not isinstance(processor, LVLMProcessor):
            return
        for name in self.branches:
            if self.branch(name).connector.refuses_unseen_tasks:
                processor.branches[name].setdefault("known_tasks_only", True)

    def enable_padding_free(self) -> bool:
        return enable_padding_free(self.language_model)

    def embed(
        self,
        input_ids: Tensor,
        pixels: Mapping[str, Tensor] | None = None,
        task_ids: Mapping[str, Tensor] | None = None,
        features: Mapping[str, VisionFeatures | Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return token embeddings (B, T, D) with the vision tokens in their places.

        Returns the connectors' auxiliary losses, too.

        Args:
            input_ids: (B, T), with one placeholder for each vision token.
            pixels: per branch (N, C, *spatial), the items of all samples in order.
            task_ids: per branch (N,).
            features: per branch what the encoder gave before, in place of `pixels`.

        Raises:
            ValueError: placeholders and vision tokens differ in number.
        """
        pixels, task_ids, features = pixels or {}, task_ids or {}, features or {}
        embeds = self.get_input_embeddings()(input_ids)  # (B, T, D)
        losses: dict[str, Tensor] = {}
        for name in self.branches:
            branch = self.branch(name)
            if name in pixels or name in features:
                seen = (
                    branch.from_cached(features[name])
                    if name in features
                    else branch.encode(pixels[name])
                )
                tokens = branch.connect(seen, task_ids.get(name), self._words)  # (N, M, D)
                losses |= {
                    f"{name}.{key}": value
                    for key, value in branch.connector.auxiliary_losses().items()
                }
                embeds = scatter(
                    embeds, input_ids, tokens, placeholder_id=branch.placeholder_id, branch=name
                )
            else:
                _check_no_placeholder(input_ids, branch.placeholder_id, branch=name)
                if self._sync_all_branches():
                    embeds = embeds + branch.dummy_forward(self._words).to(embeds.dtype)
        return embeds, losses

    def _words(self, ids: Tensor, _mask: Tensor) -> Tensor:
        """Return the word embeddings (R, T, D) of ids (R, T)."""
        return self.get_input_embeddings()(ids)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixels: Mapping[str, Tensor] | None = None,
        task_ids: Mapping[str, Tensor] | None = None,
        features: Mapping[str, VisionFeatures | Tensor] | None = None,
        labels: Tensor | None = None,
        label_positions: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mask_tokens: Tensor | None = None,
        mask_items: Tensor | None = None,
        mask_targets: Tensor | None = None,
        outputs: Collection[str] | None = None,
        **kwargs: Any,
    ) -> LVLMOutput:
        """Run the model on a batch.

        1. Embed the text.
        2. Encode and connect each branch's pixels, and scatter the result onto its placeholders.
        3. Decode with the language model.
        4. With labels: the loss over labeled positions, and masks; without: logits.

        Args are those of `medm.types.Batch`, of `embed`, and transformers' own; besides them:
            labels: (B, T), -100 where nothing is learned. Not shifted: position t is predicted from
            t - 1. label_positions: (L,), from which of the B * T positions a label is predicted;
            looked up without it. num_items_in_batch: labeled tokens over all micro-batches and
            ranks of the step, which transformers'
                own Trainer gives; `loss` is the sum over this batch divided by it. Without it
                `loss` is the mean over this batch.
            mask_tokens, mask_items: (M,), the `[SEG]` and the image of each mask. mask_targets:
            read by objectives alone. outputs: fields that are read of the output; masks are left
            out where none of them is. None for all.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds, found both or none")
        losses: dict[str, Tensor] = {}
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds, losses = self.embed(input_ids, pixels, task_ids, features)
        if attention_mask is None and "cu_seq_lens_q" in kwargs:
            attention_mask = no_mask(self.language_model, inputs_embeds)
        decoding = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **kwargs,
        }
        if labels is None:
            output = self.language_model(**decoding, logits_to_keep=logits_to_keep)
            return LVLMOutput.wrap(output)
        masks = self.masks
        if masks is None or input_ids is None or not (outputs is None or MASK_OUTPUTS & {*outputs}):
            masks = None
        if self.config.loss_on_full_logits:
            states = {} if masks is None else {"output_hidden_states": True}
            output = self.language_model(**decoding, **states, use_cache=False)
            loss = loss_of_logits(output.logits, labels, label_positions)
            hidden = None if masks is None else output.hidden_states[-1]
        else:
            output = self.language_model.base_model(**decoding, use_cache=False)
            hidden = output.last_hidden_state
            loss = loss_of_hidden_states(
                hidden,
                labels,
                label_positions,
                language_model=self.language_model,
            )
        mean = loss.mean(num_items_in_batch)
        found: dict[str, Tensor] = {}
        if masks is not None and input_ids is not None and hidden is not None:
            found = self._masks_of(masks, hidden, input_ids, pixels, mask_tokens, mask_items)
        return LVLMOutput.wrap(
            output, loss=mean, loss_sum=loss.sum, logits=None, losses=losses or None, **found
        )

    def _masks_of(
        self,
        masks: MaskBranch,
        hidden: Tensor,
        input_ids: Tensor,
        pixels: Mapping[str, Tensor] | None,
        tokens: Tensor | None,
        items: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return the mask fields of the output."""
        if tokens is None or items is None:
            connected = self._sync_all_branches()
            made = masks(hidden, input_ids, None) if connected else masks.nothing(hidden)
        else:
            if masks.view not in (pixels or {}):
                raise ValueError(f"masks in the batch, and no pixels of the view {masks.view!r}")
            assert pixels is not None
            made = masks(hidden, input_ids, MaskInputs(pixels[masks.view], tokens, items))
        return {f"mask_{name}": value for name, value in made._asdict().items()}

    def mask_prompts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixels: Mapping[str, Tensor] | None = None,
        task_ids: Mapping[str, Tensor] | None = None,
        features: Mapping[str, VisionFeatures | Tensor] | None = None,
    ) -> Tensor:
        """Return the prompt of every `[SEG]` of some texts with their replies, (S, D).

        One teacher-forced pass, so that a reply that was generated in any way, and a token at its
        very end, have their state.

        Args:
            input_ids: (B, T), with one placeholder for each vision token.
            attention_mask: (B, T), where rows are padded on either side.
            pixels: as in `embed`.
            task_ids: as in `embed`.
            features: as in `embed`.

        Returns:
            In the order of rows and positions.

        Raises:
            ValueError: the model has no mask head.
        """
        if self.masks is None:
            raise ValueError("the model has no mask head")
        embeds, _ = self.embed(input_ids, pixels, task_ids, features)
        positions = None
        if attention_mask is not None:  # rows may be padded on the left
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        hidden = self.language_model.base_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        count = int((input_ids == self.masks.token_id).sum())
        return self.masks.prompts(hidden, input_ids, torch.arange(count, device=hidden.device))

    def generate(
        self,
        input_ids: Tensor,
        pixels: BranchTensors | None = None,
        task_ids: BranchTensors | None = None,
        features: Mapping[str, VisionFeatures | Tensor] | None = None,
        **kwargs: Any,
    ) -> GenerateOutput | Tensor:
        """Return answers in the form of transformers' `generate`.

        Token ids are (B * sequences, prompt + answer).

        Vision runs once; the language model's own generation does the rest. Batches are padded on
        the left. A list of mappings (one for each prompt, as transformers' pipelines collate them)
        stands for one mapping.
        """
        pixels, task_ids = _joined(pixels), _joined(task_ids)
        with torch.no_grad():
            embeds, _ = self.embed(input_ids, pixels, task_ids, features)
        if self.config.end_sequence:
            own = kwargs.get("stopping_criteria") or []
            end = EndSequence(self.config.end_sequence)
            kwargs["stopping_criteria"] = StoppingCriteriaList([*own, end])
        if "generation_config" not in kwargs:
            # One config with the call's arguments merged into it: transformers deprecates handing
            # over both.
            config = copy.deepcopy(self.generation_config)
            kwargs = {**config.update(**kwargs), "generation_config": config}
        return self.language_model.generate(input_ids=input_ids, inputs_embeds=embeds, **kwargs)

    def probe_lm_head(self) -> None:
        """Train on the language model's own logits where medm does not know how it scales them."""
        self.config.loss_on_full_logits = not has_known_logits(self.language_model)
        if self.config.loss_on_full_logits:
            logger.warning(
                "language models of type %r change their logits in a way of their own; training "
                "computes them at every position, which takes more memory",
                self.config.get_text_config().model_type,
            )

    def _sync_all_branches(self) -> bool:
        """Return whether branches without input run a dummy forward.

        In training, and in evaluation on several ranks, every rank must touch the same weights in
        the same order; otherwise ZeRO-3 waits forever.
        """
        return self.training or world_size() > 1


def _check_no_placeholder(input_ids: Tensor, placeholder_id: int, *, branch: str) -> None:
    count = (input_ids == placeholder_id).sum()
    check(
        count == 0,
        lambda: f"branch '{branch}': {int(count)} placeholder tokens in the text, and no pixels",
    )


def _joined(items: BranchTensors | None) -> Mapping[str, Tensor] | None:
    """Mappings of tensors, one for each prompt, as one mapping of the items of all of them."""
    if items is None or isinstance(items, Mapping):
        return items
    names = dict.fromkeys(name for item in items for name in item)
    return {name: torch.cat([item[name] for item in items if name in item]) for name in names}
