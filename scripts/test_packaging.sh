#!/usr/bin/env bash
# Builds wheel and sdist, checks what an index would show of them, and installs each into a clean environment, where the
# loss has to be imported and the command to train:
#
#     scripts/test_packaging.sh [DIST]
#
# DIST keeps the two files (a temporary folder by default). FAST=1 lets the environments see the packages of the Python
# that runs this, so that nothing but this package is installed. Needs build and twine: the extra `tools`.
set -euo pipefail
cd "$(dirname "$0")/.."
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
dist="${1:-$work/dist}"
python="$(command -v python)"

"$python" -m build --outdir "$dist" .
"$python" -m twine check --strict "$dist"/*
for file in "$dist"/*.whl "$dist"/*.tar.gz; do
    environment="$work/$(basename "$file")-environment"
    "$python" -m venv "$environment"
    if [ -n "${FAST:-}" ]; then
        "$python" -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
            >"$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
        "$environment/bin/pip" install --quiet --no-deps --force-reinstall "$file"
    else
        "$environment/bin/pip" install --quiet "$file[cli]"
    fi
    (
        cd "$work" # where no clone is on the path
        unset PYTHONPATH
        "$environment/bin/python" - "$environment" <<'PYTHON'
import sys

import torch

import dystress_plugin as dp

assert dp.__file__.startswith(sys.argv[1]), dp.__file__
loss = dp.ContrastiveLoss("dystress")
loss(*torch.randn(2, 8, 4, requires_grad=True)).backward()
print("imported", dp.__version__, "with", len(dp.recipes.METHODS), "methods")
PYTHON
        "$environment/bin/dystress" --version
        "$environment/bin/dystress" pretrain data=digits epochs=1 backbone=test_resnet progress=false \
            out="run-$(basename "$file")" accelerator=cpu
    )
done
echo "wheel and sdist install, import and train"
