"""Score trained models on a text: bits per byte of the whole, by source, by context and under noise.

Reads   one or more models: output folders of llm.py, train_blt.py or template_llm.py, or an
        entropy_model.pth; and the held-out documents of a corpus (the bundled sample by default),
        or the raw bytes of files, each file one document
Writes  evaluation/: card.json (all numbers, and all that is needed to repeat them), evaluation.png
Run     python evaluate.py --model checkpoints [checkpoints_bpe ...]
        [--dataset corpus/ | --file a.py b.bin] [--preset cpu] [--field value ...]
Time    --preset cpu, one model of llm.py --preset cpu: about 20 s on 2 shared cores of an AMD EPYC
        with AVX512-bf16

The text is the first --val_bytes bytes of the documents of --split, or of each file.

Bits per byte (bpb): the number of `blt.metric.bits_per_byte`, digit for digit. It is the nats of
every byte and of every document's end, / ln 2 / raw bytes. (An entropy model has no class for the
end, so its ends are left out.) A document longer than a row is read in windows, half a row apart,
and each byte is scored in the first window that holds it. Row and stride are printed, because a
longer context alone lowers the number.

By source: the "source" field of a record, else the name of its file. --group_by folder takes the
first folder of that name instead. With a folder per language (fr/a.txt, es/b.txt) it gives bpb by
language; the script does not detect languages.

By context: how many bytes of its document the row shows before a byte. A BPE token counts where it
begins, with all its bytes. A document's end adds nats and no byte. So the nats and bytes of the
parts, by source as by context, sum to those of the whole.

Accuracy: the share of targets that the model predicts, document ends included. The targets of a BPE
model are tokens, so its accuracy compares with no other model's.

±: the bootstrap standard error over documents (--resamples draws of as many documents, with
replacement); a single document has none. It says how much the number depends on which documents
were drawn. It does not cover the training seed. Differences between models are paired: they use the
same draws.

PPMd: a compressor that reads the model's training text first, and then the documents, joined, so it
learns on while it reads. Also what each document costs after the training text alone, on a random
sample of --ppmd_documents documents; that is what a model does. Its order is chosen on the training
text. gzip, xz and zstd are untrained: they have read no training text.

Robustness: the five noises of the BLT paper (section 6.1, its table 3), as defined there:
    AntSpeak    "converts the entire text into uppercase, space-separated characters";
                here a space between all neighbours, spaces too
    Drop        "randomly removes 10% of the characters"; here each with probability 0.1
    RandomCase  "converts 50% of the characters to uppercase and 50% to lowercase randomly";
                here each by a fair coin
    Repeat      "repeats 20% of the characters up to a maximum of four times";
                here each with probability 0.2 appears 2, 3 or 4 times
    UpperCase   "transforms all characters in the text to uppercase"
The paper leaves the random draws open; these are ours. The number is ours too: the paper adds noise
to the prompts of tasks and reports accuracy. Here it is the nats of the noised text / ln 2 /
ORIGINAL bytes, and its change against the same text without noise. A noised text holds more or less
information than the original (the change of Drop may be negative), so compare models, not noises.
Characters are those of UTF-8, and single bytes where the text is not valid UTF-8.

Samples: the share of a BLT's continuations of --prompt that is valid UTF-8. A character that
--sample_bytes cuts off at the end counts as valid.

Every model passes the leak gate first, with patches in fp32. All random numbers are seeded: the same
command on the same device writes the same card.
"""

import codecs
import json
import platform
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from blt import ppmd
from blt.checks import check, check_output, check_packages, check_positive, check_written_by
from blt.commands import command
from blt.config import BY_PRESET, SIZE_NAMES, Presets, print_header, print_table, run_script
from blt.corpus import DataConfig
from blt.device import choose_device, choose_precision
from blt.files import git_commit, hash_of_documents, model_hash, write_json
from blt.ids import BYTES, argument_bytes
from blt.metric import (
    add_up,
    compressors_bpb,
    leak_gate,
    ppmd_after_training,
    predicts_document_ends,
    rates,
    score_batches,
    scoring_batches,
    vocabulary_of,
)
from blt.patch_rules import patch_sizes
from blt.progress import progress_bar
from blt.records import NAMES, RunRecord
from blt.rows import target_positions
from entropy_patcher import EntropyPatcher
from generate import generate
from save_entropy_model import load_blt, load_entropy_model
from template_llm import load_template

# The card carries what its numbers mean, in the words of the docstring above.
DEFINITIONS = __doc__[__doc__.index("Bits per byte (bpb)") :]


# A machine decides how many rows it computes at once; a CPU also scores less text.
ALL = dict(val_bytes=1_000_000, robustness_bytes=100_000, samples=4)
MACHINES = {
    "cpu": dict(val_bytes=200_000, robustness_bytes=25_000, samples=2, batch_rows=8),
    "cpu_hour": ALL | dict(batch_rows=8),
    "colab_t4": ALL | dict(batch_rows=16),
    "rtx4090": ALL | dict(batch_rows=32),
    "h100": ALL | dict(batch_rows=64),
    "h200": ALL | dict(batch_rows=64),
}


