"""Train a Byte Latent Transformer on patches; the one-command pipeline from an entropy model to a trained BLT.

Reads   a corpus, entropy_model.pth (python entropy_llm.py makes it), patch_cache/ (made here if it is missing)
Writes  checkpoints/: best.pt (weights), model.json (config, patch rule, result), last.pt, metrics.jsonl, curves.png
Run     python train_blt.py --entropy_model_path entropy_model.pth [--quick_demo] [--preset cpu] [--field value ...]

`llm.py` and `llm_large.py` are this training with their own sizes, on patches that create_patches.py has made.

Fine-tuning: --init_from FOLDER starts from the weights in an output folder of these scripts or of convert_hf.py --from_hf. Its sizes beat
presets and file (a flag that names another size is an error), and its patch rule and entropy model are used unless --patch_method names others.
"""

import gzip
import json
import lzma
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from blt_model import BLTConfig, BLTModel, uninitialized
from create_patches import (
    DEFAULT_PATCH_SIZE,
    calibrate,
    make_entropies,
    open_entropies,
    training_sample,
    training_starts,
    warn_about_sizes,
)
from entropy_patcher import NEEDS_ENTROPIES, EntropyPatcher, PatchConfig, to_bytes
from generate import generate
from rows import BitArray, DocumentStream, TrainingRows, evaluation_batches
from save_entropy_model import load_entropy_model, model_hash
from training import (
    RunConfig,
    check,
    choose_device,
    choose_precision,
    evaluate,
    fit,
    given_fields,
    leak_gate,
    load_weights,
    print_header,
    run_script,
    set_seed,
    training_curves,
    write_json,
)


@dataclass
class TrainingConfig(RunConfig):
    # patches: None takes what create_patches.py chose
    entropy_model_path: str = "entropy_model.pth"  # the trained entropy model
    patch_cache: str = "patch_cache"  # folder that create_patches.py filled
    patch_method: str | None = None  # global, monotonic, both, static, space, cumulative; None: as create_patches.py chose
    entropy_threshold: float | None = None  # with patch_method: the threshold in nats (bytes for static)
    target_patch_size: float | None = None  # with patch_method: or the wanted bytes a patch
    patch_slots: int | None = None  # patches in a row; None: chosen so that little is padding
    # output
    output: str = "checkpoints"  # folder for weights, metrics and curves
    prompt: str | None = None  # text to continue when training ends; None: the beginning of a validation document
    sample_bytes: int = 200  # bytes of that continuation; 0: none

    def __post_init__(self):
        super().__post_init__()
        if self.patch_method is None and (self.entropy_threshold is not None or self.target_patch_size is not None):
            raise ValueError("entropy_threshold and target_patch_size need --patch_method; without it the rule of create_patches.py is used")
        if self.entropy_threshold is not None and self.target_patch_size is not None:
            raise ValueError("give either target_patch_size or entropy_threshold, not both: one follows from the other")
        if self.patch_slots is not None:
            check(self, "patch_slots", self.patch_slots >= 4, "4 or more")


@dataclass
class BLTRunConfig(TrainingConfig, BLTConfig):
    """A training run's settings and the model's, in one."""

    init_from: str | None = None  # start from the weights in this output folder; its sizes, patch rule and entropy model are used
    quick_demo: bool = False  # a small model and few steps: the preset quick_demo

    def __post_init__(self):
        TrainingConfig.__post_init__(self)
        BLTConfig.__post_init__(self)
        if self.init_from is not None and Path(self.init_from).resolve() == Path(self.output).resolve():
            raise ValueError(f"init_from and output are both {self.output!r}, and the start would be overwritten; give another --output")


# ---------------------------------------------------------------------------------------------------------------------
# Patched data


