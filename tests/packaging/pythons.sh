#!/usr/bin/env bash
# The fast tests on other Pythons, each in an environment of its own: bash tests/packaging/pythons.sh python3.12 python3.13
# torch comes from the package index, and may be large.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
unset PYTHONPATH VIRTUAL_ENV
export OMP_NUM_THREADS=1
for python in "${@:-python3.12}"; do
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    folder=.ci/out/python-$version
    if [ ! -x "$folder/bin/python" ]; then "$python" -m venv "$folder"; fi
    "$folder/bin/pip" install -q -c constraints.txt -e ".[dev]"
    echo "=== Python $version"
    PATH="$PWD/$folder/bin:$PATH" "$folder/bin/pytest" -q -m "not slow" tests/unit
done
