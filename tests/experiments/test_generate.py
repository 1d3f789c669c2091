"""Greedy decoding: the loop, and the launcher that measures it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict

from experiments import decoding, generate, variants
from quantlab.models import llama

SIZES = {'vocab': 31, 'dim': 16, 'hidden': 24, 'blocks': 2, 'heads': 2}
SIZES |= {'kv_heads': 1}
A8 = {'format': 'int8', 'per': 'token'}


def config(**changes):
  rules = (('.*', {'weight': {'format': 'int8'}, 'input': A8}),)
  return config_dict.ConfigDict(
    {
      'seed': 0,
      'model': {'weights': 'random', 'sizes': SIZES},
      'prompt': {'tokens': (), 'length': 3},
      'tokens': 5,
      'repeats': 2,
      'rounds': 1,
      'floats': (),
      'variants': ({'name': 'w8a8', 'rules': rules},),
      'check': True,
      'llama_cpp': (),
    }
    | changes
  )


def test_the_loop_takes_the_likeliest_token_of_the_whole_text():
  sizes = llama.Config(**SIZES)
  params = llama.init(jax.random.key(3), sizes)
  # Loud blocks: as it is the model repeats the token it is given.
  params['blocks'] = jax.tree.map(lambda a: 8 * a, params['blocks'])
  prompt = jnp.asarray([[4, 7, 1], [9, 2, 2]])
  step = functools.partial(llama.step, config=sizes)
  found = jax.jit(functools.partial(decoding.greedy, step, count=6))(
    params, llama.empty_cache(2, 9, sizes), prompt
  )
  whole = jax.jit(functools.partial(llama.apply, config=sizes))
  text = np.zeros((2, 9), np.int32)  # what follows a token changes nothing
  text[:, :3] = prompt
  for i in range(3, 9):
    text[:, i] = whole(params, text)[:, i - 1].argmax(-1)
  np.testing.assert_array_equal(found, text[:, 3:])
  assert len(np.unique(found)) > 2


def test_launcher(tmp_path, monkeypatch):
  """Measures, checks the text against the definitions, and resumes."""
  monkeypatch.delenv('XLA_FLAGS', raising=False)  # with one device: kernels
  start = generate._start

  def one_process_less(module, folder, stage, *rest):
    if stage == 'decode':
      return start(module, folder, stage, *rest)
    return decoding.main(['', str(folder), stage, *rest])

  monkeypatch.setattr(generate, '_start', one_process_less)
  made = generate.run(config(), str(tmp_path))
  [(name, row)] = made['contestants'].items()
  assert name == 'w8a8'
  assert len(row['tokens']) == 5
  assert row['tokens_per_second']['min'] > 0
  assert row['nbytes'] < 4 * sum(
    a.size for a in jax.tree.leaves(decoding.float_params(config()))
  )

  def refuse(*args):
    raise AssertionError(f'computed again: {args}')

  monkeypatch.setattr(generate, '_start', refuse)
  again = generate.run(config(), str(tmp_path))
  assert again['contestants'] == made['contestants']
  path = tmp_path / 'measured' / 'reference_w8a8.json'
  other = json.loads(path.read_text())
  other['tokens'] = [(t + 1) % 31 for t in row['tokens']]
  path.write_text(json.dumps(other))
  with pytest.raises(RuntimeError, match='from token 0 on'):
    generate.run(config(), str(tmp_path))


@pytest.mark.parametrize(
  ('changes', 'error', 'message'),
  [
    ({'floats': ('float8',)}, variants.ConfigError, 'unknown floats'),
    (
      {'model': {'weights': 'nowhere.npz', 'sizes': SIZES}},
      FileNotFoundError,
      'nowhere.npz',
    ),
  ],
)
def test_refused_before_any_work(changes, error, message, tmp_path):
  with pytest.raises(error, match=message):
    generate.run(config(**changes), str(tmp_path / 'new'))
  assert not (tmp_path / 'new').exists()
