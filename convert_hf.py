"""Convert models to transformers' BltForCausalLM and back: the same weights, the same logits.

Reads   --to_hf: an output folder of llm.py or train_blt.py; --from_hf: a folder of transformers, or the id of one on the Hugging Face hub
Writes  --to_hf, in hf_model/: model.safetensors, config.json, generation_config.json, the tokenizer's files, convert_hf.json (what was converted);
        --from_hf, in checkpoints_from_hf/: best.pt, model.json, entropy_model.pth and .json, for generate.py, evaluation and --init_from
Run     python convert_hf.py --to_hf checkpoints [--output hf_model] [--without_patcher] [--dtype bf16]
        python convert_hf.py --from_hf itazap/blt-1b-hf [--output checkpoints_from_hf] [--patches_of checkpoints]
Next    docs/transformers.md: which of transformers' settings to use. Seconds for a model of 15M parameters; memory: about twice the weights.

As a library, in memory:

    from_transformers(hf_model)                            BltForCausalLM -> BLTModel
    entropy_model_from_transformers(hf_model)              its patcher -> MinimalLLM
    to_transformers(model, entropy_model, patch_config)    BLTModel, MinimalLLM, PatchConfig -> BltForCausalLM
    hf_inputs(patcher, text)                               ids and patches of a text, as transformers takes them
    make_tokenizer()                                       str -> those ids, and back

A conversion copies every weight just once, and raises ValueError for what the other side cannot express.

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

import gc
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, BltConfig, BltForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from blt.checks import check
from blt.config import run_script
from blt.files import git_commit, load_weights, model_hash, save_weights, write_atomically, write_json
from blt.ids import BOUNDARY, to_bytes
from blt.layers import feed_forward_width
from blt.patch_rules import NEEDS_ENTROPIES, PatchConfig
from blt_model import BLTConfig, BLTModel, uninitialized
from entropy_llm import EntropyConfig, MinimalLLM
from save_entropy_model import entropy_model_of, load_blt, read_record, save_entropy_model


@dataclass
class ConvertConfig:
    to_hf: str | None = None  # output folder of llm.py or train_blt.py to convert for transformers
    from_hf: str | None = None  # or: folder of transformers, or Hugging Face id, to convert for this project
    output: str | None = None  # folder to write; None: hf_model or checkpoints_from_hf
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = (
        "keep"  # of the weights written; keep: as they are (an entropy model for this project: fp32)
    )
    without_patcher: bool = False  # to_hf: leave the entropy model out; transformers must then be given patch_lengths
    patches_of: str | None = None  # from_hf: rule and entropy model of this output folder instead of the patcher's
    check: Literal["auto", "yes", "no"] = (
        "auto"  # compare the logits of both (takes both in fp32 at once); auto: up to 1 billion parameters
    )

    def __post_init__(self):
        if (self.to_hf is None) == (self.from_hf is None):
            raise ValueError(
                "give either --to_hf (a folder of llm.py or train_blt.py) or --from_hf (a folder of transformers, or a Hugging Face id)"
            )
        if self.from_hf is None and self.patches_of is not None:
            raise ValueError("patches_of goes with --from_hf")
        if self.to_hf is None and self.without_patcher:
            raise ValueError("without_patcher goes with --to_hf; to take other patches than a patcher's: --patches_of")
        check(self, "dtype", self.dtype in DTYPES, "one of " + ", ".join(DTYPES))
        check(self, "check", self.check in ("auto", "yes", "no"), "auto, yes or no")
        self.output = self.output or ("hf_model" if self.from_hf is None else "checkpoints_from_hf")


DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECKED_SIZE = 1_000_000_000  # parameters up to which check=auto compares logits
CHECK_TEXT = (
    "Bytes in, patches through the large transformer, bytes out. " * 3
    + "In 2024 the paper (arXiv 2412.09871) said: naïve Ω, 漢字, 🙂.\n"
).encode()
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
CROSS_ATTENTION = {
    "query_norm": "q_norm",
    "key_norm": "k_norm",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
}


def from_transformers(hf_model):
    """A `BLTModel` with the weights of a `BltForCausalLM`, in evaluation mode, on its device and of its dtype.

    Gives the same logits for the same ids and patches. The embeddings of ids 0, 2 and 3 and the head's rows 0, 1 and 3 have
    no counterpart and are left out. The patcher is left to `entropy_model_from_transformers`; its rule is
    PatchConfig(entropy_threshold=hf_model.config.patching_threshold).

    A feed-forward may have any width (that of transformers' default encoder is not rounded up to 256). A field like
    encoder_ffn_dim is set where the width is another than `feed_forward_width`, and is None elsewhere.

    Raises ValueError for what `BLTModel` cannot express: grouped-query attention, several hash functions, no window, another kind of rotary embedding, parts that differ in epsilon,
    theta or dropout, cross-attention after several encoder layers (transformers pools anew at each; here and in the
    released code the same vectors are refined).
    """
    config = _blt_config(hf_model.config)
    weights = _our_weights(hf_model, _weight_names(config), of_patcher=False)
    device, dtype = _kind(weights)
    model = uninitialized(config, device, dtype)
    model.load_state_dict(weights)
    return model.eval()


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
        ffn_dim=_ffn_dim(config), max_seq_len=config.sliding_window, rope_theta=config.rope_parameters["rope_theta"], dropout=config.dropout,
    )  # fmt: skip
    return _filled(
        MinimalLLM(entropy_config), _our_weights(hf_model, _entropy_weight_names(entropy_config), of_patcher=True)
    )


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
    config, weights = hf_config_and_weights(model, entropy_model, patch_config)
    hf_model = _filled(BltForCausalLM(config), weights)
    hf_model.generation_config.suppress_tokens = UNKNOWN_CLASSES
    return hf_model


def hf_config_and_weights(model, entropy_model=None, patch_config=None):
    """What `to_transformers` makes its model of: (BltConfig, {name: weight}). All but the widened rows are the model's own memory."""
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
    advice = " (a rule that transformers lacks can stay outside: --without_patcher, or no entropy_model)"
    _need(patch_config, "method", "global", advice)
    _need(patch_config, "min_patch_size", 1, advice)
    _need(patch_config, "max_patch_size", None, advice)

    weights, entropy_config = _their_weights(model.state_dict(), _weight_names(config)), None
    if entropy_model is not None:
        entropy_config = entropy_model.config
        weights |= _their_weights(entropy_model.state_dict(), _entropy_weight_names(entropy_config))
        weights[PATCHER + "lm_head.weight"][:HF_FIRST_BYTE] = entropy_model.head.weight.detach()[NO_UTF8].mean(0)
    return _hf_config(config, entropy_config, patch_config), weights


def to_hf_ids(ids_BT):
    """Our input ids as transformers numbers them: byte b -> b + 4, the boundary -> 1."""
    return torch.where(ids_BT == BOUNDARY, HF_BEGIN, ids_BT + HF_FIRST_BYTE)


def _need(config, name, wanted, advice=""):
    """Raise ValueError unless a config's field has the one value that can be converted."""
    value, whose = getattr(config, name), getattr(config, "model_type", type(config).__name__)
    if value != wanted:
        raise ValueError(f"{whose}.{name} is {value!r}; to be converted it must be {wanted!r}{advice}")


def _check_part(config):
    """Raise ValueError unless this stack of a `BltConfig` is made of our `Block`."""
    _need(config, "num_key_value_heads", config.num_attention_heads)
    _need(config, "hidden_act", "silu")
    if config.rope_parameters["rope_type"] != "default":
        raise ValueError(
            f"{config.model_type}.rope_parameters is {config.rope_parameters}; to be converted its rope_type must be 'default'"
        )


def _ffn_dim(config):
    """The ffn_dim of our settings for a stack of a `BltConfig`: None where None gives that width."""
    width = config.intermediate_size
    return None if width == feed_forward_width(config.hidden_size) else width


def _blt_config(hf_config):
    """`BltConfig` -> `BLTConfig`."""
    parts = {
        "encoder": hf_config.encoder_config,
        "global": hf_config.global_config,
        "decoder": hf_config.decoder_config,
    }
    encoder, decoder, theta = parts["encoder"], parts["decoder"], parts["encoder"].rope_parameters["rope_theta"]
    for part in parts.values():
        _check_part(part)
        _need(part, "rms_norm_eps", encoder.rms_norm_eps)
        _need(part, "dropout", encoder.dropout)
        if part.rope_parameters["rope_theta"] != theta:
            raise ValueError(
                f"{part.model_type}.rope_parameters is {part.rope_parameters}; to be converted its rope_theta must be the encoder's, {theta}"
            )
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
        **{f"{name}_ffn_dim": _ffn_dim(part) for name, part in parts.items()},
        ngram_sizes=list(hf_config.encoder_hash_byte_group_size), hash_rows=hf_config.encoder_hash_byte_group_vocab,
        cross_attn_k=hf_config.cross_attn_k, window=encoder.sliding_window, rope_theta=theta,
        norm_eps=encoder.rms_norm_eps, dropout=encoder.dropout,
        cross_attn_all_layers_encoder=bool(encoder.cross_attn_all_layers),
        cross_attn_all_layers_decoder=bool(decoder.cross_attn_all_layers),
    )  # fmt: skip


