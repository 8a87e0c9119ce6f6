"""Caches: what is damaged, mixed up or outdated is named; what is stopped goes on; a full disk loses nothing."""

import errno
import json
import os
import resource
import shutil
import signal
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import (
    BLT_FLAGS,
    CORPUS_FLAGS,
    KILLS,
    TINY_ENTROPY,
    error_of,
    output_of,
    random_bytes,
    some_words,
    tiny_entropy_model,
)

import blt.entropies
from blt import entropy_cache
from blt.corpus import open_corpus
from blt.entropies import READING, default_reading, stream_entropies
from blt.entropy_cache import (
    CACHE_FILES,
    CacheError,
    EntropyCache,
    cache_folder,
    make_entropies,
    open_entropies,
    reserve,
    sha256_of_file,
)
from blt.patch_rules import PatchConfig
from blt.records import RunRecord
from blt.rows import DocumentStream
from blt.training_patches import read_patches, write_patches
from entropy_patcher import EntropyPatcher

STREAMS = 3
CHUNK = 64


class Made:
    """A small corpus, an entropy model, and a folder for its caches."""

    def __init__(self, folder, seed=0, n_texts=60):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        lines = [json.dumps({"text": some_words(30 + 5 * n, seed=seed + n).decode()}) for n in range(n_texts)]
        (folder / "text.jsonl").write_text("\n".join(lines))
        self.corpus = open_corpus(str(folder / "text.jsonl"), cache_dir=folder / "stores", val_fraction=0.2)
        self.model = tiny_entropy_model(seed=seed, n_layers=2)
        self.record = RunRecord(
            kind="entropy",
            model_config=TINY_ENTROPY,
            settings={},
            corpus={},
            weights_sha256=f"{seed}" * 64,
        )
        self.train = self.corpus.documents("train")
        self.validation = self.corpus.documents("validation")

    def make(self, cache_dir, **options):
        options = dict(precision="fp32", n_streams=STREAMS, chunk_bytes=CHUNK) | options
        return make_entropies(cache_dir, self.corpus, self.model, self.record, self.train, self.validation, **options)

    def open(self, cache_dir):
        return open_entropies(cache_dir, self.corpus, self.record, "entropy_model.pth")

    def cache_folder(self, cache_dir):
        return cache_folder(cache_dir, self.corpus, self.record)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """A folder with the cache of one pass that nothing stopped. Tests copy it."""
    folder = tmp_path_factory.mktemp("whole")
    made.make(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it in which a test may write."""
    return shutil.copytree(whole, tmp_path / "copy")


def numbers_of(made, cache_dir):
    return (made.cache_folder(cache_dir) / "entropies.f16").read_bytes()


def names_in(folder):
    """What a user sees there: hidden files are locks."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


# What a whole cache is


def test_a_cache_is_what_one_pass_gives(made, whole):
    cache = made.open(whole)
    stream = DocumentStream.of_corpus(made.corpus, np.concatenate((made.train, made.validation)))
    want = stream_entropies(made.model, stream, STREAMS, CHUNK).astype(np.float16)
    assert np.array_equal(cache.entropies, want)
    assert names_in(whole) == [cache.folder.name]
    assert names_in(cache.folder) == sorted([*CACHE_FILES, "manifest.json"])


@pytest.mark.slow
def test_a_compiled_pass_gives_the_same_numbers(made, whole, tmp_path, monkeypatch, capsys):
    """By one graph for all chunks, the first and the last of other lengths included."""
    monkeypatch.setattr(entropy_cache, "is_worth_compiling", lambda *arguments: True)
    torch._dynamo.utils.counters.clear()
    cache = made.make(tmp_path)
    assert "entropies: compiled in" in capsys.readouterr().out
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    # Neighbours in float16 are 0.0039 apart from 4 nats on.
    np.testing.assert_allclose(cache.entropies, made.open(whole).entropies, rtol=0, atol=4e-3)


@pytest.mark.parametrize("error", [0.1, np.nan, "fails"])
def test_a_pass_that_cannot_be_compiled_goes_without(made, whole, tmp_path, monkeypatch, capsys, error):
    def broken(function, dynamic):
        def compiled(*arguments):
            if error == "fails":
                raise torch._dynamo.exc.TorchDynamoException("no compiler")
            numbers, state = function(*arguments)
            return numbers + error, state

        return compiled

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(entropy_cache, "is_worth_compiling", lambda *arguments: True)
    made.make(tmp_path)
    assert "entropies: not compiled" in capsys.readouterr().out
    assert numbers_of(made, tmp_path) == numbers_of(made, whole)


def test_a_whole_cache_is_used(made, copy, capsys):
    made.make(copy)
    assert "is there already" in capsys.readouterr().out
    made.make(copy, full_check=True)
    assert "checked" in capsys.readouterr().out


def test_a_copied_cache_is_hashed_once(made, whole, tmp_path, monkeypatch):
    folder = tmp_path / "moved"
    shutil.copytree(whole, folder, copy_function=shutil.copyfile)
    hashed = []

    def counting(path):
        hashed.append(path.name)
        return sha256_of_file(path)

    monkeypatch.setattr(entropy_cache, "sha256_of_file", counting)
    made.open(folder)
    assert sorted(hashed) == sorted(CACHE_FILES)
    made.open(folder)
    assert len(hashed) == len(CACHE_FILES)


# Damage


def flip(path, position, keep_time=False):
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << (position % 8)
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def damage(made, cache_dir, rng, other):
    """One random damage to a cache; says in words what it was."""
    folder = made.cache_folder(cache_dir)
    name = rng.choice([*CACHE_FILES, "manifest.json"])
    path = folder / name
    kind = rng.choice(["cut", "longer", "flip", "swap", "remove", "empty"])
    size = path.stat().st_size
    if kind == "cut":
        os.truncate(path, int(rng.integers(0, size)))
    elif kind == "longer":
        path.write_bytes(path.read_bytes() + bytes(rng.integers(1, 9)))
    elif kind == "flip":
        flip(path, int(rng.integers(0, size)))
    elif kind == "swap":
        shutil.copy2(other.cache_folder(other.folder / "cache") / name, path)
    elif kind == "remove":
        path.unlink()
    else:
        path.write_bytes(b"")
    return f"{kind} {name}"


def by_another_model(folder, n_texts):
    """A cache of the corpus of `Made` by another model: its files have the same sizes."""
    other = Made(folder, n_texts=n_texts)
    other.model = tiny_entropy_model(seed=5, n_layers=2)
    other.record.weights_sha256 = "5" * 64
    other.make(folder / "cache")
    return other


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return by_another_model(tmp_path_factory.mktemp("other"), 60)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A corpus so small that its cache can be made hundreds of times: by two models, in `folder / "cache"`."""
    short = Made(tmp_path_factory.mktemp("short"), n_texts=12)
    short.make(short.folder / "cache")
    return short, by_another_model(tmp_path_factory.mktemp("short_other"), 12)


def check_damages(short, tmp_path, capsys, numbers):
    made, other = short
    whole = made.folder / "cache"
    for number in numbers:
        cache_dir = shutil.copytree(whole, tmp_path / str(number))
        what = damage(made, cache_dir, np.random.default_rng(number), other)
        # The arrays of both caches are the same, so a swap of those is none.
        is_harmless = what in ("swap train.npy", "swap validation.npy")
        if is_harmless:
            made.open(cache_dir)
            continue
        with pytest.raises(ValueError, match="run: python create_patches.py") as caught:
            made.open(cache_dir)
        assert "entropies-" in str(caught.value) and "\n" not in str(caught.value), what
        capsys.readouterr()
        made.make(cache_dir)
        assert "computing them again" in capsys.readouterr().out, what
        assert numbers_of(made, cache_dir) == numbers_of(made, whole)
        shutil.rmtree(cache_dir)


def test_damage_is_named_and_repaired(short, tmp_path, capsys):
    check_damages(short, tmp_path, capsys, range(16))


@pytest.mark.slow
def test_200_damages_are_named_and_repaired(short, tmp_path, capsys):
    check_damages(short, tmp_path, capsys, range(16, 216))


def test_the_full_check_finds_what_sizes_and_times_do_not_show(made, copy, whole, capsys):
    flip(made.cache_folder(copy) / "entropies.f16", 1001, keep_time=True)
    made.open(copy)  # the cheap check
    with pytest.raises(CacheError, match="entropies.f16 has another hash"):
        EntropyCache(made.cache_folder(copy), made.corpus, full_check=True)
    made.make(copy, full_check=True)
    assert "another hash" in capsys.readouterr().out
    assert numbers_of(made, copy) == numbers_of(made, whole)


def test_an_outdated_cache_is_named(made, copy, capsys):
    path = made.cache_folder(copy) / "manifest.json"
    old = json.loads(path.read_text())
    for name in ("format", "files", "sha256"):
        del old[name]
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match="outdated.*run: python create_patches.py"):
        made.open(copy)
    made.make(copy)
    assert "outdated" in capsys.readouterr().out
    made.open(copy)


def test_a_renamed_cache_is_not_taken_for_another(made, other, tmp_path):
    """The folder's name holds 8 digits of each hash; the manifest holds all."""
    shutil.copytree(other.cache_folder(other.folder / "cache"), made.cache_folder(tmp_path))
    with pytest.raises(ValueError, match="another entropy model; run"):
        made.open(tmp_path)


def test_leftovers_are_no_caches(made, other, tmp_path):
    (tmp_path / "entropies-12345678-12345678abc.tmp").mkdir()
    (tmp_path / "entropies-1-1-1.partial").mkdir()
    (tmp_path / "entropies-2").mkdir()
    (tmp_path / "entropies-2" / "manifest.json").write_text("{")
    shutil.copytree(other.folder / "cache", tmp_path, dirs_exist_ok=True)
    with pytest.raises(FileNotFoundError, match="entropies-2/manifest.json is damaged.*of another entropy model"):
        made.open(tmp_path)
    made.make(tmp_path)


def test_the_command_in_the_message_can_be_pasted(made, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        open_entropies(tmp_path / "my cache", made.corpus, made.record, "my model.pth", dataset="~/my texts")
    for words in ("--dataset '~/my texts'", "--entropy_model_path 'my model.pth'", "my cache'"):
        assert words in str(caught.value)


# Stopped passes


class Stopping(torch.nn.Module):
    """An entropy model that raises before one of its chunks, or is slow."""

    def __init__(self, model, stop_at=None, error=KeyboardInterrupt, seconds=0.0):
        super().__init__()
        self.model = model
        self.config = model.config
        self.stop_at = stop_at
        self.error = error
        self.seconds = seconds
        self.n_chunks = 0

    def stream(self, ids, state):
        if self.n_chunks == self.stop_at:
            raise self.error
        self.n_chunks += 1
        time.sleep(self.seconds)
        return self.model.stream(ids, state)


@pytest.fixture
def stopping(made):
    """Replace the corpus's model for one test."""
    model = made.model

    def use(*arguments, **options):
        made.model = Stopping(model, *arguments, **options)
        return made.model

    yield use
    made.model = model


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit(143)])
def test_ctrl_c_saves_and_the_same_command_goes_on(made, whole, stopping, tmp_path, capsys, error):
    stopping(30, error)
    with pytest.raises(type(error) if isinstance(error, SystemExit) else error):
        made.make(tmp_path)
    assert "run the same command to go on" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="holds no entropies"):
        made.open(tmp_path)
    # Only what is missing is read, and one receptive field before it.
    all_chunks = stopping(None)
    made.make(tmp_path / "all")
    rest = stopping(None)
    capsys.readouterr()
    made.make(tmp_path)
    assert "going on with" in capsys.readouterr().out
    assert rest.n_chunks <= all_chunks.n_chunks - 30 + 2
    assert numbers_of(made, tmp_path) == numbers_of(made, whole)
    assert names_in(tmp_path) == ["all", made.cache_folder(tmp_path).name]


