"""pictures.py: what is drawn, and what is left behind when writing fails.

tests/test_patch_page.py tests the HTML page.
"""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blt import pictures

# 9 bytes, 8 characters.
TEXT = b"abc de\xc3\xa9f"
ENTROPIES = np.array([3, 0.5, 0.25, 2, 1, 0.5, 0.25, 2.5, 0.5], dtype=np.float32)
PATCH_ARGUMENTS = dict(
    method="global",
    threshold=1.5,
    monotonic_threshold=0.0,
    min_patch_size=1,
    max_patch_size=None,
)
# Bytes 0, 3 and 7; 7 is the second byte of é.
STARTS = ENTROPIES > 1.5


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


@pytest.fixture
def drawn(monkeypatch):
    """Returns the list of the figures that pictures draws; they are saved as well."""
    figures = []
    save = pictures._save

    def remember_and_save(path, figure, **options):
        figures.append(figure)
        return save(path, figure, **options)

    monkeypatch.setattr(pictures, "_save", remember_and_save)
    return figures


# ---- Characters


def test_utf8_characters_by_hand():
    assert pictures.utf8_characters(b"") == []
    characters = pictures.utf8_characters("aé日🙂".encode())
    assert characters == [(0, 1, "a"), (1, 3, "é"), (3, 6, "日"), (6, 10, "🙂")]
    characters = pictures.utf8_characters(b"\xff\xe6\x97b")
    assert characters == [(0, 1, None), (1, 2, None), (2, 3, None), (3, 4, "b")]
    # A coded surrogate.
    assert [char for _, _, char in pictures.utf8_characters(b"\xed\xa0\x80")] == [None] * 3


# Bytes of which some are UTF-8.
PIECES = st.lists(st.one_of(st.binary(max_size=4), st.text(max_size=3).map(str.encode)))


@settings(max_examples=100, deadline=None, database=None)
@given(PIECES.map(b"".join))
def test_utf8_characters_tile_the_input(text):
    end = 0
    for first, stop, char in pictures.utf8_characters(text):
        assert first == end
        if char:
            assert text[first:stop] == char.encode()
        else:
            assert stop - first == 1
        end = stop
    assert end == len(text)


# ---- Figures


def texts_of(labels):
    """The texts of matplotlib labels."""
    return [label.get_text() for label in labels]


def test_entropy_figure_shows_every_byte_patch_and_threshold(tmp_path, drawn):
    path = tmp_path / "new" / "folder" / "entropy.png"
    made = pictures.draw_entropy_figure(
        path,
        TEXT,
        ENTROPIES,
        STARTS,
        1.5,
        "costs $1 and $2",
        bytes_per_line=5,
    )
    assert made == path
    assert [entry.name for entry in path.parent.iterdir()] == ["entropy.png"]
    # 7 inches wide, two lines.
    assert png_size(path) == (1400, round(200 * (0.85 + 2 * 1.18)))

    first, second = drawn[0].axes
    assert texts_of(first.get_xticklabels()) == ["a", "b", "c", "␣", "d"]
    assert texts_of(second.get_xticklabels()) == ["e", "é", "·", "f"]
    np.testing.assert_array_equal(first.lines[0].get_xydata(), np.c_[np.arange(5), ENTROPIES[:5]])
    np.testing.assert_array_equal(second.lines[0].get_xydata(), np.c_[np.arange(5, 9), ENTROPIES[5:]])
    assert first.lines[1].get_xdata().tolist() == [0, 3]
    assert second.lines[1].get_xdata().tolist() == [7]
    assert list(second.lines[2].get_ydata()) == [1.5, 1.5]

    bands = [*first.patches, *second.patches]
    edges = [(band.get_x(), band.get_x() + band.get_width()) for band in bands]
    assert edges == [(-0.5, 2.5), (2.5, 4.5), (4.5, 6.5), (6.5, 8.5)]
    segments = [*first.collections[0].get_segments(), *second.collections[0].get_segments()]
    assert [segment[0, 0] for segment in segments] == [-0.5, 2.5, 6.5]
    # A patch keeps its colour over the line end; the three patches have three colours.
    colours = [band.get_facecolor() for band in bands]
    assert colours[1] == colours[2]
    assert len({colours[0], colours[1], colours[3]}) == 3
    # A band is as low as the text, so it colours the text as well.
    assert all(band.get_y() < -0.2 for band in first.patches)


def test_entropy_figure_labels_what_has_no_glyph_in_hex(tmp_path, drawn):
    text = "\t\n_日".encode() + b"\x00\xff" + "e\u0301".encode()
    is_start = [True] + [False] * (len(text) - 1)
    pictures.draw_entropy_figure(tmp_path / "a.png", text, np.zeros(len(text)), is_start)
    axes = drawn[0].axes[0]
    labels = ["→", "⏎", "_", "e6", "97", "a5", "00", "ff", "e", "cc", "81"]
    assert texts_of(axes.get_xticklabels()) == labels
    # Without a threshold there is no dashed line.
    assert len(axes.lines) == 2


