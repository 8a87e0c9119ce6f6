"""Continue a text, byte by byte, with a trained BLT.

Reads   an output folder of llm.py or train_blt.py, and the entropy model it was trained with
Run     python generate.py --model checkpoints --prompt "The history of" [--max_new_bytes 200] [--temperature 0.7]
Prints  the prompt and its continuation. Every byte is a full pass over the last context_bytes bytes.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch

from data import BOUNDARY
from entropy_patcher import to_bytes
from rows import make_batch
from training import autocast, check, check_positive, choose_device, choose_precision, run_script


@dataclass
class GenerateConfig:
    model: str = "checkpoints"  # output folder of llm.py or train_blt.py
    prompt: str = ""  # text to continue; empty: a new document
    max_new_bytes: int = 200  # bytes to add, fewer if the model ends the document
    temperature: float = 0.7  # 0: always the likeliest byte
    top_p: float = 1.0  # keep the likeliest bytes that together have this probability
    context_bytes: int = 2048  # bytes that the model sees
    seed: int = 1337  # of the sampling
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps

    def __post_init__(self):
        check_positive(self, "max_new_bytes")
        check_sampling(self)


def check_sampling(config):
    """Raise ValueError unless temperature, top_p and context_bytes make sense."""
    check(config, "temperature", config.temperature >= 0, "0 or more")
    check(config, "top_p", 0 < config.top_p <= 1, "above 0 and at most 1")
    check(config, "context_bytes", config.context_bytes >= 2, "2 or more")


@torch.no_grad()
def generate(model, patcher, prompt, max_new_bytes, temperature=0.0, top_p=1.0, context_bytes=2048, seed=0, precision="fp32"):
    """Continue a prompt by up to max_new_bytes bytes, until the model ends the document. Returns the new bytes.

    temperature 0 takes the likeliest byte; otherwise probabilities ** (1 / temperature) are drawn from, among the likeliest
    bytes that together reach top_p. Patches are made by the patcher from what stands before, as in training.
    """
    if not patcher.is_causal:
        raise ValueError(f"patch method {patcher.config.method!r} looks ahead and cannot generate")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    text = bytearray(to_bytes(prompt).tobytes())
    length = len(text)
    while len(text) < length + max_new_bytes:
        with autocast(device, precision):
            logits_V = _next_logits(model, patcher, text, context_bytes, device)
        choice = _choose(logits_V, temperature, top_p, generator)
        if choice == BOUNDARY:
            break
        text.append(choice)
    model.train(was_training)
    return bytes(text[length:])


def _next_logits(model, patcher, text, context_bytes, device):
    """Logits [257] of what follows the text: one row of its last context_bytes ids, patched as the whole text is."""
    document = np.frombuffer(bytes(text), dtype=np.uint8)
    ids = np.concatenate(([BOUNDARY], document, [BOUNDARY]))  # the last id is a target, of which nothing is read
    is_start = np.concatenate(([True], patcher.starts(document)))
    begin = max(0, len(document) + 1 - context_bytes)
    ids, is_start = ids[begin:], is_start[begin:].copy()
    is_start[:2] = True
    batch = make_batch([(ids, is_start, np.ones(len(ids) - 1, dtype=bool))], len(ids) - 1).to(device)
    return model(batch.ids[:, :-1], batch.patch_lengths)[0, -1].float().cpu()


def _choose(logits_V, temperature, top_p, generator):
    """The id to go on with."""
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities, order = (logits_V / temperature).softmax(-1).sort(descending=True)
    probabilities[probabilities.cumsum(0) - probabilities >= top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def main(config):
    # Imported here, because train_blt prints a continuation with this module.
    from train_blt import load_blt

    device = choose_device(config.device)
    model, patcher, _ = load_blt(config.model, device)
    new = generate(
        model, patcher, config.prompt.encode("utf-8", "surrogateescape"), config.max_new_bytes, config.temperature, config.top_p,
        config.context_bytes, config.seed, choose_precision("auto", device),
    )  # fmt: skip
    sys.stdout.write(config.prompt)
    sys.stdout.flush()
    sys.stdout.buffer.write(new + b"\n")


if __name__ == "__main__":
    run_script(main, GenerateConfig, __doc__)
