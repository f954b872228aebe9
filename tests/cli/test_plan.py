"""``hf-drt plan``."""

import json
from dataclasses import dataclass, field, fields
from typing import Literal

import pytest
import tiny
import torch
import transformers
import typer
from typer.testing import CliRunner

from hf_drt import DRTConfig, DynamicRank
from hf_drt.cli.options import with_settings
from hf_drt.cli.plan import _LEFT_OUT
from hf_drt.planning import update_tokens
from hf_drt.schedule import PRESETS
from hf_drt.simulate import batch_spec, estimate_run
from hf_drt.targets import selection

SMALL = ("--batch-size", 2, "--seq-length", 8, "--rank-multiple", 4)


def test_every_field_of_the_settings_is_an_option_or_left_out_with_a_reason(hf_drt):
    text = " ".join(hf_drt("plan", "--help").out.split())
    for f in fields(DRTConfig):
        assert (f"--{f.name.replace('_', '-')} " in text) != (f.name in _LEFT_OUT), f.name
    assert all(_LEFT_OUT.values())
    for option in ("--steps-per-epoch", "--measure", "--dense-query-key / --no-dense-query-key", "[default: auto]"):
        assert option in text
    assert "in [0, 1]" not in text  # rewarmup_start is left out
    assert "(%), update steps (400)" in text  # of the field's own help, in which argparse doubles the sign


def test_a_new_field_is_an_option_by_itself():
    @dataclass(frozen=True)
    class More(DRTConfig):
        wanted: list[str] | None = field(default=None, metadata={"help": "Of 100%% more."})
        kind: Literal["a", "b"] = field(default="b", metadata={"help": "a or b."})

    got = {}
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    @with_settings(_LEFT_OUT, also={"kind": "Or so."}, source=More)
    def command(name: str, *, last: int = 3, **settings):
        got.update(settings, name=name, last=last)

    result = CliRunner().invoke(app, ["model", "--wanted", "x", "--wanted", "y", "--rank", "3"])
    assert result.exit_code == 0, result.output
    assert (got["wanted"], got["kind"], got["rank"], got["last"], got["name"]) == (["x", "y"], "b", 3, 3, "model")
    text = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    assert "Of 100% more. May be repeated." in text
    assert "a or b. Or so." in text
    with pytest.raises(ValueError, match=r"nosuch is not a field of DRTConfig, whose fields are schedule, rank_ratio"):
        with_settings({"nosuch": "of no use"})


@pytest.mark.sampled(8)
@pytest.mark.parametrize("schedule", [*PRESETS, "factored:0.125@0 dense@budget"])
@pytest.mark.parametrize("budget", [(), ("--budget", 0.95)])
def test_the_model_is_looked_through_once(hf_drt, configured, monkeypatch, schedule, budget):
    looks, real = [], selection._Surroundings.of.__func__

    def of(cls, model, entries):
        looks.append(model)
        return real(cls, model, entries)

    monkeypatch.setattr(selection._Surroundings, "of", classmethod(of))
    if schedule == "adaptive":
        budget = ("--budget", 0.95)
    if schedule in ("paper_conv", "rotate", "drift") and budget:
        budget = ()  # the ranks of the one are its own, of the other's groups, and nothing can be proposed
    wanted = ("plan", configured(), "--batch-size", 2, "--seq-length", 8, "--rank-multiple", 1, "--schedule", schedule)
    result = hf_drt(*wanted, *budget)
    assert result.code == 0, result.err
    assert len(looks) == 1


