"""What test_fake_cuda.py runs in processes of their own: fake_cuda_graphs.py options|second_model|entropy_pass|...

They believe in a CUDA device that is not there (`../shared/fake_cuda`), trace and lower code for it, and print
what they found as one line of JSON. Nothing is computed.
"""

import json
import sys
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

# Before torch, which it changes.
import fake_cuda
import fake_triton  # noqa: F401
import numpy as np
import torch
import torch._dynamo
import torch._inductor.compile_fx as compile_fx
import torch._inductor.config as inductor_config
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.fx_passes.post_grad as post_grad
import torch._inductor.graph as inductor_graph
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import blt_model
import entropy_llm
from blt import loop, segments
from blt.entropies import entropies_of_chunk, entropy_of
from blt.metric import RowLosses
from blt.training import PatchedDataset
from entropy_patcher import EntropyPatcher

SMALL = dict(
    encoder_dim=64, global_dim=64, decoder_dim=64, global_layers=1, decoder_layers=1, hash_rows=64, window=64
)  # fmt: skip
OPTIONS = {
    "as trained": {},
    "qk_norm": dict(qk_norm=True),
    "mean pooling": dict(pooling="mean"),
    "cross-attention at all layers": dict(encoder_layers=2, cross_attn_all_layers_encoder=True),
    "cross-attention at one layer": dict(cross_attn_all_layers_decoder=False),
    "k = 4": dict(cross_attn_k=4),
    "no n-grams": dict(ngram_sizes=[]),
    "patch n-grams, gates": dict(patch_ngrams=[0, 1], gate_ngrams=[2, 3]),
    "dropout": dict(dropout=0.1),
    "squared ReLU and soft cap": dict(relu2=True, logit_softcap=15.0),
    "dropout of n-grams": dict(ngram_dropout=0.1),
    "recompute": dict(recompute=True),
    "recompute with dropout": dict(recompute=True, dropout=0.1),
    "heads of 512": dict(global_dim=512, global_heads=1),
    "heads of 8": dict(encoder_heads=8, decoder_heads=8),
}


def fake_tensors():
    """Tensors without memory, and models without initial weights."""
    blt_model.init_weights = lambda model: None
    entropy_llm.init_weights = lambda model: None
    # The pretended card has no generators of random numbers.
    torch._functorch.config.graphsafe_rng_functionalization = False
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    return FakeTensorMode(allow_non_fake_inputs=True)


def small_model(**changes):
    """A small BLT on the pretended card, which is there once its weights are made."""
    fake_cuda.available(False)
    with torch.device("cuda"):
        model = blt_model.BLTModel(blt_model.BLTConfig(**SMALL | changes))
    fake_cuda.available(True)
    return model


def options(*names):
    """{option: graphs, graph breaks, compilations after the first step, FlexAttention's nodes}."""
    return {name: graphs_of(OPTIONS[name]) for name in names or OPTIONS}


def graphs_of(changes):
    """What torch.compile makes of two training steps of a model."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = {"flex": 0}

    def count(graph, inputs):
        found["flex"] += sum("flex" in str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    with fake_tensors():
        compiled = torch.compile(RowLosses(small_model(**changes)), backend=backend, dynamic=False)
        for step in range(2):
            training_pass(compiled, 2, 256, 80)
            if step == 0:
                first = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    breaks = list(torch._dynamo.utils.counters["graph_break"])
    return found | {"graphs": graphs, "later": graphs - first, "breaks": breaks}


def training_pass(row_losses, n_rows, row_bytes, n_patches):
    """A forward and a backward pass in bf16."""
    ids = torch.zeros(n_rows, row_bytes + 1, dtype=torch.int64, device="cuda")
    is_scored = torch.ones(n_rows, row_bytes, dtype=torch.bool, device="cuda")
    patch_lengths = torch.ones(n_rows, n_patches, dtype=torch.int64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        nats_BT = row_losses(ids, is_scored, patch_lengths)
    nats_BT.sum().backward()


class Lowered(Exception):
    """Inductor has made the code of a graph, which is all that is wanted."""


def lower(self):
    """In place of Inductor's compilation of the code that it has made."""
    self.codegen()
    raise Lowered


def lower_only():
    """Let Inductor make the code of graphs, and do nothing with it."""
    inductor_config.fx_graph_cache = False
    inductor_config.shape_padding = False
    inductor_config.joint_graph_constant_folding = False
    inductor_graph.GraphLowering.compile_to_module = lower
    inductor_graph.GraphLowering._compile_to_module = lower
    joint_graph.lazy_init = lambda *more, **named: None
    post_grad.lazy_init = lambda *more, **named: None


