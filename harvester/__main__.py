"""`python -m harvester` and the `harvester` script."""

from harvester.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
