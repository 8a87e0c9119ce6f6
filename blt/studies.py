"""Studies: many runs of the project's scripts, made step by step, and the record that they leave.

    Step      one command line of a script; its output folder is named by a hash of the command
    Run       steps in their order, and how a dict of metrics is read from what they wrote
    Study     runs for each seed, and how they are shown
    Workshop  the work folder: makes steps, remembers them, goes on where it was stopped
    write_record(...)  settings, metrics, table, picture and README of a study, finished or partial

A step is known by its command. The same command in two runs or two studies is made once, and a changed
flag gives another folder, so that old and new numbers never mix. Whether a step is finished is in its
step.json. A step that was stopped goes on with --resume where its script can.
"""

import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

try:
    import fcntl
# Windows has no file locks of this kind.
except ImportError:
    fcntl = None

import torch

from blt.checkpoints import has_checkpoint
from blt.device import choose_precision
from blt.files import git_commit, write_atomically, write_json

# Seconds that a script has to save its last finished update after Ctrl-C, before it is asked again.
PATIENCE = 60
# What only a stopped step needs, and what only a later step needs.
CHECKPOINTS = ("last.pt", "previous.pt")
WEIGHTS = "best.pt"


# What a study is made of


@dataclass(eq=False)
class Step:
    """One command line of a script.

    flags: {name: value}. A value may be a `Made` or `Measured`; a dict becomes JSON.
    output: the name in the step's folder that the script writes to, given to it by output_flag.
    checkpoints: the folder in the step's folder where the script keeps last.pt; it then takes
    --resume. None: the script begins again.
    """

    script: str
    flags: dict
    output: str = "output"
    output_flag: str = "output"
    checkpoints: str | None = None


@dataclass(eq=False)
class Made:
    """The path of what a step has written, as a flag's value."""

    step: Step


@dataclass(eq=False)
class Measured:
    """A value that is computed from the metrics of earlier runs with the same seed.

    runs: their names. of(*metrics) gives the value. estimate: what is shown until they are finished.
    """

    runs: tuple
    of: object
    estimate: object


@dataclass(eq=False)
class Run:
    """One line of a table, for one seed.

    labels: {column: what the run is}. read(folders): the metrics, from the folders of its steps in
    their order. published: {column: a number of others}, shown beside the run's own.
    """

    name: str
    labels: dict
    steps: list
    read: object
    published: dict = field(default_factory=dict)

    def needs(self):
        """Names of the runs that must be finished before this one."""
        return sorted({name for step in self.steps for value in values_in(step.flags) for name in _runs_of(value)})


def values_in(flags):
    """The values of flags, those in a dict too."""
    for value in flags.values():
        yield from values_in(value) if isinstance(value, dict) else [value]


def _runs_of(value):
    return value.runs if isinstance(value, Measured) else ()


@dataclass
class Column:
    """A column of the table: a metric, its mean and standard deviation over the seeds."""

    header: str
    metric: str
    format: str = "{:.4f}"


@dataclass
class Study:
    """A question, and the runs that answer it.

    runs(bench): the `Run`s of one seed. summary(groups): further lines of Markdown, from `Group`s.
    picture: (x, y, series): the metric or label on each axis, and the labels that name a curve; x None
    draws a line for each run. Or a function of the groups that returns (curves, x label, y label), as
    `pictures.draw_study` takes them.
    """

    name: str
    question: str
    runs: object
    columns: list
    picture: object
    seeds: int = 3
    summary: object = None


# Making steps


class StepFailed(Exception):
    """A step ended with an error; its text is the reason."""


class StepStopped(Exception):
    """A step was stopped by `Workshop.stop`, or was not begun because of it."""


