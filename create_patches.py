"""Compute the entropies of a corpus once, choose how to split it into patches, and show what the patches look like.

Reads   a corpus and entropy_model.pth (python entropy_llm.py makes it)
Writes  in patch_cache/: entropies-*/ (float16, one number a byte and one a document's end), patches.json (the rule that
        training will use), entropy.png, patch_sizes.png, patches.html
Run     python create_patches.py [--preset MACHINE] [--method global --target_patch_size 4.5] [--field value ...]
Next    python llm.py

For another method, threshold or patch size run it again: that is a pass over the file of
entropies, without the model. The methods are listed in docs/patching.md and written in
blt/patch_rules.py.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from blt.checks import check, check_packages, check_positive
from blt.config import BY_PRESET, SIZE_NAMES, Presets, next_command, print_header, run_script
from blt.corpus import DataConfig
from blt.device import choose_device, choose_precision
from blt.entropies import READING, entropy_distribution, stream_predictions
from blt.entropy_cache import make_entropies
from blt.ids import argument_bytes
from blt.patch_rules import (
    DEFAULT_PATCH_SIZE,
    RULES,
    PatchConfig,
    calibrate,
    check_thresholds,
    count_sizes,
    patch_sizes,
    patch_statistics,
    threshold_for_patch_size,
    warn_about_sizes,
)
from blt.processes import is_main, main_first
from blt.tokens import bpe_starts, train_tokenizer
from blt.training_patches import training_patch_sizes, training_sample, training_starts, write_patches
from entropy_patcher import EntropyPatcher
from save_entropy_model import load_entropy_model

# How the text is read on each machine is in blt/entropies.py, because llm.py reads it in the same way.
MACHINES = {name: dict(streams=streams, chunk_bytes=chunk_bytes) for name, (streams, chunk_bytes) in READING.items()}
MACHINES["cpu_hour"] = MACHINES["cpu"] | dict(val_bytes=1_000_000)
MACHINES["cpu"] |= dict(max_bytes=8_200_000, val_bytes=200_000)
BPE_DOCUMENTS = 2000  # training documents that a tokenizer is learned from, and whose tokens are counted


@dataclass
class CreatePatchesConfig(DataConfig):
    """Settings of this script. A value written in place of BY_PRESET takes effect with every preset."""

    # text: by machine
    max_bytes: int | None = BY_PRESET  # use at most this many bytes of the training documents; None: all
    val_bytes: int = BY_PRESET  # use at most this many bytes of the validation documents
    # entropies
    entropy_model_path: str = "entropy_model.pth"  # the trained entropy model
    streams: int = BY_PRESET  # positions of the text that a process reads side by side; more on a GPU
    chunk_bytes: int = BY_PRESET  # bytes of each that are read at once
    check_cache: bool = False  # hash the cached entropies, to find damage that sizes and times do not show
    # patches
    method: str = "global"  # the patching method
    target_patch_size: float | None = None  # find the threshold that gives this many bytes a patch (None: 4.5)
    entropy_threshold: float | None = None  # or the threshold itself: nats; bytes for static
    monotonic_threshold: float = 0.0  # nats; both: the rise of entropy that a start also needs
    min_patch_size: int = 1  # bytes; a start that comes earlier is suppressed
    max_patch_size: int | None = None  # bytes; a patch that reaches this size is closed; None: no limit
    bpe_vocab_size: int = 4096  # bpe: tokens to learn
    # output
    cache_dir: str = "patch_cache"  # where entropies, rule and pictures go
    picture_text: str | None = None  # text to draw; None: the beginnings of the first 8 validation documents

    # A size changes nothing here; it is accepted so that one --preset serves all three scripts.
    PRESETS = Presets({size: {} for size in SIZE_NAMES}, MACHINES)
    CHOICES = {"method": lambda: list(RULES)}
    RUNS_TOGETHER: ClassVar = True

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "streams", "chunk_bytes", "bpe_vocab_size")
        check_thresholds(self.method, self.target_patch_size, self.entropy_threshold, self.monotonic_threshold)
        if self.target_patch_size is not None:
            is_size = self.target_patch_size >= 1 and math.isfinite(self.target_patch_size)
            check(self, "target_patch_size", is_size, "1 or more bytes")
        check(self, "bpe_vocab_size", self.bpe_vocab_size >= 256, "256 or more")
        check(
            self, "picture_text", self.picture_text != "", "at least one character; leave it out for the corpus's text"
        )
        self.patch_config()  # its checks, before any work is done

    def patch_config(self):
        """The rule as a `PatchConfig`; without a threshold it has 1, until one is calibrated."""
        return PatchConfig(
            method=self.method,
            entropy_threshold=1.0 if self.entropy_threshold is None else self.entropy_threshold,
            monotonic_threshold=self.monotonic_threshold,
            min_patch_size=self.min_patch_size,
            max_patch_size=self.max_patch_size,
            cache_dir=self.cache_dir,
            tokenizer_path=str(Path(self.cache_dir) / "tokenizer.json") if self.method == "bpe" else None,
        )


def print_distribution(distribution, entropies, document_starts):
    """Print what the entropies are like, and which thresholds give which patch sizes."""
    print(
        f"entropy: mean {distribution['mean']:.3f}, std {distribution['std']:.3f}, "
        f"from {distribution['min']:.3f} to {distribution['max']:.3f} nats"
    )
    levels = [f"{level}% {value:.3f}" for level, value in distribution["percentiles"].items()]
    print("percentiles (nats): " + ", ".join(levels))
    for method in ("global", "monotonic"):
        suggestions = []
        for size in (3, 4.5, 6, 8):
            threshold = threshold_for_patch_size(entropies, method, size, document_starts)
            suggestions.append(f"{size} bytes a patch {threshold:.3f}")
        print(f"thresholds for {method}: " + ", ".join(suggestions))


def sizes_of_patches(patcher, corpus, train, cache):
    """How many of the training documents' patches have which size, {bytes: count}, and the number of documents."""
    if patcher.tokenizer is None:
        is_start = training_starts(corpus, train, patcher.config, cache)
        return training_patch_sizes(is_start, corpus, train), len(train)
    # Tokenising takes long, so the sizes of BPE patches come from some documents only.
    some = train[:BPE_DOCUMENTS]
    sizes = [patch_sizes(bpe_starts(patcher.tokenizer, corpus.document(number))[:-1]) for number in some]
    return count_sizes(np.concatenate(sizes)), len(some)


