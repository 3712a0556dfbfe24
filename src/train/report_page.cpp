#include "report_page.h"

#include "mesa/base/error.h"
#include "report_chart.h"

namespace mesa::report {
namespace {

// The colours are those of Okabe and Ito, which colour-blind people tell apart; dark ones are lightened on a dark ground and bright ones
// darkened on a light one, so that a line has a contrast of 3 to 1 or more.
constexpr const char* kStyle = R"css(
:root{color-scheme:light dark;--ground:#fff;--card:#f6f7f9;--ink:#1a1d21;--soft:#5b6470;--rule:#d9dde3;--exact:#a3abb6;
--c0:#0072b2;--c1:#c05000;--c2:#00805c;--c3:#a8517f;--c4:#9a7400;--c5:#2f8fc4;--c6:#444b55;--c7:#7a5195;--odd:#c0392b}
@media (prefers-color-scheme:dark){:root{--ground:#14171a;--card:#1d2126;--ink:#e8eaed;--soft:#a2abb6;--rule:#343a42;--exact:#6b7480;
--c0:#56b4e9;--c1:#f0883e;--c2:#2bbd92;--c3:#e39ac4;--c4:#e6c229;--c5:#8fd0ff;--c6:#c5ccd6;--c7:#c3a2dd;--odd:#ff7b6b}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:1240px;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.15rem;margin:2rem 0 .6rem;border-bottom:1px solid var(--rule);padding-bottom:.2rem}
h3{font-size:.95rem;margin:0}
p{margin:.3rem 0}.soft,.none{color:var(--soft)}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(148px,1fr));gap:.6rem;margin:.8rem 0;padding:0}
.facts div{background:var(--card);border-radius:6px;padding:.5rem .7rem}
.facts dt{color:var(--soft);font-size:.8rem}.facts dd{margin:0;font-size:1.15rem;font-variant-numeric:tabular-nums}
.facts small{display:block;font-size:.78rem;color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:1rem}
.chart{margin:0;background:var(--card);border-radius:6px;padding:.6rem;min-width:0}
.legend{font-size:.8rem;color:var(--soft);min-height:1.2em}.key{margin-right:.8rem;white-space:nowrap}
.key i{display:inline-block;width:18px;height:0;border-top:3px solid;margin-right:.3rem;vertical-align:middle}.key i.dashed{border-top-style:dashed}
.key i.odd{border-top-color:var(--odd)}.key i.box{height:10px;border:0;width:10px;background:currentColor}
.plot{position:relative;height:210px;margin:.5rem .9rem 1.5rem 3.4rem;touch-action:pan-y}
.plot:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible;pointer-events:none}
.plot path{fill:none;vector-effect:non-scaling-stroke}
.grid{stroke:var(--rule);stroke-width:1}.line{stroke-width:1.6;stroke-linejoin:round;stroke-linecap:round}.line.dashed{stroke-dasharray:5 4;stroke-width:2}.line.band{opacity:.35;stroke-width:1}
path.odd{stroke:var(--odd);stroke-width:2}
.axes span{position:absolute;font-size:.74rem;color:var(--soft);font-variant-numeric:tabular-nums;white-space:nowrap}
.axes .y{right:calc(100% + 6px);transform:translateY(-50%)}.axes .x{top:calc(100% + 4px);transform:translateX(-50%)}
.cursor{position:absolute;top:0;bottom:0;width:1px;background:var(--soft);pointer-events:none}
.tip{position:absolute;top:4px;z-index:1;pointer-events:none;background:var(--ground);border:1px solid var(--rule);border-radius:4px;
padding:.25rem .45rem;font-size:.78rem;white-space:nowrap;font-variant-numeric:tabular-nums;box-shadow:0 1px 4px #0003}
.tip div{display:flex;gap:.4rem;align-items:center}.tip i{width:10px;height:3px}
[hidden]{display:none!important}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.25rem .6rem;border-bottom:1px solid var(--rule);white-space:nowrap}th:first-child,td:first-child{text-align:left}
th{color:var(--soft);font-weight:600}
.bars{display:grid;grid-template-columns:minmax(0,1fr);gap:.55rem;font-size:.86rem}
.bars .label{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 1rem}.bars .label span:last-child{color:var(--soft);font-variant-numeric:tabular-nums}
.bar{display:flex;height:9px;margin-top:2px}.bar i{display:block;height:100%;min-width:1px;background:currentColor}.bar .exact,.key .exact.box{background:var(--exact)}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(104px,1fr));gap:.6rem;margin:0;padding:0;list-style:none}
.pictures li{background:var(--card);border-radius:6px;padding:.4rem;font-size:.78rem;text-align:center}
.pictures img{width:80px;height:80px;object-fit:contain;image-rendering:pixelated;display:block;margin:0 auto .25rem}
.wrong{color:var(--odd)}
.classes{display:flex;flex-wrap:wrap;gap:1rem 2rem;align-items:flex-start}.classes>*{min-width:0;max-width:100%}
.classes img{max-width:100%;height:auto;background:#fff;border-radius:6px}
details{margin:.6rem 0}summary{cursor:pointer}pre{background:var(--card);border-radius:6px;padding:.7rem;overflow-x:auto;font-size:.8rem}
.env{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.15rem 1rem;font-size:.88rem}.env dt{color:var(--soft)}.env dd{margin:0}
.notes{background:var(--card);border-left:4px solid var(--c1);border-radius:4px;padding:.5rem .8rem;margin:.8rem 0}.notes ul{margin:.2rem 0;padding-left:1.2rem}
)css";