@dataclass
class EvaluateConfig(DataConfig):
    """Settings of this script. A value written in place of BY_PRESET takes effect with every preset."""

    # models
    model: list[str] = field(default_factory=lambda: ["checkpoints"])  # output folders or entropy_model.pth files
    row_bytes: int | None = None  # bytes in a row: what a model sees at once; None: as trained
    batch_rows: int = BY_PRESET  # rows in one forward pass
    # text
    val_bytes: int = BY_PRESET  # use at most this many bytes of the documents, or of each file
    file: list[str] = field(default_factory=list)  # score the raw bytes of these files instead of a dataset
    split: Literal["validation", "train", "all", "test"] = "validation"  # which documents of the dataset; all but test
    group_by: Literal["source", "folder"] = "source"  # "source" field or file, or its first folder
    max_sources: int = 20  # report this many of the largest sources one by one, the others together
    resamples: int = 1000  # bootstrap draws over documents
    ppmd_documents: int = 300  # PPMd scores this many documents after the training text alone, too; 0: none
    # robustness and samples
    robustness_bytes: int = BY_PRESET  # noise on this many bytes of the first documents; 0: none
    samples: int = BY_PRESET  # continuations whose UTF-8 is checked (BLT only); 0: none
    sample_bytes: int = 100  # bytes of each continuation
    prompt: str = ""  # text that they continue; empty: a new document
    temperature: float = 1.0  # of the sampling
    seed: int = 1337  # of noises, bootstrap and sampling
    output: str = "evaluation"  # folder for card.json and evaluation.png

    # A size changes nothing here; it is accepted so that one --preset serves all scripts.
    PRESETS = Presets({size: {} for size in SIZE_NAMES}, MACHINES)

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "batch_rows", "max_sources", "sample_bytes")
        for name in ("robustness_bytes", "samples", "temperature", "seed", "ppmd_documents"):
            check(self, name, getattr(self, name) >= 0, "0 or more")
        check(self, "resamples", self.resamples >= 2, "2 or more")
        check(self, "row_bytes", self.row_bytes is None or self.row_bytes >= 2, "2 or more")
        check(self, "split", self.split in ("validation", "train", "all", "test"), "validation, train, all or test")
        check(self, "group_by", self.group_by in ("source", "folder"), "source or folder")
        # --max_bytes limits training text; accepted here, it would be ignored.
        limited = "left out: the text to score is limited by --val_bytes"
        check(self, "max_bytes", self.max_bytes is None, limited)
        names_two_texts = bool(self.file) and (self.dataset != "sample" or self.val_dataset is not None)
        check(self, "file", not names_two_texts, "left out with --dataset: give either files or a dataset")


# --------------------------------------------------------------------------------------------------
# Models and documents


