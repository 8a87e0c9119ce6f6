"""convert_hf.py: our logits are transformers' logits. The proof that blt_model.py is a Byte Latent Transformer.

All weights are random, those of the norms too, so that no missing term of a model can go unseen.
"""

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, output_of, run_command, write_blt
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, BltConfig, BltForCausalLM

import blt_model
import convert_hf
from blt import loop
from blt.config import parse_config
from blt.entropies import entropy_of
from blt.files import model_hash
from blt.ids import BOUNDARY, documents_of
from blt.layers import feed_forward_width, zero_outputs
from blt.loop import read_metrics
from blt.metric import bits_per_byte, evaluate_together, target_losses
from blt.patch_rules import PatchConfig, patch_starts
from blt.records import RunRecord
from blt.runs import start_run
from blt.segments import check_patch_lengths
from blt.training import PatchedDataset
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
from llm import LLMConfig, open_patches, run, take_over_start
from save_entropy_model import load_blt, save_entropy_model
from train_blt import TrainBLTConfig

TEXT = Path(blt_model.__file__).read_bytes()
DOCS = (ROOT / "docs" / "transformers.md").read_text()

# Measured: at most 5e-6 at 117 ids and 8e-6 at 300 and 1600, on logits up to 6.
TOLERANCE = 1e-4

# transformers' numbers of our ids and classes, and its weights of which we know only these rows.
BYTE_CLASSES = list(range(4, 260))
INPUT_CLASSES = [*BYTE_CLASSES, 1]
OUTPUT_CLASSES = [*BYTE_CLASSES, 2]
KNOWN_ROWS = {
    "model.local_encoder.embed_tokens.weight": INPUT_CLASSES,
    "lm_head.weight": OUTPUT_CLASSES,
    "model.patcher.embed_tokens.weight": INPUT_CLASSES,
    "model.patcher.lm_head.weight": BYTE_CLASSES,
}

SMALLEST = dict(
    encoder_dim=32,
    encoder_heads=2,
    hash_rows=500,
    global_layers=1,
    global_dim=64,
    global_heads=2,
    decoder_layers=1,
    decoder_dim=32,
    decoder_heads=2,
    window=16,
)
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
    "odd feed-forward widths": dict(encoder_ffn_dim=77, global_ffn_dim=513, decoder_ffn_dim=33),
    "another feed-forward width in one part": dict(global_ffn_dim=170),
}
families = pytest.mark.parametrize("difference", FAMILIES.values(), ids=FAMILIES.keys())


def config_of(**difference):
    return BLTConfig(**(SMALLEST | difference))


def randomize(model, seed=0):
    """Norms from 0.5 to 1.5, all other weights normal of std fan_in ** -0.5. There are no biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    return model.eval()


def random_blt(**difference):
    return randomize(BLTModel(config_of(**difference)))


def random_entropy_model(seed=1, **difference):
    sizes = dict(d_model=24, n_heads=3, n_layers=2, max_seq_len=16)
    return randomize(MinimalLLM(EntropyConfig(**(sizes | difference))), seed)


def hf_stack(config, part):
    """transformers' settings of one of our stacks, written down independently of convert_hf.py."""
    dim = getattr(config, f"{part}_dim")
    return dict(
        hidden_size=dim,
        num_attention_heads=getattr(config, f"{part}_heads"),
        num_hidden_layers=getattr(config, f"{part}_layers"),
        intermediate_size=getattr(config, f"{part}_ffn_dim") or feed_forward_width(dim),
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.norm_eps,
    )


def random_hf_model(default_widths=False, patcher_ffn_dim=256, **difference):
    """A random `BltForCausalLM` with a patcher of window 16.

    default_widths: name no feed-forward width, so that all four are transformers' defaults.
    """
    config = config_of(**difference)
    stacks = {part: hf_stack(config, part) for part in ("encoder", "global", "decoder")}
    for part in ("encoder", "decoder"):
        stacks[part]["cross_attn_k"] = config.cross_attn_k
        stacks[part]["hidden_size_global"] = config.global_dim
        stacks[part]["cross_attn_all_layers"] = getattr(config, f"cross_attn_all_layers_{part}")
    stacks["patcher"] = dict(
        hidden_size=24,
        num_attention_heads=3,
        num_hidden_layers=2,
        intermediate_size=patcher_ffn_dim,
        sliding_window=16,
    )
    if default_widths:
        for stack in stacks.values():
            del stack["intermediate_size"]
    hf_config = BltConfig(
        **{f"{part}_config": stack for part, stack in stacks.items()},
        patching_threshold=4.9,
        local_attention_window_len=config.window,
        cross_attn_k=config.cross_attn_k,
        encoder_hash_byte_group_size=config.ngram_sizes,
        encoder_hash_byte_group_vocab=config.hash_rows,
    )
    return randomize(BltForCausalLM(hf_config))


def random_patch_lengths(rows, n_ids, seed=0):
    """int64 [rows, P]: 1, then lengths from 1 to 9 that sum to n_ids, then zeros."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        starts = np.unique(np.concatenate(([0, 1], 1 + rng.integers(1, 10, n_ids).cumsum())))
        lengths = np.diff(starts[starts < n_ids], append=n_ids)
        made.append(torch.from_numpy(lengths))
    lengths = torch.nn.utils.rnn.pad_sequence(made, batch_first=True)
    check_patch_lengths(lengths, n_ids)
    return lengths


def random_ids(rows, T, seed=0):
    """int64 [rows, T]: a document boundary, then text in the first row and any bytes in the others."""
    ids = torch.randint(0, 256, (rows, T), generator=torch.Generator().manual_seed(seed))
    ids[0] = torch.tensor(list(TEXT[:T]))
    ids[:, 0] = BOUNDARY
    return ids


def ids_of(text):
    """int64 [1, N + 1]: the document boundary, then the text."""
    return torch.tensor([[BOUNDARY, *text]])


def hf_ids(ids):
    return torch.tensor(INPUT_CLASSES)[ids]


def lengths_of(starts):
    """int64 [1, P] from the patch starts of N bytes and the document's end, bool [N + 1]."""
    positions = np.flatnonzero(np.concatenate(([True], starts)))
    return torch.from_numpy(np.diff(positions, append=len(starts) + 1))[None]


