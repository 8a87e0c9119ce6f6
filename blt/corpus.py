"""Corpora as bytes on disk: read any source once, split it, and map it into memory.

    corpus = open_corpus("sample")
    for number in corpus.documents("train"):
        print(bytes(corpus.document(number)[:60]))

Reads: the bundled sample (data/sample.jsonl.xz, 23.5 MB of English text; data/LICENSES.md names the
authors); a ready-made dataset with its own split (blt/splits.py); a local file or folder of .txt, .md,
.jsonl, .json or .parquet, each plain, .gz, .xz or .zst; or a dataset streamed from the Hugging Face
hub, such as "HuggingFaceTB/smollm-corpus:cosmopedia-v2".
Writes: a byte store, cache_dir/NAME-KEY/. The key is a hash of the settings and of the files' sizes
and times, so the same settings on unchanged files open the store that exists already. Opening checks
the store for damage; `check_store` reads all of it.
Takes: about 1 s for the sample on one core of an AMD EPYC server. Documents stream through: memory
holds one document, and about 30 bytes for each document of the corpus.
"""

import contextlib
import difflib
import errno
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import shutil
import tempfile
import time
import uuid
import zipfile
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from blt.checks import check, check_packages, check_positive
from blt.config import apply_presets
from blt.files import add_to_hash, write_atomically
from blt.progress import progress_bar
from blt.splits import STANDARD_SPLITS, standard_split


@dataclass
class DataConfig:
    """Settings of every script that reads a corpus."""

    preset: list[str] = field(default_factory=list)  # a size, a machine, or one of each; what is not named is detected
    # data
    dataset: str = "sample"  # sample, shakespeare, enwik8=FILE, text8=FILE, a file, folder[:split], or hub id[:subset]
    val_dataset: str | None = None  # the validation text: a file, folder or hub id; None: held out from the dataset
    text_field: str = "text"  # the field of a JSON or parquet record that holds the text
    corpus_bytes: int | None = None  # store at most this many bytes of each dataset (needed for a Hugging Face dataset)
    val_fraction: float = 0.03  # share of documents held out, chosen by a hash of each; unused with val_dataset
    max_document_bytes: int = 65536  # plain text files are split into documents of at most this many bytes
    max_bytes: int | None = None  # use at most this many bytes of the training documents; None: all
    val_bytes: int = 1_000_000  # use at most this many bytes of the validation documents
    data_cache: str = "data_cache"  # folder of the byte stores
    # machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 if the hardware has it, fp16 on older GPUs

    def __post_init__(self):
        apply_presets(self)
        check_positive(self, "max_bytes", "val_bytes", "corpus_bytes", "max_document_bytes")
        is_piece = self.max_document_bytes <= DOCUMENT_LIMIT
        check(self, "max_document_bytes", is_piece, f"at most {DOCUMENT_LIMIT}: a document is read in one piece")
        check(self, "val_fraction", 0 < self.val_fraction <= 0.5, "above 0 and at most 0.5")
        check(self, "precision", self.precision in ("auto", "bf16", "fp16", "fp32"), "one of auto, bf16, fp16, fp32")

    def corpus(self):
        """Open the byte store of the dataset; the first time it is built."""
        return open_corpus(
            self.dataset,
            val_dataset=self.val_dataset,
            text_field=self.text_field,
            max_bytes=self.corpus_bytes,
            val_fraction=self.val_fraction,
            max_document_bytes=self.max_document_bytes,
            cache_dir=self.data_cache,
        )

    def corpus_facts(self, corpus):
        """What a record says about the text of a run: names, hash and, of a named split, the equal documents."""
        facts = {"dataset": self.dataset, "sha256": corpus.hash}
        if self.val_dataset is not None:
            facts["val_dataset"] = self.val_dataset
        if corpus.is_named_split:
            facts |= {name: corpus.manifest[name] for name in ("equal_documents", "equal_bytes")}
        return facts


