"""Entropies of a corpus on disk: computed once and stored as float16, one number a position.

Another patching method, threshold or patch size is then a vectorised pass over that file; the entropy
model does not run again.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import threading
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch

from blt.commands import command
from blt.entropies import Shares, compiled_entropies, default_reading, is_worth_compiling, stream_entropies
from blt.files import DISK_IS_FULL, read_sealed, write_sealed
from blt.processes import from_main, is_main, main_first, n_processes, process_number, sum_over_processes, wait_for_all
from blt.progress import progress_bar
from blt.rows import DocumentStream

# The version of the cache's files.
FORMAT = 2
CACHE_FILES = ("entropies.f16", "train.npy", "validation.npy")
# Seconds between two saves of an unfinished pass.
SAVE_SECONDS = 5.0


class CacheError(ValueError):
    """A cached file or folder that must not be used: the message names it and says why."""


# Reads a manifest, or another sealed file of a cache.
read_manifest = partial(read_sealed, version=FORMAT, error=CacheError)


def sha256_of_file(path):
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class EntropyCache:
    """Entropies of a corpus's documents on disk: N + 1 float16 numbers a document, in nats (its bytes and its end).

    manifest: what made them (corpus and entropy model by hash, precision, dtype), which documents
    they cover, and the size and sha256 of each file.
    train, validation: the document numbers covered.
    numbers: both, in the order of the file.

    Opening checks the manifest and the sizes. A file that was written or copied since, as its time
    tells, is hashed as well.
    model_record: the `RunRecord` of the entropy model that must have made it; None: any.
    full_check: hash every file.
    Raises CacheError if the folder is not whole, or is of another corpus or entropy model.
    """

    def __init__(self, folder, corpus, model_record=None, full_check=False):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder / "manifest.json")
        missing = {"corpus_sha256", "entropy_model_sha256", "precision"} - set(self.manifest)
        if missing:
            raise CacheError(f"{folder} is damaged: manifest.json lacks {', '.join(sorted(missing))}")
        if self.manifest["corpus_sha256"] != corpus.hash:
            raise CacheError(f"{folder} is of another corpus")
        if model_record is not None and self.manifest["entropy_model_sha256"] != model_record.weights_sha256:
            raise CacheError(f"{folder} is of another entropy model")
        # Before the arrays are used: document numbers of another cache would index other texts.
        check_files(self.folder, self.manifest, full_check)
        try:
            self.train = np.load(self.folder / "train.npy")
            self.validation = np.load(self.folder / "validation.npy")
            self.entropies = np.memmap(self.folder / "entropies.f16", dtype=np.float16, mode="r")
        # What NumPy raises for a file that is none of its own.
        except (ValueError, EOFError) as error:
            raise CacheError(f"{folder} is damaged: {error}") from None
        self.numbers = np.concatenate((self.train, self.validation))
        if len(self.numbers) == 0 or self.numbers.min() < 0 or self.numbers.max() >= len(corpus):
            raise CacheError(f"{folder} is damaged: its document numbers are not those of the corpus")
        self.lengths = np.diff(corpus.offsets)[self.numbers] + 1
        self.ends = np.cumsum(self.lengths)
        # A cut file would shift every document after the cut.
        if len(self.entropies) != self.ends[-1]:
            raise CacheError(f"{folder} is damaged: {len(self.entropies):,} entropies, not {self.ends[-1]:,}")

    def covers(self, train, validation):
        """Whether the cache begins with these documents, in this order."""
        has_train = np.array_equal(self.train[: len(train)], train)
        has_validation = np.array_equal(self.validation[: len(validation)], validation)
        return has_train and has_validation

    def document(self, place):
        """Entropies of the document numbers[place]: float32 [N + 1]."""
        end = int(self.ends[place])
        return self.entropies[end - int(self.lengths[place]) : end].astype(np.float32)

    def of_documents(self, first, end):
        """Entropies of the documents numbers[first:end], one after the other: float32."""
        begin = int(self.ends[first - 1]) if first else 0
        return self.entropies[begin : int(self.ends[end - 1])].astype(np.float32)


def cache_folder(cache_dir, corpus, model_record):
    """Where the entropies of this corpus by this model are."""
    return Path(cache_dir) / f"entropies-{corpus.hash[:8]}-{model_record.weights_sha256[:8]}"


def check_files(folder, manifest, full_check=False):
    """Compare a cache's files with its manifest. Raises CacheError naming the first that differs."""
    is_touched = False
    if set(manifest.get("files", ())) != set(CACHE_FILES):
        raise CacheError(f"{folder} is damaged: manifest.json does not list {', '.join(CACHE_FILES)}")
    for name in CACHE_FILES:
        path = folder / name
        wanted = manifest["files"][name]
        if not path.is_file():
            raise CacheError(f"{folder} is damaged: {name} is missing")
        found = path.stat()
        if found.st_size != wanted["bytes"]:
            raise CacheError(f"{folder} is damaged: {name} has {found.st_size:,} bytes, not {wanted['bytes']:,}")
        # A copy has another time as well, so a time that differs says nothing yet.
        has_other_time = found.st_mtime_ns != wanted["mtime_ns"]
        if full_check or has_other_time:
            if sha256_of_file(path) != wanted["sha256"]:
                raise CacheError(f"{folder} is damaged or mixed up: {name} has another hash than in manifest.json")
        if has_other_time:
            wanted["mtime_ns"] = found.st_mtime_ns
            is_touched = True
    if is_touched:
        # The hashes are right: the next time the files need not be read for it. Where nothing can be
        # written they are read each time.
        with contextlib.suppress(OSError):
            write_sealed(folder / "manifest.json", manifest)


