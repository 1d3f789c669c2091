"""What the launchers share: flags read without tracebacks."""

import sys

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
