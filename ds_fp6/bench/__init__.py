"""Benchmarks: ``python -m ds_fp6.bench COMMAND``, or ``ds-fp6 bench COMMAND``. Each command is a module of its own."""
