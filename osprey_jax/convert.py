"""Converts checkpoints between the PyTorch release's layout and ours, in both directions.

    python convert_torch_ckpt.py SRC DST               a release directory, or a Hub id, to a checkpoint
    python convert_torch_ckpt.py SRC DST --quantize int8                         to one in low precision;
                                                       SRC may be a checkpoint of ours as well
    python convert_torch_ckpt.py --decoder VICUNA --vision-tower open_clip.bin [--projector P.bin] DST
    python convert_torch_ckpt.py --to-torch SRC DST    a checkpoint to a release directory
    python convert_torch_ckpt.py --sam sam_vit_b_01ec64.pth DST      SAM's file, or a directory of
                                                       transformers' SamModel, to a checkpoint of SAM, which
                                                       --to-torch takes back to a file of the original's

Tensors keep their dtypes unless one is asked for, so there and back is bit-identical. Leaves go from the
source's files to Orbax a few at a time: what is in memory at once is the largest leaf and one tensor.
"""

import argparse
import re
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from osprey_jax import checkpoint, convert_rules, convert_sam, quantize, torch_files
from osprey_jax.config import ExtractorConfig
from osprey_jax.convert_leaves import check_dtypes, in_parts, leaves_of_tensors, tensors_of_leaves
from osprey_jax.convert_rules import PROJECTOR, TOWER
from osprey_jax.directories import new_directory
from osprey_jax.models.osprey import abstract_params
from osprey_jax.prompt import Tokenizer
from osprey_jax.torch_files import DTYPES, Shape

SHARD_BYTES = 2 << 30
"""A shard of the release layout is closed once it holds so many bytes."""


def convert(
    source: Path | str, destination: Path | str, *, vision_tower: Path | str | None = None,
    projector: Path | str | None = None, plain_decoder: bool = False, dtype: str | None = None,
    quantization: str | None = None, seed: int = 0,
) -> None:  # fmt: skip
    """Writes the checkpoint `destination` from a directory (or Hub id) of config, weights and tokenizer.

    `vision_tower` is open_clip's file, `projector` a file of `model.mm_projector.*`, for tensors that
    `source` lacks. With `plain_decoder` the source is a Llama checkpoint: the extractor, and the projector
    unless given, are drawn from `seed`, in float32. `dtype` is one of `DTYPES`; by default each leaf keeps
    its tensors' dtype, or float32 where its layers differ. `quantization` is the scheme (`quantize.SCHEMES`)
    of the decoder's matrices. Raises ValueError, and leaves nothing behind,
    where anything is missing, unknown, twice there, damaged or of another shape.
    """
    _refuse_existing(destination)
    if quantization is not None:
        quantize.scheme(quantization)
    directory = _local(source)
    fields = _read_fields(directory)
    tokenizer = Tokenizer.load(directory)
    entries = torch_files.read_directory(directory)
    if vision_tower is not None:
        torch_files.merge(
            entries,
            {TOWER + name: entry for name, entry in torch_files.read_file(Path(vision_tower)).items()},
        )
    if projector is not None:
        torch_files.merge(entries, torch_files.read_file(Path(projector)))

    found = {name: entry.shape for name, entry in entries.items()}
    config = convert_rules.read_sizes(found, fields, extractor=ExtractorConfig() if plain_decoder else None)
    config = convert_rules.with_placeholders(
        config, mask_id=tokenizer.mask_id, position_id=tokenizer.position_id
    )
    shapes = {k: v.shape for k, v in checkpoint.flatten(abstract_params(config, jnp.float32)).items()}
    fresh: tuple[str, ...] = ()
    if plain_decoder:
        has_projector = any(name.startswith(PROJECTOR) for name in entries)
        fresh = ("extractor/",) if has_projector else ("extractor/", "projector/")
    slots = convert_rules.torch_slots({k: v for k, v in shapes.items() if not k.startswith(fresh or "\0")})
    convert_rules.check_tensors(found, slots)
    check_dtypes(slots, entries)

    leaves = leaves_of_tensors(
        shapes, slots, entries, dtype=np.dtype(dtype) if dtype else None,
        fresh=lambda path: _fresh(path, shapes, seed),
    )  # fmt: skip
    if quantization is not None:
        structs = checkpoint.flatten(abstract_params(config, quantization=quantization))
        leaves = quantize.quantized_leaves(leaves, structs)
    checkpoint.save_parts(destination, in_parts(leaves), config, tokenizer, quantization=quantization)