# The version of the store's format. It is part of the key, so a store of another version is never
# opened.
FORMAT = 1
SAMPLE_PATH = Path(__file__).resolve().parent.parent / "data" / "sample.jsonl.xz"
TEXT_KINDS = (".txt", ".md")
RECORD_KINDS = (".jsonl", ".json", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
READABLE = f"{', '.join(TEXT_KINDS + RECORD_KINDS)}, each plain or {', '.join(COMPRESSIONS)}"
# A .json array is parsed in one piece, which takes several times its size in memory.
WHOLE_JSON_BYTES = 10**9
# The largest piece into which a text file may be split; a piece is in memory as a whole.
DOCUMENT_LIMIT = 2**30
# Source ids are uint16.
SOURCE_LIMIT = 2**16
# Reasons for which a file in a folder is not read.
UNKNOWN_EXTENSION = "skipped for their extension"
OWN_OUTPUT = "outputs of this project"
# What the JSON files of this project begin with: records, manifests, rules, tables of results, metrics.
OWN_JSON = re.compile(
    rb'"(model_config|patch_config|max_document_bytes|corpus_sha256|added_tokens|transformers_version)"\s*:'
    rb'|"val_bpb_of_each_seed"|"expected_time_is_from"|^\s*\{"step":\s*\d|^\s*\{"run":\s*"[^"]*",\s*"seed"'
)
# Results name the script that made them. They may quote text, so a field of that name in them proves nothing.
OWN_RESULT = re.compile(rb'"command":\s*\[?\s*"(bench|evaluate)\.py')
SPLITS = ("train", "validation", "test")
# The words by which the Hugging Face hub knows the split of a file.
SPLIT_OF_WORD = {word: "train" for word in ("train", "training")}
SPLIT_OF_WORD |= {word: "validation" for word in ("validation", "valid", "val", "dev")}
SPLIT_OF_WORD |= {word: "test" for word in ("test", "testing", "eval", "evaluation")}
# Files that describe a downloaded dataset, without their extension.
CARDS = ("readme", "license", "licence", "changelog", "contributing", "dataset_card", "citation")
CARDS += ("dataset_infos", "dataset_info", "dataset_dict", "state")
STORE_FILES = ("bytes.bin", "offsets.npy", "is_validation.npy", "source_ids.npy")
# What `quick_hash` reads of the text.
SPOTS = 64
SPOT_BYTES = 4096
# Stores of at most this many bytes are checked as a whole when they are opened: that takes 0.1 s.
WHOLE_CHECK_BYTES = 32 * 2**20
# What a killed build has left is removed after this time without a change.
LEFTOVER_SECONDS = 24 * 3600
# Bytes that are read from or written to a file at once.
BUFFER_BYTES = 1 << 20


class Corpus:
    """A byte store on disk, memory-mapped: opening 10 GB takes milliseconds and reads only the index.

    folder, manifest: where the store is, and how it was made (manifest.json).
    bytes: uint8 [total bytes], the raw bytes of all documents with nothing between them.
    offsets: int64 [documents + 1]; document i is bytes[offsets[i]:offsets[i + 1]].
    is_validation: bool [documents].
    is_test: bool [documents], the part that is neither for training nor for validation; few datasets have one.
    is_named_split: whether the user or a ready-made dataset said which text is for validation; else it was held out.
    source_ids: uint16 [documents], indices into `sources`. A document's source is its record's
        "source" field, else the name of its file or the hub id.
    hash: sha256 over each document's length (8 bytes, little endian) and bytes, in stored order; of a named split
        also over the number of documents in each part.

    Raises ValueError if the store is damaged.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.bytes = np.memmap(self.folder / "bytes.bin", dtype=np.uint8, mode="r")
        self.offsets = np.load(self.folder / "offsets.npy")
        self.is_validation = np.load(self.folder / "is_validation.npy")
        self.source_ids = np.load(self.folder / "source_ids.npy")
        self.is_named_split = "parts" in self.manifest
        # The parts of a named split follow each other, and the test comes last.
        n_test = self.manifest["parts"].get("test", 0) if self.is_named_split else 0
        self.is_test = np.arange(len(self.is_validation)) >= len(self.is_validation) - n_test
        self.sources = self.manifest["sources"]
        self.hash = self.manifest["sha256"]

    def __len__(self):
        return len(self.is_validation)

    def document(self, number):
        """The bytes of one document: a read-only uint8 view of the mapped file, not a copy."""
        # A negative number would silently give other bytes, as in any slice.
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} does not exist; the corpus has documents 0 to {len(self) - 1}")
        return self.bytes[self.offsets[number] : self.offsets[number + 1]]

    def documents(self, split, max_bytes=None, max_documents=None):
        """Numbers of the first documents of a split, in stored order: as many as the limits allow.

        split: "train", "validation", "test", or "all" for all but the test.
        max_bytes, max_documents: limits on their sum of bytes and on their number. The first document
            is always included, even if it is larger than max_bytes.
        Returns int64 [n]. Example: with training documents 0, 1 and 3 of 10 bytes each,
        documents("train", max_bytes=25) is [0, 1].
        """
        if split not in (*SPLITS, "all"):
            raise ValueError(f"split is {split!r}; it must be 'train', 'validation', 'test' or 'all'")
        if split == "test" and not self.is_test.any():
            raise ValueError(
                f"dataset {self.manifest['dataset']} has no test part; only enwik8 and text8 have one, "
                "so score its validation text"
            )
        check_limits(max_bytes=max_bytes, max_documents=max_documents)
        if split == "all":
            numbers = np.flatnonzero(~self.is_test)
        elif split == "test":
            numbers = np.flatnonzero(self.is_test)
        else:
            numbers = np.flatnonzero((self.is_validation == (split == "validation")) & ~self.is_test)
        if max_bytes is not None:
            bytes_so_far = np.cumsum(np.diff(self.offsets)[numbers])
            # A limit may be larger than any number that NumPy compares.
            max_bytes = min(max_bytes, len(self.bytes))
            n_within = np.searchsorted(bytes_so_far, max_bytes, side="right")
            numbers = numbers[: max(1, n_within)]
        return numbers[:max_documents]

    def notes(self, train_bytes=None, val_bytes=None, split="validation"):
        """What a reader of results must know about the split, as a list of lines.

        train_bytes, val_bytes: the limits with which `documents` of "train" and of `split` are used.
        """
        lines = []
        if self.is_named_split:
            manifest = self.manifest
            equal = "none of them is"
            if manifest["equal_documents"]:
                equal = f"{manifest['equal_documents']:,} of them ({manifest['equal_bytes']:,} bytes) are"
            lines.append(
                f"named split: {manifest['train_documents']:,} documents for training, "
                f"{manifest['validation_documents']:,} for validation; {equal} in the training text, too"
            )
        for part, limit, name in (("train", train_bytes, "max_bytes"), (split, val_bytes, "val_bytes")):
            numbers = self.documents(part, limit)
            used = int(np.diff(self.offsets)[numbers].sum())
            if limit is not None and used > limit:
                lines.append(
                    f"note: {name} is {limit:,}, but the first {part} document has {used:,} bytes: all are used"
                )
        return lines


def open_corpus(
    dataset="sample",
    subset=None,
    text_field="text",
    max_bytes=None,
    max_documents=None,
    val_fraction=0.03,
    max_document_bytes=65536,
    cache_dir="data_cache",
    val_dataset=None,
):
    """Open the byte store of a dataset; build it first if there is none.

    dataset: "sample"; or a local file or folder (`find_files` says what of it is read); or
        "folder:train", "folder:validation", "folder:test" or "folder:all" for a folder that has
        files of several splits (else its train split is read); or a Hugging Face id, "owner/name" or
        "owner/name:subset": its train split is streamed; or a ready-made dataset of blt/splits.py.
    text_field: the field of JSON, parquet and hub records that holds the text. Records whose text is
        null or empty are skipped.
    max_bytes, max_documents: stop before the document that would exceed the limit; of each dataset. A
        hub dataset needs one of them.
    val_fraction: share of documents (not exactly of bytes) that become validation, in (0, 0.5]. See
        `split_off`.
    max_document_bytes: .txt and .md files are cut into documents of at most this many bytes. So one
        long book has training and validation parts: the validation text is then of known books.
        Records are never cut.
    val_dataset: a dataset that is the whole validation text, named like `dataset`. Then all of
        `dataset` is for training, and documents that are in both are counted.
    Raises ValueError, FileNotFoundError, ConnectionError or OSError with what to do about it.
    """
    check_limits(max_bytes=max_bytes, max_documents=max_documents, max_document_bytes=max_document_bytes)
    if max_document_bytes > DOCUMENT_LIMIT:
        raise ValueError(f"max_document_bytes is {max_document_bytes}; it must be at most {DOCUMENT_LIMIT}")
    if not 0 < val_fraction <= 0.5:
        raise ValueError(f"val_fraction is {val_fraction}; it must be above 0 and at most 0.5")
    dataset = os.fspath(dataset)
    cache_dir = Path(cache_dir).expanduser()
    needs_limit = max_bytes is None and max_documents is None
    options = dict(
        text_field=text_field, max_document_bytes=max_document_bytes, cache_dir=cache_dir, needs_limit=needs_limit
    )
    standard = standard_split(dataset)
    validation = None
    if standard is not None:
        if not needs_limit:
            raise ValueError(f"{standard[0]} is stored as a whole; leave out --corpus_bytes, and use --max_bytes")
        if subset is not None:
            raise ValueError(f"subset is {subset!r}, but {standard[0]} has none; leave it out")
        source = standard_source(*standard, **options)
    else:
        source = find_source(dataset, subset, **options)
    if val_dataset is not None:
        val_dataset = os.fspath(val_dataset)
        for name in (dataset, val_dataset):
            if standard_split(name) is not None:
                raise ValueError(
                    f"{name} has a validation text of its own; leave out --val_dataset, or name other texts"
                )
        validation = find_source(val_dataset, None, **options)

    settings = dict(
        format=FORMAT,
        dataset=source.name,
        subset=source.subset,
        text_field=text_field,
        max_bytes=max_bytes,
        max_documents=max_documents,
        val_fraction=val_fraction,
        max_document_bytes=max_document_bytes,
        # Sizes and times stand for the contents: reading 10 GB to learn whether they changed would
        # be slow.
        files=[[file, *state] for file, state in source.states.items()],
    )
    if source.hub_name is not None:
        settings["hub"] = source.hub_name
    parts = source.parts
    names = source.name
    origin = source.origin
    if validation is not None:
        settings["val_dataset"] = validation.name
        settings["val_files"] = [[file, *state] for file, state in validation.states.items()]
        parts = [("train", source.parts[0][1]), ("validation", validation.parts[0][1])]
        names = f"{source.name}+{validation.name}"
        origin = f"{source.origin}, validation from {validation.origin}"
    folder = cache_dir / store_name(names, settings)
    # The documents are generators: what they read is read only if the store is built.
    if not folder.exists():
        if parts[0][0] is None:
            print_long_texts(source.states, max_document_bytes)
        build_store(folder, parts, settings, origin)
    corpus = Corpus(folder)
    # A store that was renamed, or whose manifest was exchanged, holds another text than the one asked for.
    other = [key for key, value in settings.items() if corpus.manifest.get(key) != value]
    if other:
        raise damaged(folder, f"its manifest is of another store: {', '.join(other)} differ")
    return corpus


@dataclass
class Source:
    """A dataset that was found, before it is read.

    parts: list of ("train", "validation" or "test", generator of (source, bytes)). Or [(None,
        generator)] for a dataset without parts: `split_off` then holds documents out.
    states: {name of a file: its `file_state`}; empty for a hub dataset.
    origin: where it is from, for messages.
    hub_name: the hub id that a ready-made dataset is read from; its own name does not tell.
    """

    name: str
    subset: str | None
    parts: list
    states: dict
    origin: str
    hub_name: str | None = None


def find_source(dataset, subset, text_field, max_document_bytes, cache_dir, needs_limit):
    """The `Source` of a dataset other than the ready-made ones; see `open_corpus`."""
    path, split = (SAMPLE_PATH, None) if dataset == "sample" else local_path(dataset)
    if path is None:
        repo, subset = hub_id(dataset, subset)
        if needs_limit:
            raise ValueError(
                f"{dataset} is not found here as a file or folder (looked from {shown(Path.cwd())})"
                f"{close_names(dataset)}; if you mean the Hugging Face dataset {repo}, say how much of it"
                " to store, because it may be terabytes: --corpus_bytes N"
            )
        name = f"{repo}:{subset}" if subset else repo
        documents = read_hub(repo, subset, name, text_field)
        return Source(name, subset, [(None, documents)], {}, f"{name} (Hugging Face hub, streamed)")
    if subset is not None:
        raise ValueError(f"subset is {subset!r}, but {dataset} is a local dataset; only hub datasets have subsets")
    name = "sample" if dataset == "sample" else shown(path.resolve().name) + (f":{split}" if split else "")
    files, found = find_files(path, cache_dir, text_field, split)
    states = {file: file_state(where) for file, where in files.items()}
    documents = read_files(files, text_field, max_document_bytes, states)
    return Source(name, None, [(None, documents)], states, f"{shown(path)} ({found})")


# ---- Ready-made datasets


def standard_source(name, where, text_field, max_document_bytes, cache_dir, needs_limit):
    """The `Source` of a ready-made dataset, its parts split as published.

    name, where: what `standard_split` returned.
    """
    standard = STANDARD_SPLITS[name]
    if standard.path is not None:
        if where:
            raise ValueError(f"{name} is bundled; write --dataset {name}, or name the file alone: --dataset {where}")
        path = standard.path
        if not path.exists():
            raise FileNotFoundError(f"the bundled text {path} is missing; restore it with: git checkout {path}")
    else:
        path = standard_file(name, where)
    hub_name = None
    if path is None:
        repo, subset = hub_id(where, None)
        hub_name = f"{repo}:{subset}" if subset else repo
        origin = f"{hub_name} (Hugging Face hub, streamed)"
        states = {}

        def read():
            records = hub_records(repo, subset, hub_name, all_splits=True)
            text = bytearray()
            for _, document in hub_documents(records, text_field, hub_name):
                text += document
                # It is another text, and may be terabytes.
                if len(text) > standard.total_bytes:
                    break
            return bytes(text)
    else:
        origin = shown(path)
        states = {shown(path.name): file_state(path)}

        def read():
            # One byte more is enough to know that it is another text.
            with reading(path, states[shown(path.name)]), open_plain(path) as stream:
                return stream.read(standard.total_bytes + 1)

    # All parts are of one text, which is read once.
    kept = []

    def documents_of(part):
        if not kept:
            kept.append(read())
            difference = None
            if len(kept[0]) != standard.total_bytes:
                size = "more" if len(kept[0]) > standard.total_bytes else f"{len(kept[0]):,}"
                difference = f"it has {size} bytes, and {name} has exactly {standard.total_bytes:,}"
            elif standard.md5 not in (None, hashlib.md5(kept[0], usedforsecurity=False).hexdigest()):
                difference = f"it has the right size but another content (not the MD5 {standard.md5})"
            if difference is not None:
                source = f" from {standard.where}" if standard.where else ""
                raise ValueError(f"{origin} is not {name}: {difference}; get the original{source}")
        text = standard.part(part, kept[0])
        for document in [text] if standard.is_whole else cut_text(io.BytesIO(text), max_document_bytes):
            yield name, document

    parts = [(part, documents_of(part)) for part in standard.sizes]
    return Source(name, None, parts, states, origin, hub_name)


def standard_file(name, where):
    """The path of a ready-made dataset's file; None if `where` has the form of a hub id."""
    if not where:
        # As the original is called when it is downloaded and when it is unpacked.
        here = [Path(name), Path(f"{name}.zip")]
        for path in here:
            if path.is_file():
                return path
        raise FileNotFoundError(
            f"{name} is not bundled, and there is no file {name} in {shown(Path.cwd())}; download "
            f"{STANDARD_SPLITS[name].where} and pass --dataset {name}=FILE, or a Hugging Face id: {name}=OWNER/NAME"
        )
    path = Path(where).expanduser()
    if path.is_file():
        return path
    if path.exists():
        raise ValueError(f"cannot read {name} from {shown(path)}: it is no file; pass --dataset {name}=FILE")
    # It is a hub id or a path that is not there, which ends with an error.
    local_path(where)
    return None


def open_plain(path):
    """The decompressed bytes of a file as a stream, also of a .zip with one file in it."""
    if path.suffix.lower() != ".zip":
        return open_stream(path)
    archive = zipfile.ZipFile(path)
    if len(archive.namelist()) != 1:
        raise zipfile.BadZipFile(f"it holds {len(archive.namelist())} files, not one")
    return archive.open(archive.namelist()[0])


def print_long_texts(states, max_document_bytes):
    """Say that long text files will have parts on both sides of the split."""
    is_long = [kind_of(name)[0] in TEXT_KINDS and state[0] > max_document_bytes for name, state in states.items()]
    if any(is_long):
        print(
            f"note: {sum(is_long):,} text files are longer than {max_document_bytes:,} bytes: each is split into"
            " documents, some for training and some for validation (--max_document_bytes)"
        )


def file_state(path):
    """What tells that a file is still the same: [size in bytes, time of its last change in ns]."""
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"cannot read {shown(path)}: {error.strerror}; has it been moved? run again") from error
    return [status.st_size, status.st_mtime_ns]


