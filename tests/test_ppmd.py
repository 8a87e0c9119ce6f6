"""PPMd as a baseline: it has read the model's own training text, exactly, and the numbers say how."""

import json
import sys

import numpy as np
import pyppmd
import pytest
from helpers import edit_record, output_of, some_words

from blt import metric, ppmd
from blt.corpus import open_corpus
from blt.records import RunRecord
from complete_entropy_workflow import markdown_table

TRAINING = [some_words(40, seed) for seed in range(30)]
HELD_OUT = [some_words(60, 100 + seed) for seed in range(5)]


def size(text, order):
    """Bytes of a text that PPMd has compressed as a whole: written down without blt/ppmd.py."""
    encoder = pyppmd.Ppmd8Encoder(order, 64 << 20, restore_method=1)
    return len(encoder.encode(text) + encoder.flush())


def lines(documents):
    return b"".join(document + b"\n" for document in documents)


def close_to(size_in_bytes, documents, slack=2):
    """Bits per byte, give or take the bytes that a coder has not yet written at the end of a text."""
    raw_bytes = sum(map(len, documents))
    return pytest.approx(8 * size_in_bytes / raw_bytes, abs=8 * slack / raw_bytes)


def test_the_number_is_what_held_out_text_adds_to_the_compressed_training_text():
    facts = ppmd.ppmd_bpb(TRAINING, HELD_OUT)
    order = facts["order"]
    added = size(lines(TRAINING) + lines(HELD_OUT), order) - size(lines(TRAINING), order)
    assert facts["bpb"] == close_to(added, HELD_OUT)
    # Compressors without the training text need much more.
    assert facts["bpb"] < 0.8 * close_to(size(lines(HELD_OUT), order), HELD_OUT).expected


def test_documents_alone_cost_what_each_adds_to_the_training_text():
    facts = ppmd.ppmd_bpb(TRAINING, HELD_OUT, alone=99)
    order = facts["order"]
    before = size(lines(TRAINING), order)
    added = sum(size(lines(TRAINING) + lines([document]), order) - before for document in HELD_OUT)
    assert facts["alone_bpb"] == close_to(added, HELD_OUT, slack=2 * len(HELD_OUT))
    assert (facts["alone_documents"], facts["alone_bytes"]) == (5, sum(map(len, HELD_OUT)))
    # The copies that were measured have not changed the encoder.
    assert facts["bpb"] == ppmd.ppmd_bpb(TRAINING, HELD_OUT)["bpb"]


def test_it_learns_on_while_it_reads():
    """A document that comes twice costs little the second time, and as much as before when it is scored alone."""
    twice = [np.random.default_rng(0).bytes(2000)] * 2
    facts = ppmd.ppmd_bpb(TRAINING, twice, alone=2)
    assert facts["alone_bpb"] > 1.8 * facts["bpb"]


def test_a_sample_of_documents_is_drawn_by_its_seed():
    documents = [some_words(n, n) for n in range(10, 30)]
    some = [ppmd.ppmd_bpb(TRAINING, documents, alone=4, seed=seed) for seed in (1, 1, 2)]
    assert some[0] == some[1] != some[2]
    assert some[0]["alone_documents"] == 4 and some[0]["documents"] == 20


def test_another_training_text_gives_another_number():
    other = [np.random.default_rng(1).bytes(200) for _ in range(30)]
    right = ppmd.ppmd_bpb(TRAINING, HELD_OUT)["bpb"]
    assert ppmd.ppmd_bpb(other, HELD_OUT)["bpb"] > right + 0.3
    assert ppmd.ppmd_bpb(TRAINING[:3], HELD_OUT)["bpb"] > right + 0.05


