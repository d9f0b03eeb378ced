"""Memories for other programs: an OpenAI-compatible server with a web page, and an MCP server."""
