"""Visual R1-Zero in one file: GRPO on Qwen2-VL, as in VisualThinker-R1-Zero (arXiv 2503.05132).

The policy pi is a language model. Asked about an image, it gives each possible completion a probability, and
a rule gives each completion a reward R. Training raises the expected reward J:

    J      = E[R]                over completions sampled from pi
    grad J = E[R grad log pi]    since grad pi = pi grad log pi
    grad J = E[A grad log pi]    with A = R - b, for any constant b, since E[grad log pi] = 0

With b = the group's mean R, the noise is less. So this is maximum likelihood with a signed weight: sample a
group of completions of a question, and push the tokens of each up or down as it did better or worse than its
group. GRPO: Group Relative Policy Optimization. R1-Zero: starting from a base model, by rewards alone.

One training step, as in `train_step` and the sections below:

  1. Draw B questions, each with its image, and put each into the prompt template.
  2. Sample G completions of each prompt from the policy: N = B * G completions in all.
  3. Reward each completion by rules:           R_i = accuracy (0 or 1) + format (0 or 1)
  4. Compare each completion with its group:    A_i = (R_i - mean(R)) / (std(R) + 1e-4)
  5. Score each completion token c_t under the reference, the model before training:
         log pi_ref(c_t | image, prompt, c_<t)
  6. Score it under the policy too, and follow the gradient of the loss:
         ratio = pi / pi_old            kl = pi_ref / pi - log(pi_ref / pi) - 1
         loss  = mean over completions of mean over tokens of
                 [-min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A) + beta kl]
     pi_old is the policy when it first scored these completions. kl keeps the policy near the reference.

A group shares its image and prompt. Sampling, reference and update each encode them once, not G times:

    image, prompt --encode--> keys, values --sample--> G completions --reward--> R --compare--> A
                                   |                                                            |
    policy <--stage 2 of backward--'<--stage 1-- loss <--score under policy and reference-------'

Tensor lines end in their shape: # (N, C). `cfg` holds the settings (`Config`), and `run` what `setup` makes
of them: data, models (`build_models`), optimizer. policy(f, x) is f(model, x), within FSDP's hooks.

    python grpo_vision.py                                             # the toy: a laptop, offline, 3 minutes
    python grpo_vision.py --preset sat                                # Qwen2-VL-2B on SAT, on one GPU
    accelerate launch --num_processes 8 grpo_vision.py --preset sat   # the same, sharded over eight GPUs
"""
import datetime, hashlib, importlib.util, io, json, math, os, random, re
import shlex, shutil, signal, sys, time, warnings
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from types import MethodType, SimpleNamespace
from typing import Literal

import pyarrow.parquet as pq
import torch
import torch.distributed.checkpoint as dcp
import transformers
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from filelock import FileLock
from PIL import Image, ImageOps
from torch.distributed.checkpoint.state_dict import get_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, HfArgumentParser
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import cached_file


def train_step(run, cfg, step):
    """Run the six steps once -> everything they produced, to be logged."""
    clock = [now()]
    # 1. B questions with their images, in the prompt template
    batch = draw_batch(run, cfg, step)
    # 2. G completions of each
    rollout = draw_completions(run, cfg, step, batch)
    clock.append(now())
    # 3. their rewards, by name
    rewards = compute_rewards(cfg, rollout, batch.rows, run.template)
    # 4. their advantages
    advantages = group_advantages(sum(rewards.values()), cfg.num_generations, cfg.scale_rewards)  # (N,)
    # 5. the reference's log-probabilities. With --beta 0 there is neither a reference nor a penalty in step 6
    ref_logps = score_rollout(run.reference, batch.passes, rollout, cfg) if cfg.beta else None    # (N, C)
    clock.append(now())
    # 6. the policy's log-probabilities, the loss and the update
    logps, sums = optimise(run, cfg, step, batch.passes, rollout, advantages, ref_logps)
    clock.append(now())
    return SimpleNamespace(cfg=cfg, batch=batch, rollout=rollout, rewards=rewards, advantages=advantages,
                           ref_logps=ref_logps, logps=logps, sums=sums, clock=clock)


# ---- Step 1: the question, with its images, in the prompt template ---------------------------------------

IMAGE_TOKENS = "<|vision_start|><|image_pad|><|vision_end|>"

# The paper's, verbatim. The base model's ends in <think> and never mentions <answer>. "direct": no reasoning.
TASK = ("A conversation between User and Assistant. The user asks a question about the image, and the "
        "Assistant solves it.")
TEMPLATES = {
    "base": TASK + " The assistant first thinks about the reasoning process in the mind and then provides "
        "the user with the answer.\nUser: {question} \nAssistant: Let me solve this step by step.\n<think>",
    "base-direct": TASK + "\nUser: {question} \nAssistant: ",
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


def render(row, template, tokenizer):
    """A data row in TEMPLATES[template] -> the prompt's text. Images come first, numbered if there are
    several. An instruct prompt is a user turn of the chat template plus an opened assistant turn."""
    n = len(row["images"] or [])
    images = [f"Picture {i + 1}: " * (n > 1) + IMAGE_TOKENS for i in range(n)]
    question = build_question(row["question"], row["options"])
    text = "".join(images) + TEMPLATES[template].format(question=question)
    if template.startswith("base"):
        return text
    turn = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def draw_batch(run, cfg, step):
    """Draw this process's B questions -> their data rows (dicts), images, prompts' texts, and the passes in
    which they are encoded. A pass is n prompts that run through the model together: input_ids (n, P), padded
    on the right; lengths (n,); position_ids (3, n, P), time, height and width; next_position (n,), that of
    the first completion token; the pixels; first, the index of its first prompt."""
    B, rank = cfg.prompts_per_step // run.accelerator.num_processes, run.accelerator.process_index
    rows = draw_rows(run.rows, cfg.seed, step * cfg.prompts_per_step + rank * B, B)
    texts = [render(row, run.template, run.tokenizer) for row in rows]
    images = [[open_image(image, cfg.data) for image in row["images"] or []] for row in rows]
    n = max(1, cfg.encode_tokens // cfg.max_prompt_length)  # no prompt is longer, so a pass has a bound
    passes = [build_prompts(texts[i:i + n], images[i:i + n], run.tokenizer, run.image_processor, run.sampler,
                            first=i) for i in range(0, B, n)]
    return SimpleNamespace(rows=rows, images=images, texts=texts, passes=passes)


# ---- Step 2: encode images and prompts once, and sample G completions of each ----------------------------

def encode(model, prompts):
    """A pass (`build_prompts`) -> each layer's keys and values, [keys of layer 0, values of layer 0, ...],
    each (n, kv_heads, P - 1, head_dim). The last prompt token is left out: it is the first input of each
    completion, where its output predicts the first completion token. Padding needs no mask here: attention is
    causal, so no real token sees the padding to its right."""
    layers = [PromptLayer() for _ in range(model.config.text_config.num_hidden_layers)]
    model.model(input_ids=prompts.input_ids[:, :-1], position_ids=prompts.position_ids[:, :, :-1],
                pixel_values=prompts.pixel_values, image_grid_thw=prompts.image_grid_thw,
                past_key_values=Cache(layers=layers))
    return [x for layer in layers for x in (layer.keys, layer.values)]


def token_logps(model, hidden, temperature):
    """(..., H) hidden states -> (..., V) log-probabilities over the vocabulary. Sampling and scoring share
    temperature and `model.suppressed`, (V,) bool, the tokens that are never sampled. Otherwise the policy
    that is trained would not be the one that was rewarded. (The paper's code scores without temperature.)"""
    logits = model.lm_head(hidden)
    # in place: with a vocabulary of 151,936 these are the largest tensors of all
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)
    # the smallest finite number, not -inf: p * log p must be 0 in the entropy, not nan
    return logits.masked_fill_(model.suppressed, torch.finfo(logits.dtype).min).log_softmax(-1)


@torch.no_grad()
def sample(model, passes, num_generations, limit, temperature, generator=None):
    """Sample G completions of at most `limit` tokens for each prompt -> a rollout. Completion i has prompt
    i // G. completion_ids: (N, C), padded on the right; completion_mask: (N, C) bool, True through the end
    token, which is sampled too; sampling_logps: (N, C), each token's log-probability when it was sampled;
    lengths: (N,) tokens; finished: (N,) bool, False if cut off at the limit. temperature 0: greedy."""
    decoder = Decoder(model, passes, num_generations, limit)
    ends = torch.tensor(model.eos_ids, device=model.device)
    N, dtype = len(decoder.indices), torch.promote_types(model.dtype, torch.float32)
    completion_ids = torch.full((N, limit), model.eos_ids[0], device=model.device)                # (N, limit)
    sampling_logps = torch.zeros((N, limit), dtype=dtype, device=model.device)                    # (N, limit)
    for t in range(limit):
        indices = decoder.indices                        # (L,) of the N completions, those still decoding
        logps = token_logps(model, decoder.step(), temperature or 1.0)                            # (L, V)
        if temperature > 0:
            # inverse-CDF sampling: the first token whose cumulative probability exceeds u, uniform in [0, 1);
            # in float64, as float32 would round away 150,000 unlikely tokens
            cumulative = logps.to(torch.float64, copy=True).exp_().cumsum(-1)                     # (L, V)
            u = torch.rand(len(indices), 1, dtype=torch.float64, device=model.device, generator=generator)
            tokens = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)           # (L, 1)
        else:
            tokens = logps.argmax(-1, keepdim=True)                                               # (L, 1)
        require(t or logps.isfinite().all(), "the model's output is not finite. Its weights hold nan or inf.")
        completion_ids[indices, t] = tokens[:, 0]
        sampling_logps[indices, t] = logps.gather(-1, tokens)[:, 0]
        if not decoder.feed(tokens, torch.isin(tokens[:, 0], ends)):
            break
    # keep up to and with the first end token; mask what the decoder still generated after it
    is_end = torch.isin(completion_ids, ends).int()                                               # (N, limit)
    completion_mask = is_end.cumsum(1) - is_end == 0                                              # (N, limit)
    lengths = completion_mask.sum(1)                                                              # (N,)
    C = int(lengths.max())
    completion_ids.masked_fill_(~completion_mask, model.eos_ids[0])
    sampling_logps.masked_fill_(~completion_mask, 0.0)
    return SimpleNamespace(completion_ids=completion_ids[:, :C], completion_mask=completion_mask[:, :C],
                           sampling_logps=sampling_logps[:, :C], lengths=lengths, finished=is_end.any(1))


