r"""Trains a test bed, and writes it as a fixture.

  python -m experiments.testbed --config=configs/testbeds/text.py \
    --out=tests/data/text_model.npz

The file holds the parameters by path in float16 and, of a language model,
tokens for calibration and evaluation; tests give the model pathologies that
leave its function as it was, and quantize it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from ml_collections import config_flags

from quantlab import runtime
from quantlab.core.tree import named_leaves
from quantlab.data import embedded, text
from quantlab.models import digits, llama
from quantlab.models.transformer import Transformer


class Model(NamedTuple):
  """A float model: `apply(params, x)` and `init(key)`."""

  apply: Callable[..., Any]
  init: Callable[[jax.Array], Any]


class Trained(NamedTuple):
  """Parameters, arrays to keep beside them, and what they are judged by."""

  params: Any
  kept: Mapping[str, np.ndarray]
  judge: Callable[[Any], Mapping[str, jax.Array]]


# Models ----------------------------------------------------------------------


def _transformer(config: Any) -> Model:
  module = Transformer(context=config.context, **config.model)
  first = jnp.zeros((1, config.context), jnp.int32)
  return Model(module.apply, lambda key: module.init(key, first))


def _llama(config: Any) -> Model:
  sizes = llama.Config(**config.model)
  return Model(
    functools.partial(llama.apply, config=sizes),
    functools.partial(llama.init, config=sizes),
  )


def _cnn(config: Any) -> Model:
  module = digits.Cnn(**config.model)
  first = jnp.zeros((1, 8, 8, 1))
  return Model(module.apply, lambda key: module.init(key, first))


MODELS: dict[str, Callable[[Any], Model]] = {
  'transformer': _transformer,
  'llama': _llama,
  'digits': _cnn,
}


def model(config: Any) -> Model:
  """The model that a config describes; tests load the fixture into it."""
  return MODELS[config.bed](config)


def _cross_entropy(logits: jax.Array, labels: Any) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# Characters ------------------------------------------------------------------


def _text(count: int) -> tuple[np.ndarray, np.ndarray]:
  """Characters of the standard library's sources: training, held out."""
  parts = text.sources(count)
  last = len(parts) // 10
  return np.concatenate(parts[:-last]), np.concatenate(parts[-last:])


def _draw(rng, codes: np.ndarray, count: int, length: int) -> np.ndarray:
  starts = rng.integers(0, len(codes) - length, count)
  return codes[starts[:, None] + np.arange(length)]


def _on_text(config: Any) -> Trained:
  apply, init = model(config)
  params = init(jax.random.key(config.seed))
  length = config.context + 1
  training, held_out = _text(config.files)
  rng = np.random.default_rng(config.seed)
  schedule = optax.warmup_cosine_decay_schedule(
    0, config.learning_rate, 50, config.steps
  )
  optimizer = optax.adamw(schedule)

  def loss(params, tokens):
    tokens = tokens.astype(jnp.int32)
    return _cross_entropy(apply(params, tokens[:, :-1]), tokens[:, 1:])

  @jax.jit
  def step(params, state, tokens):
    gradient = jax.grad(loss)(params, tokens)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  for _ in runtime.track(range(config.steps), 'training'):
    params, state = step(
      params, state, _draw(rng, training, config.batch, length)
    )
  kept = {
    'calibration': _draw(rng, training, config.keep, length),
    'evaluation': _draw(rng, held_out, config.keep, length),
  }
  return Trained(params, kept, lambda p: {'nats': loss(p, kept['evaluation'])})


# Images ----------------------------------------------------------------------


def _on_digits(config: Any) -> Trained:
  """The images are scikit-learn's: they need not be kept."""
  module = digits.Cnn(**config.model)
  params = digits.train_digits(module, config.seed, **config.training)
  data = embedded.digits()

  def judge(params):
    logits = model(config).apply(params, digits.preprocess(data.test_x))
    return {
      'cross-entropy': _cross_entropy(logits, jnp.asarray(data.test_y)),
      'accuracy': (logits.argmax(-1) == data.test_y).mean(),
    }

  return Trained(params, {}, judge)


def run(config: Any, out: str) -> dict[str, float]:
  """Trains, writes the fixture, returns what was measured on held-out data."""
  train = _on_digits if config.bed == 'digits' else _on_text
  params, kept, judge = train(config)
  params = jax.tree.map(lambda x: x.astype(jnp.float16), params)
  arrays: dict[str, Any] = {k: np.asarray(v) for k, v in named_leaves(params)}
  arrays |= kept
  np.savez_compressed(out, **arrays)
  # What is judged is what was written.
  params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  return {k: float(v) for k, v in jax.jit(judge)(params).items()}


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  found = run(flags.FLAGS.config, flags.FLAGS.out)
  words = ', '.join(f'{name} {value:.4f}' for name, value in found.items())
  print(f'{flags.FLAGS.out}: {words} on held-out data')


if __name__ == '__main__':
  config_flags.DEFINE_config_file('config', None, 'What to train.')
  flags.DEFINE_string('out', None, 'The .npz file to write.')
  flags.mark_flags_as_required(['config', 'out'])
  app.run(main)
