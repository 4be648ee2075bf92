"""Ask one teacher one question: rate limit, retries, budget and circuit breaker around the HTTP client."""
