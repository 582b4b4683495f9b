"""The held-out records of the quickstart, one file a task: `medm eval --task custom` scores one file with its metrics.

    python examples/uni_med_demo/split.py [records, by default work_dirs/quickstart/data/tasks_test.json] [folder]

Records of volumes that are fetched, and not part of the repository, are left out, so that the table is always the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
RECORDS = REPOSITORY / "work_dirs" / "quickstart" / "data" / "tasks_test.json"


def main(arguments: list[str]) -> int:
    """Write `test_<task>.json` for each task. Returns the exit status."""
    source = Path(arguments[0]) if arguments else RECORDS
    folder = Path(arguments[1]) if len(arguments) > 1 else source.parent
    by_task: dict[str, list[dict[str, Any]]] = {}
    for record in json.loads(source.read_text(encoding="utf-8")):
        if record["split"] == "test":
            # The files lie beside the images, so that one folder holds all that a benchmark needs.
            images = [f"images/{name}" for name in record["image"]]
            by_task.setdefault(record["task"], []).append({**record, "image": images})
    for task, records in by_task.items():
        text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
        (folder / f"test_{task}.json").write_text(text, encoding="utf-8")
        print(f"  {task:<8} {len(records)} questions about volumes that were held out")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
