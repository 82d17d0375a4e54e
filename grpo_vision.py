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
the G completions branch off the keys and values that they leave. `encode_prompt`, `score` and the two-stage
backward in `update` show that this is exact.

Symbols: P prompt tokens, C completion tokens, K rows of a chunk, H hidden size, V vocabulary size. Tensor
lines end in their shape: # (N, C). `cfg` holds the settings (`Config`). `run` holds what `setup` makes of them:
the policy, which is trained; the sampler, its copy that samples; the reference; optimizer, tokenizer, data.

    accelerate launch grpo_vision.py                                 # the toy: any laptop, offline, 2 minutes
    accelerate launch grpo_vision.py --preset sat --max_steps 100    # Qwen2-VL-2B on SAT, on one GPU
    accelerate launch --num_processes 8 grpo_vision.py --preset sat  # the same, sharded over eight GPUs
"""
import dataclasses
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
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Literal, Optional

import torch
import torch.distributed.checkpoint as distributed_checkpoint
import transformers
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object, parse_flag_from_env
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     get_optimizer_state_dict, set_optimizer_state_dict)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser, Qwen2VLForConditionalGeneration
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


def train_step(run, cfg, step):
    """The recipe, once -> the step's metrics and its completions, to be logged."""
    timer = Timer()
    # 1. B questions with their images, in the prompt template
    batch = draw_batch(run, cfg, step)
    # 2. G completions of each
    rollout = draw_completions(run, cfg, step, batch)
    timer.lap("rollout")
    # 3. their rewards, by name
    rewards = compute_rewards(cfg.rewards, rollout.texts, rollout.lengths, batch.rows)
    # 4. their advantages
    advantages = group_advantages(sum(rewards.values(), torch.zeros(len(rollout.texts))), cfg.num_generations, cfg.scale_rewards)  # (N,)
    # 5. the reference's log-probabilities
    ref_logps = score_rollout(run.reference, batch.prompts, rollout, cfg)                         # (N, C)
    timer.lap("reference")
    # 6. the policy's, the loss and the update
    sums = optimise(run, cfg, step, batch, rollout, advantages, ref_logps)
    timer.lap("update")
    return summarise(run, cfg, step, batch, rollout, rewards, advantages, sums, timer.seconds)


# ---- Step 1: the question, with its images, in the prompt template ---------------------------------------

IMAGE_TOKENS = "<|vision_start|><|image_pad|><|vision_end|>"

