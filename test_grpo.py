"""The tests, in the order of grpo_vision.py: `pytest test_grpo.py`. Offline, on the CPU, some minutes.

    pytest test_grpo.py -m quick      # the mathematics only, less than a minute

They write small models of the published layouts, and small files of SAT's and CV-Bench's layouts. Where a check
could pass by accident, the wrong way is computed as well and has to fail it.
"""
import copy
import doctest
import gc
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

SCRATCH = tempfile.TemporaryDirectory()  # set before the imports below, which read these:
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=SCRATCH.name, CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="1")

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, pre_tokenizers, trainers
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig, Qwen2Tokenizer
from transformers.cache_utils import Cache

import eval_cvbench
import grpo_vision as g
import prepare_sat
sys.path.insert(0, str(g.TOY))
import make

torch.set_num_threads(1)
pytest.mark._config.addinivalue_line("markers", "quick: the mathematics, less than a minute")  # no pytest.ini
quick = pytest.mark.quick


# ---- Small models in the published layouts ---------------------------------------------------------------

SPECIALS = [f"<|{name}|>" for name in (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    "vision_start vision_end vision_pad image_pad video_pad").split()]
ROLES = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
         "{{ message['content'] }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
UNUSED_ROWS = 20  # of the embedding, which no token has
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def write_tokenizer(folder, chat_template):
    """The toy's tokenizer, a byte-level BPE of Qwen's kind. -> ids of SPECIALS"""
    tokenizer = AutoTokenizer.from_pretrained(g.TOY / "base")
    tokenizer.chat_template = chat_template
    tokenizer.eos_token = SPECIALS[2] if chat_template == ROLES else SPECIALS[0]
    tokenizer.save_pretrained(folder)
    return dict(zip((name[2:-2] for name in SPECIALS), tokenizer.convert_tokens_to_ids(SPECIALS)))


def config_of(family, ids):
    """config.json with the keys that the published one of this family has."""
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=max(ids.values()) + 1 + UNUSED_ROWS, hidden_act="silu",
                max_position_embeddings=2048, rope_theta=1e6, rms_norm_eps=1e-6, attention_dropout=0.0,
                bos_token_id=ids["endoftext"], eos_token_id=ids["endoftext"])
    shared = dict(model_type=family, tie_word_embeddings=True, image_token_id=ids["image_pad"],
                  video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
                  vision_end_token_id=ids["vision_end"])
    if family == "qwen3_vl":
        return dict(shared, text_config=dict(text, model_type="qwen3_vl_text", head_dim=8, rope_scaling=dict(
            rope_type="default", mrope_interleaved=True, mrope_section=[2, 1, 1])), vision_config=dict(
                model_type=family, depth=3, hidden_size=32, intermediate_size=48, num_heads=2, in_channels=3,
                out_hidden_size=32, patch_size=16, spatial_merge_size=2, temporal_patch_size=2,
                num_position_embeddings=64, deepstack_visual_indexes=[0, 1]))
    vision = dict(depth=2, num_heads=2, in_chans=3, patch_size=14, spatial_merge_size=2, spatial_patch_size=14,
                  temporal_patch_size=2, hidden_size=32)
    vision |= dict(embed_dim=32, mlp_ratio=2, model_type=family) if family == "qwen2_vl" else dict(
        intermediate_size=48, out_hidden_size=32, window_size=112, fullatt_block_indexes=[1])
    return dict(shared, **text, rope_scaling=dict(type="mrope", mrope_section=[1, 1, 2]), torch_dtype="bfloat16",
                use_sliding_window=False, vision_config=vision)


