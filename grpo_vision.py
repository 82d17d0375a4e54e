"""Visual R1-Zero in one file: GRPO on Qwen2-VL, after VisualThinker-R1-Zero (arXiv 2503.05132).

The policy is the language model, seen as a distribution over the next token. Ask it a question about an image
several times, and reward each answer by a rule. Then train by maximum likelihood with a weight and a sign:
every token of an answer is pushed up or down by how much better than its siblings the answer did. That is
GRPO, Group Relative Policy Optimization. "R1-Zero" means that training starts from a base model. Nobody shows
it how to reason; it learns from right or wrong alone.

One training step. `train_step` puts it together, and the sections below follow it:

  1. Draw B questions, each with its image, and put each into the prompt template.
  2. Sample G completions of each prompt from the policy. Row i of the N = B * G rows has prompt i // G.
  3. Reward each completion by rules:    R_i = accuracy (0 or 1) + format (0 or 1)
  4. Compare it with its own group:      A_i = (R_i - mean(R)) / (std(R) + 1e-4)
  5. Score each completion token c_t by the reference, which is the policy as it was before training:
         log pi_ref(c_t | image, prompt, c_<t)
  6. Score it by the policy pi, and follow the gradient of the loss:
         ratio = pi / pi_old            kl = pi_ref / pi - log(pi_ref / pi) - 1
         loss  = mean over rows of mean over tokens of
                 [-min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A) + beta kl]
     pi_old is the policy when it first scored these completions. The Kullback-Leibler term kl keeps the
     policy close to the reference.

One idea makes it fast. A group shares one image and one prompt. They run through the model once, and the G
completions branch off the keys and values that they leave. It is exact: `encode`, `score`, `update`.

Symbols: n prompts that run together (a pass), P prompt tokens, C completion tokens, K rows of a chunk, H
hidden size, V vocabulary size. Tensor lines end in their shape: # (N, C). `cfg` holds the settings
(`Config`). `run` holds what `setup` makes of them: the policy, which is trained; the sampler, a copy of it;
the reference; optimizer, tokenizer, data. policy(encode, x) is encode(model, x), run by `Policy`.

    python grpo_vision.py                                             # the toy: a laptop, offline, 2 minutes
    python grpo_vision.py --preset sat                                # Qwen2-VL-2B on SAT, on one GPU
    accelerate launch --num_processes 8 grpo_vision.py --preset sat   # the same, sharded over eight GPUs
"""
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Literal, Optional

import torch
import torch.distributed.checkpoint as distributed_checkpoint
import transformers
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from filelock import FileLock
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import (get_model_state_dict, get_optimizer_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, HfArgumentParser
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision


def train_step(run, cfg, step):
    """The six steps, once -> all that came of them, to be logged."""
    clock = [now()]
    # 1. B questions with their images, in the prompt template
    batch = draw_batch(run, cfg, step)
    # 2. G completions of each
    rollout = draw_completions(run, cfg, step, batch)
    clock.append(now())
    # 3. their rewards, by name
    rewards = compute_rewards(cfg.rewards, rollout.texts, rollout.lengths, batch.rows, run.template)
    # 4. their advantages
    advantages = group_advantages(sum(rewards.values()), cfg.num_generations, cfg.scale_rewards)  # (N,)
    # 5. the reference's log-probabilities
    ref_logps = score_by_reference(run.reference, batch.passes, rollout, cfg) if cfg.beta else None  # (N, C)
    clock.append(now())
    # 6. the policy's log-probabilities, the loss and the update
    sums = optimise(run, cfg, step, batch.passes, rollout, advantages, ref_logps)
    clock.append(now())
    return SimpleNamespace(batch=batch, rollout=rollout, rewards=rewards, advantages=advantages, sums=sums,
                           clock=clock)


# ---- Step 1: the question, with its images, in the prompt template ---------------------------------------

IMAGE_TOKENS = "<|vision_start|><|image_pad|><|vision_end|>"

# The paper's templates, verbatim. The base model's ends in <think> and never mentions <answer>: the policy
# learns to write answer blocks from the format reward. "direct" is for answers without reasoning.
TEMPLATES = {
    "base": "A conversation between User and Assistant. The user asks a question about the image, and the "
            "Assistant solves it. The assistant first thinks about the reasoning process in the mind and "
            "then provides the user with the answer.\nUser: {question} \nAssistant: Let me solve this step "
            "by step.\n<think>",
    "base-direct": "A conversation between User and Assistant. The user asks a question about the image, and "
                   "the Assistant solves it.\nUser: {question} \nAssistant: ",
    "instruct": "{question}  Output the thinking process in <think> </think> and final answer (option) in "
                "<answer> </answer> tags.",
    "instruct-direct": "{question}",
}


def build_question(question, options):
    """The paper's wording of a question with its options, if it has any.

    >>> build_question("How many chairs are there?", ["2", "3", "5"])
    'Answer in natural language. How many chairs are there? Choose between the following options: 2, 3 or 5'
    """
    if not options:
        return question
    choices = " or ".join([", ".join(options[:-1]), options[-1]] if len(options) > 1 else options)
    return f"Answer in natural language. {question} Choose between the following options: {choices}"


def render(question, num_images, template, tokenizer):
    """Fill TEMPLATES[template] with a question -> the prompt's text. Images come first, numbered if there are
    several. An instruct prompt is the user's turn of the chat template, and opens the assistant's."""
    numbers = [f"Picture {i + 1}: " if num_images > 1 else "" for i in range(num_images)]
    images = "".join(number + IMAGE_TOKENS for number in numbers)
    text = images + TEMPLATES[template].format(question=question)
    if template.startswith("base"):
        return text
    turn = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def row_text(row, template, tokenizer):
    """A data row -> its prompt's text."""
    question = build_question(row["question"], row["options"])
    return render(question, len(row["images"] or []), template, tokenizer)


def draw_batch(run, cfg, step):
    """This process's B of the step's questions -> their numbers in the data, their rows (dicts), their
    prompts' texts, and the passes in which they run through the model. A pass (`build_prompts`) is n prompts:
    input_ids (n, P), padded on the right; lengths (n,); position_ids (3, n, P); next_position (n,), where the
    completion begins; the pixels; first, the number of its first prompt."""
    B, rank = cfg.prompts_per_step // run.accelerator.num_processes, run.accelerator.process_index
    numbers = run.data.draw(cfg.seed, step * cfg.prompts_per_step + rank * B, B)
    rows = [run.data[number] for number in numbers]
    texts = [row_text(row, run.template, run.tokenizer) for row in rows]
    images = [row["images"] for row in rows]
    n = max(1, cfg.encode_tokens // cfg.max_prompt_length)  # no prompt is longer, so a pass has a bound
    passes = [build_prompts(texts[i:i + n], images[i:i + n], run.tokenizer, run.image_processor, run.sampler,
                            first=i) for i in range(0, B, n)]
    return SimpleNamespace(numbers=numbers, rows=rows, texts=texts, passes=passes)


# ---- Step 2: run images and prompts through the model once, and branch off G completions -----------------

def encode(model, prompts):
    """A pass (`build_prompts`) -> what it leaves in each layer, [keys of layer 0, values of layer 0, ...],
    each (n, kv_heads, P - 1, head_dim). The last prompt token is left out. It becomes the first input of each
    completion, and its output predicts the first completion token. Of the others only keys and values count.
    Images go through the image tower, whose output takes the places of the image tokens. Padding needs no
    mask here: attention is causal, so nothing that counts sees what is on its right."""
    layers = [PromptLayer() for _ in range(model.config.text_config.num_hidden_layers)]
    model.model(input_ids=prompts.input_ids[:, :-1], position_ids=prompts.position_ids[:, :, :-1],
                pixel_values=prompts.pixel_values, image_grid_thw=prompts.image_grid_thw,
                past_key_values=Cache(layers=layers))
    return [x for layer in layers for x in (layer.keys, layer.values)]


def token_logps(model, hidden, temperature):
    """(..., H) hidden states -> (..., V) log-probabilities. Sampling and scoring share the temperature (which
    the paper's code ignores when scoring) and `model.suppressed`, (V,) bool, the tokens that are never drawn.
    Otherwise the policy that is trained would not be the one whose samples were rewarded."""
    logits = model.lm_head(hidden)
    # in place: with 151,936 tokens in the vocabulary these are the largest tensors of all
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)
    # the smallest finite number, not -inf: p * log p must be 0 in the entropy, not nan
    return logits.masked_fill_(model.suppressed, torch.finfo(logits.dtype).min).log_softmax(-1)


@dataclass
class Rollout:
    """G completions of each prompt, prompt-major."""
    completion_ids: torch.Tensor   # (N, C) padded on the right
    completion_mask: torch.Tensor  # (N, C) bool, True up to the end token, which counts: it was chosen too
    sampling_logps: torch.Tensor   # (N, C) log-probability of each token when it was drawn
    finished: torch.Tensor         # (N,) bool, False if cut off at the limit
    texts: Optional[list] = None   # N str, what the completions say
    lengths = property(lambda self: self.completion_mask.sum(1))  # (N,) tokens


@torch.no_grad()
def sample(model, passes, num_generations, limit, temperature, generator=None):
    """Draw G completions of at most `limit` tokens for each prompt -> Rollout. temperature 0: greedy."""
    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa")  # which takes the decoder's mask
    decoder = Decoder(model, passes, num_generations, limit)
    ends = torch.tensor(model.eos_ids, device=model.device)
    N, dtype = len(decoder.rows), torch.promote_types(model.dtype, torch.float32)
    completion_ids = torch.full((N, limit), model.eos_ids[0], device=model.device)                # (N, limit)
    sampling_logps = torch.zeros((N, limit), dtype=dtype, device=model.device)                    # (N, limit)
    for t in range(limit):
        rows = decoder.rows                              # (L,) of the N rows, those that are still decoded
        logps = token_logps(model, decoder.step(), temperature or 1.0)                            # (L, V)
        if temperature > 0:
            # the token at which the sum of the probabilities passes u, uniform in [0, 1); in float64, because
            # 150,000 unlikely tokens add up to something, and float32 would round them away
            cumulative = logps.to(torch.float64, copy=True).exp_().cumsum(-1)                     # (L, V)
            u = torch.rand(len(rows), 1, dtype=torch.float64, device=model.device, generator=generator)
            tokens = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)           # (L, 1)
        else:
            tokens = logps.argmax(-1, keepdim=True)                                               # (L, 1)
        if t == 0 and not logps.isfinite().all():
            fail("the model's output is not finite: its weights hold nan or inf. Start from another model.")
        completion_ids[rows, t] = tokens[:, 0]
        sampling_logps[rows, t] = logps.gather(-1, tokens)[:, 0]
        if not decoder.feed(tokens, torch.isin(tokens[:, 0], ends)):
            break
    model.set_attn_implementation(attention)
    # what a row says after its end token, until it leaves the decoder, does not count
    is_end = torch.isin(completion_ids, ends).int()                                               # (N, limit)
    completion_mask = is_end.cumsum(1) - is_end == 0                                              # (N, limit)
    C = int(completion_mask.sum(1).max())
    completion_ids.masked_fill_(~completion_mask, model.eos_ids[0])
    sampling_logps.masked_fill_(~completion_mask, 0.0)
    return Rollout(completion_ids[:, :C], completion_mask[:, :C], sampling_logps[:, :C], is_end.any(1))


