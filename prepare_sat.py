#!/usr/bin/env python3
"""Prepare training data: SAT, or your own. And read it back, to train on.

    python prepare_sat.py                     # download array/SAT (4.6 GB), keep 15,000 rows -> data/sat/
    python prepare_sat.py --from FILE_OR_ID   # your own data: Parquet, JSON, folder, hub     -> data/own/

It writes `train.parquet` with one question per row: images (list of Image), question, options (list of text;
empty: the answer is free), answer (one of the options), question_type, source_row (its number in the source)
and, where the source has it, completion (what to say, for supervised fine-tuning). A source with a column
`conversations` is a cold start in ShareGPT's layout: questions with chains of thought.
"""
import argparse
import io
import itertools
import json
import math
import random
import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value, load_dataset
from tqdm import tqdm

from grpo_vision import HERE, MARK, accuracy_reward, extract_answer, fail, format_reward, open_image

TEXT = Value("string")
SAT_FEATURES = Features({"images": List(Image()), "question": TEXT, "options": List(TEXT), "answer": TEXT,
                         "question_type": TEXT, "source_row": Value("int64")})
CHAIN_FEATURES = Features({**SAT_FEATURES, "completion": TEXT})


def write_parquet(path, rows, features):
    """Stream dicts into a Parquet file. It gets its name when it is complete. Without rows there is none."""
    path, rows = Path(path), iter(rows)
    unfinished = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        schema = features.arrow_schema
        schema = schema.with_metadata(schema.metadata | {MARK: b"checked"})
        with pq.ParquetWriter(unfinished, schema) as writer:
            while chunk := list(itertools.islice(rows, 100)):
                writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
        if pq.ParquetFile(unfinished).metadata.num_rows:
            unfinished.replace(path)
    except OSError as error:
        fail(f"{path} cannot be written: {error}. Make room, or choose another --out.")
    finally:
        unfinished.unlink(missing_ok=True)


# ---- Reading the source ----------------------------------------------------------------------------------

COLUMN_NAMES = {"images": ("images", "image", "image_bytes"),  # our column: its usual names, the first wins
                "question": ("question", "problem", "prompt"),
                "answer": ("answer", "solution", "correct_answer"),
                "options": ("options", "choices", "answers"),
                "question_type": ("question_type",), "completion": ("completion",)}


def read_json(path):
    """A JSON list, or JSON Lines -> list of rows, as they are: `datasets` would force one type on all."""
    where = path
    try:
        text = Path(path).read_text("utf-8-sig")
        if text.lstrip().startswith("["):
            return json.loads(text)
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            where = f"{path}, line {number}"
            if line.strip():
                rows.append(json.loads(line))
        return rows
    except (OSError, ValueError) as error:
        fail(f"{where} cannot be read as a JSON list or JSON Lines: {error}")


def read_data(name):
    """A Parquet or JSON file, a folder, or a hub data set -> its columns; a function from names of columns
    (None: all) to rows; and the folder where image paths start (None: on the hub)."""
    path = Path(name)
    if path.is_file() and path.suffix in (".json", ".jsonl"):
        rows = read_json(path)
        columns = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
        return list(columns), lambda wanted=None: rows, path.parent
    if path.is_file():
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            fail(f"{path} is neither a Parquet file ({error}) nor named .json or .jsonl.")
        def read(wanted=None):
            # a few rows at a time: SAT's file is one huge row group, which memory may not hold
            for batch in file.iter_batches(batch_size=16, columns=wanted):
                yield from batch.to_pylist()
        return file.schema_arrow.names, read, path.parent
    try:
        stream = load_dataset(name, split="train", streaming=True).decode(False)  # images stay as they are
    except Exception as error:  # a missing folder, no network, no such data set: to the user all the same
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(f"{name} cannot be read as a file, a folder or a hub data set: {reason}")
    select = lambda wanted=None: stream.select_columns(wanted or stream.column_names)
    return stream.column_names, select, path if path.is_dir() else None


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
        if not chosen[ours] and ours in ("images", "question", "answer"):
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
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    text = "" if value is None else str(value).strip()
    require(not re.search("[\ud800-\udfff]", text), "broken text")  # half a surrogate pair: JSON lets it pass
    return text


