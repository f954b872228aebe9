"""What an import brings with it: names on demand, and the native format known all the same."""

import ast
import importlib
import inspect
import pickle
import subprocess
import sys
import threading
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import tiny

import hf_drt
from hf_drt import DRTConfig, DynamicRank
from hf_drt.after_import import registered_with
from hf_drt.export import NativeConfig

LOADED = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error::FutureWarning", "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---- names on demand


@pytest.mark.parametrize(
    "statement",
    [
        "from hf_drt import DynamicRank, DRTConfig, Schedule, find_targets, convert, declare, Transition",
        "from hf_drt.compress import compress; from hf_drt.simulate import estimate_run",
    ],
)
def test_a_hand_written_loop_does_without_transformers(statement):
    assert not {"transformers", "accelerate", "datasets", "peft"} & set(run(f"{statement}; {LOADED}").split())


def test_the_help_of_the_command_line_does_without_torch():
    code = f"import hf_drt.cli\ntry: hf_drt.cli.main()\nexcept SystemExit as end: assert not end.code\n{LOADED}"
    *text, last = run(code, "--help").splitlines()
    assert any("compare" in line for line in text)
    assert "typer" in last.split()
    assert not {"torch", "transformers", "accelerate"} & set(last.split())


def imported_for_type_checkers() -> dict[str, str]:
    tree = ast.parse(inspect.getsource(hf_drt))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_type_checkers_see_the_names_that_are_there():
    seen = imported_for_type_checkers()
    assert sorted(seen) == sorted(hf_drt.__all__)
    for name, module in seen.items():
        assert getattr(hf_drt, name) is getattr(importlib.import_module(module), name)


def test_a_fresh_package_lists_what_it_has_not_imported_yet():
    code = (
        "import hf_drt, sys; print(*dir(hf_drt)); print('hf_drt.controller' in sys.modules); hf_drt.planning.resolution"
    )
    names, imported, *_ = run(code).splitlines()
    assert {*hf_drt.__all__, "__version__", "trainer", "planning", "engines"} <= set(names.split())
    assert imported == "False"


