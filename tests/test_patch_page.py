"""Tests of the interactive page (pictures.write_patch_page, patch_page.html) and of show_patches.py.

What the file holds is tested without a browser. The page's own rules are tested in node, and the page itself in
headless Chromium, where there are any.
"""

import base64
import json
import math
import re
import shutil
import subprocess
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from helpers import output_of, run_command, tiny_blt, tiny_entropy_model, write_blt

from blt import pictures
from blt.entropies import TopPredictions, stream_predictions
from blt.metric import target_losses
from blt.patch_rules import RULES, PatchConfig, patch_sizes, patch_starts, threshold_for_patch_size
from blt.rows import evaluation_batches
from entropy_patcher import EntropyPatcher
from save_entropy_model import load_blt, load_entropy_model
from show_patches import ShowPatchesConfig, blt_predictions, read_text

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
NODE = shutil.which("node")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
needs_node = pytest.mark.skipif(NODE is None, reason="no node on PATH")

RULE = PatchConfig("global", 1.5).arguments()
# Characters of every kind, then bytes that are not UTF-8, then characters that are not seen.
MIXED = (
    "Tab\there\n\nEmoji 🙂👩‍👧 e\u0301 né 中文 שלום العربية "
    "<script>window.injected = 1</script> &amp; </b> <!-- \"'`${1}\n"
).encode()
MIXED += b"bad \xff\xfe \xc3 \xe6\x97 \xed\xa0\x80 \xf4\x90\x80\x80 \xc0\xaf \x00\x1b[31m\x7f\r\n"
MIXED += "\u00a0\u200b\ufeff\u2028\u202e\ue000".encode()


def numbers(n, seed=0, k=3):
    """Random entropies and predictions of n positions."""
    rng = np.random.default_rng(seed)
    H = rng.exponential(1.0, n).astype(np.float32)
    probabilities = -np.sort(-rng.dirichlet(np.ones(k + 2), n)[:, :k]).astype(np.float32)
    ids = rng.integers(0, 257, (n, k))
    of_byte = rng.random(n).astype(np.float32)
    return H, TopPredictions(ids, probabilities, of_byte)


def write_page(path, text=MIXED, rule=RULE, title="title", **more):
    H, predictions = numbers(len(text))
    figures = [("bits", "1.234")]
    pictures.write_patch_page(path, text, H, rule, {"entropy model": predictions}, title, "subtitle", figures, **more)
    return path.read_text(encoding="utf-8")


def data_of(page):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(found[1])


def unpack(packed, dtype):
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype)


# The file, without a browser


def test_page_holds_text_entropies_and_predictions(tmp_path):
    token_starts = np.arange(len(MIXED)) % 3 == 0
    data = data_of(write_page(tmp_path / "new" / "page.html", token_starts=token_starts))
    H, predictions = numbers(len(MIXED))
    assert unpack(data["bytes"], np.uint8).tobytes() == MIXED
    assert data["rule"] == RULE and data["figures"] == [["bits", "1.234"]]
    assert data["methods"] == [[rule.name, rule.unit] for rule in RULES.values()]
    np.testing.assert_array_equal(unpack(data["entropies"], "<f4"), H)
    (made,) = data["predictions"]
    assert (made["name"], made["k"]) == ("entropy model", 3)
    # The end of a document, 256, is among them.
    np.testing.assert_array_equal(unpack(made["ids"], "<u2").reshape(3, -1).T, predictions.ids_Nk)
    probabilities = predictions.probabilities_Nk.T.reshape(-1)
    np.testing.assert_allclose((unpack(made["probabilities"], np.uint8) / 255) ** 2, probabilities, atol=0.004)
    np.testing.assert_allclose((unpack(made["of_byte"], np.uint8) / 255) ** 2, predictions.of_byte_N, atol=0.004)
    assert unpack(data["token_starts"], np.uint8).tolist() == token_starts.astype(int).tolist()
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["page.html"]


def test_nothing_in_text_or_titles_becomes_markup(tmp_path):
    template = pictures.PAGE.read_text(encoding="utf-8")
    page = write_page(
        tmp_path / "page.html",
        b"</script><script>alert(1)</script><!-- <script>",
        title="</script><script>alert(2)</script><!--",
    )
    for tag in ("<script", "</script", "<!--"):
        assert page.count(tag) == template.count(tag)
    assert data_of(page)["title"] == "</script><script>alert(2)</script><!--"


