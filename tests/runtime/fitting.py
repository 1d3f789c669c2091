"""Least squares by the training loop, here or in a process of its own.

python fitting.py <folder> <seconds a step> [<port> <index>]
"""

import os
import pathlib
import sys
import time

import numpy as np

STEPS = 30
RNG = np.random.RandomState(0)
X = RNG.normal(size=(64, 4)).astype(np.float32)
TRUE = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
Y = X @ TRUE + np.float32(0.1)


def loss(variables, step, x, y):
  """Least squares; a running mean of y beside it, by settlement."""
  import jax.numpy as jnp

  del step
  error = x @ variables['w'] + variables['b'] - y
  seen = {**variables, 'mean': 0.9 * variables['mean'] + 0.1 * y.mean()}
  mask = {'w': False, 'b': False, 'mean': True}
  return jnp.square(error).mean(), (mask, seen)


def optimizer():
  import optax

  return optax.adam(0.05)


def start():
  import jax.numpy as jnp

  from quantlab.runtime import training

  zeros = {'w': jnp.zeros(4), 'b': jnp.zeros(()), 'mean': jnp.zeros(())}
  return training.begin(zeros, optimizer())


def updater(mesh=None, runs=1):
  from quantlab.runtime import training

  update = training.updater(loss, optimizer())
  return training.compiled(update, mesh, runs)


def check(state):
  w = np.asarray(state['variables']['w'])
  return {'distance': float(np.abs(w - TRUE).max())}


def walk(x=X, y=Y, seed=0, steps=STEPS, part=(0, 1)):
  from quantlab import data

  draws = data.Draws((x, y), 8, steps=steps, seed=seed, part=part)
  return data.iterator(draws)


def fit(folder, update, walks, identity=None, state=None, **options):
  from quantlab.runtime import saves as saves_lib
  from quantlab.runtime import training

  options = {
    'check': check,
    'score': lambda found: -found['distance'],
    'check_every': 10,
    'log_every': 3,
  } | options
  with saves_lib.Saves(folder, identity or {'recipe': 'a'}) as saves:
    return training.train(
      update, state or start(), walks, STEPS, saves, **options
    )


def on_mesh(folder, part=(0, 1)):
  """The same over all devices of all processes."""
  from quantlab import runtime
  from quantlab.runtime import training

  mesh = runtime.make_mesh(data=-1)
  return fit(
    folder,
    updater(mesh),
    [walk(part=part)],
    state=training.placed(start(), mesh),
    place=lambda batch: training.spread(batch, mesh),
  )


def main(folder, wait, port=None, index=None):
  if port is None:
    slowly = lambda step, values: time.sleep(wait)  # noqa: E731
    fit(folder, updater(), [walk()], log=slowly)
    return
  os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'
  import jax

  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'localhost:{port}', 2, index)
  assert (jax.device_count(), jax.local_device_count()) == (4, 2)
  state, _ = on_mesh(folder / 'saves', (index, 2))
  again, _ = on_mesh(folder / 'saves', (index, 2))  # from its last save
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
    assert not x.is_fully_addressable
    np.testing.assert_array_equal(x, y)
  np.savez(folder / f'{index}.npz', *jax.tree.leaves(state['variables']))
  jax.distributed.shutdown()


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]), float(sys.argv[2]), *map(int, sys.argv[3:]))
