"""Several processes of one command stop, fail and end as one. Here they are programs of a few
lines, without torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from medm import launcher
from medm.launcher import Launcher, Place

PREAMBLE = """
import os, pathlib, signal, sys, time
from medm.launcher import LINK
LINK.join()
rank, folder = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])
def touch(name):
    (folder / f"{name}-{rank}").touch()
def others(name):
    while len(list(folder.glob(f"{name}-*"))) < 2: time.sleep(0.01)
"""

GRACEFUL = """
stopped = 0
def stop(number, frame):
    global stopped
    stopped += 1
for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, stop)
touch("ready")
while not stopped: time.sleep(0.02)
"""
"""A rank that is told to stop, as training is."""


def launch(folder: Path, script: str, *, processes: int = 2) -> int:
    program = (sys.executable, "-P", "-c", PREAMBLE + script)
    return Launcher([str(folder)], Place(processes), program=program).run()


def signal_when_ready(
    folder: Path, *numbers: signal.Signals, pause: float = 0.2
) -> threading.Thread:
    """Send this process signals once both ranks wait for them."""

    def send() -> None:
        while len(list(folder.glob("ready-*"))) < 2:
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(pause)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def alive(folder: Path) -> list[int]:
    """Processes that have the folder among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (
                str(folder).encode() in (path / "cmdline").read_bytes()
                and int(path.name) != os.getpid()
            ):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def test_ranks_are_told_where_they_stand(tmp_path: Path) -> None:
    names = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
    )
    script = (
        "import json\ntouch('x'); (folder / f'{rank}').write_text(json.dumps([os.environ[n] "
        f"for n in {names}]))"
    )
    program = (sys.executable, "-P", "-c", PREAMBLE + script)
    place = Place(2, nodes=2, node_rank=1, master_addr="127.0.0.1", master_port=29500)
    assert Launcher([str(tmp_path)], place, program=program).run() == 0
    told = [json.loads((tmp_path / str(rank)).read_text()) for rank in (2, 3)]
    assert [values[:6] for values in told] == [
        ["2", "0", "4", "2", "127.0.0.1", "29500"],
        ["3", "1", "4", "2", "127.0.0.1", "29500"],
    ]
    assert int(told[0][6]) >= 1


def test_ranks_can_listen_on_the_port_that_is_kept_for_them(tmp_path: Path) -> None:
    script = """
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 1, True)
store.set("key", "value")
"""
    assert launch(tmp_path, script, processes=1) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_waits_for_what_is_written_however_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """One rank writes, the other has ended: longer than the grace that ranks have otherwise.
    Signals again do nothing."""
    monkeypatch.setattr(launcher, "GRACE", 0.2)
    script = GRACEFUL + (
        "if rank == 0:\n"
        "    with LINK.writing():\n"
        "        time.sleep(1.2); (folder / 'checkpoint').write_text('whole')\n"
        "(folder / f'signals-{rank}').write_text(str(stopped))\n"
        "raise SystemExit(75)\n"
    )
    sender = signal_when_ready(tmp_path, number, signal.SIGINT, signal.SIGTERM)
    assert launch(tmp_path, script) == 75
    sender.join()
    assert (tmp_path / "checkpoint").read_text() == "whole"
    assert alive(tmp_path) == []
    assert (tmp_path / "signals-1").read_text() == "1", "a stop reaches a rank once"


def test_a_rank_that_does_not_stop_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "GRACE", 0.2)
    script = GRACEFUL + "while rank == 0: time.sleep(1)\nraise SystemExit(75)\n"
    sender = signal_when_ready(tmp_path, signal.SIGTERM)
    assert launch(tmp_path, script) == 75
    sender.join()
    assert alive(tmp_path) == []


def test_a_stop_before_the_ranks_listen_is_a_stop(tmp_path: Path) -> None:
    sender = signal_when_ready(tmp_path, signal.SIGTERM)
    assert launch(tmp_path, "touch('ready'); time.sleep(60)") == 75
    sender.join()


def test_a_rank_that_loses_its_stopped_neighbor_is_stopped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before the first step one rank ends at once; the other, already further, fails in a
    collective."""
    script = """
def stop(number, frame):
    touch("left")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop if rank else signal.SIG_IGN)
touch("ready")
while not (folder / "left-1").exists() or rank: time.sleep(0.02)
time.sleep(1)
LINK.report("Traceback: connection closed by peer", traceback=True)
sys.exit(1)
"""
    thread = signal_when_ready(tmp_path, signal.SIGTERM)
    assert launch(tmp_path, script) == 75
    thread.join()
    assert "connection closed" not in capfd.readouterr().err


def test_a_rank_that_fails_before_its_neighbor_stops_is_a_failure(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = """
def fail(number, frame):
    LINK.report("error: disk full")
    touch("failed")
    sys.exit(1)
def stop(number, frame):
    while not (folder / "failed-0").exists(): time.sleep(0.02)
    time.sleep(0.2)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop if rank else fail)