class Workshop:
    """The work folder. Scripts run in it, so that the commands of a record hold relative paths.

    root: the folder of the scripts. echo: prints progress.
    kept: folders of steps whose weights stay, because a step of some study reads them; those of other
    steps are removed, since a hundred models fill a disk.
    jobs: how many threads call `make` at a time; the scripts share the CPU's cores among them.
    """

    def __init__(self, folder, root, echo=print, kept=(), jobs=1):
        self.folder = Path(folder).resolve()
        self.root = Path(root)
        self.echo = echo
        self.kept = set(kept)
        self.jobs = jobs
        self.is_stopping = False
        self._processes = set()
        self._lock = threading.Lock()
        # Reasons of the steps that failed in this process: another run with the step fails at once.
        self.failed = {}

    def resolve(self, step, results):
        """(words of the command without its output, whether they hold an estimate).

        results: {run name: metrics} of the finished runs with the same seed.
        """
        flags, is_estimate = self._filled(step, results, self.folder)
        words = []
        for name, value in flags.items():
            if isinstance(value, dict):
                value = json.dumps(value, sort_keys=True)
            items = value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{name}", *map(str, items)]
        return words, is_estimate

    def _filled(self, step, results, relative_to=None):
        """({name: value} of a step, with what is measured or made filled in; whether that holds an estimate).

        relative_to: a folder for paths to be relative to.
        """
        has_estimate = False

        def value_of(value):
            nonlocal has_estimate
            if isinstance(value, Made):
                # The step that makes it may itself depend on an estimate.
                has_estimate |= self.resolve(value.step, results)[1]
                path = self.path_of(value.step, results)
                return str(path if relative_to is None else path.relative_to(relative_to))
            if isinstance(value, Measured):
                if all(name in results for name in value.runs):
                    return value.of(*(results[name] for name in value.runs))
                has_estimate = True
                return value.estimate
            if isinstance(value, dict):
                return {name: value_of(item) for name, item in value.items()}
            return value

        flags = {name: value_of(value) for name, value in step.flags.items()}
        return flags, has_estimate

    def step_folder(self, step, results):
        """The folder of a step, named by its script and by a hash of its command."""
        words, _ = self.resolve(step, results)
        digest = hashlib.sha256("\0".join([step.script, *words]).encode()).hexdigest()[:12]
        return self.folder / "steps" / f"{step.script}-{digest}"

    def path_of(self, step, results):
        """What the step writes to."""
        return self.step_folder(step, results) / step.output

    def flags_of(self, step, results):
        """{name: value} of a step, with what is measured or made filled in: for its script's config class."""
        return self._filled(step, results)[0]

    def command(self, step, results):
        """The whole command as a list of words, beginning with the script."""
        words, _ = self.resolve(step, results)
        output = str(self.path_of(step, results).relative_to(self.folder))
        return [f"{step.script}.py", *words, f"--{step.output_flag}", output]

    def state(self, step, results):
        """What is known about a step: a dict with "state" new, running, stopped, failed or finished."""
        if self.resolve(step, results)[1]:
            return {"state": "new"}
        return read_json(self.step_folder(step, results) / "step.json", {"state": "new"})

    def is_finished(self, step, results, needs_weights=False):
        """Whether a step has ended well, and still has its weights if they are needed."""
        state = self.state(step, results)
        return state["state"] == "finished" and (state["has_weights"] or not needs_weights)

    def make(self, step, results, needs_weights=False):
        """Run a step unless it is finished. Raises StepFailed, or StepStopped after `stop`."""
        folder = self.step_folder(step, results)
        if folder in self.failed:
            raise StepFailed(self.failed[folder])
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder) as lock:
            if self.is_finished(step, results, needs_weights):
                return
            before = self.state(step, results)
            command = self.command(step, results)
            if before["state"] == "finished":
                # Its weights were removed; what is left would be taken for a finished run.
                remove_tree(folder, keep=("step.json", "log.txt"))
            # A script that failed or was killed may have a checkpoint as well.
            can_resume = step.checkpoints is not None and has_checkpoint(folder / step.checkpoints)
            words = [*command[1:], "--resume"] if can_resume else command[1:]
            facts = {
                "command": command,
                "state": "running",
                "commit": git_commit(),
                "machine": machine(),
                "jobs": self.jobs,
                "seconds": before.get("seconds", 0.0) if before["state"] != "finished" else 0.0,
                "attempts": before.get("attempts", 0) + 1,
            }
            write_json(folder / "step.json", facts)
            self.echo(f"  {'resumes' if can_resume else 'runs'} {folder.relative_to(self.folder)}")
            began = time.time()
            try:
                # What an earlier attempt has written to the log is not this one's error.
                log_begin = log_size(folder)
                status = self._call([sys.executable, self.root / f"{step.script}.py", *words], folder, lock)
            except BaseException:
                facts |= {"state": "stopped", "seconds": facts["seconds"] + time.time() - began}
                write_json(folder / "step.json", facts)
                raise
            facts["seconds"] += time.time() - began
            if status != 0:
                reason = last_error(folder / "log.txt", log_begin) or f"{step.script}.py ended with status {status}"
                write_json(folder / "step.json", facts | {"state": "failed", "status": status, "error": reason})
                self.failed[folder] = reason
                raise StepFailed(reason)
            has_weights = needs_weights or folder in self.kept
            for path in folder.rglob("*.pt"):
                if path.name in CHECKPOINTS or (path.name == WEIGHTS and not has_weights):
                    path.unlink()
            write_json(folder / "step.json", facts | {"state": "finished", "has_weights": has_weights})

    def _call(self, words, folder, lock):
        """Run a command in the work folder, its output added to log.txt: the exit status."""
        environment = dict(os.environ)
        if self.jobs > 1:
            # Threads of several programs on the same cores would wait for each other.
            environment.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // self.jobs)))
        with open(folder / "log.txt", "ab") as log:
            with self._lock:
                if self.is_stopping:
                    raise StepStopped
                process = subprocess.Popen(
                    list(map(str, words)),
                    cwd=self.folder,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # The lock is inherited: it holds as long as the script runs, even if this process is killed.
                    pass_fds=() if lock is None else (lock,),
                )
                self._processes.add(process)
            status = process.wait()
            with self._lock:
                self._processes.remove(process)
                if self.is_stopping:
                    raise StepStopped
            return status

    def stop(self, patience=0.0):
        """Stop the steps that run; each script saves its last update first. Their `make` raises StepStopped.

        patience: seconds before they are asked. Ctrl-C in a terminal has asked them already, and a second signal
        would stop them at once.
        """
        with self._lock:
            self.is_stopping = True
            processes = list(self._processes)
        until = time.time() + patience
        for process in processes:
            try:
                process.wait(max(0.0, until - time.time()))
            except subprocess.TimeoutExpired:
                process.terminate()