def test_auto_is_the_default_and_says_what_it_has_chosen(hf_drt, configured):
    wanted = ("plan", configured(), *SMALL[:-1], 1)
    drt = DynamicRank(tiny.llama(), DRTConfig(schedule="auto", rank_multiple=1, start="scratch"), max_steps=1000)
    out = hf_drt(*wanted).out
    assert out == hf_drt(*wanted, "--schedule", "auto").out
    lines, rank = out.splitlines(), drt.forms(0)["model.layers.0.mlp.up_proj"].rank
    assert "lowrank: factored form (start=scratch)" in lines
    budget = f"{drt.resolved.budget:g}"
    assert (
        sum(line.startswith(f"rank: factored {rank} (") and f"by the budget of {budget})" in line for line in lines)
        == 1
    )
    assert any(line.startswith("matrix_optimizer: muon (by the preset auto) at matrix_lr=0.04") for line in lines)
    assert "in phase 0 (factored)" in next(line for line in lines if line.startswith("matrix_optimizer adds to an"))
    own = hf_drt(*wanted, "--matrix-optimizer", "none").out
    assert "rank: factored" in own
    assert "matrix_optimizer" not in own


def test_auto_late_says_what_it_has_chosen(hf_drt, configured):
    drt = DynamicRank(tiny.llama(), DRTConfig(schedule="auto_late", rank_multiple=1, start="scratch"), max_steps=1000)
    lines = hf_drt("plan", configured(), *SMALL[:-1], 1, "--schedule", "auto_late").out.splitlines()
    assert f"boundary: dense from step {drt.plan.phases[1].start} on (by the budget of 0.3166)" in lines
    assert sum(line.startswith("rank: factored 1 (0.03125 of min(out, in) by the budget") for line in lines) == 1


def test_both_figures_of_cost_carry_their_names(hf_drt, configured):
    wanted = ("plan", configured(), *SMALL, "--schedule", "factored@0 dense@40%")
    data, out = json.loads(hf_drt(*wanted, "--json").out), hf_drt(*wanted).out
    drt = DynamicRank(tiny.llama(), DRTConfig(schedule="factored@0 dense@40%", rank_multiple=4), max_steps=1000)
    assert data["target_layers_flops_share"] == drt.cost().flops != data["flops_share"]
    assert f"cost, of the target layers alone: {drt.cost().flops:.3f} of their dense training FLOPs" in out
    share = f"{data['flops_share']:.3f} of dense training of the whole model"
    assert f"the run: {data['flops']:.4g} FLOPs, {share}" in out


def test_the_numbers_are_those_of_the_estimate(hf_drt, configured):
    result = hf_drt("plan", configured(), *SMALL, "--schedule", "factored@0 dense@40%", "--steps", 50, "--json")
    assert result.code == 0
    data = json.loads(result.out)
    with torch.device("meta"):
        model = tiny.llama()
    drt = DynamicRank(model, DRTConfig(schedule="factored@0 dense@40%", rank_multiple=4), max_steps=50)
    run = estimate_run(drt, batch_spec(model, 2, 8), optimizer="adamw_torch_fused")
    assert (data["flops"], data["peak"], data["flops_share"]) == (run.flops, run.peak, run.share)
    assert [(p["form"], p["start"], p["end"]) for p in data["phases"]] == [("factored", 0, 20), ("dense", 20, 50)]
    assert data["phases"][0]["trainable"] == run.phases[0].step.trainable
    assert len(data["layers"]) == 14
    assert data["layers"][0]["forms"] == [{"form": "factored", "rank": 8}, {"form": "dense"}]


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_every_kind_of_model(hf_drt, configured, kind):
    result = hf_drt("plan", configured(kind), "--schedule", "paper", "--batch-size", 2, "--seq-length", 8, "--rank", 4)
    assert result.code == 0, result.err
    assert "scratch" in result.out
    assert "the run: " in result.out


def test_plain_text_in_a_pipe(hf_drt, configured):
    result = hf_drt("plan", configured(), *SMALL, "--schedule", "paper", "--steps", 100)
    lines = result.out.splitlines()
    assert result.out.isascii()
    assert "\x1b" not in result.out
    assert "." * 24 + "#" * 24 + "+" * 12 + "  100 update steps" in lines
    table = lines[lines.index("") + 4 :]
    header = next(line for line in table if line.startswith("phase"))
    rows = table[table.index(header) + 1 :][:4]
    assert [row.split()[1] for row in rows] == ["factored", "dense", "adapter", "dense"]
    end = header.index("trainable") + len("trainable")
    assert all(row[end - 1].isdigit() and row[end] == " " for row in rows)  # right-aligned under its title


