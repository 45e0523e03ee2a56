"""The decisions of a federation: named transitions, the synchronous policy, and that its room decides by arguments alone."""

import ast
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.federation.policy import Position
from lamina.federation.state import RoundPhase, RoundTransition, RunTransition
from lamina.federation.synchronous import SyncRounds
from lamina.plans.plan import Cohort, Plan, SelfTuning
from lamina.wire import RunState
from tests.lamina.test_plan import LEGAL

ROOT = Path(__file__).parents[2]


def make_plan(cohort: Cohort, rounds: list[int], tuning: SelfTuning | None = None) -> Plan:
    plan = LEGAL["layerwise"]() if "layerwise" in LEGAL else next(iter(LEGAL.values()))()
    stages = tuple(stage.model_copy(update={"rounds": count}) for stage, count in zip(plan.stages, rounds, strict=False))
    return plan.model_copy(update={"stages": stages, "cohort": cohort, "self_tuning": tuning})


@pytest.mark.parametrize("transition", [*RoundTransition, *RunTransition], ids=str)
def test_a_transition_leads_from_its_states_to_one_and_from_no_other(transition) -> None:
    states = get_args(RoundPhase if isinstance(transition, RoundTransition) else RunState)
    assert set(transition.sources) <= set(states) and transition.target in states
    for state in states:
        if state in transition.sources:
            assert transition.after(state) == transition.target
        else:
            with pytest.raises(ValueError, match=transition.name.lower()):
                transition.after(state)


def test_a_round_never_goes_back_and_a_cancelled_run_stays_so() -> None:
    order = get_args(RoundPhase)
    for transition in RoundTransition:
        assert all(order.index(source) < order.index(transition.target) for source in transition.sources)
    assert not any("cancelled" in transition.sources for transition in RunTransition if transition is not RunTransition.CANCEL)


cohorts = st.builds(
    lambda size, more, updates, seconds: Cohort(
        size=size, pool=size + more if more else None, min_updates=min(updates, size), deadline_seconds=seconds
    ),
    st.integers(1, 8), st.integers(0, 4), st.integers(1, 8), st.floats(0.5, 100),
)  # fmt: skip


@given(cohort=cohorts, updates=st.integers(0, 10), seconds=st.floats(0, 200), here=st.integers(0, 14))
def test_rounds_start_fill_and_close_by_the_cohort(cohort: Cohort, updates: int, seconds: float, here: int) -> None:
    policy = SyncRounds(make_plan(cohort, [1, 1]))
    assert policy.may_start(here) == (here >= (cohort.pool or cohort.size))
    assert policy.may_join(updates) == (updates < cohort.size)
    is_full, is_late = updates >= cohort.size, seconds >= cohort.deadline_seconds
    assert policy.closes(updates, seconds) == (is_full or (is_late and updates >= cohort.min_updates))
    assert not policy.closes(updates, seconds) or policy.closes(updates + 1, seconds + 1)  # it never opens again


@given(cohort=cohorts, names=st.sets(st.text("abcdef", min_size=1, max_size=4), min_size=12, max_size=20), data=st.data())
def test_a_draw_is_of_those_that_are_here_whatever_their_order(cohort: Cohort, names: set[str], data) -> None:
    policy, position = SyncRounds(make_plan(cohort, [1, 1])), Position(0, 3)
    drawn = policy.draw(sorted(names), position)
    if cohort.pool is None:
        assert drawn is None
    else:
        assert drawn is not None and len(set(drawn)) == cohort.size and set(drawn) <= names
        assert policy.draw(data.draw(st.permutations(sorted(names))), position) == drawn


@given(rounds=st.lists(st.integers(0, 4), min_size=2, max_size=2).filter(any))
def test_without_tuning_a_run_goes_through_every_round_once_and_ends(rounds: list[int]) -> None:
    policy = SyncRounds(make_plan(Cohort(size=1), rounds))
    walked: list[Position] = []
    position: Position | None = Position(0, 0)
    while position is not None:
        if position.round < rounds[position.stage]:
            walked.append(position)
            position = policy.next(position, [])
        else:  # a stage of no rounds
            position = policy.next(Position(position.stage, -1), [])
        assert len(walked) <= sum(rounds)
    assert walked == [Position(stage, number) for stage, count in enumerate(rounds) for number in range(count)]


def test_a_stage_ends_early_when_its_losses_stall() -> None:
    policy = SyncRounds(make_plan(Cohort(size=1), [9, 1], SelfTuning(patience=2, min_improvement=0.1)))
    assert policy.next(Position(0, 1), [1.0, 0.5]) == Position(0, 2)
    assert policy.next(Position(0, 3), [1.0, 0.5, 0.5, 0.49]) == Position(1, 0)
    assert policy.next(Position(1, 0), [1.0]) is None


IMPURE = {
    "sqlalchemy",
    "httpx",
    "torch",
    "time",
    "datetime",
    "secrets",
    "os",
    "threading",
    "coordinator",
    "edge_client",
    "export",
}


@pytest.mark.parametrize("path", sorted((ROOT / "lamina" / "federation").rglob("*.py")), ids=lambda path: path.stem)
def test_the_room_has_no_sql_no_http_no_torch_and_no_clock(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not IMPURE & {name.split(".")[0] for name in names}, path.name


def test_states_change_in_one_module_of_the_coordinator() -> None:
    changed = set()
    for path, names in product(sorted((ROOT / "coordinator").rglob("*.py")), [{"phase", "halt", "is_finished"}]):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else []
            attributes = [part for target in targets for part in ast.walk(target) if isinstance(part, ast.Attribute)]
            changed |= {path.name for attribute in attributes if attribute.attr in names}
    assert changed == {"transitions.py"}
