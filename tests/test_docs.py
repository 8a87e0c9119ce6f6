"""What README, docs, notebook and docstrings say is real: commands, flags, presets, links, tables and code."""

import ast
import dataclasses
import functools
import json
import re
import shlex
import sys
import types

import pytest
import torch
from helpers import ROOT, SCRIPTS, entry_point, output_of, some_words

from blt.config import parse_config
from blt.flops import TRAINING, blt_flops, training_memory, update_traffic
from blt.loop import RunConfig
from blt.patch_rules import RULES
from blt_model import BLTConfig, BLTModel

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "notebooks" / "colab.ipynb"]
MODULES = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "blt").glob("*.py"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
# In a command these stand for what the user fills in: [--preset SIZE], FILE, {source}, ...
PLACEHOLDER = re.compile(r"[\[\]{}|]|\.\.\.|^[A-Z_]+(\.\w+)?$")


def text_of(path):
    """A page as Markdown: of a notebook, its cells one after the other."""
    if path.suffix != ".ipynb":
        return path.read_text()
    return "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])


def commands_of(text):
    """[(script, flags as one string)] of the commands in Markdown: in code blocks, inline, after a notebook's "!"."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^(?: {4,}|!)(?:python|torchrun.*?) (\w+)\.py(.*)$", text, re.M)
    inline = re.findall(r"`python (\w+)\.py([^`]*)`", text)
    return blocks + inline


def flags_of(config_class):
    """The flags that a script has, without the dashes."""
    fields = dataclasses.fields(config_class)
    negated = {f"no_{field.name}" for field in fields if field.type in (bool, "bool")}
    return {field.name for field in fields} | negated | {"help"}


TORCHRUN_FLAGS = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}


@functools.cache
def all_flags():
    """The flags of all scripts."""
    return {flag for script in SCRIPTS for flag in flags_of(entry_point(script)[1])}


@every_page
def test_commands_are_accepted(page, capsys):
    """Each command's script exists, and its settings pass every check that is made before any work."""
    for script, rest in commands_of(text_of(page)):
        assert script in SCRIPTS, f"{page.name}: there is no {script}.py"
        config_class = entry_point(script)[1]
        words = shlex.split(rest, comments=True)
        unknown = {word[2:] for word in words if word.startswith("--")} - flags_of(config_class)
        assert not unknown, f"{page.name}: {script}.py has no {unknown}"
        if any(PLACEHOLDER.search(word) for word in words) or "--help" in words:
            continue
        try:
            parse_config(config_class, "", words)
        except SystemExit:
            pytest.fail(f"{page.name}: python {script}.py{rest}: {capsys.readouterr().err.splitlines()[-1]}")


@every_page
def test_flags_and_presets_in_the_text_exist(page):
    """Also those that are named without their command, as in `--draft_bytes 8`."""
    text = text_of(page)
    assert set(re.findall(r"`--(\w+)", text)) <= all_flags() | TORCHRUN_FLAGS
    for words in re.findall(r"--preset ([\w ]+)", text):
        names = words.split()
        if any(PLACEHOLDER.search(name) for name in names):
            continue
        presets = [entry_point(script)[1].PRESETS for script in ("llm", "train_blt")]
        assert any(set(names) <= set(of_script.names()) for of_script in presets), names


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_docstrings_name_real_scripts_and_flags(module):
    text = ast.get_docstring(ast.parse(module.read_text())) or ""
    # "[--field value ...]" stands for any setting.
    assert set(re.findall(r"--(\w+)", text)) - {"field"} <= all_flags() | TORCHRUN_FLAGS
    scripts = re.findall(r"python (\w+)\.py", text)
    assert set(scripts) <= set(SCRIPTS)
    if module.parent == ROOT and module.stem in SCRIPTS:
        assert module.stem in scripts, "the docstring shows how to run the script"


def test_main_pages_show_the_main_commands():
    for page in (ROOT / "README.md", ROOT / "notebooks" / "colab.ipynb"):
        scripts = {script for script, _ in commands_of(text_of(page))}
        assert {"entropy_llm", "create_patches", "llm", "generate"} <= scripts


@every_page
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)", text_of(page)):
        if not re.match(r"\w+:", target):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_table_of_methods_is_the_registry():
    table = re.search(
        r"\| method \| byte t starts a patch if \| threshold \|\n\|[ -|]+\|\n((?:\|.*\|\n)+)",
        (ROOT / "docs" / "patching.md").read_text(),
    )
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table[1].splitlines()]
    assert rows == [(rule.name, rule.condition, str(rule.unit)) for rule in RULES.values()]


