"""Pictures of patches, entropies and training runs: arrays and bytes in, one PNG or HTML file out.

    draw_entropy_figure        entropy along a text with its patches, the paper's Figure 4
    draw_patch_size_histogram  how many patches have how many bytes
    draw_curves                training and validation curves
    draw_comparison            bits per byte beside average patch size, by patching method
    draw_study                 means and spreads of many runs, as curves or one line a run
    draw_evaluation            bits per byte by context, by source and by noise, of several models
    write_patch_page           an interactive page: text by patch, entropies, predictions; the reader
                               can change the rule and its threshold

Not a script: scripts and notebooks call these functions. Each checks its input, writes its file
atomically (see `files.write_atomically`) and returns the path. A file name in .svg or .pdf gives
that format instead of PNG. A picture takes about a second on a CPU. pyplot is not used, so the
figures and the backend of a notebook stay as they are.

Index t always means "about byte t, given the bytes before it". A high entropy at byte t says that
byte t was hard to predict, and by the global rule byte t then starts a patch. (The paper's Figure 4
draws the same number one byte to the left, over the last byte read.)
"""

import base64
import io
import json
import math
import re
import unicodedata
import zlib
from pathlib import Path

import numpy as np

from blt.files import write_atomically
from blt.ids import drawable
from blt.patch_rules import RULES

BLUE = "#2f6db3"
ORANGE = "#d9531e"
GREY = "#667085"
# The same as in patch_page.html. Neighbouring patches never share a colour.
PATCH_COLOURS = ("#d5e6fb", "#fde8bf", "#d3f0d8", "#efdcf6")
CURVE_COLOURS = (BLUE, ORANGE, "#2e8b57", "#8e5bb5", "#b8860b", "#c2407a", "#3a9ea5", "#555555")
# This font comes with matplotlib, so every machine draws the same characters.
FIGURE_FONT = "DejaVu Sans"
# 63 lines of text. Drawing takes 2 ms a byte.
MAX_FIGURE_BYTES = 4000
# The page can put every byte on a line of its own; a higher page than that browsers do not show.
MAX_PAGE_BYTES = 400_000
PAGE = Path(__file__).with_name("patch_page.html")

# Heights in an entropy figure, in inches. Each line of text has a panel for its curve, a strip
# below it for its characters, and a gap to the next line.
PANEL_INCHES = 0.72
STRIP_INCHES = 0.26
GAP_INCHES = 0.2


# ---- Characters


def utf8_characters(text_bytes):
    """Split bytes into UTF-8 characters: a list of (first byte, one past the last byte, character).

    A byte outside any valid character is an entry of its own, with None.
    b"a\\xc3\\xa9\\xff" gives [(0, 1, "a"), (1, 3, "é"), (3, 4, None)].
    """
    characters = []
    first = 0
    # surrogateescape turns an invalid byte xx into the character U+DCxx.
    for char in text_bytes.decode("utf-8", errors="surrogateescape"):
        is_invalid = 0xDC80 <= ord(char) <= 0xDCFF
        if is_invalid:
            stop = first + 1
            characters.append((first, stop, None))
        else:
            stop = first + len(char.encode())
            characters.append((first, stop, char))
        first = stop
    return characters


def whole_characters(text_bytes, limit):
    """The first bytes of a text, at most `limit`, without half a character: "aé", 2 gives b"a"."""
    text_bytes = bytes(text_bytes)
    if len(text_bytes) <= limit:
        return text_bytes
    # A UTF-8 character has at most 4 bytes, so a valid text has an end among these.
    for end in range(limit, max(limit - 4, 0), -1):
        is_inside_character = text_bytes[end] & 0xC0 == 0x80
        if not is_inside_character:
            return text_bytes[:end]
    return text_bytes[:limit]


