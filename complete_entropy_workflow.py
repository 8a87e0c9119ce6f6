"""Everything from end to end, with a comparison: one BLT for each patching method, on the same bytes.

Reads   a corpus and entropy_model.pth (trained here first with --train_entropy)
Writes  workflow/: comparison.json, comparison.png, comparison.md, and for each method its checkpoints and pictures
Run     python complete_entropy_workflow.py --quick_demo --train_entropy [--methods global monotonic space static] [--field value ...]

Every method's threshold is set to the same average patch size, so that all models spend alike on the latent transformer; space
patches are as long as the text makes them. Training bytes, steps, seed and model are the same for all. One seed says little
about small differences: --seeds 3 repeats each run and prints the spread.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

import entropy_llm
from blt.checks import check, check_positive
from blt.config import run_script
from blt.corpus import DataConfig
from blt.files import write_atomically, write_json
from blt.pictures import draw_comparison
from train_blt import PRESETS, BLTRunConfig, run


@dataclass
class WorkflowConfig(BLTRunConfig):
    train_entropy: bool = False  # train the entropy model first
    entropy_preset: str = "cpu"  # preset of entropy_llm.py for that
    entropy_steps: int | None = None  # updates of the entropy model; None: as its preset says
    methods: list[str] = field(
        default_factory=lambda: ["global", "monotonic", "space", "static"]
    )  # patching methods to compare
    patch_size: float = 4.5  # average bytes a patch, for the methods that have a threshold
    seeds: int = 1  # runs of each method, with seeds seed, seed + 1, ...
    output: str = "workflow"  # folder of everything written

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "seeds", "patch_size", "entropy_steps")
        allowed = ("global", "monotonic", "both", "cumulative", "space", "static")
        check(
            self, "methods", bool(self.methods) and set(self.methods) <= set(allowed), "some of " + ", ".join(allowed)
        )
        check(
            self,
            "entropy_preset",
            self.entropy_preset in entropy_llm.PRESETS,
            "one of " + ", ".join(entropy_llm.PRESETS),
        )
        if self.init_from is not None:
            raise ValueError(
                "the workflow compares patching methods from the start; --init_from is for train_blt.py, llm.py and llm_large.py"
            )
        if self.patch_method is not None:
            raise ValueError("the workflow compares patching methods; use --methods instead of --patch_method")


def train_entropy_model(config):
    """Run entropy_llm.py's training on the workflow's corpus."""
    changes = dict(entropy_llm.PRESETS[config.entropy_preset])
    if config.entropy_steps is not None:
        changes.update(steps=config.entropy_steps, eval_every=config.entropy_steps)
    shared = [f.name for f in fields(DataConfig) if f.name not in ("preset", "max_bytes", "val_bytes")] + ["seed"]
    same = {name: getattr(config, name) for name in shared}
    entropy_llm.main(
        entropy_llm.EntropyConfig(
            preset=[config.entropy_preset], output=config.entropy_model_path, **{**changes, **same}
        )
    )


def run_method(config, method, seed):
    """Train one BLT on patches of one method: `train_blt`'s dict."""
    settings = {f.name: getattr(config, f.name) for f in fields(BLTRunConfig)}
    settings.update(
        patch_method=method, seed=seed, sample_bytes=0, output=str(Path(config.output) / f"{method}_seed{seed}"),
        target_patch_size=None if method == "space" else config.patch_size,
    )  # fmt: skip
    print(f"\n=== {method}, seed {seed} ===")
    return run(BLTRunConfig(**settings), make_patches=True)


def main(config):
    if config.train_entropy:
        print("=== entropy model ===")
        train_entropy_model(config)
    rows = []
    for method in config.methods:
        results = [run_method(config, method, config.seed + i) for i in range(config.seeds)]
        bpb = np.array([result["val_bpb"] for result in results])
        rows.append({
            "method": method, "avg_patch_size": results[0]["avg_patch_size"], "val_bpb": float(bpb.mean()),
            "val_bpb_of_each_seed": bpb.tolist(), "bytes_per_second": float(np.mean([r["bytes_per_second"] for r in results])),
            "val_bytes": results[0]["val_bytes"], **({"ci": float(bpb.std(ddof=1))} if config.seeds > 1 else {}),
        })  # fmt: skip
    rows.sort(key=lambda row: row["val_bpb"])
    lines = ["| method | bytes a patch | val bpb | spread | trained at |", "| - | - | - | - | - |"]
    for row in rows:
        spread = f"± {row['ci']:.4f} (std of {config.seeds} seeds)" if "ci" in row else "one seed"
        lines.append(
            f"| {row['method']} | {row['avg_patch_size']:.2f} | {row['val_bpb']:.4f} | {spread} | {row['bytes_per_second'] / 1e3:.1f} kB/s |"
        )
    table = "\n".join(lines)
    print(f"\n{table}\n")
    trained = config.steps * config.accumulate * config.batch_rows * config.row_bytes
    print(
        f"each: {config.steps} steps, {trained:,} bytes of training, {rows[0]['val_bytes']:,} bytes of validation, "
        f"windows of {config.row_bytes} bytes"
    )
    output = Path(config.output)
    write_json(output / "comparison.json", rows)
    write_atomically(output / "comparison.md", lambda temporary: Path(temporary).write_text(table + "\n"))
    draw_comparison(output / "comparison.png", rows, f"Patching methods after {config.steps} steps")
    print(f"wrote {output}/comparison.md, comparison.json, comparison.png and a folder for each run")


if __name__ == "__main__":
    run_script(main, WorkflowConfig, __doc__, PRESETS)