class PatchedDataset:
    """What `train_blt` trains on: rows of patched training text, rows that score the validation text, and the patcher.

    train_rows: `TrainingRows`. validation: list of uint8 documents, validation_starts: their patch starts, bool [N + 1] each.
    patcher: the `EntropyPatcher` that made the patches; the leak gate makes them again with it.
    """

    def __init__(self, train_rows, validation, validation_starts, patcher, batch_rows=8):
        self.train_rows, self.patcher = train_rows, patcher
        self.validation, self.validation_starts = validation, validation_starts
        self.validation_batches = list(evaluation_batches(validation, validation_starts, train_rows.row_bytes, batch_rows))

    @classmethod
    def from_documents(cls, training, validation, patcher, row_bytes=1024, batch_rows=8):
        """Patch lists of documents (anything `EntropyPatcher` takes) with the patcher: for small data in memory."""
        training, validation = [to_bytes(d) for d in training], [to_bytes(d) for d in validation]
        if not training or not validation:
            raise ValueError("training and validation each need at least one document")
        starts = BitArray()
        starts.append(np.concatenate([[True], *(patcher.starts(document) for document in training)]))
        starts.close()
        rows = TrainingRows(DocumentStream.of_documents(training), row_bytes, starts)
        return cls(rows, validation, [patcher.starts(document) for document in validation], patcher, batch_rows)

    @classmethod
    def from_corpus(cls, corpus, patcher, config, cache=None):
        """Patch a corpus by its cached entropies (`create_patches.EntropyCache`; None for static and space patches)."""
        train = corpus.documents("train", config.max_bytes)
        numbers = corpus.documents("validation", config.val_bytes)
        if cache is not None and not cache.covers(train, numbers):
            limits = [f"--{name} {value}" for name, value in (("max_bytes", config.max_bytes), ("val_bytes", config.val_bytes)) if value]
            raise ValueError(
                f"{cache.folder} covers {len(cache.train):,} training and {len(cache.validation):,} validation documents, "
                f"and {len(train):,} and {len(numbers):,} are wanted; run: python create_patches.py {' '.join(limits)}, or lower max_bytes"
            )
        stream = DocumentStream.of_corpus(corpus, train)
        starts = training_starts(corpus, train, patcher.config, cache)
        rows = TrainingRows(stream, config.row_bytes, starts, config.patch_slots)
        validation = [corpus.document(number) for number in numbers]
        validation_starts = [
            patcher.starts(document, None if cache is None else cache.document(len(cache.train) + place))
            for place, document in enumerate(validation)
        ]
        return cls(rows, validation, validation_starts, patcher, config.batch_rows)


def train_blt(model, patched_dataset, training_config):
    """Train a `BLTModel` on a `PatchedDataset`. The leak gate runs before the first step and stops a model that sees ahead.

    training_config: `TrainingConfig` (or any `RunConfig` with an `output` folder). Returns a dict with val_bpb, val_loss (nats
    per target) and val_accuracy of the best weights, last_val_bpb, bytes_per_second, train_seconds, avg_patch_size and, of the padding in the
    training rows, byte_padding and patch_padding. The best weights are in output/best.pt and are in the model afterwards.
    """
    if not isinstance(patched_dataset, PatchedDataset):
        raise ValueError(f"train_blt needs a PatchedDataset (see PatchedDataset.from_documents), not {type(patched_dataset).__name__}")
    data = patched_dataset
    text = np.concatenate([*data.validation[:8]])[:512]
    print(f"leak gate passed: largest difference {leak_gate(model, data.patcher, text):.1e} nats")
    byte_padding, patch_padding = data.train_rows.padding()
    patches = sum(int(starts[:-1].sum()) for starts in data.validation_starts)
    total_bytes = sum(len(document) for document in data.validation)
    size = total_bytes / patches
    warn_about_sizes(patches, total_bytes, len(data.validation), data.patcher.config.entropy_threshold)
    print(
        f"rows: {len(data.train_rows):,} of {data.train_rows.row_bytes:,} bytes and {data.train_rows.patch_slots} patches | "
        f"padding {byte_padding:.1%} of bytes, {patch_padding:.1%} of patches | {size:.2f} bytes a patch in validation"
    )
    result = fit(model, training_config, data.train_rows, data.validation_batches, training_config.output)
    load_weights(Path(training_config.output) / "best.pt", model)
    return {**result, "avg_patch_size": size, "byte_padding": byte_padding, "patch_padding": patch_padding}


# ---------------------------------------------------------------------------------------------------------------------
# Saved models


def load_blt(folder, device="cpu"):
    """Read a trained model from its output folder: (BLTModel in fp32, EntropyPatcher, the record in model.json)."""
    folder = Path(folder)
    record = read_record(folder)
    model = uninitialized(BLTConfig(**record["model_config"]), device)
    load_weights(folder / "best.pt", model)
    patch_config = PatchConfig(**record["patch_config"])
    entropy_model = None
    if patch_config.method in NEEDS_ENTROPIES:
        entropy_model, _ = entropy_model_of(folder, record, device)
    return model.eval(), EntropyPatcher(entropy_model, patch_config, precision=record["precision"]), record


