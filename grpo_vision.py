"""Visual R1-Zero in one file: GRPO on Qwen2-VL, after VisualThinker-R1-Zero (arXiv 2503.05132).

The policy is the language model, seen as a distribution over the next token. Ask it a question about a
picture several times, and reward each answer by a rule. Then train by maximum likelihood with a weight and a
sign: every token of an answer is pushed up or down by how much better than its siblings the answer did. That
is GRPO, Group Relative Policy Optimization. "R1-Zero" means that training starts from a base model. Nobody
shows it how to reason; it learns from right or wrong alone.

One training step is this recipe. `train_step` puts it together, and the sections below follow it.

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

One idea makes it fast. A group shares one image and one prompt. They run through the model once per pass, and
the G completions branch off the keys and values that they leave. This is exact: `encode`, `score` and the
backward in two stages in `update` show how.

Symbols: n prompts of a pass, P prompt tokens, C completion tokens, K rows of a chunk, H hidden size, V
vocabulary size. Tensor lines end in their shape: # (N, C). `cfg` holds the settings (`Config`). `run` holds
what `setup` makes of them: the policy, which is trained; the sampler, its copy that samples; the reference;
optimizer, tokenizer, data.

    accelerate launch --num_processes 1 grpo_vision.py              # the toy: any laptop, offline, 2 minutes
    accelerate launch --num_processes 1 grpo_vision.py --preset sat # Qwen2-VL-2B on SAT, on one GPU
    accelerate launch --num_processes 8 grpo_vision.py --preset sat # the same, sharded over eight GPUs
"""
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any, Literal, Optional

import torch
import torch.distributed.checkpoint as distributed_checkpoint
import transformers
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     get_optimizer_state_dict, set_optimizer_state_dict)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, HfArgumentParser
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision


def train_step(run, cfg, step):
    """The recipe, once -> the step's metrics and its completions, to be logged."""
    timer = Timer()
    # 1. B questions with their images, in the prompt template
    batch = draw_batch(run, cfg, step)
    # 2. G completions of each
    rollout = draw_completions(run, cfg, step, batch)
    timer.lap("rollout")
    # 3. their rewards, by name
    rewards = compute_rewards(cfg.rewards, rollout.texts, rollout.lengths, batch.rows, run.template)
    # 4. their advantages
    advantages = group_advantages(sum(rewards.values()), cfg.num_generations, cfg.scale_rewards)  # (N,)
    # 5. the reference's log-probabilities
    ref_logps = score_by_reference(run.reference, batch.passes, rollout, cfg)                     # (N, C)
    timer.lap("reference")
    # 6. the policy's log-probabilities, the loss and the update
    sums = optimise(run, cfg, batch.passes, rollout, advantages, ref_logps, learning_rate(cfg, step))
    timer.lap("update")
    return summarise(cfg, step, batch, rollout, rewards, advantages, sums, timer.seconds)


# ---- Step 1: the question, with its images, in the prompt template ---------------------------------------

IMAGE_TOKENS = "<|vision_start|><|image_pad|><|vision_end|>"

# The paper's templates, verbatim. The base model's ends in <think> and never mentions <answer>: the policy
# learns to write answer blocks from the format reward. "direct" is for answers without reasoning.
TEMPLATES = {
    "base": "A conversation between User and Assistant. The user asks a question about the image, and the "
            "Assistant solves it. The assistant first thinks about the reasoning process in the mind and then "
            "provides the user with the answer.\nUser: {question} \nAssistant: Let me solve this step by "
            "step.\n<think>",
    "base-direct": "A conversation between User and Assistant. The user asks a question about the image, and "
                   "the Assistant solves it.\nUser: {question} \nAssistant: ",
    "instruct": "{question}  Output the thinking process in <think> </think> and final answer (option) in "
                "<answer> </answer> tags.",
    "instruct-direct": "{question}",
}


def build_question(question, options):
    """The paper's wording of a question with its options. Without options it stays as it is.

    >>> build_question("How many chairs are there?", ["2", "3", "5"])
    'Answer in natural language. How many chairs are there? Choose between the following options: 2, 3 or 5'
    """
    if not options:
        return question
    choices = " or ".join([", ".join(options[:-1]), options[-1]] if len(options) > 1 else options)
    return f"Answer in natural language. {question} Choose between the following options: {choices}"


def render(question, num_images, template, tokenizer):
    """Fill TEMPLATES[template] with a question -> the prompt's text, with IMAGE_TOKENS once per image.

    Images come first, numbered if there are several. An instruct prompt is the user's turn of the chat
    template, behind which the assistant's turn is opened.
    """
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


@dataclass
class Batch:
    """This process's B questions of a step."""
    numbers: list  # their row numbers in the data
    rows: list     # their rows (dicts)
    passes: list   # [Prompts, ...]


def draw_batch(run, cfg, step):
    """This process's share of the step's questions -> Batch."""
    B, rank = cfg.prompts_per_step // run.accelerator.num_processes, run.accelerator.process_index
    numbers = draw(run.kept, cfg.seed, step * cfg.prompts_per_step + rank * B, B)
    rows, prompts = [run.data[i] for i in numbers], []
    for i, row in zip(numbers, rows):
        images = [open_image(image, f"{run.data_path}, row {i}") for image in row["images"] or []]
        text = row_text(row, run.template, run.tokenizer)
        prompts.append(build_prompt(text, images, run.tokenizer, run.image_processor, run.sampler))
    batch = Batch(numbers, rows, make_passes(prompts, cfg.encode_tokens, run.sampler.device))
    for part in batch.passes:
        if cfg.freeze == "vision" and part.pixel_values is not None:  # once, for all three models
            with torch.no_grad():
                part.image_features = run.sampler.model.get_image_features(part.pixel_values, part.image_grid_thw)
    return batch


# ---- Step 2: run images and prompts through the model once, and branch off G completions -----------------

def encode(model, prompts):
    """Images and prompts, once -> what each layer leaves, [keys of layer 0, values of layer 0, keys of layer
    1, ...], each (n, kv_heads, P - 1, head_dim).

    The last prompt token is left out. It becomes the first input of every completion, whose output predicts
    the first completion token. So sampling and scoring need the keys and values only.
    """
    layers = [PromptLayer() for _ in range(model.config.text_config.num_hidden_layers)]
    images = dict(pixel_values=prompts.pixel_values, image_grid_thw=prompts.image_grid_thw)
    if prompts.image_features is not None:
        images = dict(mm_encoder_outputs={"image": prompts.image_features})
    model.model(input_ids=prompts.input_ids[:, :-1], position_ids=prompts.position_ids[:, :, :-1],
                past_key_values=Cache(layers=layers), **images)
    return [x for layer in layers for x in (layer.keys, layer.values)]


def token_logps(model, hidden, temperature):
    """(..., H) hidden states -> (..., V) log-probabilities, the one place where states become a distribution.

    Sampling and scoring share it, with its temperature and `model.suppressed`, (V,) bool, the tokens that are
    never drawn. Otherwise the policy that is trained would not be the one whose samples were rewarded. (The
    paper's code ignores the temperature here.)
    """
    logits = model.lm_head(hidden)
    # in place: with 151,936 tokens in the vocabulary these are the largest tensors of all
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)
    # the smallest finite number, not -inf: p * log p must be 0 in the entropy, not nan
    return logits.masked_fill_(model.suppressed, torch.finfo(logits.dtype).min).log_softmax(-1)


@dataclass
class Rollout:
    """What comes of letting the policy run: G completions of each prompt, rows prompt-major. (In the paper's
    code completions are sample-major, but images and answers are prompt-major. That fits for one prompt per
    device only.)"""
    completion_ids: torch.Tensor   # (N, C) padded on the right
    completion_mask: torch.Tensor  # (N, C) bool, True up to the end token, which counts: it was chosen too
    sampling_logps: torch.Tensor   # (N, C) log-probability of each token when it was drawn
    finished: torch.Tensor         # (N,) bool, False if cut off at max_completion_length
    texts: Optional[list] = None   # N str, what the completions say

    @property
    def lengths(self):
        return self.completion_mask.sum(1)                                                        # (N,)