def draw_completions(run, cfg, step, batch):
    """Sample G completions per prompt from the policy -> a rollout (see `sample`) with their texts."""
    # set by seed, step and process alone, so a resumed run needs no replay
    seed = random.Random(f"{cfg.seed}/sample/{step}/{run.accelerator.process_index}").getrandbits(63)
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
    """The policy's words, without end tokens. A <think> that ends the prompt is restored here."""
    prefill = re.search(r"(<think>\s*)?$", prompt_text)[0]
    return prefill + tokenizer.decode(completion_ids, skip_special_tokens=True)


def extract_answer(text):
    """Text of the single answer block; None if there is none, or several, or it is empty."""
    blocks = ANSWER_BLOCK.findall(text)
    if len(blocks) != 1 or text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    return blocks[0].strip() or None


def normalise(text):
    text = " ".join(text.lower().split()).removeprefix("final answer:")  # Vision-R1's chains say so
    return text.removesuffix(".").strip()


def choose(answer, options):
    """-> the option `answer` names, by text or letter, or None. Case, spaces, a final full stop and brackets
    around the letter are ignored. It never matches inside other words or numbers.

    >>> choose("Left.", ["right", "left"]), choose("(b)", ["right", "left"]), choose("5", ["15", "3"])
    ('left', 'left', None)
    """
    answer, texts = normalise(answer), [normalise(option) for option in options or []]
    if answer in texts:
        return options[texts.index(answer)]
    letter = re.fullmatch(r"\(?([a-z])\)?", answer)
    return dict(zip("abcdefghijklmnopqrstuvwxyz", options or [])).get(letter[1]) if letter else None


def accuracy_reward(completion, answer, options, template="base", **_):
    """1 if the single answer block names the right option, or without options is the answer; else 0. Under a
    direct template the whole completion is the answer."""
    said = completion if template.endswith("-direct") else extract_answer(completion)
    named = [said, choose(said, options)] if said else []
    return float(any(text is not None and normalise(text) == normalise(answer) for text in named))


def format_reward(completion, **_):
    """1 if the completion is exactly one think block and then one non-empty answer block; else 0."""
    one_think_block = completion.count("<think>") == completion.count("</think>") == 1
    one_answer_block = extract_answer(completion) is not None
    return float(one_think_block and one_answer_block and bool(WELL_FORMED.fullmatch(completion)))


# name -> function(completion, num_tokens, max_completion_length, template, **the data row) -> float
REWARDS = {"accuracy": accuracy_reward, "format": format_reward}