def draw_completions(run, cfg, step, batch):
    """G completions of each prompt by the policy; in SFT (supervised fine-tuning) the data's -> Rollout."""
    if cfg.algorithm == "sft":
        rollout = given_completions(run, cfg, batch)
    else:
        seed = seeded(cfg.seed, "sample", step, run.accelerator.process_index).getrandbits(63)
        generator = torch.Generator(run.sampler.device).manual_seed(seed)
        rollout = sample(run.sampler, batch.passes, cfg.num_generations, cfg.max_completion_length,
                         cfg.temperature, generator)
    rollout.texts = [completion_text(batch.texts[i // cfg.num_generations], ids[mask], run.tokenizer)
                     for i, (ids, mask) in enumerate(zip(rollout.completion_ids, rollout.completion_mask))]
    return rollout


# ---- Step 3: the rewards, rules that judge text; there is no reward model to train or to fool ------------

ANSWER_BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
WELL_FORMED = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL)


def completion_text(prompt_text, completion_ids, tokenizer):
    """What the policy said, without end tokens. Where the prompt ends in <think>, it is put back here."""
    prefill = re.search(r"(<think>\s*)?$", prompt_text)[0]
    return prefill + tokenizer.decode(completion_ids, skip_special_tokens=True)


def extract_answer(text):
    """What is inside the one answer block; None if there is none, or several, or nothing in it.

    >>> extract_answer("<think> two chairs </think> <answer> 2 </answer>")
    '2'
    """
    blocks = ANSWER_BLOCK.findall(text)
    if len(blocks) != 1 or text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    return blocks[0].strip() or None


def normalise(text):
    text = " ".join(text.lower().split()).removeprefix("final answer:")  # Vision-R1's chains say so
    return text.removesuffix(".").strip()


def choose(answer, options):
    """-> the option that `answer` is, by its text or its letter, or None. Case, spaces, a final full stop and
    brackets around the letter are forgiven. Nothing is found inside other words or numbers.

    >>> choose("Left.", ["right", "left"]), choose("(b)", ["right", "left"]), choose("5", ["15", "3"])
    ('left', 'left', None)
    """
    if answer is None:
        return None
    answer, texts = normalise(answer), [normalise(option) for option in options or []]
    if answer in texts:
        return options[texts.index(answer)]
    letter = re.fullmatch(r"\(?([a-z])\)?", answer)
    return dict(zip("abcdefghijklmnopqrstuvwxyz", options or [])).get(letter[1]) if letter else None


def grade(answer, solution, options, choose=choose):
    """Does `answer` choose `solution` out of `options`, or is it its text? Evaluation's choose reads more."""
    return any(text is not None and normalise(text) == normalise(solution)
               for text in (answer, choose(answer, options)))


def accuracy_reward(completion, answer, options, template="base", **_):
    """1 if the one answer block chooses the right option, else 0. A block that says "..." chooses none.
    Under a direct template the whole completion is the answer."""
    said = completion if template.endswith("-direct") else extract_answer(completion)
    return float(grade(said, answer, options))


def format_reward(completion, **_):
    """1 if the completion is one think block and then one answer block that is not empty, no more; else 0.

    >>> format_reward("<think> hm </think> <answer> left </answer>"), format_reward("<answer> left </answer>")
    (1.0, 0.0)
    """
    one_think_block = completion.count("<think>") == completion.count("</think>") == 1
    one_answer_block = extract_answer(completion) is not None
    return float(one_think_block and one_answer_block and bool(WELL_FORMED.fullmatch(completion)))


def compute_rewards(names, texts, lengths, rows, template="base"):
    """Comma-separated names from REWARDS, N completions, their lengths in tokens (N,), the B data rows, each
    of which has N / B completions, and the name of the template -> {name: (N,) float32}."""
    rewards, G = {}, len(texts) // len(rows)
    rows = [{key: row[key] for key in row if key != "completion"} for row in rows]  # that column is for SFT
    for name in names.split(","):
        values = [REWARDS[name](text, num_tokens=int(length), template=template, **rows[i // G])
                  for i, (text, length) in enumerate(zip(texts, lengths, strict=True))]
        rewards[name] = torch.tensor(values, dtype=torch.float32)                                 # (N,)
        if not rewards[name].isfinite().all():
            fail(f"the reward {name} is not a finite float32 number for every completion")
    return rewards


# ---- Step 4: the advantages, each completion against its own group ---------------------------------------

def group_advantages(rewards, num_generations, scale_rewards=True):
    """(N,) rewards -> (N,) advantages A = (R - mean) / (std + 1e-4) per group, with the unbiased std.

    Subtracting the group's mean keeps the direction of the expected gradient and reduces its noise
    (DeepSeekMath, arXiv 2402.03300, 4.1.2; the 1e-4 is from the paper's code). scale_rewards=False leaves
    A = R - mean: a small std makes A large where nearly all are right, or wrong (Dr. GRPO, 2503.20783)."""
    if num_generations == 1:  # SFT: no siblings. With A = 1, step 6 follows the gradient of log pi
        return torch.ones_like(rewards)                                                           # (N,)
    R = rewards.view(-1, num_generations)                                                         # (B, G)
    # A = (R - mean(R)) / (std(R) + 1e-4)
    A = R - R.mean(1, keepdim=True)                                                               # (B, G)
    if scale_rewards:
        A = A / (R.std(1, keepdim=True) + 1e-4)                                                   # (B, G)
    has_spread = R.amax(1, keepdim=True) > R.amin(1, keepdim=True)  # std > 0 could be rounding     (B, 1)
    return torch.where(has_spread, A, 0.0).view(-1)                                               # (N,)


# ---- Step 5: the log-probability of each completion token ------------------------------------------------

def chosen_logps(model, hidden, tokens, temperature):
    """(T, H) hidden states and the (T,) tokens that followed them -> their log-probabilities and, without
    gradient, the entropy of the distributions that they were drawn from, each (T,)."""
    logps = token_logps(model, hidden, temperature)                                               # (T, V)
    with torch.no_grad():
        entropy = -logps.exp().mul_(logps).sum(-1)                                                # (T,)
    return logps.gather(-1, tokens[:, None])[:, 0], entropy


def score(model, prompts, prompt_kv, group, completion_ids, completion_mask, cfg):
    """Log-probabilities and entropy of K completions, each (K, C), 0 where masked.
    prompt_kv: from `encode`. group: (K,), which of the n prompts a row belongs to. A row sees the keys and
    values of its prompt, to which `PromptLayer` joins its own. transformers adds to the mask that no token
    sees what comes after it, so what pads a row on the right does no harm. The inputs begin with the last
    prompt token, whose position is one before next_position."""
    (K, C), P, device = completion_ids.shape, prompts.input_ids.shape[1], completion_ids.device
    last = prompts.lengths[group][:, None] - 1                                                    # (K, 1)
    inputs = torch.cat([prompts.input_ids[group].gather(1, last), completion_ids[:, :-1]], 1)     # (K, C)
    positions = prompts.next_position[group][:, None] - 1 + torch.arange(C, device=device)        # (K, C)
    is_prompt = torch.arange(P - 1, device=device) < last                                         # (K, P - 1)
    visible = torch.cat([is_prompt, torch.ones_like(completion_mask)], 1)                     # (K, P - 1 + C)
    layers = [PromptLayer(*kv, group) for kv in zip(prompt_kv[::2], prompt_kv[1::2])]
    hidden = model.model(input_ids=inputs, position_ids=positions.expand(3, K, C), attention_mask=visible,
                         past_key_values=Cache(layers=layers)).last_hidden_state                  # (K, C, H)
    # in pieces: with gradient_checkpointing, only 2048 tokens' log-probabilities exist at a time
    pieces = zip(hidden[completion_mask].split(2048), completion_ids[completion_mask].split(2048))
    call = partial(checkpoint, use_reentrant=False) if cfg.gradient_checkpointing else lambda f, *x: f(*x)
    found = [call(chosen_logps, model, *piece, cfg.temperature) for piece in pieces]
    logps, entropy = (torch.cat(parts) for parts in zip(*found))                                  # (T,)
    blank = torch.zeros(K, C, dtype=logps.dtype, device=device)
    return blank.masked_scatter(completion_mask, logps), blank.masked_scatter(completion_mask, entropy)


@torch.no_grad()
def score_by_reference(reference, passes, rollout, cfg):
    """-> (N, C) log-probabilities of the rollout by the reference. The policy's come with step 6."""
    ref_logps = torch.zeros_like(rollout.sampling_logps)                                          # (N, C)
    for prompts in passes:
        prompt_kv = reference(encode, prompts)
        for rows, group, ids, mask in chunks(prompts, rollout, cfg):
            # added, since a sharded run may yield a row a second time, fully masked
            ref_logps[rows, :ids.shape[1]] += reference(score, prompts, prompt_kv, group, ids, mask, cfg)[0]
    return ref_logps


# ---- Step 6: the loss, and its gradient ------------------------------------------------------------------

# What a token counts in the loss of a step, for each row (N,), from the rows' lengths (N,) and their limit.
LOSS_TYPES = {
    # mean over rows of mean over tokens: every row counts the same, so a token of a long row counts less
    "grpo": lambda lengths, limit: 1 / (len(lengths) * lengths),
    # sum over tokens / a constant, which favours no length (Dr. GRPO, arXiv 2503.20783)
    "dr_grpo": lambda lengths, limit: torch.full_like(lengths, 1 / (len(lengths) * limit)),
    # mean over all tokens of the step, as in TRL (DAPO, arXiv 2503.14476: over all tokens of a group)
    "dapo": lambda lengths, limit: torch.full_like(lengths, 1 / lengths.sum()),
}


def weigh_tokens(lengths, finished, cfg):
    """(N,) lengths, (N,) bool -> (N,) the weight of a token of each row."""
    kept = finished if cfg.mask_truncated_completions else torch.ones_like(finished)
    # a row that is not kept has no tokens and no weight; 1e-9 only keeps the division finite
    lengths = (lengths.double() * kept).clamp(min=1e-9)
    return LOSS_TYPES[cfg.loss_type](lengths, cfg.max_completion_length) * kept


def grpo_loss(per_token_logps, old_per_token_logps, ref_per_token_logps, advantages, token_weights,
              completion_mask, epsilon, epsilon_high, beta):
    """The loss of K of the step's rows (arXiv 2402.03300, eq. 3), and for the log kl and where the clip acts,
    (K, C). *_logps, completion_mask: (K, C); advantages, token_weights: (K,).

    Why it teaches: the expected reward is the sum over completions of pi(completion) R. The gradient of pi is
    pi * gradient of log pi. So the reward grows along the mean, over samples of pi, of R * gradient of log
    pi. A in place of R has less noise. While pi is pi_old, the ratio is 1 and its gradient is that of log pi:
    every token is pushed up or down by its A. A further update on the same rollout (num_iterations > 1) has
    samples of pi_old, a policy of the past. The ratio corrects for that while it is near 1. Hence the clip: a
    token that has moved by epsilon in the direction of its A is pushed no further. And hence the min: one
    that has moved the other way is still pushed."""
    A = advantages[:, None]                                                                       # (K, 1)
    # ratio = pi / pi_old
    ratio = (per_token_logps - old_per_token_logps).exp()                                         # (K, C)
    # -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A)
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))   # (K, C)
    per_token_loss = -torch.min(ratio * A, clipped * A)                                           # (K, C)
    # kl = pi_ref / pi - log(pi_ref / pi) - 1 ("k3"). Over tokens drawn from pi its mean is KL(pi || pi_ref),
    # and it is never negative, as exp(x) >= x + 1. The mean of its gradient is that of KL(pi_ref || pi)
    kl = torch.zeros_like(ratio)
    if beta > 0:
        log_ref_over_pi = ref_per_token_logps - per_token_logps                                   # (K, C)
        kl = log_ref_over_pi.exp() - log_ref_over_pi - 1                                          # (K, C)
        per_token_loss = per_token_loss + beta * kl                                               # (K, C)
    # loss = sum over rows of token_weights * sum over tokens; LOSS_TYPES has the weights
    per_row = (per_token_loss * completion_mask).sum(1)                                           # (K,)
    return (per_row * token_weights).sum(), kl.detach(), clipped * A < ratio * A


def update(policy, passes, rollout, advantages, token_weights, ref_logps, old_logps, cfg):
    """Leave the gradient of the step's loss in the policy, by a backward in two stages:

    1. Chunk by chunk, completions run forward on top of the prompts' keys and values, detached, and backward.
       That leaves the completions' part of the gradient on the weights. The prompts' part stops at the
       detached keys and values, where it adds up over the chunks. Each chunk's graph is freed at once.
    2. One backward carries that sum on, through prompts and image tower, to the weights.

    This is the chain rule, cut at the keys and values, and exact. Memory holds the graph of one pass and of
    one chunk. Both have a budget, so it grows neither with B nor with G.

    advantages, token_weights: (N,). ref_logps, old_logps: (N, C). old_logps is None where pi_old is pi. (The
    sampler's rounding would look like a ratio.) Returns log-probabilities (N, C), and sums to log."""
    logps = torch.zeros_like(rollout.sampling_logps)                                              # (N, C)
    sums = dict.fromkeys(("loss", "entropy", "kl", "clip_ratio"), 0.0)
    for prompts in passes:
        prompt_kv = policy(encode, prompts)
        # the sum over chunks is kept in float32, whatever the keys and values are computed in
        leaves = [x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
                  for x in prompt_kv]                                # each (n, kv_heads, P - 1, head_dim)
        for rows, group, ids, mask in chunks(prompts, rollout, cfg):
            C = ids.shape[1]
            leaf_kv = [leaf.to(x.dtype) for leaf, x in zip(leaves, prompt_kv)]  # freed with the chunk's graph
            pi, entropy = policy(score, prompts, leaf_kv, group, ids, mask, cfg)                  # (K, C)
            pi_old = pi.detach() if old_logps is None else old_logps[rows, :C]                    # (K, C)
            pi_ref = ref_logps[rows, :C] if cfg.beta > 0 else None                                # (K, C)
            loss, kl, is_clipped = grpo_loss(pi, pi_old, pi_ref, advantages[rows], token_weights[rows], mask,
                                             cfg.epsilon, cfg.epsilon_high, cfg.beta)
            loss.backward()                                                                       # stage 1
            logps[rows, :C] += pi.detach()
            found = dict(loss=loss, entropy=entropy, kl=kl * mask, clip_ratio=is_clipped * mask)
            sums = {name: sums[name] + found[name].sum().item() for name in sums}
        if prompt_kv[0].requires_grad:  # with --freeze llm, prompts without an image have nothing to train
            gradients = [leaf.grad.to(x.dtype) for x, leaf in zip(prompt_kv, leaves)]
            torch.autograd.backward(prompt_kv, gradients)                                         # stage 2
    return logps, sums


def optimise(run, cfg, step, passes, rollout, advantages, ref_logps):
    """num_iterations updates of the weights -> sums over tokens and the gradient's norm, to log. An update
    whose norm is not finite leaves the weights as they are, and is the last."""
    accelerator, processes = run.accelerator, run.accelerator.num_processes
    weights = weigh_tokens(accelerator.gather(rollout.lengths), accelerator.gather(rollout.finished), cfg)
    own = weights.chunk(processes)[accelerator.process_index]  # those of this process's rows
    token_weights = processes * own.float()  # because the gradients of the processes are averaged  (N,)
    advantages = advantages.to(token_weights.device)                                              # (N,)
    decay = 1 - step / cfg.max_steps if cfg.lr_scheduler_type == "linear" else 1
    run.optimizer.param_groups[0]["lr"] = cfg.learning_rate * decay
    old_logps = None  # in the first update pi_old is pi itself
    for _ in range(cfg.num_iterations):
        logps, sums = update(run.policy, passes, rollout, advantages, token_weights, ref_logps, old_logps,
                             cfg)                                                                 # (N, C)
        old_logps = logps if old_logps is None else old_logps                                     # (N, C)
        sums["grad_norm"] = step_optimizer(run, cfg)
        if not math.isfinite(sums["grad_norm"]):
            break
    sums["nll"] = -old_logps.sum().item()  # before the update
    mismatch = ((old_logps - rollout.sampling_logps) * rollout.completion_mask).abs()             # (N, C)
    return sums | dict(mismatch=mismatch.sum().item(), mismatch_max=mismatch.max().item())


# ==== The algorithm ends here. What follows is the machine that it runs on ================================

# ---- Prompts as the model takes them, and chunks of rows -------------------------------------------------

def build_prompts(texts, images, tokenizer, image_processor, model, first=0):
    """n texts from `render`, n lists of PIL images, which may be empty -> a pass (see `draw_batch`), on the
    model's device. Positions are M-RoPE's (multimodal rotary position embedding), in time, height and width.
    They are equal for text, and h x w image tokens advance what follows by max(h, w)."""
    flat, tokens = list(itertools.chain(*images)), iter(())
    pixels = dict(pixel_values=None, image_grid_thw=None)
    if flat:
        pixels = image_processor(images=flat, return_tensors="pt").to(model.device)
        tokens = iter((pixels["image_grid_thw"].prod(-1) // image_processor.merge_size**2).tolist())
    texts = [re.sub(r"<\|image_pad\|>", lambda pad: pad[0] * next(tokens), text) for text in texts]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(model.device)
    is_image = (batch.input_ids == model.config.image_token_id).int()                             # (n, P)
    position_ids, _ = model.model.get_rope_index(
        batch.input_ids, mm_token_type_ids=is_image, image_grid_thw=pixels["image_grid_thw"],
        attention_mask=batch.attention_mask)                                                      # (3, n, P)
    return SimpleNamespace(input_ids=batch.input_ids, lengths=batch.attention_mask.sum(1), first=first,
                           position_ids=position_ids, next_position=position_ids.amax((0, 2)) + 1, **pixels)


def chunks(prompts, rollout, cfg):
    """The rows of a pass in chunks, short ones first; a chunk is one row, or rows * longest <= score_tokens.
    Rows of several groups may meet. Yields their numbers in the rollout (K,), which of the n prompts each
    belongs to (K,), completion_ids and completion_mask (K, C)."""
    G, lengths, found = cfg.num_generations, rollout.lengths.tolist(), []
    first = prompts.first * G
    for row in sorted(range(first, first + len(prompts.lengths) * G), key=lengths.__getitem__):
        if found and (len(found[-1]) + 1) * lengths[row] <= cfg.score_tokens:
            found[-1].append(row)
        else:
            found.append([row])
    # a sharded forward needs every process: one with fewer chunks adds some of one row without tokens
    missing = max(gather_object([len(found)])) - len(found)
    for chunk, counts in [(chunk, True) for chunk in found] + missing * [(found[0][:1], False)]:
        rows = torch.tensor(chunk, device=rollout.completion_ids.device)                          # (K,)
        C = max(lengths[row] for row in chunk)
        mask = rollout.completion_mask[rows, :C] & counts
        yield rows, rows // G - prompts.first, rollout.completion_ids[rows, :C], mask


# ---- Decoding --------------------------------------------------------------------------------------------

class PromptLayer(DynamicLayer):
    """A layer of the cache. Encoding keeps the keys and values that it is given. Scoring joins the prompts'
    and the new ones, and keeps nothing: checkpointing calls it twice. group: (K,), each row's prompt."""
    def __init__(self, keys=None, values=None, group=None):
        super().__init__()
        self.keys, self.values, self.group, self.is_initialized = keys, values, group, keys is not None

    def update(self, keys, values, *args, **kwargs):
        if self.group is not None:
            return tuple(torch.cat([prompts[self.group], new], 2)
                         for prompts, new in ((self.keys, keys), (self.values, values)))
        if self.keys is None:
            self.keys, self.values = keys, values
        return keys, values


class Decoder:
    """N rows on their way through the completion, one token further at each `step`. A row of the cache:

        [ prompt without its last token | padding | last prompt token, c_1, c_2, ... | not yet written ]

    All of it takes part in every step, behind a mask, so that no shape changes. So a GPU can record the step
    as a CUDA graph and replay it: launching its thousand kernels one by one takes longer than they run."""
    def __init__(self, model, passes, num_generations, room):
        encoded, self.model, self.graph = [encode(model, prompts) for prompts in passes], model, None
        longest = max(prompt_kv[0].shape[2] for prompt_kv in encoded)                             # P - 1
        room += 8 - (longest + room) % 8  # a GPU copies a mask at each use, if its rows are no multiple of 8
        repeat = lambda parts: torch.cat(parts).repeat_interleave(num_generations, 0)
        pad = lambda x: nn.functional.pad(x, (0, 0, 0, longest - x.shape[2]))
        kv = (repeat([pad(x) for x in parts]) for parts in zip(*encoded))     # (N, kv_heads, P - 1, head_dim)
        self.layers = [StaticLayer(longest + room) for _ in encoded[0][::2]]
        for layer in self.layers:
            layer.update(next(kv), next(kv))
        lengths = repeat([prompts.lengths for prompts in passes])[:, None]                        # (N, 1)
        self.tokens = repeat([p.input_ids.gather(1, p.lengths[:, None] - 1) for p in passes])     # (N, 1)
        self.positions = repeat([prompts.next_position for prompts in passes])[:, None] - 1       # (N, 1)
        self.place = torch.tensor([longest], device=model.device)  # where the next keys and values go
        places = torch.arange(longest + room, device=model.device)
        seen = (places < lengths - 1) | (places == longest)                              # (N, longest + room)
        mask = torch.full(seen.shape, torch.finfo(model.dtype).min, dtype=model.dtype, device=model.device)
        self.mask = mask.masked_fill_(seen, 0)[:, None, None]                      # (N, 1, 1, longest + room)
        self.rows = torch.arange(len(seen), device=model.device)                                  # (N,)
        self.running = self.rows >= 0                                                             # (N,)

    def step(self):
        """-> (L, H) hidden states, after which the next token is to be drawn."""
        if self.model.device.type != "cuda":
            return self.forward()
        if self.graph is None:
            self.forward()  # libraries set themselves up on first use, outside the recording
            for layer in self.layers:
                layer.cumulative_length.copy_(self.place[0])  # the replay writes over what this has written
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may go on
                self.hidden = self.forward()
        self.graph.replay()
        return self.hidden

    def forward(self):
        output = self.model.model(input_ids=self.tokens, position_ids=self.positions.expand(3, -1, -1),
                                  past_key_values=Cache(layers=self.layers), attention_mask=self.mask)
        return output.last_hidden_state[:, -1]

    def feed(self, tokens, ended):
        """tokens: (L, 1), which the next step takes in. ended: (L,) bool. -> Is a row left? Those that have
        ended leave when they are a tenth; on a GPU, half, as a graph must be recorded anew."""
        self.tokens.copy_(tokens)
        self.positions += 1
        self.place += 1
        self.mask.index_fill_(3, self.place, 0)
        self.running &= ~ended
        left = int(self.running.sum())
        if 0 < left <= (0.5 if self.graph else 0.9) * len(self.rows):
            keep, self.graph = self.running, None
            self.rows, self.tokens, self.positions, self.mask, self.running = (
                x[keep] for x in (self.rows, self.tokens, self.positions, self.mask, self.running))
            for layer in self.layers:
                layer.keys, layer.values = layer.keys[keep], layer.values[keep]
        return left > 0


# ---- Supervised fine-tuning, and more rewards ------------------------------------------------------------

def given_completions(run, cfg, batch):
    """SFT: the data's completions, or else its answers, stand where the samples would -> Rollout."""
    texts, eos = [row.get("completion") or row["answer"] for row in batch.rows], run.tokenizer.eos_token
    for i, prompt in enumerate(batch.texts):
        if prefill := re.search(r"<think>(\s*)$", prompt):
            texts[i] = texts[i].removeprefix("<think>").removeprefix(prefill[1])
    given = run.tokenizer([text + eos for text in texts], padding=True, padding_side="right", truncation=True,
                          max_length=cfg.max_completion_length, return_tensors="pt").to(run.sampler.device)
    ids, mask = given.input_ids, given.attention_mask.bool()                                      # (N, C)
    finished = ids.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0] == run.tokenizer.eos_token_id   # (N,)
    return Rollout(ids, mask, torch.zeros(ids.shape, device=ids.device), finished)


def math_reward(completion, answer, **_):
    """1 if the last answer block, or else the whole text, equals the solution as mathematics, by the library
    math-verify and within its time limits. A block of several numbers is no answer."""
    try:
        from math_verify import parse, verify
    except ImportError:
        fail("the reward math needs the library math-verify: pip install math-verify")
    signs = {"°": "^\\circ ", "π": "\\pi ", "√": "\\sqrt ", "×": "\\times ", "−": "-", "²": "^2", "$": ""}

    def read(text, in_block=True):
        for sign, latex in signs.items():
            text = text.replace(sign, latex)
        text = re.sub(r"^\s*final answer\s*:|(?<=\d),(?=\d{3}\b)", "", text, flags=re.IGNORECASE)
        several = in_block and len(set(re.findall(r"\d+\.?\d*", text))) > 1
        return parse(f"${text.strip().removesuffix('.')}$") + ([] if several else parse(text))

    blocks = ANSWER_BLOCK.findall(completion)
    return float(verify(read(answer), read(blocks[-1]) if blocks else read(completion, in_block=False)))


def hard_reward(completion, options, **row):
    """1 only if form and answer are both right (Vision-R1's HFRRF, arXiv 2503.06749, section 3.3)."""
    right = accuracy_reward if options else math_reward
    return format_reward(completion) * right(completion, options=options, **row)


# name -> function(completion, num_tokens, template, **columns of the data row) -> float
REWARDS = {"accuracy": accuracy_reward, "format": format_reward, "hard": hard_reward, "math": math_reward,
           "length": lambda completion, num_tokens, **_: 0.001 * num_tokens}


# ---- Models ----------------------------------------------------------------------------------------------

def load_processors(path, max_pixels=None):
    """-> tokenizer, image processor: PIL's, which needs no torchvision. max_pixels None: as the files say."""
    limits = {"max_pixels": max_pixels} if max_pixels else {}
    try:
        return AutoTokenizer.from_pretrained(path), Qwen2VLImageProcessorPil.from_pretrained(path, **limits)
    except (OSError, ValueError) as error:
        fail(f"{path} lacks config.json, tokenizer or image processor: {str(error).strip().splitlines()[0]}")


def load_model(path, tokenizer, attn_implementation="sdpa", dtype=torch.float32):
    """Folder or hub id -> a Qwen-VL, with two attributes more. suppressed, (V,) bool: vision tokens, which
    are no text, and vocabulary rows without a token. eos_ids: what ends a completion, the tokenizer's own
    first."""
    try:
        kind = AutoConfig.from_pretrained(path).model_type
        if kind not in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
            fail(f"{path} is a {kind} model. This program trains Qwen2-VL, Qwen2.5-VL and Qwen3-VL.")
        model, report = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True)
    except (OSError, ImportError, ValueError, SafetensorError) as error:
        fail(f"cannot load a model from {path}: {str(error).strip().splitlines()[0]}")
    if report["missing_keys"]:
        fail(f"{path} is not a whole model: its files lack {sorted(report['missing_keys'])[0]}")
    suppressed = torch.arange(model.lm_head.out_features) >= len(tokenizer)                       # (V,)
    vision = [f"<|{name}|>" for name in "vision_start vision_end vision_pad image_pad video_pad".split()]
    suppressed[tokenizer.convert_tokens_to_ids(vision)] = True
    model.register_buffer("suppressed", suppressed, persistent=False)
    ends = [tokenizer.eos_token, *(x for x in ("<|endoftext|>", "<|im_end|>") if x in tokenizer.get_vocab())]
    model.eos_ids = tokenizer.convert_tokens_to_ids(list(dict.fromkeys(ends)))
    return fast_vision(model).eval()


def fast_vision(model):
    """Make two parts of the image tower faster, with the same weights. Returns the model."""
    def embed_patches(self, pixels):
        """A matrix product: this convolution's kernel and stride are the patch. Conv3d's backward is slow."""
        weight = self.proj.weight.flatten(1)                                       # (dim, numbers of a patch)
        return nn.functional.linear(pixels.to(weight.dtype), weight, self.proj.bias)          # (patches, dim)

    def attend(self, hidden, cu_seqlens, position_embeddings, **_):
        """All windows (or images) of equal length in one call, where transformers makes one for each."""
        qkv = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1))               # (patches, 3, heads, dim)
        q, k = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], *position_embeddings)
        lengths, output = cu_seqlens.diff(), torch.empty_like(q)
        for length in lengths.unique().tolist():
            index = cu_seqlens[:-1][lengths == length, None] + torch.arange(length, device=q.device)
            parts = (x[index].transpose(1, 2) for x in (q, k, qkv[:, 2]))     # (windows, heads, length, dim)
            output[index] = nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2)
        return self.proj(output.flatten(1))                                                   # (patches, dim)

    visual = model.model.visual  # methods, not functions: a deepcopy of the model will use its own weights
    visual.patch_embed.forward = MethodType(embed_patches, visual.patch_embed)
    for block in visual.blocks:
        block.attn.forward = MethodType(attend, block.attn)
    return model


