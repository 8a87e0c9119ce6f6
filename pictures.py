"""Pictures of patches, entropies and training runs: numpy arrays and bytes in, one PNG or HTML file out.

draw_entropy_figure        entropy along a text with its patches, the paper's Figure 4
draw_patch_size_histogram  how many patches have how many bytes
draw_curves                training and validation curves
draw_comparison            bits per byte beside average patch size, by patching method
draw_evaluation            bits per byte by context, by source and by noise, of several models
write_patch_html           text coloured by patch, the entropy of each byte on hover; opens without network

Not a script: scripts and notebooks call these functions. Each checks its input, makes the folder if needed, writes
aside and renames (nobody reads half a file) and returns the path. No pyplot, so a notebook's figures and backend stay
as they are. A file name in .svg or .pdf gives that format instead of PNG. A picture takes about a second on a CPU.
Index t always means "about byte t, from what stands before t": a high entropy at byte t says that byte t was hard to
foresee, and by the global rule byte t then starts a patch. (The paper's Figure 4 draws the same number one byte to
the left, over the last byte read.)
"""
import base64
import html
import io
import math
import os
import string
import unicodedata
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure

BLUE, ORANGE, GREY, BAND = "#2f6db3", "#d9531e", "#667085", "#dce9f7"
CURVE_COLOURS = (BLUE, ORANGE, "#2e8b57", "#8e5bb5", "#b8860b", "#c2407a", "#3a9ea5", "#555555")
FIGURE_FONT = "DejaVu Sans"                         # comes with matplotlib: every machine draws the same characters
MAX_FIGURE_BYTES = 4000                             # 50 lines; drawing takes 2 ms a byte


def utf8_characters(text_bytes):
    """Cut bytes into UTF-8 characters: b"a\\xc3\\xa9\\xff" gives [(0, 1, "a"), (1, 3, "é"), (3, 4, None)].

    Returns (first byte, one past the last byte, character); a byte outside any valid character stands alone with None.
    """
    pieces, first = [], 0
    for char in text_bytes.decode("utf-8", errors="surrogateescape"):     # an invalid byte xx arrives as U+DCxx
        invalid = 0xDC80 <= ord(char) <= 0xDCFF
        stop = first + (1 if invalid else len(char.encode()))
        pieces.append((first, stop, None if invalid else char))
        first = stop
    return pieces