def test_a_model_with_weights_counts_as_pretrained(hf_drt, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "weights")
    wanted = ("plan", tmp_path / "weights", *SMALL, "--schedule", "paper", "--json")
    data = json.loads(hf_drt(*wanted).out)
    assert [p["form"] for p in data["phases"]] == ["adapter", "dense", "adapter"]
    data = json.loads(hf_drt(*wanted, "--start", "scratch").out)
    assert data["phases"][0]["form"] == "factored"


def test_a_native_checkpoint_is_planned_from_its_dense_shapes(hf_drt, checkpoint):
    data = json.loads(hf_drt("plan", checkpoint() / "checkpoint-4", *SMALL, "--json").out)
    assert data["dense"]["parameters"] == tiny.llama().num_parameters()
    assert data["phases"][0]["form"] == "adapter"


def test_layers_and_warnings(hf_drt, configured):
    out = hf_drt("plan", configured(), *SMALL, "--rank-pattern", '{"q_proj": 16}', "--layers").out
    assert "warning: phase 0 (factored): 2 layers (e.g. model.layers.0.self_attn.q_proj" in out
    row = next(line for line in out.splitlines() if line.startswith("model.layers.1.mlp.up_proj"))
    assert "64 x 32" in row
    assert "21.3" in row


def test_query_and_key_are_kept_or_not(hf_drt, configured):
    wanted = ("plan", configured(), *SMALL, "--schedule", "fixed", "--dense-query-key")
    assert "4 query and key projections stay dense (dense_query_key)" in hf_drt(*wanted).out
    assert "query and key" not in hf_drt(*wanted[:-1], "--no-dense-query-key").out


def test_a_decomposition_of_convolutions(hf_drt, tmp_path):
    transformers.ResNetConfig(
        layer_type="basic", hidden_sizes=[16, 32], depths=[1, 1], embedding_size=16, num_channels=1
    ).save_pretrained(tmp_path)
    wanted = ("plan", tmp_path, "--task", "image-classification", "--schedule", "fixed", "--batch-size", 2, "--json")
    shares = [json.loads(hf_drt(*wanted, "--decomposition", d).out)["flops_share"] for d in ("svd", "tucker", "cp")]
    assert shares[0] > shares[1] > shares[2]
    assert "decomposition must be one of svd, tucker, cp, got 'qr'" in hf_drt(*wanted, "--decomposition", "qr").err


def test_boundaries_at_epochs_and_learning_rates(hf_drt, configured):
    lr = ("--lr-scheduler", "linear", "--warmup-steps", 0, "--steps", 100)
    data = json.loads(hf_drt("plan", configured(), *SMALL, *lr, "--schedule", "dense@0 factored@lr<0.5", "--json").out)
    assert data["phases"][1]["start"] == 51
    epochs = ("--schedule", "dense@0 factored@1.5ep", "--steps-per-epoch", 20, "--steps", 100)
    assert json.loads(hf_drt("plan", configured(), *SMALL, *epochs, "--json").out)["phases"][1]["start"] == 30


def test_a_budget_is_kept(hf_drt, configured):
    wanted = ("--schedule", "factored@0 dense@30% factored@60%", "--rank-multiple", 1, "--budget", 0.75)
    data = json.loads(hf_drt("plan", configured(), "--batch-size", 2, "--seq-length", 8, *wanted, "--json").out)
    assert data["flops_share"] <= 0.75
    assert data["flops_share"] == pytest.approx(data["proposal"]["share"])
    out = hf_drt("plan", configured(), "--batch-size", 2, "--seq-length", 8, *wanted).out
    proposal = data["proposal"]
    assert f"proposal: --schedule '{proposal['schedule']}' --rank-ratio {proposal['rank_ratio']:g}" in out


