#!/usr/bin/env bash
# Every script of the repository is one: bash's grammar and, where python3 is, Python's. What they do is tested elsewhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
shopt -s nullglob
shell=(.ci/run scripts/*.sh tests/*/*.sh) python=(tools/*.py tools/*/*.py tests/golden/*.py)
((${#shell[@]} > 5 && ${#python[@]} > 3))
for script in "${shell[@]}"; do bash -n "$script"; done
if command -v python3 >/dev/null; then
  python3 -c 'import sys
for path in sys.argv[1:]:
    compile(open(path, encoding="utf-8").read(), path, "exec")' "${python[@]}"
else
  echo "there is no python3: Python's scripts were not looked at"
fi
