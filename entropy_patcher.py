"""EntropyPatcher: cuts byte sequences into patches by the uncertainty of an entropy model (BLT section 2.3)."""

from pathlib import Path

import numpy as np

from blt.entropies import entropy_distribution, stream_entropies
from blt.files import hash_of_documents, write_atomically
from blt.ids import to_bytes
from blt.patch_rules import (
    NEEDS_ENTROPIES,
    PatchConfig,
    patch_sizes,
    patch_starts,
    patch_statistics,
    split_at,
    threshold_for_patch_size,  # noqa: F401, part of this module's interface
)
from blt.rows import DocumentStream
from blt.tokens import bpe_starts, load_tokenizer


class EntropyPatcher:
    """Cuts byte sequences into patches by an entropy model's uncertainty.

    EntropyPatcher(entropy_model, threshold=0.6, method="global"), or EntropyPatcher(entropy_model, patch_config).
    entropy_model: `MinimalLLM`; None for the methods that need none (static, space, bpe).
    precision: of the entropy model's matrix products: fp32, or bf16/fp16 for speed (entropies then move by some 0.01 nats).
    """

    def __init__(self, entropy_model, patch_config=None, *, threshold=None, method=None, precision="fp32"):
        if patch_config is None:
            patch_config = PatchConfig(
                method=method or "global", entropy_threshold=0.6 if threshold is None else threshold
            )
        elif threshold is not None or method is not None:
            raise ValueError("pass either a PatchConfig or threshold and method, not both")
        if not isinstance(patch_config, PatchConfig):
            raise ValueError(
                f"patch_config must be a PatchConfig, not {type(patch_config).__name__}; a threshold goes by name: threshold=0.6"
            )
        if entropy_model is None and patch_config.method in NEEDS_ENTROPIES:
            raise ValueError(f"method {patch_config.method!r} needs an entropy model; train one: python entropy_llm.py")
        self.entropy_model, self.config, self.precision = entropy_model, patch_config, precision
        self.tokenizer = load_tokenizer(patch_config.tokenizer_path) if patch_config.method == "bpe" else None

    @property
    def is_causal(self):
        """Whether a start depends on earlier bytes only (all methods but bpe)."""
        return self.config.method != "bpe"

    def entropies(self, byte_sequence):
        """Entropy in nats of the distribution for byte t, given the boundary and the bytes before t: float32 [N]."""
        return self._entropies_with_end([to_bytes(byte_sequence)])[0][:-1]

    def _entropies_with_end(self, documents, progress=None):
        """List of float32 [N + 1]: for every byte of each document and for its end."""
        if self.entropy_model is None:
            raise ValueError("there is no entropy model to compute entropies with")
        if not documents:
            return []
        stream = DocumentStream.of_documents(documents)
        n_streams = min(8, len(documents))
        flat = stream_entropies(self.entropy_model, stream, n_streams, precision=self.precision, progress=progress)
        return np.split(flat, stream.ends[:-1])

    def starts(self, byte_sequence, entropies=None):
        """Which places open a patch, the document's end included: bool [N + 1]."""
        document = to_bytes(byte_sequence)
        if self.config.method in NEEDS_ENTROPIES and entropies is None:
            entropies = self._entropies_with_end([document])[0]
        with_end = np.append(document, np.uint8(0))  # no rule reads the byte it decides about
        token_starts = bpe_starts(self.tokenizer, document) if self.config.method == "bpe" else None
        return patch_starts(entropies, **self.config.rule, byte_values=with_end, token_starts=token_starts)

    def create_patches(self, byte_sequence):
        """The patches of a byte sequence, a list of bytes that concatenate to it. The empty sequence has none."""
        document = to_bytes(byte_sequence)
        return split_at(document, self.starts(document)[:-1])

    def process_data(self, byte_sequences, cache_key=None):
        """Patch many sequences: (a list of patches for each sequence, statistics).

        cache_key: name under which the entropies are kept in config.cache_dir; a second call with the same key, model and
        sequences reads them. Kept entropies of another model or other sequences are refused with ValueError.
        """
        documents = [to_bytes(sequence) for sequence in byte_sequences]
        entropies = None
        if self.entropy_model is not None:
            cached = cache_key is not None and self.config.cache_patches
            entropies = self._cached_entropies(documents, cache_key) if cached else self._entropies_with_end(documents)
        starts = [self.starts(d, None if entropies is None else entropies[i])[:-1] for i, d in enumerate(documents)]
        sizes = np.concatenate([patch_sizes(s) for s in starts] or [np.empty(0, np.int64)])
        flat = np.concatenate([e[:-1] for e in entropies]) if entropies else np.empty(0, np.float32)
        return [split_at(d, s) for d, s in zip(documents, starts)], patch_statistics(sizes, flat)

    def _cached_entropies(self, documents, cache_key):
        from blt.files import model_hash

        if not cache_key or Path(cache_key).name != cache_key:
            raise ValueError(f"cache_key is {cache_key!r}; it must be a plain file name")
        made_from = {
            "sequences": hash_of_documents(documents),
            "entropy_model": model_hash(self.entropy_model),
            "precision": self.precision,
        }
        path = Path(self.config.cache_dir) / f"{cache_key}.npz"
        lengths = [len(d) + 1 for d in documents]
        if path.exists():
            with np.load(path) as kept:
                for name, value in made_from.items():
                    if str(kept[name]) != value:
                        raise ValueError(
                            f"{path} was made from another {name.replace('_', ' ')}; delete it or use another cache_key"
                        )
                flat = kept["entropies"]
        else:
            flat = np.concatenate(self._entropies_with_end(documents) or [np.empty(0, np.float32)])

            def write(temporary):
                with open(temporary, "wb") as file:
                    np.savez(file, entropies=flat, **made_from)

            write_atomically(path, write)
        return np.split(flat, np.cumsum(lengths)[:-1]) if lengths else []


def analyze_entropy_distribution(entropy_model, byte_sequences):
    """Mean, std, min, max and percentiles of the entropies, in nats: for choosing a threshold by hand."""
    entropies = EntropyPatcher(entropy_model)._entropies_with_end([to_bytes(sequence) for sequence in byte_sequences])
    return entropy_distribution(np.concatenate([e[:-1] for e in entropies] or [np.empty(0, np.float32)]))
