"""Continue texts, byte by byte, with a trained BLT.

Reads   an output folder of llm.py or train_blt.py, and the entropy model it was trained with
Run     python generate.py --model checkpoints --prompt "The history of" [--max_new_bytes 200]
                           [--temperature 0.7] [--draft_bytes 8]
        python generate.py --model checkpoints --interactive
Prints  the prompt and its continuation while it is being made; with several prompts, one text after
        the other. The speed goes to stderr.
Takes   8 ms a byte with a model of 15M parameters on one core of an AMD EPYC

`IncrementalBLT` caches keys, values and patch states, so the cost of a byte does not grow with its
position. --draft_bytes is self-speculation (BLT-S): the entropy model, which reads every byte anyway,
drafts the next bytes, and one pass of the BLT checks them all. The text is the same, but takes fewer
passes of the BLT.
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
from blt.ids import BOUNDARY, argument_bytes, to_bytes
from blt.incremental import MAX_STEP, IncrementalBLT
from blt.patch_rules import refuse_lookahead
from blt.rows import make_batch
from blt.sampling import Sampler, SamplingConfig
from entropy_patcher import EntropyPatcher
from save_entropy_model import load_blt


@dataclass
class GenerateConfig(SamplingConfig):
    model: str = "checkpoints"  # output folder of llm.py or train_blt.py
    prompt: list[str] = field(default_factory=lambda: [""])  # texts to continue; empty: a new document
    prompt_file: str | None = None  # a file whose bytes are the prompt
    interactive: bool = False  # continue each line of the standard input
    max_new_bytes: int = 200  # bytes to add, fewer if the model ends the document
    temperature: float = 0.7  # 0: always the most likely byte
    draft_bytes: int = 0  # the most bytes that the entropy model drafts for a pass of the BLT
    draft_confidence: float = 0.6  # draft only bytes of at least this probability
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "max_new_bytes")
        if (self.prompt != [""]) + (self.prompt_file is not None) + self.interactive > 1:
            raise ValueError("give only one of prompt, prompt_file and interactive")
        # A pass of the BLT reads the byte that was chosen last and the drafts after it.
        check(self, "draft_bytes", 0 <= self.draft_bytes < MAX_STEP, f"from 0 to {MAX_STEP - 1}")
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
    """Continue a prompt by up to max_new_bytes bytes. Returns the new bytes.

    The text ends early where the model ends the document or a stop string comes. The patcher makes the
    patches from the bytes so far, as in training.

    prompt: whatever `to_bytes` takes; or a list of such prompts, for a list of continuations, each as it
        would be alone.
    cached: False makes every byte by a full pass: slow, with the same greedy result in fp32.
    draft_bytes, draft_confidence: self-speculation, see `Generator`.
    sampling: fields of `SamplingConfig`.
    """
    is_list = isinstance(prompt, (list, tuple))
    # A list of numbers is one prompt, given as its bytes.
    is_batch = is_list and not (prompt and isinstance(prompt[0], (int, np.integer)))
    prompts = [to_bytes(p).tobytes() for p in (prompt if is_batch else [prompt])]
    if not prompts:
        return []
    if max_new_bytes < 1:
        raise ValueError(f"max_new_bytes is {max_new_bytes}; it must be 1 or more")
    config = SamplingConfig(**sampling)
    was_training = model.training
    model.eval()
    try:
        generator = Generator(
            model, patcher, prompts, max_new_bytes, config, precision, cached, draft_bytes, draft_confidence
        )
        # With few rows one thread is as fast as several, and leaves the other cores free.
        with threads_for(len(prompts)):
            # The samplers collect the text.
            for _ in generator.steps():
                pass
    finally:
        model.train(was_training)
    texts = [sampler.final_bytes() for sampler in generator.samplers]
    return texts if is_batch else texts[0]


class Generator:
    """Continues prompts side by side. Each of its `steps` adds a byte to every row, or several with drafts.

    samplers[row].final_bytes() is the new text of a row so far.

    Drafts (self-speculation): the entropy model continues the text alone, for up to draft_bytes bytes,
    while its most likely byte has at least the probability draft_confidence. One pass of the BLT over all
    drafts then gives the logits after each. The sampler chooses from them in order, as without drafts. A
    draft is accepted if it is what the sampler chooses, and the first other choice ends the pass. So
    drafts never change the text.

        drafts           r   e   d   .        after "the "
        sampler          r   e   a            its third choice differs
        next             "re" is accepted, "d." is rolled back, and "a" is the first id of the next pass

    drafted, accepted: how many bytes the entropy model has drafted, and how many of them are in the text.
    passes: passes of the BLT after the prompt.
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
        refuse_lookahead(patcher.config, "generate")
        reader_class = IncrementalBLT if cached else FullPass
        self.reader = reader_class(model, patcher, len(prompts), config.context_bytes, precision)
        # A full pass cannot be drafted for, and static and space patches need no entropy model.
        if draft_bytes and (not cached or self.reader.entropy_model is None):
            raise ValueError(
                "drafts come from the entropy model's cached steps; "
                "use draft_bytes=0 with cached=False or static or space patches"
            )
        self.prompts = prompts
        self.samplers = []
        for row, prompt in enumerate(prompts):
            self.samplers.append(Sampler(prompt, max_new_bytes, config, row))
        self.draft_bytes = draft_bytes
        self.draft_confidence = draft_confidence
        self.drafted = 0
        self.accepted = 0
        self.passes = 0

    def steps(self):
        """Read the prompts, then add bytes until all texts are over. Yields after each pass of the BLT."""
        texts = [prompt_ids(prompt) for prompt in self.prompts]
        logits_BV = self.reader.prefill(texts).float().cpu().numpy()
        # The ids that the samplers have chosen, but that the models have not read yet.
        next_ids_B = np.zeros(len(texts), np.int64)
        for row, sampler in enumerate(self.samplers):
            next_ids_B[row] = sampler.choose(logits_BV[row])
        yield
        # A row that is over stays in the batch and reads nothing, so that every row keeps its number.
        while not all(sampler.is_over for sampler in self.samplers):
            is_open_B = np.array([not sampler.is_over for sampler in self.samplers])
            if self.draft_bytes:
                next_ids_B = self._add_bytes_with_drafts(next_ids_B, is_open_B)
            else:
                next_ids_B = self._add_byte(next_ids_B, is_open_B)
            self.passes += 1
            yield

    def _add_byte(self, next_ids_B, is_open_B):
        """Read one id in each open row and choose the next: int64 [B]."""
        ids_BN = np.where(is_open_B, next_ids_B, 0)[:, None]
        logits_BNV = self.reader.extend(ids_BN, is_open_B.astype(np.int64))
        logits_BV = logits_BNV[:, 0].float().cpu().numpy()
        chosen_B = np.zeros(len(next_ids_B), np.int64)
        for row in np.flatnonzero(is_open_B):
            chosen_B[row] = self.samplers[row].choose(logits_BV[row])
        return chosen_B

    def _add_bytes_with_drafts(self, next_ids_B, is_open_B):
        """Draft, let the BLT read all drafts in one pass, and keep those that the samplers choose as well."""
        ids_BN, is_end_BN, counts_B = self._draft(next_ids_B, is_open_B)
        logits_BNV = self.reader.advance(ids_BN, is_end_BN, counts_B).float().cpu().numpy()
        chosen_B, kept_B = self._choose(ids_BN, counts_B, logits_BNV)
        self.reader.commit(kept_B)
        # The first id of each row is not a draft.
        self.drafted += int((counts_B - is_open_B).sum())
        self.accepted += int((kept_B - is_open_B).sum())
        return chosen_B

    def _draft(self, next_ids_B, is_open_B):
        """Let the entropy model read the next id of each open row, then its own most likely bytes.

        Returns the ids [B, N], which of them end a patch [B, N], and how many of them each row has [B].
        """
        # A step must fit the row of the model, which may be nearly full.
        limits_B = np.minimum(self.reader.step_limits(), 1 + self.draft_bytes)
        ids_of_step = []
        is_end_of_step = []
        counts_B = np.zeros(len(next_ids_B), np.int64)
        ids_B = np.where(is_open_B, next_ids_B, 0)
        is_drafting_B = is_open_B
        while is_drafting_B.any():
            new_counts_B = is_drafting_B.astype(np.int64)
            is_end_B1, logits_B1V = self.reader.find_patch_ends(ids_B[:, None], new_counts_B)
            ids_of_step.append(ids_B)
            is_end_of_step.append(is_end_B1)
            counts_B = counts_B + new_counts_B
            probability_B, draft_B = logits_B1V[:, 0].float().softmax(-1).max(-1)
            is_sure_B = probability_B.cpu().numpy() >= self.draft_confidence
            is_drafting_B = is_drafting_B & (counts_B < limits_B) & is_sure_B
            ids_B = draft_B.cpu().numpy()
        return np.stack(ids_of_step, axis=1), np.concatenate(is_end_of_step, axis=1), counts_B

    def _choose(self, ids_BN, counts_B, logits_BNV):
        """Choose bytes until one differs from the draft, the drafts are used up or the text is over.

        Returns the last choice of each row, which no model has read yet, and how many of the row's ids to
        keep: the first one and the accepted drafts.
        """
        chosen_B = np.zeros(len(counts_B), np.int64)
        kept_B = np.zeros(len(counts_B), np.int64)
        for row in np.flatnonzero(counts_B):
            sampler = self.samplers[row]
            for n in range(counts_B[row]):
                kept_B[row] = n + 1
                chosen_B[row] = sampler.choose(logits_BNV[row, n])
                is_last = n + 1 == counts_B[row]
                if sampler.is_over or is_last or chosen_B[row] != ids_BN[row, n + 1]:
                    break
        return chosen_B, kept_B


