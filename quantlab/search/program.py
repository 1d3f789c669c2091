"""A program with its search space: the state that stands for a choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantlab import handlers, rewrites
from quantlab.calibration import batches as batches_lib
from quantlab.calibration import ranges
from quantlab.plan import Plan
from quantlab.search.simulate import Choices, Options, kind
from quantlab.search.space import Space

Operand = tuple[str, str]  # (site, role)
State = dict[str, dict[str, dict[str, Any]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
  """Batches without their targets; re-iterable as they are.

  Attributes:
    batches: tuples `(*inputs, *targets)`.
    targets: how many arrays at the end are no inputs.
  """

  batches: Iterable[Any]
  targets: int

  def __iter__(self) -> Iterator[tuple[Any, ...]]:
    for i, batch in enumerate(self.batches):
      yield split(batch, self.targets, i)[0]


def split(
  batch: Any, targets: int, index: int = 0
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
  """Inputs and targets of a batch."""
  args = batches_lib.arguments(batch)
  if len(args) <= targets:
    raise ValueError(
      f'batch {index} has {len(args)} arrays; the last {targets} of them are '
      'targets, and at least one input must come before. batches is a list of '
      'tuples (*inputs, *targets); task= says how many targets there are, such '
      'as task=ql.quality.classification with labels'
    )
  batches_lib.refuse_empty(args, f'batch {index}')
  return args[: len(args) - targets], args[len(args) - targets :]


def operands(plan: Plan) -> dict[Operand, tuple[int, ...]]:
  """What is simulated, with the loop axes that its leaves carry.

  The second parameter of a weight that joins several has the role 'weight:1'.
  """
  found = {
    home: plan.sites[home[0]].weight_loops
    for home in plan.weight_roles.values()
  }
  for name in plan.effective:
    found[name, 'weight'] = plan.sites[name].loops
  for name, site in plan.quantized.items():
    for role in site.rule.quantizers if site.rule else ():
      if role != 'weight':
        found[name, role] = site.loops
  return found


class Program:
  """A function with its search space, and the ranges of its options.

  Attributes:
    apply, params, space: as given.
    operands: see there.
    choices: quantizers of every operand; a further one, None, is float.
    options: simulates them.
  """

  def __init__(
    self, apply: Callable, params: Any, space: Space, inputs: Iterable[Any]
  ):
    self.apply, self.params, self.space = apply, params, space
    self.operands = operands(space.plan)
    self.choices: Choices = {
      (site, role): (
        *(r.quantizers.get(role) if r else None for r in rules),
        None,
      )
      for site, rules in space.options.items()
      for role in ('weight', 'input', 'output', 'lhs', 'rhs')
    }
    self.options = Options(self.choices)
    self._ranges = self._calibrate(inputs)

  @property
  def float(self) -> dict[str, int]:
    """The choice that leaves every site in float."""
    options = self.space.options
    return {k: len(options[s]) for k, (s, _) in self.space.places.items()}

  def choice(self, options: Sequence[int]) -> dict[str, int]:
    """Options of the rows by site, or layer; what is not searched is fixed."""
    found = dict.fromkeys(self.space.places, 0)
    for row, k in zip(self.space.rows, options, strict=True):
      found |= dict.fromkeys(row.sites, k)
    return found

  def alone(
    self, row: int, option: int, base: Mapping[str, int]
  ) -> dict[str, int]:
    """One row at an option, the others as in `base`."""
    sites = self.space.rows[row].sites
    return {**base, **dict.fromkeys(sites, option)}

  def bits(self, choice: Mapping[str, int]) -> State:
    """The state of a choice; of one structure for all choices."""

    def leaves(operand, loops):
      site = operand[0]
      if site not in self.space.layers:
        return {'bits': np.full(loops, choice[site], np.int32)}
      each = [choice[name] for name in self.space.layers[site]]
      return {'bits': np.array(each, np.int32)}

    return self.state(leaves)

  def state(
    self, leaves: Callable[[Operand, tuple[int, ...]], Mapping[str, Any]]
  ) -> State:
    """State of all operands: their ranges, and leaves by operand and loops."""
    found: State = {}
    for operand, loops in self.operands.items():
      site, role = operand
      found.setdefault(site, {})[role] = {
        **self._ranges.get(operand, {}),
        **leaves(operand, loops),
      }
    return found

  def variables(self, params: Any, state: State) -> dict[str, Any]:
    return {'weights': params, 'sites': state}

  def simulated(
    self,
    simulate: handlers.Simulate | None = None,
    product: handlers.Product = handlers.plainly,
  ) -> Callable:
    """`apply` of variables, with operands simulated as a search does it."""
    return rewrites.fake_quantized(
      self.apply, self.space.plan, simulate or self.options, product
    )

  def _calibrate(self, inputs) -> dict[Operand, dict[str, jax.Array]]:
    """Static ranges of every option, options along the last axis."""
    by_column = [
      ranges.calibrate(self.apply, self.params, plan, inputs)
      if plan.static
      else {}
      for plan in self.space.columns
    ]
    found = {}
    for operand, loops in self.operands.items():
      site, role = operand
      quantizers = self.choices[site, kind(role)]
      if not any(q is not None and q.static for q in quantizers):
        continue
      columns = self.space.column_of[site]
      given = [
        by_column[columns[k]].get(site, {}).get(role, {})
        if k < len(columns)
        else {}
        for k in range(len(quantizers))
      ]
      found[operand] = {
        name: jnp.concatenate(
          [g.get(name, jnp.full((*loops, 1, 1), fill)) for g in given], -1
        )
        for name, fill in (('scale', 1.0), ('zero_point', 0.0))
      }
    return found
