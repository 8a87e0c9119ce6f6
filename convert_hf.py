"""Convert models to transformers' BltForCausalLM and back: the same weights, the same logits.

Reads   --to_hf: an output folder of llm.py or train_blt.py
        --from_hf: a folder of transformers, or the id of a model on the Hugging Face hub
Writes  --to_hf, in hf_model/: model.safetensors, config.json, generation_config.json, the tokenizer's
        files, convert_hf.json (what was converted)
        --from_hf, in checkpoints_from_hf/: best.pt, model.json, entropy_model.pth and .json, for
        generate.py, evaluate.py and --init_from
Run     python convert_hf.py --to_hf checkpoints [--output hf_model] [--without_patcher] [--dtype bf16]
        python convert_hf.py --from_hf itazap/blt-1b-hf [--output ours] [--patches_of checkpoints]
Time    seconds for a model of 15M parameters; memory: about twice the weights
Next    docs/transformers.md: which of transformers' settings to use

The settings:
- dtype: "keep" writes weights in the dtype they have. --from_hf writes the entropy model in fp32.
- check: compares the logits of both models, which needs both in memory in fp32. "auto" does so up to
  1 billion parameters.
- without_patcher: transformers must then be given the patch_lengths of each text (see `hf_inputs`).
- patches_of: the result takes that folder's patch rule and entropy model, not transformers' patcher.

As a library, in memory:

    from_transformers(hf_model)                            BltForCausalLM -> BLTModel
    entropy_model_from_transformers(hf_model)              its patcher -> MinimalLLM
    to_transformers(model, entropy_model, patch_config)    BLTModel and its patcher -> BltForCausalLM
    hf_inputs(patcher, text)                               ids and patches of a text for transformers
    make_tokenizer()                                       str -> ids of transformers, and back

A conversion uses every weight exactly once. It raises ValueError for what the other side lacks.

Ids. transformers numbers byte b as b + 4. Below are 0 (padding), 1 (beginning), 2 (end) and 3 (BPE
delimiter). Our document boundary, 256, is their 1 as an input and their 2 as a class. `to_hf_ids(ids)`
gives their inputs, `logits[..., OUTPUT_ROWS]` our logits.

Patches. Our patch lengths cover T + 1 ids, and transformers accepts them unchanged. The lengths that
it computes itself cover T ids (with a final 0 if the next byte starts a patch) and mean the same.

Where transformers differs:
- Documents: it has no document mask. A row with a document boundary inside gets other logits than
  ours. Give it one document a row.
- Cache: with its key-value cache, the hashes, the patches and the latent transformer see only the
  newest byte. The config of a converted model says use_cache=False. Released models need
  it in each call.
- Patcher: its entropies are over 260 classes, not 256 (see `to_transformers` and
  `entropy_model_from_transformers`).
- Dropout: it is applied at other positions. The rate is copied; it matters in training only.
"""

import gc
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from blt.checks import check, check_output, check_packages
from blt.commands import command
from blt.config import run_script
from blt.files import git_commit, load_weights, model_hash, write_atomically, write_json
from blt.ids import BOUNDARY, to_bytes
from blt.layers import feed_forward_width
from blt.patch_rules import PatchConfig
from blt.records import RunRecord, read_record, save_model
from blt_model import BLTConfig, BLTModel, uninitialized
from entropy_llm import EntropyConfig, MinimalLLM
from save_entropy_model import entropy_model_of, load_blt, save_entropy_model

try:
    # transformers imports its modules on first use. Its classes are therefore written as attributes below:
    # `from transformers import BltForCausalLM` would load the model code here and slow --help down.
    import transformers
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
except ImportError:
    # `check_packages` says what to install; --help does without them.
    transformers = None

PACKAGES = ("transformers", "safetensors", "tokenizers")


@dataclass
class ConvertConfig:
    to_hf: str | None = None  # output folder of llm.py or train_blt.py to convert for transformers
    from_hf: str | None = None  # folder of transformers, or Hugging Face id, to convert for this project
    output: str | None = None  # folder to write; None: hf_model or checkpoints_from_hf
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"  # dtype of the written weights; keep: as they are
    without_patcher: bool = False  # to_hf: leave out the entropy model; texts then need patch_lengths
    patches_of: str | None = None  # from_hf: output folder whose patch rule and entropy model to take
    check: Literal["auto", "yes", "no"] = "auto"  # compare the logits; auto: up to 1 billion parameters

    def __post_init__(self):
        if (self.to_hf is None) == (self.from_hf is None):
            raise ValueError(
                "give either --to_hf (a folder of llm.py or train_blt.py) "
                "or --from_hf (a folder of transformers, or a Hugging Face id)"
            )
        if self.from_hf is None and self.patches_of is not None:
            raise ValueError("patches_of goes with --from_hf")
        if self.to_hf is None and self.without_patcher:
            raise ValueError("without_patcher goes with --to_hf; to take other patches than a patcher's: --patches_of")
        check(self, "dtype", self.dtype in DTYPES, "one of " + ", ".join(DTYPES))
        check(self, "check", self.check in ("auto", "yes", "no"), "auto, yes or no")
        # The default depends on the direction, so the field cannot hold it.
        if self.output is None:
            self.output = "hf_model" if self.from_hf is None else "checkpoints_from_hf"


