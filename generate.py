"""Continue texts, byte by byte, with a trained BLT.

Reads   an output folder of llm.py or train_blt.py, and the entropy model it was trained with
Run     python generate.py --model checkpoints --prompt "The history of" [--max_new_bytes 200] [--temperature 0.7] [--draft_bytes 8]
        python generate.py --model checkpoints --interactive
Prints  the prompt and its continuation as it comes; with several prompts, one after the other. Bytes a second go to stderr.

Every byte costs the same: keys, values and patches are kept (`incremental.IncrementalBLT`). --draft_bytes proposes bytes by the entropy
model, which reads them anyway, and lets one pass of the BLT check them: the same text, sooner (BLT-S, self-speculation).
"""

import codecs
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from blt.checks import check, check_positive
from blt.config import run_script
from blt.device import autocast, choose_device, threads_for
from blt.ids import BOUNDARY, to_bytes
from blt.incremental import CHUNK, IncrementalBLT
from blt.rows import make_batch
from blt.sampling import Sampler, SamplingConfig
from entropy_patcher import EntropyPatcher


@dataclass
class GenerateConfig(SamplingConfig):
    model: str = "checkpoints"  # output folder of llm.py or train_blt.py
    prompt: list[str] = field(default_factory=lambda: [""])  # texts to continue; empty: a new document
    prompt_file: str | None = None  # a file whose bytes are the prompt
    interactive: bool = False  # continue each line of the standard input
    max_new_bytes: int = 200  # bytes to add, fewer if the model ends the document
    temperature: float = 0.7  # 0: always the likeliest byte
    draft_bytes: int = 0  # bytes that the entropy model proposes for one pass of the BLT; 0: none
    draft_confidence: float = 0.6  # probability below which a proposal is not made
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "max_new_bytes")
        check(self, "draft_bytes", 0 <= self.draft_bytes < CHUNK, f"from 0 to {CHUNK - 1}")
        check(self, "draft_confidence", 0 <= self.draft_confidence <= 1, "from 0 to 1")


def generate(
    model,
    patcher,
    prompt,
    max_new_bytes,
    *,
    precision="fp32",
    cached=True,
    draft_bytes=0,
    draft_confidence=0.6,
    **sampling,
):
    """Continue a prompt by up to max_new_bytes bytes, until the model ends the document or a stop string comes. Returns the new bytes.

    prompt: whatever `to_bytes` takes; or a list of such prompts, for a list of continuations, each as it would be alone.
    sampling: fields of `SamplingConfig`. cached=False makes every byte by a full pass: slow, with the same greedy result in fp32.
    draft_bytes: self-speculation as in `Generator`. Patches are made by the patcher from what stands before, as in training.
    """
    is_batch = isinstance(prompt, (list, tuple)) and not (prompt and isinstance(prompt[0], (int, np.integer)))
    prompts = [to_bytes(p).tobytes() for p in (prompt if is_batch else [prompt])]
    if not prompts:
        return []
    was_training = model.training
    model.eval()
    generator = Generator(
        model,
        patcher,
        prompts,
        max_new_bytes,
        SamplingConfig(**sampling),
        precision,
        cached,
        draft_bytes,
        draft_confidence,
    )
    with threads_for(len(prompts)):
        for _ in generator.steps():
            pass
    model.train(was_training)
    new = [sampler.final_bytes() for sampler in generator.samplers]
    return new if is_batch else new[0]


