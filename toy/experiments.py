"""What the toy teaches, measured: several seeds, controls, and the paper's table.

    python toy/experiments.py seeds        # three worlds with three bases: a table and a figure
    python toy/experiments.py controls     # is it the reward that teaches?
    python toy/experiments.py paper        # base, SFT, GRPO, instruct, frozen towers

Sampled: the 512 held-out questions at temperature 1, graded as in training. Greedy: those and the 384 of
CV-Bench's form, graded as in evaluation. A row is the mean of its seeds and their standard deviation. Worlds,
runs and answers go to runs/experiments, where what is there already is not made again.
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import make

sys.path.insert(0, str(make.HERE.parent))
from eval_cvbench import read_jsonl, smooth
from grpo_vision import HERE, RUNS, TOY
from prepare_sat import CHAIN_FEATURES, write_parquet

FOLDER = RUNS / "experiments"
SFT = "--algorithm sft --loss_type dapo --max_steps 150 --learning_rate 5e-4"
# name -> flags of grpo_vision.py, and what the advantages are multiplied by; None: no training
CONTROLS = {
    "base": None,
    "GRPO": ("", 1),
    "advantages of 0, no KL": ("--beta 0", 0),
    "advantages of the wrong sign": ("", -1),
    "rewarded for format only": ("--rewards format", 1),
    "format x accuracy (hard)": ("--rewards hard", 1),
    "0.001 more for each token": ("--rewards accuracy,format,length", 1),
    "Dr. GRPO": ("--loss_type dr_grpo --scale_rewards false", 1),
    "loss averaged as in DAPO": ("--loss_type dapo", 1),
}
PAPER = {
    "base": None,
    "base, direct": None,
    "base + SFT": (SFT, 1),
    "base + GRPO without thinking": ("--prompt base-direct --rewards accuracy", 1),
    "base + GRPO": ("", 1),
    "instruct-style": (f"{SFT} --prompt instruct", 1),
    "instruct-style + GRPO": ("", 1),
    "base + GRPO, vision frozen": ("--freeze vision", 1),
    "base + GRPO, LLM frozen": ("--freeze llm", 1),
}
HEAD = ("| | sampled: held-out, % | one block, % | tokens | greedy: held-out, % | CV-Bench's form, % |\n"
        "|---|--:|--:|--:|--:|--:|")
ROLES = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n"  # as Qwen's, for one turn of text
         "{{ message['content'] }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def run(name, *command):
    """Run python, unless it was run before -> CPU-seconds. The log is FOLDER/NAME.log and ends in them."""
    log = FOLDER / f"{name}.log"
    if not log.exists() or "CPU-seconds" not in log.read_text():
        FOLDER.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(FOLDER / name, ignore_errors=True)  # a run that was stopped
        with open(log, "w") as file:
            child = subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, stdout=file, stderr=file)
            _, status, usage = os.wait4(child.pid, 0)
            if status:
                raise SystemExit(f"error: {name} failed, see {log}")
            file.write(f"\nCPU-seconds {usage.ru_utime + usage.ru_stime:.0f}\n")
    return int(log.read_text().split()[-1])


def train(name, flags, factor=1, base=TOY / "base", data=TOY):
    """A run of grpo_vision.py into FOLDER/NAME -> CPU-seconds."""
    code = (f"import grpo_vision as g; advantages = g.group_advantages; "
            f"g.group_advantages = lambda *x: {factor} * advantages(*x); g.main()")
    return run(name, "-c", code, "--model_name_or_path", base, "--data", data, *flags.split(),
               "--output_dir", FOLDER / name)


def answer(name, model, data=TOY, mode="reasoning"):
    """-> the five numbers of a table's row. mode: how to ask."""
    found = []
    for kind, path, flags in [("sampled", "test.parquet", "--temperature 1 --strict"),
                              ("greedy", "test.parquet", ""), ("greedy", "cvbench", "")]:
        out = FOLDER / f"{name}-{kind}-{path}"
        run(out.name, "eval_cvbench.py", "--model", model, "--data", data / path, "--modes", mode,
            "--max_new_tokens", 64, "--output_dir", out, *flags.split())
        summary = json.loads(next(out.rglob("summary.json")).read_text())
        found.append(summary["scores"]["total"]["value"])
        if kind == "sampled":
            found += [summary["rates"]["one answer block"], summary["rates"]["mean length"]]
    return found


def row(label, found):
    """A list of five numbers for each seed -> a line of a table"""
    spread = lambda values: f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    cells = [f"{mean(values):.1f}{spread(values)}" for values in zip(*found)]
    return f"| {label} | {' | '.join(cells)} |"


