"""Measure what training, the entropy pass and patching cost on this machine: one table, with the same numbers as JSON beside it.

Reads   the bundled sample (real text; weights are random)
Writes  bench.json; with --scaling also bench_scaling.png
Run     python bench.py [--models NAME ...] [--against transformers flat loop] [--scaling] [--field value ...]

    python bench.py                                          without a GPU: llm.py's cpu preset, 1 minute on 2 cores; with one:
                                                             llm.py and llm_large.py
    python bench.py --models llm:small llm_large:h200 --patches static:4.5
    python bench.py --models custom --global_layers 4 --hash_rows 500002 --row_bytes 16384 --batch_rows 1 --against transformers
    python bench.py --against transformers flat loop         ratios, each contestant taking its step in turn
    python bench.py --scaling                                against row length, patch size and width
    python bench.py --generation --models checkpoints/model.json --against transformers      bytes a second while text is written

Flags of the model (--encoder_dim, --window, --row_bytes, ...) change every model named; those left out (None) are as that model has them.

How it is measured
- A step is that of training.fit: rows to the device, `autocast`, `target_losses`, backward, clipping, the optimizers of `make_optimizers`;
  on CUDA under torch.compile. The clock is read after the device is done. Warm-up steps do not count; medians with quartiles do.
- Every model lives in a process of its own, so peak memory is its own: on CUDA the most that was allocated; on a CPU the largest
  resident set during the steps, less what was resident before the model was made.
- Side by side, the parent asks one process after the other for a step on the same rows, in changing order; those that wait sleep at
  a pipe. A ratio is the median of the ratios of each round, so that what slows the machine for a while slows both.
- MFU is FLOPs that the mathematics needs (flops.py; 3 forward passes a step, no padding) by the device's peak in the same precision.
"""

import json
import multiprocessing
import re
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from blt.checks import check, check_positive
from blt.config import print_header, print_table, run_script
from blt.corpus import open_corpus
from blt.device import autocast, choose_device, choose_precision, set_seed, synchronize, threads_for
from blt.entropies import stream_entropies
from blt.files import git_commit, write_json
from blt.flops import TRAINING, blt_flops, flat_shape_of_equal_flops, peak_flops, transformer_flops
from blt.ids import BOUNDARY
from blt.incremental import IncrementalBLT
from blt.loop import RunConfig
from blt.metric import target_losses
from blt.optimizers import backward, clip_gradients, make_optimizers, step_optimizers
from blt.patch_rules import METHODS, PatchConfig, patch_starts, threshold_for_patch_size
from blt.rows import BitArray, DocumentStream, TrainingRows
from blt_model import BLTConfig, BLTModel
from entropy_llm import PRESETS as ENTROPY_PRESETS
from entropy_llm import EntropyConfig, MinimalLLM
from entropy_patcher import EntropyPatcher
from llm import PRESETS as LLM_PRESETS
from llm import LLMConfig
from llm_large import PRESETS as LLM_LARGE_PRESETS
from llm_large import LLMLargeConfig

SCRIPTS = {"llm": (LLMConfig, LLM_PRESETS), "llm_large": (LLMLargeConfig, LLM_LARGE_PRESETS)}
AGAINST = ("transformers", "flat", "loop")
PHASES = {"forward_ms": "forward", "forward_backward_ms": "forward + backward", "step_ms": "whole step"}
TEXT_BYTES = 2_000_000  # of the sample's training text, for rows and patching
BATCHES = 8  # different batches, taken in turn
EAGER_SCORES = 1 << 29  # bytes of one layer's attention scores up to which transformers' eager attention is tried
HF_NEW_BYTES = 10  # that transformers writes in a round
LOGITS_TOLERANCE = 1e-3  # ours against transformers', fp32
TINY = BLTConfig(
    encoder_dim=32, global_dim=32, global_layers=1, decoder_dim=32, decoder_layers=1, hash_rows=16, window=16
)


@dataclass
class ModelFlags:
    # changes to every model named; None: as that model has it, and as BLTConfig (blt_model.py) in custom
    encoder_layers: int | None = None  # windowed transformer layers before the pooling
    encoder_dim: int | None = None  # width of the byte states
    encoder_heads: int | None = None  # attention heads
    ngram_sizes: list[int] | None = None  # bytes in the hashed n-grams
    hash_rows: int | None = None  # rows of each n-gram size's table
    pooling: str | None = None  # how a patch's bytes start its query: max or mean
    cross_attn_k: int | None = None  # vectors of encoder_dim that make up a patch
    cross_attn_all_layers_encoder: bool | None = None  # cross-attention after every encoder layer
    global_layers: int | None = None  # layers over patches
    global_dim: int | None = None  # width
    global_heads: int | None = None  # attention heads
    decoder_layers: int | None = None  # windowed transformer layers after the latent transformer
    decoder_dim: int | None = None  # width
    decoder_heads: int | None = None  # attention heads
    cross_attn_all_layers_decoder: bool | None = None  # cross-attention before every decoder layer
    window: int | None = None  # bytes that a byte attends to in the local layers, itself included
    rope_theta: float | None = None  # base of the rotary embedding's wavelengths
    norm_eps: float | None = None  # RMSNorm's epsilon
    qk_norm: bool | None = None  # RMSNorm of queries and keys in self-attention
    dropout: float | None = None  # dropout rate
    recompute: bool | None = None  # keep only each layer's input for the backward pass
    row_bytes: int | None = None  # ids in a row
    batch_rows: int | None = None  # rows in one forward and backward pass


