"""PPMd as a baseline: a compressor that predicts each byte from the `order` bytes before it, and learns as it reads.

It reads a model's training text first, so it knows what the model knows. Then it reads the held-out text. What that
adds to the compressed size is the cost of the held-out text. PPMd learns on meanwhile: it predicts a document from the
held-out documents before it, too, which a trained model does not. `ppmd_bpb` can also measure documents one by one,
each after the training text alone.

A newline follows every document, so PPMd pays for the ends of documents, as a model does.

Needs the package pyppmd. Takes about 1 s for 2 MB of training text, and the same again for each order that is tried.
"""

import os
import random
import warnings
from functools import lru_cache

INSTALL = "pip install pyppmd"
# What PPMd does when its memory is full: it drops the rarest contexts. The other way, to forget everything, would make
# a weaker baseline.
CUT_OFF = 1
# The one of these that does best on the end of the training text is used. The held-out text has no part in the choice.
ORDERS = (6, 8, 12, 16)
# For that choice, PPMd reads this much of the training text's end, and the last tenth of it is scored.
CHOICE_BYTES = 4_000_000
# Of a longer training text only the end is read: this much takes about a minute.
PRIMING_BYTES = 64_000_000
# English takes 20 to 30 bytes of memory a byte of text at order 16.
MEMORY_PER_BYTE = 32
LEAST_MEMORY_MB = 256
MOST_MEMORY_MB = 2048


def is_installed():
    """Whether the package pyppmd is there. It is needed for nothing but this baseline."""
    try:
        import pyppmd  # noqa: F401
    except ImportError:
        return False
    return True


def ppmd_bpb(training, documents, alone=0, seed=1337):
    """Bits per byte that PPMd pays for documents after it has read a training text, as a dict.

    training, documents: lists of bytes. Both have at least one byte.
    alone: measure at most this many of the documents, drawn at random, one by one as well. This needs a system that
        can fork: Linux or macOS.

    Returns "order"; "memory_mb"; "bpb"; "choice": {order as text: bits per byte on the end of the training text};
    and, with alone, "alone_bpb" of "alone_documents" of the "documents", which hold "alone_bytes" bytes.
    Sizes are counted in whole bytes of compressed text.
    """
    text = _joined(training)
    raw_bytes = sum(map(len, documents))
    if not text or not raw_bytes:
        raise ValueError("PPMd needs at least one byte of training text and one of held-out text")
    choice = dict(_choice(text[-CHOICE_BYTES:]))
    # Of equal costs the lowest order.
    order = int(min(choice, key=choice.get))
    memory_mb = memory_for(len(text))
    sample = []
    if alone and hasattr(os, "fork"):
        sample = sorted(random.Random(seed).sample(range(len(documents)), min(alone, len(documents))))
    cost, costs_alone = _costs(order, memory_mb, text, _joined(documents), tuple(documents[i] for i in sample))
    facts = {"order": order, "memory_mb": memory_mb, "bpb": 8 * cost / raw_bytes, "choice": choice}
    alone_bytes = sum(len(documents[i]) for i in sample)
    if alone_bytes:
        facts["alone_bpb"] = 8 * sum(costs_alone) / alone_bytes
        facts["documents"] = len(documents)
        facts["alone_documents"] = len(sample)
        facts["alone_bytes"] = alone_bytes
    return facts


def _joined(documents):
    return b"".join(document + b"\n" for document in documents)


def memory_for(n_bytes):
    """Megabytes of memory for a training text: enough that PPMd drops nothing, and at most half of the machine's."""
    wanted = -(-n_bytes * MEMORY_PER_BYTE >> 20)
    # Steps of 256, so that texts of about the same size get the same.
    memory_mb = min(max(LEAST_MEMORY_MB, -(-wanted // 256) * 256), MOST_MEMORY_MB)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        machine_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
        memory_mb = min(memory_mb, max(LEAST_MEMORY_MB, machine_mb // 2))
    return memory_mb


# A run is often followed by others with the same text: other seeds, other methods.
@lru_cache(maxsize=2)
def _choice(text):
    """{order as text: bits per byte of the last tenth of a text after the rest of it}."""
    begin = len(text) - max(1, len(text) // 10)
    tail = text[begin:]
    memory_mb = memory_for(len(text))
    return {str(order): 8 * _costs(order, memory_mb, text[:begin], tail, ())[0] / len(tail) for order in ORDERS}


@lru_cache(maxsize=2)
def _costs(order, memory_mb, training, held_out, alone):
    """Bytes that held_out adds to the compressed training text, and that each document of `alone` would add to it."""
    import pyppmd

    # Variant I (Ppmd8) needs 0.003 bits per byte less than variant H (Ppmd7) on the bundled sample.
    encoder = pyppmd.Ppmd8Encoder(order, memory_mb << 20, restore_method=CUT_OFF)
    encoder.encode(training)
    alone_costs = [_cost_in_copy(encoder, document + b"\n") for document in alone]
    return len(encoder.encode(held_out)), alone_costs


def _cost_in_copy(encoder, text):
    """Bytes that a text would add, without a change to the encoder: a forked process encodes it."""
    # The package cannot copy an encoder. A forked process has a copy of all memory, made page by page when it writes.
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # A fork is unsafe if the new process needs what other threads hold. This one only encodes and ends.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        try:
            os.write(writer, str(len(encoder.encode(text))).encode())
        finally:
            # Not sys.exit: nothing of the parent may be flushed or closed twice.
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(process, 0)
    if not answer:
        raise OSError("a process that measures PPMd ended without a result; is there enough memory?")
    return int(answer)


def label(facts):
    """What a number of this baseline is, in a few words: "PPMd order 12, 256 MB, after the same training text".

    facts: what `ppmd_bpb` returned, with the "primed_bytes" that were read of "training_bytes".
    """
    text = "the same training text"
    if facts["primed_bytes"] < facts["training_bytes"]:
        text = f"the last {facts['primed_bytes']:,} bytes of the same training text"
    return f"PPMd order {facts['order']}, {facts['memory_mb']:,} MB, after {text}"
