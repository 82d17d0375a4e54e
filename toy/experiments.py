"""What the toy teaches, measured: each command writes a table and mostly a figure to toy/results/.

    python toy/experiments.py group        # one real group, and what one update did to each of its tokens
    python toy/experiments.py ladder       # each piece of GRPO is one changed line
    python toy/experiments.py passk        # was the answer invented or found? pass@1 to pass@64
    python toy/experiments.py rewards      # you get what you reward
    python toy/experiments.py seeds        # three worlds with three bases
    python toy/experiments.py controls     # is it the reward that teaches?
    python toy/experiments.py paper        # base, SFT, GRPO, frozen towers
    python toy/experiments.py exercises    # the README's five: small edits of grpo_vision.py

Sampled: the 512 held-out questions at temperature 1, graded as in training. Greedy: those and the 384 in
CV-Bench's format, graded as in evaluation. Rows give the mean and the standard deviation over seeds. Worlds,
runs and answers go to runs/experiments; what is there already is not made again. --seeds 1 takes one seed.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import make

sys.path.insert(0, str(make.HERE.parent))
import grpo_vision as gv
from eval_cvbench import read_jsonl
from grpo_vision import HERE, RUNS, TOY, torch

FOLDER = RUNS / "experiments"
TIMES = "advantages = g.group_advantages; g.group_advantages = lambda *x: {} * advantages(*x)"
# label -> flags of recipes.py, and a line of Python that changes grpo_vision (g) first; None: no training
CONTROLS = {
    "base": None,
    "GRPO": ("", ""),
    "advantages of 0, no KL": ("--beta 0", TIMES.format(0)),
    "advantages of the wrong sign": ("", TIMES.format(-1)),
    "format x accuracy (hard)": ("--rewards hard", ""),
    "0.001 more for each token": ("--rewards accuracy,format,length", ""),
    "Dr. GRPO": ("--loss_type dr_grpo --scale_rewards false", ""),
    "loss averaged as in DAPO": ("--loss_type dapo", ""),
}
PAPER = {
    "base": None,
    "base, direct": None,
    "base + SFT": ("--algorithm sft --loss_type dapo --max_steps 150 --learning_rate 5e-4", ""),
    "base + GRPO without thinking": ("--prompt direct --rewards accuracy", ""),
    "base + GRPO": ("", ""),
    "base + GRPO, vision frozen": ("--freeze vision", ""),
    "base + GRPO, LLM frozen": ("--freeze llm", ""),
}
LADDER = {
    "the data's answers (SFT)": ("--algorithm sft --loss_type dapo --learning_rate 5e-4", ""),
    "A = R (REINFORCE)": ("", "g.group_advantages = lambda R, *_: R"),
    "A = R - mean(R)": ("--scale_rewards false", ""),
    "A = (R - mean(R)) / std(R): GRPO": ("", ""),
    "four updates per rollout": ("--num_iterations 4", ""),
    "four updates, no clip": ("--num_iterations 4 --epsilon 1e9", ""),
    "no KL penalty": ("--beta 0", ""),
    "ten times the KL penalty": ("--beta 0.1", ""),
}
# label -> flags, and the edits: a function of grpo_vision.py, what is replaced in it, and by what
EXERCISES = {
    "unchanged": ("", ()),
    "1: KL in the reward": ("", (
        ("train_step", "sum(rewards.values())", "sum(rewards.values()) - cfg.beta * "
         "(rollout.sampling_logps - score_rollout(run.reference, batch.passes, rollout, cfg)).sum(1)"),
        ("grpo_loss", "per_token_loss + beta * kl", "per_token_loss"))),
    "2: the whole batch's std": ("", (("group_advantages", "R.std(1, keepdim=True)", "R.std()"),)),
    "3: 32 groups of 2": ("--num_generations 2 --prompts_per_step 32", ()),
    "3: 4 groups of 16": ("--num_generations 16 --prompts_per_step 4", ()),
    "four updates per rollout": ("--num_iterations 4", ()),
    "4: four updates, GSPO's ratio": ("--num_iterations 4", (
        ("grpo_loss", "(per_token_logps - old_per_token_logps).exp()", "((per_token_logps - old_per_token_logps)"
         ".sum(1, keepdim=True) / completion_mask.sum(1, keepdim=True)).exp()"),)),
    "5: KL times the ratio": ("", (("grpo_loss", "beta * kl", "beta * ratio * kl"),)),
}
# a line of Python that makes an edit; train has the old train_step as its default
EDIT = ("import inspect; source = inspect.getsource(g.{0}); assert source.count({1!r}) == 1; "
        "exec(source.replace({1!r}, {2!r}), vars(g)); g.train.__defaults__ = (g.train_step,)")
REWARDS = {"accuracy,format": "both", "accuracy": "accuracy alone", "format": "format alone"}
HEAD = ("| | sampled: held-out, % | one block, % | tokens | greedy: held-out, % | CV-Bench's format, % |\n"
        "|---|--:|--:|--:|--:|--:|")


# ---- Runs, each made once --------------------------------------------------------------------------------

def run(name, *command):
    """Run python, unless it was run before. The log is FOLDER/NAME.log and ends in the CPU-seconds that it took."""
    log = FOLDER / f"{name}.log"
    if not log.exists() or "CPU-seconds" not in log.read_text():
        log.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(FOLDER / name, ignore_errors=True)  # a run that was stopped
        with open(log, "w") as file:
            child = subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, stdout=file, stderr=file)
            _, status, usage = os.wait4(child.pid, 0)
            if status:
                raise SystemExit(f"error: {name} failed, see {log}")
            file.write(f"\nCPU-seconds {usage.ru_utime + usage.ru_stime:.0f}\n")


def train(name, flags, change="", base=TOY / "base", data=TOY):
    """A run of recipes.py into FOLDER/NAME."""
    run(name, "-c", f"import grpo_vision as g, recipes; {change or 'pass'}; recipes.main()", "--data", data,
        "--model_name_or_path", base, *flags.split(), "--output_dir", FOLDER / name)


def evaluate(name, model, data, *flags):
    """-> summary.json of an evaluation of eval_cvbench.py, as a dict."""
    out = FOLDER / name
    run(name, "eval_cvbench.py", "--model", model, "--data", data, "--max_new_tokens", 64, "--output_dir", out, *flags)
    return json.loads(next(out.rglob("summary.json")).read_text())


def answer(name, model, data=TOY, mode="reasoning"):
    """-> the five numbers of a table's row. mode: how to ask."""
    asked = lambda kind, path, *flags: evaluate(f"{name}-{kind}-{path}", model, data / path, "--modes", mode, *flags)
    sampled = asked("sampled", "test.parquet", "--temperature", 1, "--strict")
    greedy = [asked("greedy", path) for path in ("test.parquet", "cvbench")]
    scores = [found["scores"]["total"]["value"] for found in (sampled, *greedy)]
    return [scores[0], sampled["rates"]["one answer block"], sampled["rates"]["mean length"], *scores[1:]]


