"""Models for equivalent transforms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from graph import programs
from graph.programs import Program

import quantlab as ql
from quantlab.graph import tracing
from quantlab.planner import make
from quantlab.ptq.transform import Context
from quantlab.recipe import recipe as as_recipe

STATIC = ql.rule(
  weight=ql.int8(), input=ql.int8(per='tensor', static=True), fold=True
)
TOKEN = ql.rule(weight=ql.int4(), input=ql.int8(per='token'))


def context(program: Program, rules, batches=None) -> Context:
  """What a prepare member is given, for a program."""
  traced, leaves, ins = tracing.Tracer(program.apply)(
    program.params, program.args, {}
  )
  made = make(traced, leaves, ins, as_recipe(rules))
  batches = [program.args] if batches is None else batches
  return Context(program.apply, traced, made, program.params, batches, {})


def sqnr(want, got) -> float:
  """Signal over noise in decibels."""
  want, got = (np.asarray(x, np.float64) for x in (want, got))
  return 10 * float(np.log10((want**2).sum() / ((want - got) ** 2).sum()))


def conv(x, w, groups=1):
  return jax.lax.conv_general_dilated(
    x,
    w,
    (1, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


def joined_convolutions() -> Program:
  """Two convolutions side by side feed a grouped one, then a dense layer."""

  def apply(p, x):
    y = jnp.concatenate([conv(x, p['a']), conv(x, p['b'])], -1)
    y = jax.nn.relu(conv(jax.nn.relu(y), p['grouped'], 2))
    return y.mean((1, 2)) @ p['head']

  new = programs.Random(3)
  params = {
    'a': new(3, 3, 3, 2),
    'b': new(3, 3, 3, 6),
    'grouped': new(3, 3, 4, 10),
    'head': new(10, 3),
  }
  return Program(apply, params, (new(2, 6, 6, 3, scale=1.0),))


def depthwise() -> Program:
  """Pointwise, depthwise and pointwise convolutions, a BatchNorm after each."""

  def apply(p, x):
    for kernel, groups, norm in zip(p['w'], (1, 8, 1), p['norm'], strict=True):
      y = (conv(x, kernel, groups) - norm['mean']) * norm['inverse']
      x = jax.nn.relu(y * norm['scale'] + norm['bias'])
    return x.mean((1, 2)) @ p['head']

  new = programs.Random(6)
  params = {
    'w': [new(1, 1, 3, 8), new(3, 3, 1, 8), new(1, 1, 8, 5)],
    'norm': [
      {'mean': new(n), 'inverse': 1 + abs(new(n))}
      | {'scale': 1 + new(n, scale=0.1), 'bias': new(n)}
      for n in (8, 8, 5)
    ],
    'head': new(5, 3),
  }
  return Program(apply, params, (new(2, 6, 6, 3, scale=1.0),))


def experts() -> Program:
  """Dense mixture of experts, a tied matrix and one read in two halves."""

  def apply(p, x):
    x = programs.rms_norm(p['g'], x)
    h = jax.nn.relu(jnp.einsum('bk,ekn->ebn', x, p['w']))
    y = jnp.einsum('ebn,enm->bm', h, p['v'])
    y = y @ p['tied'] + jax.nn.gelu(x @ p['tied'])
    return y @ p['halves'][:8] + x @ p['halves'][8:]

  new = programs.Random(4)
  params = {
    'g': 1 + new(8),
    'w': new(3, 8, 6),
    'v': new(3, 6, 8),
    'tied': new(8, 8),
    'halves': new(16, 8),
  }
  return Program(apply, params, (new(5, 8, scale=1.0),))


def fused_heads() -> Program:
  """One product with three joined parameters after a norm with a bias."""

  def apply(p, x):
    x = (x - x.mean(-1, keepdims=True)) * p['g'] + p['b']
    qkv = x @ jnp.concatenate([p['q'], p['k'], p['v']], 1)
    return jax.nn.relu(qkv) @ p['o'] + p['c']

  new = programs.Random(5)
  params = {
    'g': 1 + new(8),
    'b': new(8),
    **{name: new(8, 4) for name in 'qkv'},
    'o': new(12, 8),
    'c': new(8),
  }
  return Program(apply, params, (new(5, 8, scale=1.0),))


# (program, recipe) by name.
MODELS = {
  'scanned': (
    lambda: programs.linen_transformer(scanned=True, blocks=3),
    {'/kernel$': STATIC},
  ),
  'llama': (
    programs.bare_llama,
    {r'blocks/1/(attention/w.|mlp/\w+)$': TOKEN},
  ),
  'bert': (programs.masked_bert, {'blocks/1/.*kernel$': STATIC}),
  'resnet': (programs.linen_resnet, {'Residual_1|Dense': STATIC}),
  'depthwise': (depthwise, {'.*': STATIC}),
  'unet': (programs.timed_unet, {'(down_1|time_).*kernel$': STATIC}),
  'joined': (joined_convolutions, {'.*': STATIC}),
  'experts': (experts, {'.*': TOKEN}),
  'fused': (fused_heads, {'.*': STATIC}),
}
