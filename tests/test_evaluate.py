"""evaluate.py: the bits per byte of bits_per_byte, parts that sum to the whole, noises by hand, repeatable cards."""

import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from blt.files import model_hash
from blt.metric import bits_per_byte, compressors_bpb
from blt.patch_rules import PatchConfig
from blt.records import RunRecord, save_model
from blt.rows import evaluation_batches, target_positions
from blt.tokens import BPEVocabulary, train_tokenizer
from blt_model import BLTConfig, BLTModel
from entropy_llm import EntropyConfig, MinimalLLM
from entropy_patcher import EntropyPatcher
from evaluate import (
    EvaluateConfig,
    ModelUnderTest,
    bootstrap,
    bucket_range,
    first_bytes,
    group_sources,
    is_valid_utf8,
    measure,
    noised,
    part,
    robustness,
)
from save_entropy_model import save_entropy_model
from template_llm import BPEConfig, BPETransformer, FlatByteTransformer, FlatConfig

ROOT = Path(__file__).resolve().parent.parent
WORDS = b"the cat sat on the mat and the dog ate the food that the cat had left on the mat. ".split()


def raw(text):
    return np.frombuffer(text, dtype=np.uint8)


def text(n, seed):
    return raw(b" ".join(np.random.default_rng(seed).choice(WORDS, n).tolist()))


