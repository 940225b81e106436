"""The processes that another has started."""

import subprocess


def descendants(process: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    shown = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(pid): int(parent) for pid, parent in map(str.split, shown.splitlines())}
    children = [pid for pid, parent in parents.items() if parent == process]
    return [*children, *(further for child in children for further in descendants(child))]
