"""convert_hf.py: our logits are transformers' logits. The proof that blt_model.py is a Byte Latent Transformer.

All weights are random, the norms' too, so that no term of the model can be missing unseen.
"""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, BltConfig, BltForCausalLM

import blt_model
import llm
import train_blt
from blt import loop
from blt.config import field_comments, parse_config
from blt.corpus import open_corpus
from blt.entropies import entropy_of
from blt.files import model_hash, save_weights, write_json
from blt.ids import BOUNDARY, documents_of
from blt.layers import feed_forward_width
from blt.loop import read_metrics
from blt.metric import bits_per_byte, target_losses
from blt.patch_rules import PatchConfig, patch_starts
from blt.segments import check_patch_lengths
from blt_model import BLTConfig, BLTModel, hash_ngrams
from convert_hf import (
    INPUT_ROWS,
    OUTPUT_ROWS,
    UNKNOWN_CLASSES,
    ConvertConfig,
    entropy_model_from_transformers,
    from_transformers,
    hf_inputs,
    main,
    to_hf_ids,
    to_transformers,
    write_for_transformers,
    write_from_transformers,
)
from entropy_llm import EntropyConfig, MinimalLLM
from entropy_patcher import EntropyPatcher
from generate import generate
from save_entropy_model import load_blt, save_entropy_model
from train_blt import BLTRunConfig

TOLERANCE = 1e-4  # measured: at most 5e-6 at 117 ids, 8e-6 at 300 and 1600, on logits up to 6
CHARACTERS = [
    *range(0x800),
    *range(0x800, 0xD800, 0x40),
    *range(0xE000, 0x110000, 0x40),
]  # in UTF-8 they take all bytes it has
INPUT_CLASSES, OUTPUT_CLASSES = [*range(4, 260), 1], [*range(4, 260), 2]  # transformers' numbers of our ids and classes
TEXT = Path(blt_model.__file__).read_bytes()

# name: differences from the smallest model
FAMILIES = {
    "k2": {},
    "k4": dict(cross_attn_k=4, global_dim=128),
    "k2, projection into the latent width": dict(global_dim=48, global_heads=3),
    "k4, projection, 2 encoder and 2 decoder layers": dict(
        cross_attn_k=4, global_dim=96, global_layers=2, encoder_layers=2, decoder_layers=2
    ),
    "k2, 3 decoder layers, window 32": dict(decoder_layers=3, window=32),
    "k1, cross-attention in the first decoder layer only": dict(
        cross_attn_k=1, global_dim=32, decoder_layers=3, cross_attn_all_layers_decoder=False
    ),
    "k4, other heads in each part, odd window, other n-grams": dict(
        cross_attn_k=4, encoder_heads=4, decoder_heads=1, global_dim=128, window=21, ngram_sizes=[2, 5], hash_rows=1009
    ),
    "window beyond the row, other theta and epsilon": dict(window=512, rope_theta=1000.0, norm_eps=1e-3),
    "cross-attention in all of one encoder layers": dict(cross_attn_all_layers_encoder=True),
    "odd feed-forward widths": dict(encoder_ffn_dim=77, global_ffn_dim=513, decoder_ffn_dim=1),
    "feed-forward widths in encoder only": dict(encoder_ffn_dim=85),
}
SMALLEST = dict(
    encoder_dim=32, encoder_heads=2, hash_rows=500, global_layers=1, global_dim=64, global_heads=2,
    decoder_layers=1, decoder_dim=32, decoder_heads=2, window=16,
)  # fmt: skip


families = pytest.mark.parametrize("difference", FAMILIES.values(), ids=FAMILIES.keys())


def config_of(**difference):
    return BLTConfig(**(SMALLEST | difference))


def randomize(model, seed=0):
    """Norms from 0.5 to 1.5, all else normal of std fan_in ** -0.5; biases do not exist."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    return model.eval()


def hf_part(dim, heads, layers, ffn_dim, c, **more):
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    return dict(
        hidden_size=dim, num_attention_heads=heads, num_hidden_layers=layers, rope_parameters=rope,
        intermediate_size=ffn_dim or feed_forward_width(dim), rms_norm_eps=c.norm_eps, **more,
    )  # fmt: skip


def random_hf_model(seed=0, **difference):
    """A `BltForCausalLM` written down independently of convert_hf.py, with a patcher of window 16."""
    c = config_of(**difference)
    cross = dict(cross_attn_k=c.cross_attn_k, hidden_size_global=c.global_dim)
    config = BltConfig(
        encoder_config=hf_part(32, c.encoder_heads, c.encoder_layers, c.encoder_ffn_dim, c, cross_attn_all_layers=c.cross_attn_all_layers_encoder, **cross),
        global_config=hf_part(c.global_dim, c.global_heads, c.global_layers, c.global_ffn_dim, c),
        decoder_config=hf_part(32, c.decoder_heads, c.decoder_layers, c.decoder_ffn_dim, c, cross_attn_all_layers=c.cross_attn_all_layers_decoder, **cross),
        patcher_config=dict(
            hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=256, sliding_window=16
        ),
        patching_threshold=4.9,
        local_attention_window_len=c.window,
        cross_attn_k=c.cross_attn_k,
        encoder_hash_byte_group_size=c.ngram_sizes,
        encoder_hash_byte_group_vocab=c.hash_rows,
    )  # fmt: skip
    return randomize(BltForCausalLM(config), seed)


def random_patch_lengths(rows, n_ids, seed=0):
    """int64 [rows, P]: 1, then lengths from 1 to 9 that sum to n_ids; rows with fewer patches have zeros on the right."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        starts = np.unique(np.concatenate(([0, 1], 1 + rng.integers(1, 10, n_ids).cumsum())))
        made.append(np.diff(starts[starts < n_ids], append=n_ids))
    lengths = np.zeros((rows, max(map(len, made))), dtype=np.int64)
    for row, values in zip(lengths, made):
        row[: len(values)] = values
    lengths = torch.from_numpy(lengths)
    check_patch_lengths(lengths, n_ids)
    return lengths