@pytest.mark.parametrize("schedule", ["auto", "auto_late", "factored@0 dense@budget"])
def test_a_schedule_with_a_budget_is_planned_as_it_will_be_trained(hf_drt, configured, schedule):
    wanted = ("--schedule", schedule, "--budget", 0.7, "--rank-multiple", 1, "--steps", 100, "--json")
    data = json.loads(hf_drt("plan", configured(), "--batch-size", 2, "--seq-length", 8, *wanted).out)
    drt = DynamicRank(tiny.llama(), DRTConfig(schedule=schedule, budget=0.7, rank_multiple=1), max_steps=100)
    assert [p["start"] for p in data["phases"]] == [p.start for p in drt.plan.phases]
    assert data["phases"][0]["ranks"] == [drt.forms(0)["model.layers.0.mlp.up_proj"].rank] * 2
    assert not data.get("proposal")


def test_windows_that_are_not_planned_yet_are_told(hf_drt, configured):
    out = hf_drt("plan", configured(), *SMALL, "--schedule", "adaptive", "--budget", 0.75).out
    assert "warning: full-rank windows begin during the run, and are not in this plan" in out
    assert "at most 0.75 of their dense FLOPs" in out
    refused = hf_drt("plan", configured(), *SMALL, "--schedule", "adaptive", "--budget", 7)
    assert (refused.code, "budget must be in (0, 1], got 7.0" in refused.err) == (2, True)


def test_measured_steps_predict_the_length(hf_drt, configured):
    result = hf_drt("plan", configured(), *SMALL, "--measure", "--measure-steps", 3, "--steps", 10, "--json")
    data = json.loads(result.out)
    steps = sum((p["end"] - p["start"]) * p["seconds_per_step"] for p in data["phases"])
    assert data["step_seconds"] == pytest.approx(steps) != 0
    assert data["seconds"] == pytest.approx(steps + sum(p["switch_seconds"] for p in data["phases"]))
    assert all(p["cpu_seconds_per_step"] > 0 for p in data["phases"])


def test_the_length_is_printed(hf_drt, configured):
    out = hf_drt("plan", configured(), *SMALL, "--measure", "--measure-steps", 2, "--steps", 10).out
    assert "predicted length: " in out
    assert "s/step" in out


def test_a_picture(hf_drt, configured, tmp_path):
    path = tmp_path / "plan.png"
    assert hf_drt("plan", configured(), *SMALL, "--picture", path).code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_precision_and_checkpointing_change_the_memory(hf_drt, configured):
    def dense(*flags):
        wanted = ("plan", configured(), *SMALL, "--schedule", "auto_late", "--batch-size", 64)
        return json.loads(hf_drt(*wanted, *flags, "--json").out)["dense"]

    plain, half, mixed = dense(), dense("--dtype", "bfloat16"), dense("--bf16")
    assert 2 * half["weights"] == pytest.approx(plain["weights"], rel=0.01)
    assert mixed["weights"] == plain["weights"]
    assert mixed["activations"] < plain["activations"]
    assert dense("--checkpointing")["activations"] < plain["activations"]
    assert dense("--accumulation", 4)["flops"] == 4 * plain["flops"]
    assert dense("--optimizer", "sgd")["optimizer"] == 0


def test_a_plan_in_turns_tells_of_its_groups(hf_drt, configured):
    wanted = ("plan", configured(), *SMALL, "--schedule", "rotate(groups=2)", "--steps", 100)
    out, data = hf_drt(*wanted).out, json.loads(hf_drt(*wanted, "--json").out)
    forms = ["factored", "dense[1/2]", "dense[2/2]+frozen[1/2]"]
    assert [phase["form"] for phase in data["phases"]] == forms
    for text in ("group 1/2  ...", "groups: 2 of 7 layers (group_by=block)", "dense[2/2]+frozen[1/2]"):
        assert text in out
    held = [sum(phase[key] for key in ("weights", "gradients", "optimizer")) for phase in data["phases"]]
    assert data["held"] == max(held)
    assert f"in phase {held.index(max(held))}" in out


