"""CV-Bench by the paper's protocol: greedy, the answer block or else the whole text; every answer is kept.

    python eval_cvbench.py                       # the last toy run and its base, on the toy's two sets
    python eval_cvbench.py --run runs/toy        # every checkpoint of a run, and its curves from these scores
    python eval_cvbench.py --model runs/sat/final --data nyu-visionx/CV-Bench --modes all
    accelerate launch eval_cvbench.py ...        # on all GPUs: each process takes every n-th question
    python eval_cvbench.py --data toy/test.parquet --temperature 1 --strict     # graded as in training
    python eval_cvbench.py --compare A/answers.jsonl B/answers.jsonl            # is B better than A?
    python eval_cvbench.py --ask "What is left of the tree?" --image photo.jpg --model runs/sat/final

It reads CV-Bench (a hub id, or a folder of its Parquet files) and, for held-out questions of the training
kind, a file as prepare_sat.py writes it. A CV-Bench row:

    idx 0, type "2D", task "Count", image <PNG>, question "How many ...?", choices ["2", "3"], answer "(B)",
    prompt "How many ...? Select from the following choices.\\n(A) 2\\n(B) 3", source "ADE20K", ...

Every answer goes to answers.jsonl in a folder under results/, as it comes. The folder's name holds the model,
the data, the mode and a fingerprint of weights, settings and questions, so the same command goes on where it
was stopped. Beside the answers lie summary.json, summary.md and report.html, which shows wrong answers.
"""
import argparse
import base64
import hashlib
import html
import io
import json
import re
import sys
from collections import defaultdict, namedtuple
from dataclasses import asdict
from datetime import timedelta
from math import comb, inf, isfinite
from pathlib import Path
from statistics import NormalDist, mean, stdev

import datasets
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from grpo_vision import (ANSWER_BLOCK, HERE, IMAGE_TOKENS, PRESETS, RUNS, TEMPLATES, absolute, build_prompts,
                         build_question, checkpoints, choose, choose_prompt, completion_text, extract_answer,
                         fail, grade, load_model, load_processors, math_reward, normalise, render, sample,
                         seeded, set_threads)
from prepare_sat import open_image, prompt_length, read_parquet

# ---- The questions ---------------------------------------------------------------------------------------

def load_questions(path, limit=None):
    """CV-Bench (hub id, folder or file) or a file of the training layout -> list of questions, each a dict of
    id, where, task, source, images, text (what the template is filled with), options, answer (an option)."""
    files = sorted(Path(path).glob("*.parquet")) if Path(path).is_dir() else [Path(path)]
    if Path(path).exists():
        table = read_parquet(files or [Path(path) / "*.parquet"])
    else:
        try:
            table = datasets.load_dataset(path, split="test")
        except Exception as error:  # datasets raises many kinds for what it cannot find or read
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            fail(f"the questions of {path} cannot be read: {reason}")
    cvbench = "choices" in table.column_names
    needed = "image prompt choices answer task source" if cvbench else "images question options answer"
    if missing := sorted(set(needed.split()) - set(table.column_names)):
        fail(f"{path} has no column {missing[0]!r} ({', '.join(table.column_names)})")
    raw = datasets.Image(decode=False)
    table = table.cast_column("image", raw) if cvbench else table.cast_column("images", datasets.List(raw))
    parse, n = parse_cvbench if cvbench else parse_training_row, min(limit or len(table), len(table))
    chosen = sorted(seeded("questions").sample(range(len(table)), n))  # drawn: files are sorted by task
    return [{"id": i, "where": f"{path}, row {i}", **parse(table[i], f"{path}, row {i}")} for i in chosen]


def parse_cvbench(row, where):
    row["image"] = row["image"] if any((row["image"] or {}).values()) else None
    for name in "image prompt choices answer task source".split():
        if not row[name]:
            fail(f"{where}: {name} is empty. Remove the row.")
    letter, choices = re.fullmatch(r"\(([A-Z])\)", row["answer"].strip()), row["choices"]
    number = ord(letter[1]) - ord("A") if letter else len(choices)
    if number >= len(choices):
        fail(f"{where}: its answer {row['answer']!r} is none of {len(choices)} choices. Remove the row.")
    return {"task": row["task"], "source": row["source"], "images": [row["image"]], "text": row["prompt"],
            "options": choices, "answer": choices[number]}


def parse_training_row(row, where):
    if not row["question"] or row["answer"] not in (row["options"] or [row["answer"]]):
        fail(f"{where}: its question is empty or its answer {row['answer']!r} is not one of its options.")
    return {"task": row.get("question_type") or "all", "source": "held-out", "images": row["images"] or [],
            "text": build_question(row["question"], row["options"]), "options": row["options"] or [],
            "answer": row["answer"]}


# ---- The answers -----------------------------------------------------------------------------------------

# The base prompt as a chat template, which checkpoints carry: a server then asks as the policy was trained.
# It tells no role from another, so that it does not make the model an instruct model.
SERVED_PROMPT = (
    "{%- for message in messages -%}"
    "{%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string "
    "else message.content -%}{%- set images = parts | selectattr('type', 'equalto', 'image') | list -%}"
    "{%- for image in images -%}{% if images | length > 1 %}Picture {{ loop.index }}: {% endif %}"
    + IMAGE_TOKENS + "{%- endfor -%}" + TEMPLATES["base"].replace(
        "{question}", "{% for part in parts if part.type == 'text' %}{{ part.text }}{% endfor %}{{ '' }}")
    + "{%- endfor -%}")

# How a question is asked: the template, and what is put behind a CV-Bench prompt; all are the paper's.
MODES = {
    "base-reasoning": ("base", ""),
    "base-direct": ("base-direct", ""),
    "instruct-reasoning": ("instruct-direct", "\nOutput the thinking process in <think> </think> and final "
                                              "answer in <answer> </answer> tags."),
    "instruct-direct": ("instruct-direct", ""),
}


