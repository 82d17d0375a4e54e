"""The tests, in the order of grpo_vision.py: `pytest test_grpo.py`. Offline, on the CPU, some minutes.

They write small models of the published layouts, and small files of SAT's and CV-Bench's layouts. Where a
check could pass by accident, the wrong way is computed as well and has to fail it.
"""
import ast
import copy
import doctest
import html
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, create_autospec

SCRATCH = tempfile.TemporaryDirectory()  # set before the imports below, which read these:
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=SCRATCH.name, CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="1")

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

import eval_cvbench
import grpo_vision as g
import prepare_sat
import recipes
sys.path.insert(0, str(g.TOY))
import make

torch.set_num_threads(1)


# ---- Small models in the published layouts ---------------------------------------------------------------

ROLES = ("{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
UNUSED_ROWS = 20  # of the embedding, which no token has
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def write_model(folder, family):
    """A model directory as published, in bfloat16, with a generation_config that would ruin sampling. Only
    Qwen2-VL's chat template has no roles. Weights of std 0.2: with 0.02 wrong positions hardly show."""
    tokenizer = AutoTokenizer.from_pretrained(g.TOY / "base")
    if family != "qwen2_vl":
        tokenizer.chat_template, tokenizer.eos_token = ROLES, "<|im_end|>"
    tokenizer.save_pretrained(folder)
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=len(tokenizer) + UNUSED_ROWS, rope_theta=1e6)
    vision = dict(model_type=family, depth=2, num_heads=2, hidden_size=32, patch_size=14,
                  spatial_merge_size=2, temporal_patch_size=2)
    limits, rope = dict(min_pixels=3136, max_pixels=12845056), dict(type="mrope", mrope_section=[1, 1, 2])
    if family == "qwen2_vl":
        vision |= dict(embed_dim=32, mlp_ratio=2)
    elif family == "qwen2_5_vl":
        vision |= dict(intermediate_size=48, out_hidden_size=32, window_size=112, fullatt_block_indexes=[1])
    else:
        vision |= dict(intermediate_size=48, out_hidden_size=32, patch_size=16, num_position_embeddings=64,
                       deepstack_visual_indexes=[0, 1])
        limits = dict(size=dict(shortest_edge=1024, longest_edge=16777216))
        rope = dict(rope_type="default", mrope_interleaved=True, mrope_section=[2, 1, 1])
        text = dict(text_config=dict(text, model_type="qwen3_vl_text", head_dim=8, rope_scaling=rope))
    toy = json.loads((g.TOY / "base/config.json").read_text())
    config = {name: token for name, token in toy.items() if name.endswith("token_id")} | dict(
        text, model_type=family, tie_word_embeddings=family != "qwen2_5_vl", vision_config=vision, rope_scaling=rope)
    write = lambda name, content: (folder / name).write_text(json.dumps(content))
    write("config.json", config)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    model.bfloat16().save_pretrained(folder)
    write("config.json", config | dict(tie_word_embeddings=True))  # the weights know better
    write("preprocessor_config.json", dict(limits, patch_size=vision["patch_size"]))
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    write("generation_config.json", dict(do_sample=True, temperature=0.01, top_k=1, eos_token_id=ends))
    return str(folder)


def seed(number):
    return torch.Generator().manual_seed(number)


def picture(width, height, seed=0):
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


