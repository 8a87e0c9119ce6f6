"""Show how a text is cut into patches: a picture to share, and a page in which the rule and its threshold can be moved.

Reads   a text (--text, --file, or standard input) and entropy_model.pth; with --model also a trained BLT
Writes  in pictures/: patches.html (one file that opens anywhere, without network) and patches.png
Run     python show_patches.py --text "Hello, patches." | --file book.txt [--model checkpoints] [--field value ...]

The page shows the entropy of each byte, what the models expected there, and applies every patching rule itself. With --model the
text is cut by that model's rule, and what the BLT expected is shown beside the entropy model. On 2 CPU cores with the
cpu preset's models 100 kB of text take 18 s with --model.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from blt.checks import check, check_positive
from blt.config import run_script
from blt.device import autocast, choose_device, choose_precision
from blt.entropies import TopPredictions, stream_predictions
from blt.patch_rules import DEFAULT_PATCH_SIZE, PatchConfig, threshold_for_patch_size
from blt.pictures import MAX_FIGURE_BYTES, MAX_PAGE_BYTES, draw_entropy_figure, whole_characters, write_patch_page
from blt.rows import evaluation_batches
from entropy_patcher import EntropyPatcher
from save_entropy_model import load_blt, load_entropy_model


@dataclass
class ShowPatchesConfig:
    # text
    text: str | None = None  # the text to show
    file: str | None = None  # or a file with it, any bytes; neither: standard input
    # models
    entropy_model_path: str | None = (
        None  # trained entropy model; None: entropy_model.pth, or the one that --model was trained with
    )
    model: str | None = (
        None  # output folder of llm.py or train_blt.py: its rule cuts the text, and what it expected is shown too
    )
    context_bytes: int = 2048  # bytes that the BLT sees at once, in windows half of that apart
    top_k: int = 5  # likeliest bytes to show at each place
    # patches, without --model
    method: Literal["global", "monotonic", "both", "static", "space", "cumulative"] | None = (
        None  # the rule; None: the model's, else global
    )
    target_patch_size: float | None = (
        None  # find the threshold that gives so many bytes a patch of this text (4.5 if no threshold is given)
    )
    entropy_threshold: float | None = None  # or the threshold itself: nats; bytes for static
    monotonic_threshold: float = 0.0  # nats; both: the rise of entropy that a start also needs
    min_patch_size: int = 1  # bytes; a start that comes earlier is suppressed
    max_patch_size: int | None = None  # bytes; after so many a patch is closed; None: no limit
    # output
    output: str = "pictures"  # folder
    title: str | None = None  # heading of both; None: the file's name
    picture_bytes: int = 384  # the picture shows the first so many bytes, 4000 at most
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "bf16", "fp16", "fp32"] = (
        "auto"  # of the entropy model without --model; a BLT keeps that of its training
    )

    def __post_init__(self):
        check_positive(self, "target_patch_size", "picture_bytes")
        check(self, "picture_bytes", self.picture_bytes <= MAX_FIGURE_BYTES, f"at most {MAX_FIGURE_BYTES}")
        check(self, "top_k", 1 <= self.top_k <= 16, "from 1 to 16")
        check(self, "context_bytes", self.context_bytes >= 2, "2 or more")
        if self.text is not None and self.file is not None:
            raise ValueError("give either text or file, not both")
        if self.target_patch_size is not None and self.entropy_threshold is not None:
            raise ValueError("give either target_patch_size or entropy_threshold, not both: one follows from the other")
        names = (
            "method",
            "target_patch_size",
            "entropy_threshold",
            "monotonic_threshold",
            "min_patch_size",
            "max_patch_size",
        )
        changed = [name for name in names if getattr(self, name) != getattr(type(self), name)]
        if self.model and changed:
            raise ValueError(
                f"leave out {' and '.join(changed)}: a BLT reads the patches that it was trained with; other rules can be tried in the page"
            )
        self.patch_config(self.entropy_threshold or 1.0)  # its checks, before any work is done

    def patch_config(self, threshold):
        """The rule as a `PatchConfig`."""
        return PatchConfig(
            self.method or "global", threshold, self.monotonic_threshold, self.min_patch_size, self.max_patch_size
        )


def read_text(config):
    """The bytes to show, from --text, --file or standard input."""
    if config.text is not None:
        text = config.text.encode("utf-8", "surrogateescape")
    elif config.file is not None:
        text = Path(config.file).read_bytes()
    elif sys.stdin.isatty():
        raise ValueError('no text; give --text "Some words" or --file book.txt, or pipe a text in')
    else:
        text = sys.stdin.buffer.read()
    if not text:
        raise ValueError(f"{config.file or 'the text'} is empty: nothing to show")
    return text


@torch.no_grad()
def blt_predictions(model, starts, document, k=5, context_bytes=2048, precision="fp32", progress=None):
    """What a BLT expected at each byte of a document: `TopPredictions`, from windows as in evaluation (rows.evaluation_batches).

    starts: bool [N + 1], the document's patches. Short documents are read whole.
    """
    device, pieces, done = next(model.parameters()).device, [], 0
    row_bytes = min(context_bytes, len(document) + 1)
    for batch in evaluation_batches([document], [starts], row_bytes, batch_rows=2):
        batch = batch.to(device)
        with autocast(device, precision):
            logits_BTV = model(batch.ids[:, :-1], batch.patch_lengths)
        logits_NV = logits_BTV[batch.is_scored]  # the windows follow each other: each byte once, in order, then the end
        pieces.append(TopPredictions.of_logits(logits_NV, document[done : done + len(logits_NV)], k))
        done += len(pieces[-1].of_byte_N)
        if progress is not None:
            progress.update(len(pieces[-1].of_byte_N))
    return TopPredictions.joined(pieces)


def describe(rule):
    """A rule in words: "global, threshold 1.335 nats, at most 16 bytes"."""
    unit = {"static": "bytes", "space": None, "bpe": None}.get(rule.method, "nats")
    words = [rule.method] + ([f"threshold {rule.entropy_threshold:.3f} {unit}"] if unit else [])
    words += [f"rise {rule.monotonic_threshold:.3f} nats"] * (rule.method == "both")
    words += [f"at least {rule.min_patch_size} bytes"] * (rule.min_patch_size > 1)
    return ", ".join(words + ([f"at most {rule.max_patch_size} bytes"] if rule.max_patch_size else []))


def main(config):
    device = choose_device(config.device)
    whole = read_text(config)
    text = whole_characters(whole, MAX_PAGE_BYTES)
    document = np.frombuffer(text, dtype=np.uint8)
    if len(text) < len(whole):
        print(f"note: the page shows the first {len(text):,} of {len(whole):,} bytes")

    blt, precision = None, choose_precision(config.precision, device)
    if config.model is not None:
        blt, patcher, _ = load_blt(config.model, device)
        entropy_model, precision = patcher.entropy_model, patcher.precision
        if entropy_model is not None and config.entropy_model_path is not None:
            raise ValueError(
                "leave out entropy_model_path: the BLT's patches come from the entropy model that it was trained with"
            )
    if blt is None or entropy_model is None:
        entropy_model, _ = load_entropy_model(config.entropy_model_path or "entropy_model.pth", device)
    with tqdm(total=len(text), unit="B", unit_scale=True, desc="entropies", disable=None) as progress:
        H, predictions = stream_predictions(entropy_model, document, config.top_k, precision, progress)
    if blt is None:
        threshold = config.entropy_threshold
        if threshold is None and config.method != "space":
            options = {
                name: value
                for name, value in config.patch_config(1.0).rule.items()
                if name not in ("method", "threshold")
            }
            threshold = threshold_for_patch_size(
                H, config.method or "global", config.target_patch_size or DEFAULT_PATCH_SIZE, **options
            )
        patcher = EntropyPatcher(
            entropy_model, config.patch_config(1.0 if threshold is None else threshold), precision=precision
        )
    expected, starts, rule = {"entropy model": predictions}, patcher.starts(document, H), patcher.config
    if blt is not None:
        with tqdm(total=len(text), unit="B", unit_scale=True, desc="BLT", disable=None) as progress:
            expected["BLT"] = blt_predictions(
                blt, starts, document, config.top_k, config.context_bytes, precision, progress
            )

    folder, starts, H = Path(config.output), starts[:-1], H[:-1]
    title = config.title or (Path(config.file).name if config.file else "Patches")
    costs = [(f"{name}, bits a byte", f"{prediction.bits_per_byte:.3f}") for name, prediction in expected.items()]
    subtitle = describe(rule) + (
        "; the BLT's expectations belong to this rule and stay as they are" if blt is not None else ""
    )
    page = write_patch_page(folder / "patches.html", text, H, rule.rule, expected, title, subtitle, costs)
    sentence = whole_characters(text, config.picture_bytes)
    n = len(sentence)
    threshold = rule.entropy_threshold if rule.method in ("global", "both") else None
    picture = draw_entropy_figure(
        folder / "patches.png", sentence, H[:n], starts[:n], threshold, f"{title}: {describe(rule)}"
    )

    print(
        f"{len(text):,} bytes, {starts.sum():,} patches, {len(text) / starts.sum():.2f} bytes a patch ({describe(rule)})"
    )
    print(
        f"entropy: mean {H.mean(dtype=np.float64):.3f} nats | "
        + " | ".join(f"{name} {cost}" for name, cost in costs)
        + " (end of text not counted)"
    )
    print(f"wrote {page} ({page.stat().st_size / 1e6:.2f} MB)")
    print(f"wrote {picture} ({picture.stat().st_size / 1e3:.0f} kB, the first {n:,} bytes)")


if __name__ == "__main__":
    run_script(main, ShowPatchesConfig, __doc__)
