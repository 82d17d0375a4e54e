"""One GRPO step, timed: this program against the usual way, on the same weights in the same process.

    python bench/step.py                         # 47M parameters, 4 prompts x 8 completions x 128 tokens
    python bench/step.py --full                  # the 2.2B shape in bf16 with random weights; needs a GPU
    python bench/step.py --parts long --completion_length 4096      # memory of one long completion

The usual way takes a group as G separate rows, each with its own copy of prompt and image: `generate`, then one
forward over prompt + completion of each group for the reference, and one with a backward for the policy, all with the
stock modules. Both ways end in the same AdamW. The end token is suppressed, so both do equal work. That it is equal is
asserted: log-probabilities and the norm of the gradient must agree. Each part runs in a process of its own.

  time       both ways in turn: rollout, reference, update, step
  memory     the peak of an update above what was held before, for more completions and for more prompts. The
             budgets are those that one prompt and two completions fill
  program    the step as --preset sat takes it on one GPU: a bf16 model that samples and is trained, float32
             weights beside it (with --cpu_offload in CPU memory), a bf16 reference, layers checkpointed. `--full`
             gives it 8 prompts x 8 completions x 300 tokens and 484 image tokens each
  decode     completion tokens per second: with CUDA graphs, without, and by `generate`
  precision  how far the sampler's log-probabilities are from those that are trained, and from those of float32
             weights, before any optimizer step
  long       one completion, by default of 8,192 tokens, with checkpointing and without
"""
import argparse
import copy
import os
import platform
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
from transformers import AutoModelForImageTextToText, Qwen2VLConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
import grpo_vision as gv

# text and vision of Qwen2-VL-2B as published, 2.2B parameters, and of a model with 47M
QWEN2_VL_2B = (dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                    num_attention_heads=12, num_key_value_heads=2),
               dict(depth=32, embed_dim=1280, hidden_size=1536, num_heads=16))
SMALL = (dict(vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=8,
              num_attention_heads=4, num_key_value_heads=2),
         dict(depth=8, embed_dim=320, hidden_size=512, num_heads=8))
SIZES = {True: dict(prompts=8, num_generations=8, completion_length=300, image_size=616),   # with --full
         False: dict(prompts=4, num_generations=8, completion_length=128, image_size=504)}  # and without
DTYPE = {True: torch.bfloat16, False: torch.float32}
SPECIAL = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]  # last in the vocabulary
EOS, BETA, PHASES = 0, 0.04, ("rollout", "reference", "update", "optimizer")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parse_args():
    parser = argparse.ArgumentParser(description="One GRPO step, timed; see the head of this file.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: memory time; with --full: "
                        "program decode precision long time")
    parser.add_argument("--full", action="store_true", help="the shape of Qwen2-VL-2B in bf16, on a GPU")
    parser.add_argument("--cpu_offload", action="store_true", help="program: float32 weights in CPU memory")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # a part, in its process
    parser.add_argument("--way", choices=("usual", "ours"), default="ours", help=argparse.SUPPRESS)
    full = parser.parse_known_args()[0].full
    for name, default in (SIZES[full] | dict(text_tokens=56, repeats=3, threads=os.cpu_count())).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    args.parts = args.parts or ("program decode precision long time" if full else "memory time").split()
    if full and DEVICE == "cpu":
        sys.exit("error: --full needs a GPU, and torch sees no CUDA device here")
    return args


def shape(args):
    text, vision = QWEN2_VL_2B if args.full else SMALL
    return Qwen2VLConfig(text_config=dict(text), vision_config=dict(vision), tie_word_embeddings=True)


def build_model(config, dtype=torch.float32, device=DEVICE):
    """A model with random weights, stock modules. It never ends a completion. Its last words are SPECIAL."""
    first = config.text_config.vocab_size - len(SPECIAL)
    config.image_token_id, config.video_token_id = first, first + 1
    config.vision_start_token_id, config.vision_end_token_id = first + 2, first + 3
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config).eval()
        model.register_buffer("suppressed", torch.arange(first + len(SPECIAL)) >= first, persistent=False)
    model.suppressed[EOS], model.eos_ids = True, [EOS]
    return model.to(dtype)