def shown(path):
    """A path as text that any file and terminal can hold: bytes that are no UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def store_name(name, settings):
    """The folder name of a store, NAME-KEY: the dataset in safe characters, a hash of the settings."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "corpus"
    # The order of the settings is part of the key.
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    return f"{slug}-{key}"


def check_limits(**limits):
    """Raise ValueError naming the first limit below 1. None means no limit."""
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


# ---- Finding a dataset


def kind_of(path):
    """The format (None if it is not readable) and the compression ("" for none) that a name shows.

    "A.jsonl.gz" gives (".jsonl", ".gz"), "a.csv" gives (None, "").
    """
    stem = str(path).lower()
    compression = ""
    if stem.endswith(COMPRESSIONS):
        stem, compression = os.path.splitext(stem)
    kind = os.path.splitext(stem)[1]
    if kind not in TEXT_KINDS + RECORD_KINDS:
        kind = None
    return kind, compression


def local_path(dataset):
    """The (path, split or None) that `dataset` names: "books" or "books:test".

    (None, None) if it has the form of a hub id. Raises FileNotFoundError if it has the form of a path,
    but nothing is there.
    """
    path = Path(dataset).expanduser()
    # Path("") would be the working directory.
    if dataset and path.exists():
        return path, None
    before, _, split = dataset.rpartition(":")
    if before and split in (*SPLITS, "all") and Path(before).expanduser().exists():
        return Path(before).expanduser(), split
    has_readable_kind = kind_of(dataset)[0] is not None
    # A hub id has one slash, between owner and name.
    has_path_characters = dataset.startswith((".", "/", "~")) or "\\" in dataset or dataset.count("/") > 1
    if has_readable_kind or has_path_characters:
        raise FileNotFoundError(
            f"{shown(dataset)} not found (looked from {shown(Path.cwd())}){close_names(dataset)};"
            " pass an existing file or folder, or --dataset sample"
        )
    return None, None


