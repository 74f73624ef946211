"""`Evaluate`: scores, failures, limits and context, on threads and as tasks.

Not here: tables and files (`test_evaluation_output.py`) and the metrics (`test_metrics.py`).
"""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

import dspylite as dspy
from dspylite.programs.evaluation.scoring import metric_name
from dspylite.testing import FakeLM

ROOT = Path(__file__).resolve().parent.parent

Run = Callable[..., Any]


def on_threads(evaluate: Any, *args: Any, **kwargs: Any) -> Any:
    return evaluate(*args, **kwargs)


def as_tasks(evaluate: Any, *args: Any, **kwargs: Any) -> Any:
    return anyio.run(functools.partial(evaluate.acall, *args, **kwargs))


def as_tasks_on_trio(evaluate: Any, *args: Any, **kwargs: Any) -> Any:
    return anyio.run(functools.partial(evaluate.acall, *args, **kwargs), backend="trio")


forms = pytest.mark.parametrize("run", [on_threads, as_tasks, as_tasks_on_trio])


def devset_of(count: int) -> list[dspy.Example]:
    return [dspy.Example(x=x, double=2 * x).with_inputs("x") for x in range(count)]


def double(x: int) -> dspy.Prediction:
    """Double numbers, but refuse 2."""
    if x == 2:
        raise ValueError("not 2")
    return dspy.Prediction(double=2 * x)


def is_double(example: Any, pred: Any, trace: Any = None) -> bool:
    """Compare, but refuse 4; and say 3 is wrong."""
    assert trace is None
    if example.x == 4:
        raise KeyError("not 4")
    return bool(pred.double == example.double) and example.x != 3


async def adouble(x: int) -> dspy.Prediction:
    await anyio.lowlevel.checkpoint()
    return double(x)


async def ais_double(example: Any, pred: Any, trace: Any = None) -> bool:
    await anyio.lowlevel.checkpoint()
    return is_double(example, pred, trace)


class Doubler(dspy.Module):
    """The same as a module."""

    def forward(self, x: int) -> dspy.Prediction:
        return double(x)


class AsyncDoubler(dspy.Module):
    """The same as a module that is only async."""

    async def aforward(self, x: int) -> dspy.Prediction:
        return await adouble(x)


class Judge(dspy.Module):
    """The metric as a module."""

    def forward(self, example: Any, pred: Any, trace: Any = None) -> dspy.Prediction:
        return dspy.Prediction(score=is_double(example, pred, trace), feedback="...")


# --- Scores and failures --------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("program", [double, adouble, Doubler(), AsyncDoubler()])
@pytest.mark.parametrize("metric", [is_double, ais_double, Judge()])
def test_every_form_of_program_and_metric_is_scored(run: Run, program: Any, metric: Any) -> None:
    """Sync and async, functions and modules, in any combination, on threads and on loops."""
    devset = devset_of(6)
    result = run(dspy.Evaluate(devset=devset, metric=metric, num_threads=3), program)
    assert result.score == 50.0  # 0, 1, 5 of six
    assert [example for example, _, _ in result.results] == devset
    assert [float(score) for _, _, score in result.results] == [1, 1, 0, 0, 0, 1]
    assert [made.toDict() for _, made, _ in result.results] == [
        {"double": 0}, {"double": 2}, {}, {"double": 6}, {}, {"double": 10},
    ]  # fmt: skip


