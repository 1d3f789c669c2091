"""One block of the walk while its weights become codes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from quantlab import handlers, rewrites
from quantlab.core.tree import named_leaves
from quantlab.graph import known, tracing
from quantlab.ptq.resume import Entries
from quantlab.ptq.transform import Context, Encoder, Target


class Local:
  """A block's leaves and state, partly codes and partly float.

  Attributes:
    block: the block.
    leaves: its parameters by path, as they are by now.
    entries: what became of them here, by (kind, name, layer).
  """

  def __init__(
    self, block: Any, ctx: Context, made: Entries, shared: frozenset[str]
  ):
    self.block, self.ctx, self.plan = block, ctx, ctx.plan
    self.shared = shared
    self._params = dict(named_leaves(ctx.params))
    self.traced = tracing.Traced(
      block.program, block.analysis, block.paths, lambda const: None
    )
    self.floats = dict(block.take(self._params))
    self.leaves = dict(self.floats)
    self.state = {
      s.id: jax.tree.map(
        lambda x: x[block.layer], dict(ctx.state.get(s.id, {}))
      )
      for s in block.analysis.sites
    }
    self.float_state = dict(self.state)
    self.encoded: set[str] = set()
    self.entries: Entries = {}
    for site in block.analysis.sites:  # tied to an earlier block
      for path in shared & set(site.paths):
        if ('leaves', path, ()) in made:
          self.leaves[path] = made['leaves', path, ()]
          self.encoded.add(site.id)
    self._float_step = jax.jit(self._float)
    self._coded_step: Any = None

  def wants(self, site) -> bool:
    return self.plan.sites[site.id].rule is not None

  # Codes ---------------------------------------------------------------------

  def encode(self, site, stat, encoder: Encoder) -> dict[str, Any]:
    """Turns one site's weight into codes; returns the encoder's facts."""
    rule = self.plan.sites[site.id].rule
    self.encoded.add(site.id)
    if rule is None or rule.weight is None or site.side is None:
      return {}
    if site.id in self.plan.effective:
      return self._encode_effective(site, stat, encoder)
    facts: dict[str, Any] = {}
    for path in site.paths:
      if path in self.shared:
        # A parameter of several sites has no one Hessian: plain rounding.
        if ('leaves', path, ()) not in self.entries:
          if self.leaves[path] is not self.floats[path]:
            continue  # coded in an earlier block
          target = Target(
            path, None, self._params[path], self.plan.leaves[path]
          )
          facts |= self._keep('leaves', target, None, encoder)
        self.leaves[path] = self.entries['leaves', path, ()]
        continue
      layer = self.block.slices.get(path, ())
      target = Target(
        path, site, self.leaves[path], self.plan.leaves[path], layer
      )
      facts |= self._keep('leaves', target, stat, encoder)
      self.leaves[path] = self.entries['leaves', path, layer]
    return facts

  def _encode_effective(self, site, stat, encoder) -> dict[str, Any]:
    plan, layer = self.plan, self.block.layer
    mine = frozenset([site.id])
    dense = [self.floats[p] for p in self.block.paths]
    found = jax.jit(
      lambda ls: known.weights(self.traced, ls, mine, plan.folded & mine)
    )(dense)[site.id]
    target = Target(
      site.id, site, found['weight'], plan.effective[site.id], layer
    )
    facts = self._keep('effective', target, stat, encoder)
    if 'shift' in found:
      self.entries['shifts', site.id, layer] = found['shift']
    self._place(site.id)
    return facts

  def _keep(self, kind, target: Target, stat, encoder) -> dict[str, Any]:
    q, facts = encoder(target, stat, self.ctx.key)
    self.entries[kind, target.name, target.layer] = q
    layer = ''.join(f'[{i}]' for i in target.layer)
    return {target.name + layer: facts} if facts else {}

  def _place(self, site: str) -> None:
    """Puts a site's effective weight where its product finds it."""
    layer, state = self.block.layer, dict(self.state.get(site, {}))
    state['effective'] = self.entries['effective', site, layer]
    if ('shifts', site, layer) in self.entries:
      state['fold'] = {'shift': self.entries['shifts', site, layer]}
    self.state[site] = state

  # Changes of tuners ----------------------------------------------------------

  def tunable(self, site) -> bool:
    """Whether outputs of a site have channels that can be corrected."""
    rule = self.plan.sites[site.id].rule
    product = site.side is not None and site.kind in ('dot', 'conv')
    return product and rule is not None and rule.output is None

  def set_leaf(self, path: str, value: jax.Array) -> None:
    value = value.astype(self.leaves[path].dtype)
    self.leaves[path] = value
    self.entries['params', path, self.block.slices.get(path, ())] = value

  def add_bias(self, site, bias: jax.Array) -> None:
    state = dict(self.state.get(site.id, {}))
    state['bias'] = state.get('bias', 0) + bias
    self.state[site.id] = state
    self.entries['biases', site.id, self.block.layer] = state['bias']

  def scale_output(self, site, gain: jax.Array, shift: jax.Array) -> None:
    kind, name = self._stored(site)
    layer = self.block.layer
    q = self.entries[kind, name, layer]
    own = q.scale.shape[-1] == gain.shape[-1]
    if not own or q.quantizer.scale_format not in ('float32', 'bfloat16'):
      raise ValueError(
        f'the weight of site {site.id!r} is stored as {q.quantizer!r}: its '
        'outputs can be rescaled only where every channel has a scale of its '
        "own in float32 or bfloat16, as with per='channel' or group="
      )
    new = dataclasses.replace(q, scale=(q.scale * gain).astype(q.scale.dtype))
    self.entries[kind, name, layer] = new
    if kind == 'leaves':
      self.leaves[name] = new
    before = self.state.get(site.id, {})
    added = before.get('bias', 0) * gain + shift
    if ('shifts', name, layer) in self.entries:
      at = ('shifts', name, layer)
      self.entries[at] = self.entries[at] * gain
    if kind == 'effective':
      self._place(name)
    state = dict(self.state.get(site.id, {}))
    state['bias'] = added
    self.state[site.id] = state
    self.entries['biases', site.id, layer] = added

  def _stored(self, site) -> tuple[str, str]:
    """Kind and name of the codes of a site's weight."""
    if site.id in self.plan.effective:
      return 'effective', site.id
    [path] = site.paths
    if path in self.shared:
      raise ValueError(
        f'the weight of site {site.id!r} has other uses: its scales cannot be '
        'changed for one of them'
      )
    return 'leaves', path

  def restore(self, entries: Entries) -> None:
    """Takes the block as it was finished before."""
    self.entries = dict(entries)
    for (kind, name, _), value in entries.items():
      if kind in ('leaves', 'params'):
        self.leaves[name] = value
      elif kind == 'effective':
        self._place(name)
    for (kind, name, _), value in entries.items():
      if kind == 'biases':
        self.state[name] = {**self.state.get(name, {}), 'bias': value}
    self.encoded = {s.id for s in self.block.analysis.sites if self.wants(s)}

  # Both streams --------------------------------------------------------------

  def observed(self, observer, ids: Sequence[str]):
    """A function of (stream, context): statistics of the inputs of sites."""
    wanted = _Only(observer, ids)
    handler = handlers.observing(wanted, handlers.deploying(self.plan))
    plain = handlers.observing(wanted, handlers.computing)
    encoded = frozenset(self.encoded)
    chosen = frozenset(ids) | encoded | rewrites.adjusted(self.state)

    def mixed(site, lhs, rhs, default, state):
      inner = handler if site.id in encoded else plain
      return inner(site, lhs, rhs, default, state)

    @jax.jit
    def run(leaves, state, stream, context):
      return self._evaluator(
        leaves, mixed, chosen, self.plan.folded & encoded, wanted
      ).run([*stream, *context], state)[1]

    leaves = self._listed(self.leaves)
    return lambda stream, context: run(leaves, self.state, stream, context)

  def float_observed(self, observer, ids: Sequence[str]):
    """The same of the float block, with the BatchNorms folded."""
    wanted = _Only(observer, ids)
    handler = handlers.observing(wanted, handlers.computing)
    folded = self.plan.folded & {s.id for s in self.block.analysis.sites}
    chosen = frozenset(ids) | folded | rewrites.adjusted(self.float_state)

    @jax.jit
    def run(leaves, state, stream, context):
      state = rewrites.fold(self.traced, leaves, folded, state)
      return self._evaluator(leaves, handler, chosen, folded, wanted).run(
        [*stream, *context], state
      )[1]

    leaves = self._listed(self.floats)
    return lambda stream, context: run(
      leaves, self.float_state, stream, context
    )

  def float_step(self, stream, context) -> tuple[Any, ...]:
    """The float stream after the block."""
    leaves = self._listed(self.floats)
    return self._float_step(leaves, self.float_state, stream, context)

  def _float(self, leaves, state, stream, context):
    chosen = rewrites.adjusted(state)
    evaluator = self._evaluator(leaves, handlers.computing, chosen, frozenset())
    return tuple(evaluator.run([*stream, *context], state)[0])

  def coded_step(self, stream, context) -> tuple[Any, ...]:
    """The quantized stream after the block; all its weights are codes."""
    if self._coded_step is None:
      self._coded_step = jax.jit(self._coded)
    return self._coded_step(self.leaves, self.state, stream, context)

  def apply(self, leaves, stream, context) -> tuple[Any, ...]:
    """The quantized block on its parameters by path, on floats."""
    return self._coded(leaves, self.state, stream, context, integer=False)

  def _coded(self, leaves, state, stream, context, integer=True):
    encoded = frozenset(self.encoded)
    evaluator = self._evaluator(
      self._listed(leaves),
      handlers.deploying(self.plan, integer=integer),
      encoded | rewrites.adjusted(state),
      self.plan.folded & encoded,
    )
    return tuple(evaluator.run([*stream, *context], state)[0])

  def _evaluator(self, leaves, handler, chosen, folded, monoid=None):
    return rewrites.evaluator_of(
      self.traced, leaves, chosen, handler, monoid=monoid, folded=folded
    )

  def _listed(self, leaves) -> list[Any]:
    return [leaves[p] for p in self.block.paths]


