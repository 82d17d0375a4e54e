"""Evaluation, timed and killed: eval_cvbench.py against `generate`, and against SIGKILL.

    python bench/evaluate.py                    # questions per second, toy and 47M parameters, on the CPU
    python bench/evaluate.py --kill 10          # killed at ten random points, in one and in two processes

Speed: the same questions, from image file to text, by transformers' `generate` with the stock modules, one
at a time and in left-padded batches in the order of the file, and by `answer_questions`. The toy answers its
own CV-Bench-shaped set. The 47M model of bench/step.py has random weights and would never end; a third of
the vocabulary ends its answers instead, so that their lengths differ, and its images are 84 to 504 pixels
wide. Equal work is asserted: every answer must be the same, token for token. The last line times both modes
of a base model together, where an image is encoded once, against one after the other. Seconds are the
process's own, with one thread: what else the machine does hardly matters.

Killed: SIGKILL once a random number of answers is on disk, alternately to one process and to two started by
torchrun, and started again, until all is answered. The kept files must equal those of an undisturbed run.
"""
import argparse
import copy
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import eval_cvbench
import grpo_vision as gv
import step

MODE = "base-reasoning"


def toy(args):
    """-> model, tokenizer, image processor, questions"""
    questions = eval_cvbench.load_benchmark(args.data, args.questions)
    return gv.load_model(args.model), *gv.load_processors(args.model), questions


def random_47m(args):
    """The same with the 47M shape, the toy's tokenizer, and larger images."""
    tokenizer, image_processor = gv.load_processors(args.model)
    shape = argparse.Namespace(**step.SHAPE, full=False)
    model = gv.fast_layers(step.build_model(shape, "cpu"))
    for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
        setattr(model.config, name.replace("pad", "token") + ("_token" * ("vision" in name)) + "_id",
                tokenizer.convert_tokens_to_ids(f"<|{name}|>"))
    questions, rng = eval_cvbench.load_benchmark(args.data, args.large_questions), random.Random(0)
    ends = rng.sample(range(len(tokenizer) - 20), len(tokenizer) // 3)
    eval_cvbench.end_tokens = lambda tokenizer: ends
    for q in questions:
        size = 28 * rng.randint(3, 18), 28 * rng.randint(3, 18)
        image = gv.open_image(q["images"][0], "").convert("RGB").resize(size, Image.Resampling.NEAREST)
        path = Path(tempfile.mkdtemp(dir=args.scratch)) / "image.png"
        image.save(path)
        q["images"] = [{"bytes": None, "path": str(path)}]
    return model, tokenizer, image_processor, questions


def by_generate(stock, tokenizer, image_processor, questions, batch_size, max_new_tokens):
    """-> {question id: completion ids}"""
    answers, eos_ids = {}, eval_cvbench.end_tokens(tokenizer)
    suppressed = gv.suppressed_tokens(stock, tokenizer).nonzero()[:, 0].tolist()
    for first in range(0, len(questions), batch_size):
        batch, prompts = questions[first:first + batch_size], []
        for q in batch:
            images = [eval_cvbench.upright(gv.open_image(image, "")) for image in q["images"]]
            text = eval_cvbench.prompt_text(q, MODE, tokenizer)
            prompts.append(gv.build_prompt(text, images, tokenizer, image_processor, stock))
        P = max(prompt.input_ids.shape[1] for prompt in prompts)
        pad = lambda x, value: torch.nn.functional.pad(x, (P - x.shape[1], 0), value=value)
        ids = torch.cat([pad(prompt.input_ids, eos_ids[0]) for prompt in prompts])                # (B, P)
        mask = torch.cat([pad(torch.ones_like(prompt.input_ids), 0) for prompt in prompts])       # (B, P)
        out = stock.generate(
            input_ids=ids, attention_mask=mask, mm_token_type_ids=(ids == stock.config.image_token_id).int(),
            pixel_values=torch.cat([prompt.pixel_values for prompt in prompts]),
            image_grid_thw=torch.cat([prompt.image_grid_thw for prompt in prompts]), do_sample=False,
            max_new_tokens=max_new_tokens, suppress_tokens=suppressed, eos_token_id=eos_ids,
            pad_token_id=eos_ids[0])[:, P:]
        for q, row in zip(batch, out.tolist()):
            end = next((t for t, token in enumerate(row) if token in eos_ids), len(row) - 1)
            answers[q["id"]] = row[:end + 1]
    return answers


def by_us(model, tokenizer, image_processor, questions, batch_size, max_new_tokens, modes=(MODE,)):
    return {(r["mode"], r["id"]): r for r in eval_cvbench.answer_questions(
        model, tokenizer, image_processor, {mode: questions for mode in modes}, batch_size, max_new_tokens)}


@torch.no_grad()
def speed(name, build, batch_size, max_new_tokens, args):
    """-> a line of the table, and one about two modes."""
    model, tokenizer, image_processor, questions = build(args)
    stock = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})
    del stock.model.visual.patch_embed.forward  # transformers' own layers again
    for layer in stock.modules():
        if type(layer) is gv.Linear:
            layer.__class__ = torch.nn.Linear
    stock.generation_config = transformers.GenerationConfig()
    rest = tokenizer, image_processor, questions
    by_us(model, tokenizer, image_processor, questions[:2], 2, 2)  # warm-up
    ways = {
        "one": lambda: by_generate(stock, *rest, 1, max_new_tokens),
        "many": lambda: by_generate(stock, *rest, batch_size, max_new_tokens),
        "ours": lambda: by_us(model, *rest, batch_size, max_new_tokens),
        "direct": lambda: by_us(model, *rest, batch_size, max_new_tokens, ("base-direct",)),
        "both": lambda: by_us(model, *rest, batch_size, max_new_tokens, (MODE, "base-direct"))}
    seconds, answers = {way: [] for way in ways}, {}
    for _ in range(args.repeats):
        for way, run in ways.items():
            start = time.process_time()
            answers[way] = run()
            seconds[way].append(time.process_time() - start)
    alone, batched, kept = answers["one"], answers["many"], answers["both"]
    assert kept == answers["ours"] | answers["direct"]
    for i, ids in alone.items():
        r = kept[MODE, i]
        text = gv.completion_text(r["prompt"], ids, tokenizer)
        assert ids == batched[i], f"question {i}: `generate` alone and in a batch differ"
        assert (text, len(ids)) == (r["completion"], r["length"]), f"question {i}: ours differs"
    n, lengths = len(questions), [len(ids) for ids in alone.values()]
    one, many, ours, direct, both = (statistics.median(some) for some in seconds.values())
    return (f"| {name}, {n} questions, {min(lengths)} to {max(lengths)} tokens, batches of {batch_size} | "
            f"{n / one:.2f} | {n / many:.2f} | {n / ours:.2f} | {one / ours:.1f}x | {many / ours:.1f}x |",
            f"{name}: both modes together {both:.1f} s, one after the other {ours + direct:.1f} s, "
            f"{(ours + direct) / both:.2f}x")