# None: every weight keeps its own dtype.
DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# check=auto compares logits up to this many parameters.
CHECKED_SIZE = 1_000_000_000
# A larger difference of logits is a fault. Rounding alone gives about 1e-5.
LARGEST_DIFFERENCE = 1e-3
# Repeated text and characters of one to four bytes: n-gram hashes and patches of many kinds.
CHECK_TEXT = (
    "Bytes in, patches through the large transformer, bytes out. " * 3
    + "In 2024 the paper (arXiv 2412.09871) said: naïve Ω, 漢字, 🙂.\n"
).encode()

# transformers' numbering of ids and classes.
HF_IDS = 260
HF_FIRST_BYTE = 4
HF_BEGIN = 1
HF_END = 2
BYTE_ROWS = list(range(HF_FIRST_BYTE, HF_IDS))
# The embedding row of each of our 257 ids, and the head row of each of our 257 classes.
INPUT_ROWS = [*BYTE_ROWS, HF_BEGIN]
OUTPUT_ROWS = [*BYTE_ROWS, HF_END]
# Classes that our head lacks. They are never a target.
UNKNOWN_CLASSES = [0, 1, 3]

# UTF-8 text never holds these bytes, so a trained model gives them almost no probability.
NON_UTF8_BYTES = [0xC0, 0xC1, *range(0xF5, 0x100)]

# The RMSNorm epsilon of MinimalLLM, which has no setting for it.
ENTROPY_NORM_EPS = 1e-5

# Names of weights: the prefix of transformers' patcher, then our module -> theirs within a layer.
PATCHER = "model.patcher."
BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    # Our w1 goes through the SiLU, so it is their gate.
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
CROSS_ATTENTION = {
    "query_norm": "q_norm",
    "key_norm": "k_norm",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
}


def from_transformers(hf_model):
    """Make a `BLTModel` with the weights of a `BltForCausalLM`, in evaluation mode.

    It has the same device and dtype, and gives the same logits for the same ids and patches. The
    embeddings of ids 0, 2 and 3 and the head's rows 0, 1 and 3 have no counterpart and are left
    out. `entropy_model_from_transformers` converts the patcher; its patch rule is
    PatchConfig(entropy_threshold=hf_model.config.patching_threshold).

    Any feed-forward width converts. encoder_ffn_dim, global_ffn_dim and decoder_ffn_dim are None
    where the width is `feed_forward_width(dim)`, as in the released models. transformers' default
    for the encoder is int(8 * dim / 3), which is not rounded up to a multiple of 256.

    Raises ValueError for what `BLTModel` cannot express: grouped-query attention, several hash
    functions, no window, another kind of rotary embedding, stacks that differ in epsilon, theta or
    dropout, and cross-attention after several encoder layers (transformers pools again at each; we
    and the released code refine the same vectors).
    """
    config = _blt_config(hf_model.config)
    weights = _our_weights(hf_model, _weight_names(config), of_patcher=False)
    device, dtype = _device_and_dtype(weights)
    # Drawing random weights first would take a minute and twice the memory for a large model.
    model = uninitialized(config, device, dtype)
    model.load_state_dict(weights)
    return model.eval()


def entropy_model_from_transformers(hf_model):
    """Make a `MinimalLLM` with the weights of a `BltForCausalLM`'s patcher, in evaluation mode.

    Its 256 logits are the patcher's logits of the bytes. Its entropies differ slightly from the
    patcher's, which are over 260 classes. Let q be the patcher's probability of the four classes
    that are not bytes, and H the entropy within each part. Then

        H_260 = H(q, 1 - q) + (1 - q) * H_bytes + q * H_others

    The difference is ln 260 - ln 256 = 0.016 nats if all classes are equally likely, and zero if q
    is 0. Where an entropy is that close to the threshold, a patch may start in one model and not in
    the other.

    Raises ValueError if there is no patcher, or if it has grouped-query attention, no window or
    another epsilon.
    """
    if hf_model.model.patcher is None:
        raise ValueError("the transformers model has no patcher: its config says patch_in_forward=False")
    config = hf_model.config.patcher_config
    _check_stack(config)
    _need(config, "vocab_size", HF_IDS)
    _need(config, "rms_norm_eps", ENTROPY_NORM_EPS)
    if config.sliding_window is None:
        raise ValueError("blt_patcher.sliding_window is None; to be converted it must be a number of bytes")
    entropy_config = EntropyConfig(
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_layers=config.num_hidden_layers,
        ffn_dim=_our_ffn_dim(config),
        max_seq_len=config.sliding_window,
        rope_theta=config.rope_parameters["rope_theta"],
        dropout=config.dropout,
    )
    weights = _our_weights(hf_model, _entropy_weight_names(entropy_config), of_patcher=True)
    return _filled(MinimalLLM(entropy_config), weights)


