"""What Prometheus may know of the standalone server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from image_worker.serve.jobs import Job, Jobs
from image_worker.worker import Worker

_PREFIX = "image_worker"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_PICTURES = (1, 1.5, 2, 3, 4, 6, 8, 16)


class Metrics:
    """One registry per server, so that tests can have several in a process."""

    MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, worker: Worker, jobs: Jobs) -> None:
        self._registry = registry = CollectorRegistry()
        self._ended = Counter(
            "jobs", "jobs that ended", ["status"], namespace=_PREFIX, registry=registry
        )
        self._errors = Counter(
            "job_errors", "jobs that failed", ["type"], namespace=_PREFIX, registry=registry
        )
        self._stages = Histogram(
            "stage_seconds", "by stage", ["stage"], _PREFIX, buckets=_SECONDS, registry=registry
        )
        self._together = Histogram(
            "batch_size",
            "pictures denoised at a time",
            namespace=_PREFIX,
            buckets=_PICTURES,
            registry=registry,
        )
        engine, encodings = worker.engine, worker.model.encodings
        for name, text, value in (
            ("jobs_unfinished", "jobs that are waiting or running", lambda: jobs.unfinished),
            ("jobs_waiting", "jobs that wait for the card", lambda: engine.waiting),
            ("jobs_running", "jobs on the card", lambda: engine.running),
            ("engine_busy_seconds", "with work; rate() is the load", lambda: engine.busy_seconds),
            ("engine_busy_fraction", "of the time since the start", engine.busy_fraction),
            ("encodings_made", "of prompts and pictures", lambda: encodings.misses),
            ("encodings_reused", "found among those made before", lambda: encodings.hits),
            ("vram_used_bytes", "of the card, by all processes", lambda: engine.memory()[0]),
            ("vram_total_bytes", "of the card", lambda: engine.memory()[1]),
        ):
            Gauge(name, text, namespace=_PREFIX, registry=registry).set_function(value)

    def observe(self, job: Job) -> None:
        """Counts a job that has ended."""
        self._ended.labels(job.status.lower()).inc()
        reply = job.reply or {}
        if "error" in reply:
            self._errors.labels(reply["error"]["type"]).inc()
        for stage, seconds in reply.get("timings", {}).items():
            self._stages.labels(stage).observe(seconds)
        if "batch_size" in reply:
            self._together.observe(reply["batch_size"])

    def text(self) -> str:
        """In Prometheus' text format."""
        return generate_latest(self._registry).decode()
