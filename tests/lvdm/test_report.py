"""A page is well-formed, whole in itself, shows what it was given, and says what it could not draw."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import av
import numpy as np
import pytest
from PIL import Image

from lvdm.charts import BOTTOM, LEFT, RIGHT, SQUARE_BOTTOM, TOP, Dot
from lvdm.errors import UserError
from lvdm.report import Link, Page, Player

VOID = {"meta", "link", "input", "img", "br"}
nan, inf = float("nan"), float("inf")


class Tree(HTMLParser):
    """Collects (tag, attributes, text inside) of every element and fails where tags do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self._open: list[tuple[str, dict, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in {tag}"
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self._open and self._open.pop()[0] == tag, f"stray </{tag}>"

    def handle_data(self, data):
        for element in self._open:
            element[2].append(data)

    def all(self, tag: str, css: str = "") -> list[tuple[dict, str]]:
        """(attributes, text) of the elements with this tag and, when given, this class."""
        return [(a, "".join(t)) for n, a, t in self.elements if n == tag and css in ["", *a.get("class", "").split()]]


def mp4(frames: int = 3, fps: int = 25, codec: str = "libx264", pixels: str = "yuv420p") -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=fps, width=32, height=16, pix_fmt=pixels)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 40 * i % 256, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "png")
    return buffer.getvalue()


def chart(series, log_y=False) -> Tree:
    page = Page("t")
    page.chart("Loss", series, "samples", "L1", log_y)
    return Tree(page.html())


def coordinates(path: str) -> np.ndarray:
    return np.array([(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]).reshape(-1, 2)


def table(header, rows, **options) -> Tree:
    page = Page("t")
    page.table(header, rows, **options)
    return Tree(page.html())


def column(tree: Tree, index: int, columns: int) -> list[tuple[dict, str]]:
    return tree.all("td")[index::columns]


@pytest.fixture(scope="module")
def full_page() -> Page:
    page = Page("<b>Title</b> & more", "See `a<b`.\n\nSecond paragraph.")
    page.facts({"gpu <x>": '<i>H200 "141"', "seed": 0})
    for name in ("One", "Two", "Three <i>"):
        page.section(name, "text & text")
    page.players([Player("In <put>", mp4(3, 12), "cap & tion"), Player("D2", mp4(5, 25))], note="n")
    page.images({"a <png>": png()}, note="images & more")
    page.chart("Lo<ss", {"tr&ain": [(0, 1.0), (1, 0.5)]}, "x<", "y>", note="c")
    page.table(["m<odel", "PSNR"], [["a&b", 1.5]], caption="T<", protocol="p<", note="n<", best={"PSNR": "max"})
    page.note("care <script>alert(1)</script>")
    return page


def test_page_is_well_formed_escaped_and_self_contained(full_page):
    text = full_page.html()
    tree = Tree(text)
    assert text.startswith("<!DOCTYPE html>")
    assert len(tree.all("script")) == 1 and not tree.all("b")[0][1].startswith("Title")
    assert tree.all("title")[0][1] == tree.all("h1")[0][1] == "<b>Title</b> & more"
    assert tree.all("code")[0][1] == "a<b"
    assert tree.all("aside")[0][1] == "care <script>alert(1)</script>"
    assert [t for _, t in tree.all("dd")] == ['<i>H200 "141"', "0"]
    assert "http://" not in text and "https://" not in text
    for _, attributes, _ in tree.elements:
        for name in ("src", "href", "srcset", "poster", "action"):
            assert attributes.get(name, "data:").startswith(("data:", "#section-"))
    assert "@import" not in text and "url(" not in text
    ids = [a["id"] for _, a, _ in tree.elements if "id" in a]
    assert ["#" + i for i in ids] == [a["href"] for a, _ in tree.all("a")] and len(set(ids)) == 3


def test_equal_content_gives_equal_bytes_and_write_leaves_one_file(full_page, tmp_path):
    path = full_page.write(tmp_path / "report" / "index.html")
    assert path.read_text(encoding="utf-8") == full_page.html()
    full_page.write(path)
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]


