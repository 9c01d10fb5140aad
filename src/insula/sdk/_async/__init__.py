"""The SDK for asyncio, and the source of that for threads."""