@dataclass
class BenchConfig(ModelFlags):
    # what
    models: list[str] = field(
        default_factory=list
    )  # llm, llm_large, with presets as in llm:small:cpu; custom; or a model.json
    against: list[str] = field(
        default_factory=list
    )  # transformers (BltForCausalLM), flat (byte transformer of equal FLOPs), loop (Python loops)
    scaling: bool = False  # sweep row length, patch size and width of the first model
    generation: bool = (
        False  # time generation with each model (nothing else); a model.json's weights are read, others are random
    )
    entropy_pass: bool = True  # time the entropy models of entropy_llm.py (default and preset cpu)
    repatching: bool = True  # time the patching rules on cached entropies
    # rows
    patches: str = "space"  # space, static:BYTES, or random (geometric lengths of mean --patch_size)
    patch_size: float = 4.5  # bytes, mean of random patches; also what the patching rules are set to
    accumulate: int = 1  # forward and backward passes in one update
    data_cache: str = "data_cache"  # folder of the byte stores
    # machine and measurement
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "bf16", "fp16", "fp32"] = (
        "auto"  # auto: as training chooses; other contestants then take their fastest
    )
    compile: Literal["auto", "yes", "no"] = "auto"  # torch.compile; auto: on CUDA
    repeats: int = 7  # timed steps, or rounds
    warmup: int = 2  # steps before them; the first of them compiles
    streams: int | None = None  # streams side by side in the entropy pass; None: 4 on a CPU, 256 elsewhere
    seed: int = 1337  # weights, rows, random patches
    # generation
    prompt_bytes: int = 1000  # of held-out text
    new_bytes: int = 100  # bytes in a timed piece
    draft_bytes: int = 8  # bytes that the entropy model proposes at most, for the piece with self-speculation
    # scaling
    scaling_rows: list[int] = field(default_factory=lambda: [2**n for n in range(10, 16)])  # row lengths in bytes
    scaling_bytes: int = 32768  # bytes a step while the row length changes
    scaling_patches: list[int] = field(default_factory=lambda: [2, 3, 4, 6, 8, 12, 16])  # static patch sizes in bytes
    scaling_widths: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])  # factors of all widths
    # output
    output: str = "bench.json"  # where the numbers go

    def __post_init__(self):
        check_positive(
            self,
            "row_bytes",
            "batch_rows",
            "accumulate",
            "repeats",
            "warmup",
            "streams",
            "scaling_bytes",
            "prompt_bytes",
            "new_bytes",
            "draft_bytes",
        )
        check(self, "against", set(self.against) <= set(AGAINST), "among " + ", ".join(AGAINST))
        check(
            self,
            "patches",
            re.fullmatch(r"space|random|static:\d+(\.\d+)?", self.patches),
            "space, random or static:BYTES, as in static:4.5",
        )
        check(self, "patch_size", self.patch_size >= 1, "1 or more bytes")
        check(self, "output", self.output.endswith(".json"), "a file name in .json")
        for name in ("scaling_rows", "scaling_patches", "scaling_widths"):
            check(self, name, getattr(self, name) and min(getattr(self, name)) > 0, "numbers above 0")
        check(
            self,
            "scaling_rows",
            max(self.scaling_rows) <= self.scaling_bytes,
            f"at most scaling_bytes = {self.scaling_bytes}",
        )


@dataclass
class Job:
    """What a process of its own is to make and to run steps of. Its rows depend on its fields alone."""

    kind: str  # ours, or one of AGAINST
    name: str  # as it is printed
    model: BLTConfig
    row_bytes: int
    batch_rows: int
    patches: str  # as BenchConfig.patches
    config: BenchConfig
    device: str
    precision: str  # auto only where the fastest is to be found
    threads: int
    one_document: bool = False  # the text without boundaries: transformers has no document mask
    flat_shape: tuple | None = None  # flat: (dim, n_layers)


def find_model(name, config):
    """(BLTConfig, row_bytes, batch_rows) of a name in --models, with the command line's changes."""
    script, *presets = name.split(":")
    if name.endswith(".json"):
        if not Path(name).exists():
            raise FileNotFoundError(
                f"{name} not found; --models takes llm, llm_large, llm:PRESET, custom, or the model.json of a training run"
            )
        record = json.loads(Path(name).read_text())
        if not {"settings", "model_config"} <= set(record):
            raise ValueError(f"{name} is not the model.json of a training run: it has no settings and model_config")
        settings = asdict(BLTConfig()) | record["settings"] | record["model_config"]
    elif name == "custom":
        settings = asdict(BLTConfig()) | {"row_bytes": RunConfig.row_bytes, "batch_rows": RunConfig.batch_rows}
    elif script in SCRIPTS:
        script_config, known = SCRIPTS[script]
        settings = asdict(script_config())
        for preset in presets:
            if preset not in known:
                raise ValueError(
                    f"models has {name!r}, but {script}.py has no preset {preset!r}; it has {', '.join(known)}"
                )
            settings |= known[preset]
    else:
        raise ValueError(
            f"models has {name!r}; it must be {', '.join(SCRIPTS)}, one of them with presets (llm:small:cpu), custom, or a model.json"
        )
    settings |= {f.name: getattr(config, f.name) for f in fields(ModelFlags) if getattr(config, f.name) is not None}
    return (
        BLTConfig(**{f.name: settings[f.name] for f in fields(BLTConfig)}),
        settings["row_bytes"],
        settings["batch_rows"],
    )


def sample_documents(data_cache):
    """The first TEXT_BYTES of the bundled sample's training documents: list of uint8 arrays."""
    corpus = open_corpus("sample", cache_dir=data_cache)
    return [corpus.document(number) for number in corpus.documents("train", TEXT_BYTES)]


def make_rows(job):
    """`TrainingRows` of the sample, patched as the job says."""
    documents = sample_documents(job.config.data_cache)
    if job.one_document:
        documents = [np.concatenate(documents)]
    if job.patches == "random":
        generator = np.random.default_rng(job.config.seed)
        pieces = [generator.random(len(document) + 1) < 1 / job.config.patch_size for document in documents]
        for piece in pieces:
            piece[0] = True
    else:
        method, _, size = job.patches.partition(":")
        patcher = EntropyPatcher(None, PatchConfig(method, float(size or 1)))
        pieces = [patcher.starts(document) for document in documents]
    starts = BitArray()
    starts.append(np.concatenate([[True], *pieces]))
    starts.close()
    return TrainingRows(DocumentStream.of_documents(documents), job.row_bytes, starts)


