"""convert_hf.py: our logits are transformers' logits. The proof that blt_model.py is a Byte Latent Transformer.

All weights are random, the norms' too, so that no term of the model can be missing unseen.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BltConfig, BltForCausalLM

import blt_model
from blt_model import BLTConfig, BLTModel, hash_ngrams
from convert_hf import (
    INPUT_ROWS,
    OUTPUT_ROWS,
    UNKNOWN_CLASSES,
    entropy_model_from_transformers,
    from_transformers,
    to_hf_ids,
    to_transformers,
)
from data import BOUNDARY
from entropy_llm import EntropyConfig, MinimalLLM
from entropy_patcher import EntropyPatcher, PatchConfig, entropy_of, patch_starts
from layers import documents_of, feed_forward_width
from rows import check_patch_lengths

TOLERANCE = 1e-4  # measured: at most 5e-6 at 117 ids, 8e-6 at 300 and 1600, on logits up to 6
CHARACTERS = [*range(0x800), *range(0x800, 0xD800, 0x40), *range(0xE000, 0x110000, 0x40)]  # in UTF-8 they take all bytes it has
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


def hf_part(dim, heads, layers, c, **more):
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    return dict(
        hidden_size=dim, num_attention_heads=heads, num_hidden_layers=layers, rope_parameters=rope,
        intermediate_size=feed_forward_width(dim), rms_norm_eps=c.norm_eps, **more,
    )  # fmt: skip


def random_hf_model(seed=0, **difference):
    """A `BltForCausalLM` written down independently of convert_hf.py, with a patcher of window 16."""
    c = config_of(**difference)
    cross = dict(cross_attn_k=c.cross_attn_k, hidden_size_global=c.global_dim)
    config = BltConfig(
        encoder_config=hf_part(32, c.encoder_heads, c.encoder_layers, c, cross_attn_all_layers=c.cross_attn_all_layers_encoder, **cross),
        global_config=hf_part(c.global_dim, c.global_heads, c.global_layers, c),
        decoder_config=hf_part(32, c.decoder_heads, c.decoder_layers, c, cross_attn_all_layers=c.cross_attn_all_layers_decoder, **cross),
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
    return randomize(MinimalLLM(EntropyConfig(**(dict(d_model=24, n_heads=3, n_layers=2, max_seq_len=16) | more))), seed)


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
    print(f"entropies differ by at most {(theirs - H).abs().max():.1e}, on average {(theirs - H).abs().mean():.1e} nats")
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
        (lambda c: setattr(c.global_config, "intermediate_size", 512), "blt_global_transformer.intermediate_size is 512"),
        (lambda c: setattr(c.decoder_config, "rms_norm_eps", 1e-6), "blt_local_decoder.rms_norm_eps is 1e-06"),
        (lambda c: setattr(c.decoder_config, "hidden_act", "gelu"), "blt_local_decoder.hidden_act is 'gelu'"),
        (lambda c: c.global_config.rope_parameters.update(rope_theta=7.0), "blt_global_transformer.rope_parameters.* rope_theta must be the encoder's"),
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
    for name, value in (("sliding_window", None), ("num_key_value_heads", 1), ("rms_norm_eps", 1e-3), ("vocab_size", 300)):
        hf_model = random_hf_model()
        setattr(hf_model.config.patcher_config, name, value)
        with pytest.raises(ValueError, match=f"blt_patcher.{name} is {value}"):
            entropy_model_from_transformers(hf_model)
