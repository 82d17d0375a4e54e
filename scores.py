"""What graded answers are worth: CV-Bench's scores with standard errors, intervals and a chance line, a
paired comparison, tables, and a page to look at.

All take lists of records as eval_cvbench.py keeps them: dicts with id, task, source, options, answer,
correct, chosen, extracted, completion, length (tokens) and finished.
"""
import html
import re
from collections import defaultdict, namedtuple
from math import comb
from statistics import NormalDist, mean

from grpo_vision import extract_answer, seeded, write_whole

REFLECTION = re.compile("aha|check|possibl|verify|wait|yet", re.IGNORECASE)  # as the authors count them
PUBLISHED = {"Count": 788, "Relation": 650, "Depth": 600, "Distance": 600,  # CV-Bench's questions by task
             "ADE20K": 633, "COCO": 805, "Omni3D": 1200}                    # and by source
Z = NormalDist().inv_cdf(0.975)  # 1.96: a 95 % interval

PAPER = {  # arXiv 2503.05132, table 1; the base model's Depth is printed as 0.16, likely 10.16
    "base": (54.69, 22.46, 0.16, 31.66, 31.38), "base + SFT": (60.02, 68.92, 55.00, 45.83, 57.84),
    "base + GRPO": (59.64, 66.76, 54.16, 56.66, 59.47), "instruct": (45.43, 68.92, 58.66, 51.66, 55.64),
    "instruct + RL": (61.68, 71.08, 61.50, 60.00, 63.57),
    "instruct + RL, vision frozen": (64.21, 78.00, 65.67, 66.00, 68.34),
    "instruct + RL, LLM frozen": (62.05, 72.46, 65.17, 62.17, 65.35)}


def accuracy(records):
    """-> share of right answers and its standard error, both in percent (nan without records)."""
    n = len(records)
    p = sum(r["correct"] for r in records) / n if n else float("nan")
    return 100 * p, 100 * (p * (1 - p) / n) ** 0.5 if n else float("nan")


def groups(records):
    """Records -> {name of a score: [(weight, its records), ...]}: tasks, sources, and means over sources.

    total is the paper's micro-average; 2D, 3D and official = (2D + 3D) / 2 are CV-Bench's own, in which the
    two sources of 2D count the same: 1/2 * ((ADE20K + COCO) / 2 + Omni3D).
    """
    found = {key: defaultdict(list) for key in ("task", "source")}
    for record in records:
        for key, group in found.items():
            group[record[key]].append(record)
    rank = {name: i for i, name in enumerate(PUBLISHED)}
    tasks, sources = ({name: [(1, group[name])] for name in sorted(group, key=lambda x: (rank.get(x, 99), x))}
                      for group in found.values())
    combined = {"total": [(1, list(records))]}
    if {"ADE20K", "COCO", "Omni3D"} <= sources.keys():
        ade, coco, omni = (found["source"][name] for name in ("ADE20K", "COCO", "Omni3D"))
        combined |= {"official": [(1 / 4, ade), (1 / 4, coco), (1 / 2, omni)],
                     "2D": [(1 / 2, ade), (1 / 2, coco)], "3D": [(1, omni)]}
    return tasks | combined | (sources if len(sources) > 1 else {})


Score = namedtuple("Score", "n value error low high chance")  # all but n in percent


def weighted(parts):
    """[(weight, value, low, high), ...], independent -> weighted mean of the values, and its interval from
    their distances to the ends of their own intervals (MOVER: Zou and Donner 2008)."""
    value = sum(weight * value for weight, value, _, _ in parts)
    below = sum((weight * (value - low)) ** 2 for weight, value, low, _ in parts) ** 0.5
    above = sum((weight * (high - value)) ** 2 for weight, value, _, high in parts) ** 0.5
    return value, value - below, value + above


def score(parts):
    """[(weight, records), ...] -> Score of the weighted mean of their shares of right answers.

    error: one standard error. low, high: the 95 % interval; Wilson's for a share, which does not leave
    0 .. 100 and holds near the ends too. chance: what a guess among each question's choices would reach.
    """
    variance = chance = 0
    shares = []
    for weight, records in parts:
        n, p = len(records), mean(bool(r["correct"]) for r in records)
        middle, half = p + Z**2 / (2 * n), Z * (p * (1 - p) / n + Z**2 / (4 * n**2)) ** 0.5
        low, high = ((middle + side * half) / (1 + Z**2 / n) for side in (-1, 1))
        shares.append((weight, p, min(p, max(low, 0.0)), max(p, min(high, 1.0))))  # against rounding
        variance += weight**2 * p * (1 - p) / n
        chance += weight * mean(1 / len(r["options"]) for r in records)
    value, low, high = weighted(shares)
    n = sum(len(records) for _, records in parts)
    return Score(n, *(100 * x for x in (value, variance**0.5, low, high, chance)))


