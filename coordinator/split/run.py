"""One split run: its rounds, whose turn it is, and the steps of that turn.

What a round gave is durable (`SplitState`, written when the round ends); everything inside a round is in memory, so a
coordinator that is started again begins the round again. Where the coordinator computes (`party = "server"`), the users of a
round train one after the other, in the order of their names: there is one task adapter for each modality, and the result does
not depend on who is fast. A user that falls silent, or begins again, leaves no trace: its turn is taken back.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from threading import RLock

from coordinator.house import House
from coordinator.split.aggregate import mean_over_users, share_middle
from coordinator.split.high_ends import HighEnds
from coordinator.split.keeping import Keeping
from coordinator.split.state import SplitState, save_state
from coordinator.split.switch import is_steady
from coordinator.split.turn import Turn, TurnSteps, check_count
from coordinator.split.update import Update, read_update
from lamina.encoding.tensors import Float32, decode_file, encode
from lamina.errors import ConfigError, RoundClosedError, UpdateRejectedError
from lamina.split.manifest import SplitManifest
from lamina.split.plan import FUSION, task_adapter
from lamina.split.wire import (
    SplitAccepted,
    SplitCheckIn,
    SplitEvaluation,
    SplitReport,
    SplitRound,
    SplitStatus,
    SplitTraffic,
    SplitUserReport,
    SplitWork,
)
from lamina.wire import Refused, Wait

log = logging.getLogger("lamina.coordinator")
_MOST_NAMES = 8


@dataclass
class _Round:
    """The round that is under way; a restart forgets it. `cohort` is ordered by name, and empty before the round begins."""

    cohort: list[str] = field(default_factory=list)
    updates: dict[str, Update] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    turn: Turn | None = None


class SplitRun:
    """Every method may be called from any thread. `names(id)` is the name of a device."""

    def __init__(
        self,
        house: House,
        manifest: SplitManifest,
        state: SplitState,
        high: Callable[[], HighEnds],
        names: Callable[[str], str],
        keeping: Keeping,
    ) -> None:
        self._house, self.manifest, self._names, self._make_high = house, manifest, names, high
        self._keeping = keeping
        self.plan = manifest.plan
        self._state = state
        self._lock = RLock()
        self._steps: TurnSteps | None = None
        self._asked: dict[str, float] = {}  # when each device last asked for work
        self._has: dict[str, tuple[str, ...]] = {}  # the modalities that each takes part with; none: all
        self._leases: dict[str, float] = {}  # of the users of a round that train by themselves, or evaluate
        self._now = _Round()

    # What devices ask

    def check_in(self, device: str, facts: SplitCheckIn) -> SplitWork | Wait | Refused:
        with self._lock:
            if reason := self._refusal(facts):
                return Refused(detail=reason)
            now = self._house.clock()
            self._asked[device] = now
            # As first said: within a round nothing else would do, and other data are another user's.
            self._has.setdefault(device, self.plan.some_of(facts.modalities) or ())
            self._advance(now)
            if self.is_finished:
                return self._wait("no_run", f"{self._state.run} is finished")
            if self._state.evaluating:
                if device not in self._state.evaluating:
                    return self._wait("round", f"round {self._state.round - 1} is being evaluated")
                self._leases[device] = now
                return self._work("evaluate", self._state.round - 1, False, ())
            if not self._now.cohort:
                here = self._here(now)
                return self._wait("cohort", f"{len(here)} of {self.plan.users.size} users are here")
            if device not in self._now.cohort or device in self._now.lost:
                return self._wait("round", f"round {self._state.round} is under way with others")
            if device in self._now.updates:
                left = len(self._now.cohort) - len(self._now.updates) - len(self._now.lost)
                return self._wait("round", f"round {self._state.round} waits for {left} others")
            if self.plan.party == "device":
                self._leases[device] = now
            elif self._now.turn is None or self._now.turn.user != device:
                whose = self._names(self._now.turn.user) if self._now.turn else "nobody"
                return self._wait("round", f"round {self._state.round}: it is the turn of {whose}")
            else:
                self._now.turn = self._turn_steps().begin_again(self._now.turn, now)
            return self._work("train", self._state.round, self._state.fused, self._has[device])

    # Before a body is read

    def expect_step(self, device: str, round: int) -> None:
        """Raises RoundClosedError unless it is the turn of this user. Its lease is renewed by the body alone."""
        with self._lock:
            self._find_turn(device, round)

    def expect_answers(self, device: str, round: int) -> None:
        """Raises RoundClosedError unless this user is asked to evaluate."""
        with self._lock:
            self._check_evaluating(device, round)

    def expect_update(self, device: str, round: int) -> None:
        """Raises RoundClosedError unless this user has a part in the round, or its update is counted already."""
        with self._lock:
            if round != self._state.round or device not in self._now.cohort:
                raise RoundClosedError(
                    f"round {round} of {self._state.run} takes no update of this user; check in for new work"
                )

    # The bodies

    def features(self, device: str, round: int, step: int, examples: int, body: bytes) -> bytes:
        """Activations up, features down: the first half of a step. The same body again gives the same answer."""
        with self._lock:
            turn = self._turn_of(device, round)
            return self._turn_steps().features(turn, step, examples, body, self._state.fused)

    def gradients(self, device: str, round: int, step: int, examples: int, body: bytes) -> bytes:
        """Gradients up, gradients down: the second half of a step, which trains the task adapters and the fusion net."""
        with self._lock:
            turn = self._turn_of(device, round)
            return self._turn_steps().gradients(turn, step, examples, body, self._state.fused)

    def answers(self, device: str, round: int, examples: int, body: bytes) -> bytes:
        """Activations of test examples up, features and fused logits down; nothing is trained."""
        with self._lock:
            self._check_evaluating(device, round)
            self._leases[device] = self._house.clock()
            return self._turn_steps().answers(examples, body)

    def update(self, device: str, round: int, body: bytes, report: SplitReport) -> SplitAccepted:
        """A user's differences of what it trained. The round ends with the last one."""
        with self._lock:
            digest = sha256(body).hexdigest()
            known = self._now.updates.get(device) if round == self._state.round else None
            if known is not None:
                if known.digest != digest:
                    raise UpdateRejectedError(f"round {round} has counted another update of this user; check in for new work")
                return SplitAccepted(run=self._state.run, round=round)
            self._advance(self._house.clock())
            if self.plan.party == "server":
                if self._turn_of(device, round).activations is not None:
                    raise UpdateRejectedError("the last step has no gradients yet; send them first")
            elif round != self._state.round or device not in self._now.cohort or device in self._now.lost:
                raise RoundClosedError(
                    f"round {round} of {self._state.run} takes no update of this user; check in for new work"
                )
            self._now.updates[device] = read_update(self.manifest, self._state.fused, self._has[device], digest, body, report)
            self._now.turn = None
            self._advance(self._house.clock())
            return SplitAccepted(run=self._state.run, round=round)

    def evaluation(self, device: str, round: int, given: SplitEvaluation) -> SplitAccepted:
        with self._lock:
            accepted = SplitAccepted(run=self._state.run, round=round)
            if round == self._state.round - 1 and device in self._state.evaluated:
                return accepted
            self._check_evaluating(device, round)
            counts = [given.fused_correct, *given.correct.values()]
            if set(given.correct) != set(self.plan.modalities) or max(counts) > given.num_examples:
                raise UpdateRejectedError("the evaluation counts other modalities, or more right answers than examples")
            last = self._state.rounds[-1]
            correct = {m: last.test_correct.get(m, 0) + count for m, count in given.correct.items()}
            self._save(
                rounds=(
                    *self._state.rounds[:-1],
                    last.model_copy(
                        update={
                            "test_examples": last.test_examples + given.num_examples,
                            "test_correct": correct,
                            "test_fused_correct": last.test_fused_correct + given.fused_correct,
                        }
                    ),
                ),
                evaluating={user: name for user, name in self._state.evaluating.items() if user != device},
                evaluated=(*self._state.evaluated, device),
            )
            return accepted

    # What users and the app ask

    @property
    def needed(self) -> set[str]:
        """The blobs of the manifest and of the newest weights."""
        return {*self.manifest.blobs, *self._state.weights.values()}

    def remove_superseded(self) -> None:
        """Deletes the weights of the round before the last, unless some run has them still. A user that is fetching one is told
        that it is gone and checks in again: its round is over."""
        self._keeping.remove(self._state.superseded)

    @property
    def is_finished(self) -> bool:
        return self._state.round == self.plan.rounds and not self._state.evaluating

    def status(self) -> SplitStatus:
        with self._lock:
            self._advance(self._house.clock())
            state = self._state
            if self.is_finished:
                detail = "finished"
            elif state.evaluating:
                detail = f"waits for the evaluations of {', '.join(sorted(state.evaluating.values()))}"
            elif self._now.turn is not None:
                detail = f"{self._names(self._now.turn.user)} trains, {self._now.turn.steps} steps done"
            else:
                detail = self._whom_it_waits_for(self._house.clock())
            return SplitStatus(
                run=state.run,
                name=self.plan.name,
                state="finished" if self.is_finished else "running",
                manifest=state.manifest,
                round=min(state.round, self.plan.rounds - 1),
                fused=state.fused,
                detail=detail,
                rounds=state.rounds,
                weights=state.weights,
            )

    @property
    def fused(self) -> bool:
        return self._state.fused

    # Rounds

    def _advance(self, now: float) -> None:
        """Whatever time and messages allow: leases end, turns pass, the round is aggregated, the next one begins."""
        lease = self.plan.users.lease_seconds
        if self._state.evaluating:
            silent = {user for user in self._state.evaluating if self._leases.setdefault(user, now) + lease < now}
            if silent:
                awaited = {user: name for user, name in self._state.evaluating.items() if user not in silent}
                self._save(evaluating=awaited)
            return
        if self.is_finished:
            return
        if not self._now.cohort:
            here = self._here(now)
            if len(here) < self.plan.users.size:
                return
            drawn = sorted(
                here, key=lambda user: sha256(f"{self.plan.seed}/{self._state.round}/{self._names(user)}".encode()).digest()
            )
            self._now.cohort = sorted(drawn[: self.plan.users.size], key=self._names)
            self._leases = dict.fromkeys(self._now.cohort, now)
            if self.plan.party == "server":
                self._turn_steps().load(self._state.weights)
        if self.plan.party == "device":
            self._now.lost |= {u for u in self._now.cohort if u not in self._now.updates and self._leases[u] + lease < now}
        elif self._now.turn is not None and self._now.turn.seen + lease < now:
            log.warning(
                "%s: %s lost its turn in round %d", self._state.run, self._names(self._now.turn.user), self._state.round
            )
            self._now.lost.add(self._now.turn.user)
            self._turn_steps().take_back(self._now.turn)
            self._now.turn = None
        left = [user for user in self._now.cohort if user not in self._now.updates and user not in self._now.lost]
        if left:
            if self.plan.party == "server" and self._now.turn is None:
                # It has a lease before it has asked: one that has left must not stop the others.
                self._now.turn = self._turn_steps().begin(left[0], self._has[left[0]], now)
            return
        if len(self._now.updates) >= self.plan.users.min_users:
            self._aggregate()
        else:
            log.warning("%s: round %d begins again, too few users stayed", self._state.run, self._state.round)
            for user in self._now.lost:
                self._asked.pop(user, None)
            self._forget_round()

    def _aggregate(self) -> None:
        users = [user for user in self._now.cohort if user in self._now.updates]
        updates = [self._now.updates[user] for user in users]
        new: dict[str, dict[str, Float32]] = {}
        for part in self.plan.sent(self._state.fused):
            having = [each for each in updates if part in self.plan.sent(self._state.fused, each.modalities)]
            if having:  # else nobody trained it: its blob stays the same
                start = self._tensors(part)
                given = [{name: update.differences[f"{part}/{name}"] for name in start} for update in having]
                new[part] = mean_over_users(start, given)
        for part in (*(task_adapter(m) for m in self.plan.modalities), FUSION):
            if self.plan.party == "server":
                new[part] = self._turn_steps().tensors(part)
        adapters = share_middle({m: new[task_adapter(m)] for m in self.plan.modalities})
        new |= {task_adapter(m): tensors for m, tensors in adapters.items()}
        if self._state.fused:
            new.pop(FUSION, None)  # frozen: its blob stays the same
        fused_losses = [each.report.fused_loss for each in updates if each.report.fused_loss is not None]
        fused_loss = sum(fused_losses) / len(fused_losses) if fused_losses else None
        course = [loss for loss in (*(each.fused_loss for each in self._state.rounds), fused_loss) if loss is not None]
        number = self._state.round
        done = SplitRound(
            round=number,
            fused=self._state.fused,
            users=tuple(SplitUserReport(user=self._names(user), report=self._now.updates[user].report) for user in users),
            fused_loss=fused_loss,
            traffic=self._steps.traffic if self._steps else SplitTraffic(),
            notes=tuple(
                f"{self._names(user)} fell silent and does not count" for user in sorted(self._now.lost, key=self._names)
            ),
        )
        evaluates = self.plan.users.evaluates(number, self.plan.rounds)
        with self._keeping.lock:
            blobs = {part: self._house.blobs.put(encode(tensors)) for part, tensors in new.items()}
            self._save(
                round=number + 1,
                fused=self._state.fused or is_steady(course, self.plan.switch),
                weights={**self._state.weights, **blobs},
                superseded=tuple(
                    self._state.weights[part] for part, blob in blobs.items() if self._state.weights[part] != blob
                ),
                rounds=(*self._state.rounds, done),
                evaluating={user: self._names(user) for user in users if evaluates and not self._has[user]},
                evaluated=(),
            )
        self.remove_superseded()
        log.info("%s: round %d is aggregated from %d users", self._state.run, number, len(users))
        self._forget_round()
        if self._steps is not None:
            self._steps.load(self._state.weights)

    def _forget_round(self) -> None:
        self._now, self._leases = _Round(), {}

    def _turn_of(self, device: str, round: int) -> Turn:
        turn = self._find_turn(device, round)
        turn.seen = self._house.clock()
        return turn

    def _find_turn(self, device: str, round: int) -> Turn:
        turn = self._now.turn
        if round != self._state.round or self._state.evaluating or turn is None or turn.user != device:
            raise RoundClosedError(f"it is not the turn of this user in round {round} of {self._state.run}; check in for work")
        return turn

    def _check_evaluating(self, device: str, round: int) -> None:
        if round != self._state.round - 1 or device not in self._state.evaluating:
            raise RoundClosedError(f"round {round} of {self._state.run} asks this user for no evaluation; check in for work")

    # Small things

    def _refusal(self, facts: SplitCheckIn) -> str | None:
        if self.plan.some_of(facts.modalities) is None:
            lacking = sorted(set(self.plan.modalities) - set(facts.modalities))
            needs = f"one of {', '.join(lacking)}" if self.plan.users.some_modalities else repr(lacking[0])
            return f"the plan {self.plan.name!r} needs {needs}, which this user's data lacks"
        if facts.engine not in self.manifest.programs:
            return f"the bundle has no programs for {facts.engine}, only for {', '.join(self.manifest.programs)}"
        if self.plan.traffic.compression not in ("none", *facts.compressions):
            return (
                f"the plan compresses with {self.plan.traffic.compression}, which is missing there: pip install 'lamina[zstd]'"
            )
        return None

    def _whom_it_waits_for(self, now: float) -> str:
        if self._now.cohort:
            left = [user for user in self._now.cohort if user not in self._now.updates and user not in self._now.lost]
            return f"waits for the updates of {self._in_words(left)}: {len(self._now.updates)} updates are here"
        here = self._here(now)
        away = [user for user in self._asked if user not in here]
        missing = f", {self._in_words(away)} asked before and went away" if away else ""
        return f"waits for users: {len(here)} of {self.plan.users.size} are here{missing}"

    def _in_words(self, users: Sequence[str]) -> str:
        names = ", ".join(sorted(self._names(user) for user in users[:_MOST_NAMES]))
        return names + (f" and {len(users) - _MOST_NAMES} more" if len(users) > _MOST_NAMES else "")

    def _here(self, now: float) -> list[str]:
        since = now - self._house.settings.presence_seconds
        return [user for user, at in self._asked.items() if at >= since]

    def _work(self, phase: str, round: int, fused: bool, modalities: tuple[str, ...]) -> SplitWork:
        return SplitWork.model_validate(
            {
                "phase": phase,
                "run": self._state.run,
                "manifest": self._state.manifest,
                "round": round,
                "fused": fused,
                "weights": {part: self._state.weights[part] for part in self.plan.held(modalities)},
                "modalities": modalities,
                "lease_seconds": self.plan.users.lease_seconds,
            }
        )

    def _wait(self, reason: str, detail: str) -> Wait:
        settings = self._house.settings
        return Wait.model_validate(
            {
                "reason": reason,
                "detail": detail,
                "wait_seconds_min": settings.wait_seconds_min,
                "wait_seconds_max": settings.wait_seconds_max,
            }
        )

    def check_count(self, examples: int) -> None:
        """Before a body is read: how large it may be follows from the number of examples."""
        check_count(self.plan, examples)

    def _turn_steps(self) -> TurnSteps:
        if self._steps is None:
            if self.plan.party == "device":
                raise ConfigError("users of this run train by themselves; there are no steps to send")
            self._steps = TurnSteps(self.plan, self._make_high())
            self._steps.load(self._state.weights)
        return self._steps

    def _tensors(self, part: str) -> dict[str, Float32]:
        path = self._house.blobs.path(self._state.weights[part])
        return decode_file(str(path), self.manifest.part(part).tensors)

    def _save(self, **changes: object) -> None:
        self._state = self._state.model_copy(update=changes)
        save_state(self._house, self._state)
