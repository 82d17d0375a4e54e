"""What a run will hold on each device and on the disk, from the model's config.json alone: no weights are loaded.

    python bench/plan.py --preset sat                           # Qwen2-VL-2B on one GPU
    python bench/plan.py --preset vision-r1 --num_processes 8   # every flag of recipes.py is taken
    python bench/plan.py --check                                # beside measured growth, on the CPU

The worst case is estimated: prompts of --max_prompt_length, nearly all image, and completions of full length.
Python, the data and a GPU's own 1 to 2 GB come on top. What autograd keeps for the backward is counted on
small copies of the model, with one layer and with two, for a few tokens and for more: it grows in proportion.
"""
import argparse
import copy
import itertools
import json
import math
import sys
import tempfile
from types import SimpleNamespace

import torch
import transformers
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForImageTextToText

import step  # bench/step.py, which also puts the folder of grpo_vision.py on the path
import grpo_vision as gv
import recipes

TEXT = dict(vocab_size=151936, num_attention_heads=16, num_key_value_heads=2, hidden_size=2048)
WINDOWS = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)
MODELS = {  # the published config.json of each, as far as shapes go: family, text, vision
    "Qwen/Qwen2-VL-2B": ("qwen2_vl", *step.QWEN2_VL_2B),
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        "qwen2_5_vl", dict(intermediate_size=11008, num_hidden_layers=36), WINDOWS | dict(out_hidden_size=2048)),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        "qwen2_5_vl", dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                           num_attention_heads=28, num_key_value_heads=4),
        WINDOWS | dict(out_hidden_size=3584)),
    "Qwen/Qwen3-VL-2B-Instruct": (
        "qwen3_vl", dict(intermediate_size=6144, num_hidden_layers=28, num_key_value_heads=8, head_dim=128),
        dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, out_hidden_size=2048,
             patch_size=16, deepstack_visual_indexes=[5, 11, 17]))}
GB, F32 = 1e9, 4


def parse_args(argv=None):
    """-> args of the plan's own, and grpo_vision's Config."""
    parser = argparse.ArgumentParser(description="Memory plan; see the head of this file.")
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="beside measured growth, in six cases")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args(argv)
    return args, gv.parse_config(rest, recipes.Config)


def read_config(path):
    if path not in MODELS:
        return AutoConfig.from_pretrained(path)
    family, text, vision = MODELS[path]
    return AutoConfig.for_model(family, text_config=TEXT | text, vision_config=dict(vision),
                                tie_word_embeddings="7B" not in path)


def shrunk(config, layers, depth, vocab):
    """The config of a model of the same width, but with few layers, vision blocks and words."""
    config = copy.deepcopy(config)
    config.text_config.num_hidden_layers, config.vision_config.depth = layers, depth
    config.text_config.vocab_size, config.text_config.layer_types = vocab, ["full_attention"] * layers
    config.vision_config.deepstack_visual_indexes = [0]
    config.vision_config.fullatt_block_indexes = list(range(depth))
    return config


def kept(model, function, *arguments):
    """-> bytes that autograd keeps for the backward of function(model, *arguments), the weights excepted."""
    weights, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    def pack(x):
        storage = x.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes() * (storage.data_ptr() not in weights)
        return x.detach()  # x itself could hold its own graph
    with saved_tensors_hooks(pack, lambda x: x):
        result = function(model, *arguments)
    assert len(result)  # it was alive, and with it the graph, until all was counted
    return sum(found.values())


# The bytes of `encode` and `score` are linear in these terms. seen: what the rows attend to, added up.
encoding = lambda layers, depth, tokens, patches: [
    1, layers, depth, tokens, layers * tokens, patches, depth * patches]
scoring = lambda layers, completion, seen: [1, layers, completion, layers * completion, layers * seen]


