"""Train a baseline for the Byte Latent Transformer: a flat byte transformer or a BPE transformer, in llm.py's harness.

flat: one causal transformer over bytes, without patches.
bpe: the same over the tokens of a byte-level BPE that is trained here. Both are scored in bits
per byte of the same held-out bytes by the same functions as the BLT. No entropy model is needed.
With --ngram_sizes both have the n-gram hash tables of the BLT: of bytes, or of tokens.

Reads   a corpus (the bundled sample by default)
Writes  checkpoints_flat/ or checkpoints_bpe/: best.pt (weights), model.json (what made it), tokenizer.json (bpe),
        last.pt, metrics.jsonl, curves.png
Run     python template_llm.py --model flat | bpe [--preset [SIZE] [MACHINE]] [--field value ...]
Time    8 minutes on one CPU core (size nano), for either model

Sizes and machines are llm.py's. A training byte costs as much computation as in llm.py of the
same size (`SHAPES`), and rows, updates, rates and data are llm.py's too.
"""

import hashlib
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn

from blt.attention import AttentionPlan
from blt.checkpoints import has_checkpoint
from blt.checks import check, check_packages, check_positive, check_shares
from blt.commands import command
from blt.config import BY_PRESET, Presets, next_command, part_of, run_script
from blt.files import load_weights
from blt.flops import transformer_flops
from blt.ids import BOUNDARY, BYTES, documents_of
from blt.layers import Block, RMSNorm, as_stream, default_heads, embed, init_weights, logits_of, zero_outputs
from blt.loop import RunConfig, choose_dropout, fit
from blt.metric import leak_gate
from blt.ngrams import HashEmbedding, TableConfig, check_tables, hash_spans
from blt.patch_rules import SpaceRule
from blt.processes import from_main
from blt.records import RunRecord, load_model, read_record
from blt.rows import DocumentStream, TrainingRows, evaluation_batches
from blt.runs import claim_output, finish_run, print_model, start_run
from blt.segments import PatchMap
from blt.tokens import BPEVocabulary, load_tokenizer, save_tokenizer, tokenizer_of, train_tokenizer
from llm import MACHINES, PAIRS, LLMConfig

# (width, layers, window) of the model for each size of llm.py. They are chosen for equal cost. Millions of
# multiply-adds that a forward pass makes per byte, attention included, with full rows of one document, 4.5 bytes a
# patch and 3.57 bytes a token (a training byte costs six times as many FLOPs):
#   size      llm.py   flat    bpe
#   nano        0.71   0.69   0.71
#   tiny        2.14   2.05   2.22
#   small       5.57   5.55   5.39
#   medium     11.72  11.98  11.78
#   large      93.9   94.3   94.8
SHAPES = {
    "flat": {
        "nano": (96, 4, 320), "tiny": (160, 4, 512), "small": (256, 5, 512), "medium": (320, 7, 512),
        "large": (768, 12, 512),
    },
    "bpe": {
        "nano": (144, 5, None), "tiny": (256, 6, None), "small": (384, 8, None), "medium": (512, 10, None),
        "large": (1024, 22, None),
    },
}  # fmt: skip


