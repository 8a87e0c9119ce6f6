"""The one-command pipeline from an entropy model to a trained BLT: llm.py, with the patches made on the way.

Reads   a corpus, entropy_model.pth (python entropy_llm.py makes it), patch_cache/ (made here if it is missing)
Writes  checkpoints/: best.pt (weights), model.json (what made it), last.pt, metrics.jsonl, curves.png
Run     python train_blt.py --entropy_model_path entropy_model.pth [--quick_demo] [--preset ...] [--field value ...]

Settings, sizes and machines are those of llm.py. As a library this module offers `train_blt`,
`PatchedDataset` and `TrainingConfig`; they are written in blt/training.py.
"""

from dataclasses import dataclass

from blt.config import run_script
from blt.training import PatchedDataset, TrainingConfig, train_blt
from llm import LLMConfig, run

__all__ = ["PatchedDataset", "TrainingConfig", "train_blt"]


@dataclass
class TrainBLTConfig(LLMConfig):
    """Settings of llm.py, and the quick demo."""

    quick_demo: bool = False  # a small model and few steps: the preset quick_demo


def main(config):
    run(config, make_patches=True)


if __name__ == "__main__":
    run_script(main, TrainBLTConfig, __doc__)
