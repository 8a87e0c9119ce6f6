"""What is a model worth, and where? Bits per byte of any text or file: whole, by source, by context, noised, beside compressors.

Reads   one or more models: output folders of llm.py, train_blt.py or template_llm.py, or an entropy_model.pth; and a corpus's held-out
        documents (the bundled sample by default), or any files' raw bytes, each file one document
Writes  evaluation/: card.json (all numbers, and all that is needed to repeat them), evaluation.png
Run     python evaluate.py --model checkpoints [checkpoints_bpe ...] [--dataset corpus/ | --file a.py b.bin] [--preset cpu] [--field value ...]
Time    --preset cpu, one model of llm.py --preset cpu: about 20 s on 2 shared cores of an AMD EPYC with AVX512-bf16

Bits per byte (bpb): `training.bits_per_byte`, digit for digit: nats of every byte and every document's end, / ln 2 / raw bytes. (An
entropy model has no class for the end, so its ends are left out.) Documents longer than a row are read in windows, half a row apart; a
byte is scored in the first window that holds it. Row and stride are printed, because a longer context alone lowers the number.
By source: a record's "source" field, else its file's name; --group_by folder takes the first folder of that name, so that a folder per
language (fr/a.txt, es/b.txt) or a "source" that says the language gives bpb by language. Languages are not guessed.
By context: how many bytes of its document the row shows before a byte. A BPE token counts where it begins, with all its bytes; a
document's end adds nats and no byte. So the parts' nats and bytes, of sources as of contexts, sum to those of the whole.
Accuracy: of targets, document ends among them: bytes, but for BPE tokens, so that a BPE model's compares with nothing else.
±: bootstrap standard error over documents (--resamples draws of as many documents, with replacement); none for a single document. It says
how far the number hangs on which documents were drawn, not on the training seed. Differences between models are paired: the same draws.
Robustness: the BLT paper's five noises (section 6.1, its table 3), as defined there:
    AntSpeak    "converts the entire text into uppercase, space-separated characters"; a space between all neighbours, spaces too
    Drop        "randomly removes 10% of the characters": each with probability 0.1
    RandomCase  "converts 50% of the characters to uppercase and 50% to lowercase randomly": each by a fair coin
    Repeat      "repeats 20% of the characters up to a maximum of four times": each with probability 0.2 stands 2, 3 or 4 times
    UpperCase   "transforms all characters in the text to uppercase"
The coins are ours where the paper leaves them open, and so is the number: the paper noises prompts of tasks and reports accuracy; here it is
the nats of the noised text / ln 2 / ORIGINAL bytes, and its change against the same text as it was. A noised text says more or less than
the original (Drop's change may be negative), so compare models, not noises. Characters are those of UTF-8, bytes where it is invalid.
Samples: what share of a BLT's continuations of --prompt is valid UTF-8; a character that --sample_bytes cuts at the end counts as valid.
The models pass the leak gate first, with patches in fp32. All is seeded: the same command on the same device writes the same card.
"""

import codecs
import json
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from blt.checks import check, check_positive
from blt.config import print_header, print_table, run_script
from blt.corpus import DataConfig
from blt.device import choose_device, choose_precision
from blt.files import git_commit, hash_of_documents, model_hash, write_json
from blt.ids import BYTES
from blt.metric import (
    add_up,
    compressors_bpb,
    leak_gate,
    predicts_document_ends,
    rates,
    score_batches,
    scoring_batches,
    vocabulary_of,
)
from blt.patch_rules import patch_sizes
from blt.rows import target_positions
from entropy_patcher import EntropyPatcher
from generate import generate
from save_entropy_model import load_blt, load_entropy_model
from template_llm import load_template


