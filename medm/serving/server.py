"""A server process: it listens, loads the model, and drains at SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

try:
    import resource
except ImportError:  # not on every system
    resource = None  # type: ignore[assignment]

from medm.errors import MedmError
from medm.serving.app import build_app
from medm.serving.limits import KEY_VARIABLE, Gate, read_api_key
from medm.serving.listening import OWN_HOSTS, SWEEP_TICKS, listen, quiet_config, url_of
from medm.serving.options import ServeOptions
from medm.serving.service import Service

logger = logging.getLogger(__name__)

_KEEP_ALIVE_SECONDS = 15
_CLOSE_SECONDS = 5
"""For connections that do not close after their requests were ended."""


class Server(uvicorn.Server):
    """A server that goes on answering while it drains.

    At the first signal, new requests get status 503 and running ones are finished, up to
    `drain_seconds`. A second signal ends it at once.

    Args:
        gate: the application.
        options: its time limit.
    """

    def __init__(self, gate: Gate, options: ServeOptions) -> None:
        config = quiet_config(
            gate,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_CLOSE_SECONDS,
        )
        super().__init__(config)
        self.gate = gate
        self.service, self.drain_seconds = gate.service, options.drain_seconds
        self._draining: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self._draining is None:
            self._draining = time.monotonic()
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Look, every tenth of a second, whether the server ends."""
        if self._draining is not None and not self.should_exit:
            worker, jobs = self.service.worker, self.service.jobs
            if worker.state in ("ready", "loading"):
                logger.info("draining: %d requests and %d jobs run", worker.open, jobs.open)
                self.service.drain()
            late = time.monotonic() - self._draining > self.drain_seconds
            if late:
                logger.warning("ended with %d requests open", worker.open)
            self.should_exit = late or not (worker.open or jobs.open or self.gate.bodies)
        if counter % SWEEP_TICKS == 0:  # files of patients go even if no request comes
            await asyncio.to_thread(self.service.sweep)
        return await super().on_tick(counter)


def serve(options: ServeOptions, *, on_listening: Callable[[str], None] | None = None) -> None:
    """Serve a model until a signal ends the server.

    Args:
        options: of the server.
        on_listening: told the address, before the model is loaded.

    Raises:
        CheckpointError: the model cannot be loaded or is not served.
        DeviceError: the device or the port is not available.
        MedmError: an API key is missing or unfit.
    """
    key = read_api_key(options.api_key_file)
    if key is None and options.host not in OWN_HOSTS:
        raise MedmError(
            f"--host {options.host} is reachable by other machines: expected an API key, by "
            f"--api-key-file or the environment variable {KEY_VARIABLE}"
        )
    _raise_file_limit()
    with listen(options.host, options.port) as listener:
        service = Service.of(options)
        server = Server(build_app(service, key=key), options)

        def stop() -> None:
            server.should_exit = True

        service.worker.on_failure = stop
        if on_listening is not None:
            on_listening(url_of(listener, options.host))
        try:
            server.run(sockets=[listener])
        finally:
            service.close()
        if service.worker.failure is not None:
            raise service.worker.failure


def _raise_file_limit() -> None:
    """Allow as many connections as the system does: each takes a descriptor."""
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
