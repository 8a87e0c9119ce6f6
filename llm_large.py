"""Train a large Byte Latent Transformer: llm.py with its 300M-class size, for a card of 24 GB or more.

Reads   a corpus, entropy_model.pth (python entropy_llm.py), patch_cache/ (python create_patches.py)
Writes  checkpoints_large/: best.pt, model.json, last.pt, metrics.jsonl, curves.png
Run     python llm_large.py --dataset HuggingFaceTB/smollm-corpus:cosmopedia-v2 --corpus_bytes 4000000000
        [--preset MACHINE] [--field value ...]

On a CPU it trains llm.py's nano size in its place: that shows that the script works, not how good
the model is.
"""

from dataclasses import dataclass, replace

from blt.config import run_script
from llm import LLMConfig, run


@dataclass
class LLMLargeConfig(LLMConfig):
    """Settings of llm.py with another size. Its numbers are SIZES["large"] and PAIRS in llm.py."""

    output: str = "checkpoints_large"  # folder for weights, metrics and curves

    PRESETS = replace(LLMConfig.PRESETS, default_size="large")


if __name__ == "__main__":
    run_script(run, LLMLargeConfig, __doc__)
