"""Named splits: a validation text of its own, and ready-made datasets; and how they go through the scripts."""

import hashlib
import json
import lzma
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from helpers import BLT_FLAGS, ENTROPY_FLAGS, ROOT, error_of, output_of, random_bytes, some_words

import blt.corpus
import complete_entropy_workflow
from blt import metric, ppmd
from blt.config import next_command, parse_config
from blt.corpus import DataConfig, check_store, open_corpus
from blt.metric import bits_per_byte, evaluate
from blt.records import RunRecord
from blt.rows import evaluation_batches
from blt.splits import STANDARD_SPLITS
from complete_entropy_workflow import WorkflowConfig
from llm import LLMConfig
from template_llm import FlatByteTransformer, FlatConfig


def write_records(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(corpus, split):
    return [corpus.document(number).tobytes().decode() for number in corpus.documents(split)]


@pytest.fixture
def opened(tmp_path):
    """open_corpus with a cache of its own."""
    return lambda dataset, **settings: open_corpus(dataset, cache_dir=tmp_path / "cache", **settings)


# ---- --val_dataset


@pytest.fixture
def two_files(tmp_path):
    """40 training and 5 validation texts; two of the latter are in the training text as well."""
    training = [f"training {i} " + "x" * i for i in range(40)]
    validation = ["held out 0", training[3], "held out 1", training[30], "held out 2"]
    write_records(tmp_path / "train.jsonl", training)
    write_records(tmp_path / "val.jsonl", validation)
    return training, validation


def test_a_validation_dataset_leaves_all_of_the_other_for_training(tmp_path, opened, two_files, capsys):
    training, validation = two_files
    corpus = opened(tmp_path / "train.jsonl", val_dataset=tmp_path / "val.jsonl")
    assert texts_of(corpus, "train") == training
    assert texts_of(corpus, "validation") == validation
    assert texts_of(corpus, "all") == training + validation
    assert corpus.sources == ["train.jsonl", "val.jsonl"]
    equal_bytes = len(training[3]) + len(training[30])
    assert (corpus.manifest["equal_documents"], corpus.manifest["equal_bytes"]) == (2, equal_bytes)
    (line,) = corpus.notes(10**6, 10**6)
    assert line == (
        f"named split: 40 documents for training, 5 for validation; 2 of them ({equal_bytes} bytes) are in the "
        "training text, too"
    )
    check_store(corpus.folder)
    # A second opening finds the store.
    capsys.readouterr()
    assert opened(tmp_path / "train.jsonl", val_dataset=tmp_path / "val.jsonl").hash == corpus.hash
    assert capsys.readouterr().out == ""


def test_no_equal_documents(tmp_path, opened, two_files):
    write_records(tmp_path / "new.jsonl", ["a", "a"])
    corpus = opened(tmp_path / "train.jsonl", val_dataset=tmp_path / "new.jsonl")
    assert corpus.notes() == [
        "named split: 40 documents for training, 2 for validation; none of them is in the training text, too"
    ]
    assert corpus.manifest["equal_documents"] == 0


def test_the_hash_covers_both_texts_and_the_split(tmp_path, opened):
    """A cache or checkpoint of one split is refused by another, though the documents are the same."""
    write_records(tmp_path / "ab.jsonl", ["a", "b"])
    write_records(tmp_path / "abc.jsonl", ["a", "b", "c"])
    write_records(tmp_path / "bc.jsonl", ["b", "c"])
    write_records(tmp_path / "a.jsonl", ["a"])
    write_records(tmp_path / "c.jsonl", ["c"])
    write_records(tmp_path / "d.jsonl", ["d"])
    named = [("ab", "c"), ("a", "bc"), ("ab", "d")]
    corpora = [opened(tmp_path / f"{a}.jsonl", val_dataset=tmp_path / f"{b}.jsonl") for a, b in named]
    corpora.append(opened(tmp_path / "abc.jsonl"))
    assert len({corpus.hash for corpus in corpora}) == 4
    assert [bytes(corpus.bytes) for corpus in corpora] == [b"abc", b"abc", b"abd", b"abc"]


def test_a_damaged_split_is_noticed(tmp_path, opened, two_files):
    corpus = opened(tmp_path / "train.jsonl", val_dataset=tmp_path / "val.jsonl")
    path = corpus.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["parts"] = {"train": 39, "validation": 6}
    manifest["manifest_sha256"] = blt.corpus.manifest_hash(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="damaged"):
        opened(tmp_path / "train.jsonl", val_dataset=tmp_path / "val.jsonl")


def test_limits_hold_for_each_dataset(tmp_path, opened, two_files):
    training, validation = two_files
    limit = len(training[0]) + len(training[1])
    corpus = opened(tmp_path / "train.jsonl", val_dataset=tmp_path / "val.jsonl", max_bytes=limit)
    assert texts_of(corpus, "train") == training[:2]
    assert texts_of(corpus, "validation") == validation[:1]
    with pytest.raises(ValueError, match="no documents for training from .*above the limit of 5"):
        opened(tmp_path / "train.jsonl", val_dataset=tmp_path / "val.jsonl", max_bytes=5)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="no documents for validation from .*holds no text"):
        opened(tmp_path / "train.jsonl", val_dataset=tmp_path / "empty.txt")


