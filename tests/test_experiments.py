"""experiments.py: steps that are made once and resumed, runs that fail, tables, records, commands, the study leak."""

import dataclasses
import fcntl
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import (
    CORPUS_FLAGS,
    ROOT,
    TINY_BLT,
    error_of,
    is_png,
    output_of,
    random_bytes,
    run_here,
    some_words,
    tiny_blt,
)

import experiment_steps
import experiment_studies
import experiments
from blt import studies, tasks
from blt.config import parse_config
from blt.corpus import is_own_output
from blt.files import write_json
from blt.flops import TRAINING, blt_flops, transformer_flops
from blt.metric import leak_gate
from blt.ngrams import DENSE_HASH_ROWS
from blt.patch_rules import PatchConfig
from blt.records import RunRecord
from blt.studies import (
    Column,
    Group,
    Made,
    Measured,
    Outcome,
    Run,
    Step,
    StepFailed,
    Study,
    StudyRuns,
    Workshop,
    continue_in,
    describe_seconds,
    groups_of,
    mean_and_deviation,
    paired_difference,
    read_curve_at,
    read_record,
    safe_name,
    study_table,
    values_in,
    wrapped_command,
    write_record,
)
from blt_model import BLTConfig, BLTModel
from entropy_patcher import EntropyPatcher
from experiment_steps import CONFIGS, Bench, read_curve, read_training
from experiments import STUDIES, ExperimentsConfig, LeakRows, OwnPatchBLT, leak_windows
from generate import generate
from llm import LLMConfig
from template_llm import TemplateConfig

# Steps and runs of a script that takes no time

FAKE = """
import argparse, json, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("value", "seed", "output", "fail", "sleep", "reads"):
    parser.add_argument(f"--{name}")
parser.add_argument("--resume", action="store_true")
flags = parser.parse_args()
output = pathlib.Path(flags.output)
output.mkdir(parents=True, exist_ok=True)
with open("calls.txt", "a") as calls:
    print(flags.value, flags.seed, "resumed" if flags.resume else "new", file=calls)
(output / "last.pt").write_text("checkpoint")
(output / "best.pt").write_text("weights")
if flags.sleep:
    (output / "sleeping").write_text("")
    time.sleep(float(flags.sleep))
if flags.fail and not flags.resume:
    print("fake.py: error: it was asked to fail", file=sys.stderr)
    sys.exit(3)
(output / "result.json").write_text(json.dumps({"val_bpb": float(flags.value) + int(flags.seed) % 10}))
"""


@pytest.fixture
def workshop(tmp_path):
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "fake.py").write_text(FAKE)
    made = Workshop(tmp_path / "work", scripts, echo=lambda line: None)
    made.folder.mkdir()
    return made


def fake_step(value=1, seed=1, **flags):
    return Step("fake", {"value": value, "seed": seed, **flags}, checkpoints="output")


def read_fake(folders):
    return json.loads((folders[-1] / "output" / "result.json").read_text())


def fake_run(name, value=1, seed=1, **flags):
    return Run(name, {"name": name}, [fake_step(value, seed, **flags)], read_fake)


def calls(workshop):
    path = workshop.folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def runs_of(workshop, make, seeds=(1,), summary=None, study_seeds=3):
    """The `StudyRuns` of a study whose runs for a seed are make(seed)."""
    study = Study("fake", "Does it work?", None, [Column("bpb", "val_bpb")], (None, "val_bpb", ()), summary=summary)
    return StudyRuns(study, "cpu", {seed: make(seed) for seed in seeds}, workshop, lambda step, flags: 100.0)


def run_all(planned):
    planned.run_all(lambda outcome: None, lambda outcome: None)


def test_a_step_is_made_once_and_shared_by_runs(workshop):
    shared = fake_step(5)

    def make(seed):
        return [
            Run("a", {}, [shared, fake_step(1, seed, reads=Made(shared))], read_fake),
            Run("b", {}, [shared, fake_step(2, seed, reads=Made(shared))], read_fake),
        ]

    run_all(runs_of(workshop, make))
    assert calls(workshop) == ["5 1 new", "1 1 new", "2 1 new"]
    # Another process that plans the same study knows what is there.
    again = runs_of(workshop, make)
    assert again.count("finished") == 2 and again.expected_seconds() == 0
    run_all(again)
    assert len(calls(workshop)) == 3


def test_checkpoints_go_and_weights_stay_where_they_are_read(workshop):
    shared = fake_step(5)
    last = fake_step(1, reads=Made(shared))
    run_all(runs_of(workshop, lambda seed: [Run("a", {}, [shared, last], read_fake)]))
    read, unread = (workshop.path_of(step, {}) for step in (shared, last))
    assert not list(workshop.folder.rglob("last.pt"))
    assert (read / "best.pt").exists() and not (unread / "best.pt").exists()
    # Weights that a later study reads are made again, from the beginning and not from what is left.
    third = fake_step(3, reads=Made(last))
    run_all(runs_of(workshop, lambda seed: [Run("c", {}, [last, third], read_fake)]))
    assert (unread / "best.pt").exists()
    assert calls(workshop)[2:] == ["1 1 new", "3 1 new"]


def test_a_changed_flag_makes_another_step(workshop):
    run_all(runs_of(workshop, lambda seed: [fake_run("a", 1)]))
    changed = runs_of(workshop, lambda seed: [fake_run("a", 2)])
    assert changed.count("finished") == 0
    run_all(changed)
    assert calls(workshop) == ["1 1 new", "2 1 new"]
    assert changed.outcomes[0].metrics == {"val_bpb": 3.0}
    # Both are there, so going back costs nothing.
    back = runs_of(workshop, lambda seed: [fake_run("a", 1)])
    run_all(back)
    assert back.outcomes[0].metrics == {"val_bpb": 2.0} and len(calls(workshop)) == 2


def test_a_failed_run_does_not_stop_the_others_and_is_tried_again(workshop):
    planned = runs_of(workshop, lambda seed: [fake_run("bad", 1, fail=1), fake_run("good", 2)])
    run_all(planned)
    bad, good = planned.outcomes
    assert bad.state == "failed" and bad.error == "fake.py: error: it was asked to fail"
    assert good.state == "finished"
    # In another process, where it goes on from its checkpoint.
    again = Workshop(workshop.folder, workshop.root, echo=lambda line: None)
    planned = runs_of(again, lambda seed: [fake_run("bad", 1, fail=1), fake_run("good", 2)])
    assert [outcome.state for outcome in planned.outcomes] == ["waiting", "finished"]
    run_all(planned)
    assert planned.outcomes[0].state == "finished"
    assert calls(workshop) == ["1 1 new", "2 1 new", "1 1 resumed"]
    state = again.state(planned.outcomes[0].run.steps[0], {})
    assert state["attempts"] == 2 and state["seconds"] > 0


def test_runs_with_a_failed_step_in_common_fail_at_once(workshop):
    bad = fake_step(9, fail=1)
    make = [Run(name, {}, [bad, fake_step(n, reads=Made(bad))], read_fake) for n, name in enumerate("ab")]
    planned = runs_of(workshop, lambda seed: make)
    run_all(planned)
    assert planned.count("failed") == 2 and calls(workshop) == ["9 1 new"]