def set_threads(model):
    """A second thread only waits for a model like the toy's. Set here, every launcher gives the same bits."""
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(max(1, cores) if model.num_parameters() > 1e7 else 1)


def choose_prompt(tokenizer, prompt="auto"):
    """-> name of a template. auto: instruct if the chat template knows roles, else base."""
    has_roles = "role" in (tokenizer.chat_template or "")
    if prompt.startswith("instruct") and not has_roles:
        fail(f"--prompt {prompt}: the model has no chat template with roles. Leave it out.")
    return prompt if prompt != "auto" else "instruct" if has_roles else "base"


class Policy(nn.Module):
    """Calls the model only through `forward`, where FSDP's hooks run."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *arguments):
        return function(self.model, *arguments)


def checkpoint_layers(model):
    """Recompute each layer in the backward. transformers' own switch would disable the cache."""
    def forward(layer_forward, *args, **kwargs):
        if torch.is_grad_enabled():
            return checkpoint(layer_forward, *args, **kwargs, use_reentrant=False, preserve_rng_state=False)
        return layer_forward(*args, **kwargs)

    for layer in [*model.model.language_model.layers, *model.model.visual.blocks]:
        layer.forward = partial(forward, layer.forward)


def freeze(model, part):
    """part: "vision", "llm" or "none"."""
    towers = dict(vision=[model.model.visual], llm=[model.model.language_model, model.lm_head])
    for tower in towers.get(part, []):
        tower.requires_grad_(False)  # called; the paper's code assigns to the name, which freezes nothing