def _byte_labels(text_bytes):
    """The label of each byte on the axis of an entropy figure; see `draw_entropy_figure`."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(FIGURE_FONT))
    symbols = {" ": "␣", "\n": "⏎", "\t": "→"}
    labels = []
    for first, stop, char in utf8_characters(text_bytes):
        char = symbols.get(char, char)
        if char is not None and _can_be_drawn(char, font):
            labels.append(char)
            labels += ["·"] * (stop - first - 1)
        else:
            labels += [f"{value:02x}" for value in text_bytes[first:stop]]
    return labels


def _can_be_drawn(char, font):
    """Whether a character can be a label of its own: it is visible and in the font."""
    # A combining mark (category M) would be drawn over its neighbour.
    is_mark = unicodedata.category(char)[0] == "M"
    return char.isprintable() and not is_mark and font.get_char_index(ord(char)) != 0


# ---- Figures


def draw_entropy_figure(path, text_bytes, entropies_nats, is_start, threshold=None, title=None, bytes_per_line=64):
    """Draw a text coloured by patch with the entropy of each byte above it (BLT Figure 4).

    text_bytes: bytes, bytearray or uint8 array, 1 to 4000 bytes.
    entropies_nats, is_start: float [N] and bool [N], one value a byte.
    threshold: in nats, drawn as a dashed line; for rules that compare the entropy itself with it.

    A space is drawn as ␣, a tab as →, a newline as ⏎. A character of several bytes is drawn at its
    first byte, with · for the others. Bytes that are invalid UTF-8 or not in the font are drawn in
    hex. The figure has 200 pixels an inch: 64 bytes a line make it 1,960 pixels wide.
    """
    text_bytes, entropies_nats = _checked(text_bytes, entropies_nats)
    is_start = np.asarray(is_start, dtype=bool)
    n = len(text_bytes)
    if is_start.shape != (n,):
        raise ValueError(f"text_bytes has {n} bytes but is_start has shape {is_start.shape}")
    if not is_start[0]:
        raise ValueError("is_start[0] is False; byte 0 always starts a patch")
    if n > MAX_FIGURE_BYTES:
        raise ValueError(f"text_bytes has {n:,} bytes; a figure shows at most {MAX_FIGURE_BYTES:,}: pass a slice")
    if bytes_per_line < 1:
        raise ValueError(f"bytes_per_line is {bytes_per_line}; it must be at least 1")

    labels = _byte_labels(text_bytes)
    columns = min(bytes_per_line, n)
    n_lines = math.ceil(n / columns)
    line_height = PANEL_INCHES + STRIP_INCHES + GAP_INCHES
    # Room for the legend, and for the title if there is one.
    top = 0.85 if title else 0.5
    width = max(7.0, 0.14 * columns + 0.84)
    height = top + n_lines * line_height
    # One scale for all lines. A threshold above log 256, the highest entropy, would waste room.
    limit = 1.1 * max(entropies_nats.max(), min(threshold or 0, math.log(256)), 0.1)

    figure = _new_figure(figsize=(width, height))
    for line in range(n_lines):
        begin = line * columns
        end = min((line + 1) * columns, n)
        bottom = height - top - line * line_height - PANEL_INCHES
        # figure.add_axes takes shares of the figure: left, bottom, width, height.
        axes = figure.add_axes((0.62 / width, bottom / height, 1 - 0.84 / width, PANEL_INCHES / height))
        _bare(axes)
        axes.spines["bottom"].set_visible(False)
        _draw_patch_bands(axes, begin, end, is_start, limit)
        legend = _draw_entropies(axes, begin, end, entropies_nats, is_start, threshold)
        # Every line has the same width a byte, also the last one, which may be shorter.
        axes.set_xlim(begin - 0.5, begin + columns - 0.5)
        axes.set_ylim(0, limit)
        axes.set_yticks(np.arange(0, limit, 1 if limit > 1.5 else 0.5))
        axes.set_ylabel("nats", fontsize=8, color=GREY)
        axes.tick_params(axis="y", labelsize=8, colors=GREY)
        _write_labels(axes, begin, labels[begin:end])
    # All lines have the same legend.
    handles, texts = zip(*legend)
    legend_position = (0.5, 1 - (top - 0.28) / height)
    figure.legend(handles, texts, loc="center", bbox_to_anchor=legend_position, ncol=3, frameon=False, fontsize=9)
    figure.text(0.5, 1 - 0.28 / height, title or "", ha="center", fontsize=12, parse_math=False)
    return _save(path, figure, dpi=200)


def _draw_patch_bands(axes, begin, end, is_start, limit):
    """Colour the patches of bytes begin to end - 1, and separate them by white lines."""
    patch_of_byte = np.cumsum(is_start) - 1
    start_positions = begin + np.flatnonzero(is_start[begin:end])
    # A patch may go on from the line above, so a band begins at the line's first byte in any case.
    later_starts = start_positions[start_positions > begin]
    edges = [begin, *later_starts, end]
    # Bands and lines reach down behind the text, which is below the panel.
    depth = STRIP_INCHES / PANEL_INCHES
    for left, right in zip(edges, edges[1:]):
        colour = PATCH_COLOURS[patch_of_byte[left] % len(PATCH_COLOURS)]
        axes.axvspan(left - 0.5, right - 0.5, ymin=-depth, color=colour, linewidth=0, clip_on=False, zorder=0)
    lowest = -limit * STRIP_INCHES / PANEL_INCHES
    axes.vlines(start_positions - 0.5, lowest, limit, color="white", linewidth=1.2, clip_on=False, zorder=1)


def _draw_entropies(axes, begin, end, entropies_nats, is_start, threshold):
    """Draw the curve of bytes begin to end - 1, dots at patch starts, and the threshold.

    Returns what the legend shows: [(handle, text)].
    """
    t = np.arange(begin, end)
    start_positions = t[is_start[begin:end]]
    (curve,) = axes.plot(t, entropies_nats[begin:end], "-", color=BLUE, linewidth=1.3)
    (dots,) = axes.plot(start_positions, entropies_nats[start_positions], "o", color=ORANGE, markersize=4)
    legend = [
        (curve, "entropy of the byte below, given the bytes before it"),
        (dots, "starts a patch"),
    ]
    if threshold is not None:
        (dashes,) = axes.plot([begin - 0.5, end - 0.5], [threshold, threshold], "--", color=ORANGE, linewidth=1)
        legend.append((dashes, f"threshold {threshold:.4g} nats"))
    return legend


def _write_labels(axes, begin, labels):
    """Write the text below a panel, one label a byte."""
    axes.tick_params(axis="x", length=0, pad=13)
    positions = np.arange(begin, begin + len(labels))
    axes.set_xticks(positions, labels, fontfamily=FIGURE_FONT, parse_math=False, va="baseline")
    for tick, label in zip(axes.get_xticklabels(), labels):
        # Two characters are a byte in hex, which must be smaller to fit.
        size = 6.5 if len(label) == 2 else 11
        tick.set(color=GREY if label in "·␣" else "black", fontsize=size)


def draw_patch_size_histogram(path, patch_sizes, title=None):
    """Draw what share of the patches has 1, 2, 3, ... bytes.

    The last bar, "≥ m", holds the largest one percent; m is at most 60.
    patch_sizes: int array of bytes a patch, each at least 1; or how many patches have which size, {size: count}.
    """
    is_counted = isinstance(patch_sizes, dict)
    sizes = np.asarray(list(patch_sizes) if is_counted else patch_sizes).reshape(-1)
    if sizes.size == 0:
        raise ValueError("patch_sizes is empty: nothing to draw")
    if sizes.dtype.kind not in "iu" or sizes.min() < 1:
        raise ValueError(f"patch_sizes must be integers from 1; got {sizes.dtype}, the smallest {sizes.min()}")
    counts = np.array(list(patch_sizes.values())) if is_counted else np.ones(sizes.size, np.int64)
    n_patches = int(counts.sum())
    last = min(math.ceil(_quantile(sizes, counts, 0.99)), 60)
    # No patch has 0 bytes, so that count is dropped.
    clipped = np.minimum(sizes, last).astype(np.int64)
    shares = np.bincount(clipped, weights=counts, minlength=last + 1)[1:] * 100 / n_patches

    figure = _new_figure(figsize=(max(6.5, 0.15 * last + 2), 4), layout="constrained")
    axes = figure.subplots()
    _bare(axes)
    bars = axes.bar(np.arange(1, last + 1), shares, color=BLUE, width=0.85)
    # More than 20 bars are too narrow for numbers.
    if last <= 20:
        bar_labels = [f"{share:.1f}" if share else "" for share in shares]
        axes.bar_label(bars, bar_labels, fontsize=7, color=GREY)
    marker_height = shares.max() * 1.14
    mean_look = dict(color=ORANGE, markersize=8)
    median_look = dict(color="black", markersize=12, fillstyle="none")
    _mark_size(axes, "mean", np.average(sizes, weights=counts), last, marker_height, mean_look)
    _mark_size(axes, "median", _quantile(sizes, counts, 0.5), last, marker_height, median_look)
    # Ticks count down from the last bar, whose label must be there.
    ticks = np.arange(last, 0, -math.ceil(last / 20))
    last_label = f"≥ {last}" if sizes.max() > last else str(last)
    axes.set_xticks(ticks, [last_label] + [str(size) for size in ticks[1:]])
    axes.set_ylim(0, shares.max() * 1.22)
    axes.set_xlabel("patch size (bytes)")
    axes.set_ylabel(f"share of {n_patches:,} patches (%)")
    axes.set_title(title or "", parse_math=False)
    figure.legend(loc="outside lower center", ncol=2, frameon=False)
    return _save(path, figure)


def _quantile(values, counts, share):
    """np.quantile of values that occur `counts` times each."""
    order = np.argsort(values)
    values, ends = values[order], np.cumsum(counts[order])
    place = (ends[-1] - 1) * share
    low, high = values[np.searchsorted(ends, [math.floor(place), math.ceil(place)], side="right")]
    return low + (float(high) - low) * (place - math.floor(place))


def _mark_size(axes, name, value, last, height, look):
    """Mark a patch size by a triangle above the bars, or at the edge if it is beyond the last bar."""
    edge = last + 0.5
    note = "" if value <= edge else ", right of the picture"
    axes.plot(min(value, edge), height, "v", label=f"{name} {value:.2f} bytes{note}", **look)


def draw_curves(path, curves, x_label, y_label, title=None):
    """Draw training curves: {"train loss (bpb)": (x, y), "validation (bpb)": (x, y)}.

    A curve of more than 60 points is a thin line; a shorter one has its points marked. If the first
    5% of each curve's points would squeeze the rest below a third of the height, the picture cuts
    them off. The y label then says how many points lie above the picture, and how high. It also
    says how many points are not a number.
    """
    if not curves:
        raise ValueError("curves is empty: nothing to draw")
    figure = _new_figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    _bare(axes)
    finite_ys = []
    n_not_finite = 0
    for number, (label, (x, y)) in enumerate(curves.items()):
        x = np.asarray(x, dtype=np.float64).reshape(-1)
        y = np.asarray(y, dtype=np.float64).reshape(-1)
        if len(x) != len(y):
            raise ValueError(f"curve {label!r} has {len(x)} x values but {len(y)} y values")
        finite = y[np.isfinite(y)]
        if not finite.size:
            raise ValueError(f"curve {label!r} has no finite value among its {len(y)} points")
        if len(y) > 60:
            look = dict(linewidth=0.8, alpha=0.75)
        else:
            look = dict(marker="o", markersize=4, zorder=3)
        axes.plot(x, y, color=_colour(number), label=label, **look)
        finite_ys.append(finite)
        n_not_finite += len(y) - finite.size

    low, high = _curve_limits(finite_ys)
    axes.set_ylim(low, high)
    all_ys = np.concatenate(finite_ys)
    n_above = np.count_nonzero(all_ys > high)
    y_label_lines = [y_label]
    if n_above:
        y_label_lines.append(f"(points above the picture: {n_above}, up to {all_ys.max():.4g})")
    if n_not_finite:
        y_label_lines.append(f"(points not a number: {n_not_finite})")
    axes.set_xlabel(x_label)
    axes.set_ylabel("\n".join(y_label_lines))
    axes.set_title(title or "", parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _save(path, figure)


def _curve_limits(finite_ys):
    """(low, high) of the y axis: around all values of the curves, or without their first descent."""
    all_ys = np.concatenate(finite_ys)
    low = all_ys.min()
    high = all_ys.max()
    # How high each curve is after its first 5%, but for 1% of outliers. A curve's last point always
    # counts.
    late_highs = []
    for y in finite_ys:
        n_first = min(math.ceil(0.05 * y.size), y.size - 1)
        late_highs.append(np.percentile(y[n_first:], 99))
    late_range = max(late_highs) - low
    if high - low > 3 * late_range:
        # Half as much again above the late values shows where the descent comes from.
        high = low + 1.5 * late_range
    # Equal values have no range, and zeros not even a size.
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin


def draw_comparison(path, rows, title=None):
    """Draw bits per byte beside average patch size, one line a patching method, the best on top.

    rows: dicts {"method": str, "avg_patch_size": bytes, "val_bpb": bits per byte} and optionally
    "std", the standard deviation of val_bpb over the seeds, drawn as an error bar. There are two
    panels and no scatter plot, because methods compared at one average patch size would hide each
    other.
    """
    if not rows:
        raise ValueError("rows is empty: nothing to draw")
    for number, row in enumerate(rows):
        missing = {"method", "avg_patch_size", "val_bpb"} - set(row)
        if missing:
            lacks = ", ".join(sorted(missing))
            has = ", ".join(sorted(row))
            raise ValueError(f"rows[{number}] lacks {lacks}; it has {has}")
    # matplotlib counts lines from below, so the best comes last.
    rows = sorted(rows, key=lambda row: row["val_bpb"], reverse=True)
    y = np.arange(len(rows))
    bpb = np.array([row["val_bpb"] for row in rows], dtype=np.float64)
    std = np.array([row.get("std") or 0.0 for row in rows])
    size = np.array([row["avg_patch_size"] for row in rows], dtype=np.float64)

    figure = _new_figure(figsize=(9, 1.3 + 0.38 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _bare(left, right)
    left.errorbar(bpb, y, xerr=std if std.any() else None, fmt="o", color=BLUE, ecolor=GREY, capsize=3)
    right.barh(y, size, color=BLUE, alpha=0.5, height=0.55)
    low = (bpb - std).min()
    high = (bpb + std).max()
    # A single method has no range.
    room = (high - low) or 0.1 * abs(high) or 0.1
    # The numbers are written to the right of the dots and bars.
    left.set_xlim(low - 0.1 * room, high + 0.4 * room)
    right.set_xlim(0, size.max() * 1.25)
    for line in y:
        number = f" {bpb[line]:.4f}"
        if std[line]:
            number += f" ± {std[line]:.4f}"
        left.text(bpb[line] + std[line] + 0.015 * room, line, number, va="center", fontsize=8)
        right.text(size[line], line, f" {size[line]:.2f}", va="center", fontsize=8)
    left.set_yticks(y, [str(row["method"]) for row in rows], parse_math=False)
    left.set_ylim(-0.6, len(rows) - 0.4)
    left.locator_params(axis="x", nbins=6)
    left.grid(axis="x", alpha=0.3)
    left.set_xlabel("validation bits per byte (lower is better)")
    right.set_xlabel("average patch size (bytes)")
    figure.suptitle(title or "", parse_math=False)
    return _save(path, figure)


def draw_study(path, series, x_label, y_label, title=None):
    """Draw runs with the spread over their seeds: {"BLT": [(x, mean, deviation), ...]}.

    Where every x is a number the points of a series are joined, and x is logarithmic if it spans a factor of 8 or
    more. Where x are names, each has a line of its own and the y axis of the numbers lies across.
    """
    if not series:
        raise ValueError("series is empty: nothing to draw")
    points = [point for of_series in series.values() for point in of_series]
    names = list(dict.fromkeys(str(x) for x, _, _ in points))
    is_numeric = all(isinstance(x, (int, float)) for x, _, _ in points)
    height = 5 if is_numeric else 1.5 + 0.3 * len(names)
    figure = _new_figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    _bare(axes)
    for number, (label, of_series) in enumerate(series.items()):
        look = dict(color=_colour(number), label=label, capsize=3, markersize=4)
        if is_numeric:
            x, mean, deviation = np.array(sorted(of_series)).T
            axes.errorbar(x, mean, yerr=deviation, fmt="-o", **look)
        else:
            lines = [names.index(str(x)) for x, _, _ in of_series]
            mean, deviation = np.array([point[1:] for point in of_series]).T
            axes.errorbar(mean, lines, xerr=deviation, fmt="o", **look)
    if is_numeric:
        xs = [x for x, _, _ in points]
        if min(xs) > 0 and max(xs) >= 8 * min(xs):
            axes.set_xscale("log")
        axes.set_xlabel(x_label or "")
        axes.set_ylabel(y_label)
    else:
        axes.set_yticks(range(len(names)), names, parse_math=False, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(y_label)
    axes.grid(alpha=0.3)
    axes.set_title(title or "", parse_math=False)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)
    return _save(path, figure)


def draw_evaluation(path, names, by_context, by_source, noises, title=None):
    """Draw what evaluate.py found: bits per byte by context, by source, and the change by noise.

    Each model has a colour. A number that is None is not drawn; a panel without entries is left out.
    names: of the models, for the legend.
    by_context: [(label, bits per byte of each model)], in order.
    by_source: [(label, bits per byte of each model, standard error of each model)].
    noises: [(label, change of each model)].
    """
    if not names or not by_context:
        raise ValueError("names or by_context is empty: nothing to draw")
    # Entries of both bar panels in one form: (label, value of each model, error of each model).
    source_rows = [(label, values, errors) for label, values, errors in by_source]
    noise_rows = [(label, values, [None] * len(names)) for label, values in noises]
    n_panels = 1 + bool(source_rows) + bool(noise_rows)
    height = max(4.2, 1.6 + max(len(source_rows), len(noise_rows)) * (0.14 + 0.2 * len(names)))

    figure = _new_figure(figsize=(5.5 + 5 * (n_panels - 1), height), layout="constrained")
    panels = list(np.atleast_1d(figure.subplots(1, n_panels)))
    _bare(*panels)
    context_panel = panels.pop(0)
    _draw_context_lines(context_panel, names, by_context)
    if source_rows:
        axes = panels.pop(0)
        _draw_bars(axes, len(names), source_rows, is_change=False)
        axes.set_xlabel("bits per byte by source")
        axes.grid(axis="x", alpha=0.3)
    if noise_rows:
        axes = panels.pop(0)
        _draw_bars(axes, len(names), noise_rows, is_change=True)
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set_xlabel("change by noise (bits per original byte)")
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(title or "", fontsize=11, parse_math=False)
    handles, labels = context_panel.get_legend_handles_labels()
    columns = min(3, len(names))
    legend = figure.legend(handles, labels, loc="outside lower center", ncol=columns, frameon=False)
    # A file name with two "$" is no formula.
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _save(path, figure)


def _draw_context_lines(axes, names, by_context):
    """Draw bits per byte over the bytes of context, one line a model."""
    for number, name in enumerate(names):
        x = []
        y = []
        for index, (_, values) in enumerate(by_context):
            if values[number] is not None:
                x.append(index)
                y.append(values[number])
        axes.plot(x, y, "o-", color=_colour(number), markersize=4, label=name)
    labels = [label for label, _ in by_context]
    axes.set_xticks(np.arange(len(by_context)), labels, rotation=60, ha="right", fontsize=8)
    axes.set_xlabel("bytes of context before the byte")
    axes.set_ylabel("bits per byte (lower is better)")
    axes.grid(alpha=0.3)


def _draw_bars(axes, n_models, rows, is_change):
    """Draw a group of bars for each row, one bar a model, with its value beside it.

    rows: [(label, value of each model, error of each model)]; None for what is unknown. is_change:
    the values are written with their sign.
    """
    thickness = 0.8 / n_models
    # Where the longest bar with its error ends.
    longest = 0
    for number in range(n_models):
        for line, (_, values, errors) in enumerate(rows):
            value = values[number]
            if value is None:
                continue
            error = errors[number] or 0
            y = line - 0.4 + (number + 0.5) * thickness
            axes.barh(
                y,
                value,
                0.9 * thickness,
                xerr=error or None,
                capsize=2,
                alpha=0.75,
                color=_colour(number),
                error_kw=dict(ecolor=GREY),
            )
            text = f"{value:+.3f}" if is_change else f"{value:.3f}"
            if error:
                text += f" ± {error:.3f}"
            text_position = (max(value + error, 0), y)
            axes.annotate(text, text_position, (4, 0), textcoords="offset points", va="center", fontsize=8)
            if value > 0:
                longest = max(longest, value + error)
    labels = [_shortened(label) for label, _, _ in rows]
    axes.set_yticks(np.arange(len(rows)), labels, fontsize=9, parse_math=False)
    # The first row is on top.
    axes.set_ylim(len(rows) - 0.4, -0.6)
    # Room on the right for the numbers; those of bits per byte have an error, too.
    room = 1.25 if is_change else 1.45
    axes.set_xlim(right=room * (longest or 1))


def _shortened(label, most=28):
    """A label of at most `most` characters; the end of a path says more than its beginning."""
    # Here and not in `_save`, because axes make the labels of their ticks when they are drawn.
    label = drawable(label)
    return label if len(label) <= most else "…" + label[1 - most :]


# ---- The interactive page


def write_patch_page(
    path, text_bytes, entropies_nats, rule, predictions=(), title="Patches", subtitle="", figures=(), token_starts=None
):
    """Write one HTML page that shows a text by patches.

    The page splits the text again when the reader changes the rule or moves the threshold. It needs
    no network, but a browser of 2023 or later.

    text_bytes: 1 to 400,000 bytes, UTF-8 or not. entropies_nats: float32 [N].
    rule: the arguments of `entropy_patcher.patch_starts` that the page opens with
        (`PatchConfig.arguments`). The page applies the rules itself, with the same result to the
        last byte, so it can show only methods that patch_page.html has in JavaScript too.
    predictions: {"entropy model": `entropies.TopPredictions`}, what each model expected at each byte.
    figures: [(name, value)] of text, shown beside the totals.
    token_starts: bool [N], needed for rule["method"] "bpe" and only there.

    The arrays are deflated; probabilities are stored as their square roots in 8 bits, at most 0.4%
    off. English takes about N * 18 bytes with two models of 5 predictions each.
    """
    text_bytes, entropies_nats = _checked(text_bytes, entropies_nats)
    n = len(text_bytes)
    if n > MAX_PAGE_BYTES:
        raise ValueError(f"text_bytes has {n:,} bytes; a page shows at most {MAX_PAGE_BYTES:,}: pass a slice")
    if rule["method"] == "bpe" and token_starts is None:
        raise ValueError("method 'bpe' needs token_starts: a page cannot tokenise")
    page = PAGE.read_text(encoding="utf-8")
    methods = page_methods(page)
    if rule["method"] not in dict(methods):
        raise ValueError(
            f"patch_page.html has no function for the method {rule['method']!r}; add it to WANTS_START there"
        )
    if token_starts is not None:
        token_starts = _pack(np.asarray(token_starts, dtype=np.uint8))
    data = {
        "title": title,
        "subtitle": subtitle,
        "rule": rule,
        "methods": methods,
        "figures": list(figures),
        "bytes": _pack(text_bytes),
        "entropies": _pack(entropies_nats.astype("<f4")),
        "predictions": [_packed_prediction(name, made, n) for name, made in dict(predictions).items()],
        "token_starts": token_starts,
    }
    # Without "<" nothing in the data can end the script element that holds it.
    script = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    before, after = page.split(">PAGE_DATA<")
    return _write(path, f"{before}>{script}<{after}".encode())


def page_methods(page):
    """The registered patching methods that the page can apply: a list of [name, unit of the threshold].

    page: the text of patch_page.html. It can apply a method if WANTS_START there has a line for it.
    """
    in_javascript = re.findall(r"^  (\w+): \(t, x", page, re.MULTILINE)
    return [[rule.name, rule.unit] for rule in RULES.values() if rule.name in in_javascript]


def _packed_prediction(name, prediction, n):
    """A model's `TopPredictions` as the page reads them; ValueError if they are not about n bytes."""
    for field in ("ids_Nk", "probabilities_Nk", "of_byte_N"):
        length = len(getattr(prediction, field))
        if length != n:
            raise ValueError(f"text_bytes has {n} bytes but {field} of {name!r} has {length} positions")
    # Transposed: numbers of one rank are alike, so they deflate better side by side.
    return {
        "name": name,
        "k": prediction.ids_Nk.shape[1],
        "ids": _pack(prediction.ids_Nk.T.astype("<u2")),
        "probabilities": _pack(_roots(prediction.probabilities_Nk.T)),
        "of_byte": _pack(_roots(prediction.of_byte_N)),
    }


