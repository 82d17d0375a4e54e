"""Visual R1-Zero in one file: GRPO on Qwen2-VL, after VisualThinker-R1-Zero (arXiv 2503.05132).

A base model that looks at a picture and answers a question learns, from right-or-wrong rewards alone, to
reason before it answers. One training step is this recipe. The sections below follow it, except that step 5
stands beside step 2, with which it shares its code:

  1. Draw B questions, each with its image, and put each into the prompt template.
  2. Sample G completions of each prompt from the policy: N = B * G rows, prompt-major (row i: prompt i // G).
  3. Reward each completion by rule:    R_i = accuracy (right answer: 0 or 1) + format (well formed: 0 or 1)
  4. Compare it with its own group:     A_i = (R_i - mean(R)) / (std(R) + 1e-4)
  5. Score each completion token c_t, with the policy pi in training and with pi_ref, its frozen start:
                                        log pi(c_t | image, prompt, c_<t)
  6. Make the tokens of better-than-average completions likelier, the others less, and stay close to pi_ref:
         ratio = pi / pi_old            kl = pi_ref / pi - log(pi_ref / pi) - 1
         loss  = mean over rows of mean over tokens of -min(ratio A, clip(ratio, 1-eps, 1+eps) A) + beta kl

One idea makes it fast. A group shares one image and one prompt, so these run through the model ONCE per
pass, and the G completions branch off the keys and values they leave behind. It is exact: `encode_prompt`,
`score`, and the two-stage backward in `update` show how.

Symbols: B prompts, G samples of each, N = B * G rows, R rows of one chunk, P prompt tokens, C completion
tokens, H hidden size, V vocabulary. Tensor lines end in their shape: # (N, C)

    accelerate launch grpo_vision.py                                 # a toy: any laptop, offline, minutes
    accelerate launch grpo_vision.py --preset sat --max_steps 100    # Qwen2-VL-2B on SAT, on a GPU
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
    """Stop with one sentence (exit code 1) where a traceback would tell the user nothing more."""
    raise SystemExit(f"error: {message}")


# ---- Settings --------------------------------------------------------------------------------------------

def setting(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting of a run. Precedence: these defaults < --preset < the command line."""
    # what to train, on what
    preset: str = setting("toy", "toy (offline, minutes on a CPU) or sat (the paper: Qwen2-VL-2B on SAT)")
    model_name_or_path: str = setting("data/toy/base", "model to start from: a folder or a hub id")
    data: str = setting("data/toy", "Parquet file from prepare_sat.py, or a folder with train.parquet")
    output_dir: Optional[str] = setting(None, "folder of the run; default: runs/PRESET, or runs/PRESET-2 ...")
    overwrite: bool = setting(False, "delete what is in output_dir and start anew")
    resume: bool = setting(False, "go on from the last checkpoint in output_dir")
    seed: int = setting(0, "seed of data order and sampling")
    # prompt and rollout
    max_prompt_length: int = setting(1024, "tokens, images included; longer prompts are dropped, never cut")
    min_pixels: Optional[int] = setting(None, "smaller images are enlarged to this; default: the model's")
    max_pixels: Optional[int] = setting(None, "larger images are shrunk to this; default: the model's")
    prompts_per_step: int = setting(8, "B, prompts per step over all processes")
    num_generations: int = setting(8, "G, completions per prompt")
    max_completion_length: int = setting(700, "tokens at most per completion")
    temperature: float = setting(1.0, "sampling temperature; scoring divides the logits by it as well")
    # rewards and loss
    rewards: str = setting("accuracy,format", "names from REWARDS, added up")
    beta: float = setting(0.04, "weight of the KL penalty; 0 loads no reference model")
    epsilon: float = setting(0.2, "the ratio is clipped below 1 - epsilon")
    epsilon_high: Optional[float] = setting(None, "and above 1 + epsilon_high; default: epsilon")
    num_iterations: int = setting(1, "updates per rollout; the clip can act only from the second on")
    loss_type: str = setting("grpo", "how tokens are averaged: grpo, dr_grpo or dapo, see LOSS_TYPES")
    scale_rewards: bool = setting(True, "divide advantages by the group's std (false: Dr. GRPO)")
    # optimizer
    max_steps: int = setting(1500, "training steps, one rollout each")
    learning_rate: float = setting(1e-6, "AdamW's rate at the start; falls linearly to 0 at max_steps")
    weight_decay: float = setting(0.0, "AdamW's weight decay")
    max_grad_norm: float = setting(1.0, "a longer gradient is scaled down to this norm")
    # machine and files
    score_tokens: int = setting(4096, "completion tokens scored at a time: bounds the memory of the update")
    attn_implementation: str = setting("sdpa", "sdpa, eager, or flash_attention_2 if installed")
    save_steps: int = setting(100, "steps between checkpoints")
    eval_steps: int = setting(100, "steps between evaluations while training; 0: none")
    eval_data: str = setting("nyu-visionx/CV-Bench", "comma-separated sets, as eval_cvbench.py takes them")
    eval_limit: int = setting(128, "questions of each set, the same ones every time")
    log_with: Optional[str] = setting(None, "an accelerate tracker besides metrics.jsonl: tensorboard, ...")


PRESETS = {
    "toy": dict(prompts_per_step=16, max_completion_length=64, max_steps=100, learning_rate=2e-4, beta=0.01,
                save_steps=50, eval_steps=10, eval_data="data/toy/cvbench,data/toy/test.parquet"),
    # the paper's recipe is Config's defaults; 401,408 pixels are 512 image tokens of 28 x 28
    "sat": dict(model_name_or_path="Qwen/Qwen2-VL-2B", data="data/sat", min_pixels=3136, max_pixels=401408),
}


