"""Training a BLT on patches: its settings, its data, and the run of the loop."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blt.checks import check
from blt.config import SHARED_FIELDS, SIZE_NAMES, next_command
from blt.device import MACHINE_NAMES
from blt.files import load_weights
from blt.flops import blt_flops
from blt.ids import to_bytes
from blt.loop import RunConfig, first_row_of, fit
from blt.metric import leak_gate
from blt.patch_rules import causal_methods, check_thresholds, warn_about_sizes
from blt.rows import BitArray, DocumentStream, TrainingRows, evaluation_batches
from blt.training_patches import training_starts


@dataclass
class TrainingConfig(RunConfig):
    """Settings of a run that trains a BLT, the model's sizes apart."""

    # patches: None takes what create_patches.py chose
    entropy_model_path: str = "entropy_model.pth"  # the trained entropy model
    patch_cache: str = "patch_cache"  # folder that create_patches.py filled
    patch_method: str | None = None  # the patching method; None: the rule that create_patches.py chose
    entropy_threshold: float | None = None  # with patch_method: the threshold in nats (bytes for static)
    target_patch_size: float | None = None  # with patch_method: or the wanted bytes a patch
    patch_slots: int | None = None  # patches in a row; None: chosen so that little is padding
    # output
    output: str = "checkpoints"  # folder for weights, metrics and curves
    prompt: str | None = None  # text to continue when training ends; None: the beginning of a validation document
    sample_bytes: int = 200  # bytes of that continuation; 0: none

    CHOICES = {"patch_method": causal_methods}

    def __post_init__(self):
        super().__post_init__()
        names_threshold = self.entropy_threshold is not None or self.target_patch_size is not None
        if self.patch_method is None and names_threshold:
            raise ValueError(
                "entropy_threshold and target_patch_size need --patch_method; "
                "without it the rule of create_patches.py is used"
            )
        if self.patch_method is not None:
            check_thresholds(self.patch_method, self.target_patch_size, self.entropy_threshold)
        if self.target_patch_size is not None:
            check(self, "target_patch_size", self.target_patch_size >= 1, "1 or more bytes")
        check(self, "sample_bytes", self.sample_bytes >= 0, "0 or more")
        if self.patch_slots is not None:
            check(self, "patch_slots", self.patch_slots >= 4, "4 or more")


def patches_command(config, **limits):
    """The command that makes the patches which a `TrainingConfig` reads. limits: of the text."""
    flags = {"entropy_model_path": config.entropy_model_path, "cache_dir": config.patch_cache}
    return _command_before("create_patches.py", config, **flags, **limits)


def entropy_command(config):
    """The command that trains the entropy model which a `TrainingConfig` reads."""
    return _command_before("entropy_llm.py", config, output=config.entropy_model_path)


def _command_before(script, config, **flags):
    """A command with the text of this config, for a script whose results it needs."""
    # These scripts know no presets but sizes and machines.
    is_known = {*config.preset} <= {*SIZE_NAMES, *MACHINE_NAMES}
    shared = SHARED_FIELDS if is_known else [name for name in SHARED_FIELDS if name != "preset"]
    return next_command(script, config=config, shared_fields=shared, **flags)


