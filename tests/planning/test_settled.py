"""Settings that a preset brings by what 'lowrank' stands for: settled where a plan is resolved on a model, with what
the user has set going before, and known as the preset's."""

import copy
import pickle
from dataclasses import replace

import pytest
import tiny

from hf_drt import DRTConfig, DynamicRank, Run, Schedule
from hf_drt.optim import form_group_options, group_settings
from hf_drt.planning import resolved_plan
from hf_drt.planning.idle_settings import settings_given
from hf_drt.schedule import PRESETS, Follows, Preset, preset_rows, register

BROUGHT = {"matrix_optimizer", "dense_query_key"}
WAY_OUT = (
    " The preset auto brings matrix_optimizer=muon: to do without, set matrix_optimizer='none' (factors under the "
    "run's own optimizer), or schedule='auto_late'."
)


@pytest.fixture
def presets():
    """Registers presets for the length of a test."""
    names = []

    def add(preset: Preset) -> None:
        register(preset)
        names.append(preset.name)

    yield add
    for name in names:
        PRESETS.remove(name)


@pytest.mark.parametrize(
    ("schedule", "lowrank", "optimizer", "keeps"),
    [
        ("auto", "factored", "muon", False),
        ("auto", "adapter", "none", True),
        ("auto", None, "none", True),
        ("auto_late", "factored", "none", True),
        ("auto_late", "adapter", "none", True),
        ("factored@0", "factored", "none", False),
        (None, None, "none", False),
    ],
)
def test_what_is_brought_goes_by_what_lowrank_stands_for(schedule, lowrank, optimizer, keeps):
    config = DRTConfig(schedule=schedule)
    assert config.matrix_optimizer is None
    found = config.settled(lowrank)
    assert (found.matrix_optimizer, found.keeps_query_key, found.lowrank) == (optimizer, keeps, lowrank)
    assert found.uses_matrix_optimizer == (optimizer == "muon")
    assert found.brought == (BROUGHT if optimizer == "muon" else set())
    assert found.without_matrix_optimizer == (WAY_OUT if optimizer == "muon" else "")
    assert config == DRTConfig(schedule=schedule)
    assert found.given is config


@pytest.mark.parametrize("optimizer", ["muon", "none"])
def test_what_the_user_sets_goes_before(optimizer):
    found = DRTConfig(schedule="auto", matrix_optimizer=optimizer, dense_query_key=True).settled("factored")
    assert (found.matrix_optimizer, found.dense_query_key) == (optimizer, True)
    assert (found.brought, found.without_matrix_optimizer) == (set(), "")


def test_settled_settings_have_the_phases_of_their_case():
    config = DRTConfig(schedule="auto")
    assert str(config.settled("factored").parsed) == "lowrank:budget@0"
    assert str(config.settled("adapter").parsed) == "lowrank:budget@0 dense@budget"
    assert str(config.parsed) == "auto"


def test_settling_again_changes_nothing_and_for_another_case_begins_anew():
    found = DRTConfig(schedule="auto", seed=3).settled("factored")
    assert found.settled("factored") is found
    other = found.settled("adapter")
    definite = {"matrix_optimizer": "none", "adapter_init": "zero", "moments": "reset"}
    assert other == DRTConfig(schedule="auto", seed=3, **definite)
    assert other.settled("factored") == found


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_copy_is_settled_too(twin):
    found = DRTConfig(schedule="auto").settled("factored")
    copied = twin(found)
    assert (copied, copied.lowrank, copied.brought) == (found, "factored", found.brought)
    assert str(copied.parsed) == "lowrank:budget@0"


def test_what_a_changed_copy_of_settled_settings_has_is_its_own():
    found = replace(DRTConfig(schedule="auto").settled("factored"), seed=3)
    assert (found.matrix_optimizer, found.brought, found.lowrank) == ("muon", set(), None)
    assert found.settled("factored").without_matrix_optimizer == ""


def test_whether_a_matrix_optimizer_is_used_is_not_known_before():
    config = DRTConfig(schedule="auto")
    for ask in (lambda: config.uses_matrix_optimizer, lambda: form_group_options(config)):
        with pytest.raises(
            RuntimeError, match=r"the preset auto brings a matrix_optimizer depends .* Ask config\.settl"
        ):
            ask()
    assert not DRTConfig(schedule="auto_late").uses_matrix_optimizer
    assert DRTConfig(schedule="auto", matrix_optimizer="muon").uses_matrix_optimizer


def test_a_setting_that_is_off_needs_no_groups():
    assert group_settings(DRTConfig(schedule="fixed")) == group_settings(
        DRTConfig(schedule="fixed").settled("factored")
    )
    assert group_settings(DRTConfig(schedule="auto").settled("factored")) == "matrix_optimizer=muon"


