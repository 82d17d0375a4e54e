"""Evaluate a checkpoint on CV-Bench: the paper's protocol (greedy, answer block or else the whole text).

    python eval_cvbench.py                       # runs/toy/final and its base, on the toy's two sets
    python eval_cvbench.py --run runs/toy        # every checkpoint of a run, and its curves from these scores
    python eval_cvbench.py --model runs/sat/final --data nyu-visionx/CV-Bench
    python eval_cvbench.py --data data/toy/test.parquet --temperature 1 --strict     # graded as in training

Reads CV-Bench (a hub id, or a folder of Parquet files with its columns: test_2d.parquet, test_3d.parquet)
and, for held-out questions of the training kind, a file as prepare_sat.py writes it. A CV-Bench row looks
like this:

    idx 0, type "2D", task "Count", image <PNG>, question "How many ...?", choices ["2", "3"], answer "(B)",
    prompt "How many ...? Select from the following choices.\\n(A) 2\\n(B) 3", source "ADE20K", ...

Every question's prompt, completion, extracted answer and verdict is kept in results/MODEL/DATA-MODE.jsonl.
"""
import argparse
import base64
import html
import io
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean

import torch
import transformers
from tqdm import tqdm

from grpo_vision import (BASE_PROMPT, append_jsonl, build_prompt, completion_text, end_tokens, extract_answer,
                         fail, grade, load_model, load_processors, open_image, row_text, sample, seeded,
                         set_threads, suppressed_tokens)

# the paper's prompt for a direct answer, verbatim
DIRECT_PROMPT = ("A conversation between User and Assistant. The user asks a question about the image, and "
                 "the Assistant solves it.\nUser: {question} \nAssistant: ")


# ---- The questions ---------------------------------------------------------------------------------------

def load_benchmark(path, limit=None):
    """CV-Bench (hub id, folder or file) or a file of the training layout -> list of questions, each a dict of
    id, task, source, images, text (what the template is filled with), options, answer (an option's text)."""
    import datasets
    datasets.disable_progress_bars()
    local = Path(path)
    files = sorted(map(str, local.glob("*.parquet"))) if local.is_dir() else [str(local)]
    try:
        if local.exists():
            table = datasets.load_dataset("parquet", data_files=files, split="train")
        elif path.count("/") == 1 and not path.endswith(".parquet"):
            table = datasets.load_dataset(path, split="test")
        else:
            raise FileNotFoundError("no such file or folder")
    except Exception as error:  # datasets raises many kinds for what it cannot find or read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(f"the questions of {path} cannot be read: {reason}")
    cvbench = "choices" in table.column_names
    needed = set("image prompt choices answer task source".split() if cvbench else
                 "images question options answer".split())
    if missing := sorted(needed - set(table.column_names)):
        fail(f"{path} has no column {missing[0]!r} ({', '.join(table.column_names)})")
    raw = datasets.Image(decode=False)
    table = table.cast_column("image", raw) if cvbench else table.cast_column("images", datasets.List(raw))
    head, tail = BASE_PROMPT.split("{question}")
    questions = []
    n = min(limit or len(table), len(table))
    for i in sorted(seeded("questions").sample(range(len(table)), n)):  # drawn: files are sorted by task
        row = table[i]
        if not cvbench:  # row_text without the template around it
            questions.append({"id": i, "task": row.get("question_type") or "all", "source": "held-out",
                              "images": row["images"] or [], "options": row["options"],
                              "answer": row["answer"],
                              "text": row_text(row).removeprefix(head).removesuffix(tail)})
            continue
        letter = re.fullmatch(r"\(([A-Z])\)", row["answer"].strip())
        if not letter or ord(letter[1]) - ord("A") >= len(row["choices"]):
            fail(f"{path}, row {i}: {row['answer']!r} is none of {len(row['choices'])} choices")
        questions.append({"id": i, "task": row["task"], "source": row["source"], "images": [row["image"]],
                          "text": row["prompt"], "options": row["choices"],
                          "answer": row["choices"][ord(letter[1]) - ord("A")]})
    return questions


