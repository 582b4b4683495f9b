"""Import of published folders: MedM-VL, LLaVA, InternVL, Sa2VA and UniBiomed, towers, projectors.

Every tensor of the source is loaded or named as ignored with the reason; one that is missing,
unexpected or misshaped stops the import. What the source does not say (which chat template, whether
arrays are 0..1 or HU) is noted.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from medm.config import validate
from medm.connectors.base import Connector
from medm.connectors.mlp import MLPConnector
from medm.encoders.base import VisionEncoder
from medm.encoders.internvit import InternViTEncoder, stock_names
from medm.errors import CheckpointError, DataError, RecipeError
from medm.files import atomic_directory
from medm.heads.base import MaskHead
from medm.llms.base import read_template
from medm.llms.chat import ChatFormat
from medm.models.blip.build import resolve as resolve_blip
from medm.models.blip.modeling import MedmBlip
from medm.models.blip.options import BlipOptions
from medm.models.blip.published import load_published as load_blip
from medm.models.blip.published import published_section as blip_section
from medm.models.dual_encoder.build import resolve
from medm.models.dual_encoder.modeling import DualEncoder
from medm.models.dual_encoder.options import DualEncoderOptions
from medm.models.dual_encoder.published import load_published, published_section
from medm.models.lvlm.build import LVLM
from medm.models.lvlm.options import LVLMOptions
from medm.models.provenance import describe, require_free
from medm.models.published.blip import BLIP
from medm.models.published.internvl import MODEL_TYPES, PREFIXES, internvl_section
from medm.models.published.open_clip import OPEN_CLIP
from medm.models.published.source_configs import (
    END_TOKENS,
    Hints,
    Section,
    encoder_block,
    generation_of,
    llava_section,
    medm_vl_section,
)
from medm.models.published.weights import (
    LoadReport,
    PretrainedSource,
    group,
    load_module,
    rename,
    save_bundle,
    save_tensors,
)
from medm.models.vision import build_encoder, encoder_options
from medm.types import Config

_ROTARY = r"rotary_emb\.inv_freq$"


@dataclass(slots=True)
class ImportReport:
    """Report on the import of a source."""

    source: str
    kind: str
    """What it was found to be."""
    parts: list[LoadReport] = field(default_factory=list)
    """One a part: tensors loaded and ignored."""
    notes: list[str] = field(default_factory=list)
    """What was decided for lack of a statement in the source."""

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [f"{self.source}: {self.kind}"]
        for part in self.parts:
            families = _families(part.ignored, among=part.loaded + part.ignored)
            ignored = f", {len(part.ignored)} ignored ({families})" if part.ignored else ""
            lines.append(f"  {part.source}: {len(part.loaded)} tensors loaded{ignored}")
        return lines + [f"  note: {note}" for note in self.notes]

    def as_json(self) -> Config:
        """Every tensor by name."""
        parts = {
            part.source: {"loaded": part.loaded, "ignored": part.ignored} for part in self.parts
        }
        return {"source": self.source, "kind": self.kind, "parts": parts, "notes": self.notes}


def _families(names: list[str], *, among: list[str]) -> str:
    """Return families of names by their first two words: `text_model.*, logit_scale`.

    Words that every name of the part begins with are left out.
    """
    shared = 0
    for words in zip(*(name.split(".") for name in among), strict=False):
        if len(set(words)) > 1:
            break
        shared += 1
    short = [".".join(name.split(".")[shared:]) for name in names]
    return ", ".join(
        sorted(
            {
                ".".join(name.split(".")[:2]) + (".*" if name.count(".") > 1 else "")
                for name in short
            }
        )
    )


KINDS: dict[str, str] = {
    "medm-vl": "MedM-VL model folders, generations A to C",
    "llava": "transformers' LlavaForConditionalGeneration (llava-hf)",
    "internvl": "InternVL folders in their own layout (InternVLChatModel)",
    "sa2va": "Sa2VA and UniBiomed folders on an InternVL base (Sa2VAChatModel)",
    "clip": "CLIP vision towers",
    "siglip": "SigLIP vision towers",
    "m3d-clip": "M3D-CLIP, or pretrained_ViT.bin",
    "medm-clip": "MedM-CLIP",
    "dual-encoder": "CLIP and SigLIP whole: image and text tower, projections and scale",
    "blip": "BLIP and MOTOR: image tower, text encoder, decoder and heads",
    "projector": "MLP projectors of LLaVA, TinyLLaVA and MedM-VL",
}
"""What can be imported, and what it is."""

_ENCODER_KINDS = ("clip", "siglip", "m3d-clip", "medm-clip")


def import_model(
    source: str, out: str, *, kind: str = "auto", hints: Hints | None = None
) -> ImportReport:
    """Write a published folder or file as a medm checkpoint, an encoder bundle or a projector file.

    Args:
        source: folder, file or Hugging Face id.
        out: folder to write; must not exist, or be empty. `import.json` in it names every tensor.
        kind: one of `KINDS`, or "auto" to find out.
        hints: what the source does not say.

    Raises:
        CheckpointError: of unknown kind, or tensors are missing, unexpected or misshaped. Nothing
            is left at `out`.
    """
    place = Path(out).expanduser()
    require_free(place, error=CheckpointError)  # before anything is downloaded or converted
    published, hints = PretrainedSource(source), hints or Hints()
    if kind == "auto":
        kind = guess(published)
    elif kind not in KINDS:
        raise CheckpointError(f"unknown kind {kind!r}; expected auto, {', '.join(KINDS)}")
    if hints.tokenizer is not None and kind not in ("dual-encoder", "blip"):
        raise CheckpointError(
            f"{source}: a tokenizer is given, and a source of kind {kind!r} takes none; leave "
            "--tokenizer out"
        )
    report = ImportReport(source, KINDS[kind])
    with atomic_directory(place) as target:
        job = Import(published, target, hints, report)
        if kind in _ENCODER_KINDS:
            job.encoder(kind)
        else:
            {
                "medm-vl": job.medm_vl,
                "llava": job.llava,
                "internvl": job.internvl,
                "sa2va": job.internvl,
                "dual-encoder": job.dual_encoder,
                "blip": job.blip,
                "projector": job.projector,
            }[kind]()
        text = json.dumps(report.as_json(), indent=2, ensure_ascii=False)
        (target / "import.json").write_text(text + "\n", encoding="utf-8")
        describe(
            target,
            title=f"{place.name}: imported by medm",
            text=f"Made from `{Path(source).name}`: {report.kind}. `import.json` names every "
            "tensor.",
            metadata={"import": {"source": source, "kind": report.kind}},
        )
    return report


def guess(published: PretrainedSource) -> str:
    """The kind of a source, by its config and then by its tensors.

    Raises:
        CheckpointError: neither is known.
    """
    config = published.config()
    if config.get("model_type") == "llava":
        return "llava"
    if config.get("model_type") in MODEL_TYPES:
        return MODEL_TYPES[config["model_type"]]
    if generation_of(config) is not None:
        return "medm-vl"
    types = {
        OPEN_CLIP: "dual-encoder",
        BLIP: "blip",
        "m3d_clip": "m3d-clip",
        "medm-pretrain": "medm-clip",
        "clip": "clip",
        "clip_vision_model": "clip",
        "siglip": "siglip",
        "siglip_vision_model": "siglip",
    }
    if config.get("model_type") in types:
        return types[config["model_type"]]
    names = list(published.tensors())
    if any("patch_embedding.patch_embeddings.1." in name for name in names):
        return "m3d-clip"
    if any("to_patch_embedding." in name for name in names):
        return "medm-clip"
    if all(
        any(word in name for word in ("connector.", "projector.", "linear_1.", "linear_2."))
        for name in names
    ):
        return "projector"
    raise CheckpointError(
        f"{published.path}: of unknown kind (model_type {config.get('model_type')!r}); say "
        "--kind, one of: " + ", ".join(KINDS)
    )


@dataclass(frozen=True, slots=True)
class Groups:
    """Tensors of a source by its parts, and what each is called in the files."""

    tensors: dict[str, dict[str, Tensor]]
    names: dict[str, dict[str, str]]


@dataclass(frozen=True, slots=True)
class Import:
    """One import; a method for each kind of source writes the folder and fills the report."""

    published: PretrainedSource
    target: Path
    """Folder that is written."""
    hints: Hints
    report: ImportReport

    def medm_vl(self) -> None:
        """A MedM-VL model folder as a medm checkpoint."""
        config, tensors = self.published.config(), self.published.tensors()
        self.report.kind = f"MedM-VL model folder, generation {generation_of(config) or 'C'}"
        prefixes = {
            "llm": r"^llm\.",
            "encoder_image3d": r"^encoder_image3d\.encoder\.",
            "encoder_image": r"^encoder_image\.encoder\.",
            "connector_image3d": r"^connector_image3d\.",
            "connector_image": r"^connector_image\.",
        }
        groups = self._groups(tensors, {name: name for name in tensors}, prefixes)
        section = medm_vl_section(config, groups.tensors, hints=self.hints, notes=self.report.notes)
        self._write_lvlm(section, groups)

    def llava(self) -> None:
        """Names of llava-hf files, and of files that transformers saved from 4.52 on."""
        renaming = LoadReport(self.published.path)
        renamed = rename(
            self.published.tensors(),
            key_map=[
                (r"^(?:model\.)?vision_tower\.", "vision."),
                (r"^(?:model\.)?multi_modal_projector\.", "connector."),
                (r"^language_model\.(model|lm_head)\.", r"llm.\1."),
                (r"^model\.language_model\.", "llm.model."),
                (r"^lm_head\.", "llm.lm_head."),
            ],
            ignored=[],
            report=renaming,
        )
        prefixes = {
            "llm": r"^llm\.",
            "encoder_image": r"^vision\.",
            "connector_image": r"^connector\.",
        }
        groups = self._groups(renamed, renaming.published, prefixes)
        section = llava_section(
            self.published.config(), self.published.preprocessor(), hints=self.hints
        )
        self._write_lvlm(section, groups)

    def internvl(self) -> None:
        """InternVL, and Sa2VA and UniBiomed with their mask head."""
        config, tensors = self.published.config(), self.published.tensors()
        groups = self._groups(tensors, {name: name for name in tensors}, PREFIXES)
        section = internvl_section(config, hints=self.hints, notes=self.report.notes)
        self._write_lvlm(section, groups)

    def encoder(self, kind: str) -> None:
        """A tower as a bundle."""
        block = encoder_block(kind, self.published.path, self.hints)
        options = encoder_options(block, source=kind)
        encoder, preprocess = build_encoder(options)
        part = LoadReport(kind)
        tower = type(encoder)
        rename(
            self.published.tensors(), key_map=tower.key_map, ignored=tower.ignored_keys, report=part
        )
        own = encoder.state_dict()  # the builder has loaded it, all or nothing
        part.loaded = sorted(theirs for name, theirs in part.published.items() if name in own)
        part.ignored += sorted(theirs for name, theirs in part.published.items() if name not in own)
        self.report.parts.append(part)
        sizes = type(encoder).architecture_from(self.published.config())
        branch = "image" if type(encoder).axes == 2 else "volume"
        save_bundle(
            self.target,
            encoder,
            name=kind,
            architecture=sizes | options.architecture,
            options=options.model_dump(exclude={"name", "path", "architecture", "image_size"}),
            preprocess={**preprocess, **self.hints.preprocess.get(branch, {})},
        )

    def dual_encoder(self) -> None:
        """A dual encoder as a medm checkpoint."""
        section = published_section(
            self.published,
            tokenizer=self.hints.tokenizer,
            preprocess=self.hints.preprocess.get("image"),
        )
        options = validate(DualEncoderOptions, section, source="the model that the source is")
        config, processor = resolve(options)
        model = DualEncoder(config)
        self.report.parts += load_published(model, self.published)
        if not self.published.has_config():
            self.report.notes.append(
                "sizes are those of the tensors; heads are 64 wide, and the activation is the "
                "quick GELU, as in the files of OpenAI, MetaCLIP and UniMed-CLIP"
            )
        model.save_pretrained(self.target)
        processor.save_pretrained(self.target)

    def blip(self) -> None:
        """A BLIP as a medm checkpoint, with all heads that the source has."""
        section = blip_section(
            self.published,
            tokenizer=self.hints.tokenizer,
            preprocess=self.hints.preprocess.get("image"),
        )
        options = validate(BlipOptions, section, source="the model that the source is")
        config, processor = resolve_blip(options)
        model = MedmBlip(config)
        loaded = load_blip(model, self.published)
        self.report.parts += loaded.reports
        self.report.notes += loaded.notes
        if self.published.has_config():
            if "itm" in options.heads:
                self.report.notes.append(
                    "a text that is matched begins with [ENC], as in BLIP's code; transformers' "
                    "class takes the tokens as they are given"
                )
        else:
            self.report.notes.append(
                "sizes are those of the tensors; attention heads are 64 wide, and images are "
                "normalized as BLIP's: MOTOR's have --preprocess image.mean=[0.485,0.456,0.406] "
                "image.std=[0.229,0.224,0.225]"
            )
        model.save_pretrained(self.target)
        processor.save_pretrained(self.target)

    def projector(self) -> None:
        """An MLP that a recipe can name as `connector.path`."""
        part = LoadReport("projector")
        renamed = rename(
            self.published.tensors(), key_map=MLPConnector.key_map, ignored=[], report=part
        )
        layers = sorted(
            int(name.split(".")[1])
            for name in renamed
            if name.endswith(".weight") and name.startswith("layers.")
        )
        if layers != list(range(0, 2 * len(layers), 2)) or not layers:
            raise CheckpointError(
                f"{self.published.path}: not an MLP projector; expected linear layers 0, 2, 4 ..., "
                f"found {sorted(renamed)[:6]}"
            )
        out_dim, in_dim = renamed["layers.0.weight"].shape
        module = MLPConnector(in_dim=in_dim, out_dim=out_dim, grid=(1, 1), depth=len(layers))
        loaded = load_module(module, renamed, source="projector")
        self.report.parts.append(_in_the_files(loaded, part.published))
        save_tensors(module.state_dict(), self.target / "model.safetensors")
        described = {
            "model_type": "medm-connector",
            "name": "mlp",
            "depth": len(layers),
            "in_dim": in_dim,
            "out_dim": out_dim,
        }
        text = json.dumps(described, indent=2) + "\n"
        (self.target / "config.json").write_text(text, encoding="utf-8")

    def _groups(
        self, tensors: Mapping[str, Tensor], names: Mapping[str, str], prefixes: Mapping[str, str]
    ) -> Groups:
        source = self.published.path
        return Groups(
            group(tensors, prefixes, source=source), group(names, prefixes, source=source)
        )

    def _write_lvlm(self, section: Section, groups: Groups) -> None:
        """Build what the section says, load every group of tensors, and save."""
        llm = groups.tensors["llm"]
        with tempfile.TemporaryDirectory() as scratch:
            folder = self._tokenizer(section, Path(scratch))
            self._set_head(llm, section.architecture)
            recipe = section.as_recipe(
                tokenizer=str(folder),
                chat_template=str(folder / "template.jinja"),
                dtype=str(llm["model.embed_tokens.weight"].dtype).removeprefix("torch."),
            )
            source = "the model that the source describes"
            model, processor = LVLM().build(validate(LVLMOptions, recipe, source=source))
        loaded = _load_llm(model.language_model, llm, source="llm")
        self.report.parts.append(_in_the_files(loaded, groups.names["llm"]))
        for name, branch in model.encoders().items():
            self._load(f"{name}.encoder", branch.encoder.inner or branch.encoder, section, groups)
            self._load(f"{name}.connector", branch.connector, section, groups)
        if model.masks is not None:
            self._load("masks.head", model.masks.head, section, groups)
            self._load("masks.projection", model.masks.projection, section, groups)
        used = {"llm", *section.sources.values()}
        unused = [name for name, found in groups.tensors.items() if found and name not in used]
        if unused:
            raise CheckpointError(
                f"{self.published.path}: the config does not speak of {', '.join(unused)}, which "
                "has weights"
            )
        model.config.get_text_config()._name_or_path = ""
        model.save_pretrained(self.target)
        processor.save_pretrained(self.target)

    def _load(self, part: str, module: nn.Module, section: Section, groups: Groups) -> None:
        """Load the tensors of one part of the source into a part of the model."""
        source = section.sources[part]
        tensors, names = groups.tensors[source], groups.names[source]
        if isinstance(module, Connector):
            if "query" in tensors and tensors["query"].ndim == 3:
                tensors["query"] = tensors["query"].squeeze(0)
            loaded = load_module(module, tensors, source=part, key_map=type(module).key_map)
        elif isinstance(module, MaskHead):
            self._load_mask_head(part, module, tensors, names)
            return
        elif isinstance(module, VisionEncoder):
            truncated = type(module).truncated_keys
            if isinstance(module, InternViTEncoder):
                tensors, published = stock_names(tensors)
                names = {new: names[old] for new, old in published.items()}
                tensors = module.rename_published(tensors)
                sizes = InternViTEncoder.architecture_from(self.published.config())
                if module.tower.config.num_hidden_layers == sizes["num_hidden_layers"]:
                    truncated = ()  # no block behind the last one, so an unknown name is no block
            loaded = load_module(
                module,
                tensors,
                source=part,
                key_map=type(module).key_map,
                ignored=type(module).ignored_keys,
                truncated=truncated,
            )
        else:
            loaded = load_module(module, tensors, source=part)
        self.report.parts.append(_in_the_files(loaded, names))

    def _load_mask_head(
        self, part: str, head: MaskHead, tensors: Mapping[str, Tensor], names: Mapping[str, str]
    ) -> None:
        """Load a mask head, all or nothing; its tensors may be joined or copied on the way."""
        loaded = load_module(
            head,
            head.rename_published(tensors),
            source=part,
            key_map=type(head).key_map,
            ignored=type(head).ignored_keys,
        )
        ignored = {names.get(name, name) for name in loaded.ignored}
        used = [name for name in names.values() if name not in ignored]
        self.report.parts.append(LoadReport(part, loaded=used, ignored=sorted(ignored)))

    def _tokenizer(self, section: Section, scratch: Path) -> Path:
        """Return the tokenizer and template of the training, in a folder of their own."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.published.path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            if self.hints.llm is None:
                raise CheckpointError(
                    f"{self.published.path}: no usable tokenizer ({error}); give the LLM's with "
                    "--llm"
                ) from None
            tokenizer = AutoTokenizer.from_pretrained(self.hints.llm, trust_remote_code=False)
        end = END_TOKENS.get(str(section.architecture["model_type"]))
        if end is not None and tokenizer.eos_token != end and end in tokenizer.get_vocab():
            self.report.notes.append(
                f"replies end with {end!r} as in training; the tokenizer said "
                f"{tokenizer.eos_token!r}"
            )
            tokenizer.eos_token = end
        template = self._template(tokenizer, section)
        first = tokenizer("a")["input_ids"][:1]
        if (
            tokenizer.bos_token_id is not None
            and first == [tokenizer.bos_token_id]
            and "bos_token" not in template
        ):
            template = "{{- bos_token -}}" + template  # published prompts begin with it
        (scratch / "template.jinja").write_text(template, encoding="utf-8")
        tokenizer.save_pretrained(scratch)
        return scratch

    def _template(self, tokenizer: PreTrainedTokenizerBase, section: Section) -> str:
        """Return the template of the hint, else of the source, else MedM-VL's and LLaVA's layout.

        The template of the source is used only if it takes text.
        """
        hint = self.hints.chat_template or section.chat_template
        stock, own = self.report.kind == KINDS["llava"], tokenizer.chat_template
        if hint is not None or not stock or not own:
            return read_template(hint or "vicuna")
        try:
            ChatFormat(tokenizer, template=str(own)).end_of_reply()
        except (RecipeError, DataError):
            self.report.notes.append(
                "the source's chat template does not take plain text; prompts have the Vicuna "
                "layout instead"
            )
            return read_template("vicuna")
        return str(own)

    def _set_head(self, tensors: dict[str, Tensor], architecture: Config) -> None:
        """Use the LM head where it is stored, tie it where it is not; never tie what differs."""
        embeddings, head = tensors.get("model.embed_tokens.weight"), tensors.get("lm_head.weight")
        if embeddings is None:
            raise CheckpointError(
                "the language model has no model.embed_tokens.weight; this family is not imported"
            )
        architecture["vocab_size"] = len(embeddings)
        if head is None:
            architecture["tie_word_embeddings"] = True
        elif architecture.get("tie_word_embeddings") and not torch.equal(head, embeddings):
            architecture["tie_word_embeddings"] = False
            self.report.notes.append(
                "the head differs from the embeddings, so the two are no longer tied"
            )


def _in_the_files(part: LoadReport, names: Mapping[str, str]) -> LoadReport:
    """Return the report under the names of the files, so that each can be ticked off.

    A tied head that the files lack is left out.
    """
    # A tensor that was cut into several is named once.
    part.loaded = list(dict.fromkeys(names[name] for name in part.loaded if name in names))
    part.ignored = list(dict.fromkeys(names[name] for name in part.ignored))
    return part


def _load_llm(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> LoadReport:
    """Load the language model.

    Rows that the placeholders added to its vocabulary stay as they were built.
    """
    own = module.state_dict()
    padded = dict(tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        tensor = tensors.get(name)
        if tensor is None and name == "lm_head.weight":
            tensor = tensors["model.embed_tokens.weight"]
        if tensor is not None and name in own:
            rows = own[name].clone()
            rows[: len(tensor)] = tensor
            padded[name] = rows
    return load_module(module, padded, source=source, ignored=[_ROTARY])
