#!/usr/bin/env python
"""Queue the jobs of a chain or recipe: `elastic-megatron submit`, for those who keep scripts beside Megatron's."""

import sys

from elastic_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["submit", *sys.argv[1:]]))
