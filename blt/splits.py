"""Ready-made datasets with the split for which results are published.

    shakespeare       tinyshakespeare, bundled: its first 90% for training, the rest for validation
    enwik8=SOURCE     the first 100 MB of a dump of Wikipedia: 90 MB for training, then 5 MB for validation, then
    text8=SOURCE      5 MB for the test; text8 is the same text without markup

SOURCE is a file, plain or compressed, or a Hugging Face id. The test part is for neither training nor validation: only
`evaluate.py --split test` reads it.
"""

from dataclasses import dataclass
from pathlib import Path

SHAKESPEARE_PATH = Path(__file__).resolve().parent.parent / "data" / "shakespeare.txt.xz"


@dataclass(frozen=True)
class StandardSplit:
    """The parts into which a text of a fixed size is split, in the order of the text.

    sizes: bytes of each part: {"train": n, "validation": n} and maybe "test".
    path: the bundled file; None if the user says where the text is.
    where: where the user finds it.
    md5: of the text, as published with it; None: it is not compared.
    is_whole: each part is one document. Otherwise it is cut into pieces, so that a run can take some of it.
    """

    sizes: dict
    path: Path | None = None
    where: str = ""
    md5: str | None = None
    is_whole: bool = False

    @property
    def total_bytes(self):
        return sum(self.sizes.values())

    def part(self, name, text):
        """The bytes of one part of the text."""
        begin = 0
        for other, size in self.sizes.items():
            if other == name:
                return text[begin : begin + size]
            begin += size
        raise KeyError(name)


LARGE = {"train": 90_000_000, "validation": 5_000_000, "test": 5_000_000}
STANDARD_SPLITS = {
    # nanoGPT trains on the first int(0.9 * 1,115,394) bytes.
    "shakespeare": StandardSplit({"train": 1_003_854, "validation": 111_540}, SHAKESPEARE_PATH, is_whole=True),
    "enwik8": StandardSplit(
        LARGE, where="https://mattmahoney.net/dc/enwik8.zip", md5="a1fa5ffddb56f4953e226637dabbb36a"
    ),
    "text8": StandardSplit(LARGE, where="https://mattmahoney.net/dc/text8.zip", md5="3bea1919949baf155f99411df5fada7e"),
}


def standard_split(dataset):
    """The (name, SOURCE or "") of a ready-made dataset, or None for any other: "enwik8=a/b" gives ("enwik8", "a/b")."""
    name, _, source = dataset.partition("=")
    return (name, source) if name in STANDARD_SPLITS else None
