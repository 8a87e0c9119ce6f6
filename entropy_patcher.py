"""EntropyPatcher: splits byte sequences into patches by the uncertainty of an entropy model (BLT sections 2.1 to 2.3).

The methods themselves are in blt/patch_rules.py, the pass of the entropy model in blt/entropies.py.
"""

from pathlib import Path

import numpy as np

from blt.commands import command
from blt.entropies import default_reading, entropy_distribution, stream_entropies
from blt.files import hash_of_documents, model_hash, write_atomically
from blt.ids import to_bytes
from blt.patch_rules import (  # noqa: F401, threshold_for_patch_size is part of this module's interface
    PatchConfig,
    patch_sizes,
    patch_starts,
    patch_statistics,
    split_at,
    threshold_for_patch_size,
)
from blt.rows import DocumentStream
from blt.tokens import bpe_starts, load_tokenizer


class EntropyPatcher:
    """Splits byte sequences into patches.

    EntropyPatcher(entropy_model, threshold=0.6, method="global"), or EntropyPatcher(entropy_model,
    patch_config).

    entropy_model: `MinimalLLM`; None for the methods that need none (static, space, bpe).
    precision: of the entropy model's matrix products: fp32, or bf16 or fp16 for speed, which
    moves entropies by some 0.01 nats.
    Raises ValueError for a method that needs an entropy model and gets none.
    """

    def __init__(self, entropy_model, patch_config=None, *, threshold=None, method=None, precision="fp32"):
        if patch_config is None:
            threshold = 0.6 if threshold is None else threshold
            patch_config = PatchConfig(method="global" if method is None else method, entropy_threshold=threshold)
        elif threshold is not None or method is not None:
            raise ValueError("pass either a PatchConfig or threshold and method, not both")
        if not isinstance(patch_config, PatchConfig):
            kind = type(patch_config).__name__
            raise ValueError(f"patch_config must be a PatchConfig, not {kind}; a threshold goes by name: threshold=0.6")
        if entropy_model is None and patch_config.needs_entropies:
            train = command("entropy_llm.py")
            raise ValueError(f"method {patch_config.method!r} needs an entropy model; train one: {train}")
        self.entropy_model = entropy_model
        self.config = patch_config
        self.precision = precision
        self.tokenizer = load_tokenizer(patch_config.tokenizer_path) if patch_config.method == "bpe" else None

    @property
    def is_causal(self):
        """Whether a start depends on earlier bytes only, as it does with all methods but bpe."""
        return self.config.rule.is_causal

    def entropies(self, byte_sequence):
        """Entropy in nats of the distribution for byte t, given the boundary and the bytes before t: float32 [N].

        byte_sequence: bytes, bytearray, list of ints, uint8 array or tensor, or str (encoded as
        UTF-8).
        """
        return self.entropies_with_end([to_bytes(byte_sequence)])[0][:-1]

    def entropies_with_end(self, documents, progress=None):
        """The same of every byte of uint8 documents and of each document's end: a list of float32 [N + 1]."""
        if self.entropy_model is None:
            raise ValueError("there is no entropy model to compute entropies with")
        if not documents:
            return []
        stream = DocumentStream.of_documents(documents)
        device = next(self.entropy_model.parameters()).device
        n_streams, chunk_bytes = default_reading(device)
        # A CPU reads one text in one stream, as generation does, and some more where there are several.
        if device.type == "cpu":
            n_streams = min(8, len(documents))
        flat = stream_entropies(
            self.entropy_model, stream, n_streams, chunk_bytes, precision=self.precision, progress=progress
        )
        return np.split(flat, stream.ends[:-1])

    def starts(self, byte_sequence, entropies=None):
        """Which positions start a patch, the document's end included: bool [N + 1].

        entropies: float [N + 1] if they are known already; None: the entropy model computes them
        if the method needs any.
        """
        document = to_bytes(byte_sequence)
        if self.config.needs_entropies and entropies is None:
            entropies = self.entropies_with_end([document])[0]
        # No method reads the byte it decides about, so the value at the document's end is arbitrary.
        with_end = np.append(document, np.uint8(0))
        token_starts = bpe_starts(self.tokenizer, document) if self.tokenizer is not None else None
        return patch_starts(entropies, **self.config.arguments(), byte_values=with_end, token_starts=token_starts)

    def create_patches(self, byte_sequence):
        """The patches of a byte sequence: a list of bytes that concatenate to it. The empty sequence has none."""
        document = to_bytes(byte_sequence)
        return split_at(document, self.starts(document)[:-1])

    def process_data(self, byte_sequences, cache_key=None):
        """Patch many sequences: (a list of patches for each sequence, statistics as from `patch_statistics`).

        cache_key: name under which the entropies are kept in config.cache_dir; a second call with
        the same key, model and sequences reads them.
        Raises ValueError if the kept entropies are of another model or of other sequences.
        """
        documents = [to_bytes(sequence) for sequence in byte_sequences]
        if self.entropy_model is None:
            entropies = None
        elif cache_key is not None and self.config.cache_patches:
            entropies = self._cached_entropies(documents, cache_key)
        else:
            entropies = self.entropies_with_end(documents)

        patches, sizes = [], []
        for number, document in enumerate(documents):
            is_start = self.starts(document, None if entropies is None else entropies[number])[:-1]
            patches.append(split_at(document, is_start))
            sizes.append(patch_sizes(is_start))
        all_sizes = np.concatenate([*sizes, np.empty(0, np.int64)])
        all_entropies = np.concatenate([*(e[:-1] for e in entropies or []), np.empty(0, np.float32)])
        return patches, patch_statistics(all_sizes, all_entropies)

    def _cached_entropies(self, documents, cache_key):
        """`entropies_with_end`, kept in a file that says which documents, model and precision it is of."""
        if not cache_key or Path(cache_key).name != cache_key:
            raise ValueError(f"cache_key is {cache_key!r}; it must be a plain file name")
        path = Path(self.config.cache_dir) / f"{cache_key}.npz"
        made_from = {
            "sequences": hash_of_documents(documents),
            "entropy_model": model_hash(self.entropy_model),
            "precision": self.precision,
        }
        if path.exists():
            kept = read_kept(path)
            for name, value in made_from.items():
                if str(kept.get(name)) != value:
                    what = name.replace("_", " ")
                    raise ValueError(f"{path} was made from another {what}; delete it or use another cache_key")
            flat = kept["entropies"]
        else:
            flat = np.concatenate([*self.entropies_with_end(documents), np.empty(0, np.float32)])

            def write(temporary):
                # np.savez would add .npz to a file name, so it gets an open file.
                with open(temporary, "wb") as file:
                    np.savez(file, entropies=flat, **made_from)

            write_atomically(path, write)
        ends = np.cumsum([len(document) + 1 for document in documents])
        return np.split(flat, ends[:-1]) if documents else []


def read_kept(path):
    """The arrays of an .npz file. Raises ValueError naming a file that is damaged."""
    try:
        # Reading an array compares its checksum.
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    # zipfile and NumPy raise many types for a file that is no archive of arrays.
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error}); delete it or use another cache_key") from None


def analyze_entropy_distribution(entropy_model, byte_sequences):
    """Mean, std, min, max and percentiles of the entropies, in nats: for choosing a threshold by hand.

    Returns {"mean", "std", "min", "max", "percentiles": {5: ..., 10: ..., ..., 99: ...}}.
    """
    documents = [to_bytes(sequence) for sequence in byte_sequences]
    entropies = EntropyPatcher(entropy_model).entropies_with_end(documents)
    return entropy_distribution(np.concatenate([*(e[:-1] for e in entropies), np.empty(0, np.float32)]))
