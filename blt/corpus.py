"""Corpora as bytes on disk: read any source once, split it, and map it into memory.

    corpus = open_corpus("sample")
    for number in corpus.documents("train"):
        print(bytes(corpus.document(number)[:60]))

Reads: the bundled sample (data/sample.jsonl.xz, 23.5 MB of English text; data/LICENSES.md names the
authors); a local file or folder of .txt, .md, .jsonl, .json or .parquet, each plain, .gz, .xz or
.zst; or a dataset streamed from the Hugging Face hub, such as
"HuggingFaceTB/smollm-corpus:cosmopedia-v2".
Writes: a byte store, cache_dir/NAME-KEY/. The key is a hash of the settings and of the files' sizes
and times, so the same settings on unchanged files open the store that exists already.
Takes: about 1 s for the sample on one core of an AMD EPYC server. Documents stream through: memory
holds one document, and about 20 bytes for each document of the corpus.
"""

import contextlib
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
import zlib
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from blt.checks import check, check_positive
from blt.config import apply_presets
from blt.files import add_to_hash


@dataclass
class DataConfig:
    """Settings of every script that reads a corpus."""

    preset: list[str] = field(default_factory=list)  # a size, a machine, or one of each; what is not named is detected
    # data
    dataset: str = "sample"  # sample, a file or folder (.txt .md .jsonl .json .parquet), or a Hugging Face id[:subset]
    text_field: str = "text"  # the field of a JSON or parquet record that holds the text
    corpus_bytes: int | None = None  # store at most this many bytes of the dataset (needed for a Hugging Face dataset)
    val_fraction: float = 0.03  # share of documents held out, chosen by a hash of each document
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
        check(self, "val_fraction", 0 < self.val_fraction <= 0.5, "above 0 and at most 0.5")
        check(self, "precision", self.precision in ("auto", "bf16", "fp16", "fp32"), "one of auto, bf16, fp16, fp32")

    def corpus(self):
        """Open the byte store of the dataset; the first time it is built."""
        return open_corpus(
            self.dataset,
            text_field=self.text_field,
            max_bytes=self.corpus_bytes,
            val_fraction=self.val_fraction,
            max_document_bytes=self.max_document_bytes,
            cache_dir=self.data_cache,
        )


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
# Source ids are uint16.
SOURCE_LIMIT = 2**16
STORE_FILES = ("bytes.bin", "offsets.npy", "is_validation.npy", "source_ids.npy")
# Bytes that are read from or written to a file at once.
BUFFER_BYTES = 1 << 20


class Corpus:
    """A byte store on disk, memory-mapped: opening 10 GB takes milliseconds and reads only the index.

    folder, manifest: where the store is, and how it was made (manifest.json).
    bytes: uint8 [total bytes], the raw bytes of all documents with nothing between them.
    offsets: int64 [documents + 1]; document i is bytes[offsets[i]:offsets[i + 1]].
    is_validation: bool [documents].
    source_ids: uint16 [documents], indices into `sources`. A document's source is its record's
        "source" field, else the name of its file or the hub id.
    hash: sha256 over each document's length (8 bytes, little endian) and bytes, in stored order.

    Raises ValueError if the store is damaged.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.bytes = np.memmap(self.folder / "bytes.bin", dtype=np.uint8, mode="r")
        self.offsets = np.load(self.folder / "offsets.npy")
        self.is_validation = np.load(self.folder / "is_validation.npy")
        self.source_ids = np.load(self.folder / "source_ids.npy")
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

        split: "train", "validation" or "all".
        max_bytes, max_documents: limits on their sum of bytes and on their number. The first document
            is always included, even if it is larger than max_bytes.
        Returns int64 [n]. Example: with training documents 0, 1 and 3 of 10 bytes each,
        documents("train", max_bytes=25) is [0, 1].
        """
        if split not in ("train", "validation", "all"):
            raise ValueError(f"split is {split!r}; it must be 'train', 'validation' or 'all'")
        check_limits(max_bytes=max_bytes, max_documents=max_documents)
        if split == "all":
            numbers = np.arange(len(self))
        else:
            numbers = np.flatnonzero(self.is_validation == (split == "validation"))
        if max_bytes is not None:
            bytes_so_far = np.cumsum(np.diff(self.offsets)[numbers])
            n_within = np.searchsorted(bytes_so_far, max_bytes, side="right")
            numbers = numbers[: max(1, n_within)]
        return numbers[:max_documents]


