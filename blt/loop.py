"""The training loop, its checkpoints and its metrics. Every model of the project is trained by `fit`."""

import gc
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn as nn

from blt.attention import slow_attention
from blt.checkpoints import (
    BAD_BATCH,
    check_resumable,
    has_checkpoint,
    keep_earlier_run,
    load_checkpoint,
    remove_leftovers,
    remove_old_run,
    save_checkpoint,
)
from blt.checks import check, check_packages, check_positive
from blt.corpus import DataConfig
from blt.device import allow_tf32, autocast, choose_precision, restore_matmul_precision, synchronize, what_triton_lacks
from blt.files import load_weights, state_hash, write_atomically, write_state
from blt.layers import SelfAttention, without_zeros
from blt.locks import claim_unless_claimed
from blt.loss_watch import Fault, LossWatch
from blt.metric import RowLosses, evaluate_together, target_losses
from blt.optimizers import backward, clip_gradients, learning_rate_scale, make_optimizers, step_optimizers
from blt.processes import (
    average_sparse_gradients,
    from_main,
    gather,
    gradient_exchange,
    is_main,
    main_first,
    n_processes,
    parallel,
    process_number,
    seed_step,
    sum_over_processes,
    wait_for_all,
)
from blt.progress import progress_bar
from blt.segments import without_triton
from blt.sharding import local, sharded

# A training text that is read more often than this gets these rates, unless others are given.
FEW_EPOCHS = 1.5
REREAD_DROPOUT = {"dropout": 0.1, "ngram_dropout": 0.3}


@dataclass
class RunConfig(DataConfig):
    """Settings of every training run."""

    # rows and steps
    row_bytes: int = 4096  # ids in a row: what a model sees at once in training and evaluation
    batch_rows: int = 8  # rows in one forward and backward pass; several processes share them
    accumulate: int = 1  # passes whose gradients are summed into one update
    shard: bool = False  # with torchrun: share out weights, gradients and optimizer states among the processes
    steps: int = 5000  # updates
    epochs: float | None = None  # read the training text this many times, instead of making a number of updates
    # optimization
    zero_init: bool = True  # a new model's output projections (wo, w2) and hash tables start at zero
    lr: float = 0.005  # peak learning rate of the matrices (Muon, scaled to the RMS of an AdamW update)
    adam_lr: float = 0.003  # peak learning rate of embeddings, hash tables, output head and norms (AdamW)
    table_lr: float = 2.0  # peak learning rate of the hash tables, as a multiple of adam_lr
    table_schedule: float = 0.5  # their rate is the peak times the schedule to this power: below 1 it falls later
    weight_decay: float = 0.1  # decoupled weight decay of the matrices
    spike: float = 2.0  # stop when the loss stays above this many times its lowest mean for 10 updates; 0: never
    table_decay: float = 0.0  # decoupled weight decay of the rows of hash tables that an update changes
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"  # constant then linear to zero, or half a cosine to zero
    warmup: float = 0.02  # share of the steps in which the learning rate rises
    cooldown: float = 0.7  # share of the steps in which a trapezoid falls
    clip: float = 1.0  # largest norm of an update's gradient
    compile: Literal["auto", "yes", "no"] = "auto"  # torch.compile; auto: on CUDA
    seed: int = 1337  # weights, order of the rows, dropout
    # output
    eval_every: int = 250  # updates between evaluations
    log_every: int = 10  # updates between log lines
    checkpoint_minutes: float = 10.0  # write last.pt at each evaluation, and whenever it is older than this
    resume: bool = False  # go on from the last checkpoint in the output folder
    overwrite: bool = False  # replace an earlier run in the output folder instead of keeping it beside
    tensorboard: bool = False  # also write TensorBoard scalars (pip install tensorboard)

    EITHER: ClassVar = (("steps", "epochs"),)
    # Several processes may run a script with these settings together.
    RUNS_TOGETHER: ClassVar = True

    def __post_init__(self):
        super().__post_init__()
        check_positive(
            self, "row_bytes", "batch_rows", "accumulate", "steps", "epochs", "lr", "adam_lr", "table_lr", "clip"
        )
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float):
                # Settings are saved as JSON, which has no infinity.
                check(self, f.name, math.isfinite(value), "a finite number")
        check_positive(self, "eval_every", "log_every", "checkpoint_minutes")
        for name in ("warmup", "cooldown"):
            check(self, name, 0 <= getattr(self, name) <= 1, "a share of the steps, from 0 to 1")
        check(self, "spike", self.spike == 0 or self.spike > 1, "0, or more than 1")
        for name in ("weight_decay", "table_decay", "table_schedule"):
            check(self, name, getattr(self, name) >= 0, "0 or more")
        check(self, "row_bytes", self.row_bytes >= 2, "2 or more")
        check(self, "schedule", self.schedule in ("trapezoid", "cosine"), "trapezoid or cosine")
        check(self, "compile", self.compile in ("auto", "yes", "no"), "auto, yes or no")

    def choose_steps(self, train_rows):
        """Set `steps` where the run is given as `epochs` of its `TrainingRows`: whole updates, so a little less.

        Rows that end early to fit their patch slots hold less text. So with one epoch every patching method reads the
        same text, and with as many updates it does not.
        """
        if self.epochs is not None:
            rows_of_update = self.batch_rows * self.accumulate
            self.steps = max(1, math.floor(self.epochs * len(train_rows) / rows_of_update))


