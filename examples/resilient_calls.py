"""A program that keeps answering while its first model is down, within a deadline and a budget.

The two model servers are fakes on this machine, so that it runs without a key; replace their
addresses by those of your own.
"""

import dspylite as dspy
from dspylite.testing import FakeServer, Reply

ANSWER = "[[ ## answer ## ]]\n{}\n\n[[ ## completed ## ]]"


def main() -> None:
    with (
        FakeServer(answer=ANSWER.format("said by the first model")) as first,
        FakeServer(answer=ANSWER.format("said by the second model")) as second,
    ):
        spare = dspy.LM("openai/second", api_base=second.base_url, api_key="none", cache=False)
        lm = dspy.LM(
            "openai/first",
            api_base=first.base_url,
            api_key="none",
            cache=False,  # the same questions are asked again during the outage
            num_retries=1,
            max_concurrency=8,
            fallbacks=[spare],
            circuit_breaker=dspy.CircuitBreaker(min_calls=2, cool_down_s=0.2),
        )
        answer = dspy.Predict("question -> answer")
        questions = [{"question": f"Question {number}?"} for number in range(4)]
        with dspy.context(lm=lm, deadline_s=10), dspy.budget(tokens=10_000) as spending:
            show("healthy", answer.batch(questions), lm)
            first.script(*[Reply(status=503)] * 6)
            show("outage", answer.batch(questions, num_threads=1), lm)
            print(f"{spending.calls} calls answered")


def show(when: str, predictions: list[dspy.Prediction], lm: dspy.LM) -> None:
    for prediction in predictions:
        failed = sum(attempt.error is not None for attempt in prediction.get_lm_attempts())
        print(f"{when:>8}: {prediction.answer} (failed attempts: {failed})")
    print(f"{when:>8}: the first model's circuit is {lm.health().state}")


if __name__ == "__main__":
    main()
