import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import scipy.io

from vad_jax import weight_files
from vad_jax.safe_pickle import UnsafePickleError
from vad_jax.weight_files import WeightFileError

GOLDEN = Path(__file__).parent / "golden/weight_files"
WEIGHTS = {"b.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([0.5, -1])}


def expected(file: str) -> dict[str, np.ndarray]:
  with np.load(GOLDEN / "expected.npz") as arrays:
    return {name.split("/")[1]: arrays[name] for name in arrays if name.startswith(f"{file}/")}


def assert_same(tensors: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
  assert list(tensors) == list(wanted)
  for name, value in wanted.items():
    np.testing.assert_array_equal(tensors[name], value, strict=True)


def error_of(path: Path) -> str:
  with pytest.raises(WeightFileError) as caught:
    weight_files.read(path)
  assert "\n" not in str(caught.value) and str(path) in str(caught.value)
  return str(caught.value)


# --- PyTorch


@pytest.mark.parametrize("suffix", ["", "_legacy"])
@pytest.mark.parametrize("name", ["plain", "kinds"])
def test_tensors_of_pytorch(name: str, suffix: str) -> None:
  file = weight_files.read(GOLDEN / f"{name}{suffix}.pth")
  assert_same(file.tensors, expected(name))
  assert (file.kind, file.key, file.other) == ("PyTorch legacy" if suffix else "PyTorch zip", "", {})
  content = file.path.read_bytes()
  assert (file.sha256, file.size) == (hashlib.sha256(content).hexdigest(), len(content))


def test_types_without_typed_storage() -> None:
  assert_same(weight_files.read(GOLDEN / "kinds_new.pth").tensors, expected("kinds_new"))


def test_tied_tensors_are_one_array_and_slices_do_not_keep_their_storage() -> None:
  tensors = weight_files.read(GOLDEN / "plain.pth").tensors
  assert tensors["head.weight"] is tensors["head.tied"]
  assert tensors["slice_of_large"].base is None


@pytest.mark.parametrize("suffix", ["", "_legacy"])
@pytest.mark.parametrize(
  ("name", "key"),
  [
    *((name, name) for name in ("model_state", "model", "module", "state_dict")),
    ("nested", "state_dict.model"),
    ("average", "ema"),
  ],
)
def test_containers(name: str, key: str, suffix: str) -> None:
  file = weight_files.read(GOLDEN / f"{name}{suffix}.pth")
  assert file.key == key
  assert_same(file.tensors, expected("state"))
  if name == "nested":
    assert file.other == {"epoch": 3, "best": 0.5}
  elif name != "average":
    beside = {
      **{
        "epoch": 12,
        "args": {"lr": 0.1, "depth": [1, 2]},
        "path": {"args": ("a", "b")},
        "cfg": "MODEL:\n  DEPTH: 2\n",
      },
      **{"size": (1, 2), "device": {"args": ("cpu",)}, "dtype": "bfloat16", "score": 0.5},
    }
    assert {name: file.other[name] for name in beside} == beside
    assert file.other["lr_scheduler"]["milestones"] == {1: 1, 2: 1}
    assert not {"optimizer", "rng_state", "model_ema"} & file.other.keys()
    assert file.other.get("also") == (["model_ema"] if name == "model" else None)


def test_checksums_may_be_left_out() -> None:
  assert_same(weight_files.read(GOLDEN / "no_checksums.pth").tensors, expected("state"))


def rewritten(source: Path, target: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> Path:
  """The zip file with the content of each member replaced by ``change(name, content)``; None leaves it out."""
  with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
    for name in old.namelist():
      content = change(name.partition("/")[2], old.read(name))
      if content is not None:
        new.writestr(f"archive/{name.partition('/')[2]}", content)
  return target


def test_big_endian(tmp_path: Path) -> None:
  def swap(name: str, content: bytes) -> bytes:
    if name.startswith("data/"):
      return np.frombuffer(content, np.float32).byteswap().tobytes()
    return b"big" if name == "byteorder" else content

  os.makedirs(tmp_path / "renamed")
  path = rewritten(GOLDEN / "nested.pth", tmp_path / "renamed/x.pkl", swap)
  assert_same(weight_files.read(path).tensors, expected("state"))


def test_only_the_weights_are_read(tmp_path: Path) -> None:
  """The storages of the optimizer are missing here."""

  def drop(name: str, content: bytes) -> bytes | None:
    return None if name.startswith("data/") and name not in ("data/0", "data/1") else content

  path = rewritten(GOLDEN / "module.pth", tmp_path / "x.pth", drop)
  assert path.stat().st_size < (GOLDEN / "module.pth").stat().st_size
  assert_same(weight_files.read(path).tensors, expected("state"))


class Fake:
  """Pickled as a call of a function of PyTorch, which is not installed."""

  def __init__(self, function: Any, *arguments: Any):
    self.call = function, arguments

  def __reduce__(self) -> Any:
    return self.call


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
  """Names that files of PyTorch refer to."""
  made = types.SimpleNamespace()
  names = {
    **{"torch": ["FloatStorage"], "torch.nn": [], "torch.nn.parameter": ["Parameter"]},
    "torch._utils": ["_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter_with_state"],
    **{"torch._tensor": ["_rebuild_from_type_v2"], "yacs": [], "yacs.config": ["CfgNode"]},
  }
  for module, attributes in names.items():
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    for name in attributes:
      setattr(made, name, type(name, (dict,), {"__module__": module}))
      setattr(sys.modules[module], name, getattr(made, name))
  return made


class Pickler(pickle.Pickler):
  def persistent_id(self, obj: Any) -> Any:
    return obj.pid if isinstance(obj, Block) else None


class Block:
  def __init__(self, *pid: Any):
    self.pid = pid


def legacy(path: Path, tree: Any, storages: dict[str, np.ndarray]) -> Path:
  with open(path, "wb") as file:
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, tree, list(storages)):
      Pickler(file, 2).dump(value)
    for storage in storages.values():
      file.write(struct.pack("<Q", storage.size) + storage.tobytes())
  return path


def test_very_old_files(tmp_path: Path, torch: types.SimpleNamespace) -> None:
  """Views of storages, tensors without gradient flags, and tensors that carry attributes."""
  values = np.arange(10, dtype=np.float32)
  whole = Block("storage", torch.FloatStorage, "17", "cpu", 10, None)
  part = Block("storage", torch.FloatStorage, "17", "cuda:0", 10, ("18", 4, 6))
  arguments = (part, 1, (2, 2), (2, 1), False, OrderedDict())
  tree = {
    "whole": Fake(torch._rebuild_tensor, whole, 0, (10,), (1,)),
    "part": Fake(torch._rebuild_tensor_v2, *arguments),
    "marked": Fake(torch._rebuild_from_type_v2, torch._rebuild_tensor_v2, torch.Parameter, arguments, {"mark": 1}),
    "state": Fake(torch._rebuild_parameter_with_state, Fake(torch._rebuild_tensor_v2, *arguments), True, None, {}),
  }
  tensors = weight_files.read(legacy(tmp_path / "x", tree, {"17": values})).tensors
  part_values = values[5:9].reshape(2, 2)
  assert_same(tensors, {"whole": values, "part": part_values, "marked": part_values, "state": part_values})


def test_config_objects_become_dicts(tmp_path: Path, torch: types.SimpleNamespace) -> None:
  config = torch.CfgNode(DEPTH=2)
  config.__dict__["frozen"] = True
  tensor = Fake(torch._rebuild_tensor, Block("storage", torch.FloatStorage, "0", "cpu", 1), 0, (1,), (1,))
  path = legacy(tmp_path / "x", {"net": {"a": tensor}, "cfg": config}, {"0": np.ones(1, np.float32)})
  assert weight_files.read(path).other == {"cfg": {"DEPTH": 2, "frozen": True}}


def test_tensors_beyond_their_storage(tmp_path: Path, torch: types.SimpleNamespace) -> None:
  block = Block("storage", torch.FloatStorage, "0", "cpu", 4)
  for arguments in ((1, (4,), (1,)), (-1, (1,), (1,)), (0, (2, 2), (3, 1)), (3, (2,), (-1,)), (0, (2**62,), (2**62,))):
    tree = {"a.weight": Fake(torch._rebuild_tensor, block, *arguments)}
    path = legacy(tmp_path / "x", tree, {"0": np.ones(4, np.float32)})
    assert "'a.weight' is truncated or damaged" in error_of(path)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("bare_tensor", "one tensor of shape"),
    ("no_tensors", "without weights (it holds epoch)"),
    ("quantised", "'weight' is quantised"),
    ("sparse", "'weight' is sparse"),
    ("torchscript", "TorchScript program; save only its weights"),
  ],
)
def test_other_files_of_pytorch(name: str, message: str) -> None:
  assert message in error_of(GOLDEN / f"{name}.pth")


