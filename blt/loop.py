"""The training loop, its checkpoints and its metrics."""

import dataclasses
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from blt.checks import check, check_positive
from blt.corpus import DataConfig
from blt.device import autocast, choose_precision
from blt.files import save_weights, write_atomically
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
        check_positive(
            self, "row_bytes", "batch_rows", "accumulate", "steps", "lr", "adam_lr", "clip", "eval_every", "log_every"
        )
        for name in ("warmup", "cooldown"):
            check(self, name, 0 <= getattr(self, name) <= 1, "a share of the steps, from 0 to 1")
        check(self, "weight_decay", self.weight_decay >= 0, "0 or more")
        check(self, "row_bytes", self.row_bytes >= 2, "2 or more")
        check(self, "schedule", self.schedule in ("trapezoid", "cosine"), "trapezoid or cosine")
        check(self, "compile", self.compile in ("auto", "yes", "no"), "auto, yes or no")


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
                nats, _ = target_losses(step_model, batch)
                if step == start and step_model is not model:
                    check_compiled(model, batch, nats)
                loss = nats.sum() / targets
            backward(model, loss, scaler)
            loss_nats += loss.detach()
        gradient_norm = clip_gradients(model, optimizers, scaler, config.clip)
        step_optimizers(optimizers, scaler)

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
    difference = (target_losses(model, batch)[0] - compiled_nats).abs()
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
        write_atomically(
            path, lambda temporary: Path(temporary).write_text("".join(json.dumps(line) + "\n" for line in kept))
        )
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
    write_atomically(path, lambda temporary: torch.save(whole, temporary))


# Settings that may differ between the run that stopped and the one that goes on.
FREE_TO_CHANGE = {
    "preset",
    "resume",
    "eval_every",
    "log_every",
    "tensorboard",
    "data_cache",
    "device",
    "compile",
    "val_bytes",
}


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
        raise ValueError(
            f"cannot resume {path} with other settings ({'; '.join(differing)}); use those, or run without --resume"
        )
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
    from blt.pictures import draw_curves

    lines = read_metrics(Path(out_dir) / "metrics.jsonl")
    train = [(line["bytes"] / 1e6, line["loss"] / math.log(2) / bytes_per_id) for line in lines if "loss" in line]
    val = [(line["bytes"] / 1e6, line["val_bpb"]) for line in lines if "val_bpb" in line]
    curves = {"training batches": zip(*train), "validation": zip(*val)}
    curves = {name: tuple(np.array(axis) for axis in pairs) for name, pairs in curves.items()}
    draw_curves(path, curves, "training bytes seen (MB)", "bits per byte")
