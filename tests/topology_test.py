"""What a training step takes of a slice: of real chips where libtpu is installed, else of eight virtual CPU devices."""

import functools
import importlib.util
import json
from typing import Any

import jax
import pytest

from configs import common
from tests import stand_in
from vad_jax import describe, models, topology, train

WITH_TPUS = importlib.util.find_spec("libtpu") is not None
tpu_devices = topology.tpu_devices
DEVICES = functools.cache(tpu_devices if WITH_TPUS else lambda name: jax.devices())
SLICE = "v5e:2x4"
PARAMETERS = 256 * 256 + 3 * 256 + 2 * 256 + (256 + 1) * (4 + 1 + 80)  # of the stand-in

HLO = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%body (carry.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %carry.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %get-tuple-element.2 = f32[8,4]{1,0:T(8,128)S(1)} get-tuple-element(%carry.1), index=1
  %all-reduce.1 = f32[8,4]{1,0:T(8,128)} all-reduce(%get-tuple-element.2), channel_id=1, to_apply=%sum
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) tuple(%get-tuple-element.2, %all-reduce.1)
}

%condition (carry.2: (s32[], f32[8,4])) -> pred[] {
  %constant.14 = s32[]{:T(128)} constant(5)
  %carry.2 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %get-tuple-element.15 = s32[]{:T(128)} get-tuple-element(%carry.2), index=0
  ROOT %lt.0 = pred[]{:T(512)} compare(%get-tuple-element.15, %constant.14), direction=LT
}

%until_done (carry.3: (s32[], f32[8,4])) -> pred[] {
  %carry.3 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %get-tuple-element.16 = f32[8,4]{1,0} get-tuple-element(%carry.3), index=1
  ROOT %any = pred[] custom-call(%get-tuple-element.16), custom_call_target="any"
}

%async (x: bf16[16,4]) -> bf16[4,4] {
  %x = bf16[16,4]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = bf16[4,4]{1,0} reduce-scatter(%x), dimensions={0}, to_apply=%sum
}

%unused (x.2: f32[2]) -> f32[2] {
  %x.2 = f32[2]{0} parameter(0)
  ROOT %all-reduce.9 = f32[2]{0} all-reduce(%x.2), to_apply=%sum
}

