#!/usr/bin/env python3
"""Prepare training data: SAT, or your own. Every row that is written has been checked.

    python prepare_sat.py                     # download array/SAT (4.6 GB), keep 15,000 rows -> data/sat/
    python prepare_sat.py --from FILE_OR_ID   # your own data: Parquet, JSON, folder, hub     -> data/own/

    --from MMMU/MMMU:Art --split validation     # a subset; options as the text of a list, image_1 to image_7
    --from AI4Math/MathVista --split testmini   # options in some rows, free answers in others
    --from lmms-lab/VQAv2 --split validation    # what ten people answered
    --from train.jsonl    # messages or conversations, as ms-swift, LLaMA-Factory and VLM-R1 read them
    --from FOLDER         # data files, or what save_to_disk of the library datasets wrote

It writes `train.parquet`, one question per row: images (list of Image), question, options (list of text;
empty: the answer is free), answer (one of the options), question_type, source_row (its index in the source)
and, for supervised fine-tuning, completion: a column, or the replies that have <think> and <answer> blocks.
"""
import argparse
import ast
import itertools
import json
import os
import random
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from string import ascii_lowercase

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value, load_dataset, load_from_disk
from huggingface_hub import hf_hub_download
from tqdm import tqdm

from grpo_vision import (HERE, MARK, accuracy_reward, choose, extract_answer, fail, format_reward,
                         open_image)
from recipes import math_reward

TEXT = Value("string")
SAT_FEATURES = Features({"images": List(Image()), "question": TEXT, "options": List(TEXT), "answer": TEXT,
                         "question_type": TEXT, "source_row": Value("int64")})
CHAIN_FEATURES = Features({**SAT_FEATURES, "completion": TEXT})


def write_parquet(path, rows, features):
    """Stream dicts into a Parquet file, marked as checked. It gets its name at the end, if it has rows."""
    path, rows, schema = Path(path), iter(rows), features.arrow_schema
    schema = schema.with_metadata({**schema.metadata, MARK: b"checked"})
    unfinished = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(unfinished, schema) as writer:
            while chunk := list(itertools.islice(rows, 100)):
                writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
        if pq.ParquetFile(unfinished).metadata.num_rows:
            unfinished.replace(path)
    except OSError as error:
        fail(f"{path} cannot be written: {error}. Make room, or choose another --out.")
    finally:
        with suppress(OSError):
            unfinished.unlink()


# ---- Reading the source ----------------------------------------------------------------------------------

COLUMN_NAMES = {"images": ("images", "decoded_image", "image", "image_bytes", "image_1"),  # ours: usual names
                "question": ("question", "problem", "messages", "conversations", "prompt"),
                "answer": ("answer", "solution", "multiple_choice_answer", "correct_answer", "answers"),
                "options": ("options", "choices", "answers"), "question_type": ("question_type",),
                "completion": ("completion",)}


def read_data(name, split=None):
    """Open a Parquet or JSON file, a folder or a hub data set -> its columns; a function from column names to
    rows whose images are still encoded; and the folder where image paths start (None: on the hub)."""
    path = Path(name)
    try:
        if path.is_file() and split:
            fail(f"{path} is a single file, which has no splits. Leave out --split {split}.")
        if name == "array/SAT":  # load_dataset fails on it
            path = Path(hf_hub_download(name, "SAT_train.parquet", repo_type="dataset"))
        if path.is_file() and path.suffix in (".json", ".jsonl"):
            text = path.read_text("utf-8-sig").strip()
            if not text.startswith("["):  # JSON Lines
                text = "[" + re.sub(r"\n\s*", lambda line_break: "," + line_break[0], text) + "]"
            rows = json.loads(text)  # as they are: `datasets` would force one type on a column
            columns = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
            return list(columns), lambda wanted: rows, path.parent
        if path.is_file():
            file = pq.ParquetFile(path)
            # a few rows at a time: SAT's file is one huge row group, which memory may not hold
            read = lambda wanted: (row for batch in file.iter_batches(16, columns=wanted)
                                   for row in batch.to_pylist())
            return file.schema_arrow.names, read, path.parent
        is_saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        data = load_from_disk(name) if is_saved else load_dataset(*name.split(":"), streaming=True)
        if isinstance(data, dict) and (split or "train") not in data:
            fail(f"{name} has no split {split or 'train'}. Give --split {' or --split '.join(data)}.")
        data = data[split or "train"] if isinstance(data, dict) else data
        data = (data.to_iterable_dataset() if isinstance(data, Dataset) else data).decode(False)
    except Exception as error:  # a missing folder, no network, no such data set: the same to the user
        reason = " ".join(str(error).split()) or type(error).__name__
        fail(f"{name} cannot be read as Parquet, .json, .jsonl, a folder or a hub data set: {reason}")
    return data.column_names, data.select_columns, path if path.is_dir() else None


