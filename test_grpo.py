"""The tests, in the order of grpo_vision.py: `pytest test_grpo.py`. Offline, on the CPU, a minute.

They write a small model of the published Qwen2-VL layout, and small files of SAT's and CV-Bench's layouts.
Where a check could pass by accident, the wrong way is computed as well and has to fail it.
"""
import copy
import dataclasses
import doctest
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
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
from torch.distributed.checkpoint import FileSystemReader
from tokenizers import AddedToken, pre_tokenizers, trainers
from transformers import (AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig, Qwen2Tokenizer,
                          Qwen2VLForConditionalGeneration)
from transformers.cache_utils import Cache

import eval_cvbench
import grpo_vision as g
import prepare_sat

torch.set_num_threads(1)


# ---- A small model in the published layout ---------------------------------------------------------------

SPECIALS = [f"<|{name}|>" for name in (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    "vision_start vision_end vision_pad image_pad video_pad").split()]
CHAT_TEMPLATE = "{% for part in messages %}{{ part['text'] }}{% endfor %}"
UNUSED_ROWS = 20  # of the embedding, which no token has


def write_tokenizer(folder):
    """A byte-level BPE of Qwen's kind with a few hundred tokens, from the prompt. -> ids of SPECIALS"""
    bpe = Qwen2Tokenizer(vocab={SPECIALS[0]: 0}, merges=[], unk_token=None).backend_tokenizer
    bpe.train_from_iterator([g.BASE_PROMPT, "Is the square left? </think> <answer> no </answer>"] * 3,
                            trainers.BpeTrainer(vocab_size=380, show_progress=False,
                                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    learnt = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=learnt["vocab"], merges=[tuple(merge) for merge in learnt["merges"]],
                               unk_token=None, bos_token=None, eos_token=SPECIALS[0], pad_token=SPECIALS[0])
    tokenizer.add_tokens([AddedToken(special, special=True, normalized=False) for special in SPECIALS])
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIALS[1:]}, replace_extra_special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return dict(zip((name[2:-2] for name in SPECIALS), tokenizer.convert_tokens_to_ids(SPECIALS)))


def write_model(folder):
    """A model directory as published: bfloat16, the names and the config of transformers 4, and a
    generation_config that would ruin sampling. Weights of std 0.2: with 0.02 wrong positions hardly show."""
    folder.mkdir()
    ids = write_tokenizer(folder)
    config = dict(
        architectures=["Qwen2VLForConditionalGeneration"], model_type="qwen2_vl", torch_dtype="bfloat16",
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=max(ids.values()) + 1 + UNUSED_ROWS, max_position_embeddings=2048,
        rope_theta=1e6, rope_scaling=dict(type="mrope", mrope_section=[1, 1, 2]), hidden_act="silu",
        tie_word_embeddings=True, rms_norm_eps=1e-6, attention_dropout=0.0, use_sliding_window=False,
        bos_token_id=ids["endoftext"], eos_token_id=ids["endoftext"], image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"], vision_token_id=ids["vision_pad"],
        vision_config=dict(depth=2, embed_dim=32, num_heads=2, hidden_size=32, in_chans=3, mlp_ratio=2,
                           patch_size=14, spatial_merge_size=2, spatial_patch_size=14, temporal_patch_size=2,
                           model_type="qwen2_vl"), transformers_version="4.41.2")
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    model.bfloat16().save_pretrained(folder)
    weights = {name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): x
               for name, x in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write = lambda name, **content: (folder / name).write_text(json.dumps(content))
    write("config.json", **config)  # over the one just saved
    write("preprocessor_config.json", min_pixels=3136, max_pixels=12845056, patch_size=14, merge_size=2,
          temporal_patch_size=2, image_mean=[0.48145466, 0.4578275, 0.40821073],
          image_std=[0.26862954, 0.26130258, 0.27577711], image_processor_type="Qwen2VLImageProcessor",
          processor_class="Qwen2VLProcessor")
    write("generation_config.json", do_sample=True, temperature=0.01, top_p=0.001, top_k=1,
          repetition_penalty=1.0, bos_token_id=ids["endoftext"], pad_token_id=ids["endoftext"],
          eos_token_id=[ids["im_end"], ids["endoftext"]], transformers_version="4.37.0")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_model(folder)
    return str(folder)


@pytest.fixture(scope="session")
def processors(model_dir):
    return g.load_processors(model_dir)


@pytest.fixture(scope="session")
def model(model_dir):
    return g.load_model(model_dir, dtype=torch.float64)


@pytest.fixture(scope="session")
def stock(model_dir):
    """The same weights in the model as transformers has it, Conv3d included."""
    return Qwen2VLForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float64).eval()


@pytest.fixture(scope="session")
def suppressed(model, processors):
    return g.suppressed_tokens(model, processors[0])


# ---- Prompts and rollouts --------------------------------------------------------------------------------

def seed(number):
    return torch.Generator().manual_seed(number)


def picture(width, height, seed=0):
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


@pytest.fixture(scope="session")
def prompts(model, processors):
    """One image, a larger one, two images, none; no two prompts equally long."""
    rows = [("Which? <think>", [(56, 84)]), ("Is it left of the other one? <think>", [(112, 84)]),
            ("Did it move at all?", [(56, 56), (84, 112)]), ("No picture. <think>", [])]
    found = [g.build_prompt(g.IMAGE_TOKENS * len(sizes) + text, [picture(*size, seed=i) for size in sizes],
                            *processors, model) for i, (text, sizes) in enumerate(rows)]
    assert len({p.input_ids.shape[1] for p in found}) == 4
    return found


ENDS = list(range(40, 80))  # so many end tokens that a random model's completions get unequal lengths


@pytest.fixture(scope="session")
def rollout(model, prompts, suppressed):
    found = g.sample(model, prompts, 3, 9, 1.0, suppressed, ENDS, seed(3))
    assert len(set(found.completion_mask.sum(1).tolist())) > 3 and 0 < found.finished.sum() < 12
    return found


