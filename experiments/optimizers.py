"""From a config's plain values to optimizers and schedules.

`{'name': 'adamw', 'learning_rate': 3e-3, 'schedule': 'cosine', ...}`; see
`make` for what else may stand there.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import variants
from quantlab import optim

Schedule = Callable[[Any], Any]

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  'adam': lambda rate, decay, mask, **more: optax.adam(rate, **more),
  'adamw': lambda rate, decay, mask, **more: optax.adamw(
    rate, weight_decay=decay, mask=mask, **more
  ),
  'sgd': lambda rate, decay, mask, **more: optax.chain(
    optax.add_decayed_weights(decay, mask), optax.sgd(rate, **more)
  ),
}
SCHEDULES = ('constant', 'cosine', 'linear', 'two_stage')


def make(
  spec: Mapping[str, Any], steps: int, labels: Any
) -> optax.GradientTransformation:
  """The optimizer of a variant: weights and learned steps apart.

  Args:
    spec: 'name' and
      learning_rate: the peak;
      schedule: 'constant', 'cosine' or 'linear' to 0, or 'two_stage': linear,
        and from the middle on as from a lower peak (BitNet b1.58);
      second: that peak as a share of the first (0.6);
      warm_up: share of the steps in which the rate rises from 0;
      weight_decay: of matrices; with 'two_stage' it ends in the middle;
      step_learning_rate: of learned steps and clips, as a share (0.1);
      freeze_ranges: share of the steps after which these stay;
      clip: largest norm of the gradient of the weights;
      state_bits: 32, or 8: moments of the weights as `optim.eight_bit` has it;
      options: the optimizer's own, such as {'b2': 0.95}.
    steps: updates in all.
    labels: 'weight', 'step', 'adapter' or 'state' of every leaf; adapters
      move as weights do.

  Raises:
    ConfigError: something unknown.
  """
  return variants.call(
    _make, {**spec, 'steps': steps, 'labels': labels}, 'optimizer'
  )


def _make(
  name: str,
  learning_rate: float,
  steps: int,
  labels: Any,
  schedule: str = 'constant',
  second: float = 0.6,
  warm_up: float = 0.0,
  weight_decay: float = 0.0,
  step_learning_rate: float = 0.1,
  freeze_ranges: float = 1.0,
  clip: float | None = None,
  state_bits: int = 32,
  options: Mapping[str, Any] | None = None,
) -> optax.GradientTransformation:
  variants.check_name('optimizer', name, tuple(OPTIMIZERS))
  if weight_decay and name == 'adam':
    raise variants.ConfigError('adam decays no weights; name adamw.')
  if state_bits not in (8, 32):
    raise variants.ConfigError(f'{state_bits=}: expected 8 or 32.')
  rate = rates(schedule, learning_rate, steps, second, warm_up)
  half = steps / 2
  decay: Any = weight_decay
  if schedule == 'two_stage':
    decay = lambda step: jnp.where(step < half, weight_decay, 0.0)  # noqa: E731

  def ranges(step):
    going = step < freeze_ranges * steps
    return jnp.where(going, step_learning_rate * rate(step), 0.0)

  def matrices(params):
    return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)

  build = OPTIMIZERS[name]
  weights = build(rate, decay, matrices, **(options or {}))
  if state_bits == 8:
    weights = optim.eight_bit(weights)
  if clip is not None:
    weights = optax.chain(optax.clip_by_global_norm(clip), weights)
  return optax.multi_transform(
    {
      'weight': weights,
      'adapter': weights,
      'step': build(ranges, 0.0, None, **(options or {})),
      'state': optax.set_to_zero(),
    },
    labels,
  )


def rates(
  schedule: str, peak: float, steps: int, second: float, warm_up: float
) -> Schedule:
  """The learning rate by step."""
  variants.check_name('schedule', schedule, SCHEDULES)
  rise = warm_up * steps

  def rate(step):
    done = step / steps
    shape = {
      'constant': lambda: jnp.ones_like(done),
      'cosine': lambda: 0.5 * (1 + jnp.cos(jnp.pi * done)),
      'linear': lambda: 1 - done,
      'two_stage': lambda: (1 - done) * jnp.where(done < 0.5, 1.0, second),
    }[schedule]()
    return peak * shape * jnp.minimum(1.0, (step + 1) / jnp.maximum(rise, 1.0))

  return lambda step: rate(jnp.asarray(step, jnp.float32))