def to_transformers(model, entropy_model=None, patch_config=None):
    """Make a `BltForCausalLM` with the weights of a `BLTModel`, in evaluation mode.

    entropy_model: `MinimalLLM`, becomes its patcher. None: the result has no patcher and needs
    patch_lengths (else each byte is a patch). patch_config: the patch rule; by default
    PatchConfig(), the rule of EntropyPatcher(entropy_model).

    Rows without a counterpart are zero: the embeddings of ids 0, 2 and 3 and the head's rows 0, 1
    and 3. A zero row gives a logit of 0, not of minus infinity. So take probabilities and losses
    over OUTPUT_ROWS, not over all 260 classes (generation_config suppresses the three).

    The patcher's head has four classes that ours lacks, and no bias to exclude them. Each gets the
    mean of the rows of the bytes that UTF-8 never holds. Let p be the probability of such a class
    relative to our 256 classes, and H our entropy. Then the patcher's entropy is

        H_260 = (H + 4 p ln(1 / p)) / (1 + 4 p) + ln(1 + 4 p)

    which is almost H for a trained model (LOG.md has a measurement).

    Raises ValueError for what transformers cannot express: qk_norm, relu2, logit_softcap, mean pooling, no n-gram
    embeddings, encoder and decoder of different widths, cross-attention after several encoder
    layers (it pools again at each), methods other than global, min_patch_size, and max_patch_size
    (it splits without the next byte, so the patches of a prefix differ).
    """
    check_packages(*PACKAGES)
    config, weights = hf_config_and_weights(model, entropy_model, patch_config)
    hf_model = _filled(transformers.BltForCausalLM(config), weights)
    hf_model.generation_config.suppress_tokens = UNKNOWN_CLASSES
    return hf_model


def hf_config_and_weights(model, entropy_model=None, patch_config=None):
    """Return what `to_transformers` makes its model of: (BltConfig, {name: weight}).

    The weights share the memory of our models, except for embeddings and heads, which get more
    rows.
    """
    config = model.config
    _need(config, "qk_norm", False)
    _need(config, "relu2", False)
    _need(config, "logit_softcap", 0.0)
    _need(config, "patch_ngrams", [])
    _need(config, "gate_ngrams", [])
    _need(config, "pooling", "max")
    _need(config, "decoder_dim", config.encoder_dim)
    # transformers pools the bytes again after each layer, where we refine the same patch vectors.
    if config.encoder_layers > 1:
        _need(config, "cross_attn_all_layers_encoder", False)
    # transformers always builds a hash embedding.
    if not config.ngram_sizes:
        raise ValueError("BLTConfig.ngram_sizes is empty; to be converted it must have one size or more")
    if entropy_model is None and patch_config is not None:
        raise ValueError("patch_config is given, but no entropy_model to find patches by")
    if patch_config is None:
        patch_config = PatchConfig()
    advice = " (a rule that transformers lacks can stay outside: --without_patcher, or no entropy_model)"
    _need(patch_config, "method", "global", advice)
    _need(patch_config, "min_patch_size", 1, advice)
    _need(patch_config, "max_patch_size", None, advice)

    weights = _their_weights(model.state_dict(), _weight_names(config))
    entropy_config = None
    if entropy_model is not None:
        entropy_config = entropy_model.config
        weights |= _their_weights(entropy_model.state_dict(), _entropy_weight_names(entropy_config))
        # A zero row would give the four unknown classes a logit of 0, so a share of every entropy.
        impossible = entropy_model.head.weight.detach()[NON_UTF8_BYTES].mean(0)
        weights[PATCHER + "lm_head.weight"][:HF_FIRST_BYTE] = impossible
    return _hf_config(config, entropy_config, patch_config), weights


def to_hf_ids(ids_BT):
    """Renumber our input ids for transformers: byte b -> b + 4, the document boundary -> 1."""
    return torch.where(ids_BT == BOUNDARY, HF_BEGIN, ids_BT + HF_FIRST_BYTE)


# Settings


def _need(config, name, wanted, advice=""):
    """Raise ValueError unless a config's field has the one value that can be converted."""
    value = getattr(config, name)
    if value != wanted:
        # The configs of transformers are told apart by model_type: blt, blt_local_encoder, ...
        owner = getattr(config, "model_type", type(config).__name__)
        raise ValueError(f"{owner}.{name} is {value!r}; to be converted it must be {wanted!r}{advice}")


def _check_stack(config):
    """Raise ValueError unless this stack of a `BltConfig` is made of our `Block`."""
    # With fewer, several heads would share a key. Each head of ours has its own.
    _need(config, "num_key_value_heads", config.num_attention_heads)
    _need(config, "hidden_act", "silu")
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        raise ValueError(
            f"{config.model_type}.rope_parameters is {rope}; to be converted its rope_type must be 'default'"
        )


