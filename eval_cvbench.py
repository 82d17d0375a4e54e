"""CV-Bench by the paper's protocol: greedy, the answer block or else the whole text; all answers are kept.

    python eval_cvbench.py                         # the last toy run and its base, on the toy's two sets
    python eval_cvbench.py --run runs/toy          # all checkpoints of a run, and curves from these scores
    python eval_cvbench.py --model runs/sat/final --data nyu-visionx/CV-Bench --modes all
    accelerate launch eval_cvbench.py ...          # on all GPUs: each process takes every n-th question
    python eval_cvbench.py --data toy/test.parquet --temperature 1 --num_generations 64 --strict  # pass@k
    python eval_cvbench.py --compare A/answers.jsonl B/answers.jsonl           # is B better than A?
    python eval_cvbench.py --ask "What is left of the tree?" --image photo.jpg --model runs/sat/final
    python eval_cvbench.py --draw runs/toy         # its curves.png and rollouts.html again

It reads CV-Bench (a hub id, or a folder of its Parquet files) and files of prepare_sat.py. CV-Bench's rows:

    idx 0, type "2D", task "Count", image <PNG>, question "How many ...?", choices ["2", "3"], answer "(B)",
    prompt "How many ...? Select from the following choices.\\n(A) 2\\n(B) 3", source "ADE20K", ...

Answers go at once to answers.jsonl in a folder under results/. Its name holds a digest of weights, settings and
questions, so the same command resumes where it was stopped, and grades kept answers anew. grpo_vision.py calls
the functions named on_...
"""
import argparse
import base64
import hashlib
import html
import io
import itertools
import json
import random
import re
import shlex
import shutil
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
from grpo_vision import HERE, append_jsonl, choose, explained, extract_answer, normalise, require
from recipes import math_reward

# ---- The questions ---------------------------------------------------------------------------------------

def read_rows(path):
    """Read a hub id, Parquet file, or folder of them -> rows (dicts), their images still encoded."""
    files = sorted(Path(path).glob("*.parquet")) or [Path(path)]
    require(Path(path, "train.parquet") not in files,
            f"{path} holds training data. Name the file to evaluate on, such as {path}/test.parquet.")
    with explained(f"the questions of {path} cannot be read"):
        if files[0].exists():
            return pa.concat_tables(map(pq.read_table, files), promote_options="default").to_pylist()
        return datasets.load_dataset(path, split="test").with_format("arrow")[:].to_pylist()


def load_questions(path, limit=None):
    """Read the questions of `path`, or `limit` of them, always the same -> list of dicts: id, where (it is),
    size (estimated tokens of the prompt), digest, and what `parse_row` returns."""
    rows, questions = read_rows(path), []
    require(rows, f"{path} has no rows")
    count = min(limit or len(rows), len(rows))
    for index in sorted(random.Random("questions").sample(range(len(rows)), count)):  # files go by task
        where = f"{path}, row {index}"
        with explained(f"{where}: a column or an image is missing or cannot be read"):
            q = parse_row(rows[index], where)
            blobs = [image["bytes"] or Path(image["path"]).read_bytes() for image in q["images"]]
            sizes = [Image.open(io.BytesIO(blob)).size for blob in blobs]  # reads only the header
        size = len(q["text"]) / 4 + sum(width * height for width, height in sizes) / 28**2
        asked = digest([q["text"], q["options"], q["answer"]], *blobs)
        questions.append(q | {"id": index, "where": where, "size": size, "digest": asked})
    return questions


def parse_row(row, where):
    """Check a row -> dict of task, source, images, text (for the template), options, answer (an option)."""
    cvbench = "choices" in row
    names = ("image", "choices", "prompt") if cvbench else ("images", "options", "question")
    images, options, text = (row[name] for name in names)
    images = images if isinstance(images, list) else [images] * (cvbench or images is not None)
    require(isinstance(options or [], list), f"{where}: its options are no list: {options!r}")
    options = [str(option) if isinstance(option, (int, float)) else option for option in options or []]
    answer = row["answer"]
    if cvbench:
        answer = {f"({letter})": option for letter, option in zip(LETTERS, options)}.get(str(answer).strip())
    require(all(isinstance(part, str) and part.strip() for part in (text, *options)),
            f"{where}: its question or an option is empty, or no text")
    require(answer and (not options or answer in options),
            f"{where}: its answer {row['answer']!r} is none of its options {options}")
    require(all(images) and (images or not cvbench), f"{where}: an image is missing")
    task = row["task"] if cvbench else row.get("question_type") or "all"
    return {"task": str(task), "source": row["source"] if cvbench else "held-out", "images": images,
            "text": text if cvbench else gv.build_question(text, options), "options": options,
            "answer": str(answer)}


# ---- The answers -----------------------------------------------------------------------------------------

MODES = {  # the template, and what is appended to a CV-Bench prompt; both are the paper's
    "base-reasoning": ("base", ""), "base-direct": ("base-direct", ""),
    "instruct-direct": ("instruct-direct", ""),
    "instruct-reasoning": ("instruct-direct", "\nOutput the thinking process in <think> </think> and final "
                           "answer in <answer> </answer> tags.")}


def choose_modes(names, tokenizer):
    """Turn --modes into names of MODES. reasoning, direct: with the kind of prompt used in training. all:
    every mode that the model admits; an instruct mode needs a chat template with roles."""
    kind = gv.choose_prompt(tokenizer)
    admitted = [mode for mode in MODES if kind == "instruct" or mode.startswith("base")]
    if "all" in names:
        return admitted
    modes = dict.fromkeys(name if name in MODES else f"{kind}-{name}" for name in names)
    require(modes.keys() <= set(admitted), f"--modes {', '.join(modes)}: this model's chat template admits only "
            f"{', '.join(admitted)}")
    return list(modes)


