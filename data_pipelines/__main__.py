"""The data sets' commands: `python -m data_pipelines {prepare,validate,inspect,stats}`."""

import argparse
import importlib
import os
import sys
import textwrap
from collections.abc import Sequence

PROGRAM = "python -m data_pipelines"
USAGE_ERROR = 2
INTERRUPTED = 130
"""The exit status of what Ctrl-C has ended."""

COMMANDS = {
    "prepare": ("builder", "writes a data set as ArrayRecord files, from which training reads fast"),
    "validate": ("validation", "names every fault of a JSONL file of your own data at once"),
    "inspect": ("inspection", "shows one sample as the model will see it"),
    "stats": ("statistics", "tells how long samples are, how many regions they name, what buckets waste"),
}
"""The module that offers `add_arguments` and `run`, and what it is for."""

_EXAMPLES = f"""\
examples:
  {PROGRAM} inspect --source shapes --index 0 --figure sample.png
  {PROGRAM} inspect --source osprey_conversation --annotations osprey_conversation.json \\
      --images coco/imgs --index 3 --tokenizer checkpoints/osprey
  {PROGRAM} stats --source custom --annotations mine.jsonl --buckets 2048x32,1408x16
  {PROGRAM} validate mine.jsonl
  {PROGRAM} prepare --source vg --annotations vg/vg_train_with_mask.json \\
      --images vg/image --output prepared/vg
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, 1 where it found something wrong, 2 for wrong use."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(arguments)
        if sys.stdout is not None:  # it may be closed
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads on; Python would complain once more when it closes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ImportError as error:
        _complain(f"{arguments[0]} needs a package that is missing or broken: {error}")
    except (ValueError, OSError) as error:
        _complain(str(error))
    return USAGE_ERROR


def _run(arguments: Sequence[str]) -> int:
    top = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} {{{','.join(COMMANDS)}}} …",
        description="Looks at data sets and makes them ready for training.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    if not arguments or arguments[0] in ("-h", "--help"):
        top.description = f"{top.description}\n\n{_commands()}\n{_EXAMPLES}\n{_sources()}"
        print(top.format_help(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else USAGE_ERROR
    command = top.parse_args(arguments[:1]).command
    name, purpose = COMMANDS[command]
    # Imported when asked for: what one command needs must not slow down or hinder the others.
    module = importlib.import_module(f"data_pipelines.{name}")
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {command}",
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    status: int = module.run(parser.parse_args(arguments[1:]))
    return status


def _complain(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def _commands() -> str:
    return (
        "commands:\n"
        + "".join(f"  {name:<10}{purpose}\n" for name, (_, purpose) in COMMANDS.items())
        + f"{PROGRAM} COMMAND --help tells the options of each.\n"
    )


def _sources() -> str:
    """Every source with what it needs and where to get it."""
    from data_pipelines.catalog import CATALOG

    usual = ("annotations", "images")
    lines = [
        f"sources; each needs {_options(usual)} unless it says otherwise. Paths are those under a data root:"
    ]
    for name, entry in CATALOG.items():
        needs = "" if entry.needs == usual else f"(Needs {_options(entry.needs)}.) "
        lines += textwrap.wrap(
            needs + entry.get,
            108,
            break_on_hyphens=False,
            initial_indent=f"  {name:<21}",
            subsequent_indent=" " * 23,
        )
    return "\n".join(lines)


def _options(needs: Sequence[str]) -> str:
    return " and ".join(f"--{need}" for need in needs) or "neither"


if __name__ == "__main__":
    sys.exit(main())