def open_corpus(
    dataset="sample",
    subset=None,
    text_field="text",
    max_bytes=None,
    max_documents=None,
    val_fraction=0.03,
    max_document_bytes=65536,
    cache_dir="data_cache",
):
    """Open the byte store of a dataset; build it first if there is none.

    dataset: "sample"; or a local file or folder (hidden files and unknown extensions are skipped);
        or a Hugging Face id, "owner/name" or "owner/name:subset": its train split is streamed.
    text_field: the field of JSON, parquet and hub records that holds the text. Records whose text is
        null or empty are skipped.
    max_bytes, max_documents: stop before the document that would exceed the limit. A hub dataset
        needs one of them.
    val_fraction: share of documents (not exactly of bytes) that become validation, in (0, 0.5]. See
        `split_off`.
    max_document_bytes: .txt and .md files are cut into documents of at most this many bytes, so
        that one long book has training and validation parts. Records are never cut.
    Raises ValueError, FileNotFoundError, ConnectionError or OSError with what to do about it.
    """
    check_limits(max_bytes=max_bytes, max_documents=max_documents, max_document_bytes=max_document_bytes)
    if not 0 < val_fraction <= 0.5:
        raise ValueError(f"val_fraction is {val_fraction}; it must be above 0 and at most 0.5")
    dataset = os.fspath(dataset)
    cache_dir = Path(cache_dir).expanduser()

    path = SAMPLE_PATH if dataset == "sample" else local_path(dataset)
    if path is None:
        repo, subset = hub_id(dataset, subset)
        if max_bytes is None and max_documents is None:
            raise ValueError(
                f"dataset {dataset} is on the Hugging Face hub and may be terabytes;"
                " say how much of it to store: --corpus_bytes N"
            )
        name = f"{repo}:{subset}" if subset else repo
        files = {}
        origin = f"{name} (Hugging Face hub, streamed)"
        documents = read_hub(repo, subset, name, text_field)
    else:
        if subset is not None:
            raise ValueError(f"subset is {subset!r}, but {dataset} is a local dataset; only hub datasets have subsets")
        name = "sample" if dataset == "sample" else path.resolve().name
        files, skipped = find_files(path, cache_dir)
        origin = f"{path} (files: {len(files):,}, skipped for their extension: {skipped:,})"
        documents = read_files(files, text_field, max_document_bytes)

    settings = dict(
        format=FORMAT,
        dataset=name,
        subset=subset,
        text_field=text_field,
        max_bytes=max_bytes,
        max_documents=max_documents,
        val_fraction=val_fraction,
        max_document_bytes=max_document_bytes,
        # Sizes and times stand for the contents: reading 10 GB to learn whether they changed would
        # be slow.
        files=[[file, where.stat().st_size, where.stat().st_mtime_ns] for file, where in files.items()],
    )
    folder = cache_dir / store_name(name, settings)
    # `documents` is a generator: what it reads is read only if the store is built.
    if not folder.exists():
        build_store(folder, documents, settings, origin)
    return Corpus(folder)


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
    """The file or folder that `dataset` names, or None if it has the form of a hub id.

    Raises FileNotFoundError if it has the form of a path, but nothing is there.
    """
    path = Path(dataset).expanduser()
    # Path("") would be the working directory.
    if dataset and path.exists():
        return path
    has_readable_kind = kind_of(dataset)[0] is not None
    # A hub id has one slash, between owner and name.
    has_path_characters = dataset.startswith((".", "/", "~")) or "\\" in dataset or dataset.count("/") > 1
    if has_readable_kind or has_path_characters:
        raise FileNotFoundError(
            f"{dataset} not found (looked from {Path.cwd()}); pass an existing file or folder, or --dataset sample"
        )
    return None


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
        )
    if named_subset and subset not in (None, named_subset):
        raise ValueError(f"subset is {subset!r}, but dataset {dataset!r} names another one; give only one of them")
    return repo, subset or named_subset or None


