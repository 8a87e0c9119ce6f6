"""The training loop, its checkpoints and its metrics. Every model of the project is trained by `fit`."""

import dataclasses
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from blt.attention import slow_attention
from blt.checks import check, check_positive
from blt.corpus import DataConfig
from blt.device import allow_tf32, autocast, choose_precision, restore_matmul_precision, synchronize
from blt.files import save_weights, write_atomically
from blt.layers import SelfAttention
from blt.metric import evaluate, target_losses
from blt.optimizers import backward, clip_gradients, learning_rate_scale, make_optimizers, step_optimizers


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
    adam_lr: float = 0.003  # peak learning rate of embeddings, hash tables, output head and norms (AdamW)
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
        check_positive(self, "row_bytes", "batch_rows", "accumulate", "steps", "lr", "adam_lr", "clip")
        check_positive(self, "eval_every", "log_every")
        for name in ("warmup", "cooldown"):
            check(self, name, 0 <= getattr(self, name) <= 1, "a share of the steps, from 0 to 1")
        check(self, "weight_decay", self.weight_decay >= 0, "0 or more")
        check(self, "row_bytes", self.row_bytes >= 2, "2 or more")
        check(self, "schedule", self.schedule in ("trapezoid", "cosine"), "trapezoid or cosine")
        check(self, "compile", self.compile in ("auto", "yes", "no"), "auto, yes or no")


@restore_matmul_precision()
def fit(model, config, train_rows, validation_batches, out_dir):
    """Train a model. Returns the best evaluation (that of best.pt), last_val_bpb, bytes_per_second and train_seconds.

    train_rows: `TrainingRows`.
    validation_batches: list of `RowBatch`, scored every eval_every updates and at the end.
    Writes to out_dir: last.pt (everything to go on from), best.pt (weights of the best
    evaluation), metrics.jsonl. Stopped and resumed gives the weights of a run straight through: a
    batch depends on its number only.
    """
    device = next(model.parameters()).device
    precision = choose_precision(config.precision, device)
    allow_tf32(device, precision)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    # Every parameter is in exactly one optimizer: matrices in Muon, hash tables in row-wise Adam, the
    # rest in AdamW.
    optimizers = make_optimizers(model, config)
    # fp16 gradients underflow, so their loss is scaled; for other precisions the scaler does
    # nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    start, best, trained_bytes = 0, None, 0
    if config.resume:
        start, best, trained_bytes = load_checkpoint(out_dir / "last.pt", model, optimizers, scaler, config)
        print(f"resumed {out_dir / 'last.pt'} at step {start}")
    last = best
    model.train()
    step_model = compile_model(model, config, train_rows, device, precision)
    progress = Progress(config, Metrics(out_dir, config.tensorboard, start), start, trained_bytes, out_dir)

    for step, batches in batches_of_steps(train_rows, config, start, device):
        learning_rate = set_learning_rates(optimizers, learning_rate_scale(step, config))
        # The loss is a mean over all scored targets of the update, so passes with more padding weigh
        # less, and accumulating gradients gives the same update as one large batch.
        targets = sum(batch.targets for batch in batches)
        loss_nats = torch.zeros((), device=device)
        for batch in batches:
            with autocast(device, precision):
                # The forward pass.
                nats_BT, _ = target_losses(step_model, batch.to(device))
                loss = nats_BT.sum() / targets
            backward(model, loss, scaler)
            loss_nats += loss.detach()
        gradient_norm = clip_gradients(model, optimizers, scaler, config.clip)
        step_optimizers(optimizers, scaler, gradient_norm)

        # What follows is the record of the step: log lines, evaluations, checkpoints.
        done = step + 1
        evaluate_now = done % config.eval_every == 0 or done == config.steps
        progress.count(batches)
        if done % config.log_every == 0 or evaluate_now:
            progress.log(done, loss_nats, gradient_norm, learning_rate)
        if evaluate_now:
            with progress.paused():
                last = evaluate(model, validation_batches, device, precision)
                progress.log_evaluation(done, last)
                if best is None or last["val_bpb"] < best["val_bpb"]:
                    best = last
                    save_weights(out_dir / "best.pt", model)
                # After the evaluation, so that a resumed run knows the best one.
                state = {"step": done, "best": best, "bytes": progress.trained_bytes}
                save_checkpoint(out_dir / "last.pt", model, optimizers, scaler, config, state)
    progress.close()
    return {**best, "last_val_bpb": last["val_bpb"], **progress.speed()}


def batches_of_steps(train_rows, config, start, device):
    """Yield (step, its batches: one a pass); the next step's rows are made in a thread while the device computes."""

    def make(step):
        # A batch is a pure function of its number and the seed: a resumed run reads the same rows.
        first = step * config.accumulate
        batches = [
            train_rows.shuffled_batch(position, config.batch_rows, config.seed)
            for position in range(first, first + config.accumulate)
        ]
        # Copies from pinned memory run beside the computation.
        return [batch.pin() for batch in batches] if device.type == "cuda" else batches

    with ThreadPoolExecutor(1) as loader:
        pending = loader.submit(make, start)
        for step in range(start, config.steps):
            batches = pending.result()
            if step + 1 < config.steps:
                pending = loader.submit(make, step + 1)
            yield step, batches


