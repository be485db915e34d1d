"""The metrics of `/metrics`, in Prometheus' text format."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one server, in its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("layalign_requests", "Answered requests.", ["endpoint", "status"], **own)
        self.request_seconds = Histogram(
            "layalign_request_seconds", "From a request's arrival to its complete answer.", ["endpoint"],
            buckets=_SECONDS, **own,
        )  # fmt: skip
        self.in_flight = Gauge("layalign_requests_in_flight", "Requests being answered, any endpoint.", **own)
        self.open = Gauge("layalign_requests_admitted", "Requests between admission and the end of the answer.", **own)
        self.queue_length = Gauge("layalign_queue_length", "Requests waiting for a place in the batch.", **own)
        self.queue_seconds = Histogram(
            "layalign_queue_seconds", "From arrival to a place in the batch.", buckets=_SECONDS, **own
        )
        self.first_token_seconds = Histogram(
            "layalign_first_token_seconds", "From arrival to the first token.", buckets=_SECONDS, **own
        )
        self.batch_rows = Gauge("layalign_batch_rows", "Sequences in the batch now.", **own)
        self.step_rows = Histogram("layalign_step_rows", "Sequences in each step.", buckets=_ROWS, **own)
        tokens = Counter("layalign_tokens", "Tokens: of sources, of the LLM's input, generated.", ["kind"], **own)
        self.source, self.prompt, self.generated = (tokens.labels(kind) for kind in ("source", "prompt", "generated"))
        self.cancelled = Counter("layalign_cancelled", "Requests cancelled before their end.", ["reason"], **own)
        self.failures = Counter("layalign_failures", "Steps of the model that failed.", **own)
        self.healthy = Gauge("layalign_healthy", "1 while /health is 200, else 0.", **own)
        self.busy_seconds = Gauge("layalign_step_running_seconds", "Duration of the step in progress.", **own)
        self.connections = Gauge("layalign_connections", "Open connections.", **own)
        self.waiting_connections = Gauge("layalign_connections_waiting", "Connections waiting for a client.", **own)
        self.closed = Counter("layalign_connections_closed", "Connections closed by the server.", ["reason"], **own)
        self.malformed = Counter("layalign_malformed_requests", "Requests that were not valid HTTP.", **own)

    def text(self) -> bytes:
        """The content of `/metrics`."""
        return generate_latest(self.registry)
