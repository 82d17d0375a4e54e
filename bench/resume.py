"""Kill the toy run at random moments, resume it, and compare it bit for bit with one that was left alone.

    python bench/resume.py                                     # 20 times SIGKILL
    python bench/resume.py --signal INT --kills 1              # Ctrl-C: finishes the step, saves, exit code 0
    python bench/resume.py --processes 2 --kills 4             # sharded over two gloo processes
    python bench/resume.py --processes 2 1 2 --kills 2         # begun with two, resumed with one, then two

Every second SIGKILL is aimed at a save: it falls within 0.1 s of the appearance of a checkpoint-N.tmp. The
others fall anywhere between the start of the program and --latest seconds. A run that gets to its end is
compared and a new one begun, until there were so many kills. Compared are the weights of every checkpoint,
completions.jsonl and eval.jsonl byte by byte, and metrics.jsonl without the timings. Samples depend on the
rank that draws them, so with a changing number of processes only the list of steps is compared; there each
kill waits for a checkpoint.

The toy of `python grpo_vision.py` must be there (--toy). Raw output: bench/results/resume-*.txt
"""
import argparse
import itertools
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent


def parse_args():
    parser = argparse.ArgumentParser(description="Kill, resume, compare; see the head of this file.")
    parser.add_argument("--toy", type=Path, default=ROOT / "data/toy", help="folder of the toy")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="first start, next ...")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--latest", type=float, default=30, help="latest moment of a kill, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def start(flags, processes, log):
    """-> grpo_vision.py, running in so many processes of one thread; its output in the file `log`."""
    launcher = (f"-m torch.distributed.run --nproc_per_node {processes} "
                f"--master_port {random.randint(20000, 60000)}").split()
    command = [sys.executable, *launcher * (processes > 1), str(ROOT / "grpo_vision.py"), *flags.split()]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                            env=dict(os.environ, ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1"))


def family(pid):
    """A process and all that it started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [pid, *(one for child in children for one in family(int(child)))]


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition, program):
    """-> True as soon as it holds; False if the program has ended before."""
    while not condition():
        if program.poll() is not None:
            return False
        time.sleep(0.001)
    return True


def saved_in(folder):
    return [path for path in folder.glob("checkpoint-*") if path.suffix != ".tmp"]


def being_saved(folder, since):
    """-> the checkpoint-N.tmp folders touched since then; an older one was left by an earlier kill."""
    found = []
    for path in folder.glob("checkpoint-*.tmp"):
        with suppress(FileNotFoundError):  # it has just got its name
            found += [path.name] if path.stat().st_mtime > since else []
    return found


def interrupt(args, program, folder, aimed):
    """Wait for a random moment, then send the signal -> what it hit, or None if the program was done."""
    began, before = time.time(), len(lines(folder / "metrics.jsonl"))
    due = time.time() + random.uniform(0, args.latest)
    if args.signal != "KILL":  # before the first step it has its usual meaning: the end
        wait_for(lambda: len(lines(folder / "metrics.jsonl")) > before, program)
        due = time.time() + random.uniform(0, 5)
    elif len(set(args.processes)) > 1:  # the next number of processes has to find something to load
        wait_for(lambda: any(path.stat().st_ctime > began for path in saved_in(folder)), program)
        due = time.time() + random.uniform(0, 5)
    elif aimed:
        wait_for(lambda: being_saved(folder, began), program)
        due = time.time() + random.uniform(0, 0.1)
    if not wait_for(lambda: time.time() > due, program):
        return None
    seconds = time.time() - began
    for pid in family(program.pid) if args.signal == "KILL" else [program.pid]:
        with suppress(ProcessLookupError):  # it has ended in between
            os.kill(pid, getattr(signal, f"SIG{args.signal}"))
    code, half = program.wait(), being_saved(folder, began)
    saved = max([int(path.name[11:]) for path in saved_in(folder)] or [0])
    return (f"SIG{args.signal} at {seconds:5.1f} s: exit code {code}, {len(lines(folder / 'metrics.jsonl'))} "
            f"steps logged, {saved} saved{', while saving ' + half[0] if half else ''}")


def difference(one, other):
    """What differs between two runs -> list of names, empty if nothing does."""
    timeless = lambda line: {k: v for k, v in json.loads(line).items() if not k.startswith("seconds/")}
    differing = [name for name in ("completions.jsonl", "eval.jsonl")
                 if (one / name).read_bytes() != (other / name).read_bytes()]
    if [*map(timeless, lines(one / "metrics.jsonl"))] != [*map(timeless, lines(other / "metrics.jsonl"))]:
        differing.append("metrics.jsonl")
    for weights in one.glob("*/model.safetensors"):
        twin = other / weights.parent.name / weights.name
        if not twin.exists() or twin.read_bytes() != weights.read_bytes():
            differing.append(weights.parent.name)
    return differing


def main():
    args = parse_args()
    random.seed(args.seed)
    work = Path(tempfile.mkdtemp(prefix="resume-"))
    log, alone, toy = open(work / "log.txt", "w+"), work / "alone", args.toy
    flags = f"""--model_name_or_path {toy}/base --data {toy} --eval_data {toy}/cvbench,{toy}/test.parquet
        --eval_limit 8 --eval_steps 6 --save_steps 3 --max_steps {args.steps} --output_dir """
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {version('torch')}, transformers "
          f"{version('transformers')}, accelerate {version('accelerate')}; `python bench/resume.py "
          f"{' '.join(sys.argv[1:])}`", flush=True)
    if len(set(args.processes)) == 1:
        began = time.monotonic()
        if start(f"{flags}{alone}", args.processes[0], log).wait():
            sys.exit(f"error: the run that was left alone failed; see {work}/log.txt")
        print(f"left alone: {args.steps} steps in {time.monotonic() - began:.0f} s", flush=True)
    kills, equal = 0, True
    for number in itertools.count(1):
        folder, resume = work / f"run-{number}", False
        for attempt in itertools.count():
            processes = args.processes[min(attempt, len(args.processes) - 1)]
            program = start(f"{flags}{folder}{' --resume' * resume}", processes, log)
            hit = interrupt(args, program, folder, kills % 2 == 1) if kills < args.kills else None
            if hit is None:
                break
            kills, resume = kills + 1, (folder / "config.json").exists()
            print(f"run {number}, {processes} process(es), {hit}", flush=True)
            if args.signal != "KILL" and processes == 1:
                assert program.returncode == 0 and "go on with:" in (work / "log.txt").read_text()
        if program.wait():
            sys.exit(f"error: run {number} failed; see {work}/log.txt")
        if alone.exists():
            differing = difference(alone, folder)
            print(f"run {number} is done: {', '.join(differing) + ' differ' if differing else 'bit-equal'}",
                  flush=True)
        else:
            steps = [json.loads(line)["step"] for line in lines(folder / "metrics.jsonl")]
            differing = [] if steps == [*range(1, args.steps + 1)] else ["steps"]
            print(f"run {number} is done: steps {steps[0]} to {steps[-1]}, {len(steps)} lines", flush=True)
        equal &= not differing
        if kills >= args.kills:
            break
    if not equal:
        sys.exit(f"error: not equal; the runs are in {work}")
    verdict = "every one bit-equal in the end" if alone.exists() else "every step there once"
    print(f"{kills} kills in {number} run(s), {verdict}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