def test_videos_are_embedded_byte_for_byte_with_their_facts(tmp_path):
    slow, fast = mp4(3, 12), mp4(5, 25)
    (tmp_path / "fast.mp4").write_bytes(fast)
    page = Page("t")
    page.players([Player("slow", slow), Player("fast", tmp_path / "fast.mp4")])
    tree = Tree(page.html())
    videos = [a for a, _ in tree.all("video")]
    assert [base64.b64decode(v["src"].removeprefix("data:video/mp4;base64,")) for v in videos] == [slow, fast]
    assert [(v["data-frames"], v["data-fps"], v["width"], v["height"]) for v in videos] == [
        ("3", "12", "32", "16"),
        ("5", "25", "32", "16"),
    ]
    # They play without the script too, and the script's own controls wait for it.
    assert all({"muted", "loop", "autoplay", "playsinline", "controls"} <= set(v) for v in videos)
    assert "hidden" in tree.all("div", "controls")[0][0]
    assert all(a.get("aria-label") for a, _ in tree.all("input"))


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (4, 4), (6, 3), (8, 4), (11, 4)])
def test_cells_fill_rows_evenly(count, columns):
    page = Page("t")
    page.images({str(i): png() for i in range(count)})
    assert Tree(page.html()).all("div", "grid")[0][0]["style"] == f"--columns: {columns}"


def test_media_that_browsers_do_not_show_are_refused(tmp_path):
    page = Page("t")
    for video, message in [
        (b"no video", "'v' is not a readable mp4"),
        (b"", "'v' is not a readable mp4"),
        (mp4(codec="mpeg4"), "'v' is mpeg4, yuv420p"),
        (mp4(pixels="yuv444p"), "'v' is h264, yuv444p"),
        (tmp_path / "missing.mp4", "missing.mp4"),
    ]:
        with pytest.raises(UserError, match=message):
            page.players([Player("v", video)])
    with pytest.raises(ValueError, match="at least one video"):
        page.players([])
    with pytest.raises(UserError, match="'i' is not a PNG"):
        page.images({"i": b"GIF89a"})


def test_images_are_embedded_byte_for_byte():
    page = Page("t")
    page.images({"red": png()})
    attributes, _ = Tree(page.html()).all("img")[0]
    assert base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,")) == png()
    assert attributes["alt"] == "red"


def test_chart_places_points_where_the_axes_say():
    tree = chart({"a": [(0, 1.0), (50, 2.0), (100, 4.0)]})
    axes = json.loads(tree.all("svg")[0][0]["data-axes"])
    points = coordinates(tree.all("path", "line")[0][0]["d"])
    assert points[:, 0] == pytest.approx([LEFT, (LEFT + RIGHT) / 2, RIGHT])
    y = axes["y"]
    values = y["low"] + (points[:, 1] - y["start"]) / (y["end"] - y["start"]) * (y["high"] - y["low"])
    assert values == pytest.approx([1, 2, 4], abs=0.01)
    labels = {float(t): float(a["y"]) - 4 for a, t in tree.all("text", "end") if re.fullmatch(r"[\d.]+", t)}
    slope = (points[2, 1] - points[0, 1]) / 3
    assert len(labels) > 3
    for value, at in labels.items():
        assert at == pytest.approx(points[0, 1] + slope * (value - 1), abs=0.1)


def test_log_chart_spaces_decades_equally():
    points = coordinates(chart({"a": [(i, 10.0**-i) for i in range(5)]}, log_y=True).all("path", "line")[0][0]["d"])
    assert np.diff(points[:, 1]) == pytest.approx([np.diff(points[:, 1])[0]] * 4, abs=0.02)
    assert np.diff(points[:, 1])[0] > 0


@pytest.mark.parametrize("log_y", [False, True])
def test_all_points_lie_inside_the_box_and_long_lines_are_thinned(log_y):
    noise = np.random.default_rng(0).lognormal(0, 2, 20_000)
    peak = int(noise.argmax())
    tree = chart({"long": list(enumerate(noise)), "one": [(7.0, 1e-3)], "flat": [(0, 3.0), (9, 3.0)]}, log_y)
    paths = [coordinates(a["d"]) for a, _ in [*tree.all("path", "line"), *tree.all("path", "raw")]]
    assert len(paths) == 4
    for xy in paths:
        assert len(xy) and len(xy) <= 2 * (RIGHT - LEFT + 1)
        assert (xy >= (LEFT, TOP)).all() and (xy <= (RIGHT, BOTTOM)).all()
    raw = paths[3]
    top = raw[raw[:, 1].argmin()]
    assert top[0] == pytest.approx(LEFT + peak / 19_999 * (RIGHT - LEFT), abs=0.01), "thinning lost the peak"


def test_values_that_cannot_be_drawn_leave_gaps_and_are_counted():
    tree = chart({"a": [(0, 1.0), (1, 2.0), (2, nan), (3, 1.0), (4, inf), (5, 2.0), (6, 3.0)]})
    path = tree.all("path", "line")[0][0]["d"]
    assert path.count("M") == 3 and len(coordinates(path)) == 5
    assert "nan" not in path and "inf" not in path
    assert "2 of 7 not finite" in tree.all("ul", "legend")[0][1]
    tree = chart({"a": [(0, 1.0), (1, 0.0), (2, -1.0), (3, 2.0)]}, log_y=True)
    assert "2 of 4 not finite and positive" in tree.all("ul", "legend")[0][1]


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(0, nan), (1, inf)]}])
def test_chart_without_any_value_still_draws_its_axes(series):
    for log_y in (False, True):
        tree = chart(series, log_y)
        assert tree.all("path", "axis") and tree.all("ul", "legend")[0][1].count("nothing to draw") == len(series)


