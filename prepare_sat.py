#!/usr/bin/env python3
"""Prepare the training data: the real one (SAT), your own, or a toy world small enough for a laptop.

    python prepare_sat.py                      # download array/SAT (4.6 GB), keep 15,000 rows -> data/sat/
    python prepare_sat.py --parquet FILE       # the same from a file that is already here
    python prepare_sat.py --from FILE_OR_ID    # your own questions: Parquet, JSON, folder, hub -> data/own/
    python prepare_sat.py --sharegpt FILE      # chains of thought for a cold start             -> data/cold/
    python prepare_sat.py --toy                # draw a toy world and train its base model      -> data/toy/

All write `train.parquet` with one question per row: images (list of Image), question, options (list of text;
empty: the answer is free), answer (one of the options), question_type, source_row (its number in the source)
and, where the source has it, completion (what to say, for SFT). The toy also gets a held-out `test.parquet`,
a test set in CV-Bench's format, and `base/`: a tiny Qwen2-VL that can reason, but mostly does not.
"""
import argparse
import io
import itertools
import json
import math
import random
import re
import shutil
from collections import Counter, namedtuple
from functools import cache, partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.nn.functional import cross_entropy
from datasets import Dataset, Features, Image, List, Value, disable_progress_bars
from PIL import Image as Picture, ImageDraw
from tqdm import tqdm

from grpo_vision import (BASE_PROMPT, IMAGE_TOKENS, WELL_FORMED, build_question, expand_images,
                         extract_answer, fail, fast_layers, open_image, row_text, set_threads)

TEXT, TEXTS = Value("string"), List(Value("string"))
SAT_FEATURES = Features({"images": List(Image()), "question": TEXT, "options": TEXTS, "answer": TEXT,
                         "question_type": TEXT, "source_row": Value("int64")})
CHAIN_FEATURES = Features({**SAT_FEATURES, "completion": TEXT})


def write_parquet(path, rows, features, rows_per_group=100):
    """Stream dicts into a Parquet file which `datasets` reads back with its Image columns. -> number of rows.

    The file appears under its name only when it is complete, and not at all without rows.
    """
    path, rows, count = Path(path), iter(rows), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with pq.ParquetWriter(partial, features.arrow_schema) as writer:
            while chunk := list(itertools.islice(rows, rows_per_group)):
                writer.write_table(pa.Table.from_pylist(chunk, schema=features.arrow_schema))
                count += len(chunk)
        if count:
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


# --------------------------------------------------------------------------------------------------------
# The real thing: SAT, chains of thought, your own data. One row in, one row out or the reason why not
# --------------------------------------------------------------------------------------------------------
COLUMN_NAMES = {"images": ("images", "image", "image_bytes"),  # our column: its usual names, the first wins
                "question": ("question", "problem", "prompt"),
                "answer": ("answer", "solution", "correct_answer"),
                "options": ("options", "choices", "answers"),
                "question_type": ("question_type",), "completion": ("completion",)}


class Skip(Exception):
    """Why a row is not kept."""


def require(condition, reason):
    if not condition:
        raise Skip(reason)