# Short ones, one longer than a row of 64 (several windows), one of a row exactly, one that is not UTF-8.
DOCUMENTS = [text(3, 0), text(60, 1), text(9, 2), raw(b"\xff\x00\xe4caf\xc3\xa9"), text(40, 3)[:63], raw(b"x")]
SOURCES = ["en/a.txt", "en/b.txt", "fr/a.txt", "x.bin", "en/a.txt", "fr/a.txt"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    return train_tokenizer([text(300, seed) for seed in range(3)], 300, path)


def entropy_model():
    torch.manual_seed(1)
    return MinimalLLM(EntropyConfig(d_model=32, n_heads=2, n_layers=1, max_seq_len=16)).eval()


BLT = BLTConfig(
    encoder_dim=32, global_dim=32, global_layers=1, decoder_dim=32, decoder_layers=1, hash_rows=64, window=16
)


@pytest.fixture
def models_under_test(tokenizer):
    torch.manual_seed(0)
    made = {
        "BLT": (BLTModel(BLT), EntropyPatcher(entropy_model(), threshold=5.2, method="global")),
        "flat byte transformer": (FlatByteTransformer(FlatConfig(dim=32, n_layers=1, n_heads=2, window=16)), None),
        "BPE transformer": (
            BPETransformer(BPEConfig(dim=32, n_layers=1, n_heads=2), BPEVocabulary(tokenizer, 3.5)),
            None,
        ),
        "entropy model": (entropy_model(), None),
    }
    for model, _ in made.values():
        for parameter in model.parameters():  # far from the uniform distribution, so that a mistake shows
            parameter.data += 0.05 * torch.randn_like(parameter)
    return {kind: ModelUnderTest(kind, kind, model.eval(), patcher, 64) for kind, (model, patcher) in made.items()}


# -------------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("kind", ["BLT", "flat byte transformer", "BPE transformer", "entropy model"])
def test_the_number_is_bits_per_byte_and_parts_sum_to_it(models_under_test, kind):
    under_test = models_under_test[kind]
    starts = under_test.starts(DOCUMENTS)
    costs = measure(under_test, DOCUMENTS, starts, batch_rows=2)
    want = bits_per_byte(under_test.model, under_test.patcher, DOCUMENTS, 64, batch_rows=2)
    assert costs.totals["nats"] / math.log(2) / costs.totals["bytes"] == want  # to the last bit
    assert costs.totals["bytes"] == sum(map(len, DOCUMENTS))
    for parts in (costs.by_document_DC, costs.by_context_KC):
        assert parts[:, 0].sum() == pytest.approx(costs.totals["nats"], rel=1e-9)
        assert parts[:, 1:].sum(0).tolist() == [costs.totals["right"], costs.totals["targets"], costs.totals["bytes"]]
    assert costs.by_document_DC[:, 3].tolist() == [len(document) for document in DOCUMENTS]
    # A document's part is what the document alone costs.
    for number in (0, 1, 3):
        alone = bits_per_byte(under_test.model, under_test.patcher, DOCUMENTS[number : number + 1], 64)
        assert part(costs.by_document_DC[number])["bpb"] == pytest.approx(alone, rel=1e-5)
    # Sources: groups of documents, weighted by their bytes, give the whole.
    groups = group_sources(SOURCES, DOCUMENTS, 2)
    assert list(groups) == ["en/b.txt", "en/a.txt", "(others)"] and sorted(sum(groups.values(), [])) == list(range(6))
    made = [part(costs.by_document_DC[numbers].sum(0)) for numbers in groups.values()]
    assert sum(p["bpb"] * p["bytes"] for p in made) / costs.totals["bytes"] == pytest.approx(want, rel=1e-9)
    assert sum(p["accuracy"] * p["targets"] for p in made) == pytest.approx(costs.totals["right"])


def test_context_of_each_target_by_hand():
    documents = [raw(b"abc"), raw(b"defghijk"), raw(b"lm")]
    (batch,) = evaluation_batches(documents, None, row_bytes=6, batch_rows=9)
    document, context = target_positions(batch)
    at = {}
    for r, c in zip(*np.nonzero(batch.is_scored.numpy())):
        at.setdefault(int(document[r, c]), []).append((int(batch.ids[r, c + 1]), int(context[r, c])))
    assert at[0] == [(97, 0), (98, 1), (99, 2), (256, 3)]
    assert at[2] == [(108, 0), (109, 1), (256, 2)]
    # The second is longer than a row: window 1 has inputs 0 to 5, window 2 inputs 3 to 8, of which the first is the byte f.
    assert at[1] == [(100, 0), (101, 1), (102, 2), (103, 3), (104, 4), (105, 5), (106, 4), (107, 5), (256, 6)]


def test_context_buckets(models_under_test):
    assert [bucket_range(k) for k in range(6)] == [(0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16)]
    costs = measure(models_under_test["flat byte transformer"], [text(60, 1)[:40]], None)
    assert costs.by_context_KC[:8, 2].tolist() == [1, 1, 1, 2, 4, 8, 16, 8]  # 41 targets, with 0 to 40 bytes before
    assert costs.by_context_KC[:8, 3].tolist() == [1, 1, 1, 2, 4, 8, 16, 7]  # the last is the document's end


def test_context_of_tokens_counts_bytes(models_under_test):
    under_test = models_under_test["BPE transformer"]
    document = raw(b"the cat sat on the mat")
    vocabulary = under_test.model.vocabulary
    ids = vocabulary.encode(document)
    assert len(ids) < len(document)
    (batch,) = evaluation_batches([ids], None, 64, vocabulary=vocabulary)
    _, context = target_positions(batch, vocabulary)
    assert context[0, : len(ids) + 1].tolist() == [0, *np.cumsum(vocabulary.bytes_of_id[ids]).tolist()]


def test_bootstrap():
    values = np.array([[100.0, 0, 10, 10], [300, 0, 20, 20], [50, 0, 30, 30], [80, 0, 8, 8]])
    draws = bootstrap(values, 4000, seed=1)
    assert (
        draws.tolist() == bootstrap(values, 4000, seed=1).tolist()
        and draws.tolist() != bootstrap(values, 4000, seed=2).tolist()
    )
    # Against the linearised error of a ratio, sqrt(sum (nats - bpb * bytes) ** 2) / bytes: rough for four documents.
    bpb = values[:, 0].sum() / math.log(2) / values[:, 3].sum()
    linear = math.sqrt((((values[:, 0] / math.log(2)) - bpb * values[:, 3]) ** 2).sum()) / values[:, 3].sum()
    assert 0.6 * linear < draws.std() < 1.6 * linear
    assert bootstrap(np.repeat(values[:1], 5, 0), 100, 1).std() < 1e-12 and bootstrap(values[:1], 100, 1) is None


# ---------------------------------------------------------------------------------------------------------------- noise


def test_noises_by_hand():
    assert noised(raw(b"a bc"), "AntSpeak").tobytes() == b"A   B C"
    assert noised(raw("Straße, é!".encode()), "UpperCase").tobytes().decode() == "STRASSE, É!"
    assert (
        noised(raw(b"caf\xc3\xa9 \xff\xe4b"), "UpperCase").tobytes() == b"CAF\xc3\x89 \xff\xe4B"
    )  # invalid bytes stay
    assert noised(raw(b"\xffa"), "AntSpeak").tobytes() == b"\xff A"
    for name in evaluate.NOISES:
        assert noised(raw(b""), name).tobytes() == b""
        assert noised(text(50, 1), name, 3).tobytes() == noised(text(50, 1), name, 3).tobytes()
    with pytest.raises(ValueError, match="noise is 'Swap'; it must be one of AntSpeak, Drop"):
        noised(raw(b"a"), "Swap")


def test_noises_have_their_rates():
    original = ("abcdé" * 4000).encode()
    characters = original.decode()
    made = {
        name: noised(raw(original), name, (1, 2)).tobytes().decode() for name in evaluate.NOISES
    }  # each is valid UTF-8
    assert len(made["Drop"]) / len(characters) == pytest.approx(0.9, abs=0.01)
    rest = iter(characters)
    assert all(character in rest for character in made["Drop"])  # in order
    cased = made["RandomCase"]
    assert cased.lower() == characters and sum(c.isupper() for c in cased) / len(cased) == pytest.approx(0.5, abs=0.015)
    runs, previous = [], None
    for character in made["Repeat"]:
        if character == previous:
            runs[-1] += 1
        else:
            runs.append(1)
            previous = character
    share = np.bincount(runs)[1:] / len(characters)
    assert len(runs) == len(characters) and share == pytest.approx([0.8, 0.0667, 0.0667, 0.0667], abs=0.01)
    assert noised(raw(original), "Drop", 1).tobytes() != noised(raw(original), "Drop", 2).tobytes()


def test_robustness_counts_original_bytes(models_under_test):
    under_test = models_under_test["BLT"]
    documents = DOCUMENTS[:3]
    record = robustness(under_test, documents, seed=5)
    size = sum(map(len, documents))
    spoken = [noised(document, "AntSpeak") for document in documents]
    want = bits_per_byte(under_test.model, under_test.patcher, spoken, 64) * sum(map(len, spoken)) / size
    assert (
        record["AntSpeak"]["bpb"] == pytest.approx(want, rel=1e-9)
        and record["AntSpeak"]["bytes"] == sum(map(len, spoken)) == 2 * size - 3
    )
    assert record["original"] == bits_per_byte(under_test.model, under_test.patcher, documents, 64)
    assert all(record[name]["change"] == record[name]["bpb"] - record["original"] for name in evaluate.NOISES)
    dropped = next(seed for seed in range(200) if not len(noised(raw(b"x"), "Drop", (seed, 0))))
    assert robustness(under_test, [raw(b"x")], dropped)["Drop"]["bpb"] is None


def test_first_bytes():
    documents = [raw(b"abc"), raw(b"de"), raw(b"fgh")]
    joined = lambda limit: [document.tobytes() for document in first_bytes(documents, limit)]  # noqa: E731
    assert (
        joined(5) == [b"abc", b"de"]
        and joined(7) == [b"abc", b"de"]
        and joined(99) == [b"abc", b"de", b"fgh"]
        and joined(2) == [b"ab"]
    )


def test_valid_utf8():
    assert is_valid_utf8("aé€😀".encode()) and is_valid_utf8(b"")
    assert not is_valid_utf8(b"a\xffb") and not is_valid_utf8(b"\xc3a", may_be_cut=True)
    assert not is_valid_utf8("€".encode()[:2]) and is_valid_utf8("a€".encode()[:3], may_be_cut=True)


def test_compressors():
    made = compressors_bpb([text(300, 0), text(300, 1)])
    assert list(made) == ["gzip -9", "xz -9", "zstd -19"] and all(0 < bpb < 8 for bpb in made.values())
    noise = np.random.default_rng(0).integers(0, 256, 20000, dtype=np.uint8)
    assert all(8 < bpb < 8.05 for bpb in compressors_bpb([noise]).values())


def test_picture_of_numbers_that_are_missing(tmp_path):
    from blt.pictures import draw_evaluation

    path = draw_evaluation(
        tmp_path / "a.png",
        ["a$1$", "b"],
        [("0", [2.0, None])],
        [("s" * 60, [2.0, None], [None, None])],
        [("Drop", [-0.1, None])],
    )
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    draw_evaluation(tmp_path / "b.png", ["a"], [("0", [2.0])], [], [])
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_evaluation(tmp_path / "c.png", [], [], [], [])


# ----------------------------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A folder as the training scripts leave it, with a tiny random BLT, BPE baseline and entropy model, and texts."""
    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(2)
    facts = {"settings": {"row_bytes": 64}, "corpus": {"dataset": "sample", "sha256": None}}
    save_entropy_model(entropy_model(), folder / "entropy_model.pth", **facts)
    record = RunRecord(
        kind="blt",
        model_config=asdict(BLT),
        patch_config=asdict(PatchConfig(entropy_threshold=5.2)),
        precision="fp32",
        entropy_model_path=str(folder / "entropy_model.pth"),
        entropy_model_sha256=model_hash(entropy_model()),
        **facts,
    )
    checkpoints = folder / "checkpoints"
    save_model(BLTModel(BLT), checkpoints / "best.pt", record, checkpoints / "model.json")
    config = BPEConfig(dim=32, n_layers=1, n_heads=2)
    baseline = BPETransformer(config, BPEVocabulary(tokenizer))
    record = RunRecord(kind="bpe", model_config=asdict(config), bytes_per_token=3.5, **facts)
    save_model(baseline, folder / "bpe" / "best.pt", record, folder / "bpe" / "model.json")
    tokenizer.save(str(folder / "bpe" / "tokenizer.json"))
    for language in ("en", "fr"):
        (folder / "corpus" / language).mkdir(parents=True)
        for number in range(3):
            (folder / "corpus" / language / f"{number}.txt").write_bytes(
                text(40 + number, len(language) + number + (language == "fr")).tobytes()
            )
    (folder / "code.py").write_bytes(Path(__file__).read_bytes()[:300])
    (folder / "noise.bin").write_bytes(np.random.default_rng(0).integers(0, 256, 200, dtype=np.uint8).tobytes())
    (folder / "empty.txt").touch()
    return folder


def run(folder, *flags, ok=True):
    command = [sys.executable, ROOT / "evaluate.py", "--device", "cpu", "--precision", "fp32", *map(str, flags)]
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if ok:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "Warning" not in done.stderr, done.stderr
        return done.stdout
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    return line


def test_script_on_a_corpus_with_three_models(folder):
    flags = ["--model", "checkpoints", "bpe", "entropy_model.pth", "--dataset", "corpus", "--split", "all", "--group_by", "folder", "--val_bytes", 1100,
             "--robustness_bytes", 100, "--samples", 2, "--sample_bytes", 5, "--resamples", 50]  # fmt: skip
    out = run(folder, *flags)
    card = json.loads((folder / "evaluation" / "card.json").read_text())
    documents = [np.fromfile(path, dtype=np.uint8) for path in sorted((folder / "corpus").rglob("*.txt"))]
    digest = hashlib.sha256(b"".join(len(d).to_bytes(8, "little") + d.tobytes() for d in documents)).hexdigest()
    assert (
        card["text"]["sha256"] == digest
        and card["text"]["bytes"] == sum(map(len, documents))
        and len(card["text"]["corpus_sha256"]) == 64
    )
    assert card["command"] == ["evaluate.py", "--device", "cpu", "--precision", "fp32", *map(str, flags)]
    assert {"commit", "torch", "device", "precision", "threads", "definitions", "compressors_bpb"} <= set(
        card
    ) and card["settings"]["seed"] == 1337
    blt, bpe, entropy = card["models"]
    under_test = evaluate.open_model(folder / "checkpoints")
    assert blt["bpb"] == bits_per_byte(under_test.model, under_test.patcher, documents, 64)
    assert blt["sha256"] == model_hash(under_test.model) and blt["entropy_model_sha256"] == entropy[
        "sha256"
    ] == model_hash(entropy_model())
    assert (blt["row_ids"], blt["stride_ids"], bpe["row_ids"], bpe["stride_ids"], bpe["ids"]) == (
        64,
        32,
        18,
        9,
        "tokens",
    )
    assert (
        blt["scores_document_ends"] and not entropy["scores_document_ends"] and entropy["targets"] == entropy["bytes"]
    )
    for model in card["models"]:
        assert list(model["by_source"]) == ["en", "fr"] or list(model["by_source"]) == ["fr", "en"]
        for parts in (model["by_source"].values(), model["by_context"]):
            assert (
                sum(entry["nats"] for entry in parts) == pytest.approx(model["nats"])
                and sum(entry["bytes"] for entry in parts) == model["bytes"]
            )
        assert model["standard_error"] > 0 and set(model["robustness"]) == {
            "original",
            "original_bytes",
            *evaluate.NOISES,
        }
    assert sum(entry["nats"] for entry in entropy["by_context"]) == pytest.approx(entropy["nats"])
    sizes = blt["patches"]["histogram"]
    assert (
        sum(int(size) * count for size, count in sizes.items()) == blt["bytes"]
        and sum(sizes.values()) == blt["patches"]["patches"]
    )
    assert bpe["bytes_a_token"] == sum(map(len, documents)) / sum(
        len(evaluate.open_model(folder / "bpe").model.vocabulary.encode(d)) for d in documents
    )
    assert (
        bpe["difference_to_first"]["bpb"] == bpe["bpb"] - blt["bpb"]
        and bpe["difference_to_first"]["standard_error"] > 0
    )
    assert blt["samples"]["of"] == len(blt["samples"]["texts"]) == 2 and bpe["samples"] is None
    for words in (
        f"{blt['bpb']:.4f}",
        "64 and 32 bytes",
        "18 and 9 tokens",
        "AntSpeak",
        "zstd -19",
        "valid UTF-8",
        "leak gate passed",
        "bytes a patch by folder",
    ):
        assert words in out, words
    png = folder / "evaluation" / "evaluation.png"
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and png.stat().st_size > 20_000


def test_the_same_settings_write_the_same_card(folder, monkeypatch):
    monkeypatch.chdir(folder)
    settings = dict(
        model=["checkpoints", "bpe"],
        dataset="corpus",
        split="all",
        robustness_bytes=60,
        samples=2,
        sample_bytes=4,
        resamples=20,
        device="cpu",
    )
    evaluate.main(EvaluateConfig(**settings, output="once"))
    evaluate.main(EvaluateConfig(**settings, output="twice"))
    once, twice = ((folder / name / "card.json").read_text() for name in ("once", "twice"))
    assert once == twice.replace('"output": "twice"', '"output": "once"')


def test_on_files(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    card = evaluate.main(
        EvaluateConfig(
            file=["code.py", "noise.bin"],
            val_bytes=250,
            robustness_bytes=0,
            samples=0,
            output="on_files",
            device="cpu",
            precision="fp32",
        )
    )
    assert json.loads((folder / "on_files" / "card.json").read_text())["models"][0]["bpb"] == card["models"][0]["bpb"]
    (model,) = card["models"]
    assert (
        model["bytes"] == 250 + 200
        and card["text"]["cut_to_val_bytes"] == ["code.py"]
        and "the first 250 bytes only of code.py" in capsys.readouterr().out
    )
    under_test = evaluate.open_model("checkpoints")
    assert model["by_source"]["noise.bin"]["bpb"] == pytest.approx(
        bits_per_byte(under_test.model, under_test.patcher, [Path("noise.bin").read_bytes()], 64), rel=1e-6
    )
    assert (
        model["by_source"]["noise.bin"]["standard_error"] is None
        and "robustness" not in model
        and model["samples"] is None
    )


def test_a_mistake_gets_one_line(folder):
    assert "empty.txt is empty" in run(folder, "--file", "empty.txt", ok=False)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(model=["none"]), "python llm.py --output none"),
        (dict(model=["none.pth"]), "python entropy_llm.py"),
        (dict(file=["none.txt"]), "No such file"),
        (dict(file=["code.py"], dataset="corpus"), "either files or a dataset"),
        (dict(max_bytes=5), "limited by --val_bytes"),
    ],
)
def test_errors_say_what_to_do(folder, monkeypatch, settings, words):
    monkeypatch.chdir(folder)
    with pytest.raises((ValueError, OSError), match=words):
        evaluate.main(EvaluateConfig(**settings))


def test_bad_settings_name_the_field():
    for name, value in dict(
        row_bytes=1,
        robustness_bytes=-1,
        samples=-1,
        resamples=1,
        temperature=-0.1,
        split="test",
        group_by="language",
        max_sources=0,
    ).items():
        with pytest.raises(ValueError, match=f"{name} is"):
            EvaluateConfig(**{name: value})


def test_a_model_that_sees_ahead_is_refused(folder, models_under_test, monkeypatch):
    """The leak gate stands before every number."""
    leaky = models_under_test["flat byte transformer"]
    honest = leaky.model.forward
    monkeypatch.setattr(
        leaky.model, "forward", lambda ids: honest(ids) + torch.nn.functional.one_hot(ids.roll(-1, 1), 257) * 5.0
    )
    config = EvaluateConfig(robustness_bytes=0, samples=0, resamples=5)
    with pytest.raises(ValueError, match="leak"):
        evaluate.evaluate_model(leaky, DOCUMENTS, {"all": list(range(6))}, config, "fp32")
