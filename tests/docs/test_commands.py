"""The check of commands: what is wrong on a page is found, whatever program it is of."""

import commands
import pytest

BAD = {
    "hf-drt plan MODEL --schedul auto": "No such option",
    "hf-drt paln MODEL": "has no command paln",
    "python recipes/pretrain_clm.py --drt_rank_ration 0.1": "not used by the HfArgumentParser",
    "python recipes/pretrain_clm.py --drt_rank_ratio 4": "rank_ratio must be in",
    "python recipes/overhead.py --rounds 3": "takes no words, and would run",
    "python recipes/benchmarks/benchmark.py running fashion_vit": "the parser refuses",
    "python recipes/nothing.py": "there is no script or module",
    "python -m hf_drt.run train.py --drt_schedule papr": "hf_drt.run refuses",
    "torchrun --nproc_per_node 2 -m hf_drt.run train.py --drt_resume auto": "hf_drt.run refuses",
    'pip install -e ".[nothing]"': "has no extra",
    'pip install "hf-drt[nothing] @ git+https://github.com/hf-drt/hf_drt"': "has no extra",
    'pip install "hf-drt @ git+https://github.com/other/hf_drt"': "git.https",
    "pip install hf_drt-0.0.1-py3-none-any.whl": "hf_drt-0.0.1",
    "pytest -m slow tests/nowhere.py": "there is no tests/nowhere.py",
    "pytest -m slwo": "no marker slwo",
    "git clone https://github.com/other/hf_drt": "clone",
    "mkdocs serve --nothing": "No such option",
    "dwim --all": "no check is known for `dwim --all`",
}


@pytest.mark.parametrize("text", BAD)
def test_a_wrong_command_is_found(text):
    (words,) = commands.commands_of(text)
    with pytest.raises(Exception, match=BAD[text]):
        commands.checked(words)


def test_the_words_of_commands():
    text = """\
flags="--a 1
    --b 2"   # over two lines
X=1 python one.py $flags && cd hf_drt
python two.py \\
    --c "3 4"  # and a comment
# nothing
"""
    assert commands.commands_of(text) == [
        ["python", "one.py", "--a", "1", "--b", "2"],
        ["cd", "hf_drt"],
        ["python", "two.py", "--c", "3 4"],
    ]