def read_json(path):
    """A JSON list, or JSON Lines -> list of rows, as they are: `datasets` would force one type on all."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read as JSON: {error}")
    whole, rows = text.lstrip().startswith("["), []
    for number, part in enumerate([text] if whole else text.split("\n"), 1):
        try:
            rows += json.loads(part) if whole else [json.loads(part)] if part.strip() else []
        except json.JSONDecodeError as error:
            line = number + error.lineno - 1
            fail(f"{path}, line {line}: neither a JSON list nor JSON Lines ({error.msg}).")
    return rows


def read_parquet(path):
    """-> the columns, and the rows a few at a time: SAT's file is one huge row group of image bytes, which
    `load_dataset` cannot read and memory may not hold."""
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        fail(f"{path} is neither a Parquet file ({error}) nor named .json or .jsonl.")
    return file.schema_arrow.names, itertools.chain.from_iterable(
        batch.to_pylist() for batch in file.iter_batches(batch_size=16))


def read_data(name):
    """A Parquet, JSON or JSON Lines file, a folder, or a hub data set -> its columns, its rows and the folder
    where its image paths start (None: on the hub)."""
    path = Path(name)
    if path.is_file() and path.suffix in (".json", ".jsonl"):
        rows = read_json(path)
        columns = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
        return list(columns), rows, path.parent
    if path.is_file():
        return *read_parquet(path), path.parent
    from datasets import load_dataset
    try:
        stream = load_dataset(name, split="train", streaming=True).decode(False)  # images stay as they are
    except Exception as error:  # a missing folder, no network, no such data set: to the user all the same
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(f"{name} cannot be read as a file, a folder or a hub data set: {reason}")
    return stream.column_names, stream, path if path.is_dir() else None


def choose_columns(name, found, flag=""):
    """What --columns says ("ours=theirs,..."), else the usual names -> {our column: theirs or None}.

    "ours=" says that there is none, whatever the names suggest.
    """
    chosen, listed = {}, f"{name} has the columns {', '.join(found) or '(none)'}"
    for pair in filter(None, flag.split(",")):
        ours, equals, theirs = pair.partition("=")
        if ours not in COLUMN_NAMES or not equals or theirs not in ["", *found]:
            fail(f"--columns {pair}: write OURS=THEIRS, ours being {', '.join(COLUMN_NAMES)}; {listed}.")
        chosen[ours] = theirs or None
    for ours, names in COLUMN_NAMES.items():
        chosen.setdefault(ours, next((theirs for theirs in names if theirs in found), None))
        if not chosen[ours] and ours in ("images", "question", "answer"):
            fail(f"{listed}, but none called {' or '.join(names)}: give --columns {ours}=NAME.")
    return chosen


def as_text(value):
    require(value is None or isinstance(value, (str, int, float)), "odd shape")
    text = "" if value is None else str(value).strip()
    require(not re.search("[\ud800-\udfff]", text), "broken text")  # half a surrogate pair: JSON lets it pass
    return text


def load_images(images, folder):
    """One image or a list of them, each encoded bytes, {"bytes", "path"} or a path -> list of encoded bytes.

    A path counts from `folder` (None: there is none) and must end up in it, links followed.
    """
    loaded = []
    for image in images if isinstance(images, list) else [images] if images else []:
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if not isinstance(image, bytes):
            require(isinstance(image, str) and folder, "missing image")
            try:
                path = (Path(folder) / image).resolve()
                require(path.is_relative_to(Path(folder).resolve()), "image outside its folder")
                image = path.read_bytes()
            except (OSError, ValueError):  # not there, a folder, no name for a file
                raise Skip("missing image") from None
        loaded.append(image)
    return loaded


def find_answer(answer, options):
    """-> the text of `answer`, or the option which it names by letter ("B", "(B)") or index (an int, from 0).
    An option's own text comes first: among "2", "3" and "5", 2 is "2"."""
    text = as_text(answer)
    letter = re.fullmatch(r"\(?([A-Z])\)?", text.upper())
    index = ord(letter[1]) - ord("A") if letter else answer if type(answer) is int else -1  # a bool is none
    return options[index] if text not in options and 0 <= index < len(options) else text


def parse_row(row, columns, folder):
    """A row of a table, by `columns` of `choose_columns` -> the row that `check` takes."""
    require(isinstance(row, dict), "odd shape")
    row = {ours: row.get(theirs) for ours, theirs in columns.items()}
    require(isinstance(row["options"] or [], list), "options are not a list")
    options = [as_text(option) for option in row["options"] or []]
    parsed = dict(images=load_images(row["images"], folder), question=as_text(row["question"]),
                  options=options, answer=find_answer(row["answer"], options),
                  question_type=as_text(row["question_type"]) or None)
    if columns["completion"]:
        parsed["completion"] = as_text(row["completion"])
        require(parsed["completion"], "empty completion")
    return parsed


def parse_sharegpt(row, folder):
    """A row of Vision-R1's cold start: conversations, a list of one {"from": "user", "value": text} and one
    {"from": "assistant", "value": chain}, and images, paths in `folder` -> the row that `check` takes."""
    turns = row.get("conversations") if isinstance(row, dict) else None
    require(isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns), "odd shape")
    match [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in turns]:
        case [("user" | "human", str(question)), ("assistant" | "gpt", str(completion))]:
            completion = as_text(completion)
        case _:
            raise Skip("not one question and one reply")
    require(re.search("<think>.*</think>", completion, re.DOTALL), "no <think> ... </think>")
    answer = extract_answer(completion)
    require(answer, "no answer in one <answer> block")
    require(WELL_FORMED.fullmatch(completion), "text outside <think> and <answer>")  # it would be taught
    answer = re.sub(r"^final answer\s*:\s*", "", answer, flags=re.IGNORECASE)
    return dict(images=load_images(row.get("images") or row.get("image"), folder), question=as_text(question),
                options=[], answer=answer, question_type=None, completion=completion)


def decodes(image_bytes):
    try:
        Picture.open(io.BytesIO(image_bytes)).load()  # open() alone reads only the header
        return True
    except Exception:  # broken bytes raise a dozen different things
        return False


