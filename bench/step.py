"""One GRPO step, timed: this program against the usual way, on the same weights in the same process.

    python bench/step.py                        # 47M parameters, 324 image tokens, G = 8, 128 tokens, on the CPU
    python bench/step.py --num_generations 4 --image_size 252 --layers 4 --no_memory      # other sizes: see --help
    python bench/step.py --full                 # the 2.2B shape in bf16, random weights; needs a GPU
    python bench/step.py --trl                  # the step of TRL's GRPOTrainer as well

`--trl` needs an environment of its own (TRL wants Qwen2VLProcessor, and that wants torchvision); this one worked:

    pip install torch==2.12.1 torchvision==0.27.1 trl==1.16.0 transformers accelerate datasets pillow

The usual way, as in every trainer that we know, takes a group as G separate rows, each with its own copy of prompt and
image: `model.generate` on G rows, then a forward over prompt + completion of G rows for the reference, and the same
with a backward for the policy. It runs the stock modules. Both ways end with the same clipping and the same AdamW.
Completions have full length (the end token is suppressed), so that both do equal work; that it is equal is asserted:
both score the same completions, and the log-probabilities and the norm of the gradient must agree.

Memory of the update: its peak minus what the process held before (weights and gradients were there already), each
number from a fresh process, with --score_tokens 256: two completions of 128 at a time. The default of the program,
4096, would take all of G = 16 in one chunk, and this table would not show what the two-stage backward is for.

Sample output (2 shared cores):
@SAMPLE@
"""
import argparse
import copy
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent.parent))
import grpo_vision as gv

SHAPE = dict(vocab=8192, hidden=512, intermediate=2048, layers=8, heads=8, kv_heads=2,
             vision_hidden=320, vision_layers=8, vision_heads=8)                           # 47M parameters
FULL_SHAPE = dict(vocab=151936, hidden=1536, intermediate=8960, layers=28, heads=12, kv_heads=2,
                  vision_hidden=1280, vision_layers=32, vision_heads=16)                   # 2.2B, as Qwen2-VL-2B
SPECIAL = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]         # the last ids of the vocabulary
EOS, BETA, PHASES = 0, 0.04, ("rollout", "reference", "update")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = dict(prompts=1, num_generations=8, completion_length=128, image_size=504, text_tokens=56, repeats=3,
                 threads=os.cpu_count(), **SHAPE)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--score_tokens", type=int, help="tokens scored at a time; default 4096, in the memory part 256")
    parser.add_argument("--full", action="store_true", help="the shape of Qwen2-VL-2B in bf16, on a GPU")
    parser.add_argument("--trl", action="store_true", help="time TRL's GRPOTrainer too")
    parser.add_argument("--no_memory", action="store_true", help="leave the memory table out")
    parser.add_argument("--out", help="also write the printed tables to this file")
    parser.add_argument("--measure", choices=("usual", "ours"), help=argparse.SUPPRESS)  # the child of update_memory
    if parser.parse_known_args()[0].full:
        parser.set_defaults(**FULL_SHAPE)
    args = parser.parse_args()
    if args.full and not torch.cuda.is_available():
        parser.error("--full needs a GPU, and torch sees no CUDA device here")
    if args.image_size % 28 or args.text_tokens < 3:
        parser.error("--image_size must be a multiple of 28 (one image token), --text_tokens at least 3")
    return args


