"""Every test runs in float64 on four CPU devices, with a compilation cache kept between runs."""

import os
import pathlib

# An installed cuda plugin without a GPU warns at start; the tests need no accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs of a test run for milliseconds and take seconds to compile. Programs started by a
# test are compiled in the same way, so that their results are bitwise equal.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis
import jax

# The same examples every time, so that tests are deterministic; `pytest --hypothesis-profile=long`
# searches for new ones. There is no deadline, since compilation may take long.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("long", max_examples=2000, deadline=None)
hypothesis.settings.load_profile("repeatable")

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