def test_whole_models_are_refused() -> None:
  with pytest.raises(UnsafePickleError, match=r"whole_model\.pth: .*torch\.nn\.modules\.linear\.Linear"):
    weight_files.read(GOLDEN / "whole_model.pth")


@pytest.mark.parametrize("name", ["plain.pth", "plain_legacy.pth", "kinds.pth"])
def test_truncated_files_of_pytorch(name: str, tmp_path: Path) -> None:
  content = (GOLDEN / name).read_bytes()
  for length in range(1, len(content), 61):
    path = tmp_path / "cut.pth"
    path.write_bytes(content[:length])
    assert any(word in error_of(path) for word in ("damaged", "unknown kind", "a text file", "refused"))


def test_damaged_storage(tmp_path: Path) -> None:
  content = bytearray((GOLDEN / "nested.pth").read_bytes())
  storage = expected("state")["weight"].tobytes()
  content[content.index(storage)] ^= 1
  path = tmp_path / "x.pth"
  path.write_bytes(content)
  assert "'weight' is truncated or damaged; get the file again (Bad CRC-32" in error_of(path)


def test_compressed_and_incomplete_zip_files(tmp_path: Path) -> None:
  path = rewritten(GOLDEN / "nested.pth", tmp_path / "x", lambda _, content: content, zipfile.ZIP_DEFLATED)
  assert "compressed" in error_of(path)
  path = rewritten(GOLDEN / "nested.pth", tmp_path / "x", lambda name, content: content * (name != "data/1") or None)
  assert "'bias' is truncated or damaged; get the file again (it lacks data/1)" in error_of(path)