def test_the_order_is_chosen_on_the_training_text():
    """Long contexts pay only where the end of the training text repeats what was before it."""
    noise = np.random.default_rng(2).bytes(3000)
    repeats = ppmd.ppmd_bpb([noise, noise, noise], [b"a"])
    words = ppmd.ppmd_bpb(TRAINING, [noise])
    for facts in (repeats, words):
        assert list(facts["choice"]) == ["6", "8", "12", "16"]
        assert facts["order"] == int(min(facts["choice"], key=facts["choice"].get))
        # The held-out text has no part in it.
    assert words["choice"] == ppmd.ppmd_bpb(TRAINING, HELD_OUT)["choice"]
    text = lines(TRAINING)
    tail = len(text) // 10
    added = size(text, 6) - size(text[:-tail], 6)
    assert words["choice"]["6"] == pytest.approx(8 * added / tail, abs=16 / tail)


def test_memory_grows_with_the_text(monkeypatch):
    monkeypatch.setattr(ppmd.os, "sysconf", {"SC_PHYS_PAGES": 64 << 18, "SC_PAGE_SIZE": 4096}.get)
    sizes = [ppmd.memory_for(n) for n in (1, 8_000_000, 9_000_000, 22_779_721, 64_000_000, 10**12)]
    assert sizes == [256, 256, 512, 768, 2048, 2048]
    monkeypatch.setattr(ppmd.os, "sysconf", {"SC_PHYS_PAGES": 1 << 18, "SC_PAGE_SIZE": 4096}.get)
    assert ppmd.memory_for(64_000_000) == 512


def test_texts_without_a_byte_are_refused():
    with pytest.raises(ValueError, match="at least one byte"):
        ppmd.ppmd_bpb(TRAINING, [b"", b""])
    with pytest.raises(ValueError, match="at least one byte"):
        ppmd.ppmd_bpb([], HELD_OUT)


# With a corpus


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text.decode()}) for text in TRAINING))
    return open_corpus(str(tmp_path / "text.jsonl"), cache_dir=tmp_path / "stores", val_fraction=0.2)


def test_it_reads_exactly_the_documents_of_the_run(corpus):
    train = corpus.documents("train", 2000)
    validation = [corpus.document(number) for number in corpus.documents("validation")]
    facts = metric.ppmd_after_training(corpus, train, validation)
    training = [corpus.document(number).tobytes() for number in train]
    assert facts["training_bytes"] == facts["primed_bytes"] == sum(map(len, training)) <= 2000
    held_out = [document.tobytes() for document in validation]
    assert facts["bpb"] == ppmd.ppmd_bpb(training, held_out)["bpb"]
    everything = metric.ppmd_after_training(corpus, corpus.documents("train"), validation)
    assert everything["bpb"] < facts["bpb"]


@pytest.mark.parametrize("limit", [1, 150, 1000])
def test_of_a_long_text_the_end_is_read_and_the_label_says_so(corpus, monkeypatch, limit):
    monkeypatch.setattr(ppmd, "PRIMING_BYTES", limit)
    read = []
    monkeypatch.setattr(ppmd, "ppmd_bpb", lambda training, *others: read.append(training) or {"bpb": 1.5})
    train = corpus.documents("train")
    facts = metric.ppmd_after_training(corpus, train, [np.frombuffer(b"abc", np.uint8)])
    whole = b"".join(corpus.document(number).tobytes() for number in train)
    assert b"".join(read[0]) == whole[-limit:]
    assert (facts["primed_bytes"], facts["training_bytes"]) == (limit, len(whole))
    shown = metric.ppmd_cell(facts | {"order": 12, "memory_mb": 2048})
    assert shown == f"PPMd order 12, 2,048 MB, after the last {limit:,} bytes of the same training text 1.500"


FOUND = {
    "untrained": {"gzip -9": 3.2531, "xz -9": 2.9239},
    "ppmd": {"order": 12, "memory_mb": 256, "bpb": 1.8891, "primed_bytes": 9, "training_bytes": 9},
}
WITHOUT = FOUND | {"ppmd": None}