@torch.no_grad()
def sample(model, passes, num_generations, max_completion_length, temperature, generator=None):
    """Draw G completions of each prompt of the passes (temperature 0: the likeliest tokens) -> Rollout."""
    decoder, limit = Decoder(model, passes, num_generations, max_completion_length), max_completion_length
    N, device, ends = len(decoder.rows), model.device, torch.tensor(model.eos_ids, device=model.device)
    completion_ids = torch.full((N, limit), model.eos_ids[0], device=device)
    sampling_logps = torch.zeros(N, limit, device=device).to(torch.promote_types(model.dtype, torch.float32))
    finished = torch.zeros(N, dtype=torch.bool, device=device)
    for t in range(limit):
        rows = decoder.rows                        # (R,) of the N rows, those that are still being decoded
        logps = token_logps(model, decoder.step(), temperature or 1.0)                            # (R, V)
        if t == 0 and not logps.isfinite().all():
            fail("the model's output is not finite. Its weights hold nan or inf: start from another model.")
        if temperature > 0:
            # the token at which the sum of the probabilities passes u, uniform in [0, 1); in float64, because
            # 150,000 unlikely tokens add up to something, and float32 would round them away
            cumulative = logps.to(torch.float64, copy=True).exp_().cumsum(-1)                     # (R, V)
            u = torch.rand(len(rows), 1, dtype=torch.float64, device=device, generator=generator)
            tokens = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)           # (R, 1)
        else:
            tokens = logps.argmax(-1, keepdim=True)                                               # (R, 1)
        completion_ids[rows, t] = tokens[:, 0]
        sampling_logps[rows, t] = logps.gather(-1, tokens)[:, 0]
        finished[rows] |= torch.isin(tokens[:, 0], ends)
        if finished.all():
            break
        decoder.feed(tokens, ~finished[rows])
    # a row that has ended may be decoded further for a while: what comes after its end token does not count
    is_end = torch.isin(completion_ids, ends)                                                     # (N, limit)
    completion_mask = is_end.cumsum(1) - is_end.int() == 0                                        # (N, limit)
    C = int(completion_mask.sum(1).max())
    completion_ids.masked_fill_(~completion_mask, model.eos_ids[0])
    sampling_logps.masked_fill_(~completion_mask, 0.0)
    return Rollout(completion_ids[:, :C], completion_mask[:, :C], sampling_logps[:, :C], finished)


def draw_completions(run, cfg, step, batch):
    """G completions of each prompt by the policy -> Rollout. In supervised fine-tuning (SFT) the data's own
    stand in their place."""
    if cfg.algorithm == "sft":
        rollout = given_completions(run, cfg, batch)
    else:
        generator = torch.Generator(run.sampler.device)
        generator.manual_seed(seeded(cfg.seed, "sample", step, run.accelerator.process_index).getrandbits(63))
        rollout = sample(run.sampler, batch.passes, cfg.num_generations, cfg.max_completion_length,
                         cfg.temperature, generator)
    prompts = [text for part in batch.passes for text in part.texts for _ in range(cfg.num_generations)]
    rollout.texts = [completion_text(prompt, ids[mask], run.tokenizer)
                     for prompt, ids, mask in zip(prompts, rollout.completion_ids, rollout.completion_mask)]
    return rollout


# ---- Step 3: the rewards, pure functions of the text -----------------------------------------------------

# Rules judge a completion by its text alone. There is no reward model to train or to fool.

ANSWER_BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
WELL_FORMED = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL)


def completion_text(prompt_text, completion_ids, tokenizer):
    """What the policy said, without end tokens. Where the prompt ends in <think>, it is put back here."""
    prefill = re.search(r"(<think>\s*)?$", prompt_text)[0]
    return prefill + tokenizer.decode(completion_ids, skip_special_tokens=True)


def extract_answer(text):
    """What is inside the one answer block; None if there is none, or several, or nothing in it.

    (Evaluation is more lenient: eval_cvbench.read_answer.)

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
    """-> the option that `answer` is, by its text or its letter, or None.

    Case, spaces, a final full stop and brackets around the letter are forgiven. A letter beyond the options
    chooses nothing, and nothing is found inside other words or numbers.

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
    """Does `answer` choose `solution` out of `options`? Without options it has to be the solution's text.
    Evaluation grades with a `choose` of its own, which also understands sentences."""
    return any(text is not None and normalise(text) == normalise(solution)
               for text in (answer, choose(answer, options)))