def draw_entropy_figure(path, text_bytes, entropies_nats, is_start, threshold=None, title=None, bytes_per_line=80):
    """Draw the entropy along a text, each byte's character under its point, one band a patch (BLT Figure 4).

    text_bytes: bytes, bytearray or uint8 array, 1 to 4000 bytes. entropies_nats [N] float and is_start [N] bool: one
    value a byte. threshold: in nats, drawn dashed; give it for rules that compare the entropy itself with it.
    Space is drawn as ␣, tab →, newline ⏎; a character of several bytes stands at its first byte with · for the
    others; what is invalid UTF-8, or not in the font, as each byte in hex.
    """
    text_bytes, entropies_nats, is_start = _checked(text_bytes, entropies_nats, is_start)
    n = len(text_bytes)
    if n > MAX_FIGURE_BYTES:
        raise ValueError(f"text_bytes has {n:,} bytes; a figure shows at most {MAX_FIGURE_BYTES:,}: pass a slice")
    if bytes_per_line < 1:
        raise ValueError(f"bytes_per_line is {bytes_per_line}; it must be at least 1")
    labels, patch = _byte_labels(text_bytes), np.cumsum(is_start) - 1
    columns = min(bytes_per_line, n)
    lines = math.ceil(n / columns)
    width, panel, gap, top = max(7.0, 0.165 * columns + 0.9), 1.25, 0.5, 0.8 if title else 0.5          # inches
    height = top + lines * (panel + gap)
    limit = 1.1 * max(entropies_nats.max(), min(threshold or 0, math.log(256)), 0.1)
    figure = Figure(figsize=(width, height))
    for line in range(lines):
        begin, end = line * columns, min((line + 1) * columns, n)
        bottom = height - top - (line + 1) * panel - line * gap
        axes, = _bare(figure.add_axes((0.65 / width, bottom / height, 1 - 0.85 / width, panel / height)))
        t = np.arange(begin, end)
        starts = t[is_start[begin:end]]
        edges = [begin, *starts[starts > begin], end]
        for left, right in zip(edges, edges[1:]):
            axes.axvspan(left - 0.5, right - 0.5, color=BAND if patch[left] % 2 else "white", linewidth=0)
        axes.vlines(starts - 0.5, 0, limit, color=GREY, linewidth=0.6)
        curve, = axes.plot(t, entropies_nats[begin:end], ".-", color=BLUE, linewidth=1, markersize=4)
        dots, = axes.plot(starts, entropies_nats[starts], "o", color=ORANGE, markersize=4.5)
        legend = [(curve, "entropy of the byte below, given the bytes before it"), (dots, "starts a patch")]
        if threshold is not None:
            dashes, = axes.plot([begin - 0.5, end - 0.5], [threshold] * 2, "--", color="black", linewidth=0.9)
            legend.append((dashes, f"threshold {threshold:.4g} nats"))
        axes.set_xlim(begin - 0.5, begin + columns - 0.5)                   # the same width a byte on every line
        axes.set_ylim(0, limit)
        axes.set_ylabel("entropy (nats)", fontsize=9)
        axes.tick_params(axis="y", labelsize=8)
        axes.tick_params(axis="x", length=0, labelsize=10, pad=13)
        axes.set_xticks(t, labels[begin:end], fontfamily=FIGURE_FONT, parse_math=False, va="baseline")
        for tick, label in zip(axes.get_xticklabels(), labels[begin:end]):
            tick.set(color=GREY if label in "·␣" else "black", fontsize=7 if len(label) == 2 else 10)     # 2: hex
        axes.text(0, 1.02, f"byte {begin:,}", transform=axes.transAxes, fontsize=7, color=GREY)
    figure.legend(*zip(*legend), loc="upper center", bbox_to_anchor=(0.5, 1 - (top - 0.45) / height), ncol=3,
                  frameon=False, fontsize=9)
    figure.text(0.5, 1 - 0.25 / height, title or "", ha="center", fontsize=12, parse_math=False)
    return _save(path, figure)


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
    axes, = _bare(figure.subplots())
    bars = axes.bar(np.arange(1, last + 1), share, color=BLUE, width=0.85)
    if last <= 20:
        axes.bar_label(bars, [f"{value:.1f}" if value else "" for value in share], fontsize=7, color=GREY)
    for name, value, look in (("mean", sizes.mean(), dict(color=ORANGE, markersize=8)),
                              ("median", np.median(sizes), dict(color="black", markersize=12, fillstyle="none"))):
        aside = "" if value <= last + 0.5 else ", right of the picture"
        axes.plot(min(value, last + 0.5), share.max() * 1.14, "v", label=f"{name} {value:.2f} bytes{aside}", **look)
    ticks = np.arange(last, 0, -math.ceil(last / 20))                       # down from the last, which needs its label
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
    axes, = _bare(figure.subplots())
    everything, settled, lost = [], [], 0
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
        settled.append(np.percentile(finite[min(math.ceil(0.05 * finite.size), finite.size - 1):], 99))
        lost += len(y) - finite.size
    everything = np.concatenate(everything)
    low, high, rest = everything.min(), everything.max(), max(settled) - everything.min()
    top = high if high - low <= 3 * rest else low + 1.5 * rest              # half as much again shows the descent
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
    rows = sorted(rows, key=lambda row: row["val_bpb"], reverse=True)       # matplotlib counts lines from below
    y, ci = np.arange(len(rows)), np.array([row.get("ci") or 0.0 for row in rows])
    bpb, size = (np.array([row[key] for row in rows], dtype=np.float64) for key in ("val_bpb", "avg_patch_size"))
    figure = Figure(figsize=(9, 1.3 + 0.38 * len(rows)), layout="constrained")
    left, right = _bare(*figure.subplots(1, 2, sharey=True, width_ratios=(3, 2)))
    left.errorbar(bpb, y, xerr=ci if ci.any() else None, fmt="o", color=BLUE, ecolor=GREY, capsize=3)
    right.barh(y, size, color=BLUE, alpha=0.5, height=0.55)
    low, high = (bpb - ci).min(), (bpb + ci).max()
    room = (high - low) or 0.1 * abs(high) or 0.1
    left.set_xlim(low - 0.1 * room, high + 0.4 * room)                      # room for the numbers on the right
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


