"""Ask one teacher one question: rate limit, retry, budget and circuit breaker around the client."""
