"""Tests of the interactive page (pictures.write_patch_page, patch_page.html) and of show_patches.py.

What the file holds is tested without a browser; the page's own rules in node, the page itself in headless Chromium, where there are any.
"""

import base64
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import zlib
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from blt import pictures
from blt.entropies import TopPredictions, stream_predictions
from blt.files import save_weights, write_json
from blt.metric import target_losses
from blt.patch_rules import PatchConfig, patch_sizes, patch_starts, threshold_for_patch_size
from blt.rows import evaluation_batches
from blt_model import BLTConfig, BLTModel
from entropy_llm import EntropyConfig, MinimalLLM
from entropy_patcher import EntropyPatcher
from save_entropy_model import load_blt, load_entropy_model, save_entropy_model
from show_patches import ShowPatchesConfig, blt_predictions, main, read_text

ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(
    (
        found
        for found in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
        if found
    ),
    None,
)
NODE = shutil.which("node")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
needs_node = pytest.mark.skipif(NODE is None, reason="no node on PATH")

RULE = PatchConfig("global", 1.5).rule
MIXED = (
    "Tab\there\n\nEmoji 🙂👩‍👧 e\u0301 né 中文 שלום العربية <script>window.injected = 1</script> &amp; </b> <!-- \"'`${1}\n".encode()
    + b"bad \xff\xfe \xc3 \xe6\x97 \xed\xa0\x80 \xf4\x90\x80\x80 \xc0\xaf \x00\x1b[31m\x7f\r\n" + "\u00a0\u200b\ufeff\u2028\u202e\ue000".encode()
)  # fmt: skip


def numbers(n, seed=0, k=3):
    """Random entropies and predictions of n places."""
    rng = np.random.default_rng(seed)
    H = rng.exponential(1.0, n).astype(np.float32)
    probabilities = -np.sort(-rng.dirichlet(np.ones(k + 2), n)[:, :k]).astype(np.float32)
    return H, TopPredictions(rng.integers(0, 257, (n, k)), probabilities, rng.random(n).astype(np.float32))


def write_page(path, text=MIXED, rule=RULE, title="title", **more):
    H, predictions = numbers(len(text))
    pictures.write_patch_page(
        path, text, H, rule, {"entropy model": predictions}, title, "subtitle", [("bits", "1.234")], **more
    )
    return path.read_text(encoding="utf-8")


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def unpack(packed, dtype):
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype)


# ---- the file, without a browser


def test_page_holds_text_entropies_and_guesses(tmp_path):
    data = data_of(write_page(tmp_path / "new" / "page.html", token_starts=np.arange(len(MIXED)) % 3 == 0))
    H, predictions = numbers(len(MIXED))
    assert (
        unpack(data["bytes"], np.uint8).tobytes() == MIXED
        and data["rule"] == RULE
        and data["figures"] == [["bits", "1.234"]]
    )
    np.testing.assert_array_equal(unpack(data["entropies"], "<f4"), H)
    (guess,) = data["predictions"]
    assert (guess["name"], guess["k"]) == ("entropy model", 3)
    np.testing.assert_array_equal(
        unpack(guess["ids"], "<u2").reshape(3, -1).T, predictions.ids_Nk
    )  # the end of a document, 256, too
    for name, exact in (
        ("probabilities", predictions.probabilities_Nk.T.reshape(-1)),
        ("of_byte", predictions.of_byte_N),
    ):
        np.testing.assert_allclose((unpack(guess[name], np.uint8) / 255) ** 2, exact, atol=0.004)
    assert unpack(data["token_starts"], np.uint8).tolist() == (np.arange(len(MIXED)) % 3 == 0).astype(int).tolist()
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["page.html"]


def test_nothing_in_text_or_titles_becomes_markup(tmp_path):
    template = pictures.PAGE.read_text(encoding="utf-8")
    page = write_page(
        tmp_path / "page.html",
        b"</script><script>alert(1)</script><!-- <script>",
        title="</script><script>alert(2)</script><!--",
    )
    assert page.count("<script") == template.count("<script") and page.count("</script") == template.count("</script")
    assert page.count("<!--") == template.count("<!--")
    assert data_of(page)["title"] == "</script><script>alert(2)</script><!--"