@torch.no_grad()
def hf_logits(hf_model, ids, lengths=None):
    """transformers' logits of our classes. lengths None: for the patches that its patcher finds."""
    return hf_model(input_ids=hf_ids(ids), patch_lengths=lengths, use_cache=False).logits[..., OUTPUT_CLASSES]


@torch.no_grad()
def difference_of_logits(model, hf_model, ids, lengths, their_lengths=None):
    """The largest one for the same ids. their_lengths: where transformers gets other lengths."""
    theirs = hf_logits(hf_model, ids, lengths if their_lengths is None else their_lengths)
    return (model(ids, lengths) - theirs).abs().max().item()


@torch.no_grad()
def compare(model, hf_model, rows=2, T=117):
    """The largest difference of logits on random ids and patches, which must matter to the logits."""
    ids = random_ids(rows, T)
    lengths = random_patch_lengths(rows, T + 1)
    ours = model(ids, lengths)
    with_other_patches = model(ids, random_patch_lengths(rows, T + 1, seed=1))
    assert ours.std() > 0.5
    assert (with_other_patches - ours).abs().max() > 0.1
    return difference_of_logits(model, hf_model, ids, lengths)


def assert_same_weights(one, other):
    one = one.state_dict()
    other = other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_same_known_rows(one, other):
    """Two transformers models have the same weights, bit for bit, except for rows that ours lack."""
    one = one.state_dict()
    other = other.state_dict()
    assert one.keys() == other.keys()
    for name, weight in one.items():
        rows = KNOWN_ROWS.get(name, slice(None))
        assert weight.dtype == other[name].dtype, name
        assert torch.equal(weight[rows], other[name][rows]), name


def test_ids_and_classes_are_numbered_as_in_transformers():
    ids = torch.arange(257)[None]
    assert torch.equal(to_hf_ids(ids), hf_ids(ids))
    assert (INPUT_ROWS, OUTPUT_ROWS) == (INPUT_CLASSES, OUTPUT_CLASSES)


# Logits


@families
def test_from_transformers_and_back(difference):
    """The same logits. Back in transformers, the same weights where rows have a counterpart."""
    hf_model = random_hf_model(**difference)
    model = from_transformers(hf_model)
    assert model.config == config_of(**difference)
    assert not model.training
    assert compare(model, hf_model, rows=1) <= TOLERANCE
    assert compare(model, hf_model, rows=2) <= TOLERANCE

    rule = PatchConfig(entropy_threshold=4.9)
    again = to_transformers(model, entropy_model_from_transformers(hf_model), rule)
    assert_same_known_rows(hf_model, again)
    after = again.state_dict()
    # Each of these weights has three rows that ours lacks, and gets zeros there.
    for name in list(KNOWN_ROWS)[:3]:
        dropped = sorted(set(range(260)) - set(KNOWN_ROWS[name]))
        assert len(dropped) == 3 and not after[name][dropped].any()
    for field in ("local_attention_window_len", "patching_threshold", "encoder_hash_byte_group_vocab"):
        assert getattr(again.config, field) == getattr(hf_model.config, field)


@families
def test_to_transformers_and_back(difference):
    """The same logits. Back here, the same weights and settings."""
    model = random_blt(**difference)
    entropy_model = random_entropy_model(rope_theta=500.0, ffn_dim=difference.get("encoder_ffn_dim"))
    hf_model = to_transformers(model, entropy_model)
    assert not hf_model.training
    assert compare(model, hf_model) <= TOLERANCE

    model_again = from_transformers(hf_model)
    entropy_model_again = entropy_model_from_transformers(hf_model)
    assert_same_weights(model_again, model)
    assert_same_weights(entropy_model_again, entropy_model)
    assert model_again.config == model.config
    assert entropy_model_again.config == entropy_model.config


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 300, 1600])
def test_logits_agree_for_rows_of_any_length(T):
    hf_model = random_hf_model(encoder_layers=2, decoder_layers=2)
    model = from_transformers(hf_model)
    lengths = random_patch_lengths(2, T + 1)
    assert difference_of_logits(model, hf_model, random_ids(2, T), lengths) <= TOLERANCE


@pytest.mark.parametrize("theirs, ours", [([1, 9, 10], [1, 9, 11]), ([1, 9, 10, 0], [1, 9, 10, 1])])
def test_lengths_that_transformers_makes_mean_the_same(theirs, ours):
    """Lengths over T ids, with or without a last 0 (the next byte starts a patch). Ours cover T + 1."""
    hf_model = random_hf_model()
    model = from_transformers(hf_model)
    ids = random_ids(1, 20)
    difference = difference_of_logits(model, hf_model, ids, torch.tensor([ours]), torch.tensor([theirs]))
    assert difference <= TOLERANCE


# Weights


def test_copies_do_not_share_memory():
    model = BLTModel(config_of())
    hf_model = to_transformers(model)
    torch.nn.init.zeros_(hf_model.model.encoder_hash_tok_embedding.weight)
    assert model.encoder.hash_embedding.tables.weight.any()


