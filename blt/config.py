"""Settings of a script: a dataclass, presets and the command line; errors in one line; what is printed first.

A config is a dataclass with one field a line, and the comment at the end of the line is the
field's --help text. What decides a field's value, the strongest first:

    a flag                     --steps 500
    the script's source        steps: int = 500
    the presets                steps: int = BY_PRESET, and the size's or the machine's dict has "steps"
    the library's default      the same field in a base class such as RunConfig

`DataConfig` applies the presets when a config is made.

So a number that a user writes in place of BY_PRESET takes effect with every preset.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import io
import linecache
import os
import re
import sys
import textwrap
import tokenize
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import torch

from blt.device import MACHINE_NAMES, detect_machine
from blt.files import git_commit


class ByPreset:
    """The type of BY_PRESET, which stands in a dataclass for the value that the presets give."""

    def __repr__(self):
        return "BY_PRESET"


BY_PRESET = ByPreset()
# Names of model sizes; each script has its own numbers for them.
SIZE_NAMES = ("nano", "tiny", "small", "medium", "large")


@dataclass(frozen=True)
class Presets:
    """Named values for the fields that are BY_PRESET: sizes say what the model is, machines how it is trained.

    sizes, machines: {name: {field: value}}. A size and a machine never set the same field, so
    they combine freely.
    pairs: {(size, machine): {field: value}} for what one size needs otherwise on one machine; it
    beats both.
    size_of_machine: {machine: size} for a run that names no size; other machines get
    default_size.
    alone: {name: {field: value}}, presets that set everything and combine with no other.
    """

    sizes: dict
    machines: dict
    pairs: dict = field(default_factory=dict)
    default_size: str = "medium"
    size_of_machine: dict = field(default_factory=lambda: {"cpu": "nano"})
    alone: dict = field(default_factory=dict)

    def names(self):
        return [*self.sizes, "auto", *self.machines, *self.alone]

    def choose(self, names, device="auto"):
        """The full list of presets for the names that a user gave: [size, machine], or [the one that stands alone].

        A machine that is not named, or is named auto, is detected.
        Raises ValueError for unknown names, and for two that set the same fields.
        """
        for name in names:
            if name not in self.names():
                raise ValueError(f"unknown preset {name!r}; choose from: {', '.join(self.names())}")
        alone = [name for name in names if name in self.alone]
        if alone and len(names) > 1:
            raise ValueError(
                f"preset {alone[0]!r} sets the model and the run; it combines with no other, "
                f"and there are {', '.join(names)}"
            )
        if alone:
            return alone
        sizes = [name for name in names if name in self.sizes]
        machines = [name for name in names if name not in self.sizes and name != "auto"]
        for kind, named in (("sizes", sizes), ("machines", machines)):
            if len(set(named)) > 1:
                raise ValueError(f"presets {' and '.join(named)} are {kind} that set the same fields; name one of them")
        machine = machines[0] if machines else detect_machine(device)
        size = sizes[0] if sizes else self.size_of_machine.get(machine, self.default_size)
        return [size, machine]

    def values(self, chosen):
        """{field: value} of what `choose` returned."""
        if len(chosen) == 1:
            return self.alone[chosen[0]]
        size, machine = chosen
        return self.sizes[size] | self.machines[machine] | self.pairs.get((size, machine), {})


def apply_presets(config):
    """Replace every BY_PRESET in a config by the preset's value, or by the library's default where there is none.

    The config's class has its `Presets` as PRESETS; a class without them has no such fields.
    """
    presets = getattr(config, "PRESETS", None)
    if presets is None:
        return
    # --quick_demo is short for --preset quick_demo.
    names = ["quick_demo"] if getattr(config, "quick_demo", False) else []
    config.preset = presets.choose(list(dict.fromkeys([*names, *config.preset])), config.device)
    values = presets.values(config.preset)
    # What a preset has and the source decides otherwise: `print_header` says so.
    config.beaten_presets = {}
    for f in dataclasses.fields(config):
        is_of_source = f.default is not BY_PRESET and getattr(config, f.name) == f.default
        if f.name in values and is_of_source and values[f.name] != f.default:
            config.beaten_presets[f.name] = values[f.name]
        if getattr(config, f.name) is BY_PRESET:
            value = values[f.name] if f.name in values else library_default(type(config), f.name)
            setattr(config, f.name, value)


def library_default(config_class, name):
    """The default of a field in the nearest base class where it is not BY_PRESET."""
    # The nearest class first, as Python looks up attributes.
    for base in config_class.__mro__:
        base_field = base.__dict__.get("__dataclass_fields__", {}).get(name)
        if base_field is not None and base_field.default is not BY_PRESET:
            if base_field.default is not dataclasses.MISSING:
                return base_field.default
            if base_field.default_factory is not dataclasses.MISSING:
                return base_field.default_factory()
    raise TypeError(f"{config_class.__name__}.{name} is BY_PRESET, but no preset and no base class has a value for it")


# The command line


def parse_config(config_class, description, argv=None):
    """Read a config from the command line, where every field of the dataclass is a flag.

    The config's `given_flags` says which flags were given. The field that a config class names as
    its POSITIONAL may be given first, without its flag. CHOICES, {field: function}, limits a
    field to the words that the function returns.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if hasattr(config_class, "POSITIONAL") and argv and not argv[0].startswith("-"):
        argv = [f"--{config_class.POSITIONAL}", *argv]
    parser = make_parser(config_class, description)
    # parse_known_args, because argparse's own message for unknown flags suggests nothing.
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unknown flags: {' '.join(unknown)}{_did_you_mean(unknown, config_class)}")
    try:
        config = config_class(**vars(given))
    except ValueError as error:
        parser.error(str(error))
    # Not a field: it says how this run was asked for, and is not a setting to save.
    config.given_flags = set(vars(given))
    return config


