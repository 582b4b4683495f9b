"""medm's classes in transformers' Auto registries.

With them no remote code is needed to open a checkpoint.
"""

from __future__ import annotations


def register() -> None:
    """Register the classes of every kind of model with transformers' Auto classes.

    Kinds of other packages and of plug-in files are among them, as far as the table
    `medm.models.kinds` has them now; a later call registers what was added since. `import medm` has
    this done when transformers first meets a folder of medm. medm's own functions that open a
    folder call it too, so that they need no hook.

    Raises:
        TypeError: a kind is incomplete.
    """
    from transformers import AutoConfig, AutoProcessor

    from medm.models.kinds import MODELS

    for name in MODELS.names():
        kind = MODELS.get(name)()
        AutoConfig.register(kind.config_class.model_type, kind.config_class, exist_ok=True)
        for auto in kind.auto_classes:
            auto.register(kind.config_class, kind.model_class, exist_ok=True)
        AutoProcessor.register(kind.config_class, kind.processor_class, exist_ok=True)
