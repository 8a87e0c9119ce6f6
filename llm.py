"""Train a Byte Latent Transformer on the patches of create_patches.py.

Reads   a corpus, entropy_model.pth (python entropy_llm.py), patch_cache/ (python create_patches.py)
Writes  checkpoints/: best.pt (weights), model.json (what made it), entropy_model.pth and .json (a copy), last.pt,
        previous.pt, metrics.jsonl, curves.png
Run     python llm.py [--preset [SIZE] [MACHINE]] [--field value ...]
Next    python generate.py --model checkpoints
Time    5 minutes on 2 free CPU cores (size nano)

SIZE is nano, tiny, small, medium or large; MACHINE is auto, cpu, cpu_hour, colab_t4, rtx4090, h100 or
h200. What is not named is chosen by the machine that is found: nano on a CPU, medium on a GPU.
Sizes, machines and settings follow below; --help lists all settings.

Fine-tuning: --init_from FOLDER starts from the weights in an output folder of these scripts or of
convert_hf.py. Its sizes replace the presets' and the file's, and a flag that names another size
is an error. Its patch rule and entropy model are used unless --patch_method names others.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from blt.checkpoints import has_checkpoint
from blt.config import BY_PRESET, Presets, given_fields, next_command, part_of, run_script
from blt.entropy_cache import make_entropies, open_entropies
from blt.files import load_weights, model_hash
from blt.ids import argument_bytes
from blt.layers import zero_outputs
from blt.loop import choose_dropout
from blt.metric import evaluate_together
from blt.patch_rules import DEFAULT_PATCH_SIZE, RULES, PatchConfig, calibrate, refuse_lookahead
from blt.processes import is_main
from blt.records import RunRecord, read_record, record_beside
from blt.runs import claim_output, finish_run, print_model, start_run
from blt.training import PatchedDataset, TrainingConfig, entropy_command, patches_command, train_blt
from blt.training_patches import read_patches, training_sample
from blt_model import BLTConfig, BLTModel, uninitialized
from entropy_patcher import EntropyPatcher
from generate import generate
from save_entropy_model import entropy_model_path, keep_entropy_model, load_entropy_model

# What the model is. Parameters of the latent transformer, local layers and head, beside those in
# hash tables: nano 1.7M + 88.1M, tiny 4.6M + 14.7M, small 11.1M + 29.4M, medium 32.3M + 29.4M,
# large 285.5M + 29.4M. Lookups cost no FLOPs, and only the rows that a batch reads are updated.
SIZES = {
    "nano": dict(
        global_dim=192, global_layers=3, encoder_dim=96, decoder_dim=96, decoder_layers=1, window=128, hash_rows=131072
    ),
    "tiny": dict(
        global_dim=256, global_layers=4, encoder_dim=128, decoder_dim=128, decoder_layers=2, window=256, hash_rows=16384
    ),
    "small": dict(
        global_dim=384, global_layers=4, encoder_dim=256, decoder_dim=256, decoder_layers=2, window=256, hash_rows=16384
    ),
    "medium": dict(
        global_dim=512, global_layers=8, encoder_dim=256, decoder_dim=256, decoder_layers=3, window=256, hash_rows=16384
    ),
    "large": dict(
        global_dim=1024, global_layers=20, encoder_dim=512, decoder_dim=512, decoder_layers=5, window=512,
        hash_rows=8192,
    ),
}  # fmt: skip

# How it is trained. What a machine leaves out has the default of RunConfig (blt/loop.py): lr
# 0.005, adam_lr 0.003, ...
MACHINES = {
    "cpu": dict(
        row_bytes=2048, batch_rows=4, steps=1000, lr=0.01, adam_lr=0.01, max_bytes=8_200_000,
        val_bytes=200_000, eval_every=250, log_every=10,
    ),
    "cpu_hour": dict(
        row_bytes=2048, batch_rows=4, steps=3300, lr=0.01, adam_lr=0.01, val_bytes=1_000_000, eval_every=825,
        compile="yes",
    ),
    "colab_t4": dict(batch_rows=8, accumulate=2, steps=3000),
    "rtx4090": dict(batch_rows=16, steps=3000),
    "h100": dict(batch_rows=32, steps=3000),
    "h200": dict(batch_rows=32, steps=3000),
}  # fmt: skip

# The large model needs smaller batches than the others on the same machine, lower rates and more
# updates. An hour of a CPU is spent on the whole sample, which fills larger tables.
LARGE = dict(row_bytes=8192, steps=10000, lr=0.003, adam_lr=0.001)
PAIRS = {
    ("small", "cpu_hour"): dict(hash_rows=131072),
    ("large", "colab_t4"): LARGE | dict(row_bytes=4096, batch_rows=1, accumulate=32),
    ("large", "rtx4090"): LARGE | dict(batch_rows=2, accumulate=16),
    ("large", "h100"): LARGE | dict(batch_rows=16, accumulate=2),
    ("large", "h200"): LARGE,
}

# A small model and a minute or two of training, whatever the machine.
QUICK_DEMO = dict(
    global_dim=192, global_layers=3, encoder_dim=128, decoder_dim=128, decoder_layers=2, window=64, hash_rows=4096,
    row_bytes=1024, batch_rows=8, steps=120, lr=0.01, adam_lr=0.01, max_bytes=1_000_000, val_bytes=100_000,
    eval_every=60, log_every=20,
)  # fmt: skip


@dataclass
class LLMConfig(TrainingConfig, BLTConfig):
    """Settings of this script. A value written in place of BY_PRESET takes effect with every preset."""

    # learning rates
    lr: float = BY_PRESET  # peak learning rate of the matrices (Muon, scaled to the RMS of an AdamW update)
    adam_lr: float = BY_PRESET  # peak learning rate of embeddings, hash tables, output head and norms (AdamW)
    # latent transformer: runs once a patch
    global_dim: int = BY_PRESET  # width
    global_layers: int = BY_PRESET  # layers over patches
    # local encoder and decoder: run once a byte
    encoder_dim: int = BY_PRESET  # width of the encoder's byte states
    encoder_layers: int = 1  # windowed transformer layers before the pooling
    decoder_dim: int = BY_PRESET  # width of the decoder's byte states
    decoder_layers: int = BY_PRESET  # windowed transformer layers after the latent transformer
    window: int = BY_PRESET  # bytes that a byte attends to in the local layers, itself included
    ngram_sizes: list[int] = field(default_factory=lambda: [2, 3, 4, 5, 6, 7, 8])  # bytes in the hashed n-grams
    hash_rows: int = BY_PRESET  # rows of each n-gram size's table
    ngram_dropout: float | None = None  # share of the n-grams that training leaves out; None: 0, or 0.3 as dropout
    dropout: float | None = None  # dropout rate; None: 0, or 0.1 if the text is read more than 1.5 times
    # run
    steps: int = BY_PRESET  # updates
    row_bytes: int = BY_PRESET  # ids in a row: what a model sees at once in training and evaluation
    batch_rows: int = BY_PRESET  # rows in one forward and backward pass
    accumulate: int = BY_PRESET  # passes whose gradients are summed into one update
    max_bytes: int | None = BY_PRESET  # use at most this many bytes of the training documents; None: all
    val_bytes: int = BY_PRESET  # use at most this many bytes of the validation documents
    eval_every: int = BY_PRESET  # updates between evaluations
    log_every: int = BY_PRESET  # updates between log lines
    compile: Literal["auto", "yes", "no"] = BY_PRESET  # torch.compile; auto: on CUDA
    init_from: str | None = None  # start from the weights in this output folder; its sizes and patch rule are used

    PRESETS = Presets(SIZES, MACHINES, PAIRS, alone={"quick_demo": QUICK_DEMO})

    def __post_init__(self):
        TrainingConfig.__post_init__(self)
        BLTConfig.__post_init__(self)
        if self.init_from is not None and Path(self.init_from).resolve() == Path(self.output).resolve():
            raise ValueError(
                f"init_from and output are both {self.output!r}, and the start would be overwritten; "
                "give another --output"
            )


def run(config, make_patches=False):
    """One training run from settings to pictures. Returns what `train_blt` returns.

    make_patches: compute the entropies that are missing, instead of asking for create_patches.py.
    """
    with claim_output(config, config.output):
        return train(config, make_patches)


def train(config, make_patches):
    """`run`, with the output folder held."""
    start = None
    if config.init_from is not None:
        config, start = take_over_start(config)
    context = start_run(config)
    patcher, cache = open_patches(config, context, make_patches, start)
    print("patches: " + patcher.config.describe())
    data = PatchedDataset.from_corpus(context.corpus, patcher, config, cache)
    config.choose_steps(data.train_rows)
    choose_dropout(config, data.train_rows.stream)
    model_config = part_of(config, BLTConfig)
    model = make_model(model_config, context.device, config.init_from, config.zero_init)
    print_model("BLT", model.parameters_by_part(), config, data.train_rows.stream.total_bytes)

    output = Path(config.output)
    record = RunRecord(
        kind="blt",
        model_config=asdict(model_config),
        settings=asdict(config),
        corpus=config.corpus_facts(context.corpus),
        patch_config=asdict(patcher.config),
        precision=patcher.precision,
        entropy_model_path=config.entropy_model_path,
        entropy_model_sha256=None if cache is None else cache.manifest["entropy_model_sha256"],
    )
    if start is not None:
        record.init_from = origin_of(model, data, config, context, start)

    def begin():
        # Before training, so that an interrupted run can be used too.
        record.save(output / "model.json")
        if cache is not None:
            keep_entropy_model(config.entropy_model_path, record.entropy_model_sha256, output, config.overwrite)

    depends_on = {
        "kind": record.kind,
        **record.model_config,
        "corpus_sha256": context.corpus.hash,
        "patch_rule": patcher.config.arguments(),
        "entropy_model_sha256": record.entropy_model_sha256,
        "start_sha256": None if start is None else start.weights_sha256,
    }
    result = train_blt(model, data, config, depends_on, begin)
    finish_run(model, record, result, context, output, output / "best.pt", output / "model.json")

    if config.sample_bytes and is_main():
        prompt = data.validation[0][:120].tobytes() if config.prompt is None else argument_bytes(config.prompt)
        text = generate(model, patcher, prompt, config.sample_bytes, temperature=0.7, seed=config.seed)
        print(f"continuation of {prompt.decode(errors='replace')!r}:\n{text.decode(errors='replace')!r}")
    of_generate = next_command("generate.py", config, ("device",), model=output, prompt="The history of")
    print("next: " + of_generate)
    return result


def make_model(model_config, device, init_from=None, zero_init=False):
    """A new `BLTModel`, or one with the weights in the output folder init_from. zero_init is for a new one."""
    if init_from is None:
        model = BLTModel(model_config).to(device)
        if zero_init:
            zero_outputs(model)
        return model
    model = uninitialized(model_config, device)
    load_weights(Path(init_from) / "best.pt", model)
    return model


# Patches


def open_patches(config, context, make=False, start=None):
    """The patcher and the cached entropies of a run: (EntropyPatcher, EntropyCache or None).

    context: `runs.Run`.
    make: fill the cache where it is missing; otherwise a missing cache is an error that says what
    to run.
    start: the `RunRecord` of the folder config.init_from, whose rule is used unless
    config.patch_method names one.
    """
    patch_config = chosen_patches(config, context.corpus, make, start)
    if not RULES[patch_config.method].needs_entropies:
        return EntropyPatcher(None, patch_config), None
    model, record = load_entropy_model(config.entropy_model_path, context.device, entropy_command(config))
    uses_start = start is not None and config.patch_method is None
    if uses_start and record.weights_sha256 != start.entropy_model_sha256:
        raise ValueError(
            f"{config.entropy_model_path} is another entropy model than {config.init_from} was trained with; leave "
            "--entropy_model_path out, or choose new patches by name: --patch_method global --target_patch_size 4.5"
        )
    if make:
        validation = context.corpus.documents("validation", config.val_bytes)
        cache = make_entropies(
            config.patch_cache, context.corpus, model, record, context.train, validation, context.precision
        )
    else:
        paths = (config.entropy_model_path, config.dataset)
        advice = "run: " + patches_command(config)
        cache = open_entropies(config.patch_cache, context.corpus, record, *paths, advice)
    needs_threshold = not uses_start and config.entropy_threshold is None
    if needs_threshold and (config.patch_method is not None or make):
        target = DEFAULT_PATCH_SIZE if config.target_patch_size is None else config.target_patch_size
        patch_config = calibrate(patch_config, target, *training_sample(cache, len(context.train)))
    return EntropyPatcher(model, patch_config, precision=cache.manifest["precision"]), cache


def chosen_patches(config, corpus, make=False, start=None):
    """The `PatchConfig` that a run asks for; its threshold may still have to be calibrated.

    config.patch_method names one, else the folder that training starts from has one, else
    create_patches.py has chosen one (with make: the global rule).
    """
    if config.patch_method is not None:
        return named_patches(config)
    if start is not None:
        return PatchConfig(**start.patch_config)
    if make:
        return PatchConfig("global", 1.0, cache_dir=config.patch_cache)
    record = record_beside(config.entropy_model_path)
    entropy_record = RunRecord.load(record) if record.exists() else None
    advice = "run: " + patches_command(config)
    patch_config = read_patches(Path(config.patch_cache) / "patches.json", corpus, entropy_record, advice)
    refuse_lookahead(patch_config, "train: pass --patch_method global")
    return patch_config


def named_patches(config):
    """The `PatchConfig` of --patch_method; a threshold in nats that is not given is 1 until it is calibrated."""
    threshold = config.entropy_threshold
    if RULES[config.patch_method].unit == "bytes" and threshold is None:
        threshold = DEFAULT_PATCH_SIZE if config.target_patch_size is None else config.target_patch_size
    if threshold is None:
        threshold = 1.0
    return PatchConfig(config.patch_method, threshold, cache_dir=config.patch_cache)


# Fine-tuning


def take_over_start(config):
    """(config, RunRecord) of a run that starts from an output folder: the config then has its sizes and entropy model.

    Raises ValueError if a flag names another size than the folder has. dropout and ngram_dropout are
    the folder's unless given, and recompute is this run's.
    """
    folder = config.init_from
    record = read_record(folder, "blt")
    saved = asdict(record.config(BLTConfig))
    given = given_fields(config)
    of_this_run = {"recompute"} | ({"dropout", "ngram_dropout"} & given)
    differing = [
        f"--{name} {getattr(config, name)}, there {value}"
        for name, value in saved.items()
        if name in given - of_this_run and getattr(config, name) != value
    ]
    if differing:
        raise ValueError(
            f"{folder} has other sizes than asked for ({'; '.join(differing)}); leave these flags out, or --init_from"
        )
    if "zero_init" in given and config.zero_init:
        raise ValueError(f"zero_init would erase weights of {folder}; leave it out, or --init_from")
    changes = {name: value for name, value in saved.items() if name not in of_this_run}
    changes["zero_init"] = False
    if record.entropy_model_sha256 is not None and "entropy_model_path" not in given:
        changes["entropy_model_path"] = entropy_model_path(folder, record)
    return replace(config, **changes), record


def origin_of(model, data, config, context, start):
    """What the record says about the folder that training starts from, with its bits per byte before the first step.

    A resumed run takes what it wrote when it began.
    """
    # A run that was killed before its first checkpoint begins again, and scores its start again.
    if config.resume and has_checkpoint(config.output):
        return RunRecord.load(Path(config.output) / "model.json").init_from
    before = evaluate_together(model, data.validation_batches, context.device, context.precision)
    print(
        f"start: {config.init_from}, val {before['val_bpb']:.4f} bpb over {before['val_bytes']:,} bytes "
        "before the first step"
    )
    origin = {"folder": config.init_from, "weights_sha256": model_hash(model), "val_bpb": before["val_bpb"]}
    for name in ("converted_from", "init_from"):
        if getattr(start, name) is not None:
            origin[name] = getattr(start, name)
    return origin


if __name__ == "__main__":
    run_script(run, LLMConfig, __doc__)
