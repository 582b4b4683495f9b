"""LVLMs from a recipe's `model` section: resolve every size, build, load published weights."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from medm.connectors import ConnectorOptions
from medm.errors import CheckpointError, RecipeError, unavailable
from medm.imaging import Preprocess
from medm.knowledge import KNOWLEDGE, KnowledgeOptions
from medm.llms import LLMS, LLMOptions
from medm.llms.attention import check_usable
from medm.llms.base import read_template
from medm.llms.lm_head import stop_tokens
from medm.models.base import CardText, ModelKind
from medm.models.knowledge import KnowledgeBranch
from medm.models.knowledge_files import described_knowledge
from medm.models.lvlm.answering import ConversationAnswerer, encode_item
from medm.models.lvlm.configuration import BranchEntry, LVLMConfig, MaskEntry
from medm.models.lvlm.grounding import MaskBranch
from medm.models.lvlm.modeling import Branch, LVLMForConditionalGeneration
from medm.models.lvlm.options import BranchOptions, LVLMOptions, MaskOptions
from medm.models.lvlm.processing import LVLMProcessor, MaskSpec, padded_size, wrap_fields
from medm.models.mask_heads import (
    check_pixels,
    construct_head,
    described_head,
    head_preprocess,
    load_head,
)
from medm.models.published.weights import PretrainedSource, load_module
from medm.models.vision import (
    check_channels,
    described_encoder,
    fields_of,
    load_encoder,
    num_channels,
    preprocess_of,
    spatial_of,
)
from medm.types import (
    MASK_TOKEN,
    MASK_VIEW,
    PLACEHOLDERS,
    Answerer,
    AnswerItem,
    Config,
    PredictionField,
)

if TYPE_CHECKING:
    from medm.llms.lm_head import CausalLM

logger = logging.getLogger(__name__)

_NOT_FOR_THE_CONNECTOR = {"name", "path"}


_SUMMARY = (
    "A medical vision-language model trained with medm. It can be wrong, can invent findings, and "
    "carries the biases of its\ndata. It was not validated on any clinical task."
)
_EXAMPLE = """import medm