def write_model(folder, family="qwen2_vl", chat_template=make.BASE_CHAT_TEMPLATE):
    """A model directory as published: bfloat16, the names and the config of the published files, and a
    generation_config that would ruin sampling. Weights of std 0.2: with 0.02 wrong positions hardly show."""
    folder.mkdir()
    config = config_of(family, ids := write_tokenizer(folder, chat_template))
    write = lambda name, content: (folder / name).write_text(json.dumps(content))
    write("config.json", config)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    model.bfloat16().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    if family != "qwen3_vl":
        published = lambda name: name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        weights = {published(name): x for name, x in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write("config.json", config)  # over the one just saved
    three = family == "qwen3_vl"
    write("preprocessor_config.json", {
        **({"size": {"shortest_edge": 1024, "longest_edge": 16777216}, "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3} if three else
           {"min_pixels": 3136, "max_pixels": 12845056, "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711]}),
        "patch_size": 16 if three else 14, "merge_size": 2, "temporal_patch_size": 2,
        "image_processor_type": "Qwen2VLImageProcessorFast" if three else "Qwen2VLImageProcessor"})
    write("generation_config.json", dict(
        do_sample=True, temperature=0.01, top_p=0.001, top_k=1, repetition_penalty=1.0,
        bos_token_id=ids["endoftext"], pad_token_id=ids["endoftext"],
        eos_token_id=[ids["im_end"], ids["endoftext"]]))
    return str(folder)


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory):
    """{family: folder}; the two younger ones have a chat template with roles, as published."""
    folder = tmp_path_factory.mktemp("models")
    return {family: write_model(folder / family, family, *[ROLES] * (family != "qwen2_vl")) for family in FAMILIES}


@pytest.fixture(scope="session")
def model_dir(model_dirs):
    return model_dirs["qwen2_vl"]


@pytest.fixture(scope="session")
def processors(model_dir):
    return g.load_processors(model_dir)


def seed(number):
    return torch.Generator().manual_seed(number)


def picture(width, height, seed=0):
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


def no_grad_calls(function):
    return torch.no_grad()(function)


ENDS = list(range(40, 80))  # so many end tokens that a random model's completions get unequal lengths
G = 3                       # completions of each prompt, here


class World:
    """A family's small model in float64, the same weights as transformers has it (stock), four prompts, which
    are unequal in length, number and size of images, and a rollout on them."""
    def __init__(self, folder):
        self.folder, self.tokenizer, self.image_processor = folder, *g.load_processors(folder)
        self.model = g.load_model(folder, self.tokenizer, dtype=torch.float64)
        self.model.eos_ids = ENDS
        self.stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
        rows = [("Which? <think>", [(64, 96)]), ("Is it left of the other one? <think>", [(160, 96)]),
                ("Did it move at all?", [(64, 64), (96, 128)]), ("No picture. <think>", [])]
        self.texts = [g.IMAGE_TOKENS * len(sizes) + text for text, sizes in rows]
        self.images = [[picture(*size, seed=i) for size in sizes] for i, (_, sizes) in enumerate(rows)]
        self.each = [self.build([i]) for i in range(4)]
        self.pass_ = self.build(range(4))
        assert len(set(self.pass_.lengths.tolist())) == 4
        self.rollout = g.sample(self.model, [self.pass_], G, 9, 1.0, seed(3))
        assert len(set(self.rollout.lengths.tolist())) > 3 and 0 < self.rollout.finished.sum() < 12

    def build(self, which, first=0):
        texts, images = ([x[i] for i in which] for x in (self.texts, self.images))
        return g.build_prompts(texts, images, self.tokenizer, self.image_processor, self.model, first)

    def split(self):
        """The same prompts in two passes."""
        return [self.build([0, 1]), self.build([2, 3], first=2)]

    def rows(self, rollout=None, G=G):
        """-> for each row: its number, its prompt's, its completion ids without padding."""
        rollout = rollout or self.rollout
        rows = zip(rollout.completion_ids, rollout.completion_mask)
        return [(i, i // G, ids[mask]) for i, (ids, mask) in enumerate(rows)]

    def inputs(self, group, completion=(), model=None):
        """Arguments for transformers' own forward and generate: prompt and completion in one sequence."""
        prompt = self.each[group]
        (model or self.stock).model.rope_deltas = None  # left over from the last call
        ids = torch.cat([prompt.input_ids, torch.as_tensor(completion, dtype=torch.long)[None]], 1)
        found = dict(input_ids=ids, mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
                     pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw)
        return {name: x for name, x in found.items() if x is not None}

    def alone(self, model, group, completion, temperature=1.0, suppressed=None):
        """The usual way: one row, one sequence, the stock model -> (C, V) log-probabilities."""
        logits = model(**self.inputs(group, completion, model)).logits
        logits = logits[0, self.each[group].input_ids.shape[1] - 1:-1] / temperature
        suppressed = self.model.suppressed if suppressed is None else suppressed
        return logits.masked_fill(suppressed, -1e300).log_softmax(-1)

    def reference_logps(self, passes, rollout=None, **settings):
        cfg = g.Config(**{"num_generations": G, "score_tokens": 30, **settings})
        return g.score_by_reference(g.Policy(self.model), passes, rollout or self.rollout, cfg)

    def gradients(self, passes, advantages, ref, old, cfg, rollout=None, model=None):
        """-> log-probs and sums that g.update returns, and the gradient that it leaves, by name."""
        rollout = rollout or self.rollout
        model = copy.deepcopy(model or self.model)
        if cfg.gradient_checkpointing:
            g.checkpoint_layers(model)
        weights = g.weigh_tokens(rollout.lengths, rollout.finished, cfg)
        found = g.update(g.Policy(model), passes, rollout, advantages, weights, ref, old, cfg)
        return *found, {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="session")
def worlds(model_dirs):
    return {family: World(folder) for family, folder in model_dirs.items()}


@pytest.fixture(scope="session")
def world(worlds):
    return worlds["qwen2_vl"]


# ---- Files, runs, errors ---------------------------------------------------------------------------------

def encoded(image, format="JPEG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


SAT_SCHEMA = pa.schema([("image_bytes", pa.list_(pa.binary())), ("question", pa.string()),
                        ("answers", pa.list_(pa.string())), ("question_type", pa.string()),
                        ("correct_answer", pa.string())])
ONE, TWO = encoded(picture(84, 56)), encoded(picture(56, 112, seed=1))
NO_JPEG, HALF_A_JPEG = b"no JPEG at all", ONE[:len(ONE) // 2]
SAT_ROWS = [dict(zip(SAT_SCHEMA.names, row)) for row in [
    ([ONE], "How many chairs?", ["3", "1", "2", "4", "5"], "other", "3"),
    ([ONE, TWO], "Did it move?", ["no, it would stay the same", "left by 26 degrees"], "goal_aim",
     "no, it would stay the same"),
    ([HALF_A_JPEG], "Is it whole?", ["yes", "no"], "other", "no"),
    ([NO_JPEG], "Is it a JPEG?", ["yes", "no"], "other", "no"),
    ([TWO], "Where is the lamp?", ["left", "right"], "other", "above"),
    ([TWO], "Is the lamp left or right?", ["left", "right"], "other", "right")]]


@pytest.fixture(scope="session")
def sat(tmp_path_factory):
    """A folder with SAT_train.parquet as SAT has it, and train.parquet, which prepare_sat makes of it."""
    folder = tmp_path_factory.mktemp("sat")
    pq.write_table(pa.Table.from_pylist(SAT_ROWS, SAT_SCHEMA), folder / "SAT_train.parquet")
    prepare_sat.main(["--from", str(folder / "SAT_train.parquet"), "--multi_image", "--out", str(folder)])
    return folder


def turned(image):
    """As a camera stores it that was held upright: sideways, with the EXIF tag that says so -> JPEG"""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", exif=exif, quality=95)
    return buffer.getvalue()


CVBENCH_TEXT = "How many chairs are in the image? Select from the following choices."


@pytest.fixture(scope="session")
def cvbench(tmp_path_factory):
    """A folder with files of CV-Bench's schema: 2 to 6 choices, images of every kind; all answers are 4."""
    folder = tmp_path_factory.mktemp("cvbench")
    images = iter([encoded(picture(56, 84)), *(encoded(picture(84, 56 + 28 * i, seed=i).convert(mode), "PNG")
                                               for i, mode in enumerate(("RGBA", "L", "P"))),
                   turned(picture(56, 112, seed=4))])
    for kind, tasks in ("2D", [("Count", "ADE20K"), ("Relation", "COCO"), ("Count", "COCO")]), (
            "3D", [("Depth", "Omni3D"), ("Distance", "Omni3D")]):
        rows = []
        for i, (task, source) in enumerate(tasks):
            choices = "3 4 1 2 0 5".split()[:[2, 3, 6][i] if kind == "2D" else 4 + i]
            lines = "".join(f"\n({'ABCDEF'[j]}) {choice}" for j, choice in enumerate(choices))
            rows.append(dict(dict.fromkeys(make.CVBENCH_FEATURES), idx=i, type=kind, task=task, source=source,
                             question=CVBENCH_TEXT[:34], image={"bytes": next(images), "path": None},
                             choices=choices, answer="(B)", filename=f"{i}.png", prompt=CVBENCH_TEXT + lines))
        prepare_sat.write_parquet(folder / f"test_{kind.lower()}.parquet", rows, make.CVBENCH_FEATURES)
    return folder


def letters(completion, source_row, **_):
    """A reward that a random model can get: the share of small letters in what it wrote. What is added
    tells by which row it was graded, and is the same for all of a group."""
    said = completion.removeprefix("<think>")
    return sum("a" <= c <= "z" for c in said) / max(1, len(said)) + source_row / 1000


g.REWARDS["letters"] = letters


@pytest.fixture(scope="session")
def train(model_dir, sat):
    """train(output_dir, *flags): three steps of --preset sat on the small model; flags override."""
    flags = f"""--preset sat --model_name_or_path {model_dir} --data {sat} --save_steps 1 --prompts_per_step 2
        --score_tokens 20 --encode_tokens 1 --eval_steps 0 --learning_rate 1e-3 --max_steps 3 --num_generations 4
        --max_completion_length 8 --rewards accuracy,format,letters --eval_data {sat}/train.parquet""".split()
    return lambda output_dir, *more: g.main([*flags, "--output_dir", str(output_dir), *map(str, more)])


def jsonl(path, drop="seconds/"):
    records = map(json.loads, Path(path).read_text().splitlines())
    return [{key: value for key, value in record.items() if not key.startswith(drop)} for record in records]


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def same_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def same_run(one, other):
    """Are two runs bit-equal: weights and logs, but for the seconds?"""
    return same_weights(one / "final", other / "final") and all(
        jsonl(one / name) == jsonl(other / name) for name in ("metrics.jsonl", "completions.jsonl"))


@contextmanager
def stops(*words):
    """Inside, the program must stop with one sentence that has these words; the exit code is then 1."""
    with pytest.raises(SystemExit) as stop:
        yield
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert all(str(word) in message for word in words), message
    del stop
    gc.collect()  # a run's lock goes with the last of its frames


@quick
def test_docstring_examples():
    for module, least in (g, 4), (eval_cvbench, 3):
        failed, attempted = doctest.testmod(module)
        assert failed == 0 and attempted >= least


# ---- Step 1: the prompt ----------------------------------------------------------------------------------

@quick
@pytest.mark.parametrize("images, start", [
    (0, ""), (1, g.IMAGE_TOKENS), (2, f"Picture 1: {g.IMAGE_TOKENS}Picture 2: {g.IMAGE_TOKENS}")])
def test_a_row_becomes_the_papers_question_with_its_images_first(images, start, processors):
    tokenizer = copy.deepcopy(processors[0])
    tokenizer.chat_template = ROLES
    row = dict(question="Where {is} it?", options=["no, it would stay the same", "2", "3"], images=[None] * images)
    question = ("Answer in natural language. Where {is} it? Choose between the following options: "
                "no, it would stay the same, 2 or 3")
    assert g.row_text(row, "base", tokenizer) == start + g.TEMPLATES["base"].replace("{question}", question)
    assert g.row_text(row, "instruct", tokenizer) == (
        f"<|im_start|>user\n{start}{question}  Output the thinking process in <think> </think> and final "
        "answer (option) in <answer> </answer> tags.<|im_end|>\n<|im_start|>assistant\n")


@quick
def test_the_chat_template_chooses_the_prompt(processors):
    tokenizer = copy.deepcopy(processors[0])
    for template, chosen in (None, "base"), (make.BASE_CHAT_TEMPLATE, "base"), (ROLES, "instruct"), (
            eval_cvbench.SERVED_PROMPT, "base"):  # or a saved base model would become an instruct model
        tokenizer.chat_template = template
        assert g.choose_prompt(tokenizer) == chosen
        assert g.choose_prompt(tokenizer, "base-direct") == "base-direct"
        with nullcontext() if template == ROLES else stops("--prompt instruct-direct", "roles"):
            assert g.choose_prompt(tokenizer, "instruct-direct") == "instruct-direct"


@quick
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_have_a_pad_for_each_image_token_and_m_rope_positions(family, worlds):
    world = worlds[family]
    side = 2 * world.image_processor.patch_size  # of one image token, in pixels
    sizes = [[(2, 3)], [], [(3, 5), (4, 2)]]     # in tokens, width and height
    texts = [g.IMAGE_TOKENS * len(some) + "Which one?" for some in sizes]
    images = [[picture(side * w, side * h) for w, h in some] for some in sizes]
    build = lambda *some: g.build_prompts(*some, world.tokenizer, world.image_processor, world.model)
    found, words = build(texts, images), world.tokenizer("Which one?").input_ids
    start, end, _, pad, _ = world.tokenizer.convert_tokens_to_ids(SPECIALS[9:])
    for i, some in enumerate(sizes):
        expected = [x for w, h in some for x in [start, *[pad] * (w * h), end]] + words
        assert found.input_ids[i, :found.lengths[i]].tolist() == expected
        assert found.next_position[i] == sum(2 + max(size) for size in some) + len(words)
        alone = build([texts[i]], [images[i]])
        assert torch.equal(found.position_ids[:, i, :found.lengths[i]], alone.position_ids[:, 0])
    assert len(found.pixel_values) == 4 * (6 + 15 + 8) and len(found.image_grid_thw) == 3
    world_of = lambda **limits: g.load_processors(world.folder, **limits)[1].size["longest_edge"]
    assert world_of(max_pixels=12345) == 12345 != world_of()


# ---- Step 3: the rewards, and the grading of evaluation --------------------------------------------------

OPTIONS = ["right", "left", "no, it would stay the same", "15", "no"]
# (is it well formed, is it right, where left is right) -> completions
COMPLETIONS = {
    (1, 1): ["<think> hm </think> <answer> left </answer>", "<think></think><answer>(B)</answer>",
             "<think>\nhm\n\nhm\n</think>\n<answer>\nleft\n</answer>\n"],
    (1, 0): ["<think> hm </think> <answer> right </answer>", "<think> hm </think> <answer> ... </answer>",
             "<think> reasoning process here </think> <answer> answer here </answer>"],
    (0, 0): ["<think> hm </think> <answer> left </answer> <answer> left </answer>", "<think> hm left </answer>",
             "<think> hm </think> <answer> <answer> left </answer>", "<think> hm </think> <answer> left", "",
             "<think> hm </think> left", "<think> hm </think> <Answer> left </Answer>",
             "<think> hm </think> <answer> </answer>"],
    (0, 1): ["<think> hm </think> <think> hm </think> <answer> left </answer>", "<answer> left </answer>",
             "<think> <think> hm </think> <answer> left </answer>", "<think> hm <answer> left </answer> </think>",
             "<answer> left </answer> <think> hm </think>", "So <think> hm </think> <answer> left </answer>",
             "<think> hm </think> So <answer> left </answer>", "<think> hm </think> <answer> left </answer> So."]}


@quick
def test_rewards_of_completions():
    row = dict(answer="left", options=OPTIONS, question="?", num_tokens=7)
    for (form, right), text in ((key, text) for key, texts in COMPLETIONS.items() for text in texts):
        assert g.format_reward(text, **row) == form and g.accuracy_reward(text, **row) == right, text
        assert g.hard_reward(text, **row) == form * right and g.REWARDS["length"](text, **row) == 0.007
    assert g.accuracy_reward("Left.", template="base-direct", **row) == 1
    assert g.accuracy_reward("Left.", **row) == 0


# options -> {the one that an answer chooses in evaluation, or none: answers}; in training most choose none
ANSWERS = {
    "2,3,4": {
        "4": ["(C)", "C.", "c)", "4", "4.0", "The answer is (C)", "The answer is C, as I counted them.", "Answer: C",
              "C) 4", "four", "There are four chairs.", "The left one has 4.", "(A) 2? No. The answer is (C) 4.",
              "<answer>four</answer>", "<answer>I see 4 of them, so (C)</answer>", "C,", "[C]", "{C}", "**C**",
              "<answer>2</answer> wait <answer>4</answer>", "<think> not 2, not 3 </think> <answer>(C)",
              "The correct answer is **C**.", "Answer: **C**", "<b>C</b>", "\\boxed{C}", "The correct choice is C"],
        "3": ["Option B"], "2": ["<think> there are 2 on the left and"],
        "": ["The answer is a matter of taste.", "There are 14 chairs, or 4.5.", "There are 5 chairs.", "(A) or (C)",
             "The answer is (A) or (C).", "(C) 3", "(D)", "(D), or 4", "I cannot see the image.", "<answer>E</answer>",
             "<answer></answer>", "<answer>...</answer>", "<answer>()</answer>", "**A** or **C**", "[A] or [C]", "",
             "<think> not 2, not 3, so 4 </think>", "<think> there are 2 on the left and 2 or 3"]},
    "right,left": {
        "left": ["So it is left.", "It is a thing on the left", "(b) left",
                 "(B) The lamp stands to the left of the table, not to the right.",
                 "(B), because what is on the right is the table"],
        "": ["Either left or right.", "It is leftmost", "(b) right", "(A) or (B), I cannot say which",
             "(A) is wrong, so (B)", "<answer>left or right</answer>", "<answer>le ft</answer>"]}}
ANSWERS_IN_TRAINING = {"2,3,4": {"4": ["<answer>(C)</answer>", "<answer> c. </answer>", "<answer>4</answer>",
                                       "<answer>Final Answer: C</answer>"]},
                       "right,left": {"left": ["<answer>Left.</answer>"]}}


@quick
def test_the_table_of_answers():
    for table, in_training in (ANSWERS, False), (ANSWERS_IN_TRAINING, True):
        for names, expected, text in ((names, expected, text) for names, chosen in table.items()
                                      for expected, texts in chosen.items() for text in texts):
            options = names.split(",")
            for strict, option in (False, expected), (True, expected if in_training else ""):
                find, said = g.choose if strict else eval_cvbench.read_choice, eval_cvbench.read_answer(text, strict)
                assert find(said, options) == (option or None), text
                right = [solution for solution in options if g.grade(said, solution, options, find)]
                assert right == [option] * bool(option), text
    assert g.choose("B", ["x", "A", "B"]) == "B" and g.choose("A", ["x", "y"]) == "x"  # text goes before letter


# solution = answer block or text; where "!=" stands they are not equal
MATHEMATICS = """
140° = $140^\\circ$ ; $140^\\circ$ = 140° ; 140 = 140 degrees ; 140° != 141° ; \\frac{3}{4} = 0.75 ; 0.75 = 3/4
\\frac{3}{4} != \\frac{4}{3} ; 2\\sqrt{3} = $2\\sqrt{3}$ ; 2 \\sqrt { 221 } = 2\\sqrt{221} ; 2\\sqrt{3} = \\sqrt{12}
2\\sqrt{3} = 2√3 ; 2\\sqrt{3} != 3.46 ; 5 = x=5 ; x=5 = 5 ; 5 != x = 6 ; 10 cm = 10 ; 10 = 10 cm ; 10 != 12 cm
10\\text{ cm} = 10 cm ; 50% = 50\\% ; 50 = 50% ; 0.5 = 50% ; 1,000 = 1000 ; 1000 = 1,000 ; 1000 != 1,001 ; 5 !=
5 != ... ; 5 != 3, 4 or 5 ; 12\\pi = 12π ; 12\\pi != 37.7 ; (1,2) = (1, 2) ; (1,2) != (2, 1) ; -3 != 3
5 = Final Answer:5 ; 5 = Final Answer: \\boxed{5} ; y=2x+1 = y = 1 + 2x ; 24.5 = 24.50 ; 5 != \\frac{\\frac{\\frac{
5 != 5 </answer> <answer> 6"""


def test_the_table_of_mathematics():
    cases = [case.strip() for case in MATHEMATICS.replace("\n", " ; ").split(" ; ") if case.strip()]
    assert len(cases) == 39
    for case in cases:
        solution, sign, answer = re.fullmatch(r"(.+?) (!?=)(?: (.*))?", case).groups()
        for completion in f"<think> 7, 8 </think> <answer> {answer or ''} </answer>", f"<answer>{answer or ''}</answer>":
            assert g.math_reward(completion, answer=solution, num_tokens=3) == (sign == "="), case
    assert g.math_reward("The sides are 3 and 4, so it is 5", answer="5") == 1  # no block: the whole text
    row = dict(answer=r"\frac{1}{2}", num_tokens=1)
    assert g.hard_reward("<think></think><answer>0.5</answer>", options=[], **row) == 1
    assert g.hard_reward("<answer>0.5</answer>", options=[], **row) == 0
    assert g.hard_reward("<think></think><answer>0.5</answer>", options=["0.5", r"\frac{1}{2}"], **row) == 0


@quick
def test_no_text_breaks_the_rewards():
    for text in ("(", "\\", "[a-z", "\0", "²", "<think>" * 500, "</think><answer>" * 300, "(a)" * 300, "é" * 500):
        for options in OPTIONS, ["(", "\\", "[a-z"], [str(i) for i in range(40)]:
            for completion in text, f"<think>{text}</think><answer>{text}</answer>":
                assert g.format_reward(completion) in (0, 1)
                assert g.accuracy_reward(completion, answer=options[0], options=options) in (0, 1)
                said = eval_cvbench.read_answer(completion)
                assert g.grade(said, options[0], options, eval_cvbench.read_choice) in (0, 1)


@quick
@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|endoftext|>", "<|im_end|><|endoftext|>"])
def test_think_is_put_back_once_and_end_tokens_are_not_in_the_way(end, processors):
    said = " left , right . It 's  two\n</think> <answer> left </answer>"
    ids = torch.tensor(processors[0](said + end).input_ids)
    assert g.completion_text(g.TEMPLATES["base-direct"], ids, processors[0]) == said
    for prompt in g.TEMPLATES["base"], "<|im_start|>assistant\n<think>\n":  # a thinking model's opens it as well
        text = g.completion_text(prompt, ids, processors[0])
        assert text == re.search(r"<think>\s*", prompt)[0] + said
        assert g.format_reward(text) == g.accuracy_reward(text, "left", OPTIONS) == 1


@quick
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_a_reward_must_be_a_finite_number(value, monkeypatch):
    monkeypatch.setitem(g.REWARDS, "mine", lambda completion, **_: value)
    row = dict(answer="left", options=OPTIONS, completion="<answer> given, for SFT </answer>")
    with stops("reward mine", "finite"):
        g.compute_rewards("accuracy,mine", ["a", "b"], [7, 7], [row])
    monkeypatch.setitem(g.REWARDS, "mine", lambda completion, num_tokens, **_: num_tokens)
    found = g.compute_rewards("accuracy,mine", ["a", "<answer>b</answer>"], torch.tensor([7, 8]), [row])
    assert {name: values.tolist() for name, values in found.items()} == {"accuracy": [0, 1], "mine": [7, 8]}


# ---- Step 4: the advantages ------------------------------------------------------------------------------

@quick
def test_group_advantages_by_hand():
    rewards = torch.tensor([0., 0, 1, 1, 2, 1, 1, 0, 1, 1, 1, 1], dtype=torch.float64)  # three groups of four
    centred = torch.tensor([-.5, -.5, .5, .5, 1, 0, 0, -1, 0, 0, 0, 0], dtype=torch.float64)
    std = torch.tensor([1 / 3, 2 / 3, 1]).double().sqrt().repeat_interleave(4)  # unbiased: divided by G - 1
    torch.testing.assert_close(g.group_advantages(rewards, 4), centred / (std + 1e-4), rtol=1e-6, atol=0)
    torch.testing.assert_close(g.group_advantages(rewards, 4, scale_rewards=False), centred)
    for value, n in itertools.product([0.0, 0.1, 1 / 3, 1.1, 1e6 + 0.1], [2, 3, 7, 8]):
        assert (g.group_advantages(torch.full((3 * n,), value), n) == 0).all()  # no spread: exactly 0


# ---- Steps 2 and 5: encode once, branch G times ----------------------------------------------------------

@quick
@pytest.mark.parametrize("family", FAMILIES)
def test_the_image_tower_is_transformers_own_with_fewer_calls(family, worlds, monkeypatch):
    world, calls = worlds[family], []
    images = [[picture(320, 320, seed=i)] for i in range(4)]
    prompts = g.build_prompts([g.IMAGE_TOKENS] * 4, images, world.tokenizer, world.image_processor, world.model)
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *a, **k: calls.append(1) or attention(*a, **k))
    counts, outputs = [], []
    for model in world.model, world.stock:
        calls.clear()
        with torch.no_grad():
            outputs.append(model.model.get_image_features(prompts.pixel_values, prompts.image_grid_thw))
        counts.append(len(calls))
    ours, theirs = (torch.cat(output.pooler_output) for output in outputs)
    assert (ours - theirs).abs().max() < 1e-10
    depth = len(world.model.model.visual.blocks)
    assert counts[0] <= (3 if family == "qwen2_5_vl" else 1) * depth < counts[1]  # windows of three sizes
    twin = copy.deepcopy(world.model.model.visual.patch_embed)
    twin.proj.weight.data.zero_()  # a copy uses its own weights
    assert (twin(prompts.pixel_values) == (0 if twin.proj.bias is None else twin.proj.bias)).all()


@quick
def test_suppressed_are_vision_tokens_and_unused_rows(world, model_dir):
    tokenizer, expected = world.tokenizer, torch.zeros_like(world.model.suppressed)
    vision = [name for name in SPECIALS if "vision" in name or "_pad" in name]
    expected[tokenizer.convert_tokens_to_ids(vision)] = expected[-UNUSED_ROWS:] = True
    assert torch.equal(world.model.suppressed, expected) and expected.sum() == 5 + UNUSED_ROWS
    loaded = g.load_model(model_dir, tokenizer)
    assert loaded.eos_ids == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@quick
@pytest.mark.parametrize("family", FAMILIES)
def test_score_equals_full_sequences_of_the_stock_model(family, worlds):
    world, rollout = worlds[family], worlds[family].rollout
    cfg = g.Config(num_generations=G, score_tokens=30, temperature=0.7)
    mixed = [group.unique().numel() for _, group, _, _ in g.chunks(world.pass_, rollout, cfg)]
    assert max(mixed) > 1 and len(mixed) > 1  # rows of several groups in one chunk
    logps, split = (world.reference_logps(passes, temperature=0.7) for passes in ([world.pass_], world.split()))
    assert (logps[~rollout.completion_mask] == 0).all() and (logps - split).abs().max() < 1e-9
    shifted = copy.deepcopy(world.pass_)  # a control: positions that go on at P
    shifted.next_position = shifted.lengths
    shifted = world.reference_logps([shifted], temperature=0.7)
    padded = copy.deepcopy(world.pass_)  # a control: a prompt's padding is seen
    padded.lengths = torch.full_like(padded.lengths, padded.input_ids.shape[1])
    padded = world.reference_logps([padded], temperature=0.7)
    for i, group, ids in world.rows():
        with torch.no_grad():
            expected = world.alone(world.stock, group, ids, 0.7)
            kv, whole = g.encode(world.model, world.pass_), torch.ones(1, len(ids)).bool()
            entropy = g.score(world.model, world.pass_, kv, torch.tensor([group]), ids[None], whole, cfg)[1]
        error = lambda found: (found[i, :len(ids)] - expected.gather(-1, ids[:, None])[:, 0]).abs().max()
        assert error(logps) < 1e-9 and (entropy[0] + (expected.exp() * expected).sum(-1)).abs().max() < 1e-9
        assert group == 3 or error(shifted) > 1e-3
        assert group == world.pass_.lengths.argmax() or error(padded) > 1e-3


@quick
def test_completions_that_saw_one_another_would_be_found_out(world):
    prompt, ids = world.each[0], world.rollout.completion_ids[:2]
    inputs = torch.cat([prompt.input_ids[:, -1:].expand(2, 1), ids[:, :-1]], 1)
    positions = (torch.arange(ids.shape[1]) + prompt.next_position - 1).expand(3, 1, -1)
    right = world.reference_logps([world.pass_])[1]
    with torch.no_grad():
        kv = g.encode(world.model, prompt)
        cache = Cache(layers=[g.DynamicLayer() for _ in kv[::2]])
        for layer, keys, values in zip(cache.layers, kv[::2], kv[1::2]):
            layer.update(keys, values)
        for one in inputs:  # the second behind the first in one cache, but at the right positions
            hidden = world.model.model(input_ids=one[None], position_ids=positions, past_key_values=cache)[0]
        leaky = g.token_logps(world.model, hidden[0], 1.0).gather(-1, ids[1][:, None])[:, 0]
    length = world.rollout.lengths[1]
    assert (leaky - right)[:length].abs().max() > 0.01


@quick
def test_the_image_matters_and_runs_once_per_pass(world):
    other, calls = copy.deepcopy(world.pass_), []
    patches = int(world.each[0].pixel_values.shape[0])
    other.pixel_values[patches:patches + 20] = other.pixel_values[patches:patches + 20].flip(0)  # of prompt 1
    one, two = (world.reference_logps([some]) for some in (world.pass_, other))
    change = (one - two).abs().amax(1)
    assert (change[3:6] > 1e-3).all() and (change[:3] == 0).all() and (change[6:] == 0).all()
    model, cfg = copy.deepcopy(world.model), g.Config(num_generations=G, score_tokens=9, beta=0.0)
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    policy, ones = g.Policy(model), torch.ones(12)
    for run in (lambda: g.sample(model, world.split(), G, 4, 1.0),
                lambda: g.score_by_reference(policy, world.split(), world.rollout, cfg),
                lambda: g.update(policy, world.split(), world.rollout, ones, ones, None, None, cfg)):
        calls.clear()
        run()
        assert len(calls) == 2  # passes, whatever G and the number of chunks


@quick
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_is_the_same_alone_and_in_transformers(family, worlds):
    world, model = worlds[family], copy.copy(worlds[family].model)
    model.eos_ids = [0]
    free = g.sample(model, world.split(), 1, 12, 0).completion_ids
    model.eos_ids = ends = [int(free[0, 2]), int(free[3, 4])]
    together = g.sample(model, world.split(), 1, 12, 0)
    assert len(set(together.lengths.tolist())) > 1
    for _, group, ids in world.rows(together, 1):
        one = g.sample(model, [world.each[group]], 1, 12, 0)
        assert ids.tolist() == one.completion_ids[0].tolist() and together.finished[group] == one.finished[0]
        theirs = world.stock.generate(
            **world.inputs(group), do_sample=False, max_new_tokens=12, eos_token_id=ends,
            suppress_tokens=world.model.suppressed.nonzero()[:, 0].tolist())
        assert ids.tolist() == theirs[0, world.each[group].input_ids.shape[1]:].tolist()


@quick
def test_what_was_sampled_is_what_is_scored(world, monkeypatch):
    for temperature in 1.0, 1.7:
        rollout = g.sample(world.model, [world.pass_], G, 9, temperature, seed(0))
        gap = lambda logps: ((rollout.sampling_logps - logps) * rollout.completion_mask).abs().max()
        scored, control = (world.reference_logps([world.pass_], rollout, temperature=t) for t in (temperature, 1.3))
        assert gap(scored) < 1e-9 and gap(control) > 0.01
    for i, _, ids in world.rows():
        ended = [token in ENDS for token in ids.tolist()]
        assert not any(ended[:-1]) and ended[-1] == world.rollout.finished[i] and (ended[-1] or len(ids) == 9)
        assert (world.rollout.completion_ids[i, len(ids):] == ENDS[0]).all()
    draw = lambda number: g.sample(world.model, [world.pass_], G, 9, 1.0, seed(number)).completion_ids
    assert world.model.generation_config.top_k == 1 and len(world.rollout.completion_ids.unique(dim=0)) > 8
    assert torch.equal(draw(3), world.rollout.completion_ids) and not torch.equal(draw(4), draw(3))
    sizes, forward = [], g.Decoder.forward
    monkeypatch.setattr(g.Decoder, "forward", lambda self: sizes.append(len(self.rows)) or forward(self))
    g.sample(world.model, [world.pass_], G, 9, 1.0, seed(3))
    assert sizes[0] == 12 > sizes[-1]  # rows that have ended leave


@quick
def test_tokens_are_drawn_from_the_models_distribution(world):
    model, N = copy.deepcopy(world.model), 6000
    model.suppressed = torch.ones_like(model.suppressed)
    model.suppressed[100:108] = False  # few tokens: a wrong kind of noise shows
    drawn = g.sample(model, [world.each[0]], N, 1, 2.0, seed(0)).completion_ids
    counts = torch.bincount(drawn[:, 0], minlength=len(model.suppressed))

    def chi_square(temperature):
        """How far the counts are from the distribution; it is above 24.3 by chance once in 1000 times."""
        with torch.no_grad():
            expected = N * world.alone(world.stock, 0, [0], temperature, model.suppressed)[0, 100:108].exp()
        return ((counts[100:108] - expected) ** 2 / expected).sum()

    assert counts[model.suppressed].sum() == 0
    assert chi_square(2.0) < 24.3 and chi_square(1.0) > 100
    model.model.language_model.norm.weight.data[3] = float("nan")
    with stops("not finite"):
        g.sample(model, [world.each[0]], 1, 3, 1.0)


@quick
def test_chunks_hold_every_row_once_within_the_budget(world):
    rng = random.Random(0)
    for _ in range(50):
        lengths = torch.tensor([rng.randint(1, 30) for _ in range(12)])
        rollout = SimpleNamespace(lengths=lengths, completion_ids=torch.zeros(12, 30), completion_mask=torch.arange(
            30) < lengths[:, None])
        cfg, seen = g.Config(num_generations=3, score_tokens=rng.randint(1, 90)), []
        for prompts in world.split():
            for rows, group, ids, mask in g.chunks(prompts, rollout, cfg):
                assert len(rows) == 1 or len(rows) * lengths[rows].max() <= cfg.score_tokens
                assert torch.equal(group + prompts.first, rows // 3) and torch.equal(mask.sum(1), lengths[rows])
                seen += rows.tolist()
        assert sorted(seen) == list(range(12))


# ---- Step 6: the loss and the update ---------------------------------------------------------------------

@quick
def test_grpo_loss_by_hand():
    ratio = torch.tensor([[1, 1.5, 0.5], [1.5, 0.5, 9], [2, 9, 9], [1, 1, 1]]).double()  # 9: masked
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    A, logps = torch.tensor([1, -1, 2, 0]).double(), torch.full((4, 3), -2).double()
    weights = g.LOSS_TYPES["grpo"](mask.sum(1).double(), 8)
    old, ref = logps - ratio.log(), logps + torch.tensor([[0, 0, 0]] * 3 + [[math.log(2), 0, 0]])
    loss, kl, clipped = g.grpo_loss(logps, old, ref, A, weights, mask, 0.2, None, 0.1)
    rows = [-(1 + 1.2 + 0.5) / 3, (1.5 + 0.8) / 2, -2.4 / 1, 0.1 * (2 - math.log(2) - 1) / 3]
    assert loss.item() == pytest.approx(sum(rows) / 4, abs=1e-7)
    assert kl[3, 0].item() == pytest.approx(1 - math.log(2)) and kl.sum() == kl[3, 0]
    assert (clipped & mask).nonzero().tolist() == [[0, 1], [1, 1], [2, 0]]
    loss, _, clipped = g.grpo_loss(logps, old, ref, A, weights, mask, 0.2, 0.6, 0.1)  # 1.5 < 1.6 < 2
    assert loss.item() == pytest.approx((sum(rows) - 0.3 / 3 - (3.2 - 2.4)) / 4, abs=1e-7)
    assert (clipped & mask).nonzero().tolist() == [[1, 1], [2, 0]]


@quick
def test_the_group_worked_in_the_readme():
    readme = (g.HERE / "README.md").read_text()
    worked = readme.split("One group, worked by hand")[1].split("\n## ")[0]
    stands = lambda number: f"{number:.4f}".rstrip("0").rstrip(".") in worked
    texts = [f"<think>{text}" for text in re.findall(r"^\| \d: `\.* ?(.*)`", worked, re.MULTILINE)]
    row = dict(answer="left", options=["left", "right"])
    rewards = g.compute_rewards("accuracy,format", texts, [3] * 4, [row])
    assert rewards["accuracy"].tolist() == [1, 0, 0, 0] and rewards["format"].tolist() == [1, 1, 1, 0]
    A = g.group_advantages(sum(rewards.values()).double(), 4)
    old = torch.tensor([[0.5, 0.5, 0.8], [0.4, 0.5, 0.5], [0.4, 0.5, 0.5], [0.4, 0.5, 0.5]]).double().log()
    new = old.clone()
    new[0, 1], new[3, 1] = math.log(0.65), math.log(0.35)
    weights = g.weigh_tokens(torch.full((4,), 3), torch.ones(4).bool(), g.Config())
    part = lambda i: g.grpo_loss(new[i], old[i], old[i], A[i], weights[i], torch.ones(1, 3).bool(), 0.2, None,
                                 0.04)
    parts = [part([i]) for i in range(4)]
    assert [clipped.any().item() for _, _, clipped in parts] == [True, False, False, True]
    found = [A[0], 1.2 * A[0], 0.8 * A[0], parts[0][1][0, 1], parts[3][1][0, 1], 4 * parts[0][0],
             4 * parts[3][0], sum(loss for loss, _, _ in parts)]
    assert all(stands(abs(number.item())) for number in found), found
    assert not stands(0.04 * A[0].item())  # a number that is not there would be missed


@quick
def test_loss_types_by_hand():
    lengths, finished = torch.tensor([2, 4, 3, 4]), torch.tensor([True, False, True, True])
    weigh = lambda kind, cut: g.weigh_tokens(lengths, finished, g.Config(
        loss_type=kind, mask_truncated_completions=cut, max_completion_length=4)).tolist()
    assert weigh("grpo", False) == pytest.approx([1 / 8, 1 / 16, 1 / 12, 1 / 16])  # a row's tokens add up to 1/4
    assert weigh("dr_grpo", False) == pytest.approx([1 / 16] * 4)                  # 4 rows x 4 tokens at most
    assert weigh("dapo", False) == pytest.approx([1 / 13] * 4)                     # 13 tokens in all
    assert weigh("grpo", True) == pytest.approx([1 / 8, 0, 1 / 12, 1 / 16])
    assert weigh("dr_grpo", True) == pytest.approx([1 / 16, 0, 1 / 16, 1 / 16])
    assert weigh("dapo", True) == pytest.approx([1 / 9, 0, 1 / 9, 1 / 9])


@quick
@pytest.mark.parametrize("family, freeze", [*((family, "none") for family in FAMILIES), ("qwen2_5_vl", "vision"),
                                            ("qwen3_vl", "vision"), ("qwen3_vl", "llm")])
def test_two_stage_backward_equals_plain_autograd(family, freeze, worlds):
    world, rollout = worlds[family], worlds[family].rollout
    cfg = g.Config(num_generations=G, score_tokens=30, beta=0.3, epsilon=0.2, epsilon_high=0.28,
                   gradient_checkpointing=False)
    torch.manual_seed(0)
    old, ref = rollout.sampling_logps + 0.3 * torch.randn(2, *rollout.completion_ids.shape).double()
    advantages, loss, entropy = torch.linspace(-2, 3, 12).double(), 0.0, 0.0
    model, usual = copy.deepcopy(world.model), copy.deepcopy(world.stock)
    for one in model, usual:
        for tower in dict(vision=[one.model.visual], llm=[one.model.language_model]).get(freeze, []):
            tower.requires_grad_(False)
    arguments = advantages, ref, old, cfg
    logps, sums, ours = world.gradients([world.pass_], *arguments, model=model)
    for i, group, ids in world.rows():
        distribution, C, A = world.alone(usual, group, ids), len(ids), advantages[i]
        row = distribution.gather(-1, ids[:, None])[:, 0]
        assert (logps[i, :C] - row).abs().max() < 1e-9
        ratio, log_ratio = (row - old[i, :C]).exp(), ref[i, :C] - row
        surrogate = torch.minimum(ratio * A, ratio.clamp(0.8, 1.28) * A)
        loss = loss + (-surrogate + 0.3 * (log_ratio.exp() - log_ratio - 1)).mean() / 12
        entropy -= (distribution.exp() * distribution).sum().item()
    loss.backward()
    assert 0 < sums["clip_ratio"] < rollout.completion_mask.sum()
    assert sums["loss"] == pytest.approx(loss.item(), abs=1e-9) and sums["entropy"] == pytest.approx(entropy)
    theirs = {name: p.grad for name, p in usual.named_parameters() if p.requires_grad}
    assert {name for name, x in ours.items() if x is not None} == theirs.keys()
    if family == "qwen3_vl" and freeze != "vision":
        assert {"model.visual.patch_embed.proj.bias", "model.visual.pos_embed.weight",
                "model.visual.deepstack_merger_list.1.linear_fc2.weight"} < theirs.keys()
    assert all(x.norm() > 1e-6 for x in theirs.values())
    error = lambda found: [((found[name] - x).norm() / x.norm()).item() for name, x in theirs.items()]
    assert max(error(ours)) < 1e-6
    again = g.Config(**{**vars(cfg), "gradient_checkpointing": True})
    recomputed = world.gradients([world.pass_], *arguments[:3], again, model=model)
    assert torch.equal(recomputed[0], logps) and recomputed[1] == sums  # bit-equal with checkpointing
    assert all(torch.equal(recomputed[2][name], ours[name]) for name in theirs)
    assert max(error(world.gradients(world.split(), *arguments, model=model)[2])) < 1e-6  # two passes
    shifted = copy.deepcopy(world.pass_)  # the control: positions that go on at P
    shifted.next_position = shifted.lengths
    assert min(error(world.gradients([shifted], *arguments, model=model)[2])) > 1e-3


@quick
def test_the_first_iteration_prints_zero_and_still_learns(world):
    cfg = g.Config(num_generations=G, beta=0.0)
    for factor in 1, 0:
        advantages = factor * g.group_advantages(torch.rand(12, generator=seed(0)).double(), G)
        _, sums, found = world.gradients([world.pass_], advantages, None, None, cfg)
        assert abs(sums["loss"]) < 1e-12 and sums["clip_ratio"] == sums["kl"] == 0
        assert all((x.norm() > 1e-6) if factor else (x == 0).all() for x in found.values())
    # what a truncated row says makes no difference, if it is left out
    cfg, ref = g.Config(num_generations=G, beta=0.5, mask_truncated_completions=True), world.rollout.sampling_logps + 1
    other = copy.deepcopy(world.rollout)
    other.completion_ids[~other.finished] = 50
    one, two = (world.gradients([world.pass_], torch.ones(12).double(), ref, None, cfg, rollout)[2]
                for rollout in (world.rollout, other))
    assert not other.finished.all() and all(torch.allclose(one[name], two[name], atol=1e-12) for name in one)


@quick
def test_sft_is_cross_entropy(world):
    """Advantage 1 on given completions: the same gradient as the usual loss on the answers' tokens."""
    rows = [dict(answer="left"), dict(answer="C", completion="<think> it is a square </think> <answer> C </answer>")]
    run = SimpleNamespace(tokenizer=world.tokenizer, sampler=world.model)
    cfg = g.Config(algorithm="sft", num_generations=1, beta=0.0, loss_type="dapo", score_tokens=9)
    batch = SimpleNamespace(rows=rows, texts=[world.texts[2], world.texts[1]])
    rollout, end = g.given_completions(run, cfg, batch), world.tokenizer.eos_token_id
    texts = "left", " it is a square </think> <answer> C </answer>"  # <think> is in the prompt already
    targets = [world.tokenizer(text).input_ids + [end] for text in texts]
    assert [ids.tolist() for _, _, ids in world.rows(rollout, 1)] == targets and rollout.finished.all()
    rollout.sampling_logps = rollout.sampling_logps.double()
    model, usual = copy.deepcopy(world.model), copy.deepcopy(world.stock)
    model.suppressed.zero_()
    assert g.group_advantages(torch.zeros(2), 1).tolist() == [1, 1]
    logps, sums, ours = world.gradients([world.build([2, 1])], torch.ones(2).double(), None, None, cfg, rollout, model)
    losses = []
    for group, target in zip((2, 1), targets):
        logits = usual(**world.inputs(group, target, usual)).logits
        losses.append(torch.nn.functional.cross_entropy(
            logits[0, world.each[group].input_ids.shape[1] - 1:-1], torch.tensor(target), reduction="none"))
    torch.cat(losses).mean().backward()
    assert -logps.sum().item() == pytest.approx(torch.cat(losses).sum().item()) and sums["clip_ratio"] == 0
    for name, p in usual.named_parameters():
        assert ((ours[name] - p.grad).norm() / p.grad.norm()) < 1e-9, name
    short = g.given_completions(run, g.Config(max_completion_length=4), batch)
    assert short.lengths.tolist() == [len(targets[0]), 4] and not short.finished[1]


@quick
def test_text_alone_with_a_frozen_language_model_learns_nothing_and_goes_on(world):
    still, text = copy.deepcopy(world.model).requires_grad_(False), [world.each[3]]
    rollout = g.sample(still, text, 2, 4, 1.0, seed(0))
    logps, _ = g.update(g.Policy(still), text, rollout, torch.tensor([1.0, -1.0]).double(), torch.ones(2).double(),
                        None, None, g.Config(num_generations=2, beta=0.0))
    assert (logps - rollout.sampling_logps)[rollout.completion_mask].abs().max() < 1e-9


# ---- Settings --------------------------------------------------------------------------------------------

def test_settings_and_their_precedence(model_dir, sat, tmp_path, capsys):
    own = f"--model_name_or_path {model_dir} --data {sat} --eval_steps 0 --eval_data {sat}".split()
    toy, flags = g.parse_config([]), "--max_steps=7 --preset=sat --rewards".split()
    assert toy.learning_rate == g.PRESETS["toy"]["learning_rate"] != g.Config.learning_rate
    assert g.parse_config(["--learning_rate", "0.5"]).learning_rate == 0.5
    changed = g.parse_config([*own, *flags, "accuracy, format"])
    assert (changed.max_steps, changed.rewards, changed.learning_rate) == (7, "accuracy,format", 1e-6)
    source = "".join(Path(module.__file__).read_text() for module in (g, eval_cvbench))
    with pytest.raises(SystemExit, match="0"):
        g.parse_config(["--help"])
    shown = capsys.readouterr().out
    for setting in g.fields(g.Config):
        assert re.search(rf"\bcfg\.{setting.name}\b", source) and setting.metadata["help"].split()[0] in shown


def test_bad_settings_stop_with_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for flags in ["--rewards accuracy,style", "--num_generations 1",
                  "--max_steps 0", "--temperature 0", "--temperature 1e-40", "--temperature nan", "--beta nan",
                  "--learning_rate nan", "--learning_rate inf", "--learning_rate -1", "--prompts_per_step 0",
                  "--score_tokens 0", "--max_pixels 0", "--max_pixels -5", "--rewards accuracy,format --prompt base-direct",
                  f"--model_name_or_path {tmp_path}/none", f"--model_name_or_path {tmp_path}/empty",
                  f"--model_name_or_path {tmp_path.name}/none/here", "--data data/none", "--eval_data toy/none"]:
        with stops(flags.split()[1] if "/none" in flags else flags.split()[0]):
            g.main(flags.split())
    for flags in "--preset paper", "--learning_rat 1", "--max_steps many", "--loss_type ppo", "--prompt mine":
        with pytest.raises(SystemExit, match="2"):
            g.parse_config(flags.split())
    assert not (g.RUNS / "paper").exists()
    monkeypatch.setattr(g, "Accelerator", lambda **_: SimpleNamespace(num_processes=3))
    with stops("--prompts_per_step 8", "3 processes"):
        g.make_accelerator(g.Config())


# ---- Preparation -----------------------------------------------------------------------------------------

def prepared(folder, capsys, *flags):
    """Run prepare_sat.py -> the rows it wrote, with decoded images, and its counts {verdict: rows}."""
    prepare_sat.main([*map(str, flags), "--out", str(folder)])
    printed = re.findall(r"^ *(\d+) ([^(\n]+?)(?: \(.*)?$", capsys.readouterr().out, re.MULTILINE)
    rows = datasets.Dataset.from_parquet(str(folder / "train.parquet"))
    return rows, {verdict.removeprefix("skipped: "): int(n) for n, verdict in printed}


def sizes(row):
    return [image.size for image in row["images"]]


def write_rows(path, rows, **features):
    """Rows with the columns that prepare_sat.py writes -> a Parquet file."""
    prepare_sat.write_parquet(path, rows, datasets.Features({**prepare_sat.SAT_FEATURES, **features}))


COLUMNS = ["images", "question", "options", "answer", "question_type", "source_row"]


@pytest.mark.parametrize("multi_image, kept", [(False, [0, 5]), (True, [0, 1, 5])])
def test_sat_rows_are_kept_or_skipped_for_a_reason(multi_image, kept, sat, processors, tmp_path, capsys):
    flags = ["--multi_image"] if multi_image else []
    rows, counts = prepared(tmp_path, capsys, "--from", sat / "SAT_train.parquet", *flags)
    several = {} if multi_image else {"several images": 1}
    assert counts == {"kept": len(kept), "broken image": 2, "answer not among the options": 1, **several}
    assert rows.column_names == COLUMNS and rows["source_row"][:] == kept
    for row in rows:
        raw = SAT_ROWS[row["source_row"]]
        assert (row["question"], row["answer"]) == (raw["question"], raw["correct_answer"])
        assert sorted(row["options"]) == sorted(raw["answers"])
        assert sizes(row) == [Image.open(io.BytesIO(image)).size for image in raw["image_bytes"]]
    data = prepare_sat.TrainingData(tmp_path)
    data.keep_fitting("base", *processors, 1024)
    assert data.kept == list(range(len(kept))) and sizes(data[0]) == [(84, 56)]


def test_options_are_shuffled_with_a_seed_and_the_limit_counts_kept_rows():
    columns = prepare_sat.choose_columns("SAT", SAT_SCHEMA.names)
    parse = lambda row: prepare_sat.parse_row(row, columns, None, "text")
    convert = lambda rows, *more, **how: list(prepare_sat.convert(rows, parse, {}, *more, **how))
    places = lambda seed: [row["options"].index("3") for row in convert([SAT_ROWS[0]] * 100, seed=seed)]
    assert places(0) == places(0) != places(1) and min(Counter(places(0))[i] for i in range(5)) > 5
    assert len(convert(SAT_ROWS * 3, 3)) == 3


CHAIN = "<think>\nTwo legs, \"four\" ...\n</think>\n\n<answer> Final Answer:B </answer>"


def chat(question="<image>\nWhich?", completion=CHAIN, image="a.png", user="user", assistant="assistant"):
    return {"conversations": [{"from": user, "value": question}, {"from": assistant, "value": completion}],
            "images": [image] if isinstance(image, str) else image}


@pytest.fixture
def pictures(tmp_path):
    """A folder with a.png, sub/b.jpg, broken.png and a link to a picture outside of it."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for path, data in {"a.png": encoded(picture(56, 84), "PNG"), "sub/b.jpg": ONE, "broken.png": HALF_A_JPEG,
                       "../secret.png": ONE}.items():
        (folder / path).write_bytes(data)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    return folder


GOOD_CHATS = [  # row, question, answer
    (chat(), "Which?", "B"),
    (chat("Which <image> of\n<image>\nthem?", user="human", assistant="gpt"), "Which of them?", "B"),
    (chat(image="./sub/../sub/b.jpg"), "Which?", "B"),
    (chat(completion="<think></think> <answer>two\nchairs</answer>\n"), "Which?", "two\nchairs"),
    ({"conversations": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": CHAIN}],
      "image": "a.png"}, "Which?", "B")]  # LLaVA-CoT's half of Vision-R1-cold has `image`
BAD_CHATS = {
    "odd shape": ["no dict", {}, {"conversations": None}, {"conversations": ["Hello", CHAIN]}, None, 3,
                  chat(completion=["?"])],
    "not one question and one reply": [
        {"conversations": []}, {"conversations": chat()["conversations"] * 2, "images": ["a.png"]},
        chat(user="system"), chat(user="assistant", assistant="user"), chat(user=[])],
    "not one <think> and one <answer> block": [chat(completion=text) for text in (
        "", None, "<answer>B</answer>", "<think>B", "<think>B</think><answer> </answer>", CHAIN + " Yes.")],
    "broken text": [chat(completion=CHAIN.replace("legs", "\ud83d"))],
    "its own answer would earn no reward": [chat(completion="<think></think><answer>Final Answer: </answer>")],
    "empty question": [chat("<image>\n ")], "no image": [chat(image=[]), chat(image=None)],
    "missing image": [chat(image=name) for name in ("none.png", "sub", "", "nul\0.png", "x" * 5000, [3])],
    "image outside its folder": [chat(image=name) for name in (
        "../secret.png", "/etc/hostname", "link.png", "sub/../../secret.png")],
    "broken image": [chat(image="broken.png")], "several images": [chat(image=["a.png", "sub/b.jpg"])]}


@pytest.mark.parametrize("layout", ["list", "lines"])
def test_chains_are_kept_or_skipped_for_a_reason(layout, pictures, tmp_path, capsys):
    rows = [row for row, *_ in GOOD_CHATS] + [row for bad in BAD_CHATS.values() for row in bad]
    file = pictures / "chains.json"
    file.write_text(json.dumps(rows, indent=1) if layout == "list" else "\n\n".join(map(json.dumps, rows)))
    found, counts = prepared(tmp_path, capsys, "--from", file)
    assert counts == {"kept": len(GOOD_CHATS), **{reason: len(bad) for reason, bad in BAD_CHATS.items()}}
    assert found.column_names == [*COLUMNS, "completion"]
    assert sizes(found[2]) == [(84, 56)] and sizes(found[0]) == [(56, 84)]
    for row, (_, question, answer) in zip(found, GOOD_CHATS):
        assert (row["question"], row["answer"], row["options"]) == (question, answer, [])
    assert found[0]["completion"] == CHAIN and g.format_reward(CHAIN) == 1
    again, counts = prepared(tmp_path / "again", capsys, "--from", tmp_path / "train.parquet")
    assert counts == {"kept": len(GOOD_CHATS)} and again.to_list() == found.to_list()


OF_IMAGE, OF_BYTES = datasets.Image(), datasets.Value("binary")


def test_images_of_your_own_data_may_have_any_usual_form(pictures, tmp_path, capsys):
    text, struct = datasets.Value("string"), {"bytes": OF_BYTES, "path": datasets.Value("string")}
    kinds = [(OF_IMAGE, {"bytes": ONE, "path": "gone.jpg"}), (datasets.List(OF_IMAGE), [{"bytes": ONE, "path": None}]),
             (OF_BYTES, ONE), (datasets.List(OF_BYTES), [ONE]), (struct, {"bytes": None, "path": "sub/b.jpg"}),
             (text, "sub/b.jpg"), (datasets.List(text), ["sub/b.jpg"])]
    for other in pictures.glob("*.png"):  # `datasets` takes a folder of mostly pictures for another kind
        other.unlink()
    for i, (kind, value) in enumerate(kinds):
        rows = [{"image": value, "problem": "<image>Which?", "solution": "this"}] * 3
        data = datasets.Dataset.from_list(rows, datasets.Features(image=kind, problem=text, solution=text))
        data.to_parquet(pictures / "train.parquet")
        for source in pictures / "train.parquet", pictures:
            found, counts = prepared(tmp_path / f"own-{i}-{source.name}", capsys, "--from", source)
            assert counts == {"kept": 3} and found.column_names == COLUMNS
            assert all(sizes(row) == [(84, 56)] for row in found)
            assert (found[0]["question"], found[0]["answer"], found[0]["options"]) == ("Which?", "this", [])


NAN = float("nan")
# a column of answers, the options of each row, how it is read, and what each row becomes (None: skipped)
READINGS = [
    (["two", " Two "], ["one", "two"], "text", ["two", "two"]),
    (["B", "(b)", "A."], ["one", "two"], "letter", ["two", "two", "one"]),
    ([0, 1, 2.0, 3], ["one", "two", "three"], "index", ["one", "two", "three", None]),
    ([2, 3.0, 5], [2, 3, 5], "text", ["2", "3", "5"]),
    ([2.0, 3], [1.0, 2.0, 3.0], "text", ["2", "3"]),
    (["A", "b", "the left one"], ["b", "a", "the left one"], "text", ["a", "b", "the left one"]),
    ([1, 2], ["1", "2", "3"], None, None),                # text or index?
    ([1, 2], ["1", "2", "3"], "--answers index", ["2", "3"]),
    (["A", "B"], ["b", "a"], None, None),                 # text or letter?
    (["A", "B"], ["b", "a"], "--answers letter", ["b", "a"]),
    ([NAN, 1.0], ["x", "y"], "index", [None, "y"]),
    (["B", "D", "B. dog"], ["A. cat", "B. dog", "C. hen", "D. cow"], "letter", ["dog", "cow", None]),
    (["C", "A"], ["cat", "dog", "both A and B"], "letter", ["both A and B", "cat"]),
    (["none of the above", "cat"], ["cat", "dog", "none of the above"], "text", ["none of the above", "cat"]),
    (["<answer> 3 </answer>", "4"], None, None, ["3", "4"]),
    ([7, 0.5, NAN, None, True], None, None, ["7", "0.5", None, None, "True"]),
]


@pytest.mark.parametrize("answers, options, reading, becomes", READINGS)
def test_answers_are_read_as_the_column_means_them(answers, options, reading, becomes, pictures, tmp_path, capsys):
    rows = [{"image": "a.png", "question": "Which?", "answer": answer, "options": options} for answer in answers]
    (pictures / "own.json").write_text(json.dumps(rows * 9))
    flags = ["--from", pictures / "own.json", *(reading or "").split()[:2 * (reading or "-")[0:1].count("-")]]
    if becomes is None:
        with stops("--answers"):
            prepared(tmp_path / "own", capsys, *flags)
        return
    found, counts = prepared(tmp_path / "own", capsys, *flags)
    expected = [(i, text) for i, text in enumerate(becomes * 9) if text is not None]
    assert list(zip(found["source_row"], found["answer"])) == expected and counts["kept"] == len(expected)
    orders = Counter(tuple(row["options"]) for row in found)
    ordered = options and any(" and B" in str(option) or "of the above" in str(option) for option in options)
    assert (len(orders) == 1) == (options is None or bool(ordered))
    for row in found:  # the row's own answer earns 1, and so does the letter that a reader sees before it
        place = row["options"].index(row["answer"]) if row["options"] else 0
        for said in row["answer"], *["ABCD"[place]] * bool(row["options"] and "a" not in row["options"]):
            completion = f"<think></think><answer>{said}</answer>"
            assert g.accuracy_reward(completion, row["answer"], row["options"]) == 1


def test_a_question_that_letters_its_options_keeps_their_order(pictures, tmp_path, capsys):
    row = {"image": "a.png", "question": "Which?\n(A) cat (B) dog", "answer": "B", "options": ["cat", "dog"]}
    (pictures / "own.jsonl").write_text("\n".join([json.dumps(row)] * 40))
    found, _ = prepared(tmp_path / "own", capsys, "--from", pictures / "own.jsonl")
    assert all(row["options"] == ["cat", "dog"] and row["answer"] == "dog" for row in found) and len(found) == 40


def deep(mode, values, format):
    image = Image.new(mode, (60, 60))
    image.putdata([values[x // 20] for _ in range(60) for x in range(60)])
    return encoded(image, format)


def test_what_is_kept_can_be_trained_on(pictures, tmp_path, capsys):
    tags = struct.pack("<HHHIIHHIII", 2, 0x0112, 3, 1, 6, 0x011A, 2, 5, 26, 0)  # turned; a resolution of text
    picture(60, 60).save(pictures / "exif.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0" + tags)
    for name, size in ("long.png", (402, 2)), ("edge.png", (400, 2)):
        picture(*size).save(pictures / name)
    (pictures / "grey.png").write_bytes(deep("I;16", [0, 30000, 60000], "PNG"))
    (pictures / "float.tif").write_bytes(deep("F", [0.0, 0.5, 1.0], "TIFF"))
    row = dict(question="Which?", answer="this")
    rows = [row | dict(image=name) for name in ("a.png", "long.png", "edge.png", "grey.png", "float.tif", "exif.jpg")]
    rows += [row | dict(image="a.png", question=f"What is {token}?") for token in ("<|image_pad|>", "<|im_end|>")]
    (pictures / "own.json").write_text(json.dumps(rows))
    found, counts = prepared(tmp_path / "own", capsys, "--from", pictures / "own.json")
    assert counts == {"kept": 4, "broken image": 2, "a special token in the question": 2}
    data = prepare_sat.TrainingData(tmp_path / "own")
    for number in 2, 3:  # scaled, not white or black
        image = data[number]["images"][0]
        near = [abs(image.getpixel((x, 30))[0] - grey) < 12 for x, grey in ((5, 0), (30, 127), (55, 255))]
        assert image.mode == "RGB" and all(near)
    with stops("own", "exists"):  # another data set is not written over it
        prepared(tmp_path / "own", capsys, "--from", pictures / "own.json")


def test_images_are_seen_upright_and_transparency_is_white():
    image = Image.new("RGB", (40, 24), "red")
    image.paste("blue", (0, 0, 20, 12))
    near = lambda one, other: max(abs(a - b) for a, b in zip(one, other)) < 40
    corners = lambda x: [x.getpixel((2, 2)), x.getpixel((x.width - 3, 2)), x.getpixel((2, x.height - 3))]
    stored = Image.open(io.BytesIO(turned(image)))
    seen = prepare_sat.upright(stored)
    assert stored.size == (24, 40) and seen.size == image.size and seen.mode == "RGB"
    assert all(map(near, corners(seen), corners(image)))
    assert not all(map(near, corners(stored.rotate(180)), corners(image)))
    clear = image.convert("RGBA")
    clear.putalpha(Image.new("L", image.size, 0))
    assert prepare_sat.upright(clear).getpixel((2, 2)) == (255, 255, 255)
    for mode in "L", "P", "LA", "RGBA", "1", "CMYK":
        assert near(prepare_sat.upright(image.convert(mode)).getpixel((30, 20)),
                    image.convert(mode).convert("RGB").getpixel((30, 20)))


def test_your_own_data_and_geometry_train(pictures, train, tmp_path, capsys):
    rows = [{"img": "a.png", "q": "Which?", "label": "(B)", "choices": ["this", "that"], "kind": "mine"},
            {"img": "../secret.png", "q": "Which?", "label": "A", "choices": ["this", "that"]}, "odd",
            {"img": ["sub/b.jpg", "a.png"], "q": "Which?", "label": "A", "choices": [1, 2], "chain": CHAIN}]
    (pictures / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = "images=img,question=q, answer=label,question_type=kind"
    flags = ["--from", pictures / "own.jsonl", "--multi_image", "--columns"]
    found, counts = prepared(tmp_path / "own", capsys, *flags, columns)
    assert counts == {"kept": 2, "image outside its folder": 1, "odd shape": 1}
    assert found["source_row"][:] == [0, 3] and found["answer"][:] == ["that", "1"]
    train(tmp_path / "run", "--data", tmp_path / "own", "--max_steps", 1)
    found, counts = prepared(tmp_path / "chains", capsys, *flags, columns + ",completion=chain,options=")
    assert counts["empty completion"] == 1 and found["options"][:] == [[]] and found["completion"][:] == [CHAIN]
    # Vision-R1-rl is laid out as geometry3k: images, problem, answer in LaTeX
    text = datasets.Value("string")
    features = datasets.Features(images=datasets.List(OF_IMAGE), problem=text, answer=text)
    geometry = [{"images": [{"bytes": ONE, "path": None}], "problem": "<image>Find x.", "answer": "2 \\sqrt { 221 }"}]
    datasets.Dataset.from_list(geometry * 3, features).to_parquet(tmp_path / "rl.parquet")
    found, counts = prepared(tmp_path / "rl", capsys, "--from", tmp_path / "rl.parquet")
    assert counts == {"kept": 3} and found[0]["answer"] == "2 \\sqrt { 221 }" and found[0]["question"] == "Find x."
    train(tmp_path / "r1", "--data", tmp_path / "rl", "--max_steps", 1, "--rewards", "hard,math,letters")


def test_data_that_cannot_be_prepared_stops(sat, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw, less = sat / "SAT_train.parquet", tmp_path / "less.parquet"
    pq.write_table(pq.read_table(raw).drop_columns(["question"]), less)
    for name, text in {"list.json": '[{"a": 1},\n{"b" 2}]', "lines.jsonl": '{"a": 1}\n\n{"b": 2', "none.json": "[]",
                       "chain.json": json.dumps([chat(image="none.png")])}.items():
        (tmp_path / name).write_text(text)
    for flags, words in {
            f"{pictures}/a.png": "a.png Parquet", "less.parquet": "less.parquet question image_bytes, answers",
            "less.parquet --columns answer=label": "answer=label image_bytes",
            "less.parquet --columns reply=answers": "reply=answers question_type",
            "less.parquet --columns answer": "--columns OURS=THEIRS", f"{raw} --columns answer=": "answer=NAME",
            "none/here": "none/here hub", "none.jsonl": "none.jsonl", "list.json": "list.json line 2 column",
            "lines.jsonl": "line 3", "none.json": "none.json (none)", "chain.json": "chain.json no row",
            f"{raw} --columns answer=question": "SAT_train.parquet no row", f"{raw} --limit 0": "--limit 0"}.items():
        with stops(*words.split()):
            prepare_sat.main(["--from", *flags.split(), "--out", "out"])
    with stops("/proc/none", "written"):
        prepare_sat.main(["--from", str(raw), "--out", "/proc/none"])
    assert not list(tmp_path.glob("out/*")) and not (tmp_path / "data").exists()


def test_data_that_is_no_training_data_stops(train, sat, processors, tmp_path):
    (tmp_path / "text.parquet").write_text("question,answer\n")
    pq.write_table(pq.read_table(sat / "train.parquet").drop_columns(["options"]), tmp_path / "less.parquet")
    for path, word in {tmp_path / "text.parquet": "Parquet", tmp_path / "less.parquet": "'options'",
                       sat / "SAT_train.parquet": "no column"}.items():
        with stops(path.name, word):
            train(tmp_path / "run", "--data", path)
    row = dict(images=[dict(bytes=ONE, path=None)], question="Which?", options=["a", "b"], answer="b")
    bad = {"answer is not": dict(answer="c"), "is empty": dict(question=""), "cannot be read": dict(
        images=[dict(bytes=b"x", path=None)]), "no image": dict(images=[]), "<|image_pad|>": dict(
            question="Which <|image_pad|>?")}
    for words, change in bad.items():
        write_rows(tmp_path / "bad.parquet", [row, row | change])
        with stops(words, "row 1"):
            prepare_sat.TrainingData(tmp_path / "bad.parquet").keep_fitting("base", *processors, 1024, need_image=True)
    write_rows(tmp_path / "text.parquet", [row | dict(images=[])])
    text = prepare_sat.TrainingData(tmp_path / "text.parquet")
    text.keep_fitting("base", *processors, 1024)  # one process trains on text alone
    assert text.kept == [0] and text[0]["images"] == []
    with stops("--max_prompt_length 3"):
        text.keep_fitting("base", *processors, 3)
    assert not (tmp_path / "run").exists()


@quick
def test_draw_walks_through_seeded_permutations():
    data = prepare_sat.TrainingData.__new__(prepare_sat.TrainingData)
    data.kept = [3, 1, 4, 15, 9, 2, 6]
    walk = data.draw(0, 0, 35)
    epochs = [walk[i:i + 7] for i in range(0, 35, 7)]
    assert all(sorted(epoch) == sorted(data.kept) for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert walk == data.draw(0, 0, 35) != data.draw(1, 0, 35)
    for size in 1, 2, 5, 10, 16:  # a step, or a rank's share; may cross epochs, or be larger than one
        steps = [data.draw(0, first, min(size, 35 - first)) for first in range(0, 35, size)]
        assert sum(steps, []) == walk
    keys = list(itertools.product((0, 1), ("sample", "epoch"), (0, 1, 11), (0, 1)))  # seed, use, step, rank
    assert len({g.seeded(*key).getrandbits(63) for key in keys}) == len(keys)


# ---- A run -----------------------------------------------------------------------------------------------

def logits_of(world, model, group=2):
    return no_grad_calls(model)(**world.inputs(group, model=model)).logits


@pytest.fixture(scope="session")
def trained(train, cvbench, world, tmp_path_factory):
    """-> the folder of a run, evaluated on the way, and the logits that each model had when it was saved."""
    folder, at_save = tmp_path_factory.mktemp("runs") / "sat", {}

    def save(path, run, *rest, save=g.save, **more):
        at_save[path.name] = logits_of(world, run.sampler)
        save(path, run, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(g, "save", save)
        train(folder, "--eval_steps", "2", "--eval_data", cvbench)
    return folder, at_save


def test_a_run_leaves_its_files_and_logs_every_metric(trained):
    folder, _ = trained
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "fingerprints.json", "metrics.jsonl", "completions.jsonl", "eval.jsonl", "curves.png",
        "rollouts.html", ".lock", "checkpoint-1", "checkpoint-2", "checkpoint-3", "final"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["preset"], config["max_steps"], config["max_pixels"]) == ("sat", 3, 401408)
    metrics = jsonl(folder / "metrics.jsonl", drop="-")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert [m["step"] for m in jsonl(folder / "eval.jsonl")] == [0, 2, 3]
    assert [m["learning_rate"] for m in metrics] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])  # linear, to 0
    for m in metrics:
        assert set("""step loss reward reward_std rewards/accuracy rewards/format completions/mean_length
            completions/clipped_ratio frac_reward_zero_std kl entropy clip_ratio grad_norm learning_rate
            sampler_mismatch seconds/rollout seconds/reference seconds/update""".split()) <= m.keys()
        assert all(math.isfinite(value) for value in m.values())
        assert m["sampler_mismatch"] < 1e-4 and m["clip_ratio"] == 0 and m["grad_norm"] > 0
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[2]["kl"] > 1e-6
    page = (folder / "rollouts.html").read_text()
    assert "&lt;think&gt;" in page and "<think>" not in page and Image.open(folder / "curves.png").width > 500


def test_every_completion_is_logged_with_its_rewards(trained, sat):
    rows = datasets.Dataset.from_parquet(str(sat / "train.parquet"))
    metrics, samples = (jsonl(trained[0] / f"{name}.jsonl") for name in ("metrics", "completions"))
    for step, m in enumerate(metrics):
        mine = samples[8 * step:8 * step + 8]
        reward, length = (torch.tensor([float(s[name]) for s in mine]) for name in ("reward", "length"))
        assert {s["step"] for s in mine} == {m["step"]}
        assert m["reward"] == pytest.approx(reward.mean().item())
        assert m["completions/mean_length"] == pytest.approx(length.mean().item())
        advantages = g.group_advantages(reward, 4).tolist()
        assert [s["advantage"] for s in mine] == pytest.approx(advantages, abs=1e-3)
    for s in samples:
        row = rows[s["row"]]
        assert s["prompt"] == g.row_text(row, "base", None) and s["answer"] == row["answer"]
        parts = [s[f"rewards/{name}"] for name in ("accuracy", "format", "letters")]
        assert (s["reward"], parts[2]) == pytest.approx((sum(parts), letters(**{**row, **s})))
        assert s["completion"].startswith("<think>") and s["completion"].count("<think>") == 1
    assert len(samples) == 24 and {len(rows[s["row"]]["images"]) for s in samples} == {1, 2}


@pytest.mark.parametrize("name", ["checkpoint-1", "checkpoint-3", "final"])
def test_checkpoints_reload_with_identical_logits(name, trained, world, model_dir):
    folder, at_save = trained[0] / name, trained[1]
    again = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    assert (logits_of(world, again) - at_save[name]).abs().max() < 1e-4  # Conv3d rounds otherwise
    assert torch.equal(logits_of(world, g.fast_vision(again)), at_save[name])
    assert weights_of(folder).keys() == weights_of(Path(model_dir)).keys()
    tokenizer, image_processor = g.load_processors(folder)
    assert image_processor.size["longest_edge"] == 401408
    assert tokenizer.chat_template == eval_cvbench.SERVED_PROMPT  # a server asks as it was trained
    assert tokenizer(g.TEMPLATES["base"]).input_ids == world.tokenizer(g.TEMPLATES["base"]).input_ids
    assert len(json.loads((folder / "generation_config.json").read_text())["eos_token_id"]) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_trains_saves_evaluates_and_answers(family, model_dirs, train, cvbench, tmp_path, capsys):
    flags = ["--model_name_or_path", model_dirs[family], "--max_pixels", 12000, "--max_steps", 2]
    train(tmp_path / "grpo", *flags, "--max_steps", 1)
    train(tmp_path / "grpo", *flags, "--resume")
    metrics = jsonl(tmp_path / "grpo/metrics.jsonl")
    assert len(metrics) == 2 and all(m["sampler_mismatch"] < 1e-4 and m["grad_norm"] > 0 for m in metrics)
    train(tmp_path / "sft", *flags, "--algorithm", "sft", "--freeze", "vision")
    assert jsonl(tmp_path / "sft/metrics.jsonl")[1]["nll"] < jsonl(tmp_path / "sft/metrics.jsonl")[0]["nll"] * 1.5
    before, after, sft = (weights_of(path) for path in (
        Path(model_dirs[family]), tmp_path / "grpo/final", tmp_path / "sft/final"))
    assert before.keys() == after.keys() == sft.keys()
    moved = lambda trained: {name for name in before if not torch.equal(before[name].float(), trained[name])}
    assert len(moved(after)) > 0.9 * len(before) and not any("visual" in name for name in moved(sft))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "grpo/final")
    assert not model.lm_head.weight.isnan().any() and model.config.model_type == family
    picture(84, 56).save(tmp_path / "a.png")
    flags = f"--model {tmp_path}/grpo/final --max_new_tokens 4".split()
    eval_cvbench.main([*flags, "--data", str(cvbench), "--output_dir", str(tmp_path / "results")])
    assert len(next((tmp_path / "results").glob("*/answers.jsonl")).read_text().splitlines()) == 5
    capsys.readouterr()
    eval_cvbench.main([*flags, "--ask", "Which?", "--image", str(tmp_path / "a.png")])
    assert "cut off" in capsys.readouterr().out


def test_another_kind_of_model_and_broken_ones_stop(model_dir, train, tmp_path, monkeypatch):
    def broken(name, *words):
        with stops(tmp_path / name, *words):
            train(tmp_path / "run", "--model_name_or_path", tmp_path / name)
    for name in "gpt2", "lfs", "less":
        shutil.copytree(model_dir, tmp_path / name)
    config = json.loads((tmp_path / "gpt2/config.json").read_text())
    (tmp_path / "gpt2/config.json").write_text(json.dumps(config | dict(model_type="llava")))
    broken("gpt2", "llava", "Qwen2-VL, Qwen2.5-VL, Qwen3-VL")
    (tmp_path / "lfs/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    broken("lfs", "cannot load")
    weights = weights_of(tmp_path / "less")
    del weights["visual.patch_embed.proj.weight"]
    save_file(weights, tmp_path / "less/model.safetensors", metadata={"format": "pt"})
    broken("less", "patch_embed")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with stops("ACCELERATE_USE_DEEPSPEED"):
        train(tmp_path / "run")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # is not heeded
    train(tmp_path / "run", "--max_steps", 1)
    assert jsonl(tmp_path / "run/metrics.jsonl")[0]["sampler_mismatch"] < 1e-4


def test_beta_0_loads_no_reference_and_later_iterations_clip(train, tmp_path, monkeypatch):
    called = Counter()
    for name in "load_model", "sample":
        def counted(*args, name=name, do=getattr(g, name), **more):
            called[name] += 1
            return do(*args, **more)
        monkeypatch.setattr(g, name, counted)
    train(tmp_path / "a", *"""--beta 0 --max_steps 2 --num_iterations 3 --learning_rate 0.01
        --epsilon 0.05""".split())
    assert called == dict(load_model=1, sample=2)
    assert all(m["kl"] == 0 and m["clip_ratio"] > 0 and m["sampler_mismatch"] < 1e-4
               for m in jsonl(tmp_path / "a/metrics.jsonl"))
    for norm in "0", "1e9", "1e-9":
        train(tmp_path / norm, "--max_steps", 1, "--max_grad_norm", norm, "--rewards", "letters")
    assert called == dict(load_model=7, sample=5)
    assert same_weights(tmp_path / "0/final", tmp_path / "1e9/final")  # 0: never clipped
    assert not same_weights(tmp_path / "0/final", tmp_path / "1e-9/final")


def test_grpo_without_thinking_takes_the_whole_completion_as_the_answer(train, sat, tmp_path):
    write_rows(tmp_path / "train.parquet", [dict(images=[dict(bytes=ONE, path=None)], question="Which?", options=[],
                                                 answer=letter, question_type=None, source_row=i)
                                            for i, letter in enumerate("abcdefgh")])
    train(tmp_path / "run", "--prompt", "base-direct", "--rewards", "accuracy", "--max_completion_length", 1,
          "--num_generations", 60, "--data", tmp_path)
    samples = jsonl(tmp_path / "run/completions.jsonl")
    assert all(s["prompt"].endswith("Assistant: ") and "<think>" not in s["completion"] for s in samples)
    right = [s["completion"].strip().lower() == s["answer"] for s in samples]
    assert [s["rewards/accuracy"] for s in samples] == right and any(right)


# ---- Stopping and going on -------------------------------------------------------------------------------

def test_two_stages_are_one_run_and_resuming_is_bit_equal(train, tmp_path, capsys):
    one = "--lr_scheduler_type constant --max_steps 2 --max_completion_length 3 --num_generations 2".split()
    two = "--resume --max_steps 4 --max_completion_length 9 --num_generations 4".split()
    train(tmp_path / "whole", *one, *two)  # --resume with nothing there begins from the start
    assert "begins from the start" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    train(tmp_path / "whole", *one)
    run = ["--output_dir", str(tmp_path / "whole")]
    g.main([*two, *run])  # the run's other settings come from its config.json
    samples = [[], [], [], []]
    for s in jsonl(tmp_path / "whole/completions.jsonl"):
        samples[s["step"] - 1].append(s)
    assert [len(found) for found in samples] == [4, 4, 8, 8]
    assert [max(s["length"] for s in found) > 3 for found in samples] == [False, False, True, True]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for name in "checkpoint-4", "final":
        shutil.rmtree(tmp_path / "again" / name)
    (tmp_path / "again/checkpoint-9.tmp").mkdir()  # what a run leaves that is killed while it saves
    (tmp_path / "again/metrics.jsonl").open("a").write('{"step": 99, "half a li')
    g.main([*two, "--output_dir", str(tmp_path / "again")])
    assert same_run(tmp_path / "whole", tmp_path / "again")
    assert not same_weights(tmp_path / "again/final", tmp_path / "again/checkpoint-3")
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "whole").rglob("*"))
    for steps in "4", "3":
        with pytest.raises(SystemExit) as stop:
            g.main(["--resume", *run, "--max_steps", steps])
        assert stop.value.code == 0 and "4 steps" in capsys.readouterr().out
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "whole").rglob("*")) == before


def test_a_run_goes_on_only_as_it_began(train, sat, model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, tmp_path / "model")
    shutil.copytree(sat, tmp_path / "data")
    for steps, more in (2, ["--output_dir", "run", "--model_name_or_path", "model", "--data", "data"]), (3, []):
        train(tmp_path / "run", "--max_steps", steps, *more) if more else None
    monkeypatch.chdir(tmp_path / "data")  # paths in config.json are absolute
    go_on = ["--resume", "--output_dir", str(tmp_path / "run"), "--max_steps"]
    g.main([*go_on, "3"])
    rows = pq.read_table(sat / "train.parquet")
    for table in rows.slice(1), pa.concat_tables([rows.slice(1), rows.slice(0, 1)]):  # fewer; others, as many
        pq.write_table(table, tmp_path / "data/train.parquet")
        with stops("another data"):
            g.main([*go_on, "4"])
    shutil.copy(sat / "train.parquet", tmp_path / "data")
    weights = weights_of(tmp_path / "model")
    save_file({name: 2 * x for name, x in weights.items()}, tmp_path / "model/model.safetensors",
              metadata={"format": "pt"})
    with stops("another model"):
        g.main([*go_on, "4"])
    shutil.copy(Path(model_dir) / "model.safetensors", tmp_path / "model")
    config = json.loads((tmp_path / "run/config.json").read_text())
    write = lambda **more: (tmp_path / "run/config.json").write_text(json.dumps(config | more))
    write(stages="100x20x3")  # settings of an earlier version
    with stops("stages", "100x20x3"):
        g.main([*go_on, "4"])
    write(stages=None, overwrite=True, weight_decay=0.0, min_pixels=3136)
    g.main([*go_on, "4"])
    said = capsys.readouterr().out
    assert all(f"{name} is no longer a setting" in said for name in ("stages", "overwrite", "weight_decay"))
    for folder in "run/checkpoint-3", "data":
        with stops("--resume", "config.json"):
            g.main(["--resume", "--output_dir", str(tmp_path / folder)])
    (tmp_path / "run/config.json").write_text(json.dumps(config)[:99])
    with stops("--resume", "config.json"):
        g.main([*go_on, "9"])
    write()
    shutil.rmtree(tmp_path / "run/checkpoint-4/state")
    with stops("checkpoint-4", "state/"):
        g.main([*go_on, "9"])


def test_a_folder_belongs_to_one_run(train, tmp_path, monkeypatch):
    monkeypatch.setattr(g, "RUNS", tmp_path / "runs")
    claims = [g.claim(g.Config()) for _ in range(3)]  # all at once
    assert [folder.name for folder, _ in claims] == ["toy", "toy-2", "toy-3"]
    (claims[0][0] / "config.json").write_text("{}")
    del claims
    assert g.claim(g.Config())[0].name == "toy-2"  # a run that was killed before it began leaves nothing to clean
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with stops(tmp_path / "mine", "not empty"):
        train(tmp_path / "mine")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"notes.txt"}
    folder, lock = g.claim(g.Config(output_dir=str(tmp_path / "one")))
    code = f"import grpo_vision as g; g.claim(g.Config(output_dir={str(folder)!r}, resume=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=g.HERE, capture_output=True, text=True)
    assert done.returncode == 1 and "in use" in done.stderr


def test_a_run_that_was_stopped_and_killed_ends_as_if_it_had_not_been(train, tmp_path, monkeypatch):
    flags = "--max_steps 14 --save_steps 3 --rewards accuracy,format,length".split()
    train(tmp_path / "whole", *flags)
    folder, argv = tmp_path / "run", []
    with monkeypatch.context() as patch:
        patch.setattr(g, "main", argv.extend)
        train(folder, *flags)

    def interrupt(number, *argv):
        """Start, send the signal when two more steps are logged -> exit code, what was printed."""
        log = folder / "metrics.jsonl"
        logged = lambda: len(jsonl(log, drop="-")) if log.exists() and log.read_text().endswith("\n") else 0
        process = subprocess.Popen([sys.executable, g.__file__, *argv], stdout=subprocess.PIPE, text=True)
        first = None
        while process.poll() is None and (first is None or logged() < first + 2):
            first = logged() if first is None or logged() < first else first  # resuming cuts the log
            time.sleep(0.05)
        process.send_signal(number)
        return process.communicate()[0], process.returncode

    resume = "--resume", "--output_dir", str(folder)
    said, code = interrupt(signal.SIGINT, *argv)
    assert code == 0 and f"--resume --output_dir {folder}" in said
    assert g.checkpoints(folder)[-1].name == f"checkpoint-{len(jsonl(folder / 'metrics.jsonl'))}"
    assert interrupt(signal.SIGKILL, *resume)[1] == -signal.SIGKILL
    said, code = interrupt(signal.SIGTERM, *resume)
    assert code == 0 and not (folder / "final").exists()
    g.main([*resume, "--save_total_limit", "2"])
    assert same_run(tmp_path / "whole", folder)
    assert [path.name for path in g.checkpoints(folder)] == ["checkpoint-12", "checkpoint-14"]


@pytest.mark.parametrize("room", [0.5, 1.5], ids=["weights", "state"])
def test_a_save_that_fails_says_so_and_leaves_the_last_checkpoint_whole(room, train, tmp_path, monkeypatch):
    run, resource = tmp_path / "run", pytest.importorskip("resource")

    def save_on_a_full_disk(folder, *rest, save=g.save, **more):
        size = (run / "checkpoint-1/model.safetensors").stat().st_size if "checkpoint-2" in str(folder) else 0
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(room * size) if size else limit[0], limit[1]))
        try:
            save(folder, *rest, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    said = stops("checkpoint-2 could not be saved", "whole", "--resume")
    with monkeypatch.context() as patch, said:
        patch.setattr(g, "save", save_on_a_full_disk)
        train(run)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]  # and no .tmp
    (run / ".lock").unlink()  # this process still lives, and holds it
    train(run, "--resume")
    assert [m["step"] for m in jsonl(run / "metrics.jsonl")] == [1, 2, 3] and (run / "final").exists()


def test_what_cannot_be_drawn_does_not_stop_training(train, tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "text.parquet", [dict(images=[], question=f"{i}?", options=["a", "b"], answer="a",
                                                question_type=None, source_row=i) for i in range(4)])
    train(tmp_path / "run", "--data", tmp_path / "text.parquet", "--eval_steps", 1)  # rows without a picture
    assert "warning" not in capsys.readouterr().err and (tmp_path / "run/rollouts.html").exists()
    monkeypatch.setattr(eval_cvbench, "draw_curves", lambda *_: 1 / 0)
    train(tmp_path / "other", "--max_steps", 1)
    assert "ZeroDivisionError" in capsys.readouterr().err and (tmp_path / "other/checkpoint-1").exists()


# ---- One process or many ---------------------------------------------------------------------------------

# grpo_vision.py in float64, its completions drawn prompt by prompt, so that they are the same however the
# prompts are shared out; those of one question are much longer. update's results are kept for comparison.
WORKER = """
import os, sys, torch
import grpo_vision as g
from torch.distributed.tensor import DTensor

load_model, sample, update, folder = g.load_model, g.sample, g.update, sys.argv.pop(1)
whole = lambda x: x.full_tensor() if isinstance(x, DTensor) else x
calls, tokenizers = [], []

def in_double(path, tokenizer, attn_implementation="sdpa", dtype=None):
    tokenizers.append(tokenizer)
    return load_model(path, tokenizer, attn_implementation, torch.float64)

def sample_each(model, passes, G, C, temperature, generator):
    found = []
    for prompts in passes:  # one prompt each: --encode_tokens 1
        text = tokenizers[0].decode(prompts.input_ids[0])
        generator = torch.Generator().manual_seed(int(prompts.input_ids.sum()) + len(calls))
        found.append(sample(model, [prompts], G, C if "chairs" in text else 3, temperature, generator))
    pad = lambda name: torch.nn.utils.rnn.pad_sequence(
        [row for one in found for row in getattr(one, name)], batch_first=True)
    return g.Rollout(pad("completion_ids"), pad("completion_mask"), pad("sampling_logps"),
                     torch.cat([one.finished for one in found]))

def update_and_keep(policy, passes, *rest):
    logps, sums = update(policy, passes, *rest)
    sharded = "--cpu_offload" in sys.argv or torch.distributed.get_world_size() > 1
    assert all(isinstance(x, DTensor) == sharded for x in policy.parameters())
    keys = [tokenizers[0].decode(prompts.input_ids[0]) for prompts in passes]
    calls.append(dict(logps=dict(zip(keys, logps.chunk(len(keys)))),
                      gradients={name: whole(x.grad).clone() for name, x in policy.named_parameters()}))
    return logps, sums

g.load_model, g.sample, g.update = in_double, sample_each, update_and_keep
g.REWARDS["mine"] = lambda completion, **_: sum(map(ord, completion)) % 7
g.main()
torch.save(calls, f"{folder}-{os.environ['RANK']}.pt")
"""


def launch(processes, script, *flags):
    """Run a script in so many processes on this machine, by torchrun on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
               script, *map(str, flags)]
    return subprocess.run(command, cwd=g.HERE, text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(g.HERE)})


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_two_processes_with_sharded_weights_equal_one(family, model_dirs, train, tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(WORKER)
    flags = f"""--rewards accuracy,format,mine --max_completion_length 40 --score_tokens 30 --max_pixels 20000
        --prompt base --model_name_or_path {model_dirs[family]}""".split()
    runs = {"one": (1, []), "offloaded": (1, ["--cpu_offload", "true"]), "two": (2, [])}
    for name, (processes, more) in runs.items():
        with monkeypatch.context() as patch:
            patch.setattr(g, "main", lambda argv: launch(processes, tmp_path / "worker.py", tmp_path / name, *argv))
            done = train(tmp_path / name, *flags, *more)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("no wrapper" if name == "one" else "FSDP2") in done.stdout
    one, offloaded, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("one-0", "offloaded-0", "two-0", "two-1"))
    assert len(one) == len(two[0]) == len(two[1]) == 3
    error = lambda x, y: ((x - y).norm() / y.norm()).item()
    for step in range(3):
        assert not two[0][step]["logps"].keys() & two[1][step]["logps"].keys()
        for text, logps in one[step]["logps"].items():
            mine = {**two[0][step]["logps"], **two[1][step]["logps"]}[text]
            C = min(logps.shape[1], mine.shape[1])
            assert error(mine[:, :C], logps[:, :C]) < 1e-9
            assert torch.equal(offloaded[step]["logps"][text], logps)
        for name, gradient in one[step]["gradients"].items():
            assert gradient.norm() > 0 and error(two[0][step]["gradients"][name], gradient) < 1e-6, name
            assert torch.equal(offloaded[step]["gradients"][name], gradient)
    assert same_run(tmp_path / "one", tmp_path / "offloaded")
    one, two = (jsonl(tmp_path / folder / "metrics.jsonl") for folder in ("one", "two"))
    assert all(x == pytest.approx(y, rel=1e-6, abs=1e-9) for x, y in zip(one, two, strict=True))
    lengths = Counter(s["length"] > 3 for s in jsonl(tmp_path / "two/completions.jsonl"))
    assert min(lengths.values()) > 2  # the processes had unequal numbers of chunks
    one, two = (weights_of(tmp_path / folder / "final") for folder in ("one", "two"))
    assert "lm_head.weight" not in two and all(error(two[name], one[name]) < 1e-6 for name in one)


def test_the_ways_to_start_give_the_same_bits_on_the_toy_sharded_or_not(tmp_path):
    flags = "--max_steps 2 --prompts_per_step 2 --num_generations 4 --eval_steps 0 --save_steps 1".split()
    python, accelerate = [sys.executable], [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    offload = ["--cpu_offload", "true"]
    starts = {"python": python, "accelerate": [*accelerate, "--num_processes", "1"], "torchrun": torchrun}
    running = [(name + bool(more) * "-offload", subprocess.Popen(
        [*start, g.__file__, *flags, *more, "--output_dir", tmp_path / (name + bool(more) * "-offload")],
        stderr=subprocess.PIPE, text=True)) for name, start in starts.items() for more in ([], offload)]  # at once
    for name, process in running:
        assert process.communicate() and process.returncode == 0, name
        assert same_run(tmp_path / "python", tmp_path / name), name
    assert not same_weights(tmp_path / "python/checkpoint-1", tmp_path / "python/final")


# ---- Evaluation ------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def evaluate(model_dir, cvbench):
    """evaluate(output_dir, *flags): the small model on the small CV-Bench -> {mode: folder with the results}"""
    def run(output_dir, *flags, model=model_dir):
        eval_cvbench.main(["--model", model, "--data", str(cvbench), "--output_dir", str(output_dir),
                           *"--max_new_tokens 6 --batch_size 2".split(), *map(str, flags)])
        return {folder.name.split("--")[2]: folder for folder in Path(output_dir).iterdir()}
    return run


@pytest.fixture(scope="session")
def evaluated(evaluate, tmp_path_factory):
    return evaluate(tmp_path_factory.mktemp("results"), "--modes", "all")


def contents(folder):
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.name != "report.html"}


def test_all_modes_are_asked_in_the_papers_words(evaluate, evaluated, model_dirs, tmp_path, capsys):
    lines = lambda n: "".join(f"\n({'ABCDEF'[j]}) {choice}" for j, choice in enumerate("341205"[:n]))
    user = lambda text: "<|im_start|>user\n" + g.IMAGE_TOKENS + text + "<|im_end|>\n<|im_start|>assistant\n"
    expected = {
        "base-reasoning": lambda q: g.IMAGE_TOKENS + g.TEMPLATES["base"].format(question=q),
        "base-direct": lambda q: g.IMAGE_TOKENS + g.TEMPLATES["base-direct"].format(question=q),
        "instruct-reasoning": lambda q: user(q + "\nOutput the thinking process in <think> </think> and "
                                                 "final answer in <answer> </answer> tags."),
        "instruct-direct": user}
    folders, printed = evaluate(tmp_path, "--modes", "all", model=model_dirs["qwen2_5_vl"]), capsys.readouterr().out
    for word in "Count Relation Depth Distance ADE20K COCO Omni3D total 2D 3D official unparsed".split():
        assert f"| {word} " in printed
    for found, modes in (folders, list(expected)), (evaluated, list(expected)[:2]):
        assert sorted(found) == sorted(modes)
        for mode, folder in found.items():
            assert {path.name for path in folder.iterdir()} == {
                "answers.jsonl", "summary.json", "summary.md", "report.html"}
            records = jsonl(folder / "answers.jsonl")
            assert [(r["id"], r["answer"], len(r["options"])) for r in records] == [
                (0, "4", 2), (1, "4", 3), (2, "4", 6), (3, "4", 4), (4, "4", 5)]
            assert [r["prompt"] for r in records] == [
                expected[mode](CVBENCH_TEXT + lines(len(r["options"]))) for r in records]
            assert all(r["completion"].startswith("<think>") == (mode == "base-reasoning") for r in records)


def test_held_out_and_free_questions_are_asked_as_in_training(sat, world, evaluate, tmp_path):
    rows = datasets.Dataset.from_parquet(str(sat / "train.parquet"))
    questions, tokenizer = eval_cvbench.load_questions(str(sat / "train.parquet")), copy.deepcopy(world.tokenizer)
    tokenizer.chat_template = ROLES
    for q, row in zip(questions, rows, strict=True):
        for template in "base", "instruct":
            asked = eval_cvbench.prompt_text(q, f"{template}-reasoning", tokenizer)
            assert asked == g.row_text(row, template, tokenizer)
        assert (q["answer"], q["options"]) == (row["answer"], row["options"])
    free = dict(options=[], answer="$0.5$", images=[dict(bytes=ONE, path=None)])
    write_rows(tmp_path / "free.parquet", [row | free for row in rows.to_list()])
    folder = evaluate(tmp_path / "results", "--data", tmp_path / "free.parquet")["base-reasoning"]
    assert json.loads((folder / "summary.json").read_text())["scores"]["total"]["chance"] == 0
    record = jsonl(folder / "answers.jsonl")[0] | {"completion": r"<answer> \frac{1}{2} </answer>"}
    assert eval_cvbench.with_verdict(record, False)["correct"]  # without options, by mathematics too


def test_batched_answers_are_those_of_one_at_a_time(cvbench, world):
    questions, model = eval_cvbench.load_questions(str(cvbench)), copy.copy(world.model)
    model.eos_ids = [world.tokenizer.eos_token_id]
    ask = lambda mode, n: sorted(eval_cvbench.answer_questions(
        model, world.tokenizer, world.image_processor, questions, mode, batch_size=n, max_new_tokens=10),
        key=lambda r: r["id"])
    for mode in "base-direct", "base-reasoning":
        one = ask(mode, 1)
        assert one == ask(mode, 3) == ask(mode, 32) and len({r["completion"] for r in one}) > 2


def test_asking_streams_the_sampled_answer(world, model_dir, tmp_path, capsys):
    model = copy.deepcopy(world.model)
    for prompt in world.each:
        ids = eval_cvbench.stream(model, world.tokenizer, prompt, 0, 0.95, 12)
        assert ids.tolist() == g.sample(model, [prompt], 1, 12, 0).completion_ids[0].tolist()
        assert capsys.readouterr().out.strip() == world.tokenizer.decode(ids, skip_special_tokens=True).strip()
    draw = lambda seed: eval_cvbench.stream(model, world.tokenizer, world.each[0], 0.6, 0.95, 12, seed).tolist()
    assert draw(0) == draw(0) != draw(1)  # the model's own generation_config has top_k 1
    picture(84, 56).save(tmp_path / "a.png")
    flags = ["--model", model_dir, "--max_new_tokens", "5"]
    for more, words in (["--ask", "?", "--image", "none.png"], "none.png"), (["--ask", ""], "--ask"), (
            ["--image", "a.png"], "--ask"):
        with stops(words):
            eval_cvbench.main([*flags, *more])
    capsys.readouterr()
    eval_cvbench.main([*flags, "--ask", "Which?", "--image", *[str(tmp_path / "a.png")] * 2])
    assert re.fullmatch(r"<think>.+\n\(cut off: .*\)\n\(no answer block\)\n", capsys.readouterr().out, re.DOTALL)


@quick
def test_a_served_base_model_gets_the_base_prompt(processors):
    tokenizer = copy.deepcopy(processors[0])
    tokenizer.chat_template = eval_cvbench.SERVED_PROMPT
    asked = lambda content: tokenizer.apply_chat_template([{"role": "user", "content": content}],
                                                          tokenize=False, add_generation_prompt=True)
    text = {"type": "text", "text": "Which?\n(A) left"}
    for images in 0, 1, 2:
        expected = g.render(text["text"], images, "base", None)
        assert asked([{"type": "image"}] * images + [text]) == expected
    assert asked(text["text"]) == g.render(text["text"], 0, "base", None)


# answers to 2 + 4 + 5 questions, by hand
HAND = {"ADE20K": [1, 0], "COCO": [1, 1, 1, 0], "Omni3D": [1, 0, 0, 0, 0]}


def answered(verdicts):
    """{source: [right or not]} -> records"""
    return [{"task": "Depth" if source == "Omni3D" else "Count", "source": source, "correct": bool(right),
             "options": list("abcd")[:2 if source == "Omni3D" else 4], "chosen": "a" if right else None,
             "extracted": "(A)" if right else "a", "completion": "<answer>wait</answer>" if right else "",
             "length": 10 + right, "finished": source != "COCO"}
            for source, rights in verdicts.items() for right in rights]


@quick
def test_scores_by_hand():
    scores, half = eval_cvbench.scores_of(answered(HAND)), 500 / 11
    official = 100 * ((1 / 2 + 3 / 4) / 2 + 1 / 5) / 2
    assert {name: s.value for name, s in scores.items()} == pytest.approx(
        {"Count": 400 / 6, "Depth": 20, "ADE20K": 50, "COCO": 75, "Omni3D": 20, "total": half, "2D": 62.5, "3D": 20,
         "official": official})
    assert abs(official - half) > 4  # the two are not one number
    assert [scores[name].chance for name in ("Count", "Depth", "2D", "official")] == [25, 50, 25, 37.5]
    assert scores["total"].chance == pytest.approx(100 * (6 / 4 + 5 / 2) / 11)
    rates = dict(zip("unparsed truncated letters block reflection length".split(),
                     eval_cvbench.rates_of(answered(HAND)).values()))
    assert rates == pytest.approx(dict(unparsed=600 / 11, truncated=400 / 11, letters=100, block=half,
                                       reflection=half, length=10 + 5 / 11))
    eight = eval_cvbench.score_of([(1, [{"correct": i < 8, "options": "ab"} for i in range(10)])])
    assert (eight.low, eight.high) == pytest.approx((49.02, 94.33), abs=0.01)  # Wilson's interval of 8 in 10
    none = eval_cvbench.score_of([(1, [{"correct": False, "options": "ab"}] * 10)])
    assert none.low == 0 and none.high == pytest.approx(27.75, abs=0.01)


@quick
def test_intervals_are_those_of_a_bootstrap_and_the_sign_test_counts_all_ways():
    rng, mean = random.Random(0), lambda some: sum(some) / len(some)
    verdicts = {name: [rng.random() < p for _ in range(n)]
                for name, n, p in (("ADE20K", 150, 0.9), ("COCO", 200, 0.8), ("Omni3D", 300, 0.2))}
    found = eval_cvbench.scores_of(answered(verdicts))["official"]
    again = [{name: mean(rng.choices(some, k=len(some))) for name, some in verdicts.items()} for _ in range(4000)]
    official = sorted(100 * ((x["ADE20K"] + x["COCO"]) / 2 + x["Omni3D"]) / 2 for x in again)
    assert [found.low, found.high] == pytest.approx([official[100], official[3900]], abs=0.6)
    assert abs(found.low - official[400]) > 0.6  # the control: it is not any interval
    pairs = [(True, True)] * 6 + [(False, False)] * 4 + [(True, False)] * 3 + [(False, True)] * 9
    a, b = ([{"correct": pair[i]} for pair in pairs] for i in (0, 1))
    sums = [abs(sum(signs)) for signs in itertools.product((1, -1), repeat=12)]
    assert eval_cvbench.sign_test(a, b) == pytest.approx(sum(s >= 6 for s in sums) / 2**12)
    assert eval_cvbench.sign_test(a, b) == eval_cvbench.sign_test(b, a) and eval_cvbench.sign_test(a, a) == 1


@quick
def test_the_papers_rows_need_the_published_counts():
    of_each = {("Count", "ADE20K"): 633, ("Count", "COCO"): 155, ("Relation", "COCO"): 650,
               ("Depth", "Omni3D"): 600, ("Distance", "Omni3D"): 600}
    records = [{**answered({source: [1]})[0], "task": task} for (task, source), n in of_each.items()
               for _ in range(n)]
    *_, table = eval_cvbench.tables_of(records)
    assert ["base + GRPO", "59.64", "66.76", "54.16", "56.66", "59.47"] in table and len(table) == 9
    assert table[1] == ["here", *["100.00"] * 5] and len(eval_cvbench.tables_of(records[1:])) == 2


def test_a_killed_or_second_start_asks_what_is_missing(evaluate, evaluated, tmp_path, monkeypatch):
    whole, append, asked = contents(evaluated["base-reasoning"]), eval_cvbench.append_jsonl, []

    def killed(path, records):
        append(path, records)
        asked.extend(records)
        if len(asked) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(eval_cvbench, "append_jsonl", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path)
    folder, = tmp_path.iterdir()
    with open(folder / "answers.rank1.jsonl", "w") as file:  # another process, killed in its first line
        file.write(whole["answers.jsonl"][:40])
    for _ in range(2):
        evaluate(tmp_path)
        assert len(asked) == 5 and contents(folder) == whole
    (folder / "answers.jsonl").write_text("{\n" + whole["answers.jsonl"])
    with stops("answers.jsonl, line 1"):
        evaluate(tmp_path)


def test_two_processes_give_the_results_of_one(evaluate, evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_cvbench, "main", lambda argv: launch(2, g.HERE / "eval_cvbench.py", *argv))
    found, one = evaluate(tmp_path)["base-reasoning"], evaluated["base-reasoning"]
    assert found.name == one.name and contents(found) == contents(one)


def test_other_weights_settings_or_questions_have_a_folder_of_their_own(evaluate, evaluated, model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "tiny")
    for flags in ["--max_new_tokens 5", "--limit 3", "--temperature 1", "--temperature 1 --seed 1", "--max_pixels 9999"]:
        evaluate(tmp_path / "results", *flags.split())
    evaluate(tmp_path / "results", model=str(tmp_path / "tiny"))
    weights = weights_of(tmp_path / "tiny")
    weights["model.norm.weight"][3] += 1  # one weight of a retrained model in the same folder
    save_file(weights, tmp_path / "tiny/model.safetensors", metadata={"format": "pt"})
    evaluate(tmp_path / "results", model=str(tmp_path / "tiny"))
    names = {folder.name for folder in (tmp_path / "results").iterdir()}
    assert len(names) == 7 and evaluated["base-reasoning"].name not in names


def test_regrading_and_comparing_take_files(evaluated, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_cvbench, "load_model", None)  # none is needed
    a, b, c = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    said = ["The answer is (B)", "<answer>4</answer>", "three", "<answer>A</answer> <answer>4.</answer>", "..."]
    records = [{**r, "completion": text, "correct": None, "chosen": "?"}
               for r, text in zip(jsonl(evaluated["base-direct"] / "answers.jsonl"), said, strict=True)]
    eval_cvbench.write_jsonl(a, records)
    for flags, expected in ([], [True, True, False, True, False]), (["--strict"], [False, True, False, False, False]):
        eval_cvbench.main(["--regrade", str(a), *flags])
        assert [r["correct"] for r in jsonl(a)] == expected and "total" in capsys.readouterr().out
    eval_cvbench.write_jsonl(b, [{**r, "correct": r["id"] > 1} for r in jsonl(a)[1:]])
    eval_cvbench.main(["--compare", str(a), str(b)])
    printed = capsys.readouterr().out
    assert re.search(r"    total +A +25.0 +B +75.0 +B - A \+50.0 .*p = 0.62", printed) and "4 questions; 1" in printed
    eval_cvbench.write_jsonl(c, [{**r, "question": "?"} for r in jsonl(b)])
    for flags, word in (["--compare", a, c], "same questions"), (["--compare", a, tmp_path / "none"], "none"), (
            ["--regrade", tmp_path / "none"], "no answers"):
        with stops(word):
            eval_cvbench.main(list(map(str, flags)))


class Page(HTMLParser):
    """What a browser makes of a page: its tags, in and out, and its text."""
    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.text = [], Counter(), ""
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.open += [tag] if tag not in ("meta", "img", "br") else []
        assert not any(value and value.startswith(("http", "//")) for _, value in attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_pages_are_self_contained_and_show_markup_as_text(cvbench, evaluated, trained, sat, tmp_path):
    evil = "</pre></td></table><script>alert('x')</script><img src=x onerror=alert(1)> & <b> {body} %s"
    questions = eval_cvbench.load_questions(str(cvbench))
    records = [{**r, "completion": evil, "extracted": evil, "task": "Count <i>", "chosen": evil}
               for r in jsonl(evaluated["base-direct"] / "answers.jsonl")]
    for q in questions:
        q["options"] = [*q["options"], evil]
    for most in 2, 25:
        eval_cvbench.write_report(tmp_path, evil, records, questions, str(cvbench), most)
        page = Page(tmp_path / "report.html")
        assert page.tags["img"] == min(5, most) and not page.tags["script"]
    assert page.text.count(evil) >= 16 and not page.tags["b"] and not page.tags["i"]
    data = prepare_sat.TrainingData(sat)
    data.table = data.table.map(lambda row: row | dict(question=evil, answer=evil, options=[evil] * 2))
    (tmp_path / "legend.png").write_bytes(encoded(picture(60, 60), "PNG"))
    data.path = tmp_path / "sat/train.parquet"
    samples = [{**sample, "completion": evil} for sample in jsonl(trained[0] / "completions.jsonl")]
    eval_cvbench.write_jsonl(tmp_path / "completions.jsonl", samples)
    eval_cvbench.write_rollouts(tmp_path, data)
    page, usual = Page(tmp_path / "rollouts.html"), Page(trained[0] / "rollouts.html")
    assert page.text.count(evil) > 24 and len(usual.tags) > 8
    assert page.tags - usual.tags == Counter(img=1, p=1)  # the legend; else the same elements as with harmless text


def test_evaluation_data_with_faults_stops(cvbench, evaluate, tmp_path):
    table = pq.read_table(cvbench / "test_2d.parquet")
    replace = lambda name, values: table.drop_columns([name]).append_column(name, pa.array(values))
    image = lambda broken: replace("image", [{"bytes": broken if i == 1 else ONE, "path": None} for i in range(3)])
    files = {"less": (table.drop_columns(["prompt"]), "'prompt'"), "image": (image(NO_JPEG), "row 1"),
             "letter": (replace("answer", ["(B)", "(D)", "(A)"]), "row 1"), "blank": (image(None), "row 1"),
             "null": (replace("answer", ["(B)", None, "(A)"]), "row 1: answer"),
             "none": (replace("choices", [["3", "4"], None, ["3", "4"]]), "row 1: choices")}
    for name, (content, words) in files.items():
        pq.write_table(content, tmp_path / f"{name}.parquet")
        with stops(name, words):
            evaluate(tmp_path / "results", "--data", tmp_path / f"{name}.parquet")
    assert not list((tmp_path / "results").rglob("answers*"))  # before the first answer
    for flags, words in {"--modes instruct-direct": "--modes instruct-direct, base-reasoning, base-direct",
                         "--temperature -1": "--temperature", "--top_p 0": "--top_p", "--limit 0": "--limit",
                         "--data no/such/file": "no/such/file"}.items():
        with stops(*words.split(", ")):
            evaluate(tmp_path, *flags.split())


# ---- The toy world ---------------------------------------------------------------------------------------

@quick
def test_toy_scenes_are_new_and_answers_true():
    rng, seen, asked = random.Random(0), set(), Counter()
    scenes = [make.draw_scene(rng, seen) for _ in range(300)]
    assert len(set(scenes)) == len(seen) == 300
    for scene in scenes:
        for question in filter(None, (make.ask(scene, kind, rng) for kind in make.TASKS)):
            asked[question.kind] += 1
            assert question.answer in question.options and len(set(question.options)) == len(question.options)
            words = re.findall(r"\w+", question.sat)
            named = sorted((t for t in scene if t.name in words), key=lambda t: words.index(t.name))
            if question.kind == "left or right":
                assert question.answer == ("left" if named[0].column < named[1].column else "right")
            elif question.kind == "above or below":
                assert question.answer == ("above" if named[0].row < named[1].row else "below")
            elif question.kind == "closer":
                assert [t.depth for t in named if t.name == question.answer] == ["near"]
                assert [t.depth for t in named if t.name != question.answer] == ["far"]
            elif question.kind == "count":
                assert question.answer == str(len(named))
            else:  # which of two is fewer steps away from the one that is named first
                far, *two = named
                steps = {t.name: abs(t.row - far.row) + abs(t.column - far.column) for t in two}
                assert question.answer == min(steps, key=steps.get) and len(set(steps.values())) == 2
    assert all(asked[kind] > 30 for kind in make.TASKS)


def test_the_committed_toy_is_what_make_draws():
    rng, seen = random.Random(0), set()
    expected = {"test.parquet": make.sat_rows(512, rng, seen)}
    for name, kinds, sources in make.CVBENCH_FILES:
        expected[f"cvbench/{name}"] = make.cvbench_rows(kinds, name, sources, 96, rng, seen)
    expected["train.parquet"] = make.sat_rows(2048, rng, seen)
    for name, rows in expected.items():
        rows, found = list(rows), pq.read_table(g.TOY / name).to_pylist()  # here rng and seen move on
        assert len(found) == len(rows)
        for mine, theirs in zip(rows[::40], found[::40]):
            assert {k: v for k, v in mine.items() if "image" not in k} == {
                k: v for k, v in theirs.items() if "image" not in k}
            pixels = [Image.open(io.BytesIO((row["images"][0] if "images" in row else row["image"])["bytes"])).tobytes()
                      for row in (mine, theirs)]
            assert pixels[0] == pixels[1]
    assert Image.open(g.TOY / "legend.png").tobytes() == make.paint_legend().tobytes()
    weights = weights_of(g.TOY / "base")
    assert {x.dtype for x in weights.values()} == {torch.bfloat16} and 1e6 < sum(
        x.numel() for x in weights.values()) < 2e6
    assert sum(path.stat().st_size for path in g.TOY.rglob("*") if path.is_file()) < 8e6


@pytest.mark.parametrize("zeroed", [False, True], ids=["rewarded", "control"])
def test_the_toy_learns_from_its_rewards(zeroed, tmp_path, monkeypatch):
    """A control with advantages of 0 stays where it was: it is the reward that teaches."""
    advantages = g.group_advantages
    monkeypatch.setattr(g, "group_advantages", lambda *args: advantages(*args) * (not zeroed))
    g.main(f"""--max_steps 30 --learning_rate 2e-4 --prompts_per_step 8 --eval_steps 0 --beta 0
        --output_dir {tmp_path}/run""".split())
    accuracy = [m["rewards/accuracy"] for m in jsonl(tmp_path / "run/metrics.jsonl")]
    gain = sum(accuracy[-5:]) / 5 - sum(accuracy[:5]) / 5
    assert abs(gain) < 0.1 if zeroed else gain > 0.2


@quick
def test_every_flag_metric_and_file_in_the_readmes_exists(capsys):
    readmes = "".join((g.HERE / name).read_text() for name in ("README.md", "toy/README.md", "bench/README.md"))
    known = set("""--num_processes --num_machines --machine_rank --main_process_ip --main_process_port
        --nproc_per_node --host --port --standalone""".split())  # accelerate's, torchrun's, the servers'
    for program in g.parse_config, eval_cvbench.main, prepare_sat.main:
        with pytest.raises(SystemExit):
            program(["--help"])
    known |= set(re.findall(r"--\w+", capsys.readouterr().out))
    for script in [*g.HERE.glob("bench/*.py"), *g.HERE.glob("toy/*.py")]:
        known |= set(re.findall(r"\W(--\w+)\b", script.read_text()))
    named = set(re.findall(r"(?<![\w-])--[a-z]\w+", readmes))
    assert not named - known and len(named) > 40
    for script in re.findall(r"\b(?:bench/|toy/)?\w+\.py\b", readmes):
        assert script in ("my_run.py",) or any((g.HERE / folder / script).exists() for folder in ("", "bench", "toy"))