@dataclass
class EvaluateConfig(DataConfig):
    # models
    model: list[str] = field(
        default_factory=lambda: ["checkpoints"]
    )  # output folders of BLTs or baselines, or entropy_model.pth files
    row_bytes: int | None = (
        None  # bytes in a row, what a model sees at once; None: as each was trained; windows stand half a row apart
    )
    batch_rows: int = 8  # rows in one forward pass
    # text
    file: list[str] = field(
        default_factory=list
    )  # score the raw bytes of these files, the first val_bytes of each, instead of a dataset
    split: Literal["validation", "train", "all"] = (
        "validation"  # which documents of the dataset, the first val_bytes bytes of them
    )
    group_by: Literal["source", "folder"] = (
        "source"  # by source: a "source" field or file name, or the first folder of that name
    )
    max_sources: int = 20  # the largest so many sources stand alone, the others together
    resamples: int = 1000  # draws of the bootstrap over documents
    # robustness and samples
    robustness_bytes: int = 100_000  # noise the first so many bytes of the documents; 0: none
    samples: int = 4  # continuations whose UTF-8 is checked (BLT only); 0: none
    sample_bytes: int = 100  # bytes of each
    prompt: str = ""  # what they continue; empty: a new document
    temperature: float = 1.0  # of the sampling
    seed: int = 1337  # of noises, bootstrap and sampling
    output: str = "evaluation"  # folder for card.json and evaluation.png

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "batch_rows", "max_sources", "sample_bytes")
        for name in ("robustness_bytes", "samples", "temperature", "seed"):
            check(self, name, getattr(self, name) >= 0, "0 or more")
        check(self, "resamples", self.resamples >= 2, "2 or more")
        check(self, "row_bytes", self.row_bytes is None or self.row_bytes >= 2, "2 or more")
        check(self, "split", self.split in ("validation", "train", "all"), "validation, train or all")
        check(self, "group_by", self.group_by in ("source", "folder"), "source or folder")
        check(self, "max_bytes", self.max_bytes is None, "left out: the text to score is limited by --val_bytes")
        check(
            self,
            "file",
            not (self.file and self.dataset != "sample"),
            "left out with --dataset: give either files or a dataset",
        )


PRESETS = {
    "cpu": dict(val_bytes=200_000, robustness_bytes=25_000, samples=2),
    "colab_t4": dict(batch_rows=16),
    "rtx4090": dict(batch_rows=32),
    "h200": dict(batch_rows=64),
}


