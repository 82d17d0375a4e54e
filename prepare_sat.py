#!/usr/bin/env python3
"""Prepare training data: SAT, your own questions, or chains of thought. And read it back, to train on.

    python prepare_sat.py                      # download array/SAT (4.6 GB), keep 15,000 rows -> data/sat/
    python prepare_sat.py --parquet FILE       # the same from a file that is already here
    python prepare_sat.py --from FILE_OR_ID    # your own questions: Parquet, JSON, folder, hub -> data/own/
    python prepare_sat.py --sharegpt FILE      # chains of thought for a cold start             -> data/cold/

All write `train.parquet` with one question per row: images (list of Image), question, options (list of text;
empty: the answer is free), answer (one of the options), question_type, source_row (its number in the source)
and, where the source has it, completion (what to say, for supervised fine-tuning).
"""
import argparse
import io
import itertools
import json
import math
import random
import re
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value
from datasets.table import InMemoryTable
from PIL import Image as Picture, ImageOps
from tqdm import tqdm
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from grpo_vision import (HERE, accuracy_reward, extract_answer, fail, format_reward, row_text,
                         seeded)

TEXT, TEXTS = Value("string"), List(Value("string"))
SAT_FEATURES = Features({"images": List(Image()), "question": TEXT, "options": TEXTS, "answer": TEXT,
                         "question_type": TEXT, "source_row": Value("int64")})
CHAIN_FEATURES = Features({**SAT_FEATURES, "completion": TEXT})


def write_parquet(path, rows, features, rows_per_group=100):
    """Stream dicts into a Parquet file that `datasets` reads back with its Image columns. -> number of rows.

    The file appears under its name only when it is complete, and not at all without rows.
    """
    path, rows, count = Path(path), iter(rows), 0
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(partial, features.arrow_schema) as writer:
            while chunk := list(itertools.islice(rows, rows_per_group)):
                writer.write_table(pa.Table.from_pylist(chunk, schema=features.arrow_schema))
                count += len(chunk)
        if count:
            partial.replace(path)
    except OSError as error:
        fail(f"{path} cannot be written: {error}. Make room, or choose another --out.")
    finally:
        partial.unlink(missing_ok=True)
    return count


# ---- Reading the source ----------------------------------------------------------------------------------

COLUMN_NAMES = {"images": ("images", "image", "image_bytes"),  # our column: its usual names, the first wins
                "question": ("question", "problem", "prompt"),
                "answer": ("answer", "solution", "correct_answer"),
                "options": ("options", "choices", "answers"),
                "question_type": ("question_type",), "completion": ("completion",)}


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


def read_data(name):
    """A Parquet, JSON or JSON Lines file, a folder, or a hub data set -> its columns; a function that takes
    names of columns, or None for all, and returns the rows; and the folder where its image paths start
    (None: on the hub)."""
    path = Path(name)
    if path.is_file() and path.suffix in (".json", ".jsonl"):
        rows = read_json(path)
        columns = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
        return list(columns), lambda wanted=None: rows, path.parent
    if path.is_file():
        # a few rows at a time: SAT's file is one huge row group of image bytes, which `load_dataset` cannot
        # read and memory may not hold
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            fail(f"{path} is neither a Parquet file ({error}) nor named .json or .jsonl.")
        return file.schema_arrow.names, lambda wanted=None: itertools.chain.from_iterable(
            batch.to_pylist() for batch in file.iter_batches(batch_size=16, columns=wanted)), path.parent
    from datasets import load_dataset
    try:
        stream = load_dataset(name, split="train", streaming=True).decode(False)  # images stay as they are
    except Exception as error:  # a missing folder, no network, no such data set: to the user all the same
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(f"{name} cannot be read as a file, a folder or a hub data set: {reason}")
    return stream.column_names, lambda wanted=None: stream.select_columns(wanted) if wanted else stream, \
        path if path.is_dir() else None


def choose_columns(name, found, flag=""):
    """What --columns says ("ours=theirs,..."), else the usual names -> {our column: theirs or None}.

    "ours=" says that there is none, whatever the names suggest.
    """
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


def as_options(options):
    """-> list of text. Letters that the options carry themselves, as in "A. cat", are taken off."""
    require(isinstance(options or [], list), "options are not a list")
    texts = [as_text(option) for option in options or []]
    lettered = [re.fullmatch(rf"\(?{chr(65 + i)}[.):]\s+(.+)", text, re.DOTALL) for i, text in enumerate(texts)]
    return [match[1].strip() for match in lettered] if len(texts) > 1 and all(lettered) else texts


