"""The widgets in JupyterLab and the explorer's page, in a real browser: what a reader moves, moves.

Needs chromium on the PATH. Screenshots are kept in build/screenshots.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from helpers.config import ROOT
from scripts.export_explorer import write_page
from tests.notebooks import copy_course

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
SHOTS = ROOT / "build" / "screenshots"
# Milliseconds, for a machine that is busy; what is waited for comes in one or two seconds.
PATIENCE = 120_000

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

CELLS = [
    (ROOT / "notebooks/setup_cell.py").read_text(encoding="utf-8").strip(),
    """
from helpers import load_or_build
from helpers.evaluation import class_embeds
from helpers.viz import widgets

model, val = load_or_build.heads(profile), load_or_build.data(profile, "val")
images, captions = load_or_build.gallery(profile, 6)
image_embeds, text_embeds = model.encode_images(images), model.encode_texts(captions)
names = ["car", "dog", "boat"]
name_embeds = class_embeds(model.encode_texts, names)""",
    "widgets.retrieval_box(model, images, image_embeds)",
    "widgets.own_picture(model, captions, text_embeds, names, name_embeds, True, val.path(0))",
    "widgets.explorer(model, val)",
]
SETTINGS = {
    # All cells are drawn, also those out of sight.
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false"},
}
FLAGS = "--no-browser --allow-root --expose-app-in-browser --ip=127.0.0.1 --IdentityProvider.token="


@pytest.fixture(scope="module")
def browser():
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        flags = ["--no-sandbox", "--disable-gpu"]
        browser = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab over a copy of the course, without the user's own settings."""
    root, home = tmp_path_factory.mktemp("course"), tmp_path_factory.mktemp("home")
    copy_course(root)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [new_code_cell(cell.strip()) for cell in CELLS]
    nbformat.write(new_notebook(cells=cells, metadata=kernel), root / "widgets.ipynb")
    for plugin, values in SETTINGS.items():
        path = home / "settings/@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "CLIP_PROFILE": "smoke", "CLIP_RESULTS": str(root / "results")}
    env["JUPYTERLAB_SETTINGS_DIR"] = str(home / "settings")
    env["JUPYTER_CONFIG_DIR"] = str(home / "config")
    flags = [*FLAGS.split(), f"--port={port}", f"--ServerApp.root_dir={root}"]
    with open(home / "log", "wb") as log:
        command = [sys.executable, "-m", "jupyterlab", *flags]
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    deadline = time.monotonic() + PATIENCE / 1000
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            early = server.poll() is None and time.monotonic() < deadline
            assert early, "JupyterLab did not start:\n" + (home / "log").read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def opened(browser, address):
    """A page that keeps what its console complains of."""
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.set_default_timeout(PATIENCE)
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda line: line.type == "error" and page.complaints.append(line.text))
    # The badge is all that comes from outside.
    badge = {"content_type": "image/svg+xml", "body": '<svg xmlns="http://www.w3.org/2000/svg"/>'}
    page.route("https://colab.research.google.com/**", lambda route: route.fulfill(**badge))
    page.goto(address)
    return page