def parse_config(argv=None):
    """Command line (list of str; None: sys.argv) -> Config."""
    parser = HfArgumentParser(Config, allow_abbrev=False, description=__doc__.splitlines()[0])
    preset = parser.parse_known_args(argv)[0].preset
    if preset not in PRESETS:
        fail(f"--preset {preset} is unknown; choose one of: {', '.join(PRESETS)}")
    parser.set_defaults(**PRESETS[preset])
    cfg, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        fail(f"unknown argument {unknown[0]}; `python grpo_vision.py --help` lists them all")
    for flag, known in (("rewards", REWARDS), ("loss_type", LOSS_TYPES)):
        for name in getattr(cfg, flag).split(","):
            if name not in known:
                fail(f"--{flag} {name} is unknown; choose from: {', '.join(known)}")
    least = dict(num_generations=2,  # a completion is measured by the others of its group
                 prompts_per_step=1, max_completion_length=1, num_iterations=1, max_steps=1, score_tokens=1,
                 save_steps=1, eval_steps=0, eval_limit=1, beta=0, epsilon=0, max_grad_norm=0)
    for flag, bound in least.items():
        if getattr(cfg, flag) < bound:
            fail(f"--{flag} {getattr(cfg, flag)}: must be at least {bound}")
    if cfg.temperature <= 0:
        fail(f"--temperature {cfg.temperature}: must be above 0, or a group's completions are all equal")
    return cfg


# ---- Step 1: the prompt ----------------------------------------------------------------------------------

IMAGE_TOKENS = "<|vision_start|><|image_pad|><|vision_end|>"

# The paper's template for the base model, verbatim. It prefills <think> and never mentions <answer>: that
# the policy comes to write answer blocks is the format reward's doing. (The reference also leaves a literal
# "<image>" in front.)
BASE_PROMPT = (
    "A conversation between User and Assistant. The user asks a question about the image, and the Assistant "
    "solves it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer.\nUser: {question} \nAssistant: Let me solve this step by step.\n<think>"
)


def build_question(question, options):
    """The paper's wording of a question with its options.

    >>> build_question("How many chairs are there?", ["2", "3", "5"])
    'Answer in natural language. How many chairs are there? Choose between the following options: 2, 3 or 5'
    """
    choices = " or ".join([", ".join(options[:-1]), options[-1]] if len(options) > 1 else options)
    return f"Answer in natural language. {question} Choose between the following options: {choices}"


def row_text(row):
    """A data row -> the prompt's text, before its images."""
    return BASE_PROMPT.format(question=build_question(row["question"], row["options"]))


@dataclass
class Prompt:
    """One question with its images, as the model takes it."""
    text: str                                      # without the image tokens
    input_ids: torch.Tensor                        # (1, P) with the image tokens
    position_ids: torch.Tensor                     # (3, 1, P) M-RoPE: time, height and width of each token
    pixel_values: Optional[torch.Tensor] = None    # (patches of all images, 3 * 2 * 14 * 14)
    image_grid_thw: Optional[torch.Tensor] = None  # (images, 3) patches along time, height and width

    @property
    def next_position(self):
        """Position of the first completion token, on all axes: h x w image tokens advance it by max(h, w)."""
        return int(self.position_ids.max()) + 1


def insert_images(text, tokens_per_image):
    """Put the images before the text, one <|image_pad|> per image token (what Qwen2VLProcessor would do)."""
    images = [IMAGE_TOKENS.replace("<|image_pad|>", "<|image_pad|>" * n) for n in tokens_per_image]
    return "".join(images) + text


