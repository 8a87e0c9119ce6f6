"""What the studies of experiments.py are made of: their budgets, steps and metrics, and parts that no script computes.

Not a script. `Bench` makes the steps of one budget and seed, `read_training` and its like read what the steps have
written, `expected_seconds` says how long a step should take, and `PARTS` are computations that experiments.py runs as
a process of its own: PPMd, training with patches of two entropy models or of BPE tokens, AdamW for all parameters,
fine-tuning, and corpora.
"""

import json
import math
import re
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import blt.loop
import llm
from blt.checkpoints import has_checkpoint
from blt.config import part_of
from blt.corpus import open_corpus, read_file
from blt.device import choose_device, choose_precision
from blt.files import write_atomically, write_json
from blt.flops import TRAINING, blt_flops, transformer_flops
from blt.ids import BYTES
from blt.loop import RunConfig, choose_dropout, fit, read_metrics
from blt.metric import ppmd_after_training
from blt.ngrams import HashEmbedding, embed_ngrams
from blt.patch_rules import DEFAULT_PATCH_SIZE, PatchConfig, calibrate
from blt.records import RunRecord
from blt.runs import claim_output, start_run
from blt.studies import Made, Measured, Step
from blt.tasks import (
    accuracy_by_task,
    exact_answers,
    fine_tune,
    frequent_words,
    read_cute,
    spelling_items,
    split_items,
    starts_of,
    training_rows,
)
from blt.tokens import bpe_starts, train_tokenizer
from blt.training import PatchedDataset, train_blt
from blt_model import BLTConfig
from create_patches import CreatePatchesConfig
from entropy_llm import EntropyRunConfig
from entropy_patcher import EntropyPatcher
from evaluate import NOISES, EvaluateConfig, open_model
from llm import LLMConfig, make_model
from save_entropy_model import load_entropy_model
from template_llm import SHAPES, TemplateConfig

CONFIGS = {
    "entropy_llm": EntropyRunConfig,
    "create_patches": CreatePatchesConfig,
    "llm": LLMConfig,
    "template_llm": TemplateConfig,
    "evaluate": EvaluateConfig,
}


@dataclass(frozen=True)
class Budget:
    """The size of a study's runs."""

    size: str  # the presets of all scripts
    machine: str
    text: int  # bytes of training text that a run with the multiple 1 reads
    entropy_steps: int  # updates of the entropy model, of the size nano
    rate: float  # FLOP/s of training that the expected times rest on
    overhead: float  # seconds of a step beside its FLOPs: start, compilation, pictures
    rate_is: str  # where the rate comes from


BUDGETS = {
    "cpu": Budget("nano", "cpu", 2_200_000, 160, 1.5e11, 15, "1.5e11 FLOP/s: two demo BLTs at a time, 477 s each"),
    "gpu": Budget(
        "medium", "h100", 20_000_000, 300, 1.5e14, 100, "1.5e14 FLOP/s: the size medium at 2.25 MB/s on an H200"
    ),
}


# As --eval_every: a model is scored after its last update only.
AT_THE_END = 10**9


# --------------------------------------------------------------------------------------------------
# Steps


