"""The notebook as a person meets it: in JupyterLab, in a browser, with a mouse, a keyboard and a finger."""

import io
import json
import math
import os
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import nbformat
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from rig.processes import Process, clean_environment, free_port, need
from rig.project import ROOT
from rig.training import slowed
from rig.tutorial import ORDER, PADS, PICTURES, SHORT, assert_is_a_picture, make_small_tutorial, pixels

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1800)]

RESULTS = ROOT / "test-results"
DRAWING = os.environ.get("MNIST_DRAWING")  # a file for the moving picture of the pad
SETTINGS = {
    # All cells are in the page, even those that are not in view.
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none", "scrollPastLastCell": False},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},  # of one page, which another would notice
}
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --force-prefers-reduced-motion"
MINUTES = 60_000  # Playwright counts milliseconds. The limits are for a busy machine.
POLLING = 300  # by default, it looks at each frame, and keeps a processor busy

# JupyterLab shows what a cell raises as it shows standard error.
ERROR = (
    'document.querySelector(\'[data-mime-type$="jupyter.error"], [data-mime-type$="stderr"]\')?.textContent'
)
PROMPT = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].at(-1).textContent.match(/[0-9]/)"
SAID = "n => [...document.querySelectorAll('.jp-CodeCell')][n].querySelector('.jp-OutputArea')?.textContent"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with nearly all of the notebook, and little data; all of it for a picture that is kept."""
    data = {"train": 60_000, "test": 10_000} if DRAWING else {}
    folder = make_small_tutorial(tmp_path_factory.mktemp("browser") / "project", **data)
    shutil.copy(ROOT / "notebooks" / "draw.js", folder / "notebooks")
    shutil.copy(ROOT / "Dockerfile", folder)
    stored = nbformat.read(folder / "notebooks" / "mnist.ipynb", as_version=4)
    stored.metadata.language_info.version = sys.version.split()[0]  # the one thing that may differ
    nbformat.write(stored, folder / "notebooks" / "mnist.ipynb")
    return folder


@pytest.fixture(scope="module")
def browser():
    if not (program := shutil.which("google-chrome")):
        need("chromium", "chromium")
        program = shutil.which("chromium")
    RESULTS.mkdir(exist_ok=True)
    expect.set_options(timeout=2 * MINUTES)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=QUIET.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(project, browser):
    """JupyterLab in the project, with settings and folders of its own. Returns its address."""
    home = project.parent / "home"
    for name, settings in SETTINGS.items():
        file = home / "jupyter_config_dir" / "lab" / "user-settings" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment = {name: home / name.lower() for name in folders} | {
        "PATH": "",  # neither kubectl nor docker
        "OMP_NUM_THREADS": 1,  # threads that wait for each other are slow where other tests run
    }
    flags = f"--no-browser --allow-root --ip=127.0.0.1 --port={free_port()} --IdentityProvider.token="
    command = [sys.executable, "-m", "jupyterlab", *flags.split(), f"--ServerApp.root_dir={project}"]
    server = Process(command, project.parent / "lab.log", cwd=project, env=clean_environment(**environment))
    address = re.compile(r"http://127\.0\.0\.1:\d+(?=/lab)")
    assert server.until(lambda: address.search(server.output)), server.output
    yield address.search(server.output)[0]
    server.send_signal(signal.SIGTERM)  # it ends its kernels, too
    server.end(60)


@pytest.fixture(scope="module")
def notebook(lab, browser):
    """The notebook in JupyterLab, after Run All Cells; and what was seen before, on the way, and then."""
    scale = 2 if DRAWING else 1  # sharp on any screen
    size = {"width": 1280, "height": 1600}
    page = browser.new_page(viewport=size, device_scale_factor=scale, has_touch=True)
    page_errors = []
    page.on("pageerror", lambda error: page_errors.append(error))
    open_notebook(page, lab)
    page.wait_for_timeout(2000)
    changed = page.locator(".jp-mod-dirty").count()
    choose(page, "Run", "Run All Cells")

    # Where a cell fails, those below never run.
    wait = {"timeout": 15 * MINUTES, "polling": 100}
    began = f"n => {ERROR} || ({SAID})(n)?.match(/Epoch: 1 [(].*/s)?.[0]"
    live = page.wait_for_function(began, arg=ORDER.index("run-the-trainer"), **wait).json_value()
    page.wait_for_function(f"() => {ERROR} || {PROMPT}", **wait)
    unfolded = page.locator(".jp-Notebook .jp-CodeCell:not(:has(.jp-InputPlaceholder))")
    yield SimpleNamespace(
        page=page,
        changed=changed,
        live=live,
        error=page.evaluate(ERROR),
        page_errors=page_errors,
        prompts=unfolded.locator(".jp-InputPrompt").all_text_contents(),
    )
    page.close()


def open_notebook(page, lab):
    """Open the notebook in a page, and wait for its kernel."""
    page.set_default_timeout(5 * MINUTES)
    page.goto(f"{lab}/doc/tree/notebooks/mnist.ipynb")
    expect(page.locator(".jp-Notebook .jp-CodeCell")).to_have_count(len(SHORT))
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible(timeout=5 * MINUTES)


def choose(page, menu, item):
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.get_by_role("menuitem", name=re.compile(f"^{item}")).first.click()  # a shortcut may follow


def photograph(part, name):
    """Save a screenshot of a page, or of a part of it, for people; return its pixels."""
    return pixels(part.screenshot(path=RESULTS / f"{name}.png"))


def test_opening_the_notebook_does_not_change_it(notebook):
    """The language's details in the file are those that the kernel gives."""
    assert notebook.changed == 0


