"""Train a baseline for the Byte Latent Transformer: a flat byte transformer or a BPE transformer, in the harness of llm.py.

flat: one causal transformer over bytes, without patches. bpe: the same over the tokens of a byte-level BPE that is trained
here. Both are scored in bits per byte of the same held-out bytes by the same functions as the BLT. No entropy model is needed.

Reads   a corpus (the bundled sample by default)
Writes  checkpoints_flat/ or checkpoints_bpe/: best.pt (weights), model.json (config, result), tokenizer.json (bpe), last.pt,
        metrics.jsonl, curves.png
Run     python template_llm.py --model flat | bpe [--preset [tiny | small | medium] [cpu | colab_t4 | rtx4090 | h200]] [--field value ...]
Time    --preset cpu: about 4 minutes on 2 cores of an AMD EPYC with AVX512-bf16, for either model

The settings below are the medium size. A training byte costs as much computation as in llm.py of the same preset (`SIZES`), and
rows, updates, rates and data are llm.py's.
"""

import json
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch.nn as nn

from blt.attention import AttentionPlan
from blt.checks import check, check_positive
from blt.config import print_header, run_script
from blt.device import choose_device, choose_precision, set_seed
from blt.files import load_weights, write_atomically, write_json
from blt.ids import BYTES, documents_of
from blt.layers import Block, RMSNorm, default_heads, init_weights
from blt.loop import RunConfig, fit, training_curves
from blt.metric import leak_gate, result_line
from blt.rows import DocumentStream, TrainingRows, evaluation_batches
from blt.tokens import BPEVocabulary, load_tokenizer, train_tokenizer
from train_blt import MACHINES

# (width, layers) of the model for each size of llm.py. Millions of multiply-adds that a forward pass makes per byte, attention with
# them (a training byte costs six times as many FLOPs), with full rows of one document, 4.5 bytes a patch and 3.57 bytes a token:
#   size      llm.py   flat    bpe
#   tiny        2.14   2.05   2.22
#   small       5.50   5.55   5.39
#   medium     11.72  11.98  11.78
#   cpu         2.76   2.81   2.67
SIZES = {
    "flat": {"tiny": (160, 4), "small": (256, 5), "medium": (320, 7), "cpu": (224, 3)},
    "bpe": {"tiny": (256, 6), "small": (384, 8), "medium": (512, 10), "cpu": (384, 4)},
}


@dataclass
class FlatConfig:
    # model
    dim: int = 320  # width
    n_layers: int = 7  # transformer layers
    n_heads: int | None = None  # attention heads; None: heads of about 64 channels
    window: int | None = 512  # ids that an id attends to, itself included; None: the whole row
    rope_theta: float = 500000.0  # base of the rotary embedding's wavelengths
    norm_eps: float = 1e-5  # RMSNorm's epsilon
    qk_norm: bool = False  # RMSNorm of queries and keys in self-attention
    dropout: float = 0.0  # dropout rate

    def __post_init__(self):
        check_positive(self, "dim", "n_layers", "n_heads", "window", "rope_theta", "norm_eps")
        check(self, "dim", self.dim % (2 * self.heads) == 0, f"a multiple of 2 * n_heads = {2 * self.heads}")
        check(self, "dropout", 0 <= self.dropout < 1, "from 0 to below 1")

    @property
    def heads(self):
        """Attention heads of a layer."""
        return self.n_heads or default_heads(self.dim)


@dataclass
class BPEConfig(FlatConfig):
    dim: int = 512  # width
    n_layers: int = 10  # transformer layers
    window: int | None = None  # tokens that a token attends to, itself included; None: the whole row


