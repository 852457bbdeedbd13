"""The MCP server and the command line: tools, services and settings."""