def compute_rewards(cfg, rollout, rows, template):
    """The rollout's N completions of B data rows -> {name of a reward: (N,) float32}."""
    rewards, G = {}, len(rollout.texts) // len(rows)
    for name in cfg.rewards.split(","):
        told = dict(template=template, max_completion_length=cfg.max_completion_length)
        values = [REWARDS[name](**rows[i // G] | told | dict(completion=text, num_tokens=length))
                  for i, (text, length) in enumerate(zip(rollout.texts, rollout.lengths.tolist()))]
        bad = [x for x in values if not (isinstance(x, (int, float)) and abs(x) < 1e38)]  # nan is not < 1e38
        require(not bad, f"the reward {name} must be a finite number for each completion, and was {bad[:1]}")
        rewards[name] = torch.tensor(values, dtype=torch.float32, device=rollout.lengths.device)  # (N,)
    return rewards


# ---- Step 4: the advantages, each completion against its own group ---------------------------------------

def group_advantages(rewards, num_generations, scale_rewards=True):
    """(N,) rewards -> (N,) advantages A = (R - mean) / (std + 1e-4) per group, with the unbiased std.

    >>> group_advantages(torch.tensor([0.0, 2, 1, 0, 0, 1, 1, 1]), num_generations=8)
    tensor([-1.0605,  1.7675,  0.3535, -1.0605, -1.0605,  0.3535,  0.3535,  0.3535])

    Subtracting the group's mean keeps the direction of the expected gradient and reduces its noise
    (DeepSeekMath, arXiv 2402.03300, 4.1.2; the 1e-4 is from the paper's code). scale_rewards=False uses
    A = R - mean, as a small std makes A large where nearly all are right or wrong (Dr. GRPO, 2503.20783)."""
    R = rewards.view(-1, num_generations)                                                         # (B, G)
    # A = (R - mean(R)) / (std(R) + 1e-4)
    A = R - R.mean(1, keepdim=True)                                                               # (B, G)
    if scale_rewards:
        A = A / (R.std(1, keepdim=True) + 1e-4)                                                   # (B, G)
    has_spread = R.amax(1, keepdim=True) > R.amin(1, keepdim=True)  # std > 0 could be rounding     (B, 1)
    return torch.where(has_spread, A, 0.0).view(-1)                                               # (N,)


# ---- Step 5: the log-probability of each completion token ------------------------------------------------

def score(model, prompts, prompt_kv, group, completion_ids, completion_mask, cfg):
    """Log-probabilities and entropy of the tokens of K completions, each (K, C), 0 where masked.
    prompt_kv: from `encode`. group: (K,), the index of each completion's prompt among the pass's n. A
    completion attends to its prompt's keys and values, to which `PromptLayer` appends its own:

        [ prompt without its last token | padding | last prompt token, c_1, ..., c_C-1 ]
          from `encode`                   masked    the inputs, whose outputs predict c_1, ..., c_C

    transformers adds the causal mask, so padding on the right is harmless."""
    (K, C), P, device = completion_ids.shape, prompts.input_ids.shape[1], completion_ids.device
    last = prompts.lengths[group][:, None] - 1                                                    # (K, 1)
    inputs = torch.cat([prompts.input_ids[group].gather(1, last), completion_ids[:, :-1]], 1)     # (K, C)
    positions = prompts.next_position[group][:, None] - 1 + torch.arange(C, device=device)        # (K, C)
    is_prompt = torch.arange(P - 1, device=device) < last                                         # (K, P - 1)
    visible = torch.cat([is_prompt, torch.ones_like(completion_mask)], 1)                     # (K, P - 1 + C)
    layers = [PromptLayer(*kv, group) for kv in zip(prompt_kv[::2], prompt_kv[1::2])]
    model.set_attn_implementation(cfg.attn_implementation)  # `Decoder` sets its own
    hidden = model.model(input_ids=inputs, position_ids=positions.expand(3, K, C), attention_mask=visible,
                         past_key_values=Cache(layers=layers)).last_hidden_state                  # (K, C, H)

    def chosen(hidden, tokens):  # (T, H), (T,)
        logps = token_logps(model, hidden, cfg.temperature)                                       # (T, V)
        with torch.no_grad():
            entropy = -logps.exp().mul_(logps).sum(-1)                                            # (T,)
        return logps.gather(-1, tokens[:, None])[:, 0], entropy

    # in pieces, computed again in the backward: only 2048 tokens' log-probabilities exist at a time
    pieces = zip(hidden[completion_mask].split(2048), completion_ids[completion_mask].split(2048))
    found = [checkpoint(chosen, *piece, use_reentrant=False) for piece in pieces]
    logps, entropy = (torch.cat(parts) for parts in zip(*found))                                  # (T,)
    blank = torch.zeros(K, C, dtype=logps.dtype, device=device)
    return blank.masked_scatter(completion_mask, logps), blank.masked_scatter(completion_mask, entropy)


@torch.no_grad()
def score_rollout(policy, passes, rollout, cfg):
    """-> (N, C) log-probabilities of the rollout's tokens under any policy, such as the reference."""
    logps = torch.zeros_like(rollout.sampling_logps)                                              # (N, C)
    for prompts in passes:
        prompt_kv = policy(encode, prompts)
        for indices, group, ids, mask in chunks(prompts, rollout, cfg):
            logps[indices, :ids.shape[1]] = policy(score, prompts, prompt_kv, group, ids, mask, cfg)[0]
    return logps


# ---- Step 6: the loss, and its gradient ------------------------------------------------------------------

def weigh_tokens(lengths, finished, cfg):
    """(N,) lengths and finished of the step's completions -> (N,) the weight of each completion's tokens."""
    kept = finished if cfg.mask_truncated_completions else torch.ones_like(finished)
    # a dropped completion has no tokens and no weight; 1e-9 only keeps the division finite
    lengths = (lengths.double() * kept).clamp(min=1e-9)
    if cfg.loss_type == "grpo":  # mean over completions of mean over tokens: a long one's tokens count less
        return kept / (len(lengths) * lengths)
    if cfg.loss_type == "dapo":  # mean over all tokens, as in TRL (DAPO, arXiv 2503.14476: of a group)
        return kept / lengths.sum()
    # dr_grpo: sum over tokens / a constant, which favours no length (arXiv 2503.20783)
    return kept / (len(lengths) * cfg.max_completion_length)


def grpo_loss(per_token_logps, old_per_token_logps, ref_per_token_logps, advantages, token_weights,
              completion_mask, epsilon, epsilon_high, beta):
    """Return the loss of K completions (arXiv 2402.03300, eq. 3) and, to log, kl and a clip mask, (K, C).
    *_logps, completion_mask: (K, C); advantages, token_weights: (K,).

    While pi is pi_old, the ratio is 1 and its gradient is that of log pi: every token is pushed up or down by
    its A. In a further update on the same rollout (num_iterations > 1) the samples are pi_old's. The mean of
    ratio A over them is that of A over pi, a fair estimate while the ratio is near 1. So the clip stops
    pushing a token that moved by epsilon in A's direction. The min still pushes one that moved against it."""
    A = advantages[:, None]                                                                       # (K, 1)
    # ratio = pi / pi_old
    ratio = (per_token_logps - old_per_token_logps).exp()                                         # (K, C)
    # -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A)
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))   # (K, C)
    per_token_loss = -torch.min(ratio * A, clipped * A)                                           # (K, C)
    # kl = pi_ref / pi - log(pi_ref / pi) - 1, called k3, never negative. Over tokens of pi its value averages
    # KL(pi || pi_ref), its gradient that of KL(pi_ref || pi): autograd does not see that pi also samples
    kl = torch.zeros_like(ratio)
    if beta > 0:
        log_ref_over_pi = ref_per_token_logps - per_token_logps                                   # (K, C)
        kl = log_ref_over_pi.exp() - log_ref_over_pi - 1                                          # (K, C)
        per_token_loss = per_token_loss + beta * kl                                               # (K, C)
    # loss = sum over completions of token_weights * sum over tokens
    per_completion = (per_token_loss * completion_mask).sum(1)                                    # (K,)
    return (per_completion * token_weights).sum(), kl.detach(), clipped * A < ratio * A


def update(policy, passes, rollout, advantages, token_weights, ref_logps, old_logps, cfg):
    """Accumulate the gradient of the step's loss in the policy, in two stages:

    1. Each chunk of completions runs forward and backward on the prompts' detached keys and values. That adds
       the completions' part of the gradient to the weights. The prompts' part stops at the detached keys and
       values and adds up there over chunks. Each chunk's graph is freed at once.
    2. One backward carries that sum through prompts and image tower to the weights.

    It is exact: the chain rule, cut at the keys and values. Memory holds the graphs of one pass and one
    chunk. Both are bounded, so memory grows with neither B nor G. advantages, token_weights: (N,). ref_logps,
    old_logps: (N, C). old_logps None: pi_old is pi (the sampler's log-probabilities would bring rounding into
    the ratio). Returns the policy's log-probabilities (N, C), and sums over tokens to log."""
    logps = torch.zeros_like(rollout.sampling_logps)                                              # (N, C)
    sums = dict.fromkeys(("loss", "entropy", "kl", "clip_ratio"), 0.0)
    for prompts in passes:
        prompt_kv = policy(encode, prompts)
        # the sum over chunks is kept in float32, whatever the keys and values are computed in
        leaves = [x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
                  for x in prompt_kv]                                # each (n, kv_heads, P - 1, head_dim)
        for indices, group, ids, mask in chunks(prompts, rollout, cfg):
            C = ids.shape[1]
            leaf_kv = [leaf.to(x.dtype) for leaf, x in zip(leaves, prompt_kv)]  # freed with the chunk's graph
            new, entropy = policy(score, prompts, leaf_kv, group, ids, mask, cfg)                 # (K, C)
            old = new.detach() if old_logps is None else old_logps[indices, :C]                   # (K, C)
            ref = ref_logps[indices, :C] if cfg.beta > 0 else None                                # (K, C)
            loss, kl, is_clipped = grpo_loss(new, old, ref, advantages[indices], token_weights[indices],
                                             mask, cfg.epsilon, cfg.epsilon_high, cfg.beta)
            loss.backward()                                                                       # stage 1
            logps[indices, :C] = new.detach()
            found = dict(loss=loss, entropy=entropy, kl=kl * mask, clip_ratio=is_clipped * mask)
            sums = {name: sums[name] + found[name].sum().item() for name in sums}
        if prompt_kv[0].requires_grad:  # with --freeze llm, prompts without an image have nothing to train
            gradients = [leaf.grad.to(x.dtype) for x, leaf in zip(prompt_kv, leaves)]
            torch.autograd.backward(prompt_kv, gradients)                                         # stage 2
    return logps, sums


