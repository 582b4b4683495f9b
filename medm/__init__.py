"""medm: a factory for small medical vision-language models. Not for clinical use.

`import medm` makes transformers' Auto classes open medm's checkpoints, and imports neither torch nor
transformers: the classes are registered when transformers first meets a model type of medm.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"
_PREFIX = "medm-"
"""What the `model_type` of every checkpoint of medm begins with."""


class _OnDemand(dict[str, Any]):
    """transformers' table of outside configs, which asks medm for its own when one is looked up.

    Registering any earlier would import the models while transformers itself is half imported.
    """

    def __missing__(self, key: str) -> Any:
        if self._register(key):
            return self[key]
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._register(key)

    def _register(self, key: object) -> bool:
        if not (isinstance(key, str) and key.startswith(_PREFIX)) or getattr(self, "_registering", False):
            return False
        from medm.models.auto import register

        self._registering = True
        try:
            register()
        finally:
            self._registering = False
        return super().__contains__(key)


class _TeachAutoConfig(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Puts the table in place right after transformers' module of it is executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AUTO_CONFIG:
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
        _teach(module)


def _teach(module: ModuleType) -> None:
    module.CONFIG_MAPPING._extra_content = _OnDemand(module.CONFIG_MAPPING._extra_content)


if _AUTO_CONFIG in sys.modules:
    _teach(sys.modules[_AUTO_CONFIG])
else:
    sys.meta_path.insert(0, _TeachAutoConfig())