def accuracy_reward(completion, answer, options, template="base", **_):
    """1 if the one answer block chooses the right option, else 0. A copied template ("...") chooses none.
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
        for text, value in zip(texts, rewards[name].tolist()):
            if not math.isfinite(value):
                fail(f"the reward {name} is {value} for {text[-200:]!r}. It must be a finite float32 number.")
    return rewards


# ---- Step 4: the advantages, each completion against its own group ---------------------------------------

# A reward says little by itself: 1 is poor where the siblings got 2. The advantage compares. Subtracting the
# group's mean keeps the expected gradient and reduces its noise.

def group_advantages(rewards, num_generations, scale_rewards=True):
    """(N,) rewards, prompt-major -> (N,) advantages A = (R - mean) / (std + 1e-4) per group; unbiased std.

    The group is its own baseline: no value network (DeepSeekMath, arXiv 2402.03300, section 4.1.2; the 1e-4
    is from the paper's code). scale_rewards=False leaves A = R - mean, because the std gives more weight to
    questions that are nearly always right or wrong (Dr. GRPO, arXiv 2503.20783). A group without spread gets
    exactly 0.
    """
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

# All tokens are known by now, so one pass scores them all. The reference is asked here, the policy in step 6.

def chosen_logps(model, hidden, tokens, temperature):
    """(T, H) hidden states and the (T,) tokens that followed them -> their log-probabilities and the entropy
    of the distribution they were drawn from, without gradient, each (T,)."""
    logps = token_logps(model, hidden, temperature)                                               # (T, V)
    with torch.no_grad():
        entropy = -logps.exp().mul_(logps).sum(-1)                                                # (T,)
    return logps.gather(-1, tokens[:, None])[:, 0], entropy


def score(model, prompts, prompt_kv, group, completion_ids, completion_mask, cfg):
    """Log-probabilities and entropy of K completions, each (K, C), 0 where masked.

    prompt_kv: from `encode`. group: (K,), which of the n prompts a row belongs to. Each row sees the keys and
    values of its prompt, which are not computed again, and its own past. Its inputs begin with the last
    prompt token, one position before next_position. What pads it on the right comes after all that counts.
    """
    (K, C), P, device = completion_ids.shape, prompts.input_ids.shape[1], completion_ids.device
    last = prompts.lengths[group] - 1                                                             # (K,)
    inputs = torch.cat([prompts.input_ids[group, last][:, None], completion_ids[:, :-1]], 1)      # (K, C)
    positions = prompts.next_position[group][:, None] - 1 + torch.arange(C, device=device)        # (K, C)
    is_prompt = torch.arange(P - 1, device=device) < last[:, None]                                # (K, P - 1)
    visible = torch.cat([is_prompt, torch.ones_like(completion_mask)], 1)                     # (K, P - 1 + C)
    layers = [PromptLayer(keys, values, group) for keys, values in zip(prompt_kv[::2], prompt_kv[1::2])]
    hidden = model.model(input_ids=inputs, position_ids=positions.expand(3, K, C), attention_mask=visible,
                         past_key_values=Cache(layers=layers)).last_hidden_state                  # (K, C, H)
    found = []
    for states, tokens in zip(hidden[completion_mask].split(2048), completion_ids[completion_mask].split(2048)):
        if cfg.gradient_checkpointing:  # only 2048 tokens' log-probabilities exist at a time
            found.append(checkpoint(chosen_logps, model, states, tokens, cfg.temperature, use_reentrant=False))
        else:
            found.append(chosen_logps(model, states, tokens, cfg.temperature))
    logps, entropy = (torch.cat(parts) for parts in zip(*found))                                  # (T,)
    blank = torch.zeros(K, C, dtype=logps.dtype, device=device)
    return blank.masked_scatter(completion_mask, logps), blank.masked_scatter(completion_mask, entropy)


@torch.no_grad()
def score_by_reference(reference, passes, rollout, cfg):
    """-> (N, C) log-probabilities of the rollout by the reference; None without one (beta 0)."""
    if reference is None:
        return None
    ref_logps = torch.zeros_like(rollout.sampling_logps)                                          # (N, C)
    for prompts in passes:
        prompt_kv = reference(encode, prompts)
        for rows, group, ids, mask in chunks_of_pass(prompts, rollout, cfg):
            ref_logps[rows, :ids.shape[1]] += reference(score, prompts, prompt_kv, group, ids, mask, cfg)[0]
    return ref_logps


# ---- Step 6: the loss, and its gradient ------------------------------------------------------------------

# Tokens of better-than-average completions become likelier. The gradient comes in two stages, first of the
# completions, then of the prompts that they share. Then the optimizer takes its step.

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
    # a row that is not kept counts as one without tokens: almost 0 of them, not to divide by 0
    lengths = (lengths.double() * kept).clamp(min=1e-9)
    return LOSS_TYPES[cfg.loss_type](lengths, cfg.max_completion_length) * kept


def grpo_loss(per_token_logps, old_per_token_logps, ref_per_token_logps, advantages, token_weights,
              completion_mask, epsilon, epsilon_high, beta):
    """The loss of K of the step's rows (arXiv 2402.03300, eq. 3); over all chunks it adds up to the step's.

    *_logps, completion_mask: (K, C); advantages, token_weights: (K,). If beta is 0 no reference is needed.
    Returns loss, and for the log kl (K, C) and where the clip acts (K, C).

    Why it teaches: the expected reward grows along the mean of A * gradient of log pi(completion), over
    samples of pi (the policy gradient). While pi is pi_old, the ratio is 1 and its gradient is that of log
    pi: every token is pushed up or down by its A. A further update on the same rollout (num_iterations > 1)
    has samples of pi_old, a policy of the past. The ratio corrects for that while it is near 1. Hence the
    clip: a token that has moved by epsilon in the direction of its A is pushed no further. And hence the min:
    one that has moved the other way is still pushed.

    What is logged: with num_iterations 1 the ratio is 1. Where every row counts the same (loss_type "grpo"),
    the A of a group cancel, and the logged loss is beta * KL, near 0. Its gradient is not 0.
    """
    A = advantages[:, None]                                                                       # (K, 1)
    # ratio = pi / pi_old
    ratio = (per_token_logps - old_per_token_logps).exp()                                         # (K, C)
    # -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A)
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))   # (K, C)
    per_token_loss = -torch.min(ratio * A, clipped * A)                                           # (K, C)
    # kl = pi_ref / pi - log(pi_ref / pi) - 1. For tokens drawn from pi this is an unbiased estimate of
    # KL(pi || pi_ref), called k3, and it is never negative
    kl = torch.zeros_like(ratio)
    if beta > 0:
        log_ref_over_pi = ref_per_token_logps - per_token_logps                                   # (K, C)
        kl = log_ref_over_pi.exp() - log_ref_over_pi - 1                                          # (K, C)
        per_token_loss = per_token_loss + beta * kl                                               # (K, C)
    # loss = sum over rows of token_weights * sum over tokens. With weights of 1 / (rows * tokens of the row)
    # it is the mean over rows of the mean over tokens; LOSS_TYPES has others
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

    advantages, token_weights: (N,). old_logps: (N, C), or None in the first pass over a rollout, in which
    pi_old is pi. (Not the sampler's log-probabilities: it may compute in bf16, and the ratio would show its
    rounding.) Returns the log-probabilities of this pass (N, C), and sums over all tokens to log.
    """
    logps = torch.zeros_like(rollout.sampling_logps)                                              # (N, C)
    sums = dict.fromkeys(("loss", "entropy", "kl", "clip"), 0.0)
    for prompts in passes:
        prompt_kv = policy(encode, prompts)
        # the sum over chunks is kept in float32, whatever the keys and values are computed in
        leaves = [x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
                  for x in prompt_kv]                                     # each (n, kv_heads, P - 1, head_dim)
        for rows, group, ids, mask in chunks_of_pass(prompts, rollout, cfg):
            C = ids.shape[1]
            leaf_kv = [leaf.to(x.dtype) for leaf, x in zip(leaves, prompt_kv)]  # freed with the chunk's graph
            pi, entropy = policy(score, prompts, leaf_kv, group, ids, mask, cfg)                  # (K, C)
            pi_old = pi.detach() if old_logps is None else old_logps[rows, :C]                    # (K, C)
            pi_ref = ref_logps[rows, :C] if cfg.beta > 0 else None                                # (K, C)
            loss, kl, clipped = grpo_loss(pi, pi_old, pi_ref, advantages[rows], token_weights[rows], mask,
                                          cfg.epsilon, cfg.epsilon_high, cfg.beta)
            loss.backward()                                                                       # stage 1
            logps[rows, :C] += pi.detach()
            for name, values in dict(loss=loss, entropy=entropy, kl=kl * mask, clip=clipped * mask).items():
                sums[name] += values.sum().item()
        ends = [(x, leaf.grad.to(x.dtype)) for x, leaf in zip(prompt_kv, leaves) if x.requires_grad]
        if ends:  # none without an image, if only the image tower is trained
            torch.autograd.backward(*zip(*ends))                                                  # stage 2
    return logps, sums


def optimise(run, cfg, passes, rollout, advantages, ref_logps, learning_rate):
    """num_iterations updates of the weights -> sums over tokens to log and the norm of the gradient before
    clipping, of the last update, but nll and mismatch of the first. An update whose norm is not finite leaves
    the weights as they are, and is the last."""
    token_weights = own_weights(run, rollout, cfg)                                                # (N,)
    old_logps = None  # in the first update pi_old is pi itself
    for _ in range(cfg.num_iterations):
        logps, sums = update(run.policy, passes, rollout, advantages, token_weights, ref_logps,
                             old_logps, cfg)
        old_logps = logps if old_logps is None else old_logps                                     # (N, C)
        sums["grad_norm"] = clip_gradient(run, cfg.max_grad_norm)
        if not math.isfinite(sums["grad_norm"]):
            break
        run.optimizer.param_groups[0]["lr"] = learning_rate
        run.optimizer.step()
        run.optimizer.zero_grad()
    refresh(run.sampler, run.policy)
    sums["nll"] = -old_logps.sum().item()  # before the update
    sums["mismatch"] = ((old_logps - rollout.sampling_logps) * rollout.completion_mask).abs().max().item()
    return sums

# ==========================================================================================================
# The algorithm ends here. What follows is the machine that it runs on.
# ==========================================================================================================

# ---- Prompts as the model takes them, and chunks of rows -------------------------------------------------

@dataclass
class Prompts:
    """n questions with their images. Shorter ones are padded on the right. Encoding needs no mask for that:
    attention is causal, so nothing that counts sees the padding."""
    texts: list                                    # n str, with one <|image_pad|> per image
    input_ids: torch.Tensor                        # (n, P) with the image tokens
    position_ids: torch.Tensor                     # (3, n, P)
    lengths: torch.Tensor                          # (n,) tokens that are not padding
    next_position: torch.Tensor                    # (n,) position of the first completion token
    pixel_values: Optional[torch.Tensor] = None    # (patches of all images, numbers of a patch)
    image_grid_thw: Optional[torch.Tensor] = None  # (images, 3) patches along time, height and width
    image_features: Any = None                     # what the image tower makes of them, if it is frozen
    first: int = 0                                 # number of the first of them in its batch


def expand_images(text, tokens_per_image):
    """Repeat the i-th <|image_pad|> of the text tokens_per_image[i] times, as Qwen's own processors do."""
    head, *rest = text.split("<|image_pad|>")
    if len(rest) != len(tokens_per_image):
        fail(f"a question contains the token <|image_pad|> itself. Remove it from the data: {text[-200:]!r}")
    return head + "".join("<|image_pad|>" * n + part for n, part in zip(tokens_per_image, rest))


def build_prompt(text, images, tokenizer, image_processor, model):
    """text: str from `render`, images: list of PIL images, may be empty -> Prompts with n = 1, on the CPU.

    The model is asked for its image token and its rule of positions only. The rule is M-RoPE, multimodal
    rotary position embedding: a token has a position in time, height and width. The three are equal for text.
    h x w image tokens advance the position of what follows by max(h, w).
    """
    pixels, tokens_per_image = {}, []
    if images:
        pixels = image_processor(images=images, return_tensors="pt")  # pixel_values and image_grid_thw
        tokens_per_image = (pixels["image_grid_thw"].prod(-1) // image_processor.merge_size**2).tolist()
    ids = tokenizer(expand_images(text, tokens_per_image), return_tensors="pt").input_ids         # (1, P)
    is_image = (ids == model.config.image_token_id).int()
    position_ids, _ = model.model.get_rope_index(ids, mm_token_type_ids=is_image,
                                                 image_grid_thw=pixels.get("image_grid_thw"))
    return Prompts([text], ids, position_ids, torch.tensor([ids.shape[1]]), position_ids.amax((0, 2)) + 1,
                   **pixels)


def join(prompts, device, first=0):
    """Prompts of one question each -> one Prompts on the device."""
    pad, with_image = nn.utils.rnn.pad_sequence, [p for p in prompts if p.pixel_values is not None]
    images = {name: torch.cat([getattr(p, name) for p in with_image]).to(device)
              for name in ("pixel_values", "image_grid_thw") if with_image}
    return Prompts([p.texts[0] for p in prompts], pad([p.input_ids[0] for p in prompts], True).to(device),
                   pad([p.position_ids[:, 0].T for p in prompts]).permute(2, 1, 0).to(device),
                   torch.cat([p.lengths for p in prompts]).to(device),
                   torch.cat([p.next_position for p in prompts]).to(device), **images, first=first)


def make_passes(prompts, encode_tokens, device):
    """Prompts of one question each -> [Prompts, ...], as many questions in each as encode_tokens admits, or
    one that is longer."""
    n = max(1, encode_tokens // largest(max(int(p.lengths) for p in prompts)))
    return [join(prompts[i:i + n], device, first=i) for i in range(0, len(prompts), n)]


def chunks(lengths, score_tokens):
    """Lengths of rows -> lists of row numbers, short rows first, with rows * longest <= score_tokens in each.

    Rows of like length waste little on padding. A row longer than the budget is a list of its own.

    >>> chunks([5, 2, 9, 3], score_tokens=8)
    [[1, 3], [0], [2]]
    """
    result = []
    for row in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if result and (len(result[-1]) + 1) * lengths[row] <= score_tokens:
            result[-1].append(row)
        else:
            result.append([row])
    return result


def chunks_of_pass(prompts, rollout, cfg):
    """The rows of a pass, chunk by chunk; rows of several groups may meet. Yields their numbers in the
    rollout (K,), which of the n prompts each belongs to (K,), completion_ids and completion_mask (K, C)."""
    G, first = cfg.num_generations, prompts.first * cfg.num_generations
    found = chunks(rollout.lengths[first:first + G * len(prompts.texts)].tolist(), cfg.score_tokens)
    for chunk in found:
        rows = torch.tensor(chunk, device=rollout.completion_ids.device)                          # (K,)
        C = int(rollout.lengths[rows + first].max())
        yield rows + first, rows // G, rollout.completion_ids[rows + first, :C], \
            rollout.completion_mask[rows + first, :C]
    # a sharded forward needs every process: one with fewer chunks adds some of one row without tokens
    for _ in range(largest(len(found)) - len(found)):
        yield rows[:1] + first, rows[:1] // G, rollout.completion_ids[rows[:1] + first, :1], \
            torch.zeros_like(rollout.completion_mask[:1, :1])


# ---- Decoding --------------------------------------------------------------------------------------------

class PromptLayer(DynamicLayer):
    """A layer of the cache of keys and values, without state, so that checkpointing may call it twice.
    Encoding keeps what it is given, (n, kv_heads, P - 1, head_dim). Scoring joins the prompts' and the new
    ones; group: (K,), which of the n prompts a row belongs to."""
    def __init__(self, keys=None, values=None, group=None):
        super().__init__()
        self.keys, self.values, self.group, self.is_initialized = keys, values, group, keys is not None

    def update(self, keys, values, *args, **kwargs):
        if self.group is not None:
            return torch.cat([self.keys[self.group], keys], 2), torch.cat([self.values[self.group], values], 2)
        if self.keys is None:
            self.keys, self.values = keys, values
        return keys, values


class DecodeLayer(DynamicLayer):
    """A layer of the decoder's cache, with room for more tokens. They are written in place, because joining
    would copy the whole cache at every token. All layers share `place`, (1,): where the next ones go."""
    def __init__(self, keys, values, room, place):
        super().__init__()
        self.keys, self.values = (nn.functional.pad(x, (0, 0, 0, room)) for x in (keys, values))
        self.place = place

    def update(self, keys, values, *args, **kwargs):
        self.keys.index_copy_(2, self.place, keys)
        self.values.index_copy_(2, self.place, values)
        return self.keys, self.values


class Decoder:
    """N rows on their way through the completion, one token further at each `step`. A row of the cache:

        [ prompt without its last token | padding | last prompt token, c_1, c_2, ... | not yet written ]

    All of it takes part in every step, behind a mask, so that no shape changes. A CUDA graph needs that. On a
    GPU the step is recorded once and replayed: launching its thousand kernels takes longer than they run.
    """
    def __init__(self, model, passes, num_generations, room):
        encoded = [encode(model, prompts) for prompts in passes]
        longest = max(prompt_kv[0].shape[2] for prompt_kv in encoded)                             # P - 1
        room += 8 - (longest + room) % 8  # a GPU copies a mask at each use, if its rows are no multiple of 8
        repeat = lambda parts: torch.cat(parts).repeat_interleave(num_generations, 0)
        pad = lambda x: nn.functional.pad(x, (0, 0, 0, longest - x.shape[2]))
        self.model, self.place, self.graph = model, torch.tensor([longest], device=model.device), None
        kv = (repeat([pad(x) for x in parts]) for parts in zip(*encoded))  # each (N, kv_heads, P - 1, head_dim)
        self.layers = [DecodeLayer(keys, values, room, self.place) for keys, values in zip(kv, kv)]
        lengths = repeat([prompts.lengths for prompts in passes])[:, None]                        # (N, 1)
        self.positions = repeat([prompts.next_position for prompts in passes])[:, None] - 1       # (N, 1)
        self.tokens = repeat([prompts.input_ids.gather(1, prompts.lengths[:, None] - 1) for prompts in passes])
        places = torch.arange(longest + room, device=model.device)
        seen = (places < lengths - 1) | (places == longest)                         # (N, longest + room)
        mask = torch.zeros(seen.shape, dtype=model.dtype, device=model.device)
        self.mask = mask.masked_fill_(~seen, torch.finfo(model.dtype).min)[:, None, None]   # (N, 1, 1, ...)
        self.rows = torch.arange(len(seen), device=model.device)                                  # (N,)

    def step(self):
        """-> (R, H) hidden states, after which the next token is to be drawn."""
        if self.model.device.type != "cuda":
            return self.forward()
        if self.graph is None:
            # libraries set themselves up on first use, outside the recording; the replay will write over what
            # this writes, at the same place
            self.forward()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may go on
                self.hidden = self.forward()
        self.graph.replay()
        return self.hidden

    def forward(self):
        output = self.model.model(input_ids=self.tokens, position_ids=self.positions.expand(3, -1, -1),
                                  past_key_values=Cache(layers=self.layers), attention_mask=self.mask)
        return output.last_hidden_state[:, -1]

    def feed(self, tokens, running):
        """tokens: (R, 1), which the next step takes in. running: (R,) bool. The other rows leave when they
        are a tenth; on a GPU, half, as a graph must be recorded anew."""
        self.tokens.copy_(tokens)
        for counter in (self.positions, self.place):
            counter += 1
        self.mask.index_fill_(3, self.place, 0)
        if running.sum() <= (0.5 if self.graph else 0.9) * len(running):
            self.rows, self.tokens, self.positions, self.mask = (
                x[running] for x in (self.rows, self.tokens, self.positions, self.mask))
            for layer in self.layers:
                layer.keys, layer.values = layer.keys[running], layer.values[running]
            self.graph = None


# ---- Supervised fine-tuning, and more rewards ------------------------------------------------------------

def given_completions(run, cfg, batch):
    """SFT: the data's completions, or else its answers, stand where the samples would -> Rollout."""
    ids, eos = [], run.sampler.eos_ids[0]
    prompts = [text for part in batch.passes for text in part.texts]
    for row, prompt in zip(batch.rows, prompts):
        text = row.get("completion") or row["answer"]
        if prefill := re.search(r"<think>(\s*)$", prompt):
            text = text.removeprefix("<think>").removeprefix(prefill[1])
        ids.append(torch.tensor(run.tokenizer(text).input_ids + [eos])[:cfg.max_completion_length])
    lengths = torch.tensor([len(x) for x in ids])
    ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=eos)                     # (N, C)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    finished = ids[torch.arange(len(ids)), lengths - 1] == eos
    return Rollout(*(x.to(run.sampler.device) for x in (ids, mask, torch.zeros(ids.shape), finished)))


def hard_reward(completion, options, **row):
    """1 only if form and answer are both right (Vision-R1's HFRRF, arXiv 2503.06749, section 3.3)."""
    right = accuracy_reward if options else math_reward
    return format_reward(completion) * right(completion, options=options, **row)


def length_reward(completion, num_tokens, **_):
    """0.001 per token: the paper's attempt to buy reasoning, which failed."""
    return 0.001 * num_tokens


# name -> function(completion, num_tokens, template, **columns of the data row) -> float. The completion begins
# with the <think> that the base prompt ends in; an instruct model has to write it itself. README.md adds one
REWARDS = {"accuracy": accuracy_reward, "format": format_reward, "hard": hard_reward, "length": length_reward}


# ---- Models ----------------------------------------------------------------------------------------------

FAMILIES = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_processors(path, max_pixels=None):
    """-> tokenizer, image processor. The image processor is PIL's: the same pixels everywhere, and no
    torchvision. max_pixels: larger images are shrunk to it; None: as the model's own files say."""
    try:
        limits = {"max_pixels": max_pixels} if max_pixels else {}
        return AutoTokenizer.from_pretrained(path), Qwen2VLImageProcessorPil.from_pretrained(path, **limits)
    except (OSError, ValueError) as error:
        fail(f"cannot load tokenizer and image processor from {path}: {first_line(error)}")


def load_model(path, tokenizer, attn_implementation="sdpa", dtype=torch.float32):
    """Folder or hub id -> a model of one of the FAMILIES, without dropout. float32 is asked for because the
    published files would load as bf16, in which updates as small as 1e-6 are rounded away.

    Two attributes come with it. suppressed, (V,) bool: vision tokens, which would crash the next forward, and
    vocabulary rows without a token. eos_ids: what ends a completion, the tokenizer's end token first, then
    those of Qwen's two that it knows.
    """
    try:
        kind = AutoConfig.from_pretrained(path).model_type
        if kind not in FAMILIES:
            fail(f"{path} is a {kind} model. This program trains {', '.join(FAMILIES.values())}.")
        model, report = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True)
    except (OSError, ImportError, ValueError, SafetensorError) as error:
        fail(f"cannot load a model from {path}: {first_line(error)}")
    if report["missing_keys"]:
        fail(f"{path} is not a whole model: its files lack {sorted(report['missing_keys'])[0]}")
    suppressed = torch.arange(model.lm_head.out_features) >= len(tokenizer)                       # (V,)
    vision = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    suppressed[tokenizer.convert_tokens_to_ids(vision)] = True
    model.register_buffer("suppressed", suppressed, persistent=False)
    qwen = [token for token in ("<|endoftext|>", "<|im_end|>") if token in tokenizer.get_vocab()]
    model.eos_ids = list(dict.fromkeys([tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(qwen)]))
    return fast_vision(model).eval()


def fast_vision(model):
    """Make two parts of the image tower faster, with the same weights. Returns the model."""
    def embed_patches(self, pixels):
        """The kernel and stride of this convolution are the patch, so it is a matrix product. Conv3d's
        backward is slow."""
        weight = self.proj.weight.flatten(1)                                        # (dim, numbers of a patch)
        return nn.functional.linear(pixels.to(weight.dtype), weight, self.proj.bias)          # (patches, dim)

    def attend(self, hidden, cu_seqlens, position_embeddings, **_):
        """All windows (or images) of equal length in one call, where transformers makes one for each."""
        qkv = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1))               # (patches, 3, heads, dim)
        q, k = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], *position_embeddings)
        lengths, output = cu_seqlens.diff(), torch.empty_like(q)
        for length in lengths.unique().tolist():
            index = cu_seqlens[:-1][lengths == length, None] + torch.arange(length, device=q.device)
            q_k_v = (x[index].transpose(1, 2) for x in (q, k, qkv[:, 2]))     # each (windows, heads, length, dim)
            output[index] = nn.functional.scaled_dot_product_attention(*q_k_v).transpose(1, 2)
        return self.proj(output.flatten(1))                                                   # (patches, dim)

    visual = model.model.visual  # methods, not functions: a deepcopy of the model will use its own weights
    visual.patch_embed.forward = MethodType(embed_patches, visual.patch_embed)
    if visual.config._attn_implementation == "sdpa":
        for block in visual.blocks:
            block.attn.forward = MethodType(attend, block.attn)
    return model