@pytest.mark.slow
def test_a_plan_is_proposed_for_a_memory(hf_drt, configured):
    """It is the plan that the proposed settings give."""
    wanted = ("plan", configured(), *SMALL, "--batch-size", 1, "--steps", 100)
    most = json.loads(hf_drt(*wanted, "--json").out)["dense"]["peak"] * 3 // 4
    data = json.loads(hf_drt(*wanted, "--max-memory", f"{most}B", "--json").out)
    chosen = data["fitting"]["proposal"]
    assert chosen["schedule"].startswith("rotate(")
    assert data["peak"] <= most == data["fitting"]["limit"]
    assert max(phase["peak"] for phase in data["phases"]) == data["peak"]
    (trial,) = [t for t in data["fitting"]["tried"] if {**chosen, "peak": t["peak"], "fits": True} == t]
    assert trial["peak"] == data["peak"]
    flags = ["--schedule", chosen["schedule"], "--rank-ratio", chosen["rank_ratio"], "--frozen-dtype", "bfloat16"]
    flags += ["--checkpointing"] if chosen["checkpointing"] else []
    assert json.loads(hf_drt(*wanted, *flags, "--json").out)["peak"] == data["peak"]
    out = hf_drt(*wanted, "--max-memory", f"{most}B").out
    assert f"proposal: --schedule '{chosen['schedule']}'" in out
    assert "what fits into" in out


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("flags", "proposal"),
    [
        (("--dense-checkpointing",), {"rank_ratio": 0.25, "frozen_dtype": "bfloat16", "checkpointing": False}),
        (("--recompute", "bottleneck"), {"rank_ratio": 0.25, "frozen_dtype": "bfloat16", "checkpointing": False}),
        (("--group-by", "attn", "--group-by", ""), {"schedule": "rotate(groups=2)"}),
        (("--rank", "4"), {"frozen_dtype": "bfloat16", "rank_ratio": None}),
    ],
    ids=["dense_checkpointing", "recompute", "group_by", "rank"],
)
def test_what_is_proposed_for_a_memory_goes_with_the_settings_given(hf_drt, configured, flags, proposal):
    size = SMALL[: SMALL.index("--rank-multiple")] if "--rank" in flags else SMALL  # which would be refused beside it
    wanted = ("plan", configured(), *size, "--batch-size", 1, "--steps", 100, *flags)
    data = json.loads(hf_drt(*wanted, "--max-memory", "300KiB", "--json").out)
    chosen = data["fitting"]["proposal"]
    assert {name: chosen.get(name) for name in proposal} == proposal
    own = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items() if name != "checkpointing"]
    own += ["--checkpointing"] if chosen["checkpointing"] else []
    assert json.loads(hf_drt(*wanted, *own, "--json").out)["peak"] == data["peak"] <= data["fitting"]["limit"]


