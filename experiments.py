"""Run studies from end to end: many training runs, with a table, a picture and every command in a record.

Reads   a corpus (the bundled sample by default); for some studies --cute_folder or --corpus_folder
Writes  runs/: what the scripts write, and which steps are finished; records/DATE_NAME/: settings.json, metrics.jsonl,
        table.md, plot.png, README.md
Run     python experiments.py NAME [NAME ...] [--budget cpu | gpu] [--seeds N] [--only WORD ...]
        python experiments.py --list          all studies with their expected times
        python experiments.py NAME --dry_run  the commands of a study
Time    minutes to days: each study prints its expected time first

A run is a few commands of the other scripts (experiment_steps.py makes them). The same command goes on
where it was stopped: finished steps are known by their commands and not made again, and a step that
was interrupted resumes. A run that fails is reported, the others go on, and the exit status is 1.

The study leak trains models with the mistakes of published small BLT scripts, to show what each does
to a table. They are in this file alone, no training script can reach them, and they write no model that
another script would read.
"""

import json
import math
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

import experiment_studies as studies
from blt.checkpoints import has_checkpoint
from blt.checks import check, check_packages, check_positive
from blt.commands import command
from blt.config import print_table, run_script
from blt.corpus import open_corpus
from blt.device import choose_device
from blt.entropy_cache import sigterm_raises
from blt.files import load_weights
from blt.ids import BOUNDARY
from blt.layers import init_weights
from blt.loop import RunConfig, fit
from blt.metric import leak_gate
from blt.patch_rules import PatchConfig
from blt.rows import make_batch
from blt.studies import (
    Column,
    Made,
    Measured,
    Run,
    Step,
    Study,
    StudyRuns,
    Workshop,
    continue_in,
    describe_seconds,
    markdown_table,
    read_record,
    write_record,
)
from blt.tasks import starts_of
from blt_model import BLTConfig, BLTModel, LocalDecoder
from compress import HEADER, compress, decompress
from entropy_patcher import EntropyPatcher
from evaluate import NOISES
from experiment_steps import (
    BUDGETS,
    PARTS,
    Bench,
    Part,
    expected_seconds,
    patch_near,
    read_part,
    read_training,
    result_of,
    update_bytes,
    use_adamw,
)
from save_entropy_model import load_entropy_model

ROOT = Path(__file__).resolve().parent
FIRST_SEED = 1337


# --------------------------------------------------------------------------------------------------
# The study leak: the mistakes of published small BLT scripts, one at a time and together
#
# 1. own patch: a byte reads the vector of the patch that it is in, which is made from the byte itself;
# 2. padding: rows are filled up with zeros, and these easy targets count in loss and accuracy;
# 3. overlap: windows overlap by half and are split at random, so validation text was trained on.

MISTAKES = ("own patch", "padding", "overlap")
MISTAKE_SETS = {"none": (), **{mistake: (mistake,) for mistake in MISTAKES}, "all three": MISTAKES}
LEAK_ROW = 100  # bytes
LEAK_PATCHES = 15  # patches
LEAK_RATES = (0.0001, 0.0003, 0.001, 0.003)  # of AdamW
# Loss in nats, as published.
PUBLISHED_SIZES = {3: 0.4915, 5: 0.9812, 7: 1.2738, 10: 1.5947, 12: 1.7342}
# Thresholds in nats of another entropy model, with the average sizes that they gave there.
PUBLISHED_THRESHOLDS = {0.5: (2.2, 0.3490), 1.0: (3.5, 0.6472), 1.5: (5.9, 1.1035)}
PUBLISHED_THRESHOLDS |= {2.0: (10.5, 1.5891), 2.5: (24.3, 2.1463), 3.0: (131.0, 3.5250)}
PUBLISHED_MODELS = {"tiny": (256, 4, 0.4648), "small": (384, 6, 0.3874), "medium": (512, 8, 0.3323)}


class OwnPatchDecoder(LocalDecoder):
    """Mistake 1: each byte reads the patch of the byte that it predicts."""

    def forward(self, bytes_BTD, latents_BPG, plan, read_N, pasts=None):
        # The newest complete patch is the one before that of the next byte.
        return super().forward(bytes_BTD, latents_BPG, plan, read_N + 1, pasts)


class OwnPatchBLT(BLTModel):
    """A BLT that sees what it must predict. Its loss means nothing, and the leak gate refuses it."""

    def __init__(self, config):
        super().__init__(config)
        self.decoder = OwnPatchDecoder(config)
        init_weights(self.decoder)


