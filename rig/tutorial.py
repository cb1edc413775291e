"""The notebook and its cells, saved into small projects and run there."""

import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import IPython
import nbformat
from matplotlib import image as png

from rig.processes import fork
from rig.project import ROOT, make_small_project

NOTEBOOK = ROOT / "notebooks" / "mnist.ipynb"
CELLS = {cell.id: cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells}
CODE = [cell for cell in CELLS.values() if cell.cell_type == "code"]
PADS = sum(cell.source.startswith("write_a_digit(") for cell in CODE)  # a picture each where nobody can write
SHOWN = "\n".join(cell.source for cell in CODE if cell.id != "define-write-a-digit")
PICTURES = PADS + len(re.findall(r"^ *show\(", SHOWN, re.MULTILINE))
PROSE = "\n".join(cell.source for cell in CELLS.values() if cell.cell_type == "markdown")

ORDER = [cell.id for cell in CODE]
PARTS = [cell.id for cell in CODE if re.match(r"%%writefile .*\$TRAINER_FILE", cell.source)]

# Those that write files, those that these need, and the last chapters: they run on a slice of the data.
WITHOUT_TRAINING = ["go-to-the-project", "parameters", "check-the-parameters", "load-the-trainer"]
TO_THE_TRAINING = [*WITHOUT_TRAINING, *PARTS, "remove-old-results", "run-the-trainer", "check-the-run"]
WITHOUT_TRAINING += ORDER[ORDER.index("define-step") :]
ON_A_SLICE = [name for name in ORDER if name in {*TO_THE_TRAINING, *WITHOUT_TRAINING}]

# These start the trainer as programs, and show nothing that needs a browser or an image. SHORT has no such.
STARTERS = ORDER[ORDER.index("kill-and-resume") : ORDER.index("show-the-dockerfile")]
SHORT = [cell for cell in CODE if cell.id not in STARTERS]

SMALLER = {"epochs: int = 5": "epochs: int = 2", "[:8000]": "[:1280]"}
END = "All cells have been run."


def save(folder, names, *more, changes=SMALLER, parameters=()):
    """Save these cells, and more, as the notebook of the project in `folder`; by default, it trains for less.

    `changes` are of texts in the cells, `parameters` of the values that the cell of this name has set.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [CELLS[name].copy() for name in names]
    for cell in notebook.cells:
        for old, new in changes.items():
            cell.source = cell.source.replace(old, new)
        if cell.id == "parameters":
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.cells += map(nbformat.v4.new_code_cell, more)
    (folder / "notebooks").mkdir(exist_ok=True)
    nbformat.write(notebook, folder / "notebooks" / "mnist.ipynb")


def run_cells(folder, names, *more, changes=SMALLER, parameters=(), **environment):
    """Save cells, and let IPython run them up to the first that fails, much sooner than papermill would.

    Returns (exit code, all that was printed).
    """
    save(folder, names, *more, f"print({END!r})", changes=changes, parameters=parameters)
    ipython = Path(IPython.__file__).with_name("__main__.py")
    flags = ("--colors=nocolor", "--simple-prompt", "--HistoryManager.enabled=False")
    command = (ipython, *flags, "notebooks/mnist.ipynb")
    _, output = fork(folder, *command, timeout=300, **{"MPLBACKEND": "agg", **environment})
    return int(END not in output), output


def submit_in(folder, names=WITHOUT_TRAINING, change=("", ""), parameters=(), **environment):
    """Run the chapters on image and job with submit=True. Returns (exit code, all that was printed)."""
    project = folder / "project"
    for name in ("kubernetes", "docker"):
        shutil.copytree(ROOT / name, project / name, dirs_exist_ok=True)
    how = {"changes": dict([change]), "parameters": [("submit", True), *parameters]}
    return run_cells(project, names, **how, DOCKER_HOST="unix:///nowhere", **environment)


def make_small_tutorial(folder, train=5350, test=1000):
    """Make `folder` a project with nearly all of the notebook: its code cells are those of SHORT.

    So few digits have the mean and the deviation of all.
    """
    save(make_small_project(folder, train, test), [name for name in CELLS if name not in STARTERS])
    return folder


def outputs_of(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


class Images(HTMLParser):
    """Collects the attributes of the images in HTML."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.found.append(dict(attributes))


def assert_is_a_picture(image):
    """It has a description, is not blank, and nothing is cut off. Returns its pixels."""
    assert len(image["alt"]) > 20
    kind, contents = image["src"].split(",", 1)
    assert kind == "data:image/png;base64"
    found = pixels(base64.b64decode(contents))
    assert found.std() > 0.05, image["alt"]
    for edge in (found[0], found[-1], found[:, 0], found[:, -1]):
        assert edge.min() > 0.9, f"cut off at an edge: {image['alt']}"
    return found


def pixels(contents):
    """Return a picture, the bytes of a PNG file, as numbers from 0 to 1."""
    return png.imread(io.BytesIO(contents))[..., :3]


def images_of(notebook):
    html = "".join(output.data.get("text/html", "") for output in outputs_of(notebook) if "data" in output)
    return Images(html).found
