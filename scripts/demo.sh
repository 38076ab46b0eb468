#!/usr/bin/env bash
# Installs the command and trains DySTreSS on scikit-learn's digits: no download, no GPU, a few minutes on two cores.
# Ends with the accuracies beside those of the untrained backbone, and the paths of the figures.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh cli
export OMP_WAIT_POLICY=passive
dystress pretrain method=dystress data=digits epochs="${EPOCHS:-12}" out="${OUT:-runs/demo}"
