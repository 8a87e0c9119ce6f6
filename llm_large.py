"""Train a large Byte Latent Transformer: llm.py's training with a 300M-class model for a card of 24 GB or more.

Reads   a corpus, entropy_model.pth (python entropy_llm.py), patch_cache/ (python create_patches.py)
Writes  checkpoints_large/: best.pt, model.json, last.pt, metrics.jsonl, curves.png
Run     python llm_large.py --dataset HuggingFaceTB/smollm-corpus:cosmopedia-v2 --corpus_bytes 4000000000
        [--preset colab_t4 | rtx4090 | h200 | cpu] [--field value ...]

The preset cpu is a few steps of a shrunken model: it shows that the script works, not how good the model is.
"""

from dataclasses import dataclass

from blt.config import run_script
from train_blt import BLTRunConfig, run


@dataclass
class LLMLargeConfig(BLTRunConfig):
    # latent transformer: runs once a patch
    global_dim: int = 1024  # width
    global_layers: int = 20  # layers over patches
    # local encoder and decoder: run once a byte
    encoder_dim: int = 512  # width of the byte states
    encoder_layers: int = 1  # windowed transformer layers before the pooling
    decoder_dim: int = 512  # width
    decoder_layers: int = 5  # windowed transformer layers after the latent transformer
    window: int = 512  # bytes that a byte attends to in the local layers, itself included
    hash_rows: int = 8192  # rows of each n-gram size's table
    # run
    row_bytes: int = 8192  # ids in a row: what a model sees at once in training and evaluation
    batch_rows: int = 2  # rows in one forward and backward pass
    accumulate: int = 16  # passes whose gradients are summed into one update
    steps: int = 10000  # updates
    lr: float = 0.003  # peak learning rate of the matrices (Muon, scaled to the RMS of an AdamW update)
    adam_lr: float = 0.001  # peak learning rate of embeddings, output head and norms (AdamW)
    output: str = "checkpoints_large"  # folder for weights, metrics and curves


PRESETS = {
    "cpu": dict(
        global_dim=256, global_layers=2, encoder_dim=128, decoder_dim=128, decoder_layers=1, window=64, hash_rows=1024,
        max_bytes=1_000_000, val_bytes=50_000, row_bytes=1024, batch_rows=4, accumulate=1, steps=20, eval_every=10,
    ),
    "colab_t4": dict(row_bytes=4096, batch_rows=1, accumulate=32),
    "rtx4090": dict(),
    "h200": dict(batch_rows=16, accumulate=2),
}  # fmt: skip


if __name__ == "__main__":
    run_script(run, LLMLargeConfig, __doc__, PRESETS)