def rows_of(rollout, G):
    """-> for each row: its number, its group's, its completion ids without padding."""
    rows = zip(rollout.completion_ids, rollout.completion_mask)
    return [(i, i // G, ids[mask]) for i, (ids, mask) in enumerate(rows)]


def inputs_of(model, prompt, completion=()):
    """Arguments for transformers' own forward and generate: prompt and completion (C,) in one sequence."""
    model.model.rope_deltas = None  # left over from the last call
    ids = torch.cat([prompt.input_ids, torch.as_tensor(completion, dtype=torch.long)[None]], 1)
    found = dict(input_ids=ids, mm_token_type_ids=(ids == model.config.image_token_id).int(),
                 pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw)
    return {name: x for name, x in found.items() if x is not None}


def alone(stock, prompt, completion, suppressed, temperature=1.0):
    """The usual way: prompt and completion (C,) as one sequence of the stock model -> (C, V) log-probs."""
    logits = stock(**inputs_of(stock, prompt, completion)).logits[0, prompt.input_ids.shape[1] - 1:-1]
    return (logits / temperature).masked_fill(suppressed, -1e300).log_softmax(-1)


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
    prepare_sat.prepare_sat(str(folder), parquet=str(folder / "SAT_train.parquet"), multi_image=True)
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
    text, integer = datasets.Value("string"), datasets.Value("int64")
    features = datasets.Features(dict(
        idx=integer, type=text, task=text, image=datasets.Image(), question=text, choices=datasets.List(text),
        answer=text, prompt=text, filename=text, source=text, source_dataset=text, source_filename=text,
        target_class=text, target_size=integer, bbox=datasets.List(datasets.List(datasets.Value("float64")))))
    images = iter([encoded(picture(56, 84)), *(encoded(picture(84, 56 + 28 * i, seed=i).convert(mode), "PNG")
                                               for i, mode in enumerate(("RGBA", "L", "P"))),
                   turned(picture(56, 112, seed=4))])
    for kind, tasks in ("2D", [("Count", "ADE20K"), ("Relation", "COCO"), ("Count", "COCO")]), (
            "3D", [("Depth", "Omni3D"), ("Distance", "Omni3D")]):
        rows = []
        for i, (task, source) in enumerate(tasks):
            choices = "3 4 1 2 0 5".split()[:[2, 3, 6][i] if kind == "2D" else 4 + i]
            lines = "".join(f"\n({'ABCDEF'[j]}) {choice}" for j, choice in enumerate(choices))
            rows.append(dict(dict.fromkeys(features), idx=i, type=kind, task=task, source=source,
                             question=CVBENCH_TEXT[:34], image={"bytes": next(images), "path": None},
                             choices=choices, answer="(B)", filename=f"{i}.png", prompt=CVBENCH_TEXT + lines))
        datasets.Dataset.from_list(rows, features).to_parquet(folder / f"test_{kind.lower()}.parquet")
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
        --score_tokens 20 --eval_steps 0 --learning_rate 1e-3 --rewards accuracy,format,letters""".split()
    stage = "--max_steps 3 --num_generations 4 --max_completion_length 8".split()

    def train(output_dir, *more):
        limits = [] if "--stages" in more else stage
        return g.main([*flags, *limits, "--output_dir", str(output_dir), *map(str, more)])
    return train


def jsonl(path, drop="seconds/"):
    records = map(json.loads, Path(path).read_text().splitlines())
    return [{key: value for key, value in record.items() if not key.startswith(drop)} for record in records]


def same_weights(one, other):
    one, other = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@contextmanager
def stops(*words):
    """Inside, the program must stop with one sentence that has these words; the exit code is then 1."""
    with pytest.raises(SystemExit) as stop:
        yield
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert all(word in message for word in words), message


def test_docstring_examples():
    for module, least in (g, 5), (eval_cvbench, 3):
        failed, attempted = doctest.testmod(module)
        assert failed == 0 and attempted >= least


# ---- Settings --------------------------------------------------------------------------------------------

def test_command_line_overrides_preset_overrides_defaults():
    toy, sat = g.parse_config([]), g.parse_config("--max_steps=7 --preset=sat --rewards format".split())
    assert toy.learning_rate == g.PRESETS["toy"]["learning_rate"] != g.Config.learning_rate
    assert g.parse_config(["--learning_rate", "0.5"]).learning_rate == 0.5
    assert (sat.max_steps, sat.rewards, sat.learning_rate) == (7, "format", 1e-6)


def test_every_setting_is_read_and_explained(capsys):
    source = "".join(Path(module.__file__).read_text() for module in (g, eval_cvbench))
    with pytest.raises(SystemExit):
        g.parse_config(["--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(g.Config):
        assert re.search(rf"\b(cfg|now)\.{field.name}\b", source), field.name
        line = re.search(rf"^  --{field.name} .*", shown, re.MULTILINE)[0]  # one for each
        assert field.metadata["help"] in line and len(field.metadata["help"]) > 10
    titles = [group._argument_group_name for group in g.Config.__bases__]
    assert sorted(titles, key=shown.index) == titles[::-1] and len(titles) == 5


def test_every_flag_and_metric_in_the_readme_exists(trained, capsys):
    folder = Path(g.__file__).parent
    readme, known = (folder / "README.md").read_text(), set()
    for program in g.parse_config, eval_cvbench.main, prepare_sat.main:
        with pytest.raises(SystemExit):
            program(["--help"])
    known |= set(re.findall(r"--\w+", capsys.readouterr().out))
    shown = subprocess.run([sys.executable, folder / "bench/step.py", "--help"], stdout=subprocess.PIPE)
    known |= set(re.findall(r"--\w+", shown.stdout.decode()))  # most of its flags come out of a table
    for script in (folder / "bench").glob("*.py"):
        known |= set(re.findall(r"\W(--\w+)\b", script.read_text()))
    others = """--num_processes --num_machines --machine_rank --main_process_ip --main_process_port
        --nproc_per_node --host --port""".split()  # accelerate's, torchrun's, the servers'
    named = set(re.findall(r"(?<![\w-])--[a-z]\w+", readme))
    assert not named - known - set(others) and len(named) > 40
    source = (folder / "grpo_vision.py").read_text().splitlines()
    links = re.findall(r"\[`(\w+)`\]\(grpo_vision\.py#L(\d+)\)", readme)
    assert len(links) > 10 and all(re.match(rf"(def|class) {name}\b|{name} = ", source[int(line) - 1])
                                   for name, line in links), links
    for script in re.findall(r"\b(?:bench/)?\w+\.py\b", readme):
        assert (folder / script).exists() or script == "my_rewards.py", script
    table = readme[readme.index("| name in `metrics.jsonl`"):readme.index("Out of memory in the update:")]
    rows = [line.split("|") for line in table.splitlines()[2:] if line.startswith("|")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row[1])}
    metrics = jsonl(trained[0] / "metrics.jsonl", drop="-")
    logged = {re.sub("rewards/.*", "rewards/NAME", name) for m in metrics for name in m}
    assert named - {"nll"} == logged - {"step"}


def test_sat_preset_is_the_papers():
    paper = dict(model_name_or_path="Qwen/Qwen2-VL-2B", data="data/sat", prompts_per_step=8, beta=0.04,
                 num_generations=8, max_steps=1500, learning_rate=1e-6, max_grad_norm=1.0, temperature=1.0,
                 max_completion_length=700, max_prompt_length=1024, max_pixels=401408, min_pixels=3136,
                 save_steps=100, num_iterations=1, rewards="accuracy,format", loss_type="grpo",
                 scale_rewards=True)
    cfg = g.parse_config(["--preset", "sat"])
    assert {name: getattr(cfg, name) for name in paper} == paper


@pytest.mark.parametrize("flags", [
    "--preset paper", "--learning_rat 1", "--rewards accuracy,style", "--num_generations 1", "--max_steps 0",
    "--temperature 0", "--prompts_per_step 0", "--score_tokens 0", "--stages 10x20", "--stages 1x2x3,",
    "--stages 1x2x3;4x5x6", "--stages 10x20x0", "--max_steps 3 --preset vision-r1",
    "--reward_file none.py", "--temperature nan", "--learning_rate -1"])
def test_bad_settings_stop_with_one_sentence(flags):
    with stops(flags.split()[0]):
        g.main(flags.split())


def test_help_shows_the_defaults_of_the_preset(capsys):
    for flags, length in ["--help", 64], ["--help --preset sat", 700]:
        with pytest.raises(SystemExit):
            g.parse_config(flags.split())
        assert re.search(rf"--max_completion_length .*\(default: {length}\)", capsys.readouterr().out)


@pytest.mark.parametrize("flags, code", [
    ("--help", 0), ("--max_steps many", 2), ("--loss_type ppo", 2), ("--algorithm ppo", 2),
    ("--freeze all", 2), ("--prompt mine", 2)])
def test_help_and_wrong_types(flags, code):
    with pytest.raises(SystemExit) as stop:
        g.parse_config(flags.split())
    assert stop.value.code == code


# ---- Step 1: the prompt ----------------------------------------------------------------------------------

def test_prompts_are_the_papers_verbatim():
    start = ("A conversation between User and Assistant. The user asks a question about the image, and the "
             "Assistant solves it.")
    assert g.BASE_PROMPT == (
        start + " The assistant first thinks about the reasoning process in the mind and then provides the "
        "user with the answer.\nUser: {question} \nAssistant: Let me solve this step by step.\n<think>")
    assert g.TEMPLATES["base"] == g.BASE_PROMPT
    assert g.TEMPLATES["base-direct"] == start + "\nUser: {question} \nAssistant: "
    assert g.TEMPLATES["instruct"] == ("{question}  Output the thinking process in <think> </think> and "
                                       "final answer (option) in <answer> </answer> tags.")


ROLES = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
         "{{ message['content'] }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.mark.parametrize("chat_template, prompt, expected", [
    (None, "auto", "base"), (prepare_sat.BASE_CHAT_TEMPLATE, "auto", "base"), (ROLES, "auto", "instruct"),
    (ROLES, "base", "base"), (ROLES, "instruct", "instruct")])
def test_the_chat_template_chooses_the_prompt(chat_template, prompt, expected, processors):
    tokenizer = copy.deepcopy(processors[0])
    tokenizer.chat_template = chat_template
    assert g.choose_prompt(tokenizer, prompt) == expected
    for tokenizer.chat_template in (None, CHAT_TEMPLATE):
        with stops("--prompt instruct", "no chat template"):
            g.choose_prompt(tokenizer, "instruct")


@pytest.mark.parametrize("images, start", [
    (0, ""), (1, "<|vision_start|><|image_pad|><|vision_end|>"),
    (2, "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"
        "Picture 2: <|vision_start|><|image_pad|><|vision_end|>")])
def test_images_come_first_and_an_instruct_prompt_is_a_users_turn(images, start, processors):
    tokenizer = copy.deepcopy(processors[0])
    tokenizer.chat_template = ROLES
    row = dict(question="Where?", options=["left", "right"], images=[None] * images)
    question = g.build_question("Where?", ["left", "right"])
    assert g.row_text(row, "base", tokenizer) == start + g.BASE_PROMPT.replace("{question}", question)
    assert g.row_text(row, "instruct", tokenizer) == (
        f"<|im_start|>user\n{start}{question}  Output the thinking process in <think> </think> and final "
        "answer (option) in <answer> </answer> tags.<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("options, expected", [
    (["yes"], "yes"), (["left", "right"], "left or right"), (["1", "2", "3"], "1, 2 or 3"),
    (["no, it would stay the same", "yes"], "no, it would stay the same or yes")])
def test_question_has_the_papers_wording(options, expected):
    expected = "Answer in natural language. Where {is} it? Choose between the following options: " + expected
    assert g.build_question("Where {is} it?", options) == expected
    text = g.row_text(dict(question="Where {is} it?", options=options, images=None), "base", None)
    assert text == g.BASE_PROMPT.replace("{question}", expected)


@pytest.mark.parametrize("sizes", [[], [(56, 56)], [(84, 140)], [(56, 84), (112, 56)]])
def test_prompt_has_a_pad_for_each_image_token_and_m_rope_positions(sizes, model, processors):
    text = g.IMAGE_TOKENS * len(sizes) + "Which one?"
    prompt = g.build_prompt(text, [picture(*size) for size in sizes], *processors, model)
    tokens = [width // 28 * (height // 28) for width, height in sizes]  # sizes are multiples of 28
    text = processors[0]("Which one?").input_ids
    start, end, _, pad, _ = processors[0].convert_tokens_to_ids(SPECIALS[9:])
    assert prompt.input_ids[0].tolist() == [x for n in tokens for x in [start, *[pad] * n, end]] + text
    assert prompt.next_position == sum(2 + max(size) // 28 for size in sizes) + len(text)
    assert not sizes or len(prompt.pixel_values) == 4 * sum(tokens) == prompt.image_grid_thw.prod(-1).sum()


def test_pixel_limits_reach_the_image_processor(model_dir, model):
    def tokens(side, **limits):
        processors = g.load_processors(model_dir, **limits)
        prompt = g.build_prompt(g.IMAGE_TOKENS, [picture(side, side)], *processors, model)
        return prompt.input_ids.shape[1] - 2
    assert tokens(280) == 100 and tokens(280, max_pixels=28 * 28 * 16) == 16
    assert tokens(56) == 4 and tokens(56, min_pixels=28 * 28 * 16) == 16


def test_image_token_in_a_question_is_refused(model, processors):
    with stops("<|image_pad|>"):
        g.build_prompt(g.IMAGE_TOKENS + "Where is <|image_pad|>?", [picture(56, 56)], *processors, model)


# ---- Step 3: the rewards ---------------------------------------------------------------------------------

OPTIONS = ["right", "left", "no, it would stay the same", "15", "no"]


@pytest.mark.parametrize("completion, well_formed, right", [  # the right answer: left
    ("<think> hm </think> <answer> left </answer>", 1, 1),
    ("<think>\nhm\n\nhm\n</think>\n<answer>\nleft\n</answer>\n", 1, 1),
    ("<think></think><answer>(B)</answer>", 1, 1),
    ("<think> hm </think> <answer> right </answer>", 1, 0),
    ("<think> hm </think> <answer> ... </answer>", 1, 0),
    ("<think> reasoning process here </think> <answer> answer here </answer>", 1, 0),
    ("<think> hm </think> <answer> left </answer> <answer> left </answer>", 0, 0),
    ("<think> hm </think> <answer> <answer> left </answer>", 0, 0),
    ("<think> hm </think> <answer> left", 0, 0),
    ("<think> hm left </answer>", 0, 0),
    ("<think> hm </think> left", 0, 0),
    ("<think> hm </think> <Answer> left </Answer>", 0, 0),
    ("<think> hm </think> <think> hm </think> <answer> left </answer>", 0, 1),
    ("<think> <think> hm </think> <answer> left </answer>", 0, 1),
    ("<think> hm </think> </think> <answer> left </answer>", 0, 1),
    ("<think> hm <answer> left </answer>", 0, 1),
    ("<think> hm <answer> left </answer> </think>", 0, 1),
    ("<answer> left </answer>", 0, 1),
    ("<answer> left </answer> <think> hm </think>", 0, 1),
    ("So <think> hm </think> <answer> left </answer>", 0, 1),
    ("<think> hm </think> So <answer> left </answer>", 0, 1),
    ("<think> hm </think> <answer> left </answer> So.", 0, 1),
    ("", 0, 0)])
def test_rewards(completion, well_formed, right):
    assert g.format_reward(completion, answer="left", options=OPTIONS) == well_formed
    assert g.accuracy_reward(completion, answer="left", options=OPTIONS, question="?") == right


@pytest.mark.parametrize("empty", ["", " ", "\n\n", ".", "()", "..."])
def test_an_empty_answer_is_never_right(empty):
    completion = f"<think> x </think> <answer>{empty}</answer>"
    assert not any(g.accuracy_reward(completion, answer=answer, options=OPTIONS) for answer in OPTIONS)


@pytest.mark.parametrize("empty", ["", " ", "\n\n"])
def test_an_empty_answer_is_not_well_formed_either(empty):
    assert not g.format_reward(f"<think> x </think> <answer>{empty}</answer>")
    assert g.format_reward("<think> x </think> <answer>?</answer>")


@pytest.mark.parametrize("text, strict, expected", [
    ("<think> x </think> <answer> a\nb </answer>", True, "a\nb"), ("<answer> </answer>", True, None),
    ("<answer>1</answer><answer>2</answer>", False, "2"),
    ("<answer>1</answer><answer>2</answer>", True, None), ("</answer> left <answer>", True, None),
    ("<answer>2", True, None), ("it is 2", True, None), (" it is 2\n", False, "it is 2"), ("", False, None)])
def test_extract_answer(text, strict, expected):
    assert eval_cvbench.read_answer(text, strict) == expected


@pytest.mark.parametrize("answer, solution, right", [
    ("left", "left", 1), (" LEFT.\n", "Left", 1), ("leftmost", "left", 0), ("right", "left", 0),
    ("le ft", "left", 0), ("left or right", "left", 0), ("b", "left", 1), ("(b)", "left", 1),
    ("B.", "left", 1), ("(B).", "left", 1), ("a", "left", 0), ("A", "right", 1), ("a chair", "right", 0),
    ("c.", OPTIONS[2], 1), ("f", "left", 0), ("z", "no", 0), ("bb", "left", 0), ("5", "15", 0),
    ("15", "15", 1), ("115", "15", 0), ("1 5", "15", 0), ("no", OPTIONS[2], 0), (OPTIONS[2], "no", 0),
    ("No,  it would stay\nthe same.", OPTIONS[2], 1), ("...", "left", 0), (None, "left", 0)])
def test_grade(answer, solution, right):
    for choose in g.choose, eval_cvbench.read_choice:
        assert g.grade(answer, solution, OPTIONS, choose) == right


@pytest.mark.parametrize("answer, solution, right", [
    ("So it is left.", "left", 1), ("So it is left.", "right", 0), ("Either left or right.", "left", 0),
    ("The answer is (B).", "left", 1), ("(b) left", "left", 1), ("(b) right", "left", 0), ("is (z)", "no", 0),
    ("It is a thing on the left", "left", 1), ("It is a thing", "right", 0), ("It is leftmost", "left", 0),
    ("there are 5", "15", 0), ("there are 15.", "15", 1), ("it is 1.15 m", "15", 0), ("or 15.5 m", "15", 0),
    ("I say: No, it would stay the same.", OPTIONS[2], 1), ("I say: No, it would stay the same.", "no", 0),
    ("I say no.", "no", 1), ("nothing", "no", 0)])
def test_grade_of_a_sentence_counts_in_evaluation_only(answer, solution, right):
    assert g.grade(answer, solution, OPTIONS, eval_cvbench.read_choice) == right
    assert not g.grade(answer, solution, OPTIONS)


CASES = """  what a model may say when the choices are (A) 2 (B) 3 (C) 4           choice   choice in training
(C)                                                                            4        -
C                                                                              4        -
C.                                                                             4        -
c)                                                                             4        -
4                                                                              4        -
The answer is (C)                                                              4        -
The answer is C, as I counted them.                                            4        -
Answer: C                                                                      4        -
C) 4                                                                           4        -
Option B                                                                       3        -
The answer is a matter of taste.                                               -        -
four                                                                           4        -
There are four chairs.                                                         4        -
There are 4 chairs.                                                            4        -
The left one has 4.                                                            4        -
There are 14 chairs, or 4.5.                                                   -        -
There are 5 chairs.                                                            -        -
(A) or (C)                                                                     -        -
(A) 2? No. The answer is (C) 4.                                                4        -
The answer is (A) or (C).                                                      -        -
(C) 3                                                                          -        -
(D)                                                                            -        -
d                                                                              -        -
(D), or 4                                                                      -        -
I cannot see the image.                                                        -        -
<answer>(C)</answer>                                                           4        4
<answer> c. </answer>                                                          4        4
<answer>4</answer>                                                             4        4
<answer>four</answer>                                                          4        -
<answer>E</answer>                                                             -        -
<answer></answer>                                                              -        -
<answer>I see 4 of them, so (C)</answer>                                       4        -
<answer>2</answer> wait <answer>4</answer>                                     4        -
<think> not 2, not 3 </think> <answer>(C)</answer>                             4        4
<think> not 2, not 3 </think> <answer>(C)                                      4        -
<think> not 2, not 3 </think> so (C)                                           4        -
<think> not 2, not 3, so 4 </think>                                            -        -
<think> there are 2 on the left and                                            2        -
<think> there are 2 on the left and 2 or 3                                     -        -
"""


@pytest.mark.parametrize("line", CASES.splitlines()[1:] + [" " * 79 + "-        -"])  # the last: empty
def test_the_table_of_cases(line):
    text, options = line[:79].strip(), ["2", "3", "4"]
    for strict, option in (False, line[79:88].strip()), (True, line[88:].strip()):
        choose = g.choose if strict else eval_cvbench.read_choice
        said = eval_cvbench.read_answer(text, strict)
        assert choose(said, options) == (None if option == "-" else option)
        right = [solution for solution in options if g.grade(said, solution, options, choose)]
        assert right == [solution for solution in options if solution == option]


@pytest.mark.parametrize("count", range(2, 7))
def test_letters_choose_among_two_to_six_and_never_beyond(count):
    options = "one chair,a lamp,the door,B,window,no".split(",")[:count]
    for i, letter in enumerate("ACDEFGH"):
        i += i > 0  # "B" is the text of another option, once there are four
        expected = options[i] if i < count else None
        for text in letter, f"({letter})", f"{letter}.", f"The answer is ({letter}).":
            assert eval_cvbench.read_choice(text, options) == expected
            assert g.choose(text, options) == (None if "answer" in text else expected)
    assert g.choose("B", options) == ("B" if count > 3 else "a lamp")  # a text goes before a letter


@pytest.mark.parametrize("text", ["(", "\\", "[a-z", "\0", "²", "<think>" * 500, "</answer><answer>",
                                  "</think><answer>" * 300, "(a)" * 300, "é" * 500])
def test_no_text_breaks_the_rewards(text):
    for options in OPTIONS, ["(", "\\", "[a-z"], [str(i) for i in range(40)]:
        for completion in text, f"<think>{text}</think><answer>{text}</answer>":
            assert g.format_reward(completion) in (0, 1)
            assert g.accuracy_reward(completion, answer=options[0], options=options) in (0, 1)
            said = eval_cvbench.read_answer(completion)
            assert g.grade(said, options[0], options, eval_cvbench.read_choice) in (0, 1)


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|endoftext|>", "<|im_end|><|endoftext|>"])
def test_think_is_put_back_once_and_end_tokens_are_not_in_the_way(end, processors):
    said = " left , right . It 's  two\n</think> <answer> left </answer>"
    row = dict(question="Where?", options=OPTIONS, images=[])
    ids = torch.tensor(processors[0](said + end).input_ids)
    assert g.completion_text(g.TEMPLATES["base-direct"], ids, processors[0]) == said
    text = g.completion_text(g.row_text(row, "base", None), ids, processors[0])
    assert text == "<think>" + said and g.format_reward(text) == g.accuracy_reward(text, "left", OPTIONS) == 1


# ---- Step 4: the advantages ------------------------------------------------------------------------------

def test_group_advantages_by_hand():
    rewards = torch.tensor([0., 0, 1, 1, 2, 1, 1, 0, 1, 1, 1, 1], dtype=torch.float64)  # three groups of four
    centred = torch.tensor([-.5, -.5, .5, .5, 1, 0, 0, -1, 0, 0, 0, 0], dtype=torch.float64)
    std = torch.tensor([1 / 3, 2 / 3, 1]).double().sqrt().repeat_interleave(4)  # unbiased: divided by G - 1
    torch.testing.assert_close(g.group_advantages(rewards, 4), centred / (std + 1e-4), rtol=1e-6, atol=0)
    torch.testing.assert_close(g.group_advantages(rewards, 4, scale_rewards=False), centred)


@pytest.mark.parametrize("G", [2, 3, 7, 8])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1.1, 1e6 + 0.1])
def test_a_group_without_spread_gets_exactly_zero(value, G):
    for scale_rewards in True, False:
        assert (g.group_advantages(torch.full((3 * G,), value), G, scale_rewards) == 0).all()


# ---- Steps 2 and 5: encode once, branch G times ----------------------------------------------------------

def test_patch_embedding_as_matmul_is_the_convolution_and_a_copy_uses_its_own_weights(model, stock):
    pixels = torch.randn(8, 1176, dtype=torch.float64)
    ours, theirs = model.model.visual.patch_embed, stock.model.visual.patch_embed
    torch.testing.assert_close(ours(pixels), theirs(pixels), rtol=0, atol=1e-12)
    twin = copy.deepcopy(ours)
    twin.proj.weight.data.zero_()
    assert (twin(pixels) == 0).all() and (ours(pixels) != 0).any()


onednn = pytest.mark.skipif(not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()),
                            reason="this torch has not both MKL and oneDNN: nothing is swapped")


@onednn
@pytest.mark.parametrize("shape", [(7, 40), (2, 5, 40), (1, 1, 40), (0, 40)])
@pytest.mark.parametrize("bias, frozen",
                         [(True, ""), (False, ""), (True, "x"), (True, "weight"), (True, "bias")])
def test_linear_by_onednn_is_linear_with_its_gradients(shape, bias, frozen, monkeypatch):
    calls = []
    monkeypatch.setattr(g, "onednn", lambda *inputs, onednn=g.onednn: calls.append(1) or onednn(*inputs))
    theirs, x = torch.nn.Linear(40, 24, bias), torch.randn(shape[::-1]).permute(*range(len(shape))[::-1])
    if frozen != "x":
        x.requires_grad_()
        getattr(theirs, frozen, x).requires_grad_(not frozen)
    ours, found, kept = copy.deepcopy(theirs), [], []
    ours.__class__ = g.Linear
    upstream = torch.randn(*shape[:-1], 24)
    for layer in ours, theirs:
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda x: x):
            y = layer(x)
        grads = torch.autograd.grad(y, [w for w in (x, *layer.parameters()) if w.requires_grad], upstream)
        found.append((y, *grads))
    assert len(calls) == (3 - (frozen in ("x", "weight")) if shape[0] else 0)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert (frozen == "weight") != any(saved.data_ptr() == x.data_ptr() for saved in kept)  # needed for dW
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    assert ours.double()(x.double()).dtype == torch.float64 and not calls  # neither is for oneDNN


@onednn
def test_a_model_that_is_not_small_has_the_same_gradients_by_onednn(
        model_dir, prompts, rollout, suppressed, monkeypatch):
    plain = g.load_model(model_dir)
    assert not any(type(layer) is g.Linear for layer in plain.modules())  # the small one is left alone
    monkeypatch.setattr(g, "is_small", lambda model: False)
    fast, pad_chunks = g.load_model(model_dir), g.pad_chunks
    kinds = Counter(type(layer) for layer in fast.modules() if isinstance(layer, torch.nn.Linear))
    assert set(kinds) == {g.Linear} and fast.state_dict().keys() == plain.state_dict().keys()
    cfg = g.Config(num_generations=3, score_tokens=14, beta=0.3)
    monkeypatch.setattr(g, "gather_object", lambda mine: [mine[0] + 1])  # another process has one chunk more
    monkeypatch.setattr(g, "pad_chunks", lambda found, _: pad_chunks(found, 2))
    ref = rollout.sampling_logps - 0.1
    (logps, _, ours), (stock_logps, _, theirs) = (
        gradients(m, suppressed, prompts, rollout, torch.linspace(-2, 3, 12), ref, None, cfg)
        for m in (fast, plain))
    torch.testing.assert_close(logps, stock_logps, rtol=0, atol=1e-4)
    errors = {name: ((ours[name] - x).norm() / x.norm()).item() for name, x in theirs.items()}
    assert max(errors.values()) < 1e-3 and 0 < max(errors.values()), errors  # 0: it was the same library


def test_suppressed_are_vision_tokens_and_unused_rows(processors, suppressed):
    tokenizer, expected = processors[0], torch.zeros_like(suppressed)
    vision = [name for name in SPECIALS if "vision" in name or "_pad" in name]
    expected[tokenizer.convert_tokens_to_ids(vision)] = expected[-UNUSED_ROWS:] = True
    assert torch.equal(suppressed, expected) and expected.sum() == 5 + UNUSED_ROWS
    assert g.end_tokens(tokenizer) == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])


def test_score_equals_full_sequences_of_the_stock_model(
        model, stock, prompts, rollout, suppressed, monkeypatch):
    policy, cfg = g.Policy(model, 0.7, suppressed), g.Config(num_generations=3, score_tokens=14)
    assert len(list(g.group_chunks(rollout, 0, cfg))) > 1
    logps = g.score_rollout(policy, prompts, rollout, cfg)
    with monkeypatch.context() as patch:  # the control: positions that go on at P
        patch.setattr(g.Prompt, "next_position", property(lambda prompt: prompt.input_ids.shape[1]))
        shifted = g.score_rollout(policy, prompts, rollout, cfg)
    assert (logps[~rollout.completion_mask] == 0).all()
    for i, group, ids in rows_of(rollout, 3):
        with torch.no_grad():
            expected = alone(stock, prompts[group], ids, suppressed, 0.7)
            (prompt_kv, _), whole = policy(prompts[group]), torch.ones(1, len(ids)).bool()
            _, entropy = policy(prompts[group], prompt_kv, ids[None], whole)
        chosen = expected.gather(-1, ids[:, None])[:, 0]
        assert (logps[i, :len(ids)] - chosen).abs().max() < 1e-9
        assert (entropy[0] + (expected.exp() * expected).sum(-1)).abs().max() < 1e-9
        assert prompts[group].pixel_values is None or (shifted[i, :len(ids)] - chosen).abs().max() > 1e-3


def test_completions_that_saw_one_another_would_be_found_out(model, prompts, rollout, suppressed):
    policy, prompt, ids = g.Policy(model, 1.0, suppressed), prompts[0], rollout.completion_ids[:2]
    inputs = torch.cat([prompt.input_ids[:, -1:].expand(2, 1), ids[:, :-1]], 1)
    positions = (torch.arange(ids.shape[1]) + prompt.next_position - 1).expand(3, 1, -1)
    with torch.no_grad():
        right = policy(prompt, policy(prompt)[0], ids, torch.ones_like(ids).bool())[0][1]
        prompt_kv, _ = policy(prompt)
        cache = Cache(layers=[g.BranchLayer(*kv) for kv in zip(prompt_kv[::2], prompt_kv[1::2])])
        for one in inputs:  # the second behind the first in one cache, but at the right positions
            hidden = model.model(input_ids=one[None], position_ids=positions, past_key_values=cache)[0]
        leaky = g.token_logps(model, hidden[0], 1.0, suppressed).gather(-1, ids[1][:, None])[:, 0]
    assert (leaky - right).abs().max() > 0.01


def test_the_image_matters(model, prompts, rollout, suppressed):
    policy, cfg, other = g.Policy(model, 1.0, suppressed), g.Config(num_generations=3), copy.deepcopy(prompts)
    other[1].pixel_values = other[1].pixel_values.flip(0)
    one, two = (g.score_rollout(policy, some, rollout, cfg) for some in (prompts, other))
    change = (one - two).abs().amax(1)
    assert (change[3:6] > 1e-3).all() and (change[:3] == 0).all() and (change[6:] == 0).all()


def test_the_vision_tower_runs_once_per_group_in_each_pass(model, prompts, rollout, suppressed):
    model, calls = copy.deepcopy(model), []
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    policy, cfg = g.Policy(model, 1.0, suppressed), g.Config(num_generations=3, score_tokens=9, beta=0.0)
    for run in (lambda: g.sample(model, prompts, 3, 4, 1.0, suppressed, ENDS),
                lambda: g.score_rollout(policy, prompts, rollout, cfg),
                lambda: g.update(policy, prompts, rollout, torch.ones(12), torch.ones(12), None, None, cfg)):
        calls.clear()
        run()
        assert len(calls) == 3  # prompts with images, whatever G and the number of chunks


def test_greedy_decoding_is_the_same_alone_and_in_transformers(model, stock, prompts, suppressed):
    greedy = lambda some: g.sample(model, some, 1, 12, 0, suppressed, ENDS[:12])
    together = greedy(prompts)
    assert len(set(together.completion_mask.sum(1).tolist())) > 1
    for (_, group, ids), prompt in zip(rows_of(together, 1), prompts):
        one = greedy([prompt])
        assert ids.tolist() == one.completion_ids[0].tolist() and together.finished[group] == one.finished[0]
        theirs = stock.generate(**inputs_of(stock, prompt), do_sample=False, max_new_tokens=12,
                                suppress_tokens=suppressed.nonzero()[:, 0].tolist(), eos_token_id=ENDS[:12])
        assert ids.tolist() == theirs[0, prompt.input_ids.shape[1]:].tolist()


def test_decoding_with_fixed_shapes_changes_nothing(model, prompts, suppressed, monkeypatch):
    """What a CUDA graph replays: all the room is attended to under a mask, and done rows wait."""
    sizes = []

    class Fixed(g.Decoder):
        def __init__(self, *args, **more):
            super().__init__(*args, **more, fixed=True)

        def forward(self):
            sizes.append(len(self.tokens))
            hidden = super().forward()
            assert all(layer.keys.shape[2] == sizes_of_keys[0] for layer in self.cache.layers)
            return hidden
    needed = max(p.input_ids.shape[1] for p in prompts) - 1 + 9
    sizes_of_keys = [needed + 8 - needed % 8]
    free = g.sample(model, prompts, 3, 9, 0.0, suppressed, [0]).completion_ids
    arguments = model, prompts, 3, 9, 0.0, suppressed, [int(free[0, 2]), int(free[3, 4])]
    usual = g.sample(*arguments)
    monkeypatch.setattr(g, "Decoder", Fixed)
    fixed = g.sample(*arguments)
    mask = usual.completion_mask
    assert torch.equal(fixed.completion_mask, mask) and len(set(mask.sum(1).tolist())) > 1
    assert torch.equal(fixed.completion_ids[mask], usual.completion_ids[mask])
    assert (fixed.sampling_logps - usual.sampling_logps).abs().max() < 1e-9
    assert len(set(sizes)) < 4 and sizes[0] == 12


def test_recorded_logps_are_the_scored_ones(model, prompts, suppressed):
    cfg = g.Config(num_generations=3)
    for temperature in 1.0, 1.7:
        rollout = g.sample(model, prompts, 3, 9, temperature, suppressed, ENDS, seed(0))
        scored, control = (g.score_rollout(g.Policy(model, t, suppressed), prompts, rollout, cfg)
                           for t in (temperature, 1.3))
        gap = lambda logps: ((rollout.sampling_logps - logps) * rollout.completion_mask).abs().max()
        assert gap(scored) < 1e-9 and gap(control) > 0.01


def test_rows_end_with_their_end_token_or_are_flagged(rollout):
    for i, _, ids in rows_of(rollout, 3):
        ended = [token in ENDS for token in ids.tolist()]
        assert not any(ended[:-1]) and ended[-1] == rollout.finished[i] and (ended[-1] or len(ids) == 9)
        assert (rollout.completion_ids[i, len(ids):] == ENDS[0]).all()


def test_sampling_is_seeded_and_ignores_the_models_generation_config(model, prompts, rollout, suppressed):
    def draw(model, number):
        return g.sample(model, prompts, 3, 9, 1.0, suppressed, ENDS, seed(number)).completion_ids
    plain = copy.deepcopy(model)
    plain.generation_config = GenerationConfig()
    assert model.generation_config.top_k == 1 and len(rollout.completion_ids.unique(dim=0)) > 8
    assert torch.equal(draw(plain, 3), rollout.completion_ids)
    assert not torch.equal(draw(model, 4), rollout.completion_ids)


def test_tokens_are_drawn_from_the_models_distribution(model, stock, prompts):
    N, prompt, suppressed = 6000, prompts[0], torch.ones(model.lm_head.out_features, dtype=torch.bool)
    suppressed[100:108] = False  # few tokens: a wrong kind of noise shows
    drawn = g.sample(model, [prompt], N, 1, 2.0, suppressed, [0], seed(0)).completion_ids
    counts = torch.bincount(drawn[:, 0], minlength=len(suppressed))

    def chi_square(temperature):
        """How far the counts are from the distribution; it is above 24.3 by chance once in 1000 times."""
        with torch.no_grad():
            expected = N * alone(stock, prompt, [0], suppressed, temperature)[0, 100:108].exp()
        return ((counts[100:108] - expected) ** 2 / expected).sum()

    assert counts[suppressed].sum() == 0
    assert chi_square(2.0) < 24.3 and chi_square(1.0) > 100


# ---- Step 6: the loss and the update ---------------------------------------------------------------------

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


def test_the_group_worked_in_the_readme():
    readme = (Path(g.__file__).parent / "README.md").read_text()
    worked = readme.split("### One group, worked by hand")[1].split("\n## ")[0]
    stands = lambda number: f"{number:.4f}".rstrip("0").rstrip(".") in worked
    texts = [f"<think>{text}" for text in re.findall(r"^\| \d: `\.* ?(.*)`", worked, re.MULTILINE)]
    row = dict(answer="left", options=["left", "right"])
    rewards = g.compute_rewards(["accuracy", "format"], texts, [3] * 4, [row] * 4)
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


def test_loss_types_by_hand():
    weights = lambda name: g.LOSS_TYPES[name](torch.tensor([5., 1, 4]), 8).tolist()
    assert weights("grpo") == pytest.approx([1 / 15, 1 / 3, 1 / 12])  # each row's tokens add up to 1/3
    assert weights("dr_grpo") == pytest.approx([1 / 24] * 3)          # 3 rows x 8 tokens at most
    assert weights("dapo") == pytest.approx([1 / 10] * 3)             # 10 tokens in all


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("epsilon, epsilon_high, beta", [(0.2, None, 0.0), (0.2, 0.28, 0.04), (0.05, 0.4, 1)])
def test_grpo_loss_is_the_formula_and_adds_up_over_chunks(epsilon, epsilon_high, beta, loss_type):
    torch.manual_seed(0)
    R, C, lengths = 6, 5, [5, 1, 3, 5, 2, 4]
    logps, old, ref = -2 + 0.4 * torch.randn(3, R, C, dtype=torch.float64)
    A, mask = torch.randn(R, dtype=torch.float64), torch.arange(C) < torch.tensor(lengths)[:, None]
    total, acted = 0.0, 0
    for i in range(R):
        for t in range(lengths[i]):
            weight = {"grpo": 1 / R / lengths[i], "dr_grpo": 1 / R / 8, "dapo": 1 / sum(lengths)}[loss_type]
            ratio = math.exp(logps[i, t] - old[i, t])
            inside = max(1 - epsilon, min(1 + (epsilon_high or epsilon), ratio))
            kl = math.exp(ref[i, t] - logps[i, t]) - (ref[i, t] - logps[i, t]) - 1
            total += weight * (-min(ratio * A[i], inside * A[i]) + beta * kl)
            acted += inside * A[i] < ratio * A[i]
    weights = g.LOSS_TYPES[loss_type](mask.sum(1).double(), 8)
    call = lambda rows: g.grpo_loss(logps[rows], old[rows], ref[rows] if beta else None, A[rows],
                                    weights[rows], mask[rows], epsilon, epsilon_high, beta)
    loss, _, clipped = call(list(range(R)))
    assert loss.item() == pytest.approx(total.item(), abs=1e-12)
    assert (clipped & mask).sum() == acted and 0 < acted < mask.sum()
    parts = [call(rows)[0].item() for rows in ([4, 1], [0], [2, 3, 5])]
    assert sum(parts) == pytest.approx(loss.item(), abs=1e-12)


def gradients(model, suppressed, prompts, rollout, advantages, ref, old, cfg):
    """-> log-probs and sums that g.update returns, and the gradient that it leaves, by name."""
    policy = g.Policy(copy.deepcopy(model), 1.0, suppressed)
    weights = g.weigh_tokens(rollout.completion_mask.sum(1), rollout.finished, cfg)
    found = g.update(policy, prompts, rollout, advantages, weights, ref, old, cfg)
    return *found, {name: p.grad for name, p in policy.model.named_parameters()}


def test_two_stage_backward_equals_plain_autograd(model, stock, prompts, rollout, suppressed, monkeypatch):
    cfg = g.Config(num_generations=3, score_tokens=14, beta=0.3, epsilon=0.2, epsilon_high=0.28)
    torch.manual_seed(0)
    old, ref = rollout.sampling_logps + 0.3 * torch.randn(2, *rollout.completion_ids.shape).double()
    advantages, usual, loss, entropy = torch.linspace(-2, 3, 12).double(), copy.deepcopy(stock), 0.0, 0.0
    arguments = model, suppressed, prompts, rollout, advantages, ref, old, cfg
    logps, sums, ours = gradients(*arguments)
    for i, group, ids in rows_of(rollout, 3):
        distribution, C, A = alone(usual, prompts[group], ids, suppressed), len(ids), advantages[i]
        row = distribution.gather(-1, ids[:, None])[:, 0]
        assert (logps[i, :C] - row).abs().max() < 1e-9
        ratio, log_ratio = (row - old[i, :C]).exp(), ref[i, :C] - row
        surrogate = torch.minimum(ratio * A, ratio.clamp(0.8, 1.28) * A)
        loss = loss + (-surrogate + 0.3 * (log_ratio.exp() - log_ratio - 1)).mean() / 12
        entropy -= (distribution.exp() * distribution).sum().item()
    loss.backward()
    assert 0 < sums["clip"] < rollout.completion_mask.sum()
    assert sums["loss"] == pytest.approx(loss.item(), abs=1e-9) and sums["entropy"] == pytest.approx(entropy)
    theirs = {name: p.grad for name, p in usual.named_parameters()}
    assert theirs.keys() == ours.keys() and all(x.norm() > 1e-6 for x in theirs.values())
    errors = lambda found: {name: ((found[name] - x).norm() / x.norm()).item() for name, x in theirs.items()}
    assert max(errors(ours).values()) < 1e-6, errors(ours)
    # the control: positions that go on at P
    monkeypatch.setattr(g.Prompt, "next_position", property(lambda prompt: prompt.input_ids.shape[1]))
    assert min(errors(gradients(*arguments)[2]).values()) > 1e-3


def test_the_first_iteration_prints_zero_and_still_learns(model, prompts, rollout, suppressed):
    advantages = g.group_advantages(torch.rand(12, generator=seed(0)).double(), 3)
    cfg = g.Config(num_generations=3, beta=0.0)
    _, sums, found = gradients(model, suppressed, prompts, rollout, advantages, None, None, cfg)
    assert abs(sums["loss"]) < 1e-12 and sums["clip"] == sums["kl"] == 0
    assert all(x.norm() > 1e-6 for x in found.values())
    _, _, found = gradients(model, suppressed, prompts, rollout, 0 * advantages, None, None, cfg)
    assert all((x == 0).all() for x in found.values())


def test_sft_is_cross_entropy(model, stock, processors):
    """Advantage 1 on given completions: the same gradient as the usual loss on the answers' tokens."""
    tokenizer = processors[0]
    rows = [dict(question="Where?", options=["left", "right"], answer="left", images=[None]),
            dict(question="What is it?", options=[], answer="C", images=[None],
                 completion="<think> it is a square </think> <answer> C </answer>")]
    prompts = [g.build_prompt(g.row_text(row, template, tokenizer), [picture(56, 84)], *processors, model)
               for row, template in zip(rows, ("base-direct", "base"))]
    run = SimpleNamespace(tokenizer=tokenizer, eos_ids=g.end_tokens(tokenizer),
                          accelerator=SimpleNamespace(device="cpu"))
    cfg = g.Config(algorithm="sft", num_generations=1, beta=0.0, loss_type="dapo", score_tokens=9)
    rollout = g.given_completions(run, cfg, rows, prompts)
    end = run.eos_ids[0]
    texts = "left", " it is a square </think> <answer> C </answer>"  # <think> is in the prompt already
    targets = [tokenizer(text).input_ids + [end] for text in texts]
    assert [ids.tolist() for _, _, ids in rows_of(rollout, 1)] == targets and rollout.finished.all()
    nothing = torch.zeros(model.lm_head.out_features, dtype=torch.bool)
    rollout.sampling_logps = rollout.sampling_logps.double()
    logps, sums, ours = gradients(model, nothing, prompts, rollout, torch.ones(2).double(), None, None, cfg)
    usual, losses = copy.deepcopy(stock), []
    for prompt, target in zip(prompts, targets):
        logits = usual(**inputs_of(usual, prompt, target)).logits[0, prompt.input_ids.shape[1] - 1:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="none"))
    torch.cat(losses).mean().backward()
    assert -logps.sum().item() == pytest.approx(torch.cat(losses).sum().item()) and sums["clip"] == 0
    for name, p in usual.named_parameters():
        assert ((ours[name] - p.grad).norm() / p.grad.norm()) < 1e-9, name
    short = g.given_completions(run, g.Config(max_completion_length=4), rows, prompts)
    assert short.completion_mask.sum(1).tolist() == [len(targets[0]), 4] and not short.finished[1]


