"""Measure what training, the entropy pass and patching cost on this machine, in one table and as JSON.

Reads   the bundled sample (real text; weights are random)
Writes  bench.json; with --scaling also bench_scaling.png
Run     python bench.py [--models NAME ...] [--against transformers flat loop] [--scaling]
        [--generation] [--field value ...]

    python bench.py                                     llm.py and llm_large.py; without a GPU llm.py's
                                                        preset cpu, 1 minute on 2 cores
    python bench.py --models llm:small llm_large:h200 --patches static:4.5
    python bench.py --models custom --global_layers 4 --hash_rows 500002 --row_bytes 16384
    python bench.py --against transformers flat loop    ratios, step by step in turn
    python bench.py --profile                           also the kernels that a step's time goes to
    python bench.py --scaling                           against row length, patch size and width
    python bench.py --generation --models checkpoints/model.json --against transformers

A model is llm or llm_large, with presets after colons, as in llm:small:cpu; or custom, which has the
sizes of BLTConfig; or the model.json of a training run. Flags of the model (--encoder_dim, --window,
--row_bytes, ...) change every model named.

--against names other candidates for the same work:
    transformers  the same model as BltForCausalLM, in its fastest setting, with fused AdamW
    flat          a byte transformer without patches that has as many FLOPs per byte
    loop          the same model with Python loops over rows and patches (blt/plain_blt.py)
--precision auto takes ours as in training; transformers and loop then take their fastest precision.

--generation measures greedy generation with each model and nothing else. The weights of a model.json
are read; other models are random.

How it is measured
- A step is that of `blt.loop.fit`: rows to the device, `autocast`, `RowLosses`, backward,
  clipping, the optimizers of `make_optimizers`; on CUDA under torch.compile. The clock is read after
  the device is done: after each part of a step for the times of the parts, on CUDA after several
  steps for the time of a whole one, because training does not wait between them. Warm-up steps do
  not count. Numbers are medians with quartiles.
- Every model has a process of its own, so peak memory is its own: on CUDA the most that was
  allocated; on a CPU the largest resident set during the steps, less what was resident before the
  model was made.
- For a ratio, the parent asks one process after the other for a step on the same rows, in changing
  order; those that wait sleep at a pipe. A ratio is the median of the ratios of each round, so that
  what slows the machine for a while slows both.
- MFU is the FLOPs that the mathematics needs (blt/flops.py; 3 forward passes a step, no padding)
  divided by the device's peak in the same precision.
"""

import itertools
import math
import multiprocessing
import re
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from blt.checks import check, check_output, check_packages, check_positive, check_written_by
from blt.config import field_comments, part_of, print_header, print_table, run_script
from blt.corpus import open_corpus
from blt.device import autocast, choose_device, choose_precision, set_seed, synchronize, threads_for
from blt.entropies import default_reading, stream_entropies
from blt.files import git_commit, write_atomically, write_json
from blt.flops import TRAINING, blt_flops, flat_shape_of_equal_flops, peak_flops, transformer_flops
from blt.ids import BOUNDARY
from blt.incremental import IncrementalBLT
from blt.loop import RunConfig
from blt.metric import RowLosses, target_losses
from blt.optimizers import backward, clip_gradients, make_optimizers, step_optimizers
from blt.patch_rules import RULES, PatchConfig, causal_methods, patch_starts, threshold_for_patch_size
from blt.plain_blt import plain_logits
from blt.records import RunRecord
from blt.rows import BitArray, DocumentStream, TrainingRows
from blt.sampling import SamplingConfig
from blt_model import BLTConfig, BLTModel
from entropy_llm import SIZES as ENTROPY_SIZES
from entropy_llm import EntropyConfig, MinimalLLM
from entropy_patcher import EntropyPatcher
from generate import Generator
from llm import LLMConfig
from llm_large import LLMLargeConfig
from save_entropy_model import load_blt
from template_llm import FlatByteTransformer, FlatConfig

SCRIPTS = {"llm": LLMConfig, "llm_large": LLMLargeConfig}
# What is timed, in the order of a step. Times are from the start of the step.
PHASES = {"forward_ms": "forward", "forward_backward_ms": "forward + backward", "step_ms": "whole step"}
TEXT_BYTES = 2_000_000  # of the sample's training text, for rows and patching
BATCHES = 8  # different batches, used in turn
STEPS_AT_ONCE = 4  # timed together on CUDA
PROFILE_LINES = 25  # of --profile that are printed
PROFILE_COLUMNS = 90  # of a kernel's name
LOGITS_TOLERANCE = 1e-3  # ours against transformers', fp32
HF_NEW_BYTES = 10  # that transformers generates in a round
# transformers' eager attention keeps several row-by-row matrices a layer. With more bytes of scores
# than this in one layer it only runs out of memory, so it is not tried.
EAGER_SCORES = 1 << 29
# The sizes of entropy_llm.py that are timed: what it trains on a GPU, and on a CPU.
ENTROPY_MODELS = ("medium", "nano")
# The smallest model that uses every part: a process runs it once before it measures memory.
TINY = BLTConfig(
    encoder_dim=32, global_dim=32, global_layers=1, decoder_dim=32, decoder_layers=1, hash_rows=16, window=16
)


def optional_fields(config_class, names):
    """Fields of a config class with None as their default, for `make_dataclass`."""
    comments = field_comments(config_class)
    made = []
    for original in fields(config_class):
        if original.name not in names:
            continue
        # "; None: ..." explains the default of the other class, which is not the default here.
        meaning = comments[original.name].split("; None:")[0]
        metadata = {"help": f"{meaning}; None: as the model has it"}
        made.append((original.name, original.type | None, field(default=None, metadata=metadata)))
    return made


# Changes to every model named. Each setting of a BLT is a flag here without being listed again.
ModelFlags = make_dataclass(
    "ModelFlags",
    [
        *optional_fields(BLTConfig, [of_model.name for of_model in fields(BLTConfig)]),
        *optional_fields(RunConfig, ["row_bytes", "batch_rows"]),
    ],
)


@dataclass
class BenchConfig(ModelFlags):
    # what
    models: list[str] = field(default_factory=list)  # llm:PRESET, llm_large:PRESET, custom, or a model.json
    against: list[str] = field(default_factory=list)  # other candidates: transformers, flat, loop
    profile: bool = False  # also print where a step's time goes: kernels on CUDA, operations on a CPU
    scaling: bool = False  # sweep row length, patch size and width of the first model
    generation: bool = False  # measure greedy generation with each model, and nothing else
    entropy_pass: bool = True  # time the entropy models of entropy_llm.py (sizes medium and nano)
    repatching: bool = True  # time the patching methods on cached entropies
    # rows
    patches: str = "space"  # space, static:BYTES, or random (geometric lengths of mean --patch_size)
    patch_size: float = 4.5  # bytes, mean of random patches; also what the patching methods are set to
    accumulate: int = 1  # forward and backward passes in one update
    data_cache: str = "data_cache"  # folder of the byte stores
    # machine and measurement
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: others than ours take their fastest
    compile: Literal["auto", "yes", "no"] = "auto"  # torch.compile; auto: on CUDA
    repeats: int = 7  # timed steps, or rounds
    warmup: int = 2  # steps before them; the first of them compiles
    streams: int | None = None  # streams side by side in the entropy pass; None: 4 on a CPU, 64 to 512 on a GPU
    seed: int = 1337  # weights, rows, random patches
    # generation
    prompt_bytes: int = 1000  # of held-out text
    new_bytes: int = 100  # bytes in a timed continuation
    draft_bytes: int = 8  # most bytes that the entropy model proposes, where drafts are measured
    reading: bool = True  # also measure reading a byte early and late in a text of 5,000 bytes
    # scaling
    scaling_rows: list[int] = field(default_factory=lambda: [2**n for n in range(10, 16)])  # row lengths, bytes
    scaling_bytes: int = 32768  # bytes a step while the row length changes
    scaling_patches: list[int] = field(default_factory=lambda: [2, 3, 4, 6, 8, 12, 16])  # static patches, bytes
    scaling_widths: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])  # factors of all widths
    # output
    output: str = "bench.json"  # where the numbers go

    def __post_init__(self):
        check_positive(self, "row_bytes", "batch_rows", "accumulate", "repeats", "warmup", "streams")
        check_positive(self, "scaling_bytes", "prompt_bytes", "new_bytes", "draft_bytes")
        others = [kind for kind in CANDIDATES if kind != "ours"]
        check(self, "against", set(self.against) <= set(others), "among " + ", ".join(others))
        is_known = re.fullmatch(r"space|random|static:\d+(\.\d+)?", self.patches)
        check(self, "patches", is_known, "space, random or static:BYTES, as in static:4.5")
        check(self, "patch_size", self.patch_size >= 1, "1 or more bytes")
        check(self, "output", self.output.endswith(".json"), "a file name in .json")
        for name in ("scaling_rows", "scaling_patches", "scaling_widths"):
            values = getattr(self, name)
            check(self, name, values and min(values) > 0, "numbers above 0")
        fits = max(self.scaling_rows) <= self.scaling_bytes
        check(self, "scaling_rows", fits, f"at most scaling_bytes = {self.scaling_bytes}")


