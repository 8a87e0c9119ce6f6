"""Tests of pictures.py: what is drawn, what the page says, and what is left behind when writing fails. No browser."""
import base64
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pictures

TEXT = b"abc de\xc3\xa9f"                                                      # 9 bytes, 8 characters
ENTROPIES = np.array([3, 0.5, 0.25, 2, 1, 0.5, 0.25, 2.5, 0.5], dtype=np.float32)
STARTS = ENTROPIES > 1.5                                                    # bytes 0, 3 and 7, the second byte of é


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def write_page(path, text=TEXT, entropies=ENTROPIES, starts=STARTS, title="title", subtitle="subtitle", threshold=1.5):
    pictures.write_patch_html(path, text, entropies, starts, title, subtitle, threshold)
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects the header's totals, and (patch class, classes, style, text) of each character of the body."""

    def __init__(self, page):
        super().__init__()
        self.open, self.totals, self.characters, self.tags, self.patch = [], {}, [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.open.append(tag)
        if tag == "b":
            self.patch = attributes["class"]
        if tag == "i":
            self.characters.append([self.patch, attributes["class"].split(), attributes.get("style", ""), ""])

    def handle_endtag(self, tag):
        while self.open.pop() != tag:                                       # meta has no end
            pass

    def handle_data(self, data):
        if self.open[-1:] == ["dt"]:
            self.name = data
        elif self.open[-1:] == ["dd"]:
            self.totals[self.name] = data
        elif self.open[-1:] == ["i"]:
            self.characters[-1][3] += data


@pytest.fixture
def drawn(monkeypatch):
    """Returns the list of the figures that pictures draws; they are saved as well."""
    figures, save = [], pictures._save
    monkeypatch.setattr(pictures, "_save", lambda path, figure: (figures.append(figure), save(path, figure))[1])
    return figures


# ---- characters

def test_utf8_characters_by_hand():
    assert pictures.utf8_characters(b"") == []
    assert pictures.utf8_characters("aé日🙂".encode()) == [(0, 1, "a"), (1, 3, "é"), (3, 6, "日"), (6, 10, "🙂")]
    assert pictures.utf8_characters(b"\xff\xe6\x97b") == [(0, 1, None), (1, 2, None), (2, 3, None), (3, 4, "b")]
    assert [char for _, _, char in pictures.utf8_characters(b"\xed\xa0\x80")] == [None] * 3    # a coded surrogate


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.one_of(st.binary(max_size=4), st.text(max_size=3).map(str.encode))).map(b"".join))
def test_utf8_characters_tile_the_input(text):
    pieces = pictures.utf8_characters(text)
    assert [first for first, _, _ in pieces] == [0, *(stop for _, stop, _ in pieces)][:len(pieces)]
    assert (pieces[-1][1] if pieces else 0) == len(text)
    assert all(text[first:stop] == char.encode() if char else stop - first == 1 for first, stop, char in pieces)


# ---- figures

def test_entropy_figure_shows_every_byte_patch_and_threshold(tmp_path, drawn):
    path = tmp_path / "new" / "folder" / "entropy.png"
    assert pictures.draw_entropy_figure(path, TEXT, ENTROPIES, STARTS, 1.5, "costs $1 and $2", bytes_per_line=5) == path
    assert [entry.name for entry in path.parent.iterdir()] == ["entropy.png"]
    assert png_size(path) == (1050, round(150 * (0.8 + 2 * 1.75)))          # 7 inches wide, two lines
    first, second = drawn[0].axes
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["a", "b", "c", "␣", "d"]
    assert [tick.get_text() for tick in second.get_xticklabels()] == ["e", "é", "·", "f"]
    np.testing.assert_array_equal(first.lines[0].get_xydata(), np.c_[np.arange(5), ENTROPIES[:5]])
    np.testing.assert_array_equal(second.lines[0].get_xydata(), np.c_[np.arange(5, 9), ENTROPIES[5:]])
    assert first.lines[1].get_xdata().tolist() == [0, 3] and second.lines[1].get_xdata().tolist() == [7]
    assert list(second.lines[2].get_ydata()) == [1.5, 1.5]
    bands = [(band.get_x(), band.get_x() + band.get_width(), band.get_facecolor())
             for axes in drawn[0].axes for band in axes.patches]
    assert [band[:2] for band in bands] == [(-0.5, 2.5), (2.5, 4.5), (4.5, 6.5), (6.5, 8.5)]
    starts = [segment[0, 0] for axes in drawn[0].axes for segment in axes.collections[0].get_segments()]
    assert starts == [-0.5, 2.5, 6.5]
    assert bands[0][2] == bands[3][2] != bands[1][2] == bands[2][2]         # a patch keeps its colour over the line end


