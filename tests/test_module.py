"""Modules: the forms a program may have, its parts, its copies.

Not here: `Predict` itself (`test_predict.py`), and how batches run (`Parallel`'s tests).
"""

import copy
import functools
import pickle
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cloudpickle
import pytest

import dspylite
from dspylite import (
    LM,
    BatchError,
    ChainOfThought,
    Example,
    InputField,
    LMConfigurationError,
    Module,
    ModuleError,
    OutputField,
    Predict,
    Signature,
    SignatureError,
    make_signature,
)
from dspylite.schema.signature import SignatureMeta
from dspylite.testing import FakeLM


class QA(Signature):
    """Answer the question."""

    question: str = InputField()
    k: int = InputField(default=3)
    answer: str = OutputField()


class Program(Module):
    """One predictor, and state of its own."""

    def __init__(self, corpus: list[str]) -> None:
        super().__init__()
        self.corpus = corpus
        self.predict = Predict(QA)

    def forward(self, question: str) -> Any:
        return self.predict(question=question, k=len(self.corpus))


# --- forward and aforward ------------------------------------------------------------------------


class ForwardOnly(Module):
    def forward(self, x: int, *, fn: str = "") -> tuple[str, int, int]:
        return "forward", x, threading.get_ident()


class AforwardOnly(Module):
    async def aforward(self, x: int, *, fn: str = "") -> tuple[str, int, int]:
        return "aforward", x, threading.get_ident()


class Both(ForwardOnly, AforwardOnly):
    pass


class AsyncForward(Module):
    async def forward(self, x: int, *, fn: str = "") -> tuple[str, int, int]:
        return "async forward", x, threading.get_ident()


class AsyncForwardToo(AsyncForward, AforwardOnly):
    pass