def difference(parts):
    """[(weight, records with correct and other), ...] -> how many points more `other` scores, the ends of
    the 95 % interval, and, for a single part, the p-value of the two being equally good.

    Paired: only questions that one of the two got right and the other wrong tell them apart. Interval: Bonett
    and Price 2012, never of width 0. p: McNemar's exact test, which is the permutation test that swaps the
    two answers to any question.
    """
    differences = []
    for weight, records in parts:
        n = len(records)
        won, lost = (sum(r["other"] is side is not r["correct"] for r in records) for side in (True, False))
        a, b = (won + 1) / (n + 2), (lost + 1) / (n + 2)
        half = Z * ((a + b - (a - b) ** 2) / (n + 2)) ** 0.5
        differences.append((weight, (won - lost) / n, a - b - half, a - b + half))
    p = min(1.0, 2 * sum(comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost))
    return *(100 * x for x in weighted(differences)), p if len(parts) == 1 else None


def summarise(records):
    """Records -> {"scores": {name: Score}, "rates": percent of answers, but mean length in tokens}."""
    rate = lambda test: 100 * mean(bool(test(r)) for r in records)
    return {"scores": {name: score(parts) for name, parts in groups(records).items()}, "rates": {
        "unparsed": rate(lambda r: r["chosen"] is None),
        "truncated": rate(lambda r: not r["finished"]),
        "letter only": rate(lambda r: re.fullmatch(r"\(?[A-Za-z]\)?\.?", r["extracted"] or "")),
        "one answer block": rate(lambda r: extract_answer(r["completion"], strict=True) is not None),
        "reflection word": rate(lambda r: REFLECTION.search(r["completion"])),
        "mean length": mean(r["length"] for r in records)}}


def text_table(summary):
    """A summary -> lines for the terminal."""
    lines = [f"    {name:24s} {s.value:5.1f} ± {s.error:4.1f}   {s.low:5.1f} .. {s.high:5.1f}   chance "
             f"{s.chance:4.1f}   {s.n} questions" for name, s in summary["scores"].items()]
    return "\n".join(lines + [f"    {name:24s} {value:5.1f}" for name, value in summary["rates"].items()])


def score_rows(summaries):
    """{mode: summary} -> rows of the table in summary.md and report.html, the heading first. The paper's rows
    are there if the questions are all of CV-Bench's: no other set compares with them."""
    most = {name: s for summary in summaries.values() for name, s in summary["scores"].items()}
    rows = [["%, 95 % interval", *most]]
    for mode, summary in summaries.items():
        some = [summary["scores"].get(name) for name in most]
        rows.append([mode, *(f"{s.value:.1f} ({s.low:.1f}–{s.high:.1f})" if s else "" for s in some)])
    rows += [["chance", *(f"{s.chance:.1f}" for s in most.values())],
             ["questions", *(str(s.n) for s in most.values())]]
    if PUBLISHED.items() <= {name: s.n for name, s in most.items()}.items():
        for name, values in PAPER.items():
            value = dict(zip("Count Relation Depth Distance total".split(), values))
            rows.append([f"paper: {name}", *(f"{value[x]:.2f}" if x in value else "" for x in most)])
    return rows


def rate_rows(summaries):
    """{mode: summary} -> rows of the second table: how the answers look."""
    rows = [["% of answers; tokens", *next(iter(summaries.values()))["rates"]]]
    return rows + [[mode, *(f"{rate:.1f}" for rate in summary["rates"].values())]
                   for mode, summary in summaries.items()]


def markdown(rows):
    line = lambda cells: "| " + " | ".join(cells) + " |\n"
    return line(rows[0]) + "|---" * len(rows[0]) + "|\n" + "".join(map(line, rows[1:]))


def comparison(a, b):
    """Records of two models on the same questions, in the same order -> lines for the terminal."""
    lines = []
    for name, parts in groups([{**x, "other": y["correct"]} for x, y in zip(a, b, strict=True)]).items():
        (d, low, high, p), share = difference(parts), score(parts).value
        lines.append(f"    {name:24s} A {share:5.1f}   B {share + d:5.1f}   B - A {d:+5.1f}   {low:+5.1f} .. "
                     f"{high:+5.1f}" + ("" if p is None else f"   p = {p:.2g}"))
    return "\n".join(lines)


# ---- The report ------------------------------------------------------------------------------------------