def test_moving_average_keeps_a_constant_and_bridges_no_gap():
    values = [2.0] * 200
    values[100] = nan
    tree = chart({"a": list(enumerate(values)), "b": [(0, 1.0), (1, 3.0)]})
    line, raw = tree.all("path", "line")[0][0]["d"], tree.all("path", "raw")[0][0]["d"]
    assert line == raw and line.count("M") == 2
    assert "average over 7 values" in tree.all("figcaption")[0][1]


def test_legend_shows_the_last_value_by_x():
    assert [t for _, t in chart({"a": [(9, 0.25), (1, 4.0)]}).all("span", "value")] == ["0.25"]


def test_numbers_are_right_aligned_and_carry_their_value_for_sorting():
    rows = [["b", 31.267, 1_000, "3.5 ± 0.1"], ["a", 9.5, 20, "-1.25 [-2, +0.5]"], ["c", nan, None, None]]
    tree = table(["name", "PSNR", "count", "FVD"], rows)
    assert ["number" in a.get("class", "") for a, _ in tree.all("th")] == [False, True, True, True]
    assert [t for _, t in column(tree, 1, 4)] == ["31.27", "9.50", "–"]
    assert [t for _, t in column(tree, 2, 4)] == ["1,000", "20", "–"]
    assert [t for _, t in column(tree, 3, 4)] == ["3.5 ± 0.1", "-1.25 [-2, +0.5]", "–"]
    for index, expected in ((1, [31.267, 9.5]), (2, [1000, 20]), (3, [3.5, -1.25])):
        values = [a.get("data-value") for a, _ in column(tree, index, 4)]
        assert values.pop() is None and [float(v) for v in values] == expected
    assert all("data-value" not in a for a, _ in column(tree, 0, 4))


def test_text_that_begins_with_a_digit_is_text():
    tree = table(["size", "note"], [["17x64", "2 of 3"], ["5", "-"]])
    assert all("class" not in a for a, _ in tree.all("td"))


def test_best_values_are_bold_ties_together_and_missing_never():
    rows = [["a", 1.0, 2.0], ["b", 3.0, nan], ["c", 3.0, 1.0], ["d", None, inf]]
    tree = table(["m", "PSNR", "FVD"], rows, best={"PSNR": "max", "FVD": "min"})
    assert [t for _, t in tree.all("strong")] == ["3.000", "3.000", "1.000"]
    assert [t for _, t in tree.all("th")] == ["m", "PSNR ↑", "FVD ↓"]


def test_float_digits_follow_the_largest_of_the_column():
    tree = table(["lpips", "kvd", "zero"], [[0.04123, 1234.56, 0.0], [0.9, -1.0, 0.0]])
    assert [t for _, t in tree.all("td")] == ["0.0412", "1,235", "0.00", "0.9000", "-1", "0.00"]
    assert math.isclose(float(tree.all("td")[0][0]["data-value"]), 0.04123)


def test_protocol_stands_under_its_table():
    tree = table(["m"], [["a"]], protocol="I3D, 17 frames", note="one seed")
    assert "I3D, 17 frames" in tree.all("figure", "table")[0][1] and "one seed" in tree.all("figcaption")[0][1]


def test_table_whose_rows_do_not_fit_its_header_is_an_error():
    with pytest.raises(ValueError, match="2 cells"):
        table(["a"], [[1, 2]])
    with pytest.raises(ValueError, match="FVD"):
        table(["a"], [[1]], best={"FVD": "min"})


# ---------------------------------------------------------------------------------------------------------------------
# Scatters, links, and what a reader does with a page


def scatter(views) -> Tree:
    page = Page("t")
    page.scatter("A against others", views, "A", "others")
    return Tree(page.html())