def read_choices(options, answer):
    """-> options as a list of text, and the answer. Letters that they carry themselves, as in "A. cat", are
    taken off. So are tags around the answer, which some data has and the completion should have."""
    require(isinstance(options or [], list), "options are not a list")
    texts = [as_text(option) for option in options or []]
    bare = [re.sub(rf"^\(?{letter}[.):]\s+", "", text) for letter, text in zip(ascii_uppercase, texts)]
    is_lettered = len(texts) > 1 and all(a != b for a, b in zip(bare, texts))
    if isinstance(answer, str):
        answer = re.sub(r"^\s*<answer>(.*)</answer>\s*$", r"\1", answer, flags=re.DOTALL)
        for letter, text in zip(ascii_uppercase, bare):
            if re.fullmatch(rf"\(?{letter}[.):]\s+{re.escape(text)}", answer.strip()):
                answer = text
    return bare if is_lettered else texts, answer


READINGS = ("text", "letter", "index")


def find_answer(answer, options, reading):
    """-> the option that `answer` names by its text, its letter or its index from 0, else None."""
    text = as_text(answer).lower().strip("()." if reading == "letter" else None)
    if reading == "index" and isinstance(answer, str):
        return None
    names = {"text": [option.lower() for option in options], "letter": ascii_lowercase,
             "index": map(str, range(len(options)))}[reading]
    return dict(zip(names, options)).get(text)


def decide_reading(name, rows, columns):
    """How the answers of a whole column name their options -> the one of READINGS that fits most rows."""
    fits = {reading: [] for reading in READINGS}  # (number of a row, the option that is its answer)
    for number, row in enumerate(rows if columns["options"] else []):
        with suppress(Skip, AttributeError):  # rows of an odd shape are counted later
            options, answer = read_choices(row.get(columns["options"]), row.get(columns["answer"]))
            for reading in READINGS:
                if (option := find_answer(answer, options, reading)) is not None:
                    fits[reading].append((number, option))
    best = max(READINGS, key=lambda reading: len(fits[reading]))
    for other in READINGS:
        if len(fits[other]) == len(fits[best]) and fits[other] != fits[best]:
            fail(f"{name}: answers can be read as {best} or as {other}, and differ. Give --answers {best}.")
    print(f"answers are read as: {best}" if fits[best] else "answers are free text")
    return best


def load_images(images, folder):
    """One image or a list of them, each encoded bytes, {"bytes", "path"} or a path -> list of encoded bytes.
    A path counts from `folder` (None: there is none) and must end up in it, links followed."""
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


def parse_row(row, columns, folder, reading):
    """A row of a table, by `columns` of `choose_columns` -> the row that `check` takes."""
    require(isinstance(row, dict), "odd shape")
    row = {ours: row.get(theirs) for ours, theirs in columns.items()}
    options, answer = read_choices(row["options"], row["answer"])
    require(as_text(answer), "empty answer")
    parsed = dict(images=load_images(row["images"], folder), question=as_text(row["question"]),
                  options=options, question_type=as_text(row["question_type"]) or None,
                  answer=find_answer(answer, options, reading) if options else as_text(answer))
    if columns["completion"]:
        parsed["completion"] = as_text(row["completion"])
        require(parsed["completion"], "empty completion")
    return parsed


def parse_sharegpt(row, folder):
    """A row of Vision-R1's cold start: conversations, a list of one {"from": "user", "value": text} and one
    {"from": "assistant", "value": chain}, and images, paths in `folder` -> the row that `check` takes."""
    turns = row.get("conversations") if isinstance(row, dict) else None
    require(isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns), "odd shape")
    who = [turn.get("from", turn.get("role")) for turn in turns]
    require(who in (["user", "assistant"], ["human", "gpt"]), "not one question and one reply")
    question, completion = (as_text(turn.get("value", turn.get("content"))) for turn in turns)
    require(format_reward(completion), "not one <think> and one <answer> block")
    answer = re.sub(r"^final answer\s*:\s*", "", extract_answer(completion), flags=re.IGNORECASE)
    return dict(images=load_images(row.get("images") or row.get("image"), folder), question=question,
                options=[], answer=answer, question_type=None, completion=completion)


