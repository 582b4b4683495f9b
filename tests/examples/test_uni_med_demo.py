"""The demonstration's files fit each other: tasks, metrics and recipes."""

import json
import re
import subprocess
import sys
from pathlib import Path

from medm.metrics import METRICS
from medm.training.recipe import differences, load_recipe, resolved

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "uni_med_demo"


def test_held_out_records_are_one_file_a_task_without_what_is_fetched(tmp_path):
    records = [
        {"id": str(i), "task": task, "split": split, "image": ["a.png"], "answer": "x", "conversations": []}
        for i, (task, split) in enumerate([("rec", "test"), ("rec", "extra"), ("vqa", "test")])
    ]
    (tmp_path / "all.json").write_text(json.dumps(records), encoding="utf-8")
    command = [sys.executable, str(DEMO / "split.py"), str(tmp_path / "all.json"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.glob("test_*")) == ["test_rec.json", "test_vqa.json"]
    (record,) = json.loads((tmp_path / "test_rec.json").read_text(encoding="utf-8"))
    assert record["id"] == "0"
    assert record["image"] == ["images/a.png"]


def test_every_task_is_scored_with_metrics_that_exist():
    script = (DEMO / "run.sh").read_text(encoding="utf-8")
    jobs = dict(re.findall(r'"(\w+) \[([\w,-]+)\]"', script))
    recipe = load_recipe(ROOT / "recipes" / "uni-med-demo" / "experts.yaml")
    assert set(jobs) == set(recipe.model.tasks)
    assert all(name in METRICS for names in jobs.values() for name in names.split(","))


def test_the_baseline_differs_in_the_gate_alone():
    experts, dense = (
        resolved(load_recipe(ROOT / "recipes" / "uni-med-demo" / f"{name}.yaml")) for name in ("experts", "dense")
    )
    changed = [line.partition(":")[0] for line in differences(experts, dense)]
    assert changed == ["model.branches.image.connector.gate"]