class Generator:
    """Continues prompts side by side. `for _ in generator.steps()` lets each row grow by a byte, or with drafts by several.

    samplers[row].final_bytes() is what row has so far. With drafts, the entropy model goes on alone for up to draft_bytes bytes, as
    long as its likeliest byte has at least draft_confidence; one pass of the BLT over all of them then says how many it would have
    chosen itself, and what comes next. drafted, accepted, passes: counts of proposals, of those kept and of the BLT's passes.
    """

    def __init__(
        self,
        model,
        patcher,
        prompts,
        max_new_bytes,
        config,
        precision="fp32",
        cached=True,
        draft_bytes=0,
        draft_confidence=0.6,
    ):
        if not patcher.is_causal:
            raise ValueError(f"patch method {patcher.config.method!r} looks ahead and cannot generate")
        reader_class = IncrementalBLT if cached else FullPass
        self.reader = reader_class(model, patcher, len(prompts), config.context_bytes, precision)
        if draft_bytes and (not cached or self.reader.entropy_model is None):
            raise ValueError(
                "drafts come from the entropy model's cached steps; use draft_bytes=0 with cached=False or static or space patches"
            )
        self.samplers = [Sampler(prompt, max_new_bytes, config, row) for row, prompt in enumerate(prompts)]
        self.prompts, self.draft_bytes, self.draft_confidence = prompts, draft_bytes, draft_confidence
        self.drafted = self.accepted = self.passes = 0

    def steps(self):
        """Yields after each pass of the BLT, until all rows are over."""
        ids = [
            np.concatenate(([BOUNDARY], np.frombuffer(prompt, np.uint8))).astype(np.int64) for prompt in self.prompts
        ]
        logits = self.reader.prefill(ids).float().cpu().numpy()
        nexts = np.array([sampler.choose(row_logits) for sampler, row_logits in zip(self.samplers, logits)])
        yield
        while not all(sampler.is_over for sampler in self.samplers):
            is_open = np.array([not sampler.is_over for sampler in self.samplers])
            nexts = self._with_drafts(nexts, is_open) if self.draft_bytes else self._one_byte(nexts, is_open)
            self.passes += 1
            yield

    def _one_byte(self, nexts, is_open):
        logits = (
            self.reader.extend(np.where(is_open, nexts, 0)[:, None], is_open.astype(np.int64))[:, 0]
            .float()
            .cpu()
            .numpy()
        )
        return np.array(
            [sampler.choose(logits[row]) if is_open[row] else 0 for row, sampler in enumerate(self.samplers)]
        )

    def _with_drafts(self, nexts, is_open):
        reader, before, rows = self.reader, self.reader.document_length, np.arange(len(nexts))
        most = np.minimum(reader.room(), 1 + self.draft_bytes)
        ids, closes, states = [np.where(is_open, nexts, 0)], [], []
        drafting, counts = is_open, np.zeros(len(nexts), np.int64)
        while drafting.any():
            close, logits = reader.find_closes(ids[-1][:, None], drafting.astype(np.int64))
            closes.append(close)
            states.append(reader.rule.copy_state())
            counts = counts + drafting
            probability, draft = logits[:, 0].float().softmax(-1).max(-1)
            drafting = drafting & (counts < most) & (probability.cpu().numpy() >= self.draft_confidence)
            ids.append(draft.cpu().numpy())
        ids, closes = np.stack(ids[: len(closes)], axis=1), np.concatenate(closes, axis=1)
        logits = reader.advance(ids, closes, counts).float().cpu().numpy()
        kept, chosen = counts.copy(), np.zeros(len(nexts), np.int64)
        for row in np.flatnonzero(is_open):
            for i in range(counts[row]):
                chosen[row] = self.samplers[row].choose(logits[row, i])
                if self.samplers[row].is_over or i + 1 == counts[row] or chosen[row] != ids[row, i + 1]:
                    kept[row] = i + 1
                    break
        reader.commit(kept)
        states = {
            name: np.stack([state[name] for state in states])[np.maximum(kept, 1) - 1, rows] for name in states[0]
        }
        reader.roll_back(before + kept, states)
        self.drafted += int((counts - is_open).sum())
        self.accepted += int((kept - is_open).sum())
        return chosen


