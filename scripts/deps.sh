#!/usr/bin/env bash
# Installs the Debian packages that Mesa needs and this machine lacks; what is installed is left as it is.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/deps.sh [--test]
Installs through apt, as root or with sudo, what is missing of the packages that build Mesa.
  --test   also those of the full test run: clang and its runtime (fuzzing), ccache (faster rebuilds), iproute2 (tests on two hosts),
           dpkg-dev and file (packages), man-db, mandoc, fish and zsh (what they make of manuals and completions)
Exit codes: 0 everything is there; 1 an installation failed; 2 wrong usage, or not Debian.
MESA_SKIP_DEPS=1 skips the check: for other distributions, where you install the counterparts yourself.
TEXT
}

packages=(g++ cmake ninja-build libdnnl-dev libyaml-cpp-dev libspdlog-dev libcli11-dev nlohmann-json3-dev
  libjpeg62-turbo-dev libpng-dev zlib1g-dev libopenmpi-dev openmpi-bin catch2 libboost-context-dev)
test_packages=(clang libclang-rt-dev ccache iproute2 dpkg-dev file man-db mandoc fish zsh)

for argument in "$@"; do
  case "$argument" in
    --test) packages+=("${test_packages[@]}") ;;
    -h | --help) usage; exit 0 ;;
    *) echo "deps.sh: unknown argument '$argument'" >&2; usage >&2; exit 2 ;;
  esac
done

if [[ ${MESA_SKIP_DEPS:-0} == 1 ]]; then
  echo "deps: not checked (MESA_SKIP_DEPS=1)"
  exit 0
fi

distribution=$(. /etc/os-release 2>/dev/null && echo "${ID:-unknown}" || echo unknown)
if [[ $distribution != debian ]] || ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  {
    echo "deps.sh: this is '$distribution'; packages can be installed on Debian 12 only. Mesa needs the counterparts of:"
    printf '  %s\n' "${packages[@]}"
    echo "(a C++20 compiler, CMake 3.25, Ninja, oneDNN, yaml-cpp, spdlog, CLI11, nlohmann-json, libjpeg-turbo, libpng, zlib, Catch2 2.13)."
    echo "Install them, then run the script again with MESA_SKIP_DEPS=1."
  } >&2
  exit 2
fi

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) || status=none
  [[ $status == installed ]] || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
  echo "deps: all ${#packages[@]} packages are installed"
  exit 0
fi

as_root=(env DEBIAN_FRONTEND=noninteractive)
if ((EUID != 0)); then
  if ! command -v sudo >/dev/null; then
    echo "deps.sh: missing: ${missing[*]}. Installing them takes root or sudo, and there is neither." >&2
    exit 1
  fi
  as_root=(sudo "${as_root[@]}")
fi
echo "deps: installing ${missing[*]}"
"${as_root[@]}" apt-get update -q || echo "deps: apt-get update had problems; trying with the lists that are there"
# --no-remove: rather fail than take something away that the machine has.
"${as_root[@]}" apt-get install -q -y --no-install-recommends --no-upgrade --no-remove "${missing[@]}" </dev/null
echo "deps: installed ${missing[*]}"
