"""Corpora as bytes on disk: read any source once, split it, and map it into memory.

    corpus = open_corpus("sample")                  # or a file, a folder, or a Hugging Face id such as
    for number in corpus.documents("train"):        # "HuggingFaceTB/smollm-corpus:cosmopedia-v2" with max_bytes=...
        print(bytes(corpus.document(number)[:60]))

Reads: the bundled sample (data/sample.jsonl.xz, 23.5 MB of English text; data/LICENSES.md says whose), a
local file or folder of .txt, .md, .jsonl, .json or .parquet (each plain, .gz, .xz or .zst), or a dataset
streamed from the hub. Writes: a byte store, cache_dir/NAME-KEY/. The same settings on unchanged files open
the store that is already there. Takes: about 1 s for the sample on one core of an AMD EPYC server.
Documents stream through: memory holds one document, and about 20 bytes for each document of the corpus.
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


FORMAT = 1  # of the store; part of its key, so a store of another format is never opened
SAMPLE_PATH = Path(__file__).resolve().parent.parent / "data" / "sample.jsonl.xz"
TEXT_KINDS, RECORD_KINDS = (".txt", ".md"), (".jsonl", ".json", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
READABLE = f"{', '.join(TEXT_KINDS + RECORD_KINDS)}, each plain or {', '.join(COMPRESSIONS)}"
WHOLE_JSON_BYTES = 10**9  # a .json array is parsed in one piece and takes several times this in memory
SOURCE_LIMIT = 2**16  # source ids are uint16
STORE_FILES = ("bytes.bin", "offsets.npy", "is_validation.npy", "source_ids.npy")


class Corpus:
    """A byte store on disk, memory-mapped: opening 10 GB takes milliseconds and reads only the index.

    folder, manifest: where the store is, and how it was made (manifest.json).
    bytes: uint8 [total bytes], the raw bytes of all documents with nothing between them.
    offsets: int64 [documents + 1]; document i is bytes[offsets[i]:offsets[i + 1]].
    is_validation: bool [documents].
    source_ids: uint16 [documents], places in `sources`: a record's "source" field, else its file's name or
    the hub id. hash: sha256 over every document's length (8 bytes, little endian) and bytes, in stored
    order.
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
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} does not exist; the corpus has documents 0 to {len(self) - 1}")
        return self.bytes[self.offsets[number] : self.offsets[number + 1]]

    def documents(self, split, max_bytes=None, max_documents=None):
        """Numbers of a split's documents in stored order, cut to the longest prefix within the limits.

        With training documents 0, 1 and 3 of 10 bytes each, documents("train", max_bytes=25) is [0, 1].
        split: "train", "validation" or "all". Returns int64 [n]; n >= 1, even if the first document passes
        max_bytes.
        """
        if split not in ("train", "validation", "all"):
            raise ValueError(f"split is {split!r}; it must be 'train', 'validation' or 'all'")
        check_limits(max_bytes=max_bytes, max_documents=max_documents)
        wanted = np.ones(len(self), bool) if split == "all" else self.is_validation == (split == "validation")
        numbers = np.flatnonzero(wanted)
        if max_bytes is not None:
            bytes_so_far = np.cumsum(np.diff(self.offsets)[numbers])
            numbers = numbers[: max(1, np.searchsorted(bytes_so_far, max_bytes, side="right"))]
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
    """Open the byte store of a dataset; build it first when it is not there.

    dataset: "sample"; or a local file or folder (hidden files and unknown extensions are passed over); or a Hugging
        Face id, "owner/name" or "owner/name:subset", of which the train split is streamed.
    text_field: where JSON, parquet and hub records hold their text. Null and empty texts are skipped.
    max_bytes, max_documents: stop before the document that would pass the limit. A hub dataset needs one of them.
    val_fraction: share of documents (not exactly of bytes) that become validation, in (0, 0.5]. See `split_off`.
    max_document_bytes: .txt and .md files are cut into documents of at most this many bytes, so that one long book has
        training and validation parts. Records are never cut.
    Raises ValueError, FileNotFoundError, ConnectionError or OSError with what to do about it.
    """
    check_limits(max_bytes=max_bytes, max_documents=max_documents, max_document_bytes=max_document_bytes)
    if not 0 < val_fraction <= 0.5:
        raise ValueError(f"val_fraction is {val_fraction}; it must be above 0 and at most 0.5")
    dataset, cache_dir = os.fspath(dataset), Path(cache_dir).expanduser()

    path = SAMPLE_PATH if dataset == "sample" else local_path(dataset)
    if path is None:
        repo, subset = hub_id(dataset, subset)
        if max_bytes is None and max_documents is None:
            raise ValueError(
                f"dataset {dataset} is on the Hugging Face hub and may be terabytes; say how much of it to store: --corpus_bytes N"
            )
        files, name = {}, f"{repo}:{subset}" if subset else repo
        origin = f"{name} (Hugging Face hub, streamed)"
        documents = read_hub(repo, subset, name, text_field)
    else:
        if subset is not None:
            raise ValueError(f"subset is {subset!r}, but {dataset} is a local dataset; only hub datasets have subsets")
        files, skipped = find_files(path, cache_dir)
        name = "sample" if dataset == "sample" else path.resolve().name
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
        # Sizes and times stand for the contents: reading 10 GB to learn whether they changed would be slow.
        files=[[file, where.stat().st_size, where.stat().st_mtime_ns] for file, where in files.items()],
    )
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "corpus"
    folder = cache_dir / f"{slug}-{key}"
    if not folder.exists():
        build_store(folder, documents, settings, origin)
    return Corpus(folder)