def test_truncated_completions_can_be_left_out(model, prompts, rollout, suppressed):
    lengths, finished = torch.tensor([2, 4, 3, 4]), torch.tensor([True, False, True, True])
    flags = dict(mask_truncated_completions=True, max_completion_length=4)
    weigh = lambda **more: g.weigh_tokens(lengths, finished, g.Config(**flags, **more)).tolist()
    assert weigh() == pytest.approx([1 / 8, 0, 1 / 12, 1 / 16])
    assert weigh(loss_type="dr_grpo") == pytest.approx([1 / 16, 0, 1 / 16, 1 / 16])
    assert weigh(loss_type="dapo") == pytest.approx([1 / 9, 0, 1 / 9, 1 / 9])
    cfg = g.Config(num_generations=3, beta=0.5, mask_truncated_completions=True)
    ref = rollout.sampling_logps + 1
    masked = gradients(model, suppressed, prompts, rollout, torch.ones(12).double(), ref, None, cfg)[2]
    other = copy.deepcopy(rollout)  # what a truncated row says makes no difference
    other.completion_ids[~rollout.finished] = 50
    assert not rollout.finished.all()
    again = gradients(model, suppressed, prompts, other, torch.ones(12).double(), ref, None, cfg)[2]
    assert all(torch.allclose(masked[name], again[name], atol=1e-12) for name in masked)


