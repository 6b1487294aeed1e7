"""The process that trains in PyTorch; a program that pretends to be it, where torch is not."""

import os
import pathlib
import stat
import sys

import jax
import pytest

from experiments.benchmarking.other_process import LeftOut
from experiments.benchmarking.torch_row import Torch
from experiments.benchmarking.workload import Settings, Workload

FAKE_TORCH = """#!{python}
import json, sys
settings = json.loads(sys.argv[3])
assert sys.argv[1] == "-I" and sys.argv[2].endswith("torch_net.py"), sys.argv
print(json.dumps({{"torch": "9", "threads": 2, "memory_format": "m", "parameters": {count}}}))
sys.stdout.flush()
for line in sys.stdin:
    if line == "13\\n":
        sys.exit("out of luck")
    answer = {{"seconds": 0.5 * int(line), "loss": settings["depth"], "settling_cpu_seconds": 0}}
    print(json.dumps(answer), flush=True)
"""


def fake_torch(folder: pathlib.Path, count: int) -> str:
    path = folder / "python_with_torch"
    path.write_text(FAKE_TORCH.format(python=sys.executable, count=count))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def plain16(torch_python: str) -> Workload:
    return Workload(Settings("somewhere", model="plain16", image_size=4, torch_python=torch_python))


def parameters(work: Workload) -> int:
    shapes = jax.eval_shape(work.split(1)[0].init, work.key, work.example)[0]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_torch_in_a_process_of_its_own(tmp_path):
    count = parameters(plain16(sys.executable))
    work = plain16(fake_torch(tmp_path, count))
    row = Torch("backprop_torch", work)
    assert row.turn(4) == 2.0
    assert row.loss == 16
    assert row.about == "PyTorch 9, 2 threads, m"
    (pid,) = row.processes
    with pytest.raises(RuntimeError, match="out of luck"):
        row.turn(13)
    row = Torch("backprop_torch", work)
    (pid,) = row.processes
    os.kill(pid, 0)
    row.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(RuntimeError, match=f"{count + 1} parameters, but plain16 has {count}"):
        Torch("backprop_torch", plain16(fake_torch(tmp_path, count + 1)))


def test_torch_is_left_out_where_it_does_not_run():
    with pytest.raises(LeftOut, match=r"false cannot run torch \(status 1\)"):
        Torch("backprop_torch", plain16("false"))


@pytest.mark.skipif("FDG_TORCH_PYTHON" not in os.environ, reason="names a Python that has torch")
def test_torch_itself():
    row = Torch("backprop_torch", plain16(os.environ["FDG_TORCH_PYTHON"]))
    first = row.turn(1), row.loss
    row.turn(5)
    assert first[0] > 0
    assert row.loss < first[1]
    row.close()
