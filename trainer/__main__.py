"""Run the command line for `python -m trainer`."""

from trainer.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
