"""corpus.py: which files of a folder become text, what is said about the others, and input that cannot be read."""

import errno
import gzip
import io
import json
import lzma
import os
import random
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import error_of

import blt.corpus
from blt.corpus import Corpus, DataConfig, open_corpus, split_in_name


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def texts(corpus):
    return sorted(corpus.document(i).tobytes().decode() for i in range(len(corpus)))


def record(text):
    return json.dumps({"text": text}).encode() + b"\n"


def parquet(**columns):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A folder with two documents."""
    write(tmp_path / "in" / "a.txt", b"a")
    write(tmp_path / "in" / "b.txt", b"b")
    return tmp_path / "in"


@pytest.fixture
def read(tmp_path, capsys):
    """Open a dataset: (its documents as sorted str, the line that says what was read)."""

    def read_it(dataset, **settings):
        capsys.readouterr()
        corpus = open_corpus(dataset, cache_dir=tmp_path / "cache", **settings)
        lines = capsys.readouterr().out.splitlines()
        return texts(corpus), next(line for line in lines if line.startswith("building "))

    return read_it


# ---- Links


def test_linked_folders_are_read_once(tmp_path, folder, read):
    write(tmp_path / "elsewhere" / "c.txt", b"c")
    write(tmp_path / "elsewhere" / "deep" / "d.txt", b"d")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    # The same folder again, and a part of it: all of it was read.
    (folder / "same").symlink_to(tmp_path / "elsewhere")
    (folder / "part").symlink_to(tmp_path / "elsewhere" / "deep")
    found, line = read(folder)
    assert found == ["a", "b", "c", "d"]
    assert "files: 4, skipped for their extension: 0" in line
    assert "linked folders followed: 3" in line and "linked twice: 2" in line


def test_links_in_a_circle_end(tmp_path, folder, read):
    inner = folder / "inner"
    write(inner / "c.txt", b"c")
    (inner / "up").symlink_to(folder)
    (inner / "self").symlink_to(inner)
    (folder / "there").symlink_to(tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "back").symlink_to(folder)
    found, line = read(folder)
    assert found == ["a", "b", "c"]
    assert "linked twice: 3" in line


def test_linked_files(tmp_path, folder, read):
    outside = write(tmp_path / "outside.bin", b"c")
    (folder / "c.txt").symlink_to(outside)
    # It sorts before the file that it points to, but the file keeps its name.
    (folder / "0.txt").symlink_to(folder / "a.txt")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    found, line = read(folder)
    assert found == ["a", "b", "c"]
    assert "linked twice: 1" in line and "links to nothing: 1" in line
    store = next((tmp_path / "cache").iterdir())
    assert Corpus(store).sources == ["a.txt", "b.txt", "c.txt"]


def test_everything_that_is_passed_over_is_counted(folder, read):
    for name in (".hidden.txt", ".git/x.txt", "c.csv", "d.png"):
        write(folder / name, b"x")
    os.mkfifo(folder / "pipe.txt")
    _, line = read(folder)
    assert "files: 2, skipped for their extension: 2" in line
    assert "hidden: 2" in line and "no regular files: 1" in line
    # What did not occur is not listed.
    assert "links" not in line and "outputs" not in line and "splits found" not in line


def test_folder_that_may_not_be_read(folder, read, monkeypatch):
    (folder / "closed").mkdir()
    really_scan = os.scandir

    def scan(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really_scan(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(ValueError, match="cannot read the folder .*closed: Permission denied; check its permissions"):
        read(folder)


# ---- Downloaded datasets

CARD = b"---\nlicense: mit\n---\n# A dataset\n"


def test_the_card_and_the_test_split_of_a_downloaded_dataset_are_no_training_text(tmp_path, read):
    snapshot = tmp_path / "snapshot"
    write(snapshot / "README.md", CARD)
    write(snapshot / "data" / "train-00000-of-00002.parquet", parquet(text=["a", "b"]))
    write(snapshot / "data" / "train-00001-of-00002.parquet", parquet(text=["c"]))
    write(snapshot / "data" / "validation-00000-of-00001.parquet", parquet(text=["held out 1", "held out 2"]))
    write(snapshot / "data" / "test-00000-of-00001.parquet", parquet(text=["secret 1", "secret 2"]))
    write(snapshot / "dataset_infos.json", b'{"default": {}}')
    found, line = read(snapshot)
    assert found == ["a", "b", "c"]
    assert "cards of a downloaded dataset: 2" in line
    assert "splits found: train (2 files), validation (1 files), test (1 files); used: train" in line
    assert f"--dataset {snapshot}:SPLIT, or :all" in line

    # Asked for, each is read; together too.
    assert read(f"{snapshot}:test")[0] == ["secret 1", "secret 2"]
    assert read(f"{snapshot}:validation")[0] == ["held out 1", "held out 2"]
    assert len(read(f"{snapshot}:all")[0]) == 7
    with pytest.raises(ValueError, match=r"is a file, which has no split 'test'; leave out :test"):
        read(f"{snapshot}/data/test-00000-of-00001.parquet:test")


def test_a_snapshot_in_the_hubs_cache_is_links_to_blobs(tmp_path, read):
    root = tmp_path / "datasets--owner--name"
    snapshot = root / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = {"README.md": CARD, "train.jsonl": record("a") + record("b"), "test.jsonl": record("secret")}
    for number, (name, content) in enumerate(blobs.items()):
        blob = write(root / "blobs" / f"{number:040x}", content)
        (snapshot / name).symlink_to(blob)
    assert read(snapshot)[0] == ["a", "b"]


def test_only_the_card_shows_that_it_is_a_download(tmp_path, read):
    write(tmp_path / "in" / "README.md", CARD)
    write(tmp_path / "in" / "part-0.jsonl.gz", gzip.compress(record("a") + record("b")))
    found, line = read(tmp_path / "in")
    assert found == ["a", "b"]
    assert "cards of a downloaded dataset: 1" in line and "splits found" not in line


def test_texts_are_splits_only_beside_a_training_text(tmp_path, read):
    for name in ("wiki.train.txt", "wiki.valid.txt", "wiki.test.txt", "README.md"):
        write(tmp_path / "wiki" / name, f"{name} 1\n\n{name} 2\n\n".encode())
    found, line = read(tmp_path / "wiki", max_document_bytes=20)
    assert found == ["wiki.train.txt 1\n\n", "wiki.train.txt 2\n\n"]
    assert "used: train" in line

    # Pages of a manual are no splits, and its README is a page.
    for name in ("README.md", "test.md", "eval.md", "install.txt"):
        write(tmp_path / "manual" / name, name.encode())
    found, line = read(tmp_path / "manual")
    assert found == ["README.md", "eval.md", "install.txt", "test.md"]
    assert "splits found" not in line and "cards" not in line


def test_pages_with_yaml_alone_are_pages(tmp_path, read):
    write(tmp_path / "site" / "README.md", CARD)
    write(tmp_path / "site" / "page.md", CARD + b"a page")
    assert len(read(tmp_path / "site")[0]) == 2


def test_files_that_name_no_split_are_training_text(tmp_path, read):
    write(tmp_path / "in" / "books.jsonl", record("a") + record("b"))
    write(tmp_path / "in" / "books_test.jsonl", record("secret"))
    found, line = read(tmp_path / "in")
    assert found == ["a", "b"]
    assert "splits found: train (1 files), test (1 files); used: train" in line


def test_no_training_split(tmp_path, read):
    write(tmp_path / "in" / "test.jsonl", record("a") + record("b"))
    # There is one split only, and it was named: that is what the user wants to read.
    found, line = read(tmp_path / "in")
    assert found == ["a", "b"] and "used: test" in line
    with pytest.raises(ValueError, match=r"has no split 'train'; its splits are: test \(1 files\)"):
        read(f"{tmp_path / 'in'}:train")
    write(tmp_path / "in" / "dev.jsonl", record("c") + record("d"))
    with pytest.raises(ValueError, match=r"none for training; say which to read: --dataset .*in:validation"):
        read(tmp_path / "in")


@pytest.mark.parametrize(
    "name, split",
    [
        ("train.jsonl", "train"),
        ("data/train-00000-of-00005-abc.parquet", "train"),
        ("sub/TEST.json.gz", "test"),
        ("wiki.valid.txt", "validation"),
        ("my_dev_2.jsonl", "validation"),
        ("eval2.parquet", "test"),
        ("test/part-0.jsonl", "test"),
        ("test/train.jsonl", "train"),
        ("latest.jsonl", None),
        ("contest/a.jsonl", None),
        ("test notes/a.jsonl", None),
        ("training_test.jsonl", "train"),
    ],
)
def test_split_in_name(name, split):
    assert split_in_name(name) == split


# ---- This project's own files


def test_own_outputs_are_no_text(pipeline, tmp_path, read):
    """A folder in which the three scripts have run, with its caches and models, beside two texts."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("data_cache", "patch_cache", "checkpoints", "entropy_model_run", "entropy_model.json"):
        (folder / name).symlink_to(pipeline[0] / name)
    write(folder / "a.txt", b"a")
    write(folder / "b.jsonl", record("b"))
    found, line = read(folder)
    assert found == ["a", "b"]
    n_json = len([path for path in pipeline[0].rglob("*.json*") if ".partial" not in str(path)])
    assert n_json >= 6
    assert f"outputs of this project: {n_json}" in line


