"""Before numpy is there: one thread for products of matrices. The tests' are small, and gain nothing from a second
thread but to wait for it wherever something else has the core. The kernels' threads are their own."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
