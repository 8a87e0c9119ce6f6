"""Bad input, odd names and closed streams: one clear line, nothing lost, or it simply works."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import (
    BLT_FLAGS,
    ENTROPY_FLAGS,
    ROOT,
    SCRIPTS,
    edit_record,
    entry_point,
    error_of,
    is_png,
    output_of,
    some_words,
    tiny_blt,
    tiny_entropy_model,
    write_blt,
)

from blt.checks import check_packages
from blt.config import PATH_FIELDS, next_command, parse_config
from blt.ids import argument_bytes, drawable
from blt.patch_rules import PatchConfig
from blt.pictures import PAGE, draw_entropy_figure, draw_evaluation
from compress import CompressConfig
from create_patches import CreatePatchesConfig
from generate import GenerateConfig
from show_patches import ShowPatchesConfig

# What Python makes of the argument b"caf\xe9".
LATIN = "caf\udce9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model in checkpoints/, its entropy_model.pth, and a text."""
    folder = tmp_path_factory.mktemp("robust")
    write_blt(folder / "checkpoints", tiny_blt(), PatchConfig("global", 5.0), tiny_entropy_model())
    (folder / "a.txt").write_bytes(some_words(60))
    return folder


# Bytes and text


def test_arguments_are_bytes():
    assert argument_bytes(LATIN) == b"caf\xe9"
    assert argument_bytes("é") == "é".encode()
    # Half of a surrogate pair, as JSON can hold it.
    assert argument_bytes("\ud83d") == b"\xed\xa0\xbd"
    assert drawable(LATIN) == "caf�"


def test_prompts_need_not_be_utf8(folder):
    flags = ("--max_new_bytes", "3", "--device", "cpu", "--context_bytes", "64")
    assert output_of(folder, "generate", "--prompt", LATIN, *flags).startswith("caf�")
    assert output_of(folder, "generate", "--stop", LATIN, *flags)
    # A line that is not UTF-8 ends nothing: the next one is continued as well.
    text = output_of(folder, "generate", "--interactive", *flags, stdin=b"one\xff\ntwo\n")
    assert "one�" in text and "\ntwo" in text


def test_names_of_files_need_not_be_utf8(folder):
    name = os.fsdecode(b"na\xefve.txt")
    (folder / name).write_bytes(some_words(20))
    output_of(folder, "show_patches", "--file", name, "--output", "shown", "--device", "cpu")
    assert is_png(folder / "shown" / "patches.png") and "naïve" not in (folder / "shown" / "patches.html").read_text()
    output_of(folder, "compress", name, "--context_bytes", "64", "--device", "cpu")
    output_of(folder, "compress", "--decompress", name + ".blt", "--output", "same", "--device", "cpu")
    assert (folder / "same").read_bytes() == some_words(20)


def test_pictures_take_every_name(tmp_path):
    entropies = np.ones(4, np.float32)
    assert draw_entropy_figure(tmp_path / "a.png", b"abcd", entropies, [True] * 4, title=LATIN).exists()
    by_source = [(LATIN, [1.0], [None]), ("b", [2.0], [None])]
    assert draw_evaluation(tmp_path / "b.png", [LATIN], [("0", [1.0])], by_source, [], LATIN).exists()


# A script that prints what a terminal without UTF-8 cannot show.
PRINTING = """
import sys
from dataclasses import dataclass
sys.path.insert(0, {root!r})
from blt.config import run_script

@dataclass
class Config:
    lines: int = 1  # lines to print

def main(config):
    for _ in range(config.lines):
        print("1.5 ±0.1", "caf\\udce9")
    print("± done", file=sys.stderr)

run_script(main, Config, "about")
"""


@pytest.fixture
def printing(tmp_path):
    path = tmp_path / "printing.py"
    path.write_text(PRINTING.format(root=str(ROOT)))
    return path


def run_printing(path, *flags, shell="", **environment):
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(path))} {' '.join(flags)} {shell}"
    return subprocess.run(
        ["bash", "-c", command], env=os.environ | environment, capture_output=True, timeout=60, check=False
    )


