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
notebook.metadata = {
    "kernelspec": notebook.metadata.kernelspec,
    "language_info": {"name": "python"},  # without the version, which differs from one machine to the next
}
for cell in notebook.cells:
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            output.text = output.text.replace("\r\n", "\n")  # `!` runs commands in a terminal
    tags = cell.metadata.get("tags")
    cell.metadata = {"tags": tags} if tags else {}
nbformat.write(notebook, NOTEBOOK)