@forms
def test_failures_are_kept_and_say_whose_they_are(run: Run, caplog: Any) -> None:
    """A program to be mended, or a metric: whoever reads a score of 0 must find out which."""
    evaluate = dspy.Evaluate(devset=devset_of(6), metric=is_double, failure_score=-1)
    with caplog.at_level(logging.WARNING):
        result = run(evaluate, double)
    assert list(result.errors) == [2, 4]
    assert type(result.errors[2]) is ValueError
    failed = result.errors[4]
    assert isinstance(failed, dspy.MetricError)
    assert isinstance(failed.__cause__, KeyError)
    assert "`is_double` failed: KeyError: 'not 4'" in str(failed)
    assert failed.prediction.double == 8  # it was paid for
    assert [score for _, _, score in result.results] == [True, True, -1, False, -1, True]
    assert result.score == round(100 * (3 - 2) / 6, 2)
    assert "2 of 6 items failed and count as -1 (1 ValueError, 1 MetricError)" in caplog.text
    assert all(type(made) is dspy.Prediction for _, made, _ in result.results)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([True, False, False], 33.33),
        ([1, 0.5, 0], 50.0),
        ([0.3333, 0.3333, 0.3333], 33.33),
        ([2, 3, -1], 133.33),
        ([Fraction(1, 3), np.float32(0.25), np.bool_(True)], 52.78),
        ([dspy.Prediction(score=0.5), dspy.Prediction(score=True), 0], 50.0),
        ([0.005, 0.0, 0.0], 0.17),
    ],
)
def test_the_score_is_the_mean_in_percent(scores: list[Any], expected: float) -> None:
    """As DSPy computes it, whatever kind of number a metric gives; the scores stay as given."""
    metric = lambda example, pred: scores[example.x]  # noqa: E731
    result = dspy.Evaluate(devset=devset_of(3), metric=metric)(lambda x: x)
    assert (result.score, result.errors) == (expected, {})
    assert all(score is given for (*_, score), given in zip(result.results, scores, strict=True))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "returned None (NoneType)"),
        ("0.5", "returned '0.5' (str)"),
        ([1], "returned [1] (list)"),
        (dspy.Prediction(grade=1), "has grade"),
        (float("nan"), "returned nan"),
        (float("inf"), "returned inf"),
        (10**400, "OverflowError"),
    ],
)
def test_what_is_no_score_is_an_error_of_that_item_alone(given: Any, words: str) -> None:
    """In DSPy a metric that forgets one `return` loses the whole run at its end."""
    metric = lambda example, pred: given if example.x == 1 else 1  # noqa: E731
    result = dspy.Evaluate(devset=devset_of(4), metric=metric)(lambda x: x)
    assert result.score == 75.0
    assert isinstance(result.errors[1], dspy.MetricError)
    assert words in str(result.errors[1])


def test_equal_examples_are_items_of_their_own() -> None:
    example = dspy.Example(x=1).with_inputs("x")
    places = iter(range(3))
    result = dspy.Evaluate(devset=[example] * 3, metric=lambda e, p: p == 1, num_threads=1)(
        lambda x: next(places)
    )
    assert [made for _, made, _ in result.results] == [0, 1, 2]
    assert result.score == 33.33


def test_results_stand_in_the_order_of_the_devset_whoever_ends_first() -> None:
    """Item 0 ends last: it waits until all the others are done."""
    others = threading.Semaphore(0)

    def work(x: int) -> int:
        if x == 0:
            assert all(others.acquire(timeout=5) for _ in range(3))
        else:
            others.release()
        return x

    evaluate = dspy.Evaluate(devset=devset_of(4), metric=lambda e, p: e.x == p, num_threads=4)
    result = evaluate(work)
    assert [made for _, made, _ in result.results] == [0, 1, 2, 3]
    assert result.score == 100.0


def test_metrics_and_programs_run_side_by_side() -> None:
    """A metric waits for another item's program, and that for the metric: neither holds a lock."""
    both = threading.Barrier(2)

    def program(x: int) -> int:
        if x == 1:
            both.wait(5)
        return x

    def metric(example: Any, pred: int) -> bool:
        if pred == 0:
            both.wait(5)
        return True

    assert dspy.Evaluate(devset=devset_of(2), metric=metric, num_threads=2)(program).score == 100.0


