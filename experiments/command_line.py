"""What the launchers share: flags read without tracebacks."""

import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags


def parse(argv: list[str]) -> list[str]:
  """Reads the flags; a slip in `--config` ends with a message.

  Args:
    argv: the command line.

  Returns:
    What is left of it.
  """
  try:
    rest = app.parse_flags_with_usage(argv)
    # A file that cannot be read is told of when the config is first asked.
    _ = flags.FLAGS.config and flags.FLAGS.config.to_dict
  except (AttributeError, OSError) as error:  # an unknown field, no such file
    sys.exit(f'error: --config: {error}'.replace(r'\n', ' '))
  return rest


def guarded(run: Callable[..., Any], *args: Any) -> Any:
  """Runs; what is refused, and Ctrl-C, end with a message.

  Args:
    run: of a launcher, which goes on where it was.
    *args: of it.

  Returns:
    What it returns.
  """
  try:
    return run(*args)
  except ValueError as error:
    sys.exit(f'error: {error}')
  except KeyboardInterrupt:
    print('stopped; the same command goes on from here', file=sys.stderr)
    sys.exit(130)
