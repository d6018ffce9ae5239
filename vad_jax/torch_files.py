"""PyTorch's two file formats, without PyTorch, which is gigabytes of CUDA where pip installs it on Linux.

Both are a pickle that describes the tensors, and the storages: blocks of numbers that the tensors are views of. The
pickle is read at once and without running code of the file, a storage only when a tensor of it is asked for: the
optimizer's state, twice the size of the weights, stays in the file.
"""

import functools
import io
import math
import operator
import os
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple

import ml_dtypes  # noqa: F401  (makes bfloat16 known to NumPy)
import numpy as np

from vad_jax import safe_pickle
from vad_jax.safe_pickle import StandIn

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_DAMAGE = (zipfile.BadZipFile, struct.error, EOFError, OSError, RuntimeError, ValueError)  # what it makes zipfile raise
_AGAIN = "truncated or damaged; get the file again"


class TorchFileError(ValueError):
  """A file of PyTorch that cannot be read; the message names it."""


class Storage(NamedTuple):
  """A block of numbers. ``start`` counts elements; older files know parts of storages."""

  key: str
  dtype: str
  start: int = 0


class Tensor(NamedTuple):
  """A tensor that was not read yet: a view of a storage. Offset and strides count elements."""

  storage: Storage
  dtype: str
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class TorchFile(NamedTuple):
  """What a file holds.

  Attributes:
    name: of the file, for messages.
    tree: what was saved, with ``Tensor`` in place of tensors.
    read_storage: bytes of a storage, by key. The file must still be open.
    big_endian: byte order of the storages.
  """

  name: str
  tree: Any
  read_storage: Callable[[str], bytes]
  big_endian: bool = False

  def read(self, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Numbers of some of the tensors. Each storage is read once, and the same tensor is the same array.

    bfloat16 is widened to float32. Arrays are read-only views of the storages, unless that kept much in memory that is
    not asked for.

    Raises:
      TorchFileError: a tensor is damaged, or of a kind that is not supported (sparse, quantised).
    """
    wanted = Counter()
    for tensor in set(tensors.values()):
      wanted[tensor.storage.key] += math.prod(tensor.shape)

    @functools.cache
    def elements_of(key: str, dtype: np.dtype) -> np.ndarray:
      elements = np.frombuffer(self.read_storage(key), dtype)
      return widened(elements.byteswap() if self.big_endian else elements)

    @functools.cache
    def array_of(tensor: Tensor) -> np.ndarray:
      _, _, offset, shape, strides = tensor
      elements = elements_of(tensor.storage.key, np.dtype(tensor.dtype))
      last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
      if min((offset, *shape, *strides)) < 0 or (0 not in shape and last >= elements.size):
        raise ValueError(f"shape {shape} does not fit {elements.size} numbers")
      steps = [stride * elements.itemsize for stride in strides]
      view = np.lib.stride_tricks.as_strided(elements[offset:], shape, steps, writeable=False)
      return view.copy() if 2 * wanted[tensor.storage.key] < elements.size else view

    arrays = {}
    for name, tensor in tensors.items():
      _itemsize(self.name, name, tensor.dtype)
      try:
        arrays[name] = array_of(tensor)
      except _DAMAGE as error:
        raise TorchFileError(f"{self.name}: tensor {name!r} is {_AGAIN} ({error})") from None
    return arrays


def widened(array: Any) -> np.ndarray:
  """Types that NumPy itself lacks (bfloat16, 8-bit floats) as float32, which holds all their values."""
  array = np.asarray(array)
  return array.astype(np.float32) if array.dtype.kind == "V" else array


def read_zip(file: IO[bytes]) -> TorchFile:
  """The format since PyTorch 1.6: a zip archive of a pickle and the storages.

  Raises:
    TorchFileError: it is damaged, or another kind of zip archive.
    safe_pickle.PickleFileError: its pickle is damaged or asks to run code.
  """
  try:
    archive = zipfile.ZipFile(file)
  except _DAMAGE as error:
    raise TorchFileError(f"{file.name}: a zip archive, {_AGAIN} ({error})") from None
  members = {info.filename: info for info in archive.infolist()}
  roots = [name.removesuffix("data.pkl") for name in members if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
  if not roots:
    names = ", ".join([*members][:3]) or "nothing"
    raise TorchFileError(f"{file.name}: a zip archive that PyTorch did not write (it holds {names})")
  root = roots[0]
  if f"{root}constants.pkl" in members or any(name.startswith(f"{root}code/") for name in members):
    raise TorchFileError(
      f"{file.name}: a TorchScript program; save only its weights: torch.save(torch.jit.load(FILE).state_dict(), NEW)"
    )

  def read_member(name: str) -> bytes:
    info = members.get(root + name)
    if info is None:
      raise zipfile.BadZipFile(f"it lacks {name}")
    if info.compress_type != zipfile.ZIP_STORED:  # a small file could fill the memory
      raise zipfile.BadZipFile("it is compressed, which PyTorch never does")
    if info.CRC == 0:  # PyTorch can be told to leave checksums out
      del info.CRC
    return archive.read(info)

  try:
    pickled = io.BytesIO(read_member("data.pkl"))
    big_endian = f"{root}byteorder" in members and read_member("byteorder") == b"big"
  except _DAMAGE as error:
    raise TorchFileError(f"{file.name}: a zip archive, {_AGAIN} ({error})") from None
  try:
    tree = safe_pickle.load(pickled, extra=GLOBALS, persistent_load=_storage)
  except safe_pickle.PickleFileError as error:
    raise type(error)(f"{file.name}: {error}") from None
  return TorchFile(file.name, tree, lambda key: read_member(f"data/{key}"), big_endian)


def begins_legacy(first: Any) -> bool:
  """Whether the first of a file's pickles is the one that the format before PyTorch 1.6 begins with."""
  return isinstance(first, int) and first == _LEGACY_MAGIC


def read_legacy(file: IO[bytes]) -> TorchFile:
  """The format before PyTorch 1.6, after the first pickle: more pickles in a row, then the storages.

  Raises:
    TorchFileError: it is damaged.
    safe_pickle.PickleFileError: a pickle is damaged or asks to run code.
  """
  if safe_pickle.load(file) != _LEGACY_VERSION:
    raise TorchFileError(f"{file.name}: an unknown version of PyTorch's older format; save it with a newer PyTorch")
  safe_pickle.load(file)  # the machine that wrote it; numbers are little-endian in any case
  dtypes = {}

  def load_storage(pid: Any) -> Storage:
    storage = _storage(pid)
    dtypes[storage.key] = storage.dtype
    return storage

  tree = safe_pickle.load(file, extra=GLOBALS, persistent_load=load_storage)
  places = _storage_places(file, dtypes)

  def read_storage(key: str) -> bytes:
    start, length = places[key]
    file.seek(start)
    return file.read(length)

  return TorchFile(file.name, tree, read_storage)


def _storage_places(file: IO[bytes], dtypes: dict[str, str]) -> dict[str, tuple[int, int]]:
  """Start and length in bytes of the storages that follow in the file, each after its number of elements."""
  keys = safe_pickle.load(file)
  if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(dtypes):
    raise TorchFileError(f"{file.name}: PyTorch's older format, {_AGAIN} (its list of storages is wrong)")
  end = os.fstat(file.fileno()).st_size
  places = {}
  for key in keys:
    header = file.read(8)
    length = int.from_bytes(header, "little") * _itemsize(file.name, f"storage {key}", dtypes[key])
    places[key] = file.tell(), length
    if len(header) < 8 or sum(places[key]) > end:
      raise TorchFileError(f"{file.name}: PyTorch's older format, {_AGAIN} (it ends within the tensors)")
    file.seek(length, os.SEEK_CUR)
  return places


def _itemsize(file: str, tensor: str, dtype: str) -> int:
  if dtype not in _DTYPES:
    raise TorchFileError(f"{file}: {tensor!r} is {dtype[:40]}, which is not supported; save it as plain float32")
  return np.dtype(dtype).itemsize


# --- What the pickles name


def _storage(pid: Any) -> Storage:
  tag, dtype, key, _, _, *view = pid
  if tag != "storage" or not isinstance(key, str) or not isinstance(dtype, str):
    raise ValueError("an unknown persistent id")
  start = operator.index(view[0][1]) if view and view[0] else 0
  return Storage(key, dtype, start)


def _tensor(storage: Storage, offset: int, shape: Any, strides: Any, *_: Any, dtype: str | None = None) -> Tensor:
  if not isinstance(storage, Storage) or not isinstance(dtype, str | None):
    raise TypeError("not a tensor")
  shape, strides = (tuple(map(operator.index, sizes)) for sizes in (shape, strides))
  return Tensor(storage, dtype or storage.dtype, storage.start + operator.index(offset), shape, strides)


def _tensor_v2(*arguments: Any) -> Tensor:
  flags = arguments[6:]  # complex numbers that are yet to be conjugated or negated
  return _tensor(*arguments[:6], dtype="lazily conjugated" if any(flags) else None)


def _tensor_v3(*arguments: Any) -> Tensor:
  return _tensor(*arguments[:6], dtype=arguments[6])


def _parameter(data: Any, *_: Any) -> Any:
  return data


def _subclass(build: Callable, _: Any, arguments: tuple, *__: Any) -> Any:
  return build(*arguments)


def _unsupported(kind: str) -> Callable[..., Tensor]:
  """An error only if the tensor is among the weights."""
  return lambda *_: Tensor(Storage("", kind), kind, 0, (0,), (1,))


_STORAGE_TYPES = {
  **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"},
  **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"},
  **{"ComplexFloat": "complex64", "ComplexDouble": "complex128"},
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
GLOBALS: dict[str, Any] = {
  **dict.fromkeys(_COMPANIONS, StandIn),
  **{f"torch.{name}Storage": dtype for name, dtype in _STORAGE_TYPES.items()},
  **dict.fromkeys(("torch.QInt8Storage", "torch.QUInt8Storage", "torch.QInt32Storage"), "quantised"),
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