def activations(config, dtype):
    """-> two functions, of the arguments of `encoding` and of `scoring`, to bytes. --freeze needs less."""
    cfg, encoded, scored = gv.Config(num_generations=1, gradient_checkpointing=False), [], []
    for layers, depth in (1, 1), (2, 1), (1, 2):
        model = gv.fast_vision(step.build_model(shrunk(config, layers, depth, 32), dtype, "cpu"))
        for tokens, image in (33, 4), (97, 4), (97, 16):
            prompts = step.build_pass(model, 1, tokens, (2, 2 * image))
            found = kept(model, gv.encode, prompts)
            encoded.append([*encoding(layers, depth, tokens - 1, 4 * image), found])
            kv = [x.detach().requires_grad_() for x in gv.encode(model, prompts)]
            for C in 64, 128:
                ids = torch.ones(1, C, dtype=torch.long)
                found = kept(model, gv.score, prompts, kv, torch.tensor([0]), ids, ids.bool(), cfg)
                scored.append([*scoring(layers, C, tokens - 1 + C), found])
    def fitted(points, terms):
        points = torch.tensor(points).double()
        weights = torch.linalg.lstsq(points[:, :-1], points[:, -1:]).solution[:, 0]
        return lambda *arguments: float(weights @ torch.tensor(terms(*arguments)).double())
    return fitted(encoded, encoding), fitted(scored, scoring)