def set_threads(model):
    """A second thread only waits for a model as small as the toy's. The launcher sets OMP_NUM_THREADS=1 and
    python does not; set here, both give the same speed and the same bits."""
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(max(1, cores) if model.num_parameters() > 1e7 else 1)


def choose_prompt(tokenizer, prompt="auto"):
    """-> name of a template. auto: instruct if the chat template tells user from assistant, else base. (The
    template that is saved with base models renders both alike: eval_cvbench.SERVED_PROMPT.)"""
    turns = [[{"role": role, "content": "?"}] for role in ("user", "assistant")]
    has_roles = tokenizer.chat_template is not None and len(
        {tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns}) == 2
    if prompt.startswith("instruct") and not has_roles:
        fail(f"--prompt {prompt}: the model's chat template does not tell user from assistant. Leave it out.")
    return prompt if prompt != "auto" else "instruct" if has_roles else "base"


class Policy(nn.Module):
    """A model behind one door: policy(function, *arguments) is function(model, *arguments). FSDP wraps this
    module, and its hooks run in `forward` only. autocast: compute in bf16."""
    def __init__(self, model, autocast=False):
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, function, *arguments):
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast):
            return function(self.model, *arguments)


def build_models(cfg, start, accelerator, tokenizer):
    """Folder or hub id `start` -> policy, sampler, reference (or None), optimizer.

    Up to three copies of the weights: the policy's in float32, because in bf16 an update of 1e-6 would be
    rounded away; plain ones for sampler and reference, in bf16 on a GPU. Alone on a CPU, the policy samples.
    """
    device, bf16, sharded = accelerator.device, accelerator.mixed_precision == "bf16", is_sharded()
    model = load_model(start, tokenizer, cfg.attn_implementation).to("cpu" if cfg.cpu_offload else device)
    set_threads(model)
    towers = dict(vision=[model.model.visual], llm=[model.model.language_model, model.lm_head])
    for tower in towers.get(cfg.freeze, []):
        tower.requires_grad_(False)  # called; the paper's code assigns to the name, which freezes nothing
    plain = lambda path, attention: load_model(
        path, tokenizer, attention, torch.bfloat16 if bf16 else torch.float32).to(device).requires_grad_(False)
    sampler = plain(start, "sdpa") if sharded or bf16 else model  # its masks are not for flash attention
    reference = Policy(plain(cfg.model_name_or_path, cfg.attn_implementation)) if cfg.beta > 0 else None
    if cfg.algorithm == "sft":
        model.suppressed.zero_()  # plain cross-entropy, over all the vocabulary
    if cfg.gradient_checkpointing:  # transformers' own switch turns the cache off
        for layer in [*model.model.language_model.layers, *model.model.visual.blocks]:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    policy = Policy(model, autocast=bf16 and not sharded)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.learning_rate, weight_decay=0.0)
    if sharded:
        policy, optimizer = shard(policy, optimizer, accelerator, cfg)
    return policy, sampler, reference, optimizer


