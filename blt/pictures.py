"""Pictures of patches, entropies and training runs: numpy arrays and bytes in, one PNG or HTML file out.

draw_entropy_figure        entropy along a text with its patches, the paper's Figure 4
draw_patch_size_histogram  how many patches have how many bytes
draw_curves                training and validation curves
draw_comparison            bits per byte beside average patch size, by patching method
draw_evaluation            bits per byte by context, by source and by noise, of several models
write_patch_page           an interactive page: text by patch, entropies, predictions; rule and threshold can be moved

Not a script: scripts and notebooks call these functions. Each checks its input, makes the folder if needed, writes
aside and renames (nobody reads half a file) and returns the path. No pyplot, so a notebook's figures and backend stay
as they are. A file name in .svg or .pdf gives that format instead of PNG. A picture takes about a second on a CPU.
Index t always means "about byte t, from what stands before t": a high entropy at byte t says that byte t was hard to
foresee, and by the global rule byte t then starts a patch. (The paper's Figure 4 draws the same number one byte to
the left, over the last byte read.)
"""

import base64
import io
import json
import math
import os
import unicodedata
import zlib
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2f6db3", "#d9531e", "#667085"
PATCH_COLOURS = ("#d5e6fb", "#fde8bf", "#d3f0d8", "#efdcf6")  # as in patch_page.html
CURVE_COLOURS = (BLUE, ORANGE, "#2e8b57", "#8e5bb5", "#b8860b", "#c2407a", "#3a9ea5", "#555555")
FIGURE_FONT = "DejaVu Sans"  # comes with matplotlib: every machine draws the same characters
MAX_FIGURE_BYTES = 4000  # 50 lines; drawing takes 2 ms a byte


def utf8_characters(text_bytes):
    """Cut bytes into UTF-8 characters: b"a\\xc3\\xa9\\xff" gives [(0, 1, "a"), (1, 3, "é"), (3, 4, None)].

    Returns (first byte, one past the last byte, character); a byte outside any valid character stands alone with None.
    """
    pieces, first = [], 0
    for char in text_bytes.decode("utf-8", errors="surrogateescape"):  # an invalid byte xx arrives as U+DCxx
        invalid = 0xDC80 <= ord(char) <= 0xDCFF
        stop = first + (1 if invalid else len(char.encode()))
        pieces.append((first, stop, None if invalid else char))
        first = stop
    return pieces