def random_ids(rows, T, seed=0):
    """int64 [rows, T]: a boundary, then text in the first row and any bytes in the others."""
    ids = torch.randint(0, 256, (rows, T), generator=torch.Generator().manual_seed(seed))
    ids[0] = torch.tensor(list(TEXT[:T]))
    ids[:, 0] = BOUNDARY
    return ids


def hf_ids(ids):
    return torch.tensor(INPUT_CLASSES)[ids]


@torch.no_grad()
def compare(model, hf_model, rows=2, T=117, seed=0):
    """Largest difference of logits, for the same ids and patches; both depend on the patches."""
    ids, lengths = random_ids(rows, T, seed), random_patch_lengths(rows, T + 1, seed)
    theirs = hf_model(input_ids=hf_ids(ids), patch_lengths=lengths, use_cache=False).logits[..., OUTPUT_CLASSES]
    ours = model(ids, lengths)
    other = model(ids, random_patch_lengths(rows, T + 1, seed + 1))
    assert ours.std() > 0.5 and (other - ours).abs().max() > 0.1, "the comparison would show nothing"
    difference = (ours - theirs).abs().max().item()
    print(f"largest difference {difference:.1e} on logits up to {theirs.abs().max():.1f}, {rows} x {T} ids")
    return difference


def test_ids_and_classes_are_numbered_as_in_transformers():
    ids = torch.arange(257)[None]
    assert torch.equal(to_hf_ids(ids), hf_ids(ids))
    assert (INPUT_ROWS, OUTPUT_ROWS) == (INPUT_CLASSES, OUTPUT_CLASSES)


# ---------------------------------------------------------------------------------------------------------------------
# Logits


@families
@pytest.mark.parametrize("rows", [1, 2])
def test_from_transformers_gives_the_same_logits(difference, rows):
    hf_model = random_hf_model(**difference)
    model = from_transformers(hf_model)
    assert model.config == config_of(**difference)
    assert not model.training
    assert compare(model, hf_model, rows) <= TOLERANCE


@families
def test_to_transformers_gives_the_same_logits(difference):
    model = randomize(BLTModel(config_of(**difference)))
    hf_model = to_transformers(model, None)
    assert not hf_model.training and hf_model.model.patcher is None
    assert compare(model, hf_model) <= TOLERANCE


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 300, 1600])
def test_logits_agree_for_rows_of_any_length(T):
    hf_model = random_hf_model(encoder_layers=2, decoder_layers=2)
    model = from_transformers(hf_model)
    ids, lengths = random_ids(2, T), random_patch_lengths(2, T + 1)
    with torch.no_grad():
        theirs = hf_model(input_ids=hf_ids(ids), patch_lengths=lengths, use_cache=False).logits[..., OUTPUT_CLASSES]
        assert (model(ids, lengths) - theirs).abs().max() <= TOLERANCE


def test_lengths_that_transformers_makes_mean_the_same():
    """Lengths over T ids with a last 0 (the next byte opens a patch) or without: ours cover T + 1."""
    hf_model = random_hf_model()
    model = from_transformers(hf_model)
    ids = random_ids(1, 20)
    for theirs, ours in (([1, 9, 10], [1, 9, 11]), ([1, 9, 10, 0], [1, 9, 10, 1])):
        with torch.no_grad():
            expected = hf_model(input_ids=hf_ids(ids), patch_lengths=torch.tensor([theirs]), use_cache=False).logits
            assert (model(ids, torch.tensor([ours])) - expected[..., OUTPUT_CLASSES]).abs().max() <= TOLERANCE


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def small_entropy_model(seed=1, **more):
    return randomize(
        MinimalLLM(EntropyConfig(**(dict(d_model=24, n_heads=3, n_layers=2, max_seq_len=16) | more))), seed
    )


def assert_same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@families
def test_round_trip_of_ours_is_exact(difference):
    model, entropy_model = randomize(BLTModel(config_of(**difference))), small_entropy_model(rope_theta=500.0)
    hf_model = to_transformers(model, entropy_model)
    assert_same_weights(from_transformers(hf_model), model)
    assert_same_weights(entropy_model_from_transformers(hf_model), entropy_model)
    assert from_transformers(hf_model).config == model.config
    assert entropy_model_from_transformers(hf_model).config == entropy_model.config


@families
def test_round_trip_of_theirs_is_exact_where_rows_have_a_counterpart(difference):
    hf_model = random_hf_model(**difference)
    again = to_transformers(
        from_transformers(hf_model), entropy_model_from_transformers(hf_model), PatchConfig(entropy_threshold=4.9)
    )
    before, after = hf_model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    kept_rows = {
        "model.local_encoder.embed_tokens.weight": INPUT_CLASSES,
        "lm_head.weight": OUTPUT_CLASSES,
        "model.patcher.embed_tokens.weight": INPUT_CLASSES,
        "model.patcher.lm_head.weight": list(range(4, 260)),
    }
    for name, weight in before.items():
        rows = kept_rows.get(name, list(range(len(weight))))
        assert torch.equal(weight[rows], after[name][rows]), name
    for name in ("model.local_encoder.embed_tokens.weight", "lm_head.weight", "model.patcher.embed_tokens.weight"):
        dropped = sorted(set(range(260)) - set(kept_rows[name]))
        assert len(dropped) == 3 and not after[name][dropped].any()
    for field in ("local_attention_window_len", "patching_threshold", "encoder_hash_byte_group_vocab"):
        assert getattr(again.config, field) == getattr(hf_model.config, field)


