"""Reads pickles that somebody else wrote without running any code of theirs.

A pickle is a program: it may name any function of any installed module and call it. Here it may name only the few
functions of ``_ALLOWED``, which build plain data and NumPy arrays, and none of them is the original: each checks its
arguments itself, for hostile ones to NumPy's own (a dtype whose flags lie about the objects in it) corrupt memory.
Python's unpickler in Python, not the one in C, is the base: it lets us replace the one instruction that changes
existing objects, and its memo cannot be made to allocate gigabytes by a short file.
"""

import collections
import math
import os
import pickle
import re
from collections.abc import Callable, Mapping
from typing import IO, Any, ClassVar

import numpy as np


class PickleFileError(ValueError):
  """A file that is no pickle, or a damaged one; the message names the file."""


class UnsafePickleError(PickleFileError):
  """A pickle that asks for something other than plain data; the message names the file and what it asks for."""


class StandIn(dict):
  """Takes the place of an object whose class is not loaded: its items and attributes, and nothing else.

  Attributes are items, too. What the constructor was given is the tuple under ``"args"``; a state that is no dict is
  under ``"state"``.
  """

  def __init__(self, *args: Any):
    super().__init__()
    if args:
      self["args"] = args

  def restore(self, state: Any) -> None:
    """Takes over the attributes that the pickle saved."""
    for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):  # attributes, and those in slots
      if isinstance(part, dict):
        self.update(part)
      elif part is not None:
        self["state"] = state


def load(
  source: str | os.PathLike[str] | IO[bytes],
  *,
  extra: Mapping[str, Any] | None = None,
  persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
  """Reads one pickle of any protocol. Strings of Python 2 are taken as Latin-1.

  Dicts, lists, sets, numbers, strings, ``OrderedDict``, ``defaultdict`` and NumPy arrays (not structured ones) come
  back as what they are; ``Counter`` as a dict.

  Args:
    source: a path, or a binary file that is then left behind the pickle.
    extra: more globals that the file may name, ``"module.name"`` to what it gets instead. It may call them with any
      arguments.
    persistent_load: makes an object of a persistent id (PyTorch refers to tensor storages like this).

  Raises:
    UnsafePickleError: the file names a global that is not allowed.
    PickleFileError: it is empty, truncated, damaged or no pickle.
    OSError: it cannot be opened.
  """
  if isinstance(source, str | os.PathLike):
    with open(source, "rb") as file:
      return load(file, extra=extra, persistent_load=persistent_load)
  name = getattr(source, "name", "pickle")
  try:
    return _Unpickler(source, name, extra or {}, persistent_load).load()
  except PickleFileError:
    raise
  except EOFError:
    raise PickleFileError(f"{name}: the pickle ends early: empty, truncated or damaged; get the file again") from None
  except Exception as error:  # the instructions of a damaged file fail in any way that Python objects can fail
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise PickleFileError(f"{name}: not a pickle of plain data, or a truncated or damaged one ({reason})") from None


class _Unpickler(pickle._Unpickler):
  """Resolves allowed globals only, and changes existing objects only where that is known to be safe."""

  dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
  stack: list[Any]

  def __init__(self, file: IO[bytes], name: str, extra: Mapping[str, Any], persistent_load: Callable | None):
    super().__init__(file, encoding="latin1")
    self._name = name
    self._extra = extra
    self._load_persistent = persistent_load

  def find_class(self, module: str, name: str) -> Any:
    key = f"{module}.{name}".replace("__builtin__.", "builtins.").replace("numpy._core.", "numpy.core.")
    for table in (_ALLOWED, self._extra):
      if key in table:
        return table[key]
    raise UnsafePickleError(
      f"{self._name}: refused, it asks for {f'{module}.{name}'[:100]!r}, which is not plain data and might run code. "
      "If you trust the file, open it where it was made and save only its arrays or state_dict"
    )

  def get_extension(self, code: int) -> None:
    raise UnsafePickleError(f"{self._name}: refused, it asks for the registered extension {code}")

  def persistent_load(self, pid: Any) -> Any:
    if self._load_persistent is None:
      raise PickleFileError(f"{self._name}: it refers to data outside of the pickle; a part of another format?")
    return self._load_persistent(pid)

  def load_build(self) -> None:
    state = self.stack.pop()
    target = self.stack[-1]
    if isinstance(target, np.ndarray):
      _restore_array(target, *state)
    elif isinstance(target, np.dtype):
      _restore_dtype(target, *state)
    elif isinstance(target, StandIn):
      target.restore(state)
    elif not isinstance(target, collections.OrderedDict):  # its attributes could hide its methods: left out
      raise UnsafePickleError(f"{self._name}: refused, it changes an object of type {type(target).__name__}")

  dispatch[pickle.BUILD[0]] = load_build


def _latin1(value: Any) -> bytes:
  """Bytes that were pickled as bytes, or as a string (Python 2)."""
  return value.encode("latin1") if isinstance(value, str) else _checked(value, bytes, bytearray)


def _checked(value: Any, *types: type) -> Any:
  if not isinstance(value, types):
    raise TypeError(f"{type(value).__name__} in place of {types[0].__name__}")
  return value


def _encode(text: str, encoding: str) -> bytes:
  if encoding not in ("latin1", "latin-1"):
    raise ValueError(f"encoding {encoding[:20]}")
  return text.encode("latin1")


def _dtype(code: str, *_: Any) -> np.dtype:
  if not re.fullmatch(r"[<>=|]?([?biufcO]\d{0,2}|[SUV]\d+)", code):
    raise ValueError(f"arrays of type {code[:20]!r} are not supported")
  return np.dtype(code, copy=True)  # a new one, for its byte order may be changed below


def _restore_dtype(dtype: Any, _: int, byteorder: str, *state: Any) -> None:
  if any(part is not None for part in state[:3]):
    raise ValueError("structured arrays are not supported")
  if byteorder in ("<", ">") and dtype.kind in "iufcU":
    dtype.__setstate__((3, byteorder, None, None, None, dtype.itemsize, dtype.alignment, 0))


def _restore_array(array: Any, *state: Any) -> None:
  shape, dtype, fortran, content = state[-4:]  # after a version, except in very old files
  shape = tuple(_checked(size, int) for size in shape)
  if _checked(dtype, np.dtype).hasobject:
    size, content = 1, _checked(content, list)
  else:
    size, content = dtype.itemsize, _latin1(content)
  if min(shape, default=0) < 0 or math.prod(shape) * size != len(content):
    raise ValueError(f"{len(content)} bytes or items for an array of shape {shape} and type {dtype}")
  array.__setstate__((1, shape, dtype, bool(fortran), content))


def _array_of_buffer(content: Any, dtype: np.dtype, shape: tuple, order: str, axes: Any = None) -> np.ndarray:
  # Only of bytes, which know that they are in use: an array over the memory of another array could outlive it.
  flat = np.frombuffer(_checked(content, bytes, bytearray), _checked(dtype, np.dtype))
  if order == "K" and axes:
    return flat.reshape(shape).transpose(axes)
  return flat.reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: np.dtype, content: Any = b"") -> Any:
  (value,) = np.frombuffer(_latin1(content), _checked(dtype, np.dtype))
  return value