def open_entropies(cache_dir, corpus, model_record, entropy_model_path, dataset=None, advice=None):
    """Open the cached entropies of this corpus by this model.

    dataset: as the user named it, for the message.
    advice: what a message tells the user to do; None: the command that fills the cache.
    Raises FileNotFoundError that says what the folder holds instead and what to run, or ValueError
    if the cache is damaged or outdated.
    """
    dataset = corpus.manifest["dataset"] if dataset is None else dataset
    if advice is None:
        flags = {"dataset": dataset, "entropy_model_path": entropy_model_path, "cache_dir": cache_dir}
        advice = "run: " + command("create_patches.py", **flags)
    folder = cache_folder(cache_dir, corpus, model_record)
    if folder.exists():
        try:
            return EntropyCache(folder, corpus, model_record)
        except CacheError as error:
            raise ValueError(f"{error}; {advice}") from None
    # Say what is there: most often another model was trained, or another dataset named.
    found = []
    for other in sorted(Path(cache_dir).glob("entropies-*")):
        if not (other / "manifest.json").exists():
            continue
        try:
            manifest = read_manifest(other / "manifest.json")
        except CacheError as error:
            found.append(str(error))
            continue
        is_other_corpus = manifest["corpus_sha256"] != corpus.hash
        found.append(f"{other.name} is of another {'corpus' if is_other_corpus else 'entropy model'}")
    raise FileNotFoundError(
        f"{cache_dir} holds no entropies of dataset {dataset!r} by {entropy_model_path}"
        f"{' (' + '; '.join(found) + ')' if found else ''}; {advice}"
    )


