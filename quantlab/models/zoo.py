"""The workloads by name: model, weights, data and metric put together.

The digits are embedded and trained on the spot; the others read the shared
folder of real models and data (`quantlab.data.shared_dir`).
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from quantlab import data
from quantlab.models import (
  bert,
  digits,
  lenet,
  llama,
  mobilenet_v1,
  resnet8,
  resnet_cifar,
)
from quantlab.models.workload import Workload
from quantlab.quality import metric as metrics


class Sizes(NamedTuple):
  """Examples to use; None: the workload's own choice, or all of them."""

  calibration: int | None
  evaluation: int | None
  batch_size: int | None
  data_dir: str | None
  shapes_only: bool = False


def _even(size: int, total: int) -> int:
  """The largest batch up to `size` that divides `total`: all have one shape."""
  return max(n for n in range(1, min(size, total) + 1) if total % n == 0)


def _digits(name: str, model, expected: float, sizes: Sizes, seed: int):
  split = data.digits()
  size = sizes.batch_size or 125
  return Workload(
    name=name,
    apply=model.apply,
    params=digits.shapes(model)
    if sizes.shapes_only
    else digits.train_digits(model, seed),
    calibration=data.Batches(
      split.train_x,
      _even(size, sizes.calibration or 250),
      preprocess=digits.preprocess,
      limit=sizes.calibration or 250,
    ),
    evaluation=data.Batches(
      (split.test_x, split.test_y),
      size,
      preprocess=lambda x, y: (digits.preprocess(x), y),
      limit=sizes.evaluation,
    ),
    metric=metrics.classification,
    expected={'accuracy': expected},
    preprocess=digits.preprocess,
    notes='Trained on the spot; the expected accuracy is a lower bound.',
  )


def digits_cnn(sizes: Sizes, seed: int) -> Workload:
  """The small CNN on the embedded digits."""
  return _digits('digits_cnn', digits.Cnn(), 0.98, sizes, seed)


def digits_vit(sizes: Sizes, seed: int) -> Workload:
  """The small ViT on the embedded digits."""
  return _digits('digits_vit', digits.Vit(), 0.95, sizes, seed)


def _images(
  name: str,
  module: ModuleType | Any,
  weights: str,
  splits: tuple[str, str, str],
  expected: dict[str, float],
  sizes: Sizes,
  seed: int,
  notes: str = '',
) -> Workload:
  """An image classifier; `splits` are the set, to calibrate, to evaluate."""
  stored, calibrate, judge = splits

  def source(split: str):
    return data.load_set(stored, split, data_dir=sizes.data_dir)

  labelled = bool(expected)
  size = sizes.batch_size or 250
  calibration = sizes.calibration or 500
  return Workload(
    name=name,
    apply=module.apply,
    params=module.from_flat(data.load_npz(data.require(weights))),
    calibration=data.Batches(
      source(calibrate),
      _even(size, calibration),
      fields=('x',),
      preprocess=module.preprocess,
      shuffle=True,  # the files are ordered by class
      seed=seed,
      limit=calibration,
    ),
    evaluation=data.Batches(
      source(judge),
      size,
      fields=('x', 'y') if labelled else ('x',),
      preprocess=(lambda x, y: (module.preprocess(x), y.astype(np.int32)))
      if labelled
      else module.preprocess,
      shuffle=sizes.evaluation is not None,  # a part must hold all classes
      seed=seed,
      limit=sizes.evaluation,
    ),
    metric=metrics.classification if labelled else metrics.unlabelled,
    expected=expected,
    preprocess=module.preprocess,
    notes=notes,
  )


def _cifar(name: str, module: Any, weights: str, accuracy: float | None):
  splits = 'cifar10', 'train_jpeg', 'test_jpeg'
  expected = {} if accuracy is None else {'accuracy': accuracy}
  return functools.partial(_images, name, module, weights, splits, expected)


def mnist_lenet(sizes: Sizes, seed: int) -> Workload:
  """LeNet-5 on MNIST."""
  return _images(
    'mnist_lenet',
    lenet,
    'mnist/mnist_lenet.npz',
    ('mnist', 'train', 'test'),
    {'accuracy': 0.9892},
    sizes,
    seed,
  )


def mobilenet(sizes: Sizes, seed: int) -> Workload:
  """MobileNetV1 x0.25 on enlarged CIFAR images; agreement with float only."""
  sizes = sizes._replace(
    # Nine times the pixels of the others: smaller batches, and fewer images.
    batch_size=sizes.batch_size or 100,
    evaluation=sizes.evaluation or 2000,
  )
  return _cifar(
    'mobilenet', mobilenet_v1, 'vww_mobilenet/vww_mobilenet_v1_025.npz', None
  )(
    sizes,
    seed,
    'No labelled image of its own set is at hand: the images are CIFAR-10, '
    'enlarged threefold, on which the model nearly always gives one answer. '
    'Judge it by the SQNR of the logits beside the agreement.',
  )


# Sentences are padded to one of two lengths: most are short, and one length
# for all would double the work. Two lengths are two compilations.
WIDTHS = (24, 56, 72)


