"""corpus.py: sources and formats, the split, limits, the cache and its damage, error messages."""

import gzip
import hashlib
import io
import json
import lzma
import os
import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import blt.corpus
from blt.corpus import Corpus, cut_text, open_corpus, split_off

ROOT = Path(blt.corpus.__file__).resolve().parent.parent
COMPRESSIONS = ["", ".gz", ".xz", ".zst"]


def write(path, content):
    """Write bytes to path, compressed as its extension says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".xz":
        content = lzma.compress(content)
    elif path.suffix == ".zst":
        content = pyarrow.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return path


def json_lines(texts, field="text", **more):
    return "".join(json.dumps({field: text} | more) + "\n" for text in texts).encode()


def parquet_bytes(**columns):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, row_group_size=3)
    return sink.getvalue()


def contents(corpus, numbers=None):
    """The documents of a corpus as bytes: all of them, or those of these numbers."""
    if numbers is None:
        numbers = range(len(corpus))
    return [corpus.document(i).tobytes() for i in numbers]


def numbered(count, size=20):
    """Distinct documents of `size` ASCII characters."""
    return [f"{i} ".ljust(size, "x") for i in range(count)]


@pytest.fixture
def opened(tmp_path):
    """open_corpus with a cache of its own."""

    def open_it(dataset, **settings):
        settings = {"cache_dir": tmp_path / "cache"} | settings
        return open_corpus(dataset, **settings)

    return open_it


# ---- Reading


TEXTS = ["one", "deux é", "three\nlines\n", "emoji 🙂", "five"]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", ["jsonl", "json array", "json lines", "json pretty", "parquet"])
def test_records_of_every_format_and_compression(tmp_path, opened, kind, compression):
    records = [{"text": text} for text in TEXTS]
    content = {
        # Blank lines are passed over.
        "jsonl": json_lines(TEXTS, other=[1, 2]).replace(b"\n", b"\n\n  \n", 1),
        "json array": json.dumps(records).encode(),
        "json lines": b"\n" + json_lines(TEXTS),
        "json pretty": json.dumps(records, indent=2).encode(),
        "parquet": parquet_bytes(other=list(range(5)), text=TEXTS),
    }[kind]
    extension = kind.split()[0]
    path = write(tmp_path / f"file.{extension}{compression}", content)
    corpus = opened(path)
    assert contents(corpus) == [text.encode() for text in TEXTS]
    assert corpus.sources == [path.name]
    assert corpus.source_ids.tolist() == [0] * 5


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", [".txt", ".md", ".TXT"])
def test_text_keeps_invalid_utf8(tmp_path, opened, kind, compression):
    content = bytes(range(256)) + b"\xff\xfe\x00\n\n" + b"\xc3 truncated"
    path = write(tmp_path / f"file{kind}{compression}", content)
    corpus = opened(path, max_document_bytes=100)
    assert corpus.bytes.tobytes() == content
    assert len(corpus) > 2


def test_one_json_object_is_one_document(tmp_path, opened):
    write(tmp_path / "in" / "a.json", json.dumps({"text": "a", "n": 1}, indent=1).encode())
    write(tmp_path / "in" / "b.json", b'{"text": "b"}')
    assert contents(opened(tmp_path / "in")) == [b"a", b"b"]


def test_byte_order_mark_is_no_part_of_json(tmp_path, opened):
    for name in ("a.json", "a.jsonl"):
        path = write(tmp_path / name, b"\xef\xbb\xbf" + json_lines(["a", "b"]))
        assert contents(opened(path)) == [b"a", b"b"]


def test_lone_surrogates_are_kept_as_bytes(tmp_path, opened):
    path = write(tmp_path / "a.jsonl", b'{"text": "x\\ud83dy"}\n{"text": "plain"}\n')
    assert contents(opened(path)) == ["x\ud83dy".encode("utf-8", "surrogatepass"), b"plain"]


def test_null_and_empty_texts_are_skipped(tmp_path, opened):
    lines = [{"text": None}, {"text": "a"}, {"text": ""}, {"text": "b"}]
    jsonl = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)).encode())
    parquet = write(tmp_path / "a.parquet", parquet_bytes(text=[None, "a", "", "b"]))
    assert contents(opened(jsonl)) == contents(opened(parquet)) == [b"a", b"b"]


def test_parquet_may_hold_binary_and_invalid_text(tmp_path, opened):
    binary = pyarrow.array([b"\xff\x00", b"b"], pyarrow.binary())
    invalid = pyarrow.StringArray.from_buffers(2, *binary.buffers()[1:])
    large = binary.cast(pyarrow.large_binary())
    for name, column in {"binary": binary, "invalid": invalid, "large": large}.items():
        path = write(tmp_path / f"{name}.parquet", parquet_bytes(text=column))
        assert contents(opened(path)) == [b"\xff\x00", b"b"]


def test_parquet_longer_than_a_batch(tmp_path, opened):
    texts = numbered(2500)
    content = parquet_bytes(text=texts, source=["s", "t"] * 1250)
    corpus = opened(write(tmp_path / "a.parquet", content))
    assert contents(corpus) == [text.encode() for text in texts]
    assert corpus.sources == ["s", "t"]
    assert corpus.source_ids.tolist() == [0, 1] * 1250


def test_text_field_is_selectable(tmp_path, opened):
    path = write(tmp_path / "a.jsonl", json_lines(["a", "b"], field="body", text="wrong"))
    assert contents(opened(path, text_field="body")) == [b"a", b"b"]
    path = write(tmp_path / "a.parquet", parquet_bytes(text=["no", "no"], body=["a", "b"]))
    assert contents(opened(path, text_field="body")) == [b"a", b"b"]


def test_sources(tmp_path, opened):
    lines = [
        b'{"text": "1", "source": "s"}',
        b'{"text": "2"}',
        b'{"text": "3", "source": 4}',
    ]
    write(tmp_path / "in" / "b.txt", b"text")
    write(tmp_path / "in" / "a" / "x.jsonl", b"\n".join(lines))
    corpus = opened(tmp_path / "in")
    sources = [corpus.sources[i] for i in corpus.source_ids]
    assert sources == ["s", "a/x.jsonl", "a/x.jsonl", "b.txt"]
    assert corpus.source_ids.dtype == np.uint16


def test_more_sources_than_ids(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(blt.corpus, "SOURCE_LIMIT", 3)
    lines = [json.dumps({"text": f"text {i}", "source": f"s{i % 5}"}) for i in range(10)]
    corpus = opened(write(tmp_path / "a.jsonl", "\n".join(lines).encode()))
    sources = [corpus.sources[i] for i in corpus.source_ids]
    assert sources == ["s0", "s1", "(other)", "(other)", "(other)"] * 2


def test_folder_is_walked_in_sorted_order(tmp_path, opened, capsys):
    for name in ("b.txt", "a/z.txt", "a/y.md", "c.csv", "picture.png", ".hidden.txt", ".git/d.txt"):
        write(tmp_path / "in" / name, name.encode())
    assert contents(opened(tmp_path / "in")) == [b"a/y.md", b"a/z.txt", b"b.txt"]
    assert "files: 3, skipped for their extension: 2" in capsys.readouterr().out


def test_store_inside_its_input_is_not_input(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", b"a")
    write(tmp_path / "b.txt", b"b")
    first = open_corpus(".", cache_dir="cache")
    assert contents(open_corpus(".", cache_dir="cache")) == contents(first) == [b"a", b"b"]
    assert capsys.readouterr().out.count("building") == 1


# ---- Splitting long text


@given(st.binary(max_size=300) | st.text("ab\r\n", max_size=300).map(str.encode), st.integers(1, 50))
@example(b"", 1)
@example(b"\n" * 20, 3)
def test_pieces_concatenate_to_the_text(text, limit):
    pieces = list(cut_text(io.BytesIO(text), limit))
    assert b"".join(pieces) == text
    assert all(1 <= len(piece) <= limit for piece in pieces)
    for piece in pieces[:-1]:
        # A piece ends in mid-line only where it is full and has no newline.
        assert piece.endswith(b"\n") or (len(piece) == limit and b"\n" not in piece)


@pytest.mark.parametrize(
    "text, limit, pieces",
    [
        (b"ab\n\ncd\nef", 6, [b"ab\n\n", b"cd\nef"]),
        (b"ab\n\ncd\nef", 8, [b"ab\n\n", b"cd\nef"]),
        (b"ab\r\n\r\ncd\r\nef", 10, [b"ab\r\n\r\n", b"cd\r\nef"]),
        (b"ab\ncd\nef", 7, [b"ab\ncd\n", b"ef"]),
        (b"abcdefgh", 3, [b"abc", b"def", b"gh"]),
        (b"a\n\nb\n\nc", 7, [b"a\n\nb\n\nc"]),
        (b"a\n\nb\n\nc", 6, [b"a\n\nb\n\n", b"c"]),
        (b"", 5, []),
    ],
)
def test_pieces_by_hand(text, limit, pieces):
    assert list(cut_text(io.BytesIO(text), limit)) == pieces


def test_pieces_of_a_text_longer_than_the_read_buffer():
    rng = random.Random(0)
    lines = []
    for i in range(400_000):
        words = bytes(rng.choices(b"abc \n", k=rng.randrange(1, 9)))
        lines.append(words + b"\n" if i % 7 == 0 else words)
    text = b"".join(lines)
    pieces = list(cut_text(io.BytesIO(text), 1000))
    assert len(text) > 1.5 * 2**20
    assert b"".join(pieces) == text
    assert max(map(len, pieces)) <= 1000
    assert sum(piece.endswith(b"\n\n") for piece in pieces) >= len(pieces) - 1


# ---- What a user is told


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"id": 1}\n', "'text' not found in .*a.jsonl line 3; its fields are: id"),
        ("a.jsonl", b'{"id": 1, "body": "y"}\n', "line 1; its fields are: body, id; pass --text_field NAME"),
        ("a.json", b'[{"text": "x"}, {"id": 1}]', "not found in .*a.json record 2; its fields are: id;"),
        ("a.parquet", parquet_bytes(body=["x"], id=[1]), "not found in .*a.parquet row 1; its fields are: body, id;"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "'text' in .* line 2 holds int, not text"),
        ("a.parquet", parquet_bytes(text=[1, 2]), "'text' in .* row 1 holds int, not text"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', "line 2 holds a list, not an object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is not JSON"),
        ("a.json", b'\n{"text": "x"}\n{"text": \n', "line 3 is not JSON"),
        ("a.json", b'[{"text": "x"}', "a.json is not JSON"),
        ("a.parquet", b"no parquet", "cannot read .*a.parquet"),
        ("a.csv", b"a,b", r"a.csv: its extension is none of .txt, .md, .jsonl, .json, .parquet"),
        ("a.txt", b"", "no documents from .*a.txt.* it holds no text"),
        ("a.json", b" \n", "no documents from .*a.json"),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n', "no documents from .*a.jsonl"),
        ("a.txt", b"one short text", "one document is too little .* lower max_document_bytes"),
        ("a.jsonl", json_lines(["same"] * 3), "3 equal documents are too little"),
    ],
)
def test_bad_input(tmp_path, opened, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        opened(path)
    assert list((tmp_path / "cache").glob("*")) == []


@pytest.mark.parametrize("compression", COMPRESSIONS[1:])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_damaged_compression_names_the_file(tmp_path, opened, compression, damage):
    path = write(tmp_path / f"a.txt{compression}", random.Random(0).randbytes(5000))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    else:
        path.write_bytes(b"this was never compressed")
    with pytest.raises(ValueError, match=rf"cannot read .*a.txt\{compression}.*damaged"):
        opened(path, max_document_bytes=100)


def test_large_json_array_is_refused(tmp_path, opened, monkeypatch):
    records = [{"text": text} for text in numbered(100)]
    pretty = json.dumps(records, indent=1).encode()
    single = json.dumps(records).encode()
    monkeypatch.setattr(blt.corpus, "WHOLE_JSON_BYTES", 1000)
    for content in (pretty, single):
        with pytest.raises(ValueError, match="over 1,000 bytes.*convert it to JSON lines"):
            opened(write(tmp_path / "a.json", content))
    # JSON lines are read as a stream, whatever their size.
    lines = json_lines(numbered(100))
    assert len(opened(write(tmp_path / "a.json", lines))) == 100


@pytest.mark.parametrize("name", ["no.txt", "in/no.jsonl.gz", "./no", "/no/x", "~/no-x", "a/b/c"])
def test_missing_file(opened, name):
    with pytest.raises(FileNotFoundError, match=f"{name} not found .*--dataset sample"):
        opened(name)


def test_missing_sample(opened, monkeypatch, tmp_path):
    monkeypatch.setattr(blt.corpus, "SAMPLE_PATH", tmp_path / "sample.jsonl.xz")
    message = "bundled sample .* is missing; restore it with: git checkout"
    with pytest.raises(FileNotFoundError, match=message):
        opened("sample")


def test_folder_without_text(tmp_path, opened):
    write(tmp_path / "in" / "a.csv", b"x")
    with pytest.raises(ValueError, match=r"no text in folder .*in: 1 files, none of them \.txt"):
        opened(tmp_path / "in")


@pytest.mark.parametrize("name", ["sampel", "", "owner/na me", "C:x"])
def test_unknown_dataset(opened, name):
    with pytest.raises(ValueError, match=f"unknown dataset {name!r}; use 'sample', .* OWNER/NAME"):
        opened(name)


@pytest.mark.parametrize(
    "setting, value, allowed",
    [
        ("max_bytes", 0, "at least 1"),
        ("max_documents", -1, "at least 1"),
        ("max_document_bytes", 0, "at least 1"),
        ("val_fraction", 0, "above 0 and at most 0.5"),
        ("val_fraction", 0.51, "above 0 and at most 0.5"),
        ("val_fraction", float("nan"), "above 0 and at most 0.5"),
    ],
)
def test_bad_settings(opened, setting, value, allowed):
    with pytest.raises(ValueError, match=f"{setting} is {value}; it must be {allowed}"):
        opened("sample", **{setting: value})


def test_subset_of_a_local_dataset(opened):
    with pytest.raises(ValueError, match="subset is 'x', but sample is a local dataset"):
        opened("sample", subset="x")


# ---- The hub, without a network


@pytest.fixture
def hub(monkeypatch):
    """Replace the hub by records; returns the list of load_dataset's arguments."""
    import datasets

    calls = []

    def use(records):
        def load_dataset(repo, subset, split, streaming):
            calls.append((repo, subset, split, streaming))
            if isinstance(records, Exception):
                raise records
            return iter(records)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(blt.corpus, "check_hub_answers", lambda: None)
        return calls

    return use