@pytest.fixture(scope="module")
def boxes(browser, lab):
    """A sentence, an own picture and the explorer in a notebook in JupyterLab, all cells run."""
    page = opened(browser, f"{lab}/doc/tree/widgets.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    kernel = "jupyterapp?.shell.currentWidget?.context?.sessionContext?.session?.kernel"
    page.wait_for_function(kernel)
    run = "jupyterapp.commands.execute('notebook:run-all-cells')"
    late = "new Promise((_, late) => setTimeout(late, 600_000, 'not done after ten minutes'))"
    assert page.evaluate(f"Promise.race([{run}, {late}])"), "a cell failed"
    return [Box(page, number) for number in range(3)]


@pytest.fixture(scope="module")
def page(browser, smoke):
    """The explorer's page, opened as a file."""
    path = write_page(smoke, smoke.cache / "explorer.html", count=4)
    return opened(browser, path.as_uri())


@pytest.fixture(autouse=True)
def silent(browser, request):
    """No page's console has anything to complain of; each is photographed."""
    yield
    pages = [page for context in browser.contexts for page in context.pages]
    for i, page in enumerate(pages):
        page.screenshot(path=SHOTS / f"{request.node.name}-{i}.png", full_page=True)
        assert page.complaints == []


class Box:
    """One widget in a notebook: its controls by their labels, and its image."""

    def __init__(self, page, number):
        self.page = page
        self.root = page.locator(".jp-OutputArea-output .widget-vbox").nth(number)
        self.image = self.root.locator("img.widget-image")
        expect(self.image).to_be_visible(timeout=PATIENCE)

    def field(self, label):
        """The select, text or number field with this label."""
        return self.root.get_by_label(label, exact=True)

    def press(self, label, key, which=0):
        """Moves the handle of a slider with the keyboard."""
        slider = self.root.locator(".widget-slider").filter(has_text=label)
        self.changes(lambda: slider.locator(".noUi-handle").nth(which).press(key))

    def choose(self, name, **option):
        """Chooses an option of a dropdown, by its `index` or its `label`."""
        self.changes(lambda: self.field(name).select_option(**option))

    def type(self, field, text):
        """Types into a field, then Enter."""
        field.fill(text)
        field.press("Enter")

    def upload(self, path):
        with self.page.expect_file_chooser() as chooser:
            self.root.get_by_role("button", name="Upload a picture").click()
        chooser.value.set_files(path)

    def png(self):
        """The bytes that the image shows, as text."""
        return self.image.evaluate("async e => (await (await fetch(e.src)).blob()).text()")

    def changes(self, move):
        """Makes a move and waits until the image is another one."""
        before, address = self.png(), self.image.get_attribute("src")
        move()
        expect(self.image).not_to_have_attribute("src", address, timeout=PATIENCE)
        after = self.png()
        assert after != before and after.startswith("\ufffdPNG")

    def says(self, text):
        """The widget's message."""
        expect(self.root.get_by_role("alert")).to_contain_text(text)


def test_every_control_of_the_explorer(boxes):
    box = boxes[2]
    for label in ("Tower:", "Head:", "Seen from:"):
        expect(box.field(label)).to_be_disabled()
    box.press("Picture:", "ArrowRight")
    box.press("Layers:", "ArrowRight")
    box.press("Layers:", "ArrowLeft", which=1)
    box.press("Overlay:", "ArrowLeft")
    box.choose("Captions:", index=1)
    for method in ("flow", "rollout", "raw"):
        box.choose("Method:", label=method)
        expect(box.root.get_by_role("status")).to_contain_text("The caption cannot change the map")
    box.choose("Head:", label="2")
    box.press("Layer:", "ArrowLeft")
    box.choose("Seen from:", label="one patch")
    box.press("Row:", "ArrowRight")
    box.press("Column:", "ArrowLeft")
    box.choose("Tower:", label="text")
    box.choose("Seen from:", index=2)
    box.choose("Method:", label="relevance")


def test_captions_scenes_and_files_of_ones_own_in_the_explorer(boxes, tmp_path):
    box = boxes[2]
    field = box.field("Caption:")
    box.changes(lambda: box.type(field, "two red boats & <b>a dog</b>"))
    box.type(field, "")
    box.says("Type a caption")
    box.changes(lambda: box.type(field, "a boat"))
    expect(box.root.get_by_role("alert")).to_have_count(0)
    expect(box.field("Place:")).to_be_hidden()
    box.choose("Picture from:", label="a scene of yours")
    expect(box.field("Place:")).to_be_visible()
    box.choose("Object:", label="boat")
    Image.linear_gradient("L").rotate(30).convert("RGB").save(tmp_path / "mine.png")
    (tmp_path / "<b>bad.jpg").write_bytes(b"no picture at all")
    box.field("Picture from:").select_option(label="a file of yours")
    box.changes(lambda: box.upload(tmp_path / "mine.png"))
    box.upload(tmp_path / "<b>bad.jpg")
    box.says("<b>bad.jpg")
    box.choose("Picture from:", label="the gallery")


def test_a_sentence_and_a_picture_of_ones_own(boxes, tmp_path):
    sentence, own, _ = boxes
    sentence.changes(lambda: sentence.type(sentence.field("Sentence:"), "two boats"))
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "mine.jpg")
    own.changes(lambda: own.upload(tmp_path / "mine.jpg"))
    own.changes(lambda: own.type(own.field("Caption:"), "a red boat"))


def test_the_page_on_a_screen_and_on_a_phone_in_the_dark(page):
    def field(label):
        return page.get_by_label(label, exact=True)

    def map_shown():
        return page.locator("#map").evaluate("e => e.toDataURL()")

    def changes(move):
        before = map_shown()
        move()
        page.wait_for_function("new Promise(requestAnimationFrame)")
        assert map_shown() != before

    expect(page.get_by_role("status")).to_contain_text("Highest: the patch in row")
    assert page.get_by_role("radio").count() == 4
    changes(lambda: field("Caption").select_option(index=1))
    changes(lambda: field("All layers").press("ArrowLeft"))
    expect(field("Head")).to_be_disabled()
    for method in ("rollout", "flow", "raw"):
        changes(lambda method=method: field("Method").select_option(value=method))
        expect(page.locator("#limits")).to_contain_text("caption")
        before = map_shown()
        field("Caption").select_option(index=2)
        assert map_shown() == before, f"{method}: the caption cannot change the map"
        field("Caption").select_option(index=1)
    for head in ("2", "0"):
        changes(lambda head=head: field("Head").select_option(value=head))
    changes(lambda: field("Overlay").press("PageDown"))
    changes(lambda: field("One scale for all layers").press("Space"))
    field("Method").select_option(value="relevance")
    page.get_by_role("radio").first.focus()
    changes(lambda: page.keyboard.press("ArrowRight"))
    assert page.get_by_role("radio").nth(1).is_checked()
    page.get_by_role("button", name="Step through the layers").click()
    expect(page.locator("#layer-label")).to_have_text("The last layer")
    expect(page.locator("#layer-label")).to_have_text("All layers", timeout=PATIENCE)
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 840})
    inside = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert inside, "nothing sticks out at the side"