@restore_matmul_precision()
def fit(model, config, train_rows, validation_batches, out_dir, depends_on=None, begin=None, result_files=()):
    """Train a model. Returns the best evaluation (that of best.pt), last_val_bpb, bytes_per_second and train_seconds.

    train_rows: `TrainingRows`.
    validation_batches: list of `RowBatch`, scored every eval_every updates and at the end.
    depends_on: {name: value} of what the run depends on beside its settings, such as the hash of
    the text; a resumed run must have the same. None: a hash of the first row.
    begin: called without arguments when the run is known to be allowed, before its first step; None:
    nothing is called.
    result_files: what the run will write beside out_dir; kept with an earlier run if it exists.
    Writes to out_dir: last.pt and previous.pt (everything to go on from), best.pt (weights of the
    best evaluation), metrics.jsonl. Stopped and resumed gives the weights of a run straight
    through: a batch depends on its number only. Ctrl-C and SIGTERM save the last finished step first.
    Several processes (`blt.processes`) share the rows of every update: the losses are those of one process, but for
    rounding, and a run may be resumed by another number of them.
    Raises ValueError when a loss, a gradient or a score is not finite (no such state is saved) or when the
    loss rises and stays up (see `LossWatch`); then bad_batch.json has the batch with which it began.
    """
    config.choose_steps(train_rows)
    check_processes(config)
    if n_processes() > 1:
        passes, rows = share_of_update(config)
        print(f"{n_processes()} processes: each makes passes of {rows} rows, {passes} an update")
    device = next(model.parameters()).device
    precision = choose_precision(config.precision, device)
    allow_tf32(device, precision)
    out_dir = Path(out_dir)
    check_resumable(out_dir, config)
    if config.tensorboard:
        check_packages("tensorboard")
    is_resumed = config.resume and has_checkpoint(out_dir)
    trained = sharded(model) if config.shard else model
    # Every parameter is in exactly one optimizer: matrices in Muon, hash tables in row-wise Adam, the
    # rest in AdamW.
    optimizers = make_optimizers(trained, config)
    # fp16 gradients underflow, so their loss is scaled; for other precisions the scaler does
    # nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if depends_on is None:
        depends_on = first_row_of(train_rows, config.seed)
    checkpointer = Checkpointer(out_dir, trained, optimizers, scaler, config, depends_on, validation_batches, precision)
    if is_resumed:
        checkpointer.load()
    elif config.resume:
        print(f"note: {out_dir} has no checkpoint yet; the run begins at its first step")
    start = checkpointer.state["step"]
    if start == config.steps and not checkpointer.lacks_evaluation():
        # The step is the last one and was scored.
        print(f"nothing was left to do: {out_dir / 'last.pt'} is at step {start} of {config.steps}")
        model.to(device)
        return checkpointer.result()
    trained.train()
    row_losses = compile_losses(trained, config, train_rows, device, precision)
    if n_processes() > 1 and not config.shard:
        # Not the other way round: torch would cut the compiled graph into pieces.
        row_losses = parallel(row_losses)
    watch = LossWatch(config.spike, checkpointer.state["lowest_loss"], scaler.is_enabled())

    with (
        begun_run(out_dir, config, is_resumed, result_files, begin),
        closing(Progress(out_dir, config, checkpointer.state)) as progress,
        StopSignals() as stop,
    ):
        if checkpointer.lacks_evaluation():
            checkpointer.evaluate(start, progress, stop)
        for step, batches in batches_of_steps(train_rows, config, start, device):
            learning_rate = set_learning_rates(optimizers, learning_rate_scale(step, config))
            # The loss is a mean over all scored targets of the update, so passes with more padding
            # weigh less, and accumulating gradients gives the same update as one large batch.
            targets, n_bytes = sum_over_processes(
                sum(batch.targets for batch in batches), sum(batch.bytes for batch in batches)
            )
            seed_step(config.seed, step)
            loss_nats = torch.zeros((), device=device)
            row_nats = []
            for number, batch in enumerate(batches):
                with gradient_exchange(row_losses, is_last=number == len(batches) - 1):
                    with autocast(device, precision):
                        # The forward pass.
                        nats_BT = row_losses(*batch.to(device).for_losses())
                        loss = nats_BT.sum() / targets
                    # DDP and FSDP average gradients over processes; the update needs their sum.
                    backward(trained, loss * n_processes(), scaler)
                loss_nats += loss.detach()
                row_nats.append(nats_BT.detach().mean(1))
            average_sparse_gradients(trained)
            gradient_norm = clip_gradients(trained, optimizers, scaler, config.clip)
            step_optimizers(optimizers, scaler, gradient_norm)

            # What follows is the record of the step: log lines, evaluations, checkpoints. With dense
            # tables and bf16 or fp32 the CPU waits for the device only here.
            done = step + 1
            evaluate_now = done % config.eval_every == 0 or done == config.steps
            is_stopping, is_due = sum_over_processes(stop.signal is not None, checkpointer.is_due())
            save_now = is_stopping or is_due
            progress.count(n_bytes)
            loss_nats, row_nats = losses_of_update(loss_nats, row_nats)
            watch.add(done, loss_nats, gradient_norm, row_nats)
            if done % config.log_every == 0 or evaluate_now or save_now or watch.is_full():
                checkpointer.check_losses(watch, train_rows)
            if done % config.log_every == 0 or evaluate_now:
                progress.log(done, loss_nats, gradient_norm, learning_rate)
            if evaluate_now:
                checkpointer.evaluate(done, progress, stop)
            elif save_now:
                with progress.paused():
                    checkpointer.save(done, progress)
            if is_stopping:
                stop.leave(out_dir / "last.pt", done)
        # best.pt is there for all.
        wait_for_all()
    result = checkpointer.result()
    if config.shard:
        # The sharded copy gives way to the model itself, which waited on the CPU.
        del checkpointer, trained, row_losses, optimizers
        # Its layers and PyTorch's hooks refer to each other.
        gc.collect()
        model.to(device)
    return result