def prompt_ids(prompt):
    """A prompt as the models read it: int64, the document boundary and the bytes."""
    return np.concatenate(([BOUNDARY], np.frombuffer(prompt, np.uint8))).astype(np.int64)


class FullPass:
    """A stand-in for `IncrementalBLT` that makes a full pass over the whole text at every step.

    It is slow and simple: the cached steps are tested against it.
    """

    entropy_model = None

    def __init__(self, model, patcher, n_rows, context_bytes, precision):
        self.model = model
        self.device = next(model.parameters()).device
        self.context_bytes = context_bytes
        self.precision = precision
        # A trained model's patcher computes in the precision of its training, the cached steps in this one.
        self.patcher = EntropyPatcher(patcher.entropy_model, patcher.config, precision=precision)
        self.texts = [bytearray() for _ in range(n_rows)]

    def prefill(self, texts):
        """Read arrays of ids, a boundary and bytes each. Returns logits [B, 257] of what follows."""
        for row, ids in enumerate(texts):
            self.texts[row] += bytes(ids[1:].astype(np.uint8))
        return torch.stack([self._next_logits(row) for row in range(len(texts))])

    def extend(self, ids_BN, counts_B):
        """Read a byte in the rows whose count is 1. Returns logits [B, 1, 257], zeros for the other rows."""
        logits_BV = torch.zeros(len(self.texts), self.model.n_classes)
        for row in np.flatnonzero(counts_B):
            self.texts[row].append(int(ids_BN[row, 0]))
            logits_BV[row] = self._next_logits(row)
        return logits_BV[:, None]

    @torch.no_grad()
    def _next_logits(self, row):
        """Logits [257] of what follows a row's text. The model reads the row's last ids, as cached steps do."""
        document = np.frombuffer(bytes(self.texts[row]), np.uint8)
        # The last id is only a target. No input is computed from it, so any id will do.
        ids = np.concatenate(([BOUNDARY], document, [BOUNDARY]))
        is_start = np.concatenate(([True], self.patcher.starts(document)))
        n_inputs = len(ids) - 1
        context_bytes = n_inputs if self.context_bytes is None else self.context_bytes
        # Patches are made over the whole document, but the model's row may begin inside it: a full row
        # restarts half a context later.
        begin = 0
        while n_inputs - begin > context_bytes:
            begin += max(1, context_bytes // 2)
        ids = ids[begin:]
        is_start = is_start[begin:].copy()
        # Every row begins with a patch of one id, so that there is a complete patch to read.
        is_start[:2] = True
        is_scored = np.ones(len(ids) - 1, dtype=bool)
        batch = make_batch([(ids, is_start, is_scored)], len(ids) - 1).to(self.device)
        with autocast(self.device, self.precision):
            logits_BTV = self.model(batch.ids[:, :-1], batch.patch_lengths)
        return logits_BTV[0, -1].float().cpu()


def continue_and_print(model, patcher, prompts, config, context_bytes):
    """Write prompts and continuations to the standard output, and the speed to stderr.

    A single text is written while it is being made; several are written at the end.
    """
    # The config is a SamplingConfig with more fields, and its context may come from the model instead.
    settings = {f.name: getattr(config, f.name) for f in fields(SamplingConfig)}
    settings["context_bytes"] = context_bytes
    started = time.perf_counter()
    generator = Generator(
        model,
        patcher,
        prompts,
        config.max_new_bytes,
        SamplingConfig(**settings),
        draft_bytes=config.draft_bytes,
        draft_confidence=config.draft_confidence,
    )
    shown_prompts = [prompt.decode(errors="replace") for prompt in prompts]
    is_single = len(prompts) == 1
    # Reading a long prompt takes time, so it is shown before.
    if is_single:
        sys.stdout.write(shown_prompts[0])
        sys.stdout.flush()
    with threads_for(len(prompts)):
        steps = generator.steps()
        # The first step reads the prompts; the others add bytes. Their times are reported apart.
        next(steps)
        prompt_seconds = time.perf_counter() - started
        n_first = new_bytes_of(generator)
        if is_single:
            stream_text(generator.samplers[0], steps)
        else:
            for _ in steps:
                pass
    if not is_single:
        for prompt, sampler in zip(shown_prompts, generator.samplers):
            sys.stdout.write(prompt + sampler.final_bytes().decode(errors="replace") + "\n\n")
    print_speed(generator, n_first, prompt_seconds, time.perf_counter() - started - prompt_seconds)


def stream_text(sampler, steps):
    """Write a text's new bytes as soon as they are final, while `steps` makes more; then end the line."""
    # A character may have several bytes: the decoder waits until all of them are there.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    n_shown = 0
    is_over = False
    while not is_over:
        new = sampler.final_bytes()
        sys.stdout.write(decoder.decode(new[n_shown:]))
        sys.stdout.flush()
        n_shown = len(new)
        is_over = sampler.is_over
        next(steps, None)
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")


def new_bytes_of(generator):
    """How many bytes all texts have got."""
    return sum(len(sampler.final_bytes()) for sampler in generator.samplers)


def print_speed(generator, n_first, prompt_seconds, seconds):
    """Print to stderr, so that the standard output holds the texts only.

    n_first: new bytes that came with the pass over the prompt, in prompt_seconds.
    """
    new_bytes = new_bytes_of(generator)
    rate = f", {(new_bytes - n_first) / seconds:.0f} a second" if new_bytes > n_first else ""
    line = f"{new_bytes} bytes{rate} after {prompt_seconds:.2f} s for the prompt"
    if generator.draft_bytes:
        accepted = generator.accepted / max(1, generator.drafted)
        bytes_per_pass = (new_bytes - n_first) / max(1, generator.passes)
        line += f" | {accepted:.0%} of {generator.drafted} drafts accepted"
        line += f", {bytes_per_pass:.2f} bytes a pass"
    print(line, file=sys.stderr)


def read_prompts(config):
    """The prompts that the command line names, as bytes."""
    if config.prompt_file is None:
        return [argument_bytes(prompt) for prompt in config.prompt]
    path = Path(config.prompt_file)
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: --prompt_file takes a file to continue")
    return [path.read_bytes()]


def main(config):
    # Before the model is read, which takes longer than to see that a file is missing.
    prompts = read_prompts(config)
    device = choose_device(config.device)
    model, patcher, record = load_blt(config.model, device)
    # The model has not been trained on longer rows than these.
    context_bytes = record.row_bytes() if config.context_bytes is None else config.context_bytes
    if not config.interactive:
        continue_and_print(model, patcher, prompts, config, context_bytes)
        return
    print("a line is a prompt; an empty one ends", file=sys.stderr)
    # As bytes: a line of text would have to be UTF-8.
    for line in sys.stdin.buffer:
        prompt = line.removesuffix(b"\n")
        if not prompt:
            return
        continue_and_print(model, patcher, [prompt], config, context_bytes)


if __name__ == "__main__":
    run_script(main, GenerateConfig, __doc__)