def test_records_of_this_project_are_no_text(read):
    own = blt.corpus.SAMPLE_PATH.parent.parent
    files, found = blt.corpus.find_files(own / "records", Path("none"), "text")
    assert not [name for name in files if name.endswith((".json", ".jsonl"))]
    files, _ = blt.corpus.find_files(own, Path("none"), "text")
    assert "data/sample.jsonl.xz" in files and not [name for name in files if name.startswith("records/")]


def test_a_users_file_of_the_same_name_is_text(tmp_path, read):
    write(tmp_path / "in" / "model.json", json.dumps([{"model_config": 1, "text": "a"}]).encode())
    write(tmp_path / "in" / "metrics.jsonl", record("b"))
    write(tmp_path / "in" / "manifest.json", b'{"text": "c"}')
    found, line = read(tmp_path / "in")
    assert found == ["a", "b", "c"] and "outputs" not in line


# ---- Input that cannot be read


DEEP = b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", record("x") + DEEP + b"\n", "a.jsonl line 2 is nested too deeply"),
        ("a.json", DEEP, "a.json is nested too deeply"),
        ("a.json", b"[" * 200_000, "a.json is nested too deeply"),
        ("a.jsonl", b'{"text": {"a": "b"}}\n', "'text' in .*a.jsonl line 1 holds dict, not text"),
        ("a.parquet", parquet(text=[{"a": "b"}]), "'text' in .*a.parquet row 1 holds dict, not text"),
        ("a.parquet", parquet(text=[["a"]]), "'text' in .*a.parquet row 1 holds list, not text"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "a.jsonl line 1 is not JSON"),
    ],
    ids=range(7),
)
def test_bad_records(tmp_path, read, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / name, content))


