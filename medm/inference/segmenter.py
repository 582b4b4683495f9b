"""Masks of generated replies: each `[SEG]` of a reply to a mask on the grid of its file.

After generation one teacher-forced pass over prompt and reply gives the state of every `[SEG]`, so
that sampled replies, batches and a token at the very end need nothing of their own. The head
encodes each image once, whatever the number of its masks.

Knows nothing of annotation files and output files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from medm.errors import DeviceError, RecipeError
from medm.heads.base import Maps, MaskHead, MaskLogits
from medm.imaging import Preprocess, prepare
from medm.imaging.placement import Placement, Prepared
from medm.inference.generator import Engine, FeatureMemory, Request, content_key
from medm.inference.grounded_text import GroundedText, Phrase, grounded_text
from medm.inference.options import SegmentationOptions
from medm.inference.volume_modes import (
    MODES,
    NOTHING,
    FileMasks,
    ImageStack,
    on_volume,
    open_slices,
    require_mode,
)
from medm.types import PHRASE_TOKENS, Kind, parse_view

if TYPE_CHECKING:
    from medm.models.lvlm.grounding import MaskBranch

_ROWS = 8
"""Replies of one teacher-forced pass."""
_PROMPTS = 64
"""Masks that are decoded at once."""


@dataclass(frozen=True, slots=True)
class Shown:
    """An image or volume of a prompt, as its record holds it."""

    kind: Kind
    source: object
    """Whatever `medm.imaging.prepare` takes: a path, an array ..."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt with its reply."""

    request: Request
    reply: Sequence[int]
    """Ids that were generated."""
    media: Sequence[Shown] = ()
    """Images and volumes of the prompt, in order."""


@dataclass(frozen=True, slots=True, eq=False)
class MaskPrediction:
    """The mask of one `[SEG]`."""

    token: int
    """Number of the `[SEG]` among those of the reply."""
    phrase: Phrase
    """Words of the reply that it belongs to."""
    kind: Kind
    media: int
    """Position of its image or volume among those of its kind in the prompt."""
    mask: np.ndarray
    """(source_shape) bool, on the grid of the file."""
    placement: Placement
    """Of what the head saw in the file; it has the geometry of the file."""
    quality: float
    """Predicted IoU of mask and target."""
    presence: float
    """Probability that the target is in the image at all."""
    absent: bool
    """`presence` is below the threshold, so that the mask is empty."""
    probabilities: np.ndarray | None = None
    """(source_shape) float32 in 0..1, if they were asked for; 0 where the model sees nothing."""

    @property
    def voxels(self) -> int:
        """Size of the mask."""
        return int(np.count_nonzero(self.mask))


@dataclass(frozen=True, slots=True)
class Grounded:
    """A reply with its masks."""

    text: GroundedText
    masks: tuple[MaskPrediction, ...] = ()
    """In the order of the `[SEG]`, and for each of them in the order of its images. Empty if the
    prompt shows no image that the head reads."""

    @property
    def without_image(self) -> int:
        """`[SEG]` that have no mask, because there is no image they could be of."""
        return 0 if self.masks else len(self.text.phrases)