def test_copies_do_not_share_memory():
    model = BLTModel(config_of())
    hf_model = to_transformers(model)
    torch.nn.init.zeros_(hf_model.model.encoder_hash_tok_embedding.weight)
    assert model.encoder.hash_embedding.tables.weight.any()


def test_dtype_is_kept_and_rotary_frequencies_stay_exact():
    model = randomize(BLTModel(config_of())).bfloat16()
    hf_model = to_transformers(model)
    assert {p.dtype for p in hf_model.parameters()} == {torch.bfloat16}
    assert hf_model.model.local_encoder.rotary_emb.inv_freq.dtype == torch.float32
    assert_same_weights(from_transformers(hf_model), model)


def test_a_saved_model_comes_back(tmp_path):
    model = randomize(BLTModel(config_of(cross_attn_k=4, global_dim=96)))
    to_transformers(model, small_entropy_model()).save_pretrained(tmp_path)
    hf_model = BltForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(from_transformers(hf_model), model)
    assert compare(model, hf_model) <= TOLERANCE


def test_a_weight_too_many_or_too_few_raises():
    model, hf_model = BLTModel(config_of()), random_hf_model()
    model.extra = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="our model.*unexpected.*extra"):
        to_transformers(model)
    hf_model.model.extra = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="transformers model.*unexpected.*model.extra"):
        from_transformers(hf_model)
    hf_model = random_hf_model()
    del hf_model.model.local_decoder.norm
    with pytest.raises(ValueError, match="missing.*local_decoder.norm"):
        from_transformers(hf_model)
    hf_model.model.patcher.layers[1].extra = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="transformers' patcher.*unexpected.*layers.1.extra"):
        entropy_model_from_transformers(hf_model)


def test_released_sizes_fit():
    """BLT-1B's shapes, without memory: 4.6 billion parameters, of which 3.07 billion hash embeddings."""
    with torch.device("meta"):
        hf_model = BltForCausalLM(BltConfig(encoder_config=dict(intermediate_size=2816)))
        model = from_transformers(hf_model)
        entropy_model = entropy_model_from_transformers(hf_model)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    dropped = 6 * 1024 + (3 + 4) * 768  # rows of embeddings and heads without a counterpart
    assert count(model) + count(entropy_model) + dropped == count(hf_model) == 4_633_391_872
    assert model.parameters_by_part()["hash embedding"] == 6 * 500002 * 1024
    assert (model.config.global_layers, model.config.window, entropy_model.config.max_seq_len) == (25, 512, 512)


# ---------------------------------------------------------------------------------------------------------------------
# Hash


def test_ngram_hashes_are_the_released_ones():
    """Rows of tables of 500,002 rows for b"Hello, BLT!", as the released code and transformers compute them."""
    golden = {
        3: [443987, 124875, 393970, 386145, 358223, 190185, 141703, 484917, 321258, 125336, 233820, 269147],
        4: [437197, 433869, 117936, 254402, 246577, 30240, 114083, 12253, 448125, 463424, 72068, 41565],
        5: [123201, 168913, 27892, 170862, 307328, 265602, 426354, 435293, 408271, 269141, 270044, 112975],
        6: [166353, 160907, 92310, 405250, 48218, 280239, 83968, 362502, 281889, 304381, 189065, 372545],
        7: [34117, 338221, 15158, 281878, 94816, 340137, 303839, 101668, 233170, 90223, 385651, 240882],
        8: [172383, 205585, 456240, 129346, 299568, 322649, 430431, 246559, 449350, 287162, 409265, 97250],
    }
    ids = torch.tensor([[BOUNDARY, *b"Hello, BLT!"]])
    hashes = hash_ngrams(ids, documents_of(ids, BOUNDARY), list(golden), 500002)
    assert {n: hashes[0, :, i].tolist() for i, n in enumerate(golden)} == golden


# ---------------------------------------------------------------------------------------------------------------------
# Entropies and patches


