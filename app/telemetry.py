"""Metrics, in Prometheus' text format at /metrics."""

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter("headwater_requests_total", "Requests answered.", ["method", "route", "status"])
REQUEST_SECONDS = Histogram("headwater_request_seconds", "Time to answer a request.", ["route"])
ENGINE_QUEUE = Gauge("headwater_engine_queue", "Queries waiting for or in the engine.")
ENGINE_RESTARTS = Counter("headwater_engine_restarts_total", "Times the engine process was started again.")
ENGINE_SECONDS = Histogram("headwater_engine_seconds", "Time of a call to the engine, waiting included.", ["operation"])
