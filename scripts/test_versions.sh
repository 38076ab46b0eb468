#!/usr/bin/env bash
# Runs the core tests with the oldest supported versions and with the newest, each in an environment of its own:
#
#     scripts/test_versions.sh [oldest|newest] [FOLDER] [EXTRAS]
#
# Without the first argument both. FOLDER keeps the environments (a temporary one by default; 7 GB, as an old torch
# comes with its CUDA libraries). EXTRAS are those of pyproject.toml whose tests are run, one after another (by default
# "lightly cli sentences open-clip lightly-train"; the losses are tested with lightly). The oldest are the lower bounds in
# pyproject.toml and nowhere else. PYTHON is the interpreter, 3.11 for the oldest torch.
set -euo pipefail
cd "$(dirname "$0")/.."
ages="${1:-oldest newest}"
folder="${2:-$(mktemp -d)}"
extras="${3:-lightly cli sentences open-clip lightly-train}"
export OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false
unset SOLO_LEARN_HOME LIGHTLY_HOME # no clones: their tests are skipped

lightly=(
    tests/test_compatibility.py tests/test_contrastive.py tests/test_distributed.py
    tests/test_identities.py tests/test_import.py tests/test_metrics.py tests/test_objectives.py
    tests/test_precision.py tests/test_properties.py tests/test_queue.py tests/test_recipes.py
    tests/engine tests/temperature tests/frameworks/test_lightly_losses.py tests/frameworks/test_lightly_modules.py
)
tests() { # EXTRA
    case "$1" in
        lightly) echo "${lightly[@]}" ;;
        cli) echo tests/experiment/test_pretrain.py ;;
        sentences) echo tests/frameworks/test_sentence_transformers.py ;;
        open-clip) echo tests/frameworks/test_open_clip.py ;;
        lightly-train) echo tests/frameworks/test_lightly_train.py ;;
        *) echo "$1 must be lightly, cli, sentences, open-clip or lightly-train." >&2 && return 1 ;;
    esac
}

bounds() { # NAME>=1.2 becomes NAME==1.2.*, and NAME>=1.2.3 NAME==1.2.3
    "${PYTHON:-python3}" - "$1" <<'PYTHON'
import re, sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
for requirement in project["dependencies"] + project["optional-dependencies"][sys.argv[1]]:
    if found := re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement):
        name, version = found.groups()
        print(f"{name}=={version}" + (".*" if version.count(".") < 2 else ""))
print("numpy<2")  # what a torch of that age was built with
print("pyarrow<22", "transformers<5", sep="\n")  # newer ones need a newer numpy or torch, and do not say so
PYTHON
}

run() { # AGE EXTRA
    local python="$folder/$1/bin/python" constraints=() files
    files="$(tests "$2")"
    if [ "$1" = oldest ]; then
        bounds "$2" >"$folder/$1/constraints.txt"
        constraints=(--constraint "$folder/$1/constraints.txt")
    fi
    "$python" -m pip install --quiet --upgrade "${constraints[@]}" ".[$2]" pytest hypothesis scikit-learn
    "$python" - <<'PYTHON'
import platform
from importlib.metadata import distributions

found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in distributions()}
names = ("torch", "torchvision", "pytorch-lightning", "lightly", "numpy")
names += ("sentence-transformers", "transformers", "lightly-train")
print("Python", platform.python_version(), *(f"{name} {found[name]}" for name in names if name in found))
PYTHON
    # Old libraries warn about themselves, torch 2.1 at every torch.load, and about what newer ones deprecate.
    # shellcheck disable=SC2086 # words are files
    "$python" -m pytest -q -p no:cacheprovider -W "ignore:TypedStorage is deprecated" -W ignore::DeprecationWarning $files
}

for age in $ages; do
    if [ ! -x "$folder/$age/bin/python" ]; then
        "${PYTHON:-python3}" -m venv "$folder/$age"
    fi
    for extra in $extras; do
        run "$age" "$extra"
    done
done
