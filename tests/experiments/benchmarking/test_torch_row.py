"""The processes that train in PyTorch; a program that pretends to be one, where torch is not."""

import dataclasses
import json
import os
import stat
import sys

import jax
import numpy as np
import pytest

from experiments.benchmarking import contender
from experiments.benchmarking.other_process import LeftOut
from experiments.benchmarking.torch_row import Torch, arrays_of
from experiments.benchmarking.workload import TORCH, Settings, Workload
from experiments.training.task import loss_fn

FAKE_TORCH = """#!{python}
import json, pathlib, sys
settings = json.loads(sys.argv[3])
assert sys.argv[1] == "-I" and sys.argv[2].endswith("peers/main.py"), sys.argv
assert (pathlib.Path(settings["folder"]) / "index.json").is_file()
ready = {{"torch": "9", "threads": 2, "parameters": {count}, "first_loss": {loss}}}
print(json.dumps(ready), flush=True)
for line in sys.stdin:
    if line == "13\\n":
        sys.exit("out of luck")
    answer = {{"seconds": 0.5 * int(line), "loss": settings["network"]["depth"]}}
    print(json.dumps(answer), flush=True)
"""
PLAIN = Settings("somewhere", model="plain16", image_size=4, batch_size=8, partition="flops")
TEXT = dataclasses.replace(PLAIN, model="transformer", width=16, blocks=2, heads=2, context=8)


def fake_torch(folder, **values):
    path = folder / "python_with_torch"
    path.write_text(FAKE_TORCH.format(python=sys.executable, **values))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def workload(torch_python, settings=PLAIN):
    return Workload(dataclasses.replace(settings, torch_python=torch_python))


@pytest.fixture(scope="module")
def expected():
    """Number of parameters, and loss of the first step."""
    work = workload(sys.executable)
    layer = work.split(1)[0]
    params, state = layer.init(work.key, work.example)
    y, _ = layer.apply(params, state, work.inputs, train=True, key=work.key)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {"count": count, "loss": float(loss_fn(y, work.labels)[0])}


def test_torch_in_a_process_of_its_own(tmp_path, expected):
    work = workload(fake_torch(tmp_path, **expected))
    row = Torch("backprop_torch", work)
    assert row.turn(4) == 2.0
    assert row.loss == 16
    assert row.about == "PyTorch 9, eager, 2 threads"
    with pytest.raises(RuntimeError, match="out of luck"):
        row.turn(13)
    row = Torch("fdg_torch", work)
    assert row.about == "PyTorch 9, FDG, 2 processes of one core"
    assert len(row.processes) == 2
    for pid in row.processes:
        os.kill(pid, 0)
    row.close()
    for pid in row.processes:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_another_network_is_found_out(tmp_path, expected):
    other = {**expected, "count": expected["count"] + 1}
    with pytest.raises(RuntimeError, match=f"{other['count']} parameters, but plain16 has"):
        Torch("backprop_torch", workload(fake_torch(tmp_path, **other)))
    other = {**expected, "loss": 1.01 * expected["loss"]}
    with pytest.raises(RuntimeError, match="backprop_torch: the loss of the first step is"):
        Torch("backprop_torch", workload(fake_torch(tmp_path, **other)))


def test_torch_is_left_out_where_it_does_not_run():
    with pytest.raises(LeftOut, match=r"false cannot run torch \(status 1\)"):
        Torch("backprop_torch", workload("false"))
    other = dataclasses.replace(PLAIN, model="small_resnet")
    with pytest.raises(LeftOut, match="plain16 and transformer are"):
        Torch("backprop_torch", workload("false", other))
    half = dataclasses.replace(PLAIN, dtype="bfloat16")
    with pytest.raises(LeftOut, match="--dtype=bfloat16: the networks in PyTorch"):
        Torch("backprop_torch", workload("false", half))


@pytest.mark.parametrize("settings", [PLAIN, TEXT], ids=["plain16", "transformer"])
def test_arrays_are_named_by_layer(settings):
    work = workload("false", settings)
    params, _ = work.split(1)[0].init(work.key, work.example)
    arrays = arrays_of(work, params)
    own = {name for name in arrays if name.startswith("1.")}
    assert np.array_equal(arrays.pop("inputs"), work.inputs)
    assert np.array_equal(arrays.pop("labels"), work.labels)
    assert sum(a.size for a in arrays.values()) == sum(a.size for a in jax.tree.leaves(params))
    if settings is PLAIN:
        assert own == {"1.conv.kernel", "1.norm.scale", "1.norm.bias"}
        assert json.loads(json.dumps(sorted(arrays)))[-1].startswith("9.")
    else:
        assert "1.qkv.kernel" in own
        assert arrays["0.position"].shape == (8, 16)


@pytest.mark.skipif("FDG_TORCH_PYTHON" not in os.environ, reason="names a Python that has torch")
@pytest.mark.parametrize("settings", [PLAIN, TEXT], ids=["plain16", "transformer"])
def test_torch_itself(settings):
    """The same first loss, which `Torch` checks, and the same delayed training."""
    work = workload(os.environ["FDG_TORCH_PYTHON"], settings)
    for name in TORCH:
        row = Torch(name, work)
        row.turn(1)
        first = row.loss
        if name == "fdg_torch":
            row.turn(10)
            here = contender.make("fdg", work)
            here.turn(1 + 1 + 1 + 10)
            # Rounding may turn a ReLU on or off; another delay would change the loss by more.
            assert row.loss == pytest.approx(here.loss, rel=5e-3)
        else:
            row.turn(30)
            assert row.loss < first
        row.close()
