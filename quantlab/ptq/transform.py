"""Transforms: the members of a PTQ chain, and what they hand on.

A chain is prepare* encode correct*, with exactly one encode member (`rtn()`
when none is given):

  prepare  `Transform`: changes float weights or inputs so that they quantize
           better, the function unchanged (smoothing, rotation). Sees a
           `Context`, returns a new one; statistics are collected again by
           whoever comes after.
  encode   `Encoder`: turns every stored weight into codes, one call a weight,
           with the statistics it asked for of that weight's inputs.
  correct  changes what is left in float (biases, norms) to make up for it:
           a `Transform` when all codes are made, or a `Tuner` in the walk,
           block by block, before later blocks are encoded.

How the hard cases pass through:
  rotate -> gptq          rotate rewrites float weights (program scope); ranges
                          and Hessians are collected after it, because every
                          statistic is asked for when its member's turn comes.
  AWQ -> GPTQ -> tweak    prepare, encode, correct of one walk: in each block
                          Hessians come from the quantized stream, codes are
                          made, then norms are tuned against the float stream.
  QLLM                    a prepare member whose input transform is a gather: a
                          key more of the site state `transform` (see
                          `ops.adjust`), applied where the input meets the
                          site. Not built yet.
  per-layer bits, scan    one stack is one format; layers are encoded one by
                          one (`blocks.layers`) and their codes stacked. Layers
                          of several formats are several scans, and the chain
                          sees that program (`quantlab.layering`).
  LSQ, delayed FP8        no transforms: trainable or carried leaves of the
                          site state, which enter a scan as an extra input.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from quantlab.core import QTensor
from quantlab.graph import tracing
from quantlab.graph.sites import Site
from quantlab.plan import Plan, Storage

PHASES = ('prepare', 'encode', 'correct')


@dataclasses.dataclass(frozen=True)
class Target:
  """One weight to encode.

  Attributes:
    name: parameter path, or site id of an effective weight.
    site: the product it is used in (None: encoded without one).
    weight: the logical array.
    storage: quantizer and layout it is stored with.
    layer: which layer of a stack, or ().
  """

  name: str
  site: Site | None
  weight: jax.Array
  storage: Storage
  layer: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
  """What a chain works on.

  Attributes:
    apply: the float function.
    traced: its trace.
    plan: the decisions.
    params: float parameters, as changed so far.
    batches: calibration batches.
    state: site state (static ranges, input transforms).
    variables: of the quantized model; None before codes are made.
    key: random key, or None.
    loss: `(outputs, batch) -> scalar` for members that need one.
    report: facts found on the way, JSON-able.
  """

  apply: Callable
  traced: tracing.Traced
  plan: Plan
  params: Any
  batches: Iterable[Any]
  state: Mapping[str, Mapping[str, Any]]
  variables: Any = None
  key: jax.Array | None = None
  loss: Callable | None = None
  report: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def noted(self, **facts: Any) -> Context:
    """With more facts in the report."""
    return dataclasses.replace(self, report={**self.report, **facts})


@dataclasses.dataclass(frozen=True)
class Transform:
  """A member of a chain that changes the model before or after encoding.

  Attributes:
    name: as it is reported.
    phase: 'prepare' or 'correct'.
    run: `Context -> Context`.
    options: its arguments, JSON-able: a resumed run must have the same.
  """

  name: str
  phase: str
  run: Callable[[Context], Context]
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Tuning(Protocol):
  """One block whose weights are codes, as a `Tuner` sees and changes it.

  Attributes:
    name: of the block.
    depth: of the block, from 0 (first) to 1 (last).
    leaves: its parameters by path, quantized or float.
    gains: paths of the norm gains and biases among them.
    groups: its quantized products in order, those with one input together.
    batches: re-iterable, `(stream, context, target)` of each calibration
      batch: the quantized stream coming in, and the float stream going out.
  """

  name: str
  depth: float
  leaves: Mapping[str, Any]
  gains: Sequence[str]
  groups: Sequence[Sequence[Site]]
  batches: Iterable[tuple[Any, Any, Any]]

  def apply(
    self, leaves: Mapping[str, Any], stream: Any, context: Any
  ) -> tuple[Any, ...]:
    """Outputs of the quantized block; differentiable in float leaves."""

  def moments(
    self, sites: Sequence[Site]
  ) -> Mapping[str, tuple[Mapping[str, jax.Array], Mapping[str, jax.Array]]]:
    """Mean and variance of each output channel, by site: float, quantized.

    Of what a BatchNorm makes of the product, where it is folded.
    """

  def set_leaf(self, path: str, value: jax.Array) -> None:
    """Replaces a float parameter."""

  def add_bias(self, site: Site, bias: jax.Array) -> None:
    """Adds to every output channel (N,) of a product."""

  def scale_output(self, site: Site, gain: jax.Array, shift: jax.Array) -> None:
    """Makes a product's output y gain + shift, by channel, in its scales.

    Raises:
      ValueError: the weight has no scale of its own for each channel, or its
        scale format cannot hold the new ones.
    """


@dataclasses.dataclass(frozen=True)
class Tuner:
  """A member that changes what is float in a block after it is encoded.

  Attributes:
    name: as it is reported.
    run: `Tuning -> facts`; changes go through the methods of `Tuning`.
    options: its arguments, JSON-able.
    check: `(Context, norm gains) -> None`, before the walk: raises where the
      whole model has nothing to act on.
  """

  name: str
  run: Callable[[Tuning], dict[str, Any]]
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  check: Callable[[Context, frozenset[str]], None] | None = None
  phase: str = dataclasses.field(default='correct', init=False)


@dataclasses.dataclass(frozen=True)
class Encoder:
  """The member of a chain that makes codes.

  Attributes:
    name: as it is reported.
    encode: `(Target, statistics, key) -> (QTensor, facts)`.
    observe: `Plan -> Observer` of the statistics of each weight's inputs on
      the quantized stream; None needs no data.
    options: its arguments, JSON-able.
  """

  name: str
  encode: Callable[[Target, Any, Any], tuple[Any, dict[str, Any]]]
  observe: Callable[[Plan], Any] | None = None
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  phase: str = dataclasses.field(default='encode', init=False)

  def __call__(
    self, target: Target, stat: Any, key: Any
  ) -> tuple[QTensor, dict[str, Any]]:
    """`encode`, checked.

    Raises:
      ValueError: the codes are not what the plan stores.
    """
    made, facts = self.encode(target, stat, key)
    found = getattr(made, 'quantizer', type(made).__name__), jnp.shape(made)
    wanted = target.storage.quantizer, jnp.shape(target.weight)
    if found != wanted:
      raise ValueError(
        f'{self.name} makes {found[0]} {found[1]} of the weight of '
        f'{target.name!r}; the plan stores {wanted[0]} {wanted[1]}'
      )
    return made, facts


Member = Transform | Encoder | Tuner


def chain(*members: Member | Sequence[Member]) -> tuple[Member, ...]:
  """Several transforms, applied in order.

  Raises:
    TypeError: a member is not a transform.
    ValueError: members out of order, or two encode members.
  """
  flat: list[Member] = []
  for member in members:
    parts = list(member) if isinstance(member, list | tuple) else [member]
    for part in parts:
      if not isinstance(part, Member):
        raise TypeError(
          f'a chain takes transforms such as ql.gptq(), got {part!r}'
        )
      flat.append(part)
  encoders = [t.name for t in flat if t.phase == 'encode']
  if len(encoders) > 1:
    raise ValueError(
      f'a chain has one member that makes codes, got {encoders}; codes are '
      'made once'
    )
  for before, after in itertools.pairwise(flat):
    if PHASES.index(before.phase) > PHASES.index(after.phase):
      raise ValueError(
        f'{after.name}() ({after.phase}) cannot follow {before.name}() '
        f'({before.phase}): a chain prepares, then encodes, then corrects'
      )
  return tuple(flat)
