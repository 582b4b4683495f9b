"""`python -m campaign [--only NAME] [--count N] [--seed S] [--jobs N] [--out FILE]`: the fault campaign.

Ends with status 1 if any outcome is not as intended.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

from campaign.harness import PartResult, run_part, scratch
from campaign.parts import PARTS, load
from campaign.report import all_right, as_markdown, machine, write

OUT = Path(__file__).parent / "results" / "last.md"


def main() -> None:
    """Run the parts in order; the table is written after each."""
    parser = argparse.ArgumentParser(prog="python -m campaign", description=__doc__)
    parser.add_argument(
        "--only", action="append", metavar="PART[:GROUP]",
        help=f"run this part alone; may be given several times. Parts: {', '.join(PARTS)}",
    )  # fmt: skip
    parser.add_argument("--count", type=int, help="cases of each group; each part has its default")
    parser.add_argument("--seed", type=int, default=0, help="of all draws")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1,
        help="cases at the same time; default: the number of cores",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=OUT, help="Markdown; a .json is beside it")
    arguments = parser.parse_args()
    chosen = [name.partition(":") for name in arguments.only or PARTS]
    if unknown := sorted({name for name, _, _ in chosen} - set(PARTS)):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    quiet()
    setting = {
        "seed": arguments.seed,
        "count": arguments.count or "defaults",
        "jobs": arguments.jobs,
        **machine(),
    }
    results: list[PartResult] = []
    for name, _, group in chosen:
        with scratch() as folder:
            result = run_part(
                load(name), count=arguments.count, seed=arguments.seed, folder=folder, only=group,
                jobs=arguments.jobs,
            )  # fmt: skip
        results.append(result)
        bad = len(result.bad())
        print(
            f"{name}: {len(result.outcomes)} tried, {bad} not as intended, {result.seconds:.0f} s",
            file=sys.stderr,
        )
        write(results, setting, arguments.out)
    print(as_markdown(results, setting))
    sys.exit(0 if all_right(results) else 1)


def quiet() -> None:
    """Silence what the cases log, and keep hubs and threads out of it."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }


if __name__ == "__main__":
    main()
