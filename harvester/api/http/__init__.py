"""Send requests over HTTP and read the replies. Only this package names httpx and aiohttp."""