def draw_entropy_figure(path, text_bytes, entropies_nats, is_start, threshold=None, title=None, bytes_per_line=64):
    """Draw a text coloured by patch with the entropy of each byte above it (BLT Figure 4).

    text_bytes: bytes, bytearray or uint8 array, 1 to 4000 bytes. entropies_nats [N] float and is_start [N] bool: one
    value a byte. threshold: in nats, drawn dashed; give it for rules that compare the entropy itself with it.
    Space is drawn as ␣, tab →, newline ⏎; a character of several bytes stands at its first byte with · for the
    others; what is invalid UTF-8, or not in the font, as each byte in hex. 200 pixels an inch: 1,960 across.
    """
    text_bytes, entropies_nats = _checked(text_bytes, entropies_nats)
    is_start, n = np.asarray(is_start, dtype=bool), len(text_bytes)
    if is_start.shape != (n,):
        raise ValueError(f"text_bytes has {n} bytes but is_start has shape {is_start.shape}")
    if not is_start[0]:
        raise ValueError("is_start[0] is False; byte 0 always starts a patch")
    if n > MAX_FIGURE_BYTES:
        raise ValueError(f"text_bytes has {n:,} bytes; a figure shows at most {MAX_FIGURE_BYTES:,}: pass a slice")
    if bytes_per_line < 1:
        raise ValueError(f"bytes_per_line is {bytes_per_line}; it must be at least 1")
    labels, patch = _byte_labels(text_bytes), np.cumsum(is_start) - 1
    columns = min(bytes_per_line, n)
    lines = math.ceil(n / columns)
    width, panel, strip, gap, top = max(7.0, 0.14 * columns + 0.84), 0.72, 0.26, 0.2, 0.85 if title else 0.5  # inches
    height = top + lines * (panel + strip + gap)
    limit = 1.1 * max(entropies_nats.max(), min(threshold or 0, math.log(256)), 0.1)
    figure = Figure(figsize=(width, height))
    for line in range(lines):
        begin, end = line * columns, min((line + 1) * columns, n)
        bottom = height - top - line * (panel + strip + gap) - panel
        (axes,) = _bare(figure.add_axes((0.62 / width, bottom / height, 1 - 0.84 / width, panel / height)))
        axes.spines["bottom"].set_visible(False)
        t = np.arange(begin, end)
        starts = t[is_start[begin:end]]
        edges = [begin, *starts[starts > begin], end]
        for left, right in zip(edges, edges[1:]):  # the band reaches down behind the text
            axes.axvspan(
                left - 0.5,
                right - 0.5,
                ymin=-strip / panel,
                color=PATCH_COLOURS[patch[left] % 4],
                linewidth=0,
                clip_on=False,
                zorder=0,
            )
        axes.vlines(starts - 0.5, -limit * strip / panel, limit, color="white", linewidth=1.2, clip_on=False, zorder=1)
        (curve,) = axes.plot(t, entropies_nats[begin:end], "-", color=BLUE, linewidth=1.3)
        (dots,) = axes.plot(starts, entropies_nats[starts], "o", color=ORANGE, markersize=4)
        legend = [(curve, "entropy of the byte below, given the bytes before it"), (dots, "starts a patch")]
        if threshold is not None:
            (dashes,) = axes.plot([begin - 0.5, end - 0.5], [threshold] * 2, "--", color=ORANGE, linewidth=1)
            legend.append((dashes, f"threshold {threshold:.4g} nats"))
        axes.set_xlim(begin - 0.5, begin + columns - 0.5)  # the same width a byte on every line
        axes.set_ylim(0, limit)
        axes.set_yticks(np.arange(0, limit, 1 if limit > 1.5 else 0.5))
        axes.set_ylabel("nats", fontsize=8, color=GREY)
        axes.tick_params(axis="y", labelsize=8, colors=GREY)
        axes.tick_params(axis="x", length=0, pad=13)
        axes.set_xticks(t, labels[begin:end], fontfamily=FIGURE_FONT, parse_math=False, va="baseline")
        for tick, label in zip(axes.get_xticklabels(), labels[begin:end]):
            tick.set(color=GREY if label in "·␣" else "black", fontsize=6.5 if len(label) == 2 else 11)  # 2: hex
    figure.legend(
        *zip(*legend), loc="center", bbox_to_anchor=(0.5, 1 - (top - 0.28) / height), ncol=3, frameon=False, fontsize=9
    )
    figure.text(0.5, 1 - 0.28 / height, title or "", ha="center", fontsize=12, parse_math=False)
    return _save(path, figure, dpi=200)


def draw_patch_size_histogram(path, patch_sizes, title=None):
    """Draw what share of the patches has 1, 2, 3, ... bytes; the last bar, "≥ m", holds the largest one percent.

    patch_sizes: int array of bytes a patch, each at least 1. More than 60 bars are not drawn: then m is 60.
    """
    sizes = np.asarray(patch_sizes).reshape(-1)
    if sizes.size == 0:
        raise ValueError("patch_sizes is empty: nothing to draw")
    if sizes.dtype.kind not in "iu" or sizes.min() < 1:
        raise ValueError(f"patch_sizes must be integers from 1; got {sizes.dtype}, the smallest {sizes.min()}")
    last = min(math.ceil(np.percentile(sizes, 99)), 60)
    share = np.bincount(np.minimum(sizes, last).astype(np.int64), minlength=last + 1)[1:] * 100 / sizes.size
    figure = Figure(figsize=(max(6.5, 0.15 * last + 2), 4), layout="constrained")
    (axes,) = _bare(figure.subplots())
    bars = axes.bar(np.arange(1, last + 1), share, color=BLUE, width=0.85)
    if last <= 20:
        axes.bar_label(bars, [f"{value:.1f}" if value else "" for value in share], fontsize=7, color=GREY)
    for name, value, look in (
        ("mean", sizes.mean(), dict(color=ORANGE, markersize=8)),
        ("median", np.median(sizes), dict(color="black", markersize=12, fillstyle="none")),
    ):
        aside = "" if value <= last + 0.5 else ", right of the picture"
        axes.plot(min(value, last + 0.5), share.max() * 1.14, "v", label=f"{name} {value:.2f} bytes{aside}", **look)
    ticks = np.arange(last, 0, -math.ceil(last / 20))  # down from the last, which needs its label
    axes.set_xticks(ticks, [f"≥ {last}" if sizes.max() > last else str(last)] + [str(size) for size in ticks[1:]])
    axes.set_ylim(0, share.max() * 1.22)
    axes.set_xlabel("patch size (bytes)")
    axes.set_ylabel(f"share of {sizes.size:,} patches (%)")
    axes.set_title(title or "", parse_math=False)
    figure.legend(loc="outside lower center", ncol=2, frameon=False)
    return _save(path, figure)