def compute_dtype(device):
    """What models compute in: float32 on a CPU; on a GPU bfloat16, which has float32's range."""
    if device.type == "cpu":
        return torch.float32
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        fail("this GPU cannot compute in bfloat16. Take an Ampere or newer one, or a CPU (ACCELERATE_USE_CPU=1).")
    return torch.bfloat16


def build_models(run, cfg, start):
    """Load a folder or hub id `start` into the models of `run`:

    master     the float32 weights that AdamW moves: bf16 would round away updates of 1e-6
    sampler    a plain model with these weights, in `compute_dtype`, which writes the completions
    policy     what is scored and differentiated. One process: the sampler itself, so that what samples is what
               is trained. Several: master, sharded, whose layers compute in `compute_dtype`
    reference  the model before training, in `compute_dtype`; None if beta is 0

    One process on a CPU: master, sampler and policy are one model. On a GPU master never runs, and with
    cpu_offload it is in CPU memory."""
    device, sharded = run.accelerator.device, run.accelerator.num_processes > 1
    dtype, run.sums = compute_dtype(device), []
    load = lambda path, dtype: load_model(path, run.tokenizer, cfg.attn_implementation, dtype)
    run.master = Policy(load(start, torch.float32).to("cpu" if cfg.cpu_offload else device))
    set_threads(run.master.model)
    separate = sharded or dtype != torch.float32
    run.sampler = load(start, dtype).to(device) if separate else run.master.model
    run.policy = run.master if sharded else Policy(run.sampler)
    run.reference = Policy(load(cfg.model_name_or_path, dtype).to(device)) if cfg.beta else None
    for model in run.master.model, run.sampler:
        freeze(model, cfg.freeze)
    if separate and not sharded:
        run.sums = sum_gradients(run.sampler, run.master)
    if cfg.gradient_checkpointing:
        checkpoint_layers(run.policy.model)


