"""Entropies of texts: the pass of the entropy model (BLT section 2.3).

`entropy_cache` stores those of a corpus, `patch_rules` makes patches of them.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from blt.device import autocast, detect_machine
from blt.ids import to_bytes
from blt.patch_rules import check_finite
from blt.processes import n_processes, process_number
from blt.rows import DocumentStream

# How a text is read on each machine: (streams side by side, bytes of each that are read at once).
# A GPU needs many rows to be busy.
READING = {
    "cpu": (4, 1024),
    "colab_t4": (64, 2048),
    "rtx4090": (256, 2048),
    "h100": (256, 2048),
    "h200": (512, 2048),
}


def entropy_of(logits_BTV):
    """Entropy of each distribution in nats, float32 [B, T]: the paper's equation 1."""
    # In fp32: bf16 would round entropies to steps of 0.01 nats.
    log_p = logits_BTV.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def entropies_of_chunk(model, ids_BT, state):
    """Entropies float32 [B, T] of the bytes after a chunk of ids, and the state for the next (`MinimalLLM.stream`)."""
    logits_BTV, state = model.stream(ids_BT, state)
    return entropy_of(logits_BTV), state


def compiled_entropies(model, shape, precision):
    """`entropies_of_chunk` under torch.compile, for chunks of this shape; None where that does not work.

    It is tested against the function itself first. Prints what it found.
    """
    device = next(model.parameters()).device
    # Other runs of the process have used up a part of torch's limit of compilations.
    torch.compiler.reset()
    compiled = torch.compile(entropies_of_chunk, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, 256, shape, generator=generator).to(device)
    begin = time.perf_counter()
    try:
        # As `stream_entropies` calls it, or it would be compiled again there.
        with torch.no_grad(), autocast(device, precision):
            state = model.empty_state(ids_BT)
            got, _ = compiled(model, ids_BT, state)
            want, _ = entropies_of_chunk(model, ids_BT, state)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        print(f"entropies: not compiled, torch.compile does not work here ({reason})")
        return None
    difference = (got - want).abs().mean().item()
    # bf16 rounds differently in fused kernels, so the bound is loose; a wrong kernel is far off.
    if not difference < 0.02:
        print(f"entropies: not compiled, the compiled model's differ by {difference:.2g} nats")
        return None
    print(f"entropies: compiled in {time.perf_counter() - begin:.0f} s")
    return compiled


def is_worth_compiling(device, n_chunks):
    """Whether a pass of this many chunks takes longer than compiling it would: on CUDA, some 20 seconds."""
    return device.type == "cuda" and n_chunks >= 200


def default_reading(device):
    """(streams, chunk_bytes) for an entropy pass on this torch.device."""
    return READING[detect_machine(str(device))]