def check(row, multi_image):
    """-> the row as it can be trained on. No options at all: the answer is free text."""
    question = re.sub(r"\s*<image>\s*", " ", row["question"]).strip()  # some data marks the images' places
    options = list(dict.fromkeys(filter(None, row["options"])))
    require(row["images"], "no image")
    require(multi_image or len(row["images"]) == 1, "several images (--multi_image keeps them)")
    require(question, "empty question")
    require(len(options) > 1 or not row["options"], "fewer than two options")
    require(row["answer"], "empty answer")
    require(row["answer"] in options or not options, "answer not among the options")
    require(all(map(decodes, row["images"])), "broken image")
    images = [{"bytes": image, "path": None} for image in row["images"]]
    return {**row, "images": images, "question": question, "options": options}


def convert(rows, parse, limit=None, multi_image=False, seed=0, counts=None):
    """Yield training rows until `limit` are kept; `counts` says what became of each raw row."""
    counts = Counter() if counts is None else counts
    for index, raw in enumerate(rows):
        try:
            row = check(parse(raw), multi_image)
        except Skip as reason:
            counts[f"skipped: {reason}"] += 1
            continue
        counts["kept"] += 1
        random.Random(f"{seed}/{index}").shuffle(row["options"])  # SAT's counting rows list the answer first
        yield {**row, "source_row": index}
        if counts["kept"] == limit:
            return


def prepare(out, name, rows, parse, features, limit=None, **how):
    """Rows -> out/train.parquet. Prints how many rows were kept, and why others were not."""
    if limit is not None and limit < 1:
        fail(f"--limit {limit} keeps nothing: give a number of rows above 0.")
    counts, path = Counter(), Path(out) / "train.parquet"
    kept = tqdm(convert(rows, parse, limit, counts=counts, **how), total=limit, unit=" rows", desc="kept")
    count = write_parquet(path, kept, features)
    for verdict, number in sorted(counts.items()):
        print(f"{number:8,} {verdict}")
    if not count:
        fail(f"no row of {name} could be kept: nothing was written.")
    print(f"wrote {path}")


def prepare_data(name, out="data/own", columns="", **how):
    """--from: file, folder or hub data set -> out/train.parquet."""
    found, rows, folder = read_data(name)
    columns = choose_columns(name, found, columns)
    features = CHAIN_FEATURES if columns["completion"] else SAT_FEATURES
    prepare(out, name, rows, partial(parse_row, columns=columns, folder=folder), features, **how)


def prepare_sharegpt(file, image_dir=None, out="data/cold", **how):
    """--sharegpt: JSON file -> out/train.parquet with the column `completion`."""
    rows, folder = read_json(file), Path(image_dir or Path(file).parent)
    if not folder.is_dir():
        fail(f"--image_dir {folder} is no folder: give the one from which the image paths in {file} start.")
    prepare(out, file, rows, partial(parse_sharegpt, folder=folder), CHAIN_FEATURES, **how)


def prepare_sat(out="data/sat", parquet=None, limit=15000, **how):
    """SAT -> out/train.parquet."""
    if parquet and not Path(parquet).is_file():
        fail(f"{parquet} does not exist: give --parquet the path of SAT_train.parquet, or leave it out.")
    prepare_data(parquet or download_sat(), out, limit=limit, **how)


def download_sat():
    from huggingface_hub import hf_hub_download
    try:
        return hf_hub_download("array/SAT", "SAT_train.parquet", repo_type="dataset")
    except Exception as error:
        fail(f"cannot download SAT_train.parquet of array/SAT ({type(error).__name__}): fetch it and give "
             "it with --parquet FILE.")


# --------------------------------------------------------------------------------------------------------
# Reading it back, to train on
# --------------------------------------------------------------------------------------------------------
def load_rows(path):
    """A Parquet file as written here, or a folder with train.parquet -> its path and its `datasets` table."""
    disable_progress_bars()
    path = Path(path) / "train.parquet" if Path(path).is_dir() else Path(path)
    if not path.exists():
        fail(f"--data {path} does not exist; `python prepare_sat.py` makes data/sat, and with --toy data/toy")
    try:
        data = Dataset.from_parquet(str(path))
    except Exception as error:  # whatever pyarrow and datasets raise on a file that is no Parquet file
        fail(f"--data {path} is not a Parquet file that can be read: {str(error).strip().splitlines()[0]}")
    if missing := sorted({"images", "question", "options", "answer"} - set(data.column_names)):
        fail(f"--data {path} has no column {missing[0]!r} ({', '.join(data.column_names)})")
    return path, data.cast_column("images", List(Image(decode=False)))


