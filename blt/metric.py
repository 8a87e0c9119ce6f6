"""The metric: the loss, bits per byte, what compressors make of the same bytes, and the leak gate.

What defines a number exists once, here: `target_losses` is the loss, `bits_per_byte` the metric, and
`leak_gate` says whether the metric can be trusted: it runs before the first step of every training run,
and before evaluate.py scores a model.
"""

import copy
import gzip
import lzma
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from blt import ppmd
from blt.device import autocast
from blt.ids import BYTES
from blt.layers import without_zeros
from blt.patch_rules import refuse_lookahead
from blt.processes import n_processes, process_number, sum_over_processes
from blt.rows import evaluation_batches

# The target that cross_entropy leaves out.
IGNORED = -100


def target_losses(model, batch):
    """Cross-entropy of each target of a `RowBatch`: (nats float32 [B, T], logits [B, T, V]).

    A target that is not scored costs 0 nats. The training loss is the sum of nats over the number
    of scored targets.
    """
    logits_BTV = row_logits(model, batch)
    return nats_of(logits_BTV, batch.ids, batch.is_scored), logits_BTV


def row_logits(model, batch):
    """Logits [B, T, V] of the inputs of a `RowBatch`."""
    return logits_of_rows(model, batch.ids, batch.patch_lengths)


def logits_of_rows(model, ids, patch_lengths=None):
    """Logits [B, T, V] of a model for rows of ids [B, T + 1]; patch_lengths: None for a model without patches."""
    inputs_BT = ids[:, :-1]
    return model(inputs_BT) if patch_lengths is None else model(inputs_BT, patch_lengths)


def nats_of(logits_BTV, ids, is_scored_BT):
    """Cross-entropy in nats, float32 [B, T], of the last T of T + 1 ids; 0 where it is not scored."""
    targets_BT = ids[:, 1:].masked_fill(~is_scored_BT, IGNORED)
    # In fp32 whatever the precision of the model: a sum of many small numbers follows.
    nats = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return nats.view_as(targets_BT)


class RowLosses(nn.Module):
    """A model together with its loss: what training compiles, so that logits in fp32 are never written to memory."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, is_scored, patch_lengths=None):
        """Nats of the targets of rows [B, T + 1], as `target_losses` has them."""
        return nats_of(logits_of_rows(self.model, ids, patch_lengths), ids, is_scored)


@torch.no_grad()
def score_batches(model, batches, device, precision="fp32"):
    """Score `RowBatch`es one by one: yields (batch, nats float32 [B, T], is_right bool [B, T]).

    is_right: whether the most likely id is the target. Targets that are not scored have 0 nats
    and False.
    """
    was_training = model.training
    # Dropout off.
    model.eval()
    for batch in batches:
        batch = batch.to(device)
        with autocast(device, precision):
            nats_BT, logits_BTV = target_losses(model, batch)
        is_right_BT = (logits_BTV.argmax(-1) == batch.ids[:, 1:]) & batch.is_scored
        yield batch, nats_BT, is_right_BT
    model.train(was_training)


def add_up(scored_batches):
    """Totals of what `score_batches` yields: {"nats", "right", "targets", "bytes"}."""
    totals = {"nats": 0.0, "right": 0, "targets": 0, "bytes": 0}
    for batch, nats_BT, is_right_BT in scored_batches:
        # In float64, so that the order of the batches does not matter to the digits that are printed.
        # Apple's GPUs have no float64, so the CPU adds up for them.
        summed_BT = nats_BT.cpu() if nats_BT.device.type == "mps" else nats_BT
        totals["nats"] += summed_BT.sum(dtype=torch.float64).item()
        totals["right"] += int(is_right_BT.sum())
        totals["targets"] += batch.targets
        totals["bytes"] += batch.bytes
    return totals


def rates(totals):
    """`add_up`'s totals as {"val_bpb", "val_loss" (nats per target), "val_accuracy", "val_bytes"}."""
    return {
        # Nats of document ends are in the numerator; ends stand for no byte of the denominator.
        "val_bpb": totals["nats"] / math.log(2) / totals["bytes"],
        "val_loss": totals["nats"] / totals["targets"],
        "val_accuracy": totals["right"] / totals["targets"],
        "val_bytes": totals["bytes"],
    }


def evaluate(model, batches, device, precision="fp32"):
    """Score validation rows, a list of `RowBatch`: a dict as from `rates`."""
    return rates(add_up(score_batches(model, batches, device, precision)))


def evaluate_together(model, batches, device, precision="fp32", before_batch=None):
    """`evaluate`, with the batches shared out among the processes: all must call it.

    before_batch: a function that is called before each batch, as often in every process. It may
    raise, in all of them, to stop the evaluation.
    """

    def watched(some_batches):
        for batch in some_batches:
            if before_batch is not None:
                before_batch()
            yield batch

    own = batches[process_number() :: n_processes()]
    totals = add_up(score_batches(model, watched(own), device, precision))
    # Every process runs as often, because a sharded model gathers its weights from all of them.
    missing = math.ceil(len(batches) / n_processes()) - len(own)
    add_up(score_batches(model, watched(batches[:missing]), device, precision))
    return rates(dict(zip(totals, sum_over_processes(*totals.values()))))