def each(args, function, labels):
    """function(label, seed), as many at a time as there are cores -> {label: list of one result a seed}"""
    tasks = [(label, seed) for label in labels for seed in range(args.seeds)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(tasks, pool.map(lambda task: function(*task), tasks)))
    return {label: [found[label, seed] for seed in range(args.seeds)] for label in labels}


def shown(values, form="{:.1f}"):
    """One value for each seed -> mean ± standard deviation"""
    spread = f" ± {form.format(stdev(values))}" if len(values) > 1 else ""
    return form.format(mean(values)) + spread


def row(label, found):
    """A list of numbers for each seed -> a line of a table"""
    return f"| {label} | {' | '.join(map(shown, zip(*found)))} |"


def slug(label, seed):
    return "".join(c for c in label.replace(" ", "_") if c.isalnum() or c in "_-") + f"-{seed}"


# ---- Figures ---------------------------------------------------------------------------------------------

def panels(columns, width=9, height=3.4, **shape):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained", **shape)


def band(axis, x, curves, **style):
    """The mean of the curves, and a band from the lowest to the highest."""
    middle, low, high = (list(map(choice, zip(*curves))) for choice in (mean, min, max))
    line, = axis.plot(x, middle, **style)
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, lw=0)


def accuracies(folder, name):
    """-> training steps, and greedy accuracy on the set `name` at each"""
    scores = [score for score in read_jsonl(folder / "eval.jsonl") if Path(score["set"]).name == name]
    return [score["step"] for score in scores], [score["accuracy"] for score in scores]


