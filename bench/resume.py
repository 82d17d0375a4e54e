"""Kill the toy run at random moments, resume it, and compare it bit for bit with one that was left alone.

    python bench/resume.py                                     # 20 times SIGKILL
    python bench/resume.py --processes 2 --kills 4             # sharded over two processes
    python bench/resume.py --processes 2 1 2 --kills 2         # begun with two, resumed with one, then two

Every second kill is aimed at a save: it falls within 0.1 s of the appearance of a checkpoint-N.tmp. The others fall
anywhere in the program's first 20 seconds. A run that ends is compared, and a new one begun, until there were so many
kills. Compared are the weights of every checkpoint, completions.jsonl and eval.jsonl byte by byte, and metrics.jsonl
without the timings. Samples depend on the number of processes, so if that changes, only the steps are compared, and
each kill waits for a checkpoint.
"""
import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil  # which accelerate brings

ROOT = Path(__file__).resolve().parent.parent
STEPS, LATEST = 24, 20  # steps of the run; seconds until a kill at most


def start(flags, processes, log):
    """-> grpo_vision.py, running in so many processes of one thread; its output in the file `log`."""
    launcher = f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split()
    command = [sys.executable, *launcher * (processes > 1), str(ROOT / "grpo_vision.py"), *flags.split()]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                            env=dict(os.environ, ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1"))


def records(path):
    """metrics.jsonl without the timings"""
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("seconds/")} for line in lines]


def wait_for(condition, program):
    """-> True as soon as it holds; False if the program has ended before."""
    while not condition():
        if program.poll() is not None:
            return False
        time.sleep(0.001)
    return True


def touched(folder, suffix, since):
    """-> names of the checkpoints touched since then: complete ones, or (suffix ".tmp") those being saved."""
    found = []
    for path in folder.glob(f"checkpoint-*{suffix}"):
        with suppress(FileNotFoundError):  # it has just got its name
            found += [path.name] if path.suffix == suffix and path.stat().st_ctime > since else []
    return found


def kill(args, program, folder, aimed):
    """Wait for a random moment, then send SIGKILL -> what it hit, or None if the program was done."""
    began = time.time()
    due = began + random.uniform(0, LATEST)
    if len(set(args.processes)) > 1:  # the next number of processes has to find something to load
        wait_for(lambda: touched(folder, "", began), program)
        due = time.time() + random.uniform(0, 5)
    elif aimed:
        wait_for(lambda: touched(folder, ".tmp", began), program)
        due = time.time() + random.uniform(0, 0.1)
    if not wait_for(lambda: time.time() > due, program):
        return None
    seconds = time.time() - began
    for process in [*psutil.Process(program.pid).children(recursive=True), program]:
        with suppress(psutil.NoSuchProcess):  # it has ended in between
            process.kill()
    program.wait()
    return ", while saving ".join([f"killed at {seconds:5.1f} s", *touched(folder, ".tmp", began)[:1]])


def difference(one, other):
    """What differs between two runs -> list of names, empty if nothing does."""
    files = [Path("completions.jsonl"), Path("eval.jsonl"),
             *(path.relative_to(one) for path in one.glob("*/model.safetensors"))]
    differing = [str(name) for name in files if (one / name).read_bytes() != (other / name).read_bytes()]
    if records(one / "metrics.jsonl") != records(other / "metrics.jsonl"):
        differing.append("metrics.jsonl")
    return differing


def main():
    parser = argparse.ArgumentParser(description="Kill, resume, compare; see the head of this file.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="first start, next ...")
    args = parser.parse_args()
    random.seed(0)
    work = Path(tempfile.mkdtemp(prefix="resume-"))
    log, alone, constant = open(work / "log.txt", "w+"), work / "alone", len(set(args.processes)) == 1
    flags = f"--eval_limit 8 --eval_steps 6 --save_steps 3 --max_steps {STEPS} --output_dir "
    if constant and start(f"{flags}{alone}", args.processes[0], log).wait():
        sys.exit(f"error: the run that was left alone failed; see {work}/log.txt")
    kills, equal = 0, True
    for number in itertools.count(1):
        folder, resume = work / f"run-{number}", False
        for attempt in itertools.count():
            processes = args.processes[min(attempt, len(args.processes) - 1)]
            program = start(f"{flags}{folder}{' --resume' * resume}", processes, log)
            hit = kill(args, program, folder, kills % 2 == 1) if kills < args.kills else None
            if hit is None:
                break
            kills, resume = kills + 1, True
            print(f"run {number}, {processes} process(es), {hit}", flush=True)
        if program.wait():
            sys.exit(f"error: run {number} failed; see {work}/log.txt")
        steps = [record["step"] for record in records(folder / "metrics.jsonl")]
        differing = difference(alone, folder) if constant else ["steps"] * (steps != [*range(1, STEPS + 1)])
        print(f"run {number} is done, differing: {differing or 'nothing'}", flush=True)
        equal &= not differing
        if kills >= args.kills:
            break
    if not equal:
        sys.exit(f"error: not equal; the runs are in {work}")
    verdict = "every one bit-equal" if constant else "every step there once"
    print(f"{kills} kills in {number} run(s), {verdict}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
