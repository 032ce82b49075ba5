"""Draws the pictures of the tutorial, docs/pictures/*.svg, from real runs:

    make demo
    python bench/experiments.py supervise symptoms
    python bench/rewards.py dpo
    python bench/rewards.py grpo
    python bench/pictures.py

Pictures are 480 wide, so that their text is readable on a phone, and have a dark form for browsers
in dark mode.
"""

import argparse
import html
import json
import math
import re
import sys
import textwrap
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.causal_lm import CausalLM
from model.chat_template import render
from model.generation import complete
from model.weights import build_model, load
from serving.trace import trace
from trainer.flags import training_parser
from trainer.optimizer import learning_rate

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 480
STYLE = """
.paper{fill:#fff}.ink{fill:#1f2328}.soft{fill:#59636e}.blue{fill:#0969da}.green{fill:#1a7f37}
.orange{fill:#bc4c00}.line{stroke:#59636e;fill:none}.grid{stroke:#d1d9e0;fill:none}
.blueline{stroke:#0969da;fill:none;stroke-width:2}.orangeline{stroke:#bc4c00;fill:none;stroke-width:2}
.greenline{stroke:#1a7f37;fill:none;stroke-width:2}
.greybox{fill:#f6f8fa;stroke:#8c959f}.bluebox{fill:#ddf4ff;stroke:#0969da}
.greenbox{fill:#dafbe1;stroke:#1a7f37}.orangebox{fill:#fff1e5;stroke:#bc4c00}
@media (prefers-color-scheme: dark){
.paper{fill:#0d1117}.ink{fill:#f0f6fc}.soft{fill:#9198a1}.blue{fill:#4493f8}.green{fill:#3fb950}
.orange{fill:#f0883e}.line{stroke:#9198a1}.grid{stroke:#3d444d}
.blueline{stroke:#4493f8}.orangeline{stroke:#f0883e}.greenline{stroke:#3fb950}
.greybox{fill:#212830;stroke:#656c76}.bluebox{fill:#0c2d6b;stroke:#4493f8}
.greenbox{fill:#033a16;stroke:#3fb950}.orangebox{fill:#5a1e02;stroke:#f0883e}}
"""
COLOURS = ("blue", "green", "orange", "grey")
MONO = 0.602  # width of a letter of a monospaced font, per unit of its size


class Picture:
    """An SVG that grows from above: `y` is where the next thing goes."""

    def __init__(self):
        self.parts, self.y = [], 24

    def text(self, x, y, text, css="ink", size=14, anchor="start", mono=False, bold=False, turn=0):
        more = 'font-family="monospace" xml:space="preserve"' if mono else ""
        more += ' font-weight="bold"' if bold else ""
        more += f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" font-size="{size}" '
            f'text-anchor="{anchor}" {more}>{html.escape(str(text))}</text>'
        )

    def box(self, x, y, width, height, css="greybox", opacity=1.0, corner=3):
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'rx="{corner}" class="{css}" fill-opacity="{opacity:.2f}"/>'
        )

    def line(self, *points, css="line"):
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{places}" class="{css}"/>')

    def arrow(self, x1, y1, x2, y2):
        self.line((x1, y1), (x2, y2))
        angle = math.atan2(y2 - y1, x2 - x1)
        ends = [(x2 - 7 * math.cos(angle + a), y2 - 7 * math.sin(angle + a)) for a in (-0.5, 0.5)]
        self.line(ends[0], (x2, y2), ends[1])

    def labelled(self, x, y, width, height, text, css="greybox", size=14):
        self.box(x, y, width, height, css)
        self.text(x + width / 2, y + height / 2 + size * 0.35, text, size=size, anchor="middle")

    def heading(self, text):
        self.text(12, self.y, text, size=15, bold=True)
        self.y += 22

    def note(self, *lines, css="soft", size=13):
        for line in lines:
            self.text(12, self.y, line, css, size)
            self.y += size + 5

    def tokens(self, texts, styles, size=13, left=12):
        """Tokens as boxes, from left to right, in as many lines as they need."""
        x, height = left, size + 9
        for text, css in zip(texts, styles, strict=True):
            width = len(text) * size * MONO + 7
            if x + width > WIDTH - 12:
                x, self.y = left, self.y + height + 4
            self.box(x, self.y, width, height, css)
            self.text(x + 3.5, self.y + size + 3, text, size=size, mono=True)
            x += width + 2
        self.y += height + 4

    def bars(self, named, most=1.0, css="blue", left=120, row=20):
        """A bar for each (name, probability)."""
        for name, value in named:
            self.text(left - 8, self.y + 12, name, anchor="end", mono=True, size=13)
            width = max(1.0, (WIDTH - left - 70) * value / most)
            self.box(left, self.y + 1, width, row - 6, css, corner=1)
            self.text(left + width + 6, self.y + 12, f"{value:.3f}", "soft", 12)
            self.y += row
        self.y += 6

    def save(self, path, height=None):
        height = height or self.y + 4
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
        head += f'viewBox="0 0 {WIDTH} {height:.0f}" font-family="sans-serif">'
        head += f"<style>{STYLE}</style>"
        paper = f'<rect width="{WIDTH}" height="{height:.0f}" class="paper" rx="6"/>'
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join([head, paper, *self.parts, "</svg>\n"]), encoding="utf-8")
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def shown(tokenizer, ids):
    """Each token as text; a space is ␣ where it would not be seen, a newline ↵."""
    texts = [tokenizer.decode([token], skip_special_tokens=False) for token in ids]
    return [text.replace("\n", "↵") for text in texts]


