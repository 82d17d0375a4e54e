"""CV-Bench, the paper's protocol: greedy, the answer block or else the whole text; every answer is kept.

    python eval_cvbench.py                       # runs/toy/final and its base, on the toy's two sets
    python eval_cvbench.py --run runs/toy        # every checkpoint of a run, and its curves from these scores
    python eval_cvbench.py --model runs/sat/final --data nyu-visionx/CV-Bench --modes all
    accelerate launch eval_cvbench.py ...        # on all GPUs: each process takes every n-th question
    python eval_cvbench.py --data data/toy/test.parquet --temperature 1 --strict     # graded as in training
    python eval_cvbench.py --compare A.jsonl B.jsonl     # two kept files: the paired difference
    python eval_cvbench.py --ask "What is left of the tree?" --image photo.jpg --model runs/sat/final

Reads CV-Bench (a hub id, or a folder of Parquet files with its columns: test_2d.parquet, test_3d.parquet)
and, for held-out questions of the training kind, a file as prepare_sat.py writes it. A CV-Bench row looks
like this:

    idx 0, type "2D", task "Count", image <PNG>, question "How many ...?", choices ["2", "3"], answer "(B)",
    prompt "How many ...? Select from the following choices.\\n(A) 2\\n(B) 3", source "ADE20K", ...

Every question's prompt, completion, extracted answer and verdict goes to results/MODEL/DATA/MODE.jsonl as it
comes, and a second start asks only what is missing there. Beside it lie summary.json, summary.md and
report.html, a page with the scores and the wrong answers.
"""
import argparse
import base64
import hashlib
import html
import io
import json
import re
import shutil
import sys
from collections import Counter, defaultdict, namedtuple
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from functools import lru_cache
from math import comb, isfinite
from pathlib import Path
from statistics import NormalDist, mean

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from grpo_vision import (ANSWER_BLOCK, BASE_PROMPT, IMAGE_TOKENS, PRESETS, build_prompt, build_question,
                         checkpoints, choose, choose_prompt, completion_text, end_tokens, extract_answer,
                         fail, grade, load_model, load_processors, normalise, open_image, render, sample,
                         seeded, set_threads, suppressed_tokens, upright)

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
    questions = []
    n = min(limit or len(table), len(table))
    for i in sorted(seeded("questions").sample(range(len(table)), n)):  # drawn: files are sorted by task
        row = table[i]
        question = {"id": i, "where": f"{path}, row {i}", "answer": row["answer"]}
        if cvbench:
            letter = re.fullmatch(r"\(([A-Z])\)", (row["answer"] or "").strip())
            number = ord(letter[1]) - ord("A") if letter else len(row["choices"])
            if number >= len(row["choices"]):
                fail(f"{path}, row {i}: {row['answer']!r} is none of {len(row['choices'])} choices")
            question |= {"task": row["task"], "source": row["source"], "images": [row["image"]],
                         "text": row["prompt"], "options": row["choices"], "answer": row["choices"][number]}
        else:
            if row["answer"] not in (row["options"] or [row["answer"]]):
                fail(f"{path}, row {i}: its answer {row['answer']!r} is not one of its options")
            question |= {"task": row.get("question_type") or "all", "source": "held-out",
                         "images": row["images"] or [], "options": row["options"] or [],
                         "text": build_question(row["question"], row["options"])}
        questions.append(question)
    return questions


def check_counts(path, questions):
    """Warn if these are not as many questions of each task and source as CV-Bench has."""
    found = Counter(q[key] for q in questions for key in ("task", "source"))
    wrong = [f"{found[name]} of {name}, not {count}" for name, count in PUBLISHED.items()
             if found[name] != count]
    if wrong and "held-out" not in found and not path.startswith("data/toy"):  # of CV-Bench's shape only
        print(f"warning: {path} is not CV-Bench as published: it has {'; '.join(wrong)}", file=sys.stderr)


# ---- The answers -----------------------------------------------------------------------------------------

# The base prompt as a chat template, which checkpoints carry: a server then asks as the policy was trained.
# It tells no role from another, so that it does not make the model an instruct model.
SERVED_PROMPT = (
    "{%- for message in messages -%}"
    "{%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string "
    "else message.content -%}{%- set images = parts | selectattr('type', 'equalto', 'image') | list -%}"
    "{%- for image in images -%}{% if images | length > 1 %}Picture {{ loop.index }}: {% endif %}"
    + IMAGE_TOKENS + "{%- endfor -%}" + BASE_PROMPT.replace(
        "{question}", "{% for part in parts if part.type == 'text' %}{{ part.text }}{% endfor %}{{ '' }}")
    + "{%- endfor -%}")

