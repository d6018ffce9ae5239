"""Published weights in whatever file they come, as NumPy arrays under their published names.

What a file is, its content says, not its name: many a ``.pkl`` is really PyTorch's. Nothing of a file is ever run
(see ``safe_pickle``), and only the weights are read of a training checkpoint, not the optimizer's state beside them.
"""

import glob
import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import safetensors

from vad_jax import safe_pickle, torch_files
from vad_jax.torch_files import Tensor


class WeightFileError(ValueError):
  """A file that no weights can be read from; the message says what it looks like and what to do."""


class WeightFile(NamedTuple):
  """The weights of one published file or folder.

  Attributes:
    path: as given.
    kind: what the file is, for people: ``"PyTorch zip"``, ``"safetensors"``...
    key: where in the file the weights were found, ``"model_state"`` or ``"state_dict.model"``; empty for the top level.
    tensors: published name to array, in file order. bfloat16 is widened to float32 (exactly), all else keeps its type.
      Names lose the prefix ``module.`` where all have it. Tied tensors may share memory, so do not write to them.
    other: what else is beside the weights and holds no tensors: epoch, config text... ``other["also"]`` lists the
      keys of further weights in the file (such as moving averages) that were not taken.
    sha256: of the file, in hex. Of a folder's or a TensorFlow checkpoint's files, sorted by name, it is what
      ``sha256sum FILES | sha256sum`` prints.
    size: bytes of all files that were read.
  """

  path: Path
  kind: str
  key: str
  tensors: dict[str, np.ndarray]
  other: dict[str, Any]
  sha256: str
  size: int


class _Content(NamedTuple):
  kind: str
  key: str
  tensors: dict[str, np.ndarray]
  other: dict[str, Any]


_MATLAB_MATRIX, _MATLAB_COMPRESSED = 14, 15
_MATLAB_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATLAB_CLASSES = dict(zip(range(6, 16), ("f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"), strict=True))

# Where weights are in a checkpoint, in order of preference, and where moving averages of them are.
_WEIGHT_KEYS = ("model_state", "model", "module", "state_dict", "model_state_dict", "net", "blobs")
_AVERAGE_KEYS = ("ema", "model_ema", "ema_model", "ema_state", "ema_state_dict", "state_dict_ema", "module_ema")