def prompt_of(tokenizer, *texts):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    asks = len(texts) % 2 == 1
    return render(messages, add_generation_prompt=asks, tokenizer=tokenizer)


@torch.inference_mode()
def probabilities(model, ids, temperature=1.0):
    """The probabilities of the token after ids, (V,)."""
    return (model(torch.tensor([ids]))[0, -1] / temperature).softmax(dim=-1)


def likeliest(model, tokenizer, ids, count, temperature=1.0):
    """[(token, its probability)] of the likeliest next tokens."""
    values, tokens = probabilities(model, ids, temperature).topk(count)
    return list(zip(shown(tokenizer, tokens.tolist()), values.tolist(), strict=True))


def before_and_after(path, models, tokenizer):
    """One question to new weights, to the pretrained ones, and after SFT."""
    question = "Where does Nelina live?"
    prompt, _ = prompt_of(tokenizer, question)
    picture = Picture()
    picture.heading(f"“{question}”")
    said = {
        "new weights, random": ("new", prompt),
        "after pretraining: it knows the village, not how to answer": ("pretrain", prompt),
        "after fine-tuning (SFT)": ("full_sft", prompt),
    }
    for title, (name, ids) in said.items():
        (answer,) = complete(models[name], [ids], max_new_tokens=24, temperature=0)
        text = "".join(shown(tokenizer, answer)).strip("↵")
        css = "greenbox" if name == "full_sft" else "greybox"
        lines = textwrap.wrap(text.strip(), 50)
        picture.text(12, picture.y, title, "soft", 13)
        picture.box(12, picture.y + 7, WIDTH - 24, 19 * len(lines) + 10, css)
        for number, line in enumerate(lines):
            picture.text(22, picture.y + 27 + 19 * number, line, size=14, mono=True)
        picture.y += 19 * len(lines) + 42
    picture.save(path, picture.y - 14)


