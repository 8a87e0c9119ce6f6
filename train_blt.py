"""Train a Byte Latent Transformer on patches; the one-command pipeline from an entropy model to a trained BLT.

Reads   a corpus, entropy_model.pth (python entropy_llm.py makes it), patch_cache/ (made here if it is missing)
Writes  checkpoints/: best.pt (weights), model.json (config, patch rule, result), last.pt, metrics.jsonl, curves.png
Run     python train_blt.py --entropy_model_path entropy_model.pth [--quick_demo] [--preset cpu] [--field value ...]

`llm.py` and `llm_large.py` are this training with their own sizes, on patches that create_patches.py has made.

Fine-tuning: --init_from FOLDER starts from the weights in an output folder of these scripts or of convert_hf.py --from_hf. Its sizes beat
presets and file (a flag that names another size is an error), and its patch rule and entropy model are used unless --patch_method names others.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from blt.config import given_fields, print_header, run_script
from blt.device import choose_device, choose_precision, set_seed
from blt.entropies import make_entropies, open_entropies, training_sample
from blt.files import load_weights, model_hash, write_json
from blt.loop import training_curves
from blt.metric import evaluate, result_line
from blt.patch_rules import DEFAULT_PATCH_SIZE, PatchConfig, calibrate
from blt.training import PatchedDataset, TrainingConfig, train_blt
from blt_model import BLTConfig, BLTModel, uninitialized
from entropy_patcher import EntropyPatcher
from generate import generate
from save_entropy_model import entropy_model_path, load_entropy_model, read_record


@dataclass
class BLTRunConfig(TrainingConfig, BLTConfig):
    """A training run's settings and the model's, in one."""

    init_from: str | None = (
        None  # start from the weights in this output folder; its sizes, patch rule and entropy model are used
    )
    quick_demo: bool = False  # a small model and few steps: the preset quick_demo

    def __post_init__(self):
        TrainingConfig.__post_init__(self)
        BLTConfig.__post_init__(self)
        if self.init_from is not None and Path(self.init_from).resolve() == Path(self.output).resolve():
            raise ValueError(
                f"init_from and output are both {self.output!r}, and the start would be overwritten; give another --output"
            )


def settings_of_start(config):
    """(Config, record) of a run that starts from an output folder: its sizes and entropy model take the place of presets and file.

    A size given as a flag must be that of the folder. dropout is the folder's unless given; recompute is this run's.
    """
    folder = config.init_from
    record = read_record(folder)
    saved, given = asdict(BLTConfig(**record["model_config"])), given_fields(config)
    of_run = {"recompute"} | ({"dropout"} & given)
    differing = [
        f"--{name} {getattr(config, name)}, there {value}"
        for name, value in saved.items()
        if name in given - of_run and getattr(config, name) != value
    ]
    if differing:
        raise ValueError(
            f"{folder} has other sizes than asked for ({'; '.join(differing)}); leave these flags out, or --init_from"
        )
    changes = {name: value for name, value in saved.items() if name not in of_run}
    if record["entropy_model_sha256"] is not None and "entropy_model_path" not in given:
        changes["entropy_model_path"] = entropy_model_path(folder, record)
    return replace(config, **changes), record


def open_patches(config, corpus, device, make=False, start=None):
    """The patcher and the cached entropies that a run is to use: (EntropyPatcher, EntropyCache or None).

    make=True fills the cache first where it is missing; otherwise a missing cache is an error that says what to run.
    start: record of the folder that config.init_from names; its rule is used unless config.patch_method names one.
    """
    chosen = Path(config.patch_cache) / "patches.json"
    method, wanted_hash = config.patch_method, None
    if method is None and start is not None:
        patch_config, wanted_hash = PatchConfig(**start["patch_config"]), start["entropy_model_sha256"]
        method = patch_config.method
    elif method is None and not make:
        if not chosen.exists():
            raise FileNotFoundError(f"{chosen} not found; run: python create_patches.py")
        saved = json.loads(chosen.read_text())
        patch_config = PatchConfig(**saved["patch_config"])
        if patch_config.method == "bpe":
            raise ValueError(
                "patch method 'bpe' looks ahead: it serves comparisons of boundaries only; train with --patch_method global"
            )
        method = patch_config.method
    else:
        method, patch_config = method or "global", None
    if method in ("static", "space"):
        if patch_config is None:
            if method == "static" and config.entropy_threshold is None and config.target_patch_size is None:
                raise ValueError("patch_method static needs --target_patch_size, the bytes in a patch")
            patch_config = PatchConfig(method, config.entropy_threshold or config.target_patch_size or 1.0)
        return EntropyPatcher(None, patch_config), None
    model, record = load_entropy_model(config.entropy_model_path, device)
    if wanted_hash not in (None, record["sha256"]):
        raise ValueError(
            f"{config.entropy_model_path} is another entropy model than {config.init_from} was trained with; leave --entropy_model_path out, "
            "or choose new patches by name: --patch_method global --target_patch_size 4.5"
        )
    if make:
        train, validation = (
            corpus.documents("train", config.max_bytes),
            corpus.documents("validation", config.val_bytes),
        )
        precision = choose_precision(config.precision, device)
        cache = make_entropies(config.patch_cache, corpus, model, record, train, validation, precision)
    else:
        cache = open_entropies(config.patch_cache, corpus, record, config.entropy_model_path)
    if patch_config is None:
        patch_config = PatchConfig(method, config.entropy_threshold or 1.0, cache_dir=config.patch_cache)
        if config.entropy_threshold is None:
            target = config.target_patch_size or DEFAULT_PATCH_SIZE
            patch_config = calibrate(patch_config, target, training_sample(cache))
    return EntropyPatcher(model, patch_config, precision=cache.manifest["precision"]), cache


def run(config, make_patches=False):
    """One training run from settings to pictures: what llm.py, llm_large.py and this script do. Returns `train_blt`'s dict."""
    set_seed(config.seed)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    config, start = settings_of_start(config) if config.init_from else (config, None)
    print_header(config, device, precision)
    corpus = config.corpus()
    patcher, cache = open_patches(config, corpus, device, make_patches, start)
    data = PatchedDataset.from_corpus(corpus, patcher, config, cache)
    model_config = BLTConfig(**{f.name: getattr(config, f.name) for f in fields(BLTConfig)})
    if start is None:
        model = BLTModel(model_config).to(device)
    else:
        model = uninitialized(model_config, device)
        load_weights(Path(config.init_from) / "best.pt", model)
    parts = model.parameters_by_part()
    print(
        f"BLT: {sum(parts.values()):,} parameters ("
        + ", ".join(f"{part} {count:,}" for part, count in parts.items())
        + ")"
    )
    rule = patcher.config
    train_bytes = data.train_rows.stream.total_bytes
    epochs = config.steps * config.accumulate * config.batch_rows * config.row_bytes / train_bytes
    print(
        f"patches: {rule.method}, threshold {rule.entropy_threshold:.4f} | training text {train_bytes:,} bytes, {epochs:.2f} epochs"
    )

    record = {
        "model_config": asdict(model_config), "patch_config": asdict(rule), "precision": patcher.precision,
        "entropy_model_path": config.entropy_model_path,
        "entropy_model_sha256": cache.manifest["entropy_model_sha256"] if cache is not None else None,
        "corpus": {"dataset": config.dataset, "sha256": corpus.hash}, "settings": asdict(config),
    }  # fmt: skip
    output = Path(config.output)
    if start is not None and config.resume and (output / "model.json").exists():
        record["init_from"] = json.loads((output / "model.json").read_text())["init_from"]
    elif start is not None:
        began = evaluate(model, data.validation_batches, device, precision)
        origin = {"folder": config.init_from, "weights_sha256": model_hash(model), "val_bpb": began["val_bpb"]}
        record["init_from"] = origin | {name: start[name] for name in ("converted_from", "init_from") if name in start}
        print(
            f"start: {config.init_from}, val {began['val_bpb']:.4f} bpb over {began['val_bytes']:,} bytes before the first step"
        )
    if not config.resume:
        write_json(output / "model.json", record)  # now, so that an interrupted run can be used too
    result = train_blt(model, data, config)
    write_json(output / "model.json", {**record, "result": result})
    training_curves(output / "curves.png", output)
    if config.sample_bytes:
        prompt = config.prompt.encode() if config.prompt else data.validation[0][:120].tobytes()
        text = generate(model, patcher, prompt, config.sample_bytes, temperature=0.7, seed=config.seed)
        print(f"continuation of {prompt.decode(errors='replace')!r}:\n{text.decode(errors='replace')!r}")
    print_footer(result, data.validation, output)
    return result


