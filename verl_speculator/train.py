"""`verl-speculator train` as a module, for torchrun on several machines.

    torchrun --nproc_per_node=8 -m verl_speculator.train --speculator-type eagle3 --verifier-name-or-path BASE ...

Each of torchrun's processes becomes the trainer's. Started without torchrun it is the command itself.
"""

from __future__ import annotations

import sys

from verl_speculator.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