def build_prompt(text, images, tokenizer, image_processor, model):
    """text: str, images: list of PIL images, may be empty -> Prompt on the model's device."""
    pixels, tokens_per_image = {}, []
    if images:
        images = [image.convert("RGB") for image in images]
        pixels = image_processor(images=images, return_tensors="pt").to(model.device)
        tokens_per_image = (pixels["image_grid_thw"].prod(-1) // image_processor.merge_size**2).tolist()
    ids = tokenizer(insert_images(text, tokens_per_image), return_tensors="pt").input_ids         # (1, P)
    ids = ids.to(model.device)
    is_image = (ids == model.config.image_token_id).int()
    if is_image.sum() != sum(tokens_per_image):
        fail(f"a question contains the token <|image_pad|> itself; remove it from the data: {text[-200:]!r}")
    position_ids, _ = model.model.get_rope_index(ids, is_image, image_grid_thw=pixels.get("image_grid_thw"))
    return Prompt(text, ids, position_ids, **pixels)


# ---- Steps 2 and 5: encode the prompt once, branch into G completions ------------------------------------

def patch_embed_as_matmul(model):
    """Compute the patch embedding as the matrix product it is: its Conv3d's kernel and stride are the patch.

    Same weights, same checkpoint, but no slow Conv3d backward. Returns the model.
    """
    def forward(self, pixels):
        weight = self.proj.weight.flatten(1)                                                  # (dim, 1176)
        return nn.functional.linear(pixels.to(weight.dtype), weight)                          # (patches, dim)

    patch_embed = model.model.visual.patch_embed
    patch_embed.forward = MethodType(forward, patch_embed)  # a method: a deepcopy will use its own weights
    return model


def encode_prompt(model, prompt):
    """Image tower and prompt, once -> for each layer (keys, values), each (1, kv_heads, P - 1, head_dim).

    The last prompt token is left out. It becomes the first input of every completion, whose output predicts
    the first completion token; so keys and values are all that sampling and scoring need from here.
    """
    ids = prompt.input_ids[:, :-1]
    output = model.model(input_ids=ids, position_ids=prompt.position_ids[:, :, :-1], use_cache=True,
                         pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw)
    return [(layer.keys, layer.values) for layer in output.past_key_values.layers]


class BranchLayer(DynamicLayer):
    """One layer of a cache that begins with the prompt's keys and values, (rows, kv_heads, P - 1, head_dim).

    room 0: new keys are joined by `torch.cat`, which autograd follows (scoring). Otherwise space for `room`
    tokens is set aside and written in place, because a `cat` at every token would copy the whole cache
    (sampling).
    """
    def __init__(self, keys, values, room=0):
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.length, self.in_place = keys.shape[-2], room > 0
        self.keys, self.values = (nn.functional.pad(x, (0, 0, 0, room)) if room else x
                                  for x in (keys, values))

    def update(self, keys, values, *args, **kwargs):
        start, self.length = self.length, self.length + keys.shape[-2]
        if not self.in_place:
            return super().update(keys, values)
        self.keys[:, :, start:self.length], self.values[:, :, start:self.length] = keys, values
        return self.keys[:, :, :self.length], self.values[:, :, :self.length]

    def get_seq_length(self):
        return self.length


def token_logps(model, hidden, temperature, suppressed):
    """(..., H) hidden states -> (..., V) log-probabilities, the one place where states become a distribution.

    suppressed: (V,) bool, tokens that are never drawn. Sampling and scoring must share it, and the
    temperature, or the ratio would compare two different policies.
    """
    logits = model.lm_head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    # the smallest finite number, not -inf: p * log p must be 0 in the entropy, not nan
    return logits.masked_fill(suppressed, torch.finfo(logits.dtype).min).log_softmax(-1)


def joint_cache(encoded, num_generations, room):
    """Keys and values of B prompts -> one cache of N rows; shorter prompts are padded on the left."""
    P = max(layers[0][0].shape[-2] for layers in encoded)
    left_pad = lambda x: nn.functional.pad(x, (0, 0, P - x.shape[-2], 0))
    layers = []
    for layer in zip(*encoded):  # (keys, values) of this layer, of each prompt
        keys, values = (torch.cat([left_pad(x) for x in one]).repeat_interleave(num_generations, 0)
                        for one in zip(*layer))
        layers.append(BranchLayer(keys, values, room))
    return Cache(layers=layers)


@dataclass
class Rollout:
    completion_ids: torch.Tensor   # (N, C) padded on the right
    completion_mask: torch.Tensor  # (N, C) bool, True up to the end token, which counts: it was chosen too
    sampling_logps: torch.Tensor   # (N, C) log-probability of each token when it was drawn
    finished: torch.Tensor         # (N,) bool, False if cut off at max_completion_length


@torch.no_grad()
def sample(model, prompts, num_generations, max_completion_length, temperature, suppressed, eos_ids,
           generator=None):
    """Draw G completions of each prompt (temperature 0: the likeliest tokens) -> Rollout, rows prompt-major.

    Each prompt runs through the model once, its keys and values are repeated G times, and all N rows decode
    together; shorter prompts are padded on the left and masked. A row that is done leaves the batch.
    """
    G, C, device = num_generations, max_completion_length, model.device
    cache = joint_cache([encode_prompt(model, prompt) for prompt in prompts], G, room=C)
    tokens = torch.cat([prompt.input_ids[:, -1:] for prompt in prompts]).repeat_interleave(G, 0)  # (N, 1)
    start = torch.tensor([[prompt.next_position - 1] for prompt in prompts], device=device)
    start = start.repeat_interleave(G, 0)                                                         # (N, 1)
    lengths = torch.tensor([prompt.input_ids.shape[1] - 1 for prompt in prompts], device=device)  # (B,)
    N, P, ragged = G * len(prompts), int(lengths.max()), bool((lengths != lengths[0]).any())
    seen = torch.arange(P + C, device=device) >= (P - lengths).repeat_interleave(G)[:, None]      # (N, P + C)

    completion_ids = torch.full((N, C), eos_ids[0], device=device)
    sampling_logps = torch.zeros(N, C, device=device, dtype=torch.promote_types(model.dtype, torch.float32))
    num_tokens = torch.full((N,), C, device=device)
    running = torch.arange(N, device=device)  # the rows still in the batch
    for t in range(C):
        hidden = model.model(input_ids=tokens, position_ids=(start + t).expand(3, -1, -1),
                             past_key_values=cache, attention_mask=seen[:, :P + t + 1] if ragged else None)
        hidden = hidden.last_hidden_state[:, -1]                                              # (running, H)
        logps = token_logps(model, hidden, temperature or 1.0, suppressed)                    # (running, V)
        if temperature > 0:  # argmax(log p - log Exp(1)) draws from p: the Gumbel trick
            noise = torch.empty_like(logps).exponential_(generator=generator).log_()
            tokens = (logps - noise).argmax(-1, keepdim=True)                                   # (running, 1)
        else:
            tokens = logps.argmax(-1, keepdim=True)
        completion_ids[running, t] = tokens[:, 0]
        sampling_logps[running, t] = logps.gather(-1, tokens)[:, 0]
        ended = torch.isin(tokens[:, 0], torch.tensor(eos_ids, device=device))
        if ended.any():
            num_tokens[running[ended]] = t + 1
            running, tokens, start, seen = (x[~ended] for x in (running, tokens, start, seen))
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[~ended], layer.values[~ended]
        if not len(running):
            break
    C = int(num_tokens.max())
    completion_mask = torch.arange(C, device=device) < num_tokens[:, None]                        # (N, C)
    finished = torch.ones(N, dtype=torch.bool, device=device).index_fill(0, running, False)       # (N,)
    return Rollout(completion_ids[:, :C], completion_mask, sampling_logps[:, :C], finished)


def score(model, prompt, prompt_kv, completion_ids, completion_mask, temperature, suppressed):
    """Log-probabilities and (without gradient) entropy of R completions, each (R, C), 0 where masked.

    All rows attend to the same keys and values of the prompt, expanded and not computed again, and causally
    to themselves. Positions start at `next_position` in every row, as if it stood alone behind the prompt.
    Nothing is padded on the left, so no mask is needed; what pads a row on the right comes after all that
    counts.
    """
    R, C = completion_ids.shape
    inputs = torch.cat([prompt.input_ids[:, -1:].expand(R, 1), completion_ids[:, :-1]], 1)        # (R, C)
    positions = torch.arange(C, device=inputs.device) + prompt.next_position - 1                  # (C,)
    cache = Cache(layers=[BranchLayer(keys.expand(R, -1, -1, -1), values.expand(R, -1, -1, -1))
                          for keys, values in prompt_kv])
    hidden = model.model(input_ids=inputs, position_ids=positions.expand(3, R, C),
                         past_key_values=cache).last_hidden_state                                 # (R, C, H)
    logps = token_logps(model, hidden[completion_mask], temperature, suppressed)                 # (tokens, V)
    chosen = logps.gather(-1, completion_ids[completion_mask][:, None])[:, 0]                     # (tokens,)
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(-1)                                                  # (tokens,)
    blank = torch.zeros(R, C, dtype=logps.dtype, device=logps.device)
    return blank.masked_scatter(completion_mask, chosen), blank.masked_scatter(completion_mask, entropy)


class Policy(nn.Module):
    """A model behind one door. accelerate wraps this module and its hooks run in `forward` only, so every
    forward of the trained weights, encoding or scoring, has to come through here."""
    def __init__(self, model, temperature, suppressed):
        super().__init__()
        self.model, self.temperature = model, temperature
        self.register_buffer("suppressed", suppressed, persistent=False)

    def forward(self, prompt, prompt_kv=None, completion_ids=None, completion_mask=None):
        if prompt_kv is None:
            return encode_prompt(self.model, prompt)
        return score(self.model, prompt, prompt_kv, completion_ids, completion_mask,
                     self.temperature, self.suppressed)


# ---- Step 3: the rewards, pure functions of the text; evaluation uses the same extractor and grader ------

ANSWER_BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
WELL_FORMED = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL)