def choose_dropout(config, stream):
    """Choose the dropout rates that a config leaves open, its dropout and ngram_dropout.

    They are 0 for a text that is read once or little more. One that is read again is learned by heart, by the hash
    tables first.
    """
    epochs = config.steps * config.accumulate * config.batch_rows * config.row_bytes / stream.total_bytes
    for name, rate in REREAD_DROPOUT.items():
        if getattr(config, name) is None:
            is_wanted = epochs > FEW_EPOCHS and (config.n_tables > 0 or name != "ngram_dropout")
            setattr(config, name, rate if is_wanted else 0.0)
            if is_wanted:
                print(f"the training text is read {epochs:.1f} times: {name} {rate}")


@contextmanager
def begun_run(out_dir, config, is_resumed, result_files, begin):
    """Hold the output folder of a run that is known to be allowed, and make it ready: the arguments are `fit`'s."""
    if not is_main():
        wait_for_all()
        yield
        return
    # Not before: a run that cannot begin changes no file.
    out_dir.mkdir(parents=True, exist_ok=True)
    with claim_unless_claimed(out_dir):
        remove_leftovers(out_dir)
        if not is_resumed:
            if not config.overwrite:
                keep_earlier_run(out_dir, *result_files)
            remove_old_run(out_dir)
        if begin is not None:
            begin()
        wait_for_all()
        yield


