"""Ids: bytes, the document boundary, vocabularies."""

import numpy as np
import torch

# The id of the document boundary. As an input it opens a document; as a target it ends one.
BOUNDARY = 256


class Vocabulary:
    """What ids stand for, here bytes: ids 0..255 are the bytes, and `boundary` opens and ends documents.

    A model over other ids carries its own vocabulary in `.vocabulary` (`tokens.BPEVocabulary`); a
    model without that attribute is a byte model.

    boundary: the id of the document boundary.
    bytes_per_id: mean number of raw bytes per id in text.
    bytes_of_id: int64 [boundary + 1], the number of raw bytes of each id.
    """

    boundary = BOUNDARY
    bytes_per_id = 1.0
    # Every byte is one byte long. The boundary holds none, so it adds nothing to the bytes of bits
    # per byte.
    bytes_of_id = np.append(np.ones(BOUNDARY, dtype=np.int64), 0)

    def encode(self, document):
        """A uint8 document as an array of ids."""
        return document

    def decode(self, ids):
        """Ids as bytes; a boundary gives none."""
        return bytes(int(i) for i in ids if i != self.boundary)

    def row_ids(self, row_bytes):
        """Number of ids in a row of about row_bytes bytes of text (for this vocabulary: row_bytes)."""
        return max(1, round(row_bytes / self.bytes_per_id))


BYTES = Vocabulary()


def documents_of(ids_BT, boundary):
    """Number the document of each id; a boundary opens the next one.

    [x, x, 256, y, 256] with boundary 256 gives [0, 0, 1, 1, 2].
    """
    return (ids_BT == boundary).cumsum(dim=1)


def to_bytes(byte_sequence):
    """Convert a byte sequence to a uint8 array [N].

    byte_sequence: bytes, bytearray, memoryview, str (taken as UTF-8), or a list, array or tensor of whole numbers.
    Raises ValueError for anything that is not one row of whole numbers from 0 to 255.
    """
    if isinstance(byte_sequence, str):
        # JSON can hold half of a surrogate pair, which strict UTF-8 refuses; corpora store it in
        # the same way.
        byte_sequence = byte_sequence.encode("utf-8", "surrogatepass")
    if isinstance(byte_sequence, (bytes, bytearray, memoryview)):
        return np.frombuffer(bytes(byte_sequence), dtype=np.uint8)
    if isinstance(byte_sequence, torch.Tensor):
        byte_sequence = byte_sequence.detach().cpu().numpy()

    values = np.asarray(byte_sequence)
    is_row_of_bytes = values.ndim == 1
    # An empty list becomes a float array, so the dtype says something only about values that exist.
    if is_row_of_bytes and values.size:
        is_row_of_bytes = values.dtype.kind in "iu" and values.min() >= 0 and values.max() <= 255
    if not is_row_of_bytes:
        raise ValueError("a byte sequence must be bytes, str, or one row of whole numbers from 0 to 255")
    return values.astype(np.uint8)


def argument_bytes(text):
    """The bytes that a user typed as an argument, or that are in a file's name.

    Python reads bytes that are not UTF-8 as surrogates; this undoes it. A surrogate that comes from
    elsewhere (JSON can hold half of a pair) is stored as `to_bytes` stores it.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def drawable(text):
    """A text without surrogates, for what refuses them (matplotlib): bytes that are no UTF-8 become "�"."""
    return argument_bytes(text).decode(errors="replace")
