"""Is it the reward that teaches? The toy run beside its controls, several seeds each: one table, one figure.

    python bench/controls.py                       # all variants, 3 seeds: about an hour on one core
    python bench/controls.py --variants grpo flipped --seeds 1 --steps 40

Needs data/toy (`python prepare_sat.py --toy`). Every run starts from the same base; the seed sets data order
and sampling. "Before" is the first step, "6 to 10" and "after" (the last ten) are means over steps, all of
rollouts at temperature 1 on questions met for the first time. Runs lie in runs/controls/VARIANT-SEED and are
not made twice.
"""
import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RUNS = ROOT / "runs" / "controls"

VARIANTS = {  # name -> flags; zeroed and flipped replace group_advantages as well
    "grpo": [],
    "zeroed": ["--beta", "0"],
    "flipped": [],
    "format only": ["--rewards", "format"],
    "hard": ["--rewards", "hard"],
    "with length": ["--rewards", "accuracy,format,length"],
    "dr_grpo": ["--loss_type", "dr_grpo", "--scale_rewards", "false"],
    "dapo": ["--loss_type", "dapo"],
}
COLUMNS = {"accuracy": "rewards/accuracy", "format": "rewards/format", "length": "completions/mean_length"}


def folder(variant, seed):
    return RUNS / f"{variant.replace(' ', '_')}-{seed}"


def train(variant, seed, steps):
    """One run, in this process."""
    import grpo_vision
    advantages = grpo_vision.group_advantages
    factor = {"zeroed": 0.0, "flipped": -1.0}.get(variant, 1.0)
    grpo_vision.group_advantages = lambda *args: factor * advantages(*args)
    grpo_vision.main(["--seed", str(seed), "--max_steps", str(steps), "--save_steps", str(steps),
                      "--eval_steps", "0", "--output_dir", str(folder(variant, seed)), *VARIANTS[variant]])


def launch(job):
    """One run in a process of its own, on one thread (see set_threads)."""
    variant, seed, steps = job
    log = folder(variant, seed).with_suffix(".log")
    command = [sys.executable, __file__, "--one", variant, str(seed), "--steps", str(steps)]
    with open(log, "w") as file:
        failed = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file).returncode
    print(f"{variant}, seed {seed}: {f'FAILED, see {log}' if failed else 'done'}", flush=True)


def curve(variant, seed, column):
    """-> the column's value at each step; what was not rewarded is read off the completions."""
    import grpo_vision
    path = folder(variant, seed)
    metrics = read_jsonl(path / "metrics.jsonl")
    if COLUMNS[column] in metrics[0]:
        return [m[COLUMNS[column]] for m in metrics]
    rows = {}
    for sample in read_jsonl(path / "completions.jsonl"):
        value = grpo_vision.REWARDS[column](sample["completion"], num_tokens=sample["length"],
                                            answer=sample["answer"], options=[sample["answer"]])
        rows.setdefault(sample["step"], []).append(value)
    return [mean(rows[step]) for step in sorted(rows)]


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(variants, seeds):
    lines = ["| variant | " + " | ".join(f"{column} before | 6 to 10 | after" for column in COLUMNS) + " |",
             "|---" * (1 + 3 * len(COLUMNS)) + "|"]
    for variant in variants:
        cells = []
        for column in COLUMNS:
            curves = [curve(variant, seed, column) for seed in range(seeds)]
            scale, digits = (1, 1) if column == "length" else (100, 1)
            for part in slice(1), slice(5, 10), slice(-10, None):
                values = [mean(c[part] or c[-1:]) for c in curves]
                spread = stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{scale * mean(values):.{digits}f} ± {scale * spread:.{digits}f}")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def band(axis, steps, curves, label, scale=1, width=7, **style):
    """The mean of several runs' curves, each smoothed over `width` values; a band from lowest to highest."""
    from eval_cvbench import smooth
    curves = [smooth(curve, width) for curve in curves]
    line, = axis.plot(steps, [scale * mean(at) for at in zip(*curves)], label=label, **style)
    low, high = ([scale * extreme(at) for at in zip(*curves)] for extreme in (min, max))
    axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)


def figure(variants, seeds, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    titles = {"accuracy": "accuracy of the rollouts, %", "length": "length of the rollouts, tokens"}
    for axis, (column, title) in zip(axes, titles.items()):
        for variant in variants:
            curves = [curve(variant, seed, column) for seed in range(seeds)]
            scale = 100 if column == "accuracy" else 1
            band(axis, range(1, len(curves[0]) + 1), curves, variant, scale)
        axis.set(title=title, xlabel="training step", ylim=(0, 100) if column == "accuracy" else (0, None))
        axis.grid(alpha=0.25)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    fig.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. SEEDS - 1 of each variant")
    parser.add_argument("--steps", type=int, default=80, help="training steps of each run")
    parser.add_argument("--parallel", type=int, default=1, help="runs side by side, each on one core")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help="a single run, in this process")
    parser.add_argument("--out", default="bench/results/controls", help="writes OUT.md and OUT.png")
    args = parser.parse_args()
    if args.one:
        return train(args.one[0], int(args.one[1]), args.steps)
    RUNS.mkdir(parents=True, exist_ok=True)
    jobs = [(variant, seed, args.steps) for seed in range(args.seeds) for variant in args.variants
            if not (folder(variant, seed) / "final").exists()]
    with ThreadPoolExecutor(args.parallel) as pool:
        list(pool.map(launch, jobs))
    text = table(args.variants, args.seeds)
    Path(args.out + ".md").write_text(text + "\n")
    figure(args.variants, args.seeds, args.out + ".png")
    print(text)


if __name__ == "__main__":
    main()
