"""Checkpoints of a training run: the last and the best, by orbax."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from quantlab.runtime import files, manifest
from quantlab.runtime.checkpoint import CheckpointError

IDENTITY = 'identity.json'


class Saves:
  """What a training run needs to go on after it was killed.

  A save is a pytree of arrays and JSON-able notes (positions of data
  iterators, curves). It appears whole or not at all. The last one is kept, and
  the one of the highest score. Every process must call every method.

  Use as a context manager.
  """

  def __init__(self, folder: epath.PathLike, identity: Mapping[str, Any]):
    """Opens the folder, or makes it.

    Args:
      folder: of this run alone.
      identity: JSON-able, what the state depends on: recipe, model, data.

    Raises:
      CheckpointError: the folder's saves are those of another identity.
    """
    folder = epath.Path(
      os.path.abspath(folder) if files.is_local(folder) else folder
    )
    self.folder = folder
    _check(folder, files.to_jsonable(identity))
    self._manager = ocp.CheckpointManager(
      folder / 'steps',
      options=ocp.CheckpointManagerOptions(
        best_fn=_score,
        preservation_policy=managers.AnyPreservationPolicy(
          [managers.LatestN(1), managers.BestN(get_metric_fn=_score, n=1)]
        ),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
      ),
    )

  def __enter__(self) -> 'Saves':
    return self

  def __exit__(self, *exc: object) -> None:
    self._manager.close()

  @property
  def last(self) -> int | None:
    """Step of the last save."""
    return self._manager.latest_step()

  @property
  def best(self) -> int | None:
    """Step of the save with the highest score."""
    return self._manager.best_step()

  def save(
    self, step: int, state: Any, notes: Mapping[str, Any], score: float
  ) -> None:
    """Writes a save; returns when it is on the disk."""
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        notes=ocp.args.JsonSave(files.to_jsonable(notes)),
      ),
      metrics={'score': float(score)},
      force=True,
    )

  def restore(
    self, like: Any, step: int | None = None
  ) -> tuple[Any, dict[str, Any]] | None:
    """A save, or None where there is none yet.

    Args:
      like: the state's structure with arrays (or their shapes), which also
        says where the arrays go.
      step: of the save; the last one by default.

    Raises:
      CheckpointError: the save is not of this structure.
    """
    step = self.last if step is None else step
    if step is None:
      return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
      found = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract),
          notes=ocp.args.JsonRestore(),
        ),
      )
    except ValueError as error:
      raise CheckpointError(
        f'the save of step {step} in {os.fspath(self.folder)!r} cannot be read '
        f'into this state: {error}'
      ) from error
    return found['state'], found['notes']


def _score(metrics: Mapping[str, float]) -> float:
  return metrics['score']


def _check(folder: epath.Path, identity: Any) -> None:
  """Signs a new folder; refuses one that was signed otherwise."""
  path = folder / IDENTITY
  if not path.exists():
    if jax.process_index() == 0:
      files.write_json(path, identity)
    return
  lines = manifest.differences(files.read_json(path), identity)
  if lines:
    shown = '\n  '.join(lines[:10] + ['...'] * (len(lines) > 10))
    raise CheckpointError(
      f'the saves in {os.fspath(folder)!r} are of another recipe or config:\n'
      f'  {shown}\nTrain in another folder, or with what these were made with.'
    )