def to_low_precision(source: Path | str, destination: Path | str, quantization: str) -> None:
    """Writes the checkpoint `source`, such as a training's export, once more in low precision.

    Raises ValueError where `destination` exists, or `source` is quantised or no checkpoint.
    """
    _refuse_existing(destination)
    config, tokenizer = checkpoint.load_config(source), Tokenizer.load(source)
    if there := checkpoint.load_quantization(source):
        raise ValueError(f"{source} is quantised ({there}) already; quantise the checkpoint it was made from")
    structs = checkpoint.flatten(abstract_params(config, quantization=quantization))
    leaves = quantize.quantized_leaves(checkpoint.load_leaves(source), structs)
    checkpoint.save_parts(destination, in_parts(leaves), config, tokenizer, quantization=quantization)


def to_torch(source: Path | str, destination: Path | str, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the checkpoint `source` as a release directory: config, index, `.bin` shards and tokenizer.

    Tensors have the dtypes of the leaves. Raises ValueError where `destination` exists, or `source` is no
    checkpoint.
    """
    _refuse_existing(destination)
    config = checkpoint.load_config(source)
    if quantization := checkpoint.load_quantization(source):
        raise ValueError(f"{source} is quantised ({quantization}); convert the checkpoint it was made from")
    tokenizer = Tokenizer.load(source)
    structs = checkpoint.flatten(checkpoint.saved_shapes(source))
    expected = checkpoint.flatten(abstract_params(config, jnp.float32))
    if {k: v.shape for k, v in structs.items()} != {k: v.shape for k, v in expected.items()}:
        raise ValueError(f"the parameters in {source} are not those of its config.json")
    torch_dtype = structs["decoder/embed_tokens/embedding"].dtype.name
    fields = convert_rules.release_fields(
        config, torch_dtype=torch_dtype, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id
    )
    slots = convert_rules.torch_slots({path: struct.shape for path, struct in structs.items()})
    num_bytes = sum(struct.size * struct.dtype.itemsize for struct in structs.values())
    with new_directory(destination) as partial:
        tensors = tensors_of_leaves(checkpoint.load_leaves(source), slots, num_bytes=num_bytes)
        torch_files.write_shards(partial, tensors, shard_bytes=shard_bytes)
        torch_files.write_json(partial / "config.json", fields)
        tokenizer.save(partial)
        beside = convert_rules.tokenizer_files(sentencepiece=(partial / "tokenizer.model").is_file())
        for name, values in beside.items():
            torch_files.write_json(partial / name, values)


def _fresh(path: str, shapes: Mapping[str, Shape], seed: int) -> np.ndarray:
    """torch's initialisation of a Linear: uniform within 1/√(inputs); each path draws its own."""
    bound = shapes[path.rpartition("/")[0] + "/kernel"][0] ** -0.5
    generator = np.random.default_rng([seed, zlib.crc32(path.encode())])
    return generator.uniform(-bound, bound, shapes[path]).astype(np.float32)


def _local(source: Path | str) -> Path:
    """The directory itself, or where the Hub's copy of it was put."""
    directory = Path(source)
    if directory.is_dir():
        return directory
    if directory.is_file():
        raise ValueError(f"{source} is a file; SAM's, which is one, is given with --sam")
    if directory.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise ValueError(f"no directory {source}")
    import huggingface_hub

    try:
        weights = torch_files.weight_patterns(huggingface_hub.list_repo_files(str(source)))
        wanted = ["config.json", "tokenizer.model", "tokenizer.json", *weights]
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=wanted))
    except Exception as error:
        raise ValueError(
            f"no directory {source}, and the Hub didn't give it: {checkpoint.first_line(error)}"
        ) from error