def test_dtype_is_kept_and_rotary_frequencies_stay_exact():
    model = random_blt().bfloat16()
    hf_model = to_transformers(model)
    assert {p.dtype for p in hf_model.parameters()} == {torch.bfloat16}
    assert hf_model.model.local_encoder.rotary_emb.inv_freq.dtype == torch.float32
    assert_same_weights(from_transformers(hf_model), model)


def test_a_model_that_transformers_saved_comes_back(tmp_path):
    model = random_blt(cross_attn_k=4, global_dim=96, decoder_ffn_dim=85)
    to_transformers(model, random_entropy_model()).save_pretrained(tmp_path)
    hf_model = BltForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(from_transformers(hf_model), model)
    assert compare(model, hf_model) <= TOLERANCE


def test_a_weight_too_many_or_too_few_raises():
    model = BLTModel(config_of())
    model.extra = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="our model.*unexpected.*extra"):
        to_transformers(model)
    hf_model = random_hf_model()
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


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_released_sizes_fit():
    """BLT-1B's shapes, without memory: 4.6 billion parameters, of which 3.07 billion hash embeddings."""
    with torch.device("meta"):
        hf_model = BltForCausalLM(BltConfig(encoder_config=dict(intermediate_size=2816)))
        model = from_transformers(hf_model)
        entropy_model = entropy_model_from_transformers(hf_model)
    # Rows of embeddings and heads without a counterpart.
    dropped = 6 * 1024 + (3 + 4) * 768
    assert n_parameters(hf_model) == 4_633_391_872
    assert n_parameters(model) + n_parameters(entropy_model) + dropped == 4_633_391_872
    assert model.parameters_by_part()["hash embedding"] == 6 * 500002 * 1024
    assert (model.config.global_layers, model.config.window) == (25, 512)
    assert entropy_model.config.max_seq_len == 512
    # All four released widths are our defaults.
    assert model.config.encoder_ffn_dim is model.config.global_ffn_dim is model.config.decoder_ffn_dim is None
    assert entropy_model.config.ffn_dim is None


# Hash


def test_ngram_hashes_are_the_released_ones():
    """Rows of tables of 500,002 rows for b"Hello, BLT!", from the released code and transformers."""
    golden = {
        3: [443987, 124875, 393970, 386145, 358223, 190185, 141703, 484917, 321258, 125336, 233820, 269147],
        4: [437197, 433869, 117936, 254402, 246577, 30240, 114083, 12253, 448125, 463424, 72068, 41565],
        5: [123201, 168913, 27892, 170862, 307328, 265602, 426354, 435293, 408271, 269141, 270044, 112975],
        6: [166353, 160907, 92310, 405250, 48218, 280239, 83968, 362502, 281889, 304381, 189065, 372545],
        7: [34117, 338221, 15158, 281878, 94816, 340137, 303839, 101668, 233170, 90223, 385651, 240882],
        8: [172383, 205585, 456240, 129346, 299568, 322649, 430431, 246559, 449350, 287162, 409265, 97250],
    }
    ids = ids_of(b"Hello, BLT!")
    hashes = hash_ngrams(ids, documents_of(ids, BOUNDARY), list(golden), 500002)
    assert {n: hashes[0, :, i].tolist() for i, n in enumerate(golden)} == golden


# Entropies and patches


@pytest.fixture(scope="module")
def trained_entropy_model():
    """A second of training, after which the bytes that UTF-8 never holds are unlikely."""
    torch.manual_seed(0)
    model = MinimalLLM(EntropyConfig(d_model=32, n_heads=2, n_layers=1, max_seq_len=16, ffn_dim=85))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    text = torch.tensor(list(TEXT))
    for _ in range(60):
        ids = text[torch.randint(0, len(text) - 129, (16, 1)) + torch.arange(129)]
        logits = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def hf_patcher(hf_model, text):
    """Entropies [N + 1] (for each byte and the end) and logits [N + 1, 260] of the patcher."""
    entropies, _, logits = hf_model.model.patcher(hf_ids(ids_of(text)), patch_size=4, threshold=1.0)
    return entropies[0], logits[0]


@torch.no_grad()
def difference_of_patchers(entropy_model, hf_model, text=TEXT[:150]):
    """The largest difference between an entropy model's logits and the patcher's for the bytes."""
    _, logits = hf_patcher(hf_model, text)
    return (entropy_model(ids_of(text))[0] - logits[:, 4:]).abs().max().item()


def test_patcher_becomes_our_entropy_model():
    text = TEXT[:150]
    hf_model = random_hf_model()
    entropy_model = entropy_model_from_transformers(hf_model)
    assert difference_of_patchers(entropy_model, hf_model) <= 1e-5
    theirs, logits = hf_patcher(hf_model, text)
    H_bytes = torch.from_numpy(EntropyPatcher(entropy_model).entropies(text))
    assert (H_bytes - entropy_of(logits[:-1, 4:])).abs().max() <= 1e-5
    # What the four other classes add: the docstring's formula, and its figure.
    q = logits.softmax(-1)[:-1, :4].sum(-1)
    H_two = -(q * q.log() + (1 - q) * (1 - q).log())
    H_all = H_two + (1 - q) * H_bytes + q * entropy_of(logits[:-1, :4])
    assert (H_all - theirs[:-1]).abs().max() <= 1e-5
    assert f"{math.log(260) - math.log(256):.3f}" == "0.016"


