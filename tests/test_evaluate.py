"""evaluate.py: its figure is that of bits_per_byte, parts sum to the whole, cards are repeatable."""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error_of, run_command

import evaluate
from blt.files import model_hash
from blt.metric import bits_per_byte, compressors_bpb
from blt.patch_rules import PatchConfig
from blt.pictures import draw_evaluation
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

WORDS = b"the cat sat on the mat and the dog ate the food that the cat had left on the mat. ".split()


def raw(text):
    return np.frombuffer(text, dtype=np.uint8)


def text(n, seed):
    return raw(b" ".join(np.random.default_rng(seed).choice(WORDS, n).tolist()))


# Short documents, one longer than a row of 64 (several windows), one that fills a row, one not UTF-8.
DOCUMENTS = [
    text(3, 0),
    text(60, 1),
    text(9, 2),
    raw(b"\xff\x00\xe4caf\xc3\xa9"),
    text(40, 3)[:63],
    raw(b"x"),
]
SOURCES = ["en/a.txt", "en/b.txt", "fr/a.txt", "x.bin", "en/a.txt", "fr/a.txt"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    return train_tokenizer([text(300, seed) for seed in range(3)], 300, path)


def entropy_model():
    torch.manual_seed(1)
    return MinimalLLM(EntropyConfig(d_model=32, n_heads=2, n_layers=1, max_seq_len=16)).eval()


BLT = BLTConfig(
    encoder_dim=32,
    global_dim=32,
    global_layers=1,
    decoder_dim=32,
    decoder_layers=1,
    hash_rows=64,
    window=16,
)


@pytest.fixture
def models_under_test(tokenizer):
    """A `ModelUnderTest` of each kind, by its kind, with rows of 64 bytes."""
    torch.manual_seed(0)
    models = {"BLT": BLTModel(BLT)}
    patchers = {"BLT": EntropyPatcher(entropy_model(), threshold=5.2, method="global")}
    flat_config = FlatConfig(dim=32, n_layers=1, n_heads=2, window=16)
    models["flat byte transformer"] = FlatByteTransformer(flat_config)
    bpe_config = BPEConfig(dim=32, n_layers=1, n_heads=2)
    models["BPE transformer"] = BPETransformer(bpe_config, BPEVocabulary(tokenizer, 3.5))
    models["entropy model"] = entropy_model()
    made = {}
    for kind, model in models.items():
        # Far from the uniform distribution, so that a mistake shows.
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        made[kind] = ModelUnderTest(kind, kind, model.eval(), patchers.get(kind), 64)
    return made


# ---- Scoring


KINDS = ["BLT", "flat byte transformer", "BPE transformer", "entropy model"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_is_bits_per_byte_and_parts_sum_to_it(models_under_test, kind):
    under_test = models_under_test[kind]
    model = under_test.model
    patcher = under_test.patcher
    starts = under_test.starts(DOCUMENTS)
    costs = measure(under_test, DOCUMENTS, starts, batch_rows=2)
    totals = costs.totals
    want = bits_per_byte(model, patcher, DOCUMENTS, 64, batch_rows=2)
    # Equal to the last bit.
    assert totals["nats"] / math.log(2) / totals["bytes"] == want
    assert totals["bytes"] == sum(map(len, DOCUMENTS))
    for parts in (costs.by_document_DC, costs.by_context_KC):
        assert parts[:, 0].sum() == pytest.approx(totals["nats"], rel=1e-9)
        assert parts[:, 1:].sum(0).tolist() == [totals["right"], totals["targets"], totals["bytes"]]
    assert costs.by_document_DC[:, 3].tolist() == [len(document) for document in DOCUMENTS]
    # A document's part is what the document alone costs.
    for number in (0, 1, 3):
        alone = bits_per_byte(model, patcher, [DOCUMENTS[number]], 64)
        assert part(costs.by_document_DC[number])["bpb"] == pytest.approx(alone, rel=1e-5)
    # Sources: groups of documents, weighted by their bytes, give the whole.
    groups = group_sources(SOURCES, DOCUMENTS, 2)
    assert list(groups) == ["en/b.txt", "en/a.txt", "(others)"]
    assert sorted(sum(groups.values(), [])) == list(range(6))
    made = [part(costs.by_document_DC[numbers].sum(0)) for numbers in groups.values()]
    bits = sum(source["bpb"] * source["bytes"] for source in made)
    assert bits / totals["bytes"] == pytest.approx(want, rel=1e-9)
    n_right = sum(source["accuracy"] * source["targets"] for source in made)
    assert n_right == pytest.approx(totals["right"])


def test_context_of_each_target_by_hand():
    documents = [raw(b"abc"), raw(b"defghijk"), raw(b"lm")]
    (batch,) = evaluation_batches(documents, None, row_bytes=6, batch_rows=9)
    document, context = target_positions(batch)
    # For each document, (id, bytes of context) of each scored target.
    at = {0: [], 1: [], 2: []}
    for r, c in zip(*np.nonzero(batch.is_scored.numpy())):
        target = int(batch.ids[r, c + 1])
        at[int(document[r, c])].append((target, int(context[r, c])))
    assert at[0] == [(97, 0), (98, 1), (99, 2), (256, 3)]
    assert at[2] == [(108, 0), (109, 1), (256, 2)]
    # The second document is longer than a row. Window 1 has inputs 0 to 5, window 2 has inputs 3 to 8,
    # of which the first is the byte f.
    in_window_1 = [(100, 0), (101, 1), (102, 2), (103, 3), (104, 4), (105, 5)]
    in_window_2 = [(106, 4), (107, 5), (256, 6)]
    assert at[1] == in_window_1 + in_window_2


def test_context_buckets(models_under_test):
    ranges = [bucket_range(k) for k in range(6)]
    assert ranges == [(0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16)]
    costs = measure(models_under_test["flat byte transformer"], [text(60, 1)[:40]], None)
    # 41 targets have 0 to 40 bytes before them. The last target is the document's end, which is no byte.
    assert costs.by_context_KC[:8, 2].tolist() == [1, 1, 1, 2, 4, 8, 16, 8]
    assert costs.by_context_KC[:8, 3].tolist() == [1, 1, 1, 2, 4, 8, 16, 7]


def test_context_of_tokens_counts_bytes(models_under_test):
    under_test = models_under_test["BPE transformer"]
    document = raw(b"the cat sat on the mat")
    vocabulary = under_test.model.vocabulary
    ids = vocabulary.encode(document)
    assert len(ids) < len(document)
    (batch,) = evaluation_batches([ids], None, 64, vocabulary=vocabulary)
    _, context = target_positions(batch, vocabulary)
    bytes_before = [0, *np.cumsum(vocabulary.bytes_of_id[ids]).tolist()]
    assert context[0, : len(ids) + 1].tolist() == bytes_before


def test_bootstrap():
    # Columns: nats, right, targets, bytes.
    values = np.array([[100.0, 0, 10, 10], [300, 0, 20, 20], [50, 0, 30, 30], [80, 0, 8, 8]])
    draws = bootstrap(values, 4000, seed=1)
    assert draws.tolist() == bootstrap(values, 4000, seed=1).tolist()
    assert draws.tolist() != bootstrap(values, 4000, seed=2).tolist()
    # Against the linearised error of a ratio: sqrt(sum (bits - bpb * bytes) ** 2) / bytes.
    # The agreement is rough for four documents.
    bits = values[:, 0] / math.log(2)
    n_bytes = values[:, 3]
    bpb = values[:, 0].sum() / math.log(2) / n_bytes.sum()
    linear = math.sqrt(((bits - bpb * n_bytes) ** 2).sum()) / n_bytes.sum()
    assert 0.6 * linear < draws.std() < 1.6 * linear
    equal_documents = np.repeat(values[:1], 5, 0)
    assert bootstrap(equal_documents, 100, 1).std() < 1e-12
    assert bootstrap(values[:1], 100, 1) is None


# ---- Noise


def test_noises_by_hand():
    assert noised(raw(b"a bc"), "AntSpeak").tobytes() == b"A   B C"
    assert noised(raw("Straße, é!".encode()), "UpperCase").tobytes().decode() == "STRASSE, É!"
    # Bytes that are no UTF-8 stay.
    upper = noised(raw(b"caf\xc3\xa9 \xff\xe4b"), "UpperCase").tobytes()
    assert upper == b"CAF\xc3\x89 \xff\xe4B"
    assert noised(raw(b"\xffa"), "AntSpeak").tobytes() == b"\xff A"
    for name in evaluate.NOISES:
        assert noised(raw(b""), name).tobytes() == b""
        assert noised(text(50, 1), name, 3).tobytes() == noised(text(50, 1), name, 3).tobytes()
    with pytest.raises(ValueError, match="noise is 'Swap'; it must be one of AntSpeak, Drop"):
        noised(raw(b"a"), "Swap")


def test_noises_have_their_rates():
    original = ("abcdé" * 4000).encode()
    characters = original.decode()
    # decode() raises an error unless the result is valid UTF-8.
    made = {}
    for name in evaluate.NOISES:
        made[name] = noised(raw(original), name, (1, 2)).tobytes().decode()

    assert len(made["Drop"]) / len(characters) == pytest.approx(0.9, abs=0.01)
    # The characters that are left are in order: each `in` reads on from the one before.
    rest = iter(characters)
    assert all(character in rest for character in made["Drop"])

    cased = made["RandomCase"]
    assert cased.lower() == characters
    n_upper = sum(character.isupper() for character in cased)
    assert n_upper / len(cased) == pytest.approx(0.5, abs=0.015)

    runs = []
    previous = None
    for character in made["Repeat"]:
        if character == previous:
            runs[-1] += 1
        else:
            runs.append(1)
            previous = character
    assert len(runs) == len(characters)
    share = np.bincount(runs)[1:] / len(characters)
    assert share == pytest.approx([0.8, 0.0667, 0.0667, 0.0667], abs=0.01)

    first_seed = noised(raw(original), "Drop", 1).tobytes()
    assert first_seed != noised(raw(original), "Drop", 2).tobytes()


def test_robustness_counts_original_bytes(models_under_test):
    under_test = models_under_test["BLT"]
    documents = DOCUMENTS[:3]
    record = robustness(under_test, documents, seed=5)
    size = sum(map(len, documents))
    spoken = [noised(document, "AntSpeak") for document in documents]
    spoken_size = sum(map(len, spoken))
    want = bits_per_byte(under_test.model, under_test.patcher, spoken, 64) * spoken_size / size
    assert record["AntSpeak"]["bpb"] == pytest.approx(want, rel=1e-9)
    assert record["AntSpeak"]["bytes"] == spoken_size == 2 * size - 3
    original = bits_per_byte(under_test.model, under_test.patcher, documents, 64)
    assert record["original"] == original
    for name in evaluate.NOISES:
        assert record[name]["change"] == record[name]["bpb"] - record["original"]

    # A seed with which Drop leaves no byte of the text.
    dropped = next(seed for seed in range(200) if not len(noised(raw(b"x"), "Drop", (seed, 0))))
    assert robustness(under_test, [raw(b"x")], dropped)["Drop"]["bpb"] is None


@pytest.mark.parametrize(
    "limit, wanted",
    [
        (5, [b"abc", b"de"]),
        (7, [b"abc", b"de"]),
        (99, [b"abc", b"de", b"fgh"]),
        (2, [b"ab"]),
    ],
)
def test_first_bytes(limit, wanted):
    documents = [raw(b"abc"), raw(b"de"), raw(b"fgh")]
    assert [document.tobytes() for document in first_bytes(documents, limit)] == wanted


def test_valid_utf8():
    assert is_valid_utf8("aé€😀".encode())
    assert is_valid_utf8(b"")
    assert not is_valid_utf8(b"a\xffb")
    assert not is_valid_utf8(b"\xc3a", may_be_cut=True)
    assert not is_valid_utf8("€".encode()[:2])
    assert is_valid_utf8("a€".encode()[:3], may_be_cut=True)


def test_compressors():
    made = compressors_bpb([text(300, 0), text(300, 1)])
    assert list(made) == ["gzip -9", "xz -9", "zstd -19"]
    assert all(0 < bpb < 8 for bpb in made.values())
    noise = np.random.default_rng(0).integers(0, 256, 20000, dtype=np.uint8)
    assert all(8 < bpb < 8.05 for bpb in compressors_bpb([noise]).values())


def test_picture_of_numbers_that_are_missing(tmp_path):
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


# ---- The script


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """What the training scripts write, here of random models; and texts."""
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

    for language, first_seed in (("en", 2), ("fr", 3)):
        texts = folder / "corpus" / language
        texts.mkdir(parents=True)
        for number in range(3):
            document = text(40 + number, first_seed + number)
            (texts / f"{number}.txt").write_bytes(document.tobytes())
    (folder / "code.py").write_bytes(Path(__file__).read_bytes()[:300])
    noise = np.random.default_rng(0).integers(0, 256, 200, dtype=np.uint8)
    (folder / "noise.bin").write_bytes(noise.tobytes())
    (folder / "empty.txt").touch()
    return folder


COMMON_FLAGS = ["--device", "cpu", "--precision", "fp32"]


def test_script_on_a_corpus_with_three_models(folder):
    flags = [
        *"--model checkpoints bpe entropy_model.pth".split(),
        *"--dataset corpus --split all --group_by folder --val_bytes 1100".split(),
        *"--robustness_bytes 100 --samples 2 --sample_bytes 5 --resamples 50".split(),
    ]
    out = run_command(folder, "evaluate", *COMMON_FLAGS, *flags)
    card = json.loads((folder / "evaluation" / "card.json").read_text())
    paths = sorted((folder / "corpus").rglob("*.txt"))
    documents = [np.fromfile(path, dtype=np.uint8) for path in paths]
    n_bytes = sum(map(len, documents))
    blt, bpe, entropy = card["models"]

    # The card says what was measured, on what text, and how.
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document).to_bytes(8, "little"))
        digest.update(document.tobytes())
    assert card["text"]["sha256"] == digest.hexdigest()
    assert card["text"]["bytes"] == n_bytes
    assert len(card["text"]["corpus_sha256"]) == 64
    assert card["command"] == ["evaluate.py", *COMMON_FLAGS, *flags]
    facts = {"commit", "torch", "device", "precision", "threads", "definitions", "compressors_bpb"}
    assert facts <= set(card)
    assert card["settings"]["seed"] == 1337

    under_test = evaluate.open_model(folder / "checkpoints")
    assert blt["bpb"] == bits_per_byte(under_test.model, under_test.patcher, documents, 64)
    assert blt["sha256"] == model_hash(under_test.model)
    assert blt["entropy_model_sha256"] == entropy["sha256"] == model_hash(entropy_model())
    assert (blt["row_ids"], blt["stride_ids"]) == (64, 32)
    assert (bpe["row_ids"], bpe["stride_ids"], bpe["ids"]) == (18, 9, "tokens")
    assert blt["scores_document_ends"]
    assert not entropy["scores_document_ends"]
    assert entropy["targets"] == entropy["bytes"]

    for model in card["models"]:
        assert sorted(model["by_source"]) == ["en", "fr"]
        for parts in (model["by_source"].values(), model["by_context"]):
            assert sum(entry["nats"] for entry in parts) == pytest.approx(model["nats"])
            assert sum(entry["bytes"] for entry in parts) == model["bytes"]
        assert model["standard_error"] > 0
        assert set(model["robustness"]) == {"original", "original_bytes", *evaluate.NOISES}
    assert sum(entry["nats"] for entry in entropy["by_context"]) == pytest.approx(entropy["nats"])

    sizes = blt["patches"]["histogram"]
    assert sum(int(size) * count for size, count in sizes.items()) == blt["bytes"]
    assert sum(sizes.values()) == blt["patches"]["patches"]
    vocabulary = evaluate.open_model(folder / "bpe").model.vocabulary
    n_tokens = sum(len(vocabulary.encode(document)) for document in documents)
    assert bpe["bytes_a_token"] == n_bytes / n_tokens
    assert bpe["difference_to_first"]["bpb"] == bpe["bpb"] - blt["bpb"]
    assert bpe["difference_to_first"]["standard_error"] > 0
    assert blt["samples"]["of"] == len(blt["samples"]["texts"]) == 2
    assert bpe["samples"] is None

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
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert png.stat().st_size > 20_000


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
    once = (folder / "once" / "card.json").read_text()
    twice = (folder / "twice" / "card.json").read_text()
    assert once == twice.replace('"output": "twice"', '"output": "once"')