def find_files(path, cache_dir):
    """The readable files at `path`, sorted, as {name relative to path: path}; and how many others.

    Hidden files and folders are neither. Raises ValueError if there is nothing readable.
    """
    # Only the sample gets here without being there: local_path has seen every other path.
    if not path.exists():
        raise FileNotFoundError(f"the bundled sample {path} is missing; restore it with: git checkout {path}")
    if path.is_file():
        if kind_of(path)[0] is None:
            raise ValueError(f"cannot read {path}: its extension is none of {READABLE}")
        return {path.name: path}, 0

    cache = cache_dir.resolve()
    files = {}
    skipped = 0
    for parent, folders, names in os.walk(path):
        # os.walk goes into the folders that this list keeps. A store inside the folder that it was made
        # from must not become part of its own input.
        visible = [folder for folder in folders if not folder.startswith(".")]
        folders[:] = [folder for folder in visible if Path(parent, folder).resolve() != cache]
        for name in names:
            if name.startswith("."):
                continue
            file = Path(parent, name)
            if kind_of(file)[0] is not None and file.is_file():
                files[file.relative_to(path).as_posix()] = file
            else:
                skipped += 1
    if not files:
        raise ValueError(f"no text in folder {path}: {skipped:,} files, none of them {READABLE}")
    # The order in which a file system lists its files differs between machines.
    return dict(sorted(files.items())), skipped


# ---- Reading documents from files


def read_files(files, text_field, max_document_bytes):
    """Yield (source, bytes) of each document of {name: path}.

    Text files are not decoded, so invalid UTF-8 survives unchanged. Raises ValueError naming the file
    that cannot be read.
    """
    for name, path in files.items():
        try:
            yield from read_file(name, path, text_field, max_document_bytes)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"cannot read {path}: {error}; is the file damaged or unreadable?") from error


def read_file(name, path, text_field, max_document_bytes):
    """Yield (source, bytes) of each document of one file; a document without a source gets `name`."""
    kind = kind_of(path)[0]
    with open_stream(path) as stream:
        if kind in TEXT_KINDS:
            for document in cut_text(stream, max_document_bytes):
                yield name, document
            return
        read_records = {".jsonl": read_json_lines, ".json": read_json, ".parquet": read_parquet}[kind]
        for place, record in read_records(stream, path, text_field):
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
        if line.strip():
            place = f"{path} line {number}"
            yield place, parse_json(line, place)


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
        yield from read_json_lines(itertools.chain([first], stream), path, text_field, number)
    elif first:
        whole = first + stream.read(WHOLE_JSON_BYTES + 1 - len(first))
        if len(whole) > WHOLE_JSON_BYTES:
            raise ValueError(
                f"{path} is one JSON value of over {WHOLE_JSON_BYTES:,} bytes,"
                " too large to parse in one piece;"
                " convert it to JSON lines: jq -c '.[]' FILE.json > FILE.jsonl"
            )
        value = parse_json(whole, path)
        records = value if isinstance(value, list) else [value]
        for number, record in enumerate(records, 1):
            yield f"{path} record {number}", record


