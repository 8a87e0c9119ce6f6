"""The tree keeps its rules: levels of imports, no circles, lines that fit, comments that explain."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
PACKAGE = sorted(path.stem for path in (ROOT / "blt").glob("*.py") if path.stem != "__init__")
# A module imports only modules of a lower level. docs/design.md shows the same table.
LEVELS = [
    {"checks", "commands", "device", "files", "ids", "locks", "processes", "triton_kernels"},
    {"checkpoints", "config", "kernels", "patch_rules", "progress", "records", "sharding", "splits"},
    {"attention", "corpus", "loss_watch", "ngrams", "optimizers", "pictures", "replay", "segments"},
    {"layers", "plain_blt", "ppmd", "rows", "studies"},
    {"entropies", "flops", "metric", "sampling", "tokens", "training_patches"},
    {"entropy_cache", "incremental", "loop"},
    {"runs", "tasks", "training"},
]
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}
# Imported inside functions, because importing matplotlib or transformers takes long and --help should not wait.
SLOW = {"blt.pictures", "convert_hf"}


def own_imports(path, inside_functions):
    """Modules of this project that a file imports, at its top or inside functions: dotted names."""
    tree = ast.parse(path.read_text())
    nested = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    found = set()
    for node in ast.walk(tree):
        if (id(node) in nested) != inside_functions:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "blt":
            names = [f"blt.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        found |= {name for name in names if name.split(".")[0] in {"blt", "tests", *SCRIPTS}}
    return found


def all_imports(path):
    return own_imports(path, False) | own_imports(path, True)


def test_every_module_has_a_level():
    assert set(LEVEL) == set(PACKAGE)


@pytest.mark.parametrize("module", PACKAGE)
def test_package_imports_only_lower_levels(module):
    for name in all_imports(ROOT / "blt" / f"{module}.py"):
        package, _, imported = name.partition(".")
        assert package == "blt", f"blt/{module}.py imports {name}, which is not in the package"
        assert LEVEL[imported] < LEVEL[module], (
            f"blt/{module}.py imports blt/{imported}.py, which is not of a lower level"
        )


def test_scripts_import_in_no_circle():
    imports = {script: own_imports(ROOT / f"{script}.py", False) & set(SCRIPTS) for script in SCRIPTS}
    while imports:
        free = [script for script, needed in imports.items() if not needed & set(imports)]
        assert free, f"a circle of imports among {sorted(imports)}"
        for script in free:
            del imports[script]


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("blt/*.py")], ids=lambda path: path.stem)
def test_functions_hide_no_import(path):
    assert own_imports(path, True) <= SLOW
    assert not any(name.startswith("tests") for name in all_imports(path))


def test_patch_rules_are_numpy_only():
    text = (ROOT / "blt" / "patch_rules.py").read_text() + (ROOT / "blt" / "checks.py").read_text()
    assert "torch" not in text


def test_design_page_shows_the_levels():
    page = (ROOT / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| (\d) \| (.+?) \|$", page, re.M)
    assert [set(re.findall(r"`(\w+)\.py`", names)) for _, names in rows] == LEVELS


# Lines

CODE = [*ROOT.glob("*.py"), *ROOT.glob("blt/*.py"), *ROOT.glob("tests/*.py")]
PROSE = [
    ROOT / "README.md",
    ROOT / "LOG.md",
    ROOT / "data" / "LICENSES.md",
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("records/*/README.md"),
]


@pytest.mark.parametrize("path", [*CODE, *PROSE], ids=lambda path: path.name)
def test_lines_fit(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= 120, f"{path.name}:{number} has {len(line)} characters"


def test_most_lines_are_short():
    lengths = sorted(len(line) for path in CODE for line in path.read_text().splitlines() if line.strip())
    assert lengths[int(0.95 * len(lengths))] < 105


def test_the_package_explains_itself():
    lines = [line.strip() for path in ROOT.glob("blt/*.py") for line in path.read_text().splitlines()]
    assert sum(line.startswith("#") for line in lines) >= 0.06 * len(lines)


def test_readme_is_short():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150 and len(readme.split()) <= 1500