def seeds(args):
    """Each with a world, a base model and a run of its own. Seed 0 is what `python grpo_vision.py` does."""
    lines, runs = [HEAD], []
    for seed in range(args.seeds):
        data = FOLDER / f"world-{seed}" if seed else TOY
        if seed:
            run(data.name, TOY / "make.py", "--seed", seed, "--out", data)
        sets, name = f"{data}/cvbench,{data}/test.parquet", f"seed-{seed}"
        seconds = train(name, f"--seed {seed} --eval_data {sets}", base=data / "base", data=data)
        before, after = (answer(f"{name}-{when}", model, data) for when, model in
                         (("base", data / "base"), ("grpo", FOLDER / name / "final")))
        lines += [row(f"seed {seed}: base", [before]), row(f"GRPO, {seconds} CPU-seconds", [after])]
        runs.append(FOLDER / name)
    figure(runs, args.out / "seeds.png")
    return lines


def figure(runs, path):
    """As Figure 1 of the paper: the mean over the runs, and a band from the lowest to the highest."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    picture, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")

    def band(axis, steps, curves, **style):
        middle, low, high = (list(map(choice, zip(*curves))) for choice in (mean, min, max))
        line, = axis.plot(steps, middle, **style)
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)
    scores = [read_jsonl(run / "eval.jsonl") for run in runs]
    for name, label in ("test.parquet", "held-out questions"), ("cvbench", "CV-Bench's form"):
        curves = [[s for s in one if Path(s["set"]).name == name] for one in scores]
        steps, values = [s["step"] for s in curves[0]], [[s["accuracy"] for s in one] for one in curves]
        band(left, steps, values, label=label, marker="o", ms=3)
    metrics = [read_jsonl(run / "metrics.jsonl") for run in runs]
    lengths = [smooth([m["completions/mean_length"] for m in one], 7) for one in metrics]
    band(right, [m["step"] for m in metrics[0]], lengths, color="tab:red")
    left.set(title=f"right, %, greedy; {len(runs)} seeds", xlabel="training step", ylim=(0, 100))
    right.set(title="length of the rollouts, tokens", xlabel="training step", ylim=(0, None))
    left.legend(loc="lower right")
    picture.savefig(path, dpi=130)


def write_chains(path):
    """Questions about scenes of no test, with completions of the corpus's mixed habits -> Parquet, for SFT."""
    rng, seen, rows = random.Random(0), set(), []
    list(make.sat_rows(512, rng, seen))  # the tests, as in make.make
    for name, kinds, sources in make.CVBENCH_FILES:
        list(make.cvbench_rows(kinds, name, sources, 96, rng, seen))
    while len(rows) < 2400:
        scene, question = make.asked_scene(make.SAT_KINDS, rng, seen)
        style, = rng.choices(list(make.STYLES), make.STYLES.values())
        rows.append(dict(images=[make.png(make.paint(scene, rng))], question=question.sat,
                         options=question.options, answer=question.answer, question_type=question.kind,
                         source_row=len(rows), completion="<think>" + make.complete(question, style, rng)))
    write_parquet(path, rows, CHAIN_FEATURES)


def table(args, variants):
    """Variants that start from the base of seed 0; the seed sets data order and sampling."""
    chains, roles = FOLDER / "chains.parquet", FOLDER / "base-with-roles"
    if "instruct-style" in variants and not roles.exists():
        write_chains(chains)
        shutil.copytree(TOY / "base", roles)
        (roles / "chat_template.jinja").write_text(ROLES)

    def one(label, seed):
        name, start = f"{label.replace(' ', '_').replace(',', '')}-{seed}", {}
        mode = "direct" if "direct" in label or "SFT" in label or "without" in label else "reasoning"
        if variants[label] is None:
            return answer(name, TOY / "base", mode=mode)
        if label == "instruct-style":
            start = dict(base=roles, data=chains)
        if label == "instruct-style + GRPO":
            start = dict(base=FOLDER / f"instruct-style-{seed}" / "final")
        flags, factor = variants[label]
        train(name, f"--eval_steps 0 --save_steps 1000 --seed {seed} {flags}", factor, **start)
        return answer(name, FOLDER / name / "final", mode=mode)

    lines = [HEAD]
    for label in variants:
        count = 1 if variants[label] is None else args.seeds
        lines.append(row(label, [one(label, seed) for seed in range(count)]))
        print(lines[-1], flush=True)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["seeds", "controls", "paper"])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. SEEDS - 1")
    parser.add_argument("--out", type=Path, default=TOY / "results", help="folder of tables and figure")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    variants = dict(controls=CONTROLS, paper=PAPER)
    lines = seeds(args) if args.experiment == "seeds" else table(args, variants[args.experiment])
    (args.out / f"{args.experiment}.md").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