def optimise(run, cfg, step, passes, rollout, advantages, ref_logps):
    """Update the weights num_iterations times -> the policy's log-probabilities before that (N, C), and sums
    and the gradient norm, to log. A norm that is not finite skips its update and ends the loop."""
    gather, count = run.accelerator.gather, run.accelerator.num_processes
    everyones = weigh_tokens(gather(rollout.lengths), gather(rollout.finished), cfg).chunk(count)
    # * count: because the gradients of the processes are averaged
    weights = count * everyones[run.accelerator.process_index].to(rollout.sampling_logps)         # (N,)
    decay = 1 - step / cfg.max_steps if cfg.lr_scheduler_type == "linear" else 1
    run.optimizer.param_groups[0]["lr"] = cfg.learning_rate * decay
    old_logps = None  # in the first update pi_old is pi itself
    for _ in range(cfg.num_iterations):
        logps, sums = update(run.policy, passes, rollout, advantages, weights, ref_logps, old_logps, cfg)
        old_logps = logps if old_logps is None else old_logps                                     # (N, C)
        sums["grad_norm"] = step_optimizer(run, cfg)
        if not math.isfinite(sums["grad_norm"]):
            break
    mismatch = ((old_logps - rollout.sampling_logps) * rollout.completion_mask).abs()             # (N, C)
    sums |= dict(sampler_mismatch=mismatch.sum().item(), sampler_mismatch_max=mismatch.max().item())
    return old_logps, sums


# ==== The algorithm ends here. What follows is the supporting code ========================================
# Of what was used above, `build_prompts`, `chunks`, `PromptLayer` and `Decoder` come first.

def build_prompts(texts, images, tokenizer, image_processor, model, first=0):
    """n texts from `render`, n lists of PIL images, which may be empty -> a pass (see `draw_batch`), on the
    model's device. Positions are M-RoPE's (multimodal rotary position embedding): time, height, width. For
    text all three are equal; h x w image tokens advance the position by max(h, w)."""
    flat, tokens = sum(images, []), iter(())
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
    """Split a pass's completions into chunks, shortest first. A chunk is one completion, or as many as fit
    into score_tokens tokens when padded; it may mix groups. Yields their indices in the rollout (K,),
    those of their prompts among the n (K,), completion_ids and completion_mask (K, C)."""
    G, lengths, found = cfg.num_generations, rollout.lengths.tolist(), [[]]
    first = prompts.first * G
    for index in sorted(range(first, first + len(prompts.lengths) * G), key=lengths.__getitem__):
        if found[-1] and (len(found[-1]) + 1) * lengths[index] > cfg.score_tokens:
            found.append([])
        found[-1].append(index)
    # a sharded model needs every process at each call, so one with fewer chunks first runs masked ones
    masked = max(gather_object([len(found)])) - len(found)
    for number, chunk in enumerate(masked * [found[0][:1]] + found):
        indices, C = torch.tensor(chunk, device=rollout.lengths.device), lengths[chunk[-1]]       # (K,)
        mask = rollout.completion_mask[indices, :C] & (number >= masked)
        yield indices, indices // G - prompts.first, rollout.completion_ids[indices, :C], mask


class PromptLayer(DynamicLayer):
    """A layer of the cache. Encoding stores keys and values. Scoring (group: (K,), as in `score`) prepends
    the prompts' to the new ones and stores nothing, since checkpointing calls it twice."""
    def __init__(self, keys=None, values=None, group=None):
        super().__init__()
        self.keys, self.values, self.group, self.is_initialized = keys, values, group, keys is not None

    def update(self, keys, values, *args, **kwargs):
        if self.group is None:
            self.keys, self.values = keys, values
            return keys, values
        return torch.cat([self.keys[self.group], keys], 2), torch.cat([self.values[self.group], values], 2)


class Decoder:
    """Decodes N completions in parallel, one token per `step`. One completion's part of the cache:

        [ prompt without its last token | padding | last prompt token, c_1, c_2, ... | not yet written ]

    Every step attends to all of it behind a mask, so no shape changes and a GPU can record the step as a CUDA
    graph and replay it: launching its thousand kernels one by one is slower than running them."""
    def __init__(self, model, passes, num_generations, room):
        model.set_attn_implementation("sdpa")  # the one that accepts the mask
        encoded, self.model, self.graph = [encode(model, prompts) for prompts in passes], model, None
        longest = max(prompt_kv[0].shape[2] for prompt_kv in encoded)                             # P - 1
        room += 8 - (longest + room) % 8  # a GPU copies a mask at each use unless 8 divides its row length
        repeat = lambda parts: torch.cat(parts).repeat_interleave(num_generations, 0)
        pad = lambda x: torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[2]))
        kv = [repeat([pad(x) for x in parts]) for parts in zip(*encoded)]     # (N, kv_heads, P - 1, head_dim)
        self.layers = [StaticLayer(longest + room) for _ in kv[::2]]
        for layer, keys, values in zip(self.layers, kv[::2], kv[1::2]):
            layer.update(keys, values)
        lengths = repeat([prompts.lengths for prompts in passes])[:, None]                        # (N, 1)
        self.tokens = repeat([p.input_ids.gather(1, p.lengths[:, None] - 1) for p in passes])     # (N, 1)
        self.positions = repeat([prompts.next_position for prompts in passes])[:, None] - 1       # (N, 1)
        self.place = torch.tensor([longest], device=model.device)  # where the next keys and values go
        places = torch.arange(longest + room, device=model.device)
        seen = (places < lengths - 1) | (places == longest)                              # (N, longest + room)
        mask = torch.full(seen.shape, torch.finfo(model.dtype).min, dtype=model.dtype, device=model.device)
        self.mask = mask.masked_fill_(seen, 0)[:, None, None]                      # (N, 1, 1, longest + room)
        self.indices = torch.arange(len(seen), device=model.device)                               # (N,)
        self.running = self.indices >= 0                                                          # (N,)

    def step(self):
        """-> (L, H) hidden states from which to sample the next token."""
        if self.model.device.type != "cuda":
            return self.forward()
        if self.graph is None:
            self.forward()  # libraries set themselves up on first use, outside the recording
            for layer in self.layers:
                layer.cumulative_length.copy_(self.place[0])  # the replay overwrites these entries
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads continue
                self.hidden = self.forward()
        self.graph.replay()
        return self.hidden

    def forward(self):
        output = self.model.model(input_ids=self.tokens, position_ids=self.positions.expand(3, -1, -1),
                                  past_key_values=Cache(layers=self.layers), attention_mask=self.mask)
        return output.last_hidden_state[:, -1]

    def feed(self, tokens, ended):
        """tokens: (L, 1), the next step's input. ended: (L,) bool. -> whether any completion is left. Ended
        ones are dropped once they are a tenth of all; on a GPU half, as that needs a new graph."""
        self.tokens.copy_(tokens)
        self.positions += 1
        self.place += 1
        self.mask.index_fill_(3, self.place, 0)
        self.running &= ~ended
        left = int(self.running.sum())
        if 0 < left <= (0.5 if self.graph else 0.9) * len(self.indices):
            keep, self.graph = self.running, None
            for name in "indices", "tokens", "positions", "mask", "running":
                setattr(self, name, getattr(self, name)[keep])
            for layer in self.layers:
                layer.keys, layer.values = layer.keys[keep], layer.values[keep]
        return left > 0


# ---- Models, and the float32 weights that the optimizer moves, sharded over several processes ------------

