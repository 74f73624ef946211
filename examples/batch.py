"""A batch with a bad item in it: good results are kept, the failure is named, usage is counted.

Offline by default; DSPYLITE_MODEL names another model (with DSPYLITE_API_BASE and its key).
"""

import os
import sys
from typing import Literal

import dspylite as dspy


class Triage(dspy.Signature):
    """Sort a support ticket into the area that handles it."""

    ticket: str = dspy.InputField()
    area: Literal["billing", "login", "shipping"] = dspy.OutputField()


class Sort(dspy.Module):
    """Refuses empty tickets, sorts the others."""

    def __init__(self) -> None:
        self.triage = dspy.Predict(Triage)

    def forward(self, ticket: str) -> str:
        if not ticket.strip():
            raise ValueError("an empty ticket")
        return self.triage(ticket=ticket).area


TICKETS = [
    "My login does not work since the update.",
    "   ",
    "The billing address on my invoice is wrong.",
    "When does shipping of my order start?",
]


def main() -> list[str]:
    lm = dspy.LM(
        os.environ.get("DSPYLITE_MODEL", "offline/extractive"),
        api_base=os.environ.get("DSPYLITE_API_BASE"),
    )
    lines = []
    with dspy.context(lm=lm), dspy.track_usage() as tracker:
        outcomes = Sort().batch(
            [{"ticket": ticket} for ticket in TICKETS],
            num_threads=4,
            on_error="return",
            progress=lambda done, total, errors: print(
                f"{done} of {total}, {errors} failed", file=sys.stderr
            ),
        )
    for ticket, outcome in zip(TICKETS, outcomes, strict=True):
        what = outcome.value if outcome.ok else f"failed: {outcome.error}"
        lines.append(f"{ticket.strip() or '(empty)'} -> {what}")
    lines.append(f"{tracker.total.calls} calls, {tracker.total.total_tokens} tokens")
    return lines


if __name__ == "__main__":
    print("\n".join(main()))
