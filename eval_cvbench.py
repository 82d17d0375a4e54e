"""CV-Bench by the paper's protocol: greedy, the answer block or else the whole text; every answer is kept.

    python eval_cvbench.py                       # the last toy run and its base, on the toy's two sets
    python eval_cvbench.py --run runs/toy        # every checkpoint of a run, and its curves from these scores
    python eval_cvbench.py --model runs/sat/final --data nyu-visionx/CV-Bench --modes all
    accelerate launch eval_cvbench.py ...        # on all GPUs: each process takes every n-th question
    python eval_cvbench.py --data toy/test.parquet --temperature 1 --num_generations 64 --strict    # pass@k
    python eval_cvbench.py --compare A/answers.jsonl B/answers.jsonl            # is B better than A?
    python eval_cvbench.py --ask "What is left of the tree?" --image photo.jpg --model runs/sat/final

--data is CV-Bench (a hub id, or a folder of its Parquet files) or a file that prepare_sat.py wrote. Each answer is
written at once, to answers.jsonl in a folder of results/ whose name has the model, the data, the mode and a digest of
weights, settings and questions. So the same command resumes where it stopped, and regrades kept answers.
While it trains, grpo_vision.py calls the functions whose names begin with on_.
"""
import argparse
import base64
import hashlib
import html
import io
import json
import os
import random
import re
import shlex
import sys
from collections import defaultdict, namedtuple
from datetime import timedelta
from math import comb, exp, inf
from pathlib import Path
from statistics import NormalDist, mean, pvariance
from string import ascii_uppercase as LETTERS

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

import grpo_vision as gv
from grpo_vision import (ANSWER_BLOCK, HERE, PRESETS, RUNS, accuracy_reward, append_jsonl, choose, explained,
                         extract_answer, fail, normalise, require)
from recipes import math_reward

# ---- The questions ---------------------------------------------------------------------------------------

def read_rows(path):
    """Hub id, Parquet file, or folder of them -> rows (dicts), their images still encoded."""
    here = Path(path)
    if os.path.exists(here / "train.parquet"):
        fail(f"{path} holds training data. Name the file to evaluate on, such as {path}/test.parquet.")
    with explained(f"the questions of {path} cannot be read"):
        if os.path.exists(here):
            files = sorted(here.glob("*.parquet")) or [here]
            return pa.concat_tables(map(pq.read_table, files), promote_options="default").to_pylist()
        return datasets.load_dataset(path, split="test").with_format("arrow")[:].to_pylist()


def load_questions(path, limit=None):
    """CV-Bench or a file of the training layout -> list of questions, each a dict of id, where, task, source, images,
    text (what fills the template), options, answer (one of them), size (about the tokens of the prompt)."""
    rows, questions = read_rows(path), []
    require(rows, f"{path} has no rows")
    cvbench = "choices" in rows[0]
    needed = "image prompt choices answer task source" if cvbench else "images question options answer"
    if missing := sorted(set(needed.split()) - rows[0].keys()):
        fail(f"{path} has no column {missing[0]!r} ({', '.join(rows[0])})")
    # sampled: files are sorted by task
    for index in sorted(random.Random("questions").sample(range(len(rows)), min(limit or len(rows), len(rows)))):
        where = f"{path}, row {index}"
        with explained(f"{where} cannot be read, so mend or remove it"):
            questions.append({"id": index, "where": where, **parse_row(rows[index], cvbench)})
    return questions


