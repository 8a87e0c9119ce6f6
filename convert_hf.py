"""Convert models to transformers' BltForCausalLM and back, in memory: the same weights, the same logits.

    from_transformers(hf_model)                            BltForCausalLM -> BLTModel
    entropy_model_from_transformers(hf_model)              its patcher -> MinimalLLM
    to_transformers(model, entropy_model, patch_config)    BLTModel, MinimalLLM, PatchConfig -> BltForCausalLM

To write the result: `BltForCausalLM.save_pretrained`. A conversion copies every weight just once, and raises ValueError for
what the other side cannot express.

Ids. transformers numbers byte b as b + 4; before it stand 0 (filler), 1 (beginning), 2 (end) and 3 (BPE delimiter). Our boundary,
256, is their 1 as an input and their 2 as a class: `to_hf_ids(ids)` are their inputs, `logits[..., OUTPUT_ROWS]` our logits.

Patches. Our lengths cover T + 1 ids and can be passed to transformers as they are. The lengths that it makes itself cover T
ids (with a 0 at the end if the next byte opens a patch) and mean the same.

Where transformers differs:
- Documents: it has no document mask. A row with a boundary inside gets other logits than ours; give it one document a row.
- Cache: its key-value cache shows hashes, patches and latent transformer only the newest byte. A converted model's config
  says use_cache=False; the released ones need that in each call.
- Own patches: it takes entropies over 260 classes, not 256 (see `to_transformers`, `entropy_model_from_transformers`).
- Dropout stands at other places. The rate is copied; it matters in training only.
"""

import torch
from transformers import BltConfig, BltForCausalLM

from blt_model import BLTConfig, BLTModel
from data import BOUNDARY
from entropy_llm import EntropyConfig, MinimalLLM
from entropy_patcher import PatchConfig
from layers import feed_forward_width

HF_IDS, HF_FIRST_BYTE, HF_BEGIN, HF_END = 260, 4, 1, 2
BYTE_ROWS = list(range(HF_FIRST_BYTE, HF_IDS))  # those of the bytes
INPUT_ROWS = [*BYTE_ROWS, HF_BEGIN]  # transformers' embedding row of each of our ids
OUTPUT_ROWS = [*BYTE_ROWS, HF_END]  # transformers' head row of each of our classes
UNKNOWN_CLASSES = [0, 1, 3]  # transformers' classes that we have not: never a target
NO_UTF8 = [0xC0, 0xC1, *range(0xF5, 0x100)]  # bytes that no UTF-8 text holds
ENTROPY_NORM_EPS = 1e-5  # MinimalLLM's
PATCHER = "model.patcher."  # what the names of the patcher's weights begin with

BLOCK = {
    "attention_norm": "input_layernorm", "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj",
}  # fmt: skip
CROSS_ATTENTION = {"query_norm": "q_norm", "key_norm": "k_norm", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}


# ---------------------------------------------------------------------------------------------------------------------
# Models


def from_transformers(hf_model):
    """A `BLTModel` with the weights of a `BltForCausalLM`, in evaluation mode, on its device and of its dtype.

    Gives the same logits for the same ids and patches. The embeddings of ids 0, 2 and 3 and the head's rows 0, 1 and 3 have
    no counterpart and are left out. The patcher is left to `entropy_model_from_transformers`; its rule is
    PatchConfig(entropy_threshold=hf_model.config.patching_threshold).

    Raises ValueError for what `BLTModel` cannot express: grouped-query attention, feed-forward widths other than
    `feed_forward_width`, several hash functions, no window, another kind of rotary embedding, parts that differ in epsilon,
    theta or dropout, cross-attention after several encoder layers (transformers pools anew at each; here and in the
    released code the same vectors are refined).
    """
    config = _blt_config(hf_model.config)
    return _filled(BLTModel(config), _our_weights(hf_model, _weight_names(config), of_patcher=False))


