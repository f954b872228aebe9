"""Groups of layers: by block, by kind, by patterns; balanced by their weights, none empty."""

import itertools

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_drt import DRTConfig, DynamicRank
from hf_drt.forms import LayerShape
from hf_drt.planning.groups import division, group_counts, group_numbers, mean_falls

reproducibly = settings(derandomize=True, database=None, deadline=None, max_examples=200)


def numbers(model: nn.Module, count: int, group_by=None, **settings) -> dict[str, int]:
    config = DRTConfig(schedule=f"rotate(groups={count})", rank=2, group_by=group_by, **settings)
    return DynamicRank(model, config, 1000).resolved.groups(count)


def blocks_of(found: dict[str, int]) -> dict[str, set[int]]:
    by_block: dict[str, set[int]] = {}
    for name, number in found.items():
        by_block.setdefault(".".join(name.split(".")[:3]), set()).add(number)
    return by_block


def test_neighbouring_blocks_stand_together():
    by_block = blocks_of(numbers(tiny.llama(num_hidden_layers=6), 3))
    assert list(by_block.values()) == [{1}, {1}, {2}, {2}, {3}, {3}]
    assert numbers(tiny.llama(num_hidden_layers=6), 3, "block") == numbers(tiny.llama(num_hidden_layers=6), 3)


def test_an_uneven_division_has_no_empty_group():
    by_block = blocks_of(numbers(tiny.llama(num_hidden_layers=5), 4))
    assert [next(iter(n)) for n in by_block.values()] == [1, 1, 2, 3, 4]


def test_more_groups_than_blocks_divide_the_layers():
    found = numbers(tiny.llama(), 5)
    assert set(found.values()) == {1, 2, 3, 4, 5}
    assert list(found.values()) == sorted(found.values())


def test_by_kind_all_layers_of_a_kind_stand_together():
    found = numbers(tiny.llama(num_hidden_layers=3), 7, "kind")
    kinds = {name.split(".", 3)[3]: set() for name in found}
    for name, number in found.items():
        kinds[name.split(".", 3)[3]].add(number)
    assert sorted(next(iter(n)) for n in kinds.values()) == [1, 2, 3, 4, 5, 6, 7]
    assert all(len(n) == 1 for n in kinds.values())


def test_by_patterns_a_layer_is_in_the_group_of_the_first_that_matches():
    found = numbers(tiny.llama(), 3, [r"layers\.0", "attn", ""])
    for name, number in found.items():
        assert number == (1 if ".0." in name else 2 if "attn" in name else 3)


def test_the_blocks_of_encoder_and_decoder_are_one_row():
    found = numbers(tiny.t5(), 4)
    assert {found[n] for n in found if n.startswith("encoder.block.0")} == {1}
    assert {found[n] for n in found if n.startswith("decoder")} <= {2, 3, 4}


def test_experts_count_with_all_their_weights():
    model = tiny.mixtral(num_hidden_layers=2)
    found = numbers(model, 2)
    assert blocks_of(found) == {"model.layers.0": {1}, "model.layers.1": {2}}
    shapes = DynamicRank(model, DRTConfig(schedule="factored@0", rank=2), 10).targets
    divided = group_numbers(shapes, 4, DRTConfig())
    weights = dict.fromkeys(range(1, 5), 0)
    for name, shape in shapes.items():
        weights[divided[name]] += shape[0] * shape[1] * (shape.experts or 1)
    largest = max(shape[0] * shape[1] * (shape.experts or 1) for shape in shapes.values())
    assert max(weights.values()) <= sum(weights.values()) / 4 + largest


ERRORS = [
    (15, None, r"the schedule has 15 groups, and the target layers are of 14 layers\. Take at most 14 groups\."),
    (8, "kind", r"the schedule has 8 groups, and the target layers are of 7 kinds of layers\. .* 7 groups, or group_b"),
    (3, ["attn", "mlp"], r"group_by has 2 patterns, and the schedule 3 groups\. Give one per group"),
    (2, ["q_proj", "mlp"], r"group_by: no pattern matches model\.layers\.0\.self_attn\.k_proj \(6 of 14 layers are wi"),
    (3, ["attn", "mlp", "q_proj"], r"group_by: 'q_proj' is the first match of no layer\. Change it, or the order of p"),
]  # fmt: skip


@pytest.mark.parametrize(("count", "group_by", "message"), ERRORS)
def test_a_division_that_does_not_fit_the_model_is_refused_before_anything_changes(count, group_by, message):
    model = tiny.llama()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        numbers(model, count, group_by)
    assert [type(module) for module in model.modules()] == before


@reproducibly
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8), data=st.data())
def test_the_largest_group_is_as_small_as_any_division_of_neighbours_can_have_it(sizes, data):
    count = data.draw(st.integers(1, len(sizes)))
    found = division(sizes, count)
    assert found[0] == 1
    assert all(b - a in (0, 1) for a, b in itertools.pairwise(found))
    assert found[-1] == count

    def largest(cuts) -> int:
        edges = [0, *cuts, len(sizes)]
        return max(sum(sizes[a:b]) for a, b in itertools.pairwise(edges))

    best = min(largest(cuts) for cuts in itertools.combinations(range(1, len(sizes)), count - 1))
    assert max(sum(s for s, n in zip(sizes, found, strict=True) if n == k) for k in range(1, count + 1)) == best


def test_a_model_without_numbers_in_its_names_is_divided_by_layers():
    shapes = {name: LayerShape(4, 4) for name in ("a.q", "a.k", "b.q")}
    assert group_numbers(shapes, 3, DRTConfig()) == {"a.q": 1, "a.k": 2, "b.q": 3}
    assert group_numbers(shapes, 2, DRTConfig())["b.q"] == 2


def test_a_named_layer_is_in_the_form_of_its_part_and_others_stay():
    drt = DynamicRank(tiny.llama(num_hidden_layers=4), DRTConfig(schedule="rotate(groups=4)", rank=4), 1000)
    forms, groups = drt.resolved.forms_by_phase, drt.resolved.groups(4)
    for phase in range(1, 5):
        for name, number in groups.items():
            text = str(forms[phase][name])
            assert text == (
                "Dense()" if number == phase else "Dense(frozen=True)" if number < phase else "Factored(rank=4)"
            )


def test_one_layer_has_no_turns():
    with pytest.raises(ValueError, match=r"2 groups, and the target layers are of 1 layers\. Take a schedule without"):
        numbers(tiny.llama(num_hidden_layers=1), 2, include=["up_proj"])


@pytest.mark.parametrize("group_by", [None, "block", "kind", ["attn", ""], ["attn", "up_proj", ""], [""]])
def test_into_how_many_groups_layers_can_be_divided(group_by):
    config = DRTConfig(schedule="rotate", rank=2, group_by=group_by)
    shapes = DynamicRank(tiny.llama(), DRTConfig(schedule="factored@0", rank=2), 10).targets
    allowed = []
    for count in range(2, len(shapes) + 2):
        try:
            allowed.append(len(set(group_numbers(shapes, count, config).values())))
        except ValueError:
            continue
    assert list(group_counts(shapes, config)) == allowed


def test_falls_are_means_over_the_layers_of_a_group():
    before, now = {"a": 10.0, "b": 4.0, "c": 0.0, "d": 5.0}, {"a": 5.0, "b": 4.0, "c": 3.0, "d": 6.0}
    numbers = {"a": 2, "b": 2, "c": 1, "d": 3}
    assert mean_falls(before, now, numbers) == pytest.approx({1: 0.0, 2: 0.25, 3: -0.2})