def check_limits(**limits):
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def kind_of(path):
    """The format and the compression that a name shows: "A.jsonl.gz" gives (".jsonl", ".gz"), "a.csv" (None, "")."""
    stem, compression = str(path).lower(), ""
    if stem.endswith(COMPRESSIONS):
        stem, compression = os.path.splitext(stem)
    kind = os.path.splitext(stem)[1]
    return (kind if kind in TEXT_KINDS + RECORD_KINDS else None), compression


def local_path(dataset):
    """The file or folder that `dataset` names, or None for the name of a hub dataset."""
    path = Path(dataset).expanduser()
    if dataset and path.exists():  # Path("") is the working directory
        return path
    if dataset.startswith((".", "/", "~")) or kind_of(dataset)[0] or "\\" in dataset or dataset.count("/") > 1:
        raise FileNotFoundError(
            f"{dataset} not found (looked from {Path.cwd()}); pass an existing file or folder, or --dataset sample"
        )
    return None


def hub_id(dataset, subset):
    """Split "owner/name:subset" into ("owner/name", "subset" or None)."""
    repo, _, named_subset = dataset.partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(
            f"unknown dataset {dataset!r}; use 'sample', an existing file or folder, or a Hugging Face id"
            " OWNER/NAME or OWNER/NAME:SUBSET, e.g. HuggingFaceTB/smollm-corpus:cosmopedia-v2"
        )
    if named_subset and subset not in (None, named_subset):
        raise ValueError(f"subset is {subset!r}, but dataset {dataset!r} names another one; give only one of them")
    return repo, subset or named_subset or None


def find_files(path, cache_dir):
    """The readable files at `path`, sorted, as {name relative to path: path}, and the number of others."""
    if not path.exists():  # only the sample gets here: local_path has seen all other paths
        raise FileNotFoundError(f"the bundled sample {path} is missing; restore it with: git checkout {path}")
    if path.is_file():
        if kind_of(path)[0] is None:
            raise ValueError(f"cannot read {path}: its extension is none of {READABLE}")
        return {path.name: path}, 0
    files, skipped = {}, 0
    for parent, folders, names in os.walk(path):
        # A store inside the folder that it was made from must not become part of its own input.
        folders[:] = [x for x in folders if not x.startswith(".") and Path(parent, x).resolve() != cache_dir.resolve()]
        for file in (Path(parent, name) for name in names if not name.startswith(".")):
            if kind_of(file)[0] and file.is_file():
                files[file.relative_to(path).as_posix()] = file
            else:
                skipped += 1
    if not files:
        raise ValueError(f"no text in folder {path}: {skipped:,} files, none of them {READABLE}")
    return dict(sorted(files.items())), skipped


