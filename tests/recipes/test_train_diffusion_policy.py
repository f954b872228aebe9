"""The recipe that trains a diffusion policy: its loop, rounds and records with a toy policy on a toy table; lerobot's
own is marked slow."""

import dataclasses
import json
import sys
from itertools import pairwise

import fetch_push
import lerobot_policy
import pytest
import torch
import train_diffusion_policy as recipe
from lerobot_policy import Scale, Shape, Windows, chunks_of
from toy_policy import ToyPolicy, ToyTable
from train_diffusion_policy import Settings, Training

from hf_drt import form_of


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """The words of a short run with the toys."""
    monkeypatch.setattr(fetch_push, "make_environment", ToyTable)
    monkeypatch.setattr(recipe, "new_policy", ToyPolicy)
    return ["run", "--seeds", "0", "--updates", "8", "--batch_size", "16", "--rollouts", "3", "--demonstrations", "2",
            "--widths", "16", "--records", str(tmp_path / "r.jsonl"), "--cache_dir", str(tmp_path)]  # fmt: skip


def training(schedule: str | None, updates: int = 8, **changes: object) -> Training:
    settings = Settings("m", schedule, 0, updates=updates, batch_size=16, shape=Shape(widths=(32,)), **changes)
    episodes = [fetch_push.demonstrate(ToyTable(), seed)[0] for seed in range(2)]
    return Training(settings, Windows(episodes, settings.shape.horizon, Scale.of(episodes)))


