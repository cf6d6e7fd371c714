"""Spans of each request across processes by OpenTelemetry, into a file that Perfetto opens: `RequestTracer`.

| span | process | from, to |
|---|---|---|
| `request` | scheduler | arrival, last token |
| `queue`, `prefill`, `decode` | scheduler | arrival, first scheduled, first token, last token |
| `pack`, `wire`, `unpack` of a layer | the instance that did it | as its transport recorded it |

A request's trace id is its id in the scheduler, so that what instances report finds its trace without a table. The
times of other hosts are shifted by the clock difference that they report; nothing synchronises clocks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from hetkv.errors import InputError
from hetkv.serve.generation import Generation
from hetkv.serve.member import Member
from hetkv.serve.messages import Trace

try:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context
except ModuleNotFoundError:
    raise InputError("--trace needs opentelemetry-sdk: pip install 'hetkv[trace]'") from None

SCHEDULER = "scheduler"
REQUEST_DIGITS = 32
INSTANCE = "hetkv.instance"
"""Attribute of a span: the process whose work it is."""


class RequestIds(RandomIdGenerator):
    """Random ids, except for the trace and the root span of a request, which follow from its own id."""

    def __init__(self) -> None:
        self.root: str | None = None
        """The request whose root span begins next."""

    def generate_trace_id(self) -> int:
        return int(super().generate_trace_id()) if self.root is None else trace_id(self.root)

    def generate_span_id(self) -> int:
        return int(super().generate_span_id()) if self.root is None else span_id(self.root)


def trace_id(request: str) -> int:
    """Of a request, whose id is 32 hexadecimal digits."""
    return int(request, 16)


def span_id(request: str) -> int:
    """Of its root span."""
    return int(request[16:], 16) or 1


class PerfettoExporter(SpanExporter):
    """Appends spans to a file of Chrome trace events, one process an instance. It is valid after `shutdown`; Perfetto
    opens it before that, too."""

    def __init__(self, path: Path | str) -> None:
        """Raises `InputError` where the file cannot be written."""
        try:
            self._file: TextIO = Path(path).open("w")  # noqa: SIM115  closed by `shutdown`
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        self._processes: dict[str, int] = {}
        self._file.write("[")
        self._first = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        for span in spans:
            self._export(span)
        return SpanExportResult.SUCCESS

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        self._file.flush()
        return True

    def shutdown(self) -> None:
        if not self._file.closed:
            self._file.write("\n]\n")
            self._file.close()

    def _export(self, span: ReadableSpan) -> None:
        attributes = dict(span.attributes or {})
        process = self._process(str(attributes.pop(INSTANCE, SCHEDULER)))
        trace = f"{span.context.trace_id:032x}"
        # Spans of one id are nested, which those of a request's phases are and those of its layers are not.
        track = trace if process == self._processes.get(SCHEDULER) else f"{span.context.span_id:016x}"
        event = {"cat": span.name.split()[0], "name": span.name, "pid": process, "tid": 0, "id": track}
        parent = "" if span.parent is None else f"{span.parent.span_id:016x}"
        ids = {"trace_id": trace, "span_id": f"{span.context.span_id:016x}", "parent_id": parent}
        assert span.start_time is not None
        assert span.end_time is not None
        self._write({"ph": "b", "ts": span.start_time / 1e3, "args": {**ids, **attributes}, **event})
        self._write({"ph": "e", "ts": span.end_time / 1e3, **event})

    def _process(self, name: str) -> int:
        if name not in self._processes:
            self._processes[name] = len(self._processes) + 1
            self._write({"ph": "M", "name": "process_name", "pid": self._processes[name], "args": {"name": name}})
        return self._processes[name]

    def _write(self, event: Mapping[str, Any]) -> None:
        self._file.write("\n" if self._first else ",\n")
        self._first = False
        self._file.write(json.dumps(event))


class RequestTracer:
    """Makes the spans. All calls come from the server's event loop."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._ids = RequestIds()
        self._provider = TracerProvider(id_generator=self._ids, shutdown_on_exit=False)
        self._provider.add_span_processor(SimpleSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("hetkv")
        self._clock_ns = time.time_ns() - time.monotonic_ns()

    def ended(self, generation: Generation) -> None:
        """A request has ended, however it did."""
        g = generation
        stop = g.last_token or time.monotonic()
        self._ids.root = g.id
        facts: dict[str, str | int] = {
            "finish": g.finish,
            "prompt_tokens": len(g.prompt),
            "output_tokens": len(g.generated),
            "restarts": g.restarts,
            "attempts": g.attempt,
        }
        root = self._tracer.start_span("request", start_time=self._ns(g.arrival), attributes=facts)
        self._ids.root = None
        for name, begin, end in (
            ("queue", g.arrival, g.scheduled or g.first_token or stop),
            ("prefill", g.scheduled, g.first_token),
            ("decode", g.first_token, g.last_token),
        ):
            if begin is not None and end is not None:
                self._span(name, g.id, self._ns(begin), self._ns(end), {})
        root.end(end_time=self._ns(stop))

    def on_trace(self, member: Member, trace: Trace) -> None:
        """What an instance's transport did."""
        for moved in trace.moved:
            request, _, attempt = moved.transfer.partition("/")
            if len(request) != REQUEST_DIGITS:
                continue  # the instance has forgotten which request it was of
            facts = {INSTANCE: member.name, "layer": moved.layer, "bytes": moved.num_bytes, "attempt": attempt}
            start, stop = moved.start_ns + trace.clock_ns, moved.stop_ns + trace.clock_ns
            self._span(f"{moved.kind} layer {moved.layer}", request, start, stop, facts)

    def close(self) -> None:
        """Write what is left."""
        self._provider.shutdown()

    def _span(self, name: str, request: str, start_ns: int, stop_ns: int, facts: Mapping[str, Any]) -> None:
        root = SpanContext(trace_id(request), span_id(request), is_remote=True, trace_flags=TraceFlags(1))
        context = set_span_in_context(NonRecordingSpan(root))
        span = self._tracer.start_span(name, context, start_time=start_ns, attributes=dict(facts))
        span.end(end_time=stop_ns)

    def _ns(self, seconds: float) -> int:
        return int(seconds * 1e9) + self._clock_ns
