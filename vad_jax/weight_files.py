"""Published weights in whatever file they come, as NumPy arrays under their published names.

What a file is, its content says, not its name: many a ``.pkl`` is really PyTorch's. Nothing of a file is ever run
(see ``safe_pickle``), and only the weights are read of a training checkpoint, not the optimizer's state beside them.
PyTorch's two formats are read here, for the package itself is gigabytes of CUDA where pip installs it on Linux.
"""

import functools
import glob
import hashlib
import io
import json
import math
import operator
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np
import safetensors
import scipy.io

from vad_jax import safe_pickle
from vad_jax.safe_pickle import StandIn


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


class _Storage(NamedTuple):
  """A block of numbers of a PyTorch file; tensors are views of it. ``start`` counts elements, for views of views."""

  key: str
  dtype: str
  start: int


class _Tensor(NamedTuple):
  """A tensor of a PyTorch file that was not read yet; offset and strides count elements."""

  storage: _Storage
  dtype: str
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

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
    prefixed = all(name.startswith("module.") for name in content.tensors)
    tensors = {name.removeprefix("module."): array for name, array in content.tensors.items()} if prefixed else None
    size = sum(file.stat().st_size for file in files)
    return WeightFile(path, content.kind, content.key, tensors or content.tensors, content.other, _sha256(files), size)
  except safe_pickle.UnsafePickleError:
    raise
  except safe_pickle.PickleFileError as error:
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
  digests = []
  for file in sorted(files):
    with open(file, "rb") as opened:
      digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
  if len(files) == 1:
    return digests[0]
  lines = (f"{digest}  {file.name}\n" for digest, file in zip(digests, sorted(files), strict=True))
  return hashlib.sha256("".join(lines).encode()).hexdigest()


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
        tensors[name] = _widened(file.get_tensor(name))
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
  try:
    variables = scipy.io.loadmat(path)
  except Exception as error:  # scipy's own reader fails in many ways on damaged files
    raise WeightFileError(f"{path}: a MATLAB file, {_AGAIN} ({error})") from None
  return _select(path, "MATLAB", {name: value for name, value in variables.items() if not name.startswith("__")})


def _tensorflow_prefix(path: Path) -> Path | None:
  """Common start of the names of a TensorFlow checkpoint's files, if the path stands for one."""
  if (path / "checkpoint").is_file():  # says which of several is the newest
    match = re.search(r'^model_checkpoint_path:\s*"([^"]+)"', (path / "checkpoint").read_text(), re.MULTILINE)
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
    tensors = {name: _widened(reader.get_tensor(name)) for name in sorted(reader.get_variable_to_shape_map())}
  except (tf.errors.OpError, ValueError, RuntimeError) as error:
    raise WeightFileError(f"{prefix}: a TensorFlow checkpoint, {_AGAIN} ({_one_line(error)})") from None
  return _select(prefix, "TensorFlow checkpoint", tensors), files


def _read_pickle(path: Path, file: IO[bytes]) -> _Content:
  """Caffe2's, or PyTorch's older format: several pickles in a row, then the storages."""
  tree = safe_pickle.load(file, extra=_TORCH)
  if not isinstance(tree, int) or tree != _LEGACY_MAGIC:
    is_caffe2 = isinstance(tree, dict) and "blobs" in tree
    return _select(path, "Caffe2 pickle" if is_caffe2 else "pickle of arrays", tree)
  if safe_pickle.load(file) != 1001:
    raise WeightFileError(f"{path}: PyTorch's older format in an unknown version; save it again with a newer PyTorch")
  safe_pickle.load(file)  # the machine that wrote it; numbers are little-endian in any case
  dtypes = {}

  def load_storage(pid: Any) -> _Storage:
    storage = _storage(pid)
    dtypes[storage.key] = storage.dtype
    return storage

  tree = safe_pickle.load(file, extra=_TORCH, persistent_load=load_storage)
  places = _storage_places(path, file, dtypes)

  def read_storage(key: str) -> bytes:
    start, length = places[key]
    file.seek(start)
    return file.read(length)

  return _select(path, "PyTorch legacy", tree, read_storage=read_storage)


