"""The metric: loss, bits per byte, what compressors make of the same bytes, the leak gate."""

import gzip
import lzma
import math

import numpy as np
import torch
import torch.nn.functional as F

from blt.device import autocast
from blt.ids import BYTES
from blt.rows import evaluation_batches


def target_losses(model, batch):
    """Cross-entropy of each target of a `RowBatch`, in nats, 0 where it does not count: float32 [B, T]; and the logits."""
    inputs, targets = batch.ids[:, :-1], batch.ids[:, 1:].masked_fill(~batch.is_scored, -100)
    logits_BTV = model(inputs) if batch.patch_lengths is None else model(inputs, batch.patch_lengths)
    nats = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none")
    return nats.view_as(targets), logits_BTV


@torch.no_grad()
def score_batches(model, batches, device, precision="fp32"):
    """What each target of `RowBatch`es costs: yields (batch, nats float32 [B, T], is_right bool [B, T]); 0, False where none counts."""
    was_training = model.training
    model.eval()
    for batch in batches:
        batch = batch.to(device)
        with autocast(device, precision):
            nats, logits = target_losses(model, batch)
        yield batch, nats, (logits.argmax(-1) == batch.ids[:, 1:]) & batch.is_scored
    model.train(was_training)


def score(model, batches, device, precision="fp32"):
    """Total nats, right predictions, targets and bytes over `RowBatch`es: a dict of numbers."""
    return add_up(score_batches(model, batches, device, precision))


def add_up(costs):
    """`score` of what `score_batches` yields."""
    totals = {"nats": 0.0, "right": 0, "targets": 0, "bytes": 0}
    for batch, nats, is_right in costs:
        totals["nats"] += nats.sum(dtype=torch.float64).item()
        totals["right"] += int(is_right.sum())
        totals["targets"] += batch.targets
        totals["bytes"] += batch.bytes
    return totals


def rates(totals):
    """Totals as {"val_bpb", "val_loss" (nats per target), "val_accuracy", "val_bytes"}."""
    return {
        "val_bpb": totals["nats"] / math.log(2) / totals["bytes"],
        "val_loss": totals["nats"] / totals["targets"],
        "val_accuracy": totals["right"] / totals["targets"],
        "val_bytes": totals["bytes"],
    }


def evaluate(model, batches, device, precision="fp32"):
    """Score validation rows: `rates` of their `score`."""
    return rates(score(model, batches, device, precision))


def bits_per_byte(model, patcher, documents, row_bytes=4096, batch_rows=8, precision="fp32"):
    """Bits per byte of whole documents: nats of every byte and of every document's end, / ln 2 / number of raw bytes.

    patcher: makes each document's patches from what stands before each byte; None for a model without patches.
    documents: bytes-like or uint8 arrays, each scored from its boundary on; one longer than row_bytes - 1 bytes is read in
    windows of row_bytes ids, half a window apart (`evaluation_batches`). A model with 256 classes (the entropy model) has
    no way to end a document: its ends are left out, the bytes are not. A model over other ids (`.vocabulary`, BPE tokens) pays
    for the ids that its vocabulary makes of a document, in rows of about row_bytes bytes; the bytes counted stay the raw ones.
    """
    documents = [np.frombuffer(bytes(document), dtype=np.uint8) for document in documents]
    is_start = None if patcher is None else [patcher.starts(document) for document in documents]
    batches = scoring_batches(model, documents, is_start, row_bytes, batch_rows)
    return evaluate(model, batches, next(model.parameters()).device, precision)["val_bpb"]


def scoring_batches(model, documents, is_start, row_bytes=4096, batch_rows=8):
    """The rows from which `bits_per_byte` scores uint8 documents with a model, their patches already made (is_start; None: no patches)."""
    if not sum(len(document) for document in documents):
        raise ValueError("bits per byte need at least one byte of text")
    score_ends, vocabulary = predicts_document_ends(model), vocabulary_of(model)
    ids = [vocabulary.encode(document) for document in documents]
    return evaluation_batches(ids, is_start, vocabulary.row_ids(row_bytes), batch_rows, score_ends, vocabulary)


