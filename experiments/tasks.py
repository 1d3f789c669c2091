"""What is trained: a model, its data, its loss and its measure, by name.

A task is made from `config.task` and `config.model`; another model of the same
task (another width) is the task made again.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import variants
from quantlab import data, models, quality
from quantlab.core.tree import path_str
from quantlab.data import batches, text
from quantlab.models import (
  bitnet,
  digits,
  lenet,
  llama,
  mlp,
  resnet_cifar,
  zoo,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """A float model with what it is trained on and judged by.

  Attributes:
    apply: `apply(params, *inputs) -> outputs`.
    init: `init(key) -> params`; of a pretrained model the same for every key.
    rows: of the training set, see `data.Draws`.
    evaluation: batches `(*inputs, *targets)`.
    metric: what it is judged by.
    loss: `(outputs, *targets) -> scalar`.
    inputs: how many arrays of a training batch are inputs.
    fields: of the rows, where they are records.
    augment: see `data.Draws`.
    preprocess: arrays of a training batch -> inputs and targets.
    train_apply: `(params, *inputs, live) -> (outputs, params)`: in training
      mode where `live` is true, a traced bool, and else as `apply`.
    running: pattern of the paths of parameters that are running statistics.
    step: decodes a language model token by token, see `llama.step`.
    sizes: of that model.
  """

  apply: Callable[..., Any]
  init: Callable[[jax.Array], Any]
  rows: Any
  evaluation: data.Batches
  metric: quality.Metric
  loss: Callable[..., jax.Array]
  inputs: int = 1
  fields: tuple[str, ...] | None = None
  augment: Callable[..., Any] | None = None
  preprocess: Callable[..., Any] | None = None
  train_apply: Callable[..., Any] | None = None
  running: str | None = None
  step: Callable[..., Any] | None = None
  sizes: llama.Config | None = None

  def draws(self, batch_size: int, **options: Any) -> data.Draws:
    """Training batches `(*inputs, *targets)`."""
    return data.Draws(
      self.rows,
      batch_size,
      fields=self.fields,
      augment=self.augment,
      preprocess=self.preprocess,
      **options,
    )

  def is_running(self, params: Any) -> Any:
    """Which leaves are running statistics: bools in the structure."""

    def one(path, leaf):
      del leaf
      name = path_str(path)
      return self.running is not None and bool(re.search(self.running, name))

    return jax.tree_util.tree_map_with_path(one, params)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Mean over examples and positions, in nats."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make(name: str, model: Mapping[str, Any]) -> Task:
  """The task of a name, its model with these sizes.

  Raises:
    ConfigError: no such task, or the model takes no such sizes.
    FileNotFoundError: it needs the shared folder, and that is absent.
  """
  variants.check_name('task', name, tuple(TASKS))
  return variants.call(TASKS[name], dict(model), f'the model of {name}')


# Images -----------------------------------------------------------------------


def _labelled(preprocess: Callable) -> Callable:
  return lambda x, y: (preprocess(x), y.astype(np.int32))


def _digits(apply, init) -> Task:
  found = data.digits()
  prepare = _labelled(digits.preprocess)
  return Task(
    apply=apply,
    init=init,
    rows=(found.train_x, found.train_y),
    evaluation=data.Batches(
      (found.test_x, found.test_y), 250, preprocess=prepare
    ),
    metric=quality.classification,
    loss=cross_entropy,
    preprocess=prepare,
  )


def _mlp(pixels: int, hidden: tuple[int, ...], norm: bool):
  widths = (pixels, *hidden, 10)
  return (
    functools.partial(mlp.apply, norm=norm),
    functools.partial(mlp.init, widths=widths, norm=norm),
  )


def digits_mlp(
  hidden: tuple[int, ...] = (32, 32, 32), norm: bool = False
) -> Task:
  """A perceptron on the embedded digits; `norm`: as BitNet has it."""
  return _digits(*_mlp(64, hidden, norm))


def _stored(name: str, splits: tuple[str, str], preprocess, **fields) -> Task:
  train, test = splits
  prepare = _labelled(preprocess)
  return Task(
    rows=data.load_set(name, train),
    evaluation=data.Batches(
      data.load_set(name, test), 250, fields=('x', 'y'), preprocess=prepare
    ),
    metric=quality.classification,
    loss=cross_entropy,
    fields=('x', 'y'),
    preprocess=prepare,
    **fields,
  )


def _mnist(**fields: Any) -> Task:
  task = _stored('mnist', ('train', 'test'), lenet.preprocess, **fields)
  # Small enough for memory: read once.
  return dataclasses.replace(task, rows=_arrays(task.rows), fields=None)


def _arrays(source: Any) -> tuple[np.ndarray, ...]:
  return batches.rows(source, ('x', 'y')).take(np.arange(len(source)))


def mnist_mlp(hidden: tuple[int, ...] = (64, 64), norm: bool = False) -> Task:
  """A perceptron on MNIST."""
  apply, init = _mlp(784, hidden, norm)
  return _mnist(apply=apply, init=init)


def mnist_lenet() -> Task:
  """The pretrained LeNet-5."""
  params = models.lenet.from_flat(
    data.load_npz(data.require('mnist/mnist_lenet.npz'))
  )
  return _mnist(apply=lenet.apply, init=lambda key: params)


def resnet20() -> Task:
  """The pretrained ResNet-20 and its 5,000 training images."""
  params = resnet_cifar.from_flat(
    data.load_npz(data.require('cifar10/resnet20_jpeg.npz'))
  )
  task = _stored(
    'cifar10',
    ('train_jpeg', 'test_jpeg'),
    resnet_cifar.preprocess,
    apply=resnet_cifar.apply,
    init=lambda key: params,
    train_apply=resnet_cifar.train_apply,
    running='/(mean|var)$',
    augment=data.crop_and_flip,
  )
  return dataclasses.replace(task, rows=_arrays(task.rows), fields=None)


def bitnet_vit(
  images: str = 'digits', dim: int = 32, blocks: int = 2, heads: int = 4
) -> Task:
  """A vision transformer with BitNet's norms on 'digits' or 'mnist'."""
  variants.check_name('image set', images, ('digits', 'mnist'))
  shape, patch = ((8, 8, 1), 2) if images == 'digits' else ((28, 28, 1), 7)
  sizes = bitnet.language_model(10, dim, blocks, heads)
  apply = functools.partial(bitnet.vit_apply, config=sizes, patch=patch)

  def init(key):
    return bitnet.vit_init(key, sizes, shape, patch)

  return (
    _digits(apply, init)
    if images == 'digits'
    else _mnist(apply=apply, init=init)
  )