# ---- The float32 weights: on one GPU beside the model, with several processes sharded (FSDP2) ------------

# cuDNN's attention sets up again for each shape, and its masked gradients can be nan (pytorch 196678)
torch.backends.cuda.enable_cudnn_sdp(False)


def make_accelerator(cfg):
    """-> Accelerator, with the process group that sharding needs."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        fail("ACCELERATE_USE_DEEPSPEED is set. This program shards by FSDP2: unset it, or start by python.")
    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
        # gloo on GPUs too: offloaded gradients are clipped on the CPU
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                                             timeout=timedelta(hours=2))
    accelerator = Accelerator(mixed_precision="no", cpu=not on_gpu)  # not a Mac's "mps"
    if cfg.prompts_per_step % accelerator.num_processes:
        fail(f"{accelerator.num_processes} processes cannot share --prompts_per_step {cfg.prompts_per_step}")
    return accelerator


def shard(run, cfg):
    """Fully sharded data parallel: weights, gradients and optimizer state, in float32, over the processes.
    Layers compute in `compute_dtype`; gradients are summed in float32. (accelerate's "bf16" sums in bf16.)"""
    state, on_gpu = run.accelerator.state, run.accelerator.device.type == "cuda"
    dtype = compute_dtype(run.accelerator.device)
    dtypes = dict(param_dtype=dtype, reduce_dtype=torch.promote_types(dtype, torch.float32))
    state.distributed_type = DistributedType.FSDP  # by hand: accelerate's argument would give a CPU DDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
        transformer_cls_names_to_wrap=sorted(run.master.model._no_split_modules),
        mixed_precision_policy=MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False),
        cpu_offload=CPUOffloadPolicy(pin_memory=on_gpu) if cfg.cpu_offload else False)

    def lead_on(module, inputs, output):
        """FSDP gathers a layer's weights for its backward when the gradient of its output arrives. Of encoded
        prompts only keys and values count, and the last layer's output leads nowhere: a zero of it joins."""
        last = output.past_key_values.layers[-1]
        if isinstance(last, PromptLayer) and last.group is None:
            last.values = last.values + 0 * output.last_hidden_state[0, 0, 0]

    run.master.model.model.language_model.register_forward_hook(lead_on)
    run.master, optimizer = run.accelerator.prepare(run.master, run.optimizer)
    run.policy, run.optimizer = run.master, optimizer.optimizer  # unwrapped, for torch.distributed.checkpoint


