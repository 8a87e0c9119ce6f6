"""FlexAttention, as the models use it, beside torch's varlen_attn (FlashAttention), for `make gpu`.

    python tests/gpu_attention.py OUTPUT.json

For the shapes of llm.py's medium and llm_large.py on an H100, bf16, with documents of random lengths:
milliseconds of a forward pass, and of forward and backward; how far outputs and gradients differ; whether
varlen_attn's gradients repeat.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from blt.attention import AttentionPlan  # noqa: E402

# Rows, positions, heads, channels of a head, window, positions of a document on average.
SHAPES = {
    "medium, bytes": (32, 4096, 4, 64, 256, 2000),
    "medium, patches": (32, 736, 8, 64, None, 350),
    "large, bytes": (16, 8192, 8, 64, 512, 2000),
    "large, patches": (16, 1472, 16, 64, None, 350),
}


def by_flex(documents_BT, window):
    """A function of q, k, v [B, T, H, K]."""

    def attend(q, k, v):
        plan = AttentionPlan(documents_BT, q.shape[-1], 10_000.0, window)
        plan.make_mask(q.shape[2], q.dtype)
        return plan._by_flex_attention(q, k, v)

    return torch.compile(attend, dynamic=False)


def by_varlen(documents_BT, window):
    """The same. The list of documents ends with empty ones, as one of fixed length would."""
    # Not every torch has it.
    from torch.nn.attention.varlen import varlen_attn

    B, T = documents_BT.shape
    numbers = (documents_BT + torch.arange(B, device=documents_BT.device)[:, None] * T).flatten()
    _, lengths = numbers.unique_consecutive(return_counts=True)
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    ends = F.pad(ends, (0, 256), value=B * T)
    reach = (-1 if window is None else window - 1, 0)

    def attend(q, k, v):
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        return varlen_attn(*flat, ends, ends, T, T, window_size=reach).view(q.shape)

    return attend


def measure(shape):
    """{what: number} of one shape."""
    from triton.testing import do_bench

    B, T, H, K, window, document = shape
    torch.manual_seed(0)
    documents_BT = (torch.rand(B, T, device="cuda") < 1 / document).long().cumsum(1)
    like = dict(device="cuda", dtype=torch.bfloat16)
    inputs = [torch.randn(B, T, H, K, **like).requires_grad_() for _ in range(3)]
    d_out = torch.randn_like(inputs[0])
    found = {}
    results = {}
    for name, made in (("flex", by_flex), ("varlen", by_varlen)):
        attend = made(documents_BT, window)

        def both_passes():
            out = attend(*inputs)
            return [out, *torch.autograd.grad(out, inputs, d_out)]

        results[name] = both_passes()
        with torch.no_grad():
            found[f"{name} forward ms"] = do_bench(lambda: attend(*inputs), return_mode="median")
        found[f"{name} ms"] = do_bench(both_passes, return_mode="median")
    pairs = zip(results["flex"], results["varlen"], strict=True)
    found["difference"] = max(((a - b).float().norm() / a.float().norm()).item() for a, b in pairs)
    again = both_passes()
    pairs = zip(results["varlen"], again, strict=True)
    found["varlen repeats"] = all(torch.equal(a, b) for a, b in pairs)
    return found


def main():
    found = {}
    for name, shape in SHAPES.items():
        try:
            found[name] = measure(shape)
        except (ImportError, TypeError, RuntimeError) as error:
            # An older torch has no varlen_attn, or one without windows.
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:200]}
        print(name, found[name], flush=True)
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