# The paper's templates, verbatim. The base model's ends in <think> and never mentions <answer>: the policy
# learns to write answer blocks from the format reward. "direct" is for answers without reasoning.
BASE_PROMPT = (
    "A conversation between User and Assistant. The user asks a question about the image, and the Assistant "
    "solves it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer.\nUser: {question} \nAssistant: Let me solve this step by step.\n<think>"
)
TEMPLATES = {
    "base": BASE_PROMPT,
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
class Prompt:
    """One question with its images, as the model takes it."""
    text: str                                      # with one <|image_pad|> per image
    input_ids: torch.Tensor                        # (1, P) with the image tokens
    position_ids: torch.Tensor                     # (3, 1, P) M-RoPE: time, height and width of each token
    pixel_values: Optional[torch.Tensor] = None    # (patches of all images, 3 * 2 * 14 * 14)
    image_grid_thw: Optional[torch.Tensor] = None  # (images, 3) patches along time, height and width
    image_features: Optional[torch.Tensor] = None  # (image tokens, H), if the image tower is frozen

    @property
    def next_position(self):
        """Position of the first completion token, on all axes: h x w image tokens advance it by max(h, w)."""
        return int(self.position_ids.max()) + 1


def expand_images(text, tokens_per_image):
    """Repeat the i-th <|image_pad|> of the text tokens_per_image[i] times, as Qwen2VLProcessor would do."""
    head, *rest = text.split("<|image_pad|>")
    if len(rest) != len(tokens_per_image):
        fail(f"a question contains the token <|image_pad|> itself; remove it from the data: {text[-200:]!r}")
    return head + "".join("<|image_pad|>" * n + part for n, part in zip(tokens_per_image, rest))


def build_prompt(text, images, tokenizer, image_processor, model):
    """text: str from `render`, images: list of PIL images, may be empty -> Prompt on the model's device.
    Nothing runs here: the model is asked for its device, its image token and its rule of positions."""
    pixels, tokens_per_image = {}, []
    if images:
        pixels = image_processor(images=images, return_tensors="pt").to(model.device)
        tokens_per_image = (pixels["image_grid_thw"].prod(-1) // image_processor.merge_size**2).tolist()
    ids = tokenizer(expand_images(text, tokens_per_image), return_tensors="pt").input_ids         # (1, P)
    ids = ids.to(model.device)
    is_image = (ids == model.config.image_token_id).int()
    position_ids, _ = model.model.get_rope_index(ids, mm_token_type_ids=is_image,
                                                 image_grid_thw=pixels.get("image_grid_thw"))
    return Prompt(text, ids, position_ids, **pixels)  # pixels: pixel_values, image_grid_thw


@dataclass
class Batch:
    """This process's questions of a step."""
    numbers: list   # B row numbers of the data
    rows: list      # B rows (dicts)
    prompts: list   # B Prompts


def draw_batch(run, cfg, step):
    """This process's share of the step's questions -> Batch."""
    B, rank = cfg.prompts_per_step // run.accelerator.num_processes, run.accelerator.process_index
    numbers = draw(run.kept, cfg.seed, step * cfg.prompts_per_step + rank * B, B)
    rows, prompts = [run.data[i] for i in numbers], []
    for i, row in zip(numbers, rows):
        images = [open_image(image, f"{run.data_path}, row {i}") for image in row["images"] or []]
        text = row_text(row, run.template, run.tokenizer)
        prompts.append(build_prompt(text, images, run.tokenizer, run.image_processor, run.sampler))
        if cfg.freeze == "vision" and images:  # once per step, for sampler, reference and policy together
            with torch.no_grad():
                features = run.sampler.model.get_image_features(prompts[-1].pixel_values,
                                                                prompts[-1].image_grid_thw)
            prompts[-1].image_features = torch.cat(features.pooler_output)
    return Batch(numbers, rows, prompts)


# ---- Step 2: run image and prompt through the model once, and branch off G completions -------------------

# The policy answers, G times for each prompt, token by token. Image and prompt run through the model once.
# Sampling here and scoring in step 5 go on from the keys and values that they leave.

def encode_prompt(model, prompt):
    """Image tower and prompt, once -> what each layer leaves, [keys of layer 0, values of layer 0, keys of
    layer 1, ...], each (1, kv_heads, P - 1, head_dim), and the last hidden states (1, P - 1, H).

    The last prompt token is left out. It becomes the first input of every completion, whose output predicts
    the first completion token. So sampling and scoring need the keys and values only.
    """
    ids = prompt.input_ids[:, :-1]
    inputs = dict(input_ids=ids, pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw)
    if prompt.image_features is not None:
        embeds = model.get_input_embeddings()(ids)
        is_image = (ids == model.config.image_token_id)[..., None]
        inputs = dict(inputs_embeds=embeds.masked_scatter(is_image, prompt.image_features.to(embeds.dtype)))
    output = model.model(position_ids=prompt.position_ids[:, :, :-1], use_cache=True, **inputs)
    prompt_kv = [x for layer in output.past_key_values.layers for x in (layer.keys, layer.values)]
    return prompt_kv, output.last_hidden_state


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
    """What comes of letting the policy run: G completions of each prompt."""
    completion_ids: torch.Tensor   # (N, C) padded on the right
    completion_mask: torch.Tensor  # (N, C) bool, True up to the end token, which counts: it was chosen too
    sampling_logps: torch.Tensor   # (N, C) log-probability of each token when it was drawn
    finished: torch.Tensor         # (N,) bool, False if cut off at max_completion_length
    texts: Optional[list] = None   # N str, what the completions say

    @property
    def lengths(self):
        return self.completion_mask.sum(1)                                                        # (N,)


@torch.no_grad()
def sample(model, prompts, num_generations, max_completion_length, temperature, generator=None):
    """Draw G completions of each prompt (temperature 0: the likeliest tokens) -> Rollout, rows prompt-major.
    (In the paper's code completions are sample-major, but images and answers are prompt-major. That fits for
    one prompt per device only.)

    All N rows decode together. A row that is done leaves the batch; on a GPU it waits until half are done.
    """
    decoder = Decoder(model, prompts, num_generations, room=max_completion_length)
    N, limit, device = num_generations * len(prompts), max_completion_length, model.device
    completion_ids = torch.full((N, limit), model.eos_ids[0], device=device)
    sampling_logps = torch.zeros(N, limit, device=device).to(torch.promote_types(model.dtype, torch.float32))
    num_tokens = torch.zeros(N, dtype=torch.long, device=device)
    finished = torch.zeros(N, dtype=torch.bool, device=device)
    rows = torch.arange(N, device=device)              # of the N rows, those that are still in the batch
    running = torch.ones(N, dtype=torch.bool, device=device)  # for each of these: is it not done yet?
    ends = torch.tensor(model.eos_ids, device=device)
    for t in range(limit):
        logps = token_logps(model, decoder.step(), temperature or 1.0)                            # (rows, V)
        if temperature > 0:
            # the token at which the sum of the probabilities passes u, uniform in [0, 1); in float64, because
            # 150,000 unlikely tokens add up to something, and float32 would round them away
            cumulative = logps.to(torch.float64, copy=True).exp_().cumsum(-1)                     # (rows, V)
            u = torch.rand(len(rows), 1, dtype=torch.float64, device=device, generator=generator)
            tokens = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)           # (rows, 1)
        else:
            tokens = logps.argmax(-1, keepdim=True)
        completion_ids[rows, t] = torch.where(running, tokens[:, 0], model.eos_ids[0])
        sampling_logps[rows, t] = torch.where(running, logps.gather(-1, tokens)[:, 0], 0.0)
        num_tokens[rows] += running
        finished[rows] |= running & torch.isin(tokens[:, 0], ends)
        running = ~finished[rows]                                                                 # (rows,)
        if not (left := int(running.sum())):
            break
        decoder.feed(tokens)
        few = len(rows) / 2 if decoder.fixed else len(rows) - 1  # a new graph costs time
        if left <= few:
            decoder.keep(running)
            rows, running = rows[running], running[running]
    C = int(num_tokens.max())
    completion_mask = torch.arange(C, device=device) < num_tokens[:, None]                        # (N, C)
    return Rollout(completion_ids[:, :C], completion_mask, sampling_logps[:, :C], finished)


def draw_completions(run, cfg, step, batch):
    """G completions of each prompt by the policy -> Rollout. For SFT (supervised fine-tuning) the data's own
    stand in their place."""
    if cfg.algorithm == "sft":
        rollout = given_completions(run, cfg, batch)
    else:
        generator = torch.Generator(run.accelerator.device)
        generator.manual_seed(seeded(cfg.seed, "sample", step, run.accelerator.process_index).getrandbits(63))
        rollout = sample(run.sampler, batch.prompts, cfg.num_generations, cfg.max_completion_length,
                         cfg.temperature, generator)
    rollout.texts = [completion_text(batch.prompts[i // cfg.num_generations].text, ids[mask], run.tokenizer)
                     for i, (ids, mask) in enumerate(zip(rollout.completion_ids, rollout.completion_mask))]
    return rollout


# ---- Step 3: the rewards, pure functions of the text -----------------------------------------------------

# Rules judge a completion by its text alone. There is no reward model to train or to fool.

ANSWER_BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
WELL_FORMED = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL)


def completion_text(prompt_text, completion_ids, tokenizer):
    """What the policy said, without end tokens. The prefilled <think> is put back here, and only here."""
    prefill = "<think>" if prompt_text.endswith("<think>") else ""
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
    """-> the option that `answer` (from `extract_answer`) is, by its text or its letter, or None.

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


def accuracy_reward(completion, answer, options, **_):
    """1 if the one answer block chooses the right option, else 0. A copied template ("...") chooses none."""
    return float(grade(extract_answer(completion), answer, options))


def format_reward(completion, **_):
    """1 if the completion is one think block and then one answer block that is not empty, no more; else 0.

    >>> format_reward("<think> hm </think> <answer> left </answer>"), format_reward("<answer> left </answer>")
    (1.0, 0.0)
    """
    one_think_block = completion.count("<think>") == completion.count("</think>") == 1
    one_answer_block = extract_answer(completion) is not None
    return float(one_think_block and one_answer_block and bool(WELL_FORMED.fullmatch(completion)))


def hard_reward(completion, **row):
    """1 only if form and answer are both right (Vision-R1's HFRRF, arXiv 2503.06749, section 3.3)."""
    return format_reward(completion) * accuracy_reward(completion, **row)


def length_reward(completion, num_tokens, **_):
    """0.001 per token: the paper's attempt to buy reasoning, which failed."""
    return 0.001 * num_tokens


# name -> function(completion, num_tokens, **columns of the data row) -> float. The completion begins with the
# <think> that the base prompt ends in; an instruct model has to write it itself. Add your own: README.md
REWARDS = {"accuracy": accuracy_reward, "format": format_reward, "hard": hard_reward, "length": length_reward}


def compute_rewards(names, texts, lengths, rows):
    """Comma-separated names from REWARDS, N completions, their lengths in tokens (N,) and the B data rows,
    each of which has N / B completions -> {name: (N,) float32}."""
    rewards, G = {}, len(texts) // len(rows)
    rows = [{key: row[key] for key in row if key != "completion"} for row in rows]  # that column is for SFT
    for name in filter(None, names.split(",")):
        values = [REWARDS[name](text, num_tokens=int(lengths[i]), **rows[i // G])
                  for i, text in enumerate(texts)]
        rewards[name] = torch.tensor(values, dtype=torch.float32)                                 # (N,)
        for text, value in zip(texts, rewards[name].tolist()):
            if not math.isfinite(value):
                fail(f"The reward {name} is {value} for {text[-200:]!r}. It must be a finite float32 number.")
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
    if num_generations == 1:  # supervised fine-tuning: no siblings, and step 6 follows the gradient of log pi
        return torch.ones_like(rewards)                                                           # (N,)
    R = rewards.view(-1, num_generations)                                                         # (B, G)
    # A = (R - mean(R)) / (std(R) + 1e-4)
    A = R - R.mean(1, keepdim=True)                                                               # (B, G)
    if scale_rewards:
        A = A / (R.std(1, keepdim=True) + 1e-4)                                                   # (B, G)
    has_spread = R.amax(1, keepdim=True) > R.amin(1, keepdim=True)  # std > 0 could be rounding     (B, 1)
    return torch.where(has_spread, A, 0.0).view(-1)                                               # (N,)


# ---- Step 5: the log-probability of each completion token ------------------------------------------------

# How likely is each token of the completions, to the policy in training, and to its frozen start? All tokens
# are known by now, so one pass scores them all, for as many rows at a time as score_tokens admits. The start
# is asked here, by `score_rollout`; the policy in step 6, by the same `score`, with the graph for backward.

def score(model, prompt, prompt_kv, completion_ids, completion_mask, temperature):
    """Log-probabilities and (without gradient) entropy of K completions, each (K, C), 0 where masked.

    All rows attend to the same keys and values of the prompt, expanded and not computed again, and to their
    own past, by the model's own causal mask. Position `next_position` is the first completion token's in
    every row, as if it stood alone behind the prompt; the inputs begin one before, with the last prompt
    token. Nothing is padded on the left; what pads a row on the right comes after all that counts.
    """
    K, C = completion_ids.shape
    inputs = torch.cat([prompt.input_ids[:, -1:].expand(K, 1), completion_ids[:, :-1]], 1)        # (K, C)
    positions = torch.arange(C, device=inputs.device) + prompt.next_position - 1                  # (C,)
    kv = [x.expand(K, -1, -1, -1) for x in prompt_kv]
    cache = Cache(layers=[BranchLayer(keys, values) for keys, values in zip(kv[::2], kv[1::2])])
    hidden = model.model(input_ids=inputs, position_ids=positions.expand(3, K, C),
                         past_key_values=cache).last_hidden_state  # [:, t] predicts token t       (K, C, H)
    logps = token_logps(model, hidden[completion_mask], temperature)                 # (tokens, V)
    chosen = logps.gather(-1, completion_ids[completion_mask][:, None])[:, 0]                     # (tokens,)
    with torch.no_grad():
        entropy = -logps.exp().mul_(logps).sum(-1)                                                # (tokens,)
    blank = torch.zeros(K, C, dtype=logps.dtype, device=logps.device)
    return blank.masked_scatter(completion_mask, chosen), blank.masked_scatter(completion_mask, entropy)


def chunks(lengths, score_tokens):
    """Lengths of rows -> lists of row numbers, short rows first, with rows * longest <= score_tokens in each.

    Rows of like length waste little on padding; a row longer than the budget is a list of its own.

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


def group_chunks(rollout, group, cfg):
    """One group's rows, chunk by chunk: row numbers (K,), completion_ids (K, C), completion_mask (K, C)."""
    first = group * cfg.num_generations
    lengths = rollout.completion_mask[first:first + cfg.num_generations].sum(1).tolist()
    for chunk in chunks(lengths, cfg.score_tokens):
        rows = torch.tensor(chunk, device=rollout.completion_ids.device) + first
        C = max(lengths[i] for i in chunk)
        yield rows, rollout.completion_ids[rows, :C], rollout.completion_mask[rows, :C]


@torch.no_grad()
def score_rollout(reference, prompts, rollout, cfg):
    """(N, C) log-probabilities of the rollout by the reference, a `Policy` too, without gradient. Every
    process has the whole reference, not a shard, so that none has to wait for another here."""
    if reference is None:  # beta 0
        return None
    per_token_logps = torch.zeros_like(rollout.sampling_logps)
    for group, prompt in enumerate(prompts):
        prompt_kv, _ = reference(prompt)
        for rows, ids, mask in group_chunks(rollout, group, cfg):
            per_token_logps[rows, :ids.shape[1]] = reference(prompt, prompt_kv, ids, mask)[0]
    return per_token_logps


# ---- Step 6: the loss, and its gradient ------------------------------------------------------------------

# Tokens of better-than-average completions become likelier. The gradient comes in two stages, first of the
# completions, then of the prompt that they share, and the optimizer takes its step.

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
    """(rows,) lengths of all processes' rows, (rows,) bool -> (rows,) weights of a token of each."""
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
    samples of pi (the policy gradient). Where pi is still pi_old, the ratio is 1 and its gradient is that
    of log pi, so every token of a completion is pushed up or down by its A: maximum likelihood, weighted
    and with a sign. In a further update on the same rollout (num_iterations > 1) the samples come from
    pi_old, a policy of the past, and the ratio corrects for that, as long as it is near 1. Hence the clip:
    a token that has moved by epsilon in the direction of its A is pushed no further; and hence the min: one
    that has moved the other way is pushed on.

    What is logged: with num_iterations 1 the ratio is 1. Where every row counts the same (loss_type "grpo"),
    the A of a group cancel, and the logged loss is beta * KL, near 0. Its gradient is not 0.
    """
    A = advantages[:, None]                                                                       # (K, 1)
    # ratio = pi / pi_old
    ratio = (per_token_logps - old_per_token_logps).exp()                                         # (K, C)
    # -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A)
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))   # (K, C)
    per_token_loss = -torch.min(ratio * A, clipped * A)                                           # (K, C)
    # kl = pi_ref / pi - log(pi_ref / pi) - 1: for tokens drawn from pi an unbiased estimate of KL(pi ||
    # pi_ref), called k3, and never negative
    kl = torch.zeros_like(ratio)
    if beta > 0:
        log_ref_over_pi = ref_per_token_logps - per_token_logps                                   # (K, C)
        kl = log_ref_over_pi.exp() - log_ref_over_pi - 1                                          # (K, C)
        per_token_loss = per_token_loss + beta * kl                                               # (K, C)
    # loss = sum over rows of token_weights * sum over tokens, which with weights of 1 / (rows * tokens of the
    # row) is the mean over rows of the mean over tokens; LOSS_TYPES has others
    per_row = (per_token_loss * completion_mask).sum(1)                                           # (K,)
    return (per_row * token_weights).sum(), kl.detach(), clipped * A < ratio * A


def pad_chunks(found, num_processes):
    """The chunks of a group, and as many empty ones as make every process run the model equally often: with
    sharded weights each forward is a meeting of all, and whoever stays away leaves the others waiting."""
    most = max(gather_object([len(found)])) if num_processes > 1 else len(found)
    rows, ids, mask = found[0]
    return found + [(rows[:1], ids[:1, :1], torch.zeros_like(mask[:1, :1]))] * (most - len(found))


def update(policy, prompts, rollout, advantages, token_weights, ref_per_token_logps, old_per_token_logps, cfg,
           num_processes=1):
    """Leave the gradient of the step's loss in the policy, by a backward in two stages:

    1. Chunk by chunk, completions run forward on top of the prompt's keys and values, detached, and backward.
       That leaves on the weights the completions' part of the gradient; the prompt's part stops at the
       detached keys and values, where it adds up over the chunks. Each chunk's graph is freed at once.
    2. One backward for each prompt carries that sum on, through prompt and image tower, to the weights.

    This is the chain rule, cut at the keys and values, and exact. Memory holds the graph of one prompt and of
    one chunk, which is cfg.score_tokens tokens at most, or one completion that is longer: a larger G makes
    more chunks, not larger ones. (A row of a chunk holds a copy of the prompt's keys and values, which counts
    if completions are much shorter.)

    advantages, token_weights: (N,). old_per_token_logps: (N, C), or None in the first pass over a rollout, in
    which pi_old is pi. (Not the sampler's log-probabilities: it may compute in bf16, and the ratio would show
    its rounding.) Returns the log-probabilities of this pass (N, C), and sums over all tokens to log.
    """
    per_token_logps = torch.zeros_like(rollout.sampling_logps)
    sums = dict.fromkeys(("loss", "entropy", "kl", "clip"), 0.0)
    for group, prompt in enumerate(prompts):
        prompt_kv, last_hidden = policy(prompt)
        # the sum over chunks is kept in float32, whatever the keys and values are computed in
        leaves = [x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
                  for x in prompt_kv]                                # each (1, kv_heads, P - 1, head_dim)
        for rows, ids, mask in pad_chunks(list(group_chunks(rollout, group, cfg)), num_processes):
            C = ids.shape[1]
            leaf_kv = [leaf.to(x.dtype) for leaf, x in zip(leaves, prompt_kv)]  # freed with the chunk's graph
            logps, entropy = policy(prompt, leaf_kv, ids, mask)                                   # (K, C)
            old = logps.detach() if old_per_token_logps is None else old_per_token_logps[rows, :C]  # (K, C)
            ref = ref_per_token_logps[rows, :C] if cfg.beta > 0 else None                         # (K, C)
            loss, kl, clipped = grpo_loss(logps, old, ref, advantages[rows], token_weights[rows], mask,
                                          cfg.epsilon, cfg.epsilon_high, cfg.beta)
            # token_weights count all processes' rows, so gradients have to add up, but FSDP averages them
            (loss * num_processes).backward()                                                     # stage 1
            per_token_logps[rows, :C] += logps.detach()  # +=: an empty chunk adds 0 to a row that is there
            for name, values in dict(loss=loss, entropy=entropy, kl=kl * mask, clip=clipped * mask).items():
                sums[name] += values.sum().item()
        ends, gradients = prompt_kv, [leaf.grad.to(x.dtype) for leaf, x in zip(leaves, prompt_kv)]
        if num_processes > 1:
            # FSDP gathers the weights of a layer for its backward when the gradient of its output arrives.
            # The last layer's output leads nowhere, as only keys and values count, and none would arrive: a 0
            # is sent into it
            ends, gradients = [*ends, last_hidden], [*gradients, torch.zeros_like(last_hidden)]
        if ends[0].requires_grad:  # it does not for a question without image under --freeze llm
            torch.autograd.backward(ends, gradients)                                              # stage 2
    return per_token_logps, sums


def optimise(run, cfg, step, batch, rollout, advantages, ref_logps):
    """num_iterations updates of the weights -> sums over tokens to log and the norm of the gradient before
    clipping, of the last update, but nll and mismatch of the first. An update whose norm is not finite leaves
    the weights as they are, and is the last."""
    accelerator = run.accelerator
    advantages = advantages.to(accelerator.device)                                                # (N,)
    # (rows of all processes,)
    everyones = weigh_tokens(accelerator.gather(rollout.lengths), accelerator.gather(rollout.finished), cfg)
    token_weights = everyones.chunk(accelerator.num_processes)[accelerator.process_index].float() # (N,)
    old_logps = None  # in the first update pi_old is pi itself
    for _ in range(cfg.num_iterations):
        logps, sums = update(run.policy, batch.prompts, rollout, advantages, token_weights, ref_logps,
                             old_logps, cfg, accelerator.num_processes)
        old_logps = logps if old_logps is None else old_logps                                     # (N, C)
        norm = accelerator.clip_grad_norm_(run.policy.parameters(), cfg.max_grad_norm or math.inf)
        sums["grad_norm"] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        run.optimizer.param_groups[0]["lr"] = learning_rate_at(cfg, step)
        if math.isfinite(sums["grad_norm"]):
            run.optimizer.step()
        run.optimizer.zero_grad()
        if not math.isfinite(sums["grad_norm"]):
            break
    refresh(run.sampler, run.policy)
    sums["nll"] = -old_logps.sum().item()  # before the update
    sums["mismatch"] = ((old_logps - rollout.sampling_logps) * rollout.completion_mask).abs().max().item()
    return sums


# ==========================================================================================================
# The algorithm ends here. What follows is the machine that it runs on.
# ==========================================================================================================

# ---- Decoding --------------------------------------------------------------------------------------------

# The cache and the decoder of step 2.

class BranchLayer(DynamicLayer):
    """One layer of a cache that begins with the prompt's keys and values, (rows, kv_heads, P - 1, head_dim).

    place None: new keys are joined by `torch.cat`, which autograd follows (scoring). Otherwise they are
    written in place, because a `cat` at every token would copy the whole cache (sampling): keys and values
    come with room for them, and `place`, (1,), says where the next go; it is one tensor, which all layers
    share and `Decoder.feed` moves on. What is written is attended to; or, if fixed, all there is room for,
    so that shapes stay the same at every token, and the mask has to hide what is not yet written.
    """
    def __init__(self, keys, values, place=None, fixed=False):
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values, self.place, self.fixed = keys, values, place, fixed

    def update(self, keys, values, *args, **kwargs):
        if self.place is None:
            return super().update(keys, values)
        self.keys.index_copy_(2, self.place, keys)
        self.values.index_copy_(2, self.place, values)
        end = self.keys.shape[2] if self.fixed else int(self.place) + 1
        return self.keys[:, :, :end], self.values[:, :, :end]

class Decoder:
    """N rows on their way through the completion; each call of `step` is one token further.

    Each of the B prompts has run through the model once, and its keys and values are repeated G times.
    Shorter prompts are padded on the left and masked. A row of the cache, `room` tokens longer than the
    prompts:

        [ pad pad | prompt without its last token | last prompt token, c_1, c_2, ... | not yet written ]

    fixed: all of it takes part in every step, behind a mask, so that no shape ever changes. A CUDA graph
    needs that: on a GPU the step is recorded once and replayed, because launching its hundreds of kernels
    takes longer than running them. Not fixed (on a CPU): only what is already written takes part in a step.
    """
    def __init__(self, model, prompts, num_generations, room, fixed=None):
        encoded = [encode_prompt(model, prompt)[0] for prompt in prompts]
        repeat = lambda x: x.repeat_interleave(num_generations, 0)
        lengths = torch.tensor([prompt_kv[0].shape[2] for prompt_kv in encoded])                  # (B,)
        longest = int(lengths.max())                                                              # P - 1
        room += 8 - (longest + room) % 8  # a GPU copies a mask at each use, if its rows are no multiple of 8
        pad = lambda x: nn.functional.pad(x, (0, 0, longest - x.shape[2], room))
        self.model, self.fixed = model, model.device.type == "cuda" if fixed is None else fixed
        self.masked = self.fixed or len(set(lengths.tolist())) > 1  # attention is faster without a mask
        self.place = torch.tensor([longest], device=model.device)  # where the next keys and values go
        # each (N, kv_heads, longest + room, head_dim)
        kv = [repeat(torch.cat([pad(x) for x in of_prompts])) for of_prompts in zip(*encoded)]
        self.cache = Cache(layers=[BranchLayer(keys, values, self.place, self.fixed)
                                   for keys, values in zip(kv[::2], kv[1::2])])
        self.tokens = repeat(torch.cat([prompt.input_ids[:, -1:] for prompt in prompts]))         # (N, 1)
        # M-RoPE's position of a token minus its place in the cache, the same all along a row
        offset = torch.tensor([[prompt.next_position - 1 - longest] for prompt in prompts])
        self.offset = repeat(offset).to(model.device)                                             # (N, 1)
        places = torch.arange(longest + room)
        unseen = (places < longest - lengths[:, None]) | (places > longest)             # (B, longest + room)
        mask = torch.zeros(unseen.shape, dtype=model.dtype).masked_fill(unseen, torch.finfo(model.dtype).min)
        self.mask = repeat(mask.to(model.device))[:, None, None]                  # (N, 1, 1, longest + room)
        self.replay = None

    def step(self):
        """-> (rows, H) hidden states, after which the next token is to be drawn."""
        if not self.fixed or self.model.device.type != "cuda":
            return self.forward()
        if self.replay is None:
            # libraries set themselves up on first use, outside the recording; the replay will write over what
            # this writes, at the same place
            self.forward()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may go on
                self.replay = self.forward()
        self.graph.replay()
        return self.replay

    def forward(self):
        mask = self.mask if self.fixed else self.mask[..., :int(self.place) + 1]
        mask = {"full_attention": mask if self.masked else None}  # a dict: transformers makes none of its own
        positions = (self.offset + self.place).expand(3, -1, -1)                                  # (3, N, 1)
        output = self.model.model(input_ids=self.tokens, position_ids=positions, past_key_values=self.cache,
                                  attention_mask=mask)
        return output.last_hidden_state[:, -1]

    def feed(self, tokens):
        """tokens: (rows, 1), which the next step takes in."""
        self.tokens.copy_(tokens)
        self.place += 1
        self.mask.index_fill_(3, self.place, 0)

    def keep(self, alive):
        """alive: (rows,) bool. The others leave the batch; a graph must be recorded anew."""
        self.tokens, self.offset, self.mask = (x[alive] for x in (self.tokens, self.offset, self.mask))
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[alive], layer.values[alive]
        self.replay = None

# ---- Supervised fine-tuning, and what a step logs --------------------------------------------------------

def given_completions(run, cfg, batch):
    """SFT: the data's completions, or else its answers, stand where the samples would -> Rollout."""
    ids, eos = [], run.sampler.eos_ids[0]
    for row, prompt in zip(batch.rows, batch.prompts):
        text = row.get("completion") or row["answer"]
        if prompt.text.endswith("<think>"):
            text = text.removeprefix("<think>")
        ids.append(torch.tensor(run.tokenizer(text).input_ids + [eos])[:cfg.max_completion_length])
    lengths = torch.tensor([len(x) for x in ids])
    ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=eos)                     # (N, C)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    finished = ids[torch.arange(len(ids)), lengths - 1] == eos
    return Rollout(*(x.to(run.sampler.device) for x in (ids, mask, torch.zeros(ids.shape), finished)))


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


def summarise(run, cfg, step, batch, rollout, rewards, advantages, sums, seconds):
    """-> the step's metrics, and its completions as records, both over all processes."""
    G, lengths, reward = cfg.num_generations, rollout.lengths.tolist(), sum(rewards.values(), torch.zeros(len(rollout.texts))).tolist()
    samples = gather_object([
        {"step": step + 1, "row": batch.numbers[i // G], "prompt": batch.prompts[i // G].text,
         "completion": text, "answer": batch.rows[i // G]["answer"], "length": lengths[i],
         "finished": bool(rollout.finished[i]),
         **{f"rewards/{name}": r[i].item() for name, r in rewards.items()},
         "reward": reward[i], "advantage": advantages[i].item()} for i, text in enumerate(rollout.texts)])
    sums = gather_object([sums])
    average = lambda name: statistics.mean(sample[name] for sample in samples)
    total = lambda name: sum(part[name] for part in sums)
    rewards = [sample["reward"] for sample in samples]
    groups = [rewards[i:i + G] for i in range(0, len(rewards), G)]
    tokens = sum(sample["length"] for sample in samples)
    metrics = {
        "step": step + 1, "loss": total("loss"), "reward": average("reward"),
        "reward_std": statistics.mean(statistics.stdev(group) if len(group) > 1 else 0.0 for group in groups),
        **{name: average(name) for name in samples[0] if name.startswith("rewards/")},
        "completions/mean_length": tokens / len(samples),
        "completions/clipped_ratio": 1 - average("finished"),
        "frac_reward_zero_std": statistics.mean(max(group) == min(group) for group in groups),
        "kl": total("kl") / tokens, "entropy": total("entropy") / tokens,
        "clip_ratio": total("clip") / tokens,
        "sampler_mismatch": max(part["mismatch"] for part in sums)}
    if cfg.algorithm == "sft":
        del metrics["sampler_mismatch"]  # nothing was sampled
        metrics["nll"] = total("nll") / tokens
    return metrics | {"grad_norm": sums[0]["grad_norm"], "learning_rate": learning_rate_at(cfg, step),
                      **seconds}, samples


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


def upright(picture):
    """PIL image -> RGB as a viewer shows it: turned as its EXIF tag says, white where it is transparent."""
    picture = ImageOps.exif_transpose(picture)
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
        fail(f"{where}: its image cannot be read ({error}); remove the row")


def learning_rate_at(cfg, step):
    decay = 1 - step / cfg.max_steps if cfg.lr_scheduler_type == "linear" else 1
    return cfg.learning_rate * decay


# ---- Models ----------------------------------------------------------------------------------------------

def load_processors(path, max_pixels=None):
    """-> tokenizer, image processor. The image processor is PIL's: the same pixels everywhere, and no
    torchvision. max_pixels: larger images are shrunk to it; None: as the model's own files say."""
    if not Path(path).exists() and str(path).count("/") != 1:
        fail(f"the model {path} is neither a folder that exists nor a hub id, such as Qwen/Qwen2-VL-2B")
    try:
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(
            path, **({"max_pixels": max_pixels} if max_pixels else {}))
        return AutoTokenizer.from_pretrained(path), image_processor
    except (OSError, ValueError) as error:
        fail(f"cannot load tokenizer and image processor from {path}: {str(error).strip().splitlines()[0]}")


def load_model(path, tokenizer, attn_implementation="sdpa", dtype=torch.float32):
    """Folder or hub id -> Qwen2-VL, without dropout. float32 is asked for because the published files would
    load as bf16, in which updates as small as 1e-6 are rounded away.

    Two attributes come with it. suppressed, (V,) bool: vision tokens, which would crash the next forward, and
    vocabulary rows without a token. eos_ids: what ends a completion, the tokenizer's end token first, then
    those of Qwen's two that it knows.
    """
    try:
        model, report = Qwen2VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True)
    except (OSError, ImportError, ValueError) as error:
        fail(f"cannot load a Qwen2-VL model from {path}: {str(error).strip().splitlines()[0]}")
    if report["missing_keys"]:
        fail(f"{path} is not a whole Qwen2-VL model: its files lack {sorted(report['missing_keys'])[0]}")
    suppressed = torch.arange(model.lm_head.out_features) >= len(tokenizer)                       # (V,)
    vision = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    suppressed[tokenizer.convert_tokens_to_ids(vision)] = True
    model.register_buffer("suppressed", suppressed, persistent=False)
    qwen = [token for token in ("<|endoftext|>", "<|im_end|>") if token in tokenizer.get_vocab()]
    model.eos_ids = list(dict.fromkeys([tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(qwen)]))
    return fast_patches(model).eval()


def fast_patches(model):
    """Compute the patch embedding as the matrix product that it is (its kernel and stride are the patch),
    with the same weights. Conv3d's backward is slow. Returns the model."""
    def forward(self, pixels):
        weight = self.proj.weight.flatten(1)                                                  # (dim, 1176)
        return nn.functional.linear(pixels.to(weight.dtype), weight)                          # (patches, dim)

    patch_embed = model.model.visual.patch_embed
    patch_embed.forward = MethodType(forward, patch_embed)  # a method: a deepcopy will use its own weights
    return model


def set_threads(model):
    """A second thread only waits for a model as small as the toy's. The launcher sets OMP_NUM_THREADS=1 and
    python does not; set here, both give the same speed and the same bits."""
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(max(1, cores) if model.num_parameters() > 1e7 else 1)


def choose_prompt(tokenizer, prompt="auto"):
    """-> "base" or "instruct"; auto: instruct if the chat template tells user from assistant. (The one that
    is saved with base models renders both alike: eval_cvbench.SERVED_PROMPT.)"""
    turns = [[{"role": role, "content": "?"}] for role in ("user", "assistant")]
    has_roles = tokenizer.chat_template is not None and len(
        {tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns}) == 2
    if prompt == "instruct" and not has_roles:
        fail("--prompt instruct: the model has no chat template that tells user from assistant; leave it out")
    return prompt if prompt != "auto" else "instruct" if has_roles else "base"


class Policy(nn.Module):
    """A model behind one door. FSDP wraps this module and its hooks run in `forward` only, so every forward
    of the trained weights, encoding or scoring, has to come through here. autocast: compute in bf16."""
    def __init__(self, model, temperature, autocast=False):
        super().__init__()
        self.model, self.temperature, self.autocast = model, temperature, autocast

    def forward(self, prompt, prompt_kv=None, completion_ids=None, completion_mask=None):
        with torch.autocast(self.model.suppressed.device.type, torch.bfloat16, enabled=self.autocast):
            if prompt_kv is None:
                return encode_prompt(self.model, prompt)
            return score(self.model, prompt, prompt_kv, completion_ids, completion_mask, self.temperature)


def build_models(cfg, start, accelerator, tokenizer):
    """Folder or hub id `start` -> policy, sampler, reference (or None), optimizer.

    Up to three copies of the weights: the policy's in float32, because in bf16 an update of 1e-6 would be
    rounded away; plain ones for sampler and reference, in bf16 on a GPU. Alone on a CPU, the policy samples.
    """
    device, single = accelerator.device, accelerator.num_processes == 1
    bf16 = accelerator.mixed_precision == "bf16"
    model = load_model(start, tokenizer, cfg.attn_implementation).to(device)
    set_threads(model)
    if cfg.algorithm == "sft":
        model.suppressed.zero_()  # plain cross-entropy, over all the vocabulary
    towers = dict(vision=[model.model.visual], llm=[model.model.language_model, model.lm_head])
    for tower in towers.get(cfg.freeze, []):
        tower.requires_grad_(False)  # called; the paper's code assigns to the name, which freezes nothing
    dtype = torch.bfloat16 if bf16 else torch.float32
    plain = lambda path, attention: load_model(path, tokenizer, attention, dtype).to(device).requires_grad_(False)
    sampler = model if single and not bf16 else plain(start, "sdpa")  # its masks are not for flash attention
    reference = None
    if cfg.beta > 0:
        reference = Policy(plain(cfg.model_name_or_path, cfg.attn_implementation), cfg.temperature)
    policy = Policy(model, cfg.temperature, autocast=single and bf16)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.learning_rate, weight_decay=0.0)
    if not single:
        policy, optimizer = accelerator.prepare(policy, optimizer)
        optimizer = optimizer.optimizer  # itself, which torch.distributed.checkpoint knows
        if not all(isinstance(weight, DTensor) for weight in policy.parameters()):
            fail("several processes, but the weights are not sharded; install the accelerate of "
                 "requirements.txt")
    return policy, sampler, reference, optimizer


# ---- One process or many ---------------------------------------------------------------------------------

# cuDNN's attention, torch's first choice on an H100, prepares anew for each new shape, and its gradients can
# be nan where there is a mask (pytorch issue 196678); the others, flash and memory-efficient, do neither
torch.backends.cuda.enable_cudnn_sdp(False)


def make_accelerator(cfg):
    """One process: float32 weights, no wrapper (on a GPU, bf16 autocast). Several, of whatever device: FSDP2,
    which shards float32 weights, gradients and optimizer state, and computes in bf16 on GPUs.

    bf16 by hand because accelerate's "bf16" policy would also reduce gradients in bf16. Outputs need no
    cast: `token_logps` makes them float32.
    """
    try:
        on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # one may draw the toy or save for all
        accelerator = Accelerator(log_with=cfg.log_with, mixed_precision="bf16" if on_gpu else None,
                                  cpu=not on_gpu, kwargs_handlers=[patience])  # and not a Mac's "mps"
    except ValueError as error:
        fail(f"--log_with {cfg.log_with}: {error}")
    if cfg.log_with and not accelerator.log_with:
        fail(f"--log_with {cfg.log_with}: install that package first")
    if cfg.prompts_per_step % accelerator.num_processes:
        fail(f"--prompts_per_step {cfg.prompts_per_step} cannot be shared by {accelerator.num_processes} "
             "processes; choose a multiple of them")
    if accelerator.num_processes > 1:
        bf16 = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        bf16 = bf16 if accelerator.mixed_precision == "bf16" else {}
        # set here and not by an argument, which accelerate heeds on GPUs only: a CPU would get DDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
            transformer_cls_names_to_wrap=["Qwen2VLDecoderLayer", "Qwen2VLVisionBlock"],
            mixed_precision_policy=MixedPrecisionPolicy(**bf16))
    return accelerator


@torch.no_grad()
def refresh(sampler, policy):
    """Copy the policy's weights, sharded or not, into the sampler."""
    for copy, weight in zip(sampler.parameters(), policy.model.parameters(), strict=True):
        if copy is not weight:
            copy.copy_(weight.full_tensor() if isinstance(weight, DTensor) else weight)


# ---- The files of a run ----------------------------------------------------------------------------------

def checkpoints(output_dir):
    """-> its complete checkpoint-N folders, oldest first; `save_model` gives them the name when they are."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=steps_done)


def steps_done(checkpoint):
    return int(checkpoint.name[11:])


def write_model(folder, run, with_state):
    """A plain model directory, and in state/ what resuming needs beside it. All processes take part."""
    main, alone = run.accelerator.is_main_process, run.accelerator.num_processes == 1
    if main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    run.accelerator.wait_for_everyone()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(run.policy, options=options)  # whole, on the main process
    if main:
        weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
        if run.policy.model.config.tie_word_embeddings:
            del weights["lm_head.weight"]  # the same as the embedding, which is saved once
        run.policy.model.save_pretrained(folder, state_dict=weights)
        run.tokenizer.save_pretrained(folder)
        run.image_processor.save_pretrained(folder)
    if with_state:
        state = {"optimizer": get_optimizer_state_dict(run.policy, run.optimizer)}
        distributed_checkpoint.save(state, checkpoint_id=folder / "state", no_dist=alone)


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
        fail(f"{folder} could not be saved ({reason}); what was there before is whole ({last}): make room, "
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
    distributed_checkpoint.load(state, checkpoint_id=folder / "state",
                                no_dist=run.accelerator.num_processes == 1)
    set_optimizer_state_dict(run.policy, run.optimizer, state["optimizer"])


def choose_output_dir(cfg):
    """-> Path. A folder named by hand must be new or empty, unless --resume goes on with it."""
    path, n = Path(cfg.output_dir or RUNS / cfg.preset), 1
    while path.exists() and any(path.iterdir()) and not cfg.resume:
        if cfg.output_dir:
            fail(f"--output_dir {path} is not empty. Choose a new folder, or go on with a run by --resume.")
        path, n = RUNS / f"{cfg.preset}-{n + 1}", n + 1
    return path


# ---- Settings --------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
TOY, RUNS = HERE / "toy", HERE / "runs"


def setting(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


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
    prompt: Literal["auto", "base", "instruct"] = setting("auto", "by the chat template; or base, instruct")
    max_prompt_length: int = setting(1024, "tokens, images included; longer prompts are dropped, never cut")
    max_pixels: Optional[int] = setting(401408, "larger images are shrunk to it: 512 tokens of 28 x 28 pixels")
    prompts_per_step: int = setting(8, "questions per step, over all processes")
    num_generations: int = setting(8, "G, completions per prompt")
    max_completion_length: int = setting(700, "tokens at most per completion")
    temperature: float = setting(1.0, "sampling temperature; scoring divides the logits by it as well")
    # rewards and loss
    rewards: str = setting("accuracy,format", "names from REWARDS, added up")
    beta: float = setting(0.04, "weight of the KL penalty; 0 loads no reference model")
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
    # machine and files
    score_tokens: int = setting(2048, "completion tokens (or one completion) scored at a time: bounds memory")
    attn_implementation: str = setting("sdpa", "for scoring: sdpa, eager, or flash_attention_2 if installed")
    save_steps: int = setting(100, "steps between checkpoints")
    save_total_limit: Optional[int] = setting(None, "checkpoints kept, the newest; default: all")
    eval_steps: int = setting(100, "steps between evaluations while training; 0: none")
    eval_data: str = setting("nyu-visionx/CV-Bench", "comma-separated sets, as eval_cvbench.py takes them")
    eval_limit: int = setting(128, "questions of each set, the same ones every time")
    log_with: Optional[str] = setting(None, "an accelerate tracker besides metrics.jsonl: tensorboard, ...")


PRESETS = {
    "toy": dict(model_name_or_path=str(TOY / "base"), data=str(TOY), max_pixels=None, prompts_per_step=16,
                max_completion_length=64, max_steps=100, learning_rate=2e-4, beta=0.01, save_steps=50,
                eval_steps=10, eval_data=f"{TOY / 'cvbench'},{TOY / 'test.parquet'}"),
    "sat": {},
    # the paper's baseline: the same questions, answered without reasoning; 3750 x 8 is twice 15,000 rows
    "sat-sft": dict(algorithm="sft", learning_rate=2e-5, max_steps=3750, loss_type="dapo"),
    # stage 1 of Vision-R1 (arXiv 2503.06749), after its cold start; README.md has both stages
    "vision-r1": dict(rewards="hard", beta=0.01, lr_scheduler_type="constant", max_steps=100,
                      max_completion_length=4096, num_generations=16),
}
# setting -> its least value. The comparison is false for nan too
LEAST = dict(prompts_per_step=1, num_generations=1, max_completion_length=1, num_iterations=1, max_steps=1,
             score_tokens=1, save_steps=1, save_total_limit=1, eval_steps=0, eval_limit=1, max_pixels=1,
             beta=0, epsilon=0, max_grad_norm=0, learning_rate=0)
# settings of earlier versions -> the values at which a run can go on without them
REMOVED = dict(overwrite=[False, True], stages=[None], reward_file=[None], min_pixels=[None, 3136],
               weight_decay=[0.0])


def parse_config(argv=None):
    """Command line (list of str; None: sys.argv) -> Config."""
    parser = HfArgumentParser(Config, allow_abbrev=False, description=__doc__.splitlines()[0])
    argv = sys.argv[1:] if argv is None else argv
    given, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    saved = saved_settings(Path(given.output_dir or RUNS / given.preset)) if given.resume else {}
    preset = saved.get("preset", given.preset)
    if preset not in PRESETS:
        fail(f"--preset {preset} is unknown. Choose one of: {', '.join(PRESETS)}.")
    parser.set_defaults(**PRESETS[preset] | saved)
    cfg, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        fail(f"unknown argument {unknown[0]}; `python grpo_vision.py --help` lists them all")
    if cfg.algorithm == "sft":  # one completion per prompt, no rewards, nothing to stay close to
        cfg.num_generations, cfg.rewards, cfg.beta, cfg.temperature = 1, "", 0.0, 1.0
    check_config(cfg)
    return cfg


def saved_settings(folder):
    """config.json of the run to resume -> its settings; {} if there is nothing yet."""
    if not folder.exists() or not any(folder.iterdir()):
        print(f"--resume: nothing is in {folder} yet. The run begins from the start.")
        return {}
    if not (folder / "config.json").exists():
        fail(f"--resume: {folder} is not the folder of a run. Choose the one that holds config.json.")
    saved, known = json.loads((folder / "config.json").read_text()), {x.name for x in dataclasses.fields(Config)}
    for name in sorted(saved.keys() - known):
        value = saved.pop(name)
        if value not in REMOVED.get(name, []):
            fail(f"{folder}/config.json has {name} = {value}, which this version cannot do. Continue the run "
                 "with the version that began it.")
        print(f"{folder}/config.json: {name} is no longer a setting and is ignored.")
    return saved | {"resume": True, "output_dir": str(folder)}


def check_config(cfg):
    """Stop with a sentence if a setting cannot be."""
    for name in filter(None, cfg.rewards.split(",")):
        if name not in REWARDS:
            fail(f"--rewards {name} is unknown. Choose from: {', '.join(REWARDS)}.")
    for flag, least in LEAST.items():
        value = getattr(cfg, flag)
        if value is not None and not value >= least:
            fail(f"--{flag} {value}: must be at least {least}")
    if cfg.algorithm == "grpo" and cfg.num_generations < 2:
        fail("--num_generations 1: at least 2, or a completion has no siblings to beat")
    if not cfg.temperature > 0:
        fail(f"--temperature {cfg.temperature}: must be above 0, or a group's completions are all equal")


# ---- A run -----------------------------------------------------------------------------------------------

def setup(cfg):
    """-> all that a run works with, in one namespace (see its end), and the number of steps already done."""
    import eval_cvbench
    import prepare_sat
    accelerator = make_accelerator(cfg)
    is_main, count = accelerator.is_main_process, accelerator.num_processes
    output_dir, = broadcast_object_list([choose_output_dir(cfg) if is_main else None])
    last = checkpoints(output_dir)[-1:] if cfg.resume else []
    start, done = (last[0], steps_done(last[0])) if last else (cfg.model_name_or_path, 0)
    if done >= cfg.max_steps:
        accelerator.print(f"{output_dir} has done its {done} steps. There is nothing to do; --max_steps "
                          "takes it further.")
        return None, done
    tokenizer, image_processor = load_processors(start, cfg.max_pixels)
    template = choose_prompt(tokenizer, cfg.prompt)
    if template == "base":
        tokenizer.chat_template = eval_cvbench.SERVED_PROMPT  # for servers; the paper's code saves none
    data_path, data = prepare_sat.load_rows(cfg.data)
    if cfg.algorithm == "sft" and "completion" not in data.column_names:
        template += "-direct"  # nothing but the answer to learn
    kept = prepare_sat.rows_that_fit(data, data_path, template, tokenizer, image_processor,
                                     cfg.max_prompt_length, need_image=count > 1)  # all run the image tower
    eval_sets = eval_cvbench.load_sets(cfg.eval_data, cfg.eval_limit) if cfg.eval_steps else {}
    policy, sampler, reference, optimizer = build_models(cfg, start, accelerator, tokenizer)
    run = SimpleNamespace(
        cfg=cfg, accelerator=accelerator, output_dir=output_dir, tokenizer=tokenizer,
        image_processor=image_processor, template=template, data=data, data_path=data_path, kept=kept,
        policy=policy, sampler=sampler, reference=reference, optimizer=optimizer, eval_sets=eval_sets)
    if is_main:
        eval_cvbench.open_logs(cfg, output_dir, done)
    if done:
        load_optimizer(start, run)
    accelerator.project_configuration.set_directories(str(output_dir))
    accelerator.init_trackers("grpo_vision", config=dataclasses.asdict(cfg))
    accelerator.print(
        f"{output_dir}: {sampler.num_parameters() / 1e6:.1f}M parameters, {len(kept)} "
        f"questions, prompt: {template}, steps {done + 1} to {cfg.max_steps}\n{count} x "
        f"{accelerator.device.type}, {'FSDP2' if count > 1 else 'no wrapper'}, weights float32, computing in "
        f"{'bf16' if accelerator.mixed_precision == 'bf16' else 'float32'}, attention: "
        f"{cfg.attn_implementation}")
    return run, done


def main(argv=None):
    import eval_cvbench  # draws and evaluates; it imports this module, so not before this module is whole
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process, and meant so
    run, done = setup(parse_config(argv))
    if run is None:
        return
    cfg = run.cfg
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
        if cfg.eval_steps and ((step + 1) % cfg.eval_steps == 0 or last):
            eval_cvbench.evaluate_policy(run, step + 1)
        stopping = any(gather_object([bool(stop_asked)]))
        if (step + 1) % cfg.save_steps == 0 or last or stopping:
            save_checkpoint(run, step + 1)
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
