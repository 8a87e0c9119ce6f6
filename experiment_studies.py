"""The runs of the studies of experiments.py, but for the study leak, and what their tables say beside the numbers.

A function such as `baselines(bench)` returns the `Run`s of one seed; one such as `summarize_baselines(groups)` the
Markdown below the table. experiments.py has the list of all studies, each with its question.
"""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

from blt.checks import check_packages
from blt.flops import TRAINING
from blt.patch_rules import DEFAULT_PATCH_SIZE
from blt.studies import (
    Made,
    Measured,
    Run,
    Step,
    curve_difference_cell,
    difference_cell,
    markdown_table,
    paired_difference,
)
from experiment_steps import (
    forward_flops,
    read_domain,
    read_noises,
    read_part,
    read_training,
    scaled,
    update_bytes,
)
from template_llm import TemplateConfig

WORDS = {"blt": "BLT", "space": "BLT, space patches", "flat": "flat byte transformer", "bpe": "BPE transformer"}
# Training text as multiples of the smallest budget.
MULTIPLES = (1, 4, 10)


def baselines(bench):
    """Each model at three budgets: a curve of bits per byte against text, FLOPs and seconds."""
    runs = []
    for multiple in MULTIPLES:
        # More text deserves a better entropy model.
        steps = round(bench.budget.entropy_steps * multiple**0.5)
        entropy = bench.entropy(multiple, steps=steps)
        for tables in (True, False):
            ngrams = {} if tables else {"ngram_sizes": []}
            models = {
                "blt": bench.blt(multiple, entropy=entropy, **ngrams),
                "space": bench.blt(multiple, patch_method="space", **ngrams),
                "flat": bench.template("flat", tables, multiple),
                "bpe": bench.template("bpe", tables, multiple),
            }
            for model, steps_of_run in models.items():
                labels = {"model": WORDS[model], "tables": "yes" if tables else "no", "budget": multiple}
                name = f"{model}{'+tables' if tables else ''} {multiple}x"
                runs.append(Run(name, labels, steps_of_run, read_training))
        if bench.is_first:
            settings = {"dataset": bench.dataset, "max_bytes": bench.text(multiple), "val_bytes": val_bytes(bench)}
            labels = {"model": "PPMd", "tables": "-", "budget": multiple}
            runs.append(Run(f"ppmd {multiple}x", labels, [bench.part("ppmd", settings, seeded=False)], read_part))
    return runs


def val_bytes(bench):
    return bench.llm_config().val_bytes


# What may be equal, and the metric that says how much of it a run took.
EQUAL = {"bytes": "trained_bytes", "FLOPs": "all_flops", "seconds": "all_seconds"}


def summarize_baselines(groups):
    """The BLTs with tables against the curve of each other model, paired by seed."""
    curves = {}
    for group in groups:
        if group.finished and group.run.labels["model"] != "PPMd":
            curves.setdefault(group.run.name.rsplit(" ", 1)[0], []).append(group)
    lines = [
        "BLT with tables minus each other model, in bits per byte: the mean over seeds, its standard error, and the "
        "number of seeds. Below zero the BLT is better. The other model is read from its curve over the three budgets "
        "where it has read as many bytes, or costs as many FLOPs or seconds as the BLT and its entropy model (training "
        "and one pass over the text) together. Between budgets it is interpolated linearly in the logarithm of the "
        "cost, and extrapolated at most by a factor of 2; - where it does not reach, or where seconds are of another "
        "machine.",
    ]
    for blt in ("blt", "space"):
        rows = []
        for ours in curves.get(f"{blt}+tables", []):
            for name, theirs in curves.items():
                if name != f"{blt}+tables":
                    cells = [curve_difference_cell(ours, theirs, cost) for cost in EQUAL.values()]
                    rows.append([f"{ours.run.labels['budget']}x", name, *cells])
        if rows:
            title = {"blt": "BLT with entropy patches", "space": "BLT with space patches"}[blt]
            lines += ["", f"**{title}** minus"]
            lines += ["", *markdown_table(["budget", "other model", *(f"equal {way}" for way in EQUAL)], rows)]
    return lines