def build_pass(model, n, tokens, grid, first=0):
    """n prompts of random words and one image of height x width patches -> a pass, as gv.build_prompts."""
    config, vision, (height, width) = model.config, model.config.vision_config, grid
    image = [config.vision_start_token_id, *[config.image_token_id] * (height * width // 4),
             config.vision_end_token_id]
    words = torch.randint(1, config.image_token_id, (n, tokens - len(image)))
    ids = torch.cat([torch.tensor([image] * n), words], 1).to(model.device)                       # (n, P)
    grid_thw = torch.tensor([[1, height, width]] * n, device=model.device)
    positions, _ = model.model.get_rope_index(
        ids, mm_token_type_ids=(ids == config.image_token_id).int(), image_grid_thw=grid_thw)
    numbers = 3 * vision.temporal_patch_size * vision.patch_size**2  # of a patch
    pixels = torch.randn(n * height * width, numbers, dtype=model.dtype)
    return SimpleNamespace(
        input_ids=ids, lengths=torch.full((n,), tokens, device=model.device), image_grid_thw=grid_thw,
        first=first, position_ids=positions, next_position=positions.amax((0, 2)) + 1,
        pixel_values=pixels.to(model.device))


def build_passes(args, model, cfg):
    n, side = max(1, cfg.encode_tokens // cfg.max_prompt_length), args.image_size // 14
    return [build_pass(model, min(n, args.prompts - first), cfg.max_prompt_length, (side, side), first)
            for first in range(0, args.prompts, n)]


def settings(args, **others):
    """-> gv.Config; prompts have one length, which is also the longest."""
    P = (args.image_size // 28)**2 + args.text_tokens
    chosen = dict(num_generations=args.num_generations, max_completion_length=args.completion_length, beta=BETA,
                  max_prompt_length=P, gradient_checkpointing=False)
    return gv.Config(**chosen | others)


def written(args):
    """-> a rollout of random tokens, random advantages (N,)"""
    N, C = args.prompts * args.num_generations, args.completion_length
    ids = torch.randint(1, shape(args).text_config.vocab_size - len(SPECIAL), (N, C), device=DEVICE)
    mask = torch.ones_like(ids, dtype=torch.bool)
    rollout = SimpleNamespace(completion_ids=ids, completion_mask=mask, lengths=mask.sum(1), finished=mask[:, 0],
                              sampling_logps=torch.zeros(N, C, device=DEVICE))
    return rollout, torch.randn(N, device=DEVICE)


class Ours:
    """This program: image and prompt once per pass. master: float32 weights of a model in bf16."""
    def __init__(self, model, reference, args, cfg, master=None):
        self.cfg, self.passes, self.sampler = cfg, build_passes(args, model, cfg), gv.fast_vision(model)
        self.policy, self.frozen = gv.Policy(self.sampler), gv.Policy(gv.fast_vision(reference))
        self.master = gv.Policy(master) if master else self.policy
        if master:
            gv.sum_gradients(self.sampler, self.master, args.cpu_offload)

    def rollout(self):
        G, limit = self.cfg.num_generations, self.cfg.max_completion_length
        return gv.sample(self.sampler, self.passes, G, limit, 1.0)

    def reference(self, rollout):
        return gv.score_rollout(self.frozen, self.passes, rollout, self.cfg)

    def update(self, rollout, advantages, ref_logps):
        weights = gv.weigh_tokens(rollout.lengths, rollout.finished, self.cfg).float()
        return gv.update(self.policy, self.passes, rollout, advantages, weights, ref_logps, None, self.cfg)[0]

    def step(self, optimizer):
        run = SimpleNamespace(master=self.master, policy=self.policy, sampler=self.sampler, optimizer=optimizer)
        return gv.step_optimizer(run, self.cfg)


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
        return logits.log_softmax(-1).gather(-1, completion_ids[..., None])[..., 0]

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

    def step(self, optimizer):
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        return norm


def build(args, **others):
    """-> policy, (usual way, ours). Both ways hold the very same parameters."""
    model = build_model(shape(args), DTYPE[args.full])
    reference = copy.deepcopy(model).requires_grad_(False)
    for parameter in reference.parameters():  # the policy has moved away from it, so that the KL is not 0
        parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    twin = lambda m: copy.deepcopy(m, memo={id(p): p for p in m.parameters()})  # own modules only
    ours = Ours(twin(model), twin(reference), args, settings(args, **others))
    return model, (UsualWay(model, reference, args, ours.passes), ours)


def timed_step(way, optimizer, advantages, rollout=None):
    """One step -> seconds of its phases, and what it computed. Scores `rollout`, if given, for its own."""
    clock = [gv.now()]
    drawn = way.rollout()
    rollout = rollout or drawn
    clock.append(gv.now())
    ref_logps = way.reference(rollout)                                                            # (N, C)
    clock.append(gv.now())
    logps = way.update(rollout, advantages, ref_logps)                                            # (N, C)
    clock.append(gv.now())
    norm = way.step(optimizer)
    clock.append(gv.now())
    return dict(zip(PHASES, (b - a for a, b in zip(clock, clock[1:])))), rollout, ref_logps, logps, norm


def adamw(model, lr=0.0):
    """0: a whole step, and the weights stay."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)


def time_both(args):
    """Both ways in turn, --repeats times, and a check that they agree."""
    model, (usual, ours) = build(args)
    advantages = torch.randn(args.prompts * args.num_generations, device=DEVICE)
    optimizer = adamw(model)
    seconds, differences, norms = {usual: [], ours: []}, [], []
    for repeat in range(-1, args.repeats):
        mine, rollout, *our_logps, our_norm = timed_step(ours, optimizer, advantages)
        theirs, _, *their_logps, their_norm = timed_step(usual, optimizer, advantages, rollout)
        if repeat >= 0:  # the first step touches memory, and AdamW's, for the first time
            seconds[ours].append(mine)
            seconds[usual].append(theirs)
        differences += [(a - b).abs().max().item() for a, b in zip(our_logps, their_logps)]
        norms.append(abs(our_norm / their_norm - 1))
    logps_bar, norm_bar = (0.1, 0.05) if args.full else (1e-4, 1e-3)  # bf16 keeps 3 digits
    assert max(differences) < logps_bar, f"the two ways differ by {max(differences):.2g} in log-probability"
    assert max(norms) < norm_bar, f"the norms of the gradient differ by a factor of 1 + {max(norms):.2g}"
    print("| phase | usual way, s | ours, s | ratio |\n|---|--:|--:|--:|")
    for name, phases in [*((phase, [phase]) for phase in PHASES), ("**whole step**", PHASES)]:
        a, b = (statistics.median(sum(step[phase] for phase in phases) for step in seconds[way])
                for way in (usual, ours))
        print(f"| {name} | {a:.2f} | {b:.2f} | {a / b:.1f}x |")
    print(f"\nMedians of {args.repeats} in turn after one to warm up. Largest difference: log-probability "
          f"{max(differences):.1g}, gradient norm {max(norms):.1g} (relative).")


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
        rollout, advantages = written(args)
        forget_peak()
        before = held()
        ways[args.way == "ours"].update(rollout, advantages, rollout.sampling_logps)
        return print(f"{held(peak=True) - before:.0f}")
    print("| memory of the update, MiB | least | | | most | ratio |\n|---|--:|--:|--:|--:|--:|")
    for flag, values, least in [("num_generations", "2 4 8 16", "--prompts 1"),
                                ("prompts", "1 2 4 8", "--num_generations 2")]:
        for way in "usual", "ours":
            fixed = [*least.split(), "--way", way, f"--{flag}"]
            peaks = [part("memory", *fixed, value) for value in values.split()]
            ratio = f"{int(peaks[-1]) / int(peaks[0]):.2f}" if all(map(str.isdigit, peaks)) else ""
            print(f"| {way}, {flag} {values} | {' | '.join(peaks)} | {ratio} |", flush=True)


def program(args):
    """-> the program as --preset sat runs it on one GPU"""
    model = build_model(shape(args), torch.bfloat16)
    master = build_model(shape(args), device="cpu" if args.cpu_offload else DEVICE)
    gv.refresh(model, master)
    way = Ours(model, copy.deepcopy(model).requires_grad_(False), args, settings(args, gradient_checkpointing=True),
               master)
    gv.checkpoint_layers(model)
    return way


def program_step(args):
    way, steps = program(args), []
    optimizer, (_, advantages) = adamw(way.master, 1e-6), written(args)
    for repeat in range(-1, args.repeats):
        if repeat == 0:
            forget_peak()
        steps.append(timed_step(way, optimizer, advantages)[0])
    seconds = {name: statistics.median(step[name] for step in steps[1:]) for name in PHASES}
    seconds["**whole step**"] = statistics.median(sum(step.values()) for step in steps[1:])
    print(f"| {args.prompts} x {args.num_generations} x {args.completion_length} tokens | |\n|---|--:|")
    for name, value in seconds.items():
        print(f"| {name}, s | {value:.2f} |")
    print(f"| peak memory, GB | {held(peak=True) * 2**20 / 1e9:.1f} |")


def decode(args):
    model = build_model(shape(args), DTYPE[args.full])
    ours = Ours(copy.deepcopy(model), model, args, settings(args))
    usual = UsualWay(build_model(shape(args), DTYPE[args.full]), None, args, ours.passes)
    tokens = args.prompts * args.num_generations * args.completion_length
    print("| completion tokens per second | |\n|---|--:|")
    for name, way, one_step in [("with CUDA graphs", ours, gv.Decoder.step), ("without", ours, gv.Decoder.forward),
                                ("`generate`", usual, None)]:
        gv.Decoder.step = one_step
        way.rollout()
        start = gv.now()
        way.rollout()
        print(f"| {name} | {tokens / (gv.now() - start):.0f} |", flush=True)


def precision(args):
    """The sampler's log-probabilities of its own samples against those that are trained, and float32's."""
    way = program(args)
    rollout = way.rollout()
    print("| the sampler's log-probabilities, nats per token | mean difference | largest |\n|---|--:|--:|")
    for name, policy in ("those that are trained", way.policy), ("those of the float32 weights", way.master):
        if policy is way.master:
            gv.fast_vision(policy.model.to(DEVICE))
        x = (rollout.sampling_logps - gv.score_rollout(policy, way.passes, rollout, way.cfg)).abs()   # (N, C)
        print(f"| from {name} | {x.mean():.4f} | {x.max():.3f} |", flush=True)


def long_completion(args):
    """Memory of an update by one completion, beyond what is held, and its time."""
    if args.inside:
        cfg = settings(args, gradient_checkpointing=args.way == "ours")
        model = build_model(shape(args), DTYPE[args.full])
        way = Ours(model, model, args, cfg)
        if cfg.gradient_checkpointing:
            gv.checkpoint_layers(model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        forget_peak()
        before, start, (rollout, advantages) = held(), gv.now(), written(args)
        way.update(rollout, advantages, rollout.sampling_logps)
        return print(f"{(held(peak=True) - before) * 2**20 / 1e9:.2f} | {gv.now() - start:.1f}")
    is_default = args.completion_length == SIZES[args.full]["completion_length"]
    length = 8192 if is_default else args.completion_length
    print(f"| one completion of {length} tokens | beyond what is held, GB | s |\n|---|--:|--:|")
    for name, way in ("with checkpointing", "ours"), ("without", "usual"):
        found = part("long", "--prompts", "1", "--num_generations", "1", "--completion_length", str(length),
                     "--way", way)
        print(f"| {name} | {found} |", flush=True)


PARTS = dict(time=time_both, memory=update_memory, program=program_step, decode=decode, precision=precision,
             long=long_completion)
IN_PIECES = ("memory", "long")  # parts that start a process for each of their numbers themselves


# glibc would keep freed memory for itself; told so, it gives back at once whatever is above 64 KiB
RETURNING = dict(MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")


def fresh(script, *flags, **environment):
    """Run a script in a process of its own -> what it prints, or why it failed."""
    command = [sys.executable, script, *flags]
    child = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    return child.stdout.strip() if child.returncode == 0 else f"failed: {child.stderr.strip()[-300:]}"


def part(name, *flags):
    environment = RETURNING if name in IN_PIECES else {}  # which would cost time
    return fresh(__file__, *sys.argv[1:], "--inside", "--parts", name, *flags, **environment)


def machine(threads):
    """The last line of a report: where, with what, and how to run it again."""
    device = f"{platform.machine()}, {threads} of {os.cpu_count()} cores"
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else device
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"{device}; {versions}; `python bench/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}`"


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