def test_all_cells_run_and_none_shows_an_error_or_a_warning(notebook):
    assert notebook.error is None
    numbers = [number for number, cell in enumerate(SHORT, 1) if "jupyter" not in cell.metadata]
    assert notebook.prompts == [f"[{number}]:" for number in numbers]
    assert notebook.page_errors == []


def test_the_log_comes_while_the_trainer_runs(notebook):
    assert "Epoch: 1 (" in notebook.live and "accuracy=" not in notebook.live


def test_every_picture_is_drawn_on_the_screen(notebook):
    images = notebook.page.locator(".jp-OutputArea img")
    assert images.count() == PICTURES - 1 - PADS  # one cell is not here, and pads take others' places
    for i, image in enumerate(images.all()):
        meant = assert_is_a_picture({name: image.get_attribute(name) for name in ("src", "alt")})
        for _ in range(20):  # JupyterLab lays out what comes into view
            image.scroll_into_view_if_needed()
            there = photograph(image, f"picture-{i + 1:02}")
            differ = abs(there.mean() - meant.mean()) > 0.02 or abs(there.std() - meant.std()) > 0.05
            if not differ:
                break
        assert not differ, image.get_attribute("alt")


# --- Writing digits: points on a paper of 100 by 100 ----------------------------------------------


def arc(x, y, width, height, first, last, steps):
    """Return points on an ellipse around (x, y), clockwise from one angle to another: 0 is on its right."""
    turns = [math.radians(first + (last - first) * i / steps) for i in range(steps + 1)]
    return [(x + width * math.cos(turn), y + height * math.sin(turn)) for turn in turns]


ZERO = arc(50, 50, 24, 36, -90, 270, 24)
ONE = [(56, 12), (52, 40), (49, 65), (46, 90)]
THREE = arc(47, 30, 20, 17, -155, 90, 13) + arc(47, 68, 23, 20, -90, 150, 14)
SEVEN = [(24, 17), (35, 16), (46, 16), (57, 16), (67, 15), (77, 15), (73, 22), (69, 29), (65, 36), (61, 43)]
SEVEN += [(57, 50), (54, 57), (51, 64), (48, 71), (45, 78), (43, 85)]


@pytest.fixture
def pad(notebook):
    """The pad, in view, with empty paper."""
    pad = notebook.page.locator(".pad").last  # of the better network
    pad.scroll_into_view_if_needed()
    clear(pad)
    yield pad
    notebook.page.mouse.up()