@pytest.fixture(scope="module")
def trained_entropy_model():
    """A few seconds of training: bytes that UTF-8 never holds become unlikely."""
    torch.manual_seed(0)
    model = MinimalLLM(EntropyConfig(d_model=32, n_heads=2, n_layers=1, max_seq_len=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    text = torch.tensor(list(TEXT))
    for _ in range(60):
        ids = text[torch.randint(0, len(text) - 129, (16, 1)) + torch.arange(129)]
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def hf_patcher(hf_model, text):
    """Entropies [N + 1] (for each byte and the end) and logits [N + 1, 260] of the patcher."""
    ids = hf_ids(torch.tensor([[BOUNDARY, *text]]))
    entropies, _, logits = hf_model.model.patcher(ids, patch_size=4, threshold=1.0)
    return entropies[0], logits[0]


def test_patcher_becomes_our_entropy_model():
    text = TEXT[:150]
    hf_model = random_hf_model()
    entropy_model = entropy_model_from_transformers(hf_model)
    theirs, logits = hf_patcher(hf_model, text)
    with torch.no_grad():
        ours = entropy_model(torch.tensor([[BOUNDARY, *text]]))[0]
    assert (ours - logits[:, 4:]).abs().max() <= 1e-5
    H_bytes = torch.from_numpy(EntropyPatcher(entropy_model).entropies(text))
    assert (H_bytes - entropy_of(logits[:-1, 4:])).abs().max() <= 1e-5
    # What the four other classes add: the docstring's formula, and its figure.
    q = logits.softmax(-1)[:-1, :4].sum(-1)
    H_two = -(q * q.log() + (1 - q) * (1 - q).log())
    H_all = H_two + (1 - q) * H_bytes + q * entropy_of(logits[:-1, :4])
    assert (H_all - theirs[:-1]).abs().max() <= 1e-5
    assert f"{math.log(260) - math.log(256):.3f}" == "0.016"


def test_our_entropy_model_becomes_the_patcher(trained_entropy_model):
    text = TEXT[1000:1400]
    hf_model = to_transformers(BLTModel(config_of()), trained_entropy_model)
    theirs, logits = hf_patcher(hf_model, text)
    with torch.no_grad():
        ours = trained_entropy_model(torch.tensor([[BOUNDARY, *text]]))[0]
    assert (ours - logits[:, 4:]).abs().max() <= 1e-5
    H, log_p = entropy_of(ours), ours.log_softmax(-1)
    impossible = [byte for byte in range(256) if not any(byte in chr(c).encode() for c in CHARACTERS)]
    p = log_p[:, impossible].mean(-1).exp()
    expected = (H + 4 * p * -p.log()) / (1 + 4 * p) + (1 + 4 * p).log()
    assert (expected - theirs).abs().max() <= 1e-5
    print(
        f"entropies differ by at most {(theirs - H).abs().max():.1e}, on average {(theirs - H).abs().mean():.1e} nats"
    )
    assert (theirs - H).abs().mean() < 2e-3 and (theirs - H).abs().max() < 0.05


def clear_threshold(H):
    """A threshold in the widest gap between the middle values of H."""
    values = np.sort(H)[len(H) // 4 : -len(H) // 4]
    i = int(np.diff(values).argmax())
    return float(values[i] + values[i + 1]) / 2


def test_own_patches_of_transformers_are_those_of_our_patcher(trained_entropy_model):
    """patch_lengths=None: transformers runs its patcher; we pass what EntropyPatcher finds at the same threshold."""
    model = randomize(BLTModel(config_of(decoder_layers=2)))
    for text in (TEXT[:100], TEXT[3000:3201], b"", b"x", b"ab"):
        H = EntropyPatcher(trained_entropy_model)._entropies_with_end([np.frombuffer(text, np.uint8)])[0]
        threshold = clear_threshold(H) if len(text) > 10 else 2.0
        patcher = EntropyPatcher(trained_entropy_model, PatchConfig(entropy_threshold=threshold))
        hf_model = to_transformers(model, trained_entropy_model, patcher.config)
        theirs = hf_patcher(hf_model, text)[0].numpy()
        assert ((theirs > threshold) == (H > threshold)).all(), "260 and 256 classes must agree here"
        ids = torch.tensor([[BOUNDARY, *text]])
        starts = np.flatnonzero(np.concatenate(([True], patcher.starts(text))))
        lengths = torch.from_numpy(np.diff(starts, append=len(text) + 2))[None]
        check_patch_lengths(lengths, len(text) + 2)
        assert len(text) <= 10 or 0.2 * len(text) < lengths.shape[1] < 0.8 * len(text)
        with torch.no_grad():
            theirs = hf_model(input_ids=hf_ids(ids)).logits[..., OUTPUT_CLASSES]  # use_cache: from its config
            assert (model(ids, lengths) - theirs).abs().max() <= TOLERANCE


def test_rule_of_transformers_is_ours():
    """Batch of two, with their random patcher's own entropies: our global rule gives the patches they use."""
    hf_model = random_hf_model()
    model = from_transformers(hf_model)
    ids = random_ids(2, 118)
    H = torch.stack([hf_patcher(hf_model, row[1:].tolist())[0] for row in ids]).numpy()
    hf_model.config.patching_threshold = float(np.median(H)) + 1e-5
    lengths = []
    for row in H:
        starts = np.concatenate(([True], patch_starts(row, "global", hf_model.config.patching_threshold)))
        lengths.append(torch.from_numpy(np.diff(np.flatnonzero(starts), append=len(starts))))
    lengths = torch.nn.utils.rnn.pad_sequence(lengths, batch_first=True)
    check_patch_lengths(lengths, 119)
    with torch.no_grad():
        theirs = hf_model(input_ids=hf_ids(ids), use_cache=False).logits[..., OUTPUT_CLASSES]
        assert (model(ids, lengths) - theirs).abs().max() <= TOLERANCE


def test_transformers_generates_what_our_model_does(trained_entropy_model):
    """Greedy, without a cache: the converted model works as it comes out, and emits no class that we do not know."""
    model = randomize(BLTModel(config_of(decoder_layers=2)))
    patcher = EntropyPatcher(trained_entropy_model, PatchConfig(entropy_threshold=2.0))
    hf_model = to_transformers(model, trained_entropy_model, patcher.config)
    assert hf_model.generation_config.suppress_tokens == UNKNOWN_CLASSES == [0, 1, 3]
    prompt = TEXT[:40]
    ids = hf_ids(torch.tensor([[BOUNDARY, *prompt]]))
    made = hf_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    text = prompt
    with torch.no_grad():
        for _ in range(12):
            starts = np.flatnonzero(np.concatenate(([True], patcher.starts(text))))
            lengths = torch.from_numpy(np.diff(starts, append=len(text) + 2))[None]
            best = model(torch.tensor([[BOUNDARY, *text]]), lengths)[0, -1].argmax().item()
            if best == BOUNDARY:
                break
            text += bytes([best])
    assert [i - 4 for i in made[0, 1:].tolist() if i >= 4] == list(text) and len(text) > len(prompt)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be converted


@pytest.mark.parametrize(
    "difference, message",
    [
        (dict(qk_norm=True), "BLTConfig.qk_norm is True"),
        (dict(pooling="mean"), "BLTConfig.pooling is 'mean'"),
        (dict(decoder_dim=64), "BLTConfig.decoder_dim is 64"),
        (dict(ngram_sizes=[]), "ngram_sizes is empty"),
        (dict(encoder_layers=2, cross_attn_all_layers_encoder=True), "cross_attn_all_layers_encoder is True"),
    ],
)
def test_what_transformers_cannot_express_raises(difference, message):
    with pytest.raises(ValueError, match=message):
        to_transformers(BLTModel(config_of(**difference)))


@pytest.mark.parametrize(
    "rule, message",
    [
        (dict(method="monotonic"), "PatchConfig.method is 'monotonic'"),
        (dict(min_patch_size=2), "PatchConfig.min_patch_size is 2"),
        (dict(max_patch_size=8), "PatchConfig.max_patch_size is 8"),
    ],
)
def test_rules_that_transformers_lacks_raise(rule, message):
    with pytest.raises(ValueError, match=message):
        to_transformers(BLTModel(config_of()), small_entropy_model(), PatchConfig(**rule))


def test_a_rule_without_an_entropy_model_raises():
    with pytest.raises(ValueError, match="no entropy_model"):
        to_transformers(BLTModel(config_of()), None, PatchConfig())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: setattr(c.encoder_config, "num_key_value_heads", 1), "blt_local_encoder.num_key_value_heads is 1"),
        (lambda c: setattr(c.decoder_config, "rms_norm_eps", 1e-6), "blt_local_decoder.rms_norm_eps is 1e-06"),
        (lambda c: setattr(c.decoder_config, "hidden_act", "gelu"), "blt_local_decoder.hidden_act is 'gelu'"),
        (
            lambda c: c.global_config.rope_parameters.update(rope_theta=7.0),
            "blt_global_transformer.rope_parameters.* rope_theta must be the encoder's",
        ),
        (lambda c: c.global_config.rope_parameters.update(rope_type="linear"), "rope_type must be 'default'"),
        (lambda c: setattr(c, "encoder_hash_byte_group_nb_functions", 2), "encoder_hash_byte_group_nb_functions is 2"),
        (lambda c: setattr(c.encoder_config, "sliding_window", None), "sliding_window is None"),
        (lambda c: setattr(c.encoder_config, "cross_attn_all_layers", True), "cross_attn_all_layers is True"),
        (lambda c: setattr(c, "vocab_size", 300), "blt.vocab_size is 300"),
    ],
)
def test_what_our_model_cannot_express_raises(change, message):
    hf_model = random_hf_model(encoder_layers=2)
    change(hf_model.config)
    with pytest.raises(ValueError, match=message):
        from_transformers(hf_model)