def test_hub_dataset(opened, hub):
    sent = []

    def send(text):
        sent.append(text)
        return {"text": text}

    # One stream for both calls of open_corpus: the second goes on where the first has stopped.
    calls = hub(map(send, numbered(100)))
    corpus = opened("owner/name:part", max_documents=10)
    assert contents(corpus) == [text.encode() for text in numbered(10)]
    assert calls == [("owner/name", "part", "train", True)]
    # No more records were fetched than are used.
    assert len(sent) == 10

    # The next ten, of 20 bytes each.
    opened("owner/name:other", max_bytes=200)
    assert calls.pop() == ("owner/name", "other", "train", True)
    assert len(sent) == 20

    # The same dataset under another spelling: its store is there.
    assert corpus.sources == ["owner/name:part"]
    same = opened("owner/name", subset="part", max_documents=10)
    assert contents(same) == contents(corpus)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="give only one of them"):
        opened("owner/name:part", subset="other", max_documents=10)


def test_hub_dataset_needs_a_limit(opened, hub):
    calls = hub([])
    with pytest.raises(
        ValueError, match="owner/name is not found here as a file .* Hugging Face dataset owner/name, .* --corpus_bytes"
    ):
        opened("owner/name")
    assert calls == []


@pytest.mark.parametrize(
    "raised, expected",
    [
        (ConnectionError("no route"), ConnectionError),
        (TimeoutError("no route"), ConnectionError),
        (FileNotFoundError("no route"), ValueError),
        (KeyError("no route"), ValueError),
    ],
)
def test_hub_failure_is_one_clear_error(opened, hub, raised, expected):
    hub(raised)
    message = "cannot read dataset owner/name .*no route.*check the name.*--dataset sample"
    with pytest.raises(expected, match=message):
        opened("owner/name", max_bytes=1000)


