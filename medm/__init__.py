"""medm: small vision-language models for 2-D and 3-D medical images. Not for clinical use.

`import medm` makes transformers' Auto classes open medm's folders (`medm.transformers_hook`), and
imports neither torch nor transformers. `medm.load` opens a folder to ask it questions (`medm.api`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medm import transformers_hook

if TYPE_CHECKING:
    from medm.api import Model, load

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import `medm.load` and `medm.Model` on first use."""
    if name not in ("load", "Model"):
        raise AttributeError(f"module 'medm' has no attribute {name!r}")
    from medm import api

    globals().update(load=api.load, Model=api.Model)
    return globals()[name]


transformers_hook.install()
