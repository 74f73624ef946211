"""Take nested records out of a text."""

import json
import os

import pydantic

import dspylite as dspy

lm = dspy.LM("openai/scripted", api_base=os.environ["API_BASE"], api_key="none", cache=False)
dspy.configure(lm=lm)


class Address(pydantic.BaseModel):
    """Where somebody lives."""

    city: str
    country: str | None = None


class Person(pydantic.BaseModel):
    """Somebody of whom the text speaks."""

    name: str
    age: int
    addresses: list[Address] = []


class Extract(dspy.Signature):
    """Extract the people and the headline from a text."""

    text: str = dspy.InputField()
    headline: str = dspy.OutputField()
    people: list[Person] = dspy.OutputField(desc="everybody who is named")
    by_city: dict[str, list[str]] = dspy.OutputField()


prediction = dspy.Predict(Extract)(text="Ada (36) moved from London to Turin. Blaise is 39.")
print(
    json.dumps(
        {
            "headline": prediction.headline,
            "people": [person.model_dump() for person in prediction.people],
            "first_city": prediction.people[0].addresses[0].city,
            "by_city": prediction.by_city,
        }
    )
)
