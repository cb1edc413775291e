"""What the tests stand on: hosts, operators, engines and servers made for them."""

import os

# Tests share two processors. A thread that waits for another must leave its own to them, not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