def test_patchers_that_our_entropy_model_cannot_be_raise():
    with pytest.raises(ValueError, match="no patcher"):
        entropy_model_from_transformers(to_transformers(BLTModel(config_of())))
    for name, value in (
        ("sliding_window", None),
        ("num_key_value_heads", 1),
        ("rms_norm_eps", 1e-3),
        ("vocab_size", 300),
    ):
        hf_model = random_hf_model()
        setattr(hf_model.config.patcher_config, name, value)
        with pytest.raises(ValueError, match=f"blt_patcher.{name} is {value}"):
            entropy_model_from_transformers(hf_model)


# ---------------------------------------------------------------------------------------------------------------------
# Folders: the command line


def write_output_folder(folder, model, entropy_model, rule):
    """An output folder as training leaves it, entropy model outside."""
    save_entropy_model(entropy_model, folder.parent / "entropy_model.pth")
    save_weights(folder / "best.pt", model)
    record = {
        "model_config": asdict(model.config), "patch_config": asdict(rule), "precision": "fp32",
        "entropy_model_path": str(folder.parent / "entropy_model.pth"), "entropy_model_sha256": model_hash(entropy_model),
    }  # fmt: skip
    write_json(folder / "model.json", record)
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory, trained_entropy_model):
    """A small random BLT in an output folder, with a rule whose threshold no entropy of TEXT's beginning is near to."""
    H = EntropyPatcher(trained_entropy_model).entropies(TEXT[:300])
    model = randomize(BLTModel(config_of(decoder_layers=2, global_dim=48, global_heads=3)))
    folder = tmp_path_factory.mktemp("ours") / "checkpoints"
    return write_output_folder(folder, model, trained_entropy_model, PatchConfig(entropy_threshold=clear_threshold(H)))


