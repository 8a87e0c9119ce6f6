"""Compute the entropies of a corpus once, choose how to cut it into patches, and show what the patches look like.

Reads   a corpus and entropy_model.pth (python entropy_llm.py makes it)
Writes  patch_cache/entropies-*/ (float16, one number a byte, one a document's end), patch_cache/patches.json (the rule that training will use),
        and in patch_cache/: entropy.png, patch_sizes.png, patches.html
Run     python create_patches.py [--preset cpu] [--method global --target_patch_size 4.5] [--field value ...]
Next    python llm.py

Another method, threshold or patch size is a pass over the file of entropies: run it again, the model does not.
"""

import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from entropy_patcher import (
    NEEDS_ENTROPIES,
    EntropyPatcher,
    PatchConfig,
    bpe_starts,
    entropy_distribution,
    patch_sizes,
    patch_starts,
    patch_statistics,
    stream_entropies,
    stream_guesses,
    threshold_for_patch_size,
    train_tokenizer,
)
from rows import BitArray, DocumentStream
from save_entropy_model import load_entropy_model
from training import DataConfig, check, check_positive, choose_device, choose_precision, print_header, run_script, write_json


@dataclass
class CreatePatchesConfig(DataConfig):
    # entropies
    entropy_model_path: str = "entropy_model.pth"  # the trained entropy model
    lanes: int = 4  # places of the text read side by side; more on a GPU (the presets)
    chunk_bytes: int = 1024  # bytes of each read at once
    # patches
    method: Literal["global", "monotonic", "both", "static", "space", "cumulative", "bpe"] = "global"  # the rule
    target_patch_size: float | None = None  # find the threshold that gives so many bytes a patch (4.5 if no threshold is given)
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
        check_positive(self, "lanes", "chunk_bytes", "bpe_vocab_size")
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


DEFAULT_PATCH_SIZE = 4.5  # bytes a patch where neither a threshold nor a size is given: about that of the released models

PRESETS = {
    "cpu": dict(max_bytes=2_200_000, val_bytes=200_000),
    "colab_t4": dict(lanes=64, chunk_bytes=2048),
    "rtx4090": dict(lanes=256, chunk_bytes=2048),
    "h200": dict(lanes=512, chunk_bytes=2048),
}


# ---------------------------------------------------------------------------------------------------------------------
# The cache


class EntropyCache:
    """Entropies of a corpus's documents on disk: N + 1 float16 numbers a document, in nats (its bytes and its end).

    manifest: what made them (corpus and entropy model by hash, precision, dtype) and which documents they cover.
    train, validation: document numbers covered.
    """

    def __init__(self, folder, corpus):
        self.folder = Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        self.train, self.validation = (np.load(self.folder / f"{name}.npy") for name in ("train", "validation"))
        self.numbers = np.concatenate((self.train, self.validation))
        self.lengths = np.diff(corpus.offsets)[self.numbers] + 1
        self.ends = np.cumsum(self.lengths)
        self.entropies = np.memmap(self.folder / "entropies.f16", dtype=np.float16, mode="r")
        if len(self.entropies) != self.ends[-1]:
            raise ValueError(f"{self.folder} is damaged: {len(self.entropies):,} entropies, not {self.ends[-1]:,}; delete it and run: python create_patches.py")

    def covers(self, train, validation):
        """Whether the first documents in here are these."""
        return all(
            len(asked) <= len(held) and np.array_equal(held[: len(asked)], asked)
            for asked, held in ((train, self.train), (validation, self.validation))
        )

    def document(self, place):
        """Entropies [N + 1] of the document at this place of `numbers`, float32."""
        end = int(self.ends[place])
        return self.entropies[end - int(self.lengths[place]) : end].astype(np.float32)

    def of_training(self, count, block=1 << 22):
        """Entropies of the first `count` training documents in blocks of whole documents: yields (first, last + 1, float32)."""
        first = 0
        while first < count:
            begin = int(self.ends[first - 1]) if first else 0
            last = min(count, max(first + 1, int(np.searchsorted(self.ends, begin + block, side="right"))))
            yield first, last, self.entropies[begin : int(self.ends[last - 1])].astype(np.float32)
            first = last


def cache_folder(cache_dir, corpus, model_record):
    """Where the entropies of this corpus by this model lie."""
    return Path(cache_dir) / f"entropies-{corpus.hash[:8]}-{model_record['sha256'][:8]}"


def open_entropies(cache_dir, corpus, model_record, entropy_model_path):
    """Open the cached entropies of this corpus by this model. Raises FileNotFoundError saying what is there and what to run."""
    folder = cache_folder(cache_dir, corpus, model_record)
    if folder.exists():
        cache = EntropyCache(folder, corpus)
        made_by = (cache.manifest["corpus_sha256"], cache.manifest["entropy_model_sha256"])
        if made_by == (corpus.hash, model_record["sha256"]):
            return cache
    others = sorted(Path(cache_dir).glob("entropies-*"))
    found = []
    for other in others:
        manifest = json.loads((other / "manifest.json").read_text())
        what = "another corpus" if manifest["corpus_sha256"] != corpus.hash else "another entropy model"
        found.append(f"{other.name} is of {what}")
    raise FileNotFoundError(
        f"{cache_dir} holds no entropies of dataset {corpus.manifest['dataset']!r} by {entropy_model_path}"
        f"{' (' + '; '.join(found) + ')' if found else ''}; run: python create_patches.py --dataset {corpus.manifest['dataset']} "
        f"--entropy_model_path {entropy_model_path} --cache_dir {cache_dir}"
    )


