"""How a report page looks (STYLE), behaves (SCRIPT), and the buttons of a group of players (CONTROLS).

Kept as strings, so that a page is one file and the package carries no assets.
"""

STYLE = """
:root {
  --paper: #fdfdfb; --ink: #1d2025; --soft: #5b626d; --rule: #e1e2de; --panel: #f4f4f0; --accent: #1f5fa8;
  --warn: #8a5a00; --warn-paper: #fdf5e2;
    --c0: #2266b0; --c1: #c8501a; --c2: #22805c; --c3: #8a4ba6; --c4: #a87b00; --c5: #bf3a5e; --c6: #1b8393; --c7:
    #6a6f78;
  color-scheme: light;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --ink: #e5e5e1; --soft: #9ca3ad; --rule: #2e3238; --panel: #1e2125; --accent: #82b4ee;
    --warn: #e0b050; --warn-paper: #2a2416;
        --c0: #6ba6ea; --c1: #f0894f; --c2: #5cc198; --c3: #c28ddd; --c4: #dcb341; --c5: #ee7f9d; --c6: #5bc0cf;
      --c7: #a5abb5;
    color-scheme: dark;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 72rem; margin: 0 auto; padding: clamp(1.5rem, 5vw, 4rem) clamp(1rem, 4vw, 2.5rem) 5rem; }
h1 { margin: 0 0 .75rem; font-size: clamp(1.7rem, 4vw, 2.3rem); line-height: 1.2; letter-spacing: -.02em;
  font-weight: 650; }
h2 { margin: 0; font-size: 1.35rem; line-height: 1.3; letter-spacing: -.01em; font-weight: 620; }
h3 { margin: 0 0 .35rem; font-size: .95rem; line-height: 1.4; font-weight: 600; }
p { margin: 0 0 .75rem; max-width: 44rem; }
p:last-child { margin-bottom: 0; }
header .lead { font-size: 1.1rem; color: var(--soft); }
section > .lead { color: var(--soft); }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--panel); padding: .1em
  .3em;
  border-radius: 3px; overflow-wrap: anywhere; }
a { color: var(--accent); text-underline-offset: .15em; text-decoration-thickness: 1px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; border-radius: 4px; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; list-style: none; margin: 1.25rem 0 0; padding: 0; }

section { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.5rem 2.5rem; margin-top: 2.5rem; }
section[id] { margin-top: 3rem; padding-top: 2rem; border-top: 1px solid var(--rule); }
section > * { grid-column: 1 / -1; min-width: 0; }
section > h2:has(+ p) { margin-bottom: -1rem; }
section > p { margin: 0; }
section > p + p { margin-top: -.75rem; }
figure { margin: 0; }
figcaption { margin-top: .75rem; font-size: .875rem; line-height: 1.5; color: var(--soft); max-width: 48rem; }
figcaption p { margin: 0 0 .25rem; max-width: none; }
.players:focus-visible { outline-offset: 10px; }
.players[id] { scroll-margin-top: 1.5rem; }
.scroll { overflow-x: auto; }

.warning { border-left: 3px solid var(--warn); background: var(--warn-paper); padding: .8rem 1.1rem; border-radius:
  0 6px 6px 0;
  max-width: 48rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(10.5rem, 45%), 1fr)); gap: .9rem 1.25rem;
  margin: 0; }
.facts dt { font-size: .8rem; color: var(--soft); }
.facts dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; line-height: 1.4; }

.grid { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 22rem)); gap: 1.5rem 1.25rem; }
.cell p { margin: 0; font-size: .875rem; line-height: 1.45; }
.cell p.facts-line { color: var(--soft); font-size: .8rem; font-variant-numeric: tabular-nums; }
video, img { display: block; width: 100%; height: auto; max-height: 26rem; object-fit: contain; background:
  var(--panel);
  border-radius: 6px; margin-bottom: .5rem; }
.pixels video { image-rendering: pixelated; }
.controls { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem .9rem; margin-top: 1rem; font-size:
  .875rem; }
.controls[hidden] { display: none; }
.controls input { flex: 1 1 10rem; min-width: 0; accent-color: var(--accent); margin: 0; height: 1.5rem; }
.controls .clock { min-width: 8.5em; color: var(--soft); font-variant-numeric: tabular-nums; text-align: right; }
.controls button { font: inherit; color: inherit; background: none; border: 1px solid var(--rule); border-radius: 6px;
  padding: .2rem .65rem; min-height: 2rem; cursor: pointer; font-variant-numeric: tabular-nums; }
.controls button:hover { background: var(--panel); }
.controls button[aria-pressed="true"] { background: var(--ink); border-color: var(--ink); color: var(--paper); }
.controls .play { display: grid; place-items: center; width: 2.75rem; padding: 0; border-radius: 1rem; background:
  var(--accent);
  border-color: var(--accent); color: var(--paper); }
.controls .play:hover { background: var(--accent); filter: brightness(1.1); }
.controls .play svg { width: 14px; height: 14px; fill: currentColor; }
.controls .play .pause, .playing .controls .play .start { display: none; }
.playing .controls .play .pause { display: inline; }
.speeds { display: flex; }
.speeds button { border-radius: 0; margin-left: -1px; }
.speeds button:first-child { border-radius: 6px 0 0 6px; }
.speeds button:last-child { border-radius: 0 6px 6px 0; }

.chart { grid-column: span 1; }
.chart:not(.chart + .chart):not(:has(+ .chart)) { grid-column: 1 / -1; max-width: 42rem; }
.chart svg { display: block; width: 100%; height: auto; overflow: visible; font-size: 12px; font-variant-numeric:
  tabular-nums; }
.chart text { fill: var(--soft); }
.chart .mid { text-anchor: middle; }
.chart .end { text-anchor: end; }
.chart path { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.chart .grid { stroke: var(--rule); stroke-width: 1; }
.chart .axis { stroke: var(--soft); stroke-width: 1; }
.chart .line { stroke: var(--c); stroke-width: 2; }
.chart .raw { stroke: var(--c); stroke-width: 1; opacity: .3; }
.chart .cursor { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; visibility: hidden; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: 0 0 .5rem; padding: 0; list-style: none;
  font-size: .875rem;
  line-height: 1.5; }
.legend i { display: inline-block; width: .9rem; height: 3px; border-radius: 2px; background: var(--c);
  vertical-align: .25em;
  margin-right: .45rem; }
.legend .value { font-variant-numeric: tabular-nums; color: var(--soft); margin-left: .15rem; }
.legend small, .at { color: var(--soft); }
.at { float: right; font-weight: 400; font-size: .8rem; line-height: 1.66; font-variant-numeric: tabular-nums; }
.scatter { max-width: 38rem; }
.scatter .equal { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 5 4; }
.scatter circle { fill: var(--c); fill-opacity: .75; stroke: var(--paper); stroke-width: 1; }
.scatter a:hover circle, .scatter a:focus-visible circle { fill-opacity: 1; stroke: var(--ink); stroke-width: 2; }
.scatter .at { display: block; float: none; min-height: 1.66em; overflow-wrap: anywhere; }
.scatter h4 { margin: .5rem 0 .25rem; font-size: .875rem; }
.scatter .legend i { width: .65rem; height: .65rem; border-radius: 50%; vertical-align: 0; }
.scatter select { font: inherit; font-size: .875rem; color: inherit; background: var(--panel); border: 1px solid
  var(--rule); border-radius: 6px; padding: .2rem .5rem; margin-bottom: .5rem; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }

table { border-collapse: collapse; min-width: min(100%, 30rem); font-size: .94rem; line-height: 1.45;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; font-size: .95rem; padding-bottom: .5rem; }
th, td { padding: .45rem 1.5rem .45rem 0; text-align: left; white-space: nowrap; }
th:last-child, td:last-child { padding-right: .25rem; }
th { font-weight: 600; font-size: .85rem; color: var(--soft); vertical-align: bottom; }
thead tr { border-top: 1.5px solid var(--ink); border-bottom: 1px solid var(--ink); }
tbody tr { border-bottom: 1px solid var(--rule); }
tbody tr:last-child { border-bottom: 1.5px solid var(--ink); }
tbody tr:hover { background: var(--panel); }
td strong { font-weight: 700; }
.number { text-align: right; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th button:hover { color: var(--ink); }
th[aria-sort] button { color: var(--accent); text-decoration: underline 2px; text-underline-offset: .35em; }
.protocol b { font-weight: 600; color: var(--ink); margin-right: .35rem; }

@media (max-width: 44rem) {
  section { grid-template-columns: minmax(0, 1fr); }
  .chart, .chart:not(.chart + .chart):not(:has(+ .chart)) { grid-column: 1 / -1; }
  .chart svg { min-width: 30rem; }
  .grid { grid-template-columns: repeat(min(2, var(--columns)), minmax(0, 1fr)); gap: 1.25rem .75rem; }
}
@media print {
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  .controls, nav { display: none; }
  figure, .cell, .warning, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; }
}
"""

