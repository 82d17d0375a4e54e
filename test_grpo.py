"""The tests, in the order of grpo_vision.py: `pytest test_grpo.py`. Offline, on the CPU, a minute or two.

They write a small model of the published Qwen2-VL layout, and small files of SAT's and CV-Bench's layouts.
Where a check could pass by accident, the wrong way is computed as well and has to fail it.
"""
import os
import tempfile

SCRATCH = tempfile.TemporaryDirectory()  # before the imports below, which read these:
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=SCRATCH.name, CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="1",
                  TOKENIZERS_PARALLELISM="false")

import copy
import doctest
import io
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig, Qwen2Tokenizer,
                          Qwen2VLForConditionalGeneration)
from transformers.cache_utils import Cache

import eval_cvbench
import grpo_vision as g
import prepare_sat

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
            "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
            "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = ("{% if messages is string %}{{ messages }}{% else %}{% for content in messages %}"
                 "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
                 "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}")
UNUSED_ROWS = 20  # rows of the embedding that no token has


# ---- What the tests need ---------------------------------------------------------------------------------

def write_tokenizer(folder):
    """A byte-level BPE of Qwen's kind, a few hundred tokens, learnt from the prompt. -> ids of the specials"""
    bpe = Qwen2Tokenizer(vocab={"<|endoftext|>": 0}, merges=[], unk_token=None).backend_tokenizer
    texts = [g.BASE_PROMPT, g.build_question("Is the red square left or right?", ["left", "right", "no", "yes"]),
             " reasoning process here </think> <answer> answer here </answer>"] * 3
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=380, initial_alphabet=ByteLevel.alphabet(),
                                                       show_progress=False))
    learnt = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=learnt["vocab"], merges=[tuple(merge) for merge in learnt["merges"]],
                               unk_token=None, bos_token=None, eos_token=SPECIALS[0], pad_token=SPECIALS[0])
    tokenizer.add_tokens([AddedToken(special, special=True, normalized=False) for special in SPECIALS])
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIALS[1:]}, replace_extra_special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return dict(zip(SPECIALS, tokenizer.convert_tokens_to_ids(SPECIALS)))


