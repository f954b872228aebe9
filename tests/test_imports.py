"""What an import brings with it: names on demand, and the native format known all the same."""

import ast
import importlib
import inspect
import pickle
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import tiny

import hf_drt
from hf_drt import DRTConfig, DynamicRank
from hf_drt.after_import import called_after
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
        "from hf_drt.doctor import examine, worker",
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
    "layer = {'shape': [4, 4], 'form': 'factored', 'rank': 2}; "
    "block = {'quant_method': 'hf_drt', 'format_version': 1, 'layers': {'a': layer}}; "
    "config = auto.AutoQuantizationConfig.from_dict(block); assert type(config) is e.NativeConfig; "
    "made = auto.AutoHfQuantizer.from_config(config, pre_quantized=True); "
    "assert type(made).__module__ == 'hf_drt.export.native.quantizer'"
)


@pytest.mark.sampled(2)
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


@pytest.mark.sampled(1)
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
    """A package and a module of its own in two threads are another matter: there each thread holds the lock that the
    other waits for, whatever the package."""
    code = """
import sys, threading
import hf_drt, torch, transformers.utils.quantization_config, transformers.models.auto.configuration_auto
sys.setswitchinterval(1e-5)
names = ("transformers.quantizers", "transformers.modeling_utils", "hf_drt.export")
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


def test_a_stand_in_is_loaded_by_use_and_not_by_questions():
    code = (
        "import sys, copy, pickle, hf_drt.native_format as f; config = f.OnDemand('NativeConfig'); "
        "copy.copy(config); pickle.dumps(config); assert 'hf_drt.export' not in sys.modules; "
        "assert config.from_dict and 'hf_drt.export' in sys.modules"
    )
    run(code)


# ---- the mechanism itself, on a module of its own


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Name of a module, and what is called after its import: it counts in a list of the module's."""
    (tmp_path / "watched_module.py").write_text("calls = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield "watched_module", lambda module: module.calls.append("called")
    sys.meta_path[:] = finders
    sys.modules.pop("watched_module", None)


def test_nothing_is_imported_before_its_time(watched):
    called_after(*watched)
    assert watched[0] not in sys.modules
    assert importlib.import_module(watched[0]).calls == ["called"]


def test_a_module_that_is_there_already_is_served_at_once(watched):
    module = importlib.import_module(watched[0])
    called_after(*watched)
    assert module.calls == ["called"]


def test_a_module_that_is_executed_anew_is_served_anew(watched):
    called_after(*watched)
    module = importlib.import_module(watched[0])
    assert importlib.reload(module).calls == ["called"]


def test_the_watched_module_keeps_its_own_loader(watched):
    called_after(*watched)
    module = importlib.import_module(watched[0])
    assert {type(module.__loader__), type(module.__spec__.loader)} == {SourceFileLoader}
    assert "calls = []" in inspect.getsource(module)


def test_a_second_request_adds_no_second_finder(watched):
    called_after(*watched)
    finders = len(sys.meta_path)
    called_after(*watched)
    assert len(sys.meta_path) == finders


def test_a_module_that_is_nowhere_stays_unknown(watched):
    called_after("watched_nowhere", watched[1])
    with pytest.raises(ModuleNotFoundError, match="No module named 'watched_nowhere'"):
        importlib.import_module("watched_nowhere")


def test_after_a_failed_import_nothing_is_called(watched, tmp_path):
    Path(tmp_path, "watched_module.py").write_text("raise ImportError('broken')\n")
    calls = []
    called_after(watched[0], calls.append)
    with pytest.raises(ImportError, match="broken"):
        importlib.import_module(watched[0])
    assert not calls