class Checkpointer:
    """A run's state, checkpoints and best weights, and its evaluations. Nothing that is not finite is saved.

    `state` holds step, best (the best evaluation), best_sha256 (of its weights), last (the last
    evaluation), evaluated (its step), bytes and seconds of training, lowest_loss (see `LossWatch`),
    precision, depends_on, and validation_sha256, the text of the evaluations.
    """

    def __init__(self, out_dir, model, optimizers, scaler, config, depends_on, validation_batches, precision):
        self.out_dir = out_dir
        self.model = model
        self.optimizers = optimizers
        self.scaler = scaler
        self.config = config
        self.depends_on = depends_on
        self.validation_batches = validation_batches
        self.precision = precision
        self.saved_at = time.perf_counter()
        self.saved_steps = (0, 0)  # of last.pt and of previous.pt, if this run wrote or read them
        self.state = dict(
            step=0,
            best=None,
            best_sha256=None,
            last=None,
            evaluated=0,
            bytes=0,
            seconds=0.0,
            lowest_loss=None,
            precision=precision,
            depends_on=depends_on,
            validation_sha256=hash_of_batches(validation_batches),
        )

    def load(self):
        """Restore the last checkpoint, and make sure that its best score is that of best.pt on this validation text."""
        text = self.state["validation_sha256"]
        last_pt = self.out_dir / "last.pt"
        arguments = (self.model, self.optimizers, self.scaler, self.config, self.depends_on)
        # It renames a damaged file.
        with main_first():
            self.state = load_checkpoint(last_pt, *arguments)
        self.saved_steps = (self.state["step"], 0)
        # "auto" may be another precision on another machine.
        if self.state["precision"] not in (None, self.precision):
            print(
                f"note: precision was {self.state['precision']} and is {self.precision} here; "
                f"the steps from {self.state['step'] + 1} on follow it"
            )
        self.state["precision"] = self.precision
        is_other_text = self.state["validation_sha256"] != text
        self.state["validation_sha256"] = text
        if self.state["best"] is None:
            return
        best_pt = self.out_dir / "best.pt"
        reason = "the validation text is another one" if is_other_text else None
        # The weights to go on from are in the model; they give way to the best ones for a moment.
        trained = [local(p).detach().clone() for p in self.model.parameters()]
        try:
            sha256 = state_hash(load_weights(best_pt, self.model))
            if reason is None and sha256 != self.state["best_sha256"]:
                # The run was killed between best.pt and last.pt.
                reason = f"{best_pt} is newer or older than the checkpoint"
            if reason is not None:
                print(f"note: {reason}; what {best_pt} scores is measured again")
                self.state["best"] = self._score()
                self.state["best_sha256"] = sha256
        except ValueError:
            print(f"note: {best_pt} is missing or damaged; the best weights are chosen among those from here on")
            self.state["best"] = None
        with torch.no_grad():
            for p, value in zip(self.model.parameters(), trained):
                local(p).copy_(value)
        if is_other_text:
            self.state["evaluated"] = min(self.state["evaluated"], self.state["step"] - 1)

    def _score(self, before_batch=None):
        device = next(self.model.parameters()).device
        return evaluate_together(self.model, self.validation_batches, device, self.precision, before_batch)

    def lacks_evaluation(self):
        """Whether the checkpoint is of a step whose evaluation was cut off, or has no best weights at the end."""
        step = self.state["step"]
        is_evaluation_step = step > 0 and (step % self.config.eval_every == 0 or step == self.config.steps)
        is_missing = self.state["evaluated"] < step or self.state["best"] is None
        return is_evaluation_step and is_missing

    def is_due(self):
        """Whether the last checkpoint is older than checkpoint_minutes."""
        return time.perf_counter() - self.saved_at > 60 * self.config.checkpoint_minutes

    def check_losses(self, watch, train_rows):
        """Raise ValueError if a loss or a gradient since the last check is wrong, with a report of its batch."""
        try:
            watch.check()
        except Fault as fault:
            path = self.out_dir / BAD_BATCH
            if is_main():
                batches = batches_of_step(train_rows, self.config, fault.step - 1, of_all_processes=True)
                watch.report(path, fault, batches, train_rows.stream.vocabulary)
            self._stop(f"{fault} (its batch is in {path})", fault.step)
        self.state["lowest_loss"] = watch.lowest

    def _refuse(self, what, value, done):
        self._stop(f"{what} is {value} at step {done}, and nothing of it was saved", done)

    def _stop(self, reason, step):
        """Raise ValueError for what began at a step, and say how to go on from a state before it.

        A last.pt that was saved after that step is moved aside, so that a resumed run takes previous.pt.
        """
        last_pt = self.out_dir / "last.pt"
        previous_pt = self.out_dir / "previous.pt"
        saved, saved_before = self.saved_steps
        if saved >= step and 0 < saved_before < step and from_main(previous_pt.exists):
            # Saved in a spike, before it was known to be one: a resumed run takes the one before it.
            if is_main():
                os.replace(last_pt, self.out_dir / "last.pt.damaged")
            last_pt, saved = previous_pt, saved_before
        ways = "lower --lr and --adam_lr, or --clip, or use --precision fp32"
        if 0 < saved < step and last_pt.exists():
            ways += f"; the last good state is that of step {saved} in {last_pt}: add --resume"
        raise ValueError(f"{reason}; {ways}")

    def evaluate(self, done, progress, stop):
        """Score the validation text; save the weights if they are the best so far, and a checkpoint."""
        with progress.paused():
            try:
                with stop.at_once():
                    result = self._score(stop.check)
            except Interrupted:
                # The step is finished and its evaluation is not: a resumed run does it first.
                self.save(done, progress)
                stop.leave(self.out_dir / "last.pt", done)
            for name in ("val_bpb", "val_loss"):
                if not math.isfinite(result[name]):
                    self._refuse(f"the validation score {name}", result[name], done)
            progress.log_evaluation(done, result)
            if not from_main((self.out_dir / "last.pt").exists):
                # best.pt never exists without a checkpoint, so that a killed run can always be resumed.
                self.save(done, progress)
            best = self.state["best"]
            if best is None or result["val_bpb"] < best["val_bpb"]:
                self._check_weights(done)
                # All processes make it, and the main one needs it.
                weights = self.model.state_dict()
                if is_main():
                    write_state(self.out_dir / "best.pt", weights)
                self.state.update(best=result, best_sha256=state_hash(weights) if is_main() else None)
            self.state.update(last=result, evaluated=done)
            # After the evaluation, so that a resumed run knows the best one.
            self.save(done, progress)

    def save(self, done, progress):
        """Write a checkpoint of a finished step."""
        self._check_weights(done)
        # Set only after the file is written, so that messages name a state that exists.
        state = self.state | {"step": done, "bytes": progress.trained_bytes, "seconds": progress.seconds_so_far()}
        save_checkpoint(self.out_dir / "last.pt", self.model, self.optimizers, self.scaler, self.config, state)
        self.state = state
        self.saved_steps = (done, self.saved_steps[0])
        self.saved_at = time.perf_counter()

    def _check_weights(self, done):
        """Raise ValueError for weights that are infinite or not a number."""
        # The loss is of the weights before the update, so a finite loss says nothing about these.
        finite = [torch.isfinite(local(p)).all() for p in self.model.parameters()]
        (is_bad,) = sum_over_processes(not torch.stack(finite).all().item())
        if is_bad:
            self._refuse("a weight", "infinite or not a number", done)

    def result(self):
        """What `fit` returns."""
        seconds = self.state["seconds"]
        return {
            **self.state["best"],
            "last_val_bpb": self.state["last"]["val_bpb"],
            "bytes_per_second": self.state["bytes"] / seconds if seconds else 0.0,
            "train_seconds": seconds,
        }


