"""For the server that tests fork commands from: what each of them would otherwise load and compile anew."""

from sae_sweep import commands, config, frame  # noqa: F401
from sae_sweep.reports import terminal  # noqa: F401
from sae_sweep.saes.kernels.cpu import compile_slopes
from sae_sweep.sweep import local  # noqa: F401

for penalty in ("l1", "sqrt"):
    compile_slopes(penalty)
    config.load(["toy=small", f"penalty={penalty}", "logger=none"])
config.load(["toy=small", "penalty=l1,sqrt", "logger=none"])
