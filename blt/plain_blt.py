"""The Byte Latent Transformer as a textbook writes it: loops over rows and patches, dense masks.

    plain_logits(model, ids_BT, patch_lengths_BP)     with the weights of a `BLTModel`

It is slow and obvious. Tests compare `BLTModel` with it, gradients included, and bench.py times it as
what a step costs when `forward` loops in Python.

Nothing is shared with the fast code: rotary embedding, hash, pooling, both cross-attentions and the
separation of documents are written here a second time. Only the weights are the model's.
`block_weights` and `cross_weights` say where those of a layer and of a cross-attention are.
"""

import math
from typing import NamedTuple

import torch

BOUNDARY = 256


class Patch(NamedTuple):
    """A patch that holds at least one input of its row."""

    end: int  # one past its last id
    document: int  # the document that it belongs to, that of its last input
    members: list  # positions of the bytes that are pooled into it


def plain_logits(model, ids_BT, patch_lengths_BP):
    """Logits [B, T, 257] of a `BLTModel`, one row after another. Dropout is not applied."""
    logits = []
    for ids, lengths in zip(ids_BT.tolist(), patch_lengths_BP.tolist()):
        logits.append(_row_logits(model, ids, lengths))
    return torch.stack(logits)


def block_weights(block):
    """Heads, matrices [out, in] and norms of a `layers.Block`."""
    attention = block.attention
    feed_forward = block.feed_forward
    return {
        "n_heads": attention.n_heads,
        "norm1": block.attention_norm,
        "q": attention.wq.weight,
        "k": attention.wk.weight,
        "v": attention.wv.weight,
        "o": attention.wo.weight,
        # Used with config.qk_norm only; else they do nothing.
        "q_norm": attention.q_norm,
        "k_norm": attention.k_norm,
        "norm2": block.feed_forward_norm,
        "w1": feed_forward.w1.weight,
        "w2": feed_forward.w2.weight,
        # A feed-forward with squared ReLU has no third matrix.
        "w3": feed_forward.w3.weight if hasattr(feed_forward, "w3") else None,
    }


def cross_weights(cross):
    """Heads, matrices [out, in] and norms of a `blt_model.CrossAttention`."""
    return {
        "n_heads": cross.n_heads,
        "query_norm": cross.query_norm,
        "key_norm": cross.key_norm,
        "q": cross.wq.weight,
        "k": cross.wk.weight,
        "v": cross.wv.weight,
        "o": cross.wo.weight,
    }


# ---------------------------------------------------------------------------------- the model


def _row_logits(model, ids, lengths):
    """Logits [T, 257] of one row: local encoder, latent transformer, local decoder, head."""
    config = model.config
    documents = _document_numbers(ids)
    patches = _patches_of(lengths, documents)
    byte_mask_TT = _dense_mask(documents, config.window, model.head.weight.device)
    states_TD, vectors = _encode(model, ids, documents, lengths, patches, byte_mask_TT)
    latents_PG = _latent(model, vectors, patches)
    # The decoder goes on from the encoder's byte states. It has no embeddings of its own.
    gates_TD = _gates(model, ids, documents)
    states_TD = _decode(model, states_TD, latents_PG, patches, byte_mask_TT, gates_TD)
    logits_TV = _rms_norm(model.decoder.norm, states_TD, config.norm_eps) @ model.head.weight.T
    if config.logit_softcap > 0:
        logits_TV = config.logit_softcap * (logits_TV / config.logit_softcap).tanh()
    return logits_TV


def _document_numbers(ids):
    """The document of each id: a boundary opens the next one."""
    documents = []
    number = 0
    for byte in ids:
        if byte == BOUNDARY:
            number += 1
        documents.append(number)
    return documents


def _patches_of(lengths, documents):
    """The row's patches in order, without a last one that holds the last target only."""
    T = len(documents)
    patches = []
    first = 0
    for length in lengths:
        end = first + length
        if length > 0 and first < T:
            # If a document begins inside the patch, the patch belongs to it, and the bytes of the
            # document before are not pooled into it.
            document = documents[min(end, T) - 1]
            members = [t for t in range(first, min(end, T)) if documents[t] == document]
            patches.append(Patch(end, document, members))
        first = end
    return patches


