# ruff: noqa: E402
"""Trainings that publish to a Hub in memory, through the real client. A script: it runs its own tests.

The client reads its address while it is imported, so these tests have a process of their own; test_push.py starts it.
"""

import json
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import pytest
import server


class Environment:
    """A server before the client is imported, and the fixture that gives it to the tests."""

    def __init__(self):
        self._hub = server.Hub()
        os.environ |= {
            "HF_ENDPOINT": self._hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": server.TOKEN,
            "HF_HOME": tempfile.mkdtemp(), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip

    @pytest.fixture
    def hub(self):
        yield self._hub
        self._hub.heal()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[Environment()]))

from concurrent.futures import Future

import huggingface_hub
import peft
import tiny
import torch
import transformers as T
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RevisionNotFoundError
from transformers.utils import PushInProgress

from hf_drt import DRTTrainer, EMACallback, EMADecay
from hf_drt.forms import AdapterLinear, LowRankLinear
from hf_drt.trainer.push import ATTEMPTS

SCHEDULE = "factored:4@0 dense@2 adapter:4@4"
load = T.AutoModelForCausalLM.from_pretrained


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))


@pytest.fixture
def name(request) -> str:
    """A repository for this test alone."""
    return f"{server.USER}/{re.sub('[^a-z0-9]+', '-', request.node.name).strip('-')[-60:].strip('-')}"


def trainer(folder, name, model=None, **changes) -> DRTTrainer:
    defaults = {
        "max_steps": 6, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 2,
        "push_to_hub": True, "hub_model_id": name, "hub_always_push": True, "drt_schedule": SCHEDULE,
    }  # fmt: skip
    return tiny.trainer(folder, model, **{**defaults, **changes})


