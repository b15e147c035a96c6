"""HTTP server with dynamic batching, and files for containers."""
