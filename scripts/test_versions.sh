#!/usr/bin/env bash
# Runs the core tests with the oldest supported versions and with the newest, each in an environment of its own:
#
#     scripts/test_versions.sh [oldest|newest] [FOLDER]
#
# Without the first argument both. FOLDER keeps the environments (a temporary one by default; 7 GB, as an old torch
# comes with its CUDA libraries). The oldest are the lower bounds in pyproject.toml and nowhere else: first those of the
# losses and of lightly, then those of the command. PYTHON is the interpreter, 3.11 for the oldest torch.
set -euo pipefail
cd "$(dirname "$0")/.."
ages="${1:-oldest newest}"
folder="${2:-$(mktemp -d)}"
export OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false
unset SOLO_LEARN_HOME LIGHTLY_HOME # no clones: their tests are skipped

losses=(
    tests/test_compatibility.py tests/test_contrastive.py tests/test_distributed.py
    tests/test_identities.py tests/test_import.py tests/test_metrics.py tests/test_objectives.py
    tests/test_precision.py tests/test_properties.py tests/test_queue.py tests/test_recipes.py
    tests/engine tests/temperature tests/frameworks/test_lightly_losses.py tests/frameworks/test_lightly_modules.py
)
command=(tests/experiment/test_pretrain.py)

bounds() { # NAME>=1.2 becomes NAME==1.2.*, and NAME>=1.2.3 NAME==1.2.3
    "${PYTHON:-python3}" - "$1" <<'PYTHON'
import re, sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
for requirement in project["dependencies"] + project["optional-dependencies"][sys.argv[1]]:
    if found := re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement):
        name, version = found.groups()
        print(f"{name}=={version}" + (".*" if version.count(".") < 2 else ""))
print("numpy<2")  # what a torch of that age was built with
PYTHON
}

run() { # AGE EXTRA TESTS...
    local python="$folder/$1/bin/python" constraints=()
    if [ "$1" = oldest ]; then
        bounds "$2" >"$folder/$1/constraints.txt"
        constraints=(--constraint "$folder/$1/constraints.txt")
    fi
    "$python" -m pip install --quiet --upgrade "${constraints[@]}" ".[$2]" pytest hypothesis
    "$python" - <<'PYTHON'
import platform
from importlib.metadata import version

names = ("torch", "torchvision", "pytorch-lightning", "lightly", "numpy")
print("Python", platform.python_version(), *(f"{name} {version(name)}" for name in names))
PYTHON
    # Old libraries warn about themselves, torch 2.1 at every torch.load, and about what newer ones deprecate.
    "$python" -m pytest -q -p no:cacheprovider -W "ignore:TypedStorage is deprecated" -W ignore::DeprecationWarning \
        "${@:3}"
}

for age in $ages; do
    if [ ! -x "$folder/$age/bin/python" ]; then
        "${PYTHON:-python3}" -m venv "$folder/$age"
    fi
    run "$age" lightly "${losses[@]}"
    run "$age" cli "${command[@]}"
done