def test_what_is_brought_is_no_setting_of_the_user():
    assert settings_given(DRTConfig(schedule="auto").settled("factored")) == []
    assert settings_given(DRTConfig(schedule="auto", dense_query_key=False).settled("factored")) == []
    assert settings_given(DRTConfig(schedule="auto", matrix_optimizer="none").settled("factored")) == [
        "matrix_optimizer"
    ]
    assert settings_given(DRTConfig(schedule="fixed", matrix_optimizer="none").settled("factored")) == []
    assert settings_given(DRTConfig(matrix_optimizer="none")) == []


# ---- on a model


@pytest.mark.parametrize(("start", "lowrank"), [("scratch", "factored"), ("pretrained", "adapter")])
def test_a_plan_has_them_settled(start, lowrank):
    config = DRTConfig(schedule="auto", start=start, rank_multiple=1)
    resolved = resolved_plan(config, Run(100), tiny.llama())
    assert resolved.config == config.settled(lowrank)
    assert (resolved.config.lowrank, resolved.lowrank) == (lowrank, lowrank)
    drt = DynamicRank(tiny.llama(), config, plan=resolved)  # as given, or as settled
    assert drt.config == DynamicRank(tiny.llama(), resolved.config, plan=resolved).config == resolved.config


@pytest.mark.parametrize(
    ("text", "optimizer"), [("factored@0 dense@50%", "muon"), ("adapter@0", "none"), ("dense@0", "none")]
)
def test_a_plan_made_by_hand_settles_them_by_its_phases(text, optimizer):
    plan = Schedule.parse(text).resolve(Run(20))
    assert DynamicRank(tiny.llama(), DRTConfig(schedule="auto"), plan=plan).config.matrix_optimizer == optimizer


# ---- a preset of the user


def own(**changes) -> Preset:
    return Preset(
        **{
            "name": "own",
            "help": "factors at a rank of their own, or adapters and full rank.",
            "build": lambda share: f"lowrank:{share}@0",
            "options": {"share": 0.125},
            "settings": {"matrix_optimizer": Follows("lowrank", {"factored": "muon"}), "seed": 11},
            "adapters": lambda share: f"lowrank:{share}@0 dense@50%",
            "instead": "fixed",
        }
        | changes
    )


def test_a_preset_of_the_user_can_do_the_same(presets):
    presets(own(budget=0.15))
    config = DRTConfig(schedule="own(share=0.25)", rank_multiple=1)
    drt = DynamicRank(tiny.llama(), config, max_steps=20)
    assert (str(drt.plan), drt.config.matrix_optimizer, drt.seed) == ("factored:0.25@0", "muon", 11)
    assert "preset own brings matrix_optimizer=muon: " in drt.config.without_matrix_optimizer
    assert drt.config.without_matrix_optimizer.endswith("or schedule='fixed'.")
    drt = DynamicRank(tiny.llama(), replace(config, start="pretrained"), max_steps=20)
    assert (str(drt.plan), drt.config.matrix_optimizer) == ("adapter:0.25@0 dense@10", "none")
    assert str(config.parsed) == "own(share=0.25)"
    assert preset_rows()[-1][2] == "matrix_optimizer muon in factored form, seed 11, budget 0.15 in factored form"
    assert "0.15 in 'own'" in DRTConfig.__dataclass_fields__["budget"].metadata["help"]


def test_one_that_brings_it_in_any_case_is_named_too(presets):
    presets(own(settings={"matrix_optimizer": "muon"}, instead=None))
    found = DRTConfig(schedule="own").settled("adapter")
    assert found.matrix_optimizer == "muon"
    assert found.without_matrix_optimizer.endswith("(factors under the run's own optimizer).")
    presets(own(name="other", settings={"matrix_optimizer": "none"}))
    assert DRTConfig(schedule="other").settled("factored").without_matrix_optimizer == ""


def test_one_with_a_budget_of_its_own_has_it_in_force(presets):
    presets(own(name="thin", build=lambda: "lowrank:budget@0", adapters=None, options={}, budget=0.06, settings={}))
    resolved = resolved_plan(DRTConfig(schedule="thin", rank_multiple=1, dense_query_key=False), Run(100), tiny.llama())
    assert (resolved.budget, resolved.plan.phases[0].rank) == (0.06, 1 / 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matrix_optimizer": Follows("lowrank", {"factored": "adam"})}, r"must be one of none, muon, got 'adam'"),
        ({"rank_ratio": Follows("lowrank", {"factored": 0.5})}, r"'own' brings rank_ratio=.* can be left unset: "),
    ],
)
def test_what_cannot_be_brought_is_refused(presets, settings, message):
    presets(own(settings=settings))
    with pytest.raises(ValueError, match=message):
        DRTConfig(schedule="own").settled("factored")


def test_alpha_is_of_adapters_alone():
    with pytest.raises(ValueError, match=r"'own' brings adapter_alpha by what 'lowrank' stands for, .* value itself"):
        register(own(settings={"adapter_alpha": Follows("lowrank", {"adapter": 4.0})}))
    assert "own" not in PRESETS
