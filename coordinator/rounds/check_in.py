"""A device asks for work. The same device asking again gets the same work, and its lease begins anew."""

import logging

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator.aggregation.calibration import take_calibration, why_not_calibrate
from coordinator.house import House
from coordinator.rounds.assignments import make_assignment
from coordinator.rounds.cards import is_known, why_not_this_data
from coordinator.rounds.devices import get_device, remember
from coordinator.rounds.rounds import advance, current_round, fail_run, get_run, open_runs, paused_runs, places
from coordinator.rounds.timeline import lease_of, tenure_of
from coordinator.rounds.waiting import describe
from coordinator.store.tables import (
    CalibrationRow,
    DeviceRow,
    EvaluationRow,
    PlaceRow,
    RecallRow,
    RoundRow,
    RunRow,
    UpdateRow,
    WeightRow,
)
from coordinator.view.last_acts import note_act
from lamina.bundles.manifest import Manifest
from lamina.errors import TensorFileError, UnknownNameError
from lamina.federation.modalities import largest_set, to_text
from lamina.federation.policies import policy_of
from lamina.federation.terms import agree
from lamina.wire import Assignment, CardWanted, CheckIn, Refused, Wait

log = logging.getLogger("lamina.coordinator")


def check_in(house: House, device_id: str, facts: CheckIn) -> Assignment | Wait | Refused | CardWanted:
    """Work in the first open run that fits the device, or what it waits for, or why there is nothing for it.

    Raises UnknownNameError if `facts.run` names no run, and DiskFullError.
    """
    answer = find_work(house, device_id, facts)
    if not isinstance(answer, Assignment):
        return answer
    try:
        for digest in answer.weights.values():
            house.blobs.path(digest)
        # Outside of the transaction: encoding the weights of a new round takes a while, and others want to write meanwhile.
        return house.variants.fit(answer, house.manifest(answer.manifest))
    except (TensorFileError, UnknownNameError) as error:
        # No device can work from such weights, and each that was told so would end.
        if is_still_offered(house, answer):
            fail_run(house, answer.run, f"its weights cannot be given out in {answer.download_encoding}: {error.message}")
        return check_in(house, device_id, facts)


def is_still_offered(house: House, assignment: Assignment) -> bool:
    """Whether these are still the weights of the run: those of a round that has closed meanwhile may be gone."""
    with house.database.read() as session:
        run = get_run(session, assignment.run)
        weights = session.execute(select(WeightRow.segment, WeightRow.blob).where(WeightRow.run_number == run.number)).all()
    newest = {segment: blob for segment, blob in weights}
    return all(newest[segment] == blob for segment, blob in assignment.weights.items())


def find_work(house: House, device_id: str, facts: CheckIn) -> Assignment | Wait | Refused | CardWanted:
    """The answer, with the float32 blobs of the weights."""
    now = house.clock()
    with house.database.write() as session:
        house.clock.forget_presence(session)
        house.clock.store(session, now)
        device = get_device(session, device_id)
        asked_for = get_run(session, facts.run) if facts.run else None
        candidates = [asked_for] if asked_for else _candidates(session, device)
        if facts.role == "calibrator" and not device.is_trusted:
            return Refused(
                detail="a calibrator changes all layers by itself, so it enrols with the admin token: give --token-file "
                f"{house.settings.admin_token.name} and a new --state folder"
            )
        if facts.data_card and not is_known(session, device_id, facts.data_card):
            return CardWanted()
        misfits: list[str] = []
        for run in candidates:
            if run.has_ended:
                continue
            manifest = house.manifest(run.manifest)
            misfit = why_not(manifest, facts)
            if not misfit and facts.data_card:
                misfit = why_not_this_data(house, session, run, manifest.plan, device, facts.data_card, now)
            if misfit:
                misfits.append(f"{run.id} {misfit}")
                continue
            if (recall := session.get(RecallRow, (run.number, device.id))) is not None:
                session.delete(recall)
                return _wait(house, "round", f"{run.id} was taken back to an earlier round; ask again")
            remember(house, device, run, facts, now)
            session.flush()  # so that the count of devices that are here has this one
            advance(house, session, run, now)
            if not run.has_ended:
                return offer(house, session, run, device, facts, now)
        remember(house, device, None, facts, now)
        if misfits:
            return Refused(detail="; ".join(misfits))
        detail = describe(house, session, asked_for, now) if asked_for else "no run is open; publish one with `lamina publish`"
        return _wait(house, "no_run", detail)


def why_not(manifest: Manifest, facts: CheckIn) -> str | None:
    """Why a device cannot take part in a run, with what would help; None if it can."""
    if facts.role == "calibrator":
        return why_not_calibrate(manifest, facts.engine, facts.modalities)
    if facts.engine not in manifest.engines:
        return f"has programs for {', '.join(manifest.engines)}, not for {facts.engine}: export the bundle with that engine"
    if largest_set(manifest.plan, facts.modalities) is None:
        needed = manifest.plan.model.modalities
        lacking = [modality for modality in needed if modality not in facts.modalities]
        sets = "".join(f", or with {' and '.join(subset)} alone" for subset in manifest.plan.device_modalities)
        return f"trains {', '.join(needed)}{sets}, and this device has no data for {', '.join(lacking)}"
    return None