@contextmanager
def locked(folder):
    """Hold a step's folder. Raises StepFailed if another process does."""
    if fcntl is None:
        yield None
        return
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StepFailed(f"another process works on {folder}; wait until it ends, or stop it") from None
        yield descriptor
    finally:
        os.close(descriptor)


def remove_tree(folder, keep):
    """Remove all that is in a folder but files of these names at its top."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
        elif path.parent != folder or path.name not in (*keep, "lock"):
            path.unlink()


def log_size(folder):
    """Bytes of a step's log."""
    log = folder / "log.txt"
    return log.stat().st_size if log.exists() else 0


def last_error(log, begin=0):
    """The line in which a script said what is wrong, or its last line, after `begin` bytes of its log."""
    text = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b\w*error\b:?", line, re.IGNORECASE)]
    return (errors or lines or [""])[-1].strip()


def read_json(path, default):
    """The object in a JSON file; the default where there is none. Raises ValueError for a damaged file."""
    if not Path(path).exists():
        return default
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and its step is made again") from None


def machine():
    """What a time depends on, in words."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    if not torch.cuda.is_available() and choose_precision("auto", torch.device("cpu")) != "bf16":
        # Another speed, which names such as "AMD EPYC" do not tell.
        device += " without bf16"
    return f"{device}, {os.cpu_count()} cores, torch {torch.__version__}, {platform.system()}"


def processor():
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


# Running studies


@dataclass
class Outcome:
    """A run with one seed: its state (finished, failed or waiting), and its metrics or the reason."""

    run: Run
    seed: int
    state: str = "waiting"
    metrics: dict = field(default_factory=dict)
    error: str = ""
    commands: list = field(default_factory=list)
    commits: list = field(default_factory=list)
    machines: list = field(default_factory=list)


def safe_name(name):
    """A run's name as the name of a folder."""
    return re.sub(r"[^\w.+=-]+", "_", name).strip("_")