def close_names(dataset):
    """'; did you mean NAME or NAME' with what is there under a similar name, or ''."""
    path = Path(dataset or ".").expanduser()
    # The part that is misspelt may be a folder above.
    while not path.parent.exists():
        path = path.parent
    try:
        # A folder of millions of files must not hold up a message.
        entries = list(itertools.islice(os.scandir(path.parent), 10_000))
    except OSError:
        return ""
    # Compared in lower case, because case is what is most easily mistaken.
    names = {entry.name.lower(): entry.name for entry in entries if not entry.name.startswith(".")}
    if path.parent == Path("."):
        names["sample"] = "sample"
    close = difflib.get_close_matches(path.name.lower(), sorted(names), n=2)
    if not close:
        return ""
    return "; did you mean " + " or ".join(shown(path.parent / names[name]) for name in close) + "?"


def hub_id(dataset, subset):
    """Split "owner/name:subset" into ("owner/name", "subset" or None).

    subset: the one that was given beside the id; the two must agree. Raises ValueError if they do
    not, or if `dataset` is no hub id.
    """
    repo, _, named_subset = dataset.partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(
            f"unknown dataset {dataset!r}; use 'sample', an existing file or folder, or a Hugging Face"
            " id OWNER/NAME or OWNER/NAME:SUBSET, e.g. HuggingFaceTB/smollm-corpus:cosmopedia-v2"
            f"{close_names(dataset)}"
        )
    if named_subset and subset not in (None, named_subset):
        raise ValueError(f"subset is {subset!r}, but dataset {dataset!r} names another one; give only one of them")
    return repo, subset or named_subset or None


def find_files(path, cache_dir, text_field, split=None):
    """The files at `path` to read, sorted, as {name relative to path: path}; and a text that says what was found.

    Passed over and counted: unknown extensions, hidden files and folders, the store's own folder and
    other outputs of this project, links to nothing and to what is read anyway, and the cards of a
    downloaded dataset. Linked folders are followed once. Of a folder that has files of several splits
    only one is read, see `choose_split`. Raises ValueError if there is nothing readable.
    """
    # Only the sample gets here without being there: local_path has seen every other path.
    if not path.exists():
        raise FileNotFoundError(f"the bundled sample {path} is missing; restore it with: git checkout {path}")
    if not path.is_dir():
        if split is not None:
            raise ValueError(f"{shown(path)} is a file, which has no split {split!r}; leave out :{split}")
        if not path.is_file():
            raise ValueError(f"cannot read {shown(path)}: it is a pipe or a device; store it as a file first")
        if kind_of(path)[0] is None:
            raise ValueError(f"cannot read {shown(path)}: its extension is none of {READABLE}")
        return {shown(path.name): path}, "files: 1, skipped for their extension: 0"

    counts = Counter({UNKNOWN_EXTENSION: 0})
    files = {}
    contents = set()
    for file in sorted(walk(path, cache_dir, text_field, counts), key=lambda file: (file.is_symlink(), file)):
        # Files are sorted before links: what is there as a file keeps its name.
        content = os.path.realpath(file)
        if content in contents:
            counts["linked twice"] += 1
            continue
        contents.add(content)
        files[shown(file.relative_to(path).as_posix())] = file
    if not files:
        others = "".join(f", {reason}: {n:,}" for reason, n in counts.items() if reason != UNKNOWN_EXTENSION)
        raise ValueError(
            f"no text in folder {shown(path)}: {counts[UNKNOWN_EXTENSION]:,} files, none of them {READABLE}{others}"
        )
    files, splits = choose_split(files, split, path, counts)
    # The order in which a file system lists its files differs between machines.
    files = dict(sorted(files.items()))
    found = [f"files: {len(files):,}", *(f"{reason}: {n:,}" for reason, n in counts.items())]
    return files, ", ".join(found) + splits


def walk(path, cache_dir, text_field, counts):
    """Yield the readable files in a folder, in any order. Adds to `counts` what it passes over, by reason."""
    # A store inside the folder that it was made from must not become part of its own input.
    own_folders = {cache_dir.resolve(), SAMPLE_PATH.parent.parent / "records"}
    seen = set()
    # Links wait until all else has been walked: a folder that is there itself keeps its own name.
    waiting = [path]
    while waiting:
        for parent, folders, names in os.walk(waiting.pop(0), onerror=_cannot_list):
            # Where a link leads back to a folder that was walked already, it ends: links may form circles.
            where = os.path.realpath(parent)
            if where in seen:
                counts["linked twice"] += 1
                folders.clear()
                continue
            seen.add(where)
            kept = []
            for folder in sorted(folders):
                inner = Path(parent, folder)
                if folder.startswith("."):
                    counts["hidden"] += 1
                elif inner.resolve() in own_folders:
                    counts[OWN_OUTPUT] += 1
                elif inner.is_symlink():
                    counts["linked folders followed"] += 1
                    waiting.append(inner)
                else:
                    kept.append(folder)
            # os.walk goes into the folders that this list keeps.
            folders[:] = kept
            for name in names:
                reason = _why_skipped(Path(parent, name), text_field)
                if reason is None:
                    yield Path(parent, name)
                else:
                    counts[reason] += 1