def test_entropy_figure_labels_what_has_no_glyph_in_hex(tmp_path, drawn):
    text = "\t\n_日".encode() + b"\x00\xff" + "e\u0301".encode()
    pictures.draw_entropy_figure(tmp_path / "a.png", text, np.zeros(len(text)), [True] + [False] * (len(text) - 1))
    labels = [tick.get_text() for tick in drawn[0].axes[0].get_xticklabels()]
    assert labels == ["→", "⏎", "_", "e6", "97", "a5", "00", "ff", "e", "cc", "81"]
    assert len(drawn[0].axes[0].lines) == 2                                 # no threshold, no dashes


def test_histogram_shares_and_last_bar(tmp_path, drawn):
    sizes = np.array([1] * 50 + [2] * 30 + [4] * 19 + [90])
    pictures.draw_patch_size_histogram(tmp_path / "sizes.png", sizes, "title")
    assert png_size(tmp_path / "sizes.png") == (975, 600)
    axes = drawn[0].axes[0]
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], [50, 30, 0, 19, 1])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["≥ 5", "4", "3", "2", "1"]
    assert [line.get_label() for line in axes.lines] == [f"mean {sizes.mean():.2f} bytes", "median 1.50 bytes"]
    pictures.draw_patch_size_histogram(tmp_path / "same.png", np.full(7, 6, dtype=np.uint8))
    assert drawn[1].axes[0].get_xticklabels()[0].get_text() == "6"          # nothing above the last bar: no "≥"
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
    assert [line.get_marker() for line in axes.lines] == ["None", "o"]      # thin line, marked points
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), loss)


def test_curves_that_fit_are_not_clipped_and_nans_are_counted(tmp_path, drawn):
    pictures.draw_curves(tmp_path / "a.png", {"a": (range(4), [2.0, 1.9, 1.8, np.nan])}, "x", "y")
    assert drawn[0].axes[0].get_ylabel() == "y\n(points not a number: 1)"
    assert drawn[0].axes[0].get_ylim()[1] > 2
    pictures.draw_curves(tmp_path / "b.png", {"train": (range(3), [2, 2, 2]), "one": ([2], [9.0])}, "x", "y")
    assert drawn[1].axes[0].get_ylabel() == "y" and drawn[1].axes[0].get_ylim()[1] > 9     # a last point is never cut


def test_comparison_sorts_and_labels(tmp_path, drawn):
    rows = [{"method": "static", "avg_patch_size": 4.0, "val_bpb": 2.5},
            {"method": "global", "avg_patch_size": 4.5, "val_bpb": 2.25, "ci": 0.125}]
    pictures.draw_comparison(tmp_path / "compare.png", rows, "title")
    assert png_size(tmp_path / "compare.png") == (1350, round(150 * 2.06))
    left, right = drawn[0].axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["static", "global"]    # from below: best on top
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
        assert len(np.unique(pixels @ [1, 256, 65536])) > 20                # antialiased text and lines in colour
        assert 0.005 < (pixels.min(axis=2) < 230).mean() < 0.9


def test_drawing_leaves_pyplot_and_so_the_backend_alone(tmp_path):
    code = ("import sys, pictures; pictures.draw_patch_size_histogram(sys.argv[1], [1, 2, 2]); "
            "assert 'matplotlib.pyplot' not in sys.modules")
    root = pictures.Path(pictures.__file__).parent
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True, cwd=root)


# ---- the page

def test_page_totals_patches_and_bars_by_hand(tmp_path):
    page = Page(write_page(tmp_path / "page.html"))
    assert page.totals == {"bytes": "9", "patches": "3", "average patch size": "3.00 bytes", "threshold": "1.5 nats",
                           "average entropy": "1.167 nats (1.683 bits)", "characters cut by a boundary": "1"}
    assert "".join(text for *_, text in page.characters) == "abc deéf"
    assert [patch for patch, *_ in page.characters] == ["p0"] * 3 + ["p1"] * 4 + ["p2"]
    heights = [16, 3, 1, 11, 5, 3, 13, 3]                                   # 16 px are 3 nats; é takes its higher byte
    over = [True, False, False, True, False, False, True, False]
    letters = [chr(ord("A" if high else "a") + height) for height, high in zip(heights, over)]
    assert [classes[0] for _, classes, *_ in page.characters] == letters


