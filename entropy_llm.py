"""Train the entropy model: a small byte-level transformer whose uncertainty starts patches (BLT section 2.3).

Reads   a corpus (the bundled sample by default)
Writes  entropy_model.pth (plain state dict), entropy_model.json (what it is and what made it), and in
        entropy_model_run/: metrics.jsonl, curves.png, checkpoints
Run     python entropy_llm.py [--preset [SIZE] [MACHINE]] [--field value ...]
Next    python create_patches.py
Time    65 seconds on 2 free CPU cores

SIZE is nano, tiny, small, medium or large; MACHINE is auto, cpu, cpu_hour, colab_t4,
rtx4090, h100 or h200.
What is not named is chosen by the machine that is found. The settings are in `EntropyRunConfig`
below.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from blt.attention import AttentionPlan
from blt.checks import check, check_positive, check_shares
from blt.config import BY_PRESET, Presets, next_command, part_of, run_script
from blt.files import load_weights
from blt.flops import transformer_flops
from blt.ids import BOUNDARY, documents_of
from blt.layers import Block, RMSNorm, as_stream, embed, init_weights, logits_of, zero_outputs
from blt.loop import RunConfig, fit
from blt.metric import leak_gate
from blt.records import RunRecord, record_beside
from blt.rows import DocumentStream, TrainingRows, evaluation_batches
from blt.runs import claim_output, finish_run, print_model, start_run

SIZES = {
    "nano": dict(d_model=96, n_heads=2, n_layers=2, max_seq_len=128),
    "tiny": dict(d_model=256, n_heads=4, n_layers=3, max_seq_len=256),
    "small": dict(d_model=256, n_heads=4, n_layers=4, max_seq_len=512),
    "medium": dict(d_model=384, n_heads=8, n_layers=6, max_seq_len=512),
    "large": dict(d_model=512, n_heads=8, n_layers=10, max_seq_len=512),
}

MACHINES = {
    "cpu": dict(
        row_bytes=1024, batch_rows=8, steps=480, eval_every=160, lr=0.01, adam_lr=0.01, max_bytes=8_200_000,
        val_bytes=200_000,
    ),
    "cpu_hour": dict(row_bytes=1024, batch_rows=8, steps=960, eval_every=320, lr=0.01, adam_lr=0.01),
    "colab_t4": dict(row_bytes=2048, batch_rows=32, steps=1500),
    "rtx4090": dict(row_bytes=2048, batch_rows=64, steps=2000),
    "h100": dict(row_bytes=2048, batch_rows=64, steps=2000),
    "h200": dict(row_bytes=2048, batch_rows=128, steps=2000),
}  # fmt: skip


@dataclass
class EntropyConfig:
    """What an entropy model is."""

    d_model: int = 384  # width
    n_heads: int = 8  # attention heads
    n_layers: int = 6  # transformer layers
    max_seq_len: int = 512  # attention window in bytes; the model itself reads documents of any length
    vocab_size: int = 256  # classes of the output: the 256 bytes
    ffn_dim: int | None = None  # hidden width of the feed-forward; None: 8/3 of the width, rounded up to 256
    rope_theta: float = 10000.0  # base of the rotary embedding's wavelengths
    dropout: float = 0.0  # dropout rate
    max_bytes: int | None = 500000  # it is trained on at most this many bytes of the training documents; None: all

    def __post_init__(self):
        check_positive(self, "d_model", "n_heads", "n_layers", "max_seq_len", "rope_theta", "ffn_dim", "max_bytes")
        check(self, "vocab_size", self.vocab_size == 256, "256: one class a byte")
        check_shares(self, "dropout")
        head_dim_is_even = self.d_model % (2 * self.n_heads) == 0
        check(self, "d_model", head_dim_is_even, f"a multiple of 2 * n_heads = {2 * self.n_heads}")


@dataclass
class EntropyRunConfig(RunConfig, EntropyConfig):
    """Settings of this script. A value written in place of BY_PRESET takes effect with every preset."""

    # model: by size
    d_model: int = BY_PRESET  # width
    n_heads: int = BY_PRESET  # attention heads
    n_layers: int = BY_PRESET  # transformer layers
    max_seq_len: int = BY_PRESET  # attention window in bytes
    # run: by machine
    lr: float = BY_PRESET  # peak learning rate of the matrices (Muon, scaled to the RMS of an AdamW update)
    adam_lr: float = BY_PRESET  # peak learning rate of embedding, output head and norms (AdamW)
    steps: int = BY_PRESET  # updates
    row_bytes: int = BY_PRESET  # ids in a training row
    batch_rows: int = BY_PRESET  # rows in one forward and backward pass
    eval_every: int = BY_PRESET  # updates between evaluations
    val_bytes: int = BY_PRESET  # use at most this many bytes of the validation documents
    max_bytes: int | None = BY_PRESET  # use at most this many bytes of the training documents; None: all
    output: str = "entropy_model.pth"  # where the weights go

    # An hour on a CPU includes the pass that computes all entropies, so the model stays nano there.
    PRESETS = Presets(SIZES, MACHINES, size_of_machine={"cpu": "nano", "cpu_hour": "nano"})

    def __post_init__(self):
        RunConfig.__post_init__(self)
        EntropyConfig.__post_init__(self)
        check(self, "output", Path(self.output).name != "", "a file's name, such as entropy_model.pth")
        # The record goes beside the weights under the same name.
        ends_well = Path(self.output).suffix != ".json"
        check(self, "output", ends_well, "a name without .json, where the record goes: such as entropy_model.pth")


class MinimalLLM(nn.Module):
    """A causal byte-level transformer with sliding-window attention: the entropy model.

    Input ids 0..255 are bytes, 256 opens a document. Output t is the distribution of the byte
    after input t. It depends on at most n_layers * (max_seq_len - 1) + 1 bytes, none of them
    before the document's boundary.
    """

    n_classes = 256

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(BOUNDARY + 1, config.d_model)
        self.blocks = nn.ModuleList(
            Block(config.d_model, config.n_heads, dropout=config.dropout, ffn_dim=config.ffn_dim)
            for _ in range(config.n_layers)
        )
        self.norm = RMSNorm(config.d_model, eps=1e-5)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        init_weights(self)

    def forward(self, ids_BT):
        """ids_BT: int64 in 0..256. Returns logits [B, T, 256]."""
        if ids_BT.dim() != 2:
            raise ValueError(f"ids must be [B, T], not {list(ids_BT.shape)}")
        plan = self._plan(documents_of(ids_BT, BOUNDARY))
        return self.read(ids_BT, plan, [None] * len(self.blocks))

    def read(self, ids_BT, plan, pasts):
        """Logits [B, T, 256] under an attention plan (`AttentionPlan` or `incremental.CachedAttentionPlan`).

        pasts: for each layer, what the plan's `attend` takes as `past`.
        """
        x_BTD = as_stream(embed(self.embedding, ids_BT))
        for block, past in zip(self.blocks, pasts):
            x_BTD, _ = block(x_BTD, plan, past)
        return logits_of(self.head, self.norm(x_BTD))

    def stream(self, ids_BT, state=None):
        """Read the next chunk of a long stream: the same logits as `forward` over the whole, whatever the chunks.

        state: what the previous call returned; None at the start.
        Returns logits [B, T, 256] and the new state: document numbers of the last W positions [B,
        W], each layer's keys and values there [B, W, H, K], and the last position's document
        number [B, 1]. W is `AttentionPlan.carry_length` of the window.
        """
        if state is None:
            state = self.empty_state(ids_BT)
        past_documents_BW, past, last_document_B1 = state
        documents_BT = last_document_B1 + documents_of(ids_BT, BOUNDARY)
        plan = self._plan(documents_BT, past_documents_BW)
        x_BTD = as_stream(embed(self.embedding, ids_BT))
        new_past = []
        for block, layer_past in zip(self.blocks, past):
            x_BTD, layer_new = block(x_BTD, plan, layer_past)
            new_past.append(tuple(_last(old.to(new.dtype), new) for old, new in zip(layer_past, layer_new)))
        new_state = (_last(past_documents_BW, documents_BT), new_past, documents_BT[:, -1:].clone())
        return logits_of(self.head, self.norm(x_BTD)), new_state

    def empty_state(self, ids_BT):
        """The state of `stream` before the first chunk: keys and values in no document, so nothing attends to them."""
        B = ids_BT.shape[0]
        W = AttentionPlan.carry_length(self.config.max_seq_len)
        H = self.config.n_heads
        # As later states are, each a tensor of its own and of their dtype, so that torch.compile compiles once.
        is_cast = torch.is_autocast_enabled(ids_BT.device.type)
        dtype = torch.get_autocast_dtype(ids_BT.device.type) if is_cast else self.embedding.weight.dtype
        nothing_BWHK = torch.zeros(B, W, H, self.config.d_model // H, dtype=dtype, device=ids_BT.device)
        past = [(nothing_BWHK.clone(), nothing_BWHK.clone()) for _ in self.blocks]
        past_documents_BW = torch.full((B, W), -1, dtype=torch.int64, device=ids_BT.device)
        last_document_B1 = torch.zeros(B, 1, dtype=torch.int64, device=ids_BT.device)
        return past_documents_BW, past, last_document_B1

    def _plan(self, documents_BT, past_documents_BW=None):
        config = self.config
        head_dim = config.d_model // config.n_heads
        return AttentionPlan(documents_BT, head_dim, config.rope_theta, config.max_seq_len, past_documents_BW)


def _last(old_BW, new_BT):
    """The last W positions of the two, one after the other along axis 1."""
    # A copy, because a view would keep all W + T positions in memory until the next chunk.
    return torch.cat((old_BW, new_BT), dim=1)[:, new_BT.shape[1] :].clone()


def run_folder(output):
    """Where the checkpoints and metrics of the entropy model in the file `output` are."""
    output = Path(output)
    return output.with_name(output.stem + "_run")


def main(config):
    with claim_output(config, run_folder(config.output), config.output, record_beside(config.output)):
        train(config)


def train(config):
    """One training run, with its folder held."""
    run = start_run(config)
    stream = DocumentStream.of_corpus(run.corpus, run.train)
    # The model has no class for a document's end, so ends are not scored.
    train_rows = TrainingRows(stream, config.row_bytes, score_ends=False)
    config.choose_steps(train_rows)
    validation_batches = list(
        evaluation_batches(run.validation, None, config.row_bytes, config.batch_rows, score_ends=False)
    )
    model_config = part_of(config, EntropyConfig)
    model = MinimalLLM(model_config).to(run.device)
    if config.zero_init:
        zero_outputs(model)
    parameters = sum(p.numel() for p in model.parameters())
    name = f"entropy model, window {config.max_seq_len} bytes"
    print_model(name, {"transformer": parameters}, config, stream.total_bytes)
    gate = leak_gate(model, None, np.concatenate(run.validation[:8]))
    print(f"leak gate passed: largest difference {gate:.1e} nats")

    output = Path(config.output)
    run_dir = run_folder(output)
    depends_on = {"kind": "entropy", **asdict(model_config), "corpus_sha256": run.corpus.hash}
    files = (output, record_beside(output))
    result = fit(model, config, train_rows, validation_batches, run_dir, depends_on, result_files=files)
    load_weights(run_dir / "best.pt", model)
    c = model_config
    flops = transformer_flops(c.d_model, c.n_layers, c.vocab_size, train_rows.document_parts(), c.max_seq_len)
    result["flops_per_byte"] = sum(flops.values())
    record = RunRecord(
        kind="entropy",
        model_config=asdict(model_config),
        settings=asdict(config),
        corpus=config.corpus_facts(run.corpus) | {"train_bytes": stream.total_bytes},
    )
    finish_run(model, record, result, run, run_dir, *files)
    print("document ends are not scored: the entropy model has no class for them")
    # Only a path that differs from what the next script takes by itself.
    named = {"entropy_model_path": config.output} if config.output != "entropy_model.pth" else {}
    print("next: " + next_command("create_patches.py", config, **named))


if __name__ == "__main__":
    run_script(main, EntropyRunConfig, __doc__)