@dataclass
class TemplateConfig(RunConfig, FlatConfig):
    # model
    model: Literal["flat", "bpe"] = "flat"  # flat: transformer over bytes; bpe: over BPE tokens
    size: Literal["tiny", "small", "medium", "cpu"] = (
        "medium"  # a byte costs about what it costs in llm.py of this preset
    )
    dim: int | None = None  # width; None: by model and size
    n_layers: int | None = None  # transformer layers; None: by model and size
    window: int | None = (
        None  # bytes or tokens that one attends to, itself included; None: 512 bytes, or all of a row's tokens
    )
    vocab_size: int = 4096  # bpe: tokens in the vocabulary, the 256 bytes with them
    tokenizer_bytes: int = (
        10_000_000  # bpe: the tokenizer learns from the first so many bytes of the training documents
    )
    # run
    row_bytes: int = (
        4096  # bytes in a row; bpe: a row holds as many tokens as stand for about so many bytes of training text
    )
    batch_rows: int = 16  # rows in one forward and backward pass
    steps: int = 3000  # updates
    output: str | None = None  # folder for weights, metrics and curves; None: checkpoints_flat or checkpoints_bpe

    def __post_init__(self):
        RunConfig.__post_init__(self)
        check(self, "model", self.model in SIZES, "flat or bpe")
        check(self, "size", self.size in SIZES[self.model], "one of " + ", ".join(SIZES[self.model]))
        dim, n_layers = SIZES[self.model][self.size]
        self.dim = dim if self.dim is None else self.dim
        self.n_layers = n_layers if self.n_layers is None else self.n_layers
        if self.window is None and self.model == "flat":
            self.window = FlatConfig.window
        self.output = self.output or f"checkpoints_{self.model}"
        FlatConfig.__post_init__(self)
        check(self, "vocab_size", 256 <= self.vocab_size <= 1 << 20, "from 256, the bytes alone, to 1,048,576")
        check_positive(self, "tokenizer_bytes")


# llm.py's sizes, and of its machines what concerns the run and not the BLT.
_RUN_FIELDS = {field.name for field in fields(RunConfig)}
PRESETS = {
    **{size: dict(size=size) for size in ("tiny", "small", "medium")},
    **{
        machine: {name: value for name, value in preset.items() if name in _RUN_FIELDS}
        for machine, preset in MACHINES.items()
    },
}
PRESETS["cpu"]["size"] = "cpu"


class PlainTransformer(nn.Module):
    """A causal transformer over ids: embedding, `layers.Block`s, norm, head. Attention keeps documents apart, as in the BLT.

    vocabulary: what the ids stand for. Its boundary opens a document as input and ends it as target, so there is one class for
    each id and one for the document's end.
    """

    def __init__(self, config, vocabulary):
        super().__init__()
        self.config, self.vocabulary, self.n_classes = config, vocabulary, vocabulary.boundary + 1
        self.embedding = nn.Embedding(self.n_classes, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, config.norm_eps, config.qk_norm, config.dropout)
            for _ in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, self.n_classes, bias=False)
        init_weights(self)

    def forward(self, ids_BT):
        """ids_BT: int64, the last class being the boundary. Returns logits [B, T, V]; those at t are for id t + 1."""
        if ids_BT.dim() != 2:
            raise ValueError(f"ids must be [B, T], not {list(ids_BT.shape)}")
        config = self.config
        plan = AttentionPlan(
            documents_of(ids_BT, self.n_classes - 1), config.dim // config.heads, config.rope_theta, config.window
        )
        x_BTD = self.dropout(self.embedding(ids_BT))
        for block in self.blocks:
            x_BTD, _ = block(x_BTD, plan)
        return self.head(self.norm(x_BTD))

    def parameters_by_part(self):
        """{"embedding", "layers", "head": number of parameters}; the parts sum to the whole."""
        count = lambda *modules: sum(p.numel() for module in modules for p in module.parameters())  # noqa: E731
        return {"embedding": count(self.embedding), "layers": count(self.blocks, self.norm), "head": count(self.head)}


