#!/usr/bin/env bash
# Sourced by the other scripts: `. scripts/setup.sh EXTRA` makes .venv where no virtual environment is active, and
# installs the project into it, editable, with the extra. Does nothing the second time.
if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        "${PYTHON:-python3}" -m venv .venv
    fi
    # shellcheck disable=SC1091
    . .venv/bin/activate
fi
stamp="$VIRTUAL_ENV/.dystress-$1-$(cksum <pyproject.toml | tr ' ' '-')"
if [ ! -e "$stamp" ]; then
    python -m pip install --quiet --editable ".[$1]"
    touch "$stamp"
fi