def completion_text(prompt_text, completion_ids, tokenizer):
    """What the policy said, without end tokens. The prefilled <think> is put back here, and only here."""
    prefill = "<think>" if prompt_text.endswith("<think>") else ""
    return prefill + tokenizer.decode(completion_ids, skip_special_tokens=True)


def extract_answer(text, strict):
    """The answer in a completion, or None.

    strict (training): what is inside the one answer block; None if there is none, or several, or nothing in
    it.
    else (evaluation): what is inside the last block, else the whole text: right in a wrong form counts there.

    >>> extract_answer("<think> two chairs </think> <answer> 2 </answer>", strict=True)
    '2'
    >>> extract_answer("it is 2", strict=True), extract_answer("it is 2", strict=False)
    (None, 'it is 2')
    """
    blocks = ANSWER_BLOCK.findall(text)
    if strict and (len(blocks) != 1 or text.count("<answer>") != 1 or text.count("</answer>") != 1):
        return None
    return (blocks[-1] if blocks else text).strip() or None


def normalise(text):
    return " ".join(text.lower().split()).removesuffix(".").strip()


def grade(answer, solution, options, strict=True):
    """Does `answer` (from `extract_answer`) choose `solution` out of `options`, by its text or by its letter?

    Case, spaces, a final full stop and brackets around the letter are forgiven; nothing is found inside
    other words or numbers. If not strict, a sentence also counts if it names exactly one option, by text or
    by a letter in brackets. A bare letter in a sentence does not: "a" is an article.

    >>> options = ["right", "left", "15"]
    >>> grade("Left.", "left", options), grade("(b)", "left", options), grade("5", "15", options)
    (True, True, False)
    >>> grade("So it is left.", "left", options), grade("So it is left.", "left", options, strict=False)
    (False, True)
    """
    if answer is None:
        return False
    answer, solution, *options = map(normalise, (answer, solution, *options))
    by_letter = dict(zip("abcdefghijklmnopqrstuvwxyz", options))
    letter = re.fullmatch(r"\(?([a-z])\)?", answer)
    if answer in options or strict and not letter:
        return answer == solution
    if letter:
        return by_letter.get(letter[1]) == solution
    named = {by_letter.get(found) for found in re.findall(r"\(([a-z])\)", answer)}
    for option in sorted(options, key=len, reverse=True):  # "no, it would not" before "no", which it contains
        answer, found = re.subn(rf"(?<![\w.]){re.escape(option)}(?!\w|\.\d)", " ", answer)
        named |= {option} if found else set()
    return named == {solution}


def accuracy_reward(completion, answer, options, **_):
    """1 if the one answer block chooses the right option, else 0. A copied template ("...") chooses none."""
    return float(grade(extract_answer(completion, strict=True), answer, options))