class StudyRuns:
    """The runs of a study for some seeds, and what is known about each.

    runs_of_seed: {seed: list of `Run`}. estimate(step, flags): expected seconds of a step.
    wanted: (run name, seed) of those that `run_all` makes; None: all.
    known: what `read_record` has of runs that were made elsewhere; one with the same commands is finished.
    shown(text): a text without paths of this machine, as it is in records.
    """

    def __init__(self, study, budget, runs_of_seed, workshop, estimate, wanted=None, known=None, shown=str):
        self.study = study
        self.workshop = workshop
        self.estimate = estimate
        self.known = {} if known is None else known
        self.shown = shown
        self.folder = workshop.folder / (study.name if budget == "cpu" else f"{study.name}_{budget}")
        # All runs with the first seed come before any with the second: a study that is stopped has a table.
        self.outcomes = [Outcome(run, seed) for seed, runs in runs_of_seed.items() for run in runs]
        self.wanted = [o for o in self.outcomes if wanted is None or (o.run.name, o.seed) in wanted]
        self.steps_with_readers = {
            id(value.step)
            for outcome in self.outcomes
            for step in outcome.run.steps
            for value in values_in(step.flags)
            if isinstance(value, Made)
        }
        for outcome in self.outcomes:
            self.look(outcome)

    def results(self, seed):
        """{run name: metrics} of the finished runs with a seed."""
        return {o.run.name: o.metrics for o in self.outcomes if o.seed == seed and o.state == "finished"}

    def result_path(self, outcome):
        return self.folder / safe_name(outcome.run.name) / f"seed-{outcome.seed}" / "result.json"

    def look(self, outcome):
        """Find out whether a run is finished: its result file is of the commands that it has now."""
        results = self.results(outcome.seed)
        outcome.commands = [self.workshop.command(step, results) for step in outcome.run.steps]
        if set(outcome.run.needs()) - set(results):
            return
        saved = read_json(self.result_path(outcome), {})
        if saved.get("commands") != outcome.commands:
            saved = self.known.get((outcome.run.name, outcome.seed))
            if saved is None or saved["commands"] != shown_commands(outcome, self.shown):
                return
        outcome.state = "finished"
        outcome.metrics = saved["metrics"]
        outcome.commits = saved["commits"]
        outcome.machines = saved.get("machines", [])
        if not outcome.machines:
            # A result from before machines were saved with it; its steps have them.
            states = [self.workshop.state(step, results) for step in outcome.run.steps]
            outcome.machines = sorted({state["machine"] for state in states if "machine" in state})

    def run(self, outcome):
        """Make the steps of a run, and read its metrics. A failure is in the outcome."""
        results = self.results(outcome.seed)
        missing = sorted(set(outcome.run.needs()) - set(results))
        if missing:
            outcome.state = "failed"
            outcome.error = f"it needs the results of {', '.join(missing)}"
            return
        steps = outcome.run.steps
        try:
            for step in steps:
                self.workshop.make(step, results, id(step) in self.steps_with_readers)
            outcome.commands = [self.workshop.command(step, results) for step in steps]
            outcome.metrics = outcome.run.read([self.workshop.step_folder(step, results) for step in steps])
        # A file that a script should have written, and has not, is a failure of this run alone.
        except (StepFailed, OSError, ValueError, KeyError, TypeError) as error:
            outcome.state = "failed"
            outcome.error = str(error) if isinstance(error, StepFailed) else f"{type(error).__name__}: {error}"
            return
        outcome.state = "finished"
        states = [self.workshop.state(step, results) for step in steps]
        outcome.commits = sorted({state["commit"] for state in states})
        outcome.machines = sorted({state["machine"] for state in states})
        saved = {
            "run": outcome.run.name,
            "seed": outcome.seed,
            "labels": outcome.run.labels,
            "commands": outcome.commands,
            "commits": outcome.commits,
            "machines": outcome.machines,
            "metrics": outcome.metrics,
        }
        write_json(self.result_path(outcome), saved)

    def run_all(self, begun, done):
        """Make all wanted runs that are not finished, `workshop.jobs` at a time.

        begun(outcome): called before a run, and for one that is finished. done(outcome): called after it. Both are
        called by this thread. On Ctrl-C or SIGTERM the scripts save before the exception leaves.
        """
        waiting = list(self.wanted)
        running = {}
        with ThreadPoolExecutor(self.workshop.jobs) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < self.workshop.jobs:
                        outcome = self._next(waiting, running.values())
                        if outcome is None and running:
                            break
                        # Runs that need each other: the first one fails, and says what it lacks.
                        outcome = waiting[0] if outcome is None else outcome
                        waiting.remove(outcome)
                        begun(outcome)
                        if outcome.state != "finished":
                            running[pool.submit(self.run, outcome)] = outcome
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        outcome = running.pop(future)
                        future.result()
                        done(outcome)
            except BaseException as error:
                self.workshop.stop(PATIENCE if isinstance(error, KeyboardInterrupt) else 0.0)
                raise

    def _next(self, waiting, running):
        """The first waiting run that needs no result of a run which is not over, and makes no step of a running one."""
        not_over = {(outcome.run.name, outcome.seed) for outcome in [*waiting, *running]}
        being_made = {folder for outcome in running for folder in self._folders_to_make(outcome)}
        for outcome in waiting:
            # Runs before this one may have measured what it needs.
            self.look(outcome)
            if outcome.state == "finished":
                return outcome
            if any((name, outcome.seed) in not_over for name in outcome.run.needs()):
                continue
            if being_made.isdisjoint(self._folders_to_make(outcome)):
                return outcome
        return None

    def _folders_to_make(self, outcome):
        """Folders of the steps of a run that are not finished."""
        results = self.results(outcome.seed)
        return {
            self.workshop.step_folder(step, results)
            for step in outcome.run.steps
            if not self.workshop.is_finished(step, results, id(step) in self.steps_with_readers)
        }

    def expected_seconds(self, counted=None):
        """Seconds that the steps of wanted runs which are not finished will take.

        counted: folders of steps that another study makes; those of this one are added.
        """
        counted = set() if counted is None else counted
        seconds = 0.0
        for outcome in self.wanted:
            if outcome.state == "finished":
                continue
            results = self.results(outcome.seed)
            for step in outcome.run.steps:
                folder = self.workshop.step_folder(step, results)
                needs_weights = id(step) in self.steps_with_readers
                # Two steps whose flags are estimates may have the same ones, and yet be two steps.
                key = (folder, id(step)) if self.workshop.resolve(step, results)[1] else folder
                if key in counted or self.workshop.is_finished(step, results, needs_weights):
                    continue
                counted.add(key)
                seconds += self.estimate(step, self.workshop.flags_of(step, results))
        return seconds

    def count(self, state):
        """The number of runs, wanted or not, that are in a state."""
        return sum(outcome.state == state for outcome in self.outcomes)


