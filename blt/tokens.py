"""Byte-level BPE: training a tokenizer, its tokens as ids, its boundaries as patches."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from blt.files import write_atomically
from blt.ids import Vocabulary


def train_tokenizer(documents, vocab_size, path):
    """Train a byte-level BPE on uint8 documents and write it as a tokenizer.json. Bytes are read as latin-1: any bytes will do."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r" ?[A-Za-z\x80-\xff]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9\x80-\xff]+|\s+(?!\S)|\s+"), "isolated"
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=[chr(b) for b in range(256)], show_progress=False
    )
    tokenizer.train_from_iterator((d.tobytes().decode("latin-1") for d in documents), trainer)
    write_atomically(path, lambda temporary: tokenizer.save(temporary))
    return tokenizer


def load_tokenizer(path):
    """A tokenizer that `train_tokenizer` wrote."""
    if path is None or not Path(path).exists():
        raise FileNotFoundError(
            f"method 'bpe' needs a tokenizer, and {path} is none; run: python create_patches.py --method bpe"
        )
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def bpe_starts(tokenizer, document):
    """Starts of the document's BPE tokens, and of its end: bool [N + 1]."""
    starts = np.zeros(len(document) + 1, dtype=bool)
    starts[[begin for begin, _ in tokenizer.encode(document.tobytes().decode("latin-1")).offsets]] = True
    starts[-1] = True
    return starts


class BPEVocabulary(Vocabulary):
    """The tokens of a byte-level BPE (`entropy_patcher.train_tokenizer`) as ids 0..V - 1; the id V is the document boundary.

    Documents are read as latin-1, one character a byte, so every byte string has tokens and the tokens restore it.
    bytes_per_token: mean over the training text; it makes rows of `row_bytes` bytes into rows of tokens (1: rows count tokens).
    """

    def __init__(self, tokenizer, bytes_per_token=1.0):
        tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        self.tokenizer, self.bytes_per_id, self.boundary = tokenizer, bytes_per_token, len(tokens)
        self.bytes_of_id = np.array([*map(len, tokens), 0], dtype=np.int64)
        self.dtype = np.uint16 if self.boundary < 1 << 16 else np.uint32

    def encode(self, document):
        """A uint8 document as its token ids, uint16 or uint32 [tokens]."""
        return self.encode_all([document])[0]

    def encode_all(self, documents, block_bytes=4_000_000):
        """Documents as token ids, on all cores, block by block. Raises ValueError if tokens do not stand for all bytes."""
        documents, encoded, begin = list(documents), [], 0
        with tqdm(
            total=sum(map(len, documents)), unit="B", unit_scale=True, desc="tokens", disable=None, leave=False
        ) as bar:
            while begin < len(documents):
                end, size = begin, 0
                while end < len(documents) and size < block_bytes:
                    size += len(documents[end])
                    end += 1
                block = [document.tobytes().decode("latin-1") for document in documents[begin:end]]
                encoded += [
                    np.array(made.ids, dtype=self.dtype)
                    for made in self.tokenizer.encode_batch_fast(block, add_special_tokens=False)
                ]
                bar.update(size)
                begin = end
        for document, ids in zip(documents, encoded):
            if self.bytes_of_id[ids].sum() != len(document):
                raise ValueError("the tokenizer loses bytes; use one that entropy_patcher.train_tokenizer wrote")
        return encoded

    def decode(self, ids):
        """Token ids as bytes; boundaries as nothing."""
        return "".join(self.tokenizer.id_to_token(int(i)) for i in ids if i != self.boundary).encode("latin-1")