def _hf_part(dim, heads, layers, ffn_dim, theta, norm_eps, dropout):
    sizes = dict(
        hidden_size=dim,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        intermediate_size=ffn_dim or feed_forward_width(dim),
    )
    rope = {"rope_type": "default", "rope_theta": float(theta)}
    return sizes | dict(rope_parameters=rope, rms_norm_eps=norm_eps, dropout=dropout)


def _hf_config(config, entropy_config, patch_config):
    """`BLTConfig`, `EntropyConfig` or None, and `PatchConfig` -> `BltConfig`."""
    parts = {}
    for name in ("encoder", "global", "decoder"):
        dim, layers = getattr(config, f"{name}_dim"), getattr(config, f"{name}_layers")
        ffn_dim = getattr(config, f"{name}_ffn_dim")
        parts[name] = _hf_part(
            dim, config.heads(name), layers, ffn_dim, config.rope_theta, config.norm_eps, config.dropout
        )
    for name in ("encoder", "decoder"):
        parts[name] |= dict(cross_attn_k=config.cross_attn_k, hidden_size_global=config.global_dim)
        parts[name]["cross_attn_all_layers"] = getattr(config, f"cross_attn_all_layers_{name}")
    if (e := entropy_config) is not None:
        parts["patcher"] = _hf_part(
            e.d_model, e.n_heads, e.n_layers, e.ffn_dim, e.rope_theta, ENTROPY_NORM_EPS, e.dropout
        )
        parts["patcher"]["sliding_window"] = e.max_seq_len
    return BltConfig(
        **{f"{name}_config": part for name, part in parts.items()},
        patch_in_forward=entropy_config is not None, patching_threshold=float(patch_config.entropy_threshold),
        local_attention_window_len=config.window, cross_attn_k=config.cross_attn_k,
        encoder_hash_byte_group_size=list(config.ngram_sizes), encoder_hash_byte_group_vocab=config.hash_rows,
        bos_token_id=HF_BEGIN, eos_token_id=HF_END, pad_token_id=0, use_cache=False,
    )  # fmt: skip


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
    return {
        f"{ours}.{i}.{a}.weight": (f"{theirs}.{i}.{b}.weight", None) for i in range(n_layers) for a, b in parts.items()
    }


