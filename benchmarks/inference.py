"""Regions of one image described: in our engine, one by one in our code, in torch as the original does.

    python -m benchmarks.inference [--regions 1 8 10 32 100 256] [--rounds 3] [--json FILE]
    python -m benchmarks.inference --size 7b --dtype bfloat16 [--quantize int8] --no-torch    # on a GPU

All answer the demo's short question greedily with the same random weights and give exactly `--tokens` tokens
a region, for the head gives the end token the logit 0. Before anything is timed, the tokens of `--checked`
regions must be equal in all ways, and those of all regions together in batches of all sizes.
Then each round times, for each number of regions, one region in torch, one of ours alone and all of them in
the engine, one after another. What a region costs alone doesn't depend on how many there are, so the two
one-by-one ways are multiplied: 100 regions in torch are 100 times one, plus preprocessing the image once.

Beside it: what the engine ran, counted while it ran; programs compiled; bytes of caches; where its time goes;
a decode step against the time to read its weights; the first answer of a fresh process, cold and warm.
"""

import argparse
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import inference_probes as probes
from benchmarks.inference_report import report
from benchmarks.synthetic import SIZES, ellipses, load_tokenizer, random_params, synthetic_image
from osprey_jax import Osprey
from osprey_jax.prompt import PROTOCOLS, Tokenizer, tokenize
from osprey_jax.typing import Params

PROMPT = PROTOCOLS["demo_short"].prompt()
Tokens = list[list[int]]


class Ways:
    """The ways to answer about regions of one image, each giving token ids."""

    def __init__(self, args: argparse.Namespace):
        config, tokenizer = SIZES[args.size], load_tokenizer(args.tokenizer)
        self.tokens = args.tokens
        self.image, self.masks = scene(max(args.regions))
        self.one_by_one: dict[str, Callable[[int], list[int]]] = {"alone": self.alone}
        self.preprocessing = 0.0
        params = None
        if args.torch:
            from benchmarks.torch_inference import TorchOsprey

            torch = TorchOsprey(config, eos_id=tokenizer.eos_id, threads=os.cpu_count() or 1)
            ids = tokenize(tokenizer, PROMPT)
            self.preprocessing, pixels = timed(partial(torch.preprocess, self.image))
            self.one_by_one["torch"] = lambda region: torch.answer(
                pixels, self.masks[region], ids, args.tokens
            )
            params = jax.tree.map(jax.numpy.asarray, torch.params())
        self.osprey = model_of(args, tokenizer, params)

    def engine(self, regions: int) -> Tokens:
        """The first regions together."""
        return self._generate(slice(regions))

    def alone(self, region: int) -> list[int]:
        """One of them: a call of its own, image included."""
        return self._generate(slice(region, region + 1))[0]

    def _generate(self, which: slice) -> Tokens:
        masks = self.masks[which]
        answers = self.osprey.generate(self.image, masks, PROMPT, max_new_tokens=self.tokens)
        return [answer.token_ids for answer in answers]


def model_of(args: argparse.Namespace, tokenizer: Tokenizer, params: Params | None = None) -> Osprey:
    """Our model; without parameters given, with random ones made on the device."""
    config = SIZES[args.size]
    if params is None:
        params = random_params(config, args.dtype, eos_id=tokenizer.eos_id, quantization=args.quantize)
    return Osprey(config, params, tokenizer, dtype=args.dtype, quantization=args.quantize)