# How a question is asked: the template, and what is put behind a CV-Bench prompt; all are the paper's. Its
# words for instruct models differ from those it trains them with.
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


class Processed:
    """Stands in for the image processor: what it made of a question's images, for prompts of all modes."""
    def __init__(self, images, image_processor, device):
        self.merge_size = image_processor.merge_size
        self.pixels = image_processor(images=images, return_tensors="pt").to(device) if images else None

    def __call__(self, **_):
        return self.pixels


@contextmanager
def remembered_images(model, count):
    """Inside, the vision tower's last `count` outputs are kept: the same tensor does not go through it again.
    (Modes whose prompts begin alike could share keys and values as well; that is not done.)"""
    model.model.get_image_features = lru_cache(count)(model.model.get_image_features)
    try:
        yield
    finally:
        del model.model.get_image_features  # the class's own shows again


def answer_questions(model, tokenizer, image_processor, todo, batch_size=32, max_new_tokens=1024,
                     temperature=0.0, seed=0, strict=False):
    """todo: {mode: questions} -> yield one record per question and mode; greedy unless temperature > 0.

    Batches hold questions of like length, the longest first: if memory does not suffice it shows at once.
    """
    def length(q):  # in tokens, images included
        sizes = [open_image(image, q["where"], decode=False).size for image in q["images"]]
        patches = sum(image_processor.get_number_of_image_patches(height, width) for width, height in sizes)
        return len(tokenizer(q["text"]).input_ids) + patches // image_processor.merge_size**2

    suppressed, eos_ids = suppressed_tokens(model, tokenizer), end_tokens(tokenizer)
    wanted = {mode: {q["id"] for q in questions} for mode, questions in todo.items()}
    questions = {q["id"]: q for questions in todo.values() for q in questions}.values()
    order = sorted(questions, key=lambda q: (-length(q), q["id"]))
    with remembered_images(model, batch_size):
        for first in range(0, len(order), batch_size):
            batch = order[first:first + batch_size]
            images = [[open_image(image, q["where"]) for image in q["images"]] for q in batch]
            processed = [Processed(some, image_processor, model.device) for some in images]
            for mode, ids in wanted.items():
                asked = [i for i, q in enumerate(batch) if q["id"] in ids]
                if not asked:
                    continue
                prompts = [build_prompt(prompt_text(batch[i], mode, tokenizer), images[i], tokenizer,
                                        processed[i], model) for i in asked]
                generator = torch.Generator(model.device)
                generator.manual_seed(seeded(seed, "answers", mode, batch[asked[0]]["id"]).getrandbits(63))
                rollout = sample(model, prompts, 1, max_new_tokens, temperature, suppressed, eos_ids,
                                 generator)
                for row, (i, prompt) in enumerate(zip(asked, prompts)):
                    tokens = rollout.completion_ids[row, rollout.completion_mask[row]]
                    record = {key: batch[i][key] for key in ("id", "task", "source", "options", "answer")}
                    record |= {"mode": mode, "prompt": prompt.text, "length": len(tokens),
                               "completion": completion_text(prompt.text, tokens, tokenizer),
                               "finished": bool(rollout.finished[row])}
                    yield graded(record, strict)


# ---- Grading: as in training, but right in a wrong form counts -------------------------------------------