class Bench:
    """Makes the steps of a study's runs for one budget and one seed."""

    def __init__(self, config, seed, is_first=True):
        self.config = config
        self.budget = BUDGETS[config.budget]
        self.seed = seed
        self.is_first = is_first
        self.made = {}
        # A path that the user gave is looked up from where the user is; scripts run in the work folder.
        dataset = config.dataset
        self.dataset = str(Path(dataset).resolve()) if Path(dataset).exists() else dataset

    def text(self, multiple=1.0):
        """Bytes of training text that a run with this multiple reads."""
        return round(self.budget.text * multiple)

    def updates(self, multiple=1.0):
        """Updates that read this text in rows without padding."""
        return max(2, round(self.text(multiple) / update_bytes(self.llm_config())))

    def llm_config(self, size=None):
        """Settings of llm.py at this size, the budget's unless given, on the budget's machine."""
        return LLMConfig(preset=[self.budget.size if size is None else size, self.budget.machine], device="cpu")

    def shared(self, size=None):
        """Flags of every script that reads the corpus."""
        size = self.budget.size if size is None else size
        return {"preset": [size, self.budget.machine], "dataset": self.dataset, "device": self.config.device}

    def once(self, step):
        """The step itself, or the same one that this bench has made before: runs share what is equal."""
        return self.made.setdefault((step.script, repr(list(step.flags.items()))), step)

    def entropy(self, multiple=1.0, **changes):
        """An entropy model, trained on the first `multiple` texts."""
        flags = self.shared("nano") | {"max_bytes": self.text(multiple), "seed": self.seed}
        # The weights are then the last ones, and little time goes into it.
        flags |= {"steps": self.budget.entropy_steps, "eval_every": AT_THE_END} | changes
        return self.once(Step("entropy_llm", flags, "entropy_model.pth", checkpoints="entropy_model_run"))

    def patches(self, entropy, multiple=1.0):
        """The entropies of the first `multiple` texts."""
        flags = self.shared() | {"entropy_model_path": Made(entropy), "max_bytes": self.text(multiple)}
        key = ("create_patches", id(entropy), multiple)
        return self.made.setdefault(key, Step("create_patches", flags, "patch_cache", "cache_dir"))

    def training(self, multiple, size, changes):
        """Flags of a training run that reads the text of the multiple once, unless `changes` has `steps`."""
        flags = self.shared(size) | {"max_bytes": self.text(multiple)}
        flags |= {} if "steps" in changes else {"epochs": 1.0}
        return flags | {"eval_every": AT_THE_END, "seed": self.seed} | changes

    def blt(self, multiple=1.0, size=None, entropy=None, cached=None, **changes):
        """Steps of a BLT: entropy model, entropies of `cached` texts, training. Static and space need the last only."""
        method = changes.setdefault("patch_method", "global")
        if method != "space" and "entropy_threshold" not in changes:
            changes.setdefault("target_patch_size", DEFAULT_PATCH_SIZE)
        flags = self.training(multiple, size, changes) | {"sample_bytes": 0}
        if method in ("static", "space"):
            return [Step("llm", flags, checkpoints="output")]
        entropy = self.entropy() if entropy is None else entropy
        patches = self.patches(entropy, multiple if cached is None else cached)
        flags |= {"entropy_model_path": Made(entropy), "patch_cache": Made(patches)}
        return [entropy, patches, Step("llm", flags, checkpoints="output")]

    def template(self, model, tables, multiple=1.0, size=None, **changes):
        """Steps of a baseline, flat or bpe. With tables it has as many numbers in them as the BLT of this size."""
        flags = self.training(multiple, size, {"model": model, **self.tables(model, size, tables), **changes})
        return [Step("template_llm", flags, checkpoints="output")]

    def tables(self, model, size=None, tables=True, hash_rows=None):
        """Flags of a baseline's n-gram tables: over bytes those of the BLT, over tokens of 2 and 3 tokens.

        hash_rows: those of the BLT; None: as its size has.
        """
        if not tables:
            return {"ngram_sizes": []}
        size = self.budget.size if size is None else size
        blt = self.llm_config(size)
        sizes = blt.ngram_sizes if model == "flat" else [2, 3]
        hash_rows = blt.hash_rows if hash_rows is None else hash_rows
        numbers = blt.table_numbers // blt.hash_rows * hash_rows
        return {"ngram_sizes": sizes, "hash_rows": round(numbers / len(sizes) / SHAPES[model][size][0])}

    def part(self, name, settings, output="output", seeded=True):
        """A step that this script computes itself."""
        flags = {"part": name, "settings": settings}
        if seeded:
            flags |= {"seed": self.seed, "device": self.config.device}
        return self.once(Step("experiments", flags, output))

    def evaluate(self, trained, **changes):
        """evaluate.py on a trained model."""
        flags = self.shared() | {"model": Made(trained), "samples": 0} | changes
        return Step("evaluate", flags)