def test_what_is_stopped_goes_on(workshop):
    """SIGTERM reaches the script that runs; the same command then resumes it."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from blt.entropy_cache import sigterm_raises
from blt.studies import Run, Step, Study, StudyRuns, Workshop
def run(value):
    step = Step("fake", {{"value": value, "seed": 1, "sleep": 60}}, checkpoints="output")
    return Run(str(value), {{}}, [step], None)
work = Workshop({str(workshop.folder)!r}, {str(workshop.root)!r}, jobs=2)
study = Study("fake", "", None, [], None)
planned = StudyRuns(study, "cpu", {{1: [run(value) for value in (1, 2, 3)]}}, work, None)
with sigterm_raises():
    planned.run_all(lambda outcome: None, lambda outcome: None)
"""
    steps = [fake_step(value, sleep=60) for value in (1, 2, 3)]
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    sleeping = [workshop.path_of(step, {}) / "sleeping" for step in steps[:2]]
    deadline = time.time() + 60
    while not all(path.exists() for path in sleeping) and time.time() < deadline:
        time.sleep(0.05)
    # Two processes must not write into one folder.
    with pytest.raises(StepFailed, match="another process works on"):
        workshop.make(steps[0], {})
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert [workshop.state(step, {})["state"] for step in steps] == ["stopped", "stopped", "new"]
    # The scripts that slept are gone too: nothing holds their folders.
    for step in steps[:2]:
        with open(workshop.step_folder(step, {}) / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    script = workshop.root / "fake.py"
    script.write_text(FAKE.replace("if flags.sleep:", "if False:"))
    workshop.failed.clear()
    workshop.make(steps[0], {})
    assert calls(workshop)[2:] == ["1 1 resumed"] and sorted(calls(workshop)[:2]) == ["1 1 new", "2 1 new"]


def test_runs_beside_each_other(workshop):
    """Two at a time share the cores; a run waits for what it needs, and for a step that another run is making."""
    script = FAKE.replace("import argparse", "import os, argparse").replace(
        "print(flags.value, flags.seed,", 'print(flags.value, flags.seed, os.environ["OMP_NUM_THREADS"], time.time(),'
    )
    (workshop.root / "fake.py").write_text(script)
    workshop.jobs = 2
    shared = fake_step(5, sleep=1)

    def make(seed):
        value = Measured(("c",), lambda metrics: metrics["val_bpb"], 7)
        of_shared = [Run(name, {}, [shared, fake_step(n)], read_fake) for n, name in enumerate("ab")]
        return [*of_shared, fake_run("c", 3, sleep=1), fake_run("d", value)]

    begun = []
    planned = runs_of(workshop, make)
    planned.run_all(lambda outcome: begun.append(outcome.run.name), lambda outcome: None)
    assert planned.count("finished") == 4 and begun[:2] == ["a", "c"]
    lines = [line.split() for line in calls(workshop)]
    at = {line[0]: float(line[3]) for line in lines}
    assert len(lines) == 5 and abs(at["5"] - at["3"]) < 1 and at["4.0"] - at["3"] > 1
    assert {line[2] for line in lines} == {os.environ.get("OMP_NUM_THREADS", str(max(1, os.cpu_count() // 2)))}


def test_a_measured_value_comes_from_an_earlier_run(workshop):
    def make(seed):
        value = Measured(("first",), lambda first: first["val_bpb"] * 10, 7)
        return [fake_run("first", 2, seed), fake_run("second", value, seed)]

    planned = runs_of(workshop, make, seeds=(1, 2))
    assert planned.outcomes[1].run.needs() == ["first"]
    # Until it is measured the estimate is shown, and nothing is taken for finished.
    assert planned.outcomes[1].commands[0][2] == "7"
    assert planned.expected_seconds() == 400
    run_all(planned)
    assert calls(workshop) == ["2 1 new", "30.0 1 new", "2 2 new", "40.0 2 new"]
    again = runs_of(workshop, make, seeds=(1, 2))
    assert again.count("finished") == 4


def test_a_run_whose_source_failed_fails(workshop):
    value = Measured(("first",), lambda first: first["val_bpb"], 7)
    planned = runs_of(workshop, lambda seed: [fake_run("first", 2, fail=1), fake_run("second", value)])
    run_all(planned)
    assert planned.outcomes[1].error == "it needs the results of first" and len(calls(workshop)) == 1


def test_a_script_that_leaves_no_result_is_a_failed_run(workshop):
    (workshop.root / "fake.py").write_text("print('nothing is written')")
    planned = runs_of(workshop, lambda seed: [fake_run("a")])
    run_all(planned)
    assert planned.outcomes[0].state == "failed" and "result.json" in planned.outcomes[0].error


# Tables and records


def outcomes_of(name, values, metric="val_bpb"):
    run = Run(name, {"name": name}, [], None)
    return [Outcome(run, seed, "finished", {metric: value}) for seed, value in values.items()]


def test_mean_and_spread_are_over_seeds():
    assert mean_and_deviation([1.0, 2.0, 4.0]) == (pytest.approx(7 / 3), pytest.approx(np.std([1, 2, 4], ddof=1)))
    assert mean_and_deviation([3.0]) == (3.0, None) and mean_and_deviation([]) == (None, None)
    waiting = Outcome(Run("b", {"name": "b"}, [], None), 1)
    failed = Outcome(waiting.run, 2, "failed", error="broken")
    study = Study("fake", "?", None, [Column("bpb", "val_bpb", "{:.2f}")], (None, "val_bpb", ()))
    lines = study_table(study, groups_of([*outcomes_of("a", {1: 1.0, 2: 2.0, 3: 4.0}), waiting, failed]))
    assert lines == [
        "| name | bpb | seeds |",
        "| - | - | - |",
        "| a | 2.33 ± 1.53 | 3 |",
        "| b | - | 0, **failed: seed 2**, 1 to do |",
    ]


def test_differences_are_paired_by_seed():
    first, second = (Group(None, outcomes_of("x", values)) for values in ({1: 1.0, 2: 2.0}, {2: 1.5, 1: 0.9, 3: 9.0}))
    mean, error, n = paired_difference(first, second)
    assert (mean, n) == (pytest.approx(0.3), 2)
    assert error == pytest.approx(np.std([0.1, 0.5], ddof=1) / math.sqrt(2))


def test_a_record_is_continued_elsewhere(workshop, tmp_path):
    """Its runs are not made again, and what nobody asks for now stays in it."""

    def plan(work, seeds, known=None, wanted=None, change=0):
        def make(seed):
            value = Measured(("a",), lambda of_a: of_a["val_bpb"] + change, 7)
            return [fake_run("a", 1, seed), fake_run("b", value, seed), fake_run("c", 3, seed)]

        study = Study("fake", "Does it work?", None, [Column("bpb", "val_bpb")], (None, "val_bpb", ()))
        runs = {seed: make(seed) for seed in seeds}
        return StudyRuns(study, "cpu", runs, work, lambda step, flags: 100.0, wanted, known)

    def write(planned):
        return write_record(planned, tmp_path / "records", "cpu", "python experiments.py fake", "a guess", str)

    first = plan(workshop, (1, 2), wanted={("a", 1), ("b", 1), ("a", 2)})
    run_all(first)
    folder = write(first)
    table = (folder / "table.md").read_text()
    assert "Partial: 3 of 6" in table and "| b | 3.0000 | 1, 1 to do |" in table and "Not made yet: c." in table
    # Another machine, with the record and without the work folder.
    other = Workshop(tmp_path / "elsewhere", workshop.root, echo=lambda line: None)
    other.folder.mkdir()
    seeds, known = read_record(folder, "fake", "cpu")
    assert seeds == [1, 2] and set(known) == {("a", 1), ("b", 1), ("a", 2)}
    second = plan(other, seeds, known, wanted={("c", 2)})
    assert second.count("finished") == 3 and second.expected_seconds() == 100
    run_all(second)
    continue_in(second, folder.name)
    assert write(second) == folder and calls(other) == ["3 2 new"]
    assert "Partial: 4 of 6" in (folder / "table.md").read_text()
    assert set(read_record(folder, "fake", "cpu")[1]) == {*known, ("c", 2)}
    # A run whose command has changed is not the one in the record.
    assert plan(other, seeds, known, change=1).count("finished") == 3
    for study, budget in (("other", "cpu"), ("fake", "gpu")):
        with pytest.raises(ValueError, match="is the record of fake with the budget cpu"):
            read_record(folder, study, budget)
    # A line of a finished run is missing, then half a line, then another file.
    for damage in ("", (folder / "metrics.jsonl").read_text()[:-20], "[1]\n"):
        (folder / "metrics.jsonl").write_text(damage)
        with pytest.raises(ValueError, match="is damaged"):
            read_record(folder, "fake", "cpu")


def test_a_record_loses_no_run_whose_command_has_changed(studies_config, tmp_path):
    """Going on with it would drop what was measured by other flags, so it is refused."""
    runs = [{"run": "space", "seed": 1337, "state": "finished", "commands": ["python llm.py"], "commits": ["a"]}]
    settings = {"study": "patching", "budget": "cpu", "seeds": [1337], "runs": runs}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"run": "space", "seed": 1337, "val_bpb": 1.0}) + "\n")
    config = studies_config(continue_record=str(tmp_path))
    with pytest.raises(ValueError, match="1 of its runs have other commands now .* 'space'"):
        experiments.plan(STUDIES["patching"], config, Workshop(config.work, ROOT))


def test_times_of_runs_beside_each_other_are_shared(workshop):
    step = Step("template_llm", {"model": "flat"})
    runs = {1: [Run("a", {}, [step], None)]}
    folder = workshop.step_folder(step, {})
    folder.mkdir(parents=True)
    planned = StudyRuns(Study("s", "?", None, [], None), "cpu", runs, workshop, lambda step, flags: 100.0)
    state = {"state": "finished", "seconds": 300.0, "has_weights": False}
    write_json(folder / "step.json", state)
    assert experiments.measured_factor([planned]) == (3.0, 1)
    write_json(folder / "step.json", state | {"jobs": 2})
    assert experiments.measured_factor([planned]) == (1.5, 1)


def test_times_in_words():
    assert [describe_seconds(s) for s in (40, 600, 7325)] == ["40 s", "10 min", "2 h 02 min"]


def test_a_record_is_written_at_once_and_completed(workshop, tmp_path):
    def make(seed):
        return [fake_run("a", 1, seed), fake_run("b", 2, seed, **({"fail": 1} if seed == 1 else {}))]

    planned = runs_of(workshop, make, seeds=(1, 2), summary=lambda groups: ["the summary"])

    def write():
        return write_record(planned, tmp_path / "records", "cpu", "python experiments.py fake", "a guess", str)

    folder = write()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_fake", folder.name)
    assert "**Partial: 0 of 4 runs are finished.**" in (folder / "table.md").read_text()
    planned.run(planned.outcomes[0])
    planned.run(planned.outcomes[1])
    assert write() == folder
    table = (folder / "table.md").read_text()
    assert "**Partial: 1 of 4 runs are finished, 1 failed.**" in table and "| a | 2.0000 | 1, 1 to do |" in table
    assert "- b, seed 1: fake.py: error: it was asked to fail" in table and "the summary" in table
    run_all(planned)
    write()
    assert "| a | 2.5000 ± 0.7071 | 2 |" in (folder / "table.md").read_text()
    assert is_png(folder / "plot.png")
    readme = (folder / "README.md").read_text()
    assert "    python experiments.py fake\n" in readme and "Does it work?" in readme
    assert max(map(len, readme.splitlines())) <= 120
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["runs"][0]["commands"][0].startswith("python fake.py --value 1 --seed 1 --output steps/fake-")
    assert settings["runs"][0]["commits"] and settings["runs"][0]["machines"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"run": "a", "seed": 2, "name": "a", "val_bpb": 3.0} in lines
    # Someone who trains on a folder with records in it does not read them as text.
    assert all(is_own_output(folder / name, "text") for name in ("settings.json", "metrics.jsonl"))
    # A study in another work folder does not replace it.
    other = Workshop(tmp_path / "other", workshop.root)
    other_runs = runs_of(other, make)
    assert write_record(other_runs, tmp_path / "records", "cpu", "", "", str).name == folder.name + "_2"


# The studies


@pytest.fixture
def studies_config(tmp_path, monkeypatch):
    """An `ExperimentsConfig` with which every study can be planned."""
    monkeypatch.setattr(experiment_studies, "check_packages", lambda *names: None)
    (tmp_path / "wiki_fr_es.jsonl.xz").write_bytes(b"")
    folder = str(tmp_path)

    def make(**changes):
        settings = {"name": ["baselines"], "cute_folder": folder, "corpus_folder": folder, "work": str(tmp_path / "w")}
        return ExperimentsConfig(**(settings | changes))

    return make


@pytest.mark.parametrize("budget", ["cpu", "gpu"])
@pytest.mark.parametrize("name", list(STUDIES))
def test_every_command_of_a_study_is_accepted(name, budget, studies_config, capsys):
    """No flag is misspelt: each script's own parser takes each command, and each has an expected time."""
    config = studies_config(budget=budget, seeds=2)
    workshop = Workshop(config.work, ROOT)
    planned = experiments.plan(STUDIES[name], config, workshop)
    runs = [outcome.run.name for outcome in planned.outcomes if outcome.seed == 1337]
    assert len(runs) == len(set(runs)) == len(set(map(safe_name, runs))), "a run is known by its name"
    before = set()
    for outcome in planned.outcomes[: len(runs)]:
        # A value is measured by a run that comes before.
        assert set(outcome.run.needs()) <= before
        before.add(outcome.run.name)
        made = set()
        for step in outcome.run.steps:
            read = [value.step for value in values_in(step.flags) if isinstance(value, Made)]
            assert {id(other) for other in read} <= made, f"{outcome.run.name}: a step reads what comes after it"
            made.add(id(step))
            check_command(step, workshop.command(step, {}), capsys)
    assert 60 < planned.expected_seconds() < 30 * 86400


def check_command(step, command, capsys):
    script = step.script
    if script == "compress":
        return
    if script == "experiments":
        config = parse_config(ExperimentsConfig, "", command[1:])
        assert config.part in experiments.PARTS and config.settings_of_part
        of_llm = config.settings_of_part.get("llm")
        words = [] if of_llm is None else [word for n, v in of_llm.items() for word in words_of(n, v)]
        script, command = "llm", ["llm.py", *words]
    try:
        parse_config(CONFIGS[script], "", command[1:])
    except SystemExit:
        pytest.fail(f"{' '.join(command)}: {capsys.readouterr().err}")


def words_of(name, value):
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def test_studies_that_lack_something_say_so(studies_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--cute_folder" in error_of(tmp_path, "experiments", "robustness")
    assert "--corpus_folder" in error_of(tmp_path, "experiments", "domains", "--corpus_folder", "nowhere")
    assert "choose from baselines" in error_of(tmp_path, "experiments", "nonsense")
    assert "name a study" in error_of(tmp_path, "experiments")
    assert "no run of leak has nothing" in error_of(tmp_path, "experiments", "leak", "--only", "nothing")
    flags = ["--continue_record", "nowhere"]
    assert "nowhere is no record" in error_of(tmp_path, "experiments", "leak", *flags)
    assert "name that study alone" in error_of(tmp_path, "experiments", "leak", "sweep", *flags)


def test_list_and_dry_run_write_nothing(tmp_path):
    printed = output_of(tmp_path, "experiments", "--list")
    assert all(name in printed for name in STUDIES) and "expected time" in printed
    printed = output_of(tmp_path, "experiments", "patch_size", "threshold", "--seeds", 1, "--dry_run")
    assert "python llm.py --preset nano cpu" in printed and "--entropy_threshold 2.5" in printed
    assert "all: " in printed
    assert list(tmp_path.iterdir()) == []


def test_only_takes_what_a_run_needs(studies_config):
    config = studies_config(only=["patch size 3 own"])
    runs = experiments.plan(STUDIES["leak"], config, Workshop(config.work, ROOT)).wanted
    names = [outcome.run.name for outcome in runs]
    assert names == ["rate 0.0001", "rate 0.0003", "rate 0.001", "rate 0.003", "patch size 3 own patch"]


def group_of(name, labels, **values):
    """A `Group` of finished runs: values of each metric for the seeds 1, 2, ..."""
    run = Run(name, labels, [], None)
    seeds = range(1, len(next(iter(values.values()))) + 1)
    metrics = [{metric: of_seeds[seed - 1] for metric, of_seeds in values.items()} for seed in seeds]
    outcomes = [Outcome(run, seed, state="finished", metrics=of_seed) for seed, of_seed in zip(seeds, metrics)]
    return Group(run, outcomes)


def test_a_long_command_is_lines_that_a_shell_reads_as_one():
    words = ["python", "experiments.py", "map", "--only", *(f"row {2**n} budget {n}" for n in range(20))]
    lines = wrapped_command("    " + shlex.join(words))
    assert len(lines.splitlines()) > 3 and max(map(len, lines.splitlines())) <= 110
    printed = subprocess.run(
        ["bash", "-c", lines.replace("python", "printf '%s\\n'", 1)], capture_output=True, text=True
    )
    assert printed.stdout.splitlines() == words[1:]
    assert wrapped_command("    python experiments.py map") == "    python experiments.py map"


def test_a_curve_is_straight_over_the_logarithm():
    points = [(1.0, 2.0), (4.0, 1.8), (16.0, 1.7)]
    values = [read_curve_at(points, x) for x in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 0.5)]
    assert values == pytest.approx([2.0, 1.9, 1.8, 1.75, 1.7, 1.65, 2.1])


def test_a_curve_is_not_read_where_it_says_nothing():
    """Far beyond its ends; and between runs that a small corpus has made equal but for rounding."""
    points = [(1.0, 2.0), (4.0, 1.8)]
    assert read_curve_at(points, 8.1) is None and read_curve_at(points, 0.49) is None
    assert read_curve_at(points[:1], 1.0) is None
    assert read_curve_at([(4.0, 1.8), (4.0, 1.8), (4.000001, 1.79)], 4.0) is None
    assert read_curve_at([*points, (4.000001, 1.79)], 4.0) == pytest.approx(1.8)


def test_equal_flops_count_the_entropy_model():
    """The flat model is read from its curve where it costs what the BLT and its entropy model cost."""
    groups = [
        group_of(
            f"{model}+tables {budget}x",
            {"model": model, "budget": budget},
            val_bpb=[bpb, bpb + 0.1],
            trained_bytes=[budget * 100.0] * 2,
            all_flops=[budget * flops] * 2,
            all_seconds=[budget * 50.0] * 2,
        )
        for model, flops, bpbs in (("blt", 400.0, (2.0, 1.8)), ("flat", 200.0, (2.1, 1.7)))
        for budget, bpb in zip((1, 4), bpbs)
    ]
    lines = "\n".join(experiment_studies.summarize_baselines(groups))
    # Twice the cost at the budget 1 is halfway to the budget 4 over the logarithm: 2.0 - (2.1 + 1.7) / 2.
    assert "| 1x | flat+tables | -0.1000 ± 0.0000 (2) | +0.1000 ± 0.0000 (2) | -0.1000 ± 0.0000 (2) |" in lines
    # Beyond the last budget the curve goes on: 1.8 - 1.5.
    assert "| 4x | flat+tables | +0.1000 ± 0.0000 (2) | +0.3000 ± 0.0000 (2) | +0.1000 ± 0.0000 (2) |" in lines
    # One point is no curve.
    assert "| 1x | flat+tables | - | - | - |" in "\n".join(
        experiment_studies.summarize_baselines([groups[0], groups[2]])
    )


@pytest.mark.parametrize("study", ["baselines", "map"])
def test_equal_bytes_are_the_same_text_once(studies_config, study):
    """Rows hold more or less text by the patching method, so equal numbers of updates would not be equal bytes."""
    runs = STUDIES[study].runs(Bench(studies_config(), 1337))
    budgets = {}
    for run in runs:
        if run.labels.get("equal", "bytes") == "bytes" and run.steps[-1].script in ("llm", "template_llm"):
            flags = run.steps[-1].flags
            assert flags["epochs"] == 1 and "steps" not in flags
            budgets.setdefault(run.labels["budget"], set()).add(flags["max_bytes"])
    wanted = (1, 4, 10) if study == "baselines" else (1, 4)
    assert budgets == {multiple: {2_200_000 * multiple} for multiple in wanted}


def test_tables_of_the_map_are_as_large_in_every_model(studies_config):
    runs = {run.name: run for run in STUDIES["map"].runs(Bench(studies_config(), 1337))}
    rows = LLMConfig(preset=["nano", "cpu"], device="cpu").hash_rows
    for size in ("nano", "tiny", "small", "medium"):
        blt = LLMConfig(preset=[size, "cpu"], device="cpu")
        for patch in ("space", 4.5):
            assert runs[f"blt {size} row 2048 budget 1 patch {patch}"].steps[-1].flags["hash_rows"] == rows
        flat = runs[f"flat {size} row 2048 budget 1 bytes"].steps[-1].flags
        dim = TemplateConfig(model="flat", preset=[size, "cpu"], device="cpu").dim
        assert flat["hash_rows"] * dim == pytest.approx(rows * blt.encoder_dim, rel=1e-3)


def test_the_map_buys_updates_for_the_entropy_model(studies_config):
    runs = {run.name: run for run in STUDIES["map"].runs(Bench(studies_config(), 1337))}
    place = "nano row 32768 budget 1"
    steps = runs[f"flat {place} FLOPs"].steps[-1].flags["steps"]
    results = {
        f"blt {place} patch 4.5": {"all_flops": 140.0},
        f"flat {place} bytes": {"steps": 60, "train_flops": 105.0},
    }
    assert steps.of(*(results[run] for run in steps.runs)) == 80


def test_baselines_have_as_many_table_numbers_as_the_blt(studies_config):
    bench = Bench(studies_config(), 1337)
    blt = LLMConfig(preset=["nano", "cpu"], device="cpu")
    wanted = len(blt.ngram_sizes) * blt.hash_rows * blt.encoder_dim
    for model in ("flat", "bpe"):
        width = TemplateConfig(model=model, preset=["nano", "cpu"], device="cpu").dim
        tables = bench.tables(model)
        assert len(tables["ngram_sizes"]) * tables["hash_rows"] * width == pytest.approx(wanted, rel=1e-3)
    assert bench.tables("bpe")["ngram_sizes"] == [2, 3] and bench.tables("flat", tables=False) == {"ngram_sizes": []}


def test_larger_patches_get_a_larger_latent_transformer():
    config = LLMConfig(preset=["nano", "cpu"], device="cpu")
    target = sum(blt_flops(config, 4.5, config.row_bytes).values())
    for patch in (8, 12):
        width, layers = experiment_studies.grown(config, patch)
        other = dataclasses.replace(config, global_dim=width, global_layers=layers)
        assert sum(blt_flops(other, patch, config.row_bytes).values()) == pytest.approx(target, rel=0.05)
        assert width * layers > config.global_dim * config.global_layers


def test_the_sweep_gives_all_models_the_same_trials(studies_config):
    trials = {}
    for run in experiment_studies.sweep(Bench(studies_config(), 1337)):
        model, name = run.name.split(" ", 1)
        own = experiment_studies.OWN_CHOICES[model][0]
        config = Bench(studies_config(), 1337).llm_config()
        if model != "space":
            config = TemplateConfig(model=model, preset=["nano", "cpu"], device="cpu")
        if name != "together" and not name.startswith(own):
            # Rates are multiples of the model's own.
            flags = {n: value / getattr(config, n) for n, value in run.steps[-1].flags.items() if n.endswith("lr")}
            flags = run.steps[-1].flags | flags
            trials.setdefault(model, []).append({n: flags.get(n) for n in experiment_studies.CHOICES})
        elif name != "together":
            factors = experiment_studies.OWN_CHOICES[model][1]
            assert run.steps[-1].flags[own] in [round(getattr(config, own) * factor) for factor in factors]
    assert trials["space"] == trials["flat"] == trials["bpe"] and len(trials["space"]) == 12
    assert all(value is None for value in trials["space"][0].values())
    assert len(list(experiment_studies.sweep(Bench(studies_config(), 1337)))) == 3 * 15
    # One setting differs from the defaults in each.
    assert all(sum(value is not None for value in trial.values()) == 1 for trial in trials["space"][1:])


def test_the_last_trial_takes_only_what_helps_by_more_than_seeds_differ():
    value = experiment_studies.best_of("space", "lr", 0.01, [0.005, 0.02])
    assert value.runs == ("space defaults", "space lr 0.005", "space lr 0.02")
    default, worse = {"val_bpb": 1.8}, {"val_bpb": 1.9}
    assert value.of(default, {"val_bpb": 1.798}, worse) == 0.01
    assert value.of(default, {"val_bpb": 1.79}, worse) == 0.005
    assert value.of(default, {"val_bpb": 1.79}, {"val_bpb": 1.78}) == 0.02


def test_the_sweep_says_what_its_last_trial_has_taken(studies_config):
    runs = [run for run in experiment_studies.sweep(Bench(studies_config(), 1337)) if run.name.startswith("flat ")]
    scores = {"flat defaults": 1.8, "flat lr 0.005": 1.75, "flat lr 0.02": 1.7, "flat window 192": 1.79}
    metrics = {run.name: {"val_bpb": scores.get(run.name, 1.9)} for run in runs}
    outcomes = []
    for run in runs:
        words = ["template_llm.py"]
        for name, value in run.steps[-1].flags.items():
            if isinstance(value, Measured):
                value = value.of(*(metrics[other] for other in value.runs))
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        outcomes.append(Outcome(run, 1337, "finished", metrics[run.name], commands=[words]))
    summary = "\n".join(experiment_studies.summarize_sweep(groups_of(outcomes)))
    assert "together: --lr 0.02 --window 192\n" in summary
    assert "| flat byte transformer | --lr 0.02 | -0.1000 (1) |" in summary


@pytest.mark.parametrize("name", list(STUDIES))
def test_a_record_of_any_part_of_a_study_is_written(name, studies_config, tmp_path):
    """A study may be stopped anywhere, and any of its runs may fail: table, summary and picture must still be made."""
    study = STUDIES[name]
    config = studies_config(seeds=2)
    planned = experiments.plan(study, config, Workshop(config.work, ROOT))
    draw = np.random.default_rng(0)
    metrics = {"val_bpb", "val_loss", "bytes_a_unit", "trained_megabytes", "flops_per_byte", "accuracy"}
    metrics |= {column.metric for column in study.columns} | {"task spell"}
    metrics |= {f"all_seconds_to_{target}" for target in experiment_studies.TARGETS}

    def write():
        folder = write_record(planned, tmp_path / "records", "cpu", f"python experiments.py {name}", "a guess", str)
        table = (folder / "table.md").read_text()
        widths = {line.count("|") for line in table.split("\n\n")[2].splitlines() if line.startswith("|")}
        assert len(widths) == 1, "each line of the table has all columns"
        return table

    assert "Partial: 0 of" in write()
    for share in (0.3, 1.0):
        for outcome in planned.outcomes:
            if outcome.state == "waiting" and draw.random() < share:
                outcome.state = "failed" if draw.random() < 0.2 else "finished"
                outcome.metrics = {metric: float(draw.random() + 1) for metric in metrics}
        assert "failed" in write()
    for outcome in planned.outcomes:
        outcome.state = "finished"
        outcome.metrics = {metric: float(draw.random() + 1) for metric in metrics}
    table = write()
    assert "are finished." in table and "Partial" not in table
    if study.summary is not None:
        assert table.count("\n") > len(groups_of(planned.outcomes)) + 6
    (folder,) = (tmp_path / "records").iterdir()
    assert is_png(folder / "plot.png")


# Metrics


def test_cards_of_evaluate_are_read(pipeline_copy):
    folder = pipeline_copy / "step"
    flags = "--model checkpoints --samples 0 --val_bytes 3000 --robustness_bytes 500 --device cpu --output step/output"
    output_of(pipeline_copy, "evaluate", *flags.split())
    card = json.loads((folder / "output" / "card.json").read_text())["models"][0]
    domain = experiment_steps.read_domain([folder])
    assert domain["val_bpb"] == card["bpb"] and domain["bytes_a_unit"] == card["patches"]["mean_bytes"]
    (pipeline_copy / "log.txt").write_text("")
    (pipeline_copy / "output").symlink_to("checkpoints")
    entropy_and_patches = [pipeline_copy, pipeline_copy / "patches"]
    (pipeline_copy / "patches").mkdir()
    write_json(pipeline_copy / "patches" / "step.json", {"command": ["--max_bytes", "60000"], "seconds": 1.0})
    (pipeline_copy / "patches" / "log.txt").write_text("")
    noises = experiment_steps.read_noises([*entropy_and_patches, pipeline_copy, folder])
    assert noises["Drop"] == card["robustness"]["Drop"]["change"] and noises["val_bpb"] > 0


@pytest.mark.parametrize("model", ["blt", "flat", "bpe"])
def test_fine_tuning_reads_a_trained_model(pipeline_copy, model):
    if model != "blt":
        flags = f"--model {model} --dim 32 --n_layers 1 --vocab_size 300 --row_bytes 128 --batch_rows 4 --steps 2"
        output_of(
            pipeline_copy, "template_llm", *flags.split(), "--overwrite", "--output", "checkpoints", *CORPUS_FLAGS
        )
    (pipeline_copy / "cute").mkdir()
    rows = "".join(f"word{n}\tw{n}\n" for n in range(30))
    (pipeline_copy / "cute" / "spell.tsv").write_text("input1\tlabel\n" + rows)
    items = {"kind": "cute", "folder": str(pipeline_copy / "cute")}
    made = run_part(pipeline_copy, "fine_tune", {"model": "checkpoints", "items": items, "steps": 2})
    assert made["test_items"] == 6 and made["accuracy"] == made["task spell"] == made["task all"]


def test_metrics_of_a_training_run(pipeline, tmp_path):
    """FLOPs are those of blt/flops.py; the entropy model's training and its pass over the text are counted."""
    source, printed = pipeline
    folders = [tmp_path / name for name in ("entropy", "patches", "blt")]
    for folder in folders:
        folder.mkdir()
    entropy = RunRecord.load(source / "entropy_model.json")
    (folders[0] / "entropy_model.json").write_text((source / "entropy_model.json").read_text())
    write_json(folders[1] / "step.json", {"command": ["create_patches.py", "--max_bytes", "120000"], "seconds": 30.0})
    # The pass alone counts, without the script's start and pictures.
    (folders[1] / "log.txt").write_text("x\nentropies: 120,000 numbers in 2.0 s (15.0 kB/s) -> patch_cache/x\ny\n")
    (folders[2] / "output").symlink_to(source / "checkpoints")
    (folders[2] / "log.txt").write_text(printed["llm"])
    metrics = read_training(folders)
    record = RunRecord.load(source / "checkpoints" / "model.json")
    config = BLTConfig(**record.model_config)
    per_byte = record.result["flops_per_byte"]
    assert metrics["train_flops"] == pytest.approx(TRAINING * per_byte * metrics["trained_bytes"])
    # As for rows of 128 bytes of one document, but for attention, which ends with documents.
    row = blt_flops(config, record.result["avg_patch_size"], 128)
    attention = row["encoder attention"] + row["latent attention"] + row["decoder attention"]
    assert sum(row.values()) - attention < per_byte <= sum(row.values())
    e = entropy.model_config
    per_byte = entropy.result["flops_per_byte"]
    row = transformer_flops(e["d_model"], e["n_layers"], 256, 128, e["max_seq_len"])
    assert sum(row.values()) - row["attention"] < per_byte <= sum(row.values())
    entropy_bytes = entropy.result["bytes_per_second"] * entropy.result["train_seconds"]
    assert metrics["entropy_flops"] == pytest.approx(per_byte * (TRAINING * entropy_bytes + 60000))
    # Half of the text that the pass has read is this run's.
    assert metrics["entropy_seconds"] == pytest.approx(entropy.result["train_seconds"] + 4.0)
    assert metrics["parameters"] == sum(p.numel() for p in BLTModel(config).parameters())
    assert metrics["perplexity"] == pytest.approx(math.exp(record.result["val_loss"]))
    assert metrics["curve"][-1][0] == 12 and metrics["curve"][-1][3] == record.result["last_val_bpb"]
    assert metrics["curve"][-1][2] == pytest.approx(record.result["train_seconds"], rel=0.1)


def test_seconds_of_a_curve_leave_evaluations_out(tmp_path):
    lines = [
        {"step": 5, "bytes": 1000, "loss": 2.0, "bytes_per_second": 100.0},
        {"step": 10, "bytes": 3000, "loss": 2.0, "bytes_per_second": 200.0},
        {"step": 10, "bytes": 3000, "val_bpb": 1.75},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_curve(tmp_path) == [[10, 3000, 20.0, 1.75]]


def test_speedrun_takes_the_first_evaluation_at_the_target(monkeypatch):
    curve = [[1, 10, 5.0, 2.0], [2, 20, 9.0, 1.85], [3, 30, 14.0, 1.79], [4, 40, 20.0, 1.81]]
    monkeypatch.setattr(experiment_studies, "read_training", lambda folders: {"curve": curve, "entropy_seconds": 3.0})
    metrics = experiment_studies.read_speedrun([])
    assert metrics["seconds_to_1.9"] == 9.0 and metrics["seconds_to_1.8"] == 14.0
    assert metrics["all_seconds_to_1.9"] == 12.0 and "seconds_to_1.7" not in metrics


# Parts


def run_part(folder, part, settings, output="output"):
    status, printed, errors = run_here(
        folder, "experiments", "--part", part, "--settings", json.dumps(settings), "--output", output,
        "--device", "cpu", "--seed", 1,
    )  # fmt: skip
    assert status == 0, printed[-2000:] + errors[-2000:]
    path = folder / output / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


@pytest.fixture
def documents(tmp_path):
    """A dataset of short documents, as a path."""
    path = tmp_path / "documents.jsonl"
    lines = [json.dumps({"text": some_words(60, n).decode(), "source": "words"}) + "\n" for n in range(150)]
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize(
    "script, flags, record",
    [
        ("entropy_llm", "--d_model 32 --n_heads 2 --n_layers 1 --max_seq_len 16", "entropy_model.json"),
        ("template_llm", "--model flat --dim 32 --n_layers 1", "checkpoints_flat/model.json"),
        (
            "llm",
            "--patch_method space --global_dim 32 --global_layers 1 --encoder_dim 32 --decoder_dim 32 --hash_rows 64",
            "checkpoints/model.json",
        ),
    ],
)
def test_the_record_of_a_run_of_epochs_has_its_updates(tmp_path, documents, script, flags, record):
    shared = ["--dataset", documents, "--device", "cpu", "--epochs", 0.5, "--row_bytes", 128, "--batch_rows", 8]
    printed = output_of(tmp_path, script, *flags.split(), *shared, "--max_bytes", 30000, "--val_bytes", 2000)
    steps = RunRecord.load(tmp_path / record).settings["steps"]
    # Half of the text, in rows of which some of the BLT's are padded.
    assert 0.4 * 30000 < steps * 128 * 8 < 0.55 * 30000 and re.search(rf"step +{steps}/{steps} ", printed)


def test_ppmd_has_read_the_training_text(tmp_path, documents):
    pytest.importorskip("pyppmd")
    settings = {"dataset": str(documents), "max_bytes": 30000, "val_bytes": 2000}
    much = run_part(tmp_path, "ppmd", settings)
    little = run_part(tmp_path, "ppmd", settings | {"max_bytes": 300}, "other")
    assert 0 < much["val_bpb"] < little["val_bpb"] - 0.1


TINY_RUN = dict(
    **{name: value for name, value in TINY_BLT.items()},
    row_bytes=128, batch_rows=4, steps=4, eval_every=4, max_bytes=20000, val_bytes=4000,
)  # fmt: skip


def test_patches_of_two_models_and_of_tokens(pipeline_copy):
    first = str(pipeline_copy / "entropy_model.pth")
    settings = {"target": 4.0, "llm": TINY_RUN | {"preset": ["nano", "cpu"]}}
    for kind in ("mean", "min", "max"):
        made = run_part(pipeline_copy, "patched", settings | {"kind": kind, "first": first, "second": first}, kind)
        assert made["bytes_a_unit"] == pytest.approx(4.0, rel=0.15) and 0 < made["val_bpb"] < 12
    made = run_part(pipeline_copy, "patched", settings | {"kind": "bpe", "target": 2.0}, "bpe")
    assert made["bytes_a_unit"] == pytest.approx(2.0, abs=0.3) and made["vocabulary"] >= 1024
    # An oracle that looks ahead leaves nothing that a script would load.
    assert not (pipeline_copy / "bpe" / "model.json").exists()


def test_two_models_are_combined(pipeline):
    first, second = (experiment_steps.load_entropy_model(pipeline[0] / "entropy_model.pth")[0] for _ in range(2))
    torch.nn.init.zeros_(second.head.weight)
    document = np.frombuffer(some_words(20), np.uint8)
    config = PatchConfig("global", 2.0)
    alone = EntropyPatcher(first, config).entropies(document)
    for combine in (np.min, np.mean, np.max):
        patcher = experiment_steps.TwoModelPatcher([first, second], combine, config, "fp32")
        # A model without knowledge has ln 256 nats everywhere.
        expected = combine([alone, np.full_like(alone, math.log(256))], axis=0)
        np.testing.assert_allclose(patcher.entropies(document), expected, rtol=1e-4)


def test_adamw_trains_every_parameter(pipeline_copy, monkeypatch):
    monkeypatch.setattr(experiment_steps.blt.loop, "make_optimizers", experiment_steps.blt.loop.make_optimizers)
    flags = {"preset": ["nano", "cpu"], "patch_method": "static", "target_patch_size": 4.0}
    # Larger tables have sparse gradients, which AdamW does not take.
    run_part(pipeline_copy, "adamw", {"llm": TINY_RUN | flags | {"hash_rows": DENSE_HASH_ROWS + 1}})
    assert RunRecord.load(pipeline_copy / "output" / "model.json").result["val_bpb"] < 12
    optimizers = torch.load(pipeline_copy / "output" / "last.pt", weights_only=True)["optimizers"]
    assert len(optimizers) == 1


def test_corpora(tmp_path, documents, monkeypatch):
    long = [json.dumps({"text": "long " * 400, "source": "book"}), json.dumps({"text": "short", "source": "note"})]
    (tmp_path / "mixed.jsonl").write_text("\n".join([*long, *documents.read_text().splitlines()]) + "\n")

    def sources_of(settings):
        run_part(tmp_path, "corpus", settings, "made.jsonl")
        return [json.loads(line)["source"] for line in (tmp_path / "made.jsonl").read_text().splitlines()]

    assert sources_of({"kind": "long", "dataset": str(tmp_path / "mixed.jsonl"), "min_bytes": 1500}) == ["book"]
    assert sources_of({"kind": "language", "file": str(tmp_path / "mixed.jsonl"), "source": "note"}) == ["note"]
    assert set(sources_of({"kind": "python", "max_bytes": 50000})) == {"python"}
    assert (tmp_path / "made.jsonl").stat().st_size > 10000
    held_out = {"kind": "held_out", "dataset": str(documents), "bytes": 100}
    run_part(tmp_path, "corpus", held_out, "held_out.txt")
    assert (tmp_path / "held_out.txt").stat().st_size == 100


# Tasks


def test_spelling_items_are_right():
    items = {task: (question, answer) for task, question, answer, _ in tasks.spelling_items(["banana"])}
    assert items["spell"] == ("banana", "b a n a n a") and items["backwards"] == ("banana", "ananab")
    old = items["delete"][0].split(" | ")[1]
    assert items["delete"][1] == "banana".replace(old, "")
    first, second = items["swap"][0].split(" | ")[1].split(" and ")
    assert items["swap"][1].replace(first, "_").replace(second, first).replace("_", second) == "banana"


def test_a_word_is_in_training_or_in_the_test():
    training, test = tasks.split_items(tasks.spelling_items([f"word{letter}" for letter in "abcdefghij"]))
    assert {item[3] for item in training}.isdisjoint({item[3] for item in test}) and len(test) == 12


def test_cute_files_are_read(tmp_path):
    (tmp_path / "ins_char.tsv").write_text('input1\tinput2\tlabel\nm\th"e\tthme\n')
    assert tasks.read_cute(tmp_path) == [("ins_char", 'm | h"e', "thme", 0)]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="--cute_folder"):
        tasks.read_cute(tmp_path / "none")


def test_exact_answers_are_what_greedy_generation_writes(tmp_path):
    """A model answers right exactly where generating from the question, most likely byte first, gives the answer."""
    model = tiny_blt(3)
    patcher = EntropyPatcher(None, PatchConfig("static", 3.0))
    training = [("spell", word, " ".join(word), n) for n, word in enumerate(("cat", "dog", "mat", "the"), 1)]
    config = experiment_steps.RunConfig(
        row_bytes=64, batch_rows=4, steps=60, eval_every=60, lr=0.01, adam_lr=0.01, device="cpu"
    )
    tasks.fine_tune(model, patcher, training, config, 64, tmp_path / "out")
    items = [*training, ("spell", "sat", "s a t", 9)]
    exact = tasks.exact_answers(model, patcher, items, 64)
    for item, is_exact in zip(items, exact):
        document, head = tasks.document_of(item)
        written = generate(model, patcher, document[:head].tobytes(), 20, temperature=0.0, context_bytes=64)
        assert is_exact == (written == document[head:].tobytes()), (item, written)
    assert 0 < exact.sum() < len(items)


# The study leak


def leak_model(own_patch):
    torch.manual_seed(0)
    config = BLTConfig(**(TINY_BLT | dict(ngram_sizes=[])))
    return (OwnPatchBLT if own_patch else BLTModel)(config).eval()


def test_the_gate_refuses_the_own_patch_and_nothing_else():
    patcher = EntropyPatcher(None, PatchConfig("static", 4.0))
    text = some_words(40)
    leak_gate(leak_model(False), patcher, text)
    with pytest.raises(ValueError, match="leak: changing bytes"):
        leak_gate(leak_model(True), patcher, text)


def test_windows_are_cut_padded_and_overlap():
    text = np.arange(200, dtype=np.uint8)
    is_start = np.arange(200) % 3 == 0
    apart, overlapping = (leak_windows(text, is_start, overlap) for overlap in (False, True))
    assert [window[0][0] for window in apart] == [0, 45, 90, 135]
    assert [window[0][0] for window in overlapping][:4] == [0, 21, 42, 63]
    ids, starts, is_scored = LeakRows(apart, False).row(1)
    assert ids[:3].tolist() == [256, 45, 46] and ids[45:48].tolist() == [89, 0, 0] and len(ids) == 101
    assert np.flatnonzero(starts).tolist() == [0, *range(1, 46, 3), 46] and is_scored.sum() == 45
    assert LeakRows(apart, True).row(1)[2].all()
    long = leak_windows(text, np.arange(200) % 12 == 0, False)
    assert len(long[0][0]) == 100
    batch = LeakRows(long, True).batch([0])
    assert batch.patch_lengths.sum() == 101 and batch.targets == 100


def train_leaks(tmp_path, monkeypatch, names, steps):
    """result.json of a model for each combination of mistakes, on random letters."""
    monkeypatch.setattr(experiment_steps.blt.loop, "make_optimizers", experiment_steps.blt.loop.make_optimizers)
    path = tmp_path / "letters.jsonl"
    # What is not in the text before cannot be known, only seen.
    texts = [(random_bytes(300, n) % 26 + 97).tobytes().decode() for n in range(120)]
    path.write_text("".join(json.dumps({"text": text, "source": "letters"}) + "\n" for text in texts))
    settings = dict(
        dataset=str(path), patch=3.0, global_dim=64, global_layers=1, text_bytes=30000, steps=steps, rows=12, lr=0.003,
        coded_bytes=100,
    )  # fmt: skip
    made = {}
    for name in names:
        mistakes = list(experiments.MISTAKE_SETS[name])
        made[name] = run_part(tmp_path, "leak", settings | {"mistakes": mistakes}, name.replace(" ", "_"))
    # What can be decoded has cost what random letters cost, whatever the loss claims.
    for result in made.values():
        assert result["restored"] and result["coded_loss"] > math.log(26) - 0.2
    assert not list(tmp_path.rglob("model.json"))
    return made


def test_mistakes_lower_the_loss_and_compress_is_not_deceived(tmp_path, monkeypatch):
    made = train_leaks(tmp_path, monkeypatch, ("none", "all three"), 40)
    assert made["none"]["val_loss"] > math.log(26) - 0.05
    assert made["all three"]["val_loss"] < made["none"]["val_loss"] - 1.0
    assert made["none"]["leak_gate"].startswith("passed") and made["all three"]["leak_gate"].startswith("refused: leak")
    assert made["none"]["padding_share"] == pytest.approx(0.55, abs=0.02)


@pytest.mark.slow
def test_each_mistake_lowers_the_loss(tmp_path, monkeypatch):
    made = train_leaks(tmp_path, monkeypatch, ("none", "own patch", "padding", "all three"), 60)
    loss = {name: result["val_loss"] for name, result in made.items()}
    assert loss["own patch"] < loss["none"] - 0.3 and loss["padding"] < loss["none"] - 1.0
    assert loss["all three"] < min(loss["own patch"], loss["padding"])
    assert made["own patch"]["leak_gate"].startswith("refused: leak") and "passed" in made["padding"]["leak_gate"]


def test_training_scripts_cannot_make_these_mistakes():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("blt/*.py")]:
        if path.name != "experiments.py":
            text = path.read_text()
            assert "OwnPatch" not in text and "LeakRows" not in text
            assert not re.search(r"^(import experiments|from experiments )", text, re.M), path.name


def test_the_rate_is_chosen_by_one_published_figure(studies_config):
    runs = {run.name: run for run in experiments.leak_runs(Bench(studies_config(), 1337))}
    losses = {"rate 0.0001": 3.0, "rate 0.0003": 2.0, "rate 0.001": 1.6, "rate 0.003": 0.9}
    results = {name: {"val_loss": loss} for name, loss in losses.items()}
    step = runs["patch size 3 all three"].steps[0]
    workshop = Workshop(studies_config().work, ROOT)
    assert workshop.flags_of(step, results)["settings"]["lr"] == 0.001
    assert runs["patch size 3 all three"].published == {"published loss": "0.49"}


def test_an_error_of_an_earlier_attempt_is_not_reported(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("error: repaired since\n")
    begin = studies.log_size(tmp_path)
    assert begin == log.stat().st_size and studies.log_size(tmp_path / "none") == 0
    with log.open("a") as file:
        file.write("step 1\nstep 2\n")
    assert studies.last_error(log, begin) == "step 2" and studies.last_error(log) == "error: repaired since"


def test_seconds_of_two_machines_are_not_compared():
    def group(name, value, seconds, machines):
        made = group_of(name, {"model": name}, val_bpb=[value], all_seconds=[seconds], all_flops=[seconds])
        for outcome in made.outcomes:
            outcome.machines = machines
        return made

    curve = [group("flat", 2.0, 1.0, ["fast"]), group("flat", 1.8, 4.0, ["fast"])]
    for machines, cell in ((["fast"], "+0.1000 (1)"), (["slow"], "-")):
        blt = group("blt", 2.0, 2.0, machines)
        assert studies.curve_difference_cell(blt, curve, "all_seconds") == cell
        assert studies.curve_difference_cell(blt, curve, "all_flops") == "+0.1000 (1)"


# The whole


@pytest.mark.slow
def test_a_study_from_end_to_end(tmp_path, documents, monkeypatch):
    """Two studies as commands with real scripts: finished, then found finished; their records are whole."""
    small = dataclasses.replace(experiment_steps.BUDGETS["cpu"], text=20000, entropy_steps=2)
    monkeypatch.setitem(experiment_steps.BUDGETS, "cpu", small)
    monkeypatch.setattr(experiments, "BUDGETS", experiment_steps.BUDGETS)
    flags = ["patch_size", "patching", "--seeds", 1, "--only", "static 5", "space", "--device", "cpu"]
    flags += ["--dataset", documents]
    printed = output_of(tmp_path, "experiments", *flags)
    # The record is of the whole study, and says what is still to be made.
    assert "[1/2] static 5 bytes, seed 1337" in printed and "Partial: 2 of 20 runs are finished" in printed
    (folder,) = (tmp_path / "records").glob("*_patch_size")
    assert {path.name for path in folder.iterdir()} == {
        "settings.json", "metrics.jsonl", "table.md", "plot.png", "README.md",
    }  # fmt: skip
    assert "finished before" in output_of(tmp_path, "experiments", *flags)
