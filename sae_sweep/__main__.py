"""`sae-sweep` and `python -m sae_sweep`."""

from sae_sweep import interruption


def main() -> None:
    """Entry point: signals are noted from the first line on, while the rest is still to be imported."""
    interruption.note_signals()
    from sae_sweep import cli

    cli.main()


if __name__ == "__main__":
    main()
