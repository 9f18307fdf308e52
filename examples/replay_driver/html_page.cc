#include "examples/replay_driver/html_page.h"

namespace pristine::replay_driver {

const char* const kPageStyle = R"css(
:root{color-scheme:light dark;--page:#f6f6f3;--card:#fdfdfc;--ink:#14130f;--ink2:#55534d;--muted:#83807a;--grid:#e6e4de;
--axis:#c6c3bb;--edge:#e3e1da;--real:#2a78d6;--band:#2a78d63a;--pad:#eb6834;--bad:#c93030;--badbg:#fbeaea;--good:#1a7f2c;
--goodbg:#e6f4e8;--warn:#8a5a00;--warnbg:#fbf0da;--link:#1c5cab;--hit:#fff3c4}
@media(prefers-color-scheme:dark){:root{--page:#0f0f0e;--card:#1a1a19;--ink:#f4f3ef;--ink2:#c1bfb6;--muted:#908d85;
--grid:#2b2b29;--axis:#4a4944;--edge:#2b2b29;--real:#3987e5;--band:#3987e555;--pad:#d9632f;--bad:#f0736f;--badbg:#3a1d1c;
--good:#5fc26f;--goodbg:#17301b;--warn:#e5b04a;--warnbg:#352a12;--link:#86b6ef;--hit:#3b3413}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:14px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",
sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 24px 56px}
h1{font-size:22px;line-height:1.2;margin:0;font-weight:650}
h2{font-size:16px;margin:0 0 10px;font-weight:650}
h3{font-size:13px;margin:18px 0 8px;font-weight:650;color:var(--ink2)}
a{color:var(--link);text-underline-offset:2px}
code{font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
section{margin-top:20px;background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:18px 20px}
header{display:flex;flex-wrap:wrap;gap:4px 12px;align-items:center}
header p{flex-basis:100%;margin:2px 0 0;color:var(--ink2);overflow-wrap:anywhere}
.pill{padding:2px 11px;border-radius:99px;font-weight:600;font-size:13px}
.pill.good,.status.good{background:var(--goodbg);color:var(--good)}
.pill.bad,.status.bad{background:var(--badbg);color:var(--bad)}
.status.warn{background:var(--warnbg);color:var(--warn)}
.status{padding:1px 8px;border-radius:99px;font-weight:600;white-space:nowrap;font-size:12px}
.reason{margin:14px 0 0;padding:11px 15px;border-radius:8px;background:var(--badbg);border-left:3px solid var(--bad);
overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(6,1fr);gap:0;padding:0;overflow:hidden}
.tile{padding:14px 12px 13px 18px;border-right:1px solid var(--edge);min-width:0}
.tile:last-child{border-right:0}
.tile span,.tile small{display:block;color:var(--ink2);font-size:12px;white-space:nowrap;overflow:hidden;
text-overflow:ellipsis}
.tile b{display:block;font-size:24px;line-height:1.35;font-weight:600;letter-spacing:-.01em}
.tile.bad b{color:var(--bad)}
.note,.empty{color:var(--ink2);font-size:13px;margin:0 0 10px;max-width:78ch}
figure{margin:18px 0 0}
figcaption{display:flex;flex-wrap:wrap;gap:2px 18px;justify-content:space-between;align-items:baseline;font-size:13px;
margin-bottom:6px}
figcaption b{font-weight:600}
figcaption em{font-style:normal;font-weight:400;color:var(--ink2);margin-left:4px}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;color:var(--ink2);font-size:12px}
.legend span{white-space:nowrap}
.legend i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px;vertical-align:-1px}
.k-real,.k-line{background:var(--real)}
.k-pad{background:var(--pad)}
.legend .k-line{height:2px;vertical-align:4px;width:14px}
.k-band{background:var(--band)}
.k-bad{background:var(--bad)}
.legend .k-clip{width:0;height:0;border:5px solid transparent;border-top:0;border-bottom:8px solid var(--pad);
border-radius:0;vertical-align:0}
.legend .k-share{width:58px;margin:0 6px;background:linear-gradient(90deg,color-mix(in srgb,var(--real) 18%,var(--card)),
var(--real))}
.plot{position:relative;min-height:24px;outline:none;border-radius:4px}
.plot:focus-visible{box-shadow:0 0 0 2px var(--link)}
.plot svg{display:block;width:100%;touch-action:pan-y}
.plot text{fill:var(--muted);font-size:11px;font-variant-numeric:tabular-nums}
.plot .grid{stroke:var(--grid)}
.plot .axis{stroke:var(--axis)}
.plot .cross{stroke:var(--ink2);stroke-dasharray:2 3;visibility:hidden}
.plot .real{fill:var(--real)}
.plot .pad{fill:var(--pad)}
.plot .band{fill:var(--band)}
.plot .line{fill:none;stroke:var(--real);stroke-width:1.75;stroke-linejoin:round}
.plot .bad{fill:var(--bad)}
.plot .hit{cursor:pointer}
#tip{position:absolute;z-index:9;pointer-events:none;background:var(--card);color:var(--ink);border:1px solid var(--axis);
border-radius:8px;padding:9px 12px;font-size:12px;box-shadow:0 4px 18px #0003;max-width:290px}
#tip b{display:block;margin-bottom:4px}
#tip div{display:flex;justify-content:space-between;gap:18px;white-space:nowrap}
#tip div span:first-child{color:var(--ink2)}
#tip div span:last-child{font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;margin:0 -20px;padding:0 20px}
.scroll.tall{max-height:440px;overflow-y:auto}
.tall thead th{position:sticky;top:0;background:var(--card);box-shadow:0 1px var(--edge)}
table{border-collapse:collapse;width:100%;font-size:13px}
th,td{padding:6px 10px;border-bottom:1px solid var(--edge);text-align:left;vertical-align:top}
th:first-child,td:first-child{padding-left:0}
th:last-child,td:last-child{padding-right:0}
thead th{color:var(--ink2);font-weight:500;font-size:12px;white-space:nowrap}
tbody th,tfoot th{font-weight:600}
tbody tr:last-child>*{border-bottom:0}
tfoot th,tfoot td{border-top:1px solid var(--axis);border-bottom:0;font-weight:600}
.numbers th,.numbers td{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.numbers th:first-child{text-align:left}
.numbers .share{min-width:130px}
.numbers td.share i{float:left;height:8px;margin-top:6px;background:var(--real);border-radius:2px;min-width:1px}
.numbers tfoot td.share i{display:none}
.records td{font-variant-numeric:tabular-nums;white-space:nowrap}
.records td.tails{white-space:normal}
.records td.tails span{display:inline-block;white-space:nowrap;margin-right:12px}
.records td.message{white-space:normal;min-width:260px;overflow-wrap:anywhere}
.records small{color:var(--muted)}
.kinds{display:flex;flex-wrap:wrap;gap:6px;margin:0 0 12px}
.kinds span{background:var(--badbg);color:var(--bad);border-radius:99px;padding:2px 10px;font-size:12.5px}
.violations{list-style:none;margin:0;padding:0;max-height:440px;overflow-y:auto;border:1px solid var(--edge);
border-radius:8px}
.violations li{display:grid;grid-template-columns:104px 1fr auto;gap:4px 14px;padding:7px 12px;font-size:13px;
border-bottom:1px solid var(--edge)}
.violations li:last-child{border-bottom:0}
.violations .step{color:var(--ink2);font-variant-numeric:tabular-nums;white-space:nowrap}
.violations .message{overflow-wrap:anywhere}
.violations a{white-space:nowrap}
:target{background:var(--hit)}
.target:target{outline:4px solid var(--hit)}
dl{display:grid;grid-template-columns:minmax(150px,max-content) 1fr;gap:5px 22px;margin:0;font-size:13px}
dt{color:var(--ink2)}
dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
@media(max-width:900px){.tiles{grid-template-columns:repeat(3,1fr)}
.tile:nth-child(3n){border-right:0}.tile:nth-child(n+4){border-top:1px solid var(--edge)}}
@media(max-width:560px){main{padding:18px 12px 40px}section{padding:14px}.tiles{padding:0;grid-template-columns:1fr 1fr}
.tile{padding:11px 8px 10px 14px}.tile:nth-child(3n){border-right:1px solid var(--edge)}
.tile:nth-child(2n){border-right:0}.tile:nth-child(n+3){border-top:1px solid var(--edge)}.tile b{font-size:20px}
.scroll{margin:0 -14px;padding:0 14px}.numbers .share{min-width:0}.numbers td.share i{display:none}
.violations li{grid-template-columns:1fr auto}
.violations .message{grid-column:1/-1;grid-row:2}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:7px}}
@media print{.violations{max-height:none}section{break-inside:avoid-page}}
)css";

const char* const kPageScript = R"js(
(() => {
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const columns = data.columns.map(([replays, requests, rows, least, most, p50, p99, max, violations, listed, by]) =>
  ({replays, requests, rows, least, most, p50, p99, max, violations, listed, by}));
if (!columns.length) return;
const tip = document.getElementById('tip');
const count = n => n.toLocaleString('en-US', {maximumFractionDigits: n < 10 ? 2 : n < 100 ? 1 : 0});
const whole = n => n.toLocaleString('en-US');
const percent = x => (100 * x).toFixed(1) + '\u00a0%';
const time = us => us >= 1000 ? count(us / 1000) + '\u00a0ms' : count(us) + '\u00a0\u00b5s';
const first = i => data.first + i * data.width;
const last = i => Math.min(first(i) + data.width - 1, data.last);
const span = columns.length * data.width;  // steps that the axis covers

// About `n` round numbers in [from, to].
function ticks(from, to, n, integers) {
  const raw = (to - from) / Math.max(n, 1);
  const power = 10 ** Math.floor(Math.log10(raw || 1));
  let step = [1, 2, 5, 10].map(f => f * power).find(s => s >= raw) || 10 * power;
  if (integers) step = Math.max(1, Math.round(step));
  const out = [];
  for (let v = Math.ceil(from / step) * step; v <= to + step * 1e-9; v += step) out.push(v);
  return out;
}
function el(parent, name, attributes, text) {
  const node = document.createElementNS(parent.namespaceURI, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  parent.appendChild(node);
  return node;
}

const left = 58, right = 10, top = 8;
const heights = {violations: 26, padding: 132, latency: 168};
const plots = [...document.querySelectorAll('.plot')].map(box => ({box, kind: box.dataset.chart}));

function draw(plot) {
  const {box, kind} = plot;
  const width = box.clientWidth, inner = width - left - right;
  const rowHeight = Math.max(11, Math.min(20, 132 / Math.max(data.buckets.length, 1)));
  const height = kind === 'buckets' ? data.buckets.length * rowHeight : heights[kind];
  const bottom = kind === 'violations' ? 4 : 24;
  box.innerHTML = `<svg role="img" height="${top + height + bottom}" viewBox="0 0 ${width} ${top + height + bottom}">`;
  const svg = box.firstChild;
  svg.setAttribute('aria-label', box.parentNode.querySelector('b').textContent);
  const x = i => left + inner * i * data.width / span;
  const base = top + height;
  const runs = (has, body) => {  // of columns that follow each other
    for (let i = 0; i < columns.length; i++) {
      if (!has(columns[i])) continue;
      const from = i;
      while (i + 1 < columns.length && has(columns[i + 1])) i++;
      body(from, i);
    }
  };
  const stairs = (from, to, y) => {
    let path = '';
    for (let i = from; i <= to; i++) path += `V${y(columns[i]).toFixed(1)}H${x(i + 1).toFixed(1)}`;
    return path;
  };
  const area = (name, low, high) => runs(c => c.replays > 0, (from, to) => {
    let back = '';
    for (let i = to; i >= from; i--) back += `V${low(columns[i]).toFixed(1)}H${x(i).toFixed(1)}`;
    el(svg, 'path', {class: name, d: `M${x(from).toFixed(1)},${high(columns[from]).toFixed(1)}` +
      stairs(from, to, high) + back + 'Z'});
  });
  const yAxis = (values, y, label) => values.forEach(v => {
    el(svg, 'line', {class: 'grid', x1: left, x2: left + inner, y1: y(v), y2: y(v)});
    el(svg, 'text', {x: left - 8, y: y(v) + 4, 'text-anchor': 'end'}, label(v));
  });

  if (kind === 'violations') {
    runs(c => c.violations > 0, (from, to) => el(svg, 'rect', {class: 'bad', x: x(from), y: top,
      width: Math.max(x(to + 1) - x(from), 2), height}));
    el(svg, 'line', {class: 'axis', x1: left, x2: left + inner, y1: base + .5, y2: base + .5});
    el(svg, 'rect', {class: 'hit', x: left, y: 0, width: inner, height: base, fill: 'transparent'});
  } else if (kind === 'buckets') {
    data.buckets.forEach((name, r) => {
      const y = base - (r + 1) * rowHeight;
      el(svg, 'line', {class: 'grid', x1: left, x2: left + inner, y1: y + .5, y2: y + .5});
      el(svg, 'text', {x: left - 8, y: y + rowHeight / 2 + 4, 'text-anchor': 'end'}, name);
      const share = c => {
        for (let k = 0; k < c.by.length; k += 2) if (c.by[k] === r) return Math.ceil(8 * c.by[k + 1] / c.replays);
        return 0;
      };
      for (let i = 0; i < columns.length; i++) {
        const s = share(columns[i]), from = i;
        if (!s) continue;
        while (i + 1 < columns.length && share(columns[i + 1]) === s) i++;
        el(svg, 'rect', {class: 'real', x: x(from), y: y + 1.5, width: Math.max(x(i + 1) - x(from), .6),
          height: rowHeight - 2, opacity: (.12 + .88 * s / 8).toFixed(2)});
      }
    });
  } else if (kind === 'padding') {
    const most = Math.max(...columns.map(c => c.replays ? c.rows / c.replays : 0), 1);
    const y = v => base - height * v / (most * 1.04);
    yAxis(ticks(0, most, 4, true), y, whole);
    area('pad', c => y(c.requests / c.replays), c => y(c.rows / c.replays));
    area('real', () => base, c => y(c.requests / c.replays));
  } else {
    // A few slow replays must not flatten all others: with many a logarithmic axis, with few an end before them.
    const sorted = columns.filter(c => c.replays).map(c => c.p99).sort((a, b) => a - b);
    const slowest = sorted[sorted.length - 1], usual = sorted[Math.floor((sorted.length - 1) * .98)];
    const fastest = Math.max(Math.min(...columns.filter(c => c.replays).map(c => c.p50)), 1e-3);
    const log = usual > 10 * fastest;
    const from = log ? fastest / 1.3 : 0;
    const ends = log ? 1.3 * slowest : slowest > 1.6 * usual ? 1.15 * usual : 1.05 * slowest || 1;
    const part = log ? v => Math.log(Math.max(v, from) / from) / Math.log(ends / from) : v => v / ends;
    const y = v => base - height * Math.min(part(v), 1);
    const unit = ends >= 2000 ? 1000 : 1;
    let marks = ticks(0, ends / unit, 4, false).map(v => v * unit);
    if (log) {
      marks = [];
      for (let p = 10 ** Math.floor(Math.log10(from)); p <= ends; p *= 10) {
        for (const f of ends / from > 3000 ? [1] : [1, 3]) if (f * p >= from && f * p <= ends) marks.push(f * p);
      }
    }
    const name = v => whole(+v.toPrecision(6));
    yAxis(marks, y, v => v === 0 ? '0' : log && v < 1000 || unit === 1 ? name(v) + ' \u00b5s' : name(v / 1000) + ' ms');
    box.parentNode.querySelector('em').textContent = log ? 'logarithmic axis' : '';
    area('band', c => y(c.p50), c => y(c.p99));
    runs(c => c.replays > 0, (from, to) => el(svg, 'path', {class: 'line',
      d: `M${x(from).toFixed(1)},${y(columns[from].p50).toFixed(1)}` + stairs(from, to, c => y(c.p50))}));
    box.parentNode.querySelector('.k-clip').parentNode.hidden = slowest <= ends;
    columns.forEach((c, i) => {
      if (c.p99 <= ends) return;
      const at = (x(i) + x(i + 1)) / 2;
      el(svg, 'path', {class: 'pad', d: `M${at - 4},${top + 5}L${at},${top - 3}L${at + 4},${top + 5}Z`});
    });
  }
  if (kind !== 'violations') {
    el(svg, 'line', {class: 'axis', x1: left, x2: left + inner, y1: base + .5, y2: base + .5});
    const at = s => left + inner * (s - data.first) / span;
    ticks(data.first, data.last, Math.floor(inner / 84), true).forEach(s => {
      el(svg, 'line', {class: 'axis', x1: at(s), x2: at(s), y1: base, y2: base + 4});
      el(svg, 'text', {x: at(s), y: base + 17, 'text-anchor': at(s) > left + inner - 20 ? 'end' : 'middle'},
        (s === data.first ? 'step ' : '') + whole(s));
    });
  }
  plot.cross = el(svg, 'line', {class: 'cross', y1: top - 4, y2: base});
  plot.x = x;
  plot.inner = inner;
}

let chosen = -1;
function line(name, value) {
  const div = document.createElement('div');
  for (const text of [name, value]) div.appendChild(document.createElement('span')).textContent = text;
  tip.appendChild(div);
}
function choose(i, plot) {
  chosen = i;
  const c = columns[i];
  plots.forEach(p => {
    if (!p.x) return;
    const x = (p.x(i) + p.x(i + 1)) / 2;
    p.cross.setAttribute('x1', x);
    p.cross.setAttribute('x2', x);
    p.cross.style.visibility = 'visible';
  });
  tip.replaceChildren(document.createElement('b'));
  tip.firstChild.textContent = first(i) === last(i) ? 'Step ' + whole(first(i))
    : `Steps ${whole(first(i))} to ${whole(last(i))}`;
  line('Replays', whole(c.replays));
  if (c.replays) {
    const by = [];
    for (let k = c.by.length - 2; k >= 0; k -= 2) by.push([data.buckets[c.by[k]], c.by[k + 1] / c.replays]);
    if (by.length === 1) line('Bucket', by[0][0]);
    else by.slice(0, 6).forEach(([name, share]) => line('Bucket ' + name, percent(share)));
    line('Rows in use', `${whole(c.requests)} of ${whole(c.rows)}`);
    line('Padding', percent(1 - c.requests / c.rows) +
      (c.least < c.most ? ` (${Math.round(100 * c.least)} to ${Math.round(100 * c.most)} %)` : ''));
    if (c.replays === 1) line('Latency', time(c.max));
    else {
      line('Median', time(c.p50));
      line('p99', time(c.p99));
      line('Slowest', time(c.max));
    }
  }
  if (c.violations) line('Violations', whole(c.violations));
  tip.hidden = false;
  const box = plot.box.getBoundingClientRect();
  const at = box.left + (plot.x(i) + plot.x(i + 1)) / 2, w = tip.offsetWidth, h = tip.offsetHeight;
  const page = document.documentElement.clientWidth;
  let x = at + 14 + w < page ? at + 14 : at - 14 - w;
  x = Math.max(6, Math.min(x, page - w - 6));
  const y = Math.max(6, Math.min(box.top, innerHeight - h - 6));
  tip.style.left = x + scrollX + 'px';
  tip.style.top = y + scrollY + 'px';
}
function clear() {
  chosen = -1;
  tip.hidden = true;
  plots.forEach(p => p.cross && (p.cross.style.visibility = 'hidden'));
}
function show(id) {
  const target = document.getElementById(id);
  if (target) location.hash = id;
}
plots.forEach(plot => {
  const {box} = plot;
  box.tabIndex = 0;
  const at = e => {
    const part = (e.clientX - box.getBoundingClientRect().left - left) / plot.inner;
    return part < 0 || part >= 1 ? -1 : Math.floor(part * columns.length);
  };
  const point = e => at(e) < 0 ? clear() : choose(at(e), plot);
  box.addEventListener('pointermove', point);
  box.addEventListener('pointerdown', point);
  box.addEventListener('pointerleave', clear);
  box.addEventListener('blur', clear);
  const open = i => i >= 0 && columns[i].listed >= 0 && show('v' + columns[i].listed);
  if (plot.kind === 'violations') box.addEventListener('click', e => {
    let i = at(e);
    for (let d = 0; i >= 0 && d < 4; d++) {  // marks are thin
      if (columns[i - d] && columns[i - d].violations) { i -= d; break; }
      if (columns[i + d] && columns[i + d].violations) { i += d; break; }
    }
    open(i);
  });
  box.addEventListener('keydown', e => {
    const move = {ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20}[e.key];
    if (e.key === 'Escape') clear();
    if (e.key === 'Enter' && plot.kind === 'violations') open(chosen);
    if (!move) return;
    e.preventDefault();
    choose(Math.max(0, Math.min(columns.length - 1, chosen < 0 ? 0 : chosen + move)), plot);
  });
});
const redraw = () => { clear(); plots.forEach(draw); };
let seen = 0;
new ResizeObserver(() => {
  const width = plots.length ? plots[0].box.clientWidth : 0;
  if (width !== seen) { seen = width; redraw(); }
}).observe(document.body);
})();
)js";

}  // namespace pristine::replay_driver