def prompt_text(question, mode, tokenizer):
    template, ending = MODES[mode]
    if ending and question["source"] == "held-out":  # of the training kind, so in the words of training
        template, ending = "instruct", ""
    asked = {"question": question["text"] + ending, "options": None}
    return gv.render(question | asked, template, tokenizer)


def answer_questions(loaded, questions, mode, args, done=()):
    """Yield a record, with args.num_generations answers, for each question whose id is not in `done`. loaded:
    model, tokenizer, image processor. The largest questions come first, so that a lack of memory shows at
    once. Neither batches nor samples depend on `done`."""
    model, tokenizer, image_processor = loaded
    G = args.num_generations
    n = max(1, args.batch_size // G)
    order = sorted(questions, key=lambda q: (-q["size"], q["id"]))
    for batch in (order[first:first + n] for first in range(0, len(order), n)):
        if all(q["id"] in done for q in batch):
            continue
        texts = [prompt_text(q, mode, tokenizer) for q in batch]
        images = [[gv.open_image(image, q["where"]) for image in q["images"]] for q in batch]
        passes = [gv.build_prompts(texts[i:i + 8], images[i:i + 8], tokenizer, image_processor, model, i)
                  for i in range(0, len(batch), 8)]
        seed = random.Random(f"{args.seed}/answers/{mode}/{batch[0]['id']}").getrandbits(63)
        generator = torch.Generator(model.device).manual_seed(seed)
        rollout = gv.sample(model, passes, G, args.max_new_tokens, args.temperature, generator)
        for i, q in enumerate(batch):
            if q["id"] in done:
                continue
            record = {key: q[key] for key in ("id", "task", "source", "options", "answer")}
            record |= {"question": q["digest"], "mode": mode, "prompt": texts[i], "answers": []}
            for j in range(i * G, i * G + G):
                ids = rollout.completion_ids[j, rollout.completion_mask[j]]
                record["answers"].append({"completion": gv.completion_text(texts[i], ids, tokenizer),
                                          "length": len(ids), "finished": bool(rollout.finished[j])})
            yield record


# ---- Grading: as in training, but right in a wrong form counts -------------------------------------------

NUMBERS = dict(zip("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
                   "fifteen sixteen seventeen eighteen nineteen twenty".split(), map(str, range(21))))
# What bounds a whole word or number: not "leftmost", "-3", "3.5", "3%", "three hundred".
BEFORE = r"(?<![\w−±-])(?<!\d[.,/:])(?<!\s\.)"
AFTER = r"(?!\w|[+±×]| ?%|[.,/:-]\d|-(?!hand|side)\w| (?:hundred|thousand|million|dozen|and a half)\b)"
# How a letter names an option. "A" before a word of three letters is an article, but for some.
LETTER = (r"(?<!\w)[(\[{（【] ?[A-Za-z] ?[)\]}）】]|(?<![\w.-])(?<!\w')(?:[A-Za-z]\)|(?:[B-HJ-Z]|[b-f]|"
          r"(?<=\w )A|a(?=[.,:;/]| or | and |\W*$)|A(?! (?!(?:and|but|not|isn|because|since|rather|does|would|"
          r"should|must|seems|appears)\b)[a-z]{3}))(?![\w-]|\.\w))")
# What stands between names in a row ("A, B or C").
JOINT = r"(?:[ ,/&•)\"']|\b(?:or|and|nor|also|as well as|maybe|perhaps|possibly|the|an?|option)\b)*"
# A clause with one of these words claims nothing, nor does one with an "or" beside a name or a number.
DENIAL = r"not|no|none|nothing|neither|nor|never|cannot|\w+n't|wrong|incorrect|false|unlikely|rul\w+ out"
DOUBT = r"if|whether|maybe|perhaps|possibly|might|may|could be|un(?:sure|certain)"
ASIDE = r"than|compared|instead|unlike|because|since|while|whereas|although|though"
NO_CLAIM = re.compile(rf"\b(?i:{DENIAL}|{DOUBT}|{ASIDE})\b|[A-Z\d],? or\b|\bor (?:the |an? )?[A-Z\d]")
CLAUSE = re.compile(r"(?<=[.,;!\n])|(?:(?<=:)|(?<=\s[-–—]))(?=\s(?!⇒|incorrect|wrong|false))|"
                    rf"(?<=[A-Z]) (?=not\b)|(?i:\b(?=(?:and|but|so|as|which|{ASIDE})\b))")
CONCLUSION = re.compile(r"(?:\b(?:answer|correct|i(?:'d| would| will)? (?:choose|pick|select|go with))\b|"
                        r"(?:\bis:|=)(?=\W*[A-Z])|\b(?:no|wait|actually),?(?= [A-Z]+\W*(?:[.!\n]|$)))[ •]*:?")
SO = r"\b(?:so|thus|hence|therefore|conclusion|(?<!in )total)\b"
ALONE = re.compile(rf"\W*(?:(?:{SO}|option|choice|letter|the|an?|it is|it's)\W+)*[A-Z]+[^\w:]*")
POINTED = re.compile(rf"{SO}|•[A-Z]|\b(?:clos|near)(?:er|est)\b")


def read_answer(text):
    """Read what is inside the last answer block, else what follows the last </think>, else the whole text."""
    blocks = gv.ANSWER_BLOCK.findall(text)
    return (blocks[-1] if blocks else text.rpartition("</think>")[2].strip() or text).strip()


def clean(text):
    """Drop markup and questions, and write number words as digits, unless the text has digits too ("the left
    one: 3"). Bullets then stand around bold text, and "answer:" before what was boxed."""
    text = re.sub(r"\*+|__|</?(?:b|strong)>", "•", text.replace("’", "'").replace("\\boxed", "answer: "))
    text = re.sub(r"</?\w+>|\\(?:text|mathrm|mathbf)\b|[`$#]|\\(?=[()])|(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"(?:[^.!?\n]|\.(?=\d))*\?[.!?\n]*", "", re.sub(r":\s+", ": ", text))
    digits = lambda word: NUMBERS.get(word[0].lower(), word[0])
    return text if re.search(r"\d", text) else re.sub(rf"{BEFORE}[A-Za-z]+{AFTER}", digits, text)


def mark(text, options):
    """Write a text in small letters, with a capital for each option that it names. Names in a row become one.

    >>> mark("A or B? It is (b) left; 13 is a lot.", ["3", "left"])
    ' AB? it is B; 13 is a lot.'
    """
    words = lambda text: normalise(text.replace(",", " "))
    letter_of = {words(clean(option)): letter for option, letter in zip(options, LETTERS)}
    texts = [re.escape(option).replace(r"\ ", r"[\s,]+") for option in letter_of]
    texts.sort(key=len, reverse=True)
    named = rf"{BEFORE}((?i:{'|'.join(texts) or '(?!)'}))(?:\.0+)?{AFTER}"
    listed = [rf"\(?{letter}[).:] *{re.escape(option)}" for option, letter in letter_of.items()]
    text = re.sub("(?i)" + r"[\s,;.]*(?:or |and )?".join(listed), "", text)  # the prompt's list of options
    text = re.sub(rf"(?m)((?:^|: )[^\w(\n]*)\(?([A-Za-z])\)? ?[.:(–—-] *(?={named})", r"\1(\2) ", text)

    def letter(found):
        name = words(found[1] or found[2] or "")
        return letter_of.get(name, re.sub(r"\W", "", name).upper()) or found[0].lower()

    text = re.sub(rf"(?m){named}|({LETTER})|[A-Z]", letter, " " + text)
    row = lambda found: "".join(sorted(set(re.findall("[A-Z]", found[0]))))
    return re.sub(rf"(?<!not )(?<!not a )(?<!not the )[A-Z](?:{JOINT}[A-Z](?! is))+", row, text)


def read_choice(answer, options):
    """Find the option that `answer` chooses by the rule in `is_right` -> the option or None."""
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


def plain(text):
    """Reduce a free answer to its number, or to its words without articles and what leads to them."""
    text = normalise(CONCLUSION.split(clean(text).replace("•", "").lower())[-1]).strip("(){}")
    text = " ".join(word for word in text.split() if word not in ("a", "an", "the", "it", "is")) or text
    return float(text) if re.fullmatch(r"[-+]?\d*\.?\d+(?:e\d+)?", text) else text


def is_right(text, options, answer, strict=False):
    """Say whether a completion's answer is right. strict: as in training. Else it is read clause by clause. A
    clause claims nothing if it denies ("not left"), doubts ("A or B"), compares ("than the dog"), gives a
    reason or asks. The first of these that names one option alone, by letter or by text, chooses it:

    1. the last claim that concludes: "the answer is B", "B is correct", "I choose B", "1 + 2 = 3", a box;
    2. the last sentence, or else the first clause, that is no more than a name: "B", "It is left.";
    3. the claims after "so" or "therefore", in bold, or of what is closer, which CV-Bench asks;
    4. all claims.

    Letter and text that differ, as in "(B) right", name no option. A free answer is right if its words are
    the solution's, or as mathematics."""
    said = (extract_answer if strict else read_answer)(text) or ""
    if strict:
        right = gv.accuracy_reward(text, answer, options)
    elif options:
        right = (chosen := read_choice(said, options)) is not None and normalise(chosen) == normalise(answer)
    elif normalise(answer) in ("yes", "no"):
        right = normalise(answer) in said.lower() and read_choice(said, ["yes", "no"]) == normalise(answer)
    else:
        right = said and plain(said) == plain(answer)
        said = said if "\\" in said else clean(said).replace("•", "")
        said = "".join(clause for clause in CLAUSE.split(said) if not NO_CLAIM.search(clause))
        said = f"<answer>{said}</answer>" if gv.ANSWER_BLOCK.search(text) else said
    return bool(right or said and not options and math_reward(said, answer))


def with_verdicts(record, strict):
    """Grade a record's answers anew, whatever grades it holds."""
    read, choice_of = (extract_answer, choose) if strict else (read_answer, read_choice)
    options, answers = record["options"], []
    for answer in record["answers"]:
        text = answer["completion"]
        if strict and "-direct" in record["mode"]:
            text = f"<answer>{text}</answer>"  # as in training, all of it is the answer
        said, correct = read(text), is_right(text, options, record["answer"], strict)
        chosen = choice_of(said, options) if said else None
        answers.append(answer | {"extracted": said, "chosen": chosen, "correct": correct})
    return record | {"answers": answers}


# ---- Files -----------------------------------------------------------------------------------------------

def read_jsonl(path):
    """Read a file's records, [] without a file. A last line that a killed program left half is dropped."""
    with explained(f"{path} has a line that is not JSON. Mend the file or move it away"):
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


def write_text(path, text):
    """Write all of the text or nothing."""
    with explained(f"cannot write {path}. Free space, then the same command"):
        unfinished = path.with_name(path.name + ".tmp")
        unfinished.write_text(text)
        unfinished.replace(path)


def write_jsonl(path, records):
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def group(records, key):
    """Records -> {value of `key`: [records]}, in the order in which the values come."""
    found = defaultdict(list)
    for record in records:
        found[record[key]].append(record)
    return found


def digest(value, *blobs):
    """Digest a value that JSON can hold, and bytes -> 12 hex digits."""
    return hashlib.sha256(json.dumps(value).encode() + b"".join(blobs)).hexdigest()[:12]


def short(path):
    """Spell a path as one types it in the script's folder."""
    return str(path).removeprefix(f"{HERE}/")


def slug(path):
    return re.sub(r"[^\w.-]+", "-", short(path)).strip("-")[-80:]  # file systems limit the length of names


# ---- The scores ------------------------------------------------------------------------------------------

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
    """Group records by task and source -> {name of a score: [(weight, records), ...]}. total is the paper's.
    2D, whose two sources weigh the same, 3D and official = (2D + 3D) / 2 are CV-Bench's own."""
    parts = {}
    for key in "task", "source":
        found = group(records, key)
        if key == "task" or len(found) > 1:
            order = sorted(found, key=lambda name: ([*PUBLISHED, name].index(name), name))
            parts |= {name: [(1, found[name])] for name in order}
    parts["total"] = [(1, records)]
    if {"ADE20K", "COCO", "Omni3D"} <= parts.keys():
        ade, coco, omni = (parts[name][0][1] for name in ("ADE20K", "COCO", "Omni3D"))
        parts["2D"] = [(1 / 2, ade), (1 / 2, coco)]
        parts["3D"] = [(1, omni)]
        parts["official"] = [(1 / 4, ade), (1 / 4, coco), (1 / 2, omni)]
    return parts


def right_answers(record):
    return sum(answer["correct"] for answer in record["answers"])


def pass_at_k(n, right, k):
    """The chance that at least one of k answers is right, drawn from n of which `right` are. Over samples it
    estimates pass@k without bias (arXiv 2107.03374, eq. 1).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 1, 4)
    (0.25, 0.5, 1.0)
    """
    return 1 - comb(n - right, k) / comb(n, k)


def score_of(parts, k=1):
    """[(weight, records), ...] -> Score of the weighted mean of their pass@k, which for one answer to each
    question is the share of right ones. chance: what guesses would reach. low, high: the 95 % interval over
    questions, Wilson's; a mean of fractions counts as the share of as many questions as would have its
    variance. The intervals of several parts combine by MOVER (Zou and Donner 2008)."""
    value = below = above = chance = 0
    for weight, records in parts:
        each = [pass_at_k(len(r["answers"]), right_answers(r), k) for r in records]
        n, p, variance = len(each), mean(each), pvariance(each)
        n *= p * (1 - p) / variance if variance else 1
        middle, half = p + Z**2 / (2 * n), Z * (p * (1 - p) / n + Z**2 / (4 * n**2)) ** 0.5
        low, high = ((middle + side * half) / (1 + Z**2 / n) for side in (-1, 1))
        value += weight * p
        below += (weight * (p - low)) ** 2
        above += (weight * (high - p)) ** 2
        chance += weight * mean(1 - (1 - 1 / len(r["options"])) ** k if r["options"] else 0 for r in records)
    ends = max(value - below**0.5, 0.0), min(value + above**0.5, 1.0)
    return Score(sum(len(records) for _, records in parts), *(100 * x for x in (value, *ends, chance)))


def scores_of(records):
    """Records -> {name: Score}; with K answers to each question first pass@k for k = 1, 2, 4 ... K."""
    K = min(len(record["answers"]) for record in records)
    ks = sorted({2**i for i in range(K.bit_length())} | {K}) if K > 1 else []
    scores = {f"pass@{k}": score_of([(1, records)], k) for k in ks}
    return scores | {name: score_of(parts) for name, parts in groups_of(records).items()}


def rates_of(records):
    """Records -> {name: percent of answers; mean length in tokens}."""
    answers = [answer for record in records for answer in record["answers"]]
    rate = lambda test: 100 * mean(bool(test(answer)) for answer in answers)
    return {"unparsed": rate(lambda a: a["chosen"] is None), "truncated": rate(lambda a: not a["finished"]),
            "letter only": rate(lambda a: re.fullmatch(r"\(?[A-Za-z]\)?\.?", a["extracted"] or "")),
            "one answer block": rate(lambda a: extract_answer(a["completion"]) is not None),
            "reflection word": rate(lambda a: REFLECTION.search(a["completion"])),
            "mean length": mean(a["length"] for a in answers)}


def sign_test(a, b):
    """Two lists of records of the same questions -> the p-value of the two being equally good, by McNemar's
    exact test: only questions that one answered better than the other tell them apart."""
    won = sum(right_answers(y) > right_answers(x) for x, y in zip(a, b))
    lost = sum(right_answers(x) > right_answers(y) for x, y in zip(a, b))
    return min(1.0, 2 * sum(comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost))


def compare(paths):
    """Print how much better the second of two files of answers is on the questions that both have."""
    a, b = ({r.get("id"): r for r in read_jsonl(path)} for path in paths)
    both = sorted(a.keys() & b.keys())
    same = all(a[i].get("question") == b[i].get("question", "") for i in both)  # "": these are no answers
    require(both and same, f"--compare: {paths[0]} and {paths[1]} hold no answers to the same questions")
    print(f"A: {paths[0]}\nB: {paths[1]}")
    print(f"{len(both)} questions; {len(a.keys() ^ b.keys())} that only one has are left out")
    of_a, of_b = (groups_of([records[i] for i in both]) for records in (a, b))
    for name, parts in of_a.items():
        one, two = score_of(parts).value, score_of(of_b[name]).value
        p = f"   p = {sign_test(parts[0][1], of_b[name][0][1]):.2g}" if len(parts) == 1 else ""
        print(f"    {name:24s} A {one:5.1f}   B {two:5.1f}   B - A {two - one:+5.1f}{p}")


# ---- Pages -----------------------------------------------------------------------------------------------

STYLE = """<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 66rem; margin: 1rem auto; padding: 0 .7rem }
h2 { border-bottom: 1px solid #ccc; margin-top: 2.5rem } p, pre { overflow-wrap: anywhere; margin: .3rem 0 }
pre { font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap }
pre.table { white-space: pre; overflow-x: auto } .right, .wrong { width: fit-content; background: #d9f2d9 }
img { max-width: min(14rem, 100%); max-height: 14rem; border: 1px solid #ccc }
.question, .completion { display: flex; flex-wrap: wrap; align-items: start; gap: 0 1rem; margin-top: 1rem }
.question div, .tokens { flex: 1 1 18rem; min-width: 0 } .wrong { background: #fbe0dd }
.completion { position: relative; margin: 0; padding: 0 .5rem; border-left: 4px solid transparent }
.up { border-color: #2a9d3a } .down { border-color: #d0402b } .same { color: #767676 }
.token { background: rgb(208 64 43 / var(--tint)) } .risen { background: rgb(42 157 58 / var(--tint)) }
.most { outline: 1px solid } .token:hover::after, .token:focus::after { content: attr(data-p); color: #fff;
background: #222; position: absolute; top: 100%; right: 0; z-index: 1; padding: 0 .5em; white-space: pre }
</style>"""


def write_page(path, title, body):
    """Write HTML fragments, whose text is escaped, as a page that needs no other file."""
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    write_text(path, "\n".join([head, STYLE, element("h1", title), *body, "</html>"]))


def element(tag, text, kind=""):
    return f'<{tag} class="{kind}">{html.escape(text)}</{tag}>'


def question_html(images, *lines):
    """Set images (data URIs) beside lines (HTML fragments), or on a phone above them."""
    shown = "".join(f'<img alt="" src="{uri}">' for uri in images)
    return f'<div class="question">{shown}<div>{"".join(lines)}</div></div>'


def data_uri(picture, side=320):
    """Shrink an RGB image to at most `side` pixels -> a URI that contains it."""
    small, buffer = picture.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(buffer, "JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def legend_html(path):
    """Show the legend.png, in this folder or one above, that explains what images show, if there is one."""
    for file in (folder / "legend.png" for folder in (Path(path), *Path(path).parents[:2])):
        if file.exists():
            uri = data_uri(gv.open_image({"bytes": None, "path": file}, file), side=640)
            return f'<p>What is what:</p><img alt="the objects and their names" src="{uri}">'
    return ""


def markdown_table(rows):
    """Rows of text, the heading first -> Markdown with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def tables_of(records):
    """Records -> tables (rows of text, the heading first): scores, rates and, for all of CV-Bench's questions,
    the paper's scores, with which no other set compares."""
    scores, rates = scores_of(records), [["% of answers; tokens", ""]]
    rates += [[name, f"{value:.1f}"] for name, value in rates_of(records).items()]
    tables = [[["score", "% right", "95 % interval", "chance", "questions"]], rates]
    for name, s in scores.items():
        numbers = f"{s.value:.1f}", f"{s.low:.1f} .. {s.high:.1f}", f"{s.chance:.1f}", f"{s.n}"
        tables[0].append([name, *numbers])
    if PUBLISHED.items() <= {name: s.n for name, s in scores.items()}.items():
        tasks = "Count Relation Depth Distance total".split()
        systems = {"here": [scores[task].value for task in tasks]} | PAPER
        paper = [[name, *(f"{value:.2f}" for value in values)] for name, values in systems.items()]
        tables.append([["paper, % right", *tasks], *paper])
    return tables


def write_report(folder, title, records, questions, data_path, most=25):
    """Write FOLDER/summary.json, summary.md and report.html. The page shows a sample of at most `most` wrong
    answers to each task, always the same, or it would not open."""
    scores = {name: score._asdict() for name, score in scores_of(records).items()}
    write_text(folder / "summary.json", json.dumps({"scores": scores, "rates": rates_of(records)}, indent=1))
    tables = "\n".join(map(markdown_table, tables_of(records)))
    write_text(folder / "summary.md", f"# {title}\n\n{tables}")
    body = [element("pre", tables, "table"), legend_html(data_path)]
    asked = {q["id"]: q for q in questions}
    for task, failed in group([r for r in records if not right_answers(r)], "task").items():
        shown = random.Random("report").sample(failed, min(most, len(failed)))
        body.append(element("h2", f"{task}: {len(shown)} of {len(failed)} questions without a right answer"))
        for record in sorted(shown, key=lambda record: record["id"]):
            q, answer = asked[record["id"]], record["answers"][0]
            chosen = answer["chosen"] or f"no choice: {(answer['extracted'] or 'nothing')[:80]}"
            body.append(question_html(
                [data_uri(gv.open_image(image, q["where"])) for image in q["images"]],
                element("p", f"Question {record['id']}"), element("pre", q["text"]),
                element("p", f"Right answer: {record['answer']}", "right"),
                element("p", f"Chosen: {chosen}" + " (cut off)" * (not answer["finished"]), "wrong"),
                element("pre", answer["completion"])))
    write_page(folder / "report.html", title, body)


# ---- A training run: what grpo_vision.py calls, curves.png and rollouts.html ------------------------------

def on_init_end(run):
    """Read the evaluation sets, before the models are loaded."""
    sets = run.cfg.eval_data.split(",") if run.cfg.eval_steps else []
    run.eval_sets = {path: load_questions(path, run.cfg.eval_limit) for path in sets}


def on_train_begin(run, done):
    """Cut the logs to `done` steps, since a killed run may have logged more, or else evaluate the start."""
    if run.accelerator.is_main_process:
        for name in "completions.jsonl", "eval.jsonl", "rollouts.jsonl":
            records = read_jsonl(run.output_dir / name)
            write_jsonl(run.output_dir / name, [r for r in records if done and r["step"] <= done])
        if (legend := Path(run.cfg.data).with_name("legend.png")).exists():
            shutil.copy(legend, run.output_dir)
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


def on_save(run, folder):
    """Draw the run after a checkpoint (a failure must not stop it), and after final/ say what came of it."""
    if not run.accelerator.is_main_process:
        return
    if folder.name != "final":
        try:
            return draw(run.output_dir)
        except (Exception, SystemExit) as error:
            return print(f"warning: curves.png or rollouts.html not drawn: {error!r}", file=sys.stderr)
    for name, scores in group(read_jsonl(run.output_dir / "eval.jsonl"), "set").items():
        first, last = scores[0], scores[-1]
        print(f"{name}: {first['accuracy']:.1f} -> {last['accuracy']:.1f} % right, greedy, "
              f"± {last['standard_error']:.1f} on {last['questions']} questions")
    short_name, direct = shlex.quote(short(run.output_dir)), run.template.endswith("-direct")
    print(f"model:    {short_name}/final\nlook at:  {short_name}/curves.png  {short_name}/rollouts.html")
    print(f"try next: python eval_cvbench.py --run {short_name}{' --modes direct' * direct}"
          "    # every checkpoint on all questions")


def shown_groups(run, step, came, after):
    """Yield a record for rollouts.html of each of a step's first two groups, those with spread first: the
    question, its images as data URIs, and the completions with their tokens and log-probabilities."""
    G = came.cfg.num_generations
    logps = {"before": came.logps, "after": after, "reference": came.ref_logps}         # (N, C) each, or None
    has_spread = came.advantages.view(-1, G).ne(0).any(1).tolist()                                # (B,)
    for group in sorted(range(len(has_spread)), key=lambda i: not has_spread[i])[:2]:
        row, completions = came.batch.rows[group], []
        for i in range(group * G, group * G + G):
            mask = came.rollout.completion_mask[i]
            ids = came.rollout.completion_ids[i, mask].tolist()
            shown = {name: [round(x, 4) for x in values[i, mask].tolist()]
                     for name, values in logps.items() if values is not None}
            completions.append(came.samples[i] | shown | {
                "prefill": gv.completion_text(came.batch.texts[group], [], run.tokenizer),
                "tokens": [run.tokenizer.decode([token]) for token in ids]})
        yield {"step": step, "question": row["question"], "options": row["options"], "answer": row["answer"],
               "images": [data_uri(image) for image in came.batch.images[group]], "completions": completions}


def evaluate_policy(run, step):
    """Ask the sampler the sets' questions, greedily, each process its share -> eval.jsonl"""
    rank, count = run.accelerator.process_index, run.accelerator.num_processes
    mode = run.template if run.template in MODES else f"{run.template}-reasoning"
    args = parse_args(["--max_new_tokens", str(run.cfg.max_completion_length)])
    for name, questions in run.eval_sets.items():
        mine = questions[rank::count]
        answers = answer_questions((run.sampler, run.tokenizer, run.image_processor), mine, mode, args)
        answers = tqdm(answers, f"evaluation on {short(name)}", len(mine), leave=False, disable=rank > 0)
        records = gather_object([with_verdicts(record, strict=False) for record in answers])
        if rank == 0:
            append_score(run.output_dir / "eval.jsonl", step, name, records)


def append_score(path, step, name, records):
    n, p = len(records), mean(right_answers(r) / len(r["answers"]) for r in records)
    append_jsonl(path, [{"step": step, "set": short(name), "questions": n, "accuracy": 100 * p,
                         "standard_error": 100 * (p * (1 - p) / n) ** 0.5,
                         "mean_length": rates_of(records)["mean length"]}])


def smooth(values, width):
    """Average about `width` values around each, fewer at the ends."""
    windows = [values[max(0, i - width // 2):i + width // 2 + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw(run, scores=None):
    """Draw curves.png and rollouts.html from a run's logs. scores: its evaluations; default: eval.jsonl"""
    draw_curves(run, scores or run / "eval.jsonl")
    write_rollouts(run)


PANELS = {"rewards/": "reward", "kl": "KL to the reference, per token", "entropy": "entropy per token, nats",
          "frac_reward_zero_std": "groups without spread", "reflection": "rollouts with a reflection word",
          "completions/clipped_ratio": "rollouts cut at the token limit"}  # what a metric's name begins with


def draw_curves(run, scores):
    """Draw accuracy and mean length of the rollouts, after the paper's Figure 1, and below them PANELS."""
    from matplotlib.figure import Figure
    metrics, said = read_jsonl(run / "metrics.jsonl"), group(read_jsonl(run / "completions.jsonl"), "step")
    for m in metrics:
        m["reflection"] = mean(bool(REFLECTION.search(r["completion"])) for r in said[m["step"]])

    def plot(axes, name, label, color=None):
        steps, values = [m["step"] for m in metrics], [m[name] for m in metrics]
        line, = axes.plot(steps, smooth(values, max(1, len(steps) // 12)), lw=1.8, color=color, label=label)
        axes.plot(steps, values, lw=0.7, alpha=0.35, color=line.get_color())

    figure, names = Figure(figsize=(10, 8.5), layout="constrained"), [*PANELS]
    panels = figure.subplot_mosaic([["top"] * 3, names[:3], names[3:]], height_ratios=[5, 2, 2])
    top = panels["top"]
    for name, line in group(read_jsonl(scores), "set").items():
        x, y, error = ([score[key] for score in line] for key in ("step", "accuracy", "standard_error"))
        label = f"accuracy on {Path(name).stem} ({line[0]['questions']} questions)"
        top.errorbar(x, y, error, fmt="o-", ms=4, elinewidth=0.8, label=label)
    top.set(xlabel="training step", ylabel="accuracy, % (bar: 1 standard error)", ylim=(0, 100))
    right = top.twinx()
    plot(right, "completions/mean_length", "response length of the rollouts", "tab:red")
    right.set(ylabel="tokens", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=3)
    for start, title in PANELS.items():
        for name in filter(lambda name: name.startswith(start), metrics[0]):
            plot(panels[start], name, name.removeprefix(start))
        panels[start].set(title=title, ylim=(min(0, panels[start].get_ylim()[0]), None))
    panels["rewards/"].legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    for axes in panels.values():
        axes.grid(alpha=0.25)
    figure.savefig(run / "curves.png", dpi=120)


def completion_html(c, strongest, has_spread):
    """Show a completion: its tokens, tinted relative to the `strongest` change in its group, with their
    probabilities as hover text, and its numbers."""
    names = [name for name in ("before", "after", "reference") if name in c]
    changes = [after - before for before, after in zip(c["before"], c["after"])]
    most, tokens = max(map(abs, changes)), html.escape(c["prefill"])
    for i, (text, change) in enumerate(zip(c["tokens"], changes)):
        hover = "\n".join(f"{name}: {exp(c[name][i]):.3g}" for name in names)
        kind = "token" + " risen" * (change > 0) + " most" * (abs(change) == most > 0)
        tint = f"--tint: {0.8 * abs(change) / (strongest or 1):.2f}"
        text = html.escape(text.replace("\n", "↵\n"))  # something to point at
        tokens += f'<span class="{kind}" tabindex="0" style="{tint}" data-p="{hover}">{text}</span>'
    numbers = [f"{name[8:]} {value:>4g}" for name, value in c.items() if name.startswith("rewards/")]
    numbers += [f"tokens {c['length']:>4}", f"advantage {c['advantage']:+.2f}"]
    sign = "up" if c["advantage"] > 0 else "down" if c["advantage"] < 0 else "" if has_spread else "same"
    return (f'<div class="completion {sign}"><pre class="tokens">{tokens}</pre>'
            f'{element("pre", "  ".join(numbers))}</div>')


ROLLOUTS = """<p>Completions of training questions, and what the update after each step did to their tokens.
Green edge: better than its group; red edge: worse. Grey rows teach nothing: their group got one reward.
<span class="right">Green</span> tokens became likelier, <span class="wrong">red</span> ones less likely. The
strongest tint is the largest change in the group, a frame that in the completion. Point at a token, tap it or
reach it by Tab for its probability before and after the update and under the reference.</p>"""


def write_rollouts(run):
    """Show RUN/rollouts.jsonl in RUN/rollouts.html."""
    body = [ROLLOUTS, legend_html(run)]
    for step, groups in group(read_jsonl(run / "rollouts.jsonl"), "step").items():
        body.append(element("h2", f"Step {step}"))
        for one in groups:
            completions, options = one["completions"], ", ".join(one["options"] or [])
            body.append(question_html(
                one["images"], element("p", one["question"]), element("p", f"Options: {options}"),
                element("p", f"Right answer: {one['answer']}", "right")))
            strongest = max(abs(after - before) for c in completions
                            for before, after in zip(c["before"], c["after"]))
            has_spread = any(c["advantage"] for c in completions)
            body += [completion_html(c, strongest, has_spread) for c in completions]
            body.append(element("p", f"Strongest tint: {strongest:.2g} in log-probability."))
    write_page(run / "rollouts.html", f"Rollouts of {short(run)}", body)


# ---- The command -----------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", help="folders or hub ids; default: the last runs/toy*/final and its base")
    add("--run", type=Path, help="every checkpoint of this training run instead")
    add("--data", nargs="+", help="CV-Bench, or files as prepare_sat.py writes them; default: the run's sets")
    add("--modes", nargs="+", default=["reasoning"], choices=["all", "reasoning", "direct", *MODES],
        help="how to ask; reasoning, direct: in the model's kind of prompt")
    add("--limit", type=int, help="only so many questions, always the same")
    add("--batch_size", type=int, default=32, help="answers decoded together")
    add("--max_new_tokens", type=int, default=1024, help="tokens at most per answer")
    add("--max_pixels", type=int, help="larger images are shrunk; default: as in the run's training")
    add("--temperature", type=float, help="default: 0, greedy, as the paper; 0.6, as Vision-R1, with --ask")
    add("--num_generations", type=int, default=1, help="K answers per question: pass@1, 2, 4 ... K")
    add("--seed", type=int, default=0, help="seed of sampling, if temperature is above 0")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU",
        default="bfloat16" if torch.cuda.is_available() else "float32")
    add("--strict", action="store_true", help="grade as training does: answer blocks only")
    add("--output_dir", type=Path, default=HERE / "results", help="where answers are kept")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="kept answers: how much better is B?")
    add("--draw", type=Path, metavar="RUN", help="curves.png and rollouts.html of a run, from its logs")
    add("--ask", metavar="QUESTION", help="a question of your own, to the last --model")
    add("--image", nargs="+", default=[], help="images that --ask is about")
    args = parser.parse_args(argv)
    for flag in "limit", "batch_size", "max_new_tokens", "max_pixels", "num_generations":
        require(getattr(args, flag) is None or getattr(args, flag) > 0, f"--{flag} must be at least 1")
    asks = bool(args.ask) or args.ask is None and not args.image
    require(asks and not (args.run and args.model),
            "--ask needs a question, --image needs --ask, and --run takes no --model")
    require(not re.search(r"<\|\w+\|>", args.ask or ""),
            "--ask: a special token in the question. Give images with --image.")
    if args.temperature is None:
        args.temperature = 0.6 if args.ask else 0.0
    require(0 <= args.temperature < inf, "--temperature must be at least 0")
    require(args.num_generations == 1 or args.temperature > 0,
            f"--num_generations {args.num_generations}: greedy answers are all alike. Add --temperature 1.")
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
    # Processes meet only at the end, however slow one is. Without cpu=True each would run alone on a CPU.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
    if args.model is None:
        finished = sorted(gv.RUNS.glob("toy*/final"), key=lambda path: path.stat().st_mtime)
        last = finished[-1].parent if finished else gv.RUNS / "toy"
        args.model, settings = models_of(args.run or last, only_ends=args.run is None)
        args.max_pixels = args.max_pixels or settings["max_pixels"]
        args.data = args.data or settings["eval_data"].split(",")
    paths = args.data or gv.PRESETS["toy"]["eval_data"].split(",")
    sets = {} if args.ask else {path: load_questions(path, args.limit) for path in paths}
    scores = args.run and args.run / "eval_full.jsonl"
    if args.run and state.is_main_process:
        scores.unlink(missing_ok=True)
    models = args.model[-1:] if args.ask else args.model
    for number, name in enumerate(models):
        tokenizer, image_processor = gv.load_processors(name, max_pixels=args.max_pixels)
        model = gv.load_model(name, tokenizer, dtype=getattr(torch, args.dtype)).to(state.device)
        loaded, modes = (model, tokenizer, image_processor), choose_modes(args.modes, tokenizer)
        if args.ask:
            return ask(args, loaded, modes[0])
        for path, mode in itertools.product(sets, modes):
            records = evaluate(name, path, sets[path], mode, loaded, args, state)
            if args.run and state.is_main_process and mode == modes[0]:
                append_score(scores, int(name.rpartition("-")[2]) if number else 0, path, records)
    if args.run and state.is_main_process:
        draw(args.run, scores)
        print(f"drawn from these scores: {args.run}/curves.png")


def models_of(run, only_ends):
    """Find a run's start and its checkpoints or (only_ends) final/ -> names of models, and its settings."""
    trained = [run / "final"] if only_ends else gv.checkpoints(run)
    require((run / "config.json").exists() and trained and trained[0].exists(),
            f"{run} is not a finished run; `python grpo_vision.py` makes one, or name a --model")
    config = json.loads((run / "config.json").read_text())
    return [config["model_name_or_path"], *map(str, trained)], config


def evaluate(name, path, questions, mode, loaded, args, state):
    """Evaluate a model on a set -> records, in the first process. Each process takes every n-th question and
    writes a file of its own; the first merges them at the end."""
    settings = [sorted(dict(loaded[2].size).items()), args.dtype, args.max_new_tokens, args.temperature,
                args.seed, args.strict, MODES[mode]]
    weights = [hashlib.file_digest(file.open("rb"), "sha256").hexdigest()
               for file in sorted(Path(name).glob("*.safetensors"))]  # none: a hub id stands for itself
    settings += [weights or name, [(q["id"], q["digest"]) for q in questions]]
    kind = mode + f"-pass@{args.num_generations}" * (args.num_generations > 1)
    folder = args.output_dir / f"{slug(name)}--{slug(path)}--{kind}--{digest(settings)}"
    with explained(f"--output_dir {args.output_dir} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
    kept = lambda: {r["id"]: r for file in sorted(folder.glob("answers*.jsonl")) for r in read_jsonl(file)}
    done = kept().keys()
    state.wait_for_everyone()  # all have read before one writes
    mine = folder / f"answers.rank{state.process_index}.jsonl"
    write_jsonl(mine, read_jsonl(mine))  # without a line that a killed program left half
    todo = questions[state.process_index::state.num_processes]
    title = f"{short(name)} on {short(path)}, {kind}" + ", graded as in training" * args.strict
    verdicts, left = [], sum(q["id"] not in done for q in todo)
    with tqdm(answer_questions(loaded, todo, mode, args, done), title, left,
              disable=not state.is_main_process) as bar:
        for record in bar:
            append_jsonl(mine, [record])
            verdicts += [answer["correct"] for answer in with_verdicts(record, args.strict)["answers"]]
            bar.set_postfix_str(f"{100 * mean(verdicts):.1f} % right", refresh=False)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    records = [with_verdicts(record, args.strict) for _, record in sorted(kept().items())]
    write_jsonl(folder / "answers.jsonl", records)
    for file in folder.glob("answers.rank*.jsonl"):
        file.unlink()
    write_report(folder, title, records, questions, path)
    print(title, *map(markdown_table, tables_of(records)), sep="\n")
    print(f"look at: {short(folder)}/report.html; to --compare: {short(folder)}/answers.jsonl\n")
    return records


def ask(args, loaded, mode):
    """Print the answer to a question of the user's own."""
    question = dict.fromkeys(("task", "source", "digest", "answer", "options"), "") | {
        "id": 0, "size": 0, "where": "--image", "text": args.ask,
        "images": [{"bytes": None, "path": file} for file in args.image]}
    for record in answer_questions(loaded, [question], mode, args):
        for answer in record["answers"]:
            print(answer["completion"])
            if not answer["finished"]:
                print(f"(cut off: --max_new_tokens {args.max_new_tokens})")
            found = extract_answer(answer["completion"])
            print(f"answer: {found}" if found else "(no answer block)")


if __name__ == "__main__":
    main()