# how an answer can name one of the options -> its number
READINGS = {
    "text": lambda answer, options: [option.lower() for option in options].index(as_text(answer).lower()),
    "letter": lambda answer, options: ord(re.fullmatch(r"\(?([A-Z])\)?\.?", as_text(answer).upper())[1]) - 65,
    "index": lambda answer, options: {False: int}[isinstance(answer, (bool, str))](as_text(answer)),
}


def find_answer(answer, options, reading):
    """-> the option that `answer` means under a reading, one of READINGS; None if it means none."""
    try:
        number = READINGS[reading](answer, options)
        return options[number] if 0 <= number < len(options) else None
    except (ValueError, TypeError, KeyError, Skip):
        return None


def decide_reading(name, rows, columns, wish=None):
    """How the answers of a whole column name their options -> one of READINGS. It is decided once for all
    rows, by the largest number of rows that it fits; `wish` (--answers) overrules."""
    found = {reading: {} for reading in READINGS}
    for number, row in enumerate(rows if columns["options"] and not wish else []):
        try:
            options, answer = as_options(row[columns["options"]]), row[columns["answer"]]
        except (Skip, KeyError, TypeError):
            continue
        for reading in READINGS:
            if options and (chosen := find_answer(answer, options, reading)) is not None:
                found[reading][number] = chosen
    best = max(map(len, found.values()))
    first, *others = [reading for reading in READINGS if len(found[reading]) == best]
    if best and any(found[other] != found[first] for other in others):
        fail(f"{name}: the answers can be read as {' or as '.join([first, *others])}, and these differ. Say "
             f"which by --answers {first}.")
    if best:
        print(f"answers are read as: {wish or first}")
    return wish or first


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


def parse_row(row, columns, folder, reading):
    """A row of a table, by `columns` of `choose_columns` -> the row that `check` takes."""
    require(isinstance(row, dict), "odd shape")
    row = {ours: row.get(theirs) for ours, theirs in columns.items()}
    options, answer = as_options(row["options"]), row["answer"]
    if block := re.fullmatch(r"\s*<answer>(.*)</answer>\s*", answer, re.DOTALL) if isinstance(answer, str) else None:
        answer = block[1]
    parsed = dict(images=load_images(row["images"], folder), question=as_text(row["question"]),
                  options=options, answer=find_answer(answer, options, reading) if options else as_text(answer),
                  question_type=as_text(row["question_type"]) or None)
    require(not options or as_text(answer), "empty answer")
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
    require(format_reward(completion), "not one <think> and one <answer> block")  # anything else would be taught
    answer = re.sub(r"^final answer\s*:\s*", "", extract_answer(completion), flags=re.IGNORECASE)
    return dict(images=load_images(row.get("images") or row.get("image"), folder), question=as_text(question),
                options=[], answer=answer, question_type=None, completion=completion)


def usable(image_bytes):
    """Can training use this image? It is decoded and resized by the functions that training takes."""
    try:
        width, height = open_image({"bytes": image_bytes}, "").size
        smart_resize(height, width)
        return True
    except (SystemExit, ValueError):
        return False


def check(row, multi_image):
    """-> the row as it can be trained on. No options at all: the answer is free text."""
    question = re.sub(r"\s*<image>\s*", " ", row["question"]).strip()  # some data marks the images' places
    options = list(dict.fromkeys(filter(None, row["options"])))
    require(row["images"], "no image")
    require(multi_image or len(row["images"]) == 1, "several images (--multi_image keeps them)")
    require(question, "empty question")
    require(not re.search(r"<\|\w+\|>", question + "".join(options)), "a special token in the question")
    require(len(options) > 1 or not row["options"], "fewer than two options")
    require(row["answer"] != "", "empty answer")
    require(row["answer"] in options or not options, "answer not among the options")
    own = f"<think></think><answer>{row['answer']}</answer>"
    require(accuracy_reward(own, row["answer"], options), "its own answer would earn no reward")
    require(all(map(usable, row["images"])), "broken image")
    images = [{"bytes": image, "path": None} for image in row["images"]]
    return {**row, "images": images, "question": question, "options": options}


# a text that refers to the order of the options: they keep it
ORDERED = re.compile(r"(?<!\w)\(?A[.):] .*(?<!\w)\(?B[.):] |\bof the above\b|\b(?:both|neither)? ?\(?[A-D]\)? "
                     r"(?:and|or|nor) \(?[A-D]\)?(?!\w)", re.DOTALL)