BAR_PX = 16                                         # height of the highest entropy bar under a character
BARS, HIGH_BARS = string.ascii_lowercase, string.ascii_uppercase            # CSS class of a bar of 0, 1, 2, .. pixels
PAGE = string.Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>$title</title>
<style>
:root{color-scheme:light dark;--page:#fff;--ink:#16191d;--dim:#555d68;--bar:#6d7b8e;--high:#c2410c;
  --c0:#d5e6fb;--c1:#fde8bf;--c2:#d3f0d8;--c3:#efdcf6;--mono:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace}
@media(prefers-color-scheme:dark){:root{--page:#15181c;--ink:#f1f3f5;--dim:#a9b2bd;--bar:#93a1b5;--high:#ff8a4c;
  --c0:#1d3d63;--c1:#57430f;--c2:#1d4b2b;--c3:#4c2b60}}
body{background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif;max-width:68rem;margin:1.5rem auto;
  padding:0 1rem}
h1{font-size:1.4rem;margin:0} p{margin:.4rem 0} .dim,dt{color:var(--dim)} dt{font-size:.8rem}
dl{display:flex;flex-wrap:wrap;gap:.3rem 2rem;margin:.8rem 0} dd{margin:0;font-weight:600}
#text{font:15px/40px var(--mono);white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4;
  border-top:1px solid var(--bar);margin-top:1rem;padding-top:.6rem}
#text>div{content-visibility:auto;contain-intrinsic-size:auto 40px;padding:0 4px 8px} /* 8px: else bars are clipped */
b,i{font-weight:400;font-style:normal;padding:2px 0 ${bar_px}px} b{border-left:1px solid var(--page)}
i{background:linear-gradient(var(--bar) 0 0) 0 100% no-repeat} i:hover{outline:2px solid var(--ink)}
.p0{background:var(--c0)} .p1{background:var(--c1)} .p2{background:var(--c2)} .p3{background:var(--c3)}
.cut{outline:1px dashed var(--high)} .hex{unicode-bidi:isolate}
$bar_css
#tip{position:fixed;pointer-events:none;white-space:pre;background:var(--ink);color:var(--page);
  font:12px/1.45 var(--mono);padding:.4rem .6rem;border-radius:4px}
</style></head><body>
<h1>$title</h1><p class="dim">$subtitle</p>
<dl>$totals</dl>
<p>Each coloured run is one patch, the bytes that the latent transformer reads in one step; the colour only tells it
from its neighbours. The bar under a character is its entropy, how hard it was to foresee from the bytes before it
(full height $full nats; of several bytes, the highest): $bar_rule.</p>
<p class="dim">Hover over or tap a character for its numbers; bytes and patches count from 0. A dashed frame with one
stripe a byte is a character cut by a patch boundary. ⏎ newline, → tab, ␣ unusual space, ‹xx› invalid UTF-8 or an
invisible character, ◌ carries a combining mark.</p>
<noscript><p><strong>JavaScript is off: colours and bars are complete, the numbers on hover are missing.</strong></p>
</noscript>
<div id="text"><div>$body</div></div><div id="tip" hidden></div>
<script>
"use strict";
const unpack = base64 => Uint8Array.from(atob(base64), c => c.charCodeAt(0));
const bytes = unpack("$bytes"), flags = unpack("$flags"), entropies = new Float32Array(unpack("$entropies").buffer);
const chars = [], patches = [], patchOf = [];
flags.forEach((flag, t) => {
  if (flag & 1) patches.push(t);                                        // byte t starts a patch
  if (flag & 2) chars.push(t);                                          // byte t starts a character
  patchOf.push(patches.length - 1);
});
chars.push(bytes.length); patches.push(bytes.length);
const text = document.getElementById("text"), tip = document.getElementById("tip");
text.querySelectorAll("i").forEach((element, k) => { element.k = k; });
text.addEventListener("mouseover", event => {
  const k = event.target.k;
  tip.hidden = k === undefined;
  if (tip.hidden) return;
  const lines = ["character " + k + "  " + (event.target.textContent.trim() || "space")];
  for (let t = chars[k]; t < chars[k + 1]; t++) {
    const h = entropies[t], p = patchOf[t];
    lines.push("byte " + t + "  0x" + bytes[t].toString(16).padStart(2, "0") + "  " + h.toFixed(3) + " nats  "
      + (h / Math.LN2).toFixed(3) + " bits  patch " + p + (flags[t] & 1 ? " starts here" : "") + ", patch size "
      + (patches[p + 1] - patches[p]));
  }
  tip.textContent = lines.join("\\n");
  const box = event.target.getClientRects()[0], low = box.bottom + 6, size = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(box.left, innerWidth - size.width - 20)) + "px";
  tip.style.top = (low + size.height < innerHeight ? low : box.top - size.height - 6) + "px";
});
for (const [where, what] of [[text, "mouseleave"], [window, "scroll"]])
  where.addEventListener(what, () => { tip.hidden = true; });