# ---- The story: one group, one changed line, found or invented, the rewards ------------------------------

CONTEXT = " ball northwest left, sun north centre, so left</think>"
DECISIONS = {'" ball" as the first word (describe)': ("", " ball"), '" i" as the first word (guess)': ("", " i"),
             "a new line after `</think>` (answer, not stop)": (CONTEXT, "\n")}  # what was said, the next token


@torch.no_grad()
def decisions(run):
    """-> the probability of each of the DECISIONS, after the prompt of the first question"""
    batch, found = gv.draw_batch(run, run.cfg, 0), []
    for said, token in DECISIONS.values():
        x = gv.build_prompts([batch.texts[0] + said], batch.images[:1], run.tokenizer, run.image_processor, run.sampler)
        hidden = run.sampler.model(input_ids=x.input_ids, position_ids=x.position_ids, pixel_values=x.pixel_values,
                                   image_grid_thw=x.image_grid_thw).last_hidden_state              # (1, P, H)
        logps = gv.token_logps(run.sampler, hidden[0, -1], run.cfg.temperature)                   # (V,)
        found.append(logps[run.tokenizer(token).input_ids[0]].exp().item())
    return found


def group(args):
    """The default run's first group, and three decisions on its question over the steps."""
    folder, file, found = FOLDER / "group", FOLDER / "group/decisions.json", []

    def watched(run, cfg, step):
        found.append(decisions(run))
        return gv.train_step(run, cfg, step)

    if not file.exists():
        shutil.rmtree(folder, ignore_errors=True)
        gv.train(gv.parse_config(["--output_dir", str(folder), "--eval_steps", "0"]), watched)
        file.write_text(json.dumps(found))
    first, found = read_jsonl(folder / "rollouts.jsonl")[0], json.loads(file.read_text())
    group_figure(first, found, args.out / "group.png")
    lines = [f"{first['question']} Options: {', '.join(first['options'])}. Right: {first['answer']}.\n",
             "| completion | R | A |\n|---|--:|--:|"]
    for c in first["completions"]:
        text = "".join(c["tokens"]).replace("\n", "\\n")
        lines.append(f"| `{text}` | {c['reward']:g} | {c['advantage']:+.2f} |")
    steps = 0, 1, 10, 70, 139
    lines.append(f"\n| probability after so many steps | {' | '.join(map(str, steps))} |\n|---|{'--:|' * len(steps)}")
    for what, values in zip(DECISIONS, zip(*found)):
        lines.append(f"| {what} | {' | '.join(f'{values[step]:.2f}' for step in steps)} |")
    return lines


def group_figure(first, found, path):
    """Left: the group's completions, each token tinted by what the update did to it. Right: the decisions."""
    figure, (left, right) = panels(2, 13, 4.2, width_ratios=(2.2, 1))
    rows = first["completions"]
    left.set(ylim=(len(rows) + 0.5, -1.2))
    left.axis("off")

    def write(points, y, text, **style):  # so many points from the left
        left.annotate(text, (0, y), (points, 0), textcoords="offset points", va="center", **style)

    largest = max(abs(a - b) for c in rows for a, b in zip(c["after"], c["before"]))
    write(0, -0.9, f"{first['question']} ({first['answer']})", weight="bold")
    write(545, -0.9, "R", weight="bold", ha="right")
    write(590, -0.9, "A", weight="bold", ha="right")
    for y, c in enumerate(rows):
        x = 0
        for token, before, after in zip(c["tokens"], c["before"], c["after"]):
            token = token.replace("\n", "\\n").replace("<|endoftext|>", "<end>")
            colour, share = "tab:green" if after > before else "tab:red", abs(after - before) / largest
            write(x, y, token, family="monospace", bbox=dict(facecolor=(colour, share), edgecolor="none", pad=1))
            x += 5.42 * len(token) + 3  # a character of this font is 0.602 as wide as its size
        write(545, y, f"{c['reward']:g}", ha="right")
        write(590, y, f"{c['advantage']:+.2f}", ha="right")
    write(0, len(rows), "green: the update made the token likelier; red: less likely", style="italic")
    for what, values in zip(DECISIONS, zip(*found)):
        right.plot(values, label=what.replace("`", ""))
    right.set(xlabel="training step", ylabel="probability", ylim=(0, 1.02))
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(path, dpi=130)