# ---- One process or many ---------------------------------------------------------------------------------

# One process is plain. Several, or one with --cpu_offload, are sharded by FSDP2 (fully sharded data parallel).

# cuDNN's attention, torch's first choice on an H100, prepares anew for each new shape, and its gradients can
# be nan where there is a mask (pytorch issue 196678); the others, flash and memory-efficient, do neither
torch.backends.cuda.enable_cudnn_sdp(False)


def is_sharded():
    return torch.distributed.is_initialized()


def make_accelerator(cfg):
    """-> Accelerator. A process group is there if and only if weights will be sharded."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        fail("ACCELERATE_USE_DEEPSPEED is set, but this program shards by FSDP2. Unset it, or start by python.")
    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if (cfg.cpu_offload or not alone) and not is_sharded():
        # gloo, too, on GPUs: what is offloaded is clipped on the CPU. A store in memory needs no port
        where = dict(store=torch.distributed.HashStore(), rank=0, world_size=1) if alone else {}
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                                             timeout=timedelta(hours=2), **where)
    try:
        accelerator = Accelerator(log_with=cfg.log_with, mixed_precision="bf16" if on_gpu else "no",
                                  cpu=not on_gpu)  # and not a Mac's "mps"
    except ValueError as error:
        fail(f"--log_with {cfg.log_with}: {error}")
    if cfg.prompts_per_step % accelerator.num_processes:
        fail(f"--prompts_per_step {cfg.prompts_per_step} cannot be shared by {accelerator.num_processes} "
             "processes. Choose a multiple of them.")
    return accelerator


def shard(policy, optimizer, accelerator, cfg):
    """Shard float32 weights, gradients and optimizer state over the processes; compute in bf16 on GPUs and
    add gradients up in float32. (accelerate's own "bf16" would add them up in bf16.)"""
    bf16 = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    on_gpu = accelerator.device.type == "cuda"
    # set here and not by an argument, which accelerate heeds on GPUs only: a CPU would get DDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
        transformer_cls_names_to_wrap=sorted(policy.model._no_split_modules),
        mixed_precision_policy=MixedPrecisionPolicy(**bf16 if on_gpu else {}),
        cpu_offload=CPUOffloadPolicy(pin_memory=on_gpu) if cfg.cpu_offload else False)

    def lead_on(module, inputs, output):
        """FSDP gathers a layer's weights for its backward when the gradient of its output arrives. Of encoded
        prompts only keys and values count, and the last layer's output leads nowhere: a zero of it joins."""
        last = output.past_key_values.layers[-1]
        if isinstance(last, PromptLayer) and last.group is None:
            last.values = last.values + 0 * output.last_hidden_state[0, 0, 0]

    policy.model.model.language_model.register_forward_hook(lead_on)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    if not all(isinstance(weight, DTensor) for weight in policy.parameters()):
        fail("the weights are not sharded. Install the accelerate of requirements.txt.")
    return policy, optimizer.optimizer  # itself, which torch.distributed.checkpoint knows