def convert(rows, parse, limit=None, multi_image=False, seed=0, counts=None, examples=None):
    """Yield training rows until `limit` are kept. `counts` says what became of each raw row, and `examples`
    which one was the first that was skipped for a reason."""
    counts, examples = Counter() if counts is None else counts, {} if examples is None else examples
    for index, raw in enumerate(rows):
        try:
            row = check(parse(raw), multi_image)
        except Skip as reason:
            counts[f"skipped: {reason}"] += 1
            examples.setdefault(f"skipped: {reason}", index)
            continue
        counts["kept"] += 1
        if not ORDERED.search(" ".join([row["question"], *row["options"]])):
            random.Random(f"{seed}/{index}").shuffle(row["options"])  # SAT's counting rows: the answer first
        yield {**row, "source_row": index}
        if counts["kept"] == limit:
            return


def prepare(out, name, rows, parse, features, limit=None, **how):
    """Rows -> out/train.parquet. Prints how many rows were kept, and why others were not."""
    if limit is not None and limit < 1:
        fail(f"--limit {limit} keeps nothing: give a number of rows above 0.")
    counts, examples, path = Counter(), {}, Path(out).expanduser() / "train.parquet"
    if path.exists():
        fail(f"{path} exists. Choose another folder by --out, or delete it yourself.")
    rows = convert(rows, parse, limit, counts=counts, examples=examples, **how)
    count = write_parquet(path, tqdm(rows, total=limit, unit=" rows", desc="kept"), features)
    for verdict, number in sorted(counts.items()):
        print(f"{number:8,} {verdict}" + (f" (row {examples[verdict]})" if verdict in examples else ""))
    if not count:
        fail(f"no row of {name} could be kept: nothing was written.")
    print(f"wrote {path}")


def prepare_data(name, out=HERE / "data/own", columns="", answers=None, **how):
    """--from: file, folder or hub data set -> out/train.parquet."""
    found, read, folder = read_data(name)
    columns = choose_columns(name, found, columns)
    features = CHAIN_FEATURES if columns["completion"] else SAT_FEATURES
    wanted = [columns[ours] for ours in ("options", "answer") if columns[ours]]
    reading = decide_reading(name, read(wanted), columns, answers)
    parse = partial(parse_row, columns=columns, folder=folder, reading=reading)
    prepare(out, name, read(), parse, features, **how)


def prepare_sharegpt(file, image_dir=None, out=HERE / "data/cold", **how):
    """--sharegpt: JSON file -> out/train.parquet with the column `completion`."""
    rows, folder = read_json(file), Path(image_dir or Path(file).parent)
    if not folder.is_dir():
        fail(f"--image_dir {folder} is no folder: give the one from which the image paths in {file} start.")
    prepare(out, file, rows, partial(parse_sharegpt, folder=folder), CHAIN_FEATURES, **how)


def download_sat():
    from huggingface_hub import hf_hub_download
    try:
        return hf_hub_download("array/SAT", "SAT_train.parquet", repo_type="dataset")
    except Exception as error:
        fail(f"cannot download SAT_train.parquet of array/SAT ({type(error).__name__}): fetch it and give "
             "it with --parquet FILE.")


# ---- Reading it back, to train on ------------------------------------------------------------------------

