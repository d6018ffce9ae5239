"""The command line from end to end with a stand-in system on a few rendered videos."""

import functools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from ml_collections import ConfigDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import quickstart
from tests import stand_in
from vad_jax import annotations, checkpoint, describe, logs, main, models, sharding, train
from vad_jax.datasets.loader import eval_batches
from vad_jax.metrics import score

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
  """One device, as most users have, and a system that compiles in a moment."""
  monkeypatch.setitem(models.MODELS, "stand_in", stand_in.StandIn)
  one = jax.devices()[:1]
  make_mesh = sharding.make_mesh
  monkeypatch.setattr(sharding, "make_mesh", lambda shape: make_mesh(shape, one))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tmp_path_factory.mktemp("data")


@pytest.fixture
def config(root: Path) -> ConfigDict:
  config = quickstart.get_config("tiny")
  config.data.root = str(root)
  config.data.num_train, config.data.num_val = 2, 1
  config.model = ConfigDict({"name": "stand_in", "width": 8})
  return config


def run(config: ConfigDict, workdir: Path, mode: str = "train_and_evaluate") -> str:
  return main.run(config, workdir, mode, time.perf_counter())


def test_train_and_evaluate(config: ConfigDict, tmp_path: Path, capsys: Any) -> None:
  workdir = tmp_path / "runs" / "first"
  assert run(config, workdir) == ""
  numbers = json.loads((workdir / "metrics.json").read_text())
  assert {"frame_map_50", "person_ap_50", "wall_seconds", "compile_seconds", "steps_per_second", "ap"} <= set(numbers)
  assert numbers["step"] == 4
  assert 0 <= numbers["frame_map_50"] <= 1
  page = (workdir / "report.html").read_text()
  assert page.count("data:image/jpeg") >= 2
  assert "data:video/mp4" in page
  assert len(annotations.read_ava_csv(workdir / "detections.csv").action) > 0
  assert list((workdir / "videos").glob("*.mp4"))
  logged = EventAccumulator(str(workdir / "logs")).Reload()
  assert {"train/loss", "train/steps_per_second", "train/data_wait_share", "eval/frame_map_50"} <= set(
    logged.Tags()["tensors"]
  )
  assert logged.SummaryMetadata("eval/found").plugin_data.plugin_name == "images"
  assert "_hparams_/session_start_info" in logged.PluginTagToContent("hparams")
  scalars = logs.read_scalars(workdir / "logs")
  assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3, 4]
  assert scalars["eval/frame_map_50"][-1] == (4, pytest.approx(numbers["frame_map_50"]))
  assert f"report: {workdir / 'report.html'}\n" in capsys.readouterr().out
  assert checkpoint.load_model(workdir).info["clip"] == config.clip.to_dict()

  before = (workdir / "checkpoints" / "last").stat().st_mtime_ns
  assert run(config, workdir) == ""  # has come to its end: is evaluated again, and nothing is trained
  assert (workdir / "checkpoints" / "last").stat().st_mtime_ns == before
  again = json.loads((workdir / "metrics.json").read_text())
  assert again["frame_map_50"] == numbers["frame_map_50"]

  config.eval.score = "action"
  assert run(config, workdir, "evaluate") == ""

  config.batch_size, config.augment.flip = 1, 0.25
  with pytest.raises(ValueError, match=r"augment.flip \(0.5 before, 0.25 now\); batch_size \(2 before, 1 now\)"):
    run(config, workdir)


@pytest.fixture
def tube_config(config: ConfigDict) -> ConfigDict:
  config.data.tubes = True
  config.clip = ConfigDict({"num_frames": 16, "frame_stride": 1, "fps": 25.0})
  config.model.tubes = True
  config.eval.every_epochs = 0.5
  config.matcher = "scipy"  # compiles sooner
  return config


