"""Write the README's figure and tables of results from the committed result files of the embedded tier.

python tools/update_readme.py            writes docs/accuracy_over_flops.png and the README between its two markers
python tools/update_readme.py --check    exit code 1 when the README's tables are not those of the result files
"""

import json
import sys
from pathlib import Path

import pandas as pd

from leanvit import claims, evaluate, plots

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- results: written by tools/update_readme.py, do not edit -->"
END = "<!-- end of results -->"


def elsewhere() -> list[list[dict]]:
    """Runs of 7_speed on other machines, docs/measured/7_speed.<machine>[.<run>].json, machine by machine."""
    found: dict[str, list[dict]] = {}
    for file in sorted((ROOT / "docs" / "measured").glob("7_speed.*.json")):
        found.setdefault(file.name.split(".")[1], []).append(json.loads(file.read_text(encoding="utf-8")))
    return list(found.values())


def result(name: str) -> dict:
    return json.loads((ROOT / "outputs" / "embedded" / f"{name}.json").read_text(encoding="utf-8"))


def rows(table: list[list[str]]) -> list[str]:
    head, *body = table
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]


def comparison(lbp: dict) -> list[str]:
    """Accuracy, backward FLOPs, step time and saved bytes of each method, both scopes side by side."""
    found = {(row["scope"], row["method"]): row for row in lbp["metrics"]["comparison"]}
    scopes = [s for s in ("last", "full") if any(s == scope for scope, _ in found)]
    titles = {"last": "last third", "full": "all"}
    head = ["method"] + [f"{titles[s]}: {what}" for s in scopes for what in ("accuracy %", "MFLOPs", "step ×", "saved")]
    body = []
    for method in dict.fromkeys(method for _, method in found):
        line = [method]
        for scope in scopes:
            row = found.get((scope, method))
            if row is None:
                line += [""] * 4
                continue
            saved = row["saved_mib_per_image"] / found[scope, "exact"]["saved_mib_per_image"]
            line += [f"{row['accuracy']['mean']:.1f} ± {row['accuracy']['std']:.1f}", f"{row['backward_mflops']:.1f}"]
            faster = found[scope, "exact"]["step_ms"]["median_ms"] / row["step_ms"]["median_ms"]
            line += [f"{faster:.2f}", f"{saved:.2f}"]
        body.append(line)
    return rows([head, *body])


def speed(runs: list[dict], others: list[list[dict]]) -> list[str]:
    """Goal and measurement of every speed and memory claim that was measured; on the right other machines."""
    signs = {"at_least": "≥", "at_most": "≤"}
    goals = {c.id: c for c in claims.load(ROOT / "params" / "7_speed" / "claims.yaml")}
    cpus = [machine[0]["hardware"]["cpu"].replace("(R)", "") for machine in (runs, *others)]
    theirs = [{v["id"]: v["ours"] for v in merged(machine)} for machine in others]
    body = []
    for v in merged(runs):
        if v["ours"] is None:
            continue
        other = [values.get(v["id"]) for values in theirs]
        line = [v["claim"], f"{signs.get(goals[v['id']].compare, '')} {v['value']:g}", f"{v['ours']:.3f}", v["verdict"]]
        body.append(line + ["" if o is None else f"{o:.3f}" for o in other])
    return rows([["what (ratios, two cores, fp32)", "goal", cpus[0], "verdict", *cpus[1:]], *body])


def merged(runs: list[dict]) -> list[dict]:
    """One verdict a claim from several runs of a notebook: of the run that measured it."""
    found = {}
    for verdict in (v for run in runs for v in run["verdicts"]):
        if found.get(verdict["id"], {"ours": None})["ours"] is None:
            found[verdict["id"]] = verdict
    return list(found.values())


def few_shot(kad: dict) -> list[str]:
    """Trained parameters, accuracy by data set, the best epoch on the test set beside it, and PE, method by method."""
    table = pd.DataFrame(kad["metrics"]["few_shot"])
    table[["score", "test_best"]] *= 100
    sets = list(dict.fromkeys(table["dataset"]))
    body = []
    for method in dict.fromkeys(table["method"]):
        mine = table[table["method"] == method].groupby("dataset")
        mean, std = mine[["score", "test_best", "parameters"]].mean(), mine["score"].std()
        line = [method, f"{mean['parameters'].iloc[0]:,.0f}"]
        for name in sets:
            line += [f"{mean['score'][name]:.1f} ± {std[name]:.1f}" if name in std else ""]
        pe = evaluate.pe(mean["score"][sets[0]] / 100, mean["parameters"][sets[0]])
        body.append([*line, f"{mean['test_best'][sets[0]]:.1f}", f"{pe:.4f}"])
    first = sets[0]
    return rows(
        [["method", "trained", *(f"{s}, %" for s in sets), f"{first}, best epoch on the test set", "PE"], *body]
    )


