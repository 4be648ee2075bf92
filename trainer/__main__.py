"""`python -m trainer` and the `trainer` script."""

from trainer.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
