import io
import os
import pickle
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vad_jax import safe_pickle
from vad_jax.safe_pickle import PickleFileError, StandIn, UnsafePickleError

PLAIN = [
  {"a": {1, 2}, "b": frozenset([1]), "c": b"", "d": b"ab", "e": bytearray(b"q"), "f": 1j, "ü": (None, True, 10**50)},
  OrderedDict(b=1, a=[2.5]),
  defaultdict(list, {1: [2]}),
  Counter("aab"),
]
ARRAYS = [
  np.arange(6, dtype=">i2").reshape(2, 3).T,
  np.ones((2, 3, 4), order="F"),
  np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
  np.zeros((0, 3), np.float16),
  np.array(5.0),
  np.array([True, False]),
  np.array([1j], np.complex64),
  np.array(["ab", "ü"]),
  np.array([b"x", b"yy"]),
  np.array([1, "a", None], object),
  np.float32(3),
  np.str_("ü"),
]


def load(content: bytes, **kwargs: Any) -> Any:
  return safe_pickle.load(io.BytesIO(content), **kwargs)


class Call:
  """Is pickled as a call of a function."""

  def __init__(self, function: Any, *arguments: Any):
    self.call = function, arguments

  def __reduce__(self) -> Any:
    return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back(protocol: int) -> None:
  assert load(pickle.dumps(PLAIN, protocol)) == PLAIN
  for array in ARRAYS:
    content = pickle.dumps(array, protocol)
    loaded = load(content)
    np.testing.assert_array_equal(loaded, array)
    assert type(loaded) is type(array) and loaded.dtype == pickle.loads(content).dtype


def test_objects_that_share_and_contain_themselves() -> None:
  shared: list = [1]
  shared.append(shared)
  loaded = load(pickle.dumps({"a": shared, "b": shared}))
  assert loaded["a"] is loaded["b"] and loaded["a"][1] is loaded["a"]


def test_pickle_of_python_2() -> None:
  values = np.array([1.5, -2], np.float32)
  content = (
    b"\x80\x02}q\x00U\x03k\xe9ycnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    b"U\x08" + values.tobytes() + b"tbsU\x01sc__builtin__\nset\n](K\x01e\x85Rs."
  )
  loaded = load(content)
  np.testing.assert_array_equal(loaded["kéy"], values)
  assert loaded["s"] == {1}


def test_file_is_left_behind_the_pickle(tmp_path: Path) -> None:
  path = tmp_path / "two"
  path.write_bytes(pickle.dumps([1], 4) + pickle.dumps("x", 2) + b"rest")
  with open(path, "rb") as file:
    assert (safe_pickle.load(file), safe_pickle.load(file), file.read()) == ([1], "x", b"rest")
  assert safe_pickle.load(path) == [1]


NAMES = (
  *("os.system", "posix.system", "nt.system", "subprocess.Popen", "builtins.eval", "builtins.exec", "__builtin__.eval"),
  *("builtins.getattr", "builtins.__import__", "importlib.import_module", "operator.attrgetter", "functools.partial"),
  *("numpy.load", "numpy.fromfile", "numpy.core.multiarray.fromfile", "pickle.loads", "vad_jax.safe_pickle.load"),
  *("collections.OrderedDict.fromkeys", "torch.load", "torch.storage._load_from_bytes", "no_such_module.name", "."),
)