touch("ready")
while True: time.sleep(0.02)
"""
    thread = signal_when_ready(tmp_path, signal.SIGTERM)
    assert launch(tmp_path, script) == 1
    thread.join()
    assert "disk full" in capfd.readouterr().err


def test_a_run_that_finished_all_the_same_is_finished(tmp_path: Path) -> None:
    sender = signal_when_ready(tmp_path, signal.SIGTERM)
    assert launch(tmp_path, GRACEFUL) == 0
    sender.join()


def test_sigquit_ends_all_at_once(tmp_path: Path) -> None:
    sender = signal_when_ready(tmp_path, signal.SIGTERM, signal.SIGQUIT)
    with pytest.raises(SystemExit) as status:
        launch(
            tmp_path,
            "os.fork() or time.sleep(60)" + GRACEFUL + "with LINK.writing(): time.sleep(60)",
        )
    sender.join()
    assert status.value.code == 128 + signal.SIGQUIT
    assert alive(tmp_path) == []


@pytest.mark.skipif(
    sys.platform != "linux", reason="other systems do not tell a process that its parent died"
)
def test_ranks_whose_launcher_is_killed_stop_by_themselves(tmp_path: Path) -> None:
    rank = PREAMBLE + GRACEFUL + "touch('checkpoint')"
    script = (
        "import sys; from medm.launcher import Launcher, Place\n"
        f"Launcher([sys.argv[1]], Place(2), program=(sys.executable, '-P', '-c', {rank!r})).run()"
    )
    parent = subprocess.Popen([sys.executable, "-P", "-c", script, str(tmp_path)])
    sender = signal_when_ready(tmp_path)
    sender.join()
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while alive(tmp_path) and time.monotonic() < until:
        time.sleep(0.05)
    assert alive(tmp_path) == []
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


FAILURES = {
    "both meet the same error": (
        "LINK.report('error: no such file'); raise SystemExit(2)",
        2, ["error: no such file"],
    ),
    "one meets an error, the other loses its connection": (
        "signal.signal(signal.SIGTERM, lambda *_: None); touch('up'); others('up')\nif rank == " "1: LINK.report('error: record 7 is bad'); raise SystemExit(1)\ntime.sleep(0.5); " "LINK.report('Traceback:\\n  File\\nRuntimeError: connection closed', " "traceback=True)\nraise SystemExit(1)",
        1, ["error: record 7 is bad", "process 0 ended after it: RuntimeError: connection closed"],
    ),
    "a defect": (
        "if rank == 0: LINK.report('Traceback:\\n  File\\nKeyError: 1', traceback=True); raise " "SystemExit(1)\ntime.sleep(60)",
        1, ["Traceback:", "  File", "KeyError: 1"],
    ),
    "one is killed": (
        "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)",
        1, ["error: process 1 was ended by SIGKILL (the system may have run out of memory)"],
    ),
    "one says nothing": (
        "if rank == 1: os._exit(7)\ntime.sleep(60)",
        7, ["error: process 1 ended with status 7"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_ends_all_and_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    script, status, lines = FAILURES[case]
    started = time.monotonic()
    # No rank fails before both are connected, and ready for the stop that follows.
    script = script if "others('up')" in script else f"touch('up'); others('up')\n{script}"
    assert launch(tmp_path, script) == status
    assert time.monotonic() - started < launcher.GRACE
    assert capfd.readouterr().err.splitlines() == lines
    assert alive(tmp_path) == []


def test_what_a_dead_neighbor_leaves_half_written_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 dies while rank 0 writes a checkpoint beside its training: the checkpoint becomes
    whole."""
    monkeypatch.setattr(launcher, "GRACE", 0.2)
    script = (
        "import threading\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "def write():\n"
        "    with LINK.writing(): touch('begun'); time.sleep(1); touch('whole')\n"
        "if rank == 0: threading.Thread(target=write, daemon=True).start(); time.sleep(60)\n"
        "while not (folder / 'begun-0').exists(): time.sleep(0.01)\n"
        "os._exit(3)\n"
    )
    assert launch(tmp_path, script) == 3
    assert (tmp_path / "whole-0").exists()
    assert alive(tmp_path) == []


def test_the_shell_of_a_launcher_becomes_the_run(tmp_path: Path) -> None:
    """So signals to it reach the run, and nothing trains on after it ended."""
    medm = tmp_path / "medm"
    medm.write_text('#!/bin/sh\necho "$$ $GPUS $*"\nexit 75\n')
    medm.chmod(0o755)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "GPUS": "3"}
    for script, command in (
        ("train/finetune.sh", "train"),
        ("eval/inference.sh", "infer"),
        ("eval/slake.sh", "eval"),
    ):
        shell = subprocess.Popen(
            ["bash", str(root / "scripts" / script)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        out, _ = shell.communicate()
        assert shell.returncode == 75
        assert out.split()[:4] == [str(shell.pid), "3", "launch", command]
