"""A checkpoint that does not fit is refused before a weight of the model, or its structure, is touched."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_drt import CheckpointError

SCHEDULE = "factored@0 dense@40% adapter@70%"
FACTORED, DENSE, ADAPTER = "checkpoint-3", "checkpoint-6", "checkpoint-9"
Q, LAST = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
STATE, TRAINER_STATE, CONFIG = "drt_state.json", "trainer_state.json", "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OPTIMIZER, SCHEDULER, RNG = "optimizer.pt", "scheduler.pt", "rng_state.pth"
FIRST_SHARD, SECOND_SHARD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
# Every weight differs from the checkpoint's, and so does the dense structure of a model that has not started.
ANOTHER_SEED = 1

Damage = Callable[[Path], object]


# ---- the run whose checkpoints are damaged, and the run that wants to resume from them


def model_of(seed: int = 0, **config) -> nn.Module:
    model = tiny.llama(**{"attention_bias": True, "bos_token_id": None, **config})
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def trainer_of(folder: Path, model: nn.Module | None = None, **settings):
    # Not the fused AdamW, which takes the whole process down where a check that is tested here were missing.
    defaults = {
        "max_steps": 10, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 2, "logging_strategy": "no",
        "optim": "adamw_torch", "drt_schedule": SCHEDULE,
    }  # fmt: skip
    settings = defaults | settings
    if settings["drt_schedule"] is not None:
        settings |= {"drt_export": "native"}  # the model stays in the form of its last phase
    return tiny.trainer(folder, model_of(ANOTHER_SEED) if model is None else model, **settings)


def run_in(folder: Path, **config) -> Path:
    """A finished run with one checkpoint in each phase, at steps 3, 6 and 9."""
    trainer_of(folder, model_of(**config), save_strategy="steps", save_steps=3).train()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return run_in(tmp_path_factory.mktemp("run"))


@pytest.fixture
def checkpoint(run, tmp_path) -> Callable[[str], Path]:
    """The function that copies a checkpoint of the run, for a test to damage."""
    return lambda name: Path(shutil.copytree(run / name, tmp_path / name))


def snapshot(model: nn.Module) -> tuple[dict, dict]:
    """The model's structure, and its values."""
    structure = {name: type(module) for name, module in model.named_modules()}
    structure |= {f"{name} is trained": parameter.requires_grad for name, parameter in model.named_parameters()}
    return structure, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def touched(model: nn.Module, before: tuple[dict, dict]) -> str:
    """What has changed in the model since the snapshot; empty if nothing has."""
    structure, values = snapshot(model)
    if structure != before[0]:
        return "with another structure"
    changed = [name for name in values if not torch.equal(values[name], before[1][name])]
    return f"with {len(changed)} other weights" if changed else ""


def assert_refused(action: Callable[[], object], model: nn.Module, message: str, error=CheckpointError) -> None:
    """The action raises this error with this message, and leaves the model as it was."""
    before, raised = snapshot(model), None
    try:
        action()
    except Exception as caught:
        raised = caught
    assert raised is not None, "not refused: training went on to its end"
    left = f"{type(raised).__name__} left the model {touched(model, before) or 'as it was'}: {raised}"
    assert not touched(model, before), left
    assert isinstance(raised, error), left
    said = re.sub(r"/\S*/", "", str(raised))  # the names of folders are those of the tests, and say too much
    assert re.search(message, said), f"does not say {message!r}: {said}"


def assert_resume_refused(folder: Path, message: str, error=CheckpointError, trainer=None) -> None:
    trainer = trainer_of(folder.parent / "out") if trainer is None else trainer
    assert_refused(lambda: trainer.train(resume_from_checkpoint=str(folder)), trainer.model, message, error)