@dataclass
class FlatConfig(TableConfig):
    """What a flat byte transformer is."""

    dim: int = 320  # width
    n_layers: int = 7  # transformer layers
    n_heads: int | None = None  # attention heads; None: heads of about 64 channels
    ngram_sizes: list[int] = field(default_factory=list)  # ids in the hashed n-grams; none: no hash tables
    patch_ngrams: list[int] = field(default_factory=list)  # n-grams that begin this many words before a byte's own
    gate_ngrams: list[int] = field(default_factory=list)  # n-grams that scale what attention reads
    hash_rows: int = 16384  # rows of each n-gram size's table; above 32,768 only the rows that occur are updated
    ngram_dropout: float = 0.0  # share of the n-grams that training leaves out, each id's of each size by chance
    window: int | None = 512  # ids that an id attends to, itself included; None: the whole row
    rope_theta: float = 500000.0  # base of the rotary embedding's wavelengths
    norm_eps: float = 1e-5  # RMSNorm's epsilon
    qk_norm: bool = False  # RMSNorm of queries and keys in self-attention
    relu2: bool = False  # squared ReLU instead of SwiGLU: 1.5 times as wide, so of equal FLOPs
    logit_softcap: float = 0.0  # logits become cap * tanh(logits / cap); 0: as they are
    dropout: float = 0.0  # dropout rate

    # Fields that the records of earlier models lack. Their defaults are what those models were.
    ADDED_FIELDS = (
        "ngram_sizes", "patch_ngrams", "gate_ngrams", "hash_rows", "ngram_dropout", "relu2", "logit_softcap",
    )  # fmt: skip

    def __post_init__(self):
        check_positive(self, "dim", "n_layers", "n_heads", "window", "rope_theta", "norm_eps")
        check_tables(self)
        check(self, "dim", self.dim % (2 * self.heads) == 0, f"a multiple of 2 * n_heads = {2 * self.heads}")
        check_shares(self, "dropout")
        check(self, "logit_softcap", self.logit_softcap >= 0, "0 (no cap) or more")

    @property
    def heads(self):
        """Attention heads of a layer."""
        return default_heads(self.dim) if self.n_heads is None else self.n_heads


@dataclass
class BPEConfig(FlatConfig):
    """What a BPE transformer is."""

    dim: int = 512  # width
    n_layers: int = 10  # transformer layers
    window: int | None = None  # tokens that a token attends to, itself included; None: the whole row


# The BPE model's rates as multiples of those of the models of bytes: the best of the trials at size nano
# in docs/baselines.md.
BPE_RATES = {"lr": 0.5, "adam_lr": 4.0}


def _without_own(values):
    """A preset of llm.py without what this script chooses itself."""
    return {name: value for name, value in values.items() if name not in ("hash_rows", *BPE_RATES)}