def test_page_needs_no_network(tmp_path):
    page = write_page(tmp_path / "page.html")
    assert "content=\"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'\"" in page
    # This is a name, not an address.
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\bsrc=|\bhref=|@import|url\(|@font-face|\bfetch\(|XMLHttp|WebSocket", page)


def test_100_kb_with_two_models_stay_near_3_mb(tmp_path):
    """Noise is the worst case: a real text with two models and five predictions takes 2.9 MB."""
    rng = np.random.default_rng(0)
    text = bytes(rng.choice(np.frombuffer(b"etaoin shrdlu", np.uint8), 100_000))
    H, predictions = numbers(len(text), k=5)
    letters = np.frombuffer(b"etaoin shrdlucmfwypvbgk,.", np.uint8)
    predictions.ids_Nk = rng.choice(letters, (len(text), 5)).astype(np.int64)
    both = {"entropy model": predictions, "BLT": predictions}
    path = pictures.write_patch_page(tmp_path / "page.html", text, H, RULE, both)
    assert path.stat().st_size < 3.3e6


def test_whole_characters_by_hand():
    # Characters end at 1, 3, 6 and 10.
    text = "aé日🙂".encode()
    lengths = [len(pictures.whole_characters(text, limit)) for limit in range(1, 12)]
    assert lengths == [1, 1, 3, 3, 3, 6, 6, 6, 6, 10, 10]
    # Here is no character to keep whole.
    assert pictures.whole_characters(b"\x80" * 9, 7) == b"\x80" * 7


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(text_bytes=b""), "text_bytes is empty"),
        (dict(entropies_nats=np.zeros(5)), r"9 bytes but entropies_nats has shape \(5,\)"),
        (dict(entropies_nats=np.full(9, np.inf)), r"entropies_nats\[0\] is not a finite number"),
        (dict(predictions={"BLT": numbers(8)[1]}), "9 bytes but ids_Nk of 'BLT' has 8 positions"),
        (dict(rule=RULE | {"method": "bpe"}), "'bpe' needs token_starts"),
        (dict(rule=RULE | {"method": "mine"}), "no function for the method 'mine'"),
        (dict(text_bytes=bytes(400_001), entropies_nats=np.zeros(400_001)), "400,001 bytes; a page shows at most"),
    ],
)
def test_mistakes_are_named(tmp_path, change, message):
    good = dict(text_bytes=b"123456789", entropies_nats=np.zeros(9), rule=RULE)
    with pytest.raises(ValueError, match=message):
        pictures.write_patch_page(tmp_path / "a.html", **(good | change))
    assert not list(tmp_path.iterdir())