def test_hub_failure_in_mid_stream_leaves_no_store(tmp_path, opened, hub):
    def records():
        for text in numbered(5):
            yield {"text": text}
        raise ConnectionError("cable unplugged")

    hub(records())
    with pytest.raises(ConnectionError, match="cable unplugged"):
        opened("owner/name", max_bytes=1000)
    assert list((tmp_path / "cache").iterdir()) == []


def test_hub_record_without_the_field(opened, hub):
    hub([{"text": "a"}, {"body": "b"}])
    message = "^text field 'text' not found in owner/name record 2; its fields are: body"
    with pytest.raises(ValueError, match=message):
        opened("owner/name", max_bytes=1000)


def test_no_network_is_noticed_before_the_library_retries(opened, monkeypatch):
    import datasets
    import huggingface_hub.utils

    class NoNetwork:
        def head(self, url, timeout):
            assert timeout <= 10
            # Not a ConnectionError: httpx's errors are none either.
            raise RuntimeError("name not known")

    def load_dataset(*_, **__):
        pytest.fail("load_dataset was called")

    monkeypatch.setattr(huggingface_hub.utils, "get_session", NoNetwork)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = "owner/name.*no answer from http.*name not known.*--dataset sample"
    with pytest.raises(ConnectionError, match=message):
        opened("owner/name", max_bytes=1000)