def write_model(folder):
    """A model directory as published: bfloat16, the weights' names and the config's spelling of transformers 4, and
    a generation_config that would ruin sampling. Weights of std 0.2: with less, wrong positions hardly show."""
    folder.mkdir()
    ids = write_tokenizer(folder)
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": max(ids.values()) + 1 + UNUSED_ROWS, "tie_word_embeddings": True, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "max_position_embeddings": 2048, "torch_dtype": "bfloat16", "attention_dropout": 0.0, "use_cache": True,
        "use_sliding_window": False, "sliding_window": 2048, "max_window_layers": 2, "initializer_range": 0.02,
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|endoftext|>"],
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"], "transformers_version": "4.41.2",
        "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "in_chans": 3,
                          "mlp_ratio": 2, "model_type": "qwen2_vl", "patch_size": 14, "spatial_merge_size": 2,
                          "spatial_patch_size": 14, "temporal_patch_size": 2}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    model.bfloat16().save_pretrained(folder)
    published = lambda name: name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
    weights = {published(name): x for name, x in load_file(folder / "model.safetensors").items()}
    assert {name.split(".")[0] for name in weights} == {"model", "visual"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))  # the published spelling over the one just saved
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}))
    (folder / "generation_config.json").write_text(json.dumps({
        "do_sample": True, "temperature": 0.01, "top_p": 0.001, "top_k": 1, "repetition_penalty": 1.0,
        "bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "transformers_version": "4.37.0"}))


def picture(width, height, seed=0):
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


def encoded(image, format="JPEG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


SAT_SCHEMA = pa.schema([("image_bytes", pa.list_(pa.binary())), ("question", pa.string()),
                        ("answers", pa.list_(pa.string())), ("question_type", pa.string()),
                        ("correct_answer", pa.string())])
ONE, TWO = encoded(picture(84, 56)), encoded(picture(56, 112, seed=1))
SAT_ROWS = [  # image_bytes, question, answers, question_type, correct_answer
    ([ONE], "How many chairs?", ["3", "1", "2", "4", "5"], "other", "3"),
    ([ONE, TWO], "Did it move?", ["no, it would stay the same", "left by 26 degrees"], "action_consequence",
     "no, it would stay the same"),
    ([ONE[:len(ONE) // 2]], "Is the JPEG whole?", ["yes", "no"], "other", "no"),
    ([b"no JPEG at all"], "Is it a JPEG?", ["yes", "no"], "other", "no"),
    ([TWO], "Where is the lamp?", ["left", "right"], "other", "above"),
    ([TWO], "Is the lamp left or right?", ["left", "right"], "other", "right"),
]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tiny models are several times faster on one thread; main() takes what os.cpu_count says."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def prompts(model, processors):
    """One image, a larger one, two images, none; no two prompts equally long."""
    rows = [("Which? <think>", [(56, 84)]), ("Is it left of the other one? <think>", [(112, 84)]),
            ("Did it move at all?", [(56, 56), (84, 112)]), ("No picture. <think>", [])]
    found = [g.build_prompt(text, [picture(*size, seed=i) for size in sizes], *processors, model)
             for i, (text, sizes) in enumerate(rows)]
    assert len({p.input_ids.shape[1] for p in found}) == 4
    return found


ENDS = list(range(40, 80))  # many end tokens: completions of a random model get unequal lengths


@pytest.fixture(scope="session")
def rollout(model, prompts, suppressed):
    found = g.sample(model, prompts, 3, 9, 1.0, suppressed, ENDS, torch.Generator().manual_seed(3))
    lengths = found.completion_mask.sum(1)
    assert len(set(lengths.tolist())) > 3 and 0 < found.finished.sum() < 12  # ragged, some of them cut off
    return found


@pytest.fixture(scope="session")
def sat_data(tmp_path_factory):
    """SAT's rows as its own file has them, and what prepare_sat makes of them -> folder."""
    folder = tmp_path_factory.mktemp("sat")
    columns = [pa.array(column, field.type) for column, field in zip(zip(*SAT_ROWS), SAT_SCHEMA)]
    pq.write_table(pa.table(columns, SAT_SCHEMA), folder / "SAT_train.parquet")
    prepare_sat.prepare_sat(str(folder), parquet=str(folder / "SAT_train.parquet"), multi_image=True)
    return folder


def letters(completion, **_):
    """A reward that a random model can get: the share of small letters in what it wrote."""
    said = completion.removeprefix("<think>")
    return sum("a" <= c <= "z" for c in said) / max(1, len(said))


def train(model_dir, data, output_dir, *flags):
    g.main(["--preset", "sat", "--model_name_or_path", model_dir, "--data", str(data), "--output_dir",
            str(output_dir), "--max_steps", "3", "--save_steps", "1", "--prompts_per_step", "2", "--num_generations",
            "4", "--max_completion_length", "8", "--learning_rate", "1e-3", "--score_tokens", "20",
            "--rewards", "accuracy,format,letters", *flags])


def jsonl(path, drop="seconds/"):
    records = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith(drop)} for record in records]


def stops(capsys, *words):
    """A context in which the program must stop with one sentence that has these words."""
    class Stops:
        def __enter__(self):
            pass

        def __exit__(self, kind, error, traceback):
            assert kind is SystemExit, f"no SystemExit but {error!r}"
            assert isinstance(error.code, str) and error.code.startswith("error: ")  # printed; the exit code is 1
            assert "\n" not in error.code and all(word in error.code for word in words), error.code
            return True
    return Stops()


def alone(stock, prompt, completion_ids, suppressed, temperature=1.0):
    """The usual way: prompt and completion (C,) as one sequence through the stock model -> (C, V) log-probs."""
    stock.model.rope_deltas = None
    ids = torch.cat([prompt.input_ids, completion_ids[None]], 1)
    logits = stock(input_ids=ids, mm_token_type_ids=(ids == stock.config.image_token_id).int(),
                   pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw).logits
    logits = logits[0, prompt.input_ids.shape[1] - 1:-1] / temperature
    return logits.masked_fill(suppressed, -1e300).log_softmax(-1)


def rows_of(rollout, G):
    """-> row number, group number, completion ids without padding."""
    return [(i, i // G, ids[mask]) for i, (ids, mask) in enumerate(zip(rollout.completion_ids,
                                                                       rollout.completion_mask))]


def test_docstring_examples():
    assert doctest.testmod(g).failed == 0 and doctest.testmod(g).attempted > 5


# ---- Settings --------------------------------------------------------------------------------------------

def test_precedence_is_defaults_then_preset_then_command_line():
    assert g.parse_config([]).learning_rate == g.PRESETS["toy"]["learning_rate"] != g.Config.learning_rate
    assert g.parse_config(["--learning_rate", "0.5"]).learning_rate == 0.5
    assert g.parse_config(["--preset", "sat", "--max_steps", "100"]).max_steps == 100
    assert g.parse_config(["--max_steps=7", "--preset=sat"]).beta == g.Config.beta


def test_sat_preset_is_the_papers():
    cfg = g.parse_config(["--preset", "sat"])
    paper = dict(model_name_or_path="Qwen/Qwen2-VL-2B", data="data/sat", prompts_per_step=8, num_generations=8,
                 max_steps=1500, learning_rate=1e-6, max_grad_norm=1.0, temperature=1.0, max_completion_length=700,
                 max_prompt_length=1024, beta=0.04, max_pixels=401408, min_pixels=3136, save_steps=100,
                 num_iterations=1, rewards="accuracy,format")
    assert {name: getattr(cfg, name) for name in paper} == paper


@pytest.mark.parametrize("flags", [
    "--preset paper", "--learning_rat 1", "--rewards accuracy,style", "--num_generations 1", "--temperature 0",
    "--max_steps 0", "--prompts_per_step 0", "--score_tokens 0"])
def test_bad_settings_stop_with_one_sentence(flags, capsys):
    with stops(capsys, flags.split()[0].removeprefix("--").split("_")[0]):
        g.main(flags.split())


def test_help_and_wrong_types_have_exit_codes():
    for flags, code in (["--help"], 0), (["--max_steps", "many"], 2):
        with pytest.raises(SystemExit) as stop:
            g.parse_config(flags)
        assert stop.value.code == code


# ---- Step 1: the prompt ----------------------------------------------------------------------------------

def test_base_prompt_is_the_papers_verbatim():
    assert g.BASE_PROMPT == (
        "A conversation between User and Assistant. The user asks a question about the image, and the Assistant solves "
        "it. The assistant first thinks about the reasoning process in the mind and then provides the user with the "
        "answer.\nUser: {question} \nAssistant: Let me solve this step by step.\n<think>")
    assert eval_cvbench.DIRECT_PROMPT == (
        "A conversation between User and Assistant. The user asks a question about the image, and the Assistant solves "
        "it.\nUser: {question} \nAssistant: ")


@pytest.mark.parametrize("options, expected", [
    (["yes"], "yes"), (["left", "right"], "left or right"), (["1", "2", "3"], "1, 2 or 3"),
    (["no, it would stay the same", "yes"], "no, it would stay the same or yes")])
def test_question_has_the_papers_wording(options, expected):
    assert g.build_question("Where {is} it?", options) == (
        f"Answer in natural language. Where {{is}} it? Choose between the following options: {expected}")
    assert g.row_text(dict(question="Where {is} it?", options=options)).count("Where {is} it?") == 1


@pytest.mark.parametrize("sizes", [[], [(56, 56)], [(84, 140)], [(56, 84), (112, 56)]])
def test_prompt_has_one_pad_per_image_token_and_m_rope_positions(sizes, model, processors):
    tokenizer, image_processor = processors
    prompt = g.build_prompt("Which one?", [picture(*size) for size in sizes], *processors, model)
    tokens = [(width // 28) * (height // 28) for width, height in sizes]  # sizes are multiples of 28
    ids = prompt.input_ids[0].tolist()
    text = tokenizer("Which one?").input_ids
    start, pad, end = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])
    assert ids == [x for n in tokens for x in [start, *[pad] * n, end]] + text
    assert prompt.next_position == sum(2 + max(size) // 28 for size in sizes) + len(text)
    if sizes:
        assert len(prompt.pixel_values) == 4 * sum(tokens) == prompt.image_grid_thw.prod(-1).sum()


def test_pixel_limits_reach_the_image_processor(model_dir, model):
    count = lambda size, **limits: (g.build_prompt("", [picture(*size)], *g.load_processors(model_dir, **limits), model)
                                    .input_ids == model.config.image_token_id).sum().item()
    assert count((280, 280)) == 100 and count((280, 280), max_pixels=28 * 28 * 16) <= 16
    assert count((56, 56)) == 4 and count((56, 56), min_pixels=28 * 28 * 16) >= 16


def test_image_token_in_a_question_is_refused(model, processors, capsys):
    with stops(capsys, "<|image_pad|>"):
        g.build_prompt("Where is <|image_pad|>?", [picture(56, 56)], *processors, model)


# ---- Step 3: the rewards ---------------------------------------------------------------------------------

OPTIONS = ["right", "left", "no, it would stay the same", "15", "no"]


@pytest.mark.parametrize("completion, well_formed, right", [
    ("<think> hm </think> <answer> left </answer>", 1, 1),
    ("<think>\nhm\n\nhm\n</think>\n<answer>\nleft\n</answer>\n", 1, 1),
    ("<think></think><answer>(B)</answer>", 1, 1),
    ("<think> hm </think> <answer> right </answer>", 1, 0),
    ("<think> hm </think> <answer> ... </answer>", 1, 0),
    ("<think> reasoning process here </think> <answer> answer here </answer>", 1, 0),
    ("<think> hm </think> <answer> left </answer> <answer> left </answer>", 0, 0),
    ("<think> hm </think> <answer> left </answer> <answer> right </answer>", 0, 0),
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


@pytest.mark.parametrize("empty", ["", " ", "\n\n", ".", "()"])
def test_an_empty_answer_is_never_right(empty):
    for answer in OPTIONS:
        assert g.accuracy_reward(f"<think> x </think> <answer>{empty}</answer>", answer=answer, options=OPTIONS) == 0


@pytest.mark.parametrize("text, strict, expected", [
    ("<think> x </think> <answer> a\nb </answer>", True, "a\nb"), ("<answer>1</answer> <answer>2</answer>", True, None),
    ("<answer>1</answer> <answer>2</answer>", False, "2"), ("<answer> </answer>", True, None),
    ("<answer>left", True, None), ("it is 2", True, None), (" it is 2\n", False, "it is 2"), ("", False, None)])
def test_extract_answer(text, strict, expected):
    assert g.extract_answer(text, strict) == expected


@pytest.mark.parametrize("answer, solution, right", [
    ("left", "left", 1), (" LEFT.\n", "Left", 1), ("leftmost", "left", 0), ("right", "left", 0), ("le ft", "left", 0),
    ("b", "left", 1), ("(b)", "left", 1), ("B.", "left", 1), ("(B).", "left", 1), ("a", "left", 0), ("A", "right", 1),
    ("c.", OPTIONS[2], 1), ("f", "left", 0), ("z", "no", 0), ("bb", "left", 0),
    ("5", "15", 0), ("15", "15", 1), ("115", "15", 0), ("1 5", "15", 0),
    ("no", OPTIONS[2], 0), (OPTIONS[2], "no", 0), ("No,  it would stay\nthe same.", OPTIONS[2], 1),
    ("a chair", "right", 0), ("left or right", "left", 0), ("...", "left", 0), (None, "left", 0)])
def test_grade(answer, solution, right):
    assert g.grade(answer, solution, OPTIONS) == right
    assert g.grade(answer, solution, OPTIONS, strict=False) >= right


@pytest.mark.parametrize("answer, solution, right", [
    ("So it is left.", "left", 1), ("So it is left.", "right", 0), ("Either left or right.", "left", 0),
    ("The answer is (B).", "left", 1), ("(b) left", "left", 1), ("(b) right", "left", 0), ("It is (z)", "left", 0),
    ("It is a thing on the left", "left", 1), ("It is a thing", "right", 0), ("leftmost", "left", 0),
    ("there are 5", "15", 0), ("there are 15.", "15", 1), ("it is 1.15 m", "15", 0), ("it is 15.5 m", "15", 0),
    ("I say: No, it would stay the same.", OPTIONS[2], 1), ("I say: No, it would stay the same.", "no", 0),
    ("I say no.", "no", 1), ("nothing", "no", 0)])
def test_grade_of_a_sentence_in_evaluation(answer, solution, right):
    assert g.grade(answer, solution, OPTIONS, strict=False) == right
    assert not g.grade(answer, solution, OPTIONS, strict=True)


@pytest.mark.parametrize("text", ["(", "\\", "((((", "[a-z", "\0", "²", "<think>" * 500, "<answer>" * 500, "</answer><answer>",
                                  "</think><answer>" * 300, "(a)" * 300, "é" * 500])
def test_no_text_breaks_the_rewards(text):
    for options in OPTIONS, ["(", "\\", "[a-z"], [str(i) for i in range(40)]:
        for completion in text, f"<think>{text}</think><answer>{text}</answer>":
            assert g.format_reward(completion) in (0, 1)
            assert g.accuracy_reward(completion, answer=options[0], options=options) in (0, 1)
            assert g.grade(g.extract_answer(completion, False), options[0], options, strict=False) in (0, 1)


def test_completion_text_puts_think_back_once_and_drops_end_tokens(processors):
    tokenizer = processors[0]
    said = " left , right . It 's  two\n</think> <answer> left </answer>"
    prompt = g.row_text(dict(question="Where?", options=OPTIONS))
    for end in "", "<|im_end|>", "<|endoftext|>", "<|endoftext|><|endoftext|>":
        text = g.completion_text(prompt, torch.tensor(tokenizer(said + end).input_ids), tokenizer)
        assert text == "<think>" + said
        assert g.format_reward(text) == g.accuracy_reward(text, answer="left", options=OPTIONS) == 1
    assert g.completion_text(eval_cvbench.DIRECT_PROMPT, tokenizer(said).input_ids, tokenizer) == said


# ---- Step 4: the advantages ------------------------------------------------------------------------------

def test_group_advantages_by_hand():
    rewards = torch.tensor([0., 0., 1., 1.,  2., 1., 1., 0.,  1., 1., 1., 1.], dtype=torch.float64)
    s, t = math.sqrt(1 / 3), math.sqrt(2 / 3)  # unbiased: divided by G - 1 = 3
    expected = [-.5 / (s + 1e-4)] * 2 + [.5 / (s + 1e-4)] * 2 + [1 / (t + 1e-4), 0, 0, -1 / (t + 1e-4)] + [0] * 4
    assert g.group_advantages(rewards, 4).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1.1, 1e6 + 0.1])
@pytest.mark.parametrize("G", [2, 3, 7, 8])
def test_a_group_without_spread_gets_exactly_zero(value, G):
    assert (g.group_advantages(torch.full((3 * G,), value), G) == 0).all()


# ---- Steps 2 and 5: encode once, branch G times ----------------------------------------------------------

def test_patch_embedding_as_matmul_is_the_convolution_and_copies_use_their_own_weights(model, stock):
    pixels = torch.randn(8, 1176, dtype=torch.float64)
    ours, theirs = model.model.visual.patch_embed, stock.model.visual.patch_embed
    torch.testing.assert_close(ours(pixels), theirs(pixels), rtol=0, atol=1e-12)
    twin = copy.deepcopy(ours)
    twin.proj.weight.data.zero_()
    assert (twin(pixels) == 0).all() and (ours(pixels) != 0).any()


def test_score_equals_full_sequences_of_the_stock_model(model, stock, prompts, rollout, suppressed, monkeypatch):
    policy, cfg = g.Policy(model, 0.7, suppressed), g.Config(num_generations=3, score_tokens=14)
    assert [len(list(g.group_chunks(rollout, group, cfg))) for group in range(4)] != [1] * 4
    logps = g.score_rollout(policy, prompts, rollout, cfg)
    assert (logps[~rollout.completion_mask] == 0).all()
    monkeypatch.setattr(g.Prompt, "next_position", property(lambda prompt: prompt.input_ids.shape[1]))
    shifted = g.score_rollout(policy, prompts, rollout, cfg)
    monkeypatch.undo()
    for i, group, ids in rows_of(rollout, 3):
        with torch.no_grad():
            expected = alone(stock, prompts[group], ids, suppressed, 0.7)
            _, entropy = policy(prompts[group], policy(prompts[group]), ids[None], torch.ones(1, len(ids)).bool())
        chosen = expected.gather(-1, ids[:, None])[:, 0]
        assert (logps[i, :len(ids)] - chosen).abs().max() < 1e-9
        assert (entropy[0] + (expected.exp() * expected).sum(-1)).abs().max() < 1e-9
        if prompts[group].pixel_values is not None:  # the control: positions that go on at P are wrong
            assert (shifted[i, :len(ids)] - chosen).abs().max() > 1e-3


def test_completions_that_see_one_another_would_be_found_out(model, prompts, rollout, suppressed):
    """The control of the test above: completion 1 behind completion 0 in one cache, at the right positions."""
    policy, prompt, ids = g.Policy(model, 1.0, suppressed), prompts[0], rollout.completion_ids[:2]
    inputs = torch.cat([prompt.input_ids[:, -1:].expand(2, 1), ids[:, :-1]], 1)
    positions = (torch.arange(ids.shape[1]) + prompt.next_position - 1).expand(3, 1, -1)
    with torch.no_grad():
        prompt_kv = policy(prompt)
        right = policy(prompt, prompt_kv, ids, torch.ones_like(ids).bool())[0][1]
        cache = Cache(layers=[g.BranchLayer(*kv) for kv in prompt_kv])
        for one in inputs:
            hidden = model.model(input_ids=one[None], position_ids=positions, past_key_values=cache)[0]
        leaky = g.token_logps(model, hidden[0], 1.0, suppressed).gather(-1, ids[1][:, None])[:, 0]
    assert (leaky - right).abs().max() > 0.01


def test_the_image_matters(model, prompts, rollout, suppressed):
    policy, cfg = g.Policy(model, 1.0, suppressed), g.Config(num_generations=3)
    other = [copy.copy(prompt) for prompt in prompts]
    other[1].pixel_values = other[1].pixel_values.flip(0)
    change = (g.score_rollout(policy, other, rollout, cfg) - g.score_rollout(policy, prompts, rollout, cfg)).abs().amax(1)
    assert (change[3:6] > 1e-3).all() and (change[:3] == 0).all() and (change[6:] == 0).all()


def test_the_vision_tower_runs_once_per_group_in_each_pass(model, prompts, rollout, suppressed):
    model, calls = copy.deepcopy(model), []
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    policy, cfg = g.Policy(model, 1.0, suppressed), g.Config(num_generations=3, score_tokens=9, beta=0.0)
    for run in (lambda: g.sample(model, prompts, 3, 4, 1.0, suppressed, ENDS),
                lambda: g.score_rollout(policy, prompts, rollout, cfg),
                lambda: g.update(policy, prompts, rollout, torch.ones(12), None, None, cfg)):
        calls.clear()
        run()
        assert len(calls) == 3  # prompts with images, whatever G and the number of chunks


def suppress_only(size, *ids):
    return torch.zeros(size, dtype=torch.bool).index_fill(0, torch.tensor(ids), True)


def test_suppressed_are_vision_tokens_and_unused_rows(model, processors, suppressed):
    tokenizer = processors[0]
    vision = tokenizer.convert_tokens_to_ids([s for s in SPECIALS if "vision" in s or s.endswith("_pad|>")])
    assert len(vision) == 5 and len(suppressed) - len(tokenizer) == UNUSED_ROWS
    assert torch.equal(suppressed, suppress_only(len(suppressed), *vision, *range(len(tokenizer), len(suppressed))))
    assert g.end_tokens(tokenizer) == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])


def test_greedy_decoding_of_many_is_that_of_each_alone_and_of_transformers(model, stock, prompts, suppressed):
    greedy = lambda some: g.sample(model, some, 1, 12, 0, suppressed, ENDS)
    together = greedy(prompts)
    assert len(set(together.completion_mask.sum(1).tolist())) > 1
    for (_, group, ids), prompt in zip(rows_of(together, 1), prompts):
        one = greedy([prompt])
        assert ids.tolist() == one.completion_ids[0].tolist() and together.finished[group] == one.finished[0]
        stock.model.rope_deltas = None
        theirs = stock.generate(
            input_ids=prompt.input_ids, mm_token_type_ids=(prompt.input_ids == stock.config.image_token_id).int(),
            pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw, do_sample=False, max_new_tokens=12,
            suppress_tokens=suppressed.nonzero()[:, 0].tolist(), eos_token_id=ENDS, pad_token_id=ENDS[0])
        assert ids.tolist() == theirs[0, prompt.input_ids.shape[1]:].tolist()


def test_recorded_logps_are_the_scored_ones(model, prompts, suppressed):
    for temperature in 1.0, 1.7:
        rollout = g.sample(model, prompts, 3, 9, temperature, suppressed, ENDS, torch.Generator().manual_seed(0))
        scored = g.score_rollout(g.Policy(model, temperature, suppressed), prompts, rollout, g.Config(num_generations=3))
        other = g.score_rollout(g.Policy(model, 1.3, suppressed), prompts, rollout, g.Config(num_generations=3))
        gap = lambda logps: ((rollout.sampling_logps - logps) * rollout.completion_mask).abs().max()
        assert gap(scored) < 1e-9 and gap(other) > 0.01


def test_rows_end_with_their_end_token_or_are_flagged(rollout):
    for i, _, ids in rows_of(rollout, 3):
        ended = [token in ENDS for token in ids.tolist()]
        assert not any(ended[:-1]) and ended[-1] == rollout.finished[i]
        assert rollout.finished[i] or len(ids) == 9
        assert (rollout.completion_ids[i, len(ids):] == ENDS[0]).all()
    assert rollout.completion_mask.dtype == rollout.finished.dtype == torch.bool


def test_sampling_is_seeded_and_ignores_the_models_generation_config(model, prompts, rollout, suppressed):
    draw = lambda model, seed: g.sample(model, prompts, 3, 9, 1.0, suppressed, ENDS, torch.Generator().manual_seed(seed))
    plain = copy.deepcopy(model)
    plain.generation_config = GenerationConfig()
    assert model.generation_config.top_k == 1  # the trap is in the file
    assert torch.equal(draw(plain, 3).completion_ids, rollout.completion_ids)
    assert not torch.equal(draw(model, 4).completion_ids, rollout.completion_ids)
    assert len({tuple(ids) for ids in rollout.completion_ids.tolist()}) == 12


def test_tokens_are_drawn_from_the_models_distribution(model, stock, prompts, suppressed):
    N, prompt = 6000, prompts[0]
    drawn = g.sample(model, [prompt], N, 1, 2.0, suppressed, [0], torch.Generator().manual_seed(0)).completion_ids
    counts = torch.bincount(drawn[:, 0], minlength=len(suppressed))

    def chi_square(temperature):
        """How far the counts are from the distribution: about 0 if they follow it, in standard deviations."""
        with torch.no_grad():
            p = alone(stock, prompt, torch.tensor([0]), suppressed, temperature)[0].exp()
        big = p * N > 5
        expected = torch.cat([p[big], p[~big].sum()[None]]) * N
        found = torch.cat([counts[big], counts[~big].sum()[None]])
        df = len(expected) - 1
        assert df > 20
        return (((found - expected) ** 2 / expected).sum() - df) / math.sqrt(2 * df)

    assert counts[suppressed].sum() == 0
    assert abs(chi_square(2.0)) < 4 and chi_square(1.5) > 20


# ---- Step 6: the loss and the update ---------------------------------------------------------------------

def test_grpo_loss_by_hand():
    ratio = torch.tensor([[1, 1.5, 0.5], [1.5, 0.5, 9], [2, 9, 9], [1, 1, 1]], dtype=torch.float64)  # 9: masked
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    A = torch.tensor([1., -1, 2, 0], dtype=torch.float64)
    logps = torch.full((4, 3), -2.0, dtype=torch.float64)
    ref = logps.clone()
    ref[3, 0] += math.log(2)
    loss, kl, clipped = g.grpo_loss(logps, logps - ratio.log(), ref, A, mask, 4, 0.2, None, 0.1)
    rows = [-(1 + 1.2 + 0.5) / 3, -(-1.5 - 0.8) / 2, -2.4 / 1, 0.1 * (2 - math.log(2) - 1) / 3]
    assert loss.item() == pytest.approx(sum(rows) / 4, abs=1e-12)
    assert kl[3, 0].item() == pytest.approx(1 - math.log(2)) and kl.sum() == kl[3, 0]
    assert (clipped & mask).nonzero().tolist() == [[0, 1], [1, 1], [2, 0]]
    higher = g.grpo_loss(logps, logps - ratio.log(), ref, A, mask, 4, 0.2, 0.6, 0.1)  # 1.5 is within 1.6, 2 is not
    assert higher[0].item() == pytest.approx((sum(rows) - 0.3 / 3 - (3.2 - 2.4)) / 4, abs=1e-12)
    assert (higher[2] & mask).nonzero().tolist() == [[1, 1], [2, 0]]


@pytest.mark.parametrize("epsilon, epsilon_high, beta", [(0.2, None, 0.0), (0.2, 0.28, 0.04), (0.05, 0.4, 1.0)])
def test_grpo_loss_is_the_formula_and_adds_up_over_chunks(epsilon, epsilon_high, beta):
    torch.manual_seed(0)
    R, C = 6, 5
    logps, old, ref = -2 + 0.4 * torch.randn(3, R, C, dtype=torch.float64)
    A, lengths = torch.randn(R, dtype=torch.float64), [5, 1, 3, 5, 2, 4]
    mask = torch.arange(C) < torch.tensor(lengths)[:, None]
    total, acted = 0.0, []
    for i in range(R):
        for t in range(lengths[i]):
            ratio = math.exp(logps[i, t] - old[i, t])
            inside = max(1 - epsilon, min(1 + (epsilon_high or epsilon), ratio))
            kl = math.exp(ref[i, t] - logps[i, t]) - (ref[i, t] - logps[i, t]) - 1
            total += (-min(ratio * A[i], inside * A[i]) + beta * kl) / lengths[i] / R
            acted.append(inside * A[i] < ratio * A[i])
    call = lambda rows: g.grpo_loss(logps[rows], old[rows], ref[rows] if beta else None, A[rows], mask[rows], R,
                                    epsilon, epsilon_high, beta)
    loss, _, clipped = call(torch.arange(R))
    assert loss.item() == pytest.approx(float(total), abs=1e-12)
    assert (clipped & mask).sum() == sum(acted) and 0 < sum(acted) < mask.sum()
    assert sum(call(torch.tensor(rows))[0].item() for rows in ([4, 1], [0], [2, 3, 5])) == pytest.approx(loss.item())


def update_and_grads(model, suppressed, prompts, rollout, advantages, ref, old, cfg):
    policy = g.Policy(copy.deepcopy(model), 1.0, suppressed)
    logps, sums = g.update(policy, prompts, rollout, advantages, ref, old, cfg)
    return logps, sums, {name: p.grad for name, p in policy.model.named_parameters()}


def test_two_stage_backward_equals_plain_autograd_on_every_parameter(model, stock, prompts, rollout, suppressed):
    cfg = g.Config(num_generations=3, score_tokens=14, beta=0.3, epsilon=0.2, epsilon_high=0.28)
    noise = torch.randn(2, *rollout.completion_ids.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    old, ref = rollout.sampling_logps + 0.3 * noise  # a policy that has moved since, and a reference
    advantages = torch.linspace(-2, 3, 12, dtype=torch.float64)
    logps, sums, grads = update_and_grads(model, suppressed, prompts, rollout, advantages, ref, old, cfg)
    usual, loss, entropy = copy.deepcopy(stock), 0.0, 0.0
    for i, group, ids in rows_of(rollout, 3):
        distribution, C = alone(usual, prompts[group], ids, suppressed), len(ids)
        row = distribution.gather(-1, ids[:, None])[:, 0]
        assert (logps[i, :C] - row).abs().max() < 1e-9
        ratio, A, log_ratio = (row - old[i, :C]).exp(), advantages[i], ref[i, :C] - row
        surrogate = torch.minimum(ratio * A, ratio.clamp(0.8, 1.28) * A)
        loss = loss + (-surrogate + 0.3 * (log_ratio.exp() - log_ratio - 1)).mean() / 12
        entropy -= (distribution.exp() * distribution).sum().item()
    loss.backward()
    assert 0 < sums["clip"] < rollout.completion_mask.sum()
    assert sums["loss"] == pytest.approx(loss.item(), abs=1e-9) and sums["entropy"] == pytest.approx(entropy)
    expected = {name: p.grad for name, p in usual.named_parameters()}
    assert expected.keys() == grads.keys() and any("visual" in name for name in grads)
    errors = {name: ((grads[name] - x).norm() / x.norm()).item() for name, x in expected.items()}
    assert all(x.norm() > 1e-6 for x in expected.values())
    assert max(errors.values()) < 1e-6, max(errors, key=errors.get)
    # the controls: the first stage alone leaves the image tower without gradient; other chunks change nothing
    _, _, whole = update_and_grads(model, suppressed, prompts, rollout, advantages, ref, old,
                                   g.Config(num_generations=3, beta=0.3, epsilon=0.2, epsilon_high=0.2))
    assert max((whole[name] - x).norm() / x.norm() for name, x in expected.items()) > 1e-4  # epsilon_high counts


def test_first_iteration_prints_zero_and_still_learns(model, prompts, rollout, suppressed):
    cfg = g.Config(num_generations=3, beta=0.0)
    rewards = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, sums, grads = update_and_grads(model, suppressed, prompts, rollout, g.group_advantages(rewards, 3), None, None, cfg)
    assert abs(sums["loss"]) < 1e-12 and sums["clip"] == sums["kl"] == 0
    assert all(x.norm() > 1e-6 for x in grads.values())
    _, _, grads = update_and_grads(model, suppressed, prompts, rollout, torch.zeros(12), None, None, cfg)
    assert all((x == 0).all() for x in grads.values())


def test_chunks_hold_every_row_once_within_the_budget():
    rng = random.Random(0)
    for _ in range(200):
        lengths, budget = [rng.randint(1, 30) for _ in range(rng.randint(1, 16))], rng.randint(1, 90)
        found = g.chunks(lengths, budget)
        assert sorted(row for chunk in found for row in chunk) == list(range(len(lengths)))
        assert all(len(chunk) == 1 or len(chunk) * max(lengths[i] for i in chunk) <= budget for chunk in found)
    assert len(g.chunks([3] * 8, 12)) == 2


# ---- Around the algorithm --------------------------------------------------------------------------------

def test_draw_walks_through_seeded_permutations():
    rows = [3, 1, 4, 15, 9, 2, 6]
    walk = g.draw(rows, 0, 0, 35)
    epochs = [walk[i:i + 7] for i in range(0, 35, 7)]
    assert all(sorted(epoch) == sorted(rows) for epoch in epochs) and len({tuple(e) for e in epochs}) > 1
    assert walk == g.draw(rows, 0, 0, 35) != g.draw(rows, 1, 0, 35)
    for size in 1, 2, 5, 10, 16:  # a step may cross epochs, and be larger than one
        assert [x for first in range(0, 35, size) for x in g.draw(rows, 0, first, min(size, 35 - first))] == walk
    assert g.draw(rows, 0, 8, 2) + g.draw(rows, 0, 10, 2) == g.draw(rows, 0, 8, 4)  # two ranks share a step


def test_seeds_are_of_their_key_alone():
    keys = [(seed, what, step, rank) for seed in (0, 1) for what in ("sample", "epoch") for step in (0, 1, 11)
            for rank in (0, 1)]
    assert len({g.seeded(*key).getrandbits(63) for key in keys}) == len(keys)
    assert g.seeded(0, "sample", 1, 11).random() == g.seeded(0, "sample", 1, 11).random()


def test_output_dir_takes_the_next_free_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for expected in "runs/toy", "runs/toy-2", "runs/toy-3":
        found = g.choose_output_dir(g.parse_config([]))
        assert found == Path(expected)
        found.mkdir(parents=True)
    with stops(capsys, "runs/toy", "--resume", "--overwrite"):
        g.choose_output_dir(g.parse_config(["--output_dir", "runs/toy"]))
    assert g.choose_output_dir(g.parse_config(["--output_dir", "runs/toy", "--resume"])).exists()
    assert not g.choose_output_dir(g.parse_config(["--output_dir", "runs/toy", "--overwrite"])).exists()


def test_weights_load_as_float32_and_whole(model_dir, tmp_path, capsys):
    assert {p.dtype for p in g.load_model(model_dir).parameters()} == {torch.float32}
    shutil.copytree(model_dir, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "visual.patch_embed.proj.weight"},
              tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with stops(capsys, "patch_embed"):
        g.load_model(str(tmp_path / "model"))


# ---- Preparation -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("multi_image, kept", [(False, [0, 5]), (True, [0, 1, 5])])
def test_sat_rows_are_kept_or_skipped_for_a_reason(multi_image, kept, sat_data, tmp_path, capsys):
    prepare_sat.prepare_sat(str(tmp_path), parquet=str(sat_data / "SAT_train.parquet"), multi_image=multi_image)
    printed = {reason: int(n) for n, reason in re.findall(r"^ *(\d+) (.+)$", capsys.readouterr().out, re.MULTILINE)}
    reason = lambda word: sum(n for text, n in printed.items() if word in text)
    assert (reason("kept"), reason("broken"), reason("not among")) == (len(kept), 2, 1)
    assert reason("several images") == 3 - len(kept) and sum(printed.values()) == len(SAT_ROWS)
    rows = datasets.Dataset.from_parquet(str(tmp_path / "train.parquet"))
    assert set(rows.column_names) == {"images", "question", "options", "answer", "question_type", "source_row"}
    assert rows["source_row"][:] == kept
    for row in rows:
        images, question, options, kind, answer = SAT_ROWS[row["source_row"]]
        assert (row["question"], row["answer"], row["question_type"]) == (question, answer, kind)
        assert sorted(row["options"]) == sorted(options) and len(row["images"]) == len(images)


def test_sat_options_are_shuffled_with_a_seed():
    row = dict(zip(SAT_SCHEMA.names, SAT_ROWS[0]))
    places = lambda seed: [kept["options"].index("3") for kept in prepare_sat.convert([row] * 100, 100, seed=seed)]
    assert places(0) == places(0) != places(1)
    assert min(Counter(places(0))[i] for i in range(5)) > 5


def test_sat_limit_counts_kept_rows():
    rows = [dict(zip(SAT_SCHEMA.names, row)) for row in SAT_ROWS] * 3
    assert len(list(prepare_sat.convert(rows, 3))) == 3


# ---- The main loop ---------------------------------------------------------------------------------------

def logits_of(model, prompt):
    with torch.no_grad():
        return model(input_ids=prompt.input_ids, position_ids=prompt.position_ids, pixel_values=prompt.pixel_values,
                     mm_token_type_ids=(prompt.input_ids == model.config.image_token_id).int(),
                     image_grid_thw=prompt.image_grid_thw).logits


@pytest.fixture(scope="session")
def trained(model_dir, sat_data, prompts, tmp_path_factory):
    """A run of three steps of --preset sat -> its folder, and the logits that each model had when it was saved."""
    folder, at_save = tmp_path_factory.mktemp("runs") / "sat", {}

    def save_model(path, model, *rest, save=g.save_model, **more):
        at_save[path.name] = logits_of(model, prompts[2])
        save(path, model, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        patch.setattr(g, "save_model", save_model)
        patch.setitem(g.REWARDS, "letters", letters)
        train(model_dir, sat_data, folder)
    return folder, at_save


@pytest.fixture
def with_letters(monkeypatch):
    monkeypatch.setitem(g.REWARDS, "letters", letters)


def test_a_run_leaves_its_files_and_logs_every_metric(trained):
    folder, _ = trained
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "completions.jsonl", "checkpoint-1", "checkpoint-2", "checkpoint-3",
                     "final"}
    config = json.loads((folder / "config.json").read_text())
    assert config["preset"] == "sat" and config["max_steps"] == 3 and config["max_pixels"] == 401408
    metrics = jsonl(folder / "metrics.jsonl", drop="no key")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert [m["learning_rate"] for m in metrics] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])  # linear, to 0
    for m in metrics:
        assert set("""step loss reward reward_std rewards/accuracy rewards/format completions/mean_length
            completions/clipped_ratio frac_reward_zero_std kl entropy clip_ratio grad_norm learning_rate sampler_mismatch
            seconds/rollout seconds/reference seconds/update""".split()) <= m.keys()
        assert all(math.isfinite(value) for value in m.values())
        assert 0 < m["sampler_mismatch"] < 1e-4 or m["sampler_mismatch"] == 0
        assert m["clip_ratio"] == 0 and m["grad_norm"] > 0
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[2]["kl"] > 1e-6
    assert metrics[2]["loss"] == pytest.approx(0.04 * metrics[2]["kl"], rel=0.5)  # the policy term prints as 0


def test_every_completion_is_logged_with_its_rewards(trained, sat_data):
    rows = datasets.Dataset.from_parquet(str(sat_data / "train.parquet"))
    metrics, samples = (jsonl(trained[0] / f"{name}.jsonl") for name in ("metrics", "completions"))
    assert len(samples) == 3 * 2 * 4
    for step, m in enumerate(metrics, 1):
        mine = [s for s in samples if s["step"] == step]
        assert m["reward"] == pytest.approx(sum(s["reward"] for s in mine) / 8)
        assert m["completions/mean_length"] == pytest.approx(sum(s["length"] for s in mine) / 8)
        expected = g.group_advantages(torch.tensor([s["reward"] for s in mine]), 4)
        assert [s["advantage"] for s in mine] == pytest.approx(expected.tolist(), abs=1e-3)
    for s in samples:
        row = rows[s["row"]]
        assert s["prompt"] == g.row_text(row) and s["answer"] == row["answer"]
        assert s["completion"].startswith("<think>") and not s["completion"].endswith("<|endoftext|>")
        assert s["rewards/letters"] == pytest.approx(letters(s["completion"]))
        assert s["reward"] == pytest.approx(s["rewards/accuracy"] + s["rewards/format"] + s["rewards/letters"])
    assert {len(rows[s["row"]]["images"]) for s in samples} == {1, 2}


@pytest.mark.parametrize("name", ["checkpoint-1", "checkpoint-3", "final"])
def test_checkpoints_reload_with_identical_logits(name, trained, prompts, processors):
    folder, at_save = trained
    again = Qwen2VLForConditionalGeneration.from_pretrained(folder / name).eval()
    g.patch_embed_as_matmul(again)  # the same bits need the same operation
    assert again.dtype == torch.float32 and torch.equal(logits_of(again, prompts[2]), at_save[name])
    tokenizer, image_processor = AutoTokenizer.from_pretrained(folder / name), AutoImageProcessor.from_pretrained(
        folder / name, backend="pil")
    assert tokenizer.chat_template == CHAT_TEMPLATE and tokenizer("<think> hm").input_ids == processors[0](
        "<think> hm").input_ids
    assert image_processor.size["longest_edge"] == 401408
    assert json.loads((folder / name / "generation_config.json").read_text())["eos_token_id"]
    assert (folder / name / "model.safetensors").exists() and (name == "final") != (folder / name / "state").exists()


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def same_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_resume_continues_bit_for_bit(trained, model_dir, sat_data, tmp_path, with_letters):
    folder, again = trained[0], tmp_path / "again"
    shutil.copytree(folder, again)
    for name in "checkpoint-2", "checkpoint-3", "final":
        shutil.rmtree(again / name)
    (again / "checkpoint-9.tmp").mkdir()  # what a run killed while saving leaves
    train(model_dir, sat_data, again, "--resume")
    assert same_weights(again / "final", folder / "final") and not same_weights(again / "final", folder / "checkpoint-1")
    assert jsonl(again / "metrics.jsonl") == jsonl(folder / "metrics.jsonl")
    assert jsonl(again / "completions.jsonl") == jsonl(folder / "completions.jsonl")


def test_beta_0_loads_no_reference_and_several_iterations_clip(model_dir, sat_data, tmp_path, monkeypatch, with_letters):
    loaded, rollouts = [], []
    for name, log in ("load_model", loaded), ("sample", rollouts):
        monkeypatch.setattr(g, name, lambda *args, log=log, do=getattr(g, name), **more: log.append(1) or do(*args, **more))
    monkeypatch.chdir(tmp_path)
    train(model_dir, sat_data, tmp_path / "a", "--beta", "0", "--max_steps", "2", "--num_iterations", "3",
          "--learning_rate", "1e-2", "--epsilon", "0.05")
    assert len(loaded) == 1 and len(rollouts) == 2
    metrics = jsonl(tmp_path / "a/metrics.jsonl")
    assert all(m["kl"] == 0 and m["clip_ratio"] > 0 and m["sampler_mismatch"] < 1e-4 for m in metrics)
    loaded.clear()
    train(model_dir, sat_data, tmp_path / "b", "--beta", "0.1", "--max_steps", "1")
    assert len(loaded) == 2


def test_threads_do_not_depend_on_the_launcher(monkeypatch, model_dir, tmp_path, capsys):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    for processes, expected in ("1", 6), ("4", 1), (None, 6):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False) if processes is None else monkeypatch.setenv(
            "LOCAL_WORLD_SIZE", processes)
        with stops(capsys):
            train(model_dir, tmp_path / "nowhere", tmp_path / "run", "--rewards", "format")
        assert threads.pop() == expected


def test_python_and_accelerate_launch_give_the_same_bits(model_dir, sat_data, tmp_path):
    flags = f"""--preset sat --model_name_or_path {model_dir} --data {sat_data} --max_steps 2 --prompts_per_step 2
        --num_generations 2 --max_completion_length 4 --weight_decay 1 --learning_rate 0.01""".split()  # decay: it moves
    script = str(Path(g.__file__))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    for name, start in ("python", [sys.executable]), ("launch", launch):
        subprocess.run([*start, script, *flags, "--output_dir", str(tmp_path / name)], check=True, capture_output=True)
    assert same_weights(tmp_path / "python/final", tmp_path / "launch/final")
    for file in "metrics.jsonl", "completions.jsonl":
        assert jsonl(tmp_path / "python" / file) == jsonl(tmp_path / "launch" / file)


# ---- Bad input -------------------------------------------------------------------------------------------

def rewrite(sat_data, path, change):
    """The prepared file with its rows (dicts) changed -> path."""
    table = pq.read_table(sat_data / "train.parquet")
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return path


def test_missing_paths_stop(model_dir, sat_data, tmp_path, capsys, with_letters):
    with stops(capsys, str(tmp_path / "no_model")):
        train(str(tmp_path / "no_model"), sat_data, tmp_path / "run")
    with stops(capsys, "no/model"):
        train("no/model", sat_data, tmp_path / "run")
    with stops(capsys, "no_data"):
        train(model_dir, tmp_path / "no_data", tmp_path / "run")
    with stops(capsys, "no checkpoint"):
        train(model_dir, sat_data, tmp_path / "run", "--resume")
    assert not (tmp_path / "run").exists()


def test_data_that_is_no_training_data_stops(model_dir, sat_data, tmp_path, capsys, with_letters):
    (tmp_path / "text.parquet").write_text("question,answer\n")
    with stops(capsys, "text.parquet"):
        train(model_dir, tmp_path / "text.parquet", tmp_path / "run")
    pq.write_table(pq.read_table(sat_data / "train.parquet").drop_columns(["options"]), tmp_path / "less.parquet")
    with stops(capsys, "less.parquet", "'options'"):
        train(model_dir, tmp_path / "less.parquet", tmp_path / "run")
    with stops(capsys, "raw.parquet"):
        shutil.copy(sat_data / "SAT_train.parquet", tmp_path / "raw.parquet")
        train(model_dir, tmp_path / "raw.parquet", tmp_path / "run")


@pytest.mark.parametrize("broken", [b"no JPEG at all", ONE[:len(ONE) // 2]], ids=["header", "body"])
def test_a_broken_image_stops_and_is_named(broken, model_dir, sat_data, tmp_path, capsys, with_letters):
    data = rewrite(sat_data, tmp_path / "broken.parquet", lambda rows: rows[1]["images"][1].update(bytes=broken))
    with stops(capsys, "broken.parquet, row 1"):
        train(model_dir, data, tmp_path / "run")


def test_prompts_are_dropped_and_never_cut(model_dir, sat_data, model, tmp_path, capsys, with_letters):
    processors = g.load_processors(model_dir, 3136, 401408)
    rows = datasets.Dataset.from_parquet(str(sat_data / "train.parquet"))
    lengths = [g.build_prompt(g.row_text(row), row["images"], *processors, model).input_ids.shape[1] for row in rows]
    kept = lambda limit: g.load_data(g.Config(data=str(sat_data), max_prompt_length=limit), *processors)[2]
    assert kept(max(lengths)) == [0, 1, 2] and "dropped" not in capsys.readouterr().out
    assert kept(max(lengths) - 1) == [i for i in range(3) if lengths[i] < max(lengths)]
    assert "dropped 1 of 3" in capsys.readouterr().out
    with stops(capsys, "--max_prompt_length 20"):
        train(model_dir, sat_data, tmp_path / "run", "--max_prompt_length", "20")


def test_output_dir_in_use_is_refused(model_dir, sat_data, tmp_path, capsys, with_letters):
    (tmp_path / "run").mkdir()
    with stops(capsys, "run exists"):
        train(model_dir, sat_data, tmp_path / "run")


def test_nan_loss_stops_and_keeps_the_last_checkpoint(model_dir, sat_data, tmp_path, monkeypatch, capsys, with_letters):
    def grpo_loss(*args, loss=g.grpo_loss):
        found = loss(*args)
        return (found[0] * math.nan if (tmp_path / "run/checkpoint-1").exists() else found[0], *found[1:])
    monkeypatch.setattr(g, "grpo_loss", grpo_loss)
    with stops(capsys, "step 2", "nan", "bad_batch.jsonl"):
        train(model_dir, sat_data, tmp_path / "run")
    assert len(jsonl(tmp_path / "run/bad_batch.jsonl")) == 8 and len(jsonl(tmp_path / "run/metrics.jsonl")) == 1
    assert not (tmp_path / "run/checkpoint-2").exists() and not (tmp_path / "run/final").exists()
    assert all(p.isfinite().all() for p in g.load_model(str(tmp_path / "run/checkpoint-1")).parameters())
    monkeypatch.undo()
    monkeypatch.setitem(g.REWARDS, "letters", letters)
    train(model_dir, sat_data, tmp_path / "run", "--resume")
    assert (tmp_path / "run/final").exists()


# ---- Does it learn? --------------------------------------------------------------------------------------

@pytest.mark.parametrize("sign", [1, -1, 0])
def test_learning_follows_the_advantages(sign, model_dir, sat_data, tmp_path, monkeypatch, with_letters):
    monkeypatch.setattr(g, "group_advantages", lambda *args, do=g.group_advantages: sign * do(*args))
    steps = 10 if sign else 2
    train(model_dir, sat_data, tmp_path / "run", "--max_steps", str(steps), "--save_steps", "100", "--num_generations", "8",
          "--learning_rate", "0.01", "--rewards", "letters", "--beta", "0")
    reward = [m["reward"] for m in jsonl(tmp_path / "run/metrics.jsonl")]
    if sign:
        assert sign * (sum(reward[-3:]) - sum(reward[:3])) / 3 > 0.1, reward
    else:
        before = g.load_model(model_dir).state_dict()
        after = g.load_model(str(tmp_path / "run/final")).state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


# ---- Evaluation ------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def cvbench(tmp_path_factory):
    """Files of CV-Bench's schema -> folder."""
    folder, rows = tmp_path_factory.mktemp("cvbench"), []
    for i, (kind, task, source) in enumerate([("2D", "Count", "ADE20K"), ("2D", "Relation", "COCO"),
                                              ("2D", "Count", "COCO"), ("3D", "Depth", "Omni3D"),
                                              ("3D", "Distance", "Omni3D")]):
        choices = ["3", "4", "5", "6"][:2 + i % 3]
        question = "How many chairs are in the image?"
        prompt = question + " Select from the following choices." + "".join(
            f"\n({letter}) {choice}" for letter, choice in zip("ABCD", choices))
        rows.append({"idx": i, "type": kind, "task": task, "image": {
            "bytes": encoded(picture(56 + 28 * i, 84, seed=i), "PNG"), "path": None}, "question": question,
            "choices": choices, "answer": "(B)", "prompt": prompt, "filename": f"{i}.png", "source": source,
            "source_dataset": source, "source_filename": f"{i}.jpg", "target_class": None, "target_size": None,
            "bbox": None if kind == "2D" else [[0.0, 1.0, 2.0, 3.0]]})
    features = datasets.Features({
        **{name: datasets.Value("string") for name in rows[0]}, "idx": datasets.Value("int64"), "image": datasets.Image(),
        "choices": datasets.List(datasets.Value("string")), "target_size": datasets.Value("int64"),
        "bbox": datasets.List(datasets.List(datasets.Value("float64")))})
    for kind in "2D", "3D":
        datasets.Dataset.from_list([row for row in rows if row["type"] == kind], features=features).to_parquet(
            folder / f"test_{kind.lower()}.parquet")
    return folder


@pytest.mark.parametrize("flags", [[], ["--no_reasoning"]])
def test_evaluation_of_cvbench_files(flags, cvbench, model_dir, tmp_path, capsys):
    eval_cvbench.main(["--model", model_dir, "--data", str(cvbench), "--max_new_tokens", "6", "--batch_size", "2",
                       "--output_dir", str(tmp_path), *flags])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ["Count", "Relation", "Depth", "Distance", "total", "official", "unparsed"])
    file, = tmp_path.rglob("*.jsonl")
    records = sorted(jsonl(file), key=lambda r: r["id"])
    assert [r["answer"] for r in records] == ["4"] * 5 and [r["id"] for r in records] == list(range(5))
    template = eval_cvbench.DIRECT_PROMPT if flags else g.BASE_PROMPT
    question = "How many chairs are in the image? Select from the following choices.\n(A) 3\n(B) 4"
    assert records[0]["prompt"] == template.format(question=question)
    for r in records:
        assert {"completion", "extracted", "correct", "length", "finished", "parsed", "task"} <= r.keys()
        assert r["completion"].startswith("<think>") != bool(flags)


def test_batched_answers_are_those_of_one_at_a_time(cvbench, model, processors):
    questions = eval_cvbench.load_benchmark(str(cvbench))
    answer = lambda size: list(eval_cvbench.answer_questions(model, *processors, questions, batch_size=size,
                                                             max_new_tokens=10))
    assert answer(1) == answer(3) == answer(32)
    assert len({r["completion"] for r in answer(32)}) > 1


def test_held_out_training_questions_are_asked_as_in_training(sat_data):
    rows = datasets.Dataset.from_parquet(str(sat_data / "train.parquet"))
    for q, row in zip(eval_cvbench.load_benchmark(str(sat_data / "train.parquet")), rows):
        assert g.BASE_PROMPT.format(question=q["text"]) == g.row_text(row) and q["answer"] == row["answer"]


def test_scores_by_hand():
    verdicts = {"ADE20K": [1, 0], "COCO": [1, 1, 1, 0], "Omni3D": [1, 0, 0, 0, 0]}
    records = [{"task": "Count" if source != "Omni3D" else "Depth", "source": source, "correct": bool(right),
                "parsed": source != "COCO", "length": 10} for source, rights in verdicts.items() for right in rights]
    summary = eval_cvbench.summarise(records)
    assert summary["total"][0] == pytest.approx(100 * 5 / 11)
    assert summary["official"] == pytest.approx(100 * ((1 / 2 + 3 / 4) / 2 + 1 / 5) / 2)
    assert summary["Count"][0] == pytest.approx(100 * 4 / 6) and summary["Depth"][0] == pytest.approx(20)
    assert summary["unparsed"] == pytest.approx(100 * 4 / 11) and summary["mean_length"] == 10


def test_evaluation_data_with_faults_stops(cvbench, model_dir, tmp_path, capsys):
    table = pq.read_table(cvbench / "test_2d.parquet")
    pq.write_table(table.drop_columns(["prompt"]), tmp_path / "less.parquet")
    answers = pa.array(["(B)", "(F)", "(A)"])
    pq.write_table(table.set_column(table.column_names.index("answer"), "answer", answers), tmp_path / "letter.parquet")
    for path, word in (tmp_path / "less.parquet", "'prompt'"), (tmp_path / "letter.parquet", "row 1"), (
            tmp_path / "none", "none"):
        with stops(capsys, word):
            eval_cvbench.main(["--model", model_dir, "--data", str(path), "--output_dir", str(tmp_path)])


# ---- The toy world ---------------------------------------------------------------------------------------

def test_toy_scenes_are_new_and_answers_true():
    rng, seen = random.Random(0), set()
    scenes = [prepare_sat.draw_scene(rng, seen) for _ in range(300)]
    assert len(set(scenes)) == len(seen) == 300
    asked = Counter()
    for scene in scenes:
        named = {thing.name: thing for thing in scene}
        for kind in prepare_sat.TASKS:
            question = prepare_sat.ask(scene, kind, rng)
            if question is None:
                continue
            asked[kind] += 1
            assert question.answer in question.options and len(set(question.options)) == len(question.options)
            if kind == "count":
                word = re.search(r"How many (\w+)", question.sat)[1]
                assert question.answer == str(sum(word in thing.name.split() for thing in scene))
            elif kind in ("left or right", "above or below"):
                a, b = (named[name] for name in sorted(named, key=question.sat.find) if name in question.sat)
                first = a.column < b.column if kind == "left or right" else a.row < b.row
                assert question.answer == (("left", "right") if kind == "left or right" else ("above", "below"))[not first]
    assert min(asked[kind] for kind in prepare_sat.TASKS) > 30