def sum_gradients(model, master):
    """Sum the gradients of several backwards in float32, where master's weights are: when a backward leaves a
    gradient on a weight of `model`, add it to that weight's sum and free it. The sums, and for offloading one
    pinned buffer, are allocated once. -> list of (weight of master, its sum)."""
    pairs = zip(model.parameters(), master.parameters(), strict=True)
    trained = [(weight, own) for weight, own in pairs if weight.requires_grad]
    sums, buffer = [(own, torch.zeros_like(own)) for _, own in trained], None
    if model.device != sums[0][1].device:
        buffer = torch.empty(max(total.numel() for _, total in sums), pin_memory=True)

    def add(total, weight):
        gradient, weight.grad = weight.grad.to(total.dtype), None
        if buffer is not None:
            gradient = buffer[:gradient.numel()].view_as(gradient).copy_(gradient)
        total += gradient

    for (weight, _), (_, total) in zip(trained, sums):
        weight.register_post_accumulate_grad_hook(partial(add, total))
    return sums


def step_optimizer(run, cfg):
    """Clip the gradient, move the float32 weights and copy them into the sampler -> the gradient's norm before
    clipping. If it is not finite the weights stay as they are."""
    for weight, total in run.sums:
        weight.grad = total
    norm = nn.utils.clip_grad_norm_(run.master.parameters(), cfg.max_grad_norm or math.inf)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if math.isfinite(norm):
        run.optimizer.step()
    # to None: torch.distributed.checkpoint finds no AdamW state where a weight has a gradient
    run.optimizer.zero_grad()
    for _, total in run.sums:
        total.zero_()
    refresh(run.sampler, run.master)
    return norm


@torch.no_grad()
def refresh(sampler, master):
    """Copy the float32 weights, sharded or not, into the sampler, which may round them to bf16."""
    for copy, weight in zip(sampler.parameters(), master.parameters(), strict=True):
        if isinstance(weight, DTensor):
            weight = weight.to(copy.device).full_tensor()
        if copy is not weight:
            copy.copy_(weight)


# ---- Small things, and the files of a run ----------------------------------------------------------------

def fail(message):
    """Stop with one sentence (exit code 1) where a traceback would tell the user nothing more."""
    raise SystemExit(f"error: {message}")


def now():
    """Seconds, when a GPU has done all that it was given, so that each phase is charged with its own work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seeded(*key):
    """random.Random of `key` alone, say (seed, "sample", step, rank): a resumed run has nothing to replay."""
    return random.Random("/".join(map(str, key)))


def checkpoints(output_dir):
    """-> its complete checkpoint-N folders, oldest first; `save` gives them the name when they are."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def training_state(run):
    """What resuming needs, for torch.distributed.checkpoint: the float32 weights and AdamW's state."""
    weights = get_model_state_dict(run.master)
    if run.sampler.config.tie_word_embeddings:
        del weights["model.lm_head.weight"]  # the same as the embedding
    return {"weights": weights, "optimizer": get_optimizer_state_dict(run.master, run.optimizer)}