def test_scatter_places_equal_values_on_its_diagonal_and_leads_to_clips():
    dots = [Dot(10.0, 10.0, "low & flat", "clip-1"), Dot(20.0, 20.0, "high"), Dot(15.0, nan, "unknown", "clip-2")]
    tree = scatter({"PSNR": {"B": dots, "C": [Dot(12.0, 18.0, "better")]}, "SSIM": {"B": [], "C": []}})
    circles = [(float(a["cx"]), float(a["cy"]), a["class"]) for a, _ in tree.all("circle")]
    ends = coordinates(tree.all("path", "equal")[0][0]["d"])
    assert np.diff(ends, axis=0).tolist() == [[RIGHT - LEFT, TOP - SQUARE_BOTTOM]]
    part = [
        [(x - ends[0][0]) / (ends[1][0] - ends[0][0]), (y - ends[0][1]) / (ends[1][1] - ends[0][1])]
        for x, y, _ in circles
    ]
    assert part[0][0] == pytest.approx(part[0][1], abs=1e-4) and part[1][0] == pytest.approx(part[1][1], abs=1e-4)
    assert part[2][0] < part[2][1], "the better model of the two is the one upwards"
    assert [colour for *_, colour in circles] == ["c1", "c1", "c2"], "a value that is not finite is left out"
    assert [a["href"] for a, _ in tree.all("a")] == ["#clip-1"]
    assert [t for _, t in tree.all("title")][1].startswith("low & flat: 10 across")
    assert [a["data-name"] for a, _ in tree.all("div", "view")] == ["PSNR", "SSIM"]


def test_cells_link_to_groups_of_players():
    page = Page("t")
    page.table(["clip", "PSNR"], [[Link("a <b>", "clip-1"), 20.0]])
    page.players([Player("v", mp4())], title="Clip & 1", anchor="clip-1")
    tree = Tree(page.html())
    assert tree.all("a")[0] == ({"href": "#clip-1"}, "a <b>")
    assert tree.all("figure", "players")[0][0]["id"] == "clip-1" and tree.all("h3")[0][1] == "Clip & 1"


def test_page_in_a_browser(browser, tmp_path):
    """It plays, scrubs, steps by keys, sorts, changes the metric and leads from a dot to its clip, from a file."""
    page = Page("Two models")
    page.table(["clip", "PSNR"], [["b", 31.0], ["a", 9.0], ["c", nan]])
    dots = {metric: {"B": [Dot(1.0, 2.0, "first", "clip-1")]} for metric in ("PSNR", "SSIM")}
    page.scatter("A against B", dots, "A", "B")
    page.section("Clips")
    page.players([Player("A", mp4(25, 25)), Player("B", mp4(50, 50))], anchor="clip-1", title="Clip 1")
    browser.open(page.write(tmp_path / "index.html"))
    find = "document.querySelector.bind(document)"
    browser.run(f"globalThis.$ = {find}; globalThis.videos = [...document.querySelectorAll('video')]")
    browser.run("globalThis.wait = ms => new Promise(done => setTimeout(done, ms))")

    cells = "[...document.querySelectorAll('tbody tr')].map(row => row.cells[0].textContent).join('')"
    assert browser.run(cells) == "bac"
    assert [browser.run(f"$('th:nth-child(2) button').click(); {cells}") for _ in range(2)] == ["abc", "bac"]

    assert browser.run("[...document.querySelectorAll('.view')].map(view => view.hidden)") == [False, True]
    browser.run("$('.scatter select').value = 'SSIM'; $('.scatter select').dispatchEvent(new Event('change'))")
    assert browser.run("[...document.querySelectorAll('.view')].map(view => view.hidden)") == [True, False]
    browser.run("$('.view:not([hidden]) a').focus()")
    assert browser.run("$('.scatter .at').textContent").startswith("first")
    browser.run("$('.view:not([hidden]) circle').dispatchEvent(new MouseEvent('click', {bubbles: true})); wait(300)")
    assert browser.run("location.hash") == "#clip-1" and browser.run("document.activeElement.id") == "clip-1"

    for _ in range(100):  # a slow machine takes a while to decode
        if browser.run("wait(50).then(() => Math.min(...videos.map(v => v.currentTime)))") > 0.1:
            break
    assert browser.run("videos.every(video => !video.paused && video.currentTime > 0.1)"), "it plays in view"
    browser.press(" ")
    assert browser.run("wait(100).then(() => videos.every(video => video.paused))")

    browser.run("$('input').value = 30; $('input').dispatchEvent(new Event('input')); wait(300)")
    assert browser.run("videos.map(v => v.currentTime)") == pytest.approx([30.5 / 50] * 2, abs=1e-3)
    browser.run("$('.players').focus()")
    browser.press("ArrowRight")
    assert browser.run("wait(100).then(() => videos[1].currentTime)") == pytest.approx(31.5 / 50, abs=1e-3)
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    assert browser.run("$('input').value") == "29" and "0.58 / 1.00 s" in browser.run("$('.clock').textContent")
    seen = np.asarray(Image.open(browser.picture(tmp_path / "seen.png")).convert("L"))
    assert seen.shape[1] == 1200 and seen.std() > 5, "something is drawn"
