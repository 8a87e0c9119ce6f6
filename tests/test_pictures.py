"""Tests of pictures.py: what is drawn, and what is left when writing fails. The page has tests/test_patch_page.py."""

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

TEXT = b"abc de\xc3\xa9f"  # 9 bytes, 8 characters
ENTROPIES = np.array([3, 0.5, 0.25, 2, 1, 0.5, 0.25, 2.5, 0.5], dtype=np.float32)
RULE = dict(method="global", threshold=1.5, monotonic_threshold=0.0, min_patch_size=1, max_patch_size=None)
STARTS = ENTROPIES > 1.5  # bytes 0, 3 and 7, the second byte of é


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


@pytest.fixture
def drawn(monkeypatch):
    """Returns the list of the figures that pictures draws; they are saved as well."""
    figures = []
    save = pictures._save

    def keep_and_save(path, figure, **more):
        figures.append(figure)
        return save(path, figure, **more)

    monkeypatch.setattr(pictures, "_save", keep_and_save)
    return figures


# Characters


def test_utf8_characters_by_hand():
    assert pictures.utf8_characters(b"") == []
    assert pictures.utf8_characters("aé日🙂".encode()) == [(0, 1, "a"), (1, 3, "é"), (3, 6, "日"), (6, 10, "🙂")]
    assert pictures.utf8_characters(b"\xff\xe6\x97b") == [(0, 1, None), (1, 2, None), (2, 3, None), (3, 4, "b")]
    # These three bytes would be a surrogate.
    assert [char for _, _, char in pictures.utf8_characters(b"\xed\xa0\x80")] == [None] * 3


@settings(max_examples=100)
@given(st.lists(st.one_of(st.binary(max_size=4), st.text(max_size=3).map(str.encode))).map(b"".join))
def test_utf8_characters_tile_the_input(text):
    pieces = pictures.utf8_characters(text)
    assert [first for first, _, _ in pieces] == [0, *(stop for _, stop, _ in pieces)][: len(pieces)]
    assert (pieces[-1][1] if pieces else 0) == len(text)
    assert all(text[first:stop] == char.encode() if char else stop - first == 1 for first, stop, char in pieces)


# Figures


def test_entropy_figure_shows_every_byte_patch_and_threshold(tmp_path, drawn):
    path = tmp_path / "new" / "folder" / "entropy.png"
    assert pictures.draw_entropy_figure(path, TEXT, ENTROPIES, STARTS, 1.5, "costs $1 and $2", bytes_per_line=5) == path
    assert [entry.name for entry in path.parent.iterdir()] == ["entropy.png"]
    assert png_size(path) == (1400, round(200 * (0.85 + 2 * 1.18)))  # 7 inches wide, two lines
    first, second = drawn[0].axes
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["a", "b", "c", "␣", "d"]
    assert [tick.get_text() for tick in second.get_xticklabels()] == ["e", "é", "·", "f"]
    np.testing.assert_array_equal(first.lines[0].get_xydata(), np.c_[np.arange(5), ENTROPIES[:5]])
    np.testing.assert_array_equal(second.lines[0].get_xydata(), np.c_[np.arange(5, 9), ENTROPIES[5:]])
    assert first.lines[1].get_xdata().tolist() == [0, 3] and second.lines[1].get_xdata().tolist() == [7]
    assert list(second.lines[2].get_ydata()) == [1.5, 1.5]
    bands = [band for axes in drawn[0].axes for band in axes.patches]
    edges = [(band.get_x(), band.get_x() + band.get_width()) for band in bands]
    assert edges == [(-0.5, 2.5), (2.5, 4.5), (4.5, 6.5), (6.5, 8.5)]
    starts = [segment[0, 0] for axes in drawn[0].axes for segment in axes.collections[0].get_segments()]
    assert starts == [-0.5, 2.5, 6.5]
    # A patch keeps its colour over the line end, and colours its text as well.
    colours = [band.get_facecolor() for band in bands]
    assert colours[1] == colours[2] and len({colours[0], colours[1], colours[3]}) == 3
    assert all(band.get_y() < -0.2 for band in first.patches)