# The base prompt as a chat template, for servers. It names no roles, or it would make an instruct model.
SERVED_PROMPT = (
    "{%- set said = messages[-1].content -%}{%- for part in said if part.type == 'image' -%}"
    "{% if loop.length > 1 %}Picture {{ loop.index }}: {% endif %}" + IMAGE_TOKENS + "{%- endfor -%}"
    + TEMPLATES["base"].replace("{question}", "{{ said if said is string else said | selectattr('text', "
                                "'defined') | map(attribute='text') | join }}"))


def load_processors(path, max_pixels=None):
    """-> tokenizer, image processor (PIL's: no torchvision needed). max_pixels None: the files' value."""
    with explained(f"cannot load tokenizer and image processor from {path}"):
        tokenizer = AutoTokenizer.from_pretrained(path)
        old = cached_file(path, "chat_template.json", _raise_exceptions_for_missing_entries=False)
        if old and not tokenizer.chat_template:  # where some published folders have it
            tokenizer.chat_template = json.loads(Path(old).read_text())["chat_template"]
        limits = {"max_pixels": max_pixels} if max_pixels else {}
        return tokenizer, Qwen2VLImageProcessorPil.from_pretrained(path, **limits)


def load_model(path, tokenizer, attn_implementation="sdpa", dtype=torch.float32):
    """Folder or hub id -> a Qwen-VL with two extra attributes. eos_ids: tokens that end a completion, the
    tokenizer's first. suppressed, (V,) bool: other special tokens, and vocabulary rows without a token."""
    with explained(f"cannot load a model from {path}"):
        config, families = AutoConfig.from_pretrained(path), ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
        require(config.model_type in families, f"{path} is a {config.model_type} model, none of {families}")
        require(not hasattr(config, "quantization_config"), f"{path} is quantised. Take the bf16 model.")
        require(not Path(path, "adapter_config.json").exists(), f"{path} has an adapter. Merge it first.")
        whole = not getattr(config.text_config, "use_sliding_window", False)
        require(whole, f"{path} uses a sliding window, which the decoder does not support")
        model, report = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True)
    faults = [*sorted(report["missing_keys"]), *sorted(report["unexpected_keys"])]
    faults += ["<|image_pad|>"] * (tokenizer.convert_tokens_to_ids("<|image_pad|>") != config.image_token_id)
    require(not faults, f"{path}: config.json, weights and tokenizer disagree: {faults[:1]}")
    tied = model.lm_head.weight is model.get_input_embeddings().weight  # config.json may say otherwise
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = tied
    ends = [tokenizer.eos_token, *(x for x in ("<|endoftext|>", "<|im_end|>") if x in tokenizer.get_vocab())]
    model.eos_ids = tokenizer.convert_tokens_to_ids(list(dict.fromkeys(ends)))
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    suppressed = torch.arange(model.lm_head.out_features) >= len(tokenizer)                       # (V,)
    suppressed[list(special - set(model.eos_ids))] = True
    model.register_buffer("suppressed", suppressed, persistent=False)
    # cuDNN's attention sets up again for each shape, and its masked gradients can be nan (pytorch 196678)
    torch.backends.cuda.enable_cudnn_sdp(False)
    if model.num_parameters() < 1e7:
        torch.set_num_threads(1)  # more would only wait; with one, every launcher gives the same bits
    return fast_vision(model).eval()


def fast_vision(model):
    """Embed patches by a matrix product (stride = kernel), as Conv3d's backward is slow -> the model"""
    def embed_patches(self, pixels):
        weight = self.proj.weight.flatten(1)                                       # (dim, numbers of a patch)
        return torch.nn.functional.linear(pixels.to(weight.dtype), weight, self.proj.bias)   # (patches, dim)

    embed = model.model.visual.patch_embed
    embed.forward = MethodType(embed_patches, embed)  # a method: a deepcopy of the model uses its own weights
    return model


def choose_prompt(tokenizer, prompt="auto"):
    """-> name of a template. auto, direct: instruct's if the chat template knows roles, else base's."""
    roles = "role" in (tokenizer.chat_template or "")
    require(roles or not prompt.startswith("instruct"), f"--prompt {prompt}: no chat template with roles")
    kind = "instruct" if roles else "base"
    return {"auto": kind, "direct": f"{kind}-direct"}.get(prompt, prompt)


class Policy(torch.nn.Module):
    """Calls the model only through `forward`, where FSDP's hooks run."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *arguments):
        return function(self.model, *arguments)


def checkpoint_layers(model):
    """Recompute each layer in the backward. transformers' own switch would disable the cache."""
    for layer in [*model.model.language_model.layers, *model.model.visual.blocks]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def compute_dtype(device):
    """float32 on a CPU, bfloat16 on a GPU."""
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    require(has_bf16, "this GPU has no bfloat16. Take an Ampere or newer, or the CPU: ACCELERATE_USE_CPU=1.")
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def build_models(run, cfg, start):
    """Load the folder or hub id `start` into `run`:

    master     the float32 weights for AdamW, as bf16 would round away updates of 1e-6
    sampler    a plain model with these weights in `compute_dtype`, which writes the completions
    policy     what is scored and trained. One process: the sampler, so that what samples is what is trained;
               master never runs. Several: master, sharded, whose layers compute in `compute_dtype`.
    reference  the model before training in `compute_dtype`; None if beta is 0
    With one process in float32 the first three are one model."""
    device, sharded = run.accelerator.device, run.accelerator.num_processes > 1
    dtype = compute_dtype(device)
    load = lambda path, dtype: load_model(path, run.tokenizer, cfg.attn_implementation, dtype)
    run.master = Policy(load(start, torch.float32).to("cpu" if cfg.cpu_offload else device))
    is_copy = sharded or dtype != torch.float32
    run.sampler = load(start, dtype).to(device) if is_copy else run.master.model
    run.policy = Policy(run.sampler) if is_copy and not sharded else run.master
    run.reference = Policy(load(cfg.model_name_or_path, dtype).to(device)) if cfg.beta else None
    for model in run.master.model, run.sampler:
        towers = dict(none=[], vision=[model.model.visual], llm=[model.model.language_model, model.lm_head])
        for tower in towers[cfg.freeze]:
            tower.requires_grad_(False)  # called; the paper's code assigns to the name, which freezes nothing
    if run.policy is not run.master:
        sum_gradients(run.sampler, run.master, cfg.cpu_offload)
    if cfg.gradient_checkpointing:
        checkpoint_layers(run.policy.model)


def check_launch():
    """Stop if a launcher's variables would make each process train alone, or without FSDP2."""
    switched_on = [name for name, value in os.environ.items() if value.lower() not in ("", "0", "false")]
    other = [name for name in switched_on if re.match("ACCELERATE_USE_(?!CPU$|FSDP$)", name)]
    require(not other, f"{other} is set. This program uses FSDP2: unset it, or start with torchrun.")
    signs = "MASTER_ADDR RANK LOCAL_RANK PMI_SIZE OMPI_COMM_WORLD_SIZE MV2_COMM_WORLD_SIZE".split()
    alone = [name for name in signs if os.environ.get(name, "1") != "1"]
    count = os.environ.get("WORLD_SIZE", "not set" if alone else "1")
    require(count.isdigit(), f"WORLD_SIZE is {count}, with {alone} set: each process would train alone. "
            "Start with torchrun or accelerate launch --multi_gpu; for a single process, unset it.")


def make_accelerator(cfg):
    """-> Accelerator for GPUs or the CPU (not a Mac's "mps"), with the process group that sharding needs."""
    check_launch()
    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"  # gloo: the CPU clips offloaded gradients
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision="no", log_with=cfg.report_to, project_dir=RUNS)
    require(accelerator.log_with or not cfg.report_to, f"--report_to: pip install {cfg.report_to}")
    fits = cfg.prompts_per_step % accelerator.num_processes == 0
    require(fits, f"--prompts_per_step: give a multiple of the {accelerator.num_processes} processes")
    return accelerator


