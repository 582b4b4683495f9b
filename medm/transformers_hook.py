"""Hook into transformers' Auto classes for medm's folders, without importing transformers or torch.

`install` waits for two modules of transformers, or uses them directly if they are already
loaded:

- The table of configs asks medm when a `model_type` of medm is looked up. `AutoConfig`,
  `AutoModel...`, `AutoTokenizer` and `pipeline` pass through it.
- `AutoProcessor` finds a processor by the name of its class and never reads config.json. Its table
  asks medm for a name that is not registered yet.

Both tables are private attributes of transformers. Every kind of model in `medm.models.kinds` is
registered then, including those of other packages and plug-in files.

Registering the classes themselves any earlier would import the models while transformers is half
imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from medm.types import MODEL_TYPE_PREFIX

logger = logging.getLogger(__name__)


def install() -> None:
    """Patch each module as soon as it is imported."""
    for name, patch in _PATCHES.items():
        if name in sys.modules:
            patch(sys.modules[name])
        else:
            sys.meta_path.insert(0, _AfterImport(name, patch))


def _register() -> None:
    from medm.models.auto import register

    register()


class _ConfigsOnDemand(dict[str, object]):
    """transformers' table of registered configs, with medm's configs on demand."""

    _registering = False

    def __missing__(self, key: str) -> object:
        if self._ask_medm(key):
            return self[key]
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._ask_medm(key)

    def _ask_medm(self, key: object) -> bool:
        if self._registering or not (isinstance(key, str) and key.startswith(MODEL_TYPE_PREFIX)):
            return False
        self._registering = True
        try:
            _register()
        finally:
            self._registering = False
        return super().__contains__(key)


class _ProcessorsOnDemand(dict[object, object]):
    """transformers' table of registered processors; medm registers its own after the known ones."""

    _registering = False

    def values(self) -> Any:
        return self._known_then_own()

    def _known_then_own(self) -> Iterator[object]:
        known = list(super().values())
        yield from known
        if self._registering:
            return
        self._registering = True
        try:
            _register()
        finally:
            self._registering = False
        yield from list(super().values())[len(known) :]


def _patch_configs(module: ModuleType) -> None:
    _replace_table(module, "CONFIG_MAPPING", _ConfigsOnDemand)


def _patch_processors(module: ModuleType) -> None:
    _replace_table(module, "PROCESSOR_MAPPING", _ProcessorsOnDemand)


def _replace_table(
    module: ModuleType, name: str, on_demand: Callable[[dict[str, object]], object]
) -> None:
    """Replace the table of registered classes by one that asks medm."""
    table: Any = getattr(module, name, None)
    known = getattr(table, "_extra_content", None)
    if isinstance(known, dict):
        table._extra_content = on_demand(known)
    else:
        _warn(f"its table {name} has changed")


def _warn(cause: str) -> None:
    version = getattr(sys.modules.get("transformers"), "__version__", "of an unknown version")
    logger.warning(
        "transformers %s: %s, so its Auto classes do not open medm's folders by themselves; call "
        "medm.models.auto.register() first, or use medm.load. docs/versions.md lists the tested "
        "versions",
        version,
        cause,
    )


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _patch_configs,
    "transformers.models.auto.processing_auto": _patch_processors,
}


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Runs a function on one module right after the module is executed.

    Args:
        name: of the module.
        patch: the function.
    """

    def __init__(self, name: str, patch: Callable[[ModuleType], None]) -> None:
        self.name, self.patch = name, patch

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
        self.patch(module)
