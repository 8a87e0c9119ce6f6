"""Checks of settings: a bad value raises ValueError naming the field, the value and what is allowed."""

import importlib.util
import os
from pathlib import Path
from typing import get_type_hints


def check(config, name, is_good, allowed):
    """Raise ValueError naming a config field, its value and what is allowed, unless is_good."""
    if not is_good:
        raise ValueError(f"{name} is {getattr(config, name)!r}; it must be {allowed}")


def check_positive(config, *names):
    """Raise ValueError unless these fields are numbers above zero, or None where the field may be None."""
    _check_numbers(config, names, lambda value: value > 0, "above 0")


def check_shares(config, *names):
    """Raise ValueError unless these fields are shares from 0 to below 1, or None where the field may be None."""
    _check_numbers(config, names, lambda value: 0 <= value < 1, "from 0 to below 1")


def _check_numbers(config, names, is_good, allowed):
    types = get_type_hints(type(config))
    for name in names:
        value = getattr(config, name)
        may_be_none = value is None and isinstance(None, types[name])
        check(config, name, may_be_none or (isinstance(value, (int, float)) and is_good(value)), allowed)


def check_output(path, is_folder=False, reads=()):
    """Raise ValueError unless a result can be written to this path: called before the work, not after it.

    is_folder: the path is a folder, to be made if it is missing.
    reads: paths that the run reads; a result must not replace them.
    """
    path = Path(path)
    advice = "give another --output"
    for read in reads:
        if read is not None and path.resolve() == Path(read).resolve():
            raise ValueError(f"{path} is read by this run and would be overwritten; {advice}")
    if is_folder and path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, and results go into a folder of this name; {advice}")
    # A file is replaced whole, which would remove a device such as /dev/null.
    if not is_folder and path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file that can be replaced; {advice}")
    ancestor = path if is_folder else path.parent
    while not ancestor.exists() and ancestor != ancestor.parent:
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        raise ValueError(f"{path} cannot be written, because {ancestor} is a file and no folder; {advice}")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: no permission in {ancestor}; {advice}")


def check_written_by(path, script, advice="give another --output"):
    """Raise ValueError if a file is there that the script has not written."""
    path = Path(path)
    if not path.exists():
        return
    with open(path, "rb") as file:
        beginning = file.read(1 << 16)
    # With these two the results of evaluate.py and bench.py begin.
    if b'"command"' not in beginning or b'"commit"' not in beginning:
        raise ValueError(f"{path} exists, and {script} has not written it; {advice}")


def check_packages(*names):
    """Raise ValueError for packages that are not installed: called before the work that ends in using them."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"missing packages: {', '.join(missing)}; run: pip install {' '.join(missing)}")