def _is_json_object(line):
    """Whether a line is a whole JSON object."""
    # Most arrays are one long line, which need not be parsed to know that it is no object.
    if line.startswith(b"["):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def parse_json(text, place):
    """The value of a JSON text. Raises ValueError naming the place if it is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error


def read_parquet(stream, path, text_field):
    """Yield (place, record) of each row of a parquet file. Only the text and the source are read."""
    import pyarrow
    import pyarrow.parquet

    try:
        # pre_buffer would keep all that was read; without buffer_size a row group is read at once.
        parquet = pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=BUFFER_BYTES)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"cannot read {path}: {error}; is the file damaged?") from error
    names = parquet.schema_arrow.names
    if text_field not in names:
        raise missing_field(text_field, f"{path} row 1", names)

    wanted = [name for name in names if name in (text_field, "source")]
    number = 0
    for batch in parquet.iter_batches(1024, columns=wanted):
        columns = {name: batch.column(name) for name in batch.schema.names}
        # Read text as bytes: that is faster, and it need not be valid UTF-8.
        if pyarrow.types.is_string(columns[text_field].type):
            columns[text_field] = columns[text_field].cast(pyarrow.binary())
        # The lists have no name, so that they are freed before the next batch is read.
        for values in zip(*[column.to_pylist() for column in columns.values()]):
            number += 1
            yield f"{path} row {number}", dict(zip(columns, values))


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
    for number, record in enumerate(hub_records(repo, subset, name), 1):
        yield from record_document(record, text_field, f"{name} record {number}", name)


def hub_records(repo, subset, name):
    """Stream records from the hub.

    Whatever goes wrong there becomes a ValueError or a ConnectionError that says what to do.
    """
    try:
        import datasets

        check_hub_answers()
        yield from datasets.load_dataset(repo, subset, split="train", streaming=True)
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


def build_store(folder, documents, settings, origin):
    """Write a store under a temporary name, then rename it.

    So an interrupted build is never taken for a store. documents: generator of (source, bytes).
    origin: where they are from, for messages.
    """
    print(f"building {folder} from {origin}")
    started = time.perf_counter()
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        with contextlib.closing(documents):
            manifest = write_store(partial, documents, settings, origin)
        try:
            partial.rename(folder)
        except OSError:
            # If another process has built the same store meanwhile, use that one.
            if not folder.exists():
                raise
    except OSError as error:
        # Errors from reading are our own messages, without a number. The system's are about writing.
        if error.errno is None:
            raise
        raise OSError(f"cannot write {folder}: {error}; pass --cache_dir FOLDER that can be written to") from error
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


def write_store(folder, documents, settings, origin):
    """Write documents into an existing empty folder and return the manifest.

    documents: iterator of (source, bytes). Stops before the document that would exceed a limit in
    `settings`. Raises ValueError if that is the first one, or if there are no documents.
    """
    max_bytes = settings["max_bytes"]
    # Arrays, because a list of numbers takes several times the memory: int64, uint64 and uint16.
    offsets = array("q", [0])
    split_hashes = array("Q")
    source_ids = array("H")
    id_of_source = {}
    digest = hashlib.sha256()
    document = b""
    bar = tqdm(total=max_bytes, unit="B", unit_scale=True, disable=None, leave=False)
    with bar, open(folder / "bytes.bin", "wb", buffering=BUFFER_BYTES) as store:
        for source, document in documents:
            total_bytes = offsets[-1] + len(document)
            if max_bytes is not None and total_bytes > max_bytes:
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
            if total_bytes == max_bytes or len(split_hashes) == settings["max_documents"]:
                break
    if not split_hashes:
        if document:
            size = len(document)
            cause = f"the first has {size:,} bytes, above the limit of {max_bytes:,} (--corpus_bytes); raise it"
        else:
            cause = "it holds no text"
        raise ValueError(f"no documents from {origin}: {cause}")

    is_validation = split_off(np.frombuffer(split_hashes, np.uint64), settings["val_fraction"])
    np.save(folder / "offsets.npy", np.frombuffer(offsets, np.int64))
    np.save(folder / "is_validation.npy", is_validation)
    np.save(folder / "source_ids.npy", np.frombuffer(source_ids, np.uint16))
    validation_documents = int(is_validation.sum())
    validation_bytes = int(np.diff(offsets)[is_validation].sum())
    manifest = settings | dict(
        documents=len(is_validation),
        bytes=offsets[-1],
        train_documents=len(is_validation) - validation_documents,
        train_bytes=offsets[-1] - validation_bytes,
        validation_documents=validation_documents,
        validation_bytes=validation_bytes,
        sources=list(id_of_source),
        sha256=digest.hexdigest(),
        file_bytes={name: os.stat(folder / name).st_size for name in STORE_FILES},
    )
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


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


def read_manifest(folder):
    """A store's manifest. Raises ValueError if the sizes of the store's files are not those in it."""
    damage = None
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        wanted = manifest["file_bytes"]
        found = {name: os.stat(folder / name).st_size for name in STORE_FILES}
        wrong = [name for name in STORE_FILES if found[name] != wanted[name]]
        damage = "; ".join(f"{name} has {found[name]:,} bytes, not {wanted[name]:,}" for name in wrong)
    except (OSError, ValueError, KeyError) as error:
        damage = str(error)
    if damage:
        raise ValueError(f"the byte store {folder} is damaged ({damage}); delete that folder and run again")
    return manifest
