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
import codecs
import dataclasses
import difflib
import inspect
import io
import linecache
import math
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

from blt.checks import check_packages
from blt.commands import command
from blt.device import MACHINE_NAMES, detect_machine
from blt.files import DISK_IS_FULL, git_commit
from blt.processes import is_main, joined, n_processes, name_of_program


class ByPreset:
    """The type of BY_PRESET, which stands in a dataclass for the value that the presets give."""

    def __repr__(self):
        return "BY_PRESET"


BY_PRESET = ByPreset()
# Names of model sizes; each script has its own numbers for them.
SIZE_NAMES = ("nano", "tiny", "small", "medium", "large")

# Fields of all configs that hold a path (dataset may also be an id of the hub). On the command line
# a "~" at their beginning is the home folder, also where a shell leaves it: in quotes, after "=".
PATH_FIELDS = frozenset(
    """output model file decompress dataset val_dataset data_cache cache_dir patch_cache entropy_model_path
    prompt_file init_from to_hf from_hf patches_of work records continue_record cute_folder corpus_folder""".split()
)
# Fields of `DataConfig` that the next script must be told if this one was: `next_command`.
SHARED_FIELDS = (
    *"preset dataset val_dataset text_field corpus_bytes val_fraction max_document_bytes max_bytes val_bytes".split(),
    *"data_cache device precision".split(),
)
# What every script needs beside torch and NumPy, which are imported above.
NEEDED = ("tqdm", "filelock")


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
    size_of_machine: dict = field(default_factory=lambda: {"cpu": "nano", "cpu_hour": "small"})
    alone: dict = field(default_factory=dict)

    def names(self):
        return [*self.sizes, "auto", *self.machines, *self.alone]

    def choose(self, names, device="auto"):
        """The full list of presets for the names that a user gave: [size, machine], or [the one that stands alone].

        A machine that is not named, or is named auto, is detected (cpu_hour never is).
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
    # For the command that a script prints as the next one: other scripts have other sizes for a machine.
    config.named_presets = list(config.preset)
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
    its POSITIONAL may be given anywhere without its flag. CHOICES, {field: function}, limits a
    field to the words that the function returns; of a pair in EITHER at most one flag may be given.
    Of a flag that is given twice the last value counts, and a note says so; the values of a list
    add up.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser(config_class, description)
    words, repeated = _prepare_words(argv, config_class, parser)
    # parse_known_args, because argparse's own message for unknown flags suggests nothing.
    given, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(f"unknown flags: {' '.join(unknown)}{_did_you_mean(unknown, config_class)}")
    given = vars(given)
    for name in repeated:
        print(f"note: --{name} is given more than once; {given[name]!r}, the last, counts", file=sys.stderr)
    empty = [name for name in sorted(PATH_FIELDS & set(given)) if given[name] == ""]
    if empty:
        parser.error(f"--{empty[0]} is empty; give a path, or leave the flag out")
    for name, value in given.items():
        # Results are saved as JSON, which has no infinity, and a comparison with NaN is never true.
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            parser.error(f"{name} is {value}; it must be a finite number")
    for first, second in getattr(config_class, "EITHER", ()):
        if first in given and second in given:
            parser.error(f"give either --{first} or --{second}, not both: one follows from the other")
    try:
        config = config_class(**(_default_paths(config_class) | given))
    except ValueError as error:
        parser.error(str(error))
    # Not a field: it says how this run was asked for, and is not a setting to save.
    config.given_flags = set(given)
    return config


def _default_paths(config_class):
    """{field: path} for the default paths that begin with "~": those that a user has written into a script."""
    fields = [f for f in dataclasses.fields(config_class) if f.name in PATH_FIELDS and isinstance(f.default, str)]
    return {f.name: os.path.expanduser(f.default) for f in fields if f.default.startswith("~")}


# Put before a value that begins with a dash, which argparse would take for a flag. No argument of a
# process can contain this character.
IS_VALUE = "\0"


def _is_flag(word):
    # "-5", "- item" and "-hello" are values where one is expected. So is "--", and what is no word.
    return re.match(r"--[A-Za-z][\w-]*(=|$)", word) is not None


def _prepare_words(argv, config_class, parser):
    """Rewrite a command line so that argparse reads it as people mean it.

    Values that begin with a dash are marked by IS_VALUE, and a word that belongs to no flag gets the
    flag of POSITIONAL. Returns the words, and the names of flags that are given more than once.
    """
    types_of_flags = {}
    fields_of_flags = {}
    for name, field_type in get_type_hints(config_class).items():
        types_of_flags |= {f"--{name}": field_type, f"--no_{name}": type(None)}
        fields_of_flags |= {f"--{name}": name, f"--no_{name}": name}
    positional = getattr(config_class, "POSITIONAL", None)
    words = []
    seen = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        flag = word.split("=")[0]
        is_loose = not word.startswith("-") or word == "--"
        if is_loose and positional is not None:
            # After "--" every word is one, whatever it begins with.
            loose = rest if word == "--" else [word]
            words += [f"--{positional}={name}" for name in loose]
            # A list takes all of them.
            if get_origin(types_of_flags[f"--{positional}"]) is not list:
                seen += [positional] * len(loose)
            rest = [] if word == "--" else rest
            continue
        words.append(word)
        if flag in types_of_flags and get_origin(types_of_flags[flag]) is not list:
            seen.append(fields_of_flags[flag])
        if word == flag:
            n_values = _count_values(types_of_flags.get(flag), rest) if _is_flag(flag) else 0
            words += [_marked(value, types_of_flags.get(flag)) for value in rest[:n_values]]
            rest = rest[n_values:]
    repeated = sorted({name for name in seen if seen.count(name) > 1})
    if positional in repeated:
        parser.error(f"there is more than one {positional}; give one")
    return words, repeated


def _count_values(field_type, rest):
    """How many of the words after a flag are its values.

    field_type: NoneType for a flag that takes none, None for one that does not exist.
    """
    values = 0
    # "-h" directly after a flag is its value; later it asks for help.
    for number, word in enumerate(rest):
        if _is_flag(word) or word == "--" or (word == "-h" and number > 0):
            break
        values = number + 1
    if field_type is type(None):
        return 0
    if field_type is bool:
        # --verify FILE: the next word is a value only if it says yes or no.
        return int(values > 0 and rest[0].lower() in BOOL_WORDS)
    takes_many = field_type is None or get_origin(field_type) is list
    return values if takes_many else min(values, 1)


def _marked(value, field_type):
    """A value with IS_VALUE before it if argparse would take it for a flag. Numbers need no mark."""
    holds_text = any(t is str for t in (field_type, *get_args(field_type)))
    return IS_VALUE + value if holds_text and value.startswith("-") else value


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
        if f.name in PATH_FIELDS:
            options["type"] = _expanding(options["type"])
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
        return {**_argparse_options(arguments[0], choices), "nargs": "*", "action": "extend"}
    if get_origin(field_type) is Literal:
        return {"type": str, "choices": arguments, "metavar": "{" + ",".join(arguments) + "}"}
    # --flag, --flag True and --flag False; make_parser adds --no_flag.
    if field_type is bool:
        return {"type": _parse_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
    if choices is not None:
        return {"type": _one_of(choices), "metavar": "{" + ",".join(choices) + "}"}
    return {"type": _text if field_type is str else field_type, "metavar": field_type.__name__.upper()}


def _text(word):
    """A word of the command line without the mark of `_prepare_words`."""
    return word.removeprefix(IS_VALUE)


def _expanding(convert):
    def convert_path(word):
        path = convert(word)
        return os.path.expanduser(path) if isinstance(path, str) else path

    return _named(convert_path, convert)


def _named(convert, original):
    """Give a converter the name that argparse prints in "invalid int value"."""
    convert.__name__ = original.__name__
    return convert


def _one_of(choices):
    def convert(word):
        text = _text(word)
        if text not in choices:
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(choices)})")
        return text

    return convert


BOOL_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _parse_bool(text):
    if text.lower() not in BOOL_WORDS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return BOOL_WORDS[text.lower()]


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
    # "--stpes=4" is compared without its value, and "-steps" and "--row-bytes" as they are meant.
    flags = ["--" + word.split("=")[0].lstrip("-").replace("-", "_") for word in unknown if word.startswith("-")]
    close = [match for flag in flags for match in difflib.get_close_matches(flag, names, n=1)]
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

    A package that is missing is such a mistake too; --help does without it.

    Set BLT_TRACEBACK=1 to see where an error came from.
    """
    prepare_streams()
    try:
        try:
            config = parse_config(config_class, description)
            check_packages(*NEEDED)
            with joined(config):
                main(config)
        finally:
            # Here and not when Python ends, so that a closed pipe is noticed below: after --help, too.
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe has seen enough, as in "| head". Python flushes once more when it ends;
        # that must go somewhere, or it complains.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        # As a process ends that the signal SIGPIPE has stopped.
        sys.exit(141)
    except (ValueError, OSError) as error:  # FileNotFoundError, PermissionError and ConnectionError are OSErrors
        if os.environ.get("BLT_TRACEBACK"):
            raise
        print(f"{name_of_program()}: error: {_words_of(error)}", file=sys.stderr)
        sys.exit(1)
    except ImportError as error:
        package = "" if error.name is None else error.name.split(".")[0]
        # A file of this project that is missing is no package to install.
        is_ours = package == "blt" or (Path(__file__).parent.parent / f"{package}.py").exists()
        if os.environ.get("BLT_TRACEBACK") or not package or is_ours:
            raise
        print(f"{name_of_program()}: error: {error}; run: pip install {package}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        if is_main():
            print("\nstopped", file=sys.stderr)
        sys.exit(130)


def _words_of(error):
    """What is printed of a ValueError or OSError."""
    # Python's own messages name neither what to do nor, some of them, the file; ours do.
    if not (isinstance(error, OSError) and error.strerror):
        return str(error)
    # A copy has two names, and the second is the one that is written.
    name = error.filename2 or error.filename
    if error.errno in DISK_IS_FULL:
        what = "a file" if name is None else name
        return (
            f"{what} cannot be written: {error.strerror}; is the disk full? nothing that was there before is damaged; "
            "free some space and run the same command again (a training run: with --resume), or write elsewhere"
        )
    if name is None:
        return str(error)
    return f"{name}: {error.strerror}; check the path and its permissions, or pass another one"


def prepare_streams():
    """Let every print succeed: whatever the text holds, whatever the terminal can show, with closed streams too."""
    # In the order of their numbers: a file that is opened gets the lowest number that is free.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    codecs.register_error("show", _show_what_cannot_be_encoded)
    # Lines appear at once in a file or pipe too.
    sys.stdout.reconfigure(line_buffering=True, errors="show")
    # Tests and notebooks may have put another object here.
    if hasattr(sys.stderr, "reconfigure"):
        sys.stderr.reconfigure(errors="show")


def _show_what_cannot_be_encoded(error):
    """Write bytes that came from a file's name or the command line as they were, and "?" for other characters."""
    # Python reads such a byte xx as the character U+DCxx.
    unknown = error.object[error.start : error.end]
    shown = [ord(char) - 0xDC00 if "\udc80" <= char <= "\udcff" else ord("?") for char in unknown]
    return bytes(shown), error.end


# What scripts print


def print_header(config, device, precision):
    """Print what runs where, and every setting: enough to repeat the run."""
    print(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    together = f" | {n_processes()} processes" if n_processes() > 1 else ""
    print(f"commit {git_commit()} | torch {torch.__version__} | {device} ({name}) | {precision}{together}")
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


def next_command(script, config=None, shared_fields=SHARED_FIELDS, **flags):
    """The command that a script prints as the next step.

    config: this script's config; of the shared_fields, those that were given are in the command.
    """
    shared = {}
    if config is not None:
        given = given_fields(config)
        shared = {name: getattr(config, name) for name in shared_fields if name in given}
        if "preset" in shared:
            shared["preset"] = getattr(config, "named_presets", config.preset)
    return command(script, **(shared | flags))


def part_of(config, config_class):
    """The part of a script's config that another config class describes: `part_of(config, BLTConfig)`.

    What is None, and may not be in that class, is still open in the script: it gets the class's default.
    """
    types = get_type_hints(config_class)
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config_class)}
    return config_class(**{n: value for n, value in values.items() if value is not None or isinstance(None, types[n])})
