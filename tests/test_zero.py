"""0 is a value: no script takes it, or an empty text, for "not given"."""

import ast
import dataclasses
import types
from typing import Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from helpers import (
    BLT_FLAGS,
    CORPUS_FLAGS,
    ROOT,
    SCRIPTS,
    entry_point,
    error_of,
    output_of,
    tiny_entropy_model,
)

from blt.config import parse_config
from blt.patch_rules import PatchConfig
from blt.rows import BitArray, DocumentStream, TrainingRows
from blt_model import BLTConfig
from entropy_patcher import EntropyPatcher
from template_llm import FlatConfig

# What each script cannot do without.
NEEDED = {"compress": ["FILE"], "convert_hf": ["--to_hf", "FOLDER"]}
# A field may need others to mean anything.
TOGETHER = {"entropy_threshold": ["--patch_method", "global"], "target_patch_size": ["--patch_method", "global"]}


def numbers_of(config_class):
    """Fields whose value is a number, or None."""
    for name, field_type in get_type_hints(config_class).items():
        kinds = get_args(field_type) if get_origin(field_type) in (Union, types.UnionType) else (field_type,)
        if set(kinds) & {int, float} and name in {f.name for f in dataclasses.fields(config_class)}:
            yield name


ZEROS = [(script, name) for script in SCRIPTS for name in numbers_of(entry_point(script)[1])]
# The workflow compares methods, and refuses what belongs to one.
ZEROS = [pair for pair in ZEROS if pair[0] != "complete_entropy_workflow" or pair[1] not in TOGETHER]


@pytest.mark.parametrize("script, name", ZEROS)
def test_zero_is_refused_by_name_or_kept(script, name, capsys):
    config_class = entry_point(script)[1]
    fields = {f.name for f in dataclasses.fields(config_class)}
    flags = NEEDED.get(script, []) + (TOGETHER.get(name, []) if "patch_method" in fields else [])
    try:
        config = parse_config(config_class, "", [*flags, f"--{name}", "0"])
    except SystemExit:
        assert f"{name} is 0" in capsys.readouterr().err
        return
    assert getattr(config, name) == 0 and getattr(config, name) is not False


@pytest.mark.parametrize(
    "script, flags",
    [
        ("llm", "--encoder_heads 0"),
        ("llm", "--global_heads 0"),
        ("train_blt", "--decoder_heads 0"),
        ("llm_large", "--decoder_heads 0"),
        ("complete_entropy_workflow", "--encoder_heads 0"),
        ("llm", "--patch_method global --target_patch_size 0"),
        ("llm", "--sample_bytes -1"),
        ("entropy_llm", "--n_heads 0"),
        ("template_llm", "--n_heads 0"),
        ("create_patches", "--target_patch_size 0"),
        ("create_patches", "--streams 0"),
        ("show_patches", "--target_patch_size 0 --text abc"),
        ("show_patches", "--context_bytes 0 --text abc"),
        ("generate", "--context_bytes 0"),
        ("compress", "FILE --context_bytes 0"),
        ("compress", "FILE --streams 0"),
        ("evaluate", "--row_bytes 0"),
        ("bench", "--streams 0"),
        ("create_patches", "--target_patch_size inf"),
        ("create_patches", "--method both --monotonic_threshold nan"),
    ],
)
def test_zero_that_means_nothing_is_refused(tmp_path, script, flags):
    words = flags.split()
    # The flag whose value is refused is the last, a text apart.
    name = words[0] if words[-2] == "--text" else words[-2]
    assert f"{name.removeprefix('--')} is" in error_of(tmp_path, script, *words)


def test_heads_that_are_0_are_no_default():
    for part in ("encoder", "global", "decoder"):
        with pytest.raises(ValueError, match=f"{part}_heads is 0"):
            BLTConfig(**{f"{part}_heads": 0})
    with pytest.raises(ValueError, match="n_heads is 0"):
        FlatConfig(n_heads=0)


def test_threshold_0_is_used(pipeline_copy):
    printed = output_of(pipeline_copy, "create_patches", *CORPUS_FLAGS, "--entropy_threshold", 0)
    # Every entropy is above 0, so every byte is a patch.
    assert "threshold 0.000 nats" in printed and "1.00 bytes a patch" in printed
    flags = [*BLT_FLAGS, "--patch_method", "global", "--entropy_threshold", 0, "--output", "of_zero"]
    assert "threshold 0.000 nats" in output_of(pipeline_copy, "llm", *flags)


def test_show_patches_takes_0_and_an_empty_title(pipeline_copy):
    printed = output_of(pipeline_copy, "show_patches", "--text", "some text", "--entropy_threshold", 0, "--title", "")
    assert "threshold 0.000 nats" in printed and "1.00 bytes a patch" in printed
    assert "<h1>Patches</h1>" not in (pipeline_copy / "pictures" / "patches.html").read_text()


def test_the_patchers_threshold_may_be_0():
    patcher = EntropyPatcher(tiny_entropy_model(), threshold=0)
    assert patcher.config.entropy_threshold == 0 and patcher.create_patches(b"abc") == [b"a", b"b", b"c"]
    with pytest.raises(ValueError, match="method is ''"):
        EntropyPatcher(None, method="")


def test_no_entropy_at_all_is_above_no_threshold():
    is_start = EntropyPatcher(None, PatchConfig("static", 1.0)).starts(b"abc")
    assert np.array_equal(is_start, [True] * 4)


def test_an_empty_prompt_is_a_new_document(pipeline_copy):
    printed = output_of(pipeline_copy, "llm", *BLT_FLAGS, "--prompt", "", "--output", "of_empty")
    assert "continuation of '':" in printed


def test_no_patch_slots_are_no_default():
    stream = DocumentStream.of_documents([np.arange(50, dtype=np.uint8)])
    is_start = BitArray()
    is_start.append(np.ones(len(stream), dtype=bool))
    is_start.close()
    with pytest.raises(ValueError, match="patch_slots is 0"):
        TrainingRows(stream, 16, is_start, patch_slots=0)


# No expression `config.x or default`: it would replace 0 and "".


def replaced(path):
    """Places in a file where a setting gives way to a default when it is false: "x.name or default"."""
    fields = {f.name for script in SCRIPTS for f in dataclasses.fields(entry_point(script)[1])}
    tree = ast.parse(path.read_text())
    # In a condition nothing is replaced.
    conditions = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
            conditions |= {id(inner) for inner in ast.walk(node.test)}
    for node in ast.walk(tree):
        is_or = isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or) and id(node) not in conditions
        first = node.values[0] if is_or else None
        # "config.name", or an argument of that name.
        name = first.attr if isinstance(first, ast.Attribute) else getattr(first, "id", None)
        if name in fields:
            yield f"{path.name}:{node.lineno}: {ast.unparse(node)}"


def test_no_setting_is_replaced_by_or():
    # A list of models that is empty and a title that is empty have no other meaning.
    allowed = {"config.models or default_names", "title or ''"}
    found = [place for path in [*ROOT.glob("*.py"), *ROOT.glob("blt/*.py")] for place in replaced(path)]
    assert [place for place in found if place.split(": ", 1)[1] not in allowed] == []