def _encode(model, ids, documents, lengths, patches, byte_mask_TT):
    """The local encoder: byte states [T, D], and for each patch its k vectors [k, D]."""
    config = model.config
    encoder = model.encoder
    device = model.head.weight.device
    x_TD = encoder.byte_embedding.weight[torch.tensor(ids, device=device)]
    if config.n_embedding_tables:
        tables = encoder.hash_embedding.tables.weight
        x_TD = x_TD + _hash_sum(tables, config, config.ngram_sizes, ids, documents)
        x_TD = x_TD + _patch_hash_sum(tables, config, ids, documents, lengths)
    # The patches' vectors are made after the first layer with a cross-attention, and each later
    # cross-attention refines them.
    vectors = None
    # Cross-attention follows the last layer only, or all of them.
    first_cross = config.encoder_layers - len(encoder.cross_attentions)
    for layer, block in enumerate(encoder.blocks):
        x_TD = _block(block_weights(block), x_TD, byte_mask_TT, config)
        if layer < first_cross:
            continue
        if vectors is None:
            vectors = [_pooled_vectors(encoder, config, x_TD[patch.members]) for patch in patches]
        w = cross_weights(encoder.cross_attentions[layer - first_cross])
        # The residual counts twice, as in the released weights.
        attended = [_attended(w, own, x_TD[patch.members]) for own, patch in zip(vectors, patches)]
        vectors = [2 * own + new for own, new in zip(vectors, attended)]
    return x_TD, vectors


def _pooled_vectors(encoder, config, bytes_ND):
    """A patch's k vectors before they have attended to its bytes: the pooled bytes, projected."""
    pooled_D = bytes_ND.amax(0) if config.pooling == "max" else bytes_ND.mean(0)
    return (encoder.patch_query.weight @ pooled_D).view(config.cross_attn_k, -1)


def _latent(model, vectors, patches):
    """The latent transformer: a state [G] for each patch."""
    config = model.config
    # A patch's k vectors side by side are the latent transformer's input.
    x_PG = torch.stack([own.flatten() for own in vectors])
    if x_PG.shape[1] != config.global_dim:
        x_PG = x_PG @ model.latent.widen.weight.T
    # No window: a patch attends to all patches of its document before it.
    mask_PP = _dense_mask([patch.document for patch in patches], None, x_PG.device)
    for block in model.latent.blocks:
        x_PG = _block(block_weights(block), x_PG, mask_PP, config)
    return x_PG


def _gates(model, ids, documents):
    """What the cross-attentions' outputs are multiplied by for each byte: [T, D], or 1."""
    config = model.config
    if not config.gate_ngrams:
        return 1
    tables = model.decoder.gate_embedding.tables.weight
    return 1 + _hash_sum(tables, config, config.gate_ngrams, ids, documents)


def _decode(model, x_TD, latents_PG, patches, byte_mask_TT, gates_TD):
    """The local decoder: from the encoder's byte states and the latent states to states [T, D].

    Input t reads the newest patch that is complete before id t + 1. So the readers of a patch are its
    own last byte and all bytes of the next patch but the last one.
    """
    config = model.config
    decoder = model.decoder
    vectors = []
    for latent_G in latents_PG:
        projected = decoder.patch_vectors.weight @ latent_G
        vectors.append(projected.view(config.cross_attn_k, -1))
    if config.encoder_dim != config.decoder_dim:
        x_TD = x_TD @ decoder.from_encoder.weight.T
    # The first reader of each patch. If the last patch also holds the last target, this is T: no byte.
    first_readers = [patch.end - 1 for patch in patches]
    end_readers = [*first_readers[1:], len(x_TD)]
    for layer, block in enumerate(decoder.blocks):
        # Cross-attention comes before the first layer only, or before all of them.
        if layer < len(decoder.cross_attentions):
            w = cross_weights(decoder.cross_attentions[layer])
            attended = []
            for first, end, own in zip(first_readers, end_readers, vectors):
                attended.append(_attended(w, x_TD[first:end], own))
            # The residual counts twice, as in the released weights.
            x_TD = 2 * x_TD + gates_TD * torch.cat(attended)
        x_TD = _block(block_weights(block), x_TD, byte_mask_TT, config)
    return x_TD


# ---------------------------------------------------------------------------------- its parts


def _released_ids(ids):
    """The released code's ids: byte b is b + 4, the boundary 1."""
    return [1 if byte == BOUNDARY else byte + 4 for byte in ids]


def _hash_sum(tables, config, sizes, ids, documents):
    """The sum [T, D] of each id's n-gram embeddings of these sizes, the first tables."""
    released_ids = _released_ids(ids)
    total_TD = 0
    for table, n in enumerate(sizes):
        rows = []
        for t in range(len(ids)):
            value = 0
            for i in range(n):
                position = t - n + 1 + i
                # What is before the document counts as 0.
                if position >= 0 and documents[position] == documents[t]:
                    value += released_ids[position] * 1_000_000_007**i
            rows.append(_table_row(value, table, config))
        total_TD = total_TD + tables[torch.tensor(rows, device=tables.device)]
    return total_TD


