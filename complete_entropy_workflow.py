"""Everything from end to end, with a comparison: one BLT for each patching method, on the same text.

Reads   a corpus and entropy_model.pth (trained here first with --train_entropy)
Writes  workflow/: comparison.json, comparison.png, comparison.md, and for each method its checkpoints and pictures
Run     python complete_entropy_workflow.py --quick_demo --train_entropy [--methods global monotonic space static]

Every method's threshold is set to the same average patch size, so that all models spend alike on
the latent transformer; space patches are as long as the text makes them. Updates, rows, seed and model
are the same for all; rows that are padded hold a little less text, which the table shows. One seed says
little about small differences: --seeds 3 repeats each run and prints the spread. Interrupted, it goes on
with the same command and --resume.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

import numpy as np

import entropy_llm
from blt import ppmd
from blt.checkpoints import keep_earlier_run
from blt.checks import check, check_positive
from blt.config import run_script
from blt.corpus import DataConfig
from blt.files import write_atomically, write_json
from blt.patch_rules import RULES, causal_methods
from blt.pictures import draw_comparison
from blt.runs import claim_output
from llm import run
from train_blt import TrainBLTConfig


@dataclass
class WorkflowConfig(TrainBLTConfig):
    """Settings of train_blt.py, and what is compared."""

    train_entropy: bool = False  # train the entropy model first
    entropy_preset: list[str] = field(default_factory=lambda: ["nano", "cpu"])  # presets of entropy_llm.py for that
    entropy_steps: int | None = None  # updates of the entropy model; None: as its presets say
    methods: list[str] = field(default_factory=lambda: ["global", "monotonic", "space", "static"])  # what to compare
    patch_size: float = 4.5  # average bytes a patch, for the methods that have a threshold
    seeds: int = 1  # runs of each method, with seeds seed, seed + 1, ...
    output: str = "workflow"  # folder of everything written

    CHOICES = TrainBLTConfig.CHOICES | {"methods": causal_methods}
    RUNS_TOGETHER: ClassVar = False

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "seeds", "patch_size", "entropy_steps")
        allowed = causal_methods()
        check(self, "methods", self.methods and set(self.methods) <= set(allowed), "some of " + ", ".join(allowed))
        entropy_llm.EntropyRunConfig.PRESETS.choose(self.entropy_preset)
        if self.init_from is not None:
            raise ValueError("the workflow trains from scratch; --init_from is for llm.py and train_blt.py")
        if self.epochs is not None:
            raise ValueError("the workflow compares runs of as many updates; use --steps instead of --epochs")
        if self.patch_method is not None:
            raise ValueError("the workflow compares patching methods; use --methods instead of --patch_method")


def train_entropy_model(config):
    """Run entropy_llm.py's training on the workflow's corpus."""
    of_corpus = {f.name for f in fields(DataConfig)} - {"preset", "max_bytes", "val_bytes"}
    settings = {name: getattr(config, name) for name in [*of_corpus, "seed", "zero_init"]}
    if config.entropy_steps is not None:
        settings.update(steps=config.entropy_steps, eval_every=config.entropy_steps)
    entropy_config = entropy_llm.EntropyRunConfig(
        preset=config.entropy_preset,
        output=config.entropy_model_path,
        resume=config.resume and entropy_llm.run_folder(config.entropy_model_path).exists(),
        overwrite=config.overwrite,
        **settings,
    )
    entropy_llm.main(entropy_config)


def folder_of(config, method, seed):
    """The output folder of one run."""
    return Path(config.output) / f"{method}_seed{seed}"


def run_method(config, method, seed):
    """Train one BLT on patches of one method: `train_blt`'s dict."""
    folder = folder_of(config, method, seed)
    settings = {f.name: getattr(config, f.name) for f in fields(TrainBLTConfig)}
    settings.update(
        patch_method=method,
        seed=seed,
        sample_bytes=0,
        output=str(folder),
        # A run that has ended only reads its result again; one that had not begun is made.
        resume=config.resume and folder.exists(),
        target_patch_size=None if RULES[method].unit is None else config.patch_size,
    )
    print(f"\n=== {method}, seed {seed} ===")
    return run(TrainBLTConfig(**settings), make_patches=True)


def compare(config):
    """Train every method with every seed: one dict of results a method, the fewest bits per byte first."""
    rows = []
    for method in config.methods:
        results = [run_method(config, method, config.seed + i) for i in range(config.seeds)]
        bpb = np.array([result["val_bpb"] for result in results])
        row = {
            "method": method,
            "avg_patch_size": results[0]["avg_patch_size"],
            "val_bpb": float(bpb.mean()),
            "val_bpb_of_each_seed": bpb.tolist(),
            "trained_bytes": round(np.mean([r["bytes_per_second"] * r["train_seconds"] for r in results])),
            "bytes_per_second": float(np.mean([result["bytes_per_second"] for result in results])),
            "val_bytes": results[0]["val_bytes"],
            # The same for all rows, because all runs have the same text.
            "baselines": results[0]["baselines"],
        }
        if config.seeds > 1:
            row["std"] = float(bpb.std(ddof=1))
        rows.append(row)
    return sorted(rows, key=lambda row: row["val_bpb"])


def markdown_table(rows, seeds):
    """The comparison as a Markdown table, with compressors on the same bytes below the models."""
    lines = ["| method | bytes a patch | val bpb | spread | text read | trained at |", "| - | - | - | - | - | - |"]
    for row in rows:
        spread = f"± {row['std']:.4f} (std of {seeds} seeds)" if "std" in row else "one seed"
        lines.append(
            f"| {row['method']} | {row['avg_patch_size']:.2f} | {row['val_bpb']:.4f} | {spread} | "
            f"{row['trained_bytes'] / 1e6:.2f} MB | {row['bytes_per_second'] / 1e3:.1f} kB/s |"
        )
    found = rows[0]["baselines"]
    if found["ppmd"] is None:
        lines.append(f"| PPMd: {ppmd.INSTALL} | | | | | |")
    else:
        lines.append(f"| {ppmd.label(found['ppmd'])} | | {found['ppmd']['bpb']:.4f} | no seed | | |")
    for name, bpb in found["untrained"].items():
        lines.append(f"| {name}, untrained | | {bpb:.4f} | no seed | | |")
    return "\n".join(lines) + "\n"


def main(config):
    output = Path(config.output)
    if config.resume and not output.exists():
        # Stopped before its first run, or never begun: each run below begins if it has nothing to go on with.
        print(f"note: {output} is not there yet; the workflow begins")
        output.mkdir(parents=True)
    with claim_output(config, output):
        if not config.resume and not config.overwrite:
            # An earlier comparison may hold hours of work. The runs themselves are kept by `fit`.
            keep_earlier_run(output, names=("comparison.json", "comparison.md", "comparison.png"))
        run_all(config)


def run_all(config):
    """The whole workflow, with its folder held."""
    if config.train_entropy:
        print("=== entropy model ===")
        train_entropy_model(config)
    rows = compare(config)
    table = markdown_table(rows, config.seeds)
    print(f"\n{table}")
    print(f"each: {config.steps} steps; {rows[0]['val_bytes']:,} bytes of validation in windows of {config.row_bytes}")
    output = Path(config.output)
    write_json(output / "comparison.json", rows)
    write_atomically(output / "comparison.md", lambda temporary: Path(temporary).write_text(table))
    draw_comparison(output / "comparison.png", rows, f"Patching methods after {config.steps} steps")
    print(f"wrote {output}/comparison.md, comparison.json, comparison.png and a folder for each run")


if __name__ == "__main__":
    run_script(main, WorkflowConfig, __doc__)