@dataclass
class TemplateConfig(RunConfig, FlatConfig):
    """Settings of this script. A value written in place of BY_PRESET takes effect with every preset."""

    # model
    model: Literal["flat", "bpe"] = "flat"  # flat: transformer over bytes; bpe: over BPE tokens
    dim: int | None = None  # width; None: by model and size (SHAPES)
    n_layers: int | None = None  # transformer layers; None: by model and size (SHAPES)
    window: int | None = None  # ids that one attends to, itself included; None: by model and size, bpe: all of the row
    ngram_sizes: list[int] = field(default_factory=list)  # bytes (bpe: tokens) in the hashed n-grams; none: no tables
    patch_ngrams: list[int] = field(default_factory=list)  # flat: n-grams that begin this many words before
    gate_ngrams: list[int] = field(default_factory=list)  # n-grams that scale what attention reads
    hash_rows: int | None = None  # rows of each n-gram size's table; None: by table_parameters
    table_parameters: int | None = None  # numbers in all tables together; None: as many as llm.py's of this size have
    vocab_size: int = 4096  # bpe: tokens in the vocabulary, the 256 bytes included
    ngram_dropout: float | None = None  # share of the n-grams that training leaves out; None: 0, or 0.3 as dropout
    dropout: float | None = None  # dropout rate; None: 0, or 0.1 if the text is read more than 1.5 times
    tokenizer_bytes: int = 10_000_000  # bpe: the tokenizer learns from at most this many bytes of the training text
    # run
    lr: float | None = None  # peak learning rate of the matrices (Muon); None: llm.py's, bpe: times BPE_RATES
    adam_lr: float | None = None  # of embedding, output head and norms (AdamW); None: llm.py's, bpe: times BPE_RATES
    steps: int = BY_PRESET  # updates
    row_bytes: int = BY_PRESET  # bytes in a row; bpe: a row has the number of tokens that hold about as many bytes
    batch_rows: int = BY_PRESET  # rows in one forward and backward pass
    accumulate: int = BY_PRESET  # passes whose gradients are summed into one update
    max_bytes: int | None = BY_PRESET  # use at most this many bytes of the training documents; None: all
    val_bytes: int = BY_PRESET  # use at most this many bytes of the validation documents
    eval_every: int = BY_PRESET  # updates between evaluations
    log_every: int = BY_PRESET  # updates between log lines
    compile: Literal["auto", "yes", "no"] = BY_PRESET  # torch.compile; auto: on CUDA
    output: str | None = None  # folder for weights, metrics and curves; None: checkpoints_flat or checkpoints_bpe

    # What follows from the model is no preset's: rates, and the rows of the tables.
    PRESETS = Presets(
        {size: {} for size in SHAPES["flat"]},
        {machine: _without_own(values) for machine, values in MACHINES.items()},
        {pair: _without_own(values) for pair, values in PAIRS.items()},
    )

    def __post_init__(self):
        RunConfig.__post_init__(self)
        check(self, "model", self.model in SHAPES, "flat or bpe")
        if self.model == "bpe" and self.patch_ngrams:
            raise ValueError("patch_ngrams are n-grams of bytes: they need --model flat")
        size = self.preset[0]
        dim, n_layers, window = SHAPES[self.model][size]
        self.dim = dim if self.dim is None else self.dim
        self.n_layers = n_layers if self.n_layers is None else self.n_layers
        self.window = window if self.window is None else self.window
        if self.output is None:
            self.output = f"checkpoints_{self.model}"
        self._choose_rates()
        self._choose_hash_rows()
        FlatConfig.__post_init__(self)
        check(self, "vocab_size", 256 <= self.vocab_size <= 1 << 20, "from 256, the bytes alone, to 1,048,576")
        check_positive(self, "tokenizer_bytes")

    def _choose_rates(self):
        """Choose the rates that are None, from those of llm.py with the same presets."""
        blt = LLMConfig(preset=self.preset)
        for name, of_bpe in BPE_RATES.items():
            if getattr(self, name) is None:
                setattr(self, name, getattr(blt, name) * (of_bpe if self.model == "bpe" else 1.0))

    def _choose_hash_rows(self):
        """Choose the rows of each table so that all tables together have table_parameters numbers, nearly."""
        check_positive(self, "dim", "table_parameters")
        if self.n_tables == 0:
            if self.table_parameters is not None:
                raise ValueError(
                    "table_parameters needs --ngram_sizes, --patch_ngrams or --gate_ngrams; "
                    "without them there are no tables"
                )
            self.hash_rows = FlatConfig.hash_rows if self.hash_rows is None else self.hash_rows
            return
        n_numbers = self.table_parameters
        if n_numbers is None:
            n_numbers = LLMConfig(preset=self.preset).table_numbers
        rows = max(1, round(n_numbers / (self.n_tables * self.dim)))
        if self.hash_rows is None:
            self.hash_rows = rows
        elif self.table_parameters is not None and self.hash_rows != rows:
            raise ValueError("give either hash_rows or table_parameters, not both: one follows from the other")


# The models