class PatchedDataset:
    """What `train_blt` trains on: rows of patched training text, rows that score the validation text, and the patcher.

    train_rows: `TrainingRows`.
    validation: list of uint8 documents.
    validation_starts: bool [N + 1] each, which positions start a patch.
    patcher: the `EntropyPatcher` that made the patches; the leak gate makes them again with it.
    """

    def __init__(self, train_rows, validation, validation_starts, patcher, batch_rows=8):
        self.train_rows = train_rows
        self.validation = validation
        self.validation_starts = validation_starts
        self.patcher = patcher
        self.validation_batches = list(
            evaluation_batches(validation, validation_starts, train_rows.row_bytes, batch_rows)
        )

    @classmethod
    def from_documents(cls, training, validation, patcher, row_bytes=1024, batch_rows=8):
        """Patch lists of documents (anything `EntropyPatcher` takes) with the patcher: for small data in memory."""
        training = [to_bytes(document) for document in training]
        validation = [to_bytes(document) for document in validation]
        if not training or not validation:
            raise ValueError("training and validation each need at least one document")
        is_start = BitArray()
        # The stream begins with a boundary, which is a patch of its own.
        is_start.append(np.concatenate([[True], *(patcher.starts(document) for document in training)]))
        is_start.close()
        rows = TrainingRows(DocumentStream.of_documents(training), row_bytes, is_start)
        return cls(rows, validation, [patcher.starts(document) for document in validation], patcher, batch_rows)

    @classmethod
    def from_corpus(cls, corpus, patcher, config, cache=None):
        """Patch a corpus by its cached entropies.

        config: `TrainingConfig`.
        cache: `entropy_cache.EntropyCache`; None for methods without entropies.
        Raises ValueError if the cache does not cover the documents that the config wants.
        """
        train = corpus.documents("train", config.max_bytes)
        numbers = corpus.documents("validation", config.val_bytes)
        if cache is not None and not cache.covers(train, numbers):
            limits = {"max_bytes": config.max_bytes, "val_bytes": config.val_bytes}
            limits = {name: value for name, value in limits.items() if value is not None}
            raise ValueError(
                f"{cache.folder} covers {len(cache.train):,} training and {len(cache.validation):,} validation "
                f"documents, but {len(train):,} and {len(numbers):,} are wanted; "
                f"run: {patches_command(config, **limits)}, or lower --max_bytes"
            )
        # One vectorised pass over the cached entropies; the entropy model does not run.
        is_start = training_starts(corpus, train, patcher.config, cache)
        rows = TrainingRows(DocumentStream.of_corpus(corpus, train), config.row_bytes, is_start, config.patch_slots)
        validation = [corpus.document(number) for number in numbers]
        # In the cache, the validation documents come after the training documents.
        validation_starts = []
        for place, document in enumerate(validation):
            entropies = None if cache is None else cache.document(len(cache.train) + place)
            validation_starts.append(patcher.starts(document, entropies))
        return cls(rows, validation, validation_starts, patcher, config.batch_rows)

    def bytes_per_patch(self):
        """Mean patch size of the validation text, and its number of patches; prints a warning for an extreme rule."""
        # The document's end is a position, but no byte.
        patches = sum(int(is_start[:-1].sum()) for is_start in self.validation_starts)
        total_bytes = sum(len(document) for document in self.validation)
        warn_about_sizes(patches, total_bytes, len(self.validation), self.patcher.config)
        return total_bytes / patches


def train_blt(model, patched_dataset, training_config, depends_on=None, begin=None):
    """Train a `BLTModel` on a `PatchedDataset`. The leak gate runs first and stops a model that sees ahead.

    training_config: `TrainingConfig`, or any `RunConfig` with an `output` folder. Its zero_init is for whoever
    makes the model (`layers.zero_outputs`): the model that is given here may be trained already.
    depends_on, begin: as in `loop.fit`.
    Returns a dict with val_bpb, val_loss (nats per target) and val_accuracy of the best weights,
    last_val_bpb, bytes_per_second, train_seconds, avg_patch_size, flops_per_byte of a forward pass
    and, of the padding in the training rows, byte_padding and patch_padding. The best weights are in
    output/best.pt, and in the model afterwards.
    """
    if not isinstance(patched_dataset, PatchedDataset):
        kind = type(patched_dataset).__name__
        raise ValueError(f"train_blt needs a PatchedDataset (see PatchedDataset.from_documents), not {kind}")
    data = patched_dataset
    # The gate comes before the first step: losses of a model that sees ahead mean nothing.
    text = np.concatenate(data.validation[:8])[:512]
    print(f"leak gate passed: largest difference {leak_gate(model, data.patcher, text):.1e} nats")
    bytes_per_patch = data.bytes_per_patch()
    byte_padding, patch_padding = data.train_rows.padding()
    print(
        f"rows: {len(data.train_rows):,} of {data.train_rows.row_bytes:,} bytes "
        f"and {data.train_rows.patch_slots} patches | "
        f"padding {byte_padding:.1%} of bytes, {patch_padding:.1%} of patches | "
        f"{bytes_per_patch:.2f} bytes a patch in validation"
    )
    output = training_config.output
    if depends_on is None:
        depends_on = first_row_of(data.train_rows, training_config.seed)
        depends_on["patch_rule"] = data.patcher.config.arguments()
    result = fit(model, training_config, data.train_rows, data.validation_batches, output, depends_on, begin)
    # The last weights need not be the best.
    load_weights(Path(output) / "best.pt", model)
    return {
        **result,
        "avg_patch_size": bytes_per_patch,
        "flops_per_byte": sum(blt_flops(model.config, bytes_per_patch, data.train_rows.document_parts()).values()),
        "byte_padding": byte_padding,
        "patch_padding": patch_padding,
    }
