"""What is asked of JAX before it starts."""

import jax
import pytest

from experiments.training import setup

FLAG = "--xla_cpu_multi_thread_eigen"


@pytest.mark.parametrize(
    ("cores", "stages", "given", "expected"),
    [
        (2, 2, "", f"{FLAG}=false"),
        (2, 4, "--other=1", f"--other=1 {FLAG}=false"),
        (2, 2, f"{FLAG}=true", f"{FLAG}=true"),  # the user's word counts
        (2, 1, "", ""),
        (4, 2, "", ""),  # threads to spare
        (1, 1, "", ""),
    ],
)
def test_operations_have_one_thread_where_every_core_has_a_device(
    monkeypatch, cores, stages, given, expected
):
    jax.devices()  # it runs already, so that nothing here changes its devices
    monkeypatch.setattr("experiments.common.machine.cores", lambda: cores)
    monkeypatch.setenv("XLA_FLAGS", given)
    setup.prepare_jax(stages)
    assert setup.os.environ["XLA_FLAGS"] == expected


@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_is_kept_unless_told_otherwise(monkeypatch, keep):
    called = []
    monkeypatch.setattr(setup, "keep_freed_memory", lambda: called.append(True))
    setup.prepare_jax(1, keep_memory=keep)
    assert called == [True] * keep
