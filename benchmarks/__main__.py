"""`python -m benchmarks --profile cpu [P1 P7 ...]`: every cell beside its peer, a JSON, a table and
a chart.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import time
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import CELLS
from benchmarks.harness import ROUNDS, Cell, Result
from benchmarks.limits import measure_limits, versions
from benchmarks.report import draw, table

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure the cells in order; each result is printed and written at once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--profile", choices=["cpu", "h200"], default="cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="begin no cell later, and give each its share of what is left",
    )
    parser.add_argument(
        "names", nargs="*", help="cells by name, in this order; all of the profile without any"
    )
    arguments = parser.parse_args()
    quiet()
    known = {cell.name: cell for cell in CELLS}
    if unknown := sorted(set(arguments.names) - set(known)):
        parser.error(f"no such cell: {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [
        cell
        for cell in map(known.get, arguments.names or known)
        if cell and arguments.profile in cell.targets
    ]
    cuda = arguments.profile == "h200"
    if cuda and not torch.cuda.is_available():
        parser.error("profile h200 needs a CUDA device; none is there")
    limits = measure_limits(
        device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else torch.float32
    )
    print(
        f"{limits.device}, {limits.threads} threads: {limits.matmul / 1e9:.0f} GFLOP/s, reads "
        f"{limits.bandwidth / 1e9:.1f} GB/s, copies {limits.copy / 1e9:.1f} GB/s"
    )
    end = time.monotonic() + 60 * arguments.minutes
    failed = []
    for number, cell in enumerate(chosen):
        left = end - time.monotonic()
        if left <= 0:
            print(f"no time is left for {' '.join(cell.name for cell in chosen[number:])}")
            break
        release_memory()
        result = measured(
            cell(arguments.profile), arguments.rounds, seconds=left / (len(chosen) - number)
        )
        print(line(result), flush=True)
        write(arguments.output, arguments.profile, result, asdict(limits))
        failed += [cell.name] if result.status == "failed" else []
    if failed:
        raise SystemExit(f"failed: {' '.join(failed)}")


def measured(cell: Cell, rounds: int, *, seconds: float) -> Result:
    """One cell. An error becomes its result; the results of the other cells are kept."""
    try:
        return cell.measure(rounds, until=time.monotonic() + seconds)
    except Exception as error:  # noqa: BLE001 (whatever it is, the figures of the other cells are worth having)
        traceback.print_exc()
        reason = str(error).strip().splitlines()
        return cell.failed(f"FAILED: {type(error).__name__}: {reason[0] if reason else ''}"[:300])


def release_memory() -> None:
    """Free the memory of the last cell. Raises if a kernel has left the device unusable."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def line(result: Result) -> str:
    """Return one line that describes the result of a cell."""
    if math.isnan(result.value):
        return f"{result.name:5} {result.title}: {result.gate}"
    aim = (
        "no target"
        if result.target is None
        else f"target {'<=' if result.at_most else '>='} {result.target:g}"
    )
    verdict = {True: "reached", False: "NOT reached", None: ""}[result.reached]
    return (
        f"{result.name:5} {result.title}: {result.value:.3g} [{result.low:.3g}, "
        f"{result.high:.3g}], {aim}, {verdict}; {result.status}; {result.gate}"
    )


def write(folder: Path, profile: str, result: Result, limits: dict[str, Any]) -> None:
    """`<profile>.json`, `.md` and `.png`; cells that were not measured this time keep their last
    figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{profile}.json"
    kept = json.loads(file.read_text(encoding="utf-8"))["cells"] if file.exists() else {}
    kept[result.name] = result.as_dict()
    ordered = {cell.name: kept[cell.name] for cell in CELLS if cell.name in kept}
    content = {"profile": profile, "limits": limits, "versions": versions(), "cells": ordered}
    file.write_text(json.dumps(content, indent=1, default=float) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(table(content), encoding="utf-8")
    draw(content, file.with_suffix(".png"))


def quiet() -> None:
    """Print the table."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("medm").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    main()