def check_tokenizer_place(config):
    """Raise ValueError if the tokenizer of --method bpe would replace that of a trained model."""
    tokenizer, record = (Path(config.cache_dir) / name for name in ("tokenizer.json", "model.json"))
    if config.method == "bpe" and tokenizer.exists() and record.exists():
        raise ValueError(f"{tokenizer} belongs to the model in {record}; give another --cache_dir")


def main(config):
    check_packages("matplotlib", *(["tokenizers"] if config.method == "bpe" else []))
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    print_header(config, device, precision)
    check_tokenizer_place(config)
    train_entropy = next_command("entropy_llm.py", config=config, output=config.entropy_model_path)
    # Before the corpus, whose reading may take long.
    model, record = load_entropy_model(config.entropy_model_path, device, train_entropy)
    # Its store may have to be built.
    with main_first():
        corpus = config.corpus()
    for line in corpus.notes(config.max_bytes, config.val_bytes):
        print(line)
    train = corpus.documents("train", config.max_bytes)
    validation = corpus.documents("validation", config.val_bytes)
    cache = make_entropies(
        config.cache_dir,
        corpus,
        model,
        record,
        train,
        validation,
        precision,
        config.streams,
        config.chunk_bytes,
        full_check=config.check_cache,
    )
    if not is_main():
        # What is left takes seconds.
        return
    entropies, document_starts = training_sample(cache, len(train))
    distribution = entropy_distribution(entropies)
    print_distribution(distribution, entropies, document_starts)

    patch_config = config.patch_config()
    if config.method == "bpe":
        documents = (corpus.document(number) for number in train[:BPE_DOCUMENTS])
        train_tokenizer(documents, config.bpe_vocab_size, patch_config.tokenizer_path)
    if config.entropy_threshold is None:
        target = DEFAULT_PATCH_SIZE if config.target_patch_size is None else config.target_patch_size
        patch_config = calibrate(patch_config, target, entropies, document_starts)
    patcher = EntropyPatcher(model, patch_config, precision=precision)
    began = time.perf_counter()
    sizes, n_documents = sizes_of_patches(patcher, corpus, train, cache)
    seconds = time.perf_counter() - began
    statistics = patch_statistics(sizes, entropies)
    total_bytes = sum(size * count for size, count in sizes.items())
    print(
        f"patches: {patch_config.describe()}: {statistics['total_patches']:,} patches of {total_bytes:,} bytes, "
        f"{statistics['avg_patch_size']:.2f} bytes a patch "
        f"(from {statistics['min_patch_size']} to {statistics['max_patch_size']}) in {seconds:.2f} s"
    )
    warn_about_sizes(statistics["total_patches"], total_bytes, n_documents, patch_config)
    facts = {
        "entropy_model_path": config.entropy_model_path,
        "entropy_model_sha256": record.weights_sha256,
        "corpus_sha256": corpus.hash,
        "dataset": config.dataset,
        "precision": precision,
        "statistics": statistics,
        "entropy_distribution": distribution,
    }
    write_patches(Path(config.cache_dir) / "patches.json", asdict(patch_config), facts)
    drawn = draw_pictures(config, corpus, validation, patcher, sizes)
    print(f"wrote {config.cache_dir}/patches.json, {', '.join(drawn)}")
    if not patch_config.rule.is_causal:
        print(f"note: {config.method} patches look ahead: they are for comparison, and no model can be trained on them")
        return
    # Paths that differ from what the next script takes by itself.
    named = {}
    if config.entropy_model_path != "entropy_model.pth":
        named["entropy_model_path"] = config.entropy_model_path
    if config.cache_dir != "patch_cache":
        named["patch_cache"] = config.cache_dir
    print("next: " + next_command("llm.py", config, **named))


