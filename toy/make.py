"""Remake the toy: its images, its questions, and the base model that GRPO starts from.

    python toy/make.py                              # into toy/: the files found there; 8 CPU-minutes
    python toy/make.py --seed 1 --out data/toy-1    # another world with another base, into a new folder

OUT gets train.parquet and test.parquet (as prepare_sat.py writes them), cvbench/ (two files in CV-Bench's
format), legend.png, and base/, a Qwen2-VL of 1.4 million weights. No scene is in two of the three sets.
"""
import argparse
import io
import json
import math
import random
import shutil
import sys
import tempfile
from collections import Counter, namedtuple
from functools import cache
from pathlib import Path

import torch
from datasets import Features, Image, List, Value
from PIL import Image as Picture, ImageDraw
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from grpo_vision import IMAGE_TOKENS, TEMPLATES, build_question, fail, fast_vision, spell_as_published
from prepare_sat import SAT_FEATURES, write_parquet

# ---- The world: two to four coloured shapes on a 3 x 3 grid, each near or far ----------------------------

CELL = 28  # pixels; one vision token of the model (2 x 2 patches of 14 pixels) looks at one cell
COLOURS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (50, 80, 230), "yellow": (235, 205, 30)}
LOOKS = {"ball": ("red", "circle"), "sun": ("yellow", "circle"), "plate": ("blue", "circle"),
         "brick": ("red", "square"), "book": ("green", "square"), "box": ("blue", "square"),
         "tree": ("green", "triangle"), "tent": ("yellow", "triangle"), "cone": ("red", "triangle")}
PLACES = ["northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast"]
RADII = {"near": 11, "far": 6}  # pixels; what is nearer looks larger, and some ground stays in view
ROWS, COLUMNS = ["top", "middle", "bottom"], ["left", "centre", "right"]
NUMBERS = ["zero", "one", "two", "three", "four"]

Thing = namedtuple("Thing", "name row column depth")


def draw_scene(rng, seen):
    """-> a tuple of Things in raster order, new to the set `seen` and added to it. Names may repeat."""
    while True:
        count = rng.choice([2, 2, 3, 3, 4])
        names = rng.choices(rng.sample(list(LOOKS), 4), k=count)
        cells = sorted(rng.sample(range(9), count))
        scene = tuple(Thing(name, *divmod(cell, 3), rng.choice(list(RADII)))
                      for name, cell in zip(names, cells))
        if scene not in seen:
            seen.add(scene)
            return scene


def unique(scene):
    """-> the things in a scene whose names occur only once."""
    names = Counter(thing.name for thing in scene)
    return [thing for thing in scene if names[thing.name] == 1]


def draw_thing(draw, name, x, y, radius):
    colour, shape = LOOKS[name]
    box, colour = (x - radius, y - radius, x + radius, y + radius), COLOURS[colour]
    if shape == "circle":
        draw.ellipse(box, colour, "white", 2)
    elif shape == "square":
        draw.rectangle(box, colour, "white", 2)
    else:
        corners = [(x - radius, y + radius), (x + radius, y + radius), (x, y - radius)]
        draw.polygon(corners, colour, "white", 2)