def from_text_to_answer(path, models, tokenizer):
    question, model = "Where does Nelina live?", models["full_sft"]
    picture = Picture()
    picture.heading("From a question to an answer")
    picture.note(f"“{question}”", css="ink", size=15)
    picture.note("The template marks who speaks; the tokenizer cuts the text:")
    ids, _ = prompt_of(tokenizer, question)
    picture.tokens(shown(tokenizer, ids), ["greybox"] * len(ids))
    picture.y += 16
    picture.note("The model gives each of 2,048 tokens a probability to be next:")
    picture.bars(likeliest(model, tokenizer, ids, 3))
    (answer,) = complete(model, [ids], max_new_tokens=24, temperature=0)
    picture.y += 12
    picture.note("One of them is chosen and appended, and the model goes on:")
    place = next(i for i, text in enumerate(shown(tokenizer, answer)) if text == " the") + 1
    texts = [*shown(tokenizer, answer[:place]), " ?"]
    picture.tokens(texts, ["greenbox"] * place + ["orangebox"])
    picture.bars(likeliest(model, tokenizer, ids + answer[:place], 3))
    picture.y += 12
    picture.note("until it chooses the token that ends a message:")
    picture.tokens([*shown(tokenizer, answer), "<|im_end|>"], ["greenbox"] * (len(answer) + 1))
    picture.save(path)


def residual_stream(path, config):
    picture = Picture()
    picture.heading("The residual stream")
    D, V, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    x, y = 90, 70
    picture.labelled(x - 70, y - 24, 140, 28, "token ids (B, T)", size=13)
    picture.labelled(x - 70, y + 26, 140, 28, "embedding", "bluebox")
    picture.arrow(x, y + 4, x, y + 26)
    picture.text(x + 80, y + 45, f"(B, T, {D}): {D} numbers per token", "soft", 13)
    top = y + 54
    y = top + 16
    for layer in range(layers):
        for name, what in (("attention", "moves information between tokens"),
                           ("MLP", "computes on each token separately")):  # fmt: skip
            picture.line((x, y), (150, y))
            picture.labelled(150, y - 12, 46, 24, "norm", size=12)
            picture.arrow(196, y, 216, y)
            css = "orangebox" if name == "attention" else "greenbox"
            picture.labelled(216, y - 14, 90, 28, name, css)
            picture.line((261, y + 14), (261, y + 26))
            picture.arrow(261, y + 26, x + 9, y + 26)
            picture.text(x - 5, y + 32, "+", size=16)
            if layer == 0:
                picture.text(314, y + 1, what.rsplit(" ", 2)[0], "soft", 12)
                picture.text(314, y + 16, " ".join(what.rsplit(" ", 2)[1:]), "soft", 12)
            y += 46
        picture.text(x - 22, y - 50, f"layer {layer + 1}", "soft", 12, anchor="end")
    picture.arrow(x, top, x, y + 4)
    picture.labelled(x - 70, y + 4, 140, 28, "norm")
    picture.arrow(x, y + 32, x, y + 52)
    picture.labelled(x - 70, y + 52, 140, 28, "output layer", "bluebox")
    picture.arrow(x, y + 80, x, y + 100)
    picture.labelled(x - 70, y + 100, 140, 28, "logits", size=13)
    picture.text(x + 80, y + 119, f"(B, T, {V:,}): a number for each token", "soft", 13)
    picture.save(path, y + 140)


def attention_map(path, models, tokenizer):
    """The head that looks most at the name while it decides the place."""
    ids, _ = prompt_of(tokenizer, "Where does Nelina live?", "She lives at the well.")
    ids = ids[:-1]  # without the newline at the end
    texts = shown(tokenizer, ids)
    weights = trace(models["full_sft"], ids).attention  # (layers, H, T, T)
    name, place = texts.index(" Nelina"), len(texts) - 1 - texts[::-1].index(" the")
    layer, head = divmod(int(weights[:, :, place, name].flatten().argmax()), weights.shape[1])
    picture = Picture()
    picture.heading("Where one head looks")
    picture.note(f"Layer {layer + 1}, head {head + 1}. A row: one token of the answer, and how its",
                 "attention is spread over the tokens up to it.")  # fmt: skip
    first = len(texts) - 1 - texts[::-1].index("She")
    cell, left, top = 14, 92, picture.y + 84
    for column, text in enumerate(texts):
        x = left + column * cell + 10
        picture.text(x, top - 6, text.strip() or text, size=11, mono=True, turn=-60)
    for row in range(first, len(texts)):
        y = top + (row - first) * cell
        picture.text(left - 6, y + 11, texts[row].strip(), size=11, mono=True, anchor="end")
        for column in range(row + 1):
            picture.box(left + column * cell, y, cell - 1, cell - 1, "grid", corner=0)
            share = float(weights[layer, head, row, column])
            picture.box(left + column * cell, y, cell - 1, cell - 1, "blue", share, corner=0)
    y = top + (place - first) * cell
    picture.box(left + name * cell - 1, y - 1, cell + 1, cell + 1, "orangeline", 1, corner=0)
    picture.y = top + (len(texts) - first) * cell + 22
    share = float(weights[layer, head, place, name])
    picture.note(f"Orange: from “the”, where the place must come, {share:.0%} of the",
                 "attention is on the name.")  # fmt: skip
    picture.save(path)