def print_footer(result, validation, output):
    """The result beside gzip, xz and zstd, the files written and what to do next."""
    print(
        f"trained {result['train_seconds']:.0f} s at {result['bytes_per_second'] / 1e3:.1f} kB/s | {result['avg_patch_size']:.2f} bytes a patch"
    )
    print(result_line(result, validation))
    print(f"wrote {output}/best.pt, model.json, metrics.jsonl, curves.png")
    print(f"next: python generate.py --model {output} --prompt 'The history of'")


MACHINES = {
    "cpu": dict(
        global_dim=256, global_layers=4, encoder_dim=192, decoder_dim=192, decoder_layers=2, window=128, hash_rows=8192,
        max_bytes=2_200_000, val_bytes=200_000, row_bytes=2048, batch_rows=4, steps=270, eval_every=90, log_every=5, lr=0.01, adam_lr=0.01,
    ),
    "colab_t4": dict(batch_rows=8, accumulate=2),
    "rtx4090": dict(batch_rows=16),
    "h200": dict(batch_rows=32),
}  # fmt: skip
PRESETS = {
    "quick_demo": dict(
        encoder_dim=128, global_dim=192, global_layers=3, decoder_dim=128, decoder_layers=2, hash_rows=4096, window=64,
        max_bytes=1_000_000, val_bytes=100_000, row_bytes=1024, batch_rows=8, steps=120, eval_every=60, lr=0.01, adam_lr=0.01, log_every=20,
    ),
    **MACHINES,
}  # fmt: skip


def main(config):
    run(config, make_patches=True)


if __name__ == "__main__":
    run_script(main, BLTRunConfig, __doc__, PRESETS)
