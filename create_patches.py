"""Compute the entropies of a corpus once, choose how to cut it into patches, and show what the patches look like.

Reads   a corpus and entropy_model.pth (python entropy_llm.py makes it)
Writes  patch_cache/entropies-*/ (float16, one number a byte, one a document's end), patch_cache/patches.json (the rule that training will use),
        and in patch_cache/: entropy.png, patch_sizes.png, patches.html
Run     python create_patches.py [--preset cpu] [--method global --target_patch_size 4.5] [--field value ...]
Next    python llm.py

Another method, threshold or patch size is a pass over the file of entropies: run it again, the model does not.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from blt.checks import check, check_positive
from blt.config import print_header, run_script
from blt.corpus import DataConfig
from blt.device import choose_device, choose_precision
from blt.entropies import (
    entropy_distribution,
    make_entropies,
    stream_predictions,
    training_patch_sizes,
    training_sample,
    training_starts,
)
from blt.files import write_json
from blt.patch_rules import (
    DEFAULT_PATCH_SIZE,
    PatchConfig,
    calibrate,
    patch_sizes,
    patch_statistics,
    threshold_for_patch_size,
    warn_about_sizes,
)
from blt.tokens import bpe_starts, train_tokenizer
from entropy_patcher import EntropyPatcher
from save_entropy_model import load_entropy_model


@dataclass
class CreatePatchesConfig(DataConfig):
    # entropies
    entropy_model_path: str = "entropy_model.pth"  # the trained entropy model
    streams: int = 4  # places of the text read side by side; more on a GPU (the presets)
    chunk_bytes: int = 1024  # bytes of each read at once
    # patches
    method: Literal["global", "monotonic", "both", "static", "space", "cumulative", "bpe"] = "global"  # the rule
    target_patch_size: float | None = (
        None  # find the threshold that gives so many bytes a patch (4.5 if no threshold is given)
    )
    entropy_threshold: float | None = None  # or the threshold itself: nats; bytes for static
    monotonic_threshold: float = 0.0  # nats; both: the rise of entropy that a start also needs
    min_patch_size: int = 1  # bytes; a start that comes earlier is suppressed
    max_patch_size: int | None = None  # bytes; after so many a patch is closed; None: no limit
    bpe_vocab_size: int = 4096  # bpe: tokens to learn
    # output
    cache_dir: str = "patch_cache"  # where entropies, rule and pictures go
    picture_text: str | None = None  # text to draw; None: the beginning of the first validation document

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "streams", "chunk_bytes", "bpe_vocab_size")
        if self.target_patch_size is not None and self.entropy_threshold is not None:
            raise ValueError("give either target_patch_size or entropy_threshold, not both: one follows from the other")
        if self.target_patch_size is not None:
            check(self, "target_patch_size", self.target_patch_size >= 1, "1 or more bytes")
        check(self, "bpe_vocab_size", self.bpe_vocab_size >= 256, "256 or more")
        self.patch_config(self.entropy_threshold or 1.0)  # its checks, before any work is done

    def patch_config(self, threshold):
        """The rule as a `PatchConfig`."""
        tokenizer = str(Path(self.cache_dir) / "tokenizer.json") if self.method == "bpe" else None
        return PatchConfig(
            self.method, threshold, self.monotonic_threshold, self.min_patch_size, self.max_patch_size,
            cache_dir=self.cache_dir, tokenizer_path=tokenizer,
        )  # fmt: skip


PRESETS = {
    "cpu": dict(max_bytes=2_200_000, val_bytes=200_000),
    "colab_t4": dict(streams=64, chunk_bytes=2048),
    "rtx4090": dict(streams=256, chunk_bytes=2048),
    "h200": dict(streams=512, chunk_bytes=2048),
}


def main(config):
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    print_header(config, device, precision)
    corpus = config.corpus()
    model, record = load_entropy_model(config.entropy_model_path, device)
    train = corpus.documents("train", config.max_bytes)
    validation = corpus.documents("validation", config.val_bytes)
    cache = make_entropies(
        config.cache_dir, corpus, model, record, train, validation, precision, config.streams, config.chunk_bytes
    )

    sample = training_sample(cache)
    distribution = entropy_distribution(sample[0])
    print(
        f"entropy: mean {distribution['mean']:.3f}, std {distribution['std']:.3f}, from {distribution['min']:.3f} to {distribution['max']:.3f} nats"
    )
    print(
        "percentiles (nats): "
        + ", ".join(f"{level}% {value:.3f}" for level, value in distribution["percentiles"].items())
    )
    for method in ("global", "monotonic"):
        suggestions = [(size, threshold_for_patch_size(sample[0], method, size, sample[1])) for size in (3, 4.5, 6, 8)]
        print(
            f"thresholds for {method}: " + ", ".join(f"{size} bytes a patch {value:.3f}" for size, value in suggestions)
        )

    if config.method == "bpe":
        train_tokenizer(
            (corpus.document(n) for n in train[:2000]), config.bpe_vocab_size, Path(config.cache_dir) / "tokenizer.json"
        )
    patch_config = config.patch_config(config.entropy_threshold or 1.0)
    if config.entropy_threshold is None:
        patch_config = calibrate(patch_config, config.target_patch_size or DEFAULT_PATCH_SIZE, sample)
    threshold = patch_config.entropy_threshold
    patcher = EntropyPatcher(model, patch_config, precision=precision)
    began = time.perf_counter()
    if config.method == "bpe":
        sizes = np.concatenate(
            [patch_sizes(bpe_starts(patcher.tokenizer, corpus.document(n))[:-1]) for n in train[:2000]]
        )
        documents = min(len(train), 2000)
    else:
        sizes, documents = (
            training_patch_sizes(training_starts(corpus, train, patch_config, cache), corpus, train),
            len(train),
        )
    statistics = patch_statistics(sizes, sample[0])
    places = int(sizes.sum())
    print(
        f"patches: {config.method}, threshold {threshold:.4f}: {statistics['total_patches']:,} patches of {places:,} bytes, "
        f"{statistics['avg_patch_size']:.2f} bytes a patch (from {statistics['min_patch_size']} to {statistics['max_patch_size']}) "
        f"in {time.perf_counter() - began:.2f} s"
    )
    warn_about_sizes(statistics["total_patches"], places, documents, threshold)
    write_json(Path(config.cache_dir) / "patches.json", {
        "patch_config": asdict(patch_config), "entropy_model_path": config.entropy_model_path,
        "entropy_model_sha256": record["sha256"], "corpus_sha256": corpus.hash, "dataset": config.dataset,
        "precision": precision, "statistics": statistics, "entropy_distribution": distribution,
    })  # fmt: skip
    draw_pictures(config, corpus, validation, patcher, sizes)
    print(f"wrote {config.cache_dir}/patches.json, entropy.png, patch_sizes.png, patches.html")
    print("next: python llm.py" + (f" --preset {' '.join(config.preset)}" if config.preset else ""))


def draw_pictures(config, corpus, validation, patcher, sizes):
    """entropy.png (the paper's Figure 4), patch_sizes.png and patches.html in the cache folder."""
    from blt.pictures import (
        MAX_PAGE_BYTES,
        draw_entropy_figure,
        draw_patch_size_histogram,
        whole_characters,
        write_patch_page,
    )

    folder, rule = Path(config.cache_dir), patcher.config
    threshold = rule.entropy_threshold if rule.method in ("global", "both") else None
    title = f"{rule.method} patches" + (
        f", threshold {rule.entropy_threshold:.3f}" if rule.method not in ("space", "bpe") else ""
    )
    if config.picture_text:
        text = whole_characters(config.picture_text.encode("utf-8", "surrogateescape"), MAX_PAGE_BYTES)
    else:
        text = b"\n\n".join(whole_characters(corpus.document(number)[:4001], 4000) for number in validation[:8])
    H, predictions = stream_predictions(patcher.entropy_model, text, precision=patcher.precision)
    starts, sentence = patcher.starts(text, H)[:-1], whole_characters(text, 240)
    draw_entropy_figure(folder / "entropy.png", sentence, H[: len(sentence)], starts[: len(sentence)], threshold, title)
    draw_patch_size_histogram(folder / "patch_sizes.png", sizes, title)
    figures = [("entropy model, bits a byte", f"{predictions.bits_per_byte:.3f}")]
    token_starts = starts if rule.method == "bpe" else None
    write_patch_page(
        folder / "patches.html",
        text,
        H[:-1],
        rule.rule,
        {"entropy model": predictions},
        "Patches",
        title,
        figures,
        token_starts,
    )


if __name__ == "__main__":
    run_script(main, CreatePatchesConfig, __doc__, PRESETS)