def test_sigterm_saves_too(made, whole, stopping, tmp_path):
    stopping(None, seconds=0.05)
    child = os.fork()
    if child == 0:
        try:
            made.make(tmp_path)
        except SystemExit as stopped:
            os._exit(stopped.code)
        os._exit(1)
    time.sleep(0.5)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 143
    (partial,) = tmp_path.glob("*.partial")
    assert json.loads((partial / "progress-0.json").read_text())["n_read"] > 0
    stopping(None)
    made.make(tmp_path)
    assert numbers_of(made, tmp_path) == numbers_of(made, whole)


def check_kills(made, whole, stopping, tmp_path, monkeypatch, seeds):
    """SIGKILL at random instants until a process finishes: the cache is that of one pass."""
    monkeypatch.setattr(entropy_cache, "SAVE_SECONDS", 0.0)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        cache_dir = tmp_path / str(seed)
        stopping(None, seconds=0.002)
        child = os.fork()
        if child == 0:
            made.make(cache_dir)
            os._exit(0)
        time.sleep(rng.uniform(0, 0.6))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        stopping(None)
        made.make(cache_dir)
        assert numbers_of(made, cache_dir) == numbers_of(made, whole), seed
        assert names_in(cache_dir) == [made.cache_folder(cache_dir).name]


