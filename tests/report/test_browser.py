"""The page in a real browser: nothing fetched, no error, nothing wider than the window, every switch of it works."""

import json
import shutil

import folders
import pytest

from hf_drt.report import read_runs, write_page

pytestmark = pytest.mark.slow

SIZES = {"wide": (1280, 900), "narrow": (420, 900)}
HOSTILE = "<img src=x onerror=window.hacked=1>\"'&amp;"


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs a browser: apt-get install -y chromium")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory, trained):
    """A trained run, one written by hand under a hostile name, and a plain one."""
    root = tmp_path_factory.mktemp("pages")
    runs = [trained, folders.dynamic_run(root / HOSTILE), folders.plain_run(root / "plain")]
    return write_page(read_runs(runs), root / "report.html")


@pytest.fixture
def opened(browser, report):
    """Opens the page at a size; at the end there must have been no error and no request but for the page itself."""
    seen, pages = [], []

    def opened(size="wide", scheme="light", path=report):
        width, height = SIZES[size]
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        pages.append(page)
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: seen.append(request.url))
        page.goto(path.as_uri())
        assert [url for url in seen if not url.startswith("data:")] == [path.as_uri()]
        seen.clear()
        return page

    yield opened
    assert [url for url in seen if not url.startswith("data:")] == []
    for page in pages:
        page.close()


# Text that is cut off at the edge of its picture.
OUTSIDE = """() => [...document.querySelectorAll("svg.plot text")].filter((text) => {
    const own = text.getBoundingClientRect(), plot = text.closest("svg").getBoundingClientRect();
    return own.left < plot.left - 1 || own.right > plot.right + 1 || own.bottom > plot.bottom + 1;
}).map((text) => text.textContent)"""
LINES = "figure[data-chart={}] path.line:not(.thin)"


def lines(page, chart="loss"):
    return [line.get_attribute("d") for line in page.locator(LINES.format(chart)).all()]


def units(page):
    return set(page.locator("svg.plot text.unit").all_text_contents())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_everything_is_drawn_and_fits(opened, size, scheme):
    page = opened(size, scheme)
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) == 0
    for button in ("seconds", "steps"):
        page.click(f"button[data-axis={button}]")
        assert page.evaluate(overflow) == 0
        for chart in ("loss", "eval_loss", "learning_rate"):
            assert len(lines(page, chart)) == 3
        assert len(lines(page, "drt_effective_rank_mean")) == 2
        assert page.locator("figure[data-heat] image").count() == 2
        assert page.evaluate(OUTSIDE) == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == (scheme == "dark")


# Cells of the overview that are not wholly inside the window.
CUT_OFF = """() => [...document.querySelectorAll("table.overview :is(th, td)")].filter((cell) => {
    const box = cell.getBoundingClientRect();
    return box.width && (box.left < 0 || box.right > document.documentElement.clientWidth);
}).map((cell) => cell.textContent)"""


def test_a_phone_shows_every_run_of_the_overview(opened):
    page = opened("narrow")
    assert page.evaluate(CUT_OFF) == []
    assert page.locator("table.overview thead th:visible").count() == 3


@pytest.mark.parametrize("size", SIZES)
def test_long_numbers_fit(opened, tmp_path, size):
    rows = [
        {"step": step, "loss": 3 + 1 / step, "eval_far": -1e9 * step, **folders.ranks(step)} for step in (1000, 10**5)
    ]
    page = opened(size, path=write_page(read_runs([folders.write_log(tmp_path / "run", rows)]), tmp_path / "page.html"))
    assert page.evaluate(OUTSIDE) == []
    assert "100,000" in page.locator("figure[data-chart=loss]").text_content()


def test_the_axis_changes_between_steps_and_seconds_and_back(opened):
    page = opened()
    before = lines(page)
    assert units(page) == {"update steps"}
    page.click("button[data-axis=seconds]")
    assert units(page) == {"seconds of training"}
    assert all(new != old for new, old in zip(lines(page)[:2], before[:2], strict=True))
    assert lines(page)[2] == before[2]  # the plain run is the longest, and its seconds are spread evenly
    assert page.get_attribute("button[data-axis=seconds]", "aria-pressed") == "true"
    page.click("button[data-axis=steps]")
    assert lines(page) == before


def test_points_stand_where_their_numbers_say(opened, trained):
    """The horizontal places of the curve are linear in the steps of the log, the vertical ones in its losses."""
    page = opened()
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    logged = [(row["step"], row["loss"]) for row in history if "loss" in row]
    drawn = [tuple(map(float, pair.split(","))) for pair in lines(page)[0][1:].split("L")]
    assert len(drawn) == len(logged)
    for axis, sign in ((0, 1), (1, -1)):
        values, places = [p[axis] for p in logged], [p[axis] for p in drawn]
        scale = (places[-1] - places[0]) / (values[-1] - values[0])
        assert scale * sign > 0
        expected = [places[0] + scale * (value - values[0]) for value in values]
        assert places == pytest.approx(expected, abs=0.3)