def test_page_marks_a_character_cut_by_a_boundary(tmp_path):
    page = Page(write_page(tmp_path / "page.html"))
    cut = [(text, style) for _, classes, style, text in page.characters if "cut" in classes]
    assert [text for text, _ in cut] == ["é"]
    assert "var(--c1) 0% 50%,var(--c2) 50% 100%" in cut[0][1] and "--high" in cut[0][1]
    whole = Page(write_page(tmp_path / "whole.html", starts=np.arange(9) == 0))
    assert not any("cut" in classes or style for _, classes, style, _ in whole.characters)
    four = Page(write_page(tmp_path / "four.html", "🙂x".encode(), np.ones(5), np.ones(5, dtype=bool)))
    assert four.characters[0][2].count("var(--c") == 4 and four.characters[1][0] == "p0"


def test_page_carries_the_numbers_that_hover_shows(tmp_path):
    page = write_page(tmp_path / "page.html")
    packed, flags, entropies = (base64.b64decode(data) for data in re.findall(r'unpack\("([^"]*)"\)', page))
    assert packed == TEXT
    assert (np.frombuffer(flags, np.uint8) & 1).tolist() == STARTS.astype(int).tolist()
    assert (np.frombuffer(flags, np.uint8) >> 1).tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 1]    # starts of characters
    np.testing.assert_array_equal(np.frombuffer(entropies, "<f4"), ENTROPIES)
    assert int((np.frombuffer(flags, np.uint8) >> 1).sum()) == len(Page(page).characters)
    assert "<noscript>" in page


def test_page_escapes_text_and_titles(tmp_path):
    text = b"<script>alert('x')</script>&amp;</b></i>"
    starts = np.arange(len(text)) == 0
    page = write_page(tmp_path / "page.html", text, np.ones(len(text)), starts, "<script>1</script>", "a & <b> $title")
    parsed = Page(page)
    assert "".join(text for *_, text in parsed.characters) == text.decode()
    assert not re.search(r"<i[^>]*>(<|>|&<)", page) and page.count(">&amp;</i>") == 1 and page.count(">&lt;</i>") == 4
    assert parsed.tags.count("script") == 1 and page.count("</script>") == 1
    assert "&lt;script&gt;1&lt;/script&gt;" in page and "a &amp; &lt;b&gt; $title" in page


def test_page_is_self_contained(tmp_path):
    page = write_page(tmp_path / "page.html", b"see http://a.b", np.ones(14), np.arange(14) == 0)
    assert not re.search(r"https?://|src=|href=|@import|url\(|fetch\(", page)


def test_page_shows_invisible_and_invalid_bytes(tmp_path):
    text = b"a\t\n\r\x00\xff\xe6\x97" + "\u00a0\u200be\u0301".encode()
    page = write_page(tmp_path / "page.html", text, np.ones(len(text)), np.arange(len(text)) == 0)
    shown = [text for *_, text in Page(page).characters]
    assert shown == ["a", "→\t", "⏎", "‹0d›", "‹00›", "‹ff›", "‹e6›", "‹97›", "␣", "‹U+200B›", "e", "◌\u0301"]
    assert page.count("⏎</i></b></div><div><b class=p0>") == 1              # a new line of the same patch follows
    page = write_page(tmp_path / "end.html", b"a\n", np.ones(2), np.arange(2) == 0)
    assert page.count("<b ") == page.count("</b>") == 1 and page.count("<div") == page.count("</div>")


@pytest.mark.parametrize("text", [b"a", b"\xff", b"\n", "é".encode()])
def test_shortest_texts(tmp_path, text):
    n = len(text)
    page = Page(write_page(tmp_path / "page.html", text, np.zeros(n), np.arange(n) == 0, threshold=None))
    assert (page.totals["bytes"], page.totals["patches"], page.totals["threshold"]) == (str(n), "1", "none")
    pictures.draw_entropy_figure(tmp_path / "figure.png", text, np.zeros(n), np.arange(n) == 0)
    assert png_size(tmp_path / "figure.png")[0] == 1050


def test_100_kb_stay_below_10_mb(tmp_path):
    rng = np.random.default_rng(0)
    for name, text in (("prose", b"the cat sat on the mat. " * 4200), ("junk", rng.bytes(100_000))):
        entropies = rng.exponential(1, len(text)).astype(np.float32)
        starts = entropies > 1.5
        starts[0] = True
        page = write_page(tmp_path / name, text, entropies, starts)
        assert len(page.encode()) < 10e6
        assert Page(page).totals["patches"] == f"{starts.sum():,}"


