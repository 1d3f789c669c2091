"""Two small networks for 8x8 digits, and the few seconds that train them.

Linen on purpose: `model.apply` is already the pure function that quantlab
takes, and the variables (parameters and BatchNorm statistics) are its tree.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from quantlab.data import embedded

# Mean and standard deviation of the training pixels, which lie in 0..16.
MEAN, STD = 4.889, 6.012


def preprocess(x: np.ndarray) -> np.ndarray:
  """uint8 images (b, 8, 8, 1) with values 0..16 -> float32, normalised."""
  return ((x - np.float32(MEAN)) / np.float32(STD)).astype(np.float32)


class Cnn(nn.Module):
  """Convolution, BatchNorm and ReLU thrice; global average; one dense layer."""

  widths: tuple[int, ...] = (16, 32, 32)
  classes: int = 10

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Logits (b, classes) of normalised images x (b, 8, 8, 1)."""
    for i, width in enumerate(self.widths):
      stride = 2 if i == 1 else 1
      x = nn.Conv(
        width, (3, 3), (stride, stride), use_bias=False, name=f'conv_{i}'
      )(x)
      x = nn.BatchNorm(
        use_running_average=not train, momentum=0.9, name=f'bn_{i}'
      )(x)
      x = nn.relu(x)
    return nn.Dense(self.classes, name='head')(x.mean((1, 2)))


class VitBlock(nn.Module):
  """Pre-norm attention and MLP."""

  dim: int
  heads: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """One block: x (b, t, dim) -> (b, t, dim)."""
    y = nn.LayerNorm(name='attention_norm')(x)
    q, k, v = (
      nn.DenseGeneral((self.heads, self.dim // self.heads), name=name)(y)
      for name in ('query', 'key', 'value')
    )
    scores = jnp.einsum('bthd,bshd->bhts', q, k) * q.shape[-1] ** -0.5
    y = jnp.einsum('bhts,bshd->bthd', jax.nn.softmax(scores), v)
    x = x + nn.DenseGeneral(self.dim, axis=(-2, -1), name='out')(y)
    y = nn.LayerNorm(name='mlp_norm')(x)
    y = nn.gelu(nn.Dense(2 * self.dim, name='up')(y))
    return x + nn.Dense(self.dim, name='down')(y)


class Vit(nn.Module):
  """Vision transformer on 2x2 patches. arXiv 2010.11929, mean pooling."""

  dim: int = 48
  blocks: int = 2
  heads: int = 4
  patch: int = 2
  classes: int = 10

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Logits (b, classes) of normalised images x (b, 8, 8, 1)."""
    del train  # the same at training: nothing is dropped or averaged
    b, h, w, c = x.shape
    p = self.patch
    x = x.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)
    x = x.reshape(b, (h // p) * (w // p), p * p * c)
    x = nn.Dense(self.dim, name='embed')(x)
    # As large as the embedded patches: with the customary 0.02 so small a net
    # learns where a patch lies only after three times as many epochs.
    x = x + self.param('position', nn.initializers.normal(1.0), x.shape[1:])
    for i in range(self.blocks):
      x = VitBlock(self.dim, self.heads, name=f'block_{i}')(x)
    x = nn.LayerNorm(name='norm')(x)
    return nn.Dense(self.classes, name='head')(x.mean(1))


def shapes(model: nn.Module) -> Any:
  """The variables of a model as shapes."""
  x = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), x)


def train_digits(
  model: nn.Module,
  seed: int = 0,
  *,
  epochs: int | None = None,
  learning_rate: float | None = None,
  batch_size: int = 64,
) -> Any:
  """Trains `model` on the embedded digits; the same seed gives the same bits.

  Args:
    model: a module called as `model(x, train)`, such as `Cnn` or `Vit`.
    seed: of the initialisation and of the order of the examples.
    epochs: passes over the 1297 images; by default enough for the model.
    learning_rate: peak of the one-cycle schedule of AdamW.
    batch_size: images a step; a remainder is left out of each epoch.

  Returns:
    The variables: `{'params'}`, and `{'batch_stats'}` of a model that has them.
  """
  small = isinstance(model, Cnn)
  epochs = (16 if small else 20) if epochs is None else epochs
  rate = (2e-2 if small else 4e-3) if learning_rate is None else learning_rate
  data = embedded.digits()
  x, y = preprocess(data.train_x), data.train_y
  steps = len(x) // batch_size
  optimizer = _optimizer(steps * epochs, rate)
  variables = jax.jit(model.init)(jax.random.key(seed), x[:1])
  state = variables, optimizer.init(variables['params'])
  step = _step(model, steps * epochs, rate)
  draw = np.random.RandomState(seed)
  # A loop over jitted steps, not a scan: inside a scan XLA's CPU backend runs
  # convolutions some ten times slower.
  for _ in range(epochs):
    order = draw.permutation(len(x))
    for i in range(steps):  # a remainder is left out, another one every time
      rows = order[i * batch_size : (i + 1) * batch_size]
      state = step(state, x[rows], y[rows])
  return state[0]


def _optimizer(steps: int, rate: float) -> optax.GradientTransformation:
  schedule = optax.cosine_onecycle_schedule(max(2, steps), rate)
  return optax.adamw(schedule, weight_decay=1e-4)


@functools.lru_cache(maxsize=8)  # another seed need not compile again
def _step(model: nn.Module, steps: int, rate: float) -> Callable[..., Any]:
  """A jitted step of training: `(state, x, y) -> state`."""
  optimizer = _optimizer(steps, rate)

  @jax.jit
  def step(state, x, y):
    variables, optimizer_state = state
    mutable = [name for name in variables if name != 'params']

    def loss_fn(params):
      logits, updated = model.apply(
        {**variables, 'params': params}, x, train=True, mutable=mutable
      )
      loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
      return loss, updated

    grads, updated = jax.grad(loss_fn, has_aux=True)(variables['params'])
    updates, optimizer_state = optimizer.update(
      grads, optimizer_state, variables['params']
    )
    params = optax.apply_updates(variables['params'], updates)
    return {'params': params, **updated}, optimizer_state

  return step
