"""python -m experiments.two_processes: what two real processes send each other in a step."""

import json
import os

import pytest

from experiments import two_processes
from fdg_jax import distributed
from tests import processes

SIZES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0}  # bytes a number


def sent(dtype: str) -> int:
    """The bytes that the process of the last stage reports."""
    settings = [
        *("--steps=1", "--model=small_resnet", "--image_size=8", "--batch_size=8"),
        *(f"--case={two_processes.TWO}", f"--message_dtype={dtype}"),
        f"--coordinator=127.0.0.1:{distributed.free_port()}",
    ]
    commands = [["experiments.two_processes", *settings, f"--process_id={i}"] for i in (0, 1)]
    found = processes.run(commands)
    text = "\n".join(result.text for result in found)
    assert [result.status for result in found] == [0, 0], text
    (line,) = (line for line in text.splitlines() if line.startswith(two_processes.MARK))
    return json.loads(line.removeprefix(two_processes.MARK))["bytes"]


@pytest.mark.slow
@pytest.mark.skipif(os.cpu_count() < 2, reason="two processes need two cores")
def test_fewer_bits_are_fewer_bytes_between_two_processes():
    found = {dtype: sent(dtype) for dtype in SIZES}
    numbers = found["float32"] / 4
    assert found["bfloat16"] == 2 * numbers
    # One float32 a channel, both ways, on top.
    assert numbers < found["int8"] < 1.3 * numbers
    assert (found["int8"] - numbers) % 8 == 0