def largest(number):
    """The largest of all processes' numbers."""
    return max(gather_object([number]))


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def own_weights(run, rollout, cfg):
    """(N,) the weight of a token of each of this process's rows. The mean of all processes' losses is the
    step's, as FSDP averages their gradients."""
    n, gather = run.accelerator.num_processes, run.accelerator.gather
    weights = weigh_tokens(gather(rollout.lengths), gather(rollout.finished), cfg)  # of all processes' rows
    return n * weights.chunk(n)[run.accelerator.process_index].float()                            # (N,)


def clip_gradient(run, max_grad_norm):
    """Scale a longer gradient down to max_grad_norm (0: never) -> its norm before."""
    return float(whole(run.accelerator.clip_grad_norm_(run.policy.parameters(), max_grad_norm or math.inf)))


@torch.no_grad()
def refresh(sampler, policy):
    """Copy the policy's weights, sharded or not, into the sampler."""
    for copy, weight in zip(sampler.parameters(), policy.model.parameters(), strict=True):
        if copy is not weight:
            copy.copy_(whole(weight.to(copy.device)))


# ---- What a step logs ------------------------------------------------------------------------------------

class Timer:
    """Seconds of each phase of a step. It waits for a GPU, so that each phase is charged with its own work."""
    def __init__(self):
        self.seconds, self.last = {}, self.now()

    def now(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self, phase):
        now = self.now()
        self.seconds[f"seconds/{phase}"], self.last = now - self.last, now


