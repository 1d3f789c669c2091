"""One of two processes: `python worker.py <index> <port> <folder>`."""

import json
import os
import pathlib
import sys
import time


def main(index, port, folder):
  os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=1'
  import jax

  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'localhost:{port}', 2, index)
  assert jax.process_count() == 2
  assert jax.local_device_count() == 1
  quantize(folder, index)
  jax.distributed.shutdown()


def quantize(folder, index):
  """The same model twice, the second time killed and resumed."""
  import jax
  import numpy as np
  from jax.experimental import multihost_utils
  from ptq import spread

  import quantlab as ql
  from quantlab.ptq import walk
  from quantlab.runtime import checkpoint, make_mesh

  mesh = make_mesh(data=-1)
  apply, params, batches = spread.setup()
  batches = spread.spread_batches(mesh, batches)
  # Rows of each weight of the layers here or there, the head in both.
  params['layers'] = spread.spread_batches(mesh, params['layers'])
  params['head'] = jax.numpy.asarray(params['head'])
  for x in jax.tree.leaves((batches, params['layers'])):
    assert not x.is_fully_addressable

  def ptq(**options):
    return ql.ptq(apply, params, spread.RECIPE, batches, ql.gptq(), **options)

  def whole(model):
    """All of every array."""
    return [
      np.asarray(x)
      if x.is_fully_addressable
      else multihost_utils.process_allgather(x, tiled=True)
      for x in jax.tree.leaves(model.params)
    ]

  class StoppedError(Exception):
    pass

  def stopping(self, block, *args):
    if block.name == 'head':
      raise StoppedError
    return real(self, block, *args)

  real = walk._Walker.block
  written = record_writes(folder)
  model = ptq()
  walk._Walker.block = stopping
  try:
    ptq(workdir=folder / 'walk', memory=0)
    raise AssertionError('not stopped')
  except StoppedError:
    walk._Walker.block = real
  resumed = ptq(workdir=folder / 'walk', memory=0)
  if index == 1:
    look_late(checkpoint)
  manifest = ql.save(folder / 'model', resumed)
  text = '\n'.join(written)
  (folder / f'written{index}.txt').write_text(text)
  (folder / f'manifest{index}.json').write_text(json.dumps(manifest))
  np.savez(folder / f'whole{index}.npz', *whole(model))
  np.savez(folder / f'resumed{index}.npz', *whole(resumed))


def look_late(checkpoint):
  """Lists what was written only when the other process has gone on."""
  describe = checkpoint._describe_files

  def late(*args):
    time.sleep(0.5)
    return describe(*args)

  checkpoint._describe_files = late


def record_writes(folder):
  """Names of what this process makes or replaces in a folder, from now on."""
  found = []

  def hook(event, args):
    if event == 'open' and isinstance(args[0], str | bytes | os.PathLike):
      flags = args[2] if isinstance(args[2], int) else 0
      path = args[0] if flags & (os.O_WRONLY | os.O_RDWR) else None
    elif event == 'os.rename':
      path = args[1]
    else:
      path = args[0] if event == 'os.mkdir' else None
    if path is not None:
      name = os.path.abspath(os.fsdecode(path))
      if name.startswith(str(folder)):
        found.append(os.path.relpath(name, folder))

  sys.addaudithook(hook)
  return found


if __name__ == '__main__':
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
  main(int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]))