def read_files(files, text_field, max_document_bytes):
    """Yield (source, bytes) of each document. Text files are not decoded, so invalid UTF-8 survives unchanged."""
    for name, path in files.items():
        kind = kind_of(path)[0]
        try:
            with open_stream(path) as stream:
                if kind in TEXT_KINDS:
                    yield from ((name, document) for document in cut_text(stream, max_document_bytes))
                    continue
                read_records = {".jsonl": read_json_lines, ".json": read_json, ".parquet": read_parquet}[kind]
                for place, record in read_records(stream, path, text_field):
                    yield from record_document(record, text_field, place, name)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"cannot read {path}: {error}; is the file damaged or unreadable?") from error


def open_stream(path):
    """The decompressed bytes of a file, as a buffered binary stream."""
    kind, compression = kind_of(path)
    if not compression:
        return open(path, "rb")
    if compression == ".zst":
        import pyarrow

        raw = pyarrow.input_stream(str(path), compression="zstd")
    else:
        raw = {".gz": gzip, ".xz": lzma}[compression].open(path)
    stream = io.BufferedReader(raw, 1 << 20)
    if kind != ".parquet":
        return stream
    plain = tempfile.TemporaryFile()  # parquet is read from its end, which a compressed stream cannot do
    with stream:
        shutil.copyfileobj(stream, plain)
    return plain


def cut_text(stream, max_document_bytes):
    r"""Cut a text into pieces of at most max_document_bytes that concatenate to it.

    A piece ends after the last blank line within the limit, else after the last newline, else at the limit:
    b"ab\n\ncd\nef" with limit 6 gives b"ab\n\n", b"cd\nef".
    """
    buffer = bytearray()
    while chunk := stream.read(1 << 20):
        buffer += chunk
        start = 0
        while len(buffer) - start > max_document_bytes:
            end = start + max_document_bytes
            for separator in (b"\n\n", b"\r\n\r\n", b"\n"):
                found = buffer.rfind(separator, start, end)
                if found >= 0:
                    end = found + len(separator)
                    break
            yield bytes(buffer[start:end])
            start = end
        del buffer[:start]
    if buffer:
        yield bytes(buffer)


def read_json_lines(lines, path, text_field, first_number=1):
    for number, line in enumerate(lines, first_number):
        if line.strip():
            place = f"{path} line {number}"
            yield place, parse_json(line, place)


def read_json(stream, path, text_field):
    """A .json file is JSON lines if its first line is a whole object; else one array or one object."""
    number, first = 1, stream.readline(WHOLE_JSON_BYTES + 1)
    while first.isspace():
        number, first = number + 1, stream.readline(WHOLE_JSON_BYTES + 1)
    try:
        is_json_lines = not first.startswith(b"[") and isinstance(json.loads(first), dict)
    except ValueError:
        is_json_lines = False
    if is_json_lines:
        yield from read_json_lines(itertools.chain([first], stream), path, text_field, number)
    elif first:
        whole = first + stream.read(WHOLE_JSON_BYTES + 1 - len(first))
        if len(whole) > WHOLE_JSON_BYTES:
            raise ValueError(
                f"{path} is one JSON value of over {WHOLE_JSON_BYTES:,} bytes, too large to parse in one piece;"
                " convert it to JSON lines: jq -c '.[]' FILE.json > FILE.jsonl"
            )
        value = parse_json(whole, path)
        for number, record in enumerate(value if isinstance(value, list) else [value], 1):
            yield f"{path} record {number}", record


def parse_json(text, place):
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error


