r"""Trains the test bed of language models, and writes it as a fixture.

  python -m experiments.testbed --config=configs/testbeds/text.py \
    --out=tests/data/text_model.npz

The file holds the parameters by path in float16, and tokens for calibration
and evaluation; tests give the model pathologies that leave its function as it
was, and quantize it.
"""

import pathlib
import sysconfig
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from ml_collections import config_flags

from quantlab import runtime
from quantlab.core.tree import named_leaves
from quantlab.models.transformer import Transformer


def encode(text: str) -> np.ndarray:
  """Printable ASCII and newlines as 0..95; other characters are left out."""
  codes = np.frombuffer(text.encode('ascii', 'ignore'), np.uint8)
  codes = codes[((codes >= 32) & (codes < 127)) | (codes == 10)]
  return np.where(codes == 10, 95, codes - 32).astype(np.uint8)


def _text(count: int) -> tuple[np.ndarray, np.ndarray]:
  """Characters of the standard library's sources: training, held out."""
  folder = pathlib.Path(sysconfig.get_path('stdlib'))
  files = sorted(folder.glob('*.py'))[:count]
  parts = [encode(f.read_text(errors='ignore')) for f in files]
  last = len(parts) // 10
  return np.concatenate(parts[:-last]), np.concatenate(parts[-last:])


def _draw(rng, text: np.ndarray, count: int, length: int) -> np.ndarray:
  starts = rng.integers(0, len(text) - length, count)
  return text[starts[:, None] + np.arange(length)]


def run(config: Any, out: str) -> float:
  """Trains, writes the fixture, returns nats a character on held-out text."""
  model = Transformer(**config.model)
  length = config.model.context + 1
  training, held_out = _text(config.files)
  rng = np.random.default_rng(config.seed)
  schedule = optax.warmup_cosine_decay_schedule(
    0, config.learning_rate, 50, config.steps
  )
  optimizer = optax.adamw(schedule)

  def loss(params, tokens):
    tokens = tokens.astype(jnp.int32)
    logits = model.apply(params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens[:, 1:]
    ).mean()

  @jax.jit
  def step(params, state, tokens):
    gradient = jax.grad(loss)(params, tokens)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  first = jnp.zeros((1, length - 1), jnp.int32)
  params = model.init(jax.random.key(config.seed), first)
  state = optimizer.init(params)
  for _ in runtime.track(range(config.steps), 'training'):
    params, state = step(
      params, state, _draw(rng, training, config.batch, length)
    )
  kept = {
    'calibration': _draw(rng, training, config.keep, length),
    'evaluation': _draw(rng, held_out, config.keep, length),
  }
  params = jax.tree.map(lambda x: x.astype(jnp.float16), params)
  flat = {k: np.asarray(v) for k, v in named_leaves(params)}
  arrays: dict[str, Any] = {**flat, **kept}
  np.savez_compressed(out, **arrays)
  params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  return float(jax.jit(loss)(params, kept['evaluation']))


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  found = run(flags.FLAGS.config, flags.FLAGS.out)
  print(f'{flags.FLAGS.out}: {found:.4f} nats a character on held-out text')


if __name__ == '__main__':
  config_flags.DEFINE_config_file('config', None, 'What to train.')
  flags.DEFINE_string('out', None, 'The .npz file to write.')
  flags.mark_flags_as_required(['config', 'out'])
  app.run(main)