def choose_columns(name, found, flag=""):
    """{our column: theirs or None}, by --columns ("ours=theirs,..."; "ours=": none), else by usual names."""
    chosen, listed = {}, f"{name} has the columns {', '.join(found) or '(none)'}"
    for pair in filter(None, flag.split(",")):
        ours, equals, theirs = map(str.strip, pair.partition("="))
        if ours not in COLUMN_NAMES or not equals or theirs not in ["", *found]:
            fail(f"--columns {pair}: write OURS=THEIRS, ours being {', '.join(COLUMN_NAMES)}; {listed}.")
        chosen[ours] = theirs or None
    for ours, names in COLUMN_NAMES.items():
        chosen.setdefault(ours, next((theirs for theirs in names if theirs in found), None))
        has_replies = chosen.get("question") in ("messages", "conversations")
        if not chosen[ours] and (ours == "question" or ours == "answer" and not has_replies):
            fail(f"{listed}, but none called {' or '.join(names)}: give --columns {ours}=NAME.")
    return chosen


# ---- One row in, one row out, or the reason why not ------------------------------------------------------

class Skip(Exception):
    """Why a row is not kept."""


def require(condition, reason):
    if not condition:
        raise Skip(reason)


def as_text(value):
    """Text or a number -> text. A whole number loses its ".0", and nan is empty."""
    require(value is None or isinstance(value, (str, int, float)), "odd shape")
    if isinstance(value, float):
        value = None if value != value else int(value) if value.is_integer() else value
    text = "" if value is None else str(value).strip()
    require(not re.search("[\ud800-\udfff]", text), "broken text")  # half a surrogate pair: JSON lets it pass
    return text


# A letter that stands alone. "a" is an article, and letters joined by "and" or "or" name several options.
LETTER = re.compile(r"(?<![^\W_])(?<!and )(?<!or )(?:[A-Zb-z]|a(?=[.):\]]))(?![^\W_])(?! (?:and|n?or) )")
# The label of an option, %s its letter: A. cat, (A)cat, A - cat. Text that refers to the order of options.
LABEL = r"((?:option |choice )?[(\[{<*]*)%s([)\]}>*]+[.:、．：]?|[.:、．：][)*]*|\s?[-–—](?= ))\s*(?=\S)"
ORDERED = re.compile(r"(?<![^\W_])(?:[B-H]|[b-d](?=[.):\]]))(?![^\W_])|(?i:\b(of|all|none)( the)? above\b)")
# A wrapped answer. The one group that matches is the answer.
WRAPPED = re.compile(r".*####(.*)|[*\s]*(?:the )?(?:final |correct )?answer(?: is\b:?|\s*:)[*\s]*(.*)|"
                     r"\$+([^$]+)\$+|\\[(\[](.*)\\[)\]]|\*\*([^*]+)\*\*|(?:(?!\\boxed).)*\\boxed\{"
                     r"((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}(?:(?!\\boxed).)*", re.DOTALL | re.IGNORECASE)
MARKUP = re.compile(r"</?answer>|</?think>|\\boxed|####|^\['", re.IGNORECASE)  # refused if left
MATHEMATICS = re.compile(r"\\[a-z]|[\^√π°²³$%]|\d ?/ ?\d|\d ?([cdkm]?m|k?g|ft|degrees)\b", re.IGNORECASE)
READINGS = ("text", "letter", "index0", "index1")


def own_letter(option):
    letter = LETTER.search(option)
    return letter[0].lower() if letter else "~"  # sorted last, and chooses nothing


def letters_agree(options, question=""):
    """-> whether each option's letter, its own or the question's, chooses this option or none."""
    letters = list(map(own_letter, options))
    pairs = [] if set(letters) <= {"a", "~"} else list(zip(letters, options))
    for label in re.finditer(LABEL % r"\b([a-z])", question, re.IGNORECASE):
        listed = [option for option in options if question.startswith(option, label.end())]
        pairs += [(label[2], max(listed, key=len))] if listed else []
    return all(choose(letter, options) in (None, option) for letter, option in pairs)


