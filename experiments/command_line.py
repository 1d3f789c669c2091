"""What the launchers share: flags read without tracebacks."""

import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from quantlab import runtime


def parse(argv: list[str]) -> list[str]:
  """Reads the flags; a slip in `--config` ends with a message.

  Args:
    argv: the command line.

  Returns:
    What is left of it.
  """
  try:
    rest = flags.FLAGS(argv)
    # A file that cannot be read is told of when the config is first asked.
    _ = flags.FLAGS.config and flags.FLAGS.config.to_dict
  except (AttributeError, OSError) as error:  # an unknown field, no such file
    sys.exit(f'error: --config: {error}'.replace(r'\n', ' '))
  except flags.Error as error:  # of a config's own code with its traceback
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = ' '.join(dict.fromkeys((lines[0], lines[-1])))
    sys.exit(f'error: {told}. --helpshort tells of the flags')
  return rest


def guarded(
  run: Callable[..., Any],
  *args: Any,
  refused: tuple[type[Exception], ...] = (ValueError,),
) -> Any:
  """Runs; what is refused, and Ctrl-C, end with a message.

  Args:
    run: of a launcher, which goes on where it was.
    *args: of it.
    refused: errors that are messages to the user.

  Returns:
    What it returns.
  """
  try:
    with runtime.interruptible():
      return run(*args)
  except refused as error:
    sys.exit(f'error: {error}')
  except KeyboardInterrupt:
    print('stopped; the same command goes on from here', file=sys.stderr)
    sys.exit(130)