@torch.no_grad()
def test_our_entropy_model_becomes_the_patcher(trained_entropy_model):
    text = TEXT[1000:1400]
    hf_model = to_transformers(BLTModel(config_of()), trained_entropy_model)
    assert difference_of_patchers(trained_entropy_model, hf_model, text) <= 1e-5
    theirs, _ = hf_patcher(hf_model, text)
    ours = trained_entropy_model(ids_of(text))[0]
    # The docstring's formula. These characters take all bytes that UTF-8 has.
    characters = [*range(0x800), *range(0x800, 0xD800, 0x40), *range(0xE000, 0x110000, 0x40)]
    possible = set("".join(map(chr, characters)).encode())
    impossible = [byte for byte in range(256) if byte not in possible]
    H = entropy_of(ours)
    p = ours.log_softmax(-1)[:, impossible].mean(-1).exp()
    expected = (H + 4 * p * -p.log()) / (1 + 4 * p) + (1 + 4 * p).log()
    assert (expected - theirs).abs().max() <= 1e-5
    assert (theirs - H).abs().mean() < 2e-3 and (theirs - H).abs().max() < 0.05


def clear_threshold(H):
    """A threshold in the widest gap between the middle values of H."""
    values = np.sort(H)[len(H) // 4 : -len(H) // 4]
    i = int(np.diff(values).argmax())
    return float(values[i] + values[i + 1]) / 2


@pytest.mark.parametrize("text", [TEXT[:100], TEXT[3000:3201], b"", b"x", b"ab"], ids=len)
def test_own_patches_of_transformers_are_those_of_our_patcher(trained_entropy_model, text):
    """patch_lengths=None: transformers runs its patcher. EntropyPatcher has the same threshold."""
    H = EntropyPatcher(trained_entropy_model).entropies_with_end([np.frombuffer(text, np.uint8)])[0]
    threshold = clear_threshold(H) if len(text) > 10 else 2.0
    patcher = EntropyPatcher(trained_entropy_model, PatchConfig(entropy_threshold=threshold))
    model = random_blt(decoder_layers=2)
    hf_model = to_transformers(model, trained_entropy_model, patcher.config)
    theirs = hf_patcher(hf_model, text)[0].numpy()
    assert ((theirs > threshold) == (H > threshold)).all(), "260 and 256 classes must agree here"
    lengths = lengths_of(patcher.starts(text))
    check_patch_lengths(lengths, len(text) + 2)
    assert len(text) <= 10 or 0.2 * len(text) < lengths.shape[1] < 0.8 * len(text)
    with torch.no_grad():
        # Without use_cache=False: the config must say it.
        theirs = hf_model(input_ids=hf_ids(ids_of(text))).logits[..., OUTPUT_CLASSES]
        assert (model(ids_of(text), lengths) - theirs).abs().max() <= TOLERANCE


def test_rule_of_transformers_is_ours():
    """Two rows and a random patcher's own entropies: our global rule finds the patches that it uses."""
    hf_model = random_hf_model()
    ids = random_ids(2, 118)
    H = torch.stack([hf_patcher(hf_model, row[1:].tolist())[0] for row in ids]).numpy()
    threshold = float(np.median(H)) + 1e-5
    hf_model.config.patching_threshold = threshold
    lengths = [lengths_of(patch_starts(row, "global", threshold))[0] for row in H]
    lengths = torch.nn.utils.rnn.pad_sequence(lengths, batch_first=True)
    check_patch_lengths(lengths, 119)
    with torch.no_grad():
        ours = from_transformers(hf_model)(ids, lengths)
    assert (ours - hf_logits(hf_model, ids)).abs().max() <= TOLERANCE


def test_transformers_generates_what_our_model_does(trained_entropy_model):
    """Greedy, with the settings that a converted model comes with. It emits no class that ours lacks."""
    model = random_blt(decoder_layers=2)
    patcher = EntropyPatcher(trained_entropy_model, PatchConfig(entropy_threshold=2.0))
    hf_model = to_transformers(model, trained_entropy_model, patcher.config)
    assert hf_model.generation_config.suppress_tokens == UNKNOWN_CLASSES == [0, 1, 3]
    prompt = TEXT[:40]
    ids = hf_ids(ids_of(prompt))
    made = hf_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    text = prompt
    with torch.no_grad():
        for _ in range(12):
            logits = model(ids_of(text), lengths_of(patcher.starts(text)))
            best = logits[0, -1].argmax().item()
            if best == BOUNDARY:
                break
            text += bytes([best])
    assert [i - 4 for i in made[0, 1:].tolist() if i >= 4] == list(text)
    assert len(text) > len(prompt)


# What cannot be converted


@pytest.mark.parametrize(
    "difference, message",
    [
        (dict(qk_norm=True), "BLTConfig.qk_norm is True"),
        (dict(relu2=True), "BLTConfig.relu2 is True"),
        (dict(logit_softcap=15.0), "BLTConfig.logit_softcap is 15.0"),
        (dict(pooling="mean"), "BLTConfig.pooling is 'mean'"),
        (dict(decoder_dim=64), "BLTConfig.decoder_dim is 64"),
        (dict(ngram_sizes=[]), "ngram_sizes is empty"),
        (dict(patch_ngrams=[0]), r"BLTConfig.patch_ngrams is \[0\]"),
        (dict(gate_ngrams=[2]), r"BLTConfig.gate_ngrams is \[2\]"),
        (dict(encoder_layers=2, cross_attn_all_layers_encoder=True), "cross_attn_all_layers_encoder is True"),
    ],
)
def test_what_transformers_cannot_express_raises(difference, message):
    with pytest.raises(ValueError, match=message):
        to_transformers(BLTModel(config_of(**difference)))


def test_how_a_model_was_trained_is_no_obstacle():
    """zero_init and ngram_dropout change no function; the zeros convert like any other weights."""
    model = random_blt(ngram_dropout=0.3)
    assert compare(model, to_transformers(model)) < 1e-4
    zero_outputs(model)
    assert difference_of_logits(model, to_transformers(model), random_ids(2, 117), random_patch_lengths(2, 118)) < 1e-4


@pytest.mark.parametrize("name, value", [("method", "monotonic"), ("min_patch_size", 2), ("max_patch_size", 8)])
def test_rules_that_transformers_lacks_raise(name, value):
    with pytest.raises(ValueError, match=f"PatchConfig.{name} is {value!r}"):
        to_transformers(BLTModel(config_of()), random_entropy_model(), PatchConfig(**{name: value}))


def test_a_rule_without_an_entropy_model_raises():
    with pytest.raises(ValueError, match="no entropy_model"):
        to_transformers(BLTModel(config_of()), None, PatchConfig())


@pytest.mark.parametrize(
    "part, name, value, message",
    [
        ("encoder_config", "num_key_value_heads", 1, "blt_local_encoder.num_key_value_heads is 1"),
        ("encoder_config", "sliding_window", None, "blt_local_encoder.sliding_window is None"),
        ("encoder_config", "cross_attn_all_layers", True, "cross_attn_all_layers is True"),
        ("global_config", "dropout", 0.5, "blt_global_transformer.dropout is 0.5"),
        ("decoder_config", "rms_norm_eps", 1e-6, "blt_local_decoder.rms_norm_eps is 1e-06"),
        ("decoder_config", "hidden_act", "gelu", "blt_local_decoder.hidden_act is 'gelu'"),
        ("decoder_config", "hidden_size", 64, "blt_local_decoder.hidden_size is 64"),
        ("decoder_config", "cross_attn_k", 4, "blt_local_decoder.cross_attn_k is 4"),
        ("global_config", "rope_theta", 7.0, "blt_global_transformer.* rope_theta must be the encoder's"),
        ("global_config", "rope_type", "linear", "blt_global_transformer.* rope_type must be 'default'"),
        (None, "encoder_hash_byte_group_nb_functions", 2, "blt.encoder_hash_byte_group_nb_functions is 2"),
        (None, "local_attention_window_len", None, "blt.local_attention_window_len is None"),
        (None, "vocab_size", 300, "blt.vocab_size is 300"),
    ],
)
def test_what_our_model_cannot_express_raises(part, name, value, message):
    hf_model = random_hf_model(encoder_layers=2)
    config = hf_model.config if part is None else getattr(hf_model.config, part)
    if name.startswith("rope_"):
        config.rope_parameters[name] = value
    else:
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        from_transformers(hf_model)


@pytest.mark.parametrize(
    "name, value",
    [("sliding_window", None), ("num_key_value_heads", 1), ("rms_norm_eps", 1e-3), ("vocab_size", 300)],
)
def test_patchers_that_our_entropy_model_cannot_be_raise(name, value):
    hf_model = random_hf_model()
    setattr(hf_model.config.patcher_config, name, value)
    with pytest.raises(ValueError, match=f"blt_patcher.{name} is {value}"):
        entropy_model_from_transformers(hf_model)


def test_no_patcher_raises():
    with pytest.raises(ValueError, match="no patcher"):
        entropy_model_from_transformers(to_transformers(BLTModel(config_of())))


# Folders: the command line


@pytest.fixture(scope="module")
def ours(tmp_path_factory, trained_entropy_model):
    """An output folder with a small random BLT. No entropy of TEXT's beginning is near its threshold."""
    H = EntropyPatcher(trained_entropy_model).entropies(TEXT[:300])
    model = random_blt(decoder_layers=2, global_dim=48, global_heads=3, encoder_ffn_dim=85)
    folder = tmp_path_factory.mktemp("ours") / "checkpoints"
    return write_blt(folder, model, PatchConfig(entropy_threshold=clear_threshold(H)), trained_entropy_model)


@pytest.fixture(scope="module")
def round_trip(ours, tmp_path_factory):
    """Ours -> transformers -> ours: (folder of transformers, folder of ours, what each run printed)."""
    folder = tmp_path_factory.mktemp("converted")
    first = run_command(folder, "convert_hf", "--to_hf", ours)
    second = output_of(folder, "convert_hf", "--from_hf", "hf_model")
    return folder / "hf_model", folder / "checkpoints_from_hf", (first, second)


def test_what_is_printed(round_trip):
    folders = ("hf_model", "checkpoints_from_hf")
    logits_agree = r"check: logits differ by at most \d\.\de-0[67] over \d+ bytes, same patches, in fp32"
    for folder, text in zip(folders, round_trip[2]):
        assert re.search(logits_agree, text), text
        assert re.search(r"check: (all|\d+ of) \d+ patches begin", text), text
        assert re.search(rf"wrote {folder}/: .*\nnext: ", text), text


def test_round_trip_of_folders_is_exact(ours, round_trip, monkeypatch, tmp_path):
    hf_folder, back, _ = round_trip
    monkeypatch.chdir(hf_folder.parent)
    hf_model = BltForCausalLM.from_pretrained(hf_folder)
    model, patcher, _ = load_blt(ours)
    again, patcher_again, record = load_blt(back)
    assert_same_weights(model, again)
    assert_same_weights(patcher.entropy_model, patcher_again.entropy_model)
    assert_same_weights(from_transformers(hf_model), model)
    assert model.config == again.config and patcher.config.arguments() == patcher_again.config.arguments()
    assert hf_model.generation_config.suppress_tokens == UNKNOWN_CLASSES
    assert record.converted_from == "hf_model" and record.dtype == "float32"

    text = TEXT[:300]
    assert np.array_equal(patcher.entropies(text), patcher_again.entropies(text))
    patches = patcher.create_patches(text)
    assert patches == patcher_again.create_patches(text)
    assert 30 < len(patches) < 270
    inputs = hf_inputs(patcher, text)
    with torch.no_grad():
        logits = model(ids_of(text), inputs["patch_lengths"])
        theirs = hf_model(**inputs).logits[..., OUTPUT_CLASSES]
        with_own_patches = hf_model(inputs["input_ids"]).logits[..., OUTPUT_CLASSES]
    assert (logits - theirs).abs().max() <= 1e-5
    assert (logits - with_own_patches).abs().max() <= 1e-5
    assert bits_per_byte(model, patcher, [text], 128) == bits_per_byte(again, patcher_again, [text], 128)
    assert generate(model, patcher, text[:50], 8) == generate(again, patcher_again, text[:50], 8)

    # The entropy model is found beside the weights, wherever the folder is opened from.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").symlink_to(back)
    assert load_blt("elsewhere")[1].entropy_model is not None


def test_other_logits_are_an_error(ours, tmp_path, monkeypatch):
    """Unless another dtype was asked for, which rounds the weights."""
    for difference in (0.01, math.nan):
        monkeypatch.setattr(convert_hf, "compare", lambda *folders: (difference, None, None))
        with pytest.raises(ValueError, match="gives other logits"):
            main(ConvertConfig(to_hf=str(ours), output=str(tmp_path)))
    main(ConvertConfig(to_hf=str(ours), output=str(tmp_path), dtype="bf16"))


def test_tokenizer_gives_the_ids_of_any_text(round_trip):
    tokenizer = AutoTokenizer.from_pretrained(round_trip[0])
    for text in ("", "<s> and </s><pad>", "  naïve\n\t\x00 漢字 🙂 ", "".join(map(chr, range(300)))):
        ids = tokenizer(text)["input_ids"]
        assert ids == [1, *(b + 4 for b in text.encode())]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    batch = tokenizer(["ab", "abcd"], padding=True)
    assert batch["input_ids"] == [[1, 101, 102, 0, 0], [1, 101, 102, 103, 104]]
    assert batch["attention_mask"] == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_snippets_of_the_docs_run(ours, round_trip, tmp_path, monkeypatch, capsys):
    """docs/transformers.md: the code runs as printed, and its settings give our logits and our text."""
    (tmp_path / "hf_model").symlink_to(round_trip[0])
    (tmp_path / "checkpoints").symlink_to(ours)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    assert len(snippets) == 2
    names = {}
    exec(snippets[0], names)
    assert len(capsys.readouterr().out.splitlines()) >= 2
    model, patcher, _ = load_blt(ours)

    @torch.no_grad()
    def our_logits(document):
        return model(ids_of(document), hf_inputs(patcher, document)["patch_lengths"])[0]

    new = generate(model, patcher, "The history of", 20)
    made = [i - 4 for i in names["made"][0].tolist() if i >= 4]
    assert new and bytes(made) == b"The history of" + new
    # Padding on the right changes nothing.
    assert (names["logits"][1, :8] - our_logits(b"Patches")).abs().max() <= 1e-5
    exec(snippets[1], names)
    assert (names["logits"][0] - our_logits(b"Any bytes.")).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "settings, dtype, ffn_dims, patcher_ffn_dim",
    [
        # int(8 * 32 / 3) in the encoder, the released widths elsewhere
        (dict(default_widths=True), torch.float32, (85, 5632, 2816), 2048),
        # odd widths, one that is our default, and what transformers makes of 0: int(8 * 24 / 3)
        (
            dict(encoder_ffn_dim=1, global_ffn_dim=171, decoder_ffn_dim=256, patcher_ffn_dim=0),
            torch.bfloat16,
            (1, 171, None),
            64,
        ),
    ],
    ids=["default feed-forward widths", "odd feed-forward widths, bf16"],
)
def test_their_model_through_our_folder_and_back(settings, dtype, ffn_dims, patcher_ffn_dim, tmp_path):
    """Logits of model and patcher agree in fp32. Every weight that has a counterpart is bit-exact."""
    hf_model = random_hf_model(**settings).to(dtype)
    hf_model.save_pretrained(tmp_path / "theirs")
    write_from_transformers(tmp_path / "theirs", tmp_path / "ours")
    stored = torch.load(tmp_path / "ours" / "best.pt", weights_only=True)
    assert {weight.dtype for weight in stored.values()} == {dtype}
    model, patcher, _ = load_blt(tmp_path / "ours")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert patcher.config.entropy_threshold == pytest.approx(4.9)
    config = model.config
    assert (config.encoder_ffn_dim, config.global_ffn_dim, config.decoder_ffn_dim) == ffn_dims
    assert patcher.entropy_model.config.ffn_dim == patcher_ffn_dim

    write_for_transformers(tmp_path / "ours", tmp_path / "again")
    again = BltForCausalLM.from_pretrained(tmp_path / "again")
    assert_same_known_rows(hf_model, again)
    for part in ("encoder_config", "global_config", "decoder_config", "patcher_config"):
        width = getattr(hf_model.config, part).intermediate_size
        assert getattr(again.config, part).intermediate_size == width
    for folder in ("theirs", "again"):
        # Not hf_model.float(): its rotary frequencies have been rounded.
        in_fp32 = BltForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        assert compare(model, in_fp32) <= 1e-5
        assert difference_of_patchers(patcher.entropy_model, in_fp32) <= 1e-5


