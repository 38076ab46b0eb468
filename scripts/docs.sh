#!/usr/bin/env bash
# Builds the site into site/: every link is resolved, a warning is an error. `scripts/docs.sh serve` shows it at
# http://127.0.0.1:8000 and follows changes.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh docs
export NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true
mkdocs "${1:-build}" --strict "${@:2}"
