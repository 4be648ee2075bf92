"""Run the command line for `python -m trainer`."""

from harvester.system.quiet_interrupt import QuietInterrupt, deliver_again

__all__ = ["main"]


def main() -> None:
    """Import the command line, and run it."""
    deliver_again()
    with QuietInterrupt():
        from trainer.cli.main import main as run
    run()


if __name__ == "__main__":
    main()