@dataclass
class ModelUnderTest:
    """A model as this script needs it.

    kind: BLT, BPE transformer, flat byte transformer or entropy model.
    patcher: None for a model without patches.
    row_bytes: bytes that a row is to hold.
    record: what made the model; None if unknown.
    """

    name: str
    kind: str
    model: torch.nn.Module
    patcher: EntropyPatcher | None
    row_bytes: int
    record: RunRecord | None = None

    @property
    def row(self):
        """How the model reads, for the card: row and stride in ids of its vocabulary, and what an id is."""
        vocabulary = vocabulary_of(self.model)
        row_ids = vocabulary.row_ids(self.row_bytes)
        return {
            "row_bytes": self.row_bytes,
            "row_ids": row_ids,
            # `evaluation_batches` begins a window every half row.
            "stride_ids": max(1, row_ids // 2),
            "ids": "bytes" if vocabulary is BYTES else "tokens",
        }

    def starts(self, documents):
        """Patch starts of each document, bool [N + 1] each; None for a model without patches."""
        if self.patcher is None:
            return None
        return [self.patcher.starts(document) for document in documents]


def open_model(path, row_bytes=None, device="cpu"):
    """Read a `ModelUnderTest` from an output folder, or from the file of an entropy model.

    row_bytes: None for the row that the model was trained with.
    Raises FileNotFoundError where there is no model, ValueError where a file is damaged.
    """
    path = Path(path)
    if path.suffix == ".pth":
        model, record = load_entropy_model(path, device)
        # A converted model's record does not say in which rows it was trained.
        trained_row_bytes = record.settings.get("row_bytes", 2048)
        row_bytes = trained_row_bytes if row_bytes is None else row_bytes
        return ModelUnderTest(str(path), NAMES[record.kind], model, None, row_bytes, record)
    record_path = path / "model.json"
    if not record_path.exists():
        raise FileNotFoundError(
            f"{record_path} not found: --model takes output folders of llm.py, train_blt.py or "
            f"template_llm.py, and files like entropy_model.pth; train one: {command('llm.py', output=path)}"
        )
    patcher = None
    if RunRecord.load(record_path).kind == "blt":
        model, patcher, record = load_blt(path, device)
    else:
        model, record = load_template(path, device)
    row_bytes = record.row_bytes() if row_bytes is None else row_bytes
    return ModelUnderTest(str(path), NAMES[record.kind], model, patcher, row_bytes, record)


def read_files(paths, limit):
    """The first `limit` bytes of each file as a uint8 document, and the paths of files that are longer."""
    documents = []
    cut = []
    for path in paths:
        with open(path, "rb") as file:
            content = file.read(limit)
            # One byte more tells a file of exactly `limit` bytes from a longer one.
            is_longer = bool(file.read(1))
        if not content:
            raise ValueError(f"{path} is empty: it has no bytes to score; pass another --file")
        documents.append(np.frombuffer(content, dtype=np.uint8))
        if is_longer:
            cut.append(path)
    return documents, cut


def read_documents(config):
    """The documents to score: (list of uint8 arrays, their sources, what they are as a dict for the card)."""
    if config.file:
        documents, cut = read_files(config.file, config.val_bytes)
        sources = list(config.file)
        what = {"files": list(config.file), "cut_to_val_bytes": cut}
    else:
        corpus = config.corpus()
        for line in corpus.notes(val_bytes=config.val_bytes, split=config.split):
            print(line)
        numbers = corpus.documents(config.split, config.val_bytes)
        # Copies, because a corpus leaves its documents on disk and they are read several times below.
        documents = [np.array(corpus.document(number)) for number in numbers]
        sources = [corpus.sources[corpus.source_ids[number]] for number in numbers]
        facts = config.corpus_facts(corpus)
        what = {"split": config.split, "corpus_sha256": facts.pop("sha256"), **facts}
        if not corpus.is_named_split:
            what["val_fraction"] = config.val_fraction
    if config.group_by == "folder":
        sources = [source.split("/")[0] if "/" in source else "(no folder)" for source in sources]
    what["documents"] = len(documents)
    what["bytes"] = sum(len(document) for document in documents)
    what["sha256"] = hash_of_documents(documents)
    return documents, sources, what


def group_sources(sources, documents, max_sources):
    """{source: numbers of its documents}, the largest first; those beyond max_sources are "(others)"."""
    size = {}
    for source, document in zip(sources, documents):
        size[source] = size.get(source, 0) + len(document)
    # Sources of equal size go by name, so that the order of the files does not change the card.
    by_size = sorted(size, key=lambda source: (-size[source], source))
    groups = {source: [] for source in by_size[:max_sources]}
    if len(by_size) > max_sources:
        groups["(others)"] = []
    for number, source in enumerate(sources):
        group = source if source in groups else "(others)"
        groups[group].append(number)
    return groups


# --------------------------------------------------------------------------------------------------
# Scoring

COLUMNS = ("nats", "right", "targets", "bytes")  # of the arrays of parts below (axis C)


@dataclass
class Costs:
    """What a model pays for documents: the totals of `blt.metric.add_up`, and parts with the `COLUMNS`."""

    totals: dict
    by_document_DC: np.ndarray  # float64, a row a document
    by_context_KC: np.ndarray  # float64, row k: the bytes of context in `bucket_range(k)`


def measure(under_test, documents, is_start, batch_rows=8, precision="fp32"):
    """The `Costs` of uint8 documents, through the scoring path of `blt.metric.bits_per_byte`.

    is_start: `under_test.starts(documents)`. Raises ValueError where all documents are empty.
    """
    model = under_test.model
    device = next(model.parameters()).device
    vocabulary = vocabulary_of(model)
    # 64 buckets hold every number of bytes that fits into 64 bits.
    costs = Costs(add_up([]), np.zeros((len(documents), len(COLUMNS))), np.zeros((64, len(COLUMNS))))
    batches = scoring_batches(model, documents, is_start, under_test.row_bytes, batch_rows)
    n_bytes = sum(len(document) for document in documents)
    with progress_bar(n_bytes, under_test.name, leave=False) as bar:
        for batch, nats_BT, is_right_BT in score_batches(model, batches, device, precision):
            # In the order of `blt.metric.add_up`, so that the totals are its sums to the last bit.
            for name, value in add_up([(batch, nats_BT, is_right_BT)]).items():
                costs.totals[name] += value
            add_parts(costs, batch, nats_BT, is_right_BT, vocabulary)
            bar.update(batch.bytes)
    return costs


def add_parts(costs, batch, nats_BT, is_right_BT, vocabulary):
    """Add the scored targets of one batch to the parts of `Costs`, by document and by context."""
    # What is not scored is padding, or was scored in an earlier window: it belongs to no part.
    is_scored_BT = batch.is_scored.cpu().numpy()
    document_BT, context_BT = target_positions(batch, vocabulary)
    targets_BT = batch.ids[:, 1:].cpu().numpy()
    n_bytes = vocabulary.bytes_of_id[targets_BT[is_scored_BT]]
    nats = nats_BT.cpu().numpy()[is_scored_BT]
    is_right = is_right_BT.cpu().numpy()[is_scored_BT]
    columns = (nats, is_right, np.ones(len(n_bytes)), n_bytes)
    add_columns(costs.by_document_DC, document_BT[is_scored_BT], columns)
    add_columns(costs.by_context_KC, bucket_of(context_BT[is_scored_BT]), columns)


def add_columns(sums, index, columns):
    """Add the values of each column to those rows of sums that index names; an index may repeat."""
    for number, values in enumerate(columns):
        # sums[index] += values would keep only one of the values of a repeated index.
        sums[:, number] += np.bincount(index, values, len(sums))


def bucket_of(context):
    """The bucket of each number of context bytes: 0, 1, 2, 3, 5, 9 give 0, 1, 2, 3, 4, 5."""
    # frexp gives the exponents 0, 1, 2, 3 for 0, 1, 2 to 3, 4 to 7.
    exponent = np.frexp(context - 1)[1]
    return np.where(context, exponent + 1, 0)


def bucket_range(k):
    """First and last number of context bytes in bucket k: 0, 1, 2, 3 to 4, 5 to 8, 9 to 16 and so on."""
    if k < 2:
        return k, k
    return (1 << (k - 2)) + 1, 1 << (k - 1)


def part(values_C):
    """A row of `COLUMNS` as numbers with "bpb" and "accuracy"; bpb is None where no byte is."""
    totals = dict(zip(COLUMNS, values_C.tolist()))
    for name in ("right", "targets", "bytes"):
        totals[name] = int(totals[name])
    if totals["bytes"]:
        both = rates(totals)
        return {**totals, "bpb": both["val_bpb"], "accuracy": both["val_accuracy"]}
    accuracy = totals["right"] / totals["targets"] if totals["targets"] else None
    return {**totals, "bpb": None, "accuracy": accuracy}


def bootstrap(by_document_DC, resamples, seed):
    """Bits per byte of `resamples` draws of D documents with replacement, float64 [resamples].

    Returns None for fewer than 2 documents. The same number of documents and seed give the same draws,
    whatever the model: subtract the draws of two models for the spread of their difference.
    """
    D = len(by_document_DC)
    if D < 2:
        return None
    # Bits per byte is a ratio of sums, so a document is drawn with both its nats and its bytes.
    nats_D = by_document_DC[:, COLUMNS.index("nats")]
    bytes_D = by_document_DC[:, COLUMNS.index("bytes")]
    generator = np.random.default_rng(seed)
    bpb = np.empty(resamples)
    for draw in range(resamples):
        drawn = generator.integers(0, D, D)
        totals = {"nats": nats_D[drawn].sum(), "right": 0, "targets": 1, "bytes": bytes_D[drawn].sum()}
        bpb[draw] = rates(totals)["val_bpb"]
    return bpb


def spread(bpb_of_draws):
    """Standard error from the draws of `bootstrap`, or None."""
    if bpb_of_draws is None:
        return None
    return float(bpb_of_draws.std(ddof=1))


def patch_record(is_start, numbers):
    """The patches of these documents: how many there are, sizes in bytes, and a histogram of sizes."""
    # The last start of a document is its end, which is no byte.
    sizes = np.concatenate([patch_sizes(is_start[number][:-1]) for number in numbers])
    values, counts = np.unique(sizes, return_counts=True)
    return {
        "patches": len(sizes),
        "mean_bytes": float(sizes.mean()),
        "median_bytes": float(np.median(sizes)),
        "longest_bytes": int(sizes.max()),
        "histogram": {int(value): int(count) for value, count in zip(values, counts)},
    }


# --------------------------------------------------------------------------------------------------
# Robustness

# All noises take (text, generator), so that they are called alike; two of them draw no number.


def ant_speak(text, generator):
    """Upper case with a space between all characters: "a bc" gives "A   B C"."""
    return " ".join(text.upper())


def drop(text, generator):
    """Without each character with probability 0.1."""
    chances = generator.random(len(text))
    return "".join(character for character, chance in zip(text, chances) if chance >= 0.1)


def random_case(text, generator):
    """Each character in upper or lower case, by a fair coin."""
    characters = []
    for character, chance in zip(text, generator.random(len(text))):
        characters.append(character.upper() if chance < 0.5 else character.lower())
    return "".join(characters)


def repeat(text, generator):
    """Each character, with probability 0.2, two, three or four times."""
    is_repeated = generator.random(len(text)) < 0.2
    times = np.where(is_repeated, generator.integers(2, 5, len(text)), 1)
    return "".join(character * count for character, count in zip(text, times.tolist()))


def upper_case(text, generator):
    """All in upper case."""
    return text.upper()


NOISES = {
    "AntSpeak": ant_speak,
    "Drop": drop,
    "RandomCase": random_case,
    "Repeat": repeat,
    "UpperCase": upper_case,
}


def noised(document, name, seed=0):
    """A uint8 document with one of `NOISES`. An invalid byte counts as a character without case.

    seed: a number or a tuple of numbers. Raises ValueError for an unknown name.
    Example: noised of b"caf\\xc3\\xa9 \\xff" by UpperCase is b"CAF\\xc3\\x89 \\xff".
    """
    if name not in NOISES:
        raise ValueError(f"noise is {name!r}; it must be one of {', '.join(NOISES)}")
    # surrogateescape carries invalid bytes through the string and back.
    text = document.tobytes().decode("utf-8", "surrogateescape")
    changed = NOISES[name](text, np.random.default_rng(seed))
    return np.frombuffer(changed.encode("utf-8", "surrogateescape"), dtype=np.uint8)


def first_bytes(documents, limit):
    """As many of the first documents as fit into limit bytes; where none fits, a part of the first."""
    ends = np.cumsum([len(document) for document in documents])
    count = int(np.searchsorted(ends, limit, side="right"))
    if count == 0:
        return [documents[0][:limit]]
    return documents[:count]


def robustness(under_test, documents, seed, batch_rows=8, precision="fp32"):
    """Bits per original byte of documents without and with noise.

    Returns {"original_bytes", "original": bits per byte, and for each noise {"bpb", "change", "bytes"}}.
    """
    original_bytes = sum(len(document) for document in documents)

    def bits_per_original_byte(texts):
        # Over the noised bytes, a noise that only lengthens the text would look like a gain.
        totals = measure(under_test, texts, under_test.starts(texts), batch_rows, precision).totals
        return rates({**totals, "bytes": original_bytes})["val_bpb"]

    original = bits_per_original_byte(documents)
    record = {"original_bytes": original_bytes, "original": original}
    for name in NOISES:
        # A document's number is part of its seed: documents before it do not change its noise.
        texts = [noised(document, name, (seed, number)) for number, document in enumerate(documents)]
        noised_bytes = sum(len(text) for text in texts)
        if noised_bytes:
            bpb = bits_per_original_byte(texts)
            record[name] = {"bpb": bpb, "change": bpb - original, "bytes": noised_bytes}
        else:
            # Drop removes all characters of a very short text; then there is nothing to score.
            record[name] = {"bpb": None, "change": None, "bytes": 0}
    return record


# --------------------------------------------------------------------------------------------------
# Samples


def is_valid_utf8(text, may_be_cut=False):
    """Whether bytes are UTF-8. may_be_cut: also if the text ends in the middle of a character."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(text, final=not may_be_cut)
    except UnicodeDecodeError:
        return False
    return True


def sample_record(under_test, config, precision):
    """Continue the prompt: the texts, and how many are valid UTF-8. None without samples or without a BLT."""
    if not config.samples or under_test.kind != "BLT":
        return None
    prompt = argument_bytes(config.prompt)
    texts = generate(
        under_test.model,
        under_test.patcher,
        [prompt] * config.samples,
        config.sample_bytes,
        precision=precision,
        temperature=config.temperature,
        seed=config.seed,
        context_bytes=under_test.row_bytes,
    )
    # A shorter text was ended by the model, so its last character must be whole.
    valid = sum(is_valid_utf8(text, may_be_cut=len(text) == config.sample_bytes) for text in texts)
    return {
        "valid": valid,
        "of": len(texts),
        "valid_share": valid / len(texts),
        # `generate` gives continuation i the seed + i.
        "seeds": [config.seed + number for number in range(config.samples)],
        "bytes": sum(len(text) for text in texts),
        "texts": [text.decode("utf-8", "backslashreplace") for text in texts],
    }


# --------------------------------------------------------------------------------------------------
# The evaluation


def pass_leak_gate(under_test, documents):
    """The largest difference in nats that the leak gate saw, or None for a text too short for it.

    Raises ValueError for a model that sees bytes which it must predict.
    """
    text = np.concatenate(documents[:8])[:512]
    if len(vocabulary_of(under_test.model).encode(text)) < 2:
        return None
    return leak_gate(under_test.model, under_test.patcher, text)


def record_of_sources(costs, groups, is_start, config):
    """The part of each source as a dict for the card."""
    record = {}
    for source, numbers in groups.items():
        values_DC = costs.by_document_DC[numbers]
        entry = part(values_DC.sum(0))
        entry["documents"] = len(numbers)
        entry["standard_error"] = spread(bootstrap(values_DC, config.resamples, config.seed))
        if is_start is not None:
            entry["bytes_a_patch"] = patch_record(is_start, numbers)["mean_bytes"]
        record[source] = entry
    return record


def record_of_contexts(costs):
    """The part of each bucket of context that holds targets, as a list for the card."""
    record = []
    for k in np.flatnonzero(costs.by_context_KC[:, COLUMNS.index("targets")]).tolist():
        first, last = bucket_range(k)
        record.append({"first": first, "last": last, **part(costs.by_context_KC[k])})
    return record


def record_of_patcher(patcher, is_start):
    """How the patches were made and what they are, as a dict for the card."""
    entropy_model = patcher.entropy_model
    return {
        "patch_config": asdict(patcher.config),
        "patch_precision": patcher.precision,
        "entropy_model_sha256": None if entropy_model is None else model_hash(entropy_model),
        "patches": patch_record(is_start, range(len(is_start))),
    }


def evaluate_model(under_test, documents, groups, config, precision):
    """All numbers of one model as a dict for the card, and its bootstrap draws or None."""
    model = under_test.model
    record = {
        "path": under_test.name,
        "kind": under_test.kind,
        "sha256": model_hash(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **under_test.row,
        "scores_document_ends": predicts_document_ends(model),
    }
    # A number of a model that sees ahead means nothing, so the gate comes before any number.
    leak_gate_nats = pass_leak_gate(under_test, documents)
    if leak_gate_nats is not None:
        record["leak_gate_nats"] = leak_gate_nats

    # The patches are made once, for the scores and for the statistics of patches.
    is_start = under_test.starts(documents)
    costs = measure(under_test, documents, is_start, config.batch_rows, precision)
    draws = bootstrap(costs.by_document_DC, config.resamples, config.seed)
    whole = rates(costs.totals)
    record["bpb"] = whole["val_bpb"]
    record["standard_error"] = spread(draws)
    record["accuracy"] = whole["val_accuracy"]
    record |= costs.totals
    record["by_source"] = record_of_sources(costs, groups, is_start, config)
    record["by_context"] = record_of_contexts(costs)
    if is_start is not None:
        record |= record_of_patcher(under_test.patcher, is_start)
    elif under_test.kind == "BPE transformer":
        # Each document has one target that is no token: its end.
        n_tokens = costs.totals["targets"] - len(documents)
        record["bytes_a_token"] = costs.totals["bytes"] / max(1, n_tokens)
    if config.robustness_bytes:
        noise_on = first_bytes(documents, config.robustness_bytes)
        record["robustness"] = robustness(under_test, noise_on, config.seed, config.batch_rows, precision)
    record["samples"] = sample_record(under_test, config, precision)
    return record, draws


# --------------------------------------------------------------------------------------------------
# PPMd, which reads the training text of each model first


def training_text(record, config):
    """The (Corpus, numbers of its training documents) that a model was trained on.

    record: its `RunRecord`; None if unknown. Raises ValueError or OSError that says why the text cannot be had.
    """
    sha256 = None if record is None else record.corpus.get("sha256")
    if sha256 is None:
        raise ValueError("its record does not say on which text it was trained")
    settings = record.settings
    of_text = [f.name for f in fields(DataConfig) if f.name not in ("preset", "device", "precision", "data_cache")]
    trained = DataConfig(**{name: settings[name] for name in of_text if name in settings}, data_cache=config.data_cache)
    # The scored dataset first: it may be the same text under a name that is valid here.
    scored = None if config.file else config.corpus()
    is_same = scored is not None and scored.hash == sha256
    # Equal texts may be split at another fraction; a named split is part of the hash.
    is_same = is_same and (scored.is_named_split or config.val_fraction == trained.val_fraction)
    corpus = scored if is_same else trained.corpus()
    if corpus.hash != sha256:
        raise ValueError(f"{trained.dataset} is another text now than when it was trained")
    return corpus, corpus.documents("train", trained.max_bytes)


def ppmd_record(under_test, documents, config):
    """What PPMd makes of the documents after the model's training text, as a dict for the card.

    Where there is no number, the dict has only "missing", which says why.
    """
    if not ppmd.is_installed():
        return {"missing": ppmd.INSTALL}
    try:
        corpus, train = training_text(under_test.record, config)
    except (ValueError, OSError) as error:
        return {"missing": f"no training text of {under_test.name}: {error}"}
    return ppmd_after_training(corpus, train, documents, config.ppmd_documents)


def add_differences(records, draws):
    """Give every record but the first its difference to the first, from the bootstrap draws of each."""
    for record, drawn in zip(records[1:], draws[1:]):
        # All models have the same draws: a draw of hard documents cancels in the difference.
        record["difference_to_first"] = {
            "bpb": record["bpb"] - records[0]["bpb"],
            "standard_error": None if drawn is None else spread(drawn - draws[0]),
        }


def make_card(config, device, precision, what, documents, records):
    """All numbers, and all that is needed to repeat them, as a dict."""
    is_cuda = device.type == "cuda"
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "settings": asdict(config),
        "text": what,
        "definitions": DEFINITIONS,
        "compressors_bpb": compressors_bpb(documents),
        "models": records,
    }


def main(config):
    """Score every model, print the report, write card.json and evaluation.png. Returns the card."""
    # What is needed last is checked first.
    output = Path(config.output)
    check_output(output, is_folder=True)
    for name in ("card.json", "evaluation.png"):
        check_output(output / name, reads=config.file)
    check_written_by(output / "card.json", "evaluate.py")
    check_packages("matplotlib", "pyarrow")
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    print_header(config, device, precision)
    # All models are opened before the first is scored: a path that is wrong stops the run at once.
    models_under_test = [open_model(path, config.row_bytes, device) for path in config.model]
    documents, sources, what = read_documents(config)
    groups = group_sources(sources, documents, config.max_sources)
    print_text(what, config)
    records = []
    draws = []
    for under_test in models_under_test:
        record, drawn = evaluate_model(under_test, documents, groups, config, precision)
        records.append(record)
        draws.append(drawn)
        print_model(record)
        record["ppmd"] = ppmd_record(under_test, documents, config)
    add_differences(records, draws)
    card = make_card(config, device, precision, what, documents, records)
    # The report comes first: a full disk or a broken font then loses no number.
    print_report(card, config)
    write_json(output / "card.json", card)
    draw(output / "evaluation.png", card)
    print(f"wrote {output}/card.json, evaluation.png")
    return card


# --------------------------------------------------------------------------------------------------
# The report


def name_of_text(what):
    """The files, or the dataset and its split."""
    if "files" in what:
        return ", ".join(what["files"])
    name = what["dataset"]
    if what["split"] == "validation" and "val_dataset" in what:
        name = what["val_dataset"]
    return f"{name}, {what['split']}"


def print_text(what, config):
    """One line: which text is scored."""
    cut = ""
    if what.get("cut_to_val_bytes"):
        names = ", ".join(what["cut_to_val_bytes"])
        cut = f" (the first {config.val_bytes:,} bytes only of {names}; --val_bytes)"
    print(
        f"text: {name_of_text(what)} | documents: {what['documents']:,}, "
        f"bytes: {what['bytes']:,}{cut}, sha256 {what['sha256'][:12]}"
    )


def print_model(record):
    """One line: what the model is, how it reads, and that it passed the leak gate."""
    if "leak_gate_nats" in record:
        gate = f"leak gate passed: largest difference {record['leak_gate_nats']:.1e} nats"
    else:
        gate = "text too short for the leak gate"
    print(
        f"{record['path']}: {record['kind']}, {record['parameters']:,} parameters, "
        f"sha256 {record['sha256'][:12]} | rows of {record['row_ids']:,} {record['ids']}, "
        f"windows {record['stride_ids']:,} apart | {gate}"
    )


def format_number(value, error=None, signed=False):
    """A figure for a table: 1.9961, 1.9961 ±0.0123, or - for None."""
    if value is None:
        return "-"
    text = f"{value:+.4f}" if signed else f"{value:.4f}"
    return text if error is None else f"{text} ±{error:.4f}"


def bpb_cell(entry):
    """Bits per byte of a record or part, with its standard error."""
    return format_number(entry["bpb"], entry["standard_error"])


def difference_cell(record):
    """The difference to the first model; - for the first."""
    if "difference_to_first" not in record:
        return "-"
    difference = record["difference_to_first"]
    return format_number(difference["bpb"], difference["standard_error"], signed=True)


def unit_cell(record):
    """Bytes in a patch or a token; - for a model that has neither."""
    if "patches" in record:
        return f"{record['patches']['mean_bytes']:.2f} a patch"
    if "bytes_a_token" in record:
        return f"{record['bytes_a_token']:.2f} a token"
    return "-"


def short_names(records):
    """The last part of each model's path, or the whole paths where that does not tell them apart."""
    # Whole paths make wide tables, but runs/a/checkpoints and runs/b/checkpoints need them.
    names = [Path(record["path"]).name for record in records]
    if len(set(names)) < len(names):
        return [record["path"] for record in records]
    return names


def print_titled_table(title, names, lines):
    """Print a title and lines of (label, cells), a column for each model."""
    print(f"\n{title}")
    print_table(["", *names], [[label, *cells] for label, cells in lines])


def print_whole(card, names):
    """The table of the whole text."""
    records = card["models"]
    lines = [("bits per byte", [bpb_cell(record) for record in records])]
    if len(records) > 1:
        differences = [difference_cell(record) for record in records]
        lines.append(("  against the first (paired)", differences))
    accuracies = [f"{record['accuracy']:.1%} of {record['ids']}" for record in records]
    ends = ["yes" if record["scores_document_ends"] else "no" for record in records]
    rows = [f"{record['row_ids']:,} and {record['stride_ids']:,} {record['ids']}" for record in records]
    lines.append(("accuracy", accuracies))
    lines.append(("document ends scored", ends))
    lines.append(("row and stride", rows))
    lines.append(("bytes a patch or token", [unit_cell(record) for record in records]))

    n_documents = card["text"]["documents"]
    error = "one document: no ±"
    if n_documents > 1:
        error = f"± bootstrap standard error over {n_documents:,} documents"
    title = f"bytes: {card['text']['bytes']:,} (fewer bits are better; {error})"
    print_titled_table(title, names, lines)
    print("the same bytes by compressors")
    for line in ppmd_lines(records):
        print(f"  {line}")
    compressors = ", ".join(f"{name} {bpb:.4f}" for name, bpb in card["compressors_bpb"].items())
    print(f"  untrained: {compressors}")


def ppmd_lines(records):
    """Lines of PPMd's numbers: one for each training text, named if there are several."""
    of_text = {}
    for record, name in zip(records, short_names(records)):
        # Models that were trained on the same text share a line.
        of_text.setdefault(json.dumps(record["ppmd"]), []).append(name)
    lines = []
    for text, names in of_text.items():
        facts = json.loads(text)
        of_models = "" if len(of_text) == 1 else f" ({', '.join(names)})"
        if "missing" in facts:
            lines.append(f"PPMd{of_models}: {facts['missing']}")
            continue
        lines.append(f"{ppmd.label(facts)}{of_models} {facts['bpb']:.4f}")
        if "alone_bpb" in facts:
            drawn = f"{facts['alone_documents']:,} documents of {facts['documents']:,}, drawn at random"
            if facts["alone_documents"] == facts["documents"]:
                drawn = f"all {facts['documents']:,} documents"
            lines.append(
                "  it learns on while it reads; each document after the training text alone: "
                f"{facts['alone_bpb']:.4f} ({drawn})"
            )
    return lines


def print_sources(records, names, group_by):
    """The tables by source; none where there is one source only."""
    sources = records[0]["by_source"]
    if len(sources) < 2:
        return
    lines = []
    for source, entry in sources.items():
        label = f"{source} ({entry['bytes']:,} bytes, documents: {entry['documents']:,})"
        lines.append((label, [bpb_cell(record["by_source"][source]) for record in records]))
    print_titled_table(f"bits per byte by {group_by}", names, lines)

    if not any("patches" in record for record in records):
        return
    # Models with patches and models without them may share a report; the latter have no cell here.
    lines = []
    for source in sources:
        cells = []
        for record in records:
            entry = record["by_source"][source]
            cells.append(f"{entry['bytes_a_patch']:.2f}" if "bytes_a_patch" in entry else "-")
        lines.append((source, cells))
    print_titled_table(f"bytes a patch by {group_by}", names, lines)


def by_context_lines(records):
    """(label, bits per byte of each model or None) of every bucket that a model has. A label: 5-8."""
    # Models with shorter rows lack the last buckets, so the labels come from all models.
    labels = {}
    bpb = []
    for record in records:
        bpb.append({entry["first"]: entry["bpb"] for entry in record["by_context"]})
        for entry in record["by_context"]:
            first = entry["first"]
            last = entry["last"]
            labels[first] = f"{first:,}" if first == last else f"{first:,}-{last:,}"
    return [(labels[first], [of_model.get(first) for of_model in bpb]) for first in sorted(labels)]


def print_contexts(records, names):
    """The table by context."""
    lines = []
    for label, values in by_context_lines(records):
        lines.append((label, [format_number(bpb) for bpb in values]))
    title = "bits per byte by context: bytes of the document before it in the row"
    print_titled_table(title, names, lines)


def print_patches(record, most=12):
    """Two lines: how many patches, and the share of each size up to `most` bytes."""
    # Sizes above `most` share one entry: long patches are rare, and of many different sizes.
    patches = record["patches"]
    n = patches["patches"]
    shares = []
    larger = 0.0
    for size, count in patches["histogram"].items():
        if size <= most:
            shares.append(f"{size}: {count / n:.1%}")
        else:
            larger += count / n
    print(
        f"\npatches of {record['path']}: {n:,}, of {patches['median_bytes']:g} bytes in the median, "
        f"{patches['longest_bytes']:,} at most; share by bytes"
    )
    print("  " + ", ".join([*shares, f"more: {larger:.1%}"]))


def print_robustness(records, names):
    """The table of noises."""
    entries = [record["robustness"] for record in records]
    lines = [("as it is", [format_number(entry["original"]) for entry in entries])]
    for noise in NOISES:
        cells = []
        for entry in entries:
            change = format_number(entry[noise]["change"], signed=True)
            cells.append(f"{format_number(entry[noise]['bpb'])}  {change}")
        lines.append((noise, cells))
    size = entries[0]["original_bytes"]
    title = f"bits per original byte of noised text, and the change (the first {size:,} bytes)"
    print_titled_table(title, names, lines)


def print_samples(record, temperature):
    """The continuations, and how many of them are valid UTF-8."""
    samples = record["samples"]
    print(
        f"\nsamples of {record['path']} at temperature {temperature:g}: "
        f"{samples['valid']} of {samples['of']} are valid UTF-8 ({samples['bytes']:,} bytes)"
    )
    for text in samples["texts"]:
        print(f"  {text!r}")


def print_report(card, config):
    """Print the card as tables."""
    records = card["models"]
    names = short_names(records)
    print_whole(card, names)
    print_sources(records, names, config.group_by)
    print_contexts(records, names)
    for record in records:
        if "patches" in record:
            print_patches(record)
    if config.robustness_bytes:
        print_robustness(records, names)
    for record in records:
        if record["samples"]:
            print_samples(record, config.temperature)
    print()


def draw(path, card):
    """Draw evaluation.png: bits per byte by context, by source, and of noised text."""
    # blt.pictures imports matplotlib, which takes seconds: --help does not wait for it.
    from blt.pictures import draw_evaluation

    records = card["models"]
    names = [f"{name}: {bpb_cell(record)} bpb" for name, record in zip(short_names(records), records)]
    sources = []
    for source in records[0]["by_source"]:
        entries = [record["by_source"][source] for record in records]
        bpb = [entry["bpb"] for entry in entries]
        sources.append((source, bpb, [entry["standard_error"] for entry in entries]))
    # Without --robustness_bytes the picture has no panel for noises.
    noises = []
    if "robustness" in records[0]:
        for noise in NOISES:
            noises.append((noise, [record["robustness"][noise]["change"] for record in records]))
    what = card["text"]
    compressors = ", ".join(f"{name} {bpb:.3f}" for name, bpb in card["compressors_bpb"].items())
    title = f"{name_of_text(what)}: {what['bytes']:,} bytes; untrained: {compressors}"
    lines = [line for line in ppmd_lines(records) if not line.startswith(" ")]
    draw_evaluation(path, names, by_context_lines(records), sources, noises, "\n".join([title, *lines]))


if __name__ == "__main__":
    run_script(main, EvaluateConfig, __doc__)