def test_an_ascii_terminal_gets_every_line(printing):
    done = run_printing(printing, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0 and done.stdout == b"1.5 ?0.1 caf\xe9\n" and done.stderr == b"? done\n"
    # In UTF-8 a name's bytes are written as they are, so that they can be copied.
    done = run_printing(printing, PYTHONIOENCODING="utf-8")
    assert done.stdout == "1.5 ±0.1 caf".encode() + b"\xe9\n"


def test_closed_streams_end_quietly(printing):
    done = run_printing(printing, shell="<&- >&- 2>&-")
    assert done.returncode == 0
    done = run_printing(printing, "--lines", "200000", shell="| head -1; exit ${PIPESTATUS[0]}")
    assert done.returncode == 141 and done.stderr == b"" and len(done.stdout.splitlines()) == 1
    done = run_printing(printing, "--help", shell="| true; exit ${PIPESTATUS[0]}")
    assert done.stderr == b""


# The command line


def parse(config_class, *argv):
    return parse_config(config_class, "about", argv)


def test_values_may_begin_with_a_dash():
    assert parse(GenerateConfig, "--prompt", "-hello").prompt == ["-hello"]
    assert parse(GenerateConfig, "--prompt", "-a", "b", "-5", "- c", "--seed", "4").prompt == ["-a", "b", "-5", "- c"]
    assert parse(GenerateConfig, "--prompt=--hello").prompt == ["--hello"]
    assert parse(GenerateConfig, "--prompt", "a", "--prompt", "b").prompt == ["a", "b"]
    assert parse(ShowPatchesConfig, "--text", "-h").text == "-h"
    assert parse(ShowPatchesConfig, "--text", "-- a dash").text == "-- a dash"


def test_numbers_below_zero_stay_numbers(capsys):
    with pytest.raises(SystemExit):
        parse(GenerateConfig, "--seed", "1", "--max_new_bytes", "-3")
    assert "max_new_bytes is -3" in capsys.readouterr().err
    assert parse(CreatePatchesConfig, "--entropy_threshold", "-0.5").entropy_threshold == -0.5


@pytest.mark.parametrize(
    "argv",
    ["a.txt --model m --streams 2", "--model m a.txt --streams 2", "--streams=2 --model m -- a.txt"],
)
def test_the_file_goes_anywhere(argv):
    config = parse(CompressConfig, *argv.split())
    assert (config.file, config.model, config.streams) == ("a.txt", "m", 2)
    assert config.given_flags == {"file", "model", "streams"}


def test_the_file_beside_flags_without_values(capsys):
    assert parse(CompressConfig, "--verify", "a.txt").file == "a.txt"
    assert parse(CompressConfig, "--verify", "no", "a.txt").verify is False
    assert parse(CompressConfig, "--no_verify", "a.txt").file == "a.txt"
    assert parse(CompressConfig, "--", "-odd").file == "-odd"
    for argv, said in ((["a", "b"], "more than one file"), (["a", "--fiel", "b"], "did you mean --file?")):
        with pytest.raises(SystemExit):
            parse(CompressConfig, *argv)
        assert said in capsys.readouterr().err


def test_mistyped_flags(capsys):
    for flag in ("--max-new-bytes", "-max_new_bytes", "--max_new_byte=4"):
        with pytest.raises(SystemExit):
            parse(GenerateConfig, flag)
        assert "did you mean --max_new_bytes?" in capsys.readouterr().err


def test_a_flag_given_twice_is_said(capsys):
    assert parse(GenerateConfig, "--seed", "4", "--seed=5").seed == 5
    assert "--seed is given more than once; 5, the last, counts" in capsys.readouterr().err
    for flags in (["--no_interactive"] * 2, ["--interactive", "--no_interactive"]):
        assert parse(GenerateConfig, *flags).interactive is False
        assert "--interactive is given more than once; False, the last, counts" in capsys.readouterr().err


def test_a_tilde_is_the_home_folder(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    config = parse(CompressConfig, "--output=~/x.blt", "--model", "~/runs/a", "~/a.txt")
    assert (config.output, config.model, config.file) == ("/home/me/x.blt", "/home/me/runs/a", "/home/me/a.txt")
    assert parse(CreatePatchesConfig, "--dataset", "~/corpus").dataset == "/home/me/corpus"
    # A text is no path.
    assert parse(GenerateConfig, "--prompt", "~/x").prompt == ["~/x"]
    with pytest.raises(SystemExit):
        parse(CompressConfig, "a.txt", "--output", "")
    assert "--output is empty" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_field_that_names_a_path_is_known(script):
    _, config_class = entry_point(script)
    names = {field.name for field in dataclasses.fields(config_class) if field.type not in (bool, "bool")}
    paths = {name for name in names if name.endswith(("_path", "_cache", "_dir", "file", "output"))}
    assert paths <= PATH_FIELDS


# Commands that are printed


def test_printed_commands_are_quoted_and_complete(monkeypatch):
    config = parse(
        CreatePatchesConfig, "--dataset", "my corpus", "--data_cache", "d", "--preset", "cpu", "--streams", "4"
    )
    words = shlex.split(next_command("llm.py", config, output="it's"))
    assert words[:2] == ["python", "llm.py"]
    assert ("--dataset", "my corpus") in zip(words, words[1:])
    assert ("--data_cache", "d") in zip(words, words[1:]) and ("--output", "it's") in zip(words, words[1:])
    # The preset that was named, not the size that this script chose for it.
    assert "--streams" not in words and words[words.index("--preset") + 1 :][:2] == ["cpu", "--dataset"]
    # From another folder the script has a path.
    monkeypatch.setattr(sys, "argv", [str(ROOT / "create_patches.py")])
    assert shlex.split(next_command("llm.py"))[1] == str(ROOT / "llm.py")


def test_the_printed_command_of_compress_works(folder, tmp_path):
    name = "my file's.txt"
    (folder / name).write_bytes(some_words(20))
    printed = output_of(folder, "compress", name, "--model", "checkpoints", "--device", "cpu", "--context_bytes", "64")
    command = printed[printed.index("next: ") :].splitlines()[0].removeprefix("next: ")
    words = shlex.split(command)
    assert words[:2] == ["python", "compress.py"]
    assert "checksum right" in output_of(folder, "compress", *words[2:])
    assert (folder / f"{name}.restored").read_bytes() == some_words(20)


def next_of(printed):
    """(script, its words) of the command that a script printed as the next step."""
    line = [line for line in printed.splitlines() if line.startswith("next: ")][0]
    python, script, *words = shlex.split(line.removeprefix("next: "))
    assert python == "python"
    return script.removesuffix(".py"), words


@pytest.mark.slow
def test_each_printed_command_runs(tmp_path):
    """From the entropy model to a continued text by what is printed, with every path but the usual one."""
    (tmp_path / "my corpus").mkdir()
    for number in range(40):
        (tmp_path / "my corpus" / f"{number}.txt").write_bytes(some_words(200, seed=number))
    # Sizes are no paths: they are given to every script.
    paths = ["--dataset", "my corpus", "--data_cache", "stores here", "--val_fraction", "0.2"]
    printed = output_of(tmp_path, "entropy_llm", *ENTROPY_FLAGS, *paths, "--output", "models/my entropy.pth")
    script, words = next_of(printed)
    assert script == "create_patches"
    script, words = next_of(output_of(tmp_path, script, *words, "--cache_dir", "my patches"))
    assert script == "llm"
    script, words = next_of(output_of(tmp_path, script, *words, *BLT_FLAGS, "--output", "my model"))
    assert script == "generate"
    assert output_of(tmp_path, script, *words, "--max_new_bytes", "3").startswith("The history of")


# Found before the work


def test_a_bad_output_is_found_first(folder, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    text = ("--file", "a.txt", "--device", "cpu")
    # The model does not exist: that would be the next thing to be noticed.
    for script in ("evaluate", "show_patches"):
        for output in (file, file / "folder"):
            assert "give another --output" in error_of(folder, script, *text, "--model", "none", "--output", output)
    for output in (tmp_path, file / "x.blt", "a.txt", "/dev/null"):
        assert "give another --output" in error_of(folder, "compress", "a.txt", "--model", "none", "--output", output)
    assert file.read_text() == "mine" and (folder / "a.txt").read_bytes() == some_words(60)
    line = error_of(folder, "convert_hf", "--to_hf", "checkpoints", "--output", "checkpoints")
    assert "would be overwritten" in line


def test_results_do_not_replace_what_is_read(folder, tmp_path):
    (tmp_path / "patches.html").write_text("a page to show")
    flags = ("--file", tmp_path / "patches.html", "--output", tmp_path, "--device", "cpu")
    assert "would be overwritten" in error_of(folder, "show_patches", *flags)
    (tmp_path / "card.json").write_text("{}")
    flags = ("--file", tmp_path / "card.json", "--output", tmp_path, "--device", "cpu")
    assert "would be overwritten" in error_of(folder, "evaluate", *flags)
    # A file of that name that compress.py has not written.
    (tmp_path / "b.txt").write_text("hello")
    (tmp_path / "b.txt.blt").write_text("mine")
    line = error_of(folder, "compress", tmp_path / "b.txt", "--model", "checkpoints", "--device", "cpu")
    assert "compress.py has not written it" in line and (tmp_path / "b.txt.blt").read_text() == "mine"


def test_missing_packages_are_named():
    check_packages("numpy", "torch")
    with pytest.raises(ValueError, match="pip install not_there"):
        check_packages("numpy", "not_there")


def test_a_context_of_4_billion_allocates_by_the_text(folder):
    context = ("--context_bytes", str(2**32 - 1), "--device", "cpu")
    output_of(folder, "generate", "--prompt", "a", "--max_new_bytes", "3", *context)
    output_of(folder, "show_patches", "--file", "a.txt", "--model", "checkpoints", "--output", "shown", *context)
    flags = ("--row_bytes", str(2**32 - 1), "--preset", "cpu", "--samples", "0", "--robustness_bytes", "0")
    output_of(folder, "evaluate", "--file", "a.txt", "--device", "cpu", *flags)


# Damaged models


def cut(path, n_bytes):
    path.write_bytes(path.read_bytes()[:n_bytes])


DAMAGE = {
    "weights cut": ("best.pt", lambda path: cut(path, 1000)),
    "weights empty": ("best.pt", lambda path: cut(path, 0)),
    "weights are text": ("best.pt", lambda path: path.write_text("hello")),
    "record cut": ("model.json", lambda path: cut(path, 100)),
    "record nested": ("model.json", lambda path: path.write_text("[" * 100_000)),
    "no record": ("model.json", lambda path: path.write_text("[]")),
    "one setting more": ("model.json", lambda path: edit_record(path, lambda r: r["model_config"].update(x=1))),
    "one setting less": ("model.json", lambda path: edit_record(path, lambda r: r["model_config"].pop("rope_theta"))),
    "no settings": ("model.json", lambda path: edit_record(path, lambda r: r.update(model_config=None))),
    "huge": ("model.json", lambda path: edit_record(path, lambda r: r["model_config"].update(global_dim=10**9))),
    "rule": ("model.json", lambda path: edit_record(path, lambda r: r["patch_config"].update(x=1))),
    "no rule": ("model.json", lambda path: edit_record(path, lambda r: r.update(patch_config=None))),
    "kind": ("model.json", lambda path: edit_record(path, lambda r: r.update(kind=["blt"]))),
    "precision": ("model.json", lambda path: edit_record(path, lambda r: r.update(precision="fp7"))),
    "path": ("model.json", lambda path: edit_record(path, lambda r: r.update(entropy_model_path=None))),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model_is_one_line(folder, tmp_path, name):
    shutil.copytree(folder / "checkpoints", tmp_path / "damaged")
    file, damage = DAMAGE[name]
    damage(tmp_path / "damaged" / file)
    model = ("--model", "damaged", "--device", "cpu")
    error_of(tmp_path, "generate", "--prompt", "a", *model)
    (tmp_path / "a.txt").write_bytes(some_words(9))
    error_of(tmp_path, "evaluate", "--file", "a.txt", *model)
    error_of(tmp_path, "compress", "a.txt", *model)
    error_of(tmp_path, "convert_hf", "--to_hf", "damaged")
    assert not (tmp_path / "evaluation").exists() and not (tmp_path / "a.txt.blt").exists()


def test_a_record_without_rows_says_what_to_pass(folder):
    assert "pass --context_bytes" in error_of(folder, "generate", "--prompt", "a", "--device", "cpu")


HF_DAMAGE = {
    "weights cut": ("model.safetensors", lambda path: cut(path, 5000)),
    "weights cut at the end": ("model.safetensors", lambda path: cut(path, path.stat().st_size - 100)),
    "weights empty": ("model.safetensors", lambda path: cut(path, 0)),
    "header of 2**64 bytes": ("model.safetensors", lambda path: path.write_bytes(b"\xff" * 8 + b"{}")),
    "no weights": ("model.safetensors", lambda path: path.unlink()),
    "config cut": ("config.json", lambda path: cut(path, 50)),
    "config nested": ("config.json", lambda path: path.write_text("[" * 100_000)),
    "config without a part": ("config.json", lambda path: edit_record(path, lambda c: c.update(global_config=None))),
    "config of text": ("config.json", lambda path: edit_record(path, lambda c: c.update(vocab_size="x"))),
    "config huge": (
        "config.json",
        lambda path: edit_record(path, lambda c: c["global_config"].update(hidden_size=10**9)),
    ),
}


@pytest.fixture(scope="module")
def hf_folder(folder):
    output_of(folder, "convert_hf", "--to_hf", "checkpoints", "--output", "hf")
    return folder / "hf"


@pytest.mark.parametrize("name", HF_DAMAGE)
def test_a_damaged_transformers_model_is_one_line(hf_folder, tmp_path, name):
    shutil.copytree(hf_folder, tmp_path / "hf")
    file, damage = HF_DAMAGE[name]
    damage(tmp_path / "hf" / file)
    line = error_of(tmp_path, "convert_hf", "--from_hf", "hf", "--output", "ours")
    assert "transformers cannot open 'hf'" in line and not (tmp_path / "ours").exists()


# Pages


def test_a_page_escapes_its_text(folder, tmp_path):
    """A title, a file's name and a text that would end the script element, or be an element."""
    attack = "</script><img src=x onerror=alert(1)>"
    path = tmp_path / "<b>&'.txt"
    path.write_text(attack * 3)
    flags = ("--file", path, "--title", attack, "--output", tmp_path / "page", "--device", "cpu")
    output_of(folder, "show_patches", *flags)
    page = (tmp_path / "page" / "patches.html").read_text()
    own = PAGE.read_text(encoding="utf-8")
    assert page.count("<img") == own.count("<img") and page.count("</script") == own.count("</script")
    assert "<b>&'" not in page
    # The page itself puts data into text only, never into HTML.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", own)