def disk_needed(cfg, parameters, bytes_per_weight, done=0, saved=0):
    """Bytes that a run will add to its folder from `done` steps and `saved` checkpoints on -> while it saves
    its last checkpoint, and when it has ended. A checkpoint is a model; the newest holds state/ too, and the
    one before loses its own after that. final/ is one more model."""
    ahead = -(-cfg.max_steps // cfg.save_steps) - done // cfg.save_steps
    models = min(saved + ahead, cfg.save_total_limit or math.inf) - saved + 1
    model, state = bytes_per_weight * parameters, 12 * parameters  # float32 weights and AdamW's two moments
    return models * model + (min(2, bool(saved) + ahead) - bool(saved)) * state, models * model + (not saved) * state


def check_disk(run, cfg, done):
    """Stop if the disk has less room than the run will take."""
    folder = Path(cfg.output_dir or RUNS)
    needed, _ = disk_needed(cfg, run.sampler.num_parameters(), run.sampler.dtype.itemsize, done,
                            len(checkpoints(folder)))
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if needed > free:
        fail(f"the checkpoints will take {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB left. Make "
             "room, or lower --save_total_limit, or choose another --output_dir.")


def save(folder, run, with_state=False):
    """Write the model as a folder for `from_pretrained` and, in state/, what resuming needs. The folder gets
    its name when it is complete. After that, older checkpoints lose their state/."""
    is_main, temporary = run.accelerator.is_main_process, folder.with_name(folder.name + ".tmp")
    try:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed while it saved
            for part in run.sampler, run.tokenizer, run.image_processor:
                part.save_pretrained(temporary)
        run.accelerator.wait_for_everyone()
        if with_state:
            distributed_checkpoint.save(training_state(run), checkpoint_id=temporary / "state")
    # what a full disk raises in python, torch, safetensors and torch's checkpoints
    except (OSError, RuntimeError, SafetensorError, distributed_checkpoint.api.CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        fail(f"{folder} could not be saved: {str(error).strip().splitlines()[-1]}. Earlier ones are whole. "
             f"Make room, then --resume --output_dir {run.output_dir}")
    run.accelerator.wait_for_everyone()
    if is_main:
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        for old in checkpoints(run.output_dir)[:-1]:
            shutil.rmtree(old / "state", ignore_errors=True)
        for old in checkpoints(run.output_dir)[:-(run.cfg.save_total_limit or 10**9)]:
            shutil.rmtree(old)


def is_used(folder):  # a lock may be left of a run that was killed before it began
    return folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir())


def claim(cfg):
    """-> the run's folder, and a lock on it that is held as long as this process lives. Without --resume the
    folder was empty before: of two runs that start at once, each gets its own."""
    for n in itertools.count(1):
        folder = Path(cfg.output_dir or RUNS / (cfg.preset if n == 1 else f"{cfg.preset}-{n}"))
        lock = FileLock(folder / ".lock", blocking=False, is_singleton=True)  # a notebook may call main again
        if cfg.resume or not is_used(folder):
            with suppress(OSError):  # which filelock's Timeout is, too
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire()
        if lock.is_locked and (cfg.resume or not is_used(folder)):
            return folder, lock
        lock.release()
        if cfg.output_dir or n == 999:
            fail(f"--output_dir {folder} is not empty, in use or not writable. Choose another, or --resume.")


# ---- Settings --------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
TOY, RUNS = HERE / "toy", HERE / "runs"


def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """The defaults are the paper's recipe. A preset, the run to resume and the command line overrule them."""
    # what to train, on what
    preset: Literal["toy", "sat", "sat-sft", "vision-r1"] = setting("toy", "a task with its settings")
    model_name_or_path: str = setting("Qwen/Qwen2-VL-2B", "model to start from: a folder or a hub id")
    data: str = setting(f"{HERE}/data/sat", "Parquet file from prepare_sat.py, or folder with train.parquet")
    output_dir: Optional[str] = setting(None, "folder of the run; default: runs/PRESET, or runs/PRESET-2 ...")
    resume: bool = setting(False, "go on from output_dir's last checkpoint, with its settings")
    seed: int = setting(0, "seed of data order and sampling")
    algorithm: Literal["grpo", "sft"] = setting("grpo", "or sft: learn the data's completions, or answers")
    freeze: Literal["none", "vision", "llm"] = setting("none", "or vision, llm: the part that is not trained")
    # prompt and rollout
    prompt: Literal["auto", "base", "instruct", "base-direct", "instruct-direct"] = setting(
        "auto", "by the chat template; or base, instruct; with -direct: no reasoning")
    max_prompt_length: int = setting(1024, "tokens, images included; longer prompts are dropped, never cut")
    max_pixels: Optional[int] = setting(401408, "larger images are shrunk: 512 tokens of 28 x 28 pixels")
    prompts_per_step: int = setting(8, "B, questions per step, over all processes")
    num_generations: int = setting(8, "G, completions per prompt")
    max_completion_length: int = setting(700, "tokens at most per completion")
    temperature: float = setting(1.0, "sampling temperature; scoring divides the logits by it as well")
    # rewards and loss
    rewards: str = setting("accuracy,format", "names from REWARDS, added up")
    beta: float = setting(0.04, "weight of the KL penalty; 0 loads no reference")
    epsilon: float = setting(0.2, "the ratio is clipped below 1 - epsilon")
    epsilon_high: Optional[float] = setting(None, "and above 1 + epsilon_high; default: epsilon")
    num_iterations: int = setting(1, "updates per rollout; the clip can act only from the second on")
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = setting("grpo", "how tokens average; or dr_grpo, dapo")
    scale_rewards: bool = setting(True, "divide advantages by the group's std (false: Dr. GRPO)")
    mask_truncated_completions: bool = setting(False, "completions cut at the limit teach nothing (DAPO)")
    # optimizer
    max_steps: int = setting(1500, "training steps, one rollout each")
    learning_rate: float = setting(1e-6, "AdamW's rate at the start")
    lr_scheduler_type: Literal["linear", "constant"] = setting("linear", "linear: falls to 0 at max_steps")
    max_grad_norm: float = setting(1.0, "a longer gradient is scaled down to this norm; 0: never")
    # memory
    encode_tokens: int = setting(8192, "prompt tokens encoded at a time, or one prompt")
    score_tokens: int = setting(16384, "completion tokens scored at a time, or one completion")
    gradient_checkpointing: bool = setting(True, "compute layers twice instead of keeping them")
    cpu_offload: bool = setting(False, "float32 weights, gradients and optimizer state in CPU memory")
    attn_implementation: str = setting("sdpa", "for scoring: sdpa, eager, or flash_attention_2 if installed")
    # files
    save_steps: int = setting(100, "steps between checkpoints")
    save_total_limit: Optional[int] = setting(None, "checkpoints kept, the newest; default: all")
    eval_steps: int = setting(100, "steps between evaluations while training; 0: none")
    eval_data: str = setting("nyu-visionx/CV-Bench", "comma-separated sets, as eval_cvbench.py takes them")
    eval_limit: int = setting(128, "questions of each set, the same ones every time")


PRESETS = {
    "toy": dict(model_name_or_path=f"{TOY}/base", data=str(TOY), max_pixels=None, max_prompt_length=256,
                max_completion_length=64, max_steps=140, learning_rate=8e-5, beta=0.01, score_tokens=2048,
                gradient_checkpointing=False, save_steps=70, eval_steps=7,
                eval_data=f"{TOY}/cvbench,{TOY}/test.parquet"),
    "sat": {},
    # the paper's baseline: the same questions, answered without reasoning; 3750 x 8 is twice 15,000 rows
    "sat-sft": dict(algorithm="sft", learning_rate=2e-5, max_steps=3750, loss_type="dapo"),
    # stage 1 of Vision-R1 (arXiv 2503.06749), after its cold start; README.md has all of it
    "vision-r1": dict(model_name_or_path="Qwen/Qwen2.5-VL-7B-Instruct", data=f"{HERE}/data/own", beta=0.01,
                      rewards="hard", lr_scheduler_type="constant", max_steps=100, num_generations=16,
                      max_completion_length=4096),
}
# setting -> its least value. A comparison with nan is false
LEAST = dict(temperature=0.01, beta=0, epsilon=0, epsilon_high=0, max_grad_norm=0, learning_rate=0,
             eval_steps=0, **dict.fromkeys(
                 "prompts_per_step max_steps max_prompt_length max_completion_length num_iterations "
                 "max_pixels encode_tokens score_tokens save_steps save_total_limit eval_limit".split(), 1))
# settings of earlier versions: values at which a run can go on without them
REMOVED = dict(overwrite=[False, True], stages=[None], reward_file=[None], min_pixels=[None, 3136],
               weight_decay=[0.0], log_with=[None])


def parse_config(argv=None):
    """Command line (list of str; None: sys.argv) -> Config, checked."""
    parser = HfArgumentParser(Config, allow_abbrev=False, description=__doc__.splitlines()[0])
    argv = sys.argv[1:] if argv is None else argv
    given, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    folder = Path(given.output_dir or RUNS / given.preset).expanduser().absolute()
    saved = saved_settings(folder) if given.resume else {}
    parser.set_defaults(**PRESETS[saved.get("preset", given.preset)] | saved)
    cfg = Config(**vars(parser.parse_args(argv)))
    cfg.output_dir = str(folder) if cfg.output_dir or cfg.resume else None
    cfg.model_name_or_path, cfg.data = absolute(cfg.model_name_or_path), absolute(cfg.data)
    cfg.eval_data = ",".join(map(absolute, cfg.eval_data.split(",")))
    cfg.rewards = cfg.rewards.replace(" ", "")
    check_config(cfg)
    if saved.get("prompts_per_step", cfg.prompts_per_step) != cfg.prompts_per_step:
        fail(f"--prompts_per_step {cfg.prompts_per_step}: {folder} began with {saved['prompts_per_step']}, by "
             "which a step finds its place in the data. Leave it out.")
    if cfg.algorithm == "sft":  # one completion per prompt, rewarded for the log; nothing to stay close to
        cfg.num_generations, cfg.num_iterations, cfg.beta, cfg.temperature = 1, 1, 0.0, 1.0
    return cfg


def absolute(path):
    """An existing path in full, so that config.json means the same from every folder; a hub id as it is."""
    full, top = Path(path).expanduser().absolute(), path.partition("/")[0]
    if not full.exists() and (path.count("/") != 1 or top in ("", ".", "..", "~") or Path(top).exists()):
        fail(f"{path} does not exist, and is no hub id such as Qwen/Qwen2-VL-2B.")
    return str(full) if full.exists() else path


def saved_settings(folder):
    """config.json of the run to resume -> its settings; {} if there is nothing yet."""
    if not is_used(folder):
        print(f"--resume: nothing is in {folder} yet. The run begins from the start.")
        return {}
    try:
        saved = json.loads((folder / "config.json").read_text())
        PRESETS[saved["preset"]]
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"--resume: {folder} has no config.json of a run that can be read. Give the folder of a run.")
    for name in sorted(saved.keys() - {setting.name for setting in fields(Config)}):
        value = saved.pop(name)
        if value not in REMOVED.get(name, []):
            fail(f"{folder}/config.json has {name} {value}. Go on with the version that began the run.")
        print(f"{folder}/config.json: {name} is no longer a setting and is ignored.")
    return saved