def format_reward(completion, **_):
    """1 if the completion is exactly one think block and then exactly one answer block, not empty; else 0.

    >>> format_reward("<think> hm </think> <answer> left </answer>"), format_reward("<answer> left </answer>")
    (1.0, 0.0)
    """
    one_think_block = completion.count("<think>") == completion.count("</think>") == 1
    one_answer_block = extract_answer(completion, strict=True) is not None
    return float(one_think_block and one_answer_block and bool(WELL_FORMED.fullmatch(completion)))


# name -> function(completion, num_tokens, **columns of the data row) -> float; completion starts with <think>
REWARDS = {"accuracy": accuracy_reward, "format": format_reward}


# ---- Step 4: the advantages ------------------------------------------------------------------------------

def group_advantages(rewards, num_generations, scale_rewards=True):
    """(N,) rewards, prompt-major -> (N,) advantages A = (R - mean) / (std + 1e-4) per group; unbiased std.

    The group is its own baseline: no value network (DeepSeekMath, arXiv 2402.03300, section 4.1.2; the 1e-4
    is the reference code's). scale_rewards=False leaves A = R - mean: the std gives more weight to questions
    nearly always right, or wrong (Dr. GRPO, arXiv 2503.20783). A group without spread gets exactly 0.
    """
    groups = rewards.view(-1, num_generations)                                                    # (B, G)
    A = groups - groups.mean(1, keepdim=True)                                                     # (B, G)
    if scale_rewards:
        A = A / (groups.std(1, keepdim=True) + 1e-4)
    has_spread = groups.amax(1, keepdim=True) > groups.amin(1, keepdim=True)  # std > 0 could be rounding
    return torch.where(has_spread, A, 0.0).view(-1)                                               # (N,)


# ---- Step 6: the loss and the update ---------------------------------------------------------------------

# What a token counts in the loss of a step, for each row (N,), from the rows' lengths (N,) and their limit.
LOSS_TYPES = {
    # mean over rows of mean over tokens: every row counts the same, so a token of a long row counts less
    "grpo": lambda lengths, limit: 1 / (len(lengths) * lengths),
    # sum over tokens / a constant, which favours no length (Dr. GRPO, arXiv 2503.20783)
    "dr_grpo": lambda lengths, limit: torch.full_like(lengths, 1 / (len(lengths) * limit)),
    # mean over all tokens of the step, as in TRL (DAPO, arXiv 2503.14476: over all tokens of a group)
    "dapo": lambda lengths, limit: torch.full_like(lengths, 1 / lengths.sum()),
}


def grpo_loss(per_token_logps, old_per_token_logps, ref_per_token_logps, advantages, token_weights,
              completion_mask, epsilon, epsilon_high, beta):
    """The loss of R of the step's rows (arXiv 2402.03300, eq. 3); over all chunks it adds up to the step's.

    *_logps, completion_mask: (R, C); advantages, token_weights: (R,). If beta is 0 no reference is needed.
    Returns loss, and for the log kl (R, C) and where the clip acts (R, C).

    With num_iterations 1, pi_old is pi itself: the ratio is 1 and the clip never acts. Advantages of a
    group add up to 0, so the policy term prints as 0 and the printed loss is beta * KL. Its gradient is not
    0: d ratio = d log pi, so every token of a completion is pushed by A.
    """
    A = advantages[:, None]                                                                       # (R, 1)
    # ratio = pi / pi_old
    ratio = (per_token_logps - old_per_token_logps).exp()                                         # (R, C)
    # -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A)
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))   # (R, C)
    per_token_loss = -torch.min(ratio * A, clipped * A)                                           # (R, C)
    # kl = pi_ref / pi - log(pi_ref / pi) - 1, the "k3" estimator: unbiased, never negative
    kl = torch.zeros_like(ratio)
    if beta > 0:
        log_ratio = ref_per_token_logps - per_token_logps
        kl = log_ratio.exp() - log_ratio - 1                                                      # (R, C)
        per_token_loss = per_token_loss + beta * kl
    # mean over rows of mean over tokens, or what else LOSS_TYPES weighs them by
    per_row = (per_token_loss * completion_mask).sum(1)                                           # (R,)
    return (per_row * token_weights).sum(), kl.detach(), clipped * A < ratio * A


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
    """One group's rows, chunk by chunk: row numbers (R,), completion_ids (R, C), completion_mask (R, C)."""
    first = group * cfg.num_generations
    lengths = rollout.completion_mask[first:first + cfg.num_generations].sum(1).tolist()
    for chunk in chunks(lengths, cfg.score_tokens):
        rows = torch.tensor(chunk, device=rollout.completion_ids.device) + first
        C = max(lengths[i] for i in chunk)
        yield rows, rollout.completion_ids[rows, :C], rollout.completion_mask[rows, :C]


@torch.no_grad()
def score_rollout(policy, prompts, rollout, cfg):
    """(N, C) log-probabilities of the rollout, without gradient: what the reference model makes of it."""
    per_token_logps = torch.zeros_like(rollout.sampling_logps)
    for group, prompt in enumerate(prompts):
        prompt_kv = policy(prompt)
        for rows, ids, mask in group_chunks(rollout, group, cfg):
            per_token_logps[rows, :ids.shape[1]] = policy(prompt, prompt_kv, ids, mask)[0]
    return per_token_logps