def _cannot_list(error):
    """os.walk would pass over a folder that it may not read, without a word."""
    raise ValueError(f"cannot read the folder {shown(error.filename)}: {error.strerror}; check its permissions")


def _why_skipped(file, text_field):
    """Why a file in a folder is not read, in a few words; None if it is."""
    if file.name.startswith("."):
        return "hidden"
    if not file.is_file():
        return "links to nothing" if file.is_symlink() else "no regular files"
    if kind_of(file)[0] is None:
        return UNKNOWN_EXTENSION
    return OWN_OUTPUT if is_own_output(file, text_field) else None


def is_own_output(file, text_field):
    """Whether a file was written by this project: model.json, metrics.jsonl, manifest.json and their like.

    It is told by its content. A file whose first 4 kB show the field of the text is not one.
    """
    if file.suffix != ".json" and not file.name.endswith("metrics.jsonl"):
        return False
    try:
        with open(file, "rb") as stream:
            head = stream.read(4096)
    except OSError as error:
        raise ValueError(f"cannot read {shown(file)}: {error.strerror}; check its permissions") from error
    holds_text = re.search(rb'"%s"\s*:' % re.escape(text_field.encode()), head)
    is_result = OWN_RESULT.search(head) is not None
    return is_result or (OWN_JSON.search(head) is not None and not holds_text)


def split_in_name(name):
    """The split that a relative file name shows, or None: "data/test-00000-of-00001.parquet" is of "test".

    The file's own words decide first, then its folders, which must consist of that word alone.
    """
    *folders, file = name.lower().split("/")
    for word in re.split(r"[\W\d_]+", file):
        if word in SPLIT_OF_WORD:
            return SPLIT_OF_WORD[word]
    for folder in reversed(folders):
        if folder in SPLIT_OF_WORD:
            return SPLIT_OF_WORD[folder]
    return None


def choose_split(files, wanted, path, counts):
    """Of a folder that looks like a downloaded dataset, keep one split and no cards.

    It looks so if its README.md begins with YAML, or if its files are named after splits: records of
    a test or validation split, or texts of such a split beside others for training. Files that name no
    split count as train.
    wanted: "train", "validation", "test", "all", or None: train if there is such a file.
    counts: gets the number of cards.
    Returns (files, text for the user). Raises ValueError if the split is not there.
    """
    names_of = {split: [] for split in SPLITS}
    splits_of_texts = {split_in_name(name) for name in files if kind_of(name)[0] in TEXT_KINDS}
    # A page about tests is test.md, too; beside train.md it is a split.
    texts_have_splits = "train" in splits_of_texts and len(splits_of_texts - {None, "train"}) > 0
    for name in files:
        has_splits = kind_of(name)[0] in RECORD_KINDS or texts_have_splits
        split = split_in_name(name) if has_splits else None
        names_of[split or "train"].append(name)

    is_split = bool(names_of["validation"] or names_of["test"])
    has_data = any(kind_of(name)[0] != ".md" for name in files)
    if has_data and (is_split or any(is_yaml_card(file) for file in files.values())):
        cards = {name for name in files if is_card(name)}
        if cards:
            counts["cards of a downloaded dataset"] += len(cards)
        names_of = {split: [name for name in names if name not in cards] for split, names in names_of.items()}

    present = [split for split, names in names_of.items() if names]
    listed = ", ".join(f"{split} ({len(names_of[split]):,} files)" for split in present)
    if wanted is None and len(present) > 1 and "train" not in present:
        raise ValueError(
            f"{shown(path)} has files of the splits {listed}, and none for training;"
            f" say which to read: --dataset {shown(path)}:{present[0]}"
        )
    used = wanted or ("train" if "train" in present else present[0])
    if used != "all" and used not in present:
        raise ValueError(f"{shown(path)} has no split {used!r}; its splits are: {listed}")
    kept = [name for split in present for name in names_of[split] if used in (split, "all")]
    text = ""
    if present != ["train"]:
        text = f"; splits found: {listed}; used: {used}; others: --dataset {shown(path)}:SPLIT, or :all"
    return {name: files[name] for name in kept}, text


def is_card(name):
    """Whether a file of a downloaded dataset describes it and holds none of it."""
    file = name.lower().rpartition("/")[2]
    return file.split(".")[0] in CARDS and kind_of(file)[0] in (".md", ".txt", ".json")


def is_yaml_card(file):
    """Whether a file is a dataset's card as the Hugging Face hub has it: a README.md that begins with YAML."""
    if file.name.lower() != "readme.md":
        return False
    with open(file, "rb") as stream:
        return stream.readline(10).rstrip() == b"---"


# ---- Reading documents from files


def read_files(files, text_field, max_document_bytes, states):
    """Yield (source, bytes) of each document of {name: path}.

    Text files are not decoded, so invalid UTF-8 survives unchanged.
    states: {name: what `file_state` said before}. The store's key stands for these states.
    Raises the errors of `reading`.
    """
    for name, path in files.items():
        with reading(path, states[name]):
            yield from read_file(name, path, text_field, max_document_bytes)


