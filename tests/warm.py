"""For the server that tests fork commands from: what each of them would otherwise load and compile anew."""

from sae_sweep.config import overrides
from sae_sweep.kernels.cpu.backend import compile_slopes
from sae_sweep.reports import terminal  # noqa: F401
from sae_sweep.saes.penalties import formula_of
from sae_sweep.store import results as frame  # noqa: F401
from sae_sweep.sweep import local  # noqa: F401

for penalty in ("l1", "sqrt"):
    compile_slopes(formula_of(penalty))
    overrides.load(["toy=small", f"penalty={penalty}", "logger=none"])
overrides.load(["toy=small", "penalty=l1,sqrt", "logger=none"])