model = medm.load("path/to/this/folder")
print(model.ask("What is seen?"{shown}, max_new_tokens=64))
"""
_SHOWN = {"image": ', image="image.png"', "volume": ', volume="volume.nii.gz"'}


class LVLM(ModelKind[LVLMOptions, LVLMForConditionalGeneration, LVLMProcessor]):
    """The kind `lvlm`."""

    config_class = LVLMConfig
    model_class = LVLMForConditionalGeneration
    processor_class = LVLMProcessor
    needs_mask = False  # causal attention
    auto_classes = (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText)
    outputs = LVLMOptions.outputs

    def check(self, options: LVLMOptions) -> None:
        check_usable(options.llm.attention)

    def gives(self, config: PreTrainedConfig) -> frozenset[PredictionField]:
        masks: frozenset[PredictionField] = frozenset(
            {"masks"} if getattr(config, "masks", None) else ()
        )
        return masks | {"text"}

    def answerer(
        self,
        model: LVLMForConditionalGeneration,
        processor: LVLMProcessor,
        fields: frozenset[PredictionField],
        *,
        batch_size: int,
        max_new_tokens: int | None = None,
    ) -> Answerer:
        longest = max_new_tokens or LVLMOptions.longest_reply
        assert longest is not None
        return ConversationAnswerer(model, processor, max_new_tokens=longest)

    def check_item(self, processor: LVLMProcessor, item: AnswerItem) -> None:
        encode_item(processor, item)

    def card_text(self, options: LVLMOptions) -> CardText:
        shown = [_SHOWN[branch] for branch in _SHOWN if branch in options.branches]
        return CardText(
            tags=("medical", "vision-language"),
            summary=_SUMMARY,
            example=_EXAMPLE.format(shown=shown[0] if shown else ""),
        )

    def build(self, options: LVLMOptions) -> tuple[LVLMForConditionalGeneration, LVLMProcessor]:
        """Return a model and its processor.

        The model has published weights wherever the recipe gives a path.

        Raises:
            RecipeError: parts that do not fit each other or the recipe.
            CheckpointError: published weights that do not fit.
        """
        config, processor = resolve(options)
        dtype = getattr(torch, options.dtype)
        # The frame holds no memory; its parts are put in with their weights.
        try:
            with torch.device("meta"):
                model = LVLMForConditionalGeneration(config)
        except (ImportError, ValueError) as error:
            if "ttention" not in str(error):
                raise
            raise RecipeError(
                f"model.llm.attention: {options.llm.attention!r} cannot be used ({error})"
            ) from None
        model.language_model = _language_model(options.llm, config, dtype)
        for name, block in options.branches.items():
            branch = Branch(config.branch(name), out_dim=model.width)
            _load_branch(branch, block, name=name)
            model.branches[name] = branch.to(dtype)
        if options.masks is not None and (masks := config.mask_entry()) is not None:
            model.masks = _mask_branch(masks, options.masks, model.width).to(dtype)
        model.add_control_tokens(processor)
        model.config.dtype = dtype
        model.config.pad_token_id = processor.pad_id
        model.generation_config = _generation_config(model, processor)
        model.use_attention(options.llm.attention)
        model.eval()
        model.probe_lm_head()
        return model, processor

    def skeleton(self, options: LVLMOptions) -> LVLMForConditionalGeneration:
        # An estimate is for another machine as well: this one may lack the kernel that the recipe
        # names.
        llm = options.llm.model_copy(update={"attention": "sdpa"})
        config, _ = resolve(options.model_copy(update={"llm": llm}))
        with torch.device("meta"):
            return LVLMForConditionalGeneration(config).to(getattr(torch, options.dtype))

    def processor(self, options: LVLMOptions) -> LVLMProcessor:
        return resolve(options)[1]

    def preprocess(self, options: LVLMOptions) -> dict[str, Preprocess]:
        views = {
            name: preprocess_of(
                name, branch.encoder, branch.preprocess, place=f"model.branches.{name}.preprocess"
            )
            for name, branch in options.branches.items()
        }
        if options.masks is not None:
            masks = options.masks
            views[f"{masks.view}@{MASK_VIEW}"] = head_preprocess(
                masks.view, masks.head, masks.preprocess, place="model.masks"
            )
        return views

    def adapt(
        self,
        options: LVLMOptions,
        processor: LVLMProcessor,
        *,
        model: LVLMForConditionalGeneration | None = None,
    ) -> LVLMProcessor:
        masks = options.masks
        if masks is None or processor.masks:
            adapted = processor.adapt(options)
        else:
            head, spec = _described_masks(masks)
            adapted = processor.adapt(options, masks=spec.model_dump())
            if model is not None:
                entry = _mask_entry(masks, head, adapted)
                branch = _mask_branch(entry, masks, model.width)
                model.masks = branch.to(model.device, model.dtype)
                model.config.masks = entry.model_dump()
        if model is not None:
            _add_knowledge(model, options, adapted)
            model.adapt(options, adapted)
        return adapted


def resolve(options: LVLMOptions) -> tuple[LVLMConfig, LVLMProcessor]:
    """Resolve every size and the processor from published configs and tokenizers.

    Reads no weights.
    """
    text_config = _text_config(options.llm)
    tokenizer = _tokenizer(options.llm)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [PLACEHOLDERS[name] for name in options.branches]},
        replace_extra_special_tokens=False,
    )
    branches: dict[str, BranchEntry] = {}
    specs: dict[str, Config] = {}
    for name, block in options.branches.items():
        place = f"model.branches.{name}.preprocess"
        encoder, preprocess = described_encoder(name, block.encoder, block.preprocess, place=place)
        branches[name] = BranchEntry(
            encoder=encoder,
            connector=_connector_config(name, block.connector, options.tasks),
            channels=num_channels(preprocess),
            spatial=spatial_of(preprocess, place=place),
            placeholder_id=tokenizer.added_tokens_encoder[PLACEHOLDERS[name]],
            knowledge=_knowledge_config(name, block.knowledge, tokenizer),
        )
        with torch.device("meta"):
            branch = Branch(branches[name], out_dim=text_config.hidden_size)
        check_channels(block.encoder.name, preprocess, branch.encoder, place=place)
        specs[name] = {
            "placeholder": PLACEHOLDERS[name],
            "num_tokens": branch.num_tokens,
            "preprocess": preprocess.model_dump(),
        }
        if block.wrap is not None:
            specs[name] |= wrap_fields(block.wrap)
        if branch.connector.refuses_unseen_tasks:
            specs[name]["known_tasks_only"] = True
    head, spec = _described_masks(options.masks) if options.masks is not None else ({}, None)
    family = LLMS.get(options.llm.name)
    template = options.llm.chat_template or (None if tokenizer.chat_template else family.template)
    processor = LVLMProcessor(
        tokenizer,
        branches=specs,
        template_kwargs=family.template_kwargs,
        tasks=options.tasks,
        chat_template=read_template(template) if template else None,
        control_tokens=options.reply_tokens,
        regions=options.regions,
        masks=spec.model_dump() if spec is not None else None,
    )
    if len(tokenizer) > text_config.vocab_size:
        text_config.vocab_size = padded_size(len(tokenizer))
    config = LVLMConfig(
        text_config=text_config,
        llm=options.llm.name,
        branches={name: entry.model_dump() for name, entry in branches.items()},
        tasks=list(options.tasks),
        control_tokens=processor.control_token_ids,
        end_sequence=list(processor.chat.end_sequence),
        masks=(
            _mask_entry(options.masks, head, processor).model_dump()
            if options.masks is not None
            else {}
        ),
    )
    # At the end, since a config hands its own to the configs inside it when it is made.
    config._attn_implementation = options.llm.attention
    return config, processor


def _described_masks(options: MaskOptions) -> tuple[Config, MaskSpec]:
    """Return the config of a mask head, and what the processor needs of it."""
    place = "model.masks"
    entry, preprocess = described_head(options.view, options.head, options.preprocess, place=place)
    spatial = spatial_of(preprocess, place=f"{place}.preprocess")
    with torch.device("meta"):
        head = construct_head(entry)
    check_pixels(options.head.name, preprocess, head, place=place)
    try:
        grid = head.grid(tuple(spatial))
    except ValueError as error:
        raise RecipeError(f"{place}.preprocess.size: {error}") from None
    return entry, MaskSpec(
        view=f"{options.view}@{MASK_VIEW}",
        preprocess=preprocess.model_dump(),
        logits=list(grid),
        targets=options.targets,
    )


def _mask_entry(options: MaskOptions, head: Config, processor: LVLMProcessor) -> MaskEntry:
    """Return the entry of a mask head in the config of a checkpoint."""
    view = str(processor.mask_view)
    preprocess = processor.preprocess[view]
    return MaskEntry(
        view=view,
        head=head,
        projection=options.projection,
        channels=num_channels(preprocess),
        spatial=spatial_of(preprocess, place="model.masks.preprocess"),
        token_id=processor.control_token_ids[MASK_TOKEN],
        state=options.state,
    )


def _knowledge_config(
    name: str, options: KnowledgeOptions | None, tokenizer: PreTrainedTokenizerBase
) -> Config | None:
    """Return name and keywords of the knowledge of a branch; None without any."""
    if options is None:
        return None
    place = f"model.branches.{name}.knowledge"
    if KNOWLEDGE.get(options.name).needs_query:
        raise RecipeError(
            f"{place}: {options.name!r} is retrieved by features that a language model's branch "
            "does not have; use a graph here"
        )
    return described_knowledge(options, tokenizer, place=place)


def _add_knowledge(
    model: LVLMForConditionalGeneration, options: LVLMOptions, processor: LVLMProcessor
) -> None:
    """Give the branches of a saved model the knowledge of a recipe where they have none."""
    for name, block in options.branches.items():
        branch = model.branch(name)
        if branch.knowledge is not None or block.knowledge is None:
            continue
        entry = _knowledge_config(name, block.knowledge, processor.tokenizer)
        assert entry is not None
        knowledge = KnowledgeBranch(entry, dim=model.width, word_dim=model.width)
        branch.knowledge = knowledge.to(model.device, model.dtype).train(model.training)
        model.config.branches[name]["knowledge"] = entry


def _mask_branch(entry: MaskEntry, options: MaskOptions, width: int) -> MaskBranch:
    """Return a mask head with its published weights, and a new projection."""
    branch = MaskBranch(entry, in_dim=width)
    load_head(branch.head, options.head)
    return branch


def _text_config(options: LLMOptions) -> PreTrainedConfig:
    if options.path is not None:
        try:
            config = AutoConfig.from_pretrained(options.path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"model.llm.path: {unavailable(options.path, error, key='model.llm.path')}"
            ) from None
        for key, value in options.architecture.items():
            setattr(config, key, value)
    elif "model_type" in options.architecture:
        config = AutoConfig.for_model(**options.architecture)
    else:
        raise RecipeError(
            "model.llm: expected a path to published weights, or an architecture with a model_type"
        )
    expected = LLMS.get(options.name).model_types
    if expected and config.model_type not in expected:
        raise RecipeError(
            f"model.llm: family {options.name!r} is of type {' or '.join(expected)}, but "
            f"{options.path or 'the architecture'} is {config.model_type!r}; name the right "
            "family, or 'auto'"
        )
    config._name_or_path = (
        ""  # a checkpoint is complete; where its parts came from is in its recipe
    )
    return config


def _tokenizer(options: LLMOptions) -> PreTrainedTokenizerBase:
    source = options.tokenizer or options.path
    if source is None:
        raise RecipeError("model.llm.tokenizer: required where model.llm has no path")
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model.llm: no usable tokenizer at {source!r} ({error})") from None


def _connector_config(name: str, options: ConnectorOptions, tasks: list[str]) -> Config:
    """Name and keywords of a connector.

    One that routes by task gets the model's tasks: ids mean positions in one and the same list.
    """
    entry: Config = {"name": options.name, **fields_of(options, _NOT_FOR_THE_CONNECTOR)}
    if "tasks" in entry and entry["tasks"] != tasks:
        if entry["tasks"]:
            raise RecipeError(
                f"model.branches.{name}.connector.tasks: {entry['tasks']} are not the model's "
                f"tasks {tasks}; write them once, as model.tasks"
            )
        entry["tasks"] = list(tasks)
    return entry


def _language_model(options: LLMOptions, config: LVLMConfig, dtype: torch.dtype) -> CausalLM:
    text_config = config.get_text_config()
    if options.path is None:
        return AutoModelForCausalLM.from_config(text_config, dtype=dtype)
    # The published file has the published number of rows; ours may have more, for the placeholders.
    published = copy.deepcopy(text_config)
    published.vocab_size = AutoConfig.from_pretrained(
        options.path, trust_remote_code=False
    ).vocab_size
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        options.path,
        config=published,
        dtype=dtype,
        output_loading_info=True,
        trust_remote_code=False,
    )
    model, report = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(what):
            raise CheckpointError(
                f"{options.path}: {what.replace('_', ' ')}: {sorted(map(str, report[what]))[:5]}"
            )
    if text_config.vocab_size != published.vocab_size:
        logger.info(
            "vocabulary resized from %d to %d for the placeholders",
            published.vocab_size,
            text_config.vocab_size,
        )
        model.resize_token_embeddings(text_config.vocab_size, mean_resizing=False)
    return model


def _load_branch(branch: Branch, options: BranchOptions, *, name: str) -> None:
    """Published weights into a branch, wherever its options name some."""
    load_encoder(branch.encoder, options.encoder, f"{name}.encoder")
    if options.connector.path:
        load_module(
            branch.connector,
            PretrainedSource(options.connector.path).tensors(),
            source=f"{name}.connector from {options.connector.path}",
            key_map=type(branch.connector).key_map,
        )


def _generation_config(
    model: LVLMForConditionalGeneration, processor: LVLMProcessor
) -> GenerationConfig:
    """The LLM's own, which also stops at the template's end token and never says a placeholder."""
    generation = model.language_model.generation_config
    generation.eos_token_id = sorted({*processor.chat.stop_ids, *stop_tokens(generation)})
    generation.pad_token_id = processor.pad_id
    if processor.placeholder_ids:
        generation.suppress_tokens = sorted(processor.placeholder_ids.values())
    return generation