def test_page_needs_no_network(tmp_path):
    page = write_page(tmp_path / "page.html")
    assert "content=\"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'\"" in page
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"\bsrc=|\bhref=|@import|url\(|@font-face|\bfetch\(|XMLHttp|WebSocket", page)


def test_100_kb_with_two_models_stay_near_3_mb(tmp_path):
    """Noise is the worst case: a real text with two models and five predictions takes 2.9 MB."""
    rng = np.random.default_rng(0)
    text = bytes(rng.choice(np.frombuffer(b"etaoin shrdlu", np.uint8), 100_000))
    H, predictions = numbers(len(text), k=5)
    predictions.ids_Nk = rng.choice(np.frombuffer(b"etaoin shrdlucmfwypvbgk,.", np.uint8), (len(text), 5)).astype(
        np.int64
    )
    path = pictures.write_patch_page(
        tmp_path / "page.html", text, H, RULE, {"entropy model": predictions, "BLT": predictions}
    )
    assert path.stat().st_size < 3.3e6


def test_whole_characters_by_hand():
    text = "aé日🙂".encode()  # ends of characters: 1, 3, 6, 10
    assert [len(pictures.whole_characters(text, limit)) for limit in range(1, 12)] == [
        1,
        1,
        3,
        3,
        3,
        6,
        6,
        6,
        6,
        10,
        10,
    ]
    assert pictures.whole_characters(b"\x80" * 9, 7) == b"\x80" * 7  # no character to keep whole


@pytest.mark.parametrize("change, message", [
    (dict(text_bytes=b""), "text_bytes is empty"),
    (dict(entropies_nats=np.zeros(5)), r"9 bytes but entropies_nats has shape \(5,\)"),
    (dict(entropies_nats=np.full(9, np.inf)), r"entropies_nats\[0\] is not a finite number"),
    (dict(predictions={"BLT": numbers(8)[1]}), "9 bytes but ids_Nk of 'BLT' has 8 positions"),
    (dict(rule={**RULE, "method": "bpe"}), "'bpe' needs token_starts"),
    (dict(text_bytes=bytes(400_001), entropies_nats=np.zeros(400_001)), "400,001 bytes; a page shows at most 400,000"),
])  # fmt: skip
def test_mistakes_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        pictures.write_patch_page(
            tmp_path / "a.html", **{**dict(text_bytes=b"123456789", entropies_nats=np.zeros(9), rule=RULE), **change}
        )
    assert not list(tmp_path.iterdir())


def test_text_is_readable_in_both_colour_schemes():
    """Contrast of at least 7 (WCAG AAA) between text and every background, 3 between curve and patch, light and dark."""

    def luminance(colour):
        colour = "".join(c + c for c in colour) if len(colour) == 3 else colour
        channels = np.array([int(colour[k : k + 2], 16) / 255 for k in (0, 2, 4)])
        return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ [
            0.2126,
            0.7152,
            0.0722,
        ]

    page = pictures.PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r":root\{([^}]*)\}", page)
    assert len(blocks) == 2 and "prefers-color-scheme:dark" in page
    assert re.findall(r"--c\d:(#\w+)", blocks[0]) == list(pictures.PATCH_COLOURS)  # the figure's
    for block in blocks:
        colours = {name: luminance(value) for name, value in re.findall(r"--(\w+):#([0-9a-f]+)", block)}
        contrast = lambda a, b: (max(colours[a], colours[b]) + 0.05) / (min(colours[a], colours[b]) + 0.05)  # noqa: E731
        assert len({colours[f"c{k}"] for k in range(4)}) == 4
        for background in ("page", "c0", "c1", "c2", "c3"):
            assert (
                contrast("ink", background) >= 7
                and min(contrast("curve", background), contrast("high", background)) >= 3
            ), (background, block)
        assert contrast("dim", "page") >= 4.5


# ---- the page's rules against patch_starts