def set_learning_rates(optimizers, scale):
    """Set every group's learning rate to this share of its peak; returns the first group's, for the log."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # Kept in the group, so that a resumed run knows the peak and not only the present rate.
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * scale
    return optimizers[0].param_groups[0]["lr"]


def compile_model(model, config, train_rows, device, precision):
    """torch.compile(model) where the config wants it, else the model itself.

    The forward and backward pass are compiled here, before the clock of the training speed
    starts.
    Raises ValueError if torch.compile does not work here, or if compiled and eager losses disagree:
    the leak gate has tested the eager model only.
    """
    is_compiled = config.compile == "yes" or (config.compile == "auto" and device.type == "cuda")
    print_slow_attention(model, device, precision, is_compiled)
    if not is_compiled:
        return model
    # A process may train several models. What torch has compiled for another one counts towards its
    # limit of compilations.
    torch.compiler.reset()
    # All batches of a run have one shape. Without dynamic=False, a second model of the process whose
    # rows have another number of patches is compiled for any number, and FlexAttention does not lower.
    compiled = torch.compile(model, dynamic=False)
    batch = train_rows.shuffled_batch(0, config.batch_rows, config.seed).to(device)
    begin = time.perf_counter()
    # A run that is resumed compiles again: its dropout must go on as if it had not.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        compiled_nats = compiled_pass(compiled, batch, device, precision)
    model.zero_grad(set_to_none=True)
    synchronize(device)
    print(f"compiled in {time.perf_counter() - begin:.0f} s")
    has_dropout = any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
    if has_dropout:
        # Two passes drop different channels, so there is nothing to compare.
        return compiled
    with torch.no_grad(), autocast(device, precision):
        eager_nats, _ = target_losses(model, batch)
    difference = (eager_nats - compiled_nats).abs().mean().item()
    # bf16 rounds differently in fused kernels, so the bound is loose; a wrong kernel is far off. The
    # comparison is written so that a difference that is not a number fails too.
    if not difference < 0.02:
        raise ValueError(
            f"the compiled model is wrong here: its losses differ by {difference:.2g} nats on average; "
            "run with --compile no, and please report this with your torch and GPU"
        )
    return compiled


def compiled_pass(compiled, batch, device, precision):
    """One forward and backward pass, which compiles both: the nats [B, T] of the batch.

    Raises ValueError if torch.compile does not work here, as without a C++ compiler or Triton.
    """
    try:
        with autocast(device, precision):
            nats_BT, _ = target_losses(compiled, batch)
        # Only so that the backward pass is compiled as well; its gradients are thrown away.
        nats_BT.sum().backward()
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"torch.compile does not work here ({reason}); run with --compile no") from error
    return nats_BT.detach()


def print_slow_attention(model, device, precision, is_compiled):
    """Print why attention has no fast kernel here, if so: once for each reason."""
    layers = [module for module in model.modules() if isinstance(module, SelfAttention)]
    reasons = {slow_attention(device, precision, layer.head_dim, layer.dropout, is_compiled): None for layer in layers}
    for reason in reasons:
        if reason is not None:
            print(f"attention: {reason}")


class Progress:
    """Log lines, progress bar, metrics and speed of a run. The time of evaluations is not training time."""

    def __init__(self, config, metrics, start, trained_bytes, out_dir):
        self.config = config
        self.metrics = metrics
        self.out_dir = out_dir
        self.trained_bytes = trained_bytes  # since the first step of the run, before it was stopped and resumed too
        self.bytes_here = 0  # by this process
        self.seconds = 0.0  # of training, up to the last pause
        self.running_since = time.perf_counter()
        self.last_log = {"seconds": 0.0, "bytes": 0, "step": start}
        self.bar = tqdm(total=config.steps, initial=start, unit="step", disable=None, dynamic_ncols=True)

    def count(self, batches):
        """Count the bytes of an update."""
        new_bytes = sum(batch.bytes for batch in batches)
        self.bytes_here += new_bytes
        self.trained_bytes += new_bytes
        self.bar.update(1)

    def log(self, done, loss_nats, gradient_norm, learning_rate):
        """Print and record a training step. Raises ValueError for a loss that is infinite or not a number."""
        # .item() waits for the device, so the clock that is read next is right.
        loss = loss_nats.item()
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {done}; lower --lr or --adam_lr, or use --precision fp32 "
                f"(the last good state is in {self.out_dir / 'last.pt'})"
            )
        seconds = self.seconds + time.perf_counter() - self.running_since
        since_log = seconds - self.last_log["seconds"]
        speed = (self.bytes_here - self.last_log["bytes"]) / since_log
        step_ms = 1000 * since_log / (done - self.last_log["step"])
        self.last_log = {"seconds": seconds, "bytes": self.bytes_here, "step": done}
        self.metrics.write(
            step=done,
            bytes=self.trained_bytes,
            loss=loss,
            lr=learning_rate,
            gradient_norm=gradient_norm.item(),
            bytes_per_second=speed,
        )
        self.bar.set_postfix_str(f"{loss:.3f} nats, {speed / 1e3:.1f} kB/s", refresh=False)
        if self.bar.disable or done == self.config.steps:
            print(
                f"step {done:6d}/{self.config.steps} | loss {loss:.4f} nats | lr {learning_rate:.1e} | "
                f"{step_ms:.0f} ms | {speed / 1e3:.1f} kB/s"
            )

    def log_evaluation(self, done, result):
        """Print and record an evaluation."""
        self.bar.write(
            f"step {done:6d}/{self.config.steps} | val {result['val_bpb']:.4f} bpb "
            f"over {result['val_bytes']:,} bytes | accuracy {result['val_accuracy']:.1%}"
        )
        self.metrics.write(step=done, bytes=self.trained_bytes, **result)

    @contextmanager
    def paused(self):
        """Stop the clock of the training speed."""
        self.seconds += time.perf_counter() - self.running_since
        yield
        self.running_since = time.perf_counter()

    def speed(self):
        """{"bytes_per_second", "train_seconds"} of this process; call it after the last evaluation."""
        return {
            "bytes_per_second": self.bytes_here / self.seconds if self.seconds else 0.0,
            "train_seconds": self.seconds,
        }

    def close(self):
        self.bar.close()
        self.metrics.close()


class Metrics:
    """metrics.jsonl, one object a line, and TensorBoard scalars if asked. A resumed run drops lines after its start."""

    def __init__(self, out_dir, tensorboard=False, start=0):
        path = Path(out_dir) / "metrics.jsonl"
        # A run that died after its last checkpoint has logged steps that the resumed run does again.
        kept = [line for line in read_metrics(path) if line["step"] <= start] if start else []
        # Line buffering below: a killed run loses no finished line.
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(path, lambda temporary: Path(temporary).write_text(text))
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
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def close(self):
        self.file.close()
        if self.board:
            self.board.close()


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts; [] if there is no file."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# Checkpoints

# Settings that may differ between the run that stopped and the one that goes on.
FREE_TO_CHANGE = {
    "preset", "resume", "eval_every", "log_every", "tensorboard", "data_cache", "device", "compile", "val_bytes",
}  # fmt: skip


def save_checkpoint(path, model, optimizers, scaler, config, state):
    """Write everything that `load_checkpoint` needs to go on as if never stopped. state: step, best and bytes."""
    checkpoint = {
        **state,
        "settings": dataclasses.asdict(config),
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        # The loss scale of fp16 adapts during training.
        "scaler": scaler.state_dict(),
        # Dropout draws from these.
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))


def load_checkpoint(path, model, optimizers, scaler, config):
    """Restore a `save_checkpoint` file into model, optimizers, scaler and random state.

    Returns (step, best evaluation so far, bytes trained on).
    Raises FileNotFoundError, or ValueError if the settings of the stopped run differ from the
    config's.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} not found: nothing to resume; run without --resume")
    # weights_only: a checkpoint from elsewhere cannot run code.
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    then = checkpoint["settings"]
    # Half a run with one setting and half with another would be a run that no command repeats.
    differing = [
        f"{name}: {then.get(name)!r} then, {value!r} now"
        for name, value in dataclasses.asdict(config).items()
        if name not in FREE_TO_CHANGE and then.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"cannot resume {path} with other settings ({'; '.join(differing)}); use those, or run without --resume"
        )
    model.load_state_dict(checkpoint["model"])
    for optimizer, saved in zip(optimizers, checkpoint["optimizers"]):
        optimizer.load_state_dict(saved)
    scaler.load_state_dict(checkpoint["scaler"])
    torch.set_rng_state(checkpoint["random"])
    if checkpoint["random_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(checkpoint["random_cuda"])
    return checkpoint["step"], checkpoint["best"], checkpoint["bytes"]


def training_curves(path, out_dir, bytes_per_id=1.0):
    """Draw metrics.jsonl: loss of the logged batches and of validation, in bits per byte, against bytes seen.

    bytes_per_id: mean bytes that a target stands for; it turns a loss in nats per BPE token into
    bits per byte.
    """
    # matplotlib takes half a second to import, for which --help should not wait.
    from blt.pictures import draw_curves

    lines = read_metrics(Path(out_dir) / "metrics.jsonl")
    points = {
        "training batches": [
            (line["bytes"] / 1e6, line["loss"] / math.log(2) / bytes_per_id) for line in lines if "loss" in line
        ],
        "validation": [(line["bytes"] / 1e6, line["val_bpb"]) for line in lines if "val_bpb" in line],
    }
    curves = {name: tuple(np.array(axis) for axis in zip(*pairs)) for name, pairs in points.items()}
    draw_curves(path, curves, "training bytes seen (MB)", "bits per byte")
