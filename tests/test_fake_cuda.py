"""The CUDA code that torch makes of the models, examined without a GPU: graphs, kernels, memory. See docs/bench.md.

torch's CPU build is made to believe in a card by the scripts in the folder that the environment's FAKE_CUDA names;
Triton compiles for cards that are not there. Nothing is computed. The tests, some eight minutes, are skipped without
that folder, Triton or g++.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llm

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(os.environ.get("FAKE_CUDA", "FAKE_CUDA"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TOOLS.is_dir(), reason="needs FAKE_CUDA: see docs/bench.md"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: see docs/bench.md"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

# Rows, bytes a row, patch slots: what llm.py and llm_large.py train with on an H100.
SHAPES = {"medium": ("16", "4096", "928"), "large": ("16", "8192", "1856")}
# Layers of one kind have the same kernels, so one is enough of each.
ONE_LAYER = dict(global_layers=1, decoder_layers=1)


def run(folder, script, *arguments, card="4090", **environment):
    """What a script prints that believes in a card. Its files go to the folder."""
    environment = os.environ | environment | {"CARD": card, "PROJECT": str(ROOT), "FAKE_CUDA_OUT": str(folder)}
    paths = [str(TOOLS), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    # Kernels are compiled here, and not interpreted.
    environment |= {"TRITON_INTERPRET": "0"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def found(folder, *arguments, card="4090"):
    """The JSON that fake_cuda_graphs.py prints last."""
    return json.loads(run(folder, ROOT / "tests" / "fake_cuda_graphs.py", *arguments, card=card).splitlines()[-1])


def generate_code(folder, size, card, changes, **environment):
    """Trace a training pass of a size of llm.py, and lower it unless NOIND is set: what codegen.py prints."""
    precision = "fp16" if card == "t4" else "bf16"
    # llm.py chooses these by the text, which codegen.py does not read.
    rates = {"dropout": 0.0, "ngram_dropout": 0.0}
    model = json.dumps(llm.SIZES[size] | rates | changes)
    return run(folder, TOOLS / "codegen.py", size, *SHAPES[size], precision, model, "code", card=card, **environment)


class TestGraphs:
    def test_every_option_is_one_static_graph(self, tmp_path):
        """No graph break, and the second step compiles nothing; FlexAttention wherever its kernels compile."""
        options = found(tmp_path, "options")
        assert len(options) >= 12
        for name, graphs in options.items():
            assert (graphs["graphs"], graphs["later"], graphs["breaks"]) == (1, 0, []), name
        # A pass has a node for each of three stacks, and two in the backward pass, beside the masks'.
        usual = options["as trained"]["flex"]
        assert usual >= 3 and options["qk_norm"]["flex"] == usual
        assert options["recompute"]["flex"] > usual
        assert options["dropout"]["flex"] == usual
        assert options["recompute with dropout"]["flex"] == options["recompute"]["flex"]
        assert options["heads of 512"]["flex"] < usual
        assert options["heads of 8"]["flex"] < usual

    def test_an_old_card_has_one_graph_without_flex_attention(self, tmp_path):
        for name, graphs in found(tmp_path, "options", "as trained", "recompute", card="t4").items():
            assert graphs == {"flex": 0, "graphs": 1, "later": 0, "breaks": []}, name

    def test_the_second_model_of_a_process_lowers(self, tmp_path):
        """Its rows have another number of patches: without dynamic=False FlexAttention's mask did not lower."""
        result = found(tmp_path, "second_model")
        assert result["slots"][0] != result["slots"][1]
        # Forward and backward pass of both, without symbolic sizes.
        assert result["codes"] == [[False, True], [True, True], [False, True], [True, True]]

    @pytest.mark.parametrize(
        "size, changes, limit_kb",
        [("medium", {}, 79.8), ("large", dict(global_layers=4), 172.2)],
        ids=["medium", "large"],
    )
    def test_no_more_is_saved_for_the_backward_pass(self, tmp_path, size, changes, limit_kb):
        """kB of activations a byte of text. The 20 latent layers of the large size keep 7.6 each."""
        printed = generate_code(tmp_path, size, "h100", changes, NOIND="1")
        saved_kb = float(re.search(r"= ([\d.]+) kB a byte; other saved", printed)[1])
        assert 0.3 * limit_kb < saved_kb <= limit_kb + 0.5

    def test_the_entropy_pass_keeps_what_it_needs(self, tmp_path):
        """Peak memory of a chunk of the T4's and the RTX 4090's presets: 5.2 and 20.7 GB while state was a view."""
        peaks = found(tmp_path, "entropy_pass")
        assert 1e9 < peaks["64"] < 3.1e9
        assert 4e9 < peaks["256"] < 12.1e9

    def test_the_compiled_entropy_pass_is_one_static_graph(self, tmp_path):
        """Of the first chunk and of all others."""
        assert found(tmp_path, "compiled_entropy_pass") == [[False, True]]


class TestKernels:
    @pytest.mark.parametrize("size", SHAPES)
    @pytest.mark.parametrize("card", ["t4", "4090", "h100"])
    def test_kernels_compile_within_the_cards_limits(self, tmp_path, size, card):
        """Attention, reductions and kernels with atomics, for sm75, sm89 and sm90: shared memory fits."""
        printed = generate_code(tmp_path, size, card, ONE_LAYER, EFF="1" if card == "t4" else "")
        assert "FAILED" not in printed
        attention = 0
        for part in ("fw", "bw"):
            # First the kernels' names, then what is wrong with them.
            code = (tmp_path / f"code_code_{part}.py").read_text()
            # Sums whose order changes from run to run.
            assert not re.search(r"tl\.atomic|index_add|scatter_reduce", code)
            # Pooling and both cross-attentions.
            assert len(set(re.findall(r"async_compile\.triton\('(_pool|_attend_to)\w*'", code))) == 2
            attention += len(re.findall(r"async_compile\.triton\('triton_tem_\w*flex", code))
            # compile_kernels.py takes kernels with Inductor's names only. Ours have to compile with the
            # types of arguments that Inductor gives them.
            (tmp_path / f"all_{part}.py").write_text(re.sub(r"(?m)^(_\w+ = async_compile)", r"triton\1", code))
            compiled = run(
                tmp_path,
                TOOLS / "compile_kernels.py",
                str(tmp_path / f"all_{part}.py"),
                "tem|red|per|atomic|_pool|_attend_to",
                card=card,
                QUIET="1",
            )
            assert int(re.search(r"^kernels (\d+)", compiled, re.M)[1]) > 6
            assert not re.search("OVER|FAILED|NO BINARY", compiled), compiled[-3000:]
        # A T4 has no FlexAttention; others have kernels of it for bytes and for patches.
        assert attention == 0 if card == "t4" else attention >= 2