REPORT = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; font-size: 13px; margin: 1rem 0; display: block; overflow-x: auto }}
td {{ padding: .25rem .4rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }}
td:first-child {{ text-align: left }}
tr:first-child {{ font-weight: 600 }}
article {{ display: flex; gap: 1rem; border-top: 1px solid #ccc; padding: 1rem 0 }}
article[hidden] {{ display: none }}
article img {{ max-width: 16rem; max-height: 16rem }}
pre {{ white-space: pre-wrap; background: #f6f6f6; padding: .5rem; max-height: 20rem; overflow: auto }}
.right {{ background: #d9f2d9 }} .wrong {{ background: #fbe0dd }} .right, .wrong {{ padding: 0 .3rem }}
</style>
<h1>{title}</h1>
{tables}
<h2>Wrong answers</h2>
<p>{shown} of {all}. Task <select id="task"><option>all</option>{tasks}</select>
mode <select id="mode"><option>all</option>{modes}</select></p>
{wrong}
<script>
const pick = name => document.getElementById(name).value
const show = () => document.querySelectorAll("article").forEach(a => a.hidden =
  ["task", "mode"].some(name => pick(name) != "all" && pick(name) != a.dataset[name]))
for (const name of ["task", "mode"]) document.getElementById(name).onchange = show
</script></html>"""


def bars(summary):
    """Accuracy by task, a bar each with its interval, and a mark at chance -> SVG."""
    lines = []
    for i, (name, s) in enumerate(summary["scores"].items()):
        y, x = 22 * i + 12, lambda percent: 130 + 4 * percent
        lines.append(
            f'<text x="122" y="{y + 4}" text-anchor="end">{html.escape(name[:20])}</text>'
            f'<rect x="130" y="{y - 7}" width="{4 * s.value:.1f}" height="14" fill="#7fb2e5"/>'
            f'<path d="M{x(s.low):.1f} {y}H{x(s.high):.1f}m0 -4v8M{x(s.low):.1f} {y - 4}v8" stroke="#234"/>'
            f'<path d="M{x(s.chance):.1f} {y - 9}v18" stroke="#c33" stroke-dasharray="3 2"/>'
            f'<text x="540" y="{y + 4}">{s.value:.1f}</text>')
    return (f'<svg width="580" height="{22 * len(lines) + 4}" font-size="12" role="img" '
            f'aria-label="accuracy with 95 % intervals">{"".join(lines)}</svg>')


def write_report(file, title, answers, questions, picture, most=25):
    """{mode: records} -> FILE: one self-contained page. Of each mode and task at most `most` wrong answers,
    drawn with a seed, or the page would not open. All text is escaped: markup in an answer shows as text.
    picture: image of a question -> URL that holds it."""
    summaries = {mode: summarise(records) for mode, records in answers.items()}
    cell = lambda text: f"<td>{html.escape(text).replace(' (', '<br>(')}</td>"
    cells = lambda row: f'<tr>{"".join(map(cell, row))}</tr>'
    tables = "".join(f'<table>{"".join(map(cells, rows))}</table>'
                     for rows in (score_rows(summaries), rate_rows(summaries)))
    tables += "<p>Bars: accuracy with its 95 % interval; dashed: chance.</p>"
    tables += "".join(f"<h3>{mode}</h3>{bars(summary)}" for mode, summary in summaries.items())
    asked, wrong = {q["id"]: q for q in questions}, defaultdict(list)
    for mode, records in answers.items():
        for r in records:
            if not r["correct"]:
                wrong[mode, r["task"]].append(r)
    articles = []
    for (mode, task), records in wrong.items():
        for r in sorted(seeded("report").sample(records, min(most, len(records))), key=lambda r: r["id"]):
            pictures = "".join(f'<img alt="the image" src="{picture(image)}">'
                               for image in asked[r["id"]]["images"])
            said = html.escape(r["chosen"] or f"no choice: {(r['extracted'] or 'nothing')[:80]}")
            articles.append(
                f'<article data-task="{html.escape(task)}" data-mode="{mode}"><div>{pictures}</div><div>'
                f'<b>{html.escape(task)}</b>, question {r["id"]}, {mode}'
                f'<pre>{html.escape(asked[r["id"]]["text"])}</pre>'
                f'Choices: {html.escape(", ".join(r["options"]))}<br>'
                f'Right: <span class="right">{html.escape(r["answer"])}</span> '
                f'chosen: <span class="wrong">{said}</span>{"" if r["finished"] else " (cut off)"}'
                f'<pre>{html.escape(r["completion"])}</pre></div></article>')
    option = lambda names: "".join(f"<option>{html.escape(name)}</option>" for name in dict.fromkeys(names))
    write_whole(file, REPORT.format(
        title=html.escape(title), tables=tables, wrong="\n".join(articles), shown=len(articles),
        all=sum(map(len, wrong.values())), tasks=option(task for _, task in wrong), modes=option(answers)))