# Code


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", text_of(page), re.S)


@pytest.fixture
def small_runs(monkeypatch):
    """Training takes two short steps, whatever the code asks for."""
    check = RunConfig.__post_init__

    def shrink(config):
        check(config)
        config.steps = config.eval_every = 2
        config.row_bytes = 128
        config.batch_rows = 2
        config.max_bytes = 60000
        config.val_bytes = 20000
        config.device = "cpu"
        # The folder has a run of the fixture, and a page may train twice.
        config.overwrite = True

    monkeypatch.setattr(RunConfig, "__post_init__", shrink)


@pytest.fixture
def no_new_methods():
    """Methods that the code registers are forgotten afterwards."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


# Where code is shown that needs more than a run of the scripts leaves: another test runs it.
TESTED_ELSEWHERE = {"transformers.md": "test_convert_hf.py"}


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.suffix == ".md" and python_blocks(page) and page.name not in TESTED_ELSEWHERE],
    ids=lambda path: path.name,
)
def test_code_runs_as_printed(page, pipeline_copy, monkeypatch, small_runs, no_new_methods):
    """In a folder with everything that the scripts write, and some texts."""
    if "checkpoints_bpe" in text_of(page):
        flags = "--model bpe --dim 32 --n_layers 1 --vocab_size 400".split()
        output_of(pipeline_copy, "template_llm", *flags)
    for number, name in enumerate(("a.txt", "b.txt", "c.txt", "README.md", "LOG.md", "docs/design.md")):
        path = pipeline_copy / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(some_words(60, number))
    monkeypatch.chdir(pipeline_copy)
    names = {}
    for block in python_blocks(page):
        exec(compile(block, page.name, "exec"), names)
        # A page may show a module of the reader's own and then import it.
        monkeypatch.setitem(sys.modules, "my_rule", types.ModuleType("my_rule"))


def test_code_that_is_tested_elsewhere_is():
    for page, test in TESTED_ELSEWHERE.items():
        assert page in (ROOT / "tests" / test).read_text()


SCALES = {
    "large": dict(
        global_dim=1024, global_layers=20, encoder_dim=512, decoder_dim=512, decoder_layers=5, hash_rows=8192
    ),
    "1B": dict(
        global_dim=2048, global_layers=25, encoder_dim=1024, decoder_dim=1024, decoder_layers=9, hash_rows=32768
    ),
    "8B": dict(
        global_dim=4096, global_layers=32, encoder_dim=1280, decoder_dim=1280, decoder_layers=6, hash_rows=32768
    ),
}


def test_the_table_of_several_gpus_is_what_flops_py_says():
    page = (ROOT / "docs" / "scale.md").read_text()
    rows = re.findall(r"^\| (large|1B|8B) \| (\d+) \| (whole|shared out) \| (.+) \|$", page, re.M)
    assert len(rows) == 8
    passes, bytes_of_update = 2, 2 * 131_072
    for name, n, weights, rest in rows:
        n, is_sharded = int(n), weights != "whole"
        config = BLTConfig(**SCALES[name], window=512, ngram_sizes=[2, 3, 4, 5, 6, 7, 8])
        with torch.device("meta"):
            parts = BLTModel(config).parameters_by_part()
        tables = parts.pop("hash embedding")
        matrices = sum(parts.values())
        speed = 0.4 * 989e12 / (TRAINING * sum(blt_flops(config, 4.5, 8192).values()))
        sent = update_traffic(matrices, tables, n, is_sharded, passes)
        per_second = 450e9 if n <= 8 else 50e9
        wanted = [
            f"{training_memory(matrices, tables, n if is_sharded else 1) / 1e9:.1f}",
            f"{n * speed / 1e6:.1f}",
            f"{bytes_of_update / speed:.2f}",
            f"{sent / 1e9:.0f}",
            f"{sent / per_second:.2f}",
        ]
        assert rest.split(" | ") == wanted, (name, n)
