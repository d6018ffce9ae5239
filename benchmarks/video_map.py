"""What do frame-mAP and video-mAP cost at the size of UCF101-24?

    python benchmarks/video_map.py

makes up detections for 914 test videos, 15 in each frame with a score of each of 24 classes, as the class-query model
gives them, and prints processor time and peak memory of each protocol. Takes some minutes.
"""

import argparse
import resource
import time

import numpy as np

from vad_jax.metrics.video_map import Dataset, Protocol, video_map
from vad_jax.tubes import Tube, TubeDetections, TubeGroundTruth, Video

NUM_CLASSES, NUM_QUERIES = 24, 15


def synthetic(num_videos: int, seed: int = 0) -> tuple[TubeGroundTruth, TubeDetections]:
  """Videos of 60 to 280 frames with one to three people each, and queries that follow them more or less closely."""
  rng = np.random.default_rng(seed)
  videos, columns = {}, []
  for index in range(num_videos):
    num_frames, label = int(rng.integers(60, 281)), int(rng.integers(NUM_CLASSES))
    corners = rng.uniform((0, 0, 40, 60), (200, 120, 120, 140), (4, 4))  # of four people, the last one does nothing
    drift = rng.normal(0, 0.3, (num_frames, 4, 2)).cumsum(axis=0)
    people = np.concatenate([corners[:, :2] + drift, corners[:, :2] + corners[:, 2:] + drift], axis=2)
    tubes = []
    for person in range(rng.integers(1, 4)):
      begin = int(rng.integers(num_frames // 3))
      frames = np.arange(begin, int(rng.integers(begin + 20, num_frames)))
      tubes.append(Tube(label, np.column_stack([frames + 1, people[frames, person]])))
    videos[f"video{index:04d}"] = Video(num_frames, (240, 320), tubes)
    target = rng.integers(4, size=NUM_QUERIES)
    boxes = people[:, target] + rng.normal(0, rng.uniform(1, 12, (1, NUM_QUERIES, 1)), (num_frames, NUM_QUERIES, 4))
    boxes[..., 2:] = np.maximum(boxes[..., 2:], boxes[..., :2])
    scores = rng.beta(1, 8, (num_frames, NUM_QUERIES, NUM_CLASSES))
    scores[:, target < len(tubes), label] = rng.beta(4, 2, (num_frames, int((target < len(tubes)).sum())))
    actor = np.where(target < 3, rng.beta(6, 1, (num_frames, NUM_QUERIES)), rng.random((num_frames, NUM_QUERIES)))
    frame = np.repeat(np.arange(1, num_frames + 1), NUM_QUERIES)
    columns.append(
      (np.full(len(frame), index), frame, boxes.reshape(-1, 1, 4), actor.reshape(-1), scores.reshape(len(frame), -1))
    )
  labels = [f"class {k + 1}" for k in range(NUM_CLASSES)]
  video, frame, boxes, actor, scores = (np.concatenate(column) for column in zip(*columns, strict=True))
  found = TubeDetections(
    list(videos), video.astype(np.int32), frame.astype(np.int32), boxes, actor, scores.astype(np.float32)
  )
  return TubeGroundTruth(labels, videos, [([], list(videos))]), found


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--videos", type=int, default=914, help="default: %(default)s")
  args = parser.parse_args()
  truth, found = synthetic(args.videos)
  num_frames = sum(video.num_frames for video in truth.videos.values())
  print(f"{args.videos} videos, {num_frames} frames, {len(found.frame)} boxes of {NUM_CLASSES} classes")
  rules: list[tuple[Protocol, Dataset | None]] = [
    ("act", None),
    ("class_query", "ucf101_24"),
    ("class_query", "jhmdb"),
    ("multisports", None),
  ]
  for protocol, dataset in rules:
    begin = time.process_time()
    result = video_map(truth, found, protocol=protocol, dataset=dataset)
    seconds = time.process_time() - begin
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    figures = ", ".join(f"{name} {100 * result.summary[name]:.2f}" for name in ("frame-mAP@0.5", "video-mAP@0.5"))
    print(f"{protocol} {dataset or ''}: {seconds:.1f} s of CPU, {memory:.2f} GB at most so far; {figures}", flush=True)


if __name__ == "__main__":
  main()