class PlainTransformer(nn.Module):
    """A causal transformer over ids: embedding, blocks, norm, head. Attention keeps documents apart, as in the BLT.

    With hash tables, the sum of each id's n-gram embeddings is added to its embedding, as in
    the BLT's encoder. With gates, what each layer's attention reads is multiplied, as what the BLT's
    decoder reads from patches.

    vocabulary: what the ids mean (`ids.Vocabulary`). Its boundary opens a document as input and
    ends it as target, so there is one class for each id and one for the document's end.
    """

    def __init__(self, config, vocabulary):
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.n_classes = vocabulary.boundary + 1
        self.embedding = nn.Embedding(self.n_classes, config.dim)
        self.hash_embedding = None
        if config.n_embedding_tables:
            self.hash_embedding = HashEmbedding(
                config.ngram_sizes,
                config.hash_rows,
                config.dim,
                vocabulary.boundary,
                config.ngram_dropout,
                len(config.patch_ngrams),
            )
        self.gate_embedding = None
        if config.gate_ngrams:
            sizes = (config.gate_ngrams, config.hash_rows, config.dim)
            self.gate_embedding = HashEmbedding(*sizes, vocabulary.boundary, config.ngram_dropout)
        if config.patch_ngrams:
            is_space_like = torch.from_numpy(SpaceRule.is_space_like)
            self.register_buffer("is_space_like", is_space_like, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, config.norm_eps, config.qk_norm, config.dropout, relu2=config.relu2)
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
        documents_BT = documents_of(ids_BT, self.n_classes - 1)
        plan = AttentionPlan(documents_BT, config.dim // config.heads, config.rope_theta, config.window)
        x_BTD = embed(self.embedding, ids_BT)
        hash_embedding = self.hash_embedding
        if hash_embedding is not None:
            spans_BTS = None
            if config.patch_ngrams:
                words = PatchMap(space_patch_lengths(ids_BT, self.is_space_like), documents_BT)
                spans_BTS = hash_spans(ids_BT, words.starts_before(config.patch_ngrams))
            x_BTD = x_BTD + hash_embedding.embed(hash_embedding, ids_BT, documents_BT, spans_BTS)
        x_BTD = self.dropout(as_stream(x_BTD))
        gates_BTD = None
        gate_embedding = self.gate_embedding
        if gate_embedding is not None:
            gates_BTD = gate_embedding.embed(gate_embedding, ids_BT, documents_BT)
        for block in self.blocks:
            x_BTD, _ = block(x_BTD, plan, gates_BTD=gates_BTD)
        return logits_of(self.head, self.norm(x_BTD), config.logit_softcap)

    def parameters_by_part(self):
        """{"hash embedding", "embedding", "layers", "head": number of parameters}; the parts sum to the whole."""
        parts = {
            "hash embedding": [x for x in (self.hash_embedding, self.gate_embedding) if x is not None],
            "embedding": [self.embedding],
            "layers": [self.blocks, self.norm],
            "head": [self.head],
        }
        return {
            part: sum(p.numel() for module in modules for p in module.parameters()) for part, modules in parts.items()
        }


def space_patch_lengths(ids_BT, is_space_like_V):
    """The space patches of rows of bytes as `BLTModel` takes them: int64 [B, T + 1], each row's sum T + 1.

    is_space_like_V: `patch_rules.SpaceRule.is_space_like`. A row's first id is a patch of its own, and so
    is a boundary.
    """
    B, T = ids_BT.shape
    is_space_BT = is_space_like_V[ids_BT]
    is_boundary_BT = ids_BT == BOUNDARY
    begins_BT = is_boundary_BT.clone()
    begins_BT[:, :2] = True
    begins_BT[:, 1:] |= is_boundary_BT[:, :-1]
    begins_BT[:, 2:] |= is_space_BT[:, 1:-1] & ~is_space_BT[:, :-2]
    # Patch p begins at the first id whose patch number is p. Patches that do not exist have no id.
    number_BT = begins_BT.cumsum(dim=1) - 1
    patches = torch.arange(T + 2, device=ids_BT.device).expand(B, T + 2).contiguous()
    first_id_BP = torch.searchsorted(number_BT, patches)
    return first_id_BP.masked_fill(first_id_BP == T, T + 1).diff(dim=1)


class FlatByteTransformer(PlainTransformer):
    """A plain causal transformer over bytes with windowed attention: `forward(ids_BT)` gives logits [B, T, 257].

    Ids 0..255 are bytes, 256 is the document boundary. Every byte goes through the whole model.
    This is the baseline that a BLT has to beat at equal FLOPs.
    """

    def __init__(self, config):
        super().__init__(config, BYTES)


class BPETransformer(PlainTransformer):
    """A plain causal transformer over BPE tokens: `forward(ids_BT)` gives logits [B, T, tokens + 1].

    vocabulary: `BPEVocabulary`; the model carries it, so that `bits_per_byte(model, None,
    documents)` takes raw bytes as it does for every other model. That number counts the nats of
    all tokens and document ends over the raw bytes. It is the cost of one tokenisation of each
    document: an upper bound on what the model's distribution over texts costs, since other token
    sequences that spell the same bytes have some probability too.

    The paper compares with transformers over the tokens of Llama 2 and Llama 3, 32 and 128 thousand,
    learned elsewhere. Here the tokens are few and learned from the training text, so that the number
    depends on that text alone.
    """


def make_model(config, vocabulary):
    """A new model for a `TemplateConfig`, and the `FlatConfig` or `BPEConfig` that describes it."""
    if config.model == "flat":
        model_config = part_of(config, FlatConfig)
        model = FlatByteTransformer(model_config)
    else:
        model_config = part_of(config, BPEConfig)
        model = BPETransformer(model_config, vocabulary)
    if config.zero_init:
        zero_outputs(model)
    return model, model_config


# Training


def train_template(model, stream, validation, config, depends_on=None, begin=None):
    """Train a `PlainTransformer`. The leak gate runs first and stops a model that sees ahead.

    stream: `DocumentStream` of the training documents in the model's ids.
    validation: list of uint8 documents.
    config: a `RunConfig` with an `output` folder.
    depends_on, begin: as in `loop.fit`.
    Returns `fit`'s dict, byte_padding, and flops_per_byte of a forward pass. val_loss is in nats per
    target and val_accuracy is of targets, which are tokens for BPE. The best weights are in
    output/best.pt, and in the model afterwards.
    """
    vocabulary = model.vocabulary
    if stream.vocabulary is not vocabulary:
        raise ValueError(
            "the training stream is not of the model's ids; "
            "make it with training_stream(corpus, numbers, model.vocabulary)"
        )
    row_ids = vocabulary.row_ids(config.row_bytes)
    train_rows = TrainingRows(stream, row_ids)
    validation_ids = [vocabulary.encode(document) for document in validation]
    batches = list(evaluation_batches(validation_ids, None, row_ids, config.batch_rows, vocabulary=vocabulary))
    print(f"leak gate passed: largest difference {leak_gate(model, None, np.concatenate(validation[:8])):.1e} nats")
    unit = "bytes" if vocabulary is BYTES else "tokens"
    byte_padding = train_rows.padding()[0]
    print(f"rows: {len(train_rows):,} of {row_ids:,} {unit} | padding {byte_padding:.1%}")
    result = fit(model, config, train_rows, batches, config.output, depends_on, begin)
    load_weights(Path(config.output) / "best.pt", model)
    c = model.config
    flops = transformer_flops(c.dim, c.n_layers, model.n_classes, train_rows.document_parts(), c.window)
    flops_per_byte = sum(flops.values()) / vocabulary.bytes_per_id
    return {**result, "byte_padding": byte_padding, "flops_per_byte": flops_per_byte}


def training_stream(corpus, numbers, vocabulary=BYTES):
    """The `DocumentStream` of a corpus's documents in a vocabulary's ids: bytes on disk, or tokens in memory."""
    if vocabulary is BYTES:
        return DocumentStream.of_corpus(corpus, numbers)
    encoded = vocabulary.encode_all(corpus.document(number) for number in numbers)
    return DocumentStream.of_documents(encoded, vocabulary)


def make_tokenizer(config, corpus):
    """Train the BPE on the first training documents; a resumed run takes the one that it began with."""
    if config.resume and has_checkpoint(config.output):
        return read_tokenizer(config.output, "nothing to resume; run without --resume")
    limit = config.tokenizer_bytes
    if config.max_bytes is not None:
        limit = min(limit, config.max_bytes)
    documents = (corpus.document(number) for number in corpus.documents("train", limit))

    def train_new():
        with tempfile.TemporaryDirectory() as folder:
            return train_tokenizer(documents, config.vocab_size, Path(folder) / "tokenizer.json").to_str()

    tokenizer = tokenizer_of(from_main(train_new))
    if tokenizer.get_vocab_size() < config.vocab_size:
        print(f"note: this text gives {tokenizer.get_vocab_size():,} tokens only, not {config.vocab_size:,}")
    return tokenizer


def read_tokenizer(folder, advice):
    """The tokenizer.json of an output folder, or FileNotFoundError with this advice."""
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} not found: {advice}")
    return load_tokenizer(path)


