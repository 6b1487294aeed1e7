"""A model in a file: written whole, read back, and refused where it is not whole."""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import fdg_jax as fdg
from experiments.exporting import model_file
from fdg_jax.partition.layerwise import separate

ABOUT = {
    "model": "one",
    "num_classes": 3,
    "image_shape": [2, 2, 1],
    "dropout": 0.0,
    "unroll": "auto",
    "dtype": "float32",
    "fast_derivatives": True,
    "params_sha256": "0",
}


def create(name, num_classes, channels, unroll, compute, dropout):
    """Stacked layers and one with an array that would not lie in order."""
    flat = fdg.from_fn(lambda x: x.reshape(len(x), -1))
    block = fdg.from_nnx(lambda rngs: nnx.Linear(4, 4, rngs=rngs))
    head = fdg.from_nnx(lambda rngs: nnx.Linear(4, num_classes, rngs=rngs))
    norm = fdg.from_nnx(lambda rngs: nnx.BatchNorm(num_classes, rngs=rngs))
    return [flat, fdg.repeat(block, 2), head, norm]


@pytest.fixture(autouse=True)
def network(monkeypatch):
    monkeypatch.setattr(fdg.models, "create", create)
    network = fdg.chain(model_file.layers(ABOUT))
    return network, network.init(jax.random.key(0), np.zeros((1, 2, 2, 1), np.float32))


@pytest.fixture(params=model_file.FORMATS)
def written(request, network, tmp_path):
    whole, trees = network
    parts = [separate(whole, jax.device_get(tree)) for tree in trees]
    arrays = model_file.named(*parts)
    transposed = {name: np.asfortranarray(array) for name, array in arrays.items()}
    model_file.save(tmp_path / "model", request.param, transposed, ABOUT)
    return tmp_path / "model"


def test_what_is_written_is_read(written, network):
    params, model_state, about = model_file.load(str(written))
    assert about.pop("sha256")
    assert about == ABOUT
    for ours, theirs in zip((params, model_state), network[1], strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def metadata(**changes):
    def change(path):
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["fdg_jax"])
        save_file(load_file(path), path, {"fdg_jax": json.dumps({**about, **changes})})

    return change


def arrays(change):
    def changed(path):
        with safe_open(path, framework="numpy") as file:
            about = file.metadata()
        there = load_file(path)
        change(there)
        save_file(there, path, about)

    return changed


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "gone": (pathlib.Path.unlink, r"is no model that can be read \(FileNotFoundError"),
    "empty": (lambda path: path.write_text(""), "is no model that can be read"),
    "text": (lambda path: path.write_text("{}" * 99), "is no model that can be read"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is no model that can be read"),
    "flipped": (flip, r"is no model that can be used \(its arrays have changed\)"),
    "foreign": (
        lambda path: save_file({"w": np.zeros(2)}, path),
        "is no model that experiments.export wrote",
    ),
    "metadata": (
        lambda path: save_file({"w": np.zeros(2)}, path, {"fdg_jax": "{"}),
        "is no model that can be read",
    ),
    "classes": (
        metadata(num_classes=4),
        r"layer_004/mean is float32\[3\] in one and float32\[4\] in the other, the network that it",
    ),
    "shape": (metadata(image_shape=8), "metadata: name no network"),
    "unroll": (metadata(unroll=[]), "metadata: name no network .*--unroll"),
    "missing": (
        arrays(lambda there: there.pop("layer_001/bias")),
        r"layer_001/bias is missing in one and float32\[4\] in the other",
    ),
    "more": (
        arrays(lambda there: there.update(w=np.zeros(2))),
        r"params/w is float64\[2\] in one and missing in the other",
    ),
    "other numbers": (
        arrays(lambda there: there.update({"layer_003/bias": np.ones(3, np.float32)})),
        "its arrays have changed",
    ),
}


@pytest.mark.parametrize("written", ["safetensors"], indirect=True)
@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_no_whole_model_is_refused(written, damage, message):
    damage(written)
    with pytest.raises(ValueError, match=message) as caught:
        model_file.load(written)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("written", ["orbax"], indirect=True)
def test_a_folder_with_damage_is_refused(written):
    files = [path for path in written.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 3
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match="is no model that can be read") as caught:
            model_file.load(written)
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)
    assert model_file.load(written)[2]["model"] == "one"
