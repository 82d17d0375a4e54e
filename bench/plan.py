"""What a run will hold in memory on each device, from the model's config.json alone: nothing is loaded.

    python bench/plan.py --preset sat --num_processes 1                    # Qwen2-VL-2B on one GPU
    python bench/plan.py --preset sat --num_processes 4 --freeze vision    # every flag of grpo_vision.py
    python bench/plan.py --model_name_or_path data/toy/base --device cpu --prompt_tokens 100
    python bench/plan.py --check                           # beside measured growth, on the CPU; 10 minutes

The worst case is planned: prompts of --prompt_tokens (default: --max_prompt_length), as many of them image
tokens as --max_pixels allows; completions of full length while sampling, and in the update of the length
whose chunk is largest (many short rows can take more than few long ones, as each needs the prompt's keys
and values). Rollout and update each have a peak, the reference's scoring stays below the update's, and a
step's peak is the larger one. Python and the data come on top, and a GPU's own 1 to 2 GB.

Activations are what autograd saves for the backward, counted tensor by tensor in `Activations`. Only the
float32 ones are checked by measurement, on CPU; those of a GPU follow the same count in bf16.
"""
import argparse
import copy
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

import step  # bench/step.py, which also puts the folder of grpo_vision.py on the path
import grpo_vision as gv

# the published config.json of Qwen2-VL-2B, as far as shapes go
QWEN2_VL_2B = dict(
    text_config=dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                     num_attention_heads=12, num_key_value_heads=2),
    vision_config=dict(depth=32, embed_dim=1280, hidden_size=1536, num_heads=16, mlp_ratio=4),
    tie_word_embeddings=True)
GB, F32 = 1e9, 4


def parse_args(argv=None):
    """-> args of the plan's own, and grpo_vision's Config."""
    parser = argparse.ArgumentParser(description="Memory plan; see the head of this file. All flags of "
                                                 "grpo_vision.py are taken as well.")
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cpu for --preset toy, else cuda")
    parser.add_argument("--prompt_tokens", type=int, help="default: --max_prompt_length")
    parser.add_argument("--check", action="store_true", help="beside measured growth, in four shapes")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # a child of --check
    args, rest = parser.parse_known_args(argv)
    cfg = gv.parse_config(rest)
    args.device = args.device or ("cpu" if cfg.preset == "toy" else "cuda")
    args.prompt_tokens = args.prompt_tokens or cfg.max_prompt_length
    if cfg.attn_implementation == "eager":
        gv.fail("--attn_implementation eager: only sdpa and flash_attention_2 are planned")
    return args, cfg


def read_config(path):
    if path == "Qwen/Qwen2-VL-2B":
        return Qwen2VLConfig(**QWEN2_VL_2B)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        gv.fail(f"cannot read the config of {path}: {str(error).strip().splitlines()[0]}")


@dataclass
class Count:
    """Numbers of parameters."""
    total: int
    trained: int
    layers: int      # of the language model, without embedding
    largest: int     # decoder layer or vision block, which FSDP gathers as one
    vision: int
    embedding: int   # V * H; also the head, if tied


def count_parameters(config, freeze="none"):
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config)
    count = lambda module: sum(p.numel() for p in module.parameters())
    language, vision = model.model.language_model, model.model.visual
    embedding, total = language.embed_tokens.weight.numel(), count(model)
    units = [*language.layers, *vision.blocks]
    frozen = {"none": 0, "vision": count(vision), "llm": total - count(vision)}[freeze]
    return Count(total, total - frozen, count(language) - embedding, max(map(count, units)), count(vision),
                 embedding)