def build_model(args, device):
    """A Qwen2-VL of the given shape with random weights, stock modules."""
    first, rotary = args.vocab - len(SPECIAL), args.hidden // args.heads // 16
    config = Qwen2VLConfig(
        text_config=dict(vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.intermediate,
                         num_hidden_layers=args.layers, num_attention_heads=args.heads,
                         num_key_value_heads=args.kv_heads, max_position_embeddings=4096,
                         bos_token_id=None, eos_token_id=EOS, rope_parameters={"rope_type": "default", "rope_theta": 1e6,
                                          "mrope_section": [2 * rotary, 3 * rotary, 3 * rotary]}),
        vision_config=dict(depth=args.vision_layers, embed_dim=args.vision_hidden, num_heads=args.vision_heads,
                           mlp_ratio=4, hidden_size=args.hidden),
        image_token_id=first, video_token_id=first + 1, vision_start_token_id=first + 2, vision_end_token_id=first + 3,
        tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2VLForConditionalGeneration(config)
    return model.to(torch.bfloat16 if args.full else torch.float32).eval()


def build_prompt(args, model):
    """Random pixels and text: <|vision_start|>, image tokens, <|vision_end|>, words -> gv.Prompt."""
    grid, config = args.image_size // 14, model.config
    words = torch.randint(1, config.image_token_id, (args.text_tokens - 2,)).tolist()
    ids = [config.vision_start_token_id, *[config.image_token_id] * (grid // 2) ** 2, config.vision_end_token_id, *words]
    ids, grid_thw = torch.tensor([ids], device=model.device), torch.tensor([[1, grid, grid]], device=model.device)
    positions, _ = model.model.get_rope_index(ids, (ids == config.image_token_id).int(), image_grid_thw=grid_thw)
    return gv.Prompt("", ids, positions, torch.randn(grid * grid, 1176, device=model.device), grid_thw)


class Ours:
    """This program: image and prompt once per pass."""
    def __init__(self, model, reference, prompts, suppressed, args):
        self.model, self.prompts, self.suppressed = model, prompts, suppressed
        self.policy, self.frozen = (gv.Policy(gv.patch_embed_as_matmul(m), 1.0, suppressed) for m in (model, reference))
        self.cfg = gv.Config(num_generations=args.num_generations, max_completion_length=args.completion_length,
                             beta=BETA, score_tokens=args.score_tokens or gv.Config.score_tokens)

    def rollout(self):
        cfg = self.cfg
        return gv.sample(self.model, self.prompts, cfg.num_generations, cfg.max_completion_length, 1.0, self.suppressed, [EOS])

    def reference(self, rollout):
        return gv.score_rollout(self.frozen, self.prompts, rollout, self.cfg)

    def update(self, rollout, advantages, ref_logps):
        return gv.update(self.policy, self.prompts, rollout, advantages, ref_logps, None, self.cfg)[0]


class UsualWay:
    """G rows of prompt, image and completion, through the stock model; group by group when scoring."""
    def __init__(self, model, reference, prompts, suppressed, args):
        self.model, self.frozen, self.G, self.C = model, reference, args.num_generations, args.completion_length
        self.suppressed = suppressed.nonzero()[:, 0]  # a few ids
        self.groups = [self.rows(prompt) for prompt in prompts]

    def rows(self, prompt):
        ids = prompt.input_ids.repeat(self.G, 1)                                                        # (G, P)
        return dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=prompt.pixel_values.repeat(self.G, 1),
                    mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
                    image_grid_thw=prompt.image_grid_thw.repeat(self.G, 1))

    @torch.no_grad()
    def rollout(self):
        batch = {name: torch.cat([group[name] for group in self.groups]) for name in self.groups[0]}
        return self.model.generate(
            **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=self.C, min_new_tokens=self.C,
            suppress_tokens=self.suppressed.tolist(), eos_token_id=EOS, pad_token_id=EOS)

    def score(self, model, group, completion_ids):
        """One forward over prompt and completion; logits of the completion tokens only -> log-probs (G, C)."""
        batch = dict(group)
        for name, fill in (("input_ids", completion_ids), ("attention_mask", torch.ones_like(completion_ids)),
                           ("mm_token_type_ids", torch.zeros_like(completion_ids))):
            batch[name] = torch.cat([group[name], fill], 1)                                             # (G, P + C)
        logits = model(**batch, use_cache=False, logits_to_keep=self.C + 1).logits[:, :-1].float()      # (G, C, V)
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
        rows = zip(self.groups, *(x.split(self.G) for x in (rollout.completion_ids, rollout.completion_mask, advantages, ref_logps)))
        result = []
        for group, ids, mask, A, ref in rows:
            logps = self.score(self.model, group, ids)
            gv.grpo_loss(logps, logps.detach(), ref, A, mask, epsilon=0.2, epsilon_high=0.2, beta=BETA,
                         num_sequences=len(advantages))[0].backward()
            result.append(logps.detach())
        return torch.cat(result)


def build(args):
    """-> policy, (usual way, ours) and advantages (N,). Both ways hold the very same parameters, not copies."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(args, device)
    reference = copy.deepcopy(model).requires_grad_(False)
    for parameter in reference.parameters():  # the policy has moved away from it, so that the KL is not 0
        parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    prompts = [build_prompt(args, model) for _ in range(args.prompts)]
    suppressed = torch.arange(args.vocab, device=device) >= args.vocab - len(SPECIAL)                   # (V,)
    suppressed[EOS] = True
    twin = lambda m: copy.deepcopy(m, memo={id(p): p for p in m.parameters()})  # own modules, shared parameters
    ways = (UsualWay(model, reference, prompts, suppressed, args),
            Ours(twin(model), twin(reference), prompts, suppressed, args))
    return model, ways, torch.randn(args.prompts * args.num_generations, device=device)


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed_step(way, optimizer, advantages, rollout=None):
    """One step -> seconds of the three phases, and what it computed. rollout: score this one, not the one just drawn."""
    clock = [now()]
    drawn = way.rollout()
    rollout = drawn if rollout is None else rollout
    clock.append(now())
    ref_logps = way.reference(rollout)                                                                  # (N, C)
    clock.append(now())
    logps = way.update(rollout, advantages, ref_logps)                                                  # (N, C)
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0).item()
    optimizer.step()
    optimizer.zero_grad()
    clock.append(now())
    return dict(zip(PHASES, (b - a for a, b in zip(clock, clock[1:])))), rollout, ref_logps, logps, norm


def compare(args):
    """Both ways in turn, --repeats times -> the lines of the time table, after checking that they agree."""
    model, (usual, ours), advantages = build(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # the full work of a step, and the weights stay
    timed_step(ours, optimizer, advantages)                    # once to warm up
    seconds, differences, norms = {usual: [], ours: []}, [], []
    for repeat in range(args.repeats):
        mine, rollout, *our_logps, our_norm = timed_step(ours, optimizer, advantages)
        theirs, _, *their_logps, their_norm = timed_step(usual, optimizer, advantages, rollout)
        seconds[ours].append(mine), seconds[usual].append(theirs)
        differences += [(a - b).abs().max().item() for a, b in zip(our_logps, their_logps)]
        norms.append(abs(our_norm / their_norm - 1))
        print(f"repeat {repeat + 1}: usual way {sum(theirs.values()):.1f} s, ours {sum(mine.values()):.1f} s", file=sys.stderr)
    logps_bar, norm_bar = (0.1, 0.05) if args.full else (1e-4, 1e-3)  # bf16 rounds the states that the logits come from
    assert max(differences) < logps_bar, f"the two ways differ by {max(differences):.2g} in log-probability"
    assert max(norms) < norm_bar, f"the norms of the gradient differ by a factor of 1 + {max(norms):.2g}"

    rows = [(phase, [phase]) for phase in PHASES]
    rows += [("reference + update", PHASES[1:]), ("**whole step**", PHASES)]
    lines = [f"| phase | usual way, s | ours, s | ratio |", "|---|--:|--:|--:|"]
    for name, phases in rows:
        a, b = (statistics.median(sum(step[p] for p in phases) for step in seconds[way]) for way in (usual, ours))
        lines.append(f"| {name} | {a:.2f} | {b:.2f} | {a / b:.1f}x |")
    agreement = (f"Medians of {args.repeats} interleaved repeats. Equal work: log-probs within {max(differences):.1g}, "
                 f"gradient norms within {max(norms):.1g} (relative).")
    return lines, agreement


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
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark falls to what is resident now


def measure_update(args):
    """In a fresh process: print the peak memory of one update above what was held before, in MiB."""
    model, ways, advantages = build(args)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # in both ways it is there from the second step on

    def update(completion_length):
        ids = torch.randint(1, model.config.image_token_id, (len(advantages), completion_length), device=model.device)
        logps = torch.zeros(ids.shape, device=model.device)
        way = ways[args.measure == "ours"]
        way.C = completion_length
        way.update(gv.Rollout(ids, torch.ones_like(ids, dtype=torch.bool), logps, None), advantages, logps)

    update(2)  # the libraries take their working memory
    forget_peak()
    before = held()
    update(args.completion_length)
    print(f"{held(peak=True) - before:.0f}")


def update_memory(groups=(2, 4, 8, 16)):
    """-> the lines of the memory table; each number from a process of its own, run with the same flags."""
    # glibc would keep freed memory and hide the peak; told so, it gives back at once whatever is above 64 KiB
    environment = dict(os.environ, MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    lines = ["| memory of the update, MiB | " + " | ".join(f"G = {G}" for G in groups) + " | 16 against 2 |",
             "|---|" + "--:|" * (len(groups) + 1)]
    for way, name in (("usual", "usual way"), ("ours", "ours")):
        peaks = []
        for G in groups:
            command = [sys.executable, __file__, "--score_tokens", "256", *sys.argv[1:], "--measure", way, "--num_generations", str(G)]
            peaks.append(int(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout))
            print(f"memory of the update, {name}, G = {G}: {peaks[-1]} MiB", file=sys.stderr)
        lines.append(f"| {name} | " + " | ".join(map(str, peaks)) + f" | {peaks[-1] / peaks[0]:.2f}x |")
    return lines


def compare_trl(args):
    """A step of TRL's GRPOTrainer and one of ours in turn, --repeats times, in one process -> a line of the time table."""
    import tempfile

    import datasets
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor
    from trl import GRPOConfig, GRPOTrainer

    model, (_, ours), advantages = build(args)
    words = [f"w{i}" for i in range(args.vocab - len(SPECIAL))] + SPECIAL
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[EOS], pad_token=words[EOS],
                                        extra_special_tokens=SPECIAL, padding_side="left")
    template = ("{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}"
                "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}")
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=template)
    text = " ".join(random.choices(words[1:-len(SPECIAL)], k=args.text_tokens - 2))
    image = Image.effect_noise((args.image_size, args.image_size), 64).convert("RGB")
    data = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": text}]] * args.prompts,
                                       "image": [image] * args.prompts})

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    seconds = {"trl": [], "ours": []}

    class InTurn(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = now()

        def on_step_end(self, *_, **__):
            seconds["trl"].append(now() - self.start)
            seconds["ours"].append(sum(timed_step(ours, optimizer, advantages)[0].values()))
            print(f"TRL {seconds['trl'][-1]:.1f} s, ours {seconds['ours'][-1]:.1f} s", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # a path, because TRL loads the reference model from it
        settings = GRPOConfig(
            output_dir=folder, max_steps=args.repeats, per_device_train_batch_size=len(advantages), learning_rate=1e-9,
            num_generations=args.num_generations, max_completion_length=args.completion_length, beta=BETA, loss_type="grpo",
            generation_kwargs=dict(suppress_tokens=ours.suppressed.nonzero()[:, 0].tolist()),
            model_init_kwargs=dict(dtype=model.dtype), bf16=args.full, gradient_checkpointing=False,  # as we do
            use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True)
        trainer = GRPOTrainer(folder, args=settings, processing_class=processor, train_dataset=data, callbacks=[InTurn()],
                              reward_funcs=lambda completions, **_: [random.random() for _ in completions])
        trainer.train()
    row_tokens = ours.prompts[0].input_ids.shape[1] + args.completion_length
    assert trainer.state.num_input_tokens_seen == args.repeats * len(advantages) * row_tokens, "TRL did other work"
    a, b = (statistics.median(seconds[name]) for name in ("trl", "ours"))
    return f"| whole step, TRL's GRPOTrainer | {a:.2f} | {b:.2f} | {a / b:.1f}x |"


def machine(args):
    """The line under the tables: where, with what, and how to run it again."""
    cpu = next((line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {args.threads} of {os.cpu_count()} cores"
    versions = [f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
    if args.trl:
        import trl
        versions.append(f"trl {trl.__version__}")
    return f"{device}; Python {platform.python_version()}, {', '.join(versions)}; `python bench/step.py {' '.join(sys.argv[1:])}`"


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    if args.measure:
        return measure_update(args)
    memory = [] if args.no_memory else ["", *update_memory()]
    table, agreement = compare(args)
    if args.trl:
        table.append(compare_trl(args))
    report = "\n".join([*table, *memory, "", agreement, machine(args)])
    print(report)
    if args.out:
        Path(args.out).write_text(report + "\n")


if __name__ == "__main__":
    main()