def check(row, multi_image):
    """-> the row as training takes it. No options at all: the answer is free text."""
    question = re.sub(r"\s*<image>\s*", " ", row["question"]).strip()  # some data marks the images' places
    options = list(dict.fromkeys(filter(None, row["options"])))
    require(row["images"], "no image")
    require(multi_image or len(row["images"]) == 1, "several images (--multi_image keeps them)")
    require(question, "empty question")
    require(not re.search(r"<\|\w+\|>", question + "".join(options)), "a special token in the question")
    require(len(options) > 1 or not row["options"], "fewer than two options")
    require(row["answer"] in options or not options, "answer not among the options")
    own = f"<think></think><answer>{row['answer']}</answer>"
    require(accuracy_reward(own, row["answer"], options), "its own answer would earn no reward")
    for image in row["images"]:
        try:  # as training will
            open_image({"bytes": image}, "")
        except SystemExit:
            raise Skip("broken image") from None
    images = [{"bytes": image, "path": None} for image in row["images"]]
    return {**row, "images": images, "question": question, "options": options}


# The text refers to the order of the options: it letters them, or says "both A and B", "none of the above".
ORDERED = re.compile(r"(?<!\w)\(?A[.):] .*(?<!\w)\(?B[.):] |\bof the above\b|"
                     r"\(?\b[A-D]\)? (?:and|or|nor) \(?[A-D]\)?(?!\w)", re.DOTALL)


def convert(rows, parse, verdicts, limit=None, multi_image=False, seed=0):
    """Yield training rows until `limit` are kept. verdicts, a dict, gets what became of which raw rows."""
    for index, raw in enumerate(rows):
        try:
            row = check(parse(raw), multi_image)
        except Skip as reason:
            verdicts.setdefault(f"skipped: {reason}", []).append(index)
            continue
        verdicts.setdefault("kept", []).append(index)
        if not ORDERED.search(" ".join([row["question"], *row["options"]])):
            random.Random(f"{seed}/{index}").shuffle(row["options"])  # SAT's counting rows: the answer first
        yield {**row, "source_row": index}
        if len(verdicts["kept"]) == limit:
            return


def choose_parser(name, found, rows, folder, columns="", reading=None):
    """-> how the rows of a source are parsed, and the Features by which they are stored."""
    if "conversations" in found:
        return partial(parse_sharegpt, folder=folder), CHAIN_FEATURES
    columns = choose_columns(name, found, columns)
    wanted = [columns[ours] for ours in ("options", "answer") if columns[ours]]
    reading = reading or decide_reading(name, rows(wanted), columns)
    parse = partial(parse_row, columns=columns, folder=folder, reading=reading)
    return parse, CHAIN_FEATURES if columns["completion"] else SAT_FEATURES


def download_sat():
    from huggingface_hub import hf_hub_download
    try:
        return hf_hub_download("array/SAT", "SAT_train.parquet", repo_type="dataset")
    except Exception as error:
        fail(f"cannot download SAT_train.parquet of array/SAT ({type(error).__name__}). Fetch it, then: "
             "python prepare_sat.py --from SAT_train.parquet --limit 15000 --out data/sat")


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--from", dest="source", help="Parquet, JSON, folder or hub id; default: SAT")
    parser.add_argument("--columns", default="", help="images=img,question=q,answer=label,options=choices,"
                        "question_type=kind,completion=chain; those left out go by their usual names")
    parser.add_argument("--answers", choices=READINGS, help="how answers name options; default: what fits")
    parser.add_argument("--limit", type=int, help="rows to keep; default: all, of SAT the paper's 15000")
    parser.add_argument("--multi_image", action="store_true", help="keep rows with several images too")
    parser.add_argument("--out", help="folder to write; default: data/sat or data/own")
    args = parser.parse_args(argv)
    limit = args.limit if args.limit is not None or args.source else 15000
    path = Path(args.out or HERE / ("data/own" if args.source else "data/sat")).expanduser() / "train.parquet"
    if limit is not None and limit < 1:
        fail(f"--limit {limit} keeps nothing. Give a number of rows above 0.")
    if path.exists():
        fail(f"{path} exists. Choose another folder by --out, or delete it yourself.")
    name = args.source or download_sat()
    found, read, folder = read_data(name)
    parse, features = choose_parser(name, found, read, folder, args.columns, args.answers)
    verdicts = {}
    rows = convert(read(), parse, verdicts, limit, args.multi_image)
    write_parquet(path, tqdm(rows, total=limit, unit=" rows", desc="kept"), features)
    for verdict, numbers in sorted(verdicts.items()):
        print(f"{len(numbers):8,} {verdict}" + (f" (row {numbers[0]})" if verdict != "kept" else ""))
    if "kept" not in verdicts:
        fail(f"no row of {name} could be kept: nothing was written.")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