class FlatByteTransformer(PlainTransformer):
    """A plain causal transformer over bytes with windowed attention: `forward(ids_BT)` gives logits [B, T, 257].

    Ids 0..255 are bytes, 256 is the document boundary. Every byte costs the same: what patches must beat at equal cost.
    """

    def __init__(self, config):
        super().__init__(config, BYTES)


class BPETransformer(PlainTransformer):
    """A plain causal transformer over BPE tokens: `forward(ids_BT)` gives logits [B, T, tokens + 1].

    vocabulary: `BPEVocabulary`; the model carries it, so that `bits_per_byte(model, None, documents)` takes raw bytes as it does for
    every other model. That number counts the nats of all tokens and document ends over the raw bytes. It is the cost of one
    tokenisation of each document: an upper bound on what the model's distribution over texts costs, since other token sequences
    that spell the same bytes have some probability too.

    The paper compares with transformers over the tokens of Llama 2 and Llama 3, 32 and 128 thousand, learned elsewhere; here the tokens
    are few and learned from the training text, so that nothing but that text stands behind the number.
    """


def train_template(model, stream, validation, config):
    """Train a `PlainTransformer`. The leak gate runs before the first step and stops a model that sees ahead.

    stream: `DocumentStream` of the training documents in the model's ids. validation: list of uint8 documents. config: a `RunConfig`
    with an `output` folder. Returns `fit`'s dict and byte_padding. val_loss is in nats per target and val_accuracy is of targets: for BPE
    of tokens. The best weights are in output/best.pt and are in the model afterwards.
    """
    vocabulary = model.vocabulary
    if stream.vocabulary is not vocabulary:
        raise ValueError(
            "the training stream is not of the model's ids; make it with training_stream(corpus, numbers, model.vocabulary)"
        )
    row_ids = vocabulary.row_ids(config.row_bytes)
    train_rows = TrainingRows(stream, row_ids)
    validation_ids = [vocabulary.encode(document) for document in validation]
    batches = list(evaluation_batches(validation_ids, None, row_ids, config.batch_rows, vocabulary=vocabulary))
    print(f"leak gate passed: largest difference {leak_gate(model, None, np.concatenate(validation[:8])):.1e} nats")
    unit, padding = "bytes" if vocabulary is BYTES else "tokens", train_rows.padding()[0]
    print(f"rows: {len(train_rows):,} of {row_ids:,} {unit} | padding {padding:.1%}")
    result = fit(model, config, train_rows, batches, config.output)
    load_weights(Path(config.output) / "best.pt", model)
    return {**result, "byte_padding": padding}


def training_stream(corpus, numbers, vocabulary=BYTES):
    """The `DocumentStream` of a corpus's documents in a vocabulary's ids: bytes as they lie on disk, tokens in memory."""
    if vocabulary is BYTES:
        return DocumentStream.of_corpus(corpus, numbers)
    return DocumentStream.of_documents(vocabulary.encode_all(corpus.document(number) for number in numbers), vocabulary)


def make_tokenizer(config, corpus):
    """Train the BPE on the first training documents; a resumed run takes the one that it began with."""
    if config.resume:
        return read_tokenizer(config.output, "nothing to resume; run without --resume")
    wanted = min(config.tokenizer_bytes, config.max_bytes or config.tokenizer_bytes)
    numbers = corpus.documents("train", wanted)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(
            (corpus.document(number) for number in numbers), config.vocab_size, Path(folder) / "tokenizer.json"
        )
    if tokenizer.get_vocab_size() < config.vocab_size:
        print(f"note: this text gives {tokenizer.get_vocab_size():,} tokens only, not {config.vocab_size:,}")
    return tokenizer


def read_tokenizer(folder, advice):
    """The tokenizer.json of an output folder, or FileNotFoundError with this advice."""
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} not found: {advice}")
    return load_tokenizer(path)


