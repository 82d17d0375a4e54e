"""One GRPO step, timed: this program against the usual way, on the same weights in the same process.

    python bench/step.py                         # 47M parameters, 4 prompts x 8 completions x 128 tokens
    python bench/step.py --full                  # the 2.2B shape in bf16 with random weights; needs a GPU
    python bench/step.py --parts time trl        # a step of TRL's GRPOTrainer as well
    python bench/step.py --parts long --completion_length 4096      # memory of one long completion

The usual way takes a group as G separate rows, each with its own copy of prompt and image: `generate` on all
rows, then one forward over prompt + completion of each group for the reference, and one with a backward for
the policy, all with the stock modules. Both ways end in the same clipping and the same AdamW. The end token
is suppressed, so completions have full length and both do equal work. That it is equal is asserted: for the
same completions the log-probabilities and the norm of the gradient must agree.

Each part runs in a process of its own. If one fails, the others go on.

  time       both ways in turn: rollout, reference, update, step
  memory     the peak of an update above what was held before, for more completions and for more prompts. The
             budgets are those that one prompt and two completions fill
  trl        a step of TRL's GRPOTrainer and one of ours in turn. It needs an environment of its own:
             pip install torch==2.12.1 torchvision==0.27.1 trl==1.16.0 transformers accelerate datasets pillow
  program    the step as --preset sat takes it on one GPU: float32 weights computed in bf16 by autocast,
             sampler and reference in bf16, layers checkpointed, AdamW. `--full` gives it 8 prompts x 8
             completions x 300 tokens and 484 image tokens each
  decode     completion tokens per second: with CUDA graphs, without, and by `generate`
  precision  how far the bf16 sampler is from float32 weights, before any optimizer step
  long       one completion, by default of 8,192 tokens, with checkpointing and without
"""
import argparse
import copy
import os
import platform
import random
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from accelerate import Accelerator
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent.parent))
import grpo_vision as gv

SHAPE = dict(vocab=8192, hidden=512, intermediate=2048, layers=8, heads=8, kv_heads=2, vision_hidden=320,
             vision_layers=8, vision_heads=8, prompts=4, num_generations=8, completion_length=128,
             image_size=504)                                                              # 47M parameters
FULL = dict(vocab=151936, hidden=1536, intermediate=8960, layers=28, heads=12, kv_heads=2,
            vision_hidden=1280, vision_layers=32, vision_heads=16, prompts=8, num_generations=8,
            completion_length=300, image_size=616)                                        # 2.2B: Qwen2-VL-2B
SPECIAL = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]  # last in the vocabulary
EOS, BETA, PHASES = 0, 0.04, ("rollout", "reference", "update")
BF16_RATE = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # NVIDIA's data sheets: dense, SXM modules
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parse_args():
    parser = argparse.ArgumentParser(description="One GRPO step, timed; see the head of this file.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: memory time; with --full: "
                        "program decode precision long time")
    parser.add_argument("--full", action="store_true", help="the shape of Qwen2-VL-2B in bf16, on a GPU")
    parser.add_argument("--out", help="also write what is printed to this file")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # a part, in its process
    parser.add_argument("--way", choices=("usual", "ours"), default="ours", help=argparse.SUPPRESS)
    full = parser.parse_known_args()[0].full
    sizes = dict(FULL if full else SHAPE, text_tokens=56, repeats=3, threads=os.cpu_count())
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    args.parts = args.parts or ("program decode precision long time" if full else "memory time").split()
    if full and DEVICE == "cpu":
        sys.exit("error: --full needs a GPU, and torch sees no CUDA device here")
    if args.image_size % 28 or args.text_tokens < 3:
        sys.exit("error: --image_size must be a multiple of 28 (one image token), --text_tokens at least 3")
    return args


# ---- Both ways, on random weights and data ---------------------------------------------------------------