@contextlib.contextmanager
def reading(path, state):
    """Read a file in this block.

    Raises ValueError naming the file if it cannot be read, or if it is no longer as when `file_state` gave `state`.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        # Not the file's fault: there is no room for what is decompressed.
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f"no room in {tempfile.gettempdir()} (or set TMPDIR)") from error
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise ValueError(f"cannot read {shown(path)}: {reason}; is the file damaged or unreadable?") from error
    if file_state(path) != state:
        raise ValueError(f"{shown(path)} was changed while it was read; run again when nothing writes to it")


def read_file(name, path, text_field, max_document_bytes):
    """Yield (source, bytes) of each document of one file; a document without a source gets `name`."""
    kind = kind_of(path)[0]
    with open_stream(path) as stream:
        if kind in TEXT_KINDS:
            for document in cut_text(stream, max_document_bytes):
                yield name, document
            return
        read_records = {".jsonl": read_json_lines, ".json": read_json, ".parquet": read_parquet}[kind]
        records = limited_lines(stream) if kind == ".jsonl" else stream
        for place, record in read_records(records, path, text_field):
            yield from record_document(record, text_field, place, name)


def open_stream(path):
    """The decompressed bytes of a file, as a buffered binary stream."""
    kind, compression = kind_of(path)
    if not compression:
        return open(path, "rb")
    if compression == ".zst":
        import pyarrow

        raw = pyarrow.input_stream(str(path), compression="zstd")
    elif compression == ".gz":
        raw = gzip.open(path)
    else:
        raw = lzma.open(path)
    stream = io.BufferedReader(raw, BUFFER_BYTES)
    if kind != ".parquet":
        return stream
    # Parquet is read from its end, which a compressed stream cannot do: decompress it first.
    plain = tempfile.TemporaryFile()
    with stream:
        shutil.copyfileobj(stream, plain)
    return plain


def cut_text(stream, max_document_bytes):
    r"""Cut a text into pieces of at most max_document_bytes that concatenate to it.

    A piece ends after the last blank line within the limit, else after the last newline, else at the
    limit: b"ab\n\ncd\nef" with limit 6 gives b"ab\n\n", b"cd\nef".
    """
    buffer = bytearray()
    while block := stream.read(BUFFER_BYTES):
        buffer += block
        start = 0
        # Keep what might be one piece: how it ends depends on the bytes that follow.
        while len(buffer) - start > max_document_bytes:
            end = _piece_end(buffer, start, start + max_document_bytes)
            yield bytes(buffer[start:end])
            start = end
        del buffer[:start]
    if buffer:
        yield bytes(buffer)


def _piece_end(buffer, start, limit):
    """The best position at which to end a piece that begins at `start` and may reach `limit`."""
    for separator in (b"\n\n", b"\r\n\r\n", b"\n"):
        found = buffer.rfind(separator, start, limit)
        if found >= 0:
            return found + len(separator)
    return limit


# The three readers of records take (stream, path, text_field) and yield (place, record). The place
# is for messages about the record, such as "corpus.jsonl line 7".


def read_json_lines(lines, path, text_field, first_number=1):
    """Yield (place, record) of each line that is not blank. first_number: that of the first line."""
    for number, line in enumerate(lines, first_number):
        place = f"{shown(path)} line {number}"
        if len(line) > WHOLE_JSON_BYTES:
            raise ValueError(
                f"{place} has over {WHOLE_JSON_BYTES:,} bytes, too large to parse in one piece; leave it out"
            )
        if line.strip():
            yield place, parse_json(line, place)


def limited_lines(stream):
    """Yield the lines of a stream. What is longer than one JSON text may be comes in pieces of just over that."""
    # One line may be larger than memory, so no read is without a limit.
    while line := stream.readline(WHOLE_JSON_BYTES + 1):
        yield line


def read_json(stream, path, text_field):
    """Yield (place, record) of each record of a .json file.

    It is read as JSON lines if its first line is a whole object, else as one array or one object.
    """
    number = 1
    # A file of one line may be larger than memory, so no read is without a limit.
    first = stream.readline(WHOLE_JSON_BYTES + 1)
    while first.isspace():
        number += 1
        first = stream.readline(WHOLE_JSON_BYTES + 1)
    if _is_json_object(first):
        lines = itertools.chain([first], limited_lines(stream))
        yield from read_json_lines(lines, path, text_field, number)
    elif first:
        whole = first + stream.read(WHOLE_JSON_BYTES + 1 - len(first))
        if len(whole) > WHOLE_JSON_BYTES:
            raise ValueError(
                f"{shown(path)} is one JSON value of over {WHOLE_JSON_BYTES:,} bytes,"
                " too large to parse in one piece;"
                " convert it to JSON lines: jq -c '.[]' FILE.json > FILE.jsonl"
            )
        value = parse_json(whole, shown(path))
        records = value if isinstance(value, list) else [value]
        for number, record in enumerate(records, 1):
            yield f"{shown(path)} record {number}", record


def _is_json_object(line):
    """Whether a line is a whole JSON object."""
    # Most arrays are one long line, which need not be parsed to know that it is no object.
    if line.startswith(b"["):
        return False
    try:
        return isinstance(json.loads(line), dict)
    # The second: thousands of brackets in each other.
    except (ValueError, RecursionError):
        return False


def parse_json(text, place):
    """The value of a JSON text. Raises ValueError naming the place if it is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{place} is nested too deeply to be a record of text; leave it out") from error


def read_parquet(stream, path, text_field):
    """Yield (place, record) of each row of a parquet file. Only the text and the source are read."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # pre_buffer would keep all that was read; without buffer_size a row group is read at once.
        parquet = pyarrow.parquet.ParquetFile(
            stream, pre_buffer=False, buffer_size=BUFFER_BYTES, page_checksum_verification=True
        )
        names = parquet.schema_arrow.names
        if text_field not in names:
            raise missing_field(text_field, f"{shown(path)} row 1", names)
        # The source is a convenience: where two columns claim it, the file's name stands in.
        wanted = [name for name in (text_field, "source") if names.count(name) == 1]
        if text_field not in wanted:
            raise ValueError(
                f"{shown(path)} has {names.count(text_field)} columns {text_field!r}: which is the text?"
                " rename one of them, or pass --text_field NAME of another column"
            )
        for batch in parquet.iter_batches(1024, columns=list(dict.fromkeys(wanted))):
            columns = {name: _as_bytes(batch.column(name)) for name in batch.schema.names}
            # The lists have no name, so that they are freed before the next batch is read.
            for values in zip(*[column.to_pylist() for column in columns.values()]):
                number += 1
                yield f"{shown(path)} row {number}", dict(zip(columns, values))
    # Damage shows as any of the library's types, some of which are also a ValueError or a KeyError.
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot read {shown(path)} after row {number}: {reason}; is the file damaged?") from error


def _as_bytes(column):
    """A parquet column with text as bytes: that is faster, and it need not be valid UTF-8."""
    import pyarrow

    if pyarrow.types.is_string(column.type):
        return column.cast(pyarrow.binary())
    if pyarrow.types.is_large_string(column.type):
        return column.cast(pyarrow.large_binary())
    return column


def record_document(record, text_field, place, default_source):
    """Yield the (source, bytes) of one record, or nothing if its text is null or empty.

    Raises ValueError, which names `place`, if the record lacks the field text_field or has no text in it.
    """
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise ValueError(f"{place} holds a {kind}, not an object with a field {text_field!r}")
    if text_field not in record:
        raise missing_field(text_field, place, record)
    text = record[text_field]
    if text is not None and not isinstance(text, (str, bytes)):
        raise ValueError(f"text field {text_field!r} in {place} holds {type(text).__name__}, not text")
    if not text:
        return
    source = record.get("source")
    # Parquet gives bytes. A source is a label, so what is not UTF-8 in it is shown as \\xNN.
    if isinstance(source, bytes):
        source = source.decode("utf-8", "backslashreplace")
    if not source or not isinstance(source, str):
        source = default_source
    if isinstance(text, str):
        # JSON can hold half of a surrogate pair (broken emoji), which strict UTF-8 refuses.
        text = text.encode("utf-8", "surrogatepass")
    yield source, text


def missing_field(text_field, place, fields):
    """The error of a record that has these fields, but not text_field."""
    return ValueError(
        f"text field {text_field!r} not found in {place}; its fields are: {', '.join(sorted(fields))};"
        " pass --text_field NAME"
    )


# ---- Reading documents from the Hugging Face hub


def read_hub(repo, subset, name, text_field):
    """Yield (source, bytes) of each document in a Hugging Face dataset's train split."""
    yield from hub_documents(hub_records(repo, subset, name), text_field, name)


