"""A batch on four threads, traced with OpenTelemetry and printed as trees, without any network.

A service would give its provider an exporter of `opentelemetry-exporter-otlp` instead.
"""

from collections.abc import Iterable

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import dspylite as dspy
from dspylite.integrations.opentelemetry import instrument

RIVERS = (
    "The Nile flows north. The Amazon carries the most water. The Rhine flows through Basel. "
    "The Danube flows through Vienna."
)


class Atlas:
    """A tool of one's own, with a span like those of the package."""

    kind = "tool"
    name = "atlas"

    @dspy.with_callbacks
    def __call__(self, page: str) -> str:
        return RIVERS if page == "rivers" else ""


class Guide(dspy.Module):
    """Looks a page up, and answers from it."""

    def __init__(self) -> None:
        super().__init__()
        self.atlas = Atlas()
        self.answer = dspy.ChainOfThought("context, question -> answer")

    def forward(self, question: str) -> str:
        found = self.answer(context=self.atlas("rivers"), question=question)
        return str(found.answer)


def as_trees(spans: Iterable[ReadableSpan]) -> list[str]:
    """Write each span in a line, below and to the right of its parent."""
    below: dict[int | None, list[ReadableSpan]] = {}
    for span in spans:
        below.setdefault(span.parent and span.parent.span_id, []).append(span)
    lines: list[str] = []

    def write(span: ReadableSpan, depth: int) -> None:
        found = dict(span.attributes or {})
        tokens = ", counted its tokens" if found.get("gen_ai.usage.input_tokens") else ""
        lines.append(f"{'  ' * depth}{span.name} (item {found['dspylite.item_index']}{tokens})")
        for each in sorted(below.get(span.context.span_id, ()), key=lambda s: s.start_time or 0):
            write(each, depth + 1)

    for root in sorted(below[None], key=lambda s: str((s.attributes or {})["dspylite.item_index"])):
        write(root, 0)
    return lines


def main() -> list[str]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    questions = ["Which river flows north?", "Which river flows through Vienna?"]
    dspy.configure(lm=dspy.LM("offline/extractive"))
    with instrument(tracer_provider=provider):
        Guide().batch([{"question": question} for question in questions], num_threads=4)
    return as_trees(exporter.get_finished_spans())


if __name__ == "__main__":
    print("\n".join(main()))