def given_fields(config):
    """Names of the settings that were chosen for this run.

    On the command line these are the flags; in a config made in Python, what differs from the
    class's values. Presets and the values in a file are not among them: they give way, for
    instance to the sizes of a model that is read.
    """
    if hasattr(config, "given_flags"):
        return config.given_flags
    default = type(config)()
    return {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(default, f.name)}


def make_parser(config_class, description):
    """An argparse parser with a flag for each field; flags that are not given leave no trace in what it returns."""
    parser = argparse.ArgumentParser(
        description=description,
        # argparse's own usage would list sixty flags.
        usage="%(prog)s [--field value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # A flag that is not given leaves no trace, so that the dataclass decides.
        argument_default=argparse.SUPPRESS,
        # --step would silently mean --steps until a flag --step_size is added.
        allow_abbrev=False,
    )
    types_of_fields = get_type_hints(config_class)
    comments = field_comments(config_class)
    choices_of_fields = {name: names() for name, names in getattr(config_class, "CHOICES", {}).items()}
    for f in dataclasses.fields(config_class):
        options = _argparse_options(types_of_fields[f.name], choices_of_fields.get(f.name))
        # A "%" in a help text would be a format to argparse.
        text = f.metadata.get("help", comments.get(f.name, "")) + _describe_default(config_class, f)
        parser.add_argument(f"--{f.name}", help=text.replace("%", "%%"), **options)
        if types_of_fields[f.name] is bool:
            parser.add_argument(f"--no_{f.name}", dest=f.name, action="store_false", help=argparse.SUPPRESS)
    return parser


def _argparse_options(field_type, choices=None):
    """argparse's keyword arguments for a field's type: int, float, str, bool, Literal, list[...] and X | None."""
    arguments = get_args(field_type)
    # X | None: as X, and the word None stands for None.
    if get_origin(field_type) in (Union, types.UnionType):
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        options = _argparse_options(inner, choices)
        convert = options["type"]
        options["type"] = _named(lambda text: None if text == "None" else convert(text), convert)
        return options
    if get_origin(field_type) is list:
        return {**_argparse_options(arguments[0], choices), "nargs": "*"}
    if get_origin(field_type) is Literal:
        return {"type": str, "choices": arguments, "metavar": "{" + ",".join(arguments) + "}"}
    # --flag, --flag True and --flag False; make_parser adds --no_flag.
    if field_type is bool:
        return {"type": _parse_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
    if choices is not None:
        return {"type": _one_of(choices), "metavar": "{" + ",".join(choices) + "}"}
    return {"type": field_type, "metavar": field_type.__name__.upper()}


def _named(convert, original):
    """Give a converter the name that argparse prints in "invalid int value"."""
    convert.__name__ = original.__name__
    return convert


def _one_of(choices):
    def convert(text):
        if text not in choices:
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(choices)})")
        return text

    return convert