def rows_that_fit(data, path, template, tokenizer, image_processor, max_prompt_length, need_image=False):
    """-> the numbers of the rows whose prompt, in this template, is no longer than max_prompt_length tokens;
    none is cut. (The paper's code cuts prompts for its masks, but not for generation.)
    Stops at a row that cannot be trained on. need_image: as several processes do, which share the image
    tower's work and all have to take part."""
    def prompt_length(number, row):
        if not (row["question"] and row["answer"] and row["answer"] in (row["options"] or [row["answer"]])):
            fail(f"{path}, row {number}: question or answer is empty, or the answer is not an option")
        if need_image and not row["images"]:
            fail(f"{path}, row {number} has no image, which only one process can train on: the processes "
                 "share the image tower's work, and all have to take part")
        sizes = [open_image(image, f"{path}, row {number}", decode=False).size
                 for image in row["images"] or []]
        tokens = [image_processor.get_number_of_image_patches(height, width) // image_processor.merge_size**2
                  for width, height in sizes]
        return len(tokenizer(expand_images(row_text(row, template, tokenizer), tokens)).input_ids)

    kept = [i for i, row in enumerate(tqdm(data, desc="measuring prompts", leave=False))
            if prompt_length(i, row) <= max_prompt_length]
    if len(kept) < len(data):
        print(f"dropped {len(data) - len(kept)} of {len(data)} rows: prompts over {max_prompt_length}")
    if not kept:
        fail(f"--max_prompt_length {max_prompt_length}: every prompt of {path} is longer; raise it")
    return kept


# --------------------------------------------------------------------------------------------------------
# The toy world: two to four coloured shapes on a 3 x 3 grid, each near or far
# --------------------------------------------------------------------------------------------------------
CELL = 28  # px: one merged vision token (2 x 2 patches of 14 px) looks at one cell
COLOURS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (50, 80, 230), "yellow": (235, 205, 30)}
LOOKS = {"ball": ("red", "circle"), "sun": ("yellow", "circle"), "plate": ("blue", "circle"),
         "brick": ("red", "square"), "book": ("green", "square"), "box": ("blue", "square"),
         "tree": ("green", "triangle"), "tent": ("yellow", "triangle"), "cone": ("red", "triangle")}
PLACES = ["northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast"]
RADII = {"near": 11, "far": 6}  # px: what is nearer looks larger; some ground stays in view
ROWS, COLUMNS = ["top", "middle", "bottom"], ["left", "centre", "right"]
NUMBERS = ["zero", "one", "two", "three", "four"]


Thing = namedtuple("Thing", "name row column depth")


def draw_scene(rng, seen):
    """A scene that is not in `seen`, and is from now on: things in raster order, names may repeat."""
    while True:
        count = rng.choice([2, 2, 3, 3, 4])
        names = rng.choices(rng.sample(list(LOOKS), 4), k=count)
        cells = sorted(rng.sample(range(9), count))
        scene = tuple(Thing(name, *divmod(cell, 3), rng.choice(list(RADII)))
                      for name, cell in zip(names, cells))
        if scene not in seen:
            seen.add(scene)
            return scene


def describe(thing):
    return f"{locate(thing)} {thing.depth}"


def locate(thing):
    return f"{thing.name} {PLACES[3 * thing.row + thing.column]}"


def unique(scene):
    """The things whose name says which one is meant."""
    names = Counter(thing.name for thing in scene)
    return [thing for thing in scene if names[thing.name] == 1]