# ---- The answers -----------------------------------------------------------------------------------------

def answer_questions(model, tokenizer, image_processor, questions, template=BASE_PROMPT, batch_size=32,
                     max_new_tokens=1024, temperature=0.0, seed=0, strict=False):
    """Yield one record per question, in batches of prompts of like length; greedy unless temperature > 0."""
    suppressed, eos_ids = suppressed_tokens(model, tokenizer), end_tokens(tokenizer)
    generator = torch.Generator(model.device).manual_seed(seeded(seed, "evaluation").getrandbits(63))
    order = sorted(questions, key=lambda q: (len(tokenizer(q["text"]).input_ids), q["id"]))
    for first in range(0, len(order), batch_size):
        batch, prompts = order[first:first + batch_size], []
        for q in batch:
            images = [open_image(image, f"question {q['id']}") for image in q["images"]]
            text = template.format(question=q["text"])
            prompts.append(build_prompt(text, images, tokenizer, image_processor, model))
        rollout = sample(model, prompts, 1, max_new_tokens, temperature, suppressed, eos_ids, generator)
        for i, (q, prompt) in enumerate(zip(batch, prompts)):
            ids = rollout.completion_ids[i, rollout.completion_mask[i]]
            completion = completion_text(prompt.text, ids, tokenizer)
            extracted = extract_answer(completion, strict)
            yield {**{k: q[k] for k in ("id", "task", "source", "options", "answer")}, "prompt": prompt.text,
                   "completion": completion, "extracted": extracted, "length": len(ids),
                   "finished": bool(rollout.finished[i]),
                   "parsed": extract_answer(completion, strict=True) is not None,
                   "correct": grade(extracted, q["answer"], q["options"], strict)}


def accuracy(records):
    """-> share of right answers and its standard error, both in percent (nan without records)."""
    n = len(records)
    p = sum(r["correct"] for r in records) / n if n else float("nan")
    return 100 * p, 100 * (p * (1 - p) / n) ** 0.5 if n else float("nan")


def summarise(records):
    """Records -> dict: accuracy and standard error per task and in total (the paper's micro-average), the
    official CV-Bench score if all its sources are there, unparsed answers (percent), mean length (tokens)."""
    groups = {key: defaultdict(list) for key in ("task", "source")}
    for record in records:
        for key, group in groups.items():
            group[record[key]].append(record)
    summary = {task: accuracy(group) for task, group in sorted(groups["task"].items())}
    summary["total"] = accuracy(records)
    ade, coco, omni = (accuracy(groups["source"][name])[0] for name in ("ADE20K", "COCO", "Omni3D"))
    if ade == ade and coco == coco and omni == omni:  # none is nan
        summary["official"] = ((ade + coco) / 2 + omni) / 2
    summary["unparsed"] = 100 * sum(not r["parsed"] for r in records) / len(records)
    summary["mean_length"] = sum(r["length"] for r in records) / len(records)
    return summary


def table(name, summary):
    cell = lambda value: f"{value[0]:.1f} ± {value[1]:.1f}" if isinstance(value, tuple) else f"{value:.1f}"
    return f"{name}\n" + "".join(f"    {key:24s} {cell(value)}\n" for key, value in summary.items())


# ---- A run to look at: curves.png and rollouts.html ------------------------------------------------------

REFLECTION = re.compile("aha|check|possibl|verify|wait|yet", re.IGNORECASE)  # as the authors count them


def read_jsonl(path):
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave half a line


def load_sets(paths, limit):
    """Comma-separated benchmarks -> {path: questions}, the same `limit` questions of each every time."""
    return {path: load_benchmark(path, limit) for path in paths.split(",")}


def track(run, step, model, tokenizer, image_processor, sets, max_new_tokens):
    """Called while training: score the model, greedy, on fixed questions of each set -> RUN/eval.jsonl."""
    for name, questions in sets.items():
        answers = answer_questions(model, tokenizer, image_processor, questions,
                                   max_new_tokens=max_new_tokens)
        records = list(tqdm(answers, f"evaluation on {name}", total=len(questions), leave=False))
        append_score(run / "eval.jsonl", step, name, records)