def _check_same_settings(stack, encoder):
    """Raise ValueError unless a stack has the encoder's epsilon, dropout and theta, as ours have."""
    _need(stack, "rms_norm_eps", encoder.rms_norm_eps)
    _need(stack, "dropout", encoder.dropout)
    theta = encoder.rope_parameters["rope_theta"]
    rope = stack.rope_parameters
    if rope["rope_theta"] != theta:
        raise ValueError(
            f"{stack.model_type}.rope_parameters is {rope}; "
            f"to be converted its rope_theta must be the encoder's, {theta}"
        )


def _our_ffn_dim(stack):
    """Return our ffn_dim for a stack of a `BltConfig`: None where None means this width."""
    width = stack.intermediate_size
    return None if width == feed_forward_width(stack.hidden_size) else width


def _blt_config(hf_config):
    """Convert transformers' `BltConfig` to our `BLTConfig`, or raise ValueError."""
    encoder = hf_config.encoder_config
    decoder = hf_config.decoder_config
    stacks = {"encoder": encoder, "global": hf_config.global_config, "decoder": decoder}
    for stack in stacks.values():
        _check_stack(stack)
        _check_same_settings(stack, encoder)
    # These two fields exist three times in a BltConfig, and nothing there makes the copies agree.
    for part in (hf_config, encoder, decoder):
        _need(part, "vocab_size", HF_IDS)
        _need(part, "cross_attn_k", hf_config.cross_attn_k)
    _need(decoder, "hidden_size", encoder.hidden_size)
    _need(hf_config, "encoder_hash_byte_group_nb_functions", 1)
    if hf_config.local_attention_window_len is None:
        raise ValueError("blt.local_attention_window_len is None; to be converted it must be a number of bytes")
    # The encoder's field is a copy, which an edited config may contradict.
    _need(encoder, "sliding_window", hf_config.local_attention_window_len)
    # With one encoder layer, cross-attention after all layers and after the last are the same.
    if encoder.num_hidden_layers > 1:
        _need(encoder, "cross_attn_all_layers", False)

    sizes = {}
    for name, stack in stacks.items():
        sizes[f"{name}_layers"] = stack.num_hidden_layers
        sizes[f"{name}_dim"] = stack.hidden_size
        sizes[f"{name}_heads"] = stack.num_attention_heads
        sizes[f"{name}_ffn_dim"] = _our_ffn_dim(stack)
    return BLTConfig(
        **sizes,
        ngram_sizes=list(hf_config.encoder_hash_byte_group_size),
        hash_rows=hf_config.encoder_hash_byte_group_vocab,
        cross_attn_k=hf_config.cross_attn_k,
        cross_attn_all_layers_encoder=bool(encoder.cross_attn_all_layers),
        cross_attn_all_layers_decoder=bool(decoder.cross_attn_all_layers),
        window=encoder.sliding_window,
        rope_theta=encoder.rope_parameters["rope_theta"],
        norm_eps=encoder.rms_norm_eps,
        dropout=encoder.dropout,
    )


def _hf_stack(dim, heads, layers, ffn_dim, rope_theta, norm_eps, dropout):
    """Return transformers' settings of one stack."""
    return dict(
        hidden_size=dim,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        # Always written: transformers has other defaults than ours.
        intermediate_size=feed_forward_width(dim) if ffn_dim is None else ffn_dim,
        rope_parameters={"rope_type": "default", "rope_theta": float(rope_theta)},
        rms_norm_eps=norm_eps,
        dropout=dropout,
    )


def _hf_config(config, entropy_config, patch_config):
    """Convert our settings to transformers' `BltConfig`. entropy_config: None for no patcher."""
    stacks = {}
    for name in ("encoder", "global", "decoder"):
        stacks[f"{name}_config"] = _hf_stack(
            dim=getattr(config, f"{name}_dim"),
            heads=config.heads(name),
            layers=getattr(config, f"{name}_layers"),
            ffn_dim=getattr(config, f"{name}_ffn_dim"),
            rope_theta=config.rope_theta,
            norm_eps=config.norm_eps,
            dropout=config.dropout,
        )
    for name in ("encoder", "decoder"):
        stack = stacks[f"{name}_config"]
        stack["cross_attn_k"] = config.cross_attn_k
        stack["hidden_size_global"] = config.global_dim
        stack["cross_attn_all_layers"] = getattr(config, f"cross_attn_all_layers_{name}")
    if entropy_config is not None:
        stacks["patcher_config"] = _hf_stack(
            dim=entropy_config.d_model,
            heads=entropy_config.n_heads,
            layers=entropy_config.n_layers,
            ffn_dim=entropy_config.ffn_dim,
            rope_theta=entropy_config.rope_theta,
            norm_eps=ENTROPY_NORM_EPS,
            dropout=entropy_config.dropout,
        )
        stacks["patcher_config"]["sliding_window"] = entropy_config.max_seq_len
    return transformers.BltConfig(
        **stacks,
        patch_in_forward=entropy_config is not None,
        patching_threshold=float(patch_config.entropy_threshold),
        local_attention_window_len=config.window,
        cross_attn_k=config.cross_attn_k,
        encoder_hash_byte_group_size=list(config.ngram_sizes),
        encoder_hash_byte_group_vocab=config.hash_rows,
        bos_token_id=HF_BEGIN,
        eos_token_id=HF_END,
        pad_token_id=0,
        # generate() would use the faulty cache by default.
        use_cache=False,
    )