def _parse_bool(text):
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


def _describe_default(config_class, f):
    """What --help says about a field without its flag: its default, or its values by preset."""
    default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
    if default is not BY_PRESET:
        return f" (default: {default})"
    presets = config_class.PRESETS
    groups = [presets.sizes, presets.machines, presets.alone]
    named = [f"{name} {values[f.name]}" for group in groups for name, values in group.items() if f.name in values]
    named += [f"{' '.join(pair)} {values[f.name]}" for pair, values in presets.pairs.items() if f.name in values]
    try:
        named.append(f"else {library_default(config_class, f.name)}")
    except TypeError:
        pass  # the presets always give a value
    return f" (by preset: {', '.join(named)})"


def _did_you_mean(unknown, config_class):
    names = [f"--{f.name}" for f in dataclasses.fields(config_class)]
    close = [match for flag in unknown for match in difflib.get_close_matches(flag, names, n=1)]
    return f"; did you mean {' '.join(close)}?" if close else ""


def field_comments(config_class):
    """{field: the comment at the end of its line}, over a dataclass and its bases."""
    comments = {}
    for base in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = _class_source(base)
        except OSError:  # a class that was made by code has no source
            continue
        # The comments of the class body by line. ast drops comments, so tokenize finds them.
        comment_of_line = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign) and node.end_lineno in comment_of_line:
                comments[node.target.id] = comment_of_line[node.end_lineno]
    return comments


def _class_source(config_class):
    """The lines of a class. For a class at the top of its file this is 20 times faster than inspect.getsource.

    (inspect parses the whole file to find the class, for each class again; --help would wait for that.)
    """
    if "." in config_class.__qualname__:
        return textwrap.dedent(inspect.getsource(config_class))
    lines = linecache.getlines(inspect.getsourcefile(config_class))
    is_head = re.compile(rf"class {config_class.__name__}\b").match
    first = next((number for number, line in enumerate(lines) if is_head(line)), None)
    if first is None:
        raise OSError(f"no source of {config_class.__name__}")
    end = first + 1
    while end < len(lines) and (lines[end][:1].isspace() or not lines[end].strip()):
        end += 1
    return "".join(lines[first:end])


def run_script(main, config_class, description):
    """Parse the command line and run main(config). A user's mistake ends in one line and exit status 1.

    Set BLT_TRACEBACK=1 to see where an error came from.
    """
    # Lines appear at once in a file or pipe too, and text that the terminal cannot show is replaced.
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    config = parse_config(config_class, description)
    try:
        main(config)
    except (ValueError, OSError) as error:  # FileNotFoundError, PermissionError and ConnectionError are OSErrors
        if os.environ.get("BLT_TRACEBACK"):
            raise
        message = str(error)
        # Such a message names neither the file nor what to do; ours do.
        raised_by_system = isinstance(error, OSError) and error.strerror and error.filename
        if raised_by_system:
            message = f"{error.filename}: {error.strerror}; check the path and its permissions, or pass another one"
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


# What scripts print


def print_header(config, device, precision):
    """Print what runs where, and every setting: enough to repeat the run."""
    print(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"commit {git_commit()} | torch {torch.__version__} | {device} ({name}) | {precision}")
    machines = [preset for preset in getattr(config, "preset", []) if preset in MACHINE_NAMES]
    if machines:
        print(f"machine {machines[0]}: {MACHINE_NAMES[machines[0]]} | presets {' '.join(config.preset)}")
    for name, value in getattr(config, "beaten_presets", {}).items():
        print(f"note: the file's {name}={getattr(config, name)} beats the preset's {value}")
    print("config " + " ".join(f"{key}={value}" for key, value in dataclasses.asdict(config).items()))


def print_table(header, rows):
    """Print columns as wide as their widest cell, the first aligned left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        first = row[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        print("  ".join([first, *others]).rstrip())


def next_command(script, preset=(), **flags):
    """The command that a script prints as the next step, with the presets that were named on its own command line."""
    words = [f"python {script}"]
    if preset:
        words.append("--preset " + " ".join(preset))
    words += [f"--{name} {value}" for name, value in flags.items()]
    return " ".join(words)


def part_of(config, config_class):
    """The part of a script's config that another config class describes: `part_of(config, BLTConfig)`."""
    return config_class(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config_class)})