def test_histogram_shares_and_last_bar(tmp_path, drawn):
    sizes = np.array([1] * 50 + [2] * 30 + [4] * 19 + [90])
    pictures.draw_patch_size_histogram(tmp_path / "sizes.png", sizes, "title")
    assert png_size(tmp_path / "sizes.png") == (975, 600)
    axes = drawn[0].axes[0]
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], [50, 30, 0, 19, 1])
    assert texts_of(axes.get_xticklabels()) == ["≥ 5", "4", "3", "2", "1"]
    labels = [line.get_label() for line in axes.lines]
    assert labels == [f"mean {sizes.mean():.2f} bytes", "median 1.50 bytes"]
    # Counts draw what the sizes do.
    pictures.draw_patch_size_histogram(tmp_path / "counts.png", {2: 30, 1: 50, 4: 19, 90: 1}, "title")
    assert (tmp_path / "counts.png").read_bytes() == (tmp_path / "sizes.png").read_bytes()

    pictures.draw_patch_size_histogram(tmp_path / "same.png", np.full(7, 6, dtype=np.uint8))
    axes = drawn[2].axes[0]
    # No size is above the last bar, so its label has no "≥".
    assert axes.get_xticklabels()[0].get_text() == "6"
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], [0, 0, 0, 0, 0, 100])


def test_quantiles_of_counted_sizes():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.geometric(0.2, size=rng.integers(1, 60))
        values, counts = np.unique(sizes, return_counts=True)
        for share in (0.0, 0.5, 0.99, 1.0):
            np.testing.assert_allclose(pictures._quantile(values, counts, share), np.quantile(sizes, share))


def test_curves_clip_the_first_losses_and_say_so(tmp_path, drawn):
    x = np.arange(200)
    loss = np.where(x < 8, 8.0, 2 + 0.1 * np.sin(x))
    curves = {"train": (x, loss), "validation": ([0, 100, 199], [8.5, 2.2, 2.1])}
    pictures.draw_curves(tmp_path / "curves.png", curves, "training bytes seen (MB)", "bits per byte")
    assert png_size(tmp_path / "curves.png") == (1200, 675)
    axes = drawn[0].axes[0]
    assert axes.get_ylabel() == "bits per byte\n(points above the picture: 9, up to 8.5)"
    assert axes.get_ylim()[0] < 1.9
    assert axes.get_ylim()[1] < 2.6
    # A thin line, and points with markers.
    assert [line.get_marker() for line in axes.lines] == ["None", "o"]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), loss)


def test_curves_that_fit_are_not_clipped_and_nans_are_counted(tmp_path, drawn):
    with_nan = {"a": (range(4), [2.0, 1.9, 1.8, np.nan])}
    pictures.draw_curves(tmp_path / "a.png", with_nan, "x", "y")
    axes = drawn[0].axes[0]
    assert axes.get_ylabel() == "y\n(points not a number: 1)"
    assert axes.get_ylim()[1] > 2

    # The last point of a curve is never clipped.
    curves = {"train": (range(3), [2, 2, 2]), "one": ([2], [9.0])}
    pictures.draw_curves(tmp_path / "b.png", curves, "x", "y")
    axes = drawn[1].axes[0]
    assert axes.get_ylabel() == "y"
    assert axes.get_ylim()[1] > 9


def test_comparison_sorts_and_labels(tmp_path, drawn):
    rows = [
        {"method": "static", "avg_patch_size": 4.0, "val_bpb": 2.5},
        {"method": "global", "avg_patch_size": 4.5, "val_bpb": 2.25, "std": 0.125},
    ]
    pictures.draw_comparison(tmp_path / "compare.png", rows, "title")
    assert png_size(tmp_path / "compare.png") == (1350, round(150 * 2.06))
    left, right = drawn[0].axes
    # From below: the best is on top.
    assert texts_of(left.get_yticklabels()) == ["static", "global"]
    assert [text.strip() for text in texts_of(left.texts)] == ["2.5000", "2.2500 ± 0.1250"]
    assert [bar.get_width() for bar in right.patches] == [4.0, 4.5]
    assert left.get_xlim()[0] < 2.125
    assert left.get_xlim()[1] > 2.5


def test_pictures_are_not_blank(tmp_path):
    from matplotlib.image import imread

    pictures.draw_entropy_figure(tmp_path / "a.png", TEXT, ENTROPIES, STARTS, 1.5)
    pictures.draw_curves(tmp_path / "b.png", {"a": ([1], [2.0])}, "x", "y")
    row = {"method": "m", "avg_patch_size": 1.0, "val_bpb": 2.0}
    pictures.draw_comparison(tmp_path / "c.png", [row])
    pictures.draw_patch_size_histogram(tmp_path / "d.png", [1])
    for name in "abcd":
        pixels = (imread(tmp_path / f"{name}.png")[..., :3] * 255).astype(int)
        # Antialiased text and lines in colour.
        n_colours = len(np.unique(pixels @ [1, 256, 65536]))
        assert n_colours > 20
        share_of_ink = (pixels.min(axis=2) < 230).mean()
        assert 0.005 < share_of_ink < 0.9


