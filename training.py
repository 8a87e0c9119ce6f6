"""What the training scripts share: settings from the command line, hardware, optimizers, the loop, bits per byte, the leak gate.

What defines a number exists once, here: `row_nats` (the loss), `bits_per_byte` (the metric) and `leak_gate` (whether the
metric can be trusted).
"""

import argparse
import dataclasses
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from inspect import getsource
from pathlib import Path
from typing import Literal, get_type_hints

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import open_corpus
from optimizers import add_gradients, apply_gradients, learning_rate_scale, make_optimizers
from rows import BYTES, evaluation_batches


@dataclass
class DataConfig:
    """Settings of every script that reads a corpus."""

    preset: list[str] = field(default_factory=list)  # named sets of changes to these settings, applied left to right; flags beat them
    # data
    dataset: str = "sample"  # sample, a file or folder (.txt .md .jsonl .json .parquet, also .gz .xz .zst), or a Hugging Face id[:subset]
    text_field: str = "text"  # the field of a JSON or parquet record that holds the text
    corpus_bytes: int | None = None  # store at most so many bytes of the dataset (needed for a Hugging Face dataset)
    val_fraction: float = 0.03  # share of documents held out, chosen by a hash of each document
    max_document_bytes: int = 65536  # plain text files are cut into documents of at most so many bytes
    max_bytes: int | None = None  # use the first so many bytes of the training documents; None: all
    val_bytes: int = 1_000_000  # and the first so many bytes of the validation documents
    data_cache: str = "data_cache"  # folder of the byte stores
    # machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 where the hardware computes in it, fp16 on older GPUs

    def __post_init__(self):
        check_positive(self, "max_bytes", "val_bytes", "corpus_bytes", "max_document_bytes")
        check(self, "val_fraction", 0 < self.val_fraction <= 0.5, "above 0 and at most 0.5")
        check(self, "precision", self.precision in ("auto", "bf16", "fp16", "fp32"), "one of auto, bf16, fp16, fp32")

    def corpus(self):
        """Open the byte store of the dataset; the first time it is built."""
        return open_corpus(
            self.dataset, text_field=self.text_field, max_bytes=self.corpus_bytes, val_fraction=self.val_fraction,
            max_document_bytes=self.max_document_bytes, cache_dir=self.data_cache,
        )  # fmt: skip


@dataclass
class RunConfig(DataConfig):
    """Settings of every training run."""

    # rows and steps
    row_bytes: int = 4096  # ids in a row: what a model sees at once in training and evaluation
    batch_rows: int = 8  # rows in one forward and backward pass
    accumulate: int = 1  # passes whose gradients are summed into one update
    steps: int = 5000  # updates
    # optimization
    lr: float = 0.005  # peak learning rate of the matrices (Muon, scaled to the RMS of an AdamW update)
    adam_lr: float = 0.003  # peak learning rate of embeddings, output head and norms (AdamW)
    weight_decay: float = 0.1  # decoupled weight decay of the matrices
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"  # constant then linear to zero, or half a cosine to zero
    warmup: float = 0.02  # share of the steps in which the learning rate rises
    cooldown: float = 0.4  # share of the steps in which a trapezoid falls
    clip: float = 1.0  # largest norm of an update's gradient
    compile: Literal["auto", "yes", "no"] = "auto"  # torch.compile; auto: on CUDA
    seed: int = 1337  # weights, order of the rows, dropout
    # output
    eval_every: int = 250  # updates between evaluations
    log_every: int = 10  # updates between log lines
    resume: bool = False  # go on from the last checkpoint in the output folder
    tensorboard: bool = False  # also write TensorBoard scalars (pip install tensorboard)

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "row_bytes", "batch_rows", "accumulate", "steps", "lr", "adam_lr", "clip", "eval_every", "log_every")
        for name in ("warmup", "cooldown"):
            check(self, name, 0 <= getattr(self, name) <= 1, "a share of the steps, from 0 to 1")
        check(self, "weight_decay", self.weight_decay >= 0, "0 or more")
        check(self, "row_bytes", self.row_bytes >= 2, "2 or more")
        check(self, "schedule", self.schedule in ("trapezoid", "cosine"), "trapezoid or cosine")
        check(self, "compile", self.compile in ("auto", "yes", "no"), "auto, yes or no")