def test_chunks_hold_every_row_once_within_the_budget():
    rng = random.Random(0)
    for _ in range(200):
        lengths, budget = [rng.randint(1, 30) for _ in range(rng.randint(1, 16))], rng.randint(1, 90)
        found = g.chunks(lengths, budget)
        assert sorted(row for chunk in found for row in chunk) == list(range(len(lengths)))
        assert all(len(rows) == 1 or len(rows) * max(lengths[i] for i in rows) <= budget for rows in found)
    assert len(g.chunks([3] * 8, 12)) == 2  # and no more chunks than needed


# ---- Around the algorithm --------------------------------------------------------------------------------

def test_draw_walks_through_seeded_permutations():
    rows = [3, 1, 4, 15, 9, 2, 6]
    walk = g.draw(rows, 0, 0, 35)
    epochs = [walk[i:i + 7] for i in range(0, 35, 7)]
    assert all(sorted(epoch) == sorted(rows) for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert walk == g.draw(rows, 0, 0, 35) != g.draw(rows, 1, 0, 35)
    for size in 1, 2, 5, 10, 16:  # a step, or a rank's share; may cross epochs, or be larger than one
        steps = [g.draw(rows, 0, first, min(size, 35 - first)) for first in range(0, 35, size)]
        assert sum(steps, []) == walk
    keys = list(itertools.product((0, 1), ("sample", "epoch"), (0, 1, 11), (0, 1)))  # seed, use, step, rank
    assert len({g.seeded(*key).getrandbits(63) for key in keys}) == len(keys)


def test_output_dir_takes_the_next_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in "runs/toy", "runs/toy-2", "runs/toy-3":
        assert g.choose_output_dir(g.parse_config([])) == Path(expected)
        Path(expected).mkdir(parents=True)
    with stops("runs/toy", "--resume", "--overwrite"):
        g.choose_output_dir(g.parse_config(["--output_dir", "runs/toy"]))
    with stops("runs/toy", "not the folder of a run"):  # --overwrite deletes runs, and nothing else
        g.choose_output_dir(g.parse_config(["--output_dir", "runs/toy", "--overwrite"]))
    Path("runs/toy/config.json").write_text("{}")
    for flag in "--resume", "--overwrite":
        assert g.choose_output_dir(g.parse_config(["--output_dir", "runs/toy", flag])) == Path("runs/toy")


def test_weights_load_as_float32_and_whole(model_dir, tmp_path):
    assert {p.dtype for p in g.load_model(model_dir).parameters()} == {torch.float32}
    shutil.copytree(model_dir, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    del weights["visual.patch_embed.proj.weight"]
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with stops("patch_embed"):
        g.load_model(str(tmp_path / "model"))


# ---- Preparation -----------------------------------------------------------------------------------------

def prepared(folder, capsys, *flags):
    """Run prepare_sat.py -> the rows it wrote, with decoded images, and its counts {verdict: rows}."""
    prepare_sat.main([*map(str, flags), "--out", str(folder)])
    printed = re.findall(r"^ *(\d+) (.+)$", capsys.readouterr().out, re.MULTILINE)
    rows = datasets.Dataset.from_parquet(str(folder / "train.parquet"))
    return rows, {verdict.removeprefix("skipped: "): int(n) for n, verdict in printed}


def kept_rows(path, processors, max_prompt_length=1024, **how):
    path, data = prepare_sat.load_rows(path)
    return prepare_sat.rows_that_fit(data, path, "base", *processors, max_prompt_length, **how)


def sizes(row):
    return [image.size for image in row["images"]]


COLUMNS = ["images", "question", "options", "answer", "question_type", "source_row"]


@pytest.mark.parametrize("multi_image, kept", [(False, [0, 5]), (True, [0, 1, 5])])
def test_sat_rows_are_kept_or_skipped_for_a_reason(multi_image, kept, sat, tmp_path, capsys):
    flags = ["--multi_image"] if multi_image else []
    rows, counts = prepared(tmp_path, capsys, "--parquet", sat / "SAT_train.parquet", *flags)
    several = {} if multi_image else {"several images (--multi_image keeps them)": 1}
    assert counts == {"kept": len(kept), "broken image": 2, "answer not among the options": 1, **several}
    assert rows.column_names == COLUMNS and rows["source_row"][:] == kept
    for row in rows:
        raw = SAT_ROWS[row["source_row"]]
        assert (row["question"], row["answer"]) == (raw["question"], raw["correct_answer"])
        assert sorted(row["options"]) == sorted(raw["answers"])
        assert sizes(row) == [Image.open(io.BytesIO(image)).size for image in raw["image_bytes"]]


def test_sats_dynamic_rows_have_their_images_in_order(processors, tmp_path, capsys):
    types = ["other", "obj_movement", "ego_movement", "action_sequence", "action_consequence", "goal_aim",
             "perspective"]
    rows = [dict(image_bytes=images, question=f"What of {kind}?", question_type=kind, correct_answer="left",
                 answers=["left", "right by 26 degrees"])
            for kind in types for images in ([ONE], [TWO], [ONE, TWO], [TWO, ONE])]
    pq.write_table(pa.Table.from_pylist(rows, SAT_SCHEMA), tmp_path / "SAT.parquet")
    found, counts = prepared(tmp_path, capsys, "--parquet", tmp_path / "SAT.parquet", "--multi_image")
    assert counts == {"kept": len(rows)} and found["question_type"][:] == [r["question_type"] for r in rows]
    assert [sizes(row) for row in found] == [[(84, 56)], [(56, 112)], [(84, 56), (56, 112)],
                                             [(56, 112), (84, 56)]] * len(types)
    assert kept_rows(tmp_path, processors) == list(range(len(rows)))


def test_options_are_shuffled_with_a_seed_and_the_limit_counts_kept_rows():
    columns = prepare_sat.choose_columns("SAT", SAT_SCHEMA.names)
    parse = lambda row: prepare_sat.parse_row(row, columns, None)
    places = lambda seed: [row["options"].index("3")
                           for row in prepare_sat.convert([SAT_ROWS[0]] * 100, parse, seed=seed)]
    assert places(0) == places(0) != places(1) and min(Counter(places(0))[i] for i in range(5)) > 5
    assert len(list(prepare_sat.convert(SAT_ROWS * 3, parse, 3))) == 3


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
BAD_CHATS = [
    ("odd shape", ["no dict", {}, {"conversations": None}, {"conversations": ["Hello", CHAIN]}, None, 3]),
    ("not one question and one reply",
     [{"conversations": []}, {"conversations": chat()["conversations"] * 2, "images": ["a.png"]},
      chat(user="system"), chat(user="assistant", assistant="user"), chat(question=3), chat(user=[]),
      chat(completion=None)]),
    ("no <think> ... </think>", [chat(completion="<answer>B</answer>"), chat(completion="<think>B"),
                                 chat(completion="")]),
    ("no answer in one <answer> block", [chat(completion="<think>B</think>" + end) for end in (
        "", "B", "<answer> </answer>", "<answer>A</answer><answer>B</answer>", "<answer>B")]),
    ("empty answer", [chat(completion="<think></think><answer>Final Answer: </answer>")]),
    ("text outside <think> and <answer>", [chat(completion="Well. " + CHAIN),
                                           chat(completion=CHAIN + " Yes.")]),
    ("broken text", [chat(completion=CHAIN.replace("legs", "\ud83d"))]),
    ("empty question", [chat("<image>\n ")]),
    ("no image", [chat(image=[]), chat(image=None)]),
    ("missing image", [chat(image=name) for name in ("none.png", "sub", "", "nul\0.png", "x" * 5000)]
     + [chat(image=[3]), chat(image={"path": None})]),
    ("image outside its folder", [chat(image="../secret.png"), chat(image="/etc/hostname"),
                                  chat(image="link.png"), chat(image="sub/../../secret.png")]),
    ("broken image", [chat(image="broken.png")]),
    ("several images (--multi_image keeps them)", [chat(image=["a.png", "sub/b.jpg"])])]


@pytest.mark.parametrize("layout", ["list", "lines"])
def test_sharegpt_chains_are_kept_or_skipped_for_a_reason(layout, pictures, tmp_path, capsys):
    rows = [row for row, *_ in GOOD_CHATS] + [row for _, bad in BAD_CHATS for row in bad]
    file = tmp_path / "chains.json"
    file.write_text(json.dumps(rows, indent=1) if layout == "list" else "\n\n".join(map(json.dumps, rows)))
    found, counts = prepared(tmp_path, capsys, "--sharegpt", file, "--image_dir", pictures)
    assert counts == {"kept": len(GOOD_CHATS), **{reason: len(bad) for reason, bad in BAD_CHATS}}
    assert found.column_names == [*COLUMNS, "completion"]
    assert sizes(found[2]) == [(84, 56)] and sizes(found[0]) == [(56, 84)]
    for row, (_, question, answer) in zip(found, GOOD_CHATS):
        assert (row["question"], row["answer"], row["options"]) == (question, answer, [])
    assert found[0]["completion"] == CHAIN and g.format_reward(CHAIN) == 1
    again, counts = prepared(tmp_path / "again", capsys, "--from", tmp_path / "train.parquet")
    assert counts == {"kept": len(GOOD_CHATS)} and again.to_list() == found.to_list()


def test_sharegpt_images_lie_beside_the_file_and_may_be_several(pictures, capsys):
    (pictures / "chains.jsonl").write_text(json.dumps(chat(image=["sub/b.jpg", "a.png"])))
    flags = ["--sharegpt", pictures / "chains.jsonl", "--multi_image"]
    rows, counts = prepared(pictures / "out", capsys, *flags)
    assert counts == {"kept": 1} and sizes(rows[0]) == [(84, 56), (56, 84)]


OF_IMAGE, OF_BYTES = datasets.Image(), datasets.Value("binary")


@pytest.mark.parametrize("kind, value", [
    (OF_IMAGE, {"bytes": ONE, "path": "gone.jpg"}), (datasets.List(OF_IMAGE), [{"bytes": ONE, "path": None}]),
    (OF_BYTES, ONE), (datasets.List(OF_BYTES), [ONE]),
    ({"bytes": OF_BYTES, "path": datasets.Value("string")}, {"bytes": None, "path": "sub/b.jpg"}),
    (datasets.Value("string"), "sub/b.jpg"), (datasets.List(datasets.Value("string")), ["sub/b.jpg"])],
    ids=["Image", "Images", "bytes", "list of bytes", "dict", "path", "paths"])
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_images_of_your_own_data_may_have_any_usual_form(kind, value, folder, pictures, tmp_path, capsys):
    text = datasets.Value("string")
    features = datasets.Features(image=kind, problem=text, solution=text)
    rows = [{"image": value, "problem": "<image>Which?", "solution": "this"}] * 3
    datasets.Dataset.from_list(rows, features).to_parquet(pictures / "train.parquet")
    if folder:
        datasets.Dataset.from_list(rows[:1], features).to_parquet(pictures / "train-2.parquet")
        for other in pictures.glob("*.png"):  # `datasets` takes a folder of mostly pictures for another kind
            other.unlink()
    found, counts = prepared(tmp_path / "own", capsys, "--from",
                             pictures if folder else pictures / "train.parquet")
    assert counts == {"kept": 3 + folder} and found.column_names == COLUMNS
    assert all(sizes(row) == [(84, 56)] for row in found)
    assert found[0]["question"] == "Which?" and found[0]["answer"] == "this" and found[0]["options"] == []


@pytest.mark.parametrize("answer, options, means", [
    ("two", ["one", "two"], "two"), (" two ", ["one ", "two", "two"], "two"),
    ("B", ["one", "two"], "two"), ("(B)", ["one", "two"], "two"), ("B", ["B", "A"], "B"),
    (0, ["one", "two"], "one"), (1, ["one", "two"], "two"), (2, ["2", "3", "5"], "2"), (3, [2, 3], "3"),
    (0.5, [0.5, 1.0], "0.5"), (7, None, "7"), ("B", [], "B"),
    *((wrong, ["one", "two"], "answer not among the options") for wrong in ("C", 2, -1, "1", True)),
    ("one", ["one"], "fewer than two options"), ("one", ["", " "], "fewer than two options"),
    ("one", "one or two", "options are not a list"), ([1], None, "odd shape"), (None, None, "empty answer")])
def test_answers_of_your_own_data_are_texts_letters_or_indices(answer, options, means, pictures):
    row = {"img": "a.png", "q": "Which?", "label": answer, "choices": options}
    columns = prepare_sat.choose_columns("mine", list(row), "images=img,question=q,answer=label")
    counts = Counter()
    parse = lambda row: prepare_sat.parse_row(row, columns, pictures)
    if kept := list(prepare_sat.convert([row], parse, counts=counts)):
        assert kept[0]["answer"] == means and (not kept[0]["options"] or means in kept[0]["options"])
    else:
        assert counts == {"skipped: " + means: 1}


def test_your_own_data_trains(pictures, train, processors, tmp_path, capsys):
    rows = [{"img": "a.png", "q": "Which?", "label": "(B)", "choices": ["this", "that"], "kind": "mine"},
            {"img": "../secret.png", "q": "Which?", "label": "A", "choices": ["this", "that"]}, "odd",
            {"img": ["sub/b.jpg", "a.png"], "q": "How many?", "label": 2, "choices": [1, 2], "chain": CHAIN}]
    (pictures / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = "images=img,question=q,answer=label,question_type=kind"
    flags = ["--from", pictures / "own.jsonl", "--multi_image", "--columns"]
    found, counts = prepared(tmp_path / "own", capsys, *flags, columns)
    assert counts == {"kept": 2, "image outside its folder": 1, "odd shape": 1}
    assert found["source_row"][:] == [0, 3] and found["answer"][:] == ["that", "2"]
    assert found["question_type"][:] == ["mine", None]
    assert kept_rows(tmp_path / "own", processors) == [0, 1]
    train(tmp_path / "run", "--data", tmp_path / "own", "--max_steps", 1)
    found, counts = prepared(tmp_path / "chains", capsys, *flags, columns + ",completion=chain,options=")
    assert counts["empty completion"] == 1 and found["options"][:] == [[]] and found["answer"][:] == ["2"]
    assert found["completion"][:] == [CHAIN]


# ---- The main loop ---------------------------------------------------------------------------------------

@torch.no_grad()
def logits_of(model, prompt):
    return model(**inputs_of(model, prompt)).logits


@pytest.fixture(scope="session")
def trained(train, cvbench, prompts, tmp_path_factory):
    """-> the folder of a run, evaluated on the way, and the logits that each model had when it was saved."""
    folder, at_save = tmp_path_factory.mktemp("runs") / "sat", {}

    def save_model(path, run, *rest, save=g.save_model, **more):
        at_save[path.name] = logits_of(run.sampler, prompts[2])
        save(path, run, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(g, "save_model", save_model)
        train(folder, "--eval_steps", "2", "--eval_data", cvbench)
    return folder, at_save


def test_a_run_leaves_its_files_and_logs_every_metric(trained):
    folder, _ = trained
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "completions.jsonl", "eval.jsonl", "curves.png", "rollouts.html",
        "checkpoint-1", "checkpoint-2", "checkpoint-3", "final"}
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


MARKUP = """</td></table></body><script>alert(1)</script><img src=x onerror="alert(2)"><a href='javascript:'>
&lt;b&gt; "><svg/onload=alert(3)> <!-- <style>*{display:none}</style> ]]> {body} %s"""


def test_markup_in_completions_and_questions_stays_text(trained, sat, tmp_path):
    """The page of a run whose model and data are hostile has the elements of the usual page, and no other."""
    rows = datasets.Dataset.from_parquet(str(sat / "train.parquet"))
    rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False))).to_list()
    samples = jsonl(trained[0] / "completions.jsonl")
    seen = {}
    for name, text in ("usual", "fine"), ("hostile", MARKUP):
        run = tmp_path / name
        run.mkdir()
        changed = [{**sample, "completion": text} for sample in samples]
        eval_cvbench.append_jsonl(run / "completions.jsonl", changed)
        eval_cvbench.write_page(run, [{**row, "question": text, "options": [text] * 2, "answer": text}
                                      for row in rows])
        tags, texts = [], []
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, attributes: tags.append((tag, sorted(dict(attributes))))
        parser.handle_endtag = tags.append
        parser.handle_comment = parser.handle_decl = parser.handle_pi = lambda data: tags.append("comment")
        parser.handle_data = texts.append
        parser.feed((run / "rollouts.html").read_text().removeprefix("<!doctype html>"))
        seen[name] = tags
    assert seen["hostile"] == seen["usual"] and MARKUP in texts and len(seen["usual"]) > 100


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
def test_checkpoints_reload_with_identical_logits(name, trained, prompts, processors):
    folder, at_save = trained[0] / name, trained[1]
    again = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    assert again.dtype == torch.float32
    assert (logits_of(again, prompts[2]) - at_save[name]).abs().max() < 1e-4  # Conv3d rounds otherwise
    assert torch.equal(logits_of(g.fast_layers(again), prompts[2]), at_save[name])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert AutoImageProcessor.from_pretrained(folder, backend="pil").size["longest_edge"] == 401408
    assert tokenizer.chat_template == eval_cvbench.SERVED_PROMPT  # a server asks as it was trained
    assert tokenizer(g.BASE_PROMPT).input_ids == processors[0](g.BASE_PROMPT).input_ids
    assert len(json.loads((folder / "generation_config.json").read_text())["eos_token_id"]) == 2


