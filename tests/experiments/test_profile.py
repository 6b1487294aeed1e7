"""Kinds of operations, and the program on a tiny network."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments.profile import operations

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
  %ynn_fusion.16 = f32[64,3,3,64]{3,2,1,0} fusion(%a, %b), kind=kCustom
  ynn_fusion.95 = f32[32,16,16,64]{3,2,1,0} fusion(a, b), kind=kCustom
  %ynn_fusion.119 = f32[16]{0} fusion(%constant.193, %c), kind=kCustom
  %transpose_copy_fusion.31 = f32[16,32,32,128]{3,2,1,0} fusion(%d), kind=kLoop
  ROOT %add_maximum_fusion.11 = f32[128,32,32,16]{3,2,1,0} fusion(%e), kind=kLoop
"""


def test_kinds():
    assert operations(PROGRAM) == {
        "ynn_fusion.16": "convolution, weight gradient",
        "ynn_fusion.95": "convolution, forward and input",
        "ynn_fusion.119": "reduction",
        "transpose_copy_fusion.31": "transpose, copy",
        "add_maximum_fusion.11": "elementwise",
    }


def profile(*arguments):
    cache = ROOT / ".cache" / "experiments"
    return subprocess.run(
        [sys.executable, "-m", "experiments.profile", *arguments],
        cwd=ROOT,
        env={**os.environ, "FDG_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_step_is_taken_apart(tmp_path):
    done = profile(
        f"--workdir={tmp_path}", "--model=small_resnet", "--image_size=8", "--batch_size=2"
    )
    assert done.returncode == 0, done.stderr
    seconds = json.loads((tmp_path / "profile.json").read_text())["seconds"]
    assert seconds["convolution, forward and input"] > 0
    assert seconds["elementwise"] > 0
    text = (tmp_path / "profile.md").read_text()
    assert f"| all |  | {1e3 * sum(seconds.values()):.1f} | 100 % |" in text


@pytest.mark.parametrize("flag", ["--model=nothing", "--steps=0", "--dtype=float8"])
def test_refusals(tmp_path, flag):
    done = profile(f"--workdir={tmp_path / 'new'}", flag)
    assert done.returncode == 2
    assert flag.split("=")[0][2:] in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()