def _roots(probabilities):
    """Square roots of probabilities in 8 bits: 0.4% apart near 1, finer below."""
    return np.rint(255 * np.sqrt(np.clip(probabilities, 0, 1))).astype(np.uint8)


def _pack(array):
    """The bytes of an array (or bytes), deflated, in base64."""
    if not isinstance(array, bytes):
        array = np.ascontiguousarray(array).tobytes()
    return base64.b64encode(zlib.compress(array, 9)).decode()


# ---- What all pictures share


def _checked(text_bytes, entropies_nats):
    """The two as bytes and float32 [N]. Raises ValueError saying what does not fit."""
    text_bytes = bytes(text_bytes)
    entropies_nats = np.asarray(entropies_nats, dtype=np.float32)
    if not text_bytes:
        raise ValueError("text_bytes is empty: nothing to draw")
    if entropies_nats.shape != (len(text_bytes),):
        n = len(text_bytes)
        raise ValueError(f"text_bytes has {n} bytes but entropies_nats has shape {entropies_nats.shape}")
    is_finite = np.isfinite(entropies_nats)
    if not is_finite.all():
        # argmin finds the first False.
        raise ValueError(f"entropies_nats[{is_finite.argmin()}] is not a finite number")
    return text_bytes, entropies_nats


def _colour(number):
    """The colour of curve or model `number`; colours repeat after the last."""
    return CURVE_COLOURS[number % len(CURVE_COLOURS)]


def _new_figure(**options):
    """A matplotlib figure."""
    # matplotlib takes half a second to import, and --help does without it. Scripts that draw call
    # `check_packages` before their work.
    from matplotlib.figure import Figure

    return Figure(**options)


def _bare(*all_axes):
    """Remove the top and right frame lines; return the axes."""
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    return all_axes


def _save(path, figure, dpi=150):
    """Write a figure in the format that the file name says, else as PNG; return the path."""
    from matplotlib.text import Text

    # Titles and legends hold file names, which need not be UTF-8.
    for text in figure.findobj(Text):
        text.set_text(drawable(text.get_text()))
    drawn = io.BytesIO()
    figure.savefig(drawn, format=Path(path).suffix[1:] or "png", dpi=dpi, facecolor="white")
    return _write(path, drawn.getvalue())


def _write(path, content):
    """Write bytes atomically; return the path. ValueError if a file is where the folder should be."""
    path = Path(path)
    try:
        write_atomically(path, lambda temporary: Path(temporary).write_bytes(content))
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"cannot write {path}: {path.parent} is, or lies under, a file") from error
    return path
