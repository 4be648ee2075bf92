"""`python -m harvester` and the `harvester` script."""

from harvester.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