def command(folder, script, *flags):
    """Run a script in a folder as its user does; returns stdout and stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    root = Path(blt_model.__file__).parent
    done = subprocess.run(
        [sys.executable, root / script, *map(str, flags)],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Warning" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def round_trip(ours, tmp_path_factory):
    """Ours -> transformers -> ours, by the command line: (folder of transformers, folder of ours, what was printed)."""
    folder = tmp_path_factory.mktemp("converted")
    first = command(folder, "convert_hf.py", "--to_hf", ours)
    second = command(folder, "convert_hf.py", "--from_hf", "hf_model")
    return folder / "hf_model", folder / "checkpoints_from_hf", (first, second)


def test_command_line_round_trip_is_exact(ours, round_trip, monkeypatch, tmp_path):
    hf_folder, back, printed = round_trip
    monkeypatch.chdir(hf_folder.parent)
    for text in printed:
        assert re.search(
            r"check: logits differ by at most \d\.\de-0[67] over \d+ bytes, same patches, in fp32", text
        ), text
        assert re.search(r"check: (all|\d+ of) \d+ patches begin", text)
    hf_model = BltForCausalLM.from_pretrained(hf_folder)
    model, patcher, _ = load_blt(ours)
    again, patcher_again, record = load_blt(back)
    assert_same_weights(model, again)
    assert_same_weights(patcher.entropy_model, patcher_again.entropy_model)
    assert_same_weights(from_transformers(hf_model), model)
    assert model.config == again.config and patcher.config.rule == patcher_again.config.rule
    assert record["converted_from"] == "hf_model" and record["dtype"] == "float32"
    text = TEXT[:300]
    assert np.array_equal(patcher.entropies(text), patcher_again.entropies(text))
    assert (
        patcher.create_patches(text) == patcher_again.create_patches(text)
        and 30 < len(patcher.create_patches(text)) < 270
    )
    inputs = hf_inputs(patcher, text)
    with torch.no_grad():
        logits = model(torch.tensor([[BOUNDARY, *text]]), inputs["patch_lengths"])
        theirs = hf_model(**inputs).logits[..., OUTPUT_CLASSES]
        with_own_patches = hf_model(inputs["input_ids"]).logits[..., OUTPUT_CLASSES]
    assert (logits - theirs).abs().max() <= 1e-5 and (logits - with_own_patches).abs().max() <= 1e-5
    assert bits_per_byte(model, patcher, [text], 128) == bits_per_byte(again, patcher_again, [text], 128)
    assert generate(model, patcher, text[:50], 8) == generate(again, patcher_again, text[:50], 8)
    monkeypatch.chdir(tmp_path)  # the entropy model lies beside the weights
    (tmp_path / "elsewhere").symlink_to(back)
    assert load_blt("elsewhere")[1].entropy_model is not None


def test_tokenizer_gives_the_ids_of_any_text(round_trip):
    tokenizer = AutoTokenizer.from_pretrained(round_trip[0])
    for text in ("", "<s> and </s><pad>", "  naïve\n\t\x00 漢字 🙂 ", "".join(map(chr, range(300)))):
        ids = tokenizer(text)["input_ids"]
        assert ids == [1, *(b + 4 for b in text.encode())]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    batch = tokenizer(["ab", "abcd"], padding=True)
    assert batch["input_ids"] == [[1, 101, 102, 0, 0], [1, 101, 102, 103, 104]] and batch["attention_mask"][0] == [
        1,
        1,
        1,
        0,
        0,
    ]


def test_snippets_of_the_docs_run(ours, round_trip, tmp_path, monkeypatch, capsys):
    """docs/transformers.md: as printed there, and its settings are right where transformers' others are not."""
    hf_folder, _, _ = round_trip
    (tmp_path / "hf_model").symlink_to(hf_folder)
    (tmp_path / "checkpoints").symlink_to(ours)
    monkeypatch.chdir(tmp_path)
    text = (Path(blt_model.__file__).parent / "docs" / "transformers.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 2
    names = {}
    exec(blocks[0], names)
    assert len(capsys.readouterr().out.splitlines()) >= 2
    model, patcher, _ = load_blt(ours)
    new = generate(model, patcher, "The history of", 20)
    made = [i - 4 for i in names["made"][0].tolist() if i >= 4]
    assert bytes(made) == b"The history of" + new and new
    with torch.no_grad():
        alone = model(torch.tensor([[BOUNDARY, *b"Patches"]]), hf_inputs(patcher, b"Patches")["patch_lengths"])
    assert (names["logits"][1, :8] - alone[0]).abs().max() <= 1e-5  # right padding changes nothing
    exec(blocks[1], names)
    document = b"Any bytes."
    with torch.no_grad():
        alone = model(torch.tensor([[BOUNDARY, *document]]), hf_inputs(patcher, document)["patch_lengths"])
    assert (names["logits"] - alone).abs().max() <= 1e-5


def test_commands_of_the_docs_exist():
    text = (Path(blt_model.__file__).parent / "docs" / "transformers.md").read_text()
    known = {"convert_hf": set(field_comments(ConvertConfig)), "train_blt": set(field_comments(BLTRunConfig))}
    commands = re.findall(r"    python (\w+)\.py([^\n#]*)", text)
    assert len(commands) >= 6
    for script, rest in commands:
        assert set(re.findall(r"--(\w+)", rest)) <= known[script], rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_their_model_through_our_folder_and_back(tmp_path, dtype):
    hf_model = random_hf_model(decoder_layers=2).to(dtype)
    hf_model.save_pretrained(tmp_path / "theirs")
    write_from_transformers(tmp_path / "theirs", tmp_path / "ours")
    stored = torch.load(tmp_path / "ours" / "best.pt", weights_only=True)
    assert {weight.dtype for weight in stored.values()} == {dtype}
    model, patcher, _ = load_blt(tmp_path / "ours")
    assert {p.dtype for p in model.parameters()} == {
        torch.float32
    } and patcher.config.entropy_threshold == pytest.approx(4.9)
    with torch.no_grad():  # in fp32 on both sides
        assert compare(model, BltForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)) <= 1e-5
    write_for_transformers(tmp_path / "ours", tmp_path / "again")
    before, after = hf_model.state_dict(), BltForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    kept = {
        "model.local_encoder.embed_tokens.weight": INPUT_CLASSES, "lm_head.weight": OUTPUT_CLASSES,
        "model.patcher.embed_tokens.weight": INPUT_CLASSES, "model.patcher.lm_head.weight": list(range(4, 260)),
    }  # fmt: skip
    assert before.keys() == after.keys()
    for name, weight in before.items():
        rows = kept.get(name, slice(None))
        assert weight.dtype == after[name].dtype and torch.equal(weight[rows], after[name][rows]), name


def test_dtype_can_be_chosen(ours, tmp_path):
    assert write_for_transformers(ours, tmp_path / "hf", "bf16")["dtype"] == "bfloat16"
    hf_model = BltForCausalLM.from_pretrained(tmp_path / "hf")
    assert {p.dtype for p in hf_model.parameters()} == {torch.bfloat16}
    assert_same_weights(from_transformers(hf_model), load_blt(ours)[0].bfloat16())