def make_entropies(cache_dir, corpus, model, model_record, train, validation, precision, lanes=4, chunk_bytes=1024):
    """Compute and store the entropies of these documents, or open them if they are there already."""
    folder = cache_folder(cache_dir, corpus, model_record)
    if folder.exists():
        cache = EntropyCache(folder, corpus)
        if cache.covers(train, validation) and cache.manifest["precision"] == precision:
            print(f"entropies: {folder} is there already ({len(cache.entropies):,} numbers)")
            return cache
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name, suffix=".tmp"))
    try:
        aside.chmod(0o755)
        numbers = np.concatenate((train, validation))
        stream = DocumentStream.of_corpus(corpus, numbers)
        out = np.memmap(aside / "entropies.f16", dtype=np.float16, mode="w+", shape=(len(stream) - 1,))
        began = time.perf_counter()
        with tqdm(total=len(out), unit="B", unit_scale=True, desc="entropies", disable=None) as progress:
            stream_entropies(model, stream, lanes, chunk_bytes, precision, progress, out)
        seconds = time.perf_counter() - began
        out.flush()
        np.save(aside / "train.npy", train)
        np.save(aside / "validation.npy", validation)
        write_json(aside / "manifest.json", {
            "corpus_sha256": corpus.hash, "dataset": corpus.manifest["dataset"],
            "entropy_model_sha256": model_record["sha256"], "precision": precision, "dtype": "float16",
            "documents": len(numbers), "train_documents": len(train), "numbers": len(out), "unit": "nats",
            "layout": "for each document: one number for each byte, about that byte, then one for the document's end",
        })  # fmt: skip
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    print(f"entropies: {len(out):,} numbers in {seconds:.1f} s ({len(out) / seconds / 1e3:.0f} kB/s) -> {folder}")
    return EntropyCache(folder, corpus)


def training_starts(corpus, train, patch_config, cache=None):
    """Patch starts of the training stream (`DocumentStream` of these documents), as a `BitArray`: one vectorised pass.

    Place 0 is the first boundary; then each document has its bytes' places and its end's. cache: for methods that need it.
    """
    needs = patch_config.method in NEEDS_ENTROPIES
    lengths = np.diff(corpus.offsets)[train] + 1
    stream = DocumentStream.of_corpus(corpus, train)
    starts = BitArray()
    starts.append(np.ones(1, dtype=bool))
    for first, last, H in cache.of_training(len(train)) if needs else _document_blocks(lengths):
        ends = np.cumsum(lengths[first:last])
        document_starts = np.zeros(ends[-1], dtype=bool)
        document_starts[ends - lengths[first:last]] = True
        byte_values = None
        if not needs:
            before = 1 + (int(stream.ends[first - 1]) if first else 0)
            byte_values = stream.ids(before, before + len(document_starts)).astype(np.uint8)  # an end's place: any byte
        starts.append(patch_starts(H, **patch_config.rule, byte_values=byte_values, document_starts=document_starts))
    starts.close()
    return starts


def _document_blocks(lengths, block=1 << 22):
    """Blocks of whole documents of about `block` places: yields (first, last + 1, None)."""
    ends, first = np.cumsum(lengths), 0
    while first < len(lengths):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + block, side="right")))
        yield first, last, None
        first = last


# ---------------------------------------------------------------------------------------------------------------------
# The script


def calibrate(patch_config, target_patch_size, sample):
    """The same rule with the threshold that gives this patch size on a sample of entropies with their document starts.

    space and bpe have no threshold and stay as they are.
    """
    if patch_config.method in ("space", "bpe"):
        return patch_config
    H, document_starts = sample
    rule = {name: value for name, value in patch_config.rule.items() if name not in ("method", "threshold")}
    threshold = threshold_for_patch_size(H, patch_config.method, target_patch_size, document_starts, **rule)
    return replace(patch_config, entropy_threshold=threshold)


def training_sample(cache, places=2_000_000):
    """Entropies of the first training documents, about so many, with the flags of where documents begin."""
    lengths = cache.lengths[: len(cache.train)]
    count = int(np.searchsorted(np.cumsum(lengths), places)) + 1
    _, last, H = next(cache.of_training(min(count, len(lengths)), block=max(places, int(lengths[0]))))
    document_starts = np.zeros(len(H), dtype=bool)
    document_starts[np.cumsum(lengths[:last]) - lengths[:last]] = True
    return H, document_starts