# --- Files that attack


class Attack:
  def __init__(self, marker: Path):
    self.marker = marker

  def __reduce__(self) -> Any:
    return os.system, (f"touch {self.marker}",)


def test_code_in_weight_files_does_not_run(tmp_path: Path) -> None:
  marker = tmp_path / "marker"
  attack = Attack(marker)
  bad = pickle.dumps({"epoch": [attack]}, 2)
  files = [tmp_path / name for name in ("zip.pth", "legacy.pth", "magic.pth", "keys.pth", "caffe2.pkl", "text.pkl")]
  rewritten(GOLDEN / "nested.pth", files[0], lambda name, content: bad if name == "data.pkl" else content)
  legacy(files[1], {"state_dict": attack}, {})
  files[2].write_bytes(pickle.dumps(attack, 2))
  legacy(files[3], {}, {})
  files[3].write_bytes(files[3].read_bytes()[: -len(pickle.dumps([], 2))] + pickle.dumps([attack], 2))
  files[4].write_bytes(pickle.dumps({"blobs": {"conv1_w": np.array([attack])}}, 2))
  files[5].write_bytes(pickle.dumps({"blobs": attack}, 0))
  for path in files:
    with pytest.raises(UnsafePickleError, match=rf"{path.name}: .*'(posix|nt)\.system'"):
      weight_files.read(path)
  assert not marker.exists()
  assert pickle.loads(bad) and marker.exists()  # it would have worked


# --- Other formats


def test_safetensors(tmp_path: Path) -> None:
  weights = WEIGHTS | {"half": np.ones(2, np.float16), "brain": np.array([1.5, -2], ml_dtypes.bfloat16)}
  path = tmp_path / "weights.bin"
  safetensors.numpy.save_file(weights, path, {"format": "pt"})
  file = weight_files.read(path)
  assert (file.kind, file.key, file.other) == ("safetensors", "", {"format": "pt"})
  with safetensors.safe_open(path, "np") as opened:
    order = opened.offset_keys()
  wanted = weights | {"brain": np.array([1.5, -2], np.float32)}
  assert_same(file.tensors, {name: wanted[name] for name in order})
  content = path.read_bytes()
  for length in (9, 20, 100, len(content) - 1):
    path.write_bytes(content[:length])
    assert "safetensors file, truncated or damaged" in error_of(path)
  header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
  path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
  assert "'x' is of type F8_E4M3" in error_of(path)