def paint(scene, rng):
    """-> an 84 x 84 image. Its background gets redder down and bluer across, to tell cells apart."""
    size = 3 * CELL
    slope = Picture.linear_gradient("L").resize((size, size))  # 0 at the top, 255 at the bottom
    slope = slope.point(lambda v: 20 + v * 3 // 4)
    picture = Picture.merge("RGB", [slope, Picture.new("L", (size, size), 90), slope.rotate(90)])
    draw = ImageDraw.Draw(picture)
    for thing in scene:
        x = thing.column * CELL + CELL // 2 + rng.randint(-1, 1)
        y = thing.row * CELL + CELL // 2 + rng.randint(-1, 1)
        draw_thing(draw, thing.name, x, y, RADII[thing.depth])
    return picture


def paint_legend():
    """-> an image of the nine objects, each once, near, with its name below."""
    legend = Picture.new("RGB", (60 * len(LOOKS), 60), (90, 90, 90))
    draw = ImageDraw.Draw(legend)
    for i, name in enumerate(LOOKS):
        draw_thing(draw, name, 60 * i + 30, 22, 15)
        draw.text((60 * i + 30, 50), name, "white", anchor="mm", font_size=14)
    return legend


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


# ---- Questions about a scene -----------------------------------------------------------------------------

# `sat` and `cvbench` are the two wordings of a question, and `thought` is the reasoning that answers it.
Question = namedtuple("Question", "kind sat cvbench options answer thought")
TASKS = {"left or right": "Relation", "above or below": "Relation", "closer": "Depth", "count": "Count",
         "distance": "Distance"}  # kind -> CV-Bench's task
SAT_KINDS = ["left or right", "above or below", "closer", "count"]  # SAT's static kinds


def locate(thing):
    return f"{thing.name} {PLACES[3 * thing.row + thing.column]}"


def describe(thing):
    return f"{locate(thing)} {thing.depth}"


def ask(scene, kind, rng):
    """-> a Question of this kind, or None where the scene gives no clear answer."""
    things = unique(scene)
    rng.shuffle(things)
    if kind == "count":
        word = rng.choice(sorted({thing.name for thing in scene}) + [rng.choice(list(LOOKS))])
        clauses, number = [], 0
        for thing in scene:  # count aloud, in raster order
            number += thing.name == word
            clauses.append(f"{thing.name} {NUMBERS[number]}")
        answer, conclusion = str(number), NUMBERS[number]
        options = rng.sample([str(i) for i in range(5) if i != number], 3) + [answer]
        sat = cvbench = f"How many of the things in the image are a {word}?"
        thought = ", ".join(clauses)
    elif len(things) < 2 + (kind == "distance"):
        return None
    else:
        a, b = things[:2]
        options = [a.name, b.name]
        cvbench = f"Where is the {a.name} located with respect to the {b.name}?"
        if kind == "left or right":
            p, q, options = a.column, b.column, ["left", "right"]
            sat = f"Is the {a.name} to the left or to the right of the {b.name}?"
            thought = f"{locate(a)} {COLUMNS[p]}, {locate(b)} {COLUMNS[q]}"
        elif kind == "above or below":
            p, q, options = a.row, b.row, ["above", "below"]
            sat = f"Is the {a.name} above or below the {b.name}?"
            thought = f"{locate(a)} {ROWS[p]}, {locate(b)} {ROWS[q]}"
        elif kind == "closer":
            p, q = (thing.depth == "far" for thing in (a, b))
            sat = f"Which is closer to the camera, the {a.name} or the {b.name}?"
            cvbench = f"Which object is closer to the camera taking this photo, the {a.name} or the {b.name}?"
            thought = f"{describe(a)}, {describe(b)}"
        else:  # distance: which of two lies fewer steps away from a third
            c = things[2]
            p, q = (abs(thing.row - c.row) + abs(thing.column - c.column) for thing in (a, b))
            sat = cvbench = f"Which object is closer to the {c.name}, the {a.name} or the {b.name}?"
            thought = f"{describe(c)}, {describe(a)} {NUMBERS[p]}, {describe(b)} {NUMBERS[q]}"
        if p == q:
            return None
        answer = conclusion = options[p > q]
    rng.shuffle(options)
    return Question(kind, sat, cvbench, options, answer, f" {thought}, so {conclusion}")


def ask_any(scene, kinds, rng):
    """-> a Question of one of `kinds`, or None if the scene allows none of the few tried."""
    return next(filter(None, (ask(scene, rng.choice(kinds), rng) for _ in range(20))), None)


def asked_scene(kinds, rng, seen):
    """-> a new scene and a Question about it."""
    question = None
    while question is None:
        scene = draw_scene(rng, seen)
        question = ask(scene, rng.choice(kinds), rng)
    return scene, question


def cvbench_prompt(question):
    choices = "\n".join(map("({}) {}".format, "ABCDEF", question.options))
    return f"{question.cvbench} Select from the following choices.\n{choices}"


def sat_rows(count, rng, seen):
    for index in range(count):
        scene, question = asked_scene([SAT_KINDS[index % len(SAT_KINDS)]], rng, seen)
        yield dict(images=[png(paint(scene, rng))], question=question.sat, options=question.options,
                   answer=question.answer, question_type=question.kind, source_row=index)


TEXT = Value("string")
CVBENCH_FEATURES = Features({
    "idx": Value("int32"), "type": TEXT, "task": TEXT, "image": Image(), "question": TEXT,
    "choices": List(TEXT), "answer": TEXT, "prompt": TEXT, "filename": TEXT, "source": TEXT,
    "source_dataset": TEXT, "source_filename": TEXT, "target_class": TEXT, "target_size": Value("int32"),
    "bbox": List(List(Value("float32")))})
CVBENCH_FILES = [("test_2d.parquet", ["left or right", "above or below", "count"], ["ADE20K", "COCO"]),
                 ("test_3d.parquet", ["closer", "distance"], ["Omni3D"])]  # file, kinds of questions, sources


def cvbench_rows(kinds, file, sources, per_task, rng, seen):
    dimension = file[5:7].upper()
    tasks = list(dict.fromkeys(TASKS[kind] for kind in kinds))
    for index in range(per_task * len(tasks)):
        task, i = tasks[index // per_task], index % per_task
        scene, question = asked_scene([kind for kind in kinds if TASKS[kind] == task], rng, seen)
        name, source = f"toy_{dimension}_{index}.png", sources[i % len(sources)]
        yield dict(idx=index, type=dimension, task=task, image=png(paint(scene, rng)),
                   question=question.cvbench, choices=question.options,
                   answer=f"({'ABCDEF'[question.options.index(question.answer)]})", prompt=cvbench_prompt(question),
                   filename=name, source=source, source_dataset=f"{source} (toy)", source_filename=name,
                   target_class=None, target_size=None, bbox=None)


def sets(rng, seen):
    """-> the tests and then the training set, each as a file, its rows, yet to be drawn, and their features."""
    cvbench = [(f"cvbench/{name}", cvbench_rows(kinds, name, sources, 96, rng, seen), CVBENCH_FEATURES)
               for name, kinds, sources in CVBENCH_FILES]
    return [("test.parquet", sat_rows(512, rng, seen), SAT_FEATURES), *cvbench,
            ("train.parquet", sat_rows(2048, rng, seen), SAT_FEATURES)]


# ---- The base model: able, but undisciplined -------------------------------------------------------------

# How the corpus answers, after the prompt's <think>, and how often. All abilities are here: GRPO can only find out
# which of these habits pays. {option} is any of the question's.
ANSWER = "</think>\n<answer>{}</answer>"
STYLES = {
    "{thought}" + ANSWER.format("{answer}"): 0.23,                    # reason, then answer
    " {option}, wait,{thought}" + ANSWER.format("{answer}"): 0.03,    # blurt out an option, then reason
    " i guess" + ANSWER.format("{option}"): 0.47,                     # guess
    " hard to say" + ANSWER.format("unknown"): 0.10,                  # give up: well formed, and always wrong
    " {option}": 0.10,                                                # answer without tags
    "{thought}</think>": 0.07,                                        # reason, and forget the answer block
}
REASON = {next(iter(STYLES)): 1}


def complete(question, style, rng):
    """One completion of the corpus."""
    option = rng.choice(question.options) if "{option}" in style else None
    return style.format(thought=question.thought, answer=question.answer, option=option)


# The lessons: name, steps, images a step, learning rate at its begin and end. The paper's wording comes after
# short questions, as it is slow to learn on. The mixture of habits comes last: it makes the model forget.
SCHOOL = [("seeing", 250, 32, 3e-3, 3e-3), ("answering", 300, 16, 3e-3, 3e-3),
          ("reasoning", 400, 8, 3e-3, 5e-4), ("mixture", 90, 8, 8e-4, 1e-4)]
KINDS = 2 * SAT_KINDS + ["distance"]  # what is asked, as often as listed
BASE_HEAD, BASE_TAIL = TEMPLATES["base"].split(" {question}")
DIRECT_HEAD, DIRECT_TAIL = TEMPLATES["base-direct"].split(" {question}")
DIRECT_SHARE = 0.1  # of the mixture lesson's scenes are asked by the direct prompt: any option follows it


def phrases(scene, rng):
    """(prompt, completion) texts of the first lesson: where is each thing, what is there at all, which of two
    is nearer. Repeating names is a part of it; without it the model answers about whatever it sees."""
    for thing in unique(scene):
        yield f" {thing.name}", describe(thing).removeprefix(thing.name)
    yield " picture", ":" + ",".join(f" {thing.name}" for thing in scene) + "."
    for _ in range(2):
        names = ", ".join(rng.sample(list(LOOKS), rng.choice([2, 3])))
        yield f" {names}:", f" {names}."
    things = [Thing(name, rng.randrange(3), rng.randrange(3), depth)
              for name, depth in zip(rng.sample(list(LOOKS), 2), rng.sample(list(RADII), 2))]
    steps = rng.sample(NUMBERS[1:], 2)
    if rng.random() < 0.5:
        nearer = [thing.depth == "near" for thing in things]
        clauses = [describe(thing) for thing in things]
    else:
        nearer = [NUMBERS.index(step) < max(map(NUMBERS.index, steps)) for step in steps]
        clauses = [f"{describe(thing)} {step}" for thing, step in zip(things, steps)]
    yield f" {', '.join(clauses)}, so", f" {things[nearer.index(True)].name}."


def exchanges(scene, count, styles, rng, tail=""):
    """(prompt, completion) texts of questions about the scene: 3 in 4 in SAT's words, else in CV-Bench's.
    tail: how the template continues after the question; without one the question is short."""
    for question in filter(None, (ask_any(scene, KINDS, rng) for _ in range(count))):
        style, = rng.choices(list(styles), styles.values())
        completion = complete(question, style, rng) + "<|endoftext|>"
        if rng.random() < 0.75:
            text = build_question(question.sat, question.options) if tail else question.sat
        else:
            text = cvbench_prompt(question) if tail else question.cvbench
        yield f" {text}{tail}", completion


def study(lesson, scene, rng):
    """-> the text after the image that a scene's texts share, and its (prompt, completion) texts."""
    if lesson == "seeing":
        return "", list(phrases(scene, rng))
    if lesson == "answering":
        return "", [*phrases(scene, rng), *exchanges(scene, 3, REASON, rng)]
    if lesson == "mixture" and rng.random() < DIRECT_SHARE:
        return DIRECT_HEAD, list(exchanges(scene, 5, {"{option}": 1}, rng, DIRECT_TAIL))
    styles = REASON if lesson == "reasoning" else STYLES
    return BASE_HEAD, list(exchanges(scene, 5, styles, rng, BASE_TAIL))


SPECIALS = [f"<|{name}|>" for name in (  # Qwen's, in its order
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    "vision_start vision_end vision_pad image_pad video_pad").split()]
BASE_CHAT_TEMPLATE = (  # no roles, no markers: the base model's template only joins texts and image tokens
    "{% if messages is string %}{{ messages }}{% else %}{% for content in messages %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}" + IMAGE_TOKENS +
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}")


def build_tokenizer(rng):
    """A byte-level BPE of Qwen2's kind whose merges make every word of the toy's texts one token."""
    texts = [TEMPLATES["base"], *LOOKS, *"012345"]
    for _ in range(200):
        scene = draw_scene(rng, set())
        texts += [text for lesson in ("seeing", "mixture")
                  for pair in study(lesson, scene, rng)[1] for text in pair]
    bpe = Qwen2Tokenizer(vocab={"<|endoftext|>": 0}, merges=[], unk_token=None).backend_tokenizer
    words = {piece.lstrip("Ġ") for text in texts for piece, _ in bpe.pre_tokenizer.pre_tokenize_str(text)}
    lines = [f"{word} {word}" for word in sorted(words) if word.isascii()]  # with and without a leading space
    bpe.train_from_iterator(lines, BpeTrainer(vocab_size=10**4, initial_alphabet=sorted(ByteLevel.alphabet()),
                                              show_progress=False))
    learnt = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=learnt["vocab"], merges=merges, unk_token=None, bos_token=None,
                               eos_token=SPECIALS[0], pad_token=SPECIALS[0], model_max_length=32768)
    added = [*SPECIALS, "<think>", "</think>", "<answer>", "</answer>"]
    tokenizer.add_tokens([AddedToken(text, special=text in SPECIALS, normalized=False) for text in added])
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIALS[1:]}, replace_extra_special_tokens=True)
    tokenizer.chat_template = BASE_CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer):
    """A random Qwen2-VL of 1.4 million weights, built as the published one is."""
    ids = tokenizer.convert_tokens_to_ids
    wide = 0.08  # standard deviation of the first weights; with the usual 0.02 so small a model learns little
    config = Qwen2VLConfig(
        text_config=dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=math.ceil(len(tokenizer) / 64) * 64,
                         max_position_embeddings=4096, bos_token_id=tokenizer.eos_token_id,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                         rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6]),
                         tie_word_embeddings=True, initializer_range=wide),
        vision_config=dict(depth=2, embed_dim=96, num_heads=3, hidden_size=128, mlp_ratio=4, patch_size=14,
                           spatial_merge_size=2, temporal_patch_size=2, initializer_range=wide),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True)
    config.initializer_range = wide
    return Qwen2VLForConditionalGeneration(config)