def entropy_model_from_transformers(hf_model):
    """A `MinimalLLM` with the weights of a `BltForCausalLM`'s patcher, in evaluation mode.

    Its 256 logits are the patcher's logits of the bytes. Its entropies are not quite the patcher's, which are over 260
    classes. With q the patcher's probability of the four classes that are no bytes, and H the entropy within each part:

        H_260 = H(q, 1 - q) + (1 - q) * H_bytes + q * H_others

    They differ by ln 260 - ln 256 = 0.016 nats where all classes are equally likely, and not at all where q is 0. Where the
    entropy is that near to the threshold, a patch may begin in one and not in the other.
    """
    if hf_model.model.patcher is None:
        raise ValueError("the transformers model has no patcher: its config says patch_in_forward=False")
    config = hf_model.config.patcher_config
    _check_part(config)
    _need(config, "vocab_size", HF_IDS)
    _need(config, "rms_norm_eps", ENTROPY_NORM_EPS)
    if config.sliding_window is None:
        raise ValueError("blt_patcher.sliding_window is None; to be converted it must be a number of bytes")
    entropy_config = EntropyConfig(
        d_model=config.hidden_size, n_heads=config.num_attention_heads, n_layers=config.num_hidden_layers,
        max_seq_len=config.sliding_window, rope_theta=config.rope_parameters["rope_theta"], dropout=config.dropout,
    )  # fmt: skip
    return _filled(MinimalLLM(entropy_config), _our_weights(hf_model, _entropy_weight_names(entropy_config), of_patcher=True))


def to_transformers(model, entropy_model=None, patch_config=None):
    """A `BltForCausalLM` with the weights of a `BLTModel`, in evaluation mode, that finds its patches by an entropy model.

    entropy_model: `MinimalLLM`; None: the result has no patcher, and needs patch_lengths (else each byte is a patch).
    patch_config: the rule; by default PatchConfig(), the one of EntropyPatcher(entropy_model).

    Rows without a counterpart are zero: the embeddings of ids 0, 2 and 3 and the head's rows 0, 1 and 3. A zero row makes
    a logit of 0, not of minus infinity: take probabilities and losses over OUTPUT_ROWS, not over all 260 classes
    (generation_config suppresses the three). The patcher's head has four classes that ours has not, and no bias to rule them
    out. Each gets the mean of the rows of the bytes that UTF-8 never holds. With p its probability at a place relative to
    our 256 classes and H our entropy, the patcher's entropy there is

        H_260 = (H + 4 p ln(1 / p)) / (1 + 4 p) + ln(1 + 4 p)

    which is next to nothing for a trained model (LOG.md has a measurement).

    Raises ValueError for what transformers cannot express: qk_norm, mean pooling, no n-gram embeddings, encoder and decoder
    of different widths, cross-attention after several encoder layers (it pools anew at each), rules other than global,
    min_patch_size, and max_patch_size (it splits without the next byte, so the patches of a prefix differ).
    """
    config = model.config
    _need(config, "qk_norm", False)
    _need(config, "pooling", "max")
    _need(config, "decoder_dim", config.encoder_dim)
    if config.encoder_layers > 1:
        _need(config, "cross_attn_all_layers_encoder", False)
    if not config.ngram_sizes:
        raise ValueError("BLTConfig.ngram_sizes is empty; to be converted it must have one size or more")
    if entropy_model is None and patch_config is not None:
        raise ValueError("patch_config is given, but no entropy_model to find patches by")
    patch_config = patch_config or PatchConfig()
    _need(patch_config, "method", "global")
    _need(patch_config, "min_patch_size", 1)
    _need(patch_config, "max_patch_size", None)

    weights, entropy_config = _their_weights(model, _weight_names(config)), None
    if entropy_model is not None:
        entropy_config = entropy_model.config
        weights |= _their_weights(entropy_model, _entropy_weight_names(entropy_config))
        weights[PATCHER + "lm_head.weight"][:HF_FIRST_BYTE] = entropy_model.head.weight.detach()[NO_UTF8].mean(0)
    hf_model = _filled(BltForCausalLM(_hf_config(config, entropy_config, patch_config)), weights)
    hf_model.generation_config.suppress_tokens = UNKNOWN_CLASSES
    return hf_model


def to_hf_ids(ids_BT):
    """Our input ids as transformers numbers them: byte b -> b + 4, the boundary -> 1."""
    return torch.where(ids_BT == BOUNDARY, HF_BEGIN, ids_BT + HF_FIRST_BYTE)


# ---------------------------------------------------------------------------------------------------------------------
# Configs


def _need(config, name, wanted):
    """Raise ValueError unless a config's field has the one value that can be converted."""
    value, whose = getattr(config, name), getattr(config, "model_type", type(config).__name__)
    if value != wanted:
        raise ValueError(f"{whose}.{name} is {value!r}; to be converted it must be {wanted!r}")


