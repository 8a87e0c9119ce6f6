"""The Byte Latent Transformer as a textbook writes it: loops over rows and patches, dense masks, nothing shared with the fast code.

The oracle that tests hold `BLTModel` to, and the contestant `loop` of bench.py: what a step costs when `forward` loops in Python.

    plain_logits(model, ids_BT, patch_lengths_BP)     with the weights of a `BLTModel`; gradients flow into them

Rotary embedding, hashing, pooling, both cross-attentions and document separation are written here once more. The weights are
read from the model's modules by name in `block_weights` and `cross_weights`, the only place that knows their layout.
"""

import math

import torch

BOUNDARY = 256


def block_weights(block):
    """A `layers.Block`'s heads, matrices [out, in] and norm modules as a dict. q_norm and k_norm count with config.qk_norm only."""
    attention, ffn = block.attention, block.feed_forward
    return {
        "n_heads": attention.n_heads, "norm1": block.attention_norm, "norm2": block.feed_forward_norm,
        "q": attention.wq.weight, "k": attention.wk.weight, "v": attention.wv.weight, "o": attention.wo.weight,
        "w1": ffn.w1.weight, "w2": ffn.w2.weight, "w3": ffn.w3.weight,
        "q_norm": attention.q_norm, "k_norm": attention.k_norm,
    }  # fmt: skip


def cross_weights(cross):
    """The same of a `CrossAttention`."""
    return {
        "n_heads": cross.n_heads, "query_norm": cross.query_norm, "key_norm": cross.key_norm,
        "q": cross.wq.weight, "k": cross.wk.weight, "v": cross.wv.weight, "o": cross.wo.weight,
    }  # fmt: skip


def plain_logits(model, ids_BT, patch_lengths_BP):
    """Logits [B, T, 257] of a `BLTModel`, row by row and patch by patch. Dropout is not applied.

    A boundary inside a row opens a document, and nothing crosses it. If it stands inside a patch, the patch belongs to the document of
    its last input, and the bytes before the boundary are left out of it.
    """
    rows = zip(ids_BT.tolist(), patch_lengths_BP.tolist())
    return torch.stack([_row_logits(model, ids, [n for n in lengths if n > 0]) for ids, lengths in rows])


def _row_logits(model, ids, lengths):
    config, device, T = model.config, model.head.weight.device, len(ids)
    documents, number = [], 0
    for byte in ids:
        number += byte == BOUNDARY
        documents.append(number)
    patches, first = (
        [],
        0,
    )  # of each patch that has inputs: (one past its last id, its document, the bytes that it pools)
    for length in lengths:
        end = first + length
        if first < T:
            document = documents[min(end, T) - 1]
            patches.append((end, document, [t for t in range(first, min(end, T)) if documents[t] == document]))
        first = end

    # Local encoder
    encoder = model.encoder
    x = encoder.byte_embedding.weight[torch.tensor(ids, device=device)]
    if config.ngram_sizes:
        x = x + _hash_sum(encoder.hash_embedding.tables.weight, config, ids, documents, device)
    byte_mask = _dense_mask(documents, config.window, device)
    vectors, first_cross = None, config.encoder_layers - len(encoder.cross_attentions)
    for layer, block in enumerate(encoder.blocks):
        x = _block(block_weights(block), x, byte_mask, config)
        if layer < first_cross:
            continue
        if vectors is None:
            pool = (lambda group: group.amax(0)) if config.pooling == "max" else (lambda group: group.mean(0))
            vectors = [
                (encoder.patch_query.weight @ pool(x[members])).view(config.cross_attn_k, -1) for *_, members in patches
            ]
        w = cross_weights(encoder.cross_attentions[layer - first_cross])
        vectors = [_cross(w, mine, x[members]) for mine, (*_, members) in zip(vectors, patches)]

    # Latent transformer
    latent = torch.stack([mine.flatten() for mine in vectors])
    if latent.shape[1] != config.global_dim:
        latent = latent @ model.latent.widen.weight.T
    patch_mask = _dense_mask([document for _, document, _ in patches], None, device)
    for block in model.latent.blocks:
        latent = _block(block_weights(block), latent, patch_mask, config)

    # Local decoder. Input t reads the newest patch that is complete before id t + 1, so patch p is read from its last byte on
    # to the last but one of the next patch.
    decoder = model.decoder
    vectors = [(decoder.patch_vectors.weight @ one).view(config.cross_attn_k, -1) for one in latent]
    if config.encoder_dim != config.decoder_dim:
        x = x @ decoder.from_encoder.weight.T
    begins = [end - 1 for end, _, _ in patches]  # T, so by nobody, if the patch also holds the last target
    readers = [slice(begin, end) for begin, end in zip(begins, [*begins[1:], T])]
    for layer, block in enumerate(decoder.blocks):
        if layer < len(decoder.cross_attentions):
            w = cross_weights(decoder.cross_attentions[layer])
            x = torch.cat([_cross(w, x[span], mine) for span, mine in zip(readers, vectors)])
        x = _block(block_weights(block), x, byte_mask, config)
    return _rms_norm(decoder.norm, x, config.norm_eps) @ model.head.weight.T