def load_template(folder, device="cpu"):
    """Read a trained baseline from its output folder: (FlatByteTransformer or BPETransformer, the record in model.json).

    `bits_per_byte(model, None, documents, record["settings"]["row_bytes"])` scores it. Raises FileNotFoundError or ValueError
    saying what to do.
    """
    folder = Path(folder)
    for file in (folder / "model.json", folder / "best.pt"):
        if not file.exists():
            raise FileNotFoundError(f"{file} not found; run: python template_llm.py --model flat --output {folder}")
    record = json.loads((folder / "model.json").read_text())
    if record.get("model") not in SIZES:
        raise ValueError(f"{folder} holds no baseline; a BLT is read with train_blt.load_blt")
    if record["model"] == "flat":
        model = FlatByteTransformer(FlatConfig(**record["model_config"]))
    else:
        tokenizer = read_tokenizer(folder, f"run: python template_llm.py --model bpe --output {folder}")
        model = BPETransformer(BPEConfig(**record["model_config"]), BPEVocabulary(tokenizer, record["bytes_per_token"]))
    load_weights(folder / "best.pt", model)
    return model.to(device).eval(), record


def main(config):
    set_seed(config.seed)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    print_header(config, device, precision)
    corpus = config.corpus()
    train = corpus.documents("train", config.max_bytes)
    validation = [corpus.document(number) for number in corpus.documents("validation", config.val_bytes)]
    train_bytes = int(np.diff(corpus.offsets)[train].sum())
    sizes = {field.name: getattr(config, field.name) for field in fields(FlatConfig)}
    tokenizer = None
    if config.model == "flat":
        stream = training_stream(corpus, train)
        model_config = FlatConfig(**sizes)
        model = FlatByteTransformer(model_config)
    else:
        began = time.perf_counter()
        tokenizer = make_tokenizer(config, corpus)
        vocabulary = BPEVocabulary(tokenizer)
        stream = training_stream(corpus, train, vocabulary)
        vocabulary.bytes_per_id = train_bytes / int(stream.lengths.sum())
        print(
            f"tokens: {vocabulary.boundary:,} in the vocabulary, {vocabulary.bytes_per_id:.3f} bytes a token in training text "
            f"({time.perf_counter() - began:.1f} s); loss and accuracy below are per token, bpb per byte"
        )
        model_config = BPEConfig(**sizes)
        model = BPETransformer(model_config, vocabulary)
    model = model.to(device)
    parts = model.parameters_by_part()
    print(
        f"{config.model}: {sum(parts.values()):,} parameters ("
        + ", ".join(f"{part} {count:,}" for part, count in parts.items())
        + ")"
    )
    epochs = config.steps * config.accumulate * config.batch_rows * config.row_bytes / train_bytes
    print(f"training text {train_bytes:,} bytes, {epochs:.2f} epochs")

    record = {
        "model": config.model, "model_config": asdict(model_config), "bytes_per_token": model.vocabulary.bytes_per_id,
        "corpus": {"dataset": config.dataset, "sha256": corpus.hash}, "settings": asdict(config),
    }  # fmt: skip
    output = Path(config.output)
    if not config.resume:
        write_json(output / "model.json", record)  # now, so that an interrupted run can be used too
        if tokenizer is not None:
            write_atomically(output / "tokenizer.json", tokenizer.save)
    result = train_template(model, stream, validation, config)
    write_json(output / "model.json", {**record, "result": result})
    training_curves(output / "curves.png", output, model.vocabulary.bytes_per_id)
    print(f"trained {result['train_seconds']:.0f} s at {result['bytes_per_second'] / 1e3:.1f} kB/s")
    print(result_line(result, validation))
    print(
        f"wrote {output}/best.pt, model.json, {'tokenizer.json, ' if tokenizer is not None else ''}metrics.jsonl, curves.png"
    )
    other = "bpe" if config.model == "flat" else "flat"
    print(
        f"next: python template_llm.py --model {other}"
        + (f" --preset {' '.join(config.preset)}" if config.preset else "")
    )


if __name__ == "__main__":
    run_script(main, TemplateConfig, __doc__, PRESETS)
