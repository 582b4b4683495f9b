"""Teaches transformers' Auto classes to open medm's folders, without importing transformers or torch.

`install` waits for two modules of transformers, or takes them as they are where they are loaded already:

- The table of configs asks medm when a `model_type` of medm is looked up. `AutoConfig`, `AutoModel...`,
  `AutoTokenizer` and `pipeline` pass through it. The table is a private attribute of transformers.
- `AutoProcessor` finds a processor by the name of its class and never reads config.json. A stand-in of
  that name is registered there by the public way, and hands over to the real class.

Registering the classes themselves any earlier would import the models while transformers is half imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

_PREFIX = "medm-"
"""Beginning of the `model_type` of every folder that medm saved."""


def install() -> None:
    """Teach each module as soon as it is there."""
    for name, teach in _TEACHERS.items():
        if name in sys.modules:
            teach(sys.modules[name])
        else:
            sys.meta_path.insert(0, _AfterImport(name, teach))


def _register() -> None:
    from medm.models.auto import register

    register()


class _ConfigsOnDemand(dict[str, Any]):
    """transformers' table of registered configs, which asks medm for its own when one is looked up."""

    _registering = False

    def __missing__(self, key: str) -> Any:
        if self._ask_medm(key):
            return self[key]
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._ask_medm(key)

    def _ask_medm(self, key: object) -> bool:
        if self._registering or not (isinstance(key, str) and key.startswith(_PREFIX)):
            return False
        self._registering = True
        try:
            _register()
        finally:
            self._registering = False
        return super().__contains__(key)


class LVLMProcessor:
    """Has the name that saved folders give their processor; opens them with the class of that name."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.ProcessorMixin.from_pretrained`."""
        _register()
        from medm.models.lvlm.processing import LVLMProcessor as Processor

        return Processor.from_pretrained(*args, **kwargs)


class _StandIn:
    """Key of the stand-in in transformers' table, where others have the class of a config."""


def _teach_configs(module: ModuleType) -> None:
    table = getattr(module, "CONFIG_MAPPING", None)
    known = getattr(table, "_extra_content", None)
    if not isinstance(known, dict):
        _warn("its table of configs has changed")
    else:
        table._extra_content = _ConfigsOnDemand(known)  # type: ignore[union-attr]


def _teach_processors(module: ModuleType) -> None:
    try:
        module.AutoProcessor.register(_StandIn, LVLMProcessor, exist_ok=True)
    except (AttributeError, TypeError, ValueError) as error:
        _warn(f"AutoProcessor.register has changed ({error})")


def _warn(cause: str) -> None:
    version = getattr(sys.modules.get("transformers"), "__version__", "of an unknown version")
    logger.warning(
        "transformers %s: %s, so its Auto classes do not open medm's folders by themselves; call "
        "medm.models.auto.register() first, or use medm.load. docs/versions.md lists the tested versions",
        version,
        cause,
    )


_TEACHERS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _teach_configs,
    "transformers.models.auto.processing_auto": _teach_processors,
}


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Runs a function on one module right after the module is executed.

    Args:
        name: of the module.
        teach: the function.
    """

    def __init__(self, name: str, teach: Callable[[ModuleType], None]) -> None:
        self.name, self.teach = name, teach

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        self._loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self.teach(module)