@dataclass
class Shares:
    """How the positions of a stream are divided among rows that are read side by side.

    Row i answers for the positions first[i] to end[i] - 1. It reads from begin[i] on, one receptive
    field earlier, so that its first answer is that of a single pass.
    """

    first: np.ndarray
    end: np.ndarray
    begin: np.ndarray
    receptive_field: int

    @classmethod
    def of(cls, model_config, total, n_streams):
        """Equal shares of `total` positions. Short streams get fewer shares, so that little is read twice."""
        # How many bytes before a byte its entropy depends on: one window less the byte itself, for
        # each layer.
        receptive_field = model_config.n_layers * (model_config.max_seq_len - 1)
        n_streams = max(1, min(n_streams, total // (4 * receptive_field + 1)))
        bounds = np.linspace(0, total, n_streams + 1).astype(np.int64)
        begin = np.maximum(bounds[:-1] - receptive_field, 0)
        return cls(bounds[:-1], bounds[1:], begin, receptive_field)

    def of_process(self):
        """The rows of this process; none if there are more processes than rows."""
        first, end, begin = (
            np.array_split(values, n_processes())[process_number()] for values in (self.first, self.end, self.begin)
        )
        return Shares(first, end, begin, self.receptive_field)

    @property
    def positions(self):
        """Positions that the rows answer for."""
        return int((self.end - self.first).sum())

    @property
    def longest(self):
        """Positions that the longest row reads."""
        return int((self.end - self.begin).max(initial=0))

    def written(self, n_read):
        """For each row, the end of what is answered once every row has read n_read positions."""
        return np.clip(self.begin + n_read, self.first, self.end)


@torch.no_grad()
def stream_entropies(
    model,
    stream,
    n_streams=None,
    chunk_bytes=None,
    precision="fp32",
    progress=None,
    out=None,
    visit=None,
    done=0,
    after_chunk=None,
    shares=None,
    compiled=None,
):
    """Entropies of every position of a `DocumentStream` but its last boundary: N + 1 numbers a document, in its order.

    The stream is divided into n_streams equal `Shares`, which are read side by side in chunks; the
    model hands the keys and values of its window on from chunk to chunk. Results equal a single
    pass, whatever n_streams and chunk_bytes are. None: what suits the model's device.

    out: array to write to; None: a new float32 array.
    visit: called with (first, end, logits [n, V]) of every piece, for whatever else is to be read
    from the logits.
    progress: a tqdm bar to update.
    done: positions of each row that an earlier call has read, a multiple of chunk_bytes or all;
    their entropies are in `out` already. The rest comes out bit for bit as in one call.
    after_chunk: called with the positions of each row that are read, after each chunk.
    shares: the `Shares` to read, perhaps not all of them; None: n_streams equal ones.
    compiled: `compiled_entropies` for rows of chunk_bytes, to read with. It gives no logits, so there is no `visit`.
    Returns out. Raises ValueError if an entropy is not finite.
    """
    device = next(model.parameters()).device
    total = len(stream) - 1
    out = np.empty(total, dtype=np.float32) if out is None else out
    if compiled is not None and visit is not None:
        raise ValueError("a compiled pass gives no logits to visit; pass only one of compiled and visit")
    default_streams, default_chunk = default_reading(device)
    n_streams = default_streams if n_streams is None else n_streams
    chunk_bytes = default_chunk if chunk_bytes is None else chunk_bytes
    shares = Shares.of(model.config, total, n_streams) if shares is None else shares
    longest = shares.longest
    # After a stop the model has to see one receptive field again. It sees it in the same chunks as
    # before, because other shapes would round differently.
    restart = max(0, done - shares.receptive_field) // chunk_bytes * chunk_bytes
    state = None
    was_training = model.training
    model.eval()
    # One autocast context around the loop: it rounds each weight only once.
    with autocast(device, precision):
        for offset in range(restart if done < longest else longest, longest, chunk_bytes):
            width = min(chunk_bytes, longest - offset)
            chunk_first = shares.begin + offset
            ids = np.stack([stream.ids(first, first + width) for first in chunk_first])
            if compiled is not None and width < chunk_bytes:
                # The last chunk, too, has the shape that is compiled. No entropy depends on what comes after it.
                ids = np.pad(ids, ((0, 0), (0, chunk_bytes - width)))
            ids_BT = torch.from_numpy(ids).to(device)
            if compiled is None:
                logits, state = model.stream(ids_BT, state)
            else:
                entropies, state = compiled(model, ids_BT, model.empty_state(ids_BT) if state is None else state)
            # What is read again is written already.
            if offset < done:
                continue
            if compiled is None:
                entropies = entropy_of(logits)
            entropies = entropies.cpu().numpy()
            n_new = 0
            for row, first in enumerate(chunk_first):
                # The part of this chunk that lies in the row's own share.
                low = max(first, shares.first[row])
                high = min(first + width, shares.end[row])
                if low >= high:
                    continue
                new = entropies[row, low - first : high - first]
                check_finite(new)
                out[low:high] = new
                n_new += high - low
                if visit is not None:
                    visit(int(low), int(high), logits[row, low - first : high - first])
            if progress is not None:
                progress.update(int(n_new))
            if after_chunk is not None:
                after_chunk(offset + width)
    model.train(was_training)
    return out


@dataclass
class TopPredictions:
    """What a model predicted for each of N bytes from what is before it: its k most likely ids, in that order."""

    ids_Nk: np.ndarray  # int64; 256 is the document's end
    probabilities_Nk: np.ndarray  # float32, of these ids
    of_byte_N: np.ndarray  # float32, the probability of the byte that came

    @classmethod
    def of_logits(cls, logits_NV, byte_values, k):
        """From logits and the bytes that came; logits after the last byte are left out."""
        probabilities_NV = logits_NV[: len(byte_values)].float().softmax(-1)
        top = probabilities_NV.topk(k)
        came_N1 = torch.from_numpy(byte_values.astype(np.int64)).to(logits_NV.device)[:, None]
        of_byte_N = probabilities_NV.gather(1, came_N1)[:, 0]
        return cls(top.indices.cpu().numpy(), top.values.cpu().numpy(), of_byte_N.cpu().numpy())

    @classmethod
    def joined(cls, pieces):
        """Pieces of one text, in order, as one."""
        return cls(
            np.concatenate([piece.ids_Nk for piece in pieces]),
            np.concatenate([piece.probabilities_Nk for piece in pieces]),
            np.concatenate([piece.of_byte_N for piece in pieces]),
        )

    @property
    def bits_per_byte(self):
        """Bits that the bytes cost the model; the document's end is not counted."""
        return float(-np.log2(np.maximum(self.of_byte_N, 1e-30), dtype=np.float64).mean())


def stream_predictions(model, document, k=5, precision="fp32", progress=None):
    """A document's entropies [N + 1], as `EntropyPatcher` computes them, and the model's `TopPredictions`."""
    document = to_bytes(document)
    pieces = []

    def visit(low, high, logits_NV):
        pieces.append(TopPredictions.of_logits(logits_NV, document[low:high], k))

    stream = DocumentStream.of_documents([document])
    entropies = stream_entropies(model, stream, n_streams=1, precision=precision, progress=progress, visit=visit)
    return entropies, TopPredictions.joined(pieces)


def entropy_distribution(entropies):
    """{"mean", "std", "min", "max", "percentiles": {5: ..., 99: ...}} of float [N], nats."""
    if len(entropies) == 0:
        raise ValueError("no bytes to analyse")
    entropies = np.asarray(entropies, dtype=np.float32)
    levels = (5, 10, 25, 50, 75, 80, 85, 90, 95, 99)
    return {
        "mean": float(entropies.mean(dtype=np.float64)),
        "std": float(entropies.std(dtype=np.float64)),
        "min": float(entropies.min()),
        "max": float(entropies.max()),
        "percentiles": {level: float(value) for level, value in zip(levels, np.percentile(entropies, levels))},
    }