def rule_cases():
    """Texts, entropies and rules: every method and option, thresholds that stand on an entropy or between two float32 numbers."""
    rng = np.random.default_rng(1)
    cases = []
    for number in range(420):
        n = int(rng.integers(1, 150)) if number % 6 else 1
        text = (
            bytes(rng.choice(np.frombuffer(b"ab1 .,\n\xc0\xc3\xa9\xe0\xe6\x97\xa5\xed\xf4\x8f\xaf\xff", np.uint8), n))
            if number % 2
            else rng.bytes(n)
        )
        H = rng.exponential(1.0, n).astype(np.float16 if number % 3 == 0 else np.float32).astype(np.float32)
        method = ("global", "monotonic", "both", "cumulative", "static", "space", "bpe")[number % 7]
        of_text = float(H[rng.integers(n)])
        threshold = [float(rng.exponential()), of_text, of_text + 1e-9, np.nextafter(of_text, -1), 0.0, -0.5][
            number % 5 if number % 11 else 5
        ]
        if method == "cumulative":
            total = np.concatenate(([0.0], np.cumsum(H, dtype=np.float64)))
            threshold = [4 * threshold, float(total[(n + 1) // 2] - total[n // 3]), threshold][number % 3]
        if method in ("monotonic", "both") and n > 1 and number % 2:
            t = int(rng.integers(1, n))
            threshold = float(H[t] - H[t - 1])  # a rise, rounded to float32
        if method == "static":
            threshold = float(rng.choice([1, 2, 4.5, 1.1, 3.3, 7, 1 + 1e-12, rng.uniform(1, 9)]))
        least = int(rng.choice([1, 1, 2, 5]))
        rule = PatchConfig(
            method, float(threshold), float(rng.normal()), least, [None, least, least + 3][number % 3]
        ).rule
        tokens = rng.random(n) < 0.3
        starts = patch_starts(H, **rule, byte_values=np.frombuffer(text, np.uint8), token_starts=tokens)
        cases.append((dict(text=list(text), H=H.tolist(), rule=rule, tokens=tokens.astype(int).tolist()), starts))
    return cases


RUN_CASES = """
const results = CASES.map(c => {
  const bytes = Uint8Array.from(c.text), characters = [];
  for (let t = 0; t < bytes.length;) { const [size, code] = characterAt(bytes, t); characters.push([t, t + size, code]); t += size; }
  return [Array.from(patchStarts(Float32Array.from(c.H), bytes, c.rule, Uint8Array.from(c.tokens))), characters];
});
"""


def check_cases(results, cases):
    for (starts, characters), (case, expected) in zip(results, cases, strict=True):
        assert starts == expected.astype(int).tolist(), case
        pieces = pictures.utf8_characters(bytes(case["text"]))
        assert characters == [[first, stop, -1 if char is None else ord(char)] for first, stop, char in pieces], case
    sizes = {
        method: sum(int(e.sum()) for c, e in cases if c["rule"]["method"] == method)
        for method in {c["rule"]["method"] for c, _ in cases}
    }
    assert len(sizes) == 7 and min(sizes.values()) > 100  # the cases do cut


@needs_node
def test_rules_in_node_cut_as_patch_starts():
    cases = rule_cases()
    rules = re.search(r'<script id="rules">(.*?)</script>', pictures.PAGE.read_text(encoding="utf-8"), re.S)[1]
    code = (
        rules
        + f"const CASES = {json.dumps([case for case, _ in cases])};"
        + RUN_CASES
        + "console.log(JSON.stringify(results));"
    )
    done = subprocess.run([NODE, "-"], input=code, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    check_cases(json.loads(done.stdout), cases)


# ---- the page itself


def browse(tmp_path, page, script, size="1200,800"):
    """Open a page in headless Chromium, run a script when it is drawn, and return what the script puts into `out`.

    --dump-dom waits for the load event only; so an image that a server of ours holds back keeps the page loading till the script is done.
    """
    done = threading.Event()

    class Hold(BaseHTTPRequestHandler):
        def do_GET(self):
            done.set() if self.path == "/done" else done.wait(60)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hold)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    script = (
        f"<img src={address}/hold hidden><script>(async () => {{ const out = {{}}; try {{"
        "while (!document.documentElement.dataset.firstMs) await new Promise(r => setTimeout(r, 20));"
        + script + "} catch (error) { out.error = String(error.stack); }"
        "const pre = document.createElement('pre'); pre.id = 'out'; pre.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(out))));"
        f"document.body.append(pre); new Image().src = '{address}/done'; }})();</script>"
    )  # fmt: skip
    path = tmp_path / "browsed.html"
    path.write_text(
        page.replace("default-src 'none'", f"default-src 'none'; img-src {address}").replace(
            "</body>", script + "</body>"
        ),
        encoding="utf-8",
    )
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    try:
        browser = subprocess.run(
            [BROWSER, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}", "--dump-dom", path.as_uri()],
            capture_output=True, encoding="utf-8", errors="replace", timeout=100,
        )  # fmt: skip
    finally:
        done.set()
        server.shutdown()
    found = re.search(r'<pre id="out">([\w+/=]*)</pre>', browser.stdout)
    assert found, browser.stdout[-1000:] + browser.stderr[-2000:]
    out = json.loads(base64.b64decode(found[1]))
    assert "error" not in out, out["error"]
    return out


@needs_browser
def test_page_in_chromium(tmp_path):
    """What is drawn of a text of every kind; controls cut anew by every method; numbers of a byte under the pointer."""
    H, predictions = numbers(len(MIXED))
    byte_values, cases = np.frombuffer(MIXED, np.uint8), rule_cases()
    page = write_page(tmp_path / "page.html", title="<b>Mixed</b>")
    script = f"const CASES = {json.dumps([case for case, _ in cases])};".replace("<", "\\u003c") + RUN_CASES + """
      out.cases = results;
      const cut = () => ({ starts: Array.from(starts), rule: { ...rule }, patches: $("totals").querySelector("dd").textContent });
      const fire = (id, name, value) => { if (value !== undefined) $(id).value = value; $(id).dispatchEvent(new Event(name)); return new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r))); };
      out.title = [document.title, $("title").textContent, $("title").children.length];
      out.totals = Object.fromEntries(Array.from($("totals").children, e => [e.children[0].textContent, e.children[1].textContent]));
      out.scripts = document.scripts.length; out.injected = window.injected;
      out.rows = rowFirst.slice();
      out.chars = Array.from(document.querySelectorAll(".row i"), e => e.textContent);
      out.bands = Array.from(document.querySelectorAll(".row"), row => [row.style.top, Array.from(row.querySelectorAll("b"), b => [parseFloat(b.style.left), parseFloat(b.style.width), b.className])]);
      out.gutter = gutter;
      out.first = cut();
      const box = $("rows").getBoundingClientRect(), at = 13, row = document.querySelectorAll(".row")[rowOf(at)];
      $("rows").dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + gutter + (at - rowFirst[rowOf(at)]) * CELL + 3, clientY: box.top + rowOf(at) * ROW + 20, bubbles: true }));
      out.hover = [hovered, $("detail").textContent, Array.from($("detail").querySelectorAll(".guess"), g => Array.from(g.children, e => e.textContent))];
      $("rows").dispatchEvent(new PointerEvent("pointerleave"));
      await fire("slider", "input", 0.7); out.slid = cut();
      await fire("threshold", "change", "0.123456"); out.typed = cut();
      await fire("threshold", "change", "1.5");
      out.methods = {};
      for (const method of ["monotonic", "both", "cumulative", "static", "space", "global"]) { await fire("method", "change", method); out.methods[method] = cut(); }
      await fire("least", "change", 3); await fire("most", "change", 4); out.sizes = cut();
      await fire("most", "change", ""); await fire("method", "change", "both"); await fire("rise-slider", "input", 0.4); out.rise = cut();
      pin(N - 1); out.end = $("detail").textContent;
      const key = name => $("scroll").dispatchEvent(new KeyboardEvent("keydown", { key: name, cancelable: true }));
      key("Home"); key("ArrowRight"); key("ArrowRight"); key("ArrowLeft"); out.pinned = pinned;
      out.requests = performance.getEntriesByType("resource").length;
    """  # fmt: skip
    out = browse(tmp_path, page, script)
    check_cases(out["cases"], cases)

    def check(cut, **expected):
        rule = {**cut["rule"]}
        assert {name: rule[name] for name in expected} == expected
        starts = patch_starts(H, **rule, byte_values=byte_values)
        assert cut["starts"] == starts.astype(int).tolist() and cut["patches"] == f"{starts.sum():,}"
        return starts

    starts = check(out["first"], **RULE)
    assert (
        out["title"] == ["<b>Mixed</b>", "<b>Mixed</b>", 0]
        and out["scripts"] == page.count("<script") + 1
        and "injected" not in out
    )
    sizes = patch_sizes(starts)
    inside = {first for first, stop, _ in pictures.utf8_characters(MIXED) if starts[first + 1 : stop].any()}
    assert inside and out["totals"] == {
        "patches": str(len(sizes)), "bytes a patch": f"{sizes.mean():.2f}", "largest": str(sizes.max()), "bytes": str(len(MIXED)),
        "characters cut": str(len(inside)), "bits": "1.234",
    }  # fmt: skip
    # Bands tile each row, and begin a patch where there is a start.
    patch = np.cumsum(starts) - 1
    for (top, bands), first, end in zip(
        sorted(out["bands"], key=lambda row: float(row[0][:-2])), out["rows"], out["rows"][1:]
    ):
        at = first
        for left, width, name in bands:
            assert left == out["gutter"] + 10 * (at - first) and name == f"p{patch[at] % 4}" + " start" * bool(
                starts[at]
            )
            at += round(width / 10)
        assert at == end
    ends = np.array(out["rows"][1:-1])
    assert out["rows"][-1] == len(MIXED) and not set(ends) & {
        t for first, stop, _ in pictures.utf8_characters(MIXED) for t in range(first + 1, stop)
    }
    assert len(out["bands"]) == len(out["rows"]) - 1 and "Tab→here⏎⏎" == "".join(out["chars"])[:10]
    shown = "".join(out["chars"])
    assert all(
        part in shown
        for part in (
            "🙂",
            "200D",
            "◌\u0301",
            "中文",
            "<script>",
            "&amp;",
            "ff",
            "fe",
            "001b[31m7f0d⏎",
            "␣200BFEFF2028202EE000",
        )
    )
    # The pointer: byte 13, in "Emoji 🙂": its numbers, and the predictions with the byte that came marked.
    t, text, lines = out["hover"][0], out["hover"][1], out["hover"][2]
    assert (
        t == 13
        and f"byte {t}: " in text
        and f"0x{MIXED[t]:02X} = {MIXED[t]}" in text
        and f"entropy {H[t]:.3f} nats ({H[t] / math.log(2):.3f} bits)" in text
    )
    assert f"in patch {patch[t]}: " in text
    assert len(lines) == 3 + (MIXED[t] not in predictions.ids_Nk[t]) and sum("←" in name for name, _, _ in lines) == 1
    for (_, _, share), p in zip(lines, predictions.probabilities_Nk[t]):
        assert float(share.strip("<%")) == pytest.approx(100 * p, abs=1.0)
    # Controls.
    check(out["slid"], threshold=0.7)
    check(out["typed"], threshold=0.123456)
    for method, cut in out["methods"].items():
        matched = check(cut, method=method)
        if method not in ("both", "static", "space", "global"):
            assert abs(matched.sum() - len(sizes)) <= 0.1 * len(sizes)  # another method begins with as many patches
    assert out["methods"]["global"]["rule"] == RULE
    assert set(patch_sizes(check(out["sizes"], min_patch_size=3, max_patch_size=4))[:-1]) == {3, 4}
    check(out["rise"], method="both", monotonic_threshold=0.4, min_patch_size=3, max_patch_size=None)
    assert f"byte {len(MIXED) - 1}: " in out["end"] and "U+E000" in out["end"] and out["pinned"] == 1
    assert out["requests"] == 0


@needs_browser
def test_long_text_on_a_phone_draws_only_what_is_in_view(tmp_path):
    text = (b"The quick brown fox jumps over the lazy dog, again and again.\n" * 1700)[:100_000]
    page = write_page(tmp_path / "page.html", text)
    out = browse(tmp_path, page, """
      const shown = () => [document.querySelectorAll(".row").length, Math.min(...Array.from(document.querySelectorAll(".row"), r => parseInt(r.style.top)))];
      out.nodes = document.querySelectorAll("*").length; out.rows = rowFirst.length - 1; out.top = shown();
      $("scroll").scrollTop = 1e9; draw(); out.bottom = shown(); out.last = document.querySelectorAll(".row").length && rowFirst[rowFirst.length - 1];
      out.wide = document.documentElement.scrollWidth <= innerWidth; out.box = $("scroll").clientHeight; out.columns = columns;
      out.starts = Array.from(starts).reduce((a, b) => a + b);
    """, size="500,800")  # fmt: skip
    assert out["rows"] > 1700 and out["top"][0] < 20 and out["bottom"][0] < 20 and out["nodes"] < 2000
    assert out["top"][1] == 0 and out["bottom"][1] > 72 * (out["rows"] - 20) and out["last"] == 100_000
    assert out["wide"] and out["box"] >= 180 and 20 <= out["columns"] <= 50
    assert out["starts"] == int((numbers(100_000)[0] > np.float32(1.5))[1:].sum()) + 1


# ---- models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with an untrained entropy model and an untrained BLT, as entropy_llm.py and llm.py leave them."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    entropy_model = MinimalLLM(EntropyConfig(d_model=32, n_heads=2, n_layers=2, max_seq_len=16))
    torch.nn.init.normal_(entropy_model.head.weight, std=0.5)  # entropies that differ
    save_entropy_model(entropy_model, folder / "entropy_model.pth")
    config = BLTConfig(
        encoder_layers=1,
        encoder_dim=32,
        global_layers=1,
        global_dim=32,
        decoder_layers=1,
        decoder_dim=32,
        hash_rows=64,
        window=16,
    )
    blt = BLTModel(config)
    torch.nn.init.normal_(blt.head.weight, std=0.5)
    (folder / "checkpoints").mkdir()
    save_weights(folder / "checkpoints" / "best.pt", blt)
    _, record = load_entropy_model(folder / "entropy_model.pth")
    threshold = threshold_for_patch_size(EntropyPatcher(entropy_model.eval()).entropies(MIXED), "global", 3)
    write_json(folder / "checkpoints" / "model.json", {
        "model_config": asdict(config), "patch_config": asdict(PatchConfig("global", threshold)), "precision": "fp32",
        "entropy_model_path": str(folder / "entropy_model.pth"), "entropy_model_sha256": record["sha256"],
    })  # fmt: skip
    return folder


def test_guesses_are_the_models(models):
    model, _ = load_entropy_model(models / "entropy_model.pth")
    text = MIXED * 8  # more than one chunk of 1024
    H, predictions = stream_predictions(model, text, k=4)
    np.testing.assert_array_equal(H[:-1], EntropyPatcher(model).entropies(text))
    ids = torch.tensor([[256, *text]])
    with torch.no_grad():
        p = model(ids)[0, :-1].softmax(-1)
    np.testing.assert_allclose(predictions.of_byte_N, p[torch.arange(len(text)), ids[0, 1:]], atol=1e-4)
    np.testing.assert_allclose(predictions.probabilities_Nk, p.sort(descending=True).values[:, :4], atol=1e-4)
    np.testing.assert_allclose(
        p.gather(1, torch.from_numpy(predictions.ids_Nk)), predictions.probabilities_Nk, atol=1e-4
    )
    assert predictions.bits_per_byte == pytest.approx(
        -p[torch.arange(len(text)), ids[0, 1:]].log2().mean().item(), abs=1e-3
    )


@pytest.mark.parametrize("context_bytes", [2048, 64])
def test_blt_guesses_are_those_of_evaluation(models, context_bytes):
    blt, patcher, _ = load_blt(models / "checkpoints")
    document = np.frombuffer(MIXED, np.uint8)
    starts = patcher.starts(document)
    predictions = blt_predictions(blt, starts, document, k=4, context_bytes=context_bytes)
    assert predictions.ids_Nk.shape == predictions.probabilities_Nk.shape == (len(MIXED), 4)
    nats = torch.cat([
        target_losses(blt, batch)[0][batch.is_scored & (batch.ids[:, 1:] != 256)]
        for batch in evaluation_batches([document], [starts], min(context_bytes, len(document) + 1))
    ]).detach()  # fmt: skip
    np.testing.assert_allclose(-np.log(predictions.of_byte_N), nats, atol=1e-3)
    right = predictions.ids_Nk[:, 0] == document
    np.testing.assert_allclose(predictions.probabilities_Nk[right, 0], predictions.of_byte_N[right])
    assert (np.diff(predictions.probabilities_Nk) <= 0).all()


def test_show_patches_with_a_blt(models, tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(MIXED)
    main(
        ShowPatchesConfig(
            file=str(tmp_path / "text.txt"),
            model=str(models / "checkpoints"),
            output=str(tmp_path / "out"),
            top_k=2,
            device="cpu",
        )
    )
    data = data_of((tmp_path / "out" / "patches.html").read_text(encoding="utf-8"))
    _, patcher, _ = load_blt(models / "checkpoints")
    assert (
        data["title"] == "text.txt"
        and data["rule"] == patcher.config.rule
        and [g["name"] for g in data["predictions"]] == ["entropy model", "BLT"]
    )
    np.testing.assert_array_equal(unpack(data["entropies"], "<f4"), patcher.entropies(MIXED))
    assert (tmp_path / "out" / "patches.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert (
        f"{len(MIXED)} bytes, {patcher.starts(MIXED)[:-1].sum()} patches" in out
        and "BLT, bits a byte" in out
        and "MB)" in out
    )


def test_show_patches_as_a_command(models, tmp_path):
    flags = [
        "--entropy_model_path",
        models / "entropy_model.pth",
        "--method",
        "monotonic",
        "--target_patch_size",
        "3",
        "--max_patch_size",
        "6",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, ROOT / "show_patches.py", *flags],
        cwd=tmp_path,
        input=MIXED,
        capture_output=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rule = data_of((tmp_path / "pictures" / "patches.html").read_text(encoding="utf-8"))["rule"]
    H = EntropyPatcher(load_entropy_model(models / "entropy_model.pth")[0]).entropies(MIXED)
    assert (rule["method"], rule["max_patch_size"]) == ("monotonic", 6) and abs(
        len(MIXED) / patch_starts(H, **rule).sum() - 3
    ) < 0.3


def test_no_text_and_empty_text(tmp_path, monkeypatch):
    (tmp_path / "empty").touch()
    for config in (ShowPatchesConfig(file=str(tmp_path / "empty")), ShowPatchesConfig(text="")):
        with pytest.raises(ValueError, match="is empty: nothing to show"):
            read_text(config)
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    with pytest.raises(ValueError, match="no text; give --text"):
        read_text(ShowPatchesConfig())


@pytest.mark.parametrize("flags, message", [
    (dict(text="a", file="b"), "either text or file"),
    (dict(target_patch_size=4, entropy_threshold=1.0), "either target_patch_size or entropy_threshold"),
    (dict(model="checkpoints", method="space", max_patch_size=3), "leave out method and max_patch_size: a BLT reads"),
    (dict(method="static", entropy_threshold=0.5), "1 or more bytes"),
    (dict(picture_bytes=5000), "picture_bytes is 5000; it must be at most 4000"),
    (dict(top_k=0), "top_k is 0"),
])  # fmt: skip
def test_settings_that_do_not_fit(flags, message):
    with pytest.raises(ValueError, match=message):
        ShowPatchesConfig(**flags)