def read_answer(text, strict=False):
    """The answer in a completion, or None. strict: as training does, `extract_answer`.

    Else: what is inside the last answer block, else what follows the last </think>, else the whole text. (The
    paper's code goes from block to whole text; but a chain names choices that it goes on to reject, so where
    an answer follows it, only that counts.)

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
# how a letter is named in a sentence: (c), or "c) ..." at its start, or "answer is c"; "a" is also an article
NAMED_LETTER = re.compile(r"\(([a-z])\)|^([a-z])[).:] |\b(?:answer is|answer:|option|choice):? "
                          r"\(?(?:([b-z])\b|(a)(?=[).,:;]|$))")


def read_choice(answer, options):
    """-> the option that `answer` (from `read_answer`) chooses, or None. First by `choose`, as in training.

    If that finds none, a sentence chooses if it names exactly one option, by text or letter, or does so after
    its last "answer is" or "answer:"; where all options are numbers, words count as digits, unless the answer
    has digits too ("the left one: 3"). What names two options chooses none: the paper's code takes a match
    anywhere, so that "either left or right" may be right there. A table of cases is in test_grpo.py.

    >>> choose("So it is left.", ["right", "left"]), read_choice("So it is left.", ["right", "left"])
    (None, 'left')
    >>> [read_choice(text, ["2", "3"]) for text in ("Three.", "The answer is B", "(A) or (B)")]
    ['3', '3', None]
    """
    if answer is None or choose(answer, options) is not None:
        return choose(answer, options)
    options = options or []
    answer, texts = normalise(answer), [normalise(option) for option in options]
    if re.fullmatch(r"\(?[a-z]\)?", answer):
        return None  # a letter beyond the options
    by_letter = dict(zip("abcdefghijklmnopqrstuvwxyz", options))
    digits = lambda text: re.sub("[a-z]+", lambda word: NUMBERS.get(word[0], word[0]), text)
    if all(re.fullmatch(r"\d+", digits(text)) for text in texts):
        texts, answer = list(map(digits, texts)), answer if re.search(r"\d", answer) else digits(answer)
    by_text = dict(zip(texts, options))
    conclusion = max((found.start() for found in re.finditer(r"\banswer(?: is\b|:)", answer)), default=0)
    for part in answer[conclusion:], answer:
        named = {by_letter.get("".join(groups)) for groups in NAMED_LETTER.findall(part)}
        for text in sorted(texts, key=len, reverse=True):  # "no, it would not" before "no", which it contains
            part, found = re.subn(rf"(?<![\w.]){re.escape(text)}(?!\w|\.\d)", " ", part)
            named |= {by_text[text]} if found else set()
        if len(named) == 1:
            return named.pop()
    return None


def graded(record, strict):
    """The record with what its completion is worth, by the grader as it is now."""
    extracted, find = read_answer(record["completion"], strict), choose if strict else read_choice
    return {**record, "extracted": extracted, "chosen": find(extracted, record["options"]),
            "correct": grade(extracted, record["answer"], record["options"], find)}


# ---- Files -----------------------------------------------------------------------------------------------

def read_jsonl(path):
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave half a line


def append_jsonl(path, records):
    try:
        with open(path, "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    except OSError as error:
        fail(f"{path} cannot be written ({error}); make room, then --resume from the last checkpoint")


def cut_jsonl(path, step):
    """Drop what came after `step`, and a line that a killed run left half: a resumed run writes it again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    write_whole(path, "".join(x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step))


