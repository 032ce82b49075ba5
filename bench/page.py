"""How long each view of the page takes, in Chromium, with the demo's models:

    make demo
    python bench/page.py              # a minute; needs playwright and chromium
    python bench/page.py --pictures   # then draws the screenshots of the tutorial, and its example

A time is from the choice of a view to the picture on the screen: the request, the model's work and
the drawing. Medians of five.
"""

import argparse
import platform
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import ROOT
from model.tokenizer import load_tokenizer

VIEWS = ("chat", "attention", "layers", "compare", "training")
QUESTION = "Where does Nelina live?"
WEIGHTS = ["--weight", "full_sft,pretrain,none"]
DRAW = """async (view) => {
  answers.clear(); state.tokens = null; delete document.body.dataset.shown;
  const began = performance.now();
  choose(view);
  while (!document.body.dataset.shown) await new Promise((next) => setTimeout(next, 1));
  for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame);
  return performance.now() - began;
}"""


@contextmanager
def served(folder):
    """The address of a server of the weights in a folder."""
    command = [sys.executable, ROOT / "eval_llm.py", "--serve", "0", "--save_dir", folder, *WEIGHTS]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as p:
        try:
            yield next(line.split()[0] for line in p.stdout if line.startswith("http://"))
        finally:
            p.terminate()


def times(tab):
    """Prints the milliseconds of each view, for 32 and 256 tokens."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ids = load_tokenizer().encode(text).ids
    print("tokens  " + "".join(f"{view:>11}" for view in VIEWS))
    for T in (32, 256):
        tab.evaluate("(ids) => changed(ids)", ids[:T])
        tab.evaluate("(text) => { $('text').value = text; }", load_tokenizer().decode(ids[: T - 1]))
        rows = [[tab.evaluate(DRAW, view) for view in VIEWS] for _ in range(5)]
        print(f"{T:6}  " + "".join(f"{median(row):8.0f} ms" for row in zip(*rows, strict=True)))


def pictures(browser, address):
    """The screenshots, each at the place that the chapter writes about; from the tabs down to the
    end of an element.
    """
    tab = browser.new_page(viewport={"width": 480, "height": 600}, device_scale_factor=1.5)
    tab.goto(address)
    tab.locator("#question").fill(QUESTION)
    tab.keyboard.press("Enter")
    tab.wait_for_selector('body[data-shown$=" 25"] #stop:disabled')

    def shoot(name, first, last):
        tab.mouse.move(0, 0)
        tab.evaluate("scrollTo(0, 0)")
        top = tab.locator(first).first.bounding_box()
        end = tab.locator(last).first.bounding_box()
        height = end["y"] + end["height"] - top["y"] + 10
        clip = {"x": 0, "y": max(0, top["y"] - 6), "width": 480, "height": height}
        path = ROOT / "docs" / "pictures" / f"page_{name}.png"
        tab.screenshot(path=path, full_page=True, clip=clip)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")

    def choose(view):
        tab.click(f"#tab-{view}")
        tab.wait_for_selector(f'body[data-shown^="{view} "]')

    tab.locator("#temperature").fill("1.5")
    shoot("chat", "#tabs", "#settings")
    choose("attention")
    tab.locator("#heads button").nth(6).click()
    shoot("attention", "#tabs", "#reads")
    choose("layers")
    tab.locator("#grid td[aria-label^='after  the, layer 1']").click()
    shoot("layers", "#tabs", "#grid")
    choose("compare")
    shoot("models", "#compared h2", "#compared table")
    choose("training")
    shoot("training", "#tabs", "#values")
    shoot("tokens", "#words", "#neighbours")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--save_dir", type=Path, default=ROOT / "out", help="folder of weights")
    parser.add_argument("--pictures", action="store_true", help="draw the pictures of the tutorial")
    args = parser.parse_args()
    size = (ROOT / "serving" / "page.html").stat().st_size
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"page.html: {size / 1000:.0f} kB")
    with served(args.save_dir) as address, sync_playwright() as driver:
        path = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1000, "height": 900})
        tab.goto(address)
        tab.wait_for_selector("body[data-shown]")
        times(tab)
        if args.pictures:
            pictures(browser, address)
            export = ["--export", ROOT / "docs" / "look_inside.html", "--prompt", QUESTION]
            script = [sys.executable, ROOT / "eval_llm.py", "--save_dir", args.save_dir]
            subprocess.run([*script, *WEIGHTS, *export], check=True)


if __name__ == "__main__":
    main()