def scene(regions: int) -> tuple[np.ndarray, np.ndarray]:
    """An image of 480 × 640 pixels and that many ellipses in it."""
    rng = np.random.default_rng(0)
    image = synthetic_image(rng)
    return image, ellipses(rng, regions, *image.shape[:2])


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `run` takes, and what it gives."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def say(text: str) -> None:
    """Tells on standard error what is under way."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def first_answer(args: argparse.Namespace) -> None:
    """In a process that was started at `args.first_answer`: prints what its first answer takes, as JSON."""
    imports = time.time() - args.first_answer
    osprey = model_of(args, load_tokenizer(args.tokenizer))
    jax.block_until_ready(osprey.params)
    image, masks = scene(1)

    def ask() -> Any:
        return osprey.generate(image, masks, PROMPT, max_new_tokens=args.tokens)

    with probes.compilations() as compiled:
        first, _ = timed(ask)
    warm = min(timed(ask)[0] for _ in range(3))
    found = {"imports": imports, "first": first, "warm": warm}
    print(json.dumps(found | {"programs": compiled.count, "from_cache": compiled.hits}))


def first_answers(argv: Sequence[str]) -> dict[str, dict[str, float]]:
    """First answers of two fresh processes, the second of which finds what the first compiled."""
    results = {}
    with tempfile.TemporaryDirectory() as cache:
        settings = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        for name in ("cold", "cold, compiled before"):
            say(f"first answer of a fresh process, {name}")
            command = [sys.executable, "-m", "benchmarks.inference", *argv]
            done = subprocess.run(
                [*command, "--first-answer", str(time.time())],
                env=os.environ | settings,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            results[name] = json.loads(done.stdout.splitlines()[-1])
    return results


def count(ways: Ways, args: argparse.Namespace) -> dict[int, dict[str, int]]:
    """What runs for each number of regions."""
    counts = {}
    with probes.counted() as take:
        for number in args.regions:
            say(f"counting {number} regions")
            ways.engine(number)
            counts[number] = dataclasses.asdict(take())
    return counts


def first_runs(ways: Ways, args: argparse.Namespace) -> tuple[dict[int, dict], dict[int, Tokens]]:
    """What is compiled for each number of regions, after those before it, and the tokens."""
    programs, tokens = {}, {}
    for number in args.regions:
        say(f"compiling for {number} regions")
        with probes.compilations() as compiled:
            took, tokens[number] = timed(partial(ways.engine, number))
        programs[number] = {"count": compiled.count, "seconds": took, "names": compiled.names}
    return programs, tokens


def differences(ways: Ways, args: argparse.Namespace, tokens: dict[int, Tokens]) -> list[str]:
    """Where fewer regions together, or regions one by one, get other tokens than the most together."""
    most, others = tokens[max(tokens)], {f"{number} together": found for number, found in tokens.items()}
    for name, way in ways.one_by_one.items():
        say(f"comparing {args.checked} regions, {name}")
        others[name] = [way(region) for region in range(args.checked)]
    different = []
    for name, found in others.items():
        if any(len(each) != ways.tokens for each in found):
            raise SystemExit(f"error: not all answers of {name} have {ways.tokens} tokens")
        if wrong := sum(a != b for a, b in zip(found, most, strict=False)):
            different.append(f"{wrong} of {len(found)} {name}")
    return different


def measure(ways: Ways, args: argparse.Namespace, expected: Tokens) -> tuple[dict[int, dict], list[float]]:
    """Seconds of each way in turns, for each number of regions, and the load of the machine at each round."""
    names = (*ways.one_by_one, "engine")
    exact = _is_exact(args)
    seconds: dict[int, dict[str, list[float]]] = {
        number: {name: [] for name in names} for number in args.regions
    }
    turn, load = 0, []
    for turns in range(args.rounds):
        say(f"round {turns + 1} of {args.rounds}")
        load.append(os.getloadavg()[0])
        for number in args.regions:
            region = turn % args.checked
            for name in names if turn % 2 else reversed(names):
                if name == "engine":
                    took, found = timed(partial(ways.engine, number))
                    same = found == expected[:number]
                else:
                    took, found = timed(partial(ways.one_by_one[name], region))
                    same = found == expected[region]
                if exact and not same:
                    raise SystemExit(f"error: {name} gave other tokens than before")
                seconds[number][name].append(took)
            turn += 1
    return seconds, load


def _is_exact(args: argparse.Namespace) -> bool:
    """Whether all ways must give the same tokens; rounding coarsely, each batch size has its own."""
    return (args.dtype, args.quantize) == ("float32", None)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def rates(ways: Ways, seconds: dict[int, dict]) -> dict[int, dict]:
    """Rates of the engine, and how many times faster it is than the one-by-one ways."""
    result: dict[int, dict] = {}
    for number, found in seconds.items():
        engine = found["engine"]
        median = statistics.median(engine)
        row: dict[str, Any] = {"seconds": summary(engine)}
        row |= {"regions_per_s": number / median, "tokens_per_s": number * ways.tokens / median}
        for name in ("alone", "torch"):
            if name in found:
                once = ways.preprocessing if name == "torch" else 0.0
                ratios = [(number * one + once) / all_ for one, all_ in zip(found[name], engine, strict=True)]
                row[f"times_faster_than_{name}"] = summary(ratios)
        result[number] = row
    return result


def stages(ways: Ways, args: argparse.Namespace, counts: dict[int, dict], machine: dict) -> dict[int, dict]:
    """Where the engine's time goes, and its decode steps against what the machine allows."""
    result, weights = {}, probes.step_weights(ways.osprey.params)
    for number in args.regions:
        say(f"stages of {number} regions")
        with probes.staged() as found:
            total, _ = timed(partial(ways.engine, number))
        seen, parts = counts[number], dict(found.seconds)
        steps = max(seen["decode_steps"], 1)
        caches = seen["prefix_cache_bytes"] + seen["own_cache_bytes"]
        result[number] = {
            "seconds": parts | {"host": total - sum(parts.values())},
            "step": {
                "seconds": parts.get("decode", 0.0) / steps,
                "weight_bytes": weights,
                "cache_bytes": caches,
                "floor_of_weights": weights / machine["read_bytes_per_s"],
                "floor_of_bytes": (weights + caches) / machine["read_bytes_per_s"],
                "floor_of_flops": found.step_cost.get("flops", 0.0) / machine["flops_per_s"],
                "estimate": found.step_cost,
            },
        }
    return result


