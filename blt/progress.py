"""Progress bars on a terminal, of the main process; where the output goes to a file there are none."""

from blt.processes import is_main


def progress_bar(total, what=None, **options):
    """A tqdm bar over `total` bytes, named `what`. options: as tqdm takes them."""
    # Here and not above, so that --help does without the package; `run_script` names it where it is missing.
    from tqdm import tqdm

    # None: tqdm finds out whether it writes to a terminal.
    hidden = None if is_main() else True
    return tqdm(total=total, desc=what, **({"unit": "B", "unit_scale": True, "disable": hidden} | options))
