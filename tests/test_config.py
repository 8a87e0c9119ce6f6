"""Settings: a flag beats the file, the file beats presets; bad input gets one line; every field has help."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest

import blt.config as config_module
from blt.config import BY_PRESET, SIZE_NAMES, Presets, given_fields, library_default, parse_config, part_of
from blt.corpus import DataConfig
from blt.loop import RunConfig
from blt_model import BLTConfig
from complete_entropy_workflow import WorkflowConfig
from create_patches import CreatePatchesConfig
from entropy_llm import EntropyConfig, EntropyRunConfig
from llm import LLMConfig
from llm_large import LLMLargeConfig
from template_llm import TemplateConfig
from train_blt import TrainBLTConfig

MACHINES = ("cpu", "cpu_hour", "colab_t4", "rtx4090", "h100", "h200")
WITH_PRESETS = [
    EntropyRunConfig,
    CreatePatchesConfig,
    LLMConfig,
    LLMLargeConfig,
    TrainBLTConfig,
    WorkflowConfig,
    TemplateConfig,
]


@dataclass
class Toy(DataConfig):
    width: int = BY_PRESET  # how wide
    rows: int = BY_PRESET  # how many rows
    steps: int = 7  # how many steps
    names: list[str] = field(default_factory=lambda: ["a"])  # some names
    limit: int | None = None  # at most this many; None: all
    mode: Literal["x", "y"] = "x"  # which of the two
    fast: bool = False  # whether to hurry
    careful: bool = True  # whether to check

    PRESETS = Presets(
        sizes={"small": dict(width=1), "medium": dict(width=2)},
        machines={"cpu": dict(rows=10), "h100": dict(rows=20)},
        pairs={("medium", "h100"): dict(rows=15)},
        size_of_machine={"cpu": "small"},
        alone={"quick": dict(width=9, rows=9)},
    )


def parse(*argv, config_class=Toy):
    return parse_config(config_class, "about", argv)


def error_of(capsys, *argv, config_class=Toy):
    with pytest.raises(SystemExit) as stopped:
        parse(*argv, config_class=config_class)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stopped.value.code == 2 and len(lines) == 1
    return lines[0]


def test_presets_fill_what_the_file_leaves_to_them(monkeypatch):
    monkeypatch.setattr(config_module, "detect_machine", lambda device: "cpu")
    assert (parse().width, parse().rows, parse().preset) == (1, 10, ["small", "cpu"])
    assert (parse("--preset", "medium").width, parse("--preset", "medium").rows) == (2, 10)
    assert (parse("--preset", "h100").width, parse("--preset", "h100").rows) == (2, 15)  # the pair
    assert parse("--preset", "h100", "small").rows == 20
    assert parse("--preset", "quick").width == 9 and parse("--preset", "quick").preset == ["quick"]
    assert parse("--preset", "small", "auto").preset == ["small", "cpu"]


def test_file_beats_presets_and_flags_beat_the_file():
    @dataclass
    class Edited(Toy):
        width: int = 64  # a user's number in place of BY_PRESET

    for preset in ("small", "medium", "h100"):
        assert parse("--preset", preset, config_class=Edited).width == 64
    assert parse("--width", "5", "--preset", "small", config_class=Edited).width == 5
    assert Edited(preset=["medium"]).width == 64 and Edited(width=3).width == 3


def test_two_presets_that_set_the_same_are_refused(capsys):
    assert "set the same fields" in error_of(capsys, "--preset", "small", "medium")
    assert "set the same fields" in error_of(capsys, "--preset", "cpu", "h100")
    assert "combines with no other" in error_of(capsys, "--preset", "quick", "cpu")
    assert "unknown preset 'huge'; choose from: small, medium, auto, cpu" in error_of(capsys, "--preset", "huge")


def test_flags_of_every_type(capsys):
    config = parse("--limit", "None", "--names", "b", "c", "--fast", "--no_careful", "--mode", "y", "--steps", "8")
    assert (config.limit, config.names, config.fast, config.careful) == (None, ["b", "c"], True, False)
    assert parse("--limit", "3", "--careful", "False").limit == 3 and not parse("--careful", "false").careful
    assert given_fields(config) == {"limit", "names", "fast", "careful", "mode", "steps"}
    assert given_fields(Toy(steps=3, preset=["small", "cpu"])) >= {"steps"}
    assert "invalid int value: 'many'" in error_of(capsys, "--steps", "many")
    assert "invalid int value" in error_of(capsys, "--limit", "few")
    assert "mode" in error_of(capsys, "--mode", "z")
    assert "unknown flags: --stpes 4; did you mean --steps?" in error_of(capsys, "--stpes", "4")
    assert "unknown flags" in error_of(capsys, "--step", "4")  # no abbreviations


@pytest.mark.parametrize("config_class", [LLMConfig, TemplateConfig, EntropyRunConfig])
def test_a_run_is_told_by_steps_or_by_epochs(capsys, config_class):
    flags = ("--device", "cpu", "--epochs", "2")
    message = error_of(capsys, *flags, "--steps", "9", config_class=config_class)
    assert "give either --steps or --epochs, not both" in message
    assert parse(*flags, config_class=config_class).epochs == 2


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "how wide (by preset: small 1, medium 2, quick 9)" in text
    assert "how many rows (by preset: cpu 10, h100 20, quick 9, medium h100 15)" in text
    assert "how many steps (default: 7)" in text


def test_a_field_without_any_value_is_our_bug():
    @dataclass
    class Broken(Toy):
        depth: int = BY_PRESET  # no preset gives it

    with pytest.raises(TypeError, match="Broken.depth"):
        Broken(preset=["small", "cpu"])
    assert library_default(LLMConfig, "lr") == RunConfig.lr


@pytest.mark.parametrize("config_class", WITH_PRESETS)
def test_every_size_fits_every_machine(config_class):
    presets = config_class.PRESETS
    assert set(presets.sizes) == set(SIZE_NAMES) and set(presets.machines) == set(MACHINES)
    fields_of_sizes = {name for values in presets.sizes.values() for name in values}
    fields_of_machines = {name for values in presets.machines.values() for name in values}
    assert not fields_of_sizes & fields_of_machines  # so that they are independent
    by_preset = {f.name for f in dataclasses.fields(config_class) if f.default is BY_PRESET}
    of_pairs = {name for values in presets.pairs.values() for name in values}
    # A preset for a field that the file decides would never take effect.
    assert fields_of_sizes | fields_of_machines | of_pairs <= by_preset
    for size in SIZE_NAMES:
        for machine in MACHINES:
            config = config_class(preset=[size, machine])
            assert not any(getattr(config, f.name) is BY_PRESET for f in dataclasses.fields(config))
            for name, value in presets.values([size, machine]).items():
                assert getattr(config, name) == value


@pytest.mark.parametrize("config_class", WITH_PRESETS)
def test_an_edit_at_the_top_takes_effect_with_every_preset(config_class):
    for f in dataclasses.fields(config_class):
        if f.default is BY_PRESET and f.type in (int, "int"):
            value = 1 if f.name == "n_heads" else 96  # fits every other size
            edited = dataclasses.make_dataclass("Edited", [(f.name, int, value)], bases=(config_class,))
            for size in ("nano", "large"):
                for machine in ("cpu", "h100"):
                    assert getattr(edited(preset=[size, machine]), f.name) == value


def test_machines_without_flags(monkeypatch):
    """The same three commands: the demo's size on a laptop, the medium size on a GPU."""
    monkeypatch.setattr(config_module, "detect_machine", lambda device: "cpu")
    assert LLMConfig().preset == ["nano", "cpu"] and LLMConfig().steps == 1000
    assert LLMLargeConfig().preset == ["nano", "cpu"]
    monkeypatch.setattr(config_module, "detect_machine", lambda device: "h100")
    assert LLMConfig().preset == ["medium", "h100"] and LLMConfig().global_dim == 512
    assert LLMLargeConfig().global_dim == 1024 and LLMLargeConfig().batch_rows == 16
    assert EntropyRunConfig().d_model == 384 and CreatePatchesConfig().streams == 256


def test_quick_demo_is_a_preset(capsys):
    config = TrainBLTConfig(quick_demo=True)
    assert config.preset == ["quick_demo"] and config.global_dim == 192 and config.steps == 120
    assert dataclasses.replace(config, seed=2).global_dim == 192
    assert "combines with no other" in error_of(capsys, "--quick_demo", "--preset", "cpu", config_class=TrainBLTConfig)


def test_parts_of_a_config():
    config = LLMConfig(preset=["tiny", "cpu"], dropout=0.1)
    # What the script has not decided yet is left to the class.
    assert config.ngram_dropout is None and part_of(config, BLTConfig).ngram_dropout == 0.0
    assert part_of(config, BLTConfig).dropout == 0.1 and part_of(config, BLTConfig).global_dim == 256
    assert part_of(EntropyRunConfig(preset=["nano", "cpu"]), EntropyConfig).max_seq_len == 128