# ---- Limits


@pytest.mark.parametrize(
    "max_bytes, count",
    [
        (40, 2),
        (59, 2),
        (60, 3),
        (61, 3),
        (199, 9),
        (200, 10),
        (10**9, 10),
    ],
)
def test_max_bytes_keeps_whole_documents(tmp_path, opened, max_bytes, count):
    path = write(tmp_path / "a.jsonl", json_lines(numbered(10)))
    corpus = opened(path, max_bytes=max_bytes)
    assert contents(corpus) == [text.encode() for text in numbered(count)]


def test_max_bytes_stops_at_the_first_that_does_not_fit(tmp_path, opened):
    path = write(tmp_path / "a.jsonl", json_lines(["aa", "bb", "cccccc", "d"]))
    assert contents(opened(path, max_bytes=7)) == [b"aa", b"bb"]
    with pytest.raises(ValueError, match="the first has 2 bytes, above the limit"):
        opened(path, max_bytes=1)


def test_max_documents(tmp_path, opened):
    path = write(tmp_path / "a.jsonl", json_lines(numbered(10)))
    texts = [text.encode() for text in numbered(4)]
    assert contents(opened(path, max_documents=4)) == texts
    assert contents(opened(path, max_documents=4, max_bytes=60)) == texts[:3]


