"""`medm serve`: the HTTP server from the command line."""

from __future__ import annotations

import gc
from importlib.util import find_spec

from medm.cli.console import note, out
from medm.cli.option_flags import Flag, Typed, flags_of

_PACKAGES = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client", "python_multipart")


def flags() -> list[Flag]:
    """Return the flags of the command: every field of its options."""
    from medm.serving.options import ServeOptions

    return flags_of(ServeOptions)


def serve(typed: Typed) -> None:
    """Serve a model over HTTP in OpenAI's format. Not for clinical use.

    The key is read from --api-key-file or the environment variable MEDM_API_KEY; an address that
    other machines can reach needs one. SIGTERM and SIGINT (Ctrl-C) let running requests finish.
    """
    from medm.config import validate
    from medm.errors import DeviceError
    from medm.serving.options import ServeOptions

    options = validate(ServeOptions, typed.under({}), source="medm serve", shown=typed.shown)
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise DeviceError(f"medm serve needs {', '.join(missing)}; pip install 'medm[serve]'")
    from medm.serving.server import serve as run

    def listening(address: str) -> None:
        out.print(address, markup=False)
        note("The model is loading; /health/ready says when requests are taken.")
        note("Not for clinical use: replies can be wrong in every way.")

    run(options, on_listening=listening)
    gc.freeze()  # the end of Python would visit every object of its libraries: seconds