def _check_part(config):
    """Raise ValueError unless this stack of a `BltConfig` is made of our `Block`."""
    _need(config, "num_key_value_heads", config.num_attention_heads)
    _need(config, "intermediate_size", feed_forward_width(config.hidden_size))
    _need(config, "hidden_act", "silu")
    if config.rope_parameters["rope_type"] != "default":
        raise ValueError(f"{config.model_type}.rope_parameters is {config.rope_parameters}; to be converted its rope_type must be 'default'")


def _blt_config(hf_config):
    """`BltConfig` -> `BLTConfig`."""
    parts = {"encoder": hf_config.encoder_config, "global": hf_config.global_config, "decoder": hf_config.decoder_config}
    encoder, decoder, theta = parts["encoder"], parts["decoder"], parts["encoder"].rope_parameters["rope_theta"]
    for part in parts.values():
        _check_part(part)
        _need(part, "rms_norm_eps", encoder.rms_norm_eps)
        _need(part, "dropout", encoder.dropout)
        if part.rope_parameters["rope_theta"] != theta:
            raise ValueError(f"{part.model_type}.rope_parameters is {part.rope_parameters}; to be converted its rope_theta must be the encoder's, {theta}")
    for part in (hf_config, encoder, decoder):
        _need(part, "vocab_size", HF_IDS)
        _need(part, "cross_attn_k", hf_config.cross_attn_k)
    _need(decoder, "hidden_size", encoder.hidden_size)
    _need(hf_config, "encoder_hash_byte_group_nb_functions", 1)
    if hf_config.local_attention_window_len is None:
        raise ValueError("blt.local_attention_window_len is None; to be converted it must be a number of bytes")
    _need(encoder, "sliding_window", hf_config.local_attention_window_len)
    if encoder.num_hidden_layers > 1:
        _need(encoder, "cross_attn_all_layers", False)
    fields = {"layers": "num_hidden_layers", "dim": "hidden_size", "heads": "num_attention_heads"}
    return BLTConfig(
        **{f"{name}_{ours}": getattr(part, theirs) for name, part in parts.items() for ours, theirs in fields.items()},
        ngram_sizes=list(hf_config.encoder_hash_byte_group_size), hash_rows=hf_config.encoder_hash_byte_group_vocab,
        cross_attn_k=hf_config.cross_attn_k, window=encoder.sliding_window, rope_theta=theta,
        norm_eps=encoder.rms_norm_eps, dropout=encoder.dropout,
        cross_attn_all_layers_encoder=bool(encoder.cross_attn_all_layers),
        cross_attn_all_layers_decoder=bool(decoder.cross_attn_all_layers),
    )  # fmt: skip


def _hf_part(dim, heads, layers, theta, norm_eps, dropout):
    sizes = dict(hidden_size=dim, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=feed_forward_width(dim))
    rope = {"rope_type": "default", "rope_theta": float(theta)}
    return sizes | dict(rope_parameters=rope, rms_norm_eps=norm_eps, dropout=dropout)