def test_resume_continues_bit_for_bit(trained, train, cvbench, tmp_path):
    folder, again = trained[0], tmp_path / "again"
    shutil.copytree(folder, again)
    for name in "checkpoint-2", "checkpoint-3", "final":
        shutil.rmtree(again / name)
    (again / "checkpoint-9.tmp").mkdir()  # what a run leaves that is killed while it saves
    train(again, "--resume", "--eval_steps", "2", "--eval_data", cvbench)
    assert same_weights(again / "final", folder / "final")
    assert not same_weights(again / "final", again / "checkpoint-1")
    for name in "metrics.jsonl", "completions.jsonl", "eval.jsonl":
        assert jsonl(again / name) == jsonl(folder / name)


@pytest.mark.parametrize("dies_in, steps, evaluated", [(None, [1], [0, 1]), (4, [1, 2, 3], [0, 2])])
def test_figure_and_page_come_out_of_one_step_and_of_a_stopped_run(dies_in, steps, evaluated, train, cvbench,
                                                                   tmp_path, monkeypatch):
    run, calls = tmp_path / "run", itertools.count(1)

    def sample(*args, do=g.sample):
        if next(calls) == dies_in:
            raise KeyboardInterrupt
        return do(*args)

    monkeypatch.setattr(g, "sample", sample)
    with pytest.raises(KeyboardInterrupt) if dies_in else nullcontext():
        train(run, "--max_steps", 6 if dies_in else 1, "--eval_steps", "2", "--eval_data", cvbench)
    assert [m["step"] for m in jsonl(run / "metrics.jsonl")] == steps
    assert [score["step"] for score in jsonl(run / "eval.jsonl")] == evaluated
    page = (run / "rollouts.html").read_text()
    assert page.endswith("</html>") and f"<h2>Step {evaluated[-1]}</h2>" in page
    for _ in range(2):  # as training left it, and drawn again from a last line that was half written
        assert Image.open(run / "curves.png").width > 500
        (run / "curves.png").unlink()
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 9, "lo')
        eval_cvbench.draw_curves(run)


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
    train(tmp_path / "b", "--max_steps", "1")
    assert called == dict(load_model=3, sample=3)


def test_a_max_grad_norm_of_0_does_not_clip(train, tmp_path):
    for norm in "0", "1e9", "1e-9":
        train(tmp_path / norm, "--max_steps", 1, "--max_grad_norm", norm, "--rewards", "letters")
    assert same_weights(tmp_path / "0/final", tmp_path / "1e9/final")
    assert not same_weights(tmp_path / "0/final", tmp_path / "1e-9/final")


def test_text_alone_with_a_frozen_language_model_learns_nothing_and_goes_on(model, prompts, suppressed):
    still = copy.deepcopy(model).requires_grad_(False)
    cfg, text = g.Config(num_generations=2, beta=0.0), [prompts[3]]
    assert text[0].pixel_values is None
    drawn = g.sample(still, text, 2, 4, 1.0, suppressed, ENDS, seed(0))
    logps, _ = g.update(g.Policy(still, 1.0, suppressed), text, drawn, torch.tensor([1.0, -1.0]).double(),
                        torch.ones(2).double(), None, None, cfg)
    assert (logps - drawn.sampling_logps)[drawn.completion_mask].abs().max() < 1e-9


