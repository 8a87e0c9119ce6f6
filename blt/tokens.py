"""Byte-level BPE: train a tokenizer, use its tokens as ids, use its token boundaries as patches.

Bytes are read as latin-1, one character a byte. So every byte string has tokens, and the tokens
restore it exactly.
"""

from pathlib import Path

import numpy as np

from blt.commands import command
from blt.files import write_atomically
from blt.ids import Vocabulary
from blt.progress import progress_bar

# What a token may span: letters (bytes from 0x80 count as letters: they are the parts of UTF-8
# characters), up to three digits, or punctuation, each with one space before it; or a run of white
# space. White space before a word leaves its last space to the word.
TOKEN_PATTERN = r" ?[A-Za-z\x80-\xff]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9\x80-\xff]+|\s+(?!\S)|\s+"


def _as_characters(document):
    """A uint8 document as a string of one character a byte."""
    return document.tobytes().decode("latin-1")


def train_tokenizer(documents, vocab_size, path):
    """Train a byte-level BPE on uint8 documents, write it as a tokenizer.json and return it."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN_PATTERN), "isolated")
    # Every byte is a token, also one that the training text lacks, so any document can be encoded.
    alphabet = [chr(byte) for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((_as_characters(document) for document in documents), trainer)
    save_tokenizer(path, tokenizer)
    return tokenizer


def save_tokenizer(path, tokenizer):
    """Write a tokenizer.json, atomically."""
    # The library's own functions take no path that is not UTF-8.
    text = tokenizer.to_str(pretty=True)
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def load_tokenizer(path):
    """Read a tokenizer that `train_tokenizer` wrote.

    Raises FileNotFoundError if there is no file, ValueError if it is no tokenizer.
    """
    if path is None or not Path(path).exists():
        folder = {} if path is None else {"cache_dir": Path(path).parent}
        make = command("create_patches.py", method="bpe", **folder)
        raise FileNotFoundError(f"method 'bpe' needs a tokenizer, and {path} is none; run: {make}")
    try:
        return tokenizer_of(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise
    # The library raises Exception itself, for whatever is wrong with a file.
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is no tokenizer ({reason}); restore the file, or train again") from None


def tokenizer_of(text):
    """The tokenizer that a tokenizer.json with this text holds."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(text)


def bpe_starts(tokenizer, document):
    """Patch starts of a document whose patches are its BPE tokens: is_start, bool [N + 1].

    Byte t starts a patch if it is the first of a token. So does index N, the document's end.
    """
    is_start = np.zeros(len(document) + 1, dtype=bool)
    encoding = tokenizer.encode(_as_characters(document))
    start_positions = [begin for begin, _ in encoding.offsets]
    is_start[start_positions] = True
    is_start[-1] = True
    return is_start


class BPEVocabulary(Vocabulary):
    """The tokens of a byte-level BPE as ids 0..V - 1; the id V is the document boundary.

    tokenizer: as `train_tokenizer` returns it.
    bytes_per_token: mean over the training text. `row_ids` divides by it, so that a row of
    `row_bytes` bytes becomes a row of tokens. With the default 1, rows count tokens.
    """

    def __init__(self, tokenizer, bytes_per_token=1.0):
        tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        self.tokenizer = tokenizer
        self.bytes_per_id = bytes_per_token
        self.boundary = len(tokens)
        # A token's characters are its bytes; the boundary holds none.
        self.bytes_of_id = np.array([*map(len, tokens), 0], dtype=np.int64)
        self.dtype = np.uint16 if self.boundary < 1 << 16 else np.uint32

    def encode(self, document):
        """A uint8 document as its token ids, uint16 or uint32 [tokens]."""
        return self.encode_all([document])[0]

    def encode_all(self, documents, block_bytes=4_000_000):
        """Encode documents on all cores, about block_bytes at a time.

        Raises ValueError if the tokens do not hold all bytes (a tokenizer that `train_tokenizer`
        did not write).
        """
        documents = list(documents)
        total_bytes = sum(len(document) for document in documents)
        encoded = []
        with progress_bar(total_bytes, "tokens", leave=False) as bar:
            # In blocks, so that the strings and the tokenizer's results of the whole corpus are
            # never in memory at once.
            for block in _blocks(documents, block_bytes):
                strings = [_as_characters(document) for document in block]
                encodings = self.tokenizer.encode_batch_fast(strings, add_special_tokens=False)
                encoded += [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]
                bar.update(sum(len(document) for document in block))
        # A foreign tokenizer may drop or merge bytes, and its bits per byte would mean nothing.
        for document, ids in zip(documents, encoded):
            if self.bytes_of_id[ids].sum() != len(document):
                raise ValueError("the tokenizer loses bytes; use one that create_patches.py wrote")
        return encoded

    def decode(self, ids):
        """Token ids as bytes; a boundary gives no bytes."""
        tokens = (self.tokenizer.id_to_token(int(i)) for i in ids if i != self.boundary)
        return "".join(tokens).encode("latin-1")


def _blocks(documents, block_bytes):
    """Yield lists of neighbouring documents; a list ends with the one that brings it to block_bytes."""
    block = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document)
        if size >= block_bytes:
            yield block
            block = []
            size = 0
    if block:
        yield block
