"""Parameters and batches spread over devices: the same codes and ranges."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from ptq import spread

import quantlab as ql
from quantlab.core import tree
from quantlab.ptq import hessian, resume, streams, walk
from quantlab.rewrites import observe
from quantlab.runtime import make_mesh

pytestmark = pytest.mark.as_for_users


def ptq(encoder, apply, params, batches, **options):
  return ql.ptq(apply, params, spread.RECIPE, batches, encoder, **options)


def mesh():
  assert jax.device_count() == 8
  return make_mesh(data=4, model=2)


def spread_setup(scan):
  apply, params, batches = spread.setup(scan)
  on = mesh()
  return (
    apply,
    spread.spread_params(on, params),
    spread.spread_batches(on, batches),
  )


@functools.cache
def both(name, scan):
  """The model of one device, and that of eight."""
  encoder = {'rtn': ql.rtn, 'gptq': ql.gptq}[name]()
  one = ptq(encoder, *spread.setup(scan))
  return one, ptq(encoder, *spread_setup(scan))


CASES = [('rtn', True), ('gptq', True)]
cases = pytest.mark.parametrize(('name', 'scan'), CASES)


@cases
def test_codes_are_those_of_one_device(name, scan):
  """Hessians differ by their last bits alone.

  Those could tip a weight that lies as close as that to the middle between two
  codes, by one step; here none does.
  """
  one, eight = both(name, scan)
  pairs = zip(
    tree.named_leaves(one.params['weights'], is_leaf=is_coded),
    tree.named_leaves(eight.params['weights'], is_leaf=is_coded),
    strict=True,
  )
  coded = 0
  for (path, a), (other, b) in pairs:
    assert path == other
    if is_coded(a):
      coded += 1
      np.testing.assert_array_equal(a.unpack(), b.unpack(), err_msg=path)
      np.testing.assert_array_equal(a.scale, b.scale, err_msg=path)
    else:
      np.testing.assert_array_equal(a, b, err_msg=path)
  assert coded == 3


@cases
def test_ranges_are_those_of_one_device(name, scan):
  """But for the last bit: products of a sharded weight add in another order."""
  one, eight = both(name, scan)
  sites = one.params['sites']
  assert len(sites) == 3
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6),
    sites,
    eight.params['sites'],
  )


@cases
def test_sharded_parameters_stay_sharded(name, scan):
  """Codes and scales lie as their weights lay, along N and along K."""
  _, eight = both(name, scan)
  _, params, _ = spread_setup(scan)
  before = dict(tree.named_leaves(params))
  after = dict(tree.named_leaves(eight.params['weights'], is_leaf=is_coded))
  assert before.keys() == after.keys()
  for path, x in after.items():
    for part in (x.codes, x.scale) if is_coded(x) else (x,):
      assert isinstance(part.sharding, NamedSharding), path
      want = before[path].sharding
      assert part.sharding.is_equivalent_to(want, part.ndim), path


@cases
def test_outputs_are_those_of_one_device(name, scan):
  one, eight = both(name, scan)
  _, _, [x, _] = spread.setup(scan)
  _, _, [placed, _] = spread_setup(scan)
  want = jax.jit(one.apply)(one.params, x)
  got = jax.jit(eight.apply)(eight.params, placed)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def is_coded(x):
  return isinstance(x, ql.QTensor)


@pytest.mark.parametrize('scan', [False, True])
def test_hessians_are_those_of_one_device(scan):
  """Of the float stream: a rounded input may tip over by the last bit."""
  recipe = {'/w|head': ql.rule(weight=ql.int4(group=8))}

  def moments(apply, params, batches):
    plan = ql.plan(apply, params, recipe, batches[0])
    observer = hessian.InputMoments(plan)
    run = jax.jit(observe(apply, observer, plan, quantize=False))
    found = run({'weights': params, 'sites': {}}, batches[0])[1]
    return {k: v['moments'] for k, v in found.items()}

  one = moments(*spread.setup(scan))
  eight = moments(*spread_setup(scan))
  assert len(one) == len(eight) == 3
  for name, h in one.items():
    error = np.linalg.norm(h - eight[name]) / np.linalg.norm(h)
    assert error < 1e-6, name


class StoppedError(Exception):
  pass


def test_a_stopped_walk_goes_on_where_its_parts_lay(tmp_path, monkeypatch):
  """Streams on disk and codes from a checkpoint go back to their devices."""
  real = walk._Walker.block

  def stopping(self, block, *args):
    if block.name == 'head':
      raise StoppedError
    return real(self, block, *args)

  gptq, options = ql.gptq(), {'workdir': tmp_path, 'memory': 0}
  monkeypatch.setattr(walk._Walker, 'block', stopping)
  with pytest.raises(StoppedError):
    ptq(gptq, *spread_setup(False), **options)
  assert len(list((tmp_path / 'blocks').iterdir())) == 1
  monkeypatch.setattr(walk._Walker, 'block', real)
  resumed = ptq(gptq, *spread_setup(False), **options)
  _, whole = both('gptq', False)
  jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
  assert whole.report == resumed.report
  pairs = zip(
    jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True
  )
  for a, b in pairs:
    assert b.sharding.is_equivalent_to(a.sharding, a.ndim)


def test_another_placement_is_refused(tmp_path, monkeypatch):
  """Sums would be added in another order: not the same run bit for bit."""
  apply, params, batches = spread_setup(False)

  def stopping(*args):
    raise StoppedError

  monkeypatch.setattr(walk, 'encode_blocks', stopping)
  with pytest.raises(StoppedError):
    ptq(ql.gptq(), apply, params, batches, workdir=tmp_path)
  _, whole, _ = spread.setup()
  with pytest.raises(resume.ResumeError, match=r'\n  placement: '):
    ptq(ql.gptq(), apply, whole, batches, workdir=tmp_path)


def test_spilled_streams_keep_no_device(tmp_path):
  """What was free to move is so again when it is read."""
  stream = streams.Store(tmp_path, 0).stream()
  stream.append((jax.numpy.ones(3), jax.device_put(1.0, jax.devices()[1])))
  free, bound = stream[0]
  assert not free.committed
  assert bound.committed
  assert bound.device == jax.devices()[1]