def bits_per_byte(model, patcher, documents, row_bytes=4096, batch_rows=8, precision="fp32"):
    """Bits per byte of whole documents: the nats of every byte and every document's end, / ln 2, / number of raw bytes.

    patcher: makes each document's patches from what is before each byte; None for a model without
    patches.
    documents: bytes-like objects or uint8 arrays, each scored from its boundary on. A document
    longer than row_bytes - 1 bytes is read in windows of row_bytes ids, half a window apart
    (`rows.evaluation_batches`).

    A model with 256 classes (the entropy model) cannot end a document: its ends are left out, the
    bytes are not. A model over other ids (`.vocabulary`, BPE tokens) pays for the ids that its
    vocabulary makes of a document, in rows of about row_bytes bytes; the bytes counted are still
    the raw ones.
    """
    documents = [np.frombuffer(bytes(document), dtype=np.uint8) for document in documents]
    is_start = None if patcher is None else [patcher.starts(document) for document in documents]
    batches = scoring_batches(model, documents, is_start, row_bytes, batch_rows)
    return evaluate(model, batches, next(model.parameters()).device, precision)["val_bpb"]


def scoring_batches(model, documents, is_start, row_bytes=4096, batch_rows=8):
    """The rows from which `bits_per_byte` scores uint8 documents: yields `RowBatch`es.

    is_start: bool [N + 1] of each document, its patches already made; None for a model without
    patches.
    """
    if not sum(len(document) for document in documents):
        raise ValueError("bits per byte need at least one byte of text")
    vocabulary = vocabulary_of(model)
    # For a BPE model these are tokens, for all others the bytes themselves.
    ids = [vocabulary.encode(document) for document in documents]
    row_ids = vocabulary.row_ids(row_bytes)
    return evaluation_batches(ids, is_start, row_ids, batch_rows, predicts_document_ends(model), vocabulary)


def predicts_document_ends(model):
    """Whether the model has a class for the document's end (257 classes) or for bytes only (256)."""
    return _uncompiled(model).n_classes > vocabulary_of(model).boundary


def vocabulary_of(model):
    """What a model's ids mean (`ids.Vocabulary`): bytes, unless the model has a vocabulary of its own."""
    return getattr(_uncompiled(model), "vocabulary", BYTES)


def _uncompiled(model):
    """The module inside what torch.compile returned, or the model itself."""
    return getattr(model, "_orig_mod", model)


# The leak gate

# In nats. Rounding stays below it; a leak does not.
LEAK_TOLERANCE = 1e-3


@torch.no_grad()
def leak_gate(model, patcher, text, positions=6):
    """Raise ValueError if the model or its patches see bytes that they must predict (docs/design.md, invariants 1, 2).

    At some positions t of the first 512 bytes of the text: (1) changing the bytes from t on must
    not change the logits of bytes 0 to t, and (2) cutting the text off at t must not change the
    last logits. The patcher makes the patches again each time. (3) At more positions, because it is
    cheap: cutting the text off at t must not change the patch starts up to t.
    patcher None: a model without patches.
    Returns the largest difference seen, in nats.

    A model whose layers begin as the identity (`layers.zero_outputs`) would pass whatever its layers
    read. So matrices of zeros hold random numbers while the gate runs.

    A model over BPE tokens is tested with tokens in place of bytes: the text is tokenised once,
    and tokens are changed and cut. Bytes cannot be, because other bytes from t on may change a
    token that began before t. There the tokenizer looks ahead, not the model; the tokens still
    restore the text, so their cost is honest.
    """
    if patcher is not None:
        refuse_lookahead(patcher.config, "train or be scored as a model")
        # The gate compares patches of texts of different lengths. In bf16 rounding may move a start
        # between them, which would look like a leak.
        patcher = copy.copy(patcher)
        patcher.precision = "fp32"
    vocabulary = vocabulary_of(model)
    text = vocabulary.encode(np.frombuffer(bytes(text), dtype=np.uint8)[:512])
    if len(text) < 2:
        raise ValueError(f"the leak gate needs a text of at least 2 {'bytes' if vocabulary is BYTES else 'tokens'}")
    if patcher is not None:
        _check_patch_starts(patcher, text)
    was_training = model.training
    model.eval()
    with without_zeros(model):
        worst = _largest_difference(model, patcher, text, vocabulary, positions)
    model.train(was_training)
    return worst


def _largest_difference(model, patcher, text, vocabulary, positions):
    """Tests 1 and 2 of `leak_gate`: the largest difference in nats. Raises ValueError above LEAK_TOLERANCE."""
    whole = _log_probabilities(model, patcher, text, vocabulary)
    # Always the same changes: a gate that fails must fail again.
    generator = np.random.default_rng(0)
    worst = 0.0
    for t in np.unique(np.linspace(1, len(text) - 1, positions).astype(int)):
        changed = text.copy()
        changed[t:] = generator.integers(0, vocabulary.boundary, len(text) - t, dtype=text.dtype)
        other_future = _log_probabilities(model, patcher, changed, vocabulary)
        prefix = _log_probabilities(model, patcher, text[:t], vocabulary)
        differences = {
            f"changing bytes from {t} on changes logits before": (other_future[: t + 1] - whole[: t + 1]).abs().max(),
            f"cutting the text at {t} changes its last logits": (prefix[-1] - whole[t]).abs().max(),
        }
        for what, difference in differences.items():
            # Written so that a difference that is not a number fails too.
            if not difference.item() < LEAK_TOLERANCE:
                raise ValueError(f"leak: {what} (by {difference:.2g} nats); losses of this model mean nothing")
            worst = max(worst, difference.item())
    return worst


