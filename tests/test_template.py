"""The baselines: the invariants of the BLT for plain transformers over bytes and over BPE tokens, and their metric."""

import math
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import WORDS, error_of, is_png, output_of, random_bytes, run_command, some_words, tiny_blt
from hypothesis import given, settings
from hypothesis import strategies as st

import template_llm
from blt.attention import AttentionPlan
from blt.corpus import open_corpus
from blt.flops import blt_flops, transformer_flops
from blt.ids import BYTES, documents_of
from blt.loop import RunConfig, read_metrics
from blt.metric import bits_per_byte, evaluate, leak_gate
from blt.ngrams import hash_ngrams
from blt.optimizers import make_optimizers
from blt.patch_rules import PatchConfig, SpaceRule
from blt.records import RunRecord, save_model
from blt.rows import DocumentStream, TrainingRows, evaluation_batches, make_batch
from blt.tokens import BPEVocabulary, train_tokenizer
from entropy_patcher import EntropyPatcher
from llm import MACHINES, LLMConfig
from save_entropy_model import load_blt
from template_llm import (
    SHAPES,
    BPEConfig,
    BPETransformer,
    FlatByteTransformer,
    FlatConfig,
    TemplateConfig,
    load_template,
    space_patch_lengths,
    train_template,
)


def text(n, seed=0):
    """uint8: n words."""
    return np.frombuffer(some_words(n, seed), dtype=np.uint8)


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    return BPEVocabulary(train_tokenizer([text(300, seed) for seed in range(3)] + [random_bytes(300)], 300, path))


@pytest.fixture(
    params=[
        "flat",
        "flat, window beyond the row",
        "bpe",
        "flat with tables",
        "bpe with tables",
        "flat with words",
        "flat with gates",
        "bpe with gates",
        "flat with options",
    ]
)
def model(request, vocabulary):
    torch.manual_seed(0)
    sizes = dict(dim=32, n_layers=2, n_heads=2, hash_rows=64)
    if request.param == "bpe":
        return BPETransformer(BPEConfig(**sizes), vocabulary).eval()
    if request.param == "bpe with tables":
        return BPETransformer(BPEConfig(ngram_sizes=[2, 3], **sizes), vocabulary).eval()
    if request.param == "flat with options":
        options = dict(relu2=True, logit_softcap=5.0, qk_norm=True, ngram_sizes=[2], ngram_dropout=0.5)
        return FlatByteTransformer(FlatConfig(window=8, **sizes, **options)).eval()
    if request.param == "bpe with gates":
        return BPETransformer(BPEConfig(ngram_sizes=[2], gate_ngrams=[2, 3], **sizes), vocabulary).eval()
    if request.param == "flat with gates":
        return FlatByteTransformer(FlatConfig(gate_ngrams=[2, 4], window=8, **sizes)).eval()
    if request.param == "flat with words":
        return FlatByteTransformer(FlatConfig(ngram_sizes=[2], patch_ngrams=[0, 1], window=8, **sizes)).eval()
    ngram_sizes = [2, 3, 8] if request.param == "flat with tables" else []
    window = None if request.param == "flat, window beyond the row" else 8
    return FlatByteTransformer(FlatConfig(ngram_sizes=ngram_sizes, window=window, **sizes)).eval()


def row_of(model, ids):
    """[1, n + 1]: the boundary and a document's ids, all of them inputs."""
    return torch.from_numpy(np.concatenate(([model.vocabulary.boundary], ids)).astype(np.int64))[None]


# Invariants 1 and 2