# Sentences --------------------------------------------------------------------


def minilm_sts(longest: int = 24) -> Task:
  """The pretrained MiniLM-L6 on STS-B: the cosine of a pair is its score.

  Trained on the pairs whose sentences have at most `longest` tokens.
  """
  work = models.workload('minilm')
  source = data.load_set('stsb', 'train')
  names = ('ids', 'length', 'score')
  ids, length, score = batches.rows(source, names).take(np.arange(len(source)))
  short = length.max(1) <= longest
  if not short.any():
    raise variants.ConfigError(
      f'{longest=}: the shortest pair has {length.max(1).min()} tokens.'
    )

  def prepare(ids, length, score):
    return (*zoo.cut(ids, length, longest), score)

  def loss(embeddings, score):
    found = quality.cosine(embeddings[:, 0], embeddings[:, 1])
    return jnp.square(found - score / 5).mean()

  return Task(
    apply=work.apply,
    init=lambda key: work.params,
    rows=(ids[short], length[short], score[short].astype(np.float32)),
    evaluation=work.evaluation,
    metric=work.metric,
    loss=loss,
    inputs=2,
    preprocess=prepare,
  )


# Characters -------------------------------------------------------------------


def character_lm(
  corpus: str = 'tinyshakespeare',
  context: int = 128,
  dim: int = 128,
  blocks: int = 5,
  heads: int = 4,
  squared_relu: bool = False,
  scanned: bool = False,
  evaluated: int = 64,
) -> Task:
  """BitNet's decoder on characters, judged on the end of the text.

  Where the shared text is absent, that of the standard library's sources is
  taken, with a message: numbers are not comparable.
  """
  sizes = bitnet.language_model(
    text.VOCABULARY,
    dim,
    blocks,
    heads,
    squared_relu=squared_relu,
    scanned=scanned,
  )
  try:
    codes = text.characters(corpus)
  except FileNotFoundError as error:
    print(f'{corpus} is absent, {text.EMBEDDED} are taken: {error}')
    codes = text.characters(text.EMBEDDED)
  training, held_out = text.split(codes)
  rows = text.Windows(held_out, context, stride=context)
  # Spread over the held-out text, the same for every model and seed.
  chosen = np.linspace(0, len(rows) - 1, min(evaluated, len(rows))).astype(int)
  x, y = rows.take(chosen)
  return Task(
    apply=functools.partial(llama.apply, config=sizes),
    init=functools.partial(llama.init, config=sizes),
    rows=text.Windows(training, context),
    evaluation=data.Batches((x, y, np.ones_like(y, bool)), 32),
    metric=quality.language_model,
    loss=lambda logits, labels, *mask: cross_entropy(logits, labels),
    step=functools.partial(llama.step, config=sizes),
    sizes=sizes,
  )


TASKS: dict[str, Callable[..., Task]] = {
  f.__name__: f
  for f in (
    digits_mlp,
    mnist_mlp,
    mnist_lenet,
    resnet20,
    bitnet_vit,
    minilm_sts,
    character_lm,
  )
}


def accuracy(outputs: jax.Array, *targets: jax.Array) -> jax.Array:
  """Share of the positions whose largest logit is the label's."""
  return (outputs.argmax(-1) == targets[0]).astype(jnp.float32).mean()
