"""`make gpu` runs from start to end without a card, with what a bare machine has, and shows what did not finish."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_card import Card, attention_of, slug, table, updates_in_time, write_records

ROOT = Path(__file__).resolve().parent.parent
# What a machine with torch may lack.
MISSING = ("constriction", "datasets", "hypothesis", "matplotlib", "pyppmd", "tyro", "xdist")


def test_what_make_gpu_uses_needs_no_extra_package():
    """bench.py, llm.py and the GPU tests import without them; matplotlib is for pictures only."""
    code = f"""
import sys
# What importlib finds of an absent package.
sys.modules.update(dict.fromkeys({MISSING!r}))
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import bench, llm, test_gpu, gpu_card
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_parts_that_fail_or_last_too_long_are_shown(tmp_path):
    """The parts after them run all the same, and their numbers are in the record."""
    folder = tmp_path / "files"
    folder.mkdir()
    card = Card(folder, sys.executable, is_dry=True)
    card.run("too long", ["-c", "import time; print('begun'); time.sleep(60)"], 0.5, lambda: {"n": 1})
    card.run("broken", ["-c", "raise SystemExit('no memory left')"], 20, lambda: json.loads("half of"))
    card.run("good", ["-c", "print('fine')"], 20, lambda: {"kB/s": 3.5})
    assert [part.state for part in card.parts] == ["not finished in 1 s", "failed: no memory left", "done"]
    assert card.parts[0].seconds < 20 and card.parts[0].result == {"n": 1}
    printed = table(card)
    assert "| good | kB/s 3.5 |" in printed and "| broken | - |" in printed
    write_records(card, tmp_path / "record", "NVIDIA H100 80GB HBM3")
    numbers = json.loads((tmp_path / "record" / "card.json").read_text())
    assert [part["state"] for part in numbers["parts"]] == [part.state for part in card.parts]
    readme = (tmp_path / "record" / "README.md").read_text()
    assert "make gpu" in readme and "no memory left" in readme
    assert all(len(line) <= 120 for line in readme.splitlines())


def test_a_part_has_no_more_time_than_is_left(tmp_path):
    card = Card(tmp_path, sys.executable, is_dry=True)
    card.begin -= 530
    part, process = card.start("late", ["-c", "pass"], 300)
    card.finish(part, process, dict)
    assert 1 <= part.limit_s <= 10


def test_updates_that_fit_into_the_time():
    assert updates_in_time({"step ms": 100.0}) == 300
    assert updates_in_time({"step ms": 1.0}) == 1000
    assert updates_in_time({"step ms": 60_000.0}) == 100
    assert updates_in_time({}) == 333
    assert slug("NVIDIA GeForce RTX 4090") == "nvidia_geforce_rtx_4090"


def test_attention_by_shape(tmp_path):
    path = tmp_path / "attention.json"
    path.write_text(json.dumps({"medium": {"flex ms": 1.234, "varlen ms": 0.5}, "large": {"failed": "no varlen"}}))
    assert list(attention_of(path).values()) == ["1.23, 0.50", "no varlen"]


@pytest.mark.slow
def test_a_dry_run_goes_from_start_to_end(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "gpu_card.py"), "--dry_run", "--records", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    (folder,) = tmp_path.iterdir()
    numbers = json.loads((folder / "card.json").read_text())
    states = {part["name"]: part["state"] for part in numbers["parts"]}
    # On a busy CPU a part may take longer than a GPU may; it then says so, and nothing fails.
    assert all(state == "done" or state.startswith("not finished") for state in states.values()), states
    assert len(states) == 9 and "| part | result |" in done.stdout
    # The generation's numbers are bench.py's own.
    assert "generation" in numbers or states["generation"] != "done"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so():
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "gpu_card.py")], capture_output=True, text=True)
    assert done.returncode == 2 and "--dry_run" in done.stderr
