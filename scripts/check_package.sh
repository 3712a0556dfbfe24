#!/usr/bin/env bash
# The packages of a finished build, looked at as their users get them: written by cpack, unpacked elsewhere, run, and built against.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'TEXT'
Usage: scripts/check_package.sh [BUILD]
  BUILD   a finished Release build (default: build); packages are left in BUILD/packages, and what was tried in BUILD/package-check
Debian packages are written and looked at where dpkg-dev and file are installed.
Exit code: 0 if all is well.
TEXT
}
[[ ${1:-} == -h || ${1:-} == --help ]] && { usage; exit 0; }
(($# <= 1)) || { usage >&2; exit 2; }
source=$PWD
build=$(cd "${1:-build}" && pwd)
packages=$build/packages tried=$build/package-check
rm -rf "$packages" "$tried"
mkdir -p "$packages" "$tried/elsewhere" "$tried/debian"
complain() { echo "check_package.sh: $*" >&2; exit 1; }

generators=TGZ
command -v dpkg-shlibdeps >/dev/null && command -v file >/dev/null && generators="TGZ;DEB"
(cd "$build" && cpack -G "$generators" -B "$packages") >"$tried/cpack.log" 2>&1 || { cat "$tried/cpack.log"; complain "cpack failed"; }
rm -rf "$packages/_CPack_Packages"
(cd "$packages" && stat -c '%10s  %n' -- *)

# What belongs in a tree that may be moved, wherever it came from: $1 its root.
check_tree() {
  local root=$1 file program
  for file in bin/mesa-{train,eval,bench,report} include/mesa/nn/layers.h share/mesa/configs/{quickstart,recipes/deit_s}.yaml \
    share/doc/mesa/{README.md,docs/config.md,data/README.md,examples/train_own_model/main.cpp,scripts/slurm.sh}; do
    [[ -s $root/$file ]] || complain "$root has no $file, or an empty one"
  done
  for program in mesa-{train,eval,bench,report}; do
    for file in "$root"/share/{bash-completion/completions/$program,zsh/*/_$program,fish/vendor_completions.d/$program.fish}; do
      [[ -s $file ]] || complain "$file is missing or empty"
    done
  done
  for file in man1/mesa-{train,eval,bench,report}.1 man5/mesa.yaml.5; do
    zcat -f "$root/share/man/$file"* | grep -c '^\.TH ' >/dev/null || complain "$root has no share/man/$file, or an empty one"
  done
  # Documents link to each other and to examples; sources, which some also name, are not installed.
  local links link
  links=$(cd "$root/share/doc/mesa" && grep -roE '\]\(([a-zA-Z0-9_./-]+\.(md|svg)|[./]*examples/[a-zA-Z0-9_./-]+)\)' --include='*.md' . |
    sed -E 's/^([^:]*):\]\((.*)\)$/\1 \2/') || complain "$root has documents without links"
  while read -r file link; do
    [[ -e $root/share/doc/mesa/$(dirname "$file")/$link ]] || complain "$file links to $link, which is not installed"
  done <<<"$links"
  file=$(find "$root/share/doc" -name CMakeCache.txt -o -name CMakeFiles)
  [[ -z $file ]] || complain "a build was installed: $file"
  local binaries=("$root"/bin/mesa-* "$root"/lib*/libmesa*.so*) found=0 sections
  grep -lF "$source/" "${binaries[@]}" || found=$?  # 1: nowhere
  ((found == 1)) || complain "these files name the folder they were built in, or cannot be read"
  if command -v readelf >/dev/null; then
    for file in "${binaries[@]}"; do
      sections=$(readelf -SW "$file") || complain "$file is no program"
      [[ $sections != *.symtab* && $sections != *.debug_* ]] || complain "$file is not stripped"
      [[ $(readelf -d "$file") != *"[libcu"[bd]* ]] || complain "$file does not start without CUDA's libraries"
    done
  fi
  file=$(find "$root" ! -type l \( -perm /022 -o -type d ! -perm -755 -o ! -perm -444 \))
  [[ -z $file ]] || complain "permissions: $file"
}

# A short life of a run by the programs of a tree: trained, resumed, evaluated, compared and drawn. $1 its root.
try_programs() {
  local bin=$1/bin runs=$tried/runs
  rm -rf "$runs" && mkdir "$runs"
  local tiny=(--set data.train_size=256 --set data.test_size=64 --set model.depth=1)
  (  # joined by &&: in front of || bash does not stop at what fails
    cd "$runs" &&
      "$bin/mesa-train" --config quickstart.yaml "${tiny[@]}" --set train.epochs=1 --output a --quiet &&
      "$bin/mesa-train" --resume --output a --set train.epochs=2 --quiet &&
      "$bin/mesa-eval" a --json a.json &&
      "$bin/mesa-report" a -o r.html &&
      "$bin/mesa-train" --config deit_s.yaml --set data.path=/imagenet --set storage=int4 --dry-run >plan.txt &&
      "$bin/mesa-bench" --config quickstart.yaml "${tiny[@]}" --set train.batch_size=8 --storage exact,int8 --steps 1 --warmup 0 >bench.txt &&
      for file in r.html a.json plan.txt bench.txt; do [[ -s $file ]] || complain "$file is missing or empty"; done
  ) >"$tried/programs.log" 2>&1 || { cat "$tried/programs.log"; complain "the programs of $1 fail"; }
  "$bin/mesa-train" --version | sed -n 1p
}

tar -C "$tried/elsewhere" -xzf "$packages"/mesa-*.tar.gz
tree=$(echo "$tried"/elsewhere/mesa-*)
check_tree "$tree"
try_programs "$tree"
echo "the archive runs from $tree"

# Programs of other people, by find_package(mesa).
for example in train_own_model add_codec; do
  cmake -S "$tree/share/doc/mesa/examples/$example" -B "$tried/$example" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_PREFIX_PATH="$tree" -DCMAKE_CXX_FLAGS="-Wall -Wextra -Werror" >"$tried/$example.log" &&
    cmake --build "$tried/$example" >>"$tried/$example.log" || { cat "$tried/$example.log"; complain "$example does not build"; }
done
"$tried/add_codec/add_codec" >/dev/null
lines=$(wc -l <examples/train_own_model/main.cpp)
((lines < 100)) || complain "examples/train_own_model/main.cpp has $lines lines; it says that fewer than 100 do"
(cd / && "$tried/train_own_model/train_own_model") | tee "$tried/example.txt"
awk '/^epoch/ {loss[++n] = $4} /^top-1/ {top1 = $2}
  END {if (!(n > 1 && loss[n] < loss[1] / 5 && top1 > 90)) exit 1}' "$tried/example.txt" || complain "the example has not learned"

# A bundle for bare machines, unpacked in another place: it starts there, and its tests find their data in it.
scripts/bundle.sh "$tried/bundle" "$build"
moved=$(mktemp -d)
trap 'rm -rf "$moved"' EXIT
tar -C "$moved" -xzf "$tried/bundle.tar.gz" && rm -rf "$tried/bundle" "$tried/bundle.tar.gz"
from=$(for file in "$moved"/bundle/bin/*; do ldd "$file"; done | awk '$2 == "=>" {print $3}' | grep -F "$source/" || true)
[[ -z $from ]] || complain "the bundle's programs load $from"
"$moved/bundle/bin/mesa-train" --version | sed -n 1p
(cd / && MESA_TEST_SOURCE_DIR=$moved/bundle "$moved/bundle/bin/mesa-tests" -w NoTests "golden: logits*") || complain "the bundle's tests fail"
grep -qx 'kernels/norm_test' "$moved/bundle/tests/device_tests.txt" || complain "the bundle has no list of tests for the device"

if [[ $generators == *DEB* ]]; then
  for package in "$packages"/*.deb; do dpkg-deb -x "$package" "$tried/debian"; done
  check_tree "$tried/debian/usr"
  control() { dpkg-deb -f "$packages/$1"_*.deb "$2"; }
  [[ $(control mesa Depends) == *libdnnl2* && $(control mesa Depends) != *mpi* ]] || complain "mesa depends on $(control mesa Depends)"
  for file in "$tried"/debian/usr/bin/mesa-* "$tried"/debian/usr/lib*/libmesa*; do
    dynamic=$(readelf -d "$file") || complain "$file is no program"
    [[ $dynamic != *RPATH* && $dynamic != *RUNPATH* ]] || complain "$file has a run path"
  done
  said=$(zcat "$tried/debian/usr/share/doc/mesa/changelog.Debian.gz" | dpkg-parsechangelog -l- 2>&1) &&
    [[ $said == *"Maintainer: $(control mesa Maintainer)"* && $said != *warning* ]] || complain "the changelog is malformed: $said"
  if compgen -G "$packages/mesa-mpi_*.deb" >/dev/null; then
    [[ $(control mesa-mpi Depends) == *"mesa (= "*mpi* ]] || complain "mesa-mpi depends on $(control mesa-mpi Depends)"
  fi
  # The system would find the library by ldconfig.
  LD_LIBRARY_PATH=$(echo "$tried"/debian/usr/lib*) "$tried/debian/usr/bin/mesa-train" --config deit_s.yaml --set data.path=/imagenet --dry-run >/dev/null
  echo "the Debian packages are as they should be; mesa needs $(control mesa Depends)"
fi
