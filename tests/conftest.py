"""One thread for every library: the tests' matrices are small, and waiting threads slow a shared machine tenfold."""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