class LeakRows:
    """Windows of 15 patches, each cut to 100 bytes or filled up to them with zeros.

    Without mistake 2 the zeros are no targets.
    """

    row_bytes = LEAK_ROW

    def __init__(self, windows, counts_padding):
        self.windows = windows
        self.counts_padding = counts_padding

    def row(self, number):
        """(ids, is_start, is_scored) of a window, as `make_batch` takes them."""
        text, is_start = self.windows[number]
        ids = np.zeros(LEAK_ROW + 1, dtype=np.int64)
        ids[0] = BOUNDARY
        ids[1 : len(text) + 1] = text
        starts = np.zeros(LEAK_ROW + 1, dtype=bool)
        starts[1 : len(text) + 1] = is_start
        # The boundary, the first byte and the padding each begin a patch.
        starts[[0, 1]] = True
        starts[len(text) + 1 :][:1] = True
        is_scored = np.arange(LEAK_ROW) < (LEAK_ROW if self.counts_padding else len(text))
        return ids, starts, is_scored

    def batch(self, numbers):
        return make_batch([self.row(number) for number in numbers], LEAK_ROW, LEAK_PATCHES + 2)

    def shuffled_batch(self, position, batch_rows, seed):
        """Batch `position` of a run, in a new order in each epoch."""
        numbers = np.arange(position * batch_rows, (position + 1) * batch_rows)
        epochs, places = np.divmod(numbers, len(self.windows))
        order = {epoch: np.random.default_rng((seed, epoch)).permutation(len(self.windows)) for epoch in set(epochs)}
        return self.batch([order[epoch][place] for epoch, place in zip(epochs, places)])

    def batches(self, batch_rows):
        numbers = range(len(self.windows))
        return [self.batch(numbers[first : first + batch_rows]) for first in range(0, len(numbers), batch_rows)]


def leak_windows(text, is_start, overlap):
    """[(bytes, is_start)] of windows of 15 patches, cut to 100 bytes. overlap: each begins in the middle of another."""
    positions = np.append(np.flatnonzero(is_start), len(text))
    stride = LEAK_PATCHES // 2 if overlap else LEAK_PATCHES
    windows = []
    for first in range(0, max(1, len(positions) - LEAK_PATCHES), stride):
        begin = positions[first]
        end = min(begin + LEAK_ROW, positions[min(first + LEAK_PATCHES, len(positions) - 1)])
        windows.append((text[begin:end], is_start[begin:end]))
    return windows