def draw_pictures(config, corpus, validation, patcher, sizes):
    """Draw entropy.png (the paper's Figure 4), patch_sizes.png and patches.html in the cache folder; their names."""
    # matplotlib takes half a second to import, for which --help should not wait.
    from blt import pictures

    folder = Path(config.cache_dir)
    title = patcher.config.describe()
    if config.picture_text is not None:
        text = pictures.whole_characters(argument_bytes(config.picture_text), pictures.MAX_PAGE_BYTES)
    else:
        beginnings = [pictures.whole_characters(corpus.document(number)[:4001], 4000) for number in validation[:8]]
        text = b"\n\n".join(beginnings)
    entropies, predictions = stream_predictions(patcher.entropy_model, text, precision=patcher.precision)
    is_start = patcher.starts(text, entropies)[:-1]
    sentence = pictures.whole_characters(text, 240)
    n = len(sentence)
    pictures.draw_entropy_figure(
        folder / "entropy.png", sentence, entropies[:n], is_start[:n], patcher.config.entropy_level(), title
    )
    pictures.draw_patch_size_histogram(folder / "patch_sizes.png", sizes, title)
    if patcher.config.method not in dict(pictures.page_methods(pictures.PAGE.read_text(encoding="utf-8"))):
        # A method that a user has registered in a script has no form in the page's language.
        print(
            f"note: no patches.html, because patch_page.html has no function for the method {patcher.config.method!r}"
        )
        return ["entropy.png", "patch_sizes.png"]
    pictures.write_patch_page(
        folder / "patches.html",
        text,
        entropies[:-1],
        patcher.config.arguments(),
        {"entropy model": predictions},
        title="Patches",
        subtitle=title,
        figures=[("entropy model, bits a byte", f"{predictions.bits_per_byte:.3f}")],
        token_starts=is_start if patcher.tokenizer is not None else None,
    )
    return ["entropy.png", "patch_sizes.png", "patches.html"]


if __name__ == "__main__":
    run_script(main, CreatePatchesConfig, __doc__)
