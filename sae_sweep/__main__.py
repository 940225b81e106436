"""`sae-sweep` and `python -m sae_sweep`."""

from sae_sweep import environment, signals


def main() -> None:
    """Entry point: signals are noted from the first line on, while the rest is still to be imported."""
    signals.note_signals()
    environment.prepare()
    from sae_sweep.cli import app

    app.main()


if __name__ == "__main__":
    main()