def hub_documents(records, text_field, name):
    """Yield (source, bytes) of each record that holds a text."""
    for number, record in enumerate(records, 1):
        yield from record_document(record, text_field, f"{name} record {number}", name)


def hub_records(repo, subset, name, all_splits=False):
    """Stream the records of the train split from the hub; with all_splits those of train, validation and test.

    Whatever goes wrong there becomes a ValueError or a ConnectionError that says what to do.
    """
    check_packages("datasets")
    try:
        import datasets

        check_hub_answers()
        splits = ["train"]
        if all_splits:
            there = datasets.get_dataset_split_names(repo, subset)
            splits = [split for split in SPLITS if split in there]
        for split in splits:
            yield from datasets.load_dataset(repo, subset, split=split, streaming=True)
    # For wrong names, missing access and no network, the library raises a dozen types.
    except Exception as error:
        kind = ConnectionError if isinstance(error, (ConnectionError, TimeoutError)) else ValueError
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise kind(
            f"cannot read dataset {name} from the Hugging Face hub: {reason};"
            " check the name (OWNER/NAME:SUBSET) and the network (for a gated dataset: hf auth login),"
            " or use --dataset sample or a local file or folder"
        ) from error


def check_hub_answers():
    """Raise ConnectionError if the hub does not answer.

    Without a network, load_dataset would retry for 23 s and print each attempt.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    # The type depends on the library's version: that of requests, of httpx, or of offline mode.
    except Exception as error:
        raise ConnectionError(f"no answer from {constants.ENDPOINT} ({error})") from error


# ---- The store


def build_store(folder, parts, settings, origin):
    """Write a store under a temporary name, then rename it.

    So an interrupted build is never taken for a store. parts: as in `Source`.
    origin: where they are from, for messages.
    """
    remove_leftovers(folder.parent)
    print(f"building {folder} from {origin}")
    started = time.perf_counter()
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        with contextlib.ExitStack() as stack:
            for _, documents in parts:
                stack.enter_context(contextlib.closing(documents))
            manifest = write_store(partial, parts, settings, origin)
        try:
            partial.rename(folder)
        except OSError:
            # If another process has built the same store meanwhile, use that one.
            if not folder.exists():
                raise
    # Errors from reading are ValueErrors or, from the hub, ConnectionErrors, which say what to do.
    except ConnectionError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"cannot write {shown(folder)}: {reason};"
            " free some space, or pass --data_cache FOLDER that can be written to"
        ) from error
    finally:
        # After a successful rename it is no longer there.
        shutil.rmtree(partial, ignore_errors=True)
    seconds = time.perf_counter() - started
    speed = manifest["bytes"] / seconds / 1e6
    print(
        f"built {folder}: {manifest['documents']:,} documents, {manifest['bytes']:,} bytes"
        f" (train {manifest['train_bytes']:,}, validation {manifest['validation_bytes']:,})"
        f" in {seconds:.1f} s, {speed:.1f} MB/s"
    )


def remove_leftovers(cache_dir):
    """Remove what builds that were killed have left, if nothing was written there for a day."""
    for partial in cache_dir.glob("*.partial-*"):
        try:
            newest = max(path.stat().st_mtime for path in [partial, *partial.iterdir()])
        # Another process has just finished or removed it.
        except OSError:
            continue
        # Today's may be at work.
        if time.time() - newest > LEFTOVER_SECONDS:
            shutil.rmtree(partial, ignore_errors=True)
            print(f"removed {partial}, the leftover of an interrupted build")


def write_store(folder, parts, settings, origin):
    """Write documents into an existing empty folder and return the manifest.

    parts: as in `Source`. Each stops before the document that would exceed a limit in `settings`.
    Raises ValueError if that is the first one, or if there are no documents.
    """
    max_bytes = settings["max_bytes"]
    # Arrays, because a list of numbers takes several times the memory: int64, uint64 and uint16.
    offsets = array("q", [0])
    split_hashes = array("Q")
    source_ids = array("H")
    id_of_source = {}
    digest = hashlib.sha256()
    # {part: its documents}
    counts = {}
    total = None if max_bytes is None else max_bytes * len(parts)
    with progress_bar(total, leave=False) as bar, open(folder / "bytes.bin", "wb", buffering=BUFFER_BYTES) as store:
        for part, documents in parts:
            first = len(split_hashes)
            begin = offsets[-1]
            document = b""
            for source, document in documents:
                total_bytes = offsets[-1] + len(document)
                if max_bytes is not None and total_bytes - begin > max_bytes:
                    break
                store.write(document)
                add_to_hash(digest, document)
                offsets.append(total_bytes)
                split_hashes.append(_split_hash(document))
                # Some datasets put each document's address there; the last id takes all that are too many.
                if source not in id_of_source and len(id_of_source) >= SOURCE_LIMIT - 1:
                    source = "(other)"
                source_ids.append(id_of_source.setdefault(source, len(id_of_source)))
                bar.update(len(document))
                # Stop here and not at the next document, which the hub would have to send first.
                n_documents = len(split_hashes) - first
                if total_bytes - begin == max_bytes or n_documents == settings["max_documents"]:
                    break
            counts[part] = len(split_hashes) - first
            if not counts[part]:
                raise no_documents(part, origin, document, max_bytes)

    split_hashes = np.frombuffer(split_hashes, np.uint64)
    lengths = np.diff(offsets)
    named = {}
    if None in counts:
        is_validation = split_off(split_hashes, settings["val_fraction"])
        is_test = np.zeros_like(is_validation)
    else:
        # Indices into SPLITS.
        part_of_document = np.repeat(np.array([SPLITS.index(part) for part in counts], np.uint8), list(counts.values()))
        is_validation = part_of_document == SPLITS.index("validation")
        is_test = part_of_document == SPLITS.index("test")
        is_equal = is_validation & np.isin(split_hashes, split_hashes[part_of_document == SPLITS.index("train")])
        named = dict(parts=counts, equal_documents=int(is_equal.sum()), equal_bytes=int(lengths[is_equal].sum()))
        add_parts_to_hash(digest, counts)
    np.save(folder / "offsets.npy", np.frombuffer(offsets, np.int64))
    np.save(folder / "is_validation.npy", is_validation)
    np.save(folder / "source_ids.npy", np.frombuffer(source_ids, np.uint16))
    is_train = ~is_validation & ~is_test
    manifest = settings | dict(
        documents=len(is_validation),
        bytes=offsets[-1],
        train_documents=int(is_train.sum()),
        train_bytes=int(lengths[is_train].sum()),
        validation_documents=int(is_validation.sum()),
        validation_bytes=int(lengths[is_validation].sum()),
        sources=list(id_of_source),
        sha256=digest.hexdigest(),
        file_bytes={name: os.stat(folder / name).st_size for name in STORE_FILES},
    )
    return write_manifest(folder, manifest | named)


def no_documents(part, origin, document, max_bytes):
    """The error of a part without documents. document: the first one, b"" if there is none."""
    if document:
        cause = f"the first has {len(document):,} bytes, above the limit of {max_bytes:,} (--corpus_bytes); raise it"
    else:
        cause = "it holds no text"
    of_part = "" if part is None else f" for {'training' if part == 'train' else part}"
    return ValueError(f"no documents{of_part} from {origin}: {cause}")


def add_parts_to_hash(digest, counts):
    """Add the parts of a named split, {part: documents}: the same text split elsewhere is another corpus."""
    add_to_hash(digest, json.dumps(counts).encode())


def _split_hash(document):
    """The number from 0 to 2^64 - 1 that decides which side of the split a document is on."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "little")


