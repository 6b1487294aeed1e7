"""Runs notebooks from top to bottom and stores them with what they printed and drew.

python notebooks/run.py NOTEBOOK...
"""

import pathlib
import sys

import nbclient
import nbformat


def run(path: pathlib.Path) -> None:
    """Without times, so that two runs of the same notebook differ in what they drew alone."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = nbclient.NotebookClient(notebook, resources=resources, record_timing=False)
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, flush=True)
        run(pathlib.Path(name))