def test_a_schedule_that_fits_is_proposed_itself(hf_drt, configured):
    wanted = ("plan", configured(), *SMALL, "--schedule", "factored@0", "--max-memory", "1GB", "--json")
    data = json.loads(hf_drt(*wanted).out)
    assert data["fitting"]["proposal"] == {"schedule": "factored@0", "checkpointing": False}
    assert data["fitting"]["limit"] == 10**9


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--schedule", "rotate", "--budget", "0.5"), 1, "'dense[1/8]@700' brings a group of layers into a form"),
        (("--max-memory", "1KiB"), 1, "nothing that was tried fits into 0.0 MiB: the least is"),
        (("--max-memory", "1GiB", "--budget", "0.3"), 2, "a budget and a memory both propose a rank"),
        (("--max-memory", "much"), 2, "'much' is not a size above 0; write e.g. 24GiB"),
        (("--max-memory", "0GB"), 2, "'0GB' is not a size above 0"),
        (("--max-memory", "3TiB"), 2, "'3TiB' is not a size above 0"),
        (("--schedule", "factored@0 dnse@40%"), 2, "the plan: 'dnse' in 'dnse@40%' is not a form"),
        (("--schedule", "sometimes"), 2, "'sometimes' is neither a preset"),
        (("--schedule", "dense@0 factored@2ep"), 2, "needs data of known length"),
        (("--rank-ratio", "3"), 2, r"rank_ratio must be in (0, 1], got 3.0"),
        (("--rank-pattern", "{"), 2, "rank_pattern is not valid JSON"),
        (("--dtype", "int4"), 2, "must be one of float32, bfloat16, got 'int4'"),
        (("--steps", "0"), 2, "Invalid value for '--steps'"),
        (("--rank-ratio", "0.9"), 1, "leaves all 14 layers dense"),
        (("--optimizer", "lion"), 2, "'lion' is not an optimizer of known state"),
        (("--task", "poetry"), 1, "'poetry' is not a task; allowed are e.g. causal-lm"),
        (("--budget", "0.01"), 1, "a budget of 0.01 cannot be reached"),
        (("--seq-length", "5000"), 1, "sequences of 5000 tokens exceed the 2048 positions"),
    ],
)
def test_wrong_settings(hf_drt, configured, flags, code, message):
    schedule = () if "--schedule" in flags else ("--schedule", "paper")
    result = hf_drt("plan", configured(), "--rank-multiple", 4, *schedule, *flags)
    assert result.code == code
    assert message in " ".join(result.err.split())


def test_blocks_and_source_code_are_options_too(hf_drt, configured):
    data = json.loads(hf_drt("plan", configured(), *SMALL, "--blocks", "LlamaMLP", "--json").out)
    assert {layer["name"].split(".")[-2] for layer in data["layers"]} == {"mlp"}
    for flags, message in [
        (("--blocks", "Nosuch"), "blocks: 'Nosuch' is neither the class of a module of LlamaForCausalLM"),
        (("--ignore-source", "q_proj"), "ignore_source: 'q_proj' overrides nothing"),
    ]:
        result = hf_drt("plan", configured(), *SMALL, *flags)
        assert result.code != 0
        assert message in " ".join(result.err.split())


def test_what_is_no_model(hf_drt, configured, tmp_path, monkeypatch):
    for source, message in [
        ("/no/such/folder", "there is no such path: /no/such/folder. Give the folder of a model, or a repository"),
        (tmp_path, "is not a checkpoint: it holds no config.json"),
        ("nobody/no-model", "there is no folder nobody/no-model here, and it could not be fetched from the Hub"),
    ]:
        result = hf_drt("plan", source)
        assert result.code == 1
        assert message in result.err
    folder = configured()
    config = json.loads((folder / "config.json").read_text())
    for change, message in [
        ({"architectures": ["NoSuchForCausalLM"]}, "of which transformers has none. Name a task"),
        ({"architectures": None, "model_type": "vit"}, "names the architectures None"),
        ({"model_type": "no-such"}, "config.json cannot be read"),
    ]:
        (folder / "config.json").write_text(json.dumps(config | change))
        result = hf_drt("plan", folder, *SMALL)
        assert (result.code, message in result.err) == (1, True), result.err
    (folder / "config.json").write_text(json.dumps(config | {"architectures": None}))
    named, guessed = (hf_drt("plan", folder, *SMALL, *task) for task in (("--task", "causal-lm"), ()))
    assert (named.code, guessed.code) == (0, 0)
    note = "warning: the configuration names no architecture, and is taken for one of causal-lm; --task says another\n"
    assert note in guessed.out
    assert guessed.out.replace(note, "") == named.out
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in hf_drt("plan", folder).err


