"""Entry point of `python -m medm`.

`medm launch` (with -P), `torchrun -m medm` and `deepspeed --module medm` start this module.
"""

import os
import sys

# Python puts the working folder first on the import path. Nothing is imported from there, not even
# `pathlib`, unless medm itself lies there.
_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
if not sys.flags.safe_path and os.path.realpath(sys.path[0]) != os.path.realpath(_HOME):
    del sys.path[0]

from medm.cli import main  # noqa: E402 (after the import path is as it has to be)

main()
