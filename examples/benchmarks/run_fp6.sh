#!/bin/sh
# FP6 against FP16 under load: the published experiment with a GPU, a small one on the shipped model without.
# Arguments go to `python -m ds_fp6.bench serving`, whose --help lists them; PYTHON and OUT may be set.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python
fi
out=${OUT:-benchmark-results}
plots=
if "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('matplotlib') is None)"; then
    plots="--plots $out"
else
    echo "no plots: they need matplotlib (pip install 'ds-fp6[bench]')" >&2
fi
mkdir -p "$out"
# shellcheck disable=SC2086
exec "$PYTHON" -m ds_fp6.bench serving --json "$out/results.json" --log "$out/server.log" $plots "$@"