def update_bytes(config):
    """Bytes of an update where no row is padded. config: any `RunConfig`."""
    return config.row_bytes * config.batch_rows * config.accumulate


def scaled(bench, multiple, runs, ratio, estimate):
    """Changes of a run that makes `ratio(*metrics of runs)` times the updates of the last of `runs`.

    More updates read more text than that of the multiple, as far as the corpus has it; then they read it again.
    estimate: of the ratio.
    """

    def of_metrics(times):
        return lambda *metrics: max(2, round(times(metrics[-1]) * ratio(*metrics)))

    steps = Measured(tuple(runs), of_metrics(lambda own: own["steps"]), round(bench.updates(multiple) * estimate))
    text = Measured(tuple(runs), of_metrics(lambda own: bench.text(multiple)), round(bench.text(multiple) * estimate))
    return {"steps": steps, "max_bytes": text}


# --------------------------------------------------------------------------------------------------
# Metrics


def forward_flops(config, kind, bytes_per_patch=None, bytes_per_token=None):
    """Forward FLOPs per byte of a model before it is trained: by its settings, for rows of one document."""
    if kind == "blt":
        return sum(blt_flops(config, bytes_per_patch, config.row_bytes).values())
    if kind == "entropy":
        sizes = (config.d_model, config.n_layers, 256, config.row_bytes, config.max_seq_len)
        return sum(transformer_flops(*sizes).values())
    is_flat = kind == "flat"
    bytes_per_id = 1.0 if is_flat else bytes_per_token
    n_classes = 257 if is_flat else config.vocab_size + 1
    sizes = (config.dim, config.n_layers, n_classes, config.row_bytes / bytes_per_id, config.window)
    return sum(transformer_flops(*sizes).values()) / bytes_per_id


def trained_bytes(result):
    return result["bytes_per_second"] * result["train_seconds"]


def read_training(folders):
    """Metrics of a training run: of its last step, and of the entropy model before it."""
    record = RunRecord.load(folders[-1] / "output" / "model.json")
    result = record.result
    if result is None:
        raise ValueError(f"{folders[-1]} has no result")
    settings = SimpleNamespace(**record.settings)
    metrics = {name: result[name] for name in ("val_bpb", "val_loss", "val_accuracy", "val_bytes", "train_seconds")}
    metrics["perplexity"] = math.exp(result["val_loss"])
    metrics["steps"] = settings.steps
    metrics["trained_bytes"] = trained_bytes(result)
    metrics["trained_megabytes"] = metrics["trained_bytes"] / 1e6
    metrics["bytes_per_second"] = result["bytes_per_second"]
    if record.kind == "blt":
        metrics["bytes_a_unit"] = result["avg_patch_size"]
    if record.kind == "bpe":
        metrics["bytes_a_unit"] = record.bytes_per_token
    metrics["flops_per_byte"] = counted_flops(record, folders[-1])
    metrics["train_flops"] = TRAINING * metrics["flops_per_byte"] * metrics["trained_bytes"]
    parameters = re.search(r"^\w+: ([\d,]+) parameters", (folders[-1] / "log.txt").read_text(errors="replace"), re.M)
    if parameters:
        metrics["parameters"] = int(parameters[1].replace(",", ""))
    metrics |= entropy_costs(folders, settings.max_bytes) if record.entropy_model_sha256 else {}
    metrics["all_flops"] = metrics["train_flops"] + metrics.get("entropy_flops", 0.0)
    metrics["all_seconds"] = metrics["train_seconds"] + metrics.get("entropy_seconds", 0.0)
    # What PPMd makes of the same held-out text after the same training text, where the script says it.
    primed = result.get("baselines", {}).get("ppmd")
    if primed is not None:
        metrics["ppmd_bpb"] = primed["bpb"]
    metrics["curve"] = read_curve(folders[-1] / "output")
    return metrics