def test_one_training_document_is_enough_with_a_validation_dataset(tmp_path, opened):
    """Without it, a corpus of one document is refused: there is nothing to hold out."""
    write_records(tmp_path / "one.jsonl", ["one"])
    with pytest.raises(ValueError, match="too little"):
        opened(tmp_path / "one.jsonl")
    assert len(opened(tmp_path / "one.jsonl", val_dataset="sample").documents("validation")) == 13_770


def test_a_validation_dataset_of_the_hub_needs_a_limit(tmp_path, opened, two_files):
    with pytest.raises(ValueError, match="owner/name is not found here.*--corpus_bytes"):
        opened(tmp_path / "train.jsonl", val_dataset="owner/name")
    with pytest.raises(FileNotFoundError, match="no.txt not found"):
        opened(tmp_path / "train.jsonl", val_dataset="no.txt")


# ---- Ready-made datasets


def test_shakespeare_is_split_as_in_nanogpt(opened):
    text = lzma.decompress((ROOT / "data" / "shakespeare.txt.xz").read_bytes())
    assert len(text) == 1_115_394 and text.isascii()
    first = int(len(text) * 0.9)
    corpus = opened("shakespeare")
    assert [corpus.documents(split).tolist() for split in ("train", "validation")] == [[0], [1]]
    assert corpus.document(0).tobytes() == text[:first]
    assert corpus.document(1).tobytes() == text[first:]
    assert (first, len(text) - first) == (1_003_854, 111_540)
    assert corpus.sources == ["shakespeare"]
    with pytest.raises(ValueError, match="shakespeare has no test part; only enwik8 and text8"):
        corpus.documents("test")


def test_ppmd_on_shakespeare(opened, monkeypatch):
    """Order 6 after the first 90%: 2.029 bits per byte with variant H, slightly less with variant I."""
    corpus = opened("shakespeare")
    facts = metric.ppmd_after_training(corpus, corpus.documents("train"), [corpus.document(1)])
    assert facts["order"] == 6
    assert facts["bpb"] == pytest.approx(2.026, abs=2e-3)
    assert (facts["primed_bytes"], facts["memory_mb"]) == (1_003_854, 256)


def test_limits_smaller_than_the_only_document_are_said_to_be(opened):
    corpus = opened("shakespeare")
    assert corpus.documents("validation", 1000).tolist() == [1]
    assert corpus.notes(2_200_000, 200_000)[1:] == []
    assert corpus.notes(1_000_000, 100_000)[1:] == [
        "note: max_bytes is 1,000,000, but the first train document has 1,003,854 bytes: all are used",
        "note: val_bytes is 100,000, but the first validation document has 111,540 bytes: all are used",
    ]


