"""The notebook as a person meets it: in JupyterLab, in a browser, with a mouse, a keyboard and a finger."""

import base64
import io
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest
from matplotlib import image as png
from playwright.sync_api import expect, sync_playwright

from tests.rig.processes import clean_environment, free_port, need, run
from tests.rig.project import ROOT
from tests.rig.tutorial import CODE, NOTEBOOK, PICTURES, assert_is_a_picture, images_of, make_small_tutorial

pytestmark = pytest.mark.timeout(1800)

RESULTS = ROOT / "test-results"
SETTINGS = {
    # All cells are in the page, even those that are not in view.
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none", "scrollPastLastCell": False},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
MINUTES = 60_000  # Playwright counts milliseconds. The limits are for a busy machine.

# JupyterLab shows what a cell raises as it shows standard error.
ERROR = (
    'document.querySelector(\'[data-mime-type$="jupyter.error"], [data-mime-type$="stderr"]\')?.textContent'
)
LOG = "[...document.querySelectorAll('.jp-CodeCell')][n].textContent.match(/Epoch: 1 [(].*/s)?.[0]"
PROMPT = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].at(-1).textContent.match(/[0-9]/)"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with all of the notebook, and little data."""
    folder = make_small_tutorial(tmp_path_factory.mktemp("browser") / "project")
    shutil.copy(ROOT / "notebooks" / "draw.js", folder / "notebooks")
    shutil.copy(ROOT / "Dockerfile", folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    if not (program := shutil.which("google-chrome")):
        need("chromium", "chromium")
        program = shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=QUIET.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(project, browser):
    """JupyterLab in the project, with settings and folders of its own. Returns its address."""
    home = project.parent / "home"
    for name, settings in SETTINGS.items():
        file = home / "settings" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment = {name: home / name.lower() for name in folders} | {
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
        "PATH": "",  # neither kubectl nor docker
        "OMP_NUM_THREADS": 1,  # threads that wait for each other are slow where other tests run
    }
    port = free_port()
    flags = f"--no-browser --allow-root --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0"
    token = ["--IdentityProvider.token=", f"--ServerApp.root_dir={project}"]
    command = [sys.executable, "-m", "jupyterlab", *flags.split(), *token]
    with open(project.parent / "lab.log", "wb") as log:
        server = subprocess.Popen(
            command, env=clean_environment(**environment), cwd=project, stdout=log, stderr=log
        )
    yield f"http://127.0.0.1:{port}"
    server.send_signal(signal.SIGTERM)  # it ends its kernels, too
    server.wait(60)


@pytest.fixture(scope="module")
def notebook(lab, browser):
    """The notebook in JupyterLab, after Run All Cells. `live` is the trainer's log when it began."""
    context = browser.new_context(viewport={"width": 1280, "height": 1600}, has_touch=True)
    context.set_default_timeout(2 * MINUTES)
    page = context.new_page()
    page_errors = []
    page.on("pageerror", lambda error: page_errors.append(error))
    expect.set_options(timeout=2 * MINUTES)
    connect(page, f"{lab}/doc/tree/notebooks/mnist.ipynb")
    cells = page.locator(".jp-Notebook .jp-CodeCell")
    expect(cells).to_have_count(len(CODE))
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    # Where a cell fails, those below never run.
    wait = {"timeout": 15 * MINUTES, "polling": 50}
    live = page.wait_for_function(
        f"n => {ERROR} || {LOG}", arg=number("run-the-trainer"), **wait
    ).json_value()
    page.wait_for_function(f"() => {ERROR} || {PROMPT}", **wait)
    assert page.evaluate(ERROR) is None
    yield SimpleNamespace(page=page, cells=cells, live=live, page_errors=page_errors)
    context.close()


def connect(page, url):
    """Open a page of a server that may still be starting."""
    for attempt in range(120):
        try:
            return page.goto(url)
        except Exception:
            if attempt == 119:
                raise
            page.wait_for_timeout(500)


def number(name):
    """Return the place of a cell among the code cells."""
    return [cell.id for cell in CODE].index(name)


def photograph(part, name, **how):
    """Save a screenshot of a page, or of a part of it, for people; return its pixels."""
    RESULTS.mkdir(exist_ok=True)
    return pixels(part.screenshot(path=RESULTS / f"{name}.png", **how))


def pixels(contents):
    """Return a picture, the bytes of a PNG file, as numbers from 0 to 1."""
    return png.imread(io.BytesIO(contents))[..., :3]


def test_all_cells_run_and_none_shows_an_error_or_a_warning(notebook):
    prompts = notebook.cells.locator(".jp-InputPrompt").all_text_contents()
    assert prompts == [f"[{i}]:" for i in range(1, len(CODE) + 1)]
    kinds = "els => els.map(e => e.dataset.mimeType + ': ' + e.textContent.slice(0, 200))"
    outputs = notebook.page.locator(".jp-OutputArea-output").evaluate_all(kinds)
    assert len(outputs) > PICTURES
    assert [output for output in outputs if re.match(r"application/vnd.jupyter.(error|stderr)", output)] == []
    assert notebook.page_errors == []


def test_the_whole_page_as_screenshots_for_people(notebook):
    scroller = notebook.page.locator(".jp-WindowedPanel-outer")
    height, step = scroller.evaluate("e => [e.scrollHeight, e.clientHeight]")
    for part in range(math.ceil(height / step)):
        scroller.evaluate("(e, top) => e.scrollTo(0, top)", part * step)
        notebook.page.wait_for_timeout(300)
        assert photograph(notebook.page, f"page-{part + 1:02}").std() > 0.01


def test_the_log_comes_while_the_trainer_runs(notebook):
    assert "Epoch: 1 (" in notebook.live and "accuracy=" not in notebook.live


def test_every_picture_is_drawn_on_the_screen(notebook):
    images = notebook.page.locator(".jp-OutputArea img")
    assert images.count() == PICTURES - 1  # the paper takes the place of one
    for i, image in enumerate(images.all()):
        contents = {name: image.get_attribute(name) for name in ("src", "alt")}
        assert_is_a_picture(contents)
        image.scroll_into_view_if_needed()
        notebook.page.wait_for_timeout(300)  # JupyterLab lays out what comes into view
        there = photograph(image, f"picture-{i + 1:02}")
        meant = pixels(base64.b64decode(contents["src"].split(",")[1]))
        assert there.mean() == pytest.approx(meant.mean(), abs=0.02), contents["alt"]
        assert there.std() == pytest.approx(meant.std(), abs=0.05), contents["alt"]


# --- Writing digits: points on a paper of 100 by 100 ----------------------------------------------

ONE = [(56, 12), (52, 40), (49, 65), (46, 90)]
SEVEN = [(22, 20), (50, 19), (78, 18), (64, 42), (52, 66), (42, 92)]
ZERO = [(50 + 24 * math.sin(turn / 12), 50 - 36 * math.cos(turn / 12)) for turn in range(0, 76, 3)]


@pytest.fixture
def paper(notebook):
    """The empty paper, in view."""
    pad = notebook.page.locator(".pad")
    pad.scroll_into_view_if_needed()
    pad.get_by_role("button", name="Clear").click()
    expect(pad.get_by_role("status")).to_have_text("Nothing to read yet.")
    yield pad.get_by_role("application", name=re.compile("Draw a digit"))
    notebook.page.mouse.up()


def on_the_page(paper, points):
    box = paper.bounding_box()
    return [(box["x"] + x / 100 * box["width"], box["y"] + y / 100 * box["height"]) for x, y in points]


def write(notebook, paper, points):
    """Write with the mouse, at the speed of a hand."""
    (x, y), *rest = on_the_page(paper, points)
    mouse = notebook.page.mouse
    mouse.move(x, y)
    mouse.down()
    for x, y in rest:
        mouse.move(x, y, steps=4)
        notebook.page.wait_for_timeout(20)


@pytest.mark.parametrize(("digit", "points"), [(1, ONE), (7, SEVEN), (0, ZERO)])
def test_a_digit_written_with_the_mouse_is_read(digit, points, notebook, paper):
    pad = notebook.page.locator(".pad")
    write(notebook, paper, points)
    expect(pad.get_by_role("status")).to_have_text(f"It reads a {digit}.")  # the mouse is still down
    notebook.page.mouse.up()
    photograph(pad, f"written-{digit}")
    percents = [int(text.rstrip(" %")) for text in pad.locator(".percent").all_text_contents()]
    assert percents[digit] == max(percents) > 50
    assert abs(sum(percents) - 100) <= 5  # each is rounded
    widths = "bars => bars.map(bar => Math.round(100 * bar.offsetWidth / bar.parentElement.clientWidth))"
    assert pad.locator(".bar").evaluate_all(widths) == pytest.approx(percents, abs=1)


def test_the_bars_move_while_a_digit_is_written(notebook, paper):
    bars = notebook.page.locator(".pad .percent")
    write(notebook, paper, SEVEN[:3])
    half = on_the_page(paper, SEVEN[3:])
    expect(notebook.page.locator(".pad").get_by_role("status")).to_have_text(re.compile("It reads a"))
    first = bars.all_text_contents()
    for x, y in half:
        notebook.page.mouse.move(x, y, steps=4)
    expect(bars.nth(7)).not_to_have_text(first[7])
    notebook.page.mouse.up()


def test_a_digit_written_with_the_arrow_keys_is_read(notebook, paper):
    paper.focus()
    for key in [*["ArrowUp"] * 14, " ", *["ArrowDown"] * 25, " "]:
        paper.press(key)
    expect(notebook.page.locator(".pad").get_by_role("status")).to_have_text("It reads a 1.")
    photograph(notebook.page.locator(".pad"), "written-with-keys")
    paper.press("Delete")
    expect(notebook.page.locator(".pad").get_by_role("status")).to_have_text("Nothing to read yet.")


# --- On a phone -----------------------------------------------------------------------------------

CUT = """images => images.filter(image => {
    const box = image.getBoundingClientRect();
    const clips = (e) => e && (getComputedStyle(e).overflowX !== "visible" ? e : clips(e.parentElement));
    const around = clips(image.parentElement)?.getBoundingClientRect() ?? {left: 0, right: innerWidth};
    return box.width < 100 || box.left < Math.max(0, around.left) - 1
        || box.right > Math.min(innerWidth, around.right) + 1;
}).map(image => image.alt ?? image.className)"""


@pytest.fixture
def phone(notebook):
    before = notebook.page.viewport_size
    notebook.page.set_viewport_size({"width": 390, "height": 844})
    yield notebook.page
    notebook.page.set_viewport_size(before)


def test_on_a_phone_no_picture_is_cut_and_a_finger_writes(phone, notebook):
    expect(phone.locator(".jp-OutputArea img").first).to_be_visible()
    phone.wait_for_timeout(1000)  # JupyterLab lays itself out anew
    assert phone.locator(".jp-OutputArea img, .pad .paper, .pad .bars").evaluate_all(CUT) == []
    pad = phone.locator(".pad")
    pad.get_by_role("button", name="Clear").click()
    pad.locator(".paper").scroll_into_view_if_needed()
    touch = phone.context.new_cdp_session(phone)
    kinds = ["touchStart", *["touchMove"] * (len(ONE) - 1)]
    for kind, (x, y) in zip(kinds, on_the_page(pad.locator(".paper"), ONE), strict=True):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    expect(pad.get_by_role("status")).to_have_text("It reads a 1.")
    photograph(phone, "phone")


# --- As a page of its own -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored_page(browser, tmp_path_factory):
    """The stored notebook as HTML, at the width of a phone."""
    folder = tmp_path_factory.mktemp("html")
    code, output = run(folder, "-m", "nbconvert", "--to", "html", "--output-dir", folder, NOTEBOOK)
    assert code == 0, output
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(f"file://{folder}/mnist.html", wait_until="domcontentloaded")
    yield page
    page.close()


def test_the_html_export_has_all_pictures_and_its_links_lead_somewhere(stored_page):
    broken = "images => images.filter(image => !image.naturalWidth).map(image => image.alt)"
    images = stored_page.locator("img")
    stored = [image["alt"] for image in images_of(nbformat.read(NOTEBOOK, as_version=4))]
    assert images.evaluate_all("images => images.map(image => image.alt)") == stored
    assert images.evaluate_all(broken) == []
    assert images.evaluate_all(CUT) == []
    links = stored_page.locator("a[href]").evaluate_all(
        "links => links.map(link => link.getAttribute('href'))"
    )
    inside = {link for link in links if link.startswith("#")}
    assert len(inside) > 10
    assert [link for link in inside if not stored_page.locator(f'[id="{link[1:]}"]').count()] == []
    outside = sorted({link for link in links if not link.startswith("#")})
    files = {link for link in outside if not re.match(r"https?://[\w.-]+", link)}
    assert [link for link in files if not (ROOT / "notebooks" / link.partition("#")[0]).is_file()] == []
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "external-links.txt").write_text("\n".join(outside) + "\n")
    photograph(stored_page, "html-on-a-phone", full_page=True)