@dataclass
class Job:
    """What one process makes and runs steps of. Its rows depend on its fields alone.

    kind: one of `CANDIDATES`.
    precision: auto only where the fastest is to be found.
    one_document: the text without boundaries, because transformers has no document mask.
    flat_shape: (dim, n_layers) of the flat byte transformer.
    """

    kind: str
    name: str
    model: BLTConfig
    row_bytes: int
    batch_rows: int
    patches: str
    config: BenchConfig
    device: str
    precision: str
    threads: int
    one_document: bool = False
    flat_shape: tuple | None = None


# --------------------------------------------------------------------------------------------------
# Models and rows


def find_model(name, config):
    """(BLTConfig, row_bytes, batch_rows) of a name in --models, with the command line's changes.

    Raises FileNotFoundError or ValueError for a name that is no model.
    """
    script, *presets = name.split(":")
    if name.endswith(".json"):
        settings = read_settings(name)
    elif name == "custom":
        settings = asdict(BLTConfig())
        settings |= {"row_bytes": RunConfig.row_bytes, "batch_rows": RunConfig.batch_rows}
    elif script in SCRIPTS:
        if script == "llm_large" and not presets:
            # Its size is measured on a CPU too, where the script itself would train a smaller one.
            presets = ["large"]
        try:
            of_script = SCRIPTS[script](preset=presets, device=config.device)
        except ValueError as error:
            raise ValueError(f"models has {name!r}: {error}") from None
        settings = asdict(part_of(of_script, BLTConfig))
        settings |= {"row_bytes": of_script.row_bytes, "batch_rows": of_script.batch_rows}
    else:
        raise ValueError(
            f"models has {name!r}; it must be {', '.join(SCRIPTS)}, one of them with presets "
            "(llm:small:cpu), custom, or a model.json"
        )
    # Flags beat presets and files.
    for flag in fields(ModelFlags):
        value = getattr(config, flag.name)
        if value is not None:
            settings[flag.name] = value
    model = BLTConfig(**{of_model.name: settings[of_model.name] for of_model in fields(BLTConfig)})
    return model, settings["row_bytes"], settings["batch_rows"]


def read_settings(path):
    """The settings in the model.json of a BLT's training run; those of the model beat those of the run."""
    if not Path(path).exists():
        raise FileNotFoundError(
            f"{path} not found; --models takes {', '.join(SCRIPTS)}, one of them with presets "
            "(llm:small:cpu), custom, or the model.json of a training run"
        )
    record = RunRecord.load(path)
    if record.kind != "blt":
        raise ValueError(
            f"{path} is of a model of kind {record.kind!r}; bench.py measures BLTs, and others by --against"
        )
    return record.settings | asdict(record.config(BLTConfig))


def sample_documents(data_cache):
    """The first TEXT_BYTES of the bundled sample's training documents: list of uint8 arrays."""
    corpus = open_corpus("sample", cache_dir=data_cache)
    return [corpus.document(number) for number in corpus.documents("train", TEXT_BYTES)]


def random_starts(documents, config):
    """Patch starts of each document, bool [N + 1], with geometric patch lengths."""
    generator = np.random.default_rng(config.seed)
    is_start = [generator.random(len(document) + 1) < 1 / config.patch_size for document in documents]
    for starts in is_start:
        starts[0] = True
    return is_start


def make_rows(job):
    """`TrainingRows` of the sample, patched as the job says."""
    documents = sample_documents(job.config.data_cache)
    if job.one_document:
        documents = [np.concatenate(documents)]
    if job.patches == "random":
        is_start = random_starts(documents, job.config)
    else:
        method, _, size = job.patches.partition(":")
        # Only static patches have a size; space reads none.
        patcher = EntropyPatcher(None, PatchConfig(method, float(size or 1)))
        is_start = [patcher.starts(document) for document in documents]
    bits = BitArray()
    # The first boundary opens a document; each later one is the end of the document before it.
    bits.append(np.concatenate([[True], *is_start]))
    bits.close()
    return TrainingRows(DocumentStream.of_documents(documents), job.row_bytes, bits)


def bytes_per_patch(batches):
    """Mean number of targets in a patch."""
    targets = sum(batch.targets for batch in batches)
    patches = 0
    for batch in batches:
        # A row that is not full has one patch more, which holds its padding.
        is_padded_B = (~batch.is_scored).any(1)
        patches += int((batch.patch_lengths > 0).sum()) - int(is_padded_B.sum())
    return targets / patches


# --------------------------------------------------------------------------------------------------
# Candidates: a model, its optimizers, and the settings in which it can run


@dataclass
class Setting:
    """A way to run a candidate. attention: for transformers, its attn_implementation."""

    precision: str
    attention: str | None = None
    is_compiled: bool = False

    @property
    def name(self):
        compiled = "compiled" if self.is_compiled else None
        return ", ".join(filter(None, (self.precision, self.attention, compiled)))


def may_compile(job):
    """Whether the job runs under torch.compile."""
    is_cuda = job.device.startswith("cuda")
    return job.config.compile == "yes" or (job.config.compile == "auto" and is_cuda)


def precisions_to_try(job):
    """The job's precision; for auto, fp32 and what training would choose."""
    if job.precision != "auto":
        return [job.precision]
    return sorted({"fp32", choose_precision("auto", torch.device(job.device))})


class OurModel:
    """The `BLTModel` as it is trained; and what the other candidates share."""

    def __init__(self, job):
        self.job = job
        self.model = self.make_model().to(job.device)
        self.optimizers = self.make_optimizers()

    def make_model(self):
        return BLTModel(self.job.model)

    def make_optimizers(self):
        return make_optimizers(self.model, RunConfig())

    def settings(self):
        """The settings to choose from."""
        return [Setting(self.job.precision, is_compiled=may_compile(self.job))]

    def use(self, setting):
        """Run in this setting from now on (its precision is the caller's to set)."""
        self.row_losses = RowLosses(self.model)
        if setting.is_compiled:
            self.row_losses = torch.compile(self.row_losses, dynamic=False)

    def nats(self, batch):
        """Cross-entropy of each target in nats, [B, T]; 0 where it is not scored."""
        return self.row_losses(*batch.for_losses())

    def logits(self, batch):
        """Logits [B, T, 257]."""
        return self.model(batch.ids[:, :-1], batch.patch_lengths)


