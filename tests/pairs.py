"""Two processes of one JAX program."""

import signal
import socket
import subprocess
import sys
import time

LIMIT = 150  # seconds; they take fifteen alone, forty beside other tests


def run(command, folder):
  """Runs two workers until both have ended well.

  Args:
    command: (port, index, folder) -> arguments of python.
    folder: where they write.

  Raises:
    AssertionError: one failed, or they did not end; with what they printed and
      the stacks of threads that hang.
  """
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
  assert all(w.returncode == 0 for w in workers), '\n'.join(outputs)
