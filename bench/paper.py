"""The paper's table on the toy: base, SFT, GRPO, an instruct-style start, frozen towers; several seeds.

    python bench/paper.py                       # seeds 0, 1 and 2: some minutes for each row and seed
    python bench/paper.py --rows base base+SFT --seeds 1

Needs data/toy (`python prepare_sat.py --toy`). The seed sets data order and sampling; all rows but the
instruct ones start from the same base. The instruct-style start is that base taught by SFT to answer, with
the same mixed habits, behind a chat template with roles and the paper's instruct prompt. What is there
already in runs/paper/ROW-SEED is not made again.

Each model answers the 512 held-out and the 384 CV-Bench-shaped questions greedily, graded as in evaluation:
with reasoning, but after SFT directly, as it was taught.
"""
import argparse
import random
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RUNS = ROOT / "runs" / "paper"

SFT = "--algorithm sft --loss_type dapo --max_steps 150 --learning_rate 5e-4"
ROWS = {  # name -> flags, None: no training
    "base": None,
    "base + SFT": SFT,
    "base + GRPO": "",
    "instruct-style": SFT + " --prompt instruct",
    "instruct-style + GRPO": "",
    "base + GRPO, vision frozen": "--freeze vision",
    "base + GRPO, LLM frozen": "--freeze llm",
}
# Qwen's chat template, as far as one turn of text needs it
ROLES = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
         "{{ message['content'] }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def folder(row, seed):
    return RUNS / f"{row.replace(' ', '_').replace(',', '')}-{seed}"


def write_chains(path, count, seed):
    """Questions about new scenes with completions of the base corpus's mixed habits -> Parquet, for SFT."""
    import prepare_sat as p
    rng, rows = random.Random(f"chains {seed}"), []
    while len(rows) < count:
        scene = p.draw_scene(rng, set())
        if question := p.ask_any(scene, p.SAT_KINDS, rng):
            style, = rng.choices(list(p.STYLES), p.STYLES.values())
            rows.append(dict(images=[p.png(p.paint(scene, rng))], question=question.sat,
                             options=question.options, answer=question.answer, question_type=question.kind,
                             source_row=len(rows), completion="<think>" + p.complete(question, style, rng)))
    p.write_parquet(path, rows, p.CHAIN_FEATURES)


def start_of(row, seed):
    """-> the model that a row starts from, and its data."""
    base, data = ROOT / "data/toy/base", ROOT / "data/toy"
    if row == "instruct-style":
        data, roles = RUNS / f"chains-{seed}.parquet", RUNS / "base-with-roles"
        if not data.exists():
            write_chains(data, 2400, seed)
        if not roles.exists():
            shutil.copytree(base, roles)
            (roles / "chat_template.jinja").write_text(ROLES)
        return roles, data
    return (folder("instruct-style", seed) / "final" if row == "instruct-style + GRPO" else base), data


def train(row, seed, steps):
    if ROWS[row] is None or (folder(row, seed) / "final").exists():
        return
    model, data = start_of(row, seed)
    command = f"grpo_vision.py --max_steps {steps} --save_steps 1000 --eval_steps 0 --seed {seed} {ROWS[row]}"
    with open(folder(row, seed).with_suffix(".log"), "w") as log:
        subprocess.run([sys.executable, *command.split(), "--model_name_or_path", str(model), "--data",
                        str(data), "--output_dir", str(folder(row, seed)), "--overwrite"],
                       cwd=ROOT, stdout=log, stderr=log, check=True)


def answer(row, seed):
    """-> for each set: percent right, mean length in tokens."""
    import eval_cvbench
    import grpo_vision
    path = folder(row, seed) / "final" if ROWS[row] is not None else ROOT / "data/toy/base"
    tokenizer, image_processor = grpo_vision.load_processors(path)
    model = grpo_vision.load_model(path)
    grpo_vision.set_threads(model)
    mode = f"{grpo_vision.choose_prompt(tokenizer)}-{'direct' if row.endswith('SFT') else 'reasoning'}"
    found = []
    for name in "test.parquet", "cvbench":
        questions = eval_cvbench.load_benchmark(str(ROOT / "data/toy" / name))
        records = list(eval_cvbench.answer_questions(model, tokenizer, image_processor, {mode: questions},
                                                     max_new_tokens=64))
        found += [100 * mean(r["correct"] for r in records), mean(r["length"] for r in records)]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. SEEDS - 1")
    parser.add_argument("--steps", type=int, default=100, help="steps of GRPO")
    parser.add_argument("--out", default="bench/results/paper.md")
    args = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    lines = ["| toy | held-out, % | tokens | CV-Bench-shaped, % | tokens |", "|---|--:|--:|--:|--:|"]
    for row in args.rows:
        found = []
        for seed in range(args.seeds if ROWS[row] is not None else 1):
            train(row, seed, args.steps)
            found.append(answer(row, seed))
        spread = lambda values: f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        cells = [f"{mean(values):.1f}{spread(values)}" for values in zip(*found)]
        lines.append(f"| {row} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        Path(ROOT / args.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