def test_max_patch_length_becomes_a_rule_that_looks_at_no_end(tmp_path):
    """Same logits wherever the row's end does not cut a patch in transformers."""
    hf_model = random_hf_model()
    hf_model.config.max_patch_length, hf_model.config.patching_threshold = 4, 9.0  # no entropy is above ln 260
    hf_model.save_pretrained(tmp_path / "theirs")
    write_from_transformers(tmp_path / "theirs", tmp_path / "ours")
    model, patcher, _ = load_blt(tmp_path / "ours")
    assert patcher.config.max_patch_size == 4
    text = TEXT[:21]
    assert [len(p) for p in patcher.create_patches(text)] == [4, 4, 4, 4, 4, 1]
    inputs = hf_inputs(patcher, text)
    with torch.no_grad():
        theirs = hf_model(inputs["input_ids"], use_cache=False).logits[..., OUTPUT_CLASSES]
        assert (model(torch.tensor([[BOUNDARY, *text]]), inputs["patch_lengths"]) - theirs).abs().max() <= TOLERANCE


def test_a_rule_that_transformers_lacks_goes_without_patcher(ours, tmp_path, trained_entropy_model):
    model = load_blt(ours)[0]
    rule = PatchConfig(method="monotonic", entropy_threshold=0.3)
    folder = write_output_folder(tmp_path / "checkpoints", model, trained_entropy_model, rule)
    with pytest.raises(ValueError, match="method is 'monotonic'.*--without_patcher"):
        write_for_transformers(folder, tmp_path / "hf")
    main(ConvertConfig(to_hf=str(folder), output=str(tmp_path / "hf"), without_patcher=True, check="yes"))
    hf_model = BltForCausalLM.from_pretrained(tmp_path / "hf")
    assert hf_model.model.patcher is None
    record = json.loads((tmp_path / "hf" / "convert_hf.json").read_text())
    assert record["patch_config"]["method"] == "monotonic" and not record["patcher"]
    with pytest.raises(ValueError, match="no patcher.*--patches_of"):
        write_from_transformers(tmp_path / "hf", tmp_path / "back")
    main(ConvertConfig(from_hf=str(tmp_path / "hf"), output=str(tmp_path / "back"), patches_of=str(folder)))
    again, patcher, _ = load_blt(tmp_path / "back")
    assert_same_weights(again, model)
    assert patcher.config.rule == rule.rule and patcher.create_patches(TEXT[:99]) == load_blt(folder)[1].create_patches(
        TEXT[:99]
    )


