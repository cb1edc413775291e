"""The notebook and its cells, saved into small projects and run there."""

import base64
import io
import re
import shutil
from html.parser import HTMLParser

import nbformat
from matplotlib import image as png

from rig.processes import run
from rig.project import ROOT, make_small_project

NOTEBOOK = ROOT / "notebooks" / "mnist.ipynb"
CELLS = {cell.id: cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells}
CODE = [cell for cell in CELLS.values() if cell.cell_type == "code"]
PADS = sum(cell.source.startswith("write_a_digit(") for cell in CODE)  # a picture each where nobody can write
SHOWN = "\n".join(cell.source for cell in CODE if cell.id != "define-write-a-digit")
PICTURES = PADS + len(re.findall(r"^ *show\(", SHOWN, re.MULTILINE))
PROSE = "\n".join(cell.source for cell in CELLS.values() if cell.cell_type == "markdown")

PARTS = [cell.id for cell in CODE if re.match(r"%%writefile .*\$TRAINER_FILE", cell.source)]

# Those that write files, those that these need, and the last chapters: they run on a slice of the data.
ON_A_SLICE = [
    "go-to-the-project",
    "parameters",
    "check-the-parameters",
    "load-the-trainer",
    *PARTS,
    "remove-old-results",
    "run-the-trainer",
    "check-the-run",
    "give-memory-back",
    "run-several-processes",
    "check-several-processes",
    "define-step",
    "build-the-image",
    "append-to-the-image",
    "manifest",
    "put-parameters-into-the-manifest",
    "read-the-manifest",
    "check-the-cluster",
    "claim-a-volume",
    "create-the-job",
    "name-of-the-job",
    "define-wait-for",
    "describe-the-job",
    "list-the-pods",
    "follow-the-log",
    "wait-for-the-end",
    "delete-the-job",
]
WITHOUT_TRAINING = [
    name for name in ON_A_SLICE if name not in PARTS and not re.search("results|run|memory|processes", name)
]


def save(notebook_cells, folder, name="mnist"):
    """Save cells as the notebook of the project in `folder`."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = notebook_cells
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (folder / "notebooks").mkdir(exist_ok=True)
    nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")


def submit_in(folder, names=WITHOUT_TRAINING, change=("", ""), parameters=(), **environment):
    """Run the chapters on image and job with submit=True. Returns (exit code, all that was printed)."""
    project = folder / "project"
    for name in ("kubernetes", "docker"):
        shutil.copytree(ROOT / name, project / name, dirs_exist_ok=True)
    cells = [CELLS[name].copy() for name in names]
    for cell in cells:
        cell.source = cell.source.replace(*change)
    save(cells, project)
    arguments = ("notebooks/mnist.ipynb", folder / "out.ipynb", "-p", "submit", "True", "--log-output")
    arguments += tuple(word for parameter in parameters for word in ("-p", *parameter))
    return run(project, "-m", "papermill", *arguments, DOCKER_HOST="unix:///nowhere", **environment)


def save_small(folder, names, *more, name="mnist"):
    """Save these cells, and more, as the notebook of a small project, which trains for a shorter time."""
    cells = {name: CELLS[name].copy() for name in names}
    for cell in cells.values():
        cell.source = cell.source.replace("epochs: int = 5", "epochs: int = 2").replace("[:8000]", "[:1280]")
    save([*cells.values(), *map(nbformat.v4.new_code_cell, more)], folder, name)


def make_small_tutorial(folder, train=5350, test=1000):
    """Make `folder` a project with all of the notebook; its few digits have the mean and deviation of all."""
    save_small(make_small_project(folder, train, test), CELLS)
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