class OutputMoments:
  """Observer: mean of the output of each channel, and squares around it.

  Merged as by Chan et al. (1983): the difference of E[y^2] and E[y]^2 would
  have no digits left where a mean is large.
  """

  def __init__(self, ids: Iterable[str]):
    self.ids = frozenset(ids)

  def init(self, site):
    if site.id not in self.ids:
      return None
    zero = jnp.zeros((*self._lead(site), self._channels(site)), jnp.float32)
    return {'mean': zero, 'squares': zero, 'rows': jnp.zeros((), jnp.float32)}

  def update(self, site, stat, lhs, rhs, out, state):
    y = site.dims.out_rows(out.astype(jnp.float32))
    mean = jnp.mean(y, -2)
    new = {
      'mean': mean,
      'squares': jnp.sum((y - mean[..., None, :]) ** 2, -2),
      'rows': jnp.float32(y.shape[-2]),
    }
    return self.merge(site, stat, new)

  def merge(self, site, a, b):
    rows = a['rows'] + b['rows']
    share = b['rows'] / jnp.maximum(rows, 1)
    apart = b['mean'] - a['mean']
    between = apart**2 * a['rows'] * share
    return {
      'mean': a['mean'] + apart * share,
      'squares': a['squares'] + b['squares'] + between,
      'rows': rows,
    }

  def result(self, stat) -> dict[str, jax.Array]:
    return {'mean': stat['mean'], 'var': stat['squares'] / stat['rows']}

  def _channels(self, site) -> int:
    return math.prod(site.weight_shape[i] for i in site.dims.w_free)

  def _lead(self, site) -> tuple[int, ...]:
    return tuple(site.weight_shape[i] for i in site.dims.w_batch)


class _Only:
  """An observer restricted to some sites."""

  def __init__(self, observer, ids: Iterable[str]):
    self.observer, self.ids = observer, frozenset(ids)

  def init(self, site):
    return self.observer.init(site) if site.id in self.ids else None

  def update(self, *args):
    return self.observer.update(*args)

  def merge(self, *args):
    return self.observer.merge(*args)