@dataclass
class Activations:
    """Bytes that autograd saves in one forward, by the tensors that each operation keeps for its backward.

    A norm keeps its input in float32 and the normalised input; a linear layer its input; attention its
    queries, keys, values and output; SwiGLU gate, silu(gate) and up; quick_gelu x, sigmoid and product. A
    frozen weight needs no input for its gradient, so linear layers and norms then keep less. Autocast casts
    the input of each linear layer anew: three copies for q, k and v, two for gate and up.
    """
    config: Qwen2VLConfig
    cfg: gv.Config
    compute: int      # bytes of a number in the computation
    autocast: bool

    def layers(self, tokens, keys, mask=0):
        """The decoder layers over `tokens`; keys: numbers in a layer's keys, mask: in its attention mask."""
        text, c, trained = self.config.text_config, self.compute, self.cfg.freeze != "llm"
        H, I = text.hidden_size, text.intermediate_size
        head = H // text.num_attention_heads
        residual = F32 if self.autocast else c
        norm = F32 + trained * residual
        linear_inputs = trained * c * (5 if self.autocast else 2)                    # of q k v, of gate up
        per_token = (H * (2 * norm + linear_inputs) + 2 * c * H + c * I * (3 + trained)  # 2 c H: q, output
                     + 2 * residual * head)                                          # cos and sin
        return (text.num_hidden_layers * (tokens * per_token + 2 * c * keys + c * mask)
                + tokens * H * norm)                                                 # the last norm

    def vision(self, patches):
        if self.cfg.freeze == "vision":
            return 0
        tower, c = self.config.vision_config, self.compute
        E, ratio, norm = tower.embed_dim, tower.mlp_ratio, F32 if self.autocast else self.compute
        # two norms and what follows them; qkv, rotated q and k, output twice; the MLP
        block = E * (2 * norm + 2 * c + 3 * c + 4 * c + 3 * ratio * c)
        merger = E * (norm + 3 * c)
        return patches * (tower.depth * block + merger)

    def encode(self, prompt_tokens, image_tokens):
        """Image tower and prompt."""
        text = self.config.text_config
        kv = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
        return self.vision(4 * image_tokens) + self.layers(prompt_tokens, prompt_tokens * kv)

    def score(self, prompt_tokens, rows, C):
        """R completions of C tokens behind the prompt, up to the head. Under sdpa, the causal mask over
        prompt and completion makes transformers repeat keys and values for each query head."""
        text = self.config.text_config
        width, length = text.hidden_size, prompt_tokens + C
        if self.cfg.attn_implementation != "sdpa":
            width = width // text.num_attention_heads * text.num_key_value_heads
        mask = rows * C * length if self.cfg.attn_implementation == "sdpa" else 0
        return (self.layers(rows * C, rows * length * width, mask)
                + rows * C * text.hidden_size * self.compute)                        # the head's input


@dataclass
class Plan:
    rows: list       # what, bytes in the rollout, bytes in the update, what lowers it
    peaks: list      # sums of the two
    disk: int        # bytes of a checkpoint
    count: Count
    length: int      # of the completions whose chunk is the largest