class Runner:
    """Lives in its own process: makes the job's rows and model, then runs steps when asked."""

    def __init__(self, job):
        config, self.job, self.device = job.config, job, torch.device(job.device)
        rows = make_rows(job)
        self.batches = [
            rows.shuffled_batch(i, job.batch_rows, config.seed) for i in range(max(BATCHES, config.accumulate))
        ]
        targets = sum(batch.targets for batch in self.batches)
        padding_patches = sum(
            int((~batch.is_scored).any(1).sum()) for batch in self.batches
        )  # one in a row that is not full
        patches = sum(int((batch.patch_lengths > 0).sum()) for batch in self.batches) - padding_patches
        if self.device.type == "cuda":
            self.batches = [batch.pin() for batch in self.batches]
        self.before = memory(self.device)
        set_seed(config.seed)
        self.run_config = RunConfig()
        setting, tried = self._choose(self._make())
        self.facts = {
            "kind": job.kind, "setting": setting, "tried": tried, "parameters": sum(p.numel() for p in self.model.parameters()),
            "row_bytes": job.row_bytes, "batch_rows": job.batch_rows, "patch_slots": rows.patch_slots, "bytes_per_patch": targets / patches,
            "step_bytes": float(np.mean([batch.bytes for batch in self.batches])) * config.accumulate, "padding": dict(zip(("bytes", "patches"), rows.padding())),
        }  # fmt: skip
        reset_peak(self.device)

    def _make(self):
        """Make the model, its optimizers and `self.nats(batch)`. Returns the settings to choose from: {name: (precision, prepare)}."""
        job, device = self.job, self.device
        is_compiled = job.config.compile == "yes" or (job.config.compile == "auto" and device.type == "cuda")
        precisions = [job.precision] if job.precision != "auto" else sorted({"fp32", choose_precision("auto", device)})
        if job.kind == "flat":
            from template_llm import FlatByteTransformer, FlatConfig

            dim, n_layers = job.flat_shape
            self.model = FlatByteTransformer(FlatConfig(dim=dim, n_layers=n_layers, window=job.model.window))
        else:
            self.model = BLTModel(job.model)
        if job.kind == "transformers":
            return self._make_transformers(precisions, is_compiled)
        self.model.to(device)
        self.optimizers = make_optimizers(self.model, self.run_config)
        if job.kind == "loop":
            from blt.plain_blt import plain_logits

            self.nats = lambda batch: target_losses(lambda *inputs: plain_logits(self.model, *inputs), batch)[0]
            return {precision: (precision, lambda: None) for precision in precisions}
        step_model = torch.compile(self.model) if is_compiled else self.model
        drop = {"patch_lengths": None} if job.kind == "flat" else {}
        self.nats = lambda batch: target_losses(step_model, replace(batch, **drop))[0]
        return {job.precision + (", compiled" if is_compiled else ""): (job.precision, lambda: None)}

    def _make_transformers(self, precisions, is_compiled):
        from convert_hf import HF_END, HF_FIRST_BYTE, OUTPUT_ROWS, to_hf_ids, to_transformers

        self.model = to_transformers(self.model).to(
            self.device
        )  # the weights that our contestant draws from the same seed
        self.optimizers = [
            torch.optim.AdamW(self.model.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        ]
        self.hf_logits = lambda batch: (
            self.model(
                input_ids=to_hf_ids(batch.ids[:, :-1]), patch_lengths=batch.patch_lengths, use_cache=False
            ).logits
        )
        self.logits_rows = OUTPUT_ROWS
        forward = self.model.forward

        def nats(batch):
            targets = batch.ids[:, 1:]
            targets = torch.where(targets == BOUNDARY, HF_END, targets + HF_FIRST_BYTE).masked_fill(
                ~batch.is_scored, -100
            )
            logits = self.hf_logits(batch)
            return F.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none"
            ).view_as(targets)

        def prepare(attention, compiled):
            self.model.set_attn_implementation(
                dict.fromkeys(("", "encoder_config", "global_config", "decoder_config"), attention)
            )
            self.model.forward = torch.compile(forward) if compiled else forward

        self.nats = nats
        # Its eager attention keeps several row-by-row matrices a layer: beyond this it only runs out of memory.
        scores_bytes = 4 * self.job.batch_rows * self.job.model.heads("decoder") * self.job.row_bytes**2
        attentions = ("sdpa", "eager") if scores_bytes < EAGER_SCORES else ("sdpa",)
        return {
            f"{precision}, {attention}" + (", compiled" if compiled else ""): (precision, lambda a=attention, c=compiled: prepare(a, c))
            for precision in precisions for attention in attentions for compiled in sorted({False, is_compiled})
        }  # fmt: skip

    def _choose(self, settings):
        """Take the only setting, or the fastest: each runs forward and backward twice, and the second counts.

        A setting whose first run takes 1.5 times the best so far and is not compiled is given up after it.
        """
        tried, self.model = {}, self.model.train()
        for name, (self.precision, prepare) in settings.items() if len(settings) > 1 else ():
            try:
                prepare()
                for _ in range(2):
                    synchronize(self.device)
                    tick = time.perf_counter()
                    self._loss(self.batches[0], 1).backward()
                    synchronize(self.device)
                    tried[name] = time.perf_counter() - tick
                    self.model.zero_grad(set_to_none=True)
                    others = [
                        seconds for other, seconds in tried.items() if other != name and not isinstance(seconds, str)
                    ]
                    if "compiled" not in name and others and tried[name] > 1.5 * min(others):
                        break
            except Exception as error:  # whatever a setting fails with, another may work
                tried[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                self.model.zero_grad(set_to_none=True)
        works = {name: seconds for name, seconds in tried.items() if not isinstance(seconds, str)}
        if tried and not works:
            raise ValueError(f"no setting of {self.job.kind} works here: {tried}")
        best = min(works, key=works.get) if works else next(iter(settings))
        self.precision, prepare = settings[best]
        prepare()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        return best, tried

    def _loss(self, batch, targets):
        with autocast(self.device, self.precision):
            return self.nats(batch.to(self.device)).sum() / targets

    def step(self, number):
        """One update, as in training.fit: seconds of forward, backward and update, and the loss in nats."""
        accumulate = self.job.config.accumulate
        batches = [self.batches[(number * accumulate + i) % len(self.batches)] for i in range(accumulate)]
        targets, seconds, total = sum(batch.targets for batch in batches), [0.0, 0.0, 0.0], 0.0
        synchronize(self.device)
        tick = time.perf_counter()

        def lap(phase):
            nonlocal tick
            synchronize(self.device)
            now = time.perf_counter()
            seconds[phase] += now - tick
            tick = now

        for batch in batches:
            loss = self._loss(batch, targets)
            lap(0)
            backward(self.model, loss, self.scaler)
            total = total + loss.detach()
            lap(1)
        clip_gradients(self.model, self.optimizers, self.scaler, self.run_config.clip)
        step_optimizers(self.optimizers, self.scaler)
        lap(2)
        return seconds, total.item()

    @torch.no_grad()
    def logits(self):
        """fp32 logits of the first row's scored places, float32 [places, 257], before any step."""
        first = self.batches[0]
        first = replace(
            first, ids=first.ids[:1], is_scored=first.is_scored[:1], patch_lengths=first.patch_lengths[:1]
        ).to(self.device)
        self.model.eval()
        if self.job.kind == "transformers":
            logits = self.hf_logits(first)[..., self.logits_rows]
        else:
            logits = self.model(first.ids[:, :-1], first.patch_lengths)
        self.model.train()
        return logits[first.is_scored].float().cpu().numpy()

    def memory(self):
        """{"peak_bytes" over the steps so far, less what was there before the model; "state_bytes" of weights and optimizers}."""
        states = [
            x
            for o in self.optimizers
            for state in o.state.values()
            for x in state.values()
            if isinstance(x, torch.Tensor)
        ]
        state_bytes = sum(x.numel() * x.element_size() for x in [*self.model.parameters(), *states])
        return {"peak_bytes": memory(self.device, peak=True) - self.before, "state_bytes": state_bytes}


def memory(device, peak=False):
    """Bytes in use now, or at the most since `reset_peak`: allocated on CUDA, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return 0  # not known without Linux's /proc
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)" if peak else r"VmRSS:\s+(\d+)", status.read_text())[1])


def reset_peak(device):
    """Begin to look for the peak anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # sets the largest resident set to the present one


def serve(pipe, job):
    """A process's whole life: make the `Runner`, send its facts, answer questions (method, *arguments) until the pipe closes."""
    try:
        torch.set_num_threads(job.threads)
        if (
            job.device == "cpu"
        ):  # a tiny model's step first: what libraries load at their first use is not the model's memory
            Runner(
                replace(
                    job,
                    model=TINY,
                    flat_shape=(32, 1),
                    row_bytes=64,
                    batch_rows=1,
                    config=replace(job.config, compile="no"),
                )
            ).step(0)
        runner = Runner(job)
        pipe.send((True, runner.facts))
        while True:
            method, *arguments = pipe.recv()
            pipe.send((True, getattr(runner, method)(*arguments)))
    except (EOFError, KeyboardInterrupt):
        pass  # the parent has all it wanted
    except Exception as error:
        pipe.send((False, f"{type(error).__name__}: {error}"))


class Worker:
    """The parent's end of a process that runs a job. `with Worker(job) as worker: worker.ask("step", 0)`."""

    def __init__(self, job):
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(
                ["torch._dynamo"]
            )  # a clean process that only imports torch; workers begin as copies of it
        self.job, (self.pipe, theirs) = job, context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, job), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self):
        self.facts = self.ask()
        return self

    def __exit__(self, *exception):
        self.pipe.close()
        self.process.join(30)
        if self.process.is_alive():
            self.process.kill()

    def ask(self, *question):
        """Send (method, arguments), unless the answer is under way already as at the start, and wait for the answer."""
        try:
            if question:
                self.pipe.send(question)
            is_good, answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise ValueError(
                f"the process of {self.job.name} ({self.job.kind}) was ended, as when memory runs out; lower --batch_rows, --row_bytes or --hash_rows"
            ) from None
        if not is_good:
            raise ValueError(f"{self.job.name} ({self.job.kind}): {answer}")
        return answer