def _read_fields(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if (directory / "params").is_dir():
        raise ValueError(
            f"{directory} is an osprey-jax checkpoint already; --to-torch converts it back, "
            "--quantize takes it to low precision"
        )
    if not path.is_file():
        raise ValueError(f"no config.json in {directory}")
    fields = torch_files.read_json(path)
    if isinstance(fields, dict) and fields.get("model_type") == "sam":
        raise ValueError(f"{directory} holds transformers' SAM, which is given with --sam")
    if isinstance(fields, dict):
        return fields
    raise ValueError(f"{path} is not a JSON object")


def _refuse_existing(destination: Path | str) -> None:
    if Path(destination).exists():
        raise ValueError(f"{destination} exists already")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="convert_torch_ckpt.py",
        description="Convert a PyTorch Osprey checkpoint to osprey-jax, or back with --to-torch.",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="SRC DST", help="SRC is left out where --decoder or --sam is given"
    )
    parser.add_argument("--to-torch", action="store_true", help="from a checkpoint to the release's layout")
    parser.add_argument(
        "--sam", metavar="SRC", help="SAM's .pth file, or a directory of transformers' SamModel"
    )
    parser.add_argument("--vision-tower", metavar="FILE", help="open_clip's file, where the tower is apart")
    parser.add_argument("--decoder", metavar="DIR", help="a plain decoder (Vicuna) to start stage 2 from")
    parser.add_argument("--projector", metavar="FILE", help="stage 1's projector")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of all parameters; default: each keeps its own"
    )
    parser.add_argument(
        "--quantize", choices=tuple(quantize.SCHEMES), help="low precision of the decoder's matrices"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what --decoder has to initialise")
    args = parser.parse_intermixed_args(argv)
    if args.to_torch and (args.vision_tower or args.decoder or args.projector or args.dtype or args.quantize):
        parser.error("--to-torch takes SRC and DST only")
    if args.sam:
        if args.to_torch or args.vision_tower or args.decoder or args.projector or args.quantize or args.seed:
            parser.error("--sam takes SRC, DST and --dtype only; --to-torch alone tells SAM's checkpoints")
        args.paths.insert(0, args.sam)
    if args.decoder:
        args.paths.insert(0, args.decoder)
        if not args.vision_tower:
            parser.error("--decoder needs --vision-tower")
    if len(args.paths) != 2:
        parser.error("give SRC and DST, or DST alone with --decoder or --sam")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 after an error."""
    args = _parse(argv)
    # All work is on the host; without this Orbax would take hold of the machine's accelerators.
    jax.config.update("jax_platforms", "cpu")
    source, destination = args.paths
    try:
        if args.sam:
            convert_sam.convert(source, destination, dtype=args.dtype)
        elif args.to_torch and convert_sam.is_sam(source):
            convert_sam.to_torch(source, destination)
        elif args.to_torch:
            to_torch(source, destination)
        elif args.quantize and (Path(source) / "params").is_dir():
            if args.dtype or args.vision_tower or args.projector or args.decoder:
                raise ValueError(f"{source} is an osprey-jax checkpoint: give SRC, DST and --quantize only")
            to_low_precision(source, destination, args.quantize)
        else:
            convert(
                source, destination, vision_tower=args.vision_tower, projector=args.projector,
                plain_decoder=bool(args.decoder), dtype=args.dtype,
                quantization=args.quantize, seed=args.seed,
            )  # fmt: skip
    except ModuleNotFoundError as error:
        print(f"error: {error}; PyTorch's files need pip install 'osprey-jax[convert]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    print(f"wrote {destination}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
