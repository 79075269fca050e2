"""What the commands that ask about regions have in common: how to ask, and what to compute with."""

import argparse

from osprey_jax.prompt import PROTOCOLS, REGION
from osprey_jax.quantize import SCHEMES
from osprey_jax.request import Level, Request, request


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `requested` and `question_of` read, and `--dtype` and `--quantize`."""
    add = parser.add_argument
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--level", choices=("short", "detailed"), help="default: short")
    asked.add_argument(
        "--question",
        metavar="TEXT",
        help='asked of each region, as in "What colour is <region>?"',
    )
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="limit of an answer; default: 64, or 512 for long ones",
    )
    add("--temperature", type=float, default=0.0, help="of sampling; default: 0, the likeliest words")
    add("--top-p", type=float, default=1.0, help="samples among the likeliest tokens; default: 1, all")
    add("--seed", type=int, default=0, help="of sampling; default: 0")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends an answer before it; may be repeated",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, bfloat16 elsewhere")
    add("--quantize", choices=tuple(SCHEMES), help="low precision of the decoder's matrices; default: none")


def level_of(args: argparse.Namespace) -> Level:
    """The level of description; it counts where no question is given."""
    return args.level or "short"


def requested(args: argparse.Namespace) -> Request:
    """What is asked of every region. Raises ValueError as `Osprey.describe` does."""
    return request(
        level_of(args),
        question=args.question,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop=args.stop,
    )


def question_of(args: argparse.Namespace) -> str:
    """The question for people, with `<region>` in it."""
    question = args.question or PROTOCOLS[f"demo_{level_of(args)}"].question
    assert question is not None, "the demo's protocols have questions"
    return question.replace(REGION, "<region>")