def write_whole(path, text):
    """The file has the text, or is as it was, whenever the program is killed."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text)
    partial.replace(path)


# ---- Kept answers ----------------------------------------------------------------------------------------

def digest(value, *blobs):
    """A value that JSON can hold, and bytes -> 12 hex digits."""
    found = hashlib.sha256(json.dumps(value).encode())
    for blob in blobs:
        found.update(blob)
    return found.hexdigest()[:12]


def fingerprint(model, image_processor):
    """Changes with any weight, and with the image size limits."""
    weights = (p.detach().cpu().flatten().view(torch.uint8).numpy() for p in model.parameters())
    return digest(sorted(dict(image_processor.size).items()), *weights)


def question_digest(q):
    """Changes with anything that a question asks or shows."""
    blobs = [image["bytes"] or Path(image["path"]).read_bytes() for image in q["images"]]
    return digest([q["text"], q["options"], q["answer"]], *blobs)


def read_results(path):
    """-> its records. A last line that a killed run left half is passed over: its question is asked again."""
    records, lines = [], path.read_text().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
            records[-1]["id"]
        except (ValueError, TypeError, KeyError):
            if number < len(lines) or line.endswith("\n"):
                fail(f"{path}, line {number} is not a kept answer; repair the file or move it away")
            print(f"{path}: the last line was cut off; its question counts as not asked", file=sys.stderr)
    return records


def collect(file):
    """Answers in FILE and in those of other processes beside it (MODE.rank1.jsonl ...) -> list, by id."""
    files = [*file.parent.glob(f"{file.stem}.rank*.jsonl"), file]
    found = {record["id"]: record for path in files for record in read_results(path)}
    return [found[i] for i in sorted(found)]


def store(file, records):
    write_whole(file, "".join(json.dumps(record) + "\n" for record in records))


def keep(file, expected):
    """Leave in FILE, whole lines and all processes' together, the answers that would be given again now
    -> these records. expected: record -> dict of what it has to have. If some differ, all are put aside
    first, under a name of their own."""
    records = collect(file)
    if differ := [(key, r.get(key), value) for r in records for key, value in expected(r).items()
                  if r.get(key) != value]:
        aside = next(path for n in range(1, 1000)
                     if not (path := file.with_name(f"{file.stem}.old{n}.jsonl")).exists())
        store(aside, records)
        key, old, new = differ[0]
        print(f"{file}: put aside as {aside.name}; it has answers with {key} {str(old)[:40]!r}, and now the "
              f"{key} is {str(new)[:40]!r}", file=sys.stderr)
        records = [r for r in records if all(r.get(key) == value for key, value in expected(r).items())]
    if records or file.exists():
        store(file, records)
    for path in file.parent.glob(f"{file.stem}.rank*.jsonl"):
        path.unlink()
    return records


def compare(paths):
    """Two kept files -> how much better the second is on the questions that both have, printed."""
    for path in paths:
        if not Path(path).exists():
            fail(f"--compare: {path} does not exist; give two files like results/MODEL/DATA/MODE.jsonl")
    a, b = ({r["id"]: r for r in read_results(Path(path))} for path in paths)
    both = sorted(a.keys() & b.keys())
    if not both or any(a[i]["question"] != b[i]["question"] for i in both):
        fail(f"--compare: {paths[0]} and {paths[1]} are not answers to the same questions")
    if alone := len(a) + len(b) - 2 * len(both):
        print(f"warning: left out: {alone} questions that only one of the files has", file=sys.stderr)
    print(f"A: {paths[0]}\nB: {paths[1]}")
    print(comparison([a[i] for i in both], [b[i] for i in both]))


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
        chance += weight * mean(1 / len(r["options"]) if r["options"] else 0 for r in records)
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
        "one answer block": rate(lambda r: extract_answer(r["completion"]) is not None),
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


def write_report(file, title, answers, questions, most=25):
    """{mode: records} -> FILE: one self-contained page. Of each mode and task at most `most` wrong answers,
    drawn with a seed, or the page would not open. All text is escaped: markup in an answer shows as text."""
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
            pictures = "".join(f'<img alt="the image" src="{data_url(image, 320)}">'
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


# ---- A run to look at: curves.png and rollouts.html ------------------------------------------------------

def load_sets(paths, limit):
    """Comma-separated benchmarks -> {path: questions}, the same `limit` questions of each every time."""
    return {path: load_benchmark(path, limit) for path in paths.split(",")}


def track(run, step):
    """Called while training: ask the sampler fixed questions, greedily, each process its share -> eval.jsonl;
    then bring the picture and the page up to date."""
    rank, count = run.accelerator.process_index, run.accelerator.num_processes
    mode = run.template if run.template in MODES else f"{run.template}-reasoning"
    for name, questions in run.eval_sets.items():
        mine = questions[rank::count]
        answers = answer_questions(run.sampler, run.tokenizer, run.image_processor, {mode: mine},
                                   max_new_tokens=run.cfg.max_completion_length)
        records = gather_object(list(tqdm(answers, f"evaluation on {name}", total=len(mine), leave=False,
                                          disable=rank > 0)))
        if rank == 0:
            append_score(run.output_dir / "eval.jsonl", step, name, records)
    if rank == 0 and step:
        show(run.output_dir, run.data)


def open_logs(cfg, output_dir, done):
    """The run's folder with its config.json and its logs as they were after `done` steps."""
    if cfg.overwrite and not cfg.resume:
        shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(output_dir / "config.json", json.dumps(asdict(cfg), indent=2))
    for name in ("metrics.jsonl", "completions.jsonl", "eval.jsonl"):
        cut_jsonl(output_dir / name, done or -1)  # the evaluation before the first step is step 0


def log_step(run, metrics, samples):
    """A step's metrics and completions -> files, tracker and a line to read; the end of the run, if the
    gradient is not finite."""
    is_main, folder = run.accelerator.is_main_process, run.output_dir
    if not isfinite(metrics["grad_norm"]):
        append_jsonl(folder / "bad_batch.jsonl", samples if is_main else [])
        fail(f"step {metrics['step']}: gradient norm {metrics['grad_norm']}; lower --learning_rate and "
             f"--resume from the last checkpoint; the batch is in {folder}/bad_batch.jsonl")
    if is_main:
        append_jsonl(folder / "metrics.jsonl", [metrics])
        append_jsonl(folder / "completions.jsonl", samples)
        tqdm.write(live_line(metrics))
    run.accelerator.log(metrics, step=metrics["step"])


