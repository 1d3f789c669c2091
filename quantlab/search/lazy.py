"""Names whose module needs packages that not every user has."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def attributes(
  package: str, modules: Mapping[str, str], extra: str
) -> Callable[[str], Any]:
  """The `__getattr__` of a package whose names are imported when asked for.

  The package stays light to import, and is there without those packages.

  Args:
    package: its name.
    modules: of each name, the module that has it.
    extra: of quantlab's installation, which brings what they need.
  """

  def find(name: str) -> Any:
    if name not in modules:
      raise AttributeError(f'module {package!r} has no attribute {name!r}')
    try:
      return getattr(importlib.import_module(modules[name]), name)
    except ModuleNotFoundError as error:
      raise ImportError(
        f'{package}.{name} needs {error.name}, which is not installed: pip '
        f"install 'quantlab[{extra}]'"
      ) from error

  return find