def luminance(colour):
    """WCAG's relative luminance of a colour in hex, #abc or #aabbcc."""
    colour = "".join(c + c for c in colour) if len(colour) == 3 else colour
    channels = np.array([int(colour[k : k + 2], 16) / 255 for k in (0, 2, 4)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_text_is_readable_in_both_colour_schemes():
    """Contrast of at least 7 (WCAG AAA) of text, and of 3 of the curve, on every background, light and dark."""
    page = pictures.PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r":root\{([^}]*)\}", page)
    assert len(blocks) == 2 and "prefers-color-scheme:dark" in page
    assert re.findall(r"--c\d:(#\w+)", blocks[0]) == list(pictures.PATCH_COLOURS)  # the figure's
    for block in blocks:
        colours = {name: luminance(value) for name, value in re.findall(r"--(\w+):#([0-9a-f]+)", block)}

        def contrast(a, b):
            lighter = max(colours[a], colours[b])
            darker = min(colours[a], colours[b])
            return (lighter + 0.05) / (darker + 0.05)

        assert len({colours[f"c{k}"] for k in range(4)}) == 4
        for background in ("page", "c0", "c1", "c2", "c3"):
            assert contrast("ink", background) >= 7, (background, block)
            assert min(contrast("curve", background), contrast("high", background)) >= 3, (background, block)
        assert contrast("dim", "page") >= 4.5


# The page's rules against patch_starts


def rule_case(number, rng):
    """A text, entropies and a rule: what the page takes, and the patch starts that it must find.

    The numbers run through all methods and options. Thresholds are random, or equal to an entropy of the text, or
    between two float32 numbers.
    """
    n = int(rng.integers(1, 150)) if number % 6 else 1
    alphabet = np.frombuffer(b"ab1 .,\n\xc0\xc3\xa9\xe0\xe6\x97\xa5\xed\xf4\x8f\xaf\xff", np.uint8)
    text = bytes(rng.choice(alphabet, n)) if number % 2 else rng.bytes(n)
    kept_as = np.float16 if number % 3 == 0 else np.float32
    H = rng.exponential(1.0, n).astype(kept_as).astype(np.float32)
    method = list(RULES)[number % len(RULES)]

    of_text = float(H[rng.integers(n)])
    thresholds = [float(rng.exponential()), of_text, of_text + 1e-9, np.nextafter(of_text, -1), 0.0, -0.5]
    threshold = thresholds[number % 5 if number % 11 else 5]
    if method == "cumulative":
        total = np.concatenate(([0.0], np.cumsum(H, dtype=np.float64)))
        of_some_bytes = float(total[(n + 1) // 2] - total[n // 3])
        threshold = [4 * threshold, of_some_bytes, threshold][number % 3]
    if method in ("monotonic", "both") and n > 1 and number % 2:
        t = int(rng.integers(1, n))
        # A rise is rounded to float32.
        threshold = float(H[t] - H[t - 1])
    if method == "static":
        threshold = float(rng.choice([1, 2, 4.5, 1.1, 3.3, 7, 1 + 1e-12, rng.uniform(1, 9)]))
    least = int(rng.choice([1, 1, 2, 5]))
    most = [None, least, least + 3][number % 3]
    rule = PatchConfig(method, float(threshold), float(rng.normal()), least, most).arguments()
    tokens = rng.random(n) < 0.3
    starts = patch_starts(H, **rule, byte_values=np.frombuffer(text, np.uint8), token_starts=tokens)
    return dict(text=list(text), H=H.tolist(), rule=rule, tokens=tokens.astype(int).tolist()), starts


def rule_cases():
    rng = np.random.default_rng(1)
    return [rule_case(number, rng) for number in range(60 * len(RULES))]


RUN_CASES = """
const results = CASES.map(c => {
  const bytes = Uint8Array.from(c.text), characters = [];
  for (let t = 0; t < bytes.length;) {
    const [size, code] = characterAt(bytes, t);
    characters.push([t, t + size, code]);
    t += size;
  }
  const starts = patchStarts(Float32Array.from(c.H), bytes, c.rule, Uint8Array.from(c.tokens));
  return [Array.from(starts), characters];
});
"""


def check_cases(results, cases):
    patches = dict.fromkeys(RULES, 0)
    for (starts, characters), (case, expected) in zip(results, cases, strict=True):
        assert starts == expected.astype(int).tolist(), case
        pieces = pictures.utf8_characters(bytes(case["text"]))
        assert characters == [[first, stop, -1 if char is None else ord(char)] for first, stop, char in pieces], case
        patches[case["rule"]["method"]] += int(expected.sum())
    # The cases do split.
    assert min(patches.values()) > 100


@needs_node
def test_rules_in_node_split_as_patch_starts():
    cases = rule_cases()
    page = pictures.PAGE.read_text(encoding="utf-8")
    rules = re.search(r'<script id="rules">(.*?)</script>', page, re.S)[1]
    inputs = json.dumps([case for case, _ in cases])
    code = f"{rules} const CASES = {inputs}; {RUN_CASES} console.log(JSON.stringify(results));"
    done = subprocess.run([NODE, "-"], input=code, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    check_cases(json.loads(done.stdout), cases)


# The page itself


def browse(tmp_path, page, script, size="1200,800"):
    """Open a page in headless Chromium, run a script when it is drawn, and return what the script puts into `out`.

    --dump-dom waits for the load event only. So an image that a server of ours holds back keeps the page loading
    until the script is done.
    """
    done = threading.Event()

    class Hold(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/done":
                done.set()
            else:
                done.wait(60)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hold)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    script = f"""<img src={address}/hold hidden><script>(async () => {{
      const out = {{}};
      try {{
        while (!document.documentElement.dataset.firstMs) await new Promise(r => setTimeout(r, 20));
        {script}
      }} catch (error) {{ out.error = String(error.stack); }}
      const pre = document.createElement("pre");
      pre.id = "out";
      pre.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(out))));
      document.body.append(pre);
      new Image().src = "{address}/done";
    }})();</script>"""
    page = page.replace("default-src 'none'", f"default-src 'none'; img-src {address}")
    path = tmp_path / "browsed.html"
    path.write_text(page.replace("</body>", script + "</body>"), encoding="utf-8")
    flags = [
        *"--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --dump-dom".split(),
        *"--disable-background-networking --disable-component-update".split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={size}",
    ]
    command = [BROWSER, *flags, path.as_uri()]
    try:
        browser = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=100)
    finally:
        done.set()
        server.shutdown()
    found = re.search(r'<pre id="out">([\w+/=]*)</pre>', browser.stdout)
    assert found, browser.stdout[-1000:] + browser.stderr[-2000:]
    out = json.loads(base64.b64decode(found[1]))
    assert "error" not in out, out["error"]
    return out


EXPLORE = """
  out.cases = results;
  const cut = () => {
    const patches = $("totals").querySelector("dd").textContent;
    return { starts: Array.from(starts), rule: { ...rule }, patches };
  };
  const frame = () => new Promise(r => requestAnimationFrame(r));
  const fire = async (id, name, value) => {
    if (value !== undefined) $(id).value = value;
    $(id).dispatchEvent(new Event(name));
    await frame();
    await frame();
  };
  const texts = elements => Array.from(elements, e => e.textContent);
  const rows = () => document.querySelectorAll(".row");

  // What is drawn.
  out.title = [document.title, $("title").textContent, $("title").children.length];
  out.totals = Object.fromEntries(Array.from($("totals").children, e => texts(e.children)));
  out.scripts = document.scripts.length;
  out.injected = window.injected;
  out.rows = rowFirst.slice();
  out.chars = texts(document.querySelectorAll(".row i"));
  const band = b => [parseFloat(b.style.left), parseFloat(b.style.width), b.className];
  out.bands = Array.from(rows(), row => [row.style.top, Array.from(row.querySelectorAll("b"), band)]);
  out.gutter = gutter;
  out.first = cut();

  // A byte under the pointer.
  const box = $("rows").getBoundingClientRect(), at = 13;
  const clientX = box.left + gutter + (at - rowFirst[rowOf(at)]) * CELL + 3;
  const clientY = box.top + rowOf(at) * ROW + 20;
  $("rows").dispatchEvent(new PointerEvent("pointermove", { clientX, clientY, bubbles: true }));
  const lines = Array.from($("detail").querySelectorAll(".prediction"), line => texts(line.children));
  out.hover = [hovered, $("detail").textContent, lines];
  $("rows").dispatchEvent(new PointerEvent("pointerleave"));

  // The controls.
  await fire("slider", "input", 0.7);
  out.slid = cut();
  await fire("threshold", "change", "0.123456");
  out.typed = cut();
  await fire("threshold", "change", "1.5");
  out.methods = {};
  for (const method of METHODS) {
    await fire("method", "change", method);
    out.methods[method] = cut();
  }
  await fire("least", "change", 3);
  await fire("most", "change", 4);
  out.sizes = cut();
  await fire("most", "change", "");
  await fire("method", "change", "both");
  await fire("rise-slider", "input", 0.4);
  out.rise = cut();
  out.offered = texts($("method").options);

  // The keyboard.
  pin(N - 1);
  out.end = $("detail").textContent;
  const key = name => $("scroll").dispatchEvent(new KeyboardEvent("keydown", { key: name, cancelable: true }));
  key("Home");
  key("ArrowRight");
  key("ArrowRight");
  key("ArrowLeft");
  out.pinned = pinned;
  out.requests = performance.getEntriesByType("resource").length;
"""


@pytest.fixture(scope="module")
def explored(tmp_path_factory):
    """What EXPLORE finds in a page that shows MIXED: (the page's text, its cases, what the script returned)."""
    folder = tmp_path_factory.mktemp("explored")
    cases = rule_cases()
    page = write_page(folder / "page.html", title="<b>Mixed</b>")
    # The last one is the rule that the page opens with.
    methods = [rule.name for rule in RULES.values() if rule.is_causal and rule.name != "global"] + ["global"]
    inputs = f"const METHODS = {methods}, CASES = {json.dumps([case for case, _ in cases])};"
    return page, cases, browse(folder, page, inputs.replace("<", "\\u003c") + RUN_CASES + EXPLORE)


def check_split(cut, **expected):
    """Patch starts bool [N] of MIXED, which a state of the page must have, with these parts of a rule."""
    rule = cut["rule"]
    assert {name: rule[name] for name in expected} == expected
    starts = patch_starts(numbers(len(MIXED))[0], **rule, byte_values=np.frombuffer(MIXED, np.uint8))
    assert cut["starts"] == starts.astype(int).tolist() and cut["patches"] == f"{starts.sum():,}"
    return starts


@needs_browser
def test_page_splits_as_patch_starts(explored):
    _, cases, out = explored
    check_cases(out["cases"], cases)


@needs_browser
def test_page_shows_text_and_patches(explored):
    page, _, out = explored
    starts = check_split(out["first"], **RULE)
    assert out["title"] == ["<b>Mixed</b>", "<b>Mixed</b>", 0]
    assert out["scripts"] == page.count("<script") + 1 and "injected" not in out
    sizes = patch_sizes(starts)
    characters = pictures.utf8_characters(MIXED)
    split_inside = {first for first, stop, _ in characters if starts[first + 1 : stop].any()}
    assert split_inside
    values = [*map(str, (len(sizes), f"{sizes.mean():.2f}", sizes.max(), len(MIXED), len(split_inside))), "1.234"]
    assert list(out["totals"].values()) == values

    # Bands tile each row, and begin a patch where there is a start.
    patch = np.cumsum(starts) - 1
    in_order = sorted(out["bands"], key=lambda row: float(row[0].removesuffix("px")))
    assert len(in_order) == len(out["rows"]) - 1
    for (_, bands), first, end in zip(in_order, out["rows"], out["rows"][1:]):
        at = first
        for left, width, name in bands:
            assert left == out["gutter"] + 10 * (at - first)
            assert name == f"p{patch[at] % 4}" + (" start" if starts[at] else "")
            at += round(width / 10)
        assert at == end
    # Rows end between characters.
    inside = {t for first, stop, _ in characters for t in range(first + 1, stop)}
    assert out["rows"][-1] == len(MIXED) and not set(out["rows"]) & inside

    shown = "".join(out["chars"])
    assert shown.startswith("Tab→here⏎⏎")
    for part in ("🙂", "200D", "◌\u0301", "中文", "<script>", "&amp;", "ff", "fe"):
        assert part in shown
    assert "001b[31m7f0d⏎" in shown and "␣200BFEFF2028202EE000" in shown


@needs_browser
def test_page_shows_the_numbers_of_a_byte(explored):
    """The pointer is at byte 13, in "Emoji 🙂": its numbers, and the predictions with the byte that came marked."""
    out = explored[2]
    H, predictions = numbers(len(MIXED))
    patch = np.cumsum(check_split(out["first"])) - 1
    t, text, lines = out["hover"]
    assert t == 13 and f"byte {t}: " in text and f"0x{MIXED[t]:02X} = {MIXED[t]}" in text
    assert f"entropy {H[t]:.3f} nats ({H[t] / math.log(2):.3f} bits)" in text and f"in patch {patch[t]}: " in text
    is_predicted = MIXED[t] in predictions.ids_Nk[t]
    assert len(lines) == (3 if is_predicted else 4)
    assert sum("←" in name for name, _, _ in lines) == 1
    for (_, _, share), p in zip(lines, predictions.probabilities_Nk[t]):
        assert float(share.strip("<%")) == pytest.approx(100 * p, abs=1.0)
    assert f"byte {len(MIXED) - 1}: " in out["end"] and "U+E000" in out["end"] and out["pinned"] == 1


@needs_browser
def test_controls_of_the_page_split_again(explored):
    out = explored[2]
    patches = check_split(out["first"]).sum()
    check_split(out["slid"], threshold=0.7)
    check_split(out["typed"], threshold=0.123456)
    for method, cut in out["methods"].items():
        starts = check_split(cut, method=method)
        if method in ("monotonic", "cumulative"):
            # Another method begins with the threshold that gives as many patches.
            assert abs(starts.sum() - patches) <= 0.1 * patches
    assert out["methods"]["global"]["rule"] == RULE
    # bpe needs tokens, which this page does not have.
    assert out["offered"] == [name for name in RULES if name != "bpe"]
    starts = check_split(out["sizes"], min_patch_size=3, max_patch_size=4)
    assert set(patch_sizes(starts)[:-1]) == {3, 4}
    check_split(out["rise"], method="both", monotonic_threshold=0.4, min_patch_size=3, max_patch_size=None)
    assert out["requests"] == 0


@needs_browser
def test_long_text_on_a_phone_draws_only_what_is_in_view(tmp_path):
    text = (b"The quick brown fox jumps over the lazy dog, again and again.\n" * 1700)[:100_000]
    script = """
      const shown = () => {
        const rows = Array.from(document.querySelectorAll(".row"));
        return [rows.length, Math.min(...rows.map(row => parseInt(row.style.top)))];
      };
      out.nodes = document.querySelectorAll("*").length;
      out.rows = rowFirst.length - 1;
      out.top = shown();
      $("scroll").scrollTop = 1e9;
      draw();
      out.bottom = shown();
      out.last = rowFirst[rowFirst.length - 1];
      out.wide = document.documentElement.scrollWidth <= innerWidth;
      out.box = $("scroll").clientHeight;
      out.columns = columns;
      out.starts = Array.from(starts).reduce((a, b) => a + b);
    """
    out = browse(tmp_path, write_page(tmp_path / "page.html", text), script, size="500,800")
    assert out["rows"] > 1700 and 0 < out["top"][0] < 20 and 0 < out["bottom"][0] < 20 and out["nodes"] < 2000
    assert out["top"][1] == 0 and out["bottom"][1] > 72 * (out["rows"] - 20) and out["last"] == 100_000
    assert out["wide"] and out["box"] >= 180 and 20 <= out["columns"] <= 50
    assert out["starts"] == int((numbers(100_000)[0] > np.float32(1.5))[1:].sum()) + 1


# Models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with an untrained entropy model and an untrained BLT, as entropy_llm.py and llm.py leave them."""
    folder = tmp_path_factory.mktemp("models")
    entropy_model = tiny_entropy_model(n_layers=2)
    blt = tiny_blt()
    # Wider heads give entropies that differ.
    torch.nn.init.normal_(entropy_model.head.weight, std=0.5)
    torch.nn.init.normal_(blt.head.weight, std=0.5)
    threshold = threshold_for_patch_size(EntropyPatcher(entropy_model).entropies(MIXED), "global", 3)
    write_blt(folder / "checkpoints", blt, PatchConfig("global", threshold), entropy_model, row_bytes=64)
    return folder


def test_predictions_are_the_models(models):
    model, _ = load_entropy_model(models / "entropy_model.pth")
    # More than one chunk of 1024.
    text = MIXED * 8
    H, predictions = stream_predictions(model, text, k=4)
    np.testing.assert_array_equal(H[:-1], EntropyPatcher(model).entropies(text))
    ids = torch.tensor([[256, *text]])
    with torch.no_grad():
        p = model(ids)[0, :-1].softmax(-1)
    of_byte = p[torch.arange(len(text)), ids[0, 1:]]
    of_predicted = p.gather(1, torch.from_numpy(predictions.ids_Nk))
    np.testing.assert_allclose(predictions.of_byte_N, of_byte, atol=1e-4)
    np.testing.assert_allclose(predictions.probabilities_Nk, of_predicted, atol=1e-4)
    np.testing.assert_allclose(predictions.probabilities_Nk, p.sort(descending=True).values[:, :4], atol=1e-4)
    assert predictions.bits_per_byte == pytest.approx(-of_byte.log2().mean().item(), abs=1e-3)


@pytest.mark.parametrize("context_bytes", [2048, 64])
def test_blt_predictions_are_those_of_evaluation(models, context_bytes):
    blt, patcher, _ = load_blt(models / "checkpoints")
    document = np.frombuffer(MIXED, np.uint8)
    starts = patcher.starts(document)
    predictions = blt_predictions(blt, starts, document, k=4, context_bytes=context_bytes)
    assert predictions.ids_Nk.shape == predictions.probabilities_Nk.shape == (len(MIXED), 4)
    nats = []
    for batch in evaluation_batches([document], [starts], min(context_bytes, len(document) + 1)):
        is_byte = batch.is_scored & (batch.ids[:, 1:] != 256)
        nats.append(target_losses(blt, batch)[0][is_byte].detach())
    np.testing.assert_allclose(-np.log(predictions.of_byte_N), torch.cat(nats), atol=1e-3)
    right = predictions.ids_Nk[:, 0] == document
    np.testing.assert_allclose(predictions.probabilities_Nk[right, 0], predictions.of_byte_N[right])
    assert (np.diff(predictions.probabilities_Nk) <= 0).all()


def test_show_patches_with_a_blt(models, tmp_path):
    (tmp_path / "text.txt").write_bytes(MIXED)
    flags = [
        "--file",
        "text.txt",
        "--model",
        models / "checkpoints",
        "--output",
        "out",
        "--top_k",
        2,
        "--device",
        "cpu",
    ]
    printed = output_of(tmp_path, "show_patches", *flags)
    data = data_of((tmp_path / "out" / "patches.html").read_text(encoding="utf-8"))
    _, patcher, _ = load_blt(models / "checkpoints")
    assert data["title"] == "text.txt" and data["rule"] == patcher.config.arguments()
    assert [made["name"] for made in data["predictions"]] == ["entropy model", "BLT"]
    np.testing.assert_array_equal(unpack(data["entropies"], "<f4"), patcher.entropies(MIXED))
    assert (tmp_path / "out" / "patches.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{len(MIXED)} bytes, {patcher.starts(MIXED)[:-1].sum()} patches" in printed
    assert "BLT, bits a byte" in printed and "MB)" in printed


def test_show_patches_as_a_command(models, tmp_path):
    flags = "--method monotonic --target_patch_size 3 --max_patch_size 6 --device cpu --precision fp32".split()
    flags += ["--entropy_model_path", models / "entropy_model.pth"]
    run_command(tmp_path, "show_patches", *flags, stdin=MIXED)
    rule = data_of((tmp_path / "pictures" / "patches.html").read_text(encoding="utf-8"))["rule"]
    assert (rule["method"], rule["max_patch_size"]) == ("monotonic", 6)
    H = EntropyPatcher(load_entropy_model(models / "entropy_model.pth")[0]).entropies(MIXED)
    assert len(MIXED) / patch_starts(H, **rule).sum() == pytest.approx(3, abs=0.3)


def test_no_text_and_empty_text(tmp_path, monkeypatch):
    (tmp_path / "empty").touch()
    for config in (ShowPatchesConfig(file=str(tmp_path / "empty")), ShowPatchesConfig(text="")):
        with pytest.raises(ValueError, match="is empty: nothing to show"):
            read_text(config)
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    with pytest.raises(ValueError, match="no text; give --text"):
        read_text(ShowPatchesConfig())


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(text="a", file="b"), "either text or file"),
        (dict(target_patch_size=4, entropy_threshold=1.0), "either target_patch_size or entropy_threshold"),
        (dict(model="checkpoints", method="space", max_patch_size=3), "leave out method and max_patch_size: a BLT"),
        (dict(method="static", entropy_threshold=0.5), "1 or more bytes"),
        (dict(picture_bytes=5000), "picture_bytes is 5000; it must be at most 4000"),
        (dict(top_k=0), "top_k is 0"),
    ],
)
def test_settings_that_do_not_fit(flags, message):
    with pytest.raises(ValueError, match=message):
        ShowPatchesConfig(**flags)