def test_hugging_face_folders(tmp_path: Path) -> None:
  single = tmp_path / "single"
  os.makedirs(single)
  safetensors.numpy.save_file(WEIGHTS, single / "model.safetensors")
  (single / "config.json").write_text("{}")
  file = weight_files.read(single)
  assert file.tensors.keys() == WEIGHTS.keys() and file.path == single
  assert file.sha256 == hashlib.sha256((single / "model.safetensors").read_bytes()).hexdigest()

  old = tmp_path / "old"
  os.makedirs(old)
  shutil.copy(GOLDEN / "nested.pth", old / "pytorch_model.bin")
  assert_same(weight_files.read(old).tensors, expected("state"))

  sharded = tmp_path / "sharded"
  os.makedirs(sharded)
  shutil.copy(GOLDEN / "plain.pth", sharded / "a.bin")
  shutil.copy(GOLDEN / "no_checksums.pth", sharded / "b.bin")
  wanted = expected("plain") | expected("state")
  places = {name: "a.bin" if name in expected("plain") else "b.bin" for name in wanted}
  index = sharded / "pytorch_model.bin.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
  file = weight_files.read(sharded)
  assert_same(file.tensors, wanted)
  assert file.kind == "PyTorch zip, 2 files" and file.size == sum(path.stat().st_size for path in sharded.iterdir())
  shell = "LC_ALL=C; export LC_ALL; sha256sum * | sha256sum"
  assert file.sha256 == subprocess.check_output(shell, shell=True, cwd=sharded, text=True).split()[0]

  index.write_text(json.dumps({"weight_map": {**places, "more.weight": "b.bin"}}))
  assert "1 tensors are in none of its files, 'more.weight' for one" in error_of(index.parent)
  index.write_text(json.dumps({"weight_map": {"x": "../../c.bin"}}))
  assert f"{sharded / 'c.bin'}: No such file" in error_of(index.parent)
  index.write_text("[]")
  assert "not an index" in error_of(index.parent)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_caffe2_pickles(protocol: int, tmp_path: Path) -> None:
  blobs = {"conv1_w": np.ones((2, 3), np.float32), "conv1_w_momentum": np.zeros((2, 3), np.float32), "lr": np.ones(1)}
  path = tmp_path / "model.pyth"
  path.write_bytes(pickle.dumps({"cfg": "TRAIN: {}", "blobs": {**blobs, "note": "x"}}, protocol))
  file = weight_files.read(path)
  assert (file.kind, file.key, file.other) == ("Caffe2 pickle", "blobs", {"cfg": "TRAIN: {}", "note": "x"})
  assert_same(file.tensors, blobs)


