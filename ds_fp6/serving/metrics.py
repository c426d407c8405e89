"""What ``/metrics`` shows, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ds_fp6.serving.engine import Engine

#: Seconds.
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class Metrics:
    """Of one server. Requests are HTTP requests; a request has a sequence for each prompt and choice."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        pipeline = engine.pipeline

        def gauge(name: str, text: str, read) -> None:
            Gauge(f"ds_fp6_{name}", text, registry=self.registry).set_function(read)

        gauge("sequences_running", "Sequences that hold KV blocks", lambda: pipeline.running)
        gauge("sequences_waiting", "Sequences without KV blocks", lambda: max(0, pipeline.live - pipeline.running))
        gauge("kv_blocks_free", "Free blocks of the KV cache", lambda: pipeline.free_blocks)
        gauge("kv_blocks", "Blocks of the KV cache", lambda: pipeline.blocks)
        gauge("kv_block_tokens", "Tokens that a block holds", lambda: pipeline.block_size)
        self.requests = Counter(
            "ds_fp6_requests", "HTTP requests by path and status", ["path", "status"], registry=self.registry
        )
        self.requests_running = Gauge("ds_fp6_requests_running", "HTTP requests in flight", registry=self.registry)
        self.prompt_tokens = Counter("ds_fp6_prompt_tokens", "Prompt tokens accepted", registry=self.registry)
        self.generation_tokens = Counter("ds_fp6_generation_tokens", "Tokens generated", registry=self.registry)
        self.finished = Counter(
            "ds_fp6_sequences_finished", "Sequences by how they ended", ["reason"], registry=self.registry
        )
        for reason in ("stop", "length", "cancelled", "failed"):
            self.finished.labels(reason)
        self.ttft = self._histogram("time_to_first_token_seconds", "Of a sequence, from its request", REQUEST_BUCKETS)
        self.tpot = self._histogram("time_per_output_token_seconds", "Of a sequence, after its first", TOKEN_BUCKETS)
        self.e2e = self._histogram("request_latency_seconds", "Of a sequence, from its request", REQUEST_BUCKETS)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"ds_fp6_{name}", text, buckets=buckets, registry=self.registry)

    def render(self) -> bytes:
        return generate_latest(self.registry)