def test_entropy_figure_labels_what_has_no_glyph_in_hex(tmp_path, drawn):
    text = "\t\n_日".encode() + b"\x00\xff" + "e\u0301".encode()
    pictures.draw_entropy_figure(tmp_path / "a.png", text, np.zeros(len(text)), [True] + [False] * (len(text) - 1))
    labels = [tick.get_text() for tick in drawn[0].axes[0].get_xticklabels()]
    assert labels == ["→", "⏎", "_", "e6", "97", "a5", "00", "ff", "e", "cc", "81"]
    # Without a threshold there are no dashes.
    assert len(drawn[0].axes[0].lines) == 2


def test_histogram_shares_and_last_bar(tmp_path, drawn):
    sizes = np.array([1] * 50 + [2] * 30 + [4] * 19 + [90])
    pictures.draw_patch_size_histogram(tmp_path / "sizes.png", sizes, "title")
    assert png_size(tmp_path / "sizes.png") == (975, 600)
    axes = drawn[0].axes[0]
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], [50, 30, 0, 19, 1])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["≥ 5", "4", "3", "2", "1"]
    assert [line.get_label() for line in axes.lines] == [f"mean {sizes.mean():.2f} bytes", "median 1.50 bytes"]
    pictures.draw_patch_size_histogram(tmp_path / "same.png", np.full(7, 6, dtype=np.uint8))
    # Nothing is above the last bar, so it has no "≥".
    assert drawn[1].axes[0].get_xticklabels()[0].get_text() == "6"
    np.testing.assert_allclose([bar.get_height() for bar in drawn[1].axes[0].patches], [0, 0, 0, 0, 0, 100])


def test_curves_clip_the_first_losses_and_say_so(tmp_path, drawn):
    x = np.arange(200)
    loss = np.where(x < 8, 8.0, 2 + 0.1 * np.sin(x))
    curves = {"train": (x, loss), "validation": ([0, 100, 199], [8.5, 2.2, 2.1])}
    pictures.draw_curves(tmp_path / "curves.png", curves, "training bytes seen (MB)", "bits per byte")
    assert png_size(tmp_path / "curves.png") == (1200, 675)
    axes = drawn[0].axes[0]
    assert axes.get_ylabel() == "bits per byte\n(points above the picture: 9, up to 8.5)"
    assert axes.get_ylim()[1] < 2.6 and axes.get_ylim()[0] < 1.9
    # A thin line, and marked points.
    assert [line.get_marker() for line in axes.lines] == ["None", "o"]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), loss)


def test_curves_that_fit_are_not_clipped_and_nans_are_counted(tmp_path, drawn):
    pictures.draw_curves(tmp_path / "a.png", {"a": (range(4), [2.0, 1.9, 1.8, np.nan])}, "x", "y")
    assert drawn[0].axes[0].get_ylabel() == "y\n(points not a number: 1)"
    assert drawn[0].axes[0].get_ylim()[1] > 2
    pictures.draw_curves(tmp_path / "b.png", {"train": (range(3), [2, 2, 2]), "one": ([2], [9.0])}, "x", "y")
    # A last point is never cut off.
    assert drawn[1].axes[0].get_ylabel() == "y" and drawn[1].axes[0].get_ylim()[1] > 9


def test_comparison_sorts_and_labels(tmp_path, drawn):
    rows = [
        {"method": "static", "avg_patch_size": 4.0, "val_bpb": 2.5},
        {"method": "global", "avg_patch_size": 4.5, "val_bpb": 2.25, "ci": 0.125},
    ]
    pictures.draw_comparison(tmp_path / "compare.png", rows, "title")
    assert png_size(tmp_path / "compare.png") == (1350, round(150 * 2.06))
    left, right = drawn[0].axes
    # From below: the best is on top.
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["static", "global"]
    assert [text.get_text().strip() for text in left.texts] == ["2.5000", "2.2500 ± 0.1250"]
    assert [bar.get_width() for bar in right.patches] == [4.0, 4.5]
    assert left.get_xlim()[0] < 2.125 and left.get_xlim()[1] > 2.5


def test_pictures_are_not_blank(tmp_path):
    from matplotlib.image import imread

    pictures.draw_entropy_figure(tmp_path / "a.png", TEXT, ENTROPIES, STARTS, 1.5)
    pictures.draw_curves(tmp_path / "b.png", {"a": ([1], [2.0])}, "x", "y")
    pictures.draw_comparison(tmp_path / "c.png", [{"method": "m", "avg_patch_size": 1.0, "val_bpb": 2.0}])
    pictures.draw_patch_size_histogram(tmp_path / "d.png", [1])
    for name in "abcd":
        pixels = (imread(tmp_path / f"{name}.png")[..., :3] * 255).astype(int)
        assert len(np.unique(pixels @ [1, 256, 65536])) > 20  # antialiased text and lines in colour
        assert 0.005 < (pixels.min(axis=2) < 230).mean() < 0.9


