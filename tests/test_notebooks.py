"""The notebooks run from top to bottom, and are stored with what they printed and drew."""

import json
import pathlib

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONG = ("staleness", "fdg_shrink_elsewhere")
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] * (path.stem in LONG), id=path.stem)
        for path in NOTEBOOKS
    ],
)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,  # seconds a cell; then the kernel is killed
        shutdown_kernel="immediate",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    assert pictures(notebook) == pictures(nbformat.read(path, as_version=4))


@each
def test_it_is_stored_as_it_ran(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 400_000
    assert "/tmp/" not in text
    assert "site-packages" not in text
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    assert not [o for cell in code for o in cell.outputs if o.get("name") == "stderr"]
    assert sum(pictures(notebook).values()) >= 1


def test_all_begin_alike():
    """What installs the library and makes two devices is the same cell everywhere."""
    firsts = []
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        firsts.append("".join(next(c for c in cells if c["cell_type"] == "code")["source"]))
    shortest = min(firsts, key=len)
    assert "jax_num_cpu_devices" in shortest
    assert all(first.startswith(shortest) for first in firsts)


def pictures(notebook) -> dict[str, int]:
    """How many each cell drew."""
    return {
        cell.id: sum("image/png" in output.get("data", {}) for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