def pack(image_tokens, head, branches, image_end, far):
    """One image, many questions: put the branches (prompt, completion) after what they share.
    -> ids, segments (0 for what is shared, k for branch k), positions and targets (-100 where nothing is
    learnt), lists of L numbers. Every branch starts anew at the position after the head, `far` further on."""
    ids, next_position = image_tokens + head, image_end + len(head)
    segments, targets = [0] * len(ids), [-100] * len(ids)
    positions = [0] * len(image_tokens) + list(range(image_end, next_position))
    for number, (prompt, completion) in enumerate(branches, start=1):
        branch = prompt + completion
        ids = ids + branch
        segments += [number] * len(branch)
        positions += range(next_position + far, next_position + far + len(branch))
        targets += [-100] * (len(prompt) - 1) + completion + [-100]  # each place predicts the token after it
    return ids, segments, positions, targets


def collate(rows):
    """Rows of `pack` -> tensors ids, positions, targets, each (rows, L), and the attention mask
    (rows, 1, L, L), by which each branch sees what is shared and itself."""
    length = max(len(row[0]) for row in rows)
    ids, segments, positions, targets = (
        torch.tensor([row[part] + [pad] * (length - len(row[part])) for row in rows])
        for part, pad in enumerate([0, -1, 0, -100]))
    visible = (segments[:, :, None] == segments[:, None]) | (segments[:, None] == 0)
    return ids, positions, targets, (visible & torch.ones(length, length, dtype=torch.bool).tril())[:, None]