def test_one_evaluate_serves_several_threads_at_once() -> None:
    """No state of a run lives on the object: eight programs are measured by one at a time."""
    everybody = threading.Barrier(8)

    def metric(example: Any, pred: int) -> bool:
        if example.x == 0:
            everybody.wait(10)
        return example.x < pred

    evaluate = dspy.Evaluate(devset=devset_of(10), metric=metric, num_threads=1)
    scores: dict[int, float] = {}

    def measure(limit: int) -> None:
        scores[limit] = evaluate(lambda x: limit).score

    threads = [threading.Thread(target=measure, args=(limit,)) for limit in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert scores == {limit: 10.0 * limit for limit in range(8)}


def test_a_long_devset_costs_no_more_per_item() -> None:
    """2,000 items call program and metric 2,000 times, and read their inputs once each."""
    calls: list[str] = []

    class Counted(dspy.Example):
        def inputs(self) -> Any:
            calls.append("inputs")
            return super().inputs()

    devset = [Counted(x=x).with_inputs("x") for x in range(2000)]

    def metric(example: Any, pred: int) -> bool:
        calls.append("metric")
        return example.x == pred

    def program(x: int) -> int:
        calls.append("program")
        return x

    result = dspy.Evaluate(devset=devset, metric=metric, num_threads=4)(program)
    assert result.score == 100.0
    assert {name: calls.count(name) for name in calls} == dict.fromkeys(
        ("inputs", "program", "metric"), 2000
    )


# --- Limits and interruption ----------------------------------------------------------------------


@forms
@pytest.mark.parametrize("by_settings", [False, True])
def test_reaching_max_errors_raises_and_keeps_what_finished(run: Run, by_settings: bool) -> None:
    """DSPy raises a bare `Exception` there and throws the finished items away."""
    devset = devset_of(6)
    with dspy.context(max_errors=2):
        evaluate = dspy.Evaluate(
            devset=devset, metric=is_double, num_threads=1, max_errors=None if by_settings else 2
        )
        with pytest.raises(dspy.BatchError, match="the limit of 2 errors") as raised:
            run(evaluate, double)
    assert list(raised.value.errors) == [2, 4]
    assert isinstance(raised.value.errors[4], dspy.MetricError)
    assert raised.value.results[1] == (devset[1], dspy.Prediction(double=2), True)
    assert list(raised.value.results) == [0, 1, 3]
    assert raised.value.untried == 1


@forms
def test_the_last_item_may_be_the_failure_that_is_too_much(run: Run) -> None:
    """Nothing is untried then, but as in DSPy it is no result."""
    with pytest.raises(dspy.BatchError, match="the limit of 2 errors") as raised:
        run(dspy.Evaluate(devset=devset_of(5), metric=is_double, max_errors=2), double)
    assert (list(raised.value.results), raised.value.untried) == ([0, 1, 3], 0)


@forms
def test_fewer_failures_than_max_errors_are_a_result(run: Run) -> None:
    result = run(dspy.Evaluate(devset=devset_of(6), metric=is_double, max_errors=3), double)
    assert result.score == 50.0


def test_system_exit_is_the_items_own_error() -> None:
    def program(x: int) -> int:
        if x == 0:
            sys.exit(3)
        return x

    def metric(example: Any, pred: int) -> bool:
        if pred == 1:
            sys.exit(4)
        return True

    result = dspy.Evaluate(devset=devset_of(3), metric=metric)(program)
    assert isinstance(result.errors[0], SystemExit)
    assert isinstance(result.errors[1], dspy.MetricError)
    assert result.score == 33.33


INTERRUPTED = """
import os, signal, threading
import dspylite as dspy

done = threading.Semaphore(0)

def program(x):
    if x < 3:
        return x
    for _ in range(3):
        assert done.acquire(timeout=10)
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(10)

def metric(example, pred):
    done.release()
    return True

devset = [dspy.Example(x=x).with_inputs("x") for x in range(4)]
try:
    dspy.Evaluate(devset=devset, metric=metric, num_threads=4)(program)
except dspy.BatchInterrupted as error:
    kept = {i: (e.x, made, score) for i, (e, made, score) in error.results.items()}
    print(kept if error.untried == 0 else error)
    os._exit(0)
"""


def test_ctrl_c_keeps_what_was_scored() -> None:
    """An hour of evaluation is not lost to an impatient user."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert eval(done.stdout) == {x: (x, x, True) for x in range(3)}, done.stderr


# --- Context, usage, callbacks --------------------------------------------------------------------


@forms
def test_the_settings_of_the_caller_reach_program_and_metric(run: Run) -> None:
    """Two evaluations with two judges in one process must not meet."""
    lm = FakeLM(default={"answer": "yes"})
    seen: list[Any] = []

    def program(x: int) -> str:
        seen.append(dspy.settings.lm)
        return "yes"

    def metric(example: Any, pred: str) -> bool:
        seen.append(dspy.settings.lm)
        return bool(dspy.Predict("question -> answer")(question="?").answer == pred)

    with dspy.context(lm=lm):
        assert run(dspy.Evaluate(devset=devset_of(3), metric=metric), program).score == 100.0
    assert seen == [lm] * 6
    assert len(lm.requests) == 3


@forms
def test_usage_of_program_and_metric_is_counted_together_and_by_prediction(run: Run) -> None:
    """Evaluations cost money; a failed item's tokens were paid for too."""

    class Program(dspy.Module):
        def __init__(self) -> None:
            self.predict = dspy.Predict("question -> response")

        def forward(self, x: int) -> Any:
            made = self.predict(question=str(x))
            if x == 1:
                raise ValueError("after the call")
            return made

    def answers(request: Any) -> dict[str, Any]:
        return {"response": "r", "reasoning": "-", "recall": 1.0, "precision": 1.0}

    lm = FakeLM(answers)
    devset = [dspy.Example(x=x, question=str(x), response="r").with_inputs("x") for x in range(3)]
    with dspy.context(lm=lm, track_usage=True), dspy.track_usage() as tracker:
        result = run(dspy.Evaluate(devset=devset, metric=dspy.SemanticF1()), Program())
    assert (result.score, list(result.errors)) == (66.67, [1])
    assert tracker.total.calls == len(lm.requests) == 5
    assert result.get_lm_usage() == tracker.get_total_tokens()
    assert all(
        made.get_lm_usage() for index, (_, made, _) in enumerate(result.results) if index != 1
    )


class Recorder(dspy.BaseCallback):
    """Notes evaluations and the calls inside them."""

    def __init__(self) -> None:
        self.started: list[tuple[Any, dict[str, Any]]] = []
        self.ended: list[tuple[Any, Any]] = []
        self.parents: list[Any] = []
        self.ids: list[str] = []

    def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self.ids.append(call_id)
        self.started.append((instance, inputs))

    def on_evaluate_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        assert call_id == self.ids[-1]
        self.ended.append((outputs, exception))

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        call = dspy.current_call()
        assert call
        self.parents.append((call.parent_id, call.item_index))


@forms
def test_callbacks_hear_of_the_evaluation_and_of_the_calls_in_it(run: Run) -> None:
    """Loggers of experiments read the metadata, the inputs by DSPy's names, and the result."""
    heard = Recorder()
    evaluate = dspy.Evaluate(devset=devset_of(2), metric=is_double)
    program = Doubler()
    with dspy.context(callbacks=[heard]):
        result = run(evaluate, program, callback_metadata={"step": 7}, num_threads=2)
    ((instance, inputs),) = heard.started
    assert instance is evaluate
    assert inputs == {
        "program": program, "metric": None, "devset": None, "num_threads": 2,
        "display_progress": None, "display_table": None, "callback_metadata": {"step": 7},
        "save_as_csv": None, "save_as_json": None,
    }  # fmt: skip
    assert heard.ended == [(result, None)]
    assert sorted(heard.parents) == [(heard.ids[0], 0), (heard.ids[0], 1)]


def test_callbacks_are_told_of_an_evaluation_that_could_not_be() -> None:
    heard = Recorder()
    with dspy.context(callbacks=[heard]), pytest.raises(dspy.EvaluationError) as raised:
        dspy.Evaluate(devset=[], metric=is_double)(double)
    assert heard.ended == [(None, raised.value)]


def test_progress_is_told_to_a_function(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int | None, int]] = []
    evaluate = dspy.Evaluate(
        devset=devset_of(3),
        metric=is_double,
        num_threads=1,
        display_progress=lambda *counts: told.append(counts),
    )
    evaluate(double)
    assert told == [(1, 3, 0), (2, 3, 0), (3, 3, 1)]
    evaluate(double, display_progress=True)  # no terminal: no bar
    assert capsys.readouterr() == ("", "")