def counted_flops(record, folder):
    """Forward FLOPs per byte that a training run has counted, with the documents of its own rows."""
    if "flops_per_byte" not in record.result:
        raise ValueError(f"{folder} is of an earlier version, which did not count FLOPs; delete it to make it again")
    return record.result["flops_per_byte"]


def entropy_costs(folders, text_bytes):
    """FLOPs and seconds of an entropy model: its training, and its pass over the training text."""
    entropy = RunRecord.load(folders[0] / "entropy_model.json")
    forward = counted_flops(entropy, folders[0])
    of_pass = json.loads((folders[1] / "step.json").read_text())
    # The entropies of the longest run serve the shorter ones as well; each pays for its own text.
    cached_bytes = int(of_pass["command"][of_pass["command"].index("--max_bytes") + 1])
    # Without the script's start, pictures and page, as all other seconds are.
    log = (folders[1] / "log.txt").read_text(errors="replace")
    said = re.findall(r"^entropies: ([\d,]+) numbers in .*\(([\d.]+) kB/s\)", log, re.M)
    seconds = of_pass["seconds"]
    if said:
        # By the speed: where the pass was stopped, the seconds are of its last part alone.
        numbers, speed = said[-1]
        seconds = int(numbers.replace(",", "")) / (1e3 * float(speed))
    return {
        "entropy_bpb": entropy.result["val_bpb"],
        "entropy_flops": TRAINING * forward * trained_bytes(entropy.result) + forward * text_bytes,
        "entropy_seconds": entropy.result["train_seconds"] + seconds * text_bytes / cached_bytes,
    }


def read_curve(folder):
    """[[update, training bytes, training seconds, bits per byte], ...] of each evaluation; its own time is left out."""
    seconds = 0.0
    seen = 0
    curve = []
    for line in read_metrics(Path(folder) / "metrics.jsonl"):
        if "bytes_per_second" in line:
            seconds += (line["bytes"] - seen) / line["bytes_per_second"]
            seen = line["bytes"]
        elif "val_bpb" in line:
            curve.append([line["step"], line["bytes"], round(seconds, 2), line["val_bpb"]])
    return curve


def read_part(folders):
    """Metrics of a part: its result.json."""
    return json.loads((folders[-1] / "output" / "result.json").read_text())


def read_noises(folders):
    """Metrics of a trained model, and the cost of each noise from evaluate.py's card."""
    (model,) = json.loads((folders[-1] / "output" / "card.json").read_text())["models"]
    noises = {noise: model["robustness"][noise]["change"] for noise in NOISES}
    return read_training(folders[:-1]) | noises


def read_domain(folders):
    """Bits per byte and patch size on another text, from evaluate.py's card."""
    (model,) = json.loads((folders[-1] / "output" / "card.json").read_text())["models"]
    return {"val_bpb": model["bpb"], "val_accuracy": model["accuracy"], "bytes_a_unit": model["patches"]["mean_bytes"]}


# Expected times


