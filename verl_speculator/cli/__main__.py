import sys

from verl_speculator.cli import main

sys.exit(main())
