"""Visual R1-Zero in one file: GRPO on Qwen2-VL, after VisualThinker-R1-Zero (arXiv 2503.05132).

A base model that looks at a picture and answers a question learns, from right-or-wrong rewards alone, to reason
before it answers. One training step is this recipe; the sections below follow it in the same order.

  1. Draw B questions, each with its image, and put each into the prompt template.
  2. Sample G completions of each prompt from the policy: N = B * G rows, "prompt-major" (row i is of prompt i // G).
  3. Reward each completion by a rule:  R_i = accuracy (right answer: 0 or 1) + format (well formed: 0 or 1).
  4. Compare each with its own group:   A_i = (R_i - mean(R)) / (std(R) + 1e-4).
  5. Score each token c_t of each completion, with the policy pi being trained (and pi_ref, the frozen start):
         log pi(c_t | image, prompt, c_<t)
  6. Raise the probability of the tokens of better-than-average completions, lower the others, stay close to pi_ref:
         ratio = pi / pi_old        kl = pi_ref / pi - log(pi_ref / pi) - 1
         loss  = mean over rows of mean over tokens of  -min(ratio * A, clip(ratio, 1-eps, 1+eps) * A) + beta * kl

One idea makes it fast. A group shares one image and one prompt, so both run through the model ONCE per pass, and the
G completions branch off the keys and values that this leaves behind. It is exact: see `encode_prompt`, `score` and the
two-stage backward in `update`.

Symbols: B prompts, G samples per prompt, N = B * G rows, R rows of one chunk, P prompt tokens, C completion tokens,
V vocabulary, L decoder layers. Tensor lines end in their shape, as in `# (N, C)`.

    accelerate launch grpo_vision.py                                  # a toy, on any laptop, offline, in minutes
    accelerate launch grpo_vision.py --preset sat --max_steps 100     # Qwen2-VL-2B on SAT, one 80 GB GPU
"""
import dataclasses
import io
import json
import math
import os
import random
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Optional

import torch
import transformers
from accelerate import Accelerator
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, HfArgumentParser, Qwen2VLForConditionalGeneration
from transformers.cache_utils import Cache, DynamicLayer