</script></body></html>
""")


def write_patch_html(path, text_bytes, entropies_nats, is_start, title, subtitle, threshold=None):
    """Write one HTML page of the text coloured by patch, a bar of entropy under each character, numbers on hover.

    Arguments as in draw_entropy_figure, for any length (100 kB of text: a 3 MB page). Text, colours and bars are plain
    markup; a small script shows the numbers. A character whose bytes lie in more than one patch stands once, in a
    dashed frame, with one stripe a byte in the colour of that byte's patch.
    """
    text_bytes, entropies_nats, is_start = _checked(text_bytes, entropies_nats, is_start)
    full = max(float(entropies_nats.max()), 1e-6)
    bar = np.clip(np.rint(entropies_nats / full * BAR_PX), 0, BAR_PX).astype(int).tolist()
    high = [threshold is not None and h > threshold for h in entropies_nats.tolist()]
    patch, flags = (np.cumsum(is_start) - 1).tolist(), is_start.astype(np.uint8)
    body, in_patch, cut = [], None, 0
    for first, stop, char in utf8_characters(text_bytes):
        flags[first] |= 2
        if patch[first] != in_patch:
            body.append(f"{'' if in_patch is None else '</b>'}<b class=p{patch[first] % 4}>")
            in_patch = patch[first]
        shown = _visible(char, text_bytes[first:stop])
        over = any(high[first:stop])
        names, style = (HIGH_BARS if over else BARS)[max(bar[first:stop])] + " hex" * (shown[0] == "‹"), ""
        if patch[stop - 1] != patch[first]:
            cut += 1
            names += " cut"
            stripes = ",".join(f"var(--c{patch[t] % 4}) {100 * (t - first) // (stop - first)}% "
                               f"{100 * (t + 1 - first) // (stop - first)}%" for t in range(first, stop))
            style = (f' style="background-image:linear-gradient(var(--{"high" if over else "bar"}) 0 0),'
                     f'linear-gradient(90deg,{stripes})"')
        quote = '"' * (" " in names)                                        # a quote less each: 100 kB stay small
        body.append(f"<i class={quote}{names}{quote}{style}>{shown}</i>")
        if char == "\n":                            # a block a line: the browser lays out only the lines in view
            body.append("</b></div><div>")
            in_patch = None
    average, patches = float(entropies_nats.mean(dtype=np.float64)), patch[-1] + 1
    totals = {"bytes": f"{len(text_bytes):,}", "patches": f"{patches:,}",
              "average patch size": f"{len(text_bytes) / patches:.2f} bytes",
              "average entropy": f"{average:.3f} nats ({average / math.log(2):.3f} bits)",
              "threshold": "none" if threshold is None else f"{threshold:.4g} nats",
              "characters cut by a boundary": f"{cut:,}"}
    page = PAGE.substitute(
        title=html.escape(title), subtitle=html.escape(subtitle), full=f"{full:.2f}",
        body="".join(body) + "</b>" * (in_patch is not None),
        totals="".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in totals.items()),
        bar_rule="no threshold was given" if threshold is None else f"orange above {totals['threshold']}, else grey",
        bar_px=BAR_PX, bytes=_base64(text_bytes), flags=_base64(flags), entropies=_base64(entropies_nats.astype("<f4")),
        bar_css="\n".join(f".{BARS[px]},.{HIGH_BARS[px]}{{background-size:100% {px}px,100% 100%}} .{HIGH_BARS[px]}"
                          "{background-image:linear-gradient(var(--high) 0 0)}" for px in range(BAR_PX + 1)))
    return _write(path, page.encode())


def _base64(array):
    return base64.b64encode(bytes(array)).decode()


def _visible(char, raw):
    """Give the HTML that stands for one character, or for one invalid byte (char None)."""
    if char is None:
        return f"‹{raw.hex()}›"
    if char in "\n\t":
        return "⏎" if char == "\n" else "→\t"
    kind = unicodedata.category(char)
    if not char.isprintable():                                              # no-break space; controls; joiners
        return "␣" if kind == "Zs" else f"‹{raw.hex()}›" if len(raw) == 1 else f"‹U+{ord(char):04X}›"
    return ("◌" if kind[0] == "M" else "") + html.escape(char)


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


def _checked(text_bytes, entropies_nats, is_start):
    """Return the three as bytes, float32 [N] and bool [N], or raise ValueError saying what does not fit."""
    text_bytes = bytes(text_bytes)
    entropies_nats, is_start = np.asarray(entropies_nats, dtype=np.float32), np.asarray(is_start, dtype=bool)
    if not text_bytes:
        raise ValueError("text_bytes is empty: nothing to draw")
    for name, array in (("entropies_nats", entropies_nats), ("is_start", is_start)):
        if array.shape != (len(text_bytes),):
            raise ValueError(f"text_bytes has {len(text_bytes)} bytes but {name} has shape {array.shape}")
    if not np.isfinite(entropies_nats).all():
        raise ValueError(f"entropies_nats[{np.isfinite(entropies_nats).argmin()}] is not a finite number")
    if not is_start[0]:
        raise ValueError("is_start[0] is False; byte 0 always starts a patch")
    return text_bytes, entropies_nats, is_start


def _bare(*all_axes):
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    return all_axes


def _save(path, figure):
    drawn = io.BytesIO()
    figure.savefig(drawn, format=Path(path).suffix[1:] or "png", dpi=150, facecolor="white")
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
    bars = [(rows, label, signed) for rows, label, signed in (
        (by_source, "bits per byte by source", False), (noises, "change by noise (bits per original byte)", True)) if rows]
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
                axes.barh(place, values[number], 0.9 * thick, xerr=error or None, capsize=2, alpha=0.75,
                          color=CURVE_COLOURS[number % len(CURVE_COLOURS)], error_kw=dict(ecolor=GREY))
                text = f"{values[number]:+.3f}" if signed else f"{values[number]:.3f}" + (f" ± {error:.3f}" if error else "")
                axes.annotate(text, (max(values[number] + error, 0), place), (4, 0), textcoords="offset points",
                              va="center", fontsize=8)
        axes.set_yticks(np.arange(len(rows)), [_shortened(row[0]) for row in rows], fontsize=9, parse_math=False)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(right=(1.25 if signed else 1.45) * max([value + ((row[2][i] if len(row) > 2 else None) or 0) for row in rows
                                        for i, value in enumerate(row[1]) if value is not None and value > 0], default=1))
        if signed:
            axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(title or "", fontsize=11, parse_math=False)
    legend = figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncol=min(3, len(names)), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _save(path, figure)


def _shortened(label, most=28):
    return label if len(label) <= most else "…" + label[1 - most :]