def test_killed_passes_go_on(made, whole, stopping, tmp_path, monkeypatch):
    check_kills(made, whole, stopping, tmp_path, monkeypatch, range(4))


@pytest.mark.slow
def test_more_killed_passes_go_on(made, whole, stopping, tmp_path, monkeypatch):
    check_kills(made, whole, stopping, tmp_path, monkeypatch, range(4, 4 + KILLS))


@pytest.mark.parametrize("name", ["entropies.f16", "train.npy", "validation.npy", "progress-0.json"])
@pytest.mark.parametrize("kind", ["flip", "cut", "remove"])
def test_a_damaged_unfinished_pass_starts_again(made, whole, stopping, tmp_path, capsys, name, kind):
    stopping(30)
    with pytest.raises(KeyboardInterrupt):
        made.make(tmp_path)
    (partial,) = tmp_path.glob("*.partial")
    path = partial / name
    if kind == "flip":
        # Position 150 is in the numbers of every file, and written already.
        flip(path, 150)
    elif kind == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    stopping(None)
    capsys.readouterr()
    made.make(tmp_path)
    assert "starting again, because" in capsys.readouterr().out
    assert numbers_of(made, tmp_path) == numbers_of(made, whole)


def test_other_settings_do_not_go_on_with_a_stopped_pass(made, stopping, tmp_path, capsys):
    stopping(30)
    with pytest.raises(KeyboardInterrupt):
        made.make(tmp_path)
    stopping(None)
    capsys.readouterr()
    made.make(tmp_path, chunk_bytes=2 * CHUNK)
    assert "going on" not in capsys.readouterr().out
    # What was stopped serves nobody any more.
    assert names_in(tmp_path) == [made.cache_folder(tmp_path).name]


