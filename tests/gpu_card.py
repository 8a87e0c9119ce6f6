"""What `make gpu` runs: tests, speeds and a training run on this machine's GPU, in at most nine minutes.

    python tests/gpu_card.py [--dry_run] [--records FOLDER] [--python PYTHON]

Prints one table. Writes records/DATE_CARD/: card.json (all numbers), README.md (the table and the command) and the
output of each part. A part is a process with a time limit; the table shows what did not finish, and the parts after
it run all the same. --dry_run has tiny sizes and runs on a CPU, to see that the command itself works. Needs
torch, numpy, tqdm and pytest.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
ALL_SECONDS = 540
TRAIN_SECONDS = 170
# Of these seconds, what compiling, evaluations and reading data take.
TRAIN_OVERHEAD = 110
# Updates of llm.py's presets for GPUs. The sample is small: more would read it too many times.
MOST_UPDATES = 1000
TINY_MODEL = (
    "--encoder_dim 32 --global_dim 32 --global_layers 1 --decoder_dim 32 --decoder_layers 1 --hash_rows 64 --window 16"
).split()
TINY_ROWS = ["--row_bytes", "256", "--batch_rows", "2"]
BENCH = ["bench.py", "--no_repatching"]


@dataclass
class Part:
    """A command with a time limit, and what became of it."""

    name: str
    command: list
    limit_s: float
    state: str = "not started"
    seconds: float = 0.0
    result: dict = field(default_factory=dict)


class Card:
    """The parts of a run, and the folder of their files."""

    def __init__(self, folder, python, is_dry):
        self.folder = folder
        self.python = python
        self.is_dry = is_dry
        self.begin = time.perf_counter()
        self.parts = []

    def start(self, name, command, limit_s):
        """Start a part: (Part, process)."""
        left_s = ALL_SECONDS - (time.perf_counter() - self.begin)
        part = Part(name, command, max(1.0, min(limit_s, left_s)))
        self.parts.append(part)
        print(f"{name}: at most {part.limit_s:.0f} s", flush=True)
        log = open(self.folder / f"{slug(name)}.log", "w")
        with log:
            # In a session of its own, so that its children end with it.
            process = subprocess.Popen(
                [self.python, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            )
        part.seconds = -time.perf_counter()
        return part, process

    def finish(self, part, process, read):
        """Wait for a part's end or its limit, and read its numbers: read() gives them as a dict."""
        elapsed_s = time.perf_counter() + part.seconds
        try:
            code = process.wait(max(0.1, part.limit_s - elapsed_s))
            part.state = "done" if code == 0 else f"failed: {last_line(self.folder / f'{slug(part.name)}.log')}"
        except subprocess.TimeoutExpired:
            part.state = f"not finished in {part.limit_s:.0f} s"
        try:
            # What a part has left behind ends too, as after a limit.
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        part.seconds += time.perf_counter()
        try:
            part.result = read()
        except (OSError, ValueError, KeyError, IndexError) as error:
            # A part that was stopped may have written half of its numbers, or none.
            if part.state == "done":
                part.state = f"done, but its numbers cannot be read: {error}"
        return part.result

    def run(self, name, command, limit_s, read):
        """Start a part and finish it: its numbers."""
        return self.finish(*self.start(name, command, limit_s), read)

    def bench(self, name, flags, limit_s, read):
        """A part that is a run of bench.py: read(the numbers that it wrote) gives the result."""
        output = f"{slug(name)}.json"
        command = [str(ROOT / BENCH[0]), *BENCH[1:], "--output", output, *flags]
        return self.run(name, command, limit_s, lambda: read(json.loads((self.folder / output).read_text())))


def slug(text):
    """A file name for a text: small letters, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def last_line(path):
    """The last line of a log that says something, for the table."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no output"


