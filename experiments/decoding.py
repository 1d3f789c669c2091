r"""One measurement of greedy decoding, in a process of its own.

  python -m experiments.decoding RUN prepare VARIANT
  python -m experiments.decoding RUN decode VARIANT RESULT.json
  python -m experiments.decoding RUN reference VARIANT RESULT.json

RUN is the workdir of `experiments.generate`, whose config.json says what is to
be done. `prepare` quantizes and saves; `decode` loads what was saved, so that
its peak memory is that of using the model, and writes what it measured;
`reference` does so with every kernel's definition in place of the kernel.
"""

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import lax

import quantlab as ql
import quantlab.io
from experiments import variants
from quantlab import data, runtime
from quantlab.models import llama
from quantlab.runtime import files

FLOATS = ('float32', 'bfloat16')


def greedy(
  step: Callable, params: Any, cache: Any, prompt: jax.Array, count: int
) -> jax.Array:
  """The most likely continuation.

  Args:
    step: `(params, cache, tokens, position) -> (logits, cache)`.
    params: its parameters.
    cache: empty, with room for the prompt and `count` tokens.
    prompt: (b, t).
    count: tokens to add.

  Returns:
    Tokens (b, count).
  """
  first, cache = prefill(step, params, cache, prompt)
  return decode(step, params, cache, first, prompt.shape[1], count)


def prefill(step, params, cache, prompt):
  """The token after the prompt, and the cache with the prompt."""
  logits, cache = step(params, cache, prompt, 0)
  return jnp.argmax(logits[:, -1], -1), cache


def decode(step, params, cache, first, position, count):
  """`count` tokens, the first of them given; a plain loop of single steps."""

  def body(carry, i):
    token, cache = carry
    logits, cache = step(params, cache, token[:, None], position + i)
    return (jnp.argmax(logits[:, -1], -1), cache), token

  _, tokens = lax.scan(body, (first, cache), jnp.arange(count))
  return tokens.T


def sizes(config: Any) -> llama.Config:
  """The shape of the model that a config names."""
  return llama.Config(**config['model']['sizes'])


def step_of(config: Any) -> Callable:
  return functools.partial(llama.step, config=sizes(config))


def float_params(config: Any) -> Any:
  """Weights of the shared data, or random ones."""
  if config['model']['weights'] == 'random':
    return llama.init(jax.random.key(config['seed']), sizes(config))
  return llama.from_flat(
    data.load_npz(data.require(config['model']['weights']))
  )


def prompt_of(config: Any) -> jax.Array:
  """Tokens (1, t)."""
  if given := config['prompt']['tokens']:
    return jnp.asarray([given], jnp.int32)
  rng = np.random.default_rng(config['seed'])
  shape = (1, config['prompt']['length'])
  return jnp.asarray(rng.integers(0, sizes(config).vocab, shape), jnp.int32)


def prepare(config: Any, folder: epath.Path, name: str) -> None:
  """Saves the parameters of a variant."""
  path = folder / 'checkpoints' / name
  if path.exists():
    return
  params = float_params(config)
  if name in FLOATS:
    params = jax.tree.map(lambda x: x.astype(name), params)
    quantlab.io.save_tree(path, params)
    return
  [spec] = [v for v in config['variants'] if v['name'] == name]
  [variant] = variants.resolve([spec])
  cache = llama.empty_cache(1, 8, sizes(config))
  batch = cache, jnp.zeros((1, 1), jnp.int32), jnp.int32(0)
  model = ql.ptq(
    step_of(config), params, variant.recipe, [batch], variant.transform
  )
  ql.save(path, model)


def measure(config: Any, folder: epath.Path, name: str) -> dict[str, Any]:
  """Loads a variant and decodes with it."""
  path, step = folder / 'checkpoints' / name, step_of(config)
  dtype = jnp.bfloat16 if name == 'bfloat16' else jnp.float32
  if name in FLOATS:
    params, _ = quantlab.io.load_tree(path)
    size = ql.nbytes(params)
  else:
    model = ql.prepack(ql.load(path, step))
    step, params, size = model.apply, model.params, model.nbytes
  prompt, count = prompt_of(config), config['tokens']
  length = prompt.shape[1] + count
  cache = llama.empty_cache(1, length, sizes(config), dtype)
  started = jax.jit(functools.partial(prefill, step))
  looped = jax.jit(
    functools.partial(decode, step, position=prompt.shape[1], count=count)
  )
  seconds: dict[str, list[float]] = {'prefill': [], 'decode': []}
  tokens = None
  for _ in range(1 + config['repeats']):  # the first one compiles
    clock = time.perf_counter()
    first, filled = jax.block_until_ready(started(params, cache, prompt))
    middle = time.perf_counter()
    tokens = jax.block_until_ready(looped(params, filled, first))
    seconds['prefill'].append(middle - clock)
    seconds['decode'].append(time.perf_counter() - middle)
  assert tokens is not None
  return {
    'prompt': prompt.shape[1],
    'count': count,
    'tokens': tokens[0].tolist(),
    'seconds': {k: v[1:] for k, v in seconds.items()},
    'nbytes': size,
    'peak_bytes': runtime.peak_bytes(),
  }


def main(argv: list[str]) -> None:
  folder, stage, name = epath.Path(argv[1]), argv[2], argv[3]
  config = files.read_json(folder / 'config.json')
  if stage == 'prepare':
    prepare(config, folder, name)
    return
  defined = ql.kernels.use('reference' if stage == 'reference' else None)
  with defined:
    files.write_json(argv[4], measure(config, folder, name))


if __name__ == '__main__':
  main(sys.argv)
