"""Checkpoints: saves training states in the background and restores them bitwise.

    directory/step-000000500/
      manifest.json     configuration, counts, and the SHA-256 of every other file; written last
      arrays/stage_0/   one store per stage: the sections of its state (snapshot.py)

In a run with several processes, each process writes its own stages (array_store.py), and the
process of the last stage writes the manifest to the shared file system. Any number of processes can
resume the run. A checkpoint is written under a temporary name and renamed when complete. Hashes
detect damaged checkpoints, which are ignored. Contents are arrays and JSON; nothing is unpickled.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import threading
import warnings
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax.checkpoint import array_store, manifest, paths, restore, retention, snapshot
from fdg_jax.checkpoint import extra as extras
from fdg_jax.checkpoint.arguments import score_of, step_of
from fdg_jax.checkpoint.array_store import leaf
from fdg_jax.checkpoint.leaving import finish_at_exit
from fdg_jax.engine import nonfinite
from fdg_jax.engine.pipeline import Pipeline
from fdg_jax.engine.placement import gather
from fdg_jax.engine.state import PipelineState
from fdg_jax.errors import ConsumedStateError
from fdg_jax.typing import PyTree

_GRACE = 5.0  # seconds


class Checkpointer:
    """Saves and restores the checkpoints of one run.

    In a run with several processes, each process creates one and calls the same methods in the same
    order.

    Args:
      directory: a local directory; created by the first `save`.
      pipe: the pipeline whose states are saved and restored.
      keep: the number of newest checkpoints to keep, >= 1, in addition to the one with the lowest
        score.

    Raises:
      ValueError: keep < 1; ``directory`` is not a local directory.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, optax
      >>> import fdg_jax as fdg
      >>> layer = fdg.Layer(lambda key, x: (jnp.ones(()), ()),
      ...                   lambda p, s, x, *, train, key: (p * x, s))
      >>> pipe = fdg.Pipeline([layer], lambda y, t: (jnp.mean((y - t) ** 2), {}),
      ...                     lambda k: optax.sgd(0.1), fdg.schedule.fdg(1))
      >>> batch = (jnp.ones((4, 1)), jnp.zeros((4, 1)))
      >>> state, _ = pipe.step(pipe.init(jax.random.key(0), batch[0]), batch)
      >>> with tempfile.TemporaryDirectory() as folder, Checkpointer(folder, pipe) as checkpoints:
      ...     checkpoints.save(state, step=1, extra={"position": 1})
      ...     again, extra = checkpoints.restore(batch)
      >>> int(again.tick), extra, bool(again.stages[0].params == state.stages[0].params)
      (1, {'position': 1}, True)
    """

    def __init__(self, directory: str | os.PathLike[str], pipe: Pipeline, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint must stay; give 1 or more")
        self.directory = paths.local(directory, "directory")
        paths.check_folder(self.directory, "directory")
        self.pipe = pipe
        self.keep = keep
        self._configuration = manifest.configuration(pipe)
        # Copies, because JAX would forward unchanged inputs. The argument is a list, without names
        # that contain batch numbers, so it compiles once for the steady state.
        self._copy = jax.jit(_copies)
        # For stages of several processes: replicated in each of them.
        self._whole = {
            k: jax.jit(_copies, out_shardings=stage.replicated)
            for k, stage in enumerate(pipe.stages)
            if not stage.replicated.is_fully_addressable
        }
        here, owners = jax.process_index(), [stage.owner for stage in pipe.stages]
        self._mine = [k for k, owner in enumerate(owners) if owner == here]
        self._writer = owners[-1] == here
        # Distinguishes this run's unfinished checkpoints from those of a killed run.
        mark = int(gather(np.frombuffer(os.urandom(4), np.uint32))[0, 0])
        self._mark = f".{mark:08x}" if jax.process_count() > 1 else ""
        self._abandoned = threading.Event()
        self._thread: threading.Thread | None = None
        self._begun = self._left = False
        self._failure: str | None = None
        self._damaged: set[int] = set()
        self._stored: set[Any] = set()

    def save(
        self, state: PipelineState, step: int, extra: Any = None, score: float | None = None
    ) -> None:
        """Starts saving a checkpoint in the background and returns.

        The devices copy the arrays in their own queues, so later steps may donate all of ``state``.
        A thread fetches and writes the copies. `save` waits only for the previous save. With
        ``on_nonfinite="stop"`` nothing is saved after a non-finite value.

        Args:
          state: any state; not consumed.
          step: the number of the checkpoint, >= 0.
          extra: additional data of the run, such as the position of a data iterator: bytes or JSON
            data, stored with its current values. Tuples are restored as lists, arrays as (lists of)
            numbers; `save` does not wait for arrays.
          score: lower is better; the checkpoint with the lowest score is kept with the newest.

        Raises:
          ValueError: an invalid step or score; ``extra`` or an array dtype that cannot be restored;
            a consumed state; at the first save, a directory that is not writable. Nothing is
            written.
        """
        step, score, extra = step_of(step), score_of(score), extras.frozen(extra)
        if self._mine and not self._begun:
            paths.make(self.directory, "directory")
        self._begun = True
        self.wait()
        counts, names, copies = [], [], []
        for k, stage in enumerate(state.stages):
            leaves = {n: jax.tree.leaves(tree) for n, tree in snapshot.sections(stage).items()}
            arrays = [array for found in leaves.values() for array in found]
            self._check_dtypes(arrays)
            counts.append(snapshot.numbers(stage))
            names.append({n: len(found) for n, found in leaves.items()})
            copy = self._whole.get(k, self._copy)
            try:
                copies.append(copy(arrays))
            except (RuntimeError, ValueError) as error:
                if "has been deleted" in str(error):
                    raise ConsumedStateError from error
                raise
        body = {
            **self._configuration,
            "step": step,
            "score": score,
            "tick": int(state.tick),
            "origin": int(state.origin),
            "counts": counts,
        }
        self._thread = threading.Thread(
            target=self._guarded, args=(body, names, copies, state.key, extra), daemon=True
        )
        self._thread.start()
        self._left = False
        finish_at_exit(self)

    def restore(self, example: tuple[PyTree, PyTree]) -> tuple[PipelineState, Any]:
        """Restores the newest intact checkpoint, every array on its stage's devices.

        Damaged and incomplete checkpoints are reported as warnings. A different machine or JAX
        version is a warning as well: the run continues, but results may differ in the last bits.

        Args:
          example: a batch ``(inputs, labels)``, at least as large as any in flight; only shapes and
            dtypes are used.

        Returns:
          The state, and the ``extra`` passed to `save`.

        Raises:
          FileNotFoundError: there is no checkpoint.
          ValueError: all checkpoints are damaged, or the pipeline's configuration differs.
        """
        self.wait()
        steps = manifest.steps(self.directory)
        if not steps:
            raise FileNotFoundError(f"directory={self.directory}: holds no checkpoint")
        for step in steps:
            folder = self._folder(step)
            try:
                return restore.load(self.pipe, folder, step, example, self._copy)
            except manifest.Damaged as error:
                self._damaged.add(step)
                warnings.warn(f"{folder} is damaged ({error}) and passed over", stacklevel=2)
        raise ValueError(
            f"directory={self.directory}: none of the checkpoints {', '.join(map(str, steps))} in "
            "it is whole; start the run anew"
        )

    def latest(self) -> int | None:
        """The step of the newest checkpoint on disk, or None; not validated."""
        return max(manifest.steps(self.directory), default=None)

    def wait(self) -> None:
        """Waits until the last save is on disk, and warns if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure:
            warnings.warn(failure, stacklevel=3)

    def tidy(self) -> None:
        """Removes the remains of interrupted saves, as every `save` does."""
        self.wait()
        try:
            self._tidy()
        except OSError as error:  # not fatal; the next save tries again
            warnings.warn(f"{self.directory}: what is left stays ({error})", stacklevel=2)

    def close(self) -> None:
        """Waits for the last save, as the end of a ``with`` block does."""
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.leave(failed=kind is not None)

    def leave(self, failed: bool) -> None:
        """Waits for the last save after an error or at exit; a second Ctrl-C aborts the wait.

        Args:
          failed: whether an error may have ended the program.
        """
        if self._left:
            return
        if failed and jax.process_count() > 1:  # another process may be lost
            threading.Timer(_GRACE, self._abandoned.set).start()
        self._left = True
        self.wait()

    def _check_dtypes(self, arrays: list[jax.Array]) -> None:
        """Rejects dtypes that the store does not support; checks each dtype once."""
        dtypes = {array.dtype for array in arrays} - self._stored
        array_store.check(d for d in dtypes if not jnp.issubdtype(d, jax.dtypes.prng_key))
        self._stored |= dtypes

    def _folder(self, step: int) -> pathlib.Path:
        return manifest.folder(self.directory, step)

    def _tidy(self) -> None:
        if self._writer:
            retention.tidy(self.directory, self.keep, self._damaged, self._mark)

    def _guarded(self, body: dict[str, Any], *rest: Any) -> None:
        """Runs in the thread. A failed save, such as on a full disk, must not end the training."""
        try:
            self._write(body, *rest)
        except Exception as error:
            reason = " ".join(str(error).partition(" [tensorstore_spec=")[0].split())
            self._failure = (
                f"{self._folder(body['step'])} could not be written ({reason}); older checkpoints "
                "are as they were"
            )

    def _write(
        self,
        body: dict[str, Any],
        names: list[dict[str, int]],
        copies: list[list[jax.Array]],
        key: jax.Array,
        extra: Any,
    ) -> None:
        self._tidy()
        final = self._folder(body["step"])
        partial = final.with_name(f".{final.name}{self._mark}")
        try:
            body["sections"], arrays = [], {}
            for k, sizes in enumerate(names):
                own = dict(zip(array_store.names(sizes), copies.pop(0), strict=True))
                signed = {leaf: manifest.signature(array) for leaf, array in own.items()}
                body["sections"].append(
                    [[n, [signed[leaf(n, i)] for i in range(size)]] for n, size in sizes.items()]
                )
                if k in self._mine:
                    # This thread waits for the devices; the copies are freed one stage at a time.
                    arrays[k] = jax.device_get(own)
            if self.pipe.on_nonfinite == "stop" and any(
                own["record/0"][nonfinite.FORWARD : nonfinite.PENDING].max() >= 0
                for own in arrays.values()
            ):
                return
            self._write_arrays(partial / restore.ARRAYS, arrays)
            if not self._writer:
                return
            data = jax.device_get(jax.random.key_data(key)).tolist()
            body["key"] = [str(jax.random.key_impl(key)), data]
            body["extra"] = extras.encoded(extra)
            manifest.write(partial, body)
            array_store.remove(final)
            partial.rename(final)
        except BaseException:
            if self._mark:
                array_store.fail(partial / restore.ARRAYS)
            else:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        # Checkpoints found damaged when restoring are removed after the first complete save.
        self._damaged.discard(body["step"])
        for step in self._damaged:
            array_store.remove(self._folder(step))
        self._damaged.clear()
        self._tidy()

    def _write_arrays(self, folder: pathlib.Path, arrays: dict[int, dict[str, np.ndarray]]) -> None:
        """Writes this process's stages; the manifest's writer waits for the other processes."""
        self.directory.mkdir(parents=True, exist_ok=True)
        sizes = [array.nbytes for own in arrays.values() for array in own.values()]
        array_store.check_room(self.directory, sizes)
        for k, own in arrays.items():
            array_store.write(folder, k, own)
        if self._writer:
            array_store.wait(folder, self.pipe.num_stages, self._abandoned)


def _copies(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(snapshot.raw(leaf)) for leaf in leaves]