def _hf_config(config, entropy_config, patch_config):
    """`BLTConfig`, `EntropyConfig` or None, and `PatchConfig` -> `BltConfig`."""
    parts = {}
    for name in ("encoder", "global", "decoder"):
        dim, layers = getattr(config, f"{name}_dim"), getattr(config, f"{name}_layers")
        parts[name] = _hf_part(dim, config.heads(name), layers, config.rope_theta, config.norm_eps, config.dropout)
    for name in ("encoder", "decoder"):
        parts[name] |= dict(cross_attn_k=config.cross_attn_k, hidden_size_global=config.global_dim)
        parts[name]["cross_attn_all_layers"] = getattr(config, f"cross_attn_all_layers_{name}")
    if (e := entropy_config) is not None:
        parts["patcher"] = _hf_part(e.d_model, e.n_heads, e.n_layers, e.rope_theta, ENTROPY_NORM_EPS, e.dropout)
        parts["patcher"]["sliding_window"] = e.max_seq_len
    return BltConfig(
        **{f"{name}_config": part for name, part in parts.items()},
        patch_in_forward=entropy_config is not None, patching_threshold=float(patch_config.entropy_threshold),
        local_attention_window_len=config.window, cross_attn_k=config.cross_attn_k,
        encoder_hash_byte_group_size=list(config.ngram_sizes), encoder_hash_byte_group_vocab=config.hash_rows,
        bos_token_id=HF_BEGIN, eos_token_id=HF_END, pad_token_id=0, use_cache=False,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def _weight_names(config):
    """{our name: (transformers' name, transformers' rows of ours, None for all)} of every weight of a `BLTModel`."""
    encoder, latent, decoder = "model.local_encoder", "model.global_transformer", "model.local_decoder"
    names = {
        "encoder.byte_embedding.weight": (f"{encoder}.embed_tokens.weight", INPUT_ROWS),
        "encoder.hash_embedding.tables.weight": ("model.encoder_hash_tok_embedding.weight", None),
        "encoder.patch_query.weight": (f"{encoder}.patch_embedding_projection.weight", None),
        "decoder.patch_vectors.weight": (f"{decoder}.patch_embedding_projection.weight", None),
        "decoder.norm.weight": (f"{decoder}.norm.weight", None),
        "head.weight": ("lm_head.weight", OUTPUT_ROWS),
    }
    if config.cross_attn_k * config.encoder_dim != config.global_dim:
        names["latent.widen.weight"] = (f"{latent}.token_embedding_projection.weight", None)
    names |= _stack("encoder.blocks", f"{encoder}.layers", config.encoder_layers, BLOCK)
    names |= _stack("latent.blocks", f"{latent}.layers", config.global_layers, BLOCK)
    names |= _stack("decoder.blocks", f"{decoder}.layers", config.decoder_layers, BLOCK)
    names |= _stack("encoder.cross_attentions", f"{encoder}.cross_attn_layers", 1, CROSS_ATTENTION)
    n_cross = config.decoder_layers if config.cross_attn_all_layers_decoder else 1
    return names | _stack("decoder.cross_attentions", f"{decoder}.cross_attn_layers", n_cross, CROSS_ATTENTION)


def _entropy_weight_names(config):
    """The same of every weight of a `MinimalLLM`."""
    names = {
        "embedding.weight": (f"{PATCHER}embed_tokens.weight", INPUT_ROWS),
        "norm.weight": (f"{PATCHER}norm.weight", None),
        "head.weight": (f"{PATCHER}lm_head.weight", BYTE_ROWS),
    }
    return names | _stack("blocks", f"{PATCHER}layers", config.n_layers, BLOCK)


def _stack(ours, theirs, n_layers, parts):
    return {f"{ours}.{i}.{a}.weight": (f"{theirs}.{i}.{b}.weight", None) for i in range(n_layers) for a, b in parts.items()}


def _our_weights(hf_model, names, of_patcher):
    """The weights of transformers' patcher, or all others, under our names; rows without a counterpart left out."""
    weights = {name: weight for name, weight in hf_model.state_dict().items() if name.startswith(PATCHER) == of_patcher}
    _check_names((hf_name for hf_name, _ in names.values()), weights, "transformers' patcher" if of_patcher else "the transformers model")
    return {name: weights[hf_name] if rows is None else weights[hf_name][rows] for name, (hf_name, rows) in names.items()}


def _their_weights(model, names):
    """Our model's weights under transformers' names, rows without a counterpart zero."""
    weights = model.state_dict()
    _check_names(names, weights, "our model")

    def widened(weight, rows):
        return weight.new_zeros(HF_IDS, weight.shape[1]).index_copy(0, torch.tensor(rows, device=weight.device), weight)

    return {hf: weights[name] if rows is None else widened(weights[name], rows) for name, (hf, rows) in names.items()}


def _check_names(expected, found, whose):
    """Raise ValueError unless the weights that are there are those that will be used, each once."""
    expected, found = list(expected), set(found)
    assert len(set(expected)) == len(expected), "a weight would be used twice"
    missing, unexpected = sorted(set(expected) - found), sorted(found - set(expected))
    if missing or unexpected:
        raise ValueError(f"the weights of {whose} are not those of its config: missing {missing}, unexpected {unexpected}")


def _filled(model, weights):
    """Copy weights into a new model, which takes their device and dtype; any that is missing or left over raises."""
    kinds = {(weight.device, weight.dtype) for weight in weights.values()}
    if len(kinds) != 1:
        raise ValueError(f"the weights to convert must share one device and one dtype, not {sorted(map(str, kinds))}")
    device, dtype = kinds.pop()
    model = model.to(device)
    for parameter in model.parameters():  # not the buffers: transformers' rotary frequencies must stay float32
        parameter.data = parameter.data.to(dtype)
    model.load_state_dict(weights)
    return model.eval()