def leak_data(corpus, patcher, mistakes, text_bytes, seed):
    """(training `LeakRows`, validation `LeakRows`, held-out text)."""
    training = [np.array(corpus.document(n)) for n in corpus.documents("train", text_bytes)]
    held_out = [np.array(corpus.document(n)) for n in corpus.documents("validation", max(1, text_bytes // 10))]

    def windows_of(documents, overlap):
        starts = np.concatenate([starts[:-1] for starts in starts_of(patcher, documents)])
        return leak_windows(np.concatenate(documents), starts, overlap)

    counts = "padding" in mistakes
    if "overlap" in mistakes:
        windows = windows_of(training, True)
        order = np.random.default_rng(seed).permutation(len(windows))
        n_held_out = max(1, len(windows) // 10)
        of_training = [windows[number] for number in order[n_held_out:]]
        of_validation = [windows[number] for number in order[:n_held_out]]
    else:
        of_training = windows_of(training, False)
        of_validation = windows_of(held_out, False)
    return LeakRows(of_training, counts), LeakRows(of_validation, counts), np.concatenate(held_out)


def leak_patcher(settings, corpus, device):
    """Patches of a fixed size, or by an entropy model near a wanted average size."""
    size = settings["patch"]
    if "entropy_model" not in settings:
        return EntropyPatcher(None, PatchConfig("static", size))
    model, _ = load_entropy_model(settings["entropy_model"], device)
    patcher = EntropyPatcher(model, PatchConfig("global", 1.0))
    documents = [np.array(corpus.document(n)) for n in corpus.documents("train", settings["text_bytes"])]
    patch_near(patcher, documents, size)
    return patcher


def leak(settings, config):
    """Train one model of the study leak; result.json has what it claims, and what compress.py pays."""
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    corpus = open_corpus(settings["dataset"], cache_dir="data_cache")
    patcher = leak_patcher(settings, corpus, device)
    mistakes = settings["mistakes"]
    rows, validation, held_out = leak_data(corpus, patcher, mistakes, settings["text_bytes"], config.seed)
    model_config = BLTConfig(
        encoder_dim=192,
        decoder_dim=192,
        decoder_layers=2,
        global_dim=settings["global_dim"],
        global_layers=settings["global_layers"],
        window=LEAK_ROW,
        ngram_sizes=[],
    )
    model = (OwnPatchBLT if "own patch" in mistakes else BLTModel)(model_config).to(device)
    of_run = RunConfig(
        row_bytes=LEAK_ROW,
        batch_rows=settings["rows"],
        steps=settings["steps"],
        eval_every=settings["steps"],
        lr=settings["lr"],
        adam_lr=settings["lr"],
        seed=config.seed,
        device=config.device,
        # It would take longer than the training of so small a model.
        compile="no",
        resume=has_checkpoint(config.output),
    )
    try:
        gate = f"passed ({leak_gate(model, patcher, held_out[:512]):.1e} nats)"
    except ValueError as error:
        gate = f"refused: {error}"
    use_adamw()
    result = fit(model, of_run, rows, validation.batches(64), config.output)
    load_weights(Path(config.output) / "best.pt", model)
    mean_patch = len(held_out) / sum(int(starts[:-1].sum()) for starts in starts_of(patcher, [held_out]))
    coded = coded_cost(model, model_config, patcher, held_out[: settings["coded_bytes"]], mean_patch)
    # The weights are removed with the checkpoints; nothing that is left describes a model.
    result_of(
        config,
        **result,
        **coded,
        perplexity=math.exp(result["val_loss"]),
        claimed_bpb=result["val_loss"] / math.log(2),
        bytes_a_unit=mean_patch,
        threshold=patcher.config.entropy_threshold,
        leak_gate=gate,
        padding_share=1 - float(np.mean([len(text) for text, _ in rows.windows])) / LEAK_ROW,
    )


def coded_cost(model, model_config, patcher, text, mean_patch):
    """What compress.py pays for held-out text with a model's weights: bits per byte, and losses in nats.

    compress.py reads byte by byte: a byte that is still to be decoded is in no patch that can be read. The weights are
    those that were trained, in a BLT without the mistakes.
    """
    plain = BLTModel(model_config).to(next(model.parameters()).device)
    plain.load_state_dict(model.state_dict())
    plain.eval()
    data = text.tobytes()
    # As many bytes as a row shows, so that no byte is where a row was always padding.
    context = int(min(LEAK_ROW, max(4, LEAK_PATCHES * mean_patch)))
    compressed, bits = compress(data, plain, patcher, None, context)
    return {
        "coded_bpb": bits / len(data),
        "coded_loss": bits * math.log(2) / len(data),
        "file_bpb": 8 * len(compressed) / len(data),
        "restored": decompress(compressed, plain, patcher) == data,
    }


def leak_runs(bench):
    runs = []

    def settings_of(mistakes, patch, width, layers, rate):
        settings = {
            "mistakes": list(mistakes),
            "patch": patch,
            "global_dim": width,
            "global_layers": layers,
            "lr": rate,
        }
        settings |= {"dataset": bench.dataset, "text_bytes": 500_000, "steps": 300, "rows": 48, "coded_bytes": 10_000}
        return settings

    # The published rate is unknown. It is chosen by one of the published figures; the others test the choice.
    rates = {f"rate {rate}": rate for rate in LEAK_RATES}
    for name, rate in rates.items():
        part = bench.part("leak", settings_of(MISTAKES, 12.0, 384, 6, rate))
        labels = {"table": "choice of the rate", "setting": rate, "mistakes": "all three"}
        runs.append(Run(name, labels, [part], read_part, {"published loss": f"{PUBLISHED_SIZES[12]:.2f}"}))

    def nearest(*metrics):
        distances = [abs(of_rate["val_loss"] - PUBLISHED_SIZES[12]) for of_rate in metrics]
        return LEAK_RATES[distances.index(min(distances))]

    chosen_rate = Measured(tuple(rates), nearest, LEAK_RATES[1])

    def add(table, setting, patch, width, layers, published, entropy=None):
        for name, mistakes in MISTAKE_SETS.items():
            settings = settings_of(mistakes, patch, width, layers, chosen_rate)
            if entropy is not None:
                settings["entropy_model"] = Made(entropy)
            part = bench.part("leak", settings)
            labels = {"table": table, "setting": setting, "mistakes": name}
            of_others = {"published loss": f"{published:.2f}"} if name == "all three" else {}
            steps = [part] if entropy is None else [entropy, part]
            runs.append(Run(f"{table} {setting} {name}", labels, steps, read_part, of_others))

    for size, loss in PUBLISHED_SIZES.items():
        add("patch size", size, float(size), 384, 6, loss)
    for level, (size, loss) in PUBLISHED_THRESHOLDS.items():
        add("threshold", level, size, 384, 6, loss, bench.entropy())
    # Published "with optimal patch settings": a threshold of 0.5 nats.
    for name, (width, layers, loss) in PUBLISHED_MODELS.items():
        add("model size", name, PUBLISHED_THRESHOLDS[0.5][0], width, layers, loss, bench.entropy())
    # Ours: the same widths and text in llm.py. Its rows are full, those above are padded: it reads more.
    sizes = dict(encoder_dim=192, decoder_dim=192, decoder_layers=2, global_dim=384, global_layers=6)
    steps = max(1, round(300 * 48 * LEAK_ROW / update_bytes(bench.llm_config())))
    text = bench.part(
        "corpus", {"kind": "held_out", "dataset": bench.dataset, "bytes": 10_000}, "held_out.txt", seeded=False
    )
    for size in PUBLISHED_SIZES:
        flags = dict(patch_method="static", target_patch_size=float(size), max_bytes=500_000, steps=steps)
        labels = {"table": "patch size", "setting": size, "mistakes": "ours (llm.py)"}
        (trained,) = bench.blt(**flags, **sizes)
        coded = Step("compress", {"file": Made(text), "model": Made(trained)}, "held_out.blt")
        runs.append(Run(f"ours {size}", labels, [text, trained, coded], read_ours))
    return runs


def read_ours(folders):
    """Metrics of a BLT of llm.py, and of the file that compress.py wrote with it."""
    text, trained, coded = folders
    n_bytes = (text / "held_out.txt").stat().st_size
    n_coded = (coded / "held_out.blt").stat().st_size
    # The losses of the study's own models are without a file's header too.
    coded_bpb = 8 * (n_coded - HEADER.size) / n_bytes
    return read_training([trained]) | {"file_bpb": 8 * n_coded / n_bytes, "coded_loss": coded_bpb * math.log(2)}


def summarize_leak(groups):
    """What these numbers are, and how much of each a mistake gives."""
    by_name = {group.run.name: group for group in groups}
    rows = []
    for table, settings in (
        ("patch size", PUBLISHED_SIZES),
        ("threshold", PUBLISHED_THRESHOLDS),
        ("model size", PUBLISHED_MODELS),
    ):
        for setting in settings:
            loss = {name: by_name.get(f"{table} {setting} {name}") for name in MISTAKE_SETS}
            loss = {name: None if group is None else group.mean("val_loss") for name, group in loss.items()}
            if None in (loss["none"], loss["all three"]):
                continue
            published = settings[setting] if table == "patch size" else settings[setting][-1]
            given = [loss["none"] - loss[mistake] if loss[mistake] is not None else None for mistake in MISTAKES]
            cells = ["-" if value is None else f"{value:+.2f}" for value in given]
            ratio = loss["all three"] / published
            rows.append([table, setting, f"{loss['none']:.2f}", *cells, f"{loss['all three']:.2f}", f"{published:.2f}"])
            rows[-1].append(f"{ratio - 1:+.0%}")
    header = ["table", "setting", "no mistake", *MISTAKES, "all three", "published", "against published"]
    return [
        "Loss in nats. The columns of the mistakes say by how much each alone lowers the loss; together they lower it "
        "by another amount than their sum.",
        "",
        *markdown_table(header, rows),
        "",
        "What these numbers are. A loss with the mistake own patch is that of a model which was shown the byte that it "
        "must predict; the leak gate refuses it. One with the mistake padding is an average with zeros that are known "
        "beforehand. One with the mistake overlap is partly of text that was trained on. coded is what compress.py "
        "pays for held-out text with the same weights, where a byte that is still to be decoded cannot be read. Only "
        "coded is the size of a file that can be restored.",
    ]


def leak_seconds(settings, budget):
    """Expected seconds: 1.7 million multiply-adds a byte in the local layers, and 17 patches for 100 bytes."""
    latent = 17 / LEAK_ROW * 12 * settings["global_dim"] ** 2 * settings["global_layers"]
    flops = 6 * (1.7e6 + latent) * settings["steps"] * settings["rows"] * LEAK_ROW
    return budget.overhead + 30 + flops / budget.rate


PARTS["leak"] = Part(leak, leak_seconds)


# --------------------------------------------------------------------------------------------------
# The registry

BPB = Column("bits per byte", "val_bpb")
SECONDS = Column("training s", "train_seconds", "{:.0f}")
FLOPS = Column("training FLOPs", "train_flops", "{:.3g}")
ALL_FLOPS = Column("with entropy model", "all_flops", "{:.3g}")
UNIT = Column("bytes a patch or token", "bytes_a_unit", "{:.2f}")
QUALITY = [
    Column("loss (nats)", "val_loss"),
    Column("accuracy", "val_accuracy", "{:.3f}"),
    Column("perplexity", "perplexity", "{:.2f}"),
    BPB,
]

STUDIES = {
    study.name: study
    for study in (
        Study(
            "baselines",
            "Do patches pay? The BLT with entropy and with space patches, a BPE and a flat byte transformer, "
            "each with and without n-gram hash tables, and PPMd after the same training text, for three budgets of "
            "text: at equal bytes, at equal training FLOPs with the entropy model's training and use counted, and at "
            "equal seconds.",
            studies.baselines,
            [BPB, UNIT, Column("text read (MB)", "trained_megabytes", "{:.1f}"), FLOPS, ALL_FLOPS, SECONDS]
            + [Column("with entropy model s", "all_seconds", "{:.0f}")],
            ("trained_megabytes", "val_bpb", ("model", "tables")),
            summary=studies.summarize_baselines,
        ),
        Study(
            "patch_size",
            "How large should patches be? Averages of 3 to 12 bytes, of a fixed size and by entropy, at equal bytes "
            "and at the training FLOPs of the default BLT.",
            studies.patch_size,
            [*QUALITY, UNIT, FLOPS, ALL_FLOPS],
            ("bytes_a_unit", "val_bpb", ("patches", "equal")),
        ),
        Study(
            "threshold",
            "Which entropy threshold is best? Patches start where the entropy is above 0.5 to 3.0 nats, at equal bytes "
            "and at the training FLOPs of the default BLT.",
            studies.threshold,
            [*QUALITY, UNIT, FLOPS],
            ("bytes_a_unit", "val_bpb", ("equal",)),
        ),
        Study(
            "model_size",
            "How much do larger models give? The sizes tiny, small and medium, at equal bytes and at the training "
            "FLOPs of the default BLT.",
            studies.model_size,
            [*QUALITY, FLOPS, SECONDS],
            ("flops_per_byte", "val_bpb", ("equal",)),
        ),
        Study(
            "leak",
            "What are the losses of 0.33 to 3.5 nats that small BLT scripts have published? The published setting, "
            "with its three mistakes one at a time and together, beside none and beside llm.py, and what compress.py "
            "says.",
            leak_runs,
            [*QUALITY[:3], Column("coded (nats)", "coded_loss"), UNIT],
            ("bytes_a_unit", "val_loss", ("mistakes",)),
            seeds=1,
            summary=summarize_leak,
        ),
        Study(
            "patching",
            "Which patching method is best at the same average patch size? All have the size that words with their "
            "spaces have. BPE tokens look ahead and are an oracle.",
            studies.patching,
            [BPB, Column("accuracy", "val_accuracy", "{:.3f}"), UNIT],
            (None, "val_bpb", ()),
        ),
        Study(
            "entropy_model",
            "What must the entropy model be? Its size, window, updates and text, other text than the BLT's, and two "
            "entropy models together, at 4.5 bytes a patch.",
            studies.entropy_model,
            [BPB, Column("entropy model bpb", "entropy_bpb"), UNIT, FLOPS, ALL_FLOPS],
            (None, "val_bpb", ()),
        ),
        Study(
            "ablations",
            "What does each part of the BLT give? One change at a time, at equal bytes; the FLOPs differ and are in "
            "the table.",
            studies.ablations,
            [
                BPB,
                Column("FLOPs a byte", "flops_per_byte", "{:.3g}"),
                Column("parameters", "parameters", "{:,.0f}"),
                SECONDS,
            ],
            (None, "val_bpb", ()),
            summary=studies.summarize_ablations,
        ),
        Study(
            "robustness",
            "Do patches help against noise and with spelling? The five noises of the BLT paper (change in bits per "
            "original byte), and exact answers of CUTE and of spelling and editing tasks after fine-tuning, for models "
            "of equal FLOPs with tables.",
            studies.robustness,
            [BPB, *(Column(noise, noise) for noise in NOISES), Column("exact answers", "accuracy", "{:.3f}")],
            (None, "accuracy", ("test",)),
            summary=studies.summarize_robustness,
        ),
        Study(
            "domains",
            "What happens on other text? Models and thresholds of English, French, Spanish and Python code, each "
            "scored on all four: bits per byte, and the drift of the patch size from 4.5 bytes.",
            studies.domains,
            [BPB, Column("bytes a patch", "bytes_a_unit", "{:.2f}"), Column("accuracy", "val_accuracy", "{:.3f}")],
            (None, "bytes_a_unit", ("trained, calibrated on",)),
        ),
        Study(
            "speedrun",
            "In how many seconds of training does a model reach 1.9, 1.8, 1.7, 1.6 and 1.5 bits per byte on this "
            "machine? The record that a later change must beat.",
            studies.speedrun,
            [BPB, SECONDS, *(Column(f"s to {target}", f"seconds_to_{target}", "{:.0f}") for target in studies.TARGETS)],
            ("train_seconds", "val_bpb", ("model",)),
            summary=studies.summarize_speedrun,
        ),
        Study(
            "map",
            "Where do patches pay? BLT minus flat byte transformer with tables, against the model's size, the patch "
            "size, the length of a row of long documents, and the text.",
            studies.patches_map,
            [BPB, UNIT, FLOPS, ALL_FLOPS, SECONDS],
            studies.picture_of_map,
            seeds=1,
            summary=studies.summarize_map,
        ),
        Study(
            "sweep",
            "Which rates and initialisation does each model want? The BLT, the flat and the BPE transformer get the "
            "same changes, one at a time, and one more setting of their own; then all changes that help together.",
            studies.sweep,
            [BPB, SECONDS],
            (None, "val_bpb", ("model",)),
            seeds=1,
            summary=studies.summarize_sweep,
        ),
    )
}


# --------------------------------------------------------------------------------------------------
# The command line


@dataclass
class ExperimentsConfig:
    """Settings of this script."""

    POSITIONAL: ClassVar = "name"

    name: list[str] = field(default_factory=list)  # studies to run, one after the other
    budget: Literal["cpu", "gpu"] = "cpu"  # cpu: size nano on 2 CPU cores; gpu: medium on a card such as an H100
    seeds: int | None = None  # runs of each setting, with seeds 1337, 1338, ...; None: as the study says
    only: list[str] = field(default_factory=list)  # only runs whose names contain one of these, and what these need
    jobs: int = 1  # runs at a time; they share the cores, and each takes longer than alone
    dry_run: bool = False  # print the commands and stop
    # text
    dataset: str = "sample"  # as of the training scripts
    cute_folder: str | None = None  # folder of the CUTE benchmark's .tsv files, for the study robustness
    corpus_folder: str | None = None  # folder with wiki_fr_es.jsonl.xz, for the study domains
    # output
    work: str = "runs"  # folder of all that the scripts write; it remembers what is finished
    records: str = "records"  # folder of the records
    continue_record: str | None = None  # a record whose finished runs are not made again; it is completed
    keep_weights: bool = False  # keep the weights of all runs, not only of those that another step reads
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    # a step of a study, as this script calls itself
    part: str | None = None  # which part to compute; the steps of a study pass it
    settings: str = "{}"  # JSON: what the part needs
    seed: int = FIRST_SEED  # of the part
    output: str = "part"  # folder (or file) of the part's results
    list: bool = False  # print all studies with their expected times and stop

    CHOICES: ClassVar = {"name": lambda: [*STUDIES], "part": lambda: [*PARTS]}

    def __post_init__(self):
        check_positive(self, "seeds", "jobs")
        check(self, "budget", self.budget in BUDGETS, "cpu or gpu")
        unknown = [name for name in self.name if name not in STUDIES]
        if unknown:
            raise ValueError(f"there is no study {unknown[0]!r}; choose from: {', '.join(STUDIES)}")
        try:
            self.settings_of_part = json.loads(self.settings)
        except ValueError as error:
            raise ValueError(f"settings is no JSON: {error}") from None


def plan(study, config, workshop):
    """The `StudyRuns` of a study. Raises ValueError if something that it needs is missing."""
    n_seeds = study.seeds if config.seeds is None else config.seeds
    seeds = [FIRST_SEED + number for number in range(n_seeds)]
    known_seeds, known = [], {}
    if config.continue_record is not None:
        known_seeds, known = read_record(config.continue_record, study.name, config.budget)
    runs_of_seed = {}
    wanted = set()
    # A record keeps the runs of all its seeds, whatever is asked for now.
    for seed in sorted({*seeds, *known_seeds}):
        runs_of_seed[seed] = study.runs(Bench(config, seed, is_first=seed == FIRST_SEED))
        if seed in seeds:
            wanted |= {(name, seed) for name in chosen(runs_of_seed[seed], config.only, study.name)}
    budget = BUDGETS[config.budget]

    def estimate(step, flags):
        try:
            return expected_seconds(step, flags, budget)
        except TypeError as error:
            raise ValueError(f"study {study.name}: {step.script}.py does not have all its flags ({error})") from None

    planned = StudyRuns(study, config.budget, runs_of_seed, workshop, estimate, wanted, known, shown_as_given(config))
    finished = {(outcome.run.name, outcome.seed) for outcome in planned.outcomes if outcome.state == "finished"}
    lost = sorted(known.keys() - finished)
    if lost:
        raise ValueError(
            f"{config.continue_record}: {len(lost)} of its runs have other commands now and would be lost from it, the "
            f"first is {lost[0][0]!r}; make a new record without --continue_record"
        )
    # Now, so that a flag that no script has stops the study before its first run.
    planned.expected_seconds()
    return planned


def chosen(runs, words, study):
    """Names of the runs whose names contain one of the words, and of those that they need; all without words."""
    if not words:
        return {run.name for run in runs}
    by_name = {run.name: run for run in runs}
    wanted = {run.name for run in runs if any(word in run.name for word in words)}
    if not wanted:
        raise ValueError(f"no run of {study} has {' or '.join(words)} in its name; --dry_run lists them")
    waiting = list(wanted)
    while waiting:
        needed = set(by_name[waiting.pop()].needs()) - wanted
        wanted |= needed
        waiting += needed
    return wanted


def kept_steps(config, workshop):
    """Folders of the steps that a step of any study reads: their weights stay when they are made."""
    folders = set()
    of_all = replace(config, only=[], continue_record=None)
    for study in STUDIES.values():
        try:
            planned = plan(study, of_all, workshop)
        # A study that lacks something is not run, and keeps nothing.
        except ValueError:
            continue
        for outcome in planned.outcomes:
            results = planned.results(outcome.seed)
            of_run = [step for step in outcome.run.steps if id(step) in planned.steps_with_readers]
            folders |= {workshop.step_folder(step, results) for step in of_run}
            if config.keep_weights:
                folders |= {workshop.step_folder(step, results) for step in outcome.run.steps}
    return folders


def measured_factor(plans):
    """(how much longer the finished training steps took than expected, their number); 1.0 without any."""
    took = expected = 0.0
    seen = set()
    for planned in plans:
        for outcome in planned.outcomes:
            results = planned.results(outcome.seed)
            for step in outcome.run.steps:
                state = planned.workshop.state(step, results)
                folder = planned.workshop.step_folder(step, results)
                if step.script not in ("llm", "template_llm") or state["state"] != "finished" or folder in seen:
                    continue
                seen.add(folder)
                # Those that ran at the same time shared the cores.
                took += state["seconds"] / state.get("jobs", 1)
                expected += planned.estimate(step, planned.workshop.flags_of(step, results))
    return (took / expected, len(seen)) if seen else (1.0, 0)


def print_plans(plans, missing, budget, factor, n_measured):
    """Print each study's expected time and what is done; returns what the times rest on."""
    basis = BUDGETS[budget].rate_is
    if n_measured:
        basis += f", times {factor:.2f} by the {n_measured} training steps that are finished here"
    counted = set()
    rows = []
    total = 0.0
    for planned in plans:
        seconds = factor * planned.expected_seconds(counted)
        total += seconds
        seeds = len({outcome.seed for outcome in planned.wanted})
        done = f"{sum(outcome.state == 'finished' for outcome in planned.wanted)} of {len(planned.wanted)}"
        rows.append([planned.study.name, str(seeds), done, describe_seconds(seconds)])
    print_table(["study", "seeds", "runs done", "expected time"], rows)
    for name, reason in missing.items():
        print(f"{name} is not available: {reason}")
    if len(plans) > 1:
        print(f"all: {describe_seconds(total)}; a step that two studies share is counted once")
    print(f"expected times from {basis}")
    return basis


def print_commands(planned):
    """Print the commands of a study's runs; a value that is measured first is shown as estimated."""
    print(f"\nThe commands run in {planned.workshop.folder}; the scripts are those in {ROOT}.")
    for outcome in planned.wanted:
        results = planned.results(outcome.seed)
        print(f"\n# {planned.study.name}: {outcome.run.name}, seed {outcome.seed} ({outcome.state})")
        for step in outcome.run.steps:
            is_estimate = planned.workshop.resolve(step, results)[1]
            note = "  # with estimates, until the runs that it follows are finished" if is_estimate else ""
            print(shlex.join(["python", *planned.workshop.command(step, results)]) + note)


def repeat_command(study, config):
    """The command that makes a study again or goes on with it."""
    names = ("budget", "seeds", "only", "jobs", "dataset", "device", "work", "records", "cute_folder", "corpus_folder")
    flags = {name: getattr(config, name) for name in names}
    default = ExperimentsConfig(name=[study.name])
    given = {name: value for name, value in flags.items() if value != getattr(default, name)}
    return command("experiments.py", study.name, **given)


def shown_as_given(config):
    """A function that takes this machine's paths out of a text: they appear as the user gave them."""
    folders = {str(ROOT): "."}
    for name in ("work", "cute_folder", "corpus_folder", "dataset"):
        value = getattr(config, name)
        if value is not None and Path(value).exists():
            # A longer path first, because the work folder is often in the repository.
            folders[str(Path(value).resolve())] = Path(value).name

    def shown(text):
        for path in sorted(folders, key=len, reverse=True):
            text = text.replace(path, folders[path])
        return text

    return shown


def run_study(planned, config, basis):
    """Make the runs of a study that are not finished; its record is written after each. Returns its folder."""
    study = planned.study
    records = Path(config.records)
    if config.continue_record is not None:
        records = Path(config.continue_record).parent
        continue_in(planned, Path(config.continue_record).name)

    def write():
        return write_record(planned, records, config.budget, repeat_command(study, config), basis, planned.shown)

    print(f"\n{study.name}: {study.question}")
    folder = write()
    numbers = {id(outcome): number for number, outcome in enumerate(planned.wanted, 1)}

    def name_of(outcome):
        return f"[{numbers[id(outcome)]}/{len(planned.wanted)}] {outcome.run.name}, seed {outcome.seed}"

    def begun(outcome):
        print(name_of(outcome) + (": finished before" if outcome.state == "finished" else ""))

    def done(outcome):
        score = outcome.metrics.get("val_bpb")
        result = "finished" if score is None else f"{score:.4f} bits per byte"
        print(f"{name_of(outcome)}: " + (f"failed: {outcome.error}" if outcome.state == "failed" else result))
        write()

    planned.run_all(begun, done)
    print(f"\n{(folder / 'table.md').read_text()}\nwrote {folder}")
    return folder


def main(config):
    if config.part is not None:
        PARTS[config.part].compute(config.settings_of_part, config)
        return
    if not config.name and not config.list:
        raise ValueError(f"name a study: {', '.join(STUDIES)}; --list says how long each takes")
    if config.continue_record is not None and len(set(config.name)) != 1:
        raise ValueError("continue_record is the record of one study; name that study alone")
    check_packages("matplotlib")
    workshop = Workshop(config.work, ROOT, jobs=config.jobs)
    plans = []
    missing = {}
    for name in dict.fromkeys(config.name if config.name else STUDIES):
        try:
            plans.append(plan(STUDIES[name], config, workshop))
        except ValueError as error:
            # A list shows what can be run; a study that was asked for must not be left out.
            if not config.list:
                raise
            missing[name] = str(error)
    basis = print_plans(plans, missing, config.budget, *measured_factor(plans))
    if config.list:
        return
    if config.dry_run:
        for planned in plans:
            print_commands(planned)
        return
    workshop.folder.mkdir(parents=True, exist_ok=True)
    workshop.kept = kept_steps(config, workshop)
    with sigterm_raises():
        for planned in plans:
            run_study(planned, config, basis)
    failed = sum(planned.count("failed") for planned in plans)
    if failed:
        print(f"{failed} runs failed; the tables say why, and the same command tries them again", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, ExperimentsConfig, __doc__)
