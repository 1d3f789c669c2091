"""Two processes of one JAX program."""

import signal
import socket
import subprocess
import sys
import time
import warnings

LIMIT = 150  # seconds; they take fifteen alone, forty beside other tests


def run(command, tmp_path):
  """Runs two workers until both have ended well.

  A collective of two local processes has been seen to wait forever, once in
  many hundred runs. Two that do not end say where they are, in a warning, and
  are started a second time.

  Args:
    command: (port, index, folder) -> arguments of python.
    tmp_path: folders are made in it.

  Returns:
    The folder of the workers that ended.
  """
  folder = tmp_path / 'first'
  folder.mkdir()
  outputs = _attempt(command, folder)
  if outputs is not None:
    warnings.warn('started again, hung at: ' + '\n'.join(outputs), stacklevel=2)
    folder = tmp_path / 'second'
    folder.mkdir()
    outputs = _attempt(command, folder)
    assert outputs is None, outputs
  return folder


def _attempt(command, folder):
  """What workers that hang print, with the stacks of their threads; or None."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  paths = [folder / f'output{i}' for i in range(2)]
  workers = []
  try:
    for i, path in enumerate(paths):
      line = [sys.executable, '-X', 'faulthandler', *command(port, i, folder)]
      with path.open('w') as out:
        workers.append(subprocess.Popen(line, stdout=out, stderr=out))
    deadline = time.time() + LIMIT
    while (still := [w for w in workers if w.poll() is None]) and (
      time.time() < deadline
    ):
      time.sleep(0.1)
    for w in still:
      w.send_signal(signal.SIGABRT)  # prints its stacks
      w.wait(30)
  finally:
    for w in workers:
      w.kill()
  outputs = [path.read_text() for path in paths]
  if still:
    return outputs
  assert all(w.returncode == 0 for w in workers), outputs
  return None