def axes(picture, height, x_label, values, scale=float, form="{:.0f}"):
    """Draws axes with a line for each value, the lowest first; returns a function that places
    (share of the width, value).
    """
    left, right, top = 52, WIDTH - 16, picture.y
    bottom, low, high = top + height, scale(values[0]), scale(values[-1])

    def place(x, y):
        share = (scale(min(max(y, values[0]), values[-1])) - low) / (high - low)
        return left + (right - left) * x, bottom - height * share

    for value in values:
        picture.line(place(0, value), place(1, value), css="grid")
        picture.text(left - 6, place(0, value)[1] + 4, form.format(value), "soft", 12, "end")
    picture.text(right, bottom + 18, x_label, "soft", 12, "end")
    picture.y = bottom + 38
    return place


def loss_curve(path, folder, samples):
    log = (folder / "logs/pretrain_256.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in log]
    steps = log[-1]["step"]
    picture = Picture()
    picture.heading("The loss of pretraining")
    picture.note("nats per token; each line above is twice the one below")
    picture.y += 24
    place = axes(picture, 200, f"{steps} steps", (0.5, 1, 2, 4, 8), math.log, "{:g}")
    picture.line(*[place(line["step"] / steps, line["loss"]) for line in log], css="blueline")
    interval = 20
    every = range(interval, steps + 1, interval)
    said = dict(zip(every, samples, strict=False))
    last = max(said)
    for letter, step in zip("ABC", (20, 140, last), strict=True):
        near = min(log, key=lambda line: abs(line["step"] - step))
        x, y = place(step / steps, near["loss"])
        picture.line((x, y - 4), (x, y - 34), css="orangeline")
        picture.text(x, y - 38, letter, "orange", 14, "middle", bold=True)
        texts = textwrap.wrap(said[step][:110] + "…", 52)
        picture.text(12, picture.y, f"{letter}  step {step}, loss {near['loss']:.2f}", "orange", 13)
        for line in texts:
            picture.y += 18
            picture.text(32, picture.y, line, size=13, mono=True)
        picture.y += 26
    picture.save(path, picture.y - 12)


def symptoms(path, folder):
    """The validation loss of each run with a mistake, beside the one without."""
    pairs = {"as it is": ["learning rate x 30", "no warm-up", "labels shifted twice",
                          "no document_ids", "first weights of 0.02"],
             "answers": ["no replay", "no_end"]}  # fmt: skip

    def losses(name):
        (log,) = folder.glob(f"{name.replace(' ', '_')}_1/logs/*_256.jsonl")
        lines = map(json.loads, log.read_text(encoding="utf-8").splitlines())
        points = [(line["step"], line["loss"]) for line in lines if line["step"] % 10 == 0]
        last = points[-1][0]
        return [(step / last, mean(y for _, y in points[max(0, i - 2) : i + 3]))
                for i, (step, _) in enumerate(points)]  # fmt: skip

    picture = Picture()
    picture.heading("One mistake at a time")
    picture.note(
        "Orange: with the mistake. Blue: without. The training loss,", "in nats per token."
    )
    picture.y += 12
    for reference, names in pairs.items():
        right, pretraining = losses(reference), reference == "as it is"
        values = (0.5, 1, 2, 4, 8) if pretraining else (0.03125, 0.125, 0.5, 2, 8)
        for name in names:
            picture.text(52, picture.y, name, size=13, bold=True)
            picture.y += 8
            place = axes(picture, 70, "", values, math.log, "{:.2g}")
            for points, css in ((right, "blueline"), (losses(name), "orangeline")):
                picture.line(*[place(x, y) for x, y in points], css=css)
            picture.y -= 8
    picture.save(path)


def mask_of_a_conversation(path, tokenizer):
    picture = Picture()
    picture.heading("What has a loss")
    picture.note("Green: supervised. Grey: read, but without a loss.")
    talk = ["Where does Nelina live?", "She lives at the well.", "And what is her job?",
            "She is a miller."]  # fmt: skip
    ids, mask = prompt_of(tokenizer, *talk)
    rows, row = [], []
    for text, supervised in zip(shown(tokenizer, ids), mask, strict=True):
        row.append((text, "greenbox" if supervised else "greybox"))
        if text == "↵":
            rows, row = [*rows, row], []
    for row in rows:
        picture.tokens(*zip(*row, strict=True))
    picture.save(path)


def packed_row(path):
    picture, lengths, size = Picture(), (5, 4, 4, 3), 17
    picture.heading("Four samples in one row")
    total = sum(lengths)
    picture.note("A row of tokens. Below: what the token of each line may see.")
    left, x = 90, 90
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        css = f"{COLOURS[number]}box"
        x = left + start * size
        picture.labelled(x, picture.y, length * size - 1, 24, "ABCD"[number], css)
        for place in range(length):
            at = x + place * size + size / 2
            picture.text(at, picture.y + 40, place, "soft", 11, "middle")
    picture.text(left - 8, picture.y + 17, "sample", "soft", 12, "end")
    picture.text(left - 8, picture.y + 40, "position", "soft", 12, "end")
    picture.y += 54
    for row in range(total):
        for column in range(total):
            picture.box(left + column * size, picture.y + row * size, size - 1, size - 1, "grid",
                        0, 0)  # fmt: skip
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for row in range(length):
            for column in range(row + 1):
                at = left + (start + column) * size, picture.y + (start + row) * size
                picture.box(*at, size - 1, size - 1, f"{COLOURS[number]}box", corner=0)
    picture.y += total * size + 20
    picture.note("No sample sees another: each has the logits that it has on its own.")
    picture.save(path)


def schedules(path, folder):
    picture = Picture()
    picture.heading("The learning rate, step by step")
    values = [part / 1000 for part in range(5)]
    place = axes(picture, 170, "part of the run", values, form="{:.3f}")
    flags = {"pretrain": (4e-3, 0.2, "blue"), "full_sft": (2.2e-3, 0.1, "orange")}
    for name, (highest, floor, css) in flags.items():
        lines = (folder / f"logs/{name}_256.jsonl").read_text(encoding="utf-8").splitlines()
        steps = json.loads(lines[-1])["step"]
        args = training_parser("").parse_args([])
        args.learning_rate, args.min_lr_ratio, args.warmup_steps = highest, floor, 20
        points = [(step, learning_rate(step, steps, args)) for step in range(steps)]
        picture.line(*[place(s / (steps - 1), lr) for s, lr in points], css=f"{css}line")
        text = {"pretrain": "pretraining", "full_sft": "SFT"}[name]
        x, y = place(0.28, points[int(0.28 * steps)][1])
        picture.text(x + 12, y - 8, f"{text}: {steps} steps", css, 13)
    picture.note("A linear rise over the first 20 steps (warm-up), then half a cosine.")
    picture.save(path)


def temperatures(path, models, tokenizer):
    ids, _ = prompt_of(tokenizer, "Write a story about a brown dog who lost a kite.")
    (story,) = complete(models["full_sft"], [ids], max_new_tokens=200, temperature=0)
    # A place at which the most probable token has about half of the probability.
    highest = [likeliest(models["full_sft"], tokenizer, ids + story[:n], 1)[0][1]
               for n in range(len(story))]  # fmt: skip
    chosen = min(range(len(story)), key=lambda n: abs(highest[n] - 0.5))
    ids = ids + story[:chosen]
    picture = Picture()
    picture.heading("One distribution at three temperatures")
    said = tokenizer.decode(story[max(0, chosen - 9) : chosen]).replace("\n", " ")
    picture.note(f"The next token after “… {said.strip()}”")
    for temperature in (0.5, 1.0, 1.5):
        picture.note(f"temperature {temperature}", css="ink")
        picture.y -= 6
        named = likeliest(models["full_sft"], tokenizer, ids, 4, temperature)
        picture.bars([(text.strip(), value) for text, value in named])
        picture.y += 8
    picture.save(path)


def lora_pair(path):
    picture = Picture()
    picture.heading("A LoRA pair beside a matrix")
    y = picture.y + 14
    picture.labelled(20, y + 60, 40, 32, "x")
    picture.labelled(120, y, 130, 120, "W, frozen")
    picture.text(185, y + 78, "256 × 256", "soft", 12, "middle")
    picture.labelled(120, y + 150, 130, 26, "A: 16 × 256", "greenbox", 13)
    picture.labelled(300, y + 130, 26, 66, "", "greenbox")
    picture.text(313, y + 212, "B: 256 × 16", size=13, anchor="middle")
    picture.arrow(60, y + 70, 120, y + 60)
    picture.line((60, y + 82), (84, y + 82), (84, y + 163))
    picture.arrow(84, y + 163, 120, y + 163)
    picture.arrow(250, y + 163, 300, y + 163)
    picture.arrow(326, y + 163, 400, y + 76)
    picture.arrow(250, y + 60, 392, y + 64)
    picture.text(362, y + 140, "× s", size=14)
    picture.box(392, y + 52, 24, 24, "bluebox", corner=12)
    picture.text(404, y + 70, "+", size=17, anchor="middle")
    picture.arrow(416, y + 64, 456, y + 64)
    picture.y = y + 240
    picture.note("W x + s B A x. Only A and B are trained: 2 × 16 × 256 = 8,192",
                 "weights instead of 65,536. B begins at zero.")  # fmt: skip
    picture.save(path)


def lines_of(path):
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def smooth(values, width=5):
    """The mean of each value and its neighbours, `width` values in all."""
    half = width // 2
    return [mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def rewards(path, folder):
    """What GRPO logs, mean of the seeds, and the same with random rewards."""
    runs = [lines_of(file) for file in sorted((folder / "logs").glob("grpo_[0-9]_256.jsonl"))]
    (chance,) = map(lines_of, (folder / "logs").glob("chance_[0-9]_256.jsonl"))
    last = runs[0][-1]["step"]

    def curve(runs, name):
        found = [{line["step"]: line[name] for line in run if name in line} for run in runs]
        steps = sorted(set.intersection(*map(set, found)))
        values = [mean(of_run[step] for of_run in found) for step in steps]
        values = smooth(values) if len(values) > 20 else values
        return [(step / last, value) for step, value in zip(steps, values, strict=True)]

    picture = Picture()
    picture.heading(f"GRPO: {last} steps, mean of {len(runs)} seeds")
    names = {"reward": "green", "pass_at_1": "blue", "pass_at_k": "orange"}
    picture.note("Share of right answers: to the questions of the step (green),")
    picture.note("to held-out ones (blue), and best of 8 answers (orange)")
    place = axes(picture, 150, f"{last} steps", (0, 0.25, 0.5, 0.75, 1), form="{:.0%}")
    for name, css in names.items():
        picture.line(*[place(x, y) for x, y in curve(runs, name)], css=f"{css}line")
    picture.y += 4
    picture.note("Blue: rewards of the judge. Orange: random rewards, one seed.")
    panels = {
        "entropy": ("entropy of the next token, nats", (0, 0.3, 0.6)),
        "answer_tokens": ("tokens of an answer", (0, 20, 40)),
        "no_signal": ("no_signal: share of groups with equal rewards", (0, 0.5, 1)),
    }
    for name, (title, values) in panels.items():
        picture.text(52, picture.y + 6, title, size=13, bold=True)
        picture.y += 14
        place = axes(picture, 60, "", values, form="{:g}")
        for found, css in ((runs, "blueline"), ([chance], "orangeline")):
            picture.line(*[place(x, y) for x, y in curve(found, name)], css=css)
        picture.y -= 14
    picture.save(path, picture.y + 6)


def ways_to_learn(path, folder):
    """Accuracy and pass@16 of each way to learn sums, with the range of the seeds."""
    found = json.loads((folder / "rewards.json").read_text(encoding="utf-8"))
    titles = {
        "few": "50 solved sums", "longer": "the same, for longer", "dpo_sums": "DPO",
        "round1_of_1": "one round", "round3_of_3": "three rounds", "grpo": "GRPO",
    }  # fmt: skip
    picture = Picture()
    picture.heading("Of held-out sums, solved")
    picture.note("blue: accuracy; grey: pass@16; line: lowest to highest of three seeds")
    left, width = 150, WIDTH - 150 - 60
    for name, title in titles.items():
        picture.text(left - 8, picture.y + 19, title, anchor="end", size=13)
        for index, css in ((1, "bluebox"), (2, "greybox")):
            values = [result[index] for result in found[name].values()]
            picture.box(left, picture.y, width * mean(values), 13, css, corner=1)
            low, high = (left + width * of(values) for of in (min, max))
            picture.line((low, picture.y + 6.5), (high, picture.y + 6.5))
            picture.text(high + 6, picture.y + 11, f"{mean(values):.0%}", "ink", 12)
            picture.y += 15
        picture.y += 8
    picture.save(path)


def preferences(path, folder):
    """What DPO logs: the log-probabilities of both answers, and how often the chosen one gains."""
    log = lines_of(folder / "logs/dpo_1_256.jsonl")
    last, pairs = log[-1]["step"], {"logp_chosen": "blue", "logp_rejected": "orange"}
    picture = Picture()
    picture.heading("DPO on 400 pairs")
    picture.note("log p of the chosen answer (blue) and of the rejected one (orange)")
    picture.y += 6
    low = -10 * math.ceil(-min(line["logp_rejected"] for line in log) / 10)
    values = [low, low / 2, 0]
    place = axes(picture, 150, f"{last} steps", values, form="{:.0f}")
    for name, css in pairs.items():
        points = [place(line["step"] / last, line[name]) for line in log]
        picture.line(*points, css=f"{css}line")
    picture.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "out", help="the --save_dir of the demo"
    )
    parser.add_argument("--experiments", type=Path, default=ROOT / "out/experiments")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/pictures")
    args = parser.parse_args()
    models = {}
    for name in ("pretrain", "full_sft"):
        file = args.runs / f"{name}_256.pth"
        models[name], tokenizer = build_model(load(file), file)
        models[name].eval()
    torch.manual_seed(1)
    models["new"] = CausalLM(models["pretrain"].config).eval()
    run = args.experiments / "as_it_is_1"
    written = (run / "output.txt").read_text(encoding="utf-8")
    samples = re.findall(r"(?ms)^  (Nelina lives.*?)$(?=\n\S|\n  Nelina|\Z)", written)
    before_and_after(args.out / "before_and_after.svg", models, tokenizer)
    from_text_to_answer(args.out / "answer.svg", models, tokenizer)
    residual_stream(args.out / "stream.svg", models["pretrain"].config)
    attention_map(args.out / "attention.svg", models, tokenizer)
    loss_curve(args.out / "loss.svg", run, samples)
    symptoms(args.out / "symptoms.svg", args.experiments)
    mask_of_a_conversation(args.out / "mask.svg", tokenizer)
    packed_row(args.out / "packing.svg")
    schedules(args.out / "schedule.svg", args.runs)
    temperatures(args.out / "temperature.svg", models, tokenizer)
    lora_pair(args.out / "lora.svg")
    preferences(args.out / "preferences.svg", args.runs)
    ways_to_learn(args.out / "ways.svg", args.runs)
    rewards(args.out / "rewards.svg", args.runs)


if __name__ == "__main__":
    main()