def read_record(folder):
    """The record in the model.json of an output folder of a BLT."""
    folder = Path(folder)
    for file in (folder / "model.json", folder / "best.pt"):
        if not file.exists():
            raise FileNotFoundError(f"{file} not found; run: python llm.py --output {folder}")
    record = json.loads((folder / "model.json").read_text())
    if "patch_config" not in record:
        raise ValueError(f"{folder} holds no BLT but a baseline without patches; read it with template_llm.load_template")
    return record


def entropy_model_path(folder, record):
    """Where the entropy model of an output folder lies: in it (convert_hf.py writes it there), else where it was in training."""
    path = Path(record["entropy_model_path"])
    inside = Path(folder) / path.name
    return str(inside if inside.exists() else path)


def entropy_model_of(folder, record, device="cpu"):
    """The entropy model that an output folder's BLT was trained with, and its record. Raises ValueError if another is in its place."""
    path = entropy_model_path(folder, record)
    entropy_model, entropy_record = load_entropy_model(path, device)
    if entropy_record["sha256"] != record["entropy_model_sha256"]:
        raise ValueError(f"{folder} was trained on patches of another entropy model than {path} holds now; train again, or put that model back")
    return entropy_model, entropy_record


# ---------------------------------------------------------------------------------------------------------------------
# The script


def settings_of_start(config):
    """(Config, record) of a run that starts from an output folder: its sizes and entropy model take the place of presets and file.

    A size given as a flag must be that of the folder. dropout is the folder's unless given; recompute is this run's.
    """
    folder = config.init_from
    record = read_record(folder)
    saved, given = asdict(BLTConfig(**record["model_config"])), given_fields(config)
    of_run = {"recompute"} | ({"dropout"} & given)
    differing = [f"--{name} {getattr(config, name)}, there {value}" for name, value in saved.items() if name in given - of_run and getattr(config, name) != value]
    if differing:
        raise ValueError(f"{folder} has other sizes than asked for ({'; '.join(differing)}); leave these flags out, or --init_from")
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
            raise ValueError("patch method 'bpe' looks ahead: it serves comparisons of boundaries only; train with --patch_method global")
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
        train, validation = corpus.documents("train", config.max_bytes), corpus.documents("validation", config.val_bytes)
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
    print(f"BLT: {sum(parts.values()):,} parameters (" + ", ".join(f"{part} {count:,}" for part, count in parts.items()) + ")")
    rule = patcher.config
    train_bytes = data.train_rows.stream.total_bytes
    epochs = config.steps * config.accumulate * config.batch_rows * config.row_bytes / train_bytes
    print(f"patches: {rule.method}, threshold {rule.entropy_threshold:.4f} | training text {train_bytes:,} bytes, {epochs:.2f} epochs")

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
        print(f"start: {config.init_from}, val {began['val_bpb']:.4f} bpb over {began['val_bytes']:,} bytes before the first step")
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


def compressors_bpb(documents):
    """Bits per byte of gzip -9, xz -9 and zstd -19 on the same documents, joined: what any compressor gets without training."""
    from pyarrow import Codec

    raw = b"".join(document.tobytes() for document in documents)
    made = {"gzip -9": gzip.compress(raw, 9), "xz -9": lzma.compress(raw, preset=9), "zstd -19": Codec("zstd", 19).compress(raw, asbytes=True)}
    return {name: 8 * len(compressed) / len(raw) for name, compressed in made.items()}


def result_line(result, validation):
    """One line: bits per byte of the best weights beside gzip's, xz's and zstd's on the same documents."""
    others = ", ".join(f"{name} {bpb:.3f}" for name, bpb in compressors_bpb(validation).items())
    return (
        f"val {result['val_bpb']:.4f} bpb over {result['val_bytes']:,} bytes of held-out text "
        f"(accuracy {result['val_accuracy']:.1%}); the same bytes by {others}"
    )


def print_footer(result, validation, output):
    """The result beside gzip, xz and zstd, the files written and what to do next."""
    print(f"trained {result['train_seconds']:.0f} s at {result['bytes_per_second'] / 1e3:.1f} kB/s | {result['avg_patch_size']:.2f} bytes a patch")
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