@pytest.mark.parametrize("name", NAMES)
def test_other_globals_are_refused_by_name(name: str, tmp_path: Path) -> None:
  module, _, attribute = name.rpartition(".")
  old = f"c{module}\n{attribute}\n(S'x'\ntR.".encode()
  inst = f"(S'x'\ni{module}\n{attribute}\n.".encode()
  new = b"".join([b"\x80\x04", *(b"\x8c%c%b" % (len(part), part.encode()) for part in (module, attribute))]) + b"\x93."
  for number, content in enumerate((old, inst, new)):
    path = tmp_path / f"{number}.pkl"
    path.write_bytes(content)
    with pytest.raises(UnsafePickleError) as caught:
      safe_pickle.load(path)
    assert str(path) in str(caught.value) and repr(name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_does_not_run(protocol: int, tmp_path: Path) -> None:
  marker = tmp_path / "marker"
  attacks = [Call(os.system, f"touch {marker}"), Call(eval, f"open({str(marker)!r}, 'w')"), Call(getattr, "x", "upper")]
  assert pickle.loads(pickle.dumps(attacks[0], protocol)) == 0 and marker.exists()  # they do work
  marker.unlink()
  for attack in attacks:
    for value in (attack, {"weights": [attack]}, np.array([attack, None]), OrderedDict(a=(attack,))):
      with pytest.raises(UnsafePickleError):
        load(pickle.dumps(value, protocol))
  assert not marker.exists()


DTYPE = b"cnumpy\ndtype\n(S'%b'\nI00\nI01\ntR"
NEW_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
HOSTILE = {
  "attributes of a class": b"ccollections\nOrderedDict\n(N}S'items'\nI1\nstb.",
  "attributes of a function": b"c_codecs\nencode\n}S'x'\nI1\nsb.",
  "attributes of a list": b"(l}S'x'\nI1\nsb.",
  "registered extension": b"\x80\x02\x82\x01.",
  "objects hidden in a dtype": DTYPE % b"V8"
  + b"(I3\nS'|'\nN(S'f'\nt}S'f'\n("
  + DTYPE % b"O"
  + b"I0\ntsI8\nI1\nI0\ntb.",
  "bytes as objects": NEW_ARRAY + b"(I1\n(I1\nt" + DTYPE % b"O" + b"I00\nS'AAAAAAAA'\ntb.",
  "more shape than bytes": NEW_ARRAY + b"(I1\n(L1000000000000L\nt" + DTYPE % b"f4" + b"I00\nS'AAAA'\ntb.",
  "more shape than objects": NEW_ARRAY + b"(I1\n(L1000000000000L\nt" + DTYPE % b"O" + b"I00\n(ltb.",
  "negative shape": NEW_ARRAY + b"(I1\n(I-1\nI-1\nt" + DTYPE % b"i1" + b"I00\nS'A'\ntb.",
  "array on an array": b"cnumpy.core.numeric\n_frombuffer\n(" + NEW_ARRAY + DTYPE % b"i1" + b"(I0\ntS'C'\ntR.",
  "large empty array": b"cnumpy\nndarray\n((L1000000000000L\nttR.",
  "large bytearray": b"c__builtin__\nbytearray\n(L1000000000000L\ntR.",
  "large bytes": b"c__builtin__\nbytes\n(L1000000000000L\ntR.",
  "compression": b"c_codecs\nencode\n(S'x'\nS'zip'\ntR.",
  "large dtype": DTYPE % b"f4,f4" + b".",
  "factory of another kind": b"ccollections\ndefaultdict\n(c_codecs\nencode\ntR.",
  "structure of another format": b"\x80\x02K\x01Q.",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_allowed_functions_do_no_harm_either(content: bytes) -> None:
  with pytest.raises(PickleFileError):
    load(content)


def test_attributes_of_ordered_dicts_are_left_out() -> None:
  loaded = load(b"ccollections\nOrderedDict\n(tR}S'items'\nc_codecs\nencode\nsb.")
  assert loaded == {} and not vars(loaded)


def test_damaged_files(tmp_path: Path) -> None:
  content = pickle.dumps({"a": ARRAYS, "b": PLAIN}, 2)
  cuts = [content[:length] for length in range(0, len(content), 7)]
  for number, damaged in enumerate([*cuts, b"hello world", b"\x00" * 100, b"{}", b"\x80\xff."]):
    path = tmp_path / f"{number}.pkl"
    path.write_bytes(damaged)
    with pytest.raises(PickleFileError, match=rf"{number}\.pkl: [^\n]{{20,}}$"):
      safe_pickle.load(path)
  with pytest.raises(FileNotFoundError):
    safe_pickle.load(tmp_path / "none")


def test_extra_globals_and_stand_ins() -> None:
  extra = {"my.Config": StandIn, "my.size": tuple}
  made = b"cmy\nConfig\n(I1\nI2\ntR}S'lr'\nF0.5\nsb."
  assert load(made, extra=extra) == {"args": (1, 2), "lr": 0.5}
  slots = b"\x80\x02cmy\nConfig\n)\x81}U\x01aK\x01s}U\x01bK\x02s\x86b."
  assert load(slots, extra=extra) == {"a": 1, "b": 2}
  items = b"\x80\x02cmy\nConfig\n)\x81U\x01aK\x01sK\x05b."
  assert load(items, extra=extra) == {"a": 1, "state": 5}
  assert load(b"cmy\nsize\n((I1\nI2\nttR.", extra=extra) == (1, 2)
  with pytest.raises(UnsafePickleError, match=r"my\.Config"):
    load(made)


def test_persistent_ids() -> None:
  assert load(b"\x80\x02K\x07Q.", persistent_load=lambda pid: [pid]) == [7]
