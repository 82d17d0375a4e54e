"""One GRPO step, timed: this program against the usual way, on the same weights in the same process.

    python bench/step.py                # 47M parameters, 324 image tokens, G = 8, 128 tokens, on the CPU
    python bench/step.py --num_generations 4 --image_size 252 --no_memory        # other sizes: see --help
    python bench/step.py --mkl          # our linear layers as torch computes them, by MKL and not by oneDNN
    python bench/step.py --full         # the 2.2B shape in bf16 with random weights; needs a GPU of 80 GB
    python bench/step.py --program --no_time --no_memory       # that table only, in any size, anywhere
    python bench/step.py --trl          # a step of TRL's GRPOTrainer as well

--trl needs an environment of its own, as TRL takes Qwen2VLProcessor and that takes torchvision:

    pip install torch==2.12.1 torchvision==0.27.1 trl==1.16.0 transformers accelerate datasets pillow

The usual way takes a group as G separate rows, each with its own copy of prompt and image: `generate` on G
rows, one forward over prompt + completion of G rows for the reference, and one with a backward for the
policy, all with the stock modules. Both ways end in the same clipping and the same AdamW. The end token is
suppressed, so completions have full length and both do equal work. That it is equal is asserted: for the
same completions the log-probabilities and the norm of the gradient must agree.

Memory of the update is its peak minus what was held before (weights and gradients were), each number from a
fresh process, on Linux or a GPU. There --score_tokens is 256, two completions of 128 at a time: the
program's 2048 would take G = 16 in one chunk, and the memory would still grow from G = 2 to 16.

Another table, with --full or --program, is the step as the program takes it on one GPU: float32 weights
computed in bf16 by autocast, sampler and reference in bf16, AdamW. With --full it has 8 prompts x 8
completions x 300 tokens, 484 image tokens each, whatever the sizes of the other tables. Decoding is timed
with and without CUDA graphs and by `generate`. The update's operations are those that torch counts (it
recomputes nothing), and are set against the dense bf16 rate in the GPU's data sheet.

Sample output (two cores, medians of seven repeats; the TRL row from a run with --trl, memory from another):

    | phase | usual way, s | ours, s | ratio |
    |---|--:|--:|--:|
    | rollout | 6.75 | 2.38 | 2.8x |
    | reference | 4.26 | 0.64 | 6.7x |
    | update | 19.63 | 2.20 | 8.9x |
    | reference + update | 23.74 | 2.94 | 8.1x |
    | **whole step** | 30.70 | 5.19 | 5.9x |
    | whole step, TRL's GRPOTrainer | 32.19 | 5.33 | 6.0x |

    | memory of the update, MiB | G = 2 | G = 4 | G = 8 | G = 16 | 16 against 2 |
    |---|--:|--:|--:|--:|--:|
    | usual way | 1051 | 2074 | 4120 | 8213 | 7.81x |
    | ours | 639 | 648 | 648 | 648 | 1.01x |
"""
import argparse
import copy
import functools
import gc
import os
import platform
import random
import statistics
import subprocess
import sys
import unittest.mock
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent.parent))
import grpo_vision as gv

SHAPE = dict(vocab=8192, hidden=512, intermediate=2048, layers=8, heads=8, kv_heads=2,
             vision_hidden=320, vision_layers=8, vision_heads=8)                         # 47M parameters
FULL_SHAPE = dict(vocab=151936, hidden=1536, intermediate=8960, layers=28, heads=12, kv_heads=2,
                  vision_hidden=1280, vision_layers=32, vision_heads=16)                 # 2.2B: Qwen2-VL-2B
SPECIAL = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]  # last in the vocabulary
EOS, BETA, PHASES = 0, 0.04, ("rollout", "reference", "update")
FULL_STEP = dict(prompts=8, num_generations=8, completion_length=300, image_size=616)
BF16_RATE = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # NVIDIA's data sheets: dense, SXM modules


