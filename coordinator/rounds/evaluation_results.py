"""Evaluations of the weights that a round made, by the devices that were asked; each counts once."""

import logging

from coordinator.house import House
from coordinator.rounds.devices import get_device
from coordinator.rounds.rounds import advance, get_round, get_run
from coordinator.rounds.slots import Address, require_open
from coordinator.store.tables import EvaluationRow
from coordinator.view.last_acts import note_act
from lamina.errors import RoundClosedError, UpdateRejectedError
from lamina.federation.losses import MAX_EXAMPLES
from lamina.wire import Accepted, Evaluation

log = logging.getLogger("lamina.coordinator")


def accept_evaluation(house: House, address: Address, evaluation: Evaluation) -> Accepted:
    """Counts an evaluation. Raises UnknownNameError, UpdateRejectedError, RoundClosedError."""
    if evaluation.num_examples == 0:
        raise UpdateRejectedError("num_examples is 0: nothing was evaluated; a device without test data need not answer")
    if evaluation.num_examples > MAX_EXAMPLES:
        raise UpdateRejectedError(f"{evaluation.num_examples} examples cannot be: at most {MAX_EXAMPLES} are counted")
    if evaluation.correct > evaluation.num_examples:
        raise UpdateRejectedError(f"{evaluation.correct} correct of {evaluation.num_examples} examples cannot be")
    text = evaluation.model_dump_json()
    with house.database.write() as session:
        run = get_run(session, address.run)
        row = get_round(house, session, run, address.stage, address.round)
        asked = session.get(EvaluationRow, (row.id, address.device_id))
        if asked is None and run.undone_round_id:
            raise RoundClosedError(f"{address.text} was taken back once, and does not await this; check in for new work")
        if asked is None:
            raise UpdateRejectedError(f"this device was not asked to evaluate {address.text}; check in for work")
        if asked.evaluation == text:
            return _accepted(address)
        if asked.evaluation is not None:
            raise UpdateRejectedError(f"{address.text} has counted another evaluation of this device; check in for new work")
        now = house.clock()
        advance(house, session, run, now)
        require_open(run, now)
        if row.phase != "evaluating":
            raise RoundClosedError(f"{address.text} takes no more evaluations; check in for new work")
        asked.evaluation = text
        device = get_device(session, address.device_id)
        note_act(device, f"evaluated {address.text}", house.clock())
        log.info("%s: evaluation of %s accepted", address.text, device.name)
        session.flush()
        advance(house, session, run, house.clock())
    return _accepted(address)


def _accepted(address: Address) -> Accepted:
    return Accepted(run=address.run, stage=address.stage, round=address.round)