def upright(picture):
    """PIL image -> RGB as a viewer shows it: turned as its EXIF tag says, white where it is transparent. Of
    grey values deeper than 8 bits the darkest is black and the lightest white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        picture = picture.convert("F")
        low, high = picture.getextrema()
        scale = 255 / max(high - low, 1e-9)
        picture = picture.point(lambda value: value * scale - low * scale)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Picture.alpha_composite(Picture.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def open_image(image, where, decode=True):
    """{"bytes", "path"} -> RGB image, or stop and name its row. decode=False reads only the header."""
    try:
        picture = Picture.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"])
        return upright(picture) if decode else picture
    except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, struct.error ...
        fail(f"{where}: its image cannot be read ({error}). Remove the row.")


class TrainingData:
    """The rows of a Parquet file as written here, by number: data[number] is a dict with opened images."""
    def __init__(self, path):
        self.path = Path(path) / "train.parquet" if Path(path).is_dir() else Path(path)
        try:
            # read directly: a cache would be keyed by path and time, and could be older than the file
            table = Dataset(InMemoryTable(pq.read_table(self.path)))
        except (pa.ArrowInvalid, OSError) as error:
            fail(f"--data {self.path} is not a Parquet file that can be read: {str(error).splitlines()[0]}")
        if missing := sorted({"images", "question", "options", "answer"} - set(table.column_names)):
            fail(f"--data {self.path} has no column {missing[0]!r} ({', '.join(table.column_names)})")
        self.table = table.cast_column("images", List(Image(decode=False)))
        self.has_completions, self.kept = "completion" in table.column_names, list(range(len(table)))

    def __getitem__(self, number):
        row = self.table[number]
        return {**row, "images": [open_image(image, f"{self.path}, row {number}") for image in row["images"] or []]}

    def keep_fitting(self, template, tokenizer, image_processor, max_prompt_length, need_image=False):
        """Keep the rows whose prompt, in this template, is no longer than max_prompt_length tokens. None is cut.
        (The paper's code cuts prompts for its masks, but not for generation.) Stop at a row that cannot be
        trained on. need_image: several processes share the image tower's work, and all have to take part."""
        kept = []
        for number, row in enumerate(tqdm(self.table, desc="measuring prompts", leave=False)):
            where, images = f"{self.path}, row {number}", row["images"] or []
            if not row["question"] or row["answer"] not in (row["options"] or [row["answer"] or None]):
                fail(f"{where}: question or answer is empty, or the answer is not an option. Remove the row.")
            if need_image and not images:
                fail(f"{where} has no image. Only one process can train on it: several all run the image tower.")
            text = row_text(row, template, tokenizer)
            if text.count("<|image_pad|>") != len(images):
                fail(f"{where}: its question contains the token <|image_pad|>. Remove the row.")
            sizes = [open_image(image, where, decode=False).size[::-1] for image in images]
            patches = sum(image_processor.get_number_of_image_patches(*size) for size in sizes)
            length = len(tokenizer(text).input_ids) - len(images) + patches // image_processor.merge_size**2
            kept += [number] if length <= max_prompt_length else []
        if len(kept) < len(self.table):
            print(f"dropped {len(self.table) - len(kept)} of {len(self.table)} rows: prompts over {max_prompt_length}")
        if not kept:
            fail(f"--max_prompt_length {max_prompt_length}: every prompt of {self.path} is longer. Raise it.")
        self.kept = kept

    def draw(self, seed, first, count):
        """Numbers first .. first + count - 1 of an endless walk over the kept rows, shuffled anew in each epoch.
        Number i depends only on i, so a resumed run needs no saved state."""
        n, last = len(self.kept), first + count - 1
        epochs = range(first // n, last // n + 1)
        walks = {epoch: seeded(seed, "epoch", epoch).sample(self.kept, n) for epoch in epochs}
        return [walks[i // n][i % n] for i in range(first, last + 1)]


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--parquet", help="SAT_train.parquet, if it is already here")
    source.add_argument("--from", dest="data", help="your data: Parquet, .json, .jsonl, folder or hub id")
    source.add_argument("--sharegpt", help="chains as in Vision-R1-cold: a JSON list or JSON Lines")
    parser.add_argument("--columns", help="with --from: images=img,question=q,answer=label,options=choices,"
                        "question_type=kind,completion=chain; those left out go by their usual names")
    parser.add_argument("--answers", choices=READINGS, help="with --from: how answers name their options, by "
                        "text, letter or index from 0 (default: what fits the column)")
    parser.add_argument("--image_dir", help="with --sharegpt: where image paths start (default: its folder)")
    parser.add_argument("--limit", type=int, help="rows to keep (default: all, of SAT the paper's 15000)")
    parser.add_argument("--multi_image", action="store_true", help="keep rows with several images too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder to write (default: data/sat, own or cold)")
    args = parser.parse_args(argv)
    if (args.columns or args.answers) and not args.data:
        fail("--columns and --answers describe the data of --from: give it too.")
    if args.image_dir and not args.sharegpt:
        fail("--image_dir holds the images of --sharegpt: give both.")
    how = {name: getattr(args, name) for name in ("out", "limit", "multi_image", "seed")
           if getattr(args, name) is not None}  # each source has its own defaults
    if args.data:
        prepare_data(args.data, columns=args.columns or "", answers=args.answers, **how)
    elif args.sharegpt:
        prepare_sharegpt(args.sharegpt, args.image_dir, **how)
    else:
        if args.parquet and not Path(args.parquet).is_file():
            fail(f"{args.parquet} does not exist: give --parquet the path of SAT_train.parquet, or leave it out.")
        prepare_data(args.parquet or download_sat(), **{"out": HERE / "data/sat", "limit": 15000, **how})


if __name__ == "__main__":
    main()
