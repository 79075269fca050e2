"""Whether a label job that is killed at random ends with the files of one that isn't, byte for byte.

    python -m benchmarks.label_kills --checkpoint outputs/demo/run/export [--kills 5] [--seed 0]

Renders held-out scenes of `shapes` with so many masks each: those of their objects and random ellipses.
Describes them once in peace and once with SIGKILLs: some while the command starts, the others at random
moments while it writes. Then every region must be there exactly once, and all files be equal. Exit status 1
where they aren't.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.synthetic import ellipses
from data_pipelines.shapes import Shapes
from osprey_jax.masks import encode_rle


def write_data(directory: Path, images: int, regions: int, size: int, seed: int) -> None:
    """`images/*.png` and `regions.jsonl`."""
    source, rng = Shapes(split="held_out", size=size), np.random.default_rng(seed)
    (directory / "images").mkdir()
    with (directory / "regions.jsonl").open("w") as file:
        for number in range(images):
            scene = source.scene(number)
            masks = scene.masks[:regions]
            if more := regions - len(masks):
                masks = np.concatenate([masks, ellipses(rng, more, *scene.image.shape[:2])])
            name = f"{number:05}.png"
            Image.fromarray(scene.image).save(directory / "images" / name)
            annotations = [{"segmentation": encode_rle(mask)} for mask in masks]
            print(json.dumps({"image": name, "annotations": annotations}), file=file)


def start(checkpoint: str, data: Path, output: Path) -> subprocess.Popen:
    """Starts the command."""
    options = {
        "checkpoint": checkpoint,
        "images": data / "images",
        "masks": data / "regions.jsonl",
        "output": output,
        "shards": 4,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return subprocess.Popen([sys.executable, "-m", "osprey_jax.label", *words], stderr=subprocess.DEVNULL)


def finish(process: subprocess.Popen) -> None:
    """Waits for a command that must succeed."""
    if status := process.wait():
        raise SystemExit(f"error: the command ended with {status}")


def written(output: Path) -> int:
    """Bytes of labels."""
    return sum(path.stat().st_size for path in output.glob("labels-*"))


def wait_for_growth(process: subprocess.Popen, output: Path) -> float:
    """Until the command writes or ends; the time by then."""
    before = written(output)
    while process.poll() is None and written(output) == before:
        time.sleep(0.005)
    return time.monotonic()


def faults(quiet: Path, killed: Path, images: int, regions: int) -> list[str]:
    """What is wrong with the output of the killed job."""
    lines = [
        json.loads(line) for path in sorted(killed.glob("labels-*")) for line in path.read_text().splitlines()
    ]
    seen = Counter((line["image"], line["region"]) for line in lines)
    wanted = {(f"{image:05}.png", region) for image in range(images) for region in range(1, regions + 1)}
    found = []
    if missing := wanted - seen.keys():
        found.append(f"{len(missing)} regions are missing")
    if twice := [region for region, count in seen.items() if count > 1]:
        found.append(f"{len(twice)} regions are there more than once")
    names = [sorted(path.name for path in output.glob("*.jsonl")) for output in (quiet, killed)]
    if names[0] != names[1]:
        found.append(f"files {names[1]}, not {names[0]}")
    different = [name for name in names[0] if (quiet / name).read_bytes() != (killed / name).read_bytes()]
    return found + [f"{name} is different" for name in different]


def main() -> int:
    """Runs the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--regions", type=int, default=20)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--size", type=int, default=192, help="of the images, in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as directory:
        data, quiet, killed = (Path(directory) / name for name in ("data", "quiet", "killed"))
        data.mkdir()
        write_data(data, args.images, args.regions, args.size, args.seed)
        begin, process = time.monotonic(), start(args.checkpoint, data, quiet)
        worked = wait_for_growth(process, quiet)
        finish(process)
        started, took = worked - begin, time.monotonic() - worked
        count = args.images * args.regions
        print(f"{count} regions in peace: first ones after {started:.1f} s, the others in {took:.1f} s")
        kills = 0
        while kills < args.kills:
            begin, process = time.monotonic(), start(args.checkpoint, data, killed)
            if kills % 3 == 2:
                time.sleep(rng.uniform(0, started))
            else:
                wait_for_growth(process, killed)
                time.sleep(rng.uniform(0, took / args.kills))
            if process.poll() is not None:
                break
            process.kill()
            process.wait()
            kills += 1
            print(f"killed after {time.monotonic() - begin:.1f} s, {written(killed)} bytes written")
        finish(start(args.checkpoint, data, killed))
        if kills < args.kills:
            print(f"error: it was done after {kills} kills; ask for more images")
            return 1
        if wrong := faults(quiet, killed, args.images, args.regions):
            print("error:", "; ".join(wrong))
            return 1
        print(f"{count} regions, each once; all files equal, byte for byte, after {kills} kills")
    return 0


if __name__ == "__main__":
    sys.exit(main())
