"""Base classes refuse a subclass that lacks an abstract method, with the names of what it lacks."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from medm.config import Options
from medm.connectors.base import Connector
from medm.encoders.base import VisionEncoder
from medm.encoders.clip import CLIPEncoder
from medm.encoders.vit import HFViTEncoder
from medm.models.base import MedmModel, ModelKind
from medm.types import VisionFeatures


class NoParts(MedmModel):
    config_class = PreTrainedConfig

    def check_same_parts(self, options: Options, *, source: str) -> None: ...


class NoPreprocessAndGrid(VisionEncoder):
    def forward(self, pixels: Tensor) -> VisionFeatures:
        return VisionFeatures(pixels, (1,))


class NoPreprocess(NoPreprocessAndGrid):
    def grid(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        return spatial


class NoEmbedding(HFViTEncoder):
    """Has a config and a tower, and not the embedding of patches."""

    config_class, tower_class = CLIPEncoder.config_class, CLIPEncoder.tower_class
    has_class_token = True
    preprocess_from = CLIPEncoder.preprocess_from


class NoForward(Connector):
    @property
    def num_tokens(self) -> int:
        return 1


class NoBuild(ModelKind): ...


WIDTHS = {"in_dim": 2, "out_dim": 2, "grid": (1, 1)}
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


@pytest.mark.parametrize(
    ("incomplete", "arguments", "missing"),
    [
        (NoParts, {"config": PreTrainedConfig()}, {"parts"}),
        (NoPreprocessAndGrid, {}, {"preprocess_from", "grid"}),
        (NoPreprocess, {}, {"preprocess_from"}),
        (NoEmbedding, {"architecture": SIZES}, {"embed"}),
        (NoForward, WIDTHS, {"forward"}),
        (NoBuild, {}, {"build"}),
        (MedmModel, {"config": PreTrainedConfig()}, {"check_same_parts", "parts"}),
    ],
)
def test_an_incomplete_class_is_refused_with_what_it_lacks(
    incomplete: type, arguments: dict[str, Any], missing: set[str]
) -> None:
    with pytest.raises(TypeError, match=f"abstract class {incomplete.__name__} ") as refused:
        incomplete(**arguments)
    assert set(str(refused.value).split(" method")[1].lstrip("s ").split(", ")) == missing


def test_an_encoder_without_preprocessing_is_refused_before_it_is_constructed() -> None:
    with pytest.raises(NotImplementedError, match="class NoPreprocess defines no preprocess_from"):
        NoPreprocess.preprocess_from({}, {})


def test_a_complete_model_is_still_a_module_and_a_transformers_model() -> None:
    class Complete(NoParts):
        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            self.linear = nn.Linear(1, 1)
            self.post_init()

        def parts(self) -> dict[str, nn.Module]:
            return {"linear": self.linear}

    model = Complete(PreTrainedConfig())
    assert isinstance(model, nn.Module) and isinstance(model, PreTrainedModel)
    assert not isinstance(nn.Linear(1, 1), MedmModel)