def test_failures_are_logged_with_their_traceback_where_asked(caplog: Any) -> None:
    dspy.Evaluate(devset=devset_of(3), metric=is_double, provide_traceback=True)(double)
    assert "Traceback" in caplog.text
    assert "not 2" in caplog.text


# --- What is asked --------------------------------------------------------------------------------


@forms
def test_a_call_may_override_what_the_object_was_given(run: Run) -> None:
    evaluate = dspy.Evaluate(devset=devset_of(3))
    other = devset_of(2)
    result = run(evaluate, double, metric=lambda e, p: 1, devset=other)
    assert (result.score, len(result.results)) == (100.0, 2)
    assert on_threads(evaluate, double, lambda e, p: 0, other, 1).score == 0.0  # DSPy's order


def test_a_generator_of_examples_serves_every_call() -> None:
    """DSPy scores the first program and finds nothing for the second."""

    def examples() -> Iterator[dspy.Example]:
        yield from devset_of(2)

    evaluate = dspy.Evaluate(devset=examples(), metric=lambda e, p: 1)
    assert [evaluate(double).score, evaluate(double).score] == [100.0, 100.0]
    assert len(evaluate(double, devset=examples()).results) == 2


def refusing(x: int) -> None:
    pytest.fail("nothing may be called")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devset": []}, "`devset` is empty"),
        ({"devset": iter([])}, "`devset` is empty"),
        ({"metric": None}, "no metric"),
        ({"metric": "answer_exact_match"}, "must be a function or module"),
        ({"metric": dspy.SemanticF1}, r"write `SemanticF1\(\)`"),
        ({"devset": None}, "list of examples, not None"),
        ({"devset": "abc"}, "list of examples, not 'abc'"),
        ({"devset": dspy.Example(x=1)}, "list of examples, not Example"),
        ({"display_table": -1}, "bool or a number of rows"),
        ({"display_table": "yes"}, "bool or a number of rows"),
        ({"failure_score": None}, "`failure_score` must be a number"),
        ({"failure_score": float("nan")}, "`failure_score` must be a number"),
        ({"return_outputs": True}, "no option `return_outputs`"),
        ({"num_thread": 3}, "Did you mean `num_threads`"),
    ],
)
def test_a_mistake_is_named_before_anything_is_called(options: Any, words: str) -> None:
    """An hour later it would cost an hour."""
    with pytest.raises(dspy.EvaluationError, match=words):
        dspy.Evaluate(**{"devset": devset_of(2), "metric": is_double, **options})(refusing)


