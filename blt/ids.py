"""Ids: bytes, the document boundary, vocabularies."""

import numpy as np
import torch

BOUNDARY = 256  # document boundary id: as input it opens a document, as target it ends one


class Vocabulary:
    """What ids stand for, here bytes: ids 0..255 are themselves, `boundary` opens and ends documents and stands for no byte.

    A model over other ids carries its own in `.vocabulary` (template_llm.BPEVocabulary); one without is a byte model.
    bytes_of_id: int64 [boundary + 1], raw bytes that each id stands for. bytes_per_id: their mean in text.
    """

    boundary, bytes_per_id = BOUNDARY, 1.0
    bytes_of_id = np.append(np.ones(BOUNDARY, dtype=np.int64), 0)

    def encode(self, document):
        """A uint8 document as an array of ids."""
        return document

    def row_ids(self, row_bytes):
        """Ids in a row that holds about row_bytes bytes of text: for bytes as many."""
        return max(1, round(row_bytes / self.bytes_per_id))


BYTES = Vocabulary()


def documents_of(ids_BT, boundary):
    """Number the document of each id: a boundary opens the next one. [x, x, 256, y, 256] gives 0, 0, 1, 1, 2."""
    return (ids_BT == boundary).cumsum(dim=1)


def to_bytes(byte_sequence):
    """bytes, bytearray, memoryview, list of ints, uint8 array or tensor, or str (as UTF-8) -> uint8 array [N]."""
    if isinstance(byte_sequence, str):
        byte_sequence = byte_sequence.encode("utf-8", "surrogatepass")
    if isinstance(byte_sequence, (bytes, bytearray, memoryview)):
        return np.frombuffer(bytes(byte_sequence), dtype=np.uint8)
    if isinstance(byte_sequence, torch.Tensor):
        byte_sequence = byte_sequence.detach().cpu().numpy()
    values = np.asarray(byte_sequence)
    if values.ndim != 1 or (values.size and (values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255)):
        raise ValueError("a byte sequence must be bytes, str, or one row of whole numbers from 0 to 255")
    return values.astype(np.uint8)
