"""A harvest on several machines: ranks are actors of a Ray cluster, a coordinator allocates limits."""