def expected_seconds(step, flags, budget):
    """Seconds that a step should take: its FLOPs by the budget's rate, and what comes before and after."""
    if step.script == "experiments":
        return PARTS[flags["part"]].seconds(flags["settings"], budget)
    if step.script not in CONFIGS:
        return budget.overhead
    config = CONFIGS[step.script](**flags)
    if step.script == "create_patches":
        forward = forward_flops(EntropyRunConfig(preset=["nano", "cpu"], device="cpu"), "entropy")
        # A pass computes no gradients and little at once: a third of the rate.
        return budget.overhead + forward * (config.max_bytes + config.val_bytes) / (budget.rate / 3)
    if step.script == "evaluate":
        forward = blt_flops(LLMConfig(preset=[budget.size, budget.machine], device="cpu"), DEFAULT_PATCH_SIZE, 2048)
        # The held-out text, and each noise on a part of it.
        scored = config.val_bytes + 7 * config.robustness_bytes
        return budget.overhead + sum(forward.values()) * scored / (budget.rate / 3)
    kind = {"llm": "blt", "entropy_llm": "entropy"}.get(step.script) or config.model
    patch = flags.get("target_patch_size") or DEFAULT_PATCH_SIZE
    forward = forward_flops(config, kind, patch, bytes_per_token=3.57)
    trained = config.steps * update_bytes(config) if config.epochs is None else config.epochs * config.max_bytes
    scored = config.val_bytes * math.ceil(trained / update_bytes(config) / config.eval_every)
    return budget.overhead + forward * (TRAINING * trained + scored) / budget.rate


# --------------------------------------------------------------------------------------------------
# Parts: what no script computes


@dataclass
class Part:
    """A computation of experiments.py --part: compute(settings, config) writes config.output."""

    compute: object
    seconds: object  # expected: seconds(settings, budget)


def result_of(config, **values):
    """Write a part's result.json."""
    write_json(Path(config.output) / "result.json", values)


def training_of(settings, config):
    """The `LLMConfig` of a part that trains a BLT itself, resumed where there is a checkpoint."""
    flags = {"sample_bytes": 0} | settings | {"output": config.output, "seed": config.seed, "device": config.device}
    return LLMConfig(**flags, resume=has_checkpoint(config.output))


def training_seconds(settings, budget):
    return expected_seconds(Step("llm", {}), settings["llm"], budget)


# PPMd


def ppmd(settings, config):
    """PPMd after the same training text, as in the footer of every training run."""
    corpus = open_corpus(settings["dataset"], cache_dir="data_cache")
    documents = [corpus.document(n) for n in corpus.documents("validation", settings["val_bytes"])]
    began = time.perf_counter()
    facts = ppmd_after_training(corpus, corpus.documents("train", settings["max_bytes"]), documents)
    if facts is None:
        raise ValueError("PPMd needs a package: pip install pyppmd")
    result_of(
        config,
        val_bpb=facts["bpb"],
        order=facts["order"],
        memory_mb=facts["memory_mb"],
        val_bytes=sum(len(document) for document in documents),
        trained_bytes=facts["primed_bytes"],
        trained_megabytes=facts["primed_bytes"] / 1e6,
        train_seconds=time.perf_counter() - began,
    )


# BLTs with patches that llm.py does not make


class TwoModelPatcher(EntropyPatcher):
    """Patches by the entropies of two models together: their mean, minimum or maximum.

    With the minimum a patch starts where both models are above the threshold, with the maximum where either is.
    """

    def __init__(self, models, combine, patch_config, precision):
        super().__init__(models[0], patch_config, precision=precision)
        self.models = models
        self.combine = combine

    def entropies_with_end(self, documents, progress=None):
        # The leak gate changes the precision of the patcher after it is made.
        patchers = [EntropyPatcher(model, self.config, precision=self.precision) for model in self.models]
        of_models = [patcher.entropies_with_end(documents, progress) for patcher in patchers]
        return [self.combine(of_document, axis=0) for of_document in zip(*of_models)]


COMBINE = {"mean": np.mean, "min": np.min, "max": np.max}