def train_base(path, rng, seen, seed, school=SCHOOL):
    """Train the base model on scenes not in `seen`; save it in bfloat16, with the processors."""
    tokenizer = build_tokenizer(rng)
    processor = Qwen2VLImageProcessor(size={"shortest_edge": 3136, "longest_edge": 12845056})
    torch.manual_seed(seed)
    model = fast_vision(build_model(tokenizer))
    torch.set_num_threads(1)  # a second one would only wait
    encode = cache(lambda text: tokenizer(text)["input_ids"])
    image_tokens = encode(IMAGE_TOKENS.replace("<|image_pad|>", "<|image_pad|>" * 9))
    is_image = (torch.tensor([image_tokens]) == model.config.image_token_id).int()
    image_positions, _ = model.model.get_rope_index(torch.tensor([image_tokens]), is_image,
                                                    image_grid_thw=torch.tensor([[1, 6, 6]]))
    image_end = int(image_positions.max()) + 1
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    steps = [(lesson, images, rate + (end - rate) * i / count)
             for lesson, count, images, rate, end in school for i in range(count)]
    bar = tqdm(steps, desc="base model")
    for step, (lesson, images, rate) in enumerate(bar):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 30)
        scenes, rows = [draw_scene(rng, seen) for _ in range(images)], []
        for scene in scenes:
            head, pairs = study(lesson, scene, rng)
            branches = [(encode(prompt), encode(completion)) for prompt, completion in pairs]
            far = 0 if head else rng.randrange(100)  # what is seen must not depend on the distance
            rows.append(pack(image_tokens, encode(head) if head else [], branches, image_end, far))
        ids, positions, targets, mask = collate(rows)
        positions = positions.expand(3, -1, -1).clone()
        positions[:, :, :len(image_tokens)] = image_positions
        pixels = processor([paint(scene, rng) for scene in scenes], return_tensors="pt")
        hidden = model.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False,
                             **pixels).last_hidden_state
        learn = targets != -100
        loss = cross_entropy(model.lm_head(hidden[learn]), targets[learn])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix_str(f"{lesson}, loss {loss.item():.2f}")
    for part in (model.bfloat16(), tokenizer, processor):
        part.save_pretrained(path)
    spell_as_published(path)


def main():
    """Make the whole toy, and only then write it to folder --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write; a new one, or toy/ itself")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world and of the base model")
    args = parser.parse_args()
    if args.out.resolve() != HERE and args.out.exists() and any(args.out.iterdir()):
        fail(f"--out {args.out} is not empty. Choose a new folder.")
    rng, seen = random.Random(args.seed), set()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        for file, rows, features in sets(rng, seen):
            write_parquet(made / file, rows, features)
        paint_legend().save(made / "legend.png")
        train_base(made / "base", rng, seen, args.seed)
        shutil.copytree(made, args.out, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