@pytest.mark.parametrize("size, processes, threads", [(9, 1, 1), (4000, 1, 6), (4000, 2, 3), (4000, 8, 1)])
def test_threads_do_not_depend_on_the_launcher(size, processes, threads, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    g.set_threads(torch.nn.Linear(size, size, device="meta"))
    assert asked == [threads]


def test_accelerate_launch_gives_the_same_bits(train, tmp_path, monkeypatch):
    flags = "--max_steps 2 --rewards accuracy,format --learning_rate 0.01 --weight_decay 1".split()
    train(tmp_path / "python", *flags)  # all rewards are 0: decay moves the weights, then KL
    launch = [sys.executable, *"-m accelerate.commands.launch --cpu --num_processes 1".split(), g.__file__]
    monkeypatch.setattr(g, "main", lambda argv: subprocess.run(launch + argv, check=True))
    train(tmp_path / "launch", *flags)
    assert same_weights(tmp_path / "python/final", tmp_path / "launch/final")
    assert not same_weights(tmp_path / "python/checkpoint-1", tmp_path / "python/final")
    for file in "metrics.jsonl", "completions.jsonl":
        assert jsonl(tmp_path / "python" / file) == jsonl(tmp_path / "launch" / file)


@pytest.mark.parametrize("freeze, moves, stays, calls", [
    ("vision", "model.embed_tokens.weight", "visual.", 1), ("llm", "visual.", "model.", 3)])
def test_frozen_weights_stay_and_the_others_move(freeze, moves, stays, calls, train, model_dir, tmp_path,
                                                 monkeypatch):
    seen, forward = [], g.Qwen2VLForConditionalGeneration.forward
    tower = transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel
    forward = tower.forward
    monkeypatch.setattr(tower, "forward", lambda *a, **k: seen.append(1) or forward(*a, **k))
    train(tmp_path / "run", "--freeze", freeze, "--max_steps", 2, "--save_steps", 1)
    assert len(seen) == 2 * 2 * calls  # steps x prompts x (sampler, reference, policy, or all three at once)
    folders = Path(model_dir), tmp_path / "run/final"
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    assert before.keys() == after.keys()
    same = {name: torch.equal(before[name].float(), after[name]) for name in before}
    assert all(same[name] for name in same if name.startswith(stays))
    assert not any(same[name] for name in same if name.startswith(moves))
    state = FileSystemReader(tmp_path / "run/checkpoint-1/state").read_metadata().state_dict_metadata
    assert any("exp_avg" in key for key in state)
    assert not any("exp_avg" in key and ("visual" in key) == (freeze == "vision") for key in state)


def test_stages_change_length_and_group_size_and_resume_in_the_right_one(train, tmp_path):
    flags = "--stages", "2x3x2,2x9x4", "--eval_steps", "0"
    train(tmp_path / "whole", *flags)
    samples = [[], [], [], []]
    for s in jsonl(tmp_path / "whole/completions.jsonl"):
        samples[s["step"] - 1].append(s)
    assert [len(found) for found in samples] == [4, 4, 8, 8]
    assert [max(s["length"] for s in found) > 3 for found in samples] == [False, False, True, True]
    assert max(s["length"] for found in samples for s in found) <= 9
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for name in "checkpoint-4", "final":
        shutil.rmtree(tmp_path / "again" / name)
    g.main(["--resume", "--output_dir", str(tmp_path / "again")])  # the run's own settings, from config.json
    assert same_weights(tmp_path / "whole/final", tmp_path / "again/final")
    for name in "metrics.jsonl", "completions.jsonl":
        assert jsonl(tmp_path / "whole" / name) == jsonl(tmp_path / "again" / name)


@pytest.mark.parametrize("code, words", [
    ("def mine(completion", ["SyntaxError"]), ("import nothing_here", ["nothing_here"]),
    ("def other(completion, **_): return 1", ["--rewards", "mine is unknown"]),
    ("def mine(completion, **_): return [1, 2]", ["reward mine", "TypeError"]),
    ("def mine(completion, **_): return 0 / 0", ["reward mine", "ZeroDivisionError"]),
    ("def mine(completion): return 1", ["reward mine", "num_tokens"]),
    ("def mine(completion, **_): return float('nan')", ["reward mine is nan"])])
def test_a_reward_file_with_a_bug_stops(code, words, train, tmp_path, monkeypatch):
    monkeypatch.setattr(g, "REWARDS", dict(g.REWARDS))
    (tmp_path / "rewards.py").write_text(code)
    with stops(*words):
        train(tmp_path / "run", "--reward_file", tmp_path / "rewards.py", "--rewards", "accuracy,mine")


def test_sft_keeps_one_completion_in_stages_and_grpo_needs_two():
    flags = ["--stages", "1x8x2,1x9x4"]
    assert g.settings_at(g.parse_config([*flags, "--algorithm", "sft"]), 1).num_generations == 1
    assert g.settings_at(g.parse_config(flags), 1).num_generations == 4
    with stops("--stages 1x8x2,1x9x1", "2 generations"):
        g.parse_config(["--stages", "1x8x2,1x9x1"])


def test_a_toy_folder_without_its_base_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/toy").mkdir(parents=True)
    Path("data/toy/notes.txt").write_text("mine")
    with stops("data/toy/base"):
        g.main(["--eval_steps", "0"])
    assert Path("data/toy/notes.txt").read_text() == "mine" and not Path("runs").exists()


def test_a_reward_file_of_which_nothing_is_used_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(g, "REWARDS", dict(g.REWARDS))
    (tmp_path / "rewards.py").write_text("def mine(completion, **_): return 1")
    with stops("--reward_file", "mine"):
        g.parse_config(["--reward_file", str(tmp_path / "rewards.py")])


def test_free_answers_and_vision_r1s_wording_are_graded():
    for options in None, []:
        assert g.grade("15", "15", options) and g.grade("B", "b.", options, eval_cvbench.read_choice)
        assert not g.grade("15", "5", options, eval_cvbench.read_choice) and not g.grade("b", "left", options)
    for choose in g.choose, eval_cvbench.read_choice:
        assert g.grade("Final Answer: B", "left", ["right", "left"], choose)
        assert not g.grade("Final Answer:A", "left", ["right", "left"], choose)


def test_rows_that_hold_a_completion_for_sft_can_be_rewarded_too():
    row = dict(answer="left", options=OPTIONS, completion="<think> given </think> <answer> right </answer>")
    found = g.compute_rewards(["accuracy"], ["<think> a </think> <answer> left </answer>"], [7], [row])
    assert found["accuracy"].tolist() == [1]


def test_hard_and_length_rewards():
    row = dict(answer="left", options=OPTIONS, num_tokens=7)
    for completion, expected in {"<think> a </think> <answer> left </answer>": 1,
                                 "<think> a </think> <answer> right </answer>": 0,
                                 "<answer> left </answer>": 0}.items():
        assert g.hard_reward(completion, **row) == expected and g.length_reward(completion, **row) == 0.007


def test_the_benchmark_of_a_gpu_measures_memory_and_a_step_in_bf16():
    tiny = """--num_generations 2 --completion_length 8 --image_size 56 --text_tokens 4 --vocab 64 --hidden 32
        --intermediate 32 --layers 1 --heads 2 --kv_heads 1 --vision_hidden 32 --vision_layers 1
        --vision_heads 2 --threads 1""".split()

    def measured(*flags):
        command = [sys.executable, Path(g.__file__).parent / "bench/step.py", *tiny, *flags]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    for way in "ours", "usual":
        assert int(measured("--measure", way)) >= 0
    table = dict(row.strip("| ").split(" | ") for row in measured(
        "--program", "--no_time", "--no_memory", "--repeats", "1").splitlines()[2:] if row.startswith("|"))
    for name in "sampler_mismatch", "bf16 sampler against float32":
        assert 0 < float(table[f"{name}, largest, mean"].split(",")[0]) < 0.1  # 0 would be no bf16
    assert float(table["update, gradient, TFLOP / s"]) > 0 and float(table["**whole step, s**"]) >= 0


# ---- One process or many ---------------------------------------------------------------------------------

# grpo_vision.py in float64, its completions drawn prompt by prompt, so that they are the same however the
# prompts are shared out; those of one question are much longer. update's results are kept for comparison.
WORKER = """
import os, sys, torch
import grpo_vision as g
from torch.distributed.tensor import DTensor

load_model, sample, update, folder = g.load_model, g.sample, g.update, sys.argv.pop(1)
whole = lambda x: x.full_tensor() if isinstance(x, DTensor) else x
calls = []

def in_double(path, attn_implementation="sdpa", dtype=None):
    return load_model(path, attn_implementation, torch.float64)

def sample_each(model, prompts, G, C, *rest):
    found = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(int(prompt.input_ids.sum()) + len(calls))
        limit = C if "chairs" in prompt.text else 3
        found.append(sample(model, [prompt], G, limit, *rest[:-1], generator))
    pad = lambda name: torch.nn.utils.rnn.pad_sequence(
        [row for one in found for row in getattr(one, name)], batch_first=True)
    return g.Rollout(pad("completion_ids"), pad("completion_mask"), pad("sampling_logps"),
                     torch.cat([one.finished for one in found]))

def update_and_keep(policy, prompts, *rest):
    logps, sums = update(policy, prompts, *rest)
    sharded = torch.distributed.get_world_size() > 1
    assert all(isinstance(x, DTensor) == sharded for x in policy.parameters())
    calls.append(dict(logps={p.text: part for p, part in zip(prompts, logps.chunk(len(prompts)))},
                      gradients={name: whole(x.grad).clone() for name, x in policy.named_parameters()}))
    return logps, sums

g.load_model, g.sample, g.update = in_double, sample_each, update_and_keep
g.main()
rank = os.environ["RANK"]
torch.save(calls, f"{folder}-{rank}.pt")
"""


def launch(processes, script, *flags):
    """Run a script in so many processes on this machine, as `accelerate launch` does on one with GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
               "--master_port", str(random.randint(20000, 60000)), script, *map(str, flags)]
    return subprocess.run(command, cwd=Path(g.__file__).parent, text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(Path(g.__file__).parent)})


def test_two_processes_with_sharded_weights_equal_one(train, tmp_path, monkeypatch, processors, prompts):
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "mine.py").write_text("def mine(completion, **_):\n    return sum(map(ord, completion)) % 7")
    flags = f"""--reward_file {tmp_path}/mine.py --rewards accuracy,format,mine --max_completion_length 40
        --score_tokens 30""".split()
    for processes in 1, 2:
        folder = tmp_path / str(processes)
        with monkeypatch.context() as patch:
            patch.setattr(g, "main", lambda argv: launch(processes, tmp_path / "worker.py", folder, *argv))
            done = train(folder, *flags)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("2 x cpu, FSDP2" if processes == 2 else "1 x cpu, no wrapper") in done.stdout
    one, *two = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert len(one) == len(two[0]) == len(two[1]) == 3
    error = lambda x, y: ((x - y).norm() / y.norm()).item()
    for step in range(3):
        assert not two[0][step]["logps"].keys() & two[1][step]["logps"].keys()
        for text, logps in one[step]["logps"].items():
            mine = {**two[0][step]["logps"], **two[1][step]["logps"]}[text]
            C = min(logps.shape[1], mine.shape[1])
            assert error(mine[:, :C], logps[:, :C]) < 1e-6
        for name, gradient in one[step]["gradients"].items():
            assert gradient.norm() > 0 and error(two[0][step]["gradients"][name], gradient) < 1e-6, name
    one, two = (jsonl(tmp_path / folder / "metrics.jsonl") for folder in "12")
    assert all(x == pytest.approx(y, rel=1e-6, abs=1e-9) for x, y in zip(one, two, strict=True))
    lengths = Counter(s["length"] > 3 for s in jsonl(tmp_path / "2/completions.jsonl"))
    assert min(lengths.values()) > 2  # the processes had unequal numbers of chunks
    load = partial(Qwen2VLForConditionalGeneration.from_pretrained, dtype=torch.float64)
    one, two = (load(tmp_path / folder / "final") for folder in "12")
    assert "lm_head.weight" not in load_file(tmp_path / "2/final/model.safetensors")
    assert all(error(x, y) < 1e-6 for x, y in zip(two.state_dict().values(), one.state_dict().values()))
    assert (logits_of(one, prompts[2]) - logits_of(two, prompts[2])).abs().max() < 1e-6


def test_what_several_processes_cannot_share_stops(sat, tmp_path, processors, monkeypatch):
    rows = datasets.Dataset.from_parquet(str(sat / "train.parquet")).to_list()
    rows[1]["images"] = []
    features = datasets.Dataset.from_parquet(str(sat / "train.parquet")).features
    datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / "train.parquet")
    assert kept_rows(tmp_path, processors) == [0, 1, 2]  # alone, a row without an image is text
    with stops("row 1", "no image", "one process"):
        kept_rows(tmp_path, processors, need_image=True)
    monkeypatch.setattr(g, "Accelerator", lambda **_: SimpleNamespace(log_with=[], num_processes=3))
    with stops("--prompts_per_step 8", "3 processes"):
        g.make_accelerator(g.Config())


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
    (folder / "metrics.jsonl").open("a").write('{"step": 99, "half a li')  # as a kill may leave it
    (folder / "checkpoint-99.tmp").mkdir()
    g.main([*resume, "--save_total_limit", "2"])
    assert same_weights(tmp_path / "whole/final", folder / "final")
    for name in "metrics.jsonl", "completions.jsonl":
        assert jsonl(tmp_path / "whole" / name) == jsonl(folder / name)
    assert [path.name for path in g.checkpoints(folder)] == ["checkpoint-12", "checkpoint-14"]


@pytest.mark.parametrize("room", [0.5, 1.5], ids=["weights", "state"])
def test_a_save_that_fails_says_so_and_leaves_the_last_checkpoint_whole(room, train, tmp_path, monkeypatch):
    run, resource = tmp_path / "run", pytest.importorskip("resource")

    def save_on_a_full_disk(folder, *rest, save_model=g.save_model, **more):
        size = (run / "checkpoint-1/model.safetensors").stat().st_size if "checkpoint-2" in str(folder) else 0
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(room * size) if size else limit[0], limit[1]))
        try:
            save_model(folder, *rest, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    said = stops("checkpoint-2 could not be saved", "MiB free", "checkpoint-1", "--resume")
    with monkeypatch.context() as patch, said:
        patch.setattr(g, "save_model", save_on_a_full_disk)
        train(run)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]  # and no .tmp
    g.load_model(str(run / "checkpoint-1"))
    train(run, "--resume")
    assert [m["step"] for m in jsonl(run / "metrics.jsonl")] == [1, 2, 3] and (run / "final").exists()


# ---- Bad input -------------------------------------------------------------------------------------------

def test_missing_paths_stop(train, tmp_path):
    for flag, value in ("--model_name_or_path", tmp_path / "none"), ("--model_name_or_path", "none/here"), (
            "--data", tmp_path / "none"):
        with stops(str(value)):
            train(tmp_path / "run", flag, value)
    with stops("--resume", "not the folder of a run"):
        train(tmp_path / "run", "--resume")
    assert not (tmp_path / "run").exists()


def test_data_that_is_no_training_data_stops(train, sat, tmp_path):
    (tmp_path / "text.parquet").write_text("question,answer\n")
    pq.write_table(pq.read_table(sat / "train.parquet").drop_columns(["options"]), tmp_path / "less.parquet")
    for path, word in {tmp_path / "text.parquet": "not a Parquet", tmp_path / "less.parquet": "'options'",
                       sat / "SAT_train.parquet": "no column"}.items():
        with stops(path.name, word):
            train(tmp_path / "run", "--data", path)


def test_data_that_cannot_be_prepared_stops(sat, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw, less, chain = sat / "SAT_train.parquet", tmp_path / "less.parquet", tmp_path / "chain.json"
    pq.write_table(pq.read_table(raw).drop_columns(["question"]), less)
    chain.write_text(json.dumps([chat(image="none.png")]))
    for name, text in {"list.json": '[{"a": 1},\n{"b" 2}]', "lines.jsonl": '{"a": 1}\n\n{"b": 2',
                       "none.json": "[]"}.items():
        (tmp_path / name).write_text(text)
    for flags, words in [
            (["--parquet", "none.parquet"], ["none.parquet", "does not exist"]),
            (["--parquet", pictures / "a.png"], ["a.png", "Parquet"]),
            (["--parquet", less], ["less.parquet", "question or problem", "image_bytes, answers"]),
            (["--from", less, "--columns", "answer=label"], ["answer=label", "image_bytes"]),
            (["--from", less, "--columns", "reply=answers"], ["reply=answers", "question_type"]),
            (["--from", less, "--columns", "answer"], ["--columns answer", "OURS=THEIRS"]),
            (["--from", raw, "--columns", "answer="], ["--columns answer=NAME"]),
            (["--from", "none/here"], ["none/here", "hub"]), (["--from", "none.jsonl"], ["none.jsonl"]),
            (["--from", "list.json"], ["list.json, line 2"]), (["--from", "lines.jsonl"], ["line 3"]),
            (["--from", "none.json"], ["none.json", "(none)"]),
            (["--from", raw, "--columns", "answer=question"], ["SAT_train.parquet", "no row"]),
            (["--sharegpt", "none.json"], ["none.json", "no row"]), (["--sharegpt", chain], ["no row"]),
            (["--sharegpt", "gone.json"], ["gone.json"]), (["--sharegpt", pictures / "a.png"], ["a.png"]),
            (["--sharegpt", chain, "--image_dir", "none"], ["--image_dir none"]),
            (["--image_dir", pictures], ["--image_dir", "--sharegpt"]),
            (["--parquet", raw, "--columns", "answer=label"], ["--columns", "--from"]),
            (["--toy", "--limit", 3], ["--toy", "--limit"]),
            (["--parquet", raw, "--limit", 0], ["--limit 0"])]:
        with stops(*words):
            prepare_sat.main([*map(str, flags), "--out", str(tmp_path / "out")])
    for flags in ["--toy", "--parquet", "x"], ["--from", "x", "--sharegpt", "x"]:
        with pytest.raises(SystemExit, match="2"):
            prepare_sat.main(flags)
    assert not list(tmp_path.glob("out/*")) and not (tmp_path / "data").exists()


@pytest.mark.parametrize("broken", [NO_JPEG, HALF_A_JPEG], ids=["header", "body"])
def test_a_broken_image_stops_and_its_row_is_named(broken, train, sat, tmp_path):
    table = pq.read_table(sat / "train.parquet")
    rows = table.to_pylist()
    rows[1]["images"][1]["bytes"] = broken
    pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / "broken.parquet")
    with stops("broken.parquet, row 1"):
        train(tmp_path / "run", "--data", tmp_path / "broken.parquet")


def test_long_prompts_are_dropped_and_never_cut(train, sat, model_dir, model, tmp_path, capsys):
    processors = g.load_processors(model_dir, 3136, 401408)
    rows = datasets.Dataset.from_parquet(str(sat / "train.parquet"))
    prompts = [g.build_prompt(g.row_text(row, "base", None), row["images"], *processors, model)
               for row in rows]
    lengths = [prompt.input_ids.shape[1] for prompt in prompts]
    kept = lambda limit: kept_rows(sat, processors, limit)
    assert kept(max(lengths)) == [0, 1, 2] and "dropped" not in capsys.readouterr().out
    assert kept(max(lengths) - 1) == [i for i in range(3) if lengths[i] < max(lengths)]
    assert "dropped 1 of 3" in capsys.readouterr().out
    train(tmp_path / "run", "--max_prompt_length", max(lengths) - 1)
    assert max(lengths) not in [lengths[s["row"]] for s in jsonl(tmp_path / "run/completions.jsonl")]
    with stops("--max_prompt_length 20"):
        train(tmp_path / "nothing left", "--max_prompt_length", 20)


def test_output_dir_in_use_is_refused_or_overwritten(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    (tmp_path / "run" / "config.json").write_text("{}")
    with stops("run exists"):
        train(tmp_path / "run")
    with stops("none"):  # an error elsewhere deletes nothing
        train(tmp_path / "run", "--overwrite", "--data", tmp_path / "none")
    assert (tmp_path / "run" / "mine").exists()
    train(tmp_path / "run", "--overwrite", "--max_steps", "1")
    assert (tmp_path / "run" / "final").exists() and not (tmp_path / "run" / "mine").exists()


def test_nan_loss_stops_and_keeps_the_last_checkpoint(train, tmp_path, monkeypatch):
    run = tmp_path / "run"

    calls = []  # of step 2; by the later ones the gradient would be finite again

    def grpo_loss(*args, right=g.grpo_loss):
        loss, *rest = right(*args)
        calls.extend([1] * (run / "checkpoint-1").exists())
        return loss * math.nan if len(calls) == 1 else loss, *rest

    with monkeypatch.context() as patch, stops("step 2", "nan", "bad_batch.jsonl"):
        patch.setattr(g, "grpo_loss", grpo_loss)
        train(run, "--num_iterations", 2)
    assert len(jsonl(run / "bad_batch.jsonl")) == 8 and len(jsonl(run / "metrics.jsonl")) == 1
    assert not (run / "checkpoint-2").exists() and not (run / "final").exists()
    assert all(p.isfinite().all() for p in g.load_model(str(run / "checkpoint-1")).parameters())
    train(run, "--resume")
    assert (run / "final").exists()


# ---- Does it learn? --------------------------------------------------------------------------------------

@pytest.mark.parametrize("sign, steps", [(1, 16), (-1, 16), (0, 2)])
def test_learning_follows_the_advantages(sign, steps, train, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(g, "group_advantages", lambda *args, right=g.group_advantages: sign * right(*args))
    train(tmp_path / "run", *f"""--max_steps {steps} --save_steps 99 --num_generations 16 --learning_rate 0.02
        --rewards letters --beta 0 --score_tokens 4096""".split())
    reward = [m["reward"] for m in jsonl(tmp_path / "run/metrics.jsonl")]
    if sign:
        assert sign * (sum(reward[-4:]) - sum(reward[:4])) / 4 > 0.1, reward
    else:
        before, after = (g.load_model(str(path)).state_dict() for path in (model_dir, tmp_path / "run/final"))
        assert all(torch.equal(before[name], after[name]) for name in before)


# ---- Evaluation ------------------------------------------------------------------------------------------

ROLES = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}" \
        "{{ '<|im_start|>assistant\\n' }}"


@pytest.fixture(scope="session")
def instruct_dir(model_dir, tmp_path_factory):
    """The small model with a chat template that tells user from assistant."""
    folder = tmp_path_factory.mktemp("model") / "instruct"
    shutil.copytree(model_dir, folder)
    (folder / "chat_template.jinja").write_text(ROLES)
    return str(folder)


@pytest.fixture(scope="session")
def evaluate(model_dir, cvbench):
    """evaluate(output_dir, *flags): the small model on the small CV-Bench -> folder with the results"""
    def run(output_dir, *flags, model=model_dir):
        eval_cvbench.main(["--model", model, "--data", str(cvbench), "--output_dir", str(output_dir),
                           *"--max_new_tokens 6 --batch_size 2".split(), *map(str, flags)])
        return next(Path(output_dir).glob("*/*"))
    return run


@pytest.fixture(scope="session")
def evaluated(evaluate, tmp_path_factory):
    return evaluate(tmp_path_factory.mktemp("results"), "--modes", "all")


def test_all_modes_are_asked_in_the_papers_words(evaluate, evaluated, instruct_dir, tmp_path, capsys):
    lines = lambda n: "".join(f"\n({'ABCDEF'[j]}) {choice}" for j, choice in enumerate("341205"[:n]))
    user = lambda text: "<|im_start|>user\n" + g.IMAGE_TOKENS + text + "<|im_end|>\n<|im_start|>assistant\n"
    expected = {
        "base-reasoning": lambda q: g.IMAGE_TOKENS + g.BASE_PROMPT.format(question=q),
        "base-direct": lambda q: g.IMAGE_TOKENS + "A conversation between User and Assistant. The user asks "
            f"a question about the image, and the Assistant solves it.\nUser: {q} \nAssistant: ",
        "instruct-reasoning": lambda q: user(q + "\nOutput the thinking process in <think> </think> and "
                                                 "final answer in <answer> </answer> tags."),
        "instruct-direct": user}
    folder = evaluate(tmp_path, "--modes", "all", model=instruct_dir)
    printed = capsys.readouterr()
    assert "warning" in printed.err and "2 of Count, not 788" in printed.err
    for word in "Count Relation Depth Distance ADE20K COCO Omni3D total 2D 3D official unparsed".split():
        assert word in printed.out
    for folder, modes in (folder, expected), (evaluated, list(expected)[:2]):
        assert {path.name for path in folder.iterdir()} == {
            "summary.json", "summary.md", "report.html", *(f"{mode}.jsonl" for mode in modes)}
        for mode in modes:
            records = jsonl(folder / f"{mode}.jsonl")
            assert [(r["id"], r["answer"], len(r["options"])) for r in records] == [
                (0, "4", 2), (1, "4", 3), (2, "4", 6), (3, "4", 4), (4, "4", 5)]
            assert [r["prompt"] for r in records] == [
                expected[mode](CVBENCH_TEXT + lines(len(r["options"]))) for r in records]
            assert all(r["completion"].startswith("<think>") == (mode == "base-reasoning") for r in records)
        assert list(json.loads((folder / "summary.json").read_text())) == list(modes)


def test_questions_with_free_answers_are_evaluated(sat, model_dir, tmp_path):
    table = datasets.Dataset.from_parquet(str(sat / "train.parquet"))
    rows = [{**row, "options": []} for row in table.to_list()]
    datasets.Dataset.from_list(rows, table.features).to_parquet(tmp_path / "free.parquet")
    eval_cvbench.main(["--model", model_dir, "--data", str(tmp_path / "free.parquet"), "--max_new_tokens",
                       "4", "--output_dir", str(tmp_path / "results")])
    summary = json.loads(next((tmp_path / "results").rglob("summary.json")).read_text())
    assert summary["base-reasoning"]["scores"]["total"]["chance"] == 0


def test_held_out_questions_are_asked_as_in_training(sat, instruct_dir):
    rows = datasets.Dataset.from_parquet(str(sat / "train.parquet"))
    questions = eval_cvbench.load_benchmark(str(sat / "train.parquet"))
    tokenizer, _ = g.load_processors(instruct_dir)
    for q, row in zip(questions, rows, strict=True):
        for template in "base", "instruct":
            asked = eval_cvbench.prompt_text(q, f"{template}-reasoning", tokenizer)
            assert asked == g.row_text(row, template, tokenizer)
        assert (q["answer"], q["options"]) == (row["answer"], row["options"])


def test_images_are_seen_upright_and_transparency_is_white():
    image = Image.new("RGB", (40, 24), "red")
    image.paste("blue", (0, 0, 20, 12))
    near = lambda one, other: max(abs(a - b) for a, b in zip(one, other)) < 40
    corners = lambda x: [x.getpixel((2, 2)), x.getpixel((x.width - 3, 2)), x.getpixel((2, x.height - 3))]
    stored = Image.open(io.BytesIO(turned(image)))
    seen = g.upright(stored)
    assert stored.size == (24, 40) and seen.size == image.size and seen.mode == "RGB"
    assert all(map(near, corners(seen), corners(image)))
    assert not all(map(near, corners(stored.rotate(180)), corners(image)))
    clear = image.convert("RGBA")
    clear.putalpha(Image.new("L", image.size, 0))
    assert g.upright(clear).getpixel((2, 2)) == (255, 255, 255)
    assert clear.convert("RGB").getpixel((2, 2)) != (255, 255, 255)
    for mode in "L", "P", "LA", "RGBA", "1", "CMYK":
        assert near(g.upright(image.convert(mode)).getpixel((30, 20)),
                    image.convert(mode).convert("RGB").getpixel((30, 20)))


def test_batched_answers_are_those_of_one_at_a_time_and_of_generate(cvbench, model, stock, processors,
                                                                    suppressed):
    questions = eval_cvbench.load_benchmark(str(cvbench))
    todo, tokenizer = {"base-direct": questions[1:], "base-reasoning": questions}, processors[0]
    one, three, all_at_once = (sorted(eval_cvbench.answer_questions(
        model, *processors, todo, batch_size=n, max_new_tokens=10), key=lambda r: (r["mode"], r["id"]))
        for n in (1, 3, 32))
    assert one == three == all_at_once and len({r["completion"] for r in one}) > 4 and len(one) == 9
    for r in one:
        images = [g.open_image(image, "") for image in questions[r["id"]]["images"]]
        prompt = g.build_prompt(r["prompt"], images, *processors, model)
        ids = stock.generate(**inputs_of(stock, prompt), do_sample=False, max_new_tokens=10,
                             suppress_tokens=suppressed.nonzero()[:, 0].tolist(),
                             eos_token_id=g.end_tokens(tokenizer))[0, prompt.input_ids.shape[1]:]
        assert r["completion"] == g.completion_text(r["prompt"], ids, tokenizer) and r["length"] == len(ids)


def test_an_image_is_encoded_once_for_all_modes(cvbench, model, processors, monkeypatch):
    questions, calls = eval_cvbench.load_benchmark(str(cvbench)), Counter()
    for name, part in ("tower", model.model.visual), ("decoder", model.model.language_model):
        monkeypatch.setattr(part, "forward", lambda *a, name=name, do=part.forward, **k: (
            calls.update([name]), do(*a, **k))[1])
    def ask(modes):
        calls.clear()
        list(eval_cvbench.answer_questions(model, *processors, {mode: questions for mode in modes},
                                           batch_size=2, max_new_tokens=1))
        return calls["tower"], calls["decoder"]
    assert ask(["base-direct"]) == (5, 5 + 3) and ask(["base-direct", "base-reasoning"]) == (5, 2 * (5 + 3))


def test_streamed_greedy_answers_are_the_sampled_ones(model, processors, prompts, suppressed, capsys):
    model, eos_ids = copy.deepcopy(model), g.end_tokens(processors[0])
    for prompt in prompts:
        ids = eval_cvbench.stream(model, processors[0], prompt, 0, 0.95, 12)
        ours = g.sample(model, [prompt], 1, 12, 0, suppressed, eos_ids).completion_ids[0]
        assert ids.tolist() == ours.tolist()
        assert capsys.readouterr().out.strip() == processors[0].decode(ids, skip_special_tokens=True).strip()
    draw = lambda seed: eval_cvbench.stream(model, processors[0], prompts[0], 0.6, 0.95, 12, seed).tolist()
    drawn = [draw(0), draw(0), draw(1)]
    assert drawn[0] == drawn[1] != drawn[2]  # the model's own generation_config has top_k 1


def test_ask_prints_the_answer(model_dir, tmp_path, capsys):
    picture(84, 56).save(tmp_path / "a.png")
    flags = ["--model", model_dir, "--ask", "Which?", "--max_new_tokens", "5", "--image"]
    eval_cvbench.main([*flags, str(tmp_path / "a.png"), str(tmp_path / "a.png")])
    printed = capsys.readouterr().out
    assert re.fullmatch(r"<think>.+\n\(cut off: .*\)\n\(no answer block\)\n", printed, re.DOTALL)
    with stops("none.png"):
        eval_cvbench.main([*flags, "none.png"])


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
    assert g.choose_prompt(tokenizer) == "base"  # or it would be trained and evaluated as an instruct model


# answers to 2 + 4 + 5 questions, by hand
HAND = {"ADE20K": [1, 0], "COCO": [1, 1, 1, 0], "Omni3D": [1, 0, 0, 0, 0]}


def graded(verdicts):
    """{source: [right or not]} -> records"""
    return [{"task": "Depth" if source == "Omni3D" else "Count", "source": source, "correct": bool(right),
             "options": list("abcd")[:2 if source == "Omni3D" else 4], "chosen": "a" if right else None,
             "extracted": "(A)" if right else "a", "completion": "<answer>wait</answer>" if right else "",
             "length": 10 + right, "finished": source != "COCO"}
            for source, rights in verdicts.items() for right in rights]


def test_scores_by_hand():
    summary = eval_cvbench.summarise(graded(HAND))
    value = {name: s.value for name, s in summary["scores"].items()}
    official = 100 * ((1 / 2 + 3 / 4) / 2 + 1 / 5) / 2
    assert value == pytest.approx({"Count": 400 / 6, "Depth": 20, "ADE20K": 50, "COCO": 75, "Omni3D": 20,
                                   "total": 500 / 11, "2D": 62.5, "3D": 20, "official": official})
    assert abs(value["official"] - value["total"]) > 4  # the two are not one number
    some = summary["scores"]
    assert some["total"].error == pytest.approx(100 * (5 / 11 * 6 / 11 / 11) ** 0.5)
    assert some["2D"].error == pytest.approx(100 * ((1 / 4 / 2 + 3 / 16 / 4) / 4) ** 0.5)
    assert [some[name].chance for name in ("Count", "Depth", "2D", "official")] == [25, 50, 25, 37.5]
    assert some["total"].chance == pytest.approx(100 * (6 / 4 + 5 / 2) / 11)
    rates = dict(zip("unparsed truncated letters block reflection length".split(), summary["rates"].values()))
    half = 500 / 11
    assert rates == pytest.approx(dict(unparsed=600 / 11, truncated=400 / 11, letters=100, block=half,
                                       reflection=half, length=10 + 5 / 11))
    eight = eval_cvbench.score([(1, [{"correct": i < 8, "options": "ab"} for i in range(10)])])
    assert (eight.low, eight.high) == pytest.approx((49.02, 94.33), abs=0.01)  # Wilson's interval of 8 in 10
    none = eval_cvbench.score([(1, [{"correct": False, "options": "ab"}] * 10)])
    assert none.low == 0 and none.high == pytest.approx(27.75, abs=0.01) and "-" not in f"{none.low:.1f}"


def quantiles(values):
    values = sorted(values)
    return [values[int(share * len(values))] for share in (0.025, 0.975)]


def test_intervals_are_those_of_a_bootstrap():
    rng = random.Random(0)
    verdicts = {name: [rng.random() < p for _ in range(n)]
                for name, n, p in (("ADE20K", 150, 0.9), ("COCO", 200, 0.8), ("Omni3D", 300, 0.2))}
    found = eval_cvbench.summarise(graded(verdicts))["scores"]
    mean = lambda some: sum(some) / len(some)
    again = [{name: rng.choices(some, k=len(some)) for name, some in verdicts.items()} for _ in range(4000)]
    official = [100 * ((mean(x["ADE20K"]) + mean(x["COCO"])) / 2 + mean(x["Omni3D"])) / 2 for x in again]
    assert [found["official"].low, found["official"].high] == pytest.approx(quantiles(official), abs=0.6)
    spread = (mean([x**2 for x in official]) - mean(official)**2) ** 0.5
    assert found["official"].error == pytest.approx(spread, rel=0.05)
    total = [100 * mean(rng.choices(sum(verdicts.values(), []), k=650)) for _ in range(4000)]
    assert [found["total"].low, found["total"].high] == pytest.approx(quantiles(total), abs=0.6)
    assert abs(found["total"].low - quantiles(official)[0]) > 1  # the control: it is not any interval


def test_paired_difference_against_all_permutations_and_a_bootstrap():
    rng = random.Random(1)
    pairs = [{"correct": a, "other": b} for a, b in
             [(True, True)] * 6 + [(False, False)] * 4 + [(True, False)] * 3 + [(False, True)] * 9]
    d, low, high, p = eval_cvbench.difference([(1, pairs)])
    assert d == pytest.approx(100 * 6 / 22)
    gains = [x["other"] - x["correct"] for x in pairs if x["other"] != x["correct"]]
    sums = [abs(sum(map(lambda sign, gain: sign * gain, signs, gains)))
            for signs in itertools.product((1, -1), repeat=12)]
    assert p == pytest.approx(sum(s >= 6 for s in sums) / 2**12)
    assert eval_cvbench.difference([(1, pairs[:10])])[3] == 1  # nobody was better anywhere
    swapped = eval_cvbench.difference([(1, [{"correct": x["other"], "other": x["correct"]} for x in pairs])])
    assert swapped == pytest.approx((-d, -high, -low, p))
    many = pairs * 20 + [{"correct": right, "other": right} for right in (True, False)] * 440
    d, low, high, _ = eval_cvbench.difference([(1, many)])
    gains = [x["other"] - x["correct"] for x in many]
    again = [100 * sum(rng.choices(gains, k=1320)) / 1320 for _ in range(4000)]
    assert [low, high] == pytest.approx(quantiles(again), abs=0.4)
    shares = [sum(x[name] for x in many) / 1320 for name in ("correct", "other")]
    unpaired = 2 * 196 * (sum(p * (1 - p) for p in shares) / 1320) ** 0.5
    assert unpaired > 1.5 * (high - low)  # the control: what taking the two for independent would give
    half = eval_cvbench.difference([(0.5, many), (0.5, many)])  # of two halves as good: narrower by root 2
    assert half[0] == pytest.approx(d) and half[2] - half[1] == pytest.approx((high - low) / 2**0.5)


def test_the_papers_rows_stand_beside_all_of_cvbench_only():
    of_each = {("Count", "ADE20K"): 633, ("Count", "COCO"): 155, ("Relation", "COCO"): 650,
               ("Depth", "Omni3D"): 600, ("Distance", "Omni3D"): 600}
    records = [{**graded({source: [1]})[0], "task": task} for (task, source), n in of_each.items()
               for _ in range(n)]
    for some, there in (records, True), (records[1:], False):
        rows = eval_cvbench.score_rows({"base-reasoning": eval_cvbench.summarise(some)})
        table = eval_cvbench.markdown(rows)
        assert ("| paper: base + GRPO | 59.64 | 66.76 | 54.16 | 56.66 | 59.47 |" in table) == there


def test_a_second_start_asks_what_is_missing(evaluate, evaluated, tmp_path, monkeypatch, capsys):
    asked = []
    def sample(model, prompts, *rest, do=g.sample):
        asked.extend(prompt.text for prompt in prompts)
        return do(model, prompts, *rest)
    monkeypatch.setattr(eval_cvbench, "sample", sample)
    folder = evaluate(tmp_path, "--limit", 2)
    file, whole = folder / "base-reasoning.jsonl", (evaluated / "base-reasoning.jsonl").read_text()
    assert len(asked) == 2 and len(file.read_text().splitlines()) == 2
    evaluate(tmp_path)
    assert len(asked) == len(set(asked)) == 5 and file.read_text() == whole
    lines = whole.splitlines(keepends=True)
    for cut, missing in ("".join(lines[:2]) + lines[2][:40], 3), (lines[4][:-1], 4), ("", 5), (whole, 0):
        asked.clear()
        file.write_text(cut)
        evaluate(tmp_path)
        assert len(asked) == missing and file.read_text() == whole
    file.write_text("".join(lines[:2]))  # another process of a killed run had got further
    (folder / "base-reasoning.rank1.jsonl").write_text("".join(lines[1:4]) + lines[4][:9])
    capsys.readouterr(), asked.clear()
    evaluate(tmp_path)
    assert len(asked) == 1 and file.read_text() == whole and "cut off" in capsys.readouterr().err
    assert [path.name for path in folder.glob("*.jsonl")] == ["base-reasoning.jsonl"]
    for broken in "{\n", "12\n", "{}\n":
        file.write_text(lines[0] + broken + lines[1])
        with stops("line 2", "base-reasoning.jsonl"):
            evaluate(tmp_path)
        assert file.read_text() == lines[0] + broken + lines[1]


def test_a_killed_run_loses_no_answer(evaluate, evaluated, tmp_path, monkeypatch):
    for kill_after in 1, 3, 7:
        with monkeypatch.context() as patch:
            def append(path, records, left=[kill_after], write=eval_cvbench.append_jsonl):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                write(path, records)
            patch.setattr(eval_cvbench, "append_jsonl", append)
            with pytest.raises(KeyboardInterrupt):
                evaluate(tmp_path / str(kill_after), "--modes", "all")
        folder = next((tmp_path / str(kill_after)).glob("*/*"))
        kept = sum(len(path.read_text().splitlines()) for path in folder.glob("*.jsonl"))
        evaluate(tmp_path / str(kill_after), "--modes", "all")
        assert kept == kill_after
        for name in "base-direct.jsonl", "base-reasoning.jsonl", "summary.json", "summary.md":
            same = [(path / name).read_text().replace(str(tmp_path), "") for path in (folder, evaluated)]
            assert same[0] == same[1]


def test_two_processes_give_the_results_of_one(evaluate, evaluated, tmp_path, monkeypatch):
    (tmp_path / "spy.py").write_text(f"""
import json, os, pathlib, sys
sys.path.insert(0, {str(Path(g.__file__).parent)!r})
import eval_cvbench
def spy(model, tokenizer, image_processor, todo, *rest, do=eval_cvbench.answer_questions):
    asked = {{mode: [q["id"] for q in questions] for mode, questions in todo.items()}}
    pathlib.Path({str(tmp_path)!r}, "asked" + os.environ["RANK"]).write_text(json.dumps(asked))
    return do(model, tokenizer, image_processor, todo, *rest)
eval_cvbench.answer_questions = spy
eval_cvbench.main()""")
    launch = [sys.executable, *"-m torch.distributed.run --nproc_per_node 2".split(), tmp_path / "spy.py"]
    monkeypatch.setattr(eval_cvbench, "main", lambda argv: subprocess.run(launch + argv, check=True))
    folder = evaluate(tmp_path, "--modes", "all")
    for rank, share in enumerate([[0, 2, 4], [1, 3]]):
        asked = json.loads((tmp_path / f"asked{rank}").read_text())
        assert asked == {"base-reasoning": share, "base-direct": share}
    assert {path.name for path in folder.iterdir()} == {path.name for path in evaluated.iterdir()}
    for name in "base-direct.jsonl", "base-reasoning.jsonl", "summary.json", "summary.md":
        assert (folder / name).read_text() == (evaluated / name).read_text()


@pytest.mark.parametrize("what, flags", [
    ("fingerprint", []), ("mode", []), ("question", []), ("prompt", []),
    ("max_new_tokens", ["--max_new_tokens", 5]), ("temperature", ["--temperature", 1])])
def test_answers_of_another_model_mode_or_setting_are_put_aside(what, flags, evaluate, evaluated, model_dir,
                                                                tmp_path, capsys):
    folder = tmp_path / evaluated.relative_to(evaluated.parents[1])
    shutil.copytree(evaluated, folder)
    file, other = folder / "base-reasoning.jsonl", model_dir
    if what == "fingerprint":  # one weight of a retrained model in the same folder
        other = str(tmp_path / "tiny")
        shutil.copytree(model_dir, other)
        weights = load_file(f"{other}/model.safetensors")
        weights["model.norm.weight"][3] += 1
        save_file(weights, f"{other}/model.safetensors", metadata={"format": "pt"})
        folder.parent.rename(tmp_path / eval_cvbench.slug(other))
        file = tmp_path / eval_cvbench.slug(other) / folder.name / file.name
    elif what == "mode":
        shutil.copy(folder / "base-direct.jsonl", file)
    elif what in ("question", "prompt"):
        file.write_text(json.dumps({**json.loads(file.read_text().splitlines()[0]), what: "another"}) + "\n")
    before = file.read_text()
    evaluate(tmp_path, *flags, model=other)
    said = capsys.readouterr().err
    assert "put aside as base-reasoning.old1.jsonl" in said and what in said
    assert file.with_name("base-reasoning.old1.jsonl").read_text() == before
    records, old = jsonl(file), jsonl(evaluated / file.name)
    assert [(r["id"], r["mode"]) for r in records] == [(i, "base-reasoning") for i in range(5)]
    assert (records == old) == (what in ("mode", "question", "prompt"))
    evaluate(tmp_path, *flags, model=other)  # the third start finds its own
    assert "put aside" not in capsys.readouterr().err


def test_regrading_needs_no_model(evaluate, evaluated, tmp_path, monkeypatch, capsys):
    folder = tmp_path / evaluated.relative_to(evaluated.parents[1])
    shutil.copytree(evaluated, folder)
    file = folder / "base-direct.jsonl"
    said = ["The answer is (B)", "<answer>4</answer>", "three", "<answer>A</answer> <answer>4.</answer>"]
    file.write_text("".join(json.dumps({**r, "completion": text, "correct": None, "chosen": "?"}) + "\n"
                            for r, text in zip(jsonl(file), said)))
    monkeypatch.setattr(eval_cvbench, "load_model", None)
    for flags, expected in ([], [True, True, False, True]), (["--strict"], [False, True, False, False]):
        evaluate(tmp_path, "--regrade", *flags)
        assert [r["correct"] for r in jsonl(file)] == expected
        summary = json.loads((folder / "summary.json").read_text())["base-direct"]
        assert summary["scores"]["total"]["value"] == 100 * sum(expected) / 4
        assert "base-direct, 1 questions not answered yet" in capsys.readouterr().out
    with stops("no kept answers"):
        evaluate(tmp_path / "new", "--regrade")
    before = file.read_text()
    shutil.copy(file, folder / "base-reasoning.jsonl")  # answers of one mode in the file of another
    evaluate(tmp_path, "--regrade")
    assert "put aside as base-reasoning.old1.jsonl" in capsys.readouterr().err
    assert (folder / "base-reasoning.old1.jsonl").read_text() == before
    assert jsonl(folder / "base-reasoning.jsonl") == []


def test_compare_takes_two_kept_files(evaluated, tmp_path, capsys):
    a, b = (str(evaluated / f"base-{mode}.jsonl") for mode in ("direct", "reasoning"))
    better = [{**r, "correct": r["id"] > 1} for r in jsonl(a, drop="-")]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in better[1:]))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({**r, "question": "?"}) + "\n" for r in better))
    eval_cvbench.main(["--compare", a, str(tmp_path / "b.jsonl")])
    printed = capsys.readouterr()
    line = next(line for line in printed.out.splitlines() if line.startswith("    total"))
    assert re.search(r"A +0.0 +B +75.0 +B - A \+75.0 .* p = 0.25", line), line
    assert "1 questions" in printed.err
    for other, word in (tmp_path / "c.jsonl", "same questions"), (tmp_path / "none", "does not exist"):
        with stops(word):
            eval_cvbench.main(["--compare", a, str(other)])


class Page(HTMLParser):
    """What a browser makes of a page: its tags, in and out, and its text."""
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], Counter(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        assert not any(value and value.startswith(("http", "//")) for _, value in attributes)

    def handle_startendtag(self, tag, attributes):
        self.tags[tag] += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_is_self_contained_and_shows_markup_as_text(cvbench, evaluated, tmp_path):
    questions = eval_cvbench.load_benchmark(str(cvbench))
    evil = "</pre></article><script>alert('x')</script><img src=x onerror=alert(1)> & <b>"
    kept = {mode: jsonl(evaluated / f"{mode}.jsonl", drop="-") for mode in ("base-direct", "base-reasoning")}
    for mode, records in kept.items():
        chosen = evil if mode == "base-direct" else None
        kept[mode] = [{**r, "completion": evil, "extracted": evil, "options": [*r["options"], evil],
                       "task": "Count <i>", "chosen": chosen} for r in records]
    eval_cvbench.write_report(tmp_path / "report.html", evil, kept, questions)
    page = Page((tmp_path / "report.html").read_text())
    assert page.open == [] and page.tags["article"] == page.tags["img"] == 10
    assert page.tags["script"] == 1 and not page.tags["b"] - 10 and not page.tags["i"]
    assert page.text.count(evil) >= 10 + 10 + 5 and "10 of 10" in page.text
    eval_cvbench.write_report(tmp_path / "small.html", "x", kept, questions, most=2)
    assert Page((tmp_path / "small.html").read_text()).tags["article"] == 4
    page = Page((evaluated / "report.html").read_text())
    assert page.open == [] and page.tags["svg"] == 2 and page.tags["table"] == 2


def test_evaluation_data_with_faults_stops(cvbench, evaluate, tmp_path):
    table = pq.read_table(cvbench / "test_2d.parquet")
    replace = lambda name, values: table.drop_columns([name]).append_column(name, values)
    pq.write_table(table.drop_columns(["prompt"]), tmp_path / "less.parquet")
    pq.write_table(replace("answer", pa.array(["(B)", "(D)", "(A)"])), tmp_path / "letter.parquet")
    pq.write_table(replace("answer", pa.array(["(B)", None, "(A)"])), tmp_path / "null.parquet")
    for name, word in {"less.parquet": "'prompt'", "letter.parquet": "row 1: '(D)' is none of 3",
                       "null.parquet": "row 1: None", "none": "no such"}.items():
        with stops(name, word):
            eval_cvbench.load_benchmark(str(tmp_path / name))
    for broken in NO_JPEG, HALF_A_JPEG:
        images = [{"bytes": broken if i == 1 else ONE, "path": None} for i in range(3)]
        pq.write_table(replace("image", pa.array(images)), tmp_path / "image.parquet")
        with stops("image.parquet, row 1", "image cannot be read"):
            evaluate(tmp_path / "results", "--data", tmp_path / "image.parquet", "--batch_size", 1)
    kept = next((tmp_path / "results").rglob("*.jsonl"))  # the answers before the half image
    assert len(jsonl(kept)) > 0
    for flags, words in {"--modes instruct-direct": "--modes instruct-direct, base-reasoning, base-direct",
                         "--temperature -1": "--temperature", "--top_p 0": "--top_p"}.items():
        with stops(*words.split(", ")):
            evaluate(tmp_path, *flags.split())


def test_counts_other_than_the_published_are_said(capsys):
    tasks = [(task, source) for task, source, n in (
        ("Count", "ADE20K", 633), ("Count", "COCO", 155), ("Relation", "COCO", 650), ("Depth", "Omni3D", 600),
        ("Distance", "Omni3D", 600)) for _ in range(n)]
    questions = [{"task": task, "source": source} for task, source in tasks]
    eval_cvbench.check_counts("whole", questions)
    assert capsys.readouterr().err == ""
    eval_cvbench.check_counts("less", questions[1:])
    assert capsys.readouterr().err == ("warning: less is not CV-Bench as published: it has 787 of Count, not "
                                       "788; 632 of ADE20K, not 633\n")


# ---- The toy world ---------------------------------------------------------------------------------------

def test_toy_scenes_are_new_and_answers_true():
    rng, seen, asked = random.Random(0), set(), Counter()
    scenes = [prepare_sat.draw_scene(rng, seen) for _ in range(300)]
    assert len(set(scenes)) == len(seen) == 300
    for scene in scenes:
        for question in filter(None, (prepare_sat.ask(scene, kind, rng) for kind in prepare_sat.TASKS)):
            asked[question.kind] += 1
            assert question.answer in question.options and len(set(question.options)) == len(question.options)
            words = re.findall(r"\w+", question.sat)
            named = sorted((t for t in scene if t.name in words), key=lambda t: words.index(t.name))
            if question.kind == "left or right":
                assert question.answer == ("left" if named[0].column < named[1].column else "right")
            if question.kind == "above or below":
                assert question.answer == ("above" if named[0].row < named[1].row else "below")
            if question.kind == "closer":
                nearest = min(named, key=lambda thing: ["near", "midway", "far"].index(thing.depth))
                assert nearest.name in question.answer
            if question.kind == "count":
                assert question.answer == str(len(named))
    assert all(asked[kind] > 30 for kind in prepare_sat.TASKS)