def patched(settings, config):
    """Train a BLT with patches of two entropy models, or of BPE tokens, near a wanted average size.

    BPE patches look ahead: their starts depend on later bytes. So this is an oracle. The leak gate would refuse it
    and is left out, and no model.json is written, so that no script takes the weights for a model.
    """
    of_llm = training_of(settings["llm"], config)
    with claim_output(of_llm, config.output):
        run = start_run(of_llm)
        training = [np.array(run.corpus.document(number)) for number in run.train]
        is_oracle = settings["kind"] == "bpe"
        if is_oracle:
            patcher, vocabulary_size = oracle_patcher(training, run.validation, settings["target"], Path(config.output))
        else:
            models = [load_entropy_model(settings[name], run.device)[0] for name in ("first", "second")]
            make = (models, COMBINE[settings["kind"]])
            patcher = TwoModelPatcher(*make, PatchConfig("global", 1.0), run.precision)
        starts = patch_near(patcher, training, settings["target"])
        rows = training_rows(training, starts, BYTES, of_llm.row_bytes)
        data = PatchedDataset(rows, run.validation, starts_of(patcher, run.validation), patcher, of_llm.batch_rows)
        of_llm.choose_steps(data.train_rows)
        choose_dropout(of_llm, data.train_rows.stream)
        # As llm.py makes it.
        model = make_model(part_of(of_llm, BLTConfig), run.device, zero_init=of_llm.zero_init)
        if is_oracle:
            result = fit(model, of_llm, data.train_rows, data.validation_batches, config.output)
            result["avg_patch_size"] = data.bytes_per_patch()
            result["vocabulary"] = vocabulary_size
        else:
            result = train_blt(model, data, of_llm)
        result["perplexity"] = math.exp(result["val_loss"])
        result_of(config, **result, bytes_a_unit=result["avg_patch_size"], threshold=patcher.config.entropy_threshold)


def patch_near(patcher, documents, target):
    """Patch starts of documents; a patcher with a threshold is calibrated on them first."""
    if patcher.config.rule.unit is None:
        return starts_of(patcher, documents)
    entropies = patcher.entropies_with_end(documents)
    document_starts = np.concatenate([np.arange(len(of_document)) == 0 for of_document in entropies])
    patcher.config = calibrate(patcher.config, target, np.concatenate(entropies), document_starts)
    return [patcher.starts(document, of_document) for document, of_document in zip(documents, entropies)]


def oracle_patcher(documents, held_out, target, folder):
    """(EntropyPatcher of BPE tokens, tokens): the vocabulary whose tokens are nearest to it in held-out text."""
    best = None
    for size in (1024, 2048, 4096, 8192, 16384, 32768):
        tokenizer = train_tokenizer(documents, size, folder / f"tokenizer_{size}.json")
        tokens = sum(int(bpe_starts(tokenizer, document)[:-1].sum()) for document in held_out)
        mean = sum(map(len, held_out)) / tokens
        if best is None or abs(mean - target) < abs(best[0] - target):
            best = (mean, size)
    config = PatchConfig("bpe", tokenizer_path=str(folder / f"tokenizer_{best[1]}.json"))
    return EntropyPatcher(None, config), best[1]


def use_adamw():
    """From here on this process trains with AdamW for every parameter; layers' matrices have weight decay."""

    def adamw_for_all(model, of_run):
        for module in model.modules():
            if isinstance(module, HashEmbedding):
                # AdamW takes no sparse gradients.
                module.tables.sparse = False
                module.embed = embed_ngrams
        # As with Muon: no decay for embeddings, tables, norms and the head.
        linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.head]
        decayed = {id(linear.weight) for linear in linears}
        groups = [
            {"params": [p for p in model.parameters() if id(p) in decayed], "weight_decay": of_run.weight_decay},
            {"params": [p for p in model.parameters() if id(p) not in decayed], "weight_decay": 0.0},
        ]
        return [torch.optim.AdamW(groups, lr=of_run.lr, betas=(0.9, 0.95))]

    # The loop takes its optimizers from here. A process of --part computes nothing else.
    blt.loop.make_optimizers = adamw_for_all


def adamw(settings, config):
    """llm.py with AdamW for every parameter, in place of Muon and the row-wise Adam."""
    use_adamw()
    llm.run(training_of(settings["llm"], config))


# Fine-tuning


