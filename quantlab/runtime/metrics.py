"""Numbers of a run: one flat JSON file, and TensorBoard events beside it."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from quantlab.runtime import files

Value = float | int | str | bool | None


# What JSON has no numbers for, as `files.dumps` writes it.
_NUMBERS: dict[Value, Value] = {s: float(s) for s in ('nan', 'inf', '-inf')}


class Metrics:
  """Flat `prefix/name` -> value, kept in `metrics.json`.

  All the values of one prefix are written in one step, so a prefix is either
  finished or absent: that is what resuming looks at. Only process 0 writes;
  the others read the same file.

  Attributes:
    values: what was recorded so far, this run's and earlier ones'.
  """

  def __init__(self, folder: epath.PathLike):
    self._folder = epath.Path(folder)
    self._path = self._folder / 'metrics.json'
    self._events: Any = None
    self.values: dict[str, Value] = {}
    if self._path.exists():
      kept = files.read_json(self._path)
      self.values = {k: _NUMBERS.get(v, v) for k, v in kept.items()}

  def __contains__(self, prefix: str) -> bool:
    """Whether `record(prefix, ...)` was completed."""
    return any(key.startswith(f'{prefix}/') for key in self.values)

  def get(self, prefix: str) -> dict[str, Value]:
    """The values under a prefix, by name; empty when there are none."""
    start = f'{prefix}/'
    return {
      k.removeprefix(start): v
      for k, v in self.values.items()
      if k.startswith(start)
    }

  def record(
    self, prefix: str, values: Mapping[str, Any], step: int = 0
  ) -> None:
    """Writes the values of a prefix, replacing those it had.

    Args:
      prefix: 'fp/<model>' or 'q/<model>/<variant>'.
      values: numbers, strings or None by name; 0-d arrays are unwrapped.
      step: the step they belong to, for curves in TensorBoard.
    """
    new = {f'{prefix}/{k}': _scalar(k, v) for k, v in values.items()}
    if not new:
      raise ValueError(f'no values to record under {prefix!r}.')
    kept = {
      k: v for k, v in self.values.items() if not k.startswith(f'{prefix}/')
    }
    self.values = kept | new
    if jax.process_index() != 0:
      return
    files.write_json(self._path, self.values)
    self._write_events(new, step)

  def curve(self, name: str, values: Iterable[float]) -> None:
    """A curve in TensorBoard, a value a step; it is kept nowhere else."""
    if jax.process_index() == 0:
      for step, value in enumerate(values):
        self._write_events({name: value}, step)

  def scalars(self, values: Mapping[str, float], step: int) -> None:
    """Points of curves in TensorBoard."""
    if jax.process_index() == 0:
      self._write_events(values, step)

  def close(self) -> None:
    """Flushes the events."""
    if self._events is not None:
      self._events.close()
      self._events = None

  def _write_events(self, values: Mapping[str, Value], step: int) -> None:
    if self._events is None:
      import tensorboardX  # it imports torch, where that is installed

      self._events = tensorboardX.SummaryWriter(
        os.fspath(self._folder / 'events'), write_to_disk=True
      )
    for key, value in values.items():
      if isinstance(value, (bool, int, float)):
        self._events.add_scalar(key, float(value), step)
    self._events.flush()


def _scalar(name: str, value: Any) -> Value:
  """One number as plain Python."""
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  x = np.asarray(value)
  if x.ndim or x.dtype == object:
    raise TypeError(
      f'metric {name!r} is {value!r}; expected a number, a string or None.'
    )
  return x.item()