class FlatModel(OurModel):
    """The flat byte transformer."""

    def make_model(self):
        dim, n_layers = self.job.flat_shape
        config = FlatConfig(dim=dim, n_layers=n_layers, window=self.job.model.window)
        return FlatByteTransformer(config)

    def nats(self, batch):
        # Without patch lengths the model gets ids alone.
        return super().nats(replace(batch, patch_lengths=None))


class LoopModel(OurModel):
    """Our weights, computed by Python loops. torch.compile would unroll them, so it is not tried."""

    def settings(self):
        return [Setting(precision) for precision in precisions_to_try(self.job)]

    def nats(self, batch):
        nats_BT, _ = target_losses(partial(plain_logits, self.model), batch)
        return nats_BT


class TransformersModel(OurModel):
    """transformers' BltForCausalLM with the weights that our candidate draws from the same seed."""

    def make_model(self):
        # convert_hf imports transformers, which takes seconds: only this candidate waits for it.
        import convert_hf

        self.convert_hf = convert_hf
        return convert_hf.to_transformers(BLTModel(self.job.model))

    def make_optimizers(self):
        # What a user of transformers trains with: one fused AdamW for all parameters.
        settings = dict(lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        return [torch.optim.AdamW(self.model.parameters(), **settings)]

    def settings(self):
        job = self.job
        attentions = ["sdpa"]
        scores_bytes = 4 * job.batch_rows * job.model.heads("decoder") * job.row_bytes**2
        if scores_bytes < EAGER_SCORES:
            attentions.append("eager")
        compile_choices = [False, True] if may_compile(job) else [False]
        choices = itertools.product(precisions_to_try(job), attentions, compile_choices)
        return [Setting(*choice) for choice in choices]

    def use(self, setting):
        # Each part of the model looks its attention up in a config of its own.
        parts = ("", "encoder_config", "global_config", "decoder_config")
        self.model.set_attn_implementation(dict.fromkeys(parts, setting.attention))
        self.row_losses = torch.compile(self.eager_losses) if setting.is_compiled else self.eager_losses

    def hf_logits(self, ids, patch_lengths):
        """Logits over transformers' 260 classes of rows [B, T + 1]."""
        inputs_BT = self.convert_hf.to_hf_ids(ids[:, :-1])
        return self.model(input_ids=inputs_BT, patch_lengths=patch_lengths, use_cache=False).logits

    def eager_losses(self, ids, is_scored, patch_lengths):
        """What `metric.RowLosses` computes, with this model's classes."""
        # convert_hf numbers inputs; as a target our boundary is their end of text.
        targets_BT = ids[:, 1:]
        byte_classes_BT = targets_BT + self.convert_hf.HF_FIRST_BYTE
        classes_BT = torch.where(targets_BT == BOUNDARY, self.convert_hf.HF_END, byte_classes_BT)
        classes_BT = classes_BT.masked_fill(~is_scored, -100)
        logits = self.hf_logits(ids, patch_lengths).flatten(0, 1).float()
        nats = F.cross_entropy(logits, classes_BT.flatten(), ignore_index=-100, reduction="none")
        return nats.view_as(classes_BT)

    def logits(self, batch):
        return self.hf_logits(batch.ids, batch.patch_lengths)[..., self.convert_hf.OUTPUT_ROWS]


CANDIDATES = {"ours": OurModel, "transformers": TransformersModel, "flat": FlatModel, "loop": LoopModel}


# --------------------------------------------------------------------------------------------------
# Steps in a process of their own


def now(device):
    """Seconds on the clock, read once the device has done its work."""
    synchronize(device)
    return time.perf_counter()


def time_calls(function, repeats, device):
    """Seconds of each of several calls; one more comes before them to warm up."""
    seconds = []
    for _ in range(1 + repeats):
        tick = now(device)
        function()
        seconds.append(now(device) - tick)
    return np.array(seconds[1:])


class Runner:
    """Lives in its own process: makes the job's rows and candidate, then runs steps when asked."""

    def __init__(self, job):
        self.job = job
        self.device = torch.device(job.device)
        accumulate = job.config.accumulate
        rows = make_rows(job)
        self.batches = []
        for number in range(max(BATCHES, accumulate)):
            self.batches.append(rows.shuffled_batch(number, job.batch_rows, job.config.seed))
        patch_size = bytes_per_patch(self.batches)
        batch_bytes = float(np.mean([batch.bytes for batch in self.batches]))
        if self.device.type == "cuda":
            self.batches = [batch.pin() for batch in self.batches]

        # From here on memory is the model's. The seed comes right before the model is made, so that
        # all candidates of one architecture draw the same weights.
        self.before = memory(self.device)
        set_seed(job.config.seed)
        self.candidate = CANDIDATES[job.kind](job)
        self.model = self.candidate.model.train()
        setting, tried = self.choose_setting(self.candidate.settings())
        self.use(setting)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.facts = {
            "kind": job.kind,
            "setting": setting.name,
            "tried": tried,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "row_bytes": job.row_bytes,
            "batch_rows": job.batch_rows,
            "patch_slots": rows.patch_slots,
            "bytes_per_patch": patch_size,
            "step_bytes": batch_bytes * accumulate,
            "padding": dict(zip(("bytes", "patches"), rows.padding())),
        }
        # What choosing a setting took is no part of a step.
        reset_peak(self.device)

    def use(self, setting):
        """Run in this setting from now on."""
        self.precision = setting.precision
        self.candidate.use(setting)

    def choose_setting(self, settings):
        """The only setting, or the fastest; and {name: seconds or why it failed} of those tried."""
        if len(settings) == 1:
            return settings[0], {}
        tried = {}
        best = None
        best_seconds = math.inf
        for setting in settings:
            try:
                seconds = self.time_setting(setting, best_seconds)
            except Exception as error:
                # Whatever a setting fails with, another may work.
                reason = str(error).splitlines()[0] if str(error) else ""
                seconds = f"failed: {type(error).__name__}: {reason}"
                self.model.zero_grad(set_to_none=True)
            tried[setting.name] = seconds
            if isinstance(seconds, float) and seconds < best_seconds:
                best = setting
                best_seconds = seconds
        if best is None:
            raise ValueError(f"no setting of {self.job.kind} works here: {tried}")
        return best, tried

    def time_setting(self, setting, best_seconds):
        """Seconds of the second of two forward and backward passes in this setting."""
        self.use(setting)
        for _ in range(2):
            tick = now(self.device)
            self.loss(self.batches[0], 1).backward()
            seconds = now(self.device) - tick
            self.model.zero_grad(set_to_none=True)
            # Only a compiled setting gets much faster in its second run.
            if not setting.is_compiled and seconds > 1.5 * best_seconds:
                break
        return seconds

    def loss(self, batch, targets):
        """The batch's share of a mean cross-entropy over this many targets, in nats."""
        with autocast(self.device, self.precision):
            return self.candidate.nats(batch.to(self.device)).sum() / targets

    def step(self, number):
        """One update as in training: seconds of forward, backward and update, and the loss in nats."""
        seconds, loss_nats = self._step(number, now)
        return seconds, loss_nats.item()

    def steps(self, number):
        """Seconds of an update among several without waits between them, as in training."""
        begin = now(self.device)
        for i in range(STEPS_AT_ONCE):
            self._step(number * STEPS_AT_ONCE + i, lambda device: 0.0)
        return (now(self.device) - begin) / STEPS_AT_ONCE

    def profile(self, number):
        """[(milliseconds a step, calls a step, kernel)], the longest first; operations on a CPU."""
        is_cuda = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as profiler:
            self.steps(number)
        rows = []
        for event in profiler.key_averages():
            microseconds = event.self_device_time_total if is_cuda else event.self_cpu_time_total
            # What torch marks, such as an optimizer's step, holds kernels that are listed themselves.
            if microseconds > 0 and not event.is_user_annotation:
                rows.append((microseconds / 1000 / STEPS_AT_ONCE, event.count / STEPS_AT_ONCE, event.key))
        return sorted(rows, reverse=True)

    def _step(self, number, clock):
        """`step`, with the loss on the device. clock(device): the time."""
        # Each step goes on where the last one ended, so that all batches are used.
        accumulate = self.job.config.accumulate
        first = number * accumulate
        batches = [self.batches[i % len(self.batches)] for i in range(first, first + accumulate)]
        targets = sum(batch.targets for batch in batches)
        forward_s = 0.0
        backward_s = 0.0
        loss_nats = 0.0
        for batch in batches:
            begin = clock(self.device)
            loss = self.loss(batch, targets)
            middle = clock(self.device)
            backward(self.model, loss, self.scaler)
            forward_s += middle - begin
            backward_s += clock(self.device) - middle
            loss_nats = loss_nats + loss.detach()
        begin = clock(self.device)
        gradient_norm = clip_gradients(self.model, self.candidate.optimizers, self.scaler, RunConfig.clip)
        step_optimizers(self.candidate.optimizers, self.scaler, gradient_norm)
        update_s = clock(self.device) - begin
        return [forward_s, backward_s, update_s], loss_nats

    @torch.no_grad()
    def logits(self):
        """Logits of the first row's scored positions, float32 [positions, 257], before any step."""
        # One row shows whether two models agree, and is small enough to send through the pipe.
        batch = self.batches[0]
        first_row = replace(
            batch, ids=batch.ids[:1], is_scored=batch.is_scored[:1], patch_lengths=batch.patch_lengths[:1]
        ).to(self.device)
        self.model.eval()
        logits_BTV = self.candidate.logits(first_row)
        self.model.train()
        return logits_BTV[first_row.is_scored].float().cpu().numpy()

    def memory(self):
        """{"peak_bytes" of the steps so far, "state_bytes" of weights and optimizers}."""
        tensors = list(self.model.parameters())
        for optimizer in self.candidate.optimizers:
            for state in optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        peak_bytes = memory(self.device, peak=True) - self.before
        return {"peak_bytes": peak_bytes, "state_bytes": state_bytes}


def memory(device, peak=False):
    """Bytes in use now, or at most since `reset_peak`: allocated on CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        # Only Linux has /proc; elsewhere the table shows 0.
        return 0
    name = "VmHWM" if peak else "VmRSS"
    kilobytes = re.search(rf"{name}:\s+(\d+)", status.read_text())[1]
    return 1024 * int(kilobytes)


def reset_peak(device):
    """Measure the peak from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        # 5 sets the largest resident set to the present one (man 5 proc).
        Path("/proc/self/clear_refs").write_text("5")


def serve(pipe, job):
    """A process's whole life: make the `Runner`, send its facts, answer (method, *arguments)."""
    try:
        torch.set_num_threads(job.threads)
        if job.device == "cpu":
            # Libraries load code at their first use, which is not the model's memory: a tiny step
            # makes them load it before the memory is measured.
            tiny = replace(job, model=TINY, flat_shape=(32, 1), row_bytes=64, batch_rows=1)
            tiny.config = replace(job.config, compile="no")
            Runner(tiny).step(0)
        runner = Runner(job)
        pipe.send((True, runner.facts))
        while True:
            method, *arguments = pipe.recv()
            pipe.send((True, getattr(runner, method)(*arguments)))
    except (EOFError, KeyboardInterrupt):
        # The parent has closed the pipe: it has all it wanted.
        pass
    except Exception as error:
        pipe.send((False, f"{type(error).__name__}: {error}"))


class Worker:
    """The parent's end of a job's process. `with Worker(job) as worker: worker.ask("step", 0)`."""

    def __init__(self, job):
        has_forkserver = "forkserver" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if has_forkserver else "spawn")
        if has_forkserver:
            # Workers begin as copies of a clean process that has imported torch and nothing else.
            context.set_forkserver_preload(["torch._dynamo"])
        self.job = job
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, job), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self):
        # The first answer comes without a question.
        self.facts = self.ask()
        return self

    def __exit__(self, *exception):
        # A closed pipe ends `serve`. A process that hangs all the same is killed.
        self.pipe.close()
        self.process.join(30)
        if self.process.is_alive():
            self.process.kill()

    def ask(self, *question):
        """Send (method, *arguments), if given, and wait for an answer. ValueError: it failed there."""
        who = f"{self.job.name} ({self.job.kind})"
        try:
            if question:
                self.pipe.send(question)
            is_good, answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise ValueError(
                f"the process of {who} was ended, as when memory runs out; "
                "lower --batch_rows, --row_bytes or --hash_rows"
            ) from None
        if not is_good:
            raise ValueError(f"{who}: {answer}")
        return answer