def numbers_within(sizes, members, max_bytes):
    """The first members with at most max_bytes together, but at least one: one document at a time."""
    numbers = []
    total = 0
    for i in members:
        total += sizes[i]
        if numbers and total > max_bytes:
            break
        numbers.append(i)
    return numbers


def test_documents_of_a_split(tmp_path, opened):
    sizes = [random.Random(i).randrange(5, 200) for i in range(300)]
    texts = [f"{i} ".ljust(n) for i, n in enumerate(sizes)]
    corpus = opened(write(tmp_path / "a.jsonl", json_lines(texts)), val_fraction=0.3)
    members_of = {
        "train": np.flatnonzero(~corpus.is_validation).tolist(),
        "validation": np.flatnonzero(corpus.is_validation).tolist(),
        "all": list(range(300)),
    }
    for split, members in members_of.items():
        assert corpus.documents(split).tolist() == members
        assert corpus.documents(split).dtype == np.int64
        two = sum(sizes[i] for i in members[:2])
        every = sum(sizes[i] for i in members)
        for max_bytes in (1, two - 1, two, 500, every - 1, every, 10**9):
            expected = numbers_within(sizes, members, max_bytes)
            got = corpus.documents(split, max_bytes=max_bytes)
            assert got.tolist() == expected
            first_three = corpus.documents(split, max_bytes=max_bytes, max_documents=3)
            assert first_three.tolist() == expected[:3]
    assert 60 <= len(corpus.documents("validation")) <= 120
    with pytest.raises(ValueError, match="split is 'some'; it must be"):
        corpus.documents("some")
    with pytest.raises(ValueError, match="max_bytes is 0"):
        corpus.documents("all", max_bytes=0)
    with pytest.raises(IndexError, match="documents 0 to 299"):
        corpus.document(-1)


