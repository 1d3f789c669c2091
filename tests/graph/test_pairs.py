"""Pairs: found where they are, and a fold across each changes nothing."""

import functools

import numpy as np
import pytest
from graph import programs
from graph.folding import check_folds, described

from quantlab.graph.migrate import scale_pair, shift_pair
from quantlab.graph.pairs import pairs


def norm_pair(at, *into, allows='scale', shape=(8,)):
  return ('norm', f'{at}/scale', into, shape, allows)


def linen_block(at, shape=(8,)):
  """Pairs of a block of the Linen transformer."""
  heads = [f'{at}/{n}/kernel' for n in ('query', 'key', 'value')]
  return [
    norm_pair(f'{at}/attention_norm', *heads, shape=shape),
    ('v_out', heads[2], (f'{at}/out/kernel',), shape, 'rotate scale'),
    norm_pair(
      f'{at}/mlp_norm', f'{at}/up/kernel', allows='scale shift', shape=shape
    ),
  ]


def llama_block(at):
  heads = [f'{at}/attention/{n}' for n in ('wq', 'wk', 'wv')]
  up = f'{at}/mlp/up'
  return [
    norm_pair(f'{at}/attention_norm', *heads, shape=(16,)),
    # Two key-value heads of four channels, each shared by two query heads.
    ('v_out', heads[2], (f'{at}/attention/wo',), (8,), 'rotate scale'),
    norm_pair(f'{at}/mlp_norm', f'{at}/mlp/gate', up, shape=(16,)),
    ('up_down', up, (f'{at}/mlp/down',), (24,), 'scale'),
  ]


def bert_block(at, norm):
  heads = [f'{at}/attention/{n}/kernel' for n in ('query', 'key', 'value')]
  out = f'{at}/attention/out/kernel'
  up = f'{at}/mlp/up/kernel'
  return [
    # What a norm gives also enters the residual sum: nothing can be folded.
    norm_pair(norm, *heads, shape=(16,), allows=''),
    ('v_out', heads[2], (out,), (16,), 'rotate scale shift'),
    norm_pair(f'{at}/attention_norm', up, shape=(16,), allows=''),
  ]


def conv(source, into, channels):
  return ('conv', source, (into,), (channels,), 'scale')


def mobilenet():
  found, last, channels = [], 'stem/conv/kernel', 4
  for i in range(13):
    depthwise, pointwise = (
      f'blocks/{i}/{n}/kernel' for n in ('depthwise', 'pointwise')
    )
    found.append(conv(last, depthwise, channels))
    found.append(conv(depthwise, pointwise, channels))
    last, channels = pointwise, 6
  return [*found, conv(last, 'head/kernel', 6)]


EXPECTED = {
  'transformer': [
    *linen_block('params/block_0'),
    *linen_block('params/block_1'),
    norm_pair('params/norm', 'params/head/kernel'),
  ],
  'scanned': [
    norm_pair('params/norm', 'params/head/kernel'),
    *linen_block('params/blocks', shape=(3, 8)),
  ],
  # The last norm feeds the embedding, transposed, which is looked up too.
  'llama': [*llama_block('blocks/0'), *llama_block('blocks/1')],
  'bert': [
    *bert_block('blocks/0', 'embed/norm'),
    *bert_block('blocks/1', 'blocks/0/mlp_norm'),
  ],
  'resnet': [
    conv(f'stages/{s}/{b}/conv1/kernel', f'stages/{s}/{b}/conv2/kernel', n)
    for s, n in enumerate((4, 8, 16))
    for b in range(2)
  ],
  'linen_resnet': [
    conv(f'params/{r}/Conv_0/kernel', f'params/{r}/Conv_1/kernel', n)
    for r, n in (('Residual_0', 4), ('Residual_1', 8))
  ],
  'mobilenet': mobilenet(),
  # GroupNorm and SiLU everywhere, sums with the time embedding.
  'unet': [],
}
PRODUCERS = {  # kind: roles of what is divided
  'norm': ('gain', 'bias'),
  'v_out': ('kernel', 'bias'),
  'up_down': ('kernel',),
  'conv': ('gain', 'bias'),
  'linear': ('kernel', 'bias'),
}


@functools.cache
def found(name):
  program = programs.MODELS[name]()
  return program, pairs(program.apply, program.params, *program.args)


@pytest.mark.parametrize('name', EXPECTED)
def test_the_pairs_of_each_model_are_found(name):
  _, here = found(name)
  assert [described(p) for p in here] == EXPECTED[name]
  for pair in here:
    roles = tuple(m.role for m in pair.producers)
    assert roles == PRODUCERS[pair.kind][: len(roles)]
    assert pair.residual == (not pair.allows)


@pytest.mark.parametrize('name', [n for n in EXPECTED if EXPECTED[n]])
def test_a_fold_across_any_pair_keeps_the_function(name):
  program, here = found(name)
  check_folds(program, here)


def test_heads_and_groups_of_values_are_known():
  _, here = found('llama')
  pair = next(p for p in here if p.kind == 'v_out')
  assert pair.heads == 2
  [out] = pair.consumers
  # Each value channel meets two rows of the output matrix.
  assert out.axes == (0,)
  counts = np.bincount(out.index.reshape(-1))
  np.testing.assert_array_equal(counts, np.full(8, 2))
  [value] = pair.producers
  assert value.axes == (1,)


def test_a_fold_that_is_not_allowed_is_refused():
  program, here = found('bert')
  residual = next(p for p in here if p.residual)
  params = programs.flat(program.params)
  with pytest.raises(ValueError, match='residual sum'):
    scale_pair(params, residual, np.ones(residual.shape))
  values = next(p for p in here if p.kind == 'v_out')
  with pytest.raises(ValueError, match=r'shape \(16,\)'):
    scale_pair(params, values, np.ones(3))
  _, here = found('llama')
  gated = next(p for p in here if p.kind == 'up_down')
  with pytest.raises(ValueError, match="not 'shift'"):
    shift_pair({}, gated, np.ones(gated.shape))