def make_entropies(
    cache_dir,
    corpus,
    model,
    model_record,
    train,
    validation,
    precision,
    n_streams=None,
    chunk_bytes=None,
    full_check=False,
):
    """Compute and store the entropies of these documents; open them if they are there already.

    train, validation: document numbers.
    n_streams, chunk_bytes: as for `stream_entropies`.
    full_check: hash a cache that is there, instead of trusting sizes and times.
    Returns an `EntropyCache`. A pass that was stopped goes on where its last save was, with the same
    result bit for bit. A cache that is damaged, outdated or too small is computed again. Another
    program that wants the same cache waits for the first. Processes that torchrun has started share the work;
    each reads n_streams of its own.
    Raises OSError if there is no room for it on the disk, ValueError if an entropy is not finite.
    """
    folder = cache_folder(cache_dir, corpus, model_record)

    def existing():
        return existing_cache(folder, corpus, model_record, train, validation, precision, full_check)

    # Without the lock, so that a folder that is only readable will do.
    cache, _ = existing()
    # What the main process finds goes for all.
    if from_main(lambda: cache is None):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock_of(folder) if is_main() else contextlib.nullcontext():
            # Another program may have made it meanwhile.
            cache, why_not = existing()
            if from_main(lambda: cache is None):
                if why_not is not None:
                    print(f"entropies: {why_not}; computing them again")
                reading = default_reading(next(model.parameters()).device)
                n_streams = reading[0] if n_streams is None else n_streams
                chunk_bytes = reading[1] if chunk_bytes is None else chunk_bytes
                compute_cache(folder, corpus, model, model_record, train, validation, precision, n_streams, chunk_bytes)
                return EntropyCache(folder, corpus, model_record)
            if cache is None:
                cache, _ = existing()
    print(f"entropies: {folder} is there already ({len(cache.entropies):,} numbers)")
    if full_check:
        print(f"entropies: checked, {', '.join(CACHE_FILES)} have the hashes of manifest.json")
    return cache


def existing_cache(folder, corpus, model_record, train, validation, precision, full_check=False):
    """(EntropyCache, None) if the folder has what is wanted, else (None, why not); (None, None) without a folder."""
    if not folder.exists():
        return None, None
    try:
        cache = EntropyCache(folder, corpus, model_record, full_check)
    except CacheError as error:
        return None, str(error)
    if cache.manifest["precision"] != precision:
        return None, f"{folder} is in {cache.manifest['precision']}, not {precision}"
    if not cache.covers(train, validation):
        return None, f"{folder} covers other documents"
    return cache, None


@contextlib.contextmanager
def lock_of(folder):
    """Let only one program make this cache. The system lifts the lock of a process that ends, however it ends."""
    # Here, so that --help does without the package; `run_script` names it where it is missing.
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"entropies: another process is computing {folder}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def compute_cache(folder, corpus, model, model_record, train, validation, precision, n_streams, chunk_bytes):
    """Compute a cache aside, in a partial folder that a later call can go on with, and rename it to `folder`.

    n_streams: of each process.
    """
    stream = DocumentStream.of_corpus(corpus, np.concatenate((train, validation)))
    total = len(stream) - 1
    shares = Shares.of(model.config, total, n_streams * n_processes()).of_process()
    device = next(model.parameters()).device
    compiled = None
    if is_worth_compiling(device, shares.longest / chunk_bytes):
        compiled = compiled_entropies(model, (len(shares.first), chunk_bytes), precision)
    # All processes read in one way, because they go on with one partial folder.
    (n_without,) = sum_over_processes(compiled is None)
    if n_without:
        compiled = None
    # All that the numbers depend on, to the last bit: another value of any gets another folder.
    inputs = {
        "corpus_sha256": corpus.hash,
        "entropy_model_sha256": model_record.weights_sha256,
        "train_sha256": hashlib.sha256(train.tobytes()).hexdigest(),
        "validation_sha256": hashlib.sha256(validation.tobytes()).hexdigest(),
        "precision": precision,
        "n_streams": n_streams,
        "n_processes": n_processes(),
        "chunk_bytes": chunk_bytes,
        "device": device.type,
        "is_compiled": compiled is not None,
        "torch": torch.__version__,
    }
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:8]
    unfinished = UnfinishedPass(folder.with_name(f"{folder.name}-{key}.partial"), inputs, total, shares)
    partial = unfinished.folder
    # The lock is held, so a partial folder that is there belongs to a program that has ended.
    (is_missing,) = sum_over_processes(not unfinished.read())
    if is_missing:
        unfinished.begin(train, validation)
    (before,) = sum_over_processes(unfinished.count())
    if before:
        print(f"entropies: going on with {partial}, {before:,} of {total:,} numbers are there")
    began = time.perf_counter()
    # It shows the main process's share.
    bar = progress_bar(shares.positions, "entropies", initial=unfinished.count())
    try:
        with sigterm_raises(), bar as progress:
            stream_entropies(
                model,
                stream,
                chunk_bytes=chunk_bytes,
                precision=precision,
                progress=progress,
                out=unfinished.entropies,
                done=unfinished.n_read,
                after_chunk=unfinished.after_chunk,
                shares=shares,
                compiled=compiled,
            )
    except (KeyboardInterrupt, SystemExit):
        unfinished.save()
        print(
            f"entropies: stopped, {unfinished.count():,} of {shares.positions:,} are in {partial}; "
            "run the same command to go on"
        )
        raise
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        raise OSError(f"the disk of {partial} is full; free some space and run the same command: it goes on") from None
    unfinished.save()
    wait_for_all()
    seconds = time.perf_counter() - began
    with main_first():
        if is_main():
            finish_cache(folder, partial, corpus, model_record, train, validation, precision, total)
    speed = (total - before) / seconds / 1e3
    print(f"entropies: {total:,} numbers in {seconds:.1f} s ({speed:.1f} kB/s) -> {folder}")