# ---- The split


def sides(corpus):
    """{document: whether it is on the validation side}."""
    return dict(zip(contents(corpus), corpus.is_validation.tolist()))


def test_split_does_not_depend_on_order_or_limits(tmp_path, opened):
    texts = numbered(400)
    other_order = random.Random(1).sample(texts, 400)
    whole = opened(write(tmp_path / "a.jsonl", json_lines(texts)), val_fraction=0.2)
    shuffled = opened(write(tmp_path / "b.jsonl", json_lines(other_order)), val_fraction=0.2)
    part = opened(tmp_path / "a.jsonl", val_fraction=0.2, max_documents=100)
    larger = opened(tmp_path / "a.jsonl", val_fraction=0.4)
    assert contents(whole) != contents(shuffled)
    assert sides(whole) == sides(shuffled)
    assert sides(part).items() <= sides(whole).items()
    assert sum(sides(whole).values()) < sum(sides(larger).values())
    in_larger = sides(larger)
    assert all(in_larger[document] for document, side in sides(whole).items() if side)
    assert whole.hash != shuffled.hash


def test_split_is_the_documented_hash(tmp_path, opened):
    corpus = opened(write(tmp_path / "a.jsonl", json_lines(numbered(400))), val_fraction=0.2)
    for document, side in sides(corpus).items():
        number = int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "little") / 2**64
        assert side == (number < 0.2)


def test_equal_documents_are_on_one_side(tmp_path, opened):
    texts = random.Random(2).choices(numbered(50), k=500)
    corpus = opened(write(tmp_path / "a.jsonl", json_lines(texts)), val_fraction=0.3)
    train = set(contents(corpus, corpus.documents("train")))
    validation = set(contents(corpus, corpus.documents("validation")))
    assert train and validation and not train & validation
    assert len(corpus) == 500


def test_no_side_is_empty():
    hashes = np.array([9, 5, 7, 5], np.uint64) << np.uint64(56)  # 0.035, 0.020, 0.027, 0.020
    assert split_off(hashes, 0.03).tolist() == [False, True, True, True]
    assert split_off(hashes, 0.01).tolist() == [False, True, False, True]
    assert split_off(hashes, 0.50).tolist() == [False, True, True, True]
    assert split_off(np.array([2**64 - 1, 2**64 - 2], np.uint64), 0.5).tolist() == [False, True]


# ---- The store


def test_store_and_manifest(tmp_path, opened):
    texts = [text.encode() for text in numbered(50)]
    corpus = opened(write(tmp_path / "a.jsonl", json_lines(numbered(50))))
    manifest = corpus.manifest
    assert len(corpus) == manifest["documents"] == 50
    assert corpus.bytes.tobytes() == b"".join(texts)
    assert manifest["bytes"] == 1000
    assert isinstance(corpus.bytes, np.memmap)
    assert corpus.bytes.dtype == np.uint8
    assert corpus.offsets.tolist() == list(range(0, 1001, 20))
    assert corpus.offsets.dtype == np.int64
    assert corpus.is_validation.dtype == bool

    n_validation = corpus.is_validation.sum()
    assert manifest["validation_documents"] == n_validation == manifest["validation_bytes"] / 20
    assert manifest["train_documents"] == 50 - n_validation == manifest["train_bytes"] / 20
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(text).to_bytes(8, "little") + text)
    assert corpus.hash == digest.hexdigest()
    assert manifest["text_field"] == "text"
    assert manifest["val_fraction"] == 0.03
    assert np.shares_memory(corpus.document(3), corpus.bytes)
    with pytest.raises(ValueError, match="read-only"):
        corpus.document(0)[0] = 0
    assert contents(Corpus(corpus.folder)) == texts