def parse_row(row, cvbench):
    """-> a question, as `load_questions` returns it, without id and where. Raise ValueError if it has faults."""
    text, options, images = (row[name] for name in (("prompt", "choices", "image") if cvbench else
                                                    ("question", "options", "images")))
    images = images if isinstance(images, list) else [images] if images else []
    if not isinstance(options or [], list):
        raise ValueError(f"its options are no list: {options!r}")
    options, answer = [str(x) if isinstance(x, (int, float)) else x for x in options or []], row["answer"]
    if not all(isinstance(part, str) and part.strip() for part in (text, *options)):
        raise ValueError("its question or an option is empty, or no text")
    if cvbench:
        answer = dict(zip((f"({letter})" for letter in LETTERS), options)).get(str(answer).strip())
    if not answer or options and answer not in options:
        raise ValueError(f"its answer {row['answer']!r} is none of its options {options}")
    if not all(images) or cvbench and not images:
        raise ValueError("an image is missing")
    headers = [Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"] or "") for image in images]
    task, source = (row["task"], row["source"]) if cvbench else (row.get("question_type") or "all", "held-out")
    return dict(task=str(task), source=source, images=images, options=options, answer=str(answer),
                text=text if cvbench else gv.build_question(text, options),
                size=len(text) / 4 + sum(image.width * image.height for image in headers) / 28**2)


# ---- The answers -----------------------------------------------------------------------------------------

# How a question is asked: the template, and what is put after a CV-Bench prompt; all are the paper's.
MODES = {
    "base-reasoning": ("base", ""),
    "base-direct": ("base-direct", ""),
    "instruct-reasoning": ("instruct-direct", "\nOutput the thinking process in <think> </think> and final "
                                              "answer in <answer> </answer> tags."),
    "instruct-direct": ("instruct-direct", ""),
}


def choose_modes(names, tokenizer):
    """--modes -> names of MODES. reasoning, direct: in the kind of prompt that the chat template asks for, as in
    training. all: every mode that the model admits, since an instruct prompt needs a template with roles."""
    kind = gv.choose_prompt(tokenizer)
    admitted = [mode for mode in MODES if kind == "instruct" or mode.startswith("base")]
    chosen = {"all": admitted, "reasoning": [f"{kind}-reasoning"], "direct": [f"{kind}-direct"]}
    modes = list(dict.fromkeys(mode for name in names for mode in chosen.get(name, [name])))
    if not {*modes} <= {*admitted}:
        fail(f"--modes {' '.join(names)}: no chat template with roles. Choose from {', '.join(admitted)}")
    return modes


def prompt_text(question, mode, tokenizer):
    template, ending = MODES[mode]
    if ending and question["source"] == "held-out":  # of the training kind, so in the words of training
        template, ending = "instruct", ""
    row = dict(question=question["text"] + ending, options=None, images=question["images"])
    return gv.render(row, template, tokenizer)


def answer_questions(model, tokenizer, image_processor, questions, mode, done=(), batch_size=32,
                     max_new_tokens=1024, temperature=0.0, seed=0, strict=False, num_generations=1):
    """Yield one record for each question that is not `done` (a set of ids), with its num_generations answers;
    greedy unless temperature > 0. Batches hold questions of similar length, longest first, so a
    lack of memory shows at once. Neither they nor the samples depend on `done`."""
    order, n = sorted(questions, key=lambda q: (-q["size"], q["id"])), max(1, batch_size // num_generations)
    for batch in (order[first:first + n] for first in range(0, len(order), n)):
        if all(q["id"] in done for q in batch):
            continue
        texts = [prompt_text(q, mode, tokenizer) for q in batch]
        images = [[gv.open_image(image, q["where"]) for image in q["images"]] for q in batch]
        passes = [gv.build_prompts(texts[i:i + 8], images[i:i + 8], tokenizer, image_processor, model, first=i)
                  for i in range(0, len(batch), 8)]
        number = random.Random(f"{seed}/answers/{mode}/{batch[0]['id']}").getrandbits(63)
        generator = torch.Generator(model.device).manual_seed(number)
        rollout = gv.sample(model, passes, num_generations, max_new_tokens, temperature, generator)
        tokens = [ids[mask] for ids, mask in zip(rollout.completion_ids, rollout.completion_mask)]
        answers = [{"completion": gv.completion_text(texts[i // num_generations], ids, tokenizer),
                    "length": len(ids), "finished": bool(rollout.finished[i])} for i, ids in enumerate(tokens)]
        for i, q in enumerate(batch):
            if q["id"] not in done:
                record = {key: q[key] for key in ("id", "task", "source", "options", "answer")}
                own = answers[i * num_generations:(i + 1) * num_generations]
                yield with_verdicts(record | {"mode": mode, "prompt": texts[i], "answers": own}, strict)


# ---- Grading: as in training, but right in a wrong format counts -----------------------------------------

NUMBERS = dict(zip("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
                   "fifteen sixteen seventeen eighteen nineteen twenty".split(), map(str, range(21))))
# What stands around a whole word or number: not "leftmost", "-3", "3.5", "3%", "three hundred".
BEFORE = r"(?<![\w−±-])(?<!\d[.,/:])(?<!\s\.)"
AFTER = r"(?!\w|[+±×]| ?%|[.,/:-]\d|-(?!hand|side)\w| (?:hundred|thousand|million|dozen|and a half|answer)\b)"
# How a letter names an option. "A" before a word of three letters is an article, but for these words.
LETTER = (r"(?<!\w)[(\[{（【] ?[A-Za-z] ?[)\]}）】]|(?<![\w.-])(?<!\w')(?:[A-Za-z]\)|(?:[B-HJ-Z]|[b-f]|(?<=\w )A|"
          r"a(?=[.,:;/]| or | and |\W*$)|A(?! [a-z]{3})|A(?= (?:and|but|not|isn|because|since|rather|does|"
          r"would|should|must|seems|appears)\b))(?![\w-]|\.\w))")
# What stands between names in a row, as in "A, B or C".
JOINT = (r"(?:, (?:an?\b|the(?= [A-Z],? (?:and|or)\b))|[ ,/&•)\"']|[-–—(;] ?(?=or\b)|"
         r"\b(?:or|and|nor|also|as well as|maybe|perhaps|possibly)\b(?: (?:the|an?|option)\b)?)*")
# A clause claims nothing with one of these words, or with an "or" beside a name or a number.
DENIAL = r"not|no|none|nothing|neither|nor|never|cannot|\w+n't|wrong|incorrect|false|impossible|unlikely|less"
DOUBT = r"if|whether|maybe|perhaps|possibly|might|may|could be|un(?:sure|certain)"
ASIDE = r"than|compared|instead|unlike|because|since|while|whereas|although|though"
NO_CLAIM = re.compile(rf"\b(?i:{DENIAL}|{DOUBT}|{ASIDE})\b|"
                      r"[A-Z\d],? or\b|\bor (?:the |an? )?[A-Z\d]|\b(?:rul\w+ out|exclud\w+|eliminat\w+)\b")
CLAUSE = re.compile(r"(?<=[.,;!])(?=\s)|(?:(?<=:)|(?<=\s[-–—]))(?=\s(?!⇒|incorrect|wrong|false))|(?<=\n)|"
                    rf"(?<=[A-Z]) (?=not\b)|(?i:\b(?=(?:and|but|so|as|which|{ASIDE})\b))")
CONCLUSION = re.compile(r"(?:\b(?:(?<!to )answer|correct|i(?:'d| would| will)? (?:choose|pick|select|go with)"
                        r"|(?:choice|option)(?=\W* is\b|\W*:))\b|(?:\b(?:is|be):|=)(?=\W*[A-Z])|"
                        r"\b(?:no,|wait,?|actually,?)(?= [A-Z]+\W*(?:[.!\n]|$)))[ •]*:?")
SO = r"\b(?:so|thus|hence|therefore|conclusion|(?<!in )total)\b"
ALONE = re.compile(rf"\W*(?:(?:{SO}|option|choice|letter|the|an?|it is|it's)\W+)*[A-Z]+[^\w:]*")
POINTED = re.compile(rf"{SO}|\btotal\b|•[A-Z]|\b(?:clos|near)(?:er|est)\b")


def read_answer(text):
    """What is inside the last answer block, else what follows the last </think>, else the whole text."""
    blocks = ANSWER_BLOCK.findall(text)
    return (blocks[-1] if blocks else text.rpartition("</think>")[2].strip() or text).strip()


def clean(text):
    """The text without markup and questions. Number words are digits, unless it has digits too ("the left
    one: 3"). Bold text stands between bullets, and what is boxed follows "answer:"."""
    text = re.sub(r"\\boxed\b", "answer: ", re.sub(r"\*+|__|</?(?:b|strong)>", "•", text.replace("’", "'")))
    text = re.sub(r"</?\w+>|\\(?:text|mathrm|mathbf)\b|[`$#]|\\(?=[()])|(?<=\d),(?=\d{3}\b)", "", text)
    sentences = re.findall(r"(?:[^.!?\n]|\.(?=\d))*[.!?\n]*", re.sub(r":\s+", ": ", text))
    text = "".join(sentence for sentence in sentences if "?" not in sentence)
    digits = lambda word: NUMBERS.get(word[0].lower(), word[0])
    return text if re.search(r"\d", text) else re.sub(rf"{BEFORE}[A-Za-z]+{AFTER}", digits, text)


def mark(text, options):
    """The text in small letters, with a capital letter for each option that it names. Names in a row are one.

    >>> mark("A or B? It is (b) left; 13 is a lot.", ["3", "left"])
    ' AB? it is B; 13 is a lot.'
    """
    words = lambda text: normalise(text.replace(",", " "))
    letter_of = {words(clean(option)): letter for option, letter in zip(options, LETTERS)}
    texts = [option for option in letter_of if not re.fullmatch("[a-z]", option)]
    texts = [re.escape(option).replace(r"\ ", r"[\s,]+") for option in sorted(texts, key=len, reverse=True)]
    named = rf"{BEFORE}((?i:{'|'.join(texts) or '(?!)'}))(?:\.0+)?{AFTER}"
    listed = [rf"\(?{letter}[).:] *{re.escape(option)}" for option, letter in letter_of.items()]
    text = re.sub("(?i)" + r"[\s,;.]*(?:or |and )?".join(listed), "", text)  # the prompt's list of options
    text = re.sub(rf"(?m)((?:^|: )[^\w(\n]*)\(?([A-Za-z])\)? ?[.:(–—-] *(?={named})", r"\1(\2) ", text)
    text = re.sub(r"^(\W*[A-Za-z][).]+) +(?=[A-Z][a-z])", r"\1. ", text)  # "(b) The lamp"

    def letter(found):
        name = words(found[1] or found[2] or "")
        return letter_of.get(name, re.sub(r"\W", "", name).upper()) or found[0].lower()

    text = re.sub(rf"(?m){named}|({LETTER})|[A-Z]", letter, " " + text)
    row = lambda found: "".join(sorted(set(re.findall("[A-Z]", found[0]))))
    return re.sub(rf"(?<!not )(?<!not a )(?<!not the )[A-Z](?:{JOINT}[A-Z](?! is))+", row, text)


def read_choice(answer, options):
    """-> the option that `answer` (from `read_answer`) chooses, by the rule in `is_right`, or None."""
    if (chosen := choose(answer, options)) is not None:
        return chosen
    text = re.sub(r"\((?![A-Z]\)|[A-Z]$)[^()\n]*\)?", "", mark(clean(answer), options))  # an aside
    text = CONCLUSION.sub("⇒", re.sub(rf"({SO})\W+", r"\1 ", text)).strip()
    clauses, sentences = CLAUSE.split(text), re.split(r"[.!\n]", text.rstrip(" .!•\n"))
    named = [clause for clause in clauses if re.search("[A-Z]", clause) and not NO_CLAIM.search(clause)]
    concluded = [re.sub(".*⇒(?=.*[A-Z])", "", clause) for clause in named if "⇒" in clause]
    alone = [end for end in (clauses[0], sentences[-1]) if ALONE.fullmatch(end)]
    pointed = [clause for clause in named if POINTED.search(clause)]
    for part in concluded[-1:], alone[-1:], pointed, named:
        names = re.findall("[A-Z]+", " ".join(part))
        if names and {name for name in names if len(name) == 1} == {names[-1]}:
            return dict(zip(LETTERS, options)).get(names[-1])
    return None


def plain(text):
    """A free answer to compare: without articles and what leads to it; a number where it is one."""
    text = normalise(CONCLUSION.split(clean(text).replace("•", "").lower())[-1]).strip("(){}")
    text = " ".join(word for word in text.split() if word not in ("a", "an", "the", "it", "is")) or text
    return float(text) if re.fullmatch(r"[-+]?\d*\.?\d+(?:e\d+)?", text) else text


def is_right(text, options, answer, strict=False):
    """Is the answer of a completion right? strict: as in training. Else it is read clause by clause. A clause
    claims nothing if it denies ("not left"), doubts ("A or B"), compares ("than the dog"), gives a reason or
    asks. The first of these that names exactly one option, by letter or text, decides:

    1. the last claim that concludes: "the answer is B", "B is correct", "I choose B", "1 + 2 = 3", a box;
    2. the last sentence, or else the first clause, that is no more than a name: "B", "It is left.";
    3. the claims after "so" or "therefore", in bold, or of what is closer, which CV-Bench asks;
    4. all claims.

    Letter and text that differ, as in "(B) right", name no option. A free answer is right if it matches the
    solution as text or mathematics.
    """
    said = (extract_answer if strict else read_answer)(text) or ""
    if strict:
        right = accuracy_reward(text, answer, options)
    elif options:
        right = (chosen := read_choice(said, options)) is not None and normalise(chosen) == normalise(answer)
    elif normalise(answer) in ("yes", "no"):
        right = normalise(answer) in said.lower() and read_choice(said, ["yes", "no"]) == normalise(answer)
    else:
        right = said and plain(said) == plain(answer)
        said = said if "\\" in said else clean(said).replace("•", "")
        said = "".join(clause for clause in CLAUSE.split(said) if not NO_CLAIM.search(clause))
        said = f"<answer>{said}</answer>" if ANSWER_BLOCK.search(text) else said
    return bool(right or said and not options and math_reward(said, answer))


def with_verdicts(record, strict):
    """The record with a verdict on each of its answers, by the current grader."""
    options, answers = record["options"], []
    for a in record["answers"]:
        text = a["completion"]
        if strict and record["mode"].startswith(("base-direct", "instruct-direct")):
            text = f"<answer>{text}</answer>"  # as in training, all of it is the answer
        said = (extract_answer if strict else read_answer)(text)
        chosen = (choose if strict else read_choice)(said, options) if said else None
        correct = is_right(text, options, record["answer"], strict)
        answers.append(a | dict(extracted=said, chosen=chosen, correct=correct))
    return record | {"answers": answers, "right": sum(a["correct"] for a in answers)}


# ---- Files -----------------------------------------------------------------------------------------------

def read_jsonl(path):
    """-> the records of a file, [] without one. A last line that a killed program cut short is ignored."""
    with explained(f"{path} has a line that is not JSON. Mend the file or move it away"):
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


def cut_log(path, step):
    """Drop a log's records after `step`: a run that was killed may have logged more than it saved."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
    if lines:
        os.truncate(path, sum(map(len, kept)))


def write_text(path, text):
    """All of it or nothing."""
    with explained(f"cannot write {path}. Free space, then the same command"):
        unfinished = path.with_name(path.name + ".tmp")
        unfinished.write_text(text)
        unfinished.replace(path)


def write_jsonl(path, records):
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def digest(*parts):
    """Bytes, or values that JSON can hold -> 12 hex digits."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else json.dumps(part).encode())
    return found.hexdigest()[:12]


def question_digest(q):
    """Changes with anything that a question asks or shows."""
    blobs = [image["bytes"] or Path(image["path"]).read_bytes() for image in q["images"]]
    return digest(q["text"], q["options"], q["answer"], *blobs)


def short(path):
    """A path as one types it in the script's folder."""
    return str(path).removeprefix(f"{HERE}/")


# ---- The scores ------------------------------------------------------------------------------------------

REFLECTION = re.compile("aha|check|possibl|verify|wait|yet", re.IGNORECASE)  # as the authors count them
PUBLISHED = {"Count": 788, "Relation": 650, "Depth": 600, "Distance": 600,  # CV-Bench's questions by task
             "ADE20K": 633, "COCO": 805, "Omni3D": 1200}                    # and by source
Z = NormalDist().inv_cdf(0.975)  # 1.96: a 95 % interval

# arXiv 2503.05132, table 1; the base model's Depth is printed as 0.16, likely 10.16
PAPER = {"base": (54.69, 22.46, 0.16, 31.66, 31.38), "base + SFT": (60.02, 68.92, 55.00, 45.83, 57.84),
         "base + GRPO": (59.64, 66.76, 54.16, 56.66, 59.47), "instruct": (45.43, 68.92, 58.66, 51.66, 55.64)}
Score = namedtuple("Score", "n value low high chance")  # all but n in percent


def groups_of(records):
    """Records -> {name of a score: [(weight, its records), ...]}: tasks, sources, and means over sources.
    total is the paper's micro-average; 2D, 3D and official = (2D + 3D) / 2 are CV-Bench's own, in which the
    two sources of 2D count the same: 1/2 * ((ADE20K + COCO) / 2 + Omni3D)."""
    found = {key: defaultdict(list) for key in ("task", "source")}
    for record in records:
        for key, group in found.items():
            group[record[key]].append(record)
    tasks, sources = ({name: [(1, group[name])] for name in sorted(group, key=lambda x: ([*PUBLISHED, x].index(x), x))}
                      for group in found.values())
    combined = {"total": [(1, list(records))]}
    if {"ADE20K", "COCO", "Omni3D"} <= sources.keys():
        ade, coco, omni = (found["source"][name] for name in ("ADE20K", "COCO", "Omni3D"))
        combined |= {"official": [(1 / 4, ade), (1 / 4, coco), (1 / 2, omni)],
                     "2D": [(1 / 2, ade), (1 / 2, coco)], "3D": [(1, omni)]}
    return tasks | combined | (sources if len(sources) > 1 else {})


def pass_at_k(n, right, k):
    """The chance that of k answers, drawn from n of which `right` are right, at least one is right. Over the n
    samples this estimates pass@k without bias (arXiv 2107.03374, eq. 1).

    >>> [pass_at_k(4, 1, k) for k in (1, 2, 4)]
    [0.25, 0.5, 1.0]
    """
    return 1 - comb(n - right, k) / comb(n, k)


def score_of(parts, k=1):
    """[(weight, records), ...] -> Score of the weighted mean of their pass@k; with one answer to each question that
    is the share of right ones. low, high: Wilson's 95 % interval, which stays in 0 .. 100, for the number of
    questions that gives this variance. chance: what guesses among each question's options would reach."""
    count, value, variance, chance = 0, 0.0, 0.0, 0.0
    for weight, records in parts:
        each = [pass_at_k(len(r["answers"]), r["right"], k) for r in records]
        count += len(each)
        value += weight * mean(each)
        variance += weight**2 * pvariance(each) / len(each)
        chance += weight * mean(1 - (1 - 1 / len(r["options"])) ** k if r["options"] else 0 for r in records)
    n = value * (1 - value) / variance if variance else count
    middle, half = value + Z**2 / (2 * n), Z * (value * (1 - value) / n + Z**2 / (4 * n**2)) ** 0.5
    low, high = ((middle + side * half) / (1 + Z**2 / n) for side in (-1, 1))
    return Score(count, *(100 * x for x in (value, low, high, chance)))


def scores_of(records):
    """Records -> {name: Score}; with K answers to each question first pass@k for k = 1, 2, 4 ... K."""
    K = min(len(record["answers"]) for record in records)
    ks = sorted({2**i for i in range(K.bit_length())} | {K}) if K > 1 else []
    return {f"pass@{k}": score_of([(1, records)], k) for k in ks} | {
        name: score_of(parts) for name, parts in groups_of(records).items()}


def rates_of(records):
    """Records -> {name: percent of answers; mean length in tokens}: how the answers look."""
    answers = [answer for record in records for answer in record["answers"]]
    rate = lambda test: 100 * mean(bool(test(answer)) for answer in answers)
    return {"unparsed": rate(lambda a: a["chosen"] is None), "truncated": rate(lambda a: not a["finished"]),
            "one answer block": rate(lambda a: extract_answer(a["completion"]) is not None),
            "reflection word": rate(lambda a: REFLECTION.search(a["completion"])),
            "mean length": mean(a["length"] for a in answers)}


def sign_test(a, b):
    """Two lists of records of the same questions -> the p-value of the two being equally good, by McNemar's
    exact test: only questions that one answered better than the other tell them apart."""
    won = sum(y["right"] > x["right"] for x, y in zip(a, b))
    lost = sum(x["right"] > y["right"] for x, y in zip(a, b))
    return min(1.0, 2 * sum(comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost))


def compare(paths):
    """Print how much better the second file of answers is, on the questions that both have."""
    a, b = ({r.get("id"): r for r in read_jsonl(path)} for path in paths)
    both = sorted(a.keys() & b.keys())
    if not both or any(a[i].get("question") != b[i].get("question", "") for i in both):  # or are no answers
        fail(f"--compare: {paths[0]} and {paths[1]} hold no answers to the same questions")
    alone = len(a.keys() ^ b.keys())
    print(f"A: {paths[0]}\nB: {paths[1]}\n{len(both)} questions; {alone} that only one has are left out")
    of_a, of_b = (groups_of([records[i] for i in both]) for records in (a, b))
    for name, parts in of_a.items():
        one, two = score_of(parts).value, score_of(of_b[name]).value
        p = f"   p = {sign_test(parts[0][1], of_b[name][0][1]):.2g}" if len(parts) == 1 else ""
        print(f"    {name:24s} A {one:5.1f}   B {two:5.1f}   B - A {two - one:+5.1f}{p}")


# ---- Pages -----------------------------------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 66rem; margin: 1rem auto; padding: 0 .7rem }}
h2 {{ margin-top: 2.5rem }} td, th {{ padding: .25rem .4rem; text-align: right; vertical-align: top }}
td:first-child, th:first-child {{ text-align: left; overflow-wrap: anywhere }}
pre, td.text {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace }}
.question {{ display: flex; flex-wrap: wrap; align-items: start; gap: .7rem; margin-top: 1.2rem }}
.question div {{ flex: 1 1 16rem; min-width: 0 }} img {{ max-width: min(14rem, 100%); max-height: 14rem }}
tr.up {{ border-left: 4px solid #2a9d3a }} tr.down {{ border-left: 4px solid #d0402b }} .most {{ outline: 1px solid }}
table {{ border-collapse: collapse }} .right {{ background: #d9f2d9 }} .wrong {{ background: #fbe0dd }}
@media (max-width: 40rem) {{ table, tbody {{ display: block }} td:first-child, th:first-child {{ grid-column: 1 / -1 }}
tr {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(4rem, 1fr)) }} }}
.token {{ position: relative }} .token:hover::after, .token:focus::after {{ content: attr(data-p);
position: absolute; left: 0; top: 1.5em; z-index: 1; background: #222; color: #fff; padding: 0 .4em; white-space: pre }}
</style>
<h1>{title}</h1>
{body}</html>"""


def write_page(path, title, body):
    """HTML fragments, whose text is escaped -> a page that needs no other file."""
    write_text(path, PAGE.format(title=html.escape(title), body="\n".join(body)))


def markdown_table(rows):
    """Rows of text, the heading first -> Markdown with aligned columns"""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def image_html(picture):
    """PIL image -> an <img> that holds it, made small, as PNG or JPEG."""
    picture.thumbnail((320, 320))
    kind, buffer = "PNG" if max(picture.size) <= 96 else "JPEG", io.BytesIO()
    picture.save(buffer, kind)
    return f'<img alt="image" src="data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def question_html(images, asked, options, answer, said=""):
    return (f'<div class="question">{"".join(images)}<div>{asked}<br>'
            f'Options: {html.escape(", ".join(options or []))}<br>'
            f'Right answer: <span class="right">{html.escape(answer)}</span><br>{said}</div></div>')


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
        rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in systems.items()]
        tables.append([["paper, % right", *tasks], *rows])
    return tables


def write_report(folder, title, records, questions, most=25):
    """Records -> FOLDER/summary.json and report.html. Of each task, the page shows at most
    `most` questions without a right answer, sampled with a seed, so that it opens. All text is escaped."""
    scores = {name: score._asdict() for name, score in scores_of(records).items()}
    write_text(folder / "summary.json", json.dumps({"scores": scores, "rates": rates_of(records)}, indent=1))
    tables = "\n".join(map(markdown_table, tables_of(records)))
    body = [f'<pre style="white-space: pre; overflow-x: auto">{html.escape(tables)}</pre>']
    asked = {q["id"]: q for q in questions}
    wrong = [r for r in records if not r["right"] and r["id"] in asked]
    for task in dict.fromkeys(r["task"] for r in wrong):
        some = [r for r in wrong if r["task"] == task]
        shown = sorted(random.Random("report").sample(some, min(most, len(some))), key=lambda r: r["id"])
        body.append(f"<h2>{html.escape(task)}: {len(some)} without a right answer, {len(shown)} of them shown</h2>")
        for r in shown:
            q, a = asked[r["id"]], r["answers"][0]
            said = html.escape(a["chosen"] or f"no choice: {(a['extracted'] or 'nothing')[:80]}")
            said = f'Chosen: <span class="wrong">{said}</span>{" (cut off)" * (not a["finished"])}'
            body.append(question_html([image_html(gv.open_image(image, q["where"])) for image in q["images"]],
                                      f'Question {r["id"]}<pre>{html.escape(q["text"])}</pre>', q["options"],
                                      r["answer"], f'{said}<pre>{html.escape(a["completion"])}</pre>'))
    write_page(folder / "report.html", title, body)


# ---- A training run: what grpo_vision.py calls, curves.png and rollouts.html ------------------------------

def on_init_end(run):
    """Before models are loaded: read the sets, the same eval_limit questions of each every time."""
    sets = run.cfg.eval_data.split(",") if run.cfg.eval_steps else []
    run.eval_sets = {path: load_questions(path, run.cfg.eval_limit) for path in sets}


def on_train_begin(run, done):
    """Cut the logs to `done` steps, and evaluate the start."""
    if run.accelerator.is_main_process:
        for name in "completions.jsonl", "eval.jsonl", "rollouts.jsonl":
            cut_log(run.output_dir / name, done or -1)  # step 0 is evaluated anew
    if not done:
        evaluate_policy(run, 0)


def on_step_end(run, step, came):
    """Keep the step's completions, and at steps 1, 2, 4, 8 ... and the last what the update did to them."""
    is_last = step == run.cfg.max_steps
    if run.accelerator.is_main_process:
        append_jsonl(run.output_dir / "completions.jsonl", came.samples)
    if is_last or step & (step - 1) == 0:
        after = gv.score_rollout(run.policy, came.batch.passes, came.rollout, came.cfg)           # (N, C)
        if run.accelerator.is_main_process:
            append_jsonl(run.output_dir / "rollouts.jsonl", shown_groups(run, step, came, after))
    if run.eval_sets and (step % run.cfg.eval_steps == 0 or is_last):
        evaluate_policy(run, step)


def shown_groups(run, step, came, after, most=2):
    """-> records of a step's first `most` groups, those with spread first, for rollouts.html: the question, its
    images as HTML, and for each completion its tokens and their log-probabilities."""
    G, N = came.cfg.num_generations, len(came.advantages)
    groups = [range(i, i + G) for i in range(0, N, G)]
    has_spread = lambda group: any(came.advantages[i] != 0 for i in group)
    for group in sorted(groups, key=has_spread, reverse=True)[:most]:
        row, completions = came.batch.rows[group[0] // G], []
        for i in group:
            mask = came.rollout.completion_mask[i]
            ids = came.rollout.completion_ids[i, mask].tolist()
            logps = dict(before=came.logps, after=after, reference=came.ref_logps)
            completions.append(came.samples[i] | {
                "prefill": gv.completion_text(came.batch.texts[i // G], [], run.tokenizer),
                "tokens": [run.tokenizer.decode([token]) for token in ids]} | {
                name: [round(x, 4) for x in values[i, mask].tolist()]
                for name, values in logps.items() if values is not None})
        yield {"step": step, "question": row["question"], "options": row["options"], "answer": row["answer"],
               "images": [image_html(image.copy()) for image in came.batch.images[group[0] // G]],
               "completions": completions}


def on_save(run, folder):
    """Update the curves and the page; after final/, print the run's results and what to do next."""
    if not run.accelerator.is_main_process:
        return
    if folder.name != "final":
        try:
            return draw(run.output_dir)
        except (Exception, SystemExit) as error:  # must not stop the training
            return print(f"warning: curves.png or rollouts.html could not be made: {error!r}", file=sys.stderr)
    folder, scores = shlex.quote(short(run.output_dir)), read_jsonl(run.output_dir / "eval.jsonl")
    for name in dict.fromkeys(s["set"] for s in scores):
        first, *_, last = [s for s in scores if s["set"] == name] * 2
        print(f"{name}: {first['accuracy']:.1f} -> {last['accuracy']:.1f} % right, greedy, "
              f"± {last['standard_error']:.1f} on {last['questions']} questions")
    on = " --modes direct" if run.template.endswith("-direct") else ""
    print(f"model:    {folder}/final\nlook at:  {folder}/curves.png  {folder}/rollouts.html")
    print(f"try next: python eval_cvbench.py --run {folder}{on}    # every checkpoint on all questions")


def evaluate_policy(run, step):
    """Ask the sampler the sets' questions, greedily, each process its share -> eval.jsonl"""
    rank, count = run.accelerator.process_index, run.accelerator.num_processes
    mode = run.template if run.template in MODES else f"{run.template}-reasoning"
    for name, questions in run.eval_sets.items():
        answers = answer_questions(run.sampler, run.tokenizer, run.image_processor, questions[rank::count], mode,
                                   max_new_tokens=run.cfg.max_completion_length)
        records = gather_object(list(answers))
        if rank == 0:
            append_score(run.output_dir / "eval.jsonl", step, name, records)


def append_score(path, step, name, records):
    n, p = len(records), mean(r["right"] / len(r["answers"]) for r in records)
    append_jsonl(path, [{"step": step, "set": short(name), "questions": n, "accuracy": 100 * p,
                         "standard_error": 100 * (p * (1 - p) / n) ** 0.5,
                         "mean_length": rates_of(records)["mean length"]}])


def smooth(values, width):
    """Running mean over about `width` values around each; over fewer at the ends."""
    windows = [values[max(0, i - width // 2):i + width // 2 + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw(run, scores=None):
    """The logs of a run, finished or not -> RUN/rollouts.html and, after the paper's Figure 1, RUN/curves.png.
    scores: the file that holds its evaluations, by default eval.jsonl."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    metrics, scores = read_jsonl(run / "metrics.jsonl"), read_jsonl(scores or run / "eval.jsonl")
    steps, width = [m["step"] for m in metrics], max(1, len(metrics) // 12)
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
    right.plot(steps, smooth(lengths, width), color="tab:red", lw=2, label="response length of the rollouts")
    right.set(ylabel="tokens", ylim=(0, 1.15 * max(lengths)))
    figure.legend(loc="outside upper center", ncols=3)
    names = [key.split("/")[1] for key in metrics[0] if key.endswith("/best")]
    curves = [("reward", {name: [m[f"rewards/{name}"] for m in metrics] for name in names}),
              ("KL to the reference, per token", {"": [m["kl"] for m in metrics]}),
              ("entropy per token, nats", {"": [m["entropy"] for m in metrics]}),
              ("groups without spread", {"": [m["frac_reward_zero_std"] for m in metrics]}),
              ("reward, best of each group", {name: [m[f"rewards/{name}/best"] for m in metrics] for name in names}),
              ("rollouts cut at the token limit", {"": [m["completions/clipped_ratio"] for m in metrics]})]
    for panel, (title, lines) in zip(map(panels.get, range(6)), curves):
        for label, values in lines.items():
            faint, = panel.plot(steps, values, lw=0.7, alpha=0.35)
            panel.plot(steps, smooth(values, width), color=faint.get_color(), label=label)
        panel.set_title(title, fontsize=9)
        panel.set_ylim(bottom=min(0, *panel.get_ylim()))
        if len(lines) > 1:
            panel.legend(fontsize=8)
    figure.savefig(run / "curves.png", dpi=130)
    plt.close(figure)
    write_rollouts(run)


def completion_html(c, largest):
    """A record of `shown_groups`, and the largest change in its group -> a row of the group's table. A token's tint
    is the change of its log-probability, and data-p is what appears on hover or focus."""
    changes, spans = [after - before for before, after in zip(c["before"], c["after"])], []
    for i, (text, change) in enumerate(zip(c["tokens"], changes)):
        colour = "42, 157, 58" if change > 0 else "208, 64, 43"
        kind = "token most" if abs(change) == max(map(abs, changes)) else "token"
        shown = "\n".join(f"{x}: {exp(c[x][i]):.3f}" for x in ("before", "after", "reference") if x in c)
        spans.append(f'<span class="{kind}" tabindex="0" data-p="{shown}" style="background: rgba({colour}, '
                     f'{0.8 * abs(change) / largest:.2f})">{html.escape(text)}</span>'.replace("\n</", "↵\n</"))
    sign = "up" if c["advantage"] > 0 else "down" if c["advantage"] < 0 else "zero"
    numbers = [f"{c[key]:g}" for key in c if key.startswith("rewards/")] + [str(c["length"]), f"{c['advantage']:+.2f}"]
    cells = "".join(f"<td>{number}</td>" for number in numbers)
    return f'<tr class="{sign}"><td class="text">{html.escape(c["prefill"])}{"".join(spans)}</td>{cells}</tr>'


ROLLOUTS = """<p>The policy's completions of a few training questions, and what the update after each did to it. A
table is a group, the completions of one prompt. A completion with a green edge did better than its group, one with a
red edge worse; without an edge, its advantage is 0. The update made <span class="right">green</span> tokens likelier
and <span class="wrong">red</span> ones less likely. A frame marks the largest change in a completion. Point at a
token, or tap it, for its probability before the update, after it, and under the reference.</p>"""


def write_rollouts(run):
    """RUN/rollouts.jsonl -> RUN/rollouts.html. All text is escaped: a completion with markup shows as text."""
    body, steps = [ROLLOUTS], []
    for group in read_jsonl(run / "rollouts.jsonl"):
        if group["step"] not in steps:
            steps.append(group["step"])
            body.append(f"<h2>Step {group['step']}</h2>")
        body.append(question_html(group["images"], html.escape(group["question"]), group["options"], group["answer"]))
        names = [key.removeprefix("rewards/") for key in group["completions"][0] if key.startswith("rewards/")]
        changes = [abs(after - before) for c in group["completions"] for before, after in zip(c["before"], c["after"])]
        heads = "".join(f"<th>{html.escape(name)}</th>" for name in ("completion", *names, "tokens", "advantage"))
        rows = [completion_html(c, max(max(changes), 1e-9)) for c in group["completions"]]
        body += [f"<table><tr>{heads}</tr>", *rows, f"</table><p>Strongest tint: {max(changes):.2g} nats.</p>"]
    write_page(run / "rollouts.html", f"Rollouts of {short(run)}", body)


# ---- The command -----------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", help="folders or hub ids; default: the last runs/toy*/final and its base")
    add("--run", type=Path, help="every checkpoint of this training run instead")
    add("--data", nargs="+", help="CV-Bench, or files as prepare_sat.py writes them; default: the run's eval_data")
    add("--modes", nargs="+", default=["reasoning"], choices=["all", "reasoning", "direct", *MODES],
        help="how to ask; reasoning, direct: in the model's kind of prompt")
    add("--limit", type=int, help="only so many questions, always the same")
    add("--batch_size", type=int, default=32, help="answers decoded together")
    add("--max_new_tokens", type=int, default=1024, help="tokens at most per answer")
    add("--max_pixels", type=int, help="larger images are shrunk; default: as in the run's training")
    add("--temperature", type=float, help="default: 0, greedy, as the paper; 0.6 with --ask")
    add("--num_generations", type=int, default=1, help="K answers per question: pass@1, 2, 4 ... K")
    add("--seed", type=int, default=0, help="seed of sampling, if temperature is above 0")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU")
    add("--strict", action="store_true", help="grade as training does: answer blocks only")
    add("--output_dir", type=Path, default=HERE / "results", help="where answers are kept")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="kept answers: how much better is B?")
    add("--draw", type=Path, metavar="RUN", help="curves.png and rollouts.html of a run, from its logs")
    add("--ask", metavar="QUESTION", help="a question of your own, to the last --model")
    add("--image", nargs="+", default=[], help="images that --ask is about")
    args = parser.parse_args(argv)
    for flag in "limit", "batch_size", "max_new_tokens", "max_pixels", "num_generations":
        require(getattr(args, flag) is None or getattr(args, flag) >= 1, f"--{flag} must be at least 1")
    require(args.ask or args.ask is None and not args.image, "--ask needs a question, and --image needs --ask")
    require(not args.run or not args.model, "--run takes no --model")
    require(0 <= (args.temperature or 0) < inf, "--temperature must be at least 0")
    differ = args.temperature or args.num_generations == 1
    require(differ, f"--num_generations {args.num_generations}: greedy answers are all the same. Add --temperature 1.")
    return args


def main(argv=None):
    args = parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.compare:
        return compare(args.compare)
    if args.draw:
        with explained(f"--draw {args.draw}: its logs cannot be drawn"):
            return draw(args.draw)
    gv.check_launch()
    # processes meet at the end only, however slow one is; cpu: or without a GPU each would think itself alone
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
    args.dtype = args.dtype or ("bfloat16" if state.device.type == "cuda" else "float32")
    if args.model is None:
        last = max(RUNS.glob("toy*/final"), key=lambda path: path.stat().st_mtime, default=RUNS / "toy/final")
        args.model, config = models_of(args.run or last.parent, only_ends=args.run is None)
        args.data = args.data or config["eval_data"].split(",")
        args.max_pixels = args.max_pixels or config["max_pixels"]
    if args.ask:
        return ask(args, state.device)
    args.temperature = args.temperature or 0.0
    sets = {path: load_questions(path, args.limit) for path in args.data or PRESETS["toy"]["eval_data"].split(",")}
    files = defaultdict(list)  # (set, mode) -> answers of each model
    scores = args.run / "eval_full.jsonl" if args.run and state.is_main_process else None
    if scores:
        scores.unlink(missing_ok=True)
    for name in args.model:
        loaded = _, tokenizer, _ = load(name, args, state.device)
        for path, questions in sets.items():
            for number, mode in enumerate(choose_modes(args.modes, tokenizer)):
                records, file = evaluate(name, path, questions, mode, *loaded, args, state)
                files[path, mode].append(short(file))
                if scores and not number:
                    step = re.fullmatch(r"checkpoint-(\d+)", Path(name).name)
                    append_score(scores, int(step[1]) if step else 0, path, records)
    if scores:
        draw(args.run, scores)
        print(f"drawn from these scores: {args.run}/curves.png")
    for found in files.values():
        if len(found) > 1 and state.is_main_process:
            print(f"to compare: python eval_cvbench.py --compare {shlex.join([found[0], found[-1]])}")


def models_of(run, only_ends):
    """-> the models of a run, its start and its checkpoints or (only_ends) final/; and its settings."""
    trained = [run / "final"] if only_ends else gv.checkpoints(run)
    if not trained or not all(map(os.path.exists, (run / "config.json", trained[0]))):
        fail(f"{run} is not a finished run; `python grpo_vision.py` makes one, or name a --model")
    config = json.loads((run / "config.json").read_text())
    return [config["model_name_or_path"], *map(str, trained)], config


def load(name, args, device):
    tokenizer, image_processor = gv.load_processors(name, max_pixels=args.max_pixels)
    return gv.load_model(name, tokenizer, dtype=getattr(torch, args.dtype)).to(device), tokenizer, image_processor


def evaluate(name, path, questions, mode, model, tokenizer, image_processor, args, state):
    """One model on one set -> records (in the first process) and the file that has them. Each process takes
    every n-th question and writes a file of its own, which the first one takes over at the end."""
    known = {q["id"]: question_digest(q) for q in questions}
    settings = [sorted(dict(image_processor.size).items()), args.dtype, args.max_new_tokens, args.temperature,
                args.seed if args.temperature else None, args.strict, MODES[mode], sorted(known.items())]
    kind = mode + f"-pass@{args.num_generations}" * (args.num_generations > 1)
    slug = lambda path: re.sub(r"[^\w.-]+", "-", short(path)).strip("-")[-80:]  # file names have a maximum length
    # a hub id stands for its weights
    weights = [hashlib.file_digest(file.open("rb"), "sha256").hexdigest() for file in Path(name).glob("*.safetensors")]
    folder = args.output_dir / f"{slug(name)}--{slug(path)}--{kind}--{digest(sorted(weights) or name, settings)}"
    with explained(f"--output_dir {args.output_dir} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
    kept = lambda: {r["id"]: r for file in sorted(folder.glob("answers*.jsonl")) for r in read_jsonl(file)}
    done = kept().keys()
    state.wait_for_everyone()  # all have read before one writes
    mine = folder / f"answers.rank{state.process_index}.jsonl"
    write_jsonl(mine, read_jsonl(mine))  # without half a line, at which a killed program left it
    todo = questions[state.process_index::state.num_processes]
    answers = answer_questions(model, tokenizer, image_processor, todo, mode, done, args.batch_size,
                               args.max_new_tokens, args.temperature, args.seed, args.strict, args.num_generations)
    title = f"{short(name)} on {short(path)}, {kind}" + ", graded as in training" * args.strict
    for record in tqdm(answers, title, sum(q["id"] not in done for q in todo), disable=not state.is_main_process):
        append_jsonl(mine, [{**record, "question": known[record["id"]]}])
    state.wait_for_everyone()
    if not state.is_main_process:
        return None, folder / "answers.jsonl"
    records = [with_verdicts(record, args.strict) for _, record in sorted(kept().items())]
    write_jsonl(folder / "answers.jsonl", records)
    for file in folder.glob("answers.rank*.jsonl"):
        file.unlink()
    write_report(folder, title, records, questions)
    print(title, *map(markdown_table, tables_of(records)), sep="\n")
    print(f"every answer, summary.json and report.html: {short(folder)}\n")
    return records, folder / "answers.jsonl"


def ask(args, device):
    """Print the answer to one question; temperature 0.6 is Vision-R1's."""
    images = [gv.open_image({"bytes": None, "path": file}, f"--image {file}") for file in args.image]
    if re.search(r"<\|\w+\|>", args.ask):
        fail("--ask: a special token in the question. Give images with --image.")
    model, tokenizer, image_processor = load(args.model[-1], args, device)
    question = {"text": args.ask, "images": images, "source": "asked"}
    text = prompt_text(question, choose_modes(args.modes, tokenizer)[0], tokenizer)
    prompt = gv.build_prompts([text], [images], tokenizer, image_processor, model)
    generator = torch.Generator(model.device).manual_seed(args.seed)
    temperature = 0.6 if args.temperature is None else args.temperature
    rollout = gv.sample(model, [prompt], 1, args.max_new_tokens, temperature, generator)
    said = gv.completion_text(text, rollout.completion_ids[0], tokenizer)
    print(said if rollout.finished[0] else f"{said}\n(cut off: --max_new_tokens {args.max_new_tokens})")
    print(f"answer: {extract_answer(said) or '(no answer block)'}")


if __name__ == "__main__":
    main()