def shown_commands(outcome, shown):
    """The commands of a run as its record has them."""
    return [shown(shlex.join(["python", *command])) for command in outcome.commands]


def describe_seconds(seconds):
    """Seconds in words: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


# Tables


@dataclass
class Group:
    """The outcomes of one run with all its seeds: a line of the table."""

    run: Run
    outcomes: list

    @property
    def finished(self):
        return [outcome for outcome in self.outcomes if outcome.state == "finished"]

    def values(self, metric):
        """{seed: value} of a metric; seeds without it are left out."""
        found = {outcome.seed: outcome.metrics.get(metric) for outcome in self.finished}
        return {seed: value for seed, value in found.items() if value is not None}

    def machines(self):
        """{seed: the machines that the run was made on}."""
        return {outcome.seed: outcome.machines for outcome in self.finished}

    def mean(self, metric):
        """The mean over seeds, or None."""
        return mean_and_deviation(list(self.values(metric).values()))[0]


def mean_and_deviation(values):
    """(mean, sample standard deviation) of numbers; None where there are too few for one."""
    if not values:
        return None, None
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def paired_difference(first, second, metric="val_bpb"):
    """(mean of first minus second over the seeds that both have, its standard error, seeds); None for what is missing.

    Pairs by seed: runs of one row layout then read the same rows in the same order; for others pairing
    does no harm.
    """
    ours = first.values(metric)
    theirs = second.values(metric)
    return mean_and_error([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def mean_and_error(values):
    """(mean, its standard error, number of values); None for what needs more values."""
    mean, deviation = mean_and_deviation(values)
    return mean, None if deviation is None else deviation / math.sqrt(len(values)), len(values)


def difference_cell(first, second, metric="val_bpb"):
    """`paired_difference` as a cell: -0.0213 ± 0.0044 (3), or -."""
    return error_cell(*paired_difference(first, second, metric))


def curve_difference_cell(group, curve, cost, metric="val_bpb"):
    """A group minus a curve at equal cost, paired by seed, as `difference_cell`.

    curve: `Group`s of one model at several budgets. It is read at what the group's run of the same seed costs:
    linear in the logarithm of the cost from point to point, and a little beyond its ends as at its
    ends. Left out are seeds for which it has one point only or none near that cost, and for seconds runs
    made on another machine.
    """
    ours, costs = group.values(metric), group.values(cost)
    of_curve = [(point.values(cost), point.values(metric), point.machines()) for point in curve]
    machines = group.machines()
    differences = []
    for seed in ours:
        points = sorted(
            (at[seed], of[seed])
            for at, of, on in of_curve
            if seed in at and seed in of and ("seconds" not in cost or on[seed] == machines[seed])
        )
        there = read_curve_at(points, costs[seed]) if seed in costs else None
        if there is not None:
            differences.append(ours[seed] - there)
    return error_cell(*mean_and_error(differences))


# Points of a curve must differ by this factor of the cost: a corpus that is too small for the larger
# budgets gives equal runs. And a curve is read at most this far beyond its ends.
LEAST_STEP = 1.5
MOST_BEYOND = 2.0


def read_curve_at(points, x):
    """The value at x of points (x, y) in order: linear in log x, beyond the ends as at the ends.

    None: too few points, or x is too far beyond.
    """
    kept = []
    for point in points:
        if not kept or point[0] >= LEAST_STEP * kept[-1][0]:
            kept.append(point)
    points = kept
    if len(points) < 2 or not points[0][0] / MOST_BEYOND <= x <= points[-1][0] * MOST_BEYOND:
        return None
    right = next((number for number in range(1, len(points) - 1) if points[number][0] >= x), len(points) - 1)
    (x_left, y_left), (x_right, y_right) = points[right - 1], points[right]
    return y_left + (y_right - y_left) * math.log(x / x_left) / math.log(x_right / x_left)


def error_cell(mean, error, n):
    """A mean with its standard error and the number of values: -0.0213 ± 0.0044 (3), or -."""
    if mean is None:
        return "-"
    return f"{mean:+.4f}" + ("" if error is None else f" ± {error:.4f}") + f" ({n})"


def groups_of(outcomes):
    """The `Group`s of outcomes, in the order of their runs."""
    groups = {}
    for outcome in outcomes:
        groups.setdefault(outcome.run.name, Group(outcome.run, [])).outcomes.append(outcome)
    return list(groups.values())


def markdown_table(header, rows):
    """Lines of a Markdown table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["-"] * len(header), *rows)]