def measure(jobs, config):
    """Run steps of all jobs in turn, the order changing each round.

    Returns for each job {"facts", "seconds": [rounds, 3] until forward, backward and update were done, "first_s", "memory"}, and
    for two jobs of which the second is transformers the largest difference of their logits, else None.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(job)) for job in jobs]
        difference = None
        if jobs[-1].kind == "transformers":
            difference = float(np.abs(workers[0].ask("logits") - workers[1].ask("logits")).max())
            if not difference < LOGITS_TOLERANCE:
                raise ValueError(
                    f"our logits and transformers' differ by {difference:.1e} (allowed: {LOGITS_TOLERANCE}): a comparison would mean nothing"
                )
        seconds, first = [[] for _ in jobs], [None] * len(jobs)
        for round_number in range(config.warmup + config.repeats):
            for i in range(len(jobs))[:: 1 if round_number % 2 else -1]:
                phases, loss = workers[i].ask("step", round_number)
                if not np.isfinite(loss):
                    raise ValueError(
                        f"the loss of {jobs[i].name} ({jobs[i].kind}) is {loss} after {round_number + 1} steps; try --precision fp32"
                    )
                if round_number == 0:
                    first[i] = sum(phases)
                if round_number >= config.warmup:
                    seconds[i].append(np.cumsum(phases))
        results = [
            {"facts": worker.facts, "seconds": np.array(s), "first_s": f, "memory": worker.ask("memory")}
            for worker, s, f in zip(workers, seconds, first)
        ]  # fmt: skip
    return results, difference


def spread(values):
    """{"median", "q1", "q3", "n"} of some numbers."""
    q1, median, q3 = np.percentile(values, (25, 50, 75))
    return {"median": float(median), "q1": float(q1), "q3": float(q3), "n": len(values)}


def describe(job, result, flops, peak):
    """A measured training step as a dict of numbers; flops: forward FLOPs per byte by part."""
    facts, seconds = result["facts"], result["seconds"]
    ms = {key: spread(1000 * seconds[:, i]) for i, key in enumerate(PHASES)}
    forward, _, step = (np.median(seconds[:, i]) for i in range(3))
    per_byte, n = sum(flops.values()), facts["step_bytes"]
    return {
        "name": job.name, **facts, **ms, "bytes_per_second": n / step, "forward_bytes_per_second": n / forward, "flops_per_byte": flops,
        "mfu": TRAINING * per_byte * n / step / peak, "forward_mfu": per_byte * n / forward / peak, **result["memory"],
        "compile_s": result["first_s"] - step if "compiled" in facts["setting"] else None,
    }  # fmt: skip


def bench_model(job, config, peak):
    """One model alone."""
    (result,), _ = measure([job], config)
    return describe(job, result, blt_flops(job.model, result["facts"]["bytes_per_patch"], job.row_bytes), peak)


def bench_against(kind, job, bytes_per_patch, config, peak):
    """Our model and another contestant, step by step in turn; ratios above 1 are in our favour."""
    ours = replace(job, one_document=kind == "transformers")
    theirs = replace(ours, kind=kind, precision=config.precision if kind in ("transformers", "loop") else job.precision)
    if kind == "flat":
        wanted = sum(blt_flops(job.model, bytes_per_patch, job.row_bytes).values())
        theirs.flat_shape = flat_shape_of_equal_flops(wanted, job.row_bytes, job.model.window)
    (a, b), difference = measure([ours, theirs], config)
    flops = blt_flops(job.model, a["facts"]["bytes_per_patch"], job.row_bytes)
    their_flops = (
        transformer_flops(*theirs.flat_shape, BOUNDARY + 1, job.row_bytes, job.model.window)
        if kind == "flat"
        else flops
    )
    ratios = {key: spread(b["seconds"][:, i] / a["seconds"][:, i]) for i, key in enumerate(PHASES)}
    flops_ratio = sum(their_flops.values()) / sum(flops.values())
    return {
        "kind": kind, "ours": describe(ours, a, flops, peak), "theirs": describe(theirs, b, their_flops, peak), "time_ratio": ratios,
        "memory_ratio": b["memory"]["peak_bytes"] / a["memory"]["peak_bytes"] if a["memory"]["peak_bytes"] > 0 else None, "logits_difference": difference, "flat_shape": theirs.flat_shape,
        "flops_ratio": flops_ratio, "mfu_ratio": spread(b["seconds"][:, 2] / a["seconds"][:, 2] / flops_ratio) if kind == "flat" else None,
    }  # fmt: skip


def bench_entropy_pass(config, device, precision, peak):
    """Bytes a second of `stream_entropies`: documents of equal length, one a lane, so that no lane reads anything twice."""
    streams = config.streams or (4 if device.type == "cpu" else 256)
    length = 2048 * (2 if device.type == "cpu" else 8) - 1  # with the place of its end whole chunks
    text = np.concatenate(sample_documents(config.data_cache))
    stream = DocumentStream.of_documents([np.roll(text, -i * length)[:length] for i in range(streams)])
    out = []
    for name, preset in (("default", {}), ("cpu", ENTROPY_PRESETS["cpu"])):
        c = EntropyConfig(**preset)
        set_seed(config.seed)
        model, seconds = MinimalLLM(c).to(device).eval(), []
        for _ in range(1 + min(3, config.repeats)):
            tick = time.perf_counter()
            stream_entropies(model, stream, streams, precision=precision)  # ends on the CPU, so the clock is honest
            seconds.append(time.perf_counter() - tick)
        flops = transformer_flops(c.d_model, c.n_layers, c.vocab_size, length + 1, c.max_seq_len)
        speed = stream.total_bytes / np.array(seconds[1:])
        out.append({
            "name": name, "size": f"{c.n_layers} x {c.d_model}, window {c.max_seq_len}", "streams": streams, "bytes": stream.total_bytes, "bytes_per_second": spread(speed),
            "flops_per_byte": flops, "mfu": float(np.median(speed)) * sum(flops.values()) / peak,
        })  # fmt: skip
    return out


def bench_patching(config):
    """Raw text bytes a second of `patch_starts` on one core, float16 entropies to starts: {method: spread}."""
    stream = DocumentStream.of_documents(sample_documents(config.data_cache))
    n = stream.total_bytes + len(stream.lengths)  # a place for each byte and each end
    H = np.random.default_rng(config.seed).gamma(1.0, 1.0, n).astype(np.float16)
    document_starts = np.zeros(n, dtype=bool)
    document_starts[stream.ends - stream.lengths - 1] = True
    byte_values = stream.ids(1, n + 1).astype(np.uint8)
    out = {}
    for method in METHODS:
        if method == "bpe":  # its starts come from a tokenizer
            continue
        threshold = 0.0 if method == "space" else threshold_for_patch_size(H[:200_000], method, config.patch_size)
        speeds = []
        for _ in range(1 + config.repeats):
            tick = time.perf_counter()
            patch_starts(H, method, threshold, byte_values=byte_values, document_starts=document_starts)
            speeds.append(stream.total_bytes / (time.perf_counter() - tick))
        out[method] = spread(speeds[1:])
    return out


def log_slope(x, y):
    """Slope of the line through log y by log x: 1 for y proportional to x, 2 for its square; None if there is no such line."""
    is_line = len(set(x)) > 1 and min(y) > 0
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if is_line else None


def bench_scaling(job, config, peak):
    """Sweeps of one model: row length (at equal bytes a step, and one row alone), patch size, width; slopes of log time by log length."""
    known, factors = {}, config.scaling_widths

    def point(row_bytes, batch_rows, patches=job.patches, width=1.0):
        key = (row_bytes, batch_rows, patches, width)
        if key not in known:
            widths = {
                f"{part}_dim": max(64, 64 * round(width * getattr(job.model, f"{part}_dim") / 64))
                for part in ("encoder", "global", "decoder")
            }
            heads = {f"{part}_heads": None for part in ("encoder", "global", "decoder")}
            model = job.model if width == 1.0 else replace(job.model, **widths, **heads)
            name = f"{batch_rows} x {row_bytes:,} bytes, {patches}, width {width:g}"
            known[key] = bench_model(
                replace(job, name=name, model=model, row_bytes=row_bytes, batch_rows=batch_rows, patches=patches),
                config,
                peak,
            )
            made = known[key]
            activations = made["activation_bytes"] = made["peak_bytes"] - made["state_bytes"]
            print(
                f"  {name}: step {made['step_ms']['median']:,.0f} ms, {made['bytes_per_second'] / 1e3:.1f} kB/s, activations {activations / 1e6:,.0f} MB"
            )
        return known[key]

    rows = config.scaling_rows
    out = {
        "row_bytes": rows, "equal_bytes": [point(n, config.scaling_bytes // n) for n in rows], "one_row": [point(n, 1) for n in rows],
        "patch_sizes": config.scaling_patches, "patches": [point(job.row_bytes, job.batch_rows, f"static:{n}") for n in config.scaling_patches],
        "width_factors": factors, "widths": [point(job.row_bytes, job.batch_rows, width=factor) for factor in factors],
    }  # fmt: skip

    one_row, rows_in_step = out["one_row"], [config.scaling_bytes // n for n in rows]
    out["slopes"] = {  # 1: linear in the row's length, 2: quadratic
        "step time of one row": log_slope(rows, [p["step_ms"]["median"] for p in one_row]),
        "forward and backward of one row": log_slope(rows, [p["forward_backward_ms"]["median"] for p in one_row]),
        "time a row, at equal bytes a step": log_slope(
            rows, [p["step_ms"]["median"] / n for p, n in zip(out["equal_bytes"], rows_in_step)]
        ),
        "peak memory of one row without weights and optimizers": log_slope(
            rows, [p["activation_bytes"] for p in one_row]
        ),
    }
    return out


def bench_generation(name, job, config, device):
    """Milliseconds a byte of greedy generation in fp32 after held-out prompts: cached, with drafts, by transformers without its cache.

    Contestants write in turn, each round after another prompt, on one CPU thread (transformers: on all, and on one). The time of the prompt is left
    out. Also the time to read a byte about places 500 and 5,000 of one text: once as it is, and with rows of at most 1,024 ids.
    """
    from blt.sampling import SamplingConfig
    from generate import Generator

    set_seed(config.seed)
    if name.endswith(".json"):
        from save_entropy_model import load_blt

        model, patcher, _ = load_blt(Path(name).parent, device)
    else:
        model, entropy_model = (
            BLTModel(job.model).to(device).eval(),
            MinimalLLM(EntropyConfig(**ENTROPY_PRESETS["cpu"])).to(device).eval(),
        )
        H = EntropyPatcher(entropy_model).entropies(np.concatenate(sample_documents(config.data_cache))[:20_000])
        patcher = EntropyPatcher(
            entropy_model, threshold=threshold_for_patch_size(H, "global", config.patch_size), method="global"
        )
    corpus = open_corpus("sample", cache_dir=config.data_cache)
    text = np.concatenate([corpus.document(number) for number in corpus.documents("validation")])
    prompts = [text[i * 20_000 :][: config.prompt_bytes].tobytes() for i in range(config.warmup + config.repeats)]
    seconds, written, drafts = {}, {}, [0, 0, 0]

    def write(who, prompt, draft_bytes):
        with threads_for(1):
            generator = Generator(model, patcher, [prompt], config.new_bytes, SamplingConfig(), draft_bytes=draft_bytes)
            steps = generator.steps()
            next(steps)
            synchronize(device)
            tick = time.perf_counter()
            for _ in steps:
                pass
            synchronize(device)
        new = generator.samplers[0].final_bytes()
        seconds.setdefault(who, []).append((time.perf_counter() - tick) / max(1, len(new) - 1))
        written.setdefault(who, []).append(new)
        if draft_bytes and len(seconds[who]) > config.warmup:
            for i, count in enumerate((generator.drafted, generator.accepted, generator.passes)):
                drafts[i] += count

    contestants = {"cached": lambda prompt: write("cached", prompt, 0)}
    if patcher.entropy_model is not None:
        contestants[f"cached, {config.draft_bytes} drafts"] = lambda prompt: write(
            f"cached, {config.draft_bytes} drafts", prompt, config.draft_bytes
        )
    if "transformers" in config.against:
        from convert_hf import HF_FIRST_BYTE, to_hf_ids, to_transformers

        hf_model = to_transformers(model, patcher.entropy_model, patcher.config)

        def write_by_transformers(who, prompt, threads):
            ids = to_hf_ids(torch.tensor([[BOUNDARY, *prompt]], device=device))
            tick = time.perf_counter()
            with threads:
                made = hf_model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=HF_NEW_BYTES,
                    do_sample=False,
                    use_cache=False,
                )[0, ids.shape[1] :]
                synchronize(device)
            seconds.setdefault(who, []).append(
                (time.perf_counter() - tick) / len(made)
            )  # each a full pass, the first too
            written.setdefault(who, []).append(bytes((made - HF_FIRST_BYTE).clamp(0, 255).tolist()))

        contestants["transformers"] = lambda prompt: write_by_transformers("transformers", prompt, nullcontext())
        contestants["transformers, one thread"] = lambda prompt: write_by_transformers(
            "transformers, one thread", prompt, threads_for(1)
        )
    for number, prompt in enumerate(prompts):
        for who in list(contestants)[:: 1 if number % 2 else -1]:
            contestants[who](prompt)
    out = {
        "name": name,
        "patch_config": asdict(patcher.config),
        "prompt_bytes": config.prompt_bytes,
        "new_bytes": config.new_bytes,
        "contestants": {},
    }
    reference = seconds["cached"][config.warmup :]
    for who, all_seconds in seconds.items():
        timed = all_seconds[config.warmup :]
        same = [
            new.startswith(old[: len(new)]) or old.startswith(new) for new, old in zip(written["cached"], written[who])
        ]
        out["contestants"][who] = {
            "ms_per_byte": spread(1000 * np.array(timed)), "time_ratio": spread(np.array(timed) / np.array(reference)), "same_text": f"{sum(same)} of {len(same)}",
        }  # fmt: skip
    if drafts[0]:
        out["drafts"] = dict(zip(("drafted", "accepted", "passes"), drafts))
    out["place_ms"] = {}
    for context in (None, 1024):
        with threads_for(1):
            reader, times = IncrementalBLT(model, patcher, 1, context), []
            for identity in [BOUNDARY, *text[:5_200].tolist()]:
                tick = time.perf_counter()
                reader.extend(np.array([[identity]]))
                synchronize(device)
                times.append(1000 * (time.perf_counter() - tick))
        out["place_ms"][str(context)] = {
            place: float(np.mean(times[place - 200 : place + 200])) for place in (500, 5000)
        }
    return out


def ms(values):
    return f"{values['median']:,.0f}" if values["median"] >= 100 else f"{values['median']:.1f}"


def between(values, digits=2):
    return f"{values['median']:.{digits}f} [{values['q1']:.{digits}f}, {values['q3']:.{digits}f}]"


def print_results(out):
    """The one table: training steps, entropy passes and patching rules, '-' where a column does not apply."""
    header = [
        "",
        "batch",
        "forward",
        "fwd+bwd",
        "step [quartiles] ms",
        "speed",
        "memory",
        "FLOPs/byte",
        "MFU fwd",
        "MFU step",
        "padding byte, patch",
        "compile",
    ]
    rows = []
    for m in out["models"]:
        step = m["step_ms"]
        rows.append([
            f"train {m['name']}", f"{m['batch_rows']} x {m['row_bytes']:,} / {m['bytes_per_patch']:.2f}", ms(m["forward_ms"]), ms(m["forward_backward_ms"]),
            f"{ms(step)} [{step['q1']:,.0f}, {step['q3']:,.0f}]", f"{m['bytes_per_second'] / 1e3:,.1f} kB/s", f"{m['peak_bytes'] / 1e6:,.0f} MB",
            f"{sum(m['flops_per_byte'].values()) / 1e6:.2f}M", f"{m['forward_mfu']:.1%}", f"{m['mfu']:.1%}",
            f"{m['padding']['bytes']:.1%}, {m['padding']['patches']:.1%}", "-" if m["compile_s"] is None else f"{m['compile_s']:.0f} s",
        ])  # fmt: skip
    for e in out.get("entropy_pass", []):
        rows.append([
            f"entropies, {e['name']} ({e['size']})", f"{e['streams']} streams", "-", "-", "-", f"{e['bytes_per_second']['median'] / 1e3:,.1f} kB/s", "-",
            f"{sum(e['flops_per_byte'].values()) / 1e6:.2f}M", f"{e['mfu']:.1%}", "-", "-", "-",
        ])  # fmt: skip
    for method, speed in out.get("patch_starts_bytes_per_second", {}).items():
        rows.append(
            [f"patch starts, {method} (one core)", "-", "-", "-", "-", f"{speed['median'] / 1e6:,.0f} MB/s", *["-"] * 6]
        )
    print()
    print_table(header, rows)
    print("forward, fwd+bwd: median ms; batch: rows x bytes / bytes a patch; FLOPs/byte: one forward pass")
    for m in out["models"]:
        total = sum(m["flops_per_byte"].values())
        parts = ", ".join(
            f"{part} {value / 1e6:.3f}M ({value / total:.0%})" for part, value in m["flops_per_byte"].items()
        )
        print(f"forward FLOPs per byte of {m['name']}: {total / 1e6:.3f}M = {parts}")


def print_against(r):
    a, b, kind = r["ours"], r["theirs"], r["kind"]
    print(
        f"\n{a['name']} against {kind}, {a['batch_rows']} x {a['row_bytes']:,} bytes, {a['bytes_per_patch']:.2f} a patch, {a['step_ms']['n']} rounds"
    )
    print(f"settings: ours {a['setting']}; {kind} {b['setting']}")
    for name, seconds in b["tried"].items():
        print(
            f"  tried {name}: "
            + (seconds if isinstance(seconds, str) else f"{1000 * seconds:,.0f} ms forward and backward")
        )
    if r["logits_difference"] is not None:
        print(
            f"logits with equal weights and patches agree to {r['logits_difference']:.1e} (fp32, {a['row_bytes']:,} bytes)"
        )
    rows = []
    for key, phase in PHASES.items():
        rows.append([phase, f"{ms(a[key])} ms", f"{ms(b[key])} ms", between(r["time_ratio"][key])])
    rows.append(
        [
            "peak memory",
            f"{a['peak_bytes'] / 1e6:,.0f} MB",
            f"{b['peak_bytes'] / 1e6:,.0f} MB",
            "-" if r["memory_ratio"] is None else f"{r['memory_ratio']:.2f}",
        ]
    )
    if kind == "flat":
        dim, layers = r["flat_shape"]
        rows.append(["MFU of a step", f"{a['mfu']:.1%}", f"{b['mfu']:.1%}", between(r["mfu_ratio"]) + " (ours / flat)"])
        print(f"flat: {layers} layers of {dim}, {r['flops_ratio']:.3f} times our FLOPs per byte")
    print_table(["", "ours", kind, "ratio [quartiles]"], rows)


def print_generation(g):
    print(f"\n{g['name']}: greedy generation in fp32, {g['new_bytes']} bytes after prompts of {g['prompt_bytes']:,}")
    rows = [
        [
            who,
            between(c["ms_per_byte"]),
            f"{1000 / c['ms_per_byte']['median']:,.0f}",
            between(c["time_ratio"]),
            c["same_text"],
        ]
        for who, c in g["contestants"].items()
    ]
    print_table(["", "ms a byte [quartiles]", "bytes/s", "time by that of cached", "same text"], rows)
    if "drafts" in g:
        d = g["drafts"]
        print(f"drafts: {d['accepted'] / d['drafted']:.1%} of {d['drafted']:,} accepted, in {d['passes']:,} passes")
    for context, times in g["place_ms"].items():
        rows = "rows of any length" if context == "None" else f"rows of {int(context):,} ids"
        print(
            f"reading a byte, {rows}: {times[500]:.2f} ms about byte 500, {times[5000]:.2f} ms about byte 5,000, {times[5000] / times[500]:.2f} times"
        )


def draw_scaling(path, s, name):
    """Three panels: step time by row length (both sweeps), speed by patch size, step time by width."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    from blt.pictures import BLUE, GREY, ORANGE, _bare, _save

    figure = Figure(figsize=(13, 4), layout="constrained")
    rows, patches, widths = _bare(*figure.subplots(1, 3))
    step = lambda points: [p["step_ms"]["median"] for p in points]  # noqa: E731
    x, slope = np.array(s["row_bytes"]), s["slopes"]["step time of one row"]
    rows.loglog(
        x,
        step(s["equal_bytes"]),
        "o-",
        color=GREY,
        base=2,
        label=f"{s['equal_bytes'][0]['step_bytes'] / 1024:.0f} KiB a step",
    )
    rows.loglog(
        x,
        step(s["one_row"]),
        "o-",
        color=BLUE,
        base=2,
        label="one row" + ("" if slope is None else f", slope {slope:.2f}"),
    )
    rows.set_xlabel("row (bytes)")
    rows.set_ylabel("training step (ms)")
    patches.plot(
        s["patch_sizes"], [p["bytes_per_second"] / 1e3 for p in s["patches"]], "o-", color=BLUE, label="measured"
    )
    patches.set_ylim(0)
    patches.set_xlabel("patch size (bytes)")
    patches.set_ylabel("training speed (kB/s)")
    flops = [sum(p["flops_per_byte"].values()) / 1e6 for p in s["widths"]]
    widths.loglog(flops, step(s["widths"]), "o-", color=ORANGE, label="measured")
    for factor, at, y in zip(s["width_factors"], flops, step(s["widths"])):
        widths.annotate(f"width x {factor:g}", (at, y), (6, -3), textcoords="offset points", fontsize=8, color=GREY)
    widths.set_xlabel("forward FLOPs per byte (millions)")
    widths.set_ylabel("training step (ms)")
    for axes in (rows, patches, widths):
        axes.grid(alpha=0.3)
    for axis in (rows.xaxis, rows.yaxis, widths.xaxis, widths.yaxis):  # plain numbers, not powers
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 100 else f"{value:.3g}")
        axis.set_minor_formatter(NullFormatter())
    for axis, values in ((rows.xaxis, x), (widths.xaxis, flops), (widths.yaxis, step(s["widths"]))):
        axis.set_ticks([float(f"{value:.3g}") for value in values] if axis is not rows.xaxis else values)
        axis.set_minor_locator(NullLocator())
    rows.legend(frameon=False)
    figure.suptitle(f"{name}: time against row length, patch size and width", parse_math=False)
    return _save(path, figure)