def shard(run, cfg):
    """Shard weights, gradients and optimizer state, in float32, over the processes (FSDP2).
    Layers compute in `compute_dtype`; gradients are summed in float32. (accelerate's "bf16" sums in bf16.)"""
    state, dtype = run.accelerator.state, compute_dtype(run.accelerator.device)
    precision = MixedPrecisionPolicy(dtype, torch.promote_types(dtype, torch.float32), None, False)
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cfg.cpu_offload else False
    state.distributed_type = DistributedType.FSDP  # by hand: accelerate's argument would give a CPU DDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
        transformer_cls_names_to_wrap=sorted(run.master.model._no_split_modules),
        mixed_precision_policy=precision, cpu_offload=offload)

    def lead_on(module, inputs, output):
        """FSDP gathers a layer's weights for its backward when the gradient of its output arrives. Encoded
        prompts do not use the last layer's output, so 0 * output is added to what they do use."""
        for layer in output.past_key_values.layers:
            layer.values = layer.values + 0 * output.last_hidden_state[0, 0, 0]
    run.master.model.model.language_model.register_forward_hook(lead_on)
    run.master, optimizer = run.accelerator.prepare(run.master, run.optimizer)
    run.policy, run.optimizer = run.master, optimizer.optimizer  # unwrapped, for torch.distributed.checkpoint


def sum_gradients(model, master, cpu_offload):
    """Sum the gradients of several backwards in float32: when one leaves a gradient on a weight of `model`,
    add it to the gradient of master's weight, and free it. It goes to the CPU through one pinned buffer."""
    largest = max(master.parameters(), key=torch.numel)
    buffer = torch.empty_like(largest, pin_memory=torch.cuda.is_available()).view(-1) if cpu_offload else None

    def add(own, weight):
        gradient, weight.grad = weight.grad.to(own.dtype), None
        if cpu_offload:
            gradient = buffer[:gradient.numel()].view_as(gradient).copy_(gradient)
        own.grad = torch.zeros_like(own) if own.grad is None else own.grad
        own.grad += gradient

    for weight, own in zip(model.parameters(), master.parameters(), strict=True):
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(partial(add, own))


def step_optimizer(run, cfg):
    """Clip the gradient, update the float32 weights if it is finite, refresh the sampler -> the raw norm."""
    norm = torch.nn.utils.clip_grad_norm_(run.master.parameters(), cfg.max_grad_norm or math.inf)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # sharded
    if math.isfinite(norm):
        run.optimizer.step()
    # the sums of `sum_gradients` keep their memory: touching new CPU memory takes longer than adding
    run.optimizer.zero_grad(set_to_none=run.policy is run.master)
    refresh(run.sampler, run.master)
    return norm


@torch.no_grad()
def refresh(sampler, master):
    """Copy the float32 weights, sharded or not, into the sampler, which may round them to bf16."""
    for copy, weight in zip(sampler.parameters(), master.parameters(), strict=True):
        if hasattr(weight, "full_tensor"):  # sharded
            weight = weight.to(copy.device).full_tensor()
        copy.copy_(weight)  # nothing happens where both are one


# ---- Training data ---------------------------------------------------------------------------------------

MARK = b"grpo_vision"  # in the metadata of a Parquet file that prepare_sat.py has written and checked


def open_image(image, where):
    """{"bytes", "path"} -> RGB PIL image, upright, white where transparent. where: named if unreadable"""
    with explained(f"{where}: an image cannot be read"):
        picture = Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"])
        require(not picture.mode.startswith(("I", "F")), f"{where}: greys deeper than 8 bits cannot be read")
        picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def read_rows(run, path):
    """Read a file from prepare_sat.py -> the rows (dicts) whose prompts have at most max_prompt_length
    tokens, images included. Only the headers of the images are read."""
    kept, limit = [], run.cfg.max_prompt_length
    with explained(f"--data {path} cannot be read"):
        table = pq.read_table(path)
    require(MARK in (table.schema.metadata or {}), f"{path}: first run prepare_sat.py --from {path}")
    for index, row in enumerate(tqdm(table.to_pylist(), "measuring prompts", leave=False)):
        sizes = [Image.open(io.BytesIO(image["bytes"])).size for image in row["images"] or []]
        require(sizes or run.accelerator.num_processes == 1, f"{path}, row {index}: no image. Use 1 process")
        patches = sum(run.image_processor.get_number_of_image_patches(*size[::-1]) for size in sizes)
        tokens = len(run.tokenizer(render(row, run.template, run.tokenizer)).input_ids) - len(sizes)
        if tokens + patches // run.image_processor.merge_size**2 <= limit:
            kept.append(row | {"row": index})
    require(kept, f"--max_prompt_length {limit}: every prompt of {path} is longer. Raise it.")
    run.accelerator.print(f"{path}: {len(kept)} of {table.num_rows} prompts have at most {limit} tokens")
    return kept