def _defaultdict(factory: Any = None) -> collections.defaultdict:
  if factory not in (None, list, dict, int, float, _set):
    raise TypeError("unusual defaultdict")
  return collections.defaultdict(set if factory is _set else factory)


def _set(items: Any = ()) -> set:
  return set(_checked(items, list, tuple))


def _frozenset(items: Any = ()) -> frozenset:
  return frozenset(_set(items))


def _bytearray(content: Any = b"", encoding: str = "latin1") -> bytearray:
  return bytearray(_encode(content, encoding) if isinstance(content, str) else _checked(content, bytes))


def _no_bytes() -> bytes:
  return b""  # all others are pickled in another way


def _new_array(*_: Any) -> np.ndarray:
  return np.empty(0, np.int8)  # always an empty one: shape, type and content come with _restore_array


def _ndarray() -> None:
  """Stands for the class, which pickles only pass on."""


_ALLOWED: dict[str, Any] = {
  "_codecs.encode": _encode,
  "builtins.bytearray": _bytearray,
  "builtins.bytes": _no_bytes,
  "builtins.complex": complex,
  "builtins.dict": dict,
  "builtins.float": float,
  "builtins.frozenset": _frozenset,
  "builtins.int": int,
  "builtins.list": list,
  "builtins.set": _set,
  "collections.Counter": dict,
  "collections.OrderedDict": collections.OrderedDict,
  "collections.defaultdict": _defaultdict,
  "numpy.core.multiarray._reconstruct": _new_array,
  "numpy.core.multiarray.scalar": _scalar,
  "numpy.core.numeric._frombuffer": _array_of_buffer,
  "numpy.dtype": _dtype,
  "numpy.ndarray": _ndarray,
}