def test_a_star_import_brings_all_public_names():
    assert set(run("from hf_drt import *; print(*dir())").split()) >= set(hf_drt.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'hf_drt' has no attribute 'DinamicRank'"):
        hf_drt.DinamicRank  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'DinamicRank' from 'hf_drt'"):
        exec("from hf_drt import DinamicRank")


# ---- the native format, whoever comes first

KNOWN = (
    "from transformers.quantizers import auto; import hf_drt.export as e; "
    "assert auto.AUTO_QUANTIZER_MAPPING['hf_drt'].__module__.startswith('hf_drt.export.native'); "
    "assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['hf_drt'] is e.NativeConfig"
)


@pytest.mark.parametrize(
    "statement",
    [
        "import hf_drt; from transformers import PreTrainedModel",
        "import hf_drt; from transformers import Trainer",
        "from transformers import PreTrainedModel; import hf_drt",
        "import hf_drt.export",
        "import hf_drt.export.native",
    ],
)
def test_native_checkpoints_are_known_after_any_order_of_imports(statement):
    run(f"{statement}; {KNOWN}")


def test_what_is_imported_in_the_middle_of_transformers_does_without_its_models():
    for path in (Path(hf_drt.__file__).parent / "export").rglob("*.py"):
        nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [n for node in nodes for n in ([node.module] if isinstance(node, ast.ImportFrom) else
                                               [alias.name for alias in node.names])]  # fmt: skip
        theirs = [name for name in names if name.split(".")[0] in ("transformers", "peft", "accelerate")]
        assert all(name.startswith(("transformers.utils", "transformers.quantizers")) for name in theirs), path


@pytest.mark.parametrize("order", [("import hf_drt", "import transformers"), ("import transformers", "import hf_drt")])
def test_a_native_folder_loads_after_import_hf_drt_alone(order, tmp_path):
    model = tiny.llama()
    DynamicRank(model, DRTConfig(schedule="factored@0", rank=4), max_steps=2).apply(0)
    model.save_pretrained(tmp_path)
    code = "; ".join(order) + (
        "; m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "print(type(m.model.layers[0].mlp.up_proj).__name__, 'transformers.trainer' in sys.modules)"
    )
    assert run(f"import sys; {code}", str(tmp_path)).split() == ["FactoredLinear", "False"]


def test_threads_that_import_both_at_once_find_the_format():
    code = """
import sys, threading
import hf_drt, torch, transformers.utils.quantization_config, transformers.models.auto.configuration_auto
sys.setswitchinterval(1e-5)
names = ("transformers.quantizers.auto", "hf_drt.export.native", "transformers.modeling_utils", "hf_drt.export")
start, errors = threading.Barrier(len(names)), []
def load(name):
    start.wait()
    try: __import__(name)
    except BaseException as error: errors.append(f"{name}: {error!r}")
threads = [threading.Thread(target=load, args=(name,)) for name in names]
[thread.start() for thread in threads]
[thread.join(120) for thread in threads]
assert not errors, errors
assert not any(thread.is_alive() for thread in threads)
"""
    run(code + KNOWN)


def test_the_package_may_be_reloaded():
    code = "import sys, importlib, hf_drt; before = len(sys.meta_path); hf_drt.DynamicRank; importlib.reload(hf_drt); "
    run(code + "assert len(sys.meta_path) == before; assert hf_drt.DynamicRank.__name__ == 'DynamicRank'")


def test_a_pickled_block_of_the_configuration_brings_the_package_with_it():
    model = tiny.llama()
    DynamicRank(model, DRTConfig(schedule="factored@0", rank=4), max_steps=2).apply(0)
    block = pickle.dumps(NativeConfig(**model.config.quantization_config)).hex()
    code = (
        "import pickle, sys; b = pickle.loads(bytes.fromhex(sys.argv[1])); assert len(b.read()) == int(sys.argv[2]); "
    )
    run(code + KNOWN, block, str(len(model.config.quantization_config["layers"])))


# ---- the mechanism itself, on two modules of its own


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """A module that takes a while to be imported, and one that imports it and adds to its list."""
    (tmp_path / "slow_watched.py").write_text("import time\nadded = []\ntime.sleep(0.2)\n")
    (tmp_path / "slow_adder.py").write_text(
        "import slow_watched\ndef add():\n    slow_watched.added[:] = ['here']\nadd()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield "slow_watched", "slow_adder"
    sys.meta_path[:] = finders
    for name in ("slow_watched", "slow_adder"):
        sys.modules.pop(name, None)


def test_nothing_is_imported_before_its_time(pair):
    registered_with(*pair, "add")
    assert not {*pair} & set(sys.modules)
    assert importlib.import_module(pair[0]).added == ["here"]


def test_a_module_that_is_there_already_is_served_at_once(pair):
    watched = importlib.import_module(pair[0])
    registered_with(*pair, "add")
    assert watched.added == ["here"]


def test_a_module_that_is_executed_anew_is_served_anew(pair):
    registered_with(*pair, "add")
    watched = importlib.import_module(pair[0])
    assert importlib.reload(watched).added == ["here"]


def test_the_watched_module_keeps_its_own_loader(pair):
    registered_with(*pair, "add")
    watched = importlib.import_module(pair[0])
    assert {type(watched.__loader__), type(watched.__spec__.loader)} == {SourceFileLoader}
    assert "time.sleep" in inspect.getsource(watched)


def test_a_second_request_adds_no_second_finder(pair):
    registered_with(*pair, "add")
    finders = len(sys.meta_path)
    registered_with(*pair, "add")
    assert len(sys.meta_path) == finders


@pytest.mark.parametrize("first", [0, 1])
def test_two_threads_do_not_wait_for_each_other(pair, first):
    registered_with(*pair, "add")
    threads = [threading.Thread(target=importlib.import_module, args=(pair[i],)) for i in (first, 1 - first)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert sys.modules["slow_watched"].added == ["here"]


def test_a_module_that_is_nowhere_stays_unknown(pair):
    registered_with("slow_missing", pair[1], "add")
    with pytest.raises(ModuleNotFoundError, match="No module named 'slow_missing'"):
        importlib.import_module("slow_missing")
    assert pair[1] not in sys.modules


def test_a_failed_import_registers_nothing(pair, tmp_path):
    Path(tmp_path, "slow_watched.py").write_text("raise ImportError('broken')\n")
    registered_with(*pair, "add")
    with pytest.raises(ImportError, match="broken"):
        importlib.import_module(pair[0])
    assert pair[1] not in sys.modules