def speed_of(numbers):
    """What bench.py measured of one model and its rivals."""
    model = numbers["models"][0]
    result = {
        "kB/s": round(model["bytes_per_second"] / 1e3, 1),
        "step ms": round(model["step_ms"]["median"], 1),
        "MFU": round(model["mfu"], 4),
        "GB": round(model["peak_bytes"] / 1e9, 2),
    }
    if model["compile_s"] is not None:
        result["compile s"] = round(model["compile_s"])
    for rival in numbers.get("against", []):
        result[f"time of {rival['kind']}"] = round(rival["time_ratio"]["step_ms"]["median"], 2)
        if rival["kind"] == "flat":
            result["MFU by flat's"] = round(rival["mfu_ratio"]["median"], 2)
    return result


def entropies_of(numbers):
    """Speed of the entropy pass by size of the entropy model."""
    return {
        f"{record['name']} kB/s": round(record["bytes_per_second"]["median"] / 1e3, 1)
        for record in numbers["entropy_pass"]
    }


def generation_of(numbers):
    """Milliseconds a byte of greedy generation, by candidate."""
    candidates = numbers["generation"][0]["contestants"]
    return {f"{name}, ms a byte": round(times["ms_per_byte"]["median"], 2) for name, times in candidates.items()}


def attention_of(path):
    """Milliseconds of FlexAttention and of varlen_attn, both passes, by shape."""
    found = {}
    for name, numbers in json.loads(path.read_text()).items():
        times = numbers.get("failed")
        if times is None:
            times = f"{numbers['flex ms']:.2f}, {numbers['varlen ms']:.2f}"
        found[f"{name}, ms of flex and varlen"] = times
    return found


