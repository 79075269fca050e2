"""Peak memory and time of converting a checkpoint, there and back, in proportion to its size.

    python benchmarks/conversion.py --layers 10 --directory /tmp      # 5.1 GB
    python benchmarks/conversion.py --layers 32                       # Osprey-7B's own size, 14 GB

Writes a release of random weights at Osprey-7B's widths (tower float16, extractor float32, decoder bfloat16),
converts it and converts it back, each in a process of its own, and prints peak resident memory above that of
a bare interpreter, as a ratio to the checkpoint's bytes. Needs three times the checkpoint's size on disk.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sentencepiece
import torch

from osprey_jax import checkpoint, convert_rules
from osprey_jax.config import OspreyConfig, osprey_7b
from osprey_jax.models.osprey import abstract_params

# Not getrusage: its peak is inherited from the parent.
_PEAK = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
_CONVERT = f"""
import sys
from osprey_jax import convert
status = convert.main(sys.argv[1:])
{_PEAK}
sys.exit(status)
"""
_DTYPES = {"model.vision_tower.": torch.float16, "mask_extractor.": torch.float32}


def write_release(directory: Path, config: OspreyConfig) -> int:
    """Writes a release of random weights in shards of about 1 GB; returns its tensors' bytes."""
    shapes = {path: leaf.shape for path, leaf in checkpoint.flatten(abstract_params(config)).items()}
    directory.mkdir(parents=True)
    weight_map, shard, held, total = {}, {}, 0, 0

    def close() -> None:
        file = f"pytorch_model-{len(set(weight_map.values())) + 1:05d}.bin"
        torch.save(shard, directory / file)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, slot in convert_rules.torch_slots(shapes).items():
        dtype = next((v for k, v in _DTYPES.items() if name.startswith(k)), torch.bfloat16)
        shard[name] = torch.randn(slot.torch_shape, dtype=dtype) * 0.02
        held += shard[name].nbytes
        total += shard[name].nbytes
        if held >= 1 << 30:
            close()
            held = 0
    close()
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    fields = convert_rules.release_fields(config, torch_dtype="bfloat16", bos_id=1, eos_id=2)
    (directory / "config.json").write_text(json.dumps(fields))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a photograph and a mask"] * 10),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=280,
        byte_fallback=True,
        minloglevel=2,
    )
    return total


def run(*arguments: str) -> tuple[int, float]:
    """Peak bytes and seconds of a process."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1]) * 1024, time.perf_counter() - start


def main() -> None:
    """Runs the benchmark and prints a line per direction."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=10, help="of the decoder")
    parser.add_argument("--directory", type=Path, help="where to work; default: a temporary directory")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.directory))
    try:
        config = osprey_7b()
        config = dataclasses.replace(
            config,
            decoder=dataclasses.replace(config.decoder, num_layers=args.layers),
            mask_token_id=280,
            position_token_id=281,
        )
        size = write_release(work / "release", config)
        bare, _ = run(_PEAK)
        print(f"checkpoint {size / 1e9:.2f} GB, bare interpreter {bare / 1e6:.0f} MB")
        for label, arguments in (
            ("to JAX", (str(work / "release"), str(work / "jax"))),
            ("to torch", ("--to-torch", str(work / "jax"), str(work / "back"))),
        ):
            peak, seconds = run(_CONVERT, *arguments)
            above = peak - bare
            print(f"{label}: peak {above / 1e9:.2f} GB above it = {above / size:.2f} x, {seconds:.0f} s")
            shutil.rmtree(work / "release", ignore_errors=True)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
