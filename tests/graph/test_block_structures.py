"""Blocks of scanned stacks and of less common structures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph import programs
from graph.cutting import both, check, cut
from graph.programs import TOKENS, Random, attention, mlp, rms_norm

from quantlab.graph.blocks import blocks, layers, run

# Scanned stacks --------------------------------------------------------------
from quantlab.graph.pairs import pairs


def test_a_scanned_stack_is_a_chain_of_its_layers():
  program, parts = cut('scanned')
  inner = parts[1].inner
  assert [b.name for b in inner] == [
    'params/blocks[0]',
    'params/blocks[0]:1',
    'params/blocks[1]',
    'params/blocks[1]:1',
    'params/blocks[2]',
    'params/blocks[2]:1',
  ]
  assert [len(b.sites) for b in inner] == [6, 2] * 3
  assert [b.layer for b in inner] == [(0,), (0,), (1,), (1,), (2,), (2,)]
  assert inner[0].stream_in == parts[1].stream_in
  assert inner[-1].stream_out == parts[1].stream_out
  # One program serves all layers, so that it is compiled once.
  assert inner[0].program is inner[2].program is inner[4].program
  got, want = both(program, layers(parts))
  assert programs.error(got, want) <= 1e-6


def test_a_layer_takes_its_slice_and_puts_it_back():
  program, parts = cut('scanned')
  params = programs.flat(program.params)
  block = parts[1].inner[3]
  path = 'params/blocks/up/kernel'
  mine = block.take(params)
  np.testing.assert_array_equal(mine[path], params[path][1])
  new = block.put(params, {path: mine[path] + 1})
  np.testing.assert_array_equal(new[path][1], params[path][1] + 1)
  np.testing.assert_array_equal(new[path][::2], params[path][::2])
  other = 'params/embed/embedding'
  assert new[other] is params[other]


def test_scan_with_a_mask_in_its_carry_a_counter_and_stacked_results():
  new = Random()
  params = {'e': new(16, 8), 'l': programs.mlp_params(new, 3), 'h': new(8, 3)}

  def apply(p, ids, mask):
    def body(carry, layer):
      x, mask, i = carry
      return (mlp(layer, x) * mask, mask, i + 1), (x.mean(), i)

    start = (p['e'][ids], mask, 0)
    (x, kept, _), found = jax.lax.scan(body, start, p['l'])
    return x @ p['h'] * kept, found

  mask = np.ones((2, 5, 1), np.float32)
  parts = check(apply, params, TOKENS, mask)
  assert [b.name for b in parts] == ['e', 'l', 'h']
  assert parts[2].context(TOKENS, mask)[0].shape == mask.shape
  assert [b.name for b in parts[1].inner] == ['l[0]', 'l[1]', 'l[2]']
  # The stream comes first, stacked results so far pass through.
  assert parts[1].inner[1].stream_in[0].shape == (2, 5, 8)


@pytest.mark.parametrize('reverse', [False, True])
def test_layers_run_in_the_order_of_the_scan(reverse):
  def apply(p, x):
    x = x @ p['in']
    return jax.lax.scan(
      lambda c, q: (mlp(q, c), None), x, p['l'], reverse=reverse
    )[0]

  new = Random()
  params = {'in': new(8, 8), 'l': programs.mlp_params(new, 3)}
  parts = check(apply, params, new(2, 5, 8))
  order = [b.layer for b in layers(parts)[1:]]
  assert order == ([(2,), (1,), (0,)] if reverse else [(0,), (1,), (2,)])


def test_a_stack_in_a_stack_is_a_chain_of_all_layers():
  def apply(p, x):
    def outer(carry, q):
      return jax.lax.scan(lambda c, r: (mlp(r, c), None), carry, q)[0], None

    return jax.lax.scan(outer, x @ p['in'], p['l'])[0]

  new = Random()
  params = {'in': new(8, 8), 'l': programs.mlp_params(new, 2, 3)}
  chain = layers(check(apply, params, new(2, 5, 8)))
  assert [b.layer for b in chain[1:]] == [
    (i, j) for i in range(2) for j in range(3)
  ]
  flat = programs.flat(params)
  block = chain[-1]
  np.testing.assert_array_equal(block.take(flat)['l/w'], params['l']['w'][1, 2])


def test_layers_that_start_from_parameters():
  """Learned latents that look at the input, as a Perceiver's do."""

  def apply(p, x):
    def body(c, q):
      return c + attention(q, rms_norm(q['g'], c), x), None

    start = jnp.broadcast_to(p['z'], (2, 4, 8))
    return jax.lax.scan(body, start, p['l'])[0] @ p['h']

  new = Random()
  stack = {**programs.attention_params(new, 3), 'g': new(3, 8)}
  params = {'z': new(4, 8), 'l': stack, 'h': new(8, 2)}
  parts = check(apply, params, new(2, 5, 8))
  inner = parts[0].inner
  assert [len(b.sites) for b in inner] == [0, 6, 6, 6]
  assert inner[1].program is inner[3].program