def _our_weights(hf_model, names, of_patcher):
    """The weights of transformers' patcher, or all others, under our names; rows without a counterpart left out."""
    weights = {name: weight for name, weight in hf_model.state_dict().items() if name.startswith(PATCHER) == of_patcher}
    _check_names(
        (hf_name for hf_name, _ in names.values()),
        weights,
        "transformers' patcher" if of_patcher else "the transformers model",
    )
    return {
        name: weights[hf_name] if rows is None else weights[hf_name][rows] for name, (hf_name, rows) in names.items()
    }


def _their_weights(weights, names):
    """Our model's weights under transformers' names, rows without a counterpart zero."""
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
        raise ValueError(
            f"the weights of {whose} are not those of its config: missing {missing}, unexpected {unexpected}"
        )


def _kind(weights):
    """The one device and dtype of these weights."""
    kinds = {(weight.device, weight.dtype) for weight in weights.values()}
    if len(kinds) != 1:
        raise ValueError(f"the weights to convert must share one device and one dtype, not {sorted(map(str, kinds))}")
    return kinds.pop()


def _filled(model, weights):
    """Copy weights into a new model, which takes their device and dtype; any that is missing or left over raises."""
    device, dtype = _kind(weights)
    model = model.to(device)
    for parameter in model.parameters():  # not the buffers: transformers' rotary frequencies must stay float32
        parameter.data = parameter.data.to(dtype)
    model.load_state_dict(weights)
    return model.eval()