ENTRY %main (p: f32[8,4], q: bf16[16,4]) -> f32[32,4] {
  %p = f32[8,4]{1,0:T(8,128)} parameter(0), sharding={replicated}
  %q = bf16[16,4]{1,0:T(8,128)(2,1)} parameter(1)
  %tuple.2 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) tuple(%p, %p)
  %while.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) while(%tuple.2), condition=%condition, body=%body
  %while.2 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) while(%while.1), condition=%until_done, body=%body
  %async-start = ((bf16[16,4]{1,0}), bf16[4,4]{1,0}, u32[]) async-start(%q), calls=%async
  %async-done = bf16[4,4]{1,0} async-done(%async-start)
  %both = (f32[8,4]{1,0}, pred[3]{0}, /*index=2*/s32[]) all-reduce(%p, %flags, /*index=2*/%count), to_apply=%sum
  %all-gather-start.1 = (f32[8,4]{1,0:T(8,128)}, f32[32,4]{1,0:T(8,128)}) all-gather-start(%p), dimensions={0}
  ROOT %all-gather-done.1 = f32[32,4]{1,0:T(8,128)} all-gather-done(%all-gather-start.1)
}
"""


@pytest.fixture(autouse=True)
def _chips(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(topology, "tpu_devices", DEVICES)
  monkeypatch.setitem(models.MODELS, "stand_in", stand_in.StandIn)


def config(**changes: Any) -> common.Config:
  """Of the stand-in, two clips on each of eight chips."""
  result = common.base()
  result.model.name = "stand_in"
  result.canvas, result.clip.num_frames, result.batch_size = ((32, 32), (32, 64)), 2, 16
  result.update(changes)
  return result


@functools.cache
def described(**changes: Any) -> dict[str, Any]:
  return describe.on_tpus(config(**changes), SLICE, minutes=0)


def test_memory_and_flops_are_those_of_the_step() -> None:
  found = described()
  memory = found["memory"]
  assert 12 * PARAMETERS < memory["arguments"] < 1.1 * 12 * PARAMETERS  # and two moments of AdamW
  assert memory["total"] == memory["arguments"] + memory["temporaries"] + memory["program"]
  assert memory["capacity"] == 15.75 * 2**30
  rows = 16 * 4  # quarters of clips
  forward = 2 * rows * (3 * 256 + 256 * 256 + 256 * 85)
  assert found["flops"] == 3 * forward - 2 * rows * 3 * 256  # nobody wants the gradient of the video
  assert found["input"] == [2, 32, 64]  # the largest canvas
  assert (found["chips"], found["clips_at_once"], found["topology"]) == (8, 2, SLICE)


def test_gradients_are_all_that_chips_tell_each_other() -> None:
  found = described()["collectives"]
  assert list(found) == ["all-reduce"]
  assert 4 * PARAMETERS <= found["all-reduce"]["bytes"] < 4.1 * PARAMETERS


def test_sharded_parameters_are_gathered() -> None:
  mesh = {"data": 1, "fsdp": -1}
  whole, split = described(), describe.on_tpus(config(sharding="fsdp", mesh=mesh), SLICE, minutes=0)
  assert split["memory"]["arguments"] < whole["memory"]["arguments"]
  assert split["collectives"]["all-gather"]["bytes"] >= 4 * 256 * 256


def test_microbatches_take_turns() -> None:
  found = described(microbatch=1)
  assert (found["clips_at_once"], found["batch_size"]) == (1, 16)
  assert found["flops"] == described()["flops"]


def test_step_is_that_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
  """And layers choose as on the chips that it is compiled for."""
  seen = []

  def make_train_step(*arguments: Any, **options: Any) -> Any:
    seen.append((jax.default_backend(), options))
    return train.make_train_step(*arguments, **options)

  monkeypatch.setattr(topology, "make_train_step", make_train_step)
  monkeypatch.setattr(jax, "default_backend", lambda: "elsewhere")
  options = {"seed": 3, "matcher": "device", "microbatch": 1, "ema_decay": 0.9}
  found = describe.on_tpus(config(**options), SLICE, minutes=0)
  assert seen == [("tpu" if WITH_TPUS else "cpu", {**options, "skip": False})]
  assert found["memory"]["arguments"] > 16 * PARAMETERS  # with the average
  assert jax.default_backend() == "elsewhere"


def test_collectives() -> None:
  assert topology.collectives(HLO) == {
    "all-reduce": {"number": 7, "bytes": 6 * 128 + 128 + 3 + 4},  # five turns, once, and once outside of loops
    "reduce-scatter": {"number": 1, "bytes": 128},
    "all-gather": {"number": 1, "bytes": 512},
  }


@pytest.mark.parametrize("known", [{}, {0: 200}, {8: 1000}, {40: 4200}])
@pytest.mark.parametrize("most", [2000, 100], ids=["some", "none"])
@pytest.mark.parametrize("squeezed", [0, 700])
def test_largest_batch(known: dict[int, int], most: int, squeezed: int) -> None:
  """Also where the compiler saves memory when there is little, and where nothing fits."""
  tried = []

  def memory_of(clips: int) -> int:
    tried.append(clips)
    size = 200 + 100 * clips
    return min(size, most) if size <= most + squeezed else size

  fits, fails = topology.largest_batch(memory_of, most, known, 60, 1)
  assert fits == max(0, (most + squeezed - 200) // 100)
  assert fails == fits + 1
  assert len(tried) == len(set(tried)) <= 12


def test_search_ends_in_time() -> None:
  assert topology.largest_batch(lambda clips: clips, 100, {8: 8}, 60, 61) == (8, None)


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
  message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required (17.25G) exceeds HBM (15.75G)."

  def compile_step(*_: Any) -> Any:
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(topology, "compile_step", compile_step)
  found = describe.on_tpus(config(), SLICE, minutes=0)
  assert found["memory"] == {"total": int(17.25 * 2**30), "capacity": int(15.75 * 2**30)}
  assert found["largest"] == {"fits": 0, "fails": 2}
  topology.show(found)
  assert "the batch does not fit" in capsys.readouterr().out

  for message in ("UNIMPLEMENTED: no such operation", "RESOURCE_EXHAUSTED: Used 140M of 128M vmem."):
    with pytest.raises(ValueError, match=f"cannot be compiled for these chips: {message}"):
      describe.on_tpus(config(), SLICE, minutes=0)


@pytest.mark.parametrize(
  "message",
  [
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required (17.25G) exceeds available HBM (15.75G).",
    "RESOURCE_EXHAUSTED: XLA:TPU error. Ran out of memory in memory space hbm. Used 17.25G of 15.75G.",
  ],
)
def test_messages_of_the_compiler(message: str) -> None:
  assert topology._bytes_needed(message) == int(17.25 * 2**30)


def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
  monkeypatch.setattr(describe, "_read_config", lambda path: config())
  command = ["--config", "any", "--topology", SLICE, "--minutes", "0"]
  assert describe.main(command) == 0
  out, err = capsys.readouterr()
  assert "16 clips of 2 x 32 x 64 a step on 8 chips (v5e:2x4), 2 at once on each" in " ".join(out.split())
  assert "all-reduce" in out and "a chip can take 2 clips at once at least" in out
  assert "16 clips on 8 chips" in err
  assert describe.main([*command, "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["chips"] == 8


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--config.batch_size=20"], "batch size 20 cannot be split over 8 devices: take 16"),
    (["--config.matcher=scipy"], "config.matcher 'scipy' runs on the host; for TPUs take --config.matcher=device"),
    (["--config.mesh.data=3"], "does not fit 8 devices"),
  ],
)
def test_errors(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
  monkeypatch.setattr(describe, "_read_config", lambda path: config())
  assert describe.main(["--config", "any", "--topology", SLICE, *arguments]) == 1
  err = capsys.readouterr().err
  assert message in err
  assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["v5e", "v5e:3x3", "v5e:4x4x4", "v3:2x2", "4x4", ""])
def test_unknown_slices(name: str) -> None:
  with pytest.raises(ValueError, match=r"choose one of v5e:2x2, .*v6e:2x2, .*v5p:2x2x1, .*8x8x16$"):
    tpu_devices(name)


def test_missing_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"libtpu is not installed.*pip install 'vad_jax\[tpu\]'"):
    tpu_devices("v5p:8x8x16")