def offer(house: House, session: Session, run: RunRow, device: DeviceRow, facts: CheckIn, now: float) -> Assignment | Wait:
    """The device's work in the round where the run stands; a calibrator's is the calibration and nothing else."""
    row = current_round(session, run)
    if run.state == "paused" and (row is None or not _has_work(session, row, device.id)):
        return _wait(house, "round", describe(house, session, run, now))
    if row is None:
        return _wait(house, "cohort", describe(house, session, run, now))
    plan = house.manifest(run.manifest).plan
    terms = agree(plan.training, facts)
    lease_ends = now + plan.cohort.lease_seconds
    modalities = largest_set(plan, facts.modalities) or ()
    if facts.role == "calibrator":
        if row.phase == "calibrating" and take_calibration(session, row, device.id, terms, now, lease_ends):
            return make_assignment(house, session, run, row, device, "calibrate", terms)
    elif row.phase == "training" and (place := _take_place(house, session, run, row, device, now)):
        if not place.has_asked:
            note_act(device, f"took its place in {row.text} of {run.id}", now)
        place.lease_ends_unix_seconds = lease_of(place, plan.cohort, now)
        house.clock.store(session, now, is_urgent=True)
        place.download_encoding, place.upload_encoding = terms.download_encoding, terms.upload_encoding
        place.compression, place.modalities, place.has_asked = terms.compression, to_text(modalities), True
        return make_assignment(house, session, run, row, device, "train", terms, modalities)
    elif row.phase == "evaluating":
        asked = session.get(EvaluationRow, (row.id, device.id))
        if asked is not None and asked.evaluation is None:
            asked.lease_ends_unix_seconds = lease_ends
            asked.download_encoding, asked.modalities = terms.download_encoding, to_text(modalities)
            return make_assignment(house, session, run, row, device, "evaluate", terms, modalities)
    return _wait(house, "round", describe(house, session, run, now))


def _candidates(session: Session, device: DeviceRow) -> list[RunRow]:
    """The runs that a device may work for: first a paused one that has its work, then those that go on, then paused ones."""
    paused = paused_runs(session)
    rows = {run.number: current_round(session, run) for run in paused}
    mine = [run for run in paused if (row := rows[run.number]) is not None and _has_work(session, row, device.id)]
    return [*mine, *open_runs(session), *(run for run in paused if run not in mine)]


def _has_work(session: Session, row: RoundRow, device_id: str) -> bool:
    """Whether the device was given work in this round, and has not sent what came of it: a pause lets it finish that."""
    place, key = session.get(PlaceRow, (row.id, device_id)), (row.id, device_id)
    if row.phase == "training":
        return place is not None and not place.is_lost and place.has_asked and session.get(UpdateRow, key) is None
    if row.phase == "calibrating":
        calibration = session.get(CalibrationRow, row.id)
        return calibration is not None and calibration.device_id == device_id
    return session.get(EvaluationRow, key) is not None


def _take_place(house: House, session: Session, run: RunRow, row: RoundRow, device: DeviceRow, now: float) -> PlaceRow | None:
    """The device's place in the round, kept, new or taken over; None if it has sent its update or all are held.

    A device that had a place for as long as it may takes none from another: two that never send would take it in turns.
    """
    if session.get(UpdateRow, (row.id, device.id)) is not None:
        return None
    plan = house.manifest(run.manifest).plan
    cohort = plan.cohort
    held = places(session, row)
    mine = session.get(PlaceRow, (row.id, device.id))
    if mine is None or mine.is_lost:
        if not policy_of(plan).may_join(len(held)):
            silent = [place for place in held if _is_silent(session, place, now)]
            if not silent or (mine is not None and tenure_of(mine, cohort) <= now):
                return None
            silent[0].is_lost = True
            loser = session.get_one(DeviceRow, silent[0].device_id).name
            log.warning("%s: %s fell silent, %s has its place in %s", run.id, loser, device.name, row.text)
        if mine is None:
            mine = PlaceRow(round_id=row.id, device_id=device.id, taken_unix_seconds=now)
            session.add(mine)
        mine.is_lost, mine.has_asked = False, False
    return mine


def _is_silent(session: Session, place: PlaceRow, now: float) -> bool:
    """Its lease is over, and no update has come."""
    has_sent = session.get(UpdateRow, (place.round_id, place.device_id)) is not None
    return place.lease_ends_unix_seconds <= now and not has_sent


def _wait(house: House, reason: str, detail: str) -> Wait:
    return Wait.model_validate(
        {
            "reason": reason,
            "detail": detail,
            "wait_seconds_min": house.settings.wait_seconds_min,
            "wait_seconds_max": house.settings.wait_seconds_max,
        }
    )