def _check_patch_starts(patcher, text, positions=32):
    """Raise ValueError if a patch start depends on its own byte or on later ones."""
    whole = patcher.starts(text)
    for t in np.unique(np.linspace(1, len(text) - 1, positions).astype(int)):
        # The last start of a prefix is about byte t, which the prefix does not hold.
        if not np.array_equal(patcher.starts(text[:t]), whole[: t + 1]):
            raise ValueError(
                f"leak: patch method {patcher.config.method!r} starts other patches when the text is cut off at {t}; "
                "whether byte t starts a patch must depend on the bytes before it only"
            )


def _log_probabilities(model, patcher, document, vocabulary):
    """Log-probabilities [N + 1, V] of one document in a row of its own, with patches made from scratch."""
    # Here, and not once outside: a patch rule that looks ahead is a leak as well.
    is_start = None if patcher is None else [patcher.starts(document)]
    (batch,) = evaluation_batches([document], is_start, len(document) + 1, batch_rows=1, vocabulary=vocabulary)
    logits_BTV = row_logits(model, batch.to(next(model.parameters()).device))
    return logits_BTV[0].float().log_softmax(-1)


# What compressors make of the same bytes


def compressors_bpb(documents):
    """Bits per byte of gzip -9, xz -9 and zstd -19 on the same documents, joined. They have read no training text."""
    from pyarrow import Codec  # slow to import

    raw = b"".join(document.tobytes() for document in documents)
    # Joined, because a compressor that starts again at every document would look worse than it is.
    compressed = {
        "gzip -9": gzip.compress(raw, 9),
        "xz -9": lzma.compress(raw, preset=9),
        "zstd -19": Codec("zstd", 19).compress(raw, asbytes=True),
    }
    return {name: 8 * len(data) / len(raw) for name, data in compressed.items()}


def ppmd_after_training(corpus, train, documents, alone=0):
    """What PPMd pays for documents after it has read a run's training text: the dict of `ppmd.ppmd_bpb`, or None.

    train: numbers of the training documents in the `Corpus`, in the order of the run. Of a long text only the end is
        read; the dict says how much: "primed_bytes" of "training_bytes".
    documents: uint8 arrays. alone: as in `ppmd.ppmd_bpb`.
    None: the package pyppmd is not installed.
    """
    if not ppmd.is_installed():
        return None
    lengths = np.diff(corpus.offsets)[train]
    ends = lengths.cumsum()
    training_bytes = int(ends[-1])
    left_out = max(0, training_bytes - ppmd.PRIMING_BYTES)
    # The first document that is not left out as a whole, and from which of its bytes on it is read.
    first = int(np.searchsorted(ends, left_out, side="right"))
    begin = left_out - int(ends[first] - lengths[first])
    training = [corpus.document(train[first])[begin:].tobytes()]
    training += [corpus.document(number).tobytes() for number in train[first + 1 :]]
    facts = ppmd.ppmd_bpb(training, [document.tobytes() for document in documents], alone)
    return facts | {"primed_bytes": training_bytes - left_out, "training_bytes": training_bytes}


def ppmd_cell(facts, digits=3):
    """The label and the number of PPMd as text: "PPMd order 12, 256 MB, after the same training text 1.894".

    facts: what `ppmd_after_training` returned.
    """
    if facts is None:
        return f"PPMd: {ppmd.INSTALL}"
    return f"{ppmd.label(facts)} {facts['bpb']:.{digits}f}"


def baselines(corpus, train, documents):
    """What compressors make of held-out documents, for the record of a run.

    Returns {"untrained": {name: bits per byte} of compressors that have read no training text, "ppmd": what
    `ppmd_after_training` returns}.
    """
    return {"untrained": compressors_bpb(documents), "ppmd": ppmd_after_training(corpus, train, documents)}


def baselines_line(found):
    """`baselines` as text: PPMd, which has read the training text, and those that have not."""
    untrained = ", ".join(f"{name} {bpb:.3f}" for name, bpb in found["untrained"].items())
    return f"{ppmd_cell(found['ppmd'])}; untrained: {untrained}"


def result_line(result):
    """One line: bits per byte of the best weights beside those of compressors on the same documents.

    result: what `loop.fit` returned, with "baselines".
    """
    return (
        f"val {result['val_bpb']:.4f} bpb over {result['val_bytes']:,} bytes of held-out text "
        f"(accuracy {result['val_accuracy']:.1%}); the same bytes by {baselines_line(result['baselines'])}"
    )