def check_config(cfg):
    """Stop with a sentence if a setting cannot be."""
    for flag, least in (LEAST | dict(num_generations=1 if cfg.algorithm == "sft" else 2)).items():
        value = getattr(cfg, flag)
        if value is not None and not least <= value < math.inf:
            fail(f"--{flag} {value}: must be a number from {least} on")
    for name in cfg.rewards.split(","):
        if name not in REWARDS:
            fail(f"--rewards {name} is unknown. Choose from: {', '.join(REWARDS)}.")
        if cfg.prompt.endswith("-direct") and name in ("format", "hard"):
            fail(f"--rewards {name}: --prompt {cfg.prompt} asks for no blocks. Say --rewards accuracy.")


# ---- A run -----------------------------------------------------------------------------------------------

def setup(cfg):
    """-> all that a run works with, in one namespace, and the number of steps already done."""
    import eval_cvbench  # here, because these import this module
    import prepare_sat
    run = SimpleNamespace(cfg=cfg, accelerator=make_accelerator(cfg), evaluation=eval_cvbench)
    is_main, count = run.accelerator.is_main_process, run.accelerator.num_processes
    if is_main and cfg.resume:
        run.output_dir, run.lock = claim(cfg)
    last = checkpoints(cfg.output_dir)[-1:] if cfg.resume else []
    start, done = (last[0], int(last[0].name[11:])) if last else (cfg.model_name_or_path, 0)
    is_over = cfg.resume and (Path(cfg.output_dir) / "final").exists()
    if (done or is_over) and not (Path(start) / "state").exists():
        fail(f"--resume: {start if done else cfg.output_dir} has no state/ to go on from. Begin a new run.")
    if done >= cfg.max_steps and is_over:
        run.accelerator.print(f"{cfg.output_dir} has done {done} steps of {cfg.max_steps}. It is complete.")
        sys.exit(0)
    run.tokenizer, run.image_processor = load_processors(start, cfg.max_pixels)
    run.template, run.data = choose_prompt(run.tokenizer, cfg.prompt), prepare_sat.TrainingData(cfg.data)
    if run.template == "base":
        run.tokenizer.chat_template = eval_cvbench.SERVED_PROMPT  # for servers; the paper's code saves none
    if cfg.algorithm == "sft" and not run.data.has_completions:
        run.template = run.template.removesuffix("-direct") + "-direct"  # nothing but the answer to learn
    run.data.keep_fitting(run.template, run.tokenizer, run.image_processor, cfg.max_prompt_length, count > 1)
    run.eval_sets = eval_cvbench.load_sets(cfg.eval_data, cfg.eval_limit) if cfg.eval_steps else {}
    build_models(run, cfg, start)
    trained = [weight for weight in run.master.parameters() if weight.requires_grad]
    run.optimizer = torch.optim.AdamW(trained, lr=cfg.learning_rate, weight_decay=0.0, fused=True)
    if count > 1:
        shard(run, cfg)
    if done:
        state = training_state(run)  # its weights are master's own, so that loading fills them
        distributed_checkpoint.load(state, checkpoint_id=start / "state")  # however many processes saved it
        set_optimizer_state_dict(run.master, run.optimizer, state["optimizer"])
        refresh(run.sampler, run.master)
    if is_main:
        check_disk(run, cfg, done)
    if is_main and not cfg.resume:
        run.output_dir, run.lock = claim(cfg)
    run.output_dir, = broadcast_object_list([run.output_dir if is_main else None])
    if is_main:
        eval_cvbench.open_logs(run, done)
    size, kind = f"{run.sampler.num_parameters() / 1e6:.1f}M parameters", run.sampler.device.type
    run.accelerator.print(
        f"{run.output_dir}: {size}, {len(run.data.kept)} questions, prompt {run.template}, steps {done + 1} "
        f"to {cfg.max_steps}\n{count} x {kind}, {'FSDP2' if count > 1 else 'no wrapper'}, {run.sampler.dtype}")
    return run, done


@contextmanager
def stop_signals():
    """Inside, the first Ctrl-C or SIGTERM only asks to stop: it fills the list that is yielded, so that the
    step can end and be saved. The old handlers are back for the second, and afterwards."""
    asked, old = [], {}
    def restore():
        for number, handler in old.items():
            signal.signal(number, handler)
    def ask(number, frame):
        asked.append(number)
        restore()
    for number in signal.SIGINT, signal.SIGTERM:
        old[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()


def main(argv=None):
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process, and meant so
    cfg = parse_config(argv)
    run, done = setup(cfg)
    if cfg.eval_steps and not done:
        run.evaluation.evaluate_policy(run, 0)
    with stop_signals() as stop_asked:
        for step in tqdm(range(done, cfg.max_steps), "training", initial=done, total=cfg.max_steps,
                         disable=not run.accelerator.is_main_process):
            came = train_step(run, cfg, step)
            run.evaluation.log_step(run, step + 1, came)  # which ends the run, if the gradient is not finite
            last, stopping = step + 1 == cfg.max_steps, any(gather_object([bool(stop_asked)]))
            if cfg.eval_steps and ((step + 1) % cfg.eval_steps == 0 or last):
                run.evaluation.evaluate_policy(run, step + 1)
            if (step + 1) % cfg.save_steps == 0 or last or stopping:
                save(run.output_dir / f"checkpoint-{step + 1}", run, with_state=True)
                run.evaluation.show(run)
            if stopping and not last:
                run.accelerator.print(f"stopped after step {step + 1}, which is saved; go on as you started, "
                                      f"with --resume --output_dir {run.output_dir}")
                return
        save(run.output_dir / "final", run)
    run.evaluation.report_run(run)


if __name__ == "__main__":
    import grpo_vision  # by its own name: what imports it later (prepare_sat) gets this module, not a copy
    grpo_vision.main()