def test_parquet_with_a_doubled_column(tmp_path, read):
    doubled = pyarrow.table([["a", "b"], ["c", "d"], [1, 2]], names=["text", "text", "n"])
    pyarrow.parquet.write_table(doubled, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has 2 columns 'text': which is the text\? rename one"):
        read(tmp_path / "a.parquet")
    # Another column may be doubled; two sources are none.
    doubled = pyarrow.table([["a", "b"], ["c", "d"], ["e", "f"]], names=["text", "source", "source"])
    pyarrow.parquet.write_table(doubled, tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet")[0] == ["a", "b"]


def test_parquet_source_that_is_no_utf8(tmp_path):
    binary = pyarrow.array([b"\xff", b"ok"], pyarrow.binary())
    invalid = pyarrow.StringArray.from_buffers(2, *binary.buffers()[1:])
    path = write(tmp_path / "a.parquet", parquet(text=["a", "b"], source=invalid))
    assert open_corpus(path, cache_dir=tmp_path / "cache").sources == ["\\xff", "ok"]


def damages(content, rng, count):
    """`count` damaged versions: cut, bytes changed, a part exchanged."""
    for number in range(count):
        changed = bytearray(content)
        if number % 3 == 0:
            del changed[rng.randrange(len(changed)) :]
        elif number % 3 == 1:
            for _ in range(rng.randrange(1, 4)):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        else:
            at = rng.randrange(len(changed))
            part = rng.randbytes(min(20, len(changed) - at))
            changed[at : at + len(part)] = part
        yield bytes(changed)


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet", ".json"])
def test_damaged_files_give_one_line_with_their_name(tmp_path, kind):
    """Whatever the damage, the error is a ValueError that names the file; or what is read is text."""
    rng = random.Random(kind)
    lines = b"".join(record(f"{i} some words to compress") for i in range(300))
    content = {
        ".jsonl": lines,
        ".json": json.dumps([json.loads(line) for line in lines.splitlines()]).encode(),
        ".jsonl.gz": gzip.compress(lines),
        ".jsonl.xz": lzma.compress(lines),
        ".jsonl.zst": pyarrow.compress(lines, codec="zstd", asbytes=True),
        ".parquet": parquet(text=[f"{i} some words to compress" for i in range(300)]),
    }[kind]
    path = tmp_path / f"file{kind}"
    refused = 0
    for number, damaged in enumerate(damages(content, rng, 60)):
        path.write_bytes(damaged)
        try:
            corpus = open_corpus(path, cache_dir=tmp_path / f"cache{number}")
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error), error
            refused += 1
        else:
            # A cut that a compressed format does not see would lose text without a word.
            is_cut = number % 3 == 0
            assert not (is_cut and kind != ".jsonl") or len(corpus) == 300
    # Formats with a checksum see every damage; in plain JSON, another letter is another text.
    assert refused >= (15 if kind in (".jsonl", ".json", ".parquet") else 40)


def test_zstd_frames_one_after_the_other(tmp_path, read):
    frames = [pyarrow.compress(record(text), codec="zstd", asbytes=True) for text in "ab"]
    assert read(write(tmp_path / "a.jsonl.zst", b"".join(frames)))[0] == ["a", "b"]


def test_file_that_vanishes(tmp_path, folder, read, monkeypatch):
    really_read = blt.corpus.read_file

    def remove_first(name, path, *arguments):
        path.unlink()
        return really_read(name, path, *arguments)

    monkeypatch.setattr(blt.corpus, "read_file", remove_first)
    with pytest.raises(ValueError, match="cannot read .*a.txt: No such file"):
        read(folder)
    assert list((tmp_path / "cache").iterdir()) == []


def test_file_that_vanishes_before_it_is_read(folder, read, monkeypatch):
    really_find = blt.corpus.find_files

    def find_and_remove(*arguments):
        found = really_find(*arguments)
        (folder / "a.txt").unlink()
        return found

    monkeypatch.setattr(blt.corpus, "find_files", find_and_remove)
    with pytest.raises(ValueError, match="cannot read .*a.txt: No such file .*; has it been moved"):
        read(folder)


def test_file_that_changes_while_it_is_read(tmp_path, folder, read, monkeypatch):
    really_read = blt.corpus.read_file

    def change(name, path, *arguments):
        yield from really_read(name, path, *arguments)
        path.write_bytes(b"changed")

    monkeypatch.setattr(blt.corpus, "read_file", change)
    with pytest.raises(ValueError, match="a.txt was changed while it was read; run again"):
        read(folder)
    # The key says the old size and time: no store of this key may hold the new text.
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_room_for_what_is_decompressed(tmp_path, read, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(blt.corpus.shutil, "copyfileobj", full)
    path = write(tmp_path / "a.parquet.gz", gzip.compress(parquet(text=["a", "b"])))
    with pytest.raises(OSError, match=r"cannot write .*no room in .* \(or set TMPDIR\)"):
        read(path)


def test_names_that_are_no_utf8(tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write(folder / os.fsdecode(b"\xff.txt"), b"a")
    write(folder / "b.jsonl", record("b"))
    corpus = open_corpus(folder, cache_dir=tmp_path / "cache")
    assert texts(corpus) == ["a", "b"]
    assert corpus.sources == ["\\xff.txt", "b.jsonl"]
    # Printed and stored, it is text that any terminal and any reader of JSON takes.
    capsys.readouterr().out.encode()
    text = (corpus.folder / "manifest.json").read_bytes().decode()
    assert json.loads(text)["dataset"] == "caf\\xe9"
    json.dumps(corpus.manifest, ensure_ascii=False).encode()
    bad = write(folder / os.fsdecode(b"\xfe.jsonl"), b"{")
    with pytest.raises(ValueError, match=re.escape("\\xfe.jsonl line 1 is not JSON")) as caught:
        open_corpus(bad, cache_dir=tmp_path / "cache")
    str(caught.value).encode()


# ---- Names and numbers that are wrong


def test_a_misspelt_folder_is_no_hub_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "texts" / "books" / "a.txt", b"a")
    message = "texts/boks is not found here as a file or folder .*; did you mean texts/books.*; if you mean the Hugging"
    with pytest.raises(ValueError, match=message):
        open_corpus("texts/boks")
    with pytest.raises(ValueError, match="did you mean texts.*; if you mean the Hugging"):
        open_corpus("text/books")
    with pytest.raises(FileNotFoundError, match=r"\./Texts/book not found .*did you mean texts.*--dataset sample"):
        open_corpus("./Texts/book")
    with pytest.raises(ValueError, match="unknown dataset 'sampel'; .*did you mean sample"):
        open_corpus("sampel")
    with pytest.raises(ValueError) as caught:
        open_corpus("nobody/nothing")
    assert "did you mean" not in str(caught.value)


def test_a_pipe_is_no_dataset(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match="pipe.txt: it is a pipe or a device; store it as a file first"):
        open_corpus(tmp_path / "pipe.txt", cache_dir=tmp_path / "cache")


def test_huge_numbers(tmp_path, folder):
    huge = 10**30
    corpus = open_corpus(folder, max_bytes=huge, max_documents=huge, cache_dir=tmp_path / "cache")
    assert texts(corpus) == ["a", "b"]
    assert len(corpus.documents("all", max_bytes=huge, max_documents=huge)) == 2
    # A piece is held in memory as a whole, so its limit has one.
    with pytest.raises(ValueError, match=f"max_document_bytes is {huge}; it must be at most {2**30}"):
        open_corpus(folder, max_document_bytes=huge)
    with pytest.raises(ValueError, match=f"max_document_bytes is {huge}; it must be at most {2**30}"):
        DataConfig(max_document_bytes=huge)


def test_json_line_without_end(tmp_path, read, monkeypatch):
    monkeypatch.setattr(blt.corpus, "WHOLE_JSON_BYTES", 1000)
    path = write(tmp_path / "a.jsonl", record("a") + record("x" * 2000))
    with pytest.raises(ValueError, match="a.jsonl line 2 has over 1,000 bytes"):
        read(path)


def test_long_texts_are_on_both_sides_and_it_is_said(tmp_path, capsys):
    book = "".join(f"Paragraph {i} of the one book.\n\n" for i in range(2000)).encode()
    path = write(tmp_path / "book.txt", book)
    corpus = open_corpus(path, max_document_bytes=500, val_fraction=0.1, cache_dir=tmp_path / "cache")
    assert "note: 1 text files are longer than 500 bytes: each is split into documents" in capsys.readouterr().out
    assert np.isin([False, True], corpus.is_validation).all() and corpus.sources == ["book.txt"]


def test_errors_are_one_line_of_a_script(tmp_path):
    write(tmp_path / "in" / "a.jsonl", DEEP + b"\n")
    line = error_of(tmp_path, "entropy_llm", "--dataset", "in", "--device", "cpu")
    assert "a.jsonl line 1 is nested too deeply" in line
    line = error_of(tmp_path, "entropy_llm", "--dataset", "in/b", "--device", "cpu")
    assert "is not found here as a file or folder" in line