def split_off(split_hashes, val_fraction):
    """Which documents are validation: those whose hash, scaled to [0, 1), is below val_fraction.

    split_hashes: uint64 [documents], see `_split_hash`. Returns bool [documents].

    Equal documents are on the same side, and a document keeps its side whatever else the corpus
    holds, in whatever order. There is one exception: if one side would be empty (a corpus of a few
    documents), the smallest hash becomes validation, or the largest becomes training. Raises
    ValueError if all documents are equal.
    """
    smallest = split_hashes.min()
    largest = split_hashes.max()
    if smallest == largest:
        n = len(split_hashes)
        count = f"{n:,} equal documents are" if n > 1 else "one document is"
        raise ValueError(
            f"{count} too little for a training and a validation part;"
            " give more documents (raise --corpus_bytes and max_documents if set),"
            " or for .txt and .md lower max_document_bytes, which cuts files into documents"
        )
    is_validation = split_hashes < np.uint64(val_fraction * 2**64)
    if not is_validation.any():
        return split_hashes == smallest
    if is_validation.all():
        return split_hashes != largest
    return is_validation


# ---- Damage


def write_manifest(folder, manifest):
    """Add the checksums of the store's files and of the manifest to it, and write it. Returns it."""
    manifest = manifest | {"checksums": {name: quick_hash(folder / name) for name in STORE_FILES}}
    manifest["manifest_sha256"] = manifest_hash(manifest)
    text = json.dumps(manifest, indent=1) + "\n"
    write_atomically(folder / "manifest.json", lambda path: Path(path).write_text(text, encoding="utf-8"))
    return manifest


def manifest_hash(manifest):
    """sha256 (hex) over all else that a manifest holds."""
    others = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def quick_hash(path):
    """sha256 (hex) of an index file; of bytes.bin, of SPOTS blocks from its first to its last.

    The index is read whenever a store is opened. Reading all of the text would take a minute for
    10 GB: the spots take milliseconds and see every other text, but not every changed byte.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if path.name != "bytes.bin":
            while block := file.read(BUFFER_BYTES):
                digest.update(block)
            return digest.hexdigest()
        last = max(0, os.fstat(file.fileno()).st_size - SPOT_BYTES)
        for spot in range(SPOTS):
            file.seek(last * spot // (SPOTS - 1))
            digest.update(file.read(SPOT_BYTES))
    return digest.hexdigest()


def damaged(folder, damage):
    """The error of a store that is not what its manifest says."""
    return ValueError(f"the byte store {shown(folder)} is damaged ({damage}); delete that folder and run again")


def read_manifest(folder):
    """A store's manifest, after the checks that need not read all of the text.

    They find files that are missing, cut, exchanged or of another store, every changed byte of the
    index and of the manifest, and, in a store of at most WHOLE_CHECK_BYTES, of the text. For a larger
    store that is what `check_store` is for. Raises ValueError naming the damage.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise damaged(folder, f"manifest.json is not of a store of format {FORMAT}")
        wanted = manifest["file_bytes"]
        found = {name: os.stat(folder / name).st_size for name in STORE_FILES}
        wrong = [name for name in STORE_FILES if found[name] != wanted[name]]
        if wrong:
            sizes = [f"{name} has {found[name]:,} bytes, not {wanted[name]:,}" for name in wrong]
            raise damaged(folder, "; ".join(sizes))
        # Both, so that one changed letter in either name does not make a store look older than it is.
        if "manifest_sha256" not in manifest and "checksums" not in manifest:
            manifest = _add_checksums(folder, manifest)
        if manifest["manifest_sha256"] != manifest_hash(manifest):
            raise damaged(folder, "manifest.json was changed")
        wrong = [name for name in STORE_FILES if manifest["checksums"][name] != quick_hash(folder / name)]
        if wrong:
            raise damaged(folder, f"{', '.join(wrong)} changed or exchanged: not the content that was stored")
        if found["bytes.bin"] <= WHOLE_CHECK_BYTES:
            _check_documents(folder, manifest)
    except (OSError, KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError, UnicodeError) as error:
        raise damaged(folder, str(error)) from error
    return manifest


def check_store(folder):
    """Read a store as a whole and compare every byte with its manifest. Returns the manifest.

    Raises ValueError that names the file that is cut, exchanged or changed. Takes about 2 s a GB.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_documents(folder, manifest)
    return manifest


def _check_documents(folder, manifest):
    """Raise ValueError unless the text, the documents' ends and the split are those of the manifest."""
    offsets = np.load(folder / "offsets.npy")
    lengths = np.diff(offsets)
    # Lengths are read as numbers of bytes, so they must be some before they are used.
    if len(lengths) < 1 or offsets[0] != 0 or lengths.min() < 1 or offsets[-1] != manifest["file_bytes"]["bytes.bin"]:
        raise damaged(folder, "offsets.npy does not fit bytes.bin")
    digest = hashlib.sha256()
    # Read as a file: the pages of a memory map would count as this process's memory.
    with open(folder / "bytes.bin", "rb", buffering=BUFFER_BYTES) as file:
        for length in lengths.tolist():
            add_to_hash(digest, file.read(length))
    if "parts" in manifest:
        add_parts_to_hash(digest, manifest["parts"])
    if digest.hexdigest() != manifest["sha256"]:
        raise damaged(folder, "bytes.bin was changed: its sha256 is not the one in manifest.json")


def _add_checksums(folder, manifest):
    """The manifest of a store from before there were checksums, with them; after a check of all that it can tell."""
    _check_documents(folder, manifest)
    split_hashes = []
    offsets = np.load(folder / "offsets.npy")
    with open(folder / "bytes.bin", "rb", buffering=BUFFER_BYTES) as file:
        for length in np.diff(offsets).tolist():
            split_hashes.append(_split_hash(file.read(length)))
    is_validation = split_off(np.array(split_hashes, np.uint64), manifest["val_fraction"])
    source_ids = np.load(folder / "source_ids.npy")
    if not np.array_equal(is_validation, np.load(folder / "is_validation.npy")):
        raise damaged(folder, "is_validation.npy is not the split of these documents")
    if len(source_ids) != len(is_validation) or source_ids.max() >= len(manifest["sources"]):
        raise damaged(folder, "source_ids.npy does not fit manifest.json")
    print(f"checked {shown(folder)}, a store from before there were checksums, and added them")
    return write_manifest(folder, manifest)