def choose_modes(names, tokenizer):
    """--modes -> names of MODES; reasoning and direct: in the form that the chat template asks for, as in
    training; all: every mode that the model admits. An instruct prompt needs a template with roles."""
    kind, modes = choose_prompt(tokenizer), []
    admitted = [mode for mode in MODES if kind == "instruct" or mode.startswith("base")]
    for name in names:
        modes += admitted if name == "all" else [name if name in MODES else f"{kind}-{name}"]
    if refused := set(modes) - set(admitted):
        fail(f"--modes {refused.pop()}: the model has no chat template that tells user from assistant; "
             f"choose from: {', '.join(admitted)}")
    return list(dict.fromkeys(modes))


def prompt_text(question, mode, tokenizer):
    template, ending = MODES[mode]
    if ending and question["source"] == "held-out":  # of the training kind, so in the words of training
        template, ending = "instruct", ""
    return render(question["text"] + ending, len(question["images"]), template, tokenizer)


def answer_questions(model, tokenizer, image_processor, questions, mode, batch_size=32, max_new_tokens=1024,
                     temperature=0.0, seed=0, strict=False):
    """Yield one record per question; greedy unless temperature > 0. Batches hold questions of like length,
    the longest first: if memory does not suffice, it shows at once."""
    length = lambda q: prompt_length(q["text"], q["images"], q["where"], tokenizer, image_processor)
    order = sorted(questions, key=lambda q: (-length(q), q["id"]))
    for first in range(0, len(order), batch_size):
        batch = order[first:first + batch_size]
        texts = [prompt_text(q, mode, tokenizer) for q in batch]
        images = [[open_image(image, q["where"]) for image in q["images"]] for q in batch]
        passes = [build_prompts(texts[i:i + 8], images[i:i + 8], tokenizer, image_processor, model, first=i)
                  for i in range(0, len(batch), 8)]
        number = seeded(seed, "answers", mode, batch[0]["id"]).getrandbits(63)
        generator = torch.Generator(model.device).manual_seed(number)
        rollout = sample(model, passes, 1, max_new_tokens, temperature, generator)
        for row, (q, text) in enumerate(zip(batch, texts)):
            tokens = rollout.completion_ids[row, rollout.completion_mask[row]]
            record = {key: q[key] for key in ("id", "task", "source", "options", "answer")}
            record |= {"mode": mode, "prompt": text, "completion": completion_text(text, tokens, tokenizer),
                       "length": len(tokens), "finished": bool(rollout.finished[row])}
            yield with_verdict(record, strict)


# ---- Grading: as in training, but right in a wrong form counts -------------------------------------------

def read_answer(text, strict=False):
    """The answer in a completion, or None. strict: as in training. Else: what is inside the last answer
    block, else what follows the last </think> (not in the paper's code), else the whole text.

    >>> read_answer("it is 2"), read_answer("it is 2", strict=True)
    ('it is 2', None)
    """
    if strict:
        return extract_answer(text)
    if blocks := ANSWER_BLOCK.findall(text):
        return blocks[-1].strip() or None
    return text.rpartition("</think>")[2].strip() or text.strip() or None


NUMBERS = dict(zip("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
                   "fifteen sixteen seventeen eighteen nineteen twenty".split(), map(str, range(21))))
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MARKUP = re.compile(r"\*+|`+|__+|</?\w+>|\\boxed")
CONCLUSION = re.compile(r"\b(?:answer|choice|option)(?: is\b|:)")
# a letter that opens an answer, and what follows it: "(b) because ...", "b. left", "b, as ..."
OPENING = re.compile(r"(?:\(([a-z])\)|([a-z])[).:,])\s*(.*)", re.DOTALL)
# how a sentence names a letter: (c), or "answer is c"; "a" is also an article
NAMED_LETTER = re.compile(r"\(([a-z])\)|^([a-z])[).:] |\b(?:answer|option|choice)(?: is|:)? "
                          r"\(?(?:([b-z])\b|(a)(?=[).,:;]|$))")


def read_choice(answer, options):
    """-> the option that `answer` (from `read_answer`) chooses, or None. Markup is taken off first.

    First by `choose`, as in training. Else a sentence chooses the one option that it names after its last
    "answer is"; else the letter that it opens with; else the one option that it names anywhere, by text or
    letter. What names two options chooses none. (The paper's code takes a match anywhere.) Where all options
    are numbers, words count as digits, unless the answer has digits too ("the left one: 3").

    >>> choose("So it is left.", ["right", "left"]), read_choice("So it is left.", ["right", "left"])
    (None, 'left')
    >>> [read_choice(text, ["2", "3"]) for text in ("Three.", "The answer is **B**", "(A) or (B)")]
    ['3', '3', None]
    """
    options = options or []
    answer = MARKUP.sub("", answer or "").translate(str.maketrans("[]{}", "()()")).strip(" ,;:\n")
    if not answer or (chosen := choose(answer, options)) is not None:
        return chosen if answer else None
    answer, texts = normalise(answer), [normalise(option) for option in options]
    if re.fullmatch(r"\(?[a-z]\)?", answer):
        return None  # a letter beyond the options
    by_letter = dict(zip(LETTERS, options))
    digits = lambda text: re.sub("[a-z]+", lambda word: NUMBERS.get(word[0], word[0]), text)
    if all(re.fullmatch(r"\d+", digits(text)) for text in texts):
        texts, answer = list(map(digits, texts)), answer if re.search(r"\d", answer) else digits(answer)
        answer = re.sub(r"(?<![\d.])(\d+)\.0+\b", r"\1", answer)
    by_text = dict(zip(texts, options))

    def named(part):
        """The options that a text names."""
        found = {by_letter.get("".join(groups)) for groups in NAMED_LETTER.findall(part)}
        for text in sorted(texts, key=len, reverse=True):  # "no, it would not" before "no", which it contains
            part, count = re.subn(rf"(?<![\w.]){re.escape(text)}(?!\w|\.\d)", " ", part)
            found |= {by_text[text]} if count else set()
        return found

    conclusion = [found.start() for found in CONCLUSION.finditer(answer)]
    if conclusion and len(found := named(answer[conclusion[-1]:])) == 1:
        return found.pop()
    if opening := OPENING.fullmatch(answer):
        chosen, rest = by_letter.get(opening[1] or opening[2]), opening[3]
        others = [text for text in texts if by_text[text] != chosen and rest.startswith(text)]
        if chosen is not None and not others and not re.search(r"\([a-z]\)|\b(?:or|and) [b-z]\b", rest):
            return chosen
    found = named(answer)
    return found.pop() if len(found) == 1 else None