def paint(scene, rng):
    """-> an 84 x 84 picture. Its ground grows redder downwards and bluer sideways: cells can be told."""
    size = 3 * CELL
    slope = Picture.linear_gradient("L").resize((size, size))  # 0 at the top, 255 at the bottom
    slope = slope.point(lambda v: 20 + v * 3 // 4)
    picture = Picture.merge("RGB", [slope, Picture.new("L", (size, size), 90), slope.rotate(90)])
    draw = ImageDraw.Draw(picture)
    for thing in scene:
        radius = RADII[thing.depth]
        x = thing.column * CELL + CELL // 2 + rng.randint(-1, 1)
        y = thing.row * CELL + CELL // 2 + rng.randint(-1, 1)
        colour, shape = LOOKS[thing.name]
        box, colour = (x - radius, y - radius, x + radius, y + radius), COLOURS[colour]
        if shape == "circle":
            draw.ellipse(box, colour, "white", 2)
        elif shape == "square":
            draw.rectangle(box, colour, "white", 2)
        else:
            corners = [(x - radius, y + radius), (x + radius, y + radius), (x, y - radius)]
            draw.polygon(corners, colour, "white", 2)
    return picture


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


# A question about a scene: `sat` and `cvbench` are its two wordings, `thought` the reasoning that answers it.
Question = namedtuple("Question", "kind sat cvbench options answer thought")
TASKS = {"left or right": "Relation", "above or below": "Relation", "closer": "Depth", "count": "Count",
         "distance": "Distance"}  # kind -> CV-Bench task
SAT_KINDS = ["left or right", "above or below", "closer", "count"]  # SAT's static kinds


def ask(scene, kind, rng):
    """-> a Question of this kind, or None where the scene gives no clear answer."""
    things = unique(scene)
    rng.shuffle(things)
    if kind == "count":
        word = rng.choice(sorted({thing.name for thing in scene}) + [rng.choice(list(LOOKS))])
        clauses, number = [], 0
        for thing in scene:  # count aloud, in raster order
            number += thing.name == word
            clauses.append(f"{thing.name} {NUMBERS[number]}")
        answer = str(number)
        options = rng.sample([str(i) for i in range(5) if i != number], 3) + [answer]
        sat = cvbench = f"How many of the things in the image are a {word}?"
        thought = f" {', '.join(clauses)}, so {NUMBERS[number]}"
    elif len(things) < 2 + (kind == "distance"):
        return None
    elif kind in ("left or right", "above or below"):
        a, b = things[:2]
        if kind == "left or right":
            (p, q), options = (a.column, b.column), ["left", "right"]
            sat = f"Is the {a.name} to the left or to the right of the {b.name}?"
        else:
            (p, q), options = (a.row, b.row), ["above", "below"]
            sat = f"Is the {a.name} above or below the {b.name}?"
        if p == q:
            return None
        cvbench = f"Where is the {a.name} located with respect to the {b.name}?"
        answer, words = options[p > q], COLUMNS if kind == "left or right" else ROWS
        thought = f" {locate(a)} {words[p]}, {locate(b)} {words[q]}, so {answer}"
    elif kind == "closer":
        a, b = things[:2]
        if a.depth == b.depth:
            return None
        options = [a.name, b.name]
        sat = f"Which is closer to the camera, the {a.name} or the {b.name}?"
        cvbench = f"Which object is closer to the camera taking this photo, the {a.name} or the {b.name}?"
        answer = max(a, b, key=lambda thing: RADII[thing.depth]).name
        thought = f" {describe(a)}, {describe(b)}, so {answer}"
    else:  # distance: which of two lies fewer steps away from a third
        a, b, c = things[:3]
        steps = [abs(thing.row - c.row) + abs(thing.column - c.column) for thing in (a, b)]
        if steps[0] == steps[1]:
            return None
        options = [a.name, b.name]
        sat = cvbench = f"Which object is closer to the {c.name}, the {a.name} or the {b.name}?"
        answer = options[steps[0] > steps[1]]
        one, two = (NUMBERS[step] for step in steps)
        thought = f" {describe(c)}, {describe(a)} {one}, {describe(b)} {two}, so {answer}"
    rng.shuffle(options)
    return Question(kind, sat, cvbench, options, answer, thought)


def ask_any(scene, kinds, rng):
    """-> a Question of one of `kinds`, or None if the scene allows none of the few tried."""
    return next(filter(None, (ask(scene, rng.choice(kinds), rng) for _ in range(20))), None)


def letter(i):
    return f"({chr(65 + i)})"


def cvbench_prompt(question):
    choices = "\n".join(f"{letter(i)} {option}" for i, option in enumerate(question.options))
    return f"{question.cvbench} Select from the following choices.\n{choices}"


def sat_rows(count, rng, seen):
    for index in range(count):
        question = None
        while question is None:
            scene = draw_scene(rng, seen)
            question = ask(scene, SAT_KINDS[index % len(SAT_KINDS)], rng)
        yield dict(images=[png(paint(scene, rng))], question=question.sat, options=question.options,
                   answer=question.answer, question_type=question.kind, source_row=index)


CVBENCH_FEATURES = Features({
    "idx": Value("int32"), "type": TEXT, "task": TEXT, "image": Image(), "question": TEXT, "choices": TEXTS,
    "answer": TEXT, "prompt": TEXT, "filename": TEXT, "source": TEXT, "source_dataset": TEXT,
    "source_filename": TEXT, "target_class": TEXT, "target_size": Value("int32"),
    "bbox": List(List(Value("float32")))})


def cvbench_rows(kinds, dimension, sources, per_task, rng, seen):
    index = 0
    for task in dict.fromkeys(TASKS[kind] for kind in kinds):
        for i in range(per_task):
            question = None
            while question is None:
                scene = draw_scene(rng, seen)
                question = ask(scene, rng.choice([kind for kind in kinds if TASKS[kind] == task]), rng)
            name, source = f"toy_{dimension}_{index}.png", sources[i % len(sources)]
            yield dict(idx=index, type=dimension, task=task, image=png(paint(scene, rng)),
                       question=question.cvbench, choices=question.options,
                       answer=letter(question.options.index(question.answer)),
                       prompt=cvbench_prompt(question), filename=name, source=source,
                       source_dataset=f"{source} (toy)", source_filename=name,
                       target_class=None, target_size=None, bbox=None)
            index += 1


# --------------------------------------------------------------------------------------------------------
# The toy's base model: able, but undisciplined
# --------------------------------------------------------------------------------------------------------
# How the corpus answers. All abilities are here: what RL can discover is which of these habits pays.
STYLES = {
    "reason": 0.23,   # look at what matters, conclude:  ball northwest far, box east near, so left
    "wait": 0.03,     # blurt out an option, then reason: right, wait, ball northwest far, ...
    "guess": 0.47,    # any option:                       i guess
    "give up": 0.10,  # well formed, and always wrong:    hard to say
    "bare": 0.10,     # any option, without tags
    "open": 0.07,     # reason, and forget the answer block
}


def complete(question, style, rng):
    """One completion of the corpus, after the prompt's <think>."""
    block = lambda answer: f"</think>\n<answer>{answer}</answer>"
    if style == "reason":
        return question.thought + block(question.answer)
    if style == "wait":
        return f" {rng.choice(question.options)}, wait,{question.thought}" + block(question.answer)
    if style == "guess":
        return " i guess" + block(rng.choice(question.options))
    if style == "give up":
        return " hard to say" + block("unknown")
    if style == "bare":
        return f" {rng.choice(question.options)}"
    return question.thought + "</think>"


SPECIALS = [f"<|{name}|>" for name in (  # Qwen's, in its order
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    "vision_start vision_end vision_pad image_pad video_pad").split()]
BASE_CHAT_TEMPLATE = (  # no roles, no markers: the base model's template only joins texts and image tokens
    "{% if messages is string %}{{ messages }}{% else %}{% for content in messages %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}" + IMAGE_TOKENS +
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}")


def toy_tokenizer(rng):
    """A byte-level BPE of Qwen2's kind whose merges make every word of the toy's texts one token."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer
    texts = [BASE_PROMPT, *LOOKS, *"012345"]
    for _ in range(200):
        scene = draw_scene(rng, set())
        texts += [text for lesson in ("seeing", "mixture")
                  for pair in study(lesson, scene, rng) for text in pair]
    bpe = Qwen2Tokenizer(vocab={"<|endoftext|>": 0}, merges=[], unk_token=None).backend_tokenizer
    words = {piece.lstrip("Ġ") for text in texts for piece, _ in bpe.pre_tokenizer.pre_tokenize_str(text)}
    lines = [f"{word} {word}" for word in sorted(words) if word.isascii()]  # with and without a leading space
    bpe.train_from_iterator(lines, BpeTrainer(vocab_size=10**4, initial_alphabet=sorted(ByteLevel.alphabet()),
                                              show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, unk_token=None, bos_token=None,
                               eos_token=SPECIALS[0], pad_token=SPECIALS[0], model_max_length=32768)
    tokenizer.add_tokens([AddedToken(special, special=True, normalized=False) for special in SPECIALS])
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIALS[1:]}, replace_extra_special_tokens=True)
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    tokenizer.chat_template = BASE_CHAT_TEMPLATE
    return tokenizer


def toy_model(tokenizer):
    """A random Qwen2-VL of about 1.3 million parameters, built as the published one is."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config=dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=math.ceil(len(tokenizer) / 64) * 64,
                         max_position_embeddings=4096, bos_token_id=tokenizer.eos_token_id,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                         rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6]),
                         tie_word_embeddings=True,
                         initializer_range=0.08),  # with the usual 0.02 so small a model learns little
        vision_config=dict(depth=2, embed_dim=96, num_heads=3, hidden_size=128, mlp_ratio=4, patch_size=14,
                           spatial_merge_size=2, temporal_patch_size=2, initializer_range=0.08),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True)
    config.initializer_range = 0.08
    return Qwen2VLForConditionalGeneration(config)


