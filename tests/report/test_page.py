"""The page as a browser would parse it, against the logs themselves; nothing fetched, no text of a run is markup."""

import json
import math
import re
from html.parser import HTMLParser

import folders
import pytest

from hf_drt.report import read_runs, write_page
from hf_drt.report.page import thinned
from hf_drt.report.run_data import Point
from hf_drt.report.tables import lower_is_better

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)<!-- \"'&amp;${x}"
VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Tags with their attributes, tables as lists of rows of text, and the content of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.stack, self.tables, self.raw, self.words = [], [], [], {}, {}
        self.feed(text)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append((tag, dict(attrs).get("id") or dict(attrs).get("class")))
        if tag == "table":
            self.tables.append((dict(attrs)["class"], []))
        if tag == "tr":
            self.tables[-1][1].append([])
        if tag in ("td", "th"):
            self.tables[-1][1][-1].append("")

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        tag, name = self.stack[-1] if self.stack else (None, None)
        if tag in ("script", "style"):
            self.raw[name or tag] = self.raw.get(name or tag, "") + data
        elif any(each in ("td", "th") for each, _ in self.stack):
            self.tables[-1][1][-1][-1] += data
        self.words[tag] = self.words.get(tag, "") + data

    @property
    def data(self):
        return json.loads(self.raw["data"])

    def table(self, name):
        (rows,) = [rows for found, rows in self.tables if found == name]
        return rows


def page_of(tmp_path, *paths):
    return Page(write_page(read_runs(paths), tmp_path / "pages" / "report.html").read_text(encoding="utf-8"))


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_the_data_are_those_of_the_log(tmp_path, trained):
    (run,) = page_of(tmp_path, trained).data["runs"]
    rows = history(trained)
    for key in ("loss", "eval_loss", "learning_rate", "grad_norm", "drt_effective_rank_mean", "drt_effective_rank_min"):
        logged = [row for row in rows if key in row]
        assert run["series"][key]["steps"] == [row["step"] for row in logged]
        assert run["series"][key]["values"] == pytest.approx([row[key] for row in logged], rel=1e-5)
    assert [(p["label"], p["steps"]) for p in run["phases"]] == [
        ("factored", [0, 8]),
        ("dense", [8, 16]),
        ("adapter", [16, 20]),
    ]
    by_step = {row["step"]: row for row in rows if "drt_effective_rank_mean" in row}
    ranks = run["ranks"]
    assert ranks["prefix"] == "model.layers."
    for name, values in zip(ranks["layers"], ranks["values"], strict=True):
        expected = [row[f"drt_effective_rank/model.layers.{name}"] for row in by_step.values()]
        assert values == pytest.approx(expected, rel=1e-5)


def test_seconds_of_points_and_phases(tmp_path):
    (run,) = page_of(tmp_path, folders.dynamic_run(tmp_path / "run")).data["runs"]
    assert run["series"]["loss"]["seconds"] == [6.0, 11.0, 15.5, 18.0]
    assert [phase["seconds"] for phase in run["phases"]] == [[1.0, 11.0], [13.0, 18.0]]
    assert run["end"] == {"steps": 20, "seconds": 18.0}
    assert run["ranks"]["seconds"] == [11.0, 18.0]