def test_drawing_leaves_pyplot_and_so_the_backend_alone(tmp_path):
    code = (
        "import sys; from blt import pictures; "
        "pictures.draw_patch_size_histogram(sys.argv[1], [1, 2, 2]); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(pictures.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True, cwd=root)


@pytest.mark.parametrize("text", [b"a", b"\xff", b"\n", "é".encode()])
def test_shortest_texts(tmp_path, text):
    n = len(text)
    pictures.draw_entropy_figure(tmp_path / "figure.png", text, np.zeros(n), np.arange(n) == 0)
    assert png_size(tmp_path / "figure.png")[0] == 1400


# ---- Mistakes


WITH_NAN = ENTROPIES * [1, 1, np.nan, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(text_bytes=b""), "text_bytes is empty"),
        (dict(entropies_nats=ENTROPIES[:5]), r"9 bytes but entropies_nats has shape \(5,\)"),
        (dict(is_start=STARTS[:7]), r"9 bytes but is_start has shape \(7,\)"),
        (dict(entropies_nats=WITH_NAN), r"entropies_nats\[2\] is not a finite number"),
        (dict(is_start=~STARTS), r"is_start\[0\] is False"),
    ],
)
def test_bad_text_and_arrays_are_named(tmp_path, change, message):
    arguments = {"text_bytes": TEXT, "entropies_nats": ENTROPIES, "is_start": STARTS, **change}
    with pytest.raises(ValueError, match=message):
        pictures.draw_entropy_figure(tmp_path / "a.png", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "draw, arguments, message",
    [
        (
            pictures.draw_entropy_figure,
            dict(text_bytes=bytes(4001), entropies_nats=np.zeros(4001), is_start=np.ones(4001)),
            "4,001 bytes.*most 4,000",
        ),
        (
            pictures.draw_entropy_figure,
            dict(text_bytes=TEXT, entropies_nats=ENTROPIES, is_start=STARTS, bytes_per_line=0),
            "bytes_per_line is 0",
        ),
        (
            pictures.draw_patch_size_histogram,
            dict(patch_sizes=[]),
            "patch_sizes is empty",
        ),
        (
            pictures.draw_patch_size_histogram,
            dict(patch_sizes=[3, 0]),
            "integers from 1; got int64, the smallest 0",
        ),
        (
            pictures.draw_curves,
            dict(curves={}, x_label="x", y_label="y"),
            "curves is empty",
        ),
        (
            pictures.draw_curves,
            dict(curves={"a": ([1, 2], [1])}, x_label="x", y_label="y"),
            "'a' has 2 x values but 1 y values",
        ),
        (
            pictures.draw_curves,
            dict(curves={"a": ([1], [np.nan])}, x_label="x", y_label="y"),
            "'a' has no finite value",
        ),
        (
            pictures.draw_comparison,
            dict(rows=[]),
            "rows is empty",
        ),
        (
            pictures.draw_comparison,
            dict(rows=[{"method": "m", "val_bpb": 1.0}]),
            r"rows\[0\] lacks avg_patch_size",
        ),
    ],
)
def test_other_mistakes_are_named(tmp_path, draw, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "a.png", **arguments)
    assert not list(tmp_path.iterdir())


def test_failed_writing_leaves_no_files_and_the_old_file_whole(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "page.html", tmp_path / "file" / "deep" / "page.html"):
        with pytest.raises(ValueError, match="is, or lies under, a file"):
            pictures.write_patch_page(path, TEXT, ENTROPIES, PATCH_ARGUMENTS)
    with pytest.raises(ValueError, match="is, or lies under, a file"):
        pictures.draw_patch_size_histogram(tmp_path / "file" / "a.png", [1, 2])

    # A folder has the file's name.
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(OSError):
        pictures.write_patch_page(tmp_path / "folder.html", TEXT, ENTROPIES, PATCH_ARGUMENTS)

    (tmp_path / "page.html").write_text("old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        pictures.write_patch_page(tmp_path / "page.html", TEXT, ENTROPIES, PATCH_ARGUMENTS)
    assert (tmp_path / "page.html").read_text() == "old"
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == ["file", "folder.html", "page.html"]


def test_arguments_are_not_changed(tmp_path):
    entropies = ENTROPIES.astype(np.float16)
    is_start = STARTS.copy()
    text = np.frombuffer(TEXT, np.uint8)
    pictures.write_patch_page(tmp_path / "a.html", text, entropies, PATCH_ARGUMENTS)
    pictures.draw_entropy_figure(tmp_path / "a.png", bytearray(TEXT), entropies, is_start, 1.5)
    assert (entropies == ENTROPIES.astype(np.float16)).all()
    assert (is_start == STARTS).all()