def learn(args, variants, kind):
    """70 steps for each label -> (flags, change). -> steps, {label: greedy accuracy at each, by seed}, a table"""
    flags = f"--max_steps 70 --eval_steps 7 --save_steps 1000 --eval_data {TOY}/test.parquet"

    def one(label, seed):
        (more, change), name = variants[label], slug(label, f"{kind}-{seed}")
        train(name, f"{flags} --seed {seed} {more}", change)
        return *accuracies(FOLDER / name, "test.parquet"), read_jsonl(FOLDER / name / "metrics.jsonl")

    found, curves = each(args, one, variants), {}
    lines = ["| greedy, 128 held-out questions, % | step 14 | step 28 | step 70 | kl at the end | clipped tokens, % |\n"
             "|---|--:|--:|--:|--:|--:|"]
    for label in variants:
        steps, curves[label], logs = zip(*found[label])
        at = [shown([curve[steps[0].index(step)] for curve in curves[label]]) for step in (14, 28, 70)]
        kl = shown([mean(m["kl"] for m in metrics[-10:]) for metrics in logs], "{:.3f}")
        clip = shown([100 * mean(m["clip_ratio"] for m in metrics) for metrics in logs], "{:.2f}")
        lines.append(f"| {label} | {' | '.join(at)} | {kl} | {clip} |")
    return steps[0], curves, lines


def ladder(args):
    steps, curves, lines = learn(args, LADDER, "ladder")
    figure, axes = panels(3, 12, 4.4, sharey=True)
    labels = list(LADDER)
    for axis, title, kept in zip(axes, ("from answers to GRPO", "several updates per rollout", "the KL penalty"),
                                 (labels[:4], labels[3:6], [labels[3], *labels[6:]])):
        for label in kept:
            band(axis, steps, curves[label], label=label, marker="o", ms=3, color=f"C{labels.index(label)}")
        axis.set(title=title, xlabel="training step", ylim=(0, 100))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15))
    axes[0].set_ylabel(f"right, %, greedy; {args.seeds} seed(s)")
    figure.savefig(args.out / "ladder.png", dpi=130)
    return lines


def exercises(args):
    variants = {label: (flags, "; ".join(EDIT.format(*edit) for edit in edits))
                for label, (flags, edits) in EXERCISES.items()}
    return learn(args, variants, "exercises")[2]


def passk(args):
    """The share of questions with a right answer in k tries, of the base and of the trained model."""
    train("seed-0", "--seed 0")
    flags = "--limit 256 --temperature 1 --num_generations 64 --strict".split()
    ks = [2**i for i in range(7)]
    figure, axis = panels(1, 5)
    lines = [f"| k | {' | '.join(map(str, ks))} |\n|---|{'--:|' * len(ks)}"]
    for label, model in ("base", TOY / "base"), ("trained", FOLDER / "seed-0/final"):
        scores = evaluate(f"passk-{label}", model, TOY / "test.parquet", *flags)["scores"]
        values, low, high = ([scores[f"pass@{k}"][part] for k in ks] for part in ("value", "low", "high"))
        lines.append(f"| {label}, % | {' | '.join(f'{value:.1f}' for value in values)} |")
        axis.plot(ks, values, "o-", ms=4, label=label)
        axis.fill_between(ks, low, high, alpha=0.15)
    axis.set(xscale="log", xlabel="k, samples for each question", ylabel="pass@k, %", ylim=(0, 101), xticks=ks,
             xticklabels=ks)
    axis.minorticks_off()
    axis.legend(loc="lower right")
    figure.savefig(args.out / "passk.png", dpi=130)
    return lines


