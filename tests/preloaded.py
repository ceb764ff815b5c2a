"""What every process of a test would do again: reading the project's code for the runs' identity."""

import train

for file in [*train.ROOT.glob("*.py"), *train.ROOT.glob("*/*.py")]:
    train.read_module(file.read_bytes())