class FullPass:
    """Stands in for `IncrementalBLT`: every step is a full pass over each row. What the cached steps are tested against."""

    entropy_model = None

    def __init__(self, model, patcher, n_rows, context_bytes, precision):
        self.model, self.context_bytes, self.precision = model, context_bytes, precision
        self.patcher = EntropyPatcher(
            patcher.entropy_model, patcher.config, precision=precision
        )  # as the cached steps compute
        self.texts = [bytearray() for _ in range(n_rows)]

    def prefill(self, texts):
        for row, ids in enumerate(texts):
            self.texts[row] += bytes(ids[1:].astype(np.uint8))
        return torch.stack([self._next_logits(row) for row in range(len(texts))])

    def extend(self, ids_BN, counts_B):
        for row in np.flatnonzero(counts_B):
            self.texts[row].append(int(ids_BN[row, 0]))
        nothing = torch.zeros(self.model.n_classes)
        return torch.stack([self._next_logits(row) if count else nothing for row, count in enumerate(counts_B)])[
            :, None
        ]

    @torch.no_grad()
    def _next_logits(self, row):
        """Logits [257] of what follows a row: one row of its ids, patched as the whole text is; a full one begins half a context later."""
        document, device = np.frombuffer(bytes(self.texts[row]), dtype=np.uint8), next(self.model.parameters()).device
        ids = np.concatenate(([BOUNDARY], document, [BOUNDARY]))  # the last id is a target, of which nothing is read
        is_start = np.concatenate(([True], self.patcher.starts(document)))
        begin, context = 0, self.context_bytes or len(ids)
        while len(document) + 1 - begin > context:
            begin += max(1, context // 2)
        ids, is_start = ids[begin:], is_start[begin:].copy()
        is_start[:2] = True
        batch = make_batch([(ids, is_start, np.ones(len(ids) - 1, dtype=bool))], len(ids) - 1).to(device)
        with autocast(device, self.precision):
            return self.model(batch.ids[:, :-1], batch.patch_lengths)[0, -1].float().cpu()


def continue_and_print(model, patcher, prompts, config, context_bytes):
    """Write the continuations to the standard output, a single one while it is being made, and the speed to stderr."""
    sampling = SamplingConfig(
        **{f.name: getattr(config, f.name) for f in fields(SamplingConfig)} | {"context_bytes": context_bytes}
    )
    tick = time.perf_counter()
    generator = Generator(
        model,
        patcher,
        prompts,
        config.max_new_bytes,
        sampling,
        draft_bytes=config.draft_bytes,
        draft_confidence=config.draft_confidence,
    )
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in prompts]
    shown = [prompt.decode(errors="replace") for prompt in prompts]
    if len(prompts) == 1:
        sys.stdout.write(shown[0])
    done = 0
    with threads_for(len(prompts)):
        for number, _ in enumerate(generator.steps()):
            if number == 0:
                begin = time.perf_counter()
            if len(prompts) == 1:
                new = generator.samplers[0].final_bytes()
                sys.stdout.write(decoders[0].decode(new[done:]))
                sys.stdout.flush()
                done = len(new)
    for sampler, decoder, prompt in zip(generator.samplers, decoders, shown):
        if len(prompts) == 1:
            sys.stdout.write(decoder.decode(b"", final=True) + "\n")
        else:
            sys.stdout.write(prompt + decoder.decode(sampler.final_bytes(), final=True) + "\n\n")
    new_bytes, seconds = sum(len(sampler.final_bytes()) for sampler in generator.samplers), time.perf_counter() - begin
    drafts = ""
    if config.draft_bytes:
        drafts = f" | {generator.accepted / max(1, generator.drafted):.0%} of {generator.drafted} drafts accepted, {new_bytes / max(1, generator.passes):.2f} bytes a pass"
    print(
        f"{new_bytes} bytes, {new_bytes / max(seconds, 1e-9):.0f} a second after {begin - tick:.2f} s for the prompt{drafts}",
        file=sys.stderr,
    )


def main(config):
    # Imported here, because train_blt prints a continuation with this module.
    from save_entropy_model import load_blt

    device = choose_device(config.device)
    model, patcher, record = load_blt(config.model, device)
    context_bytes = config.context_bytes or record.settings["row_bytes"]  # no longer rows than those it was trained on
    if config.interactive:
        print("a line is a prompt; an empty one ends", file=sys.stderr)
        for line in sys.stdin:
            if not line.strip("\n"):
                return
            continue_and_print(
                model, patcher, [line.rstrip("\n").encode("utf-8", "surrogateescape")], config, context_bytes
            )
        return
    prompts = [prompt.encode("utf-8", "surrogateescape") for prompt in config.prompt]
    if config.prompt_file is not None:
        if not Path(config.prompt_file).is_file():
            raise FileNotFoundError(f"{config.prompt_file} not found: --prompt_file takes a file to continue")
        prompts = [Path(config.prompt_file).read_bytes()]
    continue_and_print(model, patcher, prompts, config, context_bytes)


if __name__ == "__main__":
    run_script(main, GenerateConfig, __doc__)