def metric_cell(group, column):
    """Mean and standard deviation of a metric over seeds: 1.8423 ± 0.0051, or -."""
    mean, deviation = mean_and_deviation(list(group.values(column.metric).values()))
    if mean is None:
        return "-"
    text = column.format.format(mean)
    return text if deviation is None else f"{text} ± {column.format.format(deviation)}"


def state_cell(group):
    """How many seeds are finished, and what became of the others."""
    finished = len(group.finished)
    failed = [str(outcome.seed) for outcome in group.outcomes if outcome.state == "failed"]
    waiting = sum(outcome.state == "waiting" for outcome in group.outcomes)
    parts = [str(finished)]
    if failed:
        parts.append(f"**failed: seed {', '.join(failed)}**")
    if waiting:
        parts.append(f"{waiting} to do")
    return ", ".join(parts)


def study_table(study, groups):
    """The table of a study as lines of Markdown."""
    labels = list(dict.fromkeys(label for group in groups for label in group.run.labels))
    published = list(dict.fromkeys(name for group in groups for name in group.run.published))
    header = [*labels, *(column.header for column in study.columns), *published, "seeds"]
    rows = []
    for group in groups:
        # What nobody has made yet is in a line below the table.
        if all(outcome.state == "waiting" for outcome in group.outcomes):
            continue
        rows.append(
            [group.run.labels.get(label, "-") for label in labels]
            + [metric_cell(group, column) for column in study.columns]
            + [group.run.published.get(name, "-") for name in published]
            + [state_cell(group)]
        )
    return markdown_table(header, rows)


