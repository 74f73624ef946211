"""Outputs of many types, for many inputs at once."""

import json
import os

import dspylite as dspy

lm = dspy.LM("openai/scripted", api_base=os.environ["API_BASE"], api_key="none", cache=False)
dspy.configure(lm=lm)

analyse = dspy.Predict(
    "text -> topics: list[str], counts: dict[str, int], urgent: bool, score: float, note: Optional[str]"
)
examples = [dspy.Example(text=text).with_inputs("text") for text in ("fire in the hall", "lunch")]
results = analyse.batch(examples, num_threads=2)

parallel = dspy.Parallel(num_threads=2)
again = parallel([(analyse, example) for example in examples])
print(
    json.dumps(
        [
            {
                "topics": result.topics,
                "counts": result.counts,
                "urgent": result.urgent,
                "score": result.score,
                "note": result.note,
            }
            for result in [*results, *again]
        ]
    )
)