def main(config):
    device = choose_device(config.device)
    precision, threads = choose_precision(config.precision, device), torch.get_num_threads()
    names = config.models or (["llm:cpu"] if device.type == "cpu" else ["llm", "llm_large"])
    jobs = []
    for name in names:
        model, row_bytes, batch_rows = find_model(name, config)
        jobs.append(
            Job("ours", name, model, row_bytes, batch_rows, config.patches, config, str(device), precision, threads)
        )
    machine = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    print_header(config, device, precision)
    peak, source = peak_flops(device, precision)
    print(f"peak {peak / 1e12:.3g} TFLOP/s in {precision}: {source}")
    out = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": git_commit(), "torch": torch.__version__, "device": machine,
        "threads": threads, "precision": precision, "peak_flops": peak, "peak_source": source, "settings": asdict(config), "models": [],
    }  # fmt: skip
    if config.generation:
        out["generation"] = []
        for job in jobs:
            print(f"generating with {job.name}")
            out["generation"].append(bench_generation(job.name, job, config, device))
            print_generation(out["generation"][-1])
        write_json(config.output, out)
        print(f"wrote {config.output}")
        return
    for job in jobs:
        print(
            f"measuring {job.name}: {config.warmup} + {config.repeats} steps of {config.accumulate} x {job.batch_rows} rows of {job.row_bytes:,} bytes"
        )
        out["models"].append({**bench_model(job, config, peak), "model_config": asdict(job.model)})
    if config.entropy_pass:
        print("measuring the entropy pass")
        out["entropy_pass"] = bench_entropy_pass(config, device, precision, peak)
    if config.repatching:
        print("measuring the patching rules")
        out["patch_starts_bytes_per_second"] = bench_patching(config)
    print_results(out)
    write_json(config.output, out)
    for kind in config.against:
        for job, made in zip(jobs, out["models"]):
            out.setdefault("against", []).append(bench_against(kind, job, made["bytes_per_patch"], config, peak))
            print_against(out["against"][-1])
            write_json(config.output, out)  # after each part: the next may take long, or too much memory
    files = [config.output]
    if config.scaling:
        print(f"\nscaling of {names[0]}")
        out["scaling"] = bench_scaling(jobs[0], config, peak)
        for what, slope in out["scaling"]["slopes"].items():
            print(
                f"slope of log {what} by log row length: "
                + ("not defined here" if slope is None else f"{slope:.2f} (1 is linear)")
            )
        files.append(
            str(
                draw_scaling(
                    Path(config.output).with_name(Path(config.output).stem + "_scaling.png"), out["scaling"], names[0]
                )
            )
        )
        write_json(config.output, out)
    print("wrote " + ", ".join(files))


if __name__ == "__main__":
    run_script(main, BenchConfig, __doc__)