def warn_about_sizes(patches, total_bytes, documents, threshold):
    """Say so when a rule cuts at every byte or nowhere: both waste the latent transformer."""
    size = total_bytes / max(1, patches)
    advice = f"the threshold ({threshold:.3f}) or use --target_patch_size {DEFAULT_PATCH_SIZE}"
    if size < 1.1:
        print(f"warning: {size:.2f} bytes a patch: nearly every byte is a patch of its own; raise {advice}")
    if patches <= 1.1 * documents:
        print(f"warning: {patches:,} patches in {documents:,} documents: nearly a whole document is one patch; lower {advice}")


def main(config):
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    print_header(config, device, precision)
    corpus = config.corpus()
    model, record = load_entropy_model(config.entropy_model_path, device)
    train = corpus.documents("train", config.max_bytes)
    validation = corpus.documents("validation", config.val_bytes)
    cache = make_entropies(
        config.cache_dir, corpus, model, record, train, validation, precision, config.lanes, config.chunk_bytes
    )

    sample = training_sample(cache)
    distribution = entropy_distribution(sample[0])
    print(f"entropy: mean {distribution['mean']:.3f}, std {distribution['std']:.3f}, from {distribution['min']:.3f} to {distribution['max']:.3f} nats")
    print("percentiles (nats): " + ", ".join(f"{level}% {value:.3f}" for level, value in distribution["percentiles"].items()))
    for method in ("global", "monotonic"):
        suggestions = [(size, threshold_for_patch_size(sample[0], method, size, sample[1])) for size in (3, 4.5, 6, 8)]
        print(f"thresholds for {method}: " + ", ".join(f"{size} bytes a patch {value:.3f}" for size, value in suggestions))

    if config.method == "bpe":
        train_tokenizer((corpus.document(n) for n in train[:2000]), config.bpe_vocab_size, Path(config.cache_dir) / "tokenizer.json")
    patch_config = config.patch_config(config.entropy_threshold or 1.0)
    if config.entropy_threshold is None:
        patch_config = calibrate(patch_config, config.target_patch_size or DEFAULT_PATCH_SIZE, sample)
    threshold = patch_config.entropy_threshold
    patcher = EntropyPatcher(model, patch_config, precision=precision)
    began = time.perf_counter()
    if config.method == "bpe":
        sizes = np.concatenate([patch_sizes(bpe_starts(patcher.tokenizer, corpus.document(n))[:-1]) for n in train[:2000]])
        documents = min(len(train), 2000)
    else:
        sizes, documents = training_patch_sizes(training_starts(corpus, train, patch_config, cache), corpus, train), len(train)
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


def training_patch_sizes(starts, corpus, train):
    """Sizes in bytes of the training documents' patches, int64 [P]; boundaries do not count as bytes."""
    lengths = np.diff(corpus.offsets)[train]
    ends = np.cumsum(lengths + 1)  # place of each document's end in the stream
    sizes, rest, block = [], np.empty(0, np.int64), 1 << 24
    for begin in range(1, len(starts), block):
        flags = starts.read(begin, min(begin + block, len(starts)))
        inside = ends[np.searchsorted(ends, begin) : np.searchsorted(ends, begin + len(flags))] - begin
        flags[inside] = True  # cut where documents end, and leave the end's own place out below
        places = np.flatnonzero(flags) + begin
        places = np.concatenate((rest, places))
        is_end = np.zeros(len(places), dtype=bool)
        is_end[np.searchsorted(places, inside + begin)] = True
        sizes.append(np.diff(places)[~is_end[:-1]])
        rest = places[-1:]
    return np.concatenate(sizes)


def draw_pictures(config, corpus, validation, patcher, sizes):
    """entropy.png (the paper's Figure 4), patch_sizes.png and patches.html in the cache folder."""
    from pictures import MAX_PAGE_BYTES, draw_entropy_figure, draw_patch_size_histogram, whole_characters, write_patch_page

    folder, rule = Path(config.cache_dir), patcher.config
    threshold = rule.entropy_threshold if rule.method in ("global", "both") else None
    title = f"{rule.method} patches" + (f", threshold {rule.entropy_threshold:.3f}" if rule.method not in ("space", "bpe") else "")
    if config.picture_text:
        text = whole_characters(config.picture_text.encode("utf-8", "surrogateescape"), MAX_PAGE_BYTES)
    else:
        text = b"\n\n".join(whole_characters(corpus.document(number)[:4001], 4000) for number in validation[:8])
    H, guesses = stream_guesses(patcher.entropy_model, text, precision=patcher.precision)
    starts, sentence = patcher.starts(text, H)[:-1], whole_characters(text, 240)
    draw_entropy_figure(folder / "entropy.png", sentence, H[: len(sentence)], starts[: len(sentence)], threshold, title)
    draw_patch_size_histogram(folder / "patch_sizes.png", sizes, title)
    figures = [("entropy model, bits a byte", f"{guesses.bits_per_byte:.3f}")]
    token_starts = starts if rule.method == "bpe" else None
    write_patch_page(folder / "patches.html", text, H[:-1], rule.rule, {"entropy model": guesses}, "Patches", title, figures, token_starts)


if __name__ == "__main__":
    run_script(main, CreatePatchesConfig, __doc__, PRESETS)