@dataclass
class ModelUnderTest:
    """A model as this script needs it; patcher None: without patches; row_bytes: bytes that a row is to hold."""

    name: str
    kind: str  # BLT, BPE transformer, flat byte transformer, entropy model
    model: torch.nn.Module
    patcher: EntropyPatcher | None
    row_bytes: int

    @property
    def row(self):
        """How it reads: row and stride in the ids of its vocabulary, and what an id is."""
        vocabulary = vocabulary_of(self.model)
        row_ids = vocabulary.row_ids(self.row_bytes)
        return {
            "row_bytes": self.row_bytes,
            "row_ids": row_ids,
            "stride_ids": max(1, row_ids // 2),
            "ids": "bytes" if vocabulary is BYTES else "tokens",
        }

    def starts(self, documents):
        """Patch starts of each document, bool [N + 1] each; None for a model without patches."""
        return None if self.patcher is None else [self.patcher.starts(document) for document in documents]


def open_model(path, row_bytes=None, device="cpu"):
    """Read a `ModelUnderTest` from an output folder or an entropy model's file. row_bytes None: as it was trained."""
    path = Path(path)
    if path.suffix == ".pth":
        model, record = load_entropy_model(path, device)
        return ModelUnderTest(
            str(path), "entropy model", model, None, row_bytes or record["config"].get("row_bytes", 2048)
        )
    if not (path / "model.json").exists():
        raise FileNotFoundError(
            f"{path / 'model.json'} not found: --model takes output folders of llm.py, train_blt.py or template_llm.py, and files "
            f"like entropy_model.pth; train one: python llm.py --output {path}"
        )
    if "patch_config" in json.loads((path / "model.json").read_text()):
        model, patcher, record = load_blt(path, device)
        kind = "BLT"
    else:
        (model, record), patcher = load_template(path, device), None
        kind = "BPE transformer" if record["model"] == "bpe" else "flat byte transformer"
    return ModelUnderTest(str(path), kind, model, patcher, row_bytes or record["settings"]["row_bytes"])


def read_documents(config):
    """The documents to score: (list of uint8 arrays, their sources, what they are as a dict for the card)."""
    if config.file:
        documents, cut = [], []
        for name in config.file:
            with open(name, "rb") as file:
                documents.append(np.frombuffer(file.read(config.val_bytes), dtype=np.uint8))
                if file.read(1):
                    cut.append(name)
            if not len(documents[-1]):
                raise ValueError(f"{name} is empty: it has no bytes to score; pass another --file")
        what, sources = {"files": list(config.file), "cut_to_val_bytes": cut}, list(config.file)
    else:
        corpus = config.corpus()
        numbers = corpus.documents(config.split, config.val_bytes)
        documents = [np.array(corpus.document(number)) for number in numbers]
        sources = [corpus.sources[corpus.source_ids[number]] for number in numbers]
        what = {
            "dataset": config.dataset,
            "split": config.split,
            "corpus_sha256": corpus.hash,
            "val_fraction": config.val_fraction,
        }
    if config.group_by == "folder":
        sources = [source.split("/")[0] if "/" in source else "(no folder)" for source in sources]
    what |= {"documents": len(documents), "bytes": sum(map(len, documents)), "sha256": hash_of_documents(documents)}
    return documents, sources, what


# ---------------------------------------------------------------------------------------------------------------------
# Scoring

COLUMNS = ("nats", "right", "targets", "bytes")  # of the arrays of parts below


@dataclass
class Costs:
    """What a model pays for documents: the totals of `training.score`, and their parts in float64 arrays of `COLUMNS`."""

    totals: dict
    by_document_DC: np.ndarray
    by_context_KC: np.ndarray  # bucket k: `bucket_range(k)` bytes before


def measure(contestant, documents, is_start, batch_rows=8, precision="fp32"):
    """The `Costs` of uint8 documents, through the scoring path of `training.bits_per_byte`. is_start: `contestant.starts(documents)`."""
    model = contestant.model
    device, vocabulary = next(model.parameters()).device, vocabulary_of(model)
    by_document_DC, by_context_KC = np.zeros((len(documents), 4)), np.zeros((64, 4))
    batches = scoring_batches(model, documents, is_start, contestant.row_bytes, batch_rows)
    bar = tqdm(
        total=sum(map(len, documents)), unit="B", unit_scale=True, desc=contestant.name, disable=None, leave=False
    )

    def costs():
        for batch, nats, is_right in score_batches(model, batches, device, precision):
            is_scored = batch.is_scored.cpu().numpy()
            document, context = (places[is_scored] for places in target_positions(batch, vocabulary))
            size = vocabulary.bytes_of_id[batch.ids[:, 1:].cpu().numpy()[is_scored]]
            values = [nats.cpu().numpy()[is_scored], is_right.cpu().numpy()[is_scored], np.ones(len(size)), size]
            bucket = np.where(
                context, np.frexp(context - 1)[1] + 1, 0
            )  # frexp gives 0, 1, 2 to 3, 4 to 7 the exponents 0, 1, 2, 3
            for column, value in enumerate(values):
                by_document_DC[:, column] += np.bincount(document, value, len(by_document_DC))
                by_context_KC[:, column] += np.bincount(bucket, value, len(by_context_KC))
            bar.update(batch.bytes)
            yield batch, nats, is_right

    with bar:
        totals = add_up(costs())
    return Costs(totals, by_document_DC, by_context_KC)


def part(values_C):
    """A row of `COLUMNS` as numbers with "bpb" and "accuracy"; bpb is None where only document ends stand."""
    totals = {name: value if name == "nats" else int(value) for name, value in zip(COLUMNS, values_C.tolist())}
    if not totals["bytes"]:
        return {**totals, "bpb": None, "accuracy": totals["right"] / totals["targets"] if totals["targets"] else None}
    made = rates(totals)
    return {**totals, "bpb": made["val_bpb"], "accuracy": made["val_accuracy"]}


def bootstrap(by_document_DC, resamples, seed):
    """Bits per byte of `resamples` draws of D documents with replacement, float64 [resamples]; None for fewer than 2 documents.

    The same number of documents and seed give the same draws, whatever the model: subtract two models' for the spread of a difference.
    """
    D = len(by_document_DC)
    if D < 2:
        return None
    generator = np.random.default_rng(seed)
    nats, size = by_document_DC[:, 0], by_document_DC[:, 3]
    drawn = (generator.integers(0, D, D) for _ in range(resamples))
    return np.array(
        [rates({"nats": nats[d].sum(), "right": 0, "targets": 1, "bytes": size[d].sum()})["val_bpb"] for d in drawn]
    )


def spread(bpb_of_draws):
    """Standard error from `bootstrap`'s draws, or None."""
    return None if bpb_of_draws is None else float(bpb_of_draws.std(ddof=1))


def bucket_range(k):
    """First and last number of context bytes in a bucket: (0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16) and so on for k = 0, 1, 2, .."""
    return (k, k) if k < 2 else ((1 << (k - 2)) + 1, 1 << (k - 1))


def group_sources(sources, documents, max_sources):
    """{source: its documents' numbers}, the largest first, those beyond max_sources together as "(others)"."""
    size, groups = {}, {}
    for source, document in zip(sources, documents):
        size[source] = size.get(source, 0) + len(document)
    kept = sorted(size, key=lambda source: (-size[source], source))[:max_sources]
    for source in kept + ["(others)"] * (len(kept) < len(size)):
        groups[source] = []
    for number, source in enumerate(sources):
        groups[source if source in groups else "(others)"].append(number)
    return groups


def patch_record(is_start, numbers):
    """How these documents are cut: {"patches", "mean_bytes", "median_bytes", "longest_bytes", "histogram": {bytes: patches}}."""
    sizes = np.concatenate([patch_sizes(is_start[number][:-1]) for number in numbers])
    values, counts = np.unique(sizes, return_counts=True)
    return {
        "patches": len(sizes), "mean_bytes": float(sizes.mean()), "median_bytes": float(np.median(sizes)), "longest_bytes": int(sizes.max()),
        "histogram": {int(value): int(count) for value, count in zip(values, counts)},
    }  # fmt: skip


def ant_speak(text, generator):
    """b"a bc" as "A   B C"."""
    return " ".join(text.upper())


def drop(text, generator):
    """Without each character with probability 0.1."""
    return "".join(character for character, chance in zip(text, generator.random(len(text))) if chance >= 0.1)


def random_case(text, generator):
    """Each character upper or lower case, by a fair coin."""
    return "".join(
        character.upper() if chance < 0.5 else character.lower()
        for character, chance in zip(text, generator.random(len(text)))
    )


def repeat(text, generator):
    """Each character, with probability 0.2, two, three or four times."""
    times = np.where(generator.random(len(text)) < 0.2, generator.integers(2, 5, len(text)), 1)
    return "".join(character * count for character, count in zip(text, times.tolist()))


def upper_case(text, generator):
    """All in upper case."""
    return text.upper()


NOISES = {"AntSpeak": ant_speak, "Drop": drop, "RandomCase": random_case, "Repeat": repeat, "UpperCase": upper_case}


def noised(document, name, seed=0):
    """A uint8 document with one of `NOISES`. Characters are those of UTF-8; a byte that is in none stays, goes or repeats as it is.

    seed: a number or a tuple of them. Example: noised of b"caf\\xc3\\xa9 \\xff" by UpperCase is b"CAF\\xc3\\x89 \\xff".
    """
    if name not in NOISES:
        raise ValueError(f"noise is {name!r}; it must be one of {', '.join(NOISES)}")
    text = document.tobytes().decode("utf-8", "surrogateescape")
    return np.frombuffer(
        NOISES[name](text, np.random.default_rng(seed)).encode("utf-8", "surrogateescape"), dtype=np.uint8
    )


def first_bytes(documents, limit):
    """The longest prefix of whole documents within a limit; of the first one at least so many bytes."""
    count = int(np.searchsorted(np.cumsum([len(document) for document in documents]), limit, side="right"))
    return documents[:count] or [documents[0][:limit]]


def robustness(contestant, documents, seed, batch_rows=8, precision="fp32"):
    """Bits per original byte of documents as they are and noised: {"original": ..., "original_bytes", noise: {"bpb", "change", "bytes"}}."""
    original_bytes = sum(map(len, documents))
    record = {"original_bytes": original_bytes}
    for name in (None, *NOISES):
        texts = (
            documents
            if name is None
            else [noised(document, name, (seed, number)) for number, document in enumerate(documents)]
        )
        if not any(map(len, texts)):
            record[name] = {"bpb": None, "change": None, "bytes": 0}  # Drop took the only characters
            continue
        totals = measure(contestant, texts, contestant.starts(texts), batch_rows, precision).totals
        bpb = rates({**totals, "bytes": original_bytes})["val_bpb"]
        if name is None:
            record["original"] = clean = bpb
        else:
            record[name] = {"bpb": bpb, "change": bpb - clean, "bytes": sum(map(len, texts))}
    return record


def is_valid_utf8(text, may_be_cut=False):
    """Whether bytes are UTF-8; may_be_cut: but for a character that the end cuts."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(text, final=not may_be_cut)
    except UnicodeDecodeError:
        return False
    return True


def sample_record(contestant, config, precision):
    """Continue the prompt `samples` times: share of valid UTF-8 and the texts. None without samples, or for what is no BLT."""
    if not config.samples or contestant.kind != "BLT":
        return None
    prompt = config.prompt.encode("utf-8", "surrogateescape")
    prompts = [prompt] * config.samples  # continuation i has seed + i
    sampling = dict(temperature=config.temperature, seed=config.seed, context_bytes=contestant.row_bytes)
    texts = generate(
        contestant.model, contestant.patcher, prompts, config.sample_bytes, precision=precision, **sampling
    )
    valid = [is_valid_utf8(text, may_be_cut=len(text) == config.sample_bytes) for text in texts]
    return {
        "valid": sum(valid), "of": len(texts), "valid_share": sum(valid) / len(texts), "seeds": [config.seed + i for i in range(config.samples)],
        "bytes": sum(map(len, texts)), "texts": [text.decode("utf-8", "backslashreplace") for text in texts],
    }  # fmt: skip


def evaluate_model(contestant, documents, groups, config, precision):
    """All numbers of one model as a dict for the card, and its bootstrap draws."""
    model, patcher = contestant.model, contestant.patcher
    record = {
        "path": contestant.name, "kind": contestant.kind, "sha256": model_hash(model), "parameters": sum(p.numel() for p in model.parameters()),
        **contestant.row, "scores_document_ends": predicts_document_ends(model),
    }  # fmt: skip
    text = np.concatenate(documents[:8])[:512]
    if len(vocabulary_of(model).encode(text)) > 1:
        gate_patcher = None if patcher is None else EntropyPatcher(patcher.entropy_model, patcher.config)
        record["leak_gate_nats"] = leak_gate(model, gate_patcher, text)
    is_start = contestant.starts(documents)
    costs = measure(contestant, documents, is_start, config.batch_rows, precision)
    draws = bootstrap(costs.by_document_DC, config.resamples, config.seed)
    whole = rates(costs.totals)
    record |= {
        "bpb": whole["val_bpb"], "standard_error": spread(draws), "accuracy": whole["val_accuracy"], **costs.totals,
        "by_source": {}, "by_context": [],
    }  # fmt: skip
    for source, numbers in groups.items():
        values_DC = costs.by_document_DC[numbers]
        record["by_source"][source] = {
            **part(values_DC.sum(0)), "documents": len(numbers), "standard_error": spread(bootstrap(values_DC, config.resamples, config.seed)),
        }  # fmt: skip
        if patcher is not None:
            record["by_source"][source]["bytes_a_patch"] = patch_record(is_start, numbers)["mean_bytes"]
    for k in np.flatnonzero(costs.by_context_KC[:, 2]).tolist():
        first, last = bucket_range(k)
        record["by_context"].append({"first": first, "last": last, **part(costs.by_context_KC[k])})
    if patcher is not None:
        entropy_model = patcher.entropy_model
        record["patch_config"], record["patch_precision"] = asdict(patcher.config), patcher.precision
        record["entropy_model_sha256"] = None if entropy_model is None else model_hash(entropy_model)
        record["patches"] = patch_record(is_start, range(len(documents)))
    elif contestant.kind == "BPE transformer":
        ends = len(documents)  # a target each
        record["bytes_a_token"] = costs.totals["bytes"] / max(1, costs.totals["targets"] - ends)
    if config.robustness_bytes:
        noise_on = first_bytes(documents, config.robustness_bytes)
        record["robustness"] = robustness(contestant, noise_on, config.seed, config.batch_rows, precision)
    record["samples"] = sample_record(contestant, config, precision)
    return record, draws


def main(config):
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    print_header(config, device, precision)
    contestants = [open_model(path, config.row_bytes, device) for path in config.model]
    documents, sources, what = read_documents(config)
    groups = group_sources(sources, documents, config.max_sources)
    name = ", ".join(what["files"]) if config.file else f"{config.dataset}, {config.split}"
    cut = (
        f" (the first {config.val_bytes:,} bytes only of {', '.join(what['cut_to_val_bytes'])}; --val_bytes)"
        if what.get("cut_to_val_bytes")
        else ""
    )
    print(
        f"text: {name} | documents: {what['documents']:,}, bytes: {what['bytes']:,}{cut}, sha256 {what['sha256'][:12]}"
    )
    records, draws = [], []
    for contestant in contestants:
        record, drawn = evaluate_model(contestant, documents, groups, config, precision)
        records.append(record)
        draws.append(drawn)
        gate = (
            f"leak gate passed: largest difference {record['leak_gate_nats']:.1e} nats"
            if "leak_gate_nats" in record
            else "text too short for the leak gate"
        )
        print(
            f"{record['path']}: {record['kind']}, {record['parameters']:,} parameters, sha256 {record['sha256'][:12]} | rows of {record['row_ids']:,} "
            f"{record['ids']}, windows {record['stride_ids']:,} apart | {gate}"
        )
    for record, drawn in zip(records[1:], draws[1:]):
        record["difference_to_first"] = {
            "bpb": record["bpb"] - records[0]["bpb"], "standard_error": None if drawn is None else spread(drawn - draws[0]),
        }  # fmt: skip
    card = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]], "commit": git_commit(), "python": platform.python_version(), "torch": torch.__version__,
        "numpy": np.__version__, "device": str(device), "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(), "precision": precision, "settings": asdict(config), "text": what,
        "definitions": __doc__[__doc__.index("Bits per byte (bpb)") :], "compressors_bpb": compressors_bpb(documents), "models": records,
    }  # fmt: skip
    print_report(card, config)
    output = Path(config.output)
    write_json(output / "card.json", card)
    draw(output / "evaluation.png", card)
    print(f"wrote {output}/card.json, evaluation.png")
    return card


def number(value, error=None, signed=False):
    """A figure for a table: 1.9961, 1.9961 ±0.0123, or - for None."""
    if value is None:
        return "-"
    return f"{value:{'+' if signed else ''}.4f}" + ("" if error is None else f" ±{error:.4f}")


def short_names(records):
    """The last part of each model's path, or the whole paths where that does not tell them apart."""
    names = [Path(record["path"]).name for record in records]
    return names if len(set(names)) == len(names) else [record["path"] for record in records]


def print_titled_table(title, names, lines):
    """A title and lines of (label, cells), a column for each model."""
    print(f"\n{title}")
    print_table(["", *names], [[label, *cells] for label, cells in lines])


def context_label(entry):
    """5-8 for the bucket of 5 to 8 bytes."""
    return f"{entry['first']:,}" if entry["first"] == entry["last"] else f"{entry['first']:,}-{entry['last']:,}"


def by_context_lines(records):
    """(label, the entry of each model or None) of every bucket that a model has."""
    found = {entry["first"]: context_label(entry) for record in records for entry in record["by_context"]}
    return [
        (found[first], [next((e for e in record["by_context"] if e["first"] == first), None) for record in records])
        for first in sorted(found)
    ]


def print_report(card, config):
    """The card as tables."""
    records = card["models"]
    names = short_names(records)
    cells = lambda make: [make(record) for record in records]  # noqa: E731
    documents = card["text"]["documents"]
    error = f"± bootstrap standard error over {documents:,} documents" if documents > 1 else "one document: no ±"
    lines = [("bits per byte", cells(lambda r: number(r["bpb"], r["standard_error"])))]
    if len(records) > 1:
        lines.append(
            (
                "  against the first (paired)",
                cells(
                    lambda r: (
                        number(r["difference_to_first"]["bpb"], r["difference_to_first"]["standard_error"], True)
                        if "difference_to_first" in r
                        else "-"
                    )
                ),
            )
        )
    lines += [
        ("accuracy", cells(lambda r: f"{r['accuracy']:.1%} of {r['ids']}")),
        ("document ends scored", cells(lambda r: "yes" if r["scores_document_ends"] else "no")),
        ("row and stride", cells(lambda r: f"{r['row_ids']:,} and {r['stride_ids']:,} {r['ids']}")),
        (
            "bytes a patch or token",
            cells(
                lambda r: (
                    f"{r['patches']['mean_bytes']:.2f} a patch"
                    if "patches" in r
                    else f"{r['bytes_a_token']:.2f} a token"
                    if "bytes_a_token" in r
                    else "-"
                )
            ),
        ),
    ]
    print_titled_table(f"bytes: {card['text']['bytes']:,} (fewer bits are better; {error})", names, lines)
    print("  the same bytes by " + ", ".join(f"{name} {bpb:.4f}" for name, bpb in card["compressors_bpb"].items()))
    groups = records[0]["by_source"]
    if len(groups) > 1:
        label = lambda source: (
            f"{source} ({groups[source]['bytes']:,} bytes, documents: {groups[source]['documents']:,})"
        )  # noqa: E731
        print_titled_table(
            f"bits per byte by {config.group_by}",
            names,
            [
                (label(s), cells(lambda r: number(r["by_source"][s]["bpb"], r["by_source"][s]["standard_error"])))
                for s in groups
            ],
        )
        if any("patches" in record for record in records):
            lines = [
                (s, cells(lambda r: f"{r['by_source'][s]['bytes_a_patch']:.2f}" if "patches" in r else "-"))
                for s in groups
            ]
            print_titled_table(f"bytes a patch by {config.group_by}", names, lines)
    lines = [(label, [number(e and e["bpb"]) for e in entries]) for label, entries in by_context_lines(records)]
    print_titled_table("bits per byte by context: bytes of the document before it in the row", names, lines)
    for record in records:
        if "patches" in record:
            made = record["patches"]
            shares = [(size, count / made["patches"]) for size, count in made["histogram"].items()]
            shown = ", ".join(f"{size}: {share:.1%}" for size, share in shares if size <= 12)
            rest = sum(share for size, share in shares if size > 12)
            print(
                f"\npatches of {record['path']}: {made['patches']:,}, of {made['median_bytes']:g} bytes in the median, {made['longest_bytes']:,} at most; share by bytes"
            )
            print(f"  {shown}, more: {rest:.1%}")
    if config.robustness_bytes:
        lines = [("as it is", cells(lambda r: number(r["robustness"]["original"])))]
        lines += [
            (
                noise,
                cells(
                    lambda r: (
                        number(r["robustness"][noise]["bpb"])
                        + " " * 2
                        + number(r["robustness"][noise]["change"], signed=True)
                    )
                ),
            )
            for noise in NOISES
        ]
        size = records[0]["robustness"]["original_bytes"]
        print_titled_table(
            f"bits per original byte of noised text, and the change (the first {size:,} bytes)", names, lines
        )
    for record in records:
        made = record["samples"]
        if made:
            print(
                f"\nsamples of {record['path']} at temperature {config.temperature:g}: {made['valid']} of {made['of']} are valid UTF-8 ({made['bytes']:,} bytes)"
            )
            for text in made["texts"]:
                print(f"  {text!r}")
    print()


def draw(path, card):
    """evaluation.png: bits per byte by context, by source, and of noised text."""
    from blt.pictures import draw_evaluation

    records = card["models"]
    names = [
        f"{name}: {number(record['bpb'], record['standard_error'])} bpb"
        for name, record in zip(short_names(records), records)
    ]
    contexts = [(label, [e and e["bpb"] for e in entries]) for label, entries in by_context_lines(records)]
    sources = [
        (
            source,
            [r["by_source"][source]["bpb"] for r in records],
            [r["by_source"][source]["standard_error"] for r in records],
        )
        for source in records[0]["by_source"]
    ]
    noises = (
        [(noise, [r["robustness"][noise]["change"] for r in records]) for noise in NOISES]
        if "robustness" in records[0]
        else []
    )
    what = card["text"]
    title = (
        ", ".join(what["files"]) if "files" in what else f"{what['dataset']}, {what['split']}"
    ) + f": {what['bytes']:,} bytes; "
    title += ", ".join(f"{name} {bpb:.3f}" for name, bpb in card["compressors_bpb"].items())
    draw_evaluation(path, names, contexts, sources, noises, title)


if __name__ == "__main__":
    run_script(main, EvaluateConfig, __doc__, PRESETS)