def _hash_sum(tables, config, ids, documents, device):
    """Sum of the n-gram embeddings [T, D]. Bytes are numbered b + 4, the boundary 1, what stands before the document 0."""
    numbered = [1 if byte == BOUNDARY else byte + 4 for byte in ids]
    total = 0
    for table, n in enumerate(config.ngram_sizes):
        rows = []
        for t in range(len(ids)):
            value = 0
            for i in range(n):
                at = t - n + 1 + i
                if at >= 0 and documents[at] == documents[t]:
                    value += numbered[at] * 1_000_000_007**i
            rows.append(table * config.hash_rows + ((value + 2**63) % 2**64 - 2**63) % config.hash_rows)
        total = total + tables[torch.tensor(rows, device=device)]
    return total


def _dense_mask(documents, window, device):
    """bool [T, T]: may the row's place attend to the column's?"""
    documents, places = torch.tensor(documents, device=device), torch.arange(len(documents), device=device)
    distance = places[:, None] - places[None, :]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return near & (documents[:, None] == documents[None, :])


def _rms_norm(norm, x, eps):
    x = x.float()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight


def _rotary(x_THK, theta):
    """Turn pairs (x0, x1), (x2, x3), ... of each head by place * theta ** (-pair / pairs), as complex numbers."""
    T, _, K = x_THK.shape
    angles = torch.arange(T)[:, None] * (1.0 / theta ** (torch.arange(0, K, 2) / K))
    cos_sin = torch.polar(torch.ones_like(angles), angles).to(x_THK.device)
    pairs = torch.view_as_complex(x_THK.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * cos_sin[:, None]).flatten(-2)


def _softmax_attention(q_THK, k_SHK, v_SHK, mask_TS=None):
    scores_HTS = q_THK.transpose(0, 1) @ k_SHK.permute(1, 2, 0) / math.sqrt(q_THK.shape[-1])
    if mask_TS is not None:
        scores_HTS = scores_HTS.masked_fill(~mask_TS, -torch.inf)
    return (scores_HTS.softmax(-1) @ v_SHK.transpose(0, 1)).transpose(0, 1).flatten(1)


def _block(w, x_TD, mask_TT, config):
    """Pre-norm attention and SwiGLU with residuals."""
    normed = _rms_norm(w["norm1"], x_TD, config.norm_eps)
    q, k, v = ((normed @ w[name].T).unflatten(-1, (w["n_heads"], -1)) for name in "qkv")
    if config.qk_norm:
        q, k = _rms_norm(w["q_norm"], q, config.norm_eps), _rms_norm(w["k_norm"], k, config.norm_eps)
    q, k = _rotary(q, config.rope_theta), _rotary(k, config.rope_theta)
    x_TD = x_TD + _softmax_attention(q, k, v, mask_TT) @ w["o"].T
    normed = _rms_norm(w["norm2"], x_TD, config.norm_eps)
    return x_TD + (torch.nn.functional.silu(normed @ w["w1"].T) * (normed @ w["w3"].T)) @ w["w2"].T


def _cross(w, queries, keys):
    """queries [Q, D] attend to all keys [S, D]; the residual counts twice, as in the released weights."""
    normed = _rms_norm(w["key_norm"], keys, w["key_norm"].eps)
    q = _rms_norm(w["query_norm"], queries, w["query_norm"].eps) @ w["q"].T
    q, k, v = (y.unflatten(-1, (w["n_heads"], -1)) for y in (q, normed @ w["k"].T, normed @ w["v"].T))
    return 2 * queries + _softmax_attention(q, k, v) @ w["o"].T