def _storage_places(path: Path, file: IO[bytes], dtypes: dict[str, str]) -> dict[str, tuple[int, int]]:
  """Start and length in bytes of the storages that follow in the file, each after its number of elements."""
  end = os.fstat(file.fileno()).st_size
  places = {}
  keys = safe_pickle.load(file)
  if not isinstance(keys, list) or not all(isinstance(key, str) and key in dtypes for key in keys):
    raise WeightFileError(f"{path}: PyTorch's older format, {_AGAIN} (its list of tensors is wrong)")
  for key in keys:
    header = file.read(8)
    length = int.from_bytes(header, "little") * _numpy_type(path, f"storage {key}", dtypes[key]).itemsize
    places[key] = file.tell(), length
    if len(header) < 8 or sum(places[key]) > end:
      raise WeightFileError(f"{path}: PyTorch's older format, {_AGAIN} (it ends within the tensors)")
    file.seek(length, os.SEEK_CUR)
  return places


def _read_zip(path: Path, file: IO[bytes]) -> _Content:
  """PyTorch's format since 1.6: a pickle, and a member for each storage."""
  try:
    with zipfile.ZipFile(file) as archive:
      members = {info.filename: info for info in archive.infolist()}
      roots = [name.removesuffix("data.pkl") for name in members if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
      if not roots:
        raise WeightFileError(f"{path}: a zip archive (of {', '.join([*members][:3])}), not PyTorch's; {_EXPECTED}")
      root = roots[0]
      if f"{root}constants.pkl" in members or any(name.startswith(f"{root}code/") for name in members):
        raise WeightFileError(
          f"{path}: a TorchScript program; save only its weights: torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        )

      def read_member(name: str) -> bytes:
        info = members.get(root + name)
        if info is None:
          raise zipfile.BadZipFile(f"it lacks {name}")
        if info.compress_type != zipfile.ZIP_STORED:  # could be a small file that grows to fill the memory
          raise zipfile.BadZipFile("it is compressed, which PyTorch never does")
        if info.CRC == 0:  # PyTorch can be told to leave the checksums out
          del info.CRC
        return archive.read(info)

      pickled = io.BytesIO(read_member("data.pkl"))
      tree = safe_pickle.load(pickled, extra=_TORCH, persistent_load=_storage)
      big_endian = f"{root}byteorder" in members and read_member("byteorder") == b"big"
      return _select(path, "PyTorch zip", tree, lambda key: read_member(f"data/{key}"), big_endian)
  except safe_pickle.PickleFileError as error:
    raise type(error)(f"{path}: {error}") from None
  except (zipfile.BadZipFile, EOFError, RuntimeError) as error:
    raise WeightFileError(f"{path}: a zip archive, {_AGAIN} ({_one_line(error)})") from None


# --- From what a container holds to the weights


def _select(
  path: Path,
  kind: str,
  tree: Any,
  read_storage: Callable[[str], bytes] | None = None,
  big_endian: bool = False,
) -> _Content:
  """Finds the weights among all that was read and reads their numbers."""
  if _is_tensor(tree):
    raise WeightFileError(f"{path}: a single tensor of shape {tree.shape}; expected weights by name (a state_dict)")
  if not isinstance(tree, dict):
    raise WeightFileError(f"{path}: a {kind} of a {type(tree).__name__}; expected weights by name (a state_dict)")
  places = list(_places(tree)) or [()] * any(map(_is_tensor, tree.values()))
  if not places:
    names = ", ".join(str(name)[:40] for name in list(tree)[:8]) or "nothing"
    raise WeightFileError(f"{path}: a {kind} without weights (it holds {names})")
  level, other = tree, {}
  for name in (*places[0], None):
    other |= {key: value for key, value in level.items() if key != name and not _holds_tensors(value)}
    level = level[name] if name else level
  if places[1:]:
    other["also"] = [".".join(place) for place in places[1:]]
  weights = {name: value for name, value in level.items() if isinstance(name, str) and _is_tensor(value)}
  return _Content(kind, ".".join(places[0]), _arrays(path, weights, read_storage, big_endian), other)


def _places(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
  """Keys that lead to weights, best first."""

  def inside(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    nested = [name for name in names if isinstance(tree.get(name), dict)] if len(path) < 2 else []
    return [place for name in nested for place in _places(tree[name], (*path, name))]

  yield from inside(_WEIGHT_KEYS) or [path] * any(map(_is_weight, tree.values()))
  yield from inside(_AVERAGE_KEYS)


def _is_tensor(value: Any) -> bool:
  return isinstance(value, _Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc")


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


def _arrays(
  path: Path, weights: dict[str, Any], read_storage: Callable[[str], bytes] | None, big_endian: bool
) -> dict[str, np.ndarray]:
  """Reads the storages of the tensors, each once. Tensors are views of them, unless that kept much more in memory."""
  wanted = Counter()
  for tensor in {value for value in weights.values() if isinstance(value, _Tensor)}:
    wanted[tensor.storage.key] += math.prod(tensor.shape)

  @functools.cache
  def elements_of(key: str, dtype: np.dtype) -> np.ndarray:
    assert read_storage
    elements = np.frombuffer(read_storage(key), dtype)
    return _widened(elements.byteswap() if big_endian else elements)

  @functools.cache
  def array_of(tensor: _Tensor) -> np.ndarray:
    elements = elements_of(tensor.storage.key, np.dtype(tensor.dtype))
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if min((tensor.offset, *tensor.shape, *tensor.strides)) < 0 or (0 not in tensor.shape and last >= elements.size):
      raise ValueError(f"shape {tensor.shape} does not fit {elements.size} numbers")
    strides = [stride * elements.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(elements[tensor.offset :], tensor.shape, strides)
    return view.copy() if 2 * wanted[tensor.storage.key] < elements.size else view

  arrays = {}
  for name, value in weights.items():
    if isinstance(value, _Tensor):
      _numpy_type(path, name, value.dtype)
    try:
      arrays[name] = array_of(value) if isinstance(value, _Tensor) else value
    except ValueError as error:
      raise WeightFileError(f"{path}: tensor {name!r} is {_AGAIN} ({error})") from None
  return arrays


def _numpy_type(path: Path, name: str, dtype: str) -> np.dtype:
  try:
    return np.dtype(dtype)
  except TypeError:
    raise WeightFileError(f"{path}: {name!r} is a {dtype} tensor, which is not supported; save it as float32") from None


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:200]


def _widened(array: Any) -> np.ndarray:
  """Types that NumPy itself does not know (bfloat16, 8 bits) to float32, which holds all their values."""
  array = np.asarray(array)
  return array.astype(np.float32) if array.dtype.kind == "V" else array


# --- What the pickles of PyTorch name


def _storage(pid: Any) -> _Storage:
  tag, dtype, key, _, _, *view = pid
  if tag != "storage" or not isinstance(key, str) or not isinstance(dtype, str):
    raise ValueError("an unknown persistent id")
  start = operator.index(view[0][1]) if view and view[0] else 0
  return _Storage(key, dtype, start)


def _tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any, dtype: str | None = None) -> _Tensor:
  if not isinstance(storage, _Storage):
    raise TypeError("a tensor without storage")
  shape, strides = (tuple(map(operator.index, sizes)) for sizes in (shape, strides))
  return _Tensor(storage, dtype or storage.dtype, storage.start + operator.index(offset), shape, strides)


def _tensor_v2(*arguments: Any) -> _Tensor:
  flags = arguments[6:]  # complex numbers that are yet to be conjugated or negated
  return _tensor(*arguments[:6], dtype="lazily conjugated" if any(flags) else None)


def _tensor_v3(*arguments: Any) -> _Tensor:
  return _tensor(*arguments[:6], dtype=str(arguments[6]))


def _parameter(data: Any, *_: Any) -> Any:
  return data


def _subclass(build: Callable, _: Any, arguments: tuple, *__: Any) -> Any:
  return build(*arguments)


def _unsupported(kind: str) -> Callable[..., _Tensor]:
  """An error only if the tensor is among the weights."""
  return lambda *_: _Tensor(_Storage("", kind, 0), kind, 0, (0,), (1,))


_STORAGE_TYPES = {
  **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"},
  **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"},
  **{"ComplexFloat": "complex64", "ComplexDouble": "complex128"},
  **{"QInt8": "quantised", "QUInt8": "quantised", "QInt32": "quantised"},
}
_DTYPES = (
  *_STORAGE_TYPES.values(),
  *("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"),
)
# Classes of the config, path and log objects that published checkpoints carry beside their weights. Only their
# items and attributes are kept, so nothing has to be installed to read them, and nothing of theirs is run.
_COMPANIONS = (
  "argparse.Namespace",
  "addict.addict.Dict",
  "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
  "deepspeed.runtime.fp16.loss_scaler.LossScaler",
  "detectron2.config.config.CfgNode",
  "easydict.EasyDict",
  "fvcore.common.config.CfgNode",
  "lightning_fabric.utilities.data.AttributeDict",
  "mmcv.utils.config.Config",
  "mmcv.utils.config.ConfigDict",
  "mmengine.config.config.Config",
  "mmengine.config.config.ConfigDict",
  "mmengine.logging.history_buffer.HistoryBuffer",
  "omegaconf.base.ContainerMetadata",
  "omegaconf.base.Metadata",
  "omegaconf.dictconfig.DictConfig",
  "omegaconf.listconfig.ListConfig",
  *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "String")),
  *(f"pathlib.{kind}Path" for kind in ("Posix", "Windows", "PurePosix", "PureWindows")),
  *(f"pathlib._local.{kind}Path" for kind in ("Posix", "Windows", "PurePosix", "PureWindows")),
  "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
  "pytorch_lightning.utilities.parsing.AttributeDict",
  "torch.device",
  "typing.Any",
  "yacs.config.CfgNode",
)
_TORCH: dict[str, Any] = {
  **dict.fromkeys(_COMPANIONS, StandIn),
  **{f"torch.{name}Storage": dtype for name, dtype in _STORAGE_TYPES.items()},
  **{f"torch.{dtype}": dtype for dtype in _DTYPES},
  "torch.Size": tuple,
  "torch.Tensor": _parameter,
  "torch._tensor._rebuild_from_type_v2": _subclass,
  "torch._utils._rebuild_device_tensor_from_numpy": _parameter,
  "torch._utils._rebuild_meta_tensor_no_storage": _unsupported("value-less (meta)"),
  "torch._utils._rebuild_parameter": _parameter,
  "torch._utils._rebuild_parameter_with_state": _parameter,
  "torch._utils._rebuild_qtensor": _unsupported("quantised"),
  "torch._utils._rebuild_sparse_tensor": _unsupported("sparse"),
  "torch._utils._rebuild_tensor": _tensor,
  "torch._utils._rebuild_tensor_v2": _tensor_v2,
  "torch._utils._rebuild_tensor_v3": _tensor_v3,
  "torch.nn.parameter.Buffer": _parameter,
  "torch.nn.parameter.Parameter": _parameter,
  "torch.per_channel_affine": "per_channel_affine",
  "torch.per_tensor_affine": "per_tensor_affine",
  "torch.serialization._get_layout": _parameter,
  "torch.storage.UntypedStorage": "uint8",
  "torch.storage._UntypedStorage": "uint8",
}