def parse_args():
    parser = argparse.ArgumentParser(description="One GRPO step, timed; see the head of this file.")
    sizes = dict(prompts=1, num_generations=8, completion_length=128, image_size=504, text_tokens=56,
                 repeats=3, threads=os.cpu_count(), **SHAPE)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--score_tokens", type=int,
                        help=f"default {gv.Config.score_tokens}; 256 for the memory")
    parser.add_argument("--full", action="store_true", help="the shape of Qwen2-VL-2B in bf16, on a GPU")
    parser.add_argument("--program", action="store_true", help="the program's own step in bf16 too")
    parser.add_argument("--mkl", action="store_true", help="our linear layers by MKL, not oneDNN")
    parser.add_argument("--trl", action="store_true", help="time TRL's GRPOTrainer too")
    parser.add_argument("--no_memory", action="store_true", help="leave the memory table out")
    parser.add_argument("--no_time", action="store_true", help="leave the time table out")
    parser.add_argument("--out", help="also write the printed tables to this file")
    parser.add_argument("--measure", choices=("usual", "ours"), help=argparse.SUPPRESS)  # update_memory
    if parser.parse_known_args()[0].full:
        parser.set_defaults(**FULL_SHAPE)
    args = parser.parse_args()
    if args.full and not torch.cuda.is_available():
        sys.exit("error: --full needs a GPU, and torch sees no CUDA device here")
    if args.image_size % 28 or args.text_tokens < 3:
        sys.exit("error: --image_size must be a multiple of 28 (one image token), --text_tokens at least 3")
    return args


def build_model(args, device):
    """A Qwen2-VL of the given shape with random weights, stock modules."""
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
    with torch.device(device):
        model = Qwen2VLForConditionalGeneration(config)
    return model.to(torch.bfloat16 if args.full else torch.float32).eval()