def test_parameters_cast_before_the_scan_are_taken_layer_by_layer():
  def apply(p, x):
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), p['l'])
    y = (x @ p['in']).astype(jnp.bfloat16)
    y = jax.lax.scan(lambda c, q: (mlp(q, c), None), y, cast)[0]
    return y.astype(jnp.float32)

  new = Random()
  params = {'in': new(8, 8), 'l': programs.mlp_params(new, 3)}
  parts = check(apply, params, new(2, 5, 8), tolerance=1e-2)
  assert parts[1].inner[1].slices['l/w'] == (1,)


# Other structures ------------------------------------------------------------


def test_an_encoder_and_a_decoder_are_cut_at_every_part():
  new = Random()

  def layer(cross):
    p = {'a': programs.attention_params(new), 'ga': new(8)}
    if cross:
      p |= {'c': programs.attention_params(new), 'gc': new(8)}
    return {**p, 'm': programs.mlp_params(new)}

  params = {
    'e': new(16, 8),
    'enc': [layer(False) for _ in range(2)],
    'dec': [layer(True) for _ in range(2)],
    'g': new(8),
  }

  def apply(p, source, target):
    x = p['e'][source]
    for q in p['enc']:
      y = rms_norm(q['ga'], x)
      x = mlp(q['m'], x + attention(q['a'], y, y))
    y = p['e'][target]
    for q in p['dec']:
      z = rms_norm(q['ga'], y)
      y = y + attention(q['a'], z, z)
      y = y + attention(q['c'], rms_norm(q['gc'], y), x)
      y = mlp(q['m'], y)
    return rms_norm(p['g'], y) @ p['e'].T

  parts = check(apply, params, TOKENS, TOKENS + 1)
  assert [b.name for b in parts] == [
    'e',
    'enc/0/a',
    'enc/0/m',
    'enc/1/a',
    'enc/1/m',
    'e:1',
    'dec/0/a',
    'dec/0/c',
    'dec/0/m',
    'dec/1/a',
    'dec/1/c',
    'dec/1/m',
    'e:2',
  ]
  # What the decoder looks at is carried, second, until its last use.
  assert [len(b.stream_in) for b in parts[6:]] == [2, 2, 2, 2, 2, 1, 1]


def test_hidden_states_as_input_count_as_the_stream():
  def apply(p, x):
    return mlp(p['b'], mlp(p['a'], x))

  new = Random()
  params = {'a': programs.mlp_params(new), 'b': programs.mlp_params(new)}
  parts = check(apply, params, new(2, 5, 8))
  assert [b.name for b in parts] == ['a', 'b']


def test_every_kind_of_result_is_given_back():
  new = Random()
  params = {'e': new(16, 8), 'w': new(8, 4), 'v': new(4, 3)}

  def apply(p, ids):
    x = p['e'][ids]
    y = x @ p['w']
    return y @ p['v'], {'hidden': (x, y)}, ids + 1, 2 * p['w'], 3.0

  program = programs.Program(apply, params, (TOKENS,))
  parts = blocks(apply, params, TOKENS)
  got, want = both(program, parts)
  assert len(got) == 6
  assert programs.error(got, want) <= 1e-6


