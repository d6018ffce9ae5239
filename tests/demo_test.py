"""The web page, as a visitor with a browser sees it."""

import json
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import av
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from playwright.sync_api import Browser, Page, expect, sync_playwright

from vad_jax import annotations, checkpoint, predict
from vad_jax.batch import Detections
from vad_jax.datasets.video import VideoReader, VideoWriter
from vad_jax.demo import __main__ as command
from vad_jax.demo import timeline
from vad_jax.demo.__main__ import main, serve
from vad_jax.demo.session import DemoError, Limits, Session, Sessions, check
from vad_jax.predictions import Action, KeyframeDetections, Prediction

SAMPLE = Path(__file__).parents[1] / "data" / "sample" / "videos" / "val" / "easy_val_00000.mp4"
LIMITS = Limits(seconds=8, megabytes=1)
WIDE, NARROW = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
BOXES = np.array([[0.1, 0.1, 0.4, 0.9], [0.6, 0.1, 0.9, 0.9]], np.float32)


class Looker(nnx.Module):
  """Always the same two people, the second one doubtful; looks left for the first action, right for the second."""

  def __call__(self, batch, *, rngs=None):
    return {"video": batch["video"]}

  def detections(self, out, batch):
    size = len(out["video"])
    return Detections(
      boxes=jnp.broadcast_to(BOXES, (size, 2, 4)),
      actor_score=jnp.broadcast_to(jnp.array([0.9, 0.4]), (size, 2)),
      action_score=jnp.broadcast_to(jnp.array([[0.8, 0.2], [0.1, 0.7]]), (size, 2, 2)),
      valid=jnp.ones((size, 2), bool),
    )

  def maps(self, out, batch):
    attention = jnp.stack([jnp.eye(2, 4)[:1].repeat(3, 0), jnp.eye(4)[3:].repeat(3, 0)])  # [K, h, w]
    return {"attention": jnp.broadcast_to(attention, (len(out["video"]), 2, *attention.shape))}


