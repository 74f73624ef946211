"""Search several times, each time with what was found before."""

import json
import os

import dspylite as dspy

lm = dspy.LM("openai/scripted", api_base=os.environ["API_BASE"], api_key="none", cache=False)
dspy.configure(lm=lm)

NOTES = {
    "author of The Castle": "The Castle was written by Franz Kafka.",
    "birthplace of Franz Kafka": "Franz Kafka was born in Prague.",
}


class Hop(dspy.Module):
    """Ask for a query, look it up, note what it says."""

    def __init__(self, num_hops=2):
        self.num_hops = num_hops
        self.generate_query = dspy.ChainOfThought("claim, notes: list[str] -> query")
        self.append_notes = dspy.ChainOfThought(
            "claim, notes: list[str], context: list[str] -> new_notes: list[str], done: bool"
        )

    def forward(self, claim):
        """Check a claim."""
        notes: list[str] = []
        queries: list[str] = []
        for _ in range(self.num_hops):
            query = self.generate_query(claim=claim, notes=notes).query
            queries.append(query)
            context = [text for title, text in NOTES.items() if title == query]
            found = self.append_notes(claim=claim, notes=notes, context=context)
            notes.extend(found.new_notes)
            if found.done:
                break
        return dspy.Prediction(notes=notes, queries=queries)


prediction = Hop()(claim="The author of The Castle was born in Prague.")
print(json.dumps({"notes": prediction.notes, "queries": prediction.queries}))