def hash_of_tokenizer(tokenizer):
    """sha256 (hex) of what a tokenizer's file holds."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def load_template(folder, device="cpu"):
    """Read a trained baseline from its output folder: (FlatByteTransformer or BPETransformer, RunRecord).

    `bits_per_byte(model, None, documents, record.settings["row_bytes"])` scores it.
    Raises FileNotFoundError or ValueError saying what to do.
    """
    folder = Path(folder)
    record = read_record(folder, "flat", "bpe")
    retrain = command("template_llm.py", model=record.kind, output=folder)

    def make():
        if record.kind == "flat":
            return FlatByteTransformer(record.config(FlatConfig))
        tokenizer = read_tokenizer(folder, f"run: {retrain}")
        # Records of before had no hash.
        if record.tokenizer_sha256 not in (None, hash_of_tokenizer(tokenizer)):
            raise ValueError(
                f"{folder / 'tokenizer.json'} is not the one of the model beside it; restore it, or run: {retrain}"
            )
        vocabulary = BPEVocabulary(tokenizer, record.bytes_per_token)
        return BPETransformer(record.config(BPEConfig), vocabulary)

    model = load_model(make, folder / "best.pt", record, retrain)
    return model.to(device).eval(), record


def main(config):
    if config.model == "bpe":
        check_packages("tokenizers")
        tokenizer, record = (Path(config.output) / name for name in ("tokenizer.json", "model.json"))
        if tokenizer.exists() and not record.exists():
            raise ValueError(f"{tokenizer} is of no model of this script, and would be replaced; give another --output")
    with claim_output(config, config.output):
        train(config)


def train(config):
    """One training run, with the output folder held."""
    run = start_run(config)
    train_bytes = int(np.diff(run.corpus.offsets)[run.train].sum())
    vocabulary, tokenizer = BYTES, None
    if config.model == "bpe":
        began = time.perf_counter()
        tokenizer = make_tokenizer(config, run.corpus)
        vocabulary = BPEVocabulary(tokenizer)
    stream = training_stream(run.corpus, run.train, vocabulary)
    if config.model == "bpe":
        vocabulary.bytes_per_id = train_bytes / int(stream.lengths.sum())
        print(
            f"tokens: {vocabulary.boundary:,} in the vocabulary, {vocabulary.bytes_per_id:.3f} bytes a token "
            f"in training text ({time.perf_counter() - began:.1f} s); "
            "loss and accuracy below are per token, bpb per byte"
        )
    config.choose_steps(TrainingRows(stream, vocabulary.row_ids(config.row_bytes)))
    choose_dropout(config, stream)
    model, model_config = make_model(config, vocabulary)
    model = model.to(run.device)
    print_model(config.model, model.parameters_by_part(), config, train_bytes)

    tokenizer_sha256 = None if tokenizer is None else hash_of_tokenizer(tokenizer)
    record = RunRecord(
        kind=config.model,
        model_config=asdict(model_config),
        settings=asdict(config),
        corpus=config.corpus_facts(run.corpus),
        bytes_per_token=vocabulary.bytes_per_id if config.model == "bpe" else None,
        tokenizer_sha256=tokenizer_sha256,
    )
    output = Path(config.output)

    is_resumed = config.resume and has_checkpoint(output)

    def begin():
        # Before training, so that an interrupted run can be used too.
        record.save(output / "model.json")
        if tokenizer is not None and not is_resumed:
            save_tokenizer(output / "tokenizer.json", tokenizer)

    depends_on = {
        "kind": record.kind,
        **record.model_config,
        "corpus_sha256": run.corpus.hash,
        "tokenizer_sha256": tokenizer_sha256,
    }
    result = train_template(model, stream, run.validation, config, depends_on, begin)
    paths = (output, output / "best.pt", output / "model.json")
    finish_run(model, record, result, run, *paths, vocabulary.bytes_per_id)
    other = "bpe" if config.model == "flat" else "flat"
    print("next: " + next_command("template_llm.py", config, model=other))


if __name__ == "__main__":
    run_script(main, TemplateConfig, __doc__)