@pytest.mark.parametrize(
    ("third", "words"),
    [
        ({"x": 1}, r"Item 2 of `devset` must be an example, not \{'x': 1\}; write `Example"),
        (dspy.Example(x=1), r"Item 2 of `devset`: .*call `example.with_inputs"),
        (None, "Item 2 of `devset` must be an example, not None"),
    ],
)
def test_an_example_that_cannot_be_used_is_named_by_its_place(third: Any, words: str) -> None:
    evaluate = dspy.Evaluate(devset=[*devset_of(2), third], metric=is_double)
    with pytest.raises(dspy.InputFieldError, match=words):
        evaluate(refusing)


@pytest.mark.parametrize("options", [{"num_threads": 0}, {"max_errors": 0}, {"num_threads": "4"}])
def test_an_impossible_number_is_named_when_the_object_is_made(options: Any) -> None:
    with pytest.raises(dspy.SettingsError, match=next(iter(options))):
        dspy.Evaluate(devset=devset_of(2), metric=is_double, **options)


@pytest.mark.parametrize(
    ("program", "words"), [(Doubler, r"write `Doubler\(...\)`"), ("x", "not 'x'"), (None, "None")]
)
def test_a_program_that_cannot_be_called_is_named(program: Any, words: str) -> None:
    with pytest.raises(dspy.EvaluationError, match=words):
        dspy.Evaluate(devset=devset_of(2), metric=is_double)(program)