def draw_rows(rows, seed, first, count):
    """-> `count` rows from place `first` of an endless walk, shuffled anew in each epoch. It has no state."""
    n, places = len(rows), range(first, first + count)
    epochs = {place // n for place in places}
    walks = {epoch: random.Random(f"{seed}/epoch/{epoch}").sample(range(n), n) for epoch in epochs}
    return [rows[walks[place // n][place % n]] for place in places]


# ---- What a step measured, and the files of a run --------------------------------------------------------

def log_step(run, step, came):
    """Append what a step measured, over all processes, to metrics.jsonl, and print a line; make came.samples,
    the step's completions as records. A gradient that is not finite ends the run."""
    rollout, G = came.rollout, came.cfg.num_generations
    parts = {f"rewards/{name}": values.tolist() for name, values in came.rewards.items()}
    columns = parts | dict(
        reward=[*map(sum, zip(*parts.values()))], advantage=came.advantages.tolist(),
        completion=rollout.texts, length=rollout.lengths.tolist(), finished=rollout.finished.tolist(),
        prompt=[text for text in came.batch.texts for _ in range(G)],
        row=[row["row"] for row in came.batch.rows for _ in range(G)])
    samples = gather_object([dict(zip(columns, values), step=step) for values in zip(*columns.values())])
    came.samples, sums = samples, gather_object([came.sums])
    average = lambda name: mean(sample[name] for sample in samples)
    groups = [samples[i:i + G] for i in range(0, len(samples), G)]
    tokens = sum(sample["length"] for sample in samples)
    metrics = {"step": step, **{x: mean(part.pop(x) for part in sums) for x in ("loss", "grad_norm")},
               "sampler_mismatch_max": max(part.pop("sampler_mismatch_max", 0) for part in sums),
               **{name: sum(part[name] for part in sums) / tokens for name in sums[0]},
               "reward": average("reward"), **{name: average(name) for name in parts},
               **{f"{name}/best": mean(max(s[name] for s in group) for group in groups) for name in parts},
               "reward_std": mean(stdev(s["reward"] for s in group) if G > 1 else 0.0 for group in groups),
               "frac_reward_zero_std": mean(len({s["reward"] for s in group}) == 1 for group in groups),
               "completions/mean_length": tokens / len(samples),
               "completions/clipped_ratio": 1 - average("finished"),
               "learning_rate": run.optimizer.param_groups[0]["lr"],
               **{f"seconds/{name}": end - begin for name, begin, end in
                  zip(("rollout", "reference", "update"), came.clock, came.clock[1:])}}
    if not math.isfinite(metrics["grad_norm"]):
        append_jsonl(run.output_dir / "bad_batch.jsonl", samples)
        fail(f"step {step}: gradient not finite, see bad_batch.jsonl. Lower --learning_rate, then --resume")
    run.accelerator.log(metrics, step=step)
    if run.accelerator.is_main_process:
        append_jsonl(run.output_dir / "metrics.jsonl", [metrics])
        shown = "reward", *parts, "completions/mean_length", "kl"
        tqdm.write(f"step {step:4d}  " + "  ".join(f"{x.split('/')[-1]} {metrics[x]:.2f}" for x in shown))


def fail(message):
    """Exit (code 1) with one sentence where a traceback would not help the user."""
    raise SystemExit(f"error: {message}")


def require(condition, message):
    if not condition:
        fail(message)


@contextmanager
def explained(what, unfinished=None):
    """Whatever a library raises, end with one sentence, and remove the folder `unfinished`."""
    try:
        yield
    except (Exception, dcp.api.CheckpointException) as error:  # the latter is no Exception
        if unfinished:
            shutil.rmtree(unfinished, ignore_errors=True)
        fail(f"{what}: {(str(error).strip() or type(error).__name__).splitlines()[-1]}")


def now():
    """Seconds, once a GPU has finished its queued work, so that each phase is charged for its own work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def append_jsonl(path, records):
    with explained(f"cannot write {path}. Free space, then the same command; training: --resume"):
        with open(path, "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def checkpoints(output_dir):
    """-> its complete checkpoint-N folders, oldest first; `save` renames them once complete."""
    names = os.listdir(output_dir) if os.path.exists(output_dir) else []
    found = [Path(output_dir, name) for name in names if re.fullmatch(r"checkpoint-\d+", name)]
    return sorted(found, key=lambda path: int(path.name[11:]))


def training_state(run):
    """What resuming needs: the float32 weights, AdamW's state, a digest of the data."""
    weights, optimizer = get_state_dict(run.master, run.optimizer)
    if run.sampler.config.tie_word_embeddings:
        del weights["model.lm_head.weight"]  # the same as the embedding
    return dict(weights=weights, optimizer=optimizer, begun=run.begun)


def spell_as_published(folder):
    """Restore published spellings that transformers 5 changes, so that transformers 4 reads them, too."""
    for file in folder.glob("*config.json"):
        settings = json.loads(file.read_text())
        text = settings.get("text_config", {})
        if rope := text.pop("rope_parameters", None):
            text |= dict(rope_theta=rope.pop("rope_theta"), rope_scaling=rope)
        if special := settings.pop("extra_special_tokens", None):
            settings["additional_special_tokens"] = special
        if size := settings.get("size"):
            settings |= dict(min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"])
        file.write_text(json.dumps(settings, indent=2) + "\n")


def save(folder, run, with_state=False):
    """Write the model as a folder for `from_pretrained` and, in state/, what resuming needs. The folder gets
    its name when it is complete. After that older checkpoints lose their state/."""
    is_main, temporary = run.accelerator.is_main_process, folder.with_name(folder.name + ".tmp")
    with explained(f"cannot save {folder}. No space? Earlier ones are intact, --resume", temporary):
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # left by a run killed while saving
            for part in run.sampler, run.tokenizer, run.image_processor:
                part.save_pretrained(temporary)
            spell_as_published(temporary)
        run.accelerator.wait_for_everyone()
        if with_state:
            dcp.save(training_state(run), checkpoint_id=temporary / "state")
    run.accelerator.wait_for_everyone()
    if is_main:
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        for old in checkpoints(run.output_dir)[:-1]:
            shutil.rmtree(old / "state", ignore_errors=True)
        for old in checkpoints(run.output_dir)[:-(run.cfg.save_total_limit or 10**9)]:
            shutil.rmtree(old)
    run.tell("on_save", folder)


def check_disk(run, cfg, done):
    """Stop if the disk has less room than the rest of the run will take."""
    saves = math.ceil(cfg.max_steps / cfg.save_steps) - done // cfg.save_steps
    models = 1 + min(saves, cfg.save_total_limit or saves)  # with final/
    # state/ has 12 bytes a weight, float32 and AdamW's two moments. A new one is complete before the old goes
    a_weight = models * run.sampler.dtype.itemsize + (1 if done else 2) * 12
    needed, free = run.sampler.num_parameters() * a_weight / 1e9, shutil.disk_usage(run.output_dir).free / 1e9
    require(needed <= free, f"the run saves {needed:.1f} GB, and {run.output_dir} has {free:.1f} GB left. "
            "Free space, lower --save_total_limit, or choose another --output_dir.")


def claim(cfg):
    """-> the run's folder, and a lock on it, so that two runs which start at once get separate folders."""
    numbered = [RUNS / cfg.preset, *(RUNS / f"{cfg.preset}-{n}" for n in range(2, 1000))]
    for folder in [Path(cfg.output_dir)] if cfg.output_dir else numbered:
        with suppress(OSError):  # includes filelock's Timeout
            # a run killed before it began may have left a lock
            if cfg.resume or not folder.exists() or {path.name for path in folder.iterdir()} <= {".lock"}:
                folder.mkdir(parents=True, exist_ok=True)
                return folder, FileLock(folder / ".lock", blocking=False, is_singleton=True).acquire().lock
    fail(f"--output_dir {folder} is not empty, in use or not writable. Choose another, or --resume.")


# ---- Settings --------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
TOY, RUNS = HERE / "toy", HERE / "runs"
setting = lambda default, help: field(default=default, metadata={"help": help})


@dataclass
class Config:
    """The defaults are the paper's recipe. A preset, a resumed run and the command line override them."""
    preset: str = setting("toy", "a task with its settings, from PRESETS")
    model_name_or_path: str = setting("Qwen/Qwen2-VL-2B", "model to start from: a folder or a hub id")
    data: str = setting(f"{HERE}/data/sat", "Parquet file from prepare_sat.py, or folder with train.parquet")
    output_dir: str | None = setting(None, "folder of the run; default: runs/PRESET, or runs/PRESET-2 ...")
    resume: bool = setting(False, "resume from output_dir's last checkpoint and settings")
    seed: int = setting(0, "seed of data order and sampling")
    freeze: Literal["none", "vision", "llm"] = setting("none", "vision or llm: the part left untrained")
    prompt: Literal["auto", "direct", *TEMPLATES] = setting("auto", "direct: without reasoning")
    max_prompt_length: int = setting(1024, "tokens, images included; longer prompts are dropped, never cut")
    max_pixels: int | None = setting(401408, "larger images are shrunk: 512 tokens of 28 x 28 pixels")
    prompts_per_step: int = setting(8, "B, questions per step, over all processes")
    num_generations: int = setting(8, "G, completions per prompt")
    max_completion_length: int = setting(700, "tokens at most per completion")
    temperature: float = setting(1.0, "sampling temperature; scoring divides the logits by it as well")
    rewards: str = setting("accuracy,format", "names from REWARDS, added up")
    beta: float = setting(0.04, "weight of the KL penalty; 0 loads no reference")
    epsilon: float = setting(0.2, "the ratio is clipped below 1 - epsilon")
    epsilon_high: float | None = setting(None, "and above 1 + epsilon_high; default: epsilon")
    num_iterations: int = setting(1, "updates per rollout; the clip can act only from the second on")
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = setting("grpo", "how token losses are averaged")
    scale_rewards: bool = setting(True, "divide advantages by the group's std (false: Dr. GRPO)")
    mask_truncated_completions: bool = setting(False, "ignore completions cut at the limit (DAPO)")
    max_steps: int = setting(1500, "training steps, one rollout each")
    learning_rate: float = setting(1e-6, "AdamW's rate at the start")
    lr_scheduler_type: Literal["linear", "constant"] = setting("linear", "linear: falls to 0 at max_steps")
    max_grad_norm: float = setting(1.0, "the gradient is clipped to this norm; 0: never")
    encode_tokens: int = setting(8192, "prompt tokens per pass (one prompt at least)")
    score_tokens: int = setting(16384, "completion tokens per chunk (one completion at least)")
    gradient_checkpointing: bool = setting(True, "recompute layers instead of storing them")
    cpu_offload: bool = setting(False, "float32 weights, gradients and optimizer state in CPU memory")
    attn_implementation: str = setting("sdpa", "for scoring: sdpa, eager, or flash_attention_2 if installed")
    save_steps: int = setting(100, "steps between checkpoints")
    save_total_limit: int | None = setting(None, "checkpoints kept, the newest; default: all")
    report_to: Literal["tensorboard", "wandb"] | None = setting(None, "where else metrics go")
    eval_steps: int = setting(100, "steps between evaluations while training; 0: none")
    eval_data: str = setting("nyu-visionx/CV-Bench", "comma-separated sets, as for eval_cvbench.py")
    eval_limit: int = setting(128, "questions of each set, the same ones every time")


PRESETS = {
    "toy": dict(model_name_or_path=f"{TOY}/base", data=str(TOY), max_pixels=None, max_prompt_length=256,
                max_completion_length=64, max_steps=140, learning_rate=8e-5, beta=0.01, score_tokens=2048,
                gradient_checkpointing=False, save_steps=70, eval_steps=14,
                eval_data=f"{TOY}/cvbench,{TOY}/test.parquet"),
    "sat": {},  # the paper's
}


def parse_config(argv=None, config_class=Config):
    """Command line (list of str; None: sys.argv) -> Config. Exits with a message if a setting is invalid."""
    parser = HfArgumentParser(config_class, allow_abbrev=False, description=__doc__.splitlines()[0])
    argv = sys.argv[1:] if argv is None else argv
    given, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    folder, saved = Path(given.output_dir or RUNS / given.preset).expanduser().absolute(), {}
    if given.resume and os.path.exists(folder):
        with explained(f"--resume: {folder} has no readable config.json of a run. Give a run's folder"):
            saved = json.loads((folder / "config.json").read_text())
            given.preset = saved["preset"]
    defaults = PRESETS.get(given.preset, {}) | saved
    unknown = sorted(defaults.keys() - vars(given)) + [given.preset] * (given.preset not in PRESETS)
    require(not unknown, f"--preset {given.preset}: {unknown} is not in this script. Try recipes.py.")
    parser.set_defaults(**defaults)
    cfg = config_class(**vars(parser.parse_args(argv)))
    full = lambda path: str(Path(path).expanduser().absolute())  # config.json then works from any folder
    cfg.output_dir = str(folder) if cfg.output_dir or cfg.resume else None
    cfg.data = full(cfg.data) + "/train.parquet" * os.path.isdir(full(cfg.data))
    if os.path.exists(full(cfg.model_name_or_path)):  # else a hub id
        cfg.model_name_or_path = full(cfg.model_name_or_path)
    least = dict(num_generations=2, eval_steps=0, seed=-math.inf, temperature=0.01)
    for name, value in vars(cfg).items():
        minimum = least.get(name, 1 if isinstance(value, int) else 0)
        fits = type(value) not in (int, float) or minimum <= value < math.inf  # False for nan, too
        require(fits, f"--{name} {value}: must be finite and >= {minimum}")
    for name in cfg.rewards.split(","):
        require(name in REWARDS, f"--rewards {name}: choose from {', '.join(REWARDS)}. recipes.py has more.")
        require(name != "format" or "direct" not in cfg.prompt, "--rewards format: --prompt direct has none")
    for name in saved.keys() - {"resume"}:
        if getattr(cfg, name) != saved[name]:
            print(f"--resume: {name} was {saved[name]} and is {getattr(cfg, name)} from here on")
            require(name != "prompts_per_step", "--prompts_per_step: the place in the data would be lost")
    return cfg


# ---- A run -----------------------------------------------------------------------------------------------

def setup(run, cfg):
    """Put into `run` everything that training needs -> the number of steps already done."""
    run.accelerator = make_accelerator(cfg)
    is_main, count = run.accelerator.is_main_process, run.accelerator.num_processes
    last = checkpoints(cfg.output_dir)[-1:] if cfg.resume else []
    start, done = (last[0], int(last[0].name[11:])) if last else (cfg.model_name_or_path, 0)
    lost = cfg.resume and not last and os.path.exists(f"{cfg.output_dir}/final")
    require(not lost, f"--resume: {cfg.output_dir} has no checkpoint left to resume from. Start a new run.")
    run.tokenizer, run.image_processor = load_processors(start, cfg.max_pixels)
    run.template = choose_prompt(run.tokenizer, cfg.prompt)
    if run.template == "base":
        run.tokenizer.chat_template = SERVED_PROMPT
    run.rows = read_rows(run, cfg.data)
    run.begun = hashlib.file_digest(open(cfg.data, "rb"), "sha256").hexdigest()
    run.tell("on_init_end")
    build_models(run, cfg, start)
    run.optimizer = torch.optim.AdamW(run.master.parameters(), cfg.learning_rate, weight_decay=0, fused=True)
    if count > 1:
        shard(run, cfg)
    if last:
        with explained(f"--resume: {start}/state cannot be read"):
            state = training_state(run)  # its weights are master's own, so loading fills them
            dcp.load(state, checkpoint_id=start / "state")  # however many processes saved it
            set_optimizer_state_dict(run.master, run.optimizer, state["optimizer"])
        require(state["begun"] == run.begun, f"{cfg.output_dir} did not begin with {cfg.data} as it is now")
    if is_main:
        run.output_dir, run.lock = claim(cfg)
        check_disk(run, cfg, done)
        log, unfinished = run.output_dir / "metrics.jsonl", run.output_dir / "config.json.tmp"
        if log.exists():  # a killed run may have logged more than it saved
            os.truncate(log, len(b"".join(log.read_bytes().splitlines(keepends=True)[:done])))
        unfinished.write_text(json.dumps(asdict(cfg), indent=2))
        unfinished.replace(run.output_dir / "config.json")
    run.output_dir, = broadcast_object_list([run.output_dir if is_main else None])
    run.accelerator.project_configuration.logging_dir = run.output_dir
    run.accelerator.init_trackers("grpo_vision")
    run.accelerator.print(f"{run.output_dir}: from {start}, prompt {run.template}, processes: {count}")
    return done


def train(cfg, train_step=train_step):
    """Train from the settings to final/. Another train_step is another algorithm: see recipes.py."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process, on purpose
    run, asked, handlers = SimpleNamespace(cfg=cfg), [], ExitStack()

    def ask_to_stop(number, frame):
        """Let the step finish and be saved. Restore the old handlers now, for a second signal."""
        asked.append(number)
        handlers.close()

    evaluation = importlib.import_module("eval_cvbench") if importlib.util.find_spec("eval_cvbench") else None
    run.tell = lambda event, *news: getattr(evaluation, event)(run, *news) if evaluation else None
    if not evaluation:
        print("eval_cvbench.py is not here: no evaluation, completions.jsonl, curves.png or rollouts.html")
    done = setup(run, cfg)
    run.tell("on_train_begin", done)
    with handlers:
        for number in signal.SIGINT, signal.SIGTERM, signal.SIGUSR1:
            handlers.callback(signal.signal, number, signal.signal(number, ask_to_stop))
        for step in tqdm(range(done, cfg.max_steps), "training", initial=done, total=cfg.max_steps,
                         disable=not run.accelerator.is_main_process):
            came = train_step(run, cfg, step)
            log_step(run, step + 1, came)
            run.tell("on_step_end", step + 1, came)
            last, stopping = step + 1 == cfg.max_steps, any(gather_object([bool(asked)]))
            if (step + 1) % cfg.save_steps == 0 or last or stopping:
                save(run.output_dir / f"checkpoint-{step + 1}", run, with_state=True)
            if stopping and not last:
                run.accelerator.print(f"stopped and saved after step {step + 1}; to resume, rerun with "
                                      f"--resume --output_dir {shlex.quote(str(run.output_dir))}")
                break
        else:
            save(run.output_dir / "final", run)
    run.accelerator.end_training()


def main(argv=None):
    train(parse_config(argv))


if __name__ == "__main__":
    sys.modules["grpo_vision"] = sys.modules[__name__]  # what imports it later gets this module, not a copy
    main()