def test_runs_stand_side_by_side(tmp_path):
    """Numbers from the rows of folders.py, by hand."""
    page = page_of(tmp_path, folders.dynamic_run(tmp_path / "ours"), folders.plain_run(tmp_path / "theirs"))
    table = {row[0]: row[1:] for row in page.table("overview")}
    assert table[""] == ["ours", "theirs"]
    assert table["schedule"] == ["factored@0 dense@10", "none (plain Trainer)"]
    assert table["eval loss, final"] == ["2.000", "1.750"]
    assert table["eval loss, lowest"] == ["2.000 at step 20", "1.750 at step 20"]
    assert table["training seconds"] == ["18.0 s", "≤ 40.0 s"]
    assert table["of that in switches"] == ["3.00 s (16.7%)", "–"]
    assert table["train_runtime, all included"] == ["40.0 s", "50.0 s"]
    assert table["FLOPs of the target layers / dense"] == ["0.75", "1 if dense"]
    assert table["trainable parameters of them / dense"] == ["0.50", "1 if dense"]
    assert table["trainable parameters, average"] == ["200", "–"]  # 100 and 300, ten steps each
    assert table["tokens per second, average"] == ["107", "–"]  # 80 for 10 s, 160 for 5 s
    assert table["samples per second, average"] == ["10.7", "≥ 3.2"]
    assert table["peak memory, MiB"] == ["96", "–"]
    assert table["effective rank at the end, mean"] == ["7.5", "–"]
    best = [attrs for tag, attrs in page.tags if tag == "td" and "best" in attrs.get("class", "")]
    assert len(best) == 2  # final and lowest, of one run
    assert "is of a plain Trainer" in page.words["li"]


def test_phases_and_switches_in_tables(tmp_path):
    page = page_of(tmp_path, folders.dynamic_run(tmp_path / "run"))
    head, name, *rows = page.table("phases")
    assert head == [
        "phase", "rank", "steps", "seconds", "tokens/s", "samples/s", "peak MiB", "trainable parameters",
        "effective rank", "eval loss at the end",
    ]  # fmt: skip
    assert name == ["run"]
    assert rows == [
        ["0 factored", "2 to 4", "10", "10.0", "80", "8.0", "64", "100", "5.5", "3.250"],
        ["1 dense", "full", "10", "5.0", "160", "16.0", "96", "300", "7.5", "2.000"],
    ]
    bars = [attrs["style"] for _, attrs in page.tags if attrs.get("class") == "bar"]
    assert bars[:5] == ["--share:1.000", "--share:0.500", "--share:0.500", "--share:0.667", "--share:0.333"]
    assert page.table("switches")[2:] == [
        ["step 0", "0 factored", "1.000", "0.7", "0", "–"],
        ["step 10", "1 dense", "2.000", "0", "0", "0.12"],
    ]


def test_a_plain_run_alone_has_no_phases(tmp_path):
    page = page_of(tmp_path, folders.plain_run(tmp_path / "run"))
    assert [name for name, _ in page.tables] == ["overview"]
    assert page.data["curves"] == ["loss", "eval_loss", "learning_rate"]
    assert "rankcharts" not in [attrs.get("id") for _, attrs in page.tags]


def test_a_run_that_is_dense_throughout_is_measured_and_has_no_phases(tmp_path):
    rows = [row for row in folders.rows() if row.get("drt_phase") != 1]
    folders.write_plan(tmp_path / "dense" / "checkpoint-20", "dense@0", phase=0)
    page = page_of(tmp_path, folders.write_log(tmp_path / "dense", rows), folders.dynamic_run(tmp_path / "ours"))
    dense, ours = page.data["runs"]
    assert (dense["phases"], len(ours["phases"])) == ([], 2)
    assert "2 runs side by side, 1 of them with phases." in page.words["p"]
    assert [row[0] for row in page.table("phases") if len(row) == 1] == ["ours"]
    assert [row[0] for row in page.table("switches") if len(row) == 1] == ["ours"]
    assert {row[0]: row[1] for row in page.table("overview")}["peak memory, MiB"] == "64"


def test_without_ranks_by_layer_the_page_says_how_to_get_them(tmp_path):
    rows = [{k: v for k, v in row.items() if "rank/" not in k} for row in folders.rows()]
    folders.write_plan(tmp_path / "run" / "checkpoint-20")
    page = page_of(tmp_path, folders.write_log(tmp_path / "run", rows))
    assert page.data["runs"][0]["ranks"] is None
    assert "--drt_log_rank_steps 100 --drt_log_rank_per_layer true" in page.words["code"]