def test_dtype_can_be_chosen(ours, tmp_path):
    assert write_for_transformers(ours, tmp_path / "hf", "bf16")["dtype"] == "bfloat16"
    hf_model = BltForCausalLM.from_pretrained(tmp_path / "hf")
    assert {p.dtype for p in hf_model.parameters()} == {torch.bfloat16}
    assert_same_weights(from_transformers(hf_model), load_blt(ours)[0].bfloat16())


def test_max_patch_length_becomes_a_rule_that_looks_at_no_end(tmp_path):
    """Same logits wherever the row's end does not split a patch in transformers."""
    hf_model = random_hf_model()
    # No entropy is above ln 260 = 5.6, so only the length starts patches.
    hf_model.config.patching_threshold = 9.0
    hf_model.config.max_patch_length = 4
    hf_model.save_pretrained(tmp_path / "theirs")
    write_from_transformers(tmp_path / "theirs", tmp_path / "ours")
    model, patcher, _ = load_blt(tmp_path / "ours")
    assert patcher.config.max_patch_size == 4
    text = TEXT[:21]
    assert [len(p) for p in patcher.create_patches(text)] == [4, 4, 4, 4, 4, 1]
    with torch.no_grad():
        logits = model(ids_of(text), hf_inputs(patcher, text)["patch_lengths"])
    assert (logits - hf_logits(hf_model, ids_of(text))).abs().max() <= TOLERANCE


