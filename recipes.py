"""The papers' other methods, and an example of how to extend grpo_vision.py from outside.

    python recipes.py --preset sat-sft       # VisualThinker's baseline: learn the answers, without reasoning

Vision-R1 (arXiv 2503.06749) on mathematics, on eight 80 GB GPUs. Its first stage made Osilly/Vision-R1-CI-7B.
LAUNCH stands for: accelerate launch --multi_gpu --num_processes 8

    python prepare_sat.py --from CHAINS.json --out data/cold
    LAUNCH recipes.py --preset sat-sft --data data/cold --output_dir runs/cold --learning_rate 5e-6 \\
        --model_name_or_path Qwen/Qwen2.5-VL-7B-Instruct --max_completion_length 4096
    python prepare_sat.py --from Osilly/Vision-R1-rl --multi_image --out data/own
    LAUNCH recipes.py --preset vision-r1 --model_name_or_path runs/cold/final --output_dir runs/r1
    LAUNCH recipes.py --resume --output_dir runs/r1 --max_steps 200 --max_completion_length 8192 --num_generations 8
"""
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Literal

import pyarrow.parquet as pq
import torch

import grpo_vision as gv


@dataclass
class Config(gv.Config):
    algorithm: Literal["grpo", "sft"] = gv.setting("grpo", "sft: imitate the data's completions or answers")


def given_completions(run, cfg, batch):
    """Take the data's completions, or else its answers, as samples -> a rollout like that of `gv.sample`."""
    texts, eos = [row.get("completion") or row["answer"] for row in batch.rows], run.tokenizer.eos_token
    for i, prompt in enumerate(batch.texts):
        if prefill := re.search(r"<think>(\s*)$", prompt):
            texts[i] = texts[i].removeprefix("<think>").removeprefix(prefill[1])
    given = run.tokenizer([text + eos for text in texts], padding=True, padding_side="right", truncation=True,
                          max_length=cfg.max_completion_length, return_tensors="pt").to(run.sampler.device)
    ids, mask = given.input_ids, given.attention_mask.bool()                                      # (B, C)
    finished = ids.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0] == run.tokenizer.eos_token_id   # (B,)
    texts = [gv.completion_text(text, own[kept], run.tokenizer) for text, own, kept in zip(batch.texts, ids, mask)]
    return SimpleNamespace(completion_ids=ids, completion_mask=mask, lengths=mask.sum(1), finished=finished,
                           sampling_logps=torch.zeros(ids.shape, device=ids.device), texts=texts)


def sft_step(run, cfg, step):
    """Supervised fine-tuning: `gv.train_step` with one given completion in place of samples, and A = 1. Step 6 then
    follows the gradient of log pi. The rewards are only logged, and there is no sampler to compare with."""
    clock, cfg = [gv.now()], replace(cfg, num_generations=1)
    batch = gv.draw_batch(run, cfg, step)
    rollout = given_completions(run, cfg, batch)
    rewards = gv.compute_rewards(cfg, rollout, batch.rows, run.template)
    advantages = torch.ones(len(batch.rows), device=rollout.lengths.device)                       # (B,)
    clock += [gv.now()] * 2
    logps, sums = gv.optimise(run, cfg, step, batch.passes, rollout, advantages, None)
    sums = {name: x for name, x in sums.items() if "mismatch" not in name} | dict(nll=-logps.sum().item())
    clock.append(gv.now())
    return SimpleNamespace(cfg=cfg, batch=batch, rollout=rollout, rewards=rewards, advantages=advantages,
                           ref_logps=None, logps=logps, sums=sums, clock=clock)


# 9 cm, 9 cm^{2}, 3 chairs, 5 m/s, 20 °C. In "3 sin x", sin is not a unit.
UNIT = r"(\s*[cdkm]?m|\s+[a-z]{3,}( [a-z]{2,})*|(°|\^\{?\\circ\}?) ?[cf])(/[a-z]+)?(\^\{?[23]\}?)?"
# what math-verify cannot read or must not count: pattern -> replacement
SPELLINGS = {r"^\W*(the )?(final |correct )?(answer|option|choice)( is)?\b\s*:?": "", "²": "^2",
             "√": r"\\sqrt ", r"\\?(?<![a-z])pi(?![a-z])": "π", rf"(?<=[\d}}π]){UNIT}\.?$": ""}


def math_reward(completion, answer, **_):
    """1 if the last answer block, or else the whole text, equals the solution mathematically, as judged by
    math-verify within its time limits. "(C)" and "C. 140" are the letter C. Units do not count."""
    try:
        from math_verify import parse, verify
    except ImportError:
        gv.fail("the reward math needs the library math-verify: pip install math-verify")

    def read(text):
        for pattern, latex in SPELLINGS.items():
            text = re.sub(pattern, latex, text.strip(), flags=re.IGNORECASE)
        letter = re.fullmatch(r"(\\text|\W)*([a-z])(\W*|[.:)\]][^()]*)", text.strip(), re.IGNORECASE)
        return [letter[2].upper()] if letter else parse(f"${text}$")

    blocks = gv.ANSWER_BLOCK.findall(completion)
    said = read(blocks[-1]) if blocks else read(completion) + parse(completion)
    return float(verify(read(answer), said))


def hard_reward(completion, options, **row):
    """1 only if format and answer are both right (Vision-R1's HFRRF, arXiv 2503.06749, section 3.3)."""
    right = gv.accuracy_reward if options else math_reward
    return gv.format_reward(completion) * right(completion, options=options, **row)


gv.REWARDS |= {"math": math_reward, "hard": hard_reward,
               "length": lambda completion, num_tokens, **_: 0.001 * num_tokens}  # VisualThinker's failed attempt
gv.PRESETS |= {
    # the paper's baseline: the same questions, answered without reasoning; 3750 x 8 is twice 15,000 rows
    "sat-sft": dict(algorithm="sft", learning_rate=2e-5, max_steps=3750, loss_type="dapo"),
    # stage 1 of Vision-R1, after its cold start
    "vision-r1": dict(model_name_or_path="Qwen/Qwen2.5-VL-7B-Instruct", data=f"{gv.HERE}/data/own", beta=0.01,
                      rewards="hard", lr_scheduler_type="constant", max_steps=100, num_generations=16,
                      max_completion_length=4096),
}


def main(argv=None):
    cfg = gv.parse_config(argv, Config)
    if cfg.algorithm == "grpo":
        return gv.train(cfg)
    cfg.num_iterations, cfg.beta, cfg.temperature = 1, 0.0, 1.0  # one update; nothing to stay close to
    with gv.explained(f"--data {cfg.data} cannot be read"):
        if cfg.prompt == "auto" and "completion" not in pq.read_schema(cfg.data).names:
            cfg.prompt = "direct"  # nothing but the answer to learn
    gv.train(cfg, sft_step)


if __name__ == "__main__":
    main()