def build_model(args, dtype=None):
    """A Qwen2-VL of the given shape with random weights, stock modules. It never ends a completion."""
    first, rotary = args.vocab - len(SPECIAL), args.hidden // args.heads // 16
    config = Qwen2VLConfig(
        text_config=dict(vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.intermediate,
                         num_hidden_layers=args.layers, num_attention_heads=args.heads,
                         num_key_value_heads=args.kv_heads, bos_token_id=None, eos_token_id=EOS,
                         rope_parameters=dict(rope_type="default", rope_theta=1e6,
                                              mrope_section=[2 * rotary, 3 * rotary, 3 * rotary])),
        vision_config=dict(depth=args.vision_layers, embed_dim=args.vision_hidden, hidden_size=args.hidden,
                           num_heads=args.vision_heads, mlp_ratio=4),
        image_token_id=first, video_token_id=first + 1, vision_start_token_id=first + 2,
        vision_end_token_id=first + 3, tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Qwen2VLForConditionalGeneration(config).eval()
        model.register_buffer("suppressed", torch.arange(args.vocab) >= first, persistent=False)
    model.suppressed[EOS], model.eos_ids = True, [EOS]
    return model.to(dtype or (torch.bfloat16 if args.full else torch.float32))


def build_passes(args, model, cfg):
    """Random pixels and text, <|vision_start|>, image tokens, <|vision_end|>, words -> passes as from
    gv.build_prompts."""
    grid, pad, passes = args.image_size // 14, model.config.image_token_id, []
    image = [model.config.vision_start_token_id, *[pad] * (grid // 2)**2, model.config.vision_end_token_id]
    for first in range(0, args.prompts, max(1, cfg.encode_tokens // cfg.max_prompt_length)):
        n = min(args.prompts - first, max(1, cfg.encode_tokens // cfg.max_prompt_length))
        words = torch.randint(1, pad, (n, args.text_tokens - 2))
        ids = torch.cat([torch.tensor([image] * n), words], 1).to(DEVICE)                         # (n, P)
        grid_thw = torch.tensor([[1, grid, grid]] * n, device=DEVICE)
        positions, _ = model.model.get_rope_index(ids, (ids == pad).int(), image_grid_thw=grid_thw)
        pixels = torch.randn(n * grid * grid, 1176, device=DEVICE)
        passes.append(SimpleNamespace(
            input_ids=ids, lengths=torch.full((n,), ids.shape[1], device=DEVICE), first=first,
            position_ids=positions, next_position=positions.amax((0, 2)) + 1, pixel_values=pixels,
            image_grid_thw=grid_thw))
    return passes


def settings(args, **others):
    """-> gv.Config; prompts have one length, which is also the longest."""
    P = (args.image_size // 28)**2 + args.text_tokens
    return gv.Config(**dict(num_generations=args.num_generations, max_completion_length=args.completion_length,
                            beta=BETA, max_prompt_length=P, gradient_checkpointing=False) | others)


def written(args):
    """-> Rollout of random tokens, advantages (N,), weights of their tokens (N,)"""
    N, C = args.prompts * args.num_generations, args.completion_length
    ids = torch.randint(1, args.vocab - len(SPECIAL), (N, C), device=DEVICE)
    mask = torch.ones_like(ids, dtype=torch.bool)
    rollout = gv.Rollout(ids, mask, torch.zeros(N, C, device=DEVICE), mask[:, 0])
    return rollout, torch.randn(N, device=DEVICE), torch.full((N,), 1 / (N * C), device=DEVICE)


class Ours:
    """This program: image and prompt once per pass."""
    def __init__(self, model, reference, args, cfg):
        self.cfg, self.passes = cfg, build_passes(args, model, cfg)
        self.policy, self.frozen = (gv.Policy(gv.fast_vision(m)) for m in (model, reference))

    def rollout(self):
        return gv.sample(self.policy.model, self.passes, self.cfg.num_generations,
                         self.cfg.max_completion_length, 1.0)

    def reference(self, rollout):
        return gv.score_by_reference(self.frozen, self.passes, rollout, self.cfg)

    def update(self, rollout, advantages, ref_logps):
        weights = gv.weigh_tokens(rollout.lengths, rollout.finished, self.cfg).float()
        return gv.update(self.policy, self.passes, rollout, advantages, weights, ref_logps, None, self.cfg)[0]


class UsualWay:
    """G rows of prompt, image and completion, through the stock model; group by group when scoring."""
    def __init__(self, model, reference, args, passes):
        self.model, self.frozen = model, reference
        self.G, self.C = args.num_generations, args.completion_length
        self.suppressed = model.suppressed.nonzero()[:, 0]
        self.groups = [self.rows(prompts, i) for prompts in passes for i in range(len(prompts.input_ids))]

    def rows(self, prompts, i):
        ids = prompts.input_ids[i].repeat(self.G, 1)                                              # (G, P)
        pixels = prompts.pixel_values.chunk(len(prompts.input_ids))[i]
        return dict(input_ids=ids, attention_mask=torch.ones_like(ids),
                    mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
                    pixel_values=pixels.repeat(self.G, 1),
                    image_grid_thw=prompts.image_grid_thw[i].repeat(self.G, 1))

    @torch.no_grad()
    def rollout(self):
        batch = {name: torch.cat([group[name] for group in self.groups]) for name in self.groups[0]}
        return self.model.generate(
            **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=self.C,
            suppress_tokens=self.suppressed.tolist(), eos_token_id=EOS, pad_token_id=EOS)

    def score(self, model, group, completion_ids):
        """One forward over prompt + completion, with logits of the completion only -> log-probs (G, C)."""
        ones = torch.ones_like(completion_ids)
        added = dict(input_ids=completion_ids, attention_mask=ones, mm_token_type_ids=0 * ones)
        batch = group | {name: torch.cat([group[name], added[name]], 1) for name in added}        # (G, P + C)
        logits = model(**batch, use_cache=False, logits_to_keep=self.C + 1).logits
        logits = logits[:, :-1].float()                                                           # (G, C, V)
        logits[..., self.suppressed] = torch.finfo(logits.dtype).min
        chosen = logits.gather(-1, completion_ids[..., None])[..., 0]
        with torch.no_grad():  # for the log, as we do
            logps = logits.log_softmax(-1)
            (logps.exp() * logps).sum(-1)
        return chosen - logits.logsumexp(-1)

    @torch.no_grad()
    def reference(self, rollout):
        ids = rollout.completion_ids.split(self.G)
        return torch.cat([self.score(self.frozen, group, c) for group, c in zip(self.groups, ids)])

    def update(self, rollout, advantages, ref_logps):
        result = []
        rows = (x.split(self.G) for x in (rollout.completion_ids, advantages[:, None], ref_logps))
        for group, ids, A, ref in zip(self.groups, *rows):
            logps = self.score(self.model, group, ids)                                            # (G, C)
            ratio, log_ratio = (logps - logps.detach()).exp(), ref - logps
            loss = BETA * (log_ratio.exp() - log_ratio - 1) - torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A)
            (loss.mean(1).sum() / len(advantages)).backward()
            result.append(logps.detach())
        return torch.cat(result)


def build(args, **others):
    """-> policy, (usual way, ours). Both ways hold the very same parameters."""
    model = build_model(args)
    reference = copy.deepcopy(model).requires_grad_(False)
    for parameter in reference.parameters():  # the policy has moved away from it, so that the KL is not 0
        parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    twin = lambda m: copy.deepcopy(m, memo={id(p): p for p in m.parameters()})  # own modules only
    ours = Ours(twin(model), twin(reference), args, settings(args, **others))
    return model, (UsualWay(model, reference, args, ours.passes), ours)


# ---- The parts -------------------------------------------------------------------------------------------

def timed_step(way, optimizer, advantages, rollout=None):
    """One step -> seconds of its phases, and what it computed. Scores `rollout`, if given, for its own."""
    clock = [gv.now()]
    drawn = way.rollout()
    rollout = drawn if rollout is None else rollout
    clock.append(gv.now())
    ref_logps = way.reference(rollout)                                                            # (N, C)
    clock.append(gv.now())
    logps = way.update(rollout, advantages, ref_logps)                                            # (N, C)
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0).item()
    optimizer.step()
    optimizer.zero_grad()
    clock.append(gv.now())
    return dict(zip(PHASES, (b - a for a, b in zip(clock, clock[1:])))), rollout, ref_logps, logps, norm


def time_both(args):
    """Both ways in turn, --repeats times, and a check that they agree."""
    model, (usual, ours) = build(args)
    advantages = torch.randn(args.prompts * args.num_generations, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # a whole step, and the weights stay
    seconds, differences, norms = {usual: [], ours: []}, [], []
    for repeat in range(-1, args.repeats):
        mine, rollout, *our_logps, our_norm = timed_step(ours, optimizer, advantages)
        theirs, _, *their_logps, their_norm = timed_step(usual, optimizer, advantages, rollout)
        if repeat >= 0:  # the first step touches memory, and AdamW's, for the first time
            seconds[ours].append(mine), seconds[usual].append(theirs)
        differences += [(a - b).abs().max().item() for a, b in zip(our_logps, their_logps)]
        norms.append(abs(our_norm / their_norm - 1))
    logps_bar, norm_bar = (0.1, 0.05) if args.full else (1e-4, 1e-3)  # bf16 keeps 3 digits of a hidden state
    assert max(differences) < logps_bar, f"the two ways differ by {max(differences):.2g} in log-probability"
    assert max(norms) < norm_bar, f"the norms of the gradient differ by a factor of 1 + {max(norms):.2g}"
    rows = [(phase, [phase]) for phase in PHASES] + [("**whole step**", PHASES)]
    print("| phase | usual way, s | ours, s | ratio |\n|---|--:|--:|--:|")
    for name, phases in rows:
        a, b = (statistics.median(sum(step[phase] for phase in phases) for step in seconds[way])
                for way in (usual, ours))
        print(f"| {name} | {a:.2f} | {b:.2f} | {a / b:.1f}x |")
    print(f"\nMedians of {args.repeats} repeats in turn after one to warm up. Equal work: log-probs within "
          f"{max(differences):.1g}, gradient norms within {max(norms):.1g} (relative).")


def held(peak=False):
    """MiB that this process holds, on the GPU or else resident; peak: the most since `forget_peak`."""
    if DEVICE == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:" if peak else "VmRSS:") + 1]) / 1024


def forget_peak():
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM falls to VmRSS


def update_memory(args):
    """The peak of one update above what was held before, in MiB, or what a larger run of this table says."""
    if args.inside:
        fitting = settings(args).max_prompt_length, 2 * args.completion_length
        model, ways = build(args, encode_tokens=fitting[0], score_tokens=fitting[1])
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # in both ways it is there from the second step on
        rollout, advantages, _ = written(args)
        forget_peak()
        before = held()
        ways[args.way == "ours"].update(rollout, advantages, rollout.sampling_logps)
        return print(f"{held(peak=True) - before:.0f}")
    print("| memory of the update, MiB | least | | | most | ratio |\n|---|--:|--:|--:|--:|--:|")
    for flag, values in ("num_generations", (2, 4, 8, 16)), ("prompts", (1, 2, 4, 8)):
        for way in "usual", "ours":
            least = ["--num_generations", "2"] * (flag == "prompts") + ["--prompts", "1"] * (flag != "prompts")
            peaks = [part("memory", *least, "--way", way, f"--{flag}", str(value)) for value in values]
            if all(peak.isdigit() for peak in peaks):
                print(f"| {way}, {flag} {', '.join(map(str, values))} | {' | '.join(peaks)} | "
                      f"{int(peaks[-1]) / int(peaks[0]):.2f} |", flush=True)
            else:
                print(f"| {way}, {flag} | {' | '.join(peaks)} | |", flush=True)


def program_run(args):
    """-> what gv's functions call a run, and its settings and passes: one GPU, as by --preset sat."""
    cfg = settings(args, gradient_checkpointing=True, max_grad_norm=1.0)
    model = gv.fast_vision(build_model(args, torch.float32))
    sampler, frozen = (copy.deepcopy(model).to(torch.bfloat16).requires_grad_(False) for _ in range(2))
    passes = build_passes(args, model, cfg)
    gv.checkpoint_layers(model)
    policy = gv.Policy(model, autocast=True)
    return SimpleNamespace(
        policy=policy, sampler=sampler, reference=gv.Policy(frozen), accelerator=Accelerator(),
        optimizer=torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0)), cfg, passes


def operations(args, model, passes):
    """Of an update: 6 for each weight and each token that it meets. What is computed twice counts once."""
    count = lambda module: sum(p.numel() for p in module.parameters())
    completions = args.prompts * args.num_generations * args.completion_length
    tokens = args.prompts * passes[0].input_ids.shape[1] + completions
    patches = sum(len(prompts.pixel_values) for prompts in passes)
    return 6 * (count(model.model.language_model.layers) * tokens + model.lm_head.weight.numel() * completions
                + count(model.model.visual) * patches)


def program_step(args):
    run, cfg, passes = program_run(args)
    _, advantages, _ = written(args)
    spent, update = [], gv.update

    def timed_update(*arguments):
        start = gv.now()
        found = update(*arguments)
        spent.append(gv.now() - start)
        return found

    gv.update, steps = timed_update, []
    for repeat in range(-1, args.repeats):
        if repeat == 0:
            forget_peak()
        clock = [gv.now()]
        rollout = gv.sample(run.sampler, passes, args.num_generations, args.completion_length, 1.0)
        clock.append(gv.now())
        ref_logps = gv.score_by_reference(run.reference, passes, rollout, cfg)                    # (N, C)
        clock.append(gv.now())
        sums = gv.optimise(run, cfg, 0, passes, rollout, advantages, ref_logps)
        clock.append(gv.now())
        steps.append([b - a for a, b in zip(clock, clock[1:])])
    rollout_s, reference_s, optimise_s = map(statistics.median, zip(*steps[1:]))
    update_s = statistics.median(spent[1:])
    rows = {"rollout, s": f"{rollout_s:.2f}", "reference, s": f"{reference_s:.2f}",
            "update: gradient, s": f"{update_s:.2f}",
            "update: clipping, AdamW, copy to the sampler, s": f"{optimise_s - update_s:.2f}",
            "**whole step, s**": f"{statistics.median(map(sum, steps[1:])):.2f}",
            "peak memory, GB": f"{held(peak=True) * 2**20 / 1e9:.1f}"}
    rate = operations(args, run.policy.model, passes) / update_s
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else ""
    best = next((rate for name, rate in BF16_RATE.items() if name in card), None)
    rows["update: TFLOP/s"] = f"{rate / 1e12:.3g}" + (f", {rate / best:.0%} of the card's" if best else "")
    rows["sampler_mismatch after the last step, largest"] = f"{sums['mismatch']:.3f}"
    print(f"| {run.sampler.num_parameters() / 1e6:.0f}M parameters, {args.prompts} x {args.num_generations} x "
          f"{args.completion_length} tokens, {(args.image_size // 28)**2} image tokens | |\n|---|--:|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")


class WithoutGraph(gv.Decoder):
    step = gv.Decoder.forward


def decode(args):
    model = build_model(args)
    passes = build_passes(args, model, settings(args))
    usual = UsualWay(model, None, args, passes)
    fast = gv.fast_vision(copy.deepcopy(model))

    def ours(decoder):
        gv.Decoder = decoder
        gv.sample(fast, passes, args.num_generations, args.completion_length, 1.0)

    print("| completion tokens per second | |\n|---|--:|")
    ways = {"with CUDA graphs": lambda decoder=gv.Decoder: ours(decoder),
            "without": lambda: ours(WithoutGraph), "`generate`": usual.rollout}
    for name, way in ways.items():
        way()
        start = gv.now()
        way()
        tokens = args.prompts * args.num_generations * args.completion_length
        print(f"| {name} | {tokens / (gv.now() - start):.0f} |", flush=True)


def precision(args):
    """The bf16 sampler's log-probabilities of its own samples against those of the float32 weights."""
    run, cfg, passes = program_run(args)
    rollout = gv.sample(run.sampler, passes, args.num_generations, args.completion_length, 1.0)
    print("| bf16 against float32, nats per token | mean | largest |\n|---|--:|--:|")
    exact = gv.score_by_reference(gv.Policy(run.policy.model), passes, rollout, cfg)              # (N, C)
    scored = gv.score_by_reference(run.policy, passes, rollout, cfg)                              # (N, C)
    for name, logps in ("sampler", rollout.sampling_logps), ("policy, by autocast", scored):
        x = (logps - exact).abs()
        print(f"| {name} | {x.mean():.4f} | {x.max():.3f} |")


def long_completion(args):
    """Memory of an update by one completion, beyond what is held, and its time."""
    if not args.inside:
        length = args.completion_length if "--completion_length" in sys.argv else 8192
        print(f"| one completion of {length} tokens | beyond what is held, GB | s |\n|---|--:|--:|")
        for name, way in ("with checkpointing", "ours"), ("without", "usual"):
            found = part("long", "--prompts", "1", "--num_generations", "1", "--completion_length", str(length),
                         "--way", way)
            print(f"| {name} | {found} |", flush=True)
        return
    with torch.device(DEVICE):
        cfg = settings(args, gradient_checkpointing=args.way == "ours")
        model = gv.fast_vision(build_model(args, torch.float32))
    if cfg.gradient_checkpointing:
        gv.checkpoint_layers(model)
    policy, passes = gv.Policy(model, autocast=DEVICE == "cuda"), build_passes(args, model, cfg)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    forget_peak()
    before, start = held(), gv.now()
    rollout, advantages, weights = written(args)
    gv.update(policy, passes, rollout, advantages, weights, rollout.sampling_logps, None, cfg)
    seconds = gv.now() - start
    print(f"{(held(peak=True) - before) * 2**20 / 1e9:.2f} | {seconds:.1f}")


def compare_trl(args):
    """A step of TRL's GRPOTrainer and one of ours in turn, --repeats times."""
    import tempfile

    import datasets
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen2VLProcessor,
                              Qwen2VLVideoProcessor)
    from trl import GRPOConfig, GRPOTrainer

    model, (_, ours) = build(args)
    advantages = torch.randn(args.prompts * args.num_generations, device=DEVICE)
    words = [f"w{i}" for i in range(args.vocab - len(SPECIAL))] + SPECIAL
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=words[EOS], pad_token=words[EOS], extra_special_tokens=SPECIAL)
    template = ("{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}"
                + gv.IMAGE_TOKENS + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}")
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(),
                                 chat_template=template)
    text = " ".join(random.choices(words[1:-len(SPECIAL)], k=args.text_tokens - 2))
    image = Image.effect_noise((args.image_size, args.image_size), 64).convert("RGB")
    data = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": text}]] * args.prompts,
                                       "image": [image] * args.prompts})
    optimizer, seconds = torch.optim.AdamW(model.parameters(), lr=0.0), {"trl": [], "ours": []}

    class InTurn(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = gv.now()

        def on_step_end(self, *_, **__):
            seconds["trl"].append(gv.now() - self.start)
            seconds["ours"].append(sum(timed_step(ours, optimizer, advantages)[0].values()))

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # a path, because TRL loads the reference model from it
        trainer = GRPOTrainer(
            folder, processing_class=processor, train_dataset=data, callbacks=[InTurn()],
            reward_funcs=lambda completions, **_: [random.random() for _ in completions],
            args=GRPOConfig(
                output_dir=folder, max_steps=args.repeats, per_device_train_batch_size=len(advantages),
                num_generations=args.num_generations, max_completion_length=args.completion_length,
                beta=BETA, generation_kwargs=dict(suppress_tokens=model.suppressed.nonzero()[:, 0].tolist()),
                loss_type="grpo", learning_rate=1e-9, gradient_checkpointing=False, bf16=args.full,
                model_init_kwargs=dict(dtype=model.dtype), use_cpu=DEVICE == "cpu", save_strategy="no",
                report_to="none", disable_tqdm=True))
        trainer.train()
    row_tokens = ours.passes[0].input_ids.shape[1] + args.completion_length
    expected = args.repeats * len(advantages) * row_tokens
    assert trainer.state.num_input_tokens_seen == expected, "TRL's rows are not as long as ours"
    a, b = (statistics.median(seconds[name]) for name in ("trl", "ours"))
    print(f"| whole step | TRL's GRPOTrainer, s | ours, s | ratio |\n|---|--:|--:|--:|\n"
          f"| | {a:.2f} | {b:.2f} | {a / b:.1f}x |")


PARTS = dict(time=time_both, memory=update_memory, trl=compare_trl, program=program_step, decode=decode,
             precision=precision, long=long_completion)
IN_PIECES = ("memory", "long")  # parts that start a process for each of their numbers themselves


def part(name, *flags):
    """Run a part with our flags and others in a process of its own -> what it prints, or why it failed."""
    # glibc would keep freed memory for itself; told so, it gives back at once whatever is above 64 KiB
    returning = dict(MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    command = [sys.executable, __file__, *sys.argv[1:], "--inside", "--parts", name, *flags]
    env = dict(os.environ, **returning if name in IN_PIECES else {})
    child = subprocess.run(command, env=env, capture_output=True, text=True)
    lines = (child.stdout if child.returncode == 0 else child.stderr).strip().splitlines()
    return "\n".join(lines) if child.returncode == 0 else f"failed: {lines[-1] if lines else child.returncode}"


def machine(threads):
    """The last line of a report: where, with what, and how to run it again."""
    if DEVICE == "cuda":
        device = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        name = info.partition("model name\t: ")[2].partition("\n")[0].strip() or platform.machine()
        device = f"{name}, {threads} of {os.cpu_count()} cores"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    command = " ".join([f"python bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return f"{device}; Python {platform.python_version()}, {versions}; `{command}`"


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    if args.inside:
        Accelerator(cpu=DEVICE == "cpu")  # gv's functions ask how many processes there are
        return PARTS[args.parts[0]](args)
    for name in args.parts:
        if name in IN_PIECES:
            PARTS[name](args)
        else:
            print(part(name))
        print(flush=True)
    print(machine(args.threads))


if __name__ == "__main__":
    main()
