#!/bin/sh
# Looks at reports in a real browser: that they are drawn without an error on the console, in time, without a network, on a wide screen and
# on a phone's, light and dark. Needs chromium (Debian: apt-get install chromium) and says so where it is missing.
#   scripts/check_report.sh [BUILD FOLDER] [FOLDER FOR THE SCREENSHOTS]
set -eu
cd "$(dirname "$0")/.."
build=${1:-build}
out=${2:-$(mktemp -d)}
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)
if [ -z "$browser" ]; then
  echo "skipped: there is no chromium on this machine"
  exit 0
fi
mkdir -p "$out"
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT

# A run of 100,000 steps with spikes and gaps, and three short ones of the program itself.
mkdir -p "$out/long"
awk 'BEGIN {
  srand(1)
  for (s = 1; s <= 100000; ++s) {
    loss = s % 9973 == 0 ? 40 : 7 / (1 + s / 3000) + 0.3 * rand()
    printf "{\"step\":%d,\"epoch\":%d,\"loss\":%s,\"lr\":%g,\"grad_norm\":%g,\"images_per_second\":%g,\"data_wait\":%g}\n", s, int((s + 999) / 1000),
           s % 20000 < 300 ? "null" : loss, 1e-3 * (1 - s / 100001), 1 + 5 * rand(), 800 + 50 * rand(), 0.02 * rand()
  }
}' > "$out/long/metrics.jsonl"
awk 'BEGIN {
  print "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr,images_per_second,activation_bytes_per_image,peak_bytes,seconds,step"
  for (e = 1; e <= 100; ++e) printf "%d,%g,%g,%g,%g,0.001,800,64000,123456789,60,%d\n", e, 7 / (1 + e / 3), 7 / (1 + e / 4), 80 - 60 / e, 99 - 40 / e, 1000 * e
}' > "$out/long/summary.csv"
tiny="--set model.depth=2 --set data.train_size=640 --set data.test_size=200 --set train.epochs=2 --set train.log_interval=1 --set train.health_interval=5"
for storage in exact int8 int4; do
  rm -rf "${out:?}/$storage"
  # shellcheck disable=SC2086
  "$build/bin/mesa-train" --config quickstart.yaml $tiny --set storage=$storage --output "$out/$storage" --quiet
done
cp "$out/int8/samples.json" "$out/int8/mistakes.json" "$out/int8/config.yaml" "$out/int8/memory.csv" "$out/long/"
"$build/bin/mesa-report" "$out/long" > /dev/null
"$build/bin/mesa-report" "$out/exact" "$out/int8" "$out/int4" -o "$out/several.html" > /dev/null

# A page in a frame as wide as the screen, since a browser's window has a least width; and what it is like once it is laid out and the
# pointer has been over each chart.
cat > "$out/probe.js" <<'JS'
addEventListener('load', () => {
  const page = document.querySelector('iframe').contentWindow, d = page.document, right = e => e.getBoundingClientRect().right;
  const wide = [...d.querySelectorAll('main *')].filter(e => !e.closest('.scroll,pre,svg,[hidden]') && right(e) > page.innerWidth + 1).length;
  const drawn = page.performance.now();
  let silent = 0;
  for (const plot of d.querySelectorAll('.plot')) {
    const r = plot.getBoundingClientRect(), point = {clientX: r.left + 0.6 * r.width, clientY: r.top + 9};
    plot.dispatchEvent(new page.PointerEvent('pointermove', point));
    const tip = plot.querySelector('.tip');
    if (tip.hidden || !/^step [0-9,]+\D+[0-9.]/.test(tip.textContent) || tip.getBoundingClientRect().left < 0 || right(tip) > page.innerWidth) ++silent;
    plot.dispatchEvent(new page.PointerEvent('pointerleave'));
  }
  const ground = page.getComputedStyle(d.body).backgroundColor.replace(/ /g, '');
  document.documentElement.dataset.probe = `milliseconds=${Math.round(drawn)} width=${page.innerWidth} ` +
    `overflow=${d.documentElement.scrollWidth > page.innerWidth ? 1 : 0} wide=${wide} silent=${silent} ` +
    `plots=${d.querySelectorAll('.plot').length} ground=${ground}`;
});
JS

frame() {  # page, width
  printf '<!DOCTYPE html><html style="color-scheme:light dark"><body style="margin:0"><iframe style="border:0;display:block;width:%spx;height:6000px" srcdoc="' "$2"
  sed -e 's/&/\&amp;/g' -e 's/"/\&quot;/g' "$1"
  printf '"></iframe><script>'
  cat "$out/probe.js"
  printf '</script></body></html>\n'
}

failed=0
complain() { echo "FAILED: $*"; failed=1; }
browse() { timeout 120 "$browser" --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$profile" --enable-logging=stderr "$@"; }
field() { echo "$said" | tr ' ' '\n' | sed -n "s/^$1=//p"; }

check() {  # name, page, width, light or dark
  name=$1 page=$2 width=$3
  scheme=--blink-settings=preferredColorScheme=1
  [ "$4" = dark ] && scheme=--blink-settings=preferredColorScheme=0
  frame "$page" "$width" > "$out/frame.html"
  browse "$scheme" --window-size=1280,1600 --dump-dom "file://$out/frame.html" > "$out/dom.txt" 2> "$out/console.txt" ||
    complain "$name: the browser ended with $?"
  said=$(sed -n 's/.*data-probe="\([^"]*\)".*/\1/p' "$out/dom.txt" | head -1)
  browse "$scheme" --window-size="$((width < 500 ? 500 : width)),4200" --screenshot="$out/$name.png" "file://$out/frame.html" > /dev/null \
    2>> "$out/console.txt" || complain "$name: no screenshot"
  grep -q 'CONSOLE' "$out/console.txt" && complain "$name: $(grep -m1 CONSOLE "$out/console.txt")"
  if [ -z "$said" ]; then
    complain "$name: the page said nothing"
    return
  fi
  echo "$name: $(wc -c < "$page") bytes, $said"
  [ "$(wc -c < "$page")" -lt 3000000 ] || complain "$name: larger than 3 MB"
  [ "$(field width)" = "$width" ] || complain "$name: $(field width) pixels wide"
  [ "$(field milliseconds)" -lt 2000 ] || complain "$name: drawn in more than 2 s"
  [ "$(field overflow) $(field wide)" = "0 0" ] || complain "$name: wider than its window"
  [ "$(field silent)" = 0 ] || complain "$name: a chart that shows no values under the pointer"
  [ "$(field plots)" -ge 6 ] || complain "$name: only $(field plots) charts"
  case "$4 $(field ground)" in "dark rgb(20,23,26)" | "light rgb(255,255,255)") ;; *) complain "$name: the ground is $(field ground)" ;; esac
}

for width in 1280 375; do
  for mode in light dark; do
    check "long-$width-$mode" "$out/long/report.html" "$width" "$mode"
    check "int8-$width-$mode" "$out/int8/report.html" "$width" "$mode"
    check "several-$width-$mode" "$out/several.html" "$width" "$mode"
  done
done
rm -f "$out/frame.html" "$out/probe.js" "$out/dom.txt" "$out/console.txt"
[ $failed = 0 ] && echo "reports are as they should be; screenshots are in $out"
exit $failed