constexpr const char* kScript = R"js(
(() => {
  const data = JSON.parse(document.getElementById('data').textContent);
  const text = v => v === null ? 'not finite' : v !== 0 && (Math.abs(v) >= 1e6 || Math.abs(v) < 1e-3) ? v.toExponential(2) : String(v);
  const nearest = (p, x) => {
    let low = 0, high = p.length / 2 - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (p[2 * middle] < x) low = middle; else high = middle;
    }
    return 2 * (Math.abs(p[2 * low] - x) <= Math.abs(p[2 * high] - x) ? low : high);
  };
  const add = (to, kind, name) => { const e = to.appendChild(document.createElement(kind)); e.className = name; return e; };
  for (const plot of document.querySelectorAll('.plot')) {
    const chart = data[plot.dataset.chart];
    if (!chart) continue;
    const cursor = add(plot, 'i', 'cursor'), tip = add(plot, 'div', 'tip');
    tip.setAttribute('role', 'status');
    let at = 1;
    const hide = () => { cursor.hidden = tip.hidden = true; };
    const show = share => {
      at = Math.min(1, Math.max(0, share));
      const [first, last] = chart.x, x = first + at * (last - first);
      cursor.style.left = 100 * at + '%';
      tip.replaceChildren();
      let step = null;
      for (const curve of chart.curves) {
        if (curve.points.length === 0) continue;
        const i = nearest(curve.points, x), there = curve.points[i].toLocaleString('en');
        if (step === null) add(tip, 'div', '').textContent = 'step ' + (step = there);
        const row = add(tip, 'div', 'c' + curve.colour);
        add(row, 'i', '').style.background = 'currentColor';
        const words = add(row, 'span', '');
        words.style.color = 'var(--ink)';
        words.textContent = curve.name + ' ' + text(curve.points[i + 1]) + (there === step ? '' : ' at ' + there);
      }
      cursor.hidden = tip.hidden = false;
      const width = plot.clientWidth, free = width - tip.offsetWidth;
      tip.style.left = Math.min(free, Math.max(-40, at < 0.5 ? at * width + 8 : at * width - 8 - tip.offsetWidth)) + 'px';
    };
    hide();
    plot.addEventListener('pointermove', e => { const r = plot.getBoundingClientRect(); show((e.clientX - r.left) / r.width); });
    plot.addEventListener('pointerleave', hide);
    plot.addEventListener('blur', hide);
    plot.addEventListener('keydown', e => {
      const step = { ArrowLeft: -0.01, ArrowRight: 0.01 }[e.key];
      if (step) { show(at + step); e.preventDefault(); } else if (e.key === 'Escape') hide();
    });
  }
})();
)js";

std::string colours() {
  std::string out;
  for (int i = 0; i < kColours; ++i) out += concat(".c", i, "{color:var(--c", i, ");stroke:var(--c", i, ")}");
  return out;
}

/// JSON within a script element: no "</script>", no "<!--".
std::string in_script(const std::string& json) {
  std::string out;
  for (const char c : json) out += c == '<' ? "\\u003c" : c == '>' ? "\\u003e" : c == '&' ? "\\u0026" : std::string(1, c);
  return out;
}

}  // namespace

std::string page(const std::string& title, const std::string& body, const std::string& data) {
  return "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n"
         "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
         "script-src 'unsafe-inline'\"/>\n"
         "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n<title>" +
         escape(title) + "</title>\n<style>" + kStyle + colours() + "\n</style>\n</head>\n<body>\n<main>\n" + body +
         "</main>\n<script type=\"application/json\" id=\"data\">" + in_script(data) + "</script>\n<script>" + kScript +
         "</script>\n</body>\n</html>\n";
}

}  // namespace mesa::report