def training_of(folder):
    """The last and best validation figures in a run's metrics.jsonl, which a stopped run has too."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "val_bpb" in line]
    return {
        "val bpb": round(min(line["val_bpb"] for line in evaluations), 4),
        "updates": lines[-1]["step"],
        "MB read": round(lines[-1]["bytes"] / 1e6, 1),
    }


def tests_of(log):
    """The line of a log in which pytest counts."""
    counts = re.findall(r"^\d+ (?:passed|failed|skipped|error).*$", log.read_text(), re.M)
    return {"tests": counts[-1]}


def updates_in_time(speed):
    """How many updates of llm.py fit into TRAIN_SECONDS, by the step that was just measured."""
    if "step ms" not in speed:
        return MOST_UPDATES // 3
    # bench.py accumulates nothing; where a preset accumulates, half as many updates fit.
    return max(100, min(MOST_UPDATES, int(1000 * (TRAIN_SECONDS - TRAIN_OVERHEAD) / speed["step ms"] / 2)))


def measure(card):
    """Run all parts."""
    dry = card.is_dry
    # Compiling takes most of the time, and many cores. So everything is compiled at once, while the tests
    # run. torch keeps the kernels on disk for the parts that measure.
    models = {
        "llm.py and flat": ["--models", "llm", "--against", "flat", "--profile"],
        "llm_large.py": ["--models", "llm_large", "--profile"],
    }
    once = ["--repeats", "1", "--warmup", "1", "--no_entropy_pass"]
    once += [*TINY_MODEL, *TINY_ROWS] if dry else []
    (card.folder / "compiling").mkdir()
    begun = []
    for name, flags in models.items():
        output = ["--output", f"compiling/{slug(name)}.json"]
        command = [str(ROOT / BENCH[0]), *BENCH[1:], *flags, *once, *output]
        begun.append((card.start(f"compiling {name}", command, 200), dict))
    pytest = ["-m", "pytest", "-q", "-o", "addopts=", "--noconftest", "-p", "no:cacheprovider"]
    for name, file in (("GPU tests", "test_gpu.py"), ("tests of equal results", "test_gpu_equal.py")):
        log = card.folder / f"{slug(name)}.log"
        begun.append((card.start(name, [*pytest, str(ROOT / "tests" / file)], 240), partial(tests_of, log)))
    for part_and_process, read_result in begun:
        card.finish(*part_and_process, read_result)

    alone = once if dry else ["--repeats", "5", "--no_entropy_pass"]
    speed = {}
    for name, flags in models.items():
        speed[name] = card.bench(name, [*flags, *alone], 110, speed_of)
    # bench.py times the entropy pass beside a model; the smallest takes the least time.
    tiny = ["--models", "custom", *TINY_MODEL, *TINY_ROWS, "--compile", "no", "--repeats"]
    card.bench("entropy pass", [*tiny, *(["1", "--streams", "1"] if dry else ["3"])], 45, entropies_of)
    new_bytes = ["--new_bytes", "4" if dry else "200", "--repeats", "1" if dry else "3", "--warmup", "1"]
    size = TINY_MODEL if dry else []
    card.bench("generation", ["--generation", "--no_reading", "--models", "llm", *new_bytes, *size], 30, generation_of)
    if not dry:
        # There is no varlen_attn on a CPU.
        command = [str(ROOT / "tests" / "gpu_attention.py"), "attention.json"]
        card.run("attention", command, 50, lambda: attention_of(card.folder / "attention.json"))
    updates = 4 if dry else updates_in_time(speed["llm.py and flat"])
    command = [
        str(ROOT / "llm.py"), "--patch_method", "space", "--output", "training", "--steps", str(updates),
        "--eval_every", str(max(1, updates // 6)), "--sample_bytes", "0" if dry else "200",
        *([*TINY_MODEL, *TINY_ROWS, "--max_bytes", "20000", "--val_bytes", "2000"] if dry else []),
    ]  # fmt: skip
    card.run("training with llm.py", command, TRAIN_SECONDS, lambda: training_of(card.folder / "training"))


def table(card):
    """The table, as Markdown."""
    lines = ["| part | result | seconds | state |", "| - | - | - | - |"]
    for part in card.parts:
        result = ", ".join(f"{name} {value}" for name, value in part.result.items())
        lines.append(f"| {part.name} | {result or '-'} | {part.seconds:.0f} | {part.state} |")
    return "\n".join(lines)


def write_records(card, folder, name):
    """Write card.json, README.md and the logs."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {
        "card": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": git_commit(),
        "seconds": round(time.perf_counter() - card.begin, 1),
        "parts": [vars(part) for part in card.parts],
    }
    for path in sorted(card.folder.glob("*.json")):
        numbers[path.stem] = json.loads(path.read_text())
    (folder / "card.json").write_text(json.dumps(numbers, indent=1) + "\n")
    facts = f"{name}, torch {torch.__version__}, Python {numbers['python']}, commit {numbers['commit']}"
    lines = [f"# {name}", "", "    make gpu", "", facts + ".", ""]
    for part in card.parts:
        lines.append(f"- {part.name}: {part.state}, {part.seconds:.0f} s")
        lines += [f"    - {what}: {value}" for what, value in part.result.items()]
    # tests/test_layout.py holds records to its line length.
    wrapped = [textwrap.fill(line, 110, subsequent_indent="      ", drop_whitespace=False) for line in lines]
    (folder / "README.md").write_text("\n".join(wrapped) + "\n")
    for path in card.folder.glob("*.log"):
        # The end of an output says what happened; records stay small.
        (folder / path.name).write_text(path.read_text(errors="replace")[-20_000:])


def git_commit():
    """The commit of this checkout, or None outside of git."""
    done = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, on a CPU too")
    parser.add_argument("--records", type=Path, default=ROOT / "records", help="where DATE_CARD/ goes")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the parts")
    given = parser.parse_args()
    if not torch.cuda.is_available() and not given.dry_run:
        parser.error("torch finds no CUDA device here; --dry_run shows that the command itself works")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    with tempfile.TemporaryDirectory() as scratch:
        card = Card(Path(scratch), given.python, given.dry_run)
        measure(card)
        folder = given.records / f"{date.today()}_{slug(name)}"
        write_records(card, folder, name)
    print(f"\n{name}, torch {torch.__version__}, {time.perf_counter() - card.begin:.0f} s\n\n{table(card)}")
    print(f"\nwrote {folder}")
    is_good = all(part.state == "done" for part in card.parts)
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
