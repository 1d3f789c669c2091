"""A program whose weights are what an encoder made of them in each format.

`Program` rounds weights as it runs. Here they were encoded before (by GPTQ,
say), every weight in every format once, and a choice picks among them: tables
and plans of any encoder run through one compiled function.

What becomes of a weight depends here on its own format and on the float
model's inputs alone, not on what the weights before it became (as in `ql.ptq`,
whose walk hands on the quantized stream): so codes that were made column by
column serve every choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from quantlab import handlers, layering, rewrites
from quantlab.calibration import batches as batches_lib
from quantlab.calibration import ranges
from quantlab.core import rng
from quantlab.core.tree import named_leaves
from quantlab.graph import tracing
from quantlab.plan import Plan
from quantlab.ptq.run import ptq
from quantlab.ptq.transform import Encoder
from quantlab.search.program import Operand, Program, State
from quantlab.search.simulate import kind


def on_floats(
  encoder: Encoder,
  apply: Callable,
  params: Any,
  plan: Plan,
  batches: Iterable[Any],
) -> Encoder:
  """The encoder with statistics of the float stream for every weight.

  The layers of a scanned stack are encoded one by one, each on its own inputs.

  Args:
    encoder: a member of a chain, such as `ql.gptq()`.
    apply, params: the float model.
    plan: one that quantizes every weight that the encoder will see.
    batches: re-iterable calibration batches.

  Raises:
    ValueError: a site lies in nested loops, whose layers are not taken one by
      one.
  """
  if encoder.observe is None:
    return encoder
  sites = _sites(apply, params, plan, batches_lib.first(batches))
  for name, site in sites.items():
    if site.loops and (why := layering.whole(site)):
      raise ValueError(
        f'{encoder.name} takes the layers of a scan one by one, and {name!r} '
        f'{why}; encode= takes ql.rtn() for it'
      )
  observer = encoder.observe(plan)
  stats = ranges.stream(
    rewrites.observe(apply, observer, plan, quantize=False),
    params,
    batches,
    observer,
  )

  def encode(target, stat, key):
    del stat
    site = sites.get(target.name)
    if site is None:
      return encoder.encode(dataclasses.replace(target, site=None), None, key)
    mine = stats.get(site.id)
    if not site.loops:
      return encoder.encode(dataclasses.replace(target, site=site), mine, key)
    made = [
      encoder.encode(
        dataclasses.replace(
          target, site=site, weight=target.weight[i], layer=(i,)
        ),
        jax.tree.map(lambda x, i=i: x[i], mine),
        None if key is None else jax.random.fold_in(key, i),
      )
      for i in range(site.loops[0])
    ]
    codes = jax.tree.map(lambda *xs: jnp.stack(xs), *(q for q, _ in made))
    return codes, {str(i): facts for i, (_, facts) in enumerate(made) if facts}

  return Encoder(encoder.name, encode)


def _sites(apply, params, plan: Plan, args) -> dict[str, Any]:
  """The product of each weight that is in one product alone."""
  traced, *_ = tracing.Tracer(apply)(params, args, {})
  found: dict[str, list[Any]] = {}
  for site in traced.analysis.sites:
    planned = plan.quantized.get(site.id)
    for name in {site.id, *planned.paths} if planned else ():
      found.setdefault(name, []).append(site)
  return {
    k: v[0] for k, v in found.items() if len(v) == 1 and v[0].kind != 'gather'
  }


class Encoded(Program):
  """A program with stored weights in the place of simulated ones.

  Args:
    program: the program, whose static ranges are taken over.
    encoder: makes the codes, such as `ql.gptq()`.
    batches: re-iterable calibration batches, without targets.
    key: for what is random.

  Raises:
    ValueError: a folded weight lies in a loop; see `on_floats`.
    TypeError: no encoder (a chain, or a member that changes other weights
      too, would leave a weight that depends on the formats of others), or no
      random key.
  """

  def __init__(
    self,
    program: Program,
    encoder: Encoder,
    batches: Iterable[Any],
    key: jax.Array | None = None,
  ):
    check(encoder)
    rng.check_key(key)
    self.__dict__.update(program.__dict__)
    apply, params, plan = self.apply, self.params, self.space.plan
    made = on_floats(encoder, apply, params, plan, batches)
    self._stored = self._columns(
      [
        ptq(apply, params, column, batches, made, key=key).params
        if column.leaves or column.effective
        else None
        for column in self.space.columns
      ]
    )

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
    """(options, loops..., K, N) of every weight; zeros where it is float.

    Args:
      models: variables of each column; None where it has no weight to encode.
    """
    plan, found = self.space.plan, {}
    by_column = [
      {**dict(named_leaves(m['weights'])), **m['effective']} if m else {}
      for m in models
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


def check(encoder: Any) -> None:
  """Refuses what does not make codes of one weight after another.

  Raises:
    TypeError: says what was found.
  """
  if not isinstance(encoder, Encoder):
    raise TypeError(
      'encode= takes one member of a chain that makes codes, such as '
      f'ql.gptq(), got {getattr(encoder, "name", encoder)!r}: members that '
      'change other weights too make tables of another model. Prepare the '
      'parameters first, and measure those'
    )