def first_row_of(train_rows, seed):
    """What a run depends on, where no hash of its text is known: a hash of the first row that it reads."""
    return {"first_row_sha256": hash_of_batches([train_rows.shuffled_batch(0, 1, seed)])}


def hash_of_batches(batches):
    """sha256 (hex) over the ids of batches and which of them are scored."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(str(list(batch.ids.shape)).encode())
        for tensor in (batch.ids, batch.is_scored):
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


class Interrupted(Exception):
    """Ctrl-C or SIGTERM in a place where the work can be thrown away."""


# Seconds within which a second signal counts as the first one's echo, with several processes: whoever
# signals all processes of a job also signals torchrun, which signals its processes.
ECHO_SECONDS = 5.0


class StopSignals:
    """Ctrl-C and SIGTERM, held back until a step is done. A second one stops at once.

    With several processes a second one counts after ECHO_SECONDS only.

    signal: the number of the one that came; None: none did.
    """

    def __init__(self):
        self.signal = None
        self.received_at = None
        self.is_at_once = False
        self.handlers = {}

    def __enter__(self):
        # Python allows this in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.signal is not None:
            if n_processes() > 1 and time.monotonic() - self.received_at < ECHO_SECONDS:
                return
            raise KeyboardInterrupt
        self.signal = number
        self.received_at = time.monotonic()
        # An evaluation may take longer than the seconds between SIGTERM and SIGKILL. Several processes
        # stop it together, in `check`.
        if self.is_at_once and n_processes() == 1:
            raise Interrupted
        if is_main():
            when = "again" if n_processes() == 1 else f"again after {ECHO_SECONDS:.0f} s"
            print(f"\nstopping after this step; {when}: at once", file=sys.stderr)

    @contextmanager
    def at_once(self):
        """Raise Interrupted inside this block when a signal comes; with several processes, in `check`."""
        self.is_at_once = True
        try:
            if self.signal is not None and n_processes() == 1:
                raise Interrupted
            yield
        finally:
            self.is_at_once = False

    def check(self):
        """Raise Interrupted in all processes if any has got a signal. All must call it."""
        (is_stopping,) = sum_over_processes(self.signal is not None)
        if is_stopping:
            raise Interrupted

    def leave(self, path, done):
        """End the process as the signal asks, and say how to go on."""
        # The main process may still be writing; torchrun ends all soon after the first has left.
        wait_for_all()
        if is_main():
            print(
                f"\nstopped after step {done}, saved in {path}; go on with the same command and --resume",
                file=sys.stderr,
            )
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        # Another process may have got the signal.
        sys.exit(128 + (signal.SIGTERM if self.signal is None else self.signal))


def batches_of_steps(train_rows, config, start, device):
    """Yield (step, its batches: one a pass); the next step's rows are made in a thread while the device computes."""

    def make(step):
        batches = batches_of_step(train_rows, config, step)
        # Copies from pinned memory run beside the computation.
        return [batch.pin() for batch in batches] if device.type == "cuda" else batches

    with ThreadPoolExecutor(1) as loader:
        pending = loader.submit(make, start)
        for step in range(start, config.steps):
            batches = pending.result()
            if step + 1 < config.steps:
                pending = loader.submit(make, step + 1)
            yield step, batches


