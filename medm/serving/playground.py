"""The playground: a web page of this process for one model, or two side by side.

    playground(PlaygroundOptions(models=["work_dirs/finetune"]), on_listening=print)

Uploads, masks and what the viewer shows are files in private folders, which are deleted at the end.
No other host is asked, neither by this process nor by the page.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

from medm.errors import MedmError
from medm.serving.files import FileStore
from medm.serving.listening import OWN_HOSTS, SWEEP_TICKS, listen, quiet_config, url_of
from medm.serving.playground_guard import Guard, Passwords, read_passwords
from medm.serving.playground_options import PlaygroundOptions
from medm.serving.playground_session import Sessions, ViewerFiles
from medm.serving.playground_viewer import FILES, Views
from medm.serving.worker import Worker

logger = logging.getLogger(__name__)

_STATIC = Path(__file__).parent / "static"
_CLOSE_SECONDS = 2
"""For the open connections of pages at the end."""
_QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
"""Variables that keep gradio from asking its own servers."""


def playground(
    options: PlaygroundOptions, *, on_listening: Callable[[str], None] | None = None
) -> None:
    """Serve the page until a signal ends it.

    Args:
        options: of the page.
        on_listening: told the address, once the models are loaded.

    Raises:
        CheckpointError: a model cannot be loaded or is not served.
        DeviceError: the device or the port is not available.
        MedmError: other machines can reach the address, and there is no file of passwords.
    """
    passwords = require_passwords(options)
    with listen(options.host, options.port) as listener, application(options, passwords) as app:
        server = server_of(app)
        for worker in app.workers:
            worker.on_failure = server.stop
        if on_listening is not None:
            on_listening(url_of(listener, options.host))
        server.run(sockets=[listener])
        for worker in app.workers:
            if worker.failure is not None:
                raise worker.failure


def require_passwords(options: PlaygroundOptions) -> Passwords | None:
    """Return the passwords of a page; None for one of this machine alone. Raises `MedmError`."""
    if options.auth_file is not None:
        return read_passwords(options.auth_file)
    if options.host not in OWN_HOSTS:
        raise MedmError(
            f"--host {options.host} is reachable by other machines: expected --auth-file, a file "
            "with user:password in each line"
        )
    return None


class Server(uvicorn.Server):
    """The server of the page; it writes no log of requests.

    Args:
        app: the page.
    """

    def __init__(self, app: Application) -> None:
        super().__init__(quiet_config(app.guard, timeout_graceful_shutdown=_CLOSE_SECONDS))
        self.app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal. It is not raised again: files are deleted after the server has ended."""
        self.should_exit, self.force_exit = True, self.should_exit

    async def on_tick(self, counter: int) -> bool:
        """Delete expired files from time to time: they go even if no request comes."""
        if counter % SWEEP_TICKS == 0:
            await asyncio.to_thread(self.app.sweep)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the connections. Those of open pages are cut, which is no error to report."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)

    def stop(self) -> None:
        """End the server."""
        self.should_exit = True


class Application:
    """A page with its models and files.

    Args:
        guard: the page (ASGI).
        workers: its models, ready.
        sessions: its open pages.
        uploads: folder of gradio, where an upload lies until the page adds it.
    """

    def __init__(
        self, guard: Guard, workers: Sequence[Worker], sessions: Sessions, uploads: Path
    ) -> None:
        self.guard, self.workers, self.sessions = guard, workers, sessions
        self.uploads = uploads

    def sweep(self) -> None:
        """Delete what belongs to pages without a request, and uploads that no page added."""
        self.sessions.sweep()
        oldest = time.time() - self.sessions.keep_seconds
        for path in self.uploads.rglob("*"):
            with suppress(OSError):  # added by a page meanwhile
                if path.is_file() and path.stat().st_mtime < oldest:
                    path.unlink()


def server_of(app: Application) -> Server:
    """Return the server of a page."""
    return Server(app)


@contextmanager
def application(
    options: PlaygroundOptions, passwords: Passwords | None = None
) -> Iterator[Application]:
    """Give the page; inside the block the models are loaded, at its end every file is deleted.

    Raises:
        CheckpointError: a model cannot be loaded or is not served.
        DeviceError: the device is not available.
    """
    with ExitStack() as stack:
        uploads = stack.enter_context(tempfile.TemporaryDirectory(prefix="medm-uploads-"))
        os.environ.update(_QUIET | {"GRADIO_TEMP_DIR": uploads})
        workers = [Worker(options.of_worker(model)) for model in options.models]
        logger.info("loading %s", ", ".join(_names(options.models)))
        for worker in workers:  # one by one: transformers loads no two models at a time
            stack.callback(worker.close)
            worker.start()
            worker.wait_ready()
        keep = 60.0 * options.keep_minutes
        decoders = workers[0].decoders
        store = FileStore(
            decoders,
            limits=options.limits,
            keep_seconds=keep,
            max_bytes=options.storage_mb * 2**20,
        )
        files = ViewerFiles()
        sessions = Sessions(store, files, keep_seconds=keep)
        stack.callback(sessions.close_all)
        app = _routes(options, workers, sessions, Views(decoders, files))
        yield Application(Guard(app, passwords), workers, sessions, Path(uploads))


def _routes(
    options: PlaygroundOptions, workers: Sequence[Worker], sessions: Sessions, views: Views
) -> FastAPI:
    # gradio reads its variables when it is imported.
    import gradio

    from medm.serving.playground_page import HEAD, STATIC, Playground, build_page, theme

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.mount(f"/{STATIC}", StaticFiles(directory=_STATIC))

    @app.get(f"/{FILES}/{{name}}")
    def viewer_file(name: str) -> Response:
        path = sessions.viewer_files.find(name)
        return Response(status_code=404) if path is None else FileResponse(path)

    play = Playground(dict(enumerate(workers)), _names(options.models), sessions, views)
    page = build_page(play)
    # gradio takes paths outside of its upload folder until `launch` sets this; mounting does not.
    page.has_launched = True
    return gradio.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        max_file_size=options.limits.max_file_bytes,
        theme=theme(),
        head=HEAD,
    )


def _names(models: Sequence[str]) -> list[str]:
    """Return the names of models: of their folders, or their paths where these are alike."""
    names = [Path(model).resolve().name for model in models]
    return names if len(set(names)) == len(names) else list(models)
