"""Work that is paid once: equal calls share an answer, which outlives the process; all is counted.

The model server is a fake on this machine, so that it runs without a key, and the cache is in a
folder of its own. Replace the server's address by yours, and leave `configure_cache` out.
"""

import tempfile

import dspylite as dspy
from dspylite.testing import FakeServer

ANSWER = "[[ ## answer ## ]]\nThe Nile\n\n[[ ## completed ## ]]"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, FakeServer(answer=ANSWER) as server:
        dspy.configure_cache(disk_cache_dir=folder)
        lm = dspy.LM("openai/m", api_base=server.base_url, api_key="none", price=(0.15, 0.6))
        answer = dspy.Predict("question -> answer")
        with dspy.context(lm=lm):
            questions = [{"question": "Longest river of Africa?"}] * 20
            with dspy.track_usage() as tracker:
                answer.batch(questions, num_threads=20)
            show("20 at once", server, tracker)

            dspy.cache.close()  # as at the end of a process
            dspy.cache.reset_memory_cache()
            with dspy.track_usage() as tracker:
                answer(**questions[0])
            show("next time", server, tracker)

            with dspy.track_usage() as tracker:
                answer(**questions[0], config={"rollout_id": 1})
            show("once more", server, tracker)
        dspy.cache.close()


def show(when: str, server: FakeServer, tracker: dspy.UsageTracker) -> None:
    counts = tracker.counts["openai/m"]
    print(
        f"{when}: {counts.answered} asked, {counts.cached} not, "
        f"{tracker.total.total_tokens} tokens, {len(server.requests)} requests in all"
    )


if __name__ == "__main__":
    main()