def test_hash_sees_where_documents_end(tmp_path, opened):
    one = opened(write(tmp_path / "a.jsonl", json_lines(["ab", "c"])))
    other = opened(write(tmp_path / "b.jsonl", json_lines(["a", "bc"])))
    assert one.bytes.tobytes() == other.bytes.tobytes()
    assert one.hash != other.hash


def test_store_is_reused_and_rebuilt_after_a_change(tmp_path, opened, capsys):
    path = write(tmp_path / "a.jsonl", json_lines(["a", "b"]))
    first = opened(path)
    out, err = capsys.readouterr()
    # No progress bar where stderr is not a terminal.
    assert err == ""
    first_line, second_line = out.splitlines()
    assert first_line.startswith("building ")
    documents = r"built .*: 2 documents, 2 bytes \(train 1, validation 1\)"
    assert re.search(documents + r" in [\d.]+ s, [\d.]+ MB/s", second_line)
    assert opened(path).folder == first.folder
    assert capsys.readouterr().out == ""

    # As long as before; only the time tells.
    path.write_bytes(json_lines(["a", "c"]))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert contents(opened(path)) == [b"a", b"c"]
    # The older store is left alone.
    assert contents(Corpus(first.folder)) == [b"a", b"b"]

    # As old as before; only the size tells.
    time_ns = path.stat().st_mtime_ns
    path.write_bytes(json_lines(["a", "longer"]))
    os.utime(path, ns=(0, time_ns))
    assert contents(opened(path)) == [b"a", b"longer"]


@pytest.mark.parametrize(
    "change",
    [
        {"max_bytes": 60},
        {"max_documents": 5},
        {"val_fraction": 0.2},
        {"max_document_bytes": 7},
        {"text_field": "b"},
    ],
)
def test_every_setting_has_its_own_store(tmp_path, opened, change):
    path = write(tmp_path / "a.jsonl", json_lines(numbered(10), b="x").replace(b'"x"', b'"y"', 1))
    assert opened(path).folder != opened(path, **change).folder