def _patch_hash_sum(tables, config, ids, documents, lengths):
    """The sum [T, D] of the embeddings of each id's patch n-grams, the last tables."""
    released_ids = _released_ids(ids)
    total_TD = 0
    for table, n_before in enumerate(config.patch_ngrams, len(config.ngram_sizes)):
        rows = []
        for t in range(len(ids)):
            value = 0
            for position in range(_start_before(n_before, t, lengths), t + 1):
                if documents[position] == documents[t]:
                    value = value * 1_000_000_007 + released_ids[position]
            rows.append(_table_row(value, table, config))
        total_TD = total_TD + tables[torch.tensor(rows, device=tables.device)]
    return total_TD


def _table_row(value, table, config):
    """The row of an n-gram whose hash has this value before it wraps."""
    # Python's numbers do not overflow. Wrap as 64-bit integers do.
    wrapped = (value + 2**63) % 2**64 - 2**63
    return table * config.hash_rows + wrapped % config.hash_rows


def _start_before(n_before, t, lengths):
    """Where the patch begins that is n_before patches before that of id t; 0 if there are fewer."""
    starts = []
    end = 0
    for length in lengths:
        starts.append(end)
        end += length
        if t < end:
            break
    return starts[max(0, len(starts) - 1 - n_before)]


def _dense_mask(documents, window, device):
    """bool [T, T]: whether the row's position attends to the column's."""
    documents_T = torch.tensor(documents, device=device)
    positions_T = torch.arange(len(documents), device=device)
    distance_TT = positions_T[:, None] - positions_T[None, :]
    is_visible_TT = distance_TT >= 0
    if window is not None:
        is_visible_TT = is_visible_TT & (distance_TT < window)
    return is_visible_TT & (documents_T[:, None] == documents_T[None, :])


def _rms_norm(norm, x, eps):
    """RMSNorm over the last axis, in fp32."""
    x = x.float()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight


def _rotary(x_THK, theta):
    """Rotate pair i of each head, (x[2 i], x[2 i + 1]), by position * theta ** (-2 i / K)."""
    T, _, K = x_THK.shape
    angles = torch.arange(T)[:, None] * (1.0 / theta ** (torch.arange(0, K, 2) / K))
    # As complex numbers: a product with exp(i * angle) is a rotation by the angle.
    rotations = torch.polar(torch.ones_like(angles), angles).to(x_THK.device)
    pairs = torch.view_as_complex(x_THK.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations[:, None]).flatten(-2)


def _softmax_attention(q_THK, k_SHK, v_SHK, mask_TS=None):
    """softmax(q k' / sqrt(K)) v for each head, heads side by side: [T, H * K]."""
    scores_HTS = q_THK.transpose(0, 1) @ k_SHK.permute(1, 2, 0) / math.sqrt(q_THK.shape[-1])
    if mask_TS is not None:
        scores_HTS = scores_HTS.masked_fill(~mask_TS, -torch.inf)
    return (scores_HTS.softmax(-1) @ v_SHK.transpose(0, 1)).transpose(0, 1).flatten(1)


def _split_heads(x_TD, n_heads):
    """[T, D] -> [T, H, K]."""
    return x_TD.unflatten(-1, (n_heads, -1))


def _block(w, x_TD, mask_TT, config):
    """A transformer layer: attention and feed-forward, each with a norm before it and a residual."""
    normed_TD = _rms_norm(w["norm1"], x_TD, config.norm_eps)
    q = _split_heads(normed_TD @ w["q"].T, w["n_heads"])
    k = _split_heads(normed_TD @ w["k"].T, w["n_heads"])
    v = _split_heads(normed_TD @ w["v"].T, w["n_heads"])
    if config.qk_norm:
        q = _rms_norm(w["q_norm"], q, config.norm_eps)
        k = _rms_norm(w["k_norm"], k, config.norm_eps)
    q = _rotary(q, config.rope_theta)
    k = _rotary(k, config.rope_theta)
    x_TD = x_TD + _softmax_attention(q, k, v, mask_TT) @ w["o"].T

    normed_TD = _rms_norm(w["norm2"], x_TD, config.norm_eps)
    hidden = normed_TD @ w["w1"].T
    if config.relu2:
        hidden = hidden.clamp(min=0) ** 2
    else:
        hidden = torch.nn.functional.silu(hidden) * (normed_TD @ w["w3"].T)
    return x_TD + hidden @ w["w2"].T


def _attended(w, queries_QD, keys_SD):
    """What all queries read by cross-attention to all keys, which are the values as well."""
    normed_SD = _rms_norm(w["key_norm"], keys_SD, w["key_norm"].eps)
    normed_QD = _rms_norm(w["query_norm"], queries_QD, w["query_norm"].eps)
    q = _split_heads(normed_QD @ w["q"].T, w["n_heads"])
    k = _split_heads(normed_SD @ w["k"].T, w["n_heads"])
    v = _split_heads(normed_SD @ w["v"].T, w["n_heads"])
    return _softmax_attention(q, k, v) @ w["o"].T