def make_plan(args, cfg, on_gpu=True):
    """-> rows of (what, bytes in the rollout, bytes in the update), their two sums, number of parameters, and
    bytes by name elsewhere: in CPU memory, on the disk."""
    config, n = read_config(cfg.model_name_or_path), args.num_processes
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    count = lambda *modules: sum(p.numel() for module in modules for p in module.parameters())
    layers, blocks = model.model.language_model.layers, model.model.visual.blocks
    total, tower, largest = count(model), count(model.model.visual), max(p.numel() for p in model.parameters())
    trained = total - {"none": 0, "vision": tower, "llm": total - tower}[cfg.freeze]
    sharded, compute = n > 1, 2 if on_gpu else 4  # bytes of a number
    V, H = config.text_config.vocab_size, config.text_config.hidden_size
    B, C = -(-cfg.prompts_per_step // n), cfg.max_completion_length
    G, beta = (1, 0) if cfg.algorithm == "sft" else (cfg.num_generations, cfg.beta)
    pixels = (2 * config.vision_config.patch_size)**2  # of an image token
    N, n_pass = B * G, min(B, max(1, cfg.encode_tokens // cfg.max_prompt_length))
    P, K = cfg.max_prompt_length - 1, max(1, min(n_pass * G, cfg.score_tokens // C))
    image = int(min(P - 2, (cfg.max_pixels or 1e9) // pixels))
    tokens, patches, width = n_pass * P, n_pass * 4 * image, layers[0].self_attn.k_proj.out_features
    here = F32 * (0 if cfg.cpu_offload else 1) / n  # bytes on this device of a float32 number
    reused = here * trained * (on_gpu and not sharded)  # sums of gradients keep their memory
    rows = [("weights, float32", here * total, here * total), ("gradients, float32", reused, here * trained),
            ("AdamW's two moments", 2 * here * trained, 2 * here * trained)]
    copies = int(sharded or on_gpu) + (beta > 0)
    rows.append((f"sampler, reference: {copies} copies", copies * compute * total, copies * compute * total))
    if on_gpu and not sharded:
        rows.append(("the largest weight's gradient, and in float32", 0, (compute + F32) * largest))
    if sharded:  # the root (embedding, head, patch embedding) stays while two layers take turns
        root, layer = total - count(*layers, *blocks), max(map(count, [*layers, *blocks]))
        gathered = (compute + F32) * root + (2 * compute + F32) * layer  # gradients are float32
        rows.append(("layers gathered by FSDP2", 0, gathered))
    cache = 2 * compute * width * ((len(layers) + 1) * N * (P + C + 8) + len(layers) * B * P)
    rows.append((f"keys and values of {N} completions", cache, 0))
    rows.append(("log-probabilities while sampling", (2 * F32 + 8) * N * V, 0))
    encode, score = activations(config, torch.bfloat16 if on_gpu else torch.float32)
    piece = min(2048, K * C)
    if cfg.gradient_checkpointing:  # the input of each layer, and all of the one that is recomputed
        vision = patches * len(blocks) * blocks[0].norm1.weight.shape[0] * compute
        encoded, scored = tokens * len(layers) * H * compute + vision, K * C * len(layers) * H * compute
        again = max(score(1, K * C, K * (P + C)), encode(1, 1, tokens, patches))
        logits = F32 * V * 3 * piece
    else:
        encoded, again = encode(len(layers), len(blocks), tokens, patches), 0
        scored, logits = score(len(layers), K * C, K * (P + C)), F32 * V * (K * C + 2 * piece)
    leaves = 2 * len(layers) * width * tokens * (2 * F32 + compute % 4)
    rows += [(f"graph of {n_pass} prompts, {image} image tokens each", 0, encoded),
             ("their keys and values, and gradients", 0, leaves),
             (f"graph of a chunk, {K} x {C} tokens", 0, scored),
             ("a layer that is recomputed", 0, again), ("log-probabilities", 0, logits)]
    models = 1 + min(math.ceil(cfg.max_steps / cfg.save_steps), cfg.save_total_limit or math.inf)
    state = F32 * (total + 2 * trained)
    at_end = models * compute * total + state
    elsewhere = {"disk, when the run has ended": at_end, "disk, while it saves": at_end + state}
    if cfg.cpu_offload:
        pinned = 0 if sharded else 2 ** math.ceil(math.log2(F32 * largest))  # rounded up to a power of two
        elsewhere["CPU memory of all processes: weights, gradients, AdamW"] = state + F32 * trained + pinned
    return rows, [sum(row[i] for row in rows) for i in (1, 2)], total, elsewhere


def measure(cfg):
    """In a fresh process: print what rollout and update hold at their peaks beyond the start, in bytes."""
    before, model = step.held(), step.build_model(read_config(cfg.model_name_or_path))
    sizes = SimpleNamespace(prompts=cfg.prompts_per_step, image_size=504)
    way = step.Ours(model, copy.deepcopy(model).requires_grad_(False), sizes, cfg)
    optimizer = step.adamw(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # from here on AdamW has its state
    optimizer.zero_grad()
    step.forget_peak()
    rollout = way.rollout()
    peaks = [step.held(peak=True) - before]
    if cfg.gradient_checkpointing:
        gv.checkpoint_layers(model)
    step.forget_peak()
    way.update(rollout, torch.ones(len(rollout.completion_ids)), way.reference(rollout))
    optimizer.step()
    print(json.dumps([peak * 2**20 for peak in (*peaks, step.held(peak=True) - before)]))


def check():
    print("| measured in a fresh process | rollout, GB | estimated | | update, GB | estimated | |\n"
          "|---|--:|--:|--:|--:|--:|--:|")
    worst = 0
    for name, checkpointing in itertools.product([*MODELS][:2] + [*MODELS][3:], ("true", "false")):
        with tempfile.TemporaryDirectory() as folder:
            config = shrunk(read_config(name), 3, 4, 16384)
            config.save_pretrained(folder)
            pixels = 324 * (2 * config.vision_config.patch_size)**2
            flags = f"""--preset sat --model_name_or_path {folder} --prompts_per_step 2 --max_prompt_length 350
                --max_pixels {pixels} --max_completion_length 96 --score_tokens 1024
                --gradient_checkpointing {checkpointing}""".split()
            _, planned, *_ = make_plan(*parse_args(flags), on_gpu=False)
            found = json.loads(step.fresh(__file__, *flags, "--measure", **step.RETURNING).splitlines()[-1])
        worst = max(worst, *(abs(plan / measured - 1) for plan, measured in zip(planned, found)))
        cells = [f"{measured / GB:.2f} | {plan / GB:.2f} | {plan / measured - 1:+.0%}"
                 for plan, measured in zip(planned, found)]
        print(f"| {name}'s width, checkpointing {checkpointing} | {' | '.join(cells)} |", flush=True)
    print(f"\nlargest deviation: {worst:.1%}. {step.machine(threads=1)}")
    sys.exit(worst > 0.15)


def main():
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    gv.Accelerator(cpu=True)
    args, cfg = parse_args()
    if args.check or args.measure:
        return check() if args.check else measure(cfg)
    rows, peaks, total, elsewhere = make_plan(args, cfg)
    print(f"{cfg.model_name_or_path}: {total / 1e6:.0f}M parameters; on each of {args.num_processes} GPUs, GB:\n\n"
          f"| {'':45} | rollout | update |\n|-{'-' * 45}-|--:|--:|")
    for what, rollout, update in [*rows, ("**together**", *peaks)]:
        print(f"| {what:45} | {rollout / GB:7.2f} | {update / GB:6.2f} |")
    print("", *(f"{what}: {size / GB:.1f} GB" for what, size in elsewhere.items()), sep="\n")


if __name__ == "__main__":
    main()