def live_line(metrics):
    """A step's metrics in a line that a person can read."""
    rewards = "  ".join(f"{name.removeprefix('rewards/')} {value:.2f}" for name, value in metrics.items()
                        if name.startswith("rewards/"))
    seconds = sum(value for name, value in metrics.items() if name.startswith("seconds/"))
    return (f"step {metrics['step']:4d}  reward {metrics['reward']:.2f}  {rewards}  "
            f"length {metrics['completions/mean_length']:.1f}  kl {metrics['kl']:.3f}  {seconds:.1f} s")


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
    """The end of a training run: the picture, the page, and a few lines of before and after."""
    if not run.accelerator.is_main_process:
        return
    show(run.output_dir, run.data)
    cfg, template, run = run.cfg, run.template, run.output_dir
    metrics, scores = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "eval.jsonl")
    for name in dict.fromkeys(s["set"] for s in scores):
        first, *_, last = [s for s in scores if s["set"] == name] * 2
        print(f"{name}: {first['accuracy']:.1f} -> {last['accuracy']:.1f} % right, greedy, "
              f"± {last['standard_error']:.1f} on {last['questions']} questions")
    for key in metrics[0] if metrics else ():
        if key.startswith("rewards/") or key == "completions/mean_length":
            last = mean(m[key] for m in metrics[-10:])
            print(f"rollouts, {key}: {metrics[0][key]:.2f} at first -> {last:.2f} in the last 10 steps")
    toy = cfg.eval_data == PRESETS["toy"]["eval_data"]
    on = "" if toy else f" --data {cfg.eval_data.replace(',', ' ')}"
    on += " --modes direct" if template.endswith("-direct") else ""
    print(f"model:    {run}/final\nlook at:  {run}/curves.png  {run}/rollouts.html\n"
          f"try next: python eval_cvbench.py --run {run}{on}    # every checkpoint on all questions")
    if toy and cfg.algorithm == "grpo":
        print("          python grpo_vision.py --loss_type dr_grpo --scale_rewards false")


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
                        f'Options: {html.escape(", ".join(row["options"] or []))}<br>'
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
    picture = open_image(image, "an image of the page")
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if max(picture.size) <= 96 else "JPEG")
    kind = "png" if max(picture.size) <= 96 else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