def predicts_document_ends(model):
    """Whether the model has a class for the document's end (257 classes) or bytes only (256)."""
    return getattr(model, "_orig_mod", model).n_classes > vocabulary_of(model).boundary


def vocabulary_of(model):
    """What a model's ids stand for (`rows.Vocabulary`): bytes, unless the model carries a vocabulary of its own."""
    return getattr(getattr(model, "_orig_mod", model), "vocabulary", BYTES)


@torch.no_grad()
def leak_gate(model, patcher, text, places=6):
    """Stop with ValueError if the model or its patches see bytes that they must predict (DESIGN.md, invariants 1 and 2).

    For some places t of the text: (1) other bytes from t on must leave the logits of bytes 0 to t as they are, and
    (2) the text cut off at t must give the last logit of the cut the value it has in the whole text. The patches are made
    anew by the patcher each time. patcher None: a model without patches. Returns the largest difference seen, in nats.

    A model over BPE tokens is held to the same with tokens in place of bytes: the text is tokenised once, and tokens are changed and
    cut. (Bytes cannot be: other bytes from t on may change a token that began before t. That is the tokenizer's looking ahead, not
    the model's; the tokens still restore the text, so their cost is an honest one.)
    """
    if patcher is not None and not patcher.is_causal:
        raise ValueError(
            f"patch method {patcher.config.method!r} looks ahead: it serves comparisons of boundaries only; "
            "train with global, monotonic, both, static, space or cumulative"
        )
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    vocabulary = vocabulary_of(model)
    text = vocabulary.encode(np.frombuffer(bytes(text), dtype=np.uint8)[:512])
    if len(text) < 2:
        raise ValueError(f"the leak gate needs a text of at least 2 {'bytes' if vocabulary is BYTES else 'tokens'}")

    def log_probabilities(document):
        is_start = None if patcher is None else [patcher.starts(document)]
        (batch,) = evaluation_batches([document], is_start, len(document) + 1, batch_rows=1, vocabulary=vocabulary)
        batch = batch.to(device)
        logits = model(batch.ids[:, :-1]) if is_start is None else model(batch.ids[:, :-1], batch.patch_lengths)
        return logits[0].float().log_softmax(-1)

    whole, worst = log_probabilities(text), 0.0
    generator = np.random.default_rng(0)
    for t in np.unique(np.linspace(1, len(text) - 1, places).astype(int)):
        changed = text.copy()
        changed[t:] = generator.integers(0, vocabulary.boundary, len(text) - t, dtype=text.dtype)
        future = (log_probabilities(changed)[: t + 1] - whole[: t + 1]).abs().max().item()
        prefix = (log_probabilities(text[:t])[-1] - whole[t]).abs().max().item()
        for difference, what in (
            (future, f"changing bytes from {t} on changes logits before"),
            (prefix, f"cutting the text at {t} changes its last logit"),
        ):
            worst = max(worst, difference)
            if not difference < 1e-3:
                raise ValueError(f"leak: {what} (by {difference:.2g} nats); losses of this model mean nothing")
    model.train(was_training)
    return worst


def compressors_bpb(documents):
    """Bits per byte of gzip -9, xz -9 and zstd -19 on the same documents, joined: what any compressor gets without training."""
    from pyarrow import Codec

    raw = b"".join(document.tobytes() for document in documents)
    made = {
        "gzip -9": gzip.compress(raw, 9),
        "xz -9": lzma.compress(raw, preset=9),
        "zstd -19": Codec("zstd", 19).compress(raw, asbytes=True),
    }
    return {name: 8 * len(compressed) / len(raw) for name, compressed in made.items()}


def result_line(result, validation):
    """One line: bits per byte of the best weights beside gzip's, xz's and zstd's on the same documents."""
    others = ", ".join(f"{name} {bpb:.3f}" for name, bpb in compressors_bpb(validation).items())
    return (
        f"val {result['val_bpb']:.4f} bpb over {result['val_bytes']:,} bytes of held-out text "
        f"(accuracy {result['val_accuracy']:.1%}); the same bytes by {others}"
    )