PATCH_SIZES = (3, 5, 7, 10, 12)
THRESHOLDS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)


# The text that a study at equal FLOPs has entropies of, in texts of the multiple 1: small models read five.
TEXTS = 6.0


def both_budgets(bench, name, labels, make, reference_flops):
    """Two runs: with the bytes of the multiple 1, and with the FLOPs of the reference. make(**changes): its steps."""
    first = f"{name} bytes"
    by_flops = scaled(bench, 1, [first], lambda own: min(TEXTS, reference_flops / own["train_flops"]), 1.0)
    return [
        Run(first, labels | {"equal": "bytes"}, make(), read_training),
        Run(f"{name} FLOPs", labels | {"equal": "FLOPs"}, make(**by_flops), read_training),
    ]


def reference_flops(bench):
    """Training FLOPs of the default BLT with the multiple 1."""
    return TRAINING * forward_flops(bench.llm_config(), "blt", DEFAULT_PATCH_SIZE) * bench.text()


def patch_size(bench):
    runs = []
    for method in ("static", "global"):
        for size in PATCH_SIZES:

            def make(method=method, size=size, **changes):
                return bench.blt(cached=TEXTS, patch_method=method, target_patch_size=float(size), **changes)

            labels = {"patches": "entropy" if method == "global" else method, "size": size}
            runs += both_budgets(bench, f"{method} {size}", labels, make, reference_flops(bench))
    return runs


def threshold(bench):
    runs = []
    for level in THRESHOLDS:

        def make(level=level, **changes):
            return bench.blt(cached=TEXTS, entropy_threshold=level, **changes)

        runs += both_budgets(bench, f"threshold {level}", {"threshold (nats)": level}, make, reference_flops(bench))
    return runs


def model_size(bench):
    runs = []
    for size in ("tiny", "small", "medium"):

        def make(size=size, **changes):
            return bench.blt(size=size, cached=TEXTS, **changes)

        config = bench.llm_config(size)
        labels = {"size": size, "latent": f"{config.global_layers} x {config.global_dim}"}
        runs += both_budgets(bench, size, labels, make, reference_flops(bench))
    return runs


def patching(bench):
    space = "space"
    runs = [Run(space, {"patches": space}, bench.blt(patch_method=space), read_training)]
    # Space patches are as long as the text makes them, so the others follow them.
    size = Measured((space,), lambda measured: round(measured["bytes_a_unit"], 3), 4.6)
    for method in ("static", "global", "monotonic", "both", "cumulative"):
        runs.append(
            Run(
                method,
                {"patches": method},
                bench.blt(patch_method=method, target_patch_size=size),
                read_training,
            )
        )
    oracle = bench.part("patched", {"kind": "bpe", "target": size, "llm": training_flags(bench)})
    runs.append(Run("bpe", {"patches": "bpe tokens (an oracle: they look ahead)"}, [oracle], read_part))
    return runs


def training_flags(bench, **changes):
    """Flags of llm.py for a part that trains a BLT itself."""
    return bench.training(1.0, None, changes)