def test_a_rule_that_transformers_lacks_goes_without_patcher(ours, tmp_path, trained_entropy_model, capsys):
    model = load_blt(ours)[0]
    rule = PatchConfig(method="monotonic", entropy_threshold=0.3)
    folder = write_blt(tmp_path / "checkpoints", model, rule, trained_entropy_model)
    hf_folder = tmp_path / "hf"
    back = tmp_path / "back"
    with pytest.raises(ValueError, match="method is 'monotonic'.*--without_patcher"):
        write_for_transformers(folder, hf_folder)
    main(ConvertConfig(to_hf=str(folder), output=str(hf_folder), without_patcher=True, check="yes"))
    assert "without patcher: pass patch_lengths" in capsys.readouterr().out
    assert BltForCausalLM.from_pretrained(hf_folder).model.patcher is None
    record = json.loads((hf_folder / "convert_hf.json").read_text())
    assert record["patch_config"]["method"] == "monotonic" and not record["patcher"]
    with pytest.raises(ValueError, match="no patcher.*--patches_of"):
        write_from_transformers(hf_folder, back)
    main(ConvertConfig(from_hf=str(hf_folder), output=str(back), patches_of=str(folder), check="no"))
    assert "check:" not in capsys.readouterr().out
    again, patcher, _ = load_blt(back)
    assert_same_weights(again, model)
    assert patcher.config.arguments() == rule.arguments()
    assert patcher.create_patches(TEXT[:99]) == load_blt(folder)[1].create_patches(TEXT[:99])