@pytest.mark.anyio
async def test_the_sync_form_in_an_event_loop_names_the_async_one() -> None:
    with pytest.raises(dspy.FlowError, match="await `acall`"):
        dspy.Evaluate(devset=devset_of(2), metric=is_double)(double)


@pytest.mark.anyio
async def test_cancelling_ends_it_and_keeps_what_finished() -> None:
    waiting = anyio.Event()

    async def program(x: int) -> int:
        if x == 1:
            waiting.set()
            await anyio.sleep_forever()
        return x

    kept: dict[int, Any] = {}

    async def measure() -> None:
        try:
            await dspy.Evaluate(devset=devset_of(2), metric=lambda e, p: 1, num_threads=1).acall(
                program
            )
        except BaseException as error:
            kept.update(dspy.finished_results(error))
            raise

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(measure)
            await waiting.wait()
            group.cancel_scope.cancel()
    assert {index: score for index, (_, _, score) in kept.items()} == {0: 1}


# --- The result -----------------------------------------------------------------------------------


def test_a_result_is_a_prediction_that_shows_its_size_only() -> None:
    """A notebook that shows it must not print a thousand examples."""
    whole = dspy.Evaluate(devset=devset_of(2), metric=is_double)(double)
    assert isinstance(whole, dspy.Prediction)
    assert repr(whole) == "EvaluationResult(score=100.0, results=<list of 2 results>)"
    assert (float(whole), list(whole.keys()), whole.errors) == (100.0, ["score", "results"], {})
    broken = dspy.Evaluate(devset=devset_of(3), metric=is_double)(double)
    assert repr(broken).endswith("results=<list of 3 results>, errors=<of 1 item>)")
    assert whole > broken


def as_pickled(result: Any) -> Any:
    return pickle.loads(pickle.dumps(result))


@pytest.mark.parametrize("carry", [as_pickled, copy.copy, copy.deepcopy])
def test_a_result_is_carried_whole(carry: Callable[[Any], Any]) -> None:
    result = dspy.Evaluate(devset=devset_of(6), metric=is_double)(double)
    twin = carry(result)
    assert twin == result
    assert {i: str(e) for i, e in twin.errors.items()} == {
        i: str(e) for i, e in result.errors.items()
    }
    assert twin.errors[4].prediction == result.errors[4].prediction


def test_an_evaluate_is_carried_whole() -> None:
    evaluate = dspy.Evaluate(devset=devset_of(6), metric=is_double)
    assert as_pickled(evaluate)(double).score == 50.0


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (is_double, "is_double"),
        (functools.partial(is_double, trace=None), "is_double"),
        (Judge(), "Judge"),
        (lambda e, p: 1, "<lambda>"),
        (Recorder().on_module_start, "on_module_start"),
    ],
)
def test_a_metric_is_named_by_its_function_or_class(metric: Any, name: str) -> None:
    assert metric_name(metric) == name


def test_the_names_are_found_on_dspys_paths() -> None:
    """Programs import from these paths, or walk there from the package."""
    from dspylite.evaluate import EM, Evaluate, SemanticF1, normalize_text
    from dspylite.evaluate.auto_evaluation import CompleteAndGrounded
    from dspylite.evaluate.evaluate import EvaluationResult
    from dspylite.evaluate.metrics import answer_exact_match

    assert (Evaluate, SemanticF1) == (dspy.Evaluate, dspy.evaluate.SemanticF1)
    assert (normalize_text, EM("a", ["the"])) == (dspy.normalize_text, True)
    assert (CompleteAndGrounded, EvaluationResult) == (
        dspy.CompleteAndGrounded,
        dspy.EvaluationResult,
    )
    assert dspy.evaluate.metrics.answer_exact_match is answer_exact_match
