"""The trained test beds (experiments.testbed), and what can ail them.

Every pathology leaves the model's function as it is (recipes, section 0).
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from graph import programs

import quantlab as ql
from configs.testbeds import digits as digits_config
from configs.testbeds import text as text_config
from experiments import testbed

DATA = pathlib.Path(__file__).parents[1] / 'data'
FILES = {
  'transformer': 'text_model.npz',
  'llama': 'llama_model.npz',
  'digits': 'digits_model.npz',
}


class Bed(NamedTuple):
  """`apply(params, x)`, and the arrays that lie beside the parameters."""

  apply: Callable[..., Any]
  params: Any
  kept: dict[str, np.ndarray]


def config(name: str) -> Any:
  if name == 'digits':
    return digits_config.get_config()
  return text_config.get_config(name)


@functools.cache
def load(name: str) -> Bed:
  apply, init = testbed.model(config(name))
  shapes = jax.eval_shape(init, jax.random.key(0))
  found = dict(np.load(DATA / FILES[name]))
  params = _tree(shapes, {k: found.pop(k) for k in programs.flat(shapes)})
  kept = {k: v.astype(np.int32) for k, v in found.items()}
  return Bed(apply, params, kept)


@functools.cache
def _loss(apply):
  @jax.jit
  def loss(params, x, labels):
    logits = apply(params, x)
    found = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return found.mean(), (logits.argmax(-1) == labels).mean()

  return loss


def judged(apply, params, x, labels):
  """Cross-entropy and accuracy."""
  return tuple(float(v) for v in _loss(apply)(params, x, labels))


# Pathologies ------------------------------------------------------------------


def outlier_channels(params, seed, channels=2, factor=40.0, where='_norm'):
  """I1: a few channels of each norm are large, the next weights' rows small."""
  rng = np.random.default_rng(seed)
  flat = dict(programs.flat(params))
  for path in [p for p in flat if p.endswith(f'{where}/scale')]:
    block = path.rsplit('/', 2)[0]
    s = np.ones(flat[path].shape[-1], np.float32)
    s[rng.choice(s.size, channels, replace=False)] = factor
    for name in ('scale', 'bias'):
      norm = path.removesuffix('scale') + name
      flat[norm] = flat[norm] * s
    readers = ('up',) if 'mlp' in path else ('query', 'key', 'value')
    for name in readers:
      kernel = f'{block}/{name}/kernel'
      flat[kernel] = flat[kernel] / s[:, None]
  return programs.unflat(params, flat)


def one_sided(params, seed, channels=2, shift=30.0):
  """I2: a few channels of each MLP's input lie far from zero."""
  rng = np.random.default_rng(seed)
  flat = dict(programs.flat(params))
  for path in [p for p in flat if p.endswith('mlp_norm/bias')]:
    block = path.rsplit('/', 2)[0]
    z = np.zeros(flat[path].shape[-1], np.float32)
    chosen = rng.choice(z.size, channels, replace=False)
    z[chosen] = shift * rng.choice([-1, 1], channels)
    flat[path] = flat[path] + z
    bias, kernel = f'{block}/up/bias', f'{block}/up/kernel'
    flat[bias] = flat[bias] - z @ flat[kernel]
  return programs.unflat(params, flat)


def large_keys(params, seed, heads, factor=8.0):
  """I3: pairs of key channels that RoPE turns are large, the queries' small."""
  rng = np.random.default_rng(seed)
  flat = dict(programs.flat(params))
  for path in [p for p in flat if p.endswith('/wk')]:
    pairs = flat[path].shape[-1] // 2
    s = np.ones((heads, pairs // heads), np.float32)
    s[np.arange(heads), rng.integers(0, s.shape[1], heads)] = factor
    s = np.repeat(s.reshape(-1), 2)  # neighbours turn together
    query = path.removesuffix('wk') + 'wq'
    flat[path], flat[query] = flat[path] * s, flat[query] / s
  return programs.unflat(params, flat)


def imbalance(params, seed, spread=1.5):
  """I4: random factors between the convolutions, and before the head.

  They pass through ReLU and the mean over pixels. The BatchNorms take them, so
  that they are in the weights once these are folded.
  """
  rng = np.random.default_rng(seed)
  flat = dict(programs.flat(params))
  for i, reader in enumerate(('conv_1', 'conv_2', 'head')):
    kernel = f'params/{reader}/kernel'
    s = np.exp(spread * rng.normal(size=flat[kernel].shape[-2]))
    s = s.astype(np.float32)
    flat[kernel] = flat[kernel] / s[:, None]
    for name in ('scale', 'bias'):
      norm = f'params/bn_{i}/{name}'
      flat[norm] = flat[norm] * s
  return programs.unflat(params, flat)


# What reads the stream after each norm of a Llama, and what writes to it.
READERS = {
  'attention_norm': ('attention/wq', 'attention/wk', 'attention/wv'),
  'mlp_norm': ('mlp/gate', 'mlp/up'),
  'norm': ('head/kernel',),
}
WRITERS = ('embed/embedding', 'attention/wo', 'mlp/down')


class _Power:
  """Observer: sum of x x^T over the rows that follow each norm."""

  def init(self, site):
    one = site.id.endswith(tuple(names[0] for names in READERS.values()))
    return jnp.zeros((site.weight_shape[0],) * 2) if one else None

  def update(self, site, stat, lhs, rhs, out, state):
    x = lhs.reshape(-1, lhs.shape[-1])
    return stat + x.T @ x

  def merge(self, site, a, b):
    return a + b


@functools.cache
def _observed(apply):
  return jax.jit(ql.observe(apply, _Power()))


def stream_power(apply, params, tokens):
  """Second moments (dim, dim) of what the norms of a Llama give, trace 1.

  Times the gains: not the stream's own before they are folded.
  """
  found = jax.tree.leaves(_observed(apply)(params, tokens)[1])
  power = np.asarray(sum(found), float)
  return power / np.trace(power)


def concentrated(apply, params, tokens):
  """I5: the stream of a Llama in the basis of its principal components.

  The gains of the norms go into what reads the stream, which makes the
  normalized stream indifferent to the basis. `ql.fold_norms()` has nothing
  left to win.
  """
  flat = {k: np.asarray(v, float) for k, v in programs.flat(params).items()}
  readers = []
  for path in [p for p in flat if p.endswith('norm/scale')]:
    block, _, norm = path.removesuffix('/scale').rpartition('/')
    here = [f'{block}/{name}'.lstrip('/') for name in READERS[norm]]
    for name in here:
      flat[name] = flat[path][:, None] * flat[name]
    flat[path] = np.ones_like(flat[path])
    readers += here
  power = stream_power(apply, _tree(params, flat), tokens)
  basis = np.linalg.eigh(power)[1]
  for path in flat:
    if path in readers:
      flat[path] = basis.T @ flat[path]
    elif path.endswith(WRITERS):
      flat[path] = flat[path] @ basis
  return _tree(params, flat)


def _tree(params, flat):
  leaves = {k: jnp.asarray(v, jnp.float32) for k, v in flat.items()}
  return programs.unflat(params, leaves)