def entropy_model(bench):
    budget = bench.budget
    steps = budget.entropy_steps
    code = bench.part("corpus", {"kind": "python", "max_bytes": 3_000_000}, "documents.jsonl", seeded=False)
    variants = {
        "as it is": {},
        "128 x 1": dict(d_model=128, n_heads=2, n_layers=1),
        "256 x 4": dict(d_model=256, n_heads=4, n_layers=4),
        "window 32": dict(max_seq_len=32),
        "window 512": dict(max_seq_len=512),
        "a quarter of the updates": dict(steps=steps // 4),
        "4 times the updates": dict(steps=steps * 4),
        "a tenth of the text": dict(multiple=0.1),
        "10 times the text and the updates": dict(multiple=10.0, steps=10 * steps),
        "other text (Python code)": dict(dataset=Made(code), max_bytes=2_000_000),
    }
    runs = []
    for name, changes in variants.items():
        entropy = bench.entropy(**changes)
        steps_of_run = bench.blt(entropy=entropy)
        before = [code] if "other text" in name else []
        runs.append(Run(name, {"entropy model": name}, before + steps_of_run, read_after(len(before))))
    second = bench.entropy(seed=bench.seed + 1000)
    for kind, words in (("mean", "mean of two"), ("min", "start where both say so"), ("max", "where either does")):
        models = {"first": Made(bench.entropy()), "second": Made(second)}
        settings = {"kind": kind, "target": DEFAULT_PATCH_SIZE, "llm": training_flags(bench)} | models
        steps_of_run = [bench.entropy(), second, bench.part("patched", settings)]
        runs.append(Run(words, {"entropy model": f"two: {words}"}, steps_of_run, read_part))
    return runs


def read_after(n):
    """`read_training` of a run whose first n steps make a corpus."""
    return lambda folders: read_training(folders[n:])


ABLATIONS = {
    "as it is": {},
    "no n-grams": dict(ngram_sizes=[]),
    "n-grams 3": dict(ngram_sizes=[3]),
    "n-grams 3 to 5": dict(ngram_sizes=[3, 4, 5]),
    "patch n-grams 0 to 2": dict(patch_ngrams=[0, 1, 2]),
    "gates of 2- to 4-grams": dict(gate_ngrams=[2, 3, 4]),
    "4,096 rows": dict(hash_rows=4096),
    "16,384 rows": dict(hash_rows=16384),
    "65,536 rows": dict(hash_rows=65536),
    "262,144 rows": dict(hash_rows=262144),
    "k = 1": dict(cross_attn_k=1),
    "k = 4": dict(cross_attn_k=4),
    "mean pooling": dict(pooling="mean"),
    "encoder of 2 layers": dict(encoder_layers=2),
    "decoder of 2 layers": dict(decoder_layers=2),
    "decoder of 4 layers": dict(decoder_layers=4),
    "window 32": dict(window=32),
    "window 512": dict(window=512),
    "encoder: 2 layers, cross-attention in both": dict(encoder_layers=2, cross_attn_all_layers_encoder=True),
    "decoder: cross-attention in the first only": dict(cross_attn_all_layers_decoder=False),
    "QK norm": dict(qk_norm=True),
    "cosine schedule": dict(schedule="cosine"),
    "no weight decay": dict(weight_decay=0.0),
}


def ablations(bench):
    runs = [Run(name, {"change": name}, bench.blt(**changes), read_training) for name, changes in ABLATIONS.items()]
    # Every matrix and table by AdamW, as in the paper. There is no flag for it, so it is a part.
    for rate in (0.001, 0.003):
        entropy, patches, training = bench.blt(lr=rate, adam_lr=rate)
        adamw = bench.part("adamw", {"llm": {n: v for n, v in training.flags.items() if n not in ("device", "seed")}})
        name = f"AdamW for all, rate {rate}"
        runs.append(Run(name, {"change": name}, [entropy, patches, adamw], read_training))
    return runs


def summarize_ablations(groups):
    """Each change against the model as it is."""
    reference = next((group for group in groups if group.run.name == "as it is"), None)
    if reference is None:
        return []
    rows = [[group.run.name, difference_cell(group, reference)] for group in groups if group is not reference]
    return [
        "Each minus the model as it is (standard error over pairs of equal seed; pairs). Below zero: better.",
        "",
    ] + (markdown_table(["change", "difference in bits per byte"], rows))


def robustness(bench):
    if bench.config.cute_folder is None or not Path(bench.config.cute_folder).is_dir():
        raise ValueError("the study robustness needs --cute_folder, the folder with the .tsv files of CUTE")
    check_packages("wordfreq")
    cute = str(Path(bench.config.cute_folder).resolve())
    runs = []
    models = {model: bench.template(model, True) for model in ("flat", "bpe")}
    for model, steps in {"blt": bench.blt(), **models}.items():
        labels = {"model": WORDS[model]}
        scored = bench.evaluate(steps[-1])
        runs.append(Run(f"{model} noises", labels | {"test": "noises"}, [*steps, scored], read_noises))
        for test, items in (("CUTE", {"kind": "cute", "folder": cute}), ("spelling", {"kind": "words"})):
            tuned = bench.part("fine_tune", {"model": Made(steps[-1]), "items": items, "steps": bench.updates(0.5)})
            runs.append(Run(f"{model} {test}", labels | {"test": test}, [*steps, tuned], read_part))
    return runs


def summarize_robustness(groups):
    """Accuracy by task."""
    lines = []
    for test in ("CUTE", "spelling"):
        of_test = [group for group in groups if group.run.labels["test"] == test and group.finished]
        if not of_test:
            continue
        tasks = sorted({name for group in of_test for o in group.finished for name in o.metrics if "task" in name})
        rows = [
            [t.removeprefix("task "), *(f"{g.mean(t):.3f}" if g.mean(t) is not None else "-" for g in of_test)]
            for t in tasks
        ]
        lines += [f"{test}: share of answers that are right to the last byte, after fine-tuning.", ""]
        lines += [*markdown_table(["task", *(group.run.labels["model"] for group in of_test)], rows), ""]
    return lines


DOMAINS = ("English", "French", "Spanish", "Python code")


def domains(bench):
    folder = bench.config.corpus_folder
    path = None if folder is None else Path(folder) / "wiki_fr_es.jsonl.xz"
    if path is None or not path.exists():
        raise ValueError("the study domains needs --corpus_folder, a folder with wiki_fr_es.jsonl.xz")
    wiki = {"kind": "language", "file": str(path.resolve())}
    corpora = {
        "French": bench.part("corpus", wiki | {"source": "wikipedia-fr"}, "documents.jsonl", seeded=False),
        "Spanish": bench.part("corpus", wiki | {"source": "wikipedia-es"}, "documents.jsonl", seeded=False),
        "Python code": bench.part(
            "corpus", {"kind": "python", "max_bytes": 6_000_000}, "documents.jsonl", seeded=False
        ),
    }
    datasets = {"English": bench.dataset} | {name: Made(step) for name, step in corpora.items()}
    runs = []
    for trained_on in DOMAINS:
        made = [corpora[trained_on]] if trained_on in corpora else []
        shared = bench.shared() | {"dataset": datasets[trained_on]}
        entropy = bench.entropy(dataset=datasets[trained_on])
        # `patches` takes the text of the bench, which is another one here.
        flags = shared | {"entropy_model_path": Made(entropy), "max_bytes": bench.text()}
        patches = Step("create_patches", flags, "patch_cache", "cache_dir")
        flags = bench.blt(entropy=entropy)[-1].flags | {"dataset": datasets[trained_on], "patch_cache": Made(patches)}
        training = Step("llm", flags, checkpoints="output")
        for scored_on in DOMAINS:
            other = [corpora[scored_on]] if scored_on in corpora else []
            scored = bench.evaluate(training, dataset=datasets[scored_on], robustness_bytes=0)
            runs.append(
                Run(
                    f"{trained_on} on {scored_on}",
                    {"trained, calibrated on": trained_on, "scored on": scored_on},
                    [*made, *other, entropy, patches, training, scored],
                    read_domain,
                )
            )
    return runs


TARGETS = (1.9, 1.8, 1.7, 1.6, 1.5)


def speedrun(bench):
    runs = []
    for model in ("blt", "flat"):
        for multiple in (0.5, 1, 2, 4, 10):
            every = max(1, bench.updates(multiple) // 20)
            if model == "blt":
                steps = bench.blt(multiple, cached=10, eval_every=every)
            else:
                steps = bench.template("flat", True, multiple, eval_every=every)
            labels = {"model": WORDS[model] + (" with tables" if model == "flat" else ""), "budget": multiple}
            runs.append(Run(f"{model} {multiple}x", labels, steps, read_speedrun))
    return runs


def read_speedrun(folders):
    """Metrics of a run, and the seconds of training at which it first reached each target."""
    metrics = read_training(folders)
    for target in TARGETS:
        reached = [seconds for _, _, seconds, bpb in metrics["curve"] if bpb <= target]
        if reached:
            metrics[f"seconds_to_{target}"] = reached[0]
            metrics[f"all_seconds_to_{target}"] = reached[0] + metrics.get("entropy_seconds", 0.0)
    return metrics


def summarize_speedrun(groups):
    """The fastest run to each target, by model."""
    rows = []
    for model in dict.fromkeys(group.run.labels["model"] for group in groups):
        cells = []
        for target in TARGETS:
            times = [
                (group.mean(f"all_seconds_to_{target}"), group.mean(f"seconds_to_{target}"), group.run.labels["budget"])
                for group in groups
                # A mean over the seeds that reached it would hide those that did not.
                if group.run.labels["model"] == model
                and group.finished
                and len(group.values(f"seconds_to_{target}")) == len(group.finished)
            ]
            best = min(times, default=None)
            cells.append("-" if best is None else f"{best[1]:.0f} ({best[0]:.0f}; budget {best[2]})")
        rows.append([model, *cells])
    return [
        "Seconds of training to each number of bits per byte, evaluations left out, by the run that is fastest there; "
        "in brackets with the entropy model's training and pass, and the run's budget. Every run has a whole schedule "
        "of its own, so a short run is faster to a high target.",
        "",
        *markdown_table(["model", *(f"{target}" for target in TARGETS)], rows),
    ]


def grown(config, patch):
    """(width, layers) of the latent transformer that costs as much per byte with larger patches as with usual ones."""
    target = forward_flops(config, "blt", DEFAULT_PATCH_SIZE)

    def cost(shape):
        sizes = asdict(config) | dict(zip(("global_dim", "global_layers"), shape))
        return abs(forward_flops(SimpleNamespace(**sizes), "blt", patch) - target)

    shapes = [(64 * n, layers) for n in range(2, 33) for layers in range(1, 33) if 32 <= 64 * n / layers <= 128]
    return min(shapes, key=cost)


def patches_map(bench):
    """One change at a time from one configuration: larger models, longer rows, more text, larger patches."""
    sizes = {"cpu": ("nano", "tiny", "small", "medium"), "gpu": ("small", "medium")}[bench.config.budget]
    small, large = {"cpu": ("nano", "small"), "gpu": ("small", "medium")}[bench.config.budget]
    places = [(size, 2048, 1) for size in sizes] + [(small, 8192, 1), (small, 32768, 1), (large, 8192, 1)]
    places.append((small, 2048, 4))
    # A long row shows more only of a long document.
    long = bench.part(
        "corpus", {"kind": "long", "dataset": bench.dataset, "min_bytes": 16384}, "documents.jsonl", seeded=False
    )
    # Tables give most where they are large, so they have as many rows in every model.
    hash_rows = bench.llm_config(small).hash_rows
    entropy = bench.entropy(dataset=Made(long))
    flags = bench.shared() | {"dataset": Made(long), "entropy_model_path": Made(entropy), "max_bytes": bench.text(4)}
    cache = Step("create_patches", flags, "patch_cache", "cache_dir")
    runs = []
    for size, row, multiple in places:
        config = bench.llm_config(size)
        # All read the same text once: where one row is more than an update, there are fewer updates.
        rows = max(1, update_bytes(config) // row)
        changes = {"row_bytes": row, "batch_rows": rows, "accumulate": 1, "dataset": Made(long)}
        place = {"size": size, "row": row, "budget": multiple}
        name = f"{size} row {row} budget {multiple}"
        patches = ["space", DEFAULT_PATCH_SIZE]
        if size in (small, large) and (row, multiple) == (2048, 1):
            patches += [8, 12]
        for patch in patches:
            latent = (config.global_dim, config.global_layers)
            if patch in (8, 12):
                latent = grown(config, patch)
            method = {"patch_method": "space"} if patch == "space" else {"target_patch_size": patch}
            sizes_of_latent = dict(zip(("global_dim", "global_layers"), latent))
            blt = bench.blt(multiple, size, entropy, hash_rows=hash_rows, **method, **sizes_of_latent, **changes)
            if patch != "space":
                blt = [entropy, cache, Step("llm", blt[-1].flags | {"patch_cache": Made(cache)}, checkpoints="output")]
            labels = {"model": "BLT"} | place | {"patch": patch, "latent": f"{latent[1]} x {latent[0]}"}
            runs.append(Run(f"blt {name} patch {patch}", labels, [long, *blt], read_after(1)))
        labels = {"model": "flat with tables"} | place | {"patch": "-", "latent": "-"}
        changes |= bench.tables("flat", size, hash_rows=hash_rows)
        flat = bench.template("flat", True, multiple, size, **changes)
        runs.append(Run(f"flat {name} bytes", labels | {"equal": "bytes"}, [long, *flat], read_after(1)))
        of = (f"blt {name} patch {DEFAULT_PATCH_SIZE}", f"flat {name} bytes")
        by_flops = scaled(bench, multiple, of, lambda blt, flat: blt["all_flops"] / flat["train_flops"], 1.3)
        flat = bench.template("flat", True, multiple, size, **changes, **by_flops)
        runs.append(Run(f"flat {name} FLOPs", labels | {"equal": "FLOPs"}, [long, *flat], read_after(1)))
    return runs


def pairs_of_map(groups, equal):
    """(BLT, flat byte transformer or None) at each place of the map; for space patches the one with equal bytes."""
    by_name = {group.run.name: group for group in groups}
    for group in groups:
        labels = group.run.labels
        if labels["model"] == "BLT":
            way = "bytes" if labels["patch"] == "space" else equal
            yield group, by_name.get(f"flat {labels['size']} row {labels['row']} budget {labels['budget']} {way}")


def picture_of_map(groups):
    """BLT minus flat with tables at each place of the map, a colour for each kind of patches."""
    curves = {}
    for group, flat in pairs_of_map(groups, "FLOPs"):
        mean, error, _ = (None, None, 0) if flat is None else paired_difference(group, flat)
        if mean is not None:
            labels = group.run.labels
            patch = "space patches" if labels["patch"] == "space" else f"entropy patches of {labels['patch']} bytes"
            place = f"{labels['size']}, rows of {labels['row']} bytes, budget {labels['budget']}"
            curves.setdefault(patch, []).append((place, mean, error or 0.0))
    return curves, None, "BLT minus flat with tables, bits per byte; left of zero patches pay"


def summarize_map(groups):
    """BLT minus flat with tables at each place of the map."""
    rows = []
    for (group, by_bytes), (_, by_flops) in zip(pairs_of_map(groups, "bytes"), pairs_of_map(groups, "FLOPs")):
        if group.finished:
            labels = group.run.labels
            cells = ["-" if flat is None else difference_cell(group, flat) for flat in (by_bytes, by_flops)]
            if labels["patch"] == "space":
                cells[1] = "-"
            rows.append([labels["size"], labels["row"], labels["budget"], labels["patch"], *cells])
    return [
        "BLT minus flat byte transformer with tables, bits per byte; below zero patches pay. In rows of 2 kB equal "
        "bytes are about equal FLOPs without the entropy model, since the latent transformer grows with patches of 8 "
        "and 12 bytes; in longer rows the BLT costs more (the table above has the FLOPs). In the last column the "
        "flat model gets the entropy model's FLOPs too. Space "
        "patches need no entropy model.",
        "",
        *markdown_table(["size", "row bytes", "budget", "bytes a patch", "equal bytes", "equal FLOPs"], rows),
    ]


# Values beside the default, each tried alone. Rates and OWN_CHOICES are multiples of the default; all else
# is the value itself.
CHOICES = {
    "lr": (0.5, 2.0),
    "adam_lr": (0.5, 2.0),
    "table_lr": (0.5, 2.0),
    "table_schedule": (0.25, 1.0),
    "cooldown": (0.4, 1.0),
    "zero_init": (False,),
}
# One more setting of each model's own.
OWN_CHOICES = {
    "space": ("window", (0.5, 2.0)),
    "flat": ("window", (0.6, 1.6)),
    "bpe": ("vocab_size", (0.5, 2.0)),
}
# Two seeds differ by about as much. A smaller gain does not move a setting.
GAIN = 0.005


def sweep(bench):
    """One setting changed at a time, and all changes that help together; as many trials for each model."""
    config = bench.llm_config()
    runs = []
    for model, (own, own_values) in OWN_CHOICES.items():

        def add(name, shown, model=model, **changes):
            if model == "space":
                steps = bench.blt(patch_method="space", **changes)
            else:
                steps = bench.template(model, True, **changes)
            runs.append(Run(f"{model} {name}", {"model": WORDS[model], "change": shown}, steps, read_training))

        presets = [bench.budget.size, bench.budget.machine]
        of_model = config if model == "space" else TemplateConfig(model=model, preset=presets, device="cpu")
        defaults = {name: getattr(of_model, name) for name in (*CHOICES, own)}
        choices = {
            name: [round(defaults[name] * value, 6) if name.endswith("lr") else value for value in values]
            for name, values in CHOICES.items()
        }
        choices[own] = [round(defaults[own] * value) for value in own_values]
        add("defaults", "none")
        for name, values in choices.items():
            for value in values:
                add(f"{name} {value}", f"--{name} {value}", **{name: value})
        together = {name: best_of(model, name, defaults[name], values) for name, values in choices.items()}
        add("together", f"each setting's best, where it gains {GAIN}", **together)
    return runs


def best_of(model, name, default, values):
    """The value of a setting with the fewest bits per byte; the default unless that gains `GAIN`."""

    def of(first, *others):
        best = min(others, key=lambda metrics: metrics["val_bpb"])
        gains = first["val_bpb"] - best["val_bpb"] >= GAIN
        return values[others.index(best)] if gains else default

    trials = (f"{model} defaults", *(f"{model} {name} {value}" for value in values))
    return Measured(trials, of, default)


def summarize_sweep(groups):
    """Each change against the defaults of its model, and what the last trial of each model has taken."""
    by_name = {group.run.name: group for group in groups}
    rows = []
    lines = []
    for group in groups:
        model, name = group.run.name.split(" ", 1)
        reference = by_name[f"{model} defaults"]
        if group is not reference and group.finished:
            rows.append([WORDS[model], group.run.labels["change"], difference_cell(group, reference)])
        if name == "together" and group.finished:
            taken = taken_flags(group, groups)
            lines.append(f"- {WORDS[model]}, together: {taken or 'the defaults, as no change gains enough'}")
    return [
        "Each minus the defaults of its model; below zero: better.",
        "",
        *markdown_table(["model", "change", "difference in bits per byte"], rows),
        "",
        *lines,
        "",
        "Chosen on the text that they are scored on: run winners again with other seeds, and try values beyond.",
    ]


def taken_flags(together, groups):
    """The single changes that are in the last command of a model's trial `together`, as flags."""
    model = together.run.name.split(" ", 1)[0]
    words = together.finished[0].commands[-1]
    singles = [group.run.labels["change"] for group in groups if group.run.name.startswith(f"{model} ")]
    flags = [change.split() for change in singles if change.startswith("--")]
    return " ".join(f"{name} {value}" for name, value in flags if words[words.index(name) + 1] == value)
