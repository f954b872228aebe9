"""Tables of text: what a cell holds cannot break one."""

from hf_drt.tables import markdown_table, plain_table


def test_a_bar_inside_of_a_cell_is_no_border():
    table = markdown_table(("setting", "value"), [("drt_exclude", "q_proj|k_proj")])
    assert table == "| setting | value |\n| --- | --- |\n| drt_exclude | q_proj\\|k_proj |"


def test_text_stands_on_the_left_and_numbers_on_the_right():
    assert plain_table(("name", "n"), [("a", "10"), ("longer", "2")]) == "name     n\na       10\nlonger   2"