@torch.no_grad()
def test_no_future_and_prefix_equals_whole(model):
    ids = model.vocabulary.encode(np.concatenate((text(20, 5), random_bytes(30, 6))))
    whole = model(row_of(model, ids))[0]
    assert whole.shape == (len(ids) + 1, model.n_classes) and model.n_classes == model.vocabulary.boundary + 1
    for t in (1, 9, len(ids) // 2, len(ids) - 1):
        changed = ids.copy()
        changed[t:] = (changed[t:].astype(np.int64) + 7) % model.vocabulary.boundary
        with_other_future = model(row_of(model, changed))[0]
        prefix = model(row_of(model, ids[:t]))[0]
        torch.testing.assert_close(with_other_future[: t + 1], whole[: t + 1], atol=1e-4, rtol=0)
        torch.testing.assert_close(prefix[-1], whole[t], atol=1e-4, rtol=0)
        # And the past does matter.
        assert (with_other_future[t + 1] - whole[t + 1]).abs().max() > 1e-3
    assert leak_gate(model, None, text(40, 5)) < 1e-4


def test_leak_gate_sees_attention_without_a_mask(model, monkeypatch):
    def unmasked(self, q, k, v, past=None):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    leak_gate(model, None, text(40, 5))
    monkeypatch.setattr(AttentionPlan, "attend", unmasked)
    with pytest.raises(ValueError, match="leak"):
        leak_gate(model, None, text(40, 5))


def test_leak_gate_changes_tokens_not_bytes(vocabulary):
    """It sees a model that reads the next token, and needs two tokens."""

    class Ahead(BPETransformer):
        def forward(self, ids):
            return super().forward(ids) + F.one_hot(ids.roll(-1, 1), self.n_classes)

    with pytest.raises(ValueError, match="leak"):
        leak_gate(Ahead(BPEConfig(dim=32, n_layers=1), vocabulary), None, text(40, 5))
    assert len(vocabulary.encode(np.frombuffer(b" the", np.uint8))) == 1
    with pytest.raises(ValueError, match="2 tokens"):
        leak_gate(BPETransformer(BPEConfig(dim=32, n_layers=1), vocabulary), None, b" the")


# Invariant 3


@torch.no_grad()
def test_row_alone_equals_row_in_a_batch(model):
    rows = []
    boundary = model.vocabulary.boundary
    for n in (60, 9, 33):
        ids = np.concatenate(([boundary], model.vocabulary.encode(random_bytes(n, n)), [boundary])).astype(np.int64)
        rows.append((ids, None, np.ones(len(ids) - 1, dtype=bool)))
    together = make_batch(rows, row_bytes=64, vocabulary=model.vocabulary)
    batched = model(together.ids[:, :-1])
    for r, row in enumerate(rows):
        n = len(row[0]) - 1
        alone = make_batch([row], row_bytes=n, vocabulary=model.vocabulary)
        torch.testing.assert_close(model(alone.ids[:, :-1])[0], batched[r, :n], atol=1e-4, rtol=0)
    assert together.bytes == 60 + 9 + 33
    padding = together.ids[1, len(rows[1][0]) :]
    assert padding.unique().tolist() == [boundary]


@torch.no_grad()
def test_window():
    """One layer with a window of 8 bytes sees the input itself and 7 before it."""
    torch.manual_seed(0)
    model = FlatByteTransformer(FlatConfig(dim=32, n_layers=1, window=8)).eval()
    ids = row_of(model, random_bytes(40) // 2)
    other = ids.clone()
    other[0, 20] += 1
    differs = (model(ids) - model(other))[0].abs().amax(-1) > 1e-5
    assert differs.nonzero().flatten().tolist() == list(range(20, 28))


def test_document_alone_equals_document_among_others(model):
    documents = [random_bytes(n, n) for n in (50, 20, 31, 5, 1, 44)]
    total = sum(len(d) for d in documents)
    alone = sum(bits_per_byte(model, None, [d], row_bytes=128) * len(d) for d in documents)
    for row_bytes, batch_rows in ((128, 8), (128, 1), (52, 2), (1000, 1)):
        assert bits_per_byte(model, None, documents, row_bytes, batch_rows) * total == pytest.approx(alone, abs=1e-3)


# N-gram hash tables


def test_bytes_have_the_rows_that_they_have_in_the_blt():
    """Flat and BLT share the tables of equal sizes: given the BLT's, the flat model adds the same sums."""
    sizes = dict(ngram_sizes=[2, 3, 8], hash_rows=64)
    blt = tiny_blt(**sizes)
    flat = FlatByteTransformer(FlatConfig(dim=32, n_layers=1, **sizes))
    flat.hash_embedding.load_state_dict(blt.encoder.hash_embedding.state_dict())
    ids = torch.from_numpy(np.concatenate(([256], random_bytes(30), [256], random_bytes(9, 1)))).long()[None]
    documents = documents_of(ids, 256)
    ours = flat.hash_embedding(ids, documents)
    assert torch.equal(ours, blt.encoder.hash_embedding(ids, documents))
    # Before the blocks there is nothing but the sum of both embeddings.
    seen = []
    flat.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    flat(ids)
    assert torch.equal(seen[0], flat.embedding(ids) + ours)


def test_words_are_the_space_patches_of_the_blt():
    """Given the BLT's tables, a flat model adds what the BLT adds with space patches."""
    patcher = EntropyPatcher(None, PatchConfig("space"))
    texts = ["The cat, sat on it.  Twice!", " x", "été: 3 über-long_names\n\tend"]
    documents = [np.frombuffer(text.encode(), np.uint8) for text in texts]
    ids = torch.from_numpy(np.concatenate([np.append(256, each) for each in documents])).long()[None]
    starts = np.concatenate([np.append(True, patcher.starts(document)[:-1]) for document in documents])
    lengths = np.diff(np.flatnonzero(np.append(starts, True)))
    # The row's last patch has the last target as well.
    lengths[-1] += 1
    ours = space_patch_lengths(ids, torch.from_numpy(SpaceRule.is_space_like))
    assert ours[0, : len(lengths)].tolist() == lengths.tolist() and not ours[0, len(lengths) :].any()
    sizes = dict(ngram_sizes=[2], patch_ngrams=[0, 1, 3], hash_rows=64)
    blt = tiny_blt(**sizes)
    flat = FlatByteTransformer(FlatConfig(dim=32, n_layers=1, **sizes))
    flat.hash_embedding.load_state_dict(blt.encoder.hash_embedding.state_dict())
    flat.embedding.load_state_dict(blt.encoder.byte_embedding.state_dict())
    seen = []
    for model in (flat, blt.encoder):
        model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    flat(ids)
    blt(ids, torch.from_numpy(lengths)[None])
    torch.testing.assert_close(*seen)


def test_rows_of_tokens_by_hand(vocabulary):
    """The hash of tokens a, b, c is (a + 4) + (b + 4) p + (c + 4) p ** 2: the boundary counts as 1, before it 0."""
    p = 1_000_000_007
    boundary = vocabulary.boundary
    # 260 is a token here, and so is 256. 1,024 divides 2 ** 64: that the sum wraps changes no row.
    row = [boundary, 260, 256, 7, boundary, 260]
    released = [1, 264, 260, 11, 1, 264]
    wanted = []
    for t in range(6):
        first = 0 if t < 4 else 4
        a, b, c = (released[i] if i >= first else 0 for i in (t - 2, t - 1, t))
        wanted.append([(b + c * p) % 1024, (a + b * p + c * p * p) % 1024])
    ids = torch.tensor([row])
    hashes = hash_ngrams(ids, documents_of(ids, boundary), (2, 3), 1024, boundary)
    assert hashes[0].tolist() == wanted


@pytest.mark.parametrize("kind, sizes, share", [("flat", [2, 3, 4, 6], 0.6), ("bpe", [2, 3], 0.8)])
def test_tables_learn_what_the_last_ids_say(kind, sizes, share, vocabulary, tmp_path):
    """In ten updates on a sentence that repeats: with tables, dense or sparse, the loss falls faster."""

    def bpb(name, **tables):
        settings = dict(training=[repeated], tables=tables, steps=10, eval_every=10)
        model, result, _ = train(kind, vocabulary, tmp_path / name, **settings)
        assert not tables or model.hash_embedding.tables.sparse == (tables["hash_rows"] > 32768)
        return result["val_bpb"]

    repeated = np.frombuffer(b" ".join(WORDS * 6), dtype=np.uint8)
    without = bpb("without")
    for rows in (4096, 32769):
        assert bpb(str(rows), ngram_sizes=sizes, hash_rows=rows) < share * without


def test_rates_follow_from_the_model():
    """The flat model has those of llm.py, the BPE model multiples of them; a given rate is taken as it is."""
    for preset in (["nano", "cpu"], ["large", "h100"]):
        theirs = LLMConfig(preset=preset)
        flat, bpe = (TemplateConfig(model=kind, preset=preset) for kind in ("flat", "bpe"))
        assert (flat.lr, flat.adam_lr) == (theirs.lr, theirs.adam_lr)
        assert (bpe.lr, bpe.adam_lr) == (theirs.lr / 2, theirs.adam_lr * 4)
        assert replace(bpe) == bpe and not {"lr", "adam_lr"} & set(bpe.beaten_presets)
    given = TemplateConfig(model="bpe", lr=0.02, adam_lr=0.001)
    assert (given.lr, given.adam_lr) == (0.02, 0.001)


def test_tables_have_as_many_parameters_as_asked():
    theirs = LLMConfig(preset=["nano", "cpu"])
    wanted = len(theirs.ngram_sizes) * theirs.hash_rows * theirs.encoder_dim
    for kind, sizes in (("flat", [3, 4, 5, 6, 7, 8]), ("flat", [2]), ("bpe", [2, 3])):
        config = TemplateConfig(model=kind, preset=["nano", "cpu"], ngram_sizes=sizes)
        assert len(sizes) * config.hash_rows * config.dim == pytest.approx(wanted, rel=1e-3)
        # A config that is made again from its values is the same.
        assert replace(config) == config
    gated = TemplateConfig(preset=["nano", "cpu"], ngram_sizes=[2, 3], gate_ngrams=[2], table_parameters=288_000)
    assert gated.hash_rows == 1000
    config = TemplateConfig(preset=["nano", "cpu"], ngram_sizes=[2, 3], table_parameters=192_000)
    assert config.hash_rows == 1000 and replace(config, seed=2).hash_rows == 1000
    assert TemplateConfig(ngram_sizes=[2], hash_rows=77).hash_rows == 77


def test_gates_multiply_what_attention_reads():
    """All gates 1 give twice what each layer's attention reads, so what twice its last matrix gives without gates."""
    torch.manual_seed(0)
    sizes = dict(dim=32, n_layers=2, n_heads=2, hash_rows=64)
    gated = FlatByteTransformer(FlatConfig(gate_ngrams=[2, 3], **sizes)).eval()
    plain = FlatByteTransformer(FlatConfig(**sizes)).eval()
    plain.load_state_dict(gated.state_dict(), strict=False)
    ids = torch.tensor([[256, *b"some text"]])
    with torch.no_grad():
        for factor in (1, 2):
            gated.gate_embedding.tables.weight.fill_((factor - 1) / 2)
            for block, of_plain in zip(gated.blocks, plain.blocks):
                of_plain.attention.wo.weight.copy_(factor * block.attention.wo.weight)
            torch.testing.assert_close(gated(ids), plain(ids))


def test_a_record_of_a_model_from_before_there_were_tables(vocabulary, tmp_path):
    model = train("flat", vocabulary, tmp_path, steps=2, eval_every=2)[0]
    old = {name: value for name, value in asdict(model.config).items() if name not in FlatConfig.ADDED_FIELDS}
    record = RunRecord("flat", old, {"row_bytes": 64}, {"dataset": None, "sha256": None})
    save_model(model, tmp_path / "best.pt", record, tmp_path / "model.json")
    read, _ = load_template(tmp_path)
    assert read.config.ngram_sizes == [] and read.hash_embedding is None
    # Without its width it is damaged as before.
    del record.model_config["dim"]
    record.save(tmp_path / "model.json")
    with pytest.raises(ValueError, match="its model_config lacks dim"):
        load_template(tmp_path)


# Bits per byte of tokens


@settings(max_examples=60)
@given(document=st.binary(max_size=80))
def test_tokens_restore_random_bytes(vocabulary, document):
    ids = vocabulary.encode(np.frombuffer(document, np.uint8))
    assert vocabulary.decode(ids) == document
    assert vocabulary.bytes_of_id[ids].sum() == len(document)
    assert all(ids < vocabulary.boundary)


def test_tokens_of_many_documents_are_those_of_each(vocabulary):
    documents = [text(30, 1), random_bytes(0), np.arange(256, dtype=np.uint8), text(90, 2), text(1, 3)]
    together = vocabulary.encode_all(documents, block_bytes=200)
    assert [ids.tolist() for ids in together] == [vocabulary.encode(document).tolist() for document in documents]
    assert [vocabulary.decode(ids) for ids in together] == [document.tobytes() for document in documents]
    # Tokens have several bytes, or this is no BPE.
    assert len(together[3]) < 0.4 * len(documents[3])
    assert len(vocabulary.bytes_of_id) == vocabulary.boundary + 1
    assert vocabulary.bytes_of_id[vocabulary.boundary] == 0


def bpe_model(vocabulary, seed=0):
    torch.manual_seed(seed)
    return BPETransformer(BPEConfig(dim=32, n_layers=1), vocabulary).eval()


@torch.no_grad()
def test_bpe_bits_per_byte_by_hand(vocabulary):
    """-log p of each token after its prefix, and of the end, summed in a loop, is what bits_per_byte says."""
    model = bpe_model(vocabulary)
    document = np.concatenate((text(12, 7), random_bytes(5)))
    ids = vocabulary.encode(document)
    nats = 0.0
    for t, target in enumerate([*ids.tolist(), vocabulary.boundary]):
        nats -= model(row_of(model, ids[:t]))[0, -1].log_softmax(-1)[target].item()
    expected = pytest.approx(nats / math.log(2) / len(document), rel=1e-5)
    assert bits_per_byte(model, None, [document]) == expected
    assert bits_per_byte(model, None, [document.tobytes()], row_bytes=len(ids) + 1) == expected


@torch.no_grad()
@pytest.mark.parametrize("row_ids", [2, 7, 16, 33])
def test_bpe_documents_longer_than_a_row_count_every_token_and_byte_once(vocabulary, row_ids):
    model = bpe_model(vocabulary)
    document = np.concatenate((text(40, 8), random_bytes(40), text(9, 9)))
    ids = [vocabulary.boundary, *vocabulary.encode(document).tolist(), vocabulary.boundary]
    assert len(ids) > 2 * row_ids
    nats = 0.0
    begin = scored_to = 0
    # Windows are half a row apart, the last one as long as there is text.
    while scored_to < len(ids) - 1:
        end = min(begin + row_ids, len(ids) - 1)
        log_p = model(torch.tensor([ids[begin:end]]))[0].log_softmax(-1)
        for t in range(scored_to, end):
            nats -= log_p[t - begin, ids[t + 1]].item()
        scored_to = end
        begin += row_ids // 2
    short = text(3, 1)
    encoded = [vocabulary.encode(document), vocabulary.encode(short)]
    batches = list(evaluation_batches(encoded, None, row_ids, 3, vocabulary=vocabulary))
    result = evaluate(model, batches, torch.device("cpu"))
    assert result["val_bytes"] == len(document) + len(short)
    assert sum(batch.targets for batch in batches) == sum(len(tokens) + 1 for tokens in encoded)
    expected = nats / math.log(2) / len(document)
    assert bits_per_byte(model, None, [document], row_bytes=row_ids) == pytest.approx(expected, rel=1e-5)


def test_rows_of_bytes_become_rows_of_tokens(vocabulary):
    """row_bytes means bytes for every model: rows of tokens are shorter by the bytes a token has."""
    longer = BPEVocabulary(vocabulary.tokenizer, bytes_per_token=4.0)
    assert (longer.row_ids(64), vocabulary.row_ids(64), BYTES.row_ids(64), BYTES.row_ids(1)) == (16, 64, 64, 1)
    model = bpe_model(vocabulary)
    document = text(60, 4)
    want = bits_per_byte(model, None, [document], row_bytes=16)
    model.vocabulary = longer
    assert bits_per_byte(model, None, [document], row_bytes=64) == want


def test_training_rows_of_tokens_hold_every_token_and_byte_once(vocabulary):
    documents = [text(30, 1), random_bytes(17), random_bytes(0), text(9, 2)]
    ids = vocabulary.encode_all(documents)
    stream = DocumentStream.of_documents(ids, vocabulary)
    whole = np.concatenate([*(np.append(vocabulary.boundary, d) for d in ids), [vocabulary.boundary]])
    assert stream.ids(0, len(stream)).tolist() == whole.tolist()
    assert stream.total_bytes == sum(map(len, documents))
    rows = TrainingRows(stream, 11)
    batches = [rows.batch([number]) for number in range(len(rows))]
    targets = [i for batch in batches for i in batch.ids[0, 1:][batch.is_scored[0]].tolist()]
    assert targets == whole[1:].tolist()
    assert sum(batch.bytes for batch in batches) == stream.total_bytes
    assert sum(batch.targets for batch in batches) == len(whole) - 1


# Training


def train(kind, vocabulary, folder, training=None, stream_hook=None, tables=None, **changes):
    """Train a small model on words: (model, what training returned, validation documents)."""
    torch.manual_seed(0)
    if kind == "flat":
        model = FlatByteTransformer(FlatConfig(dim=32, n_layers=1, window=16, **(tables or {})))
    else:
        model = BPETransformer(BPEConfig(dim=32, n_layers=1, **(tables or {})), vocabulary)
    training = training or [text(80, seed) for seed in range(8)]
    stream = DocumentStream.of_documents([model.vocabulary.encode(d) for d in training], model.vocabulary)
    if stream_hook:
        stream_hook(stream)
    settings = dict(
        row_bytes=64,
        batch_rows=4,
        steps=20,
        eval_every=10,
        log_every=5,
        device="cpu",
        precision="fp32",
        model=kind,
        output=str(folder),
    )
    validation = training[:1] if len(training) == 1 else [text(40, 100), text(3, 101)]
    return model, train_template(model, stream, validation, TemplateConfig(**(settings | changes))), validation


@pytest.mark.parametrize("kind", ["flat", "bpe"])
def test_one_batch_overfits(kind, vocabulary, tmp_path):
    model, result, validation = train(kind, vocabulary, tmp_path, [text(12)], steps=120, batch_rows=1, eval_every=120)
    assert result["val_bpb"] < 0.25
    assert bits_per_byte(model, None, validation, row_bytes=64) == pytest.approx(result["val_bpb"], rel=1e-4)


@pytest.mark.parametrize("kind", ["flat", "bpe"])
def test_stopped_and_resumed_equals_straight_through(kind, vocabulary, tmp_path):
    def run(name, **changes):
        train(kind, vocabulary, tmp_path / name, **changes)
        state = torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        return state, [(line["step"], line.get("loss"), line.get("val_bpb")) for line in lines]

    class Stop(Exception):
        pass

    def stop_later(stream):
        original = stream.ids
        calls = []

        def ids(begin, end):
            calls.append(begin)
            # These are rows of step 15 of 20.
            if len(calls) > 60:
                raise Stop
            return original(begin, end)

        stream.ids = ids

    straight, losses = run("straight")
    with pytest.raises(Stop):
        train(kind, vocabulary, tmp_path / "stopped", stream_hook=stop_later)
    resumed, losses_resumed = run("stopped", resume=True)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert losses == losses_resumed


@pytest.mark.parametrize("kind", ["flat", "bpe"])
def test_leak_stops_training(kind, tmp_path, monkeypatch, vocabulary):
    def mean_of_all(self, q, k, v, past=None):
        return v.mean(1, keepdim=True).expand_as(v)

    monkeypatch.setattr(AttentionPlan, "attend", mean_of_all)
    with pytest.raises(ValueError, match="leak"):
        train(kind, vocabulary, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_parameters_and_their_optimizers(model):
    parts = model.parameters_by_part()
    assert set(parts) == {"hash embedding", "embedding", "layers", "head"}
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    assert parts["hash embedding"] == model.config.n_tables * 64 * 32
    muon, adam, *of_tables = make_optimizers(model, RunConfig())
    assert len(of_tables) == (1 if model.config.n_tables else 0)
    matrices_of_adam = [p for group in adam.param_groups for p in group["params"] if p.dim() == 2]
    assert sum(p.numel() for p in matrices_of_adam) == parts["embedding"] + parts["head"]
    # q, k, v, o, w1, w2 and w3 of two layers; squared ReLU has no w3
    assert len(muon.param_groups[0]["params"]) == (6 if model.config.relu2 else 7) * 2
    # Two FLOPs a weight: with either feed-forward a byte costs what `transformer_flops` says.
    matrices = sum(p.numel() for p in muon.param_groups[0]["params"])
    assert 2 * matrices == transformer_flops(32, 2, model.n_classes, 64)["layers"]


# Sizes and presets


@pytest.mark.parametrize("size", SHAPES["flat"])
def test_a_byte_costs_what_it_costs_in_llm_py(size):
    table = Path(template_llm.__file__).read_text()
    row = re.search(rf"#   {size} +([\d.]+) +([\d.]+) +([\d.]+)", table)
    bytes_per_token = 3.57
    preset = [size, "cpu" if size == "nano" else "h100"]
    blt = LLMConfig(preset=preset)
    flat = TemplateConfig(model="flat", preset=preset)
    bpe = TemplateConfig(model="bpe", preset=preset)
    T = blt.row_bytes
    costs = [
        sum(blt_flops(blt, 4.5, T).values()),
        sum(transformer_flops(flat.dim, flat.n_layers, 257, T, flat.window).values()),
        sum(transformer_flops(bpe.dim, bpe.n_layers, 4097, T / bytes_per_token).values()) / bytes_per_token,
    ]
    assert all(abs(cost / costs[0] - 1) < 0.05 for cost in costs), costs
    # The table in the file has them in millions of multiply-adds, with three or four digits.
    for cost, shown in zip(costs, row.groups()):
        digits = len(shown.split(".")[1])
        assert f"{cost / 2e6:.{digits}f}" == shown, costs


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("size", SHAPES["flat"])
def test_runs_are_those_of_llm_py(size, machine):
    theirs = LLMConfig(preset=[size, machine])
    ours = TemplateConfig(preset=[size, machine])
    for field in fields(RunConfig):
        assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert (ours.dim, ours.n_layers, ours.window) == SHAPES["flat"][size]


def test_settings():
    flat = TemplateConfig(preset=["medium", "h100"])
    assert (flat.dim, flat.window, flat.output) == (320, 512, "checkpoints_flat")
    assert FlatConfig(320, 7) == FlatConfig() and BPEConfig(512, 10) == BPEConfig() and BPEConfig().window is None
    bpe = TemplateConfig(model="bpe", preset=["small", "cpu"])
    assert (bpe.dim, bpe.n_layers, bpe.window, bpe.output) == (384, 8, None, "checkpoints_bpe")
    # What is given stays.
    given = TemplateConfig(dim=64, n_layers=2, window=9, output="x")
    assert (given.dim, given.n_layers, given.window, given.output) == (64, 2, 9, "x")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(dim=33), "32|33"),
        (dict(dim=0), "dim is 0"),
        (dict(n_layers=0), "n_layers is 0"),
        (dict(dim=64, n_heads=3), "n_heads = 6"),
        (dict(window=0), "window is 0"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(model="blt"), "flat or bpe"),
        (dict(preset=["huge"]), "unknown preset 'huge'"),
        (dict(vocab_size=255), "vocab_size is 255"),
        (dict(tokenizer_bytes=0), "tokenizer_bytes is 0"),
        (dict(steps=0), "steps is 0"),
        (dict(ngram_sizes=[1]), r"ngram_sizes is \[1\]"),
        (dict(ngram_sizes=[3, 3]), "different whole numbers"),
        (dict(patch_ngrams=[1, 1]), "different whole numbers"),
        (dict(model="bpe", patch_ngrams=[0]), "need --model flat"),
        (dict(ngram_sizes=[3], hash_rows=0), "hash_rows is 0"),
        (dict(ngram_sizes=[3], hash_rows=9, table_parameters=999), "hash_rows or table_parameters"),
        (dict(gate_ngrams=[1]), r"gate_ngrams is \[1\]"),
        (dict(table_parameters=999), "table_parameters needs --ngram_sizes"),
        (dict(ngram_sizes=[3], table_parameters=0), "table_parameters is 0"),
    ],
    ids=str,
)
def test_wrong_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        TemplateConfig(**changes)