def weights(model) -> dict[str, torch.Tensor]:
    """What every layer computes, as the matrix that it maps the identity to, and all that is in no low-rank layer."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    prefixes = tuple(f"{n}." for n in layers)
    found = {n: p for n, p in model.state_dict().items() if not n.startswith(prefixes)}
    with torch.no_grad():
        return found | {f"{n}.weight": m(torch.eye(m.in_features)).T for n, m in layers.items()}


def assert_same(model, other) -> None:
    left, right = weights(model), weights(other)
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-5, atol=1e-6, msg=key)


def assert_dense(model) -> None:
    assert not any(isinstance(m, LowRankLinear) for m in model.modules())
    assert not hasattr(model.config, "quantization_config")


def logits(model) -> torch.Tensor:
    return tiny.logits(model, tiny.batch())


def commits(hub, name) -> dict[str, str]:
    """Revision by title, in order."""
    return {title: sha for sha, title in hub.repos[name].titles.items()}


# ---- the model and its card


def test_a_dense_model_and_its_card(hub, name, tmp_path):
    tiny.llama().push_to_hub("user/origin")
    model = load("user/origin")
    args = {"hub_strategy": "end", "drt_schedule": "adapter:4@0 dense@2 adapter:8@4", "eval_strategy": "epoch"}
    run = trainer(tmp_path, name, model, drt_log_rank_steps=2, **args)
    run.compute_metrics = lambda prediction: {"accuracy": 0.25}
    run.train()
    run.evaluate()
    run.push_to_hub(dataset="Lines of code", dataset_tags="user/lines", dataset_args="plain", tags=["mine"])
    loaded = load(name)
    assert_dense(loaded)
    assert_same(loaded, run.model)
    card = huggingface_hub.ModelCard.load(name)
    card.validate()
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert {"hf_drt", "dynamic-rank-training", "low-rank", "mine", "generated_from_trainer"} <= set(data["tags"])
    assert data["base_model"] == "user/origin"
    assert data["datasets"] == ["user/lines"]
    assert data["metrics"] == ["accuracy"]
    assert card.data.eval_results[0].metric_value == 0.25
    check_section(card.text, sum(p.numel() for p in loaded.parameters()), name)
    picture = Path(huggingface_hub.hf_hub_download(name, "drt_timeline.png")).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert "(drt_timeline.png)" in card.text


def check_section(text: str, parameters: int, name: str) -> None:
    assert text.count("## Dynamic-rank training\n") == 1
    assert text.count("drt_timeline.png") == 1
    assert "█" not in text  # the picture tells it
    assert "| `drt_schedule` | `adapter:4@0 dense@2 adapter:8@4` |\n| `drt_log_rank_steps` | `2` |" in text
    assert "`pip install git+https://github.com/hf-drt/hf_drt`" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(("| 0 |", "| 1 |", "| 2 |"))]
    assert [row[:4] for row in rows] == [
        ["0", "adapter", "0 to 2", "4"], ["1", "dense", "2 to 4", "full"], ["2", "adapter", "4 to 6", "8"],
    ]  # fmt: skip
    assert rows[1][4:6] == [f"{parameters:,}", "1.00"]
    assert all(float(cell) > 0 for row in rows for cell in (row[5], row[7]))
    assert "@article{shin2025dynamic" in text
    assert f'LlamaForCausalLM.from_pretrained("{name}")' in text


def code_of(card: str) -> str:
    return card.partition("### Loading")[2].partition("```python\n")[2].partition("```")[0]


def test_the_average_is_published_if_asked(hub, name, tmp_path):
    averages = {}

    class Kept(T.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            averages[state.global_step] = {k: v.clone() for k, v in average.ema.state_dict()["averages"].items()}

    average = EMACallback(EMADecay(0.7, warmup=False), export=True)
    run = trainer(tmp_path, name, hub_strategy="every_save", max_steps=6)
    for callback in (average, Kept()):
        run.add_callback(callback)
    run.train()
    run.push_to_hub()
    during = commits(hub, name)["Training in progress, step 4"]
    for loaded, step in ((load(name, revision=during), 4), (load(name), 6)):
        state = loaded.state_dict()
        assert all(torch.equal(state[key], value) for key, value in averages[step].items())


def test_a_native_model(hub, name, tmp_path):
    run = trainer(tmp_path, name, hub_strategy="end", drt_export="native", max_steps=6)
    run.train()
    run.push_to_hub()
    assert torch.equal(logits(load(name)), logits(run.model))
    run.push_to_hub()  # again, over its own card
    found = {}
    exec(code_of(huggingface_hub.ModelCard.load(name).text), found)
    assert torch.equal(logits(found["model"]), logits(run.model))
    assert any(isinstance(m, AdapterLinear) for m in found["model"].modules())


def test_an_adapter_and_its_base(hub, name, tmp_path):
    run = trainer(tmp_path, name, hub_strategy="end", drt_export="adapter", hub_private_repo=True)
    run.train()
    run.push_to_hub()
    run.push_to_hub(commit_message="again")  # over a card that names PEFT
    assert {"adapter_config.json", "adapter_model.safetensors", "base/model.safetensors"} <= hub.repos[name].names()
    # Without the last argument the Auto classes of transformers 5.23 look for the root's adapter in the subfolder.
    base = load(name, subfolder="base", adapter_kwargs={"subfolder": "base"})
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, name)), logits(run.model))
    card = huggingface_hub.ModelCard.load(name)
    assert card.data.library_name == "peft"
    found = {}
    exec(code_of(card.text), found)
    assert torch.equal(logits(found["model"]), logits(run.model))


def test_a_push_by_hand_names_the_repository_and_does_not_block(hub, name, tmp_path):
    run = trainer(tmp_path, name, drt_export="adapter", push_to_hub=False, save_strategy="no")
    run.train()
    run.push_to_hub(blocking=False).result()
    base = load(name, subfolder="base", adapter_kwargs={"subfolder": "base"})
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, name)), logits(run.model))
    config = json.loads(Path(huggingface_hub.hf_hub_download(name, "adapter_config.json")).read_text())
    assert config["base_model_name_or_path"] == name


def test_without_a_layer_in_adapter_form_the_model_is_saved_dense_and_a_warning_says_so(hub, name, tmp_path, caplog):
    run = trainer(tmp_path, name, drt_export="adapter", push_to_hub=False)
    run.save_model()
    assert "no layer is in adapter form" in caplog.text
    loaded = T.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(run.model))


def test_each_form_takes_the_place_of_another_in_one_folder(hub, name, tmp_path):
    run = trainer(tmp_path, name, drt_export="adapter", push_to_hub=False, save_strategy="no")
    run.train()
    for export in ("adapter", "dense", "adapter", "native"):
        run.args.drt_export = export
        run.save_model()
        assert (tmp_path / "adapter_config.json").exists() == (export == "adapter")
        assert (tmp_path / "base" / "model.safetensors").exists() == (export == "adapter")
        assert (tmp_path / "model.safetensors").exists() == (export != "adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drt_schedule": "adapter@0 dense@50%"}, r"in phase 'dense.*' they are dense\. End the schedule with an adap"),
        ({"hub_strategy": "every_save"}, r"in phase 'factored.*' they are factored\. .* hub_strategy=end; or use exp"),
    ],
    ids=["last phase", "pushed phase"],
)
def test_an_adapter_of_another_phase_is_refused(hub, name, tmp_path, changes, message):
    run = trainer(tmp_path, name, drt_export="adapter", **{"hub_strategy": "end", **changes})
    with pytest.raises(ValueError, match=message):
        run.train()
    assert run.state.global_step == 0


# ---- during training


@pytest.mark.parametrize(
    "strategy", ["every_save", "checkpoint", pytest.param("all_checkpoints", marks=pytest.mark.slow)]
)
def test_every_commit_loads_as_the_model_of_its_step(hub, name, tmp_path, strategy):
    trainer(tmp_path, name, hub_strategy=strategy).train()
    titles = commits(hub, name)
    step = 0
    for title, sha in list(titles.items())[1:]:
        step = int(title.partition("step ")[2].partition(",")[0])
        model = load(name, revision=sha)
        assert_dense(model)
        assert_same(model, load(tmp_path / f"checkpoint-{step}"))
    assert step == 6
    assert len(titles) == 1 + (3 if strategy == "every_save" else 6)
    checkpoints = {
        "every_save": set(), "checkpoint": {"last-checkpoint"},
        "all_checkpoints": {f"checkpoint-{step}" for step in (2, 4, 6)},
    }[strategy]  # fmt: skip
    assert {path.partition("/")[0] for path in hub.repos[name].names() if "/" in path} - {"runs"} == checkpoints


@pytest.mark.parametrize(
    ("strategy", "folder"), [("checkpoint", "last-checkpoint"), ("all_checkpoints", "checkpoint-4")]
)
def test_a_pushed_checkpoint_resumes_bitwise_and_the_run_goes_on_pushing(hub, name, tmp_path, strategy, folder):
    whole = trainer(tmp_path / "whole", name, hub_strategy=strategy)
    whole.train()
    sha = commits(hub, name)["Training in progress, step 4, checkpoint"]
    there = huggingface_hub.snapshot_download(name, revision=sha, local_dir=tmp_path / "there")
    assert Path(there, folder, "drt_state.json").is_file()
    before = set(hub.repos[name].commits)
    again = trainer(tmp_path / "again", name, hub_strategy=strategy)
    again.train(resume_from_checkpoint=str(Path(there, folder)))
    left, right = again.model.state_dict(), whole.model.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    new = [title for sha, title in hub.repos[name].titles.items() if sha not in before]
    assert new[-1] == "Training in progress, step 6, checkpoint"
    assert_same(load(name), again.model)


def test_phases_are_revisions_and_a_second_run_moves_them(hub, name, tmp_path):
    changes = {"hub_strategy": "every_save", "drt_tag_phases": True, "save_steps": 3}
    tags = {"phase-0-factored": 2, "phase-1-dense": 4, "phase-2-adapter": 6}
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        trainer(folder, name, seed=seed, learning_rate=1e-2 * seed, **changes).train()
        assert set(hub.repos[name].tags) == set(tags)
        for tag, step in tags.items():
            assert_same(load(name, revision=tag), load(folder / f"checkpoint-{step}"))


@pytest.mark.slow
@pytest.mark.slow
def test_the_last_push_waits_for_the_one_before(hub, name, tmp_path, monkeypatch):
    upload, wait, waited = huggingface_hub.HfApi.upload_folder, PushInProgress.wait_until_done, threading.Event()

    def slow_upload(*args, **kwargs):
        assert waited.wait(60)
        return upload(*args, **kwargs)

    def announced_wait(self):
        waited.set()
        wait(self)

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", slow_upload)
    monkeypatch.setattr(PushInProgress, "wait_until_done", announced_wait)
    run = trainer(tmp_path, name, hub_strategy="every_save", hub_always_push=False, save_steps=1)
    run.train()
    pushed = [f"Training in progress, step {step}" for step in (1, 6)]  # those between have found it busy
    assert list(commits(hub, name)) == ["init", *pushed]
    assert_same(load(name), run.model)


@pytest.mark.slow
def test_another_form_over_an_earlier_one(hub, name, tmp_path):
    for export in ("dense", "adapter", "native"):
        run = trainer(tmp_path / "same", name, hub_strategy="end", drt_export=export, save_strategy="no")
        run.train()
        run.push_to_hub()
        files = hub.repos[name].names()
        assert ("adapter_config.json" in files) == (export == "adapter")
        assert ("config.json" in files) == ("model.safetensors" in files) == (export != "adapter")
    assert torch.equal(logits(load(name)), logits(run.model))


@pytest.mark.slow
def test_a_push_during_training_over_another_form_and_an_older_checkpoint(hub, name, tmp_path):
    run = trainer(tmp_path / "a", name, hub_strategy="end", drt_export="adapter")
    run.train()
    run.push_to_hub()
    api = huggingface_hub.HfApi()
    for path in ("last-checkpoint/rng_state_1.pth", "notes/model.safetensors"):
        api.upload_file(path_or_fileobj=b"old", path_in_repo=path, repo_id=name)
    run = trainer(tmp_path / "b", name, hub_strategy="checkpoint")
    run.train()
    files = hub.repos[name].names()
    assert "notes/model.safetensors" in files  # of the user
    assert not files & {"adapter_config.json", "adapter_model.safetensors", "last-checkpoint/rng_state_1.pth"}
    assert_same(load(name), run.model)


def test_what_is_no_part_of_the_model_stays_at_home(hub, name, tmp_path):
    for folder in (".checkpoint-9.replaced", "_notes"):  # a checkpoint that is being replaced, and the Trainer's rule
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("private")
    trainer(tmp_path, name, hub_strategy="every_save").train()
    assert not [path for path in hub.repos[name].names() if "checkpoint" in path or "notes" in path]


# ---- the repository


def test_a_private_repository_that_exists_and_a_branch_that_does_not(hub, name, tmp_path, monkeypatch):
    for _ in range(2):  # the second time it answers 409
        run = trainer(tmp_path, name, hub_strategy="every_save", hub_private_repo=True, hub_revision="trial")
        run.train()
    run.push_to_hub()
    repo = hub.repos[name]
    assert repo.private
    assert repo.names("main") == {".gitattributes"}
    assert_same(load(name, revision="trial"), run.model)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match=r"not a valid model identifier|gated|private"):
        load(name, revision="trial", force_download=True)


@pytest.mark.parametrize(
    ("token", "error", "message"),
    [(None, LocalTokenNotFoundError | HfHubHTTPError, "oken|401"), ("hf_wrong", HfHubHTTPError, "401")],
    ids=["none", "wrong"],
)
def test_without_a_valid_token_there_is_no_trainer(hub, name, tmp_path, monkeypatch, token, error, message):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(error.__args__ if hasattr(error, "__args__") else error, match=message):
        trainer(tmp_path, name, hub_strategy="end", hub_token=token)
    assert name not in hub.repos


def test_a_branch_that_cannot_be_made_is_an_error_before_training(hub, name, tmp_path):
    hub.fail("POST .*/branch/", 1, 403)
    with pytest.raises(HfHubHTTPError, match="403"):
        trainer(tmp_path, name, hub_strategy="end", hub_revision="trial")


# ---- faults


@pytest.mark.parametrize(
    ("how", "path"),
    [
        (500, "POST .*/commit/"),
        ("close", "PUT /lfs/"),
        pytest.param("close", "POST .*/commit/", marks=pytest.mark.slow),
        pytest.param(500, "PUT /lfs/", marks=pytest.mark.slow),
        pytest.param(500, "POST .*/preupload/", marks=pytest.mark.slow),
        pytest.param("close", "POST .*/preupload/", marks=pytest.mark.slow),
    ],
)
def test_a_push_that_fails_is_tried_again(hub, name, tmp_path, caplog, how, path):
    run = trainer(tmp_path, name, hub_strategy="checkpoint", save_steps=6)
    hub.fail(path, 7, how)  # the client itself tries six times where it does
    run.train()
    assert run.state.global_step == 6
    assert "the push of" in caplog.text
    assert f"attempt 1 of {ATTEMPTS}" in caplog.text
    assert "is not on the Hub" not in caplog.text
    assert_same(load(name), run.model)
    assert "last-checkpoint/drt_state.json" in hub.repos[name].names()


def test_what_failed_is_sent_at_the_end(hub, name, tmp_path, caplog):
    run = trainer(tmp_path, name, hub_strategy="all_checkpoints")
    hub.fail("POST .*/commit/", ATTEMPTS * 2, 403)  # no status that the client tries again: both uploads of step 2
    run.train()
    assert f"attempt {ATTEMPTS} of {ATTEMPTS}" in caplog.text
    assert "is not on the Hub" not in caplog.text
    assert {f"checkpoint-{step}/drt_state.json" for step in (2, 4, 6)} <= hub.repos[name].names()
    assert_same(load(name), run.model)


@pytest.mark.slow
def test_a_server_that_never_answers_costs_the_pushes_alone(hub, name, tmp_path, caplog):
    run = trainer(tmp_path / "a", name, hub_strategy="checkpoint", hub_revision="trial")
    hub.fail("(POST|PUT) ", 10**6, "close")
    run.train()
    assert run.state.global_step == 6
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 2
    root, checkpoint = tmp_path / "a", tmp_path / "a" / "checkpoint-6"
    excluded = "--exclude '_*' --exclude 'checkpoint-*' --exclude '.checkpoint-*'"
    assert f"{root} is not on the Hub. Push it by hand: hf upload {name} {root} . --revision trial {excluded}" in errors
    command = f"hf upload {name} {checkpoint} last-checkpoint --revision trial"
    assert f"{checkpoint} is not on the Hub. Push it by hand: {command}" in errors
    hub.heal()
    again = trainer(tmp_path / "b", name, push_to_hub=False)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    left, right = again.model.state_dict(), run.model.state_dict()
    assert all(torch.equal(left[key], right[key]) for key in right)
    run.push_to_hub()
    assert_same(load(name, revision="trial"), run.model)
    assert "last-checkpoint/drt_state.json" in hub.repos[name].names("trial")


def test_a_lost_revision_is_named(hub, name, tmp_path, caplog):
    run = trainer(tmp_path, name, hub_strategy="every_save", drt_tag_phases=True)
    hub.fail("POST .*/commit/", ATTEMPTS, 403)
    run.train()
    assert "the revision phase-0-factored is not on the Hub" in caplog.text
    assert set(hub.repos[name].tags) == {"phase-1-dense", "phase-2-adapter"}
    with pytest.raises(RevisionNotFoundError):
        huggingface_hub.snapshot_download(name, revision="phase-0-factored")


@pytest.mark.slow
def test_an_export_that_fails_costs_that_push_alone(hub, name, tmp_path, caplog, monkeypatch):
    run = trainer(tmp_path, name, hub_strategy="checkpoint")
    publish, states = run._drt_publisher._export, []

    def fail_once(folder):
        try:
            if not states:
                with run._drt_saving(False):
                    raise OSError("No space left on device")
            publish(folder)
        finally:
            states.append(run._drt_in_checkpoint)

    run._drt_publisher._export = fail_once
    run.train()
    assert "the model of step 2 is not on the Hub, since it could not be exported: OSError: No space" in caplog.text
    assert states == [True] * 3  # as it was, since the checkpoint is still being written
    assert not run._drt_in_checkpoint
    assert "Training in progress, step 2" not in commits(hub, name)
    assert "Training in progress, step 2, checkpoint" in commits(hub, name)
    assert_same(load(name), run.model)


def test_a_checkpoint_that_was_deleted_before_it_was_sent_is_passed_over(hub, name, tmp_path, caplog):
    run = trainer(tmp_path, name, hub_strategy="all_checkpoints", save_total_limit=1)
    hub.fail("POST .*/commit/", ATTEMPTS * 2, 403)
    run.train()
    assert "checkpoint-6/drt_state.json" in hub.repos[name].names()
    assert not [r for r in caplog.records if r.levelname == "ERROR" and "checkpoint-2" in r.getMessage()]


# ---- what is written while an upload reads


@pytest.mark.parametrize("write", [lambda run: run.save_model(_internal_call=True), lambda run: run.push_to_hub()])
def test_the_model_is_not_written_over_under_an_upload(hub, name, tmp_path, write):
    run = trainer(tmp_path, name, hub_strategy="every_save")
    run.train()
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    upload, seen = Future(), []
    run.push_in_progress = PushInProgress([upload])

    def end() -> None:
        seen.append((tmp_path / "model.safetensors").stat().st_mtime_ns)
        upload.set_result(None)

    threading.Timer(0.3, end).start()
    write(run)
    assert seen == [before]
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns > before


# ---- the token


def test_the_token_is_nowhere(hub, name, tmp_path, caplog, capfd, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    caplog.set_level("DEBUG")
    first = len(hub.received)
    run = trainer(
        tmp_path, name, hub_strategy="all_checkpoints", hub_token=server.TOKEN, report_to=["tensorboard"],
        hub_private_repo=True,
    )  # fmt: skip
    hub.fail("POST .*/commit/", 1, 403)
    run.train()
    run.save_model(str(tmp_path / "model"))
    run.push_to_hub()
    assert "attempt 1" in caplog.text
    secret = server.TOKEN.encode()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"training_args.bin", "trainer_state.json", "README.md"} <= {path.name for path in files}
    assert [str(path) for path in files if secret in path.read_bytes()] == []
    received = hub.received[first:]
    assert len(received) > 20
    assert [(method, path) for method, path, body in received if secret in path.encode() + body] == []
    assert [
        path for path, file in hub.repos[name].commits[hub.repos[name].find("main")].items() if secret in file["data"]
    ] == []
    printed = capfd.readouterr()
    assert server.TOKEN not in caplog.text + printed.out + printed.err
    assert run.args.hub_token == server.TOKEN  # training goes on pushing
    assert torch.load(tmp_path / "checkpoint-6" / "training_args.bin", weights_only=False).hub_token is None


def test_an_error_that_quotes_the_token_is_logged_without_it(hub, name, tmp_path, caplog, monkeypatch):
    run = trainer(tmp_path, name, hub_strategy="every_save")  # the token is that of the environment

    def quote(*args, **kwargs):
        raise RuntimeError(f"Bearer {server.TOKEN} was refused")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", quote)
    run.train()
    assert "Bearer *** was refused" in caplog.text
    assert server.TOKEN not in caplog.text
