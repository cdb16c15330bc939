"""A page of generated videos (`index.html` of `lvdm sample`): by class, all decoders side by side on one clock.

The page stands beside the mp4 files, which it links, and is opened from disk without a network. Only the samples of one
page (PER_PAGE) are elements at a time, so thousands of videos open at once; a choice of class and two buttons lead to
the others. Browsers play no FFV1 and no arrays, so there is a gallery of mp4 files only.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from lvdm.files import write_text
from lvdm.report_style import CONTROLS, SCRIPT, STYLE

PER_PAGE = 24


@dataclass(frozen=True)
class Rendering:
    """Videos of one decoder: `folder`/000000.mp4 and so on, beside the page."""

    folder: str
    title: str
    frames: int
    fps: float
    width: int
    height: int


def write_gallery(
    path: Path, samples: Sequence[Mapping[str, Any]], renderings: Sequence[Rendering], facts: Mapping[str, object]
) -> Path:
    """Writes the page of `samples`, each with its "id" and "class" (a name or None), to `path`, and returns it.

    `facts` are the settings that stand at its head.
    """
    data = {
        "samples": [[sample["id"], sample["class"] or ""] for sample in samples],
        "renderings": [asdict(rendering) for rendering in renderings],
        "perPage": PER_PAGE,
    }
    rows = "\n".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items())
    page = PAGE.format(
        style=STYLE + GALLERY_STYLE,
        count=len(samples),
        folders=" and ".join(f"<code>{escape(rendering.folder)}/</code>" for rendering in renderings),
        facts=rows,
        data=json.dumps(data).replace("<", "\\u003c"),  # no name ends the element
        controls=CONTROLS,
        script=SCRIPT + GALLERY_SCRIPT,
    )
    write_text(path, page)
    return path


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>Generated videos</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>Generated videos</h1>
<p class="lead">{count} samples, of which <a href="sheet.png">sheet.png</a> shows the first as stills.</p>
</header>
<dl class="facts">
{facts}
</dl>
<noscript><p>Without scripts this page is empty; the videos are in {folders}.</p></noscript>
<div class="chooser">
<label>Class <select></select></label>
<button type="button" class="back">Back</button>
<span class="where" role="status"></span>
<button type="button" class="on">Next</button>
</div>
<section class="videos"></section>
</main>
<script type="application/json" id="data">{data}</script>
<template>{controls}</template>
<script>{script}</script>
</body>
</html>
"""

GALLERY_STYLE = """
main > .facts { margin-top: 1.5rem; }
.chooser { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1rem; margin-top: 2rem; padding: .75rem 0;
  position: sticky; top: 0; z-index: 1; background: var(--paper); border-bottom: 1px solid var(--rule); }
.chooser select, .chooser button { font: inherit; color: inherit; background: var(--panel); border: 1px solid
  var(--rule); border-radius: 6px; padding: .2rem .65rem; min-height: 2rem; max-width: 20rem; }
.chooser button { cursor: pointer; }
.chooser button:disabled { color: var(--soft); cursor: default; }
.where { color: var(--soft); font-variant-numeric: tabular-nums; }
.videos > figure { grid-column: auto; }
.videos .speeds, .videos .pixelate { display: none; }
@media (max-width: 44rem) { .videos > figure { grid-column: 1 / -1; } }
"""

# Follows the script of reports, whose `players` puts the videos of one figure on one clock.
GALLERY_SCRIPT = """
const {samples, renderings, perPage} = JSON.parse(document.querySelector("#data").textContent);
const $ = selector => document.querySelector(selector);
const select = $(".chooser select"), back = $(".back"), on = $(".on"), where = $(".where"), shown = $(".videos");
let page = 0;

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function figure([id, name]) {
  const file = String(id).padStart(6, "0"), title = `#${id} ${name}`.trim();
  const cells = renderings.map(({folder, title: decoder, frames, fps, width, height}) => {
    const video = element("video", {src: `${folder}/${file}.mp4`, preload: "metadata", muted: true, playsInline: true,
      width, height});
    video.dataset.frames = frames;
    video.dataset.fps = fps;
    video.setAttribute("aria-label", `${title}, ${decoder}`);
    const facts = element("p", {className: "facts-line", textContent: `${decoder}: ${frames} frames, ${fps} fps`});
    return element("div", {className: "cell"}, video, facts);
  });
  const grid = element("div", {className: "grid"}, ...cells);
  grid.style.setProperty("--columns", cells.length);
  const controls = $("template").content.cloneNode(true);
  const made = element("figure", {className: "players", tabIndex: 0}, element("h3", {textContent: title}), grid,
    controls);
  made.setAttribute("role", "group");
  made.setAttribute("aria-label", title);
  return made;
}

// One page of figures in the place of the last, whose videos let go of their files.
function turn(to) {
  const chosen = samples.filter(([, name]) => select.value === "all" || `of ${name}` === select.value);
  const pages = Math.max(1, Math.ceil(chosen.length / perPage));
  page = Math.min(Math.max(to, 0), pages - 1);
  const first = page * perPage, some = chosen.slice(first, first + perPage);
  for (const video of shown.querySelectorAll("video")) { video.removeAttribute("src"); video.load(); }
  shown.replaceChildren(...some.map(figure));
  shown.querySelectorAll(".players").forEach(players);
  where.textContent = `${first + 1} to ${first + some.length} of ${chosen.length}`;
  back.disabled = page === 0;
  on.disabled = page === pages - 1;
}

const counts = new Map();
for (const [, name] of samples) counts.set(name, (counts.get(name) ?? 0) + 1);
select.append(element("option", {value: "all", textContent: `all (${samples.length})`}));
for (const [name, count] of [...counts].sort(([a], [b]) => a.localeCompare(b))) {
  if (name) select.append(element("option", {value: `of ${name}`, textContent: `${name} (${count})`}));
}
select.parentElement.hidden = select.options.length === 1;
select.addEventListener("change", () => turn(0));
back.addEventListener("click", () => { turn(page - 1); scrollTo(0, 0); });
on.addEventListener("click", () => { turn(page + 1); scrollTo(0, 0); });
turn(0);
"""