def hf_inputs(patcher, text):
    """What a `BltForCausalLM` takes for one document and the patches that our patcher makes of it.

    text: bytes or whatever else `EntropyPatcher` takes, N bytes. Returns {"input_ids": int64 [1, N + 1], the beginning first,
    "patch_lengths": int64 [1, P], sum N + 2}: `hf_model(**hf_inputs(patcher, text), use_cache=False).logits[..., OUTPUT_ROWS]` are
    the logits of our model for the N bytes and what follows them.
    """
    document = to_bytes(text)
    starts = np.flatnonzero(np.concatenate(([True], patcher.starts(document))))
    lengths = np.diff(starts, append=len(document) + 2)
    ids = torch.from_numpy(np.concatenate(([BOUNDARY], document)).astype(np.int64))
    return {"input_ids": to_hf_ids(ids)[None], "patch_lengths": torch.from_numpy(lengths)[None]}


def make_tokenizer():
    """A tokenizer of transformers: str -> 1 and each UTF-8 byte + 4; ids -> str.

    Special tokens are not found in text: "<s>" in a text is three bytes. Text that is no UTF-8 cannot be a str: `hf_inputs` takes bytes.
    """
    special = ["<pad>", "<s>", "</s>", "<delim>"]
    vocabulary = {token: i for i, token in enumerate(special)} | {
        _byte_character(b): b + HF_FIRST_BYTE for b in range(256)
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", HF_BEGIN)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right",
        clean_up_tokenization_spaces=False, split_special_tokens=True, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def _byte_character(byte):
    """The printable character that stands for a byte in byte-level tokenizers: itself where it is one, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte if byte in printable else 0x100 + sum(b not in printable for b in range(byte)))


def write_for_transformers(folder, output, dtype="keep", without_patcher=False):
    """Convert an output folder of ours into one that `BltForCausalLM.from_pretrained` opens. Returns the record in convert_hf.json.

    Reads the weights from the file as they are written: the memory needed is that of the weights once, and as much again at most.
    """
    folder, output = Path(folder), Path(output)
    if (output / "config.json").exists() and not (output / "convert_hf.json").exists():
        raise ValueError(
            f"{output} holds a model of transformers that convert_hf.py has not written; give another --output"
        )
    record = read_record(folder)
    with torch.device("meta"):
        model = BLTModel(BLTConfig(**record["model_config"]))
    load_weights(folder / "best.pt", model, assign=True)
    wanted = DTYPES[dtype] or model.head.weight.dtype
    patch_config, entropy_model = PatchConfig(**record["patch_config"]), None
    if not without_patcher:
        _need(
            patch_config,
            "method",
            "global",
            " (or leave the patcher out: --without_patcher; patches must then be passed to transformers)",
        )
        entropy_model = entropy_model_of(folder, record)[0].to(wanted)
    config, weights = hf_config_and_weights(model, entropy_model, None if without_patcher else patch_config)
    weights = {name: weight.to(wanted).contiguous() for name, weight in weights.items()}
    config.architectures, config.dtype = ["BltForCausalLM"], wanted
    generation = GenerationConfig.from_model_config(config)
    generation.suppress_tokens = UNKNOWN_CLASSES
    converted = {
        "converted_from": str(folder), "commit": git_commit(), "dtype": str(wanted).removeprefix("torch."), "patcher": not without_patcher,
        "patch_config": record["patch_config"], "entropy_model_sha256": record["entropy_model_sha256"], "weights_sha256": model_hash(model),
    }  # fmt: skip
    write_json(output / "convert_hf.json", converted)
    config.save_pretrained(output)
    generation.save_pretrained(output)
    make_tokenizer().save_pretrained(output)
    write_atomically(
        output / "model.safetensors", lambda temporary: save_file(weights, temporary, metadata={"format": "pt"})
    )
    return converted


def write_from_transformers(source, output, dtype="keep", patches_of=None):
    """Convert a folder of transformers, or a model of the Hugging Face hub, into an output folder of ours. Returns the record in model.json.

    patches_of: an output folder of ours whose patch rule and entropy model the result gets; None: those of the patcher. Takes the memory
    of the weights twice. The entropy model is written in fp32.
    """
    output = Path(output)
    if (output / "model.json").exists() and "converted_from" not in json.loads((output / "model.json").read_text()):
        raise ValueError(f"{output} holds a model that was trained there; give another --output")
    hf_model = open_hf_model(source, DTYPES[dtype] or "auto")
    config = hf_model.config
    if patches_of is not None:
        other = read_record(patches_of)
        patch_config, entropy_model = PatchConfig(**other["patch_config"]), None
        if patch_config.method in NEEDS_ENTROPIES:
            entropy_model = entropy_model_of(patches_of, other)[0]
    elif hf_model.model.patcher is None:
        raise ValueError(
            f"{source} has no patcher; name an output folder whose patch rule and entropy model it is to have: --patches_of checkpoints"
        )
    else:
        _need(config, "patching_mode", "entropy")
        if config.patching_threshold is None:
            raise ValueError("blt.patching_threshold is None: such patches look ahead; set a threshold in config.json")
        # The same rule up to one place: transformers splits a row's last patch without looking at the byte after the row.
        patch_config = PatchConfig(entropy_threshold=config.patching_threshold, max_patch_size=config.max_patch_length)
        entropy_model = entropy_model_from_transformers(hf_model).float()
    model = from_transformers(hf_model)
    del hf_model
    gc.collect()  # modules refer to each other
    record = {
        "model_config": asdict(model.config), "patch_config": asdict(patch_config), "precision": "fp32",
        "entropy_model_path": str(output / "entropy_model.pth"), "entropy_model_sha256": None,
        "converted_from": str(source), "commit": git_commit(), "dtype": str(model.head.weight.dtype).removeprefix("torch."),
        "corpus": {"dataset": f"that of {source}", "sha256": None}, "settings": {"row_bytes": 4096},
    }  # fmt: skip
    if entropy_model is not None:
        save_entropy_model(entropy_model, record["entropy_model_path"], {"converted_from": str(patches_of or source)})
        record["entropy_model_sha256"] = model_hash(entropy_model)
    write_json(output / "model.json", record)
    save_weights(output / "best.pt", model)
    return record


def open_hf_model(source, dtype="auto"):
    """A `BltForCausalLM` from a folder or the hub, in evaluation mode. Raises ValueError unless it is one and whole.

    (from_pretrained itself fills weights that the file lacks with random numbers.)
    """
    if not Path(source).exists() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise FileNotFoundError(
            f"{source} not found; give a folder that transformers can open, or an id like itazap/blt-1b-hf"
        )
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type != "blt":
            raise ValueError(f"its config says model_type {config.model_type!r}, not 'blt'")
        hf_model, report = BltForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = "" if Path(source).exists() else "; there is no such folder here, so it was taken for a Hugging Face id"
        raise ValueError(f"transformers cannot open {str(source)!r} as a BLT: {reason}{where}") from None
    wrong = {
        what: sorted(map(str, report[what]))
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report[what]
    }
    if wrong:
        raise ValueError(
            f"the weights of {source} are not those of its config: "
            + "; ".join(f"{what} {keys[:5]}" for what, keys in wrong.items())
        )
    return hf_model.eval()


@torch.no_grad()
def compare(folder, hf_folder):
    """Read both folders in fp32 and compare them on a short text: (largest difference of logits, boundaries of ours, differing boundaries).

    The logits are for the same ids and patches. The boundaries are those that each finds itself; None, None where transformers has no patcher.
    """
    model, patcher, _ = load_blt(folder)
    hf_model = open_hf_model(hf_folder, torch.float32)
    inputs = hf_inputs(patcher, CHECK_TEXT)
    ids = torch.tensor([[BOUNDARY, *CHECK_TEXT]])
    theirs = hf_model(**inputs, use_cache=False).logits[..., OUTPUT_ROWS]
    difference = (model(ids, inputs["patch_lengths"]) - theirs).abs().max().item()
    if hf_model.model.patcher is None:
        return difference, None, None
    lengths = hf_model.model.patcher(inputs["input_ids"], patch_size=1, threshold=hf_model.config.patching_threshold)[1]
    ours, theirs = (set(x[0].cumsum(0)[:-1].tolist()) for x in (inputs["patch_lengths"], lengths))
    return difference, len(ours), len(ours ^ theirs)


def main(config):
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if config.from_hf is None:
        record = write_for_transformers(config.to_hf, config.output, config.dtype, config.without_patcher)
        ours, theirs, files = (
            config.to_hf,
            config.output,
            "model.safetensors, config.json, generation_config.json, tokenizer, convert_hf.json",
        )
        following = (
            f"next: BltForCausalLM.from_pretrained({config.output!r}); docs/transformers.md says with which settings"
        )
    else:
        record = write_from_transformers(config.from_hf, config.output, config.dtype, config.patches_of)
        ours, theirs, files = (
            config.output,
            config.from_hf,
            "best.pt, model.json"
            + (", entropy_model.pth, entropy_model.json" if record["entropy_model_sha256"] else ""),
        )
        following = f"next: python generate.py --model {config.output} --prompt 'The history of', or python train_blt.py --init_from {config.output}"
    rule = record["patch_config"]
    with torch.device("meta"):
        parts = BLTModel(BLTConfig(**read_record(ours)["model_config"])).parameters_by_part()
    size = sum(parts.values())
    print(
        f"BLT: {size:,} parameters ({', '.join(f'{part} {count:,}' for part, count in parts.items())}), {record['dtype']}"
    )
    print(
        f"patches: {rule['method']}, threshold {rule['entropy_threshold']:.4f}"
        + ("" if record.get("patcher", True) else "; without patcher: pass patch_lengths (convert_hf.hf_inputs)")
    )
    if config.check == "yes" or (config.check == "auto" and size <= CHECKED_SIZE):
        difference, boundaries, differing = compare(ours, theirs)
        print(f"check: logits differ by at most {difference:.1e} over {len(CHECK_TEXT)} bytes, same patches, in fp32")
        if differing:
            print(
                f"check: {differing} of {boundaries} patches begin elsewhere: the patcher of transformers takes entropies over 260 classes, ours over 256 (docs/transformers.md)"
            )
        elif boundaries:
            print(f"check: all {boundaries} patches begin at the same bytes")
        if config.dtype == "keep" and not difference < 1e-3:
            raise ValueError(
                f"the converted model gives other logits (by {difference:.2g}); please report this with its config"
            )
    print(f"wrote {config.output}/: {files}")
    print(following)


if __name__ == "__main__":
    run_script(main, ConvertConfig, __doc__)