def finish_cache(folder, partial, corpus, model_record, train, validation, precision, total):
    """Write the manifest of a pass that is complete, and rename its folder to that of the cache."""
    manifest = {
        "format": FORMAT,
        "corpus_sha256": corpus.hash,
        "dataset": corpus.manifest["dataset"],
        "entropy_model_sha256": model_record.weights_sha256,
        "precision": precision,
        "dtype": "float16",
        "documents": len(train) + len(validation),
        "train_documents": len(train),
        "numbers": total,
        "unit": "nats",
        "layout": "for each document: one number for each byte, about that byte, then one for the document's end",
        "files": {name: file_facts(partial / name) for name in CACHE_FILES},
    }
    write_sealed(partial / "manifest.json", manifest)
    # The manifest was the last file to be written: a folder that has one is complete. A damaged
    # cache, one of fewer documents or one of another precision gives way.
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    # Only now: killed before the rename, the next process finds that nothing is left to compute.
    for path in folder.glob(PROGRESS.format("*")):
        path.unlink()
    # Passes with other settings that were stopped: nothing will go on with them. The lock says that
    # no process is at work on them.
    for leftover in folder.parent.glob(f"{folder.name}-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def file_facts(path):
    """What a manifest says about a file."""
    found = path.stat()
    return {"bytes": found.st_size, "sha256": sha256_of_file(path), "mtime_ns": found.st_mtime_ns}


# How far each process is, by its number.
PROGRESS = "progress-{}.json"


class UnfinishedPass:
    """A cache that is being computed in a folder of its own, and how far it is.

    Processes that share the work have one folder and map one file; each notes how far its own rows are.

    shares: the `Shares` of this process.
    entropies: float16 memory map [total], to write to.
    n_read: positions of each row whose entropies are saved.
    """

    def __init__(self, folder, inputs, total, shares):
        self.folder = folder
        self.progress_path = folder / PROGRESS.format(process_number())
        self.inputs = inputs
        self.total = total
        self.shares = shares
        self.entropies = None
        self.n_done = 0  # read, but perhaps not saved
        # n_read and each row's checksum, in one object: a signal cannot come between the two.
        self.saved = (0, [0] * len(shares.first))
        self.saved_at = time.perf_counter()

    @property
    def n_read(self):
        return self.saved[0]

    def count(self):
        """How many positions are saved."""
        return int((self.shares.written(self.n_read) - self.shares.first).sum())

    def begin(self, train, validation):
        """Start from nothing. Raises OSError, and leaves nothing, if the disk has no room."""
        with main_first():
            if is_main():
                self._make_files(train, validation)
        self.n_done = 0
        self.saved = (0, [0] * len(self.shares.first))
        self._map()
        self.save()

    def _make_files(self, train, validation):
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            # The small files first, so that all that a later step may lack room for is tried here.
            self.folder.mkdir()
            np.save(self.folder / "train.npy", train)
            np.save(self.folder / "validation.npy", validation)
            reserve(self.folder / "entropies.f16", 2 * self.total)
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            # NumPy's own error has no number.
            if error.errno is not None and error.errno not in DISK_IS_FULL:
                raise
            raise OSError(
                f"{self.folder.parent} has no room for the entropies, {2 * self.total / 1e6:,.1f} MB "
                f"({error.strerror or error}); free some, or pass another --cache_dir or a smaller --max_bytes"
            ) from None

    def read(self):
        """Find out how far an earlier process came. False if there is nothing to go on with."""
        if not self.folder.exists():
            return False
        try:
            state = read_manifest(self.progress_path)
            self._check(state)
        except CacheError as error:
            print(f"entropies: starting again, because {error}")
            return False
        self._map()
        return True

    def _check(self, state):
        """Take over a saved state. Raises CacheError if it is not about the files that are there."""
        path = self.folder / "entropies.f16"
        if state["inputs"] != self.inputs:
            raise CacheError(f"{self.folder} is of other inputs")
        if not path.is_file() or path.stat().st_size != 2 * self.total:
            raise CacheError(f"{path} is damaged: it has another size")
        for name in ("train", "validation"):
            array_path = self.folder / f"{name}.npy"
            try:
                digest = hashlib.sha256(np.load(array_path).tobytes()).hexdigest()
            except (OSError, ValueError, EOFError) as error:
                raise CacheError(f"{array_path} is damaged: {error}") from None
            if digest != self.inputs[f"{name}_sha256"]:
                raise CacheError(f"{array_path} is damaged")
        entropies = np.memmap(path, dtype=np.float16, mode="r")
        # Each row's part has a checksum of its own, which can be continued; a sha256 cannot.
        written = self.shares.written(state["n_read"])
        for first, end, checksum in zip(self.shares.first, written, state["checksums"]):
            if zlib.crc32(entropies[first:end]) != checksum:
                raise CacheError(f"{path} is damaged: another checksum than in {self.progress_path.name}")
        self.n_done = state["n_read"]
        self.saved = (state["n_read"], state["checksums"])

    def _map(self):
        path = self.folder / "entropies.f16"
        self.entropies = np.memmap(path, dtype=np.float16, mode="r+", shape=(self.total,))

    def after_chunk(self, n_read):
        """Note that every row is read up to n_read, and save now and then."""
        self.n_done = n_read
        if time.perf_counter() - self.saved_at >= SAVE_SECONDS:
            self.save()

    def save(self):
        """Bring to disk what is done, then say how much it is."""
        # In this order: a number that is said to be there is there.
        self.entropies.flush()
        n_read, old_checksums = self.saved
        checksums = []
        spans = zip(self.shares.written(n_read), self.shares.written(self.n_done))
        for (old_end, new_end), checksum in zip(spans, old_checksums):
            checksums.append(zlib.crc32(self.entropies[old_end:new_end], checksum))
        self.saved = (self.n_done, checksums)
        state = {"format": FORMAT, "inputs": self.inputs, "n_read": self.n_done, "checksums": checksums}
        write_sealed(self.progress_path, state)
        self.saved_at = time.perf_counter()


def reserve(path, n_bytes):
    """Make a file of zeros that has its space on the disk already. Raises OSError if there is too little."""
    # A file of holes can be mapped on a full disk too; writing to the map then kills the process.
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, n_bytes)
                return
            except OSError as error:
                # Some file systems cannot reserve.
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        zeros = bytes(1 << 20)
        for begin in range(0, n_bytes, len(zeros)):
            file.write(zeros[: n_bytes - begin])


@contextlib.contextmanager
def sigterm_raises():
    """Let SIGTERM raise SystemExit, as Ctrl-C raises KeyboardInterrupt, unless the program handles it already."""
    is_main = threading.current_thread() is threading.main_thread()
    # Python lets only the main thread set handlers.
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number, frame):
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
