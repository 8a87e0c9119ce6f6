"""corpus.py: stores that were damaged, exchanged or left half made; builds side by side; a full disk."""

import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, error_of

import blt.corpus
from blt.corpus import STORE_FILES, Corpus, check_store, open_corpus


def write_lines(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "source": f"s{i % 3}"}) + "\n" for i, text in enumerate(texts)))
    return path


def some_texts(count, seed=0):
    """Texts of the same lengths for every seed, so that stores differ in nothing but what they hold."""
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh ", k=40 + i % 7)) for i in range(count)]


@pytest.fixture
def store(tmp_path):
    """The folder of a store of 200 documents."""
    path = write_lines(tmp_path / "a.jsonl", some_texts(200))
    return open_corpus(path, val_fraction=0.3, cache_dir=tmp_path / "cache").folder


def is_refused(folder, check):
    """Whether a store is refused by an error that names its folder and says what to do."""
    try:
        check(folder)
    except ValueError as error:
        assert str(folder) in str(error) and "is damaged (" in str(error) and "delete that folder" in str(error)
        assert "\n" not in str(error)
        return True
    return False


def copy_of(folder, number):
    copy = folder.with_name(f"{folder.name}-{number}")
    shutil.copytree(folder, copy)
    return copy


# ---- Damage


ALL_FILES = (*STORE_FILES, "manifest.json")


@pytest.mark.parametrize("whole_check_bytes", [0, 2**25])
@pytest.mark.parametrize("damage", ["truncate", "append", "flip", "remove"])
def test_random_damage_is_found(store, monkeypatch, damage, whole_check_bytes):
    """200 cases of each. A small store is read as a whole; of a large text, opening sees spots of 4 kB."""
    monkeypatch.setattr(blt.corpus, "WHOLE_CHECK_BYTES", whole_check_bytes)
    assert not is_refused(store, check_store)
    rng = random.Random(damage)
    for case in range(200):
        file = store / rng.choice(ALL_FILES)
        content = file.read_bytes()
        if damage == "truncate":
            file.write_bytes(content[: rng.randrange(len(content))])
        elif damage == "append":
            file.write_bytes(content + rng.randbytes(rng.randrange(1, 100)))
        elif damage == "flip":
            at = rng.randrange(len(content))
            changed = bytes([content[at] ^ 1 << rng.randrange(8)])
            # A space for another space, or a letter in another case within \u: the same manifest.
            if file.name == "manifest.json" and content[at : at + 1].isspace():
                changed = b"!"
            file.write_bytes(content[:at] + changed + content[at + 1 :])
        else:
            file.unlink()
        assert is_refused(store, Corpus), f"case {case}: {file.name}"
        file.write_bytes(content)
    assert not is_refused(store, check_store)


def test_exchanged_files_are_found_without_reading_all(tmp_path, monkeypatch):
    """Files of another store with the same sizes: another text, another split, other sources."""
    monkeypatch.setattr(blt.corpus, "WHOLE_CHECK_BYTES", 0)
    one = write_lines(tmp_path / "a.jsonl", some_texts(300))
    other = write_lines(tmp_path / "b.jsonl", reversed(some_texts(300, seed=1)))
    stores = [
        open_corpus(one, val_fraction=0.3, cache_dir=tmp_path / "cache").folder,
        open_corpus(one, val_fraction=0.2, cache_dir=tmp_path / "cache").folder,
        open_corpus(other, val_fraction=0.3, cache_dir=tmp_path / "cache").folder,
    ]
    rng = random.Random(0)
    swaps = 0
    while swaps < 200:
        folder, source = rng.sample(stores, 2)
        name = rng.choice(ALL_FILES)
        copy = tmp_path / "cache" / "copy"
        shutil.copytree(folder, copy)
        is_same = (copy / name).read_bytes() == (source / name).read_bytes()
        shutil.copy(source / name, copy / name)
        assert is_refused(copy, Corpus) != is_same, (name, folder, source)
        shutil.rmtree(copy)
        swaps += not is_same