def check(config, name, is_good, allowed):
    """Raise ValueError naming a config field, its value and what is allowed, unless is_good."""
    if not is_good:
        raise ValueError(f"{name} is {getattr(config, name)!r}; it must be {allowed}")


def check_positive(config, *names):
    """Raise ValueError unless these fields are numbers above zero, or None where the field may be None."""
    types = get_type_hints(type(config))
    for name in names:
        value = getattr(config, name)
        may_be_none = value is None and isinstance(None, types[name])
        check(config, name, may_be_none or (isinstance(value, (int, float)) and value > 0), "above 0")


# ---------------------------------------------------------------------------------------------------------------------
# Scripts: settings from dataclass, preset and command line; errors in one line


def parse_config(config_class, description, presets=None, argv=None):
    """Read a config from the command line: the dataclass's values, then presets, then flags.

    Every field is a flag, and the comment at the end of its line is its help. presets: {name: {field: value}}. The field that
    a config class names as its POSITIONAL may be given first, without its flag.
    """
    from transformers import HfArgumentParser

    presets = presets or {}
    parser = HfArgumentParser(
        config_class, description=description, formatter_class=_HelpFormatter, usage="%(prog)s [--field value ...]"
    )
    comments = field_comments(config_class)
    for action in parser._actions:
        if action.dest in comments:
            action.help = ("do without: " if action.option_strings[0].startswith("--no_") and action.nargs == 0 else "") + comments[action.dest].replace("%", "%%")
            action.option_strings = [name for name in action.option_strings if "-" not in name[2:]]  # of --a_b and --a-b show one
            action.metavar = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else "VALUE"
        if action.dest == "preset":
            action.help += f"; one or more of: {', '.join(presets) or 'none here'}"
    argv = sys.argv[1:] if argv is None else argv
    if hasattr(config_class, "POSITIONAL") and argv and not argv[0].startswith("-"):
        argv = [f"--{config_class.POSITIONAL}", *argv]
    chosen = parser.parse_known_args(argv)[0]
    names = (["quick_demo"] if getattr(chosen, "quick_demo", False) else []) + (getattr(chosen, "preset", None) or [])
    for name in names:
        if name not in presets:
            parser.error(f"unknown preset {name!r}; choose from: {', '.join(presets)}")
        parser.set_defaults(**presets[name])
    try:
        config = parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)[0]
    except ValueError as error:
        parser.error(str(error).replace("Some specified arguments are not used by the HfArgumentParser", "unknown flags"))
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser._defaults.clear()
    config.given_flags = set(vars(parser.parse_known_args(argv)[0]))
    return config


def given_fields(config):
    """Names of the settings that were chosen for this run: its flags; of a config made in Python, what differs from its class's values.

    Presets and the values in a file are not among them: they may give way, for instance to the sizes of a model that is read.
    """
    try:
        return config.given_flags
    except AttributeError:
        default = type(config)()
        return {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(default, f.name)}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the lines of the description and show every default."""


def field_comments(config_class):
    """{field: the comment at the end of its line}, over a dataclass and its bases."""
    comments = {}
    for base in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(base):
            for line in getsource(base).splitlines():
                found = re.match(r"    (\w+): [^#]+  # (.+)", line)
                if found:
                    comments[found[1]] = found[2]
    return comments


def run_script(main, config_class, description, presets=None):
    """Parse the command line and run main(config). A user's mistake ends in one line and exit status 1, without a traceback.

    Set BLT_TRACEBACK=1 to see where an error came from.
    """
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    config = parse_config(config_class, description, presets)
    try:
        main(config)
    except (ValueError, OSError) as error:  # FileNotFoundError, PermissionError and ConnectionError are OSErrors
        if os.environ.get("BLT_TRACEBACK"):
            raise
        message = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename:  # raised by the system, not by us
            message = f"{error.filename}: {error.strerror}; check the path and its permissions, or pass another one"
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def print_header(config, device, precision):
    """Print what runs where, and every setting: enough to repeat the run."""
    print(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"commit {git_commit()} | torch {torch.__version__} | {device} ({name}) | {precision}")
    if device.type == "cpu" and not getattr(config, "preset", True):
        print("note: no GPU is used; --preset cpu is sized for a CPU")
    print("config " + " ".join(f"{key}={value}" for key, value in dataclasses.asdict(config).items()))


def print_table(header, rows):
    """Columns as wide as their widest cell, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))).rstrip())


