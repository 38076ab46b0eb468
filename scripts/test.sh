#!/usr/bin/env bash
# Installs the project with everything its tests need into .venv (or the active environment) and runs them all.
# The solo-learn tests use the source at SOLO_LEARN_HOME, or fetch it, and say loudly when neither is possible.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh dev

# Threads that spin while they wait would slow the other processes of the distributed tests.
export OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false
ruff check .
ruff format --check .
lint-imports --no-cache
mypy
if [ -z "${SOLO_LEARN_HOME:-}" ]; then
    if python -m dystress_plugin.frameworks.solo install; then
        SOLO_LEARN_HOME="$(python -m dystress_plugin.frameworks.solo where)"
        export SOLO_LEARN_HOME
    fi
fi
python -m pytest --numprocesses 2 "$@"