# Records


def record_folder(runs, records, budget):
    """The folder of a study's record, chosen when it first has one: records/DATE_NAME, by the day of the first run."""
    note = runs.folder / "record.json"
    saved = read_json(note, None)
    if saved is not None:
        return Path(records) / saved["name"]
    name = f"{date.today().isoformat()}_{runs.study.name}" + ("" if budget == "cpu" else f"_{budget}")
    number = 1
    # A record of the same day from another work folder stays as it is.
    while (Path(records) / (name if number == 1 else f"{name}_{number}")).exists():
        number += 1
    name = name if number == 1 else f"{name}_{number}"
    write_json(note, {"name": name})
    return Path(records) / name


def continue_in(runs, name):
    """Let the record of a study be the one of this name."""
    write_json(runs.folder / "record.json", {"name": name})


def read_record(folder, study, budget):
    """(seeds, {(run name, seed): commands, metrics, commits and machines}) of the finished runs in a record.

    Raises ValueError if the folder holds no record, a damaged one, or one of another study or budget.
    """
    folder = Path(folder)
    if not (folder / "settings.json").exists() or not (folder / "metrics.jsonl").exists():
        raise ValueError(f"{folder} is no record of experiments.py: it has no settings.json and metrics.jsonl")
    try:
        settings = json.loads((folder / "settings.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        metrics_of = {(metrics.pop("run"), metrics.pop("seed")): metrics for metrics in lines}
        of_study = (settings["study"], settings["budget"])
        seeds = settings["seeds"]
        known = {
            (run["run"], run["seed"]): {
                "commands": run["commands"],
                "commits": run["commits"],
                # Earlier records name one machine for all.
                "machines": run.get("machines", [settings.get("machine")]),
                "metrics": metrics_of[run["run"], run["seed"]],
            }
            for run in settings["runs"]
            if run["state"] == "finished"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder} is damaged ({type(error).__name__}: {error}); restore its settings.json and metrics.jsonl"
        ) from None
    if of_study != (study, budget):
        raise ValueError(
            f"{folder} is the record of {of_study[0]} with the budget {of_study[1]}, not of {study} with {budget}; "
            "name its study and --budget"
        )
    return seeds, known


def status_line(runs):
    """How much of a study is done, in one line."""
    total = len(runs.outcomes)
    failed = runs.count("failed")
    finished = runs.count("finished")
    if finished == total:
        return f"All {total} runs are finished."
    failures = f", {failed} failed" if failed else ""
    return f"**Partial: {finished} of {total} runs are finished{failures}.**"


def write_record(runs, records, budget, repeat, basis, shown):
    """Write the record of a study as it is now. Returns its folder.

    repeat: the command that makes it again. basis: what the expected time rests on.
    shown(text): a text without paths of this machine.
    """
    study = runs.study
    folder = record_folder(runs, records, budget)
    groups = groups_of(runs.outcomes)
    seeds = list(dict.fromkeys(outcome.seed for outcome in runs.outcomes))
    commits = sorted({commit for outcome in runs.outcomes for commit in outcome.commits})
    machines = sorted({name for outcome in runs.outcomes for name in outcome.machines}) or [machine()]
    settings = {
        "study": study.name,
        "budget": budget,
        "command": repeat,
        "seeds": seeds,
        "commits": commits,
        "machines": machines,
        "runs_at_a_time": runs.workshop.jobs,
        "expected_time_is_from": basis,
        "runs": [
            {
                "run": outcome.run.name,
                "seed": outcome.seed,
                "state": outcome.state,
                **({"error": shown(outcome.error)} if outcome.error else {}),
                "commits": outcome.commits,
                "machines": outcome.machines,
                "commands": shown_commands(outcome, shown),
            }
            for outcome in runs.outcomes
        ],
    }
    write_json(folder / "settings.json", settings)
    lines = [
        json.dumps({"run": o.run.name, "seed": o.seed, **o.run.labels, **o.metrics}, allow_nan=False) + "\n"
        for o in runs.outcomes
        if o.state == "finished"
    ]
    write_text(folder / "metrics.jsonl", "".join(lines))
    status = status_line(runs)
    table = [
        f"# {study.name}",
        "",
        status,
        "Each number is the mean over the seeds, ± the standard deviation over them where there are two or more.",
        "",
        *study_table(study, groups),
    ]
    not_made = [group.run.name for group in groups if all(o.state == "waiting" for o in group.outcomes)]
    if not_made:
        table += ["", f"Not made yet: {', '.join(not_made)}."]
    failures = [outcome for outcome in runs.outcomes if outcome.state == "failed"]
    if failures:
        table += ["", "Failed:", ""]
        table += [f"- {outcome.run.name}, seed {outcome.seed}: {shown(outcome.error)}" for outcome in failures]
    if study.summary is not None and any(group.finished for group in groups):
        table += ["", *study.summary(groups)]
    write_text(folder / "table.md", "\n".join(table) + "\n")
    has_picture = draw(folder / "plot.png", study, groups)
    write_text(folder / "README.md", readme(study, status, seeds, commits, machines, repeat, failures, has_picture))
    return folder


def write_text(path, text):
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text))


