"""Runs the command: `python -m osprey_jax.label --help`."""

import sys

from osprey_jax.label.command import main

if __name__ == "__main__":
    sys.exit(main())