def test_on_files(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    config = EvaluateConfig(
        file=["code.py", "noise.bin"],
        val_bytes=250,
        robustness_bytes=0,
        samples=0,
        output="on_files",
        device="cpu",
        precision="fp32",
    )
    card = evaluate.main(config)
    (model,) = card["models"]
    written = json.loads((folder / "on_files" / "card.json").read_text())
    assert written["models"][0]["bpb"] == model["bpb"]
    assert model["bytes"] == 250 + 200
    assert card["text"]["cut_to_val_bytes"] == ["code.py"]
    assert "the first 250 bytes only of code.py" in capsys.readouterr().out

    under_test = evaluate.open_model("checkpoints")
    noise = Path("noise.bin").read_bytes()
    want = bits_per_byte(under_test.model, under_test.patcher, [noise], 64)
    assert model["by_source"]["noise.bin"]["bpb"] == pytest.approx(want, rel=1e-6)
    assert model["by_source"]["noise.bin"]["standard_error"] is None
    assert "robustness" not in model
    assert model["samples"] is None


def test_a_mistake_gets_one_line(folder):
    assert "empty.txt is empty" in error_of(folder, "evaluate", "--file", "empty.txt")


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


@pytest.mark.parametrize(
    "name, value",
    [
        ("row_bytes", 1),
        ("robustness_bytes", -1),
        ("samples", -1),
        ("resamples", 1),
        ("temperature", -0.1),
        ("split", "some"),
        ("group_by", "language"),
        ("max_sources", 0),
    ],
)
def test_bad_settings_name_the_field(name, value):
    with pytest.raises(ValueError, match=f"{name} is"):
        EvaluateConfig(**{name: value})


def test_a_model_that_sees_ahead_is_refused(folder, models_under_test, monkeypatch):
    """The leak gate runs before every number."""
    leaky = models_under_test["flat byte transformer"]
    honest = leaky.model.forward

    def forward(ids):
        next_ids = ids.roll(-1, 1)
        return honest(ids) + torch.nn.functional.one_hot(next_ids, 257) * 5.0

    monkeypatch.setattr(leaky.model, "forward", forward)
    config = EvaluateConfig(robustness_bytes=0, samples=0, resamples=5)
    with pytest.raises(ValueError, match="leak"):
        evaluate.evaluate_model(leaky, DOCUMENTS, {"all": list(range(6))}, config, "fp32")
