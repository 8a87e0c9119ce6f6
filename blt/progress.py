"""Progress bars on a terminal; where the output goes to a file there are none."""


def progress_bar(total, what=None, **options):
    """A tqdm bar over `total` bytes, named `what`. options: as tqdm takes them."""
    # Here and not above, so that --help does without the package; `run_script` names it where it is missing.
    from tqdm import tqdm

    return tqdm(total=total, desc=what, **({"unit": "B", "unit_scale": True, "disable": None} | options))