def count(folder):
    """Whole lines in its results."""
    while True:
        try:
            return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))
        except FileNotFoundError:  # taken over by another while we looked
            pass


def asked(folder):
    """-> the mode and question of every whole line in its results. A process's file whose lines are all in
    the file of the mode already was merged into it, and the kill came before it was removed."""
    whole_lines = lambda path: [x for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")]
    found = []
    for path in folder.glob("*.jsonl"):
        mode, lines = path.name.split(".")[0], whole_lines(path)
        merged = folder / f"{mode}.jsonl"
        if path == merged or not merged.exists() or not set(lines) <= set(whole_lines(merged)):
            found += [(mode, line.split(", ")[0]) for line in lines]
    return found


def kill(args):
    """Runs until all is answered, killed args.kill times on the way -> a line that says what happened."""
    rng, folder = random.Random(args.seed), Path(args.scratch)
    command = [str(Path(eval_cvbench.__file__)), "--model", args.model, "--data", args.data, "--modes", "all",
               "--max_new_tokens", "64", "--output_dir"]
    environment = dict(os.environ, ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1")
    quiet = dict(env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run([sys.executable, *command, folder / "whole"], check=True, **quiet)
    whole = next((folder / "whole").glob("*/*"))
    killed = folder / "killed" / whole.relative_to(folder / "whole")
    total = count(whole)
    points = sorted(rng.sample(range(1, total), args.kill))
    for n, point in enumerate(points):
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"] if n % 2 else []
        run = subprocess.Popen([sys.executable, *launcher, *command, folder / "killed", "--batch_size", "8"],
                               start_new_session=True, **quiet)
        while count(killed) < point:
            assert run.poll() is None, "it ended before it was killed"
            time.sleep(0.005)
        os.killpg(run.pid, signal.SIGKILL)
        for child in subprocess.run(["pgrep", "-f", str(folder / "killed")], capture_output=True, text=True
                                    ).stdout.split():  # torchrun's workers have sessions of their own
            os.kill(int(child), signal.SIGKILL)
        run.wait()
        kept = asked(killed)
        assert len(kept) == len(set(kept)), "a question was asked twice"
        print(f"killed {1 + n % 2} process(es) at {count(killed)} of {total} answers, "
              f"{len(list(killed.glob('*.rank*')))} unmerged files", file=sys.stderr)
    subprocess.run([sys.executable, *command, folder / "killed"], check=True, **quiet)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *command,
                    folder / "two"], check=True, **quiet)
    for other in killed, folder / "two" / whole.relative_to(folder / "whole"):
        for path in sorted(whole.glob("*.json*")):
            assert (other / path.name).read_bytes() == path.read_bytes(), f"{other / path.name} differs"
    return f"killed {args.kill} times at {points} of {total} answers: same files; two processes: same files"


def main():
    parser = argparse.ArgumentParser(description="Evaluation, timed and killed; see the head of this file.")
    parser.add_argument("--model", default="runs/toy/final")
    parser.add_argument("--data", default="data/toy/cvbench")
    parser.add_argument("--questions", type=int, default=96, help="for the toy")
    parser.add_argument("--large_questions", type=int, default=16, help="for the 47M model")
    parser.add_argument("--repeats", type=int, default=2, help="interleaved; medians are printed")
    parser.add_argument("--kill", type=int, help="kill so many times instead")
    parser.add_argument("--seed", type=int, default=0, help="of the points at which it is killed")
    parser.add_argument("--out", help="also write the printed lines to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as args.scratch:
        if args.kill:
            lines = [kill(args)]
        else:
            lines = ["| questions per second | `generate`, one at a time | `generate`, padded batches | "
                     "ours | against one at a time | against batches |", "|---|--:|--:|--:|--:|--:|"]
            found = [speed("toy", toy, 32, 64, args), speed("47M", random_47m, 8, 64, args)]
            lines += [line for line, _ in found] + [""] + [modes for _, modes in found]
    lines += ["", step.machine(threads=1)]
    print("\n".join(lines))
    if args.out:
        Path(args.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