def take_letters_off(options):
    """["A. cat", "B. dog"] -> ["cat", "dog"], if each has its letter, in one format. Letters that mark
    objects in the image, as in "(A) is above (B)", stay."""
    labels = [re.match(LABEL % letter, text, re.IGNORECASE) for letter, text in zip(ascii_lowercase, options)]
    if len(options) not in range(2, 27) or not all(labels) or len({label.groups() for label in labels}) > 1:
        return options
    bare = [option[label.end():] for option, label in zip(options, labels)]
    is_marked = any(label[0].strip() in text for label in labels for text in bare)
    return options if is_marked or len(set(bare)) < len(bare) else bare


def read_answer(answer):
    """Text, a number, or a list of what several people said -> text without its wrapping."""
    if isinstance(answer, list):
        votes = Counter(as_text(vote.get("answer") if isinstance(vote, dict) else vote) for vote in answer)
        (answer, most), *others = votes.most_common(2) or [("", 0)]
        require(all(count < most for _, count in others), "several answers")
    text = extract_answer(as_text(answer)) or as_text(answer)
    while wrapped := WRAPPED.fullmatch(text):
        text = wrapped[wrapped.lastindex].strip()
    return text


def read_turns(turns):
    """Turns, {"from", "value"} or {"role", "content"} -> the question, and the reply ("" if there is none).
    Content in parts becomes text: {"type": "image"} becomes <image>. System turns are dropped."""
    read = lambda part: as_text(part.get("text")) if part.get("type") == "text" else f"<{part.get('type')}>"
    turns = [turn for turn in turns if turn.get("from", turn.get("role")) != "system"]
    who = " ".join(str(turn.get("from") or turn.get("role")) for turn in turns)
    require(re.fullmatch("(user|human)( assistant| gpt)?", who), "not one question and one reply")
    contents = [turn.get("value") or turn.get("content") for turn in turns]
    texts = [" ".join(map(read, x)) if isinstance(x, list) else as_text(x) for x in contents]
    return texts[0], "".join(texts[1:])


def read_texts(raw, columns):
    """Read a raw row (columns: from `choose_columns`) -> our columns, images as they are. readings: the
    ways to read its answer. is_option: the raw answer is one of the raw options."""
    row = {"reply": "", **{ours: raw.get(theirs) for ours, theirs in columns.items()}}
    if columns["images"] == "image_1":
        row["images"] = [raw.get(f"image_{number}") for number in range(1, 8)]
    row["images"] = row["images"] or raw.get("image" if columns["images"] else None)  # as in Vision-R1
    if isinstance(row["question"], list):
        row["question"], row["reply"] = read_turns(row["question"])
    answer = row["answer"] if columns["answer"] else row["reply"]
    options = row["options"] if columns["options"] != columns["answer"] else []  # both may be `answers`
    if isinstance(options, str):  # MMMU's are the text of a list
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            options = ast.literal_eval(options.strip() or "[]")
    require(isinstance(options or [], list), "options are not a list")
    # VQAv2's `answers` are what several people said
    options = [option for option in options or [] if not isinstance(option, dict) or "answer" not in option]
    texts = list(map(as_text, options))
    ordered = texts if letters_agree(texts) else sorted(texts, key=own_letter)
    bare = take_letters_off(ordered)
    # After sorting, an index is ambiguous. A letter is too, unless it was the label of an option.
    readings = READINGS if ordered == texts else READINGS[:2] if bare != ordered else READINGS[:1]
    return {**row, "question": as_text(row["question"]), "options": bare, "readings": readings,
            "question_type": as_text(row["question_type"]) or None, "is_option": answer in options,
            "answer": read_answer(answer), "completion": as_text(row["completion"]) or row["reply"]}


def find_answer(row, reading):
    """-> the option that the answer names by its text, its letter, its index or as "B. dog", or None."""
    answer, options = row["answer"].lower(), row["options"]
    letters, label = dict(zip(ascii_lowercase, options)), re.match(LABEL % "([a-z])", answer)
    if label and letters.get(label[2], "").lower() == answer[label.end():]:
        return letters[label[2]]
    answer = re.sub(r"^(option|choice) |\W", "", answer) if reading == "letter" else answer
    names = {"text": [read_answer(option).lower() for option in options], "letter": ascii_lowercase,
             "index0": map(str, itertools.count()), "index1": map(str, itertools.count(1))}[reading]
    return dict(zip(names, options)).get(answer) if reading in row["readings"] else None


