"""Train the entropy model: a small byte-level transformer whose uncertainty decides where patches begin (BLT section 2.3).

Reads   a corpus (the bundled sample by default)
Writes  entropy_model.pth (plain state dict), entropy_model.json (config, corpus, bits per byte), and in
        entropy_model_run/: metrics.jsonl, curves.png, checkpoints
Run     python entropy_llm.py [--preset cpu | colab_t4 | rtx4090 | h200] [--field value ...]
Next    python create_patches.py
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from blt.attention import AttentionPlan
from blt.checks import check, check_positive
from blt.config import print_header, run_script
from blt.device import choose_device, choose_precision, set_seed
from blt.files import load_weights
from blt.ids import BOUNDARY, documents_of
from blt.layers import Block, RMSNorm, init_weights
from blt.loop import RunConfig, fit, training_curves
from blt.metric import leak_gate
from blt.rows import DocumentStream, TrainingRows, evaluation_batches


@dataclass
class EntropyConfig(RunConfig):
    # model
    d_model: int = 384  # width
    n_heads: int = 8  # attention heads
    n_layers: int = 6  # transformer layers
    max_seq_len: int = 512  # attention window in bytes; the model itself reads documents of any length
    ffn_dim: int | None = None  # hidden width of the feed-forward; None: 8/3 of the width, rounded up to 256
    vocab_size: int = 256  # classes of the output: the 256 bytes
    rope_theta: float = 10000.0  # base of the rotary embedding's wavelengths
    dropout: float = 0.0  # dropout rate
    # run: what differs from the settings that all scripts share
    max_bytes: int | None = 500000  # train on the first so many bytes of the training documents; None: all
    row_bytes: int = 2048  # ids in a training row
    batch_rows: int = 16  # rows in one forward and backward pass
    steps: int = 120  # updates
    eval_every: int = 40  # updates between evaluations
    output: str = "entropy_model.pth"  # where the weights go

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "d_model", "n_heads", "n_layers", "max_seq_len", "rope_theta", "ffn_dim")
        check(self, "vocab_size", self.vocab_size == 256, "256: one class a byte")
        check(self, "dropout", 0 <= self.dropout < 1, "from 0 to below 1")
        head_dim_is_even = self.d_model % (2 * self.n_heads) == 0
        check(self, "d_model", head_dim_is_even, f"a multiple of 2 * n_heads = {2 * self.n_heads}")


PRESETS = {
    "cpu": dict(
        d_model=192, n_heads=3, n_layers=2, max_seq_len=128, max_bytes=None, val_bytes=200_000,
        row_bytes=1024, batch_rows=8, steps=160, eval_every=80, lr=0.01, adam_lr=0.01,
    ),
    "colab_t4": dict(max_bytes=None, batch_rows=32, steps=1500, eval_every=250),
    "rtx4090": dict(max_bytes=None, batch_rows=64, steps=2000, eval_every=250),
    "h200": dict(max_bytes=None, d_model=512, n_layers=10, batch_rows=128, steps=2000, eval_every=250),
}  # fmt: skip


class MinimalLLM(nn.Module):
    """A causal byte-level transformer with sliding-window attention: the entropy model.

    Input ids 0..255 are bytes, 256 opens a document. Output t is the distribution of the byte after input t. It sees at most
    n_layers * (max_seq_len - 1) + 1 bytes back, and never past its document's boundary.
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
        return self.read(ids_BT, self._plan(documents_of(ids_BT, BOUNDARY)), [None] * len(self.blocks))

    def read(self, ids_BT, plan, pasts):
        """Logits [B, T, 256] under a plan (layers.AttentionPlan or incremental.CachedAttentionPlan); pasts: for each layer, what the plan takes."""
        x_BTD = self.embedding(ids_BT)
        for block, past in zip(self.blocks, pasts):
            x_BTD, _ = block(x_BTD, plan, past)
        return self.head(self.norm(x_BTD))

    def stream(self, ids_BT, state=None):
        """Read the next chunk of a long stream: as `forward` over the whole, whatever the chunks.

        state: what the call before returned, None at the start. Returns logits [B, T, 256] and the new state: the last
        bytes' document numbers [B, W] and each layer's keys and values [B, W, H, K] (W: one window).
        """
        B, device = ids_BT.shape[0], ids_BT.device
        carry = AttentionPlan.carry_length(self.config.max_seq_len)
        if state is None:
            nothing = self.embedding.weight.new_zeros(
                B, carry, self.config.n_heads, self.config.d_model // self.config.n_heads
            )
            past_documents = torch.full((B, carry), -1, dtype=torch.int64, device=device)
            past = [(nothing, nothing)] * len(self.blocks)
            documents = documents_of(ids_BT, BOUNDARY)
        else:
            past_documents, past, last_document = state
            documents = last_document + documents_of(ids_BT, BOUNDARY)
        plan = self._plan(documents, past_documents)
        x_BTD, new_past = self.embedding(ids_BT), []
        for block, layer_past in zip(self.blocks, past):
            x_BTD, layer_new = block(x_BTD, plan, layer_past)
            new_past.append(
                tuple(torch.cat((old.to(x.dtype), x), dim=1)[:, x.shape[1] :] for old, x in zip(layer_past, layer_new))
            )
        new_documents = torch.cat((past_documents, documents), dim=1)[:, documents.shape[1] :]
        return self.head(self.norm(x_BTD)), (new_documents, new_past, documents[:, -1:])

    def _plan(self, documents_BT, past_documents_BW=None):
        config = self.config
        return AttentionPlan(
            documents_BT, config.d_model // config.n_heads, config.rope_theta, config.max_seq_len, past_documents_BW
        )