def test_nothing_is_fetched(tmp_path, trained):
    page = page_of(tmp_path, trained, folders.plain_run(tmp_path / "plain"))
    links = [(tag, value) for tag, attrs in page.tags for key, value in attrs.items() if key in ("src", "href")]
    assert links == [("link", "data:,")]
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    addresses = set(re.findall(r"https?://[^\"'\s)]+", page.raw["script"] + page.raw["style"]))
    assert addresses == {"http://www.w3.org/1999/xhtml", "http://www.w3.org/2000/svg"}  # names, not places
    assert "url(" not in page.raw["style"]
    assert "@import" not in page.raw["style"]


def test_a_hostile_run_is_text(tmp_path):
    folder = folders.dynamic_run(tmp_path / HOSTILE)
    rows = folders.rows()
    rows[-2]["eval_</script><b>"] = 1.0
    rows[2]["drt_effective_rank/<i>.layer"] = 4.0
    folders.write_log(folder, rows)
    tame = page_of(tmp_path, folders.dynamic_run(tmp_path / "tame"))
    page = page_of(tmp_path, folder)
    count = lambda page: {tag: sum(tag == found for found, _ in page.tags) for tag in ("script", "img", "b", "i")}  # noqa: E731
    assert count(page) == count(tame)
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert page.data["runs"][0]["name"] == HOSTILE
    assert not set("<>&") & set(page.raw["data"])  # a browser reads "<!-- <script " there as more than text
    assert HOSTILE in page.words["h1"]
    assert page.table("overview")[0][1] == HOSTILE
    assert "eval </script><b>, final" in [row[0] for row in page.table("overview")]
    assert "<i>.layer" in page.data["runs"][0]["ranks"]["layers"]


def test_a_diverged_run_is_shown(tmp_path):
    rows = folders.rows()
    rows[8]["loss"] = math.nan
    rows[9]["eval_loss"] = math.inf
    page = page_of(tmp_path, folders.write_log(tmp_path / "run", rows))
    assert page.data["runs"][0]["series"]["loss"]["values"] == [4.0, 3.5, 3.0, None]
    table = {row[0]: row[1] for row in page.table("overview")}
    assert table["eval loss, final"] == "inf"
    assert table["eval loss, lowest"] == "3.250 at step 10"
    assert "has diverged" in page.words["li"]


def test_an_unfinished_run_says_where_it_stands(tmp_path, trained):
    page = page_of(tmp_path, trained / "checkpoint-10")
    assert {row[0]: row[1] for row in page.table("overview")}["update steps"] == "10 of 20"
    assert "stands at update step 10 of 20" in page.words["li"]


def test_a_long_curve_keeps_its_extremes():
    series = tuple(Point(step, None, float(step % 7)) for step in range(10_000))
    series = (*series[:5000], Point(5000, None, 99.0), Point(5001, None, -99.0), *series[5002:])
    short = thinned(series, most=100)
    assert len(short) <= 101
    assert {point.value for point in short} >= {99.0, -99.0}
    assert short[-1] == series[-1]
    assert list(short) == sorted(short)
    assert set(short) <= set(series)
    assert thinned(series[:100], most=100) == series[:100]


def test_a_wide_heat_map_is_thinned_evenly(tmp_path):
    rows = [{"step": step, **folders.ranks(float(step))} for step in range(1, 1001)]
    (run,) = page_of(tmp_path, folders.write_log(tmp_path / "run", rows)).data["runs"]
    assert run["ranks"]["steps"] == list(range(4, 1001, 4))
    first = run["ranks"]["layers"].index("0.self_attn.q_proj")
    assert run["ranks"]["values"][first] == [float(step) for step in range(4, 1001, 4)]


@pytest.mark.parametrize(
    ("metric", "lower"),
    [("eval_loss", True), ("eval_wer", True), ("eval_accuracy", False), ("eval_f1", False), ("eval_answer", False)],
)
def test_which_way_a_metric_is_better(metric, lower):
    assert lower_is_better(metric) is lower