def read_parquet(stream, path, text_field):
    import pyarrow
    import pyarrow.parquet

    try:
        # pre_buffer would keep all that was read; without buffer_size a whole row group is read at once.
        parquet = pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"cannot read {path}: {error}; is the file damaged?") from error
    names = parquet.schema_arrow.names
    if text_field not in names:
        raise missing_field(text_field, f"{path} row 1", names)
    number = 0
    for batch in parquet.iter_batches(1024, columns=[x for x in names if x in (text_field, "source")]):
        columns = {x: batch.column(x) for x in batch.schema.names}
        if pyarrow.types.is_string(columns[text_field].type):  # as bytes: faster, and it need not be valid UTF-8
            columns[text_field] = columns[text_field].cast(pyarrow.binary())
        for values in zip(*(column.to_pylist() for column in columns.values())):
            number += 1
            yield f"{path} row {number}", dict(zip(columns, values))


def record_document(record, text_field, place, default_source):
    """Yield the (source, bytes) of one record; nothing if its text is null or empty."""
    if not isinstance(record, dict):
        raise ValueError(f"{place} holds a {type(record).__name__}, not an object with a field {text_field!r}")
    if text_field not in record:
        raise missing_field(text_field, place, record)
    text, source = record[text_field], record.get("source")
    if text is not None and not isinstance(text, (str, bytes)):
        raise ValueError(f"text field {text_field!r} in {place} holds {type(text).__name__}, not text")
    if text:
        # JSON can hold half of a surrogate pair (broken emoji), which strict UTF-8 refuses.
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        yield (source if source and isinstance(source, str) else default_source), data


def missing_field(text_field, place, fields):
    return ValueError(
        f"text field {text_field!r} not found in {place}; its fields are: {', '.join(sorted(fields))};"
        " pass --text_field NAME"
    )


def read_hub(repo, subset, name, text_field):
    """Yield (source, bytes) of each document in a Hugging Face dataset's train split."""
    for number, record in enumerate(hub_records(repo, subset, name), 1):
        yield from record_document(record, text_field, f"{name} record {number}", name)


def hub_records(repo, subset, name):
    """Stream records from the hub, with one clear error for all that can go wrong there."""
    try:
        import datasets

        check_hub_answers()
        yield from datasets.load_dataset(repo, subset, split="train", streaming=True)
    except Exception as error:  # the library raises a dozen types, of three packages, for names, access and network
        kind = ConnectionError if isinstance(error, (ConnectionError, TimeoutError)) else ValueError
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise kind(
            f"cannot read dataset {name} from the Hugging Face hub: {reason}; check the name (OWNER/NAME:SUBSET) and"
            " the network (for a gated dataset: hf auth login), or use --dataset sample or a local file or folder"
        ) from error