def main(config):
    # Imported here, because that module is built on this one.
    from save_entropy_model import save_entropy_model

    set_seed(config.seed)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    print_header(config, device, precision)
    corpus = config.corpus()
    stream = DocumentStream.of_corpus(corpus, corpus.documents("train", config.max_bytes))
    train_rows = TrainingRows(stream, config.row_bytes, score_ends=False)
    validation = [corpus.document(number) for number in corpus.documents("validation", config.val_bytes)]
    validation_batches = list(
        evaluation_batches(validation, None, config.row_bytes, config.batch_rows, score_ends=False)
    )
    model = MinimalLLM(config).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    epochs = config.steps * config.accumulate * config.batch_rows * config.row_bytes / stream.total_bytes
    print(
        f"entropy model: {parameters:,} parameters, window {config.max_seq_len} bytes | "
        f"training text {stream.total_bytes:,} bytes, {epochs:.2f} epochs"
    )
    print(f"leak gate passed: largest difference {leak_gate(model, None, np.concatenate(validation[:8])):.1e} nats")

    run_dir = Path(config.output).with_suffix("").as_posix() + "_run"
    result = fit(model, config, train_rows, validation_batches, run_dir)
    load_weights(Path(run_dir) / "best.pt", model)
    metadata = {
        "corpus": {"dataset": config.dataset, "sha256": corpus.hash},
        "train_bytes": stream.total_bytes,
        "val_bpb": result["val_bpb"],
        "val_bytes": result["val_bytes"],
        "bytes_per_second": result["bytes_per_second"],
    }
    save_entropy_model(model, config.output, metadata)
    training_curves(Path(run_dir) / "curves.png", run_dir)
    print(
        f"entropy model: val {result['val_bpb']:.4f} bpb over {result['val_bytes']:,} bytes (document ends not scored) | "
        f"{result['train_seconds']:.0f} s | {result['bytes_per_second'] / 1e3:.1f} kB/s"
    )
    print(f"wrote {config.output}, {Path(config.output).with_suffix('.json')}, {run_dir}/curves.png")
    print("next: python create_patches.py" + (f" --preset {' '.join(config.preset)}" if config.preset else ""))


if __name__ == "__main__":
    run_script(main, EntropyConfig, __doc__, PRESETS)