def test_a_store_under_the_name_of_another_is_not_used(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", some_texts(200))
    first = open_corpus(path, val_fraction=0.3, cache_dir=tmp_path / "cache").folder
    second = open_corpus(path, val_fraction=0.2, cache_dir=tmp_path / "cache").folder
    shutil.rmtree(first)
    second.rename(first)
    with pytest.raises(ValueError, match="is damaged .*of another store: val_fraction differ.*delete that folder"):
        open_corpus(path, val_fraction=0.3, cache_dir=tmp_path / "cache")


def test_a_flip_between_the_spots_is_found_by_the_full_check(tmp_path, monkeypatch):
    monkeypatch.setattr(blt.corpus, "WHOLE_CHECK_BYTES", 0)
    # 4 MB; 64 spots of 4 kB are a sixteenth of them.
    rng = np.random.default_rng(0)
    texts = [bytes(rng.integers(97, 123, 4000, dtype=np.uint8)).decode() for _ in range(1000)]
    folder = open_corpus(write_lines(tmp_path / "a.jsonl", texts), cache_dir=tmp_path / "cache").folder
    file = folder / "bytes.bin"
    content = bytearray(file.read_bytes())
    found = 0
    for case in range(20):
        at = random.Random(case).randrange(len(content))
        content[at] ^= 1
        file.write_bytes(content)
        found += is_refused(folder, Corpus)
        assert is_refused(folder, check_store)
        content[at] ^= 1
    file.write_bytes(content)
    assert found < 10
    assert check_store(folder)["documents"] == 1000


@pytest.mark.parametrize(
    "manifest", ["[]", "[" * 100_000, '"x"', "null", '{"format": 2}', '{"format": 1, "file_bytes": 3}', "\xff"]
)
def test_manifests_that_are_none(store, manifest):
    (store / "manifest.json").write_bytes(manifest.encode("latin-1"))
    assert is_refused(store, Corpus)


# ---- Stores from before there were checksums


def make_old(store):
    manifest = json.loads((store / "manifest.json").read_text())
    del manifest["checksums"], manifest["manifest_sha256"]
    (store / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def test_an_older_store_is_checked_once_and_gets_checksums(store, capsys):
    before = (store / "manifest.json").read_bytes()
    make_old(store)
    capsys.readouterr()
    assert len(Corpus(store)) == 200
    assert "a store from before there were checksums, and added them" in capsys.readouterr().out
    assert (store / "manifest.json").read_bytes() == before
    Corpus(store)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", STORE_FILES)
def test_an_older_store_that_is_damaged_gets_none(store, name):
    make_old(store)
    content = bytearray((store / name).read_bytes())
    # The last byte of the last number: for source ids, 0 becomes 128 * 256.
    content[-1] ^= 128 if name == "source_ids.npy" else 1
    (store / name).write_bytes(content)
    assert is_refused(store, Corpus)
    assert "checksums" not in (store / "manifest.json").read_text()


# ---- Builds


BUILD = "import sys; from blt.corpus import open_corpus; print(open_corpus(sys.argv[1], cache_dir=sys.argv[2]).hash)"


@pytest.mark.slow
def test_processes_that_build_the_same_store(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", some_texts(100_000))
    command = [sys.executable, "-c", BUILD, path, tmp_path / "cache"]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    printed = [process.communicate(timeout=200) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], printed
    assert len({out.splitlines()[-1] for out, _ in printed}) == 1
    (folder,) = (tmp_path / "cache").iterdir()
    check_store(folder)


def test_leftovers_are_removed_after_a_day(tmp_path, store, capsys):
    cache = store.parent
    now = time.time()
    for name, age in {"x.partial-00000000": 2 * 86400, "y.partial-11111111": 3600}.items():
        (cache / name).mkdir()
        (cache / name / "bytes.bin").write_bytes(b"x")
        os.utime(cache / name / "bytes.bin", (now - age, now - age))
        os.utime(cache / name, (now - 3 * 86400, now - 3 * 86400))
    open_corpus(tmp_path / "a.jsonl", cache_dir=cache)
    assert "removed " in capsys.readouterr().out
    # The other was written to an hour ago: it may be at work.
    assert [path.name for path in cache.glob("*.partial-*")] == ["y.partial-11111111"]


def limited_build(path, cache, limit):
    """Build a store in a process that may write files of at most `limit` bytes: as if the disk were full."""

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-c", BUILD, path, cache]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit_files, timeout=100)


# bytes.bin has 860 kB, offsets.npy 160 kB: the one fails in mid-build, the other at its end.
@pytest.mark.parametrize("count, size", [(20_000, 300_000), (20_000, 100_000)])
def test_no_room_on_the_disk_leaves_nothing(tmp_path, count, size):
    done = limited_build(write_lines(tmp_path / "a.jsonl", some_texts(count)), tmp_path / "cache", size)
    assert done.returncode != 0
    assert "free some space, or pass --data_cache FOLDER" in done.stderr.splitlines()[-1]
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_room_for_the_index_leaves_nothing(tmp_path):
    """Many tiny documents: the text fits, the index does not. NumPy's error has no number there."""
    path = write_lines(tmp_path / "a.jsonl", [str(i) for i in range(20_000)])
    done = limited_build(path, tmp_path / "cache", 120_000)
    assert done.returncode != 0
    assert "cannot write" in done.stderr.splitlines()[-1], done.stderr
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_one_line_of_a_script(tmp_path, monkeypatch):
    def save(*_):
        raise OSError("160000 requested and 512 written")

    monkeypatch.setattr(np, "save", save)
    write_lines(tmp_path / "a.jsonl", some_texts(20))
    line = error_of(tmp_path, "entropy_llm", "--dataset", "a.jsonl", "--device", "cpu")
    assert "cannot write data_cache/" in line and "512 written" in line and "--data_cache FOLDER" in line


# ---- The bundled sample


def test_the_samples_store_is_the_one_of_all_records(tmp_path, monkeypatch):
    """Its name (for a fixed time of the file) and its bytes are what they were when the demo's numbers were made."""
    sample = tmp_path / "sample.jsonl.xz"
    shutil.copy(blt.corpus.SAMPLE_PATH, sample)
    os.utime(sample, ns=(0, 1_700_000_000_000_000_000))
    monkeypatch.setattr(blt.corpus, "SAMPLE_PATH", sample)
    folder = open_corpus("sample", cache_dir=tmp_path / "cache").folder
    assert folder.name == "sample-288f29f7"
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in STORE_FILES}
    assert hashes == {
        "bytes.bin": "35677170da8f189e",
        "offsets.npy": "4f3958d8eb19882d",
        "is_validation.npy": "f9f66e20f3367a45",
        "source_ids.npy": "fdb29026ed234e33",
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sha256"] == "edabf000362529a89901e5081c802d116d83add402db489cb4bd005a0b61eb15"
    assert Path(manifest["files"][0][0]).name == "sample.jsonl.xz"