def test_drawing_leaves_pyplot_and_so_the_backend_alone(tmp_path):
    code = (
        "import sys; from blt import pictures; pictures.draw_patch_size_histogram(sys.argv[1], [1, 2, 2]); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(pictures.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True, cwd=root)


@pytest.mark.parametrize("text", [b"a", b"\xff", b"\n", "é".encode()])
def test_shortest_texts(tmp_path, text):
    n = len(text)
    pictures.draw_entropy_figure(tmp_path / "figure.png", text, np.zeros(n), np.arange(n) == 0)
    assert png_size(tmp_path / "figure.png")[0] == 1400


# Mistakes


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(text_bytes=b""), "text_bytes is empty"),
        (dict(entropies_nats=ENTROPIES[:5]), r"9 bytes but entropies_nats has shape \(5,\)"),
        (dict(is_start=STARTS[:7]), r"9 bytes but is_start has shape \(7,\)"),
        (
            dict(entropies_nats=ENTROPIES * [1, 1, np.nan, 1, 1, 1, 1, 1, 1]),
            r"entropies_nats\[2\] is not a finite number",
        ),
        (dict(is_start=~STARTS), r"is_start\[0\] is False"),
    ],
)
def test_bad_text_and_arrays_are_named(tmp_path, change, message):
    arguments = {"text_bytes": TEXT, "entropies_nats": ENTROPIES, "is_start": STARTS, **change}
    with pytest.raises(ValueError, match=message):
        pictures.draw_entropy_figure(tmp_path / "a.png", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda p: pictures.draw_entropy_figure(p, bytes(4001), np.zeros(4001), np.ones(4001)),
            "4,001 bytes.*most 4,000",
        ),
        (lambda p: pictures.draw_entropy_figure(p, TEXT, ENTROPIES, STARTS, bytes_per_line=0), "bytes_per_line is 0"),
        (lambda p: pictures.draw_patch_size_histogram(p, []), "patch_sizes is empty"),
        (lambda p: pictures.draw_patch_size_histogram(p, [3, 0]), "integers from 1; got int64, the smallest 0"),
        (lambda p: pictures.draw_curves(p, {}, "x", "y"), "curves is empty"),
        (lambda p: pictures.draw_curves(p, {"a": ([1, 2], [1])}, "x", "y"), "'a' has 2 x values but 1 y values"),
        (lambda p: pictures.draw_curves(p, {"a": ([1], [np.nan])}, "x", "y"), "'a' has no finite value"),
        (lambda p: pictures.draw_comparison(p, []), "rows is empty"),
        (lambda p: pictures.draw_comparison(p, [{"method": "m", "val_bpb": 1.0}]), r"rows\[0\] lacks avg_patch_size"),
    ],
)
def test_other_mistakes_are_named(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_failed_writing_leaves_nothing_and_the_old_file_whole(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "page.html", tmp_path / "file" / "deep" / "page.html"):
        with pytest.raises(ValueError, match="is, or lies under, a file"):
            pictures.write_patch_page(path, TEXT, ENTROPIES, RULE)
    with pytest.raises(ValueError, match="is, or lies under, a file"):
        pictures.draw_patch_size_histogram(tmp_path / "file" / "a.png", [1, 2])
    (tmp_path / "page.html").write_text("old")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(OSError):
        pictures.write_patch_page(tmp_path / "folder.html", TEXT, ENTROPIES, RULE)  # a folder is in the way
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        pictures.write_patch_page(tmp_path / "page.html", TEXT, ENTROPIES, RULE)
    assert (tmp_path / "page.html").read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder.html", "page.html"]


def test_arguments_are_not_changed(tmp_path):
    entropies, starts = ENTROPIES.astype(np.float16), STARTS.copy()
    pictures.write_patch_page(tmp_path / "a.html", np.frombuffer(TEXT, np.uint8), entropies, RULE)
    pictures.draw_entropy_figure(tmp_path / "a.png", bytearray(TEXT), entropies, starts, 1.5)
    assert (entropies == ENTROPIES.astype(np.float16)).all() and (starts == STARTS).all()