# Weights. A dict of names is {our name: (transformers' name, rows)}. rows: which rows of transformers'
# weight are ours, in our order; None: all.


def _weight_names(config):
    """Name every weight of a `BLTModel`."""
    encoder = "model.local_encoder"
    latent = "model.global_transformer"
    decoder = "model.local_decoder"
    names = {
        "encoder.byte_embedding.weight": (f"{encoder}.embed_tokens.weight", INPUT_ROWS),
        "encoder.hash_embedding.tables.weight": ("model.encoder_hash_tok_embedding.weight", None),
        "encoder.patch_query.weight": (f"{encoder}.patch_embedding_projection.weight", None),
        "decoder.patch_vectors.weight": (f"{decoder}.patch_embedding_projection.weight", None),
        "decoder.norm.weight": (f"{decoder}.norm.weight", None),
        "head.weight": ("lm_head.weight", OUTPUT_ROWS),
    }
    # Where the widths agree, neither side has this projection.
    if config.cross_attn_k * config.encoder_dim != config.global_dim:
        names["latent.widen.weight"] = (f"{latent}.token_embedding_projection.weight", None)
    names |= _stack_names("encoder.blocks", f"{encoder}.layers", config.encoder_layers, BLOCK)
    names |= _stack_names("latent.blocks", f"{latent}.layers", config.global_layers, BLOCK)
    names |= _stack_names("decoder.blocks", f"{decoder}.layers", config.decoder_layers, BLOCK)
    n_cross = config.decoder_layers if config.cross_attn_all_layers_decoder else 1
    for ours, theirs, n_layers in (("encoder", encoder, 1), ("decoder", decoder, n_cross)):
        names |= _stack_names(f"{ours}.cross_attentions", f"{theirs}.cross_attn_layers", n_layers, CROSS_ATTENTION)
    return names


def _entropy_weight_names(config):
    """Name every weight of a `MinimalLLM`."""
    names = {
        "embedding.weight": (f"{PATCHER}embed_tokens.weight", INPUT_ROWS),
        "norm.weight": (f"{PATCHER}norm.weight", None),
        "head.weight": (f"{PATCHER}lm_head.weight", BYTE_ROWS),
    }
    return names | _stack_names("blocks", f"{PATCHER}layers", config.n_layers, BLOCK)


def _stack_names(ours, theirs, n_layers, parts):
    """Name the weights of n_layers layers. parts: {our module in a layer: theirs}."""
    names = {}
    for layer in range(n_layers):
        for our_part, their_part in parts.items():
            names[f"{ours}.{layer}.{our_part}.weight"] = (f"{theirs}.{layer}.{their_part}.weight", None)
    return names


def _our_weights(hf_model, names, of_patcher):
    """Return the weights of transformers' patcher, or all others, under our names."""
    theirs = {}
    for hf_name, weight in hf_model.state_dict().items():
        if hf_name.startswith(PATCHER) == of_patcher:
            theirs[hf_name] = weight
    owner = "transformers' patcher" if of_patcher else "the transformers model"
    _check_names([hf_name for hf_name, _ in names.values()], theirs, owner)
    ours = {}
    for name, (hf_name, rows) in names.items():
        weight = theirs[hf_name]
        # Selected rows are a copy. Other weights share hf_model's memory until they are loaded.
        ours[name] = weight if rows is None else weight[rows]
    return ours


def _their_weights(weights, names):
    """Return our model's weights under transformers' names. Rows without a counterpart are zero."""
    _check_names(names, weights, "our model")
    theirs = {}
    for name, (hf_name, rows) in names.items():
        weight = weights[name]
        if rows is not None:
            index = torch.tensor(rows, device=weight.device)
            weight = weight.new_zeros(HF_IDS, weight.shape[1]).index_copy(0, index, weight)
        theirs[hf_name] = weight
    return theirs


def _check_names(expected, found, owner):
    """Raise ValueError unless the weights that exist are those that will be used, each once."""
    expected = list(expected)
    assert len(set(expected)) == len(expected), "a weight would be used twice"
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"the weights of {owner} are not those of its config: missing {missing}, unexpected {unexpected}"
        )


def _device_and_dtype(weights):
    """Return the one device and dtype of these weights, or raise ValueError."""
    kinds = {(weight.device, weight.dtype) for weight in weights.values()}
    if len(kinds) != 1:
        found = sorted(map(str, kinds))
        raise ValueError(f"the weights to convert must share one device and one dtype, not {found}")
    return kinds.pop()


def _filled(model, weights):
    """Copy weights into a new model, which takes their device and dtype."""
    device, dtype = _device_and_dtype(weights)
    model = model.to(device)
    # model.to(dtype) would also round the buffers, but transformers' rotary frequencies must stay float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.load_state_dict(weights)
    return model.eval()