class Segmenter:
    """The mask head of a model that generates replies.

    Args:
        engine: holds the model, its processor and the device. Its cache of vision features is used.
        options: how masks are made.
        store: bytes of image maps that are kept for later masks of the same image.
        soft: keep the probabilities of each mask.

    Raises:
        RecipeError: the model has no mask head, or a head that does not go with the options.
    """

    def __init__(
        self,
        engine: Engine,
        options: SegmentationOptions | None = None,
        *,
        store: int = 512 * 2**20,
        soft: bool = False,
    ) -> None:
        if engine.model.masks is None or engine.processor.mask_view is None:
            raise RecipeError("the model has no mask head; its replies have no masks")
        self.engine, self.processor = engine, engine.processor
        self.options, self.soft = options or SegmentationOptions(), soft
        self.branch: MaskBranch = engine.model.masks
        self.view = engine.processor.mask_view
        self.kind: Kind = parse_view(self.view).kind
        self.token_id = self.branch.token_id
        self.mode = require_mode(self.options, self.kind)
        if self.mode == "memory":
            self.mask_head.memory()  # refused before anything is generated
        self.maps = FeatureMemory[Maps](store, lambda maps: sum(one.nbytes for one in maps))
        self.on_slice: Callable[[int, int], None] | None = None
        """Called before each slice of a volume with the slices that are done, and all of them. What
        it raises ends `ground`."""

    @property
    def preprocess(self) -> Preprocess:
        """Preprocessing of the view of the head."""
        return self.processor.preprocess[self.view]

    @property
    def mask_head(self) -> MaskHead:
        """The head."""
        return self.branch.head

    def segment(self, answered: Sequence[Answered]) -> list[Grounded]:
        """Return the masks of several replies.

        Raises:
            DataError: a file cannot be read.
            DeviceError: not even one reply fits the memory.
        """
        prompts = self.prompts(answered)
        return [self.ground(*pair) for pair in zip(answered, prompts, strict=True)]

    @torch.inference_mode()
    def prompts(self, answered: Sequence[Answered]) -> list[Tensor]:
        """Return the prompts of the head, (masks, D) for each reply.

        `[SEG]` of earlier replies in a prompt are left out.

        Raises:
            DeviceError: not even one reply fits the memory.
        """
        rows = [row for row, one in enumerate(answered) if self.token_id in one.reply]
        rows.sort(key=lambda row: -len(answered[row].request.input_ids))
        found: dict[int, Tensor] = {}
        size = _ROWS
        while rows:
            chunk, rest = rows[:size], rows[size:]
            try:
                states = self._states([answered[row] for row in chunk])
            except torch.OutOfMemoryError:
                if len(chunk) == 1:
                    raise DeviceError(
                        f"out of memory on {self.engine.device} in the pass for the masks of one "
                        f"reply of {len(answered[chunk[0]].request.input_ids)} prompt tokens; use "
                        "a lower precision (bfloat16) or a smaller model"
                    ) from None
                torch.cuda.empty_cache()
                size = len(chunk) // 2
                continue
            found |= dict(zip(chunk, states, strict=True))
            rows = rest
        nothing = torch.zeros(0, self.branch.head.dim)
        return [found.get(row, nothing) for row in range(len(answered))]

    def _states(self, answered: Sequence[Answered]) -> list[Tensor]:
        """Return the projected states of the `[SEG]` of each reply, by one pass."""
        lengths = [len(one.request.input_ids) for one in answered]
        rows = [
            torch.from_numpy(np.concatenate([one.request.input_ids, np.asarray(one.reply)]))
            for one in answered
        ]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.processor.pad_id)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        features, task_ids = self.engine.vision([one.request for one in answered])
        device = self.engine.device
        states = self.engine.model.mask_prompts(
            ids.to(device), mask.to(device), features=features, task_ids=task_ids
        )
        places = torch.nonzero(ids == self.token_id)  # (S, 2): row, position
        in_reply = places[:, 1] >= torch.tensor(lengths)[places[:, 0]]
        return [
            states[((places[:, 0] == row) & in_reply).to(device)] for row in range(len(answered))
        ]

    @torch.inference_mode()
    def ground(self, answered: Answered, prompts: Tensor) -> Grounded:
        """Return the masks of one reply.

        Args:
            answered: prompt and reply.
            prompts: (masks, D), of `prompts`.

        Raises:
            DataError: a file cannot be read.
        """
        text = self.text(answered.reply)
        if not len(prompts):
            return Grounded(text)
        files = self._files(answered.media, prompts)
        masks = [
            self._mask(token, phrase, *file)
            for token, phrase in enumerate(text.phrases)
            for file in files
        ]
        return Grounded(text, tuple(masks))

    def _mask(
        self, token: int, phrase: Phrase, number: int, kind: Kind, found: FileMasks
    ) -> MaskPrediction:
        presence = float(torch.sigmoid(found.presence[token]))
        threshold = self.options.presence_threshold
        absent = threshold is not None and presence < threshold
        logits = found.logits(token)
        soft = None
        if self.soft:
            soft = np.zeros_like(logits) if absent else expit(logits)
        return MaskPrediction(
            token=token,
            phrase=phrase,
            kind=kind,
            media=number,
            mask=np.zeros_like(logits, dtype=bool) if absent else logits > 0,
            placement=found.placement,
            quality=float(found.quality[token]),
            presence=presence,
            absent=absent,
            probabilities=soft,
        )

    def text(self, reply: Sequence[int]) -> GroundedText:
        """Return the words of a reply, and the phrase of each `[SEG]`."""
        decoded = self.processor.decode_with_control_tokens(reply)
        marks = set(PHRASE_TOKENS) <= set(self.processor.control_tokens)
        return grounded_text(decoded, phrase_tokens=marks)

    def _files(self, media: Sequence[Shown], prompts: Tensor) -> list[tuple[int, Kind, FileMasks]]:
        """Return the masks of each image or volume that they belong to.

        It is the last one that the head reads, or else, for a head of images, the last volume. With
        a `volume_mode`, several images are slices of one body, and masks belong to all of them.

        Returns:
            Position among the media of its kind, the kind, and the masks; nothing where the prompt
            shows no image that they could be of.
        """
        own = [one.source for one in media if one.kind == self.kind]
        volumes = [one.source for one in media if one.kind == "volume"]
        if own and (len(own) == 1 or self.kind == "volume" or self.options.volume_mode is None):
            prepared = prepare(own[-1], self.preprocess)
            found = self.on_file(prepared, self.decode(prepared, prompts))
            return [(len(own) - 1, self.kind, found)]
        if own:
            images = ImageStack(own)
            slices = MODES[self.mode](self, images, prompts, self.options)
            return [
                (number, "image", self.on_file(images.prepared(number, self.preprocess), one))
                for number, one in enumerate(slices)
            ]
        if volumes:
            stack = open_slices(volumes[-1], self.options, self.preprocess)
            slices = MODES[self.mode](self, stack, prompts, self.options)
            found = on_volume(self, stack, slices, self.options)
            return [(len(volumes) - 1, "volume", found)]
        return []

    def on_file(self, prepared: Prepared, found: MaskLogits) -> FileMasks:
        """Return the output of the head for one image or volume on the grid of its file."""
        grid = prepared.placement.resized(tuple(found.logits.shape[1:]))

        def logits(token: int) -> np.ndarray:
            values = found.logits[token].numpy()
            return grid.to_source(values, interpolation="linear", fill=NOTHING)

        return FileMasks(logits, found.quality, found.presence, prepared.placement)

    def decode(self, prepared: Prepared, prompts: Tensor) -> MaskLogits:
        """Return the output of the head for one image, (masks, *grid), in host memory."""
        return self.decode_maps(self.encode(prepared.pixels), prompts)

    def decode_maps(self, maps: Maps, prompts: Tensor) -> MaskLogits:
        """Return the output of the head for the maps of one image; see `decode`."""
        parts = []
        for some in prompts.split(_PROMPTS):
            items = torch.zeros(len(some), dtype=torch.int64, device=some.device)
            parts.append(self.branch.head.decode(maps, some, items))
        return MaskLogits(*(torch.cat(part).float().cpu() for part in zip(*parts, strict=True)))

    def report(self, done: int, total: int) -> None:
        """Call `on_slice`."""
        if self.on_slice is not None:
            self.on_slice(done, total)

    def encode(self, pixels: np.ndarray) -> Maps:
        """Return the maps of one image, (1, ...) each. A known image is not encoded again."""
        key = content_key(pixels)
        maps = self.maps.get(self.view, key)
        if maps is None:
            reference = next(self.branch.head.encoder.parameters())
            batch = torch.from_numpy(pixels)[None].to(reference.device, reference.dtype)
            maps = self.branch.head.encode(batch)
            self.maps.put(self.view, key, maps)
        return maps