def test_tubes(tube_config: ConfigDict, tmp_path: Path, capsys: Any) -> None:
  """Training is stopped, goes on, is evaluated; the files that it leaves give the same numbers elsewhere."""
  tube_config.num_steps = 2
  assert run(tube_config, tmp_path, "train") == ""
  (tmp_path / "config.json").write_text(
    (tmp_path / "config.json").read_text().replace('"num_steps": 2', '"num_steps": 4')
  )
  tube_config.num_steps = 4
  capsys.readouterr()
  assert run(tube_config, tmp_path) == ""
  output = capsys.readouterr()
  assert "resumed from step 2" in output.err
  numbers = json.loads((tmp_path / "metrics.json").read_text())
  means = ["frame_map_50", "video_map_20", "video_map_50", "video_map_75", "video_map_50_95"]
  assert all(0 <= numbers[name] <= 1 for name in means)
  assert numbers["step"] in (2, 4) and numbers["ap"].keys() <= numbers["video_ap"].keys()
  best = checkpoint.load_model(tmp_path).info
  assert best["metrics"]["frame_map_50"] == numbers["frame_map_50"]

  (command,) = (line for line in output.out.splitlines() if "scored again by" in line)
  for protocol, arguments in (("class_query", command.split("vad_jax.evaluate ")[1].split()), ("act", None)):
    if arguments is None:
      tube_config.eval.protocol = "act"
      assert run(tube_config, tmp_path, "evaluate") == ""
      numbers = json.loads((tmp_path / "metrics.json").read_text())
      arguments = [f"--detections={tmp_path}/detections.npz", f"--ground-truth={tmp_path}/ground_truth.json"]
      arguments.append("--protocol=act")
    assert score.main([*arguments, "--json", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["protocol"] == protocol
    for name, of in zip(
      means, ["frame-mAP@0.5", *(f"video-mAP@{iou}" for iou in ("0.2", "0.5", "0.75", "0.5:0.95"))], strict=True
    ):
      assert again["summary"][of] == numbers[name]
  page = (tmp_path / "report.html").read_text()
  assert "video-mAP@0.5:0.95" in page and "data:video/mp4" in page and "bend/bow" in page


def test_tubes_ask_for_their_own_settings(tube_config: ConfigDict, tmp_path: Path) -> None:
  tube_config.eval.protocol = "slowfast"
  with pytest.raises(ValueError, match=r"config\.eval\.protocol 'slowfast': of tubes act, class_query, multisports"):
    run(tube_config, tmp_path)
  tube_config.eval.protocol, tube_config.eval.actor_threshold = "act", 0.5
  with pytest.raises(ValueError, match=r"actor_threshold and \.score_threshold are for keyframes"):
    run(tube_config, tmp_path)
  tube_config.model.tubes = False
  with pytest.raises(ValueError, match=r"config\.data\.tubes is True and config\.model\.tubes is not"):
    run(tube_config, tmp_path)
  assert not (tmp_path / "config.json").exists()


def test_train_alone_does_not_evaluate(config: ConfigDict, tmp_path: Path) -> None:
  assert run(config, tmp_path, "train") == ""
  assert not (tmp_path / "checkpoints" / "best").exists()
  assert not (tmp_path / "metrics.json").exists()


def test_starts_from_weights(config: ConfigDict, tmp_path: Path, capsys: Any) -> None:
  """A step of rate zero leaves what was loaded; another number of channels or of classes is an error."""
  assert run(config, tmp_path / "first", "train") == ""
  config.init_from = str(tmp_path / "first")
  config.schedule.learning_rate = 0.0
  config.num_steps = 1
  assert run(config, tmp_path / "second", "train") == ""
  first, second = (checkpoint.load_arrays(tmp_path / name)[0] for name in ("first", "second"))
  assert first.keys() == second.keys()
  for name, value in first.items():
    if name != "seen":  # running statistics go on
      np.testing.assert_array_equal(value, second[name])
  assert "starting from stand_in of" in capsys.readouterr().err
  assert "hidden.kernel" in (tmp_path / "second" / "init_from.txt").read_text()

  assert run(config, tmp_path / "third", "evaluate") == ""  # nothing was trained there: the weights themselves
  assert json.loads((tmp_path / "third" / "metrics.json").read_text())["step"] == 4

  config.seed += 1
  config.init_from, config.init_transformer_from = None, str(tmp_path / "first")
  assert run(config, tmp_path / "stage", "train") == ""
  staged = checkpoint.load_arrays(tmp_path / "stage")[0]
  np.testing.assert_array_equal(staged["hidden.kernel"], first["hidden.kernel"])
  assert not np.array_equal(staged["embed.kernel"], first["embed.kernel"])
  config.init_from, config.init_transformer_from = str(tmp_path / "first"), None

  config.model.width = 16
  with pytest.raises(ValueError, match=r"shape: embed.kernel \(3, 8\) does not fit embed.kernel \(3, 16\)"):
    run(config, tmp_path / "fourth", "train")
  config.init_from = str(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="nowhere"):
    run(config, tmp_path / "fifth", "train")


def test_preempted_in_the_last_evaluation(config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  assert run(config, tmp_path, "train") == ""

  def preempted(*args: Any, **kwargs: Any) -> Any:
    signal.raise_signal(signal.SIGTERM)
    return eval_batches(*args, **kwargs)

  with monkeypatch.context() as patched:
    patched.setattr(main, "eval_batches", preempted)
    assert run(config, tmp_path, "evaluate") == "preempted"
  assert not (tmp_path / "metrics.json").exists()
  assert run(config, tmp_path, "evaluate") == ""


def test_peak_of_the_devices(config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
  mesh = sharding.make_mesh({"data": 1})
  assert main._peak_steps_per_second(config, mesh) is None
  monkeypatch.setitem(train.PEAK_FLOPS, "cpu", 1e12)
  multiply_adds = describe.describe(config, training=False)["total"]["exact"]
  assert main._peak_steps_per_second(config, mesh) == pytest.approx(1e12 / (6 * multiply_adds * config.batch_size))


def test_nothing_to_evaluate(config: ConfigDict, tmp_path: Path) -> None:
  with pytest.raises(FileNotFoundError, match="holds no checkpoints to evaluate; train first"):
    run(config, tmp_path / "typo", "evaluate")
  assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("name", ["--workdir", "config.data.root"])
def test_buckets_are_to_be_mounted(config: ConfigDict, tmp_path: Path, monkeypatch: Any, name: str) -> None:
  monkeypatch.chdir(tmp_path)
  workdir = "gs://bucket/run" if name == "--workdir" else "run"
  config.data.root = "data" if name == "--workdir" else "gs://bucket/data"
  with pytest.raises(ValueError, match=f"{name} 'gs:/.*' is in a bucket: mount it"):
    run(config, Path(workdir))
  assert not list(tmp_path.iterdir())


def test_unwritable_workdir(config: ConfigDict, tmp_path: Path) -> None:
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match=r"workdir .*file/run cannot be written: Not a directory"):
    run(config, tmp_path / "file" / "run")


def test_failed_start_leaves_the_workdir_free(config: ConfigDict, tmp_path: Path) -> None:
  config.data.name = "nowhere"
  with pytest.raises(ValueError, match="unknown data set 'nowhere'; known: synthetic, "):
    run(config, tmp_path)
  config.data.name = "synthetic"
  assert run(config, tmp_path, "train") == ""


@pytest.mark.parametrize("lacking, possible, refused", [("val", "train", "evaluate"), ("train", "evaluate", "train")])
def test_a_set_of_one_split(lacking: str, possible: str, refused: str, config: ConfigDict, tmp_path: Path) -> None:
  """What the split allows works; anything else is refused with a line that says what to do."""
  directory = tmp_path / "set"
  shutil.copytree(ROOT / "data" / "sample", directory, ignore=shutil.ignore_patterns("exports"))
  config.data = ConfigDict({"name": "custom", "root": str(tmp_path), "directory": "set", "reader": "video"})
  config.num_steps = 1
  assert run(config, tmp_path / "run", "train") == ""
  (directory / "annotations" / f"{lacking}.csv").unlink()

  there = {"train": "val", "val": "train"}[lacking]
  message = f"{directory} has no {lacking} split, only {there}: prepare it with {lacking} as well "
  for mode in (refused, "train_and_evaluate"):
    with pytest.raises(ValueError, match=f"{re.escape(message)}.* or run with --mode={possible}"):
      run(config, tmp_path / "run", mode)
  assert run(config, tmp_path / "run", possible) == ""


@pytest.mark.parametrize(
  "changes, mode, info",
  [
    (
      {"resize": "stretch", "canvas": (64, 64), "eval": {"canvas": (64, 96)}},
      "train_and_evaluate",
      {"short_side": None, "canvas": [64, 96]},
    ),
    ({"canvas": ((64, 96), (96, 64))}, "train", {"short_side": 64, "canvas": [96, 96]}),
  ],
)
def test_canvases(changes: Any, mode: str, info: dict[str, Any], config: ConfigDict, tmp_path: Path) -> None:
  config.num_steps = 1
  config.augment.update({"box_jitter": 0.1, "square": True, "hue": 0.1})
  config.update(changes)
  assert run(config, tmp_path, mode) == ""
  loaded = checkpoint.load_model(tmp_path).info
  assert {key: loaded[key] for key in info} == info
  config.resize = "squeeze"
  with pytest.raises(ValueError, match=r"config\.resize 'squeeze': choose short_side or stretch"):
    run(config, tmp_path / "other", "train")


def test_given_boxes(config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  shutil.copytree(ROOT / "data" / "sample", tmp_path / "set", ignore=shutil.ignore_patterns("exports"))
  for split in ("train", "val"):
    annotations_csv = tmp_path / "set" / "annotations" / f"{split}.csv"
    rows = annotations.read_ava_csv(annotations_csv)
    proposals = rows._replace(action=np.minimum(rows.action, 1), extra=np.full(len(rows.extra), 0.9))
    annotations.write_ava_csv(annotations_csv.with_name(f"{split}_proposals.csv"), proposals)
  config.data = ConfigDict({"name": "custom", "root": str(tmp_path), "directory": "set", "reader": "video"})
  config.data.proposal_threshold = 0.8
  config.max_proposals, config.num_steps = 5, 1
  batches = []

  def spy(load: Any, *args: Any, **kwargs: Any) -> Any:
    batches.append(next(iter(load(*args, **kwargs))))
    return load(*args, **kwargs)

  for name in ("train_batches", "eval_batches"):
    monkeypatch.setattr(main, name, functools.partial(spy, getattr(main, name)))
  assert run(config, tmp_path / "run") == ""
  assert len(batches) >= 2
  assert all(batch["proposals"].shape == (2, 5, 4) and batch["proposal_mask"].any() for batch in batches)


def fails(error: BaseException) -> Any:
  def run(*_: Any) -> str:
    raise error

  return run


@pytest.mark.parametrize(
  "run, code, message",
  [
    (lambda *_: "", 0, ""),
    (lambda *_: "interrupted", 130, "interrupted: all is saved; the same command goes on from here"),
    (lambda *_: "preempted", 0, "preempted: all is saved"),
    (fails(KeyboardInterrupt()), 130, "aborted; "),
    (fails(checkpoint.CheckpointError("a\n  b")), 1, "error: a b (--v=1 shows where)"),
    (fails(train.NonFiniteError("step 3")), 1, "error: step 3"),
    (fails(OSError(28, "No space left on device")), 1, "error: [Errno 28] No space left on device"),
  ],
)
def test_exit_codes(run: Any, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
  monkeypatch.setattr(main, "run", run)
  with flagsaver.flagsaver(workdir="unused", config=str(ROOT / "configs" / "quickstart.py")):
    assert main.main(["main"]) == code
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") <= 1


@pytest.mark.parametrize(
  "args, message",
  [
    (["--config=configs/quickstart.py", "--config.batchsize=3"], 'Did you mean "batch_size"'),
    (["--config=configs/quickstart.py:small"], "config argument 'small' is not known; known: tiny"),
    (["--config=configs/quickstart.py", "--mode=trian"], "--mode=trian: value should be one of <train|"),
    (["--config=configs/quickstart.py", "--distributed"], "found no cluster; give --coordinator, --num_processes"),
    (["--config=configs/none.py"], "No such file or directory: 'configs/none.py'"),
  ],
)
def test_bad_command_lines(args: list[str], message: str, tmp_path: Path) -> None:
  command = [sys.executable, "-m", "vad_jax.main", f"--workdir={tmp_path}", *args]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert result.returncode == 1
  assert message in result.stderr
  assert result.stderr.startswith("error: ")
  assert result.stderr.count("\n") == 1