def test_mistakes_say_what_to_do(ours, round_trip, tmp_path, monkeypatch):
    for settings, words in (
        (dict(), "give either --to_hf"),
        (dict(to_hf="a", from_hf="b"), "give either --to_hf"),
        (dict(to_hf="a", patches_of="b"), "patches_of goes with --from_hf"),
        (dict(from_hf="a", without_patcher=True), "without_patcher goes with --to_hf"),
        (dict(to_hf="a", dtype="int8"), "dtype is 'int8'"),
    ):
        with pytest.raises(ValueError, match=words):
            ConvertConfig(**settings)
    out = str(tmp_path / "out")
    for settings, words in (
        (dict(to_hf="nowhere"), "nowhere/model.json not found"),
        (dict(from_hf="./nowhere"), "not found; give a folder"),
        (dict(from_hf=str(ours)), "transformers cannot open"),
        (dict(from_hf=str(round_trip[0]), output=str(ours)), "was trained there"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            main(ConvertConfig(**({"output": out} | settings)))
    random_hf_model().save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="has not written"):
        write_for_transformers(ours, tmp_path / "theirs")
    state = load_file(tmp_path / "theirs" / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing_keys.*lm_head.weight"):
        write_from_transformers(tmp_path / "theirs", out)

    def offline(source):
        raise OSError(f"no network to find {source}\nand more lines")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    with pytest.raises(
        ValueError,
        match="cannot open 'no_such/model' as a BLT: no network to find no_such/model; .* taken for a Hugging Face id",
    ):
        write_from_transformers("no_such/model", out)
    assert not Path(out).exists()


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning: --init_from


TUNING = dict(
    row_bytes=128,
    batch_rows=4,
    steps=12,
    eval_every=6,
    log_every=1,
    val_bytes=3000,
    max_bytes=30000,
    sample_bytes=0,
    precision="fp32",
    device="cpu",
)


@pytest.fixture(scope="module")
def tuned(round_trip):
    """train_blt.py --init_from on the imported folder, as a subprocess, with a preset whose sizes are others."""
    folder = round_trip[1].parent
    flags = [x for name, value in TUNING.items() for x in (f"--{name}", value)]
    text = b"\n\n".join(TEXT[i : i + 1500] for i in range(0, len(TEXT), 1500))
    (folder / "book.txt").write_bytes(text)
    data = ["--dataset", "book.txt", "--max_document_bytes", 1500, "--val_fraction", 0.3]
    printed = command(
        folder,
        "train_blt.py",
        "--quick_demo",
        "--init_from",
        "checkpoints_from_hf",
        "--output",
        "tuned",
        "--lr",
        0.003,
        "--adam_lr",
        0.003,
        *data,
        *flags,
    )
    return folder, printed


def test_fine_tuning_starts_at_the_imported_model_and_gets_better(round_trip, tuned, monkeypatch):
    folder, printed = tuned
    monkeypatch.chdir(folder)
    model, patcher, record = load_blt("checkpoints_from_hf")
    fine, fine_patcher, fine_record = load_blt("tuned")
    assert fine.config == model.config and fine_patcher.config.rule == patcher.config.rule
    assert fine_record["entropy_model_sha256"] == record["entropy_model_sha256"]
    corpus = open_corpus("book.txt", max_document_bytes=1500, val_fraction=0.3, cache_dir="data_cache")
    validation = [corpus.document(n) for n in corpus.documents("validation", TUNING["val_bytes"])]
    start = bits_per_byte(model, patcher, validation, TUNING["row_bytes"], 4)
    origin = fine_record["init_from"]
    assert origin["val_bpb"] == pytest.approx(
        start, abs=2e-3
    )  # cached entropies are float16: a patch may begin elsewhere
    assert f"start: checkpoints_from_hf, val {origin['val_bpb']:.4f} bpb" in printed and "leak gate passed" in printed
    assert origin["weights_sha256"] == model_hash(model) and origin["converted_from"] == "hf_model"
    assert fine_record["result"]["val_bpb"] < start - 0.1
    losses = [line["loss"] for line in read_metrics(folder / "tuned" / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0] - 0.1 and len(losses) == 12


def run_config(folder, **more):
    settings = TUNING | dict(
        dataset="book.txt",
        max_document_bytes=1500,
        val_fraction=0.3,
        init_from="checkpoints_from_hf",
        lr=0.003,
        adam_lr=0.003,
    )
    return BLTRunConfig(**(settings | more))


def test_first_loss_is_the_imported_models(tuned, monkeypatch):
    """The loss of step 1, logged before anything is changed, is that of the imported weights on the same rows."""
    folder, _ = tuned
    monkeypatch.chdir(folder)
    config, start = train_blt.settings_of_start(run_config(folder))
    corpus = config.corpus()
    patcher, cache = train_blt.open_patches(config, corpus, torch.device("cpu"), start=start)
    data = train_blt.PatchedDataset.from_corpus(corpus, patcher, config, cache)
    batch = data.train_rows.shuffled_batch(0, config.batch_rows, config.seed)
    with torch.no_grad():
        loss = target_losses(load_blt("checkpoints_from_hf")[0], batch)[0].sum() / batch.targets
    assert read_metrics(folder / "tuned" / "metrics.jsonl")[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)


def test_fine_tuning_resumes(tuned, monkeypatch, capsys):
    folder, _ = tuned
    monkeypatch.chdir(folder)
    save = loop.save_checkpoint

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train_blt.run(run_config(folder, output="stopped"), make_patches=True)
    monkeypatch.setattr(loop, "save_checkpoint", save)
    train_blt.run(run_config(folder, output="stopped", resume=True), make_patches=True)
    assert "resumed stopped/last.pt at step 6" in capsys.readouterr().out
    straight, resumed = (
        torch.load(folder / name / "last.pt", weights_only=True)["model"] for name in ("tuned", "stopped")
    )
    for name, weight in straight.items():
        assert torch.equal(weight, resumed[name]), name
    origin = json.loads((folder / "stopped" / "model.json").read_text())["init_from"]
    assert origin == json.loads((folder / "tuned" / "model.json").read_text())["init_from"]


def test_sizes_come_from_the_folder_and_other_flags_are_an_error(round_trip, monkeypatch):
    monkeypatch.chdir(round_trip[1].parent)

    def settings(*flags, output="new"):
        config = parse_config(
            llm.LLMConfig, "", llm.PRESETS, ["--init_from", "checkpoints_from_hf", "--output", output, *flags]
        )
        return train_blt.settings_of_start(config)[0]

    saved = BLTConfig(**json.loads(Path("checkpoints_from_hf/model.json").read_text())["model_config"])
    config = settings("--preset", "small", "cpu", "--encoder_dim", "32", "--recompute", "--dropout", "0.1")
    assert {f.name for f in fields(BLTConfig) if getattr(config, f.name) != getattr(saved, f.name)} == {
        "recompute",
        "dropout",
    }
    assert config.lr == 0.01 and config.entropy_model_path == "checkpoints_from_hf/entropy_model.pth"
    with pytest.raises(ValueError, match="--global_dim 512, there 48; --window 9, there 16"):
        settings("--window", "9", "--global_dim", "512")
    with pytest.raises(ValueError, match="both 'checkpoints_from_hf'"):
        BLTRunConfig(init_from="checkpoints_from_hf", output="checkpoints_from_hf")
    with pytest.raises(
        ValueError, match="--hash_rows 77, there 500"
    ):  # made in Python: what differs from the class's values
        train_blt.settings_of_start(BLTRunConfig(init_from="checkpoints_from_hf", hash_rows=77))
    assert train_blt.settings_of_start(BLTRunConfig(init_from="checkpoints_from_hf"))[0].hash_rows == 500


def test_another_entropy_model_must_be_chosen_by_name(tuned, monkeypatch):
    folder, _ = tuned
    monkeypatch.chdir(folder)
    save_entropy_model(small_entropy_model(seed=7), "other.pth")
    config, start = train_blt.settings_of_start(run_config(folder, entropy_model_path="other.pth"))
    corpus, device = config.corpus(), torch.device("cpu")
    with pytest.raises(ValueError, match="other.pth is another entropy model than checkpoints_from_hf.*--patch_method"):
        train_blt.open_patches(config, corpus, device, make=True, start=start)
    config, start = train_blt.settings_of_start(
        run_config(
            folder, entropy_model_path="other.pth", patch_method="monotonic", target_patch_size=3, patch_cache="other"
        )
    )
    patcher, _ = train_blt.open_patches(config, corpus, device, make=True, start=start)
    assert patcher.config.method == "monotonic" and patcher.entropy_model.config.d_model == 24
    config, start = train_blt.settings_of_start(run_config(folder, patch_method="space"))
    assert train_blt.open_patches(config, corpus, device, start=start)[0].config.method == "space"
