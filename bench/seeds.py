"""The toy from start to end with several seeds of everything: world, base model, GRPO. One table, one figure.

    python bench/seeds.py               # seeds 0, 1 and 2: about ten minutes each on an idle core

Seed 0 is the default run. What is there already is not made again: data/toy and data/toy-sN, the runs in
runs/seeds/N, and beside them a log of each stage, which ends in the CPU-seconds (user + system) it took.
"""
import argparse
import resource
import subprocess
import sys
from pathlib import Path
from statistics import mean

from controls import ROOT, band, read_jsonl

import grpo_vision

RUNS = ROOT / "runs" / "seeds"
SETS = {"test.parquet": ["--temperature", "1", "--strict"], "cvbench": []}  # held-out as in training; greedy


def stage(seed, name, command):
    """Run a command, unless it was run before -> the CPU-seconds that it took."""
    log = RUNS / f"{seed}-{name}.log"
    done = log.read_text().rpartition("CPU-seconds ")[2] if log.exists() else ""
    if not done:
        print(f"seed {seed}: {name}", flush=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with open(log, "w") as file:
            subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = f"{after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.0f}"
        with open(log, "a") as file:
            file.write(f"\nCPU-seconds {done}")
    return float(done)


def make(seed):
    """World, base model, run and answers of one seed -> CPU-seconds of all but the answers."""
    data, run = "data/toy" + (f"-s{seed}" if seed else ""), f"runs/seeds/{seed}"
    sets = ",".join(f"{data}/{name}" for name in ("cvbench", "test.parquet"))
    seconds = stage(seed, "base", ["prepare_sat.py", "--toy", "--seed", str(seed), "--out", data])
    seconds += stage(seed, "grpo", ["grpo_vision.py", "--seed", str(seed), "--model_name_or_path",
                                    f"{data}/base", "--data", data, "--eval_data", sets, "--output_dir", run])
    for when, model in ("before", f"{data}/base"), ("after", f"{run}/final"):
        for name, flags in SETS.items():
            stage(seed, f"{when}-{name}", ["eval_cvbench.py", "--model", model, "--data", f"{data}/{name}",
                                           *flags, "--max_new_tokens", "64", "--output_dir",
                                           f"results/seeds/{seed}-{when}-{name}"])
    return seconds


def answers(seed, when, name):
    """-> percent right with its standard error, percent well formed, mean length in tokens."""
    file, = (ROOT / f"results/seeds/{seed}-{when}-{name}").rglob("*.jsonl")
    records = read_jsonl(file)
    right = mean(record["correct"] for record in records)
    return (f"{100 * right:.1f} ± {100 * (right * (1 - right) / len(records)) ** 0.5:.1f}",
            f"{100 * mean(grpo_vision.format_reward(record['completion']) for record in records):.1f}",
            f"{mean(record['length'] for record in records):.1f}")


def table(seconds):
    columns = ["right", "well formed", "tokens"]
    lines = ["| seed | " + " | ".join(f"{name}, {column}" for name in ("held-out", "CV-Bench-shaped")
                                      for column in columns) + " | rollouts, tokens | CPU-seconds |",
             "|---" + "|--:" * 8 + "|"]
    for seed, spent in seconds.items():
        lengths = [m["completions/mean_length"] for m in read_jsonl(RUNS / f"{seed}/metrics.jsonl")]
        cells = [f"{before} -> {after}" for name in SETS for before, after in
                 zip(answers(seed, "before", name), answers(seed, "after", name))]
        cells += [f"{lengths[0]:.1f} -> {mean(lengths[-10:]):.1f}", f"{spent:.0f}"]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(seeds, path):
    """As Figure 1 of the paper, mean over the seeds; bands from the lowest to the highest seed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    metrics = [read_jsonl(RUNS / f"{seed}/metrics.jsonl") for seed in seeds]
    curves = lambda key: [[m[key] for m in run] for run in metrics]
    steps = [m["step"] for m in metrics[0]]
    band(left, steps, curves("rewards/accuracy"), "rollouts, temperature 1", 100)
    scores = [read_jsonl(RUNS / f"{seed}/eval.jsonl") for seed in seeds]
    for name in SETS:
        of_set = [[s for s in run if Path(s["set"]).name == name] for run in scores]
        label = {"test.parquet": "held-out, greedy", "cvbench": "CV-Bench-shaped, greedy"}[name]
        band(left, [s["step"] for s in of_set[0]], [[s["accuracy"] for s in run] for run in of_set], label,
             width=1, marker="o", ms=3)
    band(right, steps, curves("completions/mean_length"), "length", color="tab:red")
    left.set(title=f"accuracy, %, mean of {len(seeds)} seeds", xlabel="training step", ylim=(0, 100))
    right.set(title="length of the rollouts, tokens", xlabel="training step", ylim=(0, None))
    left.legend(fontsize=8, loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.25)
    fig.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. SEEDS - 1")
    parser.add_argument("--out", default="bench/results/toy-seeds", help="writes OUT.md and OUT.png")
    args = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    seconds = {seed: make(seed) for seed in range(args.seeds)}
    text = table(seconds)
    Path(args.out + ".md").write_text(text + "\n")
    figure(list(seconds), args.out + ".png")
    print(text)


if __name__ == "__main__":
    main()
