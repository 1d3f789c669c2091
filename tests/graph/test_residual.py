"""Residual streams: the right parameters, and a rotation changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph import programs
from jax import lax

from quantlab.graph import residual
from quantlab.graph.migrate import rotate_pair, scale_pair
from quantlab.graph.residual import streams
from quantlab.models import digits

DIM, VOCAB = 8, 16


def turned(program, stream, seed=0, keeps=None):
  """The parameters with gains folded and the stream rotated at random."""
  rng = np.random.default_rng(seed)
  params = programs.flat(program.params)
  for fold in stream.folds:
    gain = np.asarray(params[fold.gain]) + fold.offset
    params = scale_pair(params, fold.pair, gain.reshape(fold.pair.shape))
  first = np.eye(stream.channels)
  if stream.keeps if keeps is None else keeps:
    first[:, 0] = 1
    first = np.linalg.qr(first)[0]
    inner = np.linalg.qr(rng.normal(size=[stream.channels - 1] * 2))[0]
    core = np.eye(stream.channels)
    core[1:, 1:] = inner
    matrix = first @ core @ first.T
  else:
    matrix = np.linalg.qr(rng.normal(size=[stream.channels] * 2))[0]
  return rotate_pair(params, stream.pair, matrix.astype(np.float32))


def check(program, kernels=None, gains=None, keeps=None):
  """One stream, of these parameters, whose rotation keeps the function."""
  [stream] = streams(program.apply, program.params, *program.args)
  assert stream.why is None
  if kernels is not None:
    members = (*stream.pair.producers, *stream.pair.consumers)
    assert {m.path for m in members} == set(kernels)
    assert len(members) == len(kernels)
    assert {f.gain for f in stream.folds} == set(gains)
  if keeps is not None:
    assert stream.keeps == keeps
  params = programs.flat(program.params)
  new = turned(program, stream)
  apply = jax.jit(program.apply)
  want = apply(program.params, *program.args)
  got = apply(programs.unflat(program.params, new), *program.args)
  assert programs.error(got, want) < 1e-5
  # Not trivially so: with the readers left as they were it is another one.
  readers = {m.path for m in stream.pair.consumers}
  half = {k: params[k] if k in readers else new[k] for k in params}
  got = apply(programs.unflat(program.params, half), *program.args)
  assert programs.error(got, want) > 1e-2
  return stream


def refused(program, why):
  found = streams(program.apply, program.params, *program.args)
  assert found
  assert all(s.pair is None for s in found)
  assert any(why in s.why for s in found), [s.why for s in found]


# Real models ------------------------------------------------------------------


def linen_names(at, biases):
  kernels = ('query', 'key', 'value', 'out', 'up', 'down')
  return [f'{at}/{name}/kernel' for name in kernels] + [
    f'{at}/{name}/bias' for name in biases
  ]


@pytest.mark.parametrize('scanned', [False, True])
def test_linen_transformer(scanned):
  blocks = ['blocks'] if scanned else ['block_0', 'block_1']
  rest = ('embed/embedding', 'position', 'norm/bias', 'head/kernel')
  biases = ('attention_norm', 'mlp_norm', 'down')
  members = [f'params/{name}' for name in rest]
  for block in blocks:
    members += linen_names(f'params/{block}', biases)
  gains = [
    f'params/{b}/{n}_norm/scale' for b in blocks for n in ('mlp', 'attention')
  ]
  stream = check(
    programs.linen_transformer(scanned),
    members,
    [*gains, 'params/norm/scale'],
    keeps=True,
  )
  reads = ('query', 'key', 'value', 'up')
  want = [f'params/{b}/{n}/kernel' for b in blocks for n in reads]
  assert sorted(stream.sites) == sorted([*want, 'params/head/kernel'])
  want = [f'params/{b}/{n}/kernel' for b in blocks for n in ('out', 'down')]
  assert sorted(stream.written) == sorted([*want, 'params/embed/embedding'])


def test_vision_transformer():
  model = digits.Vit(dim=12, blocks=2, heads=2)
  x = programs.Random()(2, 8, 8, 1, scale=1.0)
  shapes = jax.eval_shape(model.init, programs.KEY, x)
  members = ['embed/kernel', 'embed/bias', 'position', 'norm/bias']
  names = [f'params/{name}' for name in (*members, 'head/kernel')]
  for block in ('block_0', 'block_1'):
    biases = ('attention_norm', 'mlp_norm', 'out', 'down')
    names += linen_names(f'params/{block}', biases)
  gains = [
    f'params/block_{i}/{n}_norm/scale'
    for i in (0, 1)
    for n in ('mlp', 'attention')
  ]
  program = programs.Program(model.apply, programs.filled(shapes), (x,))
  check(program, names, [*gains, 'params/norm/scale'], keeps=True)


def test_llama_with_a_head_tied_without_a_gain():
  program = programs.bare_llama()
  program.params['norm']['scale'] = jnp.ones(16)
  [stream] = streams(program.apply, program.params, *program.args)
  assert not stream.keeps
  [tied] = [f for f in stream.folds if f.pair is None]
  assert tied.gain == 'norm/scale'
  assert 'embed/embedding' in tied.why
  # The gain is one, so that the table can be turned: it writes and reads.
  free = tuple(f for f in stream.folds if f.pair is not None)
  new = turned(program, residual.dataclasses.replace(stream, folds=free))
  got = program.apply(programs.unflat(program.params, new), *program.args)
  want = program.apply(program.params, *program.args)
  assert programs.error(got, want) < 1e-5


def test_post_norm_has_none():
  refused(programs.masked_bert(), 'post-norm')


def test_convolutional_nets_have_none():
  for program in (programs.cifar_resnet(), programs.linen_resnet()):
    found = streams(program.apply, program.params, *program.args)
    assert all(s.pair is None for s in found)


# Small programs ---------------------------------------------------------------


def small(step=None, start=None, finish=None, **more):
  """Embedding, `blocks` of norm and MLP added to the stream, norm and head."""
  new = programs.Random()
  params = {
    'embed': new(VOCAB, DIM),
    'gain': 1 + new(DIM, scale=0.2),
    'up': new(DIM, 12),
    'down': new(12, DIM),
    'last': 1 + new(DIM, scale=0.2),
    'head': new(DIM, VOCAB),
    **{k: new(*v) for k, v in more.items()},
  }

  def block(p, x):
    y = programs.rms_norm(p['gain'], x)
    return x + jnp.tanh(y @ p['up']) @ p['down']

  def end(p, x):
    return programs.rms_norm(p['last'], x) @ p['head']

  def apply(p, tokens):
    x = (start or (lambda p, t: p['embed'][t]))(p, tokens)
    return (finish or end)(p, (step or block)(p, x))

  return programs.Program(apply, params, (programs.TOKENS,))


SMALL = ['embed', 'up', 'down', 'head']
GAINS = ['gain', 'last']


def normed(x):
  return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def test_the_small_program():
  check(small(), SMALL, GAINS, keeps=False)


def test_a_gain_of_one_plus_g():
  def step(p, x):
    return x + jnp.tanh((normed(x) * (1 + p['g'])) @ p['up']) @ p['down']

  program = small(step, g=(DIM,))
  stream = check(program, SMALL, ['g', 'last'])
  assert [f.offset for f in stream.folds if f.gain == 'g'] == [1.0]


def test_a_norm_without_gain_and_a_norm_by_its_length():
  def step(p, x):
    y = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x + jnp.tanh(y @ p['up']) @ p['down']

  check(small(step), SMALL, ['last'])


def test_scaled_embedding_class_token_and_dropout_mask():
  def start(p, tokens):
    x = p['embed'][tokens] * 3.0
    first = jnp.broadcast_to(p['token'], (x.shape[0], 1, DIM))
    x = jnp.concatenate([first, x], 1) + p['position'][: x.shape[1] + 1]
    return jnp.where(jnp.arange(x.shape[1])[:, None] < 4, x, 0.0)

  def finish(p, x):
    return programs.rms_norm(p['last'], x[:, 0]) @ p['head']

  program = small(None, start, finish, token=(DIM,), position=(9, DIM))
  stream = check(program, [*SMALL, 'token', 'position'], GAINS)
  # All positions turn, not only those that this call reads.
  [member] = [m for m in stream.pair.producers if m.path == 'position']
  assert member.index.shape == (1, DIM)


def test_pooled_by_a_product_and_read_without_a_norm():
  def finish(p, x):
    pooled = jnp.einsum('bt,btd->bd', jnp.ones(x.shape[:2]), x)
    return pooled @ p['head']

  check(small(finish=finish), SMALL, ['gain'])


def test_patches_by_a_convolution():
  def start(p, images):
    x = lax.conv_general_dilated(
      images,
      p['kernel'],
      (2, 2),
      'VALID',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return x.reshape(x.shape[0], -1, DIM) + p['bias']

  program = small(None, start, kernel=(2, 2, 1, DIM), bias=(DIM,))
  images = programs.Random(5)(2, 4, 4, 1, scale=1.0)
  program = program._replace(args=(images,))
  stream = [s for s in streams(program.apply, program.params, images) if s.pair]
  assert len(stream) == 1
  del program.params['embed']
  check(program, ['kernel', 'bias', 'up', 'down', 'head'], GAINS)


def test_a_sum_that_only_a_scan_carries():
  def step(p, x):
    def body(x, layer):
      y = programs.rms_norm(layer['gain'], x)
      return x + jnp.tanh(y @ layer['up']) @ layer['down'], None

    return lax.scan(jax.checkpoint(body), x, p['stack'])[0]

  new = programs.Random(3)
  program = small(step)
  for name in ('gain', 'up', 'down'):
    del program.params[name]
  program.params['stack'] = {
    'gain': 1 + new(3, DIM, scale=0.2),
    'up': new(3, DIM, 12),
    'down': new(3, 12, DIM),
  }
  members = ['embed', 'stack/up', 'stack/down', 'head']
  stream = check(program, members, ['stack/gain', 'last'])
  [fold] = [f for f in stream.folds if f.gain == 'stack/gain']
  assert fold.pair.shape == (3, DIM)


def test_two_streams_of_their_own():
  more = {'other': (VOCAB, 6), 'in': (6, 5), 'out': (5, 6), 'end': (6, 2)}
  program = small(**more)

  def apply(p, tokens):
    y = p['other'][tokens]
    y = y + jnp.tanh(normed(y) @ p['in']) @ p['out']
    return program.apply(p, tokens), normed(y) @ p['end']

  found = streams(apply, program.params, *program.args)
  assert [s.channels for s in found] == [6, DIM]
  names = [
    {m.path for m in (*s.pair.producers, *s.pair.consumers)} for s in found
  ]
  assert names == [set(more), set(SMALL)]


# Refused ----------------------------------------------------------------------


def test_a_stream_that_is_returned():
  refused(small(finish=lambda p, x: x), 'returns it')


def test_a_stream_through_a_nonlinearity():
  refused(small(finish=lambda p, x: jnp.tanh(x) @ p['head']), "'tanh'")


def test_a_stream_from_an_input():
  program = small(start=lambda p, x: x)
  x = programs.Random(1)(2, 5, DIM)
  refused(program._replace(args=(x,)), 'input of the function')


def test_a_square_that_something_is_added_to():
  def finish(p, x):
    other = (
      jax.nn.one_hot(jnp.arange(5), VOCAB) * x.sum((1, 2))[0] @ p['embed2']
    )
    return (x * x + other).sum(-1, keepdims=True) * x @ p['head']

  refused(small(finish=finish, embed2=(VOCAB, DIM)), 'square')


def test_a_norm_over_parts():
  def finish(p, x):
    y = normed(x.reshape(*x.shape[:-1], 2, -1)).reshape(x.shape)
    return y @ p['head']

  refused(small(finish=finish), 'groups')


def test_a_table_with_another_use():
  def finish(p, x):
    y = programs.rms_norm(p['last'], x) @ p['head']
    return y, jnp.abs(p['embed']).sum()

  refused(small(finish=finish), "'embed'")


def test_a_constant_table():
  table = np.random.default_rng(0).normal(size=(5, DIM)).astype(np.float32)

  def start(p, tokens):
    return p['embed'][tokens] + table

  refused(small(start=start), 'no parameter')


def test_heads_are_no_stream():
  def step(p, x):
    y = programs.rms_norm(p['gain'], x) @ p['up']
    y = y.reshape(*y.shape[:-1], 3, 4)
    mixed = jnp.einsum('hts,bshd->bthd', p['mix'], y)
    return x + mixed.reshape(*x.shape[:-1], 12) @ p['down']

  check(small(step, mix=(3, 5, 5)), SMALL, GAINS)


def test_a_gain_that_also_shapes_the_stream():
  def step(p, x):
    y = programs.rms_norm(p['gain'], x)
    return y + jnp.tanh(y @ p['up']) @ p['down']

  refused(small(step), "'gain'")


def test_one_gain_of_two_norms_is_folded_into_both():
  def finish(p, x):
    return programs.rms_norm(p['gain'], x) @ p['head']

  stream = check(small(finish=finish), SMALL, ['gain'])
  [fold] = stream.folds
  assert {m.path for m in fold.pair.consumers} == {'up', 'head'}


def test_a_weight_behind_two_gains_cannot_take_them():
  def finish(p, x):
    return programs.rms_norm(p['last'], x) @ p['up']

  program = small(finish=finish)
  [stream] = streams(program.apply, program.params, *program.args)
  assert all(f.pair is None and "'up'" in f.why for f in stream.folds)