def with_verdict(record, strict):
    """The record with what its completion is worth, by the grader as it is now."""
    extracted, find = read_answer(record["completion"], strict), choose if strict else read_choice
    if strict and record.get("mode", "").endswith("-direct"):
        extracted = record["completion"].strip()
    correct = grade(extracted, record["answer"], record["options"], find)
    if not record["options"] and extracted:  # a free answer may be right as mathematics
        correct = correct or bool(math_reward(extracted, record["answer"]))
    return {**record, "extracted": extracted, "chosen": find(extracted, record["options"]), "correct": correct}


# ---- Files -----------------------------------------------------------------------------------------------

def read_jsonl(path):
    """-> the records of a file, [] without one. A last line that a killed program left half is left out."""
    records, lines = [], path.read_text().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines) or line.endswith("\n"):
                fail(f"{path}, line {number} is not JSON. Repair the file or move it away.")
    return records


def write_text(path, text, mode="w"):  # "w": all of it or nothing; "a": at the end of what is there
    target = path if mode == "a" else path.with_name(path.name + ".tmp")
    try:
        with open(target, mode) as file:
            file.write(text)
        target.replace(path)
    except OSError as error:
        fail(f"{path} cannot be written ({error}). Make room, then the same command; training: --resume.")


def append_jsonl(path, records):
    write_text(path, "".join(json.dumps(record) + "\n" for record in records), "a")


def write_jsonl(path, records):
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def digest(value, *blobs):
    """A value that JSON can hold, and bytes -> 12 hex digits."""
    found = hashlib.sha256(json.dumps(value).encode())
    for blob in blobs:
        found.update(blob)
    return found.hexdigest()[:12]


def fingerprint(path):
    """Digests of a file, or of a model folder's weights -> list. A hub id stands for itself."""
    files = [file for file in sorted(Path(path).glob("*.safetensors")) or [Path(path)] if file.is_file()]
    return [hashlib.file_digest(file.open("rb"), "sha256").hexdigest() for file in files] or [str(path)]


def question_digest(q):
    """Changes with anything that a question asks or shows."""
    blobs = [image["bytes"] or Path(image["path"]).read_bytes() for image in q["images"]]
    return digest([q["text"], q["options"], q["answer"]], *blobs)


def short(path):
    """A path as one types it in the script's folder."""
    return str(path).removeprefix(f"{HERE}/")


def slug(path):
    return re.sub(r"[^\w.-]+", "-", short(path)).strip("-")[-80:]  # a file system's names have an end


# ---- The scores ----------------------------------------------------------------------------------------

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

Score = namedtuple("Score", "n value low high chance")  # all but n in percent


def groups_of(records):
    """Records -> {name of a score: [(weight, its records), ...]}: tasks, sources, and means over sources.
    total is the paper's micro-average; 2D, 3D and official = (2D + 3D) / 2 are CV-Bench's own, in which the
    two sources of 2D count the same: 1/2 * ((ADE20K + COCO) / 2 + Omni3D)."""
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


def score_of(parts):
    """[(weight, records), ...] -> Score of the weighted mean of their shares of right answers.
    low, high: the 95 % interval. It is Wilson's for a share, which does not leave 0 .. 100. For a mean of
    shares it comes from their distances to the ends of their own intervals (MOVER: Zou and Donner 2008).
    chance: what a guess among each question's choices would reach."""
    value = below = above = chance = 0
    for weight, records in parts:
        n, p = len(records), mean(bool(r["correct"]) for r in records)
        middle, half = p + Z**2 / (2 * n), Z * (p * (1 - p) / n + Z**2 / (4 * n**2)) ** 0.5
        low, high = ((middle + side * half) / (1 + Z**2 / n) for side in (-1, 1))
        value += weight * p
        below += (weight * (p - low)) ** 2
        above += (weight * (high - p)) ** 2
        chance += weight * mean(1 / len(r["options"]) if r["options"] else 0 for r in records)
    ends = max(value - below**0.5, 0.0), min(value + above**0.5, 1.0)
    return Score(sum(len(records) for _, records in parts), *(100 * x for x in (value, *ends, chance)))


def scores_of(records):
    return {name: score_of(parts) for name, parts in groups_of(records).items()}


def rates_of(records):
    """Records -> {name: percent of answers; mean length in tokens}: how the answers look."""
    rate = lambda test: 100 * mean(bool(test(r)) for r in records)
    return {"unparsed": rate(lambda r: r["chosen"] is None), "truncated": rate(lambda r: not r["finished"]),
            "letter only": rate(lambda r: re.fullmatch(r"\(?[A-Za-z]\)?\.?", r["extracted"] or "")),
            "one answer block": rate(lambda r: extract_answer(r["completion"]) is not None),
            "reflection word": rate(lambda r: REFLECTION.search(r["completion"])),
            "mean length": mean(r["length"] for r in records)}