def lowering_backend(codes):
    """A torch.compile backend that lowers both passes for the card; each adds whether it was static to codes."""

    def compiler(is_backward):
        def compile_graph(graph, inputs):
            try:
                with torch.no_grad():
                    compile_fx.compile_fx_inner(graph, inputs, is_backward=is_backward)
            except Exception as error:
                cause = error
                while cause is not None and not isinstance(cause, Lowered):
                    cause = cause.__cause__ or cause.__context__
                if cause is None:
                    raise
            is_static = not any(isinstance(number, torch.SymInt) for number in inputs)
            codes.append([is_backward, is_static])
            return make_boxed_func(graph.forward)

        return compile_graph

    return aot_autograd(
        fw_compiler=compiler(False),
        bw_compiler=compiler(True),
        partition_fn=lambda graph, inputs, **more: min_cut_rematerialization_partition(
            graph, inputs, compiler="inductor", **more
        ),
        decompositions=select_decomp_table(),
    )


def second_model():
    """Two runs in one process whose rows have other numbers of patches: [is backward, is static] of each graph."""
    lower_only()
    codes = []
    backend = lowering_backend(codes)
    torch_compile = torch.compile
    torch.compile = lambda model, **named: torch_compile(model, backend=backend, **named)
    # A fake tensor has no number to read.
    torch.Tensor.item = lambda tensor: 0.0
    # Triton's kernels are traced, but cannot be launched.
    segments.runs_triton = lambda device: torch.compiler.is_compiling()
    # Nor can it be looked at for zeros.
    loop.without_zeros = lambda model: nullcontext()
    documents = [np.random.default_rng(i).integers(97, 110, 3000, dtype=np.uint8) for i in range(8)]
    slots = []
    for patch_size in (4, 7):
        patcher = EntropyPatcher(None, threshold=patch_size, method="static")
        data = PatchedDataset.from_documents(documents, documents[:1], patcher, 1024, 2)
        slots.append(data.train_rows.patch_slots)
        config = loop.RunConfig(row_bytes=1024, batch_rows=2)
        # Rows are checked by value as they are made, and a fake tensor has no values.
        batch = data.train_rows.shuffled_batch(0, config.batch_rows, config.seed)
        mode = fake_tensors()
        fake_batch = batch._with_tensors(mode.from_tensor)
        rows = SimpleNamespace(shuffled_batch=lambda *_, batch=fake_batch: batch, patch_slots=slots[-1])
        with mode:
            loop.compile_losses(small_model(), config, rows, torch.device("cuda"), "bf16")
    return {"codes": codes, "slots": slots}


class LiveBytes(TorchDispatchMode):
    """The bytes of tensors on the card that are alive, and the most at any time."""

    def __init__(self):
        super().__init__()
        self.live = {}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), named=None):
        result = function(*args, **(named or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                self.add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def add(self, storage):
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            self.now += self.live[key]
            weakref.finalize(storage, self.free, key)

    def free(self, key):
        self.now -= self.live.pop(key, 0)


def efficient_attention(q, k, v, attn_mask=None):
    """In place of torch's attention: the kernel that a real card takes; the pretended one takes another."""
    bias = None
    if attn_mask is not None:
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -torch.inf).expand(shape)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, 0.0, False)[0]


def entropy_pass():
    """{streams: peak bytes} of two chunks of 2,048 positions, for the medium and the large entropy model."""
    torch.nn.functional.scaled_dot_product_attention = efficient_attention
    peaks = {}
    for streams, size, dtype in ((64, "medium", torch.float16), (256, "medium", torch.bfloat16)):
        with fake_tensors(), torch.no_grad():
            fake_cuda.available(False)
            with torch.device("cuda"):
                config = entropy_llm.EntropyConfig(**entropy_llm.SIZES[size])
                model = entropy_llm.MinimalLLM(config).eval()
            fake_cuda.available(True)
            ids = torch.zeros(streams, 2048, dtype=torch.int64, device="cuda")
            with LiveBytes() as memory, torch.autocast("cuda", dtype):
                logits, state = model.stream(ids)
                entropy_of(logits)
                del logits
                logits, state = model.stream(ids, state)
                entropy_of(logits)
        peaks[streams] = memory.peak
    return peaks


def compiled_entropy_pass():
    """[is backward, is static] of the graphs that two chunks of the medium entropy model are compiled to."""
    lower_only()
    codes = []
    with fake_tensors(), torch.no_grad():
        fake_cuda.available(False)
        with torch.device("cuda"):
            model = entropy_llm.MinimalLLM(entropy_llm.EntropyConfig(**entropy_llm.SIZES["medium"])).eval()
        fake_cuda.available(True)
        compiled = torch.compile(entropies_of_chunk, backend=lowering_backend(codes), dynamic=False, fullgraph=True)
        ids = torch.zeros(256, 2048, dtype=torch.int64, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            _, state = compiled(model, ids, model.empty_state(ids))
            compiled(model, ids, state)
    return codes


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