def rewards(args):
    """What the policy does after 20 steps, by what was rewarded."""
    def one(names, seed):
        name, rows = slug(REWARDS[names], f"rewards-{seed}"), gv.pq.read_table(TOY / "train.parquet").to_pylist()
        train(name, f"--rewards {names} --max_steps 20 --lr_scheduler_type constant --eval_steps 0 --seed {seed}")
        last = [s for s in read_jsonl(FOLDER / name / "completions.jsonl") if s["step"] > 17]  # 192 samples
        right = [gv.accuracy_reward(s["completion"], **rows[s["row"]]) for s in last]
        form = [gv.format_reward(s["completion"]) for s in last]
        return mean("i guess" in s["completion"] for s in last), mean(right), mean(form)

    found = each(args, one, REWARDS)
    lines = ["| rewarded for | guesses | accuracy | format |\n|---|--:|--:|--:|"]
    figure, axis = panels(1, 6, 2.6)
    for place, (names, label) in enumerate(REWARDS.items()):
        columns = list(zip(*found[names]))
        lines.append(f"| {label} | " + " | ".join(shown(values, "{:.2f}") for values in columns) + " |")
        axis.bar([i + 0.25 * (place - 1) for i in range(3)], list(map(mean, columns)), 0.22, label=label)
    axis.set(xticks=range(3), xticklabels=["guesses", "right", "in the format"], ylim=(0, 1),
             ylabel="share of completions")
    figure.legend(title="rewarded for", loc="outside right upper")
    figure.savefig(args.out / "rewards.png", dpi=130)
    return lines


# ---- Tables of many runs ---------------------------------------------------------------------------------

def seeds(args):
    """Seeds, each with its own world, base model and run. Seed 0 is what `python grpo_vision.py` does."""
    def one(_, seed):
        data = FOLDER / f"world-{seed}" if seed else TOY
        if seed:
            run(data.name, TOY / "make.py", "--seed", seed, "--out", data)
        sets, name = f"--eval_data {data}/cvbench,{data}/test.parquet" if seed else "", f"seed-{seed}"
        train(name, f"--seed {seed} {sets}", base=data / "base", data=data)
        before, after = (answer(f"{name}-{when}", model, data) for when, model in
                         (("base", data / "base"), ("grpo", FOLDER / name / "final")))
        return [row(f"seed {seed}: base", [before]), row(f"seed {seed}: GRPO", [after])]

    return sum(each(args, one, ["seeds"])["seeds"], [HEAD])


def table(args, variants):
    """Variants that start from the base of seed 0; the seed sets data order and sampling."""
    ways = {label: "direct" if re.search("direct|SFT|without", label) else "reasoning" for label in variants}

    def one(label, seed):
        name, (flags, change) = slug(label, seed), variants[label]
        train(name, f"--eval_steps 0 --save_steps 1000 --seed {seed} {flags}", change)
        return answer(name, FOLDER / name / "final", mode=ways[label])

    trained = each(args, one, [label for label in variants if variants[label]])
    return [HEAD, *(row(label, trained.get(label) or [answer(slug(label, 0), TOY / "base", mode=ways[label])])
                    for label in variants)]


EXPERIMENTS = dict(group=group, ladder=ladder, passk=passk, rewards=rewards, seeds=seeds, exercises=exercises,
                   controls=lambda args: table(args, CONTROLS), paper=lambda args: table(args, PAPER))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. SEEDS - 1")
    parser.add_argument("--out", type=Path, default=TOY / "results", help="folder of tables and figures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = EXPERIMENTS[args.experiment](args)
    (args.out / f"{args.experiment}.md").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