def test_the_matrix_optimizer_and_its_share_of_a_step(hf_drt, configured):
    wanted = ("plan", configured(), *SMALL, "--schedule", "factored@0 dense@40%", "--matrix-optimizer", "muon")
    data, out = json.loads(hf_drt(*wanted, "--json").out), hf_drt(*wanted).out
    with torch.device("meta"):
        model = tiny.llama()
    config = DRTConfig(schedule="factored@0 dense@40%", rank_multiple=4, matrix_optimizer="muon")
    drt = DynamicRank(model, config, max_steps=1000)
    run = estimate_run(drt, batch_spec(model, 2, 8), optimizer="adamw_torch_fused")
    factored, dense = (phase.update_flops / phase.step.flops for phase in run.phases)
    assert [phase["update_flops"] for phase in data["phases"]] == [phase.update_flops for phase in run.phases]
    assert [phase["optimizer"] for phase in data["phases"]] == [phase.step.optimizer for phase in run.phases]
    assert (
        "matrix_optimizer adds to an update step's FLOPs, which do not contain it: "
        f"{factored:.1%} in phase 0 (factored), {dense:.1%} in phase 1 (dense)"
    ) in out
    shapes = list(drt.targets.values())
    tokens = [update_tokens(shapes, list(drt.forms(index).values())) for index in (0, 1)]
    assert (
        "matrix_optimizer: muon at matrix_lr=0.04, whose update of T tokens costs "
        f"{tokens[0]:,.0f} / T (factored), {tokens[1]:,.0f} / T "
        "(dense) of the target layers' training"
    ) in out.splitlines()
    assert not any(line.startswith("matrix_optimizer") for line in hf_drt(*wanted[:-2]).out.splitlines())


# ---- memory of activations

MEMORY = ("--dense-checkpointing", "--dense-accumulation", 2, "--recompute", "bottleneck")


def test_settings_on_memory_of_activations_are_in_the_plan(hf_drt, configured):
    load = ("--batch-size", 32, "--seq-length", 8, "--rank-multiple", 4)  # else gradients are the larger part
    words = ("plan", configured(), *load, "--schedule", "factored@0 dense@50%", "--json")
    plain, saved = (json.loads(hf_drt(*words, *more).out) for more in ((), MEMORY))
    for ours, theirs in zip(saved["phases"], plain["phases"], strict=True):
        assert ours["activations"] < theirs["activations"]
        assert ours["peak"] <= theirs["peak"]
        assert (ours["gradients"], ours["optimizer"]) == (theirs["gradients"], theirs["optimizer"])
    assert saved["dense"] == plain["dense"]


def test_checkpointing_of_all_phases_and_of_dense_ones_do_not_go_together(hf_drt, configured):
    result = hf_drt("plan", configured(), *SMALL, "--schedule", "paper", "--checkpointing", "--dense-checkpointing")
    assert result.code != 0
    assert "blocks are checkpointed in every phase already. Turn activation checkpointing" in " ".join(
        result.err.split()
    )


def test_a_setting_on_memory_that_no_phase_uses_is_refused(hf_drt, configured):
    result = hf_drt("plan", configured(), *SMALL, "--schedule", "factored@0", "--dense-checkpointing")
    assert result.code != 0
    assert "dense_checkpointing is True, and would have no effect: only dense phases use it" in " ".join(
        result.err.split()
    )


def test_measured_phases_have_the_settings_too(hf_drt, configured):
    words = ("plan", configured(), *SMALL, "--schedule", "factored@0 dense@50%", *MEMORY)
    result = hf_drt(*words, "--measure", "--measure-steps", 2, "--json")
    assert result.code == 0, result.err
    assert [phase["seconds_per_step"] > 0 for phase in json.loads(result.out)["phases"]] == [True, True]


def test_a_plan_of_adapters_that_are_split_says_that_the_forward_pass_is_no_cheaper(hf_drt, configured):
    schedule = "drift(first=0.375,last=0.125,shape=linear,levels=3)"
    result = hf_drt("plan", configured(), *SMALL, "--schedule", schedule)
    assert result.code == 0
    drt = DynamicRank(tiny.llama(), DRTConfig(schedule=schedule, rank_multiple=4), max_steps=1000)
    assert f"forward pass: {drt.cost().forward:.3f} of dense, and in no phase below it" in result.out
    assert "rank levels: 3, by 2 switches" in result.out