# --------------------------------------------------------------------------------------------------
# Measuring training steps


@dataclass
class Measurement:
    """The steps of one job."""

    job: Job
    facts: dict  # `Runner.facts`
    seconds_RP: np.ndarray  # round by phase: until its end, see `step_seconds`
    first_s: float  # the first step, in which a compiled model is compiled
    memory: dict  # `Runner.memory`
    profile: list | None  # `Runner.profile`


def in_turn(items, round_number):
    """The items in an order that changes each round, so that none always comes first."""
    items = list(items)
    return items if round_number % 2 else items[::-1]


def measure(jobs, config):
    """Run steps of all jobs in turn. Returns their `Measurement`s, and `compare_logits` or None."""
    difference = None
    with ExitStack() as stack:
        # All processes are ready before the first step: none computes while another is timed.
        workers = [stack.enter_context(Worker(job)) for job in jobs]
        if jobs[-1].kind == "transformers":
            difference = compare_logits(*workers)
        rounds = [[] for _ in workers]
        for round_number in range(config.warmup + config.repeats):
            for i in in_turn(range(len(workers)), round_number):
                rounds[i].append(step_seconds(workers[i], round_number))
        measurements = []
        for worker, rounds_of_worker in zip(workers, rounds):
            measurement = Measurement(
                job=worker.job,
                facts=worker.facts,
                seconds_RP=np.array([until for until, _ in rounds_of_worker[config.warmup :]]),
                first_s=rounds_of_worker[0][1],
                memory=worker.ask("memory"),
                profile=worker.ask("profile", 0) if config.profile and len(jobs) == 1 else None,
            )
            measurements.append(measurement)
    return measurements, difference


def step_seconds(worker, round_number):
    """Let a process run steps: seconds until each part is done, and seconds of a step with waits."""
    seconds, loss = worker.ask("step", round_number)
    if not np.isfinite(loss):
        who = f"{worker.job.name} ({worker.job.kind})"
        steps = round_number + 1
        raise ValueError(f"the loss of {who} is {loss} after {steps} steps; try --precision fp32")
    until = np.cumsum(seconds)
    if worker.job.device.startswith("cuda"):
        until[-1] = worker.ask("steps", round_number)
    return until, sum(seconds)


def compare_logits(ours, theirs):
    """The largest difference of two processes' logits. Raises ValueError where it is no rounding."""
    difference = float(np.abs(ours.ask("logits") - theirs.ask("logits")).max())
    if not difference < LOGITS_TOLERANCE:
        raise ValueError(
            f"our logits and transformers' differ by {difference:.1e} (allowed: {LOGITS_TOLERANCE}): "
            "a comparison would mean nothing"
        )
    return difference


