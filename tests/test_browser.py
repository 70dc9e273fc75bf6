"""The widgets in JupyterLab and the explorer's page, in a real browser: what a reader moves changes what a reader sees.

Needs Debian's chromium, or another one on the PATH. Screenshots are kept in build/screenshots.
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from helpers.config import ROOT
from scripts.export_explorer import write_page

COURSE = ROOT / "notebooks/07_attention_flow.ipynb"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SHOTS = ROOT / "build" / "screenshots"
PATIENCE = 120_000  # milliseconds, for a machine that is busy; what is waited for comes in one or two seconds

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

CELLS = [
    (ROOT / "scripts/setup_cell.py").read_text(encoding="utf-8").strip(),
    """
from helpers import load_or_build
from helpers.viz import widgets
from helpers.evaluation import class_embeds

val = artifacts.data(profile, "val")
model = artifacts.heads(profile)
images, captions = artifacts.gallery(profile, 6)
image_embeds, text_embeds = model.encode_images(images), model.encode_texts(captions)
names = ["car", "dog", "boat"]""",
    "widgets.matrix_explorer(images, captions, text_embeds @ image_embeds.T)",
    "widgets.temperature_slider(images, image_embeds, captions, text_embeds)",
    """
name_embeds = class_embeds(model.encode_texts, names)
widgets.own_picture(model, captions, text_embeds, names, name_embeds, profile.rendered, start=val.path(0))""",
]


@pytest.fixture(scope="module")
def browser():
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab over a copy of the course, with nothing of the user's own settings."""
    root, home = tmp_path_factory.mktemp("course"), tmp_path_factory.mktemp("home")
    for folder in ("helpers", "assets", "scripts"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "notebooks").mkdir()
    shutil.copy(COURSE, root / "notebooks")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [new_code_cell(cell.strip()) for cell in CELLS]
    nbformat.write(new_notebook(cells=cells, metadata=kernel), root / "notebooks/w.ipynb")
    for plugin, wanted in {
        "notebook-extension/tracker": {
            "windowingMode": "none"
        },  # all cells are drawn, also those out of sight
        "apputils-extension/notification": {"fetchNews": "false"},
    }.items():
        path = home / "settings/@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(wanted))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "CLIP_PROFILE": "smoke", "CLIP_RESULTS": str(root / "results")}
    env |= {
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
    }
    flags = [
        "--no-browser",
        "--allow-root",
        "--expose-app-in-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={root}",
    ]
    address = f"http://127.0.0.1:{port}"
    with open(home / "log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *flags], env=env, stdout=log, stderr=log
        )
    try:
        for _ in range(240):
            assert server.poll() is None, (home / "log").read_text()
            try:
                urllib.request.urlopen(f"{address}/api", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail("JupyterLab did not start:\n" + (home / "log").read_text())
        yield address
    finally:
        server.terminate()
        server.wait(30)


def opened(browser, address):
    """A page that keeps what its console complains of."""
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.set_default_timeout(PATIENCE)
    page.complaints = []
    page.on(
        "console",
        lambda message: page.complaints.append(message.text) if message.type == "error" else None,
    )
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    badge = {"content_type": "image/svg+xml", "body": '<svg xmlns="http://www.w3.org/2000/svg"/>'}
    page.route(
        "https://colab.research.google.com/**", lambda route: route.fulfill(**badge)
    )  # all that comes from outside
    page.goto(address)
    return page


def executed(browser, lab, name):
    """A notebook in JupyterLab, all cells run."""
    page = opened(browser, f"{lab}/doc/tree/notebooks/{name}?reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function(
        "jupyterapp?.shell.currentWidget?.context?.sessionContext?.session?.kernel"
    )
    run = "jupyterapp.commands.execute('notebook:run-all-cells')"
    late = "new Promise((_, late) => setTimeout(late, 600_000, 'not done after ten minutes'))"
    assert page.evaluate(f"Promise.race([{run}, {late}])"), "a cell failed"
    return page


@pytest.fixture(scope="module")
def notebook(browser, lab):
    """The widgets in a small notebook."""
    page = executed(browser, lab, "w.ipynb")
    yield page
    page.close()


@pytest.fixture(scope="module")
def explored(browser, lab):
    """Notebook 07, with the explorer."""
    page = executed(browser, lab, COURSE.name)
    yield page
    page.close()


@pytest.fixture(autouse=True)
def silent(request):
    """The browser's console has nothing to complain of."""
    yield
    for name in {"notebook", "explored", "page"} & set(request.fixturenames):
        assert request.getfixturevalue(name).complaints == []


class Box:
    """One widget in a notebook: its controls by their labels, and its picture."""

    def __init__(self, page, text, without=None):
        self.root = page.locator(".jp-OutputArea-output .widget-vbox").filter(
            has_text=text, has_not_text=without
        )
        self.image = self.root.locator("img.widget-image")
        expect(self.image).to_be_visible(timeout=PATIENCE)

    def field(self, label):
        """The select, text or number field with this label."""
        return self.root.get_by_label(label, exact=True)

    def handle(self, label, which=0):
        """The handle of a slider, as the keyboard reaches it."""
        return (
            self.root.locator(".widget-slider")
            .filter(has_text=label)
            .locator(".noUi-handle")
            .nth(which)
        )

    def bytes(self):
        """What the picture shows, as PNG."""
        script = """async e => { const all = new Uint8Array(await (await fetch(e.src)).arrayBuffer());
                                return btoa(all.reduce((told, byte) => told + String.fromCharCode(byte), "")) }"""
        return base64.b64decode(self.image.evaluate(script))

    def changes(self, move):
        """Makes a move and waits until the picture is another one."""
        before, address = self.bytes(), self.image.get_attribute("src")
        move()
        expect(self.image).not_to_have_attribute("src", address, timeout=PATIENCE)
        after = self.bytes()
        assert after != before and after.startswith(b"\x89PNG")

    def shoot(self, name):
        self.root.scroll_into_view_if_needed()
        self.root.screenshot(path=SHOTS / f"{name}.png")


def test_every_control_of_the_explorer(explored):
    box = Box(explored, "Method:")
    box.shoot("explorer-relevance")
    for label in ("Tower:", "Head:", "Seen from:"):
        expect(box.field(label)).to_be_disabled()
    for label, which in (("Picture:", 0), ("Layers:", 0), ("Layers:", 1), ("Overlay:", 0)):
        move = "ArrowLeft" if which or label == "Overlay:" else "ArrowRight"
        box.changes(lambda at=(label, which), move=move: box.handle(*at).press(move))
    box.changes(lambda: box.field("Captions:").select_option(index=1))
    number = box.root.get_by_role("spinbutton")
    box.changes(lambda: (number.fill("0.5"), number.press("Enter")))
    box.changes(lambda: (number.fill("0"), number.press("Enter")))
    for method in ("flow", "rollout", "raw"):
        box.changes(lambda method=method: box.field("Method:").select_option(label=method))
        expect(box.root.get_by_role("status")).to_contain_text("The caption cannot change the map")
        box.shoot(f"explorer-{method}")
    box.changes(lambda: box.field("Head:").select_option(label="2"))
    box.changes(lambda: box.handle("Layer:").press("ArrowLeft"))
    box.changes(lambda: box.field("Seen from:").select_option(label="one patch"))
    box.changes(lambda: box.handle("Row:").press("ArrowRight"))
    box.changes(lambda: box.handle("Column:").press("ArrowLeft"))
    box.shoot("explorer-patch")
    box.changes(lambda: box.field("Tower:").select_option(label="text"))
    box.changes(lambda: box.field("Seen from:").select_option(index=2))
    box.shoot("explorer-word")
    box.changes(lambda: box.field("Method:").select_option(label="relevance"))


def test_a_caption_is_typed(explored):
    box = Box(explored, "Method:")
    field = box.field("Caption:")
    box.changes(lambda: (field.fill("two red boats & <b>a dog</b>"), field.press("Enter")))
    box.shoot("explorer-typed")
    field.fill("")
    field.press("Enter")
    expect(box.root.get_by_role("alert")).to_contain_text("Type a caption")
    box.changes(lambda: (field.fill("a boat"), field.press("Enter")))
    expect(box.root.get_by_role("alert")).to_have_count(0)


def test_a_scene_is_composed(explored):
    box = Box(explored, "Method:")
    expect(box.field("Place:")).to_be_hidden()
    box.changes(lambda: box.field("Picture from:").select_option(label="a scene of yours"))
    expect(box.field("Place:")).to_be_visible()
    box.changes(lambda: box.field("Object:").select_option(label="boat"))
    box.shoot("explorer-scene")


def test_a_file_is_uploaded(explored, tmp_path):
    Image.linear_gradient("L").rotate(30).convert("RGB").save(tmp_path / "mine.png")
    (tmp_path / "<b>bad.jpg").write_bytes(b"no picture at all")
    box = Box(explored, "Method:")
    box.field("Picture from:").select_option(label="a file of yours")
    button = box.root.get_by_role("button", name="Upload a picture")
    box.changes(lambda: choose(explored, button, tmp_path / "mine.png"))
    box.shoot("explorer-upload")
    choose(explored, button, tmp_path / "<b>bad.jpg")
    expect(box.root.get_by_role("alert")).to_contain_text("<b>bad.jpg is no whole picture")
    box.changes(lambda: box.field("Picture from:").select_option(label="the gallery"))


def choose(page, button, path):
    with page.expect_file_chooser() as chooser:
        button.click()
    chooser.value.set_files(path)


def test_the_matrix_of_similarities(notebook):
    box = Box(notebook, "Caption no.:")
    box.changes(lambda: box.handle("Caption no.:").press("ArrowRight"))
    box.changes(lambda: box.handle("Picture no.:").press("End"))
    box.shoot("matrix")


def test_the_temperature(notebook):
    box = Box(notebook, "Factor:")
    box.changes(lambda: box.handle("Factor:").press("ArrowRight"))
    box.changes(lambda: box.handle("Picture:").press("ArrowRight"))
    box.shoot("temperature")


def test_a_picture_of_ones_own(notebook, tmp_path):
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "mine.jpg")
    (tmp_path / "empty.png").write_bytes(b"")
    box = Box(notebook, "This model has seen drawings", without="Method:")
    button = box.root.get_by_role("button", name="Upload a picture")
    box.changes(lambda: choose(notebook, button, tmp_path / "mine.jpg"))
    field = box.field("Caption:")
    box.changes(lambda: (field.fill("a red boat"), field.press("Enter")))
    box.shoot("own-picture")
    choose(notebook, button, tmp_path / "empty.png")
    expect(box.root.get_by_role("alert")).to_contain_text("empty.png is no whole picture")


