"""Pictures for papers: what is drawn is what was logged, in files that are what their names say."""

import io
import struct
import xml.etree.ElementTree as ElementTree

import folders
import pytest
from matplotlib import rc_context

from hf_drt.report import read_runs
from hf_drt.report.figures import STYLE, draw_figures, write_figures

HOSTILE = "_a $x_{ <b>&"


@pytest.fixture
def two(tmp_path):
    return read_runs([folders.dynamic_run(tmp_path / "ours"), folders.plain_run(tmp_path / "theirs")])


def test_the_files(tmp_path, two):
    written = write_figures(two, tmp_path / "new" / "figures")
    names = {"curve-loss", "curve-eval-loss", "curve-learning-rate", "curve-grad-norm", "effective-rank"}
    names |= {"effective-rank-ours", "phases", "switches"}
    assert {path.name for path in written} == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    for path in written:
        if path.suffix == ".png":
            head = path.read_bytes()[:24]
            assert head[:8] == b"\x89PNG\r\n\x1a\n"
            assert struct.unpack(">I", head[16:20]) == (1400,)  # 7 inches at 200 dpi
        else:
            assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_same_run_gives_the_same_files(tmp_path):
    runs = read_runs([folders.write_log(tmp_path / "run", [{"step": 5, "loss": 4.0}, {"step": 9, "loss": 3.0}])])
    first, second = (write_figures(runs, tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert len(first) == 2


def test_curves_are_over_steps_and_over_seconds(two):
    figures = dict(draw_figures(two))
    steps, seconds = figures["curve-loss"].axes
    assert [panel.get_xlabel() for panel in (steps, seconds)] == ["update steps", "seconds of training"]
    ours, theirs = steps.lines
    assert ours.get_xydata().tolist() == [[5, 4.0], [10, 3.5], [15, 3.0], [20, 2.5]]
    assert theirs.get_xydata().tolist() == [[5, 4.5], [20, 2.25]]
    assert seconds.lines[0].get_xdata().tolist() == [6.0, 11.0, 15.5, 18.0]
    assert seconds.lines[1].get_xdata().tolist() == [10.0, 40.0]
    shades = [(p.get_x(), p.get_x() + p.get_width()) for p in seconds.patches]
    assert shades == [(1.0, 11.0), (13.0, 18.0)]
    assert [text.get_text() for text in steps.texts] == ["factored", "dense"]


def test_without_seconds_there_is_one_panel(tmp_path):
    rows = [{"step": 5, "loss": 4.0}, {"step": 10, "loss": 3.0}]
    (figure,) = dict(draw_figures(read_runs([folders.write_log(tmp_path, rows)]))).values()
    assert len(figure.axes) == 1


def test_the_heat_map_has_a_row_for_each_layer(two):
    figure = dict(draw_figures(two))["effective-rank-ours"]
    mesh = figure.axes[0].collections[0]
    assert mesh.get_array().tolist() == [[3.0 + i, 5.0 + i] for i in range(6)]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][:2] == [
        "0.self_attn.q_proj",
        "0.mlp.up_proj",
    ]
    assert mesh.get_clim() == (3.0, 10.0)


def test_bars_of_phases_and_switches(two):
    figures = dict(draw_figures(two))
    widths = {panel.get_title(): [bar.get_width() for bar in panel.patches] for panel in figures["phases"].axes}
    assert widths == {"tokens per second": [80, 160], "peak memory, MiB": [64, 96], "seconds": [10, 5]}
    switches = figures["switches"].axes
    assert [bar.get_width() for bar in switches[0].patches] == [1.0, 2.0]
    assert [text.get_text() for text in switches[2].texts] == ["–", "0.12"]


def texts(figure):
    """All text of a figure, as it is drawn."""
    file = io.BytesIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg")
    return "".join(ElementTree.fromstring(file.getvalue()).itertext())


def test_names_that_matplotlib_would_read_as_more_than_text(tmp_path):
    runs = read_runs([folders.dynamic_run(tmp_path / HOSTILE), folders.dynamic_run(tmp_path / "other")])
    with rc_context(STYLE):
        found = {name: texts(figure) for name, figure in draw_figures(runs)}
    for name in ("curve-loss", "effective-rank-a-x-b", "phases", "switches"):
        assert HOSTILE in found[name], name


def test_a_diverged_run_is_drawn(tmp_path):
    rows = folders.rows()
    rows[8]["loss"] = rows[7]["drt_effective_rank_mean"] = float("nan")
    rows[7][f"drt_effective_rank/{folders.LAYERS[0]}"] = float("nan")
    figures = dict(draw_figures(read_runs([folders.write_log(tmp_path / "run", rows)])))
    assert figures["curve-loss"].axes[0].lines[0].get_xdata().tolist() == [5, 10, 15]
    for name in ("curve-loss", "effective-rank", "effective-rank-run"):
        assert texts(figures[name])