def readme(study, status, seeds, commits, machines, repeat, failures, has_picture):
    """README.md of a record."""
    paragraphs = [f"# {study.name}", status, study.question]
    facts = f"Seeds {', '.join(map(str, seeds))}. Machine: {'; '.join(machines)}. "
    facts += f"Commit: {', '.join(commits) or 'none yet'}."
    if len(commits) > 1 or len(machines) > 1:
        facts += " settings.json says which run is of which commit and machine."
    paragraphs += [facts, "To repeat it, or to go on where it stopped:", f"    {repeat}"]
    paragraphs.append(
        "[table.md](table.md) has the numbers, [settings.json](settings.json) every command and its commit, "
        "[metrics.jsonl](metrics.jsonl) the metrics of each run and seed."
    )
    if failures:
        paragraphs.append(f"{len(failures)} runs failed: see table.md.")
    if has_picture:
        paragraphs.append("![The table as a picture](plot.png)")
    wrapped = [wrapped_command(p) if p.startswith("    ") else textwrap.fill(p, 110) for p in paragraphs]
    return "\n\n".join(wrapped) + "\n"


def wrapped_command(line):
    """An indented command in lines of 110 characters that a shell reads as one, when they are copied."""
    lines = ["   "]
    for word in map(shlex.quote, shlex.split(line)):
        if len(lines[-1]) + len(word) > 106:
            lines[-1] += " \\"
            lines.append("       ")
        lines[-1] += f" {word}"
    return "\n".join(lines)


def draw(path, study, groups):
    """Draw plot.png from the finished runs; whether there was anything to draw."""
    # matplotlib takes half a second to import, for which --help should not wait.
    from blt.pictures import draw_study

    if callable(study.picture):
        curves, x_label, y_label = study.picture(groups)
    else:
        curves, x_label, y_label = curves_of(study, groups)
    if not curves:
        return False
    draw_study(path, curves, x_label, y_label, study.name)
    return True


def curves_of(study, groups):
    """(curves, x label, y label) of a study whose picture is (x, y, series)."""
    x, y, series = study.picture
    curves = {}
    for group in groups:
        mean, deviation = mean_and_deviation(list(group.values(y).values()))
        if mean is None:
            continue
        if x is None:
            at = group.run.name
        else:
            at = group.mean(x) if group.mean(x) is not None else group.run.labels.get(x)
            if at is None or not isinstance(at, (int, float)):
                continue
        name = ", ".join(f"{label} {group.run.labels.get(label, '-')}" for label in series) or study.name
        curves.setdefault(name, []).append((at, mean, deviation or 0.0))
    names = {column.metric: column.header for column in study.columns}
    return curves, names.get(x, x), names.get(y, y)