def check_hub_answers():
    """Ask the hub for one page: without a network, load_dataset retries for 23 s and prints each attempt."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # its type depends on the version: of requests, of httpx, or about offline mode
        raise ConnectionError(f"no answer from {constants.ENDPOINT} ({error})") from error


def build_store(folder, documents, settings, origin):
    """Write a store under a temporary name and rename it: an interrupted build is never taken for a store."""
    print(f"building {folder} from {origin}")
    started = time.perf_counter()
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        with contextlib.closing(documents):
            made = write_store(partial, documents, settings, origin)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # it does if another process built the same store meanwhile; then that one serves
                raise
    except OSError as error:
        if error.errno is None:  # our own message about reading; the system's errors that get here are about writing
            raise
        raise OSError(f"cannot write {folder}: {error}; pass --cache_dir FOLDER that can be written to") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # not there after the rename
    seconds = time.perf_counter() - started
    print(
        f"built {folder}: {made['documents']:,} documents, {made['bytes']:,} bytes (train {made['train_bytes']:,},"
        f" validation {made['validation_bytes']:,}) in {seconds:.1f} s, {made['bytes'] / seconds / 1e6:.1f} MB/s"
    )


def write_store(folder, documents, settings, origin):
    """Write documents, an iterator of (source, bytes), into an existing empty folder; return the manifest."""
    max_bytes, max_documents = settings["max_bytes"], settings["max_documents"]
    offsets, split_hashes, source_ids, sources = array("q", [0]), array("Q"), array("H"), {}
    digest, document = hashlib.sha256(), b""
    bar = tqdm(total=max_bytes, unit="B", unit_scale=True, disable=None, leave=False)
    with bar, open(folder / "bytes.bin", "wb", buffering=1 << 20) as store:
        for source, document in documents:
            total_bytes = offsets[-1] + len(document)
            if max_bytes is not None and total_bytes > max_bytes:
                break
            store.write(document)
            add_to_hash(digest, document)
            offsets.append(total_bytes)
            split_hashes.append(int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "little"))
            if source not in sources and len(sources) >= SOURCE_LIMIT - 1:
                source = "(other)"  # some datasets put each document's address there
            source_ids.append(sources.setdefault(source, len(sources)))
            bar.update(len(document))
            if total_bytes == max_bytes or len(split_hashes) == max_documents:
                break  # here, not at the next document: the hub would have to send it first
    if not split_hashes:
        cause = (
            f"the first has {len(document):,} bytes, above the limit of {max_bytes:,} (--corpus_bytes); raise it"
            if document
            else "it holds no text"
        )
        raise ValueError(f"no documents from {origin}: {cause}")

    is_validation = split_off(np.frombuffer(split_hashes, np.uint64), settings["val_fraction"])
    np.save(folder / "offsets.npy", np.frombuffer(offsets, np.int64))
    np.save(folder / "is_validation.npy", is_validation)
    np.save(folder / "source_ids.npy", np.frombuffer(source_ids, np.uint16))
    validation_documents, validation_bytes = int(is_validation.sum()), int(np.diff(offsets)[is_validation].sum())
    manifest = settings | dict(
        documents=len(is_validation),
        bytes=offsets[-1],
        train_documents=len(is_validation) - validation_documents,
        train_bytes=offsets[-1] - validation_bytes,
        validation_documents=validation_documents,
        validation_bytes=validation_bytes,
        sources=list(sources),
        sha256=digest.hexdigest(),
        file_bytes={name: os.stat(folder / name).st_size for name in STORE_FILES},
    )
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def split_off(split_hashes, val_fraction):
    """Which documents are validation: those whose hash, read as a number in [0, 1), is below val_fraction.

    split_hashes: uint64 [documents], blake2b of each document's bytes. Equal documents land on the same
    side, and a document keeps its side whatever else the corpus holds, in whatever order. Only where that
    leaves a side empty (a few documents) does the smallest hash become validation, or the largest training.
    Returns bool [documents].
    """
    smallest, largest = split_hashes.min(), split_hashes.max()
    if smallest == largest:
        count = f"{len(split_hashes):,} equal documents are" if len(split_hashes) > 1 else "one document is"
        raise ValueError(
            f"{count} too little for a training and a validation part; give more documents (raise --corpus_bytes and"
            " max_documents if set), or for .txt and .md lower max_document_bytes, which cuts files into documents"
        )
    is_validation = split_hashes < np.uint64(val_fraction * 2**64)
    if not is_validation.any():
        return split_hashes == smallest
    return split_hashes != largest if is_validation.all() else is_validation


def read_manifest(folder):
    """A store's manifest, or ValueError if the store's files are not those that it describes."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        wanted = manifest["file_bytes"]
        found = {name: os.stat(folder / name).st_size for name in STORE_FILES}
        damage = "; ".join(f"{x} has {found[x]:,} bytes, not {wanted[x]:,}" for x in found if found[x] != wanted[x])
    except (OSError, ValueError, KeyError) as error:
        damage = str(error)
    if damage:
        raise ValueError(f"the byte store {folder} is damaged ({damage}); delete that folder and run again")
    return manifest
