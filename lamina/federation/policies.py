"""The policy that a plan asks for. There is one so far."""

from lamina.federation.policy import RoundPolicy
from lamina.federation.synchronous import SyncRounds
from lamina.plans.plan import Plan


def policy_of(plan: Plan) -> RoundPolicy:
    return SyncRounds(plan)