def show(run, data):
    """Bring RUN/curves.png and RUN/rollouts.html up to date."""
    draw_curves(run)
    write_page(run, data)


def append_score(path, step, name, records):
    score, error = accuracy(records)
    length = sum(r["length"] for r in records) / len(records)
    append_jsonl(path, [{"step": step, "set": name, "questions": len(records), "accuracy": score,
                         "standard_error": error, "mean_length": length}])


def report(run):
    """The end of a training run in a few lines: before and after, what to open, what to try next."""
    metrics, scores = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "eval.jsonl")
    for name in dict.fromkeys(s["set"] for s in scores):
        first, *_, last = [s for s in scores if s["set"] == name] * 2
        print(f"{name}: {first['accuracy']:.1f} -> {last['accuracy']:.1f} % right, greedy, "
              f"± {last['standard_error']:.1f} on {last['questions']} questions")
    for key in ("rewards/accuracy", "rewards/format", "completions/mean_length"):
        if metrics and key in metrics[0]:
            last = mean(m[key] for m in metrics[-10:])
            print(f"rollouts, {key}: {metrics[0][key]:.2f} at first -> {last:.2f} in the last 10 steps")
    print(f"model:    {run}/final\nlook at:  {run}/curves.png  {run}/rollouts.html\n"
          f"try next: python eval_cvbench.py --run {run}    # every checkpoint on all questions\n"
          f"          python grpo_vision.py --loss_type dr_grpo --scale_rewards false")