def clear(pad):
    pad.get_by_role("button", name="Clear").click()
    expect_it_says(pad, "Nothing to read yet.")


def expect_it_says(pad, words):
    expect(pad.get_by_role("status")).to_have_text(words)


def paper(pad):
    return pad.get_by_role("application", name=re.compile("Draw a digit"))


def on_the_page(pad, points):
    box = paper(pad).bounding_box()
    return [(box["x"] + x / 100 * box["width"], box["y"] + y / 100 * box["height"]) for x, y in points]


def write(pad, points, look=lambda: None):
    """Write with the mouse, at the speed of a hand, and look at every second point. The mouse stays down."""
    (x, y), *rest = on_the_page(pad, points)
    pad.page.mouse.move(x, y)
    pad.page.mouse.down()
    for i, (x, y) in enumerate(rest):
        pad.page.mouse.move(x, y, steps=2)
        pad.page.wait_for_timeout(20)
        if i % 2:
            look()


@pytest.mark.parametrize(("digit", "points"), [(1, ONE), (0, ZERO)])
def test_a_digit_written_with_the_mouse_is_read(digit, points, pad):
    write(pad, points)
    expect_it_says(pad, f"It reads a {digit}.")
    pad.page.mouse.up()
    photograph(pad, f"written-{digit}")
    percents = [int(text.rstrip(" %")) for text in pad.locator(".percent").all_text_contents()]
    assert percents[digit] == max(percents) > 50
    assert abs(sum(percents) - 100) <= 5  # each is rounded
    widths = "bars => bars.map(bar => Math.round(100 * bar.offsetWidth / bar.parentElement.clientWidth))"
    assert pad.locator(".bar").evaluate_all(widths) == pytest.approx(percents, abs=1)


def test_the_first_pad_reads_with_the_network_trained_by_hand(notebook):
    first, last = notebook.page.locator(".pad").all()
    clear(last)
    clear(first)  # which scrolls to it
    write(first, ONE)
    expect_it_says(first, "It reads a 1.")
    notebook.page.mouse.up()
    expect_it_says(last, "Nothing to read yet.")


def test_a_click_leaves_a_dot_and_what_is_too_small_is_to_be_written_larger(pad):
    ink = "canvas => canvas.getContext('2d').getImageData(0, 0, 280, 280).data.filter(value => value).length"
    assert paper(pad).evaluate(ink) == 0
    pad.page.mouse.click(*on_the_page(pad, [(50, 50)])[0])
    assert paper(pad).evaluate(ink) > 200
    expect_it_says(pad, "Write larger, please.")
    for part, said in ((10, "Write larger, please."), (3, "It reads a 7.")):  # 20 pixels high, and 64
        clear(pad)
        write(pad, [(40 + x / part, 40 + y / part) for x, y in SEVEN])
        pad.page.mouse.up()
        expect_it_says(pad, said)


def test_the_bars_move_while_digits_are_written(pad):
    """A moving picture shows it. The README's is of a network that has learned from all digits.

    This renews it, in about five minutes:
    MNIST_DRAWING=docs/drawing.gif .venv/bin/python -m pytest tests/test_browser.py -k bars_move
    """
    box, frames, durations, readings = pad.bounding_box(), [], [], set()

    def look(milliseconds=120):
        pad.page.wait_for_timeout(60)  # for the bars
        readings.add(tuple(pad.locator(".percent").all_text_contents()))
        if DRAWING:
            frames.append(Image.open(io.BytesIO(pad.page.screenshot(clip=box))).convert("RGB"))
            durations.append(milliseconds)

    for digit, points in ((3, THREE), (7, SEVEN)):
        clear(pad)
        look(500)
        write(pad, points, look)
        expect_it_says(pad, f"It reads a {digit}.")
        pad.page.mouse.up()
        look(2000)
    assert len(readings) > 6
    if DRAWING:  # in 16 grays and the bars' blue, without dots that would mix more: sharp and small
        palette = Image.new("P", (1, 1))
        palette.putpalette([gray for gray in range(0, 256, 17) for _ in "rgb"] + [0x1F, 0x77, 0xB4])
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        # The end comes first, for those who see a picture that does not move.
        how = {"append_images": frames[:-1], "duration": durations[-1:] + durations[:-1]}
        frames[-1].save(ROOT / DRAWING, save_all=True, loop=0, **how)