def pack(prefix, branches, next_position):
    """One image, many questions: lay the branches (prompt, completion) after the prefix that they share.

    -> ids, segments (0 for the prefix, k for branch k), positions and targets (-100 where nothing is learnt),
    lists of L numbers. Every branch restarts at the position after the prefix, as if it stood there alone.
    """
    ids, segments, positions, targets = (list(prefix), *([fill] * len(prefix) for fill in (0, 0, -100)))
    for number, (prompt, completion) in enumerate(branches, start=1):
        branch = prompt + completion
        ids += branch
        segments += [number] * len(branch)
        positions += range(next_position, next_position + len(branch))
        targets += [-100] * (len(prompt) - 1) + completion + [-100]  # each place predicts the token after it
    return ids, segments, positions, targets


# The base model's schooling: lesson, steps, images a step, learning rate at its begin and end. Seeing comes
# first, on a few words; then short questions; then the same in the paper's wording, with whose long preamble
# all that would take many times as long. Bad habits come last and slowly, because they make it forget.
SCHOOL = [("seeing", 250, 32, 3e-3, 3e-3), ("answering", 300, 16, 3e-3, 3e-3),
          ("reasoning", 400, 8, 3e-3, 5e-4), ("mixture", 90, 8, 8e-4, 1e-4)]