def spread(values):
    """{"median", "q1", "q3", "n"} of some numbers."""
    q1, median, q3 = np.percentile(values, (25, 50, 75))
    return {"median": float(median), "q1": float(q1), "q3": float(q3), "n": len(values)}


def describe(measurement, flops, peak):
    """A measured training step as a dict of numbers. flops: of a forward pass per byte, by part."""
    facts = measurement.facts
    seconds_RP = measurement.seconds_RP
    times = {key: spread(1000 * seconds_RP[:, i]) for i, key in enumerate(PHASES)}
    forward, _, step = np.median(seconds_RP, axis=0)
    flops_per_byte = sum(flops.values())
    step_bytes = facts["step_bytes"]
    return {
        "name": measurement.job.name,
        **facts,
        **times,
        "bytes_per_second": step_bytes / step,
        "forward_bytes_per_second": step_bytes / forward,
        "flops_per_byte": flops,
        "mfu": TRAINING * flops_per_byte * step_bytes / step / peak,
        "forward_mfu": flops_per_byte * step_bytes / forward / peak,
        **measurement.memory,
        "compile_s": measurement.first_s - step if "compiled" in facts["setting"] else None,
        "profile": measurement.profile,
    }


def bench_model(job, config, peak):
    """One model alone."""
    (measurement,), _ = measure([job], config)
    flops = blt_flops(job.model, measurement.facts["bytes_per_patch"], job.row_bytes)
    return describe(measurement, flops, peak)


def bench_against(kind, job, patch_size, config, peak):
    """Our model and another candidate, step by step in turn; ratios above 1 are in our favour."""
    our_job = replace(job, one_document=kind == "transformers")
    their_job = replace(our_job, kind=kind)
    if kind == "flat":
        wanted = sum(blt_flops(job.model, patch_size, job.row_bytes).values())
        their_job.flat_shape = flat_shape_of_equal_flops(wanted, job.row_bytes, job.model.window)
    else:
        # auto: these may be faster in another precision than ours, and get the choice.
        their_job.precision = config.precision
    (ours, theirs), difference = measure([our_job, their_job], config)

    # The patches of these rows may differ from patch_size: one long document has others.
    our_flops = blt_flops(job.model, ours.facts["bytes_per_patch"], job.row_bytes)
    their_flops = our_flops
    if kind == "flat":
        shape = their_job.flat_shape
        their_flops = transformer_flops(*shape, BOUNDARY + 1, job.row_bytes, job.model.window)
    flops_ratio = sum(their_flops.values()) / sum(our_flops.values())
    time_ratio_RP = theirs.seconds_RP / ours.seconds_RP
    # On a CPU a tiny model's step may need no more than the process has freed before it.
    memory_ratio = None
    if ours.memory["peak_bytes"] > 0:
        memory_ratio = theirs.memory["peak_bytes"] / ours.memory["peak_bytes"]
    return {
        "kind": kind,
        "ours": describe(ours, our_flops, peak),
        "theirs": describe(theirs, their_flops, peak),
        "time_ratio": {key: spread(time_ratio_RP[:, i]) for i, key in enumerate(PHASES)},
        "memory_ratio": memory_ratio,
        "logits_difference": difference,
        "flat_shape": their_job.flat_shape,
        "flops_ratio": flops_ratio,
        "mfu_ratio": spread(time_ratio_RP[:, -1] / flops_ratio) if kind == "flat" else None,
    }


# --------------------------------------------------------------------------------------------------
# The entropy pass and patching


def bench_entropy_pass(config, device, precision, peak):
    """Bytes a second of `stream_entropies`, for each of `ENTROPY_MODELS`."""
    is_cpu = device.type == "cpu"
    streams = default_reading(device)[0] if config.streams is None else config.streams
    # Documents of equal length, one a stream, so that no stream reads anything twice. With the
    # position of its end a document is a whole number of chunks.
    length = 2048 * (2 if is_cpu else 8) - 1
    text = np.concatenate(sample_documents(config.data_cache))
    documents = [np.roll(text, -i * length)[:length] for i in range(streams)]
    stream = DocumentStream.of_documents(documents)
    records = []
    for name in ENTROPY_MODELS:
        c = EntropyConfig(**ENTROPY_SIZES[name])
        set_seed(config.seed)
        model = MinimalLLM(c).to(device).eval()
        entropy_pass = partial(stream_entropies, model, stream, streams, precision=precision)
        speed = stream.total_bytes / time_calls(entropy_pass, min(3, config.repeats), device)
        flops = transformer_flops(c.d_model, c.n_layers, c.vocab_size, length + 1, c.max_seq_len)
        records.append(
            {
                "name": name,
                "size": f"{c.n_layers} x {c.d_model}, window {c.max_seq_len}",
                "streams": streams,
                "bytes": stream.total_bytes,
                "bytes_per_second": spread(speed),
                "flops_per_byte": flops,
                "mfu": float(np.median(speed)) * sum(flops.values()) / peak,
            }
        )
    return records


def bench_patching(config):
    """Speed of `patch_starts` by causal method, in raw bytes of text a second: {method: `spread`}.

    NumPy, on one core.
    """
    stream = DocumentStream.of_documents(sample_documents(config.data_cache))
    # One position for each byte and each document's end.
    n = stream.total_bytes + len(stream.lengths)
    # Random entropies, in the precision of the cache; the time hardly depends on their values.
    H = np.random.default_rng(config.seed).gamma(1.0, 1.0, n).astype(np.float16)
    begins = np.zeros(n, dtype=bool)
    begins[stream.ends - stream.lengths - 1] = True
    byte_values = stream.ids(1, n + 1).astype(np.uint8)
    speeds = {}
    for method in causal_methods():
        threshold = 0.0
        if RULES[method].unit is not None:
            threshold = threshold_for_patch_size(H[:200_000], method, config.patch_size)
        known = dict(byte_values=byte_values, document_starts=begins)
        patching = partial(patch_starts, H, method, threshold, **known)
        seconds = time_calls(patching, config.repeats, torch.device("cpu"))
        speeds[method] = spread(stream.total_bytes / seconds)
    return speeds


# --------------------------------------------------------------------------------------------------
# Scaling


def log_slope(x, y):
    """Slope of the line through log y by log x: 1 for y proportional to x, 2 for its square.

    Returns None where there is no such line: a single x, or a y that is not above 0.
    """
    if len(set(x)) < 2 or min(y) <= 0:
        return None
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def scaled_job(job, row_bytes, batch_rows, patches, width=1.0):
    """The job with other rows and patches, and all widths times a factor. Its name says which."""
    model = job.model
    if width != 1.0:
        # Widths that suit the hardware, with as many heads as the width implies.
        changes = {}
        for part in ("encoder", "global", "decoder"):
            dim = getattr(job.model, f"{part}_dim")
            changes[f"{part}_dim"] = max(64, 64 * round(width * dim / 64))
            changes[f"{part}_heads"] = None
        model = replace(job.model, **changes)
    name = f"{batch_rows} x {row_bytes:,} bytes, {patches}, width {width:g}"
    rows = dict(row_bytes=row_bytes, batch_rows=batch_rows, patches=patches)
    return replace(job, name=name, model=model, **rows)