def draw_curves(path, curves, x_label, y_label, title=None):
    """Draw training curves: {"train loss (bpb)": (x, y), "validation (bpb)": (x, y)}.

    A curve of more than 60 points is a thin line, a shorter one has its points marked. Where each curve's first 5% of
    points would squeeze the rest below a third of the height, they are cut off; how many points lie above the picture,
    and how high, is then written beside the axis title, and so is how many are not a number.
    """
    if not curves:
        raise ValueError("curves is empty: nothing to draw")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    (axes,) = _bare(figure.subplots())
    everything, final_bytes, lost = [], [], 0
    for number, (label, (x, y)) in enumerate(curves.items()):
        x, y = np.asarray(x, dtype=np.float64).reshape(-1), np.asarray(y, dtype=np.float64).reshape(-1)
        if len(x) != len(y):
            raise ValueError(f"curve {label!r} has {len(x)} x values but {len(y)} y values")
        finite = y[np.isfinite(y)]
        if not finite.size:
            raise ValueError(f"curve {label!r} has no finite value among its {len(y)} points")
        look = dict(linewidth=0.8, alpha=0.75) if len(y) > 60 else dict(marker="o", markersize=4, zorder=3)
        axes.plot(x, y, color=CURVE_COLOURS[number % len(CURVE_COLOURS)], label=label, **look)
        everything.append(finite)
        final_bytes.append(np.percentile(finite[min(math.ceil(0.05 * finite.size), finite.size - 1) :], 99))
        lost += len(y) - finite.size
    everything = np.concatenate(everything)
    low, high, rest = everything.min(), everything.max(), max(final_bytes) - everything.min()
    top = high if high - low <= 3 * rest else low + 1.5 * rest  # half as much again shows the descent
    margin = 0.05 * (top - low) or 0.05 * abs(top) or 0.05
    axes.set_ylim(low - margin, top + margin)
    above = np.count_nonzero(everything > top + margin)
    notes = ((above, f"points above the picture: {above}, up to {high:.4g}"), (lost, f"points not a number: {lost}"))
    axes.set_xlabel(x_label)
    axes.set_ylabel("\n".join([y_label] + [f"({note})" for count, note in notes if count]))
    axes.set_title(title or "", parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _save(path, figure)


def draw_comparison(path, rows, title=None):
    """Draw bits per byte beside average patch size, one line a patching method, the best on top.

    rows: dicts {"method": str, "avg_patch_size": bytes, "val_bpb": bits per byte} and optionally "ci", the half-width
    of the confidence interval of val_bpb, drawn as an error bar. Two panels rather than a scatter: methods compared
    at one average patch size would stand on top of each other.
    """
    if not rows:
        raise ValueError("rows is empty: nothing to draw")
    for number, row in enumerate(rows):
        missing = {"method", "avg_patch_size", "val_bpb"} - set(row)
        if missing:
            raise ValueError(f"rows[{number}] lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(row))}")
    rows = sorted(rows, key=lambda row: row["val_bpb"], reverse=True)  # matplotlib counts lines from below
    y, ci = np.arange(len(rows)), np.array([row.get("ci") or 0.0 for row in rows])
    bpb, size = (np.array([row[key] for row in rows], dtype=np.float64) for key in ("val_bpb", "avg_patch_size"))
    figure = Figure(figsize=(9, 1.3 + 0.38 * len(rows)), layout="constrained")
    left, right = _bare(*figure.subplots(1, 2, sharey=True, width_ratios=(3, 2)))
    left.errorbar(bpb, y, xerr=ci if ci.any() else None, fmt="o", color=BLUE, ecolor=GREY, capsize=3)
    right.barh(y, size, color=BLUE, alpha=0.5, height=0.55)
    low, high = (bpb - ci).min(), (bpb + ci).max()
    room = (high - low) or 0.1 * abs(high) or 0.1
    left.set_xlim(low - 0.1 * room, high + 0.4 * room)  # room for the numbers on the right
    right.set_xlim(0, size.max() * 1.25)
    for place in y:
        number = f" {bpb[place]:.4f}" + (f" ± {ci[place]:.4f}" if ci[place] else "")
        left.text(bpb[place] + ci[place] + 0.015 * room, place, number, va="center", fontsize=8)
        right.text(size[place], place, f" {size[place]:.2f}", va="center", fontsize=8)
    left.set_yticks(y, [str(row["method"]) for row in rows], parse_math=False)
    left.set_ylim(-0.6, len(rows) - 0.4)
    left.locator_params(axis="x", nbins=6)
    left.grid(axis="x", alpha=0.3)
    left.set_xlabel("validation bits per byte (lower is better)")
    right.set_xlabel("average patch size (bytes)")
    figure.suptitle(title or "", parse_math=False)
    return _save(path, figure)


MAX_PAGE_BYTES = 400_000  # every byte on a line of its own still fits the highest page of a browser
PAGE = Path(__file__).with_name("patch_page.html")


def write_patch_page(
    path, text_bytes, entropies_nats, rule, predictions=(), title="Patches", subtitle="", figures=(), token_starts=None
):
    """Write one HTML page that shows a text by patches and cuts it anew while the reader moves the threshold. No network.

    text_bytes: 1 to 400,000 bytes, UTF-8 or not. entropies_nats: float32 [N]. rule: the arguments of
    `entropy_patcher.patch_starts` that the page opens with (`PatchConfig.rule`); the page applies the rules itself, with the
    same result to the last byte. predictions: {"entropy model": `entropy_patcher.TopPredictions`}, what each model expected at each
    byte. figures: [(name, value)] of text, shown beside the totals. token_starts: bool [N], for rule["method"] bpe only.

    The arrays are deflated (probabilities as their square root in 8 bits, so off by 0.4% at most); English takes about
    N * 18 bytes with two models of 5 predictions each. Browsers of 2023 or later.
    """
    text_bytes, entropies_nats = _checked(text_bytes, entropies_nats)
    n = len(text_bytes)
    if n > MAX_PAGE_BYTES:
        raise ValueError(f"text_bytes has {n:,} bytes; a page shows at most {MAX_PAGE_BYTES:,}: pass a slice")
    if rule["method"] == "bpe" and token_starts is None:
        raise ValueError("method 'bpe' needs token_starts: a page cannot tokenise")
    packed = []
    for name, prediction in dict(predictions).items():
        for what, array in (
            ("ids_Nk", prediction.ids_Nk),
            ("probabilities_Nk", prediction.probabilities_Nk),
            ("of_byte_N", prediction.of_byte_N),
        ):
            if len(array) != n:
                raise ValueError(f"text_bytes has {n} bytes but {what} of {name!r} has {len(array)} places")
        packed.append({
            "name": name, "k": prediction.ids_Nk.shape[1], "ids": _pack(prediction.ids_Nk.T.astype("<u2")),
            "probabilities": _pack(_roots(prediction.probabilities_Nk.T)), "of_byte": _pack(_roots(prediction.of_byte_N)),
        })  # fmt: skip
    data = json.dumps({
        "title": title, "subtitle": subtitle, "rule": rule, "figures": list(figures), "bytes": _pack(text_bytes),
        "entropies": _pack(entropies_nats.astype("<f4")), "predictions": packed,
        "token_starts": None if token_starts is None else _pack(np.asarray(token_starts, dtype=np.uint8)),
    }, allow_nan=False).replace("<", "\\u003c")  # nothing in it can end the script element  # fmt: skip
    before, after = PAGE.read_text(encoding="utf-8").split(">PAGE_DATA<")
    return _write(path, f"{before}>{data}<{after}".encode())


def whole_characters(text_bytes, limit):
    """The first bytes of a text, at most `limit`, cut between UTF-8 characters: "aé" and 2 give b"a"."""
    text_bytes = bytes(text_bytes)
    if len(text_bytes) <= limit:
        return text_bytes
    for end in range(limit, max(limit - 4, 0), -1):
        if text_bytes[end] & 0xC0 != 0x80:  # not the middle of a character
            return text_bytes[:end]
    return text_bytes[:limit]


def _roots(probabilities):
    """Square roots of probabilities in 8 bits: 0.4% apart near 1, finer below."""
    return np.rint(255 * np.sqrt(np.clip(probabilities, 0, 1))).astype(np.uint8)


def _pack(array):
    """Bytes of an array, deflated, in base64."""
    return base64.b64encode(
        zlib.compress(bytes(array) if isinstance(array, bytes) else np.ascontiguousarray(array).tobytes(), 9)
    ).decode()


def _byte_labels(text_bytes):
    """Give each byte its label on the figure's axis; see draw_entropy_figure."""
    font, labels = font_manager.get_font(font_manager.findfont(FIGURE_FONT)), []
    for first, stop, char in utf8_characters(text_bytes):
        char = {" ": "␣", "\n": "⏎", "\t": "→"}.get(char, char)
        if char and char.isprintable() and unicodedata.category(char)[0] != "M" and font.get_char_index(ord(char)):
            labels += [char] + ["·"] * (stop - first - 1)
        else:
            labels += [f"{value:02x}" for value in text_bytes[first:stop]]
    return labels


def _checked(text_bytes, entropies_nats):
    """Return the two as bytes and float32 [N], or raise ValueError saying what does not fit."""
    text_bytes, entropies_nats = bytes(text_bytes), np.asarray(entropies_nats, dtype=np.float32)
    if not text_bytes:
        raise ValueError("text_bytes is empty: nothing to draw")
    if entropies_nats.shape != (len(text_bytes),):
        raise ValueError(f"text_bytes has {len(text_bytes)} bytes but entropies_nats has shape {entropies_nats.shape}")
    if not np.isfinite(entropies_nats).all():
        raise ValueError(f"entropies_nats[{np.isfinite(entropies_nats).argmin()}] is not a finite number")
    return text_bytes, entropies_nats


def _bare(*all_axes):
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    return all_axes


def _save(path, figure, dpi=150):
    drawn = io.BytesIO()
    figure.savefig(drawn, format=Path(path).suffix[1:] or "png", dpi=dpi, facecolor="white")
    return _write(path, drawn.getvalue())


def _write(path, content):
    """Write bytes to path by way of a sibling file that is renamed, so that path holds all of it or is untouched."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"cannot write {path}: {path.parent} is, or lies under, a file") from error
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def draw_evaluation(path, names, by_context, by_source, noises, title=None):
    """Draw what evaluate.py found: bits per byte by context, by source, and the change by noise; a colour for each model.

    names: of the models, for the legend. by_context: [(label, bits per byte of each model)] in order. by_source: [(label,
    bits per byte, standard errors)]. noises: [(label, changes)]. A number that is None is not drawn; a panel without
    entries is left out.
    """
    if not names or not by_context:
        raise ValueError("names or by_context is empty: nothing to draw")
    bars = [
        (rows, label, signed)
        for rows, label, signed in (
            (by_source, "bits per byte by source", False),
            (noises, "change by noise (bits per original byte)", True),
        )
        if rows
    ]
    longest = max((len(rows) for rows, _, _ in bars), default=0)
    height = max(4.2, 1.6 + longest * (0.14 + 0.2 * len(names)))
    figure = Figure(figsize=(5.5 + 5 * len(bars), height), layout="constrained")
    left, *others = _bare(*np.atleast_1d(figure.subplots(1, 1 + len(bars))))
    for number, name in enumerate(names):
        points = [(x, values[number]) for x, (_, values) in enumerate(by_context) if values[number] is not None]
        x, y = zip(*points) if points else ((), ())
        left.plot(x, y, "o-", color=CURVE_COLOURS[number % len(CURVE_COLOURS)], markersize=4, label=name)
    left.set_xticks(np.arange(len(by_context)), [label for label, _ in by_context], rotation=60, ha="right", fontsize=8)
    left.set_xlabel("bytes of context before the byte")
    left.set_ylabel("bits per byte (lower is better)")
    left.grid(alpha=0.3)
    for axes, (rows, label, signed) in zip(others, bars):
        thick = 0.8 / len(names)
        for number in range(len(names)):
            for y, (_, values, *errors) in enumerate(rows):
                if values[number] is None:
                    continue
                error = (errors[0][number] if errors else None) or 0
                place = y - 0.4 + (number + 0.5) * thick
                axes.barh(
                    place,
                    values[number],
                    0.9 * thick,
                    xerr=error or None,
                    capsize=2,
                    alpha=0.75,
                    color=CURVE_COLOURS[number % len(CURVE_COLOURS)],
                    error_kw=dict(ecolor=GREY),
                )
                text = (
                    f"{values[number]:+.3f}"
                    if signed
                    else f"{values[number]:.3f}" + (f" ± {error:.3f}" if error else "")
                )
                axes.annotate(
                    text,
                    (max(values[number] + error, 0), place),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
        axes.set_yticks(np.arange(len(rows)), [_shortened(row[0]) for row in rows], fontsize=9, parse_math=False)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(
            right=(1.25 if signed else 1.45)
            * max(
                [
                    value + ((row[2][i] if len(row) > 2 else None) or 0)
                    for row in rows
                    for i, value in enumerate(row[1])
                    if value is not None and value > 0
                ],
                default=1,
            )
        )
        if signed:
            axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(title or "", fontsize=11, parse_math=False)
    legend = figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncol=min(3, len(names)), frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _save(path, figure)


def _shortened(label, most=28):
    return label if len(label) <= most else "…" + label[1 - most :]