@pytest.fixture(scope="module")
def page(browser, smoke):
    """The explorer's page, opened as a file."""
    path = write_page(smoke, smoke.cache / "explorer.html", count=4)
    page = opened(browser, path.as_uri())
    yield page
    page.close()


def test_the_page(page):
    def seen():
        return page.locator("#map").evaluate("e => e.toDataURL()"), page.locator(
            "main"
        ).inner_text()

    def changes(label, move, what=0):
        before = seen()[what]
        move(page.get_by_label(label, exact=True))
        page.wait_for_function("new Promise(requestAnimationFrame)")
        assert seen()[what] != before, label

    expect(page.get_by_role("status")).to_contain_text("Highest: the patch in row")
    assert page.get_by_role("radio").count() == 4
    changes("Caption", lambda e: e.select_option(index=1))
    changes("All layers", lambda e: e.press("ArrowLeft"))
    expect(page.get_by_label("Head", exact=True)).to_be_disabled()
    for method in ("rollout", "flow", "raw"):
        changes("Method", lambda e, method=method: e.select_option(value=method))
        expect(page.locator("#limits")).to_contain_text("caption")
        before = seen()[0]
        page.get_by_label("Caption", exact=True).select_option(index=2)
        assert seen()[0] == before, f"{method}: the caption cannot change the map"
        page.get_by_label("Caption", exact=True).select_option(index=1)
    for head in ("2", "0"):  # a mean of heads is never the highest of all
        changes("Head", lambda e, head=head: e.select_option(value=head))
    changes("Overlay", lambda e: e.press("PageDown"))
    changes("One scale for all layers", lambda e: e.press("Space"))
    page.screenshot(path=SHOTS / "page-raw.png", full_page=True)
    page.get_by_label("Method", exact=True).select_option(value="relevance")
    page.get_by_role("radio").first.focus()
    before = seen()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("radio").nth(1).is_checked() and seen()[0] != before[0]
    page.get_by_role("button", name="Step through the layers").click()
    expect(page.locator("#layer-label")).to_have_text("The last layer")
    expect(page.locator("#layer-label")).to_have_text("All layers", timeout=PATIENCE)
    page.screenshot(path=SHOTS / "page-relevance.png", full_page=True)


def test_the_page_on_a_phone_and_in_the_dark(page):
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 840})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
        "nothing sticks out at the side"
    )
    page.screenshot(path=SHOTS / "page-phone.png", full_page=True)