def test_interrupted_build_leaves_nothing(tmp_path, opened, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    path = write(tmp_path / "a.jsonl", json_lines(numbered(10)))
    monkeypatch.setattr(blt.corpus, "split_off", interrupt)
    with pytest.raises(KeyboardInterrupt):
        opened(path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_killed_build_does_not_break_the_next(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines(numbered(10)))
    cache = tmp_path / "cache"
    code = [
        "import os, sys",
        "from blt import corpus",
        "corpus.split_off = lambda *_: os._exit(9)",
        "corpus.open_corpus(sys.argv[1], cache_dir=sys.argv[2])",
    ]
    command = [sys.executable, "-c", "\n".join(code), path, cache]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 9
    (stale,) = cache.iterdir()
    assert ".partial-" in stale.name
    assert len(open_corpus(path, cache_dir=cache)) == 10


def test_two_builds_at_once(tmp_path, opened, monkeypatch):
    path = write(tmp_path / "a.jsonl", json_lines(numbered(10)))
    really_split = blt.corpus.split_off

    def build_the_same_store_first(*arguments):
        monkeypatch.setattr(blt.corpus, "split_off", really_split)
        opened(path)
        return really_split(*arguments)

    monkeypatch.setattr(blt.corpus, "split_off", build_the_same_store_first)
    assert len(opened(path)) == 10
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("file", blt.corpus.STORE_FILES)
def test_truncated_store_is_refused(tmp_path, opened, file):
    path = write(tmp_path / "a.jsonl", json_lines(numbered(10)))
    folder = opened(path).folder
    size = (folder / file).stat().st_size
    os.truncate(folder / file, size - 1)
    message = rf"{folder} is damaged \({file} has {size - 1} bytes, not {size}\); delete"
    with pytest.raises(ValueError, match=message):
        opened(path)
    (folder / file).unlink()
    with pytest.raises(ValueError, match=f"is damaged .*{file}.*delete that folder"):
        opened(path)


@pytest.mark.parametrize("manifest", [None, "", "{}", '{"bytes": 1'])
def test_broken_manifest_is_refused(tmp_path, opened, manifest):
    path = write(tmp_path / "a.jsonl", json_lines(numbered(10)))
    file = opened(path).folder / "manifest.json"
    if manifest is None:
        file.unlink()
    else:
        file.write_text(manifest)
    with pytest.raises(ValueError, match="is damaged .*delete that folder"):
        opened(path)


def test_unwritable_cache(tmp_path, opened):
    path = write(tmp_path / "a.jsonl", json_lines(numbered(10)))
    write(tmp_path / "file", b"")
    with pytest.raises(OSError, match="cannot write .*file/cache/.*pass --data_cache") as caught:
        opened(path, cache_dir=tmp_path / "file" / "cache")
    assert "\n" not in str(caught.value)


def test_full_disk(tmp_path, opened, monkeypatch):
    def save(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(OSError, match="cannot write .*No space left on device.*pass --data_cache"):
        opened(write(tmp_path / "a.jsonl", json_lines(numbered(10))))
    assert list((tmp_path / "cache").iterdir()) == []


def write_large_corpus(path, size):
    """Write documents of 4000 bytes, `size` bytes in all, in the format of the path's extension."""
    if path.suffix == ".parquet":
        # Random text hardly compresses, so reading it ahead would show.
        random_text = random.Random(0).randbytes(size // 2).hex()
        texts = [random_text[start : start + 4000] for start in range(0, size, 4000)]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=2000)
        return
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "wb") as file:
        for text in numbered(size // 4000, size=4000):
            if path.suffix == ".txt":
                file.write(text[:-1].encode() + b"\n")
            else:
                file.write(json_lines([text]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.jsonl.gz", "a.parquet"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, opened, name):
    path = tmp_path / name
    size = 40_000_000
    write_large_corpus(path, size)
    # Not the process's peak RSS: a child inherits its parent's, which would hide a smaller growth.
    tracemalloc.start()
    corpus = opened(path, max_document_bytes=4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(corpus.bytes) == size
    assert len(corpus) == size // 4000
    assert peak < 8e6


def test_import_is_light():
    """--help must stay fast, so slow packages are imported where they are needed."""
    code = [
        "import sys",
        "import blt.corpus",
        "print({'pyarrow', 'datasets', 'huggingface_hub'} & set(sys.modules))",
    ]
    command = [sys.executable, "-c", "\n".join(code)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
    assert run.stderr == ""


# ---- The bundled sample


def test_sample(opened):
    corpus = opened("sample")
    assert len(corpus) == 13_770
    assert len(corpus.bytes) == 23_519_366
    assert 0.02 < corpus.manifest["validation_bytes"] / len(corpus.bytes) < 0.04
    assert corpus.hash.startswith("edabf000362529a8")
    names = ["austen", "moby-dick", "state-of-the-union", "wikibooks-recipes", "wikipedia-en"]
    assert sorted(corpus.sources) == names
    train = set(contents(corpus, corpus.documents("train")))
    validation = set(contents(corpus, corpus.documents("validation")))
    assert not validation & train
    licences = (ROOT / "data" / "LICENSES.md").read_text()
    counts = np.bincount(corpus.source_ids)
    sizes = np.bincount(corpus.source_ids, np.diff(corpus.offsets))
    for source, documents, size in zip(corpus.sources, counts, sizes):
        assert f"| `{source}` | {documents:,} | {size:,.0f} |" in licences