def tune(settings, config):
    """Fine-tune a trained model on tasks and measure the share of exact answers on held-out items."""
    under_test = open_model(settings["model"], None, choose_device(config.device))
    of_items = settings["items"]
    is_cute = of_items["kind"] == "cute"
    items = read_cute(Path(of_items["folder"])) if is_cute else spelling_items(frequent_words())
    training, test = split_items(items)
    model, patcher, row_bytes = under_test.model, under_test.patcher, under_test.row_bytes
    of_run = RunConfig(
        row_bytes=row_bytes,
        batch_rows=settings.get("batch_rows", 4),
        steps=settings["steps"],
        eval_every=settings["steps"],
        # Lower than in training from random weights.
        lr=settings.get("lr", 0.003),
        adam_lr=settings.get("lr", 0.003),
        seed=config.seed,
        device=config.device,
        # A few updates; to compile would take longer.
        compile="no",
        resume=has_checkpoint(config.output),
    )
    precision = choose_precision("auto", choose_device(config.device))
    result = fine_tune(model, patcher, training, of_run, row_bytes, config.output)
    accuracy = accuracy_by_task(test, exact_answers(model, patcher, test, row_bytes, precision=precision))
    result_of(
        config,
        accuracy=accuracy["all"],
        **{f"task {task}": value for task, value in accuracy.items()},
        train_seconds=result["train_seconds"],
        test_items=len(test),
    )


# Corpora


def write_documents(path, documents):
    """Write (text, source) pairs as JSON lines."""
    lines = [json.dumps({"text": text, "source": source}) + "\n" for text, source in documents]
    if not lines:
        raise ValueError(f"there are no documents for {path}")
    write_atomically(path, lambda temporary: Path(temporary).write_text("".join(lines)))


def corpus(settings, config):
    """Write a corpus: one language of a file, Python's standard library, or the long documents of a dataset.

    Or, as it is, the beginning of a dataset's held-out text.
    """
    kind = settings["kind"]
    if kind == "held_out":
        of_dataset = open_corpus(settings["dataset"], cache_dir="data_cache")
        documents = of_dataset.documents("validation", 10 * settings["bytes"])
        text = b"".join(of_dataset.document(n).tobytes() for n in documents)[: settings["bytes"]]
        write_atomically(config.output, lambda temporary: Path(temporary).write_bytes(text))
        return
    if kind == "language":
        path = Path(settings["file"])
        documents = read_file(path.name, path, "text", 65536)
        found = [(text_of(document), source) for source, document in documents if source == settings["source"]]
    elif kind == "python":
        found = list(python_sources(settings["max_bytes"]))
    else:
        of_dataset = open_corpus(settings["dataset"], cache_dir="data_cache")
        long = np.flatnonzero(np.diff(of_dataset.offsets) >= settings["min_bytes"])
        found = [(text_of(of_dataset.document(n)), of_dataset.sources[of_dataset.source_ids[n]]) for n in long]
    write_documents(config.output, found)


def text_of(document):
    return bytes(document).decode("utf-8", "replace")


def python_sources(max_bytes):
    """(text, source) of the standard library's modules, in a shuffled order that is always the same."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [
        path for path in sorted(folder.rglob("*.py")) if "site-packages" not in path.parts and "test" not in path.parts
    ]
    total = 0
    for number in np.random.default_rng(0).permutation(len(paths)):
        content = paths[number].read_bytes()
        total += len(content)
        if total > max_bytes:
            return
        if content.strip():
            yield text_of(content), "python"


PARTS = {
    "ppmd": Part(ppmd, lambda settings, budget: 5 + settings["max_bytes"] / 3e5),
    "patched": Part(patched, lambda settings, budget: 120 + training_seconds(settings, budget)),
    "adamw": Part(adamw, training_seconds),
    "fine_tune": Part(tune, lambda settings, budget: 60 + settings["steps"] * budget.overhead / 15),
    "corpus": Part(corpus, lambda settings, budget: 20),
}