def update(policy, prompts, rollout, advantages, ref_per_token_logps, old_per_token_logps, cfg):
    """Leave the gradient of the step's loss in the policy, by a backward in two stages:

    1. Chunk by chunk, forward and backward from the prompt's keys and values only, detached: their
       gradients add up on these leaves, and each chunk's graph is freed at once.
    2. One backward carries the sum on through prompt and image tower.

    This is the chain rule, cut at the keys and values; it is exact, and its memory does not grow with G.

    old_per_token_logps: (N, C), or None in the first pass over a rollout, in which pi_old is pi.
    Returns the log-probabilities of this pass (N, C), and sums over all tokens for the log.
    """
    per_token_logps = torch.zeros_like(rollout.sampling_logps)
    sums = dict.fromkeys(("loss", "entropy", "kl", "clip"), 0.0)
    lengths = rollout.completion_mask.sum(1).to(per_token_logps.dtype)                            # (N,)
    token_weights = LOSS_TYPES[cfg.loss_type](lengths, cfg.max_completion_length)                 # (N,)
    for group, prompt in enumerate(prompts):
        prompt_kv = policy(prompt)
        leaves = [[x.detach().requires_grad_() for x in kv] for kv in prompt_kv]
        for rows, ids, mask in group_chunks(rollout, group, cfg):
            C = ids.shape[1]
            logps, entropy = policy(prompt, leaves, ids, mask)                                    # (R, C)
            old = logps.detach() if old_per_token_logps is None else old_per_token_logps[rows, :C]
            ref = ref_per_token_logps[rows, :C] if cfg.beta > 0 else None
            loss, kl, clipped = grpo_loss(logps, old, ref, advantages[rows], token_weights[rows], mask,
                                          cfg.epsilon, cfg.epsilon_high, cfg.beta)
            loss.backward()                                                                       # stage 1
            per_token_logps[rows, :C] = logps.detach()
            for name, values in dict(loss=loss, entropy=entropy, kl=kl * mask, clip=clipped * mask).items():
                sums[name] += values.sum().item()
        torch.autograd.backward([x for kv in prompt_kv for x in kv],
                                [x.grad for kv in leaves for x in kv])                            # stage 2
    return per_token_logps, sums


# ---- Around the algorithm: model, data, files ------------------------------------------------------------

def load_model(path, attn_implementation="sdpa", dtype=torch.float32):
    """Folder or hub id -> Qwen2-VL, without dropout. float32 is said aloud: the published files load as bf16,
    in which updates as small as 1e-6 are rounded away."""
    try:
        model, report = Qwen2VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True)
    except (OSError, ImportError, ValueError) as error:
        fail(f"cannot load a Qwen2-VL model from {path}: {str(error).strip().splitlines()[0]}")
    if report["missing_keys"]:
        fail(f"{path} is not a whole Qwen2-VL model: its files lack {sorted(report['missing_keys'])[0]}")
    return patch_embed_as_matmul(model).eval()


def load_processors(path, min_pixels=None, max_pixels=None):
    """-> tokenizer, image processor, which is PIL's: the same pixels everywhere, and no torchvision."""
    area = {k: v for k, v in dict(min_pixels=min_pixels, max_pixels=max_pixels).items() if v is not None}
    try:
        image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", **area)
        return AutoTokenizer.from_pretrained(path), image_processor
    except (OSError, ValueError) as error:
        fail(f"cannot load tokenizer and image processor from {path}: {str(error).strip().splitlines()[0]}")


def set_threads(model):
    """Cores / local processes: the launcher sets OMP_NUM_THREADS=1 and python does not, so that without this
    their speed and their bits would differ. One for a model as small as the toy's, where two only wait."""
    threads = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(1 if sum(p.numel() for p in model.parameters()) < 1e7 else max(1, threads))


def suppressed_tokens(model, tokenizer):
    """(V,) bool: vision tokens, which would crash the next forward, and vocabulary rows without a token."""
    suppressed = torch.arange(model.lm_head.out_features, device=model.device) >= len(tokenizer)
    names = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    suppressed[tokenizer.convert_tokens_to_ids(names)] = True
    return suppressed


def end_tokens(tokenizer):
    """Ids that end a completion: the tokenizer's end token first, then those of Qwen's two that it knows."""
    qwen = [token for token in ("<|endoftext|>", "<|im_end|>") if token in tokenizer.get_vocab()]
    return list(dict.fromkeys([tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(qwen)]))


def open_image(image, where, decode=True):
    """{"bytes", "path"} -> PIL image, or stop and name its row. decode False reads only the header."""
    try:
        picture = Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"])
        if decode:
            picture.load()
        return picture
    except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, struct.error ...
        fail(f"{where}: its image cannot be read ({error}); remove the row (prepare_sat.py would)")


def load_data(cfg, tokenizer, image_processor):
    """-> `datasets` table, its path, and the numbers of the rows whose prompt fits max_prompt_length."""
    import datasets
    datasets.disable_progress_bars()
    path = Path(cfg.data) / "train.parquet" if Path(cfg.data).is_dir() else Path(cfg.data)
    if not path.exists():
        fail(f"--data {path} does not exist; `python prepare_sat.py` makes data/sat, and with --toy data/toy")
    try:
        data = datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # whatever pyarrow and datasets raise on a file that is no Parquet file
        fail(f"--data {path} is not a Parquet file that can be read: {str(error).strip().splitlines()[0]}")
    if missing := sorted({"images", "question", "options", "answer"} - set(data.column_names)):
        fail(f"--data {path} has no column {missing[0]!r} ({', '.join(data.column_names)})")
    data = data.cast_column("images", datasets.List(datasets.Image(decode=False)))

    def prompt_length(number, row):
        if not (row["question"] and row["options"] and row["answer"] in row["options"]):
            fail(f"{path}, row {number}: question or options are empty, or the answer is not an option")
        sizes = [open_image(image, f"{path}, row {number}", decode=False).size
                 for image in row["images"] or []]
        tokens = [image_processor.get_number_of_image_patches(height, width) // image_processor.merge_size**2
                  for width, height in sizes]
        return len(tokenizer(insert_images(row_text(row), tokens)).input_ids)

    kept = [i for i, row in enumerate(tqdm(data, desc="measuring prompts", leave=False))
            if prompt_length(i, row) <= cfg.max_prompt_length]
    if len(kept) < len(data):
        print(f"dropped {len(data) - len(kept)} of {len(data)} rows: prompts over {cfg.max_prompt_length}")
    if not kept:
        fail(f"--max_prompt_length {cfg.max_prompt_length}: every prompt of {path} is longer; raise it")
    return data, path, kept


