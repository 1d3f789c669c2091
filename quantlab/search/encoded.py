"""A program whose weights are what an encoder made of them in each format.

`Program` rounds weights as it runs. Here they were encoded before (by GPTQ,
say), every weight in every format once, and a choice picks among them: tables
and plans of any encoder run through one compiled function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from quantlab import handlers
from quantlab.core.tree import named_leaves
from quantlab.search.program import Operand, Program, State
from quantlab.search.simulate import kind


class Encoded(Program):
  """A program with stored weights in the place of simulated ones.

  Args:
    program: the program, whose static ranges are taken over.
    encode: `plan -> variables` of a quantized model, such as
      `lambda plan: ql.ptq(apply, params, plan, batches, ql.gptq()).params`.
      Called once for each column of the space; for a choice that mixes
      columns to be what `encode` would make of it, codes of a weight must not
      depend on the formats of others.

  Raises:
    ValueError: a folded weight lies in a loop.
  """

  def __init__(self, program: Program, encode: Callable[[Any], Any]):
    self.__dict__.update(program.__dict__)
    self._stored = self._columns([encode(c) for c in program.space.columns])

  def simulated(
    self,
    simulate: handlers.Simulate | None = None,
    product: handlers.Product = handlers.plainly,
  ) -> Callable:
    """See `Program`; by default weights are taken from those stored."""
    return super().simulated(simulate or self._stored_or_simulated, product)

  def state(
    self, leaves: Callable[[Operand, tuple[int, ...]], Mapping[str, Any]]
  ) -> State:
    """See `Program`; stored weights are leaves too, by option."""

    def more(operand, loops):
      given = leaves(operand, loops)
      stored = self._stored.get(operand)
      return given if stored is None else {**given, 'offset': stored}

    return super().state(more)

  def _stored_or_simulated(self, site, role, x, quantizer, leaves, **where):
    stored = leaves.get('offset')
    if stored is None:
      return self.options(site, role, x, quantizer, leaves, **where)
    index = jnp.asarray(leaves['bits'])[..., None, None]
    chosen = jnp.take_along_axis(stored, index[None], 0)[0]
    return jnp.where(self._floats(site)[index], x, chosen)

  def _floats(self, site: str) -> jax.Array:
    """Which options of a site leave its weight in float."""
    return jnp.array([q is None for q in self.choices[site, 'weight']])

  def _columns(self, models: Sequence[Any]) -> dict[Operand, jax.Array]:
    """(options, loops..., K, N) of every weight; zeros where it is float."""
    plan, found = self.space.plan, {}
    by_column = [
      {**dict(named_leaves(m['weights'])), **m['effective']} for m in models
    ]
    homes = {home: path for path, home in plan.weight_roles.items()}
    for operand in self.operands:
      site, role = operand
      if kind(role) != 'weight':
        continue
      folded = site in plan.effective
      if folded and plan.sites[site].loops:
        raise ValueError(
          f'the folded weight of {site!r} lies in a loop; encoded weights are '
          'picked outside of loops'
        )
      name = site if folded else homes[operand]
      layout = (plan.effective if folded else plan.leaves)[name].layout
      each = [
        None
        if q is None
        else layout.to_canonical(by_column[column][name].dequantize())
        for q, column in zip(
          self.choices[site, 'weight'][:-1],
          self.space.column_of[site],
          strict=True,
        )
      ]
      each.append(None)  # float, beyond the options
      shape = next(x for x in each if x is not None)
      found[operand] = jnp.stack(
        [jnp.zeros_like(shape) if x is None else x for x in each]
      )
    return found
