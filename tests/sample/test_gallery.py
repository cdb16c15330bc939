"""The page of generated videos: every video is there and linked, names cannot break it, nothing comes from outside."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lvdm.data.reader import probe
from sample.gallery import GALLERY_SCRIPT, PER_PAGE, Rendering, write_gallery


class Elements(HTMLParser):
    """All tags with their attributes; raises where one is not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "input", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in ("path",) or self.open.pop() == tag


def data(page: Path) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    return json.loads(text)


def test_every_sample_is_on_the_page_and_every_link_leads_to_a_video(samples):
    page = samples / "index.html"
    found = data(page)
    assert found["samples"] == [[0, "left"], [1, "right"], [2, "left"], [3, "right"], [4, "left"]]
    assert [rendering["folder"] for rendering in found["renderings"]] == ["d1", "d2"]
    for rendering in found["renderings"]:
        for number, _ in found["samples"]:
            info = probe(samples / rendering["folder"] / f"{number:06d}.mp4")
            assert info.frames == rendering["frames"] and info.fps == rendering["fps"]
            assert (info.width, info.height) == (rendering["width"], rendering["height"])


def test_nothing_comes_from_outside_and_links_exist(samples):
    page = samples / "index.html"
    links = [
        value
        for _, attributes in Elements(page.read_text()).found
        for key, value in attributes.items()
        if key in ("href", "src")
    ]
    assert set(links) == {"data:,", "sheet.png"} and (samples / "sheet.png").is_file()
    assert "http" not in page.read_text().replace("http://www.w3.org/2000/svg", "")


def test_settings_stand_at_the_head(samples, transformer):
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", (samples / "index.html").read_text()))
    assert facts["dit"] == transformer
    assert {key: facts[key] for key in ("sampler", "steps", "guidance", "seed")} == {
        "sampler": "ddpm",
        "steps": "3",
        "guidance": "3.0",
        "seed": "0",
    }


def test_names_cannot_break_the_page(tmp_path):
    name = '</script><b>"&'
    page = write_gallery(tmp_path / "index.html", [{"id": 7, "class": name}], [], {name: name})
    assert data(page)["samples"] == [[7, name]] and not [e for e in Elements(page.read_text()).found if e[0] == "b"]


def test_a_page_of_thousands_grows_by_a_few_bytes_a_video(tmp_path):
    rendering = Rendering("d1", "D1", 17, 12.5, 256, 256)
    sizes = [
        len(
            write_gallery(
                tmp_path / "index.html", [{"id": i, "class": "Biking"} for i in range(n)], [rendering], {}
            ).read_bytes()
        )
        for n in (10, 10010)
    ]
    assert sizes[1] - sizes[0] < 20 * 10000


NODE = """
class Element {
  constructor(tag) { Object.assign(this, {tag, children: [], dataset: {}, style: {setProperty() {}}, handlers: {}}); }
  append(...more) { this.children.push(...more); if (this.tag === "select") this.value ??= more[0].value; }
  replaceChildren(...more) { this.children = more; }
  setAttribute() {}
  removeAttribute(name) { delete this[name]; freed += 1; }
  load() {}
  addEventListener(name, handler) { this.handlers[name] = handler; }
  cloneNode() { return this; }
  get options() { return this.children; }
  querySelectorAll(wanted) {
    const is = e => wanted === "video" ? e.tag === "video" : e.className === wanted.slice(1);
    const all = this.children.flatMap(child => [child, ...(child.querySelectorAll?.("*all") ?? [])]);
    return wanted === "*all" ? all : all.filter(is);
  }
}
let freed = 0, played = 0;
const named = {};
const document = {
  createElement: tag => new Element(tag),
  querySelector: name => named[name] ??= new Element(name === ".chooser select" ? "select" : name),
};
document.querySelector("#data").textContent = DATA;
document.querySelector("template").content = new Element("controls");
document.querySelector(".chooser select").parentElement = {};
const players = () => { played += 1; }, scrollTo = () => {};
SCRIPT
const sources = () => shown.querySelectorAll("video").map(video => video.src);
const seen = [sources()];
on.handlers.click(); seen.push(sources());
on.handlers.click(); seen.push(sources());
const ends = [back.disabled, on.disabled], text = where.textContent;
select.value = "of a"; select.handlers.change(); seen.push(sources());
console.log(JSON.stringify({seen, ends, text, freed, played, options: select.options.map(o => o.textContent)}));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs node, to run the page's script without a browser")
def test_the_script_turns_pages_and_chooses_classes(tmp_path):
    """With just enough of a document to count what is on it."""
    samples = [{"id": i, "class": "ab"[i % 2]} for i in range(2 * PER_PAGE + 2)]
    renderings = [Rendering(name, name.upper(), 9, 12, 32, 32) for name in ("d1", "d2")]
    page = write_gallery(tmp_path / "index.html", samples, renderings, {})
    script = NODE.replace("DATA", json.dumps(json.dumps(data(page)))).replace("SCRIPT", GALLERY_SCRIPT)
    (tmp_path / "page.js").write_text(script)
    printed = subprocess.run(["node", tmp_path / "page.js"], capture_output=True, text=True, check=True).stdout
    found = json.loads(printed)

    def files(ids):
        return [f"{decoder}/{i:06d}.mp4" for i in ids for decoder in ("d1", "d2")]

    last = 2 * PER_PAGE
    pages = [range(PER_PAGE), range(PER_PAGE, last), range(last, last + 2), range(0, last, 2)]
    assert found["seen"] == [files(ids) for ids in pages]
    assert found["ends"] == [False, True] and found["text"] == f"{last + 1} to {last + 2} of {last + 2}"
    assert found["options"] == [f"all ({last + 2})", f"a ({PER_PAGE + 1})", f"b ({PER_PAGE + 1})"]
    assert found["freed"] == 2 * (PER_PAGE + PER_PAGE + 2) and found["played"] == 3 * PER_PAGE + 2
