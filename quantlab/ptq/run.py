"""`ptq`: post-training quantization of any JAX function."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from quantlab import layering, rewrites
from quantlab.calibration import batches as batches_lib
from quantlab.calibration import ranges
from quantlab.core import rng
from quantlab.plan import Plan
from quantlab.planner import make as make_plan
from quantlab.ptq import walk
from quantlab.ptq.model import Quantized, stored
from quantlab.ptq.resume import Checkpoints, fingerprints
from quantlab.ptq.rtn import rtn
from quantlab.ptq.streams import Store
from quantlab.ptq.transform import (
  Context,
  Encoder,
  Member,
  Transform,
  Tuner,
  chain,
)
from quantlab.recipe import Recipe
from quantlab.recipe import recipe as as_recipe
from quantlab.runtime import files


def ptq(
  apply: Callable,
  params: Any,
  recipe: Recipe | Mapping[str, Any] | Any,
  batches: Iterable[Any],
  transform: Member | Sequence[Member] = (),
  *,
  key: jax.Array | None = None,
  loss: Callable | None = None,
  workdir: epath.PathLike | None = None,
  memory: int = 2**32,
  block_errors: bool = False,
) -> Quantized:
  """Quantizes a model after training.

  Args:
    apply: pure function; a batch that is a tuple is splatted into
      `apply(params, *batch)`, anything else is its one argument.
    params: float parameters.
    recipe: what is quantized and how; see `ql.recipe`.
    batches: re-iterable calibration batches. The first one gives the shapes;
      static activation ranges read all of them.
    transform: the algorithm, or a chain of them; `ql.rtn()` by default.
    key: for what is random (stochastic rounding, rotations).
    loss: `(outputs, batch) -> scalar`, for members that need one.
    workdir: a folder for the block walk: each finished block is kept there,
      and the same call after an interruption goes on from it, bit for bit as
      without one. Remove it when the model is saved.
    memory: bytes of activations that stay in memory during the walk; beyond
      it they lie in `workdir`, or without one in a temporary folder.
    block_errors: walk through the blocks even where no member asks for it, so
      that `report['blocks']` holds the error after each one.

  With several processes (`jax.distributed`) every one makes the same call;
  batches are global arrays over them, parameters global or the same in all,
  `workdir` a folder that all see.

  Returns:
    The quantized model; `model.apply(model.params, *batch)` runs it.

  Raises:
    ValueError: see `ql.plan` and `ql.chain`; calibration is empty, changes
      its shape or is not finite; a weight is not finite; an allocation was
      measured on other parameters; `workdir` holds the walk of another run
      (every difference is named).
    OSError: `workdir` cannot be written; what was kept stays whole.
  """
  members = chain(transform)
  rng.check_key(key)
  if hasattr(recipe, 'check_params'):  # an allocation, measured on one model
    recipe.check_params(params)
  args = batches_lib.first(batches)
  call = layering.resolve(apply, params, as_recipe(recipe), args, {})
  made = make_plan(call.traced, call.leaves, call.inputs, call.recipe)
  _check_params(made, call.traced.paths, call.leaves)
  _refuse_keyless(made, key)
  context = Context(
    *(call.apply, call.traced, made, call.params, batches, {}),
    key=key,
    loss=loss,
  )
  transforms = [m for m in members if isinstance(m, Transform)]
  for member in transforms:
    if member.phase == 'prepare':
      context = member.run(context)
  state = ranges.calibrate(
    call.apply, context.params, made, batches, context.state
  )
  context = dataclasses.replace(context, state=_merged(context.state, state))
  encoder = next((m for m in members if isinstance(m, Encoder)), rtn())
  tuners = [m for m in members if isinstance(m, Tuner)]
  if encoder.observe is None and not tuners and not block_errors:
    encoded = walk.encode_all(context, encoder)
  else:
    encoded = _walk(context, encoder, tuners, members, workdir, memory)
  context = dataclasses.replace(
    context, variables=_variables(context, encoded)
  ).noted(**encoded.facts)
  for member in transforms:
    if member.phase == 'correct':
      context = member.run(context)
  names = [m.name for m in members] or [encoder.name]
  report = context.noted(transform=names).report
  made = dataclasses.replace(made, scans=call.scans)
  return Quantized(
    rewrites.quantized(apply, made), context.variables, made, report
  )


def _walk(context, encoder, tuners, members, workdir, memory) -> walk.Encoded:
  """The block walk, with a folder for what does not fit into memory."""
  if workdir is None:
    with tempfile.TemporaryDirectory(prefix='quantlab') as folder:
      store = Store(folder, memory)
      return walk.encode_blocks(context, encoder, tuners, store)
  folder = epath.Path(workdir)
  inputs = context.params, next(iter(context.batches))
  kept = Checkpoints(folder, fingerprints(context, members), inputs)
  # A folder for each process: what it spills is its own.
  streams = folder / f'streams{jax.process_index() or ""}'
  files.remove(streams)  # of a walk that was killed
  store = Store(streams, memory)
  try:
    return walk.encode_blocks(context, encoder, tuners, store, kept)
  finally:
    files.remove(streams)


def _merged(*states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Site states joined role by role."""
  out: dict[str, dict[str, Any]] = {}
  for state in states:
    for site, roles in state.items():
      out.setdefault(site, {}).update(roles)
  return out


def _variables(context: Context, encoded: walk.Encoded) -> dict[str, Any]:
  folds = {k: {'fold': {'shift': v}} for k, v in encoded.shifts.items()}
  biases = {k: {'bias': v} for k, v in encoded.biases.items()}
  values = {**encoded.params, **encoded.leaves}
  return {
    'weights': stored(context.params, context.plan, values),
    'sites': _merged(context.state, folds, biases),
    'effective': encoded.effective,
  }


def _check_params(made: Plan, paths, leaves) -> None:
  """Refuses shapes without values, and weights that are not finite."""
  abstract = [
    p
    for p, leaf in zip(paths, leaves, strict=True)
    if isinstance(leaf, jax.ShapeDtypeStruct)
  ]
  if abstract:
    raise TypeError(
      f'parameters {abstract[:5]} are shapes without values; ql.plan(...) '
      'takes shapes, quantizing needs arrays'
    )
  made.check_finite(dict(zip(paths, leaves, strict=True)))


def _refuse_keyless(made: Plan, key) -> None:
  stochastic = [
    k
    for k, s in {**made.leaves, **made.effective}.items()
    if s.quantizer.rounding == 'stochastic'
  ]
  if stochastic and key is None:
    raise ValueError(
      f'stochastic rounding of {stochastic} needs ptq(..., key=...)'
    )
