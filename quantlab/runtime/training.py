"""One loop for all training: resumable, spreadable, stopped when it diverges.

A state is a dict `{'variables', 'optimizer', 'step', 'failed'}`. Several
independent runs (seeds) can be trained as one, by `jax.vmap`: every leaf has
a leading axis then, and so have the batches.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from quantlab.runtime import saves as saves_lib
from quantlab.runtime.progress import track

State = dict[str, Any]
Loss = Callable[..., tuple[jax.Array, Any]]
Curves = dict[str, list[list[float]]]


class DivergedError(RuntimeError):
  """A loss or gradient that is not finite.

  Attributes:
    step: the update that met it, from 0; the state before it is kept.
    run: which of the runs trained as one.
    state: before that update.
  """

  def __init__(self, step: int, run: int, state: State):
    super().__init__('the loss or a gradient is not finite')
    self.step, self.run, self.state = step, run, state


def begin(variables: Any, optimizer: optax.GradientTransformation) -> State:
  """The state before the first update."""
  return {
    'variables': jax.tree.map(jnp.asarray, variables),
    'optimizer': optimizer.init(variables),
    'step': jnp.zeros((), jnp.int32),
    'failed': jnp.zeros((), bool),
  }


def updater(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  trained: Any = None,
) -> Callable[..., tuple[State, jax.Array]]:
  """One step of gradient descent.

  A loss or gradient that is not finite changes nothing but `failed`, and
  nothing changes after it: what is inspected later is what failed. That costs
  no look at every step, for which the device would have to be waited for.

  Args:
    loss: `(variables, step, *batch) -> (value, settle)`, where `settle` is a
      tree of replacements: `(mask, values)`, both of the structure of the
      variables, the mask of plain bools, or None; running statistics go so.
    optimizer: over the variables.
    trained: bools of the structure of the variables: those with a gradient.
      The others, such as codes, may be integers; None: all are trained.

  Returns:
    `(state, *batch) -> (state, loss)`.
  """

  def update(state: State, *batch: Any) -> tuple[State, jax.Array]:
    variables, step = state['variables'], state['step']
    moves = trained
    if moves is None:
      moves = jax.tree.map(lambda _: True, variables)

    def whole(moving: Any, rest: Any) -> Any:
      return jax.tree.map(lambda m, x, y: x if m else y, moves, moving, rest)

    moving = jax.tree.map(lambda m, x: x if m else None, moves, variables)
    (value, settle), found = jax.value_and_grad(
      lambda moving: loss(whole(moving, variables), step, *batch), has_aux=True
    )(moving)
    gradient = whole(found, jax.tree.map(jnp.zeros_like, variables))
    fine = jnp.isfinite(value) & jnp.isfinite(optax.global_norm(gradient))
    going = fine & ~state['failed']
    changes, moved = optimizer.update(gradient, state['optimizer'], variables)
    changed = optax.apply_updates(variables, changes)
    if settle is not None:
      mask, values = settle
      changed = jax.tree.map(
        lambda m, x, y: y if m else x, mask, changed, values
      )
    new = {
      'variables': changed,
      'optimizer': moved,
      'step': step + 1,
      'failed': state['failed'],
    }
    new = jax.tree.map(lambda a, b: jnp.where(going, a, b), new, state)
    return {**new, 'failed': state['failed'] | ~fine}, value

  return update


def compiled(update: Callable, mesh: Mesh | None = None, runs: int = 1):
  """The update jitted, several runs as one, the state in place of the old."""
  if runs > 1:
    update = jax.vmap(update)
  where = None if mesh is None else NamedSharding(mesh, PartitionSpec())
  return jax.jit(update, donate_argnums=0, out_shardings=where)


def placed(tree: Any, mesh: Mesh | None) -> Any:
  """A tree of arrays on every device of the mesh, the same on each process."""
  if mesh is None:
    return jax.tree.map(jnp.asarray, tree)
  where = NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(lambda x: jax.device_put(x, where), tree)


def spread(batch: Any, mesh: Mesh | None, axis: int = 0) -> Any:
  """A process's part of a batch as its part of arrays over the mesh.

  Args:
    batch: tuple of NumPy arrays.
    mesh: with the axis 'data'; None leaves the batch as it is.
    axis: of the examples.
  """
  if mesh is None:
    return batch
  where = NamedSharding(mesh, PartitionSpec(*(None,) * axis, 'data'))
  return tuple(jax.make_array_from_process_local_data(where, x) for x in batch)


def check_shapes(expected: Sequence[Any], batch: Sequence[Any], i: int) -> None:
  """Refuses a batch of other shapes, for which all would compile again.

  Raises:
    ValueError: with both shapes.
  """
  first, now = ([tuple(np.shape(x)) for x in xs] for xs in (expected, batch))
  if first != now:
    raise ValueError(
      f'batch {i} has arrays of shapes {now}, and those before had {first}. '
      'Give all batches one shape: drop a remainder, or pad it.'
    )


def train(
  update: Callable[..., tuple[State, jax.Array]],
  state: State,
  walks: Sequence[Any],
  steps: int,
  saves: saves_lib.Saves,
  *,
  check: Callable[[State], Mapping[str, float]],
  score: Callable[[Mapping[str, float]], float],
  check_every: int,
  log_every: int,
  place: Callable[[Any], Any] = lambda batch: batch,
  log: Callable[[int, Mapping[str, float]], None] = lambda step, values: None,
  label: str = 'training',
) -> tuple[State, Curves]:
  """Trains to the last step, from the last save if there is one.

  After a kill the same call goes on from the last save, and everything it
  returns is what it would have been.

  Args:
    update: `(state, *batch) -> (state, loss)`, jitted.
    state: to begin with.
    walks: a checkpointable iterator of batches for each run.
    steps: updates in all.
    saves: where the run is kept.
    check: `state -> {name: number}`, such as a validation loss.
    score: of what `check` gave; the save of the highest is kept.
    check_every: steps between checks; each is saved.
    log_every: steps between points of the curve of the loss.
    place: batch -> batch on devices.
    log: is told of every point and check.
    label: of the progress bar.

  Returns:
    The state, and the curves: name -> [[step, value], ...].

  Raises:
    DivergedError: a loss or gradient that is not finite.
    ValueError: a batch of another shape than the first.
  """
  first, curves = 0, {}
  if (found := saves.restore(state)) is not None:
    state, notes = found
    first, curves = notes['step'], notes['curves']
    for walk, position in zip(walks, notes['walks'], strict=True):
      walk.set_state(position)
  expected = None

  def note(values: Mapping[str, float], done: int) -> None:
    for name, value in values.items():
      curves.setdefault(name, []).append([done, value])
    log(done, values)

  def checked(done: int) -> None:
    values = {k: float(v) for k, v in check(state).items()}
    note(values, done)
    positions = [walk.get_state() for walk in walks]
    notes = {'step': done, 'curves': curves, 'walks': positions}
    saves.save(done, state, notes, _finite(score(values)))

  if found is None:
    checked(0)  # what training begins with: also kept when it diverges at once
  for i in track(range(first, steps), label):
    batch = _together([next(walk) for walk in walks])
    expected = batch if expected is None else expected
    check_shapes(expected, batch, i)
    state, loss = update(state, *place(batch))
    done = i + 1
    due = done == steps or done % check_every == 0
    if due or done % log_every == 0:
      _refuse_failed(state)
      note({'loss': float(np.mean(loss))}, done)
    if due:
      checked(done)
  return state, curves


def _together(batches: Sequence[Any]) -> tuple[np.ndarray, ...]:
  """One batch as it is, several with a leading axis."""
  if len(batches) == 1:
    return batches[0]
  return tuple(np.stack(xs) for xs in zip(*batches, strict=True))


def _refuse_failed(state: State) -> None:
  failed = np.atleast_1d(np.asarray(state['failed']))
  if failed.any():
    run = int(np.argmax(failed))
    step = int(np.atleast_1d(np.asarray(state['step']))[run])
    raise DivergedError(step, run, state)


def _finite(score: float) -> float:
  """The score, the worst of all where it is NaN."""
  return score if math.isfinite(score) else -1e30