def test_killed_before_the_last_rename(made, whole, stopping, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(entropy_cache.Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            made.make(tmp_path)
    rest = stopping(None)
    made.make(tmp_path)
    assert rest.n_chunks == 0
    assert numbers_of(made, tmp_path) == numbers_of(made, whole)
    assert names_in(made.cache_folder(tmp_path)) == sorted([*CACHE_FILES, "manifest.json"])


def test_entropies_that_are_not_finite_are_no_cache(made, tmp_path):
    broken = tiny_entropy_model(n_layers=2)
    torch.nn.init.constant_(broken.head.weight, float("nan"))
    model, made.model = made.model, broken
    try:
        with pytest.raises(ValueError, match="not finite.*python entropy_llm.py"):
            made.make(tmp_path)
        with pytest.raises(FileNotFoundError):
            made.open(tmp_path)
    finally:
        made.model = model


def test_two_processes_that_make_one_cache(made, whole, stopping, tmp_path):
    stopping(None, seconds=0.005)
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            made.make(tmp_path)
            os._exit(0)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    assert statuses == [0, 0]
    assert numbers_of(made, tmp_path) == numbers_of(made, whole)
    assert names_in(tmp_path) == [made.cache_folder(tmp_path).name]


def test_a_lock_file_of_a_dead_process_does_not_hold_up(made, tmp_path):
    lock = tmp_path / f".{made.cache_folder(tmp_path).name}.lock"
    child = os.fork()
    if child == 0:
        FileLock(lock).acquire()
        os._exit(0)
    os.waitpid(child, 0)
    made.make(tmp_path)


# A full disk


def test_space_is_reserved_before_it_is_mapped(tmp_path):
    reserve(tmp_path / "file", 3_000_000)
    found = (tmp_path / "file").stat()
    assert found.st_size == 3_000_000 and 512 * found.st_blocks >= 3_000_000


def test_space_is_reserved_without_fallocate(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    test_space_is_reserved_before_it_is_mapped(tmp_path)


def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_clear_line(made, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(OSError, match="no room for the entropies.*MB.*--cache_dir"):
        made.make(tmp_path)
    assert names_in(tmp_path) == []


def test_a_process_with_a_file_limit_gets_one_clear_line(made, tmp_path):
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            made.make(tmp_path)
        except OSError as error:
            os._exit(7 if "no room for the entropies" in str(error) else 8)
        os._exit(9)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert names_in(tmp_path) == []


def test_a_disk_that_fills_up_loses_no_progress(made, whole, stopping, tmp_path, monkeypatch):
    stopping(40, OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(entropy_cache, "SAVE_SECONDS", 0.0)
    with pytest.raises(OSError, match="run the same command"):
        made.make(tmp_path)
    stopping(None)
    made.make(tmp_path)
    assert numbers_of(made, tmp_path) == numbers_of(made, whole)


# patches.json


@pytest.fixture
def patches(made, tmp_path):
    path = tmp_path / "patches.json"
    facts = {"corpus_sha256": made.corpus.hash, "entropy_model_sha256": made.record.weights_sha256}
    write_patches(path, asdict(PatchConfig("global", 1.5)), facts)
    return path


def test_the_rule_comes_back(made, patches):
    assert read_patches(patches, made.corpus, made.record) == PatchConfig("global", 1.5)


def test_patches_of_another_model_or_corpus_are_refused(made, other, patches, tmp_path):
    with pytest.raises(ValueError, match="another entropy model.*run: python create_patches.py"):
        read_patches(patches, made.corpus, other.record)
    elsewhere = Made(tmp_path / "elsewhere", seed=9)
    with pytest.raises(ValueError, match="another corpus"):
        read_patches(patches, elsewhere.corpus, made.record)
    # A rule without entropies is about no text and no model.
    static = PatchConfig("static", 4.0)
    write_patches(patches, asdict(static), {"corpus_sha256": "a", "entropy_model_sha256": "b"})
    assert read_patches(patches, None, None) == static


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "no JSON object"),
        ('{"name": "something else"}', "outdated"),
        ('{"format": 2, "patch_config": {}}', "damaged or was edited"),
        ("\xff", "no JSON"),
    ],
)
def test_foreign_patches_are_refused(made, patches, text, words):
    patches.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"patches.json.*{words}.*run: python create_patches.py"):
        read_patches(patches, made.corpus, made.record)


@pytest.mark.parametrize("patch_config", [{"method": "greedy"}, {"size": 3}, {"entropy_threshold": "high"}, 5, None])
def test_patches_without_a_rule_are_refused(made, patches, patch_config):
    facts = {"corpus_sha256": made.corpus.hash, "entropy_model_sha256": made.record.weights_sha256}
    write_patches(patches, patch_config, facts)
    with pytest.raises(ValueError, match="no patching rule.*run"):
        read_patches(patches, made.corpus, made.record)


def test_every_changed_byte_of_patches_is_seen(made, patches):
    content = patches.read_bytes()
    for position in range(len(content)):
        flip(patches, position)
        with pytest.raises(ValueError, match="patches.json"):
            read_patches(patches, made.corpus, made.record)
        patches.write_bytes(content[:position])
        with pytest.raises(ValueError, match="patches.json"):
            read_patches(patches, made.corpus, made.record)
        patches.write_bytes(content)
    read_patches(patches, made.corpus, made.record)


# EntropyPatcher's own cache


def test_damaged_kept_entropies_are_refused(made, tmp_path):
    patcher = EntropyPatcher(made.model, PatchConfig(entropy_threshold=5.0, cache_dir=str(tmp_path)))
    sequences = [bytes(random_bytes(100)), b"abc"]
    want = patcher.process_data(sequences, cache_key="key")
    path = tmp_path / "key.npz"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for number in range(60):
        position = int(rng.integers(0, len(content)))
        if number % 2:
            path.write_bytes(content[:position])
        else:
            flip(path, position)
        # Some bytes of an archive, such as times, mean nothing to its arrays.
        try:
            assert patcher.process_data(sequences, cache_key="key") == want
            assert number % 2 == 0
        except ValueError as error:
            assert "key.npz" in str(error) and "delete it" in str(error)
        path.write_bytes(content)


# Memory and speed on a device


def test_the_state_of_a_stream_keeps_no_more_than_it_shows(made):
    _, state = made.model.stream(torch.from_numpy(random_bytes(2000).astype(np.int64)).view(2, 1000))
    documents, past, last = state
    for tensor in [documents, last, *(tensor for layer in past for tensor in layer)]:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_reading_is_chosen_by_device(monkeypatch):
    assert default_reading(torch.device("cpu")) == (4, 1024)
    monkeypatch.setattr(blt.entropies, "detect_machine", lambda name: {"cuda:0": "h100", "cuda:1": "colab_t4"}[name])
    assert default_reading(torch.device("cuda:0")) == READING["h100"] == (256, 2048)
    assert default_reading(torch.device("cuda:1")) == READING["colab_t4"]


def test_streams_of_an_unnamed_reading_are_the_devices(made, monkeypatch, tmp_path):
    widths = []
    stream = made.model.stream
    monkeypatch.setitem(READING, "cpu", (2, 128))
    monkeypatch.setattr(
        type(made.model), "stream", lambda self, ids, state=None: widths.append(tuple(ids.shape)) or stream(ids, state)
    )
    made.make(tmp_path, n_streams=None, chunk_bytes=None)
    assert widths[0] == (2, 128)


# The script


def test_check_cache_flag(pipeline_copy):
    printed = output_of(pipeline_copy, "create_patches", *CORPUS_FLAGS, "--check_cache")
    assert "checked" in printed
    (cache,) = (pipeline_copy / "patch_cache").glob("entropies-*")
    flip(cache / "entropies.f16", 1000, keep_time=True)
    printed = output_of(pipeline_copy, "create_patches", *CORPUS_FLAGS, "--check_cache")
    assert "damaged or mixed up" in printed and "computing them again" in printed


def test_a_damaged_cache_stops_training_and_create_patches_repairs_it(pipeline_copy):
    (cache,) = (pipeline_copy / "patch_cache").glob("entropies-*")
    flip(cache / "entropies.f16", 1000)
    before = (cache / "entropies.f16").read_bytes()
    line = error_of(pipeline_copy, "llm", *BLT_FLAGS)
    assert "damaged" in line and "run: python create_patches.py" in line
    assert (cache / "entropies.f16").read_bytes() == before
    assert "computing them again" in output_of(pipeline_copy, "create_patches", *CORPUS_FLAGS)
    output_of(pipeline_copy, "llm", *BLT_FLAGS)
