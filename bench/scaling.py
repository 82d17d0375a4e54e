"""Seconds per training step with one process and with two, sharded over gloo, on the CPU.

    python bench/scaling.py                        # 43M parameters with random weights, the toy's questions

Both do the same work: 8 questions x 4 completions x 32 tokens per step (a random model hardly ever draws the
end token). Wall-clock is what counts on a quiet machine. CPU seconds, of all processes together, say what
sharding costs whatever else the machine does: gathering weights, copying them into the sampler, waiting
actively for one another.
"""
import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoConfig, Qwen2VLForConditionalGeneration

import step  # this and resume: of bench/
from resume import family, lines, start

SIZES = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
             rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12]))
VISION = dict(depth=8, embed_dim=320, hidden_size=512, num_heads=8)
TICKS = os.sysconf("SC_CLK_TCK")


def write_model(toy, folder):
    """A larger model, random, with the toy's tokenizer and image processor."""
    shutil.copytree(toy / "base", folder / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(toy / "base")
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    config = type(config)(**{**config.to_dict(), "text_config": {**text, **SIZES, "layer_types": None},
                             "vision_config": {**vision, **VISION}})
    model = Qwen2VLForConditionalGeneration(config)
    model.save_pretrained(folder / "base")
    return model.num_parameters()


def cpu_seconds(pids):
    """User and system time so far."""
    return sum(sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(") ")[1].split()[11:13]))
               for pid in pids) / TICKS


def main():
    parser = argparse.ArgumentParser(description="Seconds per step of one and two processes.")
    parser.add_argument("--toy", type=Path, default=Path("data/toy"))
    parser.add_argument("--steps", type=int, default=5, help="timed, after the first two")
    args = parser.parse_args()
    if not (args.toy / "base").exists():
        sys.exit(f"error: --toy {args.toy} has no base model; make it by `python prepare_sat.py --toy`")
    print("| processes x threads | seconds per step | CPU seconds per step |\n|---|--:|--:|")
    with tempfile.TemporaryDirectory() as work:
        count = write_model(args.toy, Path(work))
        for processes, threads in (1, 1), (1, 2), (2, 1):
            os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count() // threads)  # set_threads reads it
            flags = (f"--preset toy --model_name_or_path {work}/base --data {args.toy} --eval_steps 0 "
                     f"--prompts_per_step 8 --num_generations 4 --max_completion_length 32 "
                     f"--save_steps 1000 --max_steps {args.steps + 2} "
                     f"--output_dir {work}/{processes}{threads}")
            with open(f"{work}/log.txt", "w") as log:
                program, clock = start(flags, processes, log), []
                for seen in 2, args.steps + 2:
                    while len(lines(Path(work, f"{processes}{threads}", "metrics.jsonl"))) < seen:
                        if program.poll() is not None:
                            sys.exit(Path(work, "log.txt").read_text()[-2000:])
                        time.sleep(0.005)
                    clock.append((time.monotonic(), cpu_seconds(family(program.pid))))
                program.wait()
            wall, cpu = ((b - a) / args.steps for a, b in zip(*clock))
            print(f"| {processes} x {threads} | {wall:.2f} | {cpu:.2f} |", flush=True)
    print(f"\n{count / 1e6:.0f}M parameters. {step.machine(os.cpu_count())}")


if __name__ == "__main__":
    main()