# Mistakes say what to do


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(), "give either --to_hf"),
        (dict(to_hf="a", from_hf="b"), "give either --to_hf"),
        (dict(to_hf="a", patches_of="b"), "patches_of goes with --from_hf"),
        (dict(from_hf="a", without_patcher=True), "without_patcher goes with --to_hf"),
        (dict(to_hf="a", dtype="int8"), "dtype is 'int8'"),
        (dict(to_hf="a", check="perhaps"), "check is 'perhaps'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ConvertConfig(**settings)


def test_wrong_folders(ours, round_trip, tmp_path):
    output = str(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere/model.json not found"):
        main(ConvertConfig(to_hf="nowhere", output=output))
    with pytest.raises(FileNotFoundError, match="not found; give a folder"):
        main(ConvertConfig(from_hf="./nowhere", output=output))
    with pytest.raises(ValueError, match="transformers cannot open"):
        main(ConvertConfig(from_hf=str(ours), output=output))
    assert not Path(output).exists()
    # Folders that hold a model which convert_hf.py did not write are not overwritten.
    with pytest.raises(ValueError, match="was trained there"):
        main(ConvertConfig(from_hf=str(round_trip[0]), output=str(ours)))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has not written"):
        main(ConvertConfig(to_hf=str(ours), output=str(tmp_path / "theirs")))


def test_a_file_that_lacks_a_weight_raises(tmp_path):
    random_hf_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing_keys.*lm_head.weight"):
        write_from_transformers(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_id_without_a_network_raises(tmp_path, monkeypatch):
    def offline(source):
        raise OSError(f"no network to find {source}\nand more lines")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    message = "cannot open 'no_such/model' as a BLT: no network to find no_such/model; .* taken for a Hugging Face id"
    with pytest.raises(ValueError, match=message):
        write_from_transformers("no_such/model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Fine-tuning: --init_from


TUNING = dict(
    init_from="checkpoints_from_hf",
    dataset="book.txt",
    max_document_bytes=1500,
    val_fraction=0.3,
    row_bytes=128,
    batch_rows=4,
    steps=12,
    lr=0.003,
    adam_lr=0.003,
    eval_every=6,
    log_every=1,
    val_bytes=3000,
    max_bytes=30000,
    sample_bytes=0,
    precision="fp32",
    device="cpu",
)


def run_config(**more):
    return TrainBLTConfig(**(TUNING | more))


@pytest.fixture(scope="module")
def tuned(round_trip):
    """train_blt.py --init_from with the imported folder and a preset of other sizes: (folder, printed)."""
    folder = round_trip[1].parent
    pieces = [TEXT[i : i + 1500] for i in range(0, len(TEXT), 1500)]
    (folder / "book.txt").write_bytes(b"\n\n".join(pieces))
    flags = ["--quick_demo", "--output", "tuned"]
    for name, value in TUNING.items():
        flags += [f"--{name}", str(value)]
    return folder, output_of(folder, "train_blt", *flags)


def data_of_run(config):
    """The `PatchedDataset` of a run with these settings, from the cache of the first one."""
    config, start = take_over_start(config)
    begun = start_run(config)
    patcher, cache = open_patches(config, begun, start=start)
    return PatchedDataset.from_corpus(begun.corpus, patcher, config, cache)


@pytest.fixture
def in_tuned_folder(tuned, monkeypatch):
    monkeypatch.chdir(tuned[0])


def test_fine_tuning_starts_at_the_imported_model_and_gets_better(tuned, in_tuned_folder):
    printed = tuned[1]
    model, patcher, record = load_blt("checkpoints_from_hf")
    fine, fine_patcher, fine_record = load_blt("tuned")
    assert fine.config == model.config and fine_patcher.config.arguments() == patcher.config.arguments()
    assert fine_record.entropy_model_sha256 == record.entropy_model_sha256
    # By the cached entropies, as in the run: they are float16, so without the cache a patch may start elsewhere.
    batches = data_of_run(run_config()).validation_batches
    start = evaluate_together(model, batches, torch.device("cpu"), "fp32")["val_bpb"]
    origin = fine_record.init_from
    assert origin["val_bpb"] == pytest.approx(start, abs=1e-5)
    assert f"start: checkpoints_from_hf, val {origin['val_bpb']:.4f} bpb" in printed
    assert "leak gate passed" in printed
    assert origin["weights_sha256"] == model_hash(model) and origin["converted_from"] == "hf_model"
    assert fine_record.result["val_bpb"] < start - 0.1
    losses = [line["loss"] for line in read_metrics("tuned/metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0] - 0.1 and len(losses) == 12


def test_first_loss_is_the_imported_models(in_tuned_folder):
    """The loss of step 1, logged before the first update, is that of the imported weights on its rows."""
    config = run_config()
    batch = data_of_run(config).train_rows.shuffled_batch(0, config.batch_rows, config.seed)
    with torch.no_grad():
        loss = target_losses(load_blt("checkpoints_from_hf")[0], batch)[0].sum() / batch.targets
    assert read_metrics("tuned/metrics.jsonl")[0]["loss"] == pytest.approx(loss.item(), abs=3e-6)


def test_fine_tuning_resumes(in_tuned_folder, monkeypatch, capsys):
    save = loop.save_checkpoint

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(run_config(output="stopped"), make_patches=True)
    run(run_config(output="stopped", resume=True), make_patches=True)
    assert "resumed stopped/last.pt at step 6" in capsys.readouterr().out
    straight = torch.load("tuned/last.pt", weights_only=True)["model"]
    resumed = torch.load("stopped/last.pt", weights_only=True)["model"]
    for name, weight in straight.items():
        assert torch.equal(weight, resumed[name]), name
    assert RunRecord.load("stopped/model.json").init_from == RunRecord.load("tuned/model.json").init_from


def test_sizes_come_from_the_folder_and_other_flags_are_an_error(round_trip, monkeypatch):
    monkeypatch.chdir(round_trip[1].parent)

    def settings(*flags):
        argv = ["--init_from", "checkpoints_from_hf", "--output", "new", *flags]
        return take_over_start(parse_config(LLMConfig, "", argv))[0]

    saved = BLTConfig(**RunRecord.load("checkpoints_from_hf/model.json").model_config)
    config = settings("--preset", "small", "cpu", "--encoder_dim", "32", "--recompute", "--dropout", "0.1")
    names = [field.name for field in fields(BLTConfig)]
    differing = {name for name in names if getattr(config, name) != getattr(saved, name)}
    assert differing == {"recompute", "dropout"}
    assert config.encoder_ffn_dim == 85 and config.lr == 0.01
    assert config.entropy_model_path == "checkpoints_from_hf/entropy_model.pth"
    with pytest.raises(ValueError, match="--global_dim 512, there 48; --window 9, there 16"):
        settings("--window", "9", "--global_dim", "512")
    with pytest.raises(ValueError, match="both 'checkpoints_from_hf'"):
        TrainBLTConfig(init_from="checkpoints_from_hf", output="checkpoints_from_hf")
    # A config made in Python has no flags. What counts as given is what differs from the class's values.
    with pytest.raises(ValueError, match="--hash_rows 77, there 500"):
        take_over_start(TrainBLTConfig(init_from="checkpoints_from_hf", hash_rows=77))
    assert take_over_start(TrainBLTConfig(init_from="checkpoints_from_hf"))[0].hash_rows == 500
    # What training drops is the run's own choice.
    with_dropout = take_over_start(TrainBLTConfig(init_from="checkpoints_from_hf", ngram_dropout=0.2))[0]
    assert with_dropout.ngram_dropout == 0.2


def test_another_entropy_model_must_be_chosen_by_name(in_tuned_folder):
    save_entropy_model(random_entropy_model(seed=7), "other.pth")

    def patcher_of(**settings):
        config, start = take_over_start(run_config(**settings))
        patcher, _ = open_patches(config, start_run(config), make=True, start=start)
        return patcher

    message = "other.pth is another entropy model than checkpoints_from_hf.*--patch_method"
    with pytest.raises(ValueError, match=message):
        patcher_of(entropy_model_path="other.pth")
    chosen = dict(patch_method="monotonic", target_patch_size=3, patch_cache="other")
    patcher = patcher_of(entropy_model_path="other.pth", **chosen)
    assert patcher.config.method == "monotonic" and patcher.entropy_model.config.d_model == 24
    assert patcher_of(patch_method="space").config.method == "space"
