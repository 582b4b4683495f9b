"""medm: a factory for small medical vision-language models. Not for clinical use.

`import medm` makes transformers' Auto classes open medm's checkpoints. It imports neither torch nor
transformers: the classes are registered when transformers' Auto module is loaded, or at once if it is.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

__version__ = "0.1.0"

_AUTO = "transformers.models.auto.modeling_auto"


class _RegisterWithAuto(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Registers medm's classes right after transformers' Auto module is executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AUTO:
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
        _register()


def _register() -> None:
    from medm.models.auto import register

    register()


if _AUTO in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterWithAuto())
