"""`sae-sweep` and `python -m sae_sweep`."""

import gc

from sae_sweep import environment, signals

# How many objects Python makes before it looks for garbage among them: importing makes half a million, and none of it
# is garbage. By default it is 700.
BEFORE_COLLECTION = 10_000


def main() -> None:
    """Entry point: signals are noted from the first line on, while the rest is still to be imported."""
    signals.note_signals()
    gc.set_threshold(BEFORE_COLLECTION)
    environment.prepare()
    from sae_sweep.cli import app

    try:
        app.main()
    finally:
        gc.freeze()  # what ends with the process is not searched for garbage once more


if __name__ == "__main__":
    main()