def forgetting(blocks: dict) -> list[str]:
    """Target accuracy, source k-NN as adapted and with the adapter off, and their mean, method by method."""
    k = str(blocks["parameters"]["k"])
    before = blocks["metrics"]["before"][k]
    head = ["method", "trained", "target, %", "source k-NN, %", "forgotten", "adapter off, %", "mean of both"]
    body = [["(before)", "", "", f"{before:.1f}", "", "", ""]]
    for method, found in blocks["metrics"]["comparison"].items():
        words = {key: f"{s['mean']:.1f} ± {s['std']:.1f}" for key, s in found.items()}
        both = (found["accuracy"]["mean"] + found["knn"]["mean"]) / 2
        lost = f"{before - found['knn']['mean']:.1f}"
        line = [method, f"{found['trained']['mean']:,.0f}", words["accuracy"], words["knn"], lost]
        body.append([*line, words.get("off", ""), f"{both:.1f}"])
    return rows([head, *body])


def spread(values: pd.Series, digits: int = 1) -> str:
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


def cutting(side: dict) -> list[str]:
    """FLOPs, latency, file and accuracy before and after recovery of every way to make a model smaller, by budget."""
    table = pd.DataFrame(side["metrics"]["cut"])
    head = ["method", "asked", "FLOPs", "latency", "file, KiB", "as cut, %", "recovered, %"]
    body = []
    for (method, budget), found in table.groupby(["method", "budget"], sort=False):
        prices = [f"{found[name].mean():.2f}" for name in ("flops", "latency")] + [f"{found['file_kib'].mean():,.0f}"]
        body.append([method, f"{budget:g}", *prices, spread(found["before"]), spread(found["after"])])
    return rows([head, *body])


def adapting(side: dict) -> list[str]:
    """What every way to adapt learns, forgets and costs."""
    table = side["metrics"]["adapt_table"]
    names = ["method", "target, %", "source k-NN, %", "trained", "stored, KiB", "training, MFLOPs an image", "step, ms"]
    names += ["saved, MiB an image", "latency, dense = 1"]
    return rows([names, *([row[name] for name in names] for row in table)])


def ledger(title: str, outcome: dict) -> list[str]:
    """How a paper's published numbers fared, and what differs."""
    counts = claims.counts(outcome["verdicts"])
    differ = [v for v in outcome["verdicts"] if v["verdict"] == "differs"]
    lines = [
        f"* **{title}**: of {sum(counts.values())} published numbers and trends {counts['matches']} match, "
        f"{counts['differs']} differ, {counts['not run']} are not run."
    ]
    if not differ:
        return lines
    what = [f"  * {v['claim']}: published {shown(v['value'])}, ours {shown(v['ours'])}" for v in differ]
    return [*lines, "", "  <details><summary>what differs</summary>", "", *what, "", "  </details>"]