def sign_test(a, b):
    """Two lists of records of the same questions -> the p-value of the two being equally good, by McNemar's
    exact test: only questions that one got right and the other wrong tell them apart."""
    won = sum(y["correct"] and not x["correct"] for x, y in zip(a, b))
    lost = sum(x["correct"] and not y["correct"] for x, y in zip(a, b))
    return min(1.0, 2 * sum(comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost))


def compare(paths):
    """Two files of answers -> how much better the second is on the questions that both have, printed."""
    a, b = ({r.get("id"): r for r in read_jsonl(path)} for path in paths)
    both = sorted(a.keys() & b.keys())
    if not both or any(a[i].get("question") != b[i].get("question", "") for i in both):  # or are no answers
        fail(f"--compare: {paths[0]} and {paths[1]} hold no answers to the same questions")
    alone = len(a) + len(b) - 2 * len(both)
    print(f"A: {paths[0]}\nB: {paths[1]}\n{len(both)} questions; {alone} that only one has are left out")
    of_a, of_b = (groups_of([records[i] for i in both]) for records in (a, b))
    for name, parts in of_a.items():
        one, two = score_of(parts).value, score_of(of_b[name]).value
        p = f"   p = {sign_test(parts[0][1], of_b[name][0][1]):.2g}" if len(parts) == 1 else ""
        print(f"    {name:24s} A {one:5.1f}   B {two:5.1f}   B - A {two - one:+5.1f}{p}")


