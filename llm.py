"""Train a small Byte Latent Transformer on the patches of create_patches.py.

Reads   a corpus, entropy_model.pth (python entropy_llm.py), patch_cache/ (python create_patches.py)
Writes  checkpoints/: best.pt (weights), model.json (config, patch rule, result), last.pt, metrics.jsonl, curves.png
Run     python llm.py [--preset [tiny | small | medium] [cpu | colab_t4 | rtx4090 | h200]] [--field value ...]

The settings below are the medium model. What they do not name has the values of BLTConfig (blt_model.py), TrainingConfig
(train_blt.py) and RunConfig (training.py); --help shows all of them.
"""

from dataclasses import dataclass

from blt.config import run_script
from train_blt import MACHINES, BLTRunConfig, run


@dataclass
class LLMConfig(BLTRunConfig):
    # latent transformer: runs once a patch
    global_dim: int = 512  # width
    global_layers: int = 8  # layers over patches
    # local encoder and decoder: run once a byte
    encoder_dim: int = 256  # width of the byte states
    encoder_layers: int = 1  # windowed transformer layers before the pooling
    decoder_dim: int = 256  # width
    decoder_layers: int = 3  # windowed transformer layers after the latent transformer
    window: int = 256  # bytes that a byte attends to in the local layers, itself included
    hash_rows: int = 16384  # rows of each n-gram size's table
    # run
    row_bytes: int = 4096  # ids in a row: what a model sees at once in training and evaluation
    batch_rows: int = 16  # rows in one forward and backward pass
    steps: int = 3000  # updates


PRESETS = {
    "tiny": dict(global_dim=256, global_layers=4, encoder_dim=128, decoder_dim=128, decoder_layers=2),
    "small": dict(global_dim=384, global_layers=6, encoder_dim=192, decoder_dim=192),
    "medium": dict(),
    **MACHINES,  # cpu, colab_t4, rtx4090, h200
}


if __name__ == "__main__":
    run_script(run, LLMConfig, __doc__, PRESETS)
