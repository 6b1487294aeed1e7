"""Arrays to disk and back: the same bits, few files, nothing that could not be read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from fdg_jax.checkpoint import array_store, manifest

ARRAYS = {
    "params/0": np.arange(12, dtype=np.float64).reshape(3, 4),
    "params/1": np.array(-0.0, np.float32),
    "number/0": np.array(7, np.int32),
    "flights.3/0": np.asarray(jnp.arange(5, dtype=jnp.bfloat16)),
    "flights.3/1": np.array([True, False]),
    "empty/0": np.zeros((0, 3), np.float32),
}


def expected(arrays):
    place = SingleDeviceSharding(jax.devices()[0])
    return {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)
        for name, array in arrays.items()
    }


def test_what_is_written_is_read_back_to_the_bit(tmp_path):
    array_store.write(tmp_path, 2, ARRAYS)
    found = array_store.read(tmp_path, 2, expected(ARRAYS))
    for name, array in ARRAYS.items():
        value = np.asarray(found[name])
        assert (value.dtype, value.shape) == (array.dtype, array.shape)
        assert value.tobytes() == array.tobytes()


def test_a_store_is_a_few_files_however_many_arrays(tmp_path):
    many = {f"params/{i}": np.full((10, 10), i, np.float32) for i in range(100)}
    array_store.write(tmp_path, 0, many)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) <= 4
    assert [path.name for path in tmp_path.iterdir()] == ["stage_0"]


@pytest.mark.parametrize(
    "other",
    [np.zeros((3, 5)), np.zeros((3, 4), np.float32), np.zeros(12)],
    ids=["shape", "dtype", "rank"],
)
def test_another_shape_or_dtype_is_damage(tmp_path, other):
    array_store.write(tmp_path, 0, {"params/0": ARRAYS["params/0"]})
    with pytest.raises(manifest.Damaged, match="stage_0"):
        array_store.read(tmp_path, 0, expected({"params/0": other}))


def test_a_missing_array_is_damage(tmp_path):
    array_store.write(tmp_path, 0, {"params/0": ARRAYS["params/0"]})
    with pytest.raises(manifest.Damaged):
        array_store.read(tmp_path, 0, expected({"params/1": ARRAYS["params/0"]}))


def test_dtypes_that_the_store_does_not_have_are_refused():
    array_store.check([np.dtype(d) for d in ("float32", "int8", "bool", "complex64")])
    array_store.check([np.dtype(jnp.bfloat16)])
    with pytest.raises(ValueError, match="dtype uint2 cannot be stored"):
        array_store.check([np.dtype(jnp.uint2)])


def test_a_disk_without_room_is_refused(tmp_path):
    array_store.check_room(tmp_path, [100])
    with pytest.raises(OSError, match=r"are needed, .* are free"):
        array_store.check_room(tmp_path, [2**60])