def test_text_is_readable_in_both_colour_schemes(tmp_path):
    """Contrast of at least 7 (WCAG AAA) between text and every background, light and dark."""
    def luminance(colour):
        colour = colour * 2 if len(colour) == 3 else colour
        channels = np.array([int(colour[k:k + 2], 16) / 255 for k in (0, 2, 4)])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    blocks = re.findall(r":root\{([^}]*)\}", write_page(tmp_path / "page.html"))
    assert len(blocks) == 2 and "prefers-color-scheme:dark" in (tmp_path / "page.html").read_text(encoding="utf-8")
    for block in blocks:
        colours = {name: luminance(value) for name, value in re.findall(r"--(\w+):#([0-9a-f]+)", block)}
        assert len({colours[f"c{k}"] for k in range(4)}) == 4
        for name in ("page", "c0", "c1", "c2", "c3"):
            low, high = sorted((colours["ink"], colours[name]))
            assert (high + 0.05) / (low + 0.05) >= 7, (name, block)
        low, high = sorted((colours["dim"], colours["page"]))
        assert (high + 0.05) / (low + 0.05) >= 4.5


# ---- mistakes

@pytest.mark.parametrize("change, message", [
    (dict(text_bytes=b""), "text_bytes is empty"),
    (dict(entropies_nats=ENTROPIES[:5]), r"9 bytes but entropies_nats has shape \(5,\)"),
    (dict(is_start=STARTS[:7]), r"9 bytes but is_start has shape \(7,\)"),
    (dict(entropies_nats=ENTROPIES * [1, 1, np.nan, 1, 1, 1, 1, 1, 1]), r"entropies_nats\[2\] is not a finite number"),
    (dict(is_start=~STARTS), r"is_start\[0\] is False"),
])
def test_bad_text_and_arrays_are_named(tmp_path, change, message):
    arguments = {"text_bytes": TEXT, "entropies_nats": ENTROPIES, "is_start": STARTS, **change}
    with pytest.raises(ValueError, match=message):
        pictures.draw_entropy_figure(tmp_path / "a.png", **arguments)
    with pytest.raises(ValueError, match=message):
        pictures.write_patch_html(tmp_path / "a.html", **arguments, title="t", subtitle="s")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call, message", [
    (lambda p: pictures.draw_entropy_figure(p, bytes(4001), np.zeros(4001), np.ones(4001)), "4,001 bytes.*most 4,000"),
    (lambda p: pictures.draw_entropy_figure(p, TEXT, ENTROPIES, STARTS, bytes_per_line=0), "bytes_per_line is 0"),
    (lambda p: pictures.draw_patch_size_histogram(p, []), "patch_sizes is empty"),
    (lambda p: pictures.draw_patch_size_histogram(p, [3, 0]), "integers from 1; got int64, the smallest 0"),
    (lambda p: pictures.draw_curves(p, {}, "x", "y"), "curves is empty"),
    (lambda p: pictures.draw_curves(p, {"a": ([1, 2], [1])}, "x", "y"), "'a' has 2 x values but 1 y values"),
    (lambda p: pictures.draw_curves(p, {"a": ([1], [np.nan])}, "x", "y"), "'a' has no finite value"),
    (lambda p: pictures.draw_comparison(p, []), "rows is empty"),
    (lambda p: pictures.draw_comparison(p, [{"method": "m", "val_bpb": 1.0}]), r"rows\[0\] lacks avg_patch_size"),
])
def test_other_mistakes_are_named(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_failed_writing_leaves_nothing_and_the_old_file_whole(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "page.html", tmp_path / "file" / "deep" / "page.html"):
        with pytest.raises(ValueError, match="is, or lies under, a file"):
            write_page(path)
    with pytest.raises(ValueError, match="is, or lies under, a file"):
        pictures.draw_patch_size_histogram(tmp_path / "file" / "a.png", [1, 2])
    (tmp_path / "page.html").write_text("old")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(OSError):
        write_page(tmp_path / "folder.html")                                # a folder is in the way
    monkeypatch.setattr(pictures.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_page(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder.html", "page.html"]


def test_arguments_are_not_changed(tmp_path):
    entropies, starts = ENTROPIES.astype(np.float16), STARTS.copy()
    write_page(tmp_path / "a.html", np.frombuffer(TEXT, np.uint8), entropies, starts)
    pictures.draw_entropy_figure(tmp_path / "a.png", bytearray(TEXT), entropies, starts, 1.5)
    assert (entropies == ENTROPIES.astype(np.float16)).all() and (starts == STARTS).all()
