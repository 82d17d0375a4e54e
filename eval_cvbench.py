"""Evaluate a checkpoint on CV-Bench: the paper's protocol (greedy, answer block or else the whole text).

    python eval_cvbench.py                                            # runs/toy/final and its base, on the
    toy's sets python eval_cvbench.py --model runs/sat/final --data nyu-visionx/CV-Bench python
    eval_cvbench.py --data data/toy/test.parquet --temperature 1 --strict      # graded as in training

Reads CV-Bench (a hub id, or a folder of Parquet files with its columns: test_2d.parquet, test_3d.parquet)
and, for held-out questions of the training kind, a file as prepare_sat.py writes it. A CV-Bench row looks
like this:

    idx 0, type "2D", task "Count", image <PNG>, question "How many ...?", choices ["2", "3"], answer "(B)",
    prompt "How many ...? Select from the following choices.\\n(A) 2\\n(B) 3", source "ADE20K", ...

Every question's prompt, completion, extracted answer and verdict is kept in results/MODEL/DATA-MODE.jsonl.
"""
import argparse
import json
import os
import re
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from grpo_vision import (BASE_PROMPT, build_prompt, completion_text, end_tokens, extract_answer, fail, grade,
                         load_model, load_processors, open_image, row_text, sample, seeded, suppressed_tokens)

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
        fail(f"--data {path} cannot be read: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
    cvbench = "choices" in table.column_names
    needed = set("image prompt choices answer task source".split() if cvbench else
                 "images question options answer".split())
    if missing := sorted(needed - set(table.column_names)):
        fail(f"--data {path} has no column {missing[0]!r} ({', '.join(table.column_names)})")
    raw = datasets.Image(decode=False)
    table = table.cast_column("image", raw) if cvbench else table.cast_column("images", datasets.List(raw))
    head, tail = BASE_PROMPT.split("{question}")
    questions = []
    for i, row in enumerate(table.select(range(min(limit or len(table), len(table))))):
        if not cvbench:  # row_text without the template around it
            questions.append({"id": i, "task": row.get("question_type") or "all", "source": "held-out",
                              "images": row["images"], "options": row["options"], "answer": row["answer"],
                              "text": row_text(row).removeprefix(head).removesuffix(tail)})
            continue
        letter = re.fullmatch(r"\(([A-Z])\)", row["answer"].strip())
        if not letter or ord(letter[1]) - ord("A") >= len(row["choices"]):
            fail(f"--data {path}, row {i}: {row['answer']!r} is none of {len(row['choices'])} choices")
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
    """Records -> dict: accuracy with standard error per task and in total (the paper's micro-average), CV-Bench's
    official score if all three of its sources are there, unparsed answers (percent), mean length (tokens)."""
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


# ---- The command -----------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("--model", nargs="+", help="folders or hub ids; default: runs/toy/final and its base")
    parser.add_argument("--data", nargs="+", default=["data/toy/cvbench", "data/toy/test.parquet"],
                        help="CV-Bench (hub id, folder, file), or a file as prepare_sat.py writes it")
    parser.add_argument("--limit", type=int, help="only the first LIMIT questions")
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
    torch.set_num_threads(os.cpu_count())
    if args.model is None:
        run = Path("runs/toy")
        if not (run / "final").exists():
            fail("runs/toy/final does not exist; `python grpo_vision.py` trains it, or name another --model")
        args.model = [json.loads((run / "config.json").read_text())["model_name_or_path"], str(run / "final")]
    mode = "direct" if args.no_reasoning else "reasoning"
    template = DIRECT_PROMPT if args.no_reasoning else BASE_PROMPT
    for path in args.data:
        questions = load_benchmark(path, args.limit)
        for name in args.model:
            tokenizer, image_processor = load_processors(name)
            model = load_model(name).to("cuda" if torch.cuda.is_available() else "cpu")
            answers = answer_questions(
                model, tokenizer, image_processor, questions, template, args.batch_size, args.max_new_tokens,
                args.temperature, args.seed, args.strict)
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


def slug(path):
    return re.sub(r"[^\w.-]+", "-", str(path)).strip("-")


if __name__ == "__main__":
    main()
