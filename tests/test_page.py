"""The page of --serve and --export in a browser, by keyboard alone: its numbers are the model's."""

import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F

from model import generation
from model.causal_lm import CausalLM, ModelConfig
from model.chat_template import render
from model.generation import complete
from model.tokenizer import load_tokenizer
from serving import page as pages
from serving import server as serving
from serving.trace import trace
from tests.conftest import ROOT, opened, serving_at, write_jsonl

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TOKENIZER = load_tokenizer()
QUESTION = "Where does Nelina live?"
VIEWS = ("chat", "attention", "layers", "compare", "training")
DEFAULTS = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 8}
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


@pytest.fixture(scope="module")
def models():
    """Three of the demo's size. Random weights: numbers are compared, not answers read."""
    found = {}
    for seed, name in enumerate(("full_sft", "pretrain", "none")):
        torch.manual_seed(seed)
        model = CausalLM(ModelConfig()).eval()
        found[name] = opened(name, model, TOKENIZER, True, 768)
    return found


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    lines = [{"step": 1 + i, "loss": 8 / (1 + i), "val_loss": 0.9 if i == 8 else None, "lr": 1e-3}
             for i in range(9)]  # fmt: skip
    write_jsonl(folder / "pretrain_256.jsonl", lines)
    return folder


@pytest.fixture(scope="module")
def address(models, logs):
    server = serving.Server(models, "127.0.0.1", 0, 4, DEFAULTS, logs)
    with serving_at(server):
        yield f"http://127.0.0.1:{server.server_port}/"


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("there is no chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    """A new tab that notes the errors of its page."""
    tab = browser.new_page(viewport={"width": 1000, "height": 900})
    errors = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    yield tab
    tab.close()
    assert errors == []


def shown(tab, view, model="full_sft"):
    """Waits until a view has been drawn."""
    tab.wait_for_selector(f'body[data-shown^="{view} {model} "]')


def walk_to(tab, view):
    """Walks to a view with Tab and the arrow keys, from the top of the page."""
    tab.keyboard.press("Tab")
    tab.locator("#model").focus()
    tab.keyboard.press("Tab")
    tab.keyboard.press("Home")
    for _ in range(VIEWS.index(view)):
        tab.keyboard.press("ArrowRight")
    shown(tab, view)


def ask(tab, address, question=QUESTION):
    """Asks a question and waits for the answer; returns the ids of the conversation."""
    tab.goto(address)
    shown(tab, "chat")
    tab.locator("#question").focus()
    tab.keyboard.press("ControlOrMeta+a")
    tab.keyboard.type(question)
    tab.keyboard.press("Enter")
    prompt = prompt_of(question)
    wait_for_answer(tab, len(prompt))
    return tab.evaluate("state.ids")


def wait_for_answer(tab, length):
    tab.wait_for_selector(
        f'body[data-shown^="chat "]:not([data-shown$=" {length}"]) #stop:disabled'
    )
    tab.wait_for_selector("#chat-strip button[aria-label='the next token']")


def walk_to_last_token(tab):
    tab.locator("#chat-strip [aria-pressed=true]").focus()
    tab.keyboard.press("End")  # what comes after the text
    tab.keyboard.press("ArrowLeft")


def prompt_of(question):
    messages = [{"role": "user", "content": question}]
    return render(messages, add_generation_prompt=True, tokenizer=TOKENIZER)[0]


@torch.inference_mode()
def logits_of(model, ids):
    return model(torch.tensor([ids]))[0]


def test_chat_shows_what_the_model_expected(tab, address, models):
    ids = ask(tab, address)
    model = models["full_sft"].model
    (answer,) = complete(model, [prompt_of(QUESTION)], max_new_tokens=8, temperature=0)
    assert ids[: len(ids) - 8] == prompt_of(QUESTION) and ids[-8:] == answer
    chances = logits_of(model, ids).softmax(dim=-1)
    surprises = [-chances[i - 1, ids[i]].log().item() for i in range(len(ids) - 8, len(ids))]
    assert tab.evaluate("state.at") == len(ids) - 8 + surprises.index(max(surprises))
    walk_to_last_token(tab)
    for place in range(len(ids) - 1, 0, -1):
        heading = tab.locator("#chosen").inner_text()
        assert f"id {ids[place]}: " in heading
        p = float(re.search(r"probability ([\d.]+)", heading)[1])
        assert p == pytest.approx(chances[place - 1, ids[place]].item(), abs=1e-4)
        tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("End")
    assert tab.locator("#chosen").inner_text() == "The next token"
    top = chances[-1].topk(10)
    names = tab.locator("#alternatives .token").all_inner_texts()
    texts = [TOKENIZER.decode([i], skip_special_tokens=False) for i in top.indices.tolist()]
    assert [name.replace("␣", " ").replace("↵", "\n") for name in names] == texts


SETTINGS = [
    (0.7, 0, 1),
    (1.6, 0, 1),
    (1, 5, 1),
    (1.3, 0, 0.5),
    (0.8, 30, 0.05),
    (1, 9, 0.5),
    (0, 0, 1),
]


def test_the_bars_are_the_probabilities_of_sampling(tab, address, models, monkeypatch):
    ids, drawn, search = ask(tab, address), [], torch.searchsorted
    tab.locator("#chat-strip [aria-pressed=true]").focus()
    tab.keyboard.press("End")
    logits = logits_of(models["full_sft"].model, ids)[-1:]
    draw = lambda sums, *rest, **more: drawn.append(sums) or search(sums, *rest, **more)  # noqa: E731
    monkeypatch.setattr(generation.torch, "searchsorted", draw)
    for settings in SETTINGS:
        drawn.clear()
        token = generation.sample(logits, generation.SamplingParams(99, *settings), None)
        expected = F.one_hot(token[0, 0], logits.shape[1])
        if drawn:  # the sums of the probabilities up to each token
            expected = drawn[0][0].diff(prepend=torch.zeros(1))
        for name, value in zip(("temperature", "top_k", "top_p"), settings, strict=True):
            tab.locator(f"#{name}").fill(str(value))
        now, tokens = tab.evaluate("""() => { const seen = state.tokens, k = seen.top.length - 1;
            const logits = row(seen.values, k, seen.sizes.length);
            return [chances(logits, seen.sizes, settings()).slice(0, 10), seen.top[k]]; }""")
        assert now == pytest.approx([expected[i].item() for i in tokens], abs=1e-4), settings
        labels = tab.locator("#alternatives b").all_inner_texts()
        assert assign_parts(labels) == pytest.approx(now, abs=6e-4)


def assign_parts(labels):
    """The numbers of labels like "12.3 %"."""
    return [float(label.removesuffix(" %")) / 100 for label in labels]


def test_an_answer_goes_on_from_another_token(tab, address, models):
    ids = ask(tab, address)
    place = len(ids) - 6
    walk_to_last_token(tab)
    for _ in range(5):
        tab.keyboard.press("ArrowLeft")
    other = tab.evaluate("state.tokens.top[state.at - state.tokens.first - 1][1]")
    tab.locator("#alternatives button").nth(1).focus()
    tab.keyboard.press("Enter")
    wait_for_answer(tab, len(ids))
    begin = [*ids[:place], other]
    (answer,) = complete(models["full_sft"].model, [begin], max_new_tokens=8, temperature=0)
    assert tab.evaluate("state.ids") == begin + answer
    tab.locator("#new").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector('body[data-shown="chat full_sft 0"]')
    assert tab.locator("#chat-strip").inner_text() == ""


def test_attention_shows_what_each_head_reads(tab, address, models):
    ids = ask(tab, address)
    walk_to_last_token(tab)
    walk_to(tab, "attention")
    expected = trace(models["full_sft"].model, ids).attention  # (L, H, n, n)
    n = len(ids)
    found = attention_of(tab)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found.sum(dim=-1) - 1).abs().max() < 1e-3
    tab.locator("#heads [aria-pressed=true]").focus()
    for _ in range(2):
        tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowRight")  # layer 3, head 2
    assert tab.locator("#head-name").inner_text() == "Layer 3, head 2"
    tab.locator("#large").focus()
    for key, head in (("ArrowRight", "3"), ("ArrowLeft", "2")):
        tab.keyboard.press(key)
        assert tab.locator("#head-name").inner_text() == f"Layer 3, head {head}"
    for _ in range(4):
        tab.keyboard.press("ArrowUp")
    most = expected[2, 1, n - 6].topk(3)  # the token before the chosen one reads
    found = assign_parts(tab.locator("#reads b").all_inner_texts()[:3])
    assert found == pytest.approx(most.values.tolist(), abs=6e-4)
    tab.locator("#attention-strip [aria-pressed=true]").focus()
    tab.keyboard.press("Home")
    assert tab.locator("#reads b").all_inner_texts() == ["100.0 %"]  # itself
    for button in tab.locator("#heads button").all():
        assert "reads 100.0 %" in button.get_attribute("aria-label")


def attention_of(tab):
    """The weights that the view has, (L, H, n, n)."""
    found = tab.evaluate("[Array.from(state.attended.shares), state.attended.ids.length]")
    return torch.tensor(found[0]).view(3, 4, found[1], found[1])


def test_a_packed_row_shows_what_may_not_be_read(tab, address, models):
    ids = ask(tab, address)
    walk_to(tab, "attention")
    tab.locator("#packing").focus()
    tab.keyboard.press("Space")
    second = prompt_of(pages.SECOND)
    tab.wait_for_selector(f"#attention-strip .token >> nth={len(ids) + len(second) - 1}")
    assert tab.evaluate("state.attended.ids") == ids + second
    found = attention_of(tab)
    assert found[:, :, len(ids) :, : len(ids)].max() == 0
    alone = trace(models["full_sft"].model, second).attention
    torch.testing.assert_close(found[:, :, len(ids) :, len(ids) :], alone, atol=1e-4, rtol=0)
    assert tab.locator("#packed-note").is_visible()
    labels = [t.get_attribute("title") for t in tab.locator("#attention-strip .token").all()]
    assert labels[: len(ids)] == ["of the other sample"] * len(ids)
    assert "read" in labels[len(ids)]


def test_layers_show_what_each_would_predict(tab, address, models):
    ids = ask(tab, address)
    walk_to_last_token(tab)
    tab.keyboard.press("ArrowRight")  # what comes after the text: the last token predicts it
    walk_to(tab, "layers")
    logits = logits_of(models["full_sft"].model, ids)
    p, tokens = logits.softmax(dim=-1).max(dim=-1)
    last = tab.evaluate("""async () => {
        const seen = await ask("layers", { ids: state.ids }), n = seen.ids.length;
        const values = numbers(seen.probabilities, Float32Array).slice(-5 * n);
        return seen.guesses.at(-1).map((ids, i) => [ids[0], values[5 * i]]); }""")
    assert [token for token, _ in last] == tokens.tolist()
    assert [value for _, value in last] == pytest.approx(p.tolist(), abs=1e-4)
    cells = tab.locator("#grid tbody tr").last.locator("td")
    assert cells.count() == 4
    assert cells.last.locator("small").inner_text() == str(round(100 * p[-1].item()))
    tab.locator("#grid td[tabindex='0']").focus()
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowUp")
    assert "layer 2" in tab.locator("#guess-name").inner_text()
    expected = trace(models["full_sft"].model, ids).probabilities[2, len(ids) - 2]
    found = assign_parts(tab.locator("#guesses b").all_inner_texts())
    assert found == pytest.approx(expected.tolist(), abs=6e-4)
    follows = tab.evaluate("[...document.querySelectorAll('#grid .follows')].length")
    guesses = trace(models["full_sft"].model, ids).guesses[:, :-1, 0]
    assert follows == (guesses == torch.tensor(ids[1:])).sum().item()


def test_three_models_read_the_same_text(tab, address, models):
    tab.goto(address)
    shown(tab, "chat")
    walk_to(tab, "compare")
    messages = [{"role": "user", "content": QUESTION}]
    messages += [{"role": "assistant", "content": "She lives at the well."}]
    ids, mask = render(messages, tokenizer=TOKENIZER)
    table = [row.split("\t") for row in tab.locator("#compared table").inner_text().split("\n")]
    kept = torch.tensor(mask[1:]).bool()
    for name, *values in table[1:]:
        loss = F.cross_entropy(
            logits_of(models[name].model, ids)[:-1], torch.tensor(ids[1:]), reduction="none"
        )
        expected = [loss[kept].mean(), loss[~kept].mean(), loss.mean()]
        assert [float(v) for v in values] == pytest.approx([e.item() for e in expected], abs=6e-4)
    assert [row[0] for row in table[1:]] == ["none", "pretrain", "full_sft"]
    supervised = tab.locator("#compared .strip >> nth=0").locator(".supervised")
    assert supervised.all_inner_texts() == [
        TOKENIZER.decode([i], skip_special_tokens=False)
        for i, on in zip(ids, mask, strict=True)
        if on
    ]
    strips = tab.locator("#compared .strip")
    assert strips.count() == 4  # and the change from pretrain to full_sft
    strips.last.locator("[aria-pressed=true]").focus()
    tab.keyboard.press("ArrowLeft")
    place = tab.evaluate("state.compared")
    loss = {
        name: -logits_of(models[name].model, ids)[place - 1].log_softmax(-1)[ids[place]].item()
        for name in ("pretrain", "full_sft")
    }
    change = strips.last.locator("[aria-pressed=true]").get_attribute("title")
    assert float(change.split()[1]) == pytest.approx(loss["full_sft"] - loss["pretrain"], abs=0.006)


def test_the_conversation_of_the_chat_can_be_compared(tab, address):
    ask(tab, address)
    walk_to(tab, "compare")
    tab.locator("#take").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#compared")
    found = json.loads(tab.locator("#text").input_value())
    assert found[0] == {"role": "user", "content": QUESTION}
    assert found[1]["role"] == "assistant"


def test_training_shows_curves_that_move_and_tokens(tab, address, logs):
    tab.goto(address)
    shown(tab, "chat")
    walk_to(tab, "training")
    tab.locator("#step").focus()
    tab.keyboard.press("End")
    row = tab.locator("#values tr").last.inner_text().split()
    assert row == ["pretrain_256", "9", "0.8889", "0.9", "0.001"]
    with (logs / "pretrain_256.jsonl").open("a") as file:
        file.write('{"step": 10, "loss": 0.5, "val_loss": null, "lr": 0.0005}\n{"step": 11, "lo')
    tab.wait_for_selector("#step[max='10']", state="attached", timeout=10_000)
    tab.locator("#words").focus()
    tab.keyboard.press("ControlOrMeta+a")
    tab.keyboard.type(" Nelina lives")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#token-strip .token:has-text('lives')")
    tab.locator("#token-strip [aria-pressed=true]").focus()
    tab.keyboard.press("End")
    tab.wait_for_selector("#merged:has-text('lives')")
    steps = tab.locator("#merges li").all_inner_texts()
    assert steps[0].replace(" ", "") == "␣|l|i|v|e|s" and steps[-1].strip() == "lives"
    assert tab.locator("#neighbours li").count() == 10


def test_a_hostile_conversation_is_shown_as_text(tab, address, models, tmp_path):
    ids = ask(tab, address, HOSTILE)
    text = tab.locator("#chat-strip").inner_text()
    assert "script" in text and TOKENIZER.decode(ids, skip_special_tokens=False).count(HOSTILE) == 1
    for view in VIEWS[1:3]:
        walk_to(tab, view)
    walk_to(tab, "compare")
    tab.locator("#text").fill(json.dumps([{"role": "user", "content": HOSTILE}] * 2))
    tab.get_by_role("button", name="Compare").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#compared .token >> nth=150")
    walk_to(tab, "training")
    tab.locator("#words").fill(HOSTILE)
    tab.locator("#cut button").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#token-strip .token >> nth=30")
    path = tmp_path / "hostile.html"
    pages.export(models, path, HOSTILE, {"max_new_tokens": 4, "temperature": 0}, tmp_path)
    assert tab.evaluate("window.hacked") is None
    tab.goto(path.as_uri())
    shown(tab, "chat")
    assert tab.evaluate("[window.hacked, document.scripts.length, document.images.length]") == [
        None,
        2,
        0,
    ]


@pytest.mark.parametrize("width", [320, 768])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_fits_and_can_be_read(browser, address, width, scheme):
    tab = browser.new_page(viewport={"width": width, "height": 640}, color_scheme=scheme)
    ask(tab, address)
    for view in VIEWS:
        walk_to(tab, view)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        for button in tab.get_by_role("button").all():
            assert button.get_attribute("aria-label") or button.inner_text().strip()
        # The contrast of every token and cell, as WCAG defines it: 4.5 for text of this size.
        contrast = tab.evaluate("""() => {
          const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
          const light = (c) => [0.2126, 0.7152, 0.0722].reduce((all, part, i) => all + part *
            (c[i] <= 10.3 ? c[i] / 255 / 12.92 : ((c[i] / 255 + 0.055) / 1.055) ** 2.4), 0);
          const page = rgb(getComputedStyle(document.body).backgroundColor);
          const found = [...document.querySelectorAll(".token, #grid td, .about, th")];
          return Math.min(...found.filter((e) => e.offsetParent).map((e) => {
            const [r, g, b, alpha = 1] = rgb(getComputedStyle(e).backgroundColor);
            const back = light([r, g, b].map((x, i) => alpha * x + (1 - alpha) * page[i]));
            const ink = light(rgb(getComputedStyle(e).color));
            return (Math.max(back, ink) + 0.05) / (Math.min(back, ink) + 0.05);
          }));
        }""")
        assert contrast >= 4.5, view
    back = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
    tab.close()


def test_an_exported_page_needs_no_server(browser, models, logs, tmp_path):
    path = tmp_path / "look.html"
    settings = {"max_new_tokens": 6, "temperature": 0}
    pages.export(models, path, QUESTION, settings, logs)
    assert path.stat().st_size < 1_000_000
    context = browser.new_context(offline=True)
    tab, requests, errors = context.new_page(), [], []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(path.as_uri())
    shown(tab, "chat")
    (answer,) = complete(models["full_sft"].model, [prompt_of(QUESTION)], **settings)
    assert tab.evaluate("state.ids") == prompt_of(QUESTION) + answer
    assert tab.locator("#question").count() == 0
    for view in VIEWS:
        walk_to(tab, view)
        assert tab.locator("#notice").inner_text() == ""
    walk_to(tab, "attention")
    tab.locator("#packing").press("Space")
    tab.wait_for_selector("#packed-note:visible")
    tab.locator("#model").select_option("none")
    shown(tab, "attention", "none")
    expected = trace(models["none"].model, tab.evaluate("state.ids")).attention
    tab.locator("#packing").press("Space")
    tab.wait_for_selector("#packed-note:not(:visible)", state="attached")
    torch.testing.assert_close(attention_of(tab), expected, atol=1e-5, rtol=0)
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert errors == []
    context.close()


LATE = """() => {
  const real = window.fetch;
  window.fetch = async (...given) => {
    const answer = await real(...given);
    if (given[1].body.includes("pretrain")) await new Promise((done) => setTimeout(done, 500));
    return answer;
  };
}"""
HELD = """() => {
  const real = events, open = new Promise((done) => { window.release = done; });
  events = async function* (answer) {
    for await (const part of real(answer)) { await open; yield part; }
  };
}"""


def test_an_answer_that_comes_too_late_is_not_shown(tab, address, models):
    """The server is slow for one model; the user has chosen another one meanwhile."""
    ask(tab, address)
    walk_to(tab, "attention")
    tab.evaluate(LATE)
    tab.locator("#model").select_option("pretrain")
    tab.locator("#model").select_option("none")
    shown(tab, "attention", "none")
    tab.wait_for_timeout(700)
    expected = trace(models["none"].model, tab.evaluate("state.ids")).attention
    torch.testing.assert_close(attention_of(tab), expected, atol=1e-5, rtol=0)
    assert tab.locator("#notice").inner_text() == ""


def test_another_action_ends_an_answer_that_is_being_written(tab, address):
    tab.goto(address)
    shown(tab, "chat")
    for action in ("new", "stop token"):
        tab.evaluate(HELD)
        tab.locator("#question").fill(QUESTION)
        tab.locator("#question").press("Enter")
        tab.wait_for_selector("#chat-strip .live", state="attached")
        assert tab.locator("#send").is_disabled() and tab.locator("#model").is_disabled()
        expected = []
        if action == "new":
            tab.locator("#new").press("Enter")
        else:
            end = "state.tokens.top.at(-2)[0] = 2; state.tokens.names[2] = '<|im_end|>';"
            tab.evaluate(f"() => {{ {end} showChat(); }}")
            tab.locator("#alternatives button").first.press("Enter")
            expected = [*prompt_of(QUESTION)[:-1], 2]
        tab.wait_for_selector("#stop:disabled")
        tab.evaluate("window.release()")
        tab.wait_for_timeout(300)
        assert tab.evaluate("state.ids") == expected
        assert tab.locator("#send").is_enabled() and tab.locator("#model").is_enabled()


def test_the_page_of_the_tutorial_is_the_present_one():
    """docs/look_inside.html, but for its data; bench/page.py --pictures writes it anew."""
    text = (ROOT / "docs/look_inside.html").read_text(encoding="utf-8")
    template = (ROOT / "serving/page.html").read_text(encoding="utf-8")
    before, after = template.split("<!-- data -->")
    assert text.startswith(before) and text.endswith(after) and len(text.encode()) < 1_000_000
