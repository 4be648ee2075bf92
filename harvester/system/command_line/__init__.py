"""Build commands and what they print: options, tables, wrapped lines, and what an installation lacks."""