def bench_point(job, config, peak):
    """One point of a sweep; "activation_bytes" is its peak memory without weights and optimizers."""
    record = bench_model(job, config, peak)
    record["activation_bytes"] = record["peak_bytes"] - record["state_bytes"]
    print(
        f"  {job.name}: step {record['step_ms']['median']:,.0f} ms, "
        f"{record['bytes_per_second'] / 1e3:.1f} kB/s, "
        f"activations {format_megabytes(record['activation_bytes'])}"
    )
    return record


def bench_scaling(job, config, peak):
    """Sweeps of one model: row length (at equal bytes a step, and one row), patch size, width."""
    known = {}

    def sweep(jobs):
        # Sweeps cross: a point that two of them share is measured once.
        for point in jobs:
            if point.name not in known:
                known[point.name] = bench_point(point, replace(config, profile=False), peak)
        return [known[point.name] for point in jobs]

    rows = config.scaling_rows
    sizes = config.scaling_patches
    factors = config.scaling_widths
    same = (job.row_bytes, job.batch_rows)
    equal_bytes = [scaled_job(job, n, config.scaling_bytes // n, job.patches) for n in rows]
    one_row = [scaled_job(job, n, 1, job.patches) for n in rows]
    patches = [scaled_job(job, *same, f"static:{n}") for n in sizes]
    widths = [scaled_job(job, *same, job.patches, factor) for factor in factors]
    record = {
        "row_bytes": rows,
        "equal_bytes": sweep(equal_bytes),
        "one_row": sweep(one_row),
        "patch_sizes": sizes,
        "patches": sweep(patches),
        "width_factors": factors,
        "widths": sweep(widths),
    }
    record["slopes"] = scaling_slopes(record)
    return record


def median_ms(points, key="step_ms"):
    """The median times of measured points, in ms."""
    return [point[key]["median"] for point in points]


def scaling_slopes(record):
    """`log_slope` of time and memory by row length: 1 is linear, 2 is quadratic."""
    rows = record["row_bytes"]
    one_row = record["one_row"]
    ms_a_row = [point["step_ms"]["median"] / point["batch_rows"] for point in record["equal_bytes"]]
    activations = [point["activation_bytes"] for point in one_row]
    return {
        "step time of one row": log_slope(rows, median_ms(one_row)),
        "forward and backward of one row": log_slope(rows, median_ms(one_row, "forward_backward_ms")),
        "time a row, at equal bytes a step": log_slope(rows, ms_a_row),
        "peak memory of one row without weights and optimizers": log_slope(rows, activations),
    }


# --------------------------------------------------------------------------------------------------
# Generation


@dataclass
class Continuation:
    """What a candidate wrote after a prompt. drafts: drafted and accepted bytes, and passes."""

    text: bytes
    seconds_per_byte: float
    drafts: dict = field(default_factory=dict)


def model_and_patcher(job, config, device):
    """The trained model of a model.json with its patcher; for another name random ones."""
    if job.name.endswith(".json"):
        model, patcher, _ = load_blt(Path(job.name).parent, device)
        return model, patcher
    model = BLTModel(job.model).to(device).eval()
    entropy_model = MinimalLLM(EntropyConfig(**ENTROPY_SIZES["nano"])).to(device).eval()
    # The threshold of a random entropy model, so that patches have the size asked for all the same.
    text = np.concatenate(sample_documents(config.data_cache))[:20_000]
    H = EntropyPatcher(entropy_model).entropies(text)
    threshold = threshold_for_patch_size(H, "global", config.patch_size)
    return model, EntropyPatcher(entropy_model, threshold=threshold, method="global")


def write_cached(model, patcher, new_bytes, draft_bytes, prompt):
    """Continue a prompt with our caches, on one CPU thread.

    The time of the prompt and of the first eighth of the new bytes is left out.
    """
    device = next(model.parameters()).device
    with threads_for(1):
        greedy = SamplingConfig()
        generator = Generator(model, patcher, [prompt], new_bytes, greedy, draft_bytes=draft_bytes)
        sampler = generator.samplers[0]
        # (seconds, bytes) after each step, of which the first reads the prompt and chooses a byte. A step
        # has waited for its logits; to wait for all of its work as well would slow down the next one.
        clock = [(time.perf_counter(), len(sampler.final_bytes())) for _ in generator.steps()]
        end = now(device)
    # In the first steps CUDA graphs are recorded. A text that ends early is timed from its first byte on.
    begin, n_before = next((tick for tick in clock[:-1] if tick[1] > new_bytes // 8), clock[0])
    text = sampler.final_bytes()
    counts = {"drafted": generator.drafted, "accepted": generator.accepted, "passes": generator.passes}
    return Continuation(text, (end - begin) / max(1, len(text) - n_before), counts if draft_bytes else {})


def write_by_transformers(convert_hf, hf_model, one_thread, prompt):
    """Continue a prompt with transformers, without its cache, which gives other results."""
    device = hf_model.device
    ids = convert_hf.to_hf_ids(torch.tensor([[BOUNDARY, *prompt]], device=device))
    with threads_for(1) if one_thread else nullcontext():
        tick = now(device)
        greedy = dict(max_new_tokens=HF_NEW_BYTES, do_sample=False, use_cache=False)
        written = hf_model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
        seconds = now(device) - tick
    new_ids = written[0, ids.shape[1] :]
    text = bytes((new_ids - convert_hf.HF_FIRST_BYTE).clamp(0, 255).tolist())
    # Every byte is a full pass, the first too.
    return Continuation(text, seconds / len(new_ids))


def generation_candidates(model, patcher, config):
    """{name: function of a prompt that returns a `Continuation`}."""
    candidates = {"cached": partial(write_cached, model, patcher, config.new_bytes, 0)}
    if patcher.entropy_model is not None:
        drafting = partial(write_cached, model, patcher, config.new_bytes, config.draft_bytes)
        candidates[f"cached, {config.draft_bytes} drafts"] = drafting
    if "transformers" in config.against:
        # convert_hf imports transformers, which takes seconds: only --against transformers waits.
        import convert_hf

        hf_model = convert_hf.to_transformers(model, patcher.entropy_model, patcher.config)
        write = partial(write_by_transformers, convert_hf, hf_model)
        candidates["transformers"] = partial(write, False)
        candidates["transformers, one thread"] = partial(write, True)
    return candidates


def reading_ms(model, patcher, text, context_bytes):
    """Milliseconds to read a byte about byte 500 and byte 5,000 of a text, on one CPU thread."""
    device = next(model.parameters()).device
    times = []
    with threads_for(1):
        reader = IncrementalBLT(model, patcher, 1, context_bytes)
        for identity in [BOUNDARY, *text[:5_200].tolist()]:
            tick = now(device)
            reader.extend(np.array([[identity]]))
            times.append(1000 * (now(device) - tick))
    # The mean of 400 bytes, because a byte that completes a patch takes longer than others.
    return {at: float(np.mean(times[at - 200 : at + 200])) for at in (500, 5000)}


def bench_generation(job, config, device):
    """Milliseconds a byte of greedy fp32 generation after held-out prompts, by candidate.

    The candidates write in turn, each round after another prompt. Also the time to read a byte early
    and late in a text: once in a row of any length, and with rows of at most 1,024 ids.
    """
    set_seed(config.seed)
    model, patcher = model_and_patcher(job, config, device)
    corpus = open_corpus("sample", cache_dir=config.data_cache)
    text = np.concatenate([corpus.document(number) for number in corpus.documents("validation")])
    candidates = generation_candidates(model, patcher, config)
    written = {}
    for number in range(config.warmup + config.repeats):
        # Prompts far apart, so that each round has another text.
        first = number * 20_000
        prompt = text[first : first + config.prompt_bytes].tobytes()
        for candidate in in_turn(candidates, number):
            written.setdefault(candidate, []).append(candidates[candidate](prompt))
    row_lengths = (None, 1024) if config.reading else ()
    return {
        "name": job.name,
        "patch_config": asdict(patcher.config),
        "prompt_bytes": config.prompt_bytes,
        "new_bytes": config.new_bytes,
        **generation_record(written, config.warmup),
        "place_ms": {str(ids): reading_ms(model, patcher, text, ids) for ids in row_lengths},
    }


def generation_record(written, warmup):
    """Times of {candidate: `Continuation`s} and the share of drafts that were accepted, as a dict."""
    reference = written["cached"]
    reference_seconds = np.array([ours.seconds_per_byte for ours in reference[warmup:]])
    # "contestants" is the name in the files under records/, which are read beside new ones.
    record = {"contestants": {}}
    drafts = {}
    for candidate, continuations in written.items():
        timed = continuations[warmup:]
        seconds = np.array([continuation.seconds_per_byte for continuation in timed])
        same = 0
        for ours, theirs in zip(reference, continuations):
            # transformers writes fewer bytes, so only as many are compared.
            n = min(len(ours.text), len(theirs.text))
            same += ours.text[:n] == theirs.text[:n]
        record["contestants"][candidate] = {
            "ms_per_byte": spread(1000 * seconds),
            "time_ratio": spread(seconds / reference_seconds),
            "same_text": f"{same} of {len(continuations)}",
        }
        for continuation in timed:
            for what, count in continuation.drafts.items():
                drafts[what] = drafts.get(what, 0) + count
    if drafts.get("drafted"):
        record["drafts"] = drafts
    return record


# --------------------------------------------------------------------------------------------------
# Tables


def format_ms(values):
    """The median of a `spread` of ms, with a digit after the point below 100."""
    return f"{values['median']:,.0f}" if values["median"] >= 100 else f"{values['median']:.1f}"


def format_spread(values):
    """The median and quartiles of a `spread`."""
    return f"{values['median']:.2f} [{values['q1']:.2f}, {values['q3']:.2f}]"


def format_megabytes(n_bytes):
    """Bytes as MB."""
    return f"{n_bytes / 1e6:,.0f} MB"


def training_cells(record):
    """A row of the table, with all its columns: {column: cell}."""
    step = record["step_ms"]
    padding = record["padding"]
    batch = f"{record['batch_rows']} x {record['row_bytes']:,} / {record['bytes_per_patch']:.2f}"
    return {
        "": f"train {record['name']}",
        "batch": batch,
        "forward": format_ms(record["forward_ms"]),
        "fwd+bwd": format_ms(record["forward_backward_ms"]),
        "step [quartiles] ms": f"{format_ms(step)} [{step['q1']:,.0f}, {step['q3']:,.0f}]",
        "speed": f"{record['bytes_per_second'] / 1e3:,.1f} kB/s",
        "memory": format_megabytes(record["peak_bytes"]),
        "FLOPs/byte": f"{sum(record['flops_per_byte'].values()) / 1e6:.2f}M",
        "MFU fwd": f"{record['forward_mfu']:.1%}",
        "MFU step": f"{record['mfu']:.1%}",
        "padding byte, patch": f"{padding['bytes']:.1%}, {padding['patches']:.1%}",
        "compile": "-" if record["compile_s"] is None else f"{record['compile_s']:.0f} s",
    }


def entropy_cells(record):
    """A row of the table: {column: cell}; a forward pass only."""
    return {
        "": f"entropies, {record['name']} ({record['size']})",
        "batch": f"{record['streams']} streams",
        "speed": f"{record['bytes_per_second']['median'] / 1e3:,.1f} kB/s",
        "FLOPs/byte": f"{sum(record['flops_per_byte'].values()) / 1e6:.2f}M",
        "MFU fwd": f"{record['mfu']:.1%}",
    }


def print_results(out):
    """Print the one table: training steps, entropy passes and patching."""
    rows = [training_cells(record) for record in out["models"]]
    rows += [entropy_cells(record) for record in out.get("entropy_pass", [])]
    for method, speed in out.get("patch_starts_bytes_per_second", {}).items():
        label = f"patch starts, {method} (one core)"
        rows.append({"": label, "speed": f"{speed['median'] / 1e6:,.0f} MB/s"})
    # The first row is of a training step, which has every column. Other rows have - elsewhere.
    header = list(rows[0])
    print()
    print_table(header, [[row.get(column, "-") for column in header] for row in rows])
    print("forward, fwd+bwd: median ms; batch: rows x bytes / bytes a patch; FLOPs/byte: one forward pass")
    for record in out["models"]:
        print_flops(record)
        if record["profile"] is not None:
            print_profile(record)


def print_flops(record):
    """One line: the FLOPs of a forward pass by part."""
    total = sum(record["flops_per_byte"].values())
    parts = []
    for part, value in record["flops_per_byte"].items():
        parts.append(f"{part} {value / 1e6:.3f}M ({value / total:.0%})")
    print(f"forward FLOPs per byte of {record['name']}: {total / 1e6:.3f}M = {', '.join(parts)}")


def print_profile(record):
    """Print what takes most of a step's time."""
    total_ms = sum(milliseconds for milliseconds, _, _ in record["profile"])
    print(f"\nwhere a step of {record['name']} spends its time, {total_ms:.1f} ms in all, under a profiler")
    rows = []
    for milliseconds, calls, name in record["profile"][:PROFILE_LINES]:
        rows.append([f"{milliseconds:.3f}", f"{milliseconds / total_ms:.1%}", f"{calls:g}", name[:PROFILE_COLUMNS]])
    print_table(["ms", "share", "calls", "what"], rows)


def print_against(record):
    """Print our model beside another candidate."""
    ours = record["ours"]
    theirs = record["theirs"]
    kind = record["kind"]
    print(
        f"\n{ours['name']} against {kind}, {ours['batch_rows']} x {ours['row_bytes']:,} bytes, "
        f"{ours['bytes_per_patch']:.2f} a patch, {ours['step_ms']['n']} rounds"
    )
    print(f"settings: ours {ours['setting']}; {kind} {theirs['setting']}")
    for setting, seconds in theirs["tried"].items():
        # A setting that failed has its reason in place of its time.
        what = seconds
        if not isinstance(seconds, str):
            what = f"{1000 * seconds:,.0f} ms forward and backward"
        print(f"  tried {setting}: {what}")
    if record["logits_difference"] is not None:
        print(
            f"logits with equal weights and patches agree to {record['logits_difference']:.1e} "
            f"(fp32, {ours['row_bytes']:,} bytes)"
        )
    if kind == "flat":
        dim, layers = record["flat_shape"]
        print(f"flat: {layers} layers of {dim}, {record['flops_ratio']:.3f} times our FLOPs per byte")

    # Above 1 a ratio is in our favour: their time or memory by ours.
    rows = []
    for key, phase in PHASES.items():
        ratio = format_spread(record["time_ratio"][key])
        rows.append([phase, f"{format_ms(ours[key])} ms", f"{format_ms(theirs[key])} ms", ratio])
    memory_ratio = "-" if record["memory_ratio"] is None else f"{record['memory_ratio']:.2f}"
    peaks = [format_megabytes(candidate["peak_bytes"]) for candidate in (ours, theirs)]
    rows.append(["peak memory", *peaks, memory_ratio])
    if kind == "flat":
        ratio = format_spread(record["mfu_ratio"]) + " (ours / flat)"
        rows.append(["MFU of a step", f"{ours['mfu']:.1%}", f"{theirs['mfu']:.1%}", ratio])
    print_table(["", "ours", kind, "ratio [quartiles]"], rows)


def print_generation(record):
    """Print the candidates' times a byte, and what a byte costs early and late in a text."""
    print(
        f"\n{record['name']}: greedy generation in fp32, {record['new_bytes']} bytes "
        f"after prompts of {record['prompt_bytes']:,}"
    )
    rows = []
    for candidate, times in record["contestants"].items():
        speed = f"{1000 / times['ms_per_byte']['median']:,.0f}"
        ratio = format_spread(times["time_ratio"])
        rows.append([candidate, format_spread(times["ms_per_byte"]), speed, ratio, times["same_text"]])
    print_table(["", "ms a byte [quartiles]", "bytes/s", "time by that of cached", "same text"], rows)
    if "drafts" in record:
        drafts = record["drafts"]
        share = drafts["accepted"] / drafts["drafted"]
        print(f"drafts: {share:.1%} of {drafts['drafted']:,} accepted, in {drafts['passes']:,} passes")
    for context, times in record["place_ms"].items():
        length = "rows of any length" if context == "None" else f"rows of {int(context):,} ids"
        print(
            f"reading a byte, {length}: {times[500]:.2f} ms about byte 500, {times[5000]:.2f} ms "
            f"about byte 5,000, {times[5000] / times[500]:.2f} times"
        )


def draw_scaling(path, record, name):
    """Draw step time by row length (both sweeps), speed by patch size, and step time by width."""
    # matplotlib takes a second to import, and only --scaling draws.
    from matplotlib.figure import Figure

    from blt.pictures import BLUE, GREY, ORANGE

    figure = Figure(figsize=(13, 4), layout="constrained")
    rows, patches, widths = figure.subplots(1, 3)

    lengths = record["row_bytes"]
    slope = record["slopes"]["step time of one row"]
    one_row = "one row" if slope is None else f"one row, slope {slope:.2f}"
    equal_bytes = f"{record['equal_bytes'][0]['step_bytes'] / 1024:.0f} KiB a step"
    equal_bytes_ms = median_ms(record["equal_bytes"])
    rows.loglog(lengths, equal_bytes_ms, "o-", base=2, color=GREY, label=equal_bytes)
    rows.loglog(lengths, median_ms(record["one_row"]), "o-", base=2, color=BLUE, label=one_row)
    rows.set(xlabel="row (bytes)", ylabel="training step (ms)")
    rows.legend(frameon=False)
    plain_ticks(rows.xaxis, lengths)
    plain_ticks(rows.yaxis)

    speeds = [point["bytes_per_second"] / 1e3 for point in record["patches"]]
    patches.plot(record["patch_sizes"], speeds, "o-", color=BLUE)
    patches.set(xlabel="patch size (bytes)", ylabel="training speed (kB/s)")
    patches.set_ylim(0)

    flops = [sum(point["flops_per_byte"].values()) / 1e6 for point in record["widths"]]
    widths_ms = median_ms(record["widths"])
    widths.loglog(flops, widths_ms, "o-", color=ORANGE)
    small = dict(textcoords="offset points", fontsize=8, color=GREY)
    for factor, x, y in zip(record["width_factors"], flops, widths_ms):
        widths.annotate(f"width x {factor:g}", (x, y), (6, -3), **small)
    widths.set(xlabel="forward FLOPs per byte (millions)", ylabel="training step (ms)")
    plain_ticks(widths.xaxis, flops)
    plain_ticks(widths.yaxis, widths_ms)

    for axes in (rows, patches, widths):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{name}: time against row length, patch size and width", parse_math=False)
    write_atomically(path, partial(figure.savefig, format="png", dpi=150))


def plain_ticks(axis, values=None):
    """Label a logarithmic axis with plain numbers instead of powers; values: where its ticks are."""
    if values is not None:
        axis.set_ticks(values)
        axis.set_ticks([], minor=True)
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 100 else f"{value:.3g}")
    axis.set_minor_formatter(lambda value, _: "")


# --------------------------------------------------------------------------------------------------
# The script


def make_job(name, config, device, precision):
    """The job of a name in --models."""
    model, row_bytes, batch_rows = find_model(name, config)
    return Job(
        kind="ours",
        name=name,
        model=model,
        row_bytes=row_bytes,
        batch_rows=batch_rows,
        patches=config.patches,
        config=config,
        device=str(device),
        precision=precision,
        threads=torch.get_num_threads(),
    )


def run_generation(jobs, out, config, device):
    """Measure generation with every model, and write the numbers."""
    out["generation"] = []
    for job in jobs:
        print(f"generating with {job.name}")
        record = bench_generation(job, config, device)
        out["generation"].append(record)
        print_generation(record)
    write_json(config.output, out)
    print(f"wrote {config.output}")


def run_scaling(job, out, config, peak):
    """Measure how one model scales, and draw it. Returns the picture's path."""
    print(f"\nscaling of {job.name}")
    out["scaling"] = bench_scaling(job, config, peak)
    for what, slope in out["scaling"]["slopes"].items():
        text = "not defined here" if slope is None else f"{slope:.2f} (1 is linear)"
        print(f"slope of log {what} by log row length: {text}")
    picture = scaling_picture(config)
    draw_scaling(picture, out["scaling"], job.name)
    write_json(config.output, out)
    return str(picture)


def scaling_picture(config):
    """Where the picture of --scaling goes: bench_scaling.png beside bench.json."""
    output = Path(config.output)
    return output.with_name(output.stem + "_scaling.png")


def main(config):
    """Measure what the config asks for, print it and write it."""
    # What is needed last is checked first.
    packages = ["transformers", "safetensors", "tokenizers"] if "transformers" in config.against else []
    check_packages(*packages, *(["matplotlib"] if config.scaling else []))
    read = [name for name in config.models if name.endswith(".json")]
    check_output(config.output, reads=read)
    check_written_by(config.output, "bench.py")
    if config.scaling:
        check_output(scaling_picture(config), reads=read)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    default_names = ["llm"] if device.type == "cpu" else ["llm", "llm_large"]
    jobs = [make_job(name, config, device, precision) for name in config.models or default_names]
    print_header(config, device, precision)
    peak, source = peak_flops(device, precision)
    print(f"peak {peak / 1e12:.3g} TFLOP/s in {precision}: {source}")
    is_cuda = device.type == "cuda"
    out = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": git_commit(),
        "torch": torch.__version__,
        "device": f"{device} ({torch.cuda.get_device_name(device)})" if is_cuda else str(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "peak_flops": peak,
        "peak_source": source,
        "settings": asdict(config),
        "models": [],
    }
    if config.generation:
        run_generation(jobs, out, config, device)
        return

    for job in jobs:
        print(
            f"measuring {job.name}: {config.warmup} + {config.repeats} steps of {config.accumulate} x "
            f"{job.batch_rows} rows of {job.row_bytes:,} bytes"
        )
        record = bench_model(job, config, peak)
        out["models"].append({**record, "model_config": asdict(job.model)})
    if config.entropy_pass:
        print("measuring the entropy pass")
        out["entropy_pass"] = bench_entropy_pass(config, device, precision, peak)
    if config.repatching:
        print("measuring the patching methods")
        out["patch_starts_bytes_per_second"] = bench_patching(config)
    print_results(out)
    write_json(config.output, out)

    for kind in config.against:
        for job, record in zip(jobs, out["models"]):
            against = bench_against(kind, job, record["bytes_per_patch"], config, peak)
            out.setdefault("against", []).append(against)
            print_against(against)
            # After each part, because the next may take long, or too much memory.
            write_json(config.output, out)
    files = [config.output]
    if config.scaling:
        files.append(run_scaling(jobs[0], out, config, peak))
    print("wrote " + ", ".join(files))


if __name__ == "__main__":
    run_script(main, BenchConfig, __doc__)