def git_commit():
    """The checkout's short commit, with + if files differ from it; 'unknown' outside a checkout."""
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return run("rev-parse", "--short", "HEAD") + ("+" if run("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def write_aside(path, write):
    """Call write(temporary path), then rename it to path: a reader never sees half a file, a failure leaves the old one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path, value):
    """Write JSON aside and rename it."""
    write_aside(path, lambda temporary: Path(temporary).write_text(json.dumps(value, indent=2) + "\n"))


# ---------------------------------------------------------------------------------------------------------------------
# Hardware


def choose_device(name="auto"):
    """torch.device: CUDA where there is one, else the CPU; or the one that was named."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; it must be auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch finds no CUDA device here; use --device cpu")
    return device


def choose_precision(name, device):
    """'bf16', 'fp16' or 'fp32'; auto takes what the hardware multiplies fastest (a T4 only emulates bf16, so fp16)."""
    if name != "auto":
        if name == "fp16" and device.type != "cuda":
            raise ValueError(f"precision is 'fp16', which needs CUDA; on {device.type} use bf16 or fp32")
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bf16"
    return "fp32"


def autocast(device, precision):
    """The context in which a model's matrix products run in this precision; weights stay fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def set_seed(seed):
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# The metric


def row_nats(model, batch):
    """Cross-entropy of each target of a `RowBatch`, in nats, 0 where it does not count: float32 [B, T]; and the logits."""
    inputs, targets = batch.ids[:, :-1], batch.ids[:, 1:].masked_fill(~batch.is_scored, -100)
    logits_BTV = model(inputs) if batch.patch_lengths is None else model(inputs, batch.patch_lengths)
    nats = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none")
    return nats.view_as(targets), logits_BTV


@torch.no_grad()
def target_nats(model, batches, device, precision="fp32"):
    """What each target of `RowBatch`es costs: yields (batch, nats float32 [B, T], is_right bool [B, T]); 0, False where none counts."""
    was_training = model.training
    model.eval()
    for batch in batches:
        batch = batch.to(device)
        with autocast(device, precision):
            nats, logits = row_nats(model, batch)
        yield batch, nats, (logits.argmax(-1) == batch.ids[:, 1:]) & batch.is_scored
    model.train(was_training)


def score(model, batches, device, precision="fp32"):
    """Total nats, right guesses, targets and bytes over `RowBatch`es: a dict of numbers."""
    return add_up(target_nats(model, batches, device, precision))


def add_up(costs):
    """`score` of what `target_nats` yields."""
    totals = {"nats": 0.0, "right": 0, "targets": 0, "bytes": 0}
    for batch, nats, is_right in costs:
        totals["nats"] += nats.sum(dtype=torch.float64).item()
        totals["right"] += int(is_right.sum())
        totals["targets"] += batch.targets
        totals["bytes"] += batch.bytes
    return totals


def rates(totals):
    """Totals as {"val_bpb", "val_loss" (nats per target), "val_accuracy", "val_bytes"}."""
    return {
        "val_bpb": totals["nats"] / math.log(2) / totals["bytes"],
        "val_loss": totals["nats"] / totals["targets"],
        "val_accuracy": totals["right"] / totals["targets"],
        "val_bytes": totals["bytes"],
    }


def evaluate(model, batches, device, precision="fp32"):
    """Score validation rows: `rates` of their `score`."""
    return rates(score(model, batches, device, precision))


def bits_per_byte(model, patcher, documents, row_bytes=4096, batch_rows=8, precision="fp32"):
    """Bits per byte of whole documents: nats of every byte and of every document's end, / ln 2 / number of raw bytes.

    patcher: makes each document's patches from what stands before each byte; None for a model without patches.
    documents: bytes-like or uint8 arrays, each scored from its boundary on; one longer than row_bytes - 1 bytes is read in
    windows of row_bytes ids, half a window apart (`evaluation_batches`). A model with 256 classes (the entropy model) has
    no way to end a document: its ends are left out, the bytes are not. A model over other ids (`.vocabulary`, BPE tokens) pays
    for the ids that its vocabulary makes of a document, in rows of about row_bytes bytes; the bytes counted stay the raw ones.
    """
    documents = [np.frombuffer(bytes(document), dtype=np.uint8) for document in documents]
    is_start = None if patcher is None else [patcher.starts(document) for document in documents]
    batches = scoring_batches(model, documents, is_start, row_bytes, batch_rows)
    return evaluate(model, batches, next(model.parameters()).device, precision)["val_bpb"]


def scoring_batches(model, documents, is_start, row_bytes=4096, batch_rows=8):
    """The rows from which `bits_per_byte` scores uint8 documents with a model, their patches already made (is_start; None: no patches)."""
    if not sum(len(document) for document in documents):
        raise ValueError("bits per byte need at least one byte of text")
    score_ends, vocabulary = predicts_document_ends(model), vocabulary_of(model)
    ids = [vocabulary.encode(document) for document in documents]
    return evaluation_batches(ids, is_start, vocabulary.row_ids(row_bytes), batch_rows, score_ends, vocabulary)


def predicts_document_ends(model):
    """Whether the model has a class for the document's end (257 classes) or bytes only (256)."""
    return getattr(model, "_orig_mod", model).n_classes > vocabulary_of(model).boundary


def vocabulary_of(model):
    """What a model's ids stand for (`rows.Vocabulary`): bytes, unless the model carries a vocabulary of its own."""
    return getattr(getattr(model, "_orig_mod", model), "vocabulary", BYTES)


@torch.no_grad()
def leak_gate(model, patcher, text, places=6):
    """Stop with ValueError if the model or its patches see bytes that they must predict (DESIGN.md, invariants 1 and 2).

    For some places t of the text: (1) other bytes from t on must leave the logits of bytes 0 to t as they are, and
    (2) the text cut off at t must give the last logit of the cut the value it has in the whole text. The patches are made
    anew by the patcher each time. patcher None: a model without patches. Returns the largest difference seen, in nats.

    A model over BPE tokens is held to the same with tokens in place of bytes: the text is tokenised once, and tokens are changed and
    cut. (Bytes cannot be: other bytes from t on may change a token that began before t. That is the tokenizer's looking ahead, not
    the model's; the tokens still restore the text, so their cost is an honest one.)
    """
    if patcher is not None and not patcher.is_causal:
        raise ValueError(
            f"patch method {patcher.config.method!r} looks ahead: it serves comparisons of boundaries only; "
            "train with global, monotonic, both, static, space or cumulative"
        )
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    vocabulary = vocabulary_of(model)
    text = vocabulary.encode(np.frombuffer(bytes(text), dtype=np.uint8)[:512])
    if len(text) < 2:
        raise ValueError(f"the leak gate needs a text of at least 2 {'bytes' if vocabulary is BYTES else 'tokens'}")

    def log_probabilities(document):
        is_start = None if patcher is None else [patcher.starts(document)]
        (batch,) = evaluation_batches([document], is_start, len(document) + 1, batch_rows=1, vocabulary=vocabulary)
        batch = batch.to(device)
        logits = model(batch.ids[:, :-1]) if is_start is None else model(batch.ids[:, :-1], batch.patch_lengths)
        return logits[0].float().log_softmax(-1)

    whole, worst = log_probabilities(text), 0.0
    generator = np.random.default_rng(0)
    for t in np.unique(np.linspace(1, len(text) - 1, places).astype(int)):
        changed = text.copy()
        changed[t:] = generator.integers(0, vocabulary.boundary, len(text) - t, dtype=text.dtype)
        future = (log_probabilities(changed)[: t + 1] - whole[: t + 1]).abs().max().item()
        prefix = (log_probabilities(text[:t])[-1] - whole[t]).abs().max().item()
        for difference, what in ((future, f"changing bytes from {t} on changes logits before"), (prefix, f"cutting the text at {t} changes its last logit")):
            worst = max(worst, difference)
            if not difference < 1e-3:
                raise ValueError(f"leak: {what} (by {difference:.2g} nats); losses of this model mean nothing")
    model.train(was_training)
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def fit(model, config, train_rows, validation_batches, out_dir):
    """Train: the one loop of the project. Returns the best evaluation (that of best.pt), last_val_bpb and the speed.

    train_rows: `TrainingRows`. validation_batches: list of `RowBatch`, scored every eval_every updates and at the end.
    Writes to out_dir: last.pt (everything to go on from), best.pt (weights of the best evaluation), metrics.jsonl.
    Stopped and resumed gives the weights of a run straight through: a batch depends on its number only.
    """
    device = next(model.parameters()).device
    precision = choose_precision(config.precision, device)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    optimizers = make_optimizers(model, config)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    settings = dataclasses.asdict(config)
    start, best, last, trained_bytes = 0, None, None, 0
    if config.resume:
        start, best, trained_bytes = load_checkpoint(out_dir / "last.pt", model, optimizers, scaler, settings)
        print(f"resumed {out_dir / 'last.pt'} at step {start}")
    metrics = Metrics(out_dir, config.tensorboard, start)
    use_compile = config.compile == "yes" or (config.compile == "auto" and device.type == "cuda")
    step_model = torch.compile(model) if use_compile else model

    def load(step):
        batches = [
            train_rows.shuffled_batch(step * config.accumulate + micro, config.batch_rows, config.seed)
            for micro in range(config.accumulate)
        ]
        return [batch.pin() for batch in batches] if device.type == "cuda" else batches

    model.train()
    bar = tqdm(total=config.steps, initial=start, unit="step", disable=None, dynamic_ncols=True)
    loader = ThreadPoolExecutor(1)  # the next update's rows are made while this one computes
    pending = loader.submit(load, start)
    seconds, bytes_here, logged_at = 0.0, 0, (0.0, 0, start)  # of this process, for the speed
    tick = time.perf_counter()
    for step in range(start, config.steps):
        scale = learning_rate_scale(step, config)
        for optimizer, rates in zip(optimizers, peaks):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * scale
        batches = pending.result()
        pending = loader.submit(load, step + 1)
        targets = sum(batch.targets for batch in batches)
        loss_nats = torch.zeros((), device=device)
        for batch in batches:
            with autocast(device, precision):
                batch = batch.to(device)
                nats, _ = row_nats(step_model, batch)
                if step == start and step_model is not model:
                    check_compiled(model, batch, nats)
                loss = nats.sum() / targets
            add_gradients(model, loss, scaler)
            loss_nats += loss.detach()
        gradient_norm = apply_gradients(model, optimizers, scaler, config.clip)

        done = step + 1
        is_last = done == config.steps
        evaluate_now = done % config.eval_every == 0 or is_last
        bytes_here += sum(batch.bytes for batch in batches)
        trained_bytes += sum(batch.bytes for batch in batches)
        if done % config.log_every == 0 or evaluate_now:  # a checkpoint is never written after an infinite loss
            loss_value = loss_nats.item()  # waits for the device, so the clock below is honest
            if not math.isfinite(loss_value):
                raise ValueError(
                    f"the loss is {loss_value} at step {done}; lower --lr or --adam_lr, or use --precision fp32 "
                    f"(the last good state is in {out_dir / 'last.pt'})"
                )
            now = seconds + time.perf_counter() - tick
            speed = (bytes_here - logged_at[1]) / (now - logged_at[0])
            step_ms = 1000 * (now - logged_at[0]) / (done - logged_at[2])
            logged_at = (now, bytes_here, done)
            metrics.write(
                step=done, bytes=trained_bytes, loss=loss_value, lr=config.lr * scale,
                gradient_norm=gradient_norm.item(), bytes_per_second=speed,
            )  # fmt: skip
            bar.set_postfix_str(f"{loss_value:.3f} nats, {speed / 1e3:.1f} kB/s", refresh=False)
            if bar.disable or is_last:
                print(
                    f"step {done:6d}/{config.steps} | loss {loss_value:.4f} nats | lr {config.lr * scale:.1e} | "
                    f"{step_ms:.0f} ms | {speed / 1e3:.1f} kB/s"
                )
        bar.update(1)
        if evaluate_now:
            seconds += time.perf_counter() - tick  # evaluation is not training time
            last = evaluate(model, validation_batches, device, precision)
            bar.write(
                f"step {done:6d}/{config.steps} | val {last['val_bpb']:.4f} bpb over {last['val_bytes']:,} bytes | "
                f"accuracy {last['val_accuracy']:.1%}"
            )
            metrics.write(step=done, bytes=trained_bytes, **last)
            if best is None or last["val_bpb"] < best["val_bpb"]:
                best = last
                save_weights(out_dir / "best.pt", model)
            state = {"step": done, "best": best, "bytes": trained_bytes, "settings": settings}
            save_checkpoint(out_dir / "last.pt", model, optimizers, scaler, state)
            tick = time.perf_counter()
    bar.close()
    loader.shutdown(cancel_futures=True)
    metrics.close()
    speed = bytes_here / seconds if seconds else 0.0
    last_bpb = (last or best)["val_bpb"]
    return {**best, "last_val_bpb": last_bpb, "bytes_per_second": speed, "train_seconds": seconds}


@torch.no_grad()
def check_compiled(model, batch, compiled_nats):
    """Stop with ValueError if the compiled model's losses are not the model's: the leak gate has looked at the latter only.

    A model with dropout is not checked: its two passes drop different channels.
    """
    if any(isinstance(module, nn.Dropout) and module.p for module in model.modules()):
        return
    difference = (row_nats(model, batch)[0] - compiled_nats).abs()
    if not difference.mean() < 0.02:
        raise ValueError(
            f"the compiled model is wrong here: its losses differ by {difference.mean():.2g} nats on average; "
            "run with --compile no, and please report this with your torch and GPU"
        )


class Metrics:
    """metrics.jsonl, one object a line, and TensorBoard scalars if asked. A resumed run drops lines after its start."""

    def __init__(self, out_dir, tensorboard=False, start=0):
        path = Path(out_dir) / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= start] if start else []
        write_aside(path, lambda temporary: Path(temporary).write_text("".join(json.dumps(line) + "\n" for line in kept)))
        self.file = open(path, "a", buffering=1)
        self.board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard needs a package: pip install tensorboard") from None
            self.board = SummaryWriter(out_dir)

    def write(self, step, **values):
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def close(self):
        self.file.close()
        if self.board:
            self.board.close()


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts; [] if there is no file."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def save_weights(path, model):
    """Write a plain state dict, aside and renamed."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    write_aside(path, lambda temporary: torch.save(state, temporary))


def load_weights(path, model, assign=False):
    """Read a `save_weights` file into the model. Raises ValueError for a file that does not hold this model's weights.

    assign: let the model (on the meta device) have the file's own memory and dtype instead of a copy.
    """
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True, mmap=assign), assign=assign)
    except Exception as error:  # torch raises many kinds for a file that is no state dict of these shapes
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} does not hold the model that the JSON beside it describes ({reason}); train it again") from None


def save_checkpoint(path, model, optimizers, scaler, state):
    """Write everything that `load_checkpoint` needs to go on as if never stopped."""
    whole = {
        **state,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "scaler": scaler.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    write_aside(path, lambda temporary: torch.save(whole, temporary))


# Settings that may differ between the run that stopped and the one that goes on.
FREE_TO_CHANGE = {"preset", "resume", "eval_every", "log_every", "tensorboard", "data_cache", "device", "compile", "val_bytes"}


def load_checkpoint(path, model, optimizers, scaler, settings):
    """Restore a `save_checkpoint` file into model and optimizers; returns (step, best evaluation so far, bytes trained on)."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} not found: nothing to resume; run without --resume")
    state = torch.load(path, map_location="cpu", weights_only=True)
    differing = [
        f"{name}: {state['settings'].get(name)!r} then, {value!r} now"
        for name, value in settings.items()
        if name not in FREE_TO_CHANGE and state["settings"].get(name) != value
    ]
    if differing:
        raise ValueError(f"cannot resume {path} with other settings ({'; '.join(differing)}); use those, or run without --resume")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["random"])
    if state["random_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["random_cuda"])
    return state["step"], state["best"], state["bytes"]


def training_curves(path, out_dir, bytes_per_id=1.0):
    """Draw metrics.jsonl as a picture: loss of each logged batch and validation, both in bits per byte, against bytes seen.

    bytes_per_id: mean bytes that a target stands for, to turn a loss in nats per BPE token into bits per byte.
    """
    from pictures import draw_curves

    lines = read_metrics(Path(out_dir) / "metrics.jsonl")
    train = [(line["bytes"] / 1e6, line["loss"] / math.log(2) / bytes_per_id) for line in lines if "loss" in line]
    val = [(line["bytes"] / 1e6, line["val_bpb"]) for line in lines if "val_bpb" in line]
    curves = {"training batches": zip(*train), "validation": zip(*val)}
    curves = {name: tuple(np.array(axis) for axis in pairs) for name, pairs in curves.items()}
    draw_curves(path, curves, "training bytes seen (MB)", "bits per byte")