def test_windows_of_a_long_document_score_each_byte_once(opened):
    document = opened("shakespeare").document(1)
    batches = list(evaluation_batches([document], row_bytes=2048))
    assert sum(batch.bytes for batch in batches) == len(document)
    assert sum(batch.targets for batch in batches) == len(document) + 1
    model = FlatByteTransformer(FlatConfig(dim=32, n_layers=1, n_heads=2, window=16)).eval()
    scored = evaluate(model, list(evaluation_batches([document[:9000]], row_bytes=512)), "cpu")
    assert scored["val_bytes"] == 9000
    assert scored["val_bpb"] == pytest.approx(bits_per_byte(model, None, [document[:9000]], 512), rel=1e-6)


SMALL = {"train": 900, "validation": 50, "test": 50}
TEXT = b"".join(b"%d.\n" % number for number in range(1000))[:1000]


@pytest.fixture
def small_enwik8(monkeypatch):
    """enwik8 of 1,000 bytes, in the same proportions."""
    small = replace(STANDARD_SPLITS["enwik8"], sizes=SMALL, md5=hashlib.md5(TEXT).hexdigest())
    monkeypatch.setitem(STANDARD_SPLITS, "enwik8", small)


def zipped(path, **files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_enwik8_is_split_by_position(tmp_path, opened, small_enwik8):
    (tmp_path / "enwik8").write_bytes(TEXT)
    corpus = opened(f"enwik8={tmp_path / 'enwik8'}", max_document_bytes=100)
    parts = [corpus.documents(split) for split in ("train", "validation", "test")]
    texts = [b"".join(corpus.document(number).tobytes() for number in part) for part in parts]
    assert texts == [TEXT[:900], TEXT[900:950], TEXT[950:]]
    assert len(parts[0]) > 9 and all(len(corpus.document(number)) <= 100 for number in parts[0])
    assert np.concatenate(parts).tolist() == list(range(len(corpus)))
    # The test takes no part in anything that does not ask for it by name.
    assert corpus.documents("all").tolist() == [*parts[0], *parts[1]]
    assert not set(parts[2]) & {*parts[0], *parts[1]}
    manifest = corpus.manifest
    assert (manifest["train_bytes"], manifest["validation_bytes"], manifest["bytes"]) == (900, 50, 1000)
    check_store(corpus.folder)


def test_enwik8_as_a_zip_or_compressed_or_in_the_working_folder(tmp_path, opened, small_enwik8, monkeypatch):
    (tmp_path / "enwik8").write_bytes(TEXT)
    plain = opened(f"enwik8={tmp_path / 'enwik8'}")
    zipped(tmp_path / "my.zip", enwik8=TEXT)
    (tmp_path / "my.xz").write_bytes(lzma.compress(TEXT))
    for name in ("my.zip", "my.xz"):
        assert opened(f"enwik8={tmp_path / name}").hash == plain.hash
    monkeypatch.chdir(tmp_path)
    assert opened("enwik8").hash == plain.hash
    (tmp_path / "enwik8").unlink()
    (tmp_path / "my.zip").rename(tmp_path / "enwik8.zip")
    assert opened("enwik8").hash == plain.hash


def test_a_file_of_another_size_is_not_enwik8(tmp_path, opened):
    """The real sizes: 100,000,000 bytes and no others."""
    assert STANDARD_SPLITS["text8"].sizes == {"train": 90_000_000, "validation": 5_000_000, "test": 5_000_000}
    path = tmp_path / "enwik8.txt"
    path.write_bytes(TEXT)
    with pytest.raises(ValueError, match="enwik8.txt is not enwik8: it has 1,000 bytes, .* exactly 100,000,000; .*zip"):
        opened(f"enwik8={path}")
    with open(path, "wb") as file:
        file.truncate(100_000_001)
    with pytest.raises(ValueError, match="is not text8: it has more bytes, and text8 has exactly 100,000,000"):
        opened(f"text8={path}")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_of_the_right_size_and_another_content_is_not_enwik8(tmp_path, opened, small_enwik8):
    """text8 and enwik8 have equally many bytes."""
    (tmp_path / "text8").write_bytes(TEXT[::-1])
    with pytest.raises(ValueError, match="is not enwik8: it has the right size but another content"):
        opened(f"enwik8={tmp_path / 'text8'}")
    assert STANDARD_SPLITS["enwik8"].md5 != STANDARD_SPLITS["text8"].md5


@pytest.mark.slow
def test_enwik8_of_its_real_size(tmp_path, opened, monkeypatch):
    monkeypatch.setitem(STANDARD_SPLITS, "enwik8", replace(STANDARD_SPLITS["enwik8"], md5=None))
    path = tmp_path / "enwik8"
    path.write_bytes(np.tile(random_bytes(1_000_000), 100).tobytes())
    corpus = opened(f"enwik8={path}")
    lengths = np.diff(corpus.offsets)
    sizes = [int(lengths[corpus.documents(split)].sum()) for split in ("train", "validation", "test")]
    assert sizes == [90_000_000, 5_000_000, 5_000_000]


def test_mistakes_with_ready_made_datasets(tmp_path, opened, small_enwik8, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="enwik8 is not bundled, .* download https.*--dataset enwik8=FILE"):
        opened("enwik8")
    with pytest.raises(FileNotFoundError, match="no.zip not found"):
        opened("enwik8=./no.zip")
    with pytest.raises(ValueError, match="it is no file; pass --dataset enwik8=FILE"):
        opened(f"enwik8={tmp_path}")
    with pytest.raises(ValueError, match="shakespeare is bundled; write --dataset shakespeare"):
        opened("shakespeare=mine.txt")
    with pytest.raises(ValueError, match="enwik8 is stored as a whole; leave out --corpus_bytes"):
        opened("enwik8=x", max_bytes=10)
    for names in (("shakespeare", "sample"), ("sample", "shakespeare")):
        with pytest.raises(ValueError, match="shakespeare has a validation text of its own; leave out --val_dataset"):
            opened(names[0], val_dataset=names[1])
    zipped(tmp_path / "two.zip", a=TEXT, b=TEXT)
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    for name, reason in (("two.zip", "it holds 2 files, not one"), ("bad.zip", "File is not a zip file")):
        with pytest.raises(ValueError, match=f"cannot read .*{name}: {reason}"):
            opened(f"enwik8={name}")


def test_enwik8_from_the_hub(opened, small_enwik8, monkeypatch):
    """The records of all splits, joined, must give the text back."""
    import datasets

    pieces = {"test": TEXT[950:], "train": TEXT[:900], "validation": TEXT[900:950]}
    monkeypatch.setattr(blt.corpus, "check_hub_answers", lambda: None)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda repo, subset: list(pieces))

    def load_dataset(repo, subset, split, streaming):
        assert repo in ("owner/name", "owner/copy") and (subset, streaming) == ("raw", True)
        yield {"text": pieces[split].decode()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = opened("enwik8=owner/name:raw")
    # Another id is another text, whatever the name of the dataset says.
    assert corpus.folder != opened("enwik8=owner/copy:raw").folder
    assert bytes(corpus.bytes) == TEXT and corpus.documents("test").tolist() == [2]
    pieces["train"] = b"cut"
    with pytest.raises(ValueError, match="owner/name:raw .* is not enwik8: it has 103 bytes"):
        opened("enwik8=owner/name:raw", max_document_bytes=500)


def test_a_hub_dataset_that_is_too_large_is_not_read_to_its_end(opened, small_enwik8, monkeypatch):
    records = iter([(None, b"x" * 600)] * 10)
    monkeypatch.setattr(blt.corpus, "hub_records", lambda *arguments, **options: None)
    monkeypatch.setattr(blt.corpus, "hub_documents", lambda *arguments: records)
    with pytest.raises(ValueError, match="owner/name .* is not enwik8: it has more bytes"):
        opened("enwik8=owner/name")
    assert len(list(records)) == 8


# ---- In the scripts


def test_the_next_command_names_the_validation_text():
    config = parse_config(LLMConfig, "", ["--dataset", "a b", "--val_dataset", "~/val"])
    assert "~" not in config.val_dataset
    printed = next_command("create_patches.py", config)
    assert printed.endswith(f"--dataset 'a b' --val_dataset {config.val_dataset}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The three main scripts on a dataset with a validation text of its own: (folder, {script: what it printed})."""
    folder = tmp_path_factory.mktemp("named")
    write_records(folder / "train.jsonl", [some_words(60, seed).decode() for seed in range(60)])
    held_out = [some_words(60, seed).decode() for seed in range(100, 110)]
    write_records(folder / "val.jsonl", [*held_out, some_words(60, 7).decode()])
    named = ["--dataset", "train.jsonl", "--val_dataset", "val.jsonl"]
    printed = {
        "entropy_llm": output_of(folder, "entropy_llm", *ENTROPY_FLAGS, *named),
        "create_patches": output_of(folder, "create_patches", *"--device cpu".split(), *named),
        "llm": output_of(folder, "llm", *BLT_FLAGS, *named),
    }
    return folder, named, printed


def test_a_named_split_goes_through_the_pipeline(trained):
    folder, named, printed = trained
    note = "named split: 60 documents for training, 11 for validation; 1 of them"
    for script, text in printed.items():
        assert text.count(note) == 1, script
    for script in ("entropy_llm", "create_patches"):
        following = printed[script].splitlines()[-1]
        assert following.startswith("next: ") and "--dataset train.jsonl --val_dataset val.jsonl" in following

    config = DataConfig(dataset=str(folder / "train.jsonl"), val_dataset=str(folder / "val.jsonl"))
    corpus = replace(config, data_cache=str(folder / "other_cache")).corpus()
    val_bytes = int(np.diff(corpus.offsets)[corpus.documents("validation")].sum())
    for name in ("entropy_model.json", "checkpoints/model.json"):
        record = RunRecord.load(folder / name)
        assert record.corpus["sha256"] == corpus.hash
        assert (record.corpus["dataset"], record.corpus["val_dataset"]) == ("train.jsonl", "val.jsonl")
        assert record.corpus["equal_documents"] == 1
        assert record.result["val_bytes"] == val_bytes
    (cache,) = (folder / "patch_cache").glob("entropies-*")
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["corpus_sha256"] == corpus.hash
    # PPMd has read all training documents, and the one that is in both is cheap.
    facts = record.result["baselines"]["ppmd"]
    train = corpus.documents("train", 60_000)
    assert facts["training_bytes"] == int(np.diff(corpus.offsets)[train].sum())


def test_models_of_a_named_split_are_evaluated_and_others_refused(trained):
    folder, named, _ = trained
    flags = "--robustness_bytes 0 --samples 0 --val_bytes 20000".split()
    printed = output_of(folder, "evaluate", *flags, *named)
    card = json.loads((folder / "evaluation" / "card.json").read_text())
    assert "text: val.jsonl, validation | documents: 11" in printed
    assert card["text"]["val_dataset"] == "val.jsonl" and card["text"]["equal_documents"] == 1
    result = RunRecord.load(folder / "checkpoints" / "model.json").result
    assert card["models"][0]["ppmd"]["bpb"] == result["baselines"]["ppmd"]["bpb"]
    # On another text, the training text is found by the model's record.
    output_of(folder, "evaluate", *flags, "--file", "val.jsonl")
    card = json.loads((folder / "evaluation" / "card.json").read_text())
    assert card["models"][0]["ppmd"]["training_bytes"] == result["baselines"]["ppmd"]["training_bytes"]

    # Without the validation text it is another corpus: caches and checkpoints are refused.
    message = error_of(folder, "llm", *BLT_FLAGS, "--dataset", "train.jsonl")
    assert "another corpus" in message
    named_method = "--patch_method global --target_patch_size 4.5".split()
    message = error_of(
        folder, "llm", *BLT_FLAGS, "--dataset", "val.jsonl", "--val_dataset", "train.jsonl", *named_method
    )
    assert "holds no entropies" in message and "--dataset val.jsonl --val_dataset train.jsonl" in message
    message = error_of(folder, "llm", *BLT_FLAGS, "--dataset", "train.jsonl", "--resume", "--patch_method", "space")
    assert "cannot resume" in message and "corpus_sha256" in message
    message = error_of(folder, "evaluate", "--split", "test", *named)
    assert "has no test part" in message
    message = error_of(folder, "evaluate", "--file", "val.jsonl", "--val_dataset", "val.jsonl")
    assert "give either files or a dataset" in message


def test_the_baselines_take_a_named_split(trained):
    folder, named, _ = trained
    flags = "--dim 32 --n_layers 1 --n_heads 2 --row_bytes 128 --batch_rows 4 --steps 6 --eval_every 6".split()
    printed = output_of(folder, "template_llm", *flags, *named, "--device", "cpu")
    assert "--dataset train.jsonl --val_dataset val.jsonl" in printed.splitlines()[-1]
    assert RunRecord.load(folder / "checkpoints_flat" / "model.json").corpus["val_dataset"] == "val.jsonl"


def test_the_workflow_passes_the_split_on(monkeypatch):
    """To the entropy model that it trains, and to the runs that it compares."""
    seen = []
    monkeypatch.setattr(complete_entropy_workflow.entropy_llm, "main", seen.append)
    monkeypatch.setattr(complete_entropy_workflow, "run", lambda config, make_patches: seen.append(config))
    config = WorkflowConfig(dataset="a.txt", val_dataset="b.txt", quick_demo=True, device="cpu")
    complete_entropy_workflow.train_entropy_model(config)
    complete_entropy_workflow.run_method(config, "space", 1)
    assert [(made.dataset, made.val_dataset) for made in seen] == [("a.txt", "b.txt")] * 2


def test_only_evaluate_scores_the_test_part(tmp_path, small_enwik8, monkeypatch):
    (tmp_path / "enwik8").write_bytes(TEXT)
    named = ["--dataset", "enwik8=enwik8", "--max_document_bytes", "100"]
    printed = output_of(tmp_path, "entropy_llm", *ENTROPY_FLAGS, *named)
    assert "over 50 bytes of held-out text" in printed
    record = RunRecord.load(tmp_path / "entropy_model.json")
    assert record.corpus["train_bytes"] == 900
    flags = "--model entropy_model.pth --robustness_bytes 0 --samples 0".split()
    for split, n_bytes in (("test", 50), ("validation", 50), ("all", 950)):
        printed = output_of(tmp_path, "evaluate", *flags, *named, "--split", split)
        assert f"text: enwik8=enwik8, {split} |" in printed and f"bytes: {n_bytes}, sha256" in printed
    card = json.loads((tmp_path / "evaluation" / "card.json").read_text())
    assert card["models"][0]["ppmd"]["training_bytes"] == 900


@pytest.mark.slow
def test_shakespeare_through_the_pipeline(tmp_path):
    """One training document of 1 MB, one for validation: rows, patches, entropies and windows take them whole."""
    named = ["--dataset", "shakespeare"]
    # Limits below the documents' sizes: all is used, and said to be.
    printed = output_of(tmp_path, "entropy_llm", *ENTROPY_FLAGS, *named)
    assert "note: max_bytes is 60,000, but the first train document has 1,003,854 bytes: all are used" in printed
    assert "training text 1,003,854 bytes" in printed
    method = "--method static --target_patch_size 5 --device cpu".split()
    output_of(tmp_path, "create_patches", *method, *named)
    printed = output_of(tmp_path, "llm", *BLT_FLAGS, *named)
    assert "over 111,540 bytes of held-out text" in printed
    assert "PPMd order 6, 256 MB, after the same training text 2.026; untrained" in printed
    assert ppmd.label(RunRecord.load(tmp_path / "checkpoints" / "model.json").result["baselines"]["ppmd"]) in printed