def describe_machine(args: argparse.Namespace) -> dict[str, Any]:
    """Where this ran, and what the machine can do."""
    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kind = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), kind)
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    say("bandwidth and arithmetic of the machine")
    return {
        "device": kind,
        "platform": device.platform,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": git.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        **probes.machine_limits(args.dtype),
    }


def peak_memory() -> int:
    """Bytes that this process held at most, on the device where it tells."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main(argv: Sequence[str]) -> int:
    """Runs all and prints tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantize", help="as in Osprey.load")
    parser.add_argument("--regions", type=int, nargs="+", default=[1, 8, 10, 32, 100, 256])
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checked", type=int, default=4, help="regions that go through the one-by-one ways")
    parser.add_argument("--tokenizer", help="a directory, instead of mistral-common's")
    parser.add_argument("--no-torch", dest="torch", action="store_false")
    parser.add_argument("--no-first-answer", dest="first_answers", action="store_false")
    parser.add_argument("--json", help="a file for all numbers")
    parser.add_argument("--first-answer", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.regions = sorted(set(args.regions))
    args.checked = min(args.checked, max(args.regions))
    if args.first_answer is not None:
        first_answer(args)
        return 0
    if args.torch and not _is_exact(args):
        parser.error("torch's side computes in float32: give --no-torch")

    # Before this process takes the device's memory.
    found: dict[str, Any] = {"first_answers": first_answers(argv) if args.first_answers else {}}
    jax.config.update("jax_enable_compilation_cache", False)
    if args.torch and jax.default_backend() != "cpu":
        parser.error("torch's side runs on the CPU: give --no-torch, or set JAX_PLATFORMS=cpu")
    found["machine"] = describe_machine(args)
    say("weights")
    ways = Ways(args)
    found["counts"] = count(ways, args)
    found["programs"], together = first_runs(ways, args)
    tokens = together[max(args.regions)]
    found["different"] = differences(ways, args, together)
    if found["different"] and _is_exact(args):
        raise SystemExit(f"error: other tokens than the engine's: {'; '.join(found['different'])}")
    seconds, found["load"] = measure(ways, args, tokens)
    found["rates"] = rates(ways, seconds)
    found["stages"] = stages(ways, args, found["counts"], found["machine"])
    pooled = {
        name: [value for row in seconds.values() for value in row.get(name, [])]
        for name in ("alone", "torch")
    }
    found |= {
        **{name: getattr(args, name) for name in ("size", "dtype", "quantize", "tokens", "checked")},
        "places": len(ways.osprey.tokenize(PROMPT)) - 1 + SIZES[args.size].vision.num_image_tokens,
        "preprocessing": ways.preprocessing,
        "one_region": {name: summary(values) for name, values in pooled.items() if values},
        "different_answers": len(set(map(tuple, tokens))),
        "peak_memory": peak_memory(),
        "all_seconds": seconds,
    }
    print(report(found))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