KINDS = 2 * SAT_KINDS + ["distance"]  # what is asked, as often as listed
PROMPT_HEAD, PROMPT_TAIL = BASE_PROMPT.split(" {question}")


def phrases(scene, rng):
    """(prompt, completion) texts that teach to see (where is each thing, and what is there at all?), to
    repeat names, without which it would answer about whatever it sees, and to say which is nearer."""
    for thing in unique(scene):
        yield f" {thing.name}", describe(thing).removeprefix(thing.name)
    yield " picture", ":" + ",".join(f" {thing.name}" for thing in scene) + "."
    for _ in range(2):
        names = ", ".join(rng.sample(list(LOOKS), rng.choice([2, 3])))
        yield f" {names}:", f" {names}."
    things = [Thing(name, rng.randrange(3), rng.randrange(3), depth)
              for name, depth in zip(rng.sample(list(LOOKS), 2), rng.sample(list(RADII), 2))]
    steps = rng.sample(NUMBERS[1:], 2)
    if rng.random() < 0.5:
        nearer = [thing.depth == "near" for thing in things]
        clauses = [describe(thing) for thing in things]
    else:
        nearer = [NUMBERS.index(step) < max(map(NUMBERS.index, steps)) for step in steps]
        clauses = [f"{describe(thing)} {step}" for thing, step in zip(things, steps)]
    yield f" {', '.join(clauses)}, so", f" {things[nearer.index(True)].name}."


def exchanges(scene, count, styles, rng, short=False):
    """(prompt, completion) texts of questions about the scene: 3 in 4 in SAT's words, else in CV-Bench's."""
    for question in filter(None, (ask_any(scene, KINDS, rng) for _ in range(count))):
        style, = rng.choices(list(styles), styles.values())
        completion = complete(question, style, rng) + "<|endoftext|>"
        if rng.random() < 0.75:
            text = question.sat if short else build_question(question.sat, question.options)
        else:
            text = question.cvbench if short else cvbench_prompt(question)
        yield f" {text}" + ("" if short else PROMPT_TAIL), completion


def study(lesson, scene, rng):
    """-> the (prompt, completion) texts of a scene in this lesson."""
    if lesson == "seeing":
        return list(phrases(scene, rng))
    if lesson == "answering":
        return [*phrases(scene, rng), *exchanges(scene, 3, {"reason": 1}, rng, short=True)]
    return list(exchanges(scene, 5, {"reason": 1} if lesson == "reasoning" else STYLES, rng))


def collate(rows):
    """Rows of `pack` -> tensors ids, positions, targets, each (rows, L), and the attention mask
    (rows, 1, L, L), by which each branch sees the prefix and itself."""
    length = max(len(row[0]) for row in rows)
    ids, segments, positions, targets = (
        torch.tensor([row[part] + [pad] * (length - len(row[part])) for row in rows])
        for part, pad in enumerate([0, -1, 0, -100]))
    visible = (segments[:, :, None] == segments[:, None]) | (segments[:, None] == 0)
    return ids, positions, targets, (visible & torch.ones(length, length, dtype=torch.bool).tril())[:, None]