# Inputs


def hf_inputs(patcher, text):
    """Return what a `BltForCausalLM` takes for one document, with the patches that our patcher finds.

    text: N bytes, in any type that `EntropyPatcher` takes. Returns {"input_ids": int64 [1, N + 1],
    id 1 first; "patch_lengths": int64 [1, P], sum N + 2}. Then `hf_model(**hf_inputs(patcher,
    text), use_cache=False) .logits[..., OUTPUT_ROWS]` are the logits of our model for the N bytes
    and the document's end.
    """
    document = to_bytes(text)
    # The beginning is a patch of its own, and the last patch also covers the document's end.
    starts = np.flatnonzero(np.concatenate(([True], patcher.starts(document))))
    lengths = np.diff(starts, append=len(document) + 2)
    ids = torch.from_numpy(np.concatenate(([BOUNDARY], document)).astype(np.int64))
    return {"input_ids": to_hf_ids(ids)[None], "patch_lengths": torch.from_numpy(lengths)[None]}


def make_tokenizer():
    """Make a tokenizer of transformers: str -> 1, then each UTF-8 byte + 4; ids -> str.

    Special tokens are not searched for in the text: "<s>" is three bytes. A str holds valid Unicode
    only; for any bytes use `hf_inputs`.
    """
    check_packages(*PACKAGES)
    vocabulary = {"<pad>": 0, "<s>": HF_BEGIN, "</s>": HF_END, "<delim>": 3}
    for byte in range(256):
        vocabulary[_byte_character(byte)] = byte + HF_FIRST_BYTE
    # A BPE without merges: each byte is a token.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", HF_BEGIN)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        # Padding on the left would change transformers' logits.
        padding_side="right",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        # No token_type_ids: BltForCausalLM does not take them.
        model_input_names=["input_ids", "attention_mask"],
    )


def _byte_character(byte):
    """Return the character that byte-level tokenizers write for a byte: its own, or one above U+00FF."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    n_before = sum(other not in printable for other in range(byte))
    return chr(0x100 + n_before)


# Folders


def write_for_transformers(folder, output, dtype="keep", without_patcher=False):
    """Convert an output folder of ours into one that `BltForCausalLM.from_pretrained` opens.

    Returns the record that it writes to convert_hf.json. Needs the memory of the weights once to
    twice. Raises ValueError if the model or its patch rule cannot be converted, or if output holds
    another model.
    """
    check_packages(*PACKAGES)
    folder = Path(folder)
    output = Path(output)
    if (output / "config.json").exists() and not (output / "convert_hf.json").exists():
        raise ValueError(
            f"{output} holds a transformers model that convert_hf.py has not written; give another --output"
        )
    # Its tokenizer.json would be replaced.
    if any((output / name).exists() for name in ("model.json", "patches.json")):
        raise ValueError(f"{output} holds results of other scripts; give another --output")
    record = read_record(folder, "blt")
    # The model maps the file into memory. A copy would need the weights' size again.
    try:
        with torch.device("meta"):
            model = BLTModel(record.config(BLTConfig))
    except (RuntimeError, TypeError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder}/model.json describes a model that cannot be made: {reason}") from None
    load_weights(folder / "best.pt", model, assign=True)
    wanted = DTYPES[dtype] or model.head.weight.dtype
    entropy_model = None
    patch_config = None
    if not without_patcher:
        patch_config = record.config(PatchConfig, "patch_config")
        advice = " (or leave the patcher out: --without_patcher; patches must then be passed to transformers)"
        _need(patch_config, "method", "global", advice)
        entropy_model = entropy_model_of(folder, record)[0].to(wanted)

    config, weights = hf_config_and_weights(model, entropy_model, patch_config)
    weights = {name: weight.to(wanted).contiguous() for name, weight in weights.items()}
    # What save_pretrained of a model would add to its config.
    config.architectures = ["BltForCausalLM"]
    config.dtype = wanted
    generation = transformers.GenerationConfig.from_model_config(config)
    # Their logit is 0, so generate() could choose them.
    generation.suppress_tokens = UNKNOWN_CLASSES
    converted = {
        "converted_from": str(folder),
        "commit": git_commit(),
        "dtype": str(wanted).removeprefix("torch."),
        "patcher": not without_patcher,
        "patch_config": record.patch_config,
        "entropy_model_sha256": record.entropy_model_sha256,
        "weights_sha256": model_hash(model),
    }
    # First, because this file marks the folder as ours: an interrupted conversion can be repeated.
    write_json(output / "convert_hf.json", converted)
    config.save_pretrained(output)
    generation.save_pretrained(output)
    make_tokenizer().save_pretrained(output)

    def save_safetensors(path):
        try:
            save_file(weights, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(
                f"{output / 'model.safetensors'} cannot be written ({error}); free some space, or give another --output"
            ) from None

    write_atomically(output / "model.safetensors", save_safetensors)
    return converted


def write_from_transformers(source, output, dtype="keep", patches_of=None):
    """Convert a folder of transformers, or a model of the hub, into an output folder of ours.

    patches_of: an output folder of ours whose patch rule and entropy model the result takes; None:
    those of the patcher. Returns the `RunRecord` that it writes to model.json. Needs the memory of the
    weights twice. The entropy model is written in fp32. Raises ValueError if the model or its patch
    rule cannot be converted, or if output holds a trained model.
    """
    check_packages(*PACKAGES)
    output = Path(output)
    record_file = output / "model.json"
    files = (output / name for name in ("best.pt", "entropy_model.pth", "entropy_model.json"))
    there = [str(file) for file in files if file.exists()]
    if there and not record_file.exists():
        raise ValueError(f"{' and '.join(there)} would be replaced; give another --output")
    if record_file.exists() and RunRecord.load(record_file).converted_from is None:
        raise ValueError(f"{output} holds a model that was trained there; give another --output")
    hf_model = open_hf_model(source, DTYPES[dtype] or "auto")
    if patches_of is None:
        patch_config, entropy_model = _patches_of_hf_model(hf_model, source)
    else:
        patch_config, entropy_model = _patches_of_folder(patches_of)
    model = from_transformers(hf_model)
    # Modules refer to each other, so `del` alone frees no weights.
    del hf_model
    gc.collect()
    record = RunRecord(
        kind="blt",
        model_config=asdict(model.config),
        settings={"row_bytes": 4096},
        corpus={"dataset": f"that of {source}", "sha256": None},
        patch_config=asdict(patch_config),
        precision="fp32",
        entropy_model_path=str(output / "entropy_model.pth"),
        converted_from=str(source),
        commit=git_commit(),
        dtype=str(model.head.weight.dtype).removeprefix("torch."),
    )
    if entropy_model is not None:
        save_entropy_model(
            entropy_model, record.entropy_model_path, converted_from=str(source if patches_of is None else patches_of)
        )
        record.entropy_model_sha256 = model_hash(entropy_model)
    save_model(model, output / "best.pt", record, record_file)
    return record


def _patches_of_folder(folder):
    """Return the `PatchConfig` of an output folder of ours, and its entropy model or None."""
    record = read_record(folder, "blt")
    patch_config = record.config(PatchConfig, "patch_config")
    if not patch_config.needs_entropies:
        return patch_config, None
    return patch_config, entropy_model_of(folder, record)[0]


def _patches_of_hf_model(hf_model, source):
    """Return the `PatchConfig` of a `BltForCausalLM`'s patcher, and its entropy model in fp32."""
    config = hf_model.config
    if hf_model.model.patcher is None:
        raise ValueError(
            f"{source} has no patcher; name an output folder whose patch rule and entropy model "
            "to take: --patches_of checkpoints"
        )
    _need(config, "patching_mode", "entropy")
    if config.patching_threshold is None:
        raise ValueError("blt.patching_threshold is None: such patches look ahead; set a threshold in config.json")
    # The same rule except at a row's end: transformers splits the last patch without the byte after it.
    patch_config = PatchConfig(entropy_threshold=config.patching_threshold, max_patch_size=config.max_patch_length)
    # Entropies decide where patches start, and a rounded model would move them.
    return patch_config, entropy_model_from_transformers(hf_model).float()


