"""Prometheus metrics of the server."""

from hfvit.serve.batching import DynamicBatcher

LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


class ServerMetrics:
    """Counters and histograms of one server, in a registry of its own.

    Args:
        prometheus: the module `prometheus_client`.
    """

    def __init__(self, prometheus):
        self._prometheus = prometheus
        self.registry = prometheus.CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = prometheus.Counter("hfvit_requests", "Requests to /predict by HTTP status.", ["status"], **own)
        self.images = prometheus.Counter("hfvit_images", "Images that the model has classified.", **own)
        self.request_seconds = prometheus.Histogram(
            "hfvit_request_seconds", "Seconds from request to response.", buckets=LATENCY_BUCKETS, **own
        )
        self.batch_seconds = prometheus.Histogram(
            "hfvit_batch_seconds", "Seconds of a forward pass.", buckets=LATENCY_BUCKETS, **own
        )
        self.batch_images = prometheus.Histogram(
            "hfvit_batch_images", "Images per forward pass.", buckets=BATCH_BUCKETS, **own
        )
        self.queue_images = prometheus.Gauge("hfvit_queue_images", "Images being read, waiting or running.", **own)

    def observe_batch(self, size: int, seconds: float) -> None:
        """Count a forward pass without an error."""
        self.images.inc(size)
        self.batch_images.observe(size)
        self.batch_seconds.observe(seconds)

    def observe_request(self, status: int, seconds: float) -> None:
        """Count a request to /predict."""
        self.requests.labels(str(status)).inc()
        self.request_seconds.observe(seconds)

    def follow_queue(self, batcher: DynamicBatcher) -> None:
        """Read the gauge of the queue from `batcher`."""
        self.queue_images.set_function(lambda: batcher.reserved)

    def text(self) -> tuple[bytes, str]:
        """Return the metrics in Prometheus' text format, and its media type."""
        return self._prometheus.generate_latest(self.registry), self._prometheus.CONTENT_TYPE_LATEST
