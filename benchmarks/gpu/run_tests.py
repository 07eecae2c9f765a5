"""pytest that runs our kernels on any ptxas: the tests tell whether an old one gets them wrong."""

import sys

from retentive.bench.workers.ours import allow_any_ptxas

if __name__ == "__main__":
    import pytest

    allow_any_ptxas()
    raise SystemExit(pytest.main(sys.argv[1:]))