def check_processes(config):
    """Raise ValueError if a run cannot be that of as many processes as there are."""
    share_of_update(config)
    if config.shard and n_processes() == 1:
        raise ValueError("shard shares a model out among processes: start the script with torchrun, or leave it out")


def share_of_update(config):
    """(passes, rows in each) of one process in an update: its share of the accumulate x batch_rows rows.

    An update has as many rows whatever the number of processes, so its numbers are the same. Alone, a process has
    accumulate passes of batch_rows rows. Example: 2 passes of 8 rows are 1 pass of 8 for each of two processes, and
    1 pass of 4 for each of four.
    Raises ValueError if the rows cannot be shared equally.
    """
    all_rows = config.accumulate * config.batch_rows
    rows, left = divmod(all_rows, n_processes())
    if left:
        raise ValueError(
            f"{n_processes()} processes cannot share the {all_rows} rows of an update equally; "
            "let --accumulate times --batch_rows be a multiple of their number"
        )
    passes = math.ceil(rows / config.batch_rows)
    # Passes of equal size, none larger than batch_rows.
    while rows % passes:
        passes += 1
    return passes, rows // passes


def batches_of_step(train_rows, config, step, of_all_processes=False):
    """The batches of this process's passes in an update, or of all processes'. step: its number, counted from 0."""
    passes, rows = share_of_update(config)
    # A batch is a pure function of its number and the seed: a resumed run reads the same rows.
    first = (step * n_processes() + process_number()) * passes
    if of_all_processes:
        first = step * n_processes() * passes
        passes *= n_processes()
    return [train_rows.shuffled_batch(number, rows, config.seed) for number in range(first, first + passes)]