def changed(namespace, **more):
    return SimpleNamespace(**vars(namespace) | more)


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
        self.pass_, self.two_passes = self.build(range(4)), [self.build([0, 1]), self.build([2, 3], first=2)]
        rollout = self.rollout = g.sample(self.model, [self.pass_], G, 9, 1.0, seed(2))
        # unequal lengths; among the longest are finished ones and such as are cut
        assert len({*rollout.lengths.tolist()}) > 3 and len({*rollout.finished[rollout.lengths == 9].tolist()}) == 2

    def build(self, which, first=0):
        texts, images = ([x[i] for i in which] for x in (self.texts, self.images))
        return g.build_prompts(texts, images, self.tokenizer, self.image_processor, self.model, first)

    def completions(self, rollout=None):
        """-> of each completion the ids without padding"""
        rollout = rollout or self.rollout
        return [ids[mask] for ids, mask in zip(rollout.completion_ids, rollout.completion_mask)]

    def logits(self, model, prompt, completion):
        """The usual way: one row, one sequence, transformers' forward -> (C, V), before each token."""
        model.model.rope_deltas = None  # left over from the last call
        ids = torch.cat([prompt.input_ids, torch.as_tensor(completion)[None]], 1)
        types = (ids == self.model.config.image_token_id).int()
        pixels = dict(pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw)
        pixels = {} if prompt.pixel_values is None else pixels
        return model(input_ids=ids, mm_token_type_ids=types, **pixels).logits[0, prompt.input_ids.shape[1] - 1:-1]

    def alone(self, model, prompt, completion, temperature=1.0):
        """-> (C, V) log-probabilities before each token, and (C,) those of the tokens"""
        logits = self.logits(model, prompt, completion) / temperature
        logps = logits.masked_fill(self.model.suppressed, -1e30).log_softmax(-1)
        return logps, logps.gather(-1, completion[:, None])[:, 0]

    def gradients(self, passes, advantages, ref, old, cfg, rollout=None, model=None):
        """-> log-probs and sums that g.update returns, and the gradient that it leaves, by name."""
        rollout, model = rollout or self.rollout, copy.deepcopy(model or self.model)
        if cfg.gradient_checkpointing:
            g.checkpoint_layers(model)
        weights = g.weigh_tokens(rollout.lengths, rollout.finished, cfg)
        found = g.update(g.Policy(model), passes, rollout, advantages, weights, ref, old, cfg)
        return *found, {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {family: World(write_model(folder / family, family)) for family in FAMILIES}


@pytest.fixture(scope="session")
def world(worlds):
    return worlds["qwen2_vl"]


# ---- Files, runs, errors ---------------------------------------------------------------------------------

def encoded(image, format="JPEG", **more):
    buffer = io.BytesIO()
    image.save(buffer, format, **more)
    return buffer.getvalue()


SAT_COLUMNS = ["image_bytes", "question", "answers", "question_type", "correct_answer"]
ONE, TWO = encoded(picture(84, 56)), encoded(picture(56, 112, seed=1))
NO_JPEG, HALF_A_JPEG = b"no JPEG at all", ONE[:len(ONE) // 2]
SAT_ROWS = [dict(zip(SAT_COLUMNS, row)) for row in [
    ([ONE], "How many chairs?", ["3", "1", "2", "4", "5"], "other", "3"),
    ([ONE, TWO], "Did it move?", ["no, it would not", "left by 26 degrees"], "goal_aim", "no, it would not"),
    ([HALF_A_JPEG], "Is it whole?", ["yes", "no"], "other", "no"),
    ([TWO], "Where is the lamp?", ["left", "right"], "other", "above"),
    ([TWO], "Is the lamp left or right?", ["left", "right"], "other", "right")]]


@pytest.fixture(scope="session")
def sat(tmp_path_factory):
    """A folder with SAT_train.parquet as SAT has it, and train.parquet, which prepare_sat makes of it."""
    folder = tmp_path_factory.mktemp("sat")
    pq.write_table(pa.Table.from_pylist(SAT_ROWS), folder / "SAT_train.parquet")
    prepare_sat.main(["--from", str(folder / "SAT_train.parquet"), "--multi_image", "--out", str(folder)])
    return folder


def write_rows(path, *rows):
    """Rows as prepare_sat.py writes them, each given by what is not usual in it -> a Parquet file."""
    usual = dict(images=[dict(bytes=ONE, path=None)], question="Which?", options=["a", "b"], answer="b")
    rows = [{**usual, "source_row": i, **row} for i, row in enumerate(rows)]
    prepare_sat.write_parquet(path, rows, prepare_sat.SAT_FEATURES)


def turned(image):
    """As a camera stores it that was held upright: sideways, with the EXIF tag that says so -> JPEG"""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    return encoded(image.transpose(Image.Transpose.ROTATE_90), exif=exif, quality=95)


def cvbench_text(n):
    """A question of CV-Bench with n choices, in its own words."""
    choices = "".join(f"\n({letter}) {choice}" for letter, choice in zip("ABCDEF", "341205"[:n]))
    return "How many chairs are in the image? Select from the following choices." + choices


@pytest.fixture(scope="session")
def cvbench(tmp_path_factory):
    """A folder with files of CV-Bench's schema: 2 to 6 choices, images of every kind; all answers are 4."""
    folder = tmp_path_factory.mktemp("cvbench")
    other_modes = [encoded(picture(84, 84).convert(mode), "PNG") for mode in ("RGBA", "L", "P")]
    images = [encoded(picture(56, 84)), *other_modes, turned(picture(56, 112, seed=4))]
    rows = [dict(task=task, source=source, image={"bytes": image, "path": None}, answer="(B)",
                 choices=list("341205"[:n]), prompt=cvbench_text(n)) for image, task, source, n in zip(
        images, ["Count", "Relation", "Count", "Depth", "Distance"],
        ["ADE20K", "COCO", "COCO", "Omni3D", "Omni3D"], [2, 3, 6, 4, 5])]
    prepare_sat.write_parquet(folder / "test_2d.parquet", rows[:3], make.CVBENCH_FEATURES)
    prepare_sat.write_parquet(folder / "test_3d.parquet", rows[3:], make.CVBENCH_FEATURES)
    return folder


# A reward that a random model can get: the share of small letters in what it wrote. What is added tells by
# which row it was graded, and is the same for all of a group.
g.REWARDS["letters"] = lambda completion, source_row, **_: source_row / 1000 + sum(
    "a" <= c <= "z" for c in completion.removeprefix("<think>")) / max(1, len(completion))


@pytest.fixture(scope="session")
def small_run(world, sat):
    """Flags of three steps of --preset sat on the small model."""
    return f"""--preset sat --model_name_or_path {world.folder} --data {sat} --eval_data {sat}/train.parquet
        --prompts_per_step 2 --num_generations 4 --max_completion_length 8 --rewards accuracy,format,letters
        --score_tokens 20 --encode_tokens 1 --learning_rate 1e-3 --max_steps 3 --eval_steps 0
        --save_steps 1""".split()


@pytest.fixture(scope="session")
def train(small_run):
    """train(output_dir, *flags): the small run; flags override."""
    def run(output_dir, *more, main=g.main):
        main([*small_run, "--output_dir", str(output_dir), *map(str, more)])
    return run


def jsonl(path, drop="seconds/"):
    records = map(json.loads, Path(path).read_text().splitlines())
    return [{key: value for key, value in record.items() if not key.startswith(drop)} for record in records]


def weights_of(folder):
    return load_file(Path(folder) / "model.safetensors")


def same_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same_run(one, other):
    """Are two runs bit-equal: weights and logs, but for the seconds?"""
    return same_weights(one / "final", other / "final") and all(
        jsonl(one / name) == jsonl(other / name) for name in ("metrics.jsonl", "completions.jsonl"))


def stops(words, program, *args, **more):
    """The program must stop with one sentence that has these words; the exit code is then 1."""
    with pytest.raises(SystemExit) as stop:
        program(*args, **more)
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert all(word in message for word in words.split()), message


def all_stop(program, cases):
    """cases: {flags: words of the sentence}. A space at the end of flags is followed by an empty word."""
    for flags, words in cases.items():
        stops(words, program, flags.split(" "))


def test_docstring_examples():
    for module, count in (g, 3), (eval_cvbench, 2):
        assert doctest.testmod(module) == (0, count)  # failed, tried


# ---- Step 1: the prompt ----------------------------------------------------------------------------------

@pytest.mark.parametrize("images, start", [
    (0, ""), (1, g.IMAGE_TOKENS), (2, f"Picture 1: {g.IMAGE_TOKENS}Picture 2: {g.IMAGE_TOKENS}")])
def test_a_row_becomes_the_papers_question_with_its_images_first_when_trained_and_when_served(images, start, worlds):
    row = dict(question="Where {is} it?", options=["no, not here", "2", "3"], images=[None] * images)
    question = "Answer in natural language. Where {is} it? Choose between the following options: no, not here, 2 or 3"
    assert g.render(row, "base", None) == start + g.TEMPLATES["base"].replace("{question}", question)
    assert g.render(row, "instruct", worlds["qwen3_vl"].tokenizer) == (
        f"<|im_start|>user\n{start}{question}  Output the thinking process in <think> </think> and final "
        "answer (option) in <answer> </answer> tags.<|im_end|>\n<|im_start|>assistant\n")
    tokenizer, text = copy.deepcopy(worlds["qwen2_vl"].tokenizer), [{"type": "text", "text": question}]
    tokenizer.chat_template = g.SERVED_PROMPT
    for content in [[{"type": "image"}] * images + text] + [question] * (images == 0):
        turns = [dict(role="user", content=content)]
        asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert asked == g.render(row, "base", None)


def test_the_chat_template_chooses_the_prompt(world, tmp_path):
    tokenizer = copy.deepcopy(world.tokenizer)
    for template, chosen in [(ROLES, "instruct"), (None, "base"), (make.BASE_CHAT_TEMPLATE, "base"),
                             (g.SERVED_PROMPT, "base")]:  # the last is what saved base models have
        tokenizer.chat_template = template
        assert [g.choose_prompt(tokenizer, x) for x in ("auto", f"{chosen}-direct")] == [chosen, f"{chosen}-direct"]
    stops("--prompt instruct-direct roles", g.choose_prompt, tokenizer, "instruct-direct")
    folder = shutil.copytree(world.folder, tmp_path / "model")  # a template in a file of its own
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps(dict(chat_template=ROLES)))
    assert g.choose_prompt(g.load_processors(folder)[0]) == "instruct"


def fitting(path, world, limit=1024, processes=1):
    """-> the rows of a training file whose prompts fit, as a run of so many processes reads them."""
    run = SimpleNamespace(cfg=SimpleNamespace(max_prompt_length=limit), template="base", **vars(world), accelerator=(
        SimpleNamespace(num_processes=processes, print=print)))
    return g.read_rows(run, path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_has_a_pad_for_each_image_token_m_rope_positions_and_its_true_length(family, worlds, tmp_path):
    world, sizes = worlds[family], [[(2, 3)], [], [(3, 5), (4, 2)]]  # in tokens, width and height
    side = 2 * world.image_processor.patch_size                      # of one image token, in pixels
    images = [[picture(side * w, side * h) for w, h in some] for some in sizes]
    stored = [[dict(bytes=encoded(image), path=None) for image in some] for some in images]
    rows = [dict(question="Which?", options=["a"], answer="a", images=some) for some in stored]
    texts = [g.render(row, "base", None) for row in rows]
    found = g.build_prompts(texts, images, world.tokenizer, world.image_processor, world.model)
    ids_of = lambda text: world.tokenizer(text).input_ids
    start, pad, end = ids_of(g.IMAGE_TOKENS)
    for i, (some, text) in enumerate(zip(sizes, texts)):
        *before, words = text.split(g.IMAGE_TOKENS)  # before: "Picture 1: "
        expected = [x for (w, h), name in zip(some, before) for x in [*ids_of(name), start, *[pad] * (w * h), end]]
        assert found.input_ids[i, :found.lengths[i]].tolist() == expected + ids_of(words)
        assert found.next_position[i] == found.lengths[i] - sum(w * h - max(w, h) for w, h in some)
    write_rows(tmp_path / "train.parquet", *rows)
    lengths = found.lengths.tolist()
    for limit in [*lengths, max(lengths) - 1, sorted(lengths)[1] - 1]:
        kept = [row["row"] for row in fitting(tmp_path / "train.parquet", world, limit)]
        assert kept == [i for i, length in enumerate(lengths) if length <= limit]


# ---- Step 3: the rewards, and the grading of evaluation --------------------------------------------------

OPTIONS = ["right", "left", "no, it would stay the same", "15", "no"]
THINK, ANSWER = "<think> hm </think>", "<answer> left </answer>"
# (is it well formed, is it right, where left is right) -> completions
COMPLETIONS = {
    (1, 1): [f"{THINK} {ANSWER}", *[f"<think></think><answer>{text}</answer>" for text in (
        "(B)", " b. ", "Left.", "Final Answer: B", "\nleft\n")]],
    (1, 0): [f"{THINK} <answer> right </answer>", f"{THINK} <answer> ... </answer>"],
    (0, 0): [f"{THINK} {ANSWER} {ANSWER}", f"{THINK} <answer> {ANSWER}", f"{THINK} <answer> left",
             f"{THINK} <Answer> left </Answer>", f"{THINK} <answer> </answer>", "<think> hm left </answer>", ""],
    (0, 1): [ANSWER, f"{THINK} {THINK} {ANSWER}", f"<think> {THINK} {ANSWER}", f"{ANSWER} {THINK}",
             f"<think> hm {ANSWER} </think>", f"So {THINK} {ANSWER}", f"{THINK} So {ANSWER}", f"{THINK} {ANSWER} So."]}


def test_rewards_of_completions():
    row = dict(answer="left", options=OPTIONS, question="?", num_tokens=7)
    for (form, right), text in ((key, text) for key, texts in COMPLETIONS.items() for text in texts):
        assert g.format_reward(text, **row) == form and g.accuracy_reward(text, **row) == right, text
        assert recipes.hard_reward(text, **row) == form * right and g.REWARDS["length"](text, **row) == 0.007
        assert eval_cvbench.is_right(text, OPTIONS, "left", strict=True) == right
    assert [g.accuracy_reward("Left.", template=x, **row) for x in ("base", "base-direct")] == [0, 1]
    assert g.choose("B", ["x", "A", "B"]) == "B" and g.choose("A", ["x", "y"]) == "x"  # text before letter


# options -> {the one that a reply chooses in evaluation, or none: replies}
ANSWERS = {
    "2/3/4": {
        "4": ["(C)", "【C】", "c)", "<b>C</b>", "Answer: C", "<answer>2</answer> wait <answer>4</answer>",
              "<think> not 2, not 3 </think> <answer>(C)", "The answer is C, as I counted them.", "\\boxed{C}",
              "(A) 2? No. The answer is (C) 4.", "Answer: **C**", "2 + 2 = 4", "Two left, two right, so four.",
              "(A) 2\n(B) 3\n(C) 4\n\nC", "2 on the left, 2 on the right. The total is: 4", "4 (2 brown, 2 black)",
              "The left one has 4.", "four", "There are four chairs.", "c. 4", "I count 4, not 3.", "Option C: 4"],
        "3": ["Option B", "\\boxed{\\text{B}}", "$3$", "(A) and (C) are wrong.\n\n**B**"],
        "2": ["<think> there are 2 on the left and", "(A) 2\n(B) 3\n(C) 4\nThere are 2.", "Answer: A. 2"],
        "": ["The answer is a matter of taste.", "There are 14 chairs, or 4.5.", "", "...", "(D)",
             "The answer is (A) or (C).", "**A** or **C**", "-3", "<answer></answer>", "3%", "(C) 3", "3/4", ".3",
             "2-3", "three hundred", "more than 3", "3 or 5", "(A) 2\n(B) 3\n(C) 4", "3, maybe 4", "4? 3?",
             "Answer: (C) 2", "twenty-three", "(A) or (C)", "three-legged"]},
    "right/left": {
        "left": ["(A) is wrong, so (B)", "It’s left, it isn’t right.", "(b) left", "B, not A", "left (not right)",
                 "(B), because what is on the right is the table", "left-hand side", "b", "left instead of right",
                 "**B** is correct", "The right answer is left.", "Right? No, left.", "I choose B", "B is correct.",
                 "Therefore, B", "# Answer\nB", "Answer: A ... wait ... the final answer is B",
                 "(A) right (B) left\nIt stands left.", "The table is on the right.\n\n(B)"],
        "": ["Either left or right.", "It can't be left", "(b) right", "B or A", "<answer>le ft</answer>",
             "It is not left.", "It isn't (B)", "Option B is incorrect", "C", "The answer is not B.",
             "We can rule out B.", "It might be left.", "Is it left?", "There is no lamp on the left.", "Not (B)."]},
    "cat/dog": {
        "cat": ["The answer is (A) cat. The dog is farther.", "A cat.", "Point A is closer.",
                "The cat is closer, while the dog is farther.", "Dog. Wait, cat."],
        "dog": ["The answer is a dog.", "A cat? No, a dog.", "The cat is far, so the dog.", "The answer is: (B)."],
        "": ["A dog or a cat", "cats", "The cat and the dog", "B. cat", "- **A. cat**: far\n- **B. dog**: near"]},
    "no, it would stay the same/no/yes": {
        "no, it would stay the same": ["I think no, it would stay the same", "A"], "no": ["no", "The answer is no."],
        "yes": ["Yes, it would not stay the same.", "Yes.\nNo lamp is on the right."], "": ["(A) no", "yes or no"]},
    "moving/not moving/cannot tell/neither": {
        "moving": ["It is moving."], "not moving": ["It is not moving."], "cannot tell": ["I cannot tell."],
        "neither": ["The answer is neither", "D"], "": ["moving or not moving"]},
    "x/A/B": {"x": ["x", "(A)"], "A": ["A."], "B": ["The answer is B", "(C)"]},  # an option's text goes before
    "car/bus/truck/van": {
        "truck": ["It is not the car, the bus or the van, it's the truck.", "A, B and D are wrong, so C."],
        "": ["A, C", "(A, C)", "vans", "E", "a car, a van"]},
    "(/\\/[a-z": {"\\": ["It is \\ there."], "(": ["("], "": ["It is ( or \\", "²", "\0", "é" * 500]}}
# a free answer -> replies that are right, and replies that are not
FREE_ANSWERS = {
    "yes": (["Yes, it is.", "**Yes**", "The answer is yes."], ["No, it is not.", "yes or no", "A"]),
    "a red ball": (["red ball", "The answer is a red ball."], ["not a red ball", "red"]), "1000": (["1e3"], ["1e4"]),
    "3": (["three", "3.0", "It is 3, not 4.", "x = 3", "\\boxed{3}", "<think> 4 </think> <answer>3</answer>"],
          ["It is not 3.", "-3", "3/4", "3,000", "3 or 4", "4 or 3", "<answer>4</answer> 3", "3?"]),
    "20": (["Twenty."], ["twenty-one"]), "0.5": (["1/2"], ["not 0.5"])}


def test_the_table_of_answers():
    forms, n = ["{}", "<answer> {} </answer>", "<think> It is 2, so A. </think>\n{}"], 0
    for names, expected, text in ((names, expected, text) for names, chosen in ANSWERS.items()
                                  for expected, texts in chosen.items() for text in texts):
        options, n = names.split("/"), n + 1
        for reply in forms[:1] if "<" in text or not text else forms:
            reply = reply.replace("{}", text)
            said = eval_cvbench.read_answer(reply)
            assert eval_cvbench.read_choice(said, options) == (expected or None), reply
            right = [name for name in options if eval_cvbench.is_right(reply, options, name)]
            assert right == [expected] * bool(expected), reply
    assert n >= 120
    for answer, replies in FREE_ANSWERS.items():
        for right, text in ((not wrong, text) for wrong, texts in enumerate(replies) for text in texts):
            assert eval_cvbench.is_right(text, [], answer) == right, (answer, text)


# solution = answer block or text; where "!=" stands they are not equal
MATHEMATICS = """
140° = $140^\\circ$ ; 140 = 140 degrees ; 140° != 141° ; 0.75 = 3/4 ; 5 = x=5 ; x=5 = 5 ; \\frac{3}{4} = 0.75
\\frac{3}{4} != \\frac{4}{3} ; 2\\sqrt{3} = \\sqrt{12} ; 2 \\sqrt { 221 } = 2\\sqrt{221} ; 2\\sqrt{3} = 2√3 ; 5 !=
10\\text{ cm} = 10 cm ; 10 != 12 cm ; 0.5 = 50% ; 50% = 50\\% ; 1,000 = 1000 ; 1000 != 1,001 ; 5 != 3, 4 or 5
12\\pi = 12π ; 12\\pi != 37.7 ; (1,2) = (1, 2) ; (1,2) != (2, 1) ; -3 != 3 ; −3 = -3 ; 5 = Final Answer: \\boxed{5}
y=2x+1 = y = 1 + 2x ; 5 != \\frac{\\frac{\\frac{ ; 5 != 5 </answer> <answer> 6 ; 25 = 5² ; C = (C) ; C = C. 140
C = Option C ; (C) = C ; C != D. 140 ; C != (C) or (D) ; C != 3 ; 240π = 240πcm^{2} ; 9π = 9pi ; 9π = 9πcm^{2}
240πcm^{2} != 240 ; 5 != 5x ; 3 = 3 chairs ; 9.8 = 9.8 m/s^{2} ; 20°C = 20 ; 2x^2 != 2x ; 2 sin x != 2"""


def test_the_table_of_mathematics():
    for case in filter(str.strip, re.split(" ; |\n", MATHEMATICS)):
        solution, sign, answer = re.fullmatch(r"(.+?) (!?=)(?: (.*))?", case.strip()).groups()
        completion = f"<think> 7, 8 </think> <answer> {answer or ''} </answer>"
        assert recipes.math_reward(completion, answer=solution, num_tokens=3) == (sign == "="), case
    assert recipes.math_reward("The sides are 3 and 4, so it is 5", answer="5") == 1  # no block: the whole text
    for start, options, earned in ("<think></think>", [], 1), ("", [], 0), ("<think></think>", ["0.5", "1/2"], 0):
        said = dict(completion=f"{start}<answer>0.5</answer>", answer="1/2", num_tokens=1, options=options)
        assert recipes.hard_reward(**said) == earned


def test_think_is_put_back_once_and_end_tokens_are_not_in_the_way(world):
    said = " left , right . It 's  two\n</think> <answer> left </answer>"
    for end in "", "<|im_end|>", "<|endoftext|>", "<|im_end|><|endoftext|>":
        ids = torch.tensor(world.tokenizer(said + end).input_ids)
        assert g.completion_text(g.TEMPLATES["base-direct"], ids, world.tokenizer) == said
        for prompt, think in (g.TEMPLATES["base"], "<think>"), ("<|im_start|>assistant\n<think>\n", "<think>\n"):
            text = g.completion_text(prompt, ids, world.tokenizer)  # the latter prompt is of a thinking model
            assert text == think + said and g.format_reward(text) == g.accuracy_reward(text, "left", OPTIONS) == 1


def rewarded(names, texts, **more):
    """-> the rewards of completions of one prompt, whose lengths are 7, 8, ... tokens."""
    rollout = SimpleNamespace(texts=texts, lengths=torch.arange(7, 7 + len(texts)))
    row = dict(answer="left", options=OPTIONS, completion="<answer> given, for SFT </answer>") | more
    return g.compute_rewards(g.Config(rewards=names, max_completion_length=9), rollout, [row], "base")


def test_rewards_are_told_lengths_limits_and_the_data_row_and_must_be_finite_numbers(monkeypatch):
    told = {}
    monkeypatch.setitem(g.REWARDS, "mine", lambda num_tokens, **more: told.update(more) or num_tokens)
    found = rewarded("accuracy,mine", ["a", "<answer>b</answer>"], kind="of row")
    assert {name: values.tolist() for name, values in found.items()} == {"accuracy": [0, 1], "mine": [7, 8]}
    assert (told["max_completion_length"], told["kind"], told["template"]) == (9, "of row", "base")
    for value in math.nan, math.inf, 1e39, None, "1", [1, 2], torch.ones(2):
        monkeypatch.setitem(g.REWARDS, "mine", lambda completion, **_: value)
        stops("reward mine finite", rewarded, "accuracy,mine", ["a", "b"])


# ---- Step 4: the advantages ------------------------------------------------------------------------------

def test_group_advantages_without_the_std_and_without_spread():
    rewards = torch.tensor([0.0, 0, 1, 1, 2, 1, 1, 0])  # two groups of four
    assert g.group_advantages(rewards, 4, scale_rewards=False).tolist() == [-.5, -.5, .5, .5, 1, 0, 0, -1]
    for value, n in (0.1, 3), (1 / 3, 7), (1e6 + 0.1, 8):
        assert (g.group_advantages(torch.full((3 * n,), value), n) == 0).all()  # no spread: exactly 0


# ---- Steps 2 and 5: encode once, branch G times ----------------------------------------------------------

def test_suppressed_are_special_tokens_but_the_end_tokens_and_unused_rows(world):
    ids, ends = world.tokenizer.convert_tokens_to_ids, ["<|endoftext|>", "<|im_end|>"]
    expected = torch.zeros_like(world.model.suppressed)
    expected[ids([name for name in make.SPECIALS if name not in ends])] = expected[-UNUSED_ROWS:] = True
    assert torch.equal(world.model.suppressed, expected) and expected.sum() == 12 + UNUSED_ROWS
    assert not expected[ids("<think>")] and g.load_model(world.folder, world.tokenizer).eos_ids == ids(ends)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_sampled_is_what_is_scored_and_greedy_is_the_likeliest(family, worlds, monkeypatch):
    world, sizes, forward = worlds[family], [], g.Decoder.forward
    monkeypatch.setattr(g.Decoder, "forward", lambda self: sizes.append(len(self.indices)) or forward(self))
    draw = lambda number, temperature=1.0: g.sample(world.model, [world.pass_], G, 9, temperature, seed(number))
    for temperature in 1.0, 1.7:
        rollout = draw(0, temperature)
        gap = lambda logps: ((rollout.sampling_logps - logps) * rollout.completion_mask).abs().max()
        score = lambda cfg: g.score_rollout(g.Policy(world.model), [world.pass_], rollout, cfg)
        assert gap(score(g.Config(num_generations=G, temperature=temperature))) < 1e-9
        assert gap(score(g.Config(num_generations=G, temperature=1.3))) > 0.01
    for ids, finished, padded in zip(world.completions(), world.rollout.finished, world.rollout.completion_ids):
        ended = [token in ENDS for token in ids.tolist()]
        assert not any(ended[:-1]) and ended[-1] == finished and (finished or len(ids) == 9)
        assert (padded[len(ids):] == ENDS[0]).all() and not world.model.suppressed[ids].any()
    assert torch.equal(draw(2).completion_ids, world.rollout.completion_ids)
    assert not torch.equal(draw(7).completion_ids, world.rollout.completion_ids)
    # the model's own generation_config, with its top_k of 1, is not heeded
    assert world.model.generation_config.top_k == 1 and len(world.rollout.completion_ids.unique(dim=0)) > 8
    for ids, prompt in zip(world.completions(g.sample(world.model, world.two_passes, 1, 12, 0)), world.each):
        with torch.no_grad():
            assert torch.equal(world.alone(world.stock, prompt, ids)[0].argmax(-1), ids)
    assert sizes[0] == 12 > min(size for size in sizes if size > 4)  # rows that have ended leave


def test_a_draw_among_150000_unlikely_tokens_finds_each_of_them(world, monkeypatch):
    broken = copy.deepcopy(world.model)
    broken.model.language_model.norm.weight.data[3] = math.nan
    stops("not finite", g.sample, broken, [world.each[0]], 1, 3, 1.0)
    probabilities = torch.full((150_001,), 2.7e-8, dtype=torch.float64)  # less than float32 resolves beside 0.996
    probabilities[0] = 1 - probabilities[1:].sum()
    aimed = torch.randint(1, 150_000, (64,), generator=seed(0))
    middles = (probabilities.cumsum(0) - probabilities / 2)[aimed]
    decoder = SimpleNamespace(indices=torch.arange(64), step=lambda: None, feed=lambda *_: False)
    monkeypatch.setattr(g, "Decoder", lambda *_: decoder)
    monkeypatch.setattr(g, "token_logps", lambda *_: probabilities.log().expand(64, -1))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: middles[:, None])
    model = SimpleNamespace(eos_ids=[0], device=torch.device("cpu"), dtype=torch.float64)
    assert torch.equal(g.sample(model, [], 64, 1, 1.0).completion_ids[:, 0], aimed)


def test_each_process_and_step_draws_for_itself(world):
    def drawn(rank, step):
        run = SimpleNamespace(sampler=world.model, tokenizer=world.tokenizer,
                              accelerator=SimpleNamespace(process_index=rank))
        batch = SimpleNamespace(passes=world.two_passes, texts=world.texts)
        return g.draw_completions(run, g.Config(num_generations=G, max_completion_length=9), step, batch).texts

    assert drawn(0, 0) == drawn(0, 0) and len({*map(tuple, (drawn(0, 0), drawn(1, 0), drawn(0, 1)))}) == 3


# ---- Step 6: the loss and the update ---------------------------------------------------------------------

def test_the_group_worked_in_the_readme():
    section = (g.HERE / "README.md").read_text().split("### One real group")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(.*)` \| (\d) \| (\d) \| (\d) \| (.*) \|$", section, re.MULTILINE)
    texts, *numbers, A = zip(*rows)
    rewards = rewarded("accuracy,format", [f"<think> {text}" for text in texts], options=["left", "right"])
    R = sum(rewards.values())
    assert [[*map(float, column)] for column in numbers] == [x.tolist() for x in (*rewards.values(), R)]
    assert len(R) == 8 and [f"{x:+.2f}" for x in g.group_advantages(R, 8)] == [*A]
    assert f"mean is {R.mean():g} " in section and f"{R.std():.4f}" in section
    cases = re.findall(r"^\| (-?\d[.\d]*) \| ([.\d]+) \| .*?" + 4 * r" \| (.*?)" + r" \|$", section, re.MULTILINE)
    assert len(cases) == 4
    for A, ratio, plain, clipped, expected, effect in cases:
        A, logps = torch.tensor([float(A)]), torch.tensor([[float(ratio)]]).log().requires_grad_()
        one, mask = torch.ones(1), torch.ones(1, 1).bool()
        loss, _, is_clipped = g.grpo_loss(logps, torch.zeros(1, 1), None, A, one, mask, 0.2, None, 0)
        loss.backward()
        products = [A.item() * x for x in (float(ratio), min(max(float(ratio), 0.8), 1.2))]
        assert [f"{x:.2f}" for x in (*products, loss.item())] == [plain, clipped, expected]
        push = {0.0: "stops", -1.0: "pushes it up", 1.0: "pushes it down"}[logps.grad.sign().item()]
        assert push == effect and is_clipped.item() == (push == "stops")


def test_the_gradient_of_k3_is_that_of_the_other_kl():
    logits = torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    logps, ref = logits.log_softmax(0), torch.tensor([-0.5, 0.4, 0.2, 1.0]).double().log_softmax(0)
    pi, zeros, mask = logps.exp(), torch.zeros(4).double(), torch.ones(4, 1).bool()
    # each possible token is a completion, with its probability as weight
    k3, *_ = g.grpo_loss(logps[:, None], logps.detach()[:, None], ref[:, None], zeros, pi.detach(), mask, 0.2, None, 1)
    kl, other = (pi * (logps - ref)).sum(), (ref.exp() * (ref - logps)).sum()  # of pi from ref; of ref from pi
    of_k3, of_kl, of_other = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (k3, kl, other))
    assert torch.allclose(k3, kl) and torch.allclose(of_k3, of_other) and not torch.allclose(of_k3, of_kl, atol=0.05)


@pytest.mark.parametrize("kind, cut, expected", [
    ("grpo", False, [1 / 8, 1 / 16, 1 / 12, 1 / 16]), ("grpo", True, [1 / 8, 0, 1 / 12, 1 / 16]),  # 1/4 for each row
    ("dr_grpo", False, [1 / 20] * 4), ("dr_grpo", True, [1 / 20, 0, 1 / 20, 1 / 20]),  # 4 rows x 5 tokens at most
    ("dapo", False, [1 / 13] * 4), ("dapo", True, [1 / 9, 0, 1 / 9, 1 / 9])])          # 13 tokens in all
def test_loss_types_by_hand(kind, cut, expected):
    cfg = g.Config(loss_type=kind, mask_truncated_completions=cut, max_completion_length=5)
    weights = g.weigh_tokens(torch.tensor([2, 4, 3, 4]), torch.tensor([True, False, True, True]), cfg)
    assert weights.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("family, frozen", [(family, None) for family in FAMILIES] + [
    ("qwen2_5_vl", "visual"), ("qwen3_vl", "language_model")])
def test_scores_and_gradients_equal_those_of_the_stock_model(family, frozen, worlds):
    """Its forward has one row and one sequence at a time, its backward is autograd's."""
    world, rollout, one_pass = worlds[family], worlds[family].rollout, worlds[family].pass_
    cfg = g.Config(num_generations=G, score_tokens=30, beta=0.3, epsilon=0.2, epsilon_high=0.28,
                   temperature=0.7, gradient_checkpointing=False)
    found = [(mask, group) for _, group, _, mask in g.chunks(one_pass, rollout, cfg)]
    assert all(len(mask) == 1 or mask.numel() <= 30 for mask, _ in found) and len(found) > 1
    assert max(group.unique().numel() for _, group in found) > 1  # rows of several groups in one chunk
    torch.manual_seed(0)
    old, ref = rollout.sampling_logps + 0.3 * torch.randn(2, *rollout.completion_ids.shape).double()
    advantages, loss, entropy, clips = torch.linspace(-2, 3, 12).double(), 0.0, 0.0, 0
    model, usual = copy.deepcopy(world.model), copy.deepcopy(world.stock)
    for one in (model, usual) if frozen else ():
        getattr(one.model, frozen).requires_grad_(False)
    gradients = lambda passes, cfg=cfg: world.gradients(passes, advantages, ref, old, cfg, model=model)
    logps, sums, ours = gradients([one_pass])
    for i, (ids, A) in enumerate(zip(world.completions(), advantages)):
        (distribution, row), C = world.alone(usual, world.each[i // G], ids, 0.7), len(ids)
        assert (logps[i, :C] - row).abs().max() < 1e-9 and (logps[i, C:] == 0).all()
        ratio, log_ratio = (row - old[i, :C]).exp(), ref[i, :C] - row
        surrogate = torch.minimum(ratio * A, ratio.clamp(0.8, 1.28) * A)
        clips += (surrogate < ratio * A).sum().item()
        loss = loss + (-surrogate + 0.3 * (log_ratio.exp() - log_ratio - 1)).mean() / 12
        entropy -= (distribution.exp() * distribution).sum().item()
    loss.backward()
    assert sums["loss"] == pytest.approx(loss.item(), abs=1e-9) and sums["entropy"] == pytest.approx(entropy)
    assert 0 < sums["clip_ratio"] == clips < rollout.completion_mask.sum()
    theirs = {name: p.grad for name, p in usual.named_parameters() if p.requires_grad}
    assert {name for name, x in ours.items() if x is not None} == theirs.keys()
    assert all(x.norm() > 1e-6 for x in theirs.values())
    error = lambda found: [((found[name] - x).norm() / x.norm()).item() for name, x in theirs.items()]
    assert max(error(ours)) < 1e-6 and max(error(gradients(world.two_passes)[2])) < 1e-6
    recomputed = gradients([one_pass], g.Config(**{**vars(cfg), "gradient_checkpointing": True}))
    assert torch.equal(recomputed[0], logps) and recomputed[1] == sums  # bit-equal with checkpointing
    assert all(torch.equal(recomputed[2][name], ours[name]) for name in theirs)
    assert (g.score_rollout(g.Policy(world.model), world.two_passes, rollout, cfg) - logps).abs().max() < 1e-9
    shifted = changed(one_pass, next_position=one_pass.lengths)  # a control: positions that go on at P
    assert min(error(gradients([shifted])[2])) > 1e-3


def test_the_readmes_naive_step_has_the_gradients_of_train_step(world, sat):
    """On the same completions, in float64 but for transformers' norms and the README's float32 rewards."""
    code = re.search(r"```python\n(def naive_step.*?)```", (g.HERE / "README.md").read_text(), re.DOTALL)[1]
    exec(code, readme := {"torch": torch})
    own, reference = copy.deepcopy(world.model), copy.deepcopy(world.model)
    for weight in reference.parameters():  # so that kl is not 0
        weight.data *= 1.1
    usual, usual_reference = copy.deepcopy(world.stock), copy.deepcopy(world.stock)
    usual_reference.load_state_dict(reference.state_dict())
    usual.suppressed = usual_reference.suppressed = world.model.suppressed
    cfg = g.Config(prompts_per_step=2, num_generations=8, max_completion_length=8, rewards="accuracy,format,letters")
    run = SimpleNamespace(
        sampler=own, policy=g.Policy(own), master=g.Policy(own), reference=g.Policy(reference), template="base",
        tokenizer=world.tokenizer, image_processor=world.image_processor, optimizer=Mock(param_groups=[{}]),
        rows=fitting(sat / "train.parquet", world),
        accelerator=Mock(num_processes=1, process_index=0, gather=lambda x: x))
    came = g.train_step(run, cfg, 0)
    prompts = [vars(g.build_prompts([text], [images], run.tokenizer, run.image_processor, own))
               for text, images in zip(came.batch.texts, came.batch.images)]
    prompts = [{name: prompt[name] for name in ("input_ids", "pixel_values", "image_grid_thw")} for prompt in prompts]
    for beta, least, most in (cfg.beta, 0, 1e-6), (0, 1e-2, 9):  # the control: without kl
        drawn, R = iter(world.completions(came.rollout)), iter(sum(came.rewards.values()).tolist())
        usual.zero_grad()
        readme["naive_step"](usual, usual_reference, Mock(), prompts, lambda *_: next(drawn), lambda *_: next(R),
                             8, beta)
        theirs, ours = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (usual, own))
        assert least <= (ours - theirs).norm() / theirs.norm() <= most


def test_sft_is_cross_entropy(world):
    """Advantage 1 on given completions: the same gradient as the usual loss on the answers' tokens."""
    chain, end = "<think> it is a square </think> <answer> C </answer>", world.tokenizer.eos_token_id
    batch = SimpleNamespace(rows=[dict(answer="left"), dict(answer="C", completion=chain)],
                            texts=[world.texts[2], world.texts[1]])
    run = SimpleNamespace(tokenizer=world.tokenizer, sampler=world.model)
    cfg = recipes.Config(algorithm="sft", num_generations=1, beta=0.0, loss_type="dapo", score_tokens=9)
    rollout, short = (recipes.given_completions(run, x, batch) for x in (cfg, g.Config(max_completion_length=4)))
    texts = "left", chain.removeprefix("<think>")  # which is in the prompt already
    targets = [torch.tensor(world.tokenizer(text).input_ids + [end]) for text in texts]
    assert [*map(len, targets)] == rollout.lengths.tolist() and rollout.finished.all()
    assert short.lengths.tolist() == [len(targets[0]), 4] and not short.finished[1]
    rollout.sampling_logps = rollout.sampling_logps.double()
    usual, ones = copy.deepcopy(world.stock), torch.ones(2).double()
    logps, _, ours = world.gradients([world.build([2, 1])], ones, None, None, cfg, rollout)
    nll = -sum(world.alone(usual, world.each[i], ids)[1].sum() for i, ids in zip((2, 1), targets))
    assert -logps.sum().item() == pytest.approx(nll.item())
    (nll / rollout.completion_mask.sum()).backward()
    assert all((ours[name] - p.grad).norm() < 1e-9 * p.grad.norm() for name, p in usual.named_parameters())


# ---- bf16: what a GPU does, on a CPU ----------------------------------------------------------------------

@pytest.mark.parametrize("cpu_offload", [False, True])
def test_gradients_of_many_backwards_add_up_in_float32(cpu_offload):
    torch.manual_seed(0)
    master, memory = torch.nn.Linear(40, 30), set()
    model, alone = (copy.deepcopy(master).bfloat16() for _ in range(2))
    g.sum_gradients(model, master, cpu_offload)
    run = SimpleNamespace(master=master, policy=model, sampler=model,
                          optimizer=torch.optim.SGD(master.parameters(), lr=0))
    for _ in range(2):  # a second time into the same memory
        parts = []
        for x in torch.randn(5, 8, 40).bfloat16():
            for one in model, alone:
                one(x).square().sum().backward()
            parts.append(alone.weight.grad)
            alone.weight.grad = None
        exact = sum(part.float() for part in parts)
        assert master.weight.grad.dtype == torch.float32 and model.weight.grad is None
        assert torch.allclose(master.weight.grad, exact, rtol=1e-6)
        assert not torch.allclose(sum(parts).float(), exact, rtol=1e-6)  # the control: sums in bf16
        memory.add(master.weight.grad.data_ptr())
        g.step_optimizer(run, g.Config())
        assert (master.weight.grad == 0).all()
    assert len(memory) == 1


def test_what_reaches_the_prompts_adds_up_in_float32(world, monkeypatch):
    policy = g.Policy(g.load_model(world.folder, world.tokenizer, dtype=torch.bfloat16))
    cfg, seen, backward = g.Config(num_generations=G, score_tokens=1, beta=0.0), [], torch.autograd.backward
    monkeypatch.setattr(torch.autograd, "backward", lambda tensors, gradients, *args, **more: (
        seen.append(gradients) or backward(tensors, gradients, *args, **more)))
    rollout = changed(world.rollout, sampling_logps=world.rollout.sampling_logps.float())
    for which in [torch.ones(12), *torch.eye(12)]:  # all completions; each of them alone
        g.update(policy, [world.pass_], rollout, torch.linspace(-2, 3, 12), which / 40, None, None, cfg)
    whole, *alone = [gradients for gradients in seen if isinstance(gradients, list)]  # of the second stage
    for number, x in enumerate(whole):
        assert torch.equal(x, sum(part[number].float() for part in alone).bfloat16())
    assert not torch.equal(whole[0], sum(part[0] for part in alone))  # the control: sums in bf16


def test_sharded_gradients_are_summed_in_float32(world, monkeypatch):
    monkeypatch.setattr(g, "compute_dtype", lambda device: torch.bfloat16)
    accelerator, model = Mock(device="cpu", prepare=lambda *_: (None, Mock())), copy.deepcopy(world.model)
    g.shard(SimpleNamespace(accelerator=accelerator, master=g.Policy(model), optimizer=None), g.Config())
    precision = accelerator.state.fsdp_plugin.mixed_precision_policy
    assert (precision.param_dtype, precision.reduce_dtype) == (torch.bfloat16, torch.float32)


# ---- Settings --------------------------------------------------------------------------------------------

def test_settings_and_their_precedence(world, sat):
    own = f"--model_name_or_path {world.folder} --data {sat} --eval_steps 0 --eval_data {sat} --preset=sat".split()
    for flags, rate in ([], 8e-5), (["--learning_rate", "0.5"], 0.5), ([*own, "--max_steps=7"], 1e-6):
        assert g.parse_config(flags).learning_rate == rate
    source = "".join(Path(module.__file__).read_text() for module in (g, eval_cvbench))
    assert all(re.search(rf"\bcfg\.{name}\b", source) for name in vars(g.Config()))


def test_bad_settings_stop_with_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    values = ["--rewards accuracy,style", "--num_generations 1", "--max_steps 0", "--temperature nan", "--max_pixels 0",
              "--learning_rate inf", "--learning_rate -1", "--rewards accuracy,format --prompt base-direct",
              "--temperature 1e-40", "--prompts_per_step 0", "--preset paper", "--preset sat-sft"]
    paths = ["--data data/none", "--eval_data toy/none", "--data " + "x" * 300]
    paths += [f"--model_name_or_path {path}" for path in (tmp_path / "empty", tmp_path / "none", "x" * 300)]
    all_stop(g.main, {flags: flags.split()[0] for flags in values} | {flags: flags.split()[1] for flags in paths})
    monkeypatch.setattr(g, "Accelerator", lambda **_: SimpleNamespace(num_processes=3, log_with=[]))
    stops("--prompts_per_step processes", g.make_accelerator, g.Config())


# ---- Preparation -----------------------------------------------------------------------------------------

def prepared(folder, capsys, *flags):
    """Run prepare_sat.py -> the rows it wrote, with decoded images, counts {verdict: rows}, its output."""
    prepare_sat.main([*map(str, flags), "--out", str(folder)])
    printed = capsys.readouterr().out
    counts = re.findall(r"^ *(\d+) ([^(\n]+?)(?: \(.*)?$", printed, re.MULTILINE)
    rows = datasets.Dataset.from_parquet(str(folder.expanduser() / "train.parquet"))
    return rows, {verdict.removeprefix("skipped: "): int(n) for n, verdict in counts}, printed


@pytest.fixture
def pictures(tmp_path):
    """A folder with pictures, of which long.png cannot be resized, and a link to a picture outside of it."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for path, data in {"a.png": encoded(picture(56, 84), "PNG"), "long.png": encoded(picture(402, 2), "PNG"),
                       "sub/b.jpg": ONE, "broken.png": HALF_A_JPEG, "../secret.png": ONE}.items():
        (folder / path).write_bytes(data)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    return folder


@pytest.fixture
def convert(pictures, tmp_path, capsys):
    """convert(rows, *flags): prepare rows of JSON that lie beside the pictures -> as `prepared`"""
    def convert(rows, *flags):
        (pictures / "own.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
        shutil.rmtree(tmp_path / "own", ignore_errors=True)
        return prepared(tmp_path / "own", capsys, "--from", pictures / "own.jsonl", *flags)
    return convert


def own(options=None, answer="cat", question="Which?", **more):
    return dict(image="a.png", question=question, options=options, answer=answer, **more)


def sizes(row):
    return [image.size for image in row["images"]]


@pytest.mark.parametrize("flags, kept", [([], [0, 4]), (["--multi_image"], [0, 1, 4])])
def test_sat_rows_are_kept_or_skipped_for_a_reason(flags, kept, sat, tmp_path, capsys):
    rows, counts, printed = prepared(tmp_path, capsys, "--from", sat / "SAT_train.parquet", *flags)
    assert counts == {"kept": len(kept), "missing or broken image": 1, "answer not among the options, or ambiguous": 1,
                      **({} if flags else {"several images": 1})}
    assert {*rows.column_names} == prepare_sat.SAT_FEATURES.keys() and rows["source_row"][:] == kept
    for row in rows:
        images, question, options, _, answer = SAT_ROWS[row["source_row"]].values()
        assert (row["question"], row["answer"], sorted(row["options"])) == (question, answer, sorted(options))
        assert sizes(row) == [Image.open(io.BytesIO(image)).size for image in images]
    assert {b"grpo_vision", b"huggingface"} <= pq.read_schema(tmp_path / "train.parquet").metadata.keys()
    assert "options are shuffled: in SAT's" in printed and rows["options"][0] == ["3", "1", "5", "4", "2"]


def test_shuffling_puts_the_answer_into_every_place():
    how = dict(columns=prepare_sat.choose_columns("SAT", SAT_COLUMNS), folder=None, reading="text")
    rows = [[*prepare_sat.convert(SAT_ROWS[:1] * 100, how, {}, shuffle=True, seed=seed)] for seed in (0, 1)]
    places = Counter(row["options"].index("3") for row in rows[0])
    assert len(places) == 5 and min(places.values()) > 5 and rows[0][0]["options"] != rows[1][0]["options"]


# options, answer, what the options become (None: the row is skipped), the one letter that is rewarded ("":
# options have no letters, and may be shuffled), and the question, if it is not "Which?"
CAT_DOG = ["cat", "dog"]
LETTERED = [
    *[(form.split("|"), "dog", CAT_DOG, "") for form in [
        "A.cat|B.dog", "(A)cat|(B)dog", "a) cat|b) dog", "A - cat|B - dog", "A、cat|B、dog", "[A] cat|[B] dog",
        "**A.** cat|**B.** dog", "Option A: cat|Option B: dog", "B. dog|A. cat", "A: cat|B: dog"]],
    (["A. -3", "B. 3"], "-3", ["-3", "3"], ""), (["A. A cat", "B. A dog"], "A dog", ["A cat", "A dog"], ""),
    (["(B)dog", "(A)cat"], "(B)dog", CAT_DOG, ""), (["cat", "<|x|>"], "cat", None, ""), (["cat"], "cat", None, ""),
    (["A. cat", "B) dog"], "B) dog", ["A. cat", "B) dog"], "B"), (["B. cat", "C. dog"], "C. dog", None, ""),
    (["The cat", "A dog"], "A dog", ["The cat", "A dog"], ""), (["cat", "cat", "dog"], "dog", CAT_DOG, ""),
    (["B is closer", "A is closer"], "B is closer", ["A is closer", "B is closer"], "B"),
    (["equal", "point B", "point A"], "equal", ["point A", "point B", "equal"], "C"),
    (["(B) above (A)", "(A) above (B)"], "(B) above (A)", ["(A) above (B)", "(B) above (A)"], "B"),
    (["A", "B", "both A and B"], "both A and B", ["A", "B", "both A and B"], "C"),
    (["cat", "dog", "None of the above"], "dog", ["cat", "dog", "None of the above"], "B"),
    *[(CAT_DOG, "dog", CAT_DOG, "B", f"Which? {letters}") for letters in [
        "(A)cat (B)dog", "A.cat B.dog", "a)cat b)dog", "A cat, B dog", "A=cat, B=dog"]],
    (["1", "10"], "10", ["1", "10"], "B", "Which? (A)1 (B)10"), (["dog", "cat"], "dog", None, "", "? (A)cat (B)dog")]


@pytest.mark.parametrize("flags", [[], ["--shuffle"]])
def test_a_letter_earns_the_reward_only_where_it_is_printed(flags, convert):
    cases, moved = LETTERED * 3, 0
    found, _, printed = convert([own(options, answer, *rest) for options, answer, _, _, *rest in cases], *flags)
    assert ("options are shuffled: --shuffle" if flags else "options stay in order") in printed
    assert found["source_row"][:] == [i for i, (_, _, becomes, *_) in enumerate(cases) if becomes]
    for options, answer, index in zip(found["options"], found["answer"], found["source_row"]):
        _, raw, becomes, letter, *_ = case = cases[index]
        earning = [x for x in "ABCDE" if g.accuracy_reward(f"<answer>{x}</answer>", answer, options)]
        assert sorted(options) == sorted(becomes) and answer in becomes and raw.endswith(answer), case
        assert not letter or (options, earning) == (becomes, [letter]), case
        moved += not letter and options != becomes
    assert moved > 5 if flags else moved == 0


def test_options_of_your_own_are_shuffled_where_one_place_is_right(convert):
    right, wrong = own(["cat", "dog", "hen"]), own(["dog", "cat", "hen"])
    for count, first, words in [  # rows, those whose first option is right, what is printed
            (20, 18, "are shuffled: number 1 of 3 is right in 18 of 20 rows"), (20, 17, "stay in order"),
            (60, 0, "are shuffled: number 2 of 3 is right in 60 of 60 rows"), (19, 19, "stay in order")]:
        found, _, printed = convert([right] * first + [wrong] * (count - first) + [own()] * 40)
        is_moved = any(row["options"] not in ([], right["options"], wrong["options"]) for row in found)
        assert words in printed and is_moved == words.startswith("are")


# a column of answers, the options of each row, --answers, and what each row becomes; None: it is skipped, or
# for all of them: the answers can be read in several ways
FOUR = ["one", "two", "three", "four"]
READINGS = [
    (["two", " Two "], FOUR, "", ["two", "two"]), (["B", "(b)", "[B]", "Option B", "$B$"], FOUR, "", ["two"] * 5),
    ([1, 2, 3, 4], FOUR, "", FOUR), (["1", "2", "3", "4", "5"], FOUR, "", [*FOUR, None]),
    (["1", "2", "3"], FOUR, "", None), (["2"], ["1", "2", "3"], "", ["2"]),
    (["0", "1", "2", "3"], FOUR, "", FOUR), ([0, 1.0, 4], FOUR, "", ["one", "two", None]),
    ([1, 2, 3], FOUR, "", None), ([1, 2], FOUR, "index1", FOUR[:2]), ([1, 2], FOUR, "index0", ["two", "three"]),
    ([2, 3.0, 5], [2, 3, 5.0], "", ["2", "3", "5"]), ([1, 2], ["1", "2", "3"], "", None),  # as text or as an index?
    (["A", "b", "the left one"], ["b", "a", "the left one"], "", ["a", "b", "the left one"]),
    (["A", "B"], ["b", "a"], "", None), (["A", "B"], ["b", "a"], "letter", ["b", "a"]),  # text or letter?
    ([float("nan"), 2.0], ["x", "y"], "", [None, "y"]), (["$5$", "5"], ["$5$", "$6$"], "", ["$5$", "$5$"]),
    (["B", "C", "B. dog", "A. hen"], ["A. cat", "B. dog", "C. hen"], "", ["dog", "hen", "dog", None]),
    (["B. dog", "(D) cow", "A. cow"], ["cat", "dog", "hen", "cow"], "", ["dog", "cow", None]),
    (["A"], ["B. dog", "A. cat"], "", ["cat"]), ([0, "dog"], ["B. dog", "A. cat"], "", [None, "dog"]),
    ([["two"], FOUR[:2]], FOUR, "", ["two", None])]

# a free answer, and what it becomes; None: the row is skipped
FREE = [
    ("\\boxed{3}", "3"), ("$3$", "3"), ("48/2=24 <<24+48=72>>\n#### 72", "72"), ("#### 1 #### 2", "2"),
    ("Final Answer: 3", "3"), ("<think>?</think> <answer>Answer: \\boxed{3}</answer>", "3"), ("**3**", "3"),
    ("$5", "$5"), ("10 cm", "10 cm"), ("<answer>1</answer> <answer>2</answer>", None), ("####", None), (7, "7"),
    ("so \\frac{2}{4}, or \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"), ("240πcm^{2}", "240πcm^{2}"), ("3/4", "3/4"),
    ("3<|im_end|>", None), ("\\boxed{3", None), ("<think> 3", None), ("\\boxed{1} or \\boxed{2}", None),
    ("['24/7', '3.4']", None), (0.5, "0.5"), (float("nan"), None), (None, None), (True, "True"), ([], None),
    ([{"answer": "no"}, {"answer": "ok"}, {"answer": "no"}], "no"), (["red", "blue"], None), ({"a": 1}, None)]
WITH_MATHEMATICS = ["\\frac{1}{2}", "$5", "240πcm^{2}", "3/4", "10 cm"]
CHAIN = "<think>\nTwo legs, \"four\" ...\n</think>\n\n<answer> Final Answer:B </answer>"
PARTS = [{"type": "image"}, {"type": "text", "text": "Which?"}]


def chat(question="<image>\nWhich?", completion=CHAIN, images="a.png", who=("human", "gpt")):
    turns = [{"from": name, "value": text} for name, text in zip(who, (question, completion))]
    return {"conversations": turns, "images": images}


def messages(*contents, roles=("user", "assistant"), **more):
    turns = [dict(role=role, content=text) for role, text in zip(roles, contents)]
    return {"messages": turns, "images": ["a.png"], **more}


# rows as ms-swift, LLaMA-Factory, VLM-R1 and TRL read them, and their answers
CONVERSATIONS = [
    ([messages("<image>Which?", "cat"), messages(PARTS, "cat"),
      messages("Be!", "<image 1>Which?", "cat", roles=("system", "user", "assistant"))], ["cat"] * 3),
    ([messages("<image>Which?", solution="<answer> cat </answer>")], ["cat"]),
    ([chat(completion=said, images=None) | dict(id=1, image="a.png") for said in ("<answer> 3 </answer>", "3")],
     ["3", "3"]), ([dict(prompt=[dict(role="user", content=PARTS)], image="a.png", solution="$3$")], ["3"])]


@pytest.mark.parametrize("rows, reading, becomes", [
    *[([own(options, answer) for answer in answers], *how) for answers, options, *how in READINGS],
    ([own(answer=answer) for answer, _ in FREE], "", [becomes for _, becomes in FREE]),
    *[(rows, "", answers) for rows, answers in CONVERSATIONS]])
def test_answers_are_read_as_their_column_is(rows, reading, becomes, convert, tmp_path):
    flags = ["--answers", reading] if reading else []
    if becomes is None:
        stops("--answers", convert, rows * 9, *flags)
        assert not (tmp_path / "own").exists()
        return
    found, counts, _ = convert(rows * 9, *flags)
    expected = [(i, text) for i, text in enumerate(becomes * 9) if text is not None]
    assert list(zip(found["source_row"], found["answer"])) == expected and counts["kept"] == len(expected)
    assert {(row["question"], len(row["images"])) for row in found} == {("Which?", 1)}
    assert counts.get("with mathematics: use recipes.py, --rewards math,format", 0) == sum(
        row["answer"] in WITH_MATHEMATICS for row in found if not row["options"])


GOOD_CHATS = [
    chat(), chat("Which of\n<image>\nthem?", images=["a.png"], who=("user", "assistant")),
    {"conversations": messages("Which?", CHAIN)["messages"], "image": "./sub/../sub/b.jpg"}]  # as LLaVA-CoT's
BAD_CHATS = {
    "odd shape": ["no dict", {"conversations": ["Hello", CHAIN]}, chat(completion=["?"])],
    "empty answer": [{}, chat(completion=CHAIN.replace("Answer:B", "Answer:"))],
    "not one question and one reply": [chat(who=("gpt", "human")), {"conversations": chat()["conversations"] * 2}],
    "not one <think> and one <answer> block": [chat(completion=text) for text in ("<think>B", CHAIN + " Yes.")],
    "broken text": [chat(completion=CHAIN.replace("legs", "\ud83d"))],
    "empty question": [chat("<image>\n ")], "no image": [chat(images=[]), chat(images=None)],
    **{reason: [chat(images=name) for name in names] for reason, names in {
        "missing or broken image": ["none.png", "sub", "nul\0.png", "x" * 5000, [3], "broken.png"],
        "image outside its folder": ["../secret.png", "/etc/hosts", "link.png"],
        "image too long for the model": ["long.png"], "several images": [["a.png", "sub/b.jpg"]]}.items()},
    "more image marks than images": [chat(question) for question in (
        "<image> <image> Which?", "<image 2> Which?", "<img>a.png</img><img>b.png</img> Which?")],
    "a token such as <|im_end|>, <video> or <image> in its text": [
        chat("What is <|image_pad|>?"), chat("<video>Which?"), chat(completion=CHAIN.replace("legs", "<|im_end|>"))]}


def test_chains_are_kept_or_skipped_for_a_reason(convert, pictures, tmp_path, capsys):
    found, counts, printed = convert([*GOOD_CHATS, *itertools.chain(*BAD_CHATS.values()), *GOOD_CHATS * 9])
    assert counts == {"kept": 30, **{reason: len(bad) for reason, bad in BAD_CHATS.items()}}
    assert found["question"][:3] == ["Which?", "Which of them?", "Which?"] and "become completions" in printed
    assert found["answer"][:] == ["B"] * 30 and found["completion"][:] == [CHAIN] * 30
    assert [*map(sizes, found)][:3] == [[(56, 84)], [(56, 84)], [(84, 56)]]
    again, counts, _ = prepared(tmp_path / "again", capsys, "--from", tmp_path / "own/train.parquet")
    assert counts == {"kept": 30} and again.to_list()[:3] == found.to_list()[:3]
    # another data set is not written over it
    stops("again exists", prepared, tmp_path / "again", capsys, "--from", pictures / "own.jsonl")


TEXT, BINARY, IMAGE = datasets.Value("string"), datasets.Value("binary"), datasets.Image()
PIXELS, NUMBERED = {"bytes": ONE, "path": None}, [f"image_{number}" for number in range(1, 8)]
VOTED, VOTES = [dict(answer=TEXT)], [dict(answer=answer) for answer in ("2", "two", "2")]


def mmmu(options, answer, question="<image 1> Which?", images=1):
    return dict(options=options, answer=answer, question=question) | dict.fromkeys(NUMBERED[:images], PIXELS)


FORMS = [  # usual forms of images
    (datasets.List(IMAGE), [{"bytes": ONE, "path": "gone.jpg"}]), (BINARY, ONE), (datasets.List(TEXT), ["b.jpg"]),
    ({"bytes": BINARY, "path": TEXT}, {"path": "b.jpg"})]
PUBLISHED = [  # features but for the question, rows, and (options, answer) of those that are kept
    (dict.fromkeys(["id", "options", "answer"], TEXT) | dict.fromkeys(NUMBERED, IMAGE), [  # MMMU's
        mmmu("['cat', 'dog']", "B"), mmmu("[]", "5"), mmmu("['a\\'s', 'b']", "A"), mmmu("x", "A"),
        mmmu("['cat', 'dog']", "A", images=2), mmmu("['cat', 'dog']", "A", "<image 2> Which?")],
     [(CAT_DOG, "dog"), ([], "5"), (["a's", "b"], "a's")]),
    (dict(multiple_choice_answer=TEXT, answers=VOTED, image=IMAGE),  # VQAv2's
     [dict(multiple_choice_answer="two", answers=VOTES, image=PIXELS)], [([], "two")]),
    (dict(answers=VOTED, image=IMAGE), [dict(answers=VOTES, image=PIXELS)], [([], "2")]),
    (dict(image=TEXT, decoded_image=IMAGE, choices=datasets.List(TEXT), answer=TEXT), [  # MathVista's
        dict(image="images/1.jpg", decoded_image=PIXELS, choices=choices, answer=answer)
        for choices, answer in [(["(A) 3", "(B) 4"], "4"), (None, "1.2")]], [(["3", "4"], "4"), ([], "1.2")]),
    *[(dict(image=kind, solution=TEXT), [dict(image=value, solution="cat")], [([], "cat")]) for kind, value in FORMS]]


@pytest.mark.parametrize("features, rows, kept", PUBLISHED)
def test_usual_layouts_are_read_from_files_folders_and_splits(features, rows, kept, tmp_path, capsys):
    features = features | dict(question=TEXT)
    rows = [dict.fromkeys(features) | {"question": "Which?"} | row for row in rows]
    data = datasets.Dataset.from_list(rows, datasets.Features(features))
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(validation=data, test=data).save_to_disk(tmp_path / "two")
    data.to_parquet(tmp_path / "folder/validation-0.parquet")
    for folder in "folder", "one", "two":
        (tmp_path / folder / "b.jpg").write_bytes(ONE)
    for source, *split in [["folder/validation-0.parquet"], ["one"], ["folder", "--split", "validation"],
                           ["two", "--split", "test"]]:
        found, _, _ = prepared(tmp_path / f"from-{source}", capsys, "--from", tmp_path / source, *split)
        assert list(zip(found["options"], found["answer"])) == kept and set(found["question"]) == {"Which?"}
        assert [*map(sizes, found)] == [[(84, 56)]] * len(kept)
    for source, splits in ("folder", "--split validation."), ("two", "--split validation or --split test."):
        stops(f"{source} no split train {splits}", prepared, tmp_path / "out", capsys, "--from", tmp_path / source)


def test_rows_without_images_are_kept_where_no_image_is_meant(convert):
    without = [dict(question=question, answer="cat") for question in ("Which?", "<image>Which?")]
    for others, flags, images in ([], [], [0]), ([own()], [], [1]), ([own()], ["--columns", "images="], [0, 0]):
        found, _, printed = convert(others + without, *flags)
        assert [*map(len, found["images"])] == images and ("rows have no images" in printed) == (0 in images)


def test_columns_of_your_own_have_names_of_your_own(convert):
    row = {"img": ["sub/b.jpg", "a.png"], "q": "Which?", "label": "(B)", "choices": ["this", "that"], "chain": CHAIN}
    columns = "images=img,question=q, answer=label,question_type=kind,completion=chain"
    (one,), (other,) = (convert([row | {"kind": "mine"}], "--multi_image", "--columns", columns + options)[0]
                        for options in ("", ",options="))
    assert (one["question_type"], one["completion"], len(one["images"])) == ("mine", CHAIN, 2)
    assert (one["answer"], one["options"], other["answer"], other["options"]) == ("that", ["this", "that"], "(B)", [])


def test_data_that_cannot_be_prepared_stops(sat, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = sat / "SAT_train.parquet"
    pq.write_table(pq.read_table(raw).drop_columns(["question"]), "less.parquet")
    Path("list.json").write_text('[{"a": 1},\n{"b" 2}]')
    Path("lines.jsonl").write_text('{"a": 1}\n\n{"b": 2')
    Path("chain.json").write_text(json.dumps([chat(images="none.png")]))
    all_stop(lambda flags: prepare_sat.main(["--out", "out", "--from", *flags]), {
        f"{pictures}/a.png": "a.png Parquet", "less.parquet": "less.parquet question image_bytes, answers",
        "less.parquet --columns answer=label": "answer=label image_bytes", "x" * 300: "xxx hub",
        "less.parquet --columns reply=answers": "reply=answers question_type",
        "less.parquet --columns answer": "--columns OURS=THEIRS", f"{raw} --columns answer=": "answer=NAME",
        "list.json": "list.json line 2 column", "lines.jsonl": "line 3", "chain.json": "chain.json no row",
        f"{raw} --limit 0": "--limit 0", f"{raw} --split test": "--split test",
        f"{raw} --out /proc/none": "/proc/none written", f"{raw} --out {'x' * 300}": "xxx written"})
    assert not list(tmp_path.glob("out/*")) and not Path("data").exists()


def test_images_are_seen_upright_and_white_where_they_are_transparent():
    image = Image.new("RGB", (40, 24), "red")
    image.paste("blue", (0, 0, 20, 12))
    opened = lambda data: g.open_image(dict(bytes=data, path=None), "row 7")
    seen = opened(turned(image))
    assert Image.open(io.BytesIO(turned(image))).size == (24, 40) and seen.size == image.size
    for corner in (2, 2), (37, 2), (2, 21):
        assert seen.getpixel(corner) == pytest.approx(image.getpixel(corner), abs=40)
    image.putalpha(0)
    assert opened(encoded(image, "PNG")).getpixel((2, 2)) == (255, 255, 255)
    for deep in encoded(Image.new("I;16", (9, 9)), "PNG"), encoded(Image.new("F", (9, 9)), "TIFF"):
        stops("row 7 8 bits", opened, deep)


def test_data_that_is_no_training_data_stops(train, sat, world, tmp_path):
    path = tmp_path / "own.parquet"
    pq.write_table(pq.read_table(sat / "train.parquet").replace_schema_metadata(None), path)
    all_stop(lambda flags: train(tmp_path / "run", *flags), {
        f"--data {g.TOY}/README.md": "README.md Parquet", "--max_prompt_length 3": "--max_prompt_length 3",
        f"--data {path}": "own.parquet prepare_sat.py --from"})
    assert not (tmp_path / "run").exists()
    write_rows(path, {}, dict(images=[]))
    stops("row 1 no image 1 process", fitting, path, world, processes=2)


def test_draw_walks_through_seeded_permutations():
    rows, walk = list("abcdefg"), g.draw_rows("abcdefg", 0, 0, 80)
    epochs = [walk[i:i + 7] for i in range(0, 77, 7)]
    assert all(sorted(epoch) == rows for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert walk != g.draw_rows(rows, 1, 0, 80)
    for size in 1, 5, 16:  # a step, or a rank's share; may cross epochs, or be larger than one
        assert sum((g.draw_rows(rows, 0, first, size) for first in range(0, 80, size)), []) == walk


# ---- A run -----------------------------------------------------------------------------------------------

SHOWN = []  # (run, what came of the step) of each step of `trained`


@pytest.fixture(scope="session")
def trained(train, cvbench, tmp_path_factory):
    """-> the folder of a run, evaluated on the way"""
    folder, show = tmp_path_factory.mktemp("runs") / "sat", eval_cvbench.shown_groups
    with pytest.MonkeyPatch.context() as context:
        context.setattr(eval_cvbench, "shown_groups", lambda run, step, came, after: (
            SHOWN.append((run, came)) or show(run, step, came, after)))
        train(folder, "--eval_steps", "2", "--eval_data", cvbench)
    return folder


def test_a_run_leaves_its_files_and_logs_every_metric_and_completion(trained, sat):
    assert {path.name for path in trained.iterdir()} == {
        "config.json", "metrics.jsonl", "completions.jsonl", "rollouts.jsonl", "eval.jsonl", "curves.png",
        "rollouts.html", ".lock", "checkpoint-1", "checkpoint-2", "checkpoint-3", "final"}
    assert [(trained / f"checkpoint-{i}/state").exists() for i in (1, 2, 3)] == [False, False, True]
    metrics, samples = jsonl(trained / "metrics.jsonl", drop="-"), jsonl(trained / "completions.jsonl")
    assert [m["step"] for m in jsonl(trained / "eval.jsonl")] == [0, 2, 3] and len(samples) == 3 * 8
    for step, m in enumerate(metrics, 1):
        own = [s for s in samples if s["step"] == m["step"] == step]
        average, rewards = lambda name: sum(s[name] for s in own) / 8, torch.tensor([s["reward"] for s in own])
        assert all(map(math.isfinite, m.values())) and SHOWN[0][0].optimizer.defaults["weight_decay"] == 0
        assert m["sampler_mismatch"] < 1e-4 and m["clip_ratio"] == 0 and m["grad_norm"] > 0
        assert m == pytest.approx(m | {
            "reward": average("reward"), "rewards/letters/best": rewards.view(2, 4).amax(1).mean().item(),
            "reward_std": rewards.view(2, 4).std(1).mean().item(), "frac_reward_zero_std": 0,
            "completions/mean_length": average("length"), "completions/clipped_ratio": 1 - average("finished"),
            "learning_rate": (4 - step) / 3 * 1e-3})  # linear, to 0
        assert [s["advantage"] for s in own] == pytest.approx(g.group_advantages(rewards, 4).tolist(), abs=1e-3)
    assert (metrics[0]["kl"], metrics[0]["loss"]) == pytest.approx((0, 0), abs=1e-6) and metrics[2]["kl"] > 1e-6
    rows = pq.read_table(sat / "train.parquet").to_pylist()
    for s in samples:
        row, parts = rows[s["row"]], [s[f"rewards/{name}"] for name in ("accuracy", "format", "letters")]
        assert s["prompt"] == g.render(row, "base", None) and s["completion"].startswith("<think>")
        assert (s["reward"], parts[2]) == pytest.approx((sum(parts), g.REWARDS["letters"](**row | s)))


@pytest.mark.parametrize("name", ["checkpoint-1", "checkpoint-3", "final"])
def test_checkpoints_are_models_for_transformers_and_servers(name, trained, world):
    folder, (tokenizer, image_processor) = trained / name, g.load_processors(trained / name)
    ours, theirs = g.load_model(folder, tokenizer), AutoModelForImageTextToText.from_pretrained(folder).eval()
    ours, theirs, start = (world.logits(model, world.each[2], [*range(9)]) for model in (ours, theirs, world.model))
    assert (ours - theirs).abs().max() < 1e-4 < 1e-2 < (ours - start).abs().max()
    assert weights_of(folder).keys() == weights_of(world.folder).keys()
    # a server asks as it was trained
    assert image_processor.size["longest_edge"] == 401408 and tokenizer.chat_template == g.SERVED_PROMPT
    text = json.loads((folder / "config.json").read_text())["text_config"]  # as transformers 4.57 reads it
    assert text["rope_theta"] == 1e6 and text["rope_scaling"]["mrope_section"] == [1, 1, 2]
    assert "rope_parameters" not in text and "additional_special" in (folder / "tokenizer_config.json").read_text()
    assert len(json.loads((folder / "generation_config.json").read_text())["eos_token_id"]) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_trains_saves_and_is_evaluated(family, worlds, train, evaluate, tmp_path, monkeypatch):
    seen, step = [], recipes.sft_step
    monkeypatch.setattr(recipes, "sft_step", lambda *args: seen.append(step(*args)) or seen[-1])
    flags = ["--model_name_or_path", worlds[family].folder, "--max_pixels", 12000]
    train(tmp_path / "grpo", *flags, "--max_steps", 2, main=recipes.main)
    sft = "--max_steps 1 --algorithm sft --freeze vision --rewards accuracy --max_completion_length 30".split()
    train(tmp_path / "sft", *flags, *sft, main=recipes.main)
    metrics, (ours,) = (jsonl(tmp_path / name / "metrics.jsonl") for name in ("grpo", "sft"))
    assert len(metrics) == 2 and all(m["sampler_mismatch"] < 1e-4 and m["grad_norm"] > 0 for m in metrics)
    (came,) = seen
    assert ours["nll"] == pytest.approx(-came.logps[came.rollout.completion_mask].mean().item(), rel=1e-5)
    assert ours["loss"] == pytest.approx(-1) and ours["rewards/accuracy"] == 1  # of all that was written: no block
    assert "<think>" not in came.batch.texts[0] and "sampler_mismatch" not in ours
    before, after, sft = map(weights_of, (worlds[family].folder, tmp_path / "grpo/final", tmp_path / "sft/final"))
    assert before.keys() == after.keys() == sft.keys()
    untied = '"tie_word_embeddings": false' in (tmp_path / "grpo/final/config.json").read_text()
    assert untied == ("lm_head.weight" in before) == (family == "qwen2_5_vl")  # whatever config.json said
    moved = lambda trained: {name for name in before if not torch.equal(before[name].float(), trained[name])}
    assert len(moved(after)) > 0.9 * len(before) and moved(sft) and not any("visual" in name for name in moved(sft))
    results, = evaluate(tmp_path / "results", "--model", tmp_path / "grpo/final").values()
    assert len({r["answers"][0]["completion"] for r in jsonl(results / "answers.jsonl")}) > 1


BROKEN_MODELS = [  # a file of a model, what is changed in its JSON, or its text (None: gone), words of the sentence
    ("tokenizer.json", None, "tokenizer"), ("preprocessor_config.json", None, "image processor"),
    ("model.safetensors", None, "cannot load"), ("adapter_config.json", "{}", "adapter Merge"),
    ("model.safetensors", "version https://git-lfs.github.com/spec/v1\n", "cannot load"),
    *[("config.json", dict(quantization_config=dict(quant_method=how)), "quantised bf16") for how in (
        "fp8", "awq", "gptq", "bitsandbytes")],
    *[("config.json", change, words) for change, words in [
        (dict(model_type="llava"), "llava qwen2_vl qwen2_5_vl qwen3_vl"), (dict(model_type="mine"), "cannot load"),
        ('{"model_type": "qwen', "cannot load"), (dict(use_sliding_window=True, sliding_window=9), "sliding window"),
        (dict(intermediate_size=96), "cannot load"), (dict(num_hidden_layers=2), "disagree layers.2"),
        (dict(num_hidden_layers=4), "disagree layers.3"), (dict(image_token_id=5), "disagree image_pad")]]]


@pytest.mark.parametrize("file, change, words", BROKEN_MODELS)
def test_a_model_folder_that_cannot_be_trained_is_named(file, change, words, world, train, evaluate, tmp_path):
    folder = shutil.copytree(world.folder, tmp_path / "model")
    if isinstance(change, dict):
        change = json.dumps(json.loads((folder / file).read_text()) | change)
    (folder / file).unlink() if change is None else (folder / file).write_text(change)
    stops(f"{folder} {words}", train, tmp_path / "run", "--model_name_or_path", folder)
    assert not (tmp_path / "run").exists()
    stops(str(folder), evaluate, tmp_path / "results", "--model", folder)


# what a launcher leaves in the environment
LAUNCHES = """MASTER_ADDR=10.0.0.1 LOCAL_RANK=0 RANK=3 PMI_SIZE=2 OMPI_COMM_WORLD_SIZE=8 MV2_COMM_WORLD_SIZE=2
    WORLD_SIZE=two WORLD_SIZE= WORLD_SIZE=-1 ACCELERATE_USE_DEEPSPEED=true ACCELERATE_USE_MEGATRON_LM=1
    ACCELERATE_USE_PARALLELISM_CONFIG=true"""
HARMLESS = "ACCELERATE_MIXED_PRECISION=fp16 ACCELERATE_USE_DEEPSPEED=false PMI_SIZE=1 ACCELERATE_USE_MEGATRON_LM="


def test_launches_that_would_train_alone_or_otherwise_stop(train, evaluate, tmp_path, monkeypatch):
    for name, value in (variable.split("=") for variable in LAUNCHES.split()):
        advice = "FSDP2" if "_USE_" in name else "WORLD_SIZE --multi_gpu"
        monkeypatch.setenv(name, value)
        for program in train, evaluate:
            stops(f"{name} torchrun unset {advice}", program, tmp_path / "run")
        monkeypatch.delenv(name)
    assert not (tmp_path / "run").exists()
    for variable in HARMLESS.split():
        monkeypatch.setenv(*variable.split("="))
    monkeypatch.setattr(g, "gather_object", lambda mine: [*mine, True] if mine == [False] else mine)
    train(tmp_path / "run")  # another process is asked to stop
    assert [m["sampler_mismatch"] < 1e-4 for m in jsonl(tmp_path / "run/metrics.jsonl")] == [True]


def test_beta_0_loads_no_reference_and_later_iterations_clip(train, tmp_path, monkeypatch):
    monkeypatch.setattr(g, "load_model", Mock(wraps=g.load_model))
    train(tmp_path / "a", *"--beta 0 --max_steps 2 --num_iterations 3 --learning_rate 0.01 --epsilon 0.05".split())
    assert g.load_model.call_count == 1
    assert all(m["kl"] == 0 and m["clip_ratio"] > 0 and m["sampler_mismatch"] < 1e-4
               for m in jsonl(tmp_path / "a/metrics.jsonl"))
    for norm in "0", "1e9", "1e-9":
        train(tmp_path / norm, "--max_steps", 1, "--max_grad_norm", norm, "--beta", 0)
    equal = [same_weights(tmp_path / "0/final", tmp_path / f"{norm}/final") for norm in ("1e9", "1e-9")]
    assert equal == [True, False]  # 0: never clipped


def test_bf16_with_float32_weights_beside_it_trains_saves_and_resumes(train, tmp_path, monkeypatch):
    monkeypatch.setattr(g, "compute_dtype", lambda device: torch.bfloat16)  # as on a GPU
    step, seen = g.step_optimizer, []

    def watched(run, cfg):
        before, norm = copy.deepcopy(run.sampler).parameters(), step(run, cfg)
        pairs = [*zip(run.sampler.parameters(), run.master.parameters(), before, strict=True)]
        assert all(torch.equal(x, own.bfloat16()) and x.data_ptr() != own.data_ptr() for x, own, _ in pairs)
        assert run.policy.model is run.sampler  # what samples is what is trained
        seen.append(sum(not torch.equal(x, old) for x, _, old in pairs))
        return norm

    monkeypatch.setattr(g, "step_optimizer", watched)
    whole, again, offloaded = (tmp_path / name for name in ("whole", "again", "offloaded"))
    flags = "--num_iterations 2 --lr_scheduler_type constant --max_steps".split()
    train(whole, *flags, 3)
    assert len(seen) == 6 and min(seen) > 20  # weights that moved
    train(offloaded, *flags, 3, "--cpu_offload", "true")
    train(again, *flags, 2)
    g.main(["--resume", "--output_dir", str(again), "--max_steps", "3"])
    assert same_run(whole, again) and same_run(whole, offloaded)
    dcp_to_torch_save(again / "checkpoint-3/state", tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    assert {x.dtype for x in weights_of(again / "final").values()} == {torch.bfloat16}
    assert {x.dtype for x in state["weights"].values()} == {torch.float32}
    assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {6}


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_does_harm(train, trained, tmp_path, monkeypatch):
    update, calls, run = g.update, [], tmp_path / "run"

    def broken(policy, *args):
        found = update(policy, *args)
        calls.append((policy, copy.deepcopy(policy.state_dict())))
        if len(calls) == 2:
            next(policy.parameters()).grad[0] = math.inf
        return found

    monkeypatch.setattr(g, "update", broken)
    stops("step 2 not finite --learning_rate bad_batch.jsonl", train, run)
    assert all(torch.equal(weight, calls[1][1][name]) for name, weight in calls[1][0].state_dict().items())
    assert len(jsonl(run / "metrics.jsonl")) == 1 and len(jsonl(run / "bad_batch.jsonl")) == 8
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    calls.clear()
    stops("step 1 not finite", train, tmp_path / "three", "--num_iterations", 3)
    assert len(calls) == 2  # a third update on the same rollout is not tried
    monkeypatch.setattr(g, "update", update)
    train(run, "--resume")
    assert same_run(run, trained) and len(jsonl(run / "bad_batch.jsonl")) == 8


def test_a_disk_with_too_little_room_is_named_before_training(train, world, tmp_path, monkeypatch):
    run = SimpleNamespace(output_dir=tmp_path, sampler=g.load_model(world.folder, world.tokenizer))
    for steps, done, limit, models, states in [  # models and state/ that the rest of the run has on the disk
            (5, 0, None, 3 + 1, 2), (5, 4, None, 1 + 1, 1), (6, 0, 1, 1 + 1, 2), (6, 0, 9, 3 + 1, 2)]:
        cfg = g.Config(max_steps=steps, save_steps=2, save_total_limit=limit)
        room = SimpleNamespace(free=run.sampler.num_parameters() * (4 * models + 12 * states))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
        g.check_disk(run, cfg, done)
        room.free -= 1
        stops("GB left save --save_total_limit --output_dir", g.check_disk, run, cfg, done)
    stops("GB left", train, tmp_path / "run")


# ---- Stopping and going on -------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_second_signal_and_what_comes_after_a_run_get_the_old_handler(number, small_run, tmp_path):
    got, step = [], g.train_step
    old = signal.signal(number, lambda number, _: got.append(number))
    own = signal.getsignal(number)

    def signalled(*args):
        for so_far in [], [number]:
            os.kill(os.getpid(), number)
            assert got == so_far
        return step(*args)

    try:
        g.train(g.parse_config([*small_run, "--output_dir", str(tmp_path / "run")]), signalled)
        assert signal.getsignal(number) == own
    finally:
        signal.signal(number, old)
    assert [path.name for path in g.checkpoints(tmp_path / "run")] == ["checkpoint-1"]


def test_a_run_goes_on_only_as_it_began(train, sat, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sat, "data")
    train("run", "--max_steps", 1, "--data", "data")
    monkeypatch.chdir("data")  # paths in config.json are absolute
    run = tmp_path / "run"
    go_on = lambda folder, *more: g.main(["--resume", "--output_dir", str(folder), "--max_steps", *more])
    refused = lambda words, folder=run, *more: stops(words, go_on, folder, "9", *more)
    rows = pq.read_table("train.parquet")
    pq.write_table(pa.concat_tables([rows.slice(1), rows.slice(0, 1)]), "train.parquet")
    refused("did not begin with train.parquet")
    shutil.copy(sat / "train.parquet", "train.parquet")
    refused("--prompts_per_step", run, "--prompts_per_step", "4")
    capsys.readouterr()
    go_on(run, "2", *"--num_generations 2 --max_completion_length 2 --lr_scheduler_type constant".split())
    assert sorted(re.findall("--resume: (.*) from here on", capsys.readouterr().out)) == [
        "lr_scheduler_type was linear and is constant", "max_completion_length was 8 and is 2",
        "max_steps was 1 and is 2", "num_generations was 4 and is 2"]
    lengths = [s["length"] for s in jsonl(run / "completions.jsonl") if s["step"] == 2]
    assert len(lengths) == 4 and max(lengths) <= 2 and jsonl(run / "metrics.jsonl")[1]["learning_rate"] == 1e-3
    config = (run / "config.json").read_text()
    (run / "checkpoint-1/config.json").write_text(config[:99])
    for folder in tmp_path / "data", run / "checkpoint-1", run / "final":  # none, half of one, a model's
        refused("--resume config.json", folder)
    (run / "config.json").write_text(json.dumps(json.loads(config) | dict(algorithm="sft")))
    refused("algorithm recipes.py")
    (run / "config.json").write_text(config)
    for damage in (lambda state: (state / ".metadata").write_bytes(b"")), shutil.rmtree:
        damage(run / "checkpoint-2/state")
        refused("checkpoint-2/state cannot be read")
    for checkpoint in g.checkpoints(run):
        shutil.rmtree(checkpoint)
    refused("no checkpoint left")  # it does not begin anew, over its own logs


def test_a_folder_belongs_to_one_run(train, tmp_path, monkeypatch):
    monkeypatch.setattr(g, "RUNS", tmp_path)
    others = []  # as other processes hold them
    for name in "toy", "toy-2", "toy-3":
        folder, lock = g.claim(g.Config())
        assert folder.name == name
        lock.release()
        others.append(FileLock(folder / ".lock").acquire().lock)
    (tmp_path / "toy/config.json").write_text("{}")
    stops(f"{folder} in use", g.claim, g.Config(output_dir=str(folder), resume=True))
    others.clear()  # a lock goes with its process, or here with its object
    assert g.claim(g.Config())[0].name == "toy-2"  # one that was killed before it began leaves nothing to clean
    stops(f"{tmp_path}/toy not empty", train, tmp_path / "toy")
    assert {path.name for path in (tmp_path / "toy").iterdir()} == {".lock", "config.json"}


def test_a_run_that_was_stopped_and_killed_ends_as_if_it_had_not_been(train, small_run, tmp_path):
    flags, folder = "--max_steps 14 --save_steps 3 --rewards accuracy,format,length --resume".split(), tmp_path / "run"
    train(tmp_path / "whole", *flags, main=recipes.main)  # there is nothing to resume
    for number, argv in (signal.SIGINT, [*small_run, *flags]), (signal.SIGKILL, ["--resume"]):
        process = starting("-u", recipes.__file__, "--output_dir", folder, *argv)
        steps = (line for line in process.stdout if line.startswith("step "))
        assert next(steps) and next(steps)
        process.send_signal(number)
        said = process.communicate()[0]
        if number == signal.SIGINT:
            assert process.returncode == 0 and f"--resume --output_dir {folder}" in said
            assert g.checkpoints(folder)[-1].name == f"checkpoint-{len(jsonl(folder / 'metrics.jsonl'))}"
    assert process.returncode == -signal.SIGKILL and not (folder / "final").exists()
    (folder / "checkpoint-14.tmp/stale").mkdir(parents=True)  # what a run leaves that is killed while it saves
    for name in "metrics.jsonl", "completions.jsonl":
        (folder / name).open("a").write('{"step": 99}\n{"step": 99, "half a li')
    for steps in "14", "13":  # a run that is complete stays as it is
        recipes.main(["--resume", "--output_dir", str(folder), "--save_total_limit", "2", "--max_steps", steps])
        assert same_run(tmp_path / "whole", folder)
    assert {x.name for x in [*folder.glob("check*"), *folder.glob("*/stale")]} == {"checkpoint-12", "checkpoint-14"}


def test_a_save_that_fails_says_so_and_leaves_the_last_checkpoint_whole(train, tmp_path):
    run, resource = tmp_path / "run", pytest.importorskip("resource")
    train(run, "--max_steps", 1)
    size = (run / "checkpoint-1/model.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in 0.5, 1.5:  # as if the disk were full: for the weights, for state/
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(room * size), limits[1]))
        try:
            stops("cannot save checkpoint-2 No space? intact --resume", train, run, "--resume")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]  # and no .tmp
    for _ in range(2):  # the second time as if the disk had been full for final/ alone
        train(run, "--resume")
        shutil.rmtree(run / "final")
    assert [m["step"] for m in jsonl(run / "metrics.jsonl")] == [1, 2, 3]


def test_what_cannot_be_drawn_does_not_stop_training(train, worlds, tmp_path, monkeypatch, capsys):
    # rows without a picture, from which the image tower alone learns nothing
    write_rows(tmp_path / "text.parquet", *[dict(images=[])] * 4)
    train(tmp_path / "run", *"--eval_steps 1 --freeze llm --max_steps 2 --data".split(), tmp_path / "text.parquet",
          "--model_name_or_path", worlds["qwen2_5_vl"].folder)
    assert same_weights(tmp_path / "run/checkpoint-1", tmp_path / "run/final")
    assert "warning" not in capsys.readouterr().err and (tmp_path / "run/rollouts.html").exists()
    monkeypatch.setattr(eval_cvbench, "draw", lambda *_: 1 / 0)
    train(tmp_path / "other", "--max_steps", 1)
    assert "ZeroDivisionError" in capsys.readouterr().err and (tmp_path / "other/checkpoint-1").exists()


# ---- The house: one file that stands alone, and what is built around it ------------------------------------

def test_the_script_trains_alone_in_an_empty_folder_under_any_name(tmp_path, monkeypatch):
    shutil.copy(g.__file__, tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    flags = f"--model_name_or_path {g.TOY}/base --data {g.TOY} --prompts_per_step 2 --max_steps 1 --beta 0".split()
    said, = succeed(starting("-I", "mine.py", *flags))  # -I: without PYTHONPATH
    assert said.count("eval_cvbench.py is not here") == 1 and "step    1" in said
    run, = Path("runs").iterdir()
    assert {path.name for path in run.iterdir()} == {".lock", "config.json", "metrics.jsonl", "checkpoint-1", "final"}
    find = importlib.util.find_spec
    with monkeypatch.context() as alone:
        alone.setattr(importlib.util, "find_spec", lambda name, *rest: name != "eval_cvbench" and find(name, *rest))
        g.main(["--resume", "--output_dir", str(run), "--max_steps", "2"])
    assert len(jsonl(run / "metrics.jsonl")) == 2 and '"beta": 0.0,' in (run / "config.json").read_text()
    assert not same_weights(run / "checkpoint-1", run / "final") and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    Path("eval_cvbench.py").write_text("import no_such_library")  # beside it, but broken: not forgiven
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "eval_cvbench")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        g.main([*flags, "--output_dir", "broken"])


def test_each_script_imports_only_what_stands_below_it():
    def imported(nodes):
        """-> those of our modules that the import statements among nodes name, and import_module(...)"""
        texts = [ast.unparse(x) for x in nodes if isinstance(x, (ast.Import, ast.ImportFrom, ast.Call))]
        own = "grpo_vision|recipes|prepare_sat|eval_cvbench|test_grpo|make|step|plan"
        return {*re.findall(rf"\b({own})\b", " ".join(x for x in texts if re.match("from |import |importlib.im", x)))}

    for name, at_the_top, inside in [
            ("grpo_vision", set(), {"eval_cvbench"}), ("recipes", {"grpo_vision"}, set()),
            *[(name, {"grpo_vision", "recipes"}, set()) for name in ("eval_cvbench", "prepare_sat")]]:
        tree = ast.parse((g.HERE / f"{name}.py").read_text())
        assert imported(tree.body) == at_the_top and imported(ast.walk(tree)) == at_the_top | inside, name


def test_the_same_numbers_go_to_a_tracker(train, tmp_path, monkeypatch):
    stops("--report_to pip install wandb", train, tmp_path / "run", "--report_to", "wandb")
    calls = {name: create_autospec(getattr(g.Accelerator, name)) for name in ("init_trackers", "log", "end_training")}
    for name, call in calls.items():
        monkeypatch.setattr(g.Accelerator, name, call)
    train(tmp_path / "run", "--max_steps", 1)
    assert str(calls["init_trackers"].call_args.args[0].logging_dir) == str(tmp_path / "run")
    (_, metrics), at = calls["log"].call_args
    assert [metrics] == jsonl(tmp_path / "run/metrics.jsonl", drop="-") and at == dict(step=1)
    assert calls["end_training"].call_count == 1


# ---- One process or many ---------------------------------------------------------------------------------

# grpo_vision.py in float64, with completions that each question has, whichever process draws it
WORKER = """
import os, torch
from types import SimpleNamespace
import grpo_vision as g
from torch.distributed.tensor import DTensor

def draw(model, passes, G, C, temperature, generator):
    ids, lengths = [], []
    for row, length in ((row, n) for prompts in passes for row, n in zip(prompts.input_ids, prompts.lengths)):
        images = int((row == model.config.vision_start_token_id).sum())
        seeded = torch.Generator().manual_seed(int(row[:length].sum()))
        ids.append(torch.randint(1, 300, (G, C), generator=seeded))
        lengths.append(images * C // 2 - torch.randint(0, 4, (G,), generator=seeded))
    ids, lengths = torch.cat(ids), torch.cat(lengths)
    mask = torch.arange(C) < lengths[:, None]
    return SimpleNamespace(completion_ids=ids, completion_mask=mask, lengths=lengths, finished=ids[:, 0] % 2 == 0,
                           sampling_logps=-6 * mask.double())

def check_and_refresh(sampler, master):
    assert all(isinstance(x, DTensor) == (os.environ.get("WORLD_SIZE") == "2") for x in master.parameters())
    refresh(sampler, master)

load_model, refresh = g.load_model, g.refresh
g.load_model = lambda path, tokenizer, attention, dtype: load_model(path, tokenizer, attention, torch.float64)
g.compute_dtype = lambda device: torch.float64
g.sample, g.refresh = draw, check_and_refresh
g.REWARDS["mine"] = lambda completion, **_: sum(map(ord, completion)) % 7
g.main()
"""
TORCHRUN = "-m torch.distributed.run --nproc_per_node"
ONE_MACHINE = f"{TORCHRUN} 2 --standalone"


def starting(launcher, script, *flags):
    """Start a script by python with the arguments of a launcher, "" for none -> the program, running."""
    command = [sys.executable, *launcher.split(), *map(str, (script, *flags))]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "PYTHONPATH": str(g.HERE)})


def succeed(*running):
    """-> what the programs printed, once they have ended without an error."""
    said = [process.communicate()[0] for process in running]
    for process, text in zip(running, said):
        assert process.returncode == 0, text[-3000:]
    return said


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_two_processes_with_sharded_weights_equal_one_however_they_are_started(family, worlds, small_run, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    flags = f"""--rewards accuracy,format,mine --max_completion_length 8 --score_tokens 18 --max_pixels 20000
        --loss_type dapo --mask_truncated_completions true --prompt base --max_steps 2 --eval_steps 2
        --model_name_or_path {worlds[family].folder}""".split()
    start = lambda run, launcher, *more: starting(launcher, tmp_path / "worker.py", *small_run, *flags,
                                                  "--output_dir", run, *more)
    one, two, offloaded, machines = (tmp_path / name for name in ("one", "two", "offloaded", "machines"))
    said = succeed(start(one, "" if family == "qwen2_vl" else f"{TORCHRUN} 1 --standalone"), start(two, ONE_MACHINE))
    if family == "qwen2_vl":
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            place = f"--nnodes 2 --master_addr 127.0.0.1 --master_port {found.getsockname()[1]} --node_rank"
        said += succeed(start(offloaded, "-m accelerate.commands.launch --num_processes 1", "--cpu_offload", "true"),
                        *(start(machines, f"{TORCHRUN} 1 {place} {rank}") for rank in (0, 1)))
        assert same_run(one, offloaded) and same_run(two, machines)
    assert not any("view tensor" in text or "Casting" in text for text in said)
    logs = [jsonl(run / "metrics.jsonl") + jsonl(run / "eval.jsonl", drop="set") for run in (one, two)]
    assert all(x == pytest.approx(y, rel=1e-6, abs=1e-9) for x, y in zip(*logs, strict=True))
    start, error = weights_of(worlds[family].folder), lambda found, x: ((found - x).norm() / x.norm()).item()
    x, y = weights_of(one / "final"), weights_of(two / "final")
    assert x.keys() == y.keys() == start.keys()
    assert all(error(y[part], x[part]) < 1e-6 < 1e-5 < error(start[part], x[part]) for part in x)
    for run in one, two:
        dcp_to_torch_save(run / "checkpoint-2/state", run / "state.pt")
    x, y = (torch.load(run / "state.pt")["optimizer"]["state"] for run in (one, two))
    assert x.keys() == y.keys() and len(x) >= len(start)
    assert all(error(y[part]["exp_avg"], x[part]["exp_avg"]) < 1e-6 for part in x)  # means of the gradients
    # about two images, in two chunks; about one, in one
    assert {True, False} == {s["length"] > 4 for s in jsonl(two / "completions.jsonl")}


# ---- Evaluation ------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def evaluate(world, cvbench):
    """evaluate(output_dir, *flags): the small model on the small CV-Bench -> {mode: folder of its results}"""
    def run(output_dir, *flags):
        eval_cvbench.main(["--model", world.folder, "--data", str(cvbench), "--output_dir", str(output_dir),
                           *"--max_new_tokens 6 --batch_size 2".split(), *map(str, flags)])
        return {folder.name.split("--")[2]: folder for folder in Path(output_dir).iterdir()}
    return run


@pytest.fixture(scope="session")
def evaluated(evaluate, tmp_path_factory):
    return evaluate(tmp_path_factory.mktemp("results"), "--modes", "all")


def contents(folder):
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.name != "report.html"}


def test_all_modes_are_asked_in_the_papers_words(evaluate, evaluated, worlds, tmp_path, capsys):
    ending = "\nOutput the thinking process in <think> </think> and final answer in <answer> </answer> tags."
    user = "<|im_start|>user\n%s{question}%s<|im_end|>\n<|im_start|>assistant\n"
    asked = {"base-reasoning": "%s" + g.TEMPLATES["base"], "base-direct": "%s" + g.TEMPLATES["base-direct"],
             "instruct-direct": user.replace("}%s", "}"), "instruct-reasoning": user % ("%s", ending)}
    folders = evaluate(tmp_path, "--modes", "all", "--model", worlds["qwen2_5_vl"].folder)
    names = re.findall(r"^\| (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert {*"Count Relation Depth Distance ADE20K COCO Omni3D total 2D 3D official unparsed".split()} <= {*names}
    assert folders.keys() == asked.keys() and sorted(evaluated) == ["base-direct", "base-reasoning"]
    for mode, folder in [*folders.items(), *evaluated.items()]:
        records, prompt = jsonl(folder / "answers.jsonl"), asked[mode] % g.IMAGE_TOKENS
        assert [r["id"] for r in records] == [0, 1, 2, 3, 4] and {r["answer"] for r in records} == {"4"}
        assert [r["prompt"] for r in records] == [prompt.format(question=cvbench_text(n)) for n in (2, 3, 6, 4, 5)]
        assert all(r["answers"][0]["completion"].startswith("<think>") == (mode == "base-reasoning") for r in records)


def test_held_out_and_free_questions_are_asked_as_in_training(sat, worlds, evaluate, tmp_path):
    rows = pq.read_table(sat / "train.parquet").to_pylist()
    for q, row in zip(eval_cvbench.load_questions(str(sat / "train.parquet")), rows, strict=True):
        for template, tokenizer in ("base", None), ("instruct", worlds["qwen2_5_vl"].tokenizer):
            assert eval_cvbench.prompt_text(q, f"{template}-reasoning", tokenizer) == g.render(row, template, tokenizer)
        assert (q["answer"], q["options"]) == (row["answer"], row["options"])
    write_rows(tmp_path / "free.parquet", *[dict(options=[], answer="$0.5$")] * 2)
    folder, = evaluate(tmp_path / "r", *f"--data {tmp_path}/free.parquet --temperature 1 --batch_size 1".split()).values()
    one, other = jsonl(folder / "answers.jsonl")  # each batch has random numbers of its own
    assert one["answers"] != other["answers"] and '"chance": 0' in (folder / "summary.json").read_text()


def test_asking_prints_the_sampled_answer(world, pictures, capsys):
    ask = lambda flags: eval_cvbench.main(["--model", world.folder, "--max_new_tokens", "5", *flags])
    all_stop(ask, {"--ask ? --image none.png": "none.png", "--image a.png": "--ask", "--ask ": "--ask",
                   "--ask <|image_pad|>?": "--ask special --image"})
    ask(f"--ask Which? --image {pictures}/a.png {pictures}/sub/b.jpg".split())
    said = capsys.readouterr().out
    assert re.fullmatch(r"<think>.+\n\(cut off: .*\)\nanswer: \(no answer block\)\n", said, re.DOTALL)


def graded(*verdicts, **more):
    """-> records of questions with two options, each by the verdicts on its answers."""
    of = {True: dict(correct=True, chosen="a", length=11, extracted="(A)", completion="<answer>wait</answer>"),
          False: dict(correct=False, chosen=None, length=10, extracted="a", completion="")}
    return [{"options": "ab", "task": "Depth", "source": "Omni3D", **more, "right": sum(each), "answers": [
        dict(of[verdict], finished=more.get("source") != "COCO") for verdict in each]} for each in verdicts]


def test_scores_by_hand(cvbench, tmp_path):
    count = dict(task="Count", options="abcd")
    records = (graded([1], [0], source="ADE20K", **count) + graded([1], [1], [1], [0], source="COCO", **count)
               + graded([1], [0], [0], [0], [0]))
    scores, half = eval_cvbench.scores_of(records), 500 / 11  # 5 right of 11
    assert {name: s.value for name, s in scores.items()} == pytest.approx(
        {"Count": 400 / 6, "Depth": 20, "ADE20K": 50, "COCO": 75, "Omni3D": 20, "total": half, "2D": 62.5,
         "3D": 20, "official": 100 * ((1 / 2 + 3 / 4) / 2 + 1 / 5) / 2})
    assert [scores[name].chance for name in ("Count", "Depth", "2D", "official", "total")] == pytest.approx(
        [25, 50, 25, 37.5, 100 * (6 / 4 + 5 / 2) / 11])
    assert eval_cvbench.rates_of(records) == pytest.approx({
        "unparsed": 600 / 11, "truncated": 400 / 11, "one answer block": half, "reflection word": half,
        "mean length": 10 + 5 / 11})
    eval_cvbench.append_score(tmp_path / "eval.jsonl", 7, "set", records)
    assert jsonl(tmp_path / "eval.jsonl") == [dict(
        step=7, set="set", questions=11, accuracy=pytest.approx(half), mean_length=pytest.approx(10 + 5 / 11),
        standard_error=pytest.approx(100 * (5 / 11 * 6 / 11 / 11) ** 0.5))]
    assert eval_cvbench.smooth([0, 3, 6, 9, 0], 3) == [1.5, 3, 6, 5, 4.5]  # fewer at the ends
    chosen = [q["id"] for q in eval_cvbench.load_questions(str(cvbench), 3)]
    assert chosen == sorted(random.Random("questions").sample(range(5), 3)) != [0, 1, 2]
    whole = [record for task, source, n in [  # the paper's rows stand beside the published number of questions
        ("Count", "ADE20K", 633), ("Count", "COCO", 155), ("Relation", "COCO", 650), ("Depth", "Omni3D", 600),
        ("Distance", "Omni3D", 600)] for record in graded(*[[1]] * n, task=task, source=source)]
    *_, table = eval_cvbench.tables_of(whole)
    assert ["base + GRPO", "59.64", "66.76", "54.16", "56.66", "59.47"] in table and len(table) == 6
    assert table[1] == ["here", *["100.00"] * 5] and len(eval_cvbench.tables_of(whole[1:])) == 2


def test_intervals_and_the_sign_test_by_hand():
    of = lambda right, n: graded(*([i < right] for i in range(n)))  # records of n questions
    for right, low, high in (8, 49.02, 94.33), (0, 0, 27.75):  # Wilson's intervals of 8 and of 0 in 10
        score = eval_cvbench.score_of([(1, of(right, 10))])
        assert (score.low, score.high) == pytest.approx((low, high), abs=0.01)
    shares = [(1 / 4, 0.9, 3000), (1 / 4, 0.8, 4000), (1 / 2, 0.2, 6000)]  # many answers: the normal interval
    found = eval_cvbench.score_of([(weight, of(p * n, n)) for weight, p, n in shares])
    error = 100 * sum(weight**2 * p * (1 - p) / n for weight, p, n in shares) ** 0.5
    assert [found.low, found.high] == pytest.approx([52.5 - 1.96 * error, 52.5 + 1.96 * error], abs=0.02)
    a, b = of(9, 22), graded(*[[1]] * 6, *[[0]] * 7, *[[1]] * 9)  # of 22 pairs 12 are unequal, 9 of them for b
    sums = [abs(sum(signs)) for signs in itertools.product((1, -1), repeat=12)]
    assert eval_cvbench.sign_test(a, b) == pytest.approx(sum(s >= 6 for s in sums) / 2**12)
    assert eval_cvbench.sign_test(a, b) == eval_cvbench.sign_test(b, a) and eval_cvbench.sign_test(a, a) == 1


def test_pass_at_k_is_the_share_of_samples_of_k_that_hold_a_right_answer():
    verdicts = [[True, False, False, False], [True, True, False, True], [False] * 4, [True] * 4]
    scores = eval_cvbench.scores_of(graded(*verdicts))
    assert [*scores][:3] == ["pass@1", "pass@2", "pass@4"] and scores["pass@1"].value == scores["total"].value == 50
    for k in 1, 2, 4:
        each = [sum(map(any, itertools.combinations(rights, k))) / math.comb(4, k) for rights in verdicts]
        score = scores[f"pass@{k}"]
        assert (score.value, score.chance) == pytest.approx((25 * sum(each), 100 * (1 - 0.5**k)))
    # the interval is over questions: copies of an answer tell nothing new, 100 times as many questions do
    interval = lambda verdicts: eval_cvbench.scores_of(graded(*verdicts))["total"][2:4]
    assert interval([[True] * 4, [False] * 4]) == pytest.approx(interval([[True], [False]]))
    error = 100 * (sum((sum(rights) / 4 - 0.5) ** 2 for rights in verdicts) / 4 / 400) ** 0.5
    assert interval(verdicts * 100) == pytest.approx((50 - 1.96 * error, 50 + 1.96 * error), abs=0.05)


@pytest.mark.parametrize("flags, n, expected", [
    ("", 1, "base-reasoning"), ("--num_generations 5 --temperature 1 --batch_size 10", 5, "base-reasoning-pass@5")])
def test_a_killed_or_second_start_asks_what_is_missing(flags, n, expected, evaluate, tmp_path, monkeypatch):
    (mode, folder), = evaluate(tmp_path / "whole", *flags.split()).items()
    whole, append, asked = contents(folder), eval_cvbench.append_jsonl, []
    said = [[answer["completion"] for answer in record["answers"]] for record in jsonl(folder / "answers.jsonl")]
    assert mode == expected and [(len(some), len({*some}) > 1) for some in said] == [(n, n > 1)] * 5

    def killed(path, records):
        append(path, records)
        asked.extend(records)
        if len(asked) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(eval_cvbench, "append_jsonl", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "killed", *flags.split())
    folder, = (tmp_path / "killed").iterdir()
    for rank in 0, 1:  # two processes, killed in a line
        (folder / f"answers.rank{rank}.jsonl").open("a").write(whole["answers.jsonl"][:40])
    for _ in range(2):
        evaluate(tmp_path / "killed", *flags.split())
        assert len(asked) == 5 and contents(folder) == whole  # the same samples as without the kill
    (folder / "answers.jsonl").write_text("{\n" + whole["answers.jsonl"])
    stops("answers.jsonl line not JSON", evaluate, tmp_path / "killed", *flags.split())


def test_two_processes_give_the_results_of_one(evaluate, evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_cvbench, "main", lambda argv: succeed(starting(ONE_MACHINE, eval_cvbench.__file__, *argv)))
    found, one = evaluate(tmp_path)["base-reasoning"], evaluated["base-reasoning"]
    assert found.name == one.name and contents(found) == contents(one)


def test_other_weights_settings_or_questions_have_a_folder_of_their_own(evaluate, world, tmp_path):
    model = shutil.copytree(world.folder, tmp_path / "tiny")
    for flags in ["", "--max_new_tokens 5", "--limit 3", "--temperature 1", "--temperature 1 --seed 1",
                  "--max_pixels 9999", ""]:
        evaluate(tmp_path / "results", "--model", model, *flags.split())
        if "--max_pixels" in flags:
            weights = weights_of(model)  # trained again
            weights["model.norm.weight"][3].add_(1)
            save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert len(list((tmp_path / "results").iterdir())) == 7


def test_a_second_start_grades_anew_and_comparing_takes_files(evaluate, tmp_path, capsys):
    said = ["The answer is (B)", "<answer>4</answer>", "4", "<answer>2</answer> <answer>4</answer>", ""]
    file = next(iter(evaluate(tmp_path / "results").values())) / "answers.jsonl"
    records = jsonl(file)
    for record, text in zip(records, said, strict=True):
        record["answers"][0] |= {"completion": text, "correct": None, "chosen": "?"}
    eval_cvbench.write_jsonl(file, records)
    evaluate(tmp_path / "results")
    verdicts = lambda records: [r["answers"][0]["correct"] for r in records]
    assert verdicts(jsonl(file)) == [1, 1, 1, 1, 0]
    for mode, right in ("base-reasoning", [0, 1, 0, 0, 0]), ("base-direct", [0, 0, 1, 0, 0]):
        assert verdicts(eval_cvbench.with_verdicts(r | dict(mode=mode), strict=True) for r in records) == right
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")
    eval_cvbench.write_jsonl(a, [r | {"right": int(r["id"] == 1)} for r in records])
    eval_cvbench.write_jsonl(b, [r | {"right": int(r["id"] > 1)} for r in records[1:]])
    eval_cvbench.write_jsonl(c, [r | {"question": "?"} for r in jsonl(b)])
    eval_cvbench.main(["--compare", str(a), str(b)])
    printed = capsys.readouterr().out
    assert re.search(r"4 questions; 1 .*    total +A +25.0 +B +75.0 +B - A \+50.0 +p = 0.62", printed, re.DOTALL)
    all_stop(eval_cvbench.main, {f"--compare {a} {c}": "same questions", f"--compare {a} {b}.gz": "b.jsonl.gz"})


def test_pages_are_self_contained_and_show_markup_as_text(cvbench, evaluated, trained, tmp_path):
    evil = "</pre></td></table><script>alert('x')</script><img src=x onerror=alert(1)> & <b> {body} %s"
    questions = [q | {"options": [evil]} for q in eval_cvbench.load_questions(str(cvbench))]
    answers = [dict(completion=evil, extracted=evil, chosen=evil, length=1, finished=True, correct=False)]
    records = [r | {"task": evil, "answers": answers} for r in jsonl(evaluated["base-direct"] / "answers.jsonl")]
    groups = [group | dict(question=evil, answer=evil, options=[evil] * 2, completions=[
        one | dict(tokens=[evil] * len(one["tokens"]), prefill=evil) for one in group["completions"]])
        for group in jsonl(trained / "rollouts.jsonl")]
    eval_cvbench.write_jsonl(tmp_path / "rollouts.jsonl", groups)
    eval_cvbench.write_rollouts(tmp_path)
    for most in 2, 5, 25:
        eval_cvbench.write_report(tmp_path, evil, records, questions, most)
        pages = [(tmp_path / name).read_text() for name in ("report.html", "rollouts.html")]
        assert pages[0].count("<img") == min(5, most)
        assert f"5 without a right answer, {min(5, most)} of them shown" in pages[0]
    for page in pages:
        assert page.count(html.escape(evil)) > 16 and "<script>" not in page and not re.search(r'="(http|//)', page)


def test_a_run_is_drawn_again_from_its_folder_alone(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "moved", ignore=shutil.ignore_patterns("*.png", "*.html"))
    eval_cvbench.main(["--draw", str(run)])
    page = (run / "rollouts.html").read_text().replace(str(run), str(trained))
    assert page == (trained / "rollouts.html").read_text()
    assert (run / "curves.png").read_bytes() == (trained / "curves.png").read_bytes()
    stops(f"--draw {tmp_path}/none", eval_cvbench.main, ["--draw", f"{tmp_path}/none"])


def test_the_page_says_what_the_update_did_to_each_token(world, trained):
    """Against transformers' own model, of the start and of the checkpoint after each of the steps."""
    folders = [world.folder, *(trained / f"checkpoint-{step}" for step in (1, 2, 3))]
    models = [AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders]
    groups = jsonl(trained / "rollouts.jsonl")
    assert [group["step"] for group in groups] == [1, 1, 2, 2, 3, 3]  # 4, 8, ... and the last
    for group, place in zip(groups, [0, 1] * 3):
        run, came = SHOWN[group["step"] - 1]
        prompt = g.build_prompts([came.batch.texts[place]], [came.batch.images[place]], run.tokenizer,
                                 run.image_processor, world.model)
        for one, ids in zip(group["completions"], world.completions(came.rollout)[4 * place:4 * place + 4]):
            for name, number in ("reference", 0), ("before", group["step"] - 1), ("after", group["step"]):
                _, expected = world.alone(models[number], prompt, ids)
                assert one[name] == pytest.approx(expected.tolist(), abs=2e-4)
            assert one["tokens"] == [run.tokenizer.decode([token]) for token in ids.tolist()]
            assert one["after"] != pytest.approx(one["before"], abs=2e-4)
    first = groups[0]["completions"][0]
    shown = "\n".join(f"{name}: {math.exp(first[name][0]):.3f}" for name in ("before", "after", "reference"))
    tint = "42, 157, 58" if first["after"][0] > first["before"][0] else "208, 64, 43"  # green, red
    assert f'data-p="{shown}" style="background: rgba({tint},' in (trained / "rollouts.html").read_text()


FAULTS = [  # in a row of CV-Bench's, and words of the sentence
    *[(dict(answer=x), f"answer {x!r}") for x in (1, 7.5, None, "", "B", "(D)")], (dict(choices=[]), "answer"),
    *[(dict(choices=["3", x]), "option") for x in (None, " ")], (dict(choices="['3', '4']"), "no list"),
    (dict(image=dict(bytes=NO_JPEG, path=None)), "read"), (dict(image=dict(bytes=None, path="none.jpg")), "none.jpg"),
    (dict(image=None), "image"), (dict(prompt=None), "question")]


def test_evaluation_data_with_faults_stops(cvbench, evaluate, tmp_path):
    table, cases = pq.read_table(cvbench / "test_2d.parquet"), {}
    good, bad, *_ = table.to_pylist()
    faulty = [(pa.Table.from_pylist([bad | fault]), f"row 0 {words}") for fault, words in FAULTS]
    for rows, words in [*faulty, (table.drop_columns(["prompt"]), "'prompt'"), (table.slice(0, 0), "no rows")]:
        path = tmp_path / f"{len(cases)}.parquet"
        pq.write_table(rows, path)
        cases[f"--data {path}"] = f"{path} {words}"
    write_rows(tmp_path / "own.parquet", dict(answer=""), {})
    all_stop(lambda flags: evaluate(tmp_path / "results", *flags), cases | {
        "--modes instruct-direct": "--modes instruct-direct base-reasoning base-direct",
        "--temperature -1": "--temperature", "--limit 0": "--limit", "--num_generations 5": "5 --temperature",
        f"--data {tmp_path}/own.parquet": "own.parquet, row 0 answer", "--data " + "x" * 300: "questions xxx",
        f"--data {g.TOY}": "toy training data test.parquet", f"--output_dir {path}/x": "--output_dir written"})
    assert not list((tmp_path / "results").rglob("answers*"))  # before the first answer
    numbers, image = dict(choices=[3, 4], answer="(B)", task=7), dict(bytes=ONE, path=None)
    rows = [bad | numbers | dict(image=[image] * 2), good | numbers | dict(image=[image])]
    pq.write_table(pa.Table.from_pylist(rows), path)
    one, _ = eval_cvbench.load_questions(str(path))
    assert (one["options"], one["answer"], one["task"], len(one["images"])) == (["3", "4"], "4", "7", 2)


# ---- The toy world ---------------------------------------------------------------------------------------

def test_the_committed_toy_is_what_make_draws():
    def with_pixels(row):
        """Instead of a PNG, which another version of PIL may pack otherwise."""
        image = row.pop("image", None) or row.pop("images")[0]
        return row | dict(pixels=Image.open(io.BytesIO(image["bytes"])).tobytes())

    for name, rows, _ in make.sets(random.Random(0), set()):
        assert [*map(with_pixels, rows)] == [*map(with_pixels, pq.read_table(g.TOY / name).to_pylist())]
    assert sum(path.stat().st_size for path in g.TOY.rglob("*") if path.is_file()) < 8e6


def test_the_toy_learns_from_its_rewards(tmp_path):
    g.main(f"""--max_steps 30 --learning_rate 2e-4 --prompts_per_step 8 --eval_steps 0 --beta 0
        --output_dir {tmp_path}/run""".split())
    accuracy = [m["rewards/accuracy"] for m in jsonl(tmp_path / "run/metrics.jsonl")]
    assert sum(accuracy[-5:]) / 5 - sum(accuracy[:5]) / 5 > 0.2


def test_every_flag_metric_and_file_in_the_readmes_exists(capsys, trained):
    readmes = "".join((g.HERE / folder / "README.md").read_text() for folder in ("", "toy", "bench"))
    flags = {path.stem: {*re.findall(r"\W(--\w+)\b", path.read_text())} for path in g.HERE.glob("*/*.py")}
    for module in g, recipes, eval_cvbench, prepare_sat:
        with pytest.raises(SystemExit):
            module.main(["--help"])
        flags[module.__name__] = {*re.findall(r"--\w+", capsys.readouterr().out)}
    flags["plan"] |= flags["grpo_vision"]
    commands = re.findall(r"(\w+)\.py\b([^`#|]*?)(?=[`#|\n])", readmes.replace("\\\n", ""))
    assert len(commands) > 40
    for script, rest in commands:
        assert {*re.findall(r"--[a-z]\w+", rest)} <= flags.get(script.replace("my_run", "grpo_vision"), set()), rest
    launchers = {"--multi_gpu", "--machine_rank", *re.findall(r"--main_\w+|--num_(?:processes|machines)", readmes)}
    assert {*re.findall(r"(?<![\w-])--[a-z]\w+", readmes)} <= launchers.union(*flags.values())
    healthy = re.findall(r"^\| (`.*?) \|", readmes.split("## Is it healthy?")[1].split("\n## ")[0], re.MULTILINE)
    logged = jsonl(trained / "metrics.jsonl", drop="rewards/")[0].keys() - {"step"}
    assert {*re.findall(r"`([a-z_/]+)`", " ".join(healthy))} == logged