def test_pickles_that_hold_something_else(tmp_path: Path) -> None:
  path = tmp_path / "x.pkl"
  path.write_bytes(pickle.dumps({"gttubes": {"video": [1]}}))
  assert "without weights (it holds gttubes)" in error_of(path)
  path.write_bytes(pickle.dumps(WEIGHTS))
  assert_same(weight_files.read(path).tensors, WEIGHTS)
  path.write_bytes(pickle.dumps([WEIGHTS]))
  assert "one list" in error_of(path)
  path.write_bytes(pickle.dumps(WEIGHTS)[:-30])
  assert "truncated" in error_of(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_matlab(compressed: bool, tmp_path: Path) -> None:
  path = tmp_path / "csn.mat"
  values = {
    "conv1_w": np.arange(24, dtype=np.float32).reshape(1, 2, 3, 2, 2),
    "conv1_spatbn_relu_s": np.ones((1, 3)),
    "b": np.array([[True, False]]),
    "counts": np.array([[1, 60000]], np.uint16),
    "empty": np.zeros((0, 3)),
  }
  others = {"name": "text", "config": {"x": np.ones(2)}, "cell": np.array([1, "a"], object), "i": np.array([[1j]])}
  scipy.io.savemat(path, values | others, do_compression=compressed)
  file = weight_files.read(path)
  assert_same(file.tensors, values | {"b": np.array([[1, 0]], np.uint8)})
  assert file.kind == "MATLAB"
  content = path.read_bytes()
  for length in range(200, len(content), 97):
    path.write_bytes(content[:length])
    assert "a MATLAB file, truncated or damaged" in error_of(path)
  random = np.random.default_rng(0)
  for _ in range(300):  # a damaged one may still be readable
    damaged = bytearray(content)
    for place in random.integers(128, len(content), 3):
      damaged[place] = random.integers(256)
    path.write_bytes(damaged)
    try:
      weight_files.read(path)
    except WeightFileError as error:
      assert "\n" not in str(error)


def test_matlab_numbers_of_a_smaller_type_and_other_byte_order(tmp_path: Path) -> None:
  """MATLAB saves doubles that are whole numbers as bytes."""
  for order, mark in (("<", b"IM"), (">", b"MI")):
    name = struct.pack(f"{order}I", 1 << 16 | 1) + b"w\0\0\0"
    body = struct.pack(f"{order}IIIIIIii", 6, 8, 6, 0, 5, 8, 1, 2) + name
    body += struct.pack(f"{order}I", 2 << 16 | 2) + b"\x07\xff\0\0"
    content = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1" + mark + struct.pack(f"{order}II", 14, len(body)) + body
    (tmp_path / "x.mat").write_bytes(content)
    assert_same(weight_files.read(tmp_path / "x.mat").tensors, {"w": np.array([[7.0, 255.0]])})


def test_tensorflow_checkpoint(tmp_path: Path) -> None:
  import tensorflow as tf  # takes seconds

  prefix = tmp_path / "model.ckpt-20"
  values = {
    "RGB/inception_i3d/Conv3d_1a_7x7/conv_3d/w": np.ones((1, 1, 1, 3, 2), np.float32),
    "RGB/inception_i3d/Conv3d_1a_7x7/batch_norm/moving_mean": np.arange(2, dtype=np.float32),
    "global_step": np.int64(7),
    "brain": np.array([1.5], ml_dtypes.bfloat16),
    "text": np.array(b"x", object),
  }
  tf.raw_ops.SaveV2(
    prefix=str(prefix), tensor_names=[*values], shape_and_slices=[""] * len(values), tensors=[*values.values()]
  )
  (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/home/me/model.ckpt-20"\n')
  wanted = {name: values[name] for name in sorted(values) if name != "text"}
  wanted |= {"brain": np.array([1.5], np.float32), "global_step": np.array(7)}
  index, data = Path(f"{prefix}.index"), Path(f"{prefix}.data-00000-of-00001")
  digests = set()
  for path in (prefix, index, data, tmp_path):
    file = weight_files.read(path)
    assert (file.kind, file.key, file.path) == ("TensorFlow checkpoint", "", path)
    assert_same(file.tensors, wanted)
    assert file.size == index.stat().st_size + data.stat().st_size
    digests.add(file.sha256)
  lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in (data, index))
  assert digests == {hashlib.sha256("".join(lines).encode()).hexdigest()}

  data.write_bytes(data.read_bytes()[:-5])
  assert "TensorFlow checkpoint, truncated or damaged" in error_of(prefix)
  index.write_bytes(b"hello")
  assert "TensorFlow checkpoint, truncated or damaged" in error_of(prefix)
  data.unlink()
  assert "needs its files" in error_of(prefix)


# --- Files without weights


def test_files_without_weights(tmp_path: Path) -> None:
  archive = io.BytesIO()
  with tarfile.open(fileobj=archive, mode="w") as tar:
    tar.add(GOLDEN / "nested.pth", "nested.pth")
  arrays = io.BytesIO()
  np.savez(arrays, **{"conv": np.ones(2)})
  cases = {
    b"": "an empty file",
    b"<!DOCTYPE html>\n<html>": "a web page: the download did not work",
    b"\n <html lang='en'>": "a web page",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n": "git lfs pull",
    b"epoch,loss\n1,2\n" * 999: "a text file that begins 'epoch,loss 1,2",
    "Grüße".encode(): "a text file that begins 'Grüße'",
    gzip.compress(b"weights"): "a gzip file; unpack it first",
    archive.getvalue(): "a tar archive; unpack it, or if PyTorch before 0.1.10",
    arrays.getvalue(): "a zip archive that PyTorch did not write (it holds conv.npy)",
    b"\xff\xd8\xff\xe0" + bytes(99): "a JPEG image",
    b"\x89PNG\r\n\x1a\n" + bytes(99): "a PNG image",
    b"\0\0\0\x18ftypmp42" + bytes(99): "an MP4 video",
    b"MATLAB 7.3 MAT-file, Platform".ljust(600): "save it with save(..., '-v7')",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b"\x01\x02\x03\x04\x05\x06\x07\x08\x09": "an unknown kind (its first bytes are 01 02 03 04 05 06 07 08)",
  }
  path = tmp_path / "weights.pth"
  for content, message in cases.items():
    path.write_bytes(content)
    assert message in error_of(path)
  assert "a folder without weights (it holds weights.pth)" in error_of(tmp_path)
  assert "No such file" in error_of(tmp_path / "none.pth")