LOOKER = checkpoint.Loaded(
  Looker(),
  {
    "model": {"name": "looker"},
    "clip": {"num_frames": 2, "frame_stride": 1, "fps": 25.0},
    "canvas": [48, 64],
    "short_side": 48,
    "label_map": {1: "look <left>", 2: "look right"},
    "step": 0,
  },
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
  """Copies: what a page removes by mistake is not the repository's."""
  folder = tmp_path_factory.mktemp("samples")
  return [Path(shutil.copy(SAMPLE, folder / f"{name}.mp4")) for name in ("first", "second")]


@pytest.fixture(scope="module")
def address(samples: list[Path]) -> Iterator[str]:
  load = checkpoint.load_model
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(command, "SAMPLES", samples[0].parent)
    patch.setattr(checkpoint, "load_model", lambda name: LOOKER if name == "looker" else load(name))
    with serve(["looker", "quickstart"], host="127.0.0.1", port=None, limits=LIMITS) as url:
      yield url


expect.set_options(timeout=60_000)  # nothing of what is expected takes long, but for a busy machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
  chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
  if chromium is None:
    pytest.fail("the page is tested in Chromium, which is missing: apt-get install chromium")
  with sync_playwright() as playwright:
    yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
  with browser.new_context(viewport=WIDE, accept_downloads=True) as context:
    page = context.new_page()
    page.set_default_timeout(60_000)
    yield open_page(page, address)


def open_page(page: Page, address: str) -> Page:
  page.goto(address)
  page.wait_for_selector("#find")
  return page


def upload(page: Page, path: Path, says: str) -> None:
  page.set_input_files("#video input[type=file]", path)
  expect(page.locator("#status")).to_contain_text(says)


def find(page: Page, says: str) -> None:
  page.click("#find")
  expect(page.locator("#status")).to_contain_text(says)


def test_quickstart_from_upload_to_download(browser, address, tmp_path):
  with browser.new_context(viewport=WIDE) as context:
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    open_page(page, address)
    upload(page, SAMPLE, "6.0 s, 320 × 240")
    page.get_by_label("evad (quickstart)").check()
    find(page, "2 people")
    # The result plays.
    page.evaluate("document.querySelector('#result video').play()")
    page.wait_for_function("document.querySelector('#result video').currentTime > 0.2")
    assert page.evaluate("document.querySelector('#result video').videoWidth") == 480
    page.wait_for_function("getComputedStyle(document.querySelector('.tl')).getPropertyValue('--now') > 0")
    page.locator(".tl-part").first.click()
    expect(page.locator("#caption")).to_contain_text("What evad saw at")
    files = {}
    for kind in ("csv", "json", "mp4"):
      with page.expect_download() as download:
        page.click(f"#{kind}")
      files[kind] = tmp_path / download.value.suggested_filename
      download.value.save_as(files[kind])
  rows = annotations.read_ava_csv(files["csv"])
  assert set(rows.video) == {SAMPLE.stem} and len(rows.video) >= 12
  content = json.loads(files["json"].read_text())
  assert content["video"] == SAMPLE.name  # without folders of the server
  assert {actor["person"] for keyframe in content["keyframes"] for actor in keyframe["actors"]} == {1, 2}
  with VideoReader(files["mp4"]) as drawn, VideoReader(SAMPLE) as source:
    before, after = (reader.frames_at([1.0])[0].astype(int) for reader in (source, drawn))
    change = np.abs(after[::3, ::3] - before[::2, ::2]).max(-1) > 60
    assert 0.01 < change.mean() < 0.3  # boxes and captions
  assert {url.partition("//")[2].partition("/")[0] for url in asked if not url.startswith(("blob:", "data:"))} == {
    address.partition("//")[2].strip("/")
  }


def test_attention_and_thresholds(page, samples):
  page.get_by_role("button", name="Sample 1").click()
  expect(page.locator("#status")).to_contain_text("6.0 s")
  find(page, "1 people")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(predict, "predict_video", None)  # the model does not run again
    page.fill("#person input[type=number]", "0.3")
    page.keyboard.press("Tab")
    expect(page.locator("#status")).to_contain_text("Drawn again: 2 people, 2 kinds")
  pictures = []
  for person, name in ((1, "look <left>"), (2, "look right")):
    page.get_by_role("group", name=f"Person {person}").locator(".tl-part").click()
    expect(page.locator("#caption")).to_contain_text(f"“{name}” of person {person} at 2.0 s")
    assert 2.5 < page.evaluate("document.querySelector('#result video').currentTime") < 3.5
    picture = page.locator("#map img")
    picture.wait_for()
    page.wait_for_function("document.querySelector('#map img').naturalWidth > 0")
    pictures.append(picture.get_attribute("src"))
    left, right = page.evaluate("""() => {
      const image = document.querySelector('#map img'), canvas = document.createElement('canvas');
      canvas.width = canvas.height = 8;
      const context = canvas.getContext('2d');
      context.drawImage(image, 0, 0, 8, 8);
      const of = (x) => context.getImageData(x, 7, 1, 1).data[0];
      return [of(0), of(7)];
    }""")
    assert (left > right + 50) if person == 1 else (right > left + 50)
  assert pictures[0] != pictures[1]
  page.get_by_role("button", name="Person 1", exact=True).click()
  expect(page.locator("#caption")).to_contain_text("“look <left>” of person 1")


def test_keyboard(page):
  page.locator("#video button").first.focus()
  order = []
  for _ in range(20):
    page.keyboard.press("Tab")
    order.append(page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent.trim()"))
    if order[-1] == "Find actions":
      break
  assert order[:2] == ["Sample 1", "Sample 2"] and "range slider for Action score, at least" in order
  page.keyboard.press("Enter")
  expect(page.locator("#status")).to_contain_text("Choose a video first.")
  page.get_by_role("button", name="Sample 1").focus()
  page.keyboard.press("Enter")
  expect(page.locator("#status")).to_contain_text("6.0 s")
  page.locator("#find").focus()
  page.keyboard.press("Space")
  expect(page.locator("#status")).to_contain_text("Done")
  page.locator(".tl-what").focus()
  page.keyboard.press("Tab")
  page.keyboard.press("Enter")
  expect(page.locator("#caption")).to_contain_text("“look <left>” of person 1 at 0.0 s")
  page.locator("#map img").wait_for()
  # Nothing is wider than a narrow screen.
  page.set_viewport_size(NARROW)
  assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
  wide = "[...document.querySelectorAll('#columns *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
  assert page.evaluate(wide + ".map(e => e.className)") == []


def test_cancel_and_queue(page, browser, address, monkeypatch):
  real, shares = predict.predict_video, []

  def held(*arguments, on_progress, **options):
    def hold(share):
      shares.append(share)
      for _ in range(2400 if share > 0.1 else 1):  # two minutes, or until it is cancelled
        time.sleep(0.05)
        on_progress(share)

    return real(*arguments, on_progress=hold, **options)

  upload(page, SAMPLE, "6.0 s")
  with browser.new_context(viewport=WIDE) as context:
    other = open_page(context.new_page(), address)
    upload(other, SAMPLE, "6.0 s")
    monkeypatch.setattr(predict, "predict_video", held)
    page.click("#find")
    expect(page.locator("#result")).to_contain_text("s left")
    other.click("#find")
    expect(other.locator("#result")).to_contain_text("queue: 1/1")
    monkeypatch.setattr(predict, "predict_video", real)
    page.click("#cancel")
    expect(page.locator("#status")).to_contain_text("Cancelled")
    expect(page.locator("#cancel")).to_be_disabled()
    expect(other.locator("#status")).to_contain_text("Done")
  assert shares[-1] < 0.2  # it went no further
  assert page.locator(".tl").count() == 0
  find(page, "Done")  # again


def test_files_that_cannot_be_taken(page, tmp_path):
  files = {name: tmp_path / name for name in ("broken.mp4", "empty.mp4", "large.mp4", "long.mp4")}
  files["broken.mp4"].write_bytes(SAMPLE.read_bytes()[:1000])
  files["empty.mp4"].touch()
  files["large.mp4"].write_bytes(bytes(LIMITS.size + 1))
  with VideoWriter(files["long.mp4"], size=(32, 32), fps=5) as writer:
    for _ in range(60):
      writer.write(np.zeros((32, 32, 3), np.uint8))
  upload(page, files["broken.mp4"], "broken.mp4: ")
  find(page, "broken.mp4: ")
  assert "/" not in page.inner_text("#status")  # of folders
  expect(page.locator("#csv")).to_be_disabled()
  upload_again(page, files["long.mp4"], "long.mp4 is 12 s long; at most 8 s are taken.")
  upload_again(page, files["empty.mp4"], "empty.mp4 is empty")
  page.get_by_label("Clear").last.click()
  page.set_input_files("#video input[type=file]", files["large.mp4"])
  expect(page.locator("body")).to_contain_text("exceed the maximum allowed size of 1.0 Mb")
  with pytest.raises(DemoError, match=r"large.mp4 has 1.0 MB; at most 1 MB are taken."):
    check(files["large.mp4"], LIMITS)


def test_length_is_that_of_the_frames(tmp_path):
  """What a browser records does not say how long it is, nor does a stream that was cut off."""
  path = tmp_path / "recorded.webm"
  with av.open(str(path), "w", options={"live": "1"}) as target:
    stream = target.add_stream("libvpx", rate=5)
    stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
    for _ in range(60):
      target.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")))
    target.mux(stream.encode(None))
  with pytest.raises(DemoError, match=r"recorded.webm is 12 s long; at most 8 s are taken."):
    check(path, LIMITS)
  assert check(path, LIMITS._replace(seconds=20)).seconds == pytest.approx(11.8, abs=0.3)


def upload_again(page: Page, path: Path, says: str) -> None:
  page.get_by_label("Clear").last.click()
  upload(page, path, says)


def test_only_own_files_are_served(address):
  root = address + "gradio_api/file="
  for path in (
    "/etc/passwd",
    "../../../../etc/passwd",
    "..%2f..%2f..%2fetc%2fpasswd",
    str(Path(__file__)),
    "README.md",
  ):
    with pytest.raises(urllib.error.HTTPError) as error:
      urllib.request.urlopen(root + path)
    assert error.value.code in (403, 404), path


def answers(address):
  try:
    with urllib.request.urlopen(address) as answer:
      return answer.status == 200
  except urllib.error.HTTPError:
    return False


def test_a_visitors_files_go_when_the_visitor_goes(browser, address, samples):
  with browser.new_context(viewport=WIDE) as context:
    page = open_page(context.new_page(), address)
    page.get_by_role("button", name="Sample 1").click()
    expect(page.locator("#status")).to_contain_text("first.mp4")
    page.get_by_label("Clear").last.click()
    upload(page, SAMPLE, "6.0 s")
    find(page, "Done")
    sources = [page.get_attribute(f"#{part} video", "src") for part in ("video", "result")]
    assert all(map(answers, sources))
  deadline = time.monotonic() + 20
  while any(map(answers, sources)) and time.monotonic() < deadline:
    time.sleep(0.2)
  assert not any(map(answers, sources))
  assert all(sample.exists() for sample in samples)


def test_only_uploads_are_removed(tmp_path):
  root, outside = tmp_path / "root", tmp_path / "sample.mp4"
  root.mkdir()
  own, shared = root / "own.mp4", root / "shared.mp4"
  for path in (outside, own, shared):
    path.touch()
  sessions = Sessions(root)
  for key, videos in {"one": (outside, own, shared, root / ".." / "sample.mp4"), "two": (shared,)}.items():
    sessions.of(key)
    for video in videos:
      sessions.keep(key, video)
  sessions.close("one")
  assert outside.exists() and shared.exists() and not own.exists()
  sessions.close_all()
  assert outside.exists() and not list(root.iterdir())


def test_thresholds_give_what_a_run_with_them_gives(tmp_path):
  session = Session(tmp_path / "session")
  session.find(LOOKER, None, check(SAMPLE, LIMITS), (0.5, 0.3), lambda share: None)
  chosen = session.choose((0.2, 0.15), lambda share: None)
  run = predict.predict_video(LOOKER, SAMPLE, actor_threshold=0.2, action_threshold=0.15)
  assert chosen is not None and len(run.keyframes) == len(chosen[0].keyframes) == 6
  for keyframe, expected in zip(chosen[0].keyframes, run.keyframes, strict=True):
    assert keyframe.actions == expected.actions and len(expected.actions) == 2
    np.testing.assert_array_equal(keyframe.boxes, expected.boxes)
    np.testing.assert_array_equal(keyframe.person, expected.person)
  session.close()
  assert not (tmp_path / "session").exists()


def test_timeline_joins_what_follows_without_a_gap():
  walk, boxes = Action(1, "walk", 0.5), np.zeros((1, 4), np.float32)
  keyframes = [
    KeyframeDetections(time, boxes, np.ones(1), np.ones((1, 1)), [[walk] if time != 2 else []], np.array([1]))
    for time in range(5)
  ]
  (person,) = timeline.people(Prediction(SAMPLE, (10, 10), 25.0, 0, keyframes), 4.5)
  assert [(part.start, part.end) for part in person.seen] == [(0, 4.5)]
  assert [(part.start, part.end, part.score) for part in person.rows[0].segments] == [(0, 2, 0.5), (3, 4.5, 0.5)]


def test_what_cannot_be_served_is_one_line(monkeypatch, capsys):
  assert main(["--checkpoint", "nowhere"]) == 1
  monkeypatch.setattr(checkpoint, "load_model", lambda name: LOOKER)
  with socket.create_server(("127.0.0.1", 0)) as taken:
    assert main(["--port", str(taken.getsockname()[1])]) == 1
  errors = capsys.readouterr().err.strip().splitlines()
  assert len(errors) == 2 and all(error.startswith("error: ") for error in errors)
  assert "no such checkpoint" in errors[0] and "port" in errors[1]
