#!/usr/bin/env bash
# Packs a build into one folder that runs elsewhere: the installed programs, the test program with its data, and the shared libraries that a
# bare machine lacks. What a machine with a GPU brings itself stays out: the driver, cuBLAS, cuDNN and the C library.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'TEXT'
Usage: scripts/bundle.sh FOLDER [BUILD]
  FOLDER   where the bundle goes (replaced if it is there), and as an archive FOLDER.tar.gz
  BUILD    a finished Release build (default: build)
The bundle may be moved; FOLDER/bin/mesa-train needs nothing to start, and on a GPU
the NVIDIA driver, cuBLAS and perhaps cuDNN.
TEXT
}
[[ ${1:-} == -h || ${1:-} == --help ]] && { usage; exit 0; }
(($# == 1 || $# == 2)) || { usage >&2; exit 2; }
[[ $1 == /* ]] && out=$1 || out=$called_from/$1
build=${2:-build}
if [[ -e $out && ! -x $out/bin/mesa-train ]]; then echo "bundle.sh: $out is there and is no bundle; remove it or name another folder" >&2; exit 1; fi
[[ -x $build/bin/mesa-train ]] || { echo "bundle.sh: $build holds no finished build (no bin/mesa-train)" >&2; exit 1; }

rm -rf "$out"
cmake --install "$build" --prefix "$out" --strip >/dev/null
lib=$(cd "$out" && echo lib*)
mkdir -p "$out/tests"
cmake --install "$build" --prefix "$out" --strip --component tests >/dev/null
cp -r tests/golden "$out/tests/golden"

# Libraries of the system that the programs load, but for those that belong to the machine.
ours='^(libc|libm|libdl|librt|libpthread|ld-linux.*|libcuda|libcudart|libcublas|libcublasLt|libcudnn.*|libnccl|libnvidia.*)[.]so'
for program in "$out"/bin/* "$out/$lib"/*.so; do
  ldd "$program" | awk '$2 == "=>" && $3 ~ /^\// {print $3}'
done | sort -u | while read -r library; do
  name=$(basename "$library")
  [[ $name =~ $ours || $library == "$PWD"/* ]] || [[ -e $out/$lib/$name ]] || cp -L "$library" "$out/$lib/$name"
done
rm -rf "${out:?}/$lib/cmake" "$out/include"

missing=$(for program in "$out"/bin/*; do ldd "$program"; done | awk '/not found/ {print $1}' | sort -u)
[[ -z $missing ]] || { echo "bundle.sh: still missing: $missing" >&2; exit 1; }
tar -C "$(dirname "$out")" -czf "$out.tar.gz" "$(basename "$out")"
printf 'bundle: %s, %s; %s.tar.gz, %s\n' "$out" "$(du -sh "$out" | cut -f1)" "$out" "$(du -sh "$out.tar.gz" | cut -f1)"