def text() -> str:
    """The README's section of results."""
    backbone, lbp, clock = (result(name) for name in ("0_backbone", "1_lbp_wht", "7_speed"))
    kad, blocks = (result(name) for name in ("3_kadaptation", "4_block_expansion"))
    comcat, uvc, side = (result(name) for name in ("2_comcat", "5_uvc", "6_side_by_side"))
    clocks = [clock, result("7_speed.cut")]
    goals = claims.counts(merged(clocks))
    seeds, images = len(lbp["seeds"]), lbp["parameters"]["train_images"]
    lines = [
        "**LBP-WHT against its rivals** ([notebook](outputs/embedded/1_lbp_wht.ipynb)): the embedded backbone learns "
        f"handwritten digits from {images} small grey images; mean and standard deviation over {seeds} seeds. MFLOPs "
        "are those of the backward pass through the linear layers, by the paper's rule; *step ×* is the measured "
        "speed-up of a training step over exact back-propagation, *saved* the bytes kept for the backward pass, "
        "exact = 1. On a model this narrow the transforms take a good part of what they save: the second table has "
        "real widths.",
        "",
        *comparison(lbp),
        "",
        f"**KAdaptation and its rivals** ([notebook](outputs/embedded/3_kadaptation.ipynb)): "
        f"{kad['parameters']['shots']} images of each class, mean and standard deviation over {len(kad['seeds'])} "
        "subsets, the last epoch; the column beside it takes the best epoch on the test set, as the published numbers "
        "do. PE is the accuracy discounted by the trained parameters. Small grey images again.",
        "",
        *few_shot(kad),
        "",
        f"**Transfer against forgetting** ([notebook](outputs/embedded/4_block_expansion.ipynb)): the backbone knows "
        f"garments and learns digits; {len(blocks['seeds'])} seeds. A weighted k-NN (k = {blocks['parameters']['k']}) "
        "asks for garments again, on the features as adapted and with the adapter switched off.",
        "",
        *forgetting(blocks),
        "",
        "**Smaller models** ([notebook](outputs/embedded/6_side_by_side.ipynb), with pictures; each method alone in "
        "[2_comcat](outputs/embedded/2_comcat.ipynb) and [5_uvc](outputs/embedded/5_uvc.ipynb)): the backbone on the "
        f"garments that it knows, {len(side['seeds'])} seeds, the same short distillation for all. *Asked* is the part "
        "of the dense FLOPs that a method was given; FLOPs and latency are measured, dense = 1.",
        "",
        *cutting(side),
        "",
        "**Adapting, side by side** (the same notebook): garments to digits, one short recipe for all; *on ComCAT* and "
        "*on UVC*: the model was cut before it was adapted.",
        "",
        *adapting(side),
        "",
        "**Speed and memory** ([notebook](outputs/embedded/7_speed.ipynb)): ratios, measured interleaved in one "
        f"process on {clock['hardware']['cores']} cores of the processor named, a shared machine; on the right "
        "an earlier run on another processor, by an earlier library ([docs/measured](docs/measured), with its commit).",
        "",
        *speed(clocks, elsewhere()),
        "",
        "**The ledger** puts every published number that could be found beside ours. What is not run needs weights and "
        "data sets that are not here. A trend holds here only where each difference it names is larger than its spread "
        "over the seeds; with a few small grey images many are not.",
        "",
        *ledger("LBP-WHT", lbp),
        *ledger("ComCAT", comcat),
        *ledger("KAdaptation", kad),
        *ledger("Block expansion", blocks),
        *ledger("UVC", uvc),
        *ledger("Side by side", side),
        f"* **Speed**: of {sum(goals.values())} goals of our own {goals['matches']} are reached, {goals['differs']} "
        f"missed, {goals['not run']} not run (they need a GPU).",
        "",
        f"**The backbone** ([notebook](outputs/embedded/0_backbone.ipynb)): {backbone['headline']}.",
    ]
    return "\n".join(lines)


def shown(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def draw() -> None:
    """Accuracy over backward FLOPs, one panel a scope, the spread over seeds as bars."""
    plots.house()
    table = result("1_lbp_wht")["metrics"]["comparison"]
    scopes = {"last": "the last third of the blocks learns", "full": "all blocks learn"}
    fig, axes = plots.figure(2, width=4.6, height=3.5, sharey=True)
    look = plots.looks(dict.fromkeys(row["method"] for row in table))
    for ax, (scope, title) in zip(axes, scopes.items(), strict=True):
        for row in (row for row in table if row["scope"] == scope):
            accuracy, style = row["accuracy"], look[row["method"]]
            ax.errorbar(
                row["backward_mflops"], accuracy["mean"], accuracy["std"], ls="none", label=row["method"], ms=8, **style
            )
        ax.set(title=title, xlabel="backward pass, MFLOPs an image")
    axes[0].set_ylabel("digits right, % (mean ± std over seeds)")
    plots.legend_beside(fig, axes)
    fig.suptitle("Accuracy over the FLOPs of the backward pass: up and left is better", fontsize=11)
    (ROOT / "docs").mkdir(exist_ok=True)
    fig.savefig(ROOT / "docs" / "accuracy_over_flops.png", dpi=110)


def main() -> int:
    readme = ROOT / "README.md"
    whole = readme.read_text(encoding="utf-8")
    before, rest = whole.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n\n{text()}\n\n{END}{after}"
    if "--check" in sys.argv[1:]:
        return int(new != whole)
    draw()
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