# ---- The report ------------------------------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem }}
h2 {{ border-bottom: 1px solid #ccc; margin-top: 2.5rem }}
table {{ border-collapse: collapse; margin: .5rem 0 }}
td, th {{ padding: .25rem .5rem; text-align: right; vertical-align: top }}
td:first-child, th:first-child {{ text-align: left }}
pre, td.text {{ white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: 13px }}
.question {{ display: flex; gap: 1rem; margin: 1.2rem 0 .4rem }}
.question img {{ max-width: 14rem; max-height: 14rem; border: 1px solid #ccc; align-self: start }}
.right, .up {{ background: #d9f2d9 }} .wrong, .down {{ background: #fbe0dd }} .zero {{ background: #f4f4f4 }}
</style>
<h1>{title}</h1>
{body}</html>"""


def write_page(path, title, body):
    """HTML fragments, whose text is escaped -> a page that needs no other file."""
    write_text(path, PAGE.format(title=html.escape(title), body="\n".join(body)))


def html_table(rows):
    line = lambda tag, cells: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    lines = [line("th", rows[0]), *(line("td", row) for row in rows[1:])]
    return "<table>" + "".join(f"<tr>{cells}</tr>" for cells in lines) + "</table>"


def markdown_table(rows):
    """Rows of text, the heading first -> Markdown with aligned columns"""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def image_html(picture, side=320):
    """PIL image -> <img> with a small PNG or JPEG inside, so that the page needs no other file."""
    picture.thumbnail((side, side))
    kind, buffer = "PNG" if max(picture.size) <= 96 else "JPEG", io.BytesIO()
    picture.save(buffer, kind)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="the image" src="data:image/{kind.lower()};base64,{data}">'


def question_html(pictures, asked, options, answer, said=""):
    return (f'<div class="question">{"".join(map(image_html, pictures))}<div>{asked}<br>'
            f'Options: {html.escape(", ".join(options or []))}<br>'
            f'Right answer: <span class="right">{html.escape(answer)}</span><br>{said}</div></div>')


def legend_html(data_path):
    """A legend.png beside the data, or one folder up, explains what its pictures show."""
    folder = Path(data_path) if Path(data_path).is_dir() else Path(data_path).parent
    found = [path / "legend.png" for path in (folder, folder.parent) if (path / "legend.png").exists()]
    return f"<p>What is what:</p>{image_html(Image.open(found[0]), 640)}" if found else ""


def tables_of(records):
    """Records -> tables, each rows of text, the heading first: scores, rates and, if the questions are all of
    CV-Bench's, the paper's scores. No other set compares with them."""
    scores, rates = scores_of(records), rates_of(records)
    tables = [[["score", "% right", "95 % interval", "chance", "questions"]],
              [["% of answers; tokens", ""], *([name, f"{value:.1f}"] for name, value in rates.items())]]
    for name, s in scores.items():
        tables[0].append([name, f"{s.value:.1f}", f"{s.low:.1f} .. {s.high:.1f}", f"{s.chance:.1f}", str(s.n)])
    if PUBLISHED.items() <= {name: s.n for name, s in scores.items()}.items():
        tasks = "Count Relation Depth Distance total".split()
        systems = {"here": [scores[task].value for task in tasks]} | PAPER
        tables.append([["paper, % right", *tasks]] + [[name, *(f"{value:.2f}" for value in values)]
                                                      for name, values in systems.items()])
    return tables


def write_report(folder, title, records, questions, data_path, most=25):
    """Records -> FOLDER/summary.json, summary.md and report.html. The page shows at most `most` wrong answers
    of each task, drawn with a seed, or it would not open. All text is escaped."""
    scores = {name: score._asdict() for name, score in scores_of(records).items()}
    write_text(folder / "summary.json", json.dumps({"scores": scores, "rates": rates_of(records)}, indent=1))
    write_text(folder / "summary.md", "\n".join([f"# {title}\n", *map(markdown_table, tables_of(records))]))
    body = [*map(html_table, tables_of(records)), legend_html(data_path)]
    asked, wrong = {q["id"]: q for q in questions}, defaultdict(list)
    for r in records:
        if not r["correct"] and r["id"] in asked:
            wrong[r["task"]].append(r)
    for task, some in wrong.items():
        body.append(f"<h2>{html.escape(task)}: {len(some)} wrong</h2>")
        for r in sorted(seeded("report").sample(some, min(most, len(some))), key=lambda r: r["id"]):
            said, q = r["chosen"] or f"no choice: {(r['extracted'] or 'nothing')[:80]}", asked[r["id"]]
            body.append(question_html(
                [open_image(image, q["where"]) for image in q["images"]],
                f'Question {r["id"]}<pre>{html.escape(q["text"])}</pre>', q["options"], r["answer"],
                f'Chosen: <span class="wrong">{html.escape(said)}</span>{" (cut off)" * (not r["finished"])}'
                f'<pre>{html.escape(r["completion"])}</pre>'))
    write_page(folder / "report.html", title, body)


# ---- A training run: its logs, curves.png and rollouts.html ----------------------------------------------

def open_logs(run, done):
    """config.json and fingerprints.json of the run, and its logs as they were after `done` steps, as a killed
    run may have logged more. A run must go on with the data and the model that it began with."""
    cfg, folder = run.cfg, run.output_dir
    prints = {"data": fingerprint(run.data.path), "model": fingerprint(cfg.model_name_or_path)}
    if done and (folder / "fingerprints.json").exists():
        for name, begun in json.loads((folder / "fingerprints.json").read_text()).items():
            if begun != prints[name]:
                fail(f"--resume: {folder} began with another {name}. Give the old one, or start a new run.")
    write_text(folder / "config.json", json.dumps(asdict(cfg), indent=2))
    write_text(folder / "fingerprints.json", json.dumps(prints))
    for name in ("metrics.jsonl", "completions.jsonl", "eval.jsonl"):  # done 0: step 0 is evaluated anew
        write_jsonl(folder / name, [r for r in read_jsonl(folder / name) if r["step"] <= (done or -1)])


def summarise(run, step, came):
    """What came of a step -> its metrics, and its completions as records, both over all processes."""
    G, lengths, batch = run.cfg.num_generations, came.rollout.lengths.tolist(), came.batch
    samples = gather_object([
        {"step": step, "row": batch.numbers[i // G], "prompt": batch.texts[i // G], "completion": text,
         "answer": batch.rows[i // G]["answer"], "length": lengths[i],
         "finished": bool(came.rollout.finished[i]),
         **{f"rewards/{name}": values[i].item() for name, values in came.rewards.items()},
         "reward": sum(values[i].item() for values in came.rewards.values()),
         "advantage": came.advantages[i].item()} for i, text in enumerate(came.rollout.texts)])
    sums = gather_object([came.sums])
    average = lambda name: mean(sample[name] for sample in samples)
    tokens, rewards = sum(sample["length"] for sample in samples), [sample["reward"] for sample in samples]
    groups = [rewards[i:i + G] for i in range(0, len(rewards), G)]
    per_token = lambda name: sum(part[name] for part in sums) / tokens
    metrics = {
        "step": step, "loss": mean(part["loss"] for part in sums), "reward": average("reward"),
        "reward_std": mean(stdev(group) if G > 1 else 0.0 for group in groups),
        **{name: average(name) for name in samples[0] if name.startswith("rewards/")},
        "completions/mean_length": tokens / len(samples),
        "completions/clipped_ratio": 1 - average("finished"),
        "frac_reward_zero_std": mean(max(group) == min(group) for group in groups),
        **{name: per_token(name) for name in ("kl", "entropy", "clip_ratio")},
        "grad_norm": sums[0]["grad_norm"], "learning_rate": run.optimizer.param_groups[0]["lr"],
        **{f"seconds/{phase}": end - begin for phase, begin, end in
           zip(("rollout", "reference", "update"), came.clock, came.clock[1:])}}
    if run.cfg.algorithm == "sft":
        return metrics | {"nll": per_token("nll")}, samples
    return metrics | {"sampler_mismatch": per_token("mismatch"),
                      "sampler_mismatch_max": max(part["mismatch_max"] for part in sums)}, samples


def log_step(run, step, came):
    """What came of a step -> the logs, and a line to read. A gradient that is not finite ends the run."""
    metrics, samples = summarise(run, step, came)
    is_main, folder = run.accelerator.is_main_process, run.output_dir
    if not isfinite(metrics["grad_norm"]):
        append_jsonl(folder / "bad_batch.jsonl", samples if is_main else [])
        fail(f"step {step}: gradient norm {metrics['grad_norm']}. Lower --learning_rate, then --resume. The "
             f"batch is in {folder}/bad_batch.jsonl")
    if is_main:
        append_jsonl(folder / "metrics.jsonl", [metrics])
        append_jsonl(folder / "completions.jsonl", samples)
        rewards = "  ".join(f"{name.removeprefix('rewards/')} {value:.2f}" for name, value in metrics.items()
                            if name.startswith("rewards/"))
        seconds = sum(value for name, value in metrics.items() if name.startswith("seconds/"))
        tqdm.write(f"step {step:4d}  reward {metrics['reward']:.2f}  {rewards}  length "
                   f"{metrics['completions/mean_length']:.1f}  kl {metrics['kl']:.3f}  {seconds:.1f} s")


def load_sets(paths, limit):
    """Comma-separated sets -> {path: questions}, the same `limit` questions of each every time."""
    return {path: load_questions(path, limit) for path in paths.split(",")}


def evaluate_policy(run, step):
    """While training: ask the sampler fixed questions, greedily, each process its share -> eval.jsonl"""
    rank, count = run.accelerator.process_index, run.accelerator.num_processes
    mode = run.template if run.template in MODES else f"{run.template}-reasoning"
    for name, questions in run.eval_sets.items():
        mine = questions[rank::count]
        answers = answer_questions(run.sampler, run.tokenizer, run.image_processor, mine, mode,
                                   max_new_tokens=run.cfg.max_completion_length)
        records = gather_object(list(tqdm(answers, f"evaluation on {short(name)}", total=len(mine),
                                          leave=False, disable=rank > 0)))
        if rank == 0:
            append_score(run.output_dir / "eval.jsonl", step, name, records)


def show(run):
    """Bring the picture and the page up to date. What cannot be drawn must not stop the training."""
    if run.accelerator.is_main_process:
        try:
            draw_curves(run.output_dir)
            write_rollouts(run.output_dir, run.data)
        except (Exception, SystemExit) as error:
            print(f"warning: curves.png or rollouts.html could not be made: {error!r}", file=sys.stderr)


def append_score(path, step, name, records):
    n, p = len(records), mean(bool(r["correct"]) for r in records)
    append_jsonl(path, [{"step": step, "set": short(name), "questions": n, "accuracy": 100 * p,
                         "standard_error": 100 * (p * (1 - p) / n) ** 0.5,
                         "mean_length": mean(r["length"] for r in records)}])


def report_run(run):
    """The end of a training run: what came of it, where it lies, and what to do next."""
    if not run.accelerator.is_main_process:
        return
    folder, scores = short(run.output_dir), read_jsonl(run.output_dir / "eval.jsonl")
    for name in dict.fromkeys(s["set"] for s in scores):
        first, *_, last = [s for s in scores if s["set"] == name] * 2
        print(f"{name}: {first['accuracy']:.1f} -> {last['accuracy']:.1f} % right, greedy, "
              f"± {last['standard_error']:.1f} on {last['questions']} questions")
    data = run.cfg.eval_data
    on = "" if data == PRESETS["toy"]["eval_data"] else f" --data {data.replace(',', ' ')}"
    on += " --modes direct" if run.template.endswith("-direct") else ""
    print(f"model:    {folder}/final\nlook at:  {folder}/curves.png  {folder}/rollouts.html")
    print(f"try next: python eval_cvbench.py --run {folder}{on}    # every checkpoint on all questions")


def smooth(values, width):
    """Running mean over about `width` values around each; over fewer at the ends."""
    windows = [values[max(0, i - width // 2):i + width // 2 + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw_curves(run, scores=None):
    """The logs of a run, finished or not (evaluations from the file `scores`) -> RUN/curves.png. After the
    paper's Figure 1: accuracy on fixed questions and mean length of the rollouts by training step."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    metrics, scores = read_jsonl(run / "metrics.jsonl"), read_jsonl(scores or run / "eval.jsonl")
    steps, width = [m["step"] for m in metrics], max(1, len(metrics) // 12)
    reflecting = defaultdict(list)
    for record in read_jsonl(run / "completions.jsonl"):
        reflecting[record["step"]].append(bool(REFLECTION.search(record["completion"])))
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.grid": True, "grid.alpha": 0.25})
    figure, panels = plt.subplot_mosaic([["top"] * 3, [0, 1, 2], [3, 4, 5]], height_ratios=[5, 2, 2],
                                        figsize=(9, 7), layout="constrained")
    top = panels["top"]
    for name in dict.fromkeys(s["set"] for s in scores):
        line = [s for s in scores if s["set"] == name]
        x, y, error = ([s[key] for s in line] for key in ("step", "accuracy", "standard_error"))
        label = f"accuracy on {Path(name).stem} ({line[0]['questions']} questions)"
        top.errorbar(x, y, error, fmt="o-", ms=4, elinewidth=0.8, label=label)
    top.set(xlabel="training step", ylabel="accuracy, % (bar: 1 standard error)", ylim=(0, 100))
    right = top.twinx()
    lengths = [m["completions/mean_length"] for m in metrics]
    right.plot(steps, lengths, color="tab:red", lw=0.8, alpha=0.35)
    right.plot(steps, smooth(lengths, width), color="tab:red", lw=2, label="response length of the rollouts")
    right.set(ylabel="tokens", ylim=(0, 1.15 * max(lengths)))
    right.grid(False)
    handles = [axis.get_legend_handles_labels() for axis in (top, right)]
    top.legend(*(a + b for a, b in zip(*handles)), loc="lower right", framealpha=0.9)
    parts = [key for key in metrics[0] if key.startswith("rewards/")]
    curves = [("reward", {key.removeprefix("rewards/"): [m[key] for m in metrics] for key in parts}),
              ("KL to the reference, per token", {"": [m["kl"] for m in metrics]}),
              ("entropy per token, nats", {"": [m["entropy"] for m in metrics]}),
              ("groups without spread", {"": [m["frac_reward_zero_std"] for m in metrics]}),
              ("rollouts with a reflection word", {"": [mean(reflecting[step]) for step in steps]}),
              ("rollouts cut at the token limit", {"": [m["completions/clipped_ratio"] for m in metrics]})]
    for number, (title, lines) in enumerate(curves):
        panel = panels[number]
        for label, values in lines.items():
            faint, = panel.plot(steps, values, lw=0.7, alpha=0.35)
            panel.plot(steps, smooth(values, width), color=faint.get_color(), label=label)
        panel.set_title(title, fontsize=9)
        panel.set_ylim(bottom=0)
        if len(lines) > 1:
            panel.legend(fontsize=8)
    figure.savefig(run / "curves.png", dpi=130)
    plt.close(figure)


def write_rollouts(run, data, most_steps=8, most_questions=2):
    """RUN/completions.jsonl and the data -> RUN/rollouts.html: a few groups of a few steps on one page. All
    text is escaped: a completion that contains markup shows as text."""
    groups_at = defaultdict(lambda: defaultdict(list))  # step -> row number -> completions
    for record in read_jsonl(run / "completions.jsonl"):
        groups_at[record["step"]][record["row"]].append(record)
    steps = sorted(groups_at)
    shown = dict.fromkeys(steps[round(i * (len(steps) - 1) / (most_steps - 1))] for i in range(most_steps))
    body = ["<p>What the policy answered to a few training questions as it learned. A table is a group, the "
            "completions of one prompt. Green rows did better than their group and are made likelier. Red "
            "rows are made less likely. The advantage says how much. Grey rows teach nothing: their group got "
            "one reward.</p>", legend_html(data.path)]
    for step in shown:
        body.append(f"<h2>Step {step}</h2>")
        # those with spread first: where all completions score the same there is little to see
        groups = sorted(groups_at[step].values(), key=lambda group: len({s["reward"] for s in group}) == 1)
        for group in groups[:most_questions]:
            row = data[group[0]["row"]]
            asked = html.escape(row["question"])
            body.append(question_html(row["images"], asked, row["options"], row["answer"]))
            names = [key for key in group[0] if key.startswith("rewards/")]
            heads = "".join(f"<th>{html.escape(name.removeprefix('rewards/'))}</th>" for name in names)
            body.append(f"<table><tr><th>completion</th>{heads}<th>tokens</th><th>advantage</th></tr>")
            for one in group:
                sign = "up" if one["advantage"] > 0 else "down" if one["advantage"] < 0 else "zero"
                cells = "".join(f"<td>{one[name]:g}</td>" for name in names)
                cells += f'<td>{one["length"]}</td><td>{one["advantage"]:+.2f}</td>'
                said = html.escape(one["completion"])
                body.append(f'<tr class="{sign}"><td class="text">{said}</td>{cells}</tr>')
            body.append("</table>")
    write_page(run / "rollouts.html", f"Rollouts of {short(run)}", body)


# ---- The command -----------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, toy_sets = parser.add_argument, PRESETS["toy"]["eval_data"].split(",")
    add("--model", nargs="+", help="folders or hub ids; default: the last runs/toy*/final and its base")
    add("--run", type=Path, help="every checkpoint of this training run instead")
    add("--data", nargs="+", default=toy_sets, help="CV-Bench, or files as prepare_sat.py writes them")
    add("--modes", nargs="+", default=["reasoning"], choices=["all", "reasoning", "direct", *MODES],
        help="how to ask; reasoning, direct: in the model's kind of prompt")
    add("--limit", type=int, help="only so many questions, always the same")
    add("--batch_size", type=int, default=32, help="questions decoded together")
    add("--max_new_tokens", type=int, default=1024, help="tokens at most per answer")
    add("--max_pixels", type=int, help="larger images are shrunk; default: as in the run's training")
    add("--temperature", type=float, help="default: 0, greedy, as the paper; 0.6 with --ask")
    add("--seed", type=int, default=0, help="seed of sampling, if temperature is above 0")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU")
    add("--strict", action="store_true", help="grade as training does: answer blocks only")
    add("--output_dir", type=Path, default=HERE / "results", help="where answers are kept")
    add("--regrade", nargs="+", type=Path, metavar="FILE", help="grade kept answers again")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="kept answers: how much better is B?")
    add("--ask", metavar="QUESTION", help="a question of your own, to the last --model")
    add("--image", nargs="+", default=[], help="images that --ask is about")
    add("--top_p", type=float, default=0.95, help="with --ask: of the likeliest tokens")
    args = parser.parse_args(argv)
    for flag in "limit", "batch_size", "max_new_tokens", "max_pixels":
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            fail(f"--{flag} must be at least 1")
    if args.image and not args.ask or args.ask == "" or args.run and args.model:
        fail("--ask needs a question, --image needs --ask, and --run takes no --model")
    if not 0 <= (args.temperature or 0) < inf or not 0 < args.top_p <= 1:
        fail("--temperature must be at least 0, and --top_p above 0 and at most 1")
    args.data = [absolute(path) for path in args.data]
    args.model = args.model and [absolute(path) for path in args.model]
    return args


def main(argv=None):
    args = parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.compare:
        return compare(args.compare)
    if args.regrade:
        return regrade(args.regrade, args.strict)
    # processes meet at the end only, however slow one is; cpu: or without a GPU each would think itself alone
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
    args.dtype = args.dtype or ("bfloat16" if state.device.type == "cuda" else "float32")
    if args.model is None:
        last = max(RUNS.glob("toy*/final"), key=lambda path: path.stat().st_mtime, default=RUNS / "toy/final")
        args.model, max_pixels = models_of(args.run or last.parent, only_ends=args.run is None)
        args.max_pixels = args.max_pixels or max_pixels
    if args.ask:
        return ask(args, state.device)
    args.temperature = args.temperature or 0.0
    sets = {path: load_questions(path, args.limit) for path in args.data}
    files = defaultdict(list)  # (set, mode) -> answers of each model
    scores = args.run / "eval_full.jsonl" if args.run and state.is_main_process else None
    if scores:
        scores.unlink(missing_ok=True)
    for name in args.model:
        model, tokenizer, image_processor = load(name, args, state.device)
        for path, questions in sets.items():
            for mode in choose_modes(args.modes, tokenizer):
                records, file = evaluate(name, path, questions, mode, model, tokenizer, image_processor, args,
                                         state)
                files[path, mode].append(short(file))
                if scores and mode == choose_modes(args.modes, tokenizer)[0]:
                    step = re.fullmatch(r"checkpoint-(\d+)", Path(name).name)
                    append_score(scores, int(step[1]) if step else 0, path, records)
    if scores:
        draw_curves(args.run, scores)
        print(f"drawn from these scores: {args.run}/curves.png")
    for found in files.values():
        if len(found) > 1 and state.is_main_process:
            print(f"to compare: python eval_cvbench.py --compare {found[0]} {found[-1]}")


def models_of(run, only_ends):
    """-> the models of a run, its start and its checkpoints or (only_ends) final/; and its max_pixels."""
    trained = [run / "final"] if only_ends else checkpoints(run)
    if not (run / "config.json").exists() or not trained or not trained[0].exists():
        fail(f"{run} is not a finished run; `python grpo_vision.py` makes one, or name a --model")
    config = json.loads((run / "config.json").read_text())
    return [config["model_name_or_path"], *map(str, trained)], config["max_pixels"]


def load(name, args, device):
    tokenizer, image_processor = load_processors(name, max_pixels=args.max_pixels)
    model = load_model(name, tokenizer, dtype=getattr(torch, args.dtype)).to(device)
    set_threads(model)
    return model, tokenizer, image_processor


def evaluate(name, path, questions, mode, model, tokenizer, image_processor, args, state):
    """One model on one set -> records (in the first process) and the file that has them. Each process takes
    every n-th question and writes a file of its own, which the first one takes over at the end."""
    known = {q["id"]: question_digest(q) for q in questions}
    settings = [sorted(dict(image_processor.size).items()), args.dtype, args.max_new_tokens, args.temperature,
                args.seed if args.temperature else None, args.strict, MODES[mode], sorted(known.items())]
    folder = args.output_dir / f"{slug(name)}--{slug(path)}--{mode}--{digest([fingerprint(name), settings])}"
    folder.mkdir(parents=True, exist_ok=True)
    kept = lambda: {r["id"]: r for file in sorted(folder.glob("answers*.jsonl")) for r in read_jsonl(file)}
    done = kept()
    state.wait_for_everyone()  # all have read before one writes
    mine = folder / f"answers.rank{state.process_index}.jsonl"
    if mine.exists():
        write_jsonl(mine, read_jsonl(mine))  # without half a line, at which a killed program left it
    todo = [q for q in questions[state.process_index::state.num_processes] if q["id"] not in done]
    answers = answer_questions(model, tokenizer, image_processor, todo, mode, args.batch_size,
                               args.max_new_tokens, args.temperature, args.seed, args.strict)
    verdicts, title = [], f"{short(name)} on {short(path)}, {mode}" + ", graded as in training" * args.strict
    with tqdm(answers, title, len(todo), disable=not state.is_main_process) as bar:
        for record in bar:
            append_jsonl(mine, [{**record, "question": known[record["id"]]}])
            verdicts.append(record["correct"])
            bar.set_postfix_str(f"{100 * sum(verdicts) / len(verdicts):.1f} % right", refresh=False)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None, folder / "answers.jsonl"
    records = [with_verdict(record, args.strict) for _, record in sorted(kept().items())]
    write_jsonl(folder / "answers.jsonl", records)
    for file in folder.glob("answers.rank*.jsonl"):
        file.unlink()
    write_report(folder, title, records, questions, path)
    print(title, *map(markdown_table, tables_of(records)), sep="\n")
    print(f"every answer, summary.md and report.html: {short(folder)}\n")
    return records, folder / "answers.jsonl"


def regrade(files, strict):
    """Files of answers -> the same with the verdicts of the grader as it is now."""
    for file in files:
        records = read_jsonl(file)
        if not records or "options" not in records[0]:
            fail(f"--regrade: {file} has no answers. Give files like results/NAME/answers.jsonl.")
        records = [with_verdict(record, strict) for record in records]
        write_jsonl(file, records)
        print(file, *map(markdown_table, tables_of(records)), sep="\n")


def ask(args, device):
    """Answer one question, printed as it comes; temperature 0.6 and top_p 0.95 are Vision-R1's."""
    model, tokenizer, image_processor = load(args.model[-1], args, device)
    images = [open_image({"bytes": None, "path": file}, f"--image {file}") for file in args.image]
    question = {"text": args.ask, "images": images, "source": "asked"}
    text = prompt_text(question, choose_modes(args.modes, tokenizer)[0], tokenizer)
    prompt = build_prompts([text], [images], tokenizer, image_processor, model)
    print(completion_text(text, [], tokenizer), end="", flush=True)
    temperature = 0.6 if args.temperature is None else args.temperature
    ids = stream(model, tokenizer, prompt, temperature, args.top_p, args.max_new_tokens, args.seed)
    answer = extract_answer(completion_text(text, ids, tokenizer))
    if ids[-1] not in model.eos_ids:
        print(f"(cut off: --max_new_tokens {args.max_new_tokens})")
    print(f"answer: {answer}" if answer else "(no answer block)")


def stream(model, tokenizer, prompt, temperature, top_p, max_new_tokens, seed=0):
    """transformers' own `generate`, printed as it comes -> ids of the completion (C,)"""
    model.generation_config = transformers.GenerationConfig()  # the published one: temperature 0.01, top_k 1
    inputs = dict(input_ids=prompt.input_ids, attention_mask=torch.ones_like(prompt.input_ids),
                  mm_token_type_ids=(prompt.input_ids == model.config.image_token_id).int())
    if prompt.pixel_values is not None:
        inputs |= dict(pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw)
    drawn = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0) if temperature else {}
    torch.manual_seed(seed)
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = model.generate(**inputs, **drawn, max_new_tokens=max_new_tokens, eos_token_id=model.eos_ids,
                         pad_token_id=model.eos_ids[0], streamer=streamer,
                         suppress_tokens=model.suppressed.nonzero()[:, 0].tolist())
    return ids[0, prompt.input_ids.shape[1]:]


if __name__ == "__main__":
    main()
