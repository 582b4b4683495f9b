"""A server on a loopback address and its clients: mixed requests, of which some leave early.

Only 127.0.0.1 is asked, every loop has an end, and no client waits longer than `SECONDS`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.workloads import Sizes
from medm.config import validate
from medm.models import build
from medm.models.lvlm.options import LVLMOptions
from medm.types import JsonObject

SECONDS = 600
"""After which a client gives up."""
_READY_SECONDS = 120
_TRIES = 2000
_CONTROL = ("<|im_start|>", "<|im_end|>")
_CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request."""

    status: int
    """Of the last try; 0 where the connection failed."""
    seconds: float
    """From the first try to the end of the response."""
    reply: str = ""
    complete: bool = False
    """The reply came with its end."""
    left: bool = False
    """The client closed the connection on purpose, after the first bytes of its response."""
    error: str = ""
    """Why there is no reply: the error of the connection, or the body of the response."""


def save_model(folder: Path, sizes: Sizes) -> Path:
    """Save a random model of a workload with a byte-level tokenizer, and return its folder.

    Its weights are far enough apart that replies differ. It never generates an end token, so that
    every reply is as long as it is asked to be.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Texts become bytes; the other tokens have words of their own in replies.
    size = int(sizes.text["vocab_size"]) - len(_CONTROL)
    words = [*alphabet, *(f"w{number}" for number in range(len(alphabet), size))]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in _CONTROL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = _CHATML
    text = sizes.text | {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**text))
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    section = {
        "llm": {"name": "llama-3.2", "path": str(folder / "llm")},
        "branches": {
            "image": {
                "encoder": {"name": "siglip", "architecture": dict(sizes.vision)},
                "connector": {"name": "mlp", "depth": 2},
            }
        },
    }
    model, processor = build(validate(LVLMOptions, section, source="benchmarks"))
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


@dataclass(slots=True)
class Running:
    """A server process."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def resident_mib(self) -> float:
        """Resident memory of the process."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def figure(self, name: str) -> float:
        """A figure of `/metrics`."""
        text = asyncio.run(get(self.port, "/metrics"))
        return float(next(line for line in text.splitlines() if line.startswith(name)).split()[1])

    def idle(self) -> bool:
        """True once no request is open, within some seconds."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if self.figure("medm_open_requests") == 0:
                return True
            time.sleep(0.1)
        return False


@contextmanager
def serving(model: Path, *, slots: int, queue: int) -> Iterator[Running]:
    """A server that is ready; it is drained at the end."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = int(taken.getsockname()[1])
        command = [
            sys.executable, "-P", "-m", "medm", "serve", "--model", str(model), "--name", "model",
            "--port", str(port), "--slots", str(slots), "--queue", str(queue),
        ]  # fmt: skip
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=stream)
        running = Running(process, port, log)
        try:
            end = time.monotonic() + _READY_SECONDS
            while "ready" not in asyncio.run(get(port, "/health/ready")):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the server does not start: {log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield running
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(90)
            finally:
                process.kill()


async def get(port: int, path: str) -> str:
    """The body of a page; empty where there is no server or no success."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
        )
        answer = (await asyncio.wait_for(reader.read(), 30)).decode()
        writer.close()
    except OSError:
        return ""
    head, _, body = answer.partition("\r\n\r\n")
    return body if " 200 " in head.partition("\r\n")[0] else ""


def mixed_requests(count: int, *, side: int, tokens: int, seed: int = 0) -> list[JsonObject]:
    """Bodies of requests: text alone, images, streamed or not, by turns."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(8):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(stream, "PNG")
        images.append("data:image/png;base64," + base64.b64encode(stream.getvalue()).decode())
    bodies = []
    for number in range(count):
        text = {"type": "text", "text": f"Question {number}: what is seen?"}
        content: list[JsonObject] = [text]
        if number % 2:
            image = {"type": "image_url", "image_url": {"url": images[number % len(images)]}}
            content = [image, text]
        bodies.append(
            {
                "model": "model",
                "messages": [{"role": "user", "content": content}],
                "max_tokens": int(rng.integers(tokens // 2, tokens + 1)),
                "stream": number % 4 > 1,
            }
        )
    return bodies


def ask_all(
    port: int, bodies: Sequence[JsonObject], *, at_once: int, leave: float = 0.0, seed: int = 0
) -> list[Outcome]:
    """Send all requests, so many at the same time, and return their outcomes in order.

    Args:
        port: of the server.
        bodies: of the requests.
        at_once: clients.
        leave: fraction of the requests whose client leaves a stream after its first bytes.
        seed: of the choice.
    """
    streamed = [number for number, body in enumerate(bodies) if body["stream"]]
    leavers = set(
        np.random.default_rng(seed).permutation(streamed)[: int(leave * len(bodies))].tolist()
    )

    async def run() -> list[Outcome]:
        free = asyncio.Semaphore(at_once)

        async def one(number: int) -> Outcome:
            async with free:
                return await _ask(port, bodies[number], leaves=number in leavers)

        return await asyncio.gather(*(one(number) for number in range(len(bodies))))

    return asyncio.run(run())


async def _ask(port: int, body: JsonObject, *, leaves: bool) -> Outcome:
    """One request; where the queue is full, it is sent again as `Retry-After` says."""
    start = time.perf_counter()
    content = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    ).encode()
    status = 0
    for number in range(_TRIES):
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(head + content)
                await writer.drain()
                answer = b""
                if leaves and body["stream"]:  # others have no response to leave in
                    answer = await asyncio.wait_for(reader.read(1024), SECONDS)
                    if answer.split(b" ")[1:2] == [b"200"]:
                        return Outcome(499, time.perf_counter() - start, left=True)
                answer += await asyncio.wait_for(reader.read(), SECONDS)
            finally:
                writer.close()
        except (OSError, TimeoutError) as error:
            return Outcome(0, time.perf_counter() - start, error=repr(error))
        first, _, rest = answer.decode().partition("\r\n")
        status = int(first.split()[1]) if first else 0
        if status != 429 or time.perf_counter() - start > SECONDS:
            text = rest.partition("\r\n\r\n")[2]
            reply, complete = _reply(text, stream=bool(body["stream"]))
            error = "" if complete else answer.decode()[-500:]
            return Outcome(status, time.perf_counter() - start, reply, complete, error=error)
        await asyncio.sleep(0.5 + 0.5 * (number % 7) / 7)
    return Outcome(status, time.perf_counter() - start)


def _reply(text: str, *, stream: bool) -> tuple[str, bool]:
    """Text of a response, and whether its end came."""
    if not stream:
        try:
            choice = json.loads(text)["choices"][0]
        except (ValueError, KeyError):
            return "", False
        return choice["message"]["content"], choice["finish_reason"] in ("stop", "length")
    reply, complete = "", False
    for line in text.split("\n"):  # the lengths of chunks are lines of their own
        if line.startswith("data: {"):
            found: Any = json.loads(line.removeprefix("data: "))
            for choice in found.get("choices", []):
                reply += choice["delta"].get("content", "")
                complete |= choice["finish_reason"] in ("stop", "length")
    return reply, complete and "data: [DONE]" in text