def load_image(image, folder):
    """Encoded bytes, {"bytes", "path"} or a path in `folder` -> {"bytes", "path"} that training can open."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    try:
        if not isinstance(image, bytes):
            path = (Path(folder) / image).resolve()
            require(path.is_relative_to(Path(folder).resolve()), "image outside its folder")
            image = path.read_bytes()
        size = open_image({"bytes": image}, "").size
        require(max(size) <= 200 * min(size), "image too long for the model")
    except (OSError, ValueError, TypeError, SystemExit):  # missing, a folder, not a file name, truncated
        raise Skip("missing or broken image") from None
    return {"bytes": image, "path": None}


# An image's place in a question. Special tokens, some of which are never sampled, and images or videos.
IMAGE_MARK = re.compile(r"\s*(?:<image[^<>\d]*(\d*)>|<img\b[^<>]*>(?:[^<>]*</img>)?)\s*", re.IGNORECASE)
NO_TEXT = re.compile(r"<\|[^|]*\|>|</?s>|<video[^<>]*>|" + IMAGE_MARK.pattern, re.IGNORECASE)


def parse_row(raw, columns, folder, reading, chains=False, multi_image=False):
    """Parse a raw row -> a training row, or raise Skip. chains: replies are completions."""
    row = read_texts(raw, columns)
    require(row["answer"], "empty answer")
    row["answer"] = find_answer(row, reading) if row["options"] else row["answer"]
    require(row["answer"], "answer not among the options, or ambiguous")
    require(not chains or format_reward(row["reply"]), "not one <think> and one <answer> block")
    require(row["completion"] or not columns["completion"], "empty completion")
    images = row["images"] if isinstance(row["images"], list) else [row["images"]]
    row["images"] = [load_image(image, folder) for image in images if image]
    require(row["images"] or not columns["images"], "no image (--columns images= keeps rows without)")
    require(multi_image or len(row["images"]) < 2, "several images (--multi_image keeps them)")
    marks = IMAGE_MARK.findall(row["question"])
    marked = max([marks.count(""), *map(int, filter(None, marks))])
    require(marked <= len(row["images"]), "more image marks than images")
    row["question"] = IMAGE_MARK.sub(" ", row["question"]).strip()
    row["options"] = list(dict.fromkeys(filter(None, row["options"])))
    return check(row)


def check(row):
    """-> the row. Skip it if it would mislead or stop training."""
    answer, options = row["answer"], row["options"]
    texts = " ".join([row["question"], *options, answer, row["completion"]])
    require(row["question"], "empty question")
    require(not NO_TEXT.search(texts), "a token such as <|im_end|>, <video> or <image> in its text")
    require(len(options) != 1, "fewer than two options")
    require(letters_agree(options, row["question"]), "letters of the options that disagree with their places")
    require(options or not MARKUP.search(answer), "an answer in an unknown format")
    earns = math_reward if not options and MATHEMATICS.search(answer) else accuracy_reward
    own = f"<think></think><answer>{answer}</answer>"
    require(earns(own, answer=answer, options=options), "its own answer would earn no reward")
    return row


def convert(rows, how, verdicts, shuffle=False, seed=0):
    """Yield training rows. how: arguments of `parse_row`. verdicts: a dict that gets {verdict: raw rows}."""
    for index, raw in enumerate(rows):
        try:
            row = parse_row(raw, **how)
        except (Skip, AttributeError) as error:  # an AttributeError: something is no dict
            reason = error if isinstance(error, Skip) else "odd shape"
            verdicts.setdefault(f"skipped: {reason}", []).append(index)
            continue
        verdicts.setdefault("kept", []).append(index)
        if not row["options"] and MATHEMATICS.search(row["answer"]):
            verdicts.setdefault("with mathematics: use recipes.py, --rewards math,format", []).append(index)
        if shuffle and not ORDERED.search(" ".join([row["question"], *row["options"]])):
            random.Random(f"{seed}/{index}").shuffle(row["options"])
        yield {**row, "source_row": index}


def decide(name, found, rows, args):
    """Rows with options -> the one of READINGS that fits most rows, and whether to shuffle: for SAT, and if
    one place is right in 90 % of at least 20 rows with the same number of options."""
    fits = {reading: {} for reading in READINGS}  # number of a row: the place of its answer
    for number, row in enumerate(rows):
        for reading in READINGS[:2] if row["is_option"] else READINGS:
            if option := find_answer(row, reading):
                fits[reading][number] = row["options"].index(option)
    fits["index1"] = {} if 0 in fits["index0"].values() else fits["index1"]  # a column with 0 is index0
    best = args.answers or max(READINGS, key=lambda reading: len(fits[reading]))
    tied = [reading for reading in READINGS if len(fits[reading]) == len(fits[best])]
    if not args.answers and any(fits[reading] != fits[best] for reading in tied):
        fail(f"{name}: answers can be read in several ways: give --answers {' or --answers '.join(tied)}.")
    print(f"answers are read as: {best}" if fits[best] else "answers are free text")
    places = Counter((len(rows[number]["options"]), place) for number, place in fits[best].items())
    is_sat = {"image_bytes", "answers", "correct_answer"} <= set(found)
    reasons = ["in SAT's counting rows the right one is first"] * is_sat + ["--shuffle"] * args.shuffle
    for (size, place), count in places.items():
        total = sum(each for (other, _), each in places.items() if other == size)
        if size > 1 and total >= 20 and count >= 0.9 * total:
            reasons.append(f"number {place + 1} of {size} is right in {count} of {total} rows")
    order = f"are shuffled: {reasons[0]}" if reasons else "stay in order: no place is right in 90 % of rows"
    if places:
        print(f"options {order}")
    return best, bool(reasons)


def choose_parser(name, found, rows, folder, args):
    """-> arguments of `parse_row`, the Features of stored rows, and whether options are shuffled."""
    columns, texts = choose_columns(name, found, args.columns), []
    wanted = {columns[ours]: None for ours in ("question", "options", "answer") if columns[ours]}
    for raw in rows(list(wanted)):
        with suppress(Skip, AttributeError):  # such rows are counted later
            texts.append(read_texts(raw, columns))
    reading, shuffle = decide(name, found, [row for row in texts if row["options"]], args)
    chains = 2 * sum(format_reward(row["reply"]) for row in texts) > len(texts)
    if chains:
        print("replies have chains of thought, and become completions")
    if not columns["images"]:
        print("rows have no images (--columns images=NAME): only a single process can train on them")
    how = dict(columns=columns, folder=folder, reading=reading, chains=chains, multi_image=args.multi_image)
    return how, CHAIN_FEATURES if chains or columns["completion"] else SAT_FEATURES, shuffle


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--from", dest="source", help="Parquet, JSON, folder or hub id; default: SAT")
    parser.add_argument("--columns", default="", help="images=img,question=q,answer=label,options=choices,"
                        "question_type=kind,completion=chain; those left out go by their usual names")
    parser.add_argument("--answers", choices=READINGS, help="how answers name options; default: what fits")
    parser.add_argument("--shuffle", action="store_true", help="shuffle options, unless the text has letters")
    parser.add_argument("--split", help="of a folder or a hub data set; default: train")
    parser.add_argument("--limit", type=int, help="rows to keep; default: all, of SAT the paper's 15000")
    parser.add_argument("--multi_image", action="store_true", help="keep rows with several images too")
    parser.add_argument("--out", help="folder to write; default: data/sat or data/own")
    args = parser.parse_args(argv)
    limit = args.limit if args.limit is not None or args.source else 15000
    path = Path(args.out or HERE / ("data/own" if args.source else "data/sat")).expanduser() / "train.parquet"
    if limit is not None and limit < 1:
        fail(f"--limit {limit} keeps nothing. Give a number of rows above 0.")
    if os.path.exists(path):
        fail(f"{path} exists. Choose another folder by --out, or delete it yourself.")
    name, verdicts = args.source or "array/SAT", {}
    found, read, folder = read_data(name, args.split)
    how, features, shuffle = choose_parser(name, found, read, folder, args)
    rows = itertools.islice(convert(read(found), how, verdicts, shuffle), limit)
    write_parquet(path, tqdm(rows, total=limit, unit=" rows", desc="kept"), features)
    for verdict, numbers in sorted(verdicts.items()):
        print(f"{len(numbers):8,} {verdict}" + (f" (row {numbers[0]})" if verdict != "kept" else ""))
    if "kept" not in verdicts:
        fail(f"no row of {name} could be kept: nothing was written.")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