def smooth(values, width):
    """Running mean over about `width` values around each; over fewer at the ends."""
    windows = [values[max(0, i - width // 2):i + width // 2 + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw_curves(run, scores=None):
    """RUN's metrics.jsonl, completions.jsonl and eval.jsonl (or the file `scores`) -> RUN/curves.png.

    After Figure 1 of the paper: accuracy on fixed questions, with its standard error, and mean length of the
    rollouts against the training step. Draws a run of any length, finished or not.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    metrics, scores = read_jsonl(run / "metrics.jsonl"), read_jsonl(scores or run / "eval.jsonl")
    if not metrics:
        fail(f"{run}/metrics.jsonl has no step yet; there is nothing to draw")
    steps, width = [m["step"] for m in metrics], max(1, len(metrics) // 12)
    reflecting = defaultdict(list)
    for sample in read_jsonl(run / "completions.jsonl"):
        reflecting[sample["step"]].append(bool(REFLECTION.search(sample["completion"])))

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.grid": True, "grid.alpha": 0.25})
    figure = plt.figure(figsize=(9, 7), layout="constrained")
    rows = figure.subfigures(2, 1, height_ratios=[3, 2.4])
    top = rows[0].subplots()
    for color, name in zip(("tab:blue", "tab:cyan", "tab:purple"), dict.fromkeys(s["set"] for s in scores)):
        line = [s for s in scores if s["set"] == name]
        x, y = [s["step"] for s in line], [s["accuracy"] for s in line]
        label = f"accuracy on {Path(name).stem} ({line[0]['questions']} questions)"
        top.plot(x, y, "o-", color=color, ms=4, label=label)
        top.fill_between(x, [s["accuracy"] - s["standard_error"] for s in line],
                         [s["accuracy"] + s["standard_error"] for s in line], color=color, alpha=0.15, lw=0)
    top.set(xlabel="training step", ylabel="accuracy, % (band: 1 standard error)", ylim=(0, 100),
            xlim=(0, max(steps)))
    right = top.twinx()
    lengths = [m["completions/mean_length"] for m in metrics]
    right.plot(steps, lengths, color="tab:red", lw=0.8, alpha=0.35)
    right.plot(steps, smooth(lengths, width), color="tab:red", lw=2, label="response length of the rollouts")
    right.set_ylabel("tokens", color="tab:red")
    right.set_ylim(0, 1.15 * max(lengths))
    right.grid(False)
    handles = [axis.get_legend_handles_labels() for axis in (top, right)]
    top.legend(*(a + b for a, b in zip(*handles)), loc="lower right", framealpha=0.9)

    panels = rows[1].subplots(2, 3, sharex=True).flat
    parts = [key for key in metrics[0] if key.startswith("rewards/")]
    curves = [("reward", {key.removeprefix("rewards/"): [m[key] for m in metrics] for key in parts}),
              ("KL to the start, per token", {"": [m["kl"] for m in metrics]}),
              ("entropy per token, nats", {"": [m["entropy"] for m in metrics]}),
              ("groups without spread", {"": [m["frac_reward_zero_std"] for m in metrics]}),
              ("rollouts with a reflection word", {"": [mean(reflecting[step]) for step in steps]}),
              ("rollouts cut at the token limit", {"": [m["completions/clipped_ratio"] for m in metrics]})]
    for panel, (title, lines) in zip(panels, curves):
        for (label, values), color in zip(lines.items(), ("tab:green", "tab:orange", "tab:brown")):
            panel.plot(steps, values, color=color, lw=0.7, alpha=0.35)
            panel.plot(steps, smooth(values, width), color=color, label=label)
        panel.set_title(title, fontsize=9)
        panel.set_ylim(bottom=0)
        if len(lines) > 1:
            panel.legend(fontsize=8)
    figure.savefig(run / "curves.png", dpi=130)
    plt.close(figure)


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Rollouts of {run}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
h2 {{ border-bottom: 1px solid #ccc; margin-top: 2.5rem }}
.question {{ display: flex; gap: 1rem; margin: 1.2rem 0 .4rem }}
.question img {{ max-width: 11rem; max-height: 11rem; image-rendering: auto; border: 1px solid #ccc }}
.right {{ background: #d9f2d9; border-radius: .3rem; padding: 0 .4rem; font-weight: 600 }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ padding: .25rem .5rem; text-align: right; vertical-align: top }}
th:first-child {{ text-align: left }}
td.text {{ text-align: left; white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: 13px }}
tr.up {{ background: #e9f7e9 }} tr.down {{ background: #fbe9e7 }} tr.zero {{ background: #f4f4f4 }}
</style>
<h1>Rollouts of {run}</h1>
<p>What the policy answered to a few training questions as it learned. Each table is one group, the
completions of one prompt. Green rows did better than their group and are made likelier, red rows are made
less likely; the advantage says how strongly. Grey rows teach nothing: their group got one reward.</p>
{body}</html>"""


def write_page(run, data, most_steps=8, most_questions=2):
    """RUN/completions.jsonl and the training table -> RUN/rollouts.html: one self-contained page with a few
    groups of a few steps. All text is escaped: a completion that contains markup shows as text."""
    samples = defaultdict(lambda: defaultdict(list))  # step -> row number -> completions
    for sample in read_jsonl(run / "completions.jsonl"):
        samples[sample["step"]][sample["row"]].append(sample)
    steps = sorted(samples)
    shown, body = [round(i * (len(steps) - 1) / (most_steps - 1)) for i in range(most_steps)], []
    for step in dict.fromkeys(steps[i] for i in shown if steps):
        body.append(f"<h2>Step {step}</h2>")
        # those with spread first: where all completions score the same there is little to see
        groups = sorted(samples[step].values(), key=lambda group: len({s["reward"] for s in group}) == 1)
        for group in groups[:most_questions]:
            row = data[group[0]["row"]]
            pictures = "".join(f'<img alt="the image" src="{data_url(image)}">' for image in row["images"])
            body.append(f'<div class="question">{pictures}<div>{html.escape(row["question"])}<br>'
                        f'Options: {html.escape(", ".join(row["options"]))}<br>'
                        f'Right answer: <span class="right">{html.escape(row["answer"])}</span></div></div>')
            names = [key for key in group[0] if key.startswith("rewards/")]
            heads = "".join(f"<th>{html.escape(name.removeprefix('rewards/'))}</th>" for name in names)
            body.append(f"<table><tr><th>completion</th>{heads}<th>tokens</th><th>advantage</th></tr>")
            for sample in group:
                sign = "up" if sample["advantage"] > 0 else "down" if sample["advantage"] < 0 else "zero"
                cells = "".join(f"<td>{sample[name]:g}</td>" for name in names)
                text = html.escape(sample["completion"])
                cells += f'<td>{sample["length"]}</td><td>{sample["advantage"]:+.2f}</td>'
                body.append(f'<tr class="{sign}"><td class="text">{text}</td>{cells}</tr>')
            body.append("</table>")
    page = PAGE.format(run=html.escape(str(run)), body="\n".join(body))
    partial = run / "rollouts.html.tmp"
    partial.write_text(page)
    partial.rename(run / "rollouts.html")


def data_url(image, side=224):
    """{"bytes", "path"} -> a small PNG or JPEG inside a URL, so that the page needs no other file."""
    picture = open_image(image, "an image of the page").convert("RGB")
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if max(picture.size) <= 96 else "JPEG")
    kind = "png" if max(picture.size) <= 96 else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


# ---- The command -----------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", help="folders or hub ids; default: runs/toy/final and its base")
    parser.add_argument("--run", type=Path, help="evaluate every checkpoint of this training run instead")
    parser.add_argument("--data", nargs="+", default=["data/toy/cvbench", "data/toy/test.parquet"],
                        help="CV-Bench (hub id, folder, file), or a file as prepare_sat.py writes it")
    parser.add_argument("--limit", type=positive, help="only so many questions, always the same")
    parser.add_argument("--batch_size", type=int, default=32, help="questions decoded together")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="tokens at most per answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, as in the paper")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling, if temperature is above 0")
    parser.add_argument("--strict", action="store_true", help="grade as training does: answer blocks only")
    parser.add_argument("--no_reasoning", action="store_true", help="the paper's prompt for a direct answer")
    parser.add_argument("--output_dir", default="results", help="where every answer is kept")
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.model is None:
        args.model = checkpoints(args.run or Path("runs/toy"), only_ends=args.run is None)
    if args.run:
        scores = args.run / "eval_full.jsonl"
        scores.unlink(missing_ok=True)
    for path in args.data:
        questions = load_benchmark(path, args.limit)
        for name in args.model:
            records = evaluate(name, path, questions, args)
            if args.run:
                step = re.fullmatch(r"checkpoint-(\d+)", Path(name).name)
                append_score(scores, int(step[1]) if step else 0, path, records)
    if args.run:
        draw_curves(args.run, scores)
        print(f"drawn from these scores: {args.run}/curves.png")


def checkpoints(run, only_ends):
    """-> the model that a run started from and its checkpoints in order; or only its start and its final/."""
    if not (run / "config.json").exists() or only_ends and not (run / "final").exists():
        fail(f"{run} is not a finished run; `python grpo_vision.py` makes one, or name a --model")
    start = json.loads((run / "config.json").read_text())["model_name_or_path"]
    saved = sorted(run.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
    return [start, *map(str, [run / "final"] if only_ends else saved)]


def evaluate(name, path, questions, args):
    """One model on one set: answers go to results/MODEL/DATA-MODE.jsonl as they come -> records."""
    tokenizer, image_processor = load_processors(name)
    model = load_model(name).to("cuda" if torch.cuda.is_available() else "cpu")
    set_threads(model)
    mode, template = ("direct", DIRECT_PROMPT) if args.no_reasoning else ("reasoning", BASE_PROMPT)
    answers = answer_questions(model, tokenizer, image_processor, questions, template, args.batch_size,
                               args.max_new_tokens, args.temperature, args.seed, args.strict)
    file = Path(args.output_dir) / slug(name) / f"{slug(path)}-{mode}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    records = []
    with open(file, "w") as out, tqdm(total=len(questions), desc=f"{name} on {path}") as bar:
        for record in answers:
            records.append(record)
            out.write(json.dumps(record) + "\n")
            bar.set_postfix_str(f"{accuracy(records)[0]:.1f} % right")
            bar.update()
    print(table(f"{name} on {path}, {mode}", summarise(records)) + f"    every answer: {file}\n")
    return records


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def slug(path):
    return re.sub(r"[^\w.-]+", "-", str(path)).strip("-")


if __name__ == "__main__":
    main()
