"""The command line of the harvester: one module for each group of commands."""