def test_the_footer_names_what_each_compressor_has_read():
    result = {"val_bpb": 1.9882, "val_bytes": 150962, "val_accuracy": 0.59, "baselines": FOUND}
    assert metric.result_line(result) == (
        "val 1.9882 bpb over 150,962 bytes of held-out text (accuracy 59.0%); the same bytes by "
        "PPMd order 12, 256 MB, after the same training text 1.889; untrained: gzip -9 3.253, xz -9 2.924"
    )
    assert "PPMd: pip install pyppmd; untrained: gzip" in metric.result_line(result | {"baselines": WITHOUT})


def test_the_table_of_the_workflow_has_the_compressors():
    row = {"method": "space", "avg_patch_size": 5.0, "val_bpb": 2.0, "bytes_per_second": 1e4, "trained_bytes": 10**6}
    table = markdown_table([row | {"baselines": FOUND}], 1).splitlines()
    assert table[3] == "| PPMd order 12, 256 MB, after the same training text | | 1.8891 | no seed | | |"
    assert table[4] == "| gzip -9, untrained | | 3.2531 | no seed | | |"
    assert markdown_table([row | {"baselines": WITHOUT}], 1).splitlines()[3] == "| PPMd: pip install pyppmd | | | | | |"


def test_without_the_package_the_number_is_not_left_out_silently(corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyppmd", None)
    assert metric.ppmd_after_training(corpus, corpus.documents("train"), [corpus.document(0)]) is None


# In the scripts


def test_training_keeps_the_number_and_evaluate_finds_the_training_text(pipeline, pipeline_copy, monkeypatch):
    _, printed = pipeline
    record = RunRecord.load(pipeline_copy / "checkpoints" / "model.json")
    facts = record.result["baselines"]["ppmd"]
    corpus = open_corpus("sample", cache_dir=pipeline_copy / "data_cache")
    train = corpus.documents("train", 60_000)
    validation = [corpus.document(number) for number in corpus.documents("validation", 20_000)]
    assert facts == metric.ppmd_after_training(corpus, train, validation)
    for script in ("entropy_llm", "llm"):
        assert f"the same bytes by {metric.ppmd_cell(facts)}; untrained: gzip -9" in printed[script]

    # A model whose training text is gone, and the same package missing: both are said.
    edit_record(pipeline_copy / "entropy_model.json", lambda values: values["corpus"].update(sha256="0" * 64))
    flags = "--model checkpoints entropy_model.pth --val_bytes 20000 --robustness_bytes 0 --samples 0".split()
    shown = output_of(pipeline_copy, "evaluate", *flags)
    card = json.loads((pipeline_copy / "evaluation" / "card.json").read_text())
    assert card["models"][0]["ppmd"]["bpb"] == facts["bpb"]
    assert f"after the same training text (checkpoints) {facts['bpb']:.4f}" in shown
    assert f"alone: {card['models'][0]['ppmd']['alone_bpb']:.4f} (all {len(validation)} documents)" in shown
    assert "PPMd (entropy_model.pth): no training text of entropy_model.pth: sample is another text now" in shown
    assert "untrained: gzip -9" in shown
    monkeypatch.setitem(sys.modules, "pyppmd", None)
    assert "PPMd: pip install pyppmd" in output_of(pipeline_copy, "evaluate", *flags)


# Real texts


def test_the_demos_text_has_the_known_numbers(tmp_path, monkeypatch):
    """2.2 MB of the sample, then its 150,962 held-out bytes. Variant H has 1.928, 1.897 and 1.894, variant I less."""
    corpus = open_corpus("sample", cache_dir=tmp_path)
    train = corpus.documents("train", 2_200_000)
    validation = [corpus.document(number) for number in corpus.documents("validation", 200_000)]
    assert sum(map(len, validation)) == 150_962
    for order, expected in ((6, 1.9277), (8, 1.8949), (12, 1.8891)):
        monkeypatch.setattr(ppmd, "ORDERS", (order,))
        ppmd._choice.cache_clear()
        facts = metric.ppmd_after_training(corpus, train, validation)
        assert facts["order"] == order
        assert facts["bpb"] == pytest.approx(expected, abs=1e-3)
    ppmd._choice.cache_clear()