# ---- The command -----------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", help="folders or hub ids; default: runs/toy/final and its base")
    parser.add_argument("--run", type=Path, help="evaluate every checkpoint of this training run instead")
    parser.add_argument("--data", nargs="+", default=["data/toy/cvbench", "data/toy/test.parquet"],
                        help="CV-Bench (hub id, folder, file), or a file as prepare_sat.py writes it")
    parser.add_argument("--modes", nargs="+", default=["reasoning"],
                        choices=["all", "reasoning", "direct", *MODES],
                        help="how to ask; reasoning, direct: in the model's kind of prompt")
    parser.add_argument("--limit", type=positive, help="only so many questions, always the same")
    parser.add_argument("--batch_size", type=positive, default=32, help="questions decoded together")
    parser.add_argument("--max_new_tokens", type=positive, default=1024, help="tokens at most per answer")
    parser.add_argument("--max_pixels", type=positive, help="larger images are shrunk to this; default: the "
                        "model's, which for a checkpoint is what it was trained with")
    parser.add_argument("--temperature", type=float, help="default: 0, greedy, as the paper; 0.6 with --ask")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling, if temperature is above 0")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU")
    parser.add_argument("--strict", action="store_true", help="grade as training does: answer blocks only")
    parser.add_argument("--output_dir", default="results", help="where every answer is kept")
    parser.add_argument("--regrade", action="store_true", help="grade kept answers again, without the model")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="kept files: how much better is B?")
    parser.add_argument("--ask", metavar="QUESTION", help="a question of your own, to the last --model")
    parser.add_argument("--image", nargs="+", default=[], help="images that --ask is about")
    parser.add_argument("--top_p", type=float, default=0.95, help="with --ask: of the likeliest tokens")
    args = parser.parse_args(argv)
    if (args.temperature or 0) < 0 or not 0 < args.top_p <= 1:
        fail("--temperature must be at least 0, and --top_p above 0 and at most 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.compare:
        return compare(args.compare)
    # processes meet at the end only, however slow one is; cpu: or without a GPU each would think itself alone
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
    args.dtype = args.dtype or ("bfloat16" if state.device.type == "cuda" else "float32")
    if args.model is None:
        args.model = models_of(args.run or Path("runs/toy"), only_ends=args.run is None)
    if args.ask:
        return ask(args, state.device)
    args.temperature = args.temperature or 0.0
    sets = {path: load_benchmark(path, args.limit) for path in args.data}
    for path, questions in sets.items():
        if state.is_main_process and not args.limit:
            check_counts(path, questions)
    scores = args.run / "eval_full.jsonl" if args.run and state.is_main_process else None
    if scores:
        scores.unlink(missing_ok=True)
    for name in args.model:
        loaded = None if args.regrade else load(name, args, state.device)
        for path, questions in sets.items():
            records = evaluate(name, path, questions, loaded, args, state)
            if scores:
                step = re.fullmatch(r"checkpoint-(\d+)", Path(name).name)
                append_score(scores, int(step[1]) if step else 0, path, records)
    if scores:
        draw_curves(args.run, scores)
        print(f"drawn from these scores: {args.run}/curves.png")


def models_of(run, only_ends):
    """-> the model that a run started from and its checkpoints in order; or only its start and its final/."""
    if not (run / "config.json").exists() or only_ends and not (run / "final").exists():
        fail(f"{run} is not a finished run; `python grpo_vision.py` makes one, or name a --model")
    start = json.loads((run / "config.json").read_text())["model_name_or_path"]
    return [start, *map(str, [run / "final"] if only_ends else checkpoints(run))]


def load(name, args, device):
    """-> model, tokenizer, image processor"""
    tokenizer, image_processor = load_processors(name, max_pixels=args.max_pixels)
    model = load_model(name, dtype=getattr(torch, args.dtype)).to(device)
    set_threads(model)
    return model, tokenizer, image_processor


def evaluate(name, path, questions, loaded, args, state):
    """One model on one set; files in results/MODEL/DATA -> records of the first mode, in the first process.

    Each process takes every n-th question and writes to a file of its own, which the first one takes over
    when all are done, or at the next start if they were killed.
    """
    folder = Path(args.output_dir) / slug(name) / slug(path)
    folder.mkdir(parents=True, exist_ok=True)
    known = {q["id"]: {"question": question_digest(q)} for q in questions}
    modes = give_answers(name, path, questions, known, folder, *loaded, args, state) if loaded else MODES
    if state.is_main_process:
        answers = conclude(name, path, questions, known, folder, args.strict)
        return next(answers[mode] for mode in modes if mode in answers)


def give_answers(name, path, questions, known, folder, model, tokenizer, image_processor, args, state):
    """Ask what is missing in FOLDER/MODE.jsonl -> the modes asked for. known: {question id: its digest}"""
    modes, by_id = choose_modes(args.modes, tokenizer), {q["id"]: q for q in questions}
    stamp = {"fingerprint": fingerprint(model, image_processor), "dtype": args.dtype,
             "max_new_tokens": args.max_new_tokens, "temperature": args.temperature,
             "seed": args.seed if args.temperature else None}

    def expected(record, mode):
        """What an answer has to have to count; that of a mode not asked for now, only the same model."""
        found = {"mode": mode, "fingerprint": stamp["fingerprint"], **known.get(record["id"], {})}
        if mode in modes:
            found |= stamp
            if record["id"] in known:
                found["prompt"] = prompt_text(by_id[record["id"]], mode, tokenizer)
        return found

    if state.is_main_process:
        for mode in MODES:
            keep(folder / f"{mode}.jsonl", lambda record: expected(record, mode))
    state.wait_for_everyone()
    done = {mode: {r["id"] for r in read_results(folder / f"{mode}.jsonl")} for mode in modes}
    share = questions[state.process_index::state.num_processes]
    todo = {mode: [q for q in share if q["id"] not in done[mode]] for mode in modes}
    state.wait_for_everyone()  # all have read before one writes
    answers = answer_questions(model, tokenizer, image_processor, todo, args.batch_size, args.max_new_tokens,
                               args.temperature, args.seed, args.strict)
    rank = f".rank{state.process_index}" if state.process_index else ""
    verdicts = []
    with tqdm(answers, f"{name} on {path}", sum(map(len, todo.values())),
              disable=not state.is_main_process) as bar:
        for record in bar:
            append_jsonl(folder / f"{record['mode']}{rank}.jsonl",
                         [{**record, **known[record["id"]], **stamp}])
            verdicts.append(record["correct"])
            bar.set_postfix_str(f"{100 * sum(verdicts) / len(verdicts):.1f} % right", refresh=False)
    state.wait_for_everyone()
    return modes


def conclude(name, path, questions, known, folder, strict):
    """All modes' kept answers, graded anew -> summary.json, summary.md, report.html, and {mode: records}."""
    answers = {}
    for mode in MODES:
        kept = keep(folder / f"{mode}.jsonl", lambda r: {"mode": mode, **known.get(r["id"], {})})
        if records := [graded(record, strict) for record in kept]:
            store(folder / f"{mode}.jsonl", records)
        if asked := [r for r in records if r["id"] in known]:
            answers[mode] = asked
    if not answers:
        fail(f"{folder} has no kept answers to these questions; start without --regrade")
    summaries = {mode: summarise(records) for mode, records in answers.items()}
    title = f"{name} on {path}" + ", graded as in training" * strict
    write_whole(folder / "summary.json", json.dumps(
        {mode: summary | {"scores": {key: score._asdict() for key, score in summary["scores"].items()}}
         for mode, summary in summaries.items()}, indent=1))
    tables = score_rows(summaries), rate_rows(summaries)
    write_whole(folder / "summary.md", "\n".join([f"# {title}\n", *map(markdown, tables)]))
    write_report(folder / "report.html", title, answers, questions)
    for mode, summary in summaries.items():
        missing = len(questions) - len(answers[mode])
        print(f"{title}, {mode}" + f", {missing} questions not answered yet" * bool(missing))
        print(text_table(summary))
    print(f"    every answer, summary.md and report.html: {folder}\n")
    return answers


def ask(args, device):
    """Print a streamed answer to one question: temperature 0.6 and top_p 0.95 are Vision-R1's."""
    model, tokenizer, image_processor = load(args.model[-1], args, device)
    images = []
    for file in args.image:
        try:
            images.append(upright(Image.open(file)))
        except Exception as error:  # PIL raises many kinds
            fail(f"--image {file} cannot be read: {error}")
    question = {"text": args.ask, "images": images, "source": "asked"}
    text = prompt_text(question, choose_modes(args.modes, tokenizer)[0], tokenizer)
    prompt = build_prompt(text, images, tokenizer, image_processor, model)
    print(completion_text(text, [], tokenizer), end="", flush=True)
    temperature = 0.6 if args.temperature is None else args.temperature
    ids = stream(model, tokenizer, prompt, temperature, args.top_p, args.max_new_tokens, args.seed)
    answer = extract_answer(completion_text(text, ids, tokenizer))
    if ids[-1] not in end_tokens(tokenizer):
        print(f"(cut off: --max_new_tokens {args.max_new_tokens})")
    print(f"answer: {answer}" if answer else "(no answer block)")


def stream(model, tokenizer, prompt, temperature, top_p, max_new_tokens, seed=0):
    """transformers' own `generate` on a Prompt, printed as it comes -> ids of the completion (C,)"""
    model.generation_config = transformers.GenerationConfig()  # the published one: temperature 0.01, top_k 1
    inputs = dict(input_ids=prompt.input_ids, attention_mask=torch.ones_like(prompt.input_ids),
                  mm_token_type_ids=(prompt.input_ids == model.config.image_token_id).int())
    if prompt.pixel_values is not None:
        inputs |= dict(pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw)
    drawn = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0) if temperature else {}
    torch.manual_seed(seed)
    eos_ids = end_tokens(tokenizer)
    ids = model.generate(**inputs, **drawn, max_new_tokens=max_new_tokens, eos_token_id=eos_ids,
                         pad_token_id=eos_ids[0],
                         suppress_tokens=suppressed_tokens(model, tokenizer).nonzero()[:, 0].tolist(),
                         streamer=transformers.TextStreamer(tokenizer, skip_prompt=True,
                                                            skip_special_tokens=True))
    return ids[0, prompt.input_ids.shape[1]:]


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def slug(path):
    return re.sub(r"[^\w.-]+", "-", str(path)).strip("-")


if __name__ == "__main__":
    main()