def open_hf_model(source, dtype="auto"):
    """Open a `BltForCausalLM` from a folder or the hub, in evaluation mode.

    Raises FileNotFoundError if source is neither a folder nor an id. Raises ValueError if it is no
    BLT, or if its weights are not exactly those of its config: from_pretrained itself fills missing
    weights with random numbers.
    """
    # transformers would search the hub for a mistyped path.
    is_there = Path(source).exists()
    if not is_there and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise FileNotFoundError(
            f"{source} not found; give a folder that transformers can open, or an id like itazap/blt-1b-hf"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        if config.model_type != "blt":
            raise ValueError(f"its config says model_type {config.model_type!r}, not 'blt'")
        if is_there:
            _check_size(config, Path(source))
        hf_model, report = transformers.BltForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
    # transformers and safetensors raise many types for damaged files.
    except Exception as error:
        # The first line says what is wrong. The advice that follows is not about this script.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        note = "" if is_there else "; there is no such folder here, so it was taken for a Hugging Face id"
        raise ValueError(f"transformers cannot open {str(source)!r} as a BLT: {reason}{note}") from None
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            keys = sorted(map(str, report[kind]))
            problems.append(f"{kind} {keys[:5]}")
    if problems:
        raise ValueError(f"the weights of {source} are not those of its config: {'; '.join(problems)}")
    return hf_model.eval()


def _check_size(config, folder):
    """Raise ValueError if the weights in a folder are too few for its config: before memory is taken by the config."""
    # On the meta device a model has shapes and no memory.
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in transformers.BltForCausalLM(config).parameters())
    file_bytes = sum(path.stat().st_size for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))
    # A weight has 2 bytes at least.
    if file_bytes and 2 * size > file_bytes:
        raise ValueError(
            f"its config.json describes {size:,} parameters, but its weights are only {file_bytes:,} bytes"
        )


