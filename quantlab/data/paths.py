"""Where data lies: the optional shared folder and the cache of prepared sets.

The package never needs the shared folder of real models and data: everything
that does asks for it here, and is told how to name it when it is absent.
"""

import os
import pathlib

SHARED_VARIABLE = 'QUANTLAB_DATA'
CACHE_VARIABLE = 'QUANTLAB_CACHE'


def shared_dir() -> pathlib.Path | None:
  """The folder of real models and data, or None where there is none.

  The environment variable QUANTLAB_DATA names it; an empty value means none.
  Unset, a folder `shared/data` beside the checkout is taken if it exists.

  Raises:
    FileNotFoundError: QUANTLAB_DATA names something that is not a folder (a
      misspelt path must not pass for "no data").
  """
  named = os.environ.get(SHARED_VARIABLE)
  if named is not None:
    if not named:
      return None
    path = pathlib.Path(named).expanduser()
    if not path.is_dir():
      raise FileNotFoundError(
        f'{SHARED_VARIABLE}={named!r} is not a folder. Set it to the folder '
        'that holds cifar10/, minilm_sts/, ..., or unset it.'
      )
    return path
  beside = pathlib.Path(__file__).resolve().parents[2].parent / 'shared/data'
  return beside if beside.is_dir() else None


def require(name: str) -> pathlib.Path:
  """Path of `name` (a file or a folder) inside the shared folder.

  Raises:
    FileNotFoundError: there is no shared folder, or it lacks `name`.
  """
  root = shared_dir()
  if root is None:
    raise FileNotFoundError(
      f'{name!r} is read from the folder of real models and data, and none was '
      f'found. Set the environment variable {SHARED_VARIABLE} to that folder, '
      'or use what is embedded (quantlab.data.digits()).'
    )
  path = root / name
  if not path.exists():
    held = ', '.join(sorted(p.name for p in root.iterdir())) or 'nothing'
    raise FileNotFoundError(
      f'{path} does not exist: {SHARED_VARIABLE} must name a folder with '
      f'{name!r} in it; found: {held}.'
    )
  return path


def cache_dir() -> pathlib.Path:
  """Where prepared sets are kept: QUANTLAB_CACHE, else the user's cache."""
  named = os.environ.get(CACHE_VARIABLE)
  if named:
    return pathlib.Path(named).expanduser()
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(base).expanduser() / 'quantlab'