def test_an_opaque_rule_stays_whole_in_its_block():
  """The user's derivative is kept: here one that is seven times too large."""

  @jax.custom_vjp
  def core(q, k, v):
    return jax.nn.softmax(q @ k.mT) @ v

  def backward(residuals, g):
    return 0 * g, 0 * g, 7 * g

  core.defvjp(lambda q, k, v: (core(q, k, v), None), backward)
  new = Random()
  params = {'e': new(16, 8), **programs.attention_params(new)}

  def apply(p, ids):
    x = p['e'][ids]
    return x + core(x @ p['q'], x @ p['k'], x @ p['v']) @ p['o']

  parts = check(apply, params, TOKENS)
  block = parts[1]
  assert len(block.sites) == 6

  def loss(p, f):
    return jnp.sum(jnp.sin(f(p)))

  want = jax.grad(loss)(params, lambda p: apply(p, TOKENS))
  got = jax.grad(loss)(params, lambda p: run(parts, p, TOKENS)[0])
  assert programs.error(got, want) <= 1e-5


def test_jit_remat_cond_while_and_random_keys_inside():
  new = Random()
  names = ('a', 'b', 'c', 'd')
  params = {'e': new(16, 8), **{n: new(8, 8) for n in names}}

  @jax.jit
  def helper(p, x):
    return jax.checkpoint(lambda x: jnp.tanh(x @ p['a']))(x)

  def apply(p, ids, key):
    x = helper(p, p['e'][ids])
    x = jax.lax.cond(
      ids[0, 0] > 3, lambda x: x @ p['b'], lambda x: x @ p['c'], x
    )
    x = x * jax.random.bernoulli(key, 0.5, x.shape)
    steps = ids[0, 1] + 1
    return jax.lax.fori_loop(0, steps, lambda _, x: jnp.tanh(x @ p['d']), x)

  parts = check(apply, params, TOKENS, jax.random.key(3))
  assert [b.sites for b in parts] == [('e',), ('a',), ('c', 'b'), ('d',)]


def test_shardings_given_to_an_inner_jit_are_kept():
  mesh = jax.make_mesh((1,), ('d',), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('d'))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  new = Random()
  params = {'a': new(8, 6), 'c': new(6, 4)}
  apply = jax.jit(
    lambda p, x: jax.nn.relu(x @ p['a']) @ p['c'],
    in_shardings=(everywhere, rows),
    out_shardings=rows,
  )
  x = new(4, 8)
  parts = check(apply, params, x)
  assert [b.paths for b in parts] == [('a',), ('c',)]
  assert [c.shape for c in parts[0].context(x)] == [(4, 8)]
  assert parts[1].context(x) == ()
  traced = jax.make_jaxpr(lambda p, x: run(parts, p, x))(params, x)
  assert str(traced).count('sharding_constraint') >= 4
  [pair] = pairs(apply, params, x)
  assert pair.kind == 'linear'


def test_parameters_the_function_closed_over_are_the_blocks_parameters():
  new = Random()
  params = {'w': new(8, 4), 'v': new(4, 3)}
  x = new(2, 8)
  parts = blocks(lambda p, x: (x @ params['w']) @ p['v'], params, x)
  assert [b.paths for b in parts] == [('w',), ('v',)]
  doubled = {'w': 2 * params['w'], 'v': params['v']}
  [got] = run(parts, doubled, x)
  np.testing.assert_allclose(
    got, 2 * (x @ params['w']) @ params['v'], rtol=1e-5
  )


def test_effective_weights_are_made_in_the_block_that_uses_them():
  new = Random()
  params = {n: new(8, 8) for n in 'qkvo'}

  def apply(p, x):
    fused = jnp.concatenate([p['q'], p['k'], p['v']], 1)
    q, k, v = jnp.split(x @ fused, 3, -1)
    return jnp.tanh(q * k + v) @ p['o']

  parts = check(apply, params, new(2, 8))
  assert [b.paths for b in parts] == [('k', 'q', 'v'), ('o',)]
