"""The command line that makes sets: stopped, repeated, misused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import numbered_video
from vad_jax import datasets
from vad_jax.datasets import prepare
from vad_jax.datasets.loader import ClipSpec
from vad_jax.datasets.records import ArrayRecordWriter, RecordFrames

NAMES = [f"v{index}" for index in range(6)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Six 15-minute cuts, of 40 s each."""
  folder = tmp_path_factory.mktemp("ava")
  whole = numbered_video.write(folder / "v0.mp4", 400, size=(96, 160)).read_bytes()
  for name in NAMES[1:]:
    (folder / f"{name}.mp4").write_bytes(whole)
  for split, names in (("train", NAMES[:-1]), ("val", NAMES[-1:])):
    rows = [f"{name},{time},0.1,0.2,0.5,0.9,12,0\n" for name in names for time in range(902, 939)]
    (folder / f"ava_{split}_v2.2.csv").write_text("".join(rows))
  return folder


def command(source: Path, output: Path) -> list[str]:
  return ["ava", "--source", str(source), "--output", str(output), "--workers", "1"]


def files(folder: Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records_of(output: Path) -> list[tuple]:
  """All records; their files may differ, as a protocol buffer has no order of its fields."""
  frames = RecordFrames(output / "records" / "train")
  count = sum(map(len, frames._seconds.values()))
  return [(record["video"], list(record["times"]), record["frames"]) for record in map(frames._read, range(count))]


def records_part(output: Path) -> Path:
  return output / "records" / ".train.part"


def test_killed_at_any_time_it_goes_on_to_the_same_set(source, tmp_path):
  prepare.main(command(source, tmp_path / "whole"))
  process = subprocess.Popen(
    [sys.executable, "-m", "vad_jax.datasets.prepare", *command(source, tmp_path / "set")],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  try:
    deadline = time.monotonic() + 60
    while len(list(records_part(tmp_path / "set").glob("*contents.json"))) < 2:
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.005)
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert not (tmp_path / "set" / "dataset.json").exists() and not (tmp_path / "set" / "records" / "train").exists()
  with pytest.raises(FileNotFoundError, match="has not been prepared here"):
    datasets.load("ava", tmp_path / "set")
  finished = {
    name.name.removesuffix(".contents.json") for name in records_part(tmp_path / "set").glob("*contents.json")
  }
  written = {name: (records_part(tmp_path / "set") / name).stat().st_mtime_ns for name in finished}
  prepare.main(command(source, tmp_path / "set"))
  one, two = files(tmp_path / "set"), files(tmp_path / "whole")
  assert one.keys() == two.keys()
  assert all(one[name] == two[name] for name in one if ".array_record-" not in name)
  assert records_of(tmp_path / "set") == records_of(tmp_path / "whole")
  for name, written_at in written.items():
    assert (tmp_path / "set" / "records" / "train" / name).stat().st_mtime_ns == written_at


def test_repeated_it_encodes_nothing(source, tmp_path, monkeypatch, capsys):
  prepare.main(command(source, tmp_path / "ava"))
  before = files(tmp_path)
  monkeypatch.setattr("vad_jax.datasets.records._write_file", lambda *_: pytest.fail("encodes again"))
  prepare.main(command(source, tmp_path / "ava"))
  assert files(tmp_path) == before
  assert "train.csv: 185 rows of 185 keyframes" in capsys.readouterr().out
  dataset = datasets.load("ava", tmp_path, clip=ClipSpec(3, 10, 10))["val"]
  assert numbered_video.numbers(dataset[10]["video"]) == [110, 120, 130]


def test_a_full_disk_is_told_and_nothing_is_lost(source, tmp_path, monkeypatch):
  def full(*_) -> None:
    raise RuntimeError(f"write() failed: {os.strerror(28)}; writing x")  # as the writer says it

  class FullAfterTwo(ArrayRecordWriter):
    count = 0

    def __init__(self, *arguments):
      super().__init__(*arguments)
      FullAfterTwo.count += 1
      if FullAfterTwo.count > 2:
        self.write = full

  with monkeypatch.context() as patch:
    patch.setattr("vad_jax.datasets.records.ArrayRecordWriter", FullAfterTwo)
    with pytest.raises(SystemExit, match=r"error: .*\.train\.part: the disk is full; make room, and the same"):
      prepare.main(command(source, tmp_path / "set"))
  assert len(list(records_part(tmp_path / "set").glob("*contents.json"))) == 2
  prepare.main(command(source, tmp_path / "set"))
  assert (tmp_path / "set" / "dataset.json").exists()


def test_frames_can_be_shrunk(source, tmp_path):
  prepare.main([*command(source, tmp_path / "set"), "--short-side", "48", "--quality", "80"])
  example = datasets.open_directory(tmp_path / "set", clip=ClipSpec(1, 1, 25))["val"][0]
  assert example["video"].shape == (1, 48, 80, 3) and numbered_video.numbers(example["video"]) == [20]
  settings = json.loads((tmp_path / "set" / "dataset.json").read_text())
  assert (settings["kind"], settings["short_side"], settings["quality"]) == ("ava", 48, 80)


def test_a_rendered_set_is_made_with_its_records(tmp_path):
  size = ["--size", "64x48", "--seconds", "2", "--num-train", "1", "--num-val", "1", "--workers", "1"]
  prepare.main(["synthetic", "--output", str(tmp_path / "set"), *size])
  assert (tmp_path / "set" / "records" / "val" / "index.json").exists()
  assert len(datasets.open_directory(tmp_path / "set", clip=ClipSpec(2, 1))["train"]) == 1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["ava", "--source", "{tmp}/none", "--output", "{tmp}/set"], "error: {tmp}/none: no such folder"),
    (["ava", "--source", "{tmp}", "--output", "{tmp}"], "error: {tmp}: is the source as well"),
    (["ava", "--source", "{tmp}", "--output", "{tmp}/jhmdb"], "error: {tmp}/jhmdb: holds another set (jhmdb)"),
    (["ava", "--source", "{tmp}", "--output", "{tmp}/other"], "error: {tmp}/other: has annotations/ of something else"),
    (["ava", "--source", "{tmp}", "--output", "{tmp}/set"], "error: {tmp}: no ava_train_v2.2.csv or ava_val_v2.2.csv"),
    (["ava", "--source", "{tmp}", "--output", "{tmp}/set", "--quality", "101"], 2),
    (["ava", "--source", "{tmp}", "--output", "{tmp}/set", "--workers", "none"], 2),
    (["avaa"], 2),
    ([], 2),
  ],
)
def test_misuse_is_explained(tmp_path, capsys, arguments, message):
  (tmp_path / "jhmdb").mkdir()
  (tmp_path / "other" / "annotations").mkdir(parents=True)
  (tmp_path / "jhmdb" / "dataset.json").write_text('{"kind": "jhmdb"}')
  with pytest.raises(SystemExit) as stop:
    prepare.main([word.format(tmp=tmp_path) for word in arguments])
  if message == 2:
    assert stop.value.code == 2 and "usage:" in capsys.readouterr().err
  else:
    assert str(stop.value.code).startswith(message.format(tmp=tmp_path))