def _trim(ids: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Ids (b, 2, t) and the mask of real tokens, cut to the least width."""
  longest = int(length.max())
  return cut(ids, length, min(w for w in WIDTHS if w >= longest))


def _whole(
  ids: np.ndarray, length: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The same in one width for all batches."""
  return cut(ids, length, WIDTHS[-1])


def cut(ids, length, t: int) -> tuple[np.ndarray, np.ndarray]:
  """Ids (..., t), padded or cut to t tokens, and the mask of real ones."""
  ids = ids[..., :t].astype(np.int32)
  ids = np.pad(ids, ((0, 0), (0, 0), (0, t - ids.shape[-1])))
  return ids, np.arange(t) < length[..., None]


def minilm(sizes: Sizes, seed: int) -> Workload:
  """MiniLM-L6 sentence embeddings on STS-B dev; calibrated on train."""
  train = data.load_set('stsb', 'train', data_dir=sizes.data_dir)
  dev = data.load_set('stsb', 'dev', data_dir=sizes.data_dir)
  size = sizes.batch_size or 50
  calibration = sizes.calibration or 200
  # The file is ordered by origin: a part of it is drawn from all of them.
  order = np.random.RandomState(seed).permutation(len(dev))
  arrays = [dev[int(i)] for i in order[: sizes.evaluation]]
  # By length, so that short sentences share batches.
  arrays.sort(key=lambda record: int(record['length'].max()))
  ids, length, score = (
    np.stack([record[name] for record in arrays])
    for name in ('ids', 'length', 'score')
  )
  return Workload(
    name='minilm',
    apply=bert.apply,
    params=bert.from_flat(
      data.load_npz(data.require('minilm_sts/minilm_fp16.npz'))
    ),
    calibration=data.Batches(
      train,
      _even(size, calibration),
      fields=('ids', 'length'),
      preprocess=_whole,
      shuffle=True,
      seed=seed,
      limit=calibration,
    ),
    evaluation=data.Batches(
      (ids, length, score.astype(np.float32)),
      size,
      preprocess=lambda ids, length, score: (*_trim(ids, length), score),
    ),
    metric=metrics.sentence_pairs,
    expected={'spearman': 0.8672},
    preprocess=_trim,
  )


def _next_tokens(ids: np.ndarray, lens: np.ndarray):
  """Inputs, the tokens that follow them, and which of these are real."""
  ids = ids.astype(np.int32)
  mask = np.arange(ids.shape[1] - 1) < lens[:, None] - 1
  return ids[:, :-1], ids[:, 1:], mask


def stories(sizes: Sizes, seed: int) -> Workload:
  """stories260K, perplexity on TinyStories."""
  source = data.load_set('stories', 'text', data_dir=sizes.data_dir)
  size = sizes.batch_size or 16
  calibration = sizes.calibration or 32
  return Workload(
    name='stories',
    apply=llama.apply,
    params=llama.from_flat(
      data.load_npz(data.require('stories260k/stories260k.npz'))
    ),
    calibration=data.Batches(
      source,
      _even(size, calibration),
      fields=('ids', 'lens'),
      preprocess=lambda ids, lens: _next_tokens(ids, lens)[:1],
      shuffle=True,
      seed=seed,
      limit=calibration,
    ),
    evaluation=data.Batches(
      source,
      size,
      fields=('ids', 'lens'),
      preprocess=_next_tokens,
      shuffle=sizes.evaluation is not None,  # early stories are easier
      seed=seed,
      limit=sizes.evaluation,
    ),
    metric=metrics.language_model,
    expected={'perplexity': 4.505},
    preprocess=_next_tokens,
    notes='The stories calibrated on are among those evaluated: no other text '
    'of this kind is at hand. Methods that fit weights to them are flattered.',
  )


WORKLOADS: dict[str, Callable[[Sizes, int], Workload]] = {
  'digits_cnn': digits_cnn,
  'digits_vit': digits_vit,
  'resnet20_jpeg': _cifar(
    'resnet20_jpeg', resnet_cifar, 'cifar10/resnet20_jpeg.npz', 0.8752
  ),
  'resnet20': _cifar('resnet20', resnet_cifar, 'cifar10/resnet20.npz', 0.8100),
  'resnet32': _cifar('resnet32', resnet_cifar, 'cifar10/resnet32.npz', 0.8228),
  'resnet8': _cifar('resnet8', resnet8, 'cifar10_resnet8/resnet8.npz', 0.7524),
  'mobilenet': mobilenet,
  'mnist_lenet': mnist_lenet,
  'minilm': minilm,
  'stories': stories,
}


def workload(
  name: str,
  *,
  calibration: int | None = None,
  evaluation: int | None = None,
  batch_size: int | None = None,
  seed: int = 0,
  data_dir: str | None = None,
  shapes_only: bool = False,
) -> Workload:
  """A workload by name, with its parameters loaded (or trained: digits).

  Args:
    name: one of `WORKLOADS`.
    calibration: how many examples to calibrate on.
    evaluation: how many to evaluate on; all by default.
    batch_size: examples a batch.
    seed: of training, and of the choice of calibration examples.
    data_dir: where prepared sets lie; `quantlab.data.cache_dir()` by default.
    shapes_only: parameters are shapes, and nothing is trained; to plan with.

  Raises:
    ValueError: no such workload.
    FileNotFoundError: it needs the shared folder, and that is absent.
  """
  if name not in WORKLOADS:
    close = difflib.get_close_matches(name, WORKLOADS, 1)
    hint = f' Did you mean {close[0]!r}?' if close else ''
    raise ValueError(
      f'Unknown workload {name!r}; known: {", ".join(WORKLOADS)}.{hint}'
    )
  sizes = Sizes(calibration, evaluation, batch_size, data_dir, shapes_only)
  found = WORKLOADS[name](sizes, seed)
  if not shapes_only:
    return found
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), found.params
  )
  return dataclasses.replace(found, params=shapes)