def logged(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator as people write them: it hides that the function is async."""

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    wrapper.__code__ = wrapper.__code__.replace(co_name=fn.__name__)
    return wrapper


class Decorated(Module):
    @logged
    async def aforward(self, x: int, *, fn: str = "") -> tuple[str, int, int]:
        return "decorated", x, threading.get_ident()


class DecoratedForward(Module):
    @logged
    async def forward(self, x: int, *, fn: str = "") -> tuple[str, int, int]:
        return "decorated forward", x, threading.get_ident()


FORMS: list[tuple[type[Module], str, str]] = [
    (ForwardOnly, "forward", "forward"),
    (AforwardOnly, "aforward", "aforward"),
    (Both, "forward", "aforward"),
    (AsyncForward, "async forward", "async forward"),
    (AsyncForwardToo, "async forward", "aforward"),
    (Decorated, "decorated", "decorated"),
    (DecoratedForward, "decorated forward", "decorated forward"),
]


@pytest.mark.parametrize(("form", "called", "_"), FORMS, ids=lambda v: getattr(v, "__name__", ""))
def test_module_of_any_form_can_be_called(form: type[Module], called: str, _: str) -> None:
    """Programs are written in one form and used in both."""
    assert form()(3, fn="any name")[:2] == (called, 3)
    assert form()(x=3)[:2] == (called, 3)


@pytest.mark.parametrize(("form", "_", "awaited"), FORMS, ids=lambda v: getattr(v, "__name__", ""))
async def test_module_of_any_form_can_be_awaited(form: type[Module], _: str, awaited: str) -> None:
    """On asyncio and trio alike."""
    assert (await form().acall(3, fn="any name"))[:2] == (awaited, 3)
    assert (await form().acall(x=3))[:2] == (awaited, 3)


@pytest.mark.parametrize(("form", "called", "_"), FORMS, ids=lambda v: getattr(v, "__name__", ""))
async def test_module_of_any_form_can_be_called_inside_a_running_loop(
    form: type[Module], called: str, _: str
) -> None:
    """A notebook has a loop running, and people just call."""
    assert form()(3)[:2] == (called, 3)


async def test_sync_body_awaited_runs_off_the_loop_and_async_body_on_it() -> None:
    """A blocking program must not stop the other requests of a server."""
    here = threading.get_ident()
    assert (await ForwardOnly().acall(1))[2] != here
    assert (await AforwardOnly().acall(1))[2] == here


async def test_module_without_a_body_says_what_to_define() -> None:
    """The mistake is usually a misspelt `forward`."""

    class Bare(Module):
        def foward(self) -> None: ...

    with pytest.raises(ModuleError, match=r"`Bare` has neither.*def forward\(self"):
        Bare()()
    with pytest.raises(ModuleError, match="`Bare` has neither"):
        await Bare().acall()


@pytest.mark.parametrize("form", [ForwardOnly, AforwardOnly])
async def test_error_of_the_body_passes_through_as_it_is(form: type[Module]) -> None:
    """Handlers compare types and read attributes."""
    error = KeyError("mine")

    def fail(*args: Any) -> Any:
        raise error

    async def afail(*args: Any) -> Any:
        raise error

    module = form()
    setattr(
        module,
        "forward" if form is ForwardOnly else "aforward",
        fail if form is ForwardOnly else afail,
    )
    for run in (lambda: module(1), None):
        with pytest.raises(KeyError) as raised:
            run() if run else await module.acall(1)
        assert raised.value is error


@pytest.mark.parametrize("base", [Predict, ChainOfThought])
async def test_subclass_of_a_predictor_may_have_its_own_body(base: Any) -> None:
    """DSPy programs wrap `forward` of `Predict`; an override that is ignored would go unnoticed."""

    class Loud(base):  # type: ignore[misc]
        def forward(self, **inputs: Any) -> Any:
            predictor = self.predict if base is ChainOfThought else super()
            found = predictor.forward(**inputs)
            found.answer = found.answer.upper()
            return found

    class Quiet(base):  # type: ignore[misc]
        async def aforward(self, **inputs: Any) -> Any:
            predictor = self.predict if base is ChainOfThought else super()
            found = await predictor.aforward(**inputs)
            found.answer = found.answer.lower()
            return found

    lm = FakeLM(default={"reasoning": "r", "answer": "Aa"})
    with dspylite.context(lm=lm):
        for kind, expected in ((Loud, "AA"), (Quiet, "aa")):
            assert kind(QA)(question="q").answer == expected
            assert (await kind(QA).acall(question="q")).answer == expected


def test_subclass_that_never_calls_super_init_works() -> None:
    """DSPy sets these up by a metaclass, so programs rely on it."""

    class Forgetful(Module):
        def __init__(self) -> None:
            self.predict = Predict(QA)

        def forward(self, question: str) -> Any:
            return self.predict(question=question)

    program = Forgetful()
    with dspylite.context(lm=FakeLM([{"answer": "a"}])):
        assert program(question="q").answer == "a"
    assert (len(program.history), program.callbacks) == (1, ())
    assert copy.deepcopy(program).callbacks == ()


# --- parts ---------------------------------------------------------------------------------------


class Pair(NamedTuple):
    left: Any
    right: Any


def nested() -> Module:
    """Predictors in every place a program keeps them."""
    program = Program(["x"])
    program.steps = [Predict("a -> b"), ChainOfThought("a -> b")]
    program.named = {"x": Predict("a -> b"), 3: (Predict("a -> b"), [Predict("a -> b")])}
    program.pair = Pair(Predict("a -> b"), Program([]))
    program.again = program.predict
    program.steps_again = program.steps
    program.itself = program
    program.steps.append(program.steps)
    return program


PATHS = [
    "predict",
    "steps[0]",
    "steps[1].predict",
    "named['x']",
    "named['3'][0]",
    "named['3'][1][0]",
    "pair[0]",
    "pair[1].predict",
]


def test_predictors_are_named_by_their_paths() -> None:
    """Saved programs find their parts by these names; a shared part is named once."""
    program = nested()
    assert [path for path, _ in program.named_predictors()] == PATHS
    assert [path for path, _ in program.named_parameters()] == PATHS
    assert (
        program.predictors() == program.parameters() == [p for _, p in program.named_predictors()]
    )


def test_predictor_is_its_own_part_and_a_chain_of_thought_has_one() -> None:
    """Optimisers and `set_lm` treat single predictors like programs."""
    predict, think = Predict(QA), ChainOfThought(QA)
    assert predict.named_predictors() == [("self", predict)]
    assert think.named_predictors() == [("predict", think.predict)]


def test_sub_modules_come_with_the_module_itself_first() -> None:
    """Modules that hold no predictor are listed here too."""
    program = nested()
    found = dict(program.named_sub_modules())
    assert found["self"] is program
    assert list(found) == [
        "self",
        "self.predict",
        "self.steps[0]",
        "self.steps[1]",
        "self.named[x]",
        "self.pair[0]",
        "self.pair[1]",
        "self.steps[1].predict",
        "self.named[3][0]",
        "self.pair[1].predict",
        "self.named[3][1][0]",
    ]  # in DSPy's order, with DSPy's paths


def test_sub_modules_of_a_type_and_outside_compiled_ones() -> None:
    """A program is asked for its tools, and an optimiser for what it has not done yet."""
    program = nested()
    found = [path for path, _ in program.named_sub_modules(ChainOfThought)]
    assert found == ["self.steps[1]"]
    program.corpora = [{"x": 1.5}]
    assert ("self.corpora[0][x]", 1.5) in program.named_sub_modules(type_=float)
    program.pair.right._compiled = True
    left = [path for path, _ in program.named_sub_modules(skip_compiled=True)]
    assert "self.pair[1]" in left
    assert "self.pair[1].predict" not in left


def test_large_values_of_a_module_are_passed_over_quickly() -> None:
    """A program may hold its corpus; the walk must not grow with its square."""
    program = Program([str(n) for n in range(300_000)])
    program.table = {n: float(n) for n in range(300_000)}
    assert [path for path, _ in program.named_predictors()] == ["predict"]


def test_set_lm_reaches_every_predictor_and_get_lm_reads_it() -> None:
    """One line puts a whole program on another model."""
    program, lm = nested(), FakeLM()
    program.set_lm(lm)
    assert [p.lm for p in program.predictors()] == [lm] * len(PATHS)
    assert program.get_lm() is lm
    program.set_lm(None)
    assert program.get_lm() is None


def test_get_lm_of_several_or_none_is_refused() -> None:
    """There is no one LM to return."""
    program = nested()
    program.steps[0].lm = FakeLM()
    with pytest.raises(LMConfigurationError, match="has 8 predictors that do not share one LM"):
        program.get_lm()
    with pytest.raises(LMConfigurationError, match="has no predictor"):
        ForwardOnly().get_lm()


def test_map_named_predictors_replaces_every_predictor_everywhere() -> None:
    """Also in tuples and named tuples, and a shared one by the same new one at all its places."""
    program = nested()
    old = program.predictors()
    returned = program.map_named_predictors(lambda p: Predict("x -> y"))
    assert returned is program
    new = program.predictors()
    assert [path for path, _ in program.named_predictors()] == PATHS
    assert {id(p) for p in new} & {id(p) for p in old} == set()
    assert [p.signature.signature for p in new] == ["x -> y"] * len(PATHS)
    assert program.again is program.predict
    assert type(program.pair) is Pair
    assert type(program.named[3]) is tuple


# --- copies --------------------------------------------------------------------------------------


def mutables(value: Any, path: str = "root") -> Iterator[tuple[int, str]]:
    """Walk all that can change below a value, with its path."""
    stack, seen = [(value, path)], set()
    while stack:
        item, where = stack.pop()
        immutable = isinstance(item, str | bytes | int | float | type | types.FunctionType | None)
        if immutable or isinstance(item, SignatureMeta) or id(item) in seen:
            continue
        seen.add(id(item))
        if not isinstance(item, tuple):
            yield id(item), where
        if isinstance(item, dict):
            stack += [(inner, f"{where}[{key!r}]") for key, inner in item.items()]
        elif isinstance(item, list | tuple | set):
            stack += [(inner, f"{where}[{n}]") for n, inner in enumerate(item)]
        elif hasattr(item, "__dict__"):
            stack += [(inner, f"{where}.{name}") for name, inner in vars(item).items()]


@pytest.mark.parametrize(
    "copied", [lambda m: m.deepcopy(), lambda m: m.reset_copy(), copy.deepcopy]
)
def test_copy_shares_nothing_that_can_change(copied: Callable[[Any], Any]) -> None:
    """Threads that each got a copy must not meet in a list, a demo or a header."""
    program = nested()
    for predictor in program.predictors():
        predictor.demos = [{"question": "q", "tags": ["t"]}, Example(a=[1])]
        predictor.config = {"stop": ["x"]}
        predictor.traces.append({})
        predictor.lm = LM("openai/m", stop=["a"], extra_headers={"x": "y"}, extra_body={"a": [{}]})
        predictor.lm.middleware = ()
    twin = copied(program)
    theirs = dict(mutables(program))
    assert [where for found, where in mutables(twin) if found in theirs] == []
    assert [path for path, _ in twin.named_predictors()] == PATHS
    assert twin.again is twin.predict
    assert twin.itself is twin


def test_reset_copy_forgets_demos_and_lm_and_the_original_keeps_them() -> None:
    """An optimiser starts from a clean program, any number of times."""
    program, lm = Program(["x"]), FakeLM()
    program.predict.demos, program.predict.lm = [{}], lm
    twin = program.reset_copy()
    assert (twin.predict.demos, twin.predict.lm, twin.predict.signature) == ([], None, QA)
    assert (program.predict.demos, program.predict.lm) == ([{}], lm)
    assert twin.corpus == ["x"]


def test_copy_keeps_its_listeners() -> None:
    """A listener holds counters, locks and connections; a clone of it would tell nobody."""

    class Listener(dspylite.BaseCallback):
        def __init__(self) -> None:
            self.lock, self.calls = threading.Lock(), 0

        def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            with self.lock:
                self.calls += 1

    listener = Listener()
    module = ForwardOnly(callbacks=[listener])
    module.deepcopy()(1)
    module.reset_copy()(1)
    assert listener.calls == 2


def test_attribute_that_cannot_be_copied_is_named() -> None:
    """`cannot pickle '_thread.lock' object` alone would send the user searching."""
    program = Program([])
    program.lock = threading.Lock()
    with pytest.raises(ModuleError, match=r"`Program.lock` cannot be copied.*__deepcopy__"):
        program.deepcopy()


CARRIERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "cloudpickle": lambda m: pickle.loads(cloudpickle.dumps(m)),
}


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("make", [Predict, ChainOfThought])
@pytest.mark.parametrize("signature", [QA, make_signature("question, k: int = 3 -> answer")])
def test_used_predictor_survives_its_journey(carrier: str, make: Any, signature: Any) -> None:
    """Programs go to worker processes after they were tried out here."""
    lm = FakeLM(default={"reasoning": "r", "answer": "a"})
    predictor = make(signature, temperature=0.5)
    predictor.predictors()[0].demos = [Example(question="d", answer="e")]
    with dspylite.context(lm=lm):
        predictor(question="q")
        twin = CARRIERS[carrier](predictor)
        twin(question="q")
    assert lm.requests[0] == lm.requests[1]
    twin.predictors()[0].demos.append({})
    assert len(predictor.predictors()[0].demos) == 1


@pytest.mark.parametrize("carrier", CARRIERS)
def test_used_program_survives_its_journey_without_its_history(carrier: str) -> None:
    """After a thousand calls it is no heavier to send than before the first (B 7.2)."""
    program = Program(["x"])
    program.predict.lm = LM("offline/extractive")
    fresh = len(pickle.dumps(program))
    for _ in range(3):
        program(question="Which rock is dark? Basalt is dark.")
    assert len(program.history) == 3
    assert len(pickle.dumps(program)) == fresh
    twin = CARRIERS[carrier](program)
    assert (len(twin.history), len(twin.predict.lm.history)) == (0, 0)
    assert twin(question="Which rock is dark? Basalt is dark.") is not None
    assert (len(twin.history), len(program.history)) == (1, 3)


# --- ChainOfThought ------------------------------------------------------------------------------


async def test_chain_of_thought_reasons_before_it_answers() -> None:
    """The reasoning is an output of its own, before those of the signature."""
    think = ChainOfThought(QA)
    with dspylite.context(lm=FakeLM(default={"reasoning": "because", "answer": "a"})):
        called, awaited = think(question="q"), await think.acall(question="q")
    assert called == awaited
    assert list(called) == ["reasoning", "answer"]
    assert think.predict.signature.instructions == QA.instructions
    assert called.get_lm_usage() == awaited.get_lm_usage() is not None


def test_chain_of_thought_takes_another_reasoning_field() -> None:
    """Some tasks want a list of steps, described in their own words."""
    field = OutputField(desc="steps")
    think = ChainOfThought(QA, rationale_field=field, rationale_field_type=list[str])
    found = think.predict.signature.output_fields["reasoning"]
    assert (found.type_name, found.desc) == ("list[str]", "steps")


def test_chain_of_thought_keeps_a_reasoning_output_of_the_signature_in_front() -> None:
    """A program that declares its reasoning, with a type and words of its own, means that one."""
    own = QA.append("reasoning", OutputField(desc="steps"), list[str])
    think = ChainOfThought(own)
    assert list(think.predict.signature.output_fields) == ["reasoning", "answer"]
    assert think.predict.signature.output_fields["reasoning"] == own.output_fields["reasoning"]
    assert think.predict.signature.instructions == QA.instructions
    with dspylite.context(lm=FakeLM([{"reasoning": ["one", "two"], "answer": "a"}])):
        assert think(question="q")["reasoning"] == ["one", "two"]


def test_chain_of_thought_prefers_the_rationale_field_it_is_given() -> None:
    """What is said to the predictor itself goes before what the signature says."""
    field = OutputField(desc="mine")
    think = ChainOfThought("question -> reasoning: list[str], answer", rationale_field=field)
    found = think.predict.signature.output_fields["reasoning"]
    assert (found.type_name, found.desc) == ("str", "mine")
    assert list(think.predict.signature.output_fields) == ["reasoning", "answer"]


def test_chain_of_thought_over_a_reasoning_input_is_refused() -> None:
    """A name stands for one thing."""
    with pytest.raises(SignatureError, match="has a field `reasoning` already"):
        ChainOfThought("question, reasoning -> answer")


# --- batches -------------------------------------------------------------------------------------


async def test_batch_runs_the_program_over_inputs_of_every_form() -> None:
    """Examples, dicts and tuples, in input order, on threads and as tasks."""
    inputs: list[Any] = [{"x": 1}, (2,), Example(x=3, label="l").with_inputs("x")]
    expected = [("forward", n) for n in (1, 2, 3)]
    on_threads = await dspylite.asyncify(ForwardOnly().batch)(inputs, num_threads=2)
    assert [found[:2] for found in on_threads] == expected
    assert [found[:2] for found in await ForwardOnly().abatch(inputs, num_threads=2)] == expected


def test_batch_passes_its_options_on() -> None:
    """A failed item is reported in the way that was asked for."""
    outcomes = ForwardOnly().batch([{"x": 1}, {"y": 2}], on_error="return")
    assert [outcome.ok for outcome in outcomes] == [True, False]
    results, failed, errors = ForwardOnly().batch([{"y": 2}], return_failed_examples=True)
    assert (results, failed, [type(e) for e in errors]) == ([None], [{"y": 2}], [TypeError])
    with pytest.raises(BatchError) as raised:
        ForwardOnly().batch([{"y": 1}, {"y": 2}, {"x": 3}], num_threads=1, max_errors=1)
    assert raised.value.untried == 2


def test_repr_names_class_and_predictors() -> None:
    """A look at a program tells what it is made of."""
    assert repr(ForwardOnly()) == "ForwardOnly()"
    assert "predict = Predict(QA(question: str, k: int -> answer: str))" in repr(Program([]))
