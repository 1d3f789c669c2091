"""Keys by name."""

import subprocess
import sys

import jax

from quantlab.core import rng


def _bits(key):
  return tuple(jax.random.key_data(key).tolist())


def test_keys_differ_by_name_and_not_by_process():
  key = jax.random.key(0)
  here = _bits(rng.fold_in_name(key, 'params/kernel'))
  assert here != _bits(rng.fold_in_name(key, 'params/bias'))
  assert here != _bits(rng.fold_in_name(jax.random.key(1), 'params/kernel'))
  code = (
    'import jax; from quantlab.core import rng\n'
    "k = rng.fold_in_name(jax.random.key(0), 'params/kernel')\n"
    'print(tuple(jax.random.key_data(k).tolist()))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=True,
    env={'PYTHONHASHSEED': '7', 'JAX_PLATFORMS': 'cpu'},
  )
  assert done.stdout.strip() == str(here)


def test_many_names_give_many_keys():
  key = jax.random.key(0)
  names = [f'layers/{i}/kernel' for i in range(200)]
  assert len({_bits(rng.fold_in_name(key, n)) for n in names}) == 200