def test_dense_is_a_plain_loop_of_torch(toys):
    """To the bit: the same weights, batches and rates by hand."""
    own = training(None)
    torch.manual_seed(0)
    policy = ToyPolicy(Shape(widths=(32,)))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=1e-6)
    generator = torch.Generator().manual_seed(0)
    own_noise = torch.get_rng_state()
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1.0 if step == 0 else own._rate(step))
        loss, _ = policy(own.windows.batch(torch.randint(len(own.windows), (16,), generator=generator)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_rng_state(own_noise)
    own.run(8)
    assert all(torch.equal(a, b) for a, b in zip(own.policy.parameters(), policy.parameters(), strict=True))
    assert own.losses[-1] == loss.item()


def test_the_rate_rises_and_falls(toys):
    own = training(None, updates=100)
    rates = [own._rate(step) for step in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(rates[5:]))
    assert rates[100] == pytest.approx(0.0, abs=1e-6)


def test_a_schedule_changes_the_form_of_convolutions_while_it_trains(toys):
    own = training("lowrank:8@0 dense@50%")
    whole = sum(p.numel() for p in ToyPolicy(Shape(widths=(32,))).parameters())
    assert own.share == pytest.approx(4 * 32 * 32 * 3 / whole)
    kinds = []
    for _ in range(8):
        own.run(1)
        kinds.append(type(form_of(own.policy.blocks[0][0])).__name__)
    assert kinds == ["Factored"] * 4 + ["Dense"] * 4
    assert len(set(own.trained[:4])) == len(set(own.trained[4:])) == 1
    assert own.trained[0] < own.trained[-1]


def test_a_run_is_recorded_and_not_run_again(toys, capsys, monkeypatch):
    recipe.main([*toys, "--methods", "dense", "lowrank:8@0"])
    first = capsys.readouterr().out
    assert "hf_drt selects" in first
    monkeypatch.setattr(recipe, "trained", None)
    recipe.main([*toys, "--methods", "lowrank:8@0", "dense"])
    assert capsys.readouterr().out.count("(recorded)") == 2
    recipe.main(["table", "--records", toys[toys.index("--records") + 1]])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["dense", "lowrank:8@0"]


def test_speed_is_measured_by_turns(toys, capsys, monkeypatch):
    order = []
    update = Training._update
    monkeypatch.setattr(Training, "_update", lambda self: order.append(self.settings.method) or update(self))
    recipe.main(["speed", *toys[1:], "--methods", "dense", "lowrank:8@0"])
    assert order == ["dense", "lowrank:8@0"] * (recipe.SPEED_TURNS + 2)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["dense", "lowrank:8@0"]
    assert rows[0][2] == rows[0][4] == "1.00"
    whole, kernels = sum(p.numel() for p in ToyPolicy(Shape(widths=(16,))).parameters()), 4 * 16 * 16 * 3
    assert [row[5] for row in rows] == [f"{whole:,}", f"{whole - kernels + 4 * 8 * (16 * 3 + 16):,}"]


def test_dagger_learns_what_the_expert_does_when_it_takes_over(toys):
    words = [word for word in toys if word not in ("--demonstrations", "2")]
    recipe.main([*words, "--methods", "dense", "--dagger", "--dagger_demonstrations", "2"])
    with open(toys[toys.index("--records") + 1]) as file:
        record = json.loads(file.read())
    assert record["settings"]["method"] == "dense, DAgger"
    rounds = record["rounds"]
    assert [row.get("probability") for row in rounds] == [0.5, 0.25, 0.125, None]
    assert all(row["cpu_per_update"] > 0 for row in rounds)
    assert rounds[0]["taught"] > 0


def test_what_was_taught_joins_the_windows(toys):
    own = training(None, dagger=recipe.Dagger(rounds=2, episodes=3, first=1.0))
    before = len(own.windows)
    rows = recipe.train_in_rounds(own, fetch_push.Arena())
    assert len(own.windows) == before + 3 * fetch_push.STEPS
    assert rows[0]["taught"] == 3 * fetch_push.STEPS
    assert len(own.losses) == 8


def test_the_held_out_loss_leaves_the_random_numbers_alone(toys, tmp_path):
    own = training(None)
    state, few = torch.get_rng_state(), fetch_push.Demonstrations(count=1, first_seed=9)
    first, second = (recipe.held_out_loss(own, few, tmp_path) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--updates", "0"], "--updates must be at least 1, got 0."),
        (["--rollouts", "0"], "--rollouts must be at least 1, got 0."),
        (["--learning_rate", "0"], "--learning_rate must be above 0, got 0."),
        (["--methods", "dens"], "--methods dens: it is none of dense, auto, fixed, drift, and no schedule"),
        (["--methods", "factored:2.5@0"], "'2.5' in 'factored:2.5@0' is not a rank"),
        (["--widths", "20"], "--widths must be multiples of 8, the groups of the norms, got 20."),
        (["--widths", "8", "8", "8", "8"], "--widths has 4 levels, which halve 8 actions; give 3 at most."),
        (["--dagger_demonstrations", "3"], "--dagger_demonstrations has no effect without --dagger."),
        (["--dagger", "--demonstrations", "3"], "--demonstrations has no effect with --dagger"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_made(flags, message, capsys):
    with pytest.raises(SystemExit):
        recipe.main(flags if "--methods" in flags else ["--methods", "dense", *flags])
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_table_without_records_says_how_to_make_some(tmp_path):
    with pytest.raises(SystemExit, match=r"nothing.jsonl holds no record. Make some: python recipes/train_diff"):
        recipe.main(["table", "--records", str(tmp_path / "nothing.jsonl")])


def test_a_chunk_that_is_longer_than_the_horizon_is_refused():
    with pytest.raises(ValueError, match=r"a chunk of 8 actions does not fit a horizon of 8.* it may hold 7 at most"):
        lerobot_policy.new_policy(Shape(chunk=8))


def test_without_lerobot_the_recipe_says_what_to_install(monkeypatch):
    monkeypatch.setattr(lerobot_policy.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "lerobot", None)
    message = r"wants lerobot.*pip install -e '.\[policy\]' && pip install --no-deps lerobot==0.4.4"
    with pytest.raises(SystemExit, match=message):
        lerobot_policy.new_policy(Shape())


@pytest.mark.slow
def test_lerobots_policy_on_the_real_table(tmp_path, capsys):
    """Needs the extra `policy`, and lerobot beside it."""
    pytest.importorskip("gymnasium_robotics", reason="pip install -e '.[policy]'")
    pytest.importorskip("lerobot", reason="pip install --no-deps lerobot==0.4.4")
    policy = lerobot_policy.new_policy(dataclasses.replace(Shape(), widths=(16, 32)))
    predict = chunks_of(policy, Scale(torch.zeros(21), torch.ones(21)), torch.Generator())
    assert predict(torch.zeros(3, 2, 21).numpy(), [0, 1, 2]).shape == (3, 4, 3)
    recipe.main(["--methods", "dense", "auto", "--seeds", "0", "--updates", "4", "--rollouts", "2", "--demonstrations",
                 "2", "--records", str(tmp_path / "r.jsonl"), "--cache_dir", str(tmp_path)])  # fmt: skip
    out = capsys.readouterr().out
    assert "hf_drt selects 91.0% of the policy's parameters" in out
    assert out.count("CPU s/update") == 2
