"""Commands that scripts print: what can be copied from a message and runs where the message was printed."""

import shlex
import sys
from pathlib import Path


def command(script, *words, **flags):
    """A shell command that runs a script of this project, quoted where the shell needs it.

    words: what comes before the flags. flags: a list gives several words. Example: command("generate.py",
    model="my model") is `python generate.py --model 'my model'`.
    """
    words = ["python", script_path(script), *words]
    for name, value in flags.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name}", *map(str, values)]
    return " ".join(shlex.quote(word) for word in words)


def script_path(script):
    """Where a script is for the user's shell: in the folder of the script that runs now."""
    running = Path(sys.argv[0])
    beside = running.with_name(script) if running.name else Path(script)
    # In a notebook or under pytest another program is running.
    return str(beside) if running.suffix == ".py" and beside.is_file() else script
