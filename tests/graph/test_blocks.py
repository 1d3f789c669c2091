"""Blocks: where programs are cut, and that the pieces make the whole."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph import programs
from graph.cutting import both, cut
from graph.programs import TOKENS, Random, attention, mlp, rms_norm

from quantlab.core.tree import named_leaves
from quantlab.graph import blocks as blocks_lib
from quantlab.graph import rewrite, tracing
from quantlab.graph.blocks import blocks

# Where each program is cut: by hand, from what the models are.
EXPECTED = {
  'transformer': [
    'params/embed',
    'params/block_0',  # attention
    'params/block_0:1',  # MLP
    'params/block_1',
    'params/block_1:1',
    'params/head',
  ],
  'scanned': ['params/embed', 'params/blocks', 'params/head'],
  'llama': [
    'embed',
    'blocks/0/attention',
    'blocks/0/mlp',
    'blocks/1/attention',
    'blocks/1/mlp',
    'embed:1',  # the tied output matrix
  ],
  'bert': [
    'embed',
    'blocks/0/attention',
    'blocks/0/mlp',
    'blocks/1/attention',
    'blocks/1/mlp',
  ],
  'resnet': [
    'stem/conv',
    *(f'stages/{s}/{b}' for s in range(3) for b in range(2)),
    'head',
  ],
  'linen_resnet': [
    'params/Conv_0',
    'params/Residual_0',
    'params/Residual_1',
    'params/Dense_0',
  ],
  'mobilenet': [
    'stem/conv',
    *(
      f'blocks/{i}/{part}'
      for i in range(13)
      for part in ('depthwise', 'pointwise')
    ),
    'head',
  ],
  'unet': [
    'params/time_in',
    'params/time_out',
    'params/stem',
    'params/down_0',
    'params/shrink_1',
    'params/down_1',
    'params/middle',
    'params/up_1',
    'params/grow_1',
    'params/up_0',
    'params/head',
  ],
}
SITES = {  # sites in each block
  'transformer': [1, 6, 2, 6, 2, 1],
  'scanned': [1, 8, 1],
  'llama': [1, 6, 3, 6, 3, 1],
  'bert': [1, 6, 2, 6, 2],
  'resnet': [1, 2, 2, 2, 2, 2, 2, 1],
  'linen_resnet': [1, 2, 3, 1],
  'mobilenet': [1] * 28,
  'unet': [1, 1, 1, 3, 1, 3, 3, 4, 1, 4, 1],
}


@pytest.mark.parametrize('name', EXPECTED)
def test_models_are_cut_where_their_structure_says(name):
  _, parts = cut(name)
  assert [b.name for b in parts] == EXPECTED[name]
  assert [len(b.sites) for b in parts] == SITES[name]
  assert parts[0].stream_in == ()
  for before, after in itertools.pairwise(parts):
    assert before.stream_out == after.stream_in
  if name != 'unet':
    assert all(len(b.stream_out) == 1 for b in parts)


@pytest.mark.parametrize('name', EXPECTED)
def test_blocks_in_order_are_the_function(name):
  program, parts = cut(name)
  got, want = both(program, parts)
  assert programs.error(got, want) <= 1e-6


@pytest.mark.parametrize('name', EXPECTED)
def test_every_site_and_every_parameter_is_in_a_block(name):
  program, parts = cut(name)
  traced, _, _ = tracing.Tracer(program.apply)(program.params, program.args, {})
  sites = [s.id for s in traced.analysis.sites]
  assert [i for b in parts for i in b.sites] == sites
  assert {p for b in parts for p in b.paths} == set(traced.paths)


def test_context_is_what_depends_on_the_inputs_alone():
  program, parts = cut('bert')
  shapes = [[x.shape for x in b.context(*program.args)] for b in parts]
  mask = (2, 1, 1, 5)
  assert shapes[1:4] == [[mask], [], [mask]]
  # The last pools the real tokens; the first looks tokens up.
  assert len(shapes[4]) == 2
  assert len(shapes[0]) == 1
  # A causal mask and rotary angles depend on nothing: they are made again.
  program, parts = cut('llama')
  assert all(b.context(*program.args) == () for b in parts[1:])


def test_a_unet_carries_its_skip_and_its_time_embedding():
  _, parts = cut('unet')
  by_name = {b.name: b for b in parts}
  shapes = [x.shape for x in by_name['params/shrink_1'].stream_out]
  assert shapes == [(2, 4, 4, 8), (2, 16), (2, 8, 8, 4)]
  assert [x.shape for x in by_name['params/up_0'].stream_in] == [
    (2, 8, 8, 4),
    (2, 8, 8, 4),
    (2, 16),
  ]
  assert [x.shape for x in by_name['params/up_0'].stream_out] == [(2, 8, 8, 4)]


# A block as a traced function ------------------------------------------------


def test_a_block_is_evaluated_with_a_handler_like_a_whole_program():
  program, parts = cut('llama')
  params = programs.flat(program.params)
  seen = []

  def doubling(site, lhs, rhs, default, state):
    seen.append(site.id)
    return 2 * default(lhs, rhs), {'shape': rhs.shape}

  block = parts[2]
  chosen = 'blocks/0/mlp/down'
  mine = block.take(params)
  stream = (Random()(2, 5, 16),)
  evaluator = rewrite.Evaluator(
    program=block.program,
    analysis=block.analysis,
    leaves=[mine[p] for p in block.paths],
    paths=block.paths,
    constant_leaf=lambda const: None,
    chosen=frozenset([chosen]),
    handler=doubling,
  )
  [got], _ = evaluator.run([*stream, *block.context(*program.args)], {})
  assert seen == [chosen]
  [plain] = block(mine, stream, block.context(*program.args))
  np.testing.assert_allclose(
    got - stream[0], 2 * (plain - stream[0]), rtol=1e-4, atol=1e-6
  )


def test_a_block_is_jitted_and_differentiated():
  program, parts = cut('bert')
  block = parts[2]
  mine = block.take(programs.flat(program.params))
  stream = (Random()(2, 5, 16),)
  context = block.context(*program.args)

  def loss(mine):
    return jnp.sum(block(mine, stream, context)[0] ** 2)

  grads = jax.jit(jax.grad(loss))(mine)
  assert set(grads) == set(block.paths)
  step, name = 1e-2, 'blocks/0/mlp/down/bias'
  change = np.zeros(16, np.float32)
  change[3] = step
  up = loss({**mine, name: mine[name] + change})
  down = loss({**mine, name: mine[name] - change})
  np.testing.assert_allclose(
    grads[name][3], (up - down) / (2 * step), rtol=2e-2, atol=1e-2
  )


def test_shapes_are_enough_to_cut():
  program, parts = cut('llama')
  shapes = jax.eval_shape(lambda: (program.params, *program.args))
  again = blocks(program.apply, *shapes)
  assert [b.name for b in again] == [b.name for b in parts]
  assert [b.stream_out for b in again] == [b.stream_out for b in parts]


def test_a_batch_of_another_shape_is_refused():
  _, parts = cut('bert')
  with pytest.raises(ValueError, match=r'int\d+\[2, 5\].*cut .* again'):
    parts[1].context(TOKENS[:1], np.ones((1, 5), bool))


def test_a_function_without_sites_is_refused():
  with pytest.raises(ValueError, match='no site'):
    blocks(lambda p, x: x + p['b'], {'b': jnp.ones(3)}, jnp.ones(3))


# A random family -------------------------------------------------------------


def random_program(seed: int) -> programs.Program:
  """A chain of random parts on a stream with random skips."""
  rng = np.random.default_rng(seed)
  new = Random(seed)
  kinds = rng.choice(['dense', 'mlp', 'attention', 'skip', 'gate'], 7)
  params = {
    str(i): {**programs.mlp_params(new), **programs.attention_params(new)}
    for i in range(len(kinds))
  }
  back = rng.integers(1, 4, len(kinds))

  def apply(p, x):
    past = [x]
    for i, kind in enumerate(kinds):
      q, x = p[str(i)], past[-1]
      if kind == 'dense':
        x = jax.nn.relu(x @ q['q'])
      elif kind == 'mlp':
        x = mlp({**q, 'o': q['w'].T}, x)
      elif kind == 'attention':
        y = rms_norm(q['g'], x)
        x = x + attention(q, y, y)
      elif kind == 'skip':
        x = jnp.concatenate([x, past[-min(back[i], len(past))]], -1)
        x = x[..., ::2] @ q['q']
      else:
        x = (x @ q['q']) * jax.nn.sigmoid(past[-min(back[i], len(past))])
      past.append(x)
    return x

  return programs.Program(apply, params, (new(2, 5, 8),))


@pytest.mark.parametrize('seed', range(8))
def test_random_programs_are_the_sum_of_their_blocks(seed):
  program = random_program(seed)
  traced, _, _ = tracing.Tracer(program.apply)(program.params, program.args, {})
  parts = blocks_lib.of_traced(traced)
  assert all(b.sites for b in parts)
  assert [i for b in parts for i in b.sites] == [
    s.id for s in traced.analysis.sites
  ]
  got, want = both(program, parts)
  assert programs.error(got, want) <= 1e-6
  assert {p for b in parts for p in b.paths} <= {
    path for path, _ in named_leaves(program.params)
  }
