"""Settings of a script from its dataclass, presets and the command line; errors in one line; the header that is printed."""

import argparse
import dataclasses
import os
import re
import sys
from inspect import getsource
from pathlib import Path

import torch

from blt.files import git_commit


def parse_config(config_class, description, presets=None, argv=None):
    """Read a config from the command line: the dataclass's values, then presets, then flags.

    Every field is a flag, and the comment at the end of its line is its help. presets: {name: {field: value}}. The field that
    a config class names as its POSITIONAL may be given first, without its flag.
    """
    from transformers import HfArgumentParser

    presets = presets or {}
    parser = HfArgumentParser(
        config_class, description=description, formatter_class=_HelpFormatter, usage="%(prog)s [--field value ...]"
    )
    comments = field_comments(config_class)
    for action in parser._actions:
        if action.dest in comments:
            action.help = (
                "do without: " if action.option_strings[0].startswith("--no_") and action.nargs == 0 else ""
            ) + comments[action.dest].replace("%", "%%")
            action.option_strings = [
                name for name in action.option_strings if "-" not in name[2:]
            ]  # of --a_b and --a-b show one
            action.metavar = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else "VALUE"
        if action.dest == "preset":
            action.help += f"; one or more of: {', '.join(presets) or 'none here'}"
    argv = sys.argv[1:] if argv is None else argv
    if hasattr(config_class, "POSITIONAL") and argv and not argv[0].startswith("-"):
        argv = [f"--{config_class.POSITIONAL}", *argv]
    chosen = parser.parse_known_args(argv)[0]
    names = (["quick_demo"] if getattr(chosen, "quick_demo", False) else []) + (getattr(chosen, "preset", None) or [])
    for name in names:
        if name not in presets:
            parser.error(f"unknown preset {name!r}; choose from: {', '.join(presets)}")
        parser.set_defaults(**presets[name])
    try:
        config = parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)[0]
    except ValueError as error:
        parser.error(
            str(error).replace("Some specified arguments are not used by the HfArgumentParser", "unknown flags")
        )
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser._defaults.clear()
    config.given_flags = set(vars(parser.parse_known_args(argv)[0]))
    return config


def given_fields(config):
    """Names of the settings that were chosen for this run: its flags; of a config made in Python, what differs from its class's values.

    Presets and the values in a file are not among them: they may give way, for instance to the sizes of a model that is read.
    """
    try:
        return config.given_flags
    except AttributeError:
        default = type(config)()
        return {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(default, f.name)}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the lines of the description and show every default."""


def field_comments(config_class):
    """{field: the comment at the end of its line}, over a dataclass and its bases."""
    comments = {}
    for base in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(base):
            for line in getsource(base).splitlines():
                found = re.match(r"    (\w+): [^#]+  # (.+)", line)
                if found:
                    comments[found[1]] = found[2]
    return comments


def run_script(main, config_class, description, presets=None):
    """Parse the command line and run main(config). A user's mistake ends in one line and exit status 1, without a traceback.

    Set BLT_TRACEBACK=1 to see where an error came from.
    """
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    config = parse_config(config_class, description, presets)
    try:
        main(config)
    except (ValueError, OSError) as error:  # FileNotFoundError, PermissionError and ConnectionError are OSErrors
        if os.environ.get("BLT_TRACEBACK"):
            raise
        message = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename:  # raised by the system, not by us
            message = f"{error.filename}: {error.strerror}; check the path and its permissions, or pass another one"
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def print_header(config, device, precision):
    """Print what runs where, and every setting: enough to repeat the run."""
    print(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"commit {git_commit()} | torch {torch.__version__} | {device} ({name}) | {precision}")
    if device.type == "cpu" and not getattr(config, "preset", True):
        print("note: no GPU is used; --preset cpu is sized for a CPU")
    print("config " + " ".join(f"{key}={value}" for key, value in dataclasses.asdict(config).items()))


def print_table(header, rows):
    """Columns as wide as their widest cell, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        print(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
            ).rstrip()
        )