def build_prompt(args, model):
    """Random pixels and text: <|vision_start|>, image tokens, <|vision_end|>, words -> gv.Prompt."""
    grid, pad = args.image_size // 14, model.config.image_token_id
    image = [model.config.vision_start_token_id, *[pad] * (grid // 2)**2, model.config.vision_end_token_id]
    words = torch.randint(1, pad, (args.text_tokens - 2,)).tolist()
    ids, grid_thw = (torch.tensor([x], device=model.device) for x in (image + words, [1, grid, grid]))
    positions, _ = model.model.get_rope_index(ids, (ids == pad).int(), image_grid_thw=grid_thw)
    return gv.Prompt("", ids, positions, torch.randn(grid * grid, 1176, device=model.device), grid_thw)


def unwanted(args, device):
    """(V,) bool: vision tokens, and the end token, so that all completions have full length."""
    suppressed = torch.arange(args.vocab, device=device) >= args.vocab - len(SPECIAL)
    suppressed[EOS] = True
    return suppressed


class Ours:
    """This program: image and prompt once per pass."""
    def __init__(self, model, reference, prompts, suppressed, args):
        self.model, self.prompts, self.suppressed = model, prompts, suppressed
        self.policy, self.frozen = (gv.Policy(gv.fast_layers(m), 1.0, suppressed)
                                    for m in (model, reference))
        self.cfg = gv.Config(num_generations=args.num_generations, beta=BETA,
                             max_completion_length=args.completion_length,
                             score_tokens=args.score_tokens or gv.Config.score_tokens)

    def rollout(self):
        return gv.sample(self.model, self.prompts, self.cfg.num_generations, self.cfg.max_completion_length,
                         1.0, self.suppressed, [EOS])

    def reference(self, rollout):
        return gv.score_rollout(self.frozen, self.prompts, rollout, self.cfg)

    def update(self, rollout, advantages, ref_logps):
        weights = gv.weigh_tokens(rollout.completion_mask.sum(1), rollout.finished, self.cfg).float()
        return gv.update(self.policy, self.prompts, rollout, advantages, weights, ref_logps, None,
                         self.cfg)[0]


class UsualWay:
    """G rows of prompt, image and completion, through the stock model; group by group when scoring."""
    def __init__(self, model, reference, prompts, suppressed, args):
        self.model, self.frozen = model, reference
        self.G, self.C = args.num_generations, args.completion_length
        self.suppressed = suppressed.nonzero()[:, 0]  # a few ids
        self.groups = [self.rows(prompt) for prompt in prompts]

    def rows(self, prompt):
        ids = prompt.input_ids.repeat(self.G, 1)                                                  # (G, P)
        return dict(input_ids=ids, attention_mask=torch.ones_like(ids),
                    mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
                    pixel_values=prompt.pixel_values.repeat(self.G, 1),
                    image_grid_thw=prompt.image_grid_thw.repeat(self.G, 1))

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


def build(args):
    """-> policy, (usual way, ours), advantages (N,). Both ways hold the very same parameters."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(args, device)
    reference = copy.deepcopy(model).requires_grad_(False)
    for parameter in reference.parameters():  # the policy has moved away from it, so that the KL is not 0
        parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    prompts = [build_prompt(args, model) for _ in range(args.prompts)]
    suppressed = unwanted(args, device)
    twin = lambda m: copy.deepcopy(m, memo={id(p): p for p in m.parameters()})  # own modules only
    ways = (UsualWay(model, reference, prompts, suppressed, args),
            Ours(twin(model), twin(reference), prompts, suppressed, args))
    return model, ways, torch.randn(args.prompts * args.num_generations, device=device)


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


def compare(args):
    """Both ways in turn, --repeats times -> the lines of the time table, after checking that they agree."""
    model, (usual, ours), advantages = build(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # a whole step, and the weights stay
    seconds, differences, norms = {usual: [], ours: []}, [], []
    for repeat in range(-1, args.repeats):
        mine, rollout, *our_logps, our_norm = timed_step(ours, optimizer, advantages)
        theirs, _, *their_logps, their_norm = timed_step(usual, optimizer, advantages, rollout)
        if repeat >= 0:  # the first step touches memory, and AdamW's, for the first time
            seconds[ours].append(mine), seconds[usual].append(theirs)
        differences += [(a - b).abs().max().item() for a, b in zip(our_logps, their_logps)]
        norms.append(abs(our_norm / their_norm - 1))
        print(f"usual way {sum(theirs.values()):.1f} s, ours {sum(mine.values()):.1f} s", file=sys.stderr)
    logps_bar, norm_bar = (0.1, 0.05) if args.full else (1e-4, 1e-3)  # bf16 keeps 3 digits of a hidden state
    assert max(differences) < logps_bar, f"the two ways differ by {max(differences):.2g} in log-probability"
    assert max(norms) < norm_bar, f"the norms of the gradient differ by a factor of 1 + {max(norms):.2g}"

    rows = [(phase, [phase]) for phase in PHASES]
    rows += [("reference + update", PHASES[1:]), ("**whole step**", PHASES)]
    lines = ["| phase | usual way, s | ours, s | ratio |", "|---|--:|--:|--:|"]
    for name, phases in rows:
        a, b = (statistics.median(sum(step[phase] for phase in phases) for step in seconds[way])
                for way in (usual, ours))
        lines.append(f"| {name} | {a:.2f} | {b:.2f} | {a / b:.1f}x |")
    agreement = (f"Medians of {args.repeats} interleaved repeats after one to warm up. Equal work: log-probs "
                 f"within {max(differences):.1g}, gradient norms within {max(norms):.1g} (relative).")
    return lines, agreement


def program_table(args):
    """The step as the program takes it on one GPU -> lines of a table of its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = gv.fast_layers(build_model(args, device).float())
    sampler, frozen = (copy.deepcopy(model).to(torch.bfloat16).requires_grad_(False) for _ in range(2))
    prompts = [build_prompt(args, model) for _ in range(args.prompts)]
    suppressed = unwanted(args, device)
    policy = gv.Policy(model, 1.0, suppressed, autocast=True)
    reference = gv.Policy(frozen, 1.0, suppressed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    N, C = args.prompts * args.num_generations, args.completion_length
    cfg = gv.Config(num_generations=args.num_generations, max_completion_length=C, beta=BETA,
                    score_tokens=args.score_tokens or gv.Config.score_tokens)
    advantages = torch.randn(N, device=device)

    def decode(decoder=gv.Decoder):
        with unittest.mock.patch.object(gv, "Decoder", decoder):
            return gv.sample(sampler, prompts, args.num_generations, C, 1.0, suppressed, [EOS])

    def update(rollout, ref_logps):
        weights = gv.weigh_tokens(rollout.completion_mask.sum(1), rollout.finished, cfg).float()
        return gv.update(policy, prompts, rollout, advantages, weights, ref_logps, None, cfg)[0]

    def optimise():
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        gv.refresh(sampler, policy)

    rollout = decode()
    with FlopCounterMode(display=False) as counter:  # a step to warm up, too
        update(rollout, rollout.sampling_logps)
    optimise()
    forget_peak()
    phases = {"rollout": [], "reference": [], "update, gradient": [], "update, AdamW and sampler": []}
    for _ in range(args.repeats):
        clock = [gv.now()]
        rollout = decode()
        clock.append(gv.now())
        ref_logps = gv.score_rollout(reference, prompts, rollout, cfg)                            # (N, C)
        clock.append(gv.now())
        logps = update(rollout, ref_logps)                                                        # (N, C)
        clock.append(gv.now())
        optimise()
        clock.append(gv.now())
        for seconds, begin, end in zip(phases.values(), clock, clock[1:]):
            seconds.append(end - begin)
    peak, mismatch = held(peak=True), (logps - rollout.sampling_logps).abs()
    rollout = decode()
    exact = gv.score_rollout(gv.Policy(model, 1.0, suppressed), prompts, rollout, cfg)  # float32   (N, C)
    rounding = (exact - rollout.sampling_logps).abs()

    images = prompts[0].pixel_values.shape[0] // 4
    lines = [f"| {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, {args.prompts} x "
             f"{args.num_generations} x {C} tokens, {images} image tokens | |", "|---|--:|"]
    lines += [f"| {name}, s | {statistics.median(seconds):.2f} |" for name, seconds in phases.items()]
    lines.append(f"| **whole step, s** | {statistics.median(map(sum, zip(*phases.values()))):.2f} |")
    ways = {"decoding, tokens / s": decode,
            "decoding without CUDA graphs": lambda: decode(functools.partial(gv.Decoder, fixed=False)),
            "`generate`": UsualWay(sampler, frozen, prompts, suppressed, args).rollout}
    for name, way in ways.items():
        way()
        start = gv.now()
        way()
        lines.append(f"| {name} | {N * C / (gv.now() - start):.0f} |")
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    rate = next((rate for name, rate in BF16_RATE.items() if name in gpu), None)
    used = counter.get_total_flops() / statistics.median(phases["update, gradient"])
    share = f", {used / rate:.0%} of {rate / 1e12:.0f}" if rate else ""
    lines += [f"| update, gradient, TFLOP / s | {used / 1e12:.3g}{share} |",
              f"| peak memory, GB | {peak * 2**20 / 1e9:.1f} |"]
    lines += [f"| {name}, largest, mean | {x.max():.3f}, {x.mean():.4f} |" for name, x in
              (("sampler_mismatch", mismatch), ("bf16 sampler against float32", rounding))]
    return lines


def held(peak=False):
    """MiB that this process holds, on the GPU or else resident; peak: the most since `forget_peak`."""
    if torch.cuda.is_available():
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:" if peak else "VmRSS:") + 1]) / 1024


def forget_peak():
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM falls to VmRSS


def measure_update(args):
    """In a fresh process: print the peak memory of one update above what was held before, in MiB."""
    model, ways, advantages = build(args)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # in both ways it is there from the second step on
    shape = (len(advantages), args.completion_length)
    ids = torch.randint(1, model.config.image_token_id, shape, device=model.device)
    logps = torch.zeros(shape, device=model.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    rollout = gv.Rollout(ids, mask, logps, mask[:, 0])
    forget_peak()
    before = held()
    try:
        ways[args.measure == "ours"].update(rollout, advantages, logps)
        print(f"{held(peak=True) - before:.0f}")
    except torch.OutOfMemoryError:
        print("too much")


# glibc would keep freed memory for itself; told so, it gives back at once whatever is above 64 KiB
RETURNING = dict(os.environ, MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="65536",
                 MALLOC_TRIM_THRESHOLD_="65536")


def update_memory(groups=(2, 4, 8, 16)):
    """-> the lines of the memory table; each number from a process of its own, run with the same flags."""
    lines = ["| memory of the update, MiB | " + " | ".join(f"G = {G}" for G in groups) + " | 16 against 2 |",
             "|---|" + "--:|" * (len(groups) + 1)]
    for way, name in (("usual", "usual way"), ("ours", "ours")):
        peaks = []
        for G in groups:
            command = [sys.executable, __file__, "--score_tokens", "256", *sys.argv[1:],
                       "--measure", way, "--num_generations", str(G)]
            child = subprocess.run(command, env=RETURNING, check=True, stdout=subprocess.PIPE, text=True)
            peaks.append(child.stdout.strip())
            print(f"memory of the update, {name}, G = {G}: {peaks[-1]} MiB", file=sys.stderr)
        growth = "" if "too much" in peaks else f"{int(peaks[-1]) / int(peaks[0]):.2f}x"
        lines.append(f"| {name} | " + " | ".join(peaks) + f" | {growth} |")
    return lines


def compare_trl(args):
    """A step of TRL's GRPOTrainer and one of ours in turn, --repeats times -> a line of the time table."""
    import tempfile

    import datasets
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen2VLProcessor,
                              Qwen2VLVideoProcessor)
    from trl import GRPOConfig, GRPOTrainer

    model, (_, ours), advantages = build(args)
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

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    seconds = {"trl": [], "ours": []}

    class InTurn(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = gv.now()

        def on_step_end(self, *_, **__):
            seconds["trl"].append(gv.now() - self.start)
            seconds["ours"].append(sum(timed_step(ours, optimizer, advantages)[0].values()))
            print(f"TRL {seconds['trl'][-1]:.1f} s, ours {seconds['ours'][-1]:.1f} s", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # a path, because TRL loads the reference model from it
        settings = GRPOConfig(
            output_dir=folder, max_steps=args.repeats, per_device_train_batch_size=len(advantages),
            num_generations=args.num_generations, max_completion_length=args.completion_length, beta=BETA,
            generation_kwargs=dict(suppress_tokens=ours.suppressed.nonzero()[:, 0].tolist()),
            loss_type="grpo", learning_rate=1e-9, gradient_checkpointing=False, bf16=args.full,  # as we do
            model_init_kwargs=dict(dtype=model.dtype), use_cpu=not torch.cuda.is_available(),
            save_strategy="no", report_to="none", disable_tqdm=True)
        trainer = GRPOTrainer(
            folder, args=settings, processing_class=processor, train_dataset=data, callbacks=[InTurn()],
            reward_funcs=lambda completions, **_: [random.random() for _ in completions])
        trainer.train()
    row_tokens = ours.prompts[0].input_ids.shape[1] + args.completion_length
    expected = args.repeats * len(advantages) * row_tokens
    assert trainer.state.num_input_tokens_seen == expected, "TRL's rows are not as long as ours"
    a, b = (statistics.median(seconds[name]) for name in ("trl", "ours"))
    return f"| whole step, TRL's GRPOTrainer | {a:.2f} | {b:.2f} | {a / b:.1f}x |"


def machine(threads, packages=("torch", "transformers")):
    """The last line of a report: where, with what, and how to run it again."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        name = info.partition("model name\t: ")[2].partition("\n")[0].strip() or platform.machine()
        device = f"{name}, {threads} of {os.cpu_count()} cores"
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    command = " ".join([f"python bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return f"{device}; Python {platform.python_version()}, {versions}; `{command}`"


def main():
    args = parse_args()
    if args.mkl:
        gv.Linear = nn.Linear  # with which fast_layers changes nothing
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    if args.measure:
        return measure_update(args)
    report = []

    def show(*lines):  # at once: what comes next may not fit into memory
        print(*lines, sep="\n", flush=True)
        report.extend(lines)

    if not args.no_memory:
        show(*update_memory(), "")  # before this process takes any of a GPU's memory
    if args.program or args.full:
        show(*program_table(argparse.Namespace(**vars(args) | FULL_STEP if args.full else vars(args))), "")
        gc.collect()
        torch.cuda.empty_cache()
    if not args.no_time:
        table, agreement = compare(args)
        show(*table, *([compare_trl(args)] if args.trl else []), "", agreement)
    show(machine(args.threads, ("torch", "transformers") + ("trl",) * args.trl))
    if args.out:
        Path(args.out).write_text("\n".join(report) + "\n")


if __name__ == "__main__":
    main()