CONTROLS = """<div class="controls" hidden>
<button type="button" class="play" aria-label="Play"><svg viewBox="0 0 14 14" aria-hidden="true">\
<path class="start" d="M3 1.2v11.6L13 7z"/><path class="pause" d="M2.5 1.5h3v11h-3zM8.5 1.5h3v11h-3z"/></svg></button>
<input type="range" min="0" max="1" step="1" value="0" aria-label="Position in the videos">
<span class="clock"></span>
<div class="speeds" role="group" aria-label="Playback speed">
<button type="button" data-speed="0.25" aria-pressed="false">¼×</button>\
<button type="button" data-speed="0.5" aria-pressed="false">½×</button>\
<button type="button" data-speed="1" aria-pressed="true">1×</button>
</div>
<button type="button" class="pixelate" aria-pressed="false" title="Show pixels as squares">Pixels</button>
</div>
"""

SCRIPT = """
"use strict";

// A group of videos on one clock, that of the longest; a frame is a frame of the fastest.
function players(figure) {
  const $ = selector => figure.querySelector(selector);
  const videos = [...figure.querySelectorAll("video")];
  const seconds = video => video.dataset.frames / video.dataset.fps;
  const lead = videos.reduce((a, b) => seconds(b) > seconds(a) ? b : a);
  const fps = Math.max(...videos.map(video => +video.dataset.fps));
  const count = Math.round(seconds(lead) * fps);
  const slider = $("input"), clock = $(".clock"), button = $(".play");
  let speed = 1, playing = false, visible = false, frame = 0;
  let wanted = !matchMedia("(prefers-reduced-motion: reduce)").matches;

  function mark(time) {
    frame = Math.min(count - 1, Math.floor(time * fps + 1e-3));
    slider.value = frame;
    clock.textContent = `${(frame / fps).toFixed(2)} / ${seconds(lead).toFixed(2)} s`;
  }
  // Seeks to the middle of a frame, where rounding cannot reach its neighbours.
  function show(index) {
    const time = (index + 0.5) / fps;
    for (const video of videos) video.currentTime = Math.min(time, seconds(video) - 0.5 / video.dataset.fps);
    mark(time);
    slider.setAttribute("aria-valuetext", `frame ${frame + 1} of ${count}, ${(frame / fps).toFixed(2)} seconds`);
  }
  function tick() {
    if (!playing) return;
    if (lead.ended) start();
    // Small lags are made up by a slightly faster or slower playback, which does not stutter as a seek would.
    for (const video of videos) {
      const late = lead.currentTime - video.currentTime;
      video.playbackRate = Math.abs(late) < 0.25 / fps ? speed : speed * Math.min(2, Math.max(0.5, 1 + 8 * late));
    }
    mark(lead.currentTime);
    requestAnimationFrame(tick);
  }
  // Plays every video that has not come to its end; when the longest has, all begin again.
  function start() {
    if (lead.ended) for (const video of videos) video.currentTime = 0;
    for (const video of videos) if (video === lead || lead.currentTime < seconds(video)) {
      video.play().catch(error => { if (error.name === "NotAllowedError") want(false); });
    }
  }
  function update() {
    if (playing === (wanted && visible)) return;
    playing = !playing;
    if (playing) { start(); tick(); }
    else { videos.forEach(video => video.pause()); show(frame); }
  }
  function want(state) {
    wanted = state;
    figure.classList.toggle("playing", wanted);
    button.setAttribute("aria-label", wanted ? "Pause" : "Play");
    update();
  }
  function step(by) { want(false); show((frame + by + count) % count); }

  for (const video of videos) {
    video.autoplay = video.loop = video.controls = false;
    video.addEventListener("click", () => want(!wanted));
  }
  slider.max = count - 1;
  slider.addEventListener("input", () => { const index = +slider.value; want(false); show(index); });
  button.addEventListener("click", () => want(!wanted));
  $(".pixelate").addEventListener("click", event => {
    event.currentTarget.setAttribute("aria-pressed", figure.classList.toggle("pixels"));
  });
  for (const choice of figure.querySelectorAll("[data-speed]")) choice.addEventListener("click", () => {
    speed = +choice.dataset.speed;
    for (const other of figure.querySelectorAll("[data-speed]")) other.setAttribute("aria-pressed", other === choice);
  });
  figure.addEventListener("keydown", event => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === " " && event.target.tagName !== "BUTTON") want(!wanted);
    else if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
    else return;
    event.preventDefault();
  });
  new IntersectionObserver(entries => { visible = entries.at(-1).isIntersecting; update(); }).observe(figure);
  $(".controls").hidden = false;
  mark(0);
  want(wanted);
}

// A click on a header sorts by that column, a second one turns the order round; cells without a value stay last.
function sortable(table) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Sort by this column";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const numeric = head.classList.contains("number");
      const key = row => {
        const cell = row.cells[column];
        return !numeric ? cell.textContent : cell.dataset.value === undefined ? null : read(cell.dataset.value);
      };
      body.append(...[...body.rows].sort((one, two) => {
        const a = key(one), b = key(two);
        if (a === null || b === null) return (a === null) - (b === null);
        return sign * (numeric ? (a < b ? -1 : +(a > b)) : a.localeCompare(b, undefined, {numeric: true}));
      }));
    });
  });
}
const read = text => ({inf: Infinity, "-inf": -Infinity})[text] ?? Number(text);

// The pointer over a chart: its x and each line's value there replace the last values in the legend.
function readable(figure) {
  const svg = figure.querySelector("svg"), {x: xAxis, y: yAxis} = JSON.parse(svg.dataset.axes);
  const values = [...figure.querySelectorAll(".legend .value")], at = figure.querySelector(".at");
  const last = [at, ...values].map(element => element.textContent);
  const lines = [...figure.querySelectorAll(".line")].map(path => {
    const points = path.getAttribute("d").matchAll(/[ML]([\\d.]+) ([\\d.]+)/g);
    return Array.from(points, ([, x, y]) => [+x, +y]);
  });
  const value = (axis, place) => {
    const part = (place - axis.start) / (axis.end - axis.start);
    return axis.log ? axis.low * (axis.high / axis.low) ** part : axis.low + part * (axis.high - axis.low);
  };
  const cursor = document.createElementNS(svg.namespaceURI, "path");
  cursor.setAttribute("class", "cursor");
  svg.append(cursor);

  svg.addEventListener("pointermove", event => {
    const where = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const x = Math.min(xAxis.end, Math.max(xAxis.start, where));
    cursor.setAttribute("d", `M${x} ${yAxis.end}V${yAxis.start}`);
    cursor.style.visibility = "visible";
    at.textContent = "at " + value(xAxis, x).toLocaleString("en", {maximumSignificantDigits: 4});
    lines.forEach((points, i) => {
      if (!points.length) return;
      const near = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      values[i].textContent = Number(value(yAxis, near[1]).toPrecision(3));
    });
  });
  svg.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden";
    [at, ...values].forEach((element, i) => { element.textContent = last[i]; });
  });
}

// Of the views of a scatter one at a time; the dot under the pointer or in focus says what it is.
function choosable(figure) {
  const views = [...figure.querySelectorAll(".view")], at = figure.querySelector(".at");
  const choose = name => views.forEach(view => { view.hidden = view.dataset.name !== name; });
  const say = ({target}) => { at.textContent = target.closest("circle, a")?.querySelector("title").textContent ?? ""; };
  figure.addEventListener("pointerover", say);
  figure.addEventListener("focusin", say);
  for (const heading of figure.querySelectorAll("h4")) heading.hidden = true;
  if (views.length < 2) return;
  const select = document.createElement("select");
  select.setAttribute("aria-label", "Metric");
  select.append(...views.map(view => new Option(view.dataset.name)));
  select.addEventListener("change", () => choose(select.value));
  views[0].before(select);
  choose(select.value);
}

document.querySelectorAll(".players").forEach(players);
document.querySelectorAll("table").forEach(sortable);
document.querySelectorAll(".chart:not(.scatter)").forEach(readable);
document.querySelectorAll(".scatter").forEach(choosable);
"""
