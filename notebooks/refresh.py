"""Run the notebook with its default parameters, and store it with its outputs."""

import logging
from pathlib import Path

import nbformat
import papermill

NOTEBOOK = Path(__file__).with_name("mnist.ipynb")

logging.basicConfig(level="INFO", format="%(message)s")
notebook = papermill.execute_notebook(
    NOTEBOOK, None, cwd=NOTEBOOK.parent, progress_bar=False, log_output=True, coalesce_streams=True
)
# Without all of language_info, JupyterLab would mark the notebook as changed, and nbconvert write no .py.
notebook.metadata = {name: notebook.metadata[name] for name in ("kernelspec", "language_info")}
for cell in notebook.cells:
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            output.text = output.text.replace("\r\n", "\n")  # `!` runs commands in a terminal
    cell.metadata = {name: cell.metadata[name] for name in ("jupyter", "tags") if cell.metadata.get(name)}
nbformat.write(notebook, NOTEBOOK)
