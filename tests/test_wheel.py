"""The wheel: the library alone, and it trains where nothing else of the project is."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

import fdg_jax as fdg

ROOT = pathlib.Path(__file__).parent.parent
# Without the network pip builds with the setuptools that is installed.
pytest.importorskip("setuptools", minversion="77")

TRAINING = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp
import numpy as np
import optax
import fdg_jax as fdg

assert fdg.__file__.startswith(sys.argv[1]), fdg.__file__
layer = fdg.Layer(
    lambda key, x: (jax.random.normal(key, (4, 4)) / 2, ()),
    lambda params, state, x, *, train, key: (jnp.tanh(x @ params), state),
)
pipe = fdg.Pipeline(
    fdg.partition([layer] * 4, 2, jnp.ones((8, 4))),
    lambda y, t: (jnp.mean((y - t) ** 2), {}),
    lambda k: optax.chain(fdg.fdg_shrink(0.5, 1 - k), optax.sgd(0.5)),
    fdg.schedule.fdg(2),
)
batch = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32), np.ones((8, 4), np.float32)
state, losses = pipe.init(jax.random.key(0), batch[0]), []
for _ in range(5):
    state, metrics = pipe.step(state, batch)
    losses += [m.loss for m in metrics]
state, rest = pipe.drain(state)
losses = [float(loss) for loss in losses + [m.loss for m in rest]]
assert len(losses) == 5 and losses[-1] < losses[0], losses
print(fdg.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Built from a copy of the sources, since building leaves files beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fdg_jax", source / "fdg_jax", ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", str(folder), str(source)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_it_has_the_library_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "fdg_jax").rglob("*.py")}
    assert sources | {"fdg_jax/py.typed"} == {n for n in names if ".dist-info/" not in n}
    assert wheel.name == f"fdg_jax-{fdg.__version__}-py3-none-any.whl"


def test_it_trains_in_an_empty_folder(wheel, tmp_path):
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(installed)
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, str(installed)],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == fdg.__version__
