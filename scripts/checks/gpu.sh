#!/usr/bin/env bash
# What a machine with a GPU can tell, in one call: scripts/checks/gpu.py says what, and takes the same options.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" scripts/checks/gpu.py "$@"