def fail(message):
    """Stop with one sentence for the user (exit code 1) where a traceback would tell them nothing more."""
    raise SystemExit(f"error: {message}")


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------
def setting(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting of a run. Precedence: these defaults < --preset < the command line."""
    # what to train on what
    preset: str = setting("toy", "toy (offline, minutes on a CPU) or sat (the paper: Qwen2-VL-2B on SAT)")
    model_name_or_path: str = setting("data/toy/base", "model to start from: a folder or a hub id")
    data: str = setting("data/toy", "a Parquet file, or a folder with train.parquet, as prepare_sat.py writes it")
    output_dir: Optional[str] = setting(None, "where the run goes; default: the first free of runs/PRESET, -2, -3 ...")
    overwrite: bool = setting(False, "delete what output_dir holds and start anew")
    resume: bool = setting(False, "go on from the last checkpoint in output_dir")
    seed: int = setting(0, "seed of data order and sampling")
    # the prompt and the rollout
    max_prompt_length: int = setting(1024, "tokens, image tokens included; longer prompts are dropped, never cut")
    min_pixels: Optional[int] = setting(None, "images are enlarged to this area, pixels; default: as the model says")
    max_pixels: Optional[int] = setting(None, "images are shrunk to this area, pixels; default: as the model says")
    prompts_per_step: int = setting(8, "B, prompts per step over all processes")
    num_generations: int = setting(8, "G, completions per prompt")
    max_completion_length: int = setting(700, "C, tokens at most per completion")
    temperature: float = setting(1.0, "sampling temperature; scoring divides the logits by it as well")
    # rewards and loss
    rewards: str = setting("accuracy,format", "comma-separated names from REWARDS, added up")
    beta: float = setting(0.04, "weight of the KL penalty; 0 loads no reference model")
    epsilon: float = setting(0.2, "the ratio is clipped below 1 - epsilon")
    epsilon_high: Optional[float] = setting(None, "... and above 1 + epsilon_high; default: epsilon")
    num_iterations: int = setting(1, "updates per rollout; the clip acts only above 1")
    # the optimizer
    max_steps: int = setting(1500, "training steps (one rollout each)")
    learning_rate: float = setting(1e-6, "AdamW's rate at step 0; it falls linearly to 0 at max_steps")
    weight_decay: float = setting(0.0, "AdamW's weight decay")
    max_grad_norm: float = setting(1.0, "the gradient is scaled down to this norm")
    # the machine
    score_tokens: int = setting(4096, "completion tokens scored at a time: bounds the memory of the update")
    attn_implementation: str = setting("sdpa", "attention back end: sdpa, eager, flash_attention_2 (if installed)")
    save_steps: int = setting(100, "steps between checkpoints")
    log_with: Optional[str] = setting(None, "an accelerate tracker beside metrics.jsonl: tensorboard, wandb, ...")


PRESETS = {
    "toy": dict(model_name_or_path="data/toy/base", data="data/toy", prompts_per_step=16, max_completion_length=64,
                max_steps=80, learning_rate=3e-4, save_steps=40),
    # the paper's recipe, also Config's defaults; 401,408 = 512 * 28 * 28 pixels are at most 512 image tokens
    "sat": dict(model_name_or_path="Qwen/Qwen2-VL-2B", data="data/sat", min_pixels=3136, max_pixels=401408),
}


def parse_config(argv=None):
    """Command line (`argv`: list of str; None: sys.argv) -> Config."""
    parser = HfArgumentParser(Config, allow_abbrev=False, description="GRPO on Qwen2-VL; see the head of this file.")
    preset = parser.parse_known_args(argv)[0].preset
    if preset not in PRESETS:
        fail(f"--preset {preset} is unknown; choose one of: {', '.join(PRESETS)}")
    parser.set_defaults(**PRESETS[preset])
    cfg, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        fail(f"unknown argument {unknown[0]}; `python grpo_vision.py --help` lists them all")
    if bad := [name for name in reward_names(cfg) if name not in REWARDS]:
        fail(f"--rewards {bad[0]} is unknown; choose from: {', '.join(REWARDS)}")
    if cfg.num_generations < 2:
        fail(f"--num_generations {cfg.num_generations}: a group of at least 2 is needed to compare completions")
    if cfg.temperature <= 0:
        fail(f"--temperature {cfg.temperature}: must be above 0, or all completions of a group would be the same")
    for name in ("prompts_per_step", "max_completion_length", "max_steps", "num_iterations", "score_tokens", "save_steps"):
        if getattr(cfg, name) < 1:
            fail(f"--{name} {getattr(cfg, name)}: must be at least 1")
    return cfg


def reward_names(cfg):
    return cfg.rewards.split(",")


# ---------------------------------------------------------------------------------------------------------------------
# Step 1: the prompt
# ---------------------------------------------------------------------------------------------------------------------
IMAGE_TOKENS = "<|vision_start|><|image_pad|><|vision_end|>"

# The paper's template for the base model, verbatim. It prefills <think>, and it never mentions <answer>: the format
# reward alone makes the policy write <answer> blocks. (The reference also leaves a literal "<image>" in front.)
BASE_PROMPT = (
    "A conversation between User and Assistant. The user asks a question about the image, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer.\n"
    "User: {question} \nAssistant: Let me solve this step by step.\n<think>"
)


def build_question(question, options):
    """The paper's wording of a SAT question.

    >>> build_question("How many chairs are there?", ["2", "3", "5"])
    'Answer in natural language. How many chairs are there? Choose between the following options: 2, 3 or 5'
    """
    choices = " or ".join([", ".join(options[:-1]), options[-1]]) if len(options) > 1 else options[0]
    return f"Answer in natural language. {question} Choose between the following options: {choices}"


@dataclass
class Prompt:
    """One question with its images, as the model takes it."""
    text: str                                      # the template filled in, without the image tokens
    input_ids: torch.Tensor                        # (1, P) image tokens included
    position_ids: torch.Tensor                     # (3, 1, P) M-RoPE: time, height and width of each token
    pixel_values: Optional[torch.Tensor] = None    # (patches of all images, 3 * 2 * 14 * 14)
    image_grid_thw: Optional[torch.Tensor] = None  # (images, 3) patches along time, height and width

    @property
    def next_position(self):
        """Where the completion starts, on all three axes: not P, because an image of h x w tokens advances the
        position by max(h, w) only."""
        return int(self.position_ids.max()) + 1


def expand_images(text, tokens_per_image):
    """Put the images in front of the text: one <|image_pad|> per image token (Qwen2VLProcessor's work)."""
    images = [IMAGE_TOKENS.replace("<|image_pad|>", "<|image_pad|>" * n) for n in tokens_per_image]
    return "".join(images) + text


def build_prompt(text, images, tokenizer, image_processor, model):
    """text: str, images: list of PIL images (may be empty) -> Prompt on the model's device."""
    device, pixels, tokens_per_image = model.device, {}, []
    if images:
        pixels = image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt").to(device)
        tokens_per_image = (pixels["image_grid_thw"].prod(-1) // image_processor.merge_size**2).tolist()
    ids = tokenizer(expand_images(text, tokens_per_image), return_tensors="pt").input_ids.to(device)  # (1, P)
    is_image = (ids == model.config.image_token_id).int()
    if is_image.sum() != sum(tokens_per_image):
        fail(f"the text of a question contains <|image_pad|> itself; remove it from the data: {text[:200]!r}")
    position_ids, _ = model.model.get_rope_index(ids, is_image, image_grid_thw=pixels.get("image_grid_thw"))
    return Prompt(text, ids, position_ids, **pixels)


# ---------------------------------------------------------------------------------------------------------------------
# Step 3: rewards. Pure functions of the text; evaluation uses the same extractor and grader.
# ---------------------------------------------------------------------------------------------------------------------
ANSWER_BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
WELL_FORMED = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def completion_text(prompt_text, completion_ids, tokenizer):
    """What the policy said, without end tokens; the <think> that the prompt prefilled is put back here, only here."""
    prefill = "<think>" if prompt_text.endswith("<think>") else ""
    return prefill + tokenizer.decode(completion_ids, skip_special_tokens=True)


def extract_answer(text, strict):
    """The answer that a completion gives, or None.

    strict (training): the text inside the one answer block; None if there is none, or more than one, or it is empty.
    not strict (evaluation): the last block, else the whole text, so that a right answer in a wrong form counts.

    >>> extract_answer("<think>two chairs</think> <answer> 2 </answer>", strict=True)
    '2'
    >>> extract_answer("it is 2", strict=True) is None, extract_answer("it is 2", strict=False)
    (True, 'it is 2')
    """
    blocks = ANSWER_BLOCK.findall(text)
    if strict:
        return blocks[0].strip() or None if len(blocks) == 1 and text.count("<answer>") == 1 else None
    return (blocks[-1] if blocks else text).strip() or None


def normalise(text):
    return " ".join(text.lower().split()).removesuffix(".").strip()


def grade(answer, solution, options, strict=True):
    """Does `answer` (from `extract_answer`) choose `solution`? It may be an option's text or its letter.

    Case, spaces, one trailing full stop and brackets around a letter are forgiven. Nothing is matched inside other
    words or numbers. If not strict, a sentence counts when it names exactly one option, by its text or by a letter in
    brackets; a bare letter inside a sentence never counts, because "a" is also an article.

    >>> grade("Left.", "left", ["right", "left"]), grade("(B)", "left", ["right", "left"]), grade("5", "15", ["5", "15"])
    (True, True, False)
    >>> grade("a chair is left of it", "left", ["right", "left"]), grade("so it is left", "left", ["right", "left"], False)
    (False, True)
    """
    if answer is None:
        return False
    answer, solution, options = normalise(answer), normalise(solution), [normalise(option) for option in options]
    letter = re.fullmatch(r"\(?([a-z])\)?", answer)
    if answer not in options and letter and ord(letter[1]) - ord("a") < len(options):
        answer = options[ord(letter[1]) - ord("a")]
    elif answer not in options and not strict:
        named = {options[ord(x) - ord("a")] for x in re.findall(r"\(([a-z])\)", answer) if ord(x) - ord("a") < len(options)}
        for option in sorted(options, key=len, reverse=True):  # "no, it would not" before "no", which it contains
            answer, count = re.subn(rf"(?<![\w.]){re.escape(option)}(?!\w|\.\d)", " ", answer)
            named |= {option} if count else set()
        answer = named.pop() if len(named) == 1 else None
    return answer == solution


def accuracy_reward(completion, answer, options, **_):
    """1 if the only answer block chooses the right option, else 0. A copied template ("...") chooses none."""
    return float(grade(extract_answer(completion, strict=True), answer, options))


def format_reward(completion, **_):
    """1 if the completion is exactly one think block and then exactly one answer block, else 0.

    >>> format_reward("<think>hm</think> <answer>left</answer>"), format_reward("<think>hm <answer>left</answer>")
    (1.0, 0.0)
    """
    return float(bool(WELL_FORMED.fullmatch(completion)) and all(completion.count(tag) == 1 for tag in TAGS))


# name -> function(completion, **columns of the data row) -> float. `completion` starts with the prefilled <think>.
REWARDS = {"accuracy": accuracy_reward, "format": format_reward}


# ---------------------------------------------------------------------------------------------------------------------
# Step 4: advantages
# ---------------------------------------------------------------------------------------------------------------------
def group_advantages(rewards, num_generations):
    """(N,) rewards, prompt-major -> (N,) advantages  A = (r - mean) / (std + 1e-4), unbiased std, within each group.

    The group is its own baseline: no value network. A group in which all rewards are equal teaches nothing and gets
    exactly 0 (DeepSeekMath, arXiv 2402.03300, eq. 3; the 1e-4 is the reference code's).
    """
    groups = rewards.view(-1, num_generations)  # (B, G)
    mean, std = groups.mean(1, keepdim=True), groups.std(1, keepdim=True)
    has_spread = groups.amax(1, keepdim=True) > groups.amin(1, keepdim=True)  # not std > 0, which rounding can fake
    return torch.where(has_spread, (groups - mean) / (std + 1e-4), 0.0).view(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Steps 2 and 5: encode the prompt once, branch into G completions
# ---------------------------------------------------------------------------------------------------------------------
def patch_embed_as_matmul(model):
    """Compute the patch embedding as the matrix product that it is: its Conv3d has kernel = stride = the whole patch.

    Same weights, same checkpoint; the stock Conv3d backward is 8 times slower on a CPU. Returns the model.
    """
    def forward(self, pixels):  # (patches, 1176) -> (patches, embed_dim)
        return nn.functional.linear(pixels.to(self.proj.weight.dtype), self.proj.weight.flatten(1))

    patch_embed = model.model.visual.patch_embed
    patch_embed.forward = MethodType(forward, patch_embed)  # a method, so that a deepcopy binds to its own weights
    return model


def encode_prompt(model, prompt):
    """Image tower and prompt, once -> the keys and values of all prompt tokens but the last.

    The last prompt token is left to be the first input of every completion: its output predicts the first completion
    token, so that sampling and scoring need nothing from here but keys and values.
    Returns a list over layers of (keys, values), each (1, kv_heads, P - 1, head_dim), with gradient if enabled.
    """
    ids = prompt.input_ids[:, :-1]
    output = model.model(input_ids=ids, position_ids=prompt.position_ids[:, :, :-1], use_cache=True,
                         mm_token_type_ids=(ids == model.config.image_token_id).int(),
                         pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw)
    return [(layer.keys, layer.values) for layer in output.past_key_values.layers]


class BranchLayer(DynamicLayer):
    """One layer of a cache that starts out filled with the prompt's keys and values, (rows, kv_heads, P - 1, head_dim).

    room: tokens to come. 0 grows the cache by `torch.cat`, which autograd can follow (scoring). Above 0 the room is
    allocated at once and written in place, because a `cat` at each token would copy the whole cache (sampling).
    """
    def __init__(self, keys, values, room=0):
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.length = keys.shape[-2]
        self.keys, self.values = (nn.functional.pad(x, (0, 0, 0, room)) if room else x for x in (keys, values))
        self.preallocated = room > 0

    def update(self, keys, values, *args, **kwargs):
        if not self.preallocated:
            return super().update(keys, values)
        start, self.length = self.length, self.length + keys.shape[-2]
        self.keys[:, :, start:self.length], self.values[:, :, start:self.length] = keys, values
        return self.keys[:, :, :self.length], self.values[:, :, :self.length]

    def get_seq_length(self):
        return self.length if self.preallocated else self.keys.shape[-2]


def token_logps(model, hidden, temperature, suppressed):
    """(..., H) hidden states -> (..., V) log-probabilities: the one place that turns states into a distribution.

    suppressed: (V,) bool, tokens that are never sampled (see `suppressed_tokens`). Temperature and suppression must be
    the same while sampling and while scoring, or the ratio compares two different policies.
    """
    logits = model.lm_head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bf16 would round log-probabilities
    # the smallest finite number and not -inf, so that p * log p is 0 in the entropy and not nan
    logits = (logits / temperature).masked_fill(suppressed, torch.finfo(logits.dtype).min)
    return logits.log_softmax(-1)


@dataclass
class Rollout:
    completion_ids: torch.Tensor     # (N, C) padded at the right with the end token
    completion_mask: torch.Tensor    # (N, C) bool, True up to and including the end token
    sampling_logps: torch.Tensor     # (N, C) log-probability of each token when it was drawn, 0 where padded
    finished: torch.Tensor           # (N,) bool, False if cut at max_completion_length


@torch.no_grad()
def sample(model, prompts, num_generations, max_completion_length, temperature, suppressed, eos_ids, generator=None):
    """Step 2. Draw G completions of each prompt, all N rows decoding together; temperature 0 is greedy.

    Each prompt runs once; its keys and values are repeated G times. Prompts of different length are padded at the left
    and masked. A row that drew an end token leaves the batch, so the last, longest rows run alone and fast.
    """
    N, C, device = len(prompts) * num_generations, max_completion_length, prompts[0].input_ids.device
    encoded = [encode_prompt(model, prompt) for prompt in prompts]
    lengths = torch.tensor([prompt.input_ids.shape[1] - 1 for prompt in prompts], device=device)
    longest = int(lengths.max())
    layers = []
    for branches in zip(*encoded):  # layer by layer: the B prompts' (keys, values)
        padded = [torch.cat([nn.functional.pad(x, (0, 0, longest - x.shape[-2], 0)) for x in kv]) for kv in zip(*branches)]
        layers.append(BranchLayer(*(x.repeat_interleave(num_generations, 0) for x in padded), room=C))
    cache = Cache(layers=layers)

    per_row = lambda values: torch.as_tensor(values, device=device).repeat_interleave(num_generations, 0)
    tokens = per_row(torch.cat([prompt.input_ids[:, -1:] for prompt in prompts]))            # (N, 1)
    positions = per_row([prompt.next_position - 1 for prompt in prompts])[:, None]           # (N, 1)
    mask = torch.arange(longest + C, device=device) >= per_row(longest - lengths)[:, None]   # (N, longest + C)
    ragged = bool((lengths < longest).any())
    ids = torch.full((N, C), eos_ids[0], device=device)
    logps = torch.zeros(N, C, device=device, dtype=torch.promote_types(model.dtype, torch.float32))
    taken = torch.full((N,), C, device=device)
    running, ends = torch.arange(N, device=device), torch.tensor(eos_ids, device=device)
    for t in range(C):
        hidden = model.model(input_ids=tokens, position_ids=(positions + t).expand(3, -1, -1), past_key_values=cache,
                             attention_mask=mask[:, :longest + t + 1] if ragged else None).last_hidden_state
        distribution = token_logps(model, hidden[:, -1], temperature or 1.0, suppressed)      # (running, V)
        if temperature > 0:  # argmax(log p - log Exp(1)) is a draw from p: the Gumbel trick, cheap on every device
            noise = torch.empty_like(distribution).exponential_(generator=generator).log_()
            tokens = (distribution - noise).argmax(-1, keepdim=True)                          # (running, 1)
        else:
            tokens = distribution.argmax(-1, keepdim=True)
        ids[running, t] = tokens[:, 0]
        logps[running, t] = distribution.gather(-1, tokens)[:, 0]
        ended = torch.isin(tokens[:, 0], ends)
        if ended.any():
            taken[running[ended]] = t + 1
            running, tokens, positions, mask = (x[~ended] for x in (running, tokens, positions, mask))
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[~ended], layer.values[~ended]
        if not len(running):
            break
    finished = torch.ones(N, dtype=torch.bool, device=device).index_fill(0, running, False)
    C = int(taken.max())
    completion_mask = torch.arange(C, device=device) < taken[:, None]
    return Rollout(ids[:, :C], completion_mask, logps[:, :C], finished)


def score(model, prompt, prompt_kv, completion_ids, completion_mask, temperature, suppressed):
    """Step 5. Log-probabilities of R completions of one prompt, given the prompt's keys and values.

    All rows attend to the same prompt keys and values (expanded, not computed again) and causally to themselves. There
    is no padding before a completion, hence no mask; what follows a completion is padding that nothing looks at.
    Every row's positions restart at `prompt.next_position`: as if it were alone behind the prompt.

    completion_ids, completion_mask: (R, C) -> per_token_logps (R, C), entropy (R, C, no gradient); 0 where masked.
    """
    R, C = completion_ids.shape
    inputs = torch.cat([prompt.input_ids[:, -1:].expand(R, 1), completion_ids[:, :-1]], 1)              # (R, C)
    positions = torch.arange(C, device=inputs.device) + prompt.next_position - 1                        # (C,)
    cache = Cache(layers=[BranchLayer(*(x.expand(R, -1, -1, -1) for x in kv)) for kv in prompt_kv])
    hidden = model.model(input_ids=inputs, position_ids=positions.expand(3, R, C),
                         past_key_values=cache).last_hidden_state                                       # (R, C, H)
    logps = token_logps(model, hidden[completion_mask], temperature, suppressed)                        # (tokens, V)
    chosen = logps.gather(-1, completion_ids[completion_mask][:, None])[:, 0]                           # (tokens,)
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(-1)                                                        # (tokens,)
    zeros = torch.zeros(R, C, dtype=logps.dtype, device=logps.device)
    return zeros.masked_scatter(completion_mask, chosen), zeros.masked_scatter(completion_mask, entropy)


class Policy(nn.Module):
    """The trained model behind one door. accelerate wraps this module and its hooks run in `forward`, so every forward
    of the trained weights, of either kind, must come through here."""
    def __init__(self, model, temperature, suppressed):
        super().__init__()
        self.model, self.temperature = model, temperature
        self.register_buffer("suppressed", suppressed, persistent=False)

    def forward(self, prompt, prompt_kv=None, completion_ids=None, completion_mask=None):
        if prompt_kv is None:
            return encode_prompt(self.model, prompt)
        return score(self.model, prompt, prompt_kv, completion_ids, completion_mask, self.temperature, self.suppressed)


# ---------------------------------------------------------------------------------------------------------------------
# Step 6: the loss and the update
# ---------------------------------------------------------------------------------------------------------------------
def grpo_loss(per_token_logps, old_per_token_logps, ref_per_token_logps, advantages, completion_mask, *,
              epsilon, epsilon_high, beta, num_sequences):
    """DeepSeekMath eq. 3 for R rows out of `num_sequences`; summed over all chunks of rows it is the loss of the step.

    *_logps: (R, C), advantages: (R,), completion_mask: (R, C); ref_per_token_logps may be None if beta is 0.
    Returns the loss and, for the log, kl (R, C) and whether the clip acts (R, C).

    With num_iterations 1, pi_old IS pi: the ratio is 1, the clip never acts, and since advantages sum to 0 in a group
    the policy term prints as 0: the printed loss is beta * KL. The gradient is not 0, because d ratio = d log pi:
    each token is still pushed by its A.
    """
    A = advantages[:, None]                                                                # (R, 1)
    # ratio = pi / pi_old
    ratio = (per_token_logps - old_per_token_logps).exp()                                  # (R, C)
    # policy term = -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    per_token_loss = -torch.min(ratio * A, clipped * A)                                    # (R, C)
    # kl = pi_ref / pi - log(pi_ref / pi) - 1:  the "k3" estimator, unbiased and never negative
    kl = torch.zeros_like(per_token_logps)
    if beta > 0:
        log_ratio = ref_per_token_logps - per_token_logps
        kl = log_ratio.exp() - log_ratio - 1
        per_token_loss = per_token_loss + beta * kl
    # loss = mean over sequences of mean over tokens
    per_sequence = (per_token_loss * completion_mask).sum(1) / completion_mask.sum(1)      # (R,)
    return per_sequence.sum() / num_sequences, kl.detach(), (clipped * A < ratio * A).detach()


def chunks(lengths, score_tokens):
    """(rows,) lengths -> lists of row numbers, by length, such that rows * longest of each is at most score_tokens.

    Rows of like length waste little padding; a row longer than the budget is a chunk of its own.

    >>> chunks([5, 2, 9, 3], score_tokens=10)
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
    """The rows of one group in chunks -> (row numbers (R,), completion_ids (R, C'), completion_mask (R, C'))."""
    first = group * cfg.num_generations
    lengths = rollout.completion_mask[first:first + cfg.num_generations].sum(1).tolist()
    for chunk in chunks(lengths, cfg.score_tokens):
        rows = torch.tensor([first + i for i in chunk], device=rollout.completion_ids.device)
        longest = max(lengths[i] for i in chunk)
        yield rows, rollout.completion_ids[rows, :longest], rollout.completion_mask[rows, :longest]


@torch.no_grad()
def score_rollout(policy, prompts, rollout, cfg):
    """Log-probabilities of a whole rollout without gradient, (N, C): what the reference model says."""
    per_token_logps = torch.zeros_like(rollout.sampling_logps)
    for group, prompt in enumerate(prompts):
        prompt_kv = policy(prompt)
        for rows, ids, mask in group_chunks(rollout, group, cfg):
            per_token_logps[rows, :ids.shape[1]] = policy(prompt, prompt_kv, ids, mask)[0]
    return per_token_logps


def update(policy, prompts, rollout, advantages, ref_per_token_logps, old_per_token_logps, cfg):
    """One pass over the rollout that leaves the gradient in the policy's parameters. The two-stage backward:

      stage 1  For each chunk of completions: forward from the prompt's keys and values, then backward. These are
               detached leaves, so gradient gathers on them, and the chunk's graph is freed at once.
      stage 2  One backward through prompt and image tower carries the gathered gradient on.

    It is the chain rule cut in two, hence exact; memory is that of one prompt and one chunk, whatever G is.

    old_per_token_logps: (N, C), read if it is given; None in the first pass, when pi_old is the policy as it is.
    Returns this pass's log-probs (N, C) and a dict of sums over the rows for the log.
    """
    per_token_logps = torch.zeros_like(rollout.sampling_logps)
    sums = dict.fromkeys(("loss", "kl", "entropy", "clipped"), 0.0)
    for group, prompt in enumerate(prompts):
        prompt_kv = policy(prompt)
        leaves = [tuple(x.detach().requires_grad_() for x in kv) for kv in prompt_kv]
        for rows, ids, mask in group_chunks(rollout, group, cfg):
            C = ids.shape[1]
            logps, entropy = policy(prompt, leaves, ids, mask)                                        # (R, C)
            old = logps.detach() if old_per_token_logps is None else old_per_token_logps[rows, :C]
            ref = ref_per_token_logps[rows, :C] if cfg.beta > 0 else None
            loss, kl, clipped = grpo_loss(
                logps, old, ref, advantages[rows], mask, num_sequences=len(advantages), beta=cfg.beta,
                epsilon=cfg.epsilon, epsilon_high=cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high)
            loss.backward()                                                                           # stage 1
            per_token_logps[rows, :C] = logps.detach()
            for name, value in (("kl", kl), ("entropy", entropy), ("clipped", clipped)):
                sums[name] += (value * mask).sum().item()
            sums["loss"] += loss.item()
        torch.autograd.backward([x for kv in prompt_kv for x in kv],
                                [x.grad for kv in leaves for x in kv])                                # stage 2
    return per_token_logps, sums


# ---------------------------------------------------------------------------------------------------------------------
# Around the algorithm: model, data, files
# ---------------------------------------------------------------------------------------------------------------------
def load_model(path, attn_implementation="sdpa", dtype=torch.float32):
    """Model directory or hub id -> Qwen2-VL with the matrix-product patch embedding, without dropout.

    float32 is said explicitly: the published files load as bf16, in which an update of 1e-6 is lost to rounding.
    """
    try:
        model, report = Qwen2VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True)
    except (OSError, ImportError, ValueError) as error:
        fail(f"cannot load a Qwen2-VL model from --model_name_or_path {path}: {str(error).strip().splitlines()[0]}")
    if model.config.model_type != "qwen2_vl" or report["missing_keys"]:
        fail(f"{path} is not a whole Qwen2-VL model: {len(report['missing_keys'])} weights are missing from its files")
    return patch_embed_as_matmul(model).eval()


def load_processors(path, min_pixels=None, max_pixels=None):
    """-> tokenizer, image processor (PIL back end: the same pixels on every machine, no torchvision)."""
    sizes = {k: v for k, v in dict(min_pixels=min_pixels, max_pixels=max_pixels).items() if v is not None}
    try:
        return AutoTokenizer.from_pretrained(path), AutoImageProcessor.from_pretrained(path, backend="pil", **sizes)
    except (OSError, ValueError) as error:
        fail(f"cannot load tokenizer and image processor from {path}: {str(error).strip().splitlines()[0]}")


def suppressed_tokens(model, tokenizer):
    """(V,) bool: vision tokens, which would crash the next forward, and vocabulary rows that no token uses."""
    suppressed = torch.arange(model.config.get_text_config().vocab_size, device=model.device) >= len(tokenizer)
    vision = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    suppressed[tokenizer.convert_tokens_to_ids(vision)] = True
    return suppressed


def end_tokens(tokenizer):
    """Ids that end a completion: the tokenizer's own end token first, then whichever of Qwen's two it also has."""
    others = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    return list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *others] if i is not None))


def open_images(row, where):
    """A data row -> its images as PIL, decoded; an image that does not decode is an error that names the row."""
    images = []
    for image in row["images"]:
        try:
            images.append(Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]))
            images[-1].load()
        except Exception as error:  # PIL raises many kinds, also SyntaxError and struct.error
            fail(f"{where}: the image does not decode ({error}); remove the row (prepare_sat.py skips such rows)")
    return images


def load_data(cfg, tokenizer, image_processor):
    """Rows that fit into max_prompt_length, as a `datasets` table, and the path that they come from."""
    import datasets
    path = Path(cfg.data)
    path = path / "train.parquet" if path.is_dir() else path
    if not path.exists():
        fail(f"no training data at --data {path}; `python prepare_sat.py` writes data/sat, `... --toy` writes data/toy")
    try:
        data = datasets.Dataset.from_parquet(str(path))
    except Exception as error:
        fail(f"--data {path} is not a readable Parquet file: {str(error).strip().splitlines()[0]}")
    if missing := {"images", "question", "options", "answer"} - set(data.column_names):
        fail(f"--data {path} lacks the column {sorted(missing)[0]!r} (it has: {', '.join(data.column_names)}); "
             "convert it with prepare_sat.py")
    data = data.cast_column("images", datasets.List(datasets.Image(decode=False)))

    def fits(row, index):
        where, pads = f"{path}, row {index}", []
        for image in row["images"]:
            try:  # PIL reads only the header here
                width, height = Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]).size
            except Exception as error:
                fail(f"{where}: the image does not decode ({error}); remove the row (prepare_sat.py skips such rows)")
            pads.append(image_processor.get_number_of_image_patches(height, width) // image_processor.merge_size**2)
        text = BASE_PROMPT.format(question=build_question(row["question"], row["options"]))
        return len(tokenizer(expand_images(text, pads)).input_ids) <= cfg.max_prompt_length

    kept = [i for i, row in enumerate(tqdm(data, desc="measuring prompts", leave=False)) if fits(row, i)]
    if len(kept) < len(data):
        print(f"dropped {len(data) - len(kept)} of {len(data)} rows: longer than max_prompt_length {cfg.max_prompt_length}")
    if not kept:
        fail(f"no row of {path} has a prompt of at most --max_prompt_length {cfg.max_prompt_length} tokens; raise it")
    return data.select(kept), path


def seeded(*key):
    """A random.Random that depends on `key` alone. Every draw has its own, from (seed, purpose, step, rank): nothing
    that came before matters, so a resumed run needs to replay nothing."""
    return random.Random("/".join(map(str, key)))


def draw(num_rows, seed, first, count):
    """Rows number first .. first + count - 1 of an endless walk over the data, reshuffled at each epoch."""
    epochs = range(first // num_rows, (first + count - 1) // num_rows + 1)
    order = {epoch: seeded(seed, "epoch", epoch).sample(range(num_rows), num_rows) for epoch in epochs}
    return [order[i // num_rows][i % num_rows] for i in range(first, first + count)]


def choose_output_dir(cfg):
    """Settle cfg.output_dir: named by hand it must be new, or --overwrite or --resume says what to do with it."""
    if cfg.output_dir is None:
        cfg.output_dir, n = f"runs/{cfg.preset}", 1
        while Path(cfg.output_dir).exists() and not (cfg.resume or cfg.overwrite):
            n += 1
            cfg.output_dir = f"runs/{cfg.preset}-{n}"
    elif Path(cfg.output_dir).exists() and not (cfg.resume or cfg.overwrite):
        fail(f"--output_dir {cfg.output_dir} exists; add --resume to go on with it, or --overwrite to delete it")
    if cfg.overwrite and not cfg.resume:
        shutil.rmtree(cfg.output_dir, ignore_errors=True)


def last_checkpoint(output_dir):
    """-> (Path, step) of the newest checkpoint-N. Every such folder is complete: it got its name when it was."""
    found = [(int(p.name.removeprefix("checkpoint-")), p) for p in Path(output_dir).glob("checkpoint-*") if p.name[11:].isdigit()]
    if not found:
        fail(f"--resume: no checkpoint in {output_dir}; start without --resume")
    return max(found)[::-1]


def save_model(folder, model, tokenizer, image_processor, state=None):
    """A plain model directory, and what resuming needs in state/; written under another name and then renamed, so that
    a folder of this name is always complete."""
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(temporary)
    if state is not None:
        (temporary / "state").mkdir()
        torch.save(state, temporary / "state" / "trainer.pt")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def append_jsonl(path, records):
    with open(path, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def cut_log(path, step):
    """Drop the lines that a resumed run is about to write again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in lines))


# ---------------------------------------------------------------------------------------------------------------------
# The main loop
# ---------------------------------------------------------------------------------------------------------------------
def main(argv=None):
    cfg = parse_config(argv)
    transformers.utils.logging.set_verbosity_error()
    # The launcher sets OMP_NUM_THREADS=1 and python does not: without this line they differ in speed and in bits.
    torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    accelerator = Accelerator(log_with=cfg.log_with, project_dir=cfg.output_dir,
                              mixed_precision="bf16" if torch.cuda.is_available() else "no")
    if accelerator.num_processes > 1:
        fail("this version trains on one process; start it with `accelerate launch --num_processes 1 grpo_vision.py`")
    rank, main_process = accelerator.process_index, accelerator.is_main_process
    choose_output_dir(cfg)
    output_dir = Path(cfg.output_dir)
    if cfg.data == PRESETS["toy"]["data"] and main_process and not Path(cfg.data).exists():
        import prepare_sat  # draws the toy world and trains the toy's base model: a few minutes, once
        prepare_sat.make_toy(cfg.data)
    accelerator.wait_for_everyone()

    start, done = last_checkpoint(output_dir) if cfg.resume else (cfg.model_name_or_path, 0)
    tokenizer, image_processor = load_processors(start, cfg.min_pixels, cfg.max_pixels)
    data, data_path = load_data(cfg, tokenizer, image_processor)
    model = load_model(start, cfg.attn_implementation).to(accelerator.device)
    reference = None
    suppressed, eos_ids = suppressed_tokens(model, tokenizer), end_tokens(tokenizer)
    if cfg.beta > 0:
        frozen = load_model(cfg.model_name_or_path, cfg.attn_implementation).to(accelerator.device).requires_grad_(False)
        reference = Policy(frozen, cfg.temperature, suppressed)
    policy = Policy(model, cfg.temperature, suppressed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    if cfg.resume:
        optimizer.load_state_dict(torch.load(start / "state" / "trainer.pt")["optimizer"])
        for name in ("metrics.jsonl", "completions.jsonl"):
            cut_log(output_dir / name, done)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2))
    accelerator.init_trackers("grpo_vision", config=dataclasses.asdict(cfg))
    print(f"{cfg.output_dir}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {len(data)} questions, "
          f"{cfg.prompts_per_step} prompts x {cfg.num_generations} completions per step, on {accelerator.device}")

    B, G = cfg.prompts_per_step // accelerator.num_processes, cfg.num_generations  # B: of this process
    progress = tqdm(range(done, cfg.max_steps), initial=done, total=cfg.max_steps, desc="training", disable=not main_process)
    for step in progress:
        clock = [time.perf_counter()]
        # 1. B questions with their images
        numbers = draw(len(data), cfg.seed, step * cfg.prompts_per_step + rank * B, B)
        rows = [data[i] for i in numbers]
        prompts = [build_prompt(BASE_PROMPT.format(question=build_question(row["question"], row["options"])),
                                open_images(row, f"{data_path}, row {i} of those kept"), tokenizer, image_processor, model)
                   for i, row in zip(numbers, rows)]
        # 2. G completions of each
        generator = torch.Generator(accelerator.device)
        generator.manual_seed(seeded(cfg.seed, "sample", step, rank).getrandbits(63))
        with accelerator.autocast():
            rollout = sample(model, prompts, G, cfg.max_completion_length, cfg.temperature, suppressed, eos_ids, generator)
        lengths = rollout.completion_mask.sum(1)                                               # (N,)
        texts = [completion_text(prompts[i // G].text, rollout.completion_ids[i, :lengths[i]], tokenizer) for i in range(B * G)]
        clock.append(time.perf_counter())
        # 3. rewards
        rewards = {name: torch.tensor([REWARDS[name](text, **rows[i // G]) for i, text in enumerate(texts)])
                   for name in reward_names(cfg)}                                              # each (N,)
        reward = torch.stack(list(rewards.values())).sum(0).to(accelerator.device)             # (N,)
        # 4. advantages
        advantages = group_advantages(reward, G)                                               # (N,)
        # 5. the reference's log-probabilities
        with accelerator.autocast():
            ref_logps = score_rollout(reference, prompts, rollout, cfg) if cfg.beta > 0 else None   # (N, C)
        clock.append(time.perf_counter())
        # 6. the update: num_iterations passes over the same rollout
        learning_rate = cfg.learning_rate * (1 - step / cfg.max_steps)
        optimizer.param_groups[0]["lr"] = learning_rate
        old_logps = None
        for _ in range(cfg.num_iterations):
            logps, sums = update(policy, prompts, rollout, advantages, ref_logps, old_logps, cfg)
            old_logps = logps if old_logps is None else old_logps                              # (N, C)
            grad_norm = float(accelerator.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm))
            if not math.isfinite(sums["loss"] + grad_norm):
                break
            optimizer.step()
            optimizer.zero_grad()
        clock.append(time.perf_counter())

        # what happened
        samples = [{"step": step + 1, "row": numbers[i // G], "prompt": prompts[i // G].text, "completion": text,
                    "answer": rows[i // G]["answer"], **{f"rewards/{k}": v[i].item() for k, v in rewards.items()},
                    "reward": reward[i].item(), "advantage": advantages[i].item(), "length": lengths[i].item()}
                   for i, text in enumerate(texts)]
        if not math.isfinite(sums["loss"] + grad_norm):
            append_jsonl(output_dir / "bad_batch.jsonl", samples)
            fail(f"step {step + 1}: loss {sums['loss']} with gradient norm {grad_norm}; the batch is in "
                 f"{output_dir}/bad_batch.jsonl and the last checkpoint is kept; lower --learning_rate and --resume")
        tokens = lengths.sum().item()
        metrics = {
            "step": step + 1, "loss": sums["loss"], "reward": reward.mean().item(), "reward_std": reward.view(B, G).std(1).mean().item(),
            **{f"rewards/{name}": values.mean().item() for name, values in rewards.items()},
            "completions/mean_length": tokens / len(texts),
            "completions/clipped_ratio": 1 - rollout.finished.float().mean().item(),
            "frac_reward_zero_std": (reward.view(B, G).std(1) == 0).float().mean().item(),
            "kl": sums["kl"] / tokens, "entropy": sums["entropy"] / tokens, "clip_ratio": sums["clipped"] / tokens,
            "grad_norm": grad_norm, "learning_rate": learning_rate,
            "sampler_mismatch": ((old_logps - rollout.sampling_logps).abs() * rollout.completion_mask).max().item(),
            **{f"seconds/{phase}": b - a for phase, a, b in zip(("rollout", "reference", "update"), clock, clock[1:])},
        }
        append_jsonl(output_dir / "metrics.jsonl", [metrics])
        append_jsonl(output_dir / "completions.jsonl", samples)
        accelerator.log({k: v for k, v in metrics.items() if k != "step"}, step=step + 1)
        progress.write(f"step {step + 1:4d}  reward {metrics['reward']:.3f}  "
                       + "  ".join(f"{name} {metrics['rewards/' + name]:.2f}" for name in rewards)
                       + f"  length {metrics['completions/mean_length']:.1f}  kl {metrics['kl']:.4f}  {clock[-1] - clock[0]:.1f} s")
        if (step + 1) % cfg.save_steps == 0 or step + 1 == cfg.max_steps:
            save_model(output_dir / f"checkpoint-{step + 1}", model, tokenizer, image_processor,
                       state={"optimizer": optimizer.state_dict()})
    save_model(output_dir / "final", model, tokenizer, image_processor)
    accelerator.end_training()
    print(f"done: {output_dir}/final; evaluate it with `python eval_cvbench.py --model {output_dir}/final`")


if __name__ == "__main__":
    import grpo_vision  # under its own name: what imports it later (prepare_sat, your rewards) meets the same module
    grpo_vision.main()