# Check and command line


@torch.no_grad()
def compare(folder, hf_folder):
    """Read both folders in fp32 and compare the models on a short text.

    Returns (largest difference of logits for the same ids and patches, number of patch starts that
    we find, number of patch starts that only one of both finds). The last two are None if the
    transformers model has no patcher.
    """
    model, patcher, _ = load_blt(folder)
    hf_model = open_hf_model(hf_folder, torch.float32)
    inputs = hf_inputs(patcher, CHECK_TEXT)
    ids = torch.tensor([[BOUNDARY, *CHECK_TEXT]])
    our_logits = model(ids, inputs["patch_lengths"])
    their_logits = hf_model(**inputs, use_cache=False).logits[..., OUTPUT_ROWS]
    difference = (our_logits - their_logits).abs().max().item()
    hf_patcher = hf_model.model.patcher
    if hf_patcher is None:
        return difference, None, None
    # patch_size only asks for patches. With a threshold its value is not used.
    threshold = hf_model.config.patching_threshold
    _, their_lengths, _ = hf_patcher(inputs["input_ids"], patch_size=1, threshold=threshold)
    ours = _start_positions(inputs["patch_lengths"])
    theirs = _start_positions(their_lengths)
    return difference, len(ours), len(ours ^ theirs)


def _start_positions(lengths_1P):
    """Return the positions where patches start, without the first, as a set."""
    # The last sum is the row's end, which is no start. Our lengths cover one id more than transformers'.
    return set(lengths_1P[0].cumsum(0)[:-1].tolist())


def print_summary(folder, dtype, patch_config, has_patcher):
    """Print the sizes of a converted model and its patch rule. Returns the number of parameters."""
    # Shapes are enough to count parameters.
    with torch.device("meta"):
        parts = BLTModel(BLTConfig(**read_record(folder, "blt").model_config)).parameters_by_part()
    size = sum(parts.values())
    by_part = ", ".join(f"{part} {count:,}" for part, count in parts.items())
    print(f"BLT: {size:,} parameters ({by_part}), {dtype}")
    note = "" if has_patcher else "; without patcher: pass patch_lengths (convert_hf.hf_inputs)"
    print(f"patches: {PatchConfig(**patch_config).describe()}{note}")
    return size


def print_check(config, folder, hf_folder):
    """Print how far both models agree. Returns the largest difference of logits."""
    difference, n_starts, n_differing = compare(folder, hf_folder)
    print(f"check: logits differ by at most {difference:.1e} over {len(CHECK_TEXT)} bytes, same patches, in fp32")
    if n_differing:
        if config.patches_of is not None:
            reason = f"our rule is that of {config.patches_of}"
        else:
            reason = "the patcher of transformers takes entropies over 260 classes, ours over 256"
            if config.dtype in ("bf16", "fp16"):
                whose = "its" if config.to_hf is not None else "our"
                reason += f", and {whose} weights are rounded to {config.dtype}"
        print(
            f"check: {n_differing} patch starts are in one of the two only (ours has {n_starts}): "
            f"{reason} (docs/transformers.md)"
        )
    elif n_starts:
        print(f"check: all {n_starts} patches begin at the same bytes")
    return difference


def main(config):
    check_packages(*PACKAGES)
    try:
        config.output.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{config.output} is not UTF-8, as the libraries here want a name; give another --output"
        ) from None
    check_output(config.output, is_folder=True, reads=[config.to_hf, config.from_hf, config.patches_of])
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if config.to_hf is not None:
        folder = config.to_hf
        hf_folder = config.output
        converted = write_for_transformers(folder, hf_folder, config.dtype, config.without_patcher)
        summary = (converted["dtype"], converted["patch_config"], converted["patcher"])
        files = "model.safetensors, config.json, generation_config.json, tokenizer, convert_hf.json"
        next_step = f"BltForCausalLM.from_pretrained({config.output!r}); docs/transformers.md says with which settings"
    else:
        folder = config.output
        hf_folder = config.from_hf
        record = write_from_transformers(hf_folder, folder, config.dtype, config.patches_of)
        summary = (record.dtype, record.patch_config, True)
        files = "best.pt, model.json"
        if record.entropy_model_sha256:
            files += ", entropy_model.pth, entropy_model.json"
        continue_text = command("generate.py", model=config.output, prompt="The history of")
        next_step = f"{continue_text}, or {command('train_blt.py', init_from=config.output)}"
    size = print_summary(folder, *summary)
    if config.check == "yes" or (config.check == "auto" and size <= CHECKED_SIZE):
        difference = print_check(config, folder, hf_folder)
        # Only a kept dtype must agree: another one rounds the weights. `not ... <` is also true of NaN.
        if config.dtype == "keep" and not difference < LARGEST_DIFFERENCE:
            raise ValueError(
                f"the converted model gives other logits (by {difference:.2g}); please report this with its config"
            )
    print(f"wrote {config.output}/: {files}")
    print(f"next: {next_step}")


if __name__ == "__main__":
    run_script(main, ConvertConfig, __doc__)
