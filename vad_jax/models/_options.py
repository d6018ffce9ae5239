"""What constructors of all systems do with options that are words."""

from collections.abc import Iterable
from typing import Any


def check_options(**options: tuple[Any, Iterable[Any]]) -> None:
  """Checks options, each given as its value and those that it may have.

  Raises:
    ValueError: one has another value.
  """
  for name, (value, allowed) in options.items():
    if value not in (allowed := tuple(allowed)):
      raise ValueError(f"{name} {value!r}: choose one of {', '.join(map(str, allowed))}")