_FOLDER_FILES = (
  ("model.safetensors", "model.safetensors.index.json"),
  ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_EXPECTED = "expected weights of PyTorch, safetensors, Caffe2 (.pkl), MATLAB (.mat) or TensorFlow"
_AGAIN = "truncated or damaged; get the file again"

_SIGNATURES = (
  (0, b"\x1f\x8b", "a gzip file; unpack it first"),
  (0, b"BZh", "a bzip2 file; unpack it first"),
  (0, b"\xfd7zXZ", "an xz file; unpack it first"),
  (0, b"7z\xbc\xaf", "a 7-Zip archive; unpack it first"),
  (0, b"Rar!", "a RAR archive; unpack it first"),
  (257, b"ustar", "a tar archive; unpack it, or if PyTorch before 0.1.10 wrote it, save it again with a newer one"),
  (0, b"\x89HDF", "an HDF5 file (Keras?); save its arrays as safetensors"),
  (0, b"MATLAB 7.3", "a MATLAB v7.3 (HDF5) file; load it in MATLAB and save it with save(..., '-v7')"),
  (0, b"\x93NUMPY", "a single NumPy array"),
  (0, b"%PDF", "a PDF document"),
  (0, b"\xff\xd8\xff", "a JPEG image"),
  (0, b"\x89PNG", "a PNG image"),
  (0, b"GIF8", "a GIF image"),
  (8, b"WEBP", "a WebP image"),
  (8, b"AVI ", "an AVI video"),
  (4, b"ftyp", "an MP4 video"),
  (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
  (0, b"version https://git-lfs", "a Git LFS pointer instead of the file it stands for; run `git lfs pull`"),
)


def read(path: str | os.PathLike[str]) -> WeightFile:
  """Reads the weights of a file, a Hugging Face folder or a TensorFlow checkpoint.

  Args:
    path: a file of PyTorch (zip or older), safetensors, Caffe2 (``.pkl``), MATLAB (``.mat``, v5 to v7); a folder with
      ``model.safetensors`` or ``pytorch_model.bin``, sharded or not; a TensorFlow checkpoint's prefix, one of its
      files or its folder.

  Raises:
    WeightFileError: there are no weights, or they cannot be read.
    safe_pickle.UnsafePickleError: the file asks to run code.
  """
  path = Path(path)
  try:
    content, files = _read_path(path)
    kind, key, tensors, other = content
    if all(name.startswith("module.") for name in tensors):  # wrapped for training on several devices
      tensors = {name.removeprefix("module."): array for name, array in tensors.items()}
    size = sum(file.stat().st_size for file in files)
    return WeightFile(path, kind, key, tensors, other, _sha256(files), size)
  except safe_pickle.UnsafePickleError:
    raise
  except (safe_pickle.PickleFileError, torch_files.TorchFileError) as error:
    raise WeightFileError(str(error)) from None
  except OSError as error:
    raise WeightFileError(f"{error.filename or path}: {error.strerror or error}") from None


def _read_path(path: Path) -> tuple[_Content, list[Path]]:
  """Content and the files that it comes from."""
  prefix = _tensorflow_prefix(path)
  if prefix:
    return _read_tensorflow(prefix)
  if not path.is_dir():
    return _read_file(path), [path]
  for single, index in _FOLDER_FILES:
    if (path / single).is_file():
      return _read_file(path / single), [path / single]
    if (path / index).is_file():
      return _read_shards(path / index)
  names = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
  known = ", ".join(name for names in _FOLDER_FILES for name in names)
  raise WeightFileError(f"{path}: a folder without weights (it holds {names}); expected one of {known}, checkpoint")


def _sha256(files: list[Path]) -> str:
  digests = {}
  for file in sorted(files):
    with open(file, "rb") as opened:
      digests[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
  if len(digests) == 1:
    return digests.popitem()[1]
  return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()).hexdigest()


def _read_file(path: Path) -> _Content:
  with open(path, "rb") as file:
    head = file.read(4096)
    file.seek(0)
    if not head:
      raise WeightFileError(f"{path}: an empty file; get it again")
    if head.startswith(b"PK\x03\x04"):
      return _read_zip(path, file)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27:
      return _read_safetensors(path)
    if head.startswith(b"MATLAB 5.0"):
      return _read_matlab(path)
    if head[0] == 0x80 or re.match(rb"\(dp?\d*\n|}q|c[\w.]+\n\w+\n", head):  # binary and older pickles
      return _read_pickle(path, file)
  raise WeightFileError(f"{path}: {_describe(head)}; {_EXPECTED}")


def _describe(head: bytes) -> str:
  """What a file that holds no weights looks like, by its first bytes."""
  for offset, signature, meaning in _SIGNATURES:
    if head.startswith(signature, offset):
      return meaning
  if re.match(rb"\s*<(!doctype|html|head|\?xml|!--)", head, re.IGNORECASE):
    return "a web page: the download did not work"
  text = head.decode("utf-8", "replace")
  if text.count("\ufffd") <= 1 and not re.search(r"[\x00-\x08\x0e-\x1f]", text):  # one may be cut in two
    return f"a text file that begins {' '.join(text.split())[:40]!r}"
  return f"a file of an unknown kind (its first bytes are {head[:8].hex(' ')})"


# --- Containers


def _read_safetensors(path: Path) -> _Content:
  tensors = {}
  try:
    with safetensors.safe_open(path, framework="np") as file:
      for name in file.offset_keys():
        kind = file.get_slice(name).get_dtype()
        if re.match(r"F[468](_|$)", kind):
          raise WeightFileError(f"{path}: {name!r} is of type {kind}, which is not supported; save it as float32")
        tensors[name] = torch_files.widened(file.get_tensor(name))
      return _select(path, "safetensors", tensors)._replace(other=file.metadata() or {})
  except safetensors.SafetensorError as error:
    raise WeightFileError(f"{path}: a safetensors file, {_AGAIN} ({error})") from None


def _read_shards(index: Path) -> tuple[_Content, list[Path]]:
  """A Hugging Face folder whose tensors are spread over several files."""
  try:
    places = json.loads(index.read_text())["weight_map"]
    names = sorted({Path(name).name for name in places.values()})
  except (ValueError, KeyError, TypeError, AttributeError):
    raise WeightFileError(f"{index}: not an index of weights; expected JSON with `weight_map`") from None
  files = [index.parent / name for name in names]  # in this folder, whatever the index says
  parts = [_read_file(file) for file in files]
  tensors = {name: array for part in parts for name, array in part.tensors.items()}
  missing = [name for name in places if name not in tensors]
  if missing:
    raise WeightFileError(f"{index}: {len(missing)} tensors are in none of its files, {missing[0]!r} for one")
  return _Content(f"{parts[0].kind}, {len(files)} files", "", tensors, {}), [index, *files]


def _read_matlab(path: Path) -> _Content:
  data = memoryview(path.read_bytes())
  order = ">" if data[126:128] == b"MI" else "<"
  try:
    return _select(path, "MATLAB", dict(_matlab_arrays(data[128:], order)))
  except WeightFileError:
    raise
  except (ValueError, LookupError, RuntimeError, struct.error, zlib.error) as error:
    raise WeightFileError(f"{path}: a MATLAB file, {_AGAIN} ({_one_line(error)})") from None


def _matlab_arrays(data: memoryview, order: str) -> Iterator[tuple[str, np.ndarray]]:
  """Names and values of the numeric variables. (SciPy's reader crashes the interpreter on some damaged files.)"""
  for kind, content in _matlab_elements(data, order):
    if kind == _MATLAB_COMPRESSED:
      yield from _matlab_arrays(memoryview(zlib.decompress(content)), order)
    elif kind == _MATLAB_MATRIX:
      (_, flags), (_, shape), (_, name), *parts = _matlab_elements(content, order)
      dtype = _MATLAB_CLASSES.get(int(np.frombuffer(flags, f"{order}u4")[0]) & 0xFF)
      if dtype and len(parts) == 1:  # others are strings, structures, complex...
        kind, numbers = parts[0]  # may be of a smaller type than the variable
        array = np.frombuffer(numbers, order + _MATLAB_TYPES[kind]).astype(dtype, copy=False)
        yield bytes(name).decode("latin1"), array.reshape(np.frombuffer(shape, f"{order}i4"), order="F")


def _matlab_elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
  """Types and contents of the elements that lie one after the other."""
  while data:
    kind, size = struct.unpack_from(f"{order}II", data)
    start = 8
    if kind >> 16:  # a small element: size and type share the first word, the second is the content
      kind, size, start = kind & 0xFFFF, kind >> 16, 4
    if start + size > len(data):
      raise ValueError("it ends early")
    yield kind, data[start : start + size]
    data = data[start + size if kind == _MATLAB_COMPRESSED else -(-(start + size) // 8) * 8 :]


def _tensorflow_prefix(path: Path) -> Path | None:
  """Common start of the names of a TensorFlow checkpoint's files, if the path stands for one."""
  if (path / "checkpoint").is_file():  # says which of several is the newest
    match = re.search(
      r'^model_checkpoint_path:\s*"([^"]+)"', (path / "checkpoint").read_text(errors="replace"), re.MULTILINE
    )
    if not match:
      raise WeightFileError(f"{path / 'checkpoint'}: names no checkpoint; give the path of its .index file")
    return path / re.split(r"[\\/]", match[1])[-1]
  prefix = re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", path.name)
  is_part = prefix != path.name
  return path.with_name(prefix) if is_part or (Path(f"{path}.index").is_file() and not path.is_file()) else None


def _read_tensorflow(prefix: Path) -> tuple[_Content, list[Path]]:
  files = [Path(f"{prefix}.index"), *prefix.parent.glob(f"{glob.escape(prefix.name)}.data-?????-of-?????")]
  if not files[0].is_file() or len(files) == 1:
    raise WeightFileError(f"{prefix}: a TensorFlow checkpoint needs its files .index and .data-00000-of-00001")
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  import tensorflow as tf  # takes seconds

  try:
    reader = tf.train.load_checkpoint(str(prefix))
    tensors = {
      name: torch_files.widened(reader.get_tensor(name)) for name in sorted(reader.get_variable_to_shape_map())
    }
  except (tf.errors.OpError, ValueError, LookupError, RuntimeError) as error:
    raise WeightFileError(f"{prefix}: a TensorFlow checkpoint, {_AGAIN} ({_one_line(error)})") from None
  return _select(prefix, "TensorFlow checkpoint", tensors), files


def _read_pickle(path: Path, file: IO[bytes]) -> _Content:
  tree = safe_pickle.load(file, extra=torch_files.GLOBALS)
  if torch_files.begins_legacy(tree):
    torch_file = torch_files.read_legacy(file)
    return _select(path, "PyTorch legacy", torch_file.tree, torch_file.read)
  return _select(path, "Caffe2 pickle" if isinstance(tree, dict) and "blobs" in tree else "pickle", tree)


def _read_zip(path: Path, file: IO[bytes]) -> _Content:
  torch_file = torch_files.read_zip(file)
  return _select(path, "PyTorch zip", torch_file.tree, torch_file.read)


# --- From what a container holds to the weights


def _select(
  path: Path, kind: str, tree: Any, read_tensors: Callable[[dict[str, Tensor]], dict[str, np.ndarray]] | None = None
) -> _Content:
  """Finds the weights among all that was read and reads their numbers."""
  if _is_tensor(tree):
    raise WeightFileError(
      f"{path}: {kind}, but of one tensor of shape {tree.shape}; expected weights by name (a state_dict)"
    )
  if not isinstance(tree, dict):
    raise WeightFileError(f"{path}: {kind}, but of one {type(tree).__name__}; expected weights by name (a state_dict)")
  places = _places(tree)
  if not places and not any(map(_is_tensor, tree.values())):
    names = ", ".join(str(name)[:40] for name in list(tree)[:8]) or "nothing"
    raise WeightFileError(f"{path}: {kind}, but without weights (it holds {names})")
  place, *others = places or [()]
  level, other = tree, {}
  for name in (*place, None):
    other |= {key: value for key, value in level.items() if key != name and not _holds_tensors(value)}
    level = level[name] if name else level
  if others:
    other["also"] = [".".join(further) for further in others]
  weights = {name: value for name, value in level.items() if isinstance(name, str) and _is_tensor(value)}
  if read_tensors:
    weights |= read_tensors({name: value for name, value in weights.items() if isinstance(value, Tensor)})
  return _Content(kind, ".".join(place), weights, other)


def _places(tree: dict, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
  """Keys that lead to weights, best first."""

  def inside(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    nested = [name for name in names if isinstance(tree.get(name), dict)] if len(path) < 2 else []
    return [place for name in nested for place in _places(tree[name], (*path, name))]

  nested = inside(_WEIGHT_KEYS)
  if not nested and any(map(_is_weight, tree.values())):
    nested = [path]
  return nested + inside(_AVERAGE_KEYS)


def _is_tensor(value: Any) -> bool:
  return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc")


def _is_weight(value: Any) -> bool:
  """Random states and counters are tensors, but no weights."""
  return _is_tensor(value) and len(value.shape) > 0 and not re.match("bool|u?int", str(value.dtype))


def _holds_tensors(value: Any) -> bool:
  """Whether a tensor is anywhere in it. Every object is visited once, for they may contain one another."""
  pending, seen = [value], set()
  while pending:
    value = pending.pop()
    if _is_tensor(value):
      return True
    if isinstance(value, dict | list | tuple | set | frozenset) and id(value) not in seen:
      seen.add(id(value))
      pending.extend(value.values() if isinstance(value, dict) else value)
  return False


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:200]