def losses_of_update(loss_nats, row_nats):
    """Loss of an update, and mean nats of its rows [rows], of all processes; row_nats: a process's own, a pass each."""
    of_all = gather(torch.cat([loss_nats[None], *row_nats]))
    return of_all[:, 0].sum(), of_all[:, 1:].flatten()


def set_learning_rates(optimizers, scale):
    """Set every group's learning rate to this share of its peak, or to the share's power that the group names.

    Returns the first group's rate, for the log.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # Kept in the group, so that a resumed run knows the peak and not only the present rate.
            peak = group.setdefault("initial_lr", group["lr"])
            group["lr"] = peak * scale ** group.get("schedule_power", 1.0)
    return optimizers[0].param_groups[0]["lr"]


def compile_losses(model, config, train_rows, device, precision):
    """The model's `RowLosses`, under torch.compile where the config wants it.

    The forward and backward pass are compiled here, before the clock of the training speed
    starts.
    Raises ValueError if torch.compile does not work here, or if compiled and eager losses disagree:
    the leak gate has tested the eager model only.
    """
    is_compiled = config.compile == "yes" or (config.compile == "auto" and device.type == "cuda")
    leaves_layers_out = config.shard and getattr(config, "recompute", False)
    if is_compiled and leaves_layers_out:
        print("note: with both --shard and --recompute torch.compile leaves the layers out, which is slower")
    print_slow_attention(model, device, precision, is_compiled and not leaves_layers_out)
    if device.type == "cuda" and train_rows.patch_slots is not None and what_triton_lacks() is not None:
        print(
            f"cross-attention: its kernels need {what_triton_lacks()}; without them it is slower, "
            "and runs do not repeat to the last bit"
        )
    row_losses = RowLosses(model)
    if not is_compiled:
        return row_losses
    # A process may train several models. What torch has compiled for another one counts towards its
    # limit of compilations.
    torch.compiler.reset()
    # All batches of a run have one shape. Without dynamic=False, a second model of the process whose
    # rows have another number of patches is compiled for any number, and FlexAttention does not lower.
    compiled = torch.compile(row_losses, dynamic=False)
    _, rows = share_of_update(config)
    batch = train_rows.shuffled_batch(process_number(), rows, config.seed).to(device)
    has_dropout = any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
    begin = time.perf_counter()
    # As in the leak gate: layers that are still the identity would agree whatever they compute.
    with without_zeros(model):
        # A run that is resumed compiles again: its dropout must go on as if it had not.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            compiled_nats = compiled_pass(compiled, batch, device, precision)
        model.zero_grad(set_to_none=True)
        synchronize(device)
        print(f"compiled in {time.perf_counter() - begin:.0f} s")
        if has_dropout:
            print("compiled and eager losses are not compared: two passes with dropout differ")
            return compiled
        # Without the Triton kernels. The compiled pass and the leak gate both use them, so a wrong one
        # would agree with itself.
        with torch.no_grad(), autocast(device, precision), without_triton():
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
            nats_BT = compiled(*batch.for_losses())
        # Only so that the backward pass is compiled as well; its gradients are thrown away.
        nats_BT.sum().backward()
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"torch.compile does not work here ({reason}); run with --compile no") from error
    return nats_BT.detach()


def print_slow_attention(model, device, precision, is_compiled):
    """Print why attention has no fast kernel here, if so: once for each reason."""
    layers = [module for module in model.modules() if isinstance(module, SelfAttention)]
    reasons = {slow_attention(device, precision, layer.head_dim, is_compiled): None for layer in layers}
    for reason in reasons:
        if reason is not None:
            print(f"attention: {reason}")


class Progress:
    """Log lines, progress bar, metrics and time of a run. The time of evaluations is not training time.

    state: `Checkpointer.state` of the run's first step, or of the checkpoint.
    """

    def __init__(self, out_dir, config, state):
        start = state["step"]
        self.config = config
        self.metrics = Metrics(out_dir, config.tensorboard, start, state["evaluated"])
        # Both count from the first step of the run, before it was stopped and resumed too.
        self.trained_bytes = state["bytes"]
        self.seconds = state["seconds"]
        self.running_since = time.perf_counter()  # None in a pause
        self.last_log = {"seconds": self.seconds, "bytes": self.trained_bytes, "step": start}
        self.bar = progress_bar(config.steps, initial=start, unit="step", unit_scale=False, dynamic_ncols=True)

    def count(self, n_bytes):
        """Count the bytes of an update."""
        self.trained_bytes += n_bytes
        self.bar.update(1)

    def seconds_so_far(self):
        """Seconds of training."""
        if self.running_since is None:
            return self.seconds
        return self.seconds + time.perf_counter() - self.running_since

    def log(self, done, loss_nats, gradient_norm, learning_rate):
        """Print and record a training step."""
        # .item() waits for the device, so the clock that is read next is right.
        loss = loss_nats.item()
        norm = gradient_norm.item()
        seconds = self.seconds_so_far()
        since_log = seconds - self.last_log["seconds"]
        speed = (self.trained_bytes - self.last_log["bytes"]) / since_log
        step_ms = 1000 * since_log / (done - self.last_log["step"])
        self.last_log = {"seconds": seconds, "bytes": self.trained_bytes, "step": done}
        self.metrics.write(
            step=done,
            bytes=self.trained_bytes,
            loss=loss,
            lr=learning_rate,
            # JSON has no infinity, which fp16 gradients reach now and then.
            gradient_norm=norm if math.isfinite(norm) else None,
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
        """Stop the clock of the training time."""
        self.seconds = self.seconds_so_far()
        self.running_since = None
        yield
        self.running_since = time.perf_counter()

    def close(self):
        self.bar.close()
        self.metrics.close()


class Metrics:
    """metrics.jsonl, one object a line, and TensorBoard scalars if asked; of the main process only.

    A resumed run drops lines after its start.
    """

    def __init__(self, out_dir, tensorboard=False, start=0, evaluated=0):
        self.file = None
        self.board = None
        if not is_main():
            return
        path = Path(out_dir) / "metrics.jsonl"
        # A run that died after its last checkpoint has logged steps that the resumed run does again.
        # The evaluation of its last step may be missing in the checkpoint, and is then done again too.
        kept = [line for line in read_metrics(path) if line["step"] <= (evaluated if "val_bpb" in line else start)]
        # Line buffering below: a killed run loses no finished line.
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept)
        write_atomically(path, lambda temporary: Path(temporary).write_text(text))
        self.file = open(path, "a", buffering=1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out_dir)

    def write(self, step, **values):
        if self.file is None:
            return
        self.file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        if self.board:
            for name, value in values.items():
                if value is not None:
                    self.board.add_scalar(name, value, step)

    def close(self):
        if self.file is not None:
            self.file.close()
        if self.board:
            self.board.close()


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts; [] if there is no file. Lines that a crash has damaged are left out."""
    path = Path(path)
    lines = []
    if path.exists():
        for text in path.read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
            # Brackets in brackets, thousands deep, are a RecursionError.
            except (ValueError, RecursionError):
                # last.pt is what a run goes on from; a line less here costs a point of a curve.
                continue
            if isinstance(line, dict) and "step" in line:
                lines.append(line)
    return lines


def training_curves(path, out_dir, bytes_per_id=1.0):
    """Draw metrics.jsonl: loss of the logged batches and of validation, in bits per byte, against bytes seen.

    bytes_per_id: mean bytes that a target stands for; it turns a loss in nats per BPE token into
    bits per byte.
    """
    # matplotlib takes half a second to import, for which --help should not wait.
    from blt.pictures import draw_curves

    lines = read_metrics(Path(out_dir) / "metrics.jsonl")
    scores = [line for line in lines if "val_bpb" in line]
    # A resumed run may be scored on other text than before; one curve shows one text.
    scores = [line for line in scores if line["val_bytes"] == scores[-1]["val_bytes"]]
    points = {
        "training batches": [
            (line["bytes"] / 1e6, line["loss"] / math.log(2) / bytes_per_id) for line in lines if "loss" in line
        ],
        "validation": [(line["bytes"] / 1e6, line["val_bpb"]) for line in scores],
    }
    curves = {name: tuple(np.array(axis) for axis in zip(*pairs)) for name, pairs in points.items()}
    draw_curves(path, curves, "training bytes seen (MB)", "bits per byte")