def test_errors(model, vocabulary, tmp_path):
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        model(torch.zeros(5, dtype=torch.int64))
    stream_of_bytes = DocumentStream.of_documents([text(9)])
    with pytest.raises(ValueError, match="not of the model's ids"):
        train_template(bpe_model(vocabulary), stream_of_bytes, [text(9, 1)], TemplateConfig(output=str(tmp_path)))
    with pytest.raises(ValueError, match="at least one byte"):
        bits_per_byte(model, None, [b""])
    with pytest.raises(FileNotFoundError, match="python template_llm.py"):
        load_template(tmp_path)
    broken = BPEVocabulary(vocabulary.tokenizer)
    broken.bytes_of_id = broken.bytes_of_id * 2
    with pytest.raises(ValueError, match="loses bytes"):
        broken.encode(text(9))


# The script

TINY_FLAGS = [
    *"--dim 32 --n_layers 1 --row_bytes 128 --batch_rows 4 --steps 12 --eval_every 6 --vocab_size 400".split(),
    *"--val_bytes 20000 --max_bytes 60000 --device cpu".split(),
]


@pytest.mark.parametrize("kind", ["flat", "bpe"])
def test_script(kind, pipeline, tmp_path):
    (tmp_path / "data_cache").symlink_to(pipeline[0] / "data_cache")
    flags = ["--model", kind, *TINY_FLAGS]
    if kind == "bpe":
        # So many rows have sparse gradients.
        flags += ["--ngram_sizes", 2, 3, "--hash_rows", 70_000, "--zero_init"]
    printed = output_of(tmp_path, "template_llm", *flags)
    assert f"(hash embedding {2 * 70_000 * 32 if kind == 'bpe' else 0:,}, embedding" in printed
    assert "leak gate passed" in printed and ("bytes a token" in printed) == (kind == "bpe")
    line = r"val \d\.\d+ bpb over [\d,]+ bytes of held-out text .*gzip -9 \d\.\d+, xz -9 \d\.\d+"
    assert re.search(line, printed)
    output = tmp_path / f"checkpoints_{kind}"
    assert is_png(output / "curves.png")
    assert (output / "tokenizer.json").exists() == (kind == "bpe")
    model, record = load_template(output)
    assert record == RunRecord.load(output / "model.json") and not model.training
    assert record.kind == kind and len(record.corpus["sha256"]) == 64 and record.settings["vocab_size"] == 400

    corpus = open_corpus("sample", cache_dir=tmp_path / "data_cache")
    validation = [corpus.document(number) for number in corpus.documents("validation", 20000)]
    bpb = bits_per_byte(model, None, validation, record.settings["row_bytes"])
    # The model is read in fp32; training may have scored it in bf16.
    assert bpb == pytest.approx(record.result["val_bpb"], rel=2e-3)
    assert record.result["val_bytes"] == sum(map(len, validation))

    assert "at step 12" in output_of(tmp_path, "template_llm", *flags, "--resume")
    assert RunRecord.load(output / "model.json").result["val_bpb"] == record.result["val_bpb"]
    assert "dim: 32 then, 48 now" in error_of(tmp_path, "template_llm", *flags, "--resume", "--dim", 48)
    assert "without --resume" in error_of(tmp_path, "template_llm", *flags, "--resume", "--output", "none")

    with pytest.raises(ValueError, match="not a BLT"):
        load_blt(output)
    record.model_config["dim"] = 64
    record.save(output / "model.json")
    with pytest.raises(ValueError, match="train it again"):
        load_template(output)


def test_as_a_command(pipeline, tmp_path):
    (tmp_path / "data_cache").symlink_to(pipeline[0] / "data_cache")
    assert "wrote checkpoints_bpe/best.pt" in run_command(tmp_path, "template_llm", "--model", "bpe", *TINY_FLAGS)