def make_plan(args, cfg):
    config, n = read_config(cfg.model_name_or_path), args.num_processes
    text, count = config.text_config, count_parameters(config, cfg.freeze)
    bf16, single = args.device == "cuda", n == 1
    compute, autocast = 2 if bf16 else 4, bf16 and single
    V, H = text.vocab_size, text.hidden_size
    P, B = args.prompt_tokens - 1, -(-cfg.prompts_per_step // n)
    N, G, C = B * cfg.num_generations, cfg.num_generations, cfg.max_completion_length
    image_tokens = min(args.prompt_tokens - 3, (cfg.max_pixels or 1e9) // 28**2)
    kv = 2 * text.num_hidden_layers * text.num_key_value_heads * (H // text.num_attention_heads)  # a token's

    rows = [("weights, float32", F32 * count.total / n, F32 * count.total / n, "--num_processes"),
            ("gradients", 0, F32 * count.trained / n, "--num_processes, --freeze"),
            ("AdamW's two moments", 2 * F32 * count.trained / n, 2 * F32 * count.trained / n,
             "--num_processes, --freeze")]
    sampler = 0 if single and not bf16 else compute * count.total
    rows.append(("sampler", sampler, sampler, ""))
    if cfg.beta > 0:
        rows.append(("reference", compute * count.total, compute * count.total, "--beta 0"))
    if not single:  # the root (embedding, head, patch embedding) stays while two layers take turns
        root = count.embedding * (1 if config.tie_word_embeddings else 2)
        rows.append(("layers gathered by FSDP2", 0, compute * (root + 2 * count.largest), ""))
    elif autocast:  # once in the graph of the prompt, once in that of a chunk
        vision = 0 if cfg.freeze == "vision" else count.vision
        rows.append(("autocast's bf16 weights", 0, 2 * (vision + 2 * count.layers + count.embedding),
                     "--num_processes 2 (FSDP2 gathers layers one by one)"))

    # rollout: the cache of all rows, that of the prompts before they are repeated, one layer on its way
    cache = compute * kv * (N * (P + C) * (1 + 1 / text.num_hidden_layers) + B * P)
    rows.append((f"keys and values of {N} rows", cache, 0,
                 "--prompts_per_step, --num_generations, --max_completion_length"))
    rows.append(("logits while sampling", 5 * F32 * N * V, 0, "--prompts_per_step, --num_generations"))

    # update: the prompt's graph stays while chunk after chunk comes and goes
    saved = Activations(config, cfg, compute, autocast)
    rows.append((f"graph of a prompt, {image_tokens:.0f} image tokens", 0, saved.encode(P, image_tokens),
                 "--max_pixels, --max_prompt_length, --freeze vision"))
    rows.append(("prompt's keys and values: leaves, gradients", 0, kv * P * (2 * F32 + (compute % 4)),
                 "--max_prompt_length"))
    # log_softmax holds three arrays at once, forward and backward; later, one and the head's gradient
    logits = lambda tokens: F32 * V * max(3 * tokens, tokens + H)
    chunks = [(R, min(C, cfg.score_tokens // R) or 1) for R in range(2, G + 1)] + [(1, C)]
    R, C = max(chunks, key=lambda chunk: saved.score(P, *chunk) + logits(math.prod(chunk)))
    rows.append((f"graph of a chunk, {R} x {C} tokens", 0, saved.score(P, R, C), "--score_tokens"))
    rows.append((f"logits of a chunk, {R * C} x {V}", 0, logits(R * C), "--score_tokens"))
    if autocast:  # torch's AdamW takes all weights at once on a GPU, when the graphs are gone
        passing = sum(row[2] for row in rows if row[0].startswith(("graph", "logits", "autocast", "prompt")))
        if (more := F32 * count.trained - passing) > 0:
            rows.append(("AdamW on its way, beyond these graphs", 0, more, "--freeze"))
    peaks = [sum(row[i] for row in rows) for i in (1, 2)]
    return Plan(rows, peaks, F32 * count.total + 2 * F32 * count.trained, count, C)


def plan_largest_stage(args, cfg):
    """-> Plan of the stage with the highest peak, of which there is one unless --stages says otherwise."""
    stages = [dataclasses.replace(cfg, max_completion_length=length, num_generations=generations)
              for _, length, generations in gv.stages_of(cfg)]
    return max((make_plan(args, stage) for stage in stages), key=lambda plan: max(plan.peaks))


def show(args, cfg):
    plan = plan_largest_stage(args, cfg)
    rows, count = plan.rows, plan.count
    print(f"{cfg.model_name_or_path}: {count.total / 1e6:.0f}M parameters, {count.trained / 1e6:.0f}M "
          f"trained; on each of {args.num_processes} x {args.device}, GB:\n")
    width = max(len(row[0]) for row in rows)
    print(f"| {'':{width}} | rollout | update | lowered by |\n|-{'-' * width}-|--:|--:|---|")
    for what, rollout, update, flags in rows:
        print(f"| {what:{width}} | {rollout / GB:7.2f} | {update / GB:6.2f} | {flags} |")
    rollout, update = plan.peaks
    print(f"| {'**together**':{width}} | {rollout / GB:7.2f} | {update / GB:6.2f} | |\n\n"
          f"peak {max(rollout, update) / GB:.1f} GB; a checkpoint takes {plan.disk / GB:.1f} GB on disk "
          f"(--save_steps, --save_total_limit)")


# ---- Beside measurement ----------------------------------------------------------------------------------

def shape(vocab, hidden, intermediate, layers, heads, kv_heads, vision_hidden, vision_layers):
    rotary = hidden // heads // 16
    return dict(
        model_type="qwen2_vl", tie_word_embeddings=True, image_token_id=vocab - 4, video_token_id=vocab - 3,
        vision_start_token_id=vocab - 2, vision_end_token_id=vocab - 1,
        text_config=dict(vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate,
                         num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                         rope_parameters=dict(rope_type="default", rope_theta=1e6,
                                              mrope_section=[2 * rotary, 3 * rotary, 3 * rotary])),
        vision_config=dict(depth=vision_layers, embed_dim=vision_hidden, hidden_size=hidden, num_heads=4,
                           mlp_ratio=4))


CHECKS = {
    "large vocabulary, KL": (
        shape(65536, 512, 1024, 4, 8, 2, 256, 4),
        "--prompt_tokens 300 --max_completion_length 128 --score_tokens 1024 --num_generations 16"),
    "long prompt, vision frozen, no KL": (
        shape(8192, 640, 3072, 10, 10, 2, 320, 4),
        "--prompt_tokens 1000 --max_completion_length 64 --score_tokens 512 --num_generations 16 --beta 0 "
        "--freeze vision"),
    "many rows, many heads": (
        shape(4096, 512, 1024, 6, 8, 8, 256, 2),
        "--prompt_tokens 700 --max_completion_length 32 --score_tokens 128 --num_generations 64"),
    "large image": (
        shape(8192, 384, 1536, 4, 6, 2, 512, 12),
        "--prompt_tokens 700 --max_completion_length 64 --score_tokens 256 --num_generations 8"),
}


def measure(args, cfg):
    """In a fresh process: print what rollout and update hold at their peaks beyond the start, in bytes."""
    torch.manual_seed(0)
    config, before = read_config(cfg.model_name_or_path), step.held()
    with torch.device(args.device):
        model = gv.fast_layers(Qwen2VLForConditionalGeneration(config)).eval()
    if cfg.freeze != "none":
        {"vision": model.model.visual, "llm": model.model.language_model}[cfg.freeze].requires_grad_(False)
    single = args.device == "cpu"
    plain = lambda: copy.deepcopy(model).to(torch.float32 if single else torch.bfloat16).requires_grad_(False)
    sampler, reference = model if single else plain(), plain() if cfg.beta > 0 else None
    V = config.text_config.vocab_size
    suppressed = torch.arange(V, device=args.device) >= V - 4
    suppressed[0] = True  # the end token: completions have full length
    policy = gv.Policy(model, 1.0, suppressed, autocast=not single)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # from here on AdamW has its state
    optimizer.zero_grad()
    image_tokens = int(min(args.prompt_tokens - 3, (cfg.max_pixels or 1e9) // 28**2))
    ids = [V - 2, *[V - 4] * image_tokens, V - 1]
    ids = torch.tensor([ids + [1] * (args.prompt_tokens - len(ids))], device=args.device)
    grid = torch.tensor([[1, 2, 2 * image_tokens]], device=args.device)
    positions, _ = model.model.get_rope_index(ids, (ids == V - 4).int(), image_grid_thw=grid)
    prompts = [gv.Prompt("", ids, positions, torch.randn(4 * image_tokens, 1176, device=args.device), grid)
               for _ in range(cfg.prompts_per_step)]
    if cfg.freeze == "vision":
        with torch.no_grad():
            for prompt in prompts:
                features = sampler.model.get_image_features(prompt.pixel_values, grid).pooler_output
                prompt.image_features = torch.cat(features)
    step.forget_peak()
    rollout = gv.sample(sampler, prompts, cfg.num_generations, cfg.max_completion_length, 1.0, suppressed,
                        [0])
    peaks = [step.held(peak=True) - before]
    rollout.completion_mask[:, make_plan(args, cfg).length:] = False
    step.forget_peak()
    ref_logps = None
    if reference:
        reference = gv.Policy(reference, 1.0, suppressed)
        ref_logps = gv.score_rollout(reference, prompts, rollout, cfg)
    N = len(rollout.completion_ids)
    gv.update(policy, prompts, rollout, torch.randn(N, device=args.device),
              torch.full((N,), 1 / N, device=args.device), ref_logps, None, cfg)
    optimizer.step()
    print(json.dumps([peak * 2**20 for peak in (*peaks, step.held(peak=True) - before)]))


def check():
    print("| measured in a fresh process | parameters | rollout, GB | planned | | update, GB | planned | |\n"
          "|---|--:|--:|--:|--:|--:|--:|--:|")
    worst = 0
    for name, (config, flags) in CHECKS.items():
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(config))
            flags = ["--model_name_or_path", folder, "--prompts_per_step", "1", "--device", "cpu",
                     *flags.split()]
            plan = make_plan(*parse_args(flags))
            child = subprocess.run([sys.executable, __file__, *flags, "--measure"], check=True, text=True,
                                   stdout=subprocess.PIPE, env=step.RETURNING)
        cells = []
        for planned, measured in zip(plan.peaks, json.loads(child.stdout.splitlines()[-1])):
            off = planned / measured - 1
            worst = max(worst, abs(off))
            cells.append(f"{measured / GB:.2f} | {planned / GB:.2f} | {off:+.0%}")
        print(f"| {name} | {plan.count.total / 1e6:.0f}M | {' | '.join(cells)} |", flush=True)
    print(f"\nlargest deviation: {worst:.1%}. {step.machine(threads=1)}")
    return worst


def main():
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    args, cfg = parse_args()
    if args.check:
        sys.exit(check() > 0.15)
    (measure if args.measure else show)(args, cfg)


if __name__ == "__main__":
    main()