def seeded(*key):
    """random.Random of `key` alone. Each draw has its own key, (seed, purpose, step, rank), and depends on no
    draw before it, so that a resumed run has nothing to replay."""
    return random.Random("/".join(map(str, key)))


def draw(rows, seed, first, count):
    """Entries first .. first + count - 1 of an endless walk over `rows`, shuffled anew in each epoch."""
    walk, n = {}, len(rows)
    for epoch in range(first // n, (first + count - 1) // n + 1):
        walk[epoch] = seeded(seed, "epoch", epoch).sample(rows, n)
    return [walk[i // n][i % n] for i in range(first, first + count)]


def choose_output_dir(cfg):
    """-> Path. A folder named by hand must be new, unless --overwrite or --resume says what to do with it."""
    path, n = Path(cfg.output_dir or f"runs/{cfg.preset}"), 1
    if cfg.overwrite and path.exists() and not (path / "config.json").exists():
        fail(f"--overwrite: {path} is not the folder of a run; delete it yourself if you mean it")
    while path.exists() and not (cfg.resume or cfg.overwrite):
        if cfg.output_dir:
            fail(f"--output_dir {path} exists; --resume goes on with it, --overwrite deletes it")
        path, n = Path(f"runs/{cfg.preset}-{n + 1}"), n + 1
    return path


def last_checkpoint(output_dir):
    """-> folder and step of the newest checkpoint-N; by `save_model`, whatever has that name is complete."""
    steps = [int(path.name[11:]) for path in output_dir.glob("checkpoint-*") if path.name[11:].isdigit()]
    if not steps:
        fail(f"--resume: {output_dir} has no checkpoint; start without --resume")
    return output_dir / f"checkpoint-{max(steps)}", max(steps)


def save_model(folder, model, tokenizer, image_processor, state=None):
    """A plain model directory, and in state/ what resuming needs. It gets its name only when complete."""
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


def cut_jsonl(path, step):
    """Drop what came after `step`, and a line that a killed run left half: a resumed run writes it again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step))


# ---- The main loop ---------------------------------------------------------------------------------------

def main(argv=None):
    import eval_cvbench  # draws and evaluates; it imports this module, so not before this module is whole
    cfg = parse_config(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    output_dir = choose_output_dir(cfg)
    try:
        accelerator = Accelerator(log_with=cfg.log_with, project_dir=output_dir,
                                  mixed_precision="bf16" if torch.cuda.is_available() else "no")
    except ValueError as error:
        fail(f"--log_with {cfg.log_with}: {error}")
    if cfg.log_with and not accelerator.log_with:
        fail(f"--log_with {cfg.log_with}: install that package first")
    rank, device = accelerator.process_index, accelerator.device
    if accelerator.num_processes > 1:
        fail("this version trains on one process; start it with `accelerate launch --num_processes 1`")
    if cfg.data == Config.data and not Path(cfg.data).exists() and accelerator.is_main_process:
        import prepare_sat  # draws the toy world and trains its base model: some minutes, once
        prepare_sat.make_toy(cfg.data)
    accelerator.wait_for_everyone()

    start, done = last_checkpoint(output_dir) if cfg.resume else (cfg.model_name_or_path, 0)
    tokenizer, image_processor = load_processors(start, cfg.min_pixels, cfg.max_pixels)
    data, data_path, kept = load_data(cfg, tokenizer, image_processor)
    model = load_model(start, cfg.attn_implementation).to(device)
    set_threads(model)
    suppressed, eos_ids = suppressed_tokens(model, tokenizer), end_tokens(tokenizer)
    policy = Policy(model, cfg.temperature, suppressed)
    if cfg.beta > 0:
        frozen = load_model(cfg.model_name_or_path, cfg.attn_implementation).to(device).requires_grad_(False)
        reference = Policy(frozen, cfg.temperature, suppressed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
    policy, optimizer = accelerator.prepare(policy, optimizer)

    eval_sets = eval_cvbench.load_sets(cfg.eval_data, cfg.eval_limit) if cfg.eval_steps else {}
    if cfg.overwrite and not cfg.resume:
        shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    if cfg.resume:
        optimizer.load_state_dict(torch.load(start / "state" / "trainer.pt")["optimizer"])
        for name in ("metrics.jsonl", "completions.jsonl", "eval.jsonl"):
            cut_jsonl(output_dir / name, done)
    (output_dir / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2))
    accelerator.init_trackers("grpo_vision", config=dataclasses.asdict(cfg))
    B, G = cfg.prompts_per_step // accelerator.num_processes, cfg.num_generations  # B is this process's share
    print(f"{output_dir}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters on {device}, "
          f"{len(kept)} questions, {cfg.prompts_per_step} prompts x {G} completions per step")

    if cfg.eval_steps and not cfg.resume:
        eval_cvbench.track(output_dir, 0, model, tokenizer, image_processor, eval_sets,
                           cfg.max_completion_length)
    progress = tqdm(range(done, cfg.max_steps), "training", initial=done, total=cfg.max_steps)
    for step in progress:
        clock = [time.perf_counter()]
        # 1. B questions and their images, in the prompt template
        numbers = draw(kept, cfg.seed, step * cfg.prompts_per_step + rank * B, B)
        rows = [data[i] for i in numbers]
        prompts = []
        for i, row in zip(numbers, rows):
            images = [open_image(image, f"{data_path}, row {i}") for image in row["images"] or []]
            prompts.append(build_prompt(row_text(row), images, tokenizer, image_processor, model))
        # 2. G completions of each
        generator = torch.Generator(device)
        generator.manual_seed(seeded(cfg.seed, "sample", step, rank).getrandbits(63))
        with accelerator.autocast():
            rollout = sample(model, prompts, G, cfg.max_completion_length, cfg.temperature, suppressed,
                             eos_ids, generator)
        lengths = rollout.completion_mask.sum(1).tolist()
        texts = [completion_text(prompts[i // G].text, rollout.completion_ids[i, :lengths[i]], tokenizer)
                 for i in range(B * G)]
        clock.append(time.perf_counter())
        # 3. their rewards
        rewards = {name: torch.tensor([REWARDS[name](text, num_tokens=lengths[i], **rows[i // G])
                                       for i, text in enumerate(texts)])
                   for name in cfg.rewards.split(",")}                                            # each (N,)
        reward = sum(rewards.values()).to(device)                                                 # (N,)
        # 4. their advantages
        advantages = group_advantages(reward, G, cfg.scale_rewards)                               # (N,)
        # 5. the frozen start's log-probabilities; the policy's own come with the update
        ref_logps = None
        if cfg.beta > 0:
            with accelerator.autocast():
                ref_logps = score_rollout(reference, prompts, rollout, cfg)                       # (N, C)
        clock.append(time.perf_counter())
        # 6. the update
        old_logps = None
        optimizer.param_groups[0]["lr"] = learning_rate = cfg.learning_rate * (1 - step / cfg.max_steps)
        for _ in range(cfg.num_iterations):
            logps, sums = update(policy, prompts, rollout, advantages, ref_logps, old_logps, cfg)
            old_logps = logps if old_logps is None else old_logps                                 # (N, C)
            grad_norm = float(accelerator.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm))
            if not (sane := math.isfinite(sums["loss"]) and math.isfinite(grad_norm)):
                break
            optimizer.step()
            optimizer.zero_grad()
        clock.append(time.perf_counter())

        samples = [{"step": step + 1, "row": numbers[i // G], "prompt": prompts[i // G].text,
                    "completion": text, "answer": rows[i // G]["answer"], "length": lengths[i],
                    **{f"rewards/{name}": r[i].item() for name, r in rewards.items()},
                    "reward": reward[i].item(), "advantage": advantages[i].item()}
                   for i, text in enumerate(texts)]
        if not sane:
            append_jsonl(output_dir / "bad_batch.jsonl", samples)
            fail(f"step {step + 1}: loss {sums['loss']}, gradient norm {grad_norm}; lower --learning_rate "
                 f"and --resume from the last checkpoint; {output_dir}/bad_batch.jsonl has the batch")
        mismatch = (old_logps - rollout.sampling_logps) * rollout.completion_mask
        phases, tokens = ("rollout", "reference", "update"), sum(lengths)
        metrics = {
            "step": step + 1, "loss": sums["loss"], "reward": reward.mean().item(),
            "reward_std": reward.view(B, G).std(1).mean().item(),
            **{f"rewards/{name}": r.mean().item() for name, r in rewards.items()},
            "completions/mean_length": tokens / len(texts),
            "completions/clipped_ratio": 1 - rollout.finished.float().mean().item(),
            "frac_reward_zero_std": (advantages.view(B, G) == 0).all(1).float().mean().item(),
            "kl": sums["kl"] / tokens, "entropy": sums["entropy"] / tokens,
            "clip_ratio": sums["clip"] / tokens, "grad_norm": grad_norm, "learning_rate": learning_rate,
            "sampler_mismatch": mismatch.abs().max().item(),
            **{f"seconds/{phase}": end - begin for phase, begin, end in zip(phases, clock, clock[1:])},
        }
        append_jsonl(output_dir / "metrics.jsonl", [metrics])
        append_jsonl(output_dir / "completions.jsonl", samples)
        accelerator.log(metrics, step=step + 1)
        progress.write(f"step {step + 1:4d}  reward {reward.mean():.2f}  "
                       + "  ".join(f"{name} {r.mean():.2f}" for name, r in rewards.items())
                       + f"  length {tokens / len(texts):.1f}  kl {metrics['kl']:.3f}"
                       + f"  {clock[-1] - clock[0]:.1f} s")
        if cfg.eval_steps and ((step + 1) % cfg.eval_steps == 0 or step + 1 == cfg.max_steps):
            eval_cvbench.track(output_dir, step + 1, model, tokenizer, image_processor, eval_sets,
                               cfg.max_completion_length)
            eval_cvbench.show(output_dir, data)  # the picture and the page, so far
        if (step + 1) % cfg.save_steps == 0 or step + 1 == cfg.max_steps:
            save_model(output_dir / f"checkpoint-{step + 1}", model, tokenizer, image_processor,
                       state={"optimizer": optimizer.state_dict()})
    save_model(output_dir / "final", model, tokenizer, image_processor)
    accelerator.end_training()
    eval_cvbench.show(output_dir, data)
    eval_cvbench.report(output_dir)


if __name__ == "__main__":
    import grpo_vision  # by its own name: what imports it later (prepare_sat) gets this module, not a copy
    grpo_vision.main()