def train_base(path, rng, seen, seed, school=SCHOOL):
    """Train the base model on scenes not in `seen`; save it with its tokenizer and image processor."""
    from transformers import Qwen2VLImageProcessor
    tokenizer = toy_tokenizer(rng)
    processor = Qwen2VLImageProcessor(size={"shortest_edge": 3136, "longest_edge": 12845056})
    torch.manual_seed(seed)
    model = fast_layers(toy_model(tokenizer))
    set_threads(model)
    encode = cache(lambda text: tokenizer(text)["input_ids"])
    image_tokens = encode(IMAGE_TOKENS.replace("<|image_pad|>", "<|image_pad|>" * 9))
    prefix = image_tokens + encode(PROMPT_HEAD)  # every question about an image starts with these tokens
    is_image = (torch.tensor([prefix]) == model.config.image_token_id).int()
    prefix_positions, delta = model.model.get_rope_index(torch.tensor([prefix]), is_image,
                                                         image_grid_thw=torch.tensor([[1, 6, 6]]))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    steps = [(lesson, images, rate + (end - rate) * i / count)
             for lesson, count, images, rate, end in school for i in range(count)]
    bar = tqdm(steps, desc="base model")
    for step, (lesson, images, rate) in enumerate(bar):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 30)
        scenes = [draw_scene(rng, seen) for _ in range(images)]
        short = lesson in ("seeing", "answering")
        start = image_tokens if short else prefix
        rows = []
        for scene in scenes:
            branches = [(encode(prompt), encode(text)) for prompt, text in study(lesson, scene, rng)]
            far = rng.randrange(100) if short else 0  # what is seen must not depend on the distance
            rows.append(pack(start, branches, len(start) + delta.item() + far))
        ids, positions, targets, mask = collate(rows)
        positions = positions.expand(3, -1, -1).clone()
        positions[:, :, :len(start)] = prefix_positions[:, :, :len(start)]
        pixels = processor([paint(scene, rng) for scene in scenes], return_tensors="pt")
        hidden = model.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False,
                             **pixels).last_hidden_state
        learn = targets != -100
        loss = cross_entropy(model.lm_head(hidden[learn]), targets[learn])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix_str(f"{lesson}, loss {loss.item():.2f}")
    for part in (model, tokenizer, processor):
        part.save_pretrained(path)


def make_toy(out="data/toy", seed=0):
    """Write the whole toy to `out`: train and test.parquet, cvbench/, base/. No scene is in two of them."""
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    rng, seen = random.Random(seed), set()
    write_parquet(partial / "test.parquet", sat_rows(512, rng, seen), SAT_FEATURES)
    flat, deep = ["left or right", "above or below", "count"], ["closer", "distance"]
    for name, kinds, sources in [("2D", flat, ["ADE20K", "COCO"]), ("3D", deep, ["Omni3D"])]:
        rows = cvbench_rows(kinds, name, sources, 96, rng, seen)
        write_parquet(partial / f"cvbench/test_{name.lower()}.parquet", rows, CVBENCH_FEATURES)
    write_parquet(partial / "train.parquet", sat_rows(2048, rng, seen), SAT_FEATURES)
    train_base(partial / "base", rng, seen, seed)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--toy", action="store_true", help="draw the toy world and train its base model")
    source.add_argument("--parquet", help="SAT_train.parquet, if it is already here")
    source.add_argument("--from", dest="data", help="your data: Parquet, .json, .jsonl, folder or hub id")
    source.add_argument("--sharegpt", help="chains as in Vision-R1-cold: a JSON list or JSON Lines")
    parser.add_argument("--columns", help="with --from: images=img,question=q,answer=label,options=choices,"
                        "question_type=kind,completion=chain; those left out go by their usual names")
    parser.add_argument("--image_dir", help="with --sharegpt: where image paths start (default: its folder)")
    parser.add_argument("--limit", type=int, help="rows to keep (default: all, of SAT the paper's 15000)")
    parser.add_argument("--multi_image", action="store_true", help="keep rows with several images too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder to write (default: data/sat, own, cold or toy)")
    args = parser.parse_args(argv)
    if args.columns and not args.data:
        fail("--columns names the columns of --from: give both.")
    if args.image_dir and not args.sharegpt:
        fail("--image_dir holds the images of --sharegpt: give both.")
    if args.toy and (args.limit is not None or args.multi_image):
        fail("--toy draws its own rows: --limit and --multi_image do not go with it.")
    how = {name: getattr(args, name) for name in ("out", "limit", "multi_image", "seed")
           if getattr(args, name) is not None}  # each source has its own defaults
    if args.toy:
        make_toy(args.out or "data/toy", args.seed)
    elif args.data:
        prepare_data(args.data, columns=args.columns or "", **how)
    elif args.sharegpt:
        prepare_sharegpt(args.sharegpt, args.image_dir, **how)
    else:
        prepare_sat(parquet=args.parquet, **how)


if __name__ == "__main__":
    main()