# ---- what can happen to a file


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def emptied(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes(b"")


def cut_short(name: str) -> Damage:
    """Half of the file, as a full disk or a killed process leaves it."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def holding(name: str, content: str | bytes) -> Damage:
    """The file with another content."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def copied(source: str, target: str) -> Damage:
    """One file of the run in the place of another, e.g. ``checkpoint-6/optimizer.pt``."""

    def damage(folder: Path) -> None:
        shutil.copy(folder.parent / "run" / source, folder / target)

    return damage


def json_edit(name: str, change: Callable[[dict], object]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


def state_with(**values) -> Damage:
    return json_edit(STATE, lambda state: state.update(values))


def state_without(key: str) -> Damage:
    return json_edit(STATE, lambda state: state.pop(key))


def layer_with(**values) -> Damage:
    return json_edit(STATE, lambda state: state["layers"][Q].update(values))


def tensors_edit(change: Callable[[dict], object], name: str = WEIGHTS) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return damage


def without_tensor(key: str) -> Damage:
    return tensors_edit(lambda tensors: tensors.pop(key))


def with_tensor(key: str, *shape: int) -> Damage:
    return tensors_edit(lambda tensors: tensors.update({key: torch.zeros(shape)}))


# ---- one table: what happened to the checkpoint, and what the error has to say

DAMAGES = {
    # drt_state.json as a file
    "no state": (removed(STATE), r"has no drt_state\.json.*Resume from another checkpoint"),
    "state cut short": (cut_short(STATE), r"drt_state\.json is damaged"),
    "state empty": (emptied(STATE), r"drt_state\.json is damaged"),
    "state is no JSON": (holding(STATE, "factored@0"), r"drt_state\.json is damaged"),
    "state is no text": (holding(STATE, b"\xff\xfe\x00\x81"), r"drt_state\.json is damaged"),
    "state is a list": (holding(STATE, "[1, 2]"), r"drt_state\.json is damaged \(no JSON object\)"),
    "state is null": (holding(STATE, "null"), r"drt_state\.json is damaged \(no JSON object\)"),
    # its version and its keys
    "newer format": (state_with(format_version=2), r"format version 2; this hf_drt reads 1 to 1\. Upgrade hf_drt"),
    "version is a text": (state_with(format_version="1"), r"format version '1': it is damaged\. Resume from another"),
    "no version": (state_without("format_version"), r"format version None: it is damaged\. Resume from another"),
    "no plan": (state_without("plan"), r"the state lacks 'plan'"),
    "no max_steps": (state_without("max_steps"), r"the state lacks 'max_steps'"),
    "no phase": (state_without("phase"), r"the state lacks 'phase'"),
    "no layers": (state_without("layers"), r"the state lacks 'layers'"),
    "no step": (state_without("step"), r"mixes two checkpoints: trainer_state\.json is of step 3, .* of step None"),
    # its plan and phase
    "other plan": (
        state_with(plan="factored@0 dense@5 adapter@7"),
        r"the plan has changed: the state is of 'factored@0 dense@5 adapter@7' over 10 .*'factored@0 dense@4 ad",
    ),
    "other max_steps": (state_with(max_steps=20), r"the plan has changed: .* over 20 update steps, .* over 10\. Go on"),
    "phase too high": (state_with(phase=3), r"phase must lie in 0\.\.2, the state has 3"),
    "phase below zero": (state_with(phase=-1), r"phase must lie in 0\.\.2, the state has -1"),
    "phase is null": (state_with(phase=None), r"phase must lie in 0\.\.2, the state has None"),
    "phase is a text": (state_with(phase="0"), r"phase must lie in 0\.\.2, the state has '0'"),
    "another phase": (state_with(phase=1), rf"{Q} is Factored\(rank=8\) in the state, .* make it Dense\(\) in phase 1"),
    "another step": (state_with(step=2), r"mixes two checkpoints: trainer_state\.json is of step 3, .* of step 2"),
    # its layers
    "layer missing": (json_edit(STATE, lambda s: s["layers"].pop(Q)), rf"the state lacks {Q}, which this run selects"),
    "extra layer": (
        json_edit(STATE, lambda s: s["layers"].update({"lm_head": s["layers"][Q]})),
        r"the state holds lm_head, which this run does not select",
    ),
    "other rank": (layer_with(rank=2), rf"{Q} is Factored\(rank=2\) in the state, .* make it Factored\(rank=8\)"),
    "rank is a text": (layer_with(rank="8"), r"'rank': '8'\} describes no form; allowed are"),
    "no rank": (json_edit(STATE, lambda s: s["layers"][Q].pop("rank")), r"describes no form"),
    "other shape": (layer_with(shape=[32, 64]), rf"{Q} has shape \(32, 32\) here, and \(32, 64\) in the state"),
    "no shape": (json_edit(STATE, lambda s: s["layers"][Q].pop("shape")), rf"entry of {Q} is .* no form and shape"),
    "shape is null": (layer_with(shape=None), rf"{Q}"),
    "other form": (layer_with(form="adapter"), rf"{Q} is Adapter\(rank=8, .* make it Factored\(rank=8\)"),
    "unknown form": (layer_with(form="lora"), r"'form': 'lora'.* describes no form"),
    "layers are a list": (
        json_edit(STATE, lambda s: s.update(layers=[Q])),
        r"'layers' must be of type dict, got \['model",
    ),
    "layer is a text": (json_edit(STATE, lambda s: s["layers"].update({Q: "dense"})), rf"{Q}"),
    "meter is a list": (state_with(meter=[1]), r"meter"),
    # the weights
    "no weights": (removed(WEIGHTS), r"model\.safetensors is missing: the checkpoint is incomplete"),
    "weights cut short": (cut_short(WEIGHTS), r"model\.safetensors is cut short or damaged"),
    "weights empty": (emptied(WEIGHTS), r"model\.safetensors is cut short or damaged"),
    "factor missing": (without_tensor(f"{Q}.U"), rf"lack {Q}\.U, which the run's model needs"),
    "last factor missing": (without_tensor(f"{LAST}.V"), rf"lack {LAST}\.V, which the run's model needs"),
    "factor of other rank": (
        with_tensor(f"{Q}.V", 4, 32),
        rf"{Q}\.V has shape \(4, 32\) in the weights .*, where \(8, 32\) is needed: they were edited, or are of ano",
    ),
    "factor of too many axes": (with_tensor(f"{Q}.U", 32, 8, 1), rf"{Q}\.U has shape \(32, 8, 1\)"),
    "bias missing": (without_tensor(f"{Q}.bias"), rf"{Q}\.bias"),
    "bias of other shape": (with_tensor(f"{Q}.bias", 8), rf"{Q}\.bias"),
    "factors of two forms": (with_tensor(f"{Q}.lora_A", 8, 32), rf"{Q}\.lora_A"),
    "dense weight next to factors": (with_tensor(f"{Q}.weight", 32, 32), rf"{Q}\.weight"),
    "norm missing": (without_tensor("model.norm.weight"), r"model\.norm\.weight"),
    "embedding missing": (without_tensor("model.embed_tokens.weight"), r"model\.embed_tokens\.weight"),
    "head missing": (without_tensor("lm_head.weight"), r"lm_head\.weight"),
    "embedding of other shape": (with_tensor("model.embed_tokens.weight", 4, 32), r"model\.embed_tokens\.weight"),
    "weights of another phase": (copied(f"{DENSE}/{WEIGHTS}", WEIGHTS), rf"lack {Q}\.U, which the run's model needs"),
    # the files of the Trainer
    "no optimizer": (removed(OPTIMIZER), r"optimizer\.pt is missing: .*save_only_model"),
    "optimizer cut short": (cut_short(OPTIMIZER), r"optimizer\.pt is cut short or damaged"),
    "optimizer empty": (emptied(OPTIMIZER), r"optimizer\.pt is cut short or damaged"),
    "optimizer of the dense phase": (copied(f"{DENSE}/{OPTIMIZER}", OPTIMIZER), r"optimizer\.pt"),
    "optimizer of the adapter phase": (copied(f"{ADAPTER}/{OPTIMIZER}", OPTIMIZER), r"optimizer\.pt"),
    "scheduler in the optimizer's place": (
        copied(f"{FACTORED}/{SCHEDULER}", OPTIMIZER),
        r"optimizer\.pt is not an optimizer's state",
    ),
    "no scheduler": (removed(SCHEDULER), r"scheduler\.pt is missing"),
    "scheduler cut short": (cut_short(SCHEDULER), r"scheduler\.pt is cut short or damaged"),
    "optimizer in the scheduler's place": (
        copied(f"{FACTORED}/{OPTIMIZER}", SCHEDULER),
        r"scheduler\.pt is not a scheduler's state",
    ),
    "random state cut short": (cut_short(RNG), r"rng_state\.pth"),
    "configuration cut short": (cut_short(CONFIG), r"config\.json"),
    "no trainer state": (removed(TRAINER_STATE), r"trainer_state\.json is missing: the checkpoint is incomplete"),
    "trainer state cut short": (cut_short(TRAINER_STATE), r"trainer_state\.json is damaged"),
    "trainer state is a list": (holding(TRAINER_STATE, "[]"), r"trainer_state\.json is damaged"),
    "trainer state without a step": (
        json_edit(TRAINER_STATE, lambda s: s.pop("global_step")),  # transformers reads that as step 0
        r"mixes two checkpoints: trainer_state\.json is of step 0, drt_state\.json of step 3",
    ),
    "trainer state of another step": (
        copied(f"{DENSE}/{TRAINER_STATE}", TRAINER_STATE),
        r"mixes two checkpoints: trainer_state\.json is of step 6, drt_state\.json of step 3",
    ),
    "trainer state with an unknown field": (
        json_edit(TRAINER_STATE, lambda s: s.update(surprise=1)),
        r"trainer_state\.json",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_refused_before_the_model_is_touched(checkpoint, run, tmp_path, damage, message):
    folder = checkpoint(FACTORED)
    (tmp_path / "run").symlink_to(run)
    damage(folder)
    assert_resume_refused(folder, message)


@pytest.mark.parametrize(
    ("phase", "damage", "message"),
    [
        (DENSE, without_tensor(f"{Q}.weight"), rf"lack {Q}\.weight"),
        (DENSE, with_tensor(f"{Q}.weight", 16, 32), rf"{Q}\.weight has shape \(16, 32\)"),
        (DENSE, copied(f"{ADAPTER}/{WEIGHTS}", WEIGHTS), rf"{Q}\.weight has shape \(0, 32\)"),
        (ADAPTER, without_tensor(f"{Q}.base"), rf"lack {Q}\.base"),
        (ADAPTER, without_tensor(f"{Q}.lora_B"), rf"lack {Q}\.lora_B"),
        (ADAPTER, with_tensor(f"{Q}.lora_A", 4, 32), rf"{Q}\.lora_A has shape \(4, 32\)"),
        (ADAPTER, layer_with(alpha=1.0), rf"{Q} is Adapter\(rank=8, alpha=1\.0, .* make it Adapter\(rank=8, alpha=16"),
        (ADAPTER, layer_with(init="principal"), rf"{Q} is Adapter\(.*'principal'\) in the state"),
        (ADAPTER, copied(f"{FACTORED}/{STATE}", STATE), r"mixes two checkpoints"),
    ],
)
def test_so_is_one_of_a_dense_or_an_adapter_phase(checkpoint, run, tmp_path, phase, damage, message):
    folder = checkpoint(phase)
    (tmp_path / "run").symlink_to(run)
    damage(folder)
    assert_resume_refused(folder, message)


# ---- weights in shards


def shard(folder: Path) -> None:
    """Cut the weights into two files and an index, as save_pretrained does with large models."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {FIRST_SHARD: names[::2], SECOND_SHARD: names[1::2]}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, keys in parts.items() for key in keys}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (folder / WEIGHTS).unlink()


def without_tensor_in_shard(key: str) -> Damage:
    def damage(folder: Path) -> None:
        name = json.loads((folder / INDEX).read_text())["weight_map"][key]
        tensors_edit(lambda tensors: tensors.pop(key), name)(folder)

    return damage


SHARD_DAMAGES = {
    "index cut short": (cut_short(INDEX), r"model\.safetensors\.index\.json is damaged"),
    "index is a list": (holding(INDEX, "[]"), r"model\.safetensors\.index\.json is damaged"),
    "index without a map": (json_edit(INDEX, lambda i: i.pop("weight_map")), r"index\.json is damaged"),
    "index with a list for a map": (json_edit(INDEX, lambda i: i.update(weight_map=[1])), r"index\.json is damaged"),
    "index with a number for a file": (
        json_edit(INDEX, lambda i: i.update(weight_map=dict.fromkeys(i["weight_map"], 1))),
        r"index\.json is damaged",
    ),
    "index with an empty map": (
        json_edit(INDEX, lambda i: i.update(weight_map={})),
        r"the weights in .* lack|index\.json is damaged",
    ),
    "index missing": (removed(INDEX), r"model\.safetensors is missing"),
    "index without a shard": (
        json_edit(INDEX, lambda i: i.update(weight_map={k: v for k, v in i["weight_map"].items() if v == FIRST_SHARD})),
        r"the weights in .* lack model\.embed_tokens\.weight, which the run's model needs",
    ),
    "first shard missing": (removed(FIRST_SHARD), rf"{FIRST_SHARD} is missing: the checkpoint is incomplete"),
    "second shard missing": (removed(SECOND_SHARD), rf"{SECOND_SHARD} is missing: the checkpoint is incomplete"),
    "shard cut short": (cut_short(SECOND_SHARD), rf"{SECOND_SHARD} is cut short or damaged"),
    "factor missing in its shard": (without_tensor_in_shard(f"{Q}.U"), rf"lack {Q}\.U"),
    "norm missing in its shard": (without_tensor_in_shard("model.norm.weight"), r"model\.norm\.weight"),
    "stale single file next to the shards": (copied(f"{DENSE}/{WEIGHTS}", WEIGHTS), rf"{Q}|{WEIGHTS}"),
}


@pytest.mark.parametrize(("damage", "message"), SHARD_DAMAGES.values(), ids=SHARD_DAMAGES.keys())
def test_a_damaged_sharded_checkpoint_is_refused_before_the_model_is_touched(
    checkpoint, run, tmp_path, damage, message
):
    folder = checkpoint(FACTORED)
    (tmp_path / "run").symlink_to(run)
    shard(folder)
    damage(folder)
    assert_resume_refused(folder, message)


# ---- an intact checkpoint, and a run it does not belong to

RANK_RATIO = r"rank_ratio is 0\.125 here, and 0\.25 in the state\. Resume with the model and the drt settings of the"
OTHER_RUNS = {
    "other rank ratio, factored": (FACTORED, {"drt_rank_ratio": 0.125}, RANK_RATIO),
    "other rank ratio, dense": (DENSE, {"drt_rank_ratio": 0.125}, RANK_RATIO),
    "other rank ratio, adapter": (ADAPTER, {"drt_rank_ratio": 0.125}, RANK_RATIO),
    "absolute rank": (FACTORED, {"drt_rank": 6}, r"rank is 6 here, and None in the state"),
    "rank pattern": (
        FACTORED,
        {"drt_rank_pattern": '{"v_proj": 2}'},
        r"rank_pattern is \{'v_proj': 2\} here, and None",
    ),
    "other alpha": (ADAPTER, {"drt_adapter_alpha": 8.0}, r"adapter_alpha is 8\.0 here, and 16\.0 in the state"),
    "other schedule": (
        FACTORED,
        {"drt_schedule": "factored@0 dense@50%"},
        r"the plan has changed: .*'factored@0 dense@4 adapter@7' over 10 .* this run of 'factored@0 dense@5' over 10\.",
    ),
    "longer run": (
        FACTORED,
        {"drt_schedule": "factored@0 dense@4 adapter@7", "max_steps": 12},
        r"over 10 update steps, this run of .* over 12\. Go on with .*max_steps=10",
    ),
    "other include": (FACTORED, {"drt_include": ["mlp"]}, rf"the state holds .*{Q} and 5 more, which this run does"),
    "other exclude": (DENSE, {"drt_exclude": [r"layers\.0\.self_attn\.q"]}, rf"the state holds {Q}, which this run"),
    "form groups, factored": (
        FACTORED,
        {"drt_factored_lr_scale": 2.0},
        r"factored_lr_scale is 2\.0 here, and 1\.0 in the",
    ),
    "form groups, dense": (
        DENSE,
        {"drt_frobenius_decay": True},
        r"frobenius_decay is True here, and False in the state",
    ),
    "another optimizer": (FACTORED, {"optim": "sgd"}, r"optimizer"),
}


@pytest.mark.parametrize(("phase", "settings", "message"), OTHER_RUNS.values(), ids=OTHER_RUNS.keys())
def test_a_run_with_other_settings_is_refused(run, tmp_path, phase, settings, message):
    assert_resume_refused(run / phase, message, trainer=trainer_of(tmp_path, **settings))


@pytest.mark.parametrize("phase", [FACTORED, DENSE, ADAPTER])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 48}, rf"{Q} has shape \(48, 48\) here, and \(32, 32\) in the state"),
        ({"intermediate_size": 48}, r"model\.layers\.0\.mlp\.gate_proj has shape \(48, 32\) here, and \(64, 32\)"),
        ({"num_hidden_layers": 3}, r"the state lacks model\.layers\.2\..* and 4 more, which this run selects"),
        ({"num_hidden_layers": 1}, r"the state holds model\.layers\.1\..* and 4 more, which this run does not select"),
        ({"vocab_size": 72}, r"model\.embed_tokens\.weight"),
    ],
    ids=["wider", "wider mlp", "deeper", "shallower", "more tokens"],
)
def test_a_model_of_another_size_is_refused(run, tmp_path, phase, config, message):
    trainer = trainer_of(tmp_path, model_of(ANOTHER_SEED, **config))
    assert_resume_refused(run / phase, message, trainer=trainer)


@pytest.mark.parametrize("phase", [FACTORED, DENSE, ADAPTER])
def test_resuming_with_dynamic_rank_training_off_is_refused(run, tmp_path, phase):
    trainer = trainer_of(tmp_path, drt_schedule=None)
    assert_resume_refused(
        run / phase,
        r"was written by dynamic-rank training, which is off here\. Its plan is drt_schedule=",
        trainer=trainer,
    )


def test_resuming_a_checkpoint_of_plain_training_is_refused(tmp_path):
    plain = trainer_of(tmp_path / "plain", max_steps=1, save_strategy="steps", save_steps=1, drt_schedule=None)
    plain.train()
    assert_resume_refused(
        tmp_path / "plain" / "checkpoint-1", r"has no drt_state\.json: it was not written by dynamic-rank"
    )


@pytest.mark.parametrize("drt", [SCHEDULE, None], ids=["on", "off"])
def test_a_folder_that_does_not_exist_is_refused(tmp_path, drt):
    # With dynamic-rank training off it is transformers that answers.
    message = (
        r"checkpoint-99 is not a folder\. Give the path of a checkpoint-N" if drt else r"Can't find a valid checkpoint"
    )
    trainer = trainer_of(tmp_path, drt_schedule=drt)
    assert_resume_refused(tmp_path / "checkpoint-99", message, ValueError, trainer)


def test_a_file_in_place_of_a_folder_is_refused(run):
    assert_resume_refused(run / FACTORED / WEIGHTS, r"model\.safetensors is not a folder")


def test_the_last_checkpoint_of_a_run_without_one_is_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    message = r"holds no complete checkpoint\. It has none at all\."
    assert_refused(lambda: trainer.train(resume_from_checkpoint=True), trainer.model, message)


# ---- a trainer that has trained, and one that loads its best model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    trainer = trainer_of(tmp_path_factory.mktemp("trained"))
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["no state", "other rank", "no weights", "factor missing", "optimizer cut short"])
def test_a_refusal_leaves_a_trained_model_in_its_last_phase(checkpoint, trained, name):
    damage, message = DAMAGES[name]
    folder = checkpoint(FACTORED)
    damage(folder)
    phase = trained.drt.phase
    assert_resume_refused(folder, message, trainer=trained)
    assert trained.drt.phase == phase == 2


@pytest.mark.parametrize("name", ["no state", "other rank", "no weights", "factor missing", "norm missing"])
def test_a_damaged_best_checkpoint_is_refused_too(checkpoint, trained, name):
    damage, message = DAMAGES[name]
    folder = checkpoint(FACTORED)
    damage(folder)
    trained.state.best_model_checkpoint = str(folder)
    assert_refused(trained._load_best_model, trained.model, message)


# ---- the checks let a good checkpoint pass


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("phase", [FACTORED, DENSE, ADAPTER])
def test_an_intact_checkpoint_resumes(checkpoint, tmp_path, phase, sharded):
    folder = checkpoint(phase)
    if sharded:
        shard(folder)
    trainer = trainer_of(tmp_path / "out")
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == 10
    assert trainer.drt.phase == 2


def test_a_tied_head_may_be_missing(tmp_path):
    run = run_in(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(run / FACTORED / WEIGHTS)
    trainer = trainer_of(tmp_path / "out", model_of(ANOTHER_SEED, tie_word_embeddings=True))
    trainer.train(resume_from_checkpoint=str(run / FACTORED))
    assert trainer.state.global_step == 10


def test_after_a_refusal_the_same_trainer_resumes_from_an_intact_checkpoint(checkpoint, run, tmp_path):
    folder = checkpoint(FACTORED)
    removed(OPTIMIZER)(folder)
    trainer = trainer_of(tmp_path / "out")
    assert_resume_refused(folder, "optimizer", trainer=trainer)
    trainer.train(resume_from_checkpoint=str(run / FACTORED))
    assert trainer.state.global_step == 10