def test_a_digit_written_with_the_arrow_keys_is_read(pad):
    paper(pad).focus()
    for key in [*["ArrowUp"] * 14, " ", *["ArrowDown"] * 25, " "]:
        paper(pad).press(key)
    expect_it_says(pad, "It reads a 1.")
    photograph(pad, "written-with-keys")
    paper(pad).press("Delete")
    expect_it_says(pad, "Nothing to read yet.")


# --- On a phone -----------------------------------------------------------------------------------

CUT = """images => images.filter(image => {
    const box = image.getBoundingClientRect();
    const clips = (e) => e && (getComputedStyle(e).overflowX !== "visible" ? e : clips(e.parentElement));
    const around = clips(image.parentElement)?.getBoundingClientRect() ?? {left: 0, right: innerWidth};
    return box.width < 100 || box.left < Math.max(0, around.left) - 1
        || box.right > Math.min(innerWidth, around.right) + 1;
}).map(image => image.alt ?? image.className)"""


def test_on_a_phone_no_picture_is_cut_and_a_finger_writes(notebook, pad):
    phone, before = notebook.page, notebook.page.viewport_size
    phone.set_viewport_size({"width": 390, "height": 844})
    expect(phone.locator(".jp-OutputArea img").first).to_be_visible()
    for _ in range(20):
        phone.wait_for_timeout(1000)  # JupyterLab lays itself out anew
        if not (cut := phone.locator(".jp-OutputArea img, .pad .paper, .pad .bars").evaluate_all(CUT)):
            break
    assert cut == []
    paper(pad).scroll_into_view_if_needed()
    touch = phone.context.new_cdp_session(phone)
    kinds = ["touchStart", *["touchMove"] * (len(ONE) - 1)]
    for kind, (x, y) in zip(kinds, on_the_page(pad, ONE), strict=True):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    expect_it_says(pad, "It reads a 1.")
    photograph(phone, "phone")
    phone.set_viewport_size(before)


# --- Coming and going -----------------------------------------------------------------------------


def run_cell(page, name, add=""):
    page.locator(".jp-Notebook .jp-CodeCell").nth(ORDER.index(name)).locator(".cm-content").click()
    page.keyboard.press("Control+End")
    page.keyboard.type(add)
    choose(page, "Run", "Run Selected Cell and Do not Advance")


def wait_until_it_says(page, name, words):
    said = f"([n, words]) => ({SAID})(n)?.includes(words)"
    page.wait_for_function(said, arg=[ORDER.index(name), words], polling=POLLING)


def test_an_interrupted_training_goes_on_and_ends_also_without_its_page(notebook, lab, browser, project):
    """It trains once more: slowly, until the file `slow` is removed."""
    page = browser.new_page()
    (project / "mnist.py").write_text(slowed("0.2 * Path('slow').exists()"))
    (project / "slow").touch()
    open_notebook(page, lab)
    run_cell(page, "remove-old-results")
    run_cell(page, "run-the-trainer")
    wait_until_it_says(page, "run-the-trainer", "Epoch: 1 (")
    choose(page, "Kernel", "Interrupt Kernel")
    wait_until_it_says(page, "run-the-trainer", "Stopped by a signal. --resume goes on")
    run_cell(page, "check-the-run")
    wait_until_it_says(page, "check-the-run", "write --resume at the end of its command")
    run_cell(page, "run-the-trainer", add=" --resume")
    wait_until_it_says(page, "run-the-trainer", "Resuming in epoch ")
    page.goto("about:blank")
    (project / "slow").unlink()
    while not (project / "output" / "mnist_model.pt").exists():  # which is written at the end
        page.wait_for_timeout(POLLING)
    open_notebook(page, lab)
    run_cell(page, "check-the-run")
    wait_until_it_says(page, "check-the-run", "2 epoch(s), ")
    page.close()
