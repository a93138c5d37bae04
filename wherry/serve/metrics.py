"""What the server counts, for Prometheus to collect at /metrics. Numbers only: no prompt and no answer."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of their own, so that two servers in one process do not mix."""

    def __init__(self, facts: dict[str, str]) -> None:
        new = self.registry = CollectorRegistry()
        ProcessCollector(registry=new)
        Info("wherry", "The model that is served and what runs it.", registry=new).info(facts)
        self.requests = Counter(
            "wherry_requests", "Requests by route and HTTP status.", ["route", "status"], registry=new
        )
        self.seconds = Histogram(
            "wherry_request_seconds", "Time from request to last byte.", ["route"], buckets=SECONDS, registry=new
        )
        self.first_token = Histogram(
            "wherry_first_token_seconds", "Time from request to first token.", buckets=SECONDS, registry=new
        )
        self.tokens = Counter("wherry_tokens", "Tokens read (in) and written (out).", ["direction"], registry=new)
        self.speed = Gauge(
            "wherry_decode_tokens_per_second", "Tokens per second of the last answer, after its first token.",
            registry=new,
        )  # fmt: skip
        self.queue = Gauge("wherry_queue_length", "Requests that run or wait.", registry=new)
        self.places = Gauge("wherry_queue_places", "Requests that may run or wait.", registry=new)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
