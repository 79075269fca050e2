"""`python convert_torch_ckpt.py SRC DST`, the same as the installed command `osprey-convert`."""

import sys

from osprey_jax.convert import main

if __name__ == "__main__":
    sys.exit(main())