def summarise(cfg, step, batch, rollout, rewards, advantages, sums, seconds):
    """-> the step's metrics, and its completions as records, both over all processes."""
    G, lengths, prompts = cfg.num_generations, rollout.lengths.tolist(), [t for p in batch.passes for t in p.texts]
    samples = gather_object([
        {"step": step + 1, "row": batch.numbers[i // G], "prompt": prompts[i // G], "completion": text,
         "answer": batch.rows[i // G]["answer"], "length": lengths[i], "finished": bool(rollout.finished[i]),
         **{f"rewards/{name}": values[i].item() for name, values in rewards.items()},
         "reward": sum(values[i].item() for values in rewards.values()), "advantage": advantages[i].item()}
        for i, text in enumerate(rollout.texts)])
    sums = gather_object([sums])
    average = lambda name: statistics.mean(sample[name] for sample in samples)
    total = lambda name: sum(part[name] for part in sums)
    reward, tokens = [sample["reward"] for sample in samples], sum(sample["length"] for sample in samples)
    groups = [reward[i:i + G] for i in range(0, len(reward), G)]
    metrics = {
        "step": step + 1, "loss": total("loss") / len(sums), "reward": average("reward"),
        "reward_std": statistics.mean(statistics.stdev(group) if G > 1 else 0.0 for group in groups),
        **{name: average(name) for name in samples[0] if name.startswith("rewards/")},
        "completions/mean_length": tokens / len(samples),
        "completions/clipped_ratio": 1 - average("finished"),
        "frac_reward_zero_std": statistics.mean(max(group) == min(group) for group in groups),
        "kl": total("kl") / tokens, "entropy": total("entropy") / tokens,
        "clip_ratio": total("clip") / tokens, "grad_norm": sums[0]["grad_norm"],
        "learning_rate": learning_rate(cfg, step)}
    if cfg.algorithm == "sft":
        metrics["nll"] = total("nll") / tokens
    else:
        metrics["sampler_mismatch"] = max(part["mismatch"] for part in sums)
    return metrics | seconds, samples


# ---- Small things ----------------------------------------------------------------------------------------

def fail(message):
    """Stop with one sentence (exit code 1) where a traceback would tell the user nothing more."""
    raise SystemExit(f"error: {message}")


def seeded(*key):
    """random.Random of `key` alone, such as (seed, "sample", step, rank). No draw depends on an earlier one,
    so a resumed run has nothing to replay."""
    return random.Random("/".join(map(str, key)))


def draw(numbers, seed, first, count):
    """Entries first .. first + count - 1 of an endless walk over row numbers, shuffled anew in each epoch.
    Entry i depends only on i, so a resumed run needs no saved state."""
    n, last = len(numbers), first + count - 1
    epochs = range(first // n, last // n + 1)
    walks = {epoch: seeded(seed, "epoch", epoch).sample(numbers, n) for epoch in epochs}
    return [walks[i // n][i % n] for i in range(first, last + 1)]


def learning_rate(cfg, step):
    """linear: falls from cfg.learning_rate to 0 at max_steps."""
    return cfg.learning_rate * (1 - step / cfg.max_steps if cfg.lr_scheduler_type == "linear" else 1)


def upright(picture):
    """PIL image -> RGB as a viewer shows it: turned as its EXIF tag says, white where it is transparent. Of
    grey values deeper than 8 bits the darkest is black, the lightest white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        picture = picture.convert("F")
        low, high = picture.getextrema()
        scale = 255 / max(high - low, 1e-9)
        picture = picture.point(lambda value: value * scale - low * scale)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def open_image(image, where, decode=True):
    """{"bytes", "path"} -> RGB image, or stop and name its row. decode=False reads only the header."""
    try:
        picture = Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"])
        return upright(picture) if decode else picture
    except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, struct.error ...
        fail(f"{where}: its image cannot be read ({error}). Remove the row.")


# ---- The files of a run ----------------------------------------------------------------------------------

def checkpoints(output_dir):
    """-> its complete checkpoint-N folders, oldest first; `save_model` gives them the name when they are."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=steps_of)


def steps_of(checkpoint):
    """.../checkpoint-N -> N"""
    return int(Path(checkpoint).name[11:])


def write_model(folder, run, with_state):
    """A plain model directory, and in state/ what resuming needs beside it. All processes take part."""
    is_main, model = run.accelerator.is_main_process, run.policy.model
    if is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    run.accelerator.wait_for_everyone()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(run.policy, options=options)  # whole, on the main process
    if is_main:
        weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
        if model.config.tie_word_embeddings:
            del weights["lm_head.weight"]  # the same as the embedding, which is saved once
        model.save_pretrained(folder, state_dict=weights)
        run.tokenizer.save_pretrained(folder)
        run.image_processor.save_pretrained(folder)
    if with_state:
        state = {"optimizer": get_optimizer_state_dict(run.policy, run.optimizer)}
        distributed_checkpoint.save(state, checkpoint_id=folder / "state")


def save_model(folder, run, with_state=False):
    """`write_model`, whole or not at all: the folder gets its name only when it is complete."""
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        write_model(temporary, run, with_state)
    # what a full disk raises in python, torch, safetensors and torch's checkpoints
    except (OSError, RuntimeError, SafetensorError, distributed_checkpoint.api.CheckpointException) as error:
        free = shutil.disk_usage(run.output_dir).free / 2**20  # torch's own reason can be a riddle
        shutil.rmtree(temporary, ignore_errors=True)
        last = (checkpoints(run.output_dir) or ["no checkpoint yet"])[-1]
        reason = f"{str(error).strip().splitlines()[-1]}; {free:.0f} MiB free on the disk"
        fail(f"{folder} could not be saved ({reason}). What was there before is whole ({last}). Make room, "
             f"then go on with --resume --output_dir {run.output_dir}")
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)


def save_checkpoint(run, step):
    save_model(run.output_dir / f"checkpoint-{step}", run, with_state=True)
    if run.cfg.save_total_limit and run.accelerator.is_main_process:
        for old in checkpoints(run.output_dir)[:-run.cfg.save_total_limit]:
            shutil.rmtree(old)


def load_optimizer(folder, run):
    """state/ of a checkpoint -> the optimizer, however many processes saved it."""
    state = {"optimizer": get_optimizer_state_dict(run.policy, run.optimizer)}
    distributed_checkpoint.load(state, checkpoint_id=folder / "state")
    set_optimizer_state_dict(run.policy, run.optimizer, state["optimizer"])


def claim(cfg):
    """-> the run's folder, and a lock on it that is held as long as this process lives. Without --resume the
    folder is new: of two runs that start at once, each gets its own."""
    folder, n = Path(cfg.output_dir or RUNS / cfg.preset), 1
    while True:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if cfg.resume or cfg.output_dir and not has_files(folder):
                break
            if cfg.output_dir:
                fail(f"--output_dir {folder} is not empty. Choose a new folder, or go on with a run by --resume.")
            folder, n = RUNS / f"{cfg.preset}-{n + 1}", n + 1
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        fail(f"{folder} is in use by another process. Wait for it, or choose another --output_dir.")
    return folder, lock


def has_files(folder):
    """Is there more in it than the lock of a run that was killed before it began?"""
    return any(path.name != ".lock" for path in folder.iterdir())


def fingerprint(path):
    """Digests of a file's bytes, or of a model folder's weights -> list. A hub id stands for itself."""
    files = [path for path in sorted(Path(path).glob("*.safetensors")) or [Path(path)] if path.is_file()]
    return [hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files] or [str(path)]


# ---- Settings --------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
TOY, RUNS = HERE / "toy", HERE / "runs"


def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting of a run. Precedence: these defaults < --preset < the run to --resume < command line.
    The defaults are the paper's recipe."""
    # what to train, on what
    preset: str = setting("toy", "toy (offline, on a CPU), sat (the paper), sat-sft or vision-r1")
    model_name_or_path: str = setting("Qwen/Qwen2-VL-2B", "model to start from: a folder or a hub id")
    data: str = setting(str(HERE / "data/sat"), "Parquet file from prepare_sat.py, or folder with train.parquet")
    output_dir: Optional[str] = setting(None, "folder of the run; default: runs/PRESET, or runs/PRESET-2 ...")
    resume: bool = setting(False, "go on from output_dir's last checkpoint, with its settings")
    seed: int = setting(0, "seed of data order and sampling")
    algorithm: Literal["grpo", "sft"] = setting("grpo", "or sft: learn the data's completions, or answers")
    freeze: Literal["none", "vision", "llm"] = setting("none", "or vision, llm: the part that is not trained")
    # prompt and rollout
    prompt: Literal["auto", "base", "instruct", "base-direct", "instruct-direct"] = setting(
        "auto", "by the chat template; or base, instruct; with -direct: no reasoning")
    max_prompt_length: int = setting(1024, "tokens, images included; longer prompts are dropped, never cut")
    max_pixels: Optional[int] = setting(401408, "larger images are shrunk to it: 512 tokens of 28 x 28 pixels")
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
    encode_tokens: int = setting(8192, "prompt tokens encoded at a time, or one prompt that is longer")
    score_tokens: int = setting(16384, "completion tokens scored at a time, or one completion that is longer")
    gradient_checkpointing: bool = setting(True, "compute layers again in the backward instead of keeping them")
    cpu_offload: bool = setting(False, "float32 weights, gradients and optimizer state in CPU memory")
    attn_implementation: str = setting("sdpa", "for scoring: sdpa, eager, or flash_attention_2 if installed")
    # files
    save_steps: int = setting(100, "steps between checkpoints")
    save_total_limit: Optional[int] = setting(None, "checkpoints kept, the newest; default: all")
    eval_steps: int = setting(100, "steps between evaluations while training; 0: none")
    eval_data: str = setting("nyu-visionx/CV-Bench", "comma-separated sets, as eval_cvbench.py takes them")
    eval_limit: int = setting(128, "questions of each set, the same ones every time")
    log_with: Optional[str] = setting(None, "an accelerate tracker besides metrics.jsonl: tensorboard, ...")


PRESETS = {
    "toy": dict(model_name_or_path=str(TOY / "base"), data=str(TOY), max_pixels=None, prompts_per_step=16,
                max_completion_length=64, max_steps=100, learning_rate=2e-4, beta=0.01, score_tokens=2048,
                gradient_checkpointing=False, save_steps=50, eval_steps=10,
                eval_data=f"{TOY / 'cvbench'},{TOY / 'test.parquet'}"),
    "sat": {},
    # the paper's baseline: the same questions, answered without reasoning; 3750 x 8 is twice 15,000 rows
    "sat-sft": dict(algorithm="sft", learning_rate=2e-5, max_steps=3750, loss_type="dapo"),
    # stage 1 of Vision-R1 (arXiv 2503.06749), after its cold start; README.md has both stages
    "vision-r1": dict(model_name_or_path="Qwen/Qwen2.5-VL-7B-Instruct", data=str(HERE / "data/own"),
                      rewards="hard", beta=0.01, lr_scheduler_type="constant", max_steps=100,
                      max_completion_length=4096, num_generations=16),
}
# setting -> its least value. A comparison with nan is false
LEAST = dict(prompts_per_step=1, num_generations=1, max_completion_length=1, max_prompt_length=1, max_steps=1,
             num_iterations=1, encode_tokens=1, score_tokens=1, save_steps=1, save_total_limit=1, eval_steps=0,
             eval_limit=1, max_pixels=1, temperature=0.01, beta=0, epsilon=0, epsilon_high=0, max_grad_norm=0,
             learning_rate=0)
# settings of earlier versions -> the values at which a run can go on without them
REMOVED = dict(overwrite=[False, True], stages=[None], reward_file=[None], min_pixels=[None, 3136],
               weight_decay=[0.0])


def parse_config(argv=None):
    """Command line (list of str; None: sys.argv) -> Config, checked."""
    parser = HfArgumentParser(Config, allow_abbrev=False, description=__doc__.splitlines()[0])
    argv = sys.argv[1:] if argv is None else argv
    given, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    saved = saved_settings(Path(given.output_dir or RUNS / given.preset).expanduser()) if given.resume else {}
    preset = saved.get("preset", given.preset)
    if preset not in PRESETS:
        fail(f"--preset {preset} is unknown. Choose one of: {', '.join(PRESETS)}.")
    parser.set_defaults(**PRESETS[preset] | saved)
    cfg, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        fail(f"unknown argument {unknown[0]}. `python grpo_vision.py --help` lists them all.")
    cfg.rewards = cfg.rewards.replace(" ", "")
    if cfg.algorithm == "sft":  # one completion per prompt, rewarded for the log only; nothing to stay close to
        cfg.num_generations, cfg.beta, cfg.temperature = 1, 0.0, 1.0
    # absolute paths, so that config.json means the same from every directory
    cfg.output_dir = cfg.output_dir and str(Path(cfg.output_dir).expanduser().absolute())
    cfg.model_name_or_path, cfg.data = absolute(cfg.model_name_or_path), absolute(cfg.data)
    cfg.eval_data = ",".join(map(absolute, cfg.eval_data.split(",")))
    check_config(cfg)
    return cfg


def absolute(path):
    """An existing path in full; a hub id as it is. What looks like a path and does not exist stops here."""
    full = Path(path.strip()).expanduser().absolute()
    top = path.partition("/")[0]
    if not full.exists() and (path.count("/") != 1 or top in ("", ".", "..", "~") or Path(top).exists()):
        fail(f"{path} does not exist, and is no hub id, such as Qwen/Qwen2-VL-2B.")
    return str(full) if full.exists() else path


def saved_settings(folder):
    """config.json of the run to resume -> its settings; {} if there is nothing yet."""
    if not folder.exists() or not has_files(folder):
        print(f"--resume: nothing is in {folder} yet. The run begins from the start.")
        return {}
    try:
        saved = json.loads((folder / "config.json").read_text())
        saved.pop("fingerprints", None)
    except (OSError, ValueError, AttributeError):
        fail(f"--resume: {folder} has no config.json of a run that can be read. Give the folder of a run.")
    known = {setting.name for setting in fields(Config)}
    if not saved.keys() & {"preset"}:
        fail(f"--resume: {folder} is a model, not a run. Give the folder in which its checkpoints lie.")
    for name in sorted(saved.keys() - known):
        value = saved.pop(name)
        if value not in REMOVED.get(name, []):
            fail(f"{folder}/config.json has {name} = {value}, which this version cannot do. Continue the run "
                 "with the version that began it.")
        print(f"{folder}/config.json: {name} is no longer a setting and is ignored.")
    return saved | {"resume": True, "output_dir": str(folder)}


def check_config(cfg):
    """Stop with a sentence if a setting cannot be."""
    for flag, least in LEAST.items():
        value = getattr(cfg, flag)
        if value is not None and not least <= value < math.inf:
            fail(f"--{flag} {value}: must be a number from {least} on")
    if cfg.algorithm == "grpo" and cfg.num_generations < 2:
        fail("--num_generations 1: at least 2, or a completion has no siblings to beat")
    for name in cfg.rewards.split(","):
        if name not in REWARDS:
            fail(f"--rewards {name} is unknown. Choose from: {', '.join(REWARDS)}.")
        if cfg.prompt.endswith("-direct") and name in ("format", "hard"):
            fail(f"--rewards {name}: --prompt {cfg.prompt} asks for no blocks. Say --rewards accuracy.")
    if Path(cfg.model_name_or_path).exists() and not (Path(cfg.model_name_or_path) / "config.json").exists():
        fail(f"--model_name_or_path {cfg.model_name_or_path} has no config.json. Give the folder of a model.")


# ---- A run -----------------------------------------------------------------------------------------------

def setup(cfg):
    """-> all that a run works with, in one namespace (see its end), and the number of steps already done."""
    import eval_cvbench
    import prepare_sat
    accelerator = make_accelerator(cfg)
    is_main, count = accelerator.is_main_process, accelerator.num_processes
    folder, lock = claim(cfg) if is_main and cfg.resume else (None, None)
    last = checkpoints(Path(cfg.output_dir or RUNS / cfg.preset))[-1:] if cfg.resume else []
    start, done = (last[0], steps_of(last[0])) if last else (cfg.model_name_or_path, 0)
    if done >= cfg.max_steps:
        accelerator.print(f"{start.parent} has done {done} steps of {cfg.max_steps}. There is nothing to do; a "
                          "larger --max_steps takes it further.")
        return None, done
    tokenizer, image_processor = load_processors(start, cfg.max_pixels)
    template = choose_prompt(tokenizer, cfg.prompt)
    if template == "base":
        tokenizer.chat_template = eval_cvbench.SERVED_PROMPT  # for servers; the paper's code saves none
    data_path, data = prepare_sat.load_rows(cfg.data)
    prints = {"data": fingerprint(data_path), "model": fingerprint(cfg.model_name_or_path)}
    for name, value in json.loads((start.parent / "config.json").read_text()).get("fingerprints", {}).items() if done else ():
        if value != prints[name]:
            fail(f"--resume: the run began with another {name}. Give the old one, or start a new run.")
    if cfg.algorithm == "sft" and "completion" not in data.column_names:
        template = template.removesuffix("-direct") + "-direct"  # nothing but the answer to learn
    kept = prepare_sat.rows_that_fit(data, data_path, template, tokenizer, image_processor,
                                     cfg.max_prompt_length, need_image=count > 1)  # all run the image tower
    eval_sets = eval_cvbench.load_sets(cfg.eval_data, cfg.eval_limit) if cfg.eval_steps else {}
    policy, sampler, reference, optimizer = build_models(cfg, start, accelerator, tokenizer)
    if is_main and not cfg.resume:
        folder, lock = claim(cfg)
    folder, = broadcast_object_list([folder])
    run = SimpleNamespace(
        cfg=cfg, accelerator=accelerator, output_dir=folder, lock=lock, tokenizer=tokenizer,
        image_processor=image_processor, template=template, data=data, data_path=data_path, kept=kept,
        policy=policy, sampler=sampler, reference=reference, optimizer=optimizer, eval_sets=eval_sets,
        fingerprints=prints)
    if done:
        load_optimizer(start, run)
    if is_main:
        eval_cvbench.open_logs(run, done)
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.init_trackers("grpo_vision", config=asdict(cfg))
    accelerator.print(
        f"{folder}: {sampler.num_parameters() / 1e6:.1f}M parameters, {len(kept)} questions, prompt: {template}, "
        f"steps {done + 1} to {cfg.max_steps}\n{count} x {accelerator.device.type}, "
        f"{'FSDP2' if is_sharded() else 'no wrapper'}, weights float32, computing in "
        f"{'bf16' if accelerator.mixed_precision == 'bf16' else 'float32'}, attention: {cfg.attn_implementation}")
    return run, done


def main(argv=None):
    import eval_cvbench  # draws and evaluates; it imports this module, so not before this module is whole
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process, and meant so
    cfg = parse_config(argv)
    run, done = setup(cfg)
    if run is None:
        return
    if cfg.eval_steps and not done:
        eval_cvbench.evaluate_policy(run, 0)
    stop_asked = []  # Ctrl-C and SIGTERM let the step end and save; a second one ends the program
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (stop_asked.append(1), signal.signal(number, signal.SIG_DFL)))

    for step in tqdm(range(done, cfg.max_steps), "training", initial=done, total=cfg.max_steps,
                     disable=not run.accelerator.is_main_process):
        metrics, samples = train_step(run, cfg, step)
        eval_cvbench.log_step(run, metrics, samples)  # which ends the run, if the gradient is not finite
        last = step + 1 == cfg.max_steps
        stopping = largest(len(stop_asked))
        if cfg.eval_steps and ((step + 1) % cfg.eval_steps == 0 or last):
            eval_cvbench.evaluate_policy(run, step + 1)
        if (step + 1) % cfg.save_steps == 0 or last or stopping:
            save_checkpoint(run, step + 1)
            eval_cvbench.show(run)
        if stopping and not last:
            run.accelerator.print(f"stopped after step {step + 1}, which is saved; go on as you started, "
                                  f"with --resume --output_dir {run.output_dir}")
            return run.accelerator.end_training()
    save_model(run.output_dir / "final", run)
    run.accelerator.end_training()
    eval_cvbench.report_run(run)


if __name__ == "__main__":
    import grpo_vision  # by its own name: what imports it later (prepare_sat) gets this module, not a copy
    grpo_vision.main()