def test_log_scale_changes_places_and_order_stays(opened):
    page = opened()
    before = lines(page)
    page.click("#log")
    after = lines(page)
    assert after != before
    assert [path.split("L")[0].split(",")[0] for path in after] == [path.split("L")[0].split(",")[0] for path in before]
    page.click("#log")
    assert lines(page) == before


def test_runs_are_hidden_and_shown(opened):
    page = opened()
    before = lines(page)
    page.click("button[data-run='1']")
    assert len(lines(page)) == 2
    assert page.locator("figure[data-heat='1']").is_hidden()
    page.click("button[data-run='0']")
    page.click("button[data-run='2']")
    assert lines(page) == []
    assert "none of the runs shown has it" in page.locator("figure[data-chart=loss]").text_content()
    for run in "012":
        page.click(f"button[data-run='{run}']")
    assert lines(page) == before


def test_phases_of_the_chosen_run_are_shaded(opened):
    page = opened()
    shades = page.locator("figure[data-chart=loss] rect.wash")
    kinds = lambda: [shade.get_attribute("data-kind") for shade in shades.all()]  # noqa: E731
    assert kinds() == ["factored", "dense", "adapter"]
    assert page.locator("figure[data-chart=loss] rect.strip").count() == 5  # of both runs
    page.select_option("#shade", label=HOSTILE)
    assert kinds() == ["factored", "dense"]
    page.select_option("#shade", label="none")
    assert kinds() == []


def test_hovering_and_arrow_keys_read_the_values(opened):
    page = opened()
    plot = page.locator("figure[data-chart=eval_loss] svg.plot")
    box = plot.bounding_box()
    plot.hover(position={"x": box["width"] - 24, "y": 100})
    tip = page.locator("#tip")
    assert tip.is_visible()
    assert "update steps: 20" in tip.text_content()
    assert "plain1.75" in tip.text_content()
    assert f"{HOSTILE} (dense)2" in tip.text_content()
    page.mouse.move(2, 2)
    assert tip.is_hidden()
    plot.focus()
    page.keyboard.press("ArrowRight")
    assert "update steps: 5" in tip.text_content()
    page.keyboard.press("ArrowRight")
    assert "update steps: 10" in tip.text_content()


def test_the_heat_map_has_the_colours_of_its_values(opened):
    page = opened()
    colours = page.evaluate(
        """async () => {
            const image = new Image();
            image.src = document.querySelector("figure[data-heat='1'] image").getAttribute("href");
            await image.decode();
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.width, image.height];
            const pen = canvas.getContext("2d", { willReadFrequently: true });
            pen.drawImage(image, 0, 0);
            const at = (x, y) => [...pen.getImageData(x * image.width, y * image.height, 1, 1).data].slice(0, 3);
            return [at(0.25, 0.04), at(0.25, 0.96), at(0.75, 0.96)];
        }"""
    )
    # Ranks of the run by hand go from 3 (first layer, first phase) to 10; the trained one's lie above and below.
    ranks = [json.loads(page.locator("#data").text_content())["runs"][i]["ranks"]["values"] for i in (0, 1)]
    values = [value for run in ranks for row in run for value in row]
    low, high = min(values), max(values)
    stops = [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]  # viridis at quarters
    for colour, value in zip(colours, (3.0, 8.0, 10.0), strict=True):
        place = 4 * (value - low) / (high - low)
        index = min(int(place), 3)
        expected = [a + (place - index) * (b - a) for a, b in zip(stops[index], stops[index + 1], strict=True)]
        assert colour == pytest.approx(expected, abs=24), value
    page.locator("figure[data-heat='1'] svg.plot").hover(position={"x": 900, "y": 25})
    assert "model.layers.0.self_attn.q_proj" in page.locator("#tip").text_content()


def test_a_hostile_name_is_text(opened):
    page = opened()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert page.locator("button[data-run='1'] span").text_content() == HOSTILE


def test_a_window_that_is_made_narrow_is_filled_anew(opened):
    page = opened("wide")
    before = lines(page)
    page.set_viewport_size({"width": 420, "height": 900})
    page.wait_for_function("document.querySelector('svg.plot').viewBox.baseVal.width < 420")
    assert page.evaluate("document.documentElement.scrollWidth") == 420
    assert lines(page) != before


def test_without_a_script_the_tables_are_there(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator("table.overview tbody tr").count() > 10
    assert page.locator("noscript p").is_visible()
    context.close()
